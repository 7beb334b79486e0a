//! A user's run that goes on under another version of its workflow, and one that is carried out into a file.

use crate::support::{Server, Work, activity, problem, question, read, script};
use loopwright_engine::{archive::Archive, worker::WorkerHandle};
use loopwright_server::rest::auth::mint;
use reqwest::Method;
use serde_json::{Value, json};
use std::{sync::Arc, time::Duration};
use tokio::sync::Notify;

/// A run of the first of three versions that waits: the second one has a step more, the third calls it otherwise.
async fn waiting() -> (Server, String, WorkerHandle) {
    let server = Server::start().await;
    server.deploy_as("notes", &[], vec![question("ask", None)]).await;
    let (status, begun) =
        read(server.post("ann", "/v1/runs", &json!({"workflow": "notes"})).send().await.unwrap()).await;
    assert_eq!(status, 201, "{begun}");
    let run = begun["run_id"].as_str().unwrap().to_owned();
    server.deploy_as("notes", &[], vec![question("ask", None), activity("later", "plan@1")]).await;
    server.deploy_as("notes", &[], vec![question("asked", None)]).await;
    let worker = server.worker(vec![Work::new("plan@1", script(|_| async { Ok(json!({})) }))]).await;
    server.until(&run, |view| !view.waiting.is_empty()).await;
    (server, run, worker)
}

#[tokio::test]
async fn a_run_goes_on_under_another_version_when_its_owner_says_so() {
    let (server, run, worker) = waiting().await;
    let path = format!("/v1/runs/{run}/migrate");
    let ask = async |body: Value| read(server.post("ann", &path, &body).send().await.unwrap()).await;
    let outcome = async |body: Value| {
        let (status, report) = ask(body).await;
        assert_eq!(status, 200, "{report}");
        report["outcome"].as_str().unwrap().to_owned()
    };
    let definition = async || {
        let (_, view) = read(server.get("ann", &format!("/v1/runs/{run}")).send().await.unwrap()).await;
        view["definition"].as_str().unwrap().to_owned()
    };
    let first = definition().await;
    assert_eq!(outcome(json!({"to": "v2", "dry_run": true})).await, "possible");
    assert_eq!(definition().await, first, "it was only asked");
    assert_eq!(outcome(json!({"to": "v3", "dry_run": true})).await, "impossible");
    let refused = server.post("ann", &path, &json!({"to": "v3"})).send().await.unwrap();
    let refused = problem(refused, 422, "migration_invalid").await;
    assert!(refused["errors"][0]["detail"].as_str().unwrap().contains("`ask`"), "{refused}");
    assert_eq!(outcome(json!({"to": "v3", "map": {"ask": "asked"}, "dry_run": true})).await, "possible");
    let (_, report) = ask(json!({"to": "v2", "reason": "a step more"})).await;
    assert_eq!((&report["outcome"], &report["from"]), (&json!("migrated"), &json!(first)), "{report}");
    assert_eq!(json!(definition().await), report["to"]);
    assert_eq!(outcome(json!({"to": "v2"})).await, "unchanged", "twice is once");
    let (_, page) = read(server.get("ann", &format!("/v1/runs/{run}/history")).send().await.unwrap()).await;
    let by: Vec<&Value> = page["items"]
        .as_array()
        .unwrap()
        .iter()
        .flat_map(|row| row["events"].as_array().unwrap())
        .filter(|event| event["type"] == "run_migrated")
        .map(|event| &event["by"])
        .collect();
    assert!(by.len() == 1 && by[0].as_str().unwrap().starts_with("user:"), "{by:?}");

    for (body, status, code) in [
        (json!({"to": "v9"}), 404, "not_found"),
        (json!({"to": "dev-loop@v1"}), 404, "not_found"),
        (json!({}), 400, "body_invalid"),
        (json!({"to": "v1", "wait": "1m"}), 400, "body_invalid"),
        (json!({"to": "v1", "reason": "x".repeat(1_001)}), 422, "input_invalid"),
    ] {
        let (got, told) = ask(body.clone()).await;
        assert_eq!((got, told["code"].as_str()), (status, Some(code)), "{body}: {told}");
    }
    let to = json!({"to": "v1"});
    problem(server.post("bob", &path, &to).send().await.unwrap(), 404, "not_found").await;
    problem(server.request(Method::POST, &path).json(&to).send().await.unwrap(), 401, "token_missing").await;
    let reader = mint(&server.config.auth, "ann", "something:else", 60).unwrap();
    let refused = server.request(Method::POST, &path).bearer_auth(reader).json(&to).send().await.unwrap();
    problem(refused, 403, "scope_insufficient").await;
    let ended = server.post("ann", &format!("/v1/runs/{run}/terminate"), &json!({})).send().await.unwrap();
    assert_eq!(ended.status(), 200);
    problem(server.post("ann", &path, &to).send().await.unwrap(), 409, "run_closed").await;
    worker.drain(Duration::from_secs(5)).await;
}

#[tokio::test]
async fn a_run_that_works_is_not_migrated_under_its_attempts() {
    let server = Server::start().await;
    let steps = || vec![activity("plan", "plan@1")];
    server.deploy_as("notes", &[], steps()).await;
    let gate = Arc::new(Notify::new());
    let held = gate.clone();
    let plan = script(move |_| {
        let held = held.clone();
        async move {
            held.notified().await;
            Ok(json!({}))
        }
    });
    let worker = server.worker(vec![Work::new("plan@1", plan)]).await;
    let (_, begun) = read(server.post("ann", "/v1/runs", &json!({"workflow": "notes"})).send().await.unwrap()).await;
    let run = begun["run_id"].as_str().unwrap();
    server.deploy_as("notes", &[], [steps(), vec![question("ask", None)]].concat()).await;
    server.until(run, |view| !view.live.is_empty()).await;
    let path = format!("/v1/runs/{run}/migrate");
    let (_, report) =
        read(server.post("ann", &path, &json!({"to": "v2", "dry_run": true})).send().await.unwrap()).await;
    assert_eq!((&report["outcome"], &report["running"]), (&json!("busy"), &json!(["plan"])), "{report}");
    let refused = server.post("ann", &path, &json!({"to": "v2"})).send().await.unwrap();
    let refused = problem(refused, 409, "migration_busy").await;
    assert!(refused["detail"].as_str().unwrap().contains("pause"), "{refused}");
    gate.notify_one();
    server.until(run, |view| view.status.is_closed()).await;
    worker.drain(Duration::from_secs(5)).await;
}

#[tokio::test]
async fn a_run_is_exported_whole_by_its_owner_only() {
    let (server, run, worker) = waiting().await;
    let path = format!("/v1/runs/{run}/export");
    let response = server.get("ann", &path).send().await.unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["content-type"], "application/x-ndjson");
    assert_eq!(response.headers()["content-disposition"], format!("attachment; filename=\"run-{run}.jsonl\""));
    let file = response.text().await.unwrap();
    let archive = Archive::read(file.as_bytes()).unwrap();
    assert_eq!(archive.header.run.run_id.to_string(), run);
    assert!(
        archive.history.len() as u64 == archive.header.run.seq && archive.replay(None).unwrap().divergence.is_none()
    );
    // Line by line what the command line writes, but for the instant at which it was written and the sum.
    let mut export = server.client().export(run.parse().unwrap()).await.unwrap();
    let mut lines = Vec::new();
    while let Some(line) = export.next().await.unwrap() {
        lines.push(line);
    }
    let theirs: Vec<&str> = file.split_inclusive('\n').collect();
    assert_eq!(theirs.len(), lines.len());
    assert_eq!(theirs[1..theirs.len() - 1], lines[1..lines.len() - 1]);

    problem(server.get("bob", &path).send().await.unwrap(), 404, "not_found").await;
    problem(server.request(Method::GET, &path).send().await.unwrap(), 401, "token_missing").await;
    // Who may look may take along what he sees.
    let reader = mint(&server.config.auth, "ann", "something:else", 60).unwrap();
    assert_eq!(server.request(Method::GET, &path).bearer_auth(reader).send().await.unwrap().status(), 200);
    let nothing = format!("/v1/runs/{}/export", uuid::Uuid::now_v7());
    problem(server.get("ann", &nothing).send().await.unwrap(), 404, "not_found").await;

    // What cannot be read to its end does not look whole.
    sqlx::query("alter table checkpoints rename to elsewhere").execute(&server.pool).await.unwrap();
    let broken = server.get("ann", &path).send().await.unwrap();
    assert_eq!(broken.status(), 200, "its beginning is there");
    assert!(broken.bytes().await.is_err(), "the body breaks off");
    sqlx::query("alter table elsewhere rename to checkpoints").execute(&server.pool).await.unwrap();
    worker.drain(Duration::from_secs(5)).await;
}

#[tokio::test]
async fn exports_are_bounded_like_event_streams() {
    let server = Server::start_with(|config| config.http.streams_max = 1).await;
    server.deploy_as("notes", &[], vec![question("ask", None)]).await;
    let (_, begun) = read(server.post("ann", "/v1/runs", &json!({"workflow": "notes"})).send().await.unwrap()).await;
    let run = begun["run_id"].as_str().unwrap();
    let stream = server.get("ann", &format!("/v1/runs/{run}/events")).send().await.unwrap();
    assert_eq!(stream.status(), 200);
    let full = server.get("ann", &format!("/v1/runs/{run}/export")).send().await.unwrap();
    problem(full, 503, "streams_exhausted").await;
    drop(stream);
}
