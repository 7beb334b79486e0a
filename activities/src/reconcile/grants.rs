//! Grants, every quarter of an hour: what is over its date goes, what the refund policy says comes.

use super::{Books, Output, ledger_failure, store};
use crate::billing::{ledger, policy};
use loopwright_engine::{Failure, transaction};
use serde_json::json;
use std::collections::BTreeSet;

/// Grants that one run ends. Chosen: far above what users lose in a quarter of an hour.
const EXPIRED_MAX: u32 = 1_000;
/// Attempts that one run gives back for.
const GIVEN_MAX: i64 = 500;
/// Runs of a user that are woken when credits came. The same as after an attempt's end.
const WOKEN_MAX: u32 = 16;

pub(super) async fn run(b: &Books) -> Result<Output, Failure> {
    let mut done = Output::default();
    // One transaction per grant: of two users' locks none is taken under the other.
    for _ in 0..EXPIRED_MAX {
        let mut tx = transaction::begin(&b.pool).await.map_err(|e| store(&e))?;
        let expired = ledger::expire(&mut tx, 1).await.map_err(|e| ledger_failure(&e))?;
        tx.commit().await.map_err(|e| store(&e))?;
        if expired == 0 {
            break;
        }
        done.changed += expired;
    }
    let mut tx = transaction::begin(&b.pool).await.map_err(|e| store(&e))?;
    let given = policy::rejected_runs(&mut tx, GIVEN_MAX).await.map_err(|e| ledger_failure(&e))?;
    tx.commit().await.map_err(|e| store(&e))?;
    done.changed += u64::try_from(given.len()).unwrap_or(u64::MAX);
    // If we die here, those that wait for credits look by themselves some minutes later.
    for user in given.into_iter().collect::<BTreeSet<_>>() {
        let whose = json!({ "user_id": user.to_string() });
        if let Err(error) = b.client.unblock_waiting(&whose, &["credits"], WOKEN_MAX).await {
            tracing::debug!(%error, %user, "runs that wait for credits were not woken; they look by themselves");
        }
    }
    Ok(done)
}
