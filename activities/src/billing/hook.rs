//! The ledger's part in the engine's transactions: a hold when an attempt starts, a row for each call, one settlement
//! when the attempt ends.

use super::{
    call, caps,
    hold::{self, Reservable},
    kin,
    ledger::{self, LedgerError},
    money::{MicroCredits, PicoUsd, Rate},
    once::{Once, Whose},
    parked::{self, Needs, REVIEW},
    price::{self, Rows},
    returned::{CREDITS, Returned},
};
use crate::usage::{CallClosed, CallNoted, CallOpened, PlannedCall, Reserve};
use futures_util::future::BoxFuture;
use loopwright_engine::{
    client::Client,
    hook::{
        AtOnce, AttemptRef, AttemptStart, HookError, Outcome, Phase, Reading, Refusal, Transition, TransitionHook,
        Verdict,
    },
    ids::RunId,
};
use serde::Deserialize;
use sqlx::PgConnection;
use std::{collections::BTreeMap, convert::Infallible, sync::Arc};
use uuid::Uuid;

/// Smallest hold, in micro-credits: an attempt that expects no call still may make a cheap one.
const HOLD_MIN_UCR: i64 = 10_000;

/// A hold that a call does not fit into grows by at least this part of it, where there is room: a row and its allocations for each
/// call of a long attempt would be as many writes again. Chosen: twenty extensions make a hold eighty times as large.
const GROWTH_PART: i64 = 4;

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
    needs: Needs,
    once: Once,
}

/// Whose credits an attempt uses.
struct Owner {
    user: Uuid,
    project: Option<Uuid>,
}

impl LedgerHook {
    #[must_use]
    pub fn new(settings: BillingSettings) -> Self {
        Self { settings, returned: Returned::default(), needs: Needs::default(), once: Once::default() }
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
        wanted: &Wanted,
        others: MicroCredits,
    ) -> Result<Option<(String, String)>, LedgerError> {
        let Some(owner) = owner(&start.attempt) else { return Ok(None) };
        let attempt = &start.attempt;
        let line = kin::line(conn, attempt.run_id).await?;
        kin::note(conn, &line).await?;
        crate::crash_point("bill.after_kin");
        let inserted = sqlx::query(
            "insert into activity_attempts (id, run_id, path, activity, attempt_no, user_id, project_id, state, lease_expires_at, kin_noted)
             values ($1, $2, $3, $4, $5, $6, $7, 'running', $8, true) on conflict (id) do nothing",
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
        // What he has brought keys for is free; a call on a key of the platform all the same holds for itself, and the step that was
        // stopped for one waits until it can be paid.
        let own = call::brings_keys(conn, owner.user).await?;
        if own && !wanted.stopped {
            return Ok(None);
        }
        let (wanted, needed) = (if own { wanted.least } else { wanted.all }, wanted.least);
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
        let tightest = caps::tightest(conn, attempt, owner.project, &line).await?;
        crate::crash_point("bill.after_caps");
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
        let stopped = parked::of_step(conn, &start.attempt).await?;
        let least = credits(dearest).max(stopped.unwrap_or(0));
        Ok(Wanted { all: credits(all).max(least), least, stopped: stopped.is_some() })
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
        let facts = call::facts(conn, id, key, owner.user, opened).await?;
        crate::crash_point("call.after_account");
        match facts.known.as_deref() {
            None => {}
            // The answer to the announcement was lost, and it is made again before the call.
            Some("started") => return Ok(Verdict::Accepted),
            // Its outcome is known or will never be: to make it again under its name would be a call that nobody books.
            Some(_) => return refused("internal.call_repeated", format!("the call {key} was made before")),
        }
        if !facts.running {
            return refused("attempt_closed", "the attempt has ended".into());
        }
        let own = opened.own_key_id;
        if own.is_some() && facts.key_row.is_none() {
            return refused("key_revoked", "the key was deleted, or is somebody else's".into());
        }
        let (input, output) = (opened.input_tokens_max, opened.output_tokens_max);
        let tiers = match self.once.known(opened, &facts.prices) {
            Some(known) => known,
            None => Arc::new(price::tiers(conn, Rows::of(opened), &opened.provider, &opened.model, None).await?),
        };
        let priced = tiers.bound(input, output);
        let whose = Whose { attempt: id, key, user: owner.user, project: owner.project };
        self.once.learn(whose, opened, tiers);
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
        let held = facts.held;
        // The rate that the user agreed to, should ours be another one by now.
        let rate = facts.rate.unwrap_or(self.settings.rate);
        let total = rate.credits(facts.used().saturating_add(i128::from(worst.0))).0;
        // Every call on a key of the platform has a hold behind it, one that may be free too.
        let total = if held == 0 { total.max(HOLD_MIN_UCR) } else { total };
        if own.is_none() && total > held {
            let more = MicroCredits(total - held);
            // The next attempt has the answers of this one and makes this call first, with those that are under way now.
            let under_way = call::under_way(conn, id).await?;
            let needed = rate.credits(under_way.saturating_add(i128::from(worst.0))).0.max(HOLD_MIN_UCR);
            let refused = |reason: &str, message: String| {
                self.needs.note(id, needed);
                refused(reason, message)
            };
            if facts.stopped {
                return refused(REVIEW, STOPPED.into());
            }
            let Reservable { credits: available, at } = facts.reservable();
            if available < more {
                return refused(
                    CREDITS,
                    format!(
                        "the next call needs {more} credits more, {available} are available; add credits and it goes on by itself"
                    ),
                );
            }
            let line = kin::line(conn, attempt.run_id).await?;
            let tightest = caps::tightest(conn, attempt, owner.project, &line).await?;
            crate::crash_point("call.after_caps");
            if let Some(cap) = tightest.filter(|cap| cap.left < more) {
                let (what, left, remedy) = (cap.kind.of_what(), cap.left, cap.kind.remedy());
                return refused(
                    cap.used_up(conn, attempt, owner.project).await?,
                    format!("{what} is used up: {left} credits are left of it, the next call needs {more}{remedy}"),
                );
            }
            let room = tightest.map_or(available, |cap| available.min(cap.left));
            let more = growth(MicroCredits(held), more, room);
            hold::place(conn, owner.user, id, facts.hold_no + 1, more, rate, at).await?;
        }
        crate::crash_point("call.after_hold");
        let api_key = match facts.key_row {
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
    /// For its dearest call, or the one that stopped the attempt before it.
    least: i64,
    /// The attempt before it was stopped in its middle.
    stopped: bool,
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
    for (provider, model, (input_max, output_max)) in planned.offered() {
        let bound =
            price::bound(conn, Rows::OwnOrAny, provider, model, planned.input_tokens, planned.output_tokens).await?;
        // Who is dearer than its ceiling is not asked.
        let bound = bound.filter(|(price, _)| !price.exceeds(input_max, output_max));
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
                let failure = end.failure.as_deref();
                let needed = match end.outcome {
                    Outcome::Blocked => self.needs.of_end(end.attempt.attempt_id.0, failure),
                    _ => None,
                };
                let ended = hold::Ended { state, failure, again: end.again, needed };
                hold::settle(conn, end.attempt.attempt_id.0, ended).await.map_err(hook_error)?;
                if let Some(owner) = owner(&end.attempt) {
                    self.returned.add(owner.user);
                }
            }
            crate::crash_point("bill.after_settled");
            let mut refusals = Vec::new();
            for transition in transitions {
                let mut wanted = Vec::with_capacity(transition.started.len());
                for start in &transition.started {
                    wanted.push(self.wanted(conn, start).await.map_err(hook_error)?);
                }
                for (n, start) in transition.started.iter().enumerate() {
                    let others = wanted[n + 1..].iter().fold(0_i64, |sum, one| sum.saturating_add(one.least));
                    if let Some((reason, message)) =
                        self.start(conn, start, &wanted[n], MicroCredits(others)).await.map_err(hook_error)?
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
                let ended = hold::Ended { state: "lost", ..hold::Ended::default() };
                hold::settle(conn, attempt, ended).await.map_err(hook_error)?;
                self.returned.add(user);
            }
            Ok(())
        })
    }

    fn at_once(&self, attempt: &AttemptRef, reading: &Reading<'_>) -> Option<AtOnce> {
        let Owner { user, project } = owner(attempt)?;
        let whose = Whose { attempt: attempt.attempt_id.0, key: reading.key, user, project };
        match reading.phase {
            Phase::Open => self.once.announced(whose, &CallOpened::deserialize(reading.body).ok()?),
            Phase::Close => self.once.ended(whose, &CallClosed::deserialize(reading.body).ok()?),
            Phase::Note => None,
        }
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
                    let call = CallOpened::deserialize(reading.body).map_err(broken)?;
                    self.open(conn, attempt, reading.key, &call).await.map_err(hook_error)
                }
                Phase::Note => {
                    let call = CallNoted::deserialize(reading.body).map_err(broken)?;
                    call::note(conn, attempt.attempt_id.0, reading.key, &call).await?;
                    Ok(Verdict::Accepted)
                }
                Phase::Close => {
                    let closed = CallClosed::deserialize(reading.body).map_err(broken)?;
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
