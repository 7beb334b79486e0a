//! Every state of a run with every input that may move it: what the machine decides, a line each, compared with
//! `matrix.txt`. Nothing panics, nothing that can happen is illegal, a
//! closed run hears nothing. A changed line is a changed behavior: read it,
//! then take the new text over with `MATRIX_UPDATE=1`.

use chrono::{DateTime, Duration, TimeZone, Utc};
use loopwright_engine::{
    Failure,
    definition::{
        Approval, Await, CallVersion, Data, Definition, FORMAT, Kind, OnTimeout, ParentClose, RetryPolicy, Step,
        Timeouts, WaitUntil,
    },
    ids::{DefinitionHash, RunId},
    machine::{Command, Decision, Inbound, Input, Moment, Refusals, RunState, decide, next_due},
    signature::{Catalog, Signature},
};
use serde_json::{Value, json};
use std::{cell::Cell, collections::BTreeMap, path::Path};
use uuid::Uuid;

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
}

impl Place {
    fn new(definition: Definition) -> Self {
        let run = RunId(Uuid::from_u128(1));
        Self { definition, state: RunState::new(run), child: RunId(Uuid::from_u128(2)) }
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
    message(Inbound::Cancel { reason: "enough".into() })
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
    let next = step("a", Kind::ContinueAsNew { with: BTreeMap::new(), current: false });
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
        ("paused, queued", one().after(vec![started(), pause(), Input::TakenOver])),
        ("paused, running", one().after(vec![started(), pause()])),
        ("cancelling", one().after(vec![started(), cancel()])),
        ("finally", one().after(vec![started(), ended("a", 1, Err(Failure::permanent("user.bad", "x")))])),
        ("finally, continuing", Place::new(definition(next)).after(vec![started()])),
        ("closed", one().after([vec![started()], all.to_vec()].concat())),
    ]
}

/// The inputs; the instant is when they arrive.
fn inputs(place: &Place) -> Vec<(&'static str, Input, DateTime<Utc>)> {
    let soon = now() + Duration::seconds(2);
    let due = next_due(&place.definition, &place.state).clamp(soon, now() + Duration::days(1));
    let child = |completed| {
        message(Inbound::Child {
            run_id: place.child,
            completed,
            output: Some(json!({})),
            failure: (!completed).then(|| Failure::permanent("user.child", "x")),
            cancelled: false,
        })
    };
    vec![
        ("started", started(), soon),
        ("taken over", Input::TakenOver, soon),
        ("succeeded", ended("a", 1, Ok(json!(1))), soon),
        ("failed, retryable", ended("a", 1, Err(Failure::retryable("transient.network", "x"))), soon),
        ("failed, permanent", ended("a", 1, Err(Failure::permanent("user.bad", "x"))), soon),
        ("stopped", ended("a", 1, Err(Failure::cancelled())), soon),
        ("succeeded, later attempt", ended("a", 7, Ok(json!(1))), soon),
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
        ("child completed", child(true), soon),
        ("child failed", child(false), soon),
        ("pause", pause(), soon),
        ("resume", message(Inbound::Resume { reason: "now".into(), by: None, halted: None }), soon),
        ("cancel", cancel(), soon),
        ("terminated by its parent", message(Inbound::Terminate { reason: "parent".into() }), soon),
        ("terminated", Input::Terminated { reason: "operator".into() }, soon),
        ("expired", Input::Expired, soon),
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
            let mut place =
                Place { definition: place.definition.clone(), state: place.state.clone(), child: place.child };
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
