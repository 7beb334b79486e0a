//! What answers say of keys, as all workers know it.

use super::{ask, bearers, candidate, register, worker};
use crate::fake_provider::{Dialect, FakeProvider, answer_json, stream};
use futures_util::future::join_all;
use loopwright_activities::{MIGRATIONS, keys::Keys};
use loopwright_engine::{FailureKind, embedded::testing::database};
use serde_json::json;
use std::{
    sync::{Arc, Mutex},
    time::Instant,
};

#[tokio::test]
async fn several_keys_take_turns() {
    let pool = database(MIGRATIONS).await;
    let keys = Keys::new(pool, None, false);
    let server = FakeProvider::always(stream(&Dialect::OpenAi.good("hi"))).await;
    let one = worker(&keys, &server, "key-a,key-b,key-c", candidate("openai_compatible", "m"));
    for _ in 0..6 {
        ask(&one).await.unwrap();
    }
    assert_eq!(bearers(&server), ["key-a", "key-b", "key-c", "key-a", "key-b", "key-c"]);
}

#[tokio::test]
async fn a_key_that_is_too_busy_rests_for_all_workers_until_its_time() {
    let pool = database(MIGRATIONS).await;
    let server = FakeProvider::start(|seen, _| match seen.headers["authorization"].as_str() {
        "Bearer key-a" => answer_json(429, "retry-after: 60\r\n", &Dialect::OpenAi.error(429, "x")),
        _ => stream(&Dialect::OpenAi.good("hi")),
    })
    .await;
    let fresh = |list| {
        // Each with what a process of its own would know.
        let keys = Keys::new(pool.clone(), None, false);
        worker(&keys, &server, list, candidate("openai_compatible", "m"))
    };
    register(&pool, &["key-a", "key-b"]).await;
    ask(&fresh("key-a,key-b")).await.unwrap();
    assert_eq!(bearers(&server), ["key-a", "key-b"], "the other key, at once");
    let row: (String, Option<String>, Option<String>, f64) = sqlx::query_as(
        "select status, disabled_reason, cooling_model, extract(epoch from cooldown_until - engine_now())::float8
         from api_keys where status <> 'active'",
    )
    .fetch_one(&pool)
    .await
    .unwrap();
    assert_eq!(
        (row.0.as_str(), row.1.as_deref(), row.2.as_deref()),
        ("cooling", Some("transient.rate_limited"), Some("m"))
    );
    assert!((50.0..=60.0).contains(&row.3), "{}", row.3);
    // Another worker: the key is skipped; where it is the only one, the attempt ends with the rest of the wait.
    ask(&fresh("key-a,key-b")).await.unwrap();
    assert_eq!(bearers(&server).len(), 3);
    let failure = ask(&fresh("key-a")).await.unwrap_err();
    assert_eq!((failure.code.as_str(), failure.kind), ("transient.rate_limited", FailureKind::Retryable));
    assert!((40_000..=60_000).contains(&failure.retry_after_ms.unwrap()), "{failure:?}");
    assert_eq!(bearers(&server).len(), 3, "nobody was asked");
    // Its time is over.
    sqlx::query("update api_keys set cooldown_until = engine_now() where status = 'cooling'")
        .execute(&pool)
        .await
        .unwrap();
    let _ = ask(&fresh("key-a")).await.unwrap_err();
    assert_eq!(bearers(&server)[3..], ["key-a"]);
}

#[tokio::test]
async fn a_refused_key_is_out_of_service_for_all_until_somebody_enables_it() {
    let pool = database(MIGRATIONS).await;
    let server = FakeProvider::start(|seen, _| match seen.headers["authorization"].as_str() {
        "Bearer key-a" => answer_json(401, "", &Dialect::OpenAi.error(401, "x")),
        _ => stream(&Dialect::OpenAi.good("hi")),
    })
    .await;
    register(&pool, &["key-a", "key-b"]).await;
    let keys = || Keys::new(pool.clone(), None, false);
    let worker = |list| worker(&keys(), &server, list, candidate("openai_compatible", "m"));
    ask(&worker("key-a,key-b")).await.unwrap();
    assert_eq!(bearers(&server), ["key-a", "key-b"]);
    let failure = ask(&worker("key-a")).await.unwrap_err();
    assert_eq!((failure.code.as_str(), failure.kind), ("provider.key_invalid", FailureKind::Retryable));
    assert!(failure.uncounted, "who has to act is the operator");
    assert!(failure.message.contains("api-keys"), "{}", failure.message);
    assert_eq!(bearers(&server).len(), 2, "it was not asked");
    let listed = keys().list(None).await.unwrap();
    let out = listed.iter().find(|key| key.status == "disabled").unwrap();
    assert_eq!(out.reason.as_deref(), Some("provider.key_invalid"));
    keys().set_enabled(out.id, true).await.unwrap();
    let _ = ask(&worker("key-a")).await.unwrap_err();
    assert_eq!(bearers(&server)[2..], ["key-a"]);
    // By hand, and for good.
    let other = listed.iter().find(|key| key.id != out.id).unwrap();
    keys().set_enabled(other.id, false).await.unwrap();
    assert_eq!(ask(&worker("key-b")).await.unwrap_err().code, "provider.key_disabled");
    keys().revoke(None, other.id).await.unwrap();
    assert!(ask(&worker("key-b")).await.is_err());
    assert_eq!(bearers(&server).len(), 3);
}

#[tokio::test]
async fn a_model_that_a_key_may_not_use_leaves_it_the_others() {
    let pool = database(MIGRATIONS).await;
    let server = FakeProvider::start(|seen, _| match seen.body["model"].as_str() {
        Some("m") => stream(&Dialect::OpenAi.good("hi")),
        _ => answer_json(403, "", &Dialect::OpenAi.error(403, "permission_error")),
    })
    .await;
    register(&pool, &["key-a"]).await;
    let keys = Keys::new(pool.clone(), None, false);
    for model in ["forbidden", "forbidden", "forbidden-too"] {
        let failure = ask(&worker(&keys, &server, "key-a", candidate("openai_compatible", model))).await.unwrap_err();
        assert_eq!((failure.code.as_str(), failure.kind), ("model.unavailable", FailureKind::Permanent), "{model}");
    }
    assert_eq!(server.seen().len(), 2, "each model once, remembered");
    // Another process knows it too, and what it says helps.
    let others = || Keys::new(pool.clone(), None, false);
    let failure =
        ask(&worker(&others(), &server, "key-a", candidate("openai_compatible", "forbidden"))).await.unwrap_err();
    assert_eq!((failure.code.as_str(), failure.kind), ("model.unavailable", FailureKind::Permanent));
    assert!(failure.message.contains("may use forbidden"), "{}", failure.message);
    assert_eq!(server.seen().len(), 2, "nobody was asked");
    ask(&worker(&keys, &server, "key-a", candidate("openai_compatible", "m"))).await.unwrap();
    let (id, status): (uuid::Uuid, String) =
        sqlx::query_as("select id, status from api_keys").fetch_one(&pool).await.unwrap();
    assert_eq!(status, "active");
    // Until somebody says that it may, or ten minutes are over.
    keys.set_enabled(id, true).await.unwrap();
    let _ = ask(&worker(&others(), &server, "key-a", candidate("openai_compatible", "forbidden"))).await.unwrap_err();
    assert_eq!(server.seen().len(), 4);
    sqlx::query("update api_key_models set forbidden_until = engine_now()").execute(&pool).await.unwrap();
    let _ = ask(&worker(&others(), &server, "key-a", candidate("openai_compatible", "forbidden"))).await.unwrap_err();
    assert_eq!(server.seen().len(), 5);
}

#[tokio::test]
async fn a_rest_beyond_a_week_is_not_believed() {
    let pool = database(MIGRATIONS).await;
    let body = json!({"error": {"code": 429, "message": "m", "metadata": {"resets_at": "2199-01-01T00:00:00Z"}}});
    let server = FakeProvider::always(answer_json(429, "", &body)).await;
    register(&pool, &["key-a"]).await;
    let keys = Keys::new(pool.clone(), None, false);
    let _ = ask(&worker(&keys, &server, "key-a", candidate("openai_compatible", "m"))).await.unwrap_err();
    let days: f64 =
        sqlx::query_scalar("select (extract(epoch from cooldown_until - engine_now()) / 86400)::float8 from api_keys")
            .fetch_one(&pool)
            .await
            .unwrap();
    assert!((6.9..=7.0).contains(&days), "{days}");
}

#[tokio::test]
async fn a_probe_is_one_call_however_many_ask() {
    use loopwright_activities::orchestrator::breaker::{Breaker, FAILURES_TO_OPEN, OPEN_FOR, Permit};
    let breaker = Arc::new(Breaker::default());
    let start = Instant::now();
    for _ in 0..FAILURES_TO_OPEN {
        breaker.unwell(start, false);
    }
    let allowed = Arc::new(Mutex::new(0));
    let tasks = (0..32).map(|_| {
        let (breaker, allowed) = (Arc::clone(&breaker), Arc::clone(&allowed));
        tokio::spawn(async move {
            if breaker.permit(start + OPEN_FOR) == (Permit::Allowed { probe: true }) {
                *allowed.lock().unwrap() += 1;
            }
        })
    });
    join_all(tasks).await;
    assert_eq!(*allowed.lock().unwrap(), 1);
}
