//! Table `ready`: claiming.
//!
//! A claim is two statements: a look at what is due, without a lock, and the taking of runs in the order of their turns
//! ([`super::turns`]). A look is bounded, whatever waits: it reads the [`WINDOW`] runs that are due the longest; if there are
//! more, it goes from lane to lane instead, beginning anywhere, and reads a few runs of each.
//!
//! Where runs are [spread](super::spread) over nodes, both go from shard to shard, beginning anywhere, until enough is found.

use super::{
    spread::{Forms, Spread, bind_shard},
    turns::Due,
};
use crate::{
    Error, Result,
    committer::crash_point,
    ids::{RunId, SHARDS, WorkerId},
    transaction::{self, Session, asked},
};
use chrono::{DateTime, Utc};
use sqlx::PgConnection;
use std::collections::{BTreeMap, BTreeSet};

/// Due runs up to which a look reads all of them. Twice what a worker claims at once.
const WINDOW: usize = 512;
/// The same of one shard. Chosen: what a worker claims at once, divided by the shards, many times over.
const WINDOW_OF_ONE: usize = 32;
/// How often a claim goes on behind runs that it has not got, where runs are spread.
const ROUNDS: usize = 4;
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
    /// Since the asked instant nothing older was due; `None`: nothing was, or the look did not go everywhere.
    pub(crate) oldest: Option<DateTime<Utc>>,
}

/// Due runs of the given queues, and none that was due before `since`. Enough to claim `limit` of them in fair turns.
///
/// `since` is there for the sake of dead rows: while somebody's old snapshot keeps them, a look from the beginning of the
/// queue reads every run that was ever in it (28 ms for each 100,000, measured). However long the queue is, the next look need
/// not begin before [`Look::oldest`].
///
/// A shard that gives no answer is left out: the runs of the others do not wait for it.
pub(crate) async fn due(
    session: &mut Session,
    spread: Spread,
    queues: &[String],
    since: Option<DateTime<Utc>>,
    limit: i64,
) -> Result<Look> {
    let (mut due, mut all, mut oldest, mut whole) = (Vec::new(), true, None::<DateTime<Utc>>, true);
    for shard in spread.parts(fastrand::i16(0..SHARDS)) {
        if due.len() > WINDOW {
            // Enough; the next look begins elsewhere.
            (all, oldest) = (false, None);
            break;
        }
        let Some(look) = asked!(session, shard, |conn| due_in(conn, shard, queues, since, limit)) else {
            whole = false;
            continue;
        };
        all &= look.all;
        oldest = oldest.into_iter().chain(look.oldest).min();
        due.extend(look.due);
    }
    if !whole {
        (all, oldest) = (false, None);
    }
    Ok(Look { due, all, oldest })
}

/// [`due`] of one shard, or of all together.
async fn due_in(
    conn: &mut PgConnection,
    shard: Option<i16>,
    queues: &[String],
    since: Option<DateTime<Utc>>,
    limit: i64,
) -> Result<Look> {
    let most = if shard.is_none() { WINDOW } else { WINDOW_OF_ONE };
    let window = window(conn, shard, queues, since, most).await?;
    let oldest = window.iter().map(|due| due.due_at).min();
    if window.len() <= most {
        return Ok(Look { due: window, all: true, oldest });
    }
    note(conn, shard, queues).await?;
    let due = by_lane(conn, shard, queues, since, limit, fastrand::i32(..)).await?;
    Ok(Look { due, all: false, oldest })
}

/// The runs that are due the longest, one more than `most` at most.
static WINDOW_SQL: Forms = Forms::new(
    "select c.run_id, c.priority, c.lane, c.due_at from unnest($1::text[]) s(queue) cross join lateral
       (select q.run_id, q.priority, q.lane, q.due_at from ready q
        where q.queue = s.queue and q.due_at <= (select engine_now()) and q.due_at >= coalesce($2, '-infinity'::timestamptz)/*at q*/
        order by q.due_at limit $3) c
     order by c.due_at limit $3",
    "$4",
);

async fn window(
    conn: &mut PgConnection,
    shard: Option<i16>,
    queues: &[String],
    since: Option<DateTime<Utc>>,
    most: usize,
) -> Result<Vec<Due>> {
    let most = i64::try_from(most + 1).unwrap_or(i64::MAX);
    let query = sqlx::query_as(WINDOW_SQL.text(shard)).bind(queues).bind(since).bind(most);
    let rows: Vec<(uuid::Uuid, i16, i32, DateTime<Utc>)> = bind_shard!(query, shard).fetch_all(conn).await?;
    Ok(rows.into_iter().map(of_row).collect())
}

fn of_row((run, priority, lane, due_at): (uuid::Uuid, i16, i32, DateTime<Utc>)) -> Due {
    Due { run: RunId(run), priority, lane, due_at }
}

/// From lane to lane, each found by one descent of the index; then the oldest runs of each, the more the fewer lanes there are.
/// It begins at lane `$3` and goes round, so that no lane is always the last.
static BY_LANE_SQL: Forms = Forms::new(
    "select c.run_id, c.priority, c.lane, c.due_at
     from unnest($1::text[]) s(queue)
     cross join unnest('{1,2,3,4,5}'::smallint[]) p(priority)
     cross join (values ($3::int, 2147483647), (-2147483648, $3 - 1)) half(low, high)
     cross join lateral (
       with recursive turn (lane, n) as (
         (select q.lane, 1 from ready q
          where q.queue = s.queue and q.priority = p.priority and not q.timed and q.lane between half.low and half.high
            and q.due_at <= (select engine_now()) and q.due_at >= coalesce($2, '-infinity'::timestamptz)/*at q*/
          order by q.queue, q.priority, q.lane limit 1)
         union all
         select (select q.lane from ready q
                 where q.queue = s.queue and q.priority = p.priority and not q.timed and q.lane > t.lane and q.lane <= half.high
                   and q.due_at <= (select engine_now()) and q.due_at >= coalesce($2, '-infinity'::timestamptz)/*at q*/
                 order by q.queue, q.priority, q.lane limit 1), t.n + 1
         from turn t where t.lane is not null and t.n < $4)
       select d.* from turn t cross join lateral
         (select q.run_id, q.priority, q.lane, q.due_at from ready q
          where q.queue = s.queue and q.priority = p.priority and not q.timed and q.lane = t.lane
            and q.due_at <= (select engine_now()) and q.due_at >= coalesce($2, '-infinity'::timestamptz)/*at q*/
          order by q.due_at limit greatest(1, 2 * $5 / (select count(*) from turn))) d
       where t.lane is not null) c",
    "$6",
);

async fn by_lane(
    conn: &mut PgConnection,
    shard: Option<i16>,
    queues: &[String],
    since: Option<DateTime<Utc>>,
    limit: i64,
    first: i32,
) -> Result<Vec<Due>> {
    // The half below it must not be empty by an overflow.
    let first = first.max(i32::MIN + 1);
    let query = sqlx::query_as(BY_LANE_SQL.text(shard)).bind(queues).bind(since).bind(first).bind(LANES).bind(limit);
    let rows: Vec<(uuid::Uuid, i16, i32, DateTime<Utc>)> = bind_shard!(query, shard).fetch_all(conn).await?;
    Ok(rows.into_iter().map(of_row).collect())
}

/// Puts runs whose due instant has come into the index of turns, the oldest first.
async fn note(conn: &mut PgConnection, shard: Option<i16>, queues: &[String]) -> Result<()> {
    bind_shard!(sqlx::query(NOTE_SQL.text(shard)).bind(queues).bind(NOTED), shard).execute(conn).await?;
    Ok(())
}

/// By the rows' places, which do not change while they are locked: a join by key of a thousand rows would read the whole table.
static NOTE_SQL: Forms = Forms::new(
    "with late as (select l.place from unnest($1::text[]) s(queue) cross join lateral
       (select q.ctid as place from ready q where q.timed and q.queue = s.queue and q.due_at <= (select engine_now())/*at q*/
        order by q.due_at limit $2 for update skip locked) l)
     update ready q set timed = false where q.ctid = any(array(select place from late))/*at q*/",
    "$3",
);

/// Claims up to `limit` of these runs, in this order, as far as they are still due and nobody's. Their epochs rise and come
/// back with them; what older owners send is refused from now on. Also an instant at which all of them were due.
///
/// # Errors
/// `lease_lost` if this worker was declared dead. Where runs are spread, a shard that gives no answer is left out, and any other
/// error behind the first claim ends it: what is claimed is to be driven.
/// # Transaction
/// One; where runs are spread, one a shard. Holds the worker's own row for key share, so that a takeover of this worker waits and
/// then sees these claims.
pub(crate) async fn take(
    session: &mut Session,
    spread: Spread,
    worker: WorkerId,
    runs: &[RunId],
    limit: i64,
) -> Result<(Vec<(RunId, i64)>, DateTime<Utc>)> {
    let (mut claimed, mut now) = (Vec::new(), DateTime::UNIX_EPOCH);
    let mut rest = runs;
    for _ in 0..if spread == Spread::Together { 1 } else { ROUNDS } {
        let room = limit - i64::try_from(claimed.len()).unwrap_or(limit);
        // On one server the statement itself goes on behind what it does not get.
        let many =
            if spread == Spread::Together { rest.len() } else { usize::try_from(room).unwrap_or(0).min(rest.len()) };
        let (turn, later) = rest.split_at(many);
        rest = later;
        for (shard, part) in spread.divide(turn.to_vec(), RunId::shard) {
            // What a shard has claimed without an answer is found as a stray.
            match take_of(session, shard, worker, &part, room).await {
                Ok(Some((more, at))) => {
                    claimed.extend(more);
                    now = now.max(at);
                }
                Ok(None) => {}
                Err(error) => return enough(session, claimed, now, error),
            }
        }
        if rest.is_empty() || i64::try_from(claimed.len()).unwrap_or(limit) >= limit {
            break;
        }
    }
    Ok((claimed, now))
}

/// What was claimed before an error, if anything was.
fn enough<T>(
    session: &mut Session,
    claimed: Vec<T>,
    now: DateTime<Utc>,
    error: Error,
) -> Result<(Vec<T>, DateTime<Utc>)> {
    if claimed.is_empty() || matches!(error, Error::LeaseLost) {
        return Err(error);
    }
    tracing::warn!(%error, "cannot claim more runs");
    session.leave();
    Ok((claimed, now))
}

/// Both rows are locked with skip locked: a sender holds the run and wants the queue row, so waiting here could deadlock.
///
/// Most that `ready` holds is dead, and its statistics say at times that it is empty: reading all of it looks as dear as one row then,
/// and takes a second beside a pinned snapshot. So each run is looked up by its key, and nothing else is left to choose: by `lateral`,
/// by a condition on time that no index serves (`is true`), and by `= any(array[…])`, by which nothing can be merged or hashed. A
/// comparison of rows would do for that too, but a descent by one ends where the first column does: it reads what is behind the key.
static TAKE: Forms = Forms::new(
    "with w as (select * from unnest($2::smallint[], $3::uuid[]) with ordinality t(shard, run_id, ord)),
              c as (select k.shard, k.run_id from w cross join lateral
                      (select q.shard, q.run_id from ready q join runs r on r.shard = q.shard and r.run_id = q.run_id
                       where q.shard = w.shard and q.run_id = w.run_id and (q.due_at <= engine_now()) is true
                         and r.owner is null and r.closed_at is null and r.status <> 'quarantined' and r.admitted/*at q*//*at r*/
                       limit 1 for update of q, r skip locked) k
                    order by w.ord limit $4),
              d as (delete from ready q using c where q.shard = any(array[c.shard]) and q.run_id = any(array[c.run_id])/*at q*/)
         update runs r set owner = $1, epoch = r.epoch + 1, parked = false, waiting = null
         from c where r.shard = c.shard and r.run_id = c.run_id/*at r*/ returning r.run_id, r.epoch, engine_now()",
    "$5",
);

async fn take_of(
    session: &mut Session,
    shard: Option<i16>,
    worker: WorkerId,
    runs: &[RunId],
    limit: i64,
) -> Result<Option<(Vec<(RunId, i64)>, DateTime<Utc>)>> {
    Ok(asked!(session, shard, |conn| take_in(conn, shard, worker, runs, limit)))
}

async fn take_in(
    conn: &mut PgConnection,
    shard: Option<i16>,
    worker: WorkerId,
    runs: &[RunId],
    limit: i64,
) -> Result<(Vec<(RunId, i64)>, DateTime<Utc>)> {
    let mut tx = transaction::on(conn).await?;
    crash_point("claim.after_begin");
    alive(&mut tx, worker).await?;
    crash_point("claim.after_alive");
    let query = sqlx::query_as(TAKE.text(shard))
        .bind(worker.0)
        .bind(runs.iter().map(|run| run.shard()).collect::<Vec<i16>>())
        .bind(runs.iter().map(|run| run.0).collect::<Vec<_>>())
        .bind(limit);
    let claimed: Vec<(uuid::Uuid, i64, DateTime<Utc>)> = bind_shard!(query, shard).fetch_all(&mut *tx).await?;
    if !claimed.is_empty() {
        crash_point("claim.before_commit");
    }
    tx.commit().await?;
    let now = claimed.iter().map(|(.., now)| *now).max().unwrap_or(DateTime::UNIX_EPOCH);
    Ok((claimed.into_iter().map(|(id, epoch, _)| (RunId(id), epoch)).collect(), now))
}

static TAKE_MESSAGED: Forms = Forms::new(
    "with c as (select q.shard, q.run_id from ready q join runs r on r.shard = q.shard and r.run_id = q.run_id
                    where q.queue = any($2) and q.due_at <= engine_now() and r.owner is null and r.closed_at is null
                      and r.status <> 'quarantined' and r.admitted and r.inbox_n > r.inbox_seen/*at q*//*at r*/
                    order by q.due_at limit $3 for update of q, r skip locked),
              d as (delete from ready q using c where q.shard = any(array[c.shard]) and q.run_id = any(array[c.run_id])/*at q*/)
         update runs r set owner = $1, epoch = r.epoch + 1, parked = false, waiting = null
         from c where r.shard = c.shard and r.run_id = c.run_id/*at r*/ returning r.run_id, r.epoch, r.lane, engine_now()",
    "$4",
);

/// [`take`] of the due runs that have a message to read, wherever in the queue they are: with their lanes.
pub(crate) async fn take_messaged(
    session: &mut Session,
    spread: Spread,
    worker: WorkerId,
    queues: &[String],
    limit: i64,
) -> Result<(Vec<(RunId, i64, i32)>, DateTime<Utc>)> {
    let (mut claimed, mut now) = (Vec::new(), DateTime::UNIX_EPOCH);
    for shard in spread.parts(fastrand::i16(0..SHARDS)) {
        let room = limit - i64::try_from(claimed.len()).unwrap_or(limit);
        if room <= 0 {
            break;
        }
        match take_messaged_of(session, shard, worker, queues, room).await {
            Ok(Some(more)) => {
                now = more.iter().map(|(.., at)| *at).max().unwrap_or(now).max(now);
                claimed.extend(more.into_iter().map(|(id, epoch, lane, _)| (RunId(id), epoch, lane)));
            }
            Ok(None) => {}
            Err(error) => return enough(session, claimed, now, error),
        }
    }
    Ok((claimed, now))
}

/// A run that was claimed for its message: its epoch, its lane, and the instant.
type Messaged = (uuid::Uuid, i64, i32, DateTime<Utc>);

async fn take_messaged_of(
    session: &mut Session,
    shard: Option<i16>,
    worker: WorkerId,
    queues: &[String],
    limit: i64,
) -> Result<Option<Vec<Messaged>>> {
    Ok(asked!(session, shard, |conn| take_messaged_in(conn, shard, worker, queues, limit)))
}

async fn take_messaged_in(
    conn: &mut PgConnection,
    shard: Option<i16>,
    worker: WorkerId,
    queues: &[String],
    limit: i64,
) -> Result<Vec<Messaged>> {
    let mut tx = transaction::on(conn).await?;
    alive(&mut tx, worker).await?;
    crash_point("crowded.after_alive");
    let query = sqlx::query_as(TAKE_MESSAGED.text(shard)).bind(worker.0).bind(queues).bind(limit);
    let claimed: Vec<_> = bind_shard!(query, shard).fetch_all(&mut *tx).await?;
    if !claimed.is_empty() {
        crash_point("crowded.before_commit");
    }
    tx.commit().await?;
    Ok(claimed)
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

static DEPTHS: Forms = Forms::new(
    "with recursive names (queue, n) as (
           (select q.queue, 1 from ready q where true/*at q*/ order by q.queue limit 1)
           union all
           select (select q.queue from ready q where q.queue > names.queue/*at q*/ order by q.queue limit 1), n + 1
           from names where names.queue is not null and n < $1)
         select s.queue, d.due, coalesce(extract(epoch from engine_now() - d.oldest), 0)::float8
         from names s cross join lateral
           (select count(*) as due, min(x.due_at) as oldest from
             (select q.due_at from ready q where q.queue = s.queue and q.due_at <= (select engine_now())/*at q*/ order by q.due_at limit $2) x) d
         where s.queue is not null",
    "$3",
);

/// How much waits in each queue that has a row. Goes from queue to queue by descents of the index and counts index entries, at
/// most [`DEPTH_MAX`] of each.
pub(crate) async fn depths(session: &mut Session, spread: Spread) -> Result<Vec<Depth>> {
    let mut all: BTreeMap<String, Depth> = BTreeMap::new();
    for shard in spread.parts(0) {
        for (queue, due, oldest_s) in asked!(session, shard, |conn| depths_in(conn, shard)).into_iter().flatten() {
            let depth = all.entry(queue.clone()).or_insert(Depth { queue, due: 0, oldest_s: 0.0 });
            depth.due = (depth.due + due).min(DEPTH_MAX);
            depth.oldest_s = depth.oldest_s.max(oldest_s);
        }
    }
    Ok(all.into_values().collect())
}

async fn depths_in(conn: &mut PgConnection, shard: Option<i16>) -> Result<Vec<(String, i64, f64)>> {
    let query = sqlx::query_as(DEPTHS.text(shard)).bind(QUEUES_MAX).bind(DEPTH_MAX);
    Ok(bind_shard!(query, shard).fetch_all(conn).await?)
}

/// Keys of one look.
pub(crate) const KEYS_MAX: usize = 100;

static KEYS: Forms = Forms::new(
    "with recursive keys (queue, n) as (
           (select q.queue, 1 from ready q where q.queue > $1/*at q*/ order by q.queue limit 1)
           union all
           select (select q.queue from ready q where q.queue > keys.queue/*at q*/ order by q.queue limit 1), n + 1
           from keys where keys.queue is not null and n < $2)
         select queue from keys where queue is not null order by n",
    "$3",
);

/// The keys that have a row, behind the given one, in the database's order: at most [`KEYS_MAX`], each found by one descent of
/// the index.
pub(crate) async fn keys(session: &mut Session, spread: Spread, after: Option<&str>) -> Result<Vec<String>> {
    let (mut seen, mut all) = (BTreeSet::new(), Vec::new());
    for shard in spread.parts(0) {
        let found = asked!(session, shard, |conn| keys_in(conn, shard, after)).unwrap_or_default();
        all.extend(found.into_iter().filter(|key| seen.insert(key.clone())));
    }
    if spread == Spread::Together {
        return Ok(all);
    }
    // Of each shard the first ones.
    Ok(asked!(session, None, |conn| first_keys(conn, &all)).unwrap_or_default())
}

/// The first of these in the database's order, which it alone knows.
async fn first_keys(conn: &mut PgConnection, all: &[String]) -> Result<Vec<String>> {
    let first = "select key from unnest($1::text[]) k(key) order by key limit $2";
    let most = i64::try_from(KEYS_MAX).unwrap_or(i64::MAX);
    Ok(sqlx::query_scalar(first).bind(all).bind(most).fetch_all(conn).await?)
}

async fn keys_in(conn: &mut PgConnection, shard: Option<i16>, after: Option<&str>) -> Result<Vec<String>> {
    // Every key is behind the empty text.
    let query = sqlx::query_scalar(KEYS.text(shard))
        .bind(after.unwrap_or_default())
        .bind(i64::try_from(KEYS_MAX).unwrap_or(i64::MAX));
    Ok(bind_shard!(query, shard).fetch_all(conn).await?)
}

#[cfg(all(test, feature = "test-util"))]
#[path = "ready_tests.rs"]
pub(super) mod tests;
