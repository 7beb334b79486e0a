//! Table `inbox`: messages into runs.

use super::{
    blobs, chain,
    spread::{Forms, Spread, bind_shard},
    transitions::{Text, size},
};
use crate::{
    Result,
    failure::Failure,
    ids::{DefinitionHash, RunId},
    machine::Inbound,
    payload::{self, Slot},
};
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sqlx::{PgConnection, Row, postgres::PgRow, types::Json};

/// Signals and updates that may wait to be read by a run; more are refused. Chosen: ten times what the mailbox keeps of one name, and
/// at 256 KiB each what a worker can hold for a moment. A run that is held back, quarantined or without a worker reads none.
pub(crate) const UNREAD_MAX: i64 = 1_000;
/// The same of cancels, pauses and resumes, counted by themselves: neither keeps the other out. Chosen: nobody means more.
pub(crate) const ORDERS_MAX: i64 = 1_000;

/// What people and programs send, in the two kinds that are counted.
const MESSAGES: &[&str] = &["signal", "update"];
const ORDERS: &[&str] = &["cancel", "pause", "resume"];

/// The name of a `terminate` that cancels a run before it has begun: its concurrency group was full. A release that does not know
/// it terminates the run.
pub(crate) const TURNED_AWAY: &str = "turned_away";

/// What a message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Signal,
    Cancel,
    Unblock,
    Pause,
    Resume,
    Child,
    Update,
    Terminate,
}

impl Kind {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Signal => "signal",
            Self::Cancel => "cancel",
            Self::Unblock => "unblock",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Child => "child",
            Self::Update => "update",
            Self::Terminate => "terminate",
        }
    }

    /// Those that are counted with it against [`Outgoing::unread_max`].
    pub(super) fn alike(self) -> &'static [&'static str] {
        match self {
            Self::Signal | Self::Update => MESSAGES,
            Self::Cancel | Self::Pause | Self::Resume => ORDERS,
            Self::Unblock | Self::Child | Self::Terminate => &[],
        }
    }
}

/// A message to put into a run's inbox.
pub(crate) struct Outgoing<'a> {
    pub(crate) run: RunId,
    pub(crate) kind: Kind,
    pub(crate) name: &'a str,
    pub(crate) payload: &'a Value,
    pub(crate) dedupe_id: Option<&'a str>,
    pub(crate) sender: Option<&'a str>,
    /// Under which it was found to be in order: if the run has another one by now, nothing is stored.
    pub(crate) definition: Option<DefinitionHash>,
    /// Not stored if so many of its like wait to be read: [`UNREAD_MAX`] or [`ORDERS_MAX`] where people decide how many there are.
    /// `None`: it gets through, as everything must that the engine itself says.
    pub(crate) unread_max: Option<i64>,
}

/// What became of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sent {
    Stored,
    Duplicate,
    /// There is no such run, or it is closed; or it does not have the definition that was asked for.
    NoOpenRun,
    /// [`Outgoing::unread_max`] of its like wait to be read already.
    Full,
}

/// How a child run ended, as its parent hears it.
#[derive(Serialize, Deserialize)]
pub(crate) struct ChildResult {
    pub(crate) run_id: RunId,
    pub(crate) completed: bool,
    pub(crate) cancelled: bool,
    pub(crate) output: Option<Value>,
    pub(crate) failure: Option<Failure>,
}

/// Stores a message and makes its run claimable if it is parked. One statement; takes the run's row lock.
pub(crate) async fn send(conn: &mut PgConnection, message: &Outgoing<'_>) -> Result<Sent> {
    let slot = Slot::Message { kind: message.kind.as_str(), name: message.name };
    let mut blobs = Vec::new();
    let payload = payload::pack(message.run, slot, message.payload, &mut blobs)?;
    // Of a message that nobody takes there is nothing to store. That a run has closed or knows an id does not change any more; an
    // inbox that was full may have room by the next statement, but then the row would refer to what was not stored: so it has none.
    let wanted = blobs.is_empty() || is_wanted(conn, message).await?;
    if wanted {
        blobs::put(conn, &blobs).await?;
    }
    crate::committer::crash_point("inbox.after_blobs");
    let unread_max = if wanted { message.unread_max } else { Some(0) };
    // The run's row serializes its senders. Its count is of now; what it counts was seen when the statement began, so whatever came
    // in between is taken for more of the same. While fewer wait than may, nothing is counted. A second message with one id that raced the first is dropped by the
    // constraint; its number stays unused.
    let row = sqlx::query(
        "with target as (select shard, run_id from runs where shard = $1 and run_id = $2 and closed_at is null and imported_at is null
                            and ($8::bytea is null or definition = $8) for no key update),
              seen as (select 1 from inbox i join target t using (shard, run_id)
                       where i.shard = $1 and $6::text is not null and i.dedupe_id = $6),
              u as (update runs r set inbox_n = r.inbox_n + 1 from target t
                    where r.shard = $1 and r.shard = t.shard and r.run_id = t.run_id and not exists (select from seen)
                      and ($9::bigint is null or r.inbox_n - r.inbox_seen < $9 or $9 > r.inbox_n
                             - greatest(r.inbox_seen, (select max(n) from inbox where shard = $1 and run_id = $2))
                             + (select count(*) from (select from inbox w where w.shard = $1 and w.run_id = $2 and w.n > r.inbox_seen
                                                      and w.kind = any($10) limit $9) unread))
                    returning r.shard, r.run_id, r.inbox_n, r.seq, r.queue, r.priority, r.lane, 
                              r.parked and r.admitted and r.status <> 'quarantined' as wakes),
              m as (insert into inbox (shard, run_id, n, kind, name, payload, dedupe_id, sender, run_seq)
                    select shard, run_id, inbox_n, $3, $4, $5, $6, $7, seq from u
                    on conflict on constraint inbox_dedupe_key do nothing returning 1),
              w as (insert into ready (shard, run_id, queue, priority, lane, due_at)
                      select shard, run_id, queue, priority, lane, engine_now() from u where wakes
                    on conflict (shard, run_id) do update set timed = false, due_at = least(ready.due_at, excluded.due_at))
         select exists (select from target) as open, exists (select from m) as stored,
                exists (select from seen) or exists (select from u) as taken",
    )
    .bind(message.run.shard())
    .bind(message.run.0)
    .bind(message.kind.as_str())
    .bind(message.name)
    .bind(Json(&*payload))
    .bind(message.dedupe_id)
    .bind(message.sender)
    .bind(message.definition.map(|hash| hash.0.to_vec()))
    .bind(unread_max)
    .bind(message.kind.alike())
    .fetch_one(&mut *conn)
    .await?;
    Ok(match (row.try_get("open")?, row.try_get("stored")?, row.try_get("taken")?) {
        (false, ..) => Sent::NoOpenRun,
        (true, true, _) => Sent::Stored,
        (true, false, true) => Sent::Duplicate,
        (true, false, false) => Sent::Full,
    })
}

/// How many signals and updates of a name wait to be read by a run that has read `seen`; `most` at most.
pub(crate) async fn unread_of(conn: &mut PgConnection, run: RunId, seen: i64, name: &str, most: i64) -> Result<i64> {
    Ok(sqlx::query_scalar(
        "select count(*) from (select from inbox where shard = $1 and run_id = $2 and n > $3 and name = $4 and kind = any($5) limit $6) w",
    )
    .bind(run.shard())
    .bind(run.0)
    .bind(seen)
    .bind(name)
    .bind(MESSAGES)
    .bind(most)
    .fetch_one(conn)
    .await?)
}

/// The open run of a child, or of its chain, and whether it hears: it is not set aside, and has read that it is to end.
pub(crate) async fn overdue(conn: &mut PgConnection, child: RunId) -> Result<Option<(RunId, bool)>> {
    let mut run = child;
    loop {
        let hears: Option<bool> = sqlx::query_scalar(
            "select status <> 'quarantined' and not exists (select from inbox i where i.shard = $1 and i.run_id = $2
                      and i.n > r.inbox_seen and i.kind in ('cancel', 'terminate'))
             from runs r where shard = $1 and run_id = $2 and closed_at is null and imported_at is null",
        )
        .bind(run.shard())
        .bind(run.0)
        .fetch_optional(&mut *conn)
        .await?;
        match (hears, chain::open_run(conn, child).await?) {
            (Some(hears), _) => return Ok(Some((run, hears))),
            (None, Some(open)) if open != run => run = open,
            (None, _) => return Ok(None),
        }
    }
}

/// Whether the run is open, has room and does not know the sender's id.
async fn is_wanted(conn: &mut PgConnection, message: &Outgoing<'_>) -> Result<bool> {
    Ok(sqlx::query_scalar(
        "select exists (select from runs where shard = $1 and run_id = $2 and closed_at is null
                          and ($4::bigint is null or inbox_n - inbox_seen < $4
                               or $4 > (select count(*) from (select from inbox w where w.shard = $1 and w.run_id = $2
                                          and w.n > runs.inbox_seen and w.kind = any($5) limit $4) unread)))
            and not exists (select from inbox where shard = $1 and run_id = $2 and dedupe_id = $3)",
    )
    .bind(message.run.shard())
    .bind(message.run.0)
    .bind(message.dedupe_id)
    .bind(message.unread_max)
    .bind(message.kind.alike())
    .fetch_one(conn)
    .await?)
}

/// Messages that a run must hear of before it begins anything, `after < n <= up_to`, in order. They are few: whoever sends them is
/// asked to by a person.
pub(crate) async fn orders(conn: &mut PgConnection, run: RunId, after: i64, up_to: i64) -> Result<Vec<Inbound>> {
    let rows = sqlx::query(
        "select n, kind, name, payload, dedupe_id, sender, sent_at from inbox
         where shard = $1 and run_id = $2 and n > $3 and n <= $4 and kind in ('pause', 'resume', 'cancel', 'terminate')
         order by n limit $5",
    )
    .bind(run.shard())
    .bind(run.0)
    .bind(after)
    .bind(up_to)
    .bind(READ_MAX)
    .fetch_all(&mut *conn)
    .await?;
    let mut messages = Vec::with_capacity(rows.len());
    for row in rows {
        let slot = Slot::Message { kind: row.try_get("kind")?, name: row.try_get("name")? };
        let payload = payload::read(conn, run, slot, row.try_get("payload")?).await?;
        messages.push(inbound(run, &row, payload)?);
    }
    Ok(messages)
}

/// How many messages were ever sent to an open run, as its owner of `epoch` may know; `None` for everybody else.
pub(crate) async fn sent(conn: &mut PgConnection, run: RunId, epoch: i64) -> Result<Option<i64>> {
    Ok(sqlx::query_scalar(
        "select inbox_n from runs where shard = $1 and run_id = $2 and epoch = $3 and closed_at is null",
    )
    .bind(run.shard())
    .bind(run.0)
    .bind(epoch)
    .fetch_optional(conn)
    .await?)
}

/// Messages read at once: they are events of one transition, and a history row stays small.
const READ_MAX: i64 = 256;
/// Bytes after which no further message is read at once.
const READ_BYTES: usize = 1 << 20;

/// Messages `after < n <= up_to`, in order, as many as fit into one transition; and the number up to which none is left out.
pub(crate) async fn read(conn: &mut PgConnection, run: RunId, after: i64, up_to: i64) -> Result<(Vec<Inbound>, i64)> {
    let rows = sqlx::query(
        "select n, kind, name, payload, dedupe_id, sender, sent_at from inbox
         where shard = $1 and run_id = $2 and n > $3 and n <= $4 order by n limit $5",
    )
    .bind(run.shard())
    .bind(run.0)
    .bind(after)
    .bind(up_to)
    .bind(READ_MAX)
    .fetch_all(&mut *conn)
    .await?;
    let (mut payloads, mut bytes, mut read) = (Vec::with_capacity(rows.len()), 0, up_to);
    for row in &rows {
        if bytes >= READ_BYTES {
            break;
        }
        let slot = Slot::Message { kind: row.try_get("kind")?, name: row.try_get("name")? };
        let payload = payload::read(conn, run, slot, row.try_get("payload")?).await?;
        bytes += size(&payload);
        payloads.push(payload);
        read = row.try_get("n")?;
    }
    // A duplicate may have left a gap behind the last one.
    let seen = if read < up_to && left(conn, run, read, up_to).await? { read } else { up_to };
    let messages = rows.iter().zip(payloads).map(|(row, payload)| inbound(run, row, payload)).collect::<Result<_>>()?;
    Ok((messages, seen))
}

/// A row as the run hears it.
fn inbound(run: RunId, row: &PgRow, payload: Value) -> Result<Inbound> {
    let kind: String = row.try_get("kind")?;
    Ok(match kind.as_str() {
        other if !super::known().reads(other) => {
            return Err(crate::Error::NewerRelease(format!("a message to run {run} (kind `{other}`)")));
        }
        "cancel" => cancel(&payload),
        "terminate" if row.try_get::<Option<&str>, _>("name")? == Some(TURNED_AWAY) => {
            Inbound::TurnedAway { reason: payload.as_str().unwrap_or_default().to_owned() }
        }
        "terminate" => Inbound::Terminate { reason: payload.as_str().unwrap_or_default().to_owned() },
        "unblock" => Inbound::Unblock,
        "pause" => Inbound::Pause { reason: text(&payload, "reason"), by: row.try_get("sender")? },
        "resume" => Inbound::Resume {
            reason: text(&payload, "reason"),
            by: row.try_get("sender")?,
            halted: payload.get("halted").and_then(Value::as_str).map(str::to_owned),
        },
        "child" => {
            let child: ChildResult = serde_json::from_value(payload)
                .map_err(|e| crate::Error::Invariant(format!("child message of run {run}: {e}")))?;
            Inbound::Child {
                run_id: child.run_id,
                completed: child.completed,
                cancelled: child.cancelled,
                output: child.output,
                failure: child.failure,
            }
        }
        "update" => Inbound::Update {
            n: u64::try_from(row.try_get::<i64, _>("n")?).unwrap_or(0),
            id: update_id(row.try_get::<Option<String>, _>("dedupe_id")?.as_deref().unwrap_or_default()),
            name: row.try_get("name")?,
            payload,
            sender: row.try_get("sender")?,
            at: row.try_get("sent_at")?,
        },
        "signal" => Inbound::Signal {
            n: u64::try_from(row.try_get::<i64, _>("n")?).unwrap_or(0),
            name: row.try_get("name")?,
            payload,
            sender: row.try_get("sender")?,
            at: row.try_get("sent_at")?,
        },
        other => {
            return Err(crate::Error::NewerRelease(format!("a message to run {run} (kind `{other}`)")));
        }
    })
}

/// What a cancel says: why, and perhaps by when the run is to have stopped.
pub(crate) fn cancel_text(reason: &str, until: Option<DateTime<Utc>>) -> Value {
    match until {
        Some(until) => json!({ "reason": reason, "until": until }),
        None => json!(reason),
    }
}

/// [`cancel_text`], read.
pub(super) fn cancel(payload: &Value) -> Inbound {
    let reason = payload.as_str().or_else(|| payload.get("reason")?.as_str()).unwrap_or("cancelled on request");
    let until = payload.get("until").and_then(|until| serde_json::from_value(until.clone()).ok());
    Inbound::Cancel { reason: reason.to_owned(), until }
}

/// Whether there are messages `after < n <= up_to`.
async fn left(conn: &mut PgConnection, run: RunId, after: i64, up_to: i64) -> Result<bool> {
    Ok(sqlx::query_scalar("select exists (select from inbox where shard = $1 and run_id = $2 and n > $3 and n <= $4)")
        .bind(run.shard())
        .bind(run.0)
        .bind(after)
        .bind(up_to)
        .fetch_one(conn)
        .await?)
}

/// Before the id of an update in `dedupe_id`, so that it and the id of a signal may be the same.
const UPDATE_PREFIX: &str = "update:";

/// The `dedupe_id` of an update.
pub(crate) fn update_key(id: &str) -> String {
    format!("{UPDATE_PREFIX}{id}")
}

pub(super) fn update_id(key: &str) -> String {
    key.strip_prefix(UPDATE_PREFIX).unwrap_or(key).to_owned()
}

/// [`update_sent`] of what a run before this one of its chain has answered.
pub(crate) const BEFORE: i64 = -1;

/// How many transitions a run had made when this update was sent to it; `None` if none was sent under this id, [`BEFORE`] if it
/// was to a run before.
pub(crate) async fn update_sent(conn: &mut PgConnection, run: RunId, id: &str) -> Result<Option<i64>> {
    Ok(sqlx::query_scalar(
        "select run_seq from inbox where shard = $1 and run_id = $2 and dedupe_id = $3 and kind = 'update'",
    )
    .bind(run.shard())
    .bind(run.0)
    .bind(update_key(id))
    .fetch_optional(conn)
    .await?)
}

/// Whether a run was sent a message under this sender's id.
pub(crate) async fn knows(conn: &mut PgConnection, run: RunId, dedupe_id: &str) -> Result<bool> {
    Ok(sqlx::query_scalar("select exists (select from inbox where shard = $1 and run_id = $2 and dedupe_id = $3)")
        .bind(run.shard())
        .bind(run.0)
        .bind(dedupe_id)
        .fetch_one(conn)
        .await?)
}

fn text(payload: &Value, key: &str) -> String {
    payload.get(key).and_then(Value::as_str).unwrap_or_default().to_owned()
}

/// Wakes the open runs whose attributes match, at most 10,000. Returns how many.
pub(crate) async fn unblock(conn: &mut PgConnection, attributes: &Value) -> Result<u64> {
    let runs: Vec<uuid::Uuid> = sqlx::query_scalar(
        "select run_id from runs where attributes @> $1 and closed_at is null and status <> 'quarantined' order by run_id limit 10000",
    )
    .bind(attributes)
    .fetch_all(&mut *conn)
    .await?;
    unblock_all(conn, runs).await
}

/// Wakes the oldest `limit` parked runs that wait for one of `reasons` and whose attributes match. Returns how many.
pub(crate) async fn unblock_waiting(
    conn: &mut PgConnection,
    attributes: &Value,
    reasons: &[String],
    limit: u32,
) -> Result<u64> {
    let runs: Vec<uuid::Uuid> = sqlx::query_scalar(
        "select run_id from runs where attributes @> $1 and closed_at is null and parked and waiting = any($2)
           and status <> 'quarantined' order by run_id limit $3",
    )
    .bind(attributes)
    .bind(reasons)
    .bind(i64::from(limit))
    .fetch_all(&mut *conn)
    .await?;
    unblock_all(conn, runs).await
}

/// Runs that one statement wakes. Chosen: a few milliseconds under their locks.
const UNBLOCKED_AT_ONCE: usize = 500;

static UNBLOCK: Forms = Forms::new(
    "with target as (select r.shard, r.run_id, k.payload
                     from unnest((select $1::smallint[]), (select $2::uuid[]), (select $3::jsonb[])) k(shard, run_id, payload)
                     join runs r on r.shard = k.shard and r.run_id = k.run_id/*at r*/
                     where r.closed_at is null and r.imported_at is null order by r.shard, r.run_id for no key update of r),
          u as (update runs r set inbox_n = r.inbox_n + 1 from target t where r.shard = t.shard and r.run_id = t.run_id/*at r*/
                returning r.shard, r.run_id, r.inbox_n, r.seq, r.queue, r.priority, r.lane, t.payload,
                          r.parked and r.admitted and r.status <> 'quarantined' as wakes),
          w as (insert into ready (shard, run_id, queue, priority, lane, due_at)
                  select shard, run_id, queue, priority, lane, engine_now() from u where wakes
                on conflict (shard, run_id) do update set timed = false, due_at = least(ready.due_at, excluded.due_at))
     insert into inbox (shard, run_id, n, kind, payload, run_seq) select shard, run_id, inbox_n, 'unblock', payload, seq from u",
    "$4",
);

/// [`send`] of `unblock` to many, shard by shard where runs are spread. They are locked in the order of their shards and ids, as
/// everywhere.
async fn unblock_all(conn: &mut PgConnection, runs: Vec<uuid::Uuid>) -> Result<u64> {
    let mut runs: Vec<RunId> = runs.into_iter().map(RunId).collect();
    runs.sort_unstable_by_key(|run| (run.shard(), *run));
    let spread = Spread::among(conn, &runs).await?;
    let mut woken = 0;
    for (shard, runs) in spread.divide(runs, RunId::shard) {
        for some in runs.chunks(UNBLOCKED_AT_ONCE) {
            // Sealed for each.
            let slot = Slot::Message { kind: Kind::Unblock.as_str(), name: "" };
            let payloads = some.iter().map(|run| payload::pack(*run, slot, &Value::Null, &mut Vec::new()));
            let payloads: Vec<Text> = payloads.collect::<Result<_>>()?;
            let query = sqlx::query(UNBLOCK.text(shard))
                .bind(some.iter().map(|run| run.shard()).collect::<Vec<i16>>())
                .bind(some.iter().map(|run| run.0).collect::<Vec<_>>())
                .bind(payloads.iter().map(|text| Json(&**text)).collect::<Vec<_>>());
            woken += bind_shard!(query, shard).execute(&mut *conn).await?.rows_affected();
        }
    }
    Ok(woken)
}
