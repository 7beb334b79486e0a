//! Messages that go out.

use super::{Error, Store, Tx};
use serde_json::Value;

/// A message to write into the outbox.
#[derive(Clone, Debug)]
pub struct Outgoing {
    pub chat_id: i64,
    /// Made of identities: the same message written twice is one.
    pub dedupe_key: String,
    /// Name of the method, as in `SendMessage`.
    pub method: &'static str,
    pub body: Value,
    /// Outside the pace of the chat: no message, but the answer to a button or a payment.
    pub urgent: bool,
}

/// A message that is being sent.
#[derive(Clone, Debug)]
pub struct Sending {
    pub id: i64,
    pub chat_id: i64,
    pub method: String,
    pub body: Value,
    pub version: i32,
    /// This one included.
    pub tries: i32,
    pub unknowns: i32,
    /// It is there already: edit it.
    pub telegram_message_id: Option<i64>,
    pub age_s: f64,
}

/// How a try ended.
#[derive(Clone, Debug)]
pub enum Outcome {
    Sent {
        message_id: Option<i64>,
    },
    /// Certainly not done: again after the pause.
    Later {
        pause_ms: i64,
        error: String,
    },
    /// The chat is told to be quiet for so long.
    Quiet {
        pause_ms: i64,
    },
    /// It may have been done: again after the pause.
    Unknown {
        pause_ms: i64,
        error: String,
    },
    /// It may have been done; not again.
    GivenUp {
        error: String,
    },
    /// The message that was to be edited is gone: a new one.
    Anew,
    /// Again at once with this body.
    Instead {
        body: Value,
    },
    /// Refused for good.
    Dead {
        error: String,
    },
}

/// Puts a message into the outbox once. False if it was there before.
pub async fn enqueue(tx: &mut Tx, new: &Outgoing) -> Result<bool, Error> {
    let done = sqlx::query(
        "insert into telegram_outbox (chat_id, dedupe_key, method, body, urgent) values ($1, $2, $3, $4, $5)
         on conflict (dedupe_key) do nothing",
    )
    .bind(new.chat_id)
    .bind(&new.dedupe_key)
    .bind(new.method)
    .bind(&new.body)
    .bind(new.urgent)
    .execute(&mut **tx)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// Puts a message that changes into the outbox, or its newest text. An unchanged text changes nothing.
pub async fn replace(tx: &mut Tx, new: &Outgoing) -> Result<(), Error> {
    sqlx::query(
        "insert into telegram_outbox as o (chat_id, dedupe_key, method, body) values ($1, $2, $3, $4)
         on conflict (dedupe_key) do update set body = excluded.body, version = o.version + 1, unknowns = 0,
           tries = case when o.state in ('queued', 'sending') then o.tries else 0 end,
           queued_at = case when o.state in ('queued', 'sending') then o.queued_at else engine_now() end,
           state = case when o.state = 'sending' then o.state else 'queued' end
         where o.body is distinct from excluded.body",
    )
    .bind(new.chat_id)
    .bind(&new.dedupe_key)
    .bind(new.method)
    .bind(&new.body)
    .execute(&mut **tx)
    .await?;
    Ok(())
}

impl Store {
    /// Takes up to `limit` messages and `urgent` answers for sending. Of a chat one message at a time, its oldest, at
    /// most one per `pace_ms`.
    ///
    /// # Transaction
    /// One statement. What it returns is `sending` until [`Self::settle_sending`].
    pub async fn claim_sending(&self, limit: i64, urgent: i64, pace_ms: i64) -> Result<Vec<Sending>, Error> {
        type Row = (i64, i64, String, Value, i32, i32, i32, Option<i64>, f64);
        let rows: Vec<Row> = sqlx::query_as(
            "with heads as (
               select distinct on (o.chat_id) o.id, o.queued_at, o.not_before, o.state from telegram_outbox o
               where o.state in ('queued', 'sending') and not o.urgent
               order by o.chat_id, o.state = 'sending' desc, o.queued_at, o.id),
             due as (
               (select h.id from heads h join telegram_outbox o on o.id = h.id
                 join telegram_chats c on c.chat_id = o.chat_id
               where h.state = 'queued' and h.not_before <= engine_now() and c.next_send_at <= engine_now()
                 and c.blocked_at is null
               order by h.queued_at limit $1)
               union all
               (select id from telegram_outbox
               where state = 'queued' and urgent and not_before <= engine_now() order by queued_at limit $3)),
             claimed as (
               update telegram_outbox o set state = 'sending', tries = o.tries + 1
               where o.id in (select id from due) and o.state = 'queued'
               returning o.*),
             paced as (
               update telegram_chats set next_send_at = engine_now() + make_interval(secs => $2 / 1000.0)
               where chat_id in (select chat_id from claimed where not urgent))
             select id, chat_id, method, body, version, tries, unknowns, telegram_message_id,
                    extract(epoch from engine_now() - queued_at)::float8 from claimed order by queued_at",
        )
        .bind(limit)
        .bind(pace_ms)
        .bind(urgent)
        .fetch_all(&self.pool)
        .await?;
        let sending = |(id, chat_id, method, body, version, tries, unknowns, telegram_message_id, age_s): Row| {
            Sending { id, chat_id, method, body, version, tries, unknowns, telegram_message_id, age_s }
        };
        Ok(rows.into_iter().map(sending).collect())
    }

    /// Writes down how a try ended. A row whose text changed meanwhile is queued again.
    ///
    /// # Transaction
    /// One statement, guarded by `sending`.
    pub async fn settle_sending(&self, sending: &Sending, outcome: &Outcome) -> Result<(), Error> {
        let (state, pause, error) = match outcome {
            Outcome::Sent { .. } => ("sent", 0, None),
            Outcome::Later { pause_ms, error } | Outcome::Unknown { pause_ms, error } => {
                ("queued", *pause_ms, Some(error.as_str()))
            }
            Outcome::Quiet { pause_ms } => ("queued", *pause_ms, None),
            Outcome::Anew | Outcome::Instead { .. } => ("queued", 0, None),
            Outcome::GivenUp { error } => ("unknown", 0, Some(error.as_str())),
            Outcome::Dead { error } => ("dead", 0, Some(error.as_str())),
        };
        let message = match outcome {
            Outcome::Sent { message_id } => *message_id,
            _ => None,
        };
        let body = match outcome {
            Outcome::Instead { body } => Some(body),
            _ => None,
        };
        sqlx::query(
            "with settled as (
               update telegram_outbox o set
                 state = case when $3 in ('sent', 'unknown') and o.version > $2 then 'queued' else $3 end,
                 queued_at = case when $3 in ('sent', 'unknown') then engine_now() else o.queued_at end,
                 not_before = engine_now() + make_interval(secs => $4 / 1000.0),
                 telegram_message_id = case when $6 then null else coalesce($5, o.telegram_message_id) end,
                 body = case when o.version = $2 then coalesce($7, o.body) else o.body end,
                 tries = case when $3 = 'sent' then 0 when $8 then o.tries - 1 else o.tries end,
                 unknowns = case when $3 = 'sent' then 0 when $9 then o.unknowns + 1 else o.unknowns end,
                 error = $10
               where o.id = $1 and o.state = 'sending' returning o.chat_id)
             update telegram_chats c set next_send_at = engine_now() + make_interval(secs => $4 / 1000.0)
             from settled where $8 and c.chat_id = settled.chat_id",
        )
        .bind(sending.id)
        .bind(sending.version)
        .bind(state)
        .bind(pause)
        .bind(message)
        .bind(matches!(outcome, Outcome::Anew))
        .bind(body)
        .bind(matches!(outcome, Outcome::Quiet { .. }))
        .bind(matches!(outcome, Outcome::Unknown { .. } | Outcome::GivenUp { .. }))
        .bind(error)
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// What a process that died was sending. Call it while nobody sends.
    pub async fn interrupted_sending(&self) -> Result<Vec<Sending>, Error> {
        type Row = (i64, i64, String, Value, i32, i32, i32, Option<i64>);
        let rows: Vec<Row> = sqlx::query_as(
            "select id, chat_id, method, body, version, tries, unknowns, telegram_message_id from telegram_outbox
             where state = 'sending' order by id",
        )
        .fetch_all(&self.pool)
        .await?;
        let sending = |(id, chat_id, method, body, version, tries, unknowns, telegram_message_id): Row| Sending {
            id,
            chat_id,
            method,
            body,
            version,
            tries,
            unknowns,
            telegram_message_id,
            age_s: 0.0,
        };
        Ok(rows.into_iter().map(sending).collect())
    }

    /// The user blocked the bot: nothing is sent to the chat until he writes again.
    pub async fn chat_blocked(&self, chat_id: i64) -> Result<(), Error> {
        sqlx::query("update telegram_chats set blocked_at = engine_now() where chat_id = $1 and blocked_at is null")
            .bind(chat_id)
            .execute(&self.pool)
            .await?;
        Ok(())
    }

    /// Removes messages and buttons that are older than `days` and finished.
    pub async fn forget_messages(&self, days: i32) -> Result<(), Error> {
        for sql in [
            "delete from telegram_outbox where created_at < engine_now() - make_interval(days => $1)
               and state in ('sent', 'dead', 'unknown')",
            "delete from telegram_buttons where created_at < engine_now() - make_interval(days => $1)",
        ] {
            sqlx::query(sql).bind(days).execute(&self.pool).await?;
        }
        Ok(())
    }
}
