//! Sends what the outbox holds: one message of a chat at a time, as fast as Telegram allows.
//!
//! Telegram has no idempotency keys. A row is `sending` before the request leaves, so that an unknown outcome shows as
//! one: what repeats harmlessly (edits, deletions, answers) is repeated; a message is sent twice more at most, because a
//! lost question stops a project and a doubled one only looks odd; after that it is given up as `unknown`.

use super::{
    Error,
    api::{self, Fault},
    render,
    run::Session,
};
use crate::store::telegram::{
    commit,
    outbox::{self, Outcome, Outgoing, Sending},
};
use serde_json::{Value, json};
use std::time::Duration;
use teloxide::{
    prelude::Requester,
    types::{ChatId, InputFile},
};
use tokio::{task::JoinSet, time::MissedTickBehavior};
use uuid::Uuid;

/// Messages that are sent at the same time. Chosen, not measured.
const AT_ONCE: usize = 16;
/// On top of them, answers to buttons and payments: uploads must not keep those waiting.
const URGENT: usize = 8;
/// Resends of a message whose outcome is unknown.
const RESENDS: i32 = 2;
/// Tries of what repeats harmlessly, when every outcome is unknown.
const REPEATS: i32 = 20;
/// An answer to a button or a payment that is older than this helps nobody, in seconds.
const ANSWER_AGE_MAX_S: f64 = 60.0;
/// Largest upload. Source: Bot API.
const UPLOAD_MAX: usize = 50 << 20;
/// Size of a zip file without files: its end record.
const EMPTY_ZIP: usize = 22;
const NOTHING: &str = "There is nothing to download yet: the project has no finished work.";
/// After the stop, requests under way may take this long.
const DRAIN: Duration = Duration::from_secs(5);
/// Longest error text that is kept, in characters.
const ERROR_MAX: usize = 300;

/// The method that the sender itself carries out: body `{project_id, name}`.
pub(super) const DOCUMENT: &str = "SendDocument";

/// Sends until the stop.
///
/// # Errors
/// The database, a token that is refused.
pub(super) async fn run(session: &Session) -> Result<(), Error> {
    let store = &session.parts.store;
    let pace = session.parts.pace;
    for row in store.interrupted_sending().await? {
        let outcome = unknown(session, &row, "the process ended while it was being sent".into());
        store.settle_sending(&row, &outcome).await?;
    }
    let mut ticks = tokio::time::interval(pace.overall);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut sending: JoinSet<Result<(), Error>> = JoinSet::new();
    while !session.stopped() {
        let room = |limit: usize| i64::try_from(limit.saturating_sub(sending.len())).unwrap_or(0);
        let rows = store.claim_sending(room(AT_ONCE), room(AT_ONCE + URGENT), millis(pace.chat)).await?;
        let idle = rows.is_empty();
        for row in rows {
            ticks.tick().await;
            let session = session.clone();
            sending.spawn(async move { send(&session, row).await });
        }
        while let Some(done) = sending.try_join_next() {
            ended(done)?;
        }
        if idle {
            tokio::select! {
                Some(done) = sending.join_next() => ended(done)?,
                _ = session.idle(&session.queued) => {}
            }
        }
    }
    let drain = async {
        while let Some(done) = sending.join_next().await {
            ended(done)?;
        }
        Ok(())
    };
    // What is cut here is found as `sending` by the next process.
    tokio::time::timeout(DRAIN, drain).await.unwrap_or(Ok(()))
}

fn ended(done: Result<Result<(), Error>, tokio::task::JoinError>) -> Result<(), Error> {
    done.map_err(|error| Error::Telegram(error.to_string()))?
}

async fn send(session: &Session, row: Sending) -> Result<(), Error> {
    let store = &session.parts.store;
    if row.method.starts_with("Answer") && row.age_s > ANSWER_AGE_MAX_S {
        return Ok(store.settle_sending(&row, &Outcome::Dead { error: "too late".into() }).await?);
    }
    let done = if row.method == DOCUMENT {
        match document(session, &row).await? {
            Some(done) => done,
            None => return Ok(()),
        }
    } else {
        let (method, body) = request(&row);
        api::call(&session.bot, method, body).await.map(|answer| answer["message_id"].as_i64())
    };
    let outcome = match done {
        Ok(message_id) => Outcome::Sent { message_id },
        Err(Fault::Token) => {
            let outcome = Outcome::Later { pause_ms: 0, error: "the token is refused".into() };
            store.settle_sending(&row, &outcome).await?;
            return Err(Error::Token);
        }
        Err(fault) => outcome(session, &row, fault).await?,
    };
    if let Outcome::Dead { error } | Outcome::GivenUp { error } = &outcome {
        tracing::warn!(id = row.id, method = row.method, error, "a message was not delivered");
    }
    store.settle_sending(&row, &outcome).await?;
    session.queued.notify_one();
    Ok(())
}

/// What is really called: a message that is there already is edited.
fn request(row: &Sending) -> (&str, Value) {
    let mut body = row.body.clone();
    match row.telegram_message_id {
        Some(id) if row.method == "SendMessage" => {
            body["message_id"] = json!(id);
            ("EditMessageText", body)
        }
        _ => (&row.method, body),
    }
}

async fn outcome(session: &Session, row: &Sending, fault: Fault) -> Result<Outcome, Error> {
    let again = || millis(session.parts.pace.after(row.tries.unsigned_abs()));
    let edits = row.telegram_message_id.is_some();
    Ok(match fault {
        Fault::Quiet(length) => {
            tracing::info!(chat = row.chat_id, seconds = length.as_secs(), "Telegram asks for quiet");
            Outcome::Quiet { pause_ms: millis(length) }
        }
        Fault::NotModified => Outcome::Sent { message_id: None },
        Fault::Gone if edits => Outcome::Anew,
        Fault::Gone | Fault::Late => Outcome::Dead { error: "nothing to act upon any more".into() },
        Fault::Blocked(error) if !row.method.starts_with("Send") && !edits => Outcome::Dead { error },
        Fault::Blocked(error) => {
            tracing::info!(chat = row.chat_id, "the user blocked the bot");
            session.parts.store.chat_blocked(row.chat_id).await?;
            // It waits with the rest for the user to write again.
            Outcome::Later { pause_ms: 0, error: render::cut(&error, ERROR_MAX) }
        }
        Fault::Entities if row.body.get("parse_mode").is_some() => {
            let mut body = row.body.clone();
            if let Some(fields) = body.as_object_mut() {
                fields.remove("parse_mode");
                if let Some(Value::String(text)) = fields.get_mut("text") {
                    *text = render::unformatted(text);
                }
            }
            Outcome::Instead { body }
        }
        Fault::Entities => Outcome::Dead { error: "the formatting was not understood".into() },
        Fault::NotSent(error) => Outcome::Later { pause_ms: again(), error: render::cut(&error, ERROR_MAX) },
        Fault::Unknown(error) => unknown(session, row, error),
        Fault::Token | Fault::Conflict(_) => Outcome::Later { pause_ms: again(), error: "refused for now".into() },
        Fault::Refused(error) => Outcome::Dead { error: render::cut(&error, ERROR_MAX) },
    })
}

/// It may have been done.
fn unknown(session: &Session, row: &Sending, error: String) -> Outcome {
    let harmless = row.telegram_message_id.is_some() || !row.method.starts_with("Send");
    let limit = if harmless { REPEATS } else { RESENDS };
    let error = render::cut(&error, ERROR_MAX);
    if row.unknowns < limit {
        Outcome::Unknown { pause_ms: millis(session.parts.pace.after(row.tries.unsigned_abs())), error }
    } else {
        Outcome::GivenUp { error }
    }
}

fn millis(length: Duration) -> i64 {
    i64::try_from(length.as_millis()).unwrap_or(i64::MAX)
}

/// Sends a project as a zip file. `None` if there is nothing to send: then its place is taken by a text.
async fn document(session: &Session, row: &Sending) -> Result<Option<Result<Option<i64>, Fault>>, Error> {
    let project = row.body["project_id"].as_str().and_then(|id| Uuid::parse_str(id).ok()).unwrap_or_default();
    let name = row.body["name"].as_str().unwrap_or("project").to_owned();
    let text = match session.parts.archives.zip(project).await {
        Ok(zip) if zip.len() > EMPTY_ZIP && zip.len() <= UPLOAD_MAX => {
            let file = InputFile::memory(zip).file_name(format!("{name}.zip"));
            let sent = session.bot.send_document(ChatId(row.chat_id), file).await;
            return Ok(Some(sent.map(|message| Some(i64::from(message.id.0))).map_err(|error| api::fault(&error))));
        }
        Ok(zip) if zip.len() <= EMPTY_ZIP => NOTHING.to_owned(),
        Ok(zip) => format!(
            "The archive has {} MB, and Telegram takes {} MB. Fetch it from the REST interface.",
            zip.len() >> 20,
            UPLOAD_MAX >> 20
        ),
        Err(failure) if failure.kind == loopwright_engine::failure::FailureKind::Retryable => {
            return Ok(Some(Err(Fault::NotSent(failure.message))));
        }
        Err(failure) => {
            tracing::info!(%project, code = failure.code, "no archive");
            NOTHING.to_owned()
        }
    };
    let mut tx = session.parts.store.begin().await?;
    let instead = Outgoing {
        chat_id: row.chat_id,
        dedupe_key: format!("instead:{}", row.id),
        method: "SendMessage",
        body: render::message(row.chat_id, &text, Vec::new()),
        urgent: false,
    };
    outbox::enqueue(&mut tx, &instead).await?;
    commit(tx).await?;
    session.parts.store.settle_sending(row, &Outcome::Dead { error: text }).await?;
    session.queued.notify_one();
    Ok(None)
}
