//! What people see of a state.

use super::{
    scope::{find_step, status_name},
    state::{Live, Phase, RunState},
};
use crate::{
    definition::{Definition, Kind, Step},
    view::{LiveAttempt, NodeView, Waiting},
};
use serde_json::Value;

/// Everything the run waits for.
#[must_use]
pub fn waiting(definition: &Definition, state: &RunState) -> Vec<Waiting> {
    let mut found = Vec::new();
    state.visit_live(&mut |path, node| {
        let path = path.to_owned();
        match &node.live {
            Some(Live::Await { signal, deadline, show, .. }) => {
                let Ok(step) = find_step(definition, state, &path) else { return };
                let Kind::Await(spec) = &step.kind else { return };
                found.push(if spec.approval.is_some() {
                    Waiting::Approval {
                        path,
                        step: signal.clone(),
                        show: show.clone(),
                        to: spec.to.clone(),
                        deadline: *deadline,
                    }
                } else {
                    Waiting::Signal {
                        path,
                        signal: signal.clone(),
                        show: show.clone(),
                        form: spec.form.clone(),
                        to: spec.to.clone(),
                        deadline: *deadline,
                    }
                });
            }
            Some(Live::Wait { until }) => found.push(Waiting::Timer { path, until: *until }),
            Some(Live::Repeat { delayed_until: Some(until), .. }) => found.push(Waiting::Timer { path, until: *until }),
            Some(Live::Call { child, .. }) => found.push(Waiting::Child { path, run_id: *child }),
            Some(Live::Activity { activity, phase, .. }) => match phase {
                Phase::Queued => found.push(Waiting::Queued { path, activity: activity.clone() }),
                Phase::Running { .. } => {}
                Phase::Backoff { until, failure } => {
                    found.push(Waiting::Retry { path, until: *until, failure: failure.clone() });
                }
                Phase::Blocked { reason, message, .. } => {
                    found.push(Waiting::Blocked { path, reason: reason.clone(), message: message.clone() });
                }
            },
            _ => {}
        }
    });
    found
}

/// The word for lists: why the run is parked.
#[must_use]
pub fn waiting_reason(waiting: &[Waiting]) -> Option<String> {
    waiting
        .iter()
        .map(|w| match w {
            Waiting::Blocked { reason, .. } => reason.clone(),
            Waiting::Approval { .. } => "approval".into(),
            Waiting::Signal { .. } => "signal".into(),
            Waiting::Child { .. } => "child".into(),
            Waiting::Retry { .. } => "retry".into(),
            Waiting::Timer { .. } => "timer".into(),
            Waiting::Queued { .. } => "queue".into(),
        })
        .next()
}

/// Attempts that run now; progress is filled in by the reader.
#[must_use]
pub fn live_attempts(state: &RunState) -> Vec<LiveAttempt> {
    let mut found = Vec::new();
    state.visit_live(&mut |path, node| {
        if let Some(Live::Activity { activity, attempt, phase: Phase::Running { started_at, .. }, .. }) = &node.live {
            found.push(LiveAttempt {
                path: path.to_owned(),
                activity: activity.clone(),
                attempt: *attempt,
                started_at: *started_at,
                progress: Value::Null,
            });
        }
    });
    found
}

/// The tree in order of the definition.
#[must_use]
pub fn nodes(definition: &Definition, state: &RunState) -> Vec<NodeView> {
    let mut out = Vec::new();
    collect(&definition.steps, &state.body, "", &mut out);
    if let Some(frame) = &state.finally {
        collect(&definition.finally, frame, super::state::FINALLY_PREFIX, &mut out);
    }
    out
}

fn collect(steps: &[Step], frame: &super::Frame, prefix: &str, out: &mut Vec<NodeView>) {
    for step in steps {
        let Some(node) = frame.nodes.get(&step.id) else { continue };
        let (done, total) = match (&node.live, &step.kind) {
            (Some(Live::Foreach { items, results, .. }), _) => (count(results.len()), count(items.len())),
            (Some(Live::Repeat { round, .. }), Kind::Repeat { max_rounds, .. }) => (Some(*round), Some(*max_rounds)),
            (Some(Live::Parallel { branches, .. }), _) => {
                (count(branches.values().filter(|b| b.ended.is_some()).count()), count(branches.len()))
            }
            (None, Kind::Foreach { .. }) => {
                let n = node.output.as_ref().and_then(Value::as_array).map(Vec::len);
                (n.and_then(count), n.and_then(count))
            }
            _ => (None, None),
        };
        let status = match (node.status, &node.live) {
            (Some(status), _) => status_name(status),
            (None, Some(Live::Await { .. } | Live::Wait { .. } | Live::Call { .. })) => "waiting",
            (None, Some(Live::Activity { phase: Phase::Backoff { .. } | Phase::Blocked { .. }, .. })) => "waiting",
            (None, _) => "running",
        };
        let path = format!("{prefix}{}", step.id);
        out.push(NodeView {
            path: path.clone(),
            step: step.id.clone(),
            status: status.to_owned(),
            done,
            total,
            output: node.output.clone(),
            failure: node.failure.clone(),
        });
        let Some(live) = &node.live else {
            // The steps of the last round of a lowered `redo` stand beside it.
            if let Kind::Repeat { transparent: true, steps, .. } = &step.kind {
                collect(steps, frame, prefix, out);
            }
            continue;
        };
        for (suffix, inner) in live.frames() {
            let segment = format!("{}{suffix}", step.id);
            let (_, below) = super::state::split_segment(&segment);
            if let Some(steps) = super::scope::live_children(step, live, below) {
                collect(steps, inner, &format!("{path}{suffix}/"), out);
            }
        }
    }
}

fn count(n: usize) -> Option<u32> {
    u32::try_from(n).ok()
}
