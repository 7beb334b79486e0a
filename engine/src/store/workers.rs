//! Tables `workers` and `dead_workers`: one lease per process.

use super::spread::{Forms, Spread, bind_shard};
use crate::{
    Result,
    ids::{RunId, SHARDS, WorkerId},
    labels,
    transaction::{Session, asked},
};
use chrono::{DateTime, Utc};
use sqlx::{PgConnection, PgPool};
use std::collections::BTreeSet;

pub(crate) async fn register(
    conn: &mut PgConnection,
    worker: WorkerId,
    queues: &[String],
    labels: &[String],
    lease_ms: i32,
) -> Result<DateTime<Utc>> {
    // The kernel knows it; a shell's HOSTNAME is seldom exported, and stands in where there is no /proc.
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname")
        .or_else(|_| std::env::var("HOSTNAME"))
        .map_or_else(|_| String::new(), |name| name.trim().to_owned());
    Ok(sqlx::query_scalar(
        "insert into workers (id, host, pid, version, queues, lease_ms, labels) values ($1, $2, $3, $4, $5, $6, $7) returning engine_now()",
    )
    .bind(worker.0)
    .bind(host)
    .bind(i32::try_from(std::process::id()).unwrap_or(0))
    .bind(env!("CARGO_PKG_VERSION"))
    .bind(queues)
    .bind(lease_ms)
    .bind(labels)
    .fetch_one(conn)
    .await?)
}

/// What a run waits for, if it is due, its key asks for labels and no live worker has them. For people.
pub(crate) async fn wanted(conn: &mut PgConnection, run: RunId, key: &str) -> Result<Option<String>> {
    let (queue, labels) = labels::split(key);
    if labels.is_empty() {
        return Ok(None);
    }
    // Two questions: workers are not where runs are.
    let due = "select exists (select from ready where shard = $1 and run_id = $2 and due_at <= engine_now())";
    let due: bool = sqlx::query_scalar(due).bind(run.shard()).bind(run.0).fetch_one(&mut *conn).await?;
    if !due {
        return Ok(None);
    }
    let there: bool = sqlx::query_scalar(
        "select exists (select from workers w where w.labels @> $1 and $2 = any(w.queues)
                          and w.heartbeat_at + w.lease_ms * interval '1 millisecond' >= engine_now())",
    )
    .bind(&labels)
    .bind(queue)
    .fetch_one(conn)
    .await?;
    let text = || format!("for a worker of queue `{queue}` with the labels {}; none is there", labels.join(", "));
    Ok((!there).then(text))
}

/// Renews the lease. `None` if this worker was declared dead. The database's time comes back with it.
pub(crate) async fn heartbeat(conn: &mut PgConnection, worker: WorkerId) -> Result<Option<DateTime<Utc>>> {
    // A lost heartbeat costs a takeover, never a transition: no reason to wait for the disk.
    let beat = "update workers set heartbeat_at = engine_now()
                where id = $1 and set_config('synchronous_commit', 'off', true) = 'off' returning engine_now()";
    Ok(sqlx::query_scalar(beat).bind(worker.0).fetch_optional(conn).await?)
}

/// Declares workers dead whose lease is over. First of the two statements of a takeover: it waits for claims in flight.
pub(crate) async fn bury(conn: &mut PgConnection) -> Result<u64> {
    let buried = sqlx::query(
        "with late as (select id from workers where heartbeat_at + lease_ms * interval '1 millisecond' < engine_now()
                       limit 100 for update skip locked),
              gone as (delete from workers w using late where w.id = late.id returning w.id)
         insert into dead_workers (id) select id from gone on conflict do nothing",
    )
    .execute(conn)
    .await?;
    Ok(buried.rows_affected())
}

/// Declares one worker dead at its own wish, at the end of a drain.
pub(crate) async fn leave(pool: &PgPool, worker: WorkerId) -> Result<()> {
    sqlx::query(
        "with gone as (delete from workers where id = $1 returning id) insert into dead_workers (id) select id from gone on conflict do nothing",
    )
    .bind(worker.0)
    .execute(pool)
    .await?;
    Ok(())
}

/// By the ids of the dead, and not joined with their table: while somebody's old snapshot keeps dead rows, the index of owners leads to
/// every run that anybody ever had, and a join may begin there (0.4 s every look after five minutes, measured).
pub(super) static TAKE_OVER: Forms = Forms::new(
    "with orphans as (select r.shard, r.run_id from runs r
                          where r.owner = any($1::uuid[]) and r.owner is not null/*at r*/ limit $2 for update of r skip locked),
              u as (update runs r set owner = null, epoch = r.epoch + 1, parked = true, waiting = 'worker'
                    from orphans o where r.shard = o.shard and r.run_id = o.run_id/*at r*/ returning r.shard, r.run_id, r.queue, r.priority, r.lane),
              q as (insert into ready (shard, run_id, queue, priority, lane) select shard, run_id, queue, priority, lane from u
                    on conflict (shard, run_id) do update set due_at = least(ready.due_at, excluded.due_at))
         select run_id from u",
    "$3",
);

/// Frees up to `limit` runs of dead workers for others: owner cleared, epoch raised, queued. Second statement of a takeover. Where
/// runs are spread, up to `limit` of each shard. Nothing is asked of `runs` while no dead worker has any.
///
/// A shard that gives no answer is left out: its dead keep their runs for a later look.
pub(crate) async fn take_over(session: &mut Session, spread: Spread, limit: i64) -> Result<Vec<RunId>> {
    // Nobody of them can claim any more: whoever has nothing anywhere now has nothing.
    let dead = asked!(session, None, |conn| dead(conn)).unwrap_or_default();
    if dead.is_empty() {
        return Ok(Vec::new());
    }
    let (mut freed, mut whole) = (Vec::new(), true);
    for shard in spread.parts(fastrand::i16(0..SHARDS)) {
        match asked!(session, shard, |conn| take_over_in(conn, shard, &dead, limit)) {
            Some(more) => freed.extend(more.into_iter().map(RunId)),
            None => whole = false,
        }
        crate::committer::crash_point("takeover.after_runs");
    }
    if freed.is_empty() && whole {
        taken(session, spread, &dead).await?;
    }
    Ok(freed)
}

/// The dead whose runs are not all free.
async fn dead(conn: &mut PgConnection) -> Result<Vec<uuid::Uuid>> {
    Ok(sqlx::query_scalar("select id from dead_workers where not runs_taken").fetch_all(conn).await?)
}

async fn take_over_in(
    conn: &mut PgConnection,
    shard: Option<i16>,
    dead: &[uuid::Uuid],
    limit: i64,
) -> Result<Vec<uuid::Uuid>> {
    let query = sqlx::query_scalar(TAKE_OVER.text(shard)).bind(dead).bind(limit);
    Ok(bind_shard!(query, shard).fetch_all(conn).await?)
}

static OWNERS: Forms = Forms::new(
    "select distinct r.owner from runs r where r.owner = any($1::uuid[]) and r.owner is not null/*at r*/",
    "$2",
);

/// Notes which of these dead workers have no run left.
async fn taken(session: &mut Session, spread: Spread, dead: &[uuid::Uuid]) -> Result<()> {
    let mut left: BTreeSet<uuid::Uuid> = BTreeSet::new();
    for shard in spread.parts(0) {
        match asked!(session, shard, |conn| owners_in(conn, shard, dead)) {
            Some(owners) => left.extend(owners),
            None => return Ok(()),
        }
    }
    let gone: Vec<uuid::Uuid> = dead.iter().filter(|id| !left.contains(id)).copied().collect();
    asked!(session, None, |conn| note_taken(conn, &gone));
    Ok(())
}

async fn owners_in(conn: &mut PgConnection, shard: Option<i16>, dead: &[uuid::Uuid]) -> Result<Vec<uuid::Uuid>> {
    let query = sqlx::query_scalar(OWNERS.text(shard)).bind(dead);
    Ok(bind_shard!(query, shard).fetch_all(conn).await?)
}

async fn note_taken(conn: &mut PgConnection, gone: &[uuid::Uuid]) -> Result<()> {
    sqlx::query("update dead_workers set runs_taken = true where id = any($1)").bind(gone).execute(conn).await?;
    Ok(())
}

static UNREAD: Forms = Forms::new(
    "select r.run_id, r.inbox_n from unnest($1::smallint[], $2::uuid[]) d(shard, run_id)
         join runs r on r.shard = d.shard and r.run_id = d.run_id where r.inbox_n > r.inbox_seen/*at r*/",
    "$3",
);

/// Those of `driven` that have messages they have not read, with the number of messages. By their keys, not by their owner:
/// while somebody's old snapshot keeps dead rows, the index of owners leads to every run that this worker ever had.
pub(crate) async fn unread(session: &mut Session, spread: Spread, driven: &[RunId]) -> Result<Vec<(RunId, i64)>> {
    let mut unread = Vec::new();
    for (shard, part) in spread.divide(driven.to_vec(), RunId::shard) {
        let rows = asked!(session, shard, |conn| unread_in(conn, shard, &part)).unwrap_or_default();
        unread.extend(rows.into_iter().map(|(id, n)| (RunId(id), n)));
    }
    Ok(unread)
}

async fn unread_in(conn: &mut PgConnection, shard: Option<i16>, part: &[RunId]) -> Result<Vec<(uuid::Uuid, i64)>> {
    let query = sqlx::query_as(UNREAD.text(shard))
        .bind(part.iter().map(|run| run.shard()).collect::<Vec<i16>>())
        .bind(part.iter().map(|run| run.0).collect::<Vec<_>>());
    Ok(bind_shard!(query, shard).fetch_all(conn).await?)
}
