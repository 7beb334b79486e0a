//! Keys of users over REST and on the command line.

use crate::support::{Server, problem, read};
use loopwright_activities::keys::Ring;
use reqwest::Method;
use serde_json::{Value, json};

const KEY: &str = "sk-mine-0123456789abcdefghij";

async fn server(loopback: bool) -> Server {
    Server::start_with(|config| {
        // 32 zero bytes.
        let ring = format!("a:{}=", "A".repeat(43));
        config.keys.encryption = Some(Ring::parse(&ring.into()).unwrap());
        config.keys.loopback = loopback;
    })
    .await
}

async fn put(server: &Server, subject: &str, body: &Value) -> reqwest::Response {
    server.request(Method::PUT, "/v1/keys").bearer_auth(server.token(subject)).json(body).send().await.unwrap()
}

#[tokio::test]
async fn a_key_goes_in_and_never_comes_out() {
    let server = server(false).await;
    let (status, key) =
        read(put(&server, "ann", &json!({"provider": "gemini", "key": KEY, "label": "mine"})).await).await;
    assert_eq!(status, 200, "{key}");
    assert_eq!((&key["last4"], &key["status"], &key["provider"]), (&json!("ghij"), &json!("active"), &json!("gemini")));
    let id = key["id"].as_str().unwrap().to_owned();
    let one = format!("/v1/keys/{id}");
    let (_, list) = read(server.get("ann", "/v1/keys").send().await.unwrap()).await;
    let (_, shown) = read(server.get("ann", &one).send().await.unwrap()).await;
    assert_eq!(list["items"], json!([shown]));
    for text in [key.to_string(), list.to_string()] {
        assert!(!text.contains("0123456789") && !text.contains("cipher") && !text.contains("kek"), "{text}");
    }
    // Nobody else sees it.
    let (_, list) = read(server.get("bob", "/v1/keys").send().await.unwrap()).await;
    assert_eq!(list["items"], json!([]));
    problem(server.get("bob", &one).send().await.unwrap(), 404, "not_found").await;
    let delete = |subject: &str| server.request(Method::DELETE, &one).bearer_auth(server.token(subject)).send();
    problem(delete("bob").await.unwrap(), 404, "not_found").await;
    assert_eq!(delete("ann").await.unwrap().status(), 204);
    problem(delete("ann").await.unwrap(), 404, "not_found").await;
    problem(server.get("ann", &one).send().await.unwrap(), 404, "not_found").await;
    let text: String =
        sqlx::query_scalar("select row_to_json(k)::text from api_keys k").fetch_one(&server.pool).await.unwrap();
    assert!(text.contains("revoked") && !text.contains("0123456789abc"), "{text}");
}

#[tokio::test]
async fn what_is_no_key_is_refused_without_being_repeated() {
    let server = server(false).await;
    let at = |url: &str| json!({"provider": "openai_compatible", "key": KEY, "base_url": url, "model": "m"});
    for (body, status, code) in [
        (json!({"provider": "mistral", "key": KEY}), 422, "input_invalid"),
        (json!({"provider": "gemini", "key": "two words"}), 422, "input_invalid"),
        (json!({"provider": "gemini", "key": [KEY]}), 400, "body_invalid"),
        (json!({"provider": "gemini", "keys": KEY}), 400, "body_invalid"),
        (at("https://10.0.0.1/v1"), 422, "address_refused"),
        (at("https://169.254.169.254"), 422, "address_refused"),
        (at("https://localhost"), 422, "address_refused"),
        (at("http://127.0.0.1:11434"), 422, "address_refused"),
    ] {
        let answer = problem(put(&server, "ann", &body).await, status, code).await;
        assert!(!answer.to_string().contains("sk-mine"), "{answer}");
    }
    let plain = Server::start().await;
    problem(put(&plain, "ann", &json!({"provider": "gemini", "key": KEY})).await, 503, "keys_unavailable").await;
    let without = server.request(Method::PUT, "/v1/keys").json(&json!({})).send().await.unwrap();
    problem(without, 401, "token_missing").await;
}

#[tokio::test]
async fn the_operators_switch_opens_this_machine() {
    let server = server(true).await;
    let body =
        json!({"provider": "openai_compatible", "key": KEY, "base_url": "http://127.0.0.1:11434/v1/", "model": "m"});
    let (status, key) = read(put(&server, "ann", &body).await).await;
    assert_eq!((status, &key["base_url"]), (200, &json!("http://127.0.0.1:11434/v1")), "{key}");
    let inside = json!({"provider": "openai_compatible", "key": KEY, "base_url": "https://192.168.0.1", "model": "m"});
    problem(put(&server, "ann", &inside).await, 422, "address_refused").await;
}
