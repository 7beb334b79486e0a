//! The door: what callers may do twice, late or at the wrong moment.

use crate::bench::{Bench, Gate, PATIENCE, definition, step, waits_for, work};
use loopwright_engine::{
    Error,
    client::{Decision, Deploy, Signal, Start, Update, Why},
    definition::{Approval, Bundle, Kind, WaitUntil},
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
    let gate = bench.gate();
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

/// Whatever a person or a program says is stored as it is: each text and each id has its limit, and nothing of what is refused stays.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_too_large_is_refused_by_code_whoever_says_it() {
    let bench = Bench::new().await;
    let client = &bench.client;
    let mut approval = waits_for("ok");
    approval.approval = Some(Approval { quorum: 1, fail_on_reject: true });
    let asks = definition("asks", vec![step("ok", Kind::Await(Box::new(approval)))]);
    let worker = bench.worker().await;
    let run = bench.start(asks.clone(), json!({})).await;
    bench.until(run, "asks", |v| !v.waiting.is_empty()).await;
    let (hash, long) = (client.describe(run).await.expect("run").definition, |bytes: usize| "x".repeat(bytes + 1));
    let id = |bytes| Some(long(bytes));
    let too_large = |what: &str, error: Option<Error>| {
        let error = error.unwrap_or_else(|| panic!("{what} was taken"));
        assert_eq!(error.code(), "too_large", "{what}: {error}");
        assert!(error.to_string().contains("the limit is"), "{what}: {error}");
    };
    let (approved, comment) = (Decision::Approved, Some(long(256 << 10)));
    too_large("comment", client.approve(run, "ok", approved, comment, None, None).await.err());
    too_large("approval's id", client.approve(run, "ok", approved, None, id(1_024), None).await.err());
    too_large("approver", client.approve(run, "ok", approved, None, None, id(1_024)).await.err());
    let signal = |name: &str, dedupe_id, sender| Signal { name: name.into(), dedupe_id, sender, ..Signal::default() };
    too_large("signal's name", client.signal(run, signal(&long(200), None, None)).await.err());
    too_large("signal's id", client.signal(run, signal("ok", id(1_024), None)).await.err());
    too_large("sender", client.signal(run, signal("ok", None, id(1_024))).await.err());
    let update = Update { name: long(200), ..Update::default() };
    too_large("update's name", client.update(run, update, Duration::ZERO).await.err());
    too_large("cancel", client.cancel(run, &long(4 << 10)).await.err());
    too_large("terminate", client.terminate(run, &long(4 << 10)).await.err());
    for why in [
        Why { reason: long(4 << 10), ..Why::default() },
        Why { dedupe_id: id(1_024), ..Why::default() },
        Why { by: id(1_024), ..Why::default() },
    ] {
        too_large("pause", client.pause(run, why.clone()).await.err());
        too_large("resume", client.resume(run, why.clone()).await.err());
        too_large("unquarantine", client.unquarantine(run, why).await.err());
    }
    let start = |workflow_id, topic, queue| Start {
        run_id: None,
        definition: hash,
        inputs: json!({}),
        workflow_id,
        attributes: json!({}),
        queue,
        topic,
        admission: Default::default(),
    };
    too_large("workflow id", client.start(start(id(1_024), None, String::new())).await.err());
    too_large("topic", client.start(start(None, id(1_024), String::new())).await.err());
    too_large("queue", client.start(start(None, None, long(1_024))).await.err());
    let (bundle, message) = (Bundle::new(), Some(long(4 << 10)));
    let deploy = Deploy { definition: asks, bundle, source: String::new(), author: None, message };
    too_large("message", client.deploy(deploy).await.err());
    for (sql, wanted) in
        [("select count(*) from inbox", 0), ("select count(*) from blobs", 0), ("select count(*) from runs", 1)]
    {
        let n: i64 = sqlx::query_scalar(sql).fetch_one(&bench.pool).await.expect("count");
        assert_eq!(n, wanted, "{sql}");
    }
    client.approve(run, "ok", approved, Some("fine".into()), None, None).await.expect("approved");
    assert_eq!(bench.closed(run).await.status, RunStatus::Completed);
    worker.drain(GRACE).await;
}
