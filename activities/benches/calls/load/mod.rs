//! Many runs that call models at the same time: what a call takes beyond the provider's own time, how many the machine makes a
//! second, and whether all the money adds up.
//!
//! ```text
//! run ─▶ host: Postgres of our own, two commits alone (the limit), one round trip alone
//!      ─▶ counted: a few calls, one after another, through a wire that counts their round trips
//!      ─▶ phase "full speed": the provider answers at once ─┐  scene: worker in this process, production's wiring
//!      ─▶ phase "stated load": it thinks                   ─┤  provider: a process of its own, stamps what it does
//!      ─▶ two commits alone, as often as that load had calls ▼
//!                                   figures: figure · limit · ratio · goal
//! ```
//!
//! **Added latency** of a call is the time from asking the orchestrator to having its answer, less the provider's own: from the
//! instant at which it has read the whole request to the instant at which it hands over the last bytes of its answer, by the same
//! monotonic clock. So inside are look-ups, announcement, our client, both ways through the kernel, the provider's reading of HTTP
//! and its writing, the closing commit with the checkpoint, and every wait for a processor on our side of these two instants.

mod figures;
mod host;
mod provider;
mod scene;
mod wire;

pub use host::keep_to;
pub use provider::child;

use host::{Counters, Host};
use loopwright_engine::bench::Report;
use provider::{Provider, Span};
use scene::Measured;
use std::{ffi::OsString, path::PathBuf, time::Duration};
use wire::{Trips, Wire};

/// Processors that the goal speaks of.
pub const CORES: usize = 2;
/// Runs and calls of each that are to be quoted.
const RUNS: usize = 200;
const CALLS: usize = 50;
/// Of the requests, that the goal speaks of.
const FAULTS_PERCENT: usize = 5;
/// Pairs of commits that are the limit.
const PAIRS: usize = 2_000;
/// Runs and calls of each whose round trips are counted, and how long the provider takes meanwhile.
const COUNTED: (usize, usize, Duration) = (2, 25, Duration::from_millis(20));
const PATIENCE: Duration = Duration::from_secs(1_800);

/// What to measure.
#[derive(Clone, Debug)]
pub struct Options {
    pub runs: usize,
    /// Of each run.
    pub calls: usize,
    /// The provider's mean time for an answer under the stated load.
    pub think: Duration,
    /// Of the requests.
    pub faults_percent: usize,
    /// Processors that everything was confined to, if it was.
    pub cores: Option<usize>,
    /// Where Postgres keeps its data; removed afterwards.
    pub folder: PathBuf,
    /// Arguments with which this program, started again, comes to [`child`].
    pub child_arguments: Vec<OsString>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            runs: RUNS,
            calls: CALLS,
            think: Duration::from_secs(2),
            faults_percent: FAULTS_PERCENT,
            cores: None,
            folder: std::env::temp_dir(),
            child_arguments: Vec::new(),
        }
    }
}

impl Options {
    /// Share of the amounts that are to be quoted: what is less is a trial. More is not more than all.
    fn percent(&self) -> u32 {
        let share = |n: usize, all: usize| (n * 100 / all).min(100);
        u32::try_from(share(self.runs, RUNS) * share(self.calls, CALLS) / 100).unwrap_or(100)
    }
}

/// What came of it.
pub struct Outcome {
    pub report: Report,
    /// No invariant is broken, nothing locked up, every run ended well, and every request is recorded.
    pub adds_up: bool,
    /// Rows that break an invariant, and runs that did not complete.
    pub broken: Vec<String>,
    /// What a call says to Postgres, and how often on average.
    pub said: Vec<(String, f64)>,
}

pub type Result<T, E = Box<dyn std::error::Error + Send + Sync>> = std::result::Result<T, E>;

/// What a few calls said to Postgres.
struct Counted {
    calls: usize,
    trips: Trips,
    /// One round trip alone, in milliseconds, sorted.
    alone: Vec<f64>,
}

/// All calls at one pace.
struct Phase {
    measured: Vec<Measured>,
    spans: Vec<Span>,
    before: Counters,
    after: Counters,
    provider_cpu: Duration,
    /// Runs that did not complete, and why.
    failed_runs: Vec<String>,
    /// Rows of `api_key_usage`.
    recorded: usize,
}

/// Measures both phases on a server of its own. `progress` hears, in a few words, what is being measured.
///
/// # Errors
/// When there is no Postgres, when a process cannot be started, or when something never comes to its end.
pub async fn run(options: &Options, progress: &dyn Fn(&str)) -> Result<Outcome> {
    let host = Host::prepare(options).await?;
    let measured = measure(&host, options, progress).await;
    host.clean_up().await?;
    measured
}

async fn measure(host: &Host, options: &Options, progress: &dyn Fn(&str)) -> Result<Outcome> {
    progress("two commits, alone");
    let share = (options.runs * options.calls).min(RUNS * CALLS);
    let pairs = (PAIRS * share / (RUNS * CALLS)).max(20);
    let limit = host.pairs_of_commits(pairs).await?;
    let server = host.describe(options).await?;
    progress("round trips");
    let counted = counted(host, options).await?;
    progress("calls at full speed");
    let fast = phase(host, options, Duration::ZERO).await?;
    progress("calls under the stated load");
    let loaded = phase(host, options, options.think).await?;
    progress("two commits, alone, at that pace");
    let paced = host.pairs_of_commits_at(pairs, figures::pace(&loaded.measured)).await?;
    let broken = host.broken_invariants().await?;
    Ok(figures::outcome(
        options,
        server,
        [&limit, &paced],
        &counted,
        [&fast, &loaded],
        broken,
        host.deadlocks_logged()?,
    ))
}

async fn counted(host: &Host, options: &Options) -> Result<Counted> {
    let alone = host.round_trips(PAIRS).await?;
    let (runs, calls, think) = COUNTED;
    let options = Options { runs, calls, faults_percent: 0, ..options.clone() };
    let wire = Wire::to(&host.pool).await?;
    let provider = Provider::start(&options, think).await?;
    let scene = scene::Scene::open(host, &wire.pool, &options, provider.environment()).await?;
    // A worker that has been at it for a while has prepared its statements and read what is read now and then.
    scene.until_closed(&scene.start(1, Duration::ZERO).await?, PATIENCE).await?;
    wire.take();
    scene.until_closed(&scene.start(runs, Duration::ZERO).await?, PATIENCE).await?;
    let trips = wire.take();
    scene.close().await;
    provider.stop().await?;
    Ok(Counted { calls: runs * calls, trips, alone })
}

async fn phase(host: &Host, options: &Options, think: Duration) -> Result<Phase> {
    let provider = Provider::start(options, think).await?;
    let scene = scene::Scene::open(host, &host.pool, options, provider.environment()).await?;
    let before = host.counters().await?;
    let runs = scene.start(options.runs, think).await?;
    scene.until_closed(&runs, PATIENCE).await?;
    let after = host.counters().await?;
    let provider_cpu = provider.cpu();
    let (failed_runs, recorded) = scene.what_became_of(&runs).await?;
    let measured = scene.close().await;
    let spans = provider.stop().await?;
    Ok(Phase { measured, spans, before, after, provider_cpu, failed_runs, recorded })
}
