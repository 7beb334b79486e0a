//! Answers that are lost and faults that pass, on a real Postgres: every run goes on.

use crate::{
    bench::{Bench, PATIENCE, Work, definition, step, work},
    faults::{GRACE, LONG, reaches},
    way::{Lost, Way},
};
use futures_util::future::BoxFuture;
use loopwright_engine::{
    Failure,
    activity::{Activity, Context, Registry},
    admission::Admission,
    client::{Client, Signal, Start},
    definition::Kind,
    schedule::{ActionState, Overlap, Spec, When, door::NewSchedule},
    signature::Signature,
    view::RunStatus,
    worker::{self, WorkerConfig},
};
use serde_json::{Value, json};
use sqlx::PgPool;
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

/// `test_fail()` fails with `code` until table `test_fault` is empty. Sequence `test_failed` counts, because no rollback takes its
/// numbers back.
pub async fn fails(pool: &PgPool, code: &str) {
    for sql in [
        "create table test_fault (code text)",
        "create sequence test_failed",
        "create function test_fail() returns bool language plpgsql volatile as $$ declare c text; begin
           select code into c from test_fault;
           if found then perform nextval('test_failed'); raise exception 'a fault of this test' using errcode = c; end if;
           return true; end $$",
    ] {
        sqlx::query(sql).execute(pool).await.expect("fault");
    }
    sqlx::query("insert into test_fault values ($1)").bind(code).execute(pool).await.expect("fault");
}

/// From now on nobody can read a definition: the statement [`fails`].
pub async fn no_definitions(pool: &PgPool, code: &str) {
    fails(pool, code).await;
    for sql in [
        "alter table definitions rename to definitions_real",
        "create view definitions as select * from definitions_real where test_fail()",
    ] {
        sqlx::query(sql).execute(pool).await.expect("fault");
    }
}

pub async fn fault_passes(pool: &PgPool) {
    sqlx::query("delete from test_fault").execute(pool).await.expect("passed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_that_is_cleared_quarantines_nothing() {
    let bench = Bench::new().await;
    let run = bench.start(definition("passing", vec![work("a", &[])]), json!({})).await;
    no_definitions(&bench.pool, "53100").await;
    let worker = bench.worker_with(LONG, 4).await;
    // Given back and claimed again.
    reaches(&bench.pool, "select case when is_called then last_value else 0 end from test_failed", 2).await;
    fault_passes(&bench.pool).await;
    assert_eq!(bench.closed(run).await.status, RunStatus::Completed);
    worker.drain(GRACE).await;
    bench.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_cannot_be_quarantined_is_given_back() {
    let bench = Bench::new().await;
    let run = bench.start(definition("poison", vec![work("a", &[])]), json!({})).await;
    no_definitions(&bench.pool, "P0001").await;
    for sql in [
        "create sequence test_refused",
        "create function test_refuse() returns trigger language plpgsql as $$ begin
           perform nextval('test_refused'); raise exception 'no quarantine'; end $$",
        "create trigger test_refuse before update on runs for each row when (new.status = 'quarantined') execute function test_refuse()",
    ] {
        sqlx::query(sql).execute(&bench.pool).await.expect("fault");
    }
    let worker = bench.worker_with(LONG, 4).await;
    reaches(&bench.pool, "select case when is_called then last_value else 0 end from test_refused", 2).await;
    fault_passes(&bench.pool).await;
    assert_eq!(bench.closed(run).await.status, RunStatus::Completed);
    worker.drain(GRACE).await;
    bench.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_claim_whose_answer_was_lost_is_found_by_its_owner() {
    let bench = Bench::new().await;
    let run = bench.start(definition("claimed", vec![work("a", &[])]), json!({})).await;
    sqlx::query("delete from ready").execute(&bench.pool).await.expect("hidden");
    let worker = bench.worker_with(LONG, 4).await;
    // What such a claim leaves behind.
    sqlx::query("update runs set owner = $1, epoch = epoch + 1, parked = false where run_id = $2")
        .bind(worker.id().0)
        .bind(run.0)
        .execute(&bench.pool)
        .await
        .expect("claimed");
    assert_eq!(bench.closed(run).await.status, RunStatus::Completed);
    assert_eq!(bench.outcomes().await.into_iter().collect::<Vec<_>>(), [("Succeeded".to_owned(), 1)]);
    worker.drain(GRACE).await;
    bench.audit().await;
}

/// `work@1` whose estimate, which the driver asks for, panics at the first time.
struct Panics(AtomicBool);

impl Activity for Panics {
    fn signature(&self) -> Signature {
        Work(Arc::new(|_, input| Box::pin(async move { Ok(input) }))).signature()
    }
    fn run(&self, _ctx: Context, input: Value) -> BoxFuture<'static, Result<Value, Failure>> {
        Box::pin(async move { Ok(input) })
    }
    fn reserve(&self, _input: &Value, _extras: &Value) -> Value {
        assert!(self.0.swap(true, Ordering::SeqCst), "the first estimate, as this test wants it");
        Value::Null
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_whose_driver_panicked_is_found_by_its_owner() {
    let bench = Bench::new().await;
    let mut config = WorkerConfig::new(bench.pool.clone(), Registry::new().with(Panics(AtomicBool::new(false))));
    (config.hook, config.lease) = (bench.hook.clone(), LONG);
    let worker = worker::start(config).await.expect("worker");
    let run = bench.start(definition("panics", vec![work("a", &[])]), json!({})).await;
    assert_eq!(bench.closed(run).await.status, RunStatus::Completed);
    worker.drain(GRACE).await;
    bench.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_vanishes_in_the_middle_of_a_claim_keeps_nobody_from_taking_over() {
    let bench = Bench::new().await;
    let way = Way::to(&bench.pool).await;
    let died = way.dies_at("for key share");
    let mut config = WorkerConfig::new(
        way.pool(4).await,
        Registry::new().with(Work(Arc::new(|_, input| Box::pin(async { Ok(input) })))),
    );
    (config.hook, config.lease) = (bench.hook.clone(), Duration::from_secs(4));
    let _gone = worker::start(config).await.expect("worker");
    let run = bench.start(definition("left", vec![work("a", &[])]), json!({})).await;
    tokio::time::timeout(PATIENCE, died.cancelled()).await.expect("it came to a claim");
    let there = bench.worker().await;
    // It holds the lock on its own row until Postgres ends its session; then it is declared dead.
    reaches(&bench.pool, "select count(*) from dead_workers", 1).await;
    assert_eq!(bench.closed(run).await.status, RunStatus::Completed);
    there.drain(GRACE).await;
    bench.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_termination_whose_answer_was_lost_is_done() {
    let bench = Bench::new().await;
    let gate = bench.gate();
    let worker = bench.worker_with(LONG, 4).await;
    let run = bench.start(definition("ended", vec![work("a", &[])]), json!({})).await;
    gate.arrived(1).await;
    let way = Way::to(&bench.pool).await;
    let client = Client::new(way.pool(2).await, bench.hook.clone());
    way.breaks(Lost::Answer);
    client.terminate(run, "over").await.expect("terminated");
    assert!(way.has_broken(), "an answer was lost");
    assert_eq!(bench.closed(run).await.status, RunStatus::Terminated);
    gate.open(1);
    worker.drain(GRACE).await;
    bench.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_asked_once_is_done_once_although_a_commit_or_its_answer_is_lost() {
    let bench = Bench::new().await;
    let waits = Kind::Await(Box::new(crate::bench::waits_for("go")));
    let hash = bench.deploy(definition("asked", vec![step("w", waits)])).await;
    let count =
        async |sql: &'static str| -> i64 { sqlx::query_scalar(sql).fetch_one(&bench.pool).await.expect("count") };
    for (n, lost) in [(1, Lost::Answer), (2, Lost::Commit)] {
        let way = Way::to(&bench.pool).await;
        let client = Client::new(way.pool(2).await, bench.hook.clone());
        let start = Start {
            run_id: None,
            definition: hash,
            inputs: json!({}),
            workflow_id: None,
            attributes: json!({}),
            queue: String::new(),
            topic: None,
            admission: Admission::default(),
        };
        way.breaks(lost);
        let started = client.start(start).await.expect("start");
        assert!(started.created && way.has_broken());
        assert_eq!(count("select count(*) from runs where attributes = '{}'").await, n);

        way.breaks(lost);
        let signal = Signal { name: "go".into(), ..Signal::default() };
        assert!(client.signal(started.run_id, signal).await.expect("signal") && way.has_broken());
        assert_eq!(count("select count(*) from inbox where kind = 'signal'").await, n);

        let spec =
            Spec { overlap: Overlap::AllowAll, ..Spec::new("asked", When::Every { ms: 86_400_000, offset_ms: 0 }) };
        let new = NewSchedule { name: format!("s{n}"), spec, paused: true, note: None, owner: None };
        way.breaks(lost);
        client.schedules().create(new).await.expect("create");
        way.breaks(lost);
        let action = client.schedules().trigger(&format!("s{n}"), None).await.expect("trigger");
        assert_eq!((action.state, way.has_broken()), (ActionState::Started, true));
        assert_eq!(count("select count(*) from runs where attributes ? 'schedule'").await, n);
    }
}
