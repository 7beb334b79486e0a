//! Projects, their files, and idempotent creation.

use crate::support::{Server, problem, read};
use reqwest::Method;
use serde_json::json;

#[tokio::test]
async fn everybody_sees_only_his_own() {
    let server = Server::start().await;
    let (anns, bobs) = (server.project("ann").await, server.project("bob").await);
    let (_, page) = read(server.get("ann", "/v1/projects").send().await.unwrap()).await;
    let ids: Vec<_> = page["items"].as_array().unwrap().iter().map(|p| p["id"].as_str().unwrap()).collect();
    assert_eq!(ids, [anns.as_str()]);
    for path in ["", "/files", "/files/a", "/archive"] {
        problem(server.get("ann", &format!("/v1/projects/{bobs}{path}")).send().await.unwrap(), 404, "not_found").await;
    }
}

#[tokio::test]
async fn lists_are_paged() {
    let server = Server::start().await;
    for _ in 0..5 {
        server.project("ann").await;
    }
    let mut cursor = String::new();
    let mut seen = std::collections::BTreeSet::new();
    for expected in [2, 2, 1] {
        let (_, page) = read(server.get("ann", &format!("/v1/projects?limit=2{cursor}")).send().await.unwrap()).await;
        let items = page["items"].as_array().unwrap();
        assert_eq!(items.len(), expected);
        seen.extend(items.iter().map(|p| p["id"].as_str().unwrap().to_owned()));
        cursor = page["next_cursor"].as_str().map(|c| format!("&cursor={c}")).unwrap_or_default();
    }
    assert!(cursor.is_empty() && seen.len() == 5);
    for query in ["limit=0", "limit=101", "limit=x", "cursor=x", "lmit=1"] {
        problem(server.get("ann", &format!("/v1/projects?{query}")).send().await.unwrap(), 400, "query_invalid").await;
    }
}

#[tokio::test]
async fn files_are_shown_at_their_newest_version() {
    let server = Server::start().await;
    let project = server.project("ann").await;
    for (path, version, content, deleted) in [
        ("a b.txt", 1, "old", false),
        ("a b.txt", 2, "new", false),
        ("gone.txt", 1, "x", false),
        ("gone.txt", 2, "", true),
    ] {
        sqlx::query(
            "insert into project_files (project_id, path, version, sha256, size_bytes, content, deleted)
             values ($1::uuid, $2, $3, sha256($4), octet_length($4), $4, $5)",
        )
        .bind(&project)
        .bind(path)
        .bind(version)
        .bind(content.as_bytes())
        .bind(deleted)
        .execute(&server.pool)
        .await
        .unwrap();
    }
    let (_, page) = read(server.get("ann", &format!("/v1/projects/{project}/files")).send().await.unwrap()).await;
    assert_eq!(page["items"].as_array().unwrap().len(), 1, "{page}");
    assert_eq!((&page["items"][0]["path"], &page["items"][0]["version"]), (&json!("a b.txt"), &json!(2)));
    let response = server.get("ann", &format!("/v1/projects/{project}/files/a%20b.txt")).send().await.unwrap();
    assert_eq!(response.headers()["x-content-type-options"], "nosniff");
    assert_eq!(response.text().await.unwrap(), "new");
    for path in ["gone.txt", "none", "..%2f..%2fetc%2fpasswd", "%00"] {
        let response = server.get("ann", &format!("/v1/projects/{project}/files/{path}")).send().await.unwrap();
        problem(response, 404, "not_found").await;
    }
}

#[tokio::test]
async fn a_repeated_creation_gets_the_first_answer() {
    let server = Server::start().await;
    let body = json!({"name": "n", "idea": "i"});
    let create = |key: &str, body: &serde_json::Value| {
        server.post("ann", "/v1/projects", body).header("idempotency-key", key).send()
    };
    let first = create("k1", &body).await.unwrap();
    let location = first.headers()["location"].to_str().unwrap().to_owned();
    let (status, first) = read(first).await;
    assert_eq!((status, location), (201, format!("/v1/projects/{}", first["id"].as_str().unwrap())));
    let again = create("k1", &body).await.unwrap();
    assert_eq!(again.headers()["idempotency-replayed"], "true");
    assert_eq!(read(again).await, (201, first));
    problem(create("k1", &json!({"name": "other", "idea": "i"})).await.unwrap(), 422, "idempotency_key_reused").await;
    problem(create(&"k".repeat(256), &body).await.unwrap(), 400, "header_invalid").await;
    // Another user's key is another key.
    let other = server.post("bob", "/v1/projects", &body).header("idempotency-key", "k1").send().await.unwrap();
    assert!(other.headers().get("idempotency-replayed").is_none());
    // Many at once: one creates, the others are told to come again or get its answer.
    let many = (0..8).map(|_| create("k2", &body));
    let mut ids = std::collections::BTreeSet::new();
    for response in futures_util::future::join_all(many).await {
        match read(response.unwrap()).await {
            (201, body) => drop(ids.insert(body["id"].as_str().unwrap().to_owned())),
            (status, body) => assert_eq!((status, body["code"].as_str()), (409, Some("request_in_progress"))),
        }
    }
    assert_eq!(ids.len(), 1);
}

#[tokio::test]
async fn bodies_that_do_not_fit_are_refused_with_a_pointer() {
    let server = Server::start().await;
    for (body, status, code) in [
        (json!({"name": "n"}), 400, "body_invalid"),
        (json!({"name": "n", "idea": "i", "extra": 1}), 400, "body_invalid"),
        (json!({"name": 1, "idea": "i"}), 400, "body_invalid"),
        (json!([]), 400, "body_invalid"),
        (json!({"name": " ", "idea": "i"}), 422, "input_invalid"),
        (json!({"name": "n", "idea": "x".repeat(20_001)}), 422, "input_invalid"),
        (json!({"name": "n", "idea": "a\u{0}b"}), 422, "input_invalid"),
    ] {
        let problem = problem(server.post("ann", "/v1/projects", &body).send().await.unwrap(), status, code).await;
        if status == 422 {
            assert!(problem["errors"][0]["pointer"].is_string());
        }
    }
    let form = server.request(Method::POST, "/v1/projects").bearer_auth(server.token("ann"));
    let form = form.header("content-type", "application/x-www-form-urlencoded").body("name=a").send().await.unwrap();
    problem(form, 415, "media_type_unsupported").await;
}
