//! Calls of unknown outcome, every minute: what did the provider make of them? The facts are filled in; nobody is charged.

use super::{Books, Output, asked, store};
use crate::{billing::books, provider::ProviderError};
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
        let found = account.generation(&call.provider_request_id).await;
        if let Err(error) = &found
            && refuses_all(error)
        {
            return Err(asked(error.clone()));
        }
        let mut conn = b.pool.acquire().await.map_err(|e| store(&e))?;
        done.checked += 1;
        match found {
            Ok(Some(found)) => {
                let (model, finish) = (found.model.as_deref(), found.finish_reason.as_deref());
                let filled = books::fill(&mut conn, call.id, &found.usage, model, finish).await;
                done.changed += u64::from(filled.map_err(|e| store(&e))?);
            }
            Ok(None) => books::ask_later(&mut conn, call.id).await.map_err(|e| store(&e))?,
            Err(error) => {
                // Also before the end: a call whose look-up never ends would be the first one every time.
                books::ask_later(&mut conn, call.id).await.map_err(|e| store(&e))?;
                if is_unreachable(&error) {
                    return Err(asked(error));
                }
                tracing::warn!(call = call.id, %error, "what became of a call was not told; it is asked again later");
            }
        }
    }
    Ok(done)
}

/// The key is refused or asked too often: the next call would hear the same.
fn refuses_all(error: &ProviderError) -> bool {
    matches!(error.http_status, Some(401 | 429))
}

fn is_unreachable(error: &ProviderError) -> bool {
    error.http_status.is_none() && error.failure.code == "transient.network"
}
