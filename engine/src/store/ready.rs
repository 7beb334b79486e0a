//! Table `ready`: claiming.
//!
//! A claim is two statements: a look at what is due, without a lock, and the taking of runs in the order of their turns
//! ([`super::turns`]). A look is bounded, whatever waits: it reads the [`WINDOW`] runs that are due the longest; if there are
//! more, it goes from lane to lane instead, beginning anywhere, and reads a few runs of each.

use super::turns::Due;
use crate::{
    Error, Result,
    committer::crash_point,
    ids::{RunId, WorkerId},
    transaction,
};
use chrono::{DateTime, Utc};
use sqlx::PgPool;

/// Due runs up to which a look reads all of them. Twice what a worker claims at once.
const WINDOW: usize = 512;
/// Lanes that a look at a longer queue visits, for each priority. Who is left out has a place in one of the next.
const LANES: i64 = 64;
/// Rows of one pass that are noted as waiting after their due instant has come.
const NOTED: i64 = 1_000;

/// What a look for due runs brought.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Look {
    pub(crate) due: Vec<Due>,
    /// Everything that was due since the asked instant is in it.
    pub(crate) all: bool,
}

/// Due runs of the given queues, and none that was due before `since`. Enough to claim `limit` of them in fair turns.
///
/// `since` is there for the sake of dead rows: while somebody's old snapshot keeps them, a look from the beginning of the
/// queue reads every run that was ever in it (28 ms for each 100,000, measured).
pub(crate) async fn due(pool: &PgPool, queues: &[String], since: Option<DateTime<Utc>>, limit: i64) -> Result<Look> {
    let window = window(pool, queues, since).await?;
    if window.len() <= WINDOW {
        return Ok(Look { due: window, all: true });
    }
    note(pool, queues).await?;
    Ok(Look { due: by_lane(pool, queues, since, limit, fastrand::i32(..)).await?, all: false })
}

/// The runs that are due the longest, one more than [`WINDOW`] at most.
const WINDOW_SQL: &str = "select c.run_id, c.priority, c.lane, c.due_at from unnest($1::text[]) s(queue) cross join lateral
       (select q.run_id, q.priority, q.lane, q.due_at from ready q
        where q.queue = s.queue and q.due_at <= (select engine_now()) and q.due_at >= coalesce($2, '-infinity'::timestamptz)
        order by q.due_at limit $3) c
     order by c.due_at limit $3";

async fn window(pool: &PgPool, queues: &[String], since: Option<DateTime<Utc>>) -> Result<Vec<Due>> {
    let rows: Vec<(uuid::Uuid, i16, i32, DateTime<Utc>)> = sqlx::query_as(WINDOW_SQL)
        .bind(queues)
        .bind(since)
        .bind(i64::try_from(WINDOW + 1).unwrap_or(i64::MAX))
        .fetch_all(pool)
        .await?;
    Ok(rows.into_iter().map(of_row).collect())
}

fn of_row((run, priority, lane, due_at): (uuid::Uuid, i16, i32, DateTime<Utc>)) -> Due {
    Due { run: RunId(run), priority, lane, due_at }
}

/// From lane to lane, each found by one descent of the index; then the oldest runs of each, the more the fewer lanes there are.
/// It begins at lane `$3` and goes round, so that no lane is always the last.
const BY_LANE_SQL: &str = "select c.run_id, c.priority, c.lane, c.due_at
     from unnest($1::text[]) s(queue)
     cross join unnest('{1,2,3,4,5}'::smallint[]) p(priority)
     cross join (values ($3::int, 2147483647), (-2147483648, $3 - 1)) half(low, high)
     cross join lateral (
       with recursive turn (lane, n) as (
         (select q.lane, 1 from ready q
          where q.queue = s.queue and q.priority = p.priority and not q.timed and q.lane between half.low and half.high
            and q.due_at <= (select engine_now()) and q.due_at >= coalesce($2, '-infinity'::timestamptz)
          order by q.queue, q.priority, q.lane limit 1)
         union all
         select (select q.lane from ready q
                 where q.queue = s.queue and q.priority = p.priority and not q.timed and q.lane > t.lane and q.lane <= half.high
                   and q.due_at <= (select engine_now()) and q.due_at >= coalesce($2, '-infinity'::timestamptz)
                 order by q.queue, q.priority, q.lane limit 1), t.n + 1
         from turn t where t.lane is not null and t.n < $4)
       select d.* from turn t cross join lateral
         (select q.run_id, q.priority, q.lane, q.due_at from ready q
          where q.queue = s.queue and q.priority = p.priority and not q.timed and q.lane = t.lane
            and q.due_at <= (select engine_now()) and q.due_at >= coalesce($2, '-infinity'::timestamptz)
          order by q.due_at limit greatest(1, 2 * $5 / (select count(*) from turn))) d
       where t.lane is not null) c";

async fn by_lane(
    pool: &PgPool,
    queues: &[String],
    since: Option<DateTime<Utc>>,
    limit: i64,
    first: i32,
) -> Result<Vec<Due>> {
    let rows: Vec<(uuid::Uuid, i16, i32, DateTime<Utc>)> = sqlx::query_as(BY_LANE_SQL)
        .bind(queues)
        .bind(since)
        // The half below it must not be empty by an overflow.
        .bind(first.max(i32::MIN + 1))
        .bind(LANES)
        .bind(limit)
        .fetch_all(pool)
        .await?;
    Ok(rows.into_iter().map(of_row).collect())
}

/// Puts runs whose due instant has come into the index of turns, the oldest first.
async fn note(pool: &PgPool, queues: &[String]) -> Result<()> {
    sqlx::query(NOTE_SQL).bind(queues).bind(NOTED).execute(pool).await?;
    Ok(())
}

/// By the rows' places, which do not change while they are locked: a join by key of a thousand rows would read the whole table.
const NOTE_SQL: &str = "with late as (select l.place from unnest($1::text[]) s(queue) cross join lateral
       (select q.ctid as place from ready q where q.timed and q.queue = s.queue and q.due_at <= (select engine_now())
        order by q.due_at limit $2 for update skip locked) l)
     update ready q set timed = false where q.ctid = any(array(select place from late))";

/// Claims up to `limit` of these runs, in this order, as far as they are still due and nobody's. Their epochs rise and come
/// back with them; what older owners send is refused from now on. Also an instant at which all of them were due.
///
/// # Errors
/// `lease_lost` if this worker was declared dead.
/// # Transaction
/// One. Holds the worker's own row for key share, so that a takeover of this worker waits and then sees these claims.
pub(crate) async fn take(
    pool: &PgPool,
    worker: WorkerId,
    runs: &[RunId],
    limit: i64,
) -> Result<(Vec<(RunId, i64)>, DateTime<Utc>)> {
    if runs.is_empty() {
        return Ok((Vec::new(), DateTime::UNIX_EPOCH));
    }
    let mut tx = transaction::begin(pool).await?;
    crash_point("claim.after_begin");
    alive(&mut tx, worker).await?;
    crash_point("claim.after_alive");
    // Both rows are locked with skip locked: a sender holds the run and wants the queue row, so waiting here could deadlock.
    let claimed: Vec<(uuid::Uuid, i64, DateTime<Utc>)> = sqlx::query_as(
        "with w as (select * from unnest($2::smallint[], $3::uuid[]) with ordinality t(shard, run_id, ord)),
              c as (select q.shard, q.run_id from w join ready q on q.shard = w.shard and q.run_id = w.run_id
                    join runs r on r.shard = q.shard and r.run_id = q.run_id
                    where q.due_at <= engine_now() and r.owner is null and r.closed_at is null and r.status <> 'quarantined' and r.admitted
                    order by w.ord limit $4 for update of q, r skip locked),
              d as (delete from ready q using c where q.shard = c.shard and q.run_id = c.run_id)
         update runs r set owner = $1, epoch = r.epoch + 1, parked = false, waiting = null
         from c where r.shard = c.shard and r.run_id = c.run_id returning r.run_id, r.epoch, engine_now()",
    )
    .bind(worker.0)
    .bind(runs.iter().map(|run| run.shard()).collect::<Vec<i16>>())
    .bind(runs.iter().map(|run| run.0).collect::<Vec<_>>())
    .bind(limit)
    .fetch_all(&mut *tx)
    .await?;
    if !claimed.is_empty() {
        crash_point("claim.before_commit");
    }
    tx.commit().await?;
    let now = claimed.iter().map(|(.., now)| *now).max().unwrap_or(DateTime::UNIX_EPOCH);
    Ok((claimed.into_iter().map(|(id, epoch, _)| (RunId(id), epoch)).collect(), now))
}

/// [`take`] of the due runs that have a message to read, wherever in the queue they are: with their lanes.
pub(crate) async fn take_messaged(
    pool: &PgPool,
    worker: WorkerId,
    queues: &[String],
    limit: i64,
) -> Result<(Vec<(RunId, i64, i32)>, DateTime<Utc>)> {
    let mut tx = transaction::begin(pool).await?;
    alive(&mut tx, worker).await?;
    let claimed: Vec<(uuid::Uuid, i64, i32, DateTime<Utc>)> = sqlx::query_as(
        "with c as (select q.shard, q.run_id from ready q join runs r on r.shard = q.shard and r.run_id = q.run_id
                    where q.queue = any($2) and q.due_at <= engine_now() and r.owner is null and r.closed_at is null
                      and r.status <> 'quarantined' and r.admitted and r.inbox_n > r.inbox_seen
                    order by q.due_at limit $3 for update of q, r skip locked),
              d as (delete from ready q using c where q.shard = c.shard and q.run_id = c.run_id)
         update runs r set owner = $1, epoch = r.epoch + 1, parked = false, waiting = null
         from c where r.shard = c.shard and r.run_id = c.run_id returning r.run_id, r.epoch, r.lane, engine_now()",
    )
    .bind(worker.0)
    .bind(queues)
    .bind(limit)
    .fetch_all(&mut *tx)
    .await?;
    tx.commit().await?;
    let now = claimed.iter().map(|(.., now)| *now).max().unwrap_or(DateTime::UNIX_EPOCH);
    Ok((claimed.into_iter().map(|(id, epoch, lane, _)| (RunId(id), epoch, lane)).collect(), now))
}

async fn alive(conn: &mut sqlx::PgConnection, worker: WorkerId) -> Result<()> {
    let alive: Option<i32> = sqlx::query_scalar("select 1 from workers where id = $1 for key share")
        .bind(worker.0)
        .fetch_optional(conn)
        .await?;
    alive.map(drop).ok_or(Error::LeaseLost)
}

/// How much waits in one queue.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Depth {
    pub(crate) queue: String,
    /// Runs that are due; counted up to [`DEPTH_MAX`].
    pub(crate) due: i64,
    /// How long the first of them has been due, in seconds.
    pub(crate) oldest_s: f64,
}

/// Runs of a queue beyond which it is just deep.
const DEPTH_MAX: i64 = 10_000;
/// Queues of one look.
const QUEUES_MAX: i64 = 100;

/// How much waits in each queue that has a row. Goes from queue to queue by descents of the index and counts index entries, at
/// most [`DEPTH_MAX`] of each.
pub(crate) async fn depths(pool: &PgPool) -> Result<Vec<Depth>> {
    let rows: Vec<(String, i64, f64)> = sqlx::query_as(
        "with recursive names (queue, n) as (
           (select queue, 1 from ready order by queue limit 1)
           union all
           select (select q.queue from ready q where q.queue > names.queue order by q.queue limit 1), n + 1
           from names where names.queue is not null and n < $1)
         select s.queue, d.due, coalesce(extract(epoch from engine_now() - d.oldest), 0)::float8
         from names s cross join lateral
           (select count(*) as due, min(x.due_at) as oldest from
             (select q.due_at from ready q where q.queue = s.queue and q.due_at <= (select engine_now()) order by q.due_at limit $2) x) d
         where s.queue is not null",
    )
    .bind(QUEUES_MAX)
    .bind(DEPTH_MAX)
    .fetch_all(pool)
    .await?;
    Ok(rows.into_iter().map(|(queue, due, oldest_s)| Depth { queue, due, oldest_s }).collect())
}

/// Keys of one look.
pub(crate) const KEYS_MAX: usize = 100;

/// The keys that have a row, behind the given one, in the database's order: at most [`KEYS_MAX`], each found by one descent of
/// the index.
pub(crate) async fn keys(pool: &PgPool, after: Option<&str>) -> Result<Vec<String>> {
    Ok(sqlx::query_scalar(
        "with recursive keys (queue, n) as (
           (select queue, 1 from ready where queue > $1 order by queue limit 1)
           union all
           select (select q.queue from ready q where q.queue > keys.queue order by q.queue limit 1), n + 1
           from keys where keys.queue is not null and n < $2)
         select queue from keys where queue is not null order by n",
    )
    // Every key is behind the empty text.
    .bind(after.unwrap_or_default())
    .bind(i64::try_from(KEYS_MAX).unwrap_or(i64::MAX))
    .fetch_all(pool)
    .await?)
}

#[cfg(all(test, feature = "test-util"))]
#[path = "ready_tests.rs"]
mod tests;
