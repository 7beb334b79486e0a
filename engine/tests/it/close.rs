//! Children on a real database when their parent closes.

use crate::{
    bench::{Bench, definition, gated, step, work},
    faults::reaches,
};
use loopwright_engine::{
    definition::{CallVersion, Kind, ParentClose, Step},
    ids::RunId,
    view::{RunStatus, Waiting},
    worker::WorkerHandle,
};
use serde_json::json;
use sqlx::AssertSqlSafe;
use std::{collections::BTreeMap, time::Duration};

const GRACE: Duration = Duration::from_secs(10);

fn call(parent_close: ParentClose) -> Step {
    calls("child", parent_close)
}

fn calls(workflow: &str, parent_close: ParentClose) -> Step {
    let (workflow, version, with) = (workflow.into(), CallVersion::Latest, BTreeMap::new());
    step("c", Kind::Call { workflow, version, with, parent_close })
}

async fn child_of(bench: &Bench, run: RunId) -> RunId {
    let view = bench.until(run, "calls", |v| v.waiting.iter().any(|w| matches!(w, Waiting::Child { .. }))).await;
    view.waiting
        .iter()
        .find_map(|w| if let Waiting::Child { run_id, .. } = w { Some(*run_id) } else { None })
        .expect("a child")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_child_ends_with_its_parent_as_the_call_says() {
    let (bench, gate) = gated().await;
    let mut child = definition("child", vec![work("w", &[])]);
    child.finally = vec![work("clean", &[])];
    bench.deploy(child).await;
    let worker = bench.worker().await;
    for (how, terminated, wanted) in [
        (ParentClose::Cancel, false, RunStatus::Cancelled),
        (ParentClose::Cancel, true, RunStatus::Cancelled),
        (ParentClose::Terminate, false, RunStatus::Terminated),
        (ParentClose::Terminate, true, RunStatus::Terminated),
        (ParentClose::Abandon, false, RunStatus::Completed),
        (ParentClose::Abandon, true, RunStatus::Completed),
    ] {
        let run = bench.start(definition("parent", vec![call(how)]), json!({})).await;
        let child = child_of(&bench, run).await;
        gate.arrived(1).await;
        if terminated {
            bench.client.terminate(run, "enough").await.expect("terminated");
        } else {
            bench.client.cancel(run, "enough").await.expect("cancelled");
        }
        bench.closed(run).await;
        if how == ParentClose::Abandon {
            gate.open(1);
        }
        assert_eq!(bench.closed(child).await.status, wanted, "{how:?}, {terminated}");
        assert_eq!(bench.client.replay(run, None).await.expect("replays").divergence, None);
        assert_eq!(bench.client.replay(child, None).await.expect("replays").divergence, None);
    }
    let cleaned: i64 =
        sqlx::query_scalar("select count(*) from history where events @> '[{\"type\": \"finally_started\"}]'")
            .fetch_one(&bench.pool)
            .await
            .expect("count");
    assert_eq!(cleaned, 4, "whoever is terminated does not clean up");
    worker.drain(GRACE).await;
    bench.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_child_whose_worker_died_ends_with_its_parent() {
    let (bench, gate) = gated().await;
    bench.deploy(definition("child", vec![work("w", &[])])).await;
    let first = bench.worker().await;
    let run = bench.start(definition("parent", vec![call(ParentClose::Terminate)]), json!({})).await;
    let child = child_of(&bench, run).await;
    gate.arrived(1).await;
    bench.client.pause(child, loopwright_engine::client::Why::default()).await.expect("paused");
    bench.until(child, "paused", |v| v.status == RunStatus::Paused).await;
    bench.dies(first).await;
    bench.client.terminate(run, "enough").await.expect("terminated");
    let second = bench.worker().await;
    assert_eq!(bench.closed(child).await.status, RunStatus::Terminated);
    assert_eq!(bench.client.replay(child, None).await.expect("replays").divergence, None);
    second.drain(GRACE).await;
    bench.audit().await;
}

/// Deploys a child whose labels no worker has.
async fn nobody_serves(bench: &Bench, name: &str) {
    let mut child = definition(name, vec![work("a", &[])]);
    child.runs_on = vec!["nowhere".into()];
    bench.deploy(child).await;
}

/// The database's clock is so many minutes ahead from now on. No worker lives through that; the next one is returned.
async fn later(bench: &Bench, worker: WorkerHandle, minutes: u32) -> WorkerHandle {
    worker.drain(GRACE).await;
    let clock = format!(
        "create or replace function engine_now() returns timestamptz language sql stable as
           $$ select clock_timestamp() + interval '{minutes} minutes' $$"
    );
    sqlx::query(AssertSqlSafe(clock)).execute(&bench.pool).await.expect("clock");
    bench.worker().await
}

async fn set_aside(bench: &Bench, run: RunId) {
    sqlx::query(
        "with q as (update runs set status = 'quarantined', owner = null, parked = true, epoch = epoch + 1
                    where run_id = $1 and closed_at is null returning shard, run_id)
         delete from ready using q where ready.shard = q.shard and ready.run_id = q.run_id",
    )
    .bind(run.0)
    .execute(&bench.pool)
    .await
    .expect("set aside");
}

async fn history_of(bench: &Bench, run: RunId) -> Vec<serde_json::Value> {
    let rows = bench.client.history(run, 0, 1_000).await.expect("history");
    rows.into_iter().flat_map(|row| row.events).collect()
}

/// A run stops and waits for its child, for so long.
async fn stops(bench: &Bench, run: RunId) {
    bench.until(run, "stops", |v| v.status == RunStatus::Cancelling).await;
    let told = format!(
        "select count(*) from history where run_id = '{}' and events @> '[{{\"type\": \"call_stopped\"}}]'",
        run.0
    );
    reaches(&bench.pool, &told, 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_child_that_hears_nothing_keeps_no_parent_beyond_its_time() {
    let (bench, gate) = gated().await;
    nobody_serves(&bench, "nobody").await;
    bench.deploy(definition("child", vec![work("w", &[])])).await;
    let worker = bench.worker().await;
    let mut runs = Vec::new();
    for (name, workflow, how) in [
        ("unserved", "nobody", ParentClose::Cancel),
        ("aside", "child", ParentClose::Cancel),
        ("timed out", "nobody", ParentClose::Cancel),
        ("unserved, at once", "nobody", ParentClose::Terminate),
        ("aside, at once", "child", ParentClose::Terminate),
    ] {
        let mut parent = definition(name, vec![calls(workflow, how)]);
        parent.finally = vec![work("clean", &[])];
        if name == "timed out" {
            parent.timeout_ms = 1_000;
        }
        let hash = bench.deploy(parent).await;
        let run = bench.start_as(hash, json!({}), Some(name)).await.run_id;
        let child = child_of(&bench, run).await;
        if workflow == "child" {
            gate.arrived(1).await;
            set_aside(&bench, child).await;
        }
        if name != "timed out" {
            bench.client.cancel(run, "enough").await.expect("cancelled");
        }
        stops(&bench, run).await;
        runs.push((name, hash, how, run, child));
    }
    let worker = later(&bench, worker, 2).await;
    for (name, _, _, run, child) in runs.iter().filter(|(_, _, how, ..)| *how == ParentClose::Terminate) {
        assert_eq!(bench.closed(*run).await.status, RunStatus::Cancelled, "{name}");
        assert_eq!(bench.closed(*child).await.status, RunStatus::Terminated, "{name}");
    }
    for (name, _, _, run, _) in runs.iter().filter(|(_, _, how, ..)| *how == ParentClose::Cancel) {
        assert_eq!(bench.client.describe(*run).await.expect("run").status, RunStatus::Cancelling, "{name}: too early");
    }
    let worker = later(&bench, worker, 70).await;
    for (name, hash, _, run, child) in runs {
        let wanted = if name == "timed out" { RunStatus::Failed } else { RunStatus::Cancelled };
        assert_eq!(bench.closed(run).await.status, wanted, "{name}");
        assert_eq!(bench.closed(child).await.status, RunStatus::Terminated, "{name}");
        let events = history_of(&bench, run).await;
        assert!(events.iter().any(|e| e["type"] == "call_overdue" && e["times"] == 1), "{name}: {events:?}");
        assert!(events.iter().any(|e| e["type"] == "finally_started"), "{name}: {events:?}");
        assert_eq!(bench.client.replay(run, None).await.expect("replays").divergence, None, "{name}");
        // Nothing of it is kept: its key is free.
        let again = bench.start_as(hash, json!({}), Some(name)).await;
        assert!(again.created, "{name}");
        bench.client.terminate(again.run_id, "seen").await.expect("terminated");
    }
    worker.drain(GRACE).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_child_that_waits_for_its_own_is_spared_and_cleans_up() {
    let bench = Bench::new().await;
    nobody_serves(&bench, "nobody").await;
    let mut child = definition("child", vec![calls("nobody", ParentClose::Cancel)]);
    child.finally = vec![work("clean", &[])];
    bench.deploy(child).await;
    let worker = bench.worker().await;
    let run = bench.start(definition("parent", vec![call(ParentClose::Cancel)]), json!({})).await;
    let child = child_of(&bench, run).await;
    let grandchild = child_of(&bench, child).await;
    bench.client.cancel(run, "enough").await.expect("cancelled");
    stops(&bench, run).await;
    stops(&bench, child).await;
    let worker = later(&bench, worker, 70).await;
    assert_eq!(bench.closed(run).await.status, RunStatus::Cancelled);
    assert_eq!(bench.closed(child).await.status, RunStatus::Cancelled, "it had heard, and its own call was overdue");
    assert_eq!(bench.closed(grandchild).await.status, RunStatus::Terminated);
    let events = history_of(&bench, child).await;
    assert!(events.iter().any(|e| e["type"] == "attempt_ended" && e["path"] == "!finally/clean"), "{events:?}");
    for run in [run, child, grandchild] {
        assert_eq!(bench.client.replay(run, None).await.expect("replays").divergence, None);
    }
    worker.drain(GRACE).await;
    bench.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_child_that_cannot_be_ended_is_given_up() {
    let bench = Bench::new().await;
    nobody_serves(&bench, "nobody").await;
    let mut worker = bench.worker().await;
    let run = bench.start(definition("parent", vec![calls("nobody", ParentClose::Terminate)]), json!({})).await;
    let child = child_of(&bench, run).await;
    // Whatever is written to it breaks.
    for sql in [
        "create function refuse() returns trigger language plpgsql as $$ begin raise exception 'out of order'; end $$".to_owned(),
        format!("create trigger refuse before update on runs for each row when (new.run_id = '{}' and new.closed_at is not null)
                 execute function refuse()", child.0),
    ] {
        sqlx::query(AssertSqlSafe(sql)).execute(&bench.pool).await.expect("trigger");
    }
    bench.client.cancel(run, "enough").await.expect("cancelled");
    stops(&bench, run).await;
    for (turn, minutes) in (1..=3).zip([2, 4, 6]) {
        worker = later(&bench, worker, minutes).await;
        let overdue = format!(
            "select count(*) from history h, jsonb_array_elements(h.events) e where h.run_id = '{}' and e->>'type' = 'call_overdue'",
            run.0
        );
        reaches(&bench.pool, &overdue, turn).await;
        assert!(!bench.client.describe(run).await.expect("run").status.is_closed(), "{turn}");
    }
    let worker = later(&bench, worker, 8).await;
    assert_eq!(bench.closed(run).await.status, RunStatus::Cancelled);
    let events = history_of(&bench, run).await;
    let end = events.iter().find(|e| e["type"] == "step_ended").expect("the call ends");
    assert_eq!((&end["status"], &end["failure"]["code"]), (&json!("cancelled"), &json!("call.abandoned")));
    assert!(end["failure"]["message"].as_str().expect("text").contains(&child.to_string()), "{end}");
    assert_eq!(bench.client.replay(run, None).await.expect("replays").divergence, None);
    // Mended, it ends as anybody's.
    sqlx::query("drop trigger refuse on runs").execute(&bench.pool).await.expect("mended");
    bench.client.terminate(child, "by hand").await.expect("terminated");
    assert_eq!(bench.closed(child).await.status, RunStatus::Terminated);
    worker.drain(GRACE).await;
    bench.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_that_says_how_long_bounds_the_cleanup_and_the_children() {
    let (bench, _gate) = gated().await;
    nobody_serves(&bench, "nobody").await;
    let mut child = definition("child", vec![work("w", &[])]);
    child.finally = vec![work("w", &[])];
    bench.deploy(child).await;
    let worker = bench.worker().await;
    let within = Duration::from_secs(12);
    let mut slow = definition("slow", vec![work("w", &[])]);
    slow.finally = vec![work("w", &[])];
    let slow = bench.start(slow, json!({})).await;
    let calling = bench.start(definition("calling", vec![call(ParentClose::Cancel)]), json!({})).await;
    let unheard = bench.start(definition("unheard", vec![calls("nobody", ParentClose::Cancel)]), json!({})).await;
    let children = (child_of(&bench, calling).await, child_of(&bench, unheard).await);
    for (wrong, code) in [(Duration::ZERO, "input_invalid"), (Duration::from_secs(86_401), "input_invalid")] {
        let refused = bench.client.cancel_within(slow, "enough", wrong).await.expect_err("no such time");
        assert_eq!(refused.code(), code, "{refused}");
    }
    let began = tokio::time::Instant::now();
    for run in [calling, unheard] {
        bench.client.cancel_within(run, "enough", within).await.expect("cancelled");
    }
    // One that cleans up already is hurried.
    bench.client.cancel(slow, "enough").await.expect("cancelled");
    let cleans = |v: &loopwright_engine::view::RunView| v.live.iter().any(|a| a.path == "!finally/w");
    bench.until(slow, "cleans up", cleans).await;
    bench.client.cancel_within(slow, "enough", Duration::from_secs(1)).await.expect("cancelled");
    assert_eq!(bench.closed(slow).await.status, RunStatus::Cancelled);
    assert_eq!(bench.closed(calling).await.status, RunStatus::Cancelled);
    let child = bench.closed(children.0).await;
    assert_eq!(child.status, RunStatus::Cancelled, "it had half of the time, and ended by itself");
    assert!(began.elapsed() >= within / 2, "not before that");
    assert_eq!(bench.closed(unheard).await.status, RunStatus::Cancelled);
    assert_eq!(bench.closed(children.1).await.status, RunStatus::Terminated);
    for run in [slow, calling, unheard, children.0] {
        let bounded = history_of(&bench, run).await.iter().filter(|e| e["type"] == "cleanup_bounded").count();
        assert_eq!(bounded, 1, "{run}");
        assert_eq!(bench.client.replay(run, None).await.expect("replays").divergence, None);
    }
    let closed = bench.client.cancel_within(slow, "enough", within).await.expect_err("it has ended");
    assert_eq!(closed.code(), "run_closed");
    worker.drain(GRACE).await;
    bench.audit().await;
}
