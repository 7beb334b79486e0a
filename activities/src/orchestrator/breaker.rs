//! Takes a provider out of service while it is unwell: after several failures in a row nobody waits for it, and one
//! call at a time finds out whether it is back.
//!
//! ```text
//! closed ──5 failures in a row──▶ open ──30 s──▶ half-open (one probe) ──success──▶ closed
//!                                   ▲                       └──failure──┘
//! ```

use loopwright_engine::Failure;
use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// Failures in a row that open it. Chosen: two calls with two tries each, and one more.
pub const FAILURES_TO_OPEN: u32 = 5;
/// How long it stays open before a probe. Chosen: outages shorter than this are cured by retries.
pub const OPEN_FOR: Duration = Duration::from_secs(30);
/// How long a refused key or an empty account keeps its provider out of service: asking again cannot help until
/// somebody acts, and a minute is soon enough to notice that.
pub const ACCOUNT_REFUSED_FOR: Duration = Duration::from_secs(60);

/// The health of one provider and key, as this process sees it.
#[derive(Debug, Default)]
pub struct Breaker(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    failures: u32,
    open_until: Option<Instant>,
    probing: bool,
    /// Why it is open, if not for failures in a row.
    because: Option<Failure>,
}

/// Whether a call may be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Permit {
    Allowed,
    /// Not now; ask again after this long.
    Refused(Duration),
    /// Not now, and this is what the provider said about the key or the account.
    AccountRefused(Failure),
}

impl Breaker {
    /// Asks for a call at `now`. Keep [`Breaker::guard`] while it runs.
    pub fn permit(&self, now: Instant) -> Permit {
        let mut state = self.lock();
        match state.open_until {
            None => Permit::Allowed,
            Some(until) if now < until => match &state.because {
                Some(failure) => Permit::AccountRefused(failure.clone()),
                None => Permit::Refused(until - now),
            },
            // Somebody is finding out already.
            Some(_) if state.probing => Permit::Refused(Duration::from_secs(1)),
            Some(_) => {
                state.probing = true;
                Permit::Allowed
            }
        }
    }
    /// The provider answered, whatever it said.
    pub fn well(&self) {
        *self.lock() = State::default();
    }
    /// The provider failed or could not be reached.
    pub fn unwell(&self, now: Instant) {
        let mut state = self.lock();
        state.failures = state.failures.saturating_add(1);
        if state.probing || state.failures >= FAILURES_TO_OPEN {
            state.open_until = Some(now + OPEN_FOR);
            state.because = None;
        }
        state.probing = false;
    }
    /// Gives a probe back when it is dropped: a call that was cancelled, or never made, says nothing.
    #[must_use]
    pub fn guard(&self) -> Guard<'_> {
        Guard(self)
    }
    /// The provider refused the key, or its account is empty: the same answer is given until somebody could have acted.
    pub fn account_refused(&self, now: Instant, failure: Failure) {
        let open_until = Some(now + ACCOUNT_REFUSED_FOR);
        *self.lock() = State { open_until, because: Some(failure), ..State::default() };
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// See [`Breaker::guard`].
pub struct Guard<'a>(&'a Breaker);

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        self.0.lock().probing = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_opens_after_failures_in_a_row_and_lets_one_probe_through() {
        let breaker = Breaker::default();
        let start = Instant::now();
        for _ in 0..FAILURES_TO_OPEN - 1 {
            breaker.unwell(start);
        }
        breaker.well();
        for _ in 0..FAILURES_TO_OPEN {
            assert_eq!(breaker.permit(start), Permit::Allowed);
            breaker.unwell(start);
        }
        assert_eq!(breaker.permit(start), Permit::Refused(OPEN_FOR));
        let later = start + OPEN_FOR;
        assert_eq!(breaker.permit(later), Permit::Allowed);
        assert!(matches!(breaker.permit(later), Permit::Refused(_)), "one probe only");
        breaker.unwell(later);
        assert_eq!(breaker.permit(later), Permit::Refused(OPEN_FOR));
        let much_later = later + OPEN_FOR;
        assert_eq!(breaker.permit(much_later), Permit::Allowed);
        drop(breaker.guard());
        assert_eq!(breaker.permit(much_later), Permit::Allowed, "a cancelled probe is given back");
        breaker.well();
        assert_eq!(breaker.permit(much_later), Permit::Allowed);
        assert_eq!(breaker.permit(much_later), Permit::Allowed);
    }

    #[test]
    fn a_refused_key_is_not_asked_again_at_once() {
        let breaker = Breaker::default();
        let start = Instant::now();
        let failure = Failure::permanent("provider.key_invalid", "x refused the key");
        breaker.account_refused(start, failure.clone());
        assert_eq!(breaker.permit(start), Permit::AccountRefused(failure));
        assert_eq!(breaker.permit(start + ACCOUNT_REFUSED_FOR), Permit::Allowed);
    }
}
