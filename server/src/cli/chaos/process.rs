//! The processes under fire: workers and a server of this same program, started again whenever they end.

use anyhow::Context as _;
use std::{
    fs::File,
    os::unix::process::{CommandExt, ExitStatusExt},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};
use tokio::time::Instant;

/// Before a process that ended by itself is started again, as a supervisor would.
const AGAIN: Duration = Duration::from_millis(400);
/// A process that is asked to stop has that long.
const DRAIN: Duration = Duration::from_secs(30);
/// How often it is looked whether it has ended.
const LOOK: Duration = Duration::from_millis(50);
/// Variables that a process gets from ours: what it needs to find its tools.
const INHERITED: [&str; 3] = ["PATH", "HOME", "LOOPWRIGHT_PG_BIN"];

/// How to start a process.
pub(super) struct Recipe {
    pub(super) name: String,
    pub(super) arguments: Vec<String>,
    pub(super) environment: Vec<(&'static str, String)>,
}

/// A place for one process at a time. Dropping it kills what runs there.
pub(super) struct Process {
    recipe: Recipe,
    log: PathBuf,
    child: Option<Child>,
    /// Not before then.
    again: Instant,
    frozen_until: Option<Instant>,
    /// Times that it ended though nobody had killed it.
    pub(super) ended_by_itself: u32,
    /// Signals that ended it, none of them ours.
    pub(super) died: Vec<i32>,
}

impl Process {
    /// Nothing runs yet: [`Self::keep`] starts it.
    pub(super) fn new(recipe: Recipe, folder: &Path) -> Self {
        let log = folder.join(format!("{}.log", recipe.name));
        Self {
            recipe,
            log,
            child: None,
            again: Instant::now(),
            frozen_until: None,
            ended_by_itself: 0,
            died: Vec::new(),
        }
    }

    pub(super) fn name(&self) -> &str {
        &self.recipe.name
    }

    pub(super) fn log(&self) -> &Path {
        &self.log
    }

    /// Wakes it when it was frozen long enough, starts it where it has ended.
    pub(super) fn keep(&mut self) -> anyhow::Result<()> {
        let now = Instant::now();
        if self.frozen_until.is_some_and(|until| until <= now) {
            self.thaw();
        }
        if let Some(child) = &mut self.child {
            let Some(status) = child.try_wait()? else { return Ok(()) };
            self.died.extend(status.signal());
            (self.child, self.frozen_until) = (None, None);
            self.ended_by_itself += 1;
            self.again = now + AGAIN;
        }
        if self.again <= now {
            self.child = Some(self.spawn()?);
        }
        Ok(())
    }

    fn spawn(&self) -> anyhow::Result<Child> {
        let log = File::options().create(true).append(true).open(&self.log);
        let log = log.with_context(|| self.log.display().to_string())?;
        let mut command = Command::new(std::env::current_exe()?);
        command
            .args(&self.recipe.arguments)
            .env_clear()
            .envs(INHERITED.iter().filter_map(|name| Some((name, std::env::var_os(name)?))))
            .envs(self.recipe.environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            // Ctrl-C is for us.
            .process_group(0);
        // SAFETY: prctl is async-signal-safe and touches nothing of the parent.
        #[cfg(target_os = "linux")]
        unsafe {
            // It ends with us, however we end. Tied to the forking thread: ours is the program's first.
            command.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            });
        }
        command.spawn().with_context(|| format!("{} could not be started", self.recipe.name))
    }

    /// Whether it runs, and is not frozen.
    pub(super) fn is_up(&self) -> bool {
        self.child.is_some() && self.frozen_until.is_none()
    }

    /// SIGKILL; it is started again after `down`.
    pub(super) fn kill(&mut self, down: Duration) -> anyhow::Result<()> {
        if let Some(mut child) = self.child.take() {
            child.kill().with_context(|| format!("{} could not be killed", self.recipe.name))?;
            child.wait()?;
        }
        (self.frozen_until, self.again) = (None, Instant::now() + down);
        Ok(())
    }

    /// SIGSTOP; [`Self::keep`] sends SIGCONT after `time`.
    pub(super) fn freeze(&mut self, time: Duration) {
        self.signal(libc::SIGSTOP);
        self.frozen_until = Some(Instant::now() + time);
    }

    /// SIGCONT, if it is frozen.
    pub(super) fn thaw(&mut self) {
        if self.frozen_until.take().is_some() {
            self.signal(libc::SIGCONT);
        }
    }

    fn signal(&self, number: i32) {
        if let Some(child) = &self.child
            && let Ok(pid) = i32::try_from(child.id())
        {
            // SAFETY: our own child, not waited for yet, so the id is still its.
            unsafe { libc::kill(pid, number) };
        }
    }

    /// SIGTERM, and waits. True if it ended in good order and in time; otherwise it is killed.
    pub(super) async fn stop(&mut self) -> anyhow::Result<bool> {
        self.thaw();
        self.signal(libc::SIGTERM);
        let Some(child) = &mut self.child else { return Ok(true) };
        let deadline = Instant::now() + DRAIN;
        while Instant::now() < deadline {
            if let Some(status) = child.try_wait()? {
                self.child = None;
                return Ok(status.success());
            }
            tokio::time::sleep(LOOK).await;
        }
        self.kill(Duration::ZERO)?;
        Ok(false)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // On the way out through an error; there is nobody to tell any more.
        let _ = self.kill(Duration::ZERO);
    }
}
