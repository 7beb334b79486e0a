//! Re-decides a recorded history and finds the first transition that would be decided otherwise.
//!
//! # What is checked
//! Every row must fold, and for every row the definition is asked again: from the state before it and the input that its
//! first events tell, `decide` must give the same events in the same order with the same content: which steps begin, in
//! which order, with which inputs, cases, items and deadlines; whether a failure is retried, caught or final; what is
//! evaluated from expressions and templates; how the run ends.
//!
//! # What is taken from the row
//! What came from outside and is recorded only by its effect: results of attempts and children, signals and other messages;
//! the instant; the draw of a retry's jitter (some draw must give the recorded instant); how many attempts found room and
//! which activities the worker offered (those that started; their order is checked); the hook's refusal; whether stopped calls had a
//! time, which releases before format 9 did not give them. A message from
//! which nothing followed leaves no event and is not seen. A row whose events carry no instant is tried at three: its
//! commit's, the one before it, and that at which a timer was due. Where `current` led a run that continued as new under it, and what that refused.
//!
//! # What is not checked
//! Whether a step could have begun earlier (there may have been no room); the rows up to the last `run_forked`: they are the
//! parent's, under its definition, and are only folded; and a `run_migrated`: what follows it is decided under the new definition.

use super::{
    CALL_ENDS_MAX, Current, Illegal, Inbound, Input, Moment, Refusals, RunState,
    react::wait_ms,
    scope::find_step,
    state::{Live, Phase},
};
use crate::{
    definition::{Definition, Kind},
    event::{Ending, Event, Outcome, StepStatus},
    failure::{Failure, FailureKind},
    ids::{DefinitionHash, RunId},
    signature::{Catalog, Signature},
    view::{HistoryRow, RunStatus},
};
use chrono::{DateTime, Duration, Utc};
use serde::Serialize;
use serde_json::{Value, json};
use std::{cell::Cell, collections::BTreeMap};

/// How far the clock by which a worker decided may have been ahead of the one by which its commit is dated, in seconds, in histories of
/// before it was kept from that: half of what an
/// answer of the database may take.
const CLOCK_AHEAD_S: i64 = 30;

/// The first difference.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Divergence {
    pub seq: u64,
    /// Position of the event in the row, from 0.
    pub event: usize,
    /// What the definition decides there; absent if nothing.
    pub expected: Option<Value>,
    /// What the history says; absent if it ends there.
    pub found: Option<Value>,
}

/// What a replay came to.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Replayed {
    /// Rows that were decided again.
    pub decided: u64,
    /// Rows that were only folded: what a fork shares with its parent.
    pub folded: u64,
    pub events: u64,
    pub divergence: Option<Divergence>,
}

/// A replay under way. Give it the rows in order, until one diverges.
pub struct Replay<'a> {
    definition: &'a Definition,
    /// Those that the run has after its migrations; `None`: the same for all of it.
    later: Option<&'a BTreeMap<DefinitionHash, Definition>>,
    depth: u32,
    /// Rows up to here are folded only.
    shared: u64,
    state: RunState,
    /// The last instant that is known.
    now: DateTime<Utc>,
    done: Replayed,
}

impl<'a> Replay<'a> {
    /// Of a run `depth` below its topmost parent, whose history is its parent's up to `shared` (0 if it is no fork).
    #[must_use]
    pub fn new(definition: &'a Definition, run: RunId, depth: u32, shared: u64) -> Self {
        let (state, now) = (RunState::new(run), DateTime::UNIX_EPOCH);
        Self { definition, later: None, depth, shared, state, now, done: Replayed::default() }
    }

    /// What follows a migration is decided under the definition that it names. Without this, all of it under the first one.
    #[must_use]
    pub fn migrating(mut self, definitions: &'a BTreeMap<DefinitionHash, Definition>) -> Self {
        self.later = Some(definitions);
        self
    }

    /// What was seen so far.
    #[must_use]
    pub fn done(self) -> Replayed {
        self.done
    }

    /// Decides the next row again. False: it diverges, and the replay is over.
    ///
    /// # Errors
    /// [`Illegal`] if the row cannot be folded: the history itself is broken there.
    pub fn row(&mut self, row: &HistoryRow) -> Result<bool, Illegal> {
        let at = |what: String| Illegal(format!("row {}: {what}", row.seq));
        let events: Vec<Event> = row
            .events
            .iter()
            .map(|e| {
                serde_json::from_value(e.clone()).map_err(|error| at(format!("no event of this release: {error}")))
            })
            .collect::<Result<_, _>>()?;
        let mut after = self.state.clone();
        for event in &events {
            super::fold(&mut after, event).map_err(|e| at(e.0))?;
        }
        self.done.events += events.len() as u64;
        let instant = events.iter().find_map(instant);
        let (forked, migrated) = (
            matches!(events.first(), Some(Event::RunForked { .. })),
            matches!(events.first(), Some(Event::RunMigrated { .. })),
        );
        if row.seq <= self.shared || forked || migrated {
            self.done.folded += 1;
            if let (Some(Event::RunMigrated { to, .. }), Some(later), true) =
                (events.first(), self.later, row.seq > self.shared)
            {
                self.definition = later
                    .get(to)
                    .ok_or_else(|| at(format!("the definition {to}, which it goes on under, is not there")))?;
            }
        } else {
            self.done.decided += 1;
            let told = told(self.definition, &self.state, &events).map_err(|e| at(e.0))?;
            let instants = match instant {
                Some(instant) => vec![instant],
                None => {
                    let due = super::next_due(self.definition, &self.state);
                    let fired = (due <= row.at + Duration::seconds(CLOCK_AHEAD_S)).then_some(due);
                    [row.at, self.now.max(told.earliest)].into_iter().chain(fired).collect()
                }
            };
            let mut first = None;
            for now in instants {
                let Some(found) = self.differs(row, &events, &told, now) else {
                    first = None;
                    break;
                };
                first.get_or_insert(found);
            }
            if first.is_some() {
                self.done.divergence = first;
                return Ok(false);
            }
        }
        self.now = instant.unwrap_or(row.at).max(self.now);
        self.state = after;
        Ok(true)
    }

    /// The first difference, if the row was decided at `now`.
    fn differs(&self, row: &HistoryRow, found: &[Event], told: &Told, now: DateTime<Utc>) -> Option<Divergence> {
        let moment = Moment {
            now,
            draw: draw(self.definition, &self.state, found, now),
            permits: Cell::new(told.permits),
            refused: &told.refused,
            catalog: &told.catalog,
            calls: told.calls.as_ref().unwrap_or(&self.state.calls),
            current: told.current.as_ref(),
            depth: self.depth,
            bounds_calls: told.bounds_calls,
            workflow: &self.definition.name,
        };
        let mut state = self.state.clone();
        let expected = match super::decide(self.definition, &mut state, told.input.clone(), &moment) {
            Ok(decision) => decision.events,
            // The definition has no place for what the history says.
            Err(why) => {
                let expected = Some(json!({ "type": "illegal", "why": why.0 }));
                return Some(Divergence { seq: row.seq, event: 0, expected, found: row.events.first().cloned() });
            }
        };
        let event = (0..expected.len().max(found.len())).find(|i| expected.get(*i) != found.get(*i))?;
        Some(Divergence {
            seq: row.seq,
            event,
            expected: expected.get(event).and_then(|e| serde_json::to_value(e).ok()),
            found: row.events.get(event).cloned(),
        })
    }
}

/// What a row tells of the outside.
struct Told {
    input: Input,
    permits: u32,
    refused: Refusals,
    catalog: Catalog,
    calls: Option<BTreeMap<String, DefinitionHash>>,
    current: Option<Current>,
    /// As [`Moment::bounds_calls`].
    bounds_calls: bool,
    /// The row was not decided before.
    earliest: DateTime<Utc>,
}

fn told(definition: &Definition, before: &RunState, events: &[Event]) -> Result<Told, Illegal> {
    let mut state = before.clone();
    let (input, used, earliest) = input(&mut state, events)?;
    let mut refused = Refusals::default();
    let (mut metered, mut known) = (Vec::new(), None);
    for event in &events[used..] {
        known = known.or_else(|| current(definition, &state, event));
        match event {
            Event::AttemptBlocked { path, reason, message, .. } => {
                refused.add(path, reason, message);
                metered.extend(queued(&state, path));
            }
            Event::StepEnded { path, status: StepStatus::Failed, failure: Some(failure), .. }
            | Event::CatchStarted { path, failure, .. }
                if !OWN.contains(&failure.code.as_str()) && failure.kind == FailureKind::Permanent =>
            {
                // The failure of an attempt is its own.
                let ended = |e: &Event| matches!(e, Event::AttemptEnded { path: p, outcome: Outcome::Failed | Outcome::TimedOut, .. } if p == path);
                if let (Some(activity), false) = (queued(&state, path), events.iter().any(ended)) {
                    refused.add(path, &failure.code, &failure.message);
                    metered.push(activity);
                }
            }
            _ => {}
        }
        super::fold(&mut state, event)?;
    }
    let started: Vec<&str> = events
        .iter()
        .filter_map(|e| if let Event::AttemptStarted { activity, .. } = e { Some(activity.as_str()) } else { None })
        .collect();
    let offered = started.iter().map(|a| signature(a, false)).chain(metered.iter().map(|a| signature(a, true)));
    let calls =
        events.iter().find_map(|e| if let Event::RunStarted { calls, .. } = e { Some(calls.clone()) } else { None });
    Ok(Told {
        input,
        permits: u32::try_from(started.len()).unwrap_or(u32::MAX),
        refused,
        catalog: Catalog::new(offered),
        calls,
        current: known,
        bounds_calls: events.iter().any(|e| matches!(e, Event::CallStopped { .. })),
        earliest,
    })
}

/// What `current` was for a step that continues as new under it, as far as this event says. Another definition is not at hand:
/// what it filled in and what it refused is taken from the row.
fn current(definition: &Definition, state: &RunState, event: &Event) -> Option<Current> {
    match event {
        Event::RunEnding { ending: Ending::Continued { definition: Some(hash), inputs, .. }, .. } => {
            let declared = |value: &Value| crate::definition::Input {
                schema: json!({}),
                required: false,
                default: Some(value.clone()),
            };
            let inputs = inputs.as_object()?.iter().map(|(name, value)| (name.clone(), declared(value))).collect();
            Some(Current::Version { hash: *hash, inputs })
        }
        Event::StepEnded { path, status: StepStatus::Failed, failure: Some(failure), .. }
        | Event::CatchStarted { path, failure, .. }
            if failure.code == "input.invalid" =>
        {
            let step = find_step(definition, state, path).ok()?;
            matches!(step.kind, Kind::ContinueAsNew { current: true, .. }).then(|| Current::Refused(failure.clone()))
        }
        _ => None,
    }
}

/// Failure codes with which a queued activity ends by the machine's own rules, and not by the hook's refusal.
const OWN: &[&str] = &["transient.worker_lost", "timeout.queue", "timeout.total", "limit.executions"];

/// The activity of a step that waits for room.
fn queued(state: &RunState, path: &str) -> Option<String> {
    match state.node(path).and_then(|n| n.live.as_ref()) {
        Some(Live::Activity { activity, phase: Phase::Queued, .. }) => Some(activity.clone()),
        _ => None,
    }
}

fn signature(activity: &str, metered: bool) -> Signature {
    Signature {
        name: activity.to_owned(),
        summary: String::new(),
        input_schema: json!({}),
        output_schema: json!({}),
        run_timeout_ms: 0,
        heartbeat_timeout_ms: None,
        metered,
        idempotent: true,
        failure_codes: Vec::new(),
    }
}

/// The input that the first events of a row tell, how many of them it is, and an instant before which it was not there.
/// `state` has them folded afterwards.
fn input(state: &mut RunState, events: &[Event]) -> Result<(Input, usize, DateTime<Utc>), Illegal> {
    let (mut first, mut messages) = (Vec::new(), Vec::new());
    let mut earliest = DateTime::UNIX_EPOCH;
    let mut used = 0;
    let at_once = closes_at_once(state, events);
    while let Some(event) = events.get(used) {
        let next = events.get(used + 1);
        let mut takes = 1;
        match event {
            Event::RunStarted { inputs, deadline, .. } => {
                // The chain's comes from outside; without one, the run's own is recorded, which is not earlier than itself.
                first.push(Input::Started { inputs: inputs.clone(), until: Some(*deadline) });
                takes += usize::from(matches!(next, Some(Event::RunEnding { ending: Ending::Failed { .. }, .. })));
            }
            Event::AttemptEnded { outcome, failure, .. } => {
                if at_once.is_none() && !taken_over(*outcome, failure.as_ref()) {
                    return Ok((results(&events[used..])?, used, earliest));
                }
                if taken_over(*outcome, failure.as_ref()) && first.is_empty() {
                    first.push(Input::TakenOver);
                }
            }
            // What an ended attempt leaves to others, or what came due: decided, and no input follows what the tree decides.
            Event::AttemptReady { .. } => {}
            Event::RunClosed { .. } if at_once.is_some() => {}
            Event::SignalReceived { n, name, payload, sender, at } => {
                earliest = earliest.max(*at);
                messages.push(Inbound::Signal {
                    n: *n,
                    name: name.clone(),
                    payload: payload.clone(),
                    sender: sender.clone(),
                    at: *at,
                });
            }
            Event::UpdateAccepted { n, id, name, payload, sender, at }
            | Event::UpdateRejected { n, id, name, payload, sender, at, .. } => {
                earliest = earliest.max(*at);
                messages.push(Inbound::Update {
                    n: *n,
                    id: id.clone(),
                    name: name.clone(),
                    payload: payload.clone(),
                    sender: sender.clone(),
                    at: *at,
                });
            }
            Event::SignalDropped { n, name } => messages.push(Inbound::Signal {
                n: *n,
                name: name.clone(),
                payload: Value::Null,
                sender: None,
                at: earliest,
            }),
            Event::Unblocked {} => messages.push(Inbound::Unblock),
            Event::RunPaused { reason, by, .. } => {
                messages.push(Inbound::Pause { reason: reason.clone(), by: by.clone() });
            }
            Event::RunResumed { reason, by, halted, .. } => {
                let (until, bounded) = bound(&events[used + 1..]);
                match (by, halted, reason.strip_prefix("to stop: "), events.get(used + 1 + bounded)) {
                    (None, None, Some(why), Some(Event::RunEnding { ending: Ending::Cancelled { reason }, .. }))
                        if why == reason =>
                    {
                        messages.push(Inbound::Cancel { reason: why.to_owned(), until });
                        takes = 2 + bounded;
                    }
                    (None, None, Some(why), _) if state.ending.is_some() => {
                        messages.push(Inbound::Cancel { reason: why.to_owned(), until });
                        takes = 1 + bounded;
                    }
                    _ => messages.push(Inbound::Resume {
                        reason: reason.clone(),
                        by: by.clone(),
                        halted: halted.clone(),
                    }),
                }
            }
            Event::RunEnding { ending: Ending::Cancelled { reason }, .. } => {
                messages.push(Inbound::Cancel { reason: reason.clone(), until: None });
            }
            Event::CleanupBounded { until, .. } => {
                // Of a run that is ending already nobody keeps why.
                let reason = match next {
                    Some(Event::RunEnding { ending: Ending::Cancelled { reason }, .. }) => {
                        takes = 2;
                        reason.clone()
                    }
                    _ => String::new(),
                };
                messages.push(Inbound::Cancel { reason, until: Some(*until) });
            }
            other => match child(state, other) {
                Some(message) => messages.push(message),
                None => break,
            },
        }
        for event in &events[used..used + takes] {
            super::fold(state, event)?;
        }
        used += takes;
    }
    match at_once {
        Some(input) if first.is_empty() && messages.is_empty() => return Ok((input, events.len(), earliest)),
        // Among others it was a message; what follows from it is the same.
        Some(Input::Terminated { reason }) => messages.push(Inbound::Terminate { reason }),
        Some(Input::Messages(mut orders)) => messages.append(&mut orders),
        Some(_) | None => {}
    }
    if !messages.is_empty() {
        first.push(Input::Messages(messages));
    }
    let input = match first.len() {
        0 => Input::Tick,
        1 => first.remove(0),
        _ => Input::Several(first),
    };
    Ok((input, used, earliest))
}

/// The time that a cancel leaves, if these events begin with it, and how many of them say so.
fn bound(events: &[Event]) -> (Option<DateTime<Utc>>, usize) {
    match events.first() {
        Some(Event::CleanupBounded { until, .. }) => (Some(*until), 1),
        _ => (None, 0),
    }
}

/// The results that a row tells: every attempt that ends in it, in order.
fn results(events: &[Event]) -> Result<Input, Illegal> {
    let mut found = Vec::new();
    for (i, event) in events.iter().enumerate() {
        let Event::AttemptEnded { outcome, failure, path, attempt, .. } = event else { continue };
        // The output is in the step's end.
        let output = events[i..].iter().find_map(|e| match e {
            Event::StepEnded { path: p, output, .. } if p == path => Some(output.clone()),
            _ => None,
        });
        let result = match (outcome, failure, output) {
            (Outcome::Succeeded, _, Some(output)) => Ok(output.unwrap_or(Value::Null)),
            (_, Some(failure), _) => Err(failure.clone()),
            _ => return Err(Illegal(format!("the end of an attempt of `{path}` has no result"))),
        };
        found.push(Input::AttemptEnded { path: path.clone(), attempt: *attempt, result });
    }
    Ok(if found.len() == 1 { found.remove(0) } else { Input::Several(found) })
}

/// Whether that is how a takeover closes an attempt.
fn taken_over(outcome: Outcome, failure: Option<&Failure>) -> bool {
    outcome == Outcome::Lost
        && failure.is_some_and(|f| f.kind == FailureKind::Lost && f.code == "transient.worker_lost")
}

/// What ended the run at once, if the row says so. `before`: the state that it follows.
fn closes_at_once(before: &RunState, events: &[Event]) -> Option<Input> {
    let ends = |e: &Event| matches!(e, Event::RunEnding { .. });
    let cancels = |e: &Event| matches!(e, Event::RunEnding { ending: Ending::Cancelled { .. }, .. });
    match events.last() {
        Some(Event::RunClosed { status: RunStatus::Terminated, failure, .. }) => {
            let reason = failure.as_ref().map(|f| f.message.clone()).unwrap_or_default();
            Some(Input::Terminated { reason })
        }
        // A cancel is said first, and what follows it is decided. Wrong inputs are said too, and whoever is turned away ends so all the same.
        Some(Event::RunClosed { status: RunStatus::Cancelled, failure: Some(failure), .. })
            if before.ending.is_none() && !events.iter().any(cancels) =>
        {
            Some(Input::Messages(vec![Inbound::TurnedAway { reason: failure.message.clone() }]))
        }
        // Whatever else fails a run is said first.
        Some(Event::RunClosed { status: RunStatus::Failed, .. })
            if before.ending.is_none() && !events.iter().any(ends) =>
        {
            Some(Input::Expired)
        }
        _ => None,
    }
}

/// The message of a child, if this event is what it leads to.
fn child(state: &RunState, event: &Event) -> Option<Inbound> {
    let (path, ended) = match event {
        Event::StepEnded { path, status, output, failure, .. } => (path, Some((*status, output, failure))),
        Event::CatchStarted { path, .. } => (path, None),
        _ => return None,
    };
    let node = state.node(path)?;
    let Some(Live::Call { child, propagate, stopped, .. }) = &node.live else { return None };
    let given_up = stopped.as_ref().is_some_and(|s| s.ended >= CALL_ENDS_MAX);
    let message = |completed, output: Option<Value>, failure, cancelled| {
        Some(Inbound::Child { run_id: *child, completed, output, failure, cancelled })
    };
    let failure = match (ended, event) {
        (Some((StepStatus::Succeeded, output, _)), _) => return message(true, output.clone(), None, false),
        (Some((StepStatus::Cancelled, _, Some(failure))), _) if given_up && failure.code == "call.abandoned" => {
            return None;
        }
        (Some((StepStatus::Cancelled, _, failure)), _) if *propagate => {
            return message(false, None, failure.clone(), true);
        }
        (Some((StepStatus::Failed, _, Some(failure))), _) | (None, Event::CatchStarted { failure, .. }) => failure,
        _ => return None,
    };
    // Everything else with which a call fails is the machine's own.
    match failure.code.as_str() {
        "call.failed" => message(false, None, failure.cause.as_deref().cloned(), false),
        "call.cancelled" => message(false, None, failure.cause.as_deref().cloned(), true),
        _ => None,
    }
}

/// The instant of a decision, from one of its events.
fn instant(event: &Event) -> Option<DateTime<Utc>> {
    match event {
        Event::RunStarted { at, .. }
        | Event::StepStarted { at, .. }
        | Event::AttemptStarted { at, .. }
        | Event::AttemptBlocked { at, .. }
        | Event::AttemptEnded { at, .. }
        | Event::StepEnded { at, .. }
        | Event::RunPaused { at, .. }
        | Event::RunResumed { at, .. }
        | Event::RunForked { at, .. }
        | Event::RunMigrated { at, .. }
        | Event::RunEnding { at, .. }
        | Event::FinallyStarted { at, .. }
        | Event::CallStopped { at, .. }
        | Event::CallOverdue { at, .. }
        | Event::CleanupBounded { at, .. }
        | Event::RunClosed { at, .. } => Some(*at),
        // That of a signal is its sending's.
        Event::StepSkipped { .. }
        | Event::RetryScheduled { .. }
        | Event::AttemptReady { .. }
        | Event::RoundStarted { .. }
        | Event::RoundDelayed { .. }
        | Event::ItemStarted { .. }
        | Event::ItemEnded { .. }
        | Event::BranchEnded { .. }
        | Event::CatchStarted { .. }
        | Event::SignalReceived { .. }
        | Event::SignalDropped { .. }
        | Event::SignalConsumed { .. }
        | Event::UpdateAccepted { .. }
        | Event::UpdateRejected { .. }
        | Event::UpdateCompleted { .. }
        | Event::DecisionCounted { .. }
        | Event::Reminded { .. }
        | Event::Unblocked {}
        | Event::StopRequested { .. } => None,
    }
}

/// A draw that gives the recorded instant of a retry; any, if there is no retry or no draw gives it.
fn draw(definition: &Definition, state: &RunState, events: &[Event], now: DateTime<Utc>) -> u64 {
    let retry = events.iter().find_map(|e| match e {
        Event::RetryScheduled { path, due_at, failure } => Some((path, *due_at, failure)),
        _ => None,
    });
    let Some((path, due_at, failure)) = retry else { return 0 };
    let Some(live @ Live::Activity { .. }) = state.node(path).and_then(|n| n.live.as_ref()) else { return 0 };
    let Ok(step) = find_step(definition, state, path) else { return 0 };
    let wanted = u64::try_from((due_at - now).num_milliseconds()).unwrap_or(0);
    // The delay falls as the draw rises.
    let (mut low, mut high) = (0u64, (1u64 << 53) - 1);
    while low < high {
        let middle = low + (high - low) / 2;
        if wait_ms(&step.retry, live, failure, middle << 11) > wanted {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    low << 11
}
