//! The list of tokens that must be refused, and the few that must not.
//!
//! Where each item of the reference of security, section 1, is held (`jwks::…` is `auth/jwks.rs`; "bad" is
//! `bad_tokens_are_refused_each_for_its_own_reason`, "good" is `good_tokens_pass`):
//!
//! | item | test |
//! | --- | --- |
//! | `alg: none` | bad |
//! | RS256 public key as HS256 secret | `an_rsa_key_verifies_and_is_no_hmac_secret`, `an_ed25519_key_verifies_and_is_no_hmac_secret`, `jwks::a_published_key_verifies_by_its_one_algorithm_alone` |
//! | unknown `kid`; with path or SQL text | bad; `jwks::invented_key_ids_do_not_make_it_fetch` |
//! | expired by 29 and by 31 s | good, bad |
//! | `nbf` in the future | bad |
//! | `aud` absent, wrong, array | bad, good |
//! | `iss` absent; `sub` missing | bad |
//! | scope absent | `refusals_carry_a_challenge`, `a_token_without_a_scope_is_known_and_may_nothing` |
//! | duplicate claims | bad |
//! | token of 8 kB | bad |
//! | good EdDSA and RS256 tokens | `an_ed25519_key_verifies_and_is_no_hmac_secret`, `an_rsa_key_verifies_and_is_no_hmac_secret`, `jwks` |
//! | `jku`, `x5u`, `jwk`, `crit` | bad, `jwks::addresses_and_keys_in_a_token_are_not_looked_at` |
//! | rotation in the middle of traffic | `jwks::a_rotation_in_the_middle_of_traffic_refuses_nobody` |
//! | JWKS down | `jwks::while_the_issuer_is_away_what_is_known_counts` |
//! | `oct` in a JWKS | `jwks::a_published_key_verifies_by_its_one_algorithm_alone` |
//! | JWKS: size, redirects | `jwks::a_set_that_breaks_a_rule_changes_nothing` |
//! | JWKS: proxies of the environment | `jwks::the_issuer_is_asked_without_the_proxy_of_the_environment` |
//! | JWKS: https | `config::file::tests` (`auth.jwks_url`) |
//! | JWKS: refetch | `jwks::invented_key_ids_do_not_make_it_fetch`, `jwks::a_caller_who_hangs_up_does_not_end_the_fetch_for_the_others`, `jwks::a_key_that_is_withdrawn_ends_with_the_age_of_the_set` |
//! | never log the token | `no_log_line_holds_a_token` |
//! | secret of at least 32 bytes, leeway, lifetime | `config::file::tests`, bad |

mod jwks;

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
    auth.lifetime_s_max = 900;
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

#[tokio::test]
async fn bad_tokens_are_refused_each_for_its_own_reason() {
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
        ("lived for a day and ends soon", with(|c| c["iat"] = json!(now() - 86_400))),
        ("lives a second too long", with(|c| c["exp"] = json!(c["iat"].as_u64().unwrap() + 901))),
        ("iat absent", with(|c| drop(c.as_object_mut().unwrap().remove("iat")))),
        ("iat that is text", with(|c| c["iat"] = json!("now"))),
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
        let error = registry.verify(Some(&format!("Bearer {token}"))).await.expect_err(name);
        assert_eq!(error.code.as_str(), "token_invalid", "{name}");
        assert!(!error.detail.contains(&token) || token.is_empty(), "{name}");
    }
    for missing in [None, Some("Basic YTpi"), Some("Bearer")] {
        assert_eq!(registry.verify(missing).await.unwrap_err().code.as_str(), "token_missing");
    }
}

#[tokio::test]
async fn good_tokens_pass() {
    let registry = registry();
    for (name, token) in [
        ("plain", with(|_| {})),
        ("expired within the leeway", with(|c| c["exp"] = json!(now() - 29))),
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
        let verified =
            registry.verify(Some(&format!("bearer {token}"))).await.unwrap_or_else(|e| panic!("{name}: {e:?}"));
        assert_eq!((verified.issuer.as_str(), verified.subject.as_str()), ("loopwright", "ann"), "{name}");
        assert!(verified.may("loop:run"), "{name}");
    }
}

#[tokio::test]
async fn a_lone_key_needs_no_kid() {
    let mut auth = config::File::default().resolve().unwrap().auth;
    auth.keys = vec![crate::support::key("only", SECRET)];
    let registry = Registry::new(&auth).unwrap();
    let token = sign(&Header::new(Algorithm::HS256), &claims(), SECRET);
    registry.verify(Some(&format!("Bearer {token}"))).await.unwrap();
}

fn ed_pair(seed: u8) -> ring::signature::Ed25519KeyPair {
    ring::signature::Ed25519KeyPair::from_seed_unchecked(&[seed; 32]).unwrap()
}

fn ed_public(seed: u8) -> Vec<u8> {
    use ring::signature::KeyPair;
    ed_pair(seed).public_key().as_ref().to_vec()
}

/// A token of ann's with this header, signed by the Ed25519 key of `seed`.
fn ed_token(seed: u8, header: &Value) -> String {
    let message =
        format!("{}.{}", base64url(header.to_string().as_bytes()), base64url(claims().to_string().as_bytes()));
    format!("{message}.{}", base64url(ed_pair(seed).sign(message.as_bytes()).as_ref()))
}

fn auth_with(key: config::Key) -> config::Auth {
    let mut auth = config::File::default().resolve().unwrap().auth;
    auth.keys = vec![key];
    auth
}

#[tokio::test]
async fn an_ed25519_key_verifies_and_is_no_hmac_secret() {
    loopwright_server::rest::install_crypto();
    let public = ed_public(7);
    // SubjectPublicKeyInfo of an Ed25519 key: a fixed head and the key. Source: RFC 8410 section 4.
    let mut der = vec![0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];
    der.extend_from_slice(&public);
    let standard = base64url(&der).replace('-', "+").replace('_', "/");
    let pem = format!(
        "-----BEGIN PUBLIC KEY-----\n{standard}{}\n-----END PUBLIC KEY-----\n",
        "=".repeat((4 - standard.len() % 4) % 4)
    );
    let auth = auth_with(config::Key { kid: "ed".into(), material: config::KeyMaterial::EdDsa(pem.clone()) });
    let registry = Registry::new(&auth).unwrap();
    let token = ed_token(7, &json!({"alg": "EdDSA", "kid": "ed"}));
    assert_eq!(registry.verify(Some(&format!("Bearer {token}"))).await.unwrap().subject, "ann");
    // The published key, taken as a shared secret, opens nothing.
    for secret in [pem.as_bytes(), &public] {
        let forged = jsonwebtoken::encode(&header("ed"), &claims(), &EncodingKey::from_secret(secret)).unwrap();
        registry.verify(Some(&format!("Bearer {forged}"))).await.unwrap_err();
    }
}

/// A key of 2048 bits; what signed with it is gone.
const RSA_PEM: &str = "-----BEGIN PUBLIC KEY-----
MIIBIjANBgkqhkiG9w0BAQEFAAOCAQ8AMIIBCgKCAQEArMLCvokxPMRdipCOXiro
P33UCnLIAJtcyt5VwTOaxvPk5gCTyLRAADiEMet4PW2QoVKWv9ElJ0DlhCg5bCrA
hRAeL/OhrkI2q6IZFO7+25BIcan/TsiXXJuhjRsmC71n/ZISqJr+HPjWDg1Aeu/t
heh4B95PVuAhbwQcfI8CUankIUY60OqQSQJMkXJukiopQhSaxTYnqYp7qdXwI+iR
SXEUI/U1QHtku4ZnHsccjCMxhCoswi1kz9C6vwFkZspuTehoA7nDnynpYDmpnDUf
VExgVNQS6amZtwK3FN1+PfE5RYZjbOFwmtw3SZFK+9nQnwOI8asecX3m3sncO2Nm
/QIDAQAB
-----END PUBLIC KEY-----
";
/// Its modulus as a JWKS writes it; the exponent is `AQAB`.
const RSA_N: &str = "rMLCvokxPMRdipCOXiroP33UCnLIAJtcyt5VwTOaxvPk5gCTyLRAADiEMet4PW2QoVKWv9ElJ0DlhCg5bCrAhRAeL_OhrkI2q6IZFO7-25BIcan_TsiXXJuhjRsmC71n_ZISqJr-HPjWDg1Aeu_theh4B95PVuAhbwQcfI8CUankIUY60OqQSQJMkXJukiopQhSaxTYnqYp7qdXwI-iRSXEUI_U1QHtku4ZnHsccjCMxhCoswi1kz9C6vwFkZspuTehoA7nDnynpYDmpnDUfVExgVNQS6amZtwK3FN1-PfE5RYZjbOFwmtw3SZFK-9nQnwOI8asecX3m3sncO2Nm_Q";
/// Ann's, by key `rsa`, until the year 2100.
const RSA_TOKEN: &str = "eyJhbGciOiJSUzI1NiIsImtpZCI6InJzYSJ9.eyJpc3MiOiJsb29wd3JpZ2h0IiwiYXVkIjoibG9vcHdyaWdodCIsInN1YiI6ImFubiIsInNjb3BlIjoibG9vcDpydW4iLCJpYXQiOjE3NjQwMDAwMDAsImV4cCI6NDEwMjQ0NDgwMH0.kc22kd1zNIDVkrDWHr3xbsSLGXCJIZf3deGwPduPO3XfrZo1lkGAkOOXmbzJsPm_MbHGB8Y3r8RC1tLFQL4VVvqKq4MOVTQEomesndPbNoGIxAfWhDrb8GtjiAh-41zqZCLuje7GQ4Kb-3du1noCxoypxWrCZA1MJO7C6nlp69BlVkQshKYI1qkQ50zIC7w8RVjf5CF3_oaMpEJtCgSjowQYoawwJ6oEu_B2UkKnF-GM0XbRx2yDbCTCV727bNUGlv_arWCzfuOml7PnAoKJqP1YxwlJ1vDymFJQvDOjD1FU1zpf4GaKrXMe1ctRVpq4IxYE_Ty3QeGKUV2mHUAtpQ";
/// Long enough for it.
const CENTURY_S: u64 = 100 * 366 * 86_400;

#[tokio::test]
async fn an_rsa_key_verifies_and_is_no_hmac_secret() {
    let mut auth = auth_with(config::Key { kid: "rsa".into(), material: config::KeyMaterial::Rs256(RSA_PEM.into()) });
    auth.lifetime_s_max = CENTURY_S;
    let registry = Registry::new(&auth).unwrap();
    let verified = registry.verify(Some(&format!("Bearer {RSA_TOKEN}"))).await.unwrap();
    assert_eq!((verified.subject.as_str(), verified.may("loop:run")), ("ann", true));
    // One character of what it says, or of its signature, and it is nobody's.
    for at in [45, RSA_TOKEN.len() - 20] {
        let mut changed = RSA_TOKEN.to_owned();
        let other = if &changed[at..=at] == "A" { "B" } else { "A" };
        changed.replace_range(at..=at, other);
        registry.verify(Some(&format!("Bearer {changed}"))).await.unwrap_err();
    }
    // Who reads the public key cannot sign with it.
    for secret in [RSA_PEM, RSA_PEM.trim(), RSA_N] {
        let forged = sign(&header("rsa"), &claims(), secret);
        let error = registry.verify(Some(&format!("Bearer {forged}"))).await.unwrap_err();
        assert_eq!(error.code.as_str(), "token_invalid");
    }
}

#[tokio::test]
async fn a_token_without_a_scope_is_known_and_may_nothing() {
    let registry = registry();
    let token = with(|c| drop(c.as_object_mut().unwrap().remove("scope")));
    let verified = registry.verify(Some(&format!("Bearer {token}"))).await.unwrap();
    assert_eq!((verified.subject.as_str(), verified.may("loop:run"), verified.may("")), ("ann", false, false));
}

#[tokio::test]
async fn no_log_line_holds_a_token() {
    let lines = Lines::default();
    let writer = lines.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::TRACE)
        .with_ansi(false)
        .with_writer(move || writer.clone())
        .finish();
    let _guard = tracing::subscriber::set_default(subscriber);
    let registry = registry();
    let expired = with(|c| c["exp"] = json!(now() - 600));
    // Who is meant: the key that the header names; issuer and subject once a signature of that key held.
    let long = "k".repeat(200);
    let rows = [
        (with(|_| {}), None),
        (expired, Some(r#"kid="a" iss="loopwright" sub="ann" reason="ExpiredSignature""#)),
        (with(|c| c["iss"] = json!("elsewhere")), Some(r#"kid="a" iss="elsewhere" sub="ann" reason="InvalidIssuer""#)),
        (with(|c| c["sub"] = json!("")), Some(r#"kid="a" iss="loopwright" sub="" reason="subject empty or too long""#)),
        (
            with(|c| c["exp"] = json!(now() + 864_000)),
            Some(r#"kid="a" iss="loopwright" sub="ann" reason="lives too long""#),
        ),
        (with(|c| drop(c.as_object_mut().unwrap().remove("sub"))), Some(r#"kid="a" iss="loopwright" reason="#)),
        (sign(&header("a"), &claims(), OTHER_SECRET), Some(r#"kid="a" reason="InvalidSignature""#)),
        (sign(&header("nobody"), &claims(), SECRET), Some(r#"kid="nobody" reason="unknown key id""#)),
        (sign(&header("../../x'; --\n"), &claims(), SECRET), Some(r#"kid="../../x'; --\n" reason="unknown key id""#)),
        (sign(&header(&long), &claims(), SECRET), Some(&long[..64])),
        (sign(&Header::new(Algorithm::HS256), &claims(), SECRET), Some(r#"refused reason="no key id""#)),
        ("x.y.z".into(), Some(r#"refused reason="header: "#)),
    ];
    let written = || String::from_utf8(std::mem::take(&mut *lines.0.lock().unwrap())).unwrap();
    let mut text = String::new();
    for (token, named) in &rows {
        drop(registry.verify(Some(&format!("Bearer {token}"))).await);
        let line = written();
        assert_eq!(line.contains("a token was refused"), named.is_some(), "{named:?}: {line}");
        assert!(line.contains(named.unwrap_or_default()), "{named:?}: {line}");
        assert!(!line.contains(&long[..65]), "{line}");
        text += &line;
    }
    // Neither claims nor signatures: every token's middle begins alike.
    let middle = base64url(claims().to_string().as_bytes());
    assert!(!text.contains(&middle[..24]) && !text.contains(SECRET), "{text}");
}

/// What a log writes.
#[derive(Clone, Default)]
struct Lines(std::sync::Arc<std::sync::Mutex<Vec<u8>>>);

impl std::io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
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
