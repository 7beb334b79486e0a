//! Runs and schedules that a user begins over REST: whose they are, what they may be given, what nobody else may do.

use crate::support::{Server, Work, activity, problem, question, read, script};
use loopwright_engine::{
    client::Deploy,
    definition::{Concurrency, Data, Definition, OnConflict},
    ids::RunId,
};
use serde_json::{Value, json};
use std::{collections::BTreeMap, time::Duration};
use uuid::Uuid;

const PATIENCE: Duration = Duration::from_secs(120);

/// `dev-loop`, and `notes` without a required input, and a job of the operator's.
async fn deployed(server: &Server) {
    server.deploy(vec![activity("plan", "plan@1"), question("ask", None)]).await;
    let hash = server.client().pointer("dev-loop", "current").await.unwrap();
    let ir: Value = sqlx::query_scalar("select ir from definitions where hash = $1")
        .bind(&hash.0[..])
        .fetch_one(&server.pool)
        .await
        .unwrap();
    for name in ["notes", "reconcile-ledger"] {
        let mut definition: Definition = serde_json::from_value(ir.clone()).unwrap();
        definition.name = name.into();
        definition.inputs.values_mut().for_each(|input| input.required = false);
        let deploy = Deploy { definition, bundle: BTreeMap::new(), source: String::new(), author: None, message: None };
        server.client().deploy(deploy).await.unwrap();
    }
}

async fn post(server: &Server, user: &str, path: &str, body: Value) -> (u16, Value) {
    read(server.post(user, path, &body).send().await.unwrap()).await
}

async fn user_of(server: &Server, project: &str) -> String {
    let user: Uuid = sqlx::query_scalar("select user_id from projects where id = $1::uuid")
        .bind(project)
        .fetch_one(&server.pool)
        .await
        .unwrap();
    user.to_string()
}

#[tokio::test]
async fn a_run_is_started_forked_reset_and_terminated_by_its_owner() {
    let server = Server::start().await;
    deployed(&server).await;
    let worker = server.worker(vec![Work::new("plan@1", script(|_| async { Ok(json!({})) }))]).await;
    let project = server.project("ann").await;
    let user = user_of(&server, &project).await;
    let start = json!({"workflow": "dev-loop", "inputs": {"idea": "A program."}, "project_id": project});
    let response = server.post("ann", "/v1/runs", &start).header("idempotency-key", "k").send().await.unwrap();
    let location = response.headers()["location"].to_str().unwrap().to_owned();
    let (status, begun) = read(response).await;
    let run = begun["run_id"].as_str().unwrap().to_owned();
    assert_eq!((status, &begun["created"], location), (201, &json!(true), format!("/v1/runs/{run}")));
    // The same request, and another one for the project: there is one run.
    let again = server.post("ann", "/v1/runs", &start).header("idempotency-key", "k").send().await.unwrap();
    assert_eq!(again.headers()["idempotency-replayed"], "true");
    assert_eq!(read(again).await, (201, begun));
    let other = json!({"workflow": "dev-loop", "inputs": {"idea": "Another.", "project_id": project}});
    assert_eq!(post(&server, "ann", "/v1/runs", other).await, (200, json!({"run_id": run, "created": false})));
    let path = format!("/v1/runs/{run}");
    let (_, view) = read(server.get("ann", &path).send().await.unwrap()).await;
    assert_eq!(view["attributes"], json!({"user_id": user, "project_id": project}));
    assert_eq!(view["inputs"]["project_id"], json!(project));

    let (id, deadline) = (run.parse().unwrap(), tokio::time::Instant::now() + PATIENCE);
    loop {
        let view = server.client().describe(id).await.unwrap();
        if !view.waiting.is_empty() {
            break;
        }
        assert!(tokio::time::Instant::now() < deadline, "{view:#?}");
        server.client().wait_change(id, view.seq, Duration::from_secs(1)).await.unwrap();
    }
    let fork = json!({"step": "ask", "inputs": {"idea": "Changed."}, "definition": "v1"});
    let (status, forked) = post(&server, "ann", &format!("{path}/fork"), fork).await;
    assert_eq!((status, &forked["forked_from"]), (201, &json!(run)), "{forked}");
    let fork = forked["run_id"].as_str().unwrap().to_owned();
    let (_, view) = read(server.get("ann", &format!("/v1/runs/{fork}")).send().await.unwrap()).await;
    assert_eq!((&view["inputs"]["idea"], &view["attributes"]["user_id"]), (&json!("Changed."), &json!(user)));
    let (status, reset) = post(&server, "ann", &format!("{path}/reset"), json!({"at": 2})).await;
    assert_eq!((status, &reset["terminated"]), (201, &json!(true)), "{reset}");
    let reset = reset["run_id"].as_str().unwrap();
    let (_, view) = read(server.get("ann", &format!("/v1/runs/{reset}")).send().await.unwrap()).await;
    assert_eq!(view["workflow_id"], json!(format!("project:{project}")));
    for run in [&fork, reset] {
        let ended = post(&server, "ann", &format!("/v1/runs/{run}/terminate"), json!({"reason": "enough"})).await;
        assert_eq!(ended, (200, json!({"status": "terminated"})));
    }
    let late = server.post("ann", &format!("/v1/runs/{fork}/terminate"), &json!({})).send().await.unwrap();
    problem(late, 409, "run_closed").await;

    // An id is the caller's own.
    let named = json!({"workflow": "notes", "id": "one"});
    let (_, hers) = post(&server, "ann", "/v1/runs", named.clone()).await;
    let (status, his) = post(&server, "bob", "/v1/runs", named.clone()).await;
    assert_eq!((status, &his["created"]), (201, &json!(true)));
    assert_eq!(
        post(&server, "ann", "/v1/runs", named).await,
        (200, json!({"run_id": hers["run_id"], "created": false}))
    );
    worker.drain(Duration::from_secs(5)).await;
}

#[tokio::test]
async fn nobody_begins_or_ends_what_is_somebody_else_s() {
    let server = Server::start().await;
    deployed(&server).await;
    let (hers, his) = (server.project("ann").await, server.project("bob").await);
    let (_, begun) = post(&server, "ann", "/v1/runs", json!({"workflow": "notes"})).await;
    let run = format!("/v1/runs/{}", begun["run_id"].as_str().unwrap());
    for (path, body) in [("terminate", json!({})), ("fork", json!({"at": 1})), ("reset", json!({"at": 1}))] {
        let path = format!("{run}/{path}");
        problem(server.post("bob", &path, &body).send().await.unwrap(), 404, "not_found").await;
        let nobody = server.request(reqwest::Method::POST, &path).json(&body).send().await.unwrap();
        problem(nobody, 401, "token_missing").await;
    }
    let (fork, reset) = (format!("{run}/fork"), format!("{run}/reset"));
    let every = json!({"every": {"ms": 3_600_000}});
    for (path, body, status, code) in [
        (
            "/v1/runs",
            json!({"workflow": "dev-loop", "project_id": his, "inputs": {"idea": "x"}}),
            400,
            "project_invalid",
        ),
        (
            "/v1/runs",
            json!({"workflow": "dev-loop", "inputs": {"idea": "x", "project_id": his}}),
            400,
            "project_invalid",
        ),
        ("/v1/runs", json!({"workflow": "notes", "inputs": {"idea": his}}), 400, "project_invalid"),
        ("/v1/runs", json!({"workflow": "notes", "inputs": {"idea": his.to_uppercase()}}), 400, "project_invalid"),
        ("/v1/runs", json!({"workflow": "notes", "project_id": "x"}), 400, "project_invalid"),
        ("/v1/runs", json!({"workflow": "notes", "project_id": hers, "id": "x"}), 422, "input_invalid"),
        ("/v1/runs", json!({"workflow": "notes", "id": ""}), 422, "input_invalid"),
        ("/v1/runs", json!({"workflow": "notes", "inputs": {"idea": 5}}), 422, "input_invalid"),
        ("/v1/runs", json!({"workflow": "notes", "inputs": {"other": 5}}), 422, "input_invalid"),
        ("/v1/runs", json!({"workflow": "nobody"}), 404, "not_found"),
        ("/v1/runs", json!({"workflow": "reconcile-ledger"}), 404, "not_found"),
        ("/v1/runs", json!({"workflow": "notes", "queue": "other"}), 400, "body_invalid"),
        ("/v1/runs", json!({"workflow": "notes", "inputs": []}), 400, "body_invalid"),
        (fork.as_str(), json!({}), 422, "input_invalid"),
        (fork.as_str(), json!({"at": 1, "step": "ask"}), 422, "input_invalid"),
        (fork.as_str(), json!({"at": 900}), 422, "input_invalid"),
        (fork.as_str(), json!({"at": 1, "definition": "dev-loop@v1"}), 404, "not_found"),
        (fork.as_str(), json!({"at": 1, "definition": "v9"}), 404, "not_found"),
        (fork.as_str(), json!({"at": 1, "inputs": {"idea": his}}), 400, "project_invalid"),
        (reset.as_str(), json!({"at": 1, "reason": "x".repeat(1_001)}), 422, "input_invalid"),
        ("/v1/schedules", json!({"name": "s", "workflow": "notes"}), 400, "body_invalid"),
        ("/v1/schedules", json!({"name": "a/b", "workflow": "notes", "when": every}), 422, "input_invalid"),
        ("/v1/schedules", json!({"name": "s", "workflow": "reconcile-ledger", "when": every}), 404, "not_found"),
        (
            "/v1/schedules",
            json!({"name": "s", "workflow": "notes", "when": {"every": {"ms": 1}}}),
            422,
            "input_invalid",
        ),
        (
            "/v1/schedules",
            json!({"name": "s", "workflow": "notes", "when": {"cron": {"expression": "61 * * * *", "timezone": "UTC"}}}),
            422,
            "input_invalid",
        ),
        (
            "/v1/schedules",
            json!({"name": "s", "workflow": "notes", "when": every, "project_id": his}),
            400,
            "project_invalid",
        ),
        (
            "/v1/schedules",
            json!({"name": "s", "workflow": "notes", "when": every, "inputs": {"idea": his}}),
            400,
            "project_invalid",
        ),
    ] {
        let response = server.post("ann", path, &body).send().await.unwrap();
        let (got, told) = read(response).await;
        assert_eq!((got, told["code"].as_str()), (status, Some(code)), "{path} {body}: {told}");
    }
    let runs: i64 = sqlx::query_scalar("select count(*) from runs").fetch_one(&server.pool).await.unwrap();
    let schedules: i64 = sqlx::query_scalar("select count(*) from schedules").fetch_one(&server.pool).await.unwrap();
    assert_eq!((runs, schedules), (1, 0));
}

/// Another version of `notes`, in a group with one place.
async fn grouped(server: &Server, name: &str, on_conflict: OnConflict) {
    let hash = server.client().pointer("notes", "current").await.unwrap();
    let ir: Value = sqlx::query_scalar("select ir from definitions where hash = $1")
        .bind(&hash.0[..])
        .fetch_one(&server.pool)
        .await
        .unwrap();
    let mut definition: Definition = serde_json::from_value(ir).unwrap();
    definition.name = name.into();
    definition.concurrency = Some(Concurrency { group: Data::Literal(json!(name)), limit: 1, on_conflict });
    definition.format = definition.lowest_format();
    let deploy = Deploy { definition, bundle: BTreeMap::new(), source: String::new(), author: None, message: None };
    server.client().deploy(deploy).await.unwrap();
}

#[tokio::test]
async fn what_has_no_place_now_is_told_to_come_again_and_is_no_wrong_input() {
    let server = Server::start().await;
    deployed(&server).await;
    grouped(&server, "strict", OnConflict::Fail).await;
    grouped(&server, "giving", OnConflict::CancelNew).await;
    let start = |workflow: &str| json!({"workflow": workflow});
    let send = async |workflow: &str| server.post("ann", "/v1/runs", &start(workflow)).send().await.unwrap();
    let (status, held) = read(send("strict").await).await;
    assert_eq!(status, 201, "{held}");
    let full = send("strict").await;
    let after: u64 = full.headers()["retry-after"].to_str().unwrap().parse().unwrap();
    assert!(after > 0);
    problem(full, 429, "concurrency_full").await;
    // Whoever gives way is a run that says so.
    let (_, holder) = read(send("giving").await).await;
    let (status, away) = read(send("giving").await).await;
    assert_eq!((status, &away["created"]), (201, &json!(true)), "{away}");
    let worker = server.worker(vec![Work::new("plan@1", script(|_| async { Ok(json!({})) }))]).await;
    let id: RunId = away["run_id"].as_str().unwrap().parse().unwrap();
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while !server.client().describe(id).await.unwrap().status.is_closed() {
        assert!(tokio::time::Instant::now() < deadline, "it is not ended");
        server.client().wait_change(id, 0, Duration::from_secs(1)).await.unwrap();
    }
    let (_, view) = read(server.get("ann", &format!("/v1/runs/{id}")).send().await.unwrap()).await;
    assert_eq!(view["status"], "cancelled", "{view}");
    assert!(view["failure"]["message"].as_str().unwrap().contains(holder["run_id"].as_str().unwrap()), "{view}");
    worker.drain(Duration::from_secs(5)).await;
}

#[tokio::test]
async fn a_user_has_fifty_schedules_and_no_more() {
    let server = Server::start().await;
    deployed(&server).await;
    let every = json!({"every": {"ms": 3_600_000}});
    let new = |n: u32| json!({"name": format!("s{n}"), "workflow": "notes", "when": every});
    for n in 0..50 {
        assert_eq!(post(&server, "ann", "/v1/schedules", new(n)).await.0, 201, "{n}");
    }
    problem(server.post("ann", "/v1/schedules", &new(50)).send().await.unwrap(), 409, "schedules_full").await;
    assert_eq!(post(&server, "bob", "/v1/schedules", new(50)).await.0, 201);
}

#[tokio::test]
async fn a_user_keeps_schedules_of_his_own() {
    let server = Server::start().await;
    deployed(&server).await;
    let project = server.project("ann").await;
    let user = user_of(&server, &project).await;
    let cron = json!({"cron": {"expression": "0 3 * * *", "timezone": "Europe/Berlin"}});
    let new = json!({"name": "nightly", "workflow": "notes", "when": cron, "overlap": "allow_all"});
    let (status, made) = post(&server, "ann", "/v1/schedules", new.clone()).await;
    assert_eq!((status, &made["name"]), (201, &json!("nightly")), "{made}");
    assert_eq!(made["spec"]["attributes"], json!({"user_id": user}));
    problem(server.post("ann", "/v1/schedules", &new).send().await.unwrap(), 409, "schedule_exists").await;
    let (status, _) = post(&server, "bob", "/v1/schedules", new).await;
    assert_eq!(status, 201, "names are each user's own");
    let of_project =
        json!({"name": "loop", "workflow": "dev-loop", "when": cron, "project_id": project, "inputs": {"idea": "x"}});
    let (status, made) = post(&server, "ann", "/v1/schedules", of_project).await;
    assert_eq!((status, &made["spec"]["workflow_id"]), (201, &json!(format!("project:{project}"))), "{made}");
    let names = async |user: &str, query: &str| {
        let (_, page) = read(server.get(user, &format!("/v1/schedules{query}")).send().await.unwrap()).await;
        let names: Vec<_> =
            page["items"].as_array().unwrap().iter().map(|s| s["name"].as_str().unwrap().to_owned()).collect();
        (names, page["next_cursor"].as_str().map(str::to_owned))
    };
    assert_eq!(names("ann", "").await, (vec!["loop".to_owned(), "nightly".into()], None));
    assert_eq!(names("ann", "?limit=1").await, (vec!["loop".to_owned()], Some("loop".into())));
    assert_eq!(names("ann", "?limit=1&cursor=loop").await, (vec!["nightly".to_owned()], None));
    assert_eq!(names("bob", "").await, (vec!["nightly".to_owned()], None));

    let act = async |user: &str, what: &str, body: Value| {
        post(&server, user, &format!("/v1/schedules/nightly/{what}"), body).await
    };
    let (_, paused) = act("ann", "pause", json!({"note": "moving"})).await;
    assert!(paused["paused_at"].is_string() && paused["note"] == "moving", "{paused}");
    let (_, page) = read(server.get("bob", "/v1/schedules/nightly").send().await.unwrap()).await;
    assert!(page["paused_at"].is_null(), "his goes on: {page}");
    let (_, action) = act("ann", "trigger", json!({})).await;
    let run = action["run_id"].as_str().unwrap().to_owned();
    let (status, view) = read(server.get("ann", &format!("/v1/runs/{run}")).send().await.unwrap()).await;
    assert_eq!((status, &view["attributes"]["user_id"]), (200, &json!(user)));
    problem(server.get("bob", &format!("/v1/runs/{run}")).send().await.unwrap(), 404, "not_found").await;
    let past = json!({"from": "2026-01-01T00:00:00Z", "to": "2026-01-03T00:00:00Z"});
    assert_eq!(act("ann", "backfill", past).await, (200, json!({"instants": 2, "added": 2})));
    let (_, resumed) = act("ann", "resume", json!({})).await;
    assert!(resumed["next_at"].is_string(), "{resumed}");
    let (_, shown) = read(server.get("ann", "/v1/schedules/nightly").send().await.unwrap()).await;
    assert_eq!((&shown["name"], shown["upcoming"].as_array().unwrap().is_empty()), (&json!("nightly"), false));

    let delete = async |user: &str, name: &str| {
        let path = format!("/v1/schedules/{name}");
        let request = server.request(reqwest::Method::DELETE, &path).bearer_auth(server.token(user));
        request.send().await.unwrap()
    };
    // Neither the operator's nor another user's are there, under whatever name.
    let theirs: String =
        sqlx::query_scalar("select name from schedules where name like '%nightly' and owner <> 'user:' || $1")
            .bind(&user)
            .fetch_one(&server.pool)
            .await
            .unwrap();
    for name in [theirs.replace('/', "%2F"), theirs, "none".into()] {
        problem(delete("ann", &name).await, 404, "not_found").await;
    }
    for what in ["pause", "resume", "trigger"] {
        let response = server.post("cid", &format!("/v1/schedules/nightly/{what}"), &json!({})).send().await.unwrap();
        problem(response, 404, "not_found").await;
    }
    problem(server.get("cid", "/v1/schedules/nightly").send().await.unwrap(), 404, "not_found").await;
    let nobody = server.request(reqwest::Method::GET, "/v1/schedules").send().await.unwrap();
    problem(nobody, 401, "token_missing").await;
    assert_eq!(read(delete("ann", "nightly").await).await, (200, json!({"status": "deleted"})));
    assert_eq!(names("bob", "").await.0, ["nightly"]);
}
