//! What workers do for schedules: look which are due, start their runs. Any worker may; the row's lock says who does.
//!
//! ```text
//! keep ──every half second──▶ fire_due ──▶ turn: ONE TRANSACTION ──▶ terminate what was to be terminated
//!                                          lock · instants → actions · judge · start runs · next instant
//! ```
//!
//! If we die before the commit, nothing happened and another worker does it all. If we die after it, the runs are there and
//! the next instant is set. A termination is done after the commit, because it settles through the hook in transactions of its
//! own; the action that asked for it still waits, and whoever looks next asks again.

use crate::{
    Error, Result,
    admission::Admission,
    client::{Client, Start},
    committer::crash_point,
    definition::inputs::prepare,
    ids::{DefinitionHash, RunId},
    schedule::{
        Action, ActionKind, ActionState, Overlap, Spec, Timing,
        overlap::{Judgement, WAITING_MAX, judge},
        run_id,
        timing::Standing,
    },
    store::{
        definitions::Pinned,
        inbox::{Kind, Outgoing},
        is_transient,
        schedules::{self as store, NewAction, Stored},
    },
    transaction::{ANSWER_MAX, answered, in_transaction},
};
use chrono::{DateTime, Duration, Utc};
use serde_json::{Value, json};
use sqlx::PgConnection;
use std::{
    sync::{Arc, Mutex},
    time::Duration as StdDuration,
};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// How often a worker looks. A run of a schedule starts that much late at most, on average half of it.
const LOOK_EVERY: StdDuration = StdDuration::from_millis(500);
/// When a schedule is looked at again whose actions wait for an open run.
const WAIT: Duration = Duration::seconds(2);
/// Instants of one transaction, and runs that it starts: it holds locks.
const BATCH: usize = 50;
/// Actions that are judged in one transaction.
const JUDGED_MAX: i64 = 200;
/// Open runs that a schedule looks at.
const OPEN_MAX: i64 = 1_000;
/// Decided actions that are kept for people to see.
pub(crate) const KEPT: i64 = 100;
/// Schedules of one look; the rest waits for the next.
const TURNS_MAX: usize = 1_000;
/// How long a schedule rests that cannot be dealt with because of a fault of ours, in seconds.
const REST: f64 = 30.0;
/// The same because of a fault of the server's, which may pass.
const REST_SHORT: f64 = 3.0;

/// Looks for due schedules until the worker drains.
pub(crate) async fn keep(client: Client, draining: CancellationToken) {
    loop {
        tokio::select! {
            () = draining.cancelled() => return,
            () = tokio::time::sleep(LOOK_EVERY.mul_f64(0.75 + fastrand::f64() / 2.0)) => {}
        }
        if let Err(error) = fire_due(&client).await {
            tracing::warn!(%error, "cannot look after the schedules");
        }
    }
}

/// Does what is due now. Returns how many runs were started.
pub(crate) async fn fire_due(client: &Client) -> Result<usize> {
    let mut started = 0;
    for _ in 0..TURNS_MAX {
        // Which one it was, also when it fails.
        let locked: Arc<Mutex<Option<Uuid>>> = Arc::default();
        let turned = in_transaction(client.pool(), |conn| {
            let (client, locked) = (client.clone(), locked.clone());
            Box::pin(async move {
                let Some(mut stored) = store::due(conn).await? else { return Ok(None) };
                *locked.lock().expect("no panic while held") = Some(stored.view.id);
                crash_point("schedule.after_lock");
                let turn = turn(conn, &client, &mut stored).await?;
                crash_point("schedule.before_commit");
                Ok(Some(turn))
            })
        });
        let turned = answered(ANSWER_MAX, turned).await;
        let id = locked.lock().expect("no panic while held").take();
        match (turned, id) {
            (Ok(Some(turn)), _) => {
                crash_point("schedule.after_commit");
                started += turn.started.len();
                metrics::counter!("loopwright_schedule_runs_total").increment(turn.started.len() as u64);
                for lag in &turn.lags {
                    metrics::histogram!("loopwright_schedule_lag_seconds").record(*lag);
                }
                turn.follow(client).await;
            }
            (Ok(None), _) => break,
            // It must not be in the way of the others, whatever it is.
            (Err(error), Some(id)) => {
                let passes = matches!(&error, Error::InDoubt(_)) || matches!(&error, Error::Sql(e) if is_transient(e));
                tracing::error!(schedule_id = %id, %error, "a schedule cannot be dealt with; it rests for a while");
                let deferred = store::defer(client.pool(), id, if passes { REST_SHORT } else { REST });
                answered(ANSWER_MAX, deferred).await?;
            }
            (Err(error), _) => return Err(error),
        }
    }
    crash_point("schedule.before_wake");
    if started > 0 {
        client.wake().await;
    }
    Ok(started)
}

/// What one transaction came to.
#[derive(Debug, Default)]
pub(crate) struct Turn {
    schedule: Uuid,
    name: String,
    pub(crate) started: Vec<RunId>,
    /// How late runs by the calendar were started, in seconds after their instant and its jitter.
    lags: Vec<f64>,
    terminate: Vec<RunId>,
}

impl Turn {
    /// What follows the commit. Whatever fails here is asked for again by the next look: the action still waits.
    pub(crate) async fn follow(self, client: &Client) {
        let mut ended = !self.terminate.is_empty();
        for run in &self.terminate {
            match client.terminate(*run, &reason(&self.name)).await {
                Ok(()) | Err(Error::RunClosed(_) | Error::RunNotFound(_)) => {}
                Err(error) => {
                    tracing::warn!(run_id = %run, %error, "could not be terminated for its schedule yet");
                    ended = false;
                }
            }
        }
        crash_point("schedule.after_terminate");
        // Not after a failure: a run that can never be terminated would be tried without a pause.
        let poked = answered(ANSWER_MAX, store::poke(client.pool(), self.schedule));
        if ended && let Err(error) = poked.await {
            tracing::warn!(schedule_id = %self.schedule, %error, "the next run of a schedule is two seconds late");
        }
    }
}

fn reason(name: &str) -> String {
    format!("schedule `{name}` starts the next run")
}

/// Deals with everything about one schedule, whose row the caller has locked, and saves it.
pub(crate) async fn turn(conn: &mut PgConnection, client: &Client, stored: &mut Stored) -> Result<Turn> {
    let timing = Timing::new(&stored.view.spec.when).map_err(|e| Error::ScheduleInvalid(vec![e]))?;
    let mut turn = Turn { schedule: stored.view.id, name: stored.view.name.clone(), ..Turn::default() };
    let more = advance(conn, &timing, stored).await?;
    crash_point("schedule.after_advance");
    // Of actions that replace each other only the newest is done: they are decided when all have come.
    let waits = if more && stored.view.spec.overlap.replaces() {
        Waits::More
    } else {
        decide(conn, client, &timing, stored, &mut turn).await?
    };
    crash_point("schedule.after_decide");
    if stored.view.runs_left == Some(0) {
        stored.view.next_at = None;
    }
    let due = stored.view.next_at.map(|at| timing.due(stored.view.id, at, stored.view.spec.jitter_ms));
    let again = match waits {
        Waits::More => Some(stored.now),
        _ if more => Some(stored.now),
        Waits::Some => Some(stored.now + WAIT),
        Waits::None => None,
    };
    stored.wake_at = due.into_iter().chain(again).min();
    store::prune(conn, stored.view.id, stored.action_n - KEPT).await?;
    crash_point("schedule.after_prune");
    store::save(conn, stored, false).await?;
    Ok(turn)
}

/// Turns the instants that have come into actions and moves `next_at` on. True if there are more.
async fn advance(conn: &mut PgConnection, timing: &Timing, stored: &mut Stored) -> Result<bool> {
    let (mut actions, mut room) = (Vec::new(), None);
    while let Some(at) = stored.view.next_at {
        if stored.view.runs_left == Some(0) {
            break;
        }
        if actions.len() >= BATCH {
            keep_newest(conn, stored, actions).await?;
            return Ok(true);
        }
        let spec = &stored.view.spec;
        let standing = timing.standing(stored.view.id, at, stored.now, spec.jitter_ms, spec.catchup_ms);
        let (state, note) = match standing {
            Standing::Ahead(_) => break,
            Standing::Missed { next } => {
                let until = next.map_or_else(|| "the end".into(), rfc3339);
                stored.view.missed += 1;
                stored.view.next_at = next;
                (ActionState::Missed, Some(format!("too late; so is everything before {until}")))
            }
            Standing::Due => {
                let left = match room {
                    Some(left) => left,
                    None if spec.overlap.replaces() => i64::MAX,
                    None => WAITING_MAX - store::waiting(conn, stored.view.id).await?,
                };
                room = Some(left - 1);
                stored.view.next_at = timing.next_after(at);
                if left > 0 {
                    (ActionState::Pending, None)
                } else {
                    stored.view.skipped += 1;
                    (ActionState::Skipped, Some(format!("{WAITING_MAX} others waited already")))
                }
            }
        };
        stored.action_n += 1;
        let kind = ActionKind::Scheduled;
        actions.push(NewAction { n: stored.action_n, instant: at, kind, overlap: None, state, note });
    }
    keep_newest(conn, stored, actions).await?;
    Ok(false)
}

/// Stores new actions of the calendar. Of those that replace each other, here and among what waits, only the newest stays.
async fn keep_newest(conn: &mut PgConnection, stored: &mut Stored, mut actions: Vec<NewAction>) -> Result<()> {
    const WHY: &str = "a newer one took its place";
    let id = stored.view.id;
    let is_pending = |action: &NewAction| action.state == ActionState::Pending;
    if stored.view.spec.overlap.replaces()
        && let Some(newest) = actions.iter().rposition(is_pending)
    {
        stored.view.skipped += store::skip_waiting(conn, id, WHY).await?;
        for action in actions[..newest].iter_mut().filter(|a| is_pending(a)) {
            stored.view.skipped += 1;
            (action.state, action.note) = (ActionState::Skipped, Some(WHY.into()));
        }
    }
    crash_point("schedule.after_skip");
    store::add(conn, id, &actions).await?;
    Ok(())
}

/// What is left of the actions.
enum Waits {
    None,
    /// For open runs.
    Some,
    /// For the next transaction.
    More,
}

/// Decides the actions that can be decided.
async fn decide(
    conn: &mut PgConnection,
    client: &Client,
    timing: &Timing,
    stored: &mut Stored,
    turn: &mut Turn,
) -> Result<Waits> {
    let id = stored.view.id;
    let pending = store::pending(conn, &stored.view, JUDGED_MAX).await?;
    if pending.is_empty() {
        return Ok(Waits::None);
    }
    let all = i64::try_from(pending.len()).is_ok_and(|n| n < JUDGED_MAX);
    let mut open = store::open_runs(conn, id, OPEN_MAX).await?;
    let mut waiting = 0;
    // Also of those that are not among the ones that were read.
    let newest = store::newest_replacing(conn, &stored.view).await?;
    // A deployment in the middle of a turn is in force from the next one on.
    let mut known = None;
    for action in pending {
        if turn.started.len() >= BATCH {
            return Ok(Waits::More);
        }
        if action.kind == ActionKind::Scheduled && stored.view.runs_left == Some(0) {
            skip(conn, stored, action.n, None, "the run limit was reached").await?;
            continue;
        }
        let policy = action.overlap.unwrap_or(stored.view.spec.overlap);
        if policy.replaces() && newest != Some(action.n) {
            skip(conn, stored, action.n, None, "a newer one took its place").await?;
            continue;
        }
        match judge(policy, open.len(), waiting) {
            Judgement::Start => {
                if let Some(run) = start(conn, client, stored, &action, &mut known).await? {
                    open.push(run);
                    turn.started.push(run);
                    crash_point("schedule.after_run");
                    if action.kind == ActionKind::Scheduled {
                        let late = stored.now - timing.due(id, action.instant, stored.view.spec.jitter_ms);
                        turn.lags.push(late.as_seconds_f64().max(0.0));
                    }
                }
            }
            Judgement::Skip(why) => skip(conn, stored, action.n, open.first().copied(), why).await?,
            Judgement::Wait => waiting += 1,
            Judgement::Replace => {
                waiting += 1;
                if policy == Overlap::TerminateOther {
                    turn.terminate.clone_from(&open);
                } else {
                    cancel(conn, stored, &open).await?;
                }
            }
        }
    }
    // With nothing left to wait for, what lies beyond the limit is decided at once.
    Ok(match (waiting, all) {
        (0, true) => Waits::None,
        (0, false) => Waits::More,
        _ => Waits::Some,
    })
}

async fn skip(conn: &mut PgConnection, stored: &mut Stored, n: i64, run: Option<RunId>, why: &str) -> Result<()> {
    stored.view.skipped += 1;
    let note = run.map_or_else(|| why.to_owned(), |run| format!("{why}: {run}"));
    store::settle(conn, stored.view.id, n, ActionState::Skipped, None, Some(&note)).await
}

/// Asks the open runs to stop, each once however often it is called.
async fn cancel(conn: &mut PgConnection, stored: &Stored, open: &[RunId]) -> Result<()> {
    let (payload, id) = (json!(reason(&stored.view.name)), format!("schedule:{}", stored.view.id));
    for run in open {
        let message = Outgoing {
            run: *run,
            kind: Kind::Cancel,
            name: "",
            payload: &payload,
            dedupe_id: Some(&id),
            sender: None,
            definition: None,
            unread_max: None,
        };
        // Whether it was sent before or the run has closed: the next look finds out.
        crate::store::inbox::send(conn, &message).await?;
        crash_point("schedule.after_cancel");
    }
    Ok(())
}

/// Starts the run of an action. `known`: the definition of this turn. `None` if it came to nothing, which its note says.
async fn start(
    conn: &mut PgConnection,
    client: &Client,
    stored: &mut Stored,
    action: &Action,
    known: &mut Option<(DefinitionHash, Pinned)>,
) -> Result<Option<RunId>> {
    let (id, spec) = (stored.view.id, &stored.view.spec);
    let run = run_id(id, action.instant, (action.kind == ActionKind::Manual).then_some(action.n));
    let mut attributes = spec.attributes.clone();
    if let Value::Object(fields) = &mut attributes {
        fields.insert("schedule".into(), json!(stored.view.name));
        fields.insert("scheduled_at".into(), json!(rfc3339(action.instant)));
    }
    let wanted = async {
        let (definition, pinned) = match &mut *known {
            Some(known) => known,
            None => {
                let hash = crate::store::definitions::pointer(&mut *conn, &spec.workflow, &spec.pointer).await?;
                known.insert((hash, crate::store::definitions::load(&mut *conn, hash).await?))
            }
        };
        let start = Start {
            run_id: Some(run),
            definition: *definition,
            inputs: spec.inputs.clone(),
            workflow_id: spec.workflow_id.clone(),
            attributes,
            queue: spec.queue.clone(),
            topic: spec.topic.clone(),
            admission: Admission::default(),
        };
        client.start_pinned(&mut *conn, start, &pinned.definition).await
    };
    crash_point("schedule.before_start");
    match wanted.await {
        Ok(started) if started.created => {
            crash_point("schedule.after_start");
            stored.view.started += 1;
            if action.kind == ActionKind::Scheduled {
                stored.view.runs_left = stored.view.runs_left.map(|left| left.saturating_sub(1));
            }
            store::settle(conn, id, action.n, ActionState::Started, Some(run), None).await?;
            Ok(Some(run))
        }
        Ok(started) => {
            let why = if started.run_id == run {
                "this instant has its run already"
            } else {
                "an open run has its business key"
            };
            skip(conn, stored, action.n, Some(started.run_id), why).await?;
            Ok(None)
        }
        // The transaction is at fault, or this worker, which is too old for it or lacks a key: not the action.
        Err(error @ (Error::Sql(_) | Error::NewerRelease(_) | Error::PayloadKeyMissing(_))) => Err(error),
        Err(error) => {
            tracing::warn!(schedule = %stored.view.name, %error, "a schedule could not start its run");
            stored.view.failed += 1;
            let note = format!("{}: {error}", error.code());
            store::settle(conn, id, action.n, ActionState::Failed, None, Some(&note)).await?;
            Ok(None)
        }
    }
}

/// Whether a run could be started now.
///
/// # Errors
/// `definition_not_found`, `input_invalid`.
pub(crate) async fn startable(conn: &mut PgConnection, spec: &Spec) -> Result<()> {
    let hash = crate::store::definitions::pointer(&mut *conn, &spec.workflow, &spec.pointer).await?;
    let pinned = crate::store::definitions::load(conn, hash).await?;
    prepare(&pinned.definition, &spec.inputs).map_err(Error::InputInvalid)?;
    Ok(())
}

fn rfc3339(at: DateTime<Utc>) -> String {
    at.to_rfc3339_opts(chrono::SecondsFormat::AutoSi, true)
}
