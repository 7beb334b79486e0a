//! The ledger in the hands of a real worker.

use crate::{
    bench::{Bench, CALL_UCR, closing, one_call, opening},
    provider::client,
};
use futures_util::future::BoxFuture;
use loopwright_activities::{
    billing::{BillingSettings, LedgerHook, MicroCredits, limit},
    orchestrator::{Message, Orchestrator, Request, Role, Routing, route::Candidate},
    provider::{Provider, Scripted, Timeouts},
    testing::{Answer, Dialect, FakeProvider, Reply, Told, frames, stream},
    usage::CallState,
};
use loopwright_engine::{
    Failure,
    activity::{Activity, Context, Registry},
    client::{Client, Deploy, Filter, Start},
    definition::{Bundle, Definition, FORMAT},
    ids::RunId,
    signature::Signature,
    view::RunStatus,
    worker::{self, WorkerConfig},
};
use serde_json::{Value, json};
use std::{
    fmt::Write as _,
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::sync::Notify;

/// Nothing here takes that long, and it is below the time after which a blocked step asks again by itself.
const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) fn signature() -> Signature {
    Signature {
        name: "asks@1".into(),
        summary: "one model call".into(),
        input_schema: json!({"type": "object"}),
        output_schema: json!({}),
        run_timeout_ms: 60_000,
        heartbeat_timeout_ms: None,
        metered: true,
        idempotent: true,
        failure_codes: vec![],
    }
}

/// An activity with one model call whose answer is saved. Its first attempt says when the call is open, and waits.
struct Asks {
    opened: Arc<Notify>,
    answered: Arc<Notify>,
}

impl Activity for Asks {
    fn signature(&self) -> Signature {
        signature()
    }
    fn run(&self, ctx: Context, _input: Value) -> BoxFuture<'static, Result<Value, Failure>> {
        let (opened, answered) = (self.opened.clone(), self.answered.clone());
        Box::pin(async move {
            if let Some(answer) = ctx.checkpoint("a.0").await? {
                return Ok(answer);
            }
            ctx.meter_open("a.0", &opening(1_000)).await?;
            if ctx.info().attempt == 1 {
                opened.notify_one();
                answered.notified().await;
            }
            let closed = ctx
                .meter_close(
                    "a.0",
                    &closing(CallState::Succeeded, 1_000, 100),
                    Some(("a.0", &json!(ctx.info().attempt))),
                )
                .await;
            if ctx.info().attempt == 1 {
                assert_eq!(closed.as_ref().expect_err("stale").code, "transient.lease_lost");
                opened.notify_one();
            }
            closed?;
            Ok(json!(ctx.info().attempt))
        })
    }
    fn reserve(&self, _input: &Value, _extras: &Value) -> Value {
        serde_json::to_value(one_call()).expect("json")
    }
}

pub(crate) async fn start(bench: &Bench, client: &Client, steps: Value) -> RunId {
    start_as(bench, client, steps, None).await
}

/// Under an id of the caller's.
pub(crate) async fn start_as(bench: &Bench, client: &Client, steps: Value, run_id: Option<RunId>) -> RunId {
    let definition: Definition = serde_json::from_value(
        json!({"format": FORMAT, "name": "asks", "timeout_ms": 600_000, "executions_max": 100, "steps": steps}),
    )
    .expect("definition");
    let deploy = Deploy { definition, bundle: Bundle::new(), source: String::new(), author: None, message: None };
    let start = Start {
        run_id,
        definition: client.deploy(deploy).await.expect("deploy").hash,
        inputs: json!({}),
        workflow_id: None,
        attributes: json!({"user_id": bench.user.to_string(), "project_id": bench.project.to_string()}),
        queue: String::new(),
        topic: None,
        admission: Default::default(),
    };
    client.start(start).await.expect("start").run_id
}

/// How the run ends.
pub(crate) async fn closed(client: &Client, run: RunId) -> RunStatus {
    let ended = async {
        let mut seq = 0;
        loop {
            let view = client.describe(run).await.expect("run");
            if view.status.is_closed() {
                return view.status;
            }
            seq = seq.max(view.seq);
            client.wait_change(run, seq, Duration::from_secs(1)).await.expect("run");
        }
    };
    tokio::time::timeout(PATIENCE, ended).await.expect("the run does not end")
}

#[tokio::test]
async fn a_call_whose_answer_is_thrown_away_with_the_lease_is_free_and_its_repetition_is_charged_once() {
    let bench = Bench::new(100).await;
    let (opened, answered) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let hook = Arc::new(LedgerHook::new(BillingSettings::default()));
    let registry = Registry::new().with(Asks { opened: opened.clone(), answered: answered.clone() });
    let mut config = WorkerConfig::new(bench.pool.clone(), registry);
    (config.hook, config.lease) = (hook.clone(), Duration::from_secs(10));
    let worker = worker::start(config).await.expect("worker");
    let client = Client::new(bench.pool.clone(), hook);
    let step = json!({"id": "ask", "kind": {"activity": {"name": "asks@1", "with": {}}}});
    let run = start(&bench, &client, json!([step])).await;
    opened.notified().await;
    // The first statement of a takeover, by a worker that has not committed the rest of it.
    sqlx::query("update runs set owner = null, epoch = epoch + 1, parked = true where run_id = $1")
        .bind(run.0)
        .execute(&bench.pool)
        .await
        .expect("taken");
    answered.notify_one();
    opened.notified().await;
    let charged: (String, bool, i64, Option<i64>) =
        sqlx::query_as("select state, late, cost_pusd, tokens_prompt from api_key_usage")
            .fetch_one(&bench.pool)
            .await
            .expect("row");
    assert_eq!(charged, ("succeeded".into(), true, 0, Some(1_000)), "the fact is kept, the answer is not paid for");
    sqlx::query("insert into ready (shard, run_id, queue) select shard, run_id, queue from runs where run_id = $1")
        .bind(run.0)
        .execute(&bench.pool)
        .await
        .expect("queued");
    assert_eq!(closed(&client, run).await, RunStatus::Completed);
    worker.drain(Duration::from_secs(10)).await;
    let charges: (i64, i64) = sqlx::query_as(
        "select count(*), count(*) filter (where cost_pusd > 0) from api_key_usage where call_key = 'a.0'",
    )
    .fetch_one(&bench.pool)
    .await
    .expect("count");
    assert_eq!(charges, (2, 1), "made twice, charged once");
    assert_eq!(bench.balance().await, (100_000_000 - CALL_UCR, 0));
    assert_eq!(bench.violations().await, [""; 0]);
}

/// Its history cannot be read any more, so no transition of its own settles what it had begun.
#[tokio::test]
async fn a_run_that_cannot_be_read_gives_back_what_it_held_when_it_is_terminated() {
    let bench = Bench::new(100).await;
    let opened = Arc::new(Notify::new());
    let hook = Arc::new(LedgerHook::new(BillingSettings::default()));
    let registry = Registry::new().with(Asks { opened: opened.clone(), answered: Arc::new(Notify::new()) });
    let mut config = WorkerConfig::new(bench.pool.clone(), registry);
    config.hook = hook.clone();
    let worker = worker::start(config).await.expect("worker");
    let client = Client::new(bench.pool.clone(), hook);
    let step = json!({"id": "ask", "kind": {"activity": {"name": "asks@1", "with": {}}}});
    let run = start(&bench, &client, json!([step])).await;
    opened.notified().await;
    let (balance, held) = bench.balance().await;
    assert!(balance == 100_000_000 && held > 0, "{balance} {held}");
    worker.crash();
    sqlx::query("update history set events = '[{\"type\": \"nothing_that_is_known\"}]' where run_id = $1")
        .bind(run.0)
        .execute(&bench.pool)
        .await
        .expect("overwritten");
    assert_eq!(client.describe(run).await.expect_err("unreadable").code(), "invariant");

    client.terminate(run, "nothing to be saved").await.expect("terminated");

    assert_eq!(bench.balance().await, (100_000_000, 0));
    let ended: (String, String) =
        sqlx::query_as("select a.state, u.state from activity_attempts a join api_key_usage u on u.attempt_id = a.id")
            .fetch_one(&bench.pool)
            .await
            .expect("one attempt with one call");
    assert_eq!(ended, ("lost".to_owned(), "unknown".to_owned()));
    let again = client.terminate(run, "again").await.expect_err("it has ended");
    assert_eq!(again.code(), "run_closed");
    assert_eq!(bench.balance().await, (100_000_000, 0));
    assert_eq!(bench.violations().await, [""; 0]);
}

/// An activity with one model call, which it makes at once.
pub(crate) struct Calls;

impl Activity for Calls {
    fn signature(&self) -> Signature {
        Signature { name: "calls@1".into(), ..signature() }
    }
    fn run(&self, ctx: Context, _input: Value) -> BoxFuture<'static, Result<Value, Failure>> {
        Box::pin(async move {
            ctx.meter_open("a.0", &opening(1_000)).await?;
            ctx.meter_close("a.0", &closing(CallState::Succeeded, 1_000, 100), None).await?;
            Ok(json!({}))
        })
    }
    fn reserve(&self, _input: &Value, _extras: &Value) -> Value {
        serde_json::to_value(one_call()).expect("json")
    }
}

#[tokio::test]
async fn branches_that_cannot_all_be_paid_together_take_turns() {
    // Each needs 1.44 credits before it may start and uses 0.36.
    for (balance, branches) in [(2, 2), (3, 5)] {
        let bench = Bench::new(balance).await;
        let hook = Arc::new(LedgerHook::new(BillingSettings::default()));
        let mut config = WorkerConfig::new(bench.pool.clone(), Registry::new().with(Calls));
        config.hook = hook.clone();
        let worker = worker::start(config).await.expect("worker");
        let client = Client::new(bench.pool.clone(), hook);
        let branches: Vec<Value> = (0..branches)
            .map(|n| {
                let step = json!({"id": "call", "kind": {"activity": {"name": "calls@1", "with": {}}}});
                json!({"name": format!("b{n}"), "steps": [step]})
            })
            .collect();
        let count = i64::try_from(branches.len()).expect("few");
        let parallel = json!({"branches": branches, "join": "all", "fail_fast": true});
        let run = start(&bench, &client, json!([{"id": "all", "kind": {"parallel": parallel}}])).await;
        assert_eq!(closed(&client, run).await, RunStatus::Completed);
        worker.drain(Duration::from_secs(10)).await;
        assert_eq!(bench.balance().await, (balance * 1_000_000 - count * CALL_UCR, 0));
        assert_eq!(bench.violations().await, [""; 0]);
    }
}

/// [`Calls`], which says when it has begun and goes on when it is told.
struct Holds {
    began: Arc<Notify>,
    go: Arc<Notify>,
}

impl Activity for Holds {
    fn signature(&self) -> Signature {
        Signature { name: "holds@1".into(), ..signature() }
    }
    fn run(&self, ctx: Context, input: Value) -> BoxFuture<'static, Result<Value, Failure>> {
        let (began, go) = (self.began.clone(), self.go.clone());
        Box::pin(async move {
            began.notify_one();
            go.notified().await;
            Calls.run(ctx, input).await
        })
    }
    fn reserve(&self, input: &Value, extras: &Value) -> Value {
        Calls.reserve(input, extras)
    }
}

#[tokio::test]
async fn a_run_goes_on_when_another_one_of_its_user_gives_back_what_it_held() {
    // Each needs 1.44 credits before it may start and uses 0.36.
    let bench = Bench::new(2).await;
    let (began, go) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let hook = Arc::new(LedgerHook::new(BillingSettings::default()));
    let registry = Registry::new().with(Calls).with(Holds { began: began.clone(), go: go.clone() });
    let mut config = WorkerConfig::new(bench.pool.clone(), registry);
    config.hook = hook.clone();
    let worker = worker::start(config).await.expect("worker");
    let client = Client::new(bench.pool.clone(), hook.clone());
    let step = |name: &str| json!([{"id": "call", "kind": {"activity": {"name": name, "with": {}}}}]);
    let holder = start(&bench, &client, step("holds@1")).await;
    began.notified().await;
    let waiter = start(&bench, &client, step("calls@1")).await;
    let mut seq = 0;
    while client.list(Filter::default()).await.expect("runs").iter().all(|r| r.waiting.as_deref() != Some("credits")) {
        seq = client.wait_change(waiter, seq, Duration::from_secs(1)).await.expect("run");
    }
    go.notify_one();
    let both = async { (closed(&client, holder).await, closed(&client, waiter).await) };
    let ends = tokio::select! {
        ends = both => ends,
        never = hook.wake_waiting(&client) => match never {},
    };
    assert_eq!(ends, (RunStatus::Completed, RunStatus::Completed));
    worker.drain(Duration::from_secs(10)).await;
    assert_eq!(bench.balance().await, (2_000_000 - 2 * CALL_UCR, 0));
    assert_eq!(bench.violations().await, [""; 0]);
}

fn candidate(provider: &str, model: &str) -> Candidate {
    let shipped = Routing::rehearsed().roles[&Role::Architect][0].clone();
    Candidate { provider: provider.to_owned(), model: model.to_owned(), ..shipped }
}

/// Asks the orchestrator once and returns the model that answered.
struct Orchestrated {
    name: &'static str,
    orchestrator: Orchestrator,
    text: String,
}

impl Orchestrated {
    fn new(name: &'static str, models: &[&str]) -> Self {
        Self::of(name, models.iter().map(|model| candidate("rehearsed", model)).collect())
    }

    /// Over rehearsed candidates with limits of their own.
    fn of(name: &'static str, candidates: Vec<Candidate>) -> Self {
        let script = Scripted::from_yaml("- at: '*'\n  reply: { text: hello }\n").expect("script");
        Self::with(name, candidates, Arc::new(script))
    }

    fn with(name: &'static str, candidates: Vec<Candidate>, provider: Arc<dyn Provider>) -> Self {
        let mut routing = Routing::rehearsed();
        routing.roles.insert(Role::Architect, candidates);
        Self { name, orchestrator: Orchestrator::new(routing, vec![provider]), text: "hello".into() }
    }
}

impl Activity for Orchestrated {
    fn signature(&self) -> Signature {
        Signature { name: self.name.into(), ..signature() }
    }
    fn run(&self, ctx: Context, _input: Value) -> BoxFuture<'static, Result<Value, Failure>> {
        let (orchestrator, text) = (self.orchestrator.clone(), self.text.clone());
        Box::pin(async move {
            let request = Request {
                role: Role::Architect,
                purpose: "test".into(),
                messages: vec![Message::User { text }],
                tools: vec![],
                output_schema: None,
                max_output_tokens: 100,
            };
            Ok(json!(orchestrator.call(&ctx, "a", request).await?.text))
        })
    }
}

/// What an operator is told: warnings and errors with their fields.
#[derive(Clone, Default)]
struct Journal(Arc<Mutex<Vec<String>>>);

struct Line(String);

impl tracing::field::Visit for Line {
    fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn std::fmt::Debug) {
        let _ = write!(self.0, " {}={value:?}", field.name());
    }
}

impl tracing::Subscriber for Journal {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        *metadata.level() <= tracing::Level::WARN
    }
    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }
    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
    fn event(&self, event: &tracing::Event<'_>) {
        let mut line = Line(event.metadata().level().to_string());
        event.record(&mut line);
        self.0.lock().expect("lock").push(line.0);
    }
    fn enter(&self, _: &tracing::span::Id) {}
    fn exit(&self, _: &tracing::span::Id) {}
}

#[tokio::test]
async fn a_model_without_a_price_is_passed_over_told_and_never_free() {
    let journal = Journal::default();
    // The worker lives on this thread.
    let _told = tracing::subscriber::set_default(journal.clone());
    let bench = Bench::new(10).await;
    let hook = Arc::new(LedgerHook::new(BillingSettings::default()));
    let registry = Registry::new()
        .with(Orchestrated::new("second@1", &["unheard-of", "rehearsed/architect"]))
        .with(Orchestrated::new("none@1", &["unheard-of", "unheard-of-too"]));
    let mut config = WorkerConfig::new(bench.pool.clone(), registry);
    config.hook = hook.clone();
    let worker = worker::start(config).await.expect("worker");
    let client = Client::new(bench.pool.clone(), hook);
    let step = |name: &str| json!([{"id": "call", "kind": {"activity": {"name": name, "with": {}}}}]);
    let run = start(&bench, &client, step("second@1")).await;
    assert_eq!(closed(&client, run).await, RunStatus::Completed);
    let asked: Vec<(String, i64)> = sqlx::query_as("select model_requested, cost_pusd from api_key_usage")
        .fetch_all(&bench.pool)
        .await
        .expect("calls");
    assert!(matches!(&*asked, [(model, cost)] if model == "rehearsed/architect" && *cost > 0), "{asked:?}");
    let run = start(&bench, &client, step("none@1")).await;
    assert_eq!(closed(&client, run).await, RunStatus::Failed);
    let view = client.describe(run).await.expect("run");
    let failure = view.failure.expect("a failure");
    assert_eq!(failure.code, "model.unpriced", "{failure:?}");
    worker.drain(Duration::from_secs(10)).await;
    assert_eq!(bench.violations().await, [""; 0]);
    let lines = journal.0.lock().expect("lock").clone();
    for model in ["model=unheard-of ", "model=unheard-of-too "] {
        let told = |line: &&String| line.starts_with("ERROR") && format!("{line} ").contains(model);
        let line = lines.iter().find(told).unwrap_or_else(|| panic!("{model}: {lines:?}"));
        assert!(line.contains("has no price") && line.contains("loopwright pricing import"), "{line}");
    }
}

#[tokio::test]
async fn a_model_that_costs_more_than_its_ceiling_is_not_used() {
    let bench = Bench::new(10).await;
    let hook = Arc::new(LedgerHook::new(BillingSettings::default()));
    // Their prices are 2 and 10 USD, and 0.30 and 2.50 USD.
    let dear = |input, output| Candidate {
        input_umtok_max: input,
        output_umtok_max: output,
        ..candidate("rehearsed", "rehearsed/architect")
    };
    let cheap = || candidate("rehearsed", "rehearsed/implementer");
    let registry = Registry::new()
        .with(Orchestrated::of("input@1", vec![dear(Some(1_999_999), None), cheap()]))
        .with(Orchestrated::of("output@1", vec![dear(None, Some(9_999_999)), cheap()]))
        .with(Orchestrated::of("within@1", vec![dear(Some(2_000_000), Some(10_000_000)), cheap()]))
        .with(Orchestrated::of("none@1", vec![dear(Some(0), Some(0))]));
    let mut config = WorkerConfig::new(bench.pool.clone(), registry);
    config.hook = hook.clone();
    let worker = worker::start(config).await.expect("worker");
    let client = Client::new(bench.pool.clone(), hook);
    let step = |name: &str| json!([{"id": "call", "kind": {"activity": {"name": name, "with": {}}}}]);
    for name in ["input@1", "output@1", "within@1"] {
        let run = start(&bench, &client, step(name)).await;
        assert_eq!(closed(&client, run).await, RunStatus::Completed, "{name}");
    }
    let asked: Vec<String> = sqlx::query_scalar("select model_requested from api_key_usage order by id")
        .fetch_all(&bench.pool)
        .await
        .expect("calls");
    assert_eq!(asked, ["rehearsed/implementer", "rehearsed/implementer", "rehearsed/architect"]);
    let run = start(&bench, &client, step("none@1")).await;
    assert_eq!(closed(&client, run).await, RunStatus::Failed);
    assert_eq!(client.describe(run).await.expect("run").failure.expect("a failure").code, "model.too_dear");
    worker.drain(Duration::from_secs(10)).await;
    assert_eq!(bench.violations().await, [""; 0]);
}

/// An answer for 1,000 tokens of which 600 came from a cache; the dialects of chat also say that 300 went into it.
fn cached_answer(dialect: Dialect) -> Answer {
    if dialect == Dialect::Gemini {
        let told = Told { prompt: 1_000, cached: 600, output: 50, ..Told::default() };
        return Reply::text("hello").with_usage(Some(told)).into();
    }
    let usage = json!({"id": "gen-7", "model": "served-model", "choices": [], "usage": {"prompt_tokens": 1_000,
        "completion_tokens": 50, "prompt_tokens_details": {"cached_tokens": 600, "cache_write_tokens": 300}}});
    let mut body = frames(&[dialect.text("hello"), dialect.finish("stop", None), usage]);
    body.extend_from_slice(b"data: [DONE]\n\n");
    stream(&body).into()
}

#[tokio::test]
async fn cached_tokens_have_their_own_prices_from_the_answer_to_the_charge() {
    let bench = Bench::new(10).await;
    let hook = Arc::new(LedgerHook::new(BillingSettings::default()));
    let mut registry = Registry::new();
    let mut servers = Vec::new();
    // A model with prices of its own for its cache, and one without: those tokens cost what input costs.
    let cases = [
        ("gemini-own@1", Dialect::Gemini, true, 400 * 2_000_000 + 600 * 200_000),
        ("gemini@1", Dialect::Gemini, false, 1_000 * 2_000_000),
        ("openrouter-own@1", Dialect::OpenRouter, true, 100 * 2_000_000 + 600 * 200_000 + 300 * 2_500_000),
        ("openrouter@1", Dialect::OpenRouter, false, 1_000 * 2_000_000),
        ("openai-own@1", Dialect::OpenAi, true, 100 * 2_000_000 + 600 * 200_000 + 300 * 2_500_000),
        ("openai@1", Dialect::OpenAi, false, 1_000 * 2_000_000),
    ];
    for (name, dialect, own, _) in cases {
        let server = FakeProvider::serve(move |_, _| cached_answer(dialect)).await;
        let model = if own { "own-prices" } else { "one-price" };
        sqlx::query(
            "insert into model_pricing (provider, model_id, effective_from, input_umtok, cached_input_umtok, cache_write_umtok, output_umtok, source)
             values ($1, $2, '2026-01-01', 2000000, $3, $4, 10000000, 'test')",
        )
        .bind(dialect.name())
        .bind(model)
        .bind(own.then_some(200_000_i64))
        .bind(own.then_some(2_500_000_i64))
        .execute(&bench.pool)
        .await
        .expect("prices");
        let provider = client(dialect, &server.base_of(dialect), Timeouts::default());
        let asks = Orchestrated::with(name, vec![candidate(dialect.name(), model)], provider);
        registry = registry.with(Orchestrated { text: "w".repeat(5_984), ..asks });
        servers.push(server);
    }
    let mut config = WorkerConfig::new(bench.pool.clone(), registry);
    config.hook = hook.clone();
    let worker = worker::start(config).await.expect("worker");
    let client = Client::new(bench.pool.clone(), hook);
    let mut charged = 0;
    for (name, dialect, own, input) in cases {
        let run =
            start(&bench, &client, json!([{"id": "call", "kind": {"activity": {"name": name, "with": {}}}}])).await;
        assert_eq!(closed(&client, run).await, RunStatus::Completed, "{name}");
        let row: (i64, i64, i64, i64, i64) = sqlx::query_as(
            "select tokens_prompt, tokens_cached, tokens_cache_write, cost_pusd, worst_pusd from api_key_usage order by id desc limit 1",
        )
        .fetch_one(&bench.pool)
        .await
        .expect("a call");
        let cost: i64 = input + 50 * 10_000_000;
        let written = if dialect == Dialect::Gemini { 0 } else { 300 };
        // 6,000 bytes are 2,000 tokens at most, and all of them may go into a cache.
        let worst = 2_000 * if own { 2_500_000 } else { 2_000_000 } + 100 * 10_000_000;
        assert_eq!(row, (1_000, 600, written, cost, worst), "{name}");
        charged += BillingSettings::default().rate.credits(i128::from(cost)).0;
        assert_eq!(bench.balance().await, (10_000_000 - charged, 0), "{name}");
    }
    worker.drain(Duration::from_secs(10)).await;
    assert_eq!(bench.violations().await, [""; 0]);
    assert!(servers.iter().all(|server| server.seen().len() == 1));
}

/// The run that waits for that, once there is one.
pub(crate) async fn waiting(client: &Client, reason: &str) -> RunId {
    let found = async {
        loop {
            let runs = client.list(Filter::default()).await.expect("runs");
            if let Some(run) = runs.iter().find(|run| run.waiting.as_deref() == Some(reason)) {
                return run.run_id;
            }
            match runs.iter().find(|run| !run.status.is_closed()) {
                Some(open) => {
                    client.wait_change(open.run_id, open.seq, Duration::from_secs(1)).await.expect("run");
                }
                None => tokio::task::yield_now().await,
            }
        }
    };
    tokio::time::timeout(PATIENCE, found).await.expect("no run waits")
}

#[tokio::test]
async fn a_run_that_continues_as_new_for_ever_stops_at_what_was_approved() {
    let bench = Bench::new(100).await;
    let hook = Arc::new(LedgerHook::new(BillingSettings::default()));
    let client = Client::new(bench.pool.clone(), hook.clone());
    let call = json!({"id": "call", "kind": {"activity": {"name": "calls@1", "with": {}}}});
    let again = json!({"id": "again", "kind": {"continue_as_new": {"with": {}}}});
    let first = start(&bench, &client, json!([call, again])).await;
    // Each needs 1.44 credits before it may start and uses 0.36: two fit.
    let allowed = MicroCredits(1_440_000 + CALL_UCR);
    let mut conn = bench.pool.acquire().await.expect("conn");
    limit::set(&mut conn, bench.user, first.0, "test", allowed, "test").await.expect("limit");
    let mut config = WorkerConfig::new(bench.pool.clone(), Registry::new().with(Calls));
    config.hook = hook;
    let worker = worker::start(config).await.expect("worker");

    let third = waiting(&client, limit::LIMIT).await;
    let chain = client.describe(third).await.expect("run").chain;
    assert_eq!(chain.first, Some(first));
    assert_ne!(chain.continued_from, Some(first), "two have spent");
    assert_eq!(bench.balance().await, (100_000_000 - 2 * CALL_UCR, 0));

    // One call more, for whichever run of the chain needs it.
    let mut tx = bench.pool.begin().await.expect("tx");
    client.unblock_in(&mut tx, &json!({"user_id": bench.user.to_string()})).await.expect("woken");
    let raised = limit::raise(&mut tx, bench.user, third.0, "more", MicroCredits(CALL_UCR), "test").await;
    tx.commit().await.expect("commit");
    assert_eq!(raised.expect("limit").expect("there is one").left, MicroCredits(1_440_000));
    client.wake().await;
    while waiting(&client, limit::LIMIT).await == third {
        tokio::task::yield_now().await;
    }
    assert_eq!(bench.balance().await, (100_000_000 - 3 * CALL_UCR, 0));
    worker.drain(Duration::from_secs(10)).await;
    assert_eq!(bench.violations().await, [""; 0]);
}
