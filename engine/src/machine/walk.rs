//! Finds the next thing that can happen in the tree. Reads the state and the definition, writes nothing: what it finds is
//! returned as events, folded by the caller, and the walk begins again.

use super::{
    BLOCKED_RETRY_MS, CALL_DEPTH_MAX, Command, FINALLY_MS, Illegal, Moment, call_key,
    react::{lost_too_often, step_ended, stop_commands},
    scope::{Place, error_value, live_children},
    state::{
        Below, Branch, Ended, FINALLY_PREFIX, Frame, Live, Message, Node, Phase, RunState, path_key, split_segment,
    },
    timer::millis,
};
use crate::{
    definition::{
        Await, Definition, Exhausted, Expr, Join, Kind, OnCancel, OnItemFailure, OnTimeout, RepeatCondition, Step,
        WaitUntil, expr,
    },
    event::{Ending, Event, Opened, StepStatus},
    failure::Failure,
    ids::{AttemptId, RunId},
    view::RunStatus,
};
use chrono::{DateTime, Duration, Utc};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

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
    if state.status == RunStatus::Pending {
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
                        Some(Failure::permanent("timeout.run_total", "`finally` took longer than an hour"))
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
        Ok(vec![Event::FinallyStarted { at: now, deadline: now + Duration::milliseconds(FINALLY_MS) }])
    }

    /// The run's last event. A failure of `finally` turns completion into failure and never hides an earlier failure.
    fn closed(&self, finally_failure: Option<Failure>) -> Result<Event, Illegal> {
        let ending = self.state.ending.as_ref().ok_or_else(|| Illegal("closed without an ending".into()))?;
        let (status, output, failure) = match (ending, finally_failure) {
            (Ending::Completed { output }, None) => (RunStatus::Completed, Some(output.clone()), None),
            (Ending::Completed { .. }, Some(failure)) => (RunStatus::Failed, None, Some(failure)),
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

    /// The events of a step that begins.
    fn begin(&self, step: &Step, prefix: &str, commands: &mut Vec<Command>) -> Result<Vec<Event>, Illegal> {
        let path = format!("{prefix}{}", step.id);
        let now = self.moment.now;
        let place = self.place(prefix)?;
        let begun = |opened| Event::StepStarted { path: path.clone(), at: now, opened };
        let failed = |failure: Failure| -> Result<Vec<Event>, Illegal> {
            let mut events = vec![begun(Opened::Group)];
            events.extend(self.fail(step, &path, failure)?);
            Ok(events)
        };
        if self.state.executions >= self.definition.executions_max {
            let most = self.definition.executions_max;
            return failed(Failure::permanent(
                "limit.executions",
                format!("the run made {most} executions, its limit"),
            ));
        }
        if let Some(condition) = &step.condition {
            match expr::condition(condition, &place) {
                Ok(true) => {}
                Ok(false) => return Ok(vec![Event::StepSkipped { path, reason: "if".into() }]),
                Err(failure) => return failed(failure),
            }
        }
        let total = step.timeouts.total_ms.map(|ms| now + millis(ms));
        let opened: Result<Vec<Event>, Failure> = match &step.kind {
            Kind::Activity { name, with } => place.resolve_map(with).and_then(|input| {
                let overrides = step
                    .retry
                    .escalate
                    .iter()
                    .map(|e| Ok((e.from_attempt, place.resolve_map(&e.with)?)))
                    .collect::<Result<Vec<_>, Failure>>()?;
                Ok(vec![begun(Opened::Activity {
                    activity: name.clone(),
                    input: Value::Object(input),
                    overrides,
                    queue_deadline: now + millis(step.timeouts.queue_ms),
                    total_deadline: total,
                })])
            }),
            Kind::Set { values } => place.resolve_map(values).map(|output| {
                vec![
                    begun(Opened::Group),
                    step_ended(&path, StepStatus::Succeeded, Some(Value::Object(output)), None, now),
                ]
            }),
            Kind::Group { .. } => Ok(vec![begun(Opened::Group)]),
            Kind::Parallel { branches, .. } => {
                Ok(vec![begun(Opened::Parallel { branches: branches.iter().map(|b| b.name.clone()).collect() })])
            }
            Kind::Foreach { list, key, max_items, .. } => self
                .items(list, key.as_ref(), *max_items, place)
                .map(|(keys, items)| vec![begun(Opened::Foreach { keys, items })]),
            Kind::Repeat { .. } => Ok(vec![
                begun(Opened::Repeat),
                Event::RoundStarted { path: path.clone(), round: 1, previous: Value::Null },
            ]),
            Kind::Switch { cases } => {
                let mut chosen = Ok(None);
                for (index, case) in cases.iter().enumerate() {
                    match case.when.as_ref().map_or(Ok(true), |when| expr::condition(when, &place)) {
                        Ok(true) => {
                            chosen = Ok(Some(index));
                            break;
                        }
                        Ok(false) => {}
                        Err(failure) => {
                            chosen = Err(failure);
                            break;
                        }
                    }
                }
                chosen.map(|case| match case {
                    Some(case) => vec![begun(Opened::Switch { case })],
                    None => vec![
                        begun(Opened::Group),
                        step_ended(
                            &path,
                            StepStatus::Succeeded,
                            Some(json!({ "case": -1, "output": null })),
                            None,
                            now,
                        ),
                    ],
                })
            }
            Kind::Wait { until } => wait_until(until, now, &place).map(|until| vec![begun(Opened::Wait { until })]),
            Kind::Await(spec) => spec.show.as_ref().map(|t| place.render(t)).transpose().map(|show| {
                vec![begun(Opened::Await {
                    signal: spec.signal.clone(),
                    deadline: now + millis(spec.timeout_ms),
                    show,
                })]
            }),
            Kind::Call { workflow, version, with, on_cancel } => {
                if self.moment.depth >= CALL_DEPTH_MAX {
                    let text = format!(
                        "`{workflow}` is not started: at most {CALL_DEPTH_MAX} runs may stand one below the other; \
                         end the chain of calls earlier, or see whether a workflow calls itself"
                    );
                    return failed(Failure::permanent("call.failed", text));
                }
                let key = call_key(workflow, version);
                let pinned = self.state.calls.get(&key).or_else(|| self.moment.calls.get(&key));
                let Some(definition) = pinned else {
                    return failed(Failure::permanent("call.failed", format!("no workflow `{workflow}` is deployed")));
                };
                place.resolve_map(with).map(|inputs| {
                    let child = child_id(self.state.run_id, &path, now);
                    commands.push(Command::StartChild {
                        path: path.clone(),
                        run_id: child,
                        workflow: workflow.clone(),
                        definition: *definition,
                        inputs: Value::Object(inputs.clone()),
                    });
                    vec![begun(Opened::Call {
                        child,
                        workflow: workflow.clone(),
                        inputs: Value::Object(inputs),
                        definition: definition.to_string(),
                        propagate: *on_cancel == OnCancel::Propagate,
                    })]
                })
            }
            Kind::Fail { code, message } => {
                let message = match message.as_ref().map(|m| place.resolve(m)).transpose() {
                    Ok(Some(Value::String(text))) => text,
                    Ok(Some(other)) => other.to_string(),
                    Ok(None) => "the workflow says so".to_owned(),
                    Err(failure) => return failed(failure),
                };
                return failed(Failure::permanent(code.clone(), message));
            }
            Kind::Finish { outputs } => place.resolve_map(outputs).map(|outputs| {
                commands.extend(stop_commands(self.state, ""));
                let output = Value::Object(outputs);
                vec![
                    begun(Opened::Group),
                    step_ended(&path, StepStatus::Succeeded, Some(output.clone()), None, now),
                    Event::RunEnding { ending: Ending::Completed { output }, at: now },
                ]
            }),
        };
        match opened {
            Ok(events) => Ok(events),
            Err(failure) => failed(failure),
        }
    }

    fn items(
        &self,
        list: &Expr,
        key: Option<&Expr>,
        max_items: u32,
        mut place: Place<'_>,
    ) -> Result<(Vec<String>, Vec<Value>), Failure> {
        let items = match expr::evaluate(list, &place)? {
            Value::Array(items) => items,
            other => {
                return Err(Failure::permanent(
                    "expr.type",
                    format!("`{}` is {}, not a list", list.0, expr::type_name(&other)),
                ));
            }
        };
        if items.len() > max_items as usize {
            return Err(Failure::permanent(
                "limit.items",
                format!("{} items; at most {max_items} are allowed", items.len()),
            ));
        }
        let mut keys = Vec::with_capacity(items.len());
        for (index, item) in items.iter().enumerate() {
            let Some(key) = key else {
                keys.push(index.to_string());
                continue;
            };
            place.extra.insert("item".into(), item.clone());
            place.extra.insert("index".into(), index.into());
            match expr::evaluate(key, &place)? {
                Value::String(text) if !text.is_empty() => keys.push(path_key(&text)),
                Value::Number(n) => keys.push(path_key(&n.to_string())),
                _ => {
                    return Err(Failure::permanent(
                        "limit.keys",
                        format!("`{}` must be text or a whole number", key.0),
                    ));
                }
            }
        }
        let mut seen = std::collections::BTreeSet::new();
        if let Some(twice) = keys.iter().find(|k| !seen.insert(k.as_str())) {
            return Err(Failure::permanent("limit.keys", format!("two items have the key `{twice}`")));
        }
        Ok((keys, items))
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
            Live::Call { propagate, .. } => {
                if node.stopping && !propagate {
                    Ok(self.cancelled(step, path))
                } else {
                    Ok(Progress::Idle)
                }
            }
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

    /// A block, a wait or a call whose total timeout is over. What is under way below it is told to stop first, and the
    /// failure stands when all of it has: an attempt that is left behind would never be closed.
    fn overdue(
        &self,
        step: &Step,
        node: &Node,
        live: &Live,
        path: &str,
        commands: &mut Vec<Command>,
    ) -> Result<Option<Progress>, Illegal> {
        let (Some(total), Some(began), false) = (step.timeouts.total_ms, node.started_at, node.stopping) else {
            return Ok(None);
        };
        if matches!(live, Live::Activity { .. } | Live::Catch { .. }) || self.moment.now < began + millis(total) {
            return Ok(None);
        }
        let fresh = self.live_children_of(live, path);
        if !fresh.is_empty() {
            let stops = fresh.into_iter().map(|p| self.stop(p, "timeout.total", commands)).collect();
            return Ok(Some(Progress::Emit(stops)));
        }
        let mut idle = false;
        for (suffix, frame) in live.frames() {
            let segment = format!("{}{suffix}", step.id);
            let steps = live_children(step, live, split_segment(&segment).1)
                .ok_or_else(|| Illegal(format!("`{path}{suffix}` is no block")))?;
            match self.frame(steps, frame, &format!("{path}{suffix}/"), true, commands)? {
                Progress::Emit(events) => return Ok(Some(Progress::Emit(events))),
                Progress::Idle => idle = true,
                Progress::Ended(_) => {}
            }
        }
        if idle {
            return Ok(Some(Progress::Idle));
        }
        if let Live::Call { child, propagate: true, .. } = live {
            commands.push(Command::CancelChild { run_id: *child });
        }
        let failure = Failure::permanent("timeout.total", "the step took longer than its total timeout");
        Ok(Some(Progress::Emit(self.fail(step, path, failure)?)))
    }

    /// Paths of the live steps directly below, those that are not stopping yet.
    fn live_children_of(&self, live: &Live, path: &str) -> Vec<String> {
        live.frames()
            .into_iter()
            .flat_map(|(suffix, frame)| {
                frame
                    .nodes
                    .iter()
                    .filter(|(_, n)| n.live.is_some() && !n.stopping)
                    .map(move |(id, _)| format!("{path}{suffix}/{id}"))
            })
            .collect()
    }

    fn block_succeeded(&self, step: &Step, live: &Live, path: &str, last: Option<Value>) -> Result<Progress, Illegal> {
        let output = match (&step.kind, live) {
            (Kind::Group { outputs: Some(outputs), .. }, _) => {
                match self.place(&format!("{path}/"))?.resolve_map(outputs) {
                    Ok(map) => Some(Value::Object(map)),
                    Err(failure) => return Ok(Progress::Emit(self.fail(step, path, failure)?)),
                }
            }
            (_, Live::Switch { case, .. }) => Some(json!({ "case": case, "output": last })),
            _ => last,
        };
        Ok(Progress::Emit(vec![step_ended(path, StepStatus::Succeeded, output, None, self.moment.now)]))
    }

    fn block_ended(&self, step: &Step, path: &str, progress: Progress) -> Result<Progress, Illegal> {
        match progress {
            Progress::Ended(End::Failed(failure)) => Ok(Progress::Emit(self.fail(step, path, failure)?)),
            Progress::Ended(End::Cancelled) => Ok(self.cancelled(step, path)),
            Progress::Ended(End::Succeeded(output)) => {
                Ok(Progress::Emit(vec![step_ended(path, StepStatus::Succeeded, output, None, self.moment.now)]))
            }
            other => Ok(other),
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

    fn repeat(
        &self,
        step: &Step,
        node: &Node,
        path: &str,
        (round, frame, delayed_until): (u32, &Frame, Option<DateTime<Utc>>),
        commands: &mut Vec<Command>,
    ) -> Result<Progress, Illegal> {
        let Kind::Repeat { steps, max_rounds, condition, delay_ms, exhausted, transparent, gate, outputs } = &step.kind
        else {
            return Err(Illegal(format!("`{path}` is no repeat")));
        };
        let now = self.moment.now;
        let next_round =
            || Event::RoundStarted { path: path.to_owned(), round: round + 1, previous: outputs_of(frame) };
        if let Some(until) = delayed_until {
            if node.stopping {
                return Ok(self.cancelled(step, path));
            }
            return Ok(if now < until { Progress::Idle } else { Progress::Emit(vec![next_round()]) });
        }
        let inside = format!("{path}~{round}/");
        let last = match self.frame(steps, frame, &inside, node.stopping, commands)? {
            Progress::Ended(End::Succeeded(last)) => last,
            other => return self.block_ended(step, path, other),
        };
        if node.stopping {
            return Ok(self.cancelled(step, path));
        }
        let place = self.place(&inside)?;
        let open = gate.as_ref().is_none_or(|id| {
            frame.nodes.get(id).is_some_and(|n| matches!(n.status, Some(StepStatus::Succeeded | StepStatus::Recovered)))
        });
        let again = if open {
            let decided = match condition {
                RepeatCondition::Until(e) => expr::condition(e, &place).map(|b| !b),
                RepeatCondition::While(e) => expr::condition(e, &place),
            };
            match decided {
                Ok(again) => again,
                Err(failure) => return Ok(Progress::Emit(self.fail(step, path, failure)?)),
            }
        } else {
            false
        };
        if again && round < *max_rounds {
            return Ok(Progress::Emit(vec![if *delay_ms > 0 {
                Event::RoundDelayed { path: path.to_owned(), until: now + millis(*delay_ms) }
            } else {
                next_round()
            }]));
        }
        if again && *exhausted == Exhausted::Fail {
            let failure = Failure::permanent("limit.rounds", format!("{max_rounds} rounds did not meet the condition"));
            return Ok(Progress::Emit(self.fail(step, path, failure)?));
        }
        let output = match outputs.as_ref().map(|map| place.resolve_map(map)) {
            None => last,
            Some(Ok(map)) => Some(Value::Object(map)),
            Some(Err(failure)) => return Ok(Progress::Emit(self.fail(step, path, failure)?)),
        };
        Ok(Progress::Emit(vec![Event::StepEnded {
            path: path.to_owned(),
            status: StepStatus::Succeeded,
            output,
            failure: None,
            tolerated: false,
            hoist: *transparent,
            extras: json!({ "exhausted": again }),
            at: now,
        }]))
    }

    fn foreach(
        &self,
        step: &Step,
        node: &Node,
        live: &Live,
        path: &str,
        commands: &mut Vec<Command>,
    ) -> Result<Progress, Illegal> {
        let (
            Live::Foreach { keys, items, next, active, results },
            Kind::Foreach { concurrency, on_item_failure, steps, outputs, .. },
        ) = (live, &step.kind)
        else {
            return Err(Illegal(format!("`{path}` is no foreach")));
        };
        let first_failure = results.values().find(|r| r.status == StepStatus::Failed).and_then(|r| r.failure.clone());
        let failing = *on_item_failure == OnItemFailure::FailFast && first_failure.is_some();
        if failing {
            let rest = self.live_children_of(live, path);
            if !rest.is_empty() {
                return Ok(Progress::Emit(rest.into_iter().map(|p| self.stop(p, "item failed", commands)).collect()));
            }
        }
        let stopping = node.stopping || failing;
        for (index, frame) in active {
            let inside = format!("{path}[{}]/", keys[*index]);
            let ended = match self.frame(steps, frame, &inside, stopping, commands)? {
                Progress::Emit(events) => return Ok(Progress::Emit(events)),
                Progress::Idle => continue,
                Progress::Ended(End::Succeeded(last)) => {
                    match outputs.as_ref().map(|map| self.outputs_at(&inside, map)) {
                        None => Ended { status: StepStatus::Succeeded, output: last, failure: None },
                        Some(Ok(map)) => {
                            Ended { status: StepStatus::Succeeded, output: Some(Value::Object(map)), failure: None }
                        }
                        Some(Err(ResolveError::Failure(f))) => {
                            Ended { status: StepStatus::Failed, output: None, failure: Some(*f) }
                        }
                        Some(Err(ResolveError::Illegal(e))) => return Err(e),
                    }
                }
                Progress::Ended(End::Failed(f)) => Ended { status: StepStatus::Failed, output: None, failure: Some(f) },
                Progress::Ended(End::Cancelled) => Ended { status: StepStatus::Cancelled, output: None, failure: None },
            };
            return Ok(Progress::Emit(vec![Event::ItemEnded {
                path: path.to_owned(),
                index: *index,
                status: ended.status,
                output: ended.output,
                failure: ended.failure,
            }]));
        }
        if !stopping && *next < items.len() && active.len() < *concurrency as usize {
            return Ok(Progress::Emit(vec![Event::ItemStarted { path: path.to_owned(), index: *next }]));
        }
        if !active.is_empty() {
            return Ok(Progress::Idle);
        }
        if node.stopping {
            return Ok(self.cancelled(step, path));
        }
        if let (Some(failure), true) = (first_failure, *on_item_failure != OnItemFailure::Continue) {
            return Ok(Progress::Emit(self.fail(step, path, failure)?));
        }
        let list: Vec<Value> = results
            .iter()
            .map(|(index, r)| ended_value(r, &[("index", (*index).into()), ("key", keys[*index].as_str().into())]))
            .collect();
        Ok(Progress::Emit(vec![step_ended(
            path,
            StepStatus::Succeeded,
            Some(Value::Array(list)),
            None,
            self.moment.now,
        )]))
    }

    fn parallel(
        &self,
        step: &Step,
        node: &Node,
        (branches, winner): (&BTreeMap<String, Branch>, Option<&str>),
        path: &str,
        commands: &mut Vec<Command>,
    ) -> Result<Progress, Illegal> {
        let Kind::Parallel { branches: specs, join, fail_fast } = &step.kind else {
            return Err(Illegal(format!("`{path}` is no parallel")));
        };
        let total = specs.len();
        let count = |status| branches.values().filter(|b| b.ended.as_ref().is_some_and(|e| e.status == status)).count();
        let (good, bad) = (
            count(StepStatus::Succeeded),
            total - count(StepStatus::Succeeded) - branches.values().filter(|b| b.ended.is_none()).count(),
        );
        let all_ended = branches.values().all(|b| b.ended.is_some());
        // Some(true): succeeds; Some(false): fails; None: undecided.
        let decided = match join {
            Join::All if bad > 0 && (*fail_fast || all_ended) => Some(false),
            Join::All | Join::Settled => all_ended.then_some(true),
            Join::First if good > 0 => Some(true),
            Join::First => all_ended.then_some(false),
            Join::AtLeast(n) if good >= *n as usize => Some(true),
            Join::AtLeast(n) => (total - bad < *n as usize).then_some(false),
        };
        let stopping = node.stopping || decided.is_some();
        let mut idle = false;
        for spec in specs {
            let Some(branch) = branches.get(&spec.name).filter(|b| b.ended.is_none()) else { continue };
            if decided.is_some() && !node.stopping {
                let rest: Vec<String> = branch
                    .frame
                    .nodes
                    .iter()
                    .filter(|(_, n)| n.live.is_some() && !n.stopping)
                    .map(|(id, _)| format!("{path}:{}/{id}", spec.name))
                    .collect();
                if !rest.is_empty() {
                    return Ok(Progress::Emit(rest.into_iter().map(|p| self.stop(p, "lost race", commands)).collect()));
                }
            }
            let (status, output, failure) =
                match self.frame(&spec.steps, &branch.frame, &format!("{path}:{}/", spec.name), stopping, commands)? {
                    Progress::Emit(events) => return Ok(Progress::Emit(events)),
                    Progress::Idle => {
                        idle = true;
                        continue;
                    }
                    Progress::Ended(End::Succeeded(last)) => (StepStatus::Succeeded, last, None),
                    Progress::Ended(End::Failed(f)) => (StepStatus::Failed, None, Some(f)),
                    Progress::Ended(End::Cancelled) => (StepStatus::Cancelled, None, None),
                };
            return Ok(Progress::Emit(vec![Event::BranchEnded {
                path: path.to_owned(),
                branch: spec.name.clone(),
                status,
                output,
                failure,
            }]));
        }
        if idle {
            return Ok(Progress::Idle);
        }
        if node.stopping {
            return Ok(self.cancelled(step, path));
        }
        if decided == Some(false) {
            let cause = branches.values().filter_map(|b| b.ended.as_ref()).find_map(|e| e.failure.clone());
            let failure = match (join, cause) {
                (Join::All, Some(cause)) => cause,
                (Join::First, cause) => {
                    with_cause(Failure::permanent("join.none_succeeded", "no branch succeeded"), cause)
                }
                (_, cause) => with_cause(Failure::permanent("join.failed", "too few branches succeeded"), cause),
            };
            return Ok(Progress::Emit(self.fail(step, path, failure)?));
        }
        let map: Map<String, Value> =
            branches.iter().filter_map(|(name, b)| Some((name.clone(), ended_value(b.ended.as_ref()?, &[])))).collect();
        let output = json!({ "winner": winner, "branches": map });
        Ok(Progress::Emit(vec![step_ended(path, StepStatus::Succeeded, Some(output), None, self.moment.now)]))
    }

    fn awaiting(&self, step: &Step, node: &Node, live: &Live, path: &str) -> Result<Progress, Illegal> {
        let (Live::Await { signal, deadline, reminded, counted, .. }, Kind::Await(spec)) = (live, &step.kind) else {
            return Err(Illegal(format!("`{path}` is no await")));
        };
        if node.stopping {
            return Ok(self.cancelled(step, path));
        }
        let now = self.moment.now;
        for message in self.state.mailbox.iter().filter(|m| m.name == *signal) {
            // Nobody decides on what was not shown yet: a second click on the plan of the round before approves nothing.
            if spec.approval.is_some() && node.started_at.is_some_and(|began| message.at < began) {
                return Ok(Progress::Emit(vec![Event::SignalConsumed { path: path.to_owned(), n: message.n }]));
            }
            if let Some(filter) = &spec.filter {
                let mut place = self.place(container(path))?;
                let mut candidate = message.payload.clone();
                if let Value::Object(map) = &mut candidate {
                    map.insert("meta".into(), json!({ "by": message.sender }));
                }
                place.extra.insert("signal".into(), candidate);
                match expr::condition(filter, &place) {
                    Ok(true) => {}
                    Ok(false) => continue,
                    Err(failure) => return Ok(Progress::Emit(self.fail(step, path, failure)?)),
                }
            }
            return self.message(step, spec, message, counted, path).map(Progress::Emit);
        }
        if now >= *deadline {
            return self.await_timed_out(step, spec, path).map(Progress::Emit);
        }
        if let (Some(after), Some(began)) = (spec.remind_ms.get(*reminded as usize), node.started_at)
            && now >= began + millis(*after)
        {
            return Ok(Progress::Emit(vec![Event::Reminded { path: path.to_owned(), count: reminded + 1 }]));
        }
        Ok(Progress::Idle)
    }

    /// The events of one message that an await takes.
    fn message(
        &self,
        step: &Step,
        spec: &Await,
        message: &Message,
        counted: &[String],
        path: &str,
    ) -> Result<Vec<Event>, Illegal> {
        let consumed = Event::SignalConsumed { path: path.to_owned(), n: message.n };
        // Surfaces check the form before they send; what slipped through is dropped here.
        if spec.form.as_ref().is_some_and(|form| !jsonschema::is_valid(form, &message.payload)) {
            return Ok(vec![consumed]);
        }
        let extras = json!({ "by": message.sender, "at": message.at, "timed_out": false });
        let succeed = |output: Value| Event::StepEnded {
            path: path.to_owned(),
            status: StepStatus::Succeeded,
            output: Some(output),
            failure: None,
            tolerated: false,
            hoist: false,
            extras: extras.clone(),
            at: self.moment.now,
        };
        let Some(approval) = spec.approval else { return Ok(vec![consumed, succeed(message.payload.clone())]) };
        let field = |name: &str| message.payload.get(name).cloned().unwrap_or(Value::Null);
        let decision = field("decision");
        let output = json!({
            "decision": decision,
            "by": message.sender,
            "at": message.at,
            "comment": field("comment").as_str().unwrap_or_default(),
            "data": field("data"),
        });
        match decision.as_str() {
            Some("approved") => {
                let sender = message.sender.clone().unwrap_or_default();
                if counted.contains(&sender) {
                    return Ok(vec![consumed]);
                }
                if counted.len() + 1 < approval.quorum as usize {
                    return Ok(vec![Event::DecisionCounted { path: path.to_owned(), n: message.n }]);
                }
                Ok(vec![consumed, succeed(output)])
            }
            Some("rejected") if approval.fail_on_reject => {
                let text = field("comment")
                    .as_str()
                    .filter(|c| !c.is_empty())
                    .map_or_else(|| "rejected".to_owned(), |c| format!("rejected: {c}"));
                let mut events = vec![consumed];
                events.extend(self.fail(
                    step,
                    path,
                    Failure::permanent("approval.rejected", text).with_detail(output),
                )?);
                Ok(events)
            }
            Some("rejected" | "changes_requested") => Ok(vec![consumed, succeed(output)]),
            _ => Ok(vec![consumed]),
        }
    }

    fn await_timed_out(&self, step: &Step, spec: &Await, path: &str) -> Result<Vec<Event>, Illegal> {
        let now = self.moment.now;
        let decided =
            |decision: &str| Ok(json!({ "decision": decision, "by": null, "at": now, "comment": "", "data": null }));
        let code = if spec.approval.is_some() { "approval.timeout" } else { "signal.timeout" };
        let output = match (spec.on_timeout, &spec.default) {
            (OnTimeout::Default, Some(default)) => self.place(container(path))?.resolve(default),
            (OnTimeout::Approve, _) => decided("approved"),
            (OnTimeout::Reject, _) if spec.approval.is_some_and(|a| a.fail_on_reject) => {
                Err(Failure::permanent("approval.rejected", "nobody decided in time, which counts as rejected"))
            }
            (OnTimeout::Reject, _) => decided("rejected"),
            (OnTimeout::Fail | OnTimeout::Default, _) => Err(Failure::permanent(code, "nobody answered in time")),
        };
        match output {
            Err(failure) => self.fail(step, path, failure),
            Ok(output) => Ok(vec![Event::StepEnded {
                path: path.to_owned(),
                status: StepStatus::Succeeded,
                output: Some(output),
                failure: None,
                tolerated: false,
                hoist: false,
                extras: json!({ "by": null, "at": now, "timed_out": true }),
                at: now,
            }]),
        }
    }
}

/// Data that cannot be evaluated, or a broken invariant on the way to it.
enum ResolveError {
    Failure(Box<Failure>),
    Illegal(Illegal),
}

impl From<Illegal> for ResolveError {
    fn from(illegal: Illegal) -> Self {
        Self::Illegal(illegal)
    }
}

impl Walk<'_> {
    fn outputs_at(
        &self,
        container: &str,
        map: &BTreeMap<String, crate::definition::Data>,
    ) -> Result<Map<String, Value>, ResolveError> {
        self.place(container)?.resolve_map(map).map_err(|f| ResolveError::Failure(Box::new(f)))
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

/// Outputs of a round by step id: what the next round sees as `round.previous`.
fn outputs_of(frame: &Frame) -> Value {
    Value::Object(frame.nodes.iter().filter_map(|(id, node)| Some((id.clone(), node.output.clone()?))).collect())
}

/// An item or branch in its step's output.
fn ended_value(ended: &Ended, fields: &[(&str, Value)]) -> Value {
    let mut map: Map<String, Value> = fields.iter().map(|(k, v)| ((*k).to_owned(), v.clone())).collect();
    map.insert("status".into(), super::scope::status_name(ended.status).into());
    map.insert("output".into(), ended.output.clone().unwrap_or(Value::Null));
    map.insert("error".into(), ended.failure.as_ref().map_or(Value::Null, error_value));
    Value::Object(map)
}

fn wait_until(until: &WaitUntil, now: DateTime<Utc>, place: &Place<'_>) -> Result<DateTime<Utc>, Failure> {
    match until {
        WaitUntil::For(ms) => Ok(now + millis(*ms)),
        WaitUntil::Instant { at, max_ms } => {
            let value = expr::evaluate(at, place)?;
            let instant = value
                .as_str()
                .and_then(|text| DateTime::parse_from_rfc3339(text).ok())
                .ok_or_else(|| Failure::permanent("expr.type", format!("`{}` is no RFC 3339 instant", at.0)))?
                .to_utc();
            if instant > now + millis(*max_ms) {
                return Err(Failure::permanent("limit.wait", "the instant lies beyond `max`"));
            }
            Ok(instant)
        }
    }
}

/// A child's id: a UUIDv7 of this moment whose random part is derived from (parent, step path), so that deciding the
/// same step again at the same instant names the same child.
fn child_id(parent: RunId, path: &str, now: DateTime<Utc>) -> RunId {
    let derived = uuid::Uuid::new_v5(&parent.0, path.as_bytes());
    let mut bytes = *derived.as_bytes();
    let ms = u64::try_from(now.timestamp_millis()).unwrap_or(0).to_be_bytes();
    bytes[..6].copy_from_slice(&ms[2..]);
    RunId(
        uuid::Builder::from_bytes(bytes)
            .with_variant(uuid::Variant::RFC4122)
            .with_version(uuid::Version::SortRand)
            .into_uuid(),
    )
}
