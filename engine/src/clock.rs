//! The database's time, as this process knows it: the local clock plus an offset that every heartbeat renews.

use chrono::{DateTime, Duration, SubsecRound, Utc};
use std::sync::atomic::{AtomicI64, Ordering};

/// Time of the database, or earlier by as long as its last answer took. A worker whose own clock is wrong still agrees with the others.
#[derive(Debug, Default)]
pub(crate) struct Clock {
    offset_micros: AtomicI64,
}

impl Clock {
    /// Takes over what the database has said. It is later there by as long as the answer took, and nobody knows how long that was: so
    /// this clock may be behind by that, and is never ahead. Ahead by half a round trip, with the connecting in it, it began questions
    /// later than people had answered them, and their approvals were taken for those of the question before.
    pub(crate) fn set(&self, database: DateTime<Utc>) {
        self.offset_micros.store(offset_of(database), Ordering::Relaxed);
    }
    /// It is not earlier than the database has just said: what was due there is due here.
    pub(crate) fn reach(&self, database: DateTime<Utc>) {
        // What is cut off below a microsecond, here and in `now`, must not make it earlier.
        self.offset_micros.fetch_max(offset_of(database) + 2, Ordering::Relaxed);
    }
    /// Now, by the database's clock, in whole microseconds as the database has them: what is stored comes back as it was.
    pub(crate) fn now(&self) -> DateTime<Utc> {
        let now = local() + Duration::microseconds(self.offset_micros.load(Ordering::Relaxed));
        now.trunc_subsecs(6)
    }
    /// How long until `instant`; zero if it is past.
    pub(crate) fn until(&self, instant: DateTime<Utc>) -> std::time::Duration {
        (instant - self.now()).to_std().unwrap_or_default()
    }
}

fn offset_of(database: DateTime<Utc>) -> i64 {
    (database - local()).num_microseconds().unwrap_or(0)
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
        clock.set(Utc::now() + Duration::nanoseconds(1_234_567));
        for _ in 0..100 {
            assert_eq!(clock.now().timestamp_subsec_nanos() % 1_000, 0);
        }
    }

    #[test]
    fn it_is_never_ahead_of_what_the_database_may_say_next() {
        let clock = Clock::default();
        let (database, began) = (Utc::now() + Duration::hours(1), Instant::now());
        clock.set(database);
        let now = clock.now();
        let passed = Duration::from_std(began.elapsed()).expect("short");
        assert!(now <= database + passed, "{now} {database} {passed}");
        clock.reach(database + Duration::seconds(9));
        assert!(clock.now() >= database + Duration::seconds(9));
        clock.reach(database);
        assert!(clock.now() >= database + Duration::seconds(9), "it knew that already");
    }
}
