//! How long a call waits, and how.

use super::{super::breaker::OPEN_FOR, Task};
use loopwright_engine::Failure;
use std::time::Duration;

/// How long the orchestrator waits; [`Default`] is what production uses, tests make it short.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pace {
    /// Wait before the second try where the provider names none, with jitter of half of it either way.
    pub backoff: Duration,
    /// Longest wait inside a call; beyond it the attempt ends with `retry_after_ms` and frees its worker. A provider that keeps
    /// failing is left alone for as long.
    pub wait_max: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self { backoff: Duration::from_secs(1), wait_max: OPEN_FOR }
    }
}

/// Waits inside a call; the run may end it.
pub(super) async fn sleep(task: &Task<'_>, wait: Duration) -> Result<(), Failure> {
    tokio::select! {
        biased;
        () = task.ctx.cancellation().cancelled() => Err(Failure::cancelled()),
        () = tokio::time::sleep(wait) => Ok(()),
    }
}

pub(super) fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Half to one and a half of `duration`, so that workers that failed together do not come back together.
pub(super) fn jittered(duration: Duration) -> Duration {
    let [byte, ..] = *uuid::Uuid::new_v4().as_bytes();
    duration / 2 + duration.mul_f64(f64::from(byte) / 255.0)
}
