//! Which runs may leave the database, and their leaving. Tables `archives` and `archived_runs`.

use super::{
    is_transient,
    partitions::{self, Partition},
};
use crate::{
    Error, Result,
    ids::{RunId, SHARDS},
    transaction::in_transaction_within,
    view::Recorded,
};
use chrono::{DateTime, Utc};
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, PgConnection, PgPool, Row};
use std::{ops::Range, sync::Arc, time::Duration};
use uuid::Uuid;

mod families;

pub(crate) use families::Families;

/// Tables with rows that belong to a run and go with it, all with `shard` and `run_id`; beside them `history` and, last, `runs`.
///
/// Not among them: facts about the outside, which stay; `schedule_actions`, which says what became of an instant.
const OF_A_RUN: &[&str] = &[
    "inbox",
    "checkpoints",
    "attempt_progress",
    "admissions",
    "ready",
    "workflow_ids",
    "outbox",
    "blobs",
    "former_definitions",
];

/// Advisory lock of whoever retires runs. Correct without it: two would write the same runs into two files, and the second
/// file would be thrown away.
const LOCK: i64 = 0x6c77_7265_7469;
/// Longest statement of a turn. Chosen: what takes longer meets a database that is busy with something else.
const STATEMENT_TIMEOUT: &str = "set local statement_timeout = '60s'";
const LOCK_TIMEOUT: &str = "set local lock_timeout = '1s'";
/// Longest transaction of one archive, of some ten statements.
const RETIRE_MAX: Duration = Duration::from_secs(600);

/// Who retires runs now. The lock is the session's: it ends with the process.
pub(crate) struct Turn(PgConnection);

impl Turn {
    /// `None`: somebody else does.
    pub(crate) async fn claim(pool: &PgPool) -> Result<Option<Self>> {
        let mut conn = pool.connect_options().as_ref().clone().disable_statement_logging().connect().await?;
        let mine = sqlx::query_scalar("select pg_try_advisory_lock($1)").bind(LOCK).fetch_one(&mut conn).await?;
        Ok(if mine { Some(Self(conn)) } else { None })
    }

    pub(crate) async fn end(self) {
        // Ending the session ends the lock; one that cannot say goodbye ends as well.
        drop(self.0.close().await);
    }
}

/// Runs whose ids lie in `from..upto` and that had ended, or were imported, before an instant; by shard and id.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Old {
    from: Uuid,
    upto: Uuid,
    before: DateTime<Utc>,
    shard: i16,
    after: Option<Uuid>,
}

impl Old {
    pub(crate) fn new(ids: Range<Uuid>, before: DateTime<Utc>) -> Self {
        Self { from: ids.start, upto: ids.end, before, shard: 0, after: None }
    }

    /// The next `limit`; fewer are the last.
    pub(crate) async fn next(&mut self, conn: &mut PgConnection, limit: usize) -> Result<Vec<RunId>> {
        let mut found = Vec::new();
        while self.shard < SHARDS && found.len() < limit {
            // A shard at a time: a walk along the key.
            let some: Vec<Uuid> = sqlx::query_scalar(
                "select run_id from runs where shard = $1 and run_id >= $2 and run_id < $3 and ($4::uuid is null or run_id > $4)
                   and coalesce(imported_at, closed_at) < $5 order by run_id limit $6",
            )
            .bind(self.shard)
            .bind(self.after.unwrap_or(self.from))
            .bind(self.upto)
            .bind(self.after)
            .bind(self.before)
            .bind(i64::try_from(limit - found.len()).unwrap_or(1))
            .fetch_all(&mut *conn)
            .await?;
            self.after = some.last().copied();
            if found.len() + some.len() < limit {
                (self.shard, self.after) = (self.shard + 1, None);
            }
            found.extend(some.into_iter().map(RunId));
        }
        Ok(found)
    }
}

/// What of those asked for may leave, and whom they take with them. As long as a run stays,
/// - its parent stays (whose call it is, and what bounds it) and so do its children, which its history names;
/// - the run that it was forked from stays, whose rows it shares.
///
/// A run stays if it is open, or ended (or was imported) less than the time ago. Runs that need each other therefore leave together, also
/// from other months. With `$4`, a run that was not asked for stays as well.
const JUDGE: &str = "
    with recursive
      asked as materialized (select * from unnest((select $1::smallint[]), (select $2::uuid[])) a(shard, run_id)),
      -- Those asked for, and all whose staying would keep them.
      reach as (
        select r.shard, r.run_id from asked join runs r using (shard, run_id)
        union
        select n.shard, n.run_id from reach k cross join lateral (
          select p.shard, p.run_id from runs c join runs p on p.shard = c.parent_shard and p.run_id = c.parent_run_id
          where c.shard = k.shard and c.run_id = k.run_id
          union all select c.shard, c.run_id from runs c where c.parent_run_id = k.run_id
          union all select f.shard, f.run_id from runs f where f.forked_from = k.run_id) n),
      web as materialized (
        select r.shard, r.run_id, r.parent_run_id, r.forked_from,
               coalesce(coalesce(r.imported_at, r.closed_at) < $3, false)
                 and (not $4 or exists (select from asked a where a.shard = r.shard and a.run_id = r.run_id)) as old
        from reach join runs r using (shard, run_id)),
      needs as materialized (
        select run_id as stays, parent_run_id as needed from web where parent_run_id is not null
        union all select parent_run_id, run_id from web where parent_run_id is not null
        union all select run_id, forked_from from web where forked_from is not null),
      kept as (
        select run_id from web where not old
        union
        select n.needed from kept k join needs n on n.stays = k.run_id)
    select w.shard, w.run_id from web w where not exists (select from kept k where k.run_id = w.run_id) order by w.run_id";

/// The runs that leave if those of `asked` are to: see [`JUDGE`]. `only`: nobody else leaves with them.
pub(crate) async fn judge(
    conn: &mut PgConnection,
    asked: &[RunId],
    before: DateTime<Utc>,
    only: bool,
) -> Result<Vec<RunId>> {
    let runs: Vec<(i16, Uuid)> = sqlx::query_as(JUDGE)
        .bind(asked.iter().map(RunId::shard).collect::<Vec<i16>>())
        .bind(asked.iter().map(|run| run.0).collect::<Vec<Uuid>>())
        .bind(before)
        .bind(only)
        .fetch_all(conn)
        .await?;
    Ok(runs.into_iter().map(|(_, run)| RunId(run)).collect())
}

/// A file that lies in its place.
#[derive(Clone, Debug)]
pub(crate) struct File {
    pub(crate) id: Uuid,
    pub(crate) name: String,
    pub(crate) sha256: [u8; 32],
    pub(crate) bytes: u64,
}

/// Records an archive and deletes its runs, as far as they may still leave. Returns how many did; of none, nothing is recorded.
///
/// # Errors
/// `database`.
/// # Transaction
/// One. Locks the runs; those that somebody else has locked stay.
pub(crate) async fn retire(pool: &PgPool, file: &File, runs: &[RunId], before: DateTime<Utc>) -> Result<usize> {
    let shared = Arc::new((file.clone(), runs.to_vec()));
    in_transaction_within(pool, RETIRE_MAX, |conn| {
        let shared = shared.clone();
        Box::pin(async move { retire_in(conn, &shared.0, &shared.1, before).await })
    })
    .await
}

async fn retire_in(conn: &mut PgConnection, file: &File, runs: &[RunId], before: DateTime<Utc>) -> Result<usize> {
    sqlx::query(STATEMENT_TIMEOUT).execute(&mut *conn).await?;
    sqlx::query(LOCK_TIMEOUT).execute(&mut *conn).await?;
    // A fork holds the run that it begins from: either it is seen below, or it finds the run gone.
    let locked: Vec<Uuid> = sqlx::query_scalar(
        "select r.run_id from unnest((select $1::smallint[]), (select $2::uuid[])) k(shard, run_id)
         join runs r on r.shard = k.shard and r.run_id = k.run_id order by r.run_id for update of r skip locked",
    )
    .bind(runs.iter().map(RunId::shard).collect::<Vec<i16>>())
    .bind(runs.iter().map(|run| run.0).collect::<Vec<Uuid>>())
    .fetch_all(&mut *conn)
    .await?;
    let locked: Vec<RunId> = locked.into_iter().map(RunId).collect();
    let leaving = judge(conn, &locked, before, true).await?;
    if leaving.is_empty() {
        return Ok(0);
    }
    let shards: Vec<i16> = leaving.iter().map(RunId::shard).collect();
    let ids: Vec<Uuid> = leaving.iter().map(|run| run.0).collect();
    sqlx::query("insert into archives (id, file, sha256, bytes, runs, closed_before) values ($1, $2, $3, $4, $5, $6)")
        .bind(file.id)
        .bind(&file.name)
        .bind(&file.sha256[..])
        .bind(i64::try_from(file.bytes).unwrap_or(i64::MAX))
        .bind(i32::try_from(leaving.len()).unwrap_or(i32::MAX))
        .bind(before)
        .execute(&mut *conn)
        .await?;
    sqlx::query(
        "insert into archived_runs (shard, run_id, archive_id) select shard, run_id, $3 from unnest($1::smallint[], $2::uuid[]) k(shard, run_id)
         on conflict (shard, run_id) do update set archive_id = excluded.archive_id",
    )
    .bind(&shards)
    .bind(&ids)
    .bind(file.id)
    .execute(&mut *conn)
    .await?;
    // Rows of a partition stay behind without their run, until it is dropped.
    for table in OF_A_RUN.iter().chain(&["history_default", "runs"]) {
        sqlx::query(AssertSqlSafe(format!(
            "delete from {table} t using unnest((select $1::smallint[]), (select $2::uuid[])) k(shard, run_id)
             where t.shard = k.shard and t.run_id = k.run_id"
        )))
        .bind(&shards)
        .bind(&ids)
        .execute(&mut *conn)
        .await?;
    }
    crate::committer::crash_point("retire.before_commit");
    Ok(leaving.len())
}

/// Whether nothing of [`retire`] was done, for certain: the server said so, and not while it was stopping.
pub(crate) fn is_undone(error: &Error) -> bool {
    match error {
        Error::Sql(sqlx::Error::Database(e)) => {
            let code = e.code().unwrap_or_default();
            !["57P", "08", "40003"].iter().any(|unknown| code.starts_with(unknown))
        }
        _ => false,
    }
}

/// Months whose runs all began before `before`, with their partitions, and what lies between and beside the partitions.
pub(crate) async fn periods(
    conn: &mut PgConnection,
    before: DateTime<Utc>,
) -> Result<Vec<(Range<Uuid>, Option<Partition>)>> {
    let (mut periods, mut at) = (Vec::new(), Uuid::nil());
    for partition in partitions::list(conn).await? {
        let (from, upto) = (partition.from.unwrap_or(Uuid::nil()), partition.upto.unwrap_or(Uuid::max()));
        if at < from {
            periods.push((at..from, None));
        }
        at = upto;
        if upto <= partitions::first_id(before) {
            periods.push((from..upto, Some(partition)));
        }
    }
    periods.push((at..Uuid::max(), None));
    Ok(periods)
}

/// Why there is no such run: it has left into a file, or it never was.
pub(crate) async fn absent(conn: &mut PgConnection, run: RunId) -> Error {
    let file: sqlx::Result<Option<String>> = sqlx::query_scalar(
        "select a.file from archived_runs r join archives a on a.id = r.archive_id where r.shard = $1 and r.run_id = $2",
    )
    .bind(run.shard())
    .bind(run.0)
    .fetch_optional(conn)
    .await;
    match file {
        Ok(Some(file)) => Error::RunArchived { run: run.to_string(), file },
        Err(error) if is_transient(&error) => Error::Sql(error),
        // Without the migration nothing has left.
        Ok(None) | Err(_) => Error::RunNotFound(run.to_string()),
    }
}

/// What to say of a run whose rows are not all there: that it has left meanwhile, else what was found.
pub(crate) async fn unless_gone(conn: &mut PgConnection, run: RunId, found: Error) -> Error {
    let there = sqlx::query_scalar::<_, i32>("select 1 from runs where shard = $1 and run_id = $2")
        .bind(run.shard())
        .bind(run.0)
        .fetch_optional(&mut *conn)
        .await;
    match there {
        Ok(None) => absent(conn, run).await,
        Ok(Some(_)) => found,
        Err(error) => Error::Sql(error),
    }
}

/// Newest first.
pub(crate) async fn archives(pool: &PgPool, limit: u32) -> Result<Vec<Recorded>> {
    let rows = sqlx::query("select * from archives order by made_at desc, id desc limit $1")
        .bind(i64::from(limit))
        .fetch_all(pool)
        .await?;
    rows.iter().map(view).collect()
}

/// The sum of a file as it was recorded, if it was.
pub(crate) async fn recorded(pool: &PgPool, file: &str) -> Result<Option<Vec<u8>>> {
    Ok(sqlx::query_scalar("select sha256 from archives where file = $1").bind(file).fetch_optional(pool).await?)
}

fn view(row: &sqlx::postgres::PgRow) -> Result<Recorded> {
    let number = |n: i64| u64::try_from(n).unwrap_or(0);
    let sha256: Vec<u8> = row.try_get("sha256")?;
    Ok(Recorded {
        file: row.try_get("file")?,
        sha256: sha256.iter().map(|b| format!("{b:02x}")).collect(),
        bytes: number(row.try_get("bytes")?),
        runs: number(row.try_get::<i32, _>("runs")?.into()),
        closed_before: row.try_get("closed_before")?,
        made_at: row.try_get("made_at")?,
    })
}

#[cfg(all(test, feature = "test-util"))]
mod tests;
