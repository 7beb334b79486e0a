//! The hot path: one statement that commits a batch of transitions, each behind its own fence.

use crate::{
    Result,
    hook::{AttemptEnd, AttemptStart, Refusal, Transition, TransitionHook},
    ids::{DefinitionHash, RunId},
    store::inbox::{self, ChildResult, Kind, Outgoing},
};
use chrono::{DateTime, Utc};
use serde_json::{Value, json};
use sqlx::{PgConnection, Row, types::Json};

/// One transition of one run.
#[derive(Clone, Debug)]
pub(crate) struct Item {
    pub(crate) run_id: RunId,
    /// Fence: the owner's epoch.
    pub(crate) epoch: i64,
    /// The transition that this one follows.
    pub(crate) seq: i64,
    pub(crate) status: &'static str,
    /// Gives up ownership until `due` or a message.
    pub(crate) parked: bool,
    pub(crate) due: Option<DateTime<Utc>>,
    pub(crate) waiting: Option<String>,
    /// Messages that the run has read, this transition included.
    pub(crate) inbox_seen: i64,
    pub(crate) queue: String,
    pub(crate) topic: Option<String>,
    /// Folded state after this transition, when it is due to be written.
    pub(crate) cursor: Option<Value>,
    /// Of the events.
    pub(crate) format: u16,
    pub(crate) events: Value,
    pub(crate) output: Option<Value>,
    pub(crate) failure: Option<Value>,
    pub(crate) effects: Effects,
}

/// What a transition does beside its own run's rows; makes it travel in a transaction.
#[derive(Clone, Debug, Default)]
pub(crate) struct Effects {
    pub(crate) ended: Vec<AttemptEnd>,
    pub(crate) started: Vec<AttemptStart>,
    pub(crate) children: Vec<Child>,
    pub(crate) cancelled_children: Vec<RunId>,
    pub(crate) terminated_children: Vec<RunId>,
    /// The parent that hears of this run's end.
    pub(crate) parent: Option<(RunId, Value)>,
}

/// A child run to start.
#[derive(Clone, Debug)]
pub(crate) struct Child {
    pub(crate) run_id: RunId,
    pub(crate) workflow: String,
    pub(crate) definition: DefinitionHash,
    pub(crate) path: String,
    /// One more than its parent's.
    pub(crate) depth: i32,
    pub(crate) queue: String,
    pub(crate) attributes: Value,
    pub(crate) inputs: Value,
}

impl Effects {
    pub(crate) fn is_empty(&self) -> bool {
        self.ended.is_empty()
            && self.started.is_empty()
            && self.children.is_empty()
            && self.cancelled_children.is_empty()
            && self.terminated_children.is_empty()
            && self.parent.is_none()
    }
}

impl Item {
    pub(crate) fn is_closed(&self) -> bool {
        matches!(self.status, "completed" | "failed" | "cancelled" | "terminated")
    }
    /// Approximate size on the wire, in bytes.
    pub(crate) fn bytes(&self) -> usize {
        256 + size(&self.events) + self.cursor.as_ref().map_or(0, size)
    }
}

/// Length of a value as JSON, to within its escapes. Nothing is written: every transition is measured.
fn size(value: &Value) -> usize {
    match value {
        Value::Null | Value::Bool(_) => 5,
        Value::Number(_) => 8,
        Value::String(text) => text.len() + 3,
        Value::Array(items) => 2 + items.iter().map(size).sum::<usize>(),
        Value::Object(map) => 2 + map.iter().map(|(key, item)| key.len() + 4 + size(item)).sum::<usize>(),
    }
}

/// A column of optional JSON, by reference: a copy of every event is dear.
fn optional<'a>(items: &'a [Item], of: impl Fn(&'a Item) -> Option<&'a Value>) -> Vec<Option<Json<&'a Value>>> {
    items.iter().map(|item| of(item).map(Json)).collect()
}

/// What became of one item.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Committed; so many messages have been sent to the run.
    Accepted { inbox_n: i64 },
    /// The run may not park: it has unread messages.
    Unread { inbox_n: i64 },
    /// Another owner, or the transition is already there (the answer of an earlier sending was lost).
    Stale { epoch: i64, seq: i64 },
    /// The hook refused its starts; nothing of it was committed.
    Refused { reason: String, message: String },
}

/// Sends a batch as one statement. Refused items touch nothing; the rest is written.
pub(crate) async fn send(conn: &mut PgConnection, items: &[Item]) -> Result<Vec<Verdict>> {
    let ords: Vec<i32> = (0..items.len()).map(|i| i32::try_from(i).unwrap_or(i32::MAX)).collect();
    let rows = sqlx::query(
        "with b as (select * from unnest($1::int[], $2::smallint[], $3::uuid[], $4::bigint[], $5::bigint[], $6::text[], $7::bool[],
                      $8::bigint[], $9::jsonb[], $10::jsonb[], $11::text[], $12::timestamptz[], $13::text[], $14::jsonb[], $15::jsonb[], $16::text[], $17::smallint[])
                    as t(ord, shard, run_id, epoch, seq, status, parked, inbox_seen, cursor, events, waiting, due_at, queue, output, failure, topic, format)),
              u as (update runs r set seq = r.seq + 1, status = b.status, parked = b.parked, waiting = b.waiting, inbox_seen = b.inbox_seen,
                      owner = case when b.parked or b.status in ('completed','failed','cancelled','terminated') then null else r.owner end,
                      cursor = coalesce(b.cursor, r.cursor),
                      cursor_seq = case when b.cursor is null then r.cursor_seq else r.seq + 1 end,
                      output = b.output, failure = b.failure,
                      closed_at = case when b.status in ('completed','failed','cancelled','terminated') then engine_now() end
                    from b where r.shard = b.shard and r.run_id = b.run_id
                      and r.epoch = b.epoch and r.seq = b.seq and r.closed_at is null
                      and (not b.parked or r.inbox_n = b.inbox_seen)
                    returning b.ord, r.shard, r.run_id, r.seq, r.inbox_n, r.closed_at, r.workflow_id),
              h as (insert into history (shard, run_id, seq, epoch, format, events)
                    select u.shard, u.run_id, u.seq, b.epoch, b.format, b.events from u join b using (ord)),
              q as (insert into ready (shard, run_id, queue, due_at)
                    select b.shard, b.run_id, b.queue, b.due_at from u join b using (ord) where b.parked
                    on conflict (shard, run_id) do update set due_at = least(ready.due_at, excluded.due_at)),
              z as (delete from ready q using u where u.closed_at is not null and q.shard = u.shard and q.run_id = u.run_id),
              k as (delete from workflow_ids w using u where u.closed_at is not null and w.workflow_id = u.workflow_id and w.run_id = u.run_id),
              p as (delete from attempt_progress a using u where u.closed_at is not null and a.shard = u.shard and a.run_id = u.run_id),
              o as (insert into outbox (topic, shard, run_id, seq)
                    select b.topic, u.shard, u.run_id, u.seq from u join b using (ord) where b.topic is not null)
         select b.ord, u.ord is not null as accepted, coalesce(u.inbox_n, r.inbox_n) as inbox_n, r.epoch, r.seq,
                r.closed_at is null as open
         from b left join u using (ord) left join runs r on r.shard = b.shard and r.run_id = b.run_id order by b.ord",
    )
    .bind(ords)
    .bind(items.iter().map(|i| i.run_id.shard()).collect::<Vec<i16>>())
    .bind(items.iter().map(|i| i.run_id.0).collect::<Vec<_>>())
    .bind(items.iter().map(|i| i.epoch).collect::<Vec<_>>())
    .bind(items.iter().map(|i| i.seq).collect::<Vec<_>>())
    .bind(items.iter().map(|i| i.status).collect::<Vec<_>>())
    .bind(items.iter().map(|i| i.parked).collect::<Vec<_>>())
    .bind(items.iter().map(|i| i.inbox_seen).collect::<Vec<_>>())
    .bind(optional(items, |i| i.cursor.as_ref()))
    .bind(items.iter().map(|i| Json(&i.events)).collect::<Vec<_>>())
    .bind(items.iter().map(|i| i.waiting.as_deref()).collect::<Vec<_>>())
    .bind(items.iter().map(|i| i.due).collect::<Vec<_>>())
    .bind(items.iter().map(|i| i.queue.as_str()).collect::<Vec<_>>())
    .bind(optional(items, |i| i.output.as_ref()))
    .bind(optional(items, |i| i.failure.as_ref()))
    .bind(items.iter().map(|i| i.topic.as_deref()).collect::<Vec<_>>())
    .bind(items.iter().map(|i| i16::try_from(i.format).unwrap_or(i16::MAX)).collect::<Vec<i16>>())
    .fetch_all(conn)
    .await?;
    rows.into_iter()
        .zip(items)
        .map(|(row, item)| {
            let inbox_n: Option<i64> = row.try_get("inbox_n")?;
            if row.try_get("accepted")? {
                return Ok(Verdict::Accepted { inbox_n: inbox_n.unwrap_or(0) });
            }
            let epoch: i64 = row.try_get::<Option<i64>, _>("epoch")?.unwrap_or(-1);
            let seq: i64 = row.try_get::<Option<i64>, _>("seq")?.unwrap_or(-1);
            let open: bool = row.try_get("open")?;
            if item.parked && open && epoch == item.epoch && seq == item.seq {
                return Ok(Verdict::Unread { inbox_n: inbox_n.unwrap_or(0) });
            }
            Ok(Verdict::Stale { epoch, seq })
        })
        .collect()
}

/// Carries out what accepted transitions do beside their own rows. Lock order: runs, then whatever the hook locks.
pub(crate) async fn apply_effects(
    conn: &mut PgConnection,
    items: &[Item],
    verdicts: &[Verdict],
    hook: &dyn TransitionHook,
) -> std::result::Result<Vec<Refusal>, crate::hook::HookError> {
    let accepted = || {
        items.iter().enumerate().zip(verdicts).filter(|(_, v)| matches!(v, Verdict::Accepted { .. })).map(|(i, _)| i)
    };
    for (_, item) in accepted() {
        for child in &item.effects.children {
            start_child(conn, item, child).await?;
        }
    }
    // Other runs' rows are locked in one order, so that two batches cannot wait for each other.
    let mut messages: Vec<(RunId, Kind, Value)> = Vec::new();
    for (_, item) in accepted() {
        messages.extend(
            item.effects.cancelled_children.iter().map(|c| (*c, Kind::Cancel, json!("its parent was cancelled"))),
        );
        let terminated = item.effects.terminated_children.iter();
        messages.extend(terminated.map(|c| (*c, Kind::Terminate, json!("its parent was stopped"))));
        messages.extend(item.effects.parent.clone().map(|(parent, result)| (parent, Kind::Child, result)));
    }
    messages.sort_by_key(|(run, ..)| *run);
    for (run, kind, payload) in &messages {
        let message = Outgoing { run: *run, kind: *kind, name: "", payload, dedupe_id: None, sender: None };
        inbox::send(conn, &message).await.map_err(sql_of)?;
    }
    let transitions: Vec<Transition> = accepted()
        .filter(|(_, item)| !item.effects.ended.is_empty() || !item.effects.started.is_empty())
        .map(|(ord, item)| Transition {
            ord,
            run_id: item.run_id,
            ended: item.effects.ended.clone(),
            started: item.effects.started.clone(),
        })
        .collect();
    if transitions.is_empty() { Ok(Vec::new()) } else { hook.apply(conn, &transitions).await }
}

fn sql_of(error: crate::Error) -> crate::hook::HookError {
    match error {
        crate::Error::Sql(e) => crate::hook::HookError::Sql(e),
        other => crate::hook::HookError::Invariant(other.to_string()),
    }
}

async fn start_child(conn: &mut PgConnection, parent: &Item, child: &Child) -> std::result::Result<(), sqlx::Error> {
    sqlx::query(
        "with r as (insert into runs (shard, run_id, workflow, definition, status, parked, queue, attributes, topic, inputs,
                      parent_shard, parent_run_id, parent_path, depth)
                    values ($1, $2, $3, $4, 'pending', true, $5, $6, $7, $8, $9, $10, $11, $12) on conflict do nothing
                    returning shard, run_id, queue)
         insert into ready (shard, run_id, queue) select shard, run_id, queue from r",
    )
    .bind(child.run_id.shard())
    .bind(child.run_id.0)
    .bind(&child.workflow)
    .bind(&child.definition.0[..])
    .bind(&child.queue)
    .bind(&child.attributes)
    .bind(&parent.topic)
    .bind(&child.inputs)
    .bind(parent.run_id.shard())
    .bind(parent.run_id.0)
    .bind(&child.path)
    .bind(child.depth)
    .execute(conn)
    .await?;
    Ok(())
}

/// The message that tells a parent how this run ended.
pub(crate) fn child_result(
    run_id: RunId,
    status: &str,
    output: Option<Value>,
    failure: Option<crate::Failure>,
) -> Value {
    let result = ChildResult {
        run_id,
        completed: status == "completed",
        cancelled: matches!(status, "cancelled" | "terminated"),
        output,
        failure,
    };
    serde_json::to_value(result).unwrap_or(Value::Null)
}
