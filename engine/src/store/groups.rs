//! Tables `admissions` and `concurrency_groups`: runs that begin when there is a place, or when it is time.
//!
//! A run of a group has a row from its start to its end; its `place` is a number that no other run of the group has, and
//! `null` while it waits. The row goes with the transition that closes the run, so a place is free in the commit that ends its
//! holder, and never before. Who waits is let in by a pass (`worker::admit`), in the order of arrival; whoever dies in the middle of it
//! leaves it to the next, of any worker.
//!
//! Lock order: runs, then the group's row, then rows here. A pass goes the other way, from its group to those who wait, and so it
//! waits for none of them: one whose row somebody has locked is perhaps being stopped by a batch that starts another in its group.

use crate::{
    Error, Result,
    admission::{OnConflict, PERIOD_MS_MAX, Place, Rate},
    ids::RunId,
    store::{
        inbox::{self, Kind, Outgoing},
        runs,
    },
    transaction::{self, in_transaction},
    view::RunStatus,
};
use chrono::{DateTime, Utc};
use serde_json::json;
use sqlx::{PgConnection, PgPool};

/// Runs of a group that may wait; a start beyond that is refused. Source: section 12 of the workflow language.
pub(crate) const WAITING_MAX: i64 = 100;
/// How far ahead a rate plans starts; whoever wants more has to wait himself.
const AHEAD_MAX: chrono::Duration = chrono::Duration::days(30);
/// Groups of one pass, and runs of each other kind. The rest waits for the next.
const PASS_MAX: i64 = 100;

/// What becomes of a run that arrives at its group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Arrival {
    Admitted,
    Waits,
    /// There is no place, and it may not wait: it must not be there.
    Refused,
    /// There is no place, and it gives way: whoever claims it closes it as cancelled, before it begins anything.
    TurnedAway,
}

/// Who arrives: what may become of it if there is no place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Guest {
    /// It waits, is refused or gives way, as its group says.
    Start,
    /// It waits or gives way: a parent waits for its end.
    Child,
    /// It waits in any case: the next of a chain, a fork.
    Stays,
}

/// Lets a run arrive whose row says that it is not admitted.
///
/// # Transaction
/// Must be the one that inserts the run. Locks the group's row.
pub(crate) async fn arrive(
    conn: &mut PgConnection,
    run: RunId,
    place: Option<&Place>,
    not_before: Option<DateTime<Utc>>,
    guest: Guest,
) -> Result<Arrival> {
    let Some(group) = place else {
        if not_before.is_none() {
            admit(conn, run).await?;
            return Ok(Arrival::Admitted);
        }
        insert(conn, run, None, not_before).await?;
        return Ok(Arrival::Waits);
    };
    let n: i64 = sqlx::query_scalar(
        "insert into concurrency_groups (name, arrivals) values ($1, 1)
         on conflict (name) do update set arrivals = concurrency_groups.arrivals + 1 returning arrivals",
    )
    .bind(&group.group)
    .fetch_one(&mut *conn)
    .await?;
    crate::committer::crash_point("group.after_arrival");
    // Who leaves does not lock the group: whoever is named below is read together with what he is counted by.
    let (taken, waiting, first): (Vec<i32>, i64, Option<uuid::Uuid>) = sqlx::query_as(
        "select coalesce(array_agg(place) filter (where place is not null), '{}'), count(*) filter (where place is null),
                (array_agg(run_id order by place is null, n))[1]
         from admissions where group_name = $1",
    )
    .bind(&group.group)
    .fetch_one(&mut *conn)
    .await?;
    let free = free_place(&taken, group.limit).filter(|_| waiting == 0 && not_before.is_none());
    let full = taken.len() >= group.limit as usize || waiting > 0;
    if full
        && guest != Guest::Stays
        && group.on_conflict == OnConflict::CancelNew
        && let Some(holder) = first
    {
        let does = if taken.is_empty() { "waits for a place" } else { "holds a place" };
        let name = &group.group;
        turn_away(
            conn,
            run,
            &format!("run {holder} {does} in concurrency group `{name}`, and this one was to give way"),
        )
        .await?;
        return Ok(Arrival::TurnedAway);
    }
    let refuses = group.on_conflict == OnConflict::Fail || waiting >= WAITING_MAX;
    if free.is_none() && guest == Guest::Start && refuses {
        return Ok(Arrival::Refused);
    }
    insert(conn, run, Some((group, n, free)), not_before).await?;
    crate::committer::crash_point("group.after_entry");
    if free.is_none() {
        return Ok(Arrival::Waits);
    }
    admit(conn, run).await?;
    Ok(Arrival::Admitted)
}

/// Lets a run into the queue with the order to end, which its first decision reads: it has no place and begins nothing.
async fn turn_away(conn: &mut PgConnection, run: RunId, why: &str) -> Result<()> {
    let payload = json!(why);
    admit(conn, run).await?;
    crate::committer::crash_point("turned.after_admit");
    let message = Outgoing {
        run,
        kind: Kind::Terminate,
        name: inbox::TURNED_AWAY,
        payload: &payload,
        dedupe_id: None,
        sender: None,
        definition: None,
        unread_max: None,
    };
    inbox::send(conn, &message).await?;
    Ok(())
}

/// Locks the rows of a rate and of a group, made if they are not there, for a transaction whose hook locks accounts before somebody
/// [`arrive`]s: everybody else locks accounts last.
pub(crate) async fn reserve(conn: &mut PgConnection, rate: Option<&str>, group: Option<&str>) -> Result<()> {
    if let Some(key) = rate {
        sqlx::query("insert into rate_limits (key) values ($1) on conflict (key) do update set key = excluded.key")
            .bind(key)
            .execute(&mut *conn)
            .await?;
    }
    crate::committer::crash_point("group.after_rate");
    if let Some(name) = group {
        sqlx::query(
            "insert into concurrency_groups (name, arrivals) values ($1, 0) on conflict (name) do update set name = excluded.name",
        )
        .bind(name)
        .execute(conn)
        .await?;
    }
    Ok(())
}

/// Forgets up to [`PASS_MAX`] groups that no run takes part in, and rates under which nothing has started for so long that they
/// hold nobody back. Returns how many.
pub(crate) async fn forget(pool: &PgPool) -> Result<u64> {
    let mut tx = transaction::begin(pool).await?;
    // Two statements: whoever arrives holds the row, and the second one sees who has arrived.
    let idle: Vec<String> = sqlx::query_scalar(
        "select g.name from concurrency_groups g where not exists (select from admissions a where a.group_name = g.name)
         order by g.name limit $1 for update of g skip locked",
    )
    .bind(PASS_MAX)
    .fetch_all(&mut *tx)
    .await?;
    let groups = sqlx::query(
        "delete from concurrency_groups g where g.name = any($1) and not exists (select from admissions a where a.group_name = g.name)",
    )
    .bind(&idle)
    .execute(&mut *tx)
    .await?;
    let rates = sqlx::query(
        "with late as (select key from rate_limits
                       where starts[cardinality(starts)] < engine_now() - $1 * interval '1 millisecond'
                       limit $2 for update skip locked)
         delete from rate_limits r using late where r.key = late.key",
    )
    .bind(PERIOD_MS_MAX)
    .bind(PASS_MAX)
    .execute(&mut *tx)
    .await?;
    tx.commit().await?;
    Ok(groups.rows_affected() + rates.rows_affected())
}

/// The lowest number up to `limit` that nobody has, if fewer than `limit` are taken: others may have come under a higher one.
pub(crate) fn free_place(taken: &[i32], limit: u32) -> Option<i32> {
    if taken.len() >= limit as usize {
        return None;
    }
    (1..=i32::try_from(limit).unwrap_or(i32::MAX)).find(|place| !taken.contains(place))
}

async fn insert(
    conn: &mut PgConnection,
    run: RunId,
    group: Option<(&Place, i64, Option<i32>)>,
    not_before: Option<DateTime<Utc>>,
) -> Result<()> {
    sqlx::query(
        "insert into admissions (shard, run_id, group_name, n, places, place, on_conflict, not_before)
         values ($1, $2, $3, $4, $5, $6, $7, $8)",
    )
    .bind(run.shard())
    .bind(run.0)
    .bind(group.map(|(g, ..)| g.group.as_str()))
    .bind(group.map(|(_, n, _)| n))
    .bind(group.map(|(g, ..)| i32::try_from(g.limit).unwrap_or(i32::MAX)))
    .bind(group.and_then(|(.., place)| place))
    .bind(group.map(|(g, ..)| g.on_conflict.once_there().as_str()))
    .bind(not_before)
    .execute(conn)
    .await?;
    Ok(())
}

/// Makes a run claimable that was held back. False if it is not held back any more. The epoch rises: whoever is about to end the
/// run as one that nobody may claim is refused, and finds its place in the queue when it looks again.
async fn admit(conn: &mut PgConnection, run: RunId) -> Result<bool> {
    let admitted = sqlx::query(
        "with u as (update runs set admitted = true, waiting = 'worker', epoch = epoch + 1
                    where shard = $1 and run_id = $2 and closed_at is null and not admitted
                    returning shard, run_id, queue, priority, lane)
         insert into ready (shard, run_id, queue, priority, lane) select shard, run_id, queue, priority, lane from u
         on conflict (shard, run_id) do update set due_at = least(ready.due_at, excluded.due_at), timed = false",
    )
    .bind(run.shard())
    .bind(run.0)
    .execute(conn)
    .await?;
    Ok(admitted.rows_affected() == 1)
}

/// Takes back what makes a run claimable that was inserted in this transaction, so that it can [`arrive`].
pub(crate) async fn hold_back(conn: &mut PgConnection, run: RunId) -> Result<()> {
    sqlx::query(
        "with d as (delete from ready where shard = $1 and run_id = $2)
         update runs set admitted = false, waiting = 'concurrency' where shard = $1 and run_id = $2",
    )
    .bind(run.shard())
    .bind(run.0)
    .execute(conn)
    .await?;
    Ok(())
}

/// When the next start under a rate may be: at most `starts` of them in any `per_ms`. `None` is now. The start counts from
/// then on, whatever becomes of it. `refuses`: whether it may be turned away; one that may not be begins when nobody can plan
/// further ahead.
///
/// # Errors
/// `rate_full` if it would be more than [`AHEAD_MAX`] from now.
/// # Transaction
/// Locks the key's row.
pub(crate) async fn next_start(conn: &mut PgConnection, rate: &Rate, refuses: bool) -> Result<Option<DateTime<Utc>>> {
    let Rate { key, starts, per_ms } = rate;
    // The newest `starts` instants: the next is a period after the oldest of them, and never before the newest.
    sqlx::query("insert into rate_limits (key) values ($1) on conflict (key) do update set key = excluded.key")
        .bind(key)
        .execute(&mut *conn)
        .await?;
    crate::committer::crash_point("rate.after_row");
    let (mut newest, now): (Vec<DateTime<Utc>>, DateTime<Utc>) =
        sqlx::query_as("select starts, engine_now() from rate_limits where key = $1 for update")
            .bind(key)
            .fetch_one(&mut *conn)
            .await?;
    crate::committer::crash_point("rate.after_lock");
    let (starts, per) = (*starts as usize, chrono::Duration::milliseconds(*per_ms));
    let excess = newest.len().saturating_sub(starts);
    newest.drain(..excess);
    let full = newest.len() == starts;
    let at = newest.first().filter(|_| full).map_or(now, |oldest| (*oldest + per).max(now));
    let at = newest.last().map_or(at, |last| at.max(*last));
    if at > now + AHEAD_MAX && refuses {
        return Err(Error::RateFull(key.clone()));
    }
    let at = at.min(now + AHEAD_MAX);
    if full {
        newest.remove(0);
    }
    newest.push(at);
    sqlx::query("update rate_limits set starts = $2 where key = $1").bind(key).bind(newest).execute(conn).await?;
    Ok((at > now).then_some(at))
}

/// Whether somebody waits here: a pass has something to do.
pub(crate) async fn anybody_waits(pool: &PgPool) -> Result<bool> {
    Ok(sqlx::query_scalar("select exists (select from admissions where place is null)").fetch_one(pool).await?)
}

/// Groups at which somebody waits whose time has come, at most [`PASS_MAX`].
pub(crate) async fn wanted(pool: &PgPool) -> Result<Vec<String>> {
    Ok(sqlx::query_scalar(
        // By chance: with more groups than a pass takes, each has its turn, however many of the others are full.
        "select group_name from admissions where place is null and group_name is not null
           and coalesce(not_before, '-infinity') <= engine_now() group by 1 order by random() limit $1",
    )
    .bind(PASS_MAX)
    .fetch_all(pool)
    .await?)
}

/// Lets in who waits at a group, in the order of arrival, until there is no place.
pub(crate) async fn let_in(conn: &mut PgConnection, group: &str) -> Result<usize> {
    let locked: Option<i32> =
        sqlx::query_scalar("select 1 from concurrency_groups where name = $1 for update skip locked")
            .bind(group)
            .fetch_optional(&mut *conn)
            .await?;
    if locked.is_none() {
        // Somebody else is at it, or arrives just now; the next pass is soon.
        return Ok(0);
    }
    crate::committer::crash_point("admit.after_group");
    let mut taken: Vec<i32> =
        sqlx::query_scalar("select place from admissions where group_name = $1 and place is not null")
            .bind(group)
            .fetch_all(&mut *conn)
            .await?;
    let waiting: Vec<(uuid::Uuid, i32)> = sqlx::query_as(
        "select run_id, places from admissions
         where group_name = $1 and place is null and coalesce(not_before, '-infinity') <= engine_now() order by n limit $2",
    )
    .bind(group)
    .bind(WAITING_MAX)
    .fetch_all(&mut *conn)
    .await?;
    let mut admitted = 0;
    for (run, places) in waiting {
        let Some(place) = free_place(&taken, places.unsigned_abs()) else { break };
        let run = RunId(run);
        match lock_free(conn, run).await? {
            Some(true) => {}
            // Nobody who came later goes before it; the next pass is soon.
            Some(false) => break,
            // Nobody waits for a run that is not there.
            None => continue,
        }
        crate::committer::crash_point("admit.after_lock");
        if !admit(conn, run).await? {
            continue;
        }
        crate::committer::crash_point("admit.after_run");
        sqlx::query("update admissions set place = $3 where shard = $1 and run_id = $2")
            .bind(run.shard())
            .bind(run.0)
            .bind(place)
            .execute(&mut *conn)
            .await?;
        crate::committer::crash_point("admit.after_place");
        taken.push(place);
        admitted += 1;
    }
    Ok(admitted)
}

/// Locks a run's row, unless somebody else has: then it is `Some(false)`. `None`: there is no such run.
async fn lock_free(conn: &mut PgConnection, run: RunId) -> Result<Option<bool>> {
    let locked: Option<i32> =
        sqlx::query_scalar("select 1 from runs where shard = $1 and run_id = $2 for no key update skip locked")
            .bind(run.shard())
            .bind(run.0)
            .fetch_optional(&mut *conn)
            .await?;
    if locked.is_some() {
        return Ok(Some(true));
    }
    let there: Option<i32> = sqlx::query_scalar("select 1 from runs where shard = $1 and run_id = $2")
        .bind(run.shard())
        .bind(run.0)
        .fetch_optional(conn)
        .await?;
    Ok(there.map(|_| false))
}

/// Lets a run in that waits for nothing any more, without a place. False if it is not held back.
///
/// # Transaction
/// Locks the run.
pub(crate) async fn let_go(conn: &mut PgConnection, run: RunId) -> Result<bool> {
    let admitted = admit(conn, run).await?;
    if admitted {
        crate::committer::crash_point("admit.after_let_go");
        sqlx::query("delete from admissions where shard = $1 and run_id = $2")
            .bind(run.shard())
            .bind(run.0)
            .execute(conn)
            .await?;
    }
    Ok(admitted)
}

/// Lets in who waited for its time only.
pub(crate) async fn let_in_timed(pool: &PgPool) -> Result<usize> {
    let due: Vec<uuid::Uuid> = sqlx::query_scalar(
        "select run_id from admissions where place is null and group_name is null and not_before <= engine_now()
         order by not_before limit $1",
    )
    .bind(PASS_MAX)
    .fetch_all(pool)
    .await?;
    let mut many = 0;
    for run in due {
        let admitted = in_transaction(pool, |conn| Box::pin(async move { let_go(conn, RunId(run)).await }));
        many += usize::from(admitted.await?);
    }
    Ok(many)
}

/// Where the newest who waits wants the others cancelled: all but the newest that have room together with it.
pub(crate) async fn make_room(pool: &PgPool) -> Result<()> {
    let old: Vec<(uuid::Uuid, uuid::Uuid)> = sqlx::query_as(
        "select o.run_id, w.run_id from
           (select distinct on (group_name) group_name, run_id, n, places, on_conflict from admissions
            where place is null and group_name is not null and coalesce(not_before, '-infinity') <= engine_now()
            order by group_name, n desc) w
         cross join lateral (select shard, run_id from admissions a where a.group_name = w.group_name and a.n < w.n
                             order by a.n desc offset w.places - 1) o
         where w.on_conflict = 'cancel-running' and not exists (
           select from inbox i where i.shard = o.shard and i.run_id = o.run_id and i.dedupe_id = 'concurrency:' || w.run_id)
         order by o.run_id limit $1",
    )
    .bind(PASS_MAX)
    .fetch_all(pool)
    .await?;
    for (run, newer) in old {
        let payload = json!(format!("run {newer} of the same concurrency group takes its place"));
        // Two passes at once may both say it; it hears it once.
        let id = format!("concurrency:{newer}");
        let message = Outgoing {
            run: RunId(run),
            kind: Kind::Cancel,
            name: "",
            payload: &payload,
            dedupe_id: Some(&id),
            sender: None,
            definition: None,
            unread_max: None,
        };
        let mut conn = pool.acquire().await?;
        inbox::send(&mut conn, &message).await?;
        crate::committer::crash_point("room.after_message");
    }
    Ok(())
}

/// Runs that were cancelled, or told to end with their parent, while they waited; at most [`PASS_MAX`].
pub(crate) async fn cancelled(pool: &PgPool) -> Result<Vec<RunId>> {
    let cancelled: Vec<uuid::Uuid> = sqlx::query_scalar(
        "select a.run_id from admissions a join runs r on r.shard = a.shard and r.run_id = a.run_id
         where a.place is null and r.inbox_n > r.inbox_seen and not r.admitted
           and exists (select from inbox i where i.shard = r.shard and i.run_id = r.run_id and i.kind in ('cancel', 'terminate'))
         order by random() limit $1",
    )
    .bind(PASS_MAX)
    .fetch_all(pool)
    .await?;
    Ok(cancelled.into_iter().map(RunId).collect())
}

/// Runs whose chain's time was over while they waited, and forks whose own was; at most [`PASS_MAX`].
pub(crate) async fn expired(pool: &PgPool) -> Result<Vec<RunId>> {
    let expired: Vec<uuid::Uuid> = sqlx::query_scalar(
        "select a.run_id from admissions a join runs r on r.shard = a.shard and r.run_id = a.run_id
         where a.place is null and not r.admitted and least(r.chain_deadline, a.deadline) <= engine_now() order by random() limit $1",
    )
    .bind(PASS_MAX)
    .fetch_all(pool)
    .await?;
    Ok(expired.into_iter().map(RunId).collect())
}

/// The status of a run that is open and held back: pending, or that of a fork, which has begun. `None`: it is not held back. Who has
/// locked its row knows it until the transaction ends: nobody can let it in.
pub(crate) async fn waits(conn: &mut PgConnection, run: RunId) -> Result<Option<RunStatus>> {
    let waits = "select status from runs where shard = $1 and run_id = $2 and not admitted and closed_at is null";
    let found = sqlx::query(waits).bind(run.shard()).bind(run.0).fetch_optional(conn).await?;
    found.as_ref().map(runs::status).transpose()
}

/// Why a run is held back, for people. `None` if it is not.
pub(crate) async fn held(conn: &mut PgConnection, run: RunId) -> Result<Option<String>> {
    let row: Option<(Option<String>, i64, Option<DateTime<Utc>>)> = sqlx::query_as(
        "select a.group_name, (select count(*) from admissions b where b.group_name = a.group_name and b.place is null and b.n < a.n),
                case when a.not_before > engine_now() then a.not_before end
         from admissions a where a.shard = $1 and a.run_id = $2 and a.place is null",
    )
    .bind(run.shard())
    .bind(run.0)
    .fetch_optional(conn)
    .await?;
    Ok(row.map(|(group, before, until)| match (group, until) {
        (_, Some(at)) => format!("for its rate limit, until {}", at.to_rfc3339()),
        (Some(group), None) => format!("for a place in concurrency group `{group}`, behind {before} others"),
        (None, None) => "for its turn".to_owned(),
    }))
}

#[cfg(all(test, feature = "test-util"))]
mod tests {
    use super::*;
    use crate::{MIGRATIONS, embedded::testing::database};

    #[tokio::test]
    async fn what_nobody_uses_is_forgotten_and_nothing_else() {
        let pool = database(MIGRATIONS).await;
        for sql in [
            "insert into concurrency_groups (name, arrivals) values ('idle', 7), ('used', 1), ('arriving', 1)",
            "insert into admissions (shard, run_id, group_name, n, places, place, on_conflict) values (0, gen_random_uuid(), 'used', 1, 1, 1, 'queue')",
            "insert into rate_limits (key, starts) values ('old', array[engine_now() - interval '31 days']), ('planned', array[engine_now() - interval '31 days', engine_now()])",
        ] {
            sqlx::query(sql).execute(&pool).await.expect("sql");
        }
        // Somebody arrives just now: its row is locked and its run not to be seen.
        let mut arriving = transaction::begin(&pool).await.expect("begin");
        let locked = "select from concurrency_groups where name = 'arriving' for update";
        sqlx::query(locked).execute(&mut *arriving).await.expect("lock");
        assert_eq!(forget(&pool).await.expect("forgotten"), 2);
        arriving.commit().await.expect("commit");
        let left: Vec<String> =
            sqlx::query_scalar("select name from concurrency_groups union all select key from rate_limits order by 1")
                .fetch_all(&pool)
                .await
                .expect("sql");
        assert_eq!(left, ["arriving", "planned", "used"]);
    }
}
