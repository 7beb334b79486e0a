//! The machine without a store: definitions are run in memory, and after every decision the recorded events are folded
//! into a second state, which must be the same.

mod attempts;
mod blocks;
mod chain;
mod close;
mod edges;
mod fork;
mod migrate;
mod migrate_random;
mod pause;
mod query;
mod random;
mod replay;
mod tables;
mod update;
mod waits;

use super::*;
use crate::{
    definition::{
        Approval, Await, Bundle, Case, Catch, Data, Definition, Escalate, Exhausted, Expr, FORMAT, Join, Kind,
        OnItemFailure, OnTimeout, RepeatCondition, RetryPolicy, Step, Template, Timeouts, WaitUntil,
    },
    failure::FailureKind,
    signature::Signature,
    view::RunStatus,
};
use chrono::TimeZone;
use serde_json::json;

fn e(text: &str) -> Expr {
    Expr(text.to_owned())
}
fn x(text: &str) -> Data {
    Data::Expr(e(text))
}
fn lit(value: Value) -> Data {
    Data::Literal(value)
}
fn step(id: &str, kind: Kind) -> Step {
    Step {
        id: id.into(),
        condition: None,
        kind,
        retry: RetryPolicy { attempts: 3, jitter: 0.0, ..RetryPolicy::default() },
        timeouts: Timeouts::default(),
        catch: Vec::new(),
        continue_on_error: false,
    }
}
fn act(id: &str, with: &[(&str, Data)]) -> Step {
    let with = with.iter().map(|(k, d)| ((*k).to_owned(), d.clone())).collect();
    step(id, Kind::Activity { name: "work@1".into(), with })
}
fn set(id: &str, name: &str, data: Data) -> Step {
    step(id, Kind::Set { values: BTreeMap::from([(name.to_owned(), data)]) })
}
fn definition(steps: Vec<Step>) -> Definition {
    Definition {
        format: FORMAT,
        name: "test".into(),
        inputs: BTreeMap::new(),
        env: BTreeMap::new(),
        timeout_ms: 7 * 86_400_000,
        budget: Value::Null,
        concurrency: None,
        executions_max: 10_000,
        steps,
        finally: Vec::new(),
        outputs: BTreeMap::new(),
        runs_on: Vec::new(),
        queries: BTreeMap::new(),
        extras: Value::Null,
    }
}

/// Runs a definition by hand.
struct Bench {
    definition: Definition,
    state: RunState,
    mirror: RunState,
    now: DateTime<Utc>,
    catalog: Catalog,
    permits: usize,
    depth: u32,
    /// Under what it may continue as new.
    current: Option<Current>,
    /// With this the hook refuses every start.
    refused: Option<(String, String)>,
    /// The hook refuses a transition that makes it hold more than this, one for each attempt that runs.
    room: Option<usize>,
    /// Attempts that were started and not ended: path → (attempt, input).
    live: BTreeMap<String, (u32, Value)>,
    cancels: Vec<String>,
    children: Vec<RunId>,
    /// Children that were told to end at once.
    ended_children: Vec<RunId>,
    /// Children that were ended because they had not, and whether they were spared if they clean up.
    overdue_children: Vec<(RunId, bool)>,
    /// By when a child was last told to have stopped.
    child_until: Option<DateTime<Utc>>,
    n: u64,
    /// What a store would hold.
    rows: Vec<crate::view::HistoryRow>,
}

impl Bench {
    fn start(definition: Definition) -> Self {
        Self::start_with(definition, json!({}))
    }
    fn start_with(mut definition: Definition, inputs: Value) -> Self {
        for name in inputs.as_object().into_iter().flat_map(|map| map.keys()) {
            let any = crate::definition::Input { schema: json!({}), required: true, default: None };
            definition.inputs.insert(name.clone(), any);
        }
        let mut bench = Self::pending(definition);
        bench.input(Input::Started { inputs, until: None });
        bench
    }
    /// Nobody has begun it.
    fn pending(definition: Definition) -> Self {
        let run = RunId::new();
        let signature = Signature {
            name: "work@1".into(),
            summary: String::new(),
            input_schema: json!({}),
            output_schema: json!({}),
            run_timeout_ms: 1000,
            heartbeat_timeout_ms: None,
            metered: true,
            idempotent: true,
            failure_codes: Vec::new(),
        };
        Self {
            definition,
            state: RunState::new(run),
            mirror: RunState::new(run),
            now: Utc.with_ymd_and_hms(2026, 11, 24, 12, 0, 0).single().expect("valid"),
            catalog: Catalog::new([signature]),
            permits: 100,
            depth: 0,
            current: None,
            refused: None,
            room: None,
            live: BTreeMap::new(),
            cancels: Vec::new(),
            children: Vec::new(),
            ended_children: Vec::new(),
            overdue_children: Vec::new(),
            child_until: None,
            n: 0,
            rows: Vec::new(),
        }
    }
    /// Decides until the hook lets the decision pass, as a worker does.
    fn decide(&mut self, input: &Input) -> Decision {
        let calls = BTreeMap::from([("child@latest".to_owned(), DefinitionHash([7; 32]))]);
        let mut refused = Refusals::default();
        loop {
            let moment = Moment {
                now: self.now,
                draw: 0,
                permits: Cell::new(u32::try_from(refused.permits(self.permits)).expect("small")),
                refused: &refused,
                catalog: &self.catalog,
                calls: &calls,
                current: self.current.as_ref(),
                depth: self.depth,
                bounds_calls: true,
                workflow: "test",
            };
            let mut state = self.state.clone();
            let decision = decide(&self.definition, &mut state, input.clone(), &moment).expect("legal");
            let starts = decision.commands.iter().filter(|c| matches!(c, Command::StartAttempt { .. })).count();
            let ends = decision.events.iter().filter(|e| matches!(e, Event::AttemptEnded { .. })).count();
            let full = self.room.is_some_and(|room| self.live.len() + starts - ends > room);
            let answer = match &self.refused {
                Some((reason, message)) => Some((reason.as_str(), message.as_str())),
                None if full => Some(("credits", "no room")),
                None => None,
            };
            let Some((reason, message)) = answer.filter(|_| starts > 0) else {
                self.state = state;
                return decision;
            };
            assert!(refused.note(&decision.commands, reason, message), "a refusal that changes nothing");
        }
    }
    fn input(&mut self, input: Input) -> Vec<Event> {
        let paused = self.state.status == RunStatus::Paused;
        let decision = self.decide(&input);
        if paused && self.state.status == RunStatus::Paused {
            assert!(!decision.more && decision.commands.iter().all(|c| !matches!(c, Command::StartChild { .. })));
            let begins = |e: &Event| matches!(e, Event::StepStarted { .. } | Event::AttemptStarted { .. });
            assert!(!decision.events.iter().any(begins), "something begins while the run is paused");
        }
        for event in &decision.events {
            let stored: Event = serde_json::from_str(&serde_json::to_string(event).expect("json")).expect("event");
            assert_eq!(&stored, event, "an event must survive its storage");
            fold(&mut self.mirror, &stored).expect("legal");
            if let Event::AttemptEnded { path, .. } = event {
                self.live.remove(path);
            }
        }
        self.rows.push(crate::view::HistoryRow {
            seq: self.rows.len() as u64 + 1,
            epoch: 1,
            format: crate::event::format_of(&decision.events),
            events: decision.events.iter().map(|e| serde_json::to_value(e).expect("json")).collect(),
            at: self.now + chrono::Duration::milliseconds(3),
        });
        let stored: RunState = serde_json::from_str(&serde_json::to_string(&self.state).expect("json")).expect("state");
        assert_eq!(self.mirror, stored, "folding the events must give the state");
        for command in decision.commands {
            match command {
                Command::StartAttempt { path, attempt, input, .. } => {
                    self.live.insert(path, (attempt, input));
                }
                Command::CancelAttempt { path } => self.cancels.push(path),
                Command::StartChild { run_id, .. } => self.children.push(run_id),
                Command::CancelChild { run_id, until } => {
                    self.children.push(run_id);
                    self.child_until = until;
                }
                Command::TerminateChild { run_id } => self.ended_children.push(run_id),
                Command::EndChild { run_id, spares } => self.overdue_children.push((run_id, spares)),
            }
        }
        if self.state.status.is_closed() {
            assert!(self.live.is_empty(), "a run closes over live attempts {:?}", self.live);
        } else if !decision.more {
            let due = next_due(&self.definition, &self.state);
            assert!(due > self.now, "time moves nothing at {due}, and its owner would spin");
        }
        let mut events = decision.events;
        if decision.more {
            events.extend(self.input(Input::Tick));
        }
        events
    }
    fn end(&mut self, path: &str, result: Result<Value, Failure>) -> Vec<Event> {
        let (attempt, _) =
            self.live.get(path).unwrap_or_else(|| panic!("no live `{path}`, only {:?}", self.live)).clone();
        self.input(Input::AttemptEnded { path: path.into(), attempt, result })
    }
    fn ok(&mut self, path: &str, output: Value) {
        self.end(path, Ok(output));
    }
    fn signal(&mut self, name: &str, payload: Value) {
        self.n += 1;
        let message =
            Inbound::Signal { n: self.n, name: name.into(), payload, sender: Some("user:1".into()), at: self.now };
        self.input(Input::Messages(vec![message]));
    }
    /// Sends an update whose id is its number.
    fn update(&mut self, name: &str, payload: Value) {
        self.n += 1;
        let (id, sender) = (format!("u{}", self.n), Some("user:1".into()));
        let message = Inbound::Update { n: self.n, id, name: name.into(), payload, sender, at: self.now };
        self.input(Input::Messages(vec![message]));
    }
    /// Decides the whole history again.
    fn replayed(&self, definition: &Definition, shared: u64) -> super::replay::Replayed {
        let mut replay = super::replay::Replay::new(definition, self.state.run_id, self.depth, shared);
        for row in &self.rows {
            if !replay.row(row).expect("folds") {
                break;
            }
        }
        replay.done()
    }
    fn later(&mut self, ms: i64) {
        self.now += chrono::Duration::milliseconds(ms);
        self.input(Input::Tick);
    }
    fn live(&self) -> Vec<&str> {
        self.live.keys().map(String::as_str).collect()
    }
    fn failed_code(&self) -> &str {
        assert_eq!(self.state.status, RunStatus::Failed);
        &self.state.failure.as_ref().expect("a failure").code
    }
}

/// `n` branches `b1` …, each of one activity `a`.
fn branches(n: usize) -> Step {
    let branch = |i| crate::definition::Branch { name: format!("b{i}"), steps: vec![act("a", &[])] };
    step("p", Kind::Parallel { branches: (1..=n).map(branch).collect(), join: Join::All, fail_fast: true })
}

fn foreach(policy: OnItemFailure, concurrency: u32) -> Step {
    step(
        "all",
        Kind::Foreach {
            list: e("inputs.items"),
            key: Some(e("item.id")),
            max_items: 4,
            concurrency,
            on_item_failure: policy,
            steps: vec![act("do", &[("id", x("item.id")), ("at", x("index"))])],
            outputs: Some(BTreeMap::from([("got".into(), x("steps.do.output"))])),
        },
    )
}

fn parallel(join: Join) -> Step {
    let branch =
        |name: &str| crate::definition::Branch { name: name.into(), steps: vec![act(&format!("do_{name}"), &[])] };
    step("p", Kind::Parallel { branches: vec![branch("l"), branch("r")], join, fail_fast: true })
}

fn await_step(id: &str, approval: Option<Approval>, on_timeout: OnTimeout) -> Step {
    step(
        id,
        Kind::Await(Box::new(Await {
            signal: id.into(),
            timeout_ms: 10_000,
            form: approval.is_none().then(|| json!({"type": "object", "required": ["text"]})),
            show: Some(Template("Q {{inputs.q}}".into())),
            to: vec!["role:owner".into()],
            filter: None,
            remind_ms: vec![2_000],
            on_timeout,
            default: Some(lit(json!({"text": "default"}))),
            approval,
            reply: None,
        })),
    )
}

#[test]
fn a_signal_is_kept_when_it_comes_early_and_read_once() {
    let mut d = definition(vec![
        act("a", &[]),
        await_step("w", None, OnTimeout::Fail),
        await_step("v", None, OnTimeout::Default),
    ]);
    d.steps[2].kind = match await_step("v", None, OnTimeout::Default).kind {
        Kind::Await(mut spec) => {
            spec.signal = "w".into();
            Kind::Await(spec)
        }
        other => other,
    };
    d.outputs.insert("first".into(), x("steps.w.output.text"));
    d.outputs.insert("by".into(), x("steps.w.by"));
    d.outputs.insert("second".into(), x("steps.v.output.text"));
    d.outputs.insert("late".into(), x("steps.v.timed_out"));
    let mut run = Bench::start_with(d, json!({"q": "?"}));
    run.signal("w", json!({"text": "early"}));
    run.ok("a", json!(1));
    run.signal("w", json!({"no": "form"}));
    assert_eq!(run.state.status, RunStatus::Running, "what does not satisfy the form is dropped");
    run.later(2_000);
    run.later(8_000);
    assert_eq!(run.state.output, Some(json!({"first": "early", "by": "user:1", "second": "default", "late": true})));
}

#[test]
fn approvals() {
    let one = Some(Approval { quorum: 1, fail_on_reject: true });
    for (decision, status) in [
        ("approved", RunStatus::Completed),
        ("changes_requested", RunStatus::Completed),
        ("rejected", RunStatus::Failed),
    ] {
        let mut run = Bench::start_with(definition(vec![await_step("ok", one, OnTimeout::Fail)]), json!({"q": 1}));
        run.signal("ok", json!({"decision": "nonsense"}));
        run.signal("ok", json!({"decision": decision, "comment": "c"}));
        assert_eq!(run.state.status, status, "{decision}");
    }
    let two = Some(Approval { quorum: 2, fail_on_reject: true });
    let mut run = Bench::start_with(definition(vec![await_step("ok", two, OnTimeout::Fail)]), json!({"q": 1}));
    run.signal("ok", json!({"decision": "approved"}));
    run.signal("ok", json!({"decision": "approved"}));
    assert_eq!(run.state.status, RunStatus::Running, "one person is one vote");
    run.later(10_000);
    assert_eq!(run.failed_code(), "approval.timeout");
}

#[test]
fn cancel_stops_what_runs_and_finally_still_happens() {
    let mut d = definition(vec![parallel(Join::All), act("never", &[])]);
    d.finally = vec![act("clean", &[])];
    let mut run = Bench::start(d);
    run.input(Input::Messages(vec![Inbound::Cancel { reason: "enough".into(), until: None }]));
    assert_eq!(run.cancels, ["p:l/do_l", "p:r/do_r"]);
    assert_eq!(run.state.status, RunStatus::Cancelling);
    run.ok("p:l/do_l", json!(1));
    run.end("p:r/do_r", Err(Failure::cancelled()));
    assert_eq!(run.live(), ["!finally/clean"]);
    run.ok("!finally/clean", json!(1));
    assert_eq!(run.state.status, RunStatus::Cancelled);
}

#[test]
fn a_failure_of_finally_fails_a_completed_run_and_hides_no_earlier_failure() {
    for (body, expected) in [(Ok(json!(1)), "user.final"), (Err(Failure::permanent("user.body", "x")), "user.body")] {
        let mut d = definition(vec![act("a", &[])]);
        d.finally = vec![act("clean", &[])];
        let mut run = Bench::start(d);
        run.end("a", body);
        run.end("!finally/clean", Err(Failure::permanent("user.final", "x")));
        assert_eq!(run.failed_code(), expected);
    }
}

#[test]
fn finish_ends_the_run_from_inside_and_stops_the_rest() {
    let mut p = parallel(Join::All);
    if let Kind::Parallel { branches, .. } = &mut p.kind {
        branches[1].steps.push(step("out", Kind::Finish { outputs: BTreeMap::from([("v".into(), lit(json!(9)))]) }));
    }
    let mut run = Bench::start(definition(vec![p, act("never", &[])]));
    run.ok("p:r/do_r", json!(1));
    assert_eq!(run.cancels, ["p:l/do_l"]);
    run.end("p:l/do_l", Err(Failure::cancelled()));
    assert_eq!((run.state.status, run.state.output), (RunStatus::Completed, Some(json!({"v": 9}))));
}

#[test]
fn time_limits() {
    let mut d = definition(vec![step("w", Kind::Wait { until: WaitUntil::For(5_000) }), act("a", &[])]);
    d.timeout_ms = 8_000;
    let mut run = Bench::start(d);
    assert_eq!(next_due(&run.definition, &run.state), run.now + chrono::Duration::seconds(5));
    run.later(5_000);
    assert_eq!(run.live(), ["a"]);
    run.later(3_000);
    assert_eq!(run.cancels, ["a"]);
    run.end("a", Err(Failure::cancelled()));
    assert_eq!(run.failed_code(), "timeout.run_total");

    let mut slow = step("g", Kind::Group { steps: vec![act("a", &[])], outputs: None });
    slow.timeouts.total_ms = Some(1_000);
    let mut run = Bench::start(definition(vec![slow]));
    run.later(1_000);
    assert_eq!(run.cancels, ["g/a"]);
    run.end("g/a", Err(Failure::cancelled()));
    assert_eq!(run.failed_code(), "timeout.total");
}

#[test]
fn a_child_run_returns_its_output_or_its_failure() {
    let call = step(
        "c",
        Kind::Call {
            workflow: "child".into(),
            version: crate::definition::CallVersion::Latest,
            with: BTreeMap::new(),
            parent_close: crate::definition::ParentClose::Cancel,
        },
    );
    let mut run = Bench::start(definition(vec![call.clone()]));
    let child = run.children[0];
    let ended = |completed, failure| Inbound::Child {
        run_id: child,
        completed,
        output: Some(json!(5)),
        failure,
        cancelled: false,
    };
    run.input(Input::Messages(vec![ended(true, None)]));
    assert_eq!(run.state.status, RunStatus::Completed);
    let mut run = Bench::start(definition(vec![call]));
    let child = run.children[0];
    let failure = Some(Failure::permanent("user.inner", "x"));
    run.input(Input::Messages(vec![Inbound::Child {
        run_id: child,
        completed: false,
        output: None,
        failure,
        cancelled: false,
    }]));
    assert_eq!(run.failed_code(), "call.failed");
}

#[test]
fn termination_closes_everything_at_once() {
    let mut d = definition(vec![parallel(Join::All)]);
    d.finally = vec![act("clean", &[])];
    let mut run = Bench::start(d);
    run.input(Input::Terminated { reason: "op".into() });
    assert_eq!(run.state.status, RunStatus::Terminated);
    assert!(run.live().is_empty());
}

#[test]
fn inputs_that_do_not_fit_fail_the_run_at_once() {
    let mut d = definition(vec![act("a", &[])]);
    let number = crate::definition::Input { schema: json!({"type": "integer"}), required: true, default: None };
    d.inputs.insert("n".into(), number);
    let mut run = Bench::start(d.clone());
    assert_eq!(run.failed_code(), "input.invalid");
    d.inputs.get_mut("n").expect("declared").default = Some(json!(3));
    run = Bench::start(d);
    assert_eq!(run.state.inputs, json!({"n": 3}));
}

#[test]
fn the_hash_sees_meaning() {
    let a = definition(vec![act("a", &[])]);
    let b = definition(vec![act("b", &[])]);
    let bundle = Bundle::from([("prompts/x.hbs".to_owned(), "one".to_owned())]);
    let other = Bundle::from([("prompts/x.hbs".to_owned(), "two".to_owned())]);
    assert_eq!(a.hash(&bundle), a.clone().hash(&bundle.clone()));
    assert_ne!(a.hash(&bundle), b.hash(&bundle));
    assert_ne!(a.hash(&bundle), a.hash(&other));
    let stored: Definition = serde_json::from_str(&serde_json::to_string(&a).expect("json")).expect("definition");
    assert_eq!(stored.hash(&bundle), a.hash(&bundle));
}
