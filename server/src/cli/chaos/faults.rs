//! What goes wrong, and when: a seeded choice of faults against processes, wire and database, and the calm afterwards.

use super::{
    process::{Process, Recipe},
    proxy::{Proxy, Weather},
};
use anyhow::Context as _;
use fastrand::Rng;
use loopwright_engine::embedded::{self, Server, Settings};
use serde::Serialize;
use sqlx::postgres::PgConnectOptions;
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::Duration,
};
use tokio::{sync::watch, time::Instant};

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

/// A Postgres of our own, that survives its end.
pub(super) struct Postgres {
    settings: Settings,
    server: Option<Server>,
    pub(super) url: String,
    pub(super) socket: PathBuf,
}

impl Postgres {
    pub(super) async fn start(folder: &Path) -> anyhow::Result<Self> {
        let settings = Settings { data_dir: Some(folder.to_owned()), ..Settings::default() };
        let server = embedded::start(settings.clone()).await?;
        let url = server.url().to_owned();
        let options: PgConnectOptions = url.parse()?;
        let folder = options.get_socket().context("our Postgres has a socket")?;
        let socket = folder.join(format!(".s.PGSQL.{}", options.get_port()));
        Ok(Self { settings, server: Some(server), url, socket })
    }

    /// Ends it without a checkpoint or a goodbye, and starts it over what it had written.
    async fn restart(&mut self) -> anyhow::Result<()> {
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
        Ok(())
    }

    pub(super) async fn stop(mut self) {
        if let Some(server) = self.server.take() {
            // Waiting blocks; a server that is not waited for ends by itself.
            let _ = tokio::task::spawn_blocking(move || server.stop()).await;
        }
    }
}

/// Everything that is under fire.
pub(super) struct Stage {
    pub(super) postgres: Postgres,
    pub(super) proxy: Proxy,
    pub(super) workers: Vec<Process>,
    pub(super) server: Process,
    pub(super) injected: BTreeMap<Fault, u32>,
    /// When the wire changes next, and to what.
    forecast: Vec<(Instant, Weather)>,
}

impl Stage {
    pub(super) fn new(postgres: Postgres, proxy: Proxy, workers: Vec<Recipe>, server: Recipe, logs: &Path) -> Self {
        Self {
            postgres,
            proxy,
            workers: workers.into_iter().map(|recipe| Process::new(recipe, logs)).collect(),
            server: Process::new(server, logs),
            injected: Fault::all().map(|fault| (fault, 0)).collect(),
            forecast: Vec::new(),
        }
    }

    pub(super) fn processes(&mut self) -> impl Iterator<Item = &mut Process> {
        self.workers.iter_mut().chain([&mut self.server])
    }

    /// Starts what has ended, wakes what has slept, lets the weather change.
    pub(super) fn keep(&mut self) -> anyhow::Result<()> {
        let now = Instant::now();
        while let Some((at, weather)) = self.forecast.first().copied()
            && at <= now
        {
            self.forecast.remove(0);
            self.proxy.set(weather);
        }
        self.processes().try_for_each(Process::keep)
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
            self.keep()?;
            if next <= Instant::now() {
                if round.is_empty() {
                    round = Fault::ROUND.iter().flat_map(|(fault, n)| std::iter::repeat_n(*fault, *n)).collect();
                    rng.shuffle(&mut round);
                }
                if let Some(fault) = round.pop() {
                    self.strike(fault, rng).await?;
                    *self.injected.entry(fault).or_default() += 1;
                    tracing::info!(?fault, "injected");
                }
                next = Instant::now() + Duration::from_millis(rng.u64(PAUSE_MS));
            }
            tokio::time::sleep(LOOK).await;
        }
        Ok(())
    }

    async fn strike(&mut self, fault: Fault, rng: &mut Rng) -> anyhow::Result<()> {
        // The same number of draws for each, whatever stands: a seed makes the same choices.
        let which = rng.usize(..self.workers.len().max(1));
        let (down, freeze) = (Duration::from_millis(rng.u64(DOWN_MS)), Duration::from_millis(rng.u64(FREEZE_MS)));
        let (cut, slow) = (Duration::from_millis(rng.u64(CUT_MS)), Duration::from_millis(rng.u64(SLOW_MS)));
        let delay = Duration::from_millis(rng.u64(DELAY_MS));
        let (now, calm) = (Instant::now(), Weather::default());
        match fault {
            Fault::WorkerKilled => self.workers[which].kill(down)?,
            Fault::ServerKilled => self.server.kill(down)?,
            Fault::WorkerFrozen => self.workers[which].freeze(freeze),
            Fault::PostgresRestarted => self.postgres.restart().await?,
            Fault::TcpCut => self.change(vec![(now, Weather { cut: true, ..calm }), (now + cut, calm)]),
            Fault::TcpSlowThenCut => self.change(vec![
                (now, Weather { delay, ..calm }),
                (now + delay * 3, Weather { cut: true, delay }),
                (now + delay * 3 + cut, calm),
            ]),
            Fault::TcpSlow => self.change(vec![(now, Weather { delay, ..calm }), (now + slow, calm)]),
        }
        Ok(())
    }

    fn change(&mut self, forecast: Vec<(Instant, Weather)>) {
        self.forecast = forecast;
    }

    /// Nothing goes wrong any more: the wire is whole, nobody is frozen, everybody is started.
    pub(super) fn calm(&mut self) -> anyhow::Result<()> {
        self.change(vec![(Instant::now(), Weather::default())]);
        self.processes().for_each(Process::thaw);
        self.keep()
    }
}
