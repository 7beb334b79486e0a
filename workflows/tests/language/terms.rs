//! On what terms the runs of a document come in: which workers take them, and how many are under way at once.

use crate::bench::{Bench, World, document};
use loopwright_engine::{ids::RunId, view::RunStatus};
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
