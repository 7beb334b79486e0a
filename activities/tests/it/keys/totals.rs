//! Sums of each of the platform's keys beside our books: no key hides behind another.

use super::{new_key, ring};
use crate::{
    bench::Bench,
    fake_provider::{FakeProvider, answer_json},
};
use loopwright_activities::{
    billing::books::{self, Kept},
    keys::Keys,
    provider::{KeyIdentity, Settings, account::OpenRouterAccount},
    reconcile::{self, Books, Output},
    usage::CallState,
};
use loopwright_engine::{
    client::Client,
    hook::{NoHook, Outcome},
    ids::RunId,
};
use serde_json::json;
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

const FIRST: &str = "sk-or-v1-first-0123456789aaaa";
const SECOND: &str = "sk-or-v1-second-0123456789bbbb";
const SEALED: &str = "sk-or-v1-sealed-0123456789cccc";

/// Cents that each key has used; `None`: it is refused.
type Used = Arc<Mutex<BTreeMap<&'static str, Option<i64>>>>;

struct Room {
    bench: Bench,
    books: Books,
    used: Used,
    provider: FakeProvider,
}

impl Room {
    async fn new() -> Self {
        Self::refusing_with(401).await
    }

    /// One whose provider refuses a key with `status`.
    async fn refusing_with(status: u16) -> Self {
        let bench = Bench::new(100).await;
        let used: Used = Arc::new(Mutex::new([FIRST, SECOND, SEALED].map(|key| (key, Some(1_000))).into()));
        let says = used.clone();
        let fake = FakeProvider::start(move |seen, _| {
            let used = says.lock().unwrap();
            let key = seen.key().unwrap_or_default();
            let Some(cents) = used.get(key).copied().flatten() else {
                return answer_json(status, "", &json!({"error": {"code": status, "message": "no"}}));
            };
            // The sealed one has an account of its own.
            let of_account = |name: &&&str| (**name == SEALED) == (key == SEALED);
            let whole: i64 = used.iter().filter(|(name, _)| of_account(name)).filter_map(|(_, cents)| *cents).sum();
            let usd = |cents: i64| json!(cents as f64 / 100.0);
            match seen.path.as_str() {
                "/api/v1/key" => answer_json(200, "", &json!({"data": {"label": "x", "usage": usd(cents)}})),
                "/api/v1/credits" => {
                    answer_json(200, "", &json!({"data": {"total_credits": 100, "total_usage": usd(whole)}}))
                }
                generation if generation.starts_with("/api/v1/generation?id=") => {
                    let cost =
                        json!({"total_cost": 0.0003, "native_tokens_prompt": 194, "native_tokens_completion": 12});
                    answer_json(200, "", &json!({ "data": cost }))
                }
                other => panic!("{other}"),
            }
        })
        .await;
        let base = fake.base();
        let settings = Settings::from_lookup(&|name| match name {
            "OPENROUTER_API_KEYS" => Some(format!("{FIRST},{SECOND}")),
            "OPENROUTER_BASE_URL" => Some(base.clone()),
            _ => None,
        })
        .unwrap();
        let keys = Keys::new(bench.pool.clone(), Some(ring(&[("a", 1)])), false);
        let rows: Vec<_> = settings
            .keys()
            .into_iter()
            .map(|(provider, key)| {
                let identity = KeyIdentity::of(provider, Some(key));
                (provider.to_owned(), identity.fingerprint, identity.last4)
            })
            .collect();
        keys.board().register(&rows).await.unwrap();
        let address = settings.address("openrouter").unwrap();
        keys.put_platform(&new_key("openrouter", SEALED), address.as_str()).await.unwrap();
        let account = OpenRouterAccount::with_more(&settings, Some(Arc::new(keys))).unwrap();
        let books = Books {
            pool: bench.pool.clone(),
            client: Client::new(bench.pool.clone(), Arc::new(NoHook)),
            openrouter: Some(Arc::new(account)),
            stars: None,
            candidates: Vec::new(),
        };
        Self { bench, books, used, provider: fake }
    }

    /// The provider says that a key used so many cents more.
    fn uses(&self, key: &'static str, cents: i64) {
        let mut used = self.used.lock().unwrap();
        *used.get_mut(key).unwrap().as_mut().unwrap() += cents;
    }

    /// So many calls on a key of which nobody knows what became, `minutes` ago.
    async fn loses(&self, key: &str, calls: i64, minutes: i32) {
        let fingerprint = KeyIdentity::of("openrouter", Some(&key.into())).fingerprint;
        sqlx::query(
            "with a as (insert into activity_attempts (id, run_id, path, activity, attempt_no, user_id, state, lease_expires_at, ended_at)
                        values (gen_random_uuid(), gen_random_uuid(), 's', 'work@1', 1, $1, 'lost', engine_now(), engine_now()) returning id)
             insert into api_key_usage (attempt_id, call_no, call_key, api_key_id, user_id, provider, model_requested, purpose, request_sha256,
                                        state, provider_request_id, pricing_id, worst_pusd, started_at, finished_at)
             select a.id, n, n::text, k.id, $1, 'openrouter', 'm', 'p', '', 'unknown', k.last4 || n, (select min(id) from model_pricing), 0,
                    moment, moment
             from a, api_keys k, generate_series(1, $2) n, (select engine_now() - make_interval(mins => $3) as moment) t
             where k.provider = 'openrouter' and k.fingerprint = decode($4, 'hex')",
        )
        .bind(self.bench.user)
        .bind(calls)
        .bind(minutes)
        .bind(fingerprint)
        .execute(&self.bench.pool)
        .await
        .unwrap();
    }

    /// A call on a key that cost so many cents, by our books.
    async fn books(&self, key: &str, cents: i64) {
        let attempt = self.bench.attempt(RunId::new(), 1);
        self.bench.start(&attempt).await;
        self.bench.open(&attempt, "a.0", 100).await;
        self.bench.close(&attempt, "a.0", CallState::Succeeded, 100, 10).await;
        self.bench.end(&attempt, Outcome::Succeeded).await;
        let fingerprint = KeyIdentity::of("openrouter", Some(&key.into())).fingerprint;
        sqlx::query(
            "update api_key_usage u set provider = 'openrouter', provider_cost_pusd = $2,
               api_key_id = (select id from api_keys where provider = 'openrouter' and fingerprint = decode($3, 'hex'))
             where attempt_id = $1",
        )
        .bind(attempt.attempt_id.0)
        .bind(cents * 10_000_000_000)
        .bind(fingerprint)
        .execute(&self.bench.pool)
        .await
        .unwrap();
    }

    async fn look(&self) -> Output {
        reconcile::now(&self.books, "reconcile-providers").await.unwrap().unwrap()
    }

    /// The differences that stand.
    async fn told(&self) -> Vec<String> {
        let mut conn = self.bench.pool.acquire().await.unwrap();
        let found: Vec<Kept> = books::open_findings(&mut conn, 100).await.unwrap();
        found.into_iter().filter(|kept| kept.kind == "total_differs").map(|kept| kept.message).collect()
    }
}

#[tokio::test]
async fn each_key_is_compared_with_its_own_calls() {
    let room = Room::new().await;
    assert_eq!((room.look().await.checked, room.told().await.len()), (3, 0), "nothing to compare with");
    // Every key used what our books say.
    for (key, cents) in [(FIRST, 100), (SECOND, 250), (SEALED, 40)] {
        room.uses(key, cents);
        room.books(key, cents).await;
    }
    room.look().await;
    assert_eq!(room.told().await, [""; 0]);
    // In sum they agree; key by key they do not: a call was booked to the wrong one.
    room.uses(FIRST, 200);
    room.uses(SECOND, 100);
    room.books(FIRST, 100).await;
    room.books(SECOND, 200).await;
    room.look().await;
    let told = room.told().await;
    assert_eq!(told.len(), 2, "{told:?}");
    assert!(told.iter().any(|text| text.contains("ends in aaaa used 2 USD") && text.contains("say 1")), "{told:?}");
    assert!(told.iter().any(|text| text.contains("ends in bbbb used 1 USD") && text.contains("say 2")), "{told:?}");
    // A sealed one is no less looked at, and what agrees again is resolved.
    room.uses(SEALED, 30);
    room.look().await;
    let told = room.told().await;
    assert!(told.len() == 1 && told[0].contains("ends in cccc used 0.3 USD"), "{told:?}");
    room.look().await;
    assert_eq!(room.told().await, [""; 0]);
}

#[tokio::test]
async fn a_key_that_is_refused_keeps_no_other_from_being_compared() {
    let room = Room::new().await;
    room.look().await;
    room.uses(SECOND, 50);
    room.look().await;
    assert_eq!(room.told().await.len(), 1);
    // It cannot be asked any more: what was found of it still stands, and the others go on.
    room.used.lock().unwrap().insert(SECOND, None);
    room.uses(FIRST, 70);
    assert_eq!(room.look().await.checked, 2);
    let told = room.told().await;
    assert_eq!(told.len(), 2, "{told:?}");
    // None can be asked: the job fails, and is tried again by its schedule.
    for key in [FIRST, SEALED] {
        room.used.lock().unwrap().insert(key, None);
    }
    let failure = reconcile::now(&room.books, "reconcile-providers").await.unwrap().unwrap_err();
    assert_eq!(failure.code, "provider.key_invalid");
}

#[tokio::test]
async fn a_dead_key_does_not_keep_the_calls_of_another_from_being_looked_up() {
    for status in [401, 429] {
        let room = Room::refusing_with(status).await;
        room.used.lock().unwrap().insert(FIRST, None);
        // One more than a look at them takes, all older than the one that can be looked up.
        room.loses(FIRST, 101, 60).await;
        room.loses(SECOND, 1, 10).await;
        let job = || async { reconcile::now(&room.books, "reconcile-calls").await.unwrap() };
        assert_eq!(job().await.unwrap_err().detail["http_status"], status, "nothing else was due");
        // However slow this machine is: what is to be asked about later is not due within the test.
        let put_off = async || {
            let later = "update api_key_usage set next_lookup_at = engine_now() + interval '1 hour' where next_lookup_at is not null";
            sqlx::query(later).execute(&room.bench.pool).await.unwrap().rows_affected()
        };
        assert_eq!(put_off().await, 100, "{status}: each of them is asked about later");
        assert_eq!(job().await.unwrap(), Output { checked: 1, changed: 1, ..Output::default() }, "{status}");
        // Refused once a look.
        let asked =
            room.provider.seen().iter().map(|seen| seen.key().unwrap_or_default().to_owned()).collect::<Vec<_>>();
        assert_eq!(asked, [FIRST, FIRST, SECOND], "{status}");
        assert_eq!(put_off().await, 101);
        assert_eq!(job().await.unwrap(), Output::default(), "{status}: nothing is due");
    }
}
