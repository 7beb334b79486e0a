//! When a run next needs attention by itself.

use super::{
    BLOCKED_RETRY_MS,
    state::{Live, Node, Phase, RunState},
};
use crate::{
    definition::{Definition, Kind},
    view::RunStatus,
};
use chrono::{DateTime, Duration, Utc};

/// Longer than any run may last: time alone does not move this one any more.
const NEVER_DAYS: i64 = 3_650;

/// The earliest instant at which time alone moves the run: its own deadline at the latest. A run that is only waiting for
/// attempts to stop has no such instant, or its owner would spin on a deadline that has passed: its worker sees to it that they do, or
/// its lease ends. Who waits for children has the instant at which they are overdue. Nor has one that
/// is paused: what came due meanwhile fires when it is resumed.
#[must_use]
pub fn next_due(definition: &Definition, state: &RunState) -> DateTime<Utc> {
    let stopping = match &state.finally {
        None => state.ending.is_some(),
        Some(frame) => frame.nodes.values().all(|n| n.live.is_none() || n.stopping),
    };
    if state.status == RunStatus::Paused {
        return state.deadline + Duration::days(NEVER_DAYS);
    }
    let mut due = if stopping { state.deadline + Duration::days(NEVER_DAYS) } else { state.deadline };
    let mut at = |instant: DateTime<Utc>| due = due.min(instant);
    state.visit_live(&mut |path, node| {
        if let (Some(live), Some(began), false) = (&node.live, node.started_at, node.stopping)
            && !matches!(live, Live::Activity { .. } | Live::Catch { .. })
            && let Ok(step) = super::scope::find_step(definition, state, path)
            && let Some(total) = step.timeouts.total_ms
            && !all_stopping(live)
        {
            at(began + millis(total));
        }
        moves(definition, state, path, node, &mut at);
    });
    due
}

/// Whether there are steps under way below, and all of them have been told to stop.
fn all_stopping(live: &Live) -> bool {
    let frames = live.frames();
    let mut below = frames.iter().flat_map(|(_, frame)| frame.nodes.values()).filter(|n| n.live.is_some()).peekable();
    below.peek().is_some() && below.all(|n| n.stopping)
}

fn moves(definition: &Definition, state: &RunState, path: &str, node: &Node, at: &mut dyn FnMut(DateTime<Utc>)) {
    match &node.live {
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
        Some(Live::Call { stopped: Some(stopped), .. }) => at(stopped.until),
        Some(
            Live::Group { .. }
            | Live::Switch { .. }
            | Live::Parallel { .. }
            | Live::Foreach { .. }
            | Live::Repeat { delayed_until: None, .. }
            | Live::Call { stopped: None, .. }
            | Live::Catch { .. },
        )
        | None => {}
    }
}

/// Milliseconds as a duration; a hundred years at most, so that no sum of an instant and a few of them overflows.
pub(super) fn millis(ms: u64) -> Duration {
    let longest = Duration::days(36_500);
    i64::try_from(ms).ok().and_then(Duration::try_milliseconds).map_or(longest, |d| d.min(longest))
}
