//! The hot path: one statement that commits a batch of transitions, each behind its own fence.

use crate::{
    Error, Result,
    admission::Place,
    client::ATTRIBUTES_BYTES_MAX,
    hook::{AttemptEnd, AttemptStart, HookError, Refusal, Transition, TransitionHook},
    ids::{DefinitionHash, RunId},
    labels,
    payload::{self, Slot},
    store::{
        blobs,
        chain::{self, Arrives, Successor},
        definitions,
        inbox::{self, ChildResult, Kind, Outgoing, Sent, cancel_text},
        spread::{Forms, Spread, bind_shard},
    },
};
use chrono::{DateTime, Utc};
use serde::Serialize;
use serde_json::{
    Value, json,
    value::{RawValue, to_raw_value},
};
use sqlx::{PgConnection, types::Json};
use std::{borrow::Borrow, collections::HashMap};

/// JSON, written once: what waits in a queue or is sent again is not written again.
pub(crate) type Text = Box<RawValue>;

/// Writes a value.
///
/// # Errors
/// `invariant`: everything that is stored can be written.
pub(crate) fn text(value: &impl Serialize) -> Result<Text> {
    to_raw_value(value).map_err(|e| Error::Invariant(format!("what is to be stored is no JSON: {e}")))
}

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
    pub(crate) cursor: Option<Text>,
    /// Of the events.
    pub(crate) format: u16,
    pub(crate) events: Text,
    pub(crate) output: Option<Text>,
    pub(crate) failure: Option<Text>,
    pub(crate) effects: Effects,
}

/// What a transition does beside its own run's rows; makes it travel in a transaction.
#[derive(Clone, Debug, Default)]
pub(crate) struct Effects {
    pub(crate) ended: Vec<AttemptEnd>,
    pub(crate) started: Vec<AttemptStart>,
    pub(crate) children: Vec<Child>,
    /// And by when they are to have stopped.
    pub(crate) cancelled_children: Vec<(RunId, Option<DateTime<Utc>>)>,
    pub(crate) terminated_children: Vec<RunId>,
    /// The run that goes on in the place of this one, which closes as continued.
    pub(crate) successor: Option<Successor>,
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
    /// Its parent's.
    pub(crate) queue: String,
    pub(crate) attributes: Value,
    pub(crate) inputs: Value,
}

impl Effects {
    /// The other runs that hear of it.
    fn told(&self) -> impl Iterator<Item = RunId> {
        self.stopped().chain(self.parent.as_ref().map(|(parent, _)| *parent))
    }

    /// The children that are told to end.
    fn stopped(&self) -> impl Iterator<Item = RunId> {
        self.cancelled_children.iter().map(|(child, _)| child).chain(&self.terminated_children).copied()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.ended.is_empty()
            && self.started.is_empty()
            && self.children.is_empty()
            && self.cancelled_children.is_empty()
            && self.terminated_children.is_empty()
            && self.successor.is_none()
            && self.parent.is_none()
    }
}

impl Item {
    pub(crate) fn is_closed(&self) -> bool {
        matches!(self.status, "completed" | "failed" | "cancelled" | "terminated" | "continued")
    }
    /// It gives the run up, to the queue or for ever.
    fn leaves(&self) -> bool {
        self.parked || self.is_closed()
    }

    /// Approximate size on the wire, in bytes.
    pub(crate) fn bytes(&self) -> usize {
        let length = |text: &Option<Text>| text.as_ref().map_or(0, |t| t.get().len());
        256 + self.events.get().len() + length(&self.cursor) + length(&self.output)
    }
}

/// Length of a value as JSON, to within its escapes. Nothing is written.
pub(crate) fn size(value: &Value) -> usize {
    match value {
        Value::Null | Value::Bool(_) => 5,
        Value::Number(_) => 8,
        Value::String(text) => text.len() + 3,
        Value::Array(items) => 2 + items.iter().map(size).sum::<usize>(),
        Value::Object(map) => 2 + map.iter().map(|(key, item)| key.len() + 4 + size(item)).sum::<usize>(),
    }
}

/// A column of a batch.
fn each<'a, I: Borrow<Item>, T>(items: &'a [I], of: impl Fn(&'a Item) -> T) -> Vec<T> {
    items.iter().map(|item| of(item.borrow())).collect()
}

/// A column of optional JSON, by reference.
fn optional<'a, I: Borrow<Item>>(
    items: &'a [I],
    of: impl Fn(&'a Item) -> Option<&'a Text>,
) -> Vec<Option<Json<&'a RawValue>>> {
    items.iter().map(|item| of(item.borrow()).map(|text| Json(&**text))).collect()
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

/// Why a batch was not committed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Undone {
    #[error(transparent)]
    Hook(#[from] HookError),
    /// Nothing is wrong with it: it is for a worker that has the payload key, or is of that release.
    #[error(transparent)]
    Left(Error),
}

impl Undone {
    pub(crate) fn of(error: Error) -> Self {
        match error {
            Error::Sql(error) => Self::Hook(HookError::Sql(error)),
            error @ (Error::PayloadKeyMissing(_) | Error::NewerRelease(_)) => Self::Left(error),
            other => Self::Hook(HookError::Invariant(other.to_string())),
        }
    }
}

impl From<sqlx::Error> for Undone {
    fn from(error: sqlx::Error) -> Self {
        Self::Hook(HookError::Sql(error))
    }
}

/// The statement of the hot path. Its parameters are columns; `ord` counts from 1. It returns what was accepted.
///
/// - `(select $1)` hides from the planner how many there are: it takes 10, and reads a table of more than a few hundred runs by the
///   key's index. When it knew of 131, it read the whole of `runs`, 3 times as dear for 4,000 runs; with an estimate of one it
///   would read a small table once for each run, and go on doing so while the table grows.
/// - Wide columns are taken by `ord` where they are wanted: a row that the update joins is copied for each run.
/// - One instant for all: `engine_now()` calls a volatile function, so each call of it is a statement of its own, 3 µs.
/// - Where runs are spread, the shard is said once and every table compared with it; business keys lie on another node then and are
///   given free by a statement of their own.
static SEND: Forms = Forms::new(
    "
    with n as materialized (select engine_now() as at),
         u as (update runs r set seq = r.seq + 1, status = b.status, parked = b.parked, waiting = b.waiting, inbox_seen = b.inbox_seen,
                 owner = case when b.parked or b.status in ('completed','failed','cancelled','terminated','continued') then null else r.owner end,
                 cursor = coalesce(b.cursor, r.cursor),
                 cursor_seq = case when b.cursor is null then r.cursor_seq else r.seq + 1 end,
                 output = b.output, failure = b.failure,
                 closed_at = case when b.status in ('completed','failed','cancelled','terminated','continued') then (select at from n) end
               from unnest((select $1::int[]), (select $2::smallint[]), (select $3::uuid[]), (select $4::bigint[]), (select $5::bigint[]),
                      (select $6::text[]), (select $7::bool[]), (select $8::bigint[]), (select $9::jsonb[]), (select $10::text[]),
                      (select $11::jsonb[]), (select $12::jsonb[]))
                    as b(ord, shard, run_id, epoch, seq, status, parked, inbox_seen, cursor, waiting, output, failure)
               where r.shard = b.shard and r.run_id = b.run_id
                 and r.epoch = b.epoch and r.seq = b.seq and r.closed_at is null
                 and (not b.parked or r.inbox_n = b.inbox_seen)/*at r*/
               returning b.ord, r.shard, r.run_id, r.epoch, r.seq, r.inbox_n, r.parked, r.closed_at, r.workflow_id, r.priority, r.lane),
         h as (insert into history (shard, run_id, seq, epoch, format, events, at)
               select shard, run_id, seq, epoch, ($13::smallint[])[ord], ($14::jsonb[])[ord], (select at from n) from u),
         q as (insert into ready (shard, run_id, queue, priority, lane, timed, due_at)
               select shard, run_id, ($15::text[])[ord], priority, lane, ($16::timestamptz[])[ord] > (select at from n), ($16::timestamptz[])[ord]
               from u where parked
               on conflict (shard, run_id) do update set due_at = least(ready.due_at, excluded.due_at)),
         g as (delete from admissions a using u where u.closed_at is not null and a.shard = any(array[u.shard]) and a.run_id = any(array[u.run_id])/*at a*/),
         z as (delete from ready q using u where u.closed_at is not null and q.shard = any(array[u.shard]) and q.run_id = any(array[u.run_id])/*at q*/),
/*together*/         k as (delete from workflow_ids w using u where u.closed_at is not null and w.workflow_id = any(array[u.workflow_id]) and w.run_id = u.run_id),
/*together*/         p as (delete from attempt_progress a using u where u.closed_at is not null and a.shard = any(array[u.shard]) and a.run_id = any(array[u.run_id])/*at a*/),
         o as (insert into outbox (topic, shard, run_id, seq)
               select ($17::text[])[ord], shard, run_id, seq from u where ($17::text[])[ord] is not null)
    select ord, inbox_n from u",
    "$18",
);

/// What [`SEND`] does for one run that goes on in memory: most transitions of a worker that is not loaded. The batch costs three
/// times the update and the insert themselves before its first row (0.4 ms and 0.13 ms, measured): ten writing parts and as many
/// columns to set up. So does the outbox, a third of it, where nobody reads along.
macro_rules! send_one {
    ($told:literal) => {
        concat!(
            "
    with u as (update runs r set seq = r.seq + 1, status = $5, parked = false, waiting = null, inbox_seen = $6,
                 cursor = coalesce($7, r.cursor), cursor_seq = case when $7 is null then r.cursor_seq else r.seq + 1 end,
                 output = $8, failure = $9
               where r.shard = $1 and r.run_id = $2 and r.epoch = $3 and r.seq = $4 and r.closed_at is null
               returning r.shard, r.run_id, r.epoch, r.seq, r.inbox_n),
         h as (insert into history (shard, run_id, seq, epoch, format, events, at)
               select shard, run_id, seq, epoch, $10, $11, engine_now() from u)",
            $told,
            "
    select 1, inbox_n from u"
        )
    };
}
const SEND_ONE: &str = send_one!("");
/// With a topic, whose readers are told.
const SEND_ONE_TOLD: &str =
    send_one!(", o as (insert into outbox (topic, shard, run_id, seq) select $12::text, shard, run_id, seq from u)");

/// Whether a batch of one shard is more than one statement and wants a transaction.
pub(crate) fn is_several<I: Borrow<Item>>(shard: Option<i16>, items: &[I]) -> bool {
    shard.is_some() && items.iter().any(|item| item.borrow().is_closed())
}

/// Sends a batch as one statement. Refused items touch nothing; the rest is written. If there are any, a second statement
/// asks what stands there instead. `shard`: all runs are of it, and the statement says so; [`is_several`] then.
pub(crate) async fn send<I: Borrow<Item>>(
    conn: &mut PgConnection,
    shard: Option<i16>,
    items: &[I],
) -> Result<Vec<Verdict>> {
    let accepted = match items {
        [item] if !item.borrow().leaves() => send_one(conn, item.borrow()).await?,
        _ => send_all(conn, shard, items).await?,
    };
    crate::committer::crash_point("write.after_rows");
    if is_several(shard, items) {
        free_keys(conn, shard, items, &accepted).await?;
    }
    crate::committer::crash_point("write.after_keys");
    let mut verdicts: Vec<Option<Verdict>> = items.iter().map(|_| None).collect();
    for (ord, inbox_n) in accepted {
        if let Some(slot) = usize::try_from(ord).ok().and_then(|ord| verdicts.get_mut(ord.checked_sub(1)?)) {
            *slot = Some(Verdict::Accepted { inbox_n });
        }
    }
    let refused: Vec<RunId> =
        items.iter().zip(&verdicts).filter(|(_, v)| v.is_none()).map(|(i, _)| i.borrow().run_id).collect();
    let found = if refused.is_empty() { HashMap::new() } else { standing(conn, shard, &refused).await? };
    let decide = |item: &Item| match found.get(&item.run_id) {
        Some(there) if item.parked && there.open && there.epoch == item.epoch && there.seq == item.seq => {
            Verdict::Unread { inbox_n: there.inbox_n }
        }
        Some(there) => Verdict::Stale { epoch: there.epoch, seq: there.seq },
        // There is no such run.
        None => Verdict::Stale { epoch: -1, seq: -1 },
    };
    Ok(verdicts.into_iter().zip(items).map(|(v, item)| v.unwrap_or_else(|| decide(item.borrow()))).collect())
}

/// What was accepted: (place in the batch from 1, messages ever sent to the run).
async fn send_one(conn: &mut PgConnection, item: &Item) -> Result<Vec<(i32, i64)>> {
    let one = sqlx::query_as(if item.topic.is_some() { SEND_ONE_TOLD } else { SEND_ONE })
        .bind(item.run_id.shard())
        .bind(item.run_id.0)
        .bind(item.epoch)
        .bind(item.seq)
        .bind(item.status)
        .bind(item.inbox_seen)
        .bind(item.cursor.as_deref().map(Json))
        .bind(item.output.as_deref().map(Json))
        .bind(item.failure.as_deref().map(Json))
        .bind(i16::try_from(item.format).unwrap_or(i16::MAX))
        .bind(Json(&*item.events));
    let one = if let Some(topic) = item.topic.as_deref() { one.bind(topic) } else { one };
    Ok(one.fetch_all(conn).await?)
}

/// The same of a batch.
async fn send_all<I: Borrow<Item>>(
    conn: &mut PgConnection,
    shard: Option<i16>,
    items: &[I],
) -> Result<Vec<(i32, i64)>> {
    let query = sqlx::query_as(SEND.text(shard))
        .bind((1..).take(items.len()).collect::<Vec<i32>>())
        .bind(each(items, |i| i.run_id.shard()))
        .bind(each(items, |i| i.run_id.0))
        .bind(each(items, |i| i.epoch))
        .bind(each(items, |i| i.seq))
        .bind(each(items, |i| i.status))
        .bind(each(items, |i| i.parked))
        .bind(each(items, |i| i.inbox_seen))
        .bind(optional(items, |i| i.cursor.as_ref()))
        .bind(each(items, |i| i.waiting.as_deref()))
        .bind(optional(items, |i| i.output.as_ref()))
        .bind(optional(items, |i| i.failure.as_ref()))
        .bind(each(items, |i| i16::try_from(i.format).unwrap_or(i16::MAX)))
        .bind(each(items, |i| Json(&*i.events)))
        .bind(each(items, |i| i.queue.as_str()))
        .bind(each(items, |i| i.due))
        .bind(each(items, |i| i.topic.as_deref()));
    Ok(bind_shard!(query, shard).fetch_all(conn).await?)
}

/// Gives free the business keys of the runs that have closed, where [`SEND`] does not.
async fn free_keys<I: Borrow<Item>>(
    conn: &mut PgConnection,
    shard: Option<i16>,
    items: &[I],
    accepted: &[(i32, i64)],
) -> Result<()> {
    let closed = accepted.iter().filter_map(|(ord, _)| items.get(usize::try_from(*ord).ok()?.checked_sub(1)?));
    let closed = closed.map(|item| -> &Item { item.borrow() });
    let closed: Vec<uuid::Uuid> = closed.filter(|item| item.is_closed()).map(|item| item.run_id.0).collect();
    let keys: Vec<(String, uuid::Uuid)> = sqlx::query_as(
        "select r.workflow_id, r.run_id from runs r where r.shard = $1 and r.run_id = any($2) and r.workflow_id is not null",
    )
    .bind(shard)
    .bind(closed)
    .fetch_all(&mut *conn)
    .await?;
    if keys.is_empty() {
        return Ok(());
    }
    crate::committer::crash_point("keys.after_look");
    let (keys, runs): (Vec<String>, Vec<uuid::Uuid>) = keys.into_iter().unzip();
    sqlx::query(
        "delete from workflow_ids w using unnest($1::text[], $2::uuid[]) k(workflow_id, run_id)
         where w.workflow_id = k.workflow_id and w.run_id = k.run_id",
    )
    .bind(keys)
    .bind(runs)
    .execute(conn)
    .await?;
    Ok(())
}

/// What of a run decides why a transition was refused.
struct Standing {
    epoch: i64,
    seq: i64,
    inbox_n: i64,
    open: bool,
}

static STANDING: Forms = Forms::new(
    "select r.run_id, r.epoch, r.seq, r.inbox_n, r.closed_at is null from unnest((select $1::smallint[]), (select $2::uuid[])) k(shard, run_id)
         join runs r on r.shard = k.shard and r.run_id = k.run_id/*at r*/",
    "$3",
);

async fn standing(conn: &mut PgConnection, shard: Option<i16>, runs: &[RunId]) -> Result<HashMap<RunId, Standing>> {
    let query = sqlx::query_as(STANDING.text(shard))
        .bind(runs.iter().map(|run| run.shard()).collect::<Vec<i16>>())
        .bind(runs.iter().map(|run| run.0).collect::<Vec<_>>());
    let rows: Vec<(uuid::Uuid, i64, i64, i64, bool)> = bind_shard!(query, shard).fetch_all(conn).await?;
    let row = |(run, epoch, seq, inbox_n, open)| (RunId(run), Standing { epoch, seq, inbox_n, open });
    Ok(rows.into_iter().map(row).collect())
}

static LOCK: Forms = Forms::new(
    "select from unnest((select $1::smallint[]), (select $2::uuid[])) k(shard, run_id)
     join runs r on r.shard = k.shard and r.run_id = k.run_id/*at r*/ order by r.shard, r.run_id for no key update of r",
    "$3",
);

/// Locks the runs of a batch together with those that it sends messages to (of a chain, the one that is open), in the order of
/// [`lock_runs`]. A child that ends while its parent stops it is in two batches of two workers, and each would hold its own run and
/// wait for the other's. `spread`: where it is not known, it is asked.
pub(crate) async fn lock<I: Borrow<Item>>(conn: &mut PgConnection, spread: Option<Spread>, items: &[I]) -> Result<()> {
    let mut runs: Vec<RunId> = items.iter().flat_map(|item| item.borrow().effects.told()).collect();
    if runs.is_empty() {
        return Ok(());
    }
    runs.extend(items.iter().map(|item| item.borrow().run_id));
    let stopped: Vec<RunId> = items.iter().flat_map(|item| item.borrow().effects.stopped()).collect();
    if !stopped.is_empty() {
        runs.extend(chain::open_runs(conn, &stopped).await?);
    }
    crate::committer::crash_point("lock.after_look");
    lock_runs(conn, spread, runs).await
}

/// Locks runs in the order of their shards, and of their ids in each: the same whether they are locked together or shard by shard.
pub(super) async fn lock_runs(conn: &mut PgConnection, spread: Option<Spread>, runs: Vec<RunId>) -> Result<()> {
    let spread = match spread {
        Some(spread) => spread,
        None => Spread::among(conn, &runs).await?,
    };
    for (shard, runs) in spread.divide(runs, RunId::shard) {
        crate::committer::crash_point("lock.before_runs");
        let query = sqlx::query(LOCK.text(shard))
            .bind(runs.iter().map(|run| run.shard()).collect::<Vec<i16>>())
            .bind(runs.iter().map(|run| run.0).collect::<Vec<_>>());
        bind_shard!(query, shard).execute(&mut *conn).await?;
    }
    Ok(())
}

/// Carries out what accepted transitions do beside their own rows. Lock order: runs ([`lock`]), rates and groups by name, then
/// whatever the hook locks.
pub(crate) async fn apply_effects<I: Borrow<Item>>(
    conn: &mut PgConnection,
    items: &[I],
    verdicts: &[Verdict],
    hook: &dyn TransitionHook,
) -> std::result::Result<Vec<Refusal>, Undone> {
    let accepted = || {
        let items = items.iter().map(Borrow::borrow).enumerate();
        items.zip(verdicts).filter(|(_, v)| matches!(v, Verdict::Accepted { .. })).map(|(i, _): ((usize, &Item), _)| i)
    };
    let mut arrivals = Vec::new();
    for (_, item) in accepted() {
        for child in &item.effects.children {
            let arrives = start_child(conn, item, child).await.map_err(Undone::of)?;
            arrivals.extend(arrives.map(|place| (Arrives::of_child(place), child.run_id)));
            crate::committer::crash_point("settle.after_child");
        }
    }
    for (_, item) in accepted() {
        if let Some(next) = &item.effects.successor {
            let arrival = chain::start(conn, item.run_id, next).await.map_err(Undone::of)?;
            arrivals.extend(arrival.map(|arrives| (arrives, next.run_id)));
            crate::committer::crash_point("settle.after_successor");
        }
    }
    chain::arrive(conn, arrivals).await.map_err(Undone::of)?;
    crate::committer::crash_point("settle.after_arrivals");
    let mut messages: Vec<(RunId, Kind, Value)> = Vec::new();
    for (_, item) in accepted() {
        let cancelled = item.effects.cancelled_children.iter();
        messages
            .extend(cancelled.map(|(c, until)| (*c, Kind::Cancel, cancel_text("its parent was cancelled", *until))));
        let terminated = item.effects.terminated_children.iter();
        messages.extend(terminated.map(|c| (*c, Kind::Terminate, json!("its parent was stopped"))));
        messages.extend(item.effects.parent.clone().map(|(parent, result)| (parent, Kind::Child, result)));
    }
    messages.sort_by_key(|(run, ..)| *run);
    for (run, kind, payload) in &messages {
        let message = Outgoing {
            run: *run,
            kind: *kind,
            name: "",
            payload,
            dedupe_id: None,
            sender: None,
            definition: None,
            unread_max: None,
        };
        let sent = inbox::send(conn, &message).await.map_err(Undone::of)?;
        crate::committer::crash_point("settle.after_sending");
        // A parent knows its child by the first run of a chain; it means the one that is open.
        if sent == Sent::NoOpenRun && *kind != Kind::Child {
            chain::send(conn, &message).await.map_err(Undone::of)?;
        }
        crate::committer::crash_point("settle.after_message");
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
    crate::committer::crash_point("settle.before_hook");
    if transitions.is_empty() { Ok(Vec::new()) } else { Ok(hook.apply(conn, &transitions).await?) }
}

/// Inserts a child run. Returns the place that it must arrive at, if its definition has a group.
async fn start_child(conn: &mut PgConnection, parent: &Item, child: &Child) -> Result<Option<Place>> {
    let terms = definitions::terms(conn, child.definition).await?;
    let mut blobs = Vec::new();
    let inputs = payload::pack(child.run_id, Slot::Inputs, &child.inputs, &mut blobs)?;
    let inserted = sqlx::query(
        "with r as (insert into runs (shard, run_id, workflow, definition, status, parked, queue, attributes, topic, inputs,
                      parent_shard, parent_run_id, parent_path, depth, priority, fairness_key, lane)
                    select $1, $2, $3, $4, 'pending', true, $5, $6, $7, $8, $9, $10, $11, $12, priority, fairness_key, lane
                    from runs where shard = $9 and run_id = $10 on conflict do nothing
                    returning shard, run_id, queue, priority, lane)
         insert into ready (shard, run_id, queue, priority, lane) select shard, run_id, queue, priority, lane from r",
    )
    .bind(child.run_id.shard())
    .bind(child.run_id.0)
    .bind(&child.workflow)
    .bind(&child.definition.0[..])
    .bind(labels::key(&child.queue, &terms.runs_on))
    .bind(labels::handed_down(&child.attributes, &terms.extras, ATTRIBUTES_BYTES_MAX))
    .bind(&parent.topic)
    .bind(Json(&*inputs))
    .bind(parent.run_id.shard())
    .bind(parent.run_id.0)
    .bind(&child.path)
    .bind(child.depth)
    .execute(&mut *conn)
    .await?;
    crate::committer::crash_point("child.after_row");
    blobs::put(conn, &blobs).await?;
    if inserted.rows_affected() == 0 {
        return Ok(None);
    }
    Ok(terms.concurrency.map(|group| group.place(&child.inputs).unwrap_or_else(|_| group.fallback(&child.workflow))))
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

#[cfg(all(test, feature = "test-util"))]
#[path = "transitions_tests.rs"]
mod tests;
