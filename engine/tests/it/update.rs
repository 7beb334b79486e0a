//! Updates on a real database: the caller gets its answer, also late, again and after deaths.

use crate::bench::{Bench, definition, e, step, work};
use loopwright_engine::{
    Error,
    client::{Signal, Update, Why},
    definition::{Await, Data, Definition, Kind, OnTimeout, Step},
    ids::RunId,
    view::{Answer, RunStatus, Updated},
};
use serde_json::{Value, json};
use std::time::Duration;

const GRACE: Duration = Duration::from_secs(10);
/// Long enough for any answer; a test that waits that long has found a bug.
const LONG: Duration = Duration::from_secs(60);

fn ask(id: &str) -> Step {
    let spec = Await {
        signal: "change".into(),
        timeout_ms: 600_000,
        form: Some(json!({"type": "object", "required": ["n"], "properties": {"n": {"type": "integer"}}})),
        show: None,
        to: vec![],
        filter: None,
        remind_ms: vec![],
        on_timeout: OnTimeout::Fail,
        default: None,
        approval: None,
        reply: Some(Data::Expr(e("{'twice': signal.n * 2}"))),
    };
    step(id, Kind::Await(Box::new(spec)))
}

fn asking() -> Definition {
    let mut d = definition("asking", vec![work("a", &[]), ask("first"), ask("second")]);
    d.outputs.insert("n".into(), Data::Expr(e("steps.first.output.n + steps.second.output.n")));
    d
}

fn update(id: &str, payload: Value) -> Update {
    Update { name: "change".into(), payload, id: Some(id.into()), sender: Some("user:1".into()) }
}

fn completed(id: &str, n: i64) -> Updated {
    Updated { id: id.into(), answer: Answer::Completed { result: json!({"twice": n}) } }
}

async fn events(bench: &Bench, run: RunId, kind: &str) -> usize {
    let rows = bench.client.history(run, 0, 1000).await.expect("history");
    rows.iter().flat_map(|r| &r.events).filter(|e| e["type"] == kind).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_gets_the_answer_and_the_same_one_whenever_it_asks_again() {
    let bench = Bench::new().await;
    let worker = bench.worker().await;
    let client = &bench.client;
    let run = bench.start(asking(), json!({})).await;
    bench.until(run, "waits", |v| !v.waiting.is_empty()).await;
    assert_eq!(client.update(run, update("u1", json!({"n": 4})), LONG).await.expect("answered"), completed("u1", 8));
    // The same id is the same request, whatever it says now.
    assert_eq!(client.update(run, update("u1", json!({"n": 5})), LONG).await.expect("answered"), completed("u1", 8));
    let wrong = client.update(run, update("u2", json!({"n": "many"})), LONG).await.expect("answered");
    let Answer::Rejected { problems } = &wrong.answer else { panic!("{wrong:?}") };
    assert!(problems[0].contains("integer"), "{problems:?}");
    assert_eq!(client.update(run, update("u2", json!({"n": 1})), LONG).await.expect("answered"), wrong);
    // A signal may have the id of an update.
    let signal = Signal { name: "change".into(), payload: json!({"n": 2}), dedupe_id: Some("u1".into()), sender: None };
    assert!(client.signal(run, signal).await.expect("sent"));
    let view = bench.closed(run).await;
    assert_eq!(view.output, Some(json!({"n": 6})));
    assert_eq!(client.update(run, update("u1", json!({})), LONG).await.expect("answered"), completed("u1", 8));
    assert_eq!(client.updated(run, "u2", Duration::ZERO).await.expect("answered"), wrong);
    let late = client.update(run, update("u3", json!({"n": 1})), LONG).await.expect_err("closed");
    assert!(matches!(late, Error::RunClosed(_)), "{late}");
    let unknown = client.updated(run, "u3", LONG).await.expect_err("never sent");
    assert!(matches!(unknown, Error::UpdateNotFound(..)), "{unknown}");
    for (name, payload) in [("a\0", json!({})), ("change", json!({"x": ["\0"]}))] {
        let nul = Update { name: name.into(), payload, id: None, sender: None };
        assert_eq!(client.update(run, nul, LONG).await.expect_err("not storable").code(), "input_invalid");
    }
    let unknown = client.update(RunId::new(), update("u", json!({})), LONG).await.expect_err("no run");
    assert!(matches!(unknown, Error::RunNotFound(_)), "{unknown}");
    assert_eq!(events(&bench, run, "update_accepted").await, 1);
    assert_eq!(events(&bench, run, "update_rejected").await, 1);
    assert_eq!(client.replay(run, None).await.expect("replays").divergence, None);
    worker.drain(GRACE).await;
    bench.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_takes_too_long_is_pending_and_found_later_also_after_the_worker_died() {
    let bench = Bench::new().await;
    let client = &bench.client;
    // Nobody reads it: there is no worker.
    let run = bench.start(asking(), json!({})).await;
    let pending = client.update(run, update("u1", json!({"n": 1})), Duration::ZERO).await.expect_err("no worker");
    assert_eq!(pending.code(), "update_pending");
    assert!(pending.to_string().contains("`u1`") && pending.to_string().contains("has not read it"), "{pending}");
    let gate = bench.gate();
    let first = bench.worker().await;
    gate.arrived(1).await;
    // Accepted with the first transition; `a` runs, so that no step takes it.
    let pending = client.update(run, update("u1", json!({"n": 1})), Duration::ZERO).await.expect_err("not yet");
    assert!(pending.to_string().contains("accepted"), "{pending}");
    let waits = {
        let client = client.clone();
        tokio::spawn(async move { client.updated(run, "u1", LONG).await })
    };
    bench.dies(first).await;
    let second = bench.worker().await;
    gate.open(2);
    assert_eq!(waits.await.expect("task").expect("answered"), completed("u1", 2));
    assert_eq!(events(&bench, run, "update_completed").await, 1);
    assert_eq!(client.update(run, update("u2", json!({"n": 2})), LONG).await.expect("answered"), completed("u2", 4));
    assert_eq!(bench.closed(run).await.output, Some(json!({"n": 3})));
    assert_eq!(client.replay(run, None).await.expect("replays").divergence, None);
    second.drain(GRACE).await;
    bench.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_closes_before_a_step_takes_an_update_fails_it() {
    let bench = Bench::new().await;
    let client = &bench.client;
    let run = bench.start(asking(), json!({})).await;
    client.update(run, update("u1", json!({"n": 1})), Duration::ZERO).await.expect_err("nobody reads it");
    client.terminate(run, "enough").await.expect("terminated");
    let updated = client.updated(run, "u1", LONG).await.expect("answered");
    let Answer::Failed { failure } = &updated.answer else { panic!("{updated:?}") };
    assert_eq!(failure.code, "update.unanswered");
    assert!(failure.message.contains("terminated"), "{failure:?}");
    assert_eq!(client.update(run, update("u1", json!({"n": 1})), LONG).await.expect("answered"), updated);
    assert_eq!(bench.client.describe(run).await.expect("run").status, RunStatus::Terminated);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_update_is_bounded_and_a_quarantined_run_takes_none() {
    let bench = Bench::new().await;
    let client = &bench.client;
    let run = bench.start(asking(), json!({})).await;
    let long = client.update(run, update(&"x".repeat(201), json!({})), LONG).await.expect_err("long");
    assert_eq!(long.code(), "too_large");
    let large = client.update(run, update("u", json!("x".repeat(300_000))), LONG).await.expect_err("large");
    assert_eq!(large.code(), "too_large");
    sqlx::query("update runs set status = 'quarantined'").execute(&bench.pool).await.expect("set aside");
    sqlx::query("delete from ready").execute(&bench.pool).await.expect("set aside");
    let quarantined = client.update(run, update("u", json!({"n": 1})), LONG).await.expect_err("quarantined");
    assert_eq!(quarantined.code(), "run_quarantined");
    assert!(client.unquarantine(run, Why::default()).await.expect("freed"));
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_who_send_one_id_at_once_both_get_the_one_answer() {
    let bench = Bench::new().await;
    let worker = bench.worker().await;
    let run = bench.start(asking(), json!({})).await;
    let send = |n| {
        let client = bench.client.clone();
        tokio::spawn(async move { client.update(run, update("u1", json!({ "n": n })), LONG).await.expect("answered") })
    };
    let both = (send(1), send(2));
    let (one, two) = (both.0.await.expect("task"), both.1.await.expect("task"));
    assert_eq!(one, two);
    assert_eq!(events(&bench, run, "update_accepted").await, 1);
    bench.client.terminate(run, "done").await.expect("terminated");
    worker.drain(GRACE).await;
    bench.audit().await;
}
