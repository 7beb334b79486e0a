//! The rows of a start: the run, its place in the queue, its id, and whom the id named before.
//!
//! Lock order, of a start, of a reset and of the committer alike: runs, the id, rates and groups, accounts. The id of a run that is open
//! is locked with its run: whoever closes a run holds its row before it takes the id away, and whoever meets the id of an open run asks
//! for nothing more. So who ends a run may lock its group and its accounts (the hook) before the id, and who ends none may not.
//! Nobody may hold an id and ask for a run, and whoever holds a group waits for no run.

use super::{
    blobs,
    transitions::{self, Text},
};
use crate::{
    Error, Result,
    admission::lane,
    definition::Definition,
    event,
    ids::RunId,
    labels,
    machine::RunState,
    payload::{self, Slot},
    request::Start,
    view::RunStatus,
};
use serde_json::Value;
use sqlx::{PgConnection, types::Json};

/// Sets the savepoint to which [`undo`] goes back.
pub(crate) async fn begin(conn: &mut PgConnection) -> Result<()> {
    sqlx::query("savepoint start").execute(conn).await?;
    Ok(())
}

/// The run was never there.
pub(crate) async fn undo(conn: &mut PgConnection) -> Result<()> {
    sqlx::query("rollback to savepoint start").execute(conn).await?;
    Ok(())
}

pub(crate) async fn keep(conn: &mut PgConnection) -> Result<()> {
    sqlx::query("release savepoint start").execute(conn).await?;
    Ok(())
}

/// Inserts the run, and if it is not `held` back its place in the queue. False if it is there already, or in an archive.
///
/// # Transaction
/// Must be inside one.
pub(crate) async fn insert(
    conn: &mut PgConnection,
    run: RunId,
    start: &Start,
    definition: &Definition,
    inputs: &Value,
    held: bool,
) -> Result<bool> {
    let key = start.admission.key(&start.attributes);
    let queue = if start.queue.is_empty() { "default" } else { &start.queue };
    let queue = labels::key(queue, &definition.runs_on);
    let chain_ms = start.admission.chain_timeout.map(|t| i64::try_from(t.as_millis()).unwrap_or(i64::MAX));
    let mut large = Vec::new();
    let inputs = payload::pack(run, Slot::Inputs, inputs, &mut large)?;
    let named = start.admission.named();
    let cursor = if named.is_some() || chain_ms.is_some() { Some(with_terms(run)?) } else { None };
    let inserted: Option<i32> = sqlx::query_scalar(
        "with r as (insert into runs (shard, run_id, workflow, definition, workflow_id, status, parked, queue, attributes, topic, inputs,
                                      priority, fairness_key, lane, admitted, waiting, admission, chain_deadline, cursor)
           select $1, $2, $3, $4, $5, 'pending', true, $6, $7, $8, $9, $10, $11, $12, not $13, case when $13 then 'concurrency' end,
                  $14, engine_now() + $15::bigint * interval '1 millisecond', $16
           -- Its id says that it was started already, whether it is here or in an archive.
           where not exists (select from archived_runs a where a.shard = $1 and a.run_id = $2)
           on conflict do nothing returning shard, run_id, queue, priority, lane),
              q as (insert into ready (shard, run_id, queue, priority, lane)
                    select shard, run_id, queue, priority, lane from r where not $13)
         select 1 from r",
    )
    .bind(run.shard())
    .bind(run.0)
    .bind(&definition.name)
    .bind(&start.definition.0[..])
    .bind(&start.workflow_id)
    .bind(queue)
    .bind(&start.attributes)
    .bind(&start.topic)
    .bind(Json(&*inputs))
    .bind(start.admission.priority.number())
    .bind(key)
    .bind(lane(key))
    .bind(held)
    .bind(named.map(Json))
    .bind(chain_ms)
    .bind(cursor.as_deref().map(Json))
    .fetch_optional(&mut *conn)
    .await?;
    crate::committer::crash_point("start.before_blobs");
    if inserted.is_some() {
        blobs::put(conn, &large).await?;
    }
    Ok(inserted.is_some())
}

/// Whether a run of this id is in an archive. Asked behind [`insert`], which may have waited for it to leave: it looked before.
pub(crate) async fn has_left(conn: &mut PgConnection, run: RunId) -> Result<bool> {
    Ok(sqlx::query_scalar("select exists (select from archived_runs where shard = $1 and run_id = $2)")
        .bind(run.shard())
        .bind(run.0)
        .fetch_one(conn)
        .await?)
}

/// The state of a run that nobody has begun and whose start named terms: it says by its number that a release which does not know
/// them leaves the run alone. Without terms no state is stored.
pub(super) fn with_terms(run: RunId) -> Result<Text> {
    let state = RunState { format: event::TERMS, ..RunState::new(run) };
    payload::pack(run, Slot::Cursor { seq: 0 }, &state, &mut Vec::new())
}

/// Gives an id to a run, or says which open run has it.
///
/// # Transaction
/// Locks the id, until the end or [`undo`]: nobody else is started under it meanwhile.
pub(crate) async fn take_id(conn: &mut PgConnection, id: &str, run: RunId) -> Result<Option<RunId>> {
    let taken: Option<uuid::Uuid> = sqlx::query_scalar(
        "with taken as (insert into workflow_ids (workflow_id, shard, run_id) values ($1, $2, $3)
           on conflict (workflow_id) do update set workflow_id = excluded.workflow_id returning run_id)
         select run_id from taken where run_id <> $3",
    )
    .bind(id)
    .bind(run.shard())
    .bind(run.0)
    .fetch_optional(conn)
    .await?;
    Ok(taken.map(RunId))
}

/// As [`take_id`], without a lock on what another run has. False if one has it.
pub(crate) async fn take_free_id(conn: &mut PgConnection, id: &str, run: RunId) -> Result<bool> {
    let taken = sqlx::query(
        "insert into workflow_ids (workflow_id, shard, run_id) values ($1, $2, $3) on conflict (workflow_id) do nothing",
    )
    .bind(id)
    .bind(run.shard())
    .bind(run.0)
    .execute(conn)
    .await?;
    Ok(taken.rows_affected() == 1)
}

/// Which run has an id now. Locks nothing.
pub(crate) async fn holder(conn: &mut PgConnection, id: &str) -> Result<Option<RunId>> {
    let open: Option<uuid::Uuid> = sqlx::query_scalar("select run_id from workflow_ids where workflow_id = $1")
        .bind(id)
        .fetch_optional(conn)
        .await?;
    Ok(open.map(RunId))
}

/// The run under an id that closed last: of a chain the last, never one from a file. Once the id is taken, the answer stays true
/// until the transaction ends. Asks all shards: a run's shard is its own id's.
pub(crate) async fn last_closed(conn: &mut PgConnection, id: &str) -> Result<Option<(RunId, RunStatus)>> {
    let last: Option<(uuid::Uuid, String)> = sqlx::query_as(
        "select run_id, status from runs where workflow_id = $1 and closed_at is not null and imported_at is null and continued_as is null
         order by closed_at desc, run_id desc limit 1",
    )
    .bind(id)
    .fetch_optional(conn)
    .await?;
    last.map(|(run, status)| {
        let status =
            RunStatus::parse(&status).ok_or_else(|| Error::Invariant(format!("unknown run status `{status}`")))?;
        Ok((RunId(run), status))
    })
    .transpose()
}

/// Locks a run that is to be ended in this transaction, together with those who hear of it: its parent and its open children,
/// in the order of `transitions::lock_runs`. A child that it starts at the same instant is locked later and perhaps
/// out of order; then Postgres ends one of two, and it is done again. False: it is not open any more.
pub(crate) async fn lock_to_end(conn: &mut PgConnection, run: RunId) -> Result<bool> {
    let kin: Vec<uuid::Uuid> = sqlx::query_scalar(
        "select run_id from runs where parent_run_id = $2 and closed_at is null
         union all select parent_run_id from runs where shard = $1 and run_id = $2 and parent_run_id is not null",
    )
    .bind(run.shard())
    .bind(run.0)
    .fetch_all(&mut *conn)
    .await?;
    let mut runs: Vec<RunId> = kin.into_iter().map(RunId).collect();
    runs.push(run);
    transitions::lock_runs(conn, None, runs).await?;
    let open = "select exists (select from runs where shard = $1 and run_id = $2 and closed_at is null)";
    Ok(sqlx::query_scalar(open).bind(run.shard()).bind(run.0).fetch_one(conn).await?)
}
