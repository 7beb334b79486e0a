//! Folding events into the state. Needs no definition: every event carries what it decided.

use super::{
    Illegal, MAILBOX_MAX,
    state::{
        Branch, Cleanup, Ended, FINALLY_PREFIX, Frame, Live, Message, Node, Phase, RunState, SKIPPED, Stopped, shape_of,
    },
};
use crate::{
    event::{Ending, Event, Opened, Outcome, StepStatus},
    view::RunStatus,
};
use chrono::{DateTime, Duration};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

pub(super) fn fold(state: &mut RunState, event: &Event) -> Result<(), Illegal> {
    if state.status.is_closed() {
        return Err(Illegal("an event after the end of the run".into()));
    }
    state.format = state.format.max(event.format());
    match event {
        Event::RunStarted { inputs, env, calls, at, deadline } => {
            if state.status != RunStatus::Pending {
                return Err(Illegal("the run starts twice".into()));
            }
            state.status = RunStatus::Running;
            state.inputs = inputs.clone();
            state.env = env.clone();
            state.calls.clone_from(calls);
            state.started_at = *at;
            state.deadline = *deadline;
        }
        Event::StepSkipped { path, reason } => {
            let node = Node {
                status: Some(StepStatus::Skipped),
                reason: Some(reason.clone()),
                live: None,
                ..Node::begun(Live::Wait { until: DateTime::UNIX_EPOCH }, state.started_at)
            };
            insert(state, path, Node { started_at: None, ..node })?;
        }
        Event::StepStarted { path, at, opened } => {
            goes_on(state)?;
            state.executions += 1;
            insert(state, path, Node::begun(open(opened), *at))?;
        }
        Event::AttemptStarted { path, attempt, attempt_id, at, deadline, .. } => {
            goes_on(state)?;
            state.executions += 1;
            let node = state.node_mut(path)?;
            node.attempts = *attempt;
            let Some(Live::Activity { attempt: newest, counted, phase, .. }) = &mut node.live else {
                return Err(Illegal(format!("`{path}` is no live activity")));
            };
            if *phase != Phase::Queued || *attempt != *newest + 1 {
                return Err(Illegal(format!("attempt {attempt} of `{path}` cannot start now")));
            }
            *newest = *attempt;
            *counted += 1;
            *phase = Phase::Running { attempt_id: *attempt_id, started_at: *at, deadline: *deadline };
        }
        Event::AttemptBlocked { path, reason, message, at } => {
            *phase_from(state, path, |p| *p == Phase::Queued)? =
                Phase::Blocked { reason: reason.clone(), message: message.clone(), since: *at };
            // A worker had taken the step; what it waits for now is no worker.
            if let Some(Live::Activity { queue_deadline, .. }) = &mut state.node_mut(path)?.live {
                *queue_deadline = *at + Duration::days(36_500);
            }
        }
        Event::AttemptEnded { path, attempt, outcome, failure, at, .. } => {
            let node = state.node_mut(path)?;
            let Some(Live::Activity { attempt: newest, counted, lost, phase, .. }) = &mut node.live else {
                return Err(Illegal(format!("`{path}` is no live activity")));
            };
            if attempt != newest || !matches!(phase, Phase::Running { .. }) {
                return Err(Illegal(format!("attempt {attempt} of `{path}` does not run")));
            }
            match outcome {
                Outcome::Lost => {
                    *counted -= 1;
                    *lost += 1;
                    *phase = Phase::Queued;
                }
                Outcome::Blocked => {
                    *counted -= 1;
                    let (reason, message) =
                        failure.as_ref().map_or_else(Default::default, |f| (f.code.clone(), f.message.clone()));
                    *phase = Phase::Blocked { reason, message, since: *at };
                    // It takes nobody's place. In a history of before such an end has no mark, and counts.
                    if failure.as_ref().is_some_and(|f| f.uncounted) {
                        state.executions = state.executions.saturating_sub(1);
                    }
                }
                // What follows (the step's end, a retry) is an event of its own in the same transition.
                Outcome::Succeeded | Outcome::Failed | Outcome::TimedOut | Outcome::Cancelled => *phase = Phase::Queued,
            }
        }
        Event::RetryScheduled { path, due_at, failure } => {
            *phase_from(state, path, |p| *p == Phase::Queued)? =
                Phase::Backoff { until: *due_at, failure: failure.clone() };
            // It has taken nobody's place: neither among the policy's attempts nor among the run's executions.
            if failure.uncounted {
                if let Some(Live::Activity { counted, .. }) = &mut state.node_mut(path)?.live {
                    *counted = counted.saturating_sub(1);
                }
                state.executions = state.executions.saturating_sub(1);
            }
        }
        Event::AttemptReady { path } => {
            let waits = |p: &Phase| matches!(p, Phase::Backoff { .. } | Phase::Blocked { .. });
            *phase_from(state, path, waits)? = Phase::Queued;
        }
        Event::RoundStarted { path, round, previous } => {
            let node = state.node_mut(path)?;
            if !matches!(node.live, Some(Live::Repeat { .. })) || *round != node.rounds + 1 {
                return Err(Illegal(format!("round {round} of `{path}` cannot start")));
            }
            node.rounds = *round;
            node.live = Some(Live::Repeat {
                round: *round,
                frame: Frame::default(),
                previous: previous.clone(),
                delayed_until: None,
            });
        }
        Event::RoundDelayed { path, until } => match &mut state.node_mut(path)?.live {
            Some(Live::Repeat { delayed_until, .. }) => *delayed_until = Some(*until),
            _ => return Err(Illegal(format!("`{path}` is no live repeat"))),
        },
        Event::ItemStarted { path, index } => match &mut state.node_mut(path)?.live {
            Some(Live::Foreach { next, active, .. }) if *next == *index => {
                *next += 1;
                active.insert(*index, Frame::default());
            }
            _ => return Err(Illegal(format!("item {index} of `{path}` cannot start"))),
        },
        Event::ItemEnded { path, index, status, output, failure } => match &mut state.node_mut(path)?.live {
            Some(Live::Foreach { active, results, .. }) => {
                if active.remove(index).is_none() {
                    return Err(Illegal(format!("item {index} of `{path}` does not run")));
                }
                let ended = Ended { status: *status, output: output.clone(), failure: failure.clone() };
                results.insert(*index, ended);
            }
            _ => return Err(Illegal(format!("`{path}` is no live foreach"))),
        },
        Event::BranchEnded { path, branch, status, output, failure } => match &mut state.node_mut(path)?.live {
            Some(Live::Parallel { branches, winner }) => {
                if *status == StepStatus::Succeeded {
                    winner.get_or_insert_with(|| branch.clone());
                }
                let branch = branches.get_mut(branch).ok_or_else(|| Illegal(format!("no branch of `{path}`")))?;
                branch.frame = Frame::default();
                branch.ended = Some(Ended { status: *status, output: output.clone(), failure: failure.clone() });
            }
            _ => return Err(Illegal(format!("`{path}` is no live parallel"))),
        },
        Event::CatchStarted { path, handler, failure } => {
            let node = state.node_mut(path)?;
            node.live.as_ref().map_or(Ok(()), |live| nothing_left(live, path))?;
            node.live = Some(Live::Catch { handler: *handler, failure: failure.clone(), frame: Frame::default() });
        }
        Event::SignalReceived { n, name, payload, sender, at } => {
            let (name, payload, sender) = (name.clone(), payload.clone(), sender.clone());
            receive(state, Message { n: *n, name, payload, sender, at: *at, update: None })?;
        }
        Event::UpdateAccepted { n, id, name, payload, sender, at } => {
            let (name, payload, sender) = (name.clone(), payload.clone(), sender.clone());
            receive(state, Message { n: *n, name, payload, sender, at: *at, update: Some(id.clone()) })?;
        }
        Event::SignalDropped { .. } | Event::UpdateRejected { .. } => {}
        Event::UpdateCompleted { n, id, .. } => {
            take(state, *n, Some(id))?;
        }
        Event::SignalConsumed { n, .. } => {
            take(state, *n, None)?;
        }
        Event::DecisionCounted { path, n } => {
            let message = take(state, *n, None)?;
            match &mut state.node_mut(path)?.live {
                Some(Live::Await { counted, .. }) => counted.push(message.sender.unwrap_or_default()),
                _ => return Err(Illegal(format!("`{path}` is no live await"))),
            }
        }
        Event::Reminded { path, count } => match &mut state.node_mut(path)?.live {
            Some(Live::Await { reminded, .. }) => *reminded = *count,
            _ => return Err(Illegal(format!("`{path}` is no live await"))),
        },
        Event::Unblocked {} => {
            unblock(&mut state.body);
            state.finally.as_mut().into_iter().for_each(unblock);
        }
        Event::StopRequested { path, .. } => {
            if path.is_empty() {
                state.body.nodes.values_mut().for_each(stop);
            } else {
                stop(state.node_mut(path)?);
            }
        }
        Event::CallStopped { path, until, .. } => {
            let stopped = stopped(state, path)?;
            match stopped {
                Some(stopped) if stopped.ended == 0 && *until < stopped.until => stopped.until = *until,
                None => *stopped = Some(Stopped { until: *until, times: 0, ended: 0 }),
                Some(_) => return Err(Illegal(format!("the child of `{path}` has less time already"))),
            }
        }
        Event::CallOverdue { path, times, spares, until, .. } => match stopped(state, path)? {
            Some(stopped) if stopped.times + 1 == *times => {
                (stopped.times, stopped.until) = (*times, *until);
                stopped.ended += u32::from(!spares);
            }
            _ => return Err(Illegal(format!("the child of `{path}` is not overdue for the {times}. time"))),
        },
        Event::CleanupBounded { at, until } => {
            goes_on(state)?;
            if state.cleanup.is_none_or(|c| *until < c.until) {
                state.cleanup = Some(Cleanup { at: *at, until: *until });
            }
            if state.finally.is_some() {
                state.deadline = state.deadline.min(*until);
            }
        }
        Event::StepEnded { path, status, output, failure, tolerated, hoist, extras, at } => {
            let (frame, id) = state.frame_mut(path)?;
            let node = frame.nodes.get_mut(id).ok_or_else(|| Illegal(format!("no step `{path}`")))?;
            let Some(live) = node.live.take() else { return Err(Illegal(format!("`{path}` ends twice"))) };
            nothing_left(&live, path)?;
            node.status = Some(*status);
            node.output.clone_from(output);
            node.failure.clone_from(failure);
            node.tolerated = *tolerated;
            node.extras = extras.clone();
            node.ended_at = Some(*at);
            if *hoist && let Live::Repeat { frame: last, .. } = live {
                frame.nodes.extend(last.nodes);
            }
        }
        Event::RunPaused { .. } => {
            goes_on(state)?;
            state.status = RunStatus::Paused;
        }
        Event::RunResumed { halted, .. } => match state.status {
            RunStatus::Paused => {
                let stops = state.ending.as_ref().is_some_and(|e| !e.is_wanted());
                state.status = if stops { RunStatus::Cancelling } else { RunStatus::Running };
            }
            // Set aside before its first transition or later: its state is what it was.
            _ if halted.is_some() => {}
            _ => return Err(Illegal("the run is not paused".into())),
        },
        Event::RunForked { inputs, env, calls, restarted, at, not_before, deadline, .. } => {
            if state.status == RunStatus::Pending || state.ending.is_some() {
                return Err(Illegal("a run cannot be forked before it starts or while it ends".into()));
            }
            for path in restarted {
                let (frame, id) = state.frame_mut(path)?;
                frame.nodes.remove(id).ok_or_else(|| Illegal(format!("no step `{path}` to begin anew")))?;
            }
            state.status = RunStatus::Running;
            state.inputs = inputs.clone();
            state.env = env.clone();
            state.calls.clone_from(calls);
            state.deadline = *deadline;
            // Who sent an update asked the parent, which answers it.
            state.mailbox.iter_mut().for_each(|m| m.update = None);
            begin_anew(&mut state.body, not_before.unwrap_or(*at))?;
        }
        Event::RunMigrated { map, skipped, inputs, env, calls, .. } => {
            if state.ending.is_some() {
                return Err(Illegal("a run cannot be migrated while it ends".into()));
            }
            let mut runs = false;
            state.visit_live(&mut |_, node| {
                runs |= matches!(node.live, Some(Live::Activity { phase: Phase::Running { .. }, .. }));
            });
            if runs {
                return Err(Illegal("a run cannot be migrated while an attempt runs".into()));
            }
            renamed(state, map, skipped)?;
            if let Some(inputs) = inputs {
                state.inputs = inputs.clone();
            }
            state.env = env.clone();
            state.calls.clone_from(calls);
        }
        Event::RunEnding { ending, .. } => {
            goes_on(state)?;
            // Whoever cancels a run that is about to go on as another does not want that other.
            let gives_way =
                |e: &Ending| matches!(e, Ending::Continued { .. }) && matches!(ending, Ending::Cancelled { .. });
            if state.ending.as_ref().is_some_and(|e| !gives_way(e)) {
                return Err(Illegal("the run cannot end now".into()));
            }
            state.ending = Some(ending.clone());
            if !ending.is_wanted() {
                state.status = RunStatus::Cancelling;
            }
            state.body.nodes.values_mut().for_each(stop);
        }
        Event::FinallyStarted { deadline, .. } => {
            if state.ending.is_none() || state.finally.is_some() {
                return Err(Illegal("`finally` cannot begin now".into()));
            }
            state.finally = Some(Frame::default());
            state.deadline = *deadline;
        }
        Event::RunClosed { status, output, failure, .. } => {
            state.status = *status;
            state.output.clone_from(output);
            state.failure.clone_from(failure);
            state.body = Frame::default();
            state.finally = None;
            // What nobody has taken goes to the run that goes on: see `Successor::of`.
            if *status != RunStatus::Continued {
                state.mailbox.clear();
            }
        }
    }
    Ok(())
}

fn receive(state: &mut RunState, message: Message) -> Result<(), Illegal> {
    let name = &message.name;
    if state.mailbox.iter().filter(|m| m.name == *name).count() >= MAILBOX_MAX {
        return Err(Illegal(format!("the mailbox of `{name}` is full")));
    }
    state.mailbox.push(message);
    Ok(())
}

/// Takes a message out of the mailbox: an update only by its answer.
fn take(state: &mut RunState, n: u64, update: Option<&String>) -> Result<Message, Illegal> {
    let at = state.mailbox.iter().position(|m| m.n == n && m.update.as_ref() == update);
    let at = at.ok_or_else(|| Illegal(format!("no such message {n} in the mailbox")))?;
    Ok(state.mailbox.remove(at))
}

/// Blocks that are under way count their time from a fork; nothing below them may run in the parent's name.
fn begin_anew(frame: &mut Frame, at: DateTime<chrono::Utc>) -> Result<(), Illegal> {
    for (id, node) in &mut frame.nodes {
        let Some(live) = &node.live else { continue };
        if live.is_leaf() {
            return Err(Illegal(format!("`{id}` is under way in the parent and does not begin anew")));
        }
        node.started_at = Some(at);
        let mut result = Ok(());
        each_frame(node, &mut |frame| {
            if result.is_ok() {
                result = begin_anew(frame, at);
            }
        });
        result?;
    }
    Ok(())
}

/// The state under new names: the steps whose shape the map holds have the ids that it says, and those at `skipped` never run.
pub(super) fn renamed(state: &mut RunState, map: &BTreeMap<String, String>, skipped: &[String]) -> Result<(), Illegal> {
    let mut former = std::mem::take(&mut state.former);
    rename(&mut state.body, ("", ""), map, &mut former)?;
    if let Some(frame) = &mut state.finally {
        rename(frame, (FINALLY_PREFIX, FINALLY_PREFIX), map, &mut former)?;
    }
    state.former = former;
    for path in skipped {
        let node = Node {
            status: Some(StepStatus::Skipped),
            reason: Some(SKIPPED.into()),
            live: None,
            started_at: None,
            ..Node::begun(Live::Wait { until: DateTime::UNIX_EPOCH }, state.started_at)
        };
        insert(state, path, node)?;
    }
    Ok(())
}

/// `path` and `shape` lead to the frame, with their trailing slashes.
fn rename(
    frame: &mut Frame,
    (path, shape): (&str, &str),
    map: &BTreeMap<String, String>,
    former: &mut BTreeSet<String>,
) -> Result<(), Illegal> {
    for (id, mut node) in std::mem::take(&mut frame.nodes) {
        let (path, shape) = (format!("{path}{id}"), format!("{shape}{id}"));
        if let Some(live) = &mut node.live {
            for (suffix, inner) in live.frames_mut() {
                let below = (format!("{path}{suffix}/"), format!("{shape}{}/", shape_of(&suffix)));
                rename(inner, (&below.0, &below.1), map, former)?;
            }
            if let Live::Repeat { previous: Value::Object(outputs), .. } = live {
                let named = |id: String| map.get(&format!("{shape}/{id}")).cloned().unwrap_or(id);
                *outputs = std::mem::take(outputs).into_iter().map(|(id, output)| (named(id), output)).collect();
            }
        }
        let to = map.get(&shape).unwrap_or(&id);
        if *to != id {
            former.insert(path);
        }
        if frame.nodes.insert(to.clone(), node).is_some() {
            return Err(Illegal(format!("two steps would be called `{to}`")));
        }
    }
    Ok(())
}

/// In a run that is paused or not yet started, nothing begins.
fn goes_on(state: &RunState) -> Result<(), Illegal> {
    match state.status {
        RunStatus::Paused => Err(Illegal("the run is paused".into())),
        RunStatus::Pending => Err(Illegal("the run has not started".into())),
        _ => Ok(()),
    }
}

fn insert(state: &mut RunState, path: &str, node: Node) -> Result<(), Illegal> {
    let (frame, id) = state.frame_mut(path)?;
    if frame.nodes.insert(id.to_owned(), node).is_some() {
        return Err(Illegal(format!("`{path}` begins twice")));
    }
    Ok(())
}

fn open(opened: &Opened) -> Live {
    match opened {
        Opened::Activity { activity, input, overrides, queue_deadline, total_deadline } => Live::Activity {
            activity: activity.clone(),
            input: input.clone(),
            overrides: overrides.clone(),
            attempt: 0,
            counted: 0,
            lost: 0,
            phase: Phase::Queued,
            queue_deadline: *queue_deadline,
            total_deadline: *total_deadline,
        },
        Opened::Group => Live::Group { frame: Frame::default() },
        Opened::Switch { case } => Live::Switch { case: *case, frame: Frame::default() },
        Opened::Parallel { branches } => {
            Live::Parallel { branches: branches.iter().map(|b| (b.clone(), Branch::default())).collect(), winner: None }
        }
        Opened::Foreach { keys, items } => Live::Foreach {
            keys: keys.clone(),
            items: items.clone(),
            next: 0,
            active: Default::default(),
            results: Default::default(),
        },
        Opened::Repeat => {
            Live::Repeat { round: 0, frame: Frame::default(), previous: Value::Null, delayed_until: None }
        }
        Opened::Wait { until } => Live::Wait { until: *until },
        Opened::Await { signal, deadline, show } => Live::Await {
            signal: signal.clone(),
            deadline: *deadline,
            show: show.clone(),
            reminded: 0,
            counted: Vec::new(),
        },
        Opened::Call { child, workflow, propagate, terminate, .. } => {
            let (child, workflow, propagate, terminate) = (*child, workflow.clone(), *propagate, *terminate);
            Live::Call { child, workflow, propagate, terminate, stopped: None }
        }
    }
}

/// Since when a call stops that waits for its child.
fn stopped<'a>(state: &'a mut RunState, path: &str) -> Result<&'a mut Option<Stopped>, Illegal> {
    let node = state.node_mut(path)?;
    match &mut node.live {
        Some(Live::Call { propagate: true, stopped, .. }) if node.stopping => Ok(stopped),
        _ => Err(Illegal(format!("`{path}` is no call that stops"))),
    }
}

/// The phase of an activity, if it is one that may be left now.
fn phase_from<'a>(state: &'a mut RunState, path: &str, may: impl Fn(&Phase) -> bool) -> Result<&'a mut Phase, Illegal> {
    match &mut state.node_mut(path)?.live {
        Some(Live::Activity { phase, .. }) => {
            if may(phase) {
                Ok(phase)
            } else {
                Err(Illegal(format!("`{path}` cannot leave {phase:?} that way")))
            }
        }
        _ => Err(Illegal(format!("`{path}` is no live activity"))),
    }
}

/// A step must not end over an attempt that runs or a step below it: nobody would ever close those.
fn nothing_left(live: &Live, path: &str) -> Result<(), Illegal> {
    let runs = matches!(live, Live::Activity { phase: Phase::Running { .. }, .. });
    if runs || live.frames().iter().any(|(_, frame)| frame.nodes.values().any(|n| n.live.is_some())) {
        return Err(Illegal(format!("`{path}` ends over something that is under way")));
    }
    Ok(())
}

/// Marks a step and everything below it as stopping.
fn stop(node: &mut Node) {
    if node.live.is_none() {
        return;
    }
    node.stopping = true;
    each_frame(node, &mut |frame| frame.nodes.values_mut().for_each(stop));
}

fn unblock(frame: &mut Frame) {
    for node in frame.nodes.values_mut() {
        if let Some(Live::Activity { phase: phase @ Phase::Blocked { .. }, .. }) = &mut node.live {
            *phase = Phase::Queued;
        }
        each_frame(node, &mut unblock);
    }
}

fn each_frame(node: &mut Node, visit: &mut dyn FnMut(&mut Frame)) {
    match &mut node.live {
        Some(
            Live::Group { frame } | Live::Switch { frame, .. } | Live::Repeat { frame, .. } | Live::Catch { frame, .. },
        ) => {
            visit(frame);
        }
        Some(Live::Foreach { active, .. }) => active.values_mut().for_each(visit),
        Some(Live::Parallel { branches, .. }) => branches.values_mut().for_each(|b| visit(&mut b.frame)),
        Some(Live::Activity { .. } | Live::Wait { .. } | Live::Await { .. } | Live::Call { .. }) | None => {}
    }
}

/// Whether a path lies in `finally`.
pub(super) fn in_finally(path: &str) -> bool {
    path.starts_with(FINALLY_PREFIX)
}
