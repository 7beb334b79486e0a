//! Measures the engine beside the physical limits of the same Postgres: every figure in one run, on one server with
//! `fsync` on, by the same driver. `cargo bench -p loopwright-engine` and `loopwright bench` are two doors to [`run`].
//!
//! ```text
//! run ─▶ host: server (given or our own) ─▶ database of its own ─────────────────────────────▶ dropped
//!                                              │
//!          limits: one insert a commit · the batch statement alone
//!          steps · fan_out · parked · signal · takeover ◀── process: workers as children (CPU, memory, kill -9)
//!                                              │
//!                                              ▼
//!                               report: figure · limit · ratio · goal
//! ```
//!
//! Latencies are read from the histories, by the database's clock; the one exception (signal to resumed step) is timed where
//! the signal is sent and the step starts, which is one process.
//!
//! A worker that is measured is a child process: this program again, with the variable [`CHILD`] set. So every program that
//! calls [`run`] must call [`child`] first.

mod fan_out;
mod host;
mod limits;
mod parked;
mod process;
mod report;
mod scene;
mod signal;
mod soak;
mod steps;
mod takeover;

pub use process::{CHILD, child, cpu_of, cpu_of_tree, postmaster_of};
pub use report::{Detail, Figure, Goal, Limit, Report, unfit};

use std::{ffi::OsString, path::PathBuf, time::Duration};

/// What to measure and how long.
#[derive(Clone, Debug)]
pub struct Options {
    /// A role that may create databases. Otherwise a server of our own, in `folder`.
    pub database_url: Option<String>,
    /// Where a server of our own keeps its data; removed afterwards. It should be on the disk that is to be measured.
    pub folder: PathBuf,
    /// How much of the ordinary amounts of work is done, in percent. 100 is meant to be quoted.
    pub percent: u32,
    /// Runs that are parked and wake at one instant.
    pub parked: usize,
    /// Also the long ones, each of this duration.
    pub soak: Option<Duration>,
    /// Arguments with which this program, started again, comes to [`child`].
    pub child_arguments: Vec<OsString>,
}

/// Runs that are parked: those that the goal speaks of.
pub const PARKED: usize = 100_000;
/// Runs that are parked by who has a minute and not ten: the goal is void then.
pub const PARKED_QUICK: usize = 10_000;
/// Length of a soak that is to be quoted.
pub const SOAK: Duration = Duration::from_secs(30 * 60);

impl Default for Options {
    fn default() -> Self {
        Self {
            database_url: None,
            folder: std::env::temp_dir(),
            percent: 100,
            parked: PARKED,
            soak: None,
            child_arguments: Vec::new(),
        }
    }
}

impl Options {
    /// An amount of work, at least one.
    fn share(&self, full: usize) -> usize {
        (full.saturating_mul(self.percent as usize) / 100).max(1)
    }
}

/// Why nothing was measured, or not all.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Engine(#[from] crate::Error),
    #[error(transparent)]
    Embedded(#[from] crate::embedded::Error),
    #[error("the database could not be prepared: {0}")]
    Migrate(#[from] crate::migrate::Error),
    /// A process or a file.
    #[error("{what}: {reason}")]
    Failed { what: &'static str, reason: String },
    /// Something took longer than it can take when all is well.
    #[error("{0} did not happen within {1} s; is the server overloaded?")]
    TooSlow(&'static str, u64),
}

impl From<sqlx::Error> for Error {
    fn from(error: sqlx::Error) -> Self {
        Self::Engine(crate::Error::Sql(error))
    }
}

impl Error {
    fn failed(what: &'static str, reason: impl ToString) -> Self {
        Self::Failed { what, reason: reason.to_string() }
    }
}

type Result<T> = std::result::Result<T, Error>;

/// Measures everything. `progress` hears, in a few words, what is being measured.
///
/// # Errors
/// When there is no server, when a worker cannot be started, or when something never comes to its end.
pub async fn run(options: &Options, progress: &dyn Fn(&str)) -> Result<Report> {
    let host = host::Host::prepare(options).await?;
    let measured = measure(&host, options, progress).await;
    // What was measured counts even if the server does not let go of its database.
    if let Err(error) = host.clean_up().await {
        tracing::warn!(%error, "the bench's database could not be removed");
    }
    measured
}

async fn measure(host: &host::Host, options: &Options, progress: &dyn Fn(&str)) -> Result<Report> {
    let (server, void) = host.describe(options.percent).await?;
    let mut report = Report { server, percent: options.percent, void, figures: Vec::new() };
    if options.soak.is_some() {
        soak::measure(host, options, progress, &mut report).await?;
        return Ok(report.judged());
    }
    progress("one insert per commit");
    let commit = limits::commit(host, options.share(2_000)).await?;
    report.figures.push(commit.figure());
    progress("steps of many runs");
    let (batch, single) = steps::many(host, options, &mut report).await?;
    progress("one step after the other");
    steps::sequential(host, options, &commit, &single, &mut report).await?;
    progress("fan-out and join");
    fan_out::measure(host, options, &commit, &mut report).await?;
    progress("signal to resumed step");
    signal::measure(host, options, &commit, &mut report).await?;
    progress("parked runs");
    parked::measure(host, options, &batch, progress, &mut report).await?;
    progress("kill -9 and takeover");
    takeover::measure(host, options, &commit, &mut report).await?;
    Ok(report.judged())
}
