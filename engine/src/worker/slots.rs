//! Room for attempts, given in turns: whoever owns many runs here does not keep the others from their next step.

use crate::store::turns::Turns;
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard},
};
use tokio::sync::oneshot;

/// The attempts that a worker may run at the same time.
pub(crate) struct Slots(Mutex<Inner>);

struct Inner {
    /// Above 0 only while nobody waits.
    free: usize,
    /// What each lane occupies.
    turns: Turns,
    /// By arrival.
    waiting: BTreeMap<u64, Waiter>,
    arrivals: u64,
}

struct Waiter {
    priority: i16,
    lane: i32,
    hand: oneshot::Sender<Permit>,
}

/// One slot in use; free again when it is dropped.
pub(crate) struct Permit {
    slots: Arc<Slots>,
    lane: i32,
}

impl Slots {
    pub(crate) fn new(slots: usize) -> Arc<Self> {
        let inner = Inner { free: slots, turns: Turns::default(), waiting: BTreeMap::new(), arrivals: 0 };
        Arc::new(Self(Mutex::new(inner)))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().expect("no panic while held")
    }

    /// How many are free.
    pub(crate) fn free(&self) -> usize {
        self.lock().free
    }

    /// A slot, if one is free; then nobody waits for one.
    pub(crate) fn try_acquire(self: &Arc<Self>, lane: i32) -> Option<Permit> {
        let mut inner = self.lock();
        inner.free = inner.free.checked_sub(1)?;
        inner.turns.took(lane);
        Some(Permit { slots: self.clone(), lane })
    }

    /// A slot, as soon as it is this one's turn: by priority, then the lane that occupies the fewest, then the one whose last
    /// turn was the longest ago, then by arrival. Whoever stops waiting loses its place.
    pub(crate) async fn acquire(self: Arc<Self>, priority: i16, lane: i32) -> Permit {
        let (_place, handed) = {
            let mut inner = self.lock();
            if inner.free > 0 {
                inner.free -= 1;
                inner.turns.took(lane);
                drop(inner);
                return Permit { slots: self, lane };
            }
            let (hand, handed) = oneshot::channel();
            inner.arrivals += 1;
            let arrival = inner.arrivals;
            inner.waiting.insert(arrival, Waiter { priority, lane, hand });
            (Place { slots: self.clone(), arrival }, handed)
        };
        // A waiter is taken out with a permit, or by itself when it is gone.
        handed.await.expect("nobody else drops the sender")
    }

    /// Passes a slot on, or keeps it free.
    fn give_back(self: &Arc<Self>, lane: i32) {
        let mut inner = self.lock();
        inner.turns.gave_back(lane);
        let turns = &inner.turns;
        let next = inner
            .waiting
            .iter()
            .min_by_key(|(arrival, w)| (w.priority, turns.held(w.lane), turns.last(w.lane), **arrival));
        let next = next.map(|(arrival, _)| *arrival);
        let Some(waiter) = next.and_then(|arrival| inner.waiting.remove(&arrival)) else {
            inner.free += 1;
            return;
        };
        inner.turns.took(waiter.lane);
        drop(inner);
        // One that has just stopped waiting drops it, and it comes back here.
        drop(waiter.hand.send(Permit { slots: self.clone(), lane: waiter.lane }));
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.slots.give_back(self.lane);
    }
}

/// A place among those who wait, left when it is dropped.
struct Place {
    slots: Arc<Slots>,
    arrival: u64,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.slots.lock().waiting.remove(&self.arrival);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    #[tokio::test]
    async fn a_slot_goes_to_who_has_the_fewest() {
        let slots = Slots::new(2);
        let (first, second) = (slots.try_acquire(1).unwrap(), slots.try_acquire(1).unwrap());
        assert!(slots.try_acquire(2).is_none());
        let mut big = Box::pin(slots.clone().acquire(3, 1));
        let mut small = Box::pin(slots.clone().acquire(3, 2));
        assert!((&mut big).now_or_never().is_none() && (&mut small).now_or_never().is_none());
        drop(first);
        assert!((&mut big).now_or_never().is_none(), "it came first and has one already");
        let held = small.now_or_never().expect("its turn");
        let mut urgent = Box::pin(slots.clone().acquire(1, 2));
        assert!((&mut urgent).now_or_never().is_none());
        drop(second);
        assert!(urgent.now_or_never().is_some(), "priority goes first");
        // Used at once and given back: it went on.
        let big = big.now_or_never().expect("nobody else waits");
        assert_eq!(slots.free(), 0);
        drop((held, big));
        assert_eq!(slots.free(), 2);
    }

    #[tokio::test]
    async fn who_stops_waiting_takes_no_slot_along() {
        let slots = Slots::new(1);
        let held = slots.try_acquire(1).unwrap();
        let mut gone = Box::pin(slots.clone().acquire(3, 2));
        let mut late = Box::pin(slots.clone().acquire(3, 3));
        assert!((&mut gone).now_or_never().is_none() && (&mut late).now_or_never().is_none());
        drop(late);
        drop(held);
        // Handed over and never looked at.
        assert_eq!(slots.free(), 0);
        drop(gone);
        assert_eq!(slots.free(), 1);
        assert!(slots.lock().waiting.is_empty());
    }
}
