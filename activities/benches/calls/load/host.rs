//! Postgres, the processors, the clock: what is measured on, and the counters of it.

use super::{Options, Result, scene};
use loopwright_activities::{MIGRATIONS, billing::audit};
use loopwright_engine::{
    bench::{cpu_of, cpu_of_tree, postmaster_of, unfit},
    embedded::{self, Server},
    migrate, transaction,
};
use sqlx::{
    ConnectOptions, Connection, PgPool,
    postgres::{PgConnectOptions, PgPoolOptions},
};
use std::{
    io,
    path::PathBuf,
    time::{Duration, Instant},
};
use tokio::task::JoinSet;
use uuid::Uuid;

/// Connections of a worker, as the product has them.
const POOL: u32 = 20;

pub struct Host {
    server: Server,
    folder: PathBuf,
    pub pool: PgPool,
    postmaster: Option<u32>,
    /// Users with a project each.
    pub users: Vec<(Uuid, Uuid)>,
}

/// Differences of two mean something.
#[derive(Clone, Copy)]
pub struct Counters {
    pub commits: i64,
    pub deadlocks: i64,
    pub wal_bytes: i64,
    pub postgres_cpu: Duration,
    pub worker_cpu: Duration,
}

impl Host {
    /// Brings up a server of its own with `fsync` on.
    pub async fn prepare(options: &Options) -> Result<Self> {
        let folder = options.folder.join(format!("loopwright-calls-{}", std::process::id()));
        let settings = embedded::Settings { data_dir: Some(folder.clone()), ..embedded::Settings::default() };
        let server = embedded::start(settings).await?;
        let connect: PgConnectOptions = server.url().parse()?;
        let pool = PgPoolOptions::new()
            .max_connections(POOL)
            .acquire_timeout(Duration::from_secs(60))
            .test_before_acquire(false)
            .connect_lazy_with(transaction::session(connect).disable_statement_logging());
        migrate::run(&pool, MIGRATIONS).await?;
        let backend: i32 = sqlx::query_scalar("select pg_backend_pid()").fetch_one(&pool).await?;
        let postmaster = u32::try_from(backend).ok().and_then(postmaster_of);
        let users = scene::users(&pool).await?;
        Ok(Self { server, folder, pool, postmaster, users })
    }

    /// Ends the server and removes its data.
    pub async fn clean_up(self) -> Result<()> {
        self.pool.close().await;
        let Self { server, folder, .. } = self;
        tokio::task::spawn_blocking(move || server.stop()).await?;
        Ok(std::fs::remove_dir_all(folder)?)
    }

    /// Version and durability of the server, processors, and how busy they were before; and why nothing counts that is measured there.
    pub async fn describe(&self, options: &Options) -> Result<(String, Vec<String>)> {
        let (version, fsync, commit): (String, String, String) = sqlx::query_as(
            "select current_setting('server_version'), current_setting('fsync'), current_setting('synchronous_commit')",
        )
        .fetch_one(&self.pool)
        .await?;
        let cores = match options.cores {
            Some(_) => format!("{} processors, by affinity", std::thread::available_parallelism()?),
            None => format!("{} processors, not confined", std::thread::available_parallelism()?),
        };
        let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
        let load = load.split(' ').next().unwrap_or("?").to_owned();
        let server = format!(
            "PostgreSQL {version}, fsync {fsync}, synchronous_commit {commit}, {cores}, load average {load} before; \
             {} runs of {} calls in each phase, {} users, {} % of the requests spoiled, the provider on the same processors",
            options.runs,
            options.calls,
            self.users.len(),
            options.faults_percent
        );
        Ok((server, unfit(&fsync, &commit, options.percent())))
    }

    /// What a call writes at least, and nothing else happening: a row and its commit, twice, on one connection. Milliseconds,
    /// sorted.
    pub async fn pairs_of_commits(&self, pairs: usize) -> Result<Vec<f64>> {
        let mut conn = self.pool.acquire().await?;
        let create =
            "create table limit_of_commits (n bigint generated always as identity primary key, body text not null)";
        sqlx::query(create).execute(&mut *conn).await?;
        let body = "x".repeat(300);
        let mut took = Vec::with_capacity(pairs);
        for pair in 0..pairs + 10 {
            let begun = Instant::now();
            for _ in 0..2 {
                sqlx::query("insert into limit_of_commits (body) values ($1)").bind(&body).execute(&mut *conn).await?;
            }
            // The first ones prepare the statement.
            if pair >= 10 {
                took.push(begun.elapsed().as_secs_f64() * 1e3);
            }
        }
        took.sort_by(f64::total_cmp);
        Ok(took)
    }

    /// The same pairs as calls make them: one begins every `pace`, whatever became of the one before, on the connections of a worker, and
    /// is timed from when it begins, as calls are. So a disk that stands still now and then is met about as often as calls meet it; one
    /// after another, in a second or two, they may miss it. Milliseconds, sorted.
    pub async fn pairs_of_commits_at(&self, pairs: usize, pace: Duration) -> Result<Vec<f64>> {
        let body = "x".repeat(300);
        // Whichever connection a pair gets has prepared the statement.
        let mut all = Vec::new();
        for _ in 0..POOL {
            let mut conn = self.pool.acquire().await?;
            sqlx::query("insert into limit_of_commits (body) values ($1)").bind(&body).execute(&mut *conn).await?;
            all.push(conn);
        }
        drop(all);
        let begun = Instant::now();
        let mut under_way = JoinSet::new();
        for pair in 0..pairs {
            tokio::time::sleep(pace.mul_f64(pair as f64).saturating_sub(begun.elapsed())).await;
            let (pool, body) = (self.pool.clone(), body.clone());
            under_way.spawn(async move {
                let begun = Instant::now();
                for _ in 0..2 {
                    sqlx::query("insert into limit_of_commits (body) values ($1)").bind(&body).execute(&pool).await?;
                }
                Ok::<_, sqlx::Error>(begun.elapsed().as_secs_f64() * 1e3)
            });
        }
        let mut took = Vec::with_capacity(pairs);
        while let Some(pair) = under_way.join_next().await {
            took.push(pair??);
        }
        took.sort_by(f64::total_cmp);
        Ok(took)
    }

    /// The way to Postgres and back with nothing to do there, on one connection. Milliseconds, sorted.
    pub async fn round_trips(&self, trips: usize) -> Result<Vec<f64>> {
        let mut conn = self.pool.acquire().await?;
        let mut took = Vec::with_capacity(trips);
        for _ in 0..trips {
            let begun = Instant::now();
            conn.ping().await?;
            took.push(begun.elapsed().as_secs_f64() * 1e3);
        }
        took.sort_by(f64::total_cmp);
        Ok(took)
    }

    pub async fn counters(&self) -> Result<Counters> {
        // Backends write down what they counted when they rest, and at most once a second.
        tokio::time::sleep(Duration::from_millis(1_100)).await;
        let (commits, deadlocks, wal_bytes): (i64, i64, i64) = sqlx::query_as(
            "select xact_commit, deadlocks, pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::bigint
             from pg_stat_database where datname = current_database()",
        )
        .fetch_one(&self.pool)
        .await?;
        let postgres_cpu = self.postmaster.and_then(cpu_of_tree).unwrap_or_default();
        let worker_cpu = cpu_of(std::process::id()).unwrap_or_default();
        Ok(Counters { commits, deadlocks, wal_bytes, postgres_cpu, worker_cpu })
    }

    /// Invariants of the ledger that do not hold.
    pub async fn broken_invariants(&self) -> Result<Vec<String>> {
        let broken = audit::run(&mut *self.pool.acquire().await?).await?;
        Ok(broken.iter().map(|v| format!("{}: {} ({})", v.invariant, v.meaning, v.subject)).collect())
    }

    /// Deadlocks (SQLSTATE 40P01) that the server's own log tells of, whoever was refused and tried again.
    pub fn deadlocks_logged(&self) -> Result<usize> {
        let log = std::fs::read(self.folder.join("postgres/log"))?;
        Ok(String::from_utf8_lossy(&log).matches("deadlock detected").count())
    }
}

/// Nanoseconds of a clock that all processes of the machine share, and that nobody sets.
pub fn monotonic_ns() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes to a timespec of ours. It cannot fail: the clock exists wherever `Instant` does.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    let part = |n: i64| u64::try_from(n).unwrap_or_default();
    part(now.tv_sec) * 1_000_000_000 + part(now.tv_nsec)
}

/// Confines this thread, and all threads and processes that will come from it, to that many of its processors.
///
/// # Errors
/// When the system refuses, or there are fewer.
#[cfg(target_os = "linux")]
pub fn keep_to(cores: usize) -> io::Result<()> {
    let size = size_of::<libc::cpu_set_t>();
    // SAFETY: sets of bits, none of them set.
    let (mut all, mut some): (libc::cpu_set_t, libc::cpu_set_t) = unsafe { std::mem::zeroed() };
    // SAFETY: writes to a set of ours, of that size.
    if unsafe { libc::sched_getaffinity(0, size, &raw mut all) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let limit = usize::try_from(libc::CPU_SETSIZE).unwrap_or(0);
    // SAFETY: below the limit of the set.
    let mine: Vec<usize> = (0..limit).filter(|&n| unsafe { libc::CPU_ISSET(n, &all) }).take(cores).collect();
    if mine.len() < cores {
        return Err(io::Error::other(format!("there are only {} of {cores}", mine.len())));
    }
    for n in mine {
        // SAFETY: below the limit of the set.
        unsafe { libc::CPU_SET(n, &mut some) };
    }
    // SAFETY: reads a set of ours, of that size.
    match unsafe { libc::sched_setaffinity(0, size, &raw const some) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(not(target_os = "linux"))]
pub fn keep_to(cores: usize) -> io::Result<()> {
    Err(io::Error::other(format!("{cores} processors cannot be chosen on this system")))
}
