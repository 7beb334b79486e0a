//! Workers whose clocks are off by an hour: the database's time is the truth.

use crate::{
    bench::{Bench, definition, e, step, work},
    faults::{DATABASE, LONG},
};
use loopwright_engine::{
    Failure,
    definition::{Await, Data, Definition, Kind, OnTimeout, Timeouts, WaitUntil},
    embedded::testing::url,
    testing::CLOCK_SKEW,
    view::RunStatus,
};
use serde_json::{Value, json};
use std::process::{Child, Command, Stdio};

/// An hour, in ms.
const HOUR: i64 = 3_600_000;
/// Runs that are shared between the workers.
const RUNS: usize = 12;
/// How late a worker may be on a busy machine: far from an hour.
const LATE_S: f64 = 30.0;

/// A worker with the clock that its environment says.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "started by the other test of this file in a process of its own"]
async fn child_worker() {
    let Ok(database) = std::env::var(DATABASE) else { return };
    let bench = Bench::over(sqlx::PgPool::connect(&database).await.expect("database"));
    bench.script(|ctx, _| async move {
        // What an attempt is told of the time is right as well. The machine's own clock is: only the engine's is not.
        let off = (ctx.info().started_at - chrono::Utc::now()).num_seconds().abs();
        if off > 30 {
            return Err(Failure::permanent("test.clock", format!("it is told that it started {off} s from now")));
        }
        if ctx.info().counted == 1 {
            Err(Failure::retryable("transient.again", "the first time"))
        } else {
            Ok(json!(1))
        }
    });
    bench.worker_with(LONG, 2).await.fenced().await;
}

struct Worker(Child);

impl Drop for Worker {
    fn drop(&mut self) {
        // Our own child; one that has ended needs no end.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn child(bench: &Bench, skew_ms: i64) -> Worker {
    let child = Command::new(std::env::current_exe().expect("this binary"))
        .args(["skew::child_worker", "--exact", "--ignored", "--nocapture"])
        .env(DATABASE, url(&bench.pool))
        .env(CLOCK_SKEW, skew_ms.to_string())
        .env_remove("LOOPWRIGHT_CRASH_POINT")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    Worker(child.expect("child"))
}

/// A timer, a retry with its delay, a question that nobody answers, a total time-out that is long enough.
fn timed() -> Definition {
    let silence = Await {
        signal: "go".into(),
        timeout_ms: 3_000,
        form: None,
        show: None,
        to: vec![],
        filter: None,
        remind_ms: vec![],
        on_timeout: OnTimeout::Default,
        default: Some(Data::Literal(json!("nobody"))),
        approval: None,
        reply: None,
    };
    let mut again = work("again", &[]);
    again.retry.delay_ms = 3_000;
    again.timeouts = Timeouts { total_ms: Some(120_000), ..Timeouts::default() };
    let mut timed = definition(
        "timed",
        vec![
            step("nap", Kind::Wait { until: WaitUntil::For(3_000) }),
            again,
            step("silence", Kind::Await(Box::new(silence))),
        ],
    );
    timed.outputs.insert("said".into(), Data::Expr(e("steps.silence.output")));
    timed
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_whose_clocks_are_an_hour_off_keep_the_database_s_time() {
    let bench = Bench::new().await;
    let hash = bench.deploy(timed()).await;
    let workers = [child(&bench, HOUR), child(&bench, -HOUR)];
    let mut runs = Vec::new();
    for _ in 0..RUNS {
        runs.push(bench.start_as(hash, json!({}), None).await.run_id);
    }
    for run in &runs {
        let view = bench.closed(*run).await;
        assert_eq!(
            (view.status, view.output),
            (RunStatus::Completed, Some(json!({"said": "nobody"}))),
            "{:?}",
            view.failure
        );
    }
    drop(workers);
    bench.audit().await;

    // What the events say is what the rows' time says, which Postgres wrote.
    let off: f64 = sqlx::query_scalar(
        "select max(abs(extract(epoch from (e->>'at')::timestamptz - h.at)))::float8
         from history h, jsonb_array_elements(h.events) e where e ? 'at' and e->>'type' <> 'signal_received'",
    )
    .fetch_one(&bench.pool)
    .await
    .expect("instants");
    assert!(off < LATE_S, "an event is {off} s beside its row");
    // Each timer took its time, by the rows, and not an hour more.
    for path in ["nap", "again", "silence"] {
        let (shortest, longest): (f64, f64) = sqlx::query_as(
            "select min(d)::float8, max(d)::float8 from (
               select extract(epoch from max(h.at) filter (where e->>'type' = 'step_ended') - min(h.at) filter (where e->>'type' = 'step_started')) d
               from history h, jsonb_array_elements(h.events) e where e->>'path' = $1 group by h.run_id) t",
        )
        .bind(path)
        .fetch_one(&bench.pool)
        .await
        .expect("times");
        // Of three seconds: what is decided is written a little later, on a busy machine two seconds. An hour ahead would be none.
        assert!(shortest > 0.5 && longest < 3.0 + LATE_S, "{path}: {shortest} s to {longest} s");
    }
    let owners: i64 = sqlx::query_scalar("select count(*) from workers").fetch_one(&bench.pool).await.expect("workers");
    assert_eq!(owners, 2, "neither took the other for dead");
    let failed: Vec<Value> = sqlx::query_scalar("select failure from runs where failure is not null")
        .fetch_all(&bench.pool)
        .await
        .expect("runs");
    assert_eq!(failed, Vec::<Value>::new());
}
