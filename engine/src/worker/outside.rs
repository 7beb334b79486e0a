//! What an attempt has under way outside while its worker drains: a call that may be billed is heard out, and not made again by
//! somebody else.

use crate::Failure;
use std::{
    collections::BTreeSet,
    sync::{Mutex, PoisonError},
};
use tokio_util::sync::CancellationToken;

/// The calls of one attempt, announced and not closed.
#[derive(Debug)]
pub(super) struct Outside {
    /// Keys of their readings.
    open: Mutex<BTreeSet<String>>,
    /// Stops the attempt.
    stop: CancellationToken,
    /// Its worker takes nothing new.
    draining: CancellationToken,
}

impl Outside {
    pub(super) fn new(stop: CancellationToken, draining: CancellationToken) -> Self {
        Self { open: Mutex::default(), stop, draining }
    }

    /// The worker drains: the attempt stops now, or when the last of its calls is closed.
    pub(super) fn leave(&self) {
        if self.open.lock().unwrap_or_else(PoisonError::into_inner).is_empty() {
            self.stop.cancel();
        }
    }

    /// Before a call is announced.
    ///
    /// # Errors
    /// The worker drains: the next attempt makes this call.
    pub(super) fn begins(&self, key: &str) -> Result<(), Failure> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner).insert(key.to_owned());
        // Whoever drains says so before it looks for calls: either it sees this one, or this sees it.
        if self.draining.is_cancelled() {
            self.ends(key);
            return Err(Failure::cancelled());
        }
        Ok(())
    }

    /// After a call's end was stored, or its announcement was refused.
    pub(super) fn ends(&self, key: &str) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.remove(key);
        if open.is_empty() && self.draining.is_cancelled() {
            self.stop.cancel();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outside() -> (Outside, CancellationToken, CancellationToken) {
        let (stop, draining) = (CancellationToken::new(), CancellationToken::new());
        (Outside::new(stop.clone(), draining.clone()), stop, draining)
    }

    #[test]
    fn an_attempt_without_a_call_stops_when_its_worker_drains() {
        let (outside, stop, draining) = outside();
        outside.begins("a").expect("nobody drains");
        outside.ends("a");
        assert!(!stop.is_cancelled(), "nobody drains");
        draining.cancel();
        outside.leave();
        assert!(stop.is_cancelled());
    }

    #[test]
    fn the_last_call_is_heard_out_and_no_other_begins() {
        let (outside, stop, draining) = outside();
        outside.begins("a").expect("nobody drains");
        outside.begins("b").expect("nobody drains");
        draining.cancel();
        outside.leave();
        assert!(outside.begins("c").is_err() && !stop.is_cancelled(), "two are under way");
        outside.ends("a");
        assert!(!stop.is_cancelled(), "one is under way");
        outside.ends("b");
        assert!(stop.is_cancelled());
        assert!(outside.begins("d").is_err(), "it is over");
    }

    #[test]
    fn a_call_that_begins_as_the_drain_does_is_refused_and_stops_the_attempt() {
        let (outside, stop, draining) = outside();
        // Between the word and the look for calls.
        draining.cancel();
        assert!(outside.begins("a").is_err());
        assert!(stop.is_cancelled());
    }
}
