//! Runs over REST: looking, following, acting, and whose they are.

use crate::support::{Server, Work, activity, problem, question, read, run_of, script};
use futures_util::StreamExt;
use loopwright_engine::{client::Signal, definition::Approval};
use reqwest::Response;
use serde_json::{Value, json};
use std::time::Duration;

/// Reads server-sent events until `count` have come or the stream ends, as (event, id, data).
async fn events(response: Response, count: usize) -> Vec<(String, String, Value)> {
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["content-type"], "text/event-stream");
    let mut stream = response.bytes_stream();
    let (mut text, mut out) = (String::new(), Vec::new());
    while out.len() < count {
        let Ok(Some(chunk)) = tokio::time::timeout(Duration::from_secs(120), stream.next()).await else { break };
        text.push_str(std::str::from_utf8(&chunk.unwrap()).unwrap());
        while let Some((block, rest)) = text.split_once("\n\n") {
            let field = |name: &str| {
                block
                    .lines()
                    .find_map(|l| l.strip_prefix(name)?.strip_prefix(':'))
                    .unwrap_or_default()
                    .trim()
                    .to_owned()
            };
            if !field("event").is_empty() {
                out.push((field("event"), field("id"), serde_json::from_str(&field("data")).unwrap()));
            }
            text = rest.to_owned();
        }
    }
    out
}

async fn asked(server: &Server) -> (String, String, loopwright_engine::worker::WorkerHandle) {
    let approval = Approval { quorum: 1, fail_on_reject: false };
    server.deploy(vec![activity("plan", "plan@1"), question("ask", None), question("approve", Some(approval))]).await;
    let worker = server.worker(vec![Work::new("plan@1", script(|_| async { Ok(json!({})) }))]).await;
    let project = server.project("ann").await;
    let response = server.trigger("ann", &project, "wait=30").await;
    let run = run_of(&response);
    // The second trigger answers when the run is parked.
    server.trigger("ann", &project, "wait=30").await;
    (project, run, worker)
}

#[tokio::test]
async fn a_run_is_followed_and_steered_to_its_end() {
    let server = Server::start().await;
    let (project, run, worker) = asked(&server).await;
    let path = format!("/v1/runs/{run}");
    let (_, view) = read(server.get("ann", &path).send().await.unwrap()).await;
    assert_eq!(view["waiting"][0]["kind"], "signal", "{view}");
    assert_eq!(view["standing"]["message"], "Needs the user: Which color?");
    let (_, shown) = read(server.get("ann", &format!("/v1/projects/{project}")).send().await.unwrap()).await;
    assert_eq!(shown["open_run"], json!(run));

    let stream = server.get("ann", &format!("{path}/events")).send().await.unwrap();
    let signal = |payload: Value| {
        let body = json!({"name": "user_message", "payload": payload});
        server.post("ann", &format!("{path}/signals"), &body).header("idempotency-key", "m1").send()
    };
    problem(signal(json!({"text": 5})).await.unwrap(), 422, "input_invalid").await;
    let misspelled = json!({"name": "user_mesage", "payload": {"text": "blue"}});
    let response = server.post("ann", &format!("{path}/signals"), &misspelled).send().await.unwrap();
    let body = problem(response, 422, "input_invalid").await;
    assert!(body["detail"].as_str().unwrap().contains("`user_message`"), "{body}");
    assert_eq!(read(signal(json!({"text": "blue"})).await.unwrap()).await, (202, json!({"status": "accepted"})));
    assert_eq!(read(signal(json!({"text": "blue"})).await.unwrap()).await.1["status"], "duplicate");

    let decide = |step: &str, decision: &str| {
        server.post("ann", &format!("{path}/approvals/{step}"), &json!({"decision": decision})).send()
    };
    // A trigger would answer at once: the run is parked until it has read the message.
    let deadline = tokio::time::Instant::now() + Duration::from_secs(120);
    loop {
        let (_, view) = read(server.get("ann", &path).send().await.unwrap()).await;
        if view["waiting"][0]["kind"] == "approval" {
            break;
        }
        assert!(tokio::time::Instant::now() < deadline, "{view}");
        let seq = view["seq"].as_u64().unwrap();
        server.client().wait_change(run.parse().unwrap(), seq, Duration::from_millis(200)).await.unwrap();
    }
    problem(decide("plan", "approved").await.unwrap(), 409, "approval_not_waiting").await;
    problem(decide("approve", "maybe").await.unwrap(), 422, "input_invalid").await;
    assert_eq!(decide("approve", "approved").await.unwrap().status(), 202);

    let seen = events(stream, usize::MAX).await;
    let (last, transitions) = seen.split_last().unwrap();
    assert_eq!(last.0, "end");
    let ids: Vec<u64> = transitions.iter().map(|(_, id, _)| id.parse().unwrap()).collect();
    assert_eq!(ids, (1..=ids.len() as u64).collect::<Vec<_>>());
    assert!(transitions.iter().all(|(event, id, row)| event == "transition" && row["seq"].as_u64() == id.parse().ok()));
    // A client that reconnects goes on behind what it has seen.
    let resume = |id: &str| server.get("ann", &format!("{path}/events")).header("last-event-id", id).send();
    let rest = events(resume("2").await.unwrap(), usize::MAX).await;
    assert_eq!(rest, seen[2..]);
    let nothing = events(resume(&ids.len().to_string()).await.unwrap(), usize::MAX).await;
    assert_eq!(nothing.iter().map(|e| e.0.as_str()).collect::<Vec<_>>(), ["end"]);
    problem(resume("x").await.unwrap(), 400, "header_invalid").await;

    problem(signal(json!({"text": "late"})).await.unwrap(), 409, "run_closed").await;
    problem(decide("approve", "approved").await.unwrap(), 409, "run_closed").await;
    problem(server.post("ann", &format!("{path}/cancel"), &json!({})).send().await.unwrap(), 409, "run_closed").await;
    let (_, page) = read(server.get("ann", &format!("{path}/history?after=1&limit=1")).send().await.unwrap()).await;
    assert_eq!((&page["items"][0]["seq"], &page["next_after"]), (&json!(2), &json!(2)));
    worker.drain(Duration::from_secs(5)).await;
}

#[tokio::test]
async fn a_run_can_be_cancelled() {
    let server = Server::start().await;
    let (_, run, worker) = asked(&server).await;
    let response =
        server.post("ann", &format!("/v1/runs/{run}/cancel"), &json!({"reason": "enough"})).send().await.unwrap();
    assert_eq!(response.status(), 202);
    let seen = events(server.get("ann", &format!("/v1/runs/{run}/events")).send().await.unwrap(), usize::MAX).await;
    assert_eq!(seen.last().unwrap().0, "end");
    let (_, view) = read(server.get("ann", &format!("/v1/runs/{run}")).send().await.unwrap()).await;
    assert_eq!(view["status"], "cancelled");
    worker.drain(Duration::from_secs(5)).await;
}

#[tokio::test]
async fn a_cancel_says_how_long_stopping_may_take() {
    let server = Server::start().await;
    let (_, run, worker) = asked(&server).await;
    let cancel = |body: Value| server.post("ann", &format!("/v1/runs/{run}/cancel"), &body).send();
    for wrong in ["soon", "0s", "25h", "500ms"] {
        let refused = problem(cancel(json!({ "within": wrong })).await.unwrap(), 422, "input_invalid").await;
        assert_eq!(refused["errors"][0]["pointer"], "/within", "{refused}");
    }
    problem(cancel(json!({ "within": 5 })).await.unwrap(), 400, "body_invalid").await;
    assert_eq!(cancel(json!({"within": "10m", "reason": "enough"})).await.unwrap().status(), 202);
    let seen = events(server.get("ann", &format!("/v1/runs/{run}/events")).send().await.unwrap(), usize::MAX).await;
    assert_eq!(seen.last().unwrap().0, "end");
    let of_all = seen.iter().flat_map(|(_, _, row)| row["events"].as_array().cloned().unwrap_or_default());
    let bounded = of_all.filter(|event| event["type"] == "cleanup_bounded").collect::<Vec<_>>();
    assert_eq!(bounded.len(), 1, "{seen:?}");
    let (_, view) = read(server.get("ann", &format!("/v1/runs/{run}")).send().await.unwrap()).await;
    assert_eq!(view["status"], "cancelled");
    worker.drain(Duration::from_secs(5)).await;
}

#[tokio::test]
async fn a_run_is_paused_and_resumed_by_its_owner() {
    let server = Server::start().await;
    let (_, run, worker) = asked(&server).await;
    let ask = |what: &str, key: &str| {
        let path = format!("/v1/runs/{run}/{what}");
        server.post("ann", &path, &json!({"reason": "a look"})).header("idempotency-key", key.to_owned()).send()
    };
    let status = async |wanted: &str| {
        let deadline = tokio::time::Instant::now() + Duration::from_secs(120);
        loop {
            let (_, view) = read(server.get("ann", &format!("/v1/runs/{run}")).send().await.unwrap()).await;
            if view["status"] == wanted {
                return view;
            }
            assert!(tokio::time::Instant::now() < deadline, "{view}");
            let (id, seq) = (run.parse().unwrap(), view["seq"].as_u64().unwrap());
            server.client().wait_change(id, seq, Duration::from_millis(200)).await.unwrap();
        }
    };
    assert_eq!(read(ask("pause", "k").await.unwrap()).await, (202, json!({"status": "accepted"})));
    assert_eq!(read(ask("pause", "k").await.unwrap()).await, (202, json!({"status": "duplicate"})));
    let view = status("paused").await;
    assert_eq!(view["standing"]["message"], "Paused: it goes on when it is resumed.");
    assert_eq!(read(ask("resume", "k").await.unwrap()).await, (202, json!({"status": "accepted"})));
    status("running").await;
    let long = json!({"reason": "x".repeat(4_001)});
    let response = server.post("ann", &format!("/v1/runs/{run}/pause"), &long).send().await.unwrap();
    problem(response, 422, "input_invalid").await;
    worker.drain(Duration::from_secs(5)).await;
}

#[tokio::test]
async fn somebody_else_s_run_is_not_there() {
    let server = Server::start().await;
    let (_, run, worker) = asked(&server).await;
    for path in ["", "/history", "/events", "/updates/u", "/queries/at"] {
        let response = server.get("bob", &format!("/v1/runs/{run}{path}")).send().await.unwrap();
        problem(response, 404, "not_found").await;
    }
    for (path, body) in [
        ("signals", json!({"name": "user_message", "payload": {"text": "x"}})),
        ("updates", json!({"name": "user_message", "payload": {"text": "x"}})),
        ("approvals/approve", json!({"decision": "approved"})),
        ("cancel", json!({})),
        ("pause", json!({})),
        ("resume", json!({})),
    ] {
        let response = server.post("bob", &format!("/v1/runs/{run}/{path}"), &body).send().await.unwrap();
        problem(response, 404, "not_found").await;
    }
    let (_, page) = read(server.get("bob", "/v1/runs").send().await.unwrap()).await;
    assert_eq!(page["items"], json!([]));
    let (_, page) = read(server.get("ann", "/v1/runs?open=true").send().await.unwrap()).await;
    assert_eq!(page["items"][0]["run_id"], json!(run));
    problem(server.get("ann", "/v1/runs?open=perhaps").send().await.unwrap(), 400, "query_invalid").await;
    worker.drain(Duration::from_secs(5)).await;
}

#[tokio::test]
async fn streams_are_counted_and_end_with_the_server() {
    let server = Server::start_with(|config| config.http.streams_max = 1).await;
    let (_, run, worker) = asked(&server).await;
    let open = || server.get("ann", &format!("/v1/runs/{run}/events")).send();
    let first = open().await.unwrap();
    problem(open().await.unwrap(), 503, "streams_exhausted").await;
    let reading = tokio::spawn(events(first, usize::MAX));
    tokio::time::timeout(Duration::from_secs(5), server.stop()).await.expect("an open stream does not hold it up");
    assert!(reading.await.unwrap().iter().all(|e| e.0 == "transition"));
    worker.drain(Duration::from_secs(5)).await;
}

#[tokio::test]
async fn an_update_is_answered_and_a_query_asked_over_rest() {
    let server = Server::start().await;
    let (_, run, worker) = asked(&server).await;
    let path = format!("/v1/runs/{run}");
    let send = |body: Value, prefer: &'static str| {
        server.post("ann", &format!("{path}/updates"), &body).header("prefer", prefer).send()
    };
    let ask = |name: &str| server.get("ann", &format!("{path}/queries/{name}")).send();
    let (status, at) = read(ask("at").await.unwrap()).await;
    assert_eq!((status, &at["result"], &at["name"]), (200, &json!("running"), &json!("at")));
    let body = problem(ask("nothing").await.unwrap(), 404, "not_found").await;
    assert!(body["detail"].as_str().unwrap().contains("`at`"), "{body}");

    let wrong = json!({"name": "user_message", "payload": {"text": 5}, "id": "u0"});
    let (status, answer) = read(send(wrong.clone(), "wait=30").await.unwrap()).await;
    assert_eq!((status, &answer["status"], &answer["id"]), (200, &json!("rejected"), &json!("u0")), "{answer}");
    assert!(answer["problems"][0].is_string());
    let right = json!({"name": "user_message", "payload": {"text": "blue"}, "id": "u1"});
    let wanted = json!({"id": "u1", "status": "completed", "result": {"text": "blue"}});
    assert_eq!(read(send(right.clone(), "wait=30").await.unwrap()).await, (200, wanted.clone()));
    assert_eq!(read(send(right, "respond-async").await.unwrap()).await, (200, wanted.clone()));
    let shown = server.get("ann", &format!("{path}/updates/u1")).send().await.unwrap();
    assert_eq!(read(shown).await, (200, wanted));
    problem(server.get("ann", &format!("{path}/updates/u9")).send().await.unwrap(), 404, "not_found").await;
    problem(send(json!({"name": "x", "id": "a b"}), "wait=1").await.unwrap(), 422, "input_invalid").await;
    // No step takes it any more; it is told where to ask.
    let late = server
        .post("ann", &format!("{path}/updates"), &json!({"name": "user_message", "payload": {"text": "red"}}))
        .header("idempotency-key", "k1")
        .header("prefer", "respond-async")
        .send()
        .await
        .unwrap();
    assert_eq!(late.status(), 202);
    assert_eq!(late.headers()["location"], format!("{path}/updates/k1").as_str());
    assert_eq!(read(late).await.1["status"], "pending");
    server.client().terminate(run.parse().unwrap(), "enough").await.unwrap();
    let (status, failed) = read(server.get("ann", &format!("{path}/updates/k1")).send().await.unwrap()).await;
    assert_eq!((status, &failed["failure"]["code"]), (200, &json!("update.unanswered")), "{failed}");
    assert_eq!(read(ask("at").await.unwrap()).await.1["result"], "terminated");
    problem(send(json!({"name": "user_message"}), "wait=1").await.unwrap(), 409, "run_closed").await;
    worker.drain(Duration::from_secs(5)).await;
}

#[tokio::test]
async fn who_sends_to_a_run_that_nobody_drives_is_told_to_wait() {
    let server = Server::start().await;
    let (_, run, worker) = asked(&server).await;
    worker.drain(Duration::from_secs(5)).await;
    let client = server.client();
    let signal = |n: u32| Signal {
        name: "user_message".into(),
        payload: json!({"text": "more"}),
        dedupe_id: Some(n.to_string()),
        sender: None,
    };
    for n in 0..100 {
        assert!(client.signal(run.parse().unwrap(), signal(n)).await.unwrap(), "{n}");
    }
    let body = json!({"name": "user_message", "payload": {"text": "one more"}});
    let full = server.post("ann", &format!("/v1/runs/{run}/signals"), &body).send().await.unwrap();
    assert_eq!(full.headers()["retry-after"], "30");
    let told = problem(full, 429, "rate_limited").await;
    assert!(told["detail"].as_str().unwrap().starts_with("100 messages of this name wait"), "{told}");
}
