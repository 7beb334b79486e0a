//! Runs that begin where another one was.

use crate::{
    Error, Result,
    admission::Named,
    event::Event,
    ids::{DefinitionHash, RunId},
    labels,
    machine::RunState,
    payload::{self, Slot},
    store::{blobs, definitions},
};
use chrono::{DateTime, Utc};
use serde_json::Value;
use sqlx::{PgConnection, Row, types::Json};

/// The run that made a transition: a fork's shared rows are an older run's.
pub(crate) struct Maker {
    pub(crate) run: RunId,
    pub(crate) definition: DefinitionHash,
    pub(crate) inbox_n: i64,
    pub(crate) depth: i32,
}

/// Who made transition `seq` of a run.
///
/// # Errors
/// `run_not_found`, also for an ancestor that retention has dropped; `fork_invalid` if there is no such transition.
pub(crate) async fn maker(conn: &mut PgConnection, run: RunId, seq: i64) -> Result<Maker> {
    let mut at = run;
    loop {
        let row = sqlx::query(
            "select definition, seq, inbox_n, depth, forked_from, coalesce(forked_seq, 0) as above from runs where shard = $1 and run_id = $2",
        )
        .bind(at.shard())
        .bind(at.0)
        .fetch_optional(&mut *conn)
        .await?;
        let Some(row) = row else { return Err(super::retention::absent(conn, at).await) };
        let newest: i64 = row.try_get("seq")?;
        if seq < 1 || seq > newest {
            let why = match newest {
                0 => format!("there is no transition {seq} in run {at}: it has none yet, start another run instead"),
                _ => format!(
                    "there is no transition {seq} in run {at}: choose one from 1 to {newest}, as its history lists them (`loopwright \
                     run history {at}`), or the path of a step"
                ),
            };
            return Err(Error::ForkInvalid(vec![why]));
        }
        match row.try_get::<Option<uuid::Uuid>, _>("forked_from")? {
            // Its own first row is the fork itself.
            Some(parent) if seq <= row.try_get::<i64, _>("above")? => at = RunId(parent),
            _ => {
                // Whoever was migrated afterwards had another definition then.
                let then = super::migrations::former(&mut *conn, at).await?;
                let then = then.iter().find(|(until, _)| i64::try_from(*until).is_ok_and(|until| seq <= until));
                return Ok(Maker {
                    run: at,
                    definition: match then {
                        Some((_, definition)) => *definition,
                        None => super::definitions::hash_of(row.try_get("definition")?)
                            .ok_or_else(|| Error::Invariant("a definition's hash".into()))?,
                    },
                    inbox_n: row.try_get("inbox_n")?,
                    depth: row.try_get("depth")?,
                });
            }
        }
    }
}

/// On what terms a run was started that another is made like.
#[derive(Clone, Debug, Default)]
pub(crate) struct Terms {
    pub(crate) named: Named,
    /// Of its chain.
    pub(crate) deadline: Option<DateTime<Utc>>,
}

/// What its start named, and until when its chain may go on.
type TermsRow = (Option<Json<Named>>, Option<DateTime<Utc>>);

/// # Errors
/// `run_not_found`, `run_archived`.
pub(crate) async fn terms(conn: &mut PgConnection, run: RunId) -> Result<Terms> {
    let found: Option<TermsRow> =
        sqlx::query_as("select admission, chain_deadline from runs where shard = $1 and run_id = $2")
            .bind(run.shard())
            .bind(run.0)
            .fetch_optional(&mut *conn)
            .await?;
    let Some((named, deadline)) = found else { return Err(super::retention::absent(conn, run).await) };
    Ok(Terms { named: named.map(|named| named.0).unwrap_or_default(), deadline })
}

/// A fork, ready to be stored.
pub(crate) struct New<'a> {
    pub(crate) run: RunId,
    /// Whose rows are shared up to `seq`.
    pub(crate) maker: &'a Maker,
    pub(crate) seq: i64,
    /// The run whose queue, attributes, outbox topic, priority, fairness key, group and rate it has.
    pub(crate) like: RunId,
    pub(crate) workflow: &'a str,
    pub(crate) definition: DefinitionHash,
    /// Instead of those of `like`.
    pub(crate) attributes: Option<&'a Value>,
    pub(crate) inputs: &'a Value,
    /// No run of its chain goes on beyond it.
    pub(crate) chain_deadline: Option<DateTime<Utc>>,
}

/// Keeps runs from being retired until the transaction ends.
///
/// # Errors
/// `run_not_found`, `run_archived`.
/// # Transaction
/// Locks their rows, by rising ids, against deletion only.
pub(crate) async fn hold(conn: &mut PgConnection, mut runs: [RunId; 2]) -> Result<()> {
    runs.sort();
    for run in runs {
        let there = sqlx::query("select 1 from runs where shard = $1 and run_id = $2 for key share")
            .bind(run.shard())
            .bind(run.0)
            .fetch_optional(&mut *conn)
            .await?;
        if there.is_none() {
            return Err(super::retention::absent(conn, run).await);
        }
    }
    Ok(())
}

/// Inserts the run, claimable at once; [`begin`] in the same transaction. False if there is a run of this id.
pub(crate) async fn insert(conn: &mut PgConnection, new: &New<'_>) -> Result<bool> {
    let labels = labels::suffix(&definitions::terms(conn, new.definition).await?.runs_on);
    let mut large = Vec::new();
    let inputs = payload::pack(new.run, Slot::Inputs, new.inputs, &mut large)?;
    let inserted = sqlx::query(
        "with r as (insert into runs (shard, run_id, workflow, definition, status, parked, queue, attributes, topic, inputs, depth, seq,
                                      inbox_n, inbox_seen, cursor_seq, forked_shard, forked_from, forked_seq,
                                      priority, fairness_key, lane, admission, chain_deadline)
                    select $1, $2, $3, $4, 'running', true, split_part(queue, '[', 1) || $14::text, coalesce($13, attributes), topic, $5, $6, $7 + 1, $8, $8, $7 + 1, $9, $10, $7,
                           priority, fairness_key, lane, admission, $15::timestamptz
                    from runs where shard = $11 and run_id = $12
                      -- One of that id has been here, and has left.
                      and not exists (select from archived_runs a where a.shard = $1 and a.run_id = $2)
                    on conflict do nothing returning shard, run_id, queue, priority, lane)
         insert into ready (shard, run_id, queue, priority, lane) select shard, run_id, queue, priority, lane from r",
    )
    .bind(new.run.shard())
    .bind(new.run.0)
    .bind(new.workflow)
    .bind(&new.definition.0[..])
    .bind(Json(&*inputs))
    .bind(new.maker.depth)
    .bind(new.seq)
    .bind(new.maker.inbox_n)
    .bind(new.maker.run.shard())
    .bind(new.maker.run.0)
    .bind(new.like.shard())
    .bind(new.like.0)
    .bind(new.attributes)
    .bind(labels)
    .bind(new.chain_deadline)
    .execute(&mut *conn)
    .await?;
    crate::committer::crash_point("fork.after_row");
    if inserted.rows_affected() == 1 {
        blobs::put(conn, &large).await?;
    }
    Ok(inserted.rows_affected() == 1)
}

/// Writes the first own transition of a run that was inserted in this transaction, and the state after it: how long it must wait is
/// known by then.
pub(crate) async fn begin(
    conn: &mut PgConnection,
    run: RunId,
    seq: i64,
    event: &Event,
    state: &RunState,
) -> Result<()> {
    let deadline = state.deadline;
    let mut large = Vec::new();
    let events = payload::pack(run, Slot::Events { seq }, &[event], &mut large)?;
    // What it holds of the shared part lies with the parent's run, perhaps on another node.
    let state = payload::pack(run, Slot::Cursor { seq }, state, &mut large)?;
    sqlx::query(
        // One that is held back ends then as well, and its state may be sealed.
        "with h as (insert into history (shard, run_id, seq, epoch, format, events) values ($1, $2, $3, 0, $4, $5)),
              a as (update admissions set deadline = $7 where shard = $1 and run_id = $2 and place is null)
         update runs set cursor = $6 where shard = $1 and run_id = $2",
    )
    .bind(run.shard())
    .bind(run.0)
    .bind(seq)
    .bind(i16::try_from(payload::format(&events, event.format())).unwrap_or(i16::MAX))
    .bind(Json(&*events))
    .bind(Json(&*state))
    .bind(deadline)
    .execute(&mut *conn)
    .await?;
    crate::committer::crash_point("fork.after_begin");
    blobs::put(conn, &large).await
}

/// Whether a run is that fork: an earlier sending had stored it.
pub(crate) async fn is_there(conn: &mut PgConnection, new: &New<'_>) -> Result<bool> {
    let found: Option<i32> = sqlx::query_scalar(
        "select 1 from runs where shard = $1 and run_id = $2 and forked_from = $3 and forked_seq = $4 and definition = $5",
    )
    .bind(new.run.shard())
    .bind(new.run.0)
    .bind(new.maker.run.0)
    .bind(new.seq)
    .bind(&new.definition.0[..])
    .fetch_optional(conn)
    .await?;
    Ok(found.is_some())
}

/// Hands a business key to a run. False if another open run has it.
pub(crate) async fn take_key(conn: &mut PgConnection, key: &str, run: RunId) -> Result<bool> {
    // Two statements: keys are not where their runs are.
    let taken =
        sqlx::query("insert into workflow_ids (workflow_id, shard, run_id) values ($1, $2, $3) on conflict do nothing")
            .bind(key)
            .bind(run.shard())
            .bind(run.0)
            .execute(&mut *conn)
            .await?;
    crate::committer::crash_point("reset.after_id");
    if taken.rows_affected() == 0 {
        return Ok(false);
    }
    let named = sqlx::query("update runs set workflow_id = $1 where shard = $2 and run_id = $3")
        .bind(key)
        .bind(run.shard())
        .bind(run.0)
        .execute(conn)
        .await?;
    Ok(named.rows_affected() == 1)
}
