//! Drives one owned run: waits for an input, decides, commits, acts. Ends when the run closes, parks or is lost.

mod item;

use super::{
    Counted, Driven, Shared,
    context::Backend,
    executor::{self, Attempt},
    outside::Outside,
    overdue,
    slots::Permit,
};
use crate::{
    Error, Result,
    activity::{AttemptInfo, Context},
    committer::Broken,
    definition::{Kind, Step},
    failure::Failure,
    ids::{DefinitionHash, RunId},
    machine::{self, Command, Current, Decision, Input, Live, Moment, Phase, Refusals, RunState},
    store::{
        self,
        definitions::Pinned,
        runs::Loaded,
        transitions::{Item, Verdict, size},
    },
    view::RunStatus,
};
use chrono::{DateTime, Utc};
use futures_util::future::join_all;
use serde_json::Value;
use sha2::{Digest, Sha256};
use sqlx::PgConnection;
use std::{
    cell::Cell,
    collections::{BTreeMap, HashMap},
    fmt::Write,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};
use tokio::sync::{Notify, mpsc};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// Bytes of results that one transition takes up: a history row stays below a few hundred kilobytes, or is one result.
const ENDED_BYTES: usize = 256 << 10;
/// Results of one transition. Each is two or three events.
const ENDED_MAX: usize = 256;
/// When a run that waits for an activity which no worker here offers is looked at again.
const UNOFFERED_RETRY: chrono::Duration = chrono::Duration::seconds(30);
/// Attempts that one decision may start.
const STARTS_MAX: usize = 64;
/// First and longest pause while Postgres cannot be reached.
const UNREACHABLE_PAUSE_MIN: Duration = Duration::from_millis(50);
const UNREACHABLE_PAUSE_MAX: Duration = Duration::from_secs(5);
/// When a run that a newer release has written is looked at again.
const NEWER_PAUSE: Duration = Duration::from_secs(5);
/// So much later here than elsewhere. Chosen: four polls, so that whoever can read it has it before it is taken here in vain again.
const NEWER_HEAD_START: Duration = Duration::from_secs(1);
/// When a run that was given back is looked at again; also the pause between two tries to give it back.
const GIVE_BACK_PAUSE: Duration = Duration::from_secs(1);

/// A run that was claimed and is to be driven.
pub(super) struct Claim {
    pub(super) driven: Driven,
    pub(super) epoch: i64,
    pub(super) settling: Counted,
}

/// Loads the runs of one claim together and drives each in a task of its own. Where runs are spread, those of one shard are loaded
/// together: the others do not wait for a shard that gives no answer.
pub(super) async fn drive_all(shared: Arc<Shared>, claims: Vec<Claim>, tasks: TaskTracker) {
    let parts = shared.spread.divide(claims, |claim| claim.driven.run.shard());
    join_all(parts.into_iter().map(|(shard, claims)| drive_part(&shared, shard, claims, &tasks))).await;
}

async fn drive_part(shared: &Arc<Shared>, shard: Option<i16>, claims: Vec<Claim>, tasks: &TaskTracker) {
    let runs: Vec<RunId> = claims.iter().map(|claim| claim.driven.run).collect();
    let loaded = shared.read(async |conn| store::runs::load_all(conn, shard, &runs).await);
    // Whatever is wrong concerns perhaps one of them: each is loaded alone then.
    let mut loaded = loaded.await.unwrap_or_else(|error| {
        tracing::warn!(runs = runs.len(), %error, "runs cannot be loaded together");
        HashMap::new()
    });
    crate::committer::crash_point("load.after_all");
    for Claim { driven, epoch, settling } in claims {
        let loaded = loaded.remove(&driven.run);
        tasks.spawn(async move { drive(&driven, epoch, loaded, settling).await });
    }
}

/// Drives a run claimed with `epoch` to its end, to its next park or to the loss of its lease.
async fn drive(driven: &Driven, epoch: i64, loaded: Option<Result<Loaded>>, settling: Counted) {
    let (shared, run) = (&driven.shared, driven.run);
    let outcome = match Driver::load(shared.clone(), run, epoch, loaded, driven.messages.clone()).await {
        Ok(Some(driver)) => {
            crate::committer::crash_point("drive.before_run");
            driver.run(settling).await
        }
        Ok(None) => Ok(()),
        Err(error) => Err(error),
    };
    crate::committer::crash_point("drive.after_run");
    match outcome {
        Ok(()) => {}
        Err(Error::LeaseLost) => tracing::info!(run_id = %run, "run is owned by another worker now"),
        Err(Error::Sql(error)) if store::is_transient(&error) => {
            // Nothing was decided.
            tracing::warn!(run_id = %run, %error, "run cannot be driven; giving it back");
            give_back(shared, run, epoch, GIVE_BACK_PAUSE).await;
        }
        Err(error) if is_left(&error) => {
            // While workers are brought up one after the other: those that are up, or have the key or the rights, will come to it.
            if matches!(error, Error::Sql(_)) {
                tracing::error!(run_id = %run, %error, "Postgres refuses what this worker asks; the run is left for others and for later");
            } else {
                tracing::warn!(run_id = %run, %error, "run is left to other workers");
            }
            metrics::counter!("loopwright_runs_left_total").increment(1);
            shared.leave_to_others(run, Instant::now() + NEWER_PAUSE + NEWER_HEAD_START);
            give_back(shared, run, epoch, NEWER_PAUSE).await;
        }
        Err(error) => {
            let why = error.to_string();
            crate::committer::crash_point("quarantine.before_run");
            let set_aside = shared.ask(async |conn| store::runs::quarantine(conn, run, epoch, &why).await);
            if let Err(error) = set_aside.await {
                // Whoever claims it next comes to the same end, and tries again.
                tracing::error!(run_id = %run, %error, "run cannot be quarantined; giving it back");
                give_back(shared, run, epoch, GIVE_BACK_PAUSE).await;
            }
        }
    }
}

/// Whether an error is this worker's and not the run's: it is too old, lacks a key, or Postgres does not let it do what it asks.
fn is_left(error: &Error) -> bool {
    match error {
        Error::NewerRelease(_) | Error::PayloadKeyMissing(_) => true,
        Error::Sql(error) => store::fault(error) == store::Fault::Setup,
        _ => false,
    }
}

/// Frees the run for others, however long Postgres is away. Returns when it is not ours any more.
async fn give_back(shared: &Shared, run: RunId, epoch: i64, pause: Duration) {
    while !shared.fenced.is_cancelled() {
        match shared.ask(async |conn| store::runs::give_back(conn, run, shared.id, epoch, pause).await).await {
            // True: it is free. False: an earlier sending had freed it, or somebody took it.
            Ok(_) => return,
            Err(error) => tracing::warn!(run_id = %run, %error, "run cannot be given back yet"),
        }
        tokio::select! {
            () = shared.fenced.cancelled() => return,
            () = tokio::time::sleep(GIVE_BACK_PAUSE) => {}
        }
    }
}

struct Running {
    attempt: u32,
    token: CancellationToken,
    outside: Arc<Outside>,
}

struct Finished {
    path: String,
    attempt: u32,
    result: std::result::Result<Value, Failure>,
}

struct Driver {
    shared: Arc<Shared>,
    run: Loaded,
    pinned: Arc<Pinned>,
    calls: BTreeMap<String, DefinitionHash>,
    /// Under what it goes on, if it continues as new under what is current.
    current: Option<Current>,
    attributes: Arc<Value>,
    messages: Arc<Notify>,
    running: HashMap<String, Running>,
    finished: mpsc::UnboundedReceiver<Finished>,
    finish: mpsc::UnboundedSender<Finished>,
    /// Most attempts that the definition can start at one instant.
    width: usize,
    draining: bool,
    /// Calls under way are not heard out any more.
    hurried: bool,
}

impl Drop for Driver {
    fn drop(&mut self) {
        // Whatever still runs belongs to nobody any more.
        self.running.values().for_each(|r| r.token.cancel());
    }
}

/// Whether the driver goes on.
enum Next {
    Goes,
    Ends,
}

impl Driver {
    /// `loaded`: what is known of the run since it was claimed.
    async fn load(
        shared: Arc<Shared>,
        run: RunId,
        epoch: i64,
        loaded: Option<Result<Loaded>>,
        messages: Arc<Notify>,
    ) -> Result<Option<Self>> {
        let loaded = match loaded {
            Some(loaded) => loaded?,
            None => shared.ask(async |conn| store::runs::load(conn, run).await).await?,
        };
        if loaded.owner != Some(shared.id) || loaded.epoch != epoch || loaded.status.is_closed() {
            return Ok(None);
        }
        crate::committer::crash_point("load.after_run");
        let pinned = shared.pinned(loaded.definition).await?;
        crate::committer::crash_point("load.after_definition");
        let calls = if pinned.calls {
            shared.ask(async |conn| store::definitions::resolve_calls(conn, &pinned.definition).await).await?
        } else {
            BTreeMap::new()
        };
        crate::committer::crash_point("load.after_resolved");
        let current = if pinned.follows { current(&shared, &pinned, loaded.definition).await? } else { None };
        crate::committer::crash_point("load.after_calls");
        let (finish, finished) = mpsc::unbounded_channel();
        Ok(Some(Self {
            attributes: Arc::new(loaded.attributes.clone()),
            run: loaded,
            shared,
            width: width(&pinned.definition.steps).max(width(&pinned.definition.finally)).clamp(1, STARTS_MAX),
            pinned,
            calls,
            current,
            messages,
            running: HashMap::new(),
            finished,
            finish,
            draining: false,
            hurried: false,
        }))
    }

    async fn run(mut self, settling: Counted) -> Result<()> {
        let first = if self.run.status == RunStatus::Pending {
            Input::Started { inputs: self.run.inputs.clone(), until: self.run.chain_deadline }
        } else {
            Input::TakenOver
        };
        // What waits in the inbox belongs to the first decision: a run that was paused meanwhile starts nothing.
        let first = if self.run.inbox_n > self.run.inbox_seen {
            let mut unread = self.unread(self.run.inbox_n).await?;
            crate::committer::crash_point("messages.after_unread");
            if self.run.inbox_seen < self.run.inbox_n {
                // What did not fit is read in the next transition; an order behind it is heard now, and again in its turn.
                let (run, seen, sent) = (self.run.run_id, self.run.inbox_seen, self.run.inbox_n);
                let orders = self.shared.read(async |conn| store::inbox::orders(conn, run, seen, sent).await);
                unread.extend(orders.await?);
            }
            Input::Several(vec![first, Input::Messages(unread)])
        } else {
            first
        };
        crate::committer::crash_point("step.before_first");
        let mut next = self.step(first).await?;
        drop(settling);
        crate::committer::crash_point("step.after_first");
        while matches!(next, Next::Goes) {
            next = self.wait().await?;
        }
        Ok(())
    }

    /// Waits for the next input and handles it.
    async fn wait(&mut self) -> Result<Next> {
        let due = self.shared.clock.until(machine::next_due(&self.pinned.definition, &self.run.state));
        let wants_room = !self.draining && self.waits_for_room();
        let (shared, draining, hurried) = (self.shared.clone(), self.draining, self.hurried);
        let _waiting = wants_room.then(|| Counted::up(&shared, |s| &s.waiting));
        tokio::select! {
            biased;
            () = shared.fenced.cancelled() => Err(Error::LeaseLost),
            Some(done) = self.finished.recv() => self.ended(done).await,
            () = shared.draining.cancelled(), if !draining => {
                self.draining = true;
                self.running.values().for_each(|r| r.outside.leave());
                self.step(Input::Tick).await
            }
            () = shared.hurry.cancelled(), if draining && !hurried => {
                self.hurried = true;
                self.running.values().for_each(|r| r.token.cancel());
                Ok(Next::Goes)
            }
            () = self.messages.notified() => self.read_messages().await,
            // The permit stays in hand: given back, it would go to the next run in the queue, and from there to the next.
            permit = shared.slots.clone().acquire(self.run.priority, self.run.lane), if wants_room => self.step_in(Input::Tick, vec![permit]).await,
            () = tokio::time::sleep(due) => self.step(Input::Tick).await,
        }
    }

    /// Takes what has ended meanwhile into the same transition, up to a failure: the draw of a decision is one retry's.
    async fn ended(&mut self, done: Finished) -> Result<Next> {
        let (mut inputs, mut bytes, mut done) = (Vec::new(), 0, Some(done));
        while let Some(Finished { path, attempt, result }) = done.take() {
            if self.running.get(&path).is_some_and(|r| r.attempt == attempt) {
                self.running.remove(&path);
            }
            bytes += result.as_ref().map_or(ENDED_BYTES, size);
            inputs.push(Input::AttemptEnded { path, attempt, result });
            if bytes < ENDED_BYTES && inputs.len() < ENDED_MAX {
                done = self.finished.try_recv().ok();
            }
        }
        let input = if inputs.len() == 1 { inputs.remove(0) } else { Input::Several(inputs) };
        self.step(input).await
    }

    async fn read_messages(&mut self) -> Result<Next> {
        let mut pause = UNREACHABLE_PAUSE_MIN;
        // What runs here is not given up because Postgres is away: it may have bought something.
        let read = loop {
            match self.sent().await {
                Ok(read) => break read,
                Err(error) => self.away(error, &mut pause).await?,
            }
        };
        crate::committer::crash_point("messages.before_step");
        self.step(read.map_or(Input::Tick, Input::Messages)).await
    }

    /// What was sent and is not read. `None`: nothing.
    async fn sent(&mut self) -> Result<Option<Vec<machine::Inbound>>> {
        let (run, epoch) = (self.run.run_id, self.run.epoch);
        let up_to = self.shared.read(async |conn| store::inbox::sent(conn, run, epoch).await).await?;
        crate::committer::crash_point("messages.after_sent");
        // Somebody ended it or took it: what runs here is told at once, and not when it next wants to write.
        let up_to = up_to.ok_or(Error::LeaseLost)?;
        if up_to == self.run.inbox_seen {
            return Ok(None);
        }
        let unread = self.unread(up_to).await?;
        crate::committer::crash_point("messages.after_read");
        Ok(Some(unread))
    }

    /// The next messages, as many as fit into one transition, which says that they are read. The commit tells of the rest.
    async fn unread(&mut self, up_to: i64) -> Result<Vec<machine::Inbound>> {
        let (run, seen) = (self.run.run_id, self.run.inbox_seen);
        let (messages, seen) = self.shared.read(async |conn| store::inbox::read(conn, run, seen, up_to).await).await?;
        self.run.inbox_seen = seen;
        Ok(messages)
    }

    async fn step(&mut self, input: Input) -> Result<Next> {
        self.step_in(input, Vec::new()).await
    }

    /// Decides, commits, acts. `in_hand` is room for attempts that is in hand already; what is not used is given back.
    async fn step_in(&mut self, mut input: Input, mut in_hand: Vec<Permit>) -> Result<Next> {
        let mut refused = Refusals::default();
        loop {
            let mut permits = std::mem::take(&mut in_hand);
            while !self.draining && permits.len() < self.width {
                let Some(permit) = self.shared.slots.try_acquire(self.run.lane) else { break };
                permits.push(permit);
            }
            let inbox_moved = input.reads_inbox();
            let decision = self.decide(input.clone(), refused.permits(permits.len()), &refused)?;
            if decision.events.is_empty() && !inbox_moved {
                return self.nothing_happened().await;
            }
            let (item, large) = self.item(&decision).await?;
            crate::committer::crash_point("step.after_item");
            let mut item = Arc::new(item);
            self.put(&large).await?;
            crate::committer::crash_point("step.before_commit");
            match self.commit(&mut item).await? {
                Committed::Accepted { inbox_n } => {
                    crate::committer::crash_point("step.after_commit");
                    self.run.seq += 1;
                    self.run.tail_events += decision.events.len();
                    if item.cursor.is_some() {
                        (self.run.cursor_seq, self.run.tail_events) = (self.run.seq, 0);
                    }
                    if inbox_n > self.run.inbox_seen {
                        self.messages.notify_one();
                    }
                    self.act(decision.commands, permits);
                    if !item.effects.children.is_empty()
                        || !item.effects.cancelled_children.is_empty()
                        || !item.effects.terminated_children.is_empty()
                        || item.effects.successor.is_some()
                        || item.effects.parent.is_some()
                    {
                        self.shared.wake.notify_one();
                    }
                    if item.is_closed() && self.pinned.definition.concurrency.is_some() {
                        self.shared.freed.notify_one();
                    }
                    if item.parked || item.is_closed() {
                        return Ok(Next::Ends);
                    }
                    if !decision.more {
                        return Ok(Next::Goes);
                    }
                    (input, refused) = (Input::Tick, Refusals::default());
                }
                Committed::Refused { reason, message } => {
                    // The same input again, on the state as it was, with the hook's answer known.
                    tracing::info!(run_id = %self.run.run_id, reason, "starts refused");
                    if !refused.note(&decision.commands, &reason, &message) {
                        return Err(Error::Invariant(format!(
                            "the hook refused a transition without starts: {message}"
                        )));
                    }
                    crate::committer::crash_point("step.after_refusal");
                    self.run.state = self.as_it_was().await?;
                }
            }
        }
    }

    /// The state before a decision that was refused.
    async fn as_it_was(&self) -> Result<RunState> {
        let mut pause = UNREACHABLE_PAUSE_MIN;
        let fresh = loop {
            match self.shared.ask(async |conn| store::runs::load(conn, self.run.run_id).await).await {
                Ok(fresh) => break fresh,
                Err(error) => self.away(error, &mut pause).await?,
            }
        };
        // A row more: an earlier sending, of another decision, has arrived late. Whoever claims the run goes on from there.
        let ours = fresh.owner == Some(self.shared.id) && fresh.epoch == self.run.epoch && fresh.seq == self.run.seq;
        if ours { Ok(fresh.state) } else { Err(Error::LeaseLost) }
    }

    fn decide(&mut self, input: Input, permits: usize, refused: &Refusals) -> Result<Decision> {
        let moment = Moment {
            now: self.shared.clock.now(),
            draw: fastrand::u64(..),
            permits: Cell::new(u32::try_from(permits).unwrap_or(u32::MAX)),
            refused,
            catalog: &self.shared.catalog,
            calls: &self.calls,
            current: self.current.as_ref(),
            depth: u32::try_from(self.run.depth).unwrap_or(u32::MAX),
            bounds_calls: true,
            workflow: &self.pinned.definition.name,
        };
        machine::decide(&self.pinned.definition, &mut self.run.state, input, &moment)
            .map_err(|illegal| Error::Invariant(illegal.to_string()))
    }

    /// No event: the run is given up if nothing keeps it here.
    async fn nothing_happened(&mut self) -> Result<Next> {
        let Some(due) = self.park_until() else { return Ok(Next::Goes) };
        let reason = self.waiting();
        let (run, epoch) = (self.run.run_id, self.run.epoch);
        crate::committer::crash_point("park.before_release");
        let (seen, reason) = (self.run.inbox_seen, reason.as_deref());
        let released = async |conn: &mut PgConnection| store::runs::release(conn, run, epoch, seen, due, reason).await;
        let released = self.shared.ask(released).await?;
        crate::committer::crash_point("park.after_release");
        if released {
            return Ok(Next::Ends);
        }
        // A message came in, or the run was taken.
        let fresh = self.shared.ask(async |conn| store::runs::load(conn, run).await).await?;
        if fresh.owner != Some(self.shared.id) || fresh.epoch != epoch {
            return Err(Error::LeaseLost);
        }
        self.messages.notify_one();
        Ok(Next::Goes)
    }

    /// When the run may leave memory: until when. `None` while something here moves it.
    fn park_until(&self) -> Option<DateTime<Utc>> {
        let now = self.shared.clock.now();
        let (mut live, mut queued, mut unoffered) = (false, false, false);
        each_activity(&self.run.state, &mut |activity, phase| match phase {
            Phase::Running { .. } => live = true,
            Phase::Queued if self.shared.catalog.get(activity).is_none() => unoffered = true,
            Phase::Queued => queued = true,
            Phase::Backoff { .. } | Phase::Blocked { .. } => {}
        });
        let paused = self.run.state.status == RunStatus::Paused;
        if live || (queued && !self.draining && !paused) {
            return None;
        }
        if queued && !paused {
            return Some(now);
        }
        let due = machine::next_due(&self.pinned.definition, &self.run.state);
        Some(if unoffered && !paused { due.min(now + UNOFFERED_RETRY) } else { due })
    }

    fn waits_for_room(&self) -> bool {
        if self.run.state.status == RunStatus::Paused {
            return false;
        }
        let mut found = false;
        each_activity(&self.run.state, &mut |activity, phase| {
            found |= *phase == Phase::Queued && self.shared.catalog.get(activity).is_some();
        });
        found
    }

    /// The word for lists.
    fn waiting(&self) -> Option<String> {
        if self.run.state.status == RunStatus::Paused {
            return Some("paused".into());
        }
        machine::waiting_reason(&machine::waiting(&self.pinned.definition, &self.run.state))
    }

    /// Commits, however long Postgres is away: what was decided is decided, and sending it twice is harmless.
    async fn commit(&self, item: &mut Arc<Item>) -> Result<Committed> {
        let mut pause = UNREACHABLE_PAUSE_MIN;
        loop {
            let answer = tokio::select! {
                biased;
                answer = self.shared.committer.commit(item.clone()) => answer,
                // Whatever becomes of it: who takes the run over finds it there or not.
                () = self.shared.fenced.cancelled() => return Err(Error::LeaseLost),
            };
            match answer {
                Ok(Verdict::Accepted { inbox_n }) => return Ok(Committed::Accepted { inbox_n }),
                Ok(Verdict::Unread { .. }) => {
                    let item = Arc::make_mut(item);
                    item.parked = false;
                    item.due = None;
                    item.waiting = None;
                    self.messages.notify_one();
                }
                // An earlier sending had succeeded and its answer was lost; or one of another decision, which was refused since,
                // has arrived late.
                Ok(Verdict::Stale { epoch, seq }) if epoch == item.epoch && seq == item.seq + 1 => {
                    if !self.is_there(item).await? {
                        return Err(Error::LeaseLost);
                    }
                    self.messages.notify_one();
                    return Ok(Committed::Accepted { inbox_n: self.run.inbox_seen });
                }
                Ok(Verdict::Stale { .. }) => return Err(Error::LeaseLost),
                Ok(Verdict::Refused { reason, message }) => return Ok(Committed::Refused { reason, message }),
                Err(Broken::Poison(text)) => return Err(Error::Invariant(text)),
                Err(Broken::Left(error)) => return Err(error),
                Err(Broken::Unreachable(error)) => {
                    tracing::warn!(run_id = %item.run_id, %error, "transition cannot be committed yet");
                    tokio::select! {
                        () = self.shared.fenced.cancelled() => return Err(Error::LeaseLost),
                        () = tokio::time::sleep(pause) => pause = (pause * 2).min(UNREACHABLE_PAUSE_MAX),
                    }
                }
            }
        }
    }

    /// Whether the transition that stands where `item` was to go is `item`. What is equal in its events was decided alike.
    async fn is_there(&self, item: &Item) -> Result<bool> {
        let mut pause = UNREACHABLE_PAUSE_MIN;
        loop {
            let (run, seq) = (item.run_id, item.seq + 1);
            let asked =
                self.shared.ask(async |conn| store::history::is_there(conn, run, seq, item.epoch, &item.events).await);
            match asked.await {
                Ok(same) => return Ok(same),
                Err(error) => self.away(error, &mut pause).await?,
            }
        }
    }

    /// Carries out what a committed decision asks for.
    fn act(&mut self, commands: Vec<Command>, mut permits: Vec<Permit>) {
        for command in commands {
            match command {
                Command::StartAttempt {
                    path,
                    attempt,
                    attempt_id,
                    activity,
                    counted,
                    input,
                    deadline,
                    heartbeat_ms,
                } => {
                    let permit = permits.pop();
                    let (Some(code), Some(checks)) =
                        (self.shared.registry.get(&activity).cloned(), self.shared.registry.checks(&activity).cloned())
                    else {
                        continue;
                    };
                    let (token, over) = (CancellationToken::new(), CancellationToken::new());
                    let outside = Arc::new(Outside::new(token.clone(), self.shared.draining.clone()));
                    let beat = Arc::new(Mutex::new(Instant::now()));
                    let info = AttemptInfo {
                        run_id: self.run.run_id,
                        attempt_id,
                        activity: activity.clone(),
                        path: path.clone(),
                        attempt,
                        counted,
                        idempotency_key: idempotency_key(self.run.run_id, &path),
                        attributes: self.attributes.clone(),
                        started_at: self.shared.clock.now(),
                        run_started_at: self.run.state.started_at,
                        deadline,
                        heartbeat: heartbeat_ms.map(Duration::from_millis),
                        extras: self.pinned.extras.clone(),
                        budget: self.pinned.budget.clone(),
                    };
                    let backend = Backend {
                        shared: self.shared.clone(),
                        attempt: self.attempt_ref(&path, attempt, attempt_id, &activity, deadline),
                        epoch: self.run.epoch,
                        beat: beat.clone(),
                        over: over.clone(),
                        outside: outside.clone(),
                        saved: Arc::default(),
                    };
                    let context = Context {
                        info: Arc::new(info),
                        bundle: self.pinned.bundle.clone(),
                        cancellation: token.clone(),
                        backend: Arc::new(backend),
                    };
                    self.running.insert(path.clone(), Running { attempt, token: token.clone(), outside });
                    let work = Attempt {
                        activity: code,
                        checks,
                        context,
                        input,
                        timeout: self.shared.clock.until(deadline),
                        heartbeat: heartbeat_ms.map(Duration::from_millis),
                        beat,
                    };
                    let finish = self.finish.clone();
                    let fenced = self.shared.fenced.clone();
                    tokio::spawn(async move {
                        let _permit = permit;
                        let result = tokio::select! {
                            result = executor::execute(work) => result,
                            // Nobody begins the next attempt under this epoch.
                            () = fenced.cancelled() => return,
                            // The driver is gone: dropping the work stops it.
                            () = finish.closed() => return,
                        };
                        // Before the driver hears of it, and so before the next attempt.
                        over.cancel();
                        // A driver that went away does not want it: the result is stale.
                        drop(finish.send(Finished { path, attempt, result }));
                    });
                }
                Command::CancelAttempt { path } => {
                    if let Some(running) = self.running.get(&path) {
                        running.token.cancel();
                    }
                }
                Command::EndChild { run_id, spares } => overdue::end(&self.shared, run_id, spares),
                Command::StartChild { .. } | Command::CancelChild { .. } | Command::TerminateChild { .. } => {}
            }
        }
    }
}

/// The version of a run's workflow that is current, if it is another than the run's.
async fn current(shared: &Shared, pinned: &Pinned, own: DefinitionHash) -> Result<Option<Current>> {
    let name = &pinned.definition.name;
    let pointed = shared.ask(async |conn| store::definitions::pointer(conn, name, "current").await);
    let hash = match pointed.await {
        Ok(hash) if hash != own => hash,
        // A definition that came with a file has no pointer.
        Ok(_) | Err(Error::DefinitionNotFound(_)) => return Ok(None),
        Err(error) => return Err(error),
    };
    Ok(Some(Current::Version { hash, inputs: shared.pinned(hash).await?.definition.inputs.clone() }))
}

enum Committed {
    Accepted { inbox_n: i64 },
    Refused { reason: String, message: String },
}

/// How many attempts of these steps may run side by side.
fn width(steps: &[Step]) -> usize {
    let own = |step: &Step| match &step.kind {
        Kind::Group { steps, .. } | Kind::Repeat { steps, .. } => width(steps),
        Kind::Foreach { steps, concurrency, .. } => width(steps).saturating_mul(*concurrency as usize),
        Kind::Parallel { branches, .. } => branches.iter().map(|b| width(&b.steps)).sum(),
        Kind::Switch { cases } => cases.iter().map(|c| width(&c.steps)).max().unwrap_or(1),
        Kind::Activity { .. }
        | Kind::Set { .. }
        | Kind::Wait { .. }
        | Kind::Await(_)
        | Kind::Call { .. }
        | Kind::Fail { .. }
        | Kind::Finish { .. }
        | Kind::ContinueAsNew { .. } => 1,
    };
    steps.iter().map(|s| own(s).max(s.catch.iter().map(|c| width(&c.steps)).max().unwrap_or(1))).max().unwrap_or(1)
}

/// Visits the live activities of a state.
fn each_activity(state: &RunState, visit: &mut dyn FnMut(&str, &Phase)) {
    state.visit_live(&mut |_, node| {
        if let Some(Live::Activity { activity, phase, .. }) = &node.live {
            visit(activity, phase);
        }
    });
}

/// The key that an activity hands to the outside: the same for all attempts of a step.
fn idempotency_key(run: RunId, path: &str) -> String {
    let digest = Sha256::digest(format!("{run}/{path}").as_bytes());
    digest.iter().take(16).fold(String::with_capacity(32), |mut key, byte| {
        // Writing to a text does not fail.
        let _ = write!(key, "{byte:02x}");
        key
    })
}
