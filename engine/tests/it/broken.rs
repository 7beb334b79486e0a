//! What is broken, silent or in too large a number, and still has an end: runs that cannot be read, wires that say nothing, inboxes that
//! nobody empties, activities that a worker has never heard of.

use crate::{
    bench::{Bench, PATIENCE, Work, definition, gated, step, waits_for, work},
    faults::{GRACE, LONG, SHORT, reaches},
    way::Way,
};
use loopwright_engine::{
    Failure,
    activity::Registry,
    client::{Client, Signal, Update, Why},
    definition::{Branch, CallVersion, Definition, Join, Kind, ParentClose, Step, WaitUntil},
    ids::RunId,
    view::{RunStatus, Waiting},
    worker::{self, WorkerConfig},
};
use serde_json::{Value, json};
use std::{collections::BTreeMap, sync::Arc, time::Duration};

fn call(workflow: &str) -> Step {
    let (workflow, version, with) = (workflow.into(), CallVersion::Latest, BTreeMap::new());
    step(
        if workflow == "middle" { "m" } else { "l" },
        Kind::Call { workflow, version, with, parent_close: ParentClose::Abandon },
    )
}

async fn child_of(bench: &Bench, run: RunId) -> RunId {
    let view = bench.until(run, "calls", |v| v.waiting.iter().any(|w| matches!(w, Waiting::Child { .. }))).await;
    let child = |w: &Waiting| if let Waiting::Child { run_id, .. } = w { Some(*run_id) } else { None };
    view.waiting.iter().find_map(child).expect("a child")
}

async fn count(bench: &Bench, sql: &'static str) -> i64 {
    sqlx::query_scalar(sql).fetch_one(&bench.pool).await.expect("count")
}

/// In the middle of a family, with an attempt under way, something overwrites its history. Nobody can drive it; it is terminated,
/// and everybody around it hears of that.
#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_cannot_be_read_is_terminated_with_what_it_holds() {
    let (bench, gate) = gated().await;
    bench.deploy(definition("leaf", vec![step("s", Kind::Await(Box::new(waits_for("go"))))])).await;
    let branches = vec![
        Branch { name: "works".into(), steps: vec![work("w", &[])] },
        Branch { name: "calls".into(), steps: vec![call("leaf")] },
    ];
    let both = Kind::Parallel { branches, join: Join::All, fail_fast: true };
    bench.deploy(definition("middle", vec![step("both", both)])).await;
    let first = bench.worker_with(SHORT, 4).await;
    let top = bench.start(definition("top", vec![call("middle")]), json!({})).await;
    let middle = child_of(&bench, top).await;
    gate.arrived(1).await;
    let leaf = child_of(&bench, middle).await;
    bench.until(leaf, "waits", |v| !v.waiting.is_empty()).await;
    first.crash();
    sqlx::query("update history set events = '[{\"type\": \"nothing_that_is_known\"}]' where run_id = $1")
        .bind(middle.0)
        .execute(&bench.pool)
        .await
        .expect("overwritten");
    let second = bench.worker_with(LONG, 4).await;
    reaches(&bench.pool, "select count(*) from runs where status = 'quarantined'", 1).await;
    assert_eq!(bench.client.describe(middle).await.expect_err("unreadable").code(), "invariant");

    bench.client.terminate(middle, "nothing to be saved").await.expect("terminated");

    assert_eq!(bench.closed(top).await.status, RunStatus::Failed, "it hears that its child was stopped");
    assert_eq!(bench.closed(leaf).await.status, RunStatus::Cancelled);
    assert_eq!(count(&bench, "select count(*) from runs where closed_at is null").await, 0);
    let outcomes = bench.outcomes().await;
    assert_eq!(outcomes.into_iter().collect::<Vec<_>>(), [("Abandoned".to_owned(), 1)], "the hook let go of it");
    let again = bench.client.terminate(middle, "again").await.expect_err("it has ended");
    assert_eq!(again.code(), "run_closed");
    second.drain(GRACE).await;
}

/// An operator's program of an older release, or without the payload key, does not take a run from a worker that can read it.
#[tokio::test(flavor = "multi_thread")]
async fn who_cannot_read_a_run_does_not_fence_its_owner() {
    let (bench, gate) = gated().await;
    let worker = bench.worker_with(LONG, 4).await;
    let run = bench.start(definition("newer", vec![work("w", &[])]), json!({})).await;
    gate.arrived(1).await;
    // The run, and then the definition that it is pinned to.
    for (write, take_back) in [
        ("update history set format = 900 where run_id = $1", "update history set format = 1 where run_id = $1"),
        (
            "update definitions d set ir = jsonb_set(ir, '{format}', '900') from runs r where d.hash = r.definition and r.run_id = $1",
            "update definitions d set ir = jsonb_set(ir, '{format}', '1') from runs r where d.hash = r.definition and r.run_id = $1",
        ),
    ] {
        sqlx::query(write).bind(run.0).execute(&bench.pool).await.expect("of a newer release");
        let refused = bench.client.terminate(run, "by an old program").await.expect_err("not its to read");
        assert_eq!(refused.code(), "newer_release");
        sqlx::query(take_back).bind(run.0).execute(&bench.pool).await.expect("of this one");
    }
    gate.open(1);
    let view = bench.closed(run).await;
    assert_eq!(view.status, RunStatus::Completed);
    worker.drain(GRACE).await;
    assert_eq!(bench.outcomes().await.into_iter().collect::<Vec<_>>(), [("Succeeded".to_owned(), 1)], "one attempt");
    bench.audit().await;
}

/// Nothing is wrong with the run, but nobody can read what it does next.
#[tokio::test(flavor = "multi_thread")]
async fn a_run_whose_definition_cannot_be_read_is_terminated() {
    for broken in ["update definitions set ir = '{}'", "update definitions set bundle = '[1]'"] {
        let (bench, gate) = gated().await;
        let first = bench.worker_with(SHORT, 4).await;
        let other = bench.start(definition("same", vec![work("w", &[])]), json!({})).await;
        let run = bench.start(definition("same", vec![work("w", &[])]), json!({})).await;
        gate.arrived(2).await;
        first.crash();
        sqlx::query(broken).execute(&bench.pool).await.expect("overwritten");
        let second = bench.worker_with(LONG, 4).await;
        reaches(&bench.pool, "select count(*) from runs where status = 'quarantined'", 2).await;
        assert_eq!(bench.client.describe(run).await.expect_err("unreadable").code(), "definition_invalid", "{broken}");
        bench.client.terminate(run, "nothing to be saved").await.expect("terminated");
        let outcomes = bench.outcomes().await;
        assert_eq!(outcomes.into_iter().collect::<Vec<_>>(), [("Abandoned".to_owned(), 1)], "of this run alone");
        let again = bench.client.terminate(run, "again").await.expect_err("it has ended");
        assert_eq!(again.code(), "run_closed");
        bench.client.terminate(other, "the same").await.expect("terminated");
        assert_eq!(
            count(&bench, "select count(*) from runs where status <> 'terminated' or owner is not null").await,
            0
        );
        second.drain(GRACE).await;
    }
}

/// A metered attempt is lost, and the worker that takes the run over has never heard of its activity.
#[tokio::test(flavor = "multi_thread")]
async fn a_lost_attempt_is_settled_by_a_worker_that_does_not_know_its_activity() {
    let (bench, gate) = gated().await;
    let first = bench.worker_with(SHORT, 4).await;
    let run = bench.start(definition("unheard", vec![work("w", &[])]), json!({})).await;
    gate.arrived(1).await;
    first.crash();
    let mut config = WorkerConfig::new(bench.pool.clone(), Registry::new());
    (config.hook, config.lease) = (bench.hook.clone(), LONG);
    let stranger = worker::start(config).await.expect("worker");
    reaches(&bench.pool, "select count(*) from test_ends where outcome = 'Lost'", 1).await;
    stranger.drain(GRACE).await;
    gate.open(1);
    let third = bench.worker_with(LONG, 4).await;
    assert_eq!(bench.closed(run).await.status, RunStatus::Completed);
    third.drain(GRACE).await;
    bench.audit().await;
}

fn go(id: u32) -> Signal {
    Signal { name: "go".into(), payload: json!({ "n": id }), dedupe_id: Some(format!("s{id}")), sender: None }
}

/// As if so many had been sent to a run that nobody drives, of no name more than it will keep.
async fn sent(bench: &Bench, run: RunId, kind: &str, many: i32) {
    let sql = "with m as (insert into inbox (shard, run_id, n, kind, name, payload)
                          select shard, run_id, inbox_n + i, $2, case when i <= 90 then 'go' else 'other' || i / 90 end, case $2 when 'signal' then '{}' else '\"enough\"' end::jsonb
                          from runs, generate_series(1, $3) i where run_id = $1 returning 1)
               update runs set inbox_n = inbox_n + (select count(*) from m) where run_id = $1";
    sqlx::query(sql).bind(run.0).bind(kind).bind(many).execute(&bench.pool).await.expect("sent");
}

fn deaf() -> Definition {
    definition("deaf", vec![step("s", Kind::Await(Box::new(waits_for("go"))))])
}

/// Nobody drives the run; whoever sends on and on is told to wait, and an operator still gets through.
#[tokio::test(flavor = "multi_thread")]
async fn an_inbox_that_nobody_reads_takes_a_thousand_messages() {
    let bench = Bench::new().await;
    let run = bench.start(deaf(), json!({})).await;
    sent(&bench, run, "signal", 999).await;
    assert!(bench.client.signal(run, go(7)).await.expect("stored"));
    let refused = bench.client.signal(run, go(1_000)).await.expect_err("full");
    assert_eq!(refused.code(), "inbox_full");
    assert!(refused.to_string().starts_with("1000 messages (signals and updates) wait"), "{refused}");
    assert!(!bench.client.signal(run, go(7)).await.expect("one that is there already"));
    // Too large for its row: nothing of it stays either.
    let large = Signal { payload: json!({ "text": "x".repeat(100_000) }), ..go(1_001) };
    assert_eq!(bench.client.signal(run, large).await.expect_err("full").code(), "inbox_full");
    assert_eq!(count(&bench, "select count(*) from blobs").await, 0);
    assert!(bench.client.pause(run, Why::default()).await.expect("an order"));
    assert!(bench.client.resume(run, Why::default()).await.expect("an order"));
    let worker = bench.worker_with(LONG, 4).await;
    assert_eq!(bench.closed(run).await.status, RunStatus::Completed);
    worker.drain(GRACE).await;
    bench.audit().await;
}

/// A run keeps a hundred messages of a name for the steps that will take them. Whoever sends one more is told so, and nothing that was accepted is
/// dropped.
#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_the_run_would_not_keep_is_refused_at_the_door() {
    let bench = Bench::new().await;
    let two = vec![
        step("s", Kind::Await(Box::new(waits_for("go")))),
        step("t", Kind::Await(Box::new(waits_for("other")))),
        step("u", Kind::Await(Box::new(waits_for("go")))),
    ];
    let run = bench.start(definition("keeps", two), json!({})).await;
    let worker = bench.worker_with(LONG, 4).await;
    bench.client.signal(run, go(0)).await.expect("taken");
    bench.until(run, "waits for the other", |v| v.waiting.iter().any(|w| format!("{w:?}").contains("other"))).await;
    // Half of them are read, half of them not.
    for n in 1..=50 {
        assert!(bench.client.signal(run, go(n)).await.expect("room"));
    }
    bench.until(run, "has read them", |v| v.unread == 0).await;
    bench.client.pause(run, Why::default()).await.expect("pause");
    bench.until(run, "is paused", |v| v.status == RunStatus::Paused).await;
    worker.drain(GRACE).await;
    for n in 51..=100 {
        assert!(bench.client.signal(run, go(n)).await.expect("room"));
    }
    let refused = bench.client.signal(run, go(101)).await.expect_err("no room");
    assert_eq!(refused.code(), "inbox_full");
    assert!(refused.to_string().starts_with("100 messages of this name wait"), "{refused}");
    assert!(!bench.client.signal(run, go(7)).await.expect("one that is there already"));
    let other = Signal { name: "other".into(), ..go(102) };
    assert!(bench.client.signal(run, other).await.expect("of another name there is room"));
    let worker = bench.worker_with(LONG, 4).await;
    bench.client.resume(run, Why::default()).await.expect("resume");
    assert_eq!(bench.closed(run).await.status, RunStatus::Completed);
    let dropped = "select count(*) from history, jsonb_array_elements(events) e where e->>'type' = 'signal_dropped'";
    assert_eq!(count(&bench, dropped).await, 0);
    worker.drain(GRACE).await;
    bench.audit().await;
}

/// Whether there is room in it, only who can read it knows; that somebody cannot is no matter of the sender's.
#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_the_sender_s_process_cannot_read_takes_its_messages() {
    let bench = Bench::new().await;
    let run = bench.start(deaf(), json!({})).await;
    sent(&bench, run, "signal", 60).await;
    sqlx::query("update runs set cursor = '{}', cursor_seq = 1, seq = 1 where run_id = $1")
        .bind(run.0)
        .execute(&bench.pool)
        .await
        .expect("overwritten");
    assert_eq!(bench.client.describe(run).await.expect_err("unreadable").code(), "invariant");
    assert!(bench.client.signal(run, go(1)).await.expect("stored"));
    assert!(!bench.client.signal(run, go(1)).await.expect("once"));
}

/// Who owns a run may ask it to stop as often as he likes, and what he asks is kept until somebody reads it. Orders and messages are
/// counted apart: neither keeps the other out.
#[tokio::test(flavor = "multi_thread")]
async fn an_inbox_that_nobody_reads_takes_a_thousand_orders_beside_a_thousand_messages() {
    let bench = Bench::new().await;
    let run = bench.start(deaf(), json!({})).await;
    sent(&bench, run, "signal", 1_000).await;
    sent(&bench, run, "unblock", 1_500).await;
    sent(&bench, run, "cancel", 998).await;
    bench.client.cancel(run, "enough").await.expect("there is room for it");
    assert!(bench.client.pause(run, Why::default()).await.expect("and for another order"));
    for refused in [
        bench.client.cancel(run, "enough").await.map(|()| true),
        bench.client.pause(run, Why::default()).await,
        bench.client.resume(run, Why::default()).await,
    ] {
        let refused = refused.expect_err("full");
        assert_eq!(refused.code(), "inbox_full");
        assert!(refused.to_string().starts_with("1000 orders (cancel, pause, resume) wait"), "{refused}");
    }
    assert_eq!(bench.client.cancel(run, &"x".repeat(4_097)).await.expect_err("too long").code(), "too_large");
    // A thousand orders leave a message its room.
    let other = bench.start(deaf(), json!({})).await;
    sent(&bench, other, "pause", 1_000).await;
    assert!(bench.client.signal(other, go(1)).await.expect("a message"));
    assert_eq!(bench.client.resume(other, Why::default()).await.expect_err("full").code(), "inbox_full");
    bench.client.terminate(other, "seen").await.expect("ended");
    // What the engine says itself gets through.
    let mut tx = loopwright_engine::transaction::begin(&bench.pool).await.expect("begin");
    assert_eq!(bench.client.unblock_in(&mut tx, &json!({})).await.expect("told"), 1);
    tx.commit().await.expect("commit");
    let worker = bench.worker_with(LONG, 4).await;
    assert_eq!(bench.closed(run).await.status, RunStatus::Cancelled);
    worker.drain(GRACE).await;
    bench.audit().await;
}

/// Between the look that finds the inbox full, so that the large value is not stored, and the statement that stores the message, a
/// worker reads some.
#[tokio::test(flavor = "multi_thread")]
async fn a_large_message_to_an_inbox_that_is_being_emptied_is_stored_whole_or_not_at_all() {
    let bench = Bench::new().await;
    let run = bench.start(deaf(), json!({})).await;
    sent(&bench, run, "signal", 1_000).await;
    let way = Way::to(&bench.pool).await;
    let held = way.holds_at("insert into inbox");
    // Senders of signals hold the run while they look; those of updates do not.
    let large = Update {
        name: "go".into(),
        payload: json!({ "text": "x".repeat(100_000) }),
        id: Some("u".into()),
        sender: None,
    };
    let sent = {
        let (client, large) = (Client::new(way.pool(2).await, bench.hook.clone()), large.clone());
        tokio::spawn(async move { client.update(run, large, Duration::ZERO).await })
    };
    // It has seen the full inbox.
    tokio::time::timeout(PATIENCE, held.arrived.cancelled()).await.expect("it is about to be stored");
    let read = "update runs set inbox_seen = 256 where run_id = $1";
    sqlx::query(read).bind(run.0).execute(&bench.pool).await.expect("read");
    held.goes_on.cancel();
    assert_eq!(sent.await.expect("task").expect_err("it was full").code(), "inbox_full");
    assert_eq!(
        count(&bench, "select (select count(*) from inbox where n > 1000) + (select count(*) from blobs)").await,
        0
    );
    let stored = bench.client.update(run, large, Duration::ZERO).await.expect_err("nobody answers");
    assert_eq!(stored.code(), "update_pending", "there is room now");
    let worker = bench.worker_with(LONG, 4).await;
    assert_eq!(bench.closed(run).await.status, RunStatus::Completed);
    worker.drain(GRACE).await;
    bench.audit().await;
}

/// The wire goes silent in the middle of a commit: no answer, no end. The worker stops when its lease is over and hangs on nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_worker_whose_wire_went_silent_comes_to_its_end() {
    let bench = Bench::new().await;
    let way = Way::to(&bench.pool).await;
    let silent = way.dies_at("insert into history");
    let script =
        |_, _| Box::pin(async { Ok::<_, Failure>(Value::Null) }) as futures_util::future::BoxFuture<'static, _>;
    let mut config = WorkerConfig::new(way.pool(4).await, Registry::new().with(Work(Arc::new(script))));
    (config.hook, config.lease) = (bench.hook.clone(), 4 * SHORT);
    let cut = worker::start(config).await.expect("worker");
    let nap = step("nap", Kind::Wait { until: WaitUntil::For(1) });
    let run = bench.start(definition("silent", vec![nap, work("w", &[])]), json!({})).await;
    tokio::time::timeout(PATIENCE, silent.cancelled()).await.expect("it came to a commit");
    cut.fenced().await;
    tokio::time::timeout(PATIENCE, cut.drain(Duration::ZERO)).await.expect("it ends");
    let other = bench.worker_with(LONG, 4).await;
    assert_eq!(bench.closed(run).await.status, RunStatus::Completed);
    other.drain(GRACE).await;
    bench.audit().await;
}
