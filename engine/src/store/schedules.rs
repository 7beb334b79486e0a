//! Tables `schedules` and `schedule_actions`. Whoever changes a schedule or decides an action holds the lock of its row.

use crate::{
    Error, Result,
    ids::RunId,
    payload::{self, Slot},
    schedule::{Action, ActionKind, ActionState, Overlap, ScheduleView, Spec},
};
use chrono::{DateTime, Utc};
use sqlx::{AssertSqlSafe, PgConnection, PgPool, Row, postgres::PgRow, types::Json};
use uuid::Uuid;

const COLUMNS: &str = "id, name, workflow, pointer, inputs, attributes, queue, topic, workflow_id, timing, overlap, catchup_ms, jitter_ms, run_limit,
    runs_left, next_at, wake_at, paused_at, note, owner, action_n, started, skipped, missed, failed, created_at, updated_at";

/// A schedule's row.
#[derive(Clone, Debug)]
pub(crate) struct Stored {
    pub(crate) view: ScheduleView,
    pub(crate) wake_at: Option<DateTime<Utc>>,
    /// Number of the newest action.
    pub(crate) action_n: i64,
    /// The database's time when the row was read.
    pub(crate) now: DateTime<Utc>,
}

/// An action to be stored.
#[derive(Clone, Debug)]
pub(crate) struct NewAction {
    pub(crate) n: i64,
    pub(crate) instant: DateTime<Utc>,
    pub(crate) kind: ActionKind,
    pub(crate) overlap: Option<Overlap>,
    pub(crate) state: ActionState,
    pub(crate) note: Option<String>,
}

/// The database's time.
pub(crate) async fn now(conn: &mut PgConnection) -> Result<DateTime<Utc>> {
    Ok(sqlx::query_scalar("select engine_now()").fetch_one(conn).await?)
}

pub(crate) async fn count(conn: &mut PgConnection) -> Result<i64> {
    Ok(sqlx::query_scalar("select count(*) from schedules").fetch_one(conn).await?)
}

/// # Errors
/// `schedule_exists`.
pub(crate) async fn insert(conn: &mut PgConnection, view: &ScheduleView, wake_at: Option<DateTime<Utc>>) -> Result<()> {
    let spec = &view.spec;
    let inputs = payload::pack_whole(view.id, Slot::Schedule, &spec.inputs)?;
    let inserted = sqlx::query(
        "insert into schedules (id, name, workflow, pointer, inputs, attributes, queue, topic, timing, overlap, catchup_ms, jitter_ms,
           run_limit, runs_left, next_at, wake_at, paused_at, note, owner, workflow_id)
         values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $13, $14, $15, $16, $17, $18, $19)
         on conflict on constraint schedules_name_key do nothing",
    )
    .bind(view.id)
    .bind(&view.name)
    .bind(&spec.workflow)
    .bind(&spec.pointer)
    .bind(Json(&*inputs))
    .bind(&spec.attributes)
    .bind(&spec.queue)
    .bind(&spec.topic)
    .bind(Json(&spec.when))
    .bind(spec.overlap.as_str())
    .bind(signed(spec.catchup_ms))
    .bind(signed(spec.jitter_ms))
    .bind(spec.run_limit.and_then(|n| i32::try_from(n).ok()))
    .bind(view.next_at)
    .bind(wake_at)
    .bind(view.paused_at)
    .bind(&view.note)
    .bind(&view.owner)
    .bind(&spec.workflow_id)
    .execute(conn)
    .await?;
    if inserted.rows_affected() == 0 { Err(Error::ScheduleExists(view.name.clone())) } else { Ok(()) }
}

/// Writes everything that may change. `now` of the row becomes its `updated_at` only if `edited`.
pub(crate) async fn save(conn: &mut PgConnection, stored: &Stored, edited: bool) -> Result<()> {
    let (view, spec) = (&stored.view, &stored.view.spec);
    let count = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
    let limit = |n: Option<u32>| n.and_then(|n| i32::try_from(n).ok());
    let inputs = payload::pack_whole(view.id, Slot::Schedule, &spec.inputs)?;
    sqlx::query(
        "update schedules set workflow = $2, pointer = $3, inputs = $4, attributes = $5, queue = $6, topic = $7, timing = $8, overlap = $9,
           catchup_ms = $10, jitter_ms = $11, run_limit = $12, runs_left = $13, next_at = $14, wake_at = $15, paused_at = $16, note = $17,
           action_n = $18, started = $19, skipped = $20, missed = $21, failed = $22,
           workflow_id = $24, updated_at = case when $23 then engine_now() else updated_at end
         where id = $1",
    )
    .bind(view.id)
    .bind(&spec.workflow)
    .bind(&spec.pointer)
    .bind(Json(&*inputs))
    .bind(&spec.attributes)
    .bind(&spec.queue)
    .bind(&spec.topic)
    .bind(Json(&spec.when))
    .bind(spec.overlap.as_str())
    .bind(signed(spec.catchup_ms))
    .bind(signed(spec.jitter_ms))
    .bind(limit(spec.run_limit))
    .bind(limit(view.runs_left))
    .bind(view.next_at)
    .bind(stored.wake_at)
    .bind(view.paused_at)
    .bind(&view.note)
    .bind(stored.action_n)
    .bind(count(view.started))
    .bind(count(view.skipped))
    .bind(count(view.missed))
    .bind(count(view.failed))
    .bind(edited)
    .bind(&spec.workflow_id)
    .execute(conn)
    .await?;
    Ok(())
}

/// The row of a name, locked.
///
/// # Errors
/// `schedule_not_found`.
pub(crate) async fn lock(conn: &mut PgConnection, name: &str) -> Result<Stored> {
    one(conn, "where name = $1 for update", name).await
}

/// # Errors
/// `schedule_not_found`.
pub(crate) async fn get(conn: &mut PgConnection, name: &str) -> Result<Stored> {
    one(conn, "where name = $1", name).await
}

async fn one(conn: &mut PgConnection, tail: &'static str, name: &str) -> Result<Stored> {
    let sql = format!("select {COLUMNS}, engine_now() as now from schedules {tail}");
    // Made of the two constants above.
    let row = sqlx::query(AssertSqlSafe(sql)).bind(name).fetch_optional(conn).await?;
    read(&row.ok_or_else(|| Error::ScheduleNotFound(name.to_owned()))?)
}

/// A schedule that somebody must look at now, locked; those that others have locked are left out.
pub(crate) async fn due(conn: &mut PgConnection) -> Result<Option<Stored>> {
    let sql = format!(
        "select {COLUMNS}, engine_now() as now from schedules where wake_at <= engine_now() order by wake_at limit 1 for update skip locked"
    );
    let row = sqlx::query(AssertSqlSafe(sql)).fetch_optional(conn).await?;
    row.as_ref().map(read).transpose()
}

/// By name.
pub(crate) async fn list(conn: &mut PgConnection, after: Option<&str>, limit: u32) -> Result<Vec<Stored>> {
    let sql = format!(
        "select {COLUMNS}, engine_now() as now from schedules where $1::text is null or name > $1 order by name limit $2"
    );
    let rows = sqlx::query(AssertSqlSafe(sql)).bind(after).bind(i64::from(limit.clamp(1, 200))).fetch_all(conn).await?;
    rows.iter().map(read).collect()
}

/// # Errors
/// `schedule_not_found`.
pub(crate) async fn delete(conn: &mut PgConnection, name: &str) -> Result<()> {
    let deleted = sqlx::query("delete from schedules where name = $1").bind(name).execute(conn).await?;
    if deleted.rows_affected() == 0 { Err(Error::ScheduleNotFound(name.to_owned())) } else { Ok(()) }
}

/// Nobody looks at it for that long: what was tried cannot be done now.
pub(crate) async fn defer(pool: &PgPool, id: Uuid, seconds: f64) -> Result<()> {
    sqlx::query("update schedules set wake_at = engine_now() + make_interval(secs => $2) where id = $1")
        .bind(id)
        .bind(seconds)
        .execute(pool)
        .await?;
    Ok(())
}

/// Somebody looks at it at once.
pub(crate) async fn poke(pool: &PgPool, id: Uuid) -> Result<()> {
    sqlx::query("update schedules set wake_at = engine_now() where id = $1 and wake_at is not null")
        .bind(id)
        .execute(pool)
        .await?;
    Ok(())
}

/// Stores actions. One whose instant of the calendar has an action is left out, unless that one came to nothing and this one
/// is to be done: then it takes its place. Returns how many were stored.
pub(crate) async fn add(conn: &mut PgConnection, schedule: Uuid, actions: &[NewAction]) -> Result<u64> {
    if actions.is_empty() {
        return Ok(0);
    }
    let added = sqlx::query(
        "insert into schedule_actions (schedule_id, n, instant, kind, overlap, state, note)
         select $1, * from unnest($2::bigint[], $3::timestamptz[], $4::text[], $5::text[], $6::text[], $7::text[])
         on conflict (schedule_id, instant) where kind <> 'manual' do update
           set n = excluded.n, kind = excluded.kind, overlap = excluded.overlap, state = excluded.state, note = null, decided_at = engine_now()
         where schedule_actions.state in ('skipped', 'missed', 'failed') and excluded.state = 'pending'",
    )
    .bind(schedule)
    .bind(actions.iter().map(|a| a.n).collect::<Vec<_>>())
    .bind(actions.iter().map(|a| a.instant).collect::<Vec<_>>())
    .bind(actions.iter().map(|a| a.kind.as_str()).collect::<Vec<_>>())
    .bind(actions.iter().map(|a| a.overlap.map(Overlap::as_str)).collect::<Vec<_>>())
    .bind(actions.iter().map(|a| a.state.as_str()).collect::<Vec<_>>())
    .bind(actions.iter().map(|a| a.note.clone()).collect::<Vec<_>>())
    .execute(conn)
    .await?;
    Ok(added.rows_affected())
}

/// Actions that are to be decided, at most `limit`: those that do not queue first, then by number.
pub(crate) async fn pending(conn: &mut PgConnection, schedule: &ScheduleView, limit: i64) -> Result<Vec<Action>> {
    let queues: Vec<&str> = Overlap::ALL.iter().filter(|o| o.queues()).map(|o| o.as_str()).collect();
    let rows = sqlx::query(
        "select n, instant, kind, overlap, state, run_id, note, decided_at from schedule_actions
         where schedule_id = $1 and state = 'pending' order by coalesce(overlap, $2) = any($3), n limit $4",
    )
    .bind(schedule.id)
    .bind(schedule.spec.overlap.as_str())
    .bind(queues)
    .bind(limit)
    .fetch_all(conn)
    .await?;
    rows.iter().map(action).collect()
}

/// Number of the newest pending action that ends what is open.
pub(crate) async fn newest_replacing(conn: &mut PgConnection, schedule: &ScheduleView) -> Result<Option<i64>> {
    let replacing: Vec<&str> = Overlap::ALL.iter().filter(|o| o.replaces()).map(|o| o.as_str()).collect();
    Ok(sqlx::query_scalar(
        "select max(n) from schedule_actions where schedule_id = $1 and state = 'pending' and coalesce(overlap, $2) = any($3)",
    )
    .bind(schedule.id)
    .bind(schedule.spec.overlap.as_str())
    .bind(replacing)
    .fetch_one(conn)
    .await?)
}

/// How many actions of the calendar wait.
pub(crate) async fn waiting(conn: &mut PgConnection, schedule: Uuid) -> Result<i64> {
    Ok(sqlx::query_scalar(
        "select count(*) from schedule_actions where schedule_id = $1 and state = 'pending' and kind = 'scheduled'",
    )
    .bind(schedule)
    .fetch_one(conn)
    .await?)
}

/// How many actions wait, whatever they come from.
pub(crate) async fn pending_count(conn: &mut PgConnection, schedule: Uuid) -> Result<i64> {
    Ok(sqlx::query_scalar("select count(*) from schedule_actions where schedule_id = $1 and state = 'pending'")
        .bind(schedule)
        .fetch_one(conn)
        .await?)
}

/// Newest first.
pub(crate) async fn recent(conn: &mut PgConnection, schedule: Uuid, limit: i64) -> Result<Vec<Action>> {
    let rows = sqlx::query(
        "select n, instant, kind, overlap, state, run_id, note, decided_at from schedule_actions
         where schedule_id = $1 order by n desc limit $2",
    )
    .bind(schedule)
    .bind(limit)
    .fetch_all(conn)
    .await?;
    rows.iter().map(action).collect()
}

/// Runs of the schedule that are not closed, oldest first, at most `limit`.
pub(crate) async fn open_runs(conn: &mut PgConnection, schedule: Uuid, limit: i64) -> Result<Vec<RunId>> {
    let runs: Vec<Uuid> = sqlx::query_scalar(
        "select a.run_id from schedule_actions a join runs r on r.shard = a.shard and r.run_id = a.run_id
         where a.schedule_id = $1 and a.state = 'started' and r.closed_at is null order by a.n limit $2",
    )
    .bind(schedule)
    .bind(limit)
    .fetch_all(conn)
    .await?;
    Ok(runs.into_iter().map(RunId).collect())
}

/// Says what an action came to.
pub(crate) async fn settle(
    conn: &mut PgConnection,
    schedule: Uuid,
    n: i64,
    state: ActionState,
    run: Option<RunId>,
    note: Option<&str>,
) -> Result<()> {
    sqlx::query(
        "update schedule_actions set state = $3, shard = $4, run_id = $5, note = left($6, 500), decided_at = engine_now()
         where schedule_id = $1 and n = $2",
    )
    .bind(schedule)
    .bind(n)
    .bind(state.as_str())
    .bind(run.map(|run| run.shard()))
    .bind(run.map(|run| run.0))
    .bind(note.map(|note| note.replace('\0', " ")))
    .execute(conn)
    .await?;
    Ok(())
}

/// Puts a run in the place of another that a schedule had started, if one had: what is open is counted by it. `why` is for people.
///
/// # Transaction
/// Locks the action and not its schedule: nobody who holds that lock waits for the run and changes a started action.
pub(crate) async fn hand_over(conn: &mut PgConnection, from: RunId, to: RunId, why: &str) -> Result<()> {
    // By itself: schedules are not where runs are.
    let schedule: Option<String> =
        sqlx::query_scalar("select attributes ->> 'schedule' from runs where shard = $1 and run_id = $2")
            .bind(from.shard())
            .bind(from.0)
            .fetch_optional(&mut *conn)
            .await?
            .flatten();
    let Some(schedule) = schedule else { return Ok(()) };
    sqlx::query(
        "update schedule_actions a set shard = $2, run_id = $3, note = $4
         from schedules s where s.name = $5 and a.schedule_id = s.id and a.run_id = $1 and a.state = 'started'",
    )
    .bind(from.0)
    .bind(to.shard())
    .bind(to.0)
    .bind(why)
    .bind(schedule)
    .execute(conn)
    .await?;
    Ok(())
}

/// Skips the actions of the calendar that wait. Returns how many.
pub(crate) async fn skip_waiting(conn: &mut PgConnection, schedule: Uuid, note: &str) -> Result<u64> {
    let skipped = sqlx::query(
        "update schedule_actions set state = 'skipped', note = $2, decided_at = engine_now()
         where schedule_id = $1 and state = 'pending' and kind = 'scheduled'",
    )
    .bind(schedule)
    .bind(note)
    .execute(conn)
    .await?;
    Ok(skipped.rows_affected())
}

/// Deletes the decided actions up to `n` whose runs, if they have one, are closed.
pub(crate) async fn prune(conn: &mut PgConnection, schedule: Uuid, n: i64) -> Result<()> {
    sqlx::query(
        "delete from schedule_actions a where schedule_id = $1 and n <= $2 and state <> 'pending'
           and not exists (select from runs r where r.shard = a.shard and r.run_id = a.run_id and r.closed_at is null)",
    )
    .bind(schedule)
    .bind(n)
    .execute(conn)
    .await?;
    Ok(())
}

fn signed(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

fn count_of(row: &PgRow, column: &str) -> Result<u64> {
    Ok(u64::try_from(row.try_get::<i64, _>(column)?).unwrap_or(0))
}

fn limit_of(row: &PgRow, column: &str) -> Result<Option<u32>> {
    Ok(row.try_get::<Option<i32>, _>(column)?.and_then(|n| u32::try_from(n).ok()))
}

fn overlap(text: &str) -> Result<Overlap> {
    Overlap::parse(text).ok_or_else(|| Error::Invariant(format!("unknown overlap policy `{text}`")))
}

fn read(row: &PgRow) -> Result<Stored> {
    let Json(when) = row.try_get("timing")?;
    let spec = Spec {
        workflow: row.try_get("workflow")?,
        pointer: row.try_get("pointer")?,
        inputs: payload::read_whole(row.try_get("id")?, Slot::Schedule, row.try_get("inputs")?)?,
        attributes: row.try_get("attributes")?,
        queue: row.try_get("queue")?,
        topic: row.try_get("topic")?,
        workflow_id: row.try_get("workflow_id")?,
        when,
        overlap: overlap(row.try_get("overlap")?)?,
        catchup_ms: count_of(row, "catchup_ms")?,
        jitter_ms: count_of(row, "jitter_ms")?,
        run_limit: limit_of(row, "run_limit")?,
    };
    Ok(Stored {
        wake_at: row.try_get("wake_at")?,
        action_n: row.try_get("action_n")?,
        now: row.try_get("now")?,
        view: ScheduleView {
            id: row.try_get("id")?,
            name: row.try_get("name")?,
            spec,
            paused_at: row.try_get("paused_at")?,
            note: row.try_get("note")?,
            owner: row.try_get("owner")?,
            next_at: row.try_get("next_at")?,
            runs_left: limit_of(row, "runs_left")?,
            started: count_of(row, "started")?,
            skipped: count_of(row, "skipped")?,
            missed: count_of(row, "missed")?,
            failed: count_of(row, "failed")?,
            created_at: row.try_get("created_at")?,
            updated_at: row.try_get("updated_at")?,
        },
    })
}

fn action(row: &PgRow) -> Result<Action> {
    let unknown = |what: &str, text: &str| Error::Invariant(format!("unknown {what} of an action `{text}`"));
    let (kind, state): (String, String) = (row.try_get("kind")?, row.try_get("state")?);
    Ok(Action {
        n: row.try_get("n")?,
        instant: row.try_get("instant")?,
        kind: ActionKind::parse(&kind).ok_or_else(|| unknown("kind", &kind))?,
        overlap: row.try_get::<Option<String>, _>("overlap")?.map(|text| overlap(&text)).transpose()?,
        state: ActionState::parse(&state).ok_or_else(|| unknown("state", &state))?,
        run_id: row.try_get::<Option<Uuid>, _>("run_id")?.map(RunId),
        note: row.try_get("note")?,
        decided_at: row.try_get("decided_at")?,
    })
}
