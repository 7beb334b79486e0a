//! Calls of unknown outcome and of doubted cost, every minute: what did the provider make of them? The facts are filled in; nobody is
//! charged.

use super::{Books, Output, asked, store};
use crate::{
    billing::{books, doubt},
    provider::{ProviderError, account::AccountKey},
};
use loopwright_engine::{Failure, transaction};
use std::collections::BTreeSet;

/// Calls that one run asks about. Chosen: a minute's worth at a few a second.
const CALLS_MAX: i64 = 100;

pub(super) async fn run(b: &Books) -> Result<Output, Failure> {
    let skipped = || Ok(Output::skipped("OpenRouter is not configured"));
    let Some(account) = &b.openrouter else { return skipped() };
    let keys = account.keys().await;
    if keys.is_empty() {
        return skipped();
    }
    let mut conn = b.pool.acquire().await.map_err(|e| store(&e))?;
    let unknown = books::unknown_calls(&mut conn, "openrouter", CALLS_MAX).await.map_err(|e| store(&e))?;
    let doubted = books::doubted_calls(&mut conn, "openrouter", CALLS_MAX).await.map_err(|e| store(&e))?;
    let due = unknown.into_iter().map(|call| (call, false)).chain(doubted.into_iter().map(|call| (call, true)));
    drop(conn);
    let mut done = Output::default();
    let mut refused = BTreeSet::new();
    let mut last = None;
    for (call, is_doubted) in due {
        let Some(key) = key_of(&keys, &call.fingerprint) else { continue };
        if refused.contains(key.fingerprint()) {
            // As if it had been asked: else the oldest calls of a dead key would be the page of every minute.
            let mut conn = b.pool.acquire().await.map_err(|e| store(&e))?;
            books::ask_later(&mut conn, call.id).await.map_err(|e| store(&e))?;
            continue;
        }
        // No connection is held while the provider is asked.
        let found = account.generation(key, &call.provider_request_id).await;
        let mut conn = b.pool.acquire().await.map_err(|e| store(&e))?;
        if let Err(error) = &found
            && refuses_all(error)
        {
            tracing::warn!(ends_in = key.last4(), %error, "calls of a key are not looked up now");
            refused.insert(key.fingerprint().to_owned());
            last = Some(error.clone());
            books::ask_later(&mut conn, call.id).await.map_err(|e| store(&e))?;
            continue;
        }
        done.checked += 1;
        match found {
            Ok(Some(found)) if is_doubted => {
                drop(conn);
                let mut tx = transaction::begin(&b.pool).await.map_err(|e| store(&e))?;
                let believed = doubt::asked_again(&mut tx, call.id, &found.usage).await.map_err(|e| store(&e))?;
                if !believed {
                    books::ask_later(&mut tx, call.id).await.map_err(|e| store(&e))?;
                }
                tx.commit().await.map_err(|e| store(&e))?;
                done.changed += u64::from(believed);
            }
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
    // Another key may have been answered.
    match last {
        Some(error) if done.checked == 0 => Err(asked(error)),
        _ => Ok(done),
    }
}

/// The key that made a call: others may belong to another account, which does not know it. One that is not here any more is
/// stood in for by the first.
fn key_of<'a>(keys: &'a [AccountKey], fingerprint: &str) -> Option<&'a AccountKey> {
    keys.iter().find(|key| key.fingerprint() == fingerprint).or(keys.first())
}

/// The key is refused or asked too often: the next call would hear the same.
fn refuses_all(error: &ProviderError) -> bool {
    matches!(error.http_status, Some(401 | 429))
}

fn is_unreachable(error: &ProviderError) -> bool {
    error.http_status.is_none() && error.failure.code == "transient.network"
}
