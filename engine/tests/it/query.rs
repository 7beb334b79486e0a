//! Queries on a real database: pending, parked, closed, terminated and imported runs.

use crate::bench::{Bench, definition, e, step, work};
use loopwright_engine::{
    Error,
    archive::Archive,
    client::Signal,
    definition::{Await, Data, Definition, Kind, OnTimeout},
    ids::RunId,
    view::RunStatus,
};
use serde_json::json;
use std::{io::Cursor, time::Duration};

const GRACE: Duration = Duration::from_secs(10);

fn asked() -> Definition {
    let spec = Await {
        signal: "go".into(),
        timeout_ms: 600_000,
        form: None,
        show: None,
        to: vec![],
        filter: None,
        remind_ms: vec![],
        on_timeout: OnTimeout::Fail,
        default: None,
        approval: None,
        reply: None,
    };
    let mut d = definition(
        "asked",
        vec![work("a", &[("v", Data::Literal(json!(7)))]), step("ask", Kind::Await(Box::new(spec)))],
    );
    d.queries.insert("bare".into(), Data::Expr(e("steps.a.output.v")));
    d.queries.insert("progress".into(), Data::Expr(e("[run.status, has(steps.ask) ? steps.ask.status : 'none']")));
    d
}

#[tokio::test(flavor = "multi_thread")]
async fn a_query_is_answered_from_the_history_whatever_the_run_does() {
    let bench = Bench::new().await;
    let client = &bench.client;
    let run = bench.start(asked(), json!({})).await;
    let progress = async |run| client.query(run, "progress").await.expect("answered").result;
    assert_eq!(progress(run).await, json!(["pending", "none"]));
    let failed = client.query(run, "bare").await.expect_err("nothing yet");
    assert_eq!(failed.code(), "query_failed");
    assert!(failed.to_string().contains("`bare`") && failed.to_string().contains("expr.missing"), "{failed}");
    let worker = bench.worker().await;
    bench.until(run, "waits", |v| !v.waiting.is_empty()).await;
    let seen = client.query(run, "bare").await.expect("answered");
    assert_eq!((&seen.result, seen.status), (&json!(7), RunStatus::Running));
    assert_eq!(progress(run).await, json!(["running", "running"]));
    let rows: i64 = sqlx::query_scalar("select count(*) from history").fetch_one(&bench.pool).await.expect("count");
    let signal = Signal { name: "go".into(), payload: json!({}), ..Signal::default() };
    assert!(client.signal(run, signal).await.expect("sent"));
    let view = bench.closed(run).await;
    assert_eq!(rows + 1, i64::try_from(view.seq).expect("small"), "a query makes no transition");
    assert_eq!(progress(run).await, json!(["completed", "succeeded"]));
    let closed = client.query(run, "bare").await.expect("answered");
    assert_eq!((closed.result, closed.seq, closed.status), (json!(7), view.seq, RunStatus::Completed));
    // One that was ended in the middle says where it stood.
    let other = bench.start(asked(), json!({})).await;
    bench.until(other, "waits", |v| !v.waiting.is_empty()).await;
    client.terminate(other, "enough").await.expect("terminated");
    assert_eq!(progress(other).await, json!(["terminated", "running"]));
    let unknown = client.query(run, "nothing").await.expect_err("no such query");
    assert_eq!(unknown.code(), "query_not_found");
    assert!(unknown.to_string().contains("`bare`, `progress`"), "{unknown}");
    assert!(matches!(client.query(RunId::new(), "bare").await, Err(Error::RunNotFound(_))));
    // As a file, in another database.
    let mut export = client.export(run).await.expect("export");
    let mut text = String::new();
    while let Some(line) = export.next().await.expect("line") {
        text.push_str(&line);
    }
    let elsewhere = Bench::new().await;
    let imported = elsewhere.client.import(Archive::read(Cursor::new(text)).expect("read")).await.expect("import");
    assert_eq!(elsewhere.client.query(imported, "bare").await.expect("answered").result, json!(7));
    worker.drain(GRACE).await;
    bench.audit().await;
}
