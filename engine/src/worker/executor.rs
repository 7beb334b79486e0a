//! One attempt, from its input to its result: checked, timed, watched, caught.

use crate::{
    activity::{Activity, Checks, Context, panic_failure},
    failure::{Failure, FailureKind},
};
use futures_util::FutureExt;
use serde_json::Value;
use std::{
    panic::AssertUnwindSafe,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

/// How long a cancelled attempt may take to notice.
const CANCEL_GRACE: Duration = Duration::from_secs(20);

/// Everything that one attempt needs.
pub(super) struct Attempt {
    pub(super) activity: Arc<dyn Activity>,
    pub(super) checks: Arc<Checks>,
    pub(super) context: Context,
    pub(super) input: Value,
    /// From now.
    pub(super) timeout: Duration,
    pub(super) heartbeat: Option<Duration>,
    pub(super) beat: Arc<Mutex<Instant>>,
}

/// Runs it. Never panics, always ends within its timeout.
pub(super) async fn execute(attempt: Attempt) -> Result<Value, Failure> {
    let Attempt { activity, checks, context, input, timeout, heartbeat, beat } = attempt;
    let wrong = checks.input.violations(&input);
    if !wrong.is_empty() {
        return Err(Failure::permanent("input.invalid", format!("{}: {}", checks.name, wrong.join("; "))));
    }
    let token = context.cancellation().clone();
    let work = AssertUnwindSafe(async move { activity.run(context, input).await }).catch_unwind();
    tokio::pin!(work);
    let deadline = tokio::time::sleep(timeout);
    tokio::pin!(deadline);
    let silent = async {
        let Some(limit) = heartbeat else { return std::future::pending().await };
        loop {
            let last = *beat.lock().expect("no panic while held");
            match limit.checked_sub(last.elapsed()) {
                Some(rest) if !rest.is_zero() => tokio::time::sleep(rest).await,
                _ => return,
            }
        }
    };
    let too_slow_to_stop = async {
        token.cancelled().await;
        tokio::time::sleep(CANCEL_GRACE).await;
    };
    let result = tokio::select! {
        result = &mut work => result,
        () = &mut deadline => return Err(Failure::new(FailureKind::TimedOut, "timeout.run", format!("the attempt took longer than {} s", timeout.as_secs()))),
        () = silent => return Err(Failure::new(FailureKind::TimedOut, "timeout.heartbeat", "the attempt gave no sign of life")),
        () = too_slow_to_stop => return Err(Failure::cancelled()),
    };
    let output = match result {
        Ok(result) => result?,
        Err(payload) => return Err(panic_failure(payload.as_ref())),
    };
    let wrong = checks.output.violations(&output);
    if !wrong.is_empty() {
        return Err(Failure::retryable("output.invalid", format!("{}: {}", checks.name, wrong.join("; "))));
    }
    Ok(output)
}
