//! Table `history`: reading. Writing is [`super::transitions`]' alone.

use crate::{Result, ids::RunId, view::HistoryRow};
use serde_json::Value;
use sqlx::{PgPool, Row};

pub(crate) async fn page(pool: &PgPool, run: RunId, after: u64, limit: u32) -> Result<Vec<HistoryRow>> {
    let rows = sqlx::query(
        "select seq, epoch, format, events, at from history where shard = $1 and run_id = $2 and seq > $3 order by seq limit $4",
    )
    .bind(run.shard())
    .bind(run.0)
    .bind(i64::try_from(after).unwrap_or(i64::MAX))
    .bind(i64::from(limit.clamp(1, 1000)))
    .fetch_all(pool)
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
