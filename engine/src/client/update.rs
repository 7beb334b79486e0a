//! Updates: requests into a run that are answered.
//!
//! ```text
//! update ──▶ inbox ──read──▶ accepted ──a step takes it──▶ completed (result or failure)
//!                       └──▶ rejected                └──▶ the run closed before: failed
//! ```
//!
//! The answer is in the run's history and nowhere else: it is as durable as the run, and is found under the sender's id.

use super::{Client, Signal};
use crate::{
    Error, Failure, Result,
    event::Event,
    ids::RunId,
    store::{
        self,
        inbox::{Kind, Outgoing, Sent},
    },
    view::{Answer, RunStatus, Updated},
};
use serde_json::Value;
use sqlx::PgConnection;
use std::{sync::Arc, time::Duration};
use tokio::time::Instant;

/// Longest id of an update, in bytes. Chosen: two UUIDs and some words.
const ID_BYTES_MAX: usize = 200;

/// A request into a run.
#[derive(Clone, Debug, Default)]
pub struct Update {
    /// The `signal` of an `await`.
    pub name: String,
    /// At most 256 KiB.
    pub payload: Value,
    /// Sender's id, at most 200 bytes; without one, a new one. A second update with the same id, whatever its name and
    /// payload, is the first one.
    pub id: Option<String>,
    /// Who sent it, as `user:<id>`.
    pub sender: Option<String>,
}

impl Client {
    /// Sends an update and waits, at most `wait`, for its answer. The run reads it as it reads a signal and accepts it if it
    /// satisfies the form of an `await` of that name, else rejects it; an accepted one is kept until such a step takes it,
    /// also when it comes early. Sent again with the same id, also after the run has closed, it gives the same answer.
    ///
    /// # Errors
    /// `update_pending` when the time is over: what was sent stays sent, ask again with the same id (the message names it);
    /// `run_not_found`, `run_closed`, `run_quarantined`, `run_imported`, `too_large`, `too_deep`, `input_invalid` for a NUL. A rejection is an answer and no error.
    /// # Transaction
    /// One: a message into the inbox.
    pub async fn update(&self, run: RunId, update: Update, wait: Duration) -> Result<Updated> {
        let id = checked(update.id.clone())?;
        let Update { name, payload, sender, .. } = update;
        // No id of its own: it has another limit, above.
        let signal = Signal { name, payload, sender, dedupe_id: None };
        super::fits(&signal)?;
        let Signal { name, payload, sender, .. } = signal;
        if crate::archive::check::has_nul(&payload) || name.contains('\0') {
            return Err(Error::InputInvalid(vec![super::NUL.into()]));
        }
        let shared = Arc::new((id, name, payload, sender));
        let stored = self.once(|conn| {
            let (client, shared) = (self.clone(), shared.clone());
            Box::pin(async move {
                let (id, name, payload, sender) = &*shared;
                let update = Request { id, name, payload, sender: sender.as_deref() };
                client.send_update(conn, run, &update).await
            })
        });
        let stored = stored.await?;
        crate::committer::crash_point("updating.after_send");
        if stored {
            self.wake().await;
        }
        self.updated(run, &shared.0, wait).await
    }

    /// Stores a request that nobody has sent before. False: it is there already.
    async fn send_update(&self, conn: &mut PgConnection, run: RunId, update: &Request<'_>) -> Result<bool> {
        let key = store::inbox::update_key(update.id);
        let message = Outgoing {
            run,
            kind: Kind::Update,
            name: update.name,
            payload: update.payload,
            dedupe_id: Some(&key),
            sender: update.sender,
            definition: None,
            unread_max: Some(store::inbox::UNREAD_MAX),
        };
        let standing = store::runs::standing(conn, run).await?;
        // Nobody would read it. What was sent before may be answered.
        let sent = if standing.status == RunStatus::Quarantined && !standing.imported {
            if store::inbox::update_sent(conn, run, update.id).await?.is_none() {
                return Err(Error::RunQuarantined(run.to_string()));
            }
            Sent::Duplicate
        } else {
            store::inbox::send(conn, &message).await?
        };
        match sent {
            Sent::NoOpenRun if store::inbox::update_sent(conn, run, update.id).await?.is_none() => {
                Err(self.refusal(conn, run).await)
            }
            Sent::Full => Err(super::full(run, super::MESSAGES, store::inbox::UNREAD_MAX)),
            Sent::Stored => Ok(true),
            Sent::Duplicate | Sent::NoOpenRun => Ok(false),
        }
    }

    /// The answer to an update that was sent, waited for at most `wait`; whichever run of a chain gives it.
    ///
    /// # Errors
    /// `update_pending`; `update_not_found`; `run_not_found`.
    pub async fn updated(&self, mut run: RunId, id: &str, wait: Duration) -> Result<Updated> {
        let until = Instant::now() + wait;
        let mut after = loop {
            let asked = async |conn: &mut PgConnection| {
                Ok((store::inbox::update_sent(conn, run, id).await?, store::runs::standing(conn, run).await?))
            };
            let (sent, standing) = self.ask(asked).await?;
            run = match (sent, standing.chain.continued_from) {
                (Some(store::inbox::BEFORE), Some(before)) => before,
                (Some(seq), _) => break seq,
                (None, _) => return Err(Error::UpdateNotFound(run.to_string(), id.to_owned())),
            };
        };
        let mut why = "the run has not read it";
        loop {
            // Read before the history: what is written in between is seen at the next look.
            let newest = self.wait_change(run, 0, Duration::ZERO).await?;
            let mut next = None;
            for event in self.ask(async |conn| store::history::of_update(conn, run, id, after).await).await? {
                let event: Event = serde_json::from_value(event)
                    .map_err(|e| Error::Invariant(format!("update `{id}` of run {run}: {e}")))?;
                if matches!(event, Event::RunClosed { status: RunStatus::Continued, .. }) {
                    let standing = self.ask(async |conn| store::runs::standing(conn, run).await).await?;
                    next = standing.chain.continued_as;
                    break;
                }
                match answer(event) {
                    Some(answer) => return Ok(Updated { id: id.to_owned(), answer }),
                    None => why = "the run has accepted it, and no step has taken it",
                }
            }
            // What no step had taken is the next run's, under the same id.
            if let Some(next) = next {
                (run, after, why) = (next, 0, "the run that goes on has not read it");
                continue;
            }
            after = after.max(i64::try_from(newest).unwrap_or(i64::MAX));
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::UpdatePending { run: run.to_string(), id: id.to_owned(), why });
            }
            self.wait_change(run, newest, left).await?;
        }
    }
}

/// An update under its id.
struct Request<'a> {
    id: &'a str,
    name: &'a str,
    payload: &'a Value,
    sender: Option<&'a str>,
}

/// What one of these events answers.
fn answer(event: Event) -> Option<Answer> {
    match event {
        Event::UpdateCompleted { result: Some(result), .. } => Some(Answer::Completed { result }),
        Event::UpdateCompleted { failure: Some(failure), .. } => Some(Answer::Failed { failure }),
        Event::UpdateRejected { problems, .. } => Some(Answer::Rejected { problems }),
        Event::RunClosed { status, .. } => {
            let text = format!("the run closed as {} before a step took the update", status.as_str());
            Some(Answer::Failed { failure: Failure::permanent("update.unanswered", text) })
        }
        _ => None,
    }
}

fn checked(id: Option<String>) -> Result<String> {
    let Some(id) = id else { return Ok(uuid::Uuid::now_v7().to_string()) };
    if id.len() > ID_BYTES_MAX {
        return Err(Error::TooLarge { what: "the update's id", actual: id.len(), limit: ID_BYTES_MAX });
    }
    Ok(id.replace('\0', " "))
}
