//! What a start names beyond its definition (a group, a rate, the time of its chain): who has it after it, what becomes of a run that
//! waits for too long, and in which order the rows of a start are locked.

use crate::{
    bench::{Bench, definition, e, is_waited_for, step, waits_for, work},
    faults::{GRACE, LONG},
};
use chrono::{DateTime, Utc};
use loopwright_engine::{
    admission::{Admission, IdConflict, OnConflict, Place, Rate},
    client::{At, Fork, Signal, Start},
    definition::{Data, Definition, Input, Kind},
    ids::{DefinitionHash, RunId},
    view::RunStatus,
};
use serde_json::{Map, Value, json};
use sqlx::{PgConnection, Row};
use std::{collections::BTreeMap, time::Duration};

/// The number of a state that an older release must not read.
const TERMS: i64 = 7;

fn asks(name: &str) -> Definition {
    definition(name, vec![step("ask", Kind::Await(Box::new(waits_for("go"))))])
}

fn request(definition: DefinitionHash, admission: Admission) -> Start {
    Start {
        run_id: None,
        definition,
        inputs: json!({}),
        workflow_id: None,
        attributes: json!({ "user_id": "u1" }),
        queue: String::new(),
        topic: None,
        admission,
    }
}

fn place(limit: u32) -> Option<Place> {
    Some(Place { group: "g".into(), limit, on_conflict: OnConflict::Queue })
}

fn first() -> Fork {
    Fork { run_id: None, at: At::Seq(1), inputs: Map::new(), definition: None, attributes: None, reason: "try".into() }
}

fn go() -> Signal {
    Signal { name: "go".into(), ..Signal::default() }
}

async fn waits(bench: &Bench, run: RunId) {
    bench.until(run, "waits", |v| !v.waiting.is_empty()).await;
}

/// What is stored of a run's terms: the named ones, the time of its chain, the number of its state.
async fn terms(bench: &Bench, run: RunId) -> (Option<Value>, Option<DateTime<Utc>>, Option<i64>) {
    let sql = "select admission, chain_deadline, (cursor ->> 'format')::bigint as format from runs where run_id = $1";
    let row = sqlx::query(sql).bind(run.0).fetch_one(&bench.pool).await.expect("row");
    (row.get("admission"), row.get("chain_deadline"), row.get("format"))
}

/// When a fork must have ended, as its first own event says.
async fn deadline(bench: &Bench, fork: RunId) -> DateTime<Utc> {
    let rows = bench.client.history(fork, 1, 1).await.expect("history");
    assert_eq!(rows[0].events[0]["type"], "run_forked");
    rows[0].events[0]["deadline"].as_str().expect("deadline").parse().expect("instant")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reset_keeps_the_terms_of_the_start_and_a_fork_all_but_the_time_of_the_chain() {
    let bench = Bench::new().await;
    let client = &bench.client;
    let hash = bench.deploy(asks("placed")).await;
    let worker = bench.worker_with(LONG, 8).await;
    let plain = client.start(request(hash, Admission::default())).await.expect("start").run_id;
    assert_eq!(terms(&bench, plain).await, (None, None, None), "an older release may have it");
    let named = Admission {
        place: place(2),
        rate: Some(Rate { key: "hourly".into(), starts: 3, per_ms: 3_600_000 }),
        chain_timeout: Some(Duration::from_secs(1_800)),
        ..Admission::default()
    };
    let run = client.start(request(hash, named)).await.expect("start").run_id;
    waits(&bench, run).await;
    let of_the_start = terms(&bench, run).await;
    let (Some(admission), Some(until), Some(TERMS)) = of_the_start.clone() else { panic!("{of_the_start:?}") };
    let reset = client.reset(run, first()).await.expect("reset").run_id;
    waits(&bench, reset).await;
    assert_eq!(terms(&bench, reset).await, of_the_start);
    assert_eq!(deadline(&bench, reset).await, until, "not an hour from now, as its definition says");
    let fork = client.fork(reset, first()).await.expect("fork").run_id;
    waits(&bench, fork).await;
    assert_eq!(terms(&bench, fork).await, (Some(admission), None, Some(TERMS)));
    assert!(deadline(&bench, fork).await > until);
    // Both have a place in the group; the start, the reset and the fork were the three of this hour.
    let placed: Vec<(uuid::Uuid, bool)> = sqlx::query_as(
        "select run_id, place is not null from admissions where group_name = 'g' order by run_id = $1 desc",
    )
    .bind(reset.0)
    .fetch_all(&bench.pool)
    .await
    .expect("places");
    assert_eq!(placed, [(reset.0, true), (fork.0, true)]);
    let again = client.reset(fork, first()).await.expect("reset").run_id;
    let held = client.describe(again).await.expect("run").held.expect("held back");
    assert!(held.starts_with("for its rate limit, until "), "{held}");
    assert_eq!(client.describe(fork).await.expect("run").status, RunStatus::Terminated);
    // What is over is not begun again in the same chain.
    // Of this one alone: the one that is held back would end of it.
    let over = "update runs set chain_deadline = engine_now() where run_id = $1";
    sqlx::query(over).bind(reset.0).execute(&bench.pool).await.expect("time");
    let refused = client.reset(reset, first()).await.expect_err("over");
    assert!(refused.code() == "fork_invalid" && refused.to_string().contains("the time of its chain"), "{refused}");
    for run in [plain, reset, again] {
        client.terminate(run, "seen").await.expect("ended");
    }
    assert_eq!(terms(&bench, reset).await.2, Some(TERMS), "whatever writes the state keeps its number");
    worker.drain(GRACE).await;
    bench.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_is_held_back_fails_when_the_time_of_its_chain_is_over() {
    let bench = Bench::new().await;
    let client = &bench.client;
    let with = BTreeMap::from([("n".to_owned(), Data::Literal(json!(2)))]);
    let mut again = step("again", Kind::ContinueAsNew { with, current: false });
    again.condition = Some(e("inputs.n == 1"));
    let mut chain = asks("chain");
    chain.steps.push(again);
    chain.finally = vec![work("clean", &[])];
    let n = Input { schema: json!({"type": "integer"}), required: false, default: Some(json!(1)) };
    chain.inputs.insert("n".into(), n);
    let (chain, other) = (bench.deploy(chain).await, bench.deploy(asks("other")).await);
    let worker = bench.worker_with(LONG, 8).await;
    let chain_timeout = Some(Duration::from_secs(3_600));
    let named = Admission { place: place(1), chain_timeout, ..Admission::default() };
    let run = client.start(request(chain, named)).await.expect("start").run_id;
    waits(&bench, run).await;
    // It came before the next run of the chain, has the place after the first, and keeps it.
    let named = Admission { place: place(1), ..Admission::default() };
    let other = client.start(request(other, named)).await.expect("start").run_id;
    client.signal(run, go()).await.expect("sent");
    let next = bench.closed(run).await.chain.continued_as.expect("another goes on");
    waits(&bench, other).await;
    assert!(client.describe(next).await.expect("run").held.is_some());
    assert_eq!(terms(&bench, next).await.2, Some(TERMS));
    sqlx::query("update runs set chain_deadline = engine_now() where run_id = $1")
        .bind(next.0)
        .execute(&bench.pool)
        .await
        .expect("time");
    let view = bench.closed(next).await;
    assert_eq!((view.status, view.seq), (RunStatus::Failed, 1), "it has begun nothing, so it cleans nothing up");
    assert_eq!(view.failure.expect("a failure").code, "timeout.run_total");
    assert_eq!(client.replay(next, None).await.expect("replays").divergence, None);
    assert!(!client.describe(other).await.expect("run").status.is_closed());
    client.signal(other, go()).await.expect("sent");
    assert_eq!(bench.closed(other).await.status, RunStatus::Completed);
    worker.drain(GRACE).await;
    bench.audit().await;
}

/// Whose steps have something to clean up.
fn cleans(name: &str) -> Definition {
    let mut cleans = definition(name, vec![work("a", &[]), step("ask", Kind::Await(Box::new(waits_for("go"))))]);
    cleans.finally = vec![work("clean", &[])];
    cleans
}

/// It had begun before it was held back: who is cancelled before there is a place for it, or whose chain's time is over, runs its
/// `finally`.
#[tokio::test(flavor = "multi_thread")]
async fn a_reset_that_is_held_back_cleans_up_before_it_ends() {
    let bench = Bench::new().await;
    let client = &bench.client;
    let (hash, other) = (bench.deploy(cleans("cleans")).await, bench.deploy(asks("other")).await);
    let worker = bench.worker_with(LONG, 8).await;
    let in_group = |group: &str, chain_timeout| Admission {
        place: Some(Place { group: group.into(), limit: 1, on_conflict: OnConflict::Queue }),
        chain_timeout,
        ..Admission::default()
    };
    for (group, time_is_over) in [("g", false), ("h", true)] {
        let chain_timeout = time_is_over.then_some(Duration::from_secs(3_600));
        let run = client.start(request(hash, in_group(group, chain_timeout))).await.expect("start").run_id;
        waits(&bench, run).await;
        // It waits already, so it has the place before the reset.
        let before = client.start(request(other, in_group(group, None))).await.expect("start").run_id;
        let at = Fork { at: At::Step("ask".into()), ..first() };
        let reset = client.reset(run, at).await.expect("reset").run_id;
        waits(&bench, before).await;
        assert!(client.describe(reset).await.expect("run").held.is_some());
        let (status, code) = if time_is_over {
            let over = "update runs set chain_deadline = engine_now(), cursor = jsonb_set(cursor, '{deadline}', to_jsonb(engine_now()))
                        where run_id = $1";
            sqlx::query(over).bind(reset.0).execute(&bench.pool).await.expect("time");
            (RunStatus::Failed, "timeout.run_total")
        } else {
            client.cancel(reset, "enough").await.expect("cancelled");
            (RunStatus::Cancelled, "cancelled")
        };
        let view = bench.closed(reset).await;
        assert_eq!((view.status, view.failure.expect("a failure").code.as_str()), (status, code));
        let rows = client.history(reset, 2, 100).await.expect("history");
        let events: Vec<&Value> = rows.iter().flat_map(|row| &row.events).collect();
        let ended = |path: &str| events.iter().filter(|e| e["type"] == "step_ended" && e["path"] == path).count();
        assert_eq!((ended("!finally/clean"), ended("a")), (1, 0), "{events:#?}");
        // Nobody has lost a place over it.
        assert!(!client.describe(before).await.expect("run").status.is_closed());
        client.signal(before, go()).await.expect("sent");
        assert_eq!(bench.closed(before).await.status, RunStatus::Completed);
    }
    worker.drain(GRACE).await;
    bench.audit().await;
}

/// It is in no chain, and waits for a place that nobody gives it: its own time is over all the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_fork_that_is_held_back_ends_when_its_own_time_is_over() {
    let bench = Bench::new().await;
    let client = &bench.client;
    let (hash, other) = (bench.deploy(cleans("cleans")).await, bench.deploy(asks("other")).await);
    let worker = bench.worker_with(LONG, 8).await;
    let placed = || Admission { place: place(1), ..Admission::default() };
    let run = client.start(request(hash, placed())).await.expect("start").run_id;
    waits(&bench, run).await;
    let before = client.start(request(other, placed())).await.expect("start").run_id;
    client.terminate(run, "enough").await.expect("ended");
    waits(&bench, before).await;
    let fork = client.fork(run, first()).await.expect("fork").run_id;
    assert!(client.describe(fork).await.expect("run").held.is_some());
    let until: Option<DateTime<Utc>> = sqlx::query_scalar("select deadline from admissions where run_id = $1")
        .bind(fork.0)
        .fetch_one(&bench.pool)
        .await
        .expect("held back");
    let apart = deadline(&bench, fork).await - until.expect("it has an end");
    assert!(apart.abs() < chrono::Duration::milliseconds(1), "{apart}");
    for over in [
        "update runs set cursor = jsonb_set(cursor, '{deadline}', to_jsonb(engine_now())) where run_id = $1",
        "update admissions set deadline = engine_now() where run_id = $1",
    ] {
        sqlx::query(over).bind(fork.0).execute(&bench.pool).await.expect("an hour later");
    }
    let view = bench.closed(fork).await;
    assert_eq!((view.status, view.failure.expect("a failure").code.as_str()), (RunStatus::Failed, "timeout.run_total"));
    let rows = client.history(fork, 2, 100).await.expect("history");
    let ended = |e: &&Value| e["type"] == "step_ended" && e["path"] == "!finally/clean";
    assert_eq!(rows.iter().flat_map(|row| &row.events).filter(ended).count(), 1, "it has cleaned up");
    // Nobody has lost a place over it.
    assert!(!client.describe(before).await.expect("run").status.is_closed());
    client.signal(before, go()).await.expect("sent");
    assert_eq!(bench.closed(before).await.status, RunStatus::Completed);
    worker.drain(GRACE).await;
    bench.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_time_of_a_fork_counts_from_the_instant_that_its_rate_gives_it() {
    let bench = Bench::new().await;
    let client = &bench.client;
    let mut asks = asks("rated");
    asks.timeout_ms = 600_000;
    let hash = bench.deploy(asks).await;
    let worker = bench.worker_with(LONG, 8).await;
    let rate = Some(Rate { key: "hourly".into(), starts: 1, per_ms: 3_600_000 });
    let run = client.start(request(hash, Admission { rate, ..Admission::default() })).await.expect("start").run_id;
    waits(&bench, run).await;
    let fork = client.fork(run, first()).await.expect("fork").run_id;
    assert!(client.describe(fork).await.expect("run").held.is_some());
    let (begins, now): (DateTime<Utc>, DateTime<Utc>) =
        sqlx::query_as("select not_before, engine_now() from admissions where run_id = $1")
            .bind(fork.0)
            .fetch_one(&bench.pool)
            .await
            .expect("held back");
    assert!(begins > now + chrono::Duration::minutes(30), "longer than its whole timeout");
    assert_eq!(deadline(&bench, fork).await, begins + chrono::Duration::minutes(10));
    let rows = client.history(fork, 1, 1).await.expect("history");
    assert_eq!((rows[0].format, terms(&bench, fork).await.2), (8, Some(8)), "an older release would count otherwise");
    let due = "update admissions set not_before = engine_now() where run_id = $1";
    sqlx::query(due).bind(fork.0).execute(&bench.pool).await.expect("an hour later");
    waits(&bench, fork).await;
    client.signal(fork, go()).await.expect("sent");
    assert_eq!(bench.closed(fork).await.status, RunStatus::Completed);
    assert_eq!(client.replay(fork, None).await.expect("replays").divergence, None);
    client.terminate(run, "seen").await.expect("ended");
    worker.drain(GRACE).await;
    bench.audit().await;
}

/// As a start that has its id and arrives at its group: it takes the group without waiting for anybody.
async fn arrives(start: &mut PgConnection) {
    let group = sqlx::query("select from concurrency_groups where name = 'g' for update nowait").execute(start).await;
    assert_eq!(group.expect("whoever waits for an id has no group").rows_affected(), 1);
}

async fn takes(start: &mut PgConnection, id: &str) {
    let sql = "insert into workflow_ids (workflow_id, shard, run_id) values ($1, 0, $2)";
    sqlx::query(sql).bind(id).bind(uuid::Uuid::nil()).execute(start).await.expect("the id is free");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_ends_no_run_has_the_id_before_the_group_as_every_start() {
    let bench = Bench::new().await;
    let hash = bench.deploy(asks("open")).await;
    let placed = |id: &str, id_conflict| {
        let admission = Admission { place: place(9), id_conflict, ..Admission::default() };
        Start { workflow_id: Some(id.to_owned()), ..request(hash, admission) }
    };
    let worker = bench.worker_with(LONG, 8).await;

    // A reset of a run that has closed, while a start under its id is on its way.
    let closed = bench.client.start(placed("a", IdConflict::Fail)).await.expect("start").run_id;
    waits(&bench, closed).await;
    bench.client.terminate(closed, "enough").await.expect("ended");
    let mut start = loopwright_engine::transaction::begin(&bench.pool).await.expect("begin");
    takes(&mut start, "a").await;
    let client = bench.client.clone();
    let reset = tokio::spawn(async move { client.reset(closed, first()).await });
    is_waited_for(&bench.pool, &mut start).await;
    arrives(&mut start).await;
    start.rollback().await.expect("rollback");
    let reset = reset.await.expect("task").expect("reset");
    assert!(!reset.terminated);
    assert_eq!(bench.client.open_run("a").await.expect("asked"), Some(reset.run_id));

    // A start that was to end the open run, which ended by itself, while another start has taken the id.
    let old = bench.client.start(placed("b", IdConflict::Fail)).await.expect("start").run_id;
    waits(&bench, old).await;
    let mut ends = loopwright_engine::transaction::begin(&bench.pool).await.expect("begin");
    sqlx::query("select from runs where run_id = $1 for update").bind(old.0).execute(&mut *ends).await.expect("locked");
    let (client, replaces) = (bench.client.clone(), placed("b", IdConflict::TerminateExisting));
    let new = tokio::spawn(async move { client.start(replaces).await });
    is_waited_for(&bench.pool, &mut ends).await;
    sqlx::query("delete from workflow_ids where workflow_id = 'b'").execute(&bench.pool).await.expect("free");
    let mut start = loopwright_engine::transaction::begin(&bench.pool).await.expect("begin");
    takes(&mut start, "b").await;
    for sql in [
        "update runs set status = 'terminated', closed_at = engine_now() where run_id = $1",
        "delete from admissions where run_id = $1",
        "delete from ready where run_id = $1",
    ] {
        sqlx::query(sql).bind(old.0).execute(&mut *ends).await.expect("it ends");
    }
    ends.commit().await.expect("commit");
    is_waited_for(&bench.pool, &mut start).await;
    arrives(&mut start).await;
    start.rollback().await.expect("rollback");
    let new = new.await.expect("task").expect("start");
    assert!(new.created);
    for run in [reset.run_id, new.run_id] {
        bench.client.terminate(run, "seen").await.expect("ended");
    }
    worker.drain(GRACE).await;
    bench.audit().await;
}
