//! Whose turn it is.

use crate::bench::{Bench, Gate, definition, work};
use crate::faults::{GRACE, LONG};
use loopwright_engine::{
    admission::{Admission, Priority},
    client::Start,
    ids::{DefinitionHash, RunId},
};
use serde_json::json;
use std::sync::{Arc, Mutex};

/// A run of a user.
async fn start(bench: &Bench, definition: DefinitionHash, user: &str, priority: i16) -> RunId {
    let start = Start {
        run_id: None,
        definition,
        inputs: json!({}),
        workflow_id: None,
        attributes: json!({ "user_id": user }),
        queue: String::new(),
        topic: None,
        admission: Admission { priority: Priority::new(priority).expect("a priority"), ..Admission::default() },
    };
    bench.client.start(start).await.expect("started").run_id
}

/// Attempts write down whose they are and wait at the gate.
fn noted(bench: &Bench, gate: &Gate) -> Arc<Mutex<Vec<String>>> {
    let order: Arc<Mutex<Vec<String>>> = Arc::default();
    let (notes, gate) = (order.clone(), gate.clone());
    bench.script(move |ctx, _| {
        let (notes, gate) = (notes.clone(), gate.clone());
        async move {
            let user = ctx.info().attributes["user_id"].as_str().unwrap_or_default().to_owned();
            notes.lock().expect("lock").push(user);
            gate.pass().await;
            Ok(json!({}))
        }
    });
    order
}

#[tokio::test]
async fn a_full_worker_lets_the_next_user_in_and_gives_the_next_slot_to_them() {
    let (bench, gate) = (Bench::new().await, Gate::new());
    let order = noted(&bench, &gate);
    let hash = bench.deploy(definition("steps", vec![work("a", &[]), work("b", &[]), work("c", &[])])).await;
    let mut runs = Vec::new();
    for _ in 0..60 {
        runs.push(start(&bench, hash, "big", 3).await);
    }
    let worker = bench.worker_with(LONG, 2).await;
    gate.arrived(2).await;
    let small = start(&bench, hash, "small", 3).await;
    // It is in this worker's memory although more runs of the other user wait here than there is room for.
    bench.until(small, "has begun", |view| view.seq > 0).await;
    for _ in 0..3 {
        gate.open(1);
        gate.arrived(1).await;
    }
    // Not behind the sixteen that wait here for longer.
    let seen = order.lock().unwrap().clone();
    assert_eq!(seen[..2], ["big", "big"]);
    assert!(seen[2..4].iter().any(|user| user == "small"), "{seen:?}");
    gate.open(1_000);
    bench.closed(small).await;
    for run in runs {
        bench.closed(run).await;
    }
    worker.drain(GRACE).await;
    bench.audit().await;
}

#[tokio::test]
async fn urgent_runs_are_claimed_first() {
    let (bench, gate) = (Bench::new().await, Gate::new());
    let order = noted(&bench, &gate);
    let hash = bench.deploy(definition("one", vec![work("a", &[])])).await;
    let mut runs = Vec::new();
    for (user, priority) in [("last", 5), ("usual", 3), ("usual", 3), ("first", 1)] {
        runs.push(start(&bench, hash, user, priority).await);
    }
    let worker = bench.worker_with(LONG, 1).await;
    gate.arrived(1).await;
    // All of them are here, and the others wait for the slot.
    for run in &runs {
        bench.until(*run, "has begun", |view| view.seq > 0).await;
    }
    gate.open(1_000);
    for run in runs {
        bench.closed(run).await;
    }
    worker.drain(GRACE).await;
    let seen = order.lock().unwrap().clone();
    // Who is here first takes the free slot; from then on the most urgent is next.
    assert_eq!(
        seen.iter().rposition(|user| user == "last"),
        Some(3).filter(|_| seen[0] != "last").or(Some(0)),
        "{seen:?}"
    );
    bench.audit().await;
}
