//! Calls of models as rows: what an attempt has held and used, whose key a call was made with, and what became of it.
//!
//! Whether a call may be made is decided in [`super::hook`].

use super::{
    doubt,
    hold::Reservable,
    ledger::{self, LedgerError},
    money::{MicroCredits, PicoUsd, Rate},
    price::{self, Price, Rows},
};
use crate::{
    nul,
    usage::{CallClosed, CallNoted, CallOpened, CallState, UsageSource},
};
use chrono::{DateTime, Utc};
use serde_json::value::RawValue;
use sqlx::{PgConnection, Row, types::Json};
use uuid::Uuid;

/// What the announcement of a call has to know, as of the lock of its user's row.
pub(super) struct Facts {
    balance: i64,
    held_of_user: i64,
    /// An audit has stopped new holds of the user.
    pub stopped: bool,
    /// What is over its date and not booked yet.
    expired: i64,
    moment: DateTime<Utc>,
    /// State of the call of that key.
    pub known: Option<String>,
    /// Whether its attempt runs.
    pub running: bool,
    /// Of its API key, if there is one and it may be used.
    pub key_row: Option<Uuid>,
    used: String,
    /// By the attempt, micro-credits.
    pub held: i64,
    /// Of its newest hold; 0 for none.
    pub hold_no: i32,
    /// Of its first hold.
    pub rate: Option<Rate>,
    /// Ids of the price rows in force.
    pub prices: Vec<i64>,
}

impl Facts {
    /// What the attempt has used, pico-USD; of calls under way what they may cost at most.
    pub fn used(&self) -> i128 {
        self.used.parse().unwrap_or(i128::MAX)
    }

    /// As [`super::hold::reservable`].
    pub fn reservable(&self) -> Reservable {
        let credits = (self.balance - self.held_of_user - self.expired).max(0);
        Reservable { credits: MicroCredits(credits), at: self.moment }
    }
}

/// Locks the user's row and looks at everything.
///
/// # Errors
/// [`LedgerError::NoUser`].
pub(super) async fn facts(
    conn: &mut PgConnection,
    attempt: Uuid,
    key: &str,
    user: Uuid,
    call: &CallOpened,
) -> Result<Facts, LedgerError> {
    let row = sqlx::query("select * from call_facts($1, $2, $3, $4, $5, $6, $7, $8)")
        .bind(attempt)
        .bind(key)
        .bind(user)
        .bind(&call.provider)
        .bind(&call.model)
        .bind(Rows::of(call).or_any(&call.model))
        .bind(call.own_key_id)
        .bind(&call.key_fingerprint)
        .fetch_optional(conn)
        .await?
        .ok_or(LedgerError::NoUser(user))?;
    let rate: Option<i64> = row.try_get("rate")?;
    let markup: Option<i32> = row.try_get("markup")?;
    Ok(Facts {
        balance: row.try_get("balance")?,
        held_of_user: row.try_get("held_of_user")?,
        stopped: row.try_get("stopped")?,
        expired: row.try_get("expired")?,
        moment: row.try_get("moment")?,
        known: row.try_get("known")?,
        running: row.try_get("running")?,
        key_row: row.try_get("key_row")?,
        used: row.try_get("used")?,
        held: row.try_get("held")?,
        hold_no: row.try_get("hold_no")?,
        rate: rate.zip(markup).map(|(credits_per_usd, markup_bps)| Rate { credits_per_usd, markup_bps }),
        prices: row.try_get("prices")?,
    })
}

/// What the calls of an attempt that are under way may cost at most, in pico-USD.
pub(super) async fn under_way(conn: &mut PgConnection, attempt: Uuid) -> Result<i128, sqlx::Error> {
    let sum: String = sqlx::query_scalar(
        "select coalesce(sum(worst_pusd), 0)::text from api_key_usage where attempt_id = $1 and state = 'started'",
    )
    .bind(attempt)
    .fetch_one(conn)
    .await?;
    Ok(sum.parse().unwrap_or(i128::MAX))
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

/// The row of a key of the platform that had none.
pub(super) async fn api_key(conn: &mut PgConnection, call: &CallOpened) -> Result<Uuid, sqlx::Error> {
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

/// Row id, state, provider, requested model, state of the attempt, late, start, price row, on a key of the user's own.
type OpenedCall = (i64, String, String, String, String, bool, DateTime<Utc>, Option<i64>, bool);

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
        "select k.id, k.state, k.provider, k.model_requested, a.state, k.late, k.started_at, k.pricing_id, y.user_id is not null
         from api_key_usage k join activity_attempts a on a.id = k.attempt_id join api_keys y on y.id = k.api_key_id
         where k.attempt_id = $1 and k.call_key = $2",
    )
    .bind(attempt)
    .bind(key)
    .fetch_optional(&mut *conn)
    .await?;
    let Some((usage_id, state, provider, model, attempt_state, late, started_at, pricing, own_key)) = row else {
        return Ok(());
    };
    // A fact that comes after the end of its attempt is kept and never charged. An attempt whose run was taken away has
    // ended, though nobody has recorded that yet: its answer is thrown away, and the next attempt makes the call again.
    let after_the_end = attempt_state != "running" || !current;
    if state != "started" && (!after_the_end || late || state != "unknown") {
        return Ok(());
    }
    let prompt = call.usage.as_ref().map_or(0, |usage| usage.tokens_prompt);
    // A model that was withdrawn meanwhile costs what was said when the call was announced, never nothing.
    let priced = match pricing {
        Some(announced) => match price::find(conn, &provider, &model, prompt, Some(started_at)).await? {
            None => price::by_id(conn, announced).await?,
            found => found,
        },
        // On a user's own key, of a model that we have no price for.
        None => None,
    };
    let end = End::of(call, priced, !after_the_end, own_key);
    sqlx::query(
        "update api_key_usage set state = $2, late = $3, finished_at = engine_now(), model_served = $4, provider_request_id = coalesce($5, provider_request_id),
           http_status = $6, error_class = $7, finish_reason = $8, stream_completed = $9,
           tokens_prompt = case when $10 then $11::bigint end, tokens_cached = case when $10 then least($12::bigint, $11) end,
           tokens_cache_write = case when $10 then least($13::bigint, $11 - least($12, $11)) end,
           tokens_output = case when $10 then $14::bigint end, tokens_reasoning = case when $10 then least($15::bigint, $14) end,
           usage_source = $16, pricing_id = coalesce($17, pricing_id),
           cost_pusd = $18, provider_cost_pusd = $19, raw_usage = $20
         where id = $1",
    )
    .bind(usage_id)
    .bind(end.state)
    .bind(after_the_end)
    .bind(end.model_served)
    .bind(&call.provider_request_id)
    .bind(end.http_status)
    .bind(&call.error_class)
    .bind(&call.finish_reason)
    .bind(call.stream_completed)
    .bind(end.reported)
    .bind(end.prompt)
    .bind(end.cached)
    .bind(end.cache_write)
    .bind(end.output)
    .bind(end.reasoning)
    .bind(end.source)
    .bind(priced.map(|p| p.id))
    .bind(end.cost)
    .bind(end.provider_cost)
    .bind(end.raw)
    .execute(&mut *conn)
    .await?;
    if let Some(said) = &end.doubt {
        let model = format!("{provider}/{model}");
        let charged = PicoUsd(end.cost);
        crate::crash_point("close.after_call");
        doubt::keep(conn, &doubt::Doubted { usage_id, user, model: &model, said, charged }).await?;
    }
    Ok(())
}

/// What is stored of a call's end beside what its reading says itself.
pub(super) struct End {
    pub state: &'static str,
    pub model_served: Option<String>,
    pub http_status: Option<i32>,
    /// Whether tokens are known.
    pub reported: bool,
    pub prompt: i64,
    pub cached: i64,
    pub cache_write: i64,
    pub output: i64,
    pub reasoning: i64,
    pub source: &'static str,
    /// Pico-USD.
    pub cost: i64,
    /// What the provider says of the cost, if nobody can mean it: then it is not charged, and must be kept by [`doubt::keep`].
    pub doubt: Option<String>,
    pub provider_cost: Option<i64>,
    pub raw: Json<Box<RawValue>>,
}

impl End {
    /// `in_time`: its attempt has not ended; otherwise the call is free. `own_key`: what a user's own key costs is between him and his
    /// provider.
    pub fn of(call: &CallClosed, priced: Option<Price>, in_time: bool, own_key: bool) -> Self {
        let usage = call.usage.clone().unwrap_or_default();
        let doubt = if own_key { None } else { doubt::of(&usage, priced.as_ref()) };
        let said = if doubt.is_some() { None } else { usage.total_cost_pusd() };
        let reported = call.usage.is_some();
        let succeeded = call.state == CallState::Succeeded && reported;
        let tokens = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        Self {
            state: match call.state {
                CallState::Succeeded if succeeded => "succeeded",
                CallState::Succeeded | CallState::Unknown => "unknown",
                CallState::Failed => "failed",
            },
            model_served: call.model_served.as_deref().map(nul::text),
            http_status: call.http_status.map(i32::from),
            reported,
            prompt: tokens(usage.tokens_prompt),
            cached: tokens(usage.tokens_cached),
            cache_write: tokens(usage.tokens_cache_write),
            output: tokens(usage.tokens_output),
            reasoning: tokens(usage.tokens_reasoning),
            source: match usage.source {
                UsageSource::Provider => "provider",
                UsageSource::Lookup => "lookup",
                UsageSource::Estimated => "estimated",
                UsageSource::None if succeeded => "estimated",
                UsageSource::None => "none",
            },
            cost: match (call.is_charged() && in_time && !own_key, said, priced) {
                (false, ..) => 0,
                (true, Some(cost), _) => cost.max(0),
                (true, None, Some(price)) => price.cost(&usage).0,
                (true, None, None) => 0,
            },
            provider_cost: usage.provider_cost_pusd.filter(|_| doubt.is_none()).map(|c| c.max(0)),
            raw: Json(usage.raw_to_keep()),
            doubt,
        }
    }
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
