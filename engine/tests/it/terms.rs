//! What a start names beyond its definition (a group, a rate, the time of its chain): who has it after it, what becomes of a run that
//! waits for too long, and in which order the rows of a start are locked.

use crate::{
    bench::{Bench, PATIENCE, definition, e, step, waits_for, work},
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
use sqlx::{PgConnection, PgPool, Row};
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
    sqlx::query("update runs set chain_deadline = engine_now()").execute(&bench.pool).await.expect("time");
    let refused = client.reset(reset, first()).await.expect_err("over");
    assert!(refused.code() == "fork_invalid" && refused.to_string().contains("the time of its chain"), "{refused}");
    for run in [plain, reset] {
        client.terminate(run, "seen").await.expect("ended");
    }
    assert_eq!(terms(&bench, reset).await.2, Some(TERMS), "whatever writes the state keeps its number");
    // Held back, and bounded since a moment ago.
    assert_eq!(bench.closed(again).await.failure.expect("a failure").code, "timeout.run_total");
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

/// Waits until somebody waits for what this session has locked.
async fn is_waited_for(pool: &PgPool, session: &mut PgConnection) {
    let pid: i32 = sqlx::query_scalar("select pg_backend_pid()").fetch_one(session).await.expect("pid");
    let waits = async {
        let sql = "select exists (select from pg_stat_activity where $1 = any(pg_blocking_pids(pid)))";
        while !sqlx::query_scalar::<_, bool>(sql).bind(pid).fetch_one(pool).await.expect("asked") {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, waits).await.expect("somebody waits");
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
