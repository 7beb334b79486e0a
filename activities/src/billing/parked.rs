//! What a step needs whose attempt was stopped in its middle: it does not start again before so much is there.
//!
//! ```text
//! open: refused ─▶ Needs::note ─▶ the attempt ends as blocked ─▶ activity_attempts.needed_ucr ─▶ start: `of_step`
//! ```
//!
//! Without it the step would start with what its plan needs, come to the same call, be refused, give back what it held, and be
//! woken by that.

use super::{
    caps::PROJECT_CAP,
    limit::LIMIT,
    returned::{BUDGET_HELD, CREDITS},
};
use loopwright_engine::hook::AttemptRef;
use sqlx::PgConnection;
use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
};
use uuid::Uuid;

/// What a step waits for while an audit has stopped its user's holds: an operator looks, and it goes on by itself.
pub(super) const REVIEW: &str = "review";

/// What a step waits for that somebody can mend.
const WORDS: [&str; 5] = [CREDITS, BUDGET_HELD, LIMIT, PROJECT_CAP, REVIEW];

/// Refusals that are kept until their attempts end, which is at once. More are of attempts that others have ended; forgetting one costs
/// an attempt in vain. Chosen.
const KEPT_MAX: usize = 4_096;

/// A need is believed for so long: prices may have fallen since, or another model serves. Chosen: one attempt in vain a day.
const BELIEVED_HOURS: i32 = 24;

/// What refused calls of attempts need that have not ended yet. The transaction of a refusal is rolled back, so it is kept here.
#[derive(Default)]
pub(super) struct Needs(Mutex<BTreeMap<Uuid, i64>>);

impl Needs {
    /// A call of an attempt was refused that needs so many micro-credits.
    pub(super) fn note(&self, attempt: Uuid, needed_ucr: i64) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() >= KEPT_MAX {
            kept.clear();
        }
        kept.insert(attempt, needed_ucr);
    }

    /// Of an attempt that ends with that failure. It stays known: the transaction may be done again.
    pub(super) fn of_end(&self, attempt: Uuid, failure: Option<&str>) -> Option<i64> {
        failure.filter(|code| WORDS.contains(code))?;
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(&attempt).copied()
    }
}

/// What the attempt before this one needed for the call that stopped it, in micro-credits.
///
/// # Transaction
/// Reads only.
pub(super) async fn of_step(conn: &mut PgConnection, attempt: &AttemptRef) -> Result<Option<i64>, sqlx::Error> {
    if attempt.attempt <= 1 {
        return Ok(None);
    }
    sqlx::query_scalar(
        "select needed_ucr from activity_attempts
         where run_id = $1 and path = $2 and attempt_no = $3 and needed_ucr is not null and ended_at > engine_now() - make_interval(hours => $4)",
    )
    .bind(attempt.run_id.0)
    .bind(&attempt.path)
    .bind(i32::try_from(attempt.attempt - 1).unwrap_or(i32::MAX))
    .bind(BELIEVED_HOURS)
    .fetch_optional(conn)
    .await
}
