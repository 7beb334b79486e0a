//! Sealed keys of the platform: every worker with the ring uses them, beside those of its environment.

use super::{SECRET, ask, bearers, candidate, log::capture, new_key, register, ring, user, worker};
use crate::fake_provider::{Dialect, FakeProvider, answer_json, stream};
use loopwright_activities::{
    MIGRATIONS,
    keys::{Keys, NewKey},
};
use loopwright_engine::{FailureKind, embedded::testing::database};
use secrecy::ExposeSecret;
use sqlx::PgPool;

const SEALED: &str = "sk-platform-0123456789zyxw";

async fn answering() -> FakeProvider {
    FakeProvider::always(stream(&Dialect::OpenAi.good("hi"))).await
}

fn with_ring(pool: &PgPool) -> Keys {
    Keys::new(pool.clone(), Some(ring(&[("a", 1)])), false)
}

fn key(text: &str) -> NewKey {
    NewKey { label: "shared".into(), ..new_key("openai_compatible", text) }
}

/// The address of a server as the settings state it.
fn address(server: &FakeProvider) -> String {
    format!("{}/", server.base())
}

/// Asks `n` times as one worker that has just started.
async fn asks(keys: &Keys, server: &FakeProvider, environment: &str, n: usize) -> Vec<String> {
    let before = bearers_or_none(server).len();
    let worker = worker(keys, server, environment, candidate("openai_compatible", "m"));
    for _ in 0..n {
        ask(&worker).await.unwrap();
    }
    bearers_or_none(server)[before..].to_vec()
}

fn bearers_or_none(server: &FakeProvider) -> Vec<String> {
    let bearer = |headers: &std::collections::BTreeMap<String, String>| headers.get("authorization").cloned();
    server.seen().iter().map(|seen| bearer(&seen.headers).unwrap_or_default().replace("Bearer ", "")).collect()
}

#[tokio::test]
async fn a_sealed_key_of_the_platform_serves_beside_those_of_the_environment_on_every_worker() {
    let (pool, server) = (database(MIGRATIONS).await, answering().await);
    let keys = with_ring(&pool);
    let view = keys.put_platform(&key(SEALED), &address(&server)).await.unwrap();
    assert_eq!((view.user_id, view.source.as_str(), view.last4.as_str()), (None, "sealed", "zyxw"));
    let row: String = sqlx::query_scalar("select row_to_json(k)::text || encode(ciphertext, 'escape') from api_keys k")
        .fetch_one(&pool)
        .await
        .unwrap();
    assert!(!row.contains("sk-platform") && !row.contains("0123456789"), "{row}");
    assert!(!format!("{:?}", keys.platform().await.unwrap()).contains("sk-platform"));
    for _ in 0..2 {
        // Each with what a process of its own would know.
        assert_eq!(asks(&with_ring(&pool), &server, "key-a", 4).await, ["key-a", SEALED, "key-a", SEALED]);
    }
    // Without a key of the environment it serves alone; a server that has keys is not asked without one.
    assert_eq!(asks(&with_ring(&pool), &server, "", 2).await, [SEALED, SEALED]);
    // The same once more, from wherever, is the same row and one key.
    let again = keys.put_platform(&NewKey { label: "again".into(), ..key(SEALED) }, &address(&server)).await.unwrap();
    assert_eq!((again.id, again.label.as_str()), (view.id, "again"));
    assert_eq!(asks(&with_ring(&pool), &server, SEALED, 2).await, [SEALED, SEALED]);
}

#[tokio::test]
async fn a_key_of_the_environment_may_be_sealed_and_stays_one_row() {
    let (pool, server) = (database(MIGRATIONS).await, answering().await);
    register(&pool, &["key-a"]).await;
    let keys = with_ring(&pool);
    let before = keys.list(None).await.unwrap();
    let view = keys.put_platform(&key("key-a"), &address(&server)).await.unwrap();
    assert_eq!((view.id, before[0].source.as_str(), view.source.as_str()), (before[0].id, "environment", "sealed"));
    assert_eq!(asks(&with_ring(&pool), &server, "key-a", 2).await, ["key-a", "key-a"]);
    register(&pool, &["key-a"]).await;
    assert_eq!(keys.list(None).await.unwrap().len(), 1);
    assert_eq!(asks(&with_ring(&pool), &server, "", 1).await, ["key-a"]);
}

#[tokio::test]
async fn a_key_of_the_platform_is_no_users_and_the_reverse() {
    let pool = database(MIGRATIONS).await;
    let ann = user(&pool, 1).await;
    let keys = with_ring(&pool);
    let ours =
        keys.put_platform(&new_key("gemini", SEALED), "https://generativelanguage.googleapis.com/").await.unwrap();
    let hers = keys.put(ann, &new_key("gemini", SECRET)).await.unwrap();
    assert_eq!(keys.open(&keys.platform().await.unwrap()[0]).unwrap().key.expose_secret(), SEALED);
    assert!(keys.show(Some(ann), ours.id).await.is_err() && keys.revoke(Some(ann), ours.id).await.is_err());
    // Owners are part of what binds: bent rows open for nobody.
    for (id, owner) in [(ours.id, Some(ann)), (hers.id, None)] {
        sqlx::query("update api_keys set user_id = $2 where id = $1")
            .bind(id)
            .bind(owner)
            .execute(&pool)
            .await
            .unwrap();
    }
    let (of_ann, of_all) = (keys.own(ann).await.unwrap(), keys.platform().await.unwrap());
    assert_eq!((of_ann[0].id, of_all[0].id), (ours.id, hers.id));
    for bent in [&of_ann[0], &of_all[0]] {
        assert_eq!(keys.open(bent).unwrap_err().code(), "key_corrupt");
    }
}

#[tokio::test]
async fn a_worker_that_cannot_open_a_key_says_so_once_and_goes_on_with_the_others() {
    let (pool, server) = (database(MIGRATIONS).await, answering().await);
    let view = with_ring(&pool).put_platform(&key(SEALED), &address(&server)).await.unwrap();
    let (guard, lines) = capture();
    for ring in [None, Some(ring(&[("b", 2)]))] {
        lines.clear();
        let keys = Keys::new(pool.clone(), ring, false);
        assert_eq!(asks(&keys, &server, "key-a", 3).await, ["key-a"; 3]);
        let text = lines.text();
        let told: Vec<&str> = text.lines().filter(|line| line.contains("cannot be used by this worker")).collect();
        assert_eq!(told.len(), 1, "{text}");
        assert!(told[0].contains(&view.id.to_string()) && told[0].contains("zyxw"), "{}", told[0]);
        assert!(told[0].contains("LOOPWRIGHT_KEY_ENCRYPTION_KEYS"), "{}", told[0]);
    }
    // Changed bytes are no key either.
    sqlx::query("update api_keys set nonce = '\\x000000000000000000000000'").execute(&pool).await.unwrap();
    assert_eq!(asks(&with_ring(&pool), &server, "key-a", 1).await, ["key-a"]);
    assert!(lines.text().contains("does not open") && !lines.text().contains("sk-platform"));
    drop(guard);
    assert!(bearers(&server).iter().all(|key| key == "key-a"));
}

#[tokio::test]
async fn a_key_goes_to_the_address_that_it_was_stored_for_or_nowhere() {
    let (pool, server) = (database(MIGRATIONS).await, answering().await);
    let elsewhere = answering().await;
    let keys = with_ring(&pool);
    keys.put_platform(&key(SEALED), &address(&elsewhere)).await.unwrap();
    assert_eq!(asks(&with_ring(&pool), &server, "key-a", 2).await, ["key-a", "key-a"]);
    assert!(elsewhere.seen().is_empty());
    // A row that was bent to the configured address is no key.
    sqlx::query("update api_keys set base_url = $1").bind(address(&server)).execute(&pool).await.unwrap();
    assert_eq!(keys.open(&keys.platform().await.unwrap()[0]).unwrap_err().code(), "key_corrupt");
    assert_eq!(asks(&with_ring(&pool), &server, "key-a", 2).await, ["key-a", "key-a"]);
}

#[tokio::test]
async fn the_platforms_keys_rotate_rest_and_end_as_others_do() {
    let pool = database(MIGRATIONS).await;
    let server = FakeProvider::start(|seen, n| match (seen.headers["authorization"].as_str(), n) {
        ("Bearer sk-platform-0123456789zyxw", 0) => {
            answer_json(429, "retry-after: 60\r\n", &Dialect::OpenAi.error(429, "x"))
        }
        _ => stream(&Dialect::OpenAi.good("hi")),
    })
    .await;
    let keys = with_ring(&pool);
    let id = keys.put_platform(&key(SEALED), &address(&server)).await.unwrap().id;
    // It rests for all.
    let failure = ask(&worker(&keys, &server, "", candidate("openai_compatible", "m"))).await.unwrap_err();
    assert_eq!((failure.code.as_str(), failure.kind), ("transient.rate_limited", FailureKind::Retryable));
    let other = worker(&with_ring(&pool), &server, "", candidate("openai_compatible", "m"));
    assert_eq!(ask(&other).await.unwrap_err().code, "transient.rate_limited");
    assert_eq!(server.seen().len(), 1);
    keys.set_enabled(id, true).await.unwrap();
    assert_eq!(asks(&with_ring(&pool), &server, "", 1).await, [SEALED]);
    // Out of service at an operator's word; adding it again does not undo that.
    keys.set_enabled(id, false).await.unwrap();
    assert_eq!(keys.put_platform(&key(SEALED), &address(&server)).await.unwrap().status, "disabled");
    let out = worker(&with_ring(&pool), &server, "", candidate("openai_compatible", "m"));
    assert_eq!(ask(&out).await.unwrap_err().code, "provider.key_disabled");
    keys.set_enabled(id, true).await.unwrap();
    // Rotation.
    let both = Keys::new(pool.clone(), Some(ring(&[("b", 2), ("a", 1)])), false);
    assert_eq!(both.rewrap(None, false).await.unwrap().rows, 1);
    assert_eq!(both.wrapped_by().await.unwrap(), [("b".to_owned(), 1)]);
    let new = || Keys::new(pool.clone(), Some(ring(&[("b", 2)])), false);
    assert_eq!(asks(&new(), &server, "", 1).await, [SEALED]);
    assert_eq!(new().rewrap(None, true).await.unwrap().rows, 1);
    assert_eq!(asks(&new(), &server, "key-a", 2).await, ["key-a", SEALED]);
    // Destroyed, for good; also where it stands in the environment.
    keys.revoke(None, id).await.unwrap();
    let left: (i32, i32) = sqlx::query_as("select length(ciphertext), length(wrapped_dek) from api_keys where id = $1")
        .bind(id)
        .fetch_one(&pool)
        .await
        .unwrap();
    assert_eq!(left, (0, 0));
    assert!(new().platform().await.unwrap().is_empty());
    assert_eq!(asks(&new(), &server, "key-a", 2).await, ["key-a", "key-a"]);
    let revoked = worker(&new(), &server, SEALED, candidate("openai_compatible", "m"));
    assert!(ask(&revoked).await.is_err());
}

#[tokio::test]
async fn what_is_no_key_of_the_platform_is_refused_and_leaves_nothing() {
    let pool = database(MIGRATIONS).await;
    let keys = with_ring(&pool);
    let at = "https://openrouter.ai/api/v1";
    for (keys, new, code) in [
        (Keys::new(pool.clone(), None, false), new_key("openrouter", SEALED), "keys_unavailable"),
        (keys.clone(), new_key("mistral", SEALED), "key_invalid"),
        (keys.clone(), new_key("openrouter", "two words"), "key_invalid"),
        (keys.clone(), NewKey { model: Some("m".into()), ..new_key("openrouter", SEALED) }, "key_invalid"),
        (keys.clone(), NewKey { platform_fallback: true, ..new_key("openrouter", SEALED) }, "key_invalid"),
    ] {
        assert_eq!(keys.put_platform(&new, at).await.unwrap_err().code(), code);
    }
    assert!(keys.list(None).await.unwrap().is_empty());
    // Two at once are two; the same one twice at once is one.
    let (one, two) = (new_key("openrouter", "sk-one-0123456789"), new_key("openrouter", "sk-two-0123456789"));
    let (a, b, c) = tokio::join!(keys.put_platform(&one, at), keys.put_platform(&two, at), keys.put_platform(&one, at));
    assert_eq!(a.unwrap().id, c.unwrap().id);
    b.unwrap();
    for n in 2..16 {
        keys.put_platform(&new_key("openrouter", &format!("sk-{n}-0123456789")), at).await.unwrap();
    }
    let error = keys.put_platform(&new_key("openrouter", SEALED), at).await.unwrap_err();
    assert!(error.code() == "key_invalid" && error.to_string().contains("16"), "{error}");
    keys.put_platform(&one, at).await.unwrap();
}
