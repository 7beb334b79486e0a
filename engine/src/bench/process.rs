//! Workers as processes of their own, and what the operating system knows of a process.

use super::{
    Error, Options, Result,
    host::{self, Host},
    scene,
};
use crate::worker::{self, WorkerConfig};
use futures_util::future::try_join_all;
use serde::{Deserialize, Serialize};
use std::{io::Read, process::Stdio, time::Duration};
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, ChildStdin, Command},
};

/// Makes this program a worker: JSON of what it is to do. With an underscore: what begins with the product's name is
/// configuration, and an unknown one is refused.
pub const CHILD: &str = "_LOOPWRIGHT_BENCH_WORKER";
/// Longest wait for a child to register.
const START_PATIENCE: Duration = Duration::from_secs(30);
/// Longest wait for a child to hand its runs back.
const DRAIN: Duration = Duration::from_secs(10);

#[derive(Serialize, Deserialize)]
struct Task {
    url: String,
    /// Opens the connections and does nothing with them.
    idle: bool,
    slots: u32,
    lease_ms: u64,
}

/// If this process was started as a worker of a bench: works until its standard input ends, then true.
///
/// # Errors
/// When the worker cannot start.
pub async fn child() -> Result<bool> {
    let Ok(text) = std::env::var(CHILD) else { return Ok(false) };
    let task: Task =
        serde_json::from_str(&text).map_err(|e| Error::failed("reading the task of a worker process", e))?;
    let pool = host::pool(task.url.parse().map_err(Error::from)?);
    if task.idle {
        let opened = try_join_all((0..host::POOL_MAX).map(|_| async {
            let mut conn = pool.acquire().await?;
            sqlx::query("select 1").execute(&mut *conn).await?;
            Ok::<_, sqlx::Error>(conn)
        }));
        // All at once: each has a connection of its own.
        drop(opened.await?);
        println!("ready");
        parents_word().await;
        return Ok(true);
    }
    let mut config = WorkerConfig::new(pool, scene::registry());
    (config.slots, config.lease) = (task.slots, Duration::from_millis(task.lease_ms));
    let worker = worker::start(config).await?;
    println!("ready");
    tokio::select! {
        () = parents_word() => {}
        () = worker.fenced() => {}
    }
    worker.drain(DRAIN).await;
    Ok(true)
}

/// Waits until the parent says that it is over, or is gone.
async fn parents_word() {
    // A thread: the runtime would wait for a blocking read at its own end.
    let (ended, end) = tokio::sync::oneshot::channel::<()>();
    std::thread::spawn(move || {
        let mut ignored = Vec::new();
        // An error ends the wait as the end of input does.
        let _ = std::io::stdin().read_to_end(&mut ignored);
        drop(ended);
    });
    // Nothing is ever sent: the other half is dropped when the input has ended.
    let _ = end.await;
}

/// A worker in a process of its own.
pub(super) struct Worker {
    child: Child,
    // Its end is the child's signal to leave.
    stdin: Option<ChildStdin>,
    pub(super) pid: u32,
}

impl Worker {
    /// Starts one and waits until it works.
    pub(super) async fn start(host: &Host, options: &Options, slots: u32, lease: Duration) -> Result<Self> {
        let lease_ms = u64::try_from(lease.as_millis()).unwrap_or(u64::MAX);
        Self::spawn(options, &Task { url: host.url(), idle: false, slots, lease_ms }).await
    }

    /// No worker, but what it would be without the engine: this program, its runtime, its driver and as many open connections.
    pub(super) async fn idle(host: &Host, options: &Options) -> Result<Self> {
        Self::spawn(options, &Task { url: host.url(), idle: true, slots: 0, lease_ms: 0 }).await
    }

    async fn spawn(options: &Options, task: &Task) -> Result<Self> {
        let what = "starting a worker process";
        let mut child = Command::new(std::env::current_exe().map_err(|e| Error::failed(what, e))?)
            .args(&options.child_arguments)
            .env(CHILD, serde_json::to_string(task).map_err(|e| Error::failed(what, e))?)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(|e| Error::failed(what, e))?;
        let stdin = child.stdin.take();
        let stdout = child.stdout.take().ok_or_else(|| Error::failed(what, "it has no output"))?;
        let mut line = String::new();
        let mut reader = BufReader::new(stdout);
        let ready = tokio::time::timeout(START_PATIENCE, reader.read_line(&mut line)).await;
        if !matches!(ready, Ok(Ok(_))) || line.trim() != "ready" {
            return Err(Error::failed(what, format!("it said {line:?} and not that it is ready")));
        }
        let pid = child.id().ok_or_else(|| Error::failed(what, "it has ended"))?;
        Ok(Self { child, stdin, pid })
    }

    /// Lets it hand back what it has, and waits for its end.
    pub(super) async fn stop(mut self) -> Result<()> {
        drop(self.stdin.take());
        self.child.wait().await.map(drop).map_err(|e| Error::failed("waiting for a worker process", e))
    }

    /// `kill -9`, and waits until the process is gone.
    pub(super) async fn kill(mut self) -> Result<()> {
        self.child.kill().await.map_err(|e| Error::failed("killing a worker process", e))
    }

    /// Processor time that it has used.
    pub(super) fn cpu(&self) -> f64 {
        stat(self.pid).map_or(f64::NAN, |s| s.cpu.as_secs_f64())
    }

    /// (resident now, most ever resident), in MB.
    pub(super) fn memory_mb(&self) -> (f64, f64) {
        let text = std::fs::read_to_string(format!("/proc/{}/status", self.pid)).unwrap_or_default();
        let field = |name: &str| {
            let line = text.lines().find_map(|l| l.strip_prefix(name))?;
            line.trim_start_matches(':').trim().trim_end_matches(" kB").parse::<f64>().ok()
        };
        let of = |name| field(name).map_or(f64::NAN, |kb| kb / 1024.0);
        (of("VmRSS"), of("VmHWM"))
    }
}

struct Stat {
    name: String,
    parent: u32,
    /// Its own.
    cpu: Duration,
    /// Of children that have ended.
    ended: Duration,
}

/// Reads `/proc/<pid>/stat`. `None` where there is none.
fn stat(pid: u32) -> Option<Stat> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (head, tail) = text.rsplit_once(") ")?;
    let fields: Vec<&str> = tail.split(' ').collect();
    // SAFETY: asks for a constant.
    let hertz = u64::try_from(unsafe { libc::sysconf(libc::_SC_CLK_TCK) }).ok().filter(|h| *h > 0)?;
    // Field 3 of the manual is the first one here.
    let ticks = |i: usize| fields.get(i - 3)?.parse::<u64>().ok();
    let time = |a: u64, b: u64| Duration::from_millis((a + b) * 1000 / hertz);
    Some(Stat {
        name: head.split_once('(')?.1.to_owned(),
        parent: fields.get(1)?.parse().ok()?,
        cpu: time(ticks(14)?, ticks(15)?),
        ended: time(ticks(16)?, ticks(17)?),
    })
}

/// Processor time that a process has used, without its children.
#[must_use]
pub fn cpu_of(pid: u32) -> Option<Duration> {
    stat(pid).map(|stat| stat.cpu)
}

/// The server's first process, from one of its backends; `None` if the server is on another machine.
#[must_use]
pub fn postmaster_of(backend: u32) -> Option<u32> {
    let is_postgres = |s: &Stat| s.name.starts_with("postgres");
    let parent = stat(backend).filter(is_postgres)?.parent;
    stat(parent).filter(is_postgres)?;
    Some(parent)
}

/// Processor time of this process, in seconds.
pub(super) fn cpu_of_this() -> f64 {
    stat(std::process::id()).map_or(f64::NAN, |s| s.cpu.as_secs_f64())
}

/// Processor time of this thread, to the nanosecond.
pub(super) fn cpu_of_thread() -> Result<Duration> {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: it writes into the struct and keeps nothing of it.
    if unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) } != 0 {
        return Err(Error::failed("reading the processor time of a thread", std::io::Error::last_os_error()));
    }
    Ok(Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0)))
}

/// Processor time of a process and of its children, those that have ended included.
#[must_use]
pub fn cpu_of_tree(root: u32) -> Option<Duration> {
    let own = stat(root)?;
    let children = std::fs::read_dir("/proc").ok()?.flatten().filter_map(|entry| {
        let child = stat(entry.file_name().to_str()?.parse().ok()?)?;
        (child.parent == root).then_some(child.cpu)
    });
    Some(own.cpu + own.ended + children.sum::<Duration>())
}
