//! What answers say of keys, as all workers know it.

use super::{QUICK, ask, attempt_of, bearers, candidate, later_attempt_of, register, request, worker, worker_at};
use crate::fake_provider::{Dialect, FakeProvider, answer_json, stream};
use chrono::{DateTime, Utc};
use futures_util::future::join_all;
use loopwright_activities::{
    MIGRATIONS,
    keys::Keys,
    orchestrator::{Orchestrator, Pace, Role, Routing},
    provider::Settings,
    testing::{Act, Answer},
};
use loopwright_engine::{FailureKind, embedded::testing::database};
use serde_json::json;
use sqlx::PgPool;
use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
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

/// What the good key says is nothing about the other one, and what the other one says nothing about it.
#[tokio::test]
async fn a_key_that_keeps_failing_is_left_alone_and_its_neighbour_is_not() {
    let pool = database(MIGRATIONS).await;
    let server = FakeProvider::start(|seen, _| match seen.headers["authorization"].as_str() {
        "Bearer key-a" => answer_json(503, "", &Dialect::OpenAi.error(503, "x")),
        _ => stream(&Dialect::OpenAi.good("hi")),
    })
    .await;
    let keys = Keys::new(pool, None, false);
    let one = worker(&keys, &server, "key-a,key-b", candidate("openai_compatible", "m"));
    for _ in 0..8 {
        ask(&one).await.unwrap();
    }
    let asked = [["key-a", "key-b"].repeat(5), vec!["key-b"; 3]].concat();
    assert_eq!(bearers(&server), asked, "five failures of one key open its breaker");
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
    let row: (String, String, i32, f64) = sqlx::query_as(
        "select model, reason, refusals, extract(epoch from rests_until - engine_now())::float8 from api_key_rests",
    )
    .fetch_one(&pool)
    .await
    .unwrap();
    assert_eq!((row.0.as_str(), row.1.as_str(), row.2), ("m", "transient.rate_limited", 1));
    assert!((50.0..=60.0).contains(&row.3), "{}", row.3);
    let listed = Keys::new(pool.clone(), None, false).list(None).await.unwrap();
    let resting: Vec<_> = listed.iter().filter(|key| key.status == "cooling").collect();
    assert_eq!((resting.len(), resting[0].reason.as_deref()), (1, Some("transient.rate_limited")));
    assert!(resting[0].cooldown_until.is_some());
    // Another worker: the key is skipped; where it is the only one, the attempt ends with the rest of the wait.
    ask(&fresh("key-a,key-b")).await.unwrap();
    assert_eq!(bearers(&server).len(), 3);
    let failure = ask(&fresh("key-a")).await.unwrap_err();
    assert_eq!((failure.code.as_str(), failure.kind), ("transient.rate_limited", FailureKind::Retryable));
    assert!((40_000..=60_000).contains(&failure.retry_after_ms.unwrap()), "{failure:?}");
    assert_eq!(bearers(&server).len(), 3, "nobody was asked");
    // Its time is over.
    sqlx::query("update api_key_rests set rests_until = engine_now()").execute(&pool).await.unwrap();
    let _ = ask(&fresh("key-a")).await.unwrap_err();
    assert_eq!(bearers(&server)[3..], ["key-a"]);
}

#[tokio::test]
async fn two_models_that_are_busy_at_once_leave_the_key_to_a_third_and_an_operator_ends_their_rests() {
    let pool = database(MIGRATIONS).await;
    let server = FakeProvider::start(|seen, _| match seen.body["model"].as_str() {
        Some("m") => stream(&Dialect::OpenAi.good("hi")),
        _ => answer_json(429, "retry-after: 3600\r\n", &Dialect::OpenAi.error(429, "x")),
    })
    .await;
    register(&pool, &["key-a"]).await;
    // Each with what a process of its own would know.
    let of = |model| {
        let keys = Keys::new(pool.clone(), None, false);
        worker(&keys, &server, "key-a", candidate("openai_compatible", model))
    };
    for model in ["busy", "busy-too", "busy", "busy-too"] {
        let failure = ask(&of(model)).await.unwrap_err();
        assert_eq!((failure.code.as_str(), failure.uncounted), ("transient.rate_limited", true), "{model}");
    }
    assert_eq!(server.seen().len(), 2, "each once, whoever asks");
    ask(&of("m")).await.unwrap();
    let (id, status): (uuid::Uuid, String) =
        sqlx::query_as("select id, status from api_keys").fetch_one(&pool).await.unwrap();
    assert_eq!(status, "active");
    Keys::new(pool.clone(), None, false).set_enabled(id, true).await.unwrap();
    let _ = ask(&of("busy")).await.unwrap_err();
    assert_eq!(server.seen().len(), 4);
}

#[tokio::test]
async fn refusals_to_the_end_of_a_call_let_the_next_one_wait_longer_until_one_is_answered() {
    let pool = database(MIGRATIONS).await;
    let busy = Arc::new(AtomicBool::new(true));
    let answers = Arc::clone(&busy);
    let server = FakeProvider::start(move |_, _| match answers.load(Ordering::SeqCst) {
        true => answer_json(429, "", &Dialect::OpenAi.error(429, "x")),
        false => stream(&Dialect::OpenAi.good("hi")),
    })
    .await;
    register(&pool, &["key-a"]).await;
    let fresh = || worker(&Keys::new(pool.clone(), None, false), &server, "key-a", candidate("openai_compatible", "m"));
    let rest = || async {
        let sql = "select refusals from api_key_rests";
        sqlx::query_scalar::<_, i32>(sql).fetch_optional(&pool).await.unwrap()
    };
    // Two tries each; what other processes were told counts on.
    for refused in [2, 4, 6] {
        assert!(ask(&fresh()).await.unwrap_err().uncounted);
        assert_eq!((rest().await, server.seen().len()), (Some(refused), usize::try_from(refused).unwrap()));
        sqlx::query("update api_key_rests set rests_until = engine_now()").execute(&pool).await.unwrap();
    }
    // The sixth rest was 32 back-offs of a millisecond; a long one is not asked in.
    sqlx::query("update api_key_rests set rests_until = engine_now() + interval '1 hour'")
        .execute(&pool)
        .await
        .unwrap();
    busy.store(false, Ordering::SeqCst);
    assert!(ask(&fresh()).await.unwrap_err().retry_after_ms.unwrap() > 3_000_000);
    assert_eq!(server.seen().len(), 6);
    sqlx::query("update api_key_rests set rests_until = engine_now()").execute(&pool).await.unwrap();
    ask(&fresh()).await.unwrap();
    assert_eq!(rest().await, None, "an answer ends the row");
}

#[tokio::test]
async fn an_overloaded_server_that_says_until_when_is_left_alone_by_all_workers() {
    let pool = database(MIGRATIONS).await;
    let server = FakeProvider::start(|seen, _| match seen.body["model"].as_str() {
        Some("m") => answer_json(503, "retry-after: 120\r\n", &Dialect::OpenAi.error(503, "overloaded")),
        _ => answer_json(503, "", &Dialect::OpenAi.error(503, "overloaded")),
    })
    .await;
    register(&pool, &["key-a"]).await;
    let of = |model| {
        let keys = Keys::new(pool.clone(), None, false);
        worker(&keys, &server, "key-a", candidate("openai_compatible", model))
    };
    for code in ["transient.http", "transient.unavailable"] {
        let failure = ask(&of("m")).await.unwrap_err();
        assert_eq!((failure.code.as_str(), failure.uncounted), (code, true));
        assert!((100_000..=120_000).contains(&failure.retry_after_ms.unwrap()), "{failure:?}");
        assert_eq!(server.seen().len(), 1);
    }
    // Who names no wait is asked as before.
    let _ = ask(&of("other")).await.unwrap_err();
    assert_eq!(server.seen().len(), 3);
}

#[tokio::test]
async fn a_quota_of_the_day_rests_to_the_end_of_the_providers_day() {
    let pool = database(MIGRATIONS).await;
    let fake = FakeProvider::serve(|_, _| {
        let quota = json!({"quotaId": "GenerateRequestsPerDayPerProjectPerModel-FreeTier", "quotaValue": "50"});
        let details = json!([{"@type": "type.googleapis.com/google.rpc.QuotaFailure", "violations": [quota]},
            {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "3s"}]);
        let error = json!({"code": 429, "status": "RESOURCE_EXHAUSTED", "message": "quota", "details": details});
        Answer::Refused { status: 429, headers: Vec::new(), body: json!({"error": error}) }
    })
    .await;
    let environment: std::collections::BTreeMap<_, _> =
        fake.environment(&[Dialect::Gemini], "key-of-the-day").into_iter().collect();
    let settings = Settings::from_lookup(&|name| environment.get(name).cloned()).unwrap();
    let routing = Routing { roles: [(Role::Architect, vec![candidate("gemini", "gemini-3.8-flash")])].into() };
    let keys = Keys::new(pool.clone(), None, false);
    let orchestrator = Orchestrator::configured(routing, &settings, Some(&keys)).await.unwrap();
    let failure = ask(&orchestrator).await.unwrap_err();
    assert_eq!((failure.code.as_str(), failure.uncounted), ("transient.rate_limited", true));
    // The database knows the time zone as well; ten minutes are the least.
    let (rests, day): (f64, f64) = sqlx::query_as(
        "select extract(epoch from rests_until - engine_now())::float8,
                extract(epoch from (date_trunc('day', engine_now() at time zone 'America/Los_Angeles') + interval '1 day')
                                   at time zone 'America/Los_Angeles' - engine_now())::float8 from api_key_rests",
    )
    .fetch_one(&pool)
    .await
    .unwrap();
    assert!((rests - day.max(600.0)).abs() < 30.0, "{rests} s, and the day has {day} s");
    assert!(ask(&orchestrator).await.unwrap_err().retry_after_ms.unwrap() >= 590_000);
    assert_eq!(fake.seen().len(), 1);
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
    let days: f64 = sqlx::query_scalar(
        "select (extract(epoch from rests_until - engine_now()) / 86400)::float8 from api_key_rests",
    )
    .fetch_one(&pool)
    .await
    .unwrap();
    assert!((6.9..=7.0).contains(&days), "{days}");
}

/// The database is right: the machine of this worker is wrong. Returns the time.
async fn off_by(pool: &PgPool, off: &str) -> DateTime<Utc> {
    let right = format!(
        "create or replace function engine_now() returns timestamptz language sql stable as
         $$ select clock_timestamp() + interval '{off}' $$"
    );
    sqlx::query(sqlx::AssertSqlSafe(right)).execute(pool).await.unwrap();
    sqlx::query_scalar("select engine_now()").fetch_one(pool).await.unwrap()
}

#[tokio::test]
async fn a_worker_whose_clock_is_an_hour_off_lets_a_key_rest_as_long_as_the_provider_meant() {
    for off in ["1 hour", "-1 hour"] {
        let pool = database(MIGRATIONS).await;
        let now = off_by(&pool, off).await;
        let resets_at = (now + chrono::Duration::seconds(90)).to_rfc3339();
        let body =
            json!({"error": {"code": 402, "message": "m", "metadata": {"limit_source": "x", "resets_at": resets_at}}});
        let server = FakeProvider::always(answer_json(402, "", &body)).await;
        register(&pool, &["key-a"]).await;
        let keys = Keys::new(pool.clone(), None, false);
        let failure = ask(&worker(&keys, &server, "key-a", candidate("openai_compatible", "m"))).await.unwrap_err();
        assert_eq!(failure.code, "transient.rate_limited");
        let rests: f64 =
            sqlx::query_scalar("select extract(epoch from cooldown_until - engine_now())::float8 from api_keys")
                .fetch_one(&pool)
                .await
                .unwrap();
        assert!((30.0..=90.0).contains(&rests), "{off}: {rests} s");
    }
}

#[tokio::test]
async fn workers_whose_clocks_differ_leave_who_spoiled_an_answer_alone_for_as_long() {
    for off in ["1 hour", "-1 hour"] {
        let pool = database(MIGRATIONS).await;
        let now = off_by(&pool, off).await;
        let server = FakeProvider::always(vec![Act::Reset]).await;
        let pace = Pace { backoff: Duration::from_secs(1), ..QUICK };
        let keys = Keys::new(pool, None, false);
        let one = worker_at(pace, &keys, &server, "key-a", candidate("openai_compatible", "m"));
        let (first, recorder) = attempt_of(None);
        one.call(&first, "plan", request()).await.unwrap_err();
        // Noted by the clock that all share, and read by it.
        let at = "call:plan~spoiled.1";
        let noted: DateTime<Utc> =
            serde_json::from_value(recorder.checkpoints.lock().unwrap()[at]["until"].clone()).unwrap();
        assert!((0..60_000).contains(&(noted - now).num_milliseconds()), "{off}: {noted}, and now is {now}");
        let rest = json!({"keys": ["openai_compatible", null], "until": now + chrono::Duration::seconds(600)});
        recorder.checkpoints.lock().unwrap().insert(at.to_owned(), rest);
        let failure = one.call(&later_attempt_of(None, 2, &recorder), "plan", request()).await.unwrap_err();
        assert!((1..=600_000).contains(&failure.retry_after_ms.unwrap()), "{off}: {failure:?}");
        assert_eq!((failure.code.as_str(), server.seen().len()), ("transient.unavailable", 1), "{off}");
    }
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

#[tokio::test]
async fn a_model_of_which_a_key_has_no_quota_is_not_waited_for() {
    let pool = database(MIGRATIONS).await;
    let body = json!({"error": {"code": 429, "status": "RESOURCE_EXHAUSTED",
        "message": "You exceeded your current quota, limit: 0\nPlease retry in 26.4s."}});
    let server = FakeProvider::always(answer_json(429, "retry-after: 26\r\n", &body)).await;
    register(&pool, &["key-a"]).await;
    // Another process knows it from the row.
    for _ in 0..2 {
        let keys = Keys::new(pool.clone(), None, false);
        let failure = ask(&worker(&keys, &server, "key-a", candidate("openai_compatible", "m"))).await.unwrap_err();
        assert_eq!((failure.code.as_str(), failure.kind), ("model.unavailable", FailureKind::Permanent), "{failure:?}");
    }
    assert_eq!(server.seen().len(), 1);
}

#[tokio::test]
async fn a_key_without_quota_ends_no_run_while_another_only_rests() {
    let pool = database(MIGRATIONS).await;
    let none = json!({"error": {"code": 429, "status": "RESOURCE_EXHAUSTED", "message": "Quota exceeded, limit: 0"}});
    let server = FakeProvider::start(move |seen, _| match seen.headers["authorization"].as_str() {
        "Bearer none" => answer_json(429, "", &none),
        _ => answer_json(429, "retry-after: 60\r\n", &Dialect::OpenAi.error(429, "x")),
    })
    .await;
    register(&pool, &["none", "busy"]).await;
    let of = |model, list| {
        worker(&Keys::new(pool.clone(), None, false), &server, list, candidate("openai_compatible", model))
    };
    // Whoever is asked first, and where it is known already that the other one rests.
    let _ = ask(&of("known", "busy")).await.unwrap_err();
    for (model, list) in [("a", "none,busy"), ("b", "busy,none"), ("known", "none,busy")] {
        let before = server.seen().len();
        let failure = ask(&of(model, list)).await.unwrap_err();
        let told = (failure.code.as_str(), failure.kind, failure.uncounted);
        assert_eq!(told, ("transient.rate_limited", FailureKind::Retryable, true), "{model}: {failure:?}");
        assert!((40_000..=60_000).contains(&failure.retry_after_ms.unwrap()), "{model}: {failure:?}");
        let asked = &bearers(&server)[before..];
        assert_eq!(asked.len(), if model == "known" { 1 } else { 2 }, "{model}: {asked:?}");
    }
}
