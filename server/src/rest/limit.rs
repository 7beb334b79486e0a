//! How often a user may call: a bucket of tokens per user, in the memory of one process.

use super::error::{Code, Error};
use std::{
    collections::HashMap,
    sync::Mutex,
    time::{Duration, Instant},
};
use uuid::Uuid;

/// Buckets above which full ones are forgotten. Chosen, not measured.
const BUCKETS_MAX: usize = 10_000;

/// The buckets of all users.
pub struct RateLimit {
    per_second: f64,
    burst: f64,
    buckets: Mutex<HashMap<Uuid, Bucket>>,
}

struct Bucket {
    tokens: f64,
    at: Instant,
}

impl RateLimit {
    /// `per_minute` requests in the long run, a quarter of it at once.
    #[must_use]
    pub fn new(per_minute: u32) -> Self {
        let per_minute = f64::from(per_minute);
        Self { per_second: per_minute / 60.0, burst: (per_minute / 4.0).max(1.0), buckets: Mutex::default() }
    }

    /// Takes one request of the user.
    ///
    /// # Errors
    /// `rate_limited`, with the seconds until the next one.
    pub fn take(&self, user: Uuid, now: Instant) -> Result<(), Error> {
        let mut buckets = self.buckets.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if buckets.len() > BUCKETS_MAX {
            let full = Duration::from_secs_f64(self.burst / self.per_second);
            buckets.retain(|_, bucket| now.duration_since(bucket.at) < full);
        }
        let bucket = buckets.entry(user).or_insert(Bucket { tokens: self.burst, at: now });
        let elapsed = now.saturating_duration_since(bucket.at).as_secs_f64();
        bucket.tokens = (bucket.tokens + elapsed * self.per_second).min(self.burst);
        bucket.at = now;
        if bucket.tokens >= 1.0 {
            bucket.tokens -= 1.0;
            return Ok(());
        }
        let wait = Duration::from_secs_f64((1.0 - bucket.tokens) / self.per_second);
        Err(Error::new(Code::RateLimited, "Slow down.").retry_after(wait.as_secs() + 1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_served_then_the_rate_holds_per_user() {
        let limit = RateLimit::new(60);
        let (a, b, start) = (Uuid::new_v4(), Uuid::new_v4(), Instant::now());
        for _ in 0..15 {
            limit.take(a, start).unwrap();
        }
        let refused = limit.take(a, start).unwrap_err();
        assert_eq!((refused.code, refused.retry_after_s), (Code::RateLimited, Some(2)));
        limit.take(b, start).unwrap();
        limit.take(a, start + Duration::from_secs(1)).unwrap();
        limit.take(a, start + Duration::from_secs(1)).unwrap_err();
    }
}
