//! `deploy/roles.sql`: an application that cannot rewrite what is append-only does all of its work, and its owner retires old runs.

use crate::{
    bench::{Bench, CALL_UCR},
    billing_worker::{Calls, closed, start_as},
};
use loopwright_activities::billing::{BillingSettings, LedgerHook, audit};
use loopwright_engine::{
    activity::Registry,
    client::Client,
    ids::RunId,
    retention::{self, Policy},
    view::RunStatus,
    worker::{self, WorkerConfig},
};
use serde_json::json;
use sqlx::{PgPool, postgres::PgPoolOptions};
use std::{sync::Arc, time::Duration};

const ROLES: &str = include_str!("../../../deploy/roles.sql");
/// Who logs in. A role is the server's, which other tests may share.
const LOGIN: &str = "loopwright_test_application";
const APPEND_ONLY: [&str; 6] =
    ["credit_transactions", "model_pricing", "refund_rules", "spending_limits", "project_records", "history"];

/// A pool of a role that may do what the application may.
async fn application(owner: &PgPool) -> PgPool {
    // Twice: it is run after every migration.
    for _ in 0..2 {
        sqlx::raw_sql(ROLES).execute(owner).await.expect("roles.sql");
    }
    let login = "do $$ begin create role loopwright_test_application login password 'test' in role loopwright_app;
                 exception when duplicate_object or unique_violation then null; end $$";
    sqlx::raw_sql(login).execute(owner).await.expect("login");
    let options = owner.connect_options().as_ref().clone().username(LOGIN).password("test");
    PgPoolOptions::new().max_connections(8).connect_with(options).await.expect("connected")
}

/// SQLSTATE of a statement that must be refused.
async fn refusal(pool: &PgPool, sql: String) -> String {
    let error = sqlx::raw_sql(sqlx::AssertSqlSafe(sql.clone())).execute(pool).await.expect_err(&sql);
    error.as_database_error().and_then(|e| e.code()).expect("of the database").into_owned()
}

/// An id of a run that began in 2020.
fn long_ago() -> RunId {
    let random: [u8; 10] = uuid::Uuid::new_v4().into_bytes()[..10].try_into().expect("ten");
    RunId(uuid::Builder::from_unix_timestamp_millis(1_590_000_000_000, &random).into_uuid())
}

#[tokio::test]
async fn the_application_works_without_the_right_to_rewrite() {
    let owned = Bench::new(100).await;
    let pool = application(&owned.pool).await;
    let denied = "42501";
    for table in APPEND_ONLY {
        // An identity is refused to everybody, for another reason.
        let column: String = sqlx::query_scalar(
            "select attname::text from pg_attribute where attrelid = $1::text::regclass and attnum > 0 and attidentity = '' order by attnum limit 1",
        )
        .bind(table)
        .fetch_one(&pool)
        .await
        .expect("column");
        for sql in [
            format!("update {table} set {column} = {column}"),
            format!("delete from {table}"),
            format!("truncate {table} cascade"),
            format!("alter table {table} disable trigger all"),
            format!("drop table {table}"),
        ] {
            assert_eq!(refusal(&pool, sql.clone()).await, denied, "{sql}");
        }
    }
    let partition: String = sqlx::query_scalar(
        "select inhrelid::regclass::text from pg_inherits where inhparent = 'history'::regclass order by 1 limit 1",
    )
    .fetch_one(&pool)
    .await
    .expect("partition");
    for sql in [
        format!("delete from {partition}"),
        format!("update {partition} set seq = seq"),
        "delete from _sqlx_migrations".to_owned(),
        "set session_replication_role = replica".to_owned(),
        "create table mine ()".to_owned(),
    ] {
        assert_eq!(refusal(&pool, sql.clone()).await, denied, "{sql}");
    }

    // A metered run from its start to its end, by a worker that is the application.
    let app = Bench { pool: pool.clone(), hook: LedgerHook::new(BillingSettings::default()), ..owned };
    let hook = Arc::new(LedgerHook::new(BillingSettings::default()));
    let client = Client::new(pool.clone(), hook.clone());
    let config = WorkerConfig { hook: hook.clone(), ..WorkerConfig::new(pool.clone(), Registry::new().with(Calls)) };
    let worker = worker::start(config).await.expect("worker");
    let call = json!([{"id": "call", "kind": {"activity": {"name": "calls@1", "with": {}}}}]);
    let run = start_as(&app, &client, call, Some(long_ago())).await;
    assert_eq!(closed(&client, run).await, RunStatus::Completed);
    worker.drain(Duration::from_secs(10)).await;
    assert_eq!(app.balance().await, (100_000_000 - CALL_UCR, 0));
    // And the ledger's other doors.
    app.buy("c1").await;
    assert!(app.grant("ticket", 5).await);
    assert_eq!(app.violations().await, [""; 0]);

    // Old runs are their owner's to retire: the application is refused and nothing is lost.
    let owner = Client::new(owned.pool.clone(), hook);
    sqlx::query("update runs set closed_at = '2020-06-01' where run_id = $1")
        .bind(run.0)
        .execute(&owned.pool)
        .await
        .expect("old");
    let folder = tempfile::tempdir().expect("folder");
    let policy = Policy { keep: Duration::from_secs(90 * 86_400), archive: folder.path().to_owned() };
    let refused = retention::run(&client, &policy).await.expect_err("not the owner");
    assert_eq!(refused.code(), "database", "{refused}");
    assert_eq!(client.describe(run).await.expect("it is there").status, RunStatus::Completed);
    let soon = chrono::Utc::now() + chrono::Duration::days(92);
    assert!(retention::prepare(&client, soon).await.is_err(), "the application makes no tables");
    assert!(retention::prepare(&owner, soon).await.expect("months to come") > 0);
    let report = retention::run(&owner, &policy).await.expect("retired");
    assert_eq!(report.runs, 1, "{report:?}");
    assert_eq!(client.describe(run).await.expect_err("gone").code(), "run_archived");
    let found = audit::run(&mut pool.acquire().await.expect("conn")).await.expect("audit");
    assert_eq!(found, [], "what it has paid stays");
    // With the new month nothing has opened.
    sqlx::raw_sql(ROLES).execute(&owned.pool).await.expect("again");
    assert_eq!(refusal(&pool, "delete from history".into()).await, denied);
}
