//! The door: what callers may do twice, late or at the wrong moment.

use crate::bench::{Bench, Gate, PATIENCE, definition, step, work};
use loopwright_engine::{
    Error,
    client::Start,
    definition::{Kind, WaitUntil},
    ids::RunId,
    view::RunStatus,
};
use serde_json::json;
use std::{sync::Arc, time::Duration};
use tokio::sync::Notify;

const GRACE: Duration = Duration::from_secs(10);

#[tokio::test(flavor = "multi_thread")]
async fn a_start_that_is_sent_again_finds_its_run_open_or_closed() {
    let bench = Bench::new().await;
    let hash = bench.deploy(definition("again", vec![work("a", &[])])).await;
    let start = Start {
        run_id: Some(RunId::new()),
        definition: hash,
        inputs: json!({}),
        workflow_id: Some("project:1".into()),
        attributes: json!({}),
        queue: String::new(),
        topic: None,
        admission: Default::default(),
    };
    let first = bench.client.start(start.clone()).await.expect("start");
    let again = bench.client.start(start.clone()).await.expect("start");
    assert_eq!((first.created, again.created, again.run_id), (true, false, first.run_id));
    // Another run under the same key: the open one is the answer, and nothing of the other stays behind.
    let other = Start { run_id: Some(RunId::new()), ..start.clone() };
    let taken = bench.client.start(other.clone()).await.expect("start");
    assert_eq!((taken.created, taken.run_id), (false, first.run_id));
    assert!(matches!(bench.client.describe(other.run_id.expect("given")).await, Err(Error::RunNotFound(_))));
    let worker = bench.worker().await;
    bench.closed(first.run_id).await;
    // The answer to the very first request was lost; it comes once more, after the end of the run.
    let late = bench.client.start(start).await.expect("start");
    assert_eq!((late.created, late.run_id), (false, first.run_id));
    assert_eq!(bench.client.open_run("project:1").await.expect("key"), None, "the key is not taken by a closed run");
    assert!(bench.client.start(other).await.expect("start").created);
    worker.drain(GRACE).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn terminating_a_parked_run_leaves_nothing_in_the_queue() {
    let bench = Bench::new().await;
    let worker = bench.worker().await;
    let wait = step("w", Kind::Wait { until: WaitUntil::For(3_600_000) });
    let run = bench.start(definition("parked", vec![wait]), json!({})).await;
    bench.until(run, "waits", |v| !v.waiting.is_empty()).await;
    bench.client.terminate(run, "enough").await.expect("terminate");
    assert_eq!(bench.closed(run).await.status, RunStatus::Terminated);
    assert!(matches!(bench.client.terminate(run, "again").await, Err(Error::RunClosed(_))));
    worker.drain(GRACE).await;
    bench.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn terminating_one_run_twice_at_once_ends_it_once() {
    let bench = Bench::new().await;
    let gate = Gate::new();
    {
        let gate = gate.clone();
        bench.script(move |_, _| {
            let gate = gate.clone();
            async move {
                gate.pass().await;
                Ok(json!(1))
            }
        });
    }
    let worker = bench.worker().await;
    let run = bench.start(definition("twice", vec![work("a", &[])]), json!({})).await;
    gate.arrived(1).await;
    let (one, two) = tokio::join!(bench.client.terminate(run, "one"), bench.client.terminate(run, "two"));
    assert!(one.is_ok() || two.is_ok(), "{one:?} {two:?}");
    assert_eq!(bench.closed(run).await.status, RunStatus::Terminated);
    gate.open(1);
    worker.drain(GRACE).await;
    bench.audit().await;
}

/// Says when it is dropped.
struct Stopped(Arc<Notify>);

impl Drop for Stopped {
    fn drop(&mut self) {
        self.0.notify_one();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_runs_for_a_terminated_run_is_stopped() {
    let bench = Bench::new().await;
    let (gate, stopped) = (Gate::new(), Arc::new(Notify::new()));
    {
        let (gate, stopped) = (gate.clone(), stopped.clone());
        bench.script(move |_, _| {
            let (gate, stopped) = (gate.clone(), Stopped(stopped.clone()));
            async move {
                gate.pass().await;
                drop(stopped);
                Ok(json!(1))
            }
        });
    }
    let worker = bench.worker().await;
    let run = bench.start(definition("told", vec![work("a", &[])]), json!({})).await;
    gate.arrived(1).await;
    bench.client.terminate(run, "enough").await.expect("terminate");
    // Its worker finds out by itself; the gate stays closed.
    tokio::time::timeout(PATIENCE, stopped.notified()).await.expect("the attempt is stopped");
    worker.drain(GRACE).await;
    bench.audit().await;
}
