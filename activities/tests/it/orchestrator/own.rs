//! Keys that users bring, as the orchestrator asks them: to each server what it has, and nothing of one user's for another.

use crate::{
    fake_provider::{Dialect, FakeProvider, answer_json, stream},
    keys::{attempt_of, candidate, later_attempt_of, new_key, request, ring, user, worker},
};
use loopwright_activities::{
    MIGRATIONS,
    keys::{Keys, NewKey},
    orchestrator::{Message, Request},
    testing::{Act, Seen},
};
use loopwright_engine::{FailureKind, embedded::testing::database};
use metrics::{Counter, Gauge, Histogram, Key, KeyName, Metadata, Recorder, SharedString, Unit};
use serde_json::json;
use sqlx::PgPool;
use std::{
    collections::BTreeSet,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use uuid::Uuid;

fn with_ring(pool: &PgPool) -> Keys {
    Keys::new(pool.clone(), Some(ring(&[("a", 1)])), true)
}

/// Adds a key for a server of the user's.
async fn bring(keys: &Keys, user: Uuid, key: &str, server: &FakeProvider, model: &str) {
    let new = NewKey {
        base_url: Some(server.base_of(Dialect::OpenAi)),
        model: Some(model.into()),
        ..new_key("openai_compatible", key)
    };
    keys.put(user, &new).await.unwrap();
}

fn good(text: &str) -> Vec<Act> {
    stream(&Dialect::OpenAi.good(text))
}

fn no_such_model() -> Vec<Act> {
    answer_json(404, "", &Dialect::OpenAi.error(404, "model_not_found"))
}

fn models(server: &FakeProvider) -> Vec<String> {
    server.seen().iter().filter_map(Seen::model).collect()
}

#[tokio::test]
async fn a_small_window_of_one_users_server_is_nobody_elses() {
    let pool = database(MIGRATIONS).await;
    let keys = with_ring(&pool);
    let platform = FakeProvider::always(good("from the platform")).await;
    let worker = worker(&keys, &platform, "k", candidate("openai_compatible", "m"));
    let long = || Request { messages: vec![Message::User { text: "x".repeat(12_000) }], ..request() };
    // What no model has is not believed; what one may have is, for whom it is.
    for (n, window) in [1, 2_048].into_iter().enumerate() {
        let full =
            json!({"error": {"code": 400, "type": "exceed_context_size_error", "message": "m", "n_ctx": window}});
        let own = FakeProvider::start(move |seen: &Seen, _| match seen.body.to_string().len() {
            size if size > 5_000 => answer_json(400, "", &full),
            _ => good("from mine"),
        })
        .await;
        let ann = user(&pool, n as i64 + 1).await;
        bring(&keys, ann, &format!("sk-own-{n}-0123456789"), &own, "m").await;
        let failure = worker.call(&attempt_of(Some(ann)).0, "plan", long()).await.unwrap_err();
        assert_eq!((failure.code.as_str(), failure.kind), ("model.context_overflow", FailureKind::Permanent));
        assert_eq!(worker.call(&attempt_of(None).0, "plan", long()).await.unwrap().text, "from the platform");
        // Hers goes on taking what fits.
        assert_eq!(worker.call(&attempt_of(Some(ann)).0, "short", request()).await.unwrap().text, "from mine");
    }
    assert_eq!(platform.seen().len(), 2);
}

#[tokio::test]
async fn each_of_a_users_servers_is_asked_for_its_own_model() {
    let pool = database(MIGRATIONS).await;
    let ann = user(&pool, 1).await;
    let keys = with_ring(&pool);
    let platform = FakeProvider::always(good("nobody should ask")).await;
    let gone = Arc::new(AtomicBool::new(false));
    let is_gone = gone.clone();
    let first = FakeProvider::start(move |seen: &Seen, _| match seen.model().as_deref() {
        Some("a") if !is_gone.load(Ordering::SeqCst) => good("from a"),
        _ => no_such_model(),
    })
    .await;
    let second = FakeProvider::start(|seen: &Seen, _| match seen.model().as_deref() {
        Some("b") => good("from b"),
        _ => no_such_model(),
    })
    .await;
    bring(&keys, ann, "sk-own-a-0123456789", &first, "a").await;
    bring(&keys, ann, "sk-own-b-0123456789", &second, "b").await;
    // The routing's model is the platform's server's.
    let worker = worker(&keys, &platform, "k", candidate("openai_compatible", "m"));
    let ask = |n: usize| {
        let (worker, ctx) = (worker.clone(), attempt_of(Some(ann)).0);
        async move { worker.call(&ctx, &format!("k{n}"), request()).await.unwrap().text }
    };
    for n in 0..5 {
        assert_eq!(ask(n).await, "from a");
    }
    assert!(second.seen().is_empty());
    gone.store(true, Ordering::SeqCst);
    for n in 5..10 {
        assert_eq!(ask(n).await, "from b", "the other server, for its own model");
    }
    assert_eq!((models(&first), models(&second)), (vec!["a".to_owned(); 10], vec!["b".to_owned(); 5]));
    assert!(platform.seen().is_empty());
}

#[tokio::test]
async fn two_servers_with_models_of_one_name_stand_in_for_each_other() {
    let pool = database(MIGRATIONS).await;
    let ann = user(&pool, 1).await;
    let keys = with_ring(&pool);
    let platform = FakeProvider::always(good("nobody should ask")).await;
    // What is wrong with one server says nothing of the other, although both speak the same dialect.
    let moved = FakeProvider::always(answer_json(307, "location: http://127.0.0.1:1/\r\n", &json!({}))).await;
    let there = FakeProvider::always(good("there")).await;
    bring(&keys, ann, "sk-own-a-0123456789", &moved, "m").await;
    bring(&keys, ann, "sk-own-b-0123456789", &there, "m").await;
    let worker = worker(&keys, &platform, "k", candidate("openai_compatible", "m"));
    assert_eq!(worker.call(&attempt_of(Some(ann)).0, "plan", request()).await.unwrap().text, "there");
    assert_eq!((moved.seen().len(), there.seen().len(), platform.seen().len()), (1, 1, 0));
}

#[tokio::test]
async fn what_only_its_owner_can_cure_is_told_and_what_only_the_operator_can_is_waited_for() {
    let pool = database(MIGRATIONS).await;
    let ann = user(&pool, 1).await;
    let keys = with_ring(&pool);
    let refusing = || FakeProvider::always(answer_json(401, "", &Dialect::OpenAi.error(401, "x")));
    let (own, platform) = (refusing().await, refusing().await);
    bring(&keys, ann, "sk-own-a-0123456789", &own, "mine").await;
    let worker = worker(&keys, &platform, "k", candidate("openai_compatible", "m"));
    // The first hears it from the provider, the second from what is known of the key.
    for _ in 0..2 {
        let hers = worker.call(&attempt_of(Some(ann)).0, "plan", request()).await.unwrap_err();
        assert_eq!((hers.code.as_str(), hers.kind), ("provider.key_invalid", FailureKind::Permanent));
        let ours = worker.call(&attempt_of(None).0, "plan", request()).await.unwrap_err();
        assert_eq!((ours.code.as_str(), ours.kind), ("provider.key_invalid", FailureKind::Retryable));
        assert!(ours.uncounted && ours.retry_after_ms >= Some(60_000), "{ours:?}");
    }
    assert_eq!((own.seen().len(), platform.seen().len()), (1, 1));
}

/// The series that were written, as `name{label=value,…}`.
#[derive(Default)]
struct Series(Mutex<BTreeSet<String>>);

impl Series {
    fn note(&self, key: &Key) {
        let labels: Vec<_> = key.labels().map(|label| format!("{}={}", label.key(), label.value())).collect();
        self.0.lock().unwrap().insert(format!("{}{{{}}}", key.name(), labels.join(",")));
    }
}

impl Recorder for Series {
    fn describe_counter(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_gauge(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_histogram(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn register_counter(&self, key: &Key, _: &Metadata<'_>) -> Counter {
        self.note(key);
        Counter::noop()
    }
    fn register_gauge(&self, _: &Key, _: &Metadata<'_>) -> Gauge {
        Gauge::noop()
    }
    fn register_histogram(&self, key: &Key, _: &Metadata<'_>) -> Histogram {
        self.note(key);
        Histogram::noop()
    }
}

#[tokio::test]
async fn what_users_call_their_models_makes_no_series() {
    let pool = database(MIGRATIONS).await;
    let keys = with_ring(&pool);
    let platform = FakeProvider::always(good("x")).await;
    // The second question of each is lost.
    let own = FakeProvider::start(|_, n| match n % 2 {
        0 => good("x"),
        _ => vec![Act::Reset],
    })
    .await;
    let worker = worker(&keys, &platform, "k", candidate("openai_compatible", "m"));
    let series = Series::default();
    let recording = metrics::set_default_local_recorder(&series);
    for (n, model) in ["one", "two"].into_iter().enumerate() {
        let user = user(&pool, n as i64 + 1).await;
        bring(&keys, user, &format!("sk-own-{n}-0123456789"), &own, model).await;
        worker.call(&attempt_of(Some(user)).0, "a", request()).await.unwrap();
        worker.call(&attempt_of(Some(user)).0, "b", request()).await.unwrap_err();
    }
    worker.call(&attempt_of(None).0, "a", request()).await.unwrap();
    drop(recording);
    let written: Vec<String> =
        series.0.lock().unwrap().iter().filter(|series| series.starts_with("loopwright_model")).cloned().collect();
    assert!(written.iter().all(|series| !series.contains("model=one") && !series.contains("model=two")), "{written:?}");
    let of = |name: &str, model: &str| {
        let (name, model) = (format!("{name}{{"), format!("model={model},"));
        let labels = |series: &String| format!("{},", series.trim_end_matches('}'));
        written.iter().filter(|series| series.starts_with(&name) && labels(series).contains(&model)).count()
    };
    // One for each outcome.
    assert_eq!(of("loopwright_model_requests_total", "own"), 2, "{written:?}");
    assert_eq!(of("loopwright_model_lost_answers_total", "own"), 1, "{written:?}");
    assert_eq!(of("loopwright_model_requests_total", "m"), 1, "{written:?}");
}

#[tokio::test]
async fn a_server_that_breaks_off_every_answer_is_given_up_sooner_where_its_user_pays_for_them() {
    let pool = database(MIGRATIONS).await;
    let ann = user(&pool, 1).await;
    let keys = with_ring(&pool);
    let broken = || FakeProvider::always(stream(&Dialect::OpenAi.good("and then")[..1]));
    let (own, platform) = (broken().await, broken().await);
    bring(&keys, ann, "sk-own-a-0123456789", &own, "mine").await;
    for (user, server, counts_from) in [(Some(ann), &own, 6), (None, &platform, 11)] {
        let recorder = Arc::default();
        // Each attempt in another process, whose breaker knows of nothing.
        for attempt in 1.. {
            let worker = worker(&keys, &platform, "k", candidate("openai_compatible", "m"));
            let failure =
                worker.call(&later_attempt_of(user, attempt, &recorder), "plan", request()).await.unwrap_err();
            assert_eq!(failure.code, "transient.http");
            let bought = server.seen().len();
            assert_eq!(failure.uncounted, bought < counts_from, "{bought} {failure:?}");
            if !failure.uncounted {
                break;
            }
            tokio::time::sleep(Duration::from_millis(failure.retry_after_ms.unwrap() + 1)).await;
        }
    }
}
