//! Every state of a run with every input that may move it: what the machine decides, a line each, compared with
//! `matrix.txt`. Nothing panics, nothing that can happen is illegal, a
//! closed run hears nothing. A changed line is a changed behavior: read it,
//! then take the new text over with `MATRIX_UPDATE=1`.
//!
//! That it is full, the compiler sees to: a new variant of what a state or an input consists of has no name in [`names`] and does
//! not compile; and every name that is there must be met by a state or an input of the matrix.

use chrono::{DateTime, Duration, TimeZone, Utc};
use loopwright_engine::{
    Failure, FailureKind,
    definition::{
        Approval, Await, Branch, CallVersion, Case, Catch, Data, Definition, Exhausted, Expr, FORMAT, Join, Kind,
        OnItemFailure, OnTimeout, ParentClose, RepeatCondition, RetryPolicy, Step, Timeouts, WaitUntil,
    },
    event::Ending,
    ids::{DefinitionHash, RunId},
    machine::{
        Command, Decision, Frame, Inbound, Input, Live, Moment, Phase, Refusals, RunState, Stopped, decide, next_due,
    },
    signature::{Catalog, Signature},
    view::RunStatus,
};
use serde_json::{Value, json};
use std::{
    cell::Cell,
    collections::{BTreeMap, BTreeSet},
    path::Path,
};
use uuid::Uuid;

/// Names of variants, and the list of all of them.
macro_rules! names {
    ($function:ident, $all:ident, $of:ty: $($pattern:pat => $name:literal,)*) => {
        const $all: &[&str] = &[$($name),*];
        fn $function(of: &$of) -> &'static str {
            match of { $($pattern => $name,)* }
        }
    };
}

names! { input_name, INPUTS, Input:
    Input::Started { .. } => "started",
    Input::TakenOver => "taken over",
    Input::AttemptEnded { result: Ok(_), .. } => "attempt ended well",
    Input::AttemptEnded { result: Err(_), .. } => "attempt failed",
    Input::Messages(_) => "messages",
    Input::Tick => "tick",
    Input::Terminated { .. } => "terminated",
    Input::Expired => "expired",
    Input::Several(_) => "several",
}
names! { message_name, MESSAGES, Inbound:
    Inbound::Signal { .. } => "signal",
    Inbound::Update { .. } => "update",
    Inbound::Cancel { until: None, .. } => "cancel",
    Inbound::Cancel { until: Some(_), .. } => "cancel within",
    Inbound::Terminate { .. } => "terminate",
    Inbound::TurnedAway { .. } => "turned away",
    Inbound::Unblock => "unblock",
    Inbound::Pause { .. } => "pause",
    Inbound::Resume { halted: None, .. } => "resume",
    Inbound::Resume { halted: Some(_), .. } => "resume of one that was set aside",
    Inbound::Child { completed: true, .. } => "child completed",
    Inbound::Child { completed: false, cancelled: false, .. } => "child failed",
    Inbound::Child { completed: false, cancelled: true, .. } => "child cancelled",
}
names! { failure_name, FAILURES, FailureKind:
    FailureKind::Retryable => "retryable",
    FailureKind::Permanent => "permanent",
    FailureKind::Cancelled => "cancelled",
    FailureKind::TimedOut => "timed out",
    FailureKind::Panicked => "panicked",
    FailureKind::Lost => "lost",
    FailureKind::Blocked => "blocked",
}
names! { status_name, STATUSES, RunStatus:
    RunStatus::Pending => "pending",
    RunStatus::Running => "running",
    RunStatus::Paused => "paused",
    RunStatus::Cancelling => "cancelling",
    RunStatus::Completed => "completed",
    RunStatus::Failed => "failed",
    RunStatus::Cancelled => "cancelled",
    RunStatus::Terminated => "terminated",
    RunStatus::Continued => "continued",
    RunStatus::Quarantined => "quarantined",
}
/// The row's alone: no event leads there, and nobody asks the machine about such a run.
const OF_ROWS: &[&str] = &["quarantined"];
names! { live_name, LIVES, Live:
    Live::Activity { .. } => "activity",
    Live::Group { .. } => "group",
    Live::Switch { .. } => "switch",
    Live::Parallel { .. } => "parallel",
    Live::Foreach { .. } => "foreach",
    Live::Repeat { delayed_until: None, .. } => "repeat",
    Live::Repeat { delayed_until: Some(_), .. } => "repeat, delayed",
    Live::Wait { .. } => "wait",
    Live::Await { .. } => "await",
    Live::Call { stopped: None, .. } => "call",
    Live::Call { stopped: Some(Stopped { times: 0, .. }), .. } => "call, stopped",
    Live::Call { stopped: Some(_), .. } => "call, overdue",
    Live::Catch { .. } => "catch",
}
names! { phase_name, PHASES, Phase:
    Phase::Queued => "queued",
    Phase::Running { .. } => "running",
    Phase::Backoff { .. } => "backoff",
    Phase::Blocked { .. } => "blocked",
}
names! { ending_name, ENDINGS, Ending:
    Ending::Completed { .. } => "ending: completed",
    Ending::Failed { .. } => "ending: failed",
    Ending::Cancelled { .. } => "ending: cancelled",
    Ending::Continued { .. } => "ending: continued",
}

/// What a frame holds that is under way, and what that holds.
fn under_way(frame: &Frame, names: &mut BTreeSet<&'static str>) {
    for live in frame.nodes.values().filter_map(|node| node.live.as_ref()) {
        names.insert(live_name(live));
        match live {
            Live::Activity { phase, .. } => drop(names.insert(phase_name(phase))),
            Live::Group { frame }
            | Live::Switch { frame, .. }
            | Live::Repeat { frame, .. }
            | Live::Catch { frame, .. } => {
                under_way(frame, names);
            }
            Live::Parallel { branches, .. } => branches.values().for_each(|branch| under_way(&branch.frame, names)),
            Live::Foreach { active, .. } => active.values().for_each(|frame| under_way(frame, names)),
            Live::Wait { .. } | Live::Await { .. } | Live::Call { .. } => {}
        }
    }
}

fn names_of_state(state: &RunState) -> BTreeSet<&'static str> {
    let mut names = BTreeSet::from([status_name(&state.status)]);
    names.extend(state.ending.as_ref().map(ending_name));
    [Some(&state.body), state.finally.as_ref()].into_iter().flatten().for_each(|frame| under_way(frame, &mut names));
    names
}

fn names_of_input(input: &Input) -> BTreeSet<&'static str> {
    let mut names = BTreeSet::from([input_name(input)]);
    match input {
        Input::Messages(messages) => names.extend(messages.iter().map(message_name)),
        Input::Several(inputs) => names.extend(inputs.iter().flat_map(names_of_input)),
        Input::AttemptEnded { result: Err(failure), .. } => drop(names.insert(failure_name(&failure.kind))),
        Input::Started { .. }
        | Input::TakenOver
        | Input::AttemptEnded { result: Ok(_), .. }
        | Input::Tick
        | Input::Terminated { .. }
        | Input::Expired => {}
    }
    names
}

fn now() -> DateTime<Utc> {
    Utc.with_ymd_and_hms(2026, 11, 25, 12, 0, 0).single().expect("valid")
}

fn step(id: &str, kind: Kind) -> Step {
    let retry = RetryPolicy { attempts: 3, jitter: 0.0, ..RetryPolicy::default() };
    Step {
        id: id.into(),
        condition: None,
        kind,
        retry,
        timeouts: Timeouts::default(),
        catch: Vec::new(),
        continue_on_error: false,
    }
}

fn work(id: &str) -> Step {
    step(id, Kind::Activity { name: "work@1".into(), with: BTreeMap::new() })
}

fn definition(first: Step) -> Definition {
    Definition {
        format: FORMAT,
        name: "matrix".into(),
        inputs: BTreeMap::new(),
        env: BTreeMap::new(),
        timeout_ms: 3_600_000,
        budget: Value::Null,
        concurrency: None,
        executions_max: 100,
        steps: vec![first, work("b")],
        finally: vec![work("clean")],
        outputs: BTreeMap::new(),
        runs_on: Vec::new(),
        queries: BTreeMap::new(),
        extras: Value::Null,
    }
}

fn awaiting(approval: Option<Approval>) -> Definition {
    let spec = Await {
        signal: if approval.is_some() { "a".into() } else { "go".into() },
        timeout_ms: 60_000,
        form: None,
        show: None,
        to: Vec::new(),
        filter: None,
        remind_ms: Vec::new(),
        on_timeout: OnTimeout::Default,
        default: Some(Data::Literal(json!({}))),
        approval,
        reply: None,
    };
    definition(step("a", Kind::Await(Box::new(spec))))
}

struct Place {
    definition: Definition,
    state: RunState,
    child: RunId,
    /// Of the activity whose attempts end.
    work: &'static str,
}

impl Place {
    fn new(definition: Definition) -> Self {
        let run = RunId(Uuid::from_u128(1));
        Self { definition, state: RunState::new(run), child: RunId(Uuid::from_u128(2)), work: "a" }
    }

    fn with_work_at(self, work: &'static str) -> Self {
        Self { work, ..self }
    }

    fn give(&mut self, input: Input, permits: u32, at: DateTime<Utc>) -> Result<Decision, String> {
        let catalog = Catalog::new([Signature {
            name: "work@1".into(),
            summary: String::new(),
            input_schema: json!({}),
            output_schema: json!({}),
            run_timeout_ms: 1_000,
            heartbeat_timeout_ms: None,
            metered: true,
            idempotent: true,
            failure_codes: Vec::new(),
        }]);
        let calls = BTreeMap::from([("child@latest".to_owned(), DefinitionHash([7; 32]))]);
        let moment = Moment {
            now: at,
            draw: 0,
            permits: Cell::new(permits),
            refused: &Refusals::default(),
            catalog: &catalog,
            calls: &calls,
            current: None,
            depth: 0,
            bounds_calls: true,
            workflow: "matrix",
        };
        let decision = decide(&self.definition, &mut self.state, input, &moment).map_err(|e| e.to_string())?;
        for command in &decision.commands {
            if let Command::StartChild { run_id, .. } = command {
                self.child = *run_id;
            }
        }
        Ok(decision)
    }

    /// The state after these inputs, with room for every attempt.
    fn after(mut self, inputs: Vec<Input>) -> Self {
        for input in inputs {
            self.give(input, 9, now()).expect("legal");
        }
        self
    }

    /// So often later, as soon as something is due.
    fn due(mut self, times: u32) -> Self {
        for _ in 0..times {
            self.give(Input::Tick, 9, next_due(&self.definition, &self.state)).expect("legal");
        }
        self
    }
}

fn started() -> Input {
    Input::Started { inputs: json!({}), until: None }
}
fn ended(path: &str, attempt: u32, result: Result<Value, Failure>) -> Input {
    Input::AttemptEnded { path: path.into(), attempt, result }
}
fn message(message: Inbound) -> Input {
    Input::Messages(vec![message])
}
fn cancel() -> Input {
    message(Inbound::Cancel { reason: "enough".into(), until: None })
}
fn cancel_within(time: Duration) -> Input {
    message(Inbound::Cancel { reason: "enough".into(), until: Some(now() + time) })
}
fn pause() -> Input {
    message(Inbound::Pause { reason: "not now".into(), by: None })
}
fn signal(name: &str, payload: Value) -> Input {
    message(Inbound::Signal { n: 1, name: name.into(), payload, sender: None, at: now() + Duration::seconds(1) })
}

fn update(name: &str, payload: Value) -> Input {
    let (id, at) = ("u".to_owned(), now() + Duration::seconds(1));
    message(Inbound::Update { n: 1, id, name: name.into(), payload, sender: None, at })
}

fn states() -> Vec<(&'static str, Place)> {
    let one = || Place::new(definition(work("a")));
    let mut queued = one();
    queued.give(started(), 0, now()).expect("legal");
    let call = |parent_close| {
        let (workflow, version, with) = ("child".into(), CallVersion::Latest, BTreeMap::new());
        Place::new(definition(step("a", Kind::Call { workflow, version, with, parent_close }))).after(vec![started()])
    };
    let retryable = Failure::retryable("transient.network", "x");
    let approval = Approval { quorum: 2, fail_on_reject: true };
    let next = || step("a", Kind::ContinueAsNew { with: BTreeMap::new(), current: false });
    let bad = || ended("a", 1, Err(Failure::permanent("user.bad", "x")));
    let stopped = || ended("a", 1, Err(Failure::cancelled()));
    let block = |kind| Place::new(definition(step("a", kind))).after(vec![started()]);
    let branch = |name: &str| Branch { name: name.into(), steps: vec![work("w")] };
    let parallel = Kind::Parallel { branches: vec![branch("l"), branch("r")], join: Join::All, fail_fast: true };
    let each = Kind::Foreach {
        list: Expr("[1, 2]".into()),
        key: None,
        max_items: 2,
        concurrency: 2,
        on_item_failure: OnItemFailure::Continue,
        steps: vec![work("w")],
        outputs: None,
    };
    let rounds = || Kind::Repeat {
        steps: vec![work("w")],
        max_rounds: 3,
        condition: RepeatCondition::While(Expr("true".into())),
        delay_ms: 10_000,
        exhausted: Exhausted::Continue,
        transparent: false,
        gate: None,
        outputs: None,
    };
    let mut caught = work("a");
    caught.catch = vec![Catch { on: vec!["*".into()], condition: None, steps: vec![work("w")] }];
    let all = [("a", 1), ("b", 1), ("!finally/clean", 1)].map(|(path, n)| ended(path, n, Ok(json!(1))));
    let timer = step("a", Kind::Wait { until: WaitUntil::For(30_000) });
    vec![
        ("pending", one()),
        ("queued", queued),
        ("running", one().after(vec![started()])),
        ("backoff", one().after(vec![started(), ended("a", 1, Err(retryable))])),
        ("blocked", one().after(vec![started(), ended("a", 1, Err(Failure::blocked("credits", "none")))])),
        ("timer", Place::new(definition(timer)).after(vec![started()])),
        ("await", Place::new(awaiting(None)).after(vec![started()])),
        ("approval", Place::new(awaiting(Some(approval))).after(vec![started()])),
        ("call", call(ParentClose::Cancel)),
        ("call, terminate", call(ParentClose::Terminate)),
        ("call, abandon", call(ParentClose::Abandon)),
        ("call, stopped", call(ParentClose::Cancel).after(vec![cancel()])),
        ("call, terminate, stopped", call(ParentClose::Terminate).after(vec![cancel()])),
        ("call, overdue", call(ParentClose::Cancel).after(vec![cancel()]).due(1)),
        ("call, overdue, within", call(ParentClose::Cancel).after(vec![cancel_within(Duration::seconds(8))]).due(1)),
        ("call, to be given up", call(ParentClose::Terminate).after(vec![cancel()]).due(3)),
        ("cancelling, within", one().after(vec![started(), cancel_within(Duration::minutes(1))])),
        ("paused, queued", one().after(vec![started(), pause(), Input::TakenOver])),
        ("paused, running", one().after(vec![started(), pause()])),
        ("cancelling", one().after(vec![started(), cancel()])),
        ("finally", one().after(vec![started(), ended("a", 1, Err(Failure::permanent("user.bad", "x")))])),
        ("finally, continuing", Place::new(definition(next())).after(vec![started()])),
        ("closed", one().after([vec![started()], all.to_vec()].concat())),
        ("finally, completed", one().after([vec![started()], all[..2].to_vec()].concat())),
        ("group", block(Kind::Group { steps: vec![work("w")], outputs: None }).with_work_at("a/w")),
        (
            "switch",
            block(Kind::Switch { cases: vec![Case { when: None, steps: vec![work("w")] }] }).with_work_at("a/w"),
        ),
        ("parallel", block(parallel).with_work_at("a:l/w")),
        ("foreach", block(each).with_work_at("a[0]/w")),
        ("repeat", block(rounds()).with_work_at("a~1/w")),
        ("repeat, delayed", block(rounds()).after(vec![ended("a~1/w", 1, Ok(json!(1)))]).with_work_at("a~1/w")),
        ("catch", Place::new(definition(caught)).after(vec![started(), bad()]).with_work_at("a!/w")),
        ("closed, failed", one().after(vec![started(), bad(), all[2].clone()])),
        ("closed, cancelled", one().after(vec![started(), cancel(), stopped(), all[2].clone()])),
        ("closed, terminated", one().after(vec![started(), Input::Terminated { reason: "operator".into() }])),
        ("closed, continued", Place::new(definition(next())).after(vec![started(), all[2].clone()])),
    ]
}

/// The inputs; the instant is when they arrive.
fn inputs(place: &Place) -> Vec<(&'static str, Input, DateTime<Utc>)> {
    let soon = now() + Duration::seconds(2);
    let due = next_due(&place.definition, &place.state).clamp(soon, now() + Duration::days(1));
    let child = |completed, cancelled| {
        message(Inbound::Child {
            run_id: place.child,
            completed,
            output: Some(json!({})),
            failure: (!completed).then(|| Failure::permanent("user.child", "x")),
            cancelled,
        })
    };
    let of_kind = |kind| ended(place.work, 1, Err(Failure::new(kind, "test.kind", "x")));
    let resume = |halted: Option<&str>| {
        message(Inbound::Resume { reason: "now".into(), by: None, halted: halted.map(str::to_owned) })
    };
    vec![
        ("started", started(), soon),
        ("taken over", Input::TakenOver, soon),
        ("succeeded", ended(place.work, 1, Ok(json!(1))), soon),
        ("failed, retryable", ended(place.work, 1, Err(Failure::retryable("transient.network", "x"))), soon),
        ("failed, permanent", ended(place.work, 1, Err(Failure::permanent("user.bad", "x"))), soon),
        ("stopped", ended(place.work, 1, Err(Failure::cancelled())), soon),
        ("timed out", of_kind(FailureKind::TimedOut), soon),
        ("panicked", of_kind(FailureKind::Panicked), soon),
        ("lost", of_kind(FailureKind::Lost), soon),
        ("blocked", of_kind(FailureKind::Blocked), soon),
        ("succeeded, later attempt", ended(place.work, 7, Ok(json!(1))), soon),
        ("succeeded, no such step", ended("nowhere/x", 1, Ok(json!(1))), soon),
        ("cleaned up", ended("!finally/clean", 1, Ok(json!(1))), soon),
        ("tick", Input::Tick, now()),
        ("tick, due", Input::Tick, due),
        ("signal go", signal("go", json!({})), soon),
        ("signal approved", signal("a", json!({"decision": "approved"})), soon),
        ("signal rejected", signal("a", json!({"decision": "rejected"})), soon),
        ("update go", update("go", json!({})), soon),
        ("update of an approval", update("a", json!({"decision": "approved"})), soon),
        ("unblock", message(Inbound::Unblock), soon),
        ("child completed", child(true, false), soon),
        ("child failed", child(false, false), soon),
        ("child cancelled", child(false, true), soon),
        ("pause", pause(), soon),
        ("resume", resume(None), soon),
        ("resume, it was set aside", resume(Some("broken")), soon),
        ("cancel", cancel(), soon),
        ("cancel within a minute", cancel_within(Duration::minutes(1)), soon),
        ("turned away", message(Inbound::TurnedAway { reason: "no place".into() }), soon),
        ("terminated by its parent", message(Inbound::Terminate { reason: "parent".into() }), soon),
        ("terminated", Input::Terminated { reason: "operator".into() }, soon),
        ("expired", Input::Expired, soon),
        ("taken over, with a cancel", Input::Several(vec![Input::TakenOver, cancel()]), soon),
    ]
}

/// `attempt_ended a: succeeded` and so on.
fn told(event: &Value) -> String {
    let field = |name: &str| event[name].as_str().map(str::to_owned);
    let mut text = field("type").unwrap_or_default();
    if let Some(path) = field("path") {
        text.push_str(&format!(" {path}"));
    }
    let detail =
        field("outcome").or_else(|| field("status")).or_else(|| event["ending"]["kind"].as_str().map(str::to_owned));
    if let Some(detail) = detail {
        text.push_str(&format!(": {detail}"));
    }
    text
}

#[test]
fn every_state_with_every_input_decides_what_is_written_down() {
    let mut table = String::new();
    for (state, place) in states() {
        for (name, input, at) in inputs(&place) {
            let mut place = Place {
                definition: place.definition.clone(),
                state: place.state.clone(),
                child: place.child,
                work: place.work,
            };
            let closed = place.state.status.is_closed();
            let decision = match place.give(input.clone(), 9, at) {
                Ok(decision) => decision,
                Err(text) => {
                    // A run is claimed, and starts, before anything else reaches it.
                    assert_eq!(state, "pending", "{state} × {name}: {text}");
                    table.push_str(&format!("{state} × {name} → illegal: {text}\n"));
                    continue;
                }
            };
            assert!(!closed || decision == Decision::default(), "{state} × {name}: a closed run hears nothing");
            let events = serde_json::to_value(&decision.events).expect("json");
            let events: Vec<String> = events.as_array().into_iter().flatten().map(told).collect();
            let events = if events.is_empty() { "–".to_owned() } else { events.join(", ") };
            table.push_str(&format!("{state} × {name} → {}: {events}\n", place.state.status.as_str()));
            // Folded and decided: nothing is left that could move at once.
            let again = place.give(Input::Tick, 9, at).expect("legal");
            assert_eq!(again.events, [], "{state} × {name}: something could still move");
        }
    }
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/sim/matrix.txt");
    if std::env::var_os("MATRIX_UPDATE").is_some() {
        std::fs::write(&file, &table).expect("written");
    }
    let written = std::fs::read_to_string(&file).unwrap_or_default();
    let changed: Vec<&str> = table.lines().filter(|line| !written.lines().any(|w| w == *line)).collect();
    assert_eq!(table, written, "decided otherwise:\n{}", changed.join("\n"));
}

#[test]
fn the_matrix_meets_every_part_of_a_state_and_every_input() {
    let (mut states_met, mut inputs_met) = (BTreeSet::new(), BTreeSet::new());
    for (_, place) in states() {
        states_met.extend(names_of_state(&place.state));
        inputs_met.extend(inputs(&place).iter().flat_map(|(_, input, _)| names_of_input(input)));
    }
    let states = [STATUSES, LIVES, PHASES, ENDINGS].concat();
    let missing: Vec<_> = states.iter().filter(|n| !states_met.contains(*n) && !OF_ROWS.contains(n)).collect();
    assert!(missing.is_empty(), "no state of the matrix is {missing:?}: add one to `states`");
    let inputs = [INPUTS, MESSAGES, FAILURES].concat();
    let missing: Vec<_> = inputs.iter().filter(|n| !inputs_met.contains(*n)).collect();
    assert!(missing.is_empty(), "no input of the matrix is {missing:?}: add one to `inputs`");
}
