//! Partitions of `history`: one for every month of UTC, by the time inside the run id. Any worker makes them ahead of time and
//! drops them when their runs are retired; nobody leads, and who comes second finds it done.
//!
//! Nothing here is needed for a run to go on: what no partition takes lies in `history_default`.

use crate::{Error, Result, ids::SHARDS, transaction};
use chrono::{DateTime, Datelike, Months, NaiveDate, NaiveTime, Utc};
use sqlx::{AssertSqlSafe, PgConnection, PgPool, Row};
use uuid::Uuid;

/// Months that are made beside the current one. Chosen: workers may be away for two months.
const AHEAD: u32 = 2;
/// How long anything of ours waits for a lock of `history`. Whoever wants to write there meanwhile waits behind it.
const LOCK_TIMEOUT: &str = "set local lock_timeout = '100ms'";
/// Longest statement under such a lock.
const STATEMENT_TIMEOUT: &str = "set local statement_timeout = '5s'";
/// Largest `history_default` beside which a partition is made: Postgres reads all of it under a lock, 64 MiB in about 50 ms.
const DEFAULT_BYTES_MAX: i64 = 64 << 20;
/// Most rows that move in or out of `history_default` under a lock: some 50 ms.
pub(crate) const MOVED_ROWS_MAX: i64 = 2_000;
/// Bytes of them: they are copied while nobody reads or writes `history`.
const MOVED_BYTES_MAX: i64 = 16 << 20;

/// A partition, as the catalog has it. The default one is none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Partition {
    pub(crate) name: String,
    /// First run id; `None`: the first there is.
    pub(crate) from: Option<Uuid>,
    /// First run id beyond it; `None`: there is none.
    pub(crate) upto: Option<Uuid>,
}

impl Partition {
    fn overlaps(&self, from: Uuid, upto: Uuid) -> bool {
        self.from.is_none_or(|own| own < upto) && self.upto.is_none_or(|own| own > from)
    }

    /// Its name as SQL.
    fn quoted(&self) -> String {
        format!("\"{}\"", self.name.replace('"', "\"\""))
    }
}

/// The smallest run id of an instant: a UUIDv7 begins with its milliseconds.
pub(crate) fn first_id(at: DateTime<Utc>) -> Uuid {
    let ms = u128::try_from(at.timestamp_millis()).unwrap_or(0);
    Uuid::from_u128((ms & 0xffff_ffff_ffff) << 80)
}

/// The first instant of the month of `at`, and of the one `later` months after it. `None` where calendars end.
fn month(at: DateTime<Utc>, later: u32) -> Option<DateTime<Utc>> {
    let first = NaiveDate::from_ymd_opt(at.year(), at.month(), 1)?;
    Some(first.checked_add_months(Months::new(later))?.and_time(NaiveTime::MIN).and_utc())
}

/// By their first ids.
pub(crate) async fn list(conn: &mut PgConnection) -> Result<Vec<Partition>> {
    let rows = sqlx::query(
        r"select c.relname::text as name, substring(b from 'FROM \(''([0-9a-f-]{36})''\)')::uuid as first,
                 substring(b from 'TO \(''([0-9a-f-]{36})''\)')::uuid as beyond
          from pg_inherits i join pg_class c on c.oid = i.inhrelid cross join lateral pg_get_expr(c.relpartbound, c.oid) b
          where i.inhparent = 'history'::regclass and b <> 'DEFAULT' order by first nulls first",
    )
    .fetch_all(conn)
    .await?;
    rows.iter()
        .map(|row| {
            Ok(Partition { name: row.try_get("name")?, from: row.try_get("first")?, upto: row.try_get("beyond")? })
        })
        .collect()
}

/// Makes the partitions of the month of `at` and of those after it that are not there. Returns how many it made.
///
/// # Errors
/// `database`. What cannot be made now (others hold a lock, too much of it lies in `history_default`) is no error.
/// # Transaction
/// One for each. Locks `history` against other changes of its shape, and `history_default` for as long as it is read.
pub(crate) async fn ahead(pool: &PgPool, at: DateTime<Utc>) -> Result<u32> {
    let there = list(&mut *pool.acquire().await?).await?;
    let mut made = 0;
    for later in 0..=AHEAD {
        let (Some(first), Some(beyond)) = (month(at, later), month(at, later + 1)) else { break };
        let (from, upto) = (first_id(first), first_id(beyond));
        if there.iter().any(|partition| partition.overlaps(from, upto)) {
            continue;
        }
        let name = format!("history_{:04}_{:02}", first.year(), first.month());
        match make(pool, &name, from, upto).await {
            Ok(true) => made += 1,
            Ok(false) => {
                tracing::warn!(
                    name,
                    "a partition is not made: too much of its month lies in history_default, or that is large"
                );
            }
            Err(Error::Sql(error)) if is_passing(&error) => {
                tracing::info!(name, %error, "a partition is not made now; the next look tries again");
            }
            Err(error) => return Err(error),
        }
    }
    Ok(made)
}

async fn make(pool: &PgPool, name: &str, from: Uuid, upto: Uuid) -> Result<bool> {
    let mut tx = transaction::begin(pool).await?;
    sqlx::query(LOCK_TIMEOUT).execute(&mut *tx).await?;
    sqlx::query(STATEMENT_TIMEOUT).execute(&mut *tx).await?;
    let large: bool = sqlx::query_scalar("select pg_relation_size('history_default') > $1")
        .bind(DEFAULT_BYTES_MAX)
        .fetch_one(&mut *tx)
        .await?;
    let stray = stray_rows(&mut tx, from, upto).await?;
    if large || stray > MOVED_ROWS_MAX {
        return Ok(false);
    }
    // Attached instead of made in place: that locks `history` against writers, this does not. But if its rows lie elsewhere already,
    // somebody may write another one there just now, or read: whoever waits has chosen the place, and would be refused there.
    let mode = if stray > 0 { "access exclusive" } else { "share update exclusive" };
    execute(&mut tx, format!("lock table history in {mode} mode")).await?;
    execute(&mut tx, format!("create table {name} (like history including all)")).await?;
    execute(&mut tx, "lock table history_default in access exclusive mode".into()).await?;
    let moved = format!(
        "with stray as (delete from history_default where run_id >= '{from}' and run_id < '{upto}' returning *)
         insert into {name} select * from stray"
    );
    execute(&mut tx, moved).await?;
    execute(&mut tx, format!("alter table history attach partition {name} for values from ('{from}') to ('{upto}')"))
        .await?;
    tx.commit().await?;
    Ok(true)
}

/// Rows of a month that lie in `history_default`, counted up to one more than may be moved.
async fn stray_rows(conn: &mut PgConnection, from: Uuid, upto: Uuid) -> Result<i64> {
    Ok(sqlx::query_scalar(
        "select count(*) from (select from generate_series(0, $4 - 1) s cross join lateral (
           select from history_default h where h.shard = s and h.run_id >= $1 and h.run_id < $2 limit $3) h limit $3) n",
    )
    .bind(from)
    .bind(upto)
    .bind(MOVED_ROWS_MAX + 1)
    .bind(i32::from(SHARDS))
    .fetch_one(conn)
    .await?)
}

/// What became of a partition that is to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dropped {
    /// Gone; so many rows of runs that stay have moved to `history_default`.
    Yes { moved: u64 },
    /// Too many rows of it belong to runs that stay.
    Needed,
    /// Others hold a lock, or have dropped it.
    NotNow,
}

/// Detaches a partition, moves what is left of it to `history_default` and drops it. Rows without a run are of retired ones.
///
/// # Errors
/// `database`.
/// # Transaction
/// One. Locks `history` against everybody: it waits for that 100 ms at most, and holds it while [`MOVED_ROWS_MAX`] rows are moved
/// by their keys.
pub(crate) async fn drop(pool: &PgPool, partition: &Partition) -> Result<Dropped> {
    match try_drop(pool, partition).await {
        Err(Error::Sql(error)) if is_passing(&error) => {
            tracing::info!(partition = partition.name, %error, "a partition is not dropped now; the next look tries again");
            Ok(Dropped::NotNow)
        }
        other => other,
    }
}

async fn try_drop(pool: &PgPool, partition: &Partition) -> Result<Dropped> {
    let mut tx = transaction::begin(pool).await?;
    sqlx::query(LOCK_TIMEOUT).execute(&mut *tx).await?;
    sqlx::query(STATEMENT_TIMEOUT).execute(&mut *tx).await?;
    // Before the lock, so that it is not taken for nothing; and under it, because it must be so then.
    let Some(runs) = staying(&mut tx, partition).await? else { return Ok(Dropped::Needed) };
    let name = partition.quoted();
    let bytes: i64 = sqlx::query_scalar(AssertSqlSafe(format!(
        "select coalesce(sum(pg_column_size(h.events)), 0)::bigint from unnest((select $1::smallint[]), (select $2::uuid[])) k(shard, run_id)
         join {name} h on h.shard = k.shard and h.run_id = k.run_id"
    )))
    .bind(runs.iter().map(|(shard, _)| *shard).collect::<Vec<i16>>())
    .bind(runs.iter().map(|(_, run)| *run).collect::<Vec<Uuid>>())
    .persistent(false)
    .fetch_one(&mut *tx)
    .await?;
    if bytes > MOVED_BYTES_MAX {
        return Ok(Dropped::Needed);
    }
    execute(&mut tx, format!("alter table history detach partition {name}")).await?;
    crate::committer::crash_point("retire.after_detach");
    let Some(runs) = staying(&mut tx, partition).await? else { return Ok(Dropped::Needed) };
    let moved = sqlx::query(AssertSqlSafe(format!(
        "insert into history select h.* from unnest((select $1::smallint[]), (select $2::uuid[])) k(shard, run_id)
         join {name} h on h.shard = k.shard and h.run_id = k.run_id"
    )))
    .bind(runs.iter().map(|(shard, _)| *shard).collect::<Vec<i16>>())
    .bind(runs.iter().map(|(_, run)| *run).collect::<Vec<Uuid>>())
    .persistent(false)
    .execute(&mut *tx)
    .await?;
    execute(&mut tx, format!("drop table {name}")).await?;
    crate::committer::crash_point("retire.before_drop");
    tx.commit().await?;
    crate::committer::crash_point("retire.after_drop");
    Ok(Dropped::Yes { moved: moved.rows_affected() })
}

/// Runs with rows in this partition; `None` if those are more than may be moved.
async fn staying(conn: &mut PgConnection, partition: &Partition) -> Result<Option<Vec<(i16, Uuid)>>> {
    let found: Vec<(i16, Uuid, i64)> = sqlx::query_as(
        "select r.shard, r.run_id, r.seq - coalesce(r.forked_seq, 0) from generate_series(0, $3 - 1) s cross join lateral (
           select * from runs r where r.shard = s and r.run_id >= $1 and r.run_id < $2 and r.seq > 0 limit $4) r limit $4",
    )
    .bind(partition.from.unwrap_or(Uuid::nil()))
    .bind(partition.upto.unwrap_or(Uuid::max()))
    .bind(i32::from(SHARDS))
    .bind(MOVED_ROWS_MAX + 1)
    .fetch_all(conn)
    .await?;
    let rows: i64 = found.iter().map(|(.., rows)| *rows).sum();
    Ok((rows <= MOVED_ROWS_MAX).then(|| found.into_iter().map(|(shard, run, _)| (shard, run)).collect()))
}

/// A statement of names and ids that are made here or come from the catalog.
async fn execute(conn: &mut PgConnection, sql: String) -> Result<()> {
    sqlx::query(AssertSqlSafe(sql)).persistent(false).execute(conn).await?;
    Ok(())
}

/// Whether the next look may do better: somebody held a lock, or was faster.
fn is_passing(error: &sqlx::Error) -> bool {
    match error {
        // Lock not available, deadlock, too slow; the table is there or gone; it overlaps; the default one took a row meanwhile.
        sqlx::Error::Database(e) => {
            let code = e.code().unwrap_or_default();
            ["55P03", "40P01", "57014", "42P07", "42P01", "42P17", "23514", "55000"].contains(&code.as_ref())
        }
        _ => false,
    }
}

#[cfg(all(test, feature = "test-util"))]
mod tests;
