//! The database's time, as this process knows it: the local clock plus an offset that every heartbeat renews.

use chrono::{DateTime, Duration, SubsecRound, Utc};
use std::sync::atomic::{AtomicI64, Ordering};

/// Time of the database, to within a round trip. A worker whose own clock is wrong still agrees with the others.
#[derive(Debug, Default)]
pub(crate) struct Clock {
    offset_micros: AtomicI64,
}

impl Clock {
    /// Takes over what the database just said.
    pub(crate) fn set(&self, database: DateTime<Utc>) {
        let offset = (database - local()).num_microseconds().unwrap_or(0);
        self.offset_micros.store(offset, Ordering::Relaxed);
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

    #[test]
    fn an_instant_is_one_that_the_database_can_hold() {
        let clock = Clock::default();
        clock.set(Utc::now() + Duration::nanoseconds(1_234_567));
        for _ in 0..100 {
            assert_eq!(clock.now().timestamp_subsec_nanos() % 1_000, 0);
        }
    }
}
