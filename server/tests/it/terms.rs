//! What a user may say of a run that he starts over REST: what becomes of an id that was used before, how urgent it is, how long its
//! chain may go on. And that a start that is sent again, because its answer was lost, is the same start.

use crate::support::{Server, problem, question, read};
use loopwright_engine::view::RunStatus;
use loopwright_server::rest::auth::mint;
use reqwest::Response;
use serde_json::{Value, json};

/// A workflow that waits, and needs nothing.
async fn notes() -> Server {
    let server = Server::start().await;
    server.deploy_as("notes", &[], vec![question("ask", None)]).await;
    server
}

async fn start(server: &Server, user: &str, body: Value) -> Response {
    server.post(user, "/v1/runs", &body).send().await.unwrap()
}

/// Starts a run that was not there.
async fn new(server: &Server, user: &str, body: Value) -> String {
    let (status, told) = read(start(server, user, body).await).await;
    assert_eq!((status, &told["created"]), (201, &json!(true)), "{told}");
    told["run_id"].as_str().unwrap().to_owned()
}

async fn status(server: &Server, run: &str) -> RunStatus {
    server.client().describe(run.parse().unwrap()).await.unwrap().status
}

async fn runs(server: &Server) -> i64 {
    sqlx::query_scalar("select count(*) from runs").fetch_one(&server.pool).await.unwrap()
}

#[tokio::test]
async fn an_open_run_under_an_id_answers_refuses_or_gives_way() {
    let server = notes().await;
    let with = |conflict: &str| json!({"workflow": "notes", "id": "one", "id_conflict": conflict});
    let first = new(&server, "ann", with("fail")).await;
    let his = new(&server, "bob", with("terminate_existing")).await;
    assert_eq!(status(&server, &first).await, RunStatus::Pending, "an id is the caller's own");
    let refused = problem(start(&server, "ann", with("fail")).await, 409, "workflow_id_open").await;
    assert!(refused["detail"].as_str().unwrap().contains(&first), "{refused}");
    let (code, told) = read(start(&server, "ann", with("use_existing")).await).await;
    assert_eq!((code, told), (200, json!({"run_id": first, "created": false})));
    let second = new(&server, "ann", with("terminate_existing")).await;
    assert_eq!(status(&server, &first).await, RunStatus::Terminated);
    assert_eq!(status(&server, &second).await, RunStatus::Pending);
    assert_eq!(status(&server, &his).await, RunStatus::Pending);
    assert_eq!(runs(&server).await, 3);

    // A project is an id as well.
    server.deploy(vec![question("ask", None)]).await;
    let project = server.project("ann").await;
    let inputs = json!({"idea": "A program.", "project_id": project});
    let of_project = json!({"workflow": "dev-loop", "inputs": inputs, "id_conflict": "fail"});
    let open = new(&server, "ann", of_project.clone()).await;
    let refused = problem(start(&server, "ann", of_project).await, 409, "workflow_id_open").await;
    assert!(refused["detail"].as_str().unwrap().contains(&open), "{refused}");
}

#[tokio::test]
async fn an_id_that_was_used_is_free_or_used_up_as_its_owner_says() {
    let server = notes().await;
    let with = |reuse: &str| json!({"workflow": "notes", "id": "one", "id_reuse": reuse});
    let first = new(&server, "ann", with("reject_duplicate")).await;
    let (code, told) = read(start(&server, "ann", with("reject_duplicate")).await).await;
    assert_eq!((code, &told["run_id"]), (200, &json!(first)), "it is open: {told}");
    let terminate = async |run: &str| {
        let ended = server.post("ann", &format!("/v1/runs/{run}/terminate"), &json!({})).send().await.unwrap();
        assert_eq!(ended.status(), 200);
    };
    terminate(&first).await;
    let refused = problem(start(&server, "ann", with("reject_duplicate")).await, 409, "workflow_id_used").await;
    let detail = refused["detail"].as_str().unwrap();
    assert!(detail.contains(&first) && detail.contains("terminated") && !detail.contains("user:"), "{detail}");
    new(&server, "bob", with("reject_duplicate")).await;
    // Only after a failure, and a termination is one.
    let second = new(&server, "ann", with("allow_duplicate_failed_only")).await;
    let worker = server.worker(vec![]).await;
    server.until(&second, |view| !view.waiting.is_empty()).await;
    let answer = json!({"name": "user_message", "payload": {"text": "blue"}});
    let sent = server.post("ann", &format!("/v1/runs/{second}/signals"), &answer).send().await.unwrap();
    assert_eq!(sent.status(), 202);
    server.until(&second, |view| view.status == RunStatus::Completed).await;
    let refused = start(&server, "ann", with("allow_duplicate_failed_only")).await;
    problem(refused, 409, "workflow_id_used").await;
    new(&server, "ann", with("allow_duplicate")).await;
    worker.drain(std::time::Duration::from_secs(5)).await;
}

#[tokio::test]
async fn a_user_steps_back_behind_others_and_never_before_them() {
    let server = notes().await;
    let usual = new(&server, "ann", json!({"workflow": "notes"})).await;
    let last = new(&server, "ann", json!({"workflow": "notes", "priority": 5, "chain_timeout": "2h"})).await;
    let row = async |run: &str| -> (i16, i32, Option<f64>) {
        sqlx::query_as(
            "select q.priority, q.lane, extract(epoch from r.chain_deadline - r.started_at)::float8
             from ready q join runs r using (shard, run_id) where run_id = $1::uuid",
        )
        .bind(run)
        .fetch_one(&server.pool)
        .await
        .unwrap()
    };
    let ((usual, lane, none), (priority, same, deadline)) = (row(&usual).await, row(&last).await);
    assert_eq!((usual, none, priority, same), (3, None, 5, lane));
    assert!(lane != 0 && deadline.is_some_and(|s| (s - 7_200.0).abs() < 60.0), "{deadline:?}");

    let with = |field: &str, value: Value| {
        let mut body = json!({"workflow": "notes", "id": "x"});
        body[field] = value;
        body
    };
    for (field, value) in [
        ("priority", json!(1)),
        ("priority", json!(2)),
        ("priority", json!(6)),
        ("id_reuse", json!("never")),
        ("id_conflict", json!("ask")),
        ("chain_timeout", json!("soon")),
    ] {
        let refused = problem(start(&server, "ann", with(field, value)).await, 422, "input_invalid").await;
        assert_eq!(refused["errors"][0]["pointer"], format!("/{field}"), "{refused}");
    }
    // What the engine refuses.
    let mut both = with("id_reuse", json!("reject_duplicate"));
    both["id_conflict"] = json!("terminate_existing");
    for body in [both, with("chain_timeout", json!("500ms"))] {
        problem(start(&server, "ann", body).await, 422, "input_invalid").await;
    }
    for field in ["id_reuse", "id_conflict"] {
        let word = if field == "id_reuse" { "allow_duplicate" } else { "use_existing" };
        let mut without = json!({"workflow": "notes"});
        without[field] = json!(word);
        let refused = problem(start(&server, "ann", without).await, 422, "input_invalid").await;
        assert_eq!(refused["errors"][0]["pointer"], format!("/{field}"), "{refused}");
    }
    // What would take from others is no field of this route.
    for (field, value) in [
        ("queue", json!("other")),
        ("fairness_key", json!("x")),
        ("group", json!("g")),
        ("rate", json!("r")),
        ("attributes", json!({"user_id": "x"})),
        ("priority", json!("high")),
    ] {
        problem(start(&server, "ann", with(field, value)).await, 400, "body_invalid").await;
    }
    let reader = mint(&server.config.auth, "ann", "something:else", 60).unwrap();
    let request = server.request(reqwest::Method::POST, "/v1/runs").bearer_auth(reader);
    let refused = request.json(&with("id_conflict", json!("terminate_existing"))).send().await.unwrap();
    problem(refused, 403, "scope_insufficient").await;
    assert_eq!(runs(&server).await, 2);
}

#[tokio::test]
async fn a_start_whose_answer_was_lost_is_found_by_its_key() {
    let server = notes().await;
    let body = json!({"workflow": "notes", "id": "one", "id_conflict": "terminate_existing"});
    let send =
        async |body: &Value| server.post("ann", "/v1/runs", body).header("idempotency-key", "k").send().await.unwrap();
    server.break_answers().await;
    problem(send(&body).await, 500, "internal").await;
    server.mend_answers().await;
    // It had begun: its own repetition finds it and ends nobody.
    let run: uuid::Uuid = sqlx::query_scalar("select run_id from runs").fetch_one(&server.pool).await.unwrap();
    let run = run.to_string();
    assert_eq!(read(send(&body).await).await, (200, json!({"run_id": run, "created": false})));
    assert_eq!(send(&body).await.headers()["idempotency-replayed"], "true");
    problem(send(&json!({"workflow": "notes", "id": "one"})).await, 422, "idempotency_key_reused").await;
    assert_eq!((runs(&server).await, status(&server, &run).await), (1, RunStatus::Pending));

    // The process died before it could answer: soon somebody else does.
    let died = async |seconds_ago: f64| {
        sqlx::query(
            "update idempotency_keys set status = null, location = null, body = null,
                    claimed_at = engine_now() - make_interval(secs => $1)",
        )
        .bind(seconds_ago)
        .execute(&server.pool)
        .await
        .unwrap();
    };
    died(0.0).await;
    problem(send(&body).await, 409, "request_in_progress").await;
    died(5.5).await;
    assert_eq!(read(send(&body).await).await.1["run_id"], json!(run));
    assert_eq!(runs(&server).await, 1);
}

#[tokio::test]
async fn a_key_that_found_an_open_run_stands_for_that_one() {
    let server = notes().await;
    let body = json!({"workflow": "notes", "id": "one"});
    let open = new(&server, "ann", body.clone()).await;
    let send = async || server.post("ann", "/v1/runs", &body).header("idempotency-key", "k").send().await.unwrap();
    server.break_answers().await;
    problem(send().await, 500, "internal").await;
    server.mend_answers().await;
    let ended = server.post("ann", &format!("/v1/runs/{open}/terminate"), &json!({})).send().await.unwrap();
    assert_eq!(ended.status(), 200);
    assert_eq!(read(send().await).await, (200, json!({"run_id": open, "created": false})));
    assert_eq!(runs(&server).await, 1);
}
