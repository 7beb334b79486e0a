//! Price lists of others, read as decimal text: what they say, whether it can be believed, and what of it is new.
//!
//! A list becomes [`Quote`]s; a quote that differs from the price in force becomes new rows with one `effective_from`. Rows are
//! never changed, and a price never begins in the past: calls that were made keep the price that they were made under.

use super::price::PER_REQUEST_PUSD_MAX;
use crate::decimal::pusd_from_decimal;
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use sqlx::{PgConnection, Row};
use std::collections::{BTreeMap, BTreeSet};

pub use super::price::PRICE_UMTOK_MAX;
/// Largest list, in bytes. Chosen: five times the longest public one.
pub const LIST_BYTES_MAX: usize = 16 << 20;
/// Most models of a list. Chosen: three times the longest public one.
pub const MODELS_MAX: usize = 10_000;
/// Longest name of a model, in bytes. Chosen.
const NAME_BYTES_MAX: usize = 200;
/// Prices of one model by prompt size.
const TIERS_MAX: usize = 8;

/// Seconds until a new price begins at the earliest: a call that is announced while the rows are being written must not have
/// begun under them. Chosen: longer than writing the longest list.
const LEAD_SECONDS: i64 = 60;

/// Why a price cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize)]
#[error("line {line}: {model}: {problem} [{code}]")]
pub struct Refusal {
    pub code: &'static str,
    /// 1-based line of the list; 0 for a list as a whole.
    pub line: usize,
    pub model: String,
    pub problem: String,
}

/// Prices for prompts above so many tokens.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tier {
    /// Holds for prompts strictly larger.
    pub min_prompt_tokens: i64,
    pub input_umtok: i64,
    pub cached_input_umtok: Option<i64>,
    pub cache_write_umtok: Option<i64>,
    pub output_umtok: i64,
    pub reasoning_umtok: Option<i64>,
    pub per_request_pusd: i64,
}

/// What a list says that a model costs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Quote {
    pub provider: String,
    pub model: String,
    /// By `min_prompt_tokens`, ascending; the first is for all prompts.
    pub tiers: Vec<Tier>,
    pub context_tokens: Option<i64>,
    pub max_output_tokens: Option<i64>,
}

/// A list, read.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct List {
    pub quotes: Vec<Quote>,
    pub refused: Vec<Refusal>,
    /// Entries without a price per token, and of providers that are not ours.
    pub skipped: usize,
}

/// What may be believed beyond the usual.
#[derive(Clone, Copy, Debug, Default)]
pub struct Trust {
    /// A model whose input and output cost nothing is free, and not a gap in the list.
    pub free: bool,
}

type Fields<'a> = BTreeMap<String, &'a RawValue>;

/// Reads prices out of the fields of one entry.
struct Entry<'a> {
    text: &'a str,
    model: String,
    fields: Fields<'a>,
}

impl<'a> Entry<'a> {
    fn refusal(&self, at: &str, code: &'static str, problem: String) -> Refusal {
        Refusal { code, line: line_of(self.text, at), model: self.model.clone(), problem }
    }

    fn raw(&self, name: &str) -> Option<&'a str> {
        self.fields.get(name).map(|raw| raw.get()).filter(|raw| *raw != "null")
    }

    /// A price in USD, exactly, in pico-USD; `None` when the list names none.
    fn price(&self, name: &str, most: i64) -> Result<Option<i64>, Refusal> {
        let Some(raw) = self.raw(name) else { return Ok(None) };
        let digits = raw.trim_matches('"').trim();
        let refused = |code, problem: &str| Err(self.refusal(raw, code, format!("{name} is {raw}: {problem}")));
        if digits.starts_with('-') {
            return refused("price_negative", "a price is not negative");
        }
        match pusd_from_decimal(digits) {
            Some(pusd) if pusd <= most => Ok(Some(pusd)),
            Some(_) => refused("price_absurd", "nobody charges that; is it per token?"),
            None if !digits.is_empty()
                && digits.bytes().all(|b| b.is_ascii_digit() || b == b'.')
                && digits.bytes().filter(|b| *b == b'.').count() <= 1 =>
            {
                refused("price_absurd", "nobody charges that; is it per token?")
            }
            None => refused("price_not_decimal", "write a decimal number such as 0.0000002"),
        }
    }

    fn tokens(&self, name: &str) -> Option<i64> {
        self.raw(name).and_then(|raw| raw.trim_matches('"').parse().ok()).filter(|n| *n > 0)
    }
}

/// 1-based line of a part of the text.
fn line_of(text: &str, part: &str) -> usize {
    let at = (part.as_ptr() as usize).saturating_sub(text.as_ptr() as usize).min(text.len());
    1 + text.as_bytes()[..at].iter().filter(|b| **b == b'\n').count()
}

fn whole(code: &'static str, problem: String) -> Refusal {
    Refusal { code, line: 0, model: "the list".into(), problem }
}

fn checked(text: &str) -> Result<(), Refusal> {
    if text.len() > LIST_BYTES_MAX {
        return Err(whole("price_list_too_large", format!("it has {} bytes; at most {LIST_BYTES_MAX}", text.len())));
    }
    Ok(())
}

fn unreadable(error: &serde_json::Error) -> Refusal {
    Refusal { line: error.line(), ..whole("price_list_unreadable", format!("it is no such JSON: {error}")) }
}

/// Reads the common JSON map of prices: model → `input_cost_per_token`, `output_cost_per_token` and so on, USD per token. Models
/// of `gemini` and `openrouter` are ours by their `litellm_provider`; those of `only` are taken as that provider's whatever they say.
///
/// # Errors
/// The list as a whole cannot be read.
pub fn from_map(text: &str, only: Option<&str>, trust: Trust) -> Result<List, Refusal> {
    checked(text)?;
    let entries: BTreeMap<String, &RawValue> = serde_json::from_str(text).map_err(|e| unreadable(&e))?;
    if entries.len() > MODELS_MAX {
        return Err(whole("price_list_too_large", format!("it has {} models; at most {MODELS_MAX}", entries.len())));
    }
    let mut list = List::default();
    for (name, raw) in entries {
        let Ok(fields) = serde_json::from_str::<Fields<'_>>(raw.get()) else {
            list.skipped += 1;
            continue;
        };
        let entry = Entry { text, model: name.clone(), fields };
        let said = entry.raw("litellm_provider").map(|raw| raw.trim_matches('"'));
        let provider = match (only, said) {
            (Some(only), _) => only,
            (None, Some(known @ ("gemini" | "openrouter"))) => known,
            _ => {
                list.skipped += 1;
                continue;
            }
        };
        if entry.raw("input_cost_per_token").is_none() && entry.raw("output_cost_per_token").is_none() {
            list.skipped += 1;
            continue;
        }
        let model = name.strip_prefix(provider).and_then(|rest| rest.strip_prefix('/')).unwrap_or(&name).to_owned();
        match of_map(&entry, provider, model, trust) {
            Ok(quote) => list.quotes.push(quote),
            Err(refusal) => list.refused.push(refusal),
        }
    }
    Ok(list)
}

fn of_map(entry: &Entry<'_>, provider: &str, model: String, trust: Trust) -> Result<Quote, Refusal> {
    let per_token = |name: &str| entry.price(name, PRICE_UMTOK_MAX);
    let base = Tier {
        min_prompt_tokens: 0,
        input_umtok: needed(entry, "input_cost_per_token", per_token("input_cost_per_token")?)?,
        cached_input_umtok: per_token("cache_read_input_token_cost")?,
        cache_write_umtok: per_token("cache_creation_input_token_cost")?,
        output_umtok: needed(entry, "output_cost_per_token", per_token("output_cost_per_token")?)?,
        reasoning_umtok: per_token("output_cost_per_reasoning_token")?,
        per_request_pusd: entry.price("input_cost_per_request", PER_REQUEST_PUSD_MAX)?.unwrap_or(0),
    };
    let mut tiers = BTreeMap::from([(0, base.clone())]);
    for name in entry.fields.keys() {
        let Some((what, above)) = name.split_once("_above_") else { continue };
        let Some(thousands) = above.strip_suffix("k_tokens").and_then(|n| n.parse::<i64>().ok()) else { continue };
        let Some(price) = per_token(name)? else { continue };
        let floor = thousands.saturating_mul(1_000);
        if !(1..=i64::MAX / 2).contains(&floor) {
            continue;
        }
        let tier = tiers.entry(floor).or_insert_with(|| Tier { min_prompt_tokens: floor, ..base.clone() });
        match what {
            "input_cost_per_token" => tier.input_umtok = price,
            "output_cost_per_token" => tier.output_umtok = price,
            "cache_read_input_token_cost" => tier.cached_input_umtok = Some(price),
            "cache_creation_input_token_cost" => tier.cache_write_umtok = Some(price),
            "output_cost_per_reasoning_token" => tier.reasoning_umtok = Some(price),
            _ => {}
        }
    }
    let quote = Quote {
        provider: provider.to_owned(),
        model,
        tiers: tiers.into_values().collect(),
        context_tokens: entry.tokens("max_input_tokens"),
        max_output_tokens: entry.tokens("max_output_tokens"),
    };
    believable(entry, quote, trust)
}

/// Reads OpenRouter's list of models, USD per token, with its overrides for long prompts.
///
/// # Errors
/// The list as a whole cannot be read.
pub fn from_openrouter(text: &str, trust: Trust) -> Result<List, Refusal> {
    #[derive(Deserialize)]
    struct Models<'a> {
        #[serde(borrow)]
        data: Vec<Model<'a>>,
    }
    #[derive(Deserialize)]
    struct Model<'a> {
        id: String,
        #[serde(default)]
        context_length: Option<i64>,
        #[serde(borrow, default)]
        pricing: Option<&'a RawValue>,
        #[serde(default)]
        top_provider: Option<TopProvider>,
    }
    #[derive(Deserialize)]
    struct TopProvider {
        #[serde(default)]
        max_completion_tokens: Option<i64>,
    }
    checked(text)?;
    let models: Models<'_> = serde_json::from_str(text).map_err(|e| unreadable(&e))?;
    if models.data.len() > MODELS_MAX {
        return Err(whole(
            "price_list_too_large",
            format!("it has {} models; at most {MODELS_MAX}", models.data.len()),
        ));
    }
    let mut list = List::default();
    for model in models.data {
        let fields = model.pricing.and_then(|raw| serde_json::from_str::<Fields<'_>>(raw.get()).ok());
        let Some(fields) = fields else {
            list.skipped += 1;
            continue;
        };
        let entry = Entry { text, model: model.id.clone(), fields };
        let trust = Trust { free: trust.free || model.id.ends_with(":free") };
        let limits = (model.context_length, model.top_provider.and_then(|top| top.max_completion_tokens));
        match of_openrouter(&entry, limits, trust) {
            Ok(quote) => list.quotes.push(quote),
            Err(refusal) => list.refused.push(refusal),
        }
    }
    Ok(list)
}

fn of_openrouter(entry: &Entry<'_>, limits: (Option<i64>, Option<i64>), trust: Trust) -> Result<Quote, Refusal> {
    // There "0" for the price of a part means that the part has none of its own.
    let own = |price: Option<i64>| price.filter(|p| *p > 0);
    let tier = |entry: &Entry<'_>, base: Option<&Tier>| -> Result<Tier, Refusal> {
        let per_token = |name: &str| entry.price(name, PRICE_UMTOK_MAX);
        Ok(Tier {
            min_prompt_tokens: entry.tokens("min_prompt_tokens").unwrap_or(0),
            input_umtok: match (per_token("prompt")?, base) {
                (None, Some(base)) => base.input_umtok,
                (price, _) => needed(entry, "prompt", price)?,
            },
            output_umtok: match (per_token("completion")?, base) {
                (None, Some(base)) => base.output_umtok,
                (price, _) => needed(entry, "completion", price)?,
            },
            cached_input_umtok: own(per_token("input_cache_read")?).or(base.and_then(|b| b.cached_input_umtok)),
            cache_write_umtok: own(per_token("input_cache_write")?).or(base.and_then(|b| b.cache_write_umtok)),
            reasoning_umtok: own(per_token("internal_reasoning")?).or(base.and_then(|b| b.reasoning_umtok)),
            per_request_pusd: match (entry.price("request", PER_REQUEST_PUSD_MAX)?, base) {
                (None, Some(base)) => base.per_request_pusd,
                (price, _) => price.unwrap_or(0),
            },
        })
    };
    let base = Tier { min_prompt_tokens: 0, ..tier(entry, None)? };
    let overrides: Vec<Fields<'_>> = match entry.raw("overrides") {
        Some(raw) => serde_json::from_str(raw)
            .map_err(|_| entry.refusal(raw, "price_list_unreadable", "its overrides are no list of objects".into()))?,
        None => Vec::new(),
    };
    let mut floors = BTreeSet::from([0]);
    let mut applied = Vec::new();
    for fields in overrides {
        let over = Entry { text: entry.text, model: entry.model.clone(), fields };
        // A price by the hour or day of week has no row of its own; what was really charged stands in the answers.
        if ["utc_start", "utc_end", "utc_days"].iter().any(|when| over.raw(when).is_some()) {
            continue;
        }
        let floor = over.tokens("min_prompt_tokens").unwrap_or(0);
        floors.insert(floor);
        applied.push((floor, over));
    }
    // Of all that hold for a size of prompt the later one wins, price by price, whatever their floors.
    let mut tiers = Vec::new();
    for floor in floors.into_iter().take(TIERS_MAX + 1) {
        let mut at = base.clone();
        for (_, over) in applied.iter().filter(|(from, _)| *from <= floor) {
            at = tier(over, Some(&at))?;
        }
        tiers.push(Tier { min_prompt_tokens: floor, ..at });
    }
    let quote = Quote {
        provider: "openrouter".into(),
        model: entry.model.clone(),
        tiers,
        context_tokens: limits.0.filter(|n| *n > 0),
        max_output_tokens: limits.1.filter(|n| *n > 0),
    };
    believable(entry, quote, trust)
}

fn needed(entry: &Entry<'_>, name: &str, price: Option<i64>) -> Result<i64, Refusal> {
    let at = entry.fields.values().next().map_or(entry.text, |raw| raw.get());
    price.ok_or_else(|| entry.refusal(at, "price_incomplete", format!("{name} is missing; a price is never assumed")))
}

fn believable(entry: &Entry<'_>, quote: Quote, trust: Trust) -> Result<Quote, Refusal> {
    let at = entry.fields.values().next().map_or(entry.text, |raw| raw.get());
    let named = !quote.model.is_empty() && quote.model != "*" && quote.model.len() <= NAME_BYTES_MAX;
    if !named || quote.model.chars().any(|c| c.is_control() || c.is_whitespace()) {
        return Err(entry.refusal(at, "price_model_invalid", "that is no name of a model".into()));
    }
    if quote.tiers.len() > TIERS_MAX {
        return Err(entry.refusal(at, "price_absurd", format!("it has more than {TIERS_MAX} prices by prompt size")));
    }
    let free = quote.tiers.iter().any(|t| t.input_umtok == 0 && t.output_umtok == 0 && t.per_request_pusd == 0);
    if free && !trust.free {
        return Err(entry.refusal(at, "price_free", "it costs nothing; if that is meant, allow free models".into()));
    }
    Ok(quote)
}

/// What became of a list.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Applied {
    pub effective_from: Option<DateTime<Utc>>,
    pub new: Vec<Quote>,
    /// Another price is in force until then.
    pub changed: Vec<Quote>,
    pub unchanged: usize,
    /// `<provider>/<model>` that somebody here has withdrawn: no list brings them back.
    pub withdrawn: Vec<String>,
}

/// Inserts what is new or differs from what is in force at `from` (a minute from now at the earliest); `write` false only says
/// what would be.
///
/// # Errors
/// `price_in_past` when `from` lies before now: calls that were made keep their prices.
/// # Transaction
/// The caller's. Idempotent: the same list again changes nothing. Concurrent imports wait for each other.
pub async fn apply(
    conn: &mut PgConnection,
    quotes: &[Quote],
    from: Option<DateTime<Utc>>,
    source: &str,
    write: bool,
) -> Result<Result<Applied, Refusal>, sqlx::Error> {
    sqlx::query("select pg_advisory_xact_lock(hashtext('loopwright.model_pricing'))").execute(&mut *conn).await?;
    let now: DateTime<Utc> = sqlx::query_scalar("select engine_now()").fetch_one(&mut *conn).await?;
    let from = from.unwrap_or(now);
    let earliest = now + chrono::Duration::seconds(LEAD_SECONDS);
    if from < now {
        let problem = format!("the prices would begin at {from}, in the past; calls that were made keep their prices");
        return Ok(Err(whole("price_in_past", problem)));
    }
    let from = from.max(earliest);
    let mut applied = Applied { effective_from: Some(from), ..Applied::default() };
    for quote in quotes {
        let before = in_force(conn, &quote.provider, &quote.model, from).await?;
        if before == quote.tiers {
            applied.unchanged += 1;
            continue;
        }
        if before.is_empty() && is_withdrawn(conn, &quote.provider, &quote.model, from).await? {
            applied.withdrawn.push(format!("{}/{}", quote.provider, quote.model));
            continue;
        }
        if write {
            for tier in &quote.tiers {
                insert(conn, quote, tier, from, source).await?;
            }
        }
        if before.is_empty() { applied.new.push(quote.clone()) } else { applied.changed.push(quote.clone()) }
    }
    Ok(Ok(applied))
}

/// What the newest price map that was imported says of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapped {
    pub provider: String,
    pub model: String,
    pub tiers: Vec<Tier>,
    /// Name of the file.
    pub source: String,
    pub read_at: DateTime<Utc>,
}

/// Keeps a price map for the weekly comparison, model by model: what an earlier one said of others stays.
///
/// # Transaction
/// The caller's; one statement.
pub async fn keep_map(conn: &mut PgConnection, quotes: &[Quote], source: &str) -> Result<(), sqlx::Error> {
    let of = |part: fn(&Quote) -> &str| quotes.iter().map(part).collect::<Vec<_>>();
    let tiers: Vec<serde_json::Value> =
        quotes.iter().map(|quote| serde_json::to_value(&quote.tiers).unwrap_or_default()).collect();
    sqlx::query(
        "insert into price_map (provider, model_id, tiers, source)
         select distinct on (provider, model) provider, model, tiers, $4 from unnest($1::text[], $2::text[], $3::jsonb[]) as q(provider, model, tiers)
         on conflict (provider, model_id) do update set tiers = excluded.tiers, source = excluded.source, read_at = engine_now()",
    )
    .bind(of(|quote| &quote.provider))
    .bind(of(|quote| &quote.model))
    .bind(tiers)
    .bind(source)
    .execute(conn)
    .await?;
    Ok(())
}

/// The price map, by provider and model. What an older release wrote and this one cannot read is left out.
///
/// # Transaction
/// Reads only.
pub async fn map(conn: &mut PgConnection) -> Result<Vec<Mapped>, sqlx::Error> {
    type Row = (String, String, serde_json::Value, String, DateTime<Utc>);
    let rows: Vec<Row> =
        sqlx::query_as("select provider, model_id, tiers, source, read_at from price_map order by provider, model_id")
            .fetch_all(conn)
            .await?;
    let mapped = |(provider, model, tiers, source, read_at): Row| {
        let tiers = serde_json::from_value(tiers).ok()?;
        Some(Mapped { provider, model, tiers, source, read_at })
    };
    Ok(rows.into_iter().filter_map(mapped).collect())
}

/// The prices of a model at an instant, by prompt size; empty if it has none of its own or is withdrawn.
pub async fn in_force(
    conn: &mut PgConnection,
    provider: &str,
    model: &str,
    at: DateTime<Utc>,
) -> Result<Vec<Tier>, sqlx::Error> {
    let rows = sqlx::query(
        "select min_prompt_tokens, input_umtok, cached_input_umtok, cache_write_umtok, output_umtok, reasoning_umtok, per_request_pusd
         from model_pricing p where provider = $1 and model_id = $2 and service_tier = 'standard' and billable
           and effective_from = (select max(effective_from) from model_pricing where provider = $1 and model_id = $2
                                 and service_tier = 'standard' and effective_from <= $3)
         order by min_prompt_tokens",
    )
    .bind(provider)
    .bind(model)
    .bind(at)
    .fetch_all(conn)
    .await?;
    rows.iter()
        .map(|row| {
            Ok(Tier {
                min_prompt_tokens: row.try_get(0)?,
                input_umtok: row.try_get(1)?,
                cached_input_umtok: row.try_get(2)?,
                cache_write_umtok: row.try_get(3)?,
                output_umtok: row.try_get(4)?,
                reasoning_umtok: row.try_get(5)?,
                per_request_pusd: row.try_get(6)?,
            })
        })
        .collect()
}

/// Whether the newest rows of a model say that it is not to be used.
async fn is_withdrawn(
    conn: &mut PgConnection,
    provider: &str,
    model: &str,
    at: DateTime<Utc>,
) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar(
        "select coalesce(bool_and(not billable), false) from model_pricing where provider = $1 and model_id = $2 and service_tier = 'standard'
           and effective_from = (select max(effective_from) from model_pricing where provider = $1 and model_id = $2
                                 and service_tier = 'standard' and effective_from <= $3)",
    )
    .bind(provider)
    .bind(model)
    .bind(at)
    .fetch_one(conn)
    .await
}

async fn insert(
    conn: &mut PgConnection,
    quote: &Quote,
    tier: &Tier,
    from: DateTime<Utc>,
    source: &str,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "insert into model_pricing (provider, model_id, effective_from, min_prompt_tokens, input_umtok, cached_input_umtok, cache_write_umtok,
           output_umtok, reasoning_umtok, per_request_pusd, context_tokens, max_output_tokens, source)
         values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13)",
    )
    .bind(&quote.provider)
    .bind(&quote.model)
    .bind(from)
    .bind(tier.min_prompt_tokens)
    .bind(tier.input_umtok)
    .bind(tier.cached_input_umtok)
    .bind(tier.cache_write_umtok)
    .bind(tier.output_umtok)
    .bind(tier.reasoning_umtok)
    .bind(tier.per_request_pusd)
    .bind(quote.context_tokens)
    .bind(quote.max_output_tokens)
    .bind(source)
    .execute(conn)
    .await?;
    Ok(())
}

/// A row of the price list as people read it.
#[derive(Clone, Debug, Serialize)]
pub struct Listed {
    pub provider: String,
    pub model: String,
    pub effective_from: DateTime<Utc>,
    pub billable: bool,
    #[serde(flatten)]
    pub tier: Tier,
    pub source: String,
}

/// Prices in force and to come; with `history` those of before too. By provider, model, date, prompt size.
///
/// # Transaction
/// Reads only.
pub async fn list(
    conn: &mut PgConnection,
    history: bool,
    containing: Option<&str>,
) -> Result<Vec<Listed>, sqlx::Error> {
    let rows = sqlx::query(
        "select provider, model_id, effective_from, billable, min_prompt_tokens, input_umtok, cached_input_umtok, cache_write_umtok, output_umtok,
                reasoning_umtok, per_request_pusd, source
         from model_pricing p
         where service_tier = 'standard' and ($2::text is null or position(lower($2) in lower(provider || '/' || model_id)) > 0)
           and ($1 or effective_from >= (select max(q.effective_from) from model_pricing q where q.provider = p.provider
             and q.model_id = p.model_id and q.service_tier = 'standard' and q.effective_from <= engine_now())
             or effective_from > engine_now())
         order by provider, model_id, effective_from, min_prompt_tokens",
    )
    .bind(history)
    .bind(containing)
    .fetch_all(conn)
    .await?;
    rows.iter()
        .map(|row| {
            Ok(Listed {
                provider: row.try_get(0)?,
                model: row.try_get(1)?,
                effective_from: row.try_get(2)?,
                billable: row.try_get(3)?,
                tier: Tier {
                    min_prompt_tokens: row.try_get(4)?,
                    input_umtok: row.try_get(5)?,
                    cached_input_umtok: row.try_get(6)?,
                    cache_write_umtok: row.try_get(7)?,
                    output_umtok: row.try_get(8)?,
                    reasoning_umtok: row.try_get(9)?,
                    per_request_pusd: row.try_get(10)?,
                },
                source: row.try_get(11)?,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_common_map_is_read_exactly() {
        let text = r#"{
  "sample_spec": {"mode": "one of"},
  "gemini/gemini-2.5-pro": {"litellm_provider": "gemini", "input_cost_per_token": 1.25e-06, "output_cost_per_token": 0.00001,
     "input_cost_per_token_above_200k_tokens": 2.5e-06, "output_cost_per_token_above_200k_tokens": "0.000015",
     "cache_read_input_token_cost": 1.25e-07, "output_cost_per_reasoning_token": 0.00002,
     "output_cost_per_reasoning_token_above_200k_tokens": "3e-05", "max_input_tokens": 1048576, "max_output_tokens": 65535},
  "whisper": {"litellm_provider": "openai", "input_cost_per_second": 0.0001},
  "gemini/image": {"litellm_provider": "gemini", "output_cost_per_image": 0.04}
}"#;
        let list = from_map(text, None, Trust::default()).expect("read");
        assert_eq!((list.skipped, &*list.refused), (3, &[][..]));
        let [quote] = &*list.quotes else { panic!("{list:?}") };
        assert_eq!((quote.model.as_str(), quote.max_output_tokens), ("gemini-2.5-pro", Some(65_535)));
        let prices: Vec<_> = quote
            .tiers
            .iter()
            .map(|t| (t.min_prompt_tokens, t.input_umtok, t.output_umtok, t.cached_input_umtok, t.reasoning_umtok))
            .collect();
        assert_eq!(
            prices,
            [
                (0, 1_250_000, 10_000_000, Some(125_000), Some(20_000_000)),
                (200_000, 2_500_000, 15_000_000, Some(125_000), Some(30_000_000))
            ]
        );
    }

    #[test]
    fn a_price_that_cannot_be_is_refused_with_its_line() {
        for (price, code) in [
            ("-0.1", "price_negative"),
            ("\"-1\"", "price_negative"),
            ("2", "price_absurd"),
            ("99999999999999999999", "price_absurd"),
            ("\"cheap\"", "price_not_decimal"),
            ("true", "price_not_decimal"),
            ("[1]", "price_not_decimal"),
            ("null", "price_incomplete"),
        ] {
            let text = format!(
                "{{\n \"gemini/x\": {{\"litellm_provider\": \"gemini\",\n  \"output_cost_per_token\": 1e-6,\n  \"input_cost_per_token\": {price}}}}}"
            );
            let list = from_map(&text, None, Trust::default()).expect("read");
            assert!(list.quotes.is_empty());
            assert_eq!(list.refused[0].code, code, "{price}");
            // A price that is missing has the line of its model.
            assert!((2..=4).contains(&list.refused[0].line), "{price}: {:?}", list.refused);
            assert!(code == "price_incomplete" || list.refused[0].line == 4, "{price}: {:?}", list.refused);
        }
        let free =
            r#"{"gemini/x": {"litellm_provider": "gemini", "input_cost_per_token": 0, "output_cost_per_token": 0.0}}"#;
        assert_eq!(from_map(free, None, Trust::default()).expect("read").refused[0].code, "price_free");
        assert_eq!(from_map(free, None, Trust { free: true }).expect("read").quotes.len(), 1);
        let error = from_map("{\n\"a\": }", None, Trust::default()).expect_err("no JSON");
        assert_eq!((error.code, error.line), ("price_list_unreadable", 2));
    }

    #[test]
    fn openrouters_list_has_overrides_and_prices_that_vary() {
        let text = r#"{"data": [
 {"id": "google/gemini-3.1-pro-preview", "context_length": 1048576, "pricing": {"prompt": "0.000002", "completion": "0.000012", "request": "0",
   "input_cache_read": "0.0000002", "internal_reasoning": "0", "overrides": [{"min_prompt_tokens": 200000, "prompt": "0.000004", "completion": "0.000018"}]},
   "top_provider": {"max_completion_tokens": 65536}},
 {"id": "openrouter/auto", "pricing": {"prompt": "-1", "completion": "-1"}},
 {"id": "some/model:free", "pricing": {"prompt": "0", "completion": "0"}},
 {"id": "some/model", "pricing": {"prompt": "0", "completion": "0"}}]}"#;
        let list = from_openrouter(text, Trust::default()).expect("read");
        let codes: Vec<_> = list.refused.iter().map(|r| (r.code, r.line)).collect();
        assert_eq!(codes, [("price_negative", 5), ("price_free", 7)]);
        let tiers: Vec<_> = list.quotes[0]
            .tiers
            .iter()
            .map(|t| (t.min_prompt_tokens, t.input_umtok, t.output_umtok, t.cached_input_umtok, t.reasoning_umtok))
            .collect();
        let expected =
            [(0, 2_000_000, 12_000_000, Some(200_000), None), (200_000, 4_000_000, 18_000_000, Some(200_000), None)];
        assert_eq!(tiers, expected);
        assert_eq!(list.quotes[1].model, "some/model:free");
    }

    /// Floor, input and output of each tier of a model with [`BASE`] prices and these overrides.
    fn tiers(overrides: &str) -> Result<Vec<(i64, i64, i64)>, Vec<Refusal>> {
        let pricing = format!(r#"{{"prompt": "0.000002", "completion": "0.000012", "overrides": [{overrides}]}}"#);
        let text = format!(r#"{{"data": [{{"id": "v/m", "pricing": {pricing}}}]}}"#);
        let list = from_openrouter(&text, Trust::default()).expect("read");
        let of = |t: &Tier| (t.min_prompt_tokens, t.input_umtok, t.output_umtok);
        list.quotes.first().map(|quote| quote.tiers.iter().map(of).collect()).ok_or(list.refused)
    }

    const BASE: (i64, i64, i64) = (0, 2_000_000, 12_000_000);

    #[test]
    fn of_overrides_that_hold_together_the_later_one_wins_price_by_price() {
        let dear = r#"{"min_prompt_tokens": 200000, "prompt": "0.000004", "completion": "0.000018"}"#;
        let middling = r#"{"min_prompt_tokens": 100000, "prompt": "0.000003"}"#;
        let middle = (100_000, 3_000_000, 12_000_000);
        assert_eq!(
            tiers(&format!("{middling}, {dear}")),
            Ok(vec![BASE, middle, (200_000, 4_000_000, 18_000_000)]),
            "by ascending floors"
        );
        assert_eq!(
            tiers(&format!("{dear}, {middling}")),
            Ok(vec![BASE, middle, (200_000, 3_000_000, 18_000_000)]),
            "the later one holds above the earlier one's floor too, for what it names"
        );
        let everywhere = r#"{"completion": "0.00001"}"#;
        assert_eq!(
            tiers(&format!("{dear}, {everywhere}")),
            Ok(vec![(0, 2_000_000, 10_000_000), (200_000, 4_000_000, 10_000_000)])
        );
        let many: Vec<_> =
            (1..=TIERS_MAX).map(|n| format!(r#"{{"min_prompt_tokens": {n}, "prompt": "0.000001"}}"#)).collect();
        let refused = tiers(&many.join(", ")).expect_err("too many");
        assert_eq!(refused[0].code, "price_absurd");
    }

    /// A window without a floor would be the price of every prompt at any time.
    #[test]
    fn an_override_by_the_hour_or_the_day_is_left_out_and_others_stay() {
        let long = r#"{"min_prompt_tokens": 200000, "prompt": "0.000004"}"#;
        for when in [r#""utc_start": 100"#, r#""utc_end": 400"#, r#""utc_days": ["sunday"]"#] {
            let all = format!(r#"{{{when}, "prompt": "0.000001", "completion": "0.000006"}}"#);
            let above = format!(r#"{{{when}, "min_prompt_tokens": 100000, "prompt": "0.000001"}}"#);
            assert_eq!(tiers(&all), Ok(vec![BASE]), "{when}");
            assert_eq!(
                tiers(&format!("{long}, {all}, {above}")),
                Ok(vec![BASE, (200_000, 4_000_000, 12_000_000)]),
                "{when}"
            );
        }
        let unsaid = r#"{"utc_start": null, "utc_end": null, "utc_days": null, "min_prompt_tokens": 200000, "prompt": "0.000004"}"#;
        assert_eq!(tiers(unsaid), Ok(vec![BASE, (200_000, 4_000_000, 12_000_000)]));
    }
}
