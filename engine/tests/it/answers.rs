//! A Postgres that gives no answer on one connection, and one that gives another than was expected. A worker asks again elsewhere, and
//! nothing is lost or done twice.

use crate::{
    bench::{Bench, Gate, PATIENCE, definition, gated, is_waited_for, step, waits_for, work},
    faults::{GRACE, LONG},
    way::Way,
};
use loopwright_engine::{
    activity::Registry,
    client::Signal,
    definition::{Definition, Kind},
    view::RunStatus,
    worker::{self, WorkerConfig, WorkerHandle},
};
use serde_json::json;
use std::{collections::BTreeMap, time::Duration};

/// How long these workers wait for an answer. More than a busy machine takes, less than the lease.
const ANSWER_MAX: Duration = Duration::from_secs(2);

/// A worker whose every word goes along `way`; its attempts wait at the gate.
async fn along(way: &Way, bench: &Bench, gate: &Gate) -> WorkerHandle {
    let mut config = WorkerConfig::new(way.pool(8).await, Registry::new().with(gate.work()));
    (config.hook, config.lease) = (bench.hook.clone(), LONG);
    worker::start_impatient(config, ANSWER_MAX).await.expect("worker")
}

fn go() -> Signal {
    Signal { name: "go".into(), ..Signal::default() }
}

/// An attempt and a question.
fn all(name: &str) -> Definition {
    definition(name, vec![work("w", &[]), step("ask", Kind::Await(Box::new(waits_for("go"))))])
}

/// By a word of what it was asked last: by the committer in the middle of a transaction, by the poll that claims, by a driver that reads
/// its inbox, by one that loads its run.
#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_says_nothing_any_more_stops_nobody() {
    for word in [
        "insert into history",
        "for update of q, r skip locked",
        "select inbox_n from runs",
        "select ir, bundle from definitions",
    ] {
        let (bench, gate) = (Bench::new().await, Gate::new());
        let way = Way::to(&bench.pool).await;
        let worker = along(&way, &bench, &gate).await;
        way.hushes_at(word);
        let run = bench.start(all("all"), json!({})).await;
        gate.arrived(1).await;
        // While it is in memory: it hears of a message by a look.
        bench.client.signal(run, go()).await.expect("sent");
        let heard = async {
            while !way.has_broken() {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(PATIENCE, heard).await.expect(word);
        gate.open(1);
        let view = bench.closed(run).await;
        assert_eq!(view.status, RunStatus::Completed, "{word}");
        assert_eq!(bench.outcomes().await, BTreeMap::from([("Succeeded".to_owned(), 1)]), "{word}: one attempt");
        worker.drain(GRACE).await;
        bench.audit().await;
    }
}

/// A transition that is committed and not answered is sent again, and known.
#[tokio::test(flavor = "multi_thread")]
async fn a_transition_without_an_answer_is_there_once() {
    let (bench, gate) = (Bench::new().await, Gate::new());
    let way = Way::to(&bench.pool).await;
    let worker = along(&way, &bench, &gate).await;
    way.hushes_at("insert into history");
    let asks = definition("asks", vec![step("ask", Kind::Await(Box::new(waits_for("go"))))]);
    let run = bench.start(asks, json!({})).await;
    bench.until(run, "waits", |v| !v.waiting.is_empty()).await;
    assert!(way.has_broken(), "its statement had no transaction around it: it is done");
    bench.client.signal(run, go()).await.expect("sent");
    assert_eq!(bench.closed(run).await.seq, 2);
    worker.drain(GRACE).await;
    bench.audit().await;
}

/// Where a driver's transition was to go stands another one of the same epoch, which it has not sent: it was refused since, and has
/// arrived late. The driver lets the run go and begins nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_driver_does_not_take_another_transition_for_its_own() {
    let (bench, gate) = gated().await;
    let worker = bench.worker_with(LONG, 4).await;
    let run = bench.start(definition("two", vec![work("w", &[]), work("x", &[])]), json!({})).await;
    gate.arrived(1).await;
    let mut other = loopwright_engine::transaction::begin(&bench.pool).await.expect("begin");
    let lock = "select epoch from runs where run_id = $1 for update";
    let epoch: i64 = sqlx::query_scalar(lock).bind(run.0).fetch_one(&mut *other).await.expect("locked");
    gate.open(1);
    is_waited_for(&bench.pool, &mut other).await;
    for sql in [
        "update runs set seq = seq + 1 where run_id = $1",
        "insert into history (shard, run_id, seq, epoch, format, events)
         select shard, run_id, seq, epoch, 1, '[{\"type\": \"unblocked\"}]' from runs where run_id = $1",
    ] {
        sqlx::query(sql).bind(run.0).execute(&mut *other).await.expect("another transition");
    }
    other.commit().await.expect("commit");
    // The run has an owner and no driver; the second look gives it back, and somebody begins the step again.
    gate.arrived(1).await;
    let started: i64 =
        sqlx::query_scalar("select count(*) from test_starts").fetch_one(&bench.pool).await.expect("count");
    assert_eq!(started, 2, "the attempt of `w` twice, and none of `x`");
    let claimed: i64 = sqlx::query_scalar("select epoch from runs where run_id = $1")
        .bind(run.0)
        .fetch_one(&bench.pool)
        .await
        .expect("epoch");
    assert_eq!(claimed, epoch + 2, "given back, and claimed again");
    gate.open(1);
    assert_eq!(bench.closed(run).await.status, RunStatus::Completed);
    let outcomes = bench.outcomes().await;
    assert_eq!(outcomes, BTreeMap::from([("Lost".to_owned(), 1), ("Succeeded".to_owned(), 2)]));
    worker.drain(GRACE).await;
    bench.audit().await;
}
