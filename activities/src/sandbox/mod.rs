//! Runs what models wrote, confined: no network, a read-only system, one writable folder, limits on everything.
//!
//! Level one is bubblewrap; where it is missing, landlock with seccomp; where neither works nothing runs, unless the
//! configuration asks for it by name. The evidence of a run names the level that was active.
//!
//! ```text
//! run ─▶ confine: argv, environment ─▶ before exec: session · mounts of toolchains (root only) · limits · user · rules
//!   ├──▶ process: waits, and ends everything that was started ─┐
//!   └──▶ output: hashed whole, tail kept ──────────────────────┴─▶ Evidence
//! ```

mod confine;
mod output;
mod owner;
mod process;
mod rules;

pub(crate) use owner::remove;

use confine::{Plan, Prepared};
use loopwright_engine::Failure;
use process::Running;
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    os::unix::process::ExitStatusExt,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio_util::sync::CancellationToken;

/// Wait for the end of the output after everything was killed: the kernel closes files within milliseconds.
const OUTPUT_END_WAIT: Duration = Duration::from_secs(10);

/// How well a run was confined.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    /// Namespaces: no network, own process table, read-only system.
    Bubblewrap,
    /// File rules by landlock, system calls by seccomp; shares the process table.
    Landlock,
    /// Asked for by name in the configuration.
    Unconfined,
}

/// Bounds of one run.
#[derive(Clone, Debug)]
pub struct Limits {
    pub wall: Duration,
    /// CPU time of one process, seconds.
    pub cpu_seconds: u64,
    /// Address space of one process, bytes. Linkers map much; this stops runaways.
    pub memory_bytes: u64,
    /// Largest file, bytes.
    pub file_bytes: u64,
    /// Processes and threads. For root's sandboxes; a user's other processes count too, so theirs is larger.
    pub processes: u64,
    /// End of the output that is kept, bytes.
    pub tail_bytes: usize,
    /// Output beyond which the run is stopped, bytes.
    pub output_bytes_max: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            wall: Duration::from_secs(300),
            cpu_seconds: 300,
            memory_bytes: 8 << 30,
            file_bytes: 512 << 20,
            processes: 512,
            tail_bytes: 16 << 10,
            output_bytes_max: 64 << 20,
        }
    }
}

/// How a sandbox is set up.
#[derive(Clone, Debug, Default)]
pub struct SandboxConfig {
    /// Run without confinement where none works. Never a default.
    pub unconfined: bool,
    /// Skip level one (tests, and machines where it misbehaves).
    pub forbid_bubblewrap: bool,
    /// Read-only folders beside the system's, such as toolchains in a home folder.
    pub extra_toolchains: Vec<PathBuf>,
}

/// One command.
#[derive(Clone, Debug)]
pub struct SandboxCommand {
    /// Run by `sh -c`.
    pub script: String,
    /// The one writable folder; current folder of the command.
    pub dir: PathBuf,
    pub env: BTreeMap<String, String>,
    pub limits: Limits,
    /// Leave the network open.
    pub network: bool,
}

/// What a run left behind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Evidence {
    /// `None` if it was killed.
    pub exit_code: Option<i32>,
    pub signal: Option<i32>,
    pub timed_out: bool,
    pub duration_ms: u64,
    /// The end of standard output and error together.
    pub output_tail: String,
    pub output_bytes: u64,
    /// Of the whole output, 64 hex digits.
    pub log_sha256: String,
    pub level: Level,
}

/// No sandbox can be had.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    #[error(
        "generated code cannot be confined on this machine (bubblewrap: {bubblewrap}; landlock: {landlock}); install it with: \
         apt-get install bubblewrap, or allow running without by sandbox.unconfined: true in the configuration"
    )]
    None { bubblewrap: String, landlock: String },
}

/// Runs commands at the best level that works here. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Sandbox {
    level: Level,
    toolchains: Arc<Vec<confine::Toolchain>>,
}

impl Sandbox {
    /// Finds the best level by trying each one.
    ///
    /// # Errors
    /// [`SandboxError::None`], naming why each level failed and what helps.
    pub fn detect(config: SandboxConfig) -> Result<Self, SandboxError> {
        let toolchains = Arc::new(confine::toolchains(&config.extra_toolchains));
        let attempt = |level| {
            let sandbox = Self { level, toolchains: toolchains.clone() };
            sandbox.probe().map(|()| sandbox)
        };
        let bubblewrap =
            if config.forbid_bubblewrap { Err("switched off".to_owned()) } else { attempt(Level::Bubblewrap) };
        let bubblewrap = match bubblewrap {
            Ok(sandbox) => return Ok(sandbox),
            Err(why) => why,
        };
        let landlock = match attempt(Level::Landlock) {
            Ok(sandbox) => return Ok(sandbox),
            Err(why) => why,
        };
        if config.unconfined {
            tracing::warn!("generated code runs unconfined, as the configuration asks");
            return Ok(Self { level: Level::Unconfined, toolchains });
        }
        Err(SandboxError::None { bubblewrap, landlock })
    }

    /// The level that is active.
    #[must_use]
    pub fn level(&self) -> Level {
        self.level
    }

    /// Folders in which confined commands look for programs, as they are called on this machine.
    #[must_use]
    pub fn program_folders(&self) -> Vec<PathBuf> {
        let system = ["/usr/local/bin", "/usr/bin", "/bin"].map(PathBuf::from);
        self.toolchains.iter().map(confine::Toolchain::programs).chain(system).collect()
    }

    /// Runs `true` at this level.
    fn probe(&self) -> Result<(), String> {
        let dir = tempfile::Builder::new().prefix("loopwright-probe-").tempdir().map_err(|e| e.to_string())?;
        let command = SandboxCommand {
            script: "true".into(),
            dir: dir.path().to_path_buf(),
            env: BTreeMap::new(),
            limits: Limits::default(),
            network: false,
        };
        let plan = Plan { level: self.level, toolchains: &self.toolchains, command: &command };
        let Prepared { mut command, reader, keep: _keep } = confine::prepare(&plan)?;
        let mut child = command.spawn().map_err(|e| e.to_string())?;
        drop(command);
        let text = std::io::read_to_string(reader).unwrap_or_default();
        let status = child.wait().map_err(|e| e.to_string())?;
        if status.success() {
            return Ok(());
        }
        Err(format!("{status}: {}", text.trim().lines().last().unwrap_or("no output")))
    }

    /// Runs a command to its end, its limits or its cancellation.
    ///
    /// # Errors
    /// `cancelled`; `sandbox.failed` when the command cannot even be started. A command that fails is no failure: see
    /// [`Evidence`].
    pub async fn run(&self, command: SandboxCommand, cancel: &CancellationToken) -> Result<Evidence, Failure> {
        let broken =
            |what: String| Failure::retryable("transient.sandbox", format!("the sandbox cannot start: {what}"));
        let (sandbox, wanted) = (self.clone(), command.clone());
        let preparing = tokio::task::spawn_blocking(move || {
            confine::prepare(&Plan { level: sandbox.level, toolchains: &sandbox.toolchains, command: &wanted })
        });
        let prepared = preparing.await.map_err(|e| broken(e.to_string()))?;
        let Prepared { command: process, reader, keep } = prepared.map_err(broken)?;
        let started = Instant::now();
        let mut running = Running::start(process, self.level).await.map_err(|e| broken(e.to_string()))?;
        let (tail, most) = (command.limits.tail_bytes, command.limits.output_bytes_max);
        let (stop, flooded) = tokio::sync::oneshot::channel();
        let reading = tokio::task::spawn_blocking(move || output::read(reader, tail, most, stop));
        let (mut timed_out, mut cancelled) = (false, false);
        let early = tokio::select! {
            status = running.ended() => Some(status),
            () = tokio::time::sleep(command.limits.wall) => { timed_out = true; None }
            () = cancel.cancelled() => { cancelled = true; None }
            Ok(()) = flooded => None,
        };
        let status = match early {
            Some(status) => status,
            None => {
                running.kill();
                running.ended().await
            }
        };
        // Nothing of it is left, so the output has ended.
        let log = tokio::time::timeout(OUTPUT_END_WAIT, reading)
            .await
            .map_err(|_| broken("something still holds the output of a command that was ended".to_owned()))?
            .map_err(|e| broken(e.to_string()))?;
        drop(keep);
        if cancelled {
            return Err(Failure::cancelled());
        }
        let status = status.map_err(|e| broken(e.to_string()))?;
        Ok(Evidence {
            exit_code: status.code(),
            signal: status.signal(),
            timed_out,
            duration_ms: u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
            output_tail: log.tail,
            output_bytes: log.bytes,
            log_sha256: log.sha256,
            level: self.level,
        })
    }
}
