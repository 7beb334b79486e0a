//! The keys of one provider: which of them serves the next call.

use super::breaker::{Breaker, Permit};
use crate::{
    keys::{Board, FORBIDDEN, KeyRef, Standing},
    provider::Provider,
};
use loopwright_engine::Failure;
use std::{
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};
use uuid::Uuid;

/// What a key is waited for whose provider is out of service after failures in a row.
pub(super) const UNAVAILABLE: &str = "transient.unavailable";

/// Turns of all keys of this process: a pool that is made anew of the same keys goes on where it was.
static TURN: AtomicU64 = AtomicU64::new(1);

/// One key with its client and its health, as this process sees it.
pub(super) struct Slot {
    pub provider: Arc<dyn Provider>,
    pub key: KeyRef,
    pub breaker: Breaker,
    /// Calls under way.
    running: AtomicU32,
    /// Turn at which it was taken last.
    taken: AtomicU64,
}

impl Slot {
    /// A key of the platform's.
    pub fn platform(provider: Arc<dyn Provider>) -> Self {
        let key = KeyRef::Platform { provider: provider.name().to_owned(), fingerprint: provider.key().fingerprint };
        Self::new(provider, key)
    }

    /// A key of a user's, by its row.
    pub fn own(provider: Arc<dyn Provider>, id: Uuid) -> Self {
        Self::new(provider, KeyRef::Own(id))
    }

    fn new(provider: Arc<dyn Provider>, key: KeyRef) -> Self {
        Self { provider, key, breaker: Breaker::default(), running: AtomicU32::new(0), taken: AtomicU64::new(0) }
    }

    /// Row of a user's own key.
    pub fn own_id(&self) -> Option<Uuid> {
        match self.key {
            KeyRef::Own(id) => Some(id),
            KeyRef::Platform { .. } => None,
        }
    }
}

/// The keys of one provider. They may change while calls are under way: a call goes on with the key that it has.
#[derive(Default)]
pub(super) struct Pool {
    slots: RwLock<Vec<Arc<Slot>>>,
}

/// A key in use; given back when dropped.
pub(super) struct Running {
    pub slot: Arc<Slot>,
    /// This call finds out whether the provider is back, and has not yet.
    probe: AtomicBool,
}

impl Running {
    /// Whether this call was the probe; from now on it is none, and what it found out is said by the caller. Given back later it would
    /// take the place of the next one.
    pub fn found_out(&self) -> bool {
        self.probe.swap(false, Ordering::Relaxed)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.slot.running.fetch_sub(1, Ordering::Relaxed);
        if self.found_out() {
            self.slot.breaker.give_back();
        }
    }
}

/// Why no key can be used.
pub(super) enum Blocked {
    /// The soonest is free after this; the code says what is waited for.
    Wait { code: &'static str, wait: Duration },
    /// None until somebody acts: what the provider said, or the reason of the row.
    Out { said: Option<Failure>, reason: String },
}

impl Pool {
    pub fn new(slots: Vec<Arc<Slot>>) -> Self {
        Self { slots: RwLock::new(slots) }
    }

    /// The keys as they are now.
    pub fn slots(&self) -> Vec<Arc<Slot>> {
        self.slots.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Other keys from now on.
    pub fn replace(&self, slots: Vec<Arc<Slot>>) {
        *self.slots.write().unwrap_or_else(PoisonError::into_inner) = slots;
    }

    pub fn len(&self) -> usize {
        self.slots.read().unwrap_or_else(PoisonError::into_inner).len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The key with the fewest calls under way, of several the one that rested longest, among those that are in service for
    /// `model` and not in `skip`.
    pub fn take(&self, board: &Board, model: &str, now: Instant, skip: &[Arc<Slot>]) -> Result<Running, Blocked> {
        let mut order = self.slots();
        order.retain(|slot| !skip.iter().any(|skipped| Arc::ptr_eq(skipped, slot)));
        // Stable: of equals the first in the list.
        order.sort_by_cached_key(|slot| (slot.running.load(Ordering::Relaxed), slot.taken.load(Ordering::Relaxed)));
        let (mut soonest, mut out) = (None::<(Duration, &'static str)>, None);
        let mut wait_for = |wait: Duration, code| match soonest {
            Some((known, _)) if known <= wait => {}
            _ => soonest = Some((wait, code)),
        };
        for slot in order {
            match board.standing(&slot.key, model, now) {
                Standing::Active => {}
                // An empty account does not fill by itself.
                Standing::Cooling { reason, .. } if reason == "provider.no_balance" => {
                    out.get_or_insert((board.said(&slot.key), reason));
                    continue;
                }
                // Nor does a right to a model.
                Standing::Cooling { reason, .. } if reason == FORBIDDEN => {
                    out.get_or_insert((board.said_of_model(&slot.key, model), reason));
                    continue;
                }
                Standing::Cooling { until, reason, .. } => {
                    let code = if reason == "transient.http" { UNAVAILABLE } else { "transient.rate_limited" };
                    wait_for(until.saturating_duration_since(now), code);
                    continue;
                }
                Standing::Disabled { reason } => {
                    out.get_or_insert((board.said(&slot.key), reason));
                    continue;
                }
            }
            match slot.breaker.permit(now) {
                Permit::Allowed { probe } => {
                    slot.running.fetch_add(1, Ordering::Relaxed);
                    slot.taken.store(TURN.fetch_add(1, Ordering::Relaxed), Ordering::Relaxed);
                    return Ok(Running { slot, probe: AtomicBool::new(probe) });
                }
                Permit::Refused(wait) => wait_for(wait, UNAVAILABLE),
            }
        }
        Err(match (soonest, out) {
            (Some((wait, code)), _) => Blocked::Wait { code, wait },
            (None, Some((said, reason))) => Blocked::Out { said, reason },
            (None, None) => Blocked::Out { said: None, reason: "operator".to_owned() },
        })
    }

    /// Whether a key could serve `model` now.
    pub fn is_free(&self, board: &Board, model: &str, now: Instant) -> bool {
        self.slots()
            .iter()
            .any(|slot| board.standing(&slot.key, model, now) == Standing::Active && slot.breaker.is_closed())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::provider::Scripted;

    #[test]
    fn a_probe_that_has_found_out_does_not_give_back_the_place_of_the_next_one() {
        let client = Scripted::from_yaml("- at: 'a:b'\n  reply: { text: x }\n").unwrap();
        let slot = Arc::new(Slot::own(Arc::new(client), Uuid::nil()));
        let (pool, board, start) = (Pool::new(vec![slot.clone()]), Board::default(), Instant::now());
        for _ in 0..crate::orchestrator::breaker::FAILURES_TO_OPEN {
            slot.breaker.unwell_for(start, false, Duration::ZERO);
        }
        let take = || pool.take(&board, "m", start, &[]).ok();
        let first = take().unwrap();
        assert!(take().is_none(), "one at a time");
        // It failed, and is still being recorded when the next one begins.
        slot.breaker.unwell_for(start, first.found_out(), Duration::ZERO);
        let second = take().unwrap();
        drop(first);
        assert!(take().is_none(), "the second one is under way");
        drop(second);
        assert!(take().is_some(), "it found out nothing");
    }

    #[test]
    fn a_pool_that_is_made_anew_of_the_same_keys_goes_on_where_it_was() {
        let slots: Vec<Arc<Slot>> = (0..3)
            .map(|n| {
                let client = Scripted::from_yaml("- at: 'a:b'\n  reply: { text: x }\n").unwrap();
                Arc::new(Slot::own(Arc::new(client), Uuid::from_u128(n)))
            })
            .collect();
        let board = Board::default();
        let turns: Vec<u128> = (0..6)
            .map(|_| {
                let running = Pool::new(slots.clone()).take(&board, "m", Instant::now(), &[]).ok().unwrap();
                running.slot.own_id().unwrap().as_u128()
            })
            .collect();
        assert_eq!(turns, [0, 1, 2, 0, 1, 2]);
    }
}
