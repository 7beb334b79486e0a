//! On what terms the runs of a document come in: which workers take them, and how many are under way at once.

use crate::bench::{Bench, World, document};
use loopwright_engine::{client::Filter, filter::Query, ids::RunId, view::RunStatus};
use serde_json::{Value, json};
use std::sync::Arc;

async fn held(bench: &Bench, run: RunId) -> Option<String> {
    bench.client.describe(run).await.expect("run").held
}

#[tokio::test(flavor = "multi_thread")]
async fn runs_on_leads_to_the_worker_that_has_every_label_and_to_no_other() {
    let bench = Bench::new().await;
    let body = |labels: &str| format!("{labels}\nsteps: [{{ id: w, uses: work@1, with: {{ value: 7 }} }}]");
    let wanted = bench.start(&body("runs-on: [linux, gpu]"), json!({})).await;
    let half = Arc::new(World::default());
    let other = bench.another(&half, &["gpu"]).await;
    // Both workers look for work, and neither takes it.
    bench.completes(&body(""), json!({})).await;
    bench.completes(&body("runs-on: gpu"), json!({})).await;
    assert_eq!(half.paths().first().map(String::as_str), Some("w"), "only one has the label");
    let before = bench.world.paths().len() + half.paths().len();
    assert_eq!(before, 2);
    let view = bench.client.describe(wanted).await.expect("run");
    assert_eq!(view.status, RunStatus::Pending);
    assert!(view.held.expect("a reason").contains("with the labels gpu, linux; none is there"));
    let whole = Arc::new(World::default());
    let third = bench.another(&whole, &["gpu", "linux", "x64"]).await;
    bench.output(wanted).await;
    assert_eq!((whole.paths().len(), bench.world.paths().len() + half.paths().len()), (1, before));
    for worker in [other, third] {
        worker.drain(crate::bench::PATIENCE).await;
    }
    bench.done().await;
}

/// One run of a group at a time; `inputs.gate` is where it stops.
fn alone(policy: &str) -> String {
    format!(
        r#"
inputs: {{ who: {{ type: string, required: true }}, gate: {{ type: string }}, n: {{ type: integer, required: true }} }}
concurrency: {{ group: "for-${{{{ inputs.who }}}}", limit: 1, on-conflict: {policy} }}
steps: [{{ id: w, uses: work@1, with: {{ gate: "${{{{ default(inputs.gate, null) }}}}", value: "${{{{ inputs.n }}}}" }} }}]
finally: [{{ id: clean, uses: work@1, with: {{ value: "${{{{ inputs.n }}}}" }} }}]
"#
    )
}

/// What was called, as (path, number of the run).
fn called(bench: &Bench) -> Vec<(String, Value)> {
    let calls = bench.world.calls.lock().expect("lock");
    calls.iter().map(|call| (call.path.clone(), call.input["value"].clone())).collect()
}

fn order(calls: &[(&str, i32)]) -> Vec<(String, Value)> {
    calls.iter().map(|(path, n)| ((*path).to_owned(), json!(n))).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_group_lets_the_next_run_wait_for_the_end_of_the_one_before() {
    let bench = Bench::new().await;
    let hash = bench.deploy(&document("t", &alone("queue"))).await;
    let start = async |n: u32, inputs: Value| {
        let mut all = json!({"n": n});
        all.as_object_mut().expect("map").extend(inputs.as_object().expect("map").clone());
        bench.start_hash(hash, all).await.run_id
    };
    let first = start(1, json!({"who": "ann", "gate": "x"})).await;
    bench.world.arrived("x", 1).await;
    let second = start(2, json!({"who": "ann"})).await;
    // Another group is another place: it comes and goes while the second waits.
    let beside = start(3, json!({"who": "bob"})).await;
    bench.output(beside).await;
    assert!(held(&bench, second).await.expect("a reason").contains("for-ann"));
    bench.world.open("x", 1);
    for run in [first, second] {
        assert_eq!(bench.closed(run).await.status, RunStatus::Completed);
    }
    let calls = [("w", 1), ("w", 3), ("!finally/clean", 3), ("!finally/clean", 1), ("w", 2), ("!finally/clean", 2)];
    assert_eq!(called(&bench), order(&calls));
    bench.done().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_finds_its_group_full_takes_the_place_of_the_oldest_or_is_refused() {
    let bench = Bench::new().await;
    let inputs = |n: u32, gate: Value| {
        let mut inputs = json!({"who": "ann", "n": n});
        if !gate.is_null() {
            inputs["gate"] = gate;
        }
        inputs
    };
    let cancelling = bench.deploy(&document("cancelling", &alone("cancel-running"))).await;
    let first = bench.start_hash(cancelling, inputs(1, json!("x"))).await.run_id;
    bench.world.arrived("x", 1).await;
    let second = bench.start_hash(cancelling, inputs(2, Value::Null)).await.run_id;
    assert_eq!(bench.closed(second).await.status, RunStatus::Completed);
    assert_eq!(bench.closed(first).await.status, RunStatus::Cancelled);
    assert_eq!(bench.world.cancelled(), ["w"]);
    // The second waited for the cleaning of the first.
    assert_eq!(called(&bench), order(&[("w", 1), ("!finally/clean", 1), ("w", 2), ("!finally/clean", 2)]));

    let refusing = bench.deploy(&document("refusing", &alone("fail"))).await;
    let third = bench.start_hash(refusing, inputs(3, json!("y"))).await.run_id;
    bench.world.arrived("y", 1).await;
    let refused = bench.client.start(Bench::request(refusing, inputs(4, Value::Null))).await.expect_err("full");
    assert_eq!(refused.code(), "concurrency_full", "{refused}");
    assert!(refused.to_string().contains("for-ann"), "{refused}");
    bench.world.open("y", 1);
    assert_eq!(bench.closed(third).await.status, RunStatus::Completed);
    let fifth = bench.start_hash(refusing, inputs(5, Value::Null)).await.run_id;
    bench.output(fifth).await;
    assert!(!called(&bench).iter().any(|(_, n)| *n == json!(4)), "what was refused never ran");
    bench.done().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_gives_way_is_cancelled_at_once_and_says_to_whom() {
    let bench = Bench::new().await;
    let hash = bench.deploy(&document("giving", &alone("cancel-new"))).await;
    let inputs = |n: u32, who: &str| json!({"who": who, "n": n, "gate": "x"});
    let holder = bench.start_hash(hash, inputs(1, "ann")).await.run_id;
    bench.world.arrived("x", 1).await;
    let away = bench.start_hash(hash, inputs(2, "ann")).await;
    let view = bench.closed(away.run_id).await;
    assert_eq!((away.created, view.status), (true, RunStatus::Cancelled));
    let why = view.failure.expect("why").message;
    assert!(why.contains(&holder.to_string()) && why.contains("for-ann"), "{why}");
    // Another group is not full. A call is told as of a child that somebody cancelled.
    let beside = bench.start_hash(hash, inputs(3, "bob")).await.run_id;
    bench.world.arrived("x", 1).await;
    let parent = r#"
steps:
  - id: c
    call: { workflow: giving, with: { who: ann, n: 4 } }
    catch: [{ on: [call.cancelled], steps: [{ id: late, set: { n: 0 } }] }]
outputs: { n: "${{ default(steps.c.output.n, 4) }}" }
"#;
    assert_eq!(bench.completes(parent, json!({})).await, json!({"n": 0}));
    bench.world.open("x", 2);
    for run in [holder, beside] {
        assert_eq!(bench.closed(run).await.status, RunStatus::Completed);
    }
    let ran: Vec<Value> = called(&bench).into_iter().map(|(_, n)| n).collect();
    assert!(!ran.contains(&json!(2)) && !ran.contains(&json!(4)), "neither began, nor cleaned up: {ran:?}");
    bench.done().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn labels_are_attributes_by_which_runs_are_found_and_a_called_run_has_its_own() {
    let bench = Bench::new().await;
    bench.deploy(&document("child", "labels: { tier: small }\nsteps: [{ id: v, set: { v: 1 } }]")).await;
    let body = "labels: { team: core, tier: gold }\nsteps: [{ id: c, call: { workflow: child } }]";
    let hash = bench.deploy(&document("labelled", body)).await;
    let mut request = Bench::request(hash, json!({}));
    request.attributes = json!({"user_id": "u1", "label.tier": "mine"});
    let run = bench.client.start(request).await.expect("start").run_id;
    bench.output(run).await;
    let found = async |text: &str| {
        let matching = Some(Query::parse(text).expect("a filter"));
        let listed = bench.client.list(Filter { matching, limit: 10, ..Filter::default() }).await.expect("list");
        let mut names: Vec<String> = listed.into_iter().map(|run| run.workflow).collect();
        names.sort();
        names
    };
    assert_eq!(found("attributes.\"label.team\" = 'core'").await, ["labelled"]);
    assert_eq!(found("attributes.\"label.tier\" = 'small'").await, ["child"]);
    // What the start says itself stays.
    assert_eq!(found("attributes.\"label.tier\" in ('mine', 'gold')").await, ["labelled"]);
    assert_eq!(bench.client.describe(run).await.expect("run").attributes["label.tier"], json!("mine"));
    assert_eq!(found("attributes.user_id = 'u1'").await, ["child", "labelled"]);
    bench.done().await;
}
