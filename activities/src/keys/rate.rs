//! Budgets per minute that all workers share: a worker takes a slice, spends it by itself, and takes another.
//!
//! A lease counts against the budget until a window after its end, so no window of 60 seconds holds more than the budget,
//! whoever dies when. A dead worker's slice is free again when its window has passed. Nothing that is read often is
//! written: a slice is a twentieth of the budget, so a scope sees about twenty leases in a window, and one refusal for
//! each worker and wait.
//!
//! The oldest need that was refused is noted: smaller ones leave it its room until it is served, or until a quarter of a
//! window after it was told to come back. So a large prompt is not starved by small ones.

use sqlx::PgPool;
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

/// What "per minute" means.
pub const WINDOW: Duration = Duration::from_secs(60);
/// A lease is spent within this part of a window: the longer, the fewer leases; the shorter, the less waits beyond the
/// window. A twelfth costs 8 % of the budget at most.
const TTL_DIVISOR: u32 = 12;
/// Part of the budget that one lease takes, unless a call needs more.
const SLICE_DIVISOR: u64 = 20;
/// Scopes that are remembered; models times keys, far fewer in practice.
const SCOPES_MAX: usize = 4_096;

/// The leases of this process. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Rates {
    pool: PgPool,
    window: Duration,
    scopes: Arc<Mutex<HashMap<String, Arc<tokio::sync::Mutex<Held>>>>>,
}

#[derive(Debug, Default)]
struct Held {
    lease: Option<Lease>,
    /// What was refused last, and until when asking again is useless.
    refused: Option<(u64, Instant)>,
}

#[derive(Debug)]
struct Lease {
    id: i64,
    left: u64,
    until: Instant,
}

/// A part of a budget that a call may spend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    pub scope: String,
    lease: i64,
    amount: u64,
}

/// Whether a call fits into the budget.
#[derive(Debug, PartialEq, Eq)]
pub enum Taken {
    Granted(Grant),
    /// Not now; ask again after this long.
    Wait(Duration),
}

impl Rates {
    /// Budgets per `window`, [`WINDOW`] in production.
    #[must_use]
    pub fn new(pool: PgPool, window: Duration) -> Self {
        Self { pool, window, scopes: Arc::default() }
    }

    /// Takes `need` of `budget` per window. A call that is larger than the whole budget takes all of it.
    ///
    /// # Errors
    /// The database's.
    /// # Transaction
    /// None while the slice at hand suffices; otherwise one statement, alone in its scope.
    pub async fn take(&self, scope: &str, budget: u64, need: u64) -> Result<Taken, sqlx::Error> {
        let need = need.clamp(1, budget.max(1));
        let held = self.held(scope);
        // One question at a time: the others of this process spend from its answer.
        let mut held = held.lock().await;
        let now = Instant::now();
        if let Some(lease) = held.lease.as_mut().filter(|lease| now < lease.until && lease.left >= need) {
            lease.left -= need;
            return Ok(Taken::Granted(Grant { scope: scope.to_owned(), lease: lease.id, amount: need }));
        }
        if let Some((refused, until)) = held.refused
            && need >= refused
            && now < until
        {
            return Ok(Taken::Wait(until - now));
        }
        let back = held.lease.take().filter(|lease| lease.left > 0);
        let ttl = self.window / TTL_DIVISOR;
        let (id, granted, wait_ms): (i64, i64, i64) =
            sqlx::query_as("select lease_id, granted, wait_ms from rate_lease($1, $2, $3, $4, $5 * interval '1 ms', $6 * interval '1 ms', $7, $8)")
                .bind(scope)
                .bind(whole(budget))
                .bind(whole((budget / SLICE_DIVISOR).max(1)))
                .bind(whole(need))
                .bind(self.window.as_millis() as f64)
                .bind(ttl.as_millis() as f64)
                .bind(back.as_ref().map(|lease| lease.id))
                .bind(whole(back.as_ref().map_or(0, |lease| lease.left)))
                .fetch_one(&self.pool)
                .await?;
        let granted = u64::try_from(granted).unwrap_or(0);
        if granted < need {
            let wait = Duration::from_millis(u64::try_from(wait_ms).unwrap_or(1));
            held.refused = Some((need, now + wait));
            return Ok(Taken::Wait(wait));
        }
        held.refused = None;
        // From before the question: the database's end of the lease is later than ours.
        held.lease = Some(Lease { id, left: granted - need, until: now + ttl });
        Ok(Taken::Granted(Grant { scope: scope.to_owned(), lease: id, amount: need }))
    }

    /// Gives back what of a grant was not spent, while its lease lasts; later it is lost with the window.
    pub async fn give_back(&self, grant: &Grant, spent: u64) {
        let held = self.held(&grant.scope);
        let mut held = held.lock().await;
        if let Some(lease) = held.lease.as_mut().filter(|lease| lease.id == grant.lease) {
            lease.left += grant.amount.saturating_sub(spent);
        }
    }

    fn held(&self, scope: &str) -> Arc<tokio::sync::Mutex<Held>> {
        let mut scopes = self.scopes.lock().unwrap_or_else(PoisonError::into_inner);
        if scopes.len() >= SCOPES_MAX && !scopes.contains_key(scope) {
            // What is forgotten is only lost to its window.
            scopes.clear();
        }
        Arc::clone(scopes.entry(scope.to_owned()).or_default())
    }
}

fn whole(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}
