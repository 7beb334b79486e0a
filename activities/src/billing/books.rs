//! What reconciliation reads and keeps: calls whose outcome is unknown, sums beside a provider's, prices beside its bills, and the
//! findings. It never moves credits.

use super::money::PicoUsd;
use crate::{nul, usage::Usage};
use chrono::{DateTime, Utc};
use serde::Serialize;
use sqlx::{PgConnection, types::Json};
use uuid::Uuid;

/// Hours that a call of unknown outcome is asked about. Source: money.md, section 5.
const LOOKUP_HOURS: i32 = 24;
/// Seconds until a call is asked about again, doubled up to the longest. Chosen: the provider knows it after some seconds.
const LOOKUP_SECONDS: f64 = 30.0;
const LOOKUP_SECONDS_MAX: f64 = 7_200.0;
/// Largest count of tokens that a look-up is believed. The same as of an answer.
const TOKENS_MAX: u64 = 1 << 40;

/// A call of unknown outcome or doubted cost, with the provider's name for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownCall {
    pub id: i64,
    pub provider_request_id: String,
    /// Of the key that made it, in hex.
    pub fingerprint: String,
}

/// Calls of a provider on keys of the platform that may be asked about now, oldest first.
///
/// # Transaction
/// Reads only.
pub async fn unknown_calls(
    conn: &mut PgConnection,
    provider: &str,
    limit: i64,
) -> Result<Vec<UnknownCall>, sqlx::Error> {
    let rows: Vec<(i64, String, String)> = sqlx::query_as(
        "select u.id, u.provider_request_id, encode(k.fingerprint, 'hex')
         from api_key_usage u join api_keys k on k.id = u.api_key_id and k.user_id is null
         where u.provider = $1 and state = 'unknown' and provider_request_id is not null and usage_source = 'none'
           and finished_at > engine_now() - make_interval(hours => $2) and coalesce(next_lookup_at, finished_at) <= engine_now()
         order by finished_at limit $3",
    )
    .bind(provider)
    .bind(LOOKUP_HOURS)
    .bind(limit)
    .fetch_all(conn)
    .await?;
    let call = |(id, provider_request_id, fingerprint)| UnknownCall { id, provider_request_id, fingerprint };
    Ok(rows.into_iter().map(call).collect())
}

/// Calls of a provider on keys of the platform whose cost is doubted and that may be asked about now, oldest first.
///
/// # Transaction
/// Reads only.
pub async fn doubted_calls(
    conn: &mut PgConnection,
    provider: &str,
    limit: i64,
) -> Result<Vec<UnknownCall>, sqlx::Error> {
    let rows: Vec<(i64, String, String)> = sqlx::query_as(
        "select u.id, u.provider_request_id, encode(k.fingerprint, 'hex')
         from cost_doubts d join api_key_usage u on u.id = d.usage_id join api_keys k on k.id = u.api_key_id and k.user_id is null
         where d.resolved_at is null and u.provider = $1 and u.provider_request_id is not null
           and d.found_at > engine_now() - make_interval(hours => $2) and coalesce(u.next_lookup_at, d.found_at) <= engine_now()
         order by d.found_at limit $3",
    )
    .bind(provider)
    .bind(LOOKUP_HOURS)
    .bind(limit)
    .fetch_all(conn)
    .await?;
    let call = |(id, provider_request_id, fingerprint)| UnknownCall { id, provider_request_id, fingerprint };
    Ok(rows.into_iter().map(call).collect())
}

/// Stores what the provider says that a call of unknown outcome consumed. It stays unknown to its attempt, whose next one made
/// the call again: nobody is charged. False if another process was faster.
pub async fn fill(
    conn: &mut PgConnection,
    id: i64,
    usage: &Usage,
    model: Option<&str>,
    finish_reason: Option<&str>,
) -> Result<bool, sqlx::Error> {
    let tokens = |n: u64| i64::try_from(n.min(TOKENS_MAX)).unwrap_or(i64::MAX);
    let done = sqlx::query(
        "update api_key_usage set usage_source = 'lookup', tokens_prompt = $2, tokens_cached = least($3, $2), tokens_output = $4,
           tokens_reasoning = least($5, $4), provider_cost_pusd = $6, raw_usage = $7, model_served = coalesce(model_served, $8),
           finish_reason = coalesce(finish_reason, $9), lookups = lookups + 1, next_lookup_at = null
         where id = $1 and state = 'unknown' and usage_source = 'none'",
    )
    .bind(id)
    .bind(tokens(usage.tokens_prompt))
    .bind(tokens(usage.tokens_cached))
    .bind(tokens(usage.tokens_output))
    .bind(tokens(usage.tokens_reasoning))
    .bind(usage.provider_cost_pusd.map(|c| c.max(0)))
    .bind(Json(usage.raw_to_keep()))
    .bind(model.map(nul::text))
    .bind(finish_reason.map(nul::text))
    .execute(conn)
    .await?;
    Ok(done.rows_affected() > 0)
}

/// The provider does not know a call yet, or cannot say: it is asked again later, each time after twice the pause.
pub async fn ask_later(conn: &mut PgConnection, id: i64) -> Result<(), sqlx::Error> {
    sqlx::query(
        "update api_key_usage set lookups = lookups + 1,
           next_lookup_at = engine_now() + make_interval(secs => least($2 * power(2, least(lookups, 20)), $3)) where id = $1",
    )
    .bind(id)
    .bind(LOOKUP_SECONDS)
    .bind(LOOKUP_SECONDS_MAX)
    .execute(conn)
    .await?;
    Ok(())
}

/// What the platform owes a provider for the calls of a key, by our books: what the provider said, else our arithmetic, calls of
/// unknown outcome and late ones included where their cost is known. `fingerprint` in hex.
pub async fn owed(conn: &mut PgConnection, provider: &str, fingerprint: &str) -> Result<i128, sqlx::Error> {
    let sum: String = sqlx::query_scalar(
        "select coalesce(sum(coalesce(u.provider_cost_pusd, u.cost_pusd)), 0)::text
         from api_key_usage u join api_keys k on k.id = u.api_key_id where u.provider = $1 and k.fingerprint = decode($2, 'hex') and k.user_id is null",
    )
    .bind(provider)
    .bind(fingerprint)
    .fetch_one(conn)
    .await?;
    Ok(sum.parse().unwrap_or(i128::MAX))
}

/// Sums at one instant, in pico-USD.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Totals {
    /// Of the key, as its provider says.
    pub usage: i128,
    /// Of the account, as its provider says.
    pub account: i128,
    /// Of the key, by our books.
    pub own: i128,
}

/// Keeps the sums of a key and returns those that were kept before.
pub async fn keep_totals(
    conn: &mut PgConnection,
    provider: &str,
    fingerprint: &str,
    now: Totals,
) -> Result<Option<Totals>, sqlx::Error> {
    let before: Option<(String, String, String)> = sqlx::query_as(
        "select trim_scale(usage_pusd)::text, trim_scale(account_pusd)::text, trim_scale(own_pusd)::text from provider_totals
         where provider = $1 and fingerprint = decode($2, 'hex') order by id desc limit 1",
    )
    .bind(provider)
    .bind(fingerprint)
    .fetch_optional(&mut *conn)
    .await?;
    sqlx::query(
        "insert into provider_totals (provider, fingerprint, usage_pusd, account_pusd, own_pusd)
         values ($1, decode($2, 'hex'), $3::numeric, $4::numeric, $5::numeric)",
    )
    .bind(provider)
    .bind(fingerprint)
    .bind(now.usage.to_string())
    .bind(now.account.to_string())
    .bind(now.own.to_string())
    .execute(conn)
    .await?;
    let number = |text: String| text.parse().unwrap_or(0);
    Ok(before.map(|(usage, account, own)| Totals { usage: number(usage), account: number(account), own: number(own) }))
}

/// A model whose provider charges something else than our price says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Drift {
    pub provider: String,
    pub model: String,
    pub provider_cost: PicoUsd,
    pub own_cost: PicoUsd,
}

/// Models of which, over the last day, the provider's costs and our arithmetic differ by more than `bps`. Only calls on keys of
/// the platform: what a user's own key is charged is between him and his provider. Nor those that a provider served on a key
/// deposited with it: its charge is a fee.
pub async fn drifted(conn: &mut PgConnection, bps: i64) -> Result<Vec<Drift>, sqlx::Error> {
    let rows: Vec<(String, String, i64, i64)> = sqlx::query_as(
        "select provider, model_requested, least(theirs, 9e18)::bigint, least(ours, 9e18)::bigint from (
           select k.provider, k.model_requested, sum(k.provider_cost_pusd) theirs, sum(m.per_request_pusd
             + (k.tokens_prompt - coalesce(k.tokens_cached, 0) - coalesce(k.tokens_cache_write, 0))::numeric * m.input_umtok
             + coalesce(k.tokens_cached, 0)::numeric * coalesce(m.cached_input_umtok, m.input_umtok)
             + coalesce(k.tokens_cache_write, 0)::numeric * coalesce(m.cache_write_umtok, m.input_umtok)
             + (k.tokens_output - coalesce(k.tokens_reasoning, 0))::numeric * m.output_umtok
             + coalesce(k.tokens_reasoning, 0)::numeric * coalesce(m.reasoning_umtok, m.output_umtok)) ours
           from api_key_usage k join model_pricing m on m.id = k.pricing_id
           join api_keys y on y.id = k.api_key_id and y.user_id is null
           where k.state = 'succeeded' and k.provider_cost_pusd is not null and k.finished_at > engine_now() - interval '1 day'
             -- As answers are read: said, or, where it is left out, seen by what the vendor behind has charged.
             and case k.raw_usage->>'is_byok' when 'true' then false when 'false' then true
                   else case when k.raw_usage->'cost_details'->>'upstream_inference_cost' ~ '^[0-9]+([.][0-9]+)?$'
                          then (k.raw_usage->'cost_details'->>'upstream_inference_cost')::numeric = 0 else true end end
           group by 1, 2) s
         where abs(theirs - ours) * 10000 > $1 * greatest(theirs, ours) order by 1, 2",
    )
    .bind(bps)
    .fetch_all(conn)
    .await?;
    Ok(rows
        .into_iter()
        .map(|(provider, model, theirs, ours)| Drift {
            provider,
            model,
            provider_cost: PicoUsd(theirs),
            own_cost: PicoUsd(ours),
        })
        .collect())
}

/// A difference that somebody should look at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// A word: `invariant`, `payment_missing`, `price_differs`, …
    pub kind: &'static str,
    /// What it is about; with the kind it names the finding.
    pub subject: String,
    /// One line.
    pub message: String,
    pub user: Option<Uuid>,
}

/// Keeps what a job has found. What it found before and does not find any more is resolved if `complete` says that it has looked
/// at everything. Returns those that are new, or were resolved and are back.
pub async fn keep_findings(
    conn: &mut PgConnection,
    job: &str,
    found: &[Finding],
    complete: bool,
) -> Result<Vec<Finding>, sqlx::Error> {
    let mut new = Vec::new();
    for finding in found {
        let seen: i32 = sqlx::query_scalar(
            "insert into reconcile_findings (job, kind, subject, message, user_id) values ($1, $2, $3, $4, $5)
             on conflict (job, kind, subject) do update set message = excluded.message, last_seen_at = engine_now(), resolved_at = null, resolution = null,
               first_seen_at = case when reconcile_findings.resolved_at is null then reconcile_findings.first_seen_at else engine_now() end,
               seen = case when reconcile_findings.resolved_at is null then reconcile_findings.seen + 1 else 1 end
             returning seen",
        )
        .bind(job)
        .bind(finding.kind)
        .bind(&finding.subject)
        .bind(&finding.message)
        .bind(finding.user)
        .fetch_one(&mut *conn)
        .await?;
        if seen == 1 {
            new.push(finding.clone());
        }
    }
    if complete {
        let (kinds, subjects): (Vec<_>, Vec<_>) = found.iter().map(|f| (f.kind, f.subject.as_str())).unzip();
        sqlx::query(
            "update reconcile_findings f set resolved_at = engine_now() where job = $1 and resolved_at is null
               and not exists (select from unnest($2::text[], $3::text[]) as s(kind, subject) where s.kind = f.kind and s.subject = f.subject)",
        )
        .bind(job)
        .bind(kinds)
        .bind(subjects)
        .execute(conn)
        .await?;
    }
    Ok(new)
}

/// A finding as it is kept.
#[derive(Clone, Debug, Serialize)]
pub struct Kept {
    /// By which an operator resolves it.
    pub id: i64,
    pub job: String,
    pub kind: String,
    pub subject: String,
    pub message: String,
    pub user_id: Option<Uuid>,
    pub first_seen_at: DateTime<Utc>,
    pub last_seen_at: DateTime<Utc>,
    pub seen: i32,
}

/// Findings that nothing has resolved, newest first.
pub async fn open_findings(conn: &mut PgConnection, limit: i64) -> Result<Vec<Kept>, sqlx::Error> {
    type Row = (i64, String, String, String, String, Option<Uuid>, DateTime<Utc>, DateTime<Utc>, i32);
    let rows: Vec<Row> = sqlx::query_as(
        "select id, job, kind, subject, message, user_id, first_seen_at, last_seen_at, seen from reconcile_findings
         where resolved_at is null order by last_seen_at desc, id desc limit $1",
    )
    .bind(limit)
    .fetch_all(conn)
    .await?;
    let kept = |(id, job, kind, subject, message, user_id, first_seen_at, last_seen_at, seen): Row| Kept {
        id,
        job,
        kind,
        subject,
        message,
        user_id,
        first_seen_at,
        last_seen_at,
        seen,
    };
    Ok(rows.into_iter().map(kept).collect())
}

/// How far a job has come in a list of the outside.
pub async fn cursor(conn: &mut PgConnection, job: &str) -> Result<i64, sqlx::Error> {
    let found: Option<i64> = sqlx::query_scalar("select position from reconcile_cursors where job = $1")
        .bind(job)
        .fetch_optional(conn)
        .await?;
    Ok(found.unwrap_or(0))
}

/// Keeps how far a job has come; never back.
pub async fn advance(conn: &mut PgConnection, job: &str, position: i64) -> Result<(), sqlx::Error> {
    sqlx::query(
        "insert into reconcile_cursors (job, position) values ($1, $2)
         on conflict (job) do update set position = greatest(reconcile_cursors.position, excluded.position), updated_at = engine_now()",
    )
    .bind(job)
    .bind(position)
    .execute(conn)
    .await?;
    Ok(())
}
