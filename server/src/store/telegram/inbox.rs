//! Updates as they came.

use super::{Error, Store, Tx};
use chrono::{DateTime, Utc};
use serde_json::Value;

/// An update to store.
#[derive(Clone, Debug)]
pub struct Arrived {
    pub update_id: i64,
    pub chat_id: Option<i64>,
    pub urgent: bool,
    /// Without secrets.
    pub raw: Value,
    /// Something was cut out of it.
    pub redacted: bool,
}

/// An update to act upon.
#[derive(Clone, Debug)]
pub struct Stored {
    pub update_id: i64,
    pub raw: Value,
    pub redacted: bool,
    /// Tries so far.
    pub tries: i32,
    pub received_at: DateTime<Utc>,
}

impl Store {
    /// Stores what is new of a batch, in its order. Returns how many were new.
    ///
    /// # Transaction
    /// One; idempotent by update id.
    pub async fn store_updates(&self, batch: &[Arrived]) -> Result<u64, Error> {
        let mut tx = self.begin().await?;
        let mut new = 0;
        for update in batch {
            new += sqlx::query(
                "insert into telegram_inbox (update_id, chat_id, urgent, raw, redacted) values ($1, $2, $3, $4, $5)
                 on conflict (update_id) do nothing",
            )
            .bind(update.update_id)
            .bind(update.chat_id)
            .bind(update.urgent)
            .bind(&update.raw)
            .bind(update.redacted)
            .execute(&mut *tx)
            .await?
            .rows_affected();
        }
        tx.commit().await?;
        Ok(new)
    }

    /// Removes what was processed more than `days` ago. Telegram repeats nothing older than a day.
    pub async fn forget_updates(&self, days: i32) -> Result<u64, Error> {
        let sql = "delete from telegram_inbox where processed_at < engine_now() - make_interval(days => $1)";
        Ok(sqlx::query(sql).bind(days).execute(&self.pool).await?.rows_affected())
    }

    /// Notes that a try failed; the next one is after `pause_ms`. Without a pause it was the last.
    pub async fn update_failed(&self, update_id: i64, error: &str, pause_ms: Option<i64>) -> Result<(), Error> {
        sqlx::query(
            "update telegram_inbox set tries = tries + 1, error = $2,
               not_before = engine_now() + make_interval(secs => coalesce($3, 0) / 1000.0),
               processed_at = case when $3 is null then engine_now() end
             where update_id = $1 and processed_at is null",
        )
        .bind(update_id)
        .bind(error)
        .bind(pause_ms)
        .execute(&self.pool)
        .await?;
        Ok(())
    }
}

/// The next update to act upon, locked: urgent ones first, then by arrival; of a chat only its oldest.
pub async fn next(tx: &mut Tx) -> Result<Option<Stored>, Error> {
    type Row = (i64, Value, bool, i32, DateTime<Utc>);
    let row: Option<Row> = sqlx::query_as(
        "select u.update_id, u.raw, u.redacted, u.tries, u.received_at from telegram_inbox u
         where u.processed_at is null and u.not_before <= engine_now()
           and (u.urgent or u.chat_id is null or not exists (select from telegram_inbox o
                where o.processed_at is null and o.chat_id = u.chat_id and not o.urgent and o.n < u.n))
         order by u.urgent desc, u.n limit 1 for update of u skip locked",
    )
    .fetch_optional(&mut **tx)
    .await?;
    Ok(row.map(|(update_id, raw, redacted, tries, received_at)| Stored {
        update_id,
        raw,
        redacted,
        tries,
        received_at,
    }))
}

/// Marks an update as acted upon.
pub async fn processed(tx: &mut Tx, update_id: i64) -> Result<(), Error> {
    sqlx::query("update telegram_inbox set processed_at = engine_now(), error = null where update_id = $1")
        .bind(update_id)
        .execute(&mut **tx)
        .await?;
    Ok(())
}
