//! Calls of unknown outcome, every minute: what did the provider make of them? The facts are filled in; nobody is charged.

use super::{Books, Output, asked, store};
use crate::billing::books;
use loopwright_engine::Failure;

/// Calls that one run asks about. Chosen: a minute's worth at a few a second.
const CALLS_MAX: i64 = 100;

pub(super) async fn run(b: &Books) -> Result<Output, Failure> {
    let Some(account) = &b.openrouter else { return Ok(Output::skipped("OpenRouter is not configured")) };
    let mut conn = b.pool.acquire().await.map_err(|e| store(&e))?;
    let due = books::unknown_calls(&mut conn, "openrouter", CALLS_MAX).await.map_err(|e| store(&e))?;
    drop(conn);
    let mut done = Output::default();
    for call in due {
        // No connection is held while the provider is asked.
        let found = account.generation(&call.provider_request_id).await.map_err(asked)?;
        let mut conn = b.pool.acquire().await.map_err(|e| store(&e))?;
        done.checked += 1;
        match found {
            Some(found) => {
                let (model, finish) = (found.model.as_deref(), found.finish_reason.as_deref());
                let filled = books::fill(&mut conn, call.id, &found.usage, model, finish).await;
                done.changed += u64::from(filled.map_err(|e| store(&e))?);
            }
            None => books::ask_later(&mut conn, call.id).await.map_err(|e| store(&e))?,
        }
    }
    Ok(done)
}
