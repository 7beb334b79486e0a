//! The list of tokens that must be refused, and the few that must not.

use crate::support::{OTHER_SECRET, SECRET, Server, problem, read};
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use loopwright_server::{config, rest::auth::Registry, rest::auth::mint};
use reqwest::Method;
use serde_json::{Value, json};
use std::time::SystemTime;

fn now() -> i64 {
    i64::try_from(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs()).unwrap()
}

fn claims() -> Value {
    json!({"iss": "loopwright", "aud": "loopwright", "sub": "ann", "exp": now() + 600, "iat": now(), "scope": "loop:run"})
}

fn sign(header: &Header, claims: &Value, secret: &str) -> String {
    loopwright_server::rest::install_crypto();
    jsonwebtoken::encode(header, claims, &EncodingKey::from_secret(secret.as_bytes())).unwrap()
}

fn header(kid: &str) -> Header {
    Header { kid: Some(kid.into()), ..Header::new(Algorithm::HS256) }
}

fn with(change: impl FnOnce(&mut Value)) -> String {
    let mut claims = claims();
    change(&mut claims);
    sign(&header("a"), &claims, SECRET)
}

fn registry() -> Registry {
    let mut auth = config::File::default().resolve().unwrap().auth;
    auth.keys = vec![crate::support::key("a", SECRET), crate::support::key("b", OTHER_SECRET)];
    Registry::new(&auth).unwrap()
}

/// A token of the given parts, signed with `a`'s secret whatever the header says.
fn raw(header: &str, claims: &str) -> String {
    let encode = |text: &str| base64url(text.as_bytes());
    let message = format!("{}.{}", encode(header), encode(claims));
    let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, SECRET.as_bytes());
    format!("{message}.{}", base64url(ring::hmac::sign(&key, message.as_bytes()).as_ref()))
}

fn base64url(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let mut out = String::new();
    for chunk in bytes.chunks(3) {
        let mut group = [0u8; 3];
        group[..chunk.len()].copy_from_slice(chunk);
        let bits = u32::from(group[0]) << 16 | u32::from(group[1]) << 8 | u32::from(group[2]);
        for i in 0..=chunk.len() {
            out.push(char::from(DIGITS[usize::try_from(bits >> (18 - 6 * i) & 63).unwrap()]));
        }
    }
    out
}

#[test]
fn bad_tokens_are_refused_each_for_its_own_reason() {
    let registry = registry();
    let good = claims().to_string();
    let exp = now() + 600;
    let bad = [
        ("not a token", "abc".to_owned()),
        ("empty", String::new()),
        ("alg none", {
            let parts = raw(r#"{"alg":"none","kid":"a"}"#, &good);
            parts.rsplit_once('.').unwrap().0.to_owned() + "."
        }),
        ("another algorithm", raw(r#"{"alg":"HS384","kid":"a"}"#, &good)),
        ("public-key algorithm with our secret", raw(r#"{"alg":"RS256","kid":"a"}"#, &good)),
        ("critical extension", raw(r#"{"alg":"HS256","kid":"a","crit":["b64"],"b64":false}"#, &good)),
        ("unknown kid", sign(&header("z"), &claims(), SECRET)),
        ("kid that is a path", sign(&header("../../etc/passwd"), &claims(), SECRET)),
        ("kid that is SQL", sign(&header("a' or '1'='1"), &claims(), SECRET)),
        ("no kid where two keys are known", sign(&Header::new(Algorithm::HS256), &claims(), SECRET)),
        ("another key's signature", sign(&header("b"), &claims(), SECRET)),
        ("expired beyond the leeway", with(|c| c["exp"] = json!(now() - 31))),
        ("not yet valid", with(|c| c["nbf"] = json!(now() + 60))),
        ("nbf that is no number", with(|c| c["nbf"] = json!("soon"))),
        ("issued in the future", with(|c| c["iat"] = json!(now() + 3600))),
        ("lives for years", with(|c| c["exp"] = json!(now() + 10 * 365 * 86_400))),
        ("exp absent", with(|c| drop(c.as_object_mut().unwrap().remove("exp")))),
        ("exp that is text", with(|c| c["exp"] = json!(exp.to_string()))),
        ("aud absent", with(|c| drop(c.as_object_mut().unwrap().remove("aud")))),
        ("aud of somebody else", with(|c| c["aud"] = json!("other"))),
        ("aud list without us", with(|c| c["aud"] = json!(["x", "y"]))),
        ("iss absent", with(|c| drop(c.as_object_mut().unwrap().remove("iss")))),
        ("iss of somebody else", with(|c| c["iss"] = json!("other"))),
        ("iss that is a list", with(|c| c["iss"] = json!(["loopwright"]))),
        ("sub absent", with(|c| drop(c.as_object_mut().unwrap().remove("sub")))),
        ("sub empty", with(|c| c["sub"] = json!(""))),
        ("sub twice", raw(r#"{"alg":"HS256","kid":"a"}"#, &good.replacen('{', r#"{"sub":"eve","#, 1))),
        ("exp twice", raw(r#"{"alg":"HS256","kid":"a"}"#, &good.replacen('{', &format!(r#"{{"exp":{exp},"#), 1))),
        ("8 kB", with(|c| c["pad"] = json!("x".repeat(8_192)))),
    ];
    for (name, token) in bad {
        let error = registry.verify(Some(&format!("Bearer {token}"))).expect_err(name);
        assert_eq!(error.code.as_str(), "token_invalid", "{name}");
        assert!(!error.detail.contains(&token) || token.is_empty(), "{name}");
    }
    for missing in [None, Some("Basic YTpi"), Some("Bearer")] {
        assert_eq!(registry.verify(missing).unwrap_err().code.as_str(), "token_missing");
    }
}

#[test]
fn good_tokens_pass() {
    let registry = registry();
    for (name, token) in [
        ("plain", with(|_| {})),
        ("expired within the leeway", with(|c| c["exp"] = json!(now() - 28))),
        ("aud list with us", with(|c| c["aud"] = json!(["x", "loopwright"]))),
        ("the other key", sign(&header("b"), &claims(), OTHER_SECRET)),
        (
            "scp as a list",
            with(|c| {
                c["scp"] = json!(["loop:run"]);
                c.as_object_mut().unwrap().remove("scope");
            }),
        ),
        ("scp as text", with(|c| c["scp"] = json!("a loop:run"))),
    ] {
        let verified = registry.verify(Some(&format!("bearer {token}"))).unwrap_or_else(|e| panic!("{name}: {e:?}"));
        assert_eq!((verified.issuer.as_str(), verified.subject.as_str()), ("loopwright", "ann"), "{name}");
        assert!(verified.may("loop:run"), "{name}");
    }
}

#[test]
fn a_lone_key_needs_no_kid() {
    let mut auth = config::File::default().resolve().unwrap().auth;
    auth.keys = vec![crate::support::key("only", SECRET)];
    let registry = Registry::new(&auth).unwrap();
    let token = sign(&Header::new(Algorithm::HS256), &claims(), SECRET);
    registry.verify(Some(&format!("Bearer {token}"))).unwrap();
}

#[test]
fn an_ed25519_key_verifies_and_is_no_hmac_secret() {
    use ring::signature::{Ed25519KeyPair, KeyPair};
    loopwright_server::rest::install_crypto();
    let pair = Ed25519KeyPair::from_seed_unchecked(&[7; 32]).unwrap();
    // SubjectPublicKeyInfo of an Ed25519 key: a fixed head and the key. Source: RFC 8410 section 4.
    let mut der = vec![0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];
    der.extend_from_slice(pair.public_key().as_ref());
    let standard = base64url(&der).replace('-', "+").replace('_', "/");
    let pem = format!(
        "-----BEGIN PUBLIC KEY-----\n{standard}{}\n-----END PUBLIC KEY-----\n",
        "=".repeat((4 - standard.len() % 4) % 4)
    );
    let mut auth = config::File::default().resolve().unwrap().auth;
    auth.keys = vec![config::Key { kid: "ed".into(), material: config::KeyMaterial::EdDsa(pem.clone()) }];
    let registry = Registry::new(&auth).unwrap();
    let message =
        format!("{}.{}", base64url(br#"{"alg":"EdDSA","kid":"ed"}"#), base64url(claims().to_string().as_bytes()));
    let token = format!("{message}.{}", base64url(pair.sign(message.as_bytes()).as_ref()));
    assert_eq!(registry.verify(Some(&format!("Bearer {token}"))).unwrap().subject, "ann");
    // The published key, taken as a shared secret, opens nothing.
    for secret in [pem.as_bytes(), pair.public_key().as_ref()] {
        let forged = jsonwebtoken::encode(&header("ed"), &claims(), &EncodingKey::from_secret(secret)).unwrap();
        registry.verify(Some(&format!("Bearer {forged}"))).unwrap_err();
    }
}

#[tokio::test]
async fn refusals_carry_a_challenge() {
    let server = Server::start().await;
    for path in ["/orchestrate/run-loop", "/v1/projects"] {
        let response = server.request(Method::POST, path).json(&json!({})).send().await.unwrap();
        assert_eq!(response.headers()["www-authenticate"], r#"Bearer realm="loopwright""#);
        problem(response, 401, "token_missing").await;
        let response = server.request(Method::POST, path).bearer_auth("x.y.z").json(&json!({})).send().await.unwrap();
        assert!(response.headers()["www-authenticate"].to_str().unwrap().contains(r#"error="invalid_token""#));
        problem(response, 401, "token_invalid").await;
        let token = mint(&server.config.auth, "ann", "something:else loop:runner", 60).unwrap();
        let response = server.request(Method::POST, path).bearer_auth(token).json(&json!({})).send().await.unwrap();
        assert!(response.headers()["www-authenticate"].to_str().unwrap().contains(r#"error="insufficient_scope""#));
        problem(response, 403, "scope_insufficient").await;
    }
}

#[tokio::test]
async fn a_new_subject_becomes_a_user_once_with_the_welcome_credits() {
    let server = Server::start().await;
    let requests = (0..6).map(|_| server.get("newcomer", "/v1/credits").send());
    for response in futures_util::future::join_all(requests).await {
        let (status, body) = read(response.unwrap()).await;
        assert_eq!((status, body["available"].as_str()), (200, Some("100")), "{body}");
    }
    let (_, page) = read(server.get("newcomer", "/v1/credits/transactions").send().await.unwrap()).await;
    assert_eq!(page["items"].as_array().unwrap().len(), 1, "{page}");
    assert_eq!(page["items"][0]["kind"], "grant");
}

#[tokio::test]
async fn a_token_may_name_a_user_by_id_and_a_blocked_user_is_refused() {
    let server = Server::start().await;
    let project = server.project("ann").await;
    let id: uuid::Uuid =
        sqlx::query_scalar("select id from users where auth_subject = 'ann'").fetch_one(&server.pool).await.unwrap();
    let path = format!("/v1/projects/{project}");
    assert_eq!(server.get(&id.to_string(), &path).send().await.unwrap().status(), 200);
    sqlx::query("update users set status = 'blocked' where id = $1").bind(id).execute(&server.pool).await.unwrap();
    problem(server.get("ann", &path).send().await.unwrap(), 403, "user_blocked").await;
}
