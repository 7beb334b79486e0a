//! One cluster: created once, served by a child of this process, shared with whoever finds it already running.

use super::{Error, Settings, account, account::Account, binaries, binaries::Binaries, default_data_dir};
use sqlx::{ConnectOptions, Connection, postgres::PgConnectOptions};
use std::{
    fs::{self, File},
    io,
    os::{fd::AsRawFd, unix::process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};
use tokio::sync::oneshot;

/// Superuser of the cluster. Nobody else can reach its socket.
const USER: &str = "loopwright";
/// Database of the product.
const DATABASE: &str = "loopwright";
/// Part of the socket's file name only: there is no TCP listener.
const PORT: u16 = 5432;
/// Longest socket path that the kernel takes, in bytes (`sun_path` is 108 with its end mark).
const SOCKET_PATH_MAX: usize = 107;
/// Longest wait for a start (crash recovery included) or for another process's shutdown. Chosen, not measured.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// Longest wait for a clean shutdown before it is left to finish alone. Chosen, not measured.
const STOP_TIMEOUT: Duration = Duration::from_secs(20);
/// Restarts of a supervised server that died, one after the other. Chosen: what it dies of five times in ten seconds, such as a full
/// disk, somebody has to mend.
const RESTARTS_MAX: u32 = 5;
/// Pause before the first of them; each next one is twice as long. A killed server's memory is free after a few milliseconds.
const RESTART_PAUSE: Duration = Duration::from_millis(250);
/// A server that has lived that long may die RESTARTS_MAX times again.
const STEADY: Duration = Duration::from_secs(60);
/// How often its keeper looks whether a server lives.
const LOOK: Duration = Duration::from_secs(1);
/// Pause between two looks at a server that is not ready yet. A start takes about 30 ms.
const READY_PAUSE: Duration = Duration::from_millis(15);

/// How a cluster is to behave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Survives a power cut.
    Durable,
    /// For one test process: nothing is ever synced to disk.
    #[cfg_attr(not(feature = "test-util"), expect(dead_code))]
    Throwaway,
}

/// A running server.
///
/// Dropping it asks the server to stop, if this process started it. Its end is also tied to that of the process.
#[derive(Debug)]
pub struct Server {
    url: String,
    pid: Arc<AtomicU32>,
    keeper: Option<mpsc::Sender<Request>>,
}

/// What a keeper is asked for.
#[derive(Debug)]
enum Request {
    /// Tell that it has ended.
    Stop(mpsc::SyncSender<()>),
    /// Restart it when it dies; tell when that is given up.
    Supervise(oneshot::Sender<Error>),
}

impl Server {
    /// Address of the product's database, for any Postgres client of the account that started the server.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }
    /// Process id of the server; another one after a restart.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid.load(Ordering::Relaxed)
    }
    /// From now on the server is started again when it dies, at most five times in a row with growing pauses; its address stays.
    /// Resolves when that is given up, with the reason of the last try; never, if this process did not start it or stops it.
    pub fn supervise(&self) -> impl Future<Output = Error> + Send + use<> {
        let (given_up, error) = oneshot::channel();
        if let Some(keeper) = &self.keeper {
            // A keeper that is gone has seen the server's end before anybody wanted it restarted, and drops the sender.
            let _ = keeper.send(Request::Supervise(given_up));
        }
        async move {
            match error.await {
                Ok(error) => error,
                Err(_) => std::future::pending().await,
            }
        }
    }
    /// Whether this process started it, as opposed to having found it running.
    #[must_use]
    pub fn is_ours(&self) -> bool {
        self.keeper.is_some()
    }
    /// Stops the server, if this process started it, and waits for its clean end (at most 20 s). Blocks.
    pub fn stop(mut self) {
        self.ask_to_stop(true);
    }

    fn ask_to_stop(&mut self, wait: bool) {
        let Some(keeper) = self.keeper.take() else { return };
        let (done, finished) = mpsc::sync_channel(1);
        // A keeper that is gone has nothing left to stop.
        if keeper.send(Request::Stop(done)).is_ok() && wait {
            // It answers within STOP_TIMEOUT; if not, the server finishes by itself.
            let _ = finished.recv_timeout(STOP_TIMEOUT + Duration::from_secs(1));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.ask_to_stop(false);
    }
}

/// Brings up the product's server, or finds the one that another process has brought up, and its database.
///
/// # Errors
/// Each says in one sentence what to do: no binaries, a data folder that cannot be used, data of another version.
pub async fn start(settings: Settings) -> Result<Server, Error> {
    let (sender, receiver) = oneshot::channel();
    launch(move || start_in_keeper(&settings), sender)?;
    receiver.await.map_err(|_| Error::failed("starting Postgres", "its keeper thread ended"))?
}

/// What a keeper has brought up.
pub(super) struct Up {
    pub url: String,
    pub pid: u32,
    /// `None` when it was found running.
    pub child: Option<Child>,
}

/// Runs `bring_up` in a thread that then lives as long as the server: the parent-death signal is bound to the
/// *thread* that forked, so no pool thread may do it.
pub(super) fn launch(
    mut bring_up: impl FnMut() -> Result<Up, Error> + Send + 'static,
    answer: oneshot::Sender<Result<Server, Error>>,
) -> Result<(), Error> {
    let body = move || {
        let up = match bring_up() {
            Ok(up) => up,
            Err(error) => {
                // Nobody waits for it any more: nothing was started either.
                let _ = answer.send(Err(error));
                return;
            }
        };
        let Up { url, pid, child } = up;
        let pid = Arc::new(AtomicU32::new(pid));
        let Some(child) = child else {
            let _ = answer.send(Ok(Server { url, pid, keeper: None }));
            return;
        };
        let (keeper, requests) = mpsc::channel();
        // If nobody takes the server, it is dropped here, which asks for the stop below.
        let _ = answer.send(Ok(Server { url, pid: pid.clone(), keeper: Some(keeper) }));
        Keeper { child, pid, requests, given_up: None }.keep(&mut bring_up);
    };
    std::thread::Builder::new()
        .name("postgres-keeper".into())
        .spawn(body)
        .map(drop)
        .map_err(|e| Error::failed("starting Postgres", e))
}

/// Holds the child until somebody asks for its end, or it ends by itself and is not to be started again.
struct Keeper {
    child: Child,
    pid: Arc<AtomicU32>,
    requests: mpsc::Receiver<Request>,
    /// It is supervised: who hears that it cannot be brought up.
    given_up: Option<oneshot::Sender<Error>>,
}

impl Keeper {
    fn keep(mut self, bring_up: &mut dyn FnMut() -> Result<Up, Error>) {
        let (mut began, mut restarts) = (Instant::now(), 0);
        while self.waits(LOOK) {
            let Ok(Some(status)) = self.child.try_wait() else { continue };
            if self.given_up.is_none() {
                tracing::error!(%status, "the embedded Postgres ended");
                return;
            }
            if began.elapsed() > STEADY {
                restarts = 0;
            }
            let mut reason = Error::failed("the embedded Postgres", format!("it ended {RESTARTS_MAX} times: {status}"));
            self.child = loop {
                if restarts >= RESTARTS_MAX {
                    tracing::error!(code = reason.code(), %reason, "the embedded Postgres cannot be kept up; given up");
                    if let Some(given_up) = self.given_up.take() {
                        // Whoever does not listen any more reads the log.
                        let _ = given_up.send(reason);
                    }
                    return;
                }
                let pause = RESTART_PAUSE * 2_u32.pow(restarts);
                restarts += 1;
                tracing::error!(%status, restarts, ?pause, "the embedded Postgres ended; it is started again");
                if !self.waits_out(pause) {
                    return;
                }
                match bring_up() {
                    Ok(Up { child: Some(child), .. }) => break child,
                    // Another process was faster and keeps it; this one has nothing to stop any more.
                    Ok(Up { child: None, pid, .. }) => {
                        self.pid.store(pid, Ordering::Relaxed);
                        while self.waits(LOOK) {}
                        return;
                    }
                    Err(error) => reason = error,
                }
            };
            began = Instant::now();
            self.pid.store(self.child.id(), Ordering::Relaxed);
            tracing::info!(pid = self.child.id(), "the embedded Postgres is there again");
        }
    }

    /// Answers requests for so long. False if the end was asked for, and then it has come.
    fn waits(&mut self, pause: Duration) -> bool {
        match self.requests.recv_timeout(pause) {
            Ok(Request::Stop(done)) => {
                interrupt(&mut self.child);
                // The asker may have given up waiting.
                let _ = done.send(());
                false
            }
            Ok(Request::Supervise(given_up)) => {
                self.given_up = Some(given_up);
                true
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                interrupt(&mut self.child);
                false
            }
            Err(mpsc::RecvTimeoutError::Timeout) => true,
        }
    }

    /// The same, and not shorter.
    fn waits_out(&mut self, pause: Duration) -> bool {
        let until = Instant::now() + pause;
        while let Some(rest) = until.checked_duration_since(Instant::now()).filter(|rest| !rest.is_zero()) {
            if !self.waits(rest) {
                return false;
            }
        }
        true
    }
}

/// Fast shutdown: sessions are ended, a checkpoint is written.
fn interrupt(child: &mut Child) {
    // One that has been waited for is gone, and its number may be another's.
    if !matches!(child.try_wait(), Ok(None)) {
        return;
    }
    signal(child.id(), libc::SIGINT);
    let deadline = Instant::now() + STOP_TIMEOUT;
    while Instant::now() < deadline {
        match child.try_wait() {
            Ok(None) => std::thread::sleep(READY_PAUSE),
            _ => return,
        }
    }
    tracing::warn!(pid = child.id(), "Postgres is still shutting down and is left to finish");
}

pub(super) fn signal(pid: u32, number: i32) {
    // A pid that does not fit was never one of ours.
    if let Ok(pid) = libc::pid_t::try_from(pid) {
        // SAFETY: sends a signal, touches no memory. A process that is gone is no error here.
        unsafe { libc::kill(pid, number) };
    }
}

/// Whether a process with this id exists, whoever owns it.
pub(super) fn alive(pid: u32) -> bool {
    let Ok(pid) = libc::pid_t::try_from(pid) else { return false };
    // SAFETY: signal 0 only checks.
    unsafe { libc::kill(pid, 0) == 0 || *libc_errno() == libc::EPERM }
}

/// Address of this thread's `errno`.
fn libc_errno() -> *mut libc::c_int {
    // SAFETY: both return a pointer that is valid for the thread's life.
    #[cfg(target_os = "linux")]
    unsafe {
        libc::__errno_location()
    }
    #[cfg(not(target_os = "linux"))]
    unsafe {
        libc::__error()
    }
}

/// An exclusive lock of a file, held until dropped; the kernel releases it when the process dies.
pub(super) struct FileLock(#[expect(dead_code, reason = "the open file is the lock")] File);

impl FileLock {
    pub(super) fn acquire(path: &Path) -> io::Result<Self> {
        let file = File::options().create(true).truncate(false).write(true).open(path)?;
        loop {
            // SAFETY: the descriptor is open for the call.
            if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX) } == 0 {
                return Ok(Self(file));
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }
}

/// The folders of one cluster.
pub(super) struct Layout {
    pub cluster: PathBuf,
    pub socket: PathBuf,
    pub log: PathBuf,
}

impl Layout {
    pub(super) fn of(root: &Path) -> Self {
        Self { cluster: root.join("cluster"), socket: root.join("socket"), log: root.join("log") }
    }
}

fn start_in_keeper(settings: &Settings) -> Result<Up, Error> {
    let data_dir = settings.data_dir.clone().unwrap_or_else(default_data_dir);
    let unwritable = |path: &Path, e: io::Error| Error::DataDir { path: path.to_owned(), reason: reason_of(&e) };
    let data_dir = absolute(&data_dir).map_err(|e| unwritable(&data_dir, e))?;
    fs::create_dir_all(&data_dir).map_err(|e| unwritable(&data_dir, e))?;
    // The lock stays with the folder's owner; Postgres itself never sees it.
    let _lock = FileLock::acquire(&data_dir.join("postgres.lock")).map_err(|e| unwritable(&data_dir, e))?;
    let root = data_dir.join("postgres");
    let layout = Layout::of(&root);
    if let Some(up) = running(&layout)? {
        return Ok(up);
    }
    let written = fs::read_to_string(layout.cluster.join("PG_VERSION")).ok().and_then(|t| t.trim().parse().ok());
    let binaries = binaries::find(settings, written)?;
    if let Some(data) = written.filter(|v| *v != binaries.major) {
        return Err(Error::Version { path: layout.cluster, data, binaries: binaries.major });
    }
    let account = account::choose()?;
    account::check_reach(&root, account.as_ref())?;
    account::private_dir(&root, account.as_ref()).map_err(|e| unwritable(&root, e))?;
    create(&binaries, &layout, account.as_ref(), Kind::Durable)?;
    serve(&binaries, &layout, account.as_ref(), Kind::Durable)
}

fn absolute(path: &Path) -> io::Result<PathBuf> {
    std::path::absolute(path)
}

/// The operating system's words without its number.
fn reason_of(error: &io::Error) -> String {
    error.to_string().split(" (os error").next().unwrap_or_default().to_lowercase()
}

/// Makes the cluster unless it is there. An interrupted creation is started over.
pub(super) fn create(binaries: &Binaries, layout: &Layout, account: Option<&Account>, kind: Kind) -> Result<(), Error> {
    let what = "creating the Postgres cluster";
    if layout.cluster.join("global/pg_control").exists() {
        return Ok(());
    }
    // initdb works beside the place and the finished cluster is moved in, so a half one is never taken for whole.
    let building = layout.cluster.with_extension("building");
    if building.exists() {
        fs::remove_dir_all(&building).map_err(|e| Error::failed(what, e))?;
    }
    account::private_dir(&building, account).map_err(|e| Error::failed(what, e))?;
    let mut command = account::command(&binaries.initdb(), account);
    command.arg("-D").arg(&building).args(["-U", USER, "--auth=trust", "--encoding=UTF8", "--no-instructions"]);
    command.arg(if cfg!(target_os = "linux") { "--locale=C.UTF-8" } else { "--locale=C" });
    command.arg(match kind {
        Kind::Durable => "--data-checksums",
        Kind::Throwaway => "--no-sync",
    });
    let output = command.stdin(Stdio::null()).output().map_err(|e| Error::failed(what, e))?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        return Err(Error::failed(what, last_lines(&text)));
    }
    fs::rename(&building, &layout.cluster).map_err(|e| Error::failed(what, e))
}

/// Starts the server as a direct child and waits until it answers.
pub(super) fn serve(binaries: &Binaries, layout: &Layout, account: Option<&Account>, kind: Kind) -> Result<Up, Error> {
    let what = "starting Postgres";
    let socket = socket_dir(layout, account)?;
    let log = File::options().create(true).append(true).open(&layout.log).map_err(|e| Error::failed(what, e))?;
    let log_start = log.metadata().map(|m| m.len()).unwrap_or(0);
    let log_err = log.try_clone().map_err(|e| Error::failed(what, e))?;
    let mut command = account::command(&binaries.postgres(), account);
    command.arg("-D").arg(&layout.cluster);
    for setting in settings_of(kind) {
        command.args(["-c", setting]);
    }
    command.arg("-c").arg(format!("unix_socket_directories={}", socket.display()));
    command.arg("-c").arg(format!("port={PORT}"));
    command.stdin(Stdio::null()).stdout(log).stderr(log_err).process_group(0);
    die_with_this_thread(&mut command);
    let mut child = command.spawn().map_err(|e| Error::failed(what, e))?;

    let deadline = Instant::now() + START_TIMEOUT;
    let probe = Probe::new()?;
    loop {
        if let Some(status) = child.try_wait().map_err(|e| Error::failed(what, e))? {
            let text = fs::read(&layout.log).unwrap_or_default();
            let tail = text.get(usize::try_from(log_start).unwrap_or(0)..).unwrap_or_default();
            return Err(Error::failed(what, format!("{status}: {}", last_lines(&String::from_utf8_lossy(tail)))));
        }
        if probe.answers(&socket) {
            break;
        }
        if Instant::now() > deadline {
            interrupt(&mut child);
            return Err(Error::failed(what, format!("not ready after {} s", START_TIMEOUT.as_secs())));
        }
        std::thread::sleep(READY_PAUSE);
    }
    probe.ensure_database(&socket).map_err(|e| Error::failed("creating the database", e))?;
    Ok(Up { url: url(&socket), pid: child.id(), child: Some(child) })
}

/// Asks the kernel to interrupt the child when the thread that forks it ends, whatever ends it.
fn die_with_this_thread(command: &mut std::process::Command) {
    #[cfg(target_os = "linux")]
    {
        let parent = std::process::id();
        // SAFETY: only system calls that are allowed between fork and exec, no memory is allocated.
        unsafe {
            command.pre_exec(move || {
                if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGINT) != 0 {
                    return Err(io::Error::last_os_error());
                }
                // The parent may have died before the request was in place.
                if u32::try_from(libc::getppid()).ok() != Some(parent) {
                    return Err(io::Error::from_raw_os_error(libc::ESRCH));
                }
                Ok(())
            });
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = command;
}

fn settings_of(kind: Kind) -> &'static [&'static str] {
    match kind {
        Kind::Durable => &[
            "listen_addresses=",
            "unix_socket_permissions=0700",
            // Server, workers, bot and command line of one machine, each with a pool.
            "max_connections=200",
            "timezone=UTC",
            "log_timezone=UTC",
            "log_checkpoints=off",
            "jit=off",
        ],
        Kind::Throwaway => &[
            "listen_addresses=",
            "unix_socket_permissions=0700",
            // Every test of a process has a pool of its own.
            "max_connections=300",
            "timezone=UTC",
            "log_timezone=UTC",
            "log_checkpoints=off",
            "jit=off",
            "fsync=off",
            "full_page_writes=off",
            "synchronous_commit=off",
            "shared_buffers=64MB",
            "max_wal_size=256MB",
            "autovacuum_naptime=600s",
        ],
    }
}

/// The socket's folder: beside the cluster, or a short private one where that path is too long for a socket.
fn socket_dir(layout: &Layout, account: Option<&Account>) -> Result<PathBuf, Error> {
    let what = "creating the socket folder";
    let fits = |dir: &Path| dir.join(format!(".s.PGSQL.{PORT}.lock")).as_os_str().len() < SOCKET_PATH_MAX;
    let dir = if fits(&layout.socket) {
        layout.socket.clone()
    } else {
        // Derived from the place, so that the next start finds the same one.
        let name =
            sqlx::types::Uuid::new_v5(&sqlx::types::Uuid::NAMESPACE_URL, layout.cluster.as_os_str().as_encoded_bytes());
        PathBuf::from(format!("/tmp/loopwright-{}", name.simple()))
    };
    account::private_dir(&dir, account).map_err(|e| Error::failed(what, format!("{}: {e}", dir.display())))?;
    Ok(dir)
}

fn url(socket: &Path) -> String {
    let host: String = socket
        .to_string_lossy()
        .bytes()
        .map(|b| {
            if b.is_ascii_alphanumeric() || b"/-_.".contains(&b) {
                char::from(b).to_string()
            } else {
                format!("%{b:02X}")
            }
        })
        .collect();
    format!("postgres:///{DATABASE}?host={host}&port={PORT}&user={USER}")
}

/// A server that already serves this cluster, brought up by another process.
fn running(layout: &Layout) -> Result<Option<Up>, Error> {
    let file = layout.cluster.join("postmaster.pid");
    let deadline = Instant::now() + START_TIMEOUT;
    let probe = Probe::new()?;
    loop {
        let Ok(text) = fs::read_to_string(&file) else { return Ok(None) };
        // Lines: process id, data folder, start time, port, socket folder.
        let mut lines = text.lines();
        let Some(pid) = lines.next().and_then(|l| l.trim().parse::<u32>().ok()) else { return Ok(None) };
        if !alive(pid) {
            return Ok(None);
        }
        if !is_postgres(pid) {
            // Another program has the number of a server that is gone. Postgres would refuse to start.
            fs::remove_file(&file).map_err(|e| Error::failed("removing a stale lock of Postgres", e))?;
            return Ok(None);
        }
        if let Some(socket) = lines.nth(3).filter(|s| !s.is_empty()) {
            let socket = PathBuf::from(socket);
            if probe.answers(&socket) {
                probe.ensure_database(&socket).map_err(|e| Error::failed("creating the database", e))?;
                return Ok(Some(Up { url: url(&socket), pid, child: None }));
            }
        }
        if Instant::now() > deadline {
            return Err(Error::failed(
                "waiting for the Postgres of another process",
                format!("process {pid} neither answers nor ends; end it with: kill -INT {pid}"),
            ));
        }
        std::thread::sleep(READY_PAUSE);
    }
}

/// Whether the process is a Postgres server. Where that cannot be seen it is taken for one.
fn is_postgres(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/comm")).map_or(true, |name| name.trim().starts_with("postgres"))
}

/// A small runtime of the keeper's own for asking a server whether it answers.
pub(super) struct Probe(tokio::runtime::Runtime);

impl Probe {
    pub(super) fn new() -> Result<Self, Error> {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map(Self)
            .map_err(|e| Error::failed("starting Postgres", e))
    }

    fn options(socket: &Path, database: &str) -> PgConnectOptions {
        PgConnectOptions::new_without_pgpass()
            .socket(socket)
            .port(PORT)
            .username(USER)
            .database(database)
            .disable_statement_logging()
    }

    /// A query, not just a connection: a server that is starting or stopping accepts and refuses.
    fn answers(&self, socket: &Path) -> bool {
        let ask = async {
            let mut conn = Self::options(socket, "postgres").connect().await?;
            sqlx::query("select 1").execute(&mut conn).await?;
            conn.close().await
        };
        self.0.block_on(async { tokio::time::timeout(Duration::from_secs(5), ask).await }).is_ok_and(|r| r.is_ok())
    }

    fn ensure_database(&self, socket: &Path) -> Result<(), sqlx::Error> {
        self.0.block_on(async {
            let mut conn = Self::options(socket, "postgres").connect().await?;
            let known: bool = sqlx::query_scalar("select exists (select from pg_database where datname = $1)")
                .bind(DATABASE)
                .fetch_one(&mut conn)
                .await?;
            if !known {
                sqlx::query("create database loopwright").execute(&mut conn).await?;
            }
            conn.close().await
        })
    }
}

/// The end of a program's complaint, as one line.
fn last_lines(text: &str) -> String {
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|l| !l.is_empty()).collect();
    lines[lines.len().saturating_sub(3)..].join(" / ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn folder(name: &str) -> PathBuf {
        let dir = PathBuf::from(format!("/tmp/loopwright-cluster-test-{}-{name}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o755)).unwrap();
        dir
    }

    async fn count(url: &str) -> i64 {
        let options: PgConnectOptions = url.parse().unwrap();
        let mut conn = options.connect().await.unwrap();
        sqlx::query("create table if not exists t (id int)").execute(&mut conn).await.unwrap();
        sqlx::query("insert into t values (1)").execute(&mut conn).await.unwrap();
        sqlx::query_scalar("select count(*) from t").fetch_one(&mut conn).await.unwrap()
    }

    #[tokio::test]
    async fn a_cluster_is_created_shared_stopped_and_found_again() {
        let dir = folder("life");
        let settings = Settings { data_dir: Some(dir.clone()), ..Settings::default() };
        // Two at once: one brings it up, the other finds it.
        let (first, second) = tokio::join!(start(settings.clone()), start(settings.clone()));
        let (first, second) = (first.unwrap(), second.unwrap());
        assert_eq!(first.pid(), second.pid());
        assert!(first.is_ours() != second.is_ours());
        assert_eq!(count(first.url()).await, 1);
        assert_eq!(count(second.url()).await, 2);
        let pid = first.pid();
        tokio::task::spawn_blocking(move || {
            first.stop();
            second.stop();
        })
        .await
        .unwrap();
        assert!(!alive(pid));
        let again = start(settings).await.unwrap();
        assert!(again.is_ours());
        assert_eq!(count(again.url()).await, 3);
        tokio::task::spawn_blocking(move || again.stop()).await.unwrap();
        fs::remove_dir_all(dir).unwrap();
    }

    #[tokio::test]
    async fn a_supervised_server_that_is_killed_is_there_again() {
        let dir = folder("killed");
        let server = start(Settings { data_dir: Some(dir.clone()), ..Settings::default() }).await.unwrap();
        let given_up = server.supervise();
        assert_eq!(count(server.url()).await, 1);
        let first = server.pid();
        signal(first, libc::SIGKILL);
        let back = async {
            while server.pid() == first {
                tokio::time::sleep(READY_PAUSE).await;
            }
        };
        tokio::time::timeout(START_TIMEOUT, back).await.unwrap();
        assert_eq!(count(server.url()).await, 2, "under the same address, with what was written");
        // What it cannot be started with any more.
        fs::write(dir.join("postgres/cluster/PG_VERSION"), "9\n").unwrap();
        signal(server.pid(), libc::SIGKILL);
        let error = tokio::time::timeout(START_TIMEOUT, given_up).await.unwrap();
        assert_eq!(error.code(), "postgres_version", "{error}");
        tokio::task::spawn_blocking(move || server.stop()).await.unwrap();
        fs::remove_dir_all(dir).unwrap();
    }

    #[tokio::test]
    async fn a_path_too_long_for_a_socket_still_works() {
        let dir = folder("long").join("x".repeat(100));
        let server = start(Settings { data_dir: Some(dir.clone()), ..Settings::default() }).await.unwrap();
        assert_eq!(count(server.url()).await, 1);
        let socket = PathBuf::from(server.url().split("host=").nth(1).unwrap().split('&').next().unwrap());
        tokio::task::spawn_blocking(move || server.stop()).await.unwrap();
        fs::remove_dir_all(dir.parent().unwrap()).unwrap();
        fs::remove_dir_all(socket).unwrap();
    }

    #[tokio::test]
    async fn a_data_folder_that_is_a_file_is_named_with_the_remedy() {
        let dir = folder("file");
        fs::write(dir.join("taken"), "x").unwrap();
        let settings = Settings { data_dir: Some(dir.join("taken")), ..Settings::default() };
        let error = start(settings).await.unwrap_err();
        assert_eq!(error.code(), "data_dir_unwritable");
        assert!(error.to_string().contains(super::super::ENV_DATA_DIR), "{error}");
        fs::remove_dir_all(dir).unwrap();
    }

    #[tokio::test]
    async fn data_of_another_version_is_refused_by_name() {
        let dir = folder("version");
        fs::create_dir_all(dir.join("postgres/cluster")).unwrap();
        fs::write(dir.join("postgres/cluster/PG_VERSION"), "9\n").unwrap();
        let error = start(Settings { data_dir: Some(dir.clone()), ..Settings::default() }).await.unwrap_err();
        assert_eq!(error.code(), "postgres_version", "{error}");
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn addresses_escape_what_a_url_cannot_hold() {
        assert_eq!(url(Path::new("/a b/c")), "postgres:///loopwright?host=/a%20b/c&port=5432&user=loopwright");
    }
}
