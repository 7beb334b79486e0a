//! How long a call waits, and how.

use super::{super::breaker::OPEN_FOR, Task};
use loopwright_engine::{Failure, activity::Context};
use serde_json::Value;
use std::{future::Future, pin::pin, time::Duration};

/// Time between two signs of life of a call, at most. Chosen: well below the two minutes of a heartbeat timeout.
const PULSE: Duration = Duration::from_secs(15);
/// And between two for so many of the longest silence that its attempt is allowed.
const BEATS_PER_SILENCE: u32 = 3;
/// Shortest time between two: whoever allows no silence at all has asked for something else.
const PULSE_MIN: Duration = Duration::from_millis(10);

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

/// Does `work`, and says meanwhile that the attempt is alive: a model may answer, and be waited for, for longer than an attempt may be
/// silent. What the activity has said of its progress stays.
pub(super) async fn alive<T>(ctx: &Context, work: impl Future<Output = T>) -> T {
    let silence = ctx.info().heartbeat;
    let pulse = silence.map_or(PULSE, |silence| (silence / BEATS_PER_SILENCE).clamp(PULSE_MIN, PULSE));
    let mut work = pin!(work);
    loop {
        tokio::select! {
            biased;
            result = &mut work => return result,
            () = tokio::time::sleep(pulse) => ctx.heartbeat(Value::Null),
        }
    }
}
