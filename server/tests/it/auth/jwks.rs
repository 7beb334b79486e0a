//! Keys that the issuer publishes: what is believed, when it is read again, and what a bad set changes (nothing).

use super::{CENTURY_S, RSA_N, RSA_PEM, RSA_TOKEN, base64url, claims, ed_public, ed_token, header, sign};
use crate::support::{SECRET, Server, key, problem};
use loopwright_activities::testing::ClosedPort;
use loopwright_server::{
    config,
    rest::{JwksPace, auth::Registry},
};
use serde_json::{Value, json};
use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    task::JoinHandle,
};

/// Every question is a fetch.
const ALWAYS: JwksPace = JwksPace { ttl: Duration::ZERO, again: Duration::ZERO };
/// Unknown ids are asked for at once, what is known is believed for ever.
const EAGER: JwksPace = JwksPace { ttl: Duration::MAX, again: Duration::ZERO };

/// An issuer on a socket: it answers every request with the bytes that are set.
struct Issuer {
    url: url::Url,
    answer: Arc<Mutex<Vec<u8>>>,
    seen: Arc<AtomicUsize>,
    /// Who holds it keeps the issuer from answering.
    gate: Arc<tokio::sync::Mutex<()>>,
    task: JoinHandle<()>,
}

impl Drop for Issuer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Issuer {
    async fn publishing(keys: &[Value]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/jwks.json", listener.local_addr().unwrap()).parse().unwrap();
        let answer: Arc<Mutex<Vec<u8>>> = Arc::default();
        let seen: Arc<AtomicUsize> = Arc::default();
        let gate: Arc<tokio::sync::Mutex<()>> = Arc::default();
        let (says, counts, opens) = (answer.clone(), seen.clone(), gate.clone());
        let task = tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    let Ok(byte) = stream.read_u8().await else { break };
                    head.push(byte);
                }
                counts.fetch_add(1, Ordering::SeqCst);
                drop(opens.lock().await);
                let bytes = says.lock().unwrap().clone();
                drop(stream.write_all(&bytes).await);
            }
        });
        let issuer = Self { url, answer, seen, gate, task };
        issuer.publish(keys);
        issuer
    }

    fn publish(&self, keys: &[Value]) {
        self.say("200 OK", "", &json!({ "keys": keys }).to_string());
    }

    fn say(&self, status: &str, headers: &str, body: &str) {
        let length = body.len();
        let text = format!("HTTP/1.1 {status}\r\n{headers}content-length: {length}\r\nconnection: close\r\n\r\n{body}");
        *self.answer.lock().unwrap() = text.into_bytes();
    }

    fn seen(&self) -> usize {
        self.seen.load(Ordering::SeqCst)
    }

    fn auth(&self) -> config::Auth {
        let mut auth = config::File::default().resolve().unwrap().auth;
        auth.jwks_url = Some(self.url.clone());
        auth.keys = vec![key("local", SECRET)];
        auth.lifetime_s_max = CENTURY_S;
        auth
    }

    fn registry(&self, pace: JwksPace) -> Registry {
        Registry::new(&self.auth()).unwrap().with_pace(pace)
    }
}

/// The Ed25519 key of `seed`, published as `kid`.
fn ed(seed: u8, kid: &str) -> Value {
    json!({"kty": "OKP", "crv": "Ed25519", "use": "sig", "kid": kid, "x": base64url(&ed_public(seed))})
}

fn by(seed: u8, kid: &str) -> String {
    ed_token(seed, &json!({"alg": "EdDSA", "kid": kid}))
}

/// The code of a refusal; empty if it passes.
async fn code(registry: &Registry, token: &str) -> &'static str {
    registry.verify(Some(&format!("Bearer {token}"))).await.map_or_else(|error| error.code.as_str(), |_| "")
}

#[tokio::test]
async fn a_published_key_verifies_by_its_one_algorithm_alone() {
    let shared = "a-shared-secret-that-everybody-can-read";
    let n = RSA_N;
    let issuer = Issuer::publishing(&[
        json!({"kty": "RSA", "kid": "rsa", "alg": "RS256", "n": n, "e": "AQAB"}),
        json!({"kty": "RSA", "kid": "enc", "use": "enc", "n": n, "e": "AQAB"}),
        json!({"kty": "RSA", "kid": "rs512", "alg": "RS512", "n": n, "e": "AQAB"}),
        json!({"kty": "RSA", "n": n, "e": "AQAB"}),
        json!({"kty": "oct", "kid": "shared", "alg": "HS256", "k": base64url(shared.as_bytes())}),
        json!({"kty": "OKP", "crv": "Ed448", "kid": "ed448", "x": "AAAA"}),
        json!("nonsense"),
        ed(7, "ed"),
    ])
    .await;
    let registry = issuer.registry(EAGER);
    for (name, token) in [
        ("rsa", RSA_TOKEN.to_owned()),
        ("ed", by(7, "ed")),
        ("a configured one", sign(&header("local"), &claims(), SECRET)),
    ] {
        assert_eq!(code(&registry, &token).await, "", "{name}");
    }
    for (name, token) in [
        ("a shared secret that is published", sign(&header("shared"), &claims(), shared)),
        ("the RSA key as a secret", sign(&header("rsa"), &claims(), RSA_PEM)),
        ("its modulus as a secret", sign(&header("rsa"), &claims(), RSA_N)),
        ("the Ed25519 key as a secret", sign(&header("ed"), &claims(), &base64url(&ed_public(7)))),
        (
            "for encryption",
            RSA_TOKEN.replacen(
                &base64url(br#"{"alg":"RS256","kid":"rsa"}"#),
                &base64url(br#"{"alg":"RS256","kid":"enc"}"#),
                1,
            ),
        ),
        ("another's signature", by(8, "ed")),
        ("no key id", ed_token(7, &json!({"alg": "EdDSA"}))),
        ("the configured one's id", by(7, "local")),
    ] {
        assert_eq!(code(&registry, &token).await, "token_invalid", "{name}");
    }
}

#[tokio::test]
async fn a_rotation_in_the_middle_of_traffic_refuses_nobody() {
    let issuer = Issuer::publishing(&[ed(1, "old")]).await;
    for pace in [EAGER, ALWAYS] {
        issuer.publish(&[ed(1, "old")]);
        let registry = issuer.registry(pace);
        assert_eq!(code(&registry, &by(1, "old")).await, "");
        // The new one is published, then signs; tokens of the old one are still about.
        issuer.publish(&[ed(1, "old"), ed(2, "new")]);
        let (old, new) = (by(1, "old"), by(2, "new"));
        let traffic = (0..64).map(|n| code(&registry, if n % 2 == 0 { &old } else { &new }));
        let refused: Vec<_> =
            futures_util::future::join_all(traffic).await.into_iter().filter(|code| !code.is_empty()).collect();
        assert!(refused.is_empty(), "{pace:?}: {refused:?}");
        // And withdrawn. A token that was forged by it later is nothing, whichever is asked first.
        issuer.publish(&[ed(2, "new")]);
        assert_eq!(code(&registry, &new).await, "");
        if pace == ALWAYS {
            assert_eq!(code(&registry, &old).await, "token_invalid");
        }
    }
}

#[tokio::test]
async fn a_key_that_is_withdrawn_ends_with_the_age_of_the_set() {
    let issuer = Issuer::publishing(&[ed(1, "a"), ed(2, "b")]).await;
    let registry = issuer.registry(ALWAYS);
    assert_eq!(code(&registry, &by(1, "a")).await, "");
    issuer.publish(&[ed(2, "b")]);
    // Not once more, not even the first time.
    assert_eq!(code(&registry, &by(1, "a")).await, "token_invalid");
    // Another key under the same name is another key.
    issuer.publish(&[ed(3, "a")]);
    assert_eq!((code(&registry, &by(3, "a")).await, code(&registry, &by(1, "a")).await), ("", "token_invalid"));
}

#[tokio::test]
async fn invented_key_ids_do_not_make_it_fetch() {
    let issuer = Issuer::publishing(&[ed(1, "a")]).await;
    let registry = issuer.registry(JwksPace::default());
    for n in 0..20 {
        let kid = format!("../../{n}' or '1'='1");
        assert_eq!(code(&registry, &by(1, &kid)).await, "token_invalid");
    }
    assert_eq!(issuer.seen(), 1, "once a minute");
    let many = (0..20).map(|_| code(&registry, RSA_TOKEN));
    assert!(futures_util::future::join_all(many).await.iter().all(|code| *code == "token_invalid"));
    assert_eq!((code(&registry, &by(1, "a")).await, issuer.seen()), ("", 1), "the good one is known all the while");
    // For what is configured here nobody is asked.
    assert_eq!(code(&issuer.registry(ALWAYS), &sign(&header("local"), &claims(), SECRET)).await, "");
    assert_eq!(issuer.seen(), 1);
}

// The fetch ended with the request that had begun it, and for a minute nobody else might: who invents key ids and hangs up had every
// published key refused.
#[tokio::test]
async fn a_caller_who_hangs_up_does_not_end_the_fetch_for_the_others() {
    let issuer = Issuer::publishing(&[ed(1, "a")]).await;
    let registry = issuer.registry(JwksPace::default());
    let shut = issuer.gate.lock().await;
    let invented = by(1, "invented");
    let asked = async {
        while issuer.seen() == 0 {
            tokio::task::yield_now().await;
        }
    };
    tokio::select! {
        said = code(&registry, &invented) => panic!("{said:?} without an answer of the issuer"),
        () = asked => {}
    }
    drop(shut);
    assert_eq!((code(&registry, &by(1, "a")).await, issuer.seen()), ("", 1));
    assert_eq!((code(&registry, &invented).await, issuer.seen()), ("token_invalid", 1));
}

#[tokio::test]
async fn while_the_issuer_is_away_what_is_known_counts() {
    let issuer = Issuer::publishing(&[]).await;
    issuer.say("503 Service Unavailable", "", "");
    let registry = issuer.registry(ALWAYS);
    // Never read: a good token is not thrown away, and what is configured here works.
    let error = registry.verify(Some(&format!("Bearer {}", by(1, "a")))).await.unwrap_err();
    assert_eq!((error.code.as_str(), error.retry_after_s), ("unavailable", Some(60)));
    assert_eq!(code(&registry, &sign(&header("local"), &claims(), SECRET)).await, "");
    issuer.publish(&[ed(1, "a")]);
    assert_eq!(code(&registry, &by(1, "a")).await, "");
    // Away again.
    issuer.say("500 Internal Server Error", "", "");
    assert_eq!(code(&registry, &by(1, "a")).await, "");
    assert_eq!(code(&registry, &by(2, "b")).await, "token_invalid");
    // Nobody listens at all.
    let mut auth = issuer.auth();
    let gone = ClosedPort::new();
    auth.jwks_url = Some(format!("http://{}/", gone.address()).parse().unwrap());
    assert_eq!(code(&Registry::new(&auth).unwrap(), &by(1, "a")).await, "unavailable");
}

#[tokio::test]
async fn a_set_that_breaks_a_rule_changes_nothing() {
    let elsewhere = Issuer::publishing(&[ed(2, "b")]).await;
    let issuer = Issuer::publishing(&[ed(1, "a")]).await;
    let registry = issuer.registry(ALWAYS);
    assert_eq!(code(&registry, &by(1, "a")).await, "");
    let set = |keys: &[Value]| json!({ "keys": keys }).to_string();
    let large = json!({"keys": [ed(2, "b")], "pad": "x".repeat(200_000)}).to_string();
    let many: Vec<Value> = (0..65).map(|n| ed(2, &format!("b{n}"))).collect();
    for (name, status, headers, body) in [
        ("a redirect", "302 Found", format!("location: {}\r\n", elsewhere.url), String::new()),
        ("too large", "200 OK", String::new(), large),
        ("too many", "200 OK", String::new(), set(&many)),
        ("the same id twice", "200 OK", String::new(), set(&[ed(2, "b"), ed(3, "b")])),
        ("empty", "200 OK", String::new(), set(&[])),
        ("only a shared secret", "200 OK", String::new(), set(&[json!({"kty": "oct", "kid": "b", "k": "c2VjcmV0"})])),
        ("a page", "200 OK", "content-type: text/html\r\n".into(), "<html>".into()),
        ("not modified", "304 Not Modified", String::new(), String::new()),
    ] {
        issuer.say(status, &headers, &body);
        let asked = issuer.seen();
        assert_eq!(code(&registry, &by(2, "b")).await, "token_invalid", "{name}");
        assert_eq!(code(&registry, &by(1, "a")).await, "", "{name}");
        assert!(issuer.seen() > asked, "{name}: it was asked");
    }
    assert_eq!(elsewhere.seen(), 0, "no redirect is followed");
}

#[tokio::test]
async fn addresses_and_keys_in_a_token_are_not_looked_at() {
    let evil = Issuer::publishing(&[ed(2, "b")]).await;
    let issuer = Issuer::publishing(&[ed(1, "a")]).await;
    let registry = issuer.registry(EAGER);
    for header in [
        json!({"alg": "EdDSA", "kid": "b", "jku": evil.url.as_str()}),
        json!({"alg": "EdDSA", "kid": "a", "x5u": evil.url.as_str()}),
        json!({"alg": "EdDSA", "kid": "a", "jwk": ed(2, "a")}),
        json!({"alg": "EdDSA", "kid": evil.url.as_str()}),
    ] {
        assert_eq!(code(&registry, &ed_token(2, &header)).await, "token_invalid", "{header}");
    }
    assert_eq!(evil.seen(), 0);
}

/// The environment is that of a process, so one of the tests above is run in a process of its own.
#[tokio::test]
async fn the_issuer_is_asked_without_the_proxy_of_the_environment() {
    let proxy = Issuer::publishing(&[]).await;
    let mut child = tokio::process::Command::new(std::env::current_exe().unwrap());
    child
        .args(["auth::jwks::a_published_key_verifies_by_its_one_algorithm_alone", "--exact"])
        .env_remove("no_proxy")
        .env_remove("NO_PROXY")
        .kill_on_drop(true);
    for name in ["http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"] {
        child.env(name, proxy.url.as_str());
    }
    let ended = child.output().await.unwrap();
    let said = String::from_utf8_lossy(&ended.stdout);
    assert!(ended.status.success() && said.contains("1 passed"), "{said}");
    assert_eq!(proxy.seen(), 0);
}

#[tokio::test]
async fn a_server_with_an_issuer_needs_no_secret_and_says_when_it_is_away() {
    let issuer = Issuer::publishing(&[ed(1, "a")]).await;
    let url = issuer.url.clone();
    let server = Server::start_with(|config| {
        config.auth.keys.clear();
        config.auth.jwks_url = Some(url);
    })
    .await;
    let ask = |token: String| server.request(reqwest::Method::GET, "/v1/credits").bearer_auth(token).send();
    assert_eq!(ask(by(1, "a")).await.unwrap().status(), 200);
    problem(ask(by(2, "a")).await.unwrap(), 401, "token_invalid").await;
    let away = Issuer::publishing(&[]).await;
    let url = away.url.clone();
    let server = Server::start_with(|config| config.auth.jwks_url = Some(url)).await;
    let response = server.request(reqwest::Method::GET, "/v1/credits").bearer_auth(by(1, "x")).send().await.unwrap();
    assert_eq!(response.headers()["retry-after"], "60");
    problem(response, 503, "unavailable").await;
}
