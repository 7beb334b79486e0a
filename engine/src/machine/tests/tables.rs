//! Every state with every event that may move it, as the README shows it.

use super::*;
use crate::event::{Ending, Opened, Outcome, StepStatus};

const README: &str = include_str!("../../../README.md");
/// What cannot follow: folding it is an invariant breach.
const ILLEGAL: &str = "–";

/// Compares a table with the README's. The generated text is the message, ready to be pasted.
fn compare(
    corner: &str,
    states: &[(&str, RunState)],
    events: &[(&'static str, Event)],
    name: impl Fn(&RunState) -> String,
) {
    compare_each(corner, states, &|_| events.to_vec(), name);
}

/// The same where an event of that name depends on the state.
fn compare_each<E: AsRef<[(&'static str, Event)]>>(
    corner: &str,
    states: &[(&str, RunState)],
    events: &dyn Fn(&RunState) -> E,
    name: impl Fn(&RunState) -> String,
) {
    let mut table = format!("| {corner} |");
    let heads = events(&states[0].1);
    heads.as_ref().iter().for_each(|(event, _)| table.push_str(&format!(" `{event}` |")));
    table.push_str("\n|");
    table.push_str(&" --- |".repeat(heads.as_ref().len() + 1));
    for (from, state) in states {
        table.push_str(&format!("\n| **{from}** |"));
        for (_, event) in events(state).as_ref() {
            let mut state = state.clone();
            let to = fold(&mut state, event).map_or_else(|_| ILLEGAL.to_owned(), |()| name(&state));
            table.push_str(&format!(" {to} |"));
        }
    }
    assert!(README.contains(&table), "the README should say\n\n{table}\n");
}

fn now() -> DateTime<Utc> {
    Utc.with_ymd_and_hms(2026, 11, 25, 12, 0, 0).single().expect("valid")
}

fn started() -> RunState {
    let mut state = RunState::new(RunId::new());
    fold(&mut state, &run_started()).expect("legal");
    state
}

fn run_started() -> Event {
    Event::RunStarted {
        inputs: json!({}),
        env: BTreeMap::new(),
        calls: BTreeMap::new(),
        at: now(),
        deadline: now() + chrono::Duration::days(1),
    }
}

fn after(mut state: RunState, events: &[Event]) -> RunState {
    events.iter().for_each(|e| fold(&mut state, e).expect("legal"));
    state
}

fn ending(ending: Ending) -> Event {
    Event::RunEnding { ending, at: now() }
}

fn step_ended(path: &str) -> Event {
    Event::StepEnded {
        path: path.into(),
        status: StepStatus::Succeeded,
        output: None,
        failure: None,
        tolerated: false,
        hoist: false,
        extras: Value::Null,
        at: now(),
    }
}

#[test]
fn runs() {
    let finished = || ending(Ending::Completed { output: Value::Null });
    let next = RunId::new();
    let continued = || ending(Ending::Continued { run: next, inputs: Value::Null, definition: None });
    let failed = || ending(Ending::Failed { failure: Failure::cancelled() });
    let cancelled = || ending(Ending::Cancelled { reason: String::new() });
    let finally = || Event::FinallyStarted { at: now(), deadline: now() };
    let paused = || Event::RunPaused { reason: String::new(), by: None, at: now() };
    let resumed = || Event::RunResumed { reason: String::new(), by: None, halted: None, at: now() };
    let migrated = || Event::RunMigrated {
        from: DefinitionHash([1; 32]),
        to: DefinitionHash([2; 32]),
        map: BTreeMap::new(),
        skipped: Vec::new(),
        reason: String::new(),
        by: None,
        inputs: None,
        env: BTreeMap::new(),
        calls: BTreeMap::new(),
        notes: Vec::new(),
        at: now(),
    };
    let closed = || Event::RunClosed { status: RunStatus::Completed, output: None, failure: None, at: now() };
    let states = [
        ("pending", RunState::new(RunId::new())),
        ("running", started()),
        ("running, ending", after(started(), &[finished()])),
        ("running, continuing", after(started(), &[continued()])),
        ("cancelling", after(started(), &[cancelled()])),
        ("in finally", after(started(), &[cancelled(), finally()])),
        ("in finally, continuing", after(started(), &[continued(), finally()])),
        ("paused", after(started(), &[paused()])),
        ("closed", after(started(), &[finished(), closed()])),
    ];
    let events = [
        ("run_started", run_started()),
        ("run_ending: completed", finished()),
        ("run_ending: continued", continued()),
        ("run_ending: failed", failed()),
        ("run_ending: cancelled", cancelled()),
        ("finally_started", finally()),
        ("run_closed", closed()),
        ("run_paused", paused()),
        ("run_resumed", resumed()),
        ("run_migrated", migrated()),
    ];
    compare("run", &states, &events, |s| {
        let continuing = matches!(s.ending, Some(Ending::Continued { .. }));
        let text = match (s.status, s.ending.is_some(), s.finally.is_some()) {
            (status, ..) if status.is_closed() => "closed",
            (RunStatus::Pending, ..) => "pending",
            (RunStatus::Paused, ..) => "paused",
            (_, _, true) if continuing => "in finally, continuing",
            (_, _, true) => "in finally",
            (RunStatus::Cancelling, ..) => "cancelling",
            (_, true, _) if continuing => "running, continuing",
            (_, true, _) => "running, ending",
            _ => "running",
        };
        text.to_owned()
    });
}

#[test]
fn attempts() {
    let run = started();
    let id = |n| AttemptId::derive(run.run_id, "a", n);
    let open = Event::StepStarted {
        path: "a".into(),
        at: now(),
        opened: Opened::Activity {
            activity: "work@1".into(),
            input: json!({}),
            overrides: Vec::new(),
            queue_deadline: now(),
            total_deadline: None,
        },
    };
    let start = |n| Event::AttemptStarted {
        path: "a".into(),
        attempt: n,
        attempt_id: id(n),
        activity: "work@1".into(),
        at: now(),
        deadline: now(),
    };
    let end = |n, outcome| Event::AttemptEnded {
        path: "a".into(),
        attempt: n,
        attempt_id: id(n),
        activity: "work@1".into(),
        outcome,
        output: None,
        failure: None,
        at: now(),
    };
    let retry = || Event::RetryScheduled { path: "a".into(), due_at: now(), failure: Failure::cancelled() };
    let block = || Event::AttemptBlocked { path: "a".into(), reason: String::new(), message: String::new(), at: now() };
    // Every state has had one attempt, so that one table has the same event names for all.
    let queued = after(run.clone(), &[open, start(1), end(1, Outcome::Lost)]);
    let states = [
        ("queued", queued.clone()),
        ("running", after(queued.clone(), &[start(2)])),
        ("backoff", after(queued.clone(), &[retry()])),
        ("blocked", after(queued.clone(), &[block()])),
        ("ended", after(queued.clone(), &[step_ended("a")])),
    ];
    let events = [
        ("attempt_started", start(2)),
        ("attempt_blocked", block()),
        ("attempt_ended: succeeded, failed, timed_out, cancelled", end(2, Outcome::Failed)),
        ("attempt_ended: lost", end(2, Outcome::Lost)),
        ("attempt_ended: blocked", end(2, Outcome::Blocked)),
        ("retry_scheduled", retry()),
        ("attempt_ready", Event::AttemptReady { path: "a".into() }),
        ("unblocked", Event::Unblocked {}),
        ("step_ended", step_ended("a")),
    ];
    compare("activity", &states, &events, |s| {
        let text = match s.node("a").and_then(|n| n.live.as_ref()) {
            Some(Live::Activity { phase: Phase::Queued, .. }) => "queued",
            Some(Live::Activity { phase: Phase::Running { .. }, .. }) => "running",
            Some(Live::Activity { phase: Phase::Backoff { .. }, .. }) => "backoff",
            Some(Live::Activity { phase: Phase::Blocked { .. }, .. }) => "blocked",
            _ => "ended",
        };
        text.to_owned()
    });
}

#[test]
fn timers() {
    let open = |opened| Event::StepStarted { path: "w".into(), at: now(), opened };
    let wait = after(started(), &[open(Opened::Wait { until: now() })]);
    let ask = after(started(), &[open(Opened::Await { signal: "s".into(), deadline: now(), show: None })]);
    let round = |n| Event::RoundStarted { path: "w".into(), round: n, previous: Value::Null };
    let delay = || Event::RoundDelayed { path: "w".into(), until: now() };
    let repeat = after(started(), &[open(Opened::Repeat), round(1)]);
    let states = [
        ("wait pending", wait.clone()),
        ("await pending", ask),
        ("round running", repeat.clone()),
        ("round delayed", after(repeat, &[delay()])),
        ("ended", after(wait, &[step_ended("w")])),
    ];
    let stop = Event::StopRequested { path: "w".into(), reason: String::new() };
    let events = [
        ("reminded", Event::Reminded { path: "w".into(), count: 1 }),
        ("round_delayed", delay()),
        ("round_started", round(2)),
        ("stop_requested", stop),
        ("step_ended", step_ended("w")),
    ];
    compare("timer", &states, &events, |s| {
        let node = s.node("w").expect("there");
        let text = match (&node.live, node.stopping) {
            (None, _) => "ended",
            (_, true) => "stopping",
            (Some(Live::Wait { .. }), _) => "wait pending",
            (Some(Live::Await { .. }), _) => "await pending",
            (Some(Live::Repeat { delayed_until: Some(_), .. }), _) => "round delayed",
            _ => "round running",
        };
        text.to_owned()
    });
}

#[test]
fn calls() {
    let opened = Opened::Call {
        child: RunId::new(),
        workflow: "w".into(),
        inputs: json!({}),
        definition: String::new(),
        propagate: true,
        terminate: false,
    };
    let waits = after(started(), &[Event::StepStarted { path: "c".into(), at: now(), opened }]);
    let stop = || Event::StopRequested { path: "c".into(), reason: String::new() };
    let until = |second| now() + chrono::Duration::seconds(second);
    let told = |second| Event::CallStopped { path: "c".into(), at: now(), until: until(second) };
    let overdue = |times, spares| Event::CallOverdue { path: "c".into(), times, spares, at: now(), until: until(60) };
    let stopped = after(waits.clone(), &[stop(), told(60)]);
    let states = [
        ("waits for its child", waits.clone()),
        ("stops", after(waits.clone(), &[stop()])),
        ("stops, until", stopped.clone()),
        ("overdue, child spared", after(stopped.clone(), &[overdue(1, true)])),
        ("overdue, child ended", after(stopped.clone(), &[overdue(1, false)])),
        ("ended", after(waits, &[step_ended("c")])),
    ];
    let first = |state: &RunState| match state.node("c").and_then(|n| n.live.as_ref()) {
        Some(Live::Call { stopped: Some(stopped), .. }) => stopped.times + 1,
        _ => 1,
    };
    // The next one of each state, so that one table has the same event names for all.
    let events = |state: &RunState| {
        [
            ("stop_requested", stop()),
            ("call_stopped", told(30)),
            ("call_overdue: spares", overdue(first(state), true)),
            ("call_overdue", overdue(first(state), false)),
            ("step_ended", step_ended("c")),
        ]
    };
    let name = |s: &RunState| {
        let node = s.node("c").expect("there");
        let text = match &node.live {
            None => "ended",
            Some(Live::Call { stopped: None, .. }) if !node.stopping => "waits for its child",
            Some(Live::Call { stopped: None, .. }) => "stops",
            Some(Live::Call { stopped: Some(s), .. }) if s.ended > 0 => "overdue, child ended",
            Some(Live::Call { stopped: Some(s), .. }) if s.times > 0 => "overdue, child spared",
            Some(_) => "stops, until",
        };
        text.to_owned()
    };
    compare_each("call", &states, &events, name);
}

#[test]
fn signals() {
    let open = Event::StepStarted {
        path: "w".into(),
        at: now(),
        opened: Opened::Await { signal: "s".into(), deadline: now(), show: None },
    };
    let received = |n| Event::SignalReceived { n, name: "s".into(), payload: Value::Null, sender: None, at: now() };
    let empty = after(started(), &[open]);
    let held = after(empty.clone(), &[received(1)]);
    let mut full = empty.clone();
    (1..=MAILBOX_MAX as u64).for_each(|n| fold(&mut full, &received(n)).expect("legal"));
    let update = |n| Event::UpdateAccepted {
        n,
        id: "u".into(),
        name: "s".into(),
        payload: Value::Null,
        sender: None,
        at: now(),
    };
    let asked = after(empty.clone(), &[update(1)]);
    let states = [("none", empty), ("kept", held), ("update kept", asked), ("mailbox full", full)];
    let events = [
        ("signal_received", received(1_000)),
        ("signal_dropped", Event::SignalDropped { n: 1_000, name: "s".into() }),
        ("update_accepted", update(1_000)),
        ("signal_consumed", Event::SignalConsumed { path: "w".into(), n: 1 }),
        ("decision_counted", Event::DecisionCounted { path: "w".into(), n: 1 }),
        (
            "update_completed",
            Event::UpdateCompleted { path: "w".into(), n: 1, id: "u".into(), result: Some(json!(1)), failure: None },
        ),
    ];
    compare("signal", &states, &events, |s| format!("{} kept", s.mailbox.len()));
}
