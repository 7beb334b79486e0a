//! What happens together: runs that are claimed and loaded in one go, results that are one transition.

use crate::{
    bench::{Bench, Gate, definition, e, step, waits_for, work},
    faults::{GRACE, LONG, reaches},
};
use loopwright_engine::{
    Failure,
    client::{Signal, Why},
    definition::{Await, Data, Definition, Kind, OnItemFailure, OnTimeout, Step},
    ids::RunId,
    transaction,
    view::RunStatus,
};
use serde_json::json;

const WIDTH: usize = 60;

/// As many steps side by side as there are items.
fn side_by_side(jitter: f64) -> Definition {
    let items: Vec<String> = (0..WIDTH).map(|n| n.to_string()).collect();
    let mut one = work("one", &[("n", Data::Expr(e("item")))]);
    one.retry.jitter = jitter;
    let each = Kind::Foreach {
        list: e(&format!("[{}]", items.join(", "))),
        key: None,
        max_items: u32::try_from(WIDTH).expect("small"),
        concurrency: u32::try_from(WIDTH).expect("small"),
        on_item_failure: OnItemFailure::FailFast,
        steps: vec![one],
        outputs: None,
    };
    definition("side_by_side", vec![step("each", each)])
}

async fn count(bench: &Bench, sql: &'static str) -> i64 {
    sqlx::query_scalar(sql).fetch_one(&bench.pool).await.expect(sql)
}

async fn replays(bench: &Bench, run: RunId) {
    let replayed = bench.client.replay(run, None).await.expect("replayed");
    assert_eq!(replayed.divergence, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn results_that_are_there_together_are_one_transition() {
    let bench = Bench::new().await;
    let gate = bench.gate();
    let worker = bench.worker_with(LONG, 64).await;
    let run = bench.start(side_by_side(0.0), json!({})).await;
    gate.arrived(u32::try_from(WIDTH).expect("small")).await;
    let before = count(&bench, "select count(*) from history").await;
    gate.open(WIDTH);
    let view = bench.closed(run).await;
    assert_eq!(view.status, RunStatus::Completed);
    let rows = count(&bench, "select count(*) from history").await - before;
    assert!(rows < 40, "{WIDTH} results were {rows} transitions");
    // The hook heard of every one of them.
    assert_eq!(bench.outcomes().await["Succeeded"], 60);
    // So many events are not folded each time that somebody looks.
    assert_eq!(count(&bench, "select count(*) from runs where cursor_seq = seq").await, 1);
    replays(&bench, run).await;
    worker.drain(GRACE).await;
    bench.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_failure_has_a_transition_and_a_draw_of_its_own() {
    let bench = Bench::new().await;
    let gate = Gate::new();
    let here = gate.clone();
    bench.script(move |ctx, input| {
        let gate = here.clone();
        async move {
            gate.pass().await;
            let fails = input["n"].as_i64().unwrap_or(0) % 3 == 0 && ctx.info().attempt < 3;
            if fails { Err(Failure::retryable("transient.network", "not yet")) } else { Ok(input) }
        }
    });
    let worker = bench.worker_with(LONG, 64).await;
    let run = bench.start(side_by_side(0.9), json!({})).await;
    gate.arrived(u32::try_from(WIDTH).expect("small")).await;
    gate.open(WIDTH * 3);
    assert_eq!(bench.closed(run).await.status, RunStatus::Completed);
    let shared = "select count(*) from (select from history h, jsonb_array_elements(h.events) e
                  where e->>'type' = 'retry_scheduled' group by h.seq having count(*) > 1) r";
    assert_eq!(count(&bench, shared).await, 0);
    assert_eq!(bench.outcomes().await["Failed"], 40);
    // With jitter: each delay is what its row's draw gives.
    replays(&bench, run).await;
    worker.drain(GRACE).await;
    bench.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn results_that_come_together_and_too_late_never_happened() {
    let bench = Bench::new().await;
    let gate = bench.gate();
    let worker = bench.worker_with(LONG, 64).await;
    let run = bench.start(side_by_side(0.0), json!({})).await;
    gate.arrived(u32::try_from(WIDTH).expect("small")).await;
    // The transition is sent and waits for the row; meanwhile somebody takes the run over.
    let mut tx = transaction::begin(&bench.pool).await.expect("begin");
    sqlx::query("select from runs for update").execute(&mut *tx).await.expect("lock");
    gate.open(WIDTH * 2);
    reaches(&bench.pool, "select count(*) from pg_locks where not granted", 1).await;
    for sql in [
        "update runs set owner = null, parked = true, epoch = epoch + 1",
        "insert into ready (shard, run_id, queue) select shard, run_id, queue from runs",
    ] {
        sqlx::query(sql).execute(&mut *tx).await.expect("taken");
    }
    tx.commit().await.expect("commit");
    assert_eq!(bench.closed(run).await.status, RunStatus::Completed);
    let outcomes = bench.outcomes().await;
    assert_eq!((outcomes["Lost"], outcomes["Succeeded"]), (60, 60));
    replays(&bench, run).await;
    worker.drain(GRACE).await;
    bench.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_cannot_be_loaded_holds_up_none_that_was_claimed_with_it() {
    let bench = Bench::new().await;
    let hash = bench.deploy(definition("loaded", vec![work("a", &[])])).await;
    let mut runs = Vec::new();
    for _ in 0..8 {
        runs.push(bench.start_as(hash, json!({}), None).await.run_id);
    }
    for (run, sql) in [
        (runs[1], "update runs set cursor = '{\"no\": \"state\"}' where run_id = $1"),
        // History that is not there.
        (runs[4], "update runs set seq = 3, status = 'running' where run_id = $1"),
        // History of a later release.
        (runs[6], "with r as (update runs set seq = 1, status = 'running' where run_id = $1 returning shard, run_id)
                   insert into history (shard, run_id, seq, epoch, format, events) select shard, run_id, 1, 0, 999, '[]' from r"),
    ] {
        sqlx::query(sql).bind(run.0).execute(&bench.pool).await.expect("damage");
    }
    let worker = bench.worker_with(LONG, 32).await;
    reaches(&bench.pool, "select count(*) from runs where status = 'completed'", 5).await;
    reaches(&bench.pool, "select count(*) from runs where status = 'quarantined' and owner is null", 2).await;
    let why: Vec<String> = sqlx::query_scalar("select waiting from runs where status = 'quarantined' order by run_id")
        .fetch_all(&bench.pool)
        .await
        .expect("reasons");
    for (why, wanted) in why.iter().zip(["cursor of run", "a gap after 0"]) {
        assert!(why.contains(wanted), "{why}");
    }
    let newer = bench.client.describe(runs[6]).await.expect_err("of a newer release");
    assert_eq!(newer.code(), "newer_release");
    worker.drain(GRACE).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_short_run_sleeps_closes_and_is_read_without_a_written_state() {
    let bench = Bench::new().await;
    let wait = Await {
        signal: "go".into(),
        timeout_ms: 3_600_000,
        form: None,
        show: None,
        to: Vec::new(),
        filter: None,
        remind_ms: Vec::new(),
        on_timeout: OnTimeout::Fail,
        default: None,
        approval: None,
        reply: None,
    };
    let steps = vec![work("before", &[]), step("wait", Kind::Await(Box::new(wait))), work("after", &[])];
    let worker = bench.worker_with(LONG, 4).await;
    let run = bench.start(definition("short", steps), json!({})).await;
    reaches(&bench.pool, "select count(*) from runs where parked and seq > 0 and waiting = 'signal'", 1).await;
    assert_eq!(count(&bench, "select count(*) from runs where cursor is null and cursor_seq = 0").await, 1);
    let view = bench.client.describe(run).await.expect("a run");
    assert!(view.waiting.len() == 1 && view.nodes.iter().any(|n| n.path == "before"), "{view:#?}");
    // Another worker goes on with it, from its history alone.
    worker.drain(GRACE).await;
    let worker = bench.worker_with(LONG, 4).await;
    let signal = Signal { name: "go".into(), payload: json!({"text": "now"}), dedupe_id: None, sender: None };
    assert!(bench.client.signal(run, signal).await.expect("sent"));
    let view = bench.closed(run).await;
    assert_eq!(view.status, RunStatus::Completed);
    assert_eq!(count(&bench, "select count(*) from runs where cursor is null").await, 1);
    replays(&bench, run).await;
    worker.drain(GRACE).await;
    bench.audit().await;
}

/// A run that waits for a signal which nobody sends, and then for others.
fn waits() -> Definition {
    definition("waits", ["go", "small-0", "small-1", "small-2", "large"].into_iter().map(wait).collect())
}

fn wait(signal: &str) -> Step {
    step(&signal.replace('-', "_"), Kind::Await(Box::new(waits_for(signal))))
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_that_do_not_fit_into_one_transition_are_read_in_the_next_ones() {
    let bench = Bench::new().await;
    let run = bench.start(waits(), json!({})).await;
    // Nobody drives it yet: all of them wait.
    for n in 0..300 {
        let signal = Signal { name: format!("small-{}", n % 3), payload: json!(n), dedupe_id: None, sender: None };
        assert!(bench.client.signal(run, signal).await.expect("sent"));
    }
    for n in 0..12 {
        let payload = json!({ "n": n, "text": "x".repeat(200 << 10) });
        let signal = Signal { name: "large".into(), payload, dedupe_id: None, sender: None };
        assert!(bench.client.signal(run, signal).await.expect("sent"));
    }
    let worker = bench.worker().await;
    reaches(&bench.pool, "select count(*) from runs where parked and inbox_seen = 312", 1).await;
    let received =
        "select count(*) from history h, jsonb_array_elements(h.events) e where e->>'type' = 'signal_received'";
    assert_eq!(count(&bench, received).await, 312);
    assert!(count(&bench, "select max(jsonb_array_length(events))::int8 from history").await <= 260);
    let largest = count(&bench, "select max(octet_length(events::text))::int8 from history").await;
    assert!(largest < (1 << 20) + (300 << 10), "a row of {largest} bytes");
    replays(&bench, run).await;
    // A cancel behind them all is read as well.
    bench.client.cancel(run, "enough").await.expect("sent");
    assert_eq!(bench.closed(run).await.status, RunStatus::Cancelled);
    worker.drain(GRACE).await;
    bench.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_order_behind_many_messages_is_heard_before_anything_begins() {
    let bench = Bench::new().await;
    let steps = ["small-0", "small-1", "small-2"].into_iter().map(wait);
    let run = bench.start(definition("ordered", [work("a", &[])].into_iter().chain(steps).collect()), json!({})).await;
    for n in 0..300 {
        let signal = Signal { name: format!("small-{}", n % 3), payload: json!(n), dedupe_id: None, sender: None };
        assert!(bench.client.signal(run, signal).await.expect("sent"));
    }
    bench.client.pause(run, Why::default()).await.expect("sent");
    let worker = bench.worker().await;
    reaches(&bench.pool, "select count(*) from runs where parked and status = 'paused' and inbox_seen = 301", 1).await;
    let begun = "select count(*) from history h, jsonb_array_elements(h.events) e where e->>'type' = 'attempt_started'";
    assert_eq!(count(&bench, begun).await, 0);
    bench.client.resume(run, Why::default()).await.expect("sent");
    assert_eq!(bench.closed(run).await.status, RunStatus::Completed);
    replays(&bench, run).await;
    worker.drain(GRACE).await;
    bench.audit().await;
}
