//! Keys of users over REST, and keys of all on the command line.

use crate::{
    cli::{loopwright, text},
    support::{MIGRATIONS, Server, problem, read},
};
use loopwright_activities::keys::Ring;
use loopwright_engine::embedded::testing;
use reqwest::Method;
use serde_json::{Value, json};
use std::{
    io::{Read, Write},
    net::TcpListener,
    path::Path,
    process::{Output, Stdio},
    sync::{Arc, Mutex},
};

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
async fn a_user_keeps_eight_keys_and_a_ninth_waits_for_one_to_go() {
    let server = server(false).await;
    let key = |n: u32| json!({"provider": "gemini", "key": format!("sk-mine-0123456789abcdefghi{n}")});
    for n in 0..8 {
        assert_eq!(put(&server, "ann", &key(n)).await.status(), 200, "{n}");
    }
    problem(put(&server, "ann", &key(8)).await, 409, "keys_full").await;
    assert_eq!(put(&server, "bob", &key(8)).await.status(), 200);
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

/// A provider on a socket that knows one good key; it keeps the heads of requests.
struct Provider {
    address: String,
    heads: Arc<Mutex<Vec<String>>>,
}

const GOOD: &str = "sk-or-v1-good-0123456789abcd";
const BAD: &str = "sk-or-v1-bad-0123456789wxyz";

impl Provider {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let heads: Arc<Mutex<Vec<String>>> = Arc::default();
        let seen = heads.clone();
        // It ends with the process of the tests.
        std::thread::spawn(move || {
            while let Ok((mut stream, _)) = listener.accept() {
                let (mut head, mut byte) = (Vec::new(), [0]);
                while !head.ends_with(b"\r\n\r\n") && matches!(stream.read(&mut byte), Ok(1)) {
                    head.extend(byte);
                }
                let head = String::from_utf8_lossy(&head).into_owned();
                let (status, body) = match head.contains(GOOD) {
                    true => ("200 OK", r#"{"data":{"label":"x","usage":1,"limit_remaining":null}}"#),
                    false => ("401 Unauthorized", r#"{"error":{"code":401,"message":"upstream text"}}"#),
                };
                seen.lock().unwrap().push(head);
                let length = body.len();
                let answer = format!(
                    "HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}"
                );
                drop(stream.write_all(answer.as_bytes()));
            }
        });
        Self { address, heads }
    }

    fn base(&self) -> String {
        format!("http://{}/api/v1", self.address)
    }

    fn heads(&self) -> Vec<String> {
        self.heads.lock().unwrap().clone()
    }
}

/// Runs the program over a database, with `input` on its standard input.
fn run(dir: &Path, env: &[(&str, String)], args: &[&str], input: &str) -> Output {
    let mut command = loopwright(dir);
    command.envs(env.iter().cloned()).args(args);
    let piped = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = piped.spawn().unwrap();
    // A command that reads nothing may have ended already.
    drop(child.stdin.take().unwrap().write_all(input.as_bytes()));
    child.wait_with_output().unwrap()
}

#[tokio::test]
async fn a_key_of_the_platform_is_added_tested_and_rotated_from_the_command_line() {
    let pool = testing::database(MIGRATIONS).await;
    let dir = tempfile::tempdir().unwrap();
    let provider = Provider::start();
    let ring = format!("a:{}=", "A".repeat(43));
    let env = [
        ("DATABASE_URL", testing::url(&pool)),
        ("OPENROUTER_BASE_URL", provider.base()),
        ("LOOPWRIGHT_KEY_ENCRYPTION_KEYS", ring),
    ];
    let run = |args: &[&str], input: &str| run(dir.path(), &env, args, input);
    let json = |args: &[&str]| -> Value { serde_json::from_slice(&run(args, "").stdout).unwrap() };
    let none = run(&["api-keys", "test", "--all"], "");
    assert!(none.status.code() == Some(1) && text(&none).contains("--platform"), "{}", text(&none));
    // From standard input, never an argument.
    let added =
        run(&["api-keys", "add", "openrouter", "--platform", "--label", "shared", "--json"], &format!("{GOOD}\n"));
    assert_eq!(added.status.code(), Some(0), "{}", text(&added));
    let added: Value = serde_json::from_slice(&added.stdout).unwrap();
    assert_eq!(
        (&added[0]["user_id"], &added[0]["source"], &added[0]["last4"]),
        (&Value::Null, &json!("sealed"), &json!("abcd"))
    );
    let id = added[0]["id"].as_str().unwrap().to_owned();
    for (args, why) in [
        (vec!["api-keys", "add", "openrouter", "--platform", "--model", "m"], "--model"),
        (vec!["api-keys", "add", "mistral", "--platform"], "gemini, openrouter"),
    ] {
        let refused = run(&args, GOOD);
        assert!(!refused.status.success() && text(&refused).contains(why), "{}", text(&refused));
    }
    // Asked about, by any of its names.
    for name in [id.as_str(), "shared", "--all"] {
        let tested = json(&["api-keys", "test", name, "--json"]);
        assert_eq!(
            (tested[0]["verdict"].as_str(), tested[0]["id"].as_str()),
            (Some("works"), Some(id.as_str())),
            "{tested}"
        );
    }
    assert_eq!(provider.heads().len(), 3);
    assert!(provider.heads()[0].starts_with("GET /api/v1/key HTTP/1.1"), "{:?}", provider.heads());
    // A test says what to do and does nothing.
    run(&["api-keys", "disable", &id], "");
    let tested = run(&["api-keys", "test", "shared"], "");
    let said = text(&tested);
    assert!(
        tested.status.success() && said.contains("works") && said.contains(&format!("api-keys enable {id}")),
        "{said}"
    );
    assert_eq!(json(&["api-keys", "list", "--json"])["items"][0]["status"], "disabled");
    let unknown = run(&["api-keys", "test", "nobody"], "");
    assert!(unknown.status.code() == Some(1) && text(&unknown).contains("api-keys list"), "{}", text(&unknown));
    run(&["api-keys", "enable", &id], "");
    assert_eq!(json(&["api-keys", "list", "--json"])["items"][0]["status"], "active");
    // Sealed again under another key of its own; then destroyed.
    assert_eq!(json(&["api-keys", "rewrap", "--anew", "--json"]), json!({"rows": 1, "left": 0}));
    run(&["api-keys", "revoke", &id], "");
    let revoked = run(&["api-keys", "test", &id], "");
    assert!(revoked.status.code() == Some(1) && text(&revoked).contains("revoked"), "{}", text(&revoked));
    assert_eq!(provider.heads().len(), 4);
}

// It said `permission denied for table history`, and nobody had said who may; before that, that the schema may not be changed.
#[tokio::test]
async fn what_runs_store_is_sealed_anew_by_the_owner_and_the_application_is_told_so() {
    let pool = testing::database(MIGRATIONS).await;
    sqlx::raw_sql(include_str!("../../../deploy/roles.sql")).execute(&pool).await.unwrap();
    // A role is the server's, which other tests may share.
    let login = "do $$ begin create role loopwright_test_keys login password 'test' in role loopwright_app;
                 exception when duplicate_object or unique_violation then null; end $$";
    sqlx::raw_sql(login).execute(&pool).await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let owner = testing::url(&pool);
    let mut application: url::Url = owner.parse().unwrap();
    application.set_username("loopwright_test_keys").unwrap();
    application.set_password(Some("test")).unwrap();
    let run = |url: &str, ring: &str, args: &[&str]| {
        let env = [("DATABASE_URL", url.to_owned()), ("LOOPWRIGHT_PAYLOAD_KEYS", ring.to_owned())];
        let env = if ring.is_empty() { &env[..1] } else { &env[..] };
        let output = crate::keys::run(dir.path(), env, args, "");
        (output.status.code(), text(&output))
    };
    let small = "dsl: 1\nname: small\ntimeout: 1h\nsteps:\n  - { id: rest, wait: { for: 1h } }\n";
    std::fs::write(dir.path().join("small.yaml"), small).unwrap();
    assert_eq!(run(&owner, "", &["workflow", "deploy", "small.yaml"]).0, Some(0));
    // Commands that read and start are the application's too: it has nothing to migrate.
    let (code, said) = run(application.as_str(), "", &["run", "start", "small"]);
    assert_eq!(code, Some(0), "{said}");
    // As if a worker had moved it.
    let moved =
        "insert into history (shard, run_id, seq, epoch, format, events) select shard, run_id, 1, 1, 1, '[]' from runs";
    sqlx::raw_sql(moved).execute(&pool).await.unwrap();
    let ring = format!("a:{}=", "A".repeat(43));
    let (code, said) = run(application.as_str(), &ring, &["keys", "reseal"]);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("owner's DATABASE_URL") && said.contains("[database]"), "{said}");
    for rows in [false, true] {
        let (code, said) = run(&owner, &ring, &["keys", "reseal"]);
        assert_eq!((code, said.starts_with("0 rows")), (Some(0), rows), "{said}");
    }
}

#[tokio::test]
async fn keys_are_tested_without_the_proxy_of_the_environment() {
    let pool = testing::database(MIGRATIONS).await;
    let dir = tempfile::tempdir().unwrap();
    let (provider, proxy) = (Provider::start(), Provider::start());
    let to_proxy = format!("http://{}", proxy.address);
    let mut env = vec![
        ("DATABASE_URL", testing::url(&pool)),
        ("OPENROUTER_BASE_URL", provider.base()),
        ("OPENROUTER_API_KEYS", format!("{GOOD},{BAD}")),
    ];
    for name in ["http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"] {
        env.push((name, to_proxy.clone()));
    }
    let run = |args: &[&str]| run(dir.path(), &env, args, "");
    let tested = run(&["api-keys", "test", "--all"]);
    let said = text(&tested);
    assert_eq!(tested.status.code(), Some(1), "{said}");
    assert!(
        said.contains("…abcd works") && said.contains("…wxyz refused") && said.contains("provider.key_invalid"),
        "{said}"
    );
    assert!(
        said.contains("1 of 2 keys do not work") && !said.contains("0123456789") && !said.contains("upstream"),
        "{said}"
    );
    // `doctor` says the same, a line a key; nobody is asked where it must not.
    let doctor = run(&["doctor", "--json"]);
    let checks: Value = serde_json::from_str(text(&doctor).lines().next().unwrap()).unwrap();
    let keys: Vec<&Value> = checks.as_array().unwrap().iter().filter(|check| check["name"] == "key").collect();
    assert_eq!(
        keys.iter().map(|check| check["state"].as_str().unwrap()).collect::<Vec<_>>(),
        ["ok", "failed"],
        "{checks}"
    );
    assert_eq!(provider.heads().len(), 4);
    run(&["doctor", "--offline"]);
    assert_eq!((provider.heads().len(), proxy.heads().len()), (4, 0));
    // Nobody is there: the key may be good.
    env[1].1 = "http://127.0.0.1:1/api/v1".into();
    let away = crate::keys::run(dir.path(), &env, &["api-keys", "test", "--all"], "");
    assert!(away.status.code() == Some(1) && text(&away).contains("unreachable"), "{}", text(&away));
}
