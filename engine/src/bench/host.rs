//! The server that is measured, a database of the bench's own on it, and the counters of both.

use super::{Error, Options, Result, process, unfit};
use crate::{
    client::Client,
    embedded::{self, Server, Settings},
    hook::NoHook,
    migrate::{self, MIGRATIONS},
};
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, PgPool, postgres::PgConnectOptions};
use std::{path::PathBuf, sync::Arc, time::Duration};

/// Connections of one process, as the product has them.
pub(super) const POOL_MAX: u32 = 20;

pub(super) struct Host {
    server: Option<(Server, PathBuf)>,
    admin: PgConnectOptions,
    database: String,
    pub(super) pool: PgPool,
    pub(super) client: Client,
    /// Process of the server's first process, if it is on this machine.
    postmaster: Option<u32>,
}

/// A pool as a worker has it.
pub(super) fn pool(options: PgConnectOptions) -> PgPool {
    crate::transaction::pool(&options)
        .max_connections(POOL_MAX)
        .acquire_timeout(Duration::from_secs(60))
        // A ping per statement would be measured as the engine's latency; a broken connection is retried anyway.
        .test_before_acquire(false)
        .connect_lazy_with(options)
}

impl Host {
    /// Brings up or finds the server, makes a database and migrates it.
    pub(super) async fn prepare(options: &Options) -> Result<Self> {
        let (server, url) = match &options.database_url {
            Some(url) => (None, url.clone()),
            None => {
                let folder = options.folder.join(format!("loopwright-bench-{}", std::process::id()));
                let settings = Settings { data_dir: Some(folder.clone()), ..Settings::default() };
                let server = embedded::start(settings).await?;
                let url = server.url().to_owned();
                (Some((server, folder)), url)
            }
        };
        let admin: PgConnectOptions = url.parse().map_err(Error::from)?;
        let admin = admin.disable_statement_logging();
        let mut conn = admin.connect().await?;
        let database = format!("lw_bench_{}", std::process::id());
        for sql in [format!("drop database if exists {database}"), format!("create database {database}")] {
            // Its name is made here of letters and digits.
            sqlx::query(AssertSqlSafe(sql)).persistent(false).execute(&mut conn).await?;
        }
        let backend: i32 = sqlx::query_scalar("select pg_backend_pid()").fetch_one(&mut conn).await?;
        let postmaster = u32::try_from(backend).ok().and_then(process::postmaster_of);
        conn.close().await?;
        let pool = pool(admin.clone().database(&database));
        migrate::run(&pool, MIGRATIONS).await?;
        let client = Client::new(pool.clone(), Arc::new(NoHook));
        Ok(Self { server, admin, database, pool, client, postmaster })
    }

    /// Where another process finds the database.
    pub(super) fn url(&self) -> String {
        self.pool.connect_options().to_url_lossy().to_string()
    }

    /// Version and durability of the server, and why nothing counts that is measured on it.
    pub(super) async fn describe(&self, percent: u32) -> Result<(String, Vec<String>)> {
        let (version, fsync, commit): (String, String, String) = sqlx::query_as(
            "select current_setting('server_version'), current_setting('fsync'), current_setting('synchronous_commit')",
        )
        .fetch_one(&self.pool)
        .await?;
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let server =
            format!("PostgreSQL {version}, fsync {fsync}, synchronous_commit {commit}, {processors} processors");
        Ok((server, unfit(&fsync, &commit, percent)))
    }

    /// Drops the database, and the server with its folder if it is ours.
    pub(super) async fn clean_up(self) -> Result<()> {
        self.pool.close().await;
        if let Some((server, folder)) = self.server {
            tokio::task::spawn_blocking(move || server.stop()).await.map_err(|e| Error::failed("stopping", e))?;
            return std::fs::remove_dir_all(folder).map_err(|e| Error::failed("removing the bench's folder", e));
        }
        let mut conn = self.admin.connect().await?;
        let sql = format!("drop database if exists {} with (force)", self.database);
        sqlx::query(AssertSqlSafe(sql)).persistent(false).execute(&mut conn).await?;
        Ok(())
    }

    pub(super) async fn counters(&self) -> Result<Counters> {
        let (lsn, commits): (f64, i64) = sqlx::query_as(
            "select pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::float8,
                    (select xact_commit from pg_stat_database where datname = current_database())",
        )
        .fetch_one(&self.pool)
        .await?;
        let cpu = self.postmaster.and_then(process::cpu_of_tree);
        Ok(Counters {
            wal_bytes: lsn,
            commits: commits as f64,
            postgres_cpu: cpu.map_or(f64::NAN, |d| d.as_secs_f64()),
        })
    }

    /// How many transactions have written something or locked a row, on the whole server, since it was made. Those that only read get
    /// no number. Whatever else works on the server counts as well; on one of our own that is Postgres' own upkeep, a few a minute.
    pub(super) async fn written(&self) -> Result<i64> {
        let next = "select pg_snapshot_xmax(pg_current_snapshot())::text::bigint";
        Ok(sqlx::query_scalar(next).fetch_one(&self.pool).await?)
    }

    /// Makes the backends write down what they counted: they do it when they end, and at most once a second before.
    pub(super) async fn settle(&self) {
        tokio::time::sleep(Duration::from_millis(1_100)).await;
    }

    /// Polls until a count is zero.
    pub(super) async fn until_none(&self, what: &'static str, sql: &'static str, patience: Duration) -> Result<()> {
        let deadline = tokio::time::Instant::now() + patience;
        loop {
            let left: i64 = sqlx::query_scalar(sql).fetch_one(&self.pool).await?;
            if left == 0 {
                return Ok(());
            }
            if tokio::time::Instant::now() > deadline {
                return Err(Error::TooSlow(what, patience.as_secs()));
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

/// Counters of the server; differences of two mean something. NaN is unknown.
#[derive(Clone, Copy, Debug)]
pub(super) struct Counters {
    pub(super) wal_bytes: f64,
    /// Of this database, read-only ones included.
    pub(super) commits: f64,
    /// Seconds, of all its processes.
    pub(super) postgres_cpu: f64,
}
