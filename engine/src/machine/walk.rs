//! Finds the next thing that can happen in the tree. Reads the state and the definition, writes nothing: what it finds is
//! returned as events, folded by the caller, and the walk begins again.

mod answer;
mod begin;
mod block;
mod call;

use super::{
    BLOCKED_RETRY_MS, Command, FINALLY_MS, Illegal, Moment,
    react::{lost_too_often, step_ended, stop_commands},
    scope::{Place, error_value, live_children},
    state::{Below, FINALLY_PREFIX, Frame, Live, Node, Phase, RunState},
    timer::millis,
};
use crate::{
    definition::{Definition, Kind, Step, expr},
    event::{Ending, Event, StepStatus},
    failure::Failure,
    ids::AttemptId,
    view::RunStatus,
};
use chrono::Duration;
use serde_json::{Value, json};

/// What a frame or a node came to.
enum Progress {
    /// These events, then look again.
    Emit(Vec<Event>),
    /// Nothing can move without input.
    Idle,
    Ended(End),
}

enum End {
    /// With the last succeeded step's output.
    Succeeded(Option<Value>),
    Failed(Failure),
    Cancelled,
}

/// Everything the walk reads.
struct Walk<'a> {
    definition: &'a Definition,
    state: &'a RunState,
    moment: &'a Moment<'a>,
}

/// The next events, or none when only an input can move the run.
pub(super) fn next(
    definition: &Definition,
    state: &RunState,
    moment: &Moment<'_>,
    commands: &mut Vec<Command>,
) -> Result<Vec<Event>, Illegal> {
    if matches!(state.status, RunStatus::Pending | RunStatus::Paused) {
        return Ok(Vec::new());
    }
    Walk { definition, state, moment }.run(commands)
}

/// The events of a step's failure: a handler begins, or the step ends as failed.
pub(super) fn fail_step(
    definition: &Definition,
    state: &RunState,
    step: &Step,
    path: &str,
    failure: Failure,
    moment: &Moment<'_>,
) -> Result<Vec<Event>, Illegal> {
    Walk { definition, state, moment }.fail(step, path, failure)
}

/// Whether a hook's reason is a failure code, and not something that a run may wait for.
pub(crate) fn is_final(reason: &str) -> bool {
    reason.contains('.')
}

/// The container of a path, with its trailing slash.
fn container(path: &str) -> &str {
    path.rfind('/').map_or("", |at| &path[..=at])
}

impl Walk<'_> {
    fn place(&self, container: &str) -> Result<Place<'_>, Illegal> {
        Place::inside(self.definition, self.state, self.moment, container)
    }

    fn run(&self, commands: &mut Vec<Command>) -> Result<Vec<Event>, Illegal> {
        let (state, now) = (self.state, self.moment.now);
        if now >= state.deadline && state.ending.is_none() {
            commands.extend(stop_commands(state, ""));
            let failure = Failure::permanent("timeout.run_total", "the run took longer than its timeout");
            return Ok(vec![Event::RunEnding { ending: Ending::Failed { failure }, at: now }]);
        }
        let Some(frame) = &state.finally else {
            return match self.frame(&self.definition.steps, &state.body, "", state.ending.is_some(), commands)? {
                Progress::Emit(events) => Ok(events),
                Progress::Idle => Ok(Vec::new()),
                Progress::Ended(end) => self.body_ended(end),
            };
        };
        if now >= state.deadline {
            let late: Vec<String> = frame
                .nodes
                .iter()
                .filter(|(_, n)| n.live.is_some() && !n.stopping)
                .map(|(id, _)| format!("{FINALLY_PREFIX}{id}"))
                .collect();
            if !late.is_empty() {
                return Ok(late.into_iter().map(|path| self.stop(path, "timeout.run_total", commands)).collect());
            }
        }
        match self.frame(&self.definition.finally, frame, FINALLY_PREFIX, now >= state.deadline, commands)? {
            Progress::Emit(events) => Ok(events),
            Progress::Idle => Ok(Vec::new()),
            Progress::Ended(end) => {
                let failure = match end {
                    End::Succeeded(_) => None,
                    End::Failed(failure) => Some(failure),
                    End::Cancelled => {
                        let text = match state.cleanup {
                            Some(_) => "`finally` took longer than whoever cancelled the run gave it",
                            None => "`finally` took longer than an hour",
                        };
                        Some(Failure::permanent("timeout.run_total", text))
                    }
                };
                Ok(vec![self.closed(failure)?])
            }
        }
    }

    fn body_ended(&self, end: End) -> Result<Vec<Event>, Illegal> {
        let now = self.moment.now;
        if self.state.ending.is_none() {
            let ending = match end {
                End::Succeeded(_) => match self.place("")?.resolve_map(&self.definition.outputs) {
                    Ok(outputs) => Ending::Completed { output: Value::Object(outputs) },
                    Err(failure) => Ending::Failed { failure },
                },
                End::Failed(failure) => Ending::Failed { failure },
                End::Cancelled => Ending::Failed {
                    failure: Failure::permanent("internal.cancelled", "a step was cancelled by nobody"),
                },
            };
            return Ok(vec![Event::RunEnding { ending, at: now }]);
        }
        if self.definition.finally.is_empty() {
            return Ok(vec![self.closed(None)?]);
        }
        let deadline = now + Duration::milliseconds(FINALLY_MS);
        let deadline = self.state.cleanup.map_or(deadline, |cleanup| deadline.min(cleanup.until));
        Ok(vec![Event::FinallyStarted { at: now, deadline }])
    }

    /// The run's last event. A failure of `finally` turns completion into failure and never hides an earlier failure.
    fn closed(&self, finally_failure: Option<Failure>) -> Result<Event, Illegal> {
        let ending = self.state.ending.as_ref().ok_or_else(|| Illegal("closed without an ending".into()))?;
        let (status, output, failure) = match (ending, finally_failure) {
            (Ending::Completed { output }, None) => (RunStatus::Completed, Some(output.clone()), None),
            (Ending::Continued { .. }, None) => (RunStatus::Continued, None, None),
            (Ending::Completed { .. } | Ending::Continued { .. }, Some(failure)) => {
                (RunStatus::Failed, None, Some(failure))
            }
            (Ending::Failed { failure }, _) => (RunStatus::Failed, None, Some(failure.clone())),
            (Ending::Cancelled { reason }, _) => {
                (RunStatus::Cancelled, None, Some(Failure::permanent("cancelled", reason.clone())))
            }
        };
        Ok(Event::RunClosed { status, output, failure, at: self.moment.now })
    }

    fn stop(&self, path: String, reason: &str, commands: &mut Vec<Command>) -> Event {
        commands.extend(stop_commands(self.state, &path));
        Event::StopRequested { path, reason: reason.to_owned() }
    }

    /// Moves the steps of one block on.
    fn frame(
        &self,
        steps: &[Step],
        frame: &Frame,
        prefix: &str,
        stopping: bool,
        commands: &mut Vec<Command>,
    ) -> Result<Progress, Illegal> {
        let mut last = None;
        for step in steps {
            let Some(node) = frame.nodes.get(&step.id) else {
                if stopping {
                    return Ok(Progress::Ended(End::Cancelled));
                }
                return self.begin(step, prefix, commands).map(Progress::Emit);
            };
            if let Some(live) = &node.live {
                return self.node(step, node, live, &format!("{prefix}{}", step.id), commands);
            }
            match node.status {
                Some(StepStatus::Failed) if !node.tolerated => {
                    let failure = node
                        .failure
                        .clone()
                        .unwrap_or_else(|| Failure::permanent("internal.failure", "no failure recorded"));
                    return Ok(Progress::Ended(End::Failed(failure)));
                }
                Some(StepStatus::Cancelled) => return Ok(Progress::Ended(End::Cancelled)),
                Some(StepStatus::Succeeded | StepStatus::Recovered) => last.clone_from(&node.output),
                Some(StepStatus::Failed | StepStatus::Skipped) => {}
                None => return Err(Illegal(format!("`{prefix}{}` neither lives nor ended", step.id))),
            }
        }
        Ok(Progress::Ended(End::Succeeded(last)))
    }

    fn fail(&self, step: &Step, path: &str, mut failure: Failure) -> Result<Vec<Event>, Illegal> {
        failure.path.get_or_insert_with(|| path.to_owned());
        let catchable = !["timeout.run_total", "cancelled", "budget.run"].contains(&failure.code.as_str())
            && !failure.matches("internal.*");
        if catchable {
            let mut place = self.place(container(path))?;
            place.extra.insert("error".into(), error_value(&failure));
            for (handler, catch) in step.catch.iter().enumerate() {
                if !catch.on.iter().any(|p| failure.matches(p)) {
                    continue;
                }
                match catch.condition.as_ref().map_or(Ok(true), |c| expr::condition(c, &place)) {
                    Ok(true) => return Ok(vec![Event::CatchStarted { path: path.to_owned(), handler, failure }]),
                    Ok(false) => {}
                    Err(broken) => {
                        failure = broken.with_cause(failure);
                        break;
                    }
                }
            }
        }
        Ok(vec![Event::StepEnded {
            path: path.to_owned(),
            status: StepStatus::Failed,
            output: None,
            failure: Some(failure),
            tolerated: step.continue_on_error,
            hoist: hoists(step),
            extras: Value::Null,
            at: self.moment.now,
        }])
    }

    /// A step that was told to stop has stopped.
    fn cancelled(&self, step: &Step, path: &str) -> Progress {
        Progress::Emit(vec![Event::StepEnded {
            path: path.to_owned(),
            status: StepStatus::Cancelled,
            output: None,
            failure: None,
            tolerated: false,
            hoist: hoists(step),
            extras: Value::Null,
            at: self.moment.now,
        }])
    }

    /// Moves one live step on.
    fn node(
        &self,
        step: &Step,
        node: &Node,
        live: &Live,
        path: &str,
        commands: &mut Vec<Command>,
    ) -> Result<Progress, Illegal> {
        let now = self.moment.now;
        if let Some(progress) = self.overdue(step, node, live, path, commands)? {
            return Ok(progress);
        }
        match live {
            Live::Activity { .. } => self.activity(step, node, live, path, commands),
            Live::Wait { until } => {
                if node.stopping {
                    return Ok(self.cancelled(step, path));
                }
                if now < *until {
                    return Ok(Progress::Idle);
                }
                let waited = node.started_at.map_or(0, |at| (now - at).num_milliseconds().max(0));
                Ok(Progress::Emit(vec![step_ended(
                    path,
                    StepStatus::Succeeded,
                    Some(json!({ "waited_ms": waited })),
                    None,
                    now,
                )]))
            }
            Live::Await { .. } => self.awaiting(step, node, live, path),
            Live::Call { .. } => Ok(self.calling(step, node, live, path, commands)),
            Live::Group { frame } | Live::Switch { frame, .. } => {
                let steps =
                    live_children(step, live, Below::Block).ok_or_else(|| Illegal(format!("`{path}` is no block")))?;
                match self.frame(steps, frame, &format!("{path}/"), node.stopping, commands)? {
                    Progress::Ended(End::Succeeded(last)) => self.block_succeeded(step, live, path, last),
                    other => self.block_ended(step, path, other),
                }
            }
            Live::Catch { frame, failure, .. } => {
                let steps = live_children(step, live, Below::Catch)
                    .ok_or_else(|| Illegal(format!("`{path}` has no handler")))?;
                match self.frame(steps, frame, &format!("{path}!/"), node.stopping, commands)? {
                    Progress::Ended(End::Succeeded(last)) => Ok(Progress::Emit(vec![step_ended(
                        path,
                        StepStatus::Recovered,
                        last,
                        Some(failure.clone()),
                        now,
                    )])),
                    // A failure inside a handler replaces the first one and keeps it as its cause.
                    Progress::Ended(End::Failed(second)) => Ok(Progress::Emit(vec![Event::StepEnded {
                        path: path.to_owned(),
                        status: StepStatus::Failed,
                        output: None,
                        failure: Some(second.with_cause(failure.clone())),
                        tolerated: step.continue_on_error,
                        hoist: false,
                        extras: Value::Null,
                        at: now,
                    }])),
                    other => self.block_ended(step, path, other),
                }
            }
            Live::Repeat { round, frame, previous: _, delayed_until } => {
                self.repeat(step, node, path, (*round, frame, *delayed_until), commands)
            }
            Live::Foreach { .. } => self.foreach(step, node, live, path, commands),
            Live::Parallel { branches, winner } => {
                self.parallel(step, node, (branches, winner.as_deref()), path, commands)
            }
        }
    }

    fn activity(
        &self,
        step: &Step,
        node: &Node,
        live: &Live,
        path: &str,
        commands: &mut Vec<Command>,
    ) -> Result<Progress, Illegal> {
        let Live::Activity {
            activity,
            input,
            overrides,
            attempt,
            counted,
            lost,
            phase,
            queue_deadline,
            total_deadline,
        } = live
        else {
            return Err(Illegal(format!("`{path}` is no activity")));
        };
        let now = self.moment.now;
        if matches!(phase, Phase::Running { .. }) {
            return Ok(Progress::Idle);
        }
        if node.stopping {
            return Ok(self.cancelled(step, path));
        }
        if total_deadline.is_some_and(|t| now >= t) {
            let last = if let Phase::Backoff { failure, .. } = phase { Some(failure.clone()) } else { None };
            let failure = Failure::permanent("timeout.total", "the step took longer than its total timeout");
            return Ok(Progress::Emit(self.fail(step, path, with_cause(failure, last))?));
        }
        match phase {
            Phase::Running { .. } => Ok(Progress::Idle),
            Phase::Backoff { until, .. } if now < *until => Ok(Progress::Idle),
            Phase::Blocked { since, .. } if now < *since + Duration::milliseconds(BLOCKED_RETRY_MS) => {
                Ok(Progress::Idle)
            }
            Phase::Backoff { .. } | Phase::Blocked { .. } => {
                Ok(Progress::Emit(vec![Event::AttemptReady { path: path.to_owned() }]))
            }
            Phase::Queued => {
                if lost_too_often(*lost) {
                    let text = format!("its worker died in {lost} attempts");
                    return Ok(Progress::Emit(self.fail(
                        step,
                        path,
                        Failure::permanent("transient.worker_lost", text),
                    )?));
                }
                if *attempt == 0 && now >= *queue_deadline {
                    let failure = Failure::permanent("timeout.queue", "no worker took the step in time");
                    return Ok(Progress::Emit(self.fail(step, path, failure)?));
                }
                if self.state.executions >= self.definition.executions_max {
                    let most = self.definition.executions_max;
                    let failure =
                        Failure::permanent("limit.executions", format!("the run made {most} executions, its limit"));
                    return Ok(Progress::Emit(self.fail(step, path, failure)?));
                }
                let Some(signature) = self.moment.catalog.get(activity) else { return Ok(Progress::Idle) };
                if let (true, Some((reason, message))) = (signature.metered, self.moment.refused.of(path)) {
                    if is_final(reason) {
                        let failure = Failure::permanent(reason, message);
                        return Ok(Progress::Emit(self.fail(step, path, failure)?));
                    }
                    return Ok(Progress::Emit(vec![Event::AttemptBlocked {
                        path: path.to_owned(),
                        reason: reason.to_owned(),
                        message: message.to_owned(),
                        at: now,
                    }]));
                }
                let permits = self.moment.permits.get();
                if permits == 0 {
                    return Ok(Progress::Idle);
                }
                self.moment.permits.set(permits - 1);
                let number = attempt + 1;
                let attempt_id = AttemptId::derive(self.state.run_id, path, number);
                let deadline = (now + millis(step.timeouts.run_ms))
                    .min(total_deadline.unwrap_or(self.state.deadline))
                    .min(self.state.deadline);
                let mut input = input.clone();
                for (from, values) in overrides {
                    if counted + 1 >= *from
                        && let Value::Object(map) = &mut input
                    {
                        map.extend(values.clone());
                    }
                }
                commands.push(Command::StartAttempt {
                    path: path.to_owned(),
                    attempt: number,
                    attempt_id,
                    activity: activity.clone(),
                    counted: counted + 1,
                    input,
                    deadline,
                    heartbeat_ms: step.timeouts.heartbeat_ms.or(signature.heartbeat_timeout_ms),
                });
                Ok(Progress::Emit(vec![Event::AttemptStarted {
                    path: path.to_owned(),
                    attempt: number,
                    attempt_id,
                    activity: activity.clone(),
                    at: now,
                    deadline,
                }]))
            }
        }
    }
}

/// Whether the steps of the last round stay visible beside the step, however it ends: `finally` reads them.
fn hoists(step: &Step) -> bool {
    matches!(step.kind, Kind::Repeat { transparent: true, .. })
}

fn with_cause(failure: Failure, cause: Option<Failure>) -> Failure {
    match cause {
        Some(cause) => failure.with_cause(cause),
        None => failure,
    }
}
