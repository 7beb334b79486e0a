//! Takes updates from Telegram and stores them. The offset moves only after the commit, and is kept nowhere: after a
//! restart Telegram gives again what was not confirmed, and the inbox knows what it has.

use super::{
    Error,
    api::{self, Fault},
    intent,
    run::{Session, pause},
};
use crate::store::telegram::lease::Lease;
use serde_json::{Value, json};
use std::time::Instant;

/// Most updates of one answer. Telegram's limit.
const BATCH: u32 = 100;
/// What is asked for; what is not named is not sent.
const KINDS: &[&str] = &["message", "edited_message", "callback_query", "pre_checkout_query"];

/// Polls until the stop.
///
/// # Errors
/// The database, the lease, a token that is refused.
pub(super) async fn run(session: &Session, lease: &mut Lease) -> Result<(), Error> {
    let pace = session.parts.pace;
    let mut stop = session.stop.clone();
    let mut offset: Option<i64> = None;
    let mut failures = 0;
    while !session.stopped() {
        lease.check().await.map_err(|_| Error::LeaseLost)?;
        let mut body = json!({"limit": BATCH, "timeout": pace.poll.as_secs(), "allowed_updates": KINDS});
        if let Some(offset) = offset {
            body["offset"] = json!(offset);
        }
        let began = Instant::now();
        let polled = tokio::select! {
            // What was on its way comes again: it is not confirmed.
            _ = stop.wait_for(|stop| *stop) => break,
            polled = api::call(&session.bot, "GetUpdates", body) => polled,
        };
        let length = match polled {
            Ok(updates) => {
                failures = 0;
                let came = updates.as_array().is_some_and(|updates| !updates.is_empty());
                let (next, new) = store(session, updates).await?;
                offset = next.or(offset);
                let waited = began.elapsed() >= pace.poll / 2;
                if new || (!came && waited) {
                    continue;
                }
                // Nothing but repeats, or a server that does not hold the question: not again at once.
                pace.look
            }
            Err(Fault::Token) => return Err(Error::Token),
            Err(Fault::Conflict(text)) => {
                failures += 1;
                tracing::warn!(text, "somebody else polls for this bot, or a webhook is set; waiting");
                pace.after(failures)
            }
            Err(Fault::Quiet(length)) => length,
            Err(fault) => {
                failures += 1;
                tracing::warn!(?fault, failures, "polling failed");
                pace.after(failures)
            }
        };
        pause(length, &mut stop).await;
    }
    Ok(())
}

/// Stores a batch. Returns the offset that confirms it, and whether something was new.
async fn store(session: &Session, updates: Value) -> Result<(Option<i64>, bool), Error> {
    let Value::Array(updates) = updates else { return Ok((None, false)) };
    let batch: Vec<_> = updates.into_iter().filter_map(intent::arrived).collect();
    let Some(last) = batch.last() else { return Ok((None, false)) };
    let new = session.parts.store.store_updates(&batch).await? > 0;
    if new {
        session.arrived.notify_one();
    }
    Ok((Some(last.update_id + 1), new))
}
