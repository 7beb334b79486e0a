//! What is run in the simulator: one definition with every kind of step, and the child that it calls.

use crate::{
    definition::{
        Approval, Await, Branch, Catch, Data, Definition, Exhausted, Expr, FORMAT, Input, Join, Kind, OnItemFailure,
        OnTimeout, ParentClose, RepeatCondition, RetryPolicy, Step, Timeouts, WaitUntil,
    },
    ids::DefinitionHash,
    signature::{Catalog, Signature},
};
use serde_json::{Value, json};
use std::collections::BTreeMap;

pub(super) const PARENT: &str = "parent";
/// The parent's next version.
pub(super) const PARENT_2: &str = "parent, 2";
pub(super) const CHILD: &str = "child";

/// The one activity, metered.
pub(super) fn catalog() -> Catalog {
    Catalog::new([Signature {
        name: "work@1".into(),
        summary: String::new(),
        input_schema: json!({}),
        output_schema: json!({}),
        run_timeout_ms: 60_000,
        heartbeat_timeout_ms: None,
        metered: true,
        idempotent: true,
        failure_codes: Vec::new(),
    }])
}

/// Where the calls lead.
pub(super) fn calls() -> BTreeMap<String, DefinitionHash> {
    BTreeMap::from([("child@latest".to_owned(), DefinitionHash([7; 32]))])
}

fn e(text: &str) -> Expr {
    Expr(text.to_owned())
}

fn step(id: &str, kind: Kind) -> Step {
    let retry = RetryPolicy { attempts: 3, delay_ms: 2_000, jitter: 0.5, ..RetryPolicy::default() };
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

fn awaits(id: &str, signal: &str, approval: Option<Approval>, on_timeout: OnTimeout) -> Step {
    let spec = Await {
        signal: signal.into(),
        timeout_ms: 90_000,
        form: None,
        show: None,
        to: Vec::new(),
        filter: None,
        remind_ms: vec![20_000],
        on_timeout,
        default: Some(Data::Literal(json!({"text": "nobody"}))),
        approval,
        reply: None,
    };
    step(id, Kind::Await(Box::new(spec)))
}

fn definition(name: &str, steps: Vec<Step>, finally: Vec<Step>) -> Definition {
    Definition {
        format: FORMAT,
        name: name.into(),
        inputs: BTreeMap::new(),
        env: BTreeMap::new(),
        timeout_ms: 3_600_000,
        budget: Value::Null,
        concurrency: None,
        executions_max: 10_000,
        steps,
        finally,
        outputs: BTreeMap::new(),
        runs_on: Vec::new(),
        queries: BTreeMap::new(),
        extras: Value::Null,
    }
}

fn child() -> Definition {
    let pause = step("pause", Kind::Wait { until: WaitUntil::For(5_000) });
    let mut last = work("last");
    last.continue_on_error = true;
    // A chain of two, when nothing fails. What comes early is for the second, which takes it.
    let with = BTreeMap::from([("n".to_owned(), Data::Expr(e("inputs.n + 1")))]);
    let mut again = step("again", Kind::ContinueAsNew { with, current: false });
    again.condition = Some(e("inputs.n < 1"));
    let mut word = awaits("word", "answer", None, OnTimeout::Default);
    word.condition = Some(e("inputs.n > 0"));
    let mut child = definition(CHILD, vec![work("first"), pause, last, again, word], vec![work("clean")]);
    let n = Input { schema: json!({"type": "integer"}), required: false, default: Some(json!(0)) };
    child.inputs.insert("n".into(), n);
    child
}

fn parent() -> Definition {
    let mut first = work("first");
    first.catch = vec![Catch { on: vec!["*".into()], condition: None, steps: vec![work("handler")] }];
    let each = Kind::Foreach {
        list: e("[1, 2, 3, 4]"),
        key: None,
        max_items: 4,
        concurrency: 3,
        on_item_failure: OnItemFailure::Continue,
        steps: vec![work("a"), work("b")],
        outputs: None,
    };
    let call = |id: &str, parent_close| {
        let (workflow, version, with) = (CHILD.into(), crate::definition::CallVersion::Latest, BTreeMap::new());
        let mut call = step(id, Kind::Call { workflow, version, with, parent_close });
        call.continue_on_error = true;
        call
    };
    let sub = call("sub", ParentClose::Cancel);
    let branch = |name: &str, steps| Branch { name: name.into(), steps };
    let mut race = step(
        "race",
        Kind::Parallel {
            branches: vec![
                branch("l", vec![work("l1"), work("l2")]),
                branch("m", vec![awaits("answer", "answer", None, OnTimeout::Default), work("m1")]),
                branch("r", vec![sub]),
                branch("t", vec![call("short", ParentClose::Terminate)]),
                branch("u", vec![call("long", ParentClose::Abandon)]),
            ],
            join: Join::Settled,
            fail_fast: false,
        },
    );
    race.timeouts.total_ms = Some(900_000);
    race.continue_on_error = true;
    let approval = Approval { quorum: 1, fail_on_reject: false };
    let mut rounds = step(
        "rounds",
        Kind::Repeat {
            steps: vec![work("draft"), awaits("ok", "ok", Some(approval), OnTimeout::Approve)],
            max_rounds: 3,
            condition: RepeatCondition::While(e("steps.ok.output.decision == 'changes_requested'")),
            delay_ms: 1_000,
            exhausted: Exhausted::Continue,
            transparent: false,
            gate: None,
            outputs: None,
        },
    );
    rounds.continue_on_error = true;
    let mut each = step("each", each);
    each.continue_on_error = true;
    definition(PARENT, vec![first, each, race, rounds, work("end")], vec![work("clean")])
}

/// Another version of the same workflow: runs may go on under it, and back.
fn parent_2() -> Definition {
    let mut parent = parent();
    parent.steps.push(work("more"));
    parent
}

/// By name.
pub(super) fn definitions() -> BTreeMap<&'static str, Definition> {
    BTreeMap::from([(PARENT, parent()), (PARENT_2, parent_2()), (CHILD, child())])
}

/// What a run of this definition may be migrated to.
pub(super) fn other_version(workflow: &str) -> Option<&'static str> {
    match workflow {
        PARENT => Some(PARENT_2),
        PARENT_2 => Some(PARENT),
        _ => None,
    }
}
