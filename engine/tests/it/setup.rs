//! Rights, credentials and settings that are not as a worker needs them, on a real Postgres: that speaks against no run.

use crate::{
    bench::{Bench, Gate, PATIENCE, Work, definition, work},
    faults::{GRACE, LONG, reaches},
    passing::{fails, fault_passes, no_definitions},
    way::Way,
};
use futures_util::future::BoxFuture;
use loopwright_engine::{
    activity::Registry,
    hook::{AttemptRef, HookError, Reading, Refusal, Transition, TransitionHook, Verdict},
    transaction::session,
    view::RunStatus,
    worker::{self, WorkerConfig, WorkerHandle},
};
use serde_json::json;
use sqlx::{AssertSqlSafe, PgConnection, PgPool, postgres::PgPoolOptions};
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Instant,
};

/// How often the fault of [`fails`] was met.
const MET: &str = "select case when is_called then last_value else 0 end from test_failed";

async fn worker_on(pool: PgPool, hook: Arc<dyn TransitionHook>, work: Work) -> WorkerHandle {
    let mut config = WorkerConfig::new(pool, Registry::new().with(work));
    (config.hook, config.lease) = (hook, LONG);
    worker::start(config).await.expect("worker")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_right_that_is_missing_leaves_its_runs_for_later() {
    let bench = Bench::new().await;
    let runs = [
        bench.start(definition("one", vec![work("a", &[])]), json!({})).await,
        bench.start(definition("other", vec![work("a", &[])]), json!({})).await,
    ];
    fails(&bench.pool, "42501").await;
    sqlx::raw_sql(
        "create function test_refuse() returns trigger language plpgsql as $$ begin perform test_fail(); return new; end $$;
         create trigger test_refuse before insert on history for each row execute function test_refuse()",
    )
    .execute(&bench.pool)
    .await
    .expect("fault");
    let worker = bench.worker_with(LONG, 4).await;
    // Both together, on a new session, each alone; that is four or five. Then they are given back, and met again.
    reaches(&bench.pool, MET, 8).await;
    fault_passes(&bench.pool).await;
    for run in runs {
        assert_eq!(bench.closed(run).await.status, RunStatus::Completed);
    }
    worker.drain(GRACE).await;
    bench.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_schema_of_another_release_leaves_its_runs_to_others() {
    let bench = Bench::new().await;
    let run = bench.start(definition("newer", vec![work("a", &[])]), json!({})).await;
    no_definitions(&bench.pool, "42703").await;
    let worker = bench.worker_with(LONG, 4).await;
    reaches(&bench.pool, MET, 2).await;
    fault_passes(&bench.pool).await;
    assert_eq!(bench.closed(run).await.status, RunStatus::Completed);
    worker.drain(GRACE).await;
    bench.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_attempt_has_bought_is_kept_when_a_right_comes_back() {
    let bench = Bench::new().await;
    let run = bench.start(definition("buys", vec![work("a", &[])]), json!({})).await;
    fails(&bench.pool, "42501").await;
    sqlx::raw_sql(
        "create function test_refuse() returns trigger language plpgsql as $$ begin perform test_fail(); return new; end $$;
         create trigger test_refuse before insert on checkpoints for each row execute function test_refuse()",
    )
    .execute(&bench.pool)
    .await
    .expect("fault");
    let bought = Arc::new(AtomicU32::new(0));
    let counts = bought.clone();
    let buys = Work(Arc::new(move |context, input| {
        let counts = counts.clone();
        Box::pin(async move {
            counts.fetch_add(1, Ordering::SeqCst);
            context.save("bought", &json!(1)).await?;
            Ok(input)
        })
    }));
    let worker = worker_on(bench.pool.clone(), bench.hook.clone(), buys).await;
    reaches(&bench.pool, MET, 3).await;
    fault_passes(&bench.pool).await;
    assert_eq!(bench.closed(run).await.status, RunStatus::Completed);
    assert_eq!(bought.load(Ordering::SeqCst), 1);
    worker.drain(GRACE).await;
    bench.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_role_that_may_not_log_in_any_more_commits_when_it_may_again() {
    let (bench, gate) = (Bench::new().await, Gate::new());
    let role = format!("{}_worker", bench.pool.connect_options().get_database().expect("database"));
    let says = async |sql: String| {
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(&bench.pool).await.expect("said");
    };
    says(format!("create role {role} superuser login")).await;
    let options = bench.pool.connect_options().as_ref().clone().username(&role);
    let way = Way::to(&PgPoolOptions::new().connect_lazy_with(options)).await;
    let gates = gate.clone();
    let waits = Work(Arc::new(move |_, input| {
        let gate = gates.clone();
        Box::pin(async move {
            gate.pass().await;
            Ok(input)
        })
    }));
    let worker = worker_on(way.pool(4).await, bench.hook.clone(), waits).await;
    let run = bench.start(definition("locked-out", vec![work("w", &[])]), json!({})).await;
    gate.arrived(1).await;
    says(format!("alter role {role} nologin")).await;
    // The committer's; the pool keeps what it has.
    says(format!(
        "select pg_terminate_backend(pid) from pg_stat_activity where usename = '{role}' and query = 'COMMIT'"
    ))
    .await;
    gate.open(1);
    let began = Instant::now();
    // More often than one transition is sent before its run waits for Postgres.
    while way.refused() < 8 {
        assert!(began.elapsed() < PATIENCE, "{} sessions were refused", way.refused());
        tokio::task::yield_now().await;
    }
    says(format!("alter role {role} login")).await;
    assert_eq!(bench.closed(run).await.status, RunStatus::Completed);
    assert_eq!(bench.outcomes().await.into_iter().collect::<Vec<_>>(), [("Succeeded".to_owned(), 1)]);
    worker.drain(GRACE).await;
    bench.audit().await;
}

/// A hook that once says nothing in its transaction until Postgres has ended the session.
struct Silent {
    others: PgPool,
    once: AtomicBool,
}

impl TransitionHook for Silent {
    fn apply<'a>(
        &'a self,
        conn: &'a mut PgConnection,
        _transitions: &'a [Transition],
    ) -> BoxFuture<'a, Result<Vec<Refusal>, HookError>> {
        Box::pin(async move {
            if !self.once.swap(true, Ordering::SeqCst) {
                let pid: i32 = sqlx::query_scalar("select pg_backend_pid()").fetch_one(&mut *conn).await?;
                reaches(&self.others, &format!("select 1 - count(*) from pg_stat_activity where pid = {pid}"), 1).await;
                sqlx::query("select 1").execute(conn).await?;
            }
            Ok(Vec::new())
        })
    }
    fn meter<'a>(
        &'a self,
        _conn: &'a mut PgConnection,
        _attempt: &'a AttemptRef,
        _reading: Reading<'a>,
    ) -> BoxFuture<'a, Result<Verdict, HookError>> {
        Box::pin(async { Ok(Verdict::Accepted) })
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_was_frozen_in_a_transaction_sends_it_again() {
    let bench = Bench::new().await;
    let options = bench.pool.connect_options().as_ref().clone();
    let options = session(options.options([("idle_in_transaction_session_timeout", "500ms")]));
    let pool = PgPoolOptions::new().max_connections(4).connect_with(options).await.expect("pool");
    let hook = Arc::new(Silent { others: bench.pool.clone(), once: AtomicBool::new(false) });
    let worker = worker_on(pool, hook.clone(), Work(Arc::new(|_, input| Box::pin(async { Ok(input) })))).await;
    let run = bench.start(definition("frozen", vec![work("a", &[])]), json!({})).await;
    assert_eq!(bench.closed(run).await.status, RunStatus::Completed);
    assert!(hook.once.load(Ordering::SeqCst), "it was frozen");
    worker.drain(GRACE).await;
}
