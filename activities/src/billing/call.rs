//! Calls of models as rows: what an attempt has held and used, whose key a call was made with, and what became of it.
//!
//! Whether a call may be made is decided in [`super::hook`].

use super::{
    ledger::{self, LedgerError},
    money::Rate,
    price,
};
use crate::{
    nul,
    usage::{CallClosed, CallNoted, CallOpened, CallState, UsageSource},
};
use chrono::{DateTime, Utc};
use sqlx::PgConnection;
use uuid::Uuid;

/// What an attempt has held and used so far.
pub(super) struct Holding {
    /// Pico-USD; of calls under way what they may cost at most.
    pub used: i128,
    /// Micro-credits.
    pub held: i64,
    /// Of its newest hold; 0 for none.
    pub hold_no: i32,
    /// Of its first hold.
    pub rate: Option<Rate>,
}

pub(super) async fn holding(conn: &mut PgConnection, attempt: Uuid) -> Result<Holding, LedgerError> {
    let (used, held, hold_no, credits_per_usd, markup_bps): (String, i64, i32, Option<i64>, Option<i32>) =
        sqlx::query_as(
            "select (select coalesce(sum(case state when 'started' then worst_pusd else cost_pusd end), 0)::text from api_key_usage where attempt_id = $1),
                    coalesce(sum(held_delta_ucr), 0)::bigint, coalesce(max(hold_no), 0),
                    (array_agg(rate_credits_per_usd order by hold_no))[1], (array_agg(markup_bps order by hold_no))[1]
             from credit_transactions where attempt_id = $1 and kind = 'hold'",
        )
        .bind(attempt)
        .fetch_one(conn)
        .await?;
    let rate =
        credits_per_usd.zip(markup_bps).map(|(credits_per_usd, markup_bps)| Rate { credits_per_usd, markup_bps });
    Ok(Holding { used: used.parse().unwrap_or(i128::MAX), held, hold_no, rate })
}

/// Whether a user has brought keys of his own.
pub(super) async fn brings_keys(conn: &mut PgConnection, user: Uuid) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar(
        "select exists (select from api_keys where user_id = $1 and source = 'sealed' and status <> 'revoked')",
    )
    .bind(user)
    .fetch_one(conn)
    .await
}

/// The row of a user's own key, if it is his, of that provider, and in use.
pub(super) async fn own_key(
    conn: &mut PgConnection,
    call: &CallOpened,
    user: Uuid,
    id: Uuid,
) -> Result<Option<Uuid>, sqlx::Error> {
    sqlx::query_scalar(
        "select id from api_keys where id = $1 and user_id = $2 and provider = $3 and fingerprint = decode($4, 'hex')
           and source = 'sealed' and status <> 'revoked'",
    )
    .bind(id)
    .bind(user)
    .bind(&call.provider)
    .bind(&call.key_fingerprint)
    .fetch_optional(conn)
    .await
}

/// The row of a key of the platform, made when it is seen first.
pub(super) async fn api_key(conn: &mut PgConnection, call: &CallOpened) -> Result<Uuid, sqlx::Error> {
    if let Some(id) = platform_key(conn, call).await? {
        return Ok(id);
    }
    let made: Option<Uuid> = sqlx::query_scalar(
        "insert into api_keys (provider, source, label, last4, fingerprint) values ($1, 'environment', 'platform', $2, decode($3, 'hex'))
         on conflict (provider, fingerprint, coalesce(user_id, '00000000-0000-0000-0000-000000000000')) do nothing returning id",
    )
    .bind(&call.provider)
    .bind(call.key_last4.chars().take(4).collect::<String>())
    .bind(&call.key_fingerprint)
    .fetch_optional(&mut *conn)
    .await?;
    match made {
        Some(id) => Ok(id),
        // Another worker has just made it: a statement that began before cannot see it, this one can.
        None => platform_key(conn, call).await?.ok_or(sqlx::Error::RowNotFound),
    }
}

async fn platform_key(conn: &mut PgConnection, call: &CallOpened) -> Result<Option<Uuid>, sqlx::Error> {
    sqlx::query_scalar(
        "select id from api_keys where provider = $1 and fingerprint = decode($2, 'hex') and user_id is null",
    )
    .bind(&call.provider)
    .bind(&call.key_fingerprint)
    .fetch_optional(conn)
    .await
}

/// Row id, state, provider, requested model, state of the attempt, late, start, price row.
type OpenedCall = (i64, String, String, String, String, bool, DateTime<Utc>, Option<i64>);

/// Stores what became of a call. `current` as in [`loopwright_engine::hook::Reading::current`].
///
/// # Transaction
/// Locks the user row. Idempotent: the first report of an outcome counts.
pub(super) async fn close(
    conn: &mut PgConnection,
    user: Uuid,
    attempt: Uuid,
    key: &str,
    current: bool,
    call: &CallClosed,
) -> Result<(), LedgerError> {
    ledger::lock(conn, user).await?;
    crate::crash_point("close.after_account");
    let row: Option<OpenedCall> = sqlx::query_as(
        "select k.id, k.state, k.provider, k.model_requested, a.state, k.late, k.started_at, k.pricing_id from api_key_usage k join activity_attempts a on a.id = k.attempt_id
         where k.attempt_id = $1 and k.call_key = $2",
    )
    .bind(attempt)
    .bind(key)
    .fetch_optional(&mut *conn)
    .await?;
    let Some((usage_id, state, provider, model, attempt_state, late, started_at, pricing)) = row else { return Ok(()) };
    // A fact that comes after the end of its attempt is kept and never charged. An attempt whose run was taken away has
    // ended, though nobody has recorded that yet: its answer is thrown away, and the next attempt makes the call again.
    let after_the_end = attempt_state != "running" || !current;
    if state != "started" && (!after_the_end || late || state != "unknown") {
        return Ok(());
    }
    let usage = call.usage.clone().unwrap_or_default();
    let succeeded = call.state == CallState::Succeeded && call.usage.is_some();
    let new_state = match call.state {
        CallState::Succeeded if succeeded => "succeeded",
        CallState::Succeeded | CallState::Unknown => "unknown",
        CallState::Failed => "failed",
    };
    // A model that was withdrawn meanwhile costs what was said when the call was announced, never nothing.
    let priced = match pricing {
        Some(announced) => match price::find(conn, &provider, &model, usage.tokens_prompt, Some(started_at)).await? {
            None => price::by_id(conn, announced).await?,
            found => found,
        },
        // On a user's own key, of a model that we have no price for.
        None => None,
    };
    let cost = match (call.is_charged() && !after_the_end, usage.total_cost_pusd(), &priced) {
        (false, ..) => 0,
        (true, Some(cost), _) => cost.max(0),
        (true, None, Some(price)) => price.cost(&usage).0,
        (true, None, None) => 0,
    };
    let source = match usage.source {
        UsageSource::Provider => "provider",
        UsageSource::Lookup => "lookup",
        UsageSource::Estimated => "estimated",
        UsageSource::None if succeeded => "estimated",
        UsageSource::None => "none",
    };
    let tokens = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
    let reported = call.usage.is_some();
    sqlx::query(
        "update api_key_usage set state = $2, late = $3, finished_at = engine_now(), model_served = $4, provider_request_id = coalesce($5, provider_request_id),
           http_status = $6, error_class = $7, finish_reason = $8, stream_completed = $9,
           tokens_prompt = case when $10 then $11 end, tokens_cached = case when $10 then least($12, $11) end,
           tokens_cache_write = case when $10 then least($13, $11 - least($12, $11)) end, tokens_output = case when $10 then $14 end,
           tokens_reasoning = case when $10 then least($15, $14) end,
           usage_source = $16, pricing_id = coalesce($17, pricing_id),
           -- What a user's own key costs is between him and his provider.
           cost_pusd = case when (select user_id from api_keys where id = api_key_id) is null then $18 else 0 end, provider_cost_pusd = $19, raw_usage = $20
         where id = $1",
    )
    .bind(usage_id)
    .bind(new_state)
    .bind(after_the_end)
    .bind(call.model_served.as_deref().map(nul::text))
    .bind(&call.provider_request_id)
    .bind(call.http_status.map(i32::from))
    .bind(&call.error_class)
    .bind(&call.finish_reason)
    .bind(call.stream_completed)
    .bind(reported)
    .bind(tokens(usage.tokens_prompt))
    .bind(tokens(usage.tokens_cached))
    .bind(tokens(usage.tokens_cache_write))
    .bind(tokens(usage.tokens_output))
    .bind(tokens(usage.tokens_reasoning))
    .bind(source)
    .bind(priced.map(|p| p.id))
    .bind(cost)
    .bind(usage.provider_cost_pusd.map(|c| c.max(0)))
    .bind(usage.raw_to_keep())
    .execute(conn)
    .await?;
    Ok(())
}

/// Stores the provider's name for a call that is under way; of a call that is closed meanwhile nothing changes.
///
/// # Transaction
/// One update of the call's row, with no other lock: what a call costs does not depend on it.
pub(super) async fn note(
    conn: &mut PgConnection,
    attempt: Uuid,
    key: &str,
    call: &CallNoted,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "update api_key_usage set provider_request_id = $3
         where attempt_id = $1 and call_key = $2 and state = 'started' and provider_request_id is null",
    )
    .bind(attempt)
    .bind(key)
    .bind(&call.provider_request_id)
    .execute(conn)
    .await?;
    Ok(())
}
