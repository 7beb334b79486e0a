//! Takes a provider out of service while it is unwell: after several failures in a row nobody waits for it, and one
//! call at a time finds out whether it is back.
//!
//! ```text
//! closed ──5 failures in a row──▶ open ──30 s──▶ half-open (one probe) ──success──▶ closed
//!                                   ▲                       └──failure──┘
//! ```

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// Failures in a row that open it. Chosen: two calls with two tries each, and one more.
pub const FAILURES_TO_OPEN: u32 = 5;
/// How long it stays open before a probe. Chosen: outages shorter than this are cured by retries.
pub const OPEN_FOR: Duration = Duration::from_secs(30);

/// The health of one provider and key, as this process sees it.
#[derive(Debug, Default)]
pub struct Breaker(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    failures: u32,
    open_until: Option<Instant>,
    probing: bool,
}

/// Whether a call may be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Permit {
    /// With `probe`, this one call finds out for all: give it back if it says nothing ([`Breaker::give_back`]).
    Allowed { probe: bool },
    /// Not now; ask again after this long.
    Refused(Duration),
}

impl Breaker {
    /// Asks for a call at `now`.
    pub fn permit(&self, now: Instant) -> Permit {
        let mut state = self.lock();
        match state.open_until {
            None => Permit::Allowed { probe: false },
            Some(until) if now < until => Permit::Refused(until - now),
            // Somebody is finding out already.
            Some(_) if state.probing => Permit::Refused(Duration::from_secs(1)),
            Some(_) => {
                state.probing = true;
                Permit::Allowed { probe: true }
            }
        }
    }
    /// Whether calls pass without being a probe.
    pub fn is_closed(&self) -> bool {
        self.lock().open_until.is_none()
    }
    /// The provider answered, whatever it said.
    pub fn well(&self) {
        *self.lock() = State::default();
    }
    /// The provider failed or could not be reached. Of a call that began before it opened, this says nothing new.
    pub fn unwell(&self, now: Instant, probe: bool) {
        self.unwell_for(now, probe, OPEN_FOR);
    }
    /// As [`Breaker::unwell`], open for that long if it opens.
    pub fn unwell_for(&self, now: Instant, probe: bool, open_for: Duration) {
        let mut state = self.lock();
        state.failures = state.failures.saturating_add(1);
        if probe || (state.open_until.is_none() && state.failures >= FAILURES_TO_OPEN) {
            state.open_until = Some(now + open_for);
            state.probing = false;
        }
    }
    /// Gives a probe back: a call that was cancelled, or never made, says nothing.
    pub fn give_back(&self) {
        self.lock().probing = false;
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALLOWED: Permit = Permit::Allowed { probe: false };
    const PROBE: Permit = Permit::Allowed { probe: true };

    #[test]
    fn it_opens_after_failures_in_a_row_and_lets_one_probe_through() {
        let breaker = Breaker::default();
        let start = Instant::now();
        for _ in 0..FAILURES_TO_OPEN - 1 {
            breaker.unwell(start, false);
        }
        breaker.well();
        for _ in 0..FAILURES_TO_OPEN {
            assert_eq!(breaker.permit(start), ALLOWED);
            breaker.unwell(start, false);
        }
        assert!(!breaker.is_closed());
        assert_eq!(breaker.permit(start), Permit::Refused(OPEN_FOR));
        let later = start + OPEN_FOR;
        assert_eq!(breaker.permit(later), PROBE);
        assert!(matches!(breaker.permit(later), Permit::Refused(_)), "one probe only");
        breaker.unwell(later, true);
        assert_eq!(breaker.permit(later), Permit::Refused(OPEN_FOR));
        let much_later = later + OPEN_FOR;
        assert_eq!(breaker.permit(much_later), PROBE);
        breaker.give_back();
        assert_eq!(breaker.permit(much_later), PROBE, "a cancelled probe is given back");
        breaker.well();
        assert_eq!(breaker.permit(much_later), ALLOWED);
        assert_eq!(breaker.permit(much_later), ALLOWED);
    }

    #[test]
    fn a_call_from_before_neither_prolongs_it_nor_lets_a_second_probe_through() {
        let breaker = Breaker::default();
        let start = Instant::now();
        for _ in 0..FAILURES_TO_OPEN {
            breaker.unwell(start, false);
        }
        let later = start + OPEN_FOR;
        breaker.unwell(later, false);
        assert_eq!(breaker.permit(later), PROBE);
        breaker.unwell(later, false);
        assert!(matches!(breaker.permit(later), Permit::Refused(_)));
    }
}
