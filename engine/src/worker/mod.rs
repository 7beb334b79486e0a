//! A worker: claims runs, drives them, renews its lease, takes over from the dead. Stateless: everything it holds in
//! memory can be dropped at any instruction, another worker goes on from the last committed transition.
//!
//! ```text
//! poll ──claim──▶ drive (one task per owned run) ──▶ committer
//!   ▲                │  ▲                               │
//!   │ wake           ▼  │ result                        ▼
//! listener        executor (one task per attempt)    verdicts
//! lease thread: heartbeat · sweep: dead workers · fire: schedules · admit: concurrency groups · retain: months of history
//! ```

mod admit;
mod context;
mod depth;
mod drive;
mod executor;
pub(crate) mod fire;
mod keys;
mod lease;
mod outside;
mod overdue;
mod pace;
mod retain;
mod slots;
mod strays;
mod terminate;

pub use depth::publish_queue_depths;
pub(crate) use terminate::{terminate, terminate_in};

use crate::{
    Error, Result,
    activity::Registry,
    client::Client,
    clock::{Asked, Clock},
    committer::{Committer, crash_point},
    hook::{NoHook, TransitionHook},
    ids::{DefinitionHash, RunId, WorkerId},
    signature::Catalog,
    store::{
        self,
        checkpoints::Progress,
        definitions::Pinned,
        spread::Spread,
        turns::{Due, Turns},
    },
    transaction::{ANSWER_MAX, Session, Sessions, answered, ask},
};
use drive::Claim;
use keys::Keys;
use pace::Looks;
use slots::Slots;
use sqlx::{PgConnection, PgPool};
use std::{
    collections::{HashMap, HashSet},
    io,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};
use strays::Strays;
use tokio::sync::Notify;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// How often a worker looks for due runs and messages when nothing wakes it.
const POLL: Duration = Duration::from_millis(250);
/// How often progress is written.
const PROGRESS: Duration = Duration::from_millis(400);
/// Longest pause between two looks for dead workers: their runs go on within the lease and about a second.
const SWEEP_MAX: Duration = Duration::from_millis(750);
/// Most runs in memory. A parked run is in nobody's memory.
const RUNS_MAX: usize = 4096;
/// Runs that a worker claims beyond its free slots: many need none (a timer, a signal), and a slot that becomes free should
/// find the next run here. More would wait here while another worker has room.
const CLAIM_SPARE: usize = 16;
/// Sessions of a worker for readings of outside calls, opened when so many are made at once. Chosen: a reading takes a millisecond or two,
/// so four serve more calls than a worker's processors; who finds none takes a connection of the pool.
const CALL_SESSIONS_MAX: usize = 4;
/// Most runs of one claim.
const CLAIM_MAX: usize = 256;
/// Runs that a worker without room claims beyond that: the first of those who have nothing here, so that they are next.
const STRANGERS_MAX: usize = 16;
/// How long such a run has waited already: a worker with room would have taken it.
const STRANGERS_AFTER: Duration = POLL.saturating_mul(2);
/// Definitions kept in memory.
const DEFINITIONS_MAX: usize = 256;
/// Runs freed by one takeover statement.
const TAKE_OVER_BATCH: i64 = 500;

/// Of the time of a drain, what is kept for handing over whatever is still under way. Chosen: a few transactions.
const HAND_OVER_MAX: Duration = Duration::from_secs(2);
/// Longest wait at the end for what still asks Postgres something: its answer changes nothing any more.
const FAREWELL_MAX: Duration = Duration::from_secs(10);

/// How a worker is set up.
#[derive(Clone)]
pub struct WorkerConfig {
    pub pool: PgPool,
    pub registry: Registry,
    pub hook: Arc<dyn TransitionHook>,
    /// Task queues it serves.
    pub queues: Vec<String>,
    /// What it has: of its queues it claims the runs that ask for no other labels.
    pub labels: Vec<String>,
    /// Attempts that run at the same time.
    pub slots: u32,
    /// Retires old runs; `None`: nothing ever leaves the database.
    pub retention: Option<crate::retention::Policy>,
    /// A worker that is silent for that long is dead to the others.
    pub lease: Duration,
}

impl WorkerConfig {
    /// A worker of the queue `default` with 32 slots, a lease of 15 s and no hook.
    #[must_use]
    pub fn new(pool: PgPool, registry: Registry) -> Self {
        Self {
            pool,
            registry,
            hook: Arc::new(NoHook),
            queues: vec!["default".into()],
            labels: Vec::new(),
            slots: 32,
            retention: None,
            lease: Duration::from_secs(15),
        }
    }
}

/// What the tasks of one worker share.
pub(crate) struct Shared {
    id: WorkerId,
    pool: PgPool,
    /// Whether what concerns many runs is said at once.
    spread: Spread,
    /// For what is read when runs are claimed or hear of messages: its plans are made. While somebody has it, the others take a
    /// connection of the pool. Whoever drops a future of it leaves the session as well.
    reader: tokio::sync::Mutex<Session>,
    /// How long Postgres may take to answer.
    answer_max: Duration,
    registry: Registry,
    catalog: Catalog,
    hook: Arc<dyn TransitionHook>,
    committer: Committer,
    /// For readings of outside calls.
    calls: Sessions,
    clock: Arc<Clock>,
    slots: Arc<Slots>,
    /// Whose runs are here.
    turns: Mutex<Turns>,
    /// Claimed runs that have not made their first step: nobody knows yet whether they need a slot.
    settling: AtomicUsize,
    /// Runs that wait for a slot.
    waiting: AtomicUsize,
    /// It has left runs in the queue.
    full: AtomicBool,
    definitions: Mutex<HashMap<DefinitionHash, Arc<Pinned>>>,
    /// Runs that are for others, and how long they are not claimed here, so that those come first.
    left: Mutex<HashMap<RunId, Instant>>,
    /// Owned runs; the notification says that messages came in.
    drivers: Mutex<HashMap<RunId, Arc<Notify>>>,
    progress: Mutex<HashMap<(RunId, String), Progress>>,
    /// What attempts have brought from outside and is being stored, whatever becomes of the attempts.
    storing: TaskTracker,
    /// Look for due runs now.
    wake: Notify,
    /// A place in a group is free.
    freed: Arc<Notify>,
    /// No new claims, no new attempts; running ones are asked to stop, after the calls that they have under way outside.
    draining: CancellationToken,
    /// The same, now.
    hurry: CancellationToken,
    /// The lease is gone: nothing that this worker does counts any more.
    fenced: CancellationToken,
}

/// A running worker.
pub struct WorkerHandle {
    shared: Arc<Shared>,
    tasks: TaskTracker,
    stopped: CancellationToken,
}

/// Starts a worker on the current tokio runtime.
///
/// # Errors
/// `database` if it cannot register.
pub async fn start(config: WorkerConfig) -> Result<WorkerHandle> {
    start_with(config, ANSWER_MAX).await
}

/// [`start`] of a worker that waits for answers of Postgres not as long as others.
///
/// # Errors
/// The same.
#[cfg(feature = "test-util")]
pub async fn start_impatient(config: WorkerConfig, answer_max: Duration) -> Result<WorkerHandle> {
    start_with(config, answer_max).await
}

async fn start_with(config: WorkerConfig, answer_max: Duration) -> Result<WorkerHandle> {
    let id = WorkerId(uuid::Uuid::now_v7());
    let lease_ms = i32::try_from(config.lease.as_millis()).unwrap_or(i32::MAX).max(100);
    let clock = Arc::new(Clock::default());
    let asked = Asked::now();
    let registered = ask(&config.pool, answer_max, async |conn| {
        store::workers::register(conn, id, &config.queues, &config.labels, lease_ms).await
    });
    clock.set(asked, registered.await?);
    crash_point("register.after_row");
    let spread = answered(answer_max, Spread::of(&config.pool)).await?;
    let shared = Arc::new(Shared {
        id,
        spread,
        reader: tokio::sync::Mutex::new(Session::like(&config.pool)),
        answer_max,
        catalog: config.registry.catalog(),
        registry: config.registry,
        committer: Committer::start(&config.pool, spread, &config.hook, answer_max),
        calls: Sessions::like(&config.pool, CALL_SESSIONS_MAX),
        hook: config.hook,
        pool: config.pool,
        clock,
        slots: Slots::new(config.slots.max(1) as usize),
        turns: Mutex::default(),
        settling: AtomicUsize::new(0),
        waiting: AtomicUsize::new(0),
        full: AtomicBool::new(false),
        definitions: Mutex::default(),
        left: Mutex::default(),
        drivers: Mutex::default(),
        progress: Mutex::default(),
        storing: TaskTracker::new(),
        wake: Notify::new(),
        freed: Arc::default(),
        draining: CancellationToken::new(),
        hurry: CancellationToken::new(),
        fenced: CancellationToken::new(),
    });
    let stopped = CancellationToken::new();
    lease::keep(shared.clone(), config.lease, stopped.clone())?;
    let tasks = TaskTracker::new();
    let until = |task: std::pin::Pin<Box<dyn Future<Output = ()> + Send>>| {
        let stopped = stopped.clone();
        async move {
            tokio::select! { () = stopped.cancelled() => {}, () = task => {} }
        }
    };
    tasks.spawn(until(Box::pin(publish_queue_depths(shared.pool.clone(), config.queues.clone()))));
    let keys = Keys::new(config.queues, config.labels);
    tasks.spawn(until(Box::pin(poll(shared.clone(), keys, tasks.clone()))));
    tasks.spawn(until(Box::pin(listen(shared.clone()))));
    tasks.spawn(until(Box::pin(sweep(shared.clone(), (config.lease / 4).min(SWEEP_MAX)))));
    tasks.spawn(until(Box::pin(write_progress(shared.clone()))));
    let client = Client::new(shared.pool.clone(), shared.hook.clone());
    let admit = admit::keep(client.clone(), shared.freed.clone(), shared.draining.clone(), answer_max);
    tasks.spawn(until(Box::pin(admit)));
    tasks.spawn(until(Box::pin(retain::keep(client.clone(), config.retention, shared.draining.clone()))));
    tasks.spawn(until(Box::pin(fire::keep(client, shared.draining.clone()))));
    tracing::info!(worker_id = %id, "worker started");
    Ok(WorkerHandle { shared, tasks, stopped })
}

impl WorkerHandle {
    /// This worker's id, as in table `workers`.
    #[must_use]
    pub fn id(&self) -> WorkerId {
        self.shared.id
    }

    /// Resolves when the worker lost its lease: the process should end and start anew.
    pub async fn fenced(&self) {
        self.shared.fenced.cancelled().await;
    }

    /// Number of runs in memory.
    #[must_use]
    pub fn runs(&self) -> usize {
        self.shared.drivers.lock().expect("no panic while held").len()
    }

    /// Dies as `kill -9` does: no goodbye, rows stay as they are, attempts stop in the middle.
    #[cfg(feature = "test-util")]
    pub fn crash(self) {
        self.stopped.cancel();
        self.shared.fenced.cancel();
    }

    /// Stops claiming, asks running attempts to stop, hands their runs back, leaves. A call that an attempt has announced by
    /// [`meter_open`](crate::activity::Context::meter_open) is heard out first, so that nobody pays for it twice; no other is begun.
    /// At the end of `grace`, less what the hand-over takes (2 s, at most a quarter of it), calls are cut off. What
    /// has not ended after `grace` is abandoned: its runs are free for others at once, its attempts count as lost.
    pub async fn drain(self, grace: Duration) {
        self.shared.draining.cancel();
        let empty = async || {
            while self.runs() > 0 && !self.shared.fenced.is_cancelled() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let hand_over = HAND_OVER_MAX.min(grace / 4);
        let mut ended = tokio::time::timeout(grace.saturating_sub(hand_over), empty()).await;
        if ended.is_err() {
            self.shared.hurry.cancel();
            ended = tokio::time::timeout(hand_over, empty()).await;
        }
        if ended.is_err() {
            tracing::warn!(worker_id = %self.shared.id, runs = self.runs(), "drain timed out; the runs are handed over as they are");
        }
        crash_point("drain.after_attempts");
        self.shared.fenced.cancel();
        self.stopped.cancel();
        // The runs are still this worker's: what was bought for them is kept, if Postgres comes back in time.
        self.shared.storing.close();
        if tokio::time::timeout(context::INSIST_MAX, self.shared.storing.wait()).await.is_err() {
            tracing::warn!(worker_id = %self.shared.id, "answers from outside could not be stored");
        }
        crash_point("drain.after_storing");
        let left = tokio::time::timeout(FAREWELL_MAX, leave(&self.shared)).await;
        if let Err(error) = left.unwrap_or_else(|_| Err(Error::Sql(sqlx::Error::Io(io::ErrorKind::TimedOut.into())))) {
            tracing::warn!(%error, "the goodbye had no answer in time; others take the runs over, when the lease ends at the latest");
        }
        crash_point("drain.after_leave");
        self.tasks.close();
        if tokio::time::timeout(FAREWELL_MAX, self.tasks.wait()).await.is_err() {
            tracing::warn!(worker_id = %self.shared.id, tasks = self.tasks.len(), "something still waits for Postgres; it is left behind");
        }
        tracing::info!(worker_id = %self.shared.id, "worker stopped");
    }
}

async fn leave(shared: &Shared) -> Result<()> {
    store::workers::leave(&shared.pool, shared.id).await?;
    crash_point("drain.after_burial");
    let mut session = Session::like(&shared.pool);
    while !store::workers::take_over(&mut session, shared.spread, TAKE_OVER_BATCH).await?.is_empty() {
        crash_point("drain.after_take_over");
    }
    crash_point("drain.before_wake");
    store::wake(&shared.pool).await;
    Ok(())
}

/// Claims due runs and passes messages on, at every wake-up and at the latest every [`POLL`]. On a session of its own.
async fn poll(shared: Arc<Shared>, mut keys: Keys, tasks: TaskTracker) {
    let mut session = Session::like(&shared.pool).waiting(shared.answer_max);
    let (mut strays, mut looks) = (Strays::new(), Looks::new());
    loop {
        let woken = shared.wake.notified();
        strays.look(&shared, &mut session).await;
        crash_point("claim.before_poll");
        let began = Instant::now();
        // Each question has its own limit, so that what was claimed is driven whatever becomes of the next one. A run whose claim was
        // done without an answer is found as a stray.
        match poll_once(&shared, &mut session, &mut keys, &tasks, &mut looks).await {
            Ok(true) => continue,
            Ok(false) => {}
            Err(Error::LeaseLost) => {
                tracing::warn!(worker_id = %shared.id, "declared dead by others; this worker stops");
                shared.fenced.cancel();
                return;
            }
            Err(error) => {
                session.leave();
                strays.expected();
                tracing::warn!(%error, "cannot poll");
            }
        }
        tokio::select! {
            () = woken => {}
            () = tokio::time::sleep(looks.pause(shared.spread, began.elapsed())) => {}
        }
    }
}

/// True if there may be more to claim at once.
async fn poll_once(
    shared: &Arc<Shared>,
    session: &mut Session,
    keys: &mut Keys,
    tasks: &TaskTracker,
    looks: &mut Looks,
) -> Result<bool> {
    let driven: Vec<RunId> = shared.drivers.lock().expect("no panic while held").keys().copied().collect();
    let owned = driven.len();
    looks.owed = owned > 0 && !looks.messages.is_due();
    if owned > 0 && !looks.owed {
        let began = Instant::now();
        let unread = store::workers::unread(session, shared.spread, &driven).await?;
        for (run, _) in unread {
            if let Some(notify) = shared.drivers.lock().expect("no panic while held").get(&run) {
                notify.notify_one();
            }
        }
        looks.messages.looked(began);
    }
    if shared.draining.is_cancelled() || shared.fenced.is_cancelled() || owned >= RUNS_MAX {
        return Ok(false);
    }
    crash_point("claim.after_unread");
    if keys.look(session, shared.spread).await? {
        looks.since = None;
    }
    let queues = keys.all();
    let room = shared.room();
    let limit = if room > 0 { room.min(RUNS_MAX - owned) } else { RUNS_MAX - owned }.min(CLAIM_MAX);
    let claimed = if room > 0 {
        claim(shared, session, queues, looks, limit).await?
    } else if looks.crowded.is_due() {
        let began = Instant::now();
        let claimed = claim_crowded(shared, session, queues, limit).await?;
        looks.crowded.looked(began);
        claimed
    } else {
        looks.owed = true;
        shared.full.store(true, Ordering::Relaxed);
        return Ok(false);
    };
    if !claimed.is_empty() {
        crash_point("claim.after_commit");
    }
    let more = claimed.len() == limit;
    if more || room == 0 {
        shared.full.store(true, Ordering::Relaxed);
    }
    let mut claims = Vec::with_capacity(claimed.len());
    for (run, epoch, lane) in claimed {
        let messages = Arc::new(Notify::new());
        shared.drivers.lock().expect("no panic while held").insert(run, messages.clone());
        shared.turns().took(lane);
        let settling = Counted::up(shared, |s| &s.settling);
        claims.push(Claim { driven: Driven { shared: shared.clone(), run, lane, messages }, epoch, settling });
    }
    if !claims.is_empty() {
        tasks.spawn(drive::drive_all(shared.clone(), claims, tasks.clone()));
    }
    Ok(more)
}

/// A claimed run: its epoch and its lane.
type Claimed = (RunId, i64, i32);

/// Claims due runs in the order of their turns.
async fn claim(
    shared: &Shared,
    session: &mut Session,
    queues: &[String],
    looks: &mut Looks,
    limit: usize,
) -> Result<Vec<Claimed>> {
    let whole = looks.whole.is_due();
    let (since, began) = (looks.since.filter(|_| !whole), Instant::now());
    // Before the look: what comes in while the runs are being taken is not in it.
    let asked = shared.clock.now();
    let look = store::ready::due(session, shared.spread, queues, since, most(limit)).await?;
    crash_point("claim.after_look");
    let order = shared.turns().order(shared.not_left(look.due));
    let claimed = take(shared, session, &order, limit).await?;
    if whole {
        looks.whole.looked(began);
    }
    if look.all {
        // What is left is this worker's next, or another worker has it.
        let taken: HashSet<RunId> = claimed.iter().map(|(run, ..)| *run).collect();
        let left = order.iter().filter(|due| !taken.contains(&due.run)).map(|due| due.due_at).min();
        let upto = if claimed.len() < limit { None } else { left };
        looks.since = Some(upto.unwrap_or(asked) - pace::LATE);
    } else if let Some(oldest) = look.oldest {
        looks.since = Some(oldest - pace::LATE);
    }
    Ok(claimed)
}

/// Without room: a cancel or a signal does not wait until the long work of others is done, and who has nothing here comes in
/// to be the next.
async fn claim_crowded(
    shared: &Shared,
    session: &mut Session,
    queues: &[String],
    limit: usize,
) -> Result<Vec<Claimed>> {
    let (mut claimed, now) =
        store::ready::take_messaged(session, shared.spread, shared.id, queues, most(limit)).await?;
    shared.clock.reach(now);
    crash_point("crowded.after_commit");
    let strangers = shared.room_for(CLAIM_SPARE + STRANGERS_MAX).min(limit - claimed.len());
    match claim_strangers(shared, session, queues, strangers).await {
        Ok(more) => claimed.extend(more),
        // What is claimed is to be driven, whatever fails afterwards.
        Err(error) if !claimed.is_empty() && !matches!(error, Error::LeaseLost) => {
            tracing::warn!(%error, "cannot claim more runs");
            session.leave();
        }
        Err(error) => return Err(error),
    }
    Ok(claimed)
}

async fn claim_strangers(
    shared: &Shared,
    session: &mut Session,
    queues: &[String],
    limit: usize,
) -> Result<Vec<Claimed>> {
    if limit == 0 {
        return Ok(Vec::new());
    }
    let look = store::ready::due(session, shared.spread, queues, None, most(limit)).await?;
    crash_point("crowded.after_look");
    let before = shared.clock.now() - STRANGERS_AFTER;
    let order = {
        let turns = shared.turns();
        let mut lanes = HashSet::new();
        let strange = |due: &Due| turns.held(due.lane) == 0 && due.due_at <= before && lanes.insert(due.lane);
        turns.order(shared.not_left(look.due)).into_iter().filter(strange).collect::<Vec<_>>()
    };
    take(shared, session, &order, limit).await
}

async fn take(shared: &Shared, session: &mut Session, order: &[Due], limit: usize) -> Result<Vec<Claimed>> {
    let runs: Vec<RunId> = order.iter().map(|due| due.run).collect();
    let lanes: HashMap<RunId, i32> = order.iter().map(|due| (due.run, due.lane)).collect();
    let (taken, now) = store::ready::take(session, shared.spread, shared.id, &runs, most(limit)).await?;
    shared.clock.reach(now);
    Ok(taken.into_iter().map(|(run, epoch)| (run, epoch, lanes.get(&run).copied().unwrap_or(0))).collect())
}

fn most(limit: usize) -> i64 {
    i64::try_from(limit).unwrap_or(1)
}

/// Turns wake-ups of other processes into local ones. The poll is right without it.
async fn listen(shared: Arc<Shared>) {
    if shared.pool.options().get_max_connections() < 2 {
        // A listener keeps its connection: nothing would be left to work with.
        return;
    }
    loop {
        let listener = async {
            let mut listener = sqlx::postgres::PgListener::connect_with(&shared.pool).await?;
            answered(shared.answer_max, listener.listen(store::WAKE_CHANNEL)).await?;
            loop {
                listener.recv().await?;
                shared.wake.notify_one();
            }
            #[expect(unreachable_code, reason = "gives the block its type")]
            Ok::<(), sqlx::Error>(())
        };
        if let Err(error) = listener.await {
            tracing::debug!(%error, "cannot listen; polling goes on");
        }
        tokio::time::sleep(Duration::from_secs(2)).await;
    }
}

/// Declares silent workers dead and frees their runs. Every worker may do it; there is no leader.
async fn sweep(shared: Arc<Shared>, every: Duration) {
    let mut session = Session::like(&shared.pool).waiting(shared.answer_max);
    loop {
        tokio::time::sleep(every.mul_f64(0.75 + fastrand::f64() / 2.0)).await;
        let swept = async {
            let buried = shared.ask(async |conn| store::workers::bury(conn).await).await?;
            if buried > 0 {
                crash_point("takeover.after_bury");
            }
            let mut freed = 0;
            loop {
                let runs = store::workers::take_over(&mut session, shared.spread, TAKE_OVER_BATCH).await?;
                freed += runs.len();
                if runs.is_empty() {
                    break;
                }
                crash_point("takeover.after_take_over");
            }
            if buried > 0 || freed > 0 {
                tracing::warn!(buried, freed, "took over from dead workers");
                shared.wake.notify_one();
            }
            Ok::<(), Error>(())
        };
        if let Err(error) = swept.await {
            tracing::warn!(%error, "cannot sweep");
        }
    }
}

async fn write_progress(shared: Arc<Shared>) {
    loop {
        tokio::time::sleep(PROGRESS).await;
        let batch: Vec<Progress> =
            shared.progress.lock().expect("no panic while held").drain().map(|(_, p)| p).collect();
        if batch.is_empty() {
            continue;
        }
        let written = shared.ask(async |conn| store::checkpoints::put_progress(conn, shared.spread, &batch).await);
        if let Err(error) = written.await {
            tracing::debug!(%error, "progress was not written");
        }
    }
}

/// A run's entry among the drivers; leaves with its driver, by a panic as well.
struct Driven {
    shared: Arc<Shared>,
    run: RunId,
    lane: i32,
    messages: Arc<Notify>,
}

impl Drop for Driven {
    fn drop(&mut self) {
        // The run may have been claimed again already: that entry is another driver's.
        let mut drivers = self.shared.drivers.lock().expect("no panic while held");
        if drivers.get(&self.run).is_some_and(|current| Arc::ptr_eq(current, &self.messages)) {
            drivers.remove(&self.run);
        }
        drop(drivers);
        self.shared.turns().gave_back(self.lane);
        self.shared.look_again();
    }
}

/// Counts something in a worker as long as it lives.
pub(crate) struct Counted(Arc<Shared>, fn(&Shared) -> &AtomicUsize);

impl Counted {
    fn up(shared: &Arc<Shared>, counter: fn(&Shared) -> &AtomicUsize) -> Self {
        counter(shared).fetch_add(1, Ordering::Relaxed);
        Self(shared.clone(), counter)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.1(&self.0).fetch_sub(1, Ordering::Relaxed);
        self.0.look_again();
    }
}

impl Shared {
    /// Leaves a run to others: it is not claimed here until `until`.
    fn leave_to_others(&self, run: RunId, until: Instant) {
        let mut left = self.left.lock().expect("no panic while held");
        left.retain(|_, until| Instant::now() < *until);
        left.insert(run, until);
    }

    /// Those that are not left to others.
    fn not_left(&self, mut due: Vec<Due>) -> Vec<Due> {
        let left = self.left.lock().expect("no panic while held");
        due.retain(|due| left.get(&due.run).is_none_or(|until| *until <= Instant::now()));
        due
    }

    /// How many more runs may be claimed.
    fn room(&self) -> usize {
        self.room_for(CLAIM_SPARE)
    }

    /// The same, if so many may wait for a slot.
    fn room_for(&self, spare: usize) -> usize {
        let taken = self.settling.load(Ordering::Relaxed) + self.waiting.load(Ordering::Relaxed);
        (self.slots.free() + spare).saturating_sub(taken)
    }

    fn turns(&self) -> MutexGuard<'_, Turns> {
        self.turns.lock().expect("no panic while held")
    }

    /// Looks for runs again if some were left in the queue and there is room now.
    fn look_again(&self) {
        if self.room() > 0 && self.full.swap(false, Ordering::Relaxed) {
            self.wake.notify_one();
        }
    }

    /// Asks something on a connection of the pool.
    async fn ask<T, F>(&self, question: F) -> Result<T>
    where
        F: AsyncFnOnce(&mut PgConnection) -> Result<T>,
    {
        ask(&self.pool, self.answer_max, question).await
    }

    /// Reads on the session that is there for it, or on any while somebody has that.
    async fn read<T, F>(&self, read: F) -> Result<T>
    where
        F: AsyncFnOnce(&mut PgConnection) -> Result<T>,
    {
        let Ok(mut session) = self.reader.try_lock() else { return self.ask(read).await };
        let result = answered(self.answer_max, async { read(session.conn().await?).await }).await;
        if matches!(result, Err(Error::Sql(_))) {
            session.leave();
        }
        result
    }

    /// A definition, from memory or from the store.
    async fn pinned(&self, hash: DefinitionHash) -> Result<Arc<Pinned>> {
        if let Some(found) = self.definitions.lock().expect("no panic while held").get(&hash) {
            return Ok(found.clone());
        }
        let pinned = Arc::new(self.ask(async |conn| store::definitions::load(conn, hash).await).await?);
        let mut cache = self.definitions.lock().expect("no panic while held");
        if cache.len() >= DEFINITIONS_MAX {
            cache.clear();
        }
        cache.insert(hash, pinned.clone());
        Ok(pinned)
    }
}
