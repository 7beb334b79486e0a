//! The processes under fire: workers and a server of this same program, started again whenever they end.

use anyhow::Context as _;
use std::{
    fs::File,
    os::unix::process::{CommandExt, ExitStatusExt},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
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

/// Stopped by SIGSTOP.
#[derive(Clone, Copy)]
struct Frozen {
    since: Instant,
    until: Instant,
}

/// A place for one process at a time. Dropping it kills what runs there.
pub(super) struct Process {
    recipe: Recipe,
    log: PathBuf,
    child: Option<Child>,
    /// Not before then.
    again: Instant,
    frozen: Option<Frozen>,
    /// Times that it ended though nobody had killed it.
    pub(super) ended_by_itself: u32,
    /// Signals that ended it, none of them ours.
    pub(super) died: Vec<i32>,
}

impl Process {
    /// Nothing runs yet: [`Self::keep`] starts it.
    pub(super) fn new(recipe: Recipe, folder: &Path) -> Self {
        let log = folder.join(format!("{}.log", recipe.name));
        Self { recipe, log, child: None, again: Instant::now(), frozen: None, ended_by_itself: 0, died: Vec::new() }
    }

    pub(super) fn name(&self) -> &str {
        &self.recipe.name
    }

    pub(super) fn log(&self) -> &Path {
        &self.log
    }

    /// Starts it where it has ended.
    pub(super) fn keep(&mut self) -> anyhow::Result<()> {
        let now = Instant::now();
        if let Some(child) = &mut self.child {
            let Some(status) = child.try_wait()? else { return Ok(()) };
            self.ended(status);
            self.again = now + AGAIN;
        }
        if self.again <= now {
            self.child = Some(self.spawn()?);
        }
        Ok(())
    }

    /// It ended, and nobody here had killed it.
    fn ended(&mut self, status: ExitStatus) {
        self.died.extend(status.signal());
        (self.child, self.frozen) = (None, None);
        self.ended_by_itself += 1;
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

    /// Its process, as long as nobody has waited for it.
    pub(super) fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// Whether it runs, and is not frozen.
    pub(super) fn is_up(&self) -> bool {
        self.child.is_some() && self.frozen.is_none()
    }

    /// SIGKILL; it is started again after `down`. True if that is what ended it: not if nothing ran here, nor if it had just ended by
    /// itself.
    pub(super) fn kill(&mut self, down: Duration) -> anyhow::Result<bool> {
        let mut struck = false;
        if let Some(mut child) = self.child.take() {
            child.kill().with_context(|| format!("{} could not be killed", self.recipe.name))?;
            let status = child.wait()?;
            struck = status.signal() == Some(libc::SIGKILL);
            if !struck {
                self.ended(status);
            }
        }
        (self.frozen, self.again) = (None, Instant::now() + down);
        Ok(struck)
    }

    /// SIGSTOP; whoever looks after it sends SIGCONT when it [has slept enough](Self::has_slept_enough).
    pub(super) fn freeze(&mut self, time: Duration) {
        self.signal(libc::SIGSTOP);
        let since = Instant::now();
        self.frozen = Some(Frozen { since, until: since + time });
    }

    pub(super) fn has_slept_enough(&self) -> bool {
        self.frozen.is_some_and(|frozen| frozen.until <= Instant::now())
    }

    /// For how long it has been frozen, if the kernel says that it is stopped now: nobody else wakes it.
    pub(super) fn slept(&self) -> Option<Duration> {
        let (frozen, pid) = (self.frozen?, self.pid()?);
        // SAFETY: an all-zero siginfo_t is valid, the call fills it; nothing is waited away (WNOWAIT).
        let stopped = unsafe {
            let mut info: libc::siginfo_t = std::mem::zeroed();
            let what = libc::WSTOPPED | libc::WNOHANG | libc::WNOWAIT;
            libc::waitid(libc::P_PID, pid, &raw mut info, what) == 0 && info.si_code == libc::CLD_STOPPED
        };
        stopped.then(|| frozen.since.elapsed())
    }

    /// SIGCONT, if it is frozen.
    pub(super) fn thaw(&mut self) {
        if self.frozen.take().is_some() {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn asleep(child: Command) -> Process {
        let mut process = Process::new(
            Recipe { name: "sleeper".into(), arguments: Vec::new(), environment: Vec::new() },
            Path::new("/nonexistent"),
        );
        let mut child = child;
        process.child = Some(child.stdin(Stdio::null()).spawn().expect("a program"));
        process
    }

    fn sleeper() -> Command {
        let mut command = Command::new("sleep");
        command.arg("600");
        command
    }

    #[test]
    fn a_kill_strikes_what_lives_and_nothing_else() {
        let mut alive = asleep(sleeper());
        assert!(alive.kill(Duration::ZERO).expect("killed"));
        assert!(!alive.kill(Duration::ZERO).expect("nothing there"), "there was nothing left to kill");
        assert_eq!((alive.ended_by_itself, alive.died.len()), (0, 0));

        let mut gone = asleep(Command::new("true"));
        let pid = gone.pid().expect("a process");
        // It has ended, and nobody has waited for it: a signal still reaches its number.
        // SAFETY: as above; the exit is left to be waited for.
        unsafe {
            let mut info: libc::siginfo_t = std::mem::zeroed();
            assert_eq!(libc::waitid(libc::P_PID, pid, &raw mut info, libc::WEXITED | libc::WNOWAIT), 0);
        }
        assert!(!gone.kill(Duration::ZERO).expect("late"), "it had ended by itself");
        assert_eq!((gone.ended_by_itself, gone.died.len()), (1, 0));
    }

    #[test]
    fn only_what_is_stopped_has_slept() {
        let mut process = asleep(sleeper());
        assert_eq!(process.slept(), None, "nobody has frozen it");
        process.freeze(Duration::ZERO);
        let deadline = Instant::now() + Duration::from_secs(120);
        while process.slept().is_none() {
            assert!(Instant::now() < deadline, "SIGSTOP did not arrive");
            std::thread::yield_now();
        }
        assert!(process.has_slept_enough());
        // Somebody else wakes it.
        process.signal(libc::SIGCONT);
        while process.slept().is_some() {
            assert!(Instant::now() < deadline, "SIGCONT did not arrive");
            std::thread::yield_now();
        }
        process.thaw();
        assert!(process.is_up() && !process.has_slept_enough());
    }
}
