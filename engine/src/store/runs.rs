//! Table `runs`: reading, listing, quarantining.

use super::{
    definitions::hash_of,
    retention,
    spread::{Forms, Spread, bind_shard},
};
use crate::{
    Error, Result,
    event::Event,
    filter::FilterError,
    ids::{DefinitionHash, RunId, WorkerId},
    machine::{RunState, fold},
    payload::{self, Slot, Stored},
    request::Filter,
    transaction::{self, Session, asked},
    view::{Chain, Origin, RunStatus, RunSummary},
};
use chrono::{DateTime, Utc};
use serde_json::Value;
use sqlx::{PgConnection, PgPool, Postgres, QueryBuilder, Row, postgres::PgRow, types::Json};
use std::{collections::HashMap, time::Duration};

/// Longest search for runs. Chosen: whoever waits longer has gone.
const LIST_TIMEOUT_MS: u32 = 10_000;

/// A run's row with its state, folded up to `seq`.
pub(crate) struct Loaded {
    pub(crate) run_id: RunId,
    pub(crate) workflow: String,
    pub(crate) workflow_id: Option<String>,
    pub(crate) definition: DefinitionHash,
    pub(crate) status: RunStatus,
    pub(crate) owner: Option<WorkerId>,
    pub(crate) epoch: i64,
    pub(crate) seq: i64,
    pub(crate) cursor_seq: i64,
    /// Events of the rows after the cursor.
    pub(crate) tail_events: usize,
    pub(crate) inbox_n: i64,
    pub(crate) inbox_seen: i64,
    pub(crate) queue: String,
    pub(crate) attributes: Value,
    pub(crate) topic: Option<String>,
    pub(crate) parent: Option<(RunId, String)>,
    /// How many runs stand above it.
    pub(crate) depth: i32,
    /// 1 is first.
    pub(crate) priority: i16,
    /// Of its fairness key.
    pub(crate) lane: i32,
    pub(crate) inputs: Value,
    pub(crate) output: Option<Value>,
    pub(crate) failure: Option<Value>,
    pub(crate) started_at: DateTime<Utc>,
    pub(crate) closed_at: Option<DateTime<Utc>>,
    pub(crate) forked_from: Option<Origin>,
    pub(crate) imported_at: Option<DateTime<Utc>>,
    pub(crate) chain: Chain,
    /// No run of its chain goes on beyond it.
    pub(crate) chain_deadline: Option<DateTime<Utc>>,
    pub(crate) state: RunState,
}

/// Loads a run and folds what its cursor does not hold yet.
pub(crate) async fn load(conn: &mut PgConnection, run: RunId) -> Result<Loaded> {
    match load_all(conn, Some(run.shard()), &[run]).await?.remove(&run) {
        Some(Ok(loaded)) => Ok(loaded),
        // Between the two statements it may have left.
        Some(Err(error)) => Err(retention::unless_gone(conn, run, error).await),
        None => Err(retention::absent(conn, run).await),
    }
}

/// What the cursors of runs do not hold yet.
pub(super) static TAIL: Forms = Forms::new(
    "
    select h.run_id, h.seq, h.format, h.events
    from unnest((select $1::smallint[]), (select $2::uuid[]), (select $3::bigint[]), (select $4::bigint[])) k(shard, run_id, after, upto)
    join history h on h.shard = k.shard and h.run_id = k.run_id and h.seq > k.after and h.seq <= k.upto/*at h*/ order by h.seq",
    "$5",
);

static LOAD: Forms = Forms::new(
    "select r.run_id, workflow, workflow_id, definition, status, owner, epoch, seq, inbox_n, inbox_seen, queue, attributes, topic,
                parent_run_id, parent_path, depth, priority, lane, inputs, cursor, cursor_seq, output, failure, started_at, closed_at,
                forked_from, forked_seq, imported_at, first_run_id, continued_from, continued_as, chain_deadline
         from unnest((select $1::smallint[]), (select $2::uuid[])) k(shard, run_id)
         join runs r on r.shard = k.shard and r.run_id = k.run_id/*at r*/",
    "$3",
);

/// Loads runs together: two statements, or one if none has a tail. What is wrong with one of them is that one's result; one
/// that does not exist is absent. `shard`: all of them are of it, and the statements say so.
///
/// # Errors
/// Those of the statements.
pub(crate) async fn load_all(
    conn: &mut PgConnection,
    shard: Option<i16>,
    runs: &[RunId],
) -> Result<HashMap<RunId, Result<Loaded>>> {
    // As in `transitions`: the planner is not told how many there are.
    let query = sqlx::query(LOAD.text(shard))
        .bind(runs.iter().map(|run| run.shard()).collect::<Vec<i16>>())
        .bind(runs.iter().map(|run| run.0).collect::<Vec<_>>());
    let rows = bind_shard!(query, shard).fetch_all(&mut *conn).await?;
    let mut tails: HashMap<RunId, Vec<PgRow>> = HashMap::new();
    let (mut long, mut after, mut upto) = (Vec::new(), Vec::new(), Vec::new());
    for row in &rows {
        let (seq, cursor_seq): (i64, i64) = (row.try_get("seq")?, row.try_get("cursor_seq")?);
        if seq > cursor_seq {
            long.push(RunId(row.try_get("run_id")?));
            after.push(cursor_seq);
            upto.push(seq);
        }
    }
    if !long.is_empty() {
        let query = sqlx::query(TAIL.text(shard))
            .bind(long.iter().map(|run| run.shard()).collect::<Vec<i16>>())
            .bind(long.iter().map(|run| run.0).collect::<Vec<_>>())
            .bind(after)
            .bind(upto);
        for row in bind_shard!(query, shard).fetch_all(&mut *conn).await? {
            tails.entry(RunId(row.try_get("run_id")?)).or_default().push(row);
        }
    }
    let mut all = HashMap::with_capacity(rows.len());
    for row in &rows {
        let run = RunId(row.try_get("run_id")?);
        all.insert(run, loaded(conn, run, row, &tails.remove(&run).unwrap_or_default()).await);
    }
    Ok(all)
}

/// What is asked of a stored state before it is read: a newer release's may not be readable at all.
#[derive(serde::Deserialize)]
struct Vocabulary {
    #[serde(default)]
    format: u16,
}

/// A row of `runs` with the rows of history after its cursor, in order.
async fn loaded(conn: &mut PgConnection, run: RunId, row: &PgRow, tail: &[PgRow]) -> Result<Loaded> {
    let (seq, cursor_seq): (i64, i64) = (row.try_get("seq")?, row.try_get("cursor_seq")?);
    let mut state = match row.try_get::<Option<Stored<'_>>, _>("cursor")? {
        Some(cursor) => {
            let cursor = payload::open(conn, run, Slot::Cursor { seq: cursor_seq }, cursor).await?;
            let format = cursor.parse().map_or(0, |Vocabulary { format }| format);
            if format > super::known().history {
                return Err(Error::NewerRelease(format!("the state of run {run} (format {format})")));
            }
            cursor.parse().map_err(|e| Error::Invariant(format!("cursor of run {run}: {e}")))?
        }
        None => RunState::new(run),
    };
    let mut tail_events = 0;
    for (row, expected) in tail.iter().zip(cursor_seq + 1..) {
        let at: i64 = row.try_get("seq")?;
        let wrong = |what: String| Error::Invariant(format!("history row {at} of run {run}{what}"));
        if at != expected {
            return Err(Error::Invariant(format!("the history of run {run} has a gap after {}", expected - 1)));
        }
        let format: i16 = row.try_get("format")?;
        if u16::try_from(format).map_or(true, |f| f > super::known().history) {
            return Err(Error::NewerRelease(format!("history row {at} of run {run} (format {format})")));
        }
        let events = payload::open(conn, run, Slot::Events { seq: at }, row.try_get("events")?).await?;
        let events: Vec<Event> = events.parse().map_err(|e| wrong(format!(": {e}")))?;
        tail_events += events.len();
        for event in &events {
            fold(&mut state, event).map_err(|e| wrong(format!(": {e}")))?;
        }
    }
    if i64::try_from(tail.len()).ok() != Some(seq - cursor_seq) {
        return Err(Error::Invariant(format!("the history of run {run} has a gap after {cursor_seq}")));
    }
    Ok(Loaded {
        run_id: run,
        workflow: row.try_get("workflow")?,
        workflow_id: row.try_get("workflow_id")?,
        definition: hash_of(row.try_get("definition")?)
            .ok_or_else(|| Error::Invariant("a definition's hash".into()))?,
        status: status(row)?,
        owner: row.try_get::<Option<uuid::Uuid>, _>("owner")?.map(WorkerId),
        epoch: row.try_get("epoch")?,
        seq,
        cursor_seq,
        tail_events,
        inbox_n: row.try_get("inbox_n")?,
        inbox_seen: row.try_get("inbox_seen")?,
        queue: row.try_get("queue")?,
        attributes: row.try_get("attributes")?,
        topic: row.try_get("topic")?,
        parent: match (
            row.try_get::<Option<uuid::Uuid>, _>("parent_run_id")?,
            row.try_get::<Option<String>, _>("parent_path")?,
        ) {
            (Some(id), Some(path)) => Some((RunId(id), path)),
            _ => None,
        },
        depth: row.try_get("depth")?,
        priority: row.try_get("priority")?,
        lane: row.try_get("lane")?,
        inputs: payload::read(conn, run, Slot::Inputs, row.try_get("inputs")?).await?,
        output: payload::read_some(conn, run, Slot::Output, row.try_get("output")?).await?,
        failure: payload::read_some(conn, run, Slot::Failure, row.try_get("failure")?).await?,
        started_at: row.try_get("started_at")?,
        closed_at: row.try_get("closed_at")?,
        forked_from: match (
            row.try_get::<Option<uuid::Uuid>, _>("forked_from")?,
            row.try_get::<Option<i64>, _>("forked_seq")?,
        ) {
            (Some(id), Some(seq)) => Some(Origin { run_id: RunId(id), seq: u64::try_from(seq).unwrap_or(0) }),
            _ => None,
        },
        imported_at: row.try_get("imported_at")?,
        chain: chain(row)?,
        chain_deadline: row.try_get("chain_deadline")?,
        state,
    })
}

/// The database's time.
pub(crate) async fn now(conn: &mut PgConnection) -> Result<DateTime<Utc>> {
    Ok(sqlx::query_scalar("select engine_now()").fetch_one(conn).await?)
}

/// The newest transition of a run.
///
/// # Errors
/// `run_not_found`, `run_archived`.
pub(crate) async fn newest(conn: &mut PgConnection, run: RunId) -> Result<u64> {
    let newest: Option<i64> = sqlx::query_scalar("select seq from runs where shard = $1 and run_id = $2")
        .bind(run.shard())
        .bind(run.0)
        .fetch_optional(&mut *conn)
        .await?;
    match newest {
        Some(newest) => Ok(u64::try_from(newest).unwrap_or(0)),
        None => Err(retention::absent(conn, run).await),
    }
}

/// What must be known of a run before something is asked of it.
pub(crate) struct Standing {
    pub(crate) definition: DefinitionHash,
    pub(crate) status: RunStatus,
    /// It came from a file and is there to be read.
    pub(crate) imported: bool,
    pub(crate) chain: Chain,
    /// Messages that were ever sent to it, or were handed on to it.
    pub(crate) inbox_n: i64,
}

pub(crate) async fn standing(conn: &mut PgConnection, run: RunId) -> Result<Standing> {
    let row = sqlx::query(
        "select definition, status, imported_at is not null as imported, first_run_id, continued_from, continued_as, inbox_n
         from runs where shard = $1 and run_id = $2",
    )
    .bind(run.shard())
    .bind(run.0)
    .fetch_optional(&mut *conn)
    .await?;
    let Some(row) = row else { return Err(retention::absent(conn, run).await) };
    Ok(Standing {
        definition: hash_of(row.try_get("definition")?)
            .ok_or_else(|| Error::Invariant("a definition's hash".into()))?,
        status: status(&row)?,
        imported: row.try_get("imported")?,
        chain: chain(&row)?,
        inbox_n: row.try_get("inbox_n")?,
    })
}

pub(super) fn chain(row: &PgRow) -> Result<Chain> {
    let id = |name| Ok::<_, sqlx::Error>(row.try_get::<Option<uuid::Uuid>, _>(name)?.map(RunId));
    Ok(Chain { first: id("first_run_id")?, continued_from: id("continued_from")?, continued_as: id("continued_as")? })
}

pub(super) fn status(row: &PgRow) -> Result<RunStatus> {
    let text: String = row.try_get("status")?;
    RunStatus::parse(&text).ok_or_else(|| Error::Invariant(format!("unknown run status `{text}`")))
}

/// Newest first.
pub(crate) async fn list(pool: &PgPool, filter: &Filter) -> Result<Vec<RunSummary>> {
    let mut sql = QueryBuilder::new(
        "select run_id, workflow, workflow_id, status, waiting, attributes, seq, started_at, closed_at, first_run_id, continued_from,
                continued_as from runs where ",
    );
    matching(&mut sql, filter);
    sql.push(" and (").push_bind(filter.after.map(|id| id.0)).push("::uuid is null or run_id < ");
    sql.push_bind(filter.after.map(|id| id.0)).push(") order by run_id desc limit ");
    sql.push_bind(i64::from(filter.limit.clamp(1, 200)));
    let mut tx = bounded(pool).await?;
    let rows = sql.build().fetch_all(&mut *tx).await.map_err(slow)?;
    tx.commit().await?;
    rows.into_iter()
        .map(|row| {
            Ok(RunSummary {
                run_id: RunId(row.try_get("run_id")?),
                workflow: row.try_get("workflow")?,
                workflow_id: row.try_get("workflow_id")?,
                status: status(&row)?,
                waiting: row.try_get("waiting")?,
                attributes: row.try_get("attributes")?,
                seq: u64::try_from(row.try_get::<i64, _>("seq")?).unwrap_or(0),
                started_at: row.try_get("started_at")?,
                closed_at: row.try_get("closed_at")?,
                chain: chain(&row)?,
            })
        })
        .collect()
}

/// How many runs match.
pub(crate) async fn count(pool: &PgPool, filter: &Filter) -> Result<u64> {
    let mut sql = QueryBuilder::new("select count(*) from runs where ");
    matching(&mut sql, filter);
    let mut tx = bounded(pool).await?;
    let n: i64 = sql.build_query_scalar().fetch_one(&mut *tx).await.map_err(slow)?;
    tx.commit().await?;
    Ok(u64::try_from(n).unwrap_or(0))
}

fn matching(sql: &mut QueryBuilder<Postgres>, filter: &Filter) {
    sql.push("true");
    if let Some(attributes) = &filter.attributes {
        sql.push(" and attributes @> ").push_bind(attributes.clone());
    }
    if let Some(workflow) = &filter.workflow {
        sql.push(" and workflow = ").push_bind(workflow.clone());
    }
    if filter.open_only {
        sql.push(" and closed_at is null");
    }
    if let Some(query) = &filter.matching {
        sql.push(" and ");
        super::filter::push(sql, query);
    }
}

/// A transaction whose statements end after [`LIST_TIMEOUT_MS`]: a filter may look at every run that there is.
async fn bounded(pool: &PgPool) -> Result<transaction::Transaction> {
    let mut tx = transaction::begin(pool).await?;
    sqlx::query("select set_config('statement_timeout', $1, true)")
        .bind(LIST_TIMEOUT_MS.to_string())
        .execute(&mut *tx)
        .await?;
    Ok(tx)
}

/// Says what to do about a statement that took too long.
fn slow(error: sqlx::Error) -> Error {
    match &error {
        sqlx::Error::Database(e) if e.code().as_deref() == Some("57014") => FilterError {
            column: 0,
            message: format!("finding the runs took more than {} s", LIST_TIMEOUT_MS / 1000),
            help: "ask for an attribute by `=`, which has an index".into(),
        }
        .into(),
        _ => Error::Sql(error),
    }
}

/// Sets a run aside because an invariant broke. An operator decides; other runs go on. Nothing happens if the epoch moved:
/// the run is another owner's to judge.
pub(crate) async fn quarantine(conn: &mut PgConnection, run: RunId, epoch: i64, why: &str) -> Result<()> {
    // Before the statement: the reason should be known even if it fails.
    tracing::error!(run_id = %run, why, "run is quarantined");
    let quarantined = sqlx::query(
        "with q as (update runs set status = 'quarantined', owner = null, parked = true, epoch = epoch + 1, waiting = left($3, 500)
           where shard = $1 and run_id = $2 and epoch = $4 and closed_at is null returning shard, run_id),
              d as (delete from ready r using q where r.shard = q.shard and r.run_id = q.run_id)
         select 1 from q",
    )
    .bind(run.shard())
    .bind(run.0)
    // A text of Postgres holds no NUL; the reason may quote anything.
    .bind(why.replace('\0', " "))
    .bind(epoch)
    .fetch_optional(conn)
    .await?;
    if quarantined.is_some() {
        metrics::counter!("loopwright_runs_quarantined_total").increment(1);
    }
    Ok(())
}

/// Makes a quarantined run claimable again, with the message that says so in its history. `status` is what its state says.
/// False if it is not quarantined any more, or its epoch moved.
pub(crate) async fn unquarantine(
    conn: &mut PgConnection,
    run: RunId,
    epoch: i64,
    status: &str,
    reason: &str,
    by: Option<&str>,
) -> Result<bool> {
    let halted: Option<Option<String>> =
        sqlx::query_scalar("select waiting from runs where shard = $1 and run_id = $2 and epoch = $3")
            .bind(run.shard())
            .bind(run.0)
            .bind(epoch)
            .fetch_optional(&mut *conn)
            .await?;
    let message = serde_json::json!({ "reason": reason, "halted": halted.flatten().unwrap_or_default() });
    // A few kilobytes: nothing of it is large.
    let message = payload::pack(run, Slot::Message { kind: "resume", name: "" }, &message, &mut Vec::new())?;
    // Why it is quarantined does not change without its epoch.
    let freed = sqlx::query(
        "with q as (select shard, run_id from runs
                    where shard = $1 and run_id = $2 and epoch = $3 and status = 'quarantined' and imported_at is null for no key update),
              u as (update runs r set status = $4, epoch = r.epoch + 1, inbox_n = r.inbox_n + 1, waiting = 'worker'
                    from q where r.shard = q.shard and r.run_id = q.run_id
                    returning r.shard, r.run_id, r.inbox_n, r.queue, r.priority, r.lane),
              m as (insert into inbox (shard, run_id, n, kind, payload, sender)
                    select shard, run_id, inbox_n, 'resume', $5, $6 from u)
         insert into ready (shard, run_id, queue, priority, lane) select shard, run_id, queue, priority, lane from u
         on conflict (shard, run_id) do update set due_at = least(ready.due_at, excluded.due_at)",
    )
    .bind(run.shard())
    .bind(run.0)
    .bind(epoch)
    .bind(status)
    .bind(Json(&*message))
    .bind(by)
    .execute(conn)
    .await?;
    Ok(freed.rows_affected() == 1)
}

static STRAYS: Forms = Forms::new(
    "select r.run_id, r.epoch from runs r
         where r.owner = $1 and not exists (select from unnest($2::uuid[]) d(run_id) where d.run_id = r.run_id)/*at r*/ limit $3",
    "$4",
);

/// Runs that `worker` owns and that are not among `driven`, with their epochs; at most `limit`, of each shard where they are spread.
pub(crate) async fn strays(
    session: &mut Session,
    spread: Spread,
    worker: WorkerId,
    driven: &[RunId],
    limit: i64,
) -> Result<Vec<(RunId, i64)>> {
    let mut strays = Vec::new();
    for shard in spread.parts(0) {
        let known: Vec<RunId> =
            driven.iter().filter(|run| shard.is_none_or(|shard| shard == run.shard())).copied().collect();
        let rows = asked!(session, shard, |conn| strays_in(conn, shard, worker, &known, limit)).unwrap_or_default();
        strays.extend(rows.into_iter().map(|(id, epoch)| (RunId(id), epoch)));
    }
    Ok(strays)
}

async fn strays_in(
    conn: &mut PgConnection,
    shard: Option<i16>,
    worker: WorkerId,
    known: &[RunId],
    limit: i64,
) -> Result<Vec<(uuid::Uuid, i64)>> {
    let query = sqlx::query_as(STRAYS.text(shard))
        .bind(worker.0)
        .bind(known.iter().map(|run| run.0).collect::<Vec<_>>())
        .bind(limit);
    Ok(bind_shard!(query, shard).fetch_all(conn).await?)
}

static LOST: Forms = Forms::new(
    "select d.run_id from unnest($2::smallint[], $3::uuid[]) d(shard, run_id)
         join runs r on r.shard = d.shard and r.run_id = d.run_id where r.owner is distinct from $1/*at r*/",
    "$4",
);

/// Those among `driven` that `worker` does not own any more.
pub(crate) async fn lost(
    session: &mut Session,
    spread: Spread,
    worker: WorkerId,
    driven: &[RunId],
) -> Result<Vec<RunId>> {
    let mut lost = Vec::new();
    for (shard, part) in spread.divide(driven.to_vec(), RunId::shard) {
        let rows = asked!(session, shard, |conn| lost_in(conn, shard, worker, &part)).unwrap_or_default();
        lost.extend(rows.into_iter().map(RunId));
    }
    Ok(lost)
}

async fn lost_in(
    conn: &mut PgConnection,
    shard: Option<i16>,
    worker: WorkerId,
    part: &[RunId],
) -> Result<Vec<uuid::Uuid>> {
    let query = sqlx::query_scalar(LOST.text(shard))
        .bind(worker.0)
        .bind(part.iter().map(|run| run.shard()).collect::<Vec<i16>>())
        .bind(part.iter().map(|run| run.0).collect::<Vec<_>>());
    Ok(bind_shard!(query, shard).fetch_all(conn).await?)
}

/// Frees a run that its owner does not drive, read messages or not: it is due after `pause`. False if the run is not that
/// owner's of that epoch any more. The epoch rises: what is still under way from here is refused.
pub(crate) async fn give_back(
    conn: &mut PgConnection,
    run: RunId,
    owner: WorkerId,
    epoch: i64,
    pause: Duration,
) -> Result<bool> {
    let freed = sqlx::query(
        "with u as (update runs set owner = null, parked = true, epoch = epoch + 1, waiting = 'worker'
           where shard = $1 and run_id = $2 and owner = $3 and epoch = $4 and closed_at is null
           returning shard, run_id, queue, priority, lane)
         insert into ready (shard, run_id, queue, priority, lane, timed, due_at)
           select shard, run_id, queue, priority, lane, true, engine_now() + $5 * interval '1 millisecond' from u
         on conflict (shard, run_id) do update set due_at = least(ready.due_at, excluded.due_at)",
    )
    .bind(run.shard())
    .bind(run.0)
    .bind(owner.0)
    .bind(epoch)
    .bind(f64::from(u32::try_from(pause.as_millis()).unwrap_or(u32::MAX)))
    .execute(conn)
    .await?;
    Ok(freed.rows_affected() == 1)
}

/// Takes a run away from whoever owns it, so that the caller can end it. Returns the epoch that is the caller's; `None` if it is closed.
///
/// # Transaction
/// One statement. If the caller dies before it ends the run, a worker goes on with it after half a minute.
pub(crate) async fn seize(conn: &mut PgConnection, run: RunId) -> Result<Option<i64>> {
    let seized = sqlx::query_scalar(
        "with u as (update runs set epoch = epoch + 1, owner = null, parked = true
           where shard = $1 and run_id = $2 and closed_at is null and imported_at is null returning shard, run_id, queue, priority, lane, admitted, status, epoch),
              q as (insert into ready (shard, run_id, queue, priority, lane, timed, due_at)
                    select shard, run_id, queue, priority, lane, true, engine_now() + interval '30 seconds' from u where admitted and status <> 'quarantined'
                    on conflict (shard, run_id) do update set due_at = greatest(ready.due_at, excluded.due_at))
         select epoch from u",
    )
    .bind(run.shard())
    .bind(run.0)
    .fetch_optional(conn)
    .await?;
    Ok(seized)
}

/// What the end of a run is written with that cannot be read.
pub(crate) struct Unreadable {
    pub(crate) epoch: i64,
    pub(crate) seq: i64,
    pub(crate) inbox_seen: i64,
    pub(crate) queue: String,
    pub(crate) topic: Option<String>,
    pub(crate) parent: Option<RunId>,
    pub(crate) chain: Chain,
    /// Open ones.
    pub(crate) children: Vec<RunId>,
}

/// A run's row without anything that has to be folded or opened.
pub(crate) async fn unreadable(conn: &mut PgConnection, run: RunId) -> Result<Unreadable> {
    let row = sqlx::query(
        "select epoch, seq, inbox_seen, queue, topic, parent_run_id, first_run_id, continued_from, continued_as
         from runs where shard = $1 and run_id = $2",
    )
    .bind(run.shard())
    .bind(run.0)
    .fetch_optional(&mut *conn)
    .await?;
    let Some(row) = row else { return Err(retention::absent(conn, run).await) };
    let children: Vec<uuid::Uuid> =
        sqlx::query_scalar("select run_id from runs where parent_run_id = $1 and closed_at is null order by run_id")
            .bind(run.0)
            .fetch_all(conn)
            .await?;
    Ok(Unreadable {
        epoch: row.try_get("epoch")?,
        seq: row.try_get("seq")?,
        inbox_seen: row.try_get("inbox_seen")?,
        queue: row.try_get("queue")?,
        topic: row.try_get("topic")?,
        parent: row.try_get::<Option<uuid::Uuid>, _>("parent_run_id")?.map(RunId),
        chain: chain(&row)?,
        children: children.into_iter().map(RunId).collect(),
    })
}

/// Gives up ownership without a transition: nothing happened, the run waits until `due` or for a message.
/// False if the epoch moved or a message came in meanwhile.
pub(crate) async fn release(
    conn: &mut PgConnection,
    run: RunId,
    epoch: i64,
    inbox_seen: i64,
    due: DateTime<Utc>,
    waiting: Option<&str>,
) -> Result<bool> {
    let released = sqlx::query(
        "with u as (update runs set owner = null, parked = true, waiting = $6
           where shard = $1 and run_id = $2 and epoch = $3 and inbox_n = $4 and closed_at is null returning shard, run_id, queue, priority, lane)
         insert into ready (shard, run_id, queue, priority, lane, timed, due_at)
           select shard, run_id, queue, priority, lane, $5 > engine_now(), $5 from u
         on conflict (shard, run_id) do update set due_at = least(ready.due_at, excluded.due_at)",
    )
    .bind(run.shard())
    .bind(run.0)
    .bind(epoch)
    .bind(inbox_seen)
    .bind(due)
    .bind(waiting)
    .execute(conn)
    .await?;
    Ok(released.rows_affected() == 1)
}

#[cfg(all(test, feature = "test-util"))]
mod tests {
    use super::*;
    use crate::embedded::testing;

    #[tokio::test]
    async fn a_search_that_takes_too_long_says_what_to_do() {
        let mut conn = testing::database(&[]).await.acquire().await.unwrap();
        sqlx::query("set statement_timeout = 20").execute(&mut *conn).await.unwrap();
        let ended = sqlx::query("select pg_sleep(60)").execute(&mut *conn).await.unwrap_err();
        let error = slow(ended);
        assert_eq!(error.code(), "filter_invalid");
        assert!(error.to_string().contains("more than 10 s; ask for an attribute"), "{error}");
        let other = sqlx::query("select 1/0").execute(&mut *conn).await.unwrap_err();
        assert_eq!(slow(other).code(), "database");
    }
}
