//! Table `history`: reading. Writing is [`super::transitions`]' and, for what did not happen here, [`super::forks`]' and
//! [`super::archive`]'s.

use crate::{Result, ids::RunId, view::HistoryRow};
use serde_json::Value;
use sqlx::{PgConnection, PgPool, Row};

/// Rows with `seq > after`, in order; those that a fork shares come from its parent, and its parent's parent.
pub(crate) async fn page(pool: &PgPool, run: RunId, after: u64, limit: u32) -> Result<Vec<HistoryRow>> {
    let mut conn = pool.acquire().await?;
    page_in(&mut conn, run, after, limit).await
}

pub(crate) async fn page_in(conn: &mut PgConnection, run: RunId, after: u64, limit: u32) -> Result<Vec<HistoryRow>> {
    // Each run of the line gives its own part; the limit inside keeps a long history from being read for one page.
    let rows = sqlx::query(
        "with recursive line as (
           select shard, run_id, forked_shard, forked_from, coalesce(forked_seq, 0) as above, 9223372036854775807 as upto
           from runs where shard = $1 and run_id = $2
           union all
           select p.shard, p.run_id, p.forked_shard, p.forked_from, coalesce(p.forked_seq, 0), least(l.upto, l.above)
           from line l join runs p on p.shard = l.forked_shard and p.run_id = l.forked_from where l.above > $3)
         select h.seq, h.epoch, h.format, h.events, h.at from line l
         cross join lateral (select * from history h where h.shard = l.shard and h.run_id = l.run_id
                               and h.seq > greatest(l.above, $3) and h.seq <= l.upto order by h.seq limit $4) h
         order by h.seq limit $4",
    )
    .bind(run.shard())
    .bind(run.0)
    .bind(i64::try_from(after).unwrap_or(i64::MAX))
    .bind(i64::from(limit.clamp(1, 1000)))
    .fetch_all(conn)
    .await?;
    rows.into_iter()
        .map(|row| {
            Ok(HistoryRow {
                seq: u64::try_from(row.try_get::<i64, _>("seq")?).unwrap_or(0),
                epoch: u64::try_from(row.try_get::<i64, _>("epoch")?).unwrap_or(0),
                format: u16::try_from(row.try_get::<i16, _>("format")?).unwrap_or(0),
                events: match row.try_get::<Value, _>("events")? {
                    Value::Array(events) => events,
                    other => vec![other],
                },
                at: row.try_get("at")?,
            })
        })
        .collect()
}

/// What a history says about an update: the events that name its id, and the end of the run; in order. Of a fork, its own
/// rows only: updates to its parent are the parent's.
pub(crate) async fn of_update(pool: &PgPool, run: RunId, id: &str, after: i64) -> Result<Vec<Value>> {
    Ok(sqlx::query_scalar(
        "select e from history h cross join lateral jsonb_array_elements(h.events) with ordinality e(e, i)
         where h.shard = $1 and h.run_id = $2 and h.seq > $3
           and (e->>'type' = 'run_closed'
                or (e->>'type' in ('update_accepted', 'update_rejected', 'update_completed') and e->>'id' = $4))
         order by h.seq, i limit 3",
    )
    .bind(run.shard())
    .bind(run.0)
    .bind(after)
    .bind(id)
    .fetch_all(pool)
    .await?)
}
