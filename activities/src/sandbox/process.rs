//! A started command: waited for, and ended with everything that it has started.

use super::Level;
use std::{
    io,
    process::{Child, Command, ExitStatus},
    sync::{Arc, Mutex, PoisonError},
};
use tokio::{sync::oneshot, task::JoinHandle};

/// Looks at the process table until nothing of a run is left; a fork bomb may need some.
const ROUNDS_MAX: u32 = 200;

/// A running command. Dropped, it is killed.
pub(super) struct Running {
    handle: Handle,
    end: JoinHandle<io::Result<ExitStatus>>,
}

/// The process that leads group and session, until it is reaped: then its number may be anybody's.
#[derive(Clone)]
struct Handle {
    leader: Arc<Mutex<Option<i32>>>,
    level: Level,
}

impl Running {
    /// Starts a command.
    ///
    /// The thread that forks is the one that waits, and lives as long as the command: the signal at a parent's death, which
    /// bubblewrap asks for, means the death of that thread.
    /// # Errors
    /// When it cannot be started.
    pub(super) async fn start(mut command: Command, level: Level) -> io::Result<Self> {
        let handle = Handle { leader: Arc::default(), level };
        let (tell, started) = oneshot::channel();
        let inner = handle.clone();
        let end = tokio::task::spawn_blocking(move || {
            let spawned = command.spawn();
            // Our copies of the write end must go, or the reader never sees the end.
            drop(command);
            let child = match spawned {
                Ok(child) => child,
                Err(error) => {
                    // Whoever asked may be gone.
                    drop(tell.send(Err(error)));
                    return Err(io::ErrorKind::NotFound.into());
                }
            };
            inner.leads(i32::try_from(child.id()).ok());
            if tell.send(Ok(())).is_err() {
                inner.kill();
            }
            inner.wait(child)
        });
        // Made before the answer is awaited, so that a caller who goes away meanwhile kills what has been started.
        let running = Self { handle, end };
        match started.await {
            Ok(Ok(())) => Ok(running),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(io::Error::other("the thread that starts commands is gone")),
        }
    }

    /// Kills everything of this run.
    pub(super) fn kill(&self) {
        self.handle.kill();
    }

    /// Waits for the end, after which nothing of the run is left. Can be awaited again if it was interrupted.
    pub(super) async fn ended(&mut self) -> io::Result<ExitStatus> {
        (&mut self.end).await.unwrap_or_else(|error| Err(io::Error::other(error)))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.handle.kill();
    }
}

impl Handle {
    fn leads(&self, id: Option<i32>) {
        *self.leader.lock().unwrap_or_else(PoisonError::into_inner) = id;
    }

    /// Waits for the leader, ends what it has left behind, and only then gives its number free.
    fn wait(&self, mut child: Child) -> io::Result<ExitStatus> {
        loop {
            // SAFETY: a plain system call; an all-zero siginfo_t is a valid one.
            let result = unsafe {
                let mut info: libc::siginfo_t = std::mem::zeroed();
                libc::waitid(libc::P_PID, child.id(), &raw mut info, libc::WEXITED | libc::WNOWAIT)
            };
            match io::Error::last_os_error() {
                error if result == -1 && error.kind() == io::ErrorKind::Interrupted => {}
                error if result == -1 => return Err(error),
                _ => break,
            }
        }
        self.kill();
        self.leads(None);
        child.wait()
    }

    fn kill(&self) {
        let leader = self.leader.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(id) = leader.filter(|id| *id > 1) else { return };
        // SAFETY: plain system calls. The leader is not reaped while we hold the lock, so the number is still its own.
        unsafe { libc::kill(-id, libc::SIGKILL) };
        if self.level == Level::Bubblewrap {
            // Its process table dies with it.
            return;
        }
        for _ in 0..ROUNDS_MAX {
            let left = session(id);
            if left.is_empty() {
                return;
            }
            for process in left {
                // SAFETY: as above; a process that ended meanwhile keeps its number for longer than this takes.
                unsafe { libc::kill(process, libc::SIGKILL) };
            }
            std::thread::yield_now();
        }
        tracing::warn!(session = id, "processes of a confined command could not be ended");
    }
}

/// Processes of a session that are not dead yet.
fn session(id: i32) -> Vec<i32> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let processes = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    processes
        .filter(|process| {
            let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
            // The name of the program, in parentheses, may hold anything: state, parent, group and session follow it.
            let mut fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace();
            let dead = matches!(fields.next(), None | Some("Z" | "X"));
            !dead && fields.nth(2).and_then(|session| session.parse::<i32>().ok()) == Some(id)
        })
        .collect()
}
