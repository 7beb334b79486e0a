//! When a run next needs attention by itself.

use super::{
    BLOCKED_RETRY_MS,
    state::{Live, Phase, RunState},
};
use crate::definition::{Definition, Kind};
use chrono::{DateTime, Duration, Utc};

/// The earliest instant at which time alone moves the run. Every open run has one: its own deadline at the latest.
#[must_use]
pub fn next_due(definition: &Definition, state: &RunState) -> DateTime<Utc> {
    let mut due = state.deadline;
    let mut at = |instant: DateTime<Utc>| due = due.min(instant);
    state.visit_live(&mut |path, node| match &node.live {
        Some(Live::Activity { phase, attempt, queue_deadline, total_deadline, .. }) => {
            match phase {
                Phase::Queued if *attempt == 0 => at(*queue_deadline),
                Phase::Queued | Phase::Running { .. } => {}
                Phase::Backoff { until, .. } => at(*until),
                Phase::Blocked { since, .. } => at(*since + Duration::milliseconds(BLOCKED_RETRY_MS)),
            }
            if let (Some(total), false) = (total_deadline, matches!(phase, Phase::Running { .. })) {
                at(*total);
            }
        }
        Some(Live::Wait { until }) => at(*until),
        Some(Live::Await { deadline, reminded, .. }) => {
            at(*deadline);
            if let (Ok(step), Some(began)) = (super::scope::find_step(definition, state, path), node.started_at)
                && let Kind::Await(spec) = &step.kind
                && let Some(after) = spec.remind_ms.get(*reminded as usize)
            {
                at(began + millis(*after));
            }
        }
        Some(Live::Repeat { delayed_until: Some(until), .. }) => at(*until),
        Some(
            Live::Group { .. }
            | Live::Switch { .. }
            | Live::Parallel { .. }
            | Live::Foreach { .. }
            | Live::Repeat { delayed_until: None, .. }
            | Live::Call { .. }
            | Live::Catch { .. },
        )
        | None => {}
    });
    due
}

/// Milliseconds as a duration; what does not fit is the longest one.
pub(super) fn millis(ms: u64) -> Duration {
    i64::try_from(ms).ok().and_then(Duration::try_milliseconds).unwrap_or(Duration::days(36_500))
}
