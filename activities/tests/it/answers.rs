//! What an answer leaves in the books, whatever is in it: a worker, the ledger on a real Postgres, and a provider that says odd
//! things. And what a call leaves whose process dies while it is under way.

use crate::bench;
use futures_util::future::BoxFuture;
use loopwright_activities::{
    MIGRATIONS,
    billing::{
        BillingSettings, LedgerHook, MicroCredits, audit, books,
        ledger::{self, Identity},
    },
    orchestrator::{Message, Orchestrator, Pace, Request, Role, Routing, ToolSpec},
    provider::{Settings, Timeouts, account::OpenRouterAccount},
    reconcile::{self, Books},
    testing::{Answer, Dialect, FakeProvider, Fault, Reply, Stage, When, frames, stream},
    usage::CallState,
};
use loopwright_engine::{
    Failure,
    activity::{Activity, Context, Registry},
    client::{Client, Deploy, Start},
    definition::{Bundle, Definition, FORMAT, Kind, RetryPolicy, Step},
    embedded::testing::{database, url},
    hook::Phase,
    ids::RunId,
    signature::Signature,
    view::{RunStatus, RunView},
    worker::{self, WorkerConfig, WorkerHandle},
};
use serde_json::{Value, json};
use sqlx::PgPool;
use std::{
    collections::BTreeMap,
    process::{Command, Stdio},
    sync::Arc,
    time::Duration,
};

const KEY: &str = "sk-answers-0123456789";
const DATABASE: &str = "LOOPWRIGHT_TEST_DATABASE";
const QUEUE: &str = "answers";
/// A dead worker's runs are taken over after so long.
const LEASE: Duration = Duration::from_secs(4);
const PATIENCE: Duration = Duration::from_secs(120);

type Script = Arc<dyn Fn(Context, Orchestrator) -> BoxFuture<'static, Result<Value, Failure>> + Send + Sync>;

/// An activity that asks models as its script says.
struct Asks(Orchestrator, Script);

impl Activity for Asks {
    fn signature(&self) -> Signature {
        Signature {
            name: "asks@1".into(),
            summary: "a model call".into(),
            input_schema: json!({"type": "object"}),
            output_schema: json!({}),
            run_timeout_ms: 120_000,
            heartbeat_timeout_ms: None,
            metered: true,
            idempotent: true,
            failure_codes: vec![],
        }
    }
    fn run(&self, ctx: Context, _input: Value) -> BoxFuture<'static, Result<Value, Failure>> {
        (self.1)(ctx, self.0.clone())
    }
    fn reserve(&self, _input: &Value, extras: &Value) -> Value {
        json!({ "calls": [self.0.planned((Role::Utility, "test"), extras, 2, 100, 200)] })
    }
}

fn request() -> Request {
    Request {
        role: Role::Utility,
        purpose: "test".into(),
        messages: vec![Message::User { text: "say it".into() }],
        tools: Vec::new(),
        output_schema: None,
        max_output_tokens: 200,
    }
}

/// One call with this request.
fn asking(request: Request) -> Script {
    Arc::new(move |ctx, orchestrator| {
        let request = request.clone();
        Box::pin(async move { Ok(json!({ "text": orchestrator.call(&ctx, "a", request).await?.text })) })
    })
}

/// A worker with the given settings.
async fn worker(pool: PgPool, lookup: &(dyn Fn(&str) -> Option<String> + Sync), script: Script) -> WorkerHandle {
    let mut settings = Settings::from_lookup(&|name| lookup(name)).expect("settings");
    settings.timeouts = Timeouts { connect: PATIENCE, first_byte: PATIENCE, idle: PATIENCE, total: PATIENCE };
    let routing = Routing::shipped().with_settings(&settings, None);
    let pace = Pace { backoff: Duration::from_millis(10), ..Pace::default() };
    let orchestrator = Orchestrator::with_pace(routing, settings.providers().expect("providers"), pace);
    let hook = Arc::new(LedgerHook::new(BillingSettings::default()));
    let registry = Registry::new().with(Asks(orchestrator, script));
    let config =
        WorkerConfig { hook, queues: vec![QUEUE.to_owned()], lease: LEASE, ..WorkerConfig::new(pool, registry) };
    worker::start(config).await.expect("worker")
}

struct Bench {
    pool: PgPool,
    client: Client,
    fake: FakeProvider,
    environment: BTreeMap<&'static str, String>,
}

/// Calls of a run: key, state, error class, tokens in and out, cost, what the provider said of it, raw usage.
type Row = (String, String, Option<String>, Option<i64>, Option<i64>, i64, Option<i64>, Option<Value>);

impl Bench {
    async fn new(dialect: Dialect, fake: FakeProvider) -> Self {
        let pool = database(MIGRATIONS).await;
        let client = Client::new(pool.clone(), Arc::new(LedgerHook::new(BillingSettings::default())));
        let mut environment: BTreeMap<_, _> = fake.environment(&[dialect], KEY).into_iter().collect();
        environment.insert("OPENAI_MODEL", "some-model".into());
        Self { pool, client, fake, environment }
    }

    /// A run of one step, for a user with a thousand credits.
    async fn start(&self) -> RunId {
        let step = Step {
            id: "ask".into(),
            condition: None,
            kind: Kind::Activity { name: "asks@1".into(), with: BTreeMap::new() },
            retry: RetryPolicy { attempts: 1, delay_ms: 20, ..RetryPolicy::default() },
            timeouts: Default::default(),
            catch: vec![],
            continue_on_error: false,
        };
        let definition = Definition {
            format: FORMAT,
            name: "asks".into(),
            inputs: BTreeMap::new(),
            env: BTreeMap::new(),
            timeout_ms: 3_600_000,
            budget: Value::Null,
            concurrency: None,
            runs_on: Vec::new(),
            executions_max: 100,
            steps: vec![step],
            finally: Vec::new(),
            outputs: BTreeMap::new(),
            queries: BTreeMap::new(),
            extras: Value::Null,
        };
        let deploy = Deploy { definition, bundle: Bundle::new(), source: String::new(), author: None, message: None };
        let definition = self.client.deploy(deploy).await.expect("deployed").hash;
        let mut conn = self.pool.acquire().await.expect("conn");
        let welcome = MicroCredits::from_credits(1_000);
        let (user, _) = ledger::ensure_user(&mut conn, &Identity::Telegram(7), welcome).await.expect("user");
        let start = Start {
            run_id: None,
            definition,
            inputs: json!({}),
            workflow_id: None,
            attributes: json!({ "user_id": user.to_string() }),
            queue: QUEUE.into(),
            topic: None,
            admission: Default::default(),
        };
        self.client.start(start).await.expect("started").run_id
    }

    async fn until_closed(&self, run: RunId) -> RunView {
        let closed = async {
            loop {
                let view = self.client.describe(run).await.expect("view");
                if view.status.is_closed() {
                    return view;
                }
                self.client.wait_change(run, view.seq, Duration::from_secs(1)).await.expect("waits");
            }
        };
        tokio::time::timeout(PATIENCE, closed).await.expect("it ends")
    }

    /// Drives a run of this script to its end.
    async fn drive(&self, script: Script) -> RunView {
        let run = self.start().await;
        let environment = self.environment.clone();
        let worker = worker(self.pool.clone(), &|name| environment.get(name).cloned(), script).await;
        let view = self.until_closed(run).await;
        worker.drain(Duration::from_secs(5)).await;
        view
    }

    async fn rows(&self, run: RunId) -> Vec<Row> {
        sqlx::query_as(
            "select k.call_key, k.state, k.error_class, k.tokens_prompt, k.tokens_output, k.cost_pusd, k.provider_cost_pusd, k.raw_usage
             from api_key_usage k join activity_attempts a on a.id = k.attempt_id where a.run_id = $1 order by k.id",
        )
        .bind(run.0)
        .fetch_all(&self.pool)
        .await
        .expect("rows")
    }

    async fn balances(&self) {
        let broken = audit::run(&mut self.pool.acquire().await.expect("conn")).await.expect("audit");
        assert!(broken.is_empty(), "{broken:?}");
    }
}

/// An object with lists inside each other, so many levels in all.
fn nested(levels: usize) -> Value {
    json!({ "a": (1..levels).fold(json!(1), |inner, _| json!([inner])) })
}

fn with_tool() -> Request {
    let tool = ToolSpec { name: "f".into(), description: "does it".into(), parameters: json!({"type": "object"}) };
    Request { tools: vec![tool], ..request() }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_is_nested_too_deep_is_booked_and_refused() {
    let with_schema = Request { output_schema: Some(json!({"type": "object"})), ..request() };
    for (dialect, levels, tool) in [
        (Dialect::OpenAi, 60, true),
        (Dialect::Gemini, 45, true),
        (Dialect::OpenRouter, 110, true),
        (Dialect::OpenAi, 60, false),
    ] {
        let what = format!("{dialect:?} {levels} {tool}");
        let (reply, request) = if tool {
            (Reply::tool_call("f", nested(levels)), with_tool())
        } else {
            (Reply::text(&nested(levels).to_string()), with_schema.clone())
        };
        let bench = Bench::new(dialect, FakeProvider::saying(reply).await).await;
        let view = bench.drive(asking(request)).await;
        let code = view.failure.as_ref().map(|failure| failure.code.as_str());
        assert_eq!(
            (view.status, code),
            (RunStatus::Failed, Some("model.output_invalid")),
            "{what}: {:?}",
            view.failure
        );
        let rows = bench.rows(view.run_id).await;
        // Two candidates at most; of these providers Gemini alone has a second one for the role.
        let asked = if dialect == Dialect::Gemini { 4 } else { 2 };
        assert_eq!(rows.len(), asked, "{what}: each asked once more, and no more: {rows:?}");
        for (key, state, class, prompt, output, cost, ..) in &rows {
            assert_eq!(
                (state.as_str(), class.as_deref()),
                ("succeeded", Some("model.output_invalid")),
                "{what}: {key}"
            );
            assert_eq!(
                (prompt, output, *cost > 0),
                (&Some(11), &Some(7), true),
                "{what}: {key} has been used and paid for"
            );
        }
        let repair = bench.fake.seen()[1].body.to_string();
        assert!(repair.contains("nested") && repair.contains("below 40 levels"), "{what}: the model is told: {repair}");
        bench.balances().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_of_a_usual_depth_is_kept() {
    for dialect in [Dialect::OpenAi, Dialect::Gemini] {
        let reply = Reply::tool_call("f", nested(40));
        let bench = Bench::new(dialect, FakeProvider::saying(reply).await).await;
        let view = bench.drive(asking(with_tool())).await;
        assert_eq!((view.status, &view.failure), (RunStatus::Completed, &None), "{dialect:?}");
        assert_eq!(bench.rows(view.run_id).await.len(), 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reading_is_stored_though_its_checkpoint_cannot_be() {
    let script: Script = Arc::new(|ctx, _| {
        Box::pin(async move {
            ctx.meter_open("a.0", &bench::opening(100)).await?;
            let closed = bench::closing(CallState::Succeeded, 1_000, 100);
            ctx.meter_close("a.0", &closed, Some(("answer", &nested(60)))).await?;
            Ok(json!({}))
        })
    });
    let bench = Bench::new(Dialect::OpenAi, FakeProvider::saying(Reply::text("unasked")).await).await;
    let view = bench.drive(script).await;
    assert_eq!(view.failure.as_ref().map(|failure| failure.code.as_str()), Some("limit.size"), "{:?}", view.failure);
    let rows = bench.rows(view.run_id).await;
    let (_, state, _, prompt, output, cost, ..) = &rows[0];
    assert_eq!((state.as_str(), prompt, output, *cost), ("succeeded", &Some(1_000), &Some(100), 3_000_000_000));
    let kept: i64 = sqlx::query_scalar("select count(*) from checkpoints").fetch_one(&bench.pool).await.expect("count");
    assert_eq!(kept, 0);
    bench.balances().await;
}

/// A stream of one text with this usage object.
fn saying_usage(dialect: Dialect, usage: Value) -> Answer {
    let mut events = [dialect.text("words"), dialect.finish("stop", None), json!({"choices": [], "usage": usage})];
    for event in &mut events {
        // No name of a model: what was asked for counts.
        event["model"] = json!("served\u{0}model");
    }
    let body = [&frames(&events)[..], b"data: [DONE]\n\n"].concat();
    Answer::Acts(stream(&body))
}

#[tokio::test(flavor = "multi_thread")]
async fn the_usage_of_a_server_is_kept_without_nul_and_within_bounds() {
    for (padding, kept) in [(0, json!("a\u{2400}b")), (20_000, Value::Null)] {
        let usage =
            json!({"prompt_tokens": 11, "completion_tokens": 7, "note": "a\u{0}b", "\u{0}": "x".repeat(padding)});
        let fake = FakeProvider::serve(move |_, _| saying_usage(Dialect::OpenAi, usage.clone())).await;
        let bench = Bench::new(Dialect::OpenAi, fake).await;
        let view = bench.drive(asking(request())).await;
        assert_eq!((view.status, &view.failure), (RunStatus::Completed, &None), "{padding}");
        assert_eq!(bench.fake.seen().len(), 1, "bought once");
        let rows = bench.rows(view.run_id).await;
        let (_, state, _, prompt, output, _, _, raw) = &rows[0];
        assert_eq!((state.as_str(), prompt, output), ("succeeded", &Some(11), &Some(7)));
        let raw = raw.as_ref().expect("raw usage");
        assert_eq!(raw["note"], kept, "{raw}");
        assert_eq!(raw["too_large_bytes"].as_u64().is_some_and(|bytes| bytes > 20_000), padding > 0, "{raw}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_on_a_key_that_openrouter_holds_for_us_is_not_given_away() {
    // 11 and 7 tokens at 0.75 and 3.75 USD per million.
    const ARITHMETIC: i64 = 34_500_000;
    for (usage, charged, said) in [
        (
            json!({"cost": 0.0000155, "is_byok": true, "cost_details": {"upstream_inference_cost": 0.00031}}),
            325_500_000,
            15_500_000,
        ),
        (json!({"cost": 0, "is_byok": true, "cost_details": {"upstream_inference_cost": null}}), ARITHMETIC, 0),
        (json!({"cost": 0.0000155, "is_byok": true}), ARITHMETIC, 15_500_000),
        (
            json!({"cost": 0.00031, "is_byok": false, "cost_details": {"upstream_inference_cost": null}}),
            310_000_000,
            310_000_000,
        ),
    ] {
        let mut usage = usage.clone();
        usage["prompt_tokens"] = json!(11);
        usage["completion_tokens"] = json!(7);
        let (what, byok) = (usage.to_string(), usage["is_byok"] == true);
        let fake = FakeProvider::serve(move |_, _| saying_usage(Dialect::OpenRouter, usage.clone())).await;
        let bench = Bench::new(Dialect::OpenRouter, fake).await;
        let view = bench.drive(asking(request())).await;
        assert_eq!(view.status, RunStatus::Completed, "{what}: {:?}", view.failure);
        let rows = bench.rows(view.run_id).await;
        let (_, _, _, _, _, cost, provider_cost, _) = &rows[0];
        assert_eq!((*cost, *provider_cost), (charged, Some(said)), "{what}");
        // A fee beside our price for the call is no price that changed; what another call is charged would be.
        let mut conn = bench.pool.acquire().await.expect("conn");
        assert_eq!(books::drifted(&mut conn, 200).await.expect("sql").is_empty(), byok, "{what}");
        bench.balances().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_somebody_has_cut_on_the_way_is_free_whatever_was_counted_by_then() {
    // Two events of a stream with what was counted so far, and a clean end.
    let events: Vec<Value> = [3, 6]
        .map(|output| {
            let mut event = Dialect::Gemini.text("words ");
            event["usageMetadata"] = Dialect::Gemini.usage(11, output)["usageMetadata"].clone();
            event.as_object_mut().expect("object").remove("responseId");
            event
        })
        .into();
    let fake = FakeProvider::serve(move |_, _| Answer::Acts(stream(&frames(&events)))).await;
    let bench = Bench::new(Dialect::Gemini, fake).await;
    let view = bench.drive(asking(request())).await;
    assert_eq!(view.failure.as_ref().map(|failure| failure.code.as_str()), Some("transient.http"));
    let rows = bench.rows(view.run_id).await;
    assert!(!rows.is_empty());
    for (key, state, class, prompt, output, cost, ..) in &rows {
        assert_eq!((state.as_str(), class.as_deref()), ("failed", Some("transient.http")), "{key}");
        assert_eq!((*prompt, *output, *cost), (Some(11), Some(6), 0), "{key}: known, and free");
    }
    bench.balances().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_in_two_calls_is_two_rows_and_one_answer() {
    let fake = FakeProvider::serve(|seen, _| match seen.body["continuationToken"].as_str() {
        None => Reply::text("wor").continued("t1"),
        Some(token) => Reply::text(if token == "t1" { "ds" } else { "?" }),
    })
    .await;
    let bench = Bench::new(Dialect::Gemini, fake).await;
    let view = bench.drive(asking(request())).await;
    assert_eq!((view.status, &view.failure), (RunStatus::Completed, &None));
    let rows = bench.rows(view.run_id).await;
    let keys: Vec<_> = rows.iter().map(|row| (row.0.as_str(), row.1.as_str())).collect();
    assert_eq!(keys, [("a.a1.0", "succeeded"), ("a.a1.1", "succeeded")]);
    assert!(rows.iter().all(|row| row.5 > 0 && row.5 == rows[0].5), "each is paid: {rows:?}");
    let texts: Vec<Value> = sqlx::query_scalar("select value -> 'text' from checkpoints where key = 'call:a'")
        .fetch_all(&bench.pool)
        .await
        .expect("checkpoint");
    assert_eq!(texts, [json!("words")]);
    bench.balances().await;
}

#[tokio::test]
async fn a_note_names_a_call_under_way_and_changes_nothing_of_one_that_is_closed() {
    let bench = bench::Bench::new(100).await;
    let attempt = bench.attempt(RunId::new(), 1);
    bench.start(&attempt).await;
    let note = async |key: &str, id: &str| {
        bench.meter(&attempt, key, Phase::Note, json!({ "provider_request_id": id })).await;
    };
    let id = async |key: &str| -> (String, Option<String>) {
        sqlx::query_as("select state, provider_request_id from api_key_usage where call_key = $1")
            .bind(key)
            .fetch_one(&bench.pool)
            .await
            .expect("row")
    };
    for key in ["a.0", "a.1", "a.2"] {
        bench.open(&attempt, key, 100).await;
    }
    note("a.0", "gen-1").await;
    note("a.0", "gen-2").await;
    assert_eq!(id("a.0").await, ("started".into(), Some("gen-1".into())), "the first name is the call's");
    bench.close(&attempt, "a.1", CallState::Succeeded, 1_000, 100).await;
    note("a.1", "late").await;
    assert_eq!(id("a.1").await, ("succeeded".into(), Some("req-1".into())));
    // Closed without a name (the answer was lost): the note's stays.
    note("a.2", "gen-3").await;
    let mut closed = bench::closing(CallState::Unknown, 0, 0);
    closed["provider_request_id"] = Value::Null;
    bench.meter(&attempt, "a.2", Phase::Close, closed).await;
    assert_eq!(id("a.2").await, ("unknown".into(), Some("gen-3".into())));
    bench.end(&attempt, loopwright_engine::hook::Outcome::Lost).await;
    assert_eq!(id("a.0").await, ("unknown".into(), Some("gen-1".into())), "whoever takes over can ask by it");
    note("nobody", "gen-4").await;
    assert_eq!(bench.violations().await, [""; 0]);
}

/// The process that dies.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "started by the other test of this file in a process of its own"]
async fn child_process() {
    let Ok(database) = std::env::var(DATABASE) else { return };
    let pool = PgPool::connect(&database).await.expect("database");
    worker(pool, &|name| std::env::var(name).ok(), asking(request())).await.fenced().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_whose_process_dies_after_the_headers_is_found_and_filled_in() {
    let bench = Bench::new(Dialect::OpenRouter, FakeProvider::saying(Reply::text("words")).await).await;
    bench.fake.inject(When::Nth(Dialect::OpenRouter, 0), Fault::StallAfterHeaders);
    let run = bench.start().await;
    let mut child = Command::new(std::env::current_exe().expect("this binary"))
        .args(["answers::child_process", "--exact", "--ignored", "--nocapture"])
        .env(DATABASE, url(&bench.pool))
        .envs(&bench.environment)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("child");
    bench.fake.journal_when(|journal| journal.first().is_some_and(|entry| entry.stage >= Stage::Headers)).await;
    let named = async {
        let sql = "select exists (select from api_key_usage where state = 'started' and provider_request_id = 'gen-1')";
        while !sqlx::query_scalar::<_, bool>(sql).fetch_one(&bench.pool).await.expect("row") {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let in_time = tokio::time::timeout(PATIENCE, named).await;
    child.kill().expect("killed");
    child.wait().expect("child");
    in_time.expect("the name of the call is recorded while its answer is under way");

    let environment = bench.environment.clone();
    let rescuer = worker(bench.pool.clone(), &|name| environment.get(name).cloned(), asking(request())).await;
    let view = bench.until_closed(run).await;
    rescuer.drain(Duration::from_secs(5)).await;
    assert_eq!((view.status, &view.failure), (RunStatus::Completed, &None));
    let rows = bench.rows(run).await;
    assert_eq!(rows.iter().map(|row| row.1.as_str()).collect::<Vec<_>>(), ["unknown", "succeeded"]);
    assert_eq!((rows[0].3, rows[0].5, rows[0].6), (None, 0, None), "nothing is known of it yet");

    let settings = Settings::from_lookup(&|name| bench.environment.get(name).cloned()).expect("settings");
    let account = OpenRouterAccount::configured(&settings).expect("account").map(Arc::new);
    let books = Books {
        pool: bench.pool.clone(),
        client: bench.client.clone(),
        openrouter: account,
        stars: None,
        candidates: Vec::new(),
    };
    let done = reconcile::now(&books, "reconcile-calls").await.expect("a job").expect("done");
    assert_eq!((done.checked, done.changed), (1, 1));
    let rows = bench.rows(run).await;
    let (_, state, _, prompt, output, cost, said, _) = &rows[0];
    assert_eq!((state.as_str(), prompt, output), ("unknown", &Some(11), &Some(7)));
    assert_eq!((*cost, *said), (0, Some(310_000_000)), "known, and free");
    let source: String = sqlx::query_scalar("select usage_source from api_key_usage order by id limit 1")
        .fetch_one(&bench.pool)
        .await
        .expect("row");
    assert_eq!(source, "lookup");
}
