//! How often a worker looks for what may be dear to find: seldom enough that looking is a small part of its work.

use super::POLL;
use crate::store::spread::Spread;
use chrono::{DateTime, Utc};
use std::time::{Duration, Instant};

/// A look that took so long is repeated after at least this many times as long: 2 % of the time. There are four such looks, and the
/// claims wait for them.
const REST: u32 = 50;
/// Longest rest all the same. A look may have taken long because the machine or Postgres stood still; what waits for the next one,
/// a message or a run, must not wait minutes for that.
const REST_MAX: Duration = Duration::from_secs(5);
/// Longest pause of a poll that goes from shard to shard. A wake-up ends it.
const SPREAD_MAX: Duration = Duration::from_secs(2);
/// Shortest pause between two looks at the whole queue.
const WHOLE: Duration = Duration::from_secs(1);
/// Longest. Beside a pinned snapshot it reads what was claimed since, a second after half an hour (measured), and the poll waits for it.
/// It finds what a transaction brought that was open for more than [`LATE`], which is rare.
const WHOLE_MAX: Duration = Duration::from_secs(20);
/// Shortest pause between two looks for messages to runs that are driven here; a commit brings them as well.
const MESSAGES: Duration = Duration::from_millis(20);
/// How late a run may come into the queue with a due instant that has passed: its transaction was open, or a timer was over
/// when it parked. What comes even later is found by the next look at the whole queue.
pub(super) const LATE: chrono::Duration = chrono::Duration::seconds(2);

/// When to look next.
#[derive(Debug)]
pub(super) struct Pace {
    least: Duration,
    most: Duration,
    next: Instant,
}

impl Pace {
    pub(super) fn new(least: Duration) -> Self {
        Self { least, most: REST_MAX, next: Instant::now() }
    }
    /// With a longest rest of its own, for what is seldom there.
    pub(super) fn up_to(self, most: Duration) -> Self {
        Self { most, ..self }
    }
    pub(super) fn is_due(&self) -> bool {
        Instant::now() >= self.next
    }
    /// Looks at the next occasion, whatever the last look took.
    pub(super) fn soon(&mut self) {
        self.next = self.next.min(Instant::now() + self.least);
    }
    /// How long it is until then.
    pub(super) fn rest(&self) -> Duration {
        self.next.saturating_duration_since(Instant::now())
    }
    /// A look has ended that began at `began`.
    pub(super) fn looked(&mut self, began: Instant) {
        let now = Instant::now();
        self.next = now + self.least.max(((now - began) * REST).min(self.most));
    }
}

/// What the poll remembers from look to look.
#[derive(Debug)]
pub(super) struct Looks {
    /// What was due before is claimed, or was locked by another worker that claims it.
    pub(super) since: Option<DateTime<Utc>>,
    pub(super) whole: Pace,
    pub(super) messages: Pace,
    /// For runs with a message while there is no room: they may be anywhere in the queue.
    pub(super) crowded: Pace,
    /// One of the last two was wanted and not due yet.
    pub(super) owed: bool,
}

impl Looks {
    pub(super) fn new() -> Self {
        Self {
            since: None,
            whole: Pace::new(WHOLE).up_to(WHOLE_MAX),
            messages: Pace::new(MESSAGES),
            crowded: Pace::new(POLL / 4).up_to(WHOLE_MAX),
            owed: false,
        }
    }

    /// Longest pause before the next poll. Where runs are spread a poll goes from shard to shard, and rests as a dear look does.
    pub(super) fn pause(&self, spread: Spread, took: Duration) -> Duration {
        let pause = if self.owed { self.messages.rest().max(self.crowded.rest()).min(POLL) } else { POLL };
        if spread == Spread::Together { pause } else { pause.max((took * REST).min(SPREAD_MAX)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dear_look_is_repeated_later_than_a_cheap_one() {
        let mut pace = Pace::new(Duration::from_millis(10));
        assert!(pace.is_due());
        pace.looked(Instant::now());
        let cheap = pace.next;
        let began = Instant::now().checked_sub(Duration::from_millis(100)).expect("uptime");
        pace.looked(began);
        assert!(pace.next >= cheap + Duration::from_millis(4_900), "{pace:?}");
        assert!(!pace.is_due());
        pace.soon();
        assert!(pace.rest() <= Duration::from_millis(10), "{pace:?}");
    }

    #[test]
    fn a_look_in_which_the_machine_stood_still_keeps_nobody_waiting_for_minutes() {
        let mut pace = Pace::new(Duration::from_millis(10));
        let began = Instant::now().checked_sub(Duration::from_secs(60)).expect("uptime");
        pace.looked(began);
        assert!(pace.rest() <= REST_MAX, "{pace:?}");
        let mut pace = Pace::new(Duration::from_millis(10)).up_to(REST_MAX * 12);
        pace.looked(Instant::now().checked_sub(Duration::from_secs(1)).expect("uptime"));
        assert!(pace.rest() > Duration::from_secs(49) && pace.rest() <= Duration::from_secs(51), "{pace:?}");
    }
}
