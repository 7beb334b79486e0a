//! Throwaway databases: one cluster per test process, one database per call.
//!
//! The cluster starts with the first call, never syncs, and ends with the process, however that ends. A set of
//! migrations is applied once, to a template; a database is a copy of it. Set `TEST_DATABASE_URL` to a role that may
//! create databases in order to use a server of your own instead.

use super::{
    Error, Settings, account, binaries,
    cluster::{self, Kind, Layout, Server},
};
use crate::migrate::{self, Migration};
use sqlx::{
    AssertSqlSafe, ConnectOptions, Connection, PgConnection, PgPool,
    postgres::{PgConnectOptions, PgPoolOptions},
};
use std::{
    fs,
    io::Write,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::{
        Mutex, OnceLock,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// Connections of one test's pool.
const POOL_MAX: u32 = 8;
/// Databases of earlier calls that are left alone even when nobody is connected: their tests may be about to connect.
const YOUNG: u64 = 24;
/// Databases of a shared server that are older than this and unused belong to test processes that were killed.
const ABANDONED: Duration = Duration::from_secs(3600);
/// Advisory lock under which templates and copies are made.
const LOCK: i64 = 0x6c77_7465_7374;
const FOLDER_PREFIX: &str = "loopwright-test-";

/// A fresh, migrated database of its own.
///
/// # Panics
/// When there is no Postgres: a test without a database cannot go on, and the message says what helps.
pub async fn database(migrations: &[Migration]) -> PgPool {
    match create(migrations).await {
        Ok(pool) => pool,
        Err(error) => panic!("no test database: {error}"),
    }
}

/// If it is set, a test that is left out fails instead: where everything is there, nothing passes silently. `.ci/run` sets it where
/// network namespaces can be made.
pub const ALL_TESTS: &str = "LOOPWRIGHT_ALL_TESTS";

/// Says that a test is left out, and why; past the harness, which keeps to itself what a test that passes prints.
///
/// # Panics
/// If [`ALL_TESTS`] is set.
pub fn left_out(test: &str, why: &str) {
    assert!(std::env::var_os(ALL_TESTS).is_none(), "{test} is left out, and {ALL_TESTS} is set: {why}");
    not_here(test, why);
}

/// The same of a test that needs what no machine has to have, such as a network around it: [`ALL_TESTS`] does not insist.
pub fn not_here(test: &str, why: &str) {
    // Whoever has closed it does not want to know.
    let _ = writeln!(std::io::stderr(), "LEFT OUT: {test}: {why}");
}

/// The address under which another process reaches the database of `pool`.
#[must_use]
pub fn url(pool: &PgPool) -> String {
    pool.connect_options().to_url_lossy().to_string()
}

/// A pool whose sessions stay: a database is given up when its last session ends.
fn pool(options: PgConnectOptions) -> PgPool {
    crate::transaction::pool(&options)
        .max_connections(POOL_MAX)
        .idle_timeout(None)
        .max_lifetime(None)
        .acquire_timeout(Duration::from_secs(30))
        .test_before_acquire(false)
        .connect_lazy_with(crate::transaction::session(options))
}

async fn create(migrations: &[Migration]) -> Result<PgPool, Error> {
    static CALLS: AtomicU64 = AtomicU64::new(0);
    let sql = |e: sqlx::Error| Error::failed("making a test database", e);
    let base = base().await?;
    let mut conn = base.connect().await.map_err(sql)?;
    sqlx::query("select pg_advisory_lock($1)").bind(LOCK).execute(&mut conn).await.map_err(sql)?;
    let template = template(&mut conn, &base, migrations).await?;
    let call = CALLS.fetch_add(1, Ordering::Relaxed);
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let name = format!("lw_test_{seconds}_{}_{call}", std::process::id());
    drop_unused(&mut conn, call, seconds).await.map_err(sql)?;
    execute(&mut conn, format!("create database {name} template {template}")).await.map_err(sql)?;
    let pool = pool(base.clone().database(&name));
    // One session from the beginning: a test may leave its database to other processes, and between two of them nobody
    // else would hold it.
    drop(pool.acquire().await.map_err(sql)?);
    // Ending the session releases the lock.
    conn.close().await.map_err(sql)?;
    Ok(pool)
}

async fn execute(conn: &mut PgConnection, sql: String) -> Result<(), sqlx::Error> {
    // Names are made here of digits and fixed letters.
    sqlx::query(AssertSqlSafe(sql)).persistent(false).execute(conn).await.map(drop)
}

/// The migrated template of this set, made if it is missing.
async fn template(conn: &mut PgConnection, base: &PgConnectOptions, migrations: &[Migration]) -> Result<String, Error> {
    let sql = |e: sqlx::Error| Error::failed("making a test template", e);
    let text: String = migrations.iter().map(|m| format!("{}\0{}\0{}\0", m.version, m.name, m.sql)).collect();
    let name = format!("lw_tpl_{}", &crate::ids::DefinitionHash::of(text.as_bytes()).to_string()[..16]);
    let known: bool = sqlx::query_scalar("select exists (select from pg_database where datname = $1)")
        .bind(&name)
        .fetch_one(&mut *conn)
        .await
        .map_err(sql)?;
    if known {
        return Ok(name);
    }
    let building = format!("{name}_b");
    execute(conn, format!("drop database if exists {building} with (force)")).await.map_err(sql)?;
    execute(conn, format!("create database {building}")).await.map_err(sql)?;
    let pool = PgPoolOptions::new().max_connections(1).connect_lazy_with(base.clone().database(&building));
    let result = migrate::run(&pool, migrations).await;
    pool.close().await;
    result.map_err(|e| Error::failed("making a test template", e))?;
    execute(conn, format!("alter database {building} rename to {name}")).await.map_err(sql)?;
    Ok(name)
}

/// Drops databases of tests that are over, so that a long suite does not fill the disk.
async fn drop_unused(conn: &mut PgConnection, call: u64, now: u64) -> Result<(), sqlx::Error> {
    let names: Vec<String> = sqlx::query_scalar(
        "select datname::text from pg_database d where datname like 'lw\\_test\\_%'
         and not exists (select from pg_stat_activity a where a.datid = d.oid) limit 64",
    )
    .fetch_all(&mut *conn)
    .await?;
    for name in names {
        let mut parts = name.trim_start_matches("lw_test_").split('_').filter_map(|p| p.parse::<u64>().ok());
        let (Some(at), Some(pid), Some(number)) = (parts.next(), parts.next(), parts.next()) else { continue };
        let over =
            if pid == u64::from(std::process::id()) { number + YOUNG < call } else { at + ABANDONED.as_secs() < now };
        if over {
            // Without force: a session that has just begun keeps its database, and another call tries again.
            let _ = execute(conn, format!("drop database if exists {name}")).await;
        }
    }
    Ok(())
}

/// Where databases are made: the server of `TEST_DATABASE_URL`, or this process's own cluster.
async fn base() -> Result<PgConnectOptions, Error> {
    static BASE: tokio::sync::OnceCell<PgConnectOptions> = tokio::sync::OnceCell::const_new();
    BASE.get_or_try_init(|| async {
        let (url, what) = match std::env::var("TEST_DATABASE_URL") {
            Ok(url) if !url.is_empty() => (url, "reading TEST_DATABASE_URL"),
            _ => (cluster_url().await?, "starting a test cluster"),
        };
        url.parse::<PgConnectOptions>()
            .map(|options| options.disable_statement_logging())
            .map_err(|e| Error::failed(what, e))
    })
    .await
    .cloned()
}

async fn cluster_url() -> Result<String, Error> {
    // Kept for ever: the server ends with the process.
    static SERVER: OnceLock<Mutex<Option<Server>>> = OnceLock::new();
    let (sender, receiver) = tokio::sync::oneshot::channel();
    cluster::launch(bring_up, sender)?;
    let server = receiver.await.map_err(|_| Error::failed("starting a test cluster", "its keeper thread ended"))??;
    let url = server.url().to_owned();
    SERVER_PID.store(server.pid(), Ordering::SeqCst);
    // SAFETY: the handler only sends a signal, waits, and removes a folder.
    unsafe { libc::atexit(clean_up) };
    SERVER.get_or_init(|| Mutex::new(Some(server)));
    Ok(url)
}

static SERVER_PID: AtomicU32 = AtomicU32::new(0);
static FOLDER: OnceLock<PathBuf> = OnceLock::new();

/// At the process's ordinary end: stops the server at once and removes its folder. After a kill the server stops by
/// itself and the next test process removes the folder.
extern "C" fn clean_up() {
    let pid = SERVER_PID.load(Ordering::SeqCst);
    cluster::signal(pid, libc::SIGQUIT);
    if let Ok(pid) = libc::pid_t::try_from(pid) {
        // SAFETY: waits for our child; if the keeper has reaped it, the call returns at once with an error.
        unsafe { libc::waitpid(pid, std::ptr::null_mut(), 0) };
    }
    if let Some(folder) = FOLDER.get() {
        // What stays is removed by the next test process.
        let _ = fs::remove_dir_all(folder);
    }
}

fn bring_up() -> Result<cluster::Up, Error> {
    let what = "making a test cluster";
    let account = account::choose()?;
    let binaries = binaries::find(&Settings::default(), None)?;
    let parent = parent(account.as_ref());
    remove_stale(&parent);
    let nanos = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().subsec_nanos();
    let root = parent.join(format!("{FOLDER_PREFIX}{}-{nanos:x}", std::process::id()));
    account::private_dir(&root, account.as_ref())
        .map_err(|e| Error::failed(what, format!("{}: {e}", root.display())))?;
    FOLDER.get_or_init(|| root.clone());
    let layout = Layout::of(&root);
    cluster::create(&binaries, &layout, account.as_ref(), Kind::Throwaway)?;
    cluster::serve(&binaries, &layout, account.as_ref(), Kind::Throwaway)
}

/// The temporary folder, unless the account of Postgres cannot get there or its path is too long for a socket.
fn parent(account: Option<&account::Account>) -> PathBuf {
    let dir = std::env::temp_dir();
    let short = dir.as_os_str().len() < 50;
    if short && account::check_reach(&dir.join("x"), account).is_ok() { dir } else { PathBuf::from("/tmp") }
}

/// Removes the folders of test processes that were killed.
fn remove_stale(parent: &Path) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let Some(rest) = name.to_str().and_then(|n| n.strip_prefix(FOLDER_PREFIX)) else { continue };
        let Some(pid) = rest.split('-').next().and_then(|p| p.parse::<u32>().ok()) else { continue };
        let owner = fs::read_to_string(entry.path().join("cluster/postmaster.pid"));
        let server = owner.ok().and_then(|text| text.lines().next()?.trim().parse::<u32>().ok());
        if !cluster::alive(pid) && !server.is_some_and(cluster::alive) {
            // Somebody else's leftovers may be out of our reach; they hurt nobody.
            let _ = fs::set_permissions(entry.path(), fs::Permissions::from_mode(0o700));
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const T: Migration = Migration { version: 1, name: "t", sql: "create table t (id int)" };

    #[tokio::test]
    async fn databases_do_not_see_each_other() {
        let (a, b) = tokio::join!(database(&[T]), database(&[T]));
        sqlx::query("insert into t values (1)").execute(&a).await.unwrap();
        let count: i64 = sqlx::query_scalar("select count(*) from t").fetch_one(&b).await.unwrap();
        assert_eq!(count, 0);
    }

    #[tokio::test]
    async fn another_process_reaches_the_database_by_its_address() {
        let pool = database(&[T]).await;
        let options: PgConnectOptions = url(&pool).parse().unwrap();
        let mut conn = options.connect().await.unwrap();
        let name: String = sqlx::query_scalar("select current_database()::text").fetch_one(&mut conn).await.unwrap();
        assert!(name.starts_with("lw_test_"), "{name}");
    }

    #[tokio::test]
    async fn a_long_suite_gives_its_databases_back() {
        let kept = database(&[]).await;
        let untouched = database(&[T]).await;
        sqlx::query("create table mine ()").execute(&kept).await.unwrap();
        for _ in 0..YOUNG + 8 {
            drop(database(&[]).await);
        }
        let left: i64 = sqlx::query_scalar("select count(*) from pg_database where datname like 'lw\\_test\\_%'")
            .fetch_one(&kept)
            .await
            .unwrap();
        // Other tests of this process add theirs.
        assert!(left < 2 * i64::try_from(YOUNG).unwrap() + 16, "{left}");
        sqlx::query("select * from mine").fetch_all(&kept).await.unwrap();
        sqlx::query("select * from t").fetch_all(&untouched).await.unwrap();
    }
}
