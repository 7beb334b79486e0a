//! `POST /orchestrate/run-loop`: shapes, one loop per project, waiting, idempotency.

use crate::support::{Server, Work, activity, problem, question, read, run_of, script};
use futures_util::future::BoxFuture;
use loopwright_engine::{
    Failure,
    hook::{AttemptRef, HookError, Reading, Refusal, Transition, TransitionHook, Verdict},
};
use reqwest::Method;
use serde_json::json;
use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};
use tokio::sync::Semaphore;

const PATH: &str = "/orchestrate/run-loop";

#[tokio::test]
async fn every_bad_project_id_gets_the_same_answer() {
    let server = Server::start().await;
    server.deploy(vec![activity("plan", "plan@1")]).await;
    let bobs = server.project("bob").await;
    let mut answers = Vec::new();
    for body in [
        json!({}),
        json!([]),
        json!({"project_id": null}),
        json!({"project_id": 7}),
        json!({"project_id": ""}),
        json!({"project_id": "not-a-uuid"}),
        json!({"project_id": "123e4567-e89b-12d3-a456-426614174000"}),
        json!({"project_id": bobs}),
        json!({"project_id": "' or 1=1 --"}),
    ] {
        answers.push(problem(server.post("ann", PATH, &body).send().await.unwrap(), 400, "project_invalid").await);
    }
    for text in ["", "{", "project_id=1"] {
        let request = server.request(Method::POST, PATH).bearer_auth(server.token("ann"));
        answers.push(problem(request.body(text).send().await.unwrap(), 400, "project_invalid").await);
    }
    answers.dedup();
    assert_eq!(answers.len(), 1, "{answers:?}");
    let runs: i64 = sqlx::query_scalar("select count(*) from runs").fetch_one(&server.pool).await.unwrap();
    assert_eq!(runs, 0);
}

#[tokio::test]
async fn the_answer_is_the_task_that_ended() {
    let server = Server::start().await;
    server.deploy(vec![activity("plan", "plan@1"), question("ask", None)]).await;
    let flaky = script(|ctx| async move {
        if ctx.info().attempt == 1 { Err(Failure::retryable("transient.network", "reset")) } else { Ok(json!({})) }
    });
    let worker = server.worker(vec![Work::new("plan@1", flaky)]).await;
    let project = server.project("ann").await;

    let response = server.trigger("ann", &project, "wait=30").await;
    let run = run_of(&response);
    let (status, body) = read(response).await;
    assert_eq!(status, 200);
    assert_eq!(
        body,
        json!({"status": "success", "project_id": project, "result":
            {"task": "Plan the architecture and the TODO list", "message": "Succeeded in attempt 2."}})
    );
    // The next trigger finds the run parked: it says for what, at once, and starts no second loop.
    let response = server.trigger("ann", &project, "wait=600").await;
    assert_eq!(run_of(&response), run);
    let (_, body) = read(response).await;
    assert_eq!(body["result"]["task"], "Waiting for an answer (`user_message`)");
    assert_eq!(body["result"]["message"], "Needs the user: Which color?");
    worker.drain(std::time::Duration::from_secs(5)).await;
}

#[tokio::test]
async fn a_task_that_failed_is_told_as_such() {
    let server = Server::start().await;
    server.deploy(vec![activity("plan", "plan@1")]).await;
    let broken = script(|_| async { Err(Failure::permanent("model.refused", "it would not")) });
    let worker = server.worker(vec![Work::new("plan@1", broken)]).await;
    let project = server.project("ann").await;
    let (status, body) = read(server.trigger("ann", &project, "wait=30").await).await;
    // The loop was run; what came of it is its status.
    assert_eq!((status, body["status"].as_str()), (200, Some("success")));
    assert_eq!(body["result"]["message"], "Failed in attempt 1: model.refused: it would not");
    worker.drain(std::time::Duration::from_secs(5)).await;
}

/// Refuses every start until it is told otherwise.
struct Broke(AtomicBool);

impl TransitionHook for Broke {
    fn apply<'a>(
        &'a self,
        _: &'a mut sqlx::PgConnection,
        transitions: &'a [Transition],
    ) -> BoxFuture<'a, Result<Vec<Refusal>, HookError>> {
        let refused = transitions.iter().filter(|t| !t.started.is_empty() && self.0.load(Ordering::SeqCst));
        let refusals = refused.map(|t| Refusal { ord: t.ord, reason: "credits".into(), message: "none left".into() });
        let refusals = refusals.collect();
        Box::pin(async { Ok(refusals) })
    }
    fn meter<'a>(
        &'a self,
        _: &'a mut sqlx::PgConnection,
        _: &'a AttemptRef,
        _: Reading<'a>,
    ) -> BoxFuture<'a, Result<Verdict, HookError>> {
        Box::pin(async { Ok(Verdict::Accepted) })
    }
}

#[tokio::test]
async fn a_blocked_loop_says_why_and_a_trigger_wakes_it() {
    let server = Server::start().await;
    server.deploy(vec![activity("plan", "plan@1")]).await;
    let hook = Arc::new(Broke(AtomicBool::new(true)));
    let work = Work::new("plan@1", script(|_| async { Ok(json!({})) })).metered();
    let worker = server.worker_with(vec![work], hook.clone()).await;
    let project = server.project("ann").await;
    let response = server.trigger("ann", &project, "wait=30").await;
    let run = run_of(&response);
    let (_, body) = read(response).await;
    assert_eq!(body["result"]["message"], "Blocked (credits): none left", "{body}");
    hook.0.store(false, Ordering::SeqCst);
    let response = server.trigger("ann", &project, "wait=30").await;
    assert_eq!(run_of(&response), run);
    let (_, body) = read(response).await;
    assert!(body["result"]["message"].as_str().unwrap().starts_with("Succeeded"), "{body}");
    worker.drain(std::time::Duration::from_secs(5)).await;
}

#[tokio::test]
async fn many_triggers_at_once_start_one_loop() {
    let server = Server::start().await;
    server.deploy(vec![activity("plan", "plan@1")]).await;
    let project = server.project("ann").await;
    let triggers = (0..8).map(|_| server.trigger("ann", &project, "respond-async"));
    let mut runs = std::collections::BTreeSet::new();
    for response in futures_util::future::join_all(triggers).await {
        assert_eq!(response.headers()["preference-applied"], "respond-async");
        runs.insert(run_of(&response));
        let (status, body) = read(response).await;
        assert_eq!((status, body["status"].as_str()), (202, Some("accepted")));
    }
    assert_eq!(runs.len(), 1);
    // Without a worker the wait is over when it is over, and the answer says what is in progress.
    let (status, body) = read(server.trigger("ann", &project, "wait=0").await).await;
    assert_eq!((status, body["status"].as_str()), (200, Some("success")), "{body}");
    assert!(body["result"]["task"].is_string() && body["result"]["message"].is_string());
}

#[tokio::test]
async fn a_wait_that_is_over_names_what_is_in_progress() {
    let server = Server::start().await;
    server.deploy(vec![activity("plan", "plan@1")]).await;
    let gate = Arc::new(Semaphore::new(0));
    let arrived = Arc::new(Semaphore::new(0));
    let blocked = {
        let (gate, arrived) = (gate.clone(), arrived.clone());
        script(move |_| {
            let (gate, arrived) = (gate.clone(), arrived.clone());
            async move {
                arrived.add_permits(1);
                gate.acquire().await.expect("open").forget();
                Ok(json!({}))
            }
        })
    };
    let worker = server.worker(vec![Work::new("plan@1", blocked)]).await;
    let project = server.project("ann").await;
    server.trigger("ann", &project, "respond-async").await;
    arrived.acquire().await.unwrap().forget();
    let (_, body) = read(server.trigger("ann", &project, "wait=0").await).await;
    assert_eq!(body["result"]["task"], "Plan the architecture and the TODO list");
    assert_eq!(body["result"]["message"], "In progress, attempt 1.");
    // A caller who waits is answered when the server stops.
    let request = server.post("ann", PATH, &json!({"project_id": project})).header("idempotency-key", "k").send();
    let (answer, ()) = tokio::join!(request, server.interrupt());
    let (status, body) = read(answer.unwrap()).await;
    assert_eq!((status, body["result"]["message"].as_str()), (200, Some("In progress, attempt 1.")), "{body}");
    gate.add_permits(1);
    worker.drain(std::time::Duration::from_secs(5)).await;
}

#[tokio::test]
async fn an_idempotency_key_gets_the_first_answer_again() {
    let server = Server::start().await;
    server.deploy(vec![activity("plan", "plan@1")]).await;
    let worker = server.worker(vec![Work::new("plan@1", script(|_| async { Ok(json!({})) }))]).await;
    let (project, other) = (server.project("ann").await, server.project("ann").await);
    let send = |project: &str| {
        let body = json!({ "project_id": project });
        server.post("ann", PATH, &body).header("prefer", "wait=30").header("idempotency-key", "once").send()
    };
    let first = send(&project).await.unwrap();
    let run = run_of(&first);
    let (status, body) = read(first).await;
    assert_eq!(status, 200, "{body}");
    let again = send(&project).await.unwrap();
    assert_eq!((again.headers()["idempotency-replayed"].to_str().unwrap(), run_of(&again)), ("true", run));
    assert_eq!(read(again).await, (200, body));
    let runs: i64 = sqlx::query_scalar("select count(*) from runs").fetch_one(&server.pool).await.unwrap();
    assert_eq!(runs, 1);
    problem(send(&other).await.unwrap(), 422, "idempotency_key_reused").await;
    worker.drain(std::time::Duration::from_secs(5)).await;
}

#[tokio::test]
async fn a_caller_who_went_away_finds_his_answer_under_the_key() {
    let server = Server::start_with(|config| config.http.requests_per_minute = 1_000_000).await;
    server.deploy(vec![activity("plan", "plan@1")]).await;
    let gate = Arc::new(Semaphore::new(0));
    let waits = gate.clone();
    let work = script(move |_| {
        let gate = waits.clone();
        async move {
            gate.acquire().await.expect("open").forget();
            Ok(json!({}))
        }
    });
    let worker = server.worker(vec![Work::new("plan@1", work)]).await;
    let project = server.project("ann").await;
    let body = json!({ "project_id": project });
    let send = || server.post("ann", PATH, &body).header("idempotency-key", "once").header("prefer", "wait=60");
    // He gives up while the task is under way.
    tokio::select! {
        answered = send().send() => panic!("the task is not done: {answered:?}"),
        () = server.claimed() => {}
    }
    problem(send().send().await.unwrap(), 409, "request_in_progress").await;
    gate.add_permits(1);
    let response = loop {
        let response = send().header("prefer", "wait=1").send().await.unwrap();
        if response.status() != 409 {
            break response;
        }
    };
    assert_eq!(response.headers()["idempotency-replayed"], "true");
    let (status, body) = read(response).await;
    assert_eq!((status, body["result"]["message"].as_str()), (200, Some("Succeeded in attempt 1.")), "{body}");
    worker.drain(std::time::Duration::from_secs(5)).await;
}

#[tokio::test]
async fn a_loop_that_cannot_be_run_is_a_500_and_gives_its_key_back() {
    let server = Server::start().await;
    let project = server.project("ann").await;
    let send = || {
        let body = json!({ "project_id": project });
        server.post("ann", PATH, &body).header("prefer", "respond-async").header("idempotency-key", "once").send()
    };
    // No such workflow is deployed.
    let body = problem(send().await.unwrap(), 500, "loop_failed").await;
    assert_eq!(body["title"], "Failed to run autonomous loop");
    server.deploy(vec![activity("plan", "plan@1")]).await;
    assert_eq!(send().await.unwrap().status(), 202);
}

/// Waits until no run is open. Returns how many there are.
async fn closed(server: &Server) -> i64 {
    let open = "select exists (select from runs where closed_at is null)";
    let wait = async {
        while sqlx::query_scalar::<_, bool>(open).fetch_one(&server.pool).await.unwrap() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(60), wait).await.expect("the runs close");
    sqlx::query_scalar("select count(*) from runs").fetch_one(&server.pool).await.unwrap()
}

#[tokio::test]
async fn a_key_stands_for_one_run_also_after_a_failure_and_its_end() {
    let server = Server::start().await;
    server.deploy(vec![activity("plan", "plan@1")]).await;
    let worker = server.worker(vec![Work::new("plan@1", script(|_| async { Ok(json!({})) }))]).await;
    let project = server.project("ann").await;
    let send = |prefer: &str| {
        let body = json!({ "project_id": project });
        server.post("ann", PATH, &body).header("prefer", prefer).header("idempotency-key", "once").send()
    };
    // The loop starts, the answer fails, the run closes.
    server.break_answers().await;
    problem(send("respond-async").await.unwrap(), 500, "loop_failed").await;
    assert_eq!(closed(&server).await, 1);
    server.mend_answers().await;
    let run: uuid::Uuid = sqlx::query_scalar("select run_id from runs").fetch_one(&server.pool).await.unwrap();
    let again = send("wait=30").await.unwrap();
    assert_eq!(run_of(&again), run.to_string());
    let (status, body) = read(again).await;
    assert_eq!((status, body["result"]["message"].as_str()), (200, Some("Completed.")), "{body}");
    // The process died between the start and the answer.
    sqlx::query(
        "update idempotency_keys set status = null, location = null, body = null, claimed_at = '-infinity'
         where key = 'once'",
    )
    .execute(&server.pool)
    .await
    .unwrap();
    assert_eq!(run_of(&send("respond-async").await.unwrap()), run.to_string());
    assert_eq!(closed(&server).await, 1);
    // Without the key it is another request.
    assert_ne!(run_of(&server.trigger("ann", &project, "respond-async").await), run.to_string());
    assert_eq!(closed(&server).await, 2);
    worker.drain(std::time::Duration::from_secs(5)).await;
}

#[tokio::test]
async fn a_key_that_found_an_open_loop_stands_for_that_one() {
    let server = Server::start().await;
    server.deploy(vec![question("ask", None)]).await;
    let worker = server.worker(vec![]).await;
    let project = server.project("ann").await;
    let open = run_of(&server.trigger("ann", &project, "wait=30").await);
    let send = || {
        let body = json!({ "project_id": project });
        server.post("ann", PATH, &body).header("prefer", "wait=30").header("idempotency-key", "once").send()
    };
    server.break_answers().await;
    problem(send().await.unwrap(), 500, "loop_failed").await;
    server.mend_answers().await;
    let cancel = server.post("ann", &format!("/v1/runs/{open}/cancel"), &json!({"reason": "enough"}));
    assert!(cancel.send().await.unwrap().status().is_success());
    assert_eq!(closed(&server).await, 1);
    assert_eq!(run_of(&send().await.unwrap()), open);
    assert_eq!(closed(&server).await, 1);
    worker.drain(std::time::Duration::from_secs(5)).await;
}
