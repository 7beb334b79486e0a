//! Costs that a provider reports and nobody believes: negative, no number, or far beyond what the call's tokens can cost at our prices.
//! The call is charged by our own arithmetic; what was said is a row of `cost_doubts` and a finding, until somebody has looked.

use super::{
    books::{self, Finding},
    money::PicoUsd,
    price::Price,
};
use crate::{decimal::usd_from_pusd, usage::Usage};
use sqlx::PgConnection;
use uuid::Uuid;

/// The job that asks again about doubted costs, and under which they are found.
pub const JOB: &str = "reconcile-calls";
/// Kind of the finding.
pub const KIND: &str = "cost_doubtful";

/// A cost is believed up to so many times the most that the call's tokens can cost. Chosen: prices that fell behind differ by a factor
/// of two or three, another endpoint of the same model by four.
const BELIEVED_TIMES: i128 = 10;
/// Below that nothing is doubted, in pico-USD: 0.01 USD. Chosen: fees of a call by itself are below it.
const DOUBTED_MIN_PUSD: i128 = 10_000_000_000;

/// What was said of a call's cost, if it cannot be meant. `price`: ours of that call.
#[must_use]
pub fn of(usage: &Usage, price: Option<&Price>) -> Option<String> {
    if let Some(said) = &usage.doubtful_cost {
        return Some(said.clone());
    }
    let said = i128::from(usage.total_cost_pusd()?);
    if said < 0 {
        return Some(usd_from_pusd(said));
    }
    let most = i128::from(price?.worst(usage.tokens_prompt, usage.tokens_output).0);
    (said > DOUBTED_MIN_PUSD && said > most.saturating_mul(BELIEVED_TIMES)).then(|| usd_from_pusd(said))
}

/// A call whose cost is doubted, as it is charged.
pub(super) struct Doubted<'a> {
    pub usage_id: i64,
    pub user: Uuid,
    /// `<provider>/<model>`.
    pub model: &'a str,
    pub said: &'a str,
    pub charged: PicoUsd,
}

/// Keeps a doubt, once per call, and tells an operator.
///
/// # Transaction
/// The one that books the call.
pub(super) async fn keep(conn: &mut PgConnection, doubted: &Doubted<'_>) -> Result<(), sqlx::Error> {
    let Doubted { usage_id, user, model, said, charged } = doubted;
    let kept = sqlx::query(
        "insert into cost_doubts (usage_id, user_id, said, charged_pusd) values ($1, $2, $3, $4) on conflict (usage_id) do nothing",
    )
    .bind(usage_id)
    .bind(user)
    .bind(said)
    .bind(charged.0)
    .execute(&mut *conn)
    .await?;
    crate::crash_point("doubt.after_row");
    if kept.rows_affected() == 0 {
        return Ok(());
    }
    let charged = usd_from_pusd(charged.0.into());
    let message = format!(
        "{model}: the provider says that a call cost {said} USD, which is not believed; it is charged as {charged} USD"
    );
    tracing::error!(call = usage_id, said, "{message}");
    let finding = Finding { kind: KIND, subject: usage_id.to_string(), message, user: Some(*user) };
    books::keep_findings(conn, JOB, &[finding], false).await?;
    Ok(())
}

/// What the provider says when it is asked again. Believed, it becomes the call's provider cost, and the doubt is over; what the user
/// paid stays. False if it is as doubtful as before, or somebody else was faster.
///
/// # Transaction
/// The caller's; two updates and the finding's.
pub async fn asked_again(conn: &mut PgConnection, usage_id: i64, said: &Usage) -> Result<bool, sqlx::Error> {
    let row: Option<(i64, i64, Option<i64>)> = sqlx::query_as(
        "select coalesce(k.tokens_prompt, 0), coalesce(k.tokens_output, 0), k.pricing_id from cost_doubts d join api_key_usage k on k.id = d.usage_id
         where d.usage_id = $1 and d.resolved_at is null for update of d",
    )
    .bind(usage_id)
    .fetch_optional(&mut *conn)
    .await?;
    let Some((prompt, output, pricing)) = row else { return Ok(false) };
    let price = match pricing {
        Some(id) => super::price::by_id(conn, id).await?,
        None => None,
    };
    // The tokens that it was charged by, not those that come with the doubtful sum.
    let tokens = |n: i64| u64::try_from(n).unwrap_or(0);
    let said = Usage { tokens_prompt: tokens(prompt), tokens_output: tokens(output), ..said.clone() };
    // Believed is what it costs in all; in the column stands what the provider itself takes, as of every call.
    let (None, Some(total), Some(cost)) =
        (of(&said, price.as_ref()), said.total_cost_pusd(), said.provider_cost_pusd.map(|cost| cost.max(0)))
    else {
        return Ok(false);
    };
    sqlx::query(
        "update api_key_usage set provider_cost_pusd = $2, lookups = lookups + 1, next_lookup_at = null where id = $1",
    )
    .bind(usage_id)
    .bind(cost)
    .execute(&mut *conn)
    .await?;
    resolve(conn, usage_id, &format!("asked again, the provider says {} USD", usd_from_pusd(total.into()))).await?;
    Ok(true)
}

/// Ends a doubt and its finding. False if there is none that is open.
///
/// # Transaction
/// The caller's; two updates.
pub async fn resolve(conn: &mut PgConnection, usage_id: i64, why: &str) -> Result<bool, sqlx::Error> {
    let done = sqlx::query(
        "update cost_doubts set resolved_at = engine_now(), resolution = $2 where usage_id = $1 and resolved_at is null",
    )
    .bind(usage_id)
    .bind(why)
    .execute(&mut *conn)
    .await?;
    sqlx::query(
        "update reconcile_findings set resolved_at = engine_now(), resolution = $4
         where job = $1 and kind = $2 and subject = $3 and resolved_at is null",
    )
    .bind(JOB)
    .bind(KIND)
    .bind(usage_id.to_string())
    .bind(why)
    .execute(conn)
    .await?;
    Ok(done.rows_affected() > 0)
}

/// Resolves a finding by an operator's word; one of a doubted cost ends the doubt. False if there is none that is open. A job that sees
/// the same again opens it again.
///
/// # Transaction
/// The caller's.
pub async fn resolve_finding(conn: &mut PgConnection, finding: i64, why: &str) -> Result<bool, sqlx::Error> {
    let resolved: Option<(String, String)> = sqlx::query_as(
        "update reconcile_findings set resolved_at = engine_now(), resolution = $2 where id = $1 and resolved_at is null
         returning kind, subject",
    )
    .bind(finding)
    .bind(why)
    .fetch_optional(&mut *conn)
    .await?;
    let Some((kind, subject)) = resolved else { return Ok(false) };
    if let (KIND, Ok(call)) = (&*kind, subject.parse()) {
        resolve(conn, call, why).await?;
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PRICE: Price = Price {
        id: 1,
        input: 2_000_000,
        cached_input: 200_000,
        cache_write: 2_000_000,
        output: 10_000_000,
        reasoning: 10_000_000,
        per_request: 0,
    };

    fn said(pusd: Option<i64>, text: Option<&str>) -> Option<String> {
        // 0.003 USD at most.
        let usage = Usage {
            tokens_prompt: 1_000,
            tokens_output: 100,
            provider_cost_pusd: pusd,
            doubtful_cost: text.map(str::to_owned),
            ..Usage::default()
        };
        of(&usage, Some(&PRICE))
    }

    #[test]
    fn what_no_call_can_cost_is_doubted_and_what_it_may_is_not() {
        for believed in [None, Some(0), Some(1), Some(3_000_000_000), Some(30_000_000_000)] {
            assert_eq!(said(believed, None), None, "{believed:?}");
        }
        assert_eq!(said(Some(30_000_000_001), None).as_deref(), Some("0.030000000001"));
        assert_eq!(said(Some(i64::MAX), None).as_deref(), Some("9223372.036854775807"));
        assert_eq!(said(Some(-1), None).as_deref(), Some("-0.000000000001"));
        assert_eq!(said(None, Some("\"NaN\"")).as_deref(), Some("\"NaN\""));
        // A cent of a model that we believe to be free may be a fee.
        let usage = Usage { tokens_prompt: 1, provider_cost_pusd: Some(10_000_000_000), ..Usage::default() };
        let free = Price { input: 0, cached_input: 0, cache_write: 0, output: 0, reasoning: 0, ..PRICE };
        assert_eq!(of(&usage, Some(&free)), None);
        let usage = Usage { provider_cost_pusd: Some(10_000_000_001), ..usage };
        assert!(of(&usage, Some(&free)).is_some());
        assert_eq!(of(&usage, None), None, "nothing to compare with");
    }
}
