//! Reconciliation and price lists, against a provider and a Telegram of ours.

use crate::{
    bench::{Bench, closing_with, opening},
    fake_provider::{Act, FakeProvider, Seen},
};
use chrono::{DateTime, Duration, Utc};
use futures_util::future::BoxFuture;
use loopwright_activities::{
    billing::{
        books::{self, Kept},
        ledger::{self, LedgerError},
        pricelist::{self, Trust},
        purchase,
        report::{self, By, Span},
    },
    provider::{Settings, account::OpenRouterAccount},
    reconcile::{self, Books, Output, StarTransaction, Stars},
    usage::{CallState, Usage, UsageSource},
};
use loopwright_engine::{
    Failure,
    client::Client,
    hook::{AttemptRef, NoHook, Outcome, Phase},
    ids::RunId,
};
use serde_json::{Value, json};
use std::sync::{Arc, Mutex};

/// One JSON answer.
pub(crate) fn answer(status: &str, body: &str) -> Vec<Act> {
    let text = format!(
        "HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
        body.len()
    );
    vec![Act::Bytes(text.into_bytes())]
}

pub(crate) fn books_of(bench: &Bench) -> Books {
    Books {
        pool: bench.pool.clone(),
        client: Client::new(bench.pool.clone(), Arc::new(NoHook)),
        openrouter: None,
        stars: None,
        candidates: Vec::new(),
    }
}

pub(crate) fn openrouter(fake: &FakeProvider) -> Option<Arc<OpenRouterAccount>> {
    let base = fake.base();
    let settings = Settings::from_lookup(&|name| match name {
        "OPENROUTER_API_KEY" => Some("sk-or-test".into()),
        "OPENROUTER_BASE_URL" => Some(base.clone()),
        _ => None,
    });
    OpenRouterAccount::configured(&settings.expect("settings")).expect("account").map(Arc::new)
}

pub(crate) async fn job(books: &Books, name: &str) -> Output {
    reconcile::now(books, name).await.expect("a job").expect("done")
}

pub(crate) async fn open_findings(bench: &Bench) -> Vec<Kept> {
    let mut conn = bench.pool.acquire().await.expect("conn");
    books::open_findings(&mut conn, 100).await.expect("findings")
}

fn kinds(found: &[Kept]) -> Vec<(&str, &str)> {
    let mut kinds: Vec<_> = found.iter().map(|f| (f.kind.as_str(), f.subject.as_str())).collect();
    kinds.sort_unstable();
    kinds
}

#[tokio::test]
async fn a_lost_answer_is_looked_up_until_the_provider_knows_it_and_charges_nobody() {
    let bench = Bench::new(100).await;
    let attempt = bench.attempt(RunId::new(), 1);
    bench.start(&attempt).await;
    // Announced at the price of large prompts; it turns out to have been a small one.
    sqlx::raw_sql(
        "insert into model_pricing (provider, model_id, effective_from, min_prompt_tokens, input_umtok, output_umtok, source)
         values ('openrouter', 'v/m', '2026-01-01', 0, 1000000, 1000000, 't'), ('openrouter', 'v/m', '2026-01-01', 500, 2000000, 2000000, 't')",
    )
    .execute(&bench.pool)
    .await
    .expect("prices");
    let mut call = opening(100);
    (call["provider"], call["model"]) = ("openrouter".into(), "v/m".into());
    bench.meter(&attempt, "a.0", Phase::Open, call).await;
    bench.meter(&attempt, "a.0", Phase::Note, json!({"provider_request_id": "gen-1"})).await;
    // Its worker is dead.
    bench.end(&attempt, Outcome::Lost).await;
    let fake = FakeProvider::start(|seen: &Seen, n| {
        assert_eq!(seen.path, "/api/v1/generation?id=gen-1");
        if n == 0 {
            return answer("404 Not Found", r#"{"error":{"code":404,"message":"not yet"}}"#);
        }
        answer("200 OK", r#"{"data":{"id":"gen-1","model":"m","total_cost":0.000310000001,"finish_reason":"stop","native_tokens_prompt":194,"native_tokens_completion":12,"native_tokens_reasoning":5,"native_tokens_cached":100,"latency":0.10000000000000000000001}}"#)
    })
    .await;
    let books = Books { openrouter: openrouter(&fake), ..books_of(&bench) };
    assert_eq!(job(&books, "reconcile-calls").await, Output { checked: 1, ..Output::default() });
    assert_eq!(job(&books, "reconcile-calls").await.checked, 0, "later: it backs off");
    sqlx::query("update api_key_usage set next_lookup_at = engine_now()").execute(&bench.pool).await.expect("later");
    assert_eq!(job(&books, "reconcile-calls").await.changed, 1);
    assert_eq!(job(&books, "reconcile-calls").await.checked, 0, "it is known");
    let row: (String, String, i64, i64, i64, String) = sqlx::query_as(
        "select state, usage_source, tokens_prompt, provider_cost_pusd, cost_pusd, raw_usage->>'latency' from api_key_usage",
    )
    .fetch_one(&bench.pool)
    .await
    .expect("row");
    let to_the_letter = "0.10000000000000000000001".to_owned();
    assert_eq!(row, ("unknown".into(), "lookup".into(), 194, 310_000_001, 0, to_the_letter));
    assert_eq!(bench.balance().await, (100_000_000, 0));
    assert_eq!(bench.violations().await, [""; 0]);
    let audited = job(&books, "reconcile-ledger").await;
    assert_eq!((audited.findings, audited.changed), (0, 0), "nobody is stopped");
}

#[tokio::test]
async fn calls_are_asked_about_after_pauses_that_double_up_to_two_hours_for_a_day() {
    let bench = Bench::new(100).await;
    let attempt = bench.attempt(RunId::new(), 1);
    bench.start(&attempt).await;
    // One of unknown outcome and one of doubted cost.
    let doubtful = Usage {
        tokens_prompt: 1_000,
        tokens_output: 100,
        source: UsageSource::Provider,
        doubtful_cost: Some("-0.5".into()),
        ..Usage::default()
    };
    for (key, state) in [("a.0", CallState::Unknown), ("a.1", CallState::Succeeded)] {
        bench.open(&attempt, key, 100).await;
        bench.meter(&attempt, key, Phase::Close, closing_with(state, doubtful.clone())).await;
    }
    bench.end(&attempt, Outcome::Failed).await;
    // Both at one instant, at which the clock stands until it is set.
    sqlx::raw_sql(
        "create table test_clock as select max(finished_at) as at, max(finished_at) as began from api_key_usage;
         update api_key_usage set provider = 'openrouter', finished_at = (select began from test_clock);
         update cost_doubts set found_at = (select began from test_clock);
         create or replace function engine_now() returns timestamptz language sql stable as $$ select at from test_clock $$",
    )
    .execute(&bench.pool)
    .await
    .expect("as if");
    let set_clock = async |to: &str| {
        let sql = format!("update test_clock set at = {to}");
        sqlx::query(sqlx::AssertSqlSafe(sql)).execute(&bench.pool).await.expect("set");
    };
    let fake = FakeProvider::always(answer("404 Not Found", r#"{"error":{"code":404,"message":"not yet"}}"#)).await;
    let books = Books { openrouter: openrouter(&fake), ..books_of(&bench) };
    let minutes = ["00:00:30", "00:01:00", "00:02:00", "00:04:00", "00:08:00", "00:16:00", "00:32:00"];
    for pause in minutes.into_iter().chain(["01:04:00", "02:00:00", "02:00:00"]) {
        assert_eq!(job(&books, "reconcile-calls").await.checked, 2, "due before {pause}");
        let pauses: Vec<String> =
            sqlx::query_scalar("select (next_lookup_at - engine_now())::text from api_key_usage order by id")
                .fetch_all(&bench.pool)
                .await
                .expect("pauses");
        assert_eq!(pauses, [pause; 2]);
        let due = "(select min(next_lookup_at) from api_key_usage)";
        set_clock(&format!("{due} - interval '1 microsecond'")).await;
        assert_eq!(job(&books, "reconcile-calls").await.checked, 0, "within {pause}");
        set_clock(due).await;
    }
    // Both are due: what keeps them from being asked about is their age.
    for (age, checked) in [("24 hours", 0), ("23:59:59.999999", 2)] {
        set_clock(&format!("began + interval '{age}'")).await;
        assert_eq!(job(&books, "reconcile-calls").await.checked, checked, "{age}");
    }
}

#[tokio::test]
async fn a_look_up_is_read_whatever_stands_where_a_yes_or_no_belongs() {
    let words = [
        (r#""is_byok":true,"upstream_inference_cost":0.002"#, true, Some(2_000_000_000)),
        (r#""is_byok":false,"upstream_inference_cost":0.002"#, false, None),
        (r#""is_byok":"yes","upstream_inference_cost":0.002"#, true, Some(2_000_000_000)),
        (r#""is_byok":1,"upstream_inference_cost":0"#, false, None),
        (r#""is_byok":null"#, false, None),
        (r#""is_byok":true,"upstream_inference_cost":"much""#, true, None),
    ];
    let fake = FakeProvider::start(move |_: &Seen, n| {
        answer("200 OK", &format!(r#"{{"data":{{"id":"gen-1","total_cost":0.0003,{}}}}}"#, words[n].0))
    })
    .await;
    let account = openrouter(&fake).expect("configured");
    let keys = account.keys().await;
    for (said, upstream_key, cost) in words {
        let found = account.generation(&keys[0], "gen-1").await.expect(said).expect(said);
        assert_eq!((found.usage.upstream_key, found.usage.upstream_cost_pusd), (upstream_key, cost), "{said}");
        assert_eq!(found.usage.provider_cost_pusd, Some(300_000_000), "{said}");
    }
}

#[tokio::test]
async fn an_error_of_one_look_up_does_not_stop_the_others_and_own_keys_are_not_looked_up() {
    let bench = Bench::new(100).await;
    let attempt = bench.attempt(RunId::new(), 1);
    bench.start(&attempt).await;
    for key in ["a.0", "a.1"] {
        bench.open(&attempt, key, 100).await;
        bench.close(&attempt, key, CallState::Unknown, 0, 0).await;
    }
    bench.end(&attempt, Outcome::Failed).await;
    sqlx::raw_sql(
        "update api_key_usage set provider = 'openrouter', provider_request_id = 'gen-' || call_no; update api_keys set provider = 'openrouter'",
    )
    .execute(&bench.pool)
    .await
    .expect("as if");
    let fake = FakeProvider::start(|seen: &Seen, _| {
        if seen.path.ends_with("gen-1") {
            return answer("500 Internal Server Error", r#"{"error":{"code":500,"message":"not this one"}}"#);
        }
        answer("200 OK", r#"{"data":{"id":"gen-2","model":"m","total_cost":0.0003,"native_tokens_prompt":194,"native_tokens_completion":12}}"#)
    })
    .await;
    let books = Books { openrouter: openrouter(&fake), ..books_of(&bench) };
    assert_eq!(job(&books, "reconcile-calls").await, Output { checked: 2, changed: 1, ..Output::default() });
    assert_eq!(job(&books, "reconcile-calls").await.checked, 0, "the first one is asked again later");
    sqlx::raw_sql(
        "update api_key_usage set next_lookup_at = engine_now(); update api_keys set user_id = (select id from users)",
    )
    .execute(&bench.pool)
    .await
    .expect("a user's own key");
    assert_eq!(job(&books, "reconcile-calls").await.checked, 0, "the platform's key does not know calls of others");
}

#[tokio::test]
async fn what_was_released_stops_nobody_again_until_something_new_breaks() {
    let bench = Bench::new(100).await;
    let books = books_of(&bench);
    sqlx::query("update users set ledger_seq = ledger_seq + 1").execute(&bench.pool).await.expect("corrupted");
    assert_eq!(job(&books, "reconcile-ledger").await.changed, 1);
    let mut conn = bench.pool.acquire().await.expect("conn");
    assert!(ledger::resume_holds(&mut conn, bench.user).await.expect("released"));
    let again = job(&books, "reconcile-ledger").await;
    assert_eq!((again.findings, again.changed), (1, 0), "an operator has looked at it");
    // Mended and broken again it is new.
    sqlx::query("update users set ledger_seq = ledger_seq - 1").execute(&bench.pool).await.expect("mended");
    assert_eq!(job(&books, "reconcile-ledger").await.findings, 0);
    sqlx::query("update users set ledger_seq = ledger_seq + 1").execute(&bench.pool).await.expect("corrupted");
    assert_eq!(job(&books, "reconcile-ledger").await.changed, 1);
    assert!(ledger::resume_holds(&mut conn, bench.user).await.expect("released"));
    // And so is another difference beside the old one.
    sqlx::query("update users set credit_balance_ucr = credit_balance_ucr + 1")
        .execute(&bench.pool)
        .await
        .expect("corrupted");
    assert_eq!(job(&books, "reconcile-ledger").await.changed, 1);
    let why: String =
        sqlx::query_scalar("select holds_stopped_why from users").fetch_one(&bench.pool).await.expect("why");
    assert_eq!(why, "I6");
}

#[tokio::test]
async fn a_late_worker_is_told_and_stops_nobody() {
    let bench = Bench::new(100).await;
    let books = books_of(&bench);
    bench.start(&bench.attempt(RunId::new(), 1)).await;
    sqlx::query("update activity_attempts set lease_expires_at = engine_now() - interval '1 hour'")
        .execute(&bench.pool)
        .await
        .expect("late");
    let done = job(&books, "reconcile-ledger").await;
    assert_eq!((done.findings, done.changed), (1, 0));
    assert_eq!(bench.start(&bench.attempt(RunId::new(), 1)).await, None);
}

#[tokio::test]
async fn a_broken_book_is_told_once_stops_its_user_and_is_resolved_when_mended() {
    let bench = Bench::new(100).await;
    let books = books_of(&bench);
    assert_eq!(job(&books, "reconcile-ledger").await.findings, 0);
    sqlx::query("update users set ledger_seq = ledger_seq + 1").execute(&bench.pool).await.expect("corrupted");
    let first = job(&books, "reconcile-ledger").await;
    assert_eq!((first.findings, first.changed), (1, 1));
    let second = job(&books, "reconcile-ledger").await;
    assert_eq!((second.findings, second.changed), (1, 0), "told and stopped once");
    let found = open_findings(&bench).await;
    assert_eq!(
        (kinds(&found), found[0].seen, found[0].user_id),
        (vec![("I1", &*bench.user.to_string())], 2, Some(bench.user))
    );
    assert_eq!(bench.start(&bench.attempt(RunId::new(), 1)).await.as_deref(), Some("review"));
    sqlx::query("update users set ledger_seq = ledger_seq - 1").execute(&bench.pool).await.expect("mended");
    assert_eq!(job(&books, "reconcile-ledger").await.findings, 0);
    assert_eq!(open_findings(&bench).await.len(), 0);
    assert_eq!(bench.start(&bench.attempt(RunId::new(), 1)).await.as_deref(), Some("review"), "an operator decides");
}

#[tokio::test]
async fn sums_that_part_from_the_providers_are_told() {
    let bench = Bench::new(100).await;
    let used = Arc::new(Mutex::new("37.5"));
    let said = used.clone();
    let fake = FakeProvider::start(move |seen: &Seen, _| {
        let usage = *said.lock().expect("no panic while held");
        match seen.path.as_str() {
            "/api/v1/key" => answer("200 OK", &format!(r#"{{"data":{{"label":"x","usage":{usage}}}}}"#)),
            "/api/v1/credits" => {
                answer("200 OK", &format!(r#"{{"data":{{"total_credits":100.0,"total_usage":{usage}}}}}"#))
            }
            other => panic!("{other}"),
        }
    })
    .await;
    let books = Books { openrouter: openrouter(&fake), ..books_of(&bench) };
    assert_eq!(job(&books, "reconcile-providers").await.findings, 0, "the first look has nothing to compare with");
    assert_eq!(job(&books, "reconcile-providers").await.findings, 0);
    *used.lock().expect("no panic while held") = "37.7000000000001";
    assert_eq!(job(&books, "reconcile-providers").await.findings, 1, "0.20 USD that no call of ours cost");
    let found = open_findings(&bench).await;
    assert!(found.len() == 1 && found[0].kind == "total_differs" && found[0].subject.starts_with("openrouter/"));
    assert_eq!(job(&books, "reconcile-providers").await.findings, 0, "until the next difference");
}

/// What the daily job tells if a call of 3,000,000,000 pico-USD by our price, with that cost, is the only one of its day.
async fn told_of(bench: &Bench, attempt: &AttemptRef, key: &str, cost_pusd: i64, raw: Value) -> Vec<(String, String)> {
    let usage = Usage {
        tokens_prompt: 1_000,
        tokens_output: 100,
        source: UsageSource::Provider,
        provider_cost_pusd: Some(cost_pusd),
        raw,
        ..Usage::default()
    };
    bench.open(attempt, key, 100).await;
    bench.meter(attempt, key, Phase::Close, closing_with(CallState::Succeeded, usage)).await;
    job(&books_of(bench), "reconcile-providers").await;
    sqlx::query("update api_key_usage set finished_at = finished_at - interval '2 days'")
        .execute(&bench.pool)
        .await
        .expect("yesterday");
    open_findings(bench).await.into_iter().map(|found| (found.kind, found.subject)).collect()
}

fn stale(is_stale: bool) -> Vec<(String, String)> {
    let finding = ("price_stale".to_owned(), "rehearsed/rehearsed/architect".to_owned());
    is_stale.then_some(finding).into_iter().collect()
}

#[tokio::test]
async fn a_price_is_stale_if_what_was_charged_is_more_than_two_percent_off() {
    let bench = Bench::new(100).await;
    let attempt = bench.attempt(RunId::new(), 1);
    bench.start(&attempt).await;
    // To the pico-USD, of the larger of the two: 2 % of 3,000,000,000 below it, 2 % of 3,061,224,489.8 above.
    for (cost_pusd, is_stale) in
        [(2_940_000_000, false), (2_939_999_999, true), (3_061_224_489, false), (3_061_224_490, true)]
    {
        let told = told_of(&bench, &attempt, &cost_pusd.to_string(), cost_pusd, Value::Null).await;
        assert_eq!(told, stale(is_stale), "{cost_pusd}");
    }
}

// A price that was right was called stale, each day.
#[tokio::test]
async fn a_fee_says_nothing_of_a_price_however_the_key_behind_it_is_said() {
    let bench = Bench::new(100).await;
    let attempt = bench.attempt(RunId::new(), 1);
    bench.start(&attempt).await;
    let charged = json!({"upstream_inference_cost": 0.003});
    for (raw, is_stale) in [
        (json!({"is_byok": true}), false),
        (json!({"cost_details": charged}), false),
        (json!({"is_byok": null, "cost_details": charged}), false),
        // What is no amount, or none, says nothing of a key; and neither does what is said to be no such key.
        (json!({"cost_details": {"upstream_inference_cost": 0}}), true),
        (json!({"cost_details": {"upstream_inference_cost": "much"}}), true),
        (json!({"cost_details": [1]}), true),
        (json!({"is_byok": false, "cost_details": charged}), true),
    ] {
        let what = raw.to_string();
        assert_eq!(told_of(&bench, &attempt, &what, 1_000, raw).await, stale(is_stale), "{what}");
    }
}

const LIST: &str = r#"{"data": [
 {"id": "google/gemini-2.5-flash", "pricing": {"prompt": "0.0000003", "completion": "0.0000025", "input_cache_read": "0.00000003"}},
 {"id": "google/gemini-2.5-pro", "pricing": {"prompt": "0.0000013", "completion": "0.00001",
   "overrides": [{"min_prompt_tokens": 200000, "prompt": "0.0000025", "completion": "0.000015"}]}},
 {"id": "openrouter/auto", "pricing": {"prompt": "-1", "completion": "-1"}},
 {"id": "new/model", "pricing": {"prompt": "0.000001", "completion": "0.000002"}}]}"#;

#[tokio::test]
async fn a_list_of_models_is_read_to_its_last_page_and_only_from_its_own_server() {
    let list = async |pages: Vec<&'static str>| {
        let fake = FakeProvider::start(move |seen: &Seen, _| {
            let page = seen.path.split_once("page=").map_or(0, |(_, n)| n.parse::<usize>().expect("a number"));
            answer("200 OK", pages[page % pages.len()])
        })
        .await;
        let list = openrouter(&fake).expect("configured").models().await;
        (list.map(|text| text.expect("a key")).map_err(|error| error.failure.message), fake.seen().len())
    };
    const FIRST: &str =
        r#"{"data":[{"id":"a","pricing":{"prompt":"0.10"}}],"total_count":2,"links":{"next":"/api/v1/models?page=1"}}"#;
    const LAST: &str = r#"{"data":[{"id":"b","pricing":{"prompt":0.20}}],"total_count":2,"links":{"next":null}}"#;
    let whole = r#"{"data":[{"id":"a","pricing":{"prompt":"0.10"}},{"id":"b","pricing":{"prompt":0.20}}]}"#;
    assert_eq!(list(vec![FIRST, LAST]).await, (Ok(whole.to_owned()), 2), "to the letter");
    assert_eq!(list(vec![r#"{"data":[{"id":"a"}]}"#]).await, (Ok(r#"{"data":[{"id":"a"}]}"#.to_owned()), 1));
    let (short, _) = list(vec![LAST]).await;
    assert!(short.unwrap_err().contains("fewer than it says"));
    let (elsewhere, _) = list(vec![r#"{"data":[],"links":{"next":"http://127.0.0.2:9/models"}}"#]).await;
    assert!(elsewhere.unwrap_err().contains("another address"));
    let (endless, asked) = list(vec![FIRST]).await;
    assert!(endless.unwrap_err().contains("no end") && asked == 100);
}

#[tokio::test]
async fn prices_that_differ_or_are_missing_are_told_and_a_sync_adds_rows_only() {
    let bench = Bench::new(100).await;
    let fake = FakeProvider::always(answer("200 OK", LIST)).await;
    let books = Books {
        openrouter: openrouter(&fake),
        candidates: vec![("openrouter".into(), "new/model".into()), ("rehearsed".into(), "rehearsed/utility".into())],
        ..books_of(&bench)
    };
    job(&books, "reconcile-prices").await;
    let found = open_findings(&bench).await;
    let known: Vec<_> = kinds(&found).into_iter().filter(|(kind, _)| *kind != "price_changes").collect();
    assert_eq!(
        known,
        [("price_differs", "openrouter/google/gemini-2.5-pro"), ("price_missing", "openrouter/new/model")]
    );
    let rows = async || -> i64 {
        sqlx::query_scalar("select count(*) from model_pricing").fetch_one(&bench.pool).await.expect("count")
    };
    let before = rows().await;
    let list = pricelist::from_openrouter(LIST, Trust::default()).expect("read");
    let mut conn = bench.pool.acquire().await.expect("conn");
    let dry = pricelist::apply(&mut conn, &list.quotes, None, "t", false).await.expect("sql").expect("accepted");
    assert_eq!((rows().await, dry.new.len(), dry.changed.len(), dry.unchanged), (before, 1, 1, 1));
    let past = Some(Utc::now() - Duration::hours(1));
    let refused = pricelist::apply(&mut conn, &list.quotes, past, "t", true).await.expect("sql").expect_err("past");
    assert_eq!(refused.code, "price_in_past");
    let from = Some(Utc::now() + Duration::hours(1));
    pricelist::apply(&mut conn, &list.quotes, from, "t", true).await.expect("sql").expect("accepted");
    let after = rows().await;
    assert!(after > before);
    let again = pricelist::apply(&mut conn, &list.quotes, from, "t", true).await.expect("sql").expect("accepted");
    assert_eq!((rows().await, again.unchanged), (after, 3), "the same list again changes nothing");
    // A model that somebody here has withdrawn is not brought back by a list of others.
    sqlx::query(
        "insert into model_pricing (provider, model_id, effective_from, input_umtok, output_umtok, billable, source)
         values ('openrouter', 'new/model', engine_now() + interval '2 hours', 0, 0, false, 'withdrawn')",
    )
    .execute(&bench.pool)
    .await
    .expect("withdrawn");
    let later = Some(Utc::now() + Duration::hours(3));
    let withdrawn = pricelist::apply(&mut conn, &list.quotes, later, "t", true).await.expect("sql").expect("accepted");
    assert_eq!((withdrawn.withdrawn, rows().await), (vec!["openrouter/new/model".to_owned()], after + 1));
}

/// Telegram's list, as the test wants it.
struct List(Mutex<Vec<StarTransaction>>);

impl Stars for List {
    fn transactions(&self, offset: i64, limit: i64) -> BoxFuture<'_, Result<Vec<StarTransaction>, Failure>> {
        let (offset, limit) = (usize::try_from(offset).expect("small"), usize::try_from(limit).expect("small"));
        let list = self.0.lock().expect("no panic while held").iter().skip(offset).take(limit).cloned().collect();
        Box::pin(async move { Ok(list) })
    }
}

fn line(id: &str, incoming: bool, user: i64, payload: &str, at: DateTime<Utc>) -> StarTransaction {
    let payload = Some(payload.to_owned());
    StarTransaction { id: id.into(), incoming, telegram_user_id: Some(user), stars: 250, payload, at }
}

#[tokio::test]
async fn payments_that_telegram_knows_and_we_do_not_are_booked_once_and_told() {
    let bench = Bench::new(0).await;
    bench.order("ord", 50_000_000).await;
    bench.pay("known", "ord").await.expect("paid");
    let old = Utc::now() - Duration::hours(1);
    let list = Arc::new(List(Mutex::new(vec![
        line("known", true, 42, "ord", old),
        line("lost", true, 42, "ord", old),
        line("forged", true, 42, "nothing", old),
        line("stranger", true, 77, "ord", old),
        line("known", false, 42, "ord", old),
        line("never", false, 42, "ord", old),
        StarTransaction { telegram_user_id: None, ..line("withdrawal", false, 0, "", old) },
        line("young", true, 42, "ord", Utc::now()),
    ])));
    let books = Books { stars: Some(list.clone()), ..books_of(&bench) };
    let first = job(&books, "reconcile-payments").await;
    assert_eq!((first.checked, first.findings), (7, 5), "the young one is left to its update");
    assert_eq!(bench.balance().await.0, 50_000_000, "one came, one went back");
    let found = open_findings(&bench).await;
    let expected = [
        ("payment_disputed", "forged"),
        ("payment_disputed", "stranger"),
        ("payment_missing", "lost"),
        ("refund_missing", "known"),
        ("refund_unknown", "never"),
    ];
    assert_eq!(kinds(&found), expected);
    let disputes: i64 =
        sqlx::query_scalar("select count(*) from payment_disputes").fetch_one(&bench.pool).await.expect("count");
    assert_eq!(disputes, 2);
    // Whoever dies before the position is kept looks again, and nothing is booked twice.
    sqlx::query("update reconcile_cursors set position = 0").execute(&bench.pool).await.expect("lost");
    job(&books, "reconcile-payments").await;
    assert_eq!(bench.balance().await.0, 50_000_000);
    // The late update of a payment that was booked here changes nothing either.
    assert_eq!(bench.pay("lost", "ord").await.expect("booked"), None);
    list.0.lock().expect("no panic while held")[7].at = old;
    let last = job(&books, "reconcile-payments").await;
    assert_eq!((last.checked, bench.balance().await.0), (1, 100_000_000));
    assert_eq!(bench.violations().await, [""; 0]);
}

#[tokio::test]
async fn a_refund_that_was_refused_and_stands_in_the_list_is_booked_and_told_once() {
    let bench = Bench::new(0).await;
    bench.buy("c1").await;
    let mut conn = bench.pool.acquire().await.expect("conn");
    assert!(purchase::refund(&mut conn, bench.user, "c1").await.expect("untouched"));
    assert!(purchase::refund_refused(&mut conn, "c1", "no").await.expect("refused"));
    let old = Utc::now() - Duration::hours(1);
    let list = List(Mutex::new(vec![line("c1", true, 42, "c1", old), line("c1", false, 42, "c1", old)]));
    let books = Books { stars: Some(Arc::new(list)), ..books_of(&bench) };
    for _ in 0..2 {
        job(&books, "reconcile-payments").await;
        assert_eq!(bench.balance().await, (0, 0));
        assert_eq!(kinds(&open_findings(&bench).await), [("refund_twice", "c1")]);
        assert_eq!(bench.violations().await, [""; 0]);
        // Whoever dies before the position is kept looks again.
        sqlx::query("update reconcile_cursors set position = 0").execute(&bench.pool).await.expect("lost");
    }
}

#[tokio::test]
async fn a_job_without_its_counterpart_says_so() {
    let bench = Bench::new(0).await;
    let books = books_of(&bench);
    for (name, word) in [("reconcile-calls", "OpenRouter"), ("reconcile-payments", "bot")] {
        assert!(job(&books, name).await.skipped.contains(word), "{name}");
    }
    assert!(reconcile::now(&books, "reconcile-nothing").await.is_none());
}

#[tokio::test]
async fn what_was_spent_adds_up_by_every_key() {
    let bench = Bench::new(100).await;
    for n in 1..=3 {
        let attempt = bench.attempt(RunId::new(), 1);
        bench.start(&attempt).await;
        bench.open(&attempt, "a.0", 1_000).await;
        bench.close(&attempt, "a.0", CallState::Succeeded, 1_000, 100 * n).await;
        bench.end(&attempt, Outcome::Succeeded).await;
    }
    let mut conn = bench.pool.acquire().await.expect("conn");
    let spent = 100_000_000 - bench.balance().await.0;
    let today: String = sqlx::query_scalar("select to_char(engine_now() at time zone 'UTC', 'YYYY-MM-DD')")
        .fetch_one(&mut *conn)
        .await
        .expect("today");
    let keys = [
        (By::User, bench.user.to_string()),
        (By::Project, bench.project.to_string()),
        (By::Model, "rehearsed/rehearsed/architect".to_owned()),
        (By::Activity, "work@1".to_owned()),
        (By::Day, today),
    ];
    for (by, key) in keys {
        let rows = report::spent(&mut conn, by, Span::default()).await.expect("report");
        let [row] = &*rows else { panic!("{by:?}: {rows:?}") };
        assert_eq!((&row.key, row.attempts, row.calls, row.tokens_output), (&key, 3, 3, 600), "{by:?}");
        let credits = loopwright_activities::billing::MicroCredits(spent).to_string();
        assert_eq!((row.credits.as_str(), row.cost_usd.as_str()), (credits.as_str(), "0.012"), "{by:?}");
    }
    let none = Span { to: Some(Utc::now() - Duration::days(1)), ..Span::default() };
    assert_eq!(report::spent(&mut conn, By::User, none).await.expect("report"), []);
}

#[tokio::test]
async fn a_call_on_ones_own_key_is_in_every_report_and_costs_nothing() {
    let bench = Bench::new(100).await;
    let mut conn = bench.pool.acquire().await.expect("conn");
    sqlx::query(
        "with a as (insert into activity_attempts (id, run_id, path, activity, attempt_no, user_id, state, lease_expires_at, ended_at)
                    values (gen_random_uuid(), gen_random_uuid(), 's', 'work@1', 1, $1, 'completed', engine_now(), engine_now()) returning id),
              k as (insert into api_keys (provider, user_id, source, last4, fingerprint) values ('openrouter', $1, 'environment', '', '') returning id)
         insert into api_key_usage (attempt_id, call_no, call_key, api_key_id, user_id, provider, model_requested, purpose, request_sha256, state,
                                    tokens_prompt, tokens_output, usage_source, pricing_id, worst_pusd, finished_at)
         select a.id, 1, 'a', k.id, $1, 'openrouter', 'm', 'p', '', 'succeeded', 11, 7, 'provider', (select min(id) from model_pricing), 0, engine_now()
         from a, k",
    )
    .bind(bench.user)
    .execute(&mut *conn)
    .await
    .expect("call");
    for by in By::ALL {
        let rows = report::spent(&mut conn, by, Span::default()).await.expect("report");
        let [row] = &*rows else { panic!("{by:?}: {rows:?}") };
        assert_eq!(
            (row.calls, row.tokens_prompt, row.credits.as_str(), row.cost_usd.as_str()),
            (1, 11, "0", "0"),
            "{by:?}"
        );
    }
}

#[tokio::test]
async fn every_code_of_the_ledger_is_in_the_readme() {
    let readme = include_str!("../../README.md");
    let codes = [
        LedgerError::NoUser(uuid::Uuid::nil()),
        LedgerError::NotPositive,
        LedgerError::Mismatch(String::new()),
        LedgerError::Used(String::new()),
        LedgerError::KeyReused(String::new()),
        LedgerError::Short { wanted: Default::default(), available: Default::default() },
        LedgerError::Sql(sqlx::Error::PoolClosed),
    ];
    let mut known: Vec<&str> = codes.iter().map(LedgerError::code).collect();
    known.extend([
        "price_negative",
        "price_absurd",
        "price_not_decimal",
        "price_incomplete",
        "price_free",
        "price_in_past",
    ]);
    known.extend(["price_list_too_large", "price_list_unreadable", "price_model_invalid"]);
    let missing: Vec<_> = known.into_iter().filter(|code| !readme.contains(&format!("| `{code}` |"))).collect();
    assert!(missing.is_empty(), "activities/README.md lacks {missing:?}");
}
