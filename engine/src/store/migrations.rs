//! Runs that go on under another definition, and the definitions that they had before (table `former_definitions`).

use super::{
    blobs,
    definitions::{self, hash_of},
};
use crate::{
    Error, Result,
    event::{Event, format_of},
    ids::{DefinitionHash, RunId},
    labels,
    payload::{self, Slot},
};
use serde_json::Value;
use sqlx::{PgConnection, Row, types::Json};

/// Locks the run's row until the end of the transaction, as whoever commits a transition of it does.
pub(crate) async fn lock(conn: &mut PgConnection, run: RunId) -> Result<()> {
    let locked = sqlx::query("select 1 from runs where shard = $1 and run_id = $2 for no key update")
        .bind(run.shard())
        .bind(run.0)
        .fetch_optional(&mut *conn)
        .await?
        .map(drop);
    match locked {
        Some(()) => Ok(()),
        None => Err(super::retention::absent(conn, run).await),
    }
}

/// A migration, ready to be stored.
pub(crate) struct New<'a> {
    pub(crate) run: RunId,
    /// Of the row, as it was read.
    pub(crate) epoch: i64,
    pub(crate) seq: i64,
    pub(crate) from: DefinitionHash,
    pub(crate) to: DefinitionHash,
    /// All inputs, if they are not what they were.
    pub(crate) inputs: Option<&'a Value>,
    pub(crate) event: &'a Event,
    /// The state after it.
    pub(crate) state: &'a Value,
}

/// Appends the transition, pins the run to the new definition and makes it claimable; whoever owned it is fenced off. False if
/// it moved meanwhile. A run that is held back stays so.
pub(crate) async fn apply(conn: &mut PgConnection, new: &New<'_>) -> Result<bool> {
    let labels = labels::suffix(&definitions::terms(conn, new.to).await?.runs_on);
    let (seq, mut large) = (new.seq + 1, Vec::new());
    let events = payload::pack(new.run, Slot::Events { seq }, &[new.event], &mut large)?;
    let inputs = new.inputs.map(|inputs| payload::pack(new.run, Slot::Inputs, inputs, &mut large)).transpose()?;
    let state = payload::pack_known(conn, new.run, Slot::Cursor { seq }, new.state, &large).await?;
    blobs::put(conn, &large).await?;
    crate::committer::crash_point("migrate.after_blobs");
    let applied: Option<i32> = sqlx::query_scalar(
        "with u as (update runs r set definition = $5, seq = r.seq + 1, epoch = r.epoch + 1, owner = null, parked = true,
                           queue = split_part(r.queue, '[', 1) || $11::text,
                           inputs = coalesce($6, r.inputs), cursor = $7, cursor_seq = r.seq + 1,
                           waiting = case when r.owner is null then r.waiting else 'worker' end
                    where shard = $1 and run_id = $2 and epoch = $3 and seq = $4 and closed_at is null and imported_at is null
                    returning shard, run_id, seq, epoch, queue, priority, lane, topic, admitted),
              f as (insert into former_definitions (shard, run_id, until_seq, definition) select shard, run_id, seq - 1, $8 from u),
              h as (insert into history (shard, run_id, seq, epoch, format, events) select shard, run_id, seq, epoch, $9, $10 from u),
              o as (insert into outbox (topic, shard, run_id, seq) select topic, shard, run_id, seq from u where topic is not null),
              q as (insert into ready (shard, run_id, queue, priority, lane, due_at)
                    select shard, run_id, queue, priority, lane, engine_now() from u where admitted
                    on conflict (shard, run_id) do update set timed = false, queue = excluded.queue, due_at = least(ready.due_at, excluded.due_at))
         select 1 from u",
    )
    .bind(new.run.shard())
    .bind(new.run.0)
    .bind(new.epoch)
    .bind(new.seq)
    .bind(&new.to.0[..])
    .bind(inputs.as_deref().map(Json))
    .bind(Json(&*state))
    .bind(&new.from.0[..])
    .bind(i16::try_from(payload::format(&events, format_of(std::slice::from_ref(new.event)))).unwrap_or(i16::MAX))
    .bind(Json(&*events))
    .bind(labels)
    .fetch_optional(conn)
    .await?;
    Ok(applied.is_some())
}

/// The definitions that a run had before, each with the last transition that was decided under it, oldest first.
pub(crate) async fn former(conn: &mut PgConnection, run: RunId) -> Result<Vec<(u64, DefinitionHash)>> {
    let rows = sqlx::query(
        "select until_seq, definition from former_definitions where shard = $1 and run_id = $2 order by until_seq",
    )
    .bind(run.shard())
    .bind(run.0)
    .fetch_all(conn)
    .await?;
    rows.into_iter()
        .map(|row| {
            let hash =
                hash_of(row.try_get("definition")?).ok_or_else(|| Error::Invariant("a definition's hash".into()))?;
            Ok((u64::try_from(row.try_get::<i64, _>("until_seq")?).unwrap_or(0), hash))
        })
        .collect()
}

/// Notes a definition that an imported run had before.
pub(crate) async fn note(conn: &mut PgConnection, run: RunId, until: u64, definition: DefinitionHash) -> Result<()> {
    sqlx::query("insert into former_definitions (shard, run_id, until_seq, definition) values ($1, $2, $3, $4)")
        .bind(run.shard())
        .bind(run.0)
        .bind(i64::try_from(until).unwrap_or(i64::MAX))
        .bind(&definition.0[..])
        .execute(conn)
        .await?;
    Ok(())
}
