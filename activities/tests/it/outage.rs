//! A provider that is away: runs wait for it, say so, pay no more, and buy nothing twice that they need not.

use crate::bench::Bench;
use futures_util::future::{BoxFuture, join_all};
use loopwright_activities::{
    billing::{BillingSettings, LedgerHook},
    orchestrator::{
        Candidate, Message, Orchestrator, Pace, Request, Role, Routing,
        breaker::{Breaker, FAILURES_TO_OPEN, OPEN_FOR, Permit},
    },
    provider::{Advice, Call, Completion, KeyIdentity, Provider, ProviderError, Settings, StructuredOutput, Timeouts},
    testing::{Answer, Dialect, Endpoint, FakeProvider, Fault, Reply, When},
    usage::{CallState, Usage, UsageSource},
};
use loopwright_engine::{
    Failure, FailureKind,
    activity::{
        Activity, Context, Registry,
        detached::{self, Recorder},
    },
    client::{Client, Deploy, Start},
    definition::{Bundle, Definition, FORMAT},
    signature::Signature,
    view::{RunStatus, RunView, Waiting},
    worker::{self, WorkerConfig},
};
use serde_json::{Value, json};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, Barrier,
        atomic::{AtomicU8, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::{sync::Notify, task::JoinSet};

const PATIENCE: Duration = Duration::from_secs(180);
const DEV_LOOP: &str = include_str!("../../../workflow-defs/dev-loop.yaml");

/// The retry policies that the shipped loop declares.
fn shipped_policies() -> Vec<Value> {
    fn collect(value: &Value, found: &mut Vec<Value>) {
        match value {
            Value::Object(fields) => {
                for (name, field) in fields {
                    if name == "retry" {
                        found.push(field.clone());
                    }
                    collect(field, found);
                }
            }
            Value::Array(items) => items.iter().for_each(|item| collect(item, found)),
            _ => {}
        }
    }
    // `on` is a word here.
    let options = serde_yaml::options! { strict_booleans: true };
    let document: Value = serde_yaml::from_str_with_options(DEV_LOOP, options).unwrap();
    let mut found = Vec::new();
    collect(&document, &mut found);
    found
}

#[test]
fn the_shipped_loop_tries_again_what_may_pass() {
    let policies = shipped_policies();
    assert!(policies.len() >= 2);
    for policy in policies {
        for code in [
            "transient.unavailable",
            "transient.http",
            "transient.network",
            "transient.rate_limited",
            "model.truncated",
            "model.output_invalid",
            "provider.key_sealed",
            "provider.key_invalid",
            "provider.key_disabled",
            "provider.no_balance",
        ] {
            let failure = Failure::retryable(code, "x");
            let named = policy["on"].as_array().unwrap().iter().any(|p| failure.matches(p.as_str().unwrap()));
            assert!(named, "{code} is in no {policy}");
        }
    }
}

/// Two calls, one after the other.
struct Asks(Orchestrator);

impl Activity for Asks {
    fn signature(&self) -> Signature {
        Signature {
            name: "asks@1".into(),
            summary: "two model calls".into(),
            input_schema: json!({"type": "object"}),
            output_schema: json!({}),
            run_timeout_ms: 60_000,
            heartbeat_timeout_ms: None,
            metered: true,
            idempotent: true,
            failure_codes: vec![],
        }
    }
    fn run(&self, ctx: Context, _input: Value) -> BoxFuture<'static, Result<Value, Failure>> {
        let orchestrator = self.0.clone();
        Box::pin(async move {
            for name in ["a", "b"] {
                orchestrator.call(&ctx, name, request()).await?;
            }
            Ok(json!({ "counted": ctx.info().counted }))
        })
    }
    fn reserve(&self, _input: &Value, extras: &Value) -> Value {
        json!({ "calls": [self.0.planned((Role::Utility, "test"), extras, 2, 100, 200)] })
    }
}

fn request() -> Request {
    Request {
        role: Role::Utility,
        purpose: "test".into(),
        messages: vec![Message::User { text: "hello".into() }],
        tools: vec![],
        output_schema: None,
        max_output_tokens: 200,
    }
}

/// As [`drive`], on a provider that spoils questions `1..=away`.
async fn run(bench: &Bench, fake: &FakeProvider, away: usize, fault: Fault) -> (RunView, BTreeSet<String>) {
    fake.inject(
        When::picked(move |seen, nth| matches!(seen.endpoint, Endpoint::Generate { .. }) && (1..=away).contains(&nth)),
        fault,
    );
    drive(bench, fake, Terms::default()).await
}

/// How long things may last in a run.
struct Terms {
    /// Longest silence of an attempt.
    heartbeat_ms: Option<u64>,
    /// Longest silence of the provider.
    patience: Duration,
    pace: Pace,
}

impl Default for Terms {
    fn default() -> Self {
        let pace = Pace { backoff: Duration::from_millis(1), wait_max: Duration::from_millis(20) };
        Self { heartbeat_ms: None, patience: Duration::from_secs(1), pace }
    }
}

/// A run of two calls with the loop's own policy, its delays scaled down. Returns its end and what it was seen to wait for.
async fn drive(bench: &Bench, fake: &FakeProvider, terms: Terms) -> (RunView, BTreeSet<String>) {
    let Terms { heartbeat_ms, patience, pace } = terms;
    let settings: BTreeMap<_, _> = fake.environment(&[Dialect::OpenRouter], "sk-outage-000001").into_iter().collect();
    let mut settings = Settings::from_lookup(&|name| settings.get(name).cloned()).unwrap();
    settings.timeouts = Timeouts { connect: patience, first_byte: patience, idle: patience, total: 3 * patience };
    let routing = Routing::shipped().with_settings(&settings, None);
    let orchestrator = Orchestrator::with_pace(routing, settings.providers().unwrap(), pace);
    let hook = Arc::new(LedgerHook::new(BillingSettings::default()));
    let mut config = WorkerConfig::new(bench.pool.clone(), Registry::new().with(Asks(orchestrator)));
    config.hook = hook.clone();
    let worker = worker::start(config).await.unwrap();
    let client = Client::new(bench.pool.clone(), hook);

    let declared = shipped_policies().remove(0);
    let retry = json!({
        "attempts": declared["attempts"], "on": declared["on"],
        "delay_ms": 1, "backoff": 2.0, "max_delay_ms": 20, "jitter": 0.0,
    });
    let timeouts = json!({"run_ms": 60_000, "queue_ms": 60_000, "heartbeat_ms": heartbeat_ms});
    let kind = json!({"activity": {"name": "asks@1", "with": {}}});
    let step = json!({"id": "ask", "kind": kind, "retry": retry, "timeouts": timeouts});
    let definition: Definition = serde_json::from_value(
        json!({"format": FORMAT, "name": "asks", "timeout_ms": 600_000, "executions_max": 1_000, "steps": [step]}),
    )
    .unwrap();
    let deploy = Deploy { definition, bundle: Bundle::new(), source: String::new(), author: None, message: None };
    let start = Start {
        run_id: None,
        definition: client.deploy(deploy).await.unwrap().hash,
        inputs: json!({}),
        workflow_id: None,
        attributes: json!({"user_id": bench.user.to_string(), "project_id": bench.project.to_string()}),
        queue: String::new(),
        topic: None,
        admission: Default::default(),
    };
    let run = client.start(start).await.unwrap().run_id;
    let mut waited_for = BTreeSet::new();
    let ended = async {
        loop {
            let view = client.describe(run).await.unwrap();
            for waiting in &view.waiting {
                if let Waiting::Retry { failure, .. } = waiting {
                    waited_for.insert(failure.code.clone());
                }
            }
            if view.status.is_closed() {
                return view;
            }
            client.wait_change(run, view.seq, Duration::from_secs(1)).await.unwrap();
        }
    };
    let view = tokio::time::timeout(PATIENCE, ended).await.expect("the run does not end");
    worker.drain(Duration::from_secs(10)).await;
    (view, waited_for)
}

/// Calls by state, and what was charged for the others than those that succeeded.
async fn calls(bench: &Bench) -> (i64, i64, i64, i64) {
    sqlx::query_as(
        "select count(*) filter (where state = 'succeeded'), count(*) filter (where state = 'failed'),
                count(*) filter (where state = 'unknown'),
                coalesce(sum(cost_pusd) filter (where state <> 'succeeded'), 0)::bigint from api_key_usage",
    )
    .fetch_one(&bench.pool)
    .await
    .unwrap()
}

/// 0.00031 USD a call, 120 credits a USD, rounded up per attempt.
const CALL_UCR: i64 = 37_200;

#[tokio::test]
async fn an_outage_beyond_every_patience_delays_a_run_and_costs_no_more() {
    let bench = Bench::new(100).await;
    let fake = FakeProvider::saying(Reply::text("words")).await;
    let (view, waited_for) = run(&bench, &fake, 14, Fault::HtmlError).await;
    assert_eq!((view.status, view.failure), (RunStatus::Completed, None));
    assert!(waited_for.iter().any(|code| code.starts_with("transient.")), "it says what it waits for: {waited_for:?}");
    assert_eq!(calls(&bench).await, (2, 14, 0, 0));
    let attempts: i64 =
        sqlx::query_scalar("select count(*) from activity_attempts").fetch_one(&bench.pool).await.unwrap();
    // Each waits up to twice as long as the one before.
    assert!(attempts > 3, "more than the policy's three: {attempts}");
    assert_eq!(bench.balance().await, (100_000_000 - 2 * CALL_UCR, 0));
    assert_eq!(bench.violations().await, [""; 0]);
}

#[tokio::test]
async fn answers_that_are_lost_for_a_while_delay_a_run_and_cost_its_user_nothing() {
    let bench = Bench::new(100).await;
    let fake = FakeProvider::saying(Reply::text("words")).await;
    let (view, _) = run(&bench, &fake, 6, Fault::ResetBeforeHeaders).await;
    assert_eq!((view.status, view.failure), (RunStatus::Completed, None));
    assert_eq!(calls(&bench).await, (2, 0, 6, 0));
    // One question in an attempt at most: no attempt has two lost answers.
    let twice: i64 = sqlx::query_scalar(
        "select count(*) from (select from api_key_usage where state = 'unknown' group by attempt_id having count(*) > 1) t",
    )
    .fetch_one(&bench.pool)
    .await
    .unwrap();
    assert_eq!(twice, 0);
    assert_eq!(bench.balance().await, (100_000_000 - 2 * CALL_UCR, 0));
    assert_eq!(bench.violations().await, [""; 0]);
}

#[tokio::test]
async fn answers_that_are_always_lost_end_the_step_after_a_bounded_number() {
    let bench = Bench::new(100).await;
    let fake = FakeProvider::saying(Reply::text("words")).await;
    let (view, _) = run(&bench, &fake, usize::MAX, Fault::ResetBeforeHeaders).await;
    assert_eq!(view.status, RunStatus::Failed);
    assert_eq!(view.failure.unwrap().code, "transient.network");
    let (answered, failed, lost, cost) = calls(&bench).await;
    // Ten that do not count, and the policy's three.
    assert_eq!((answered, failed, lost, cost), (1, 0, 13, 0));
    // And what he paid for the first answer is given back: the step is of no use to him.
    assert_eq!(bench.balance().await, (100_000_000, 0));
    assert_eq!(bench.violations().await, [""; 0]);
}

/// What a provider does that has begun an answer and may bill it: the connection stands, and the answer is of no use.
const BREAK_OFF: [Fault; 3] = [Fault::ErrorMidStream, Fault::NoFinishReason, Fault::CommentsOnly];

#[tokio::test]
async fn answers_that_break_off_for_a_while_delay_a_run_and_cost_its_user_nothing() {
    join_all(BREAK_OFF.map(|fault| async move {
        let bench = Bench::new(100).await;
        let fake = FakeProvider::saying(Reply::text("words")).await;
        let (view, waited_for) = run(&bench, &fake, 9, fault.clone()).await;
        assert_eq!((view.status, view.failure), (RunStatus::Completed, None), "{fault:?}");
        assert_eq!(
            waited_for.iter().map(String::as_str).find(|code| !code.starts_with("transient.")),
            None,
            "{fault:?}"
        );
        let attempts = attempts(&bench).await;
        assert!(attempts > 3, "{fault:?}: more than the policy's three: {attempts}");
        assert_eq!(calls(&bench).await, (2, 9, 0, 0), "{fault:?}");
        assert_eq!(bench.balance().await, (100_000_000 - 2 * CALL_UCR, 0), "{fault:?}");
        assert_eq!(bench.violations().await, [""; 0], "{fault:?}");
    }))
    .await;
}

#[tokio::test]
async fn answers_that_always_break_off_end_the_step_after_a_bounded_number() {
    join_all(BREAK_OFF.map(|fault| async move {
        let bench = Bench::new(100).await;
        let fake = FakeProvider::saying(Reply::text("words")).await;
        let (view, _) = run(&bench, &fake, usize::MAX, fault.clone()).await;
        assert_eq!(view.status, RunStatus::Failed, "{fault:?}");
        // The breaker may have had the last word.
        let code = view.failure.unwrap().code;
        assert!(["transient.http", "transient.unavailable"].contains(&code.as_str()), "{fault:?}: {code}");
        let (answered, failed, lost, cost) = calls(&bench).await;
        assert_eq!((answered, lost, cost), (1, 0, 0), "{fault:?}");
        // Ten that do not count, and one or two in each of the policy's three attempts; the breaker may leave one for the next.
        assert!((13..=17).contains(&failed), "{fault:?}: {failed}");
        assert_eq!(bench.balance().await, (100_000_000, 0), "{fault:?}");
        assert_eq!(bench.violations().await, [""; 0], "{fault:?}");
    }))
    .await;
}

/// A server that answers with this status to question `1` up to `away`.
async fn refusing(status: u16, away: usize) -> FakeProvider {
    FakeProvider::serve(move |_, n| match n {
        n if (1..=away).contains(&n) => {
            Answer::Refused { status, headers: Vec::new(), body: Dialect::OpenRouter.error(status, "server_error") }
        }
        _ => Answer::from(Reply::text("words")),
    })
    .await
}

#[tokio::test]
async fn a_server_that_is_overloaded_for_a_while_ends_no_run() {
    for status in [500, 503, 529] {
        let bench = Bench::new(100).await;
        let fake = refusing(status, 12).await;
        let (view, waited_for) = drive(&bench, &fake, Terms::default()).await;
        assert_eq!((view.status, view.failure), (RunStatus::Completed, None), "{status}");
        assert!(waited_for.iter().all(|code| code.starts_with("transient.")), "{status}: {waited_for:?}");
        assert_eq!(calls(&bench).await, (2, 12, 0, 0), "{status}");
        assert_eq!(bench.balance().await, (100_000_000 - 2 * CALL_UCR, 0), "{status}");
        assert_eq!(bench.violations().await, [""; 0], "{status}");
    }
}

#[tokio::test]
async fn a_time_out_of_a_gateway_is_an_answer_that_is_lost() {
    // Marked, free, and asked again a bounded number of times: ten that do not count, and the policy's three.
    for (status, away, expected) in [(504, 3, (2, 0, 3, 0)), (524, usize::MAX, (1, 0, 13, 0))] {
        let bench = Bench::new(100).await;
        let fake = refusing(status, away).await;
        let (view, _) = drive(&bench, &fake, Terms::default()).await;
        let ended = if away == usize::MAX { RunStatus::Failed } else { RunStatus::Completed };
        assert_eq!((view.status, calls(&bench).await), (ended, expected), "{status}");
        let marked: i64 = sqlx::query_scalar(
            "select count(*) from api_key_usage where state = 'unknown' and http_status = $1 and error_class = 'transient.http'",
        )
        .bind(i32::from(status))
        .fetch_one(&bench.pool)
        .await
        .unwrap();
        assert_eq!(marked, expected.2, "{status}");
        assert_eq!(bench.violations().await, [""; 0], "{status}");
    }
}

async fn attempts(bench: &Bench) -> i64 {
    sqlx::query_scalar("select count(*) from activity_attempts").fetch_one(&bench.pool).await.unwrap()
}

#[tokio::test]
async fn a_call_that_lasts_longer_than_an_attempt_may_be_silent_is_made_once() {
    let bench = Bench::new(100).await;
    let fake = FakeProvider::saying(Reply::text("words")).await;
    fake.think(|| Duration::from_millis(2_500));
    // The second question fails first, and is waited for inside its call.
    fake.inject(
        When::picked(|seen, nth| matches!(seen.endpoint, Endpoint::Generate { .. }) && nth == 1),
        Fault::HtmlError,
    );
    let pace = Pace { backoff: Duration::from_secs(2), wait_max: Duration::from_secs(30) };
    let terms = Terms { heartbeat_ms: Some(1_000), patience: Duration::from_secs(20), pace };
    let (view, waited_for) = drive(&bench, &fake, terms).await;
    assert_eq!((view.status, view.failure, waited_for), (RunStatus::Completed, None, BTreeSet::new()));
    assert_eq!((attempts(&bench).await, calls(&bench).await), (1, (2, 1, 0, 0)));
    assert_eq!(bench.violations().await, [""; 0]);
}

#[tokio::test]
async fn a_server_that_asks_not_to_be_asked_again_ends_the_step_after_its_attempts() {
    let bench = Bench::new(100).await;
    let fake = FakeProvider::serve(|_, n| match n {
        0 => Answer::from(Reply::text("words")),
        _ => Answer::Refused {
            status: 500,
            headers: vec![("x-should-retry", "false".to_owned())],
            body: Dialect::OpenRouter.error(500, "server_error"),
        },
    })
    .await;
    let (view, _) = drive(&bench, &fake, Terms::default()).await;
    assert_eq!((view.status, view.failure.unwrap().code.as_str()), (RunStatus::Failed, "transient.http"));
    assert_eq!((attempts(&bench).await, calls(&bench).await), (3, (1, 3, 0, 0)));
    assert_eq!(bench.violations().await, [""; 0]);
}

#[tokio::test]
async fn a_budget_of_a_key_is_waited_for_until_it_is_filled_again() {
    let bench = Bench::new(100).await;
    let fake = FakeProvider::serve(|_, n| match n {
        1 => {
            let resets_at = chrono::Utc::now() + chrono::Duration::seconds(2);
            let metadata = json!({"limit_source": "key", "resets_at": resets_at.to_rfc3339()});
            let body = json!({"error": {"code": 403, "message": "m", "metadata": metadata}});
            Answer::Refused { status: 403, headers: Vec::new(), body }
        }
        _ => Answer::from(Reply::text("words")),
    })
    .await;
    let (view, waited_for) = drive(&bench, &fake, Terms::default()).await;
    assert_eq!((view.status, view.failure), (RunStatus::Completed, None));
    assert!(waited_for.contains("transient.rate_limited"), "{waited_for:?}");
    assert_eq!(calls(&bench).await, (2, 1, 0, 0), "asked once, and again when its time had come");
    assert_eq!(bench.balance().await, (100_000_000 - 2 * CALL_UCR, 0));
    assert_eq!(bench.violations().await, [""; 0]);
}

const FAILS: u8 = 0;
const HANGS: u8 = 1;
const ANSWERS: u8 = 2;

/// A provider that does as it is told; what hangs is let go by `go`, and fails then.
#[derive(Default)]
struct Told {
    how: AtomicU8,
    calls: AtomicUsize,
    under_way: AtomicUsize,
    most_at_once: AtomicUsize,
    began: Notify,
    go: Notify,
}

impl Told {
    fn now(&self, how: u8) {
        self.how.store(how, Ordering::SeqCst);
    }
    fn calls(&self) -> usize {
        self.calls.load(Ordering::SeqCst)
    }
    async fn answer(&self, call: Call<'_>) -> Result<Completion, ProviderError> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        match self.how.load(Ordering::SeqCst) {
            FAILS => Err(away()),
            HANGS => {
                let now = self.under_way.fetch_add(1, Ordering::SeqCst) + 1;
                self.most_at_once.fetch_max(now, Ordering::SeqCst);
                self.began.notify_one();
                let end = tokio::select! {
                    () = call.cancellation.cancelled() => ProviderError::cancelled(CallState::Unknown),
                    () = self.go.notified() => away(),
                };
                self.under_way.fetch_sub(1, Ordering::SeqCst);
                Err(end)
            }
            _ => Ok(Completion {
                text: "there".into(),
                tool_calls: vec![],
                parts: Value::Null,
                continuation_token: None,
                model_served: "m".into(),
                finish_reason: "stop".into(),
                usage: Usage { tokens_prompt: 1, tokens_output: 1, source: UsageSource::Provider, ..Usage::default() },
                http_status: Some(200),
                provider_request_id: None,
            }),
        }
    }
}

fn away() -> ProviderError {
    let failure = Failure::retryable("transient.http", "away");
    ProviderError { unwell: true, ..ProviderError::new(failure, Advice::SameModel) }
}

impl Provider for Told {
    fn name(&self) -> &'static str {
        "gemini"
    }
    fn key(&self) -> KeyIdentity {
        KeyIdentity { fingerprint: "f".repeat(64), last4: "last".into() }
    }
    fn complete<'a>(&'a self, call: Call<'a>) -> BoxFuture<'a, Result<Completion, ProviderError>> {
        Box::pin(self.answer(call))
    }
}

fn candidate() -> Candidate {
    Candidate { structured_output: StructuredOutput::Prompt, ..Routing::shipped().candidates(Role::Utility)[0].clone() }
}

fn context() -> Context {
    detached::context(detached::info("plan@1", json!({})), BTreeMap::new(), Arc::new(Recorder::default()))
}

/// An orchestrator whose breaker is half-open as soon as it has opened, which it has.
async fn half_open() -> (Orchestrator, Arc<Told>) {
    let told = Arc::new(Told::default());
    let routing = Routing { roles: BTreeMap::from([(Role::Utility, vec![candidate()])]) };
    let pace = Pace { backoff: Duration::from_millis(1), wait_max: Duration::ZERO };
    let orchestrator = Orchestrator::with_pace(routing, vec![told.clone() as Arc<dyn Provider>], pace);
    for _ in 0..FAILURES_TO_OPEN {
        let failure = orchestrator.call(&context(), "a", request()).await.unwrap_err();
        assert_eq!((failure.code.as_str(), failure.uncounted), ("transient.http", true));
    }
    assert_eq!(told.calls(), usize::try_from(FAILURES_TO_OPEN).unwrap());
    (orchestrator, told)
}

#[tokio::test]
async fn a_probe_that_is_dropped_or_cancelled_gives_its_place_back() {
    for cancelled in [false, true] {
        let (orchestrator, told) = half_open().await;
        let before = told.calls();
        told.now(HANGS);
        let ctx = context();
        let stop = ctx.cancellation().clone();
        let (mine, of_probe) = (orchestrator.clone(), ctx);
        let probe = tokio::spawn(async move { mine.call(&of_probe, "a", request()).await });
        told.began.notified().await;
        let other = orchestrator.call(&context(), "a", request()).await.unwrap_err();
        assert_eq!((other.code.as_str(), other.uncounted), ("transient.unavailable", true));
        assert_eq!(told.calls(), before + 1, "somebody is finding out already");
        if cancelled {
            stop.cancel();
            assert_eq!(probe.await.unwrap().unwrap_err().kind, FailureKind::Cancelled);
        } else {
            probe.abort();
            assert!(probe.await.unwrap_err().is_cancelled());
        }
        told.now(ANSWERS);
        let reply = orchestrator.call(&context(), "a", request()).await.unwrap();
        assert_eq!((reply.text.as_str(), told.calls()), ("there", before + 2), "cancelled: {cancelled}");
        // It is closed again: nobody is a probe.
        orchestrator.call(&context(), "a", request()).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn however_many_ask_at_once_one_of_them_is_the_probe() {
    const MANY: usize = 16;
    let (orchestrator, told) = half_open().await;
    told.now(HANGS);
    for round in 0..50 {
        let before = told.calls();
        let together = Arc::new(tokio::sync::Barrier::new(MANY));
        let mut all = JoinSet::new();
        for _ in 0..MANY {
            let (orchestrator, together) = (orchestrator.clone(), together.clone());
            all.spawn(async move {
                let ctx = context();
                together.wait().await;
                orchestrator.call(&ctx, "a", request()).await.unwrap_err().code
            });
        }
        let ended = async {
            // All but the probe are told at once; the probe is still under way.
            for _ in 1..MANY {
                assert_eq!(all.join_next().await.unwrap().unwrap(), "transient.unavailable", "round {round}");
            }
            // It may have the place and not have asked yet.
            told.began.notified().await;
            assert_eq!(told.calls(), before + 1, "round {round}");
            told.go.notify_one();
            assert_eq!(all.join_next().await.unwrap().unwrap(), "transient.http", "round {round}");
        };
        tokio::time::timeout(PATIENCE, ended).await.expect("two probes");
    }
    assert_eq!(told.most_at_once.load(Ordering::SeqCst), 1);
}

#[test]
fn threads_that_ask_a_half_open_breaker_at_one_instant_get_one_permit() {
    const THREADS: usize = 8;
    for round in 0..200 {
        let breaker = Breaker::default();
        let start = Instant::now();
        for _ in 0..FAILURES_TO_OPEN {
            breaker.unwell(start, false);
        }
        let (together, allowed) = (Barrier::new(THREADS), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for _ in 0..THREADS {
                scope.spawn(|| {
                    together.wait();
                    if breaker.permit(start + OPEN_FOR) == (Permit::Allowed { probe: true }) {
                        allowed.fetch_add(1, Ordering::SeqCst);
                    }
                });
            }
        });
        assert_eq!(allowed.load(Ordering::SeqCst), 1, "round {round}");
    }
}

/// A provider whose quota of the day is used up, with or without a named end.
struct Quota(Option<u64>);

impl Provider for Quota {
    fn name(&self) -> &'static str {
        "gemini"
    }
    fn key(&self) -> KeyIdentity {
        KeyIdentity { fingerprint: "f".repeat(64), last4: "last".into() }
    }
    fn complete<'a>(&'a self, _call: Call<'a>) -> BoxFuture<'a, Result<Completion, ProviderError>> {
        let mut failure = Failure::retryable("transient.rate_limited", "the quota of the day is used up");
        failure.retry_after_ms = self.0;
        Box::pin(async move { Err(ProviderError::new(failure, Advice::OtherKey)) })
    }
}

#[tokio::test]
async fn a_quota_of_the_day_is_waited_for_without_being_counted() {
    for (named, at_least) in [(None, 599_000), (Some(5_000), 599_000), (Some(8 * 3_600_000), 8 * 3_600_000 - 1_000)] {
        let routing = Routing { roles: BTreeMap::from([(Role::Utility, vec![candidate()])]) };
        let orchestrator = Orchestrator::new(routing, vec![Arc::new(Quota(named))]);
        // The first is refused by the provider, the second already by what everybody knows of the key.
        for _ in 0..2 {
            let failure = orchestrator.call(&context(), "a", request()).await.unwrap_err();
            assert_eq!((failure.code.as_str(), failure.uncounted), ("transient.rate_limited", true));
            assert!(failure.retry_after_ms.unwrap() >= at_least, "{named:?}: {failure:?}");
        }
    }
}

/// Answers badly and is paid for it, while another one is out of service.
struct Declines;

impl Provider for Declines {
    fn name(&self) -> &'static str {
        "openrouter"
    }
    fn key(&self) -> KeyIdentity {
        KeyIdentity { fingerprint: "e".repeat(64), last4: "last".into() }
    }
    fn complete<'a>(&'a self, _call: Call<'a>) -> BoxFuture<'a, Result<Completion, ProviderError>> {
        let mut error = ProviderError::new(Failure::permanent("model.refused", "in the middle"), Advice::OtherModel);
        error.usage = Some(Box::new(Usage { tokens_output: 9, source: UsageSource::Provider, ..Usage::default() }));
        Box::pin(async move { Err(error) })
    }
}

#[tokio::test]
async fn what_was_bought_in_vain_counts_although_another_one_may_come_back() {
    let told = Arc::new(Told::default());
    let declines = Candidate { provider: "openrouter".into(), ..candidate() };
    let routing = Routing { roles: BTreeMap::from([(Role::Utility, vec![declines, candidate()])]) };
    let pace = Pace { backoff: Duration::from_millis(1), wait_max: Duration::ZERO };
    let orchestrator = Orchestrator::with_pace(routing, vec![Arc::new(Declines), told], pace);
    let failure = orchestrator.call(&context(), "a", request()).await.unwrap_err();
    assert_eq!((failure.code.as_str(), failure.uncounted), ("transient.http", false), "it would be bought for ever");
}
