//! The demo's worker: the ordinary `loopwright worker` as a child process, started, killed, asked to stop.

use crate::app::writable;
use anyhow::Context as _;
use std::{
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

/// Task queue of the demo's runs.
pub(super) const QUEUE: &str = "demo";
/// Lease of the demo's workers: a takeover should be seen, not waited for. In ms.
const LEASE_MS: u32 = 2_000;
/// A worker that is asked to stop has that long.
const DRAIN: Duration = Duration::from_secs(25);
/// How often it is looked whether it has ended.
const LOOK: Duration = Duration::from_millis(50);
/// Starts of a worker that keeps ending by itself.
const STARTS_MAX: u32 = 4;
/// End of a log that is shown when its worker ended by itself, in bytes.
const LOG_TAIL: usize = 2_000;

/// A place for one worker process at a time.
pub(super) struct Worker {
    /// Scratch of the workers; each start has a folder of its own, as if it were another machine.
    dir: PathBuf,
    config_file: Option<PathBuf>,
    database_url: String,
    rehearsed: bool,
    child: Option<Child>,
    starts: u32,
}

impl Worker {
    pub(super) fn new(dir: PathBuf, config_file: Option<&Path>, database_url: String, rehearsed: bool) -> Self {
        Self { dir, config_file: config_file.map(Path::to_owned), database_url, rehearsed, child: None, starts: 0 }
    }

    /// Starts a worker where none runs. What is worth telling, if one had ended by itself.
    ///
    /// # Errors
    /// It keeps ending by itself; the text holds the end of its log.
    pub(super) fn keep(&mut self) -> anyhow::Result<Option<String>> {
        let mut remark = None;
        if let Some(child) = &mut self.child {
            let Some(status) = child.try_wait()? else { return Ok(None) };
            self.child = None;
            // What it lacks it says in its log, and another start would lack it too.
            let lacks = status.code().is_some_and(|code| code != 0);
            anyhow::ensure!(!lacks && self.starts < STARTS_MAX, "the worker ended ({status}):\n{}", self.log_tail());
            remark = Some(format!("the worker ended by itself ({status}); another one starts"));
        }
        self.start()?;
        Ok(remark)
    }

    fn start(&mut self) -> anyhow::Result<()> {
        self.starts += 1;
        let dir = self.dir.join(format!("worker-{}", self.starts));
        writable(&dir)?;
        let log = std::fs::File::create(self.log()).with_context(|| self.log().display().to_string())?;
        let mut command = Command::new(std::env::current_exe()?);
        if let Some(file) = &self.config_file {
            command.arg("--config").arg(file);
        }
        command.arg("--data-dir").arg(&dir).args(["worker", "--queues", QUEUE]);
        if self.rehearsed {
            command.args(["--rehearsal", "demo"]);
        }
        command
            // By environment: a command line is for all to see.
            .env("DATABASE_URL", &self.database_url)
            .env("LOOPWRIGHT_WORKER_LEASE_MS", LEASE_MS.to_string())
            .env_remove("DATABASE_URL_FILE")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            // Ctrl-C is for us; we ask the worker to drain.
            .process_group(0);
        // SAFETY: prctl is async-signal-safe and touches nothing of the parent.
        unsafe {
            command.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM) {
                // The worker ends with us, however we end.
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            });
        }
        self.child = Some(command.spawn().context("the worker could not be started")?);
        Ok(())
    }

    /// Kills it with SIGKILL, if it runs.
    pub(super) fn kill(&mut self) -> anyhow::Result<()> {
        if let Some(mut child) = self.child.take() {
            child.kill().context("the worker could not be killed")?;
            child.wait()?;
        }
        Ok(())
    }

    /// Asks it to drain and waits; kills it when it takes too long.
    pub(super) async fn stop(&mut self) {
        let Some(child) = &mut self.child else { return };
        if let Ok(pid) = i32::try_from(child.id()) {
            // SAFETY: our own child, not waited for yet, so the id is still its.
            unsafe { libc::kill(pid, libc::SIGTERM) };
        }
        let deadline = tokio::time::Instant::now() + DRAIN;
        while child.try_wait().is_ok_and(|status| status.is_none()) && tokio::time::Instant::now() < deadline {
            tokio::time::sleep(LOOK).await;
        }
        // An error means that it has ended.
        let _ = self.kill();
    }

    fn log(&self) -> PathBuf {
        self.dir.join(format!("worker-{}.log", self.starts))
    }

    fn log_tail(&self) -> String {
        let text = String::from_utf8_lossy(&std::fs::read(self.log()).unwrap_or_default()).into_owned();
        let from = (text.len().saturating_sub(LOG_TAIL)..=text.len()).find(|i| text.is_char_boundary(*i)).unwrap_or(0);
        text[from..].trim().to_owned()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // On the way out through an error; there is nobody to tell any more.
        let _ = self.kill();
    }
}
