//! Dated prices: which row a call is priced by, and the arithmetic.

use super::money::PicoUsd;
use crate::usage::{CallOpened, Usage};
use chrono::{DateTime, Utc};
use sqlx::{PgConnection, PgPool, Row, postgres::PgRow};
use std::collections::{BTreeMap, BTreeSet};

/// Dearest price that is believed, micro-USD per million tokens: 10,000 USD. Chosen: ten times the dearest model ever listed.
pub const PRICE_UMTOK_MAX: i64 = 10_000_000_000;
/// Dearest price of a request by itself, pico-USD: 10 USD. Chosen.
pub const PER_REQUEST_PUSD_MAX: i64 = 10_000_000_000_000;

/// A row of `model_pricing`. Micro-USD per million tokens, which is pico-USD per token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Price {
    pub id: i64,
    pub input: i64,
    pub cached_input: i64,
    pub cache_write: i64,
    pub output: i64,
    pub reasoning: i64,
    pub per_request: i64,
}

impl Price {
    /// The exact cost of what a call used. What does not fit an i64 (9.2 million USD) is the largest amount.
    #[must_use]
    pub fn cost(&self, usage: &Usage) -> PicoUsd {
        let cached = usage.tokens_cached.min(usage.tokens_prompt);
        let written = usage.tokens_cache_write.min(usage.tokens_prompt - cached);
        let reasoning = usage.tokens_reasoning.min(usage.tokens_output);
        let part = |tokens: u64, price: i64| i128::from(tokens) * i128::from(price);
        let total = i128::from(self.per_request)
            + part(usage.tokens_prompt - cached - written, self.input)
            + part(cached, self.cached_input)
            + part(written, self.cache_write)
            + part(usage.tokens_output - reasoning, self.output)
            + part(reasoning, self.reasoning);
        PicoUsd(i64::try_from(total).unwrap_or(i64::MAX))
    }

    /// Whether input or output costs more than these ceilings, in micro-USD per million tokens.
    #[must_use]
    pub fn exceeds(&self, input_max: Option<u64>, output_max: Option<u64>) -> bool {
        let above = |price: i64, max: Option<u64>| max.is_some_and(|max| i128::from(price) > i128::from(max));
        above(self.input, input_max) || above(self.output.max(self.reasoning), output_max)
    }

    /// The most that a call of that size can cost.
    #[must_use]
    pub fn worst(&self, input_tokens: u64, output_tokens: u64) -> PicoUsd {
        let input = self.input.max(self.cached_input).max(self.cache_write);
        let output = self.output.max(self.reasoning);
        let total = i128::from(self.per_request)
            + i128::from(input_tokens) * i128::from(input)
            + i128::from(output_tokens) * i128::from(output);
        PicoUsd(i64::try_from(total).unwrap_or(i64::MAX))
    }

    /// Whether anybody charges that. Price lists are checked when they are read; a row that was written by hand is not.
    fn is_believable(&self) -> bool {
        let parts = [self.input, self.cached_input, self.cache_write, self.output, self.reasoning];
        parts.into_iter().all(|price| price <= PRICE_UMTOK_MAX) && self.per_request <= PER_REQUEST_PUSD_MAX
    }
}

/// The provider's price for every model of its own. It is a guess that somebody made for servers of one's own, and is never one for
/// a server that sends bills: there only a price of the model counts.
pub const ANY_MODEL: &str = "*";

/// Which rows may price a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Rows {
    /// The model's own, else the provider's `*`.
    OwnOrAny,
    /// The model's own.
    Own,
}

impl Rows {
    /// Those that may price a call.
    pub(super) fn of(call: &CallOpened) -> Self {
        if call.local { Self::OwnOrAny } else { Self::Own }
    }
    /// What may stand for a model beside its name.
    pub(super) fn or_any(self, model: &str) -> &str {
        if self == Self::Own { model } else { ANY_MODEL }
    }
}

/// The price in force at `at` (now if `None`) for a prompt of that size: newest date, then the highest floor below the prompt; a model's own rows
/// before the provider's `*`, as [`find_among`] with [`Rows::OwnOrAny`]. `None` when the model has no price, none that can be believed, or is withdrawn: it may not be used.
///
/// # Transaction
/// Reads only.
pub async fn find(
    conn: &mut PgConnection,
    provider: &str,
    model: &str,
    prompt_tokens: u64,
    at: Option<DateTime<Utc>>,
) -> Result<Option<Price>, sqlx::Error> {
    find_among(conn, Rows::OwnOrAny, provider, model, prompt_tokens, at).await
}

/// As [`find`], among some rows only.
///
/// # Transaction
/// Reads only.
pub async fn find_among(
    conn: &mut PgConnection,
    rows: Rows,
    provider: &str,
    model: &str,
    prompt_tokens: u64,
    at: Option<DateTime<Utc>>,
) -> Result<Option<Price>, sqlx::Error> {
    Ok(tiers(conn, rows, provider, model, at).await?.price(prompt_tokens))
}

/// [`find_among`] for a call that is about to be made, with the most that it can cost if its prompt turns out smaller: one below a floor
/// may be dearer.
///
/// # Transaction
/// Reads only.
pub async fn bound(
    conn: &mut PgConnection,
    rows: Rows,
    provider: &str,
    model: &str,
    input_tokens_max: u64,
    output_tokens_max: u64,
) -> Result<Option<(Price, PicoUsd)>, sqlx::Error> {
    Ok(tiers(conn, rows, provider, model, None).await?.bound(input_tokens_max, output_tokens_max))
}

/// Prices of a model at one date, by prompt size, the highest floor first. Empty: it has none.
#[derive(Clone, Debug, Default)]
pub(super) struct Tiers(Vec<Tier>);

#[derive(Clone, Copy, Debug)]
struct Tier {
    id: i64,
    /// Holds for prompts strictly larger, 0 for all.
    floor: u64,
    /// `None`: it may not be used.
    price: Option<Price>,
}

impl Tiers {
    /// Rows of `model_pricing`, which never change.
    pub fn ids(&self) -> Vec<i64> {
        self.0.iter().map(|tier| tier.id).collect()
    }

    fn up_to(&self, prompt_tokens: u64) -> impl Iterator<Item = &Tier> {
        self.0.iter().filter(move |tier| tier.floor == 0 || tier.floor < prompt_tokens)
    }

    /// As [`find_among`].
    pub fn price(&self, prompt_tokens: u64) -> Option<Price> {
        self.up_to(prompt_tokens).next().and_then(|tier| tier.price)
    }

    /// As [`bound`].
    pub fn bound(&self, input_tokens_max: u64, output_tokens_max: u64) -> Option<(Price, PicoUsd)> {
        let price = self.price(input_tokens_max)?;
        let mut worst = PicoUsd(0);
        let mut largest = input_tokens_max;
        for tier in self.up_to(input_tokens_max) {
            worst = worst.max(tier.price.map_or(PicoUsd(0), |price| price.worst(largest, output_tokens_max)));
            largest = tier.floor;
        }
        Some((price, worst))
    }
}

/// Those of the newest date.
///
/// # Transaction
/// Reads only.
pub(super) async fn tiers(
    conn: &mut PgConnection,
    among: Rows,
    provider: &str,
    model: &str,
    at: Option<DateTime<Utc>>,
) -> Result<Tiers, sqlx::Error> {
    // The date first and then the size: a date whose rows leave small prompts out has no price for them, not that of before.
    let rows = sqlx::query(
        "with newest as (
           select model_id, effective_from from model_pricing
           where provider = $1 and model_id in ($2, $4) and service_tier = 'standard' and effective_from <= coalesce($3, engine_now())
           order by (model_id = $2) desc, effective_from desc limit 1)
         select p.id, p.input_umtok, p.cached_input_umtok, p.cache_write_umtok, p.output_umtok, p.reasoning_umtok, p.per_request_pusd,
                p.billable, p.min_prompt_tokens
         from newest n join model_pricing p on p.model_id = n.model_id and p.effective_from = n.effective_from
         where p.provider = $1 and p.service_tier = 'standard'
         order by p.min_prompt_tokens desc",
    )
    .bind(provider)
    .bind(model)
    .bind(at)
    .bind(among.or_any(model))
    .fetch_all(conn)
    .await?;
    let tier = |row: &PgRow| -> Result<Tier, sqlx::Error> {
        let price = of_row(row)?;
        let billable: bool = row.try_get("billable")?;
        if billable && !price.is_believable() {
            tracing::error!(provider, model, pricing = price.id, "a price that nobody charges; the model is not used");
        }
        let floor = u64::try_from(row.try_get::<i64, _>("min_prompt_tokens")?).unwrap_or(0);
        Ok(Tier { id: price.id, floor, price: Some(price).filter(|price| billable && price.is_believable()) })
    };
    rows.iter().map(tier).collect::<Result<_, _>>().map(Tiers)
}

/// Those of `candidates` (provider, model) that have no price of their own now and so are not used, each once.
///
/// # Transaction
/// Reads only, on a connection of its own.
pub async fn missing(
    pool: &PgPool,
    candidates: impl IntoIterator<Item = (String, String)> + Send,
) -> Result<BTreeSet<(String, String)>, sqlx::Error> {
    let candidates: BTreeSet<_> = candidates.into_iter().collect();
    let mut conn = pool.acquire().await?;
    let mut missing = BTreeSet::new();
    for (provider, model) in candidates {
        if find_among(&mut conn, Rows::Own, &provider, &model, 0, None).await?.is_none() {
            missing.insert((provider, model));
        }
    }
    Ok(missing)
}

/// Limits of models as the newest rows in force name them: (provider, model) to window and longest answer, in tokens.
///
/// # Transaction
/// Reads only, on a connection of its own.
pub async fn limits(pool: &PgPool) -> Result<BTreeMap<(String, String), (u64, u32)>, sqlx::Error> {
    let rows: Vec<(String, String, i64, i64)> = sqlx::query_as(
        "select distinct on (provider, model_id) provider, model_id, context_tokens, max_output_tokens from model_pricing
         where service_tier = 'standard' and effective_from <= engine_now() and context_tokens > 0 and max_output_tokens > 0
         order by provider, model_id, effective_from desc, min_prompt_tokens",
    )
    .fetch_all(pool)
    .await?;
    let limits = |(provider, model, window, output): (String, String, i64, i64)| {
        let limits = (u64::try_from(window).unwrap_or(0), u32::try_from(output).unwrap_or(u32::MAX));
        ((provider, model), limits)
    };
    Ok(rows.into_iter().map(limits).collect())
}

/// The row with that id, in force or not.
pub(super) async fn by_id(conn: &mut PgConnection, id: i64) -> Result<Option<Price>, sqlx::Error> {
    let row = sqlx::query(
        "select id, input_umtok, cached_input_umtok, cache_write_umtok, output_umtok, reasoning_umtok, per_request_pusd
         from model_pricing where id = $1",
    )
    .bind(id)
    .fetch_optional(conn)
    .await?;
    row.as_ref().map(of_row).transpose()
}

fn of_row(row: &PgRow) -> Result<Price, sqlx::Error> {
    let (input, output): (i64, i64) = (row.try_get("input_umtok")?, row.try_get("output_umtok")?);
    Ok(Price {
        id: row.try_get("id")?,
        input,
        cached_input: row.try_get::<Option<i64>, _>("cached_input_umtok")?.unwrap_or(input),
        cache_write: row.try_get::<Option<i64>, _>("cache_write_umtok")?.unwrap_or(input),
        output,
        reasoning: row.try_get::<Option<i64>, _>("reasoning_umtok")?.unwrap_or(output),
        per_request: row.try_get("per_request_pusd")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_of_token_has_its_price() {
        let price =
            Price { id: 1, input: 10, cached_input: 1, cache_write: 20, output: 100, reasoning: 50, per_request: 7 };
        let usage = Usage {
            tokens_prompt: 100,
            tokens_cached: 40,
            tokens_cache_write: 10,
            tokens_output: 30,
            tokens_reasoning: 20,
            ..Usage::default()
        };
        assert_eq!(price.cost(&usage), PicoUsd(7 + 50 * 10 + 40 + 10 * 20 + 10 * 100 + 20 * 50));
        assert_eq!(price.worst(100, 30), PicoUsd(7 + 100 * 20 + 30 * 100));
        assert!(!price.exceeds(None, None) && !price.exceeds(Some(10), Some(100)));
        assert!(price.exceeds(Some(9), None) && price.exceeds(None, Some(99)));
        let absurd = Usage { tokens_prompt: u64::MAX, tokens_output: u64::MAX, ..Usage::default() };
        assert_eq!(price.cost(&absurd), PicoUsd(i64::MAX));
    }
}
