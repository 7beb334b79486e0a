//! What the server bounds, and how it says so.

use crate::support::{Server, problem, read};
use reqwest::Method;
use serde_json::json;
use std::time::{Duration, Instant};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

#[tokio::test]
async fn a_body_too_large_is_a_problem_document() {
    let server = Server::start_with(|config| config.http.body_bytes_max = 1000).await;
    let body = json!({"name": "n", "idea": "x".repeat(2000)});
    problem(server.post("ann", "/v1/projects", &body).send().await.unwrap(), 413, "body_too_large").await;
    // Also when its length is not announced.
    let chunks = (0..20).map(|_| Ok::<_, std::io::Error>("x".repeat(100)));
    let stream = reqwest::Body::wrap_stream(futures_util::stream::iter(chunks));
    let request = server.request(Method::POST, "/v1/projects").bearer_auth(server.token("ann"));
    let response = request.header("content-type", "application/json").body(stream).send().await.unwrap();
    problem(response, 413, "body_too_large").await;
}

#[tokio::test]
async fn a_slow_head_is_cut_off() {
    let server = Server::start_with(|config| config.http.header_timeout_ms = 200).await;
    // Nobody cuts this one off before its head is whole.
    let patient = Server::start_with(|config| config.http.header_timeout_ms = 600_000).await;
    let begin = async |address: std::net::SocketAddr| {
        let mut socket = TcpStream::connect(address).await.unwrap();
        socket.write_all(b"GET /healthz HTTP/1.1\r\nhost: x\r\n").await.unwrap();
        socket
    };
    let mut other = begin(patient.address).await;
    let begun = Instant::now();
    let mut socket = begin(server.address).await;
    let mut rest = Vec::new();
    // The end comes from the server; the limit is a guard. The setting's default is 10 s, so that an end before that is the setting's.
    let read = tokio::time::timeout(Duration::from_secs(120), socket.read_to_end(&mut rest)).await;
    assert!(read.is_ok(), "the connection stays open");
    let took = begun.elapsed();
    assert!((Duration::from_millis(150)..Duration::from_secs(8)).contains(&took), "{took:?}");
    // It is the slow head that ends it: the same beginning is answered where there is time for the rest.
    other.write_all(b"connection: close\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    other.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
}

#[tokio::test]
async fn a_head_too_large_is_refused() {
    let server = Server::start().await;
    let request = server.request(Method::GET, "/healthz").header("x-pad", "x".repeat(100_000));
    assert_eq!(request.send().await.unwrap().status(), 431);
}

#[tokio::test]
async fn a_user_has_a_rate_and_others_do_not_feel_it() {
    let server = Server::start_with(|config| config.http.requests_per_minute = 8).await;
    for _ in 0..2 {
        assert_eq!(server.get("ann", "/v1/projects").send().await.unwrap().status(), 200);
    }
    let refused = server.get("ann", "/v1/projects").send().await.unwrap();
    assert!(refused.headers()["retry-after"].to_str().unwrap().parse::<u64>().unwrap() >= 1);
    problem(refused, 429, "rate_limited").await;
    assert_eq!(server.get("bob", "/v1/projects").send().await.unwrap().status(), 200);
}

#[tokio::test]
async fn unknown_routes_and_methods_are_problem_documents() {
    let server = Server::start().await;
    problem(server.get("ann", "/nothing").send().await.unwrap(), 404, "not_found").await;
    problem(server.get("ann", "/v1/projects/not-an-id").send().await.unwrap(), 404, "not_found").await;
    let response = server.request(Method::DELETE, "/v1/projects").send().await.unwrap();
    assert_eq!(response.headers()["allow"], "GET, POST");
    problem(response, 405, "method_not_allowed").await;
    let response = server.request(Method::GET, "/orchestrate/run-loop").send().await.unwrap();
    assert_eq!(response.headers()["allow"], "POST");
    problem(response, 405, "method_not_allowed").await;
}

#[tokio::test]
async fn health_readiness_and_metrics_need_no_token() {
    let server = Server::start().await;
    let get = |path: &str| server.request(Method::GET, path).send();
    let response = get("/healthz").await.unwrap();
    assert!(response.headers().contains_key("x-request-id"));
    assert_eq!(read(response).await, (200, json!({"status": "ok"})));
    assert_eq!(read(get("/readyz").await.unwrap()).await, (200, json!({"status": "ready"})));
    server.project("ann").await;
    let (status, text) = read(get("/metrics").await.unwrap()).await;
    let text = text.as_str().unwrap();
    assert!(status == 200 && text.contains(r#"http_requests_total{route="/v1/projects",status="201"}"#), "{text}");
    sqlx::query("update _sqlx_migrations set success = false where version = 1").execute(&server.pool).await.unwrap();
    problem(get("/readyz").await.unwrap(), 503, "unavailable").await;
}

#[tokio::test]
async fn a_stopping_server_ends_idle_connections() {
    let server = Server::start().await;
    let mut idle = TcpStream::connect(server.address).await.unwrap();
    idle.write_all(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    let mut first = [0u8; 15];
    idle.read_exact(&mut first).await.unwrap();
    assert_eq!(&first, b"HTTP/1.1 200 OK");
    tokio::time::timeout(Duration::from_secs(5), server.stop()).await.expect("stops at once");
    let mut rest = Vec::new();
    idle.read_to_end(&mut rest).await.unwrap();
}
