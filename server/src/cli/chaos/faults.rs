//! What goes wrong, and when: a seeded choice of faults against processes, wire and database, and the calm afterwards.
//!
//! A fault counts when it has struck, not when it was tried: a kill when SIGKILL ended a live process, a freeze when the worker lost
//! its lease or slept beyond it while it had runs, a restart when Postgres says that it was shut down at once, weather when
//! open connections broke or bytes came late.

use super::{
    process::{Process, Recipe},
    proxy::{Damage, Proxy, Weather},
};
use anyhow::Context as _;
use fastrand::Rng;
use loopwright_engine::embedded::{self, Server, Settings};
use serde::Serialize;
use sqlx::{PgPool, postgres::PgConnectOptions};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::Duration,
};
use tokio::{sync::watch, time::Instant};
use uuid::Uuid;

/// Lease of the workers, in ms: many are lost in two minutes.
pub(super) const LEASE_MS: u32 = 2_000;
/// Pause between two faults, in ms: some meet the damage of the one before, some a system that has recovered.
const PAUSE_MS: std::ops::Range<u64> = 200..2_200;
/// How long a frozen worker sleeps, in ms: longer than its lease, so that others take over.
const FREEZE_MS: std::ops::Range<u64> = 2_300..5_000;
/// How long a killed process stays away, in ms.
const DOWN_MS: std::ops::Range<u64> = 50..1_500;
/// How long the wire is cut, in ms.
const CUT_MS: std::ops::Range<u64> = 30..2_500;
/// How long the wire is slow, in ms, and how much later each chunk comes.
const SLOW_MS: std::ops::Range<u64> = 500..4_000;
const DELAY_MS: std::ops::Range<u64> = 10..400;
/// How often the processes are looked after.
const LOOK: Duration = Duration::from_millis(25);
/// Longest wait for a Postgres that was shut down at once: its own limit for its children is 5 s.
const SHUTDOWN_MAX: Duration = Duration::from_secs(20);
/// Longest question to Postgres, past the proxy, about a worker that is frozen.
const ASK_MAX: Duration = Duration::from_secs(2);
/// What Postgres writes when it is told to end at once, and when it comes back from that.
const SHUTDOWN_LINES: [&str; 2] = ["received immediate shutdown request", "database system was not properly shut down"];

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Fault {
    WorkerKilled,
    ServerKilled,
    WorkerFrozen,
    PostgresRestarted,
    TcpCut,
    TcpSlowThenCut,
    TcpSlow,
}

impl Fault {
    /// Each with its share of a round; a round is shuffled and used up before the next, so that none is left out for long.
    const ROUND: [(Self, usize); 7] = [
        (Self::WorkerKilled, 4),
        (Self::ServerKilled, 2),
        (Self::WorkerFrozen, 2),
        (Self::PostgresRestarted, 2),
        (Self::TcpCut, 2),
        (Self::TcpSlowThenCut, 2),
        (Self::TcpSlow, 1),
    ];

    pub(super) fn all() -> impl Iterator<Item = Self> {
        Self::ROUND.into_iter().map(|(fault, _)| fault)
    }

    pub(super) fn text(self) -> &'static str {
        match self {
            Self::WorkerKilled => "worker killed (SIGKILL)",
            Self::ServerKilled => "server killed (SIGKILL)",
            Self::WorkerFrozen => "worker frozen beyond its lease (SIGSTOP, SIGCONT)",
            Self::PostgresRestarted => "Postgres restarted (immediate shutdown)",
            Self::TcpCut => "TCP cut",
            Self::TcpSlowThenCut => "TCP slow, then cut: answers are lost",
            Self::TcpSlow => "TCP slow",
        }
    }
}

/// Faults of one kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct Strikes {
    pub(super) tried: u32,
    /// Of these, those that really happened to something.
    pub(super) struck: u32,
}

/// A Postgres of our own, that survives its end.
pub(super) struct Postgres {
    settings: Settings,
    server: Option<Server>,
    log: PathBuf,
    pub(super) url: String,
    pub(super) socket: PathBuf,
}

impl Postgres {
    pub(super) async fn start(folder: &Path) -> anyhow::Result<Self> {
        let settings = Settings { data_dir: Some(folder.to_owned()), ..Settings::default() };
        let server = embedded::start(settings.clone()).await?;
        let log = folder.join("postgres/log");
        let url = server.url().to_owned();
        let options: PgConnectOptions = url.parse()?;
        let folder = options.get_socket().context("our Postgres has a socket")?;
        let socket = folder.join(format!(".s.PGSQL.{}", options.get_port()));
        Ok(Self { settings, server: Some(server), log, url, socket })
    }

    /// Ends it without a checkpoint or a goodbye, and starts it over what it had written. True if it says itself that it was
    /// so.
    async fn restart(&mut self) -> anyhow::Result<bool> {
        let said = std::fs::read(&self.log)?.len();
        if let Some(server) = self.server.take() {
            if let Ok(pid) = i32::try_from(server.pid()) {
                // SAFETY: our own child; its keeper reaps it after its end only, and that is what we bring about here.
                unsafe { libc::kill(pid, libc::SIGQUIT) };
            }
            // The keeper waits for it, and takes care that nobody else does.
            let stopped = tokio::task::spawn_blocking(move || server.stop());
            tokio::time::timeout(SHUTDOWN_MAX, stopped).await.context("Postgres does not end")??;
        }
        self.server = Some(embedded::start(self.settings.clone()).await?);
        let log = std::fs::read(&self.log)?;
        Ok(was_shut_down_at_once(&String::from_utf8_lossy(log.get(said..).unwrap_or_default())))
    }

    pub(super) async fn stop(mut self) {
        if let Some(server) = self.server.take() {
            // Waiting blocks; a server that is not waited for ends by itself.
            let _ = tokio::task::spawn_blocking(move || server.stop()).await;
        }
    }
}

/// Whether a part of Postgres's log tells of an immediate shutdown and of the recovery from it, in that order.
fn was_shut_down_at_once(log: &str) -> bool {
    let mut rest = Some(log);
    for line in SHUTDOWN_LINES {
        rest = rest.and_then(|rest| rest.split_once(line)).map(|(_, rest)| rest);
    }
    rest.is_some()
}

/// A worker that was frozen.
#[derive(Clone, Copy)]
struct Asleep {
    /// As it is registered.
    worker: Uuid,
    /// It had runs.
    held: bool,
}

impl Asleep {
    /// Whether a sleep of that time was a fault: longer than the lease, and others took it for dead or it had something to
    /// lose.
    fn was_felt(self, slept: Option<Duration>, declared_dead: bool) -> bool {
        slept.is_some_and(|slept| slept > Duration::from_millis(LEASE_MS.into())) && (declared_dead || self.held)
    }
}

/// A fault of the wire that goes on, and what had been damaged before.
#[derive(Clone, Copy)]
struct Storm {
    fault: Fault,
    before: Damage,
}

impl Storm {
    fn was_felt(self, now: Damage) -> bool {
        let (cut, late) = (now.cut > self.before.cut, now.late > self.before.late);
        match self.fault {
            Fault::TcpCut => cut,
            Fault::TcpSlowThenCut => cut && late,
            Fault::TcpSlow => late,
            Fault::WorkerKilled | Fault::ServerKilled | Fault::WorkerFrozen | Fault::PostgresRestarted => false,
        }
    }
}

/// Everything that is under fire.
pub(super) struct Stage {
    pub(super) postgres: Postgres,
    pub(super) proxy: Proxy,
    pub(super) workers: Vec<Process>,
    pub(super) server: Process,
    pub(super) faults: BTreeMap<Fault, Strikes>,
    /// Past the proxy.
    pool: PgPool,
    /// When the wire changes next, and to what; the last is always fine weather.
    forecast: Vec<(Instant, Weather)>,
    storm: Option<Storm>,
    /// By their place among the workers.
    asleep: BTreeMap<usize, Asleep>,
}

impl Stage {
    pub(super) fn new(
        postgres: Postgres,
        proxy: Proxy,
        workers: Vec<Recipe>,
        server: Recipe,
        logs: &Path,
        pool: PgPool,
    ) -> Self {
        Self {
            postgres,
            proxy,
            workers: workers.into_iter().map(|recipe| Process::new(recipe, logs)).collect(),
            server: Process::new(server, logs),
            faults: Fault::all().map(|fault| (fault, Strikes::default())).collect(),
            pool,
            forecast: Vec::new(),
            storm: None,
            asleep: BTreeMap::new(),
        }
    }

    pub(super) fn processes(&mut self) -> impl Iterator<Item = &mut Process> {
        self.workers.iter_mut().chain([&mut self.server])
    }

    fn struck(&mut self, fault: Fault) {
        self.faults.entry(fault).or_default().struck += 1;
        tracing::info!(?fault, "struck");
    }

    /// Starts what has ended, wakes what has slept, lets the weather change.
    pub(super) async fn keep(&mut self) -> anyhow::Result<()> {
        let now = Instant::now();
        while let Some((at, weather)) = self.forecast.first().copied()
            && at <= now
        {
            self.forecast.remove(0);
            self.proxy.set(weather);
        }
        if self.forecast.is_empty() {
            self.look_at_the_wire();
        }
        for which in 0..self.workers.len() {
            if self.workers[which].has_slept_enough() {
                self.wake(which).await;
            }
        }
        self.processes().try_for_each(Process::keep)
    }

    /// The storm is over: whether anybody felt it.
    fn look_at_the_wire(&mut self) {
        if let Some(storm) = self.storm.take()
            && storm.was_felt(self.proxy.damage())
        {
            self.struck(storm.fault);
        }
    }

    /// Freezes a worker that is registered, `which` if possible: one that is just starting has no lease to lose.
    async fn freeze(&mut self, which: usize, time: Duration) {
        let places = self.workers.len();
        for which in (0..places).map(|n| (which + n) % places) {
            let Some(pid) = self.workers[which].pid().filter(|_| self.workers[which].is_up()) else { continue };
            let registered =
                "select w.id, exists (select from runs r where r.owner = w.id) from workers w where w.pid = $1
                              order by w.started_at desc limit 1";
            let Some((worker, _)) = self.ask::<(Uuid, bool)>(registered, pid.cast_signed()).await else { continue };
            self.workers[which].freeze(time);
            // It takes nothing any more.
            let held = self.ask::<(bool,)>("select exists (select from runs where owner = $1)", worker).await;
            self.asleep.insert(which, Asleep { worker, held: held.is_some_and(|(held,)| held) });
            return;
        }
    }

    /// Lets a frozen worker go on, after a look at what its sleep has done.
    async fn wake(&mut self, which: usize) {
        let slept = self.workers[which].slept();
        if let Some(asleep) = self.asleep.remove(&which) {
            let dead = "select exists (select from dead_workers where id = $1)";
            let dead = self.ask::<(bool,)>(dead, asleep.worker).await.is_some_and(|(dead,)| dead);
            if asleep.was_felt(slept, dead) {
                self.struck(Fault::WorkerFrozen);
            }
        }
        self.workers[which].thaw();
    }

    /// One row of Postgres; nothing if it cannot be asked now.
    async fn ask<T>(
        &self,
        query: &'static str,
        about: impl for<'q> sqlx::Encode<'q, sqlx::Postgres> + sqlx::Type<sqlx::Postgres> + Send + 'static,
    ) -> Option<T>
    where
        T: for<'r> sqlx::FromRow<'r, sqlx::postgres::PgRow> + Send + Unpin,
    {
        let row = sqlx::query_as(query).bind(about).fetch_optional(&self.pool);
        match tokio::time::timeout(ASK_MAX, row).await {
            Ok(Ok(row)) => row,
            Ok(Err(error)) => {
                tracing::debug!(%error, "Postgres cannot be asked");
                None
            }
            Err(_) => None,
        }
    }

    /// Injects faults until `end`, or until `stop` turns true.
    ///
    /// # Errors
    /// Something of ours does not come up again: not a finding about the engine.
    pub(super) async fn inject(
        &mut self,
        rng: &mut Rng,
        end: Instant,
        stop: &watch::Receiver<bool>,
    ) -> anyhow::Result<()> {
        let mut round = Vec::new();
        let mut next = Instant::now() + Duration::from_millis(rng.u64(PAUSE_MS));
        while Instant::now() < end && !*stop.borrow() {
            self.keep().await?;
            if next <= Instant::now() {
                if round.is_empty() {
                    round = Fault::ROUND.iter().flat_map(|(fault, n)| std::iter::repeat_n(*fault, *n)).collect();
                    rng.shuffle(&mut round);
                }
                if let Some(fault) = round.pop() {
                    tracing::info!(?fault, "tried");
                    self.faults.entry(fault).or_default().tried += 1;
                    if self.strike(fault, rng).await? {
                        self.struck(fault);
                    }
                }
                next = Instant::now() + Duration::from_millis(rng.u64(PAUSE_MS));
            }
            tokio::time::sleep(LOOK).await;
        }
        Ok(())
    }

    /// True if it has struck; what takes its time is counted when it is over.
    async fn strike(&mut self, fault: Fault, rng: &mut Rng) -> anyhow::Result<bool> {
        // The same number of draws for each, whatever stands: a seed makes the same choices.
        let which = rng.usize(..self.workers.len().max(1));
        let (down, freeze) = (Duration::from_millis(rng.u64(DOWN_MS)), Duration::from_millis(rng.u64(FREEZE_MS)));
        let (cut, slow) = (Duration::from_millis(rng.u64(CUT_MS)), Duration::from_millis(rng.u64(SLOW_MS)));
        let delay = Duration::from_millis(rng.u64(DELAY_MS));
        let (now, calm) = (Instant::now(), Weather::default());
        match fault {
            Fault::WorkerKilled => {
                // A frozen one dies as well; then its sleep is none.
                self.asleep.remove(&which);
                return self.workers[which].kill(down);
            }
            Fault::ServerKilled => return self.server.kill(down),
            Fault::WorkerFrozen => self.freeze(which, freeze).await,
            Fault::PostgresRestarted => return self.postgres.restart().await,
            Fault::TcpCut => self.change(fault, vec![(now, Weather { cut: true, ..calm }), (now + cut, calm)]),
            Fault::TcpSlowThenCut => self.change(
                fault,
                vec![
                    (now, Weather { delay, ..calm }),
                    (now + delay * 3, Weather { cut: true, delay }),
                    (now + delay * 3 + cut, calm),
                ],
            ),
            Fault::TcpSlow => self.change(fault, vec![(now, Weather { delay, ..calm }), (now + slow, calm)]),
        }
        Ok(false)
    }

    /// Another storm; the one before, if it goes on, ends here.
    fn change(&mut self, fault: Fault, forecast: Vec<(Instant, Weather)>) {
        self.look_at_the_wire();
        self.storm = Some(Storm { fault, before: self.proxy.damage() });
        self.forecast = forecast;
    }

    /// Nothing goes wrong any more: the wire is whole, nobody is frozen, everybody is started.
    pub(super) async fn calm(&mut self) -> anyhow::Result<()> {
        self.forecast = vec![(Instant::now(), Weather::default())];
        for which in 0..self.workers.len() {
            self.wake(which).await;
        }
        self.keep().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_that_nobody_felt_does_not_count() {
        let lease = Duration::from_millis(LEASE_MS.into());
        let (beyond, within) = (Some(lease + Duration::from_millis(1)), Some(lease));
        for (held, dead, slept, felt) in [
            (true, false, beyond, true),
            (false, true, beyond, true),
            (false, false, beyond, false),
            (true, true, within, false),
            // Somebody else had woken it.
            (true, true, None, false),
        ] {
            assert_eq!(Asleep { worker: Uuid::nil(), held }.was_felt(slept, dead), felt, "{held} {dead} {slept:?}");
        }
        let before = Damage { cut: 3, late: 100 };
        for (fault, cut, late, felt) in [
            (Fault::TcpCut, 1, 0, true),
            (Fault::TcpCut, 0, 10, false),
            (Fault::TcpSlow, 0, 10, true),
            (Fault::TcpSlow, 1, 0, false),
            (Fault::TcpSlowThenCut, 1, 10, true),
            (Fault::TcpSlowThenCut, 1, 0, false),
            (Fault::TcpSlowThenCut, 0, 10, false),
        ] {
            let now = Damage { cut: before.cut + cut, late: before.late + late };
            assert_eq!(Storm { fault, before }.was_felt(now), felt, "{fault:?} {cut} {late}");
        }
        let [down, back] = SHUTDOWN_LINES;
        assert!(was_shut_down_at_once(&format!("LOG: {down}\nLOG: {back}; automatic recovery in progress\n")));
        assert!(!was_shut_down_at_once(&format!("LOG: {down}\nLOG: database system was shut down\n")));
        assert!(!was_shut_down_at_once(&format!("LOG: {back}\n")), "it was down before");
    }

    #[tokio::test]
    async fn a_restart_counts_when_postgres_says_so() {
        let folder = tempfile::Builder::new().prefix("loopwright-chaos-").tempdir().expect("folder");
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(folder.path(), open).expect("permissions");
        let mut postgres = Postgres::start(folder.path()).await.expect("Postgres");
        assert!(postgres.restart().await.expect("restarted"));
        // A shutdown that takes its leave is none.
        let polite = postgres.server.take().expect("a server");
        tokio::task::spawn_blocking(move || polite.stop()).await.expect("stopped");
        assert!(!postgres.restart().await.expect("restarted"));
        postgres.stop().await;
    }
}
