//! The direct effect of each input, before the tree is walked.

use super::{
    Command, Decision, Illegal, Inbound, Input, LOST_MAX, MAILBOX_MAX, Moment, OUTPUT_BYTES_MAX,
    UNCOUNTED_DELAY_MAX_MS, UNCOUNTED_DELAY_MIN_MS, emit,
    scope::{Place, find_step},
    signal::{Door, problems},
    state::{Live, Node, Phase, RunState},
    timer::millis,
    walk::fail_step,
};
use crate::{
    definition::{
        Data, Definition, RetryPolicy,
        inputs::{DEPTH_MAX, is_too_deep},
    },
    event::{Ending, Event, Outcome, StepStatus},
    failure::{Failure, FailureKind},
    ids::AttemptId,
    view::RunStatus,
};
use chrono::{DateTime, Utc};
use serde_json::Value;
use std::collections::BTreeMap;

pub(super) fn react(
    definition: &Definition,
    state: &mut RunState,
    input: Input,
    moment: &Moment<'_>,
    decision: &mut Decision,
) -> Result<(), Illegal> {
    if state.status.is_closed() {
        return Ok(());
    }
    match input {
        Input::Started { inputs, until } => start(definition, state, inputs, until, moment, decision),
        Input::TakenOver => {
            for attempt in running(state) {
                let failure =
                    Failure::new(FailureKind::Lost, "transient.worker_lost", "the worker that ran it is gone");
                emit(state, attempt.ended(Outcome::Lost, Some(failure), moment.now), decision)?;
                ready_blocked(state, &attempt.path, decision)?;
            }
            Ok(())
        }
        Input::AttemptEnded { path, attempt, result } => {
            attempt_ended(definition, state, &path, attempt, result, moment, decision)
        }
        Input::Messages(messages) => {
            // One of them may end the run; it hears nothing after that.
            messages.into_iter().try_for_each(|m| {
                if state.status.is_closed() { Ok(()) } else { message(definition, state, m, moment, decision) }
            })
        }
        Input::Tick => Ok(()),
        Input::Several(inputs) => inputs.into_iter().try_for_each(|i| react(definition, state, i, moment, decision)),
        Input::Terminated { reason } => terminate(state, reason, moment, decision),
        Input::Expired => {
            let failure =
                Failure::permanent("timeout.run_total", "the time of its chain was over before it could begin");
            close(state, RunStatus::Failed, failure, moment, decision)
        }
    }
}

fn terminate(
    state: &mut RunState,
    reason: String,
    moment: &Moment<'_>,
    decision: &mut Decision,
) -> Result<(), Illegal> {
    close(state, RunStatus::Terminated, Failure::permanent("cancelled", reason), moment, decision)
}

/// Ends the run at once, without `finally`. Its children hear of it as their calls say.
fn close(
    state: &mut RunState,
    status: RunStatus,
    failure: Failure,
    moment: &Moment<'_>,
    decision: &mut Decision,
) -> Result<(), Illegal> {
    for attempt in running(state) {
        emit(state, attempt.ended(Outcome::Cancelled, Some(Failure::cancelled()), moment.now), decision)?;
        decision.commands.push(Command::CancelAttempt { path: attempt.path });
    }
    state.visit_live(&mut |_, node| {
        if let (Some(live), false) = (&node.live, node.stopping) {
            decision.commands.extend(stop_child(state, live));
        }
    });
    emit(state, Event::RunClosed { status, output: None, failure: Some(failure), at: moment.now }, decision)
}

fn start(
    definition: &Definition,
    state: &mut RunState,
    inputs: Value,
    until: Option<DateTime<Utc>>,
    moment: &Moment<'_>,
    decision: &mut Decision,
) -> Result<(), Illegal> {
    if state.status != RunStatus::Pending {
        return Ok(());
    }
    let (inputs, invalid) = match crate::definition::inputs::prepare(definition, &inputs) {
        Ok(inputs) => (inputs, None),
        Err(problems) => (inputs, Some(Failure::permanent("input.invalid", problems.join("; ")))),
    };
    state.inputs = inputs.clone();
    let env: Result<BTreeMap<String, Value>, Failure> = {
        let place = Place::inside(definition, state, moment, "")?;
        definition.env.iter().map(|(name, data): (&String, &Data)| Ok((name.clone(), place.resolve(data)?))).collect()
    };
    let (env, failure) = match env {
        Ok(env) => (env, None),
        Err(failure) => (BTreeMap::new(), Some(failure)),
    };
    let failure = invalid.or(failure);
    let deadline = moment.now + millis(definition.timeout_ms);
    let deadline = until.map_or(deadline, |until| deadline.min(until));
    let calls = moment.calls.clone();
    emit(state, Event::RunStarted { inputs, env, calls, at: moment.now, deadline }, decision)?;
    match failure {
        Some(failure) => emit(state, Event::RunEnding { ending: Ending::Failed { failure }, at: moment.now }, decision),
        None => Ok(()),
    }
}

/// An attempt that runs now.
struct Running {
    path: String,
    attempt: u32,
    attempt_id: AttemptId,
    activity: String,
}

impl Running {
    fn ended(&self, outcome: Outcome, failure: Option<Failure>, at: DateTime<Utc>) -> Event {
        Event::AttemptEnded {
            path: self.path.clone(),
            attempt: self.attempt,
            attempt_id: self.attempt_id,
            activity: self.activity.clone(),
            outcome,
            output: None,
            failure,
            at,
        }
    }
}

fn running(state: &RunState) -> Vec<Running> {
    let mut found = Vec::new();
    state.visit_live(&mut |path, node| {
        if let Some(Live::Activity { activity, attempt, phase: Phase::Running { attempt_id, .. }, .. }) = &node.live {
            found.push(Running {
                path: path.to_owned(),
                attempt: *attempt,
                attempt_id: *attempt_id,
                activity: activity.clone(),
            });
        }
    });
    found
}

/// The attempt that runs for the step at `path`.
fn running_at(state: &RunState, path: &str) -> Option<Running> {
    match &state.node(path)?.live {
        Some(Live::Activity { activity, attempt, phase: Phase::Running { attempt_id, .. }, .. }) => Some(Running {
            path: path.to_owned(),
            attempt: *attempt,
            attempt_id: *attempt_id,
            activity: activity.clone(),
        }),
        _ => None,
    }
}

fn attempt_ended(
    definition: &Definition,
    state: &mut RunState,
    path: &str,
    attempt: u32,
    result: Result<Value, Failure>,
    moment: &Moment<'_>,
    decision: &mut Decision,
) -> Result<(), Illegal> {
    // A result that comes late, for an attempt that was closed meanwhile, never happened.
    let Some(current) = running_at(state, path).filter(|r| r.attempt == attempt) else { return Ok(()) };
    let result = result.and_then(|output| {
        let bytes = serde_json::to_string(&output).map_or(usize::MAX, |t| t.len());
        if bytes > OUTPUT_BYTES_MAX {
            return Err(Failure::permanent(
                "limit.size",
                format!("the output is {bytes} bytes; the limit is {OUTPUT_BYTES_MAX}"),
            ));
        }
        if is_too_deep(&output) {
            let text = format!("the output is nested deeper than {DEPTH_MAX} levels");
            return Err(Failure::permanent("limit.size", text));
        }
        Ok(output)
    });
    // What it says beside its code and its message may be as deep as it likes.
    let result = result.map_err(|failure| match serde_json::to_value(&failure) {
        Ok(value) if !is_too_deep(&value) => failure,
        _ => Failure { detail: Value::Null, cause: None, ..failure },
    });
    let now = moment.now;
    let failure = match result {
        Ok(output) => {
            emit(state, current.ended(Outcome::Succeeded, None, now), decision)?;
            ready_blocked(state, path, decision)?;
            return emit(state, step_ended(path, StepStatus::Succeeded, Some(output), None, now), decision);
        }
        Err(failure) => failure,
    };
    let node = state.node(path).ok_or_else(|| Illegal(format!("no step `{path}`")))?;
    let stopping = node.stopping;
    let failure = outer_timeout(state, node, failure);
    let outcome = match failure.kind {
        FailureKind::Blocked if !stopping => Outcome::Blocked,
        FailureKind::Lost => Outcome::Lost,
        // Cancelled without being asked: its worker is draining and hands it back.
        FailureKind::Cancelled if !stopping => Outcome::Lost,
        FailureKind::Cancelled | FailureKind::Blocked => Outcome::Cancelled,
        FailureKind::TimedOut => Outcome::TimedOut,
        FailureKind::Retryable | FailureKind::Permanent | FailureKind::Panicked => Outcome::Failed,
    };
    emit(state, current.ended(outcome, Some(failure.clone()), now), decision)?;
    if outcome != Outcome::Blocked {
        // Of two steps that stop each other in the middle, each would start the other again for ever.
        ready_blocked(state, path, decision)?;
    }
    if matches!(outcome, Outcome::Lost | Outcome::Blocked) {
        return Ok(());
    }
    if stopping {
        return emit(state, step_ended(path, StepStatus::Cancelled, None, Some(failure), now), decision);
    }
    let step = find_step(definition, state, path)?;
    if let Some(due_at) = retry_at(&step.retry, state, path, &failure, moment) {
        return emit(state, Event::RetryScheduled { path: path.to_owned(), due_at, failure }, decision);
    }
    for event in fail_step(definition, state, step, path, failure, moment)? {
        emit(state, event, decision)?;
    }
    Ok(())
}

/// What an attempt held is free once it has ended: the steps that the hook refused may ask again at once.
fn ready_blocked(state: &mut RunState, ended: &str, decision: &mut Decision) -> Result<(), Illegal> {
    let mut blocked = Vec::new();
    state.visit_live(&mut |path, node| {
        if path != ended
            && !node.stopping
            && matches!(node.live, Some(Live::Activity { phase: Phase::Blocked { .. }, .. }))
        {
            blocked.push(path.to_owned());
        }
    });
    blocked.into_iter().try_for_each(|path| emit(state, Event::AttemptReady { path }, decision))
}

/// An attempt that ran until the step's or the run's own deadline did not exceed its `run` timeout but theirs.
fn outer_timeout(state: &RunState, node: &Node, mut failure: Failure) -> Failure {
    if failure.kind == FailureKind::TimedOut
        && failure.code == "timeout.run"
        && let Some(Live::Activity { phase: Phase::Running { deadline, .. }, total_deadline, .. }) = &node.live
    {
        if *total_deadline == Some(*deadline) {
            failure.code = "timeout.total".into();
            failure.message = "the step took longer than its total timeout".into();
        } else if *deadline == state.deadline {
            failure.code = "timeout.run_total".into();
            failure.message = "the run took longer than its timeout".into();
        }
    }
    failure
}

/// When the next attempt is due, or `None` if there is none.
fn retry_at(
    policy: &RetryPolicy,
    state: &RunState,
    path: &str,
    failure: &Failure,
    moment: &Moment<'_>,
) -> Option<DateTime<Utc>> {
    let Some(live @ Live::Activity { counted, total_deadline, .. }) = state.node(path).and_then(|n| n.live.as_ref())
    else {
        return None;
    };
    let wanted = match failure.kind {
        // Nothing is known about a panic's cause: try again within the bound.
        FailureKind::Panicked => true,
        FailureKind::Retryable | FailureKind::TimedOut => {
            policy.on.iter().any(|p| failure.matches(p)) && !policy.not_on.iter().any(|p| failure.matches(p))
        }
        FailureKind::Permanent | FailureKind::Cancelled | FailureKind::Lost | FailureKind::Blocked => false,
    };
    // Who allows one attempt wants no other one, whatever the first has met.
    let over = if failure.uncounted { policy.attempts <= 1 } else { *counted >= policy.attempts };
    if !wanted || over {
        return None;
    }
    let delay = wait_ms(policy, live, failure, moment.draw);
    let due = moment.now + millis(delay.max(failure.retry_after_ms.unwrap_or(0)));
    if due >= state.deadline || total_deadline.is_some_and(|t| due >= t) {
        return None;
    }
    Some(due)
}

/// How long it is until the next attempt, as far as the run itself says: by its policy, and after an attempt that does not count no
/// shorter than such waits are. Everything in it is the state's, so that whoever takes the run over waits as long. Falls as the
/// draw rises.
pub(super) fn wait_ms(policy: &RetryPolicy, live: &Live, failure: &Failure, draw: u64) -> u64 {
    let tries = tries(live, failure);
    let least = if failure.uncounted { uncounted_ms(tries, draw) } else { 0 };
    delay_ms(policy, tries, draw).max(least)
}

/// Shortest wait after the `tries`th attempt that does not count: between the first one's and one that doubles with each, by the draw.
/// So many runs that wait for one provider do not come back at once.
fn uncounted_ms(tries: u32, draw: u64) -> u64 {
    let policy = RetryPolicy {
        delay_ms: UNCOUNTED_DELAY_MIN_MS,
        backoff: 2.0,
        max_delay_ms: UNCOUNTED_DELAY_MAX_MS,
        jitter: 1.0,
        ..RetryPolicy::default()
    };
    delay_ms(&policy, tries, draw).max(UNCOUNTED_DELAY_MIN_MS)
}

/// How many attempts the delay grows with: those that count, or, after one that does not, those before that did not either.
fn tries(live: &Live, failure: &Failure) -> u32 {
    match live {
        Live::Activity { attempt, counted, .. } if failure.uncounted => attempt.saturating_sub(*counted) + 1,
        Live::Activity { counted, .. } => *counted,
        _ => 0,
    }
}

/// More doublings change no delay, and a power without end times no delay is no number.
const EXPONENT_MAX: u32 = 64;

/// Delay after `tries` attempts: `min(delay × backoff^(tries-1), max)`, times a factor in `[1 - jitter, 1]`.
#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a delay, not money"
)]
pub(super) fn delay_ms(policy: &RetryPolicy, tries: u32, draw: u64) -> u64 {
    let exponent = i32::try_from(tries.saturating_sub(1).min(EXPONENT_MAX)).unwrap_or(i32::MAX);
    let raw = (policy.delay_ms as f64 * policy.backoff.powi(exponent)).min(policy.max_delay_ms as f64);
    let part = (draw >> 11) as f64 / (1u64 << 53) as f64;
    (raw * (1.0 - policy.jitter.clamp(0.0, 1.0) * part)).max(0.0) as u64
}

fn message(
    definition: &Definition,
    state: &mut RunState,
    message: Inbound,
    moment: &Moment<'_>,
    decision: &mut Decision,
) -> Result<(), Illegal> {
    match message {
        Inbound::Signal { n, name, payload, sender, at } => {
            let event = if is_full(state, &name) {
                Event::SignalDropped { n, name }
            } else {
                Event::SignalReceived { n, name, payload, sender, at }
            };
            emit(state, event, decision)
        }
        Inbound::Update { n, id, name, payload, sender, at } => {
            let mut problems = problems(definition, &name, &payload, Door::Update);
            if problems.is_empty() && is_full(state, &name) {
                problems.push(format!("{MAILBOX_MAX} messages `{name}` wait already: send it later, under another id"));
            }
            let event = if problems.is_empty() {
                Event::UpdateAccepted { n, id, name, payload, sender, at }
            } else {
                Event::UpdateRejected { n, id, name, payload, sender, problems, at }
            };
            emit(state, event, decision)
        }
        Inbound::Unblock => emit(state, Event::Unblocked {}, decision),
        Inbound::Pause { reason, by } => {
            if state.status == RunStatus::Paused {
                return Ok(());
            }
            emit(state, Event::RunPaused { reason, by, at: moment.now }, decision)
        }
        Inbound::Resume { reason, by, halted } => {
            if state.status != RunStatus::Paused && halted.is_none() {
                return Ok(());
            }
            emit(state, Event::RunResumed { reason, by, halted, at: moment.now }, decision)
        }
        Inbound::Terminate { reason } => terminate(state, reason, moment, decision),
        Inbound::TurnedAway { reason } => {
            close(state, RunStatus::Cancelled, Failure::permanent("cancelled", reason), moment, decision)
        }
        Inbound::Cancel { reason, until } => {
            // Who wants the run to stop wants its cleanup, too.
            if state.status == RunStatus::Paused {
                let resumed =
                    Event::RunResumed { reason: format!("to stop: {reason}"), by: None, halted: None, at: moment.now };
                emit(state, resumed, decision)?;
            }
            // Also of one that is ending already: it has that much time left, or less.
            if let Some(until) = until.filter(|until| state.cleanup.is_none_or(|c| *until < c.until)) {
                emit(state, Event::CleanupBounded { at: moment.now, until }, decision)?;
            }
            // One that is about to go on as another is cancelled before it does.
            if state.ending.as_ref().is_some_and(|e| !matches!(e, Ending::Continued { .. })) {
                return Ok(());
            }
            decision.commands.extend(stop_commands(state, ""));
            emit(state, Event::RunEnding { ending: Ending::Cancelled { reason }, at: moment.now }, decision)
        }
        Inbound::Child { run_id, completed, output, failure, cancelled } => {
            let mut place = None;
            state.visit_live(&mut |path, node| {
                if matches!(&node.live, Some(Live::Call { child, .. }) if *child == run_id) {
                    place = Some((path.to_owned(), node.stopping));
                }
            });
            // A child that nobody waits for any more (detached, or its step is over).
            let Some((path, stopping)) = place else { return Ok(()) };
            if completed {
                return emit(state, step_ended(&path, StepStatus::Succeeded, output, None, moment.now), decision);
            }
            if stopping {
                return emit(state, step_ended(&path, StepStatus::Cancelled, None, failure, moment.now), decision);
            }
            let code = if cancelled { "call.cancelled" } else { "call.failed" };
            let text =
                failure.as_ref().map_or_else(|| "the child run did not complete".to_owned(), |f| f.message.clone());
            let mut raised = Failure::permanent(code, text);
            raised.cause = failure.map(Box::new);
            let step = find_step(definition, state, &path)?;
            for event in fail_step(definition, state, step, &path, raised, moment)? {
                emit(state, event, decision)?;
            }
            Ok(())
        }
    }
}

fn is_full(state: &RunState, name: &str) -> bool {
    state.mailbox.iter().filter(|m| m.name == name).count() >= MAILBOX_MAX
}

/// A step's end without frills.
pub(super) fn step_ended(
    path: &str,
    status: StepStatus,
    output: Option<Value>,
    failure: Option<Failure>,
    at: DateTime<Utc>,
) -> Event {
    Event::StepEnded {
        path: path.to_owned(),
        status,
        output,
        failure,
        tolerated: false,
        hoist: false,
        extras: Value::Null,
        at,
    }
}

/// What must be told to the outside when the steps below `prefix` stop: attempts that run, children that follow.
pub(super) fn stop_commands(state: &RunState, prefix: &str) -> Vec<Command> {
    let mut commands = Vec::new();
    state.visit_live(&mut |path, node| {
        if node.stopping || !path.starts_with(prefix) || (prefix.is_empty() && super::fold::in_finally(path)) {
            return;
        }
        match &node.live {
            Some(Live::Activity { phase: Phase::Running { .. }, .. }) => {
                commands.push(Command::CancelAttempt { path: path.to_owned() });
            }
            Some(live) => commands.extend(stop_child(state, live)),
            None => {}
        }
    });
    commands
}

/// What a call that is stopped asks of its child.
pub(super) fn stop_child(state: &RunState, live: &Live) -> Option<Command> {
    match live {
        Live::Call { child, terminate: true, .. } => Some(Command::TerminateChild { run_id: *child }),
        Live::Call { child, propagate: true, .. } => {
            Some(Command::CancelChild { run_id: *child, until: state.cleanup.map(|cleanup| cleanup.of_child()) })
        }
        _ => None,
    }
}

/// Whether a step was lost too often to be tried again.
pub(super) fn lost_too_often(lost: u32) -> bool {
    lost > LOST_MAX
}
