//! Postgres is away in the middle of an attempt: what was bought outside is stored once, the attempt goes on, and nothing is
//! bought again.

use crate::{
    bench::{Bench, Gate, PATIENCE, Work, definition, e, work},
    faults::{GRACE, LONG, SHORT, reaches},
    way::{Lost, Way},
};
use futures_util::future::BoxFuture;
use loopwright_engine::{
    Failure,
    activity::{Context, Registry},
    definition::Data,
    embedded::testing::url,
    ids::RunId,
    view::RunStatus,
    worker::{self, WorkerConfig, WorkerHandle},
};
use serde_json::{Value, json};
use sqlx::{Connection, PgConnection};
use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

/// Connections that are turned away before Postgres is back: more than the six tries of a statement, seconds of pauses.
const TURNED_AWAY: u32 = 24;

/// How an attempt stores the answer of its call.
#[derive(Clone, Copy)]
enum Stores {
    Save,
    Close,
}

impl Stores {
    /// What its transaction says, and no other one.
    fn word(self) -> &'static str {
        match self {
            Self::Save => "insert into checkpoints",
            Self::Close => "insert into test_readings",
        }
    }
}

/// A worker on the way to the database whose only activity makes one call outside, breaks the way, and stores the answer.
async fn worker(
    bench: &Bench,
    way: &Arc<Way>,
    stores: Stores,
    lease: Duration,
    breaks: impl Fn(&Way) + Send + Sync + 'static,
) -> (WorkerHandle, Arc<AtomicU32>) {
    let calls = Arc::new(AtomicU32::new(0));
    let (way, made, breaks) = (way.clone(), calls.clone(), Arc::new(breaks));
    let pool = way.pool_that_says_all(4).await;
    let script = move |ctx: Context, _: Value| {
        let (way, made, breaks) = (way.clone(), made.clone(), breaks.clone());
        Box::pin(async move {
            let value = calls_once(&ctx, &made, stores, || breaks(&way)).await?;
            // Whoever goes on has the same to say.
            assert_eq!(ctx.checkpoint("answer").await?, Some(value.clone()));
            Ok(value)
        }) as BoxFuture<'static, Result<Value, Failure>>
    };
    let mut config = WorkerConfig::new(pool, Registry::new().with(Work(Arc::new(script))));
    (config.hook, config.lease, config.slots) = (bench.hook.clone(), lease, 4);
    (worker::start(config).await.expect("worker"), calls)
}

async fn calls_once(ctx: &Context, made: &AtomicU32, stores: Stores, breaks: impl Fn()) -> Result<Value, Failure> {
    if let Some(found) = ctx.checkpoint("answer").await? {
        return Ok(found);
    }
    ctx.meter_open("call", &Value::Null).await?;
    let value = json!({ "call": made.fetch_add(1, Ordering::SeqCst) + 1, "attempt": ctx.info().attempt });
    breaks();
    match stores {
        Stores::Save => ctx.save("answer", &value).await?,
        Stores::Close => ctx.meter_close("call", &Value::Null, Some(("answer", &value))).await?,
    }
    Ok(value)
}

/// The run ends with its first attempt, one call and one stored answer.
async fn bought_once(bench: &Bench, run: RunId, calls: &AtomicU32) {
    assert_eq!(bench.closed(run).await.status, RunStatus::Completed);
    assert_eq!(calls.load(Ordering::SeqCst), 1, "the outside was called once");
    let stored: Vec<Value> =
        sqlx::query_scalar("select value from checkpoints").fetch_all(&bench.pool).await.expect("values");
    assert_eq!(stored, [json!({"call": 1, "attempt": 1})]);
}

async fn goes_on(stores: Stores, breaks: impl Fn(&Way) + Send + Sync + 'static, seconds: bool) {
    let bench = Bench::new().await;
    let way = Arc::new(Way::to(&bench.pool).await);
    let (worker, calls) = worker(&bench, &way, stores, LONG, breaks).await;
    let run = bench.start(definition("bought", vec![work("a", &[])]), json!({})).await;
    if seconds {
        turned_away(&way).await;
        way.back();
    }
    bought_once(&bench, run, &calls).await;
    assert!(seconds || way.has_broken());
    worker.drain(GRACE).await;
    let outcomes = bench.outcomes().await;
    assert_eq!(outcomes.into_iter().collect::<Vec<_>>(), [("Succeeded".to_owned(), 1)], "the attempt went on");
    bench.audit().await;
}

async fn turned_away(way: &Way) {
    let all = async {
        while way.turned_away() < TURNED_AWAY {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, all).await.expect("it tries again");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_is_stored_once_although_the_connection_is_lost_before_the_commit() {
    for stores in [Stores::Save, Stores::Close] {
        goes_on(stores, move |way| way.breaks_after(stores.word(), Lost::Commit, false), false).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_is_stored_once_although_that_of_its_commit_is_lost() {
    for stores in [Stores::Save, Stores::Close] {
        goes_on(stores, move |way| way.breaks_after(stores.word(), Lost::Answer, false), false).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_attempt_waits_while_postgres_is_away() {
    for stores in [Stores::Save, Stores::Close] {
        goes_on(stores, Way::away, true).await;
        for lost in [Lost::Commit, Lost::Answer] {
            goes_on(stores, move |way| way.breaks_after(stores.word(), lost, true), true).await;
        }
    }
}

/// Away for longer than the lease: the attempt is lost, and what it bought is not.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_bought_is_stored_although_the_lease_ended_meanwhile() {
    let bench = Bench::new().await;
    let way = Arc::new(Way::to(&bench.pool).await);
    let (gone, calls) = worker(&bench, &way, Stores::Close, SHORT, Way::away).await;
    let run = bench.start(definition("bought", vec![work("a", &[])]), json!({})).await;
    tokio::time::timeout(PATIENCE, gone.fenced()).await.expect("it stops by itself");
    assert_eq!(calls.load(Ordering::SeqCst), 1);
    let back = async {
        turned_away(&way).await;
        way.back();
    };
    // As the program does: a worker that lost its lease leaves at once, and stores first.
    tokio::join!(gone.drain(Duration::ZERO), back);
    reaches(&bench.pool, "select count(*) from checkpoints", 1).await;
    let (heir, again) = worker(&bench, &way, Stores::Close, LONG, |_| {}).await;
    bought_once(&bench, run, &calls).await;
    assert_eq!(again.load(Ordering::SeqCst), 0);
    heir.drain(GRACE).await;
    let outcomes = bench.outcomes().await;
    assert_eq!((outcomes.get("Lost"), outcomes.get("Succeeded")), (Some(&1), Some(&1)), "{outcomes:?}");
    bench.audit().await;
}

/// An attempt whose time is over while it stores: the next one begins under the same epoch and may have asked already.
#[tokio::test(flavor = "multi_thread")]
async fn an_attempt_that_has_ended_stores_its_reading_and_nothing_else() {
    let bench = Bench::new().await;
    let gate = Gate::new();
    {
        let gate = gate.clone();
        bench.script(move |ctx, _| {
            let gate = gate.clone();
            async move {
                if ctx.info().attempt == 1 {
                    gate.pass().await;
                    ctx.meter_close("call", &Value::Null, Some(("answer", &json!(1)))).await?;
                }
                Ok(ctx.checkpoint("answer").await?.unwrap_or(json!("bought again")))
            }
        });
    }
    let mut step = work("a", &[]);
    step.timeouts.run_ms = 3_000;
    let mut definition = definition("late", vec![step]);
    definition.outputs.insert("a".into(), Data::Expr(e("steps.a.output")));
    let worker = bench.worker_with(LONG, 4).await;
    let run = bench.start(definition, json!({})).await;
    gate.arrived(1).await;
    let mut held = PgConnection::connect(&url(&bench.pool)).await.expect("session");
    sqlx::raw_sql("begin; select from runs for update").execute(&mut held).await.expect("locked");
    gate.open(1);
    // The fence of the reading, and then the end of its attempt.
    let waiting =
        "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'";
    reaches(&bench.pool, waiting, 2).await;
    held.close().await.expect("free");
    let view = bench.closed(run).await;
    assert_eq!(view.output, Some(json!({"a": "bought again"})));
    worker.drain(GRACE).await;
    let readings: Vec<bool> =
        sqlx::query_scalar("select current from test_readings").fetch_all(&bench.pool).await.expect("readings");
    assert_eq!(readings, [false], "it is a fact, and nobody pays for it");
    bench.audit().await;
}
