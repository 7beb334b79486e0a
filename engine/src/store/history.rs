//! Table `history`: reading. Writing is [`super::transitions`]' and, for what did not happen here, [`super::forks`]' and
//! [`super::archive`]'s.

use crate::{
    Result,
    event::{APART, Event, format_of},
    ids::RunId,
    payload::{self, Slot},
    view::HistoryRow,
};
use serde_json::{Value, value::RawValue};
use sqlx::{PgConnection, PgPool, Row, postgres::PgRow, types::Json};

/// Rows read at once where few are expected.
const ROWS: i64 = 100;

/// Rows with `seq > after`, in order; those that a fork shares come from its parent, and its parent's parent.
pub(crate) async fn page(conn: &mut PgConnection, run: RunId, after: u64, limit: u32) -> Result<Vec<HistoryRow>> {
    // Each run of the line gives its own part; the limit inside keeps a long history from being read for one page.
    let rows = sqlx::query(
        "with recursive line as (
           select shard, run_id, forked_shard, forked_from, coalesce(forked_seq, 0) as above, 9223372036854775807 as upto
           from runs where shard = $1 and run_id = $2
           union all
           select p.shard, p.run_id, p.forked_shard, p.forked_from, coalesce(p.forked_seq, 0), least(l.upto, l.above)
           from line l join runs p on p.shard = l.forked_shard and p.run_id = l.forked_from where l.above > $3)
         select h.run_id, h.seq, h.epoch, h.format, h.events, h.at from line l
         cross join lateral (select * from history h where h.shard = l.shard and h.run_id = l.run_id
                               and h.seq > greatest(l.above, $3) and h.seq <= l.upto order by h.seq limit $4) h
         order by h.seq limit $4",
    )
    .bind(run.shard())
    .bind(run.0)
    .bind(i64::try_from(after).unwrap_or(i64::MAX))
    .bind(i64::from(limit.clamp(1, 1000)))
    .fetch_all(&mut *conn)
    .await?;
    let mut page = Vec::with_capacity(rows.len());
    for row in &rows {
        let seq: i64 = row.try_get("seq")?;
        let events = events_of(conn, RunId(row.try_get("run_id")?), seq, row).await?;
        page.push(HistoryRow {
            seq: u64::try_from(seq).unwrap_or(0),
            epoch: u64::try_from(row.try_get::<i64, _>("epoch")?).unwrap_or(0),
            format: match u16::try_from(row.try_get::<i16, _>("format")?).unwrap_or(0) {
                APART => vocabulary(&events),
                format => format,
            },
            events,
            at: row.try_get("at")?,
        });
    }
    Ok(page)
}

/// The number that says what is needed to read these events.
fn vocabulary(events: &[Value]) -> u16 {
    let known = events.iter().map(|event| serde_json::from_value::<Event>(event.clone()).map(|e| format_of(&[e])));
    known.map(|format| format.unwrap_or(APART)).max().unwrap_or(1)
}

/// Whether a run's transition is the one that `epoch` has sent with these events, as they are stored.
pub(crate) async fn is_there(
    conn: &mut PgConnection,
    run: RunId,
    seq: i64,
    epoch: i64,
    events: &RawValue,
) -> Result<bool> {
    let same: Option<bool> = sqlx::query_scalar(
        "select events = $5 and epoch = $4 from history where shard = $1 and run_id = $2 and seq = $3",
    )
    .bind(run.shard())
    .bind(run.0)
    .bind(seq)
    .bind(epoch)
    .bind(Json(events))
    .fetch_optional(conn)
    .await?;
    Ok(same == Some(true))
}

/// The events of a row, which lies with the run that made it.
pub(super) async fn events_of(conn: &mut PgConnection, run: RunId, seq: i64, row: &PgRow) -> Result<Vec<Value>> {
    Ok(match payload::read(conn, run, Slot::Events { seq }, row.try_get("events")?).await? {
        Value::Array(events) => events,
        other => vec![other],
    })
}

/// What a history says about an update: the events that name its id, and the end of the run; in order. Of a fork, its own
/// rows only: updates to its parent are the parent's.
pub(crate) async fn of_update(pool: &PgPool, run: RunId, id: &str, after: i64) -> Result<Vec<Value>> {
    let says = |e: &Value| match e["type"].as_str() {
        Some("run_closed") => true,
        Some("update_accepted" | "update_rejected" | "update_completed") => e["id"] == id,
        _ => false,
    };
    let (mut conn, mut found, mut after) = (pool.acquire().await?, Vec::new(), after);
    loop {
        // Into what is sealed only we can look.
        let rows = sqlx::query(
            "select h.seq, h.events from history h where h.shard = $1 and h.run_id = $2 and h.seq > $3
               and case when jsonb_typeof(h.events) <> 'array' then true else exists (
                 select from jsonb_array_elements(h.events) e(e) where e->>'type' = 'run_closed'
                   or (e->>'type' in ('update_accepted', 'update_rejected', 'update_completed') and e->>'id' = $4)) end
             order by h.seq limit $5",
        )
        .bind(run.shard())
        .bind(run.0)
        .bind(after)
        .bind(id)
        .bind(ROWS)
        .fetch_all(&mut *conn)
        .await?;
        for row in &rows {
            after = row.try_get("seq")?;
            found.extend(events_of(&mut conn, run, after, row).await?.into_iter().filter(says));
        }
        // Accepted, answered, closed.
        if found.len() >= 3 || rows.len() < usize::try_from(ROWS).unwrap_or(0) {
            return Ok(found);
        }
    }
}
