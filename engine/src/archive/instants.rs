//! The instants that a history tells. They come from a file, and arithmetic over them must not end where instants end. Pure.

use crate::event::{Event, Opened};
use chrono::{DateTime, Datelike, Utc};

/// # Errors
/// Runs are newer than 1970; beyond 9999, sums of deadlines would come to where instants end.
pub(super) fn sane(instants: impl IntoIterator<Item = DateTime<Utc>>) -> std::result::Result<(), String> {
    match instants.into_iter().find(|at| !(1970..=9999).contains(&at.year())) {
        Some(at) => Err(format!("the instant {at} is not between 1970 and 9999")),
        None => Ok(()),
    }
}

pub(super) fn of(event: &Event) -> Vec<DateTime<Utc>> {
    match event {
        Event::RunStarted { at, deadline, .. }
        | Event::AttemptStarted { at, deadline, .. }
        | Event::FinallyStarted { at, deadline }
        | Event::CallStopped { at, until: deadline, .. }
        | Event::CallOverdue { at, until: deadline, .. }
        | Event::CleanupBounded { at, until: deadline } => vec![*at, *deadline],
        Event::RunForked { at, not_before, deadline, .. } => [*at, *deadline].into_iter().chain(*not_before).collect(),
        Event::StepStarted { at, opened, .. } => match opened {
            Opened::Activity { queue_deadline, total_deadline, .. } => {
                [*at, *queue_deadline].into_iter().chain(*total_deadline).collect()
            }
            Opened::Wait { until: end } | Opened::Await { deadline: end, .. } => vec![*at, *end],
            Opened::Group
            | Opened::Switch { .. }
            | Opened::Parallel { .. }
            | Opened::Foreach { .. }
            | Opened::Repeat
            | Opened::Call { .. } => vec![*at],
        },
        Event::RetryScheduled { due_at: at, .. }
        | Event::RoundDelayed { until: at, .. }
        | Event::AttemptBlocked { at, .. }
        | Event::AttemptEnded { at, .. }
        | Event::SignalReceived { at, .. }
        | Event::UpdateAccepted { at, .. }
        | Event::UpdateRejected { at, .. }
        | Event::StepEnded { at, .. }
        | Event::RunPaused { at, .. }
        | Event::RunResumed { at, .. }
        | Event::RunMigrated { at, .. }
        | Event::RunEnding { at, .. }
        | Event::RunClosed { at, .. } => vec![*at],
        Event::StepSkipped { .. }
        | Event::AttemptReady { .. }
        | Event::RoundStarted { .. }
        | Event::ItemStarted { .. }
        | Event::ItemEnded { .. }
        | Event::BranchEnded { .. }
        | Event::CatchStarted { .. }
        | Event::SignalDropped { .. }
        | Event::SignalConsumed { .. }
        | Event::UpdateCompleted { .. }
        | Event::DecisionCounted { .. }
        | Event::Reminded { .. }
        | Event::Unblocked {}
        | Event::StopRequested { .. } => Vec::new(),
    }
}
