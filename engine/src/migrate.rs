//! Brings a database to the schema that this program was built for: forward only, each file once, safe when several
//! processes do it at the same time.

use sqlx::{
    ConnectOptions, Connection, PgPool, SqlSafeStr,
    migrate::{MigrateError, MigrationType, Migrator},
};

/// One migration file.
#[derive(Clone, Copy, Debug)]
pub struct Migration {
    /// Ascending, unique, never reused: the number in the file's name.
    pub version: i64,
    pub name: &'static str,
    /// Any number of statements; they run in one transaction.
    pub sql: &'static str,
}

/// The tables of the engine alone.
pub const MIGRATIONS: &[Migration] = &[
    Migration { version: 1, name: "engine", sql: include_str!("../../migrations/0001_engine.sql") },
    FLOW,
    SCHEDULES,
    QUEUES,
    UPDATES,
    ROOM,
    CONTINUE,
    PAYLOAD,
    RETENTION,
    MIGRATE,
    TIMED,
    LABELS,
    START,
    HELD,
    CLOCK,
];

/// The columns and tables of pauses, forks and imports.
pub const FLOW: Migration = Migration { version: 7, name: "flow", sql: include_str!("../../migrations/0007_flow.sql") };

/// The tables of schedules.
pub const SCHEDULES: Migration =
    Migration { version: 8, name: "schedules", sql: include_str!("../../migrations/0008_schedules.sql") };

/// The columns and tables of priorities, turns, concurrency groups and rates.
pub const QUEUES: Migration =
    Migration { version: 9, name: "queues", sql: include_str!("../../migrations/0009_queues.sql") };

/// Messages that are answered, and children that end with their parents.
pub const UPDATES: Migration =
    Migration { version: 10, name: "update", sql: include_str!("../../migrations/0010_update.sql") };

/// Room in the pages of `runs`.
pub const ROOM: Migration =
    Migration { version: 11, name: "room", sql: include_str!("../../migrations/0011_room.sql") };

/// Runs that continue as new.
pub const CONTINUE: Migration =
    Migration { version: 12, name: "continue", sql: include_str!("../../migrations/0012_continue.sql") };

/// Large values of runs.
pub const PAYLOAD: Migration =
    Migration { version: 13, name: "payload", sql: include_str!("../../migrations/0013_payload.sql") };

/// Partitions of `history` by month, and where retired runs are.
pub const RETENTION: Migration =
    Migration { version: 14, name: "retention", sql: include_str!("../../migrations/0014_retention.sql") };

/// Definitions that runs had before they were migrated.
pub const MIGRATE: Migration =
    Migration { version: 15, name: "migrate", sql: include_str!("../../migrations/0015_migrate.sql") };

/// Runs whose due instant has come unnoticed.
pub const TIMED: Migration =
    Migration { version: 16, name: "timed", sql: include_str!("../../migrations/0016_timed.sql") };

/// Labels of workers.
pub const LABELS: Migration =
    Migration { version: 17, name: "labels", sql: include_str!("../../migrations/0017_labels.sql") };

/// The last run under an id, and what goes along a chain.
pub const START: Migration =
    Migration { version: 18, name: "start", sql: include_str!("../../migrations/0018_start.sql") };

/// When a fork that is held back has to end.
pub const HELD: Migration =
    Migration { version: 26, name: "held", sql: include_str!("../../migrations/0026_held.sql") };

/// A cheaper clock.
pub const CLOCK: Migration =
    Migration { version: 31, name: "clock", sql: include_str!("../../migrations/0031_clock.sql") };

/// Why a database could not be brought to the schema of this program.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The database holds a migration that this program does not know.
    #[error(
        "the database is newer than this program: it has migration {version}, the newest one known here is {known}; \
         use the release that wrote it, or a newer one"
    )]
    DatabaseNewer { version: i64, known: i64 },
    /// A migration file changed after it was applied.
    #[error(
        "migration {0} was changed after it had been applied to this database; use the release that wrote it, or an \
         empty database"
    )]
    Changed(i64),
    /// A statement of a migration failed; nothing of that migration was applied.
    #[error("migration {version} could not be applied: {source}")]
    Failed { version: i64, source: sqlx::Error },
    #[error("the database could not be migrated: {0}")]
    Sql(#[from] sqlx::Error),
    #[error("the database could not be migrated: {0}")]
    Other(String),
}

impl Error {
    /// A stable code for programs; listed in the crate's README.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::DatabaseNewer { .. } => "database_newer",
            Self::Changed(_) => "migration_changed",
            Self::Failed { .. } => "migration_failed",
            Self::Sql(_) => "database",
            Self::Other(_) => "migration_refused",
        }
    }
}

/// Applies the migrations that the database does not have yet.
///
/// # Errors
/// `database_newer`, `migration_changed`: nothing was done. `migration_failed`: the earlier ones stay applied.
/// # Transaction
/// One per migration, under an advisory lock of the session, so that of several processes one applies them and the
/// others find them applied. Idempotent.
pub async fn run(pool: &PgPool, migrations: &[Migration]) -> Result<(), Error> {
    // A connection of its own, closed at the end: after an error the advisory lock would otherwise live on in the pool.
    // An index of a large table takes its time, and so does another process that makes it.
    let options = pool.connect_options().as_ref().clone().options([("statement_timeout", "0")]);
    let mut conn = options.disable_statement_logging().connect().await?;
    let result = migrator(migrations).run(&mut conn).await;
    // A connection that will not close says nothing about the migrations.
    let _ = conn.close().await;
    result.map_err(|error| classify(error, migrations))
}

/// Versions of the given migrations that the database does not have, in order. Empty means ready.
///
/// # Errors
/// Only those of the connection; a database that was never migrated lacks all of them.
pub async fn missing(pool: &PgPool, migrations: &[Migration]) -> Result<Vec<i64>, sqlx::Error> {
    let known: bool = sqlx::query_scalar("select to_regclass('_sqlx_migrations') is not null").fetch_one(pool).await?;
    let applied: Vec<i64> = if known {
        sqlx::query_scalar("select version from _sqlx_migrations where success").fetch_all(pool).await?
    } else {
        Vec::new()
    };
    Ok(migrations.iter().map(|m| m.version).filter(|version| !applied.contains(version)).collect())
}

fn migrator(migrations: &[Migration]) -> Migrator {
    Migrator::with_migrations(
        migrations
            .iter()
            .map(|m| {
                sqlx::migrate::Migration::new(
                    m.version,
                    m.name.into(),
                    MigrationType::Simple,
                    m.sql.into_sql_str(),
                    false,
                )
            })
            .collect(),
    )
}

fn classify(error: MigrateError, migrations: &[Migration]) -> Error {
    match error {
        MigrateError::VersionMissing(version) => {
            Error::DatabaseNewer { version, known: migrations.iter().map(|m| m.version).max().unwrap_or(0) }
        }
        MigrateError::VersionMismatch(version) => Error::Changed(version),
        MigrateError::ExecuteMigration(source, version) => Error::Failed { version, source },
        MigrateError::Execute(source) => Error::Sql(source),
        other => Error::Other(other.to_string()),
    }
}

#[cfg(all(test, feature = "test-util"))]
mod tests {
    use super::*;
    use crate::embedded::testing;

    const A: Migration = Migration { version: 1, name: "a", sql: "create table a (id int); insert into a values (1);" };
    const B: Migration = Migration { version: 2, name: "b", sql: "create table b (id int)" };

    #[tokio::test]
    async fn several_processes_may_migrate_at_once() {
        let pool = testing::database(&[]).await;
        assert_eq!(missing(&pool, &[A, B]).await.unwrap(), [1, 2]);
        let all = (0..6).map(|_| run(&pool, &[A, B]));
        for result in futures_util::future::join_all(all).await {
            result.unwrap();
        }
        let rows: i64 = sqlx::query_scalar("select count(*) from a").fetch_one(&pool).await.unwrap();
        assert_eq!(rows, 1);
        assert!(missing(&pool, &[A, B]).await.unwrap().is_empty());
    }

    #[tokio::test]
    async fn a_newer_database_is_refused_by_name() {
        let pool = testing::database(&[A, B]).await;
        let error = run(&pool, &[A]).await.unwrap_err();
        assert!(matches!(error, Error::DatabaseNewer { version: 2, known: 1 }), "{error}");
        assert!(error.to_string().contains("newer than this program"));
        // The lock of the failed try is gone: the right program gets through.
        run(&pool, &[A, B]).await.unwrap();
    }

    #[tokio::test]
    async fn a_changed_migration_is_refused() {
        let pool = testing::database(&[A]).await;
        let changed = Migration { sql: "create table a (id bigint)", ..A };
        assert_eq!(run(&pool, &[changed]).await.unwrap_err().code(), "migration_changed");
    }

    #[tokio::test]
    async fn a_failing_migration_leaves_nothing_of_itself() {
        let pool = testing::database(&[A]).await;
        let bad = Migration { version: 2, name: "bad", sql: "create table c (id int); select nonsense();" };
        let error = run(&pool, &[A, bad]).await.unwrap_err();
        assert_eq!(error.code(), "migration_failed");
        let c: Option<String> = sqlx::query_scalar("select to_regclass('c')::text").fetch_one(&pool).await.unwrap();
        assert_eq!(c, None);
        run(&pool, &[A, B]).await.unwrap();
    }

    #[tokio::test]
    async fn the_engine_migrates_twice() {
        let pool = testing::database(MIGRATIONS).await;
        run(&pool, MIGRATIONS).await.unwrap();
        let now: chrono::DateTime<chrono::Utc> =
            sqlx::query_scalar("select engine_now()").fetch_one(&pool).await.unwrap();
        assert!(now.timestamp() > 0);
    }
}
