//! When a schedule's instants are. Pure.

use super::{
    cron::{Cron, CronError},
    draw,
};
use chrono::{DateTime, Duration, Utc};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Shortest interval, in ms. Chosen: workers look for due schedules about twice a second.
pub const EVERY_MS_MIN: u64 = 1_000;
/// Longest interval, in ms: a year.
pub const EVERY_MS_MAX: u64 = 366 * 86_400_000;
/// What is late by less than this is on time: a worker restarts, a database fails over. Chosen.
const GRACE_MS: u64 = 60_000;

/// A calendar, as written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum When {
    /// See [`Cron`].
    Cron {
        expression: String,
        #[serde(default = "utc")]
        timezone: String,
    },
    /// Multiples of `ms` since 1970, moved by `offset_ms`: the same instants whenever it is asked.
    Every {
        ms: u64,
        #[serde(default)]
        offset_ms: u64,
    },
}

fn utc() -> String {
    "UTC".into()
}

/// A calendar, read.
#[derive(Clone, Debug)]
pub enum Timing {
    Cron(Box<Cron>),
    Every { ms: i64, offset_ms: i64 },
}

impl Timing {
    /// # Errors
    /// What is wrong, where, and what to write instead.
    pub fn new(when: &When) -> Result<Self, String> {
        match when {
            When::Cron { expression, timezone } => {
                Cron::parse(expression, timezone).map(|cron| Self::Cron(Box::new(cron))).map_err(|e: CronError| {
                    if e.column == 0 { e.to_string() } else { format!("cron expression `{expression}` {e}") }
                })
            }
            When::Every { ms, .. } if !(EVERY_MS_MIN..=EVERY_MS_MAX).contains(ms) => {
                Err(format!("the interval is {ms} ms; from {EVERY_MS_MIN} (a second) to {EVERY_MS_MAX} (a year)"))
            }
            When::Every { ms, offset_ms } if offset_ms >= ms => {
                Err(format!("the offset of the interval is {offset_ms} ms; it is below the interval of {ms} ms"))
            }
            When::Every { ms, offset_ms } => {
                let signed = |n: &u64| i64::try_from(*n).unwrap_or(i64::MAX);
                Ok(Self::Every { ms: signed(ms), offset_ms: signed(offset_ms) })
            }
        }
    }

    /// The first instant after the given one.
    #[must_use]
    pub fn next_after(&self, after: DateTime<Utc>) -> Option<DateTime<Utc>> {
        match self {
            Self::Cron(cron) => cron.next_after(after),
            Self::Every { ms, offset_ms } => {
                let passed = (after.timestamp_millis() - offset_ms).div_euclid(*ms);
                DateTime::from_timestamp_millis((passed + 1).checked_mul(*ms)?.checked_add(*offset_ms)?)
            }
        }
    }

    /// The next `n` instants after the given one.
    pub fn upcoming(&self, after: DateTime<Utc>, n: usize) -> Vec<DateTime<Utc>> {
        std::iter::successors(self.next_after(after), |at| self.next_after(*at)).take(n).collect()
    }

    /// When the instant `at` is due: later by less than `jitter_ms` and before the next instant.
    #[must_use]
    pub fn due(&self, schedule: Uuid, at: DateTime<Utc>, jitter_ms: u64) -> DateTime<Utc> {
        if jitter_ms == 0 {
            return at;
        }
        let gap = self.next_after(at).and_then(|next| u64::try_from((next - at).num_milliseconds()).ok());
        let bound = jitter_ms.min(gap.unwrap_or(jitter_ms)).max(1);
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&draw(schedule, at, "jitter", 0)[..8]);
        at + Duration::milliseconds(i64::try_from(u64::from_be_bytes(bytes) % bound).unwrap_or(0))
    }

    /// How the instant `next` and those after it stand at `now`.
    #[must_use]
    pub fn standing(
        &self,
        schedule: Uuid,
        next: DateTime<Utc>,
        now: DateTime<Utc>,
        jitter_ms: u64,
        catchup_ms: u64,
    ) -> Standing {
        let due = self.due(schedule, next, jitter_ms);
        if due > now {
            return Standing::Ahead(due);
        }
        let ms = |n: u64| Duration::milliseconds(i64::try_from(n).unwrap_or(i64::MAX / 2));
        let oldest = now - ms(catchup_ms.max(GRACE_MS));
        if due >= oldest {
            return Standing::Due;
        }
        // Not one by one: a minute's schedule that slept for a year would miss half a million.
        let jump = self.next_after(oldest - ms(jitter_ms) - Duration::milliseconds(1));
        Standing::Missed { next: if jump.is_none_or(|to| to > next) { jump } else { self.next_after(next) } }
    }
}

/// What is to be done about an instant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It is due then.
    Ahead(DateTime<Utc>),
    Due,
    /// It and all before `next` are too late.
    Missed {
        next: Option<DateTime<Utc>>,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn at(text: &str) -> DateTime<Utc> {
        DateTime::parse_from_rfc3339(text).expect("instant").with_timezone(&Utc)
    }
    fn every(ms: u64, offset_ms: u64) -> Timing {
        Timing::new(&When::Every { ms, offset_ms }).expect("timing")
    }
    fn minutes(expression: &str) -> Timing {
        Timing::new(&When::Cron { expression: expression.into(), timezone: "UTC".into() }).expect("timing")
    }

    #[test]
    fn an_interval_is_aligned_whenever_it_is_asked() {
        let timing = every(600_000, 60_000);
        assert_eq!(timing.next_after(at("2026-11-25T10:00:00Z")), Some(at("2026-11-25T10:01:00Z")));
        assert_eq!(timing.next_after(at("2026-11-25T10:01:00Z")), Some(at("2026-11-25T10:11:00Z")));
        for (ms, offset_ms, word) in [(999, 0, "a second"), (EVERY_MS_MAX + 1, 0, "a year"), (60_000, 60_000, "offset")]
        {
            assert!(Timing::new(&When::Every { ms, offset_ms }).expect_err("bad").contains(word));
        }
    }

    #[test]
    fn a_long_downtime_is_one_jump() {
        let (id, timing) = (Uuid::nil(), minutes("* * * * *"));
        let (next, now) = (at("2025-11-25T00:00:00Z"), at("2026-11-25T10:00:30Z"));
        let hour = timing.standing(id, next, now, 0, 3_600_000);
        assert_eq!(hour, Standing::Missed { next: Some(at("2026-11-25T09:01:00Z")) });
        assert_eq!(timing.standing(id, at("2026-11-25T09:01:00Z"), now, 0, 3_600_000), Standing::Due);
        // Without a window there is a minute of grace.
        assert_eq!(timing.standing(id, at("2026-11-25T10:00:00Z"), now, 0, 0), Standing::Due);
        assert_eq!(
            timing.standing(id, at("2026-11-25T10:01:00Z"), now, 0, 0),
            Standing::Ahead(at("2026-11-25T10:01:00Z"))
        );
    }

    proptest! {
        #[test]
        fn jitter_stays_below_its_bound_and_the_next_instant(ms in 1_000..1_000_000u64, jitter in 0..2_000_000u64, id: u128, minute in 0..1_000_000i64) {
            let (timing, id) = (every(ms, 0), Uuid::from_u128(id));
            let instant = timing.next_after(at("2026-01-01T00:00:00Z") + Duration::minutes(minute)).expect("next");
            let due = timing.due(id, instant, jitter);
            prop_assert_eq!(due, timing.due(id, instant, jitter));
            prop_assert!(due >= instant && due <= instant + Duration::milliseconds(jitter as i64));
            prop_assert!(due < timing.next_after(instant).expect("next"));
        }

        #[test]
        fn a_miss_always_leads_on_and_never_past_what_is_in_the_window(
            ms in 1_000..100_000u64, jitter in 0..300_000u64, window in 0..400_000u64, late in 0..2_000_000i64,
        ) {
            let (timing, id) = (every(ms, 0), Uuid::from_u128(7));
            let next = timing.next_after(at("2026-01-01T00:00:00Z")).expect("next");
            let now = next + Duration::milliseconds(late);
            if let Standing::Missed { next: Some(to) } = timing.standing(id, next, now, jitter, window) {
                prop_assert!(to > next);
                let oldest = now - Duration::milliseconds(window.max(GRACE_MS) as i64);
                for skipped in timing.upcoming(next - Duration::milliseconds(1), 5000).into_iter().take_while(|t| *t < to) {
                    prop_assert!(timing.due(id, skipped, jitter) < oldest);
                }
            }
        }
    }
}
