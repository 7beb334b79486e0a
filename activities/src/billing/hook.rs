//! The ledger's part in the engine's transactions: a hold when an attempt starts, a row for each call, one settlement
//! when the attempt ends.

use super::{
    call::{self, Holding},
    caps,
    hold::{self, Reservable},
    ledger::{self, LedgerError},
    money::{MicroCredits, PicoUsd, Rate},
    price::{self, Rows},
    returned::{CREDITS, Returned},
};
use crate::usage::{CallClosed, CallNoted, CallOpened, PlannedCall, Reserve};
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

/// A hold that a call does not fit into grows by at least this part of it, where there is room: a row and its allocations for each
/// call of a long attempt would be as many writes again. Chosen: twenty extensions make a hold eighty times as large.
const GROWTH_PART: i64 = 4;

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
        crate::crash_point("bill.after_attempt");
        if inserted.rows_affected() == 0 {
            return Ok(None);
        }
        // What he has brought keys for is free; a call on a key of the platform all the same holds for itself.
        if call::brings_keys(conn, owner.user).await? {
            return Ok(None);
        }
        let Wanted { all: wanted, least: needed } = self.wanted(conn, start).await?;
        let balance = ledger::lock(conn, owner.user).await?;
        if balance.stopped {
            return Ok(Some((REVIEW.into(), STOPPED.into())));
        }
        crate::crash_point("bill.after_account");
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
        opened: &CallOpened,
    ) -> Result<Verdict, LedgerError> {
        let refused = |reason: &str, message: String| Ok(Verdict::Refused { reason: reason.to_owned(), message });
        let Some(owner) = owner(attempt) else {
            return refused("no_user", "the run has no user who could pay for a model call".into());
        };
        let id = attempt.attempt_id.0;
        let balance = ledger::lock(conn, owner.user).await?;
        crate::crash_point("call.after_account");
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
        let own = match opened.own_key_id {
            Some(id) => match call::own_key(conn, opened, owner.user, id).await? {
                Some(id) => Some(id),
                None => return refused("key_revoked", "the key was deleted, or is somebody else's".into()),
            },
            None => None,
        };
        let rows = if opened.local { Rows::OwnOrAny } else { Rows::Own };
        let (input, output) = (opened.input_tokens_max, opened.output_tokens_max);
        let priced = price::bound(conn, rows, &opened.provider, &opened.model, input, output).await?;
        let worst = match (own, &priced) {
            // What his own key costs is between him and his provider: no price of ours is needed.
            (Some(_), _) => PicoUsd(0),
            (None, Some((price, dearest))) => {
                if price.exceeds(opened.input_umtok_max, opened.output_umtok_max) {
                    let text = format!(
                        "{} {} costs more than its ceiling in the routing allows",
                        opened.provider, opened.model
                    );
                    return refused("price_above_ceiling", text);
                }
                *dearest
            }
            (None, None) => {
                let text = format!(
                    "{} {} has no price of its own and is not used: `loopwright pricing import` or `sync`",
                    opened.provider, opened.model
                );
                return refused("price_missing", text);
            }
        };
        let Holding { used, held, hold_no, rate } = call::holding(conn, id).await?;
        // The rate that the user agreed to, should ours be another one by now.
        let rate = rate.unwrap_or(self.settings.rate);
        let total = rate.credits(used.saturating_add(i128::from(worst.0))).0;
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
            let tightest = caps::tightest(conn, attempt, owner.project).await?;
            if let Some(cap) = tightest.filter(|cap| cap.left < more) {
                let (what, left, remedy) = (cap.kind.of_what(), cap.left, cap.kind.remedy());
                return refused(
                    cap.used_up(conn, attempt, owner.project).await?,
                    format!("{what} is used up: {left} credits are left of it, the next call needs {more}{remedy}"),
                );
            }
            let room = tightest.map_or(available, |cap| available.min(cap.left));
            let more = growth(MicroCredits(held), more, room);
            hold::place(conn, owner.user, id, hold_no + 1, more, rate, at).await?;
        }
        crate::crash_point("call.after_hold");
        let api_key = match own {
            Some(id) => id,
            None => call::api_key(conn, opened).await?,
        };
        crate::crash_point("call.after_key");
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
        .bind(&opened.provider)
        .bind(&opened.model)
        .bind(&opened.purpose)
        .bind(&opened.request_sha256)
        .bind(priced.map(|(price, _)| price.id))
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

/// By how much a hold grows whose next call needs `more`, which is within `room`: by a part of what is held, so that the calls after
/// it find room in it. Of what is there beyond the need half stays for others of the user.
fn growth(held: MicroCredits, more: MicroCredits, room: MicroCredits) -> MicroCredits {
    let ahead = (held.0 / GROWTH_PART).saturating_sub(more.0);
    MicroCredits(more.0 + ahead.clamp(0, (room.0 - more.0).max(0) / 2))
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
        let bound =
            price::bound(conn, Rows::OwnOrAny, provider, model, planned.input_tokens, planned.output_tokens).await?;
        worst = bound.map_or(worst, |(_, dearest)| worst.max(i128::from(dearest.0)));
    }
    Ok(worst)
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
            crate::crash_point("bill.after_accounts");
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
            crate::crash_point("bill.after_settled");
            let mut refusals = Vec::new();
            for transition in transitions {
                let mut least = Vec::with_capacity(transition.started.len());
                for start in &transition.started {
                    least.push(self.wanted(conn, start).await.map_err(hook_error)?.least);
                }
                for (n, start) in transition.started.iter().enumerate() {
                    let others = least[n + 1..].iter().fold(0_i64, |sum, one| sum.saturating_add(*one));
                    if let Some((reason, message)) =
                        self.start(conn, start, MicroCredits(others)).await.map_err(hook_error)?
                    {
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
                    call::note(conn, attempt.attempt_id.0, reading.key, &call).await?;
                    Ok(Verdict::Accepted)
                }
                Phase::Close => {
                    let closed: CallClosed = serde_json::from_value(reading.body.clone()).map_err(broken)?;
                    if let Some(owner) = owner(attempt) {
                        call::close(conn, owner.user, attempt.attempt_id.0, reading.key, reading.current, &closed)
                            .await
                            .map_err(hook_error)?;
                    }
                    Ok(Verdict::Accepted)
                }
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hold_grows_by_a_part_of_it_within_its_room() {
        for (held, more, room, expected) in [
            (1_000, 10, 100_000, 250),
            (1_000, 250, 100_000, 250),
            (1_000, 900, 100_000, 900),
            (0, 10, 100_000, 10),
            (1_000, 10, 110, 60),
            (1_000, 10, 10, 10),
            (i64::MAX, 1, i64::MAX, i64::MAX / 4),
        ] {
            let grown = growth(MicroCredits(held), MicroCredits(more), MicroCredits(room));
            assert_eq!(grown, MicroCredits(expected), "{held} {more} {room}");
        }
    }
}
