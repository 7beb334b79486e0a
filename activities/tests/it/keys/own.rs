//! Keys of users: whom they serve, where they go, and who may put them back into service.

use super::{SECRET, attempt_of, bearers, candidate, new_key, request, ring, user, worker};
use crate::fake_provider::{Dialect, FakeProvider, answer_json, stream};
use loopwright_activities::{
    MIGRATIONS,
    keys::{KeyView, Keys, NewKey},
    usage::CallOpened,
};
use loopwright_engine::{FailureKind, embedded::testing::database};
use serde_json::json;
use uuid::Uuid;

#[tokio::test]
async fn a_users_key_serves_his_runs_and_goes_to_its_own_server_alone() {
    let pool = database(MIGRATIONS).await;
    let (ann, bob) = (user(&pool, 1).await, user(&pool, 2).await);
    let keys = Keys::new(pool.clone(), Some(ring(&[("a", 1)])), true);
    let platform = FakeProvider::always(stream(&Dialect::OpenAi.good("from the platform"))).await;
    let elsewhere = FakeProvider::always(stream(&Dialect::OpenAi.good("nobody should ask"))).await;
    let redirect = format!("location: {}/v1/chat/completions\r\n", elsewhere.base());
    let own = FakeProvider::start(move |_, n| match n {
        0 => stream(&Dialect::OpenAi.good("from mine")),
        1 => answer_json(307, &redirect, &json!({})),
        _ => answer_json(401, "", &Dialect::OpenAi.error(401, "x")),
    })
    .await;
    let new = NewKey { base_url: Some(own.base()), model: Some("mine".into()), ..new_key("openai_compatible", SECRET) };
    let view = keys.put(ann, &new).await.unwrap();
    let worker = || worker(&keys, &platform, "platform-key", candidate("openai_compatible", "m"));
    let one = worker();
    let (ctx, recorder) = attempt_of(Some(ann));
    let reply = one.call(&ctx, "plan", request()).await.unwrap();
    assert_eq!((reply.text.as_str(), reply.model.as_str()), ("from mine", "mine"));
    let opened = recorder.readings.lock().unwrap().iter().find(|(phase, ..)| *phase == "open").unwrap().2.clone();
    let opened: CallOpened = serde_json::from_value(opened).unwrap();
    assert_eq!((opened.own_key_id, opened.model.as_str()), (Some(view.id), "mine"));
    assert!(!format!("{:?}", recorder.readings.lock().unwrap()).contains("sk-own"));
    assert_eq!(bearers(&own), [SECRET]);
    let bobs = one.call(&attempt_of(Some(bob)).0, "plan", request()).await.unwrap();
    assert_eq!(bobs.text, "from the platform");

    // A redirect is not followed, wherever it leads.
    let failure = one.call(&attempt_of(Some(ann)).0, "plan", request()).await.unwrap_err();
    assert_eq!(failure.code, "provider.bad_request");
    assert!(elsewhere.seen().is_empty());
    // Refused: out of service, said to its owner, and nobody else pays for it.
    let failure = one.call(&attempt_of(Some(ann)).0, "plan", request()).await.unwrap_err();
    assert_eq!(failure.code, "provider.key_invalid");
    assert!(failure.message.contains("your key"), "{}", failure.message);
    assert_eq!(keys.show(Some(ann), view.id).await.unwrap().status, "disabled");
    assert_eq!(worker().call(&attempt_of(Some(ann)).0, "p", request()).await.unwrap_err().code, "provider.key_invalid");
    assert_eq!((own.seen().len(), platform.seen().len()), (3, 1));
    // Unless he said so.
    keys.put(ann, &NewKey { platform_fallback: true, ..new }).await.unwrap();
    let reply = worker().call(&attempt_of(Some(ann)).0, "p", request()).await.unwrap();
    assert_eq!(reply.text, "from the platform");
    // Without him there is no key any more.
    keys.revoke(Some(ann), view.id).await.unwrap();
    assert_eq!(worker().call(&attempt_of(Some(ann)).0, "p", request()).await.unwrap().text, "from the platform");
    assert_eq!(own.seen().len(), 4);
    assert!(bearers(&platform).iter().all(|key| key == "platform-key"));
}

#[tokio::test]
async fn a_worker_without_the_ring_says_so_and_asks_nobody() {
    let pool = database(MIGRATIONS).await;
    let ann = user(&pool, 1).await;
    Keys::new(pool.clone(), Some(ring(&[("a", 1)])), false).put(ann, &new_key("gemini", SECRET)).await.unwrap();
    let server = FakeProvider::always(stream(&Dialect::OpenAi.good("no"))).await;
    for ring in [None, Some(ring(&[("b", 2)]))] {
        let keys = Keys::new(pool.clone(), ring, false);
        let worker = worker(&keys, &server, "k", candidate("openai_compatible", "m"));
        let failure = worker.call(&attempt_of(Some(ann)).0, "plan", request()).await.unwrap_err();
        assert_eq!((failure.code.as_str(), failure.kind), ("provider.key_sealed", FailureKind::Retryable));
    }
    sqlx::query("update api_keys set nonce = '\\x000000000000000000000000'").execute(&pool).await.unwrap();
    let keys = Keys::new(pool.clone(), Some(ring(&[("a", 1)])), false);
    let worker = worker(&keys, &server, "k", candidate("openai_compatible", "m"));
    let failure = worker.call(&attempt_of(Some(ann)).0, "plan", request()).await.unwrap_err();
    assert_eq!((failure.code.as_str(), failure.kind), ("provider.key_sealed", FailureKind::Permanent));
    assert!(server.seen().is_empty());
}

// Its own code: the refund policy must not take it for a provider of ours that is away.
#[tokio::test]
async fn a_user_whose_keys_serve_nothing_of_a_role_is_told_so() {
    let pool = database(MIGRATIONS).await;
    let ann = user(&pool, 1).await;
    let keys = Keys::new(pool.clone(), Some(ring(&[("a", 1)])), false);
    keys.put(ann, &new_key("gemini", SECRET)).await.unwrap();
    let server = FakeProvider::always(stream(&Dialect::OpenAi.good("no"))).await;
    let worker = worker(&keys, &server, "k", candidate("openai_compatible", "m"));
    let failure = worker.call(&attempt_of(Some(ann)).0, "plan", request()).await.unwrap_err();
    assert_eq!((failure.code.as_str(), failure.kind), ("model.no_own_key", FailureKind::Permanent));
    assert!(failure.message.contains("(gemini)"), "{}", failure.message);
    assert!(server.seen().is_empty());
}

async fn put(keys: &Keys, user: Uuid) -> KeyView {
    keys.put(user, &new_key("gemini", SECRET)).await.unwrap()
}

#[tokio::test]
async fn a_key_that_an_operator_disabled_is_not_enabled_by_its_owner() {
    let pool = database(MIGRATIONS).await;
    let ann = user(&pool, 1).await;
    let keys = Keys::new(pool.clone(), Some(ring(&[("a", 1)])), false);
    let id = put(&keys, ann).await.id;
    keys.set_enabled(id, false).await.unwrap();
    for _ in 0..2 {
        let view = put(&keys, ann).await;
        assert_eq!((view.id, view.status.as_str(), view.reason.as_deref()), (id, "disabled", Some("operator")));
        // Nor by a detour.
        keys.revoke(Some(ann), id).await.unwrap();
    }
    put(&keys, ann).await;
    keys.set_enabled(id, true).await.unwrap();
    assert_eq!(put(&keys, ann).await.status, "active");
    // What a provider said ends with the key that is put anew.
    sqlx::query("update api_keys set status = 'disabled', disabled_reason = 'provider.key_invalid'")
        .execute(&pool)
        .await
        .unwrap();
    assert_eq!(put(&keys, ann).await.status, "active");
    // Deleted keys count too, in the end.
    sqlx::query(
        "insert into api_keys (provider, user_id, source, ciphertext, nonce, wrapped_dek, kek_id, last4, fingerprint, status)
         select 'gemini', $1::uuid, 'sealed', ''::bytea, ''::bytea, ''::bytea, '', '', int4send(n), 'revoked' from generate_series(1, 99) n",
    )
    .bind(ann)
    .execute(&pool)
    .await
    .unwrap();
    assert_eq!(keys.put(ann, &new_key("gemini", "sk-one-too-many")).await.unwrap_err().code(), "keys_too_many");
    assert_eq!(put(&keys, ann).await.id, id, "a known one is no new row");
}
