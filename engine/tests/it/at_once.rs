//! Readings that a hook records in one statement with the engine's fence and the checkpoint, and what is left to a transaction.

use crate::bench::{Accounts, Bench, definition, work};
use futures_util::future::BoxFuture;
use loopwright_engine::{
    Failure,
    activity::{Context, Registry},
    hook::{AtOnce, AttemptRef, HookError, Phase, Reading, Refusal, Transition, TransitionHook, Verdict},
    view::RunStatus,
    worker::{self, WorkerConfig},
};
use serde_json::{Value, json};
use sqlx::{Arguments, PgConnection, postgres::PgArguments};
use std::{sync::Arc, time::Duration};

/// [`Accounts`] whose ordinary readings are those of an attempt that has no end yet and whose key does not say otherwise.
struct Quick(Arc<Accounts>);

const FUNCTION: &str =
    "create function test_reading(in_attempt uuid, in_key text, in_phase text) returns boolean language plpgsql as $$
begin
  if in_key like 'odd%' or exists (select from test_ends e where e.attempt_id = in_attempt) then return false; end if;
  insert into test_readings values (in_attempt, in_key, in_phase || ' at once', true);
  return true;
end $$";

impl TransitionHook for Quick {
    fn apply<'a>(
        &'a self,
        conn: &'a mut PgConnection,
        transitions: &'a [Transition],
    ) -> BoxFuture<'a, Result<Vec<Refusal>, HookError>> {
        self.0.apply(conn, transitions)
    }
    fn meter<'a>(
        &'a self,
        conn: &'a mut PgConnection,
        attempt: &'a AttemptRef,
        reading: Reading<'a>,
    ) -> BoxFuture<'a, Result<Verdict, HookError>> {
        self.0.meter(conn, attempt, reading)
    }
    fn at_once(&self, attempt: &AttemptRef, reading: &Reading<'_>) -> Option<AtOnce> {
        assert_ne!(reading.phase, Phase::Note);
        let mut arguments = PgArguments::default();
        arguments.add(attempt.attempt_id.0).expect("uuid");
        arguments.add(reading.key).expect("text");
        arguments.add(format!("{:?}", reading.phase)).expect("text");
        Some(AtOnce { sql: "test_reading($1, $2, $3)", arguments })
    }
}

/// What one attempt of `script` leaves in `test_readings`.
async fn readings<F, Fut>(bench: &Bench, script: F) -> Vec<(String, String, bool)>
where
    F: Fn(Context, Value) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<Value, Failure>> + Send + 'static,
{
    sqlx::query(FUNCTION).execute(&bench.pool).await.expect("function");
    let script = move |ctx, input| Box::pin(script(ctx, input)) as BoxFuture<'static, _>;
    let registry = Registry::new().with(crate::bench::Work(Arc::new(script)));
    let mut config = WorkerConfig::new(bench.pool.clone(), registry);
    config.hook = Arc::new(Quick(bench.hook.clone()));
    let worker = worker::start(config).await.expect("worker");
    let run = bench.start(definition("quick", vec![work("w", &[])]), json!({})).await;
    assert_eq!(bench.closed(run).await.status, RunStatus::Completed);
    worker.drain(Duration::from_secs(10)).await;
    bench.audit().await;
    sqlx::query_as("select key, phase, current from test_readings order by ctid")
        .fetch_all(&bench.pool)
        .await
        .expect("rows")
}

fn row(key: &str, phase: &str, current: bool) -> (String, String, bool) {
    (key.to_owned(), phase.to_owned(), current)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_ordinary_reading_is_one_statement_with_its_checkpoint() {
    let bench = Bench::new().await;
    let seen = readings(&bench, |ctx, _| async move {
        assert_eq!(ctx.checkpoint("answer").await?, None);
        ctx.meter_open("a", &Value::Null).await?;
        ctx.meter_note("a", &Value::Null).await?;
        ctx.meter_close("a", &Value::Null, Some(("answer", &json!({"n": 1})))).await?;
        // The first value stays.
        ctx.save("answer", &json!(2)).await?;
        assert_eq!(ctx.checkpoint("answer").await?, Some(json!({"n": 1})));
        assert_eq!(ctx.checkpoint("never").await?, None);
        // What has to lie apart, and what the hook does not take for ordinary, is decided in a transaction.
        let large = json!("x".repeat(200_000));
        ctx.meter_open("large", &Value::Null).await?;
        ctx.meter_close("large", &Value::Null, Some(("large", &large))).await?;
        assert_eq!(ctx.checkpoint("large").await?, Some(large));
        ctx.meter_open("odd", &Value::Null).await?;
        ctx.meter_close("odd", &Value::Null, Some(("odd", &json!(3)))).await?;
        assert_eq!(ctx.checkpoint("odd").await?, Some(json!(3)));
        Ok(Value::Null)
    })
    .await;
    assert_eq!(
        seen,
        [
            row("a", "Open at once", true),
            row("a", "Note", true),
            row("a", "Close at once", true),
            row("large", "Open at once", true),
            row("large", "Close", true),
            row("odd", "Open", true),
            row("odd", "Close", true),
        ]
    );
}

/// Somebody else owns the run: the statement writes nothing, and the transaction keeps the fact alone.
#[tokio::test(flavor = "multi_thread")]
async fn behind_the_fence_a_statement_writes_nothing() {
    let bench = Bench::new().await;
    let pool = bench.pool.clone();
    let seen = readings(&bench, move |ctx, _| {
        let pool = pool.clone();
        async move {
            if ctx.info().attempt > 1 {
                assert_eq!(ctx.checkpoint("late").await?, None);
                return Ok(Value::Null);
            }
            ctx.meter_open("late", &Value::Null).await?;
            let sql = "with u as (update runs set owner = null, epoch = epoch + 1, parked = true where run_id = $1 returning shard, run_id, queue)
                       insert into ready (shard, run_id, queue) select shard, run_id, queue from u on conflict do nothing";
            let run = ctx.info().run_id.0;
            sqlx::query(sql).bind(run).execute(&pool).await.expect("taken away");
            let closed = ctx.meter_close("late", &Value::Null, Some(("late", &json!(1)))).await;
            assert_eq!(closed.expect_err("stale").code, "transient.lease_lost");
            let opened = ctx.meter_open("later", &Value::Null).await;
            assert_eq!(opened.expect_err("stale").code, "transient.lease_lost");
            Ok(json!("stale"))
        }
    })
    .await;
    assert_eq!(seen, [row("late", "Open at once", true), row("late", "Close", false)]);
}
