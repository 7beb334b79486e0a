//! The database's time, as this process knows it: the local clock plus an offset that every heartbeat renews.

use chrono::{DateTime, Duration, SubsecRound, Utc};
use std::sync::atomic::{AtomicI64, Ordering};

/// Time of the database, or earlier by as long as its quickest answer took. A worker whose own clock is wrong still agrees with the
/// others.
#[derive(Debug)]
pub(crate) struct Clock {
    /// How far the database is ahead of this machine, at least; [`UNKNOWN`] before it was asked.
    offset_micros: AtomicI64,
}

const UNKNOWN: i64 = i64::MIN;

impl Default for Clock {
    fn default() -> Self {
        Self { offset_micros: AtomicI64::new(UNKNOWN) }
    }
}

/// The instant before a question, by the clock of this machine.
#[derive(Clone, Copy)]
pub(crate) struct Asked(DateTime<Utc>);

impl Asked {
    pub(crate) fn now() -> Self {
        Self(local())
    }
}

impl Clock {
    /// Takes over what the database has said to a question. It is later there by as long as the answer took, and nobody knows how long
    /// that was: so this clock may be behind by that, and is not ahead. Ahead by half a round trip, with the connecting in it, it began
    /// questions later than people had answered them, and their approvals were taken for those of the question before. What is known
    /// better from before stays, so that a slow answer sets nothing back; unless it cannot be true any more, as after a clock was set.
    pub(crate) fn set(&self, asked: Asked, database: DateTime<Utc>) {
        let (least, most) = (offset_of(database), micros(database - asked.0));
        let better = |known: i64| Some(if known > most { least } else { known.max(least) });
        // It always has a value.
        let _ = self.offset_micros.fetch_update(Ordering::Relaxed, Ordering::Relaxed, better);
    }
    /// It is not earlier than the database has just said: what was due there is due here.
    pub(crate) fn reach(&self, database: DateTime<Utc>) {
        // What is cut off below a microsecond, here and in `now`, must not make it earlier.
        self.offset_micros.fetch_max(offset_of(database) + 2, Ordering::Relaxed);
    }
    /// Now, by the database's clock, in whole microseconds as the database has them: what is stored comes back as it was.
    pub(crate) fn now(&self) -> DateTime<Utc> {
        let offset = Some(self.offset_micros.load(Ordering::Relaxed)).filter(|offset| *offset != UNKNOWN);
        let now = local() + Duration::microseconds(offset.unwrap_or(0));
        now.trunc_subsecs(6)
    }
    /// How long until `instant`; zero if it is past.
    pub(crate) fn until(&self, instant: DateTime<Utc>) -> std::time::Duration {
        (instant - self.now()).to_std().unwrap_or_default()
    }
}

fn offset_of(database: DateTime<Utc>) -> i64 {
    micros(database - local())
}

fn micros(duration: Duration) -> i64 {
    duration.num_microseconds().unwrap_or(0)
}

/// What the clock of this machine says, right or wrong.
fn local() -> DateTime<Utc> {
    #[cfg(feature = "test-util")]
    return Utc::now() + crate::testing::clock_skew();
    #[cfg(not(feature = "test-util"))]
    Utc::now()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    #[test]
    fn an_instant_is_one_that_the_database_can_hold() {
        let clock = Clock::default();
        clock.set(Asked::now(), Utc::now() + Duration::nanoseconds(1_234_567));
        for _ in 0..100 {
            assert_eq!(clock.now().timestamp_subsec_nanos() % 1_000, 0);
        }
    }

    #[test]
    fn it_is_never_ahead_of_what_the_database_may_say_next() {
        let clock = Clock::default();
        let (database, began) = (Utc::now() + Duration::hours(1), Instant::now());
        clock.set(Asked::now(), database);
        let now = clock.now();
        let passed = Duration::from_std(began.elapsed()).expect("short");
        assert!(now <= database + passed, "{now} {database} {passed}");
        clock.reach(database + Duration::seconds(9));
        assert!(clock.now() >= database + Duration::seconds(9));
        clock.reach(database);
        assert!(clock.now() >= database + Duration::seconds(9), "it knew that already");
    }

    #[test]
    fn a_slow_answer_sets_nothing_back_and_a_clock_that_was_set_does() {
        let (clock, hour) = (Clock::default(), Duration::hours(1));
        let ahead = || clock.now() - Utc::now();
        clock.set(Asked::now(), Utc::now() + hour);
        let known = ahead();
        // Asked two seconds ago, read there a second ago.
        let slow = Asked(Utc::now() - Duration::seconds(2));
        clock.set(slow, Utc::now() + hour - Duration::seconds(1));
        assert!(ahead() > known - Duration::milliseconds(500), "{} {known}", ahead());
        // The other clock was set back by a minute: what was known cannot be.
        clock.set(slow, Utc::now() + hour - Duration::seconds(60));
        assert!(ahead() <= hour - Duration::seconds(60), "{}", ahead());
    }
}
