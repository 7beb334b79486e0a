//! Table `ready`: claiming.

use crate::{
    Error, Result,
    ids::{RunId, WorkerId},
    transaction,
};
use chrono::{DateTime, Utc};
use sqlx::PgPool;

/// Which due runs to claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Which {
    Any,
    /// Those that have a message to read.
    Messaged,
}

/// What a look for due runs brought.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Claimed {
    /// With the epochs that they are owned under from now on.
    pub(crate) runs: Vec<(RunId, i64)>,
    /// The latest due instant among them.
    pub(crate) newest: Option<DateTime<Utc>>,
}

/// Claims up to `limit` due runs of the given queues, the earliest first, and none that was due before `since`. Their epochs rise and come back with them; what older owners send is
/// refused from now on.
///
/// `since` is there for the sake of dead rows: while somebody's old snapshot keeps them, a look from the beginning of the
/// queue reads every run that was ever in it (28 ms for each 100,000, measured).
///
/// # Errors
/// `lease_lost` if this worker was declared dead.
/// # Transaction
/// One. Holds the worker's own row for key share, so that a takeover of this worker waits and then sees these claims.
pub(crate) async fn claim(
    pool: &PgPool,
    worker: WorkerId,
    queues: &[String],
    which: Which,
    since: Option<DateTime<Utc>>,
    limit: i64,
) -> Result<Claimed> {
    let mut tx = transaction::begin(pool).await?;
    crate::committer::crash_point("claim.after_begin");
    let alive: Option<i32> = sqlx::query_scalar("select 1 from workers where id = $1 for key share")
        .bind(worker.0)
        .fetch_optional(&mut *tx)
        .await?;
    if alive.is_none() {
        return Err(Error::LeaseLost);
    }
    crate::committer::crash_point("claim.after_alive");
    // Both rows are locked with skip locked: a sender holds the run and wants the queue row, so waiting here could deadlock.
    let claimed: Vec<(uuid::Uuid, i64, DateTime<Utc>)> = sqlx::query_as(
        "with c as (select q.shard, q.run_id, q.due_at from ready q join runs r on r.shard = q.shard and r.run_id = q.run_id
                    where q.queue = any($2) and q.due_at <= engine_now()
                      and q.due_at >= coalesce($5, '-infinity'::timestamptz) and r.owner is null and r.closed_at is null
                      and r.status <> 'quarantined' and ($4 or r.inbox_n > r.inbox_seen)
                    order by q.due_at limit $3 for update of q, r skip locked),
              d as (delete from ready q using c where q.shard = c.shard and q.run_id = c.run_id)
         update runs r set owner = $1, epoch = r.epoch + 1, parked = false, waiting = null
         from c where r.shard = c.shard and r.run_id = c.run_id returning r.run_id, r.epoch, c.due_at",
    )
    .bind(worker.0)
    .bind(queues)
    .bind(limit)
    .bind(which == Which::Any)
    .bind(since)
    .fetch_all(&mut *tx)
    .await?;
    if !claimed.is_empty() {
        crate::committer::crash_point("claim.before_commit");
    }
    tx.commit().await?;
    Ok(Claimed {
        newest: claimed.iter().map(|(.., due)| *due).max(),
        runs: claimed.into_iter().map(|(id, epoch, _)| (RunId(id), epoch)).collect(),
    })
}
