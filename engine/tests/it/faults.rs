//! Processes that die, freeze and come back, on a real Postgres.

use crate::bench::{Bench, Gate, PATIENCE, definition, e, step, work};
use chrono::{DateTime, Utc};
use loopwright_engine::{
    Failure,
    activity::Context,
    definition::{Data, Definition, Kind, OnItemFailure},
    embedded::testing::url,
    ids::RunId,
    view::RunStatus,
};
use serde_json::{Value, json};
use sqlx::PgPool;
use std::{
    collections::BTreeMap,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

pub const GRACE: Duration = Duration::from_secs(10);
/// Lease of the workers that are to lose it.
pub const SHORT: Duration = Duration::from_secs(1);
/// Lease of the worker that brings everything to its end, however busy the machine is.
pub const LONG: Duration = Duration::from_secs(10);
/// Outside calls of one step.
const CALLS: usize = 3;
/// Tells the child process which database to work on.
pub const DATABASE: &str = "LOOPWRIGHT_TEST_DATABASE";

/// The outside world: it remembers every call, whatever becomes of the caller.
pub async fn outside(pool: &PgPool) {
    sqlx::query("create table test_outside (run_id uuid, path text, key text, call int, attempt int, primary key (run_id, path, call, attempt))")
        .execute(pool)
        .await
        .expect("table");
    sqlx::query("create table test_gate (open bool)").execute(pool).await.expect("table");
}

/// A long activity: calls the outside a few times, each call metered and its answer checkpointed.
pub async fn long_work(pool: PgPool, ctx: Context) -> Result<Value, Failure> {
    let info = ctx.info().clone();
    let attempt = i32::try_from(info.attempt).expect("small");
    for call in 0..CALLS {
        let key = format!("call-{call}");
        if ctx.checkpoint(&key).await?.is_some() {
            continue;
        }
        ctx.meter_open(&key, &Value::Null).await?;
        // A primary key: one attempt that called twice would fail here.
        sqlx::query("insert into test_outside values ($1, $2, $3, $4, $5)")
            .bind(info.run_id.0)
            .bind(&info.path)
            .bind(&info.idempotency_key)
            .bind(i32::try_from(call).expect("small"))
            .bind(attempt)
            .execute(&pool)
            .await
            .map_err(|e| Failure::permanent("test.outside", e.to_string()))?;
        ctx.meter_close(&key, &Value::Null, Some((&key, &json!(attempt)))).await?;
    }
    Ok(json!(attempt))
}

/// Three steps, one of them over three items.
pub fn several(name: &str) -> Definition {
    let each = Kind::Foreach {
        list: e("[1, 2, 3]"),
        key: None,
        max_items: 3,
        concurrency: 2,
        on_item_failure: OnItemFailure::FailFast,
        steps: vec![work("item", &[("n", Data::Expr(e("item")))])],
        outputs: None,
    };
    definition(name, vec![work("first", &[]), step("each", each), work("last", &[])])
}

/// What must hold about the outside when all runs are closed: every call was made, and none after its answer was saved.
async fn audit_outside(pool: &PgPool, steps: usize) {
    let calls: i64 = sqlx::query_scalar("select count(distinct (run_id, path, call)) from test_outside")
        .fetch_one(pool)
        .await
        .expect("count");
    assert_eq!(calls, i64::try_from(steps * CALLS).expect("small"), "every call was made");
    for (what, sql) in [
        (
            "call made again although its answer was saved, or saved by an attempt that did not make it",
            "select count(*) from checkpoints c where (c.value)::int <>
               (select max(attempt) from test_outside o where o.run_id = c.run_id and o.path = c.path and 'call-' || o.call = c.key)",
        ),
        (
            "answer that was not saved",
            "select count(*) from (select distinct run_id, path, call from test_outside) o where not exists
               (select from checkpoints c where c.run_id = o.run_id and c.path = o.path and c.key = 'call-' || o.call)",
        ),
        (
            "idempotency key that is not the step's alone",
            "select count(*) from (select key from test_outside group by key having count(distinct (run_id, path)) > 1) k",
        ),
        (
            "step with several idempotency keys",
            "select count(*) from (select from test_outside group by run_id, path having count(distinct key) > 1) k",
        ),
        (
            "saved answer without its reading",
            "select count(*) from (select distinct run_id, path, call from test_outside) o where
               (select count(*) from test_readings r where r.phase = 'Close' and r.key = 'call-' || o.call) = 0",
        ),
    ] {
        let n: i64 = sqlx::query_scalar(sql).fetch_one(pool).await.expect("audit");
        assert_eq!(n, 0, "{what}");
    }
}

/// Waits until a count reaches a number.
pub async fn reaches(pool: &PgPool, sql: &str, wanted: i64) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let n: i64 = sqlx::query_scalar(sqlx::AssertSqlSafe(sql)).fetch_one(pool).await.expect("count");
        if n >= wanted {
            return;
        }
        assert!(Instant::now() < deadline, "{sql}: {n} of {wanted}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn twenty_deaths_in_the_middle_of_the_work_lose_and_repeat_nothing() {
    const RUNS: usize = 24;
    let bench = Bench::new().await;
    outside(&bench.pool).await;
    let pool = bench.pool.clone();
    bench.script(move |ctx, _| long_work(pool.clone(), ctx));
    let hash = bench.deploy(several("deaths")).await;
    let mut runs = Vec::new();
    for _ in 0..RUNS {
        runs.push(bench.start_as(hash, json!({}), None).await.run_id);
    }
    let mut deaths = 0;
    for _ in 0..20 {
        let worker = bench.worker_with(SHORT, 4).await;
        let made: i64 =
            sqlx::query_scalar("select count(*) from test_outside").fetch_one(&bench.pool).await.expect("n");
        let all = i64::try_from(RUNS * 5 * CALLS).expect("small");
        // Somewhere in the next few calls; at the end of the work there may be none.
        let wanted = (made + fastrand::i64(1..=14)).min(all - 20);
        if made < wanted {
            tokio::select! {
                () = reaches(&bench.pool, "select count(*) from test_outside", wanted) => deaths += 1,
                // On a machine that is too busy it loses its lease by itself: a death as well, at a place nobody chose.
                () = worker.fenced() => deaths += 1,
            }
        }
        worker.crash();
    }
    assert!(deaths >= 10, "only {deaths} workers died while there was work");
    let last = bench.worker_with(LONG, 32).await;
    for run in &runs {
        assert_eq!(bench.closed(*run).await.status, RunStatus::Completed);
    }
    last.drain(GRACE).await;
    bench.audit().await;
    audit_outside(&bench.pool, RUNS * 5).await;
    let outcomes = bench.outcomes().await;
    assert_eq!(outcomes["Succeeded"], i64::try_from(RUNS * 5).expect("small"));
    assert!(outcomes["Lost"] > 0, "{outcomes:?}");
}

/// The process that other tests let die or freeze: a worker, nothing else.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "started by the other tests of this file in a process of its own"]
async fn child_worker() {
    let Ok(database) = std::env::var(DATABASE) else { return };
    let pool = PgPool::connect(&database).await.expect("database");
    let bench = Bench::over(pool.clone());
    bench.script(move |ctx, input| {
        let pool = pool.clone();
        async move {
            if input.get("gate").is_some() && ctx.info().attempt == 1 {
                long_work(pool.clone(), ctx).await?;
                reaches(&pool, "select count(*) from test_gate", 1).await;
                return Ok(json!("zombie"));
            }
            long_work(pool, ctx).await
        }
    });
    let worker = bench.worker_with(SHORT, 4).await;
    worker.fenced().await;
}

fn child(bench: &Bench) -> Child {
    Command::new(std::env::current_exe().expect("this binary"))
        .args(["faults::child_worker", "--exact", "--ignored", "--nocapture"])
        .env(DATABASE, url(&bench.pool))
        .env_remove("LOOPWRIGHT_CRASH_POINT")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("child")
}

/// Waits for the end of a child; its exit code, `None` if a signal ended it.
pub async fn ended(mut child: Child) -> Option<i32> {
    tokio::task::spawn_blocking(move || {
        let deadline = Instant::now() + PATIENCE * 2;
        while Instant::now() < deadline {
            if let Some(status) = child.try_wait().expect("child") {
                return status.code();
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        child.kill().expect("child");
        child.wait().expect("child");
        panic!("the child did not end");
    })
    .await
    .expect("joined")
}

fn signal(child: &Child, name: &str) {
    let status = Command::new("kill").args([name, &child.id().to_string()]).status().expect("kill");
    assert!(status.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_worker_is_taken_over_within_its_lease_and_a_bit_and_its_result_never_happened() {
    let bench = Bench::new().await;
    outside(&bench.pool).await;
    let pool = bench.pool.clone();
    bench.script(move |ctx, _| long_work(pool.clone(), ctx));
    let zombie = child(&bench);
    let gate = [("gate", Data::Literal(json!(true)))];
    let run = bench.start(definition("freeze", vec![work("a", &gate)]), json!({})).await;
    reaches(&bench.pool, "select count(*) from checkpoints", 3).await;
    signal(&zombie, "-STOP");
    let frozen = Instant::now();
    let heir = bench.worker_with(6 * LONG, 4).await;
    let view = bench.closed(run).await;
    let took = frozen.elapsed();
    // The frozen one's lease counts, not the heir's.
    assert!(took < 3 * LONG, "taken over after {took:?}");
    assert_eq!((view.status, view.seq), (RunStatus::Completed, 3));
    // Now the first attempt may end, in a process that knows nothing of all this.
    sqlx::query("insert into test_gate values (true)").execute(&bench.pool).await.expect("open");
    signal(&zombie, "-CONT");
    assert_eq!(ended(zombie).await, Some(0), "it learns that it is dead, and leaves");
    heir.drain(GRACE).await;
    assert_eq!(bench.client.describe(run).await.expect("run").seq, 3);
    assert_eq!(bench.outcomes().await, BTreeMap::from([("Lost".into(), 1), ("Succeeded".into(), 1)]));
    let calls: i64 = sqlx::query_scalar("select count(*) from test_outside").fetch_one(&bench.pool).await.expect("n");
    assert_eq!(calls, 3, "checkpointed calls are not made again");
    bench.audit().await;
}

/// A takeover as the store does it, while the owner is well and knows nothing.
async fn take(bench: &Bench, run: RunId) {
    sqlx::query(
        "with u as (update runs set owner = null, epoch = epoch + 1, parked = true where run_id = $1 returning shard, run_id, queue)
         insert into ready (shard, run_id, queue) select * from u",
    )
    .bind(run.0)
    .execute(&bench.pool)
    .await
    .expect("taken");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_epoch_fences_results_and_checkpoints_but_not_readings() {
    let bench = Bench::new().await;
    let gate = Gate::new();
    {
        let gate = gate.clone();
        bench.script(move |ctx, _| {
            let gate = gate.clone();
            async move {
                if ctx.info().attempt == 1 {
                    gate.pass().await;
                    let closed = ctx.meter_close("late", &Value::Null, Some(("late", &json!(1)))).await;
                    assert_eq!(closed.expect_err("stale").code, "transient.lease_lost");
                    let saved = ctx.save("other", &json!(1)).await;
                    assert_eq!(saved.expect_err("stale").code, "transient.lease_lost");
                    let opened = ctx.meter_open("next", &Value::Null).await;
                    assert_eq!(opened.expect_err("stale").code, "transient.lease_lost");
                    gate.pass().await;
                    return Ok(json!("stale"));
                }
                Ok(json!("fresh"))
            }
        });
    }
    let mut d = definition("fence", vec![work("a", &[])]);
    d.outputs.insert("a".into(), Data::Expr(e("steps.a.output")));
    let worker = bench.worker_with(LONG, 4).await;
    let run = bench.start(d, json!({})).await;
    gate.arrived(1).await;
    take(&bench, run).await;
    gate.open(1);
    gate.arrived(1).await;
    gate.open(1);
    let view = bench.closed(run).await;
    assert_eq!(view.output, Some(json!({"a": "fresh"})));
    worker.drain(GRACE).await;
    let counts: (i64, i64, i64) = sqlx::query_as(
        "select (select count(*) from checkpoints), (select count(*) from test_readings), (select count(*) from test_readings where not current)",
    )
    .fetch_one(&bench.pool)
    .await
    .expect("counts");
    assert_eq!(counts, (0, 1, 1), "the reading is a fact and said to be stale, the checkpoint never happened");
    bench.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_workers_share_the_runs() {
    let bench = Bench::new().await;
    let gate = Gate::new();
    {
        let gate = gate.clone();
        bench.script(move |_, _| {
            let gate = gate.clone();
            async move {
                gate.pass().await;
                Ok(json!(1))
            }
        });
    }
    let hash = bench.deploy(definition("share", vec![work("a", &[])])).await;
    let mut runs = Vec::new();
    for _ in 0..40 {
        runs.push(bench.start_as(hash, json!({}), None).await.run_id);
    }
    // The first worker finds everything, and leaves what it has no room for.
    let one = bench.worker_with(LONG, 4).await;
    gate.arrived(4).await;
    let two = bench.worker_with(LONG, 4).await;
    gate.arrived(4).await;
    let owners: i64 =
        sqlx::query_scalar("select count(distinct owner) from runs").fetch_one(&bench.pool).await.expect("count");
    assert_eq!(owners, 2);
    // Both are full, and a run that nobody has claimed yet can be cancelled all the same.
    for _ in 0..80 {
        runs.push(bench.start_as(hash, json!({}), None).await.run_id);
    }
    let last = runs.pop().expect("started");
    bench.client.cancel(last, "no room").await.expect("cancel");
    assert_eq!(bench.closed(last).await.status, RunStatus::Cancelled);
    gate.open(200);
    for run in runs {
        assert_eq!(bench.closed(run).await.status, RunStatus::Completed);
    }
    one.drain(GRACE).await;
    two.drain(GRACE).await;
    bench.audit().await;
}

/// On one thread nothing hides an unfair hand-over of room from run to run.
#[tokio::test]
async fn one_slot_serves_many_runs() {
    let bench = Bench::new().await;
    let worker = bench.worker_with(LONG, 1).await;
    let hash = bench.deploy(several("narrow")).await;
    let mut runs = Vec::new();
    for _ in 0..6 {
        runs.push(bench.start_as(hash, json!({}), None).await.run_id);
    }
    for run in runs {
        assert_eq!(bench.closed(run).await.status, RunStatus::Completed);
    }
    worker.drain(GRACE).await;
    bench.audit().await;
}

/// Waits between attempts that found nobody to ask, in ms, with the number of the attempt before.
async fn waited(bench: &Bench, run: RunId) -> Vec<(u32, i64)> {
    let instant = |e: &Value, key: &str| e[key].as_str().expect("instant").parse::<DateTime<Utc>>().expect("instant");
    let (mut ended, mut waited) = (None, Vec::new());
    for row in bench.client.history(run, 0, 1_000).await.expect("history") {
        for event in &row.events {
            if event["type"] == "attempt_ended" {
                let attempt = u32::try_from(event["attempt"].as_u64().expect("number")).expect("small");
                ended = Some((attempt, instant(event, "at")));
            } else if event["type"] == "retry_scheduled" {
                let (attempt, at) = ended.expect("an attempt has ended");
                waited.push((attempt, (instant(event, "due_at") - at).num_milliseconds()));
            }
        }
    }
    waited
}

/// Its policy has no delay at all. The waits are the history's: whoever takes the run over goes on where they were.
#[tokio::test(flavor = "multi_thread")]
async fn waits_for_somebody_to_ask_grow_and_go_on_growing_when_their_worker_dies() {
    let bench = Bench::new().await;
    let away = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(true));
    let is_away = away.clone();
    bench.script(move |_, _| {
        let away = is_away.load(std::sync::atomic::Ordering::SeqCst);
        async move {
            let nobody = || Failure::retryable("transient.unavailable", "nobody is there").without_counting();
            if away { Err(nobody()) } else { Ok(json!(1)) }
        }
    });
    let mut step = work("a", &[]);
    step.retry.delay_ms = 0;
    let mut worker = bench.worker_with(LONG, 4).await;
    let run = bench.start(definition("nobody", vec![step]), json!({})).await;
    let has_waited = async |times: usize| {
        let deadline = Instant::now() + PATIENCE;
        while waited(&bench, run).await.len() < times {
            assert!(Instant::now() < deadline, "{:?}", waited(&bench, run).await);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    has_waited(4).await;
    bench.dies(worker).await;
    worker = bench.worker_with(LONG, 4).await;
    has_waited(8).await;
    away.store(false, std::sync::atomic::Ordering::SeqCst);
    assert_eq!(bench.closed(run).await.status, RunStatus::Completed);
    let waited = waited(&bench, run).await;
    for (attempt, ms) in &waited {
        let longest = (100_i64 << (attempt - 1).min(20)).min(30_000);
        assert!((100..=longest).contains(ms), "attempt {attempt}: {waited:?}");
    }
    // By chance one of them may be short, and not all of the last ones: the longest are 1.6, 3.2, 6.4 and 12.8 s.
    assert!(waited.iter().skip(4).any(|(_, ms)| *ms > 400), "{waited:?}");
    worker.drain(GRACE).await;
    bench.audit().await;
    assert_eq!(bench.client.replay(run, None).await.expect("replayed").divergence, None);
}
