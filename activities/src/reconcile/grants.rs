//! Grants, every quarter of an hour: what is over its date goes, what the refund policy says comes, and what attempts hold that nobody
//! works on any more comes back.

use super::{Books, Output, ledger_failure, store};
use crate::billing::{hold, ledger, policy};
use loopwright_engine::{Failure, transaction};
use serde_json::json;
use std::collections::BTreeSet;

/// Grants that one run ends. Chosen: far above what users lose in a quarter of an hour.
const EXPIRED_MAX: u32 = 1_000;
/// Attempts that one run gives back for.
const GIVEN_MAX: i64 = 500;
/// Attempts that one run ends.
const ABANDONED_MAX: i64 = 500;
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
    let mut richer = BTreeSet::new();
    let mut conn = b.pool.acquire().await.map_err(|e| store(&e))?;
    let abandoned = hold::abandoned(&mut conn, ABANDONED_MAX).await.map_err(|e| store(&e))?;
    drop(conn);
    // One transaction each, as above.
    for (attempt, user) in abandoned {
        let mut tx = transaction::begin(&b.pool).await.map_err(|e| store(&e))?;
        let released = hold::release_abandoned(&mut tx, attempt, user).await.map_err(|e| ledger_failure(&e))?;
        tx.commit().await.map_err(|e| store(&e))?;
        if released {
            tracing::error!(%attempt, %user, "an attempt is long over its deadline and nobody took its run over; what it held is given back");
            richer.insert(user);
            done.changed += 1;
        }
    }
    let mut tx = transaction::begin(&b.pool).await.map_err(|e| store(&e))?;
    let given = policy::rejected_runs(&mut tx, GIVEN_MAX).await.map_err(|e| ledger_failure(&e))?;
    tx.commit().await.map_err(|e| store(&e))?;
    done.changed += u64::try_from(given.len()).unwrap_or(u64::MAX);
    // If we die here, those that wait for credits look by themselves some minutes later.
    richer.extend(given);
    for user in richer {
        let whose = json!({ "user_id": user.to_string() });
        if let Err(error) = b.client.unblock_waiting(&whose, &["credits", "budget"], WOKEN_MAX).await {
            tracing::debug!(%error, %user, "runs that wait for credits were not woken; they look by themselves");
        }
    }
    Ok(done)
}
