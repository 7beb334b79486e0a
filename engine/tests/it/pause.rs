//! Pause and resume on a real database, and letting go on what had been quarantined.

use crate::bench::{Bench, definition, step, work};
use loopwright_engine::{
    Error,
    client::{Start, Why},
    definition::{Kind, WaitUntil},
    ids::RunId,
    view::RunStatus,
};
use serde_json::json;
use std::{collections::BTreeMap, time::Duration};

const GRACE: Duration = Duration::from_secs(10);

fn why(reason: &str, id: &str) -> Why {
    Why { reason: reason.into(), dedupe_id: Some(id.into()), by: Some("user:1".into()) }
}

/// Types of all events, in order.
async fn types(bench: &Bench, run: RunId) -> Vec<String> {
    let rows = bench.client.history(run, 0, 1000).await.expect("history");
    rows.iter().flat_map(|r| &r.events).map(|e| e["type"].as_str().expect("type").to_owned()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_run_settles_what_runs_and_starts_nothing_until_it_is_resumed() {
    let bench = Bench::new().await;
    let gate = bench.gate();
    let worker = bench.worker().await;
    let run = bench.start(definition("paused", vec![work("a", &[]), work("b", &[])]), json!({})).await;
    gate.arrived(1).await;
    assert!(bench.client.pause(run, why("look", "p1")).await.expect("sent"));
    assert!(!bench.client.pause(run, why("look", "p1")).await.expect("duplicate"));
    bench.until(run, "paused", |v| v.status == RunStatus::Paused && v.live.len() == 1).await;
    gate.open(2);
    bench.until(run, "a ended", |v| v.live.is_empty()).await;
    assert_eq!(bench.outcomes().await, BTreeMap::from([("Succeeded".into(), 1)]), "the attempt is settled");
    let (owner, waiting, status): (Option<uuid::Uuid>, Option<String>, String) =
        sqlx::query_as("select owner, waiting, status from runs").fetch_one(&bench.pool).await.expect("row");
    assert_eq!((owner, waiting.as_deref(), status.as_str()), (None, Some("paused"), "paused"), "in nobody's memory");
    // Whoever takes it over does not start it either.
    bench.dies(worker).await;
    let second = bench.worker().await;
    bench.client.pause(run, why("again", "p2")).await.expect("sent");
    let seen = "select inbox_seen = inbox_n from runs";
    while !sqlx::query_scalar::<_, bool>(seen).fetch_one(&bench.pool).await.expect("row") {
        tokio::task::yield_now().await;
    }
    assert_eq!(bench.client.describe(run).await.expect("run").live.len(), 0);
    assert!(bench.client.resume(run, why("seen", "r1")).await.expect("sent"));
    assert_eq!(bench.closed(run).await.status, RunStatus::Completed);
    let types = types(&bench, run).await;
    assert_eq!(types.iter().filter(|t| t.as_str() == "run_paused").count(), 1, "{types:?}");
    assert!(matches!(bench.client.resume(run, why("late", "r2")).await, Err(Error::RunClosed(_))));
    let formats: Vec<i16> =
        sqlx::query_scalar("select format from history order by seq").fetch_all(&bench.pool).await.expect("rows");
    assert_eq!(formats, [1, 2, 1, 1, 2, 1], "only what says something new needs a new reader");
    second.drain(GRACE).await;
    bench.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_is_paused_before_anybody_claims_it_starts_nothing() {
    let bench = Bench::new().await;
    let run = bench.start(definition("early", vec![work("a", &[])]), json!({})).await;
    bench.client.pause(run, why("wait", "p")).await.expect("sent");
    let worker = bench.worker().await;
    bench.until(run, "paused", |v| v.status == RunStatus::Paused).await;
    assert_eq!(types(&bench, run).await, ["run_started", "run_paused"]);
    bench.client.resume(run, why("now", "r")).await.expect("sent");
    assert_eq!(bench.closed(run).await.status, RunStatus::Completed);
    worker.drain(GRACE).await;
    bench.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_came_due_during_the_pause_fires_at_the_resume() {
    let bench = Bench::new().await;
    let worker = bench.worker().await;
    let run = bench
        .start(
            definition("due", vec![step("w", Kind::Wait { until: WaitUntil::For(5_000) }), work("a", &[])]),
            json!({}),
        )
        .await;
    bench.until(run, "waits", |v| !v.waiting.is_empty()).await;
    bench.client.pause(run, why("look", "p")).await.expect("sent");
    let paused = bench.until(run, "paused", |v| v.status == RunStatus::Paused).await;
    // The wait is over by the database's clock, and nothing happened.
    let over = "select engine_now() > started_at + interval '5500 milliseconds' from runs";
    while !sqlx::query_scalar::<_, bool>(over).fetch_one(&bench.pool).await.expect("row") {
        tokio::task::yield_now().await;
    }
    assert_eq!(bench.client.describe(run).await.expect("run").seq, paused.seq);
    bench.client.resume(run, why("go", "r")).await.expect("sent");
    assert_eq!(bench.closed(run).await.status, RunStatus::Completed);
    worker.drain(GRACE).await;
    bench.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cancel_and_terminate_work_while_a_run_is_paused() {
    let bench = Bench::new().await;
    let worker = bench.worker().await;
    let mut d = definition("stop", vec![step("w", Kind::Wait { until: WaitUntil::For(3_600_000) })]);
    d.finally = vec![work("clean", &[])];
    let hash = bench.deploy(d).await;
    let mut runs = Vec::new();
    for _ in 0..2 {
        let run = bench.start_as(hash, json!({}), None).await.run_id;
        bench.until(run, "waits", |v| !v.waiting.is_empty()).await;
        bench.client.pause(run, Why::default()).await.expect("sent");
        bench.until(run, "paused", |v| v.status == RunStatus::Paused).await;
        runs.push(run);
    }
    bench.client.cancel(runs[0], "enough").await.expect("cancel");
    bench.client.terminate(runs[1], "now").await.expect("terminate");
    assert_eq!(bench.closed(runs[0]).await.status, RunStatus::Cancelled);
    assert_eq!(bench.closed(runs[1]).await.status, RunStatus::Terminated);
    assert!(types(&bench, runs[0]).await.contains(&"run_resumed".to_owned()));
    worker.drain(GRACE).await;
    bench.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_mends_the_cause_and_a_quarantined_run_goes_on() {
    let bench = Bench::new().await;
    let hash = bench.deploy(definition("broken", vec![work("a", &[])])).await;
    // What breaks: rows of the hook cannot be written, by an error that no retry mends.
    sqlx::query("alter table test_starts add constraint broken check (false)").execute(&bench.pool).await.expect("sql");
    let worker = bench.worker().await;
    let run = bench.start_as(hash, json!({}), None).await.run_id;
    bench.until(run, "quarantined", |v| v.status == RunStatus::Quarantined).await;
    for asked in [bench.client.pause(run, Why::default()).await, bench.client.resume(run, Why::default()).await] {
        assert_eq!(asked.expect_err("an operator's").code(), "run_quarantined");
    }
    sqlx::query("alter table test_starts drop constraint broken").execute(&bench.pool).await.expect("sql");
    assert!(bench.client.unquarantine(run, why("constraint dropped", "u")).await.expect("released"));
    let _twice = bench.client.unquarantine(run, why("again", "u2")).await;
    assert_eq!(bench.closed(run).await.status, RunStatus::Completed);
    let rows = bench.client.history(run, 0, 100).await.expect("history");
    let resumed: Vec<_> = rows.iter().flat_map(|r| &r.events).filter(|e| e["type"] == "run_resumed").cloned().collect();
    assert_eq!(resumed.len(), 1, "{resumed:?}");
    assert_eq!((&resumed[0]["reason"], &resumed[0]["by"]), (&json!("constraint dropped"), &json!("user:1")));
    assert!(resumed[0]["halted"].as_str().expect("why").contains("broken"), "{resumed:?}");
    assert!(matches!(bench.client.unquarantine(run, Why::default()).await, Err(Error::RunClosed(_))));
    worker.drain(GRACE).await;
    bench.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_breaks_again_is_quarantined_again() {
    let bench = Bench::new().await;
    sqlx::query("alter table test_starts add constraint broken check (false)").execute(&bench.pool).await.expect("sql");
    let worker = bench.worker().await;
    let run = bench.start(definition("again", vec![work("a", &[])]), json!({})).await;
    let first = bench.until(run, "quarantined", |v| v.status == RunStatus::Quarantined).await;
    assert!(bench.client.unquarantine(run, Why::default()).await.expect("released"));
    let epochs = "select epoch >= 4 and status = 'quarantined' from runs";
    while !sqlx::query_scalar::<_, bool>(epochs).fetch_one(&bench.pool).await.expect("row") {
        tokio::task::yield_now().await;
    }
    assert_eq!(bench.client.describe(run).await.expect("run").seq, first.seq);
    bench.client.terminate(run, "given up").await.expect("terminate");
    assert_eq!(bench.closed(run).await.status, RunStatus::Terminated);
    worker.drain(GRACE).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nonsense_is_refused_with_a_code() {
    let bench = Bench::new().await;
    let nobody = RunId::new();
    for asked in [
        bench.client.pause(nobody, Why::default()).await,
        bench.client.resume(nobody, Why::default()).await,
        bench.client.unquarantine(nobody, Why::default()).await,
    ] {
        assert_eq!(asked.expect_err("no run").code(), "run_not_found");
    }
    let hash = bench.deploy(definition("long", vec![work("a", &[])])).await;
    let start = Start {
        run_id: None,
        definition: hash,
        inputs: json!({}),
        workflow_id: None,
        attributes: json!({}),
        queue: String::new(),
        topic: None,
        admission: Default::default(),
    };
    let run = bench.client.start(start).await.expect("start").run_id;
    let long = Why { reason: "x".repeat(5_000), ..Why::default() };
    assert_eq!(bench.client.pause(run, long).await.expect_err("too long").code(), "too_large");
    let nul = Why { reason: "a\0b".into(), ..Why::default() };
    assert!(bench.client.pause(run, nul).await.expect("stored"));
    assert!(!bench.client.unquarantine(run, Why::default()).await.expect("nothing to do"));
}
