//! Keys on a real Postgres: sealed ones of users, the standing that workers share, budgets per minute, and what calls on
//! own keys cost.

use crate::fake_provider::{Dialect, FakeProvider, answer_json, stream};
use base64::{Engine, prelude::BASE64_STANDARD};
use futures_util::future::{BoxFuture, join_all};
use loopwright_activities::{
    MIGRATIONS,
    billing::{
        BillingSettings, LedgerHook, MicroCredits, audit,
        ledger::{self, Identity},
    },
    keys::{Error, KeyView, Keys, NewKey, Rates, Ring, Taken},
    orchestrator::{Candidate, Message, Orchestrator, Pace, Request, Role, Routing},
    provider::{Settings, StructuredOutput, address::Lookup},
    usage::{CallClosed, CallOpened, CallState, PlannedCall, Reserve, Usage, UsageSource},
};
use loopwright_engine::{
    Failure, FailureKind,
    activity::{
        Context,
        detached::{self, Recorder},
    },
    embedded::testing::database,
    hook::{AttemptEnd, AttemptRef, AttemptStart, Outcome, Phase, Reading, Transition, TransitionHook, Verdict},
    ids::{AttemptId, RunId},
};
use secrecy::ExposeSecret;
use serde_json::{Value, json};
use sqlx::PgPool;
use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};
use uuid::Uuid;

const SECRET: &str = "sk-own-0123456789abcdefghij";

fn ring(entries: &[(&str, u8)]) -> Ring {
    let text: Vec<_> = entries.iter().map(|(id, b)| format!("{id}:{}", BASE64_STANDARD.encode([*b; 32]))).collect();
    Ring::parse(&text.join(",").into()).unwrap()
}

fn new_key(provider: &str, key: &str) -> NewKey {
    NewKey {
        provider: provider.into(),
        key: key.into(),
        label: "mine".into(),
        base_url: None,
        model: None,
        platform_fallback: false,
    }
}

async fn user(pool: &PgPool, telegram: i64) -> Uuid {
    let mut tx = pool.begin().await.unwrap();
    let (user, _) = ledger::ensure_user(&mut tx, &Identity::Telegram(telegram), MicroCredits(0)).await.unwrap();
    tx.commit().await.unwrap();
    user
}

#[tokio::test]
async fn a_key_is_kept_sealed_and_opens_in_its_own_row_alone() {
    let pool = database(MIGRATIONS).await;
    let (ann, bob) = (user(&pool, 1).await, user(&pool, 2).await);
    let keys = Keys::new(pool.clone(), Some(ring(&[("a", 1)])), false);
    let view = keys.put(ann, &new_key("gemini", SECRET)).await.unwrap();
    assert_eq!((view.last4.as_str(), view.status.as_str(), view.user_id), ("ghij", "active", Some(ann)));
    assert!(!serde_json::to_string(&view).unwrap().contains("0123456789"));
    let row: String = sqlx::query_scalar("select row_to_json(k)::text || encode(ciphertext, 'escape') from api_keys k")
        .fetch_one(&pool)
        .await
        .unwrap();
    assert!(!row.contains("sk-own") && !row.contains("0123456789abcdef"), "{row}");
    let own = keys.own(ann).await.unwrap();
    assert_eq!(keys.open(&own[0]).unwrap().key.expose_secret(), SECRET);
    assert!(!format!("{own:?} {:?}", keys.open(&own[0]).unwrap()).contains("sk-own"));

    // The same key once more is the same row, sealed anew.
    let again = keys.put(ann, &NewKey { label: "again".into(), ..new_key("gemini", SECRET) }).await.unwrap();
    assert_eq!((again.id, again.label.as_str()), (view.id, "again"));
    assert_eq!(keys.put(bob, &new_key("gemini", SECRET)).await.unwrap().user_id, Some(bob), "another's is another row");

    // Copied to another owner, provider, row, or bent to another host, it does not open.
    let bobs = keys.put(bob, &new_key("openrouter", "sk-other-0123456789")).await.unwrap();
    let copy =
        "update api_keys t set ciphertext = s.ciphertext, nonce = s.nonce, wrapped_dek = s.wrapped_dek from api_keys s
                where t.id = $1 and s.id = $2";
    sqlx::query(copy).bind(bobs.id).bind(view.id).execute(&pool).await.unwrap();
    let own = keys.own(bob).await.unwrap();
    let copied = own.iter().find(|key| key.id == bobs.id).unwrap();
    assert_eq!(keys.open(copied).unwrap_err().code(), "key_corrupt");
    for change in ["provider = 'openrouter'", "base_url = 'https://evil.example.com'"] {
        let mut tx = pool.begin().await.unwrap();
        sqlx::query(sqlx::AssertSqlSafe(format!("update api_keys set {change} where id = $1")))
            .bind(view.id)
            .execute(&mut *tx)
            .await
            .unwrap();
        tx.commit().await.unwrap();
        let own = keys.own(ann).await.unwrap();
        assert_eq!(keys.open(&own[0]).unwrap_err().code(), "key_corrupt", "{change}");
        sqlx::query("update api_keys set provider = 'gemini', base_url = null where id = $1")
            .bind(view.id)
            .execute(&pool)
            .await
            .unwrap();
    }
    sqlx::query("update api_keys set user_id = $2 where id = $1")
        .bind(view.id)
        .bind(user(&pool, 3).await)
        .execute(&pool)
        .await
        .unwrap();
    let own = keys.own(user(&pool, 3).await).await.unwrap();
    assert_eq!(keys.open(&own[0]).unwrap_err().code(), "key_corrupt", "another owner");
}

#[tokio::test]
async fn a_revoked_key_is_destroyed_and_may_come_back() {
    let pool = database(MIGRATIONS).await;
    let (ann, bob) = (user(&pool, 1).await, user(&pool, 2).await);
    let keys = Keys::new(pool.clone(), Some(ring(&[("a", 1)])), false);
    let id = keys.put(ann, &new_key("gemini", SECRET)).await.unwrap().id;
    for error in [keys.show(Some(bob), id).await.unwrap_err(), keys.revoke(Some(bob), id).await.unwrap_err()] {
        assert_eq!(error.code(), "key_not_found", "somebody else's");
    }
    keys.revoke(Some(ann), id).await.unwrap();
    let left: (i32, i32, String) =
        sqlx::query_as("select length(ciphertext), length(wrapped_dek), kek_id from api_keys")
            .fetch_one(&pool)
            .await
            .unwrap();
    assert_eq!(left, (0, 0, String::new()));
    assert!(keys.own(ann).await.unwrap().is_empty() && keys.list(Some(ann)).await.unwrap().is_empty());
    assert_eq!(keys.wrapped_by().await.unwrap(), []);
    for error in [keys.revoke(Some(ann), id).await.unwrap_err(), keys.set_enabled(id, true).await.unwrap_err()] {
        assert_eq!(error.code(), "key_not_found");
    }
    assert_eq!(keys.put(ann, &new_key("gemini", SECRET)).await.unwrap().id, id);
    assert_eq!(keys.own(ann).await.unwrap().len(), 1);
}

#[tokio::test]
async fn a_rotation_that_breaks_off_goes_on_and_the_old_key_may_leave() {
    let pool = database(MIGRATIONS).await;
    let ann = user(&pool, 1).await;
    let old = Keys::new(pool.clone(), Some(ring(&[("a", 1)])), false);
    for n in 0..4 {
        old.put(ann, &new_key("gemini", &format!("{SECRET}{n}"))).await.unwrap();
    }
    let both = Keys::new(pool.clone(), Some(ring(&[("b", 2), ("a", 1)])), false);
    // The third row cannot be written: the process dies there.
    sqlx::raw_sql(
        "create function stop() returns trigger language plpgsql as $$ begin
           if (select count(*) from api_keys where kek_id = 'b') >= 2 then raise exception 'died'; end if; return new; end $$;
         create trigger stop before update on api_keys for each row execute function stop()",
    )
    .execute(&pool)
    .await
    .unwrap();
    assert!(matches!(both.rewrap(None, false).await, Err(Error::Sql(_))));
    assert_eq!(both.wrapped_by().await.unwrap(), [("a".to_owned(), 2), ("b".to_owned(), 2)]);
    for key in both.own(ann).await.unwrap() {
        assert!(both.open(&key).unwrap().key.expose_secret().starts_with(SECRET), "all open in the middle");
    }
    sqlx::raw_sql("drop trigger stop on api_keys").execute(&pool).await.unwrap();
    let done = both.rewrap(None, false).await.unwrap();
    assert_eq!((done.rows, done.left, done.after), (2, 0, None));
    assert_eq!(both.rewrap(None, false).await.unwrap().rows, 0, "done is done");
    let new = Keys::new(pool.clone(), Some(ring(&[("b", 2)])), false);
    let before: Vec<Vec<u8>> =
        sqlx::query_scalar("select ciphertext from api_keys order by id").fetch_all(&pool).await.unwrap();
    assert_eq!(new.rewrap(None, true).await.unwrap().rows, 4, "new keys of the rows");
    let after: Vec<Vec<u8>> =
        sqlx::query_scalar("select ciphertext from api_keys order by id").fetch_all(&pool).await.unwrap();
    assert!(before.iter().zip(&after).all(|(a, b)| a != b));
    for key in new.own(ann).await.unwrap() {
        new.open(&key).unwrap();
        assert_eq!(old.open(&key).unwrap_err().code(), "key_encryption_key_missing");
    }
}

/// Every name leads there.
struct Leads(&'static str);

impl Lookup for Leads {
    fn addresses(&self, _: String) -> BoxFuture<'_, std::io::Result<Vec<SocketAddr>>> {
        let found = match self.0 {
            "" => Vec::new(),
            ip => vec![SocketAddr::new(ip.parse().unwrap(), 0)],
        };
        Box::pin(async move { Ok(found) })
    }
}

#[tokio::test]
async fn what_is_no_key_or_leads_inside_is_refused_with_a_code_and_leaves_nothing() {
    let pool = database(MIGRATIONS).await;
    let ann = user(&pool, 1).await;
    let keys = Keys::new(pool.clone(), Some(ring(&[("a", 1)])), false);
    let at = |url: &str| NewKey {
        base_url: Some(url.into()),
        model: Some("m".into()),
        ..new_key("openai_compatible", SECRET)
    };
    let leading = |ip| keys.clone().with_lookup(Arc::new(Leads(ip)));
    for (keys, new, code) in [
        (keys.clone(), new_key("mistral", SECRET), "key_invalid"),
        (keys.clone(), new_key("rehearsed", SECRET), "key_invalid"),
        (keys.clone(), new_key("gemini", ""), "key_invalid"),
        (keys.clone(), new_key("gemini", "two words"), "key_invalid"),
        (keys.clone(), new_key("gemini", "sk-\u{e4}"), "key_invalid"),
        (keys.clone(), new_key("gemini", &"x".repeat(5_000)), "key_invalid"),
        (keys.clone(), NewKey { label: "a\nb".into(), ..new_key("gemini", SECRET) }, "key_invalid"),
        (keys.clone(), NewKey { provider: "gemini".into(), ..at("https://api.example.com") }, "key_invalid"),
        (keys.clone(), new_key("openai_compatible", SECRET), "key_invalid"),
        (keys.clone(), NewKey { model: None, ..at("https://api.example.com") }, "key_invalid"),
        (keys.clone(), at("http://api.example.com"), "address_refused"),
        (keys.clone(), at("https://127.0.0.1"), "address_refused"),
        (keys.clone(), at("https://[::ffff:169.254.169.254]"), "address_refused"),
        (keys.clone(), at("https://me:x@api.example.com"), "address_refused"),
        (leading("10.0.0.1"), at("https://inside.example.com"), "address_refused"),
        (leading("169.254.169.254"), at("https://metadata.example.com"), "address_refused"),
        (leading("fd00::1"), at("https://inside.example.com"), "address_refused"),
        (leading(""), at("https://nowhere.example.com"), "address_refused"),
        (Keys::new(pool.clone(), None, false), new_key("gemini", SECRET), "keys_unavailable"),
    ] {
        let error = keys.put(ann, &new).await.unwrap_err();
        assert_eq!(error.code(), code, "{new:?}");
        assert!(!error.to_string().contains("sk-") && !error.to_string().contains("example.com"), "{error}");
    }
    let rows: i64 = sqlx::query_scalar("select count(*) from api_keys").fetch_one(&pool).await.unwrap();
    assert_eq!(rows, 0);
    assert!(leading("8.8.8.8").put(ann, &at("https://api.example.com/v1/")).await.is_ok());
    for n in 1..8 {
        keys.put(ann, &new_key("gemini", &format!("{SECRET}{n}"))).await.unwrap();
    }
    assert_eq!(keys.put(ann, &new_key("gemini", SECRET)).await.unwrap_err().code(), "keys_too_many");
}

const QUICK: Pace = Pace { backoff: Duration::from_millis(1), wait_max: Duration::from_secs(30) };

fn candidate(provider: &str, model: &str) -> Candidate {
    Candidate {
        provider: provider.into(),
        model: model.into(),
        context_tokens: 10_000,
        max_output_tokens: 4_000,
        structured_output: StructuredOutput::JsonSchema,
        tools: true,
        thinking: None,
        thinking_tokens: 0,
        requests_per_minute: None,
        tokens_per_minute: None,
        price_max_umtok: None,
    }
}

fn request() -> Request {
    Request {
        role: Role::Architect,
        purpose: "plan".into(),
        messages: vec![Message::User { text: "plan it".into() }],
        tools: vec![],
        output_schema: None,
        max_output_tokens: 1_000,
    }
}

/// A worker's orchestrator over a server with the OpenAI dialect and the platform's `api_keys`.
fn worker(keys: &Keys, server: &FakeProvider, api_keys: &str, candidate: Candidate) -> Orchestrator {
    let base = server.base();
    let settings = Settings::from_lookup(&|name| match name {
        "OPENAI_BASE_URL" => Some(base.clone()),
        "OPENAI_API_KEYS" => Some(api_keys.to_owned()),
        _ => None,
    })
    .unwrap();
    let routing = Routing { roles: BTreeMap::from([(Role::Architect, vec![candidate])]) };
    Orchestrator::with_keys(routing, settings.providers().unwrap(), QUICK, keys, settings)
}

fn attempt_of(user: Option<Uuid>) -> (Context, Arc<Recorder>) {
    let recorder: Arc<Recorder> = Arc::default();
    let attributes = user.map_or(json!({}), |user| json!({"user_id": user.to_string()}));
    (detached::context(detached::info("plan@1", attributes), BTreeMap::new(), Arc::clone(&recorder)), recorder)
}

async fn ask(worker: &Orchestrator) -> Result<String, Failure> {
    worker.call(&attempt_of(None).0, "plan", request()).await.map(|reply| reply.text)
}

fn bearers(server: &FakeProvider) -> Vec<String> {
    server.seen().iter().map(|seen| seen.headers["authorization"].trim_start_matches("Bearer ").to_owned()).collect()
}

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

/// The rows that `Orchestrator::configured` writes.
async fn register(pool: &PgPool, list: &[&str]) {
    let identity = |key: &&str| {
        let identity = loopwright_activities::provider::KeyIdentity::of("openai_compatible", Some(&(*key).into()));
        ("openai_compatible".to_owned(), identity.fingerprint, identity.last4)
    };
    let rows: Vec<_> = list.iter().map(identity).collect();
    Keys::new(pool.clone(), None, false).board().register(&rows).await.unwrap();
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
    assert_eq!((failure.code.as_str(), failure.kind), ("provider.key_invalid", FailureKind::Permanent));
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

/// Minutes of this test.
const MINUTE: Duration = Duration::from_millis(1_200);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workers_share_a_budget_per_minute_and_use_it() {
    const BUDGET: u64 = 100;
    const WORKERS: usize = 4;
    let pool = database(MIGRATIONS).await;
    sqlx::raw_sql(
        // Every lease as it was, and how often rows were written.
        "create table journal (id bigint, amount bigint, at timestamptz default clock_timestamp(), expires_at timestamptz, op text);
         create function note() returns trigger language plpgsql as $$ begin
           insert into journal (id, amount, expires_at, op) values (new.id, new.amount, new.expires_at, tg_op); return new; end $$;
         create trigger note after insert or update on rate_leases for each row execute function note()",
    )
    .execute(&pool)
    .await
    .unwrap();
    let began = Instant::now();
    let spent: Vec<u64> = join_all((0..WORKERS).map(|_| {
        let rates = Rates::new(pool.clone(), MINUTE);
        tokio::spawn(async move {
            let mut spent = 0;
            while began.elapsed() < 3 * MINUTE {
                match rates.take("requests x", BUDGET, 1).await.unwrap() {
                    Taken::Granted(_) => spent += 1,
                    Taken::Wait(wait) => tokio::time::sleep(wait.min(MINUTE)).await,
                }
            }
            spent
        })
    }))
    .await
    .into_iter()
    .map(Result::unwrap)
    .collect();
    let spent: u64 = spent.iter().sum();
    // What counts at a lease's beginning: every lease that ended less than a minute before. Never more than the budget.
    let most: i64 = sqlx::query_scalar(
        "with leases as (select id, min(at) filter (where op = 'INSERT') at, max(expires_at) expires_at,
                                (array_agg(amount order by at desc))[1] amount, max(amount) taken from journal group by id)
         select max((select sum(o.amount) from leases o where o.at <= l.at and o.expires_at > l.at - $1 * interval '1 ms'))::bigint
         from leases l",
    )
    .bind(MINUTE.as_millis() as f64)
    .fetch_one(&pool)
    .await
    .unwrap();
    assert!(most <= BUDGET as i64, "{most} of {BUDGET} in one minute");
    let (leased, writes, leases): (i64, i64, i64) = sqlx::query_as(
        "select (select sum(amount) from (select distinct on (id) amount from journal order by id, at desc) l)::bigint,
                max(n), count(*) from (select count(*) n from journal group by id) w",
    )
    .fetch_one(&pool)
    .await
    .unwrap();
    assert!(spent <= leased as u64, "{spent} of {leased} leased");
    assert!(writes <= 2, "a row was written {writes} times");
    // A slice is a twentieth; three minutes, with what each worker corrects at most.
    assert!(leases <= 20 * 4 + 4 * WORKERS as i64, "{leases} leases");
    // Whole minutes that fit between the first and the last question, with the twelfth that a lease may last.
    let minutes = began.elapsed().as_secs_f64() / (MINUTE.as_secs_f64() * 13.0 / 12.0);
    let share = spent as f64 / (minutes.floor().max(1.0) * BUDGET as f64);
    assert!(share >= 0.8, "{spent} in {minutes:.1} minutes");
}

#[tokio::test]
async fn a_dead_workers_slice_comes_back_and_a_call_larger_than_a_slice_is_served() {
    let pool = database(MIGRATIONS).await;
    let (dead, living) = (Rates::new(pool.clone(), MINUTE), Rates::new(pool.clone(), MINUTE));
    assert!(matches!(dead.take("tokens x", 1_000, 700).await.unwrap(), Taken::Granted(_)));
    drop(dead);
    assert!(matches!(living.take("tokens y", 1_000, 700).await.unwrap(), Taken::Granted(_)), "another scope");
    let Taken::Granted(small) = living.take("tokens x", 1_000, 250).await.unwrap() else { panic!("there is room") };
    living.give_back(&small, 50).await;
    assert!(matches!(living.take("tokens x", 1_000, 200).await.unwrap(), Taken::Granted(_)), "what was not spent");
    let Taken::Wait(wait) = living.take("tokens x", 1_000, 400).await.unwrap() else { panic!("over the budget") };
    assert!(wait <= MINUTE * 13 / 12 + Duration::from_millis(1), "{wait:?}");
    // Time goes by.
    sqlx::query("update rate_leases set expires_at = expires_at - $1 * interval '1 ms'")
        .bind(MINUTE.as_millis() as f64 * 1.1)
        .execute(&pool)
        .await
        .unwrap();
    let later = Rates::new(pool.clone(), MINUTE);
    assert!(matches!(later.take("tokens x", 1_000, 5_000).await.unwrap(), Taken::Granted(_)), "all of it, for one");
    let rows: i64 =
        sqlx::query_scalar("select count(*) from rate_leases where scope = 'tokens x'").fetch_one(&pool).await.unwrap();
    assert_eq!(rows, 1, "what no longer counts is gone");
}

#[tokio::test]
async fn small_calls_leave_a_large_one_that_was_refused_its_room() {
    let pool = database(MIGRATIONS).await;
    // Long enough that no want ends while this is asked; time goes by in the rows.
    let minute = Duration::from_secs(600);
    let worker = || Rates::new(pool.clone(), minute);
    let pass = |share: f64| {
        let ms = minute.as_millis() as f64 * share;
        sqlx::query("update rate_leases set expires_at = expires_at - $1 * interval '1 ms'").bind(ms).execute(&pool)
    };
    assert!(matches!(worker().take("tokens x", 1_000, 500).await.unwrap(), Taken::Granted(_)));
    pass(0.5).await.unwrap();
    assert!(matches!(worker().take("tokens x", 1_000, 400).await.unwrap(), Taken::Granted(_)));
    assert!(matches!(worker().take("tokens x", 1_000, 500).await.unwrap(), Taken::Wait(_)), "the large one");
    assert!(
        matches!(worker().take("tokens x", 1_000, 50).await.unwrap(), Taken::Wait(_)),
        "there is room, but not for it"
    );
    // The 500 of the first are back: 600.
    pass(0.6).await.unwrap();
    let Taken::Wait(wait) = worker().take("tokens x", 1_000, 200).await.unwrap() else {
        panic!("it would take the room")
    };
    assert!(wait <= minute / 60 + Duration::from_millis(1), "{wait:?}");
    assert!(matches!(worker().take("tokens x", 1_000, 100).await.unwrap(), Taken::Granted(_)), "beside it");
    assert!(matches!(worker().take("tokens x", 1_000, 500).await.unwrap(), Taken::Granted(_)), "the large one");
    let wants: i64 = sqlx::query_scalar("select count(*) from rate_wants").fetch_one(&pool).await.unwrap();
    assert_eq!(wants, 0);
    // One that does not come back is forgotten.
    assert!(matches!(worker().take("tokens x", 1_000, 900).await.unwrap(), Taken::Wait(_)));
    pass(2.0).await.unwrap();
    assert!(matches!(worker().take("tokens x", 1_000, 200).await.unwrap(), Taken::Wait(_)));
    sqlx::query("update rate_wants set wanted_until = engine_now()").execute(&pool).await.unwrap();
    assert!(matches!(worker().take("tokens x", 1_000, 200).await.unwrap(), Taken::Granted(_)));
}

#[tokio::test]
async fn what_was_never_served_goes_back_to_the_budget() {
    let pool = database(MIGRATIONS).await;
    let server = FakeProvider::start(|_, n| match n {
        0 => answer_json(404, "", &Dialect::OpenAi.error(404, "x")),
        _ => stream(&Dialect::OpenAi.good("hi")),
    })
    .await;
    // Room for one of these prompts.
    let request = || Request { messages: vec![Message::User { text: "x".repeat(2_000) }], ..request() };
    let tokens = loopwright_activities::provider::estimate::request_tokens_max(&request());
    let limited = Candidate { tokens_per_minute: Some(tokens), ..candidate("openai_compatible", "m") };
    let one = worker(&Keys::new(pool, None, false), &server, "key-a", limited);
    let failure = one.call(&attempt_of(None).0, "a", request()).await.unwrap_err();
    assert_eq!(failure.code, "model.unavailable");
    one.call(&attempt_of(None).0, "b", request()).await.unwrap();
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
    ask(&worker(&keys, &server, "key-a", candidate("openai_compatible", "m"))).await.unwrap();
    let status: String = sqlx::query_scalar("select status from api_keys").fetch_one(&pool).await.unwrap();
    assert_eq!(status, "active");
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

#[tokio::test]
async fn calls_beyond_the_budget_of_one_key_go_to_the_next_and_then_end_with_the_wait() {
    let pool = database(MIGRATIONS).await;
    let server = FakeProvider::always(stream(&Dialect::OpenAi.good("hi"))).await;
    let keys = || Keys::new(pool.clone(), None, false);
    let limited = Candidate { requests_per_minute: Some(2), ..candidate("openai_compatible", "m") };
    for n in 0..4 {
        // Each call by a worker of its own.
        ask(&worker(&keys(), &server, "key-a,key-b", limited.clone())).await.unwrap_or_else(|e| panic!("{n}: {e}"));
    }
    assert_eq!(bearers(&server), ["key-a", "key-a", "key-b", "key-b"]);
    let failure = ask(&worker(&keys(), &server, "key-a,key-b", limited)).await.unwrap_err();
    assert_eq!((failure.code.as_str(), failure.kind), ("transient.rate_limited", FailureKind::Retryable));
    assert!((30_000..=65_000).contains(&failure.retry_after_ms.unwrap()), "{failure:?}");
    assert_eq!(server.seen().len(), 4);
    let few = Candidate { tokens_per_minute: Some(40), ..candidate("openai_compatible", "other") };
    ask(&worker(&keys(), &server, "key-a", few.clone())).await.unwrap();
    let long = Request { messages: vec![Message::User { text: "x".repeat(300) }], ..request() };
    let worker = worker(&keys(), &server, "key-a", few);
    assert_eq!(worker.call(&attempt_of(None).0, "p", long).await.unwrap_err().code, "transient.rate_limited");
}

struct Ledger {
    pool: PgPool,
    hook: LedgerHook,
}

impl Ledger {
    fn attempt(user: Uuid) -> AttemptRef {
        let run = RunId::new();
        AttemptRef {
            run_id: run,
            attempt_id: AttemptId::derive(run, "step", 1),
            activity: "work@1".into(),
            path: "step".into(),
            attempt: 1,
            attributes: Arc::new(json!({"user_id": user.to_string()})),
            budget: Arc::new(Value::Null),
            deadline: chrono::Utc::now() + chrono::Duration::minutes(20),
        }
    }
    /// Plans one call of 1.44 credits. The reason of a refusal.
    async fn start(&self, attempt: &AttemptRef) -> Option<String> {
        let calls = vec![PlannedCall {
            candidates: vec![("openai_compatible".into(), "m".into())],
            count: 1,
            input_tokens: 1_000,
            output_tokens: 1_000,
        }];
        let reserve = serde_json::to_value(Reserve { calls }).unwrap();
        let started = vec![AttemptStart { attempt: attempt.clone(), reserve }];
        self.apply(Transition { ord: 0, run_id: attempt.run_id, ended: vec![], started }).await
    }
    async fn end(&self, attempt: &AttemptRef) {
        let ended =
            vec![AttemptEnd { attempt: attempt.clone(), outcome: Outcome::Succeeded, failure: None, again: false }];
        assert_eq!(self.apply(Transition { ord: 0, run_id: attempt.run_id, ended, started: vec![] }).await, None);
    }
    async fn apply(&self, transition: Transition) -> Option<String> {
        let mut tx = self.pool.begin().await.unwrap();
        let refused = self.hook.apply(&mut tx, std::slice::from_ref(&transition)).await.map_err(|e| e.to_string());
        let refused = refused.unwrap().into_iter().next();
        if refused.is_none() {
            tx.commit().await.unwrap();
        }
        refused.map(|refusal| refusal.reason)
    }
    async fn meter(&self, attempt: &AttemptRef, key: &str, phase: Phase, body: Value) -> Verdict {
        let mut tx = self.pool.begin().await.unwrap();
        let reading = Reading { key, phase, body: &body, current: true };
        let verdict = self.hook.meter(&mut tx, attempt, reading).await.map_err(|e| e.to_string()).unwrap();
        tx.commit().await.unwrap();
        verdict
    }
    async fn violations(&self) -> Vec<&'static str> {
        let mut conn = self.pool.acquire().await.unwrap();
        audit::run(&mut conn).await.unwrap().into_iter().map(|violation| violation.invariant).collect()
    }
}

fn opening(key: &str, own: Option<Uuid>) -> Value {
    let identity = loopwright_activities::provider::KeyIdentity::of("openai_compatible", Some(&key.into()));
    serde_json::to_value(CallOpened {
        provider: "openai_compatible".into(),
        model: "m".into(),
        purpose: "plan".into(),
        request_sha256: "0".repeat(64),
        key_fingerprint: identity.fingerprint,
        key_last4: identity.last4,
        own_key_id: own,
        local: true,
        price_max_umtok: None,
        input_tokens_max: 1_000,
        output_tokens_max: 1_000,
    })
    .unwrap()
}

fn closing() -> Value {
    let usage = Usage {
        tokens_prompt: 1_000,
        tokens_output: 500,
        source: UsageSource::Provider,
        provider_cost_pusd: Some(7_000_000_000),
        ..Usage::default()
    };
    serde_json::to_value(CallClosed {
        state: CallState::Succeeded,
        model_served: Some("m".into()),
        provider_request_id: None,
        http_status: Some(200),
        error_class: None,
        finish_reason: Some("stop".into()),
        stream_completed: true,
        usage: Some(usage),
    })
    .unwrap()
}

#[tokio::test]
async fn a_call_on_an_own_key_is_booked_and_costs_nothing_even_without_credits() {
    let pool = database(MIGRATIONS).await;
    let (ann, bob) = (user(&pool, 1).await, user(&pool, 2).await);
    let keys = Keys::new(pool.clone(), Some(ring(&[("a", 1)])), true);
    let ledger = Ledger { pool: pool.clone(), hook: LedgerHook::new(BillingSettings::default()) };
    assert_eq!(ledger.start(&Ledger::attempt(ann)).await.as_deref(), Some("credits"), "without a key he has to pay");
    let new = NewKey {
        base_url: Some("http://127.0.0.1:9".into()),
        model: Some("m".into()),
        ..new_key("openai_compatible", SECRET)
    };
    let id = keys.put(ann, &new).await.unwrap().id;
    let attempt = Ledger::attempt(ann);
    assert_eq!(ledger.start(&attempt).await, None);
    let verdict = ledger.meter(&attempt, "a", Phase::Open, opening(SECRET, Some(id))).await;
    assert!(matches!(verdict, Verdict::Accepted), "{verdict:?}");
    ledger.meter(&attempt, "a", Phase::Close, closing()).await;
    // A key of the platform all the same needs credits; another's key is nobody's.
    let refused = ledger.meter(&attempt, "b", Phase::Open, opening("platform", None)).await;
    assert!(matches!(refused, Verdict::Refused { reason, .. } if reason == "credits"));
    let other = keys.put(bob, &new).await.unwrap().id;
    for (key, row) in [(SECRET, other), (SECRET, Uuid::now_v7()), ("sk-another", id)] {
        let refused = ledger.meter(&attempt, "c", Phase::Open, opening(key, Some(row))).await;
        assert!(matches!(refused, Verdict::Refused { reason, .. } if reason == "key_revoked"));
    }
    ledger.end(&attempt).await;
    let booked: (Uuid, String, i64, Option<i64>, Option<i64>) =
        sqlx::query_as("select api_key_id, state, cost_pusd, provider_cost_pusd, tokens_prompt from api_key_usage")
            .fetch_one(&pool)
            .await
            .unwrap();
    assert_eq!(booked, (id, "succeeded".into(), 0, Some(7_000_000_000), Some(1_000)));
    let rows: i64 = sqlx::query_scalar("select count(*) from credit_transactions").fetch_one(&pool).await.unwrap();
    assert_eq!(rows, 0, "nothing was held, nothing taken");
    assert_eq!(ledger.violations().await, [""; 0]);

    // The invariants still bite.
    for (invariant, sql) in [
        ("I18", "update api_key_usage set cost_pusd = 1"),
        ("I18", "update api_key_usage set cost_pusd = 0, user_id = (select id from users where telegram_user_id = 2)"),
        (
            "I8",
            "update api_keys set user_id = null, source = 'environment', ciphertext = null, nonce = null, wrapped_dek = null, kek_id = null where id in (select api_key_id from api_key_usage)",
        ),
    ] {
        sqlx::raw_sql(sql).execute(&pool).await.unwrap();
        assert!(ledger.violations().await.contains(&invariant), "{invariant}: {sql}");
    }
}

#[tokio::test]
async fn a_fallback_to_the_platform_is_held_and_charged_by_itself() {
    let pool = database(MIGRATIONS).await;
    let ann = user(&pool, 1).await;
    let mut tx = pool.begin().await.unwrap();
    ledger::grant(&mut tx, ann, ledger::GrantSource::Promo, "t", MicroCredits::from_credits(10), None).await.unwrap();
    tx.commit().await.unwrap();
    let keys = Keys::new(pool.clone(), Some(ring(&[("a", 1)])), true);
    let new = NewKey {
        base_url: Some("http://127.0.0.1:9".into()),
        model: Some("m".into()),
        ..new_key("openai_compatible", SECRET)
    };
    let id = keys.put(ann, &new).await.unwrap().id;
    let ledger = Ledger { pool: pool.clone(), hook: LedgerHook::new(BillingSettings::default()) };
    let attempt = Ledger::attempt(ann);
    ledger.start(&attempt).await;
    for (key, body) in
        [("a", opening(SECRET, Some(id))), ("b", opening("platform", None)), ("c", opening("platform", None))]
    {
        let verdict = ledger.meter(&attempt, key, Phase::Open, body).await;
        assert!(matches!(verdict, Verdict::Accepted), "{key} {verdict:?}");
        ledger.meter(&attempt, key, Phase::Close, closing()).await;
    }
    ledger.end(&attempt).await;
    let costs: Vec<i64> =
        sqlx::query_scalar("select cost_pusd from api_key_usage order by call_no").fetch_all(&pool).await.unwrap();
    assert_eq!(costs, [0, 7_000_000_000, 7_000_000_000]);
    assert_eq!(ledger.violations().await, [""; 0]);
    let held: i64 =
        sqlx::query_scalar("select credit_held_ucr from users where id = $1").bind(ann).fetch_one(&pool).await.unwrap();
    assert_eq!(held, 0);
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
