//! The ledger's part in the engine's transactions: a hold when an attempt starts, a row for each call, one settlement
//! when the attempt ends.

use super::{
    caps,
    hold::{self, Reservable},
    ledger::{self, LedgerError},
    money::{MicroCredits, PicoUsd, Rate},
    price::{self, Rows},
    returned::{CREDITS, Returned},
};
use crate::{
    nul,
    usage::{CallClosed, CallNoted, CallOpened, CallState, PlannedCall, Reserve},
};
use chrono::{DateTime, Utc};
use futures_util::future::BoxFuture;
use loopwright_engine::{
    client::Client,
    hook::{
        AttemptRef, AttemptStart, HookError, Outcome, Phase, Reading, Refusal, Transition, TransitionHook, Verdict,
    },
    ids::RunId,
};
use sqlx::PgConnection;
use std::{collections::BTreeMap, convert::Infallible};
use uuid::Uuid;

/// Smallest hold, in micro-credits: an attempt that expects no call still may make a cheap one.
const HOLD_MIN_UCR: i64 = 10_000;

/// What a step waits for while an audit has stopped its user's holds: an operator looks, and it goes on by itself.
const REVIEW: &str = "review";
const STOPPED: &str = "an audit found a difference in this account, so it holds no more credits until an operator has looked; it goes on by itself then";

/// How credits are counted.
#[derive(Clone, Copy, Debug)]
pub struct BillingSettings {
    pub rate: Rate,
    /// Given once to a new user.
    pub welcome: MicroCredits,
}

impl Default for BillingSettings {
    fn default() -> Self {
        Self { rate: Rate { credits_per_usd: 100, markup_bps: 2_000 }, welcome: MicroCredits::from_credits(100) }
    }
}

/// Implements the engine's hook over the ledger.
pub struct LedgerHook {
    settings: BillingSettings,
    returned: Returned,
}

/// Whose credits an attempt uses.
struct Owner {
    user: Uuid,
    project: Option<Uuid>,
}

impl LedgerHook {
    #[must_use]
    pub fn new(settings: BillingSettings) -> Self {
        Self { settings, returned: Returned::default() }
    }

    /// Wakes runs that wait for credits which others of their user have given back by ending an attempt in this process.
    /// Never returns. Without it such a run looks again every [`loopwright_engine::machine::BLOCKED_RETRY_MS`].
    pub async fn wake_waiting(&self, client: &Client) -> Infallible {
        self.returned.wake(client).await
    }

    /// Places the first hold of an attempt. `others` is what its siblings of the same transition need at least: it is left
    /// to them.
    async fn start(
        &self,
        conn: &mut PgConnection,
        start: &AttemptStart,
        others: MicroCredits,
    ) -> Result<Option<(String, String)>, LedgerError> {
        let Some(owner) = owner(&start.attempt) else { return Ok(None) };
        let attempt = &start.attempt;
        let inserted = sqlx::query(
            "insert into activity_attempts (id, run_id, path, activity, attempt_no, user_id, project_id, state, lease_expires_at)
             values ($1, $2, $3, $4, $5, $6, $7, 'running', $8) on conflict (id) do nothing",
        )
        .bind(attempt.attempt_id.0)
        .bind(attempt.run_id.0)
        .bind(&attempt.path)
        .bind(&attempt.activity)
        .bind(i32::try_from(attempt.attempt).unwrap_or(i32::MAX))
        .bind(owner.user)
        .bind(owner.project)
        .bind(attempt.deadline)
        .execute(&mut *conn)
        .await?;
        if inserted.rows_affected() == 0 {
            return Ok(None);
        }
        // What he has brought keys for is free; a call on a key of the platform all the same holds for itself.
        if brings_keys(conn, owner.user).await? {
            return Ok(None);
        }
        let Wanted { all: wanted, least: needed } = self.wanted(conn, start).await?;
        let balance = ledger::lock(conn, owner.user).await?;
        if balance.stopped {
            return Ok(Some((REVIEW.into(), STOPPED.into())));
        }
        let Reservable { credits: available, at } = hold::reservable(conn, owner.user, balance).await?;
        if available.0 < needed {
            let message = format!(
                "needs {} credits, {available} are available; add credits and it goes on by itself",
                MicroCredits(needed)
            );
            return Ok(Some((CREDITS.into(), message)));
        }
        let tightest = caps::tightest(conn, attempt, owner.project).await?;
        if let Some(cap) = tightest.filter(|cap| cap.left.0 < needed) {
            let message = format!(
                "{} is used up: {} credits are left of it, the next step needs {}{}",
                cap.kind.of_what(),
                cap.left,
                MicroCredits(needed),
                cap.kind.remedy()
            );
            return Ok(Some((cap.used_up(conn, attempt, owner.project).await?.into(), message)));
        }
        // What is available bounds the hold: a call that does not fit any more extends it or stops the attempt.
        let room = available.0.min(tightest.map_or(i64::MAX, |cap| cap.left.0));
        let amount = wanted.min((room - others.0).max(needed));
        hold::place(conn, owner.user, attempt.attempt_id.0, 1, MicroCredits(amount), self.settings.rate, at).await?;
        Ok(None)
    }

    /// What an attempt would like to hold, and what it needs at least.
    async fn wanted(&self, conn: &mut PgConnection, start: &AttemptStart) -> Result<Wanted, LedgerError> {
        let reserve: Reserve = serde_json::from_value(start.reserve.clone()).unwrap_or_default();
        let (mut all, mut dearest) = (0i128, 0i128);
        for planned in &reserve.calls {
            let one = worst(conn, planned).await?;
            all += one * i128::from(planned.count);
            dearest = dearest.max(one);
        }
        let credits = |cost| self.settings.rate.credits(cost).0.max(HOLD_MIN_UCR);
        Ok(Wanted { all: credits(all), least: credits(dearest) })
    }

    async fn open(
        &self,
        conn: &mut PgConnection,
        attempt: &AttemptRef,
        key: &str,
        call: &CallOpened,
    ) -> Result<Verdict, LedgerError> {
        let refused = |reason: &str, message: String| Ok(Verdict::Refused { reason: reason.to_owned(), message });
        let Some(owner) = owner(attempt) else {
            return refused("no_user", "the run has no user who could pay for a model call".into());
        };
        let id = attempt.attempt_id.0;
        let balance = ledger::lock(conn, owner.user).await?;
        let known: Option<String> =
            sqlx::query_scalar("select state from api_key_usage where attempt_id = $1 and call_key = $2")
                .bind(id)
                .bind(key)
                .fetch_optional(&mut *conn)
                .await?;
        match known.as_deref() {
            None => {}
            // The answer to the announcement was lost, and it is made again before the call.
            Some("started") => return Ok(Verdict::Accepted),
            // Its outcome is known or will never be: to make it again under its name would be a call that nobody books.
            Some(_) => return refused("internal.call_repeated", format!("the call {key} was made before")),
        }
        let running: Option<i32> =
            sqlx::query_scalar("select 1 from activity_attempts where id = $1 and state = 'running'")
                .bind(id)
                .fetch_optional(&mut *conn)
                .await?;
        if running.is_none() {
            return refused("attempt_closed", "the attempt has ended".into());
        }
        let own = match call.own_key_id {
            Some(id) => match own_key(conn, call, owner.user, id).await? {
                Some(id) => Some(id),
                None => return refused("key_revoked", "the key was deleted, or is somebody else's".into()),
            },
            None => None,
        };
        let rows = if call.local { Rows::OwnOrAny } else { Rows::Own };
        let price = price::find_among(conn, rows, &call.provider, &call.model, call.input_tokens_max, None).await?;
        let worst = match (own, &price) {
            // What his own key costs is between him and his provider: no price of ours is needed.
            (Some(_), _) => PicoUsd(0),
            (None, Some(price)) => {
                if price.exceeds(call.input_umtok_max, call.output_umtok_max) {
                    let text =
                        format!("{} {} costs more than its ceiling in the routing allows", call.provider, call.model);
                    return refused("price_above_ceiling", text);
                }
                price.worst(call.input_tokens_max, call.output_tokens_max)
            }
            (None, None) => {
                let text = format!(
                    "{} {} has no price of its own and is not used: `loopwright pricing import` or `sync`",
                    call.provider, call.model
                );
                return refused("price_missing", text);
            }
        };
        let (used, held, hold_no): (String, i64, i32) = sqlx::query_as(
            "select (select coalesce(sum(case state when 'started' then worst_pusd else cost_pusd end), 0)::text from api_key_usage where attempt_id = $1),
                    coalesce(sum(held_delta_ucr), 0)::bigint, coalesce(max(hold_no), 0)
             from credit_transactions where attempt_id = $1 and kind = 'hold'",
        )
        .bind(id)
        .fetch_one(&mut *conn)
        .await?;
        let total =
            self.settings.rate.credits(used.parse::<i128>().unwrap_or(i128::MAX).saturating_add(i128::from(worst.0))).0;
        // Every call on a key of the platform has a hold behind it, one that may be free too.
        let total = if held == 0 { total.max(HOLD_MIN_UCR) } else { total };
        if own.is_none() && total > held {
            let more = MicroCredits(total - held);
            if balance.stopped {
                return refused(REVIEW, STOPPED.into());
            }
            let Reservable { credits: available, at } = hold::reservable(conn, owner.user, balance).await?;
            if available < more {
                return refused(
                    CREDITS,
                    format!(
                        "the next call needs {more} credits more, {available} are available; add credits and it goes on by itself"
                    ),
                );
            }
            if let Some(cap) = caps::tightest(conn, attempt, owner.project).await?.filter(|cap| cap.left < more) {
                let (what, left, remedy) = (cap.kind.of_what(), cap.left, cap.kind.remedy());
                return refused(
                    cap.used_up(conn, attempt, owner.project).await?,
                    format!("{what} is used up: {left} credits are left of it, the next call needs {more}{remedy}"),
                );
            }
            hold::place(conn, owner.user, id, hold_no + 1, more, self.settings.rate, at).await?;
        }
        let api_key = match own {
            Some(id) => id,
            None => api_key(conn, call).await?,
        };
        sqlx::query(
            "insert into api_key_usage (attempt_id, call_no, call_key, api_key_id, user_id, project_id, provider, model_requested, purpose,
                                        request_sha256, state, pricing_id, worst_pusd)
             select $1, coalesce(max(call_no), 0) + 1, $2, $3, $4, $5, $6, $7, $8, decode($9, 'hex'), 'started', $10, $11
             from api_key_usage where attempt_id = $1",
        )
        .bind(id)
        .bind(key)
        .bind(api_key)
        .bind(owner.user)
        .bind(owner.project)
        .bind(&call.provider)
        .bind(&call.model)
        .bind(&call.purpose)
        .bind(&call.request_sha256)
        .bind(price.map(|price| price.id))
        .bind(worst.0)
        .execute(conn)
        .await?;
        Ok(Verdict::Accepted)
    }
}

/// Micro-credits that an attempt asks for.
struct Wanted {
    /// For every call that it expects.
    all: i64,
    /// For its dearest call.
    least: i64,
}

/// Who pays for an attempt, from the run's attributes.
fn owner(attempt: &AttemptRef) -> Option<Owner> {
    let id = |name: &str| attempt.attributes.get(name)?.as_str().and_then(|t| Uuid::parse_str(t).ok());
    Some(Owner { user: id("user_id")?, project: id("project_id") })
}

/// The dearest candidate's worst case of one planned call, pico-USD.
async fn worst(conn: &mut PgConnection, planned: &PlannedCall) -> Result<i128, LedgerError> {
    let mut worst = 0i128;
    for (provider, model) in &planned.candidates {
        if let Some(price) = price::find(conn, provider, model, planned.input_tokens, None).await? {
            worst = worst.max(i128::from(price.worst(planned.input_tokens, planned.output_tokens).0));
        }
    }
    Ok(worst)
}

/// Whether a user has brought keys of his own.
async fn brings_keys(conn: &mut PgConnection, user: Uuid) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar(
        "select exists (select from api_keys where user_id = $1 and source = 'sealed' and status <> 'revoked')",
    )
    .bind(user)
    .fetch_one(conn)
    .await
}

/// The row of a user's own key, if it is his, of that provider, and in use.
async fn own_key(
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

async fn api_key(conn: &mut PgConnection, call: &CallOpened) -> Result<Uuid, sqlx::Error> {
    sqlx::query_scalar(
        "with new as (insert into api_keys (provider, source, label, last4, fingerprint) values ($1, 'environment', 'platform', $2, decode($3, 'hex'))
                      on conflict (provider, fingerprint, coalesce(user_id, '00000000-0000-0000-0000-000000000000')) do nothing returning id)
         select id from new union all
         select id from api_keys where provider = $1 and fingerprint = decode($3, 'hex') and user_id is null limit 1",
    )
    .bind(&call.provider)
    .bind(call.key_last4.chars().take(4).collect::<String>())
    .bind(&call.key_fingerprint)
    .fetch_one(conn)
    .await
}

/// Row id, state, provider, requested model, state of the attempt, late, start, price row.
type OpenedCall = (i64, String, String, String, String, bool, DateTime<Utc>, Option<i64>);

/// Stores what became of a call. `current` as in [`Reading::current`].
async fn close(
    conn: &mut PgConnection,
    attempt: &AttemptRef,
    key: &str,
    current: bool,
    call: &CallClosed,
) -> Result<(), LedgerError> {
    let id = attempt.attempt_id.0;
    let Some(owner) = owner(attempt) else { return Ok(()) };
    ledger::lock(conn, owner.user).await?;
    let row: Option<OpenedCall> = sqlx::query_as(
        "select k.id, k.state, k.provider, k.model_requested, a.state, k.late, k.started_at, k.pricing_id from api_key_usage k join activity_attempts a on a.id = k.attempt_id
         where k.attempt_id = $1 and k.call_key = $2",
    )
    .bind(id)
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
        crate::usage::UsageSource::Provider => "provider",
        crate::usage::UsageSource::Lookup => "lookup",
        crate::usage::UsageSource::Estimated => "estimated",
        crate::usage::UsageSource::None if succeeded => "estimated",
        crate::usage::UsageSource::None => "none",
    };
    let tokens = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
    let reported = call.usage.is_some();
    sqlx::query(
        "update api_key_usage set state = $2, late = $3, finished_at = engine_now(), model_served = $4, provider_request_id = coalesce($5, provider_request_id),
           http_status = $6, error_class = $7, finish_reason = $8, stream_completed = $9,
           tokens_prompt = case when $10 then $11 end, tokens_cached = case when $10 then least($12, $11) end,
           tokens_cache_write = case when $10 then $13 end, tokens_output = case when $10 then $14 end,
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
async fn note(conn: &mut PgConnection, attempt: Uuid, key: &str, call: &CallNoted) -> Result<(), sqlx::Error> {
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

fn hook_error(error: LedgerError) -> HookError {
    match error {
        LedgerError::Sql(e) => HookError::Sql(e),
        other => HookError::Invariant(other.to_string()),
    }
}

impl TransitionHook for LedgerHook {
    fn apply<'a>(
        &'a self,
        conn: &'a mut PgConnection,
        transitions: &'a [Transition],
    ) -> BoxFuture<'a, Result<Vec<Refusal>, HookError>> {
        Box::pin(async move {
            // All user rows first, in one order: two batches cannot wait for each other.
            let mut users: BTreeMap<Uuid, ()> = BTreeMap::new();
            for attempt in transitions
                .iter()
                .flat_map(|t| t.ended.iter().map(|e| &e.attempt).chain(t.started.iter().map(|s| &s.attempt)))
            {
                users.extend(owner(attempt).map(|o| (o.user, ())));
            }
            for user in users.keys() {
                ledger::lock(conn, *user).await.map_err(hook_error)?;
            }
            for end in transitions.iter().flat_map(|t| &t.ended) {
                let state = match end.outcome {
                    Outcome::Succeeded => "completed",
                    Outcome::Lost => "lost",
                    Outcome::Failed | Outcome::TimedOut | Outcome::Cancelled | Outcome::Blocked => "failed",
                };
                let ended = hold::Ended { state, failure: end.failure.as_deref(), again: end.again };
                hold::settle(conn, end.attempt.attempt_id.0, ended).await.map_err(hook_error)?;
                if let Some(owner) = owner(&end.attempt) {
                    self.returned.add(owner.user);
                }
            }
            let mut refusals = Vec::new();
            for transition in transitions {
                let mut least = Vec::with_capacity(transition.started.len());
                for start in &transition.started {
                    least.push(self.wanted(conn, start).await.map_err(hook_error)?.least);
                }
                for (n, start) in transition.started.iter().enumerate() {
                    let others = MicroCredits(least[n + 1..].iter().sum());
                    if let Some((reason, message)) = self.start(conn, start, others).await.map_err(hook_error)? {
                        refusals.push(Refusal { ord: transition.ord, reason, message });
                        break;
                    }
                }
            }
            Ok(refusals)
        })
    }

    fn abandon<'a>(&'a self, conn: &'a mut PgConnection, run: RunId) -> BoxFuture<'a, Result<(), HookError>> {
        Box::pin(async move {
            let running: Vec<(Uuid, Uuid)> = sqlx::query_as(
                "select id, user_id from activity_attempts where run_id = $1 and state = 'running' order by user_id, id",
            )
            .bind(run.0)
            .fetch_all(&mut *conn)
            .await?;
            for (attempt, user) in running {
                ledger::lock(conn, user).await.map_err(hook_error)?;
                let ended = hold::Ended { state: "lost", failure: None, again: false };
                hold::settle(conn, attempt, ended).await.map_err(hook_error)?;
                self.returned.add(user);
            }
            Ok(())
        })
    }

    fn meter<'a>(
        &'a self,
        conn: &'a mut PgConnection,
        attempt: &'a AttemptRef,
        reading: Reading<'a>,
    ) -> BoxFuture<'a, Result<Verdict, HookError>> {
        Box::pin(async move {
            let broken = |e: serde_json::Error| HookError::Invariant(format!("a reading that is no call: {e}"));
            match reading.phase {
                Phase::Open => {
                    let call: CallOpened = serde_json::from_value(reading.body.clone()).map_err(broken)?;
                    self.open(conn, attempt, reading.key, &call).await.map_err(hook_error)
                }
                Phase::Note => {
                    let call: CallNoted = serde_json::from_value(reading.body.clone()).map_err(broken)?;
                    note(conn, attempt.attempt_id.0, reading.key, &call).await?;
                    Ok(Verdict::Accepted)
                }
                Phase::Close => {
                    let call: CallClosed = serde_json::from_value(reading.body.clone()).map_err(broken)?;
                    close(conn, attempt, reading.key, reading.current, &call).await.map_err(hook_error)?;
                    Ok(Verdict::Accepted)
                }
            }
        })
    }
}
