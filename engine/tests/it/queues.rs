//! Whose turn it is.

use crate::bench::{Bench, Gate, PATIENCE, definition, work};
use crate::faults::{GRACE, LONG};
use loopwright_engine::{
    admission::{Admission, Priority},
    client::Start,
    ids::{DefinitionHash, RunId},
};
use serde_json::json;
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

/// A run of a user, which takes turns with that of others.
async fn start(bench: &Bench, definition: DefinitionHash, user: &str, priority: i16) -> RunId {
    start_in(bench, definition, user, priority, user).await
}

/// A run of a user, which takes turns by that key.
async fn start_in(bench: &Bench, definition: DefinitionHash, user: &str, priority: i16, key: &str) -> RunId {
    let priority = Priority::new(priority).expect("a priority");
    let start = Start {
        run_id: None,
        definition,
        inputs: json!({}),
        workflow_id: None,
        attributes: json!({ "user_id": user }),
        queue: String::new(),
        topic: None,
        admission: Admission { priority, fairness_key: Some(key.to_owned()), ..Admission::default() },
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

/// Which of these runs nobody has claimed yet.
async fn unclaimed(bench: &Bench, runs: &[RunId]) -> Vec<RunId> {
    let sql = "select run_id from runs where run_id = any($1) and owner is null and seq = 0";
    let ids: Vec<uuid::Uuid> = runs.iter().map(|run| run.0).collect();
    let left: Vec<uuid::Uuid> = sqlx::query_scalar(sql).bind(ids).fetch_all(&bench.pool).await.expect("runs");
    left.into_iter().map(RunId).collect()
}

#[tokio::test]
async fn urgent_runs_are_claimed_first() {
    let (bench, gate) = (Bench::new().await, Gate::new());
    let order = noted(&bench, &gate);
    let hash = bench.deploy(definition("one", vec![work("a", &[])])).await;
    // One that works and sixteen that wait for its slot: the worker takes no more. Of one lane, so that nobody comes in as a stranger.
    let mut runs = Vec::new();
    for _ in 0..17 {
        runs.push(start_in(&bench, hash, "holder", 3, "one").await);
    }
    let worker = bench.worker_with(LONG, 1).await;
    gate.arrived(1).await;
    assert_eq!(worker.runs(), runs.len());
    let (mut names, mut left) = (BTreeMap::new(), Vec::new());
    for (user, priority) in [("last", 5), ("usual", 3), ("usual", 3), ("first", 1)] {
        let run = start_in(&bench, hash, user, priority, "one").await;
        names.insert(run, user);
        left.push(run);
    }
    runs.extend(&left);
    let mut claimed = Vec::new();
    while !left.is_empty() {
        assert_eq!(unclaimed(&bench, &left).await.len(), left.len(), "nobody has left for it");
        // Whoever leaves makes room for one.
        gate.open(1);
        let one_less = async {
            loop {
                let now = unclaimed(&bench, &left).await;
                if now.len() < left.len() {
                    return now;
                }
                tokio::task::yield_now().await;
            }
        };
        let now = tokio::time::timeout(PATIENCE, one_less).await.expect("another one is claimed");
        assert_eq!(now.len() + 1, left.len(), "one at a time");
        claimed.extend(left.iter().filter(|run| !now.contains(run)).map(|run| names[run]));
        left.retain(|run| now.contains(run));
    }
    assert_eq!(claimed, ["first", "usual", "usual", "last"]);
    gate.open(1_000);
    for run in runs {
        bench.closed(run).await;
    }
    worker.drain(GRACE).await;
    // And so it is with the slot.
    let seen = order.lock().unwrap().clone();
    let begun: Vec<&String> = seen.iter().filter(|user| *user != "holder").collect();
    assert_eq!(begun, ["first", "usual", "usual", "last"], "{seen:?}");
    assert_eq!(seen.last().map(String::as_str), Some("last"), "{seen:?}");
    bench.audit().await;
}
