//! The orchestrator over providers that do as they are told, with a context that remembers every reading.

mod again;
mod choice;
mod own;
mod spoiled;
mod window;

use crate::{
    fake_provider::{Dialect, FakeProvider, answer_json, stream},
    provider::client,
};
use futures_util::future::BoxFuture;
use loopwright_activities::{
    orchestrator::{Candidate, Message, Opening, Orchestrator, Pace, Question, Request, Role, Routing},
    provider::{
        Advice, Call, Completion, KeyIdentity, Provider, ProviderError, Scripted, Settings, StructuredOutput, Timeouts,
    },
    testing::{Answer, Reply},
    usage::{CallClosed, CallOpened, CallState, Usage, UsageSource},
};
use loopwright_engine::{
    Failure, FailureKind,
    activity::{
        AttemptInfo, Context,
        detached::{self, Recorder},
    },
};
use serde_json::{Value, json};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

const QUICK: Pace = Pace { backoff: Duration::from_millis(1), wait_max: Duration::from_secs(30) };

type Reaction = dyn Fn(&Call<'_>, usize) -> Result<Completion, ProviderError> + Send + Sync;

/// A provider that is a function of the call and of how many came before.
struct Stub {
    name: &'static str,
    fingerprint: String,
    react: Box<Reaction>,
    calls: Mutex<Vec<(String, Request, u32)>>,
}

impl Stub {
    fn new(
        name: &'static str,
        react: impl Fn(&Call<'_>, usize) -> Result<Completion, ProviderError> + Send + Sync + 'static,
    ) -> Arc<Self> {
        Self::with_key(name, 'f', react)
    }
    /// With a key of its own.
    fn with_key(
        name: &'static str,
        key: char,
        react: impl Fn(&Call<'_>, usize) -> Result<Completion, ProviderError> + Send + Sync + 'static,
    ) -> Arc<Self> {
        let fingerprint = key.to_string().repeat(64);
        Arc::new(Self { name, fingerprint, react: Box::new(react), calls: Mutex::default() })
    }
    fn count(&self) -> usize {
        self.calls.lock().unwrap().len()
    }
}

impl Provider for Stub {
    fn name(&self) -> &'static str {
        self.name
    }
    fn key(&self) -> KeyIdentity {
        KeyIdentity { fingerprint: self.fingerprint.clone(), last4: "last".into() }
    }
    fn complete<'a>(&'a self, call: Call<'a>) -> BoxFuture<'a, Result<Completion, ProviderError>> {
        let n = {
            let mut calls = self.calls.lock().unwrap();
            calls.push((call.model.to_owned(), call.request.clone(), call.max_output_tokens));
            calls.len() - 1
        };
        let result = (self.react)(&call, n);
        Box::pin(async move { result })
    }
}

fn said(text: &str) -> Completion {
    Completion {
        text: text.to_owned(),
        tool_calls: vec![],
        parts: Value::Null,
        continuation_token: None,
        model_served: "served".into(),
        finish_reason: "stop".into(),
        usage: Usage { tokens_prompt: 10, tokens_output: 3, source: UsageSource::Provider, ..Usage::default() },
        http_status: Some(200),
        provider_request_id: None,
    }
}

fn failed(code: &str, advice: Advice) -> ProviderError {
    let failure = match code.split('.').next() {
        Some("transient") => Failure::retryable(code, "as ordered"),
        _ => Failure::permanent(code, "as ordered"),
    };
    ProviderError::new(failure, advice)
}

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
        tasks: vec![],
        input_umtok_max: None,
        output_umtok_max: None,
    }
}

fn routing(candidates: &[Candidate]) -> Routing {
    Routing { roles: BTreeMap::from([(Role::Architect, candidates.to_vec())]) }
}

fn orchestrator(candidates: &[Candidate], providers: &[Arc<Stub>]) -> Orchestrator {
    let providers = providers.iter().map(|p| Arc::clone(p) as Arc<dyn Provider>).collect();
    Orchestrator::with_pace(routing(candidates), providers, QUICK)
}

fn request() -> Request {
    Request {
        role: Role::Architect,
        purpose: "plan".into(),
        messages: vec![Message::System { text: "rules".into() }, Message::User { text: "plan it".into() }],
        tools: vec![],
        output_schema: None,
        max_output_tokens: 1_000,
    }
}

fn with_schema() -> Request {
    let schema = json!({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]});
    Request { output_schema: Some(schema), ..request() }
}

struct Bench {
    recorder: Arc<Recorder>,
    ctx: Context,
}

impl Bench {
    fn new() -> Self {
        Self::attempt(&Arc::default(), 1)
    }
    /// A context of attempt `attempt` over what earlier attempts recorded.
    fn attempt(recorder: &Arc<Recorder>, attempt: u32) -> Self {
        Self::counted(recorder, attempt, attempt)
    }
    /// The same after `attempt - counted` lost ones.
    fn counted(recorder: &Arc<Recorder>, attempt: u32, counted: u32) -> Self {
        let info = AttemptInfo { attempt, counted, ..detached::info("plan@1", json!({})) };
        let ctx = detached::context(info, BTreeMap::new(), Arc::clone(recorder));
        Self { recorder: Arc::clone(recorder), ctx }
    }
    /// The closed readings by key; checks on the way that each was opened once, before, and all were closed.
    fn closed(&self) -> Vec<(String, CallClosed)> {
        let readings = self.recorder.readings.lock().unwrap();
        let mut open = BTreeSet::new();
        let mut seen = BTreeSet::new();
        let mut closed = Vec::new();
        for (phase, key, body) in readings.iter() {
            if *phase == "open" {
                let opened: CallOpened = serde_json::from_value(body.clone()).unwrap();
                assert_eq!((opened.request_sha256.len(), opened.key_fingerprint.len()), (64, 64));
                assert!(opened.input_tokens_max > 0 && opened.output_tokens_max > 0);
                assert!(seen.insert(key.clone()), "{key} was used twice");
                open.insert(key.clone());
            } else {
                assert!(open.remove(key), "{key} was closed without being open");
                closed.push((key.clone(), serde_json::from_value(body.clone()).unwrap()));
            }
        }
        assert!(open.is_empty(), "left open: {open:?}");
        closed
    }
    fn keys(&self) -> Vec<String> {
        self.closed().into_iter().map(|(key, _)| key).collect()
    }
}

#[tokio::test]
async fn a_recorded_answer_is_not_bought_again() {
    let stub = Stub::new("gemini", |_, n| Ok(said(&format!("answer {n}"))));
    let orchestrator = orchestrator(&[candidate("gemini", "m")], &[Arc::clone(&stub)]);
    let bench = Bench::new();
    let first = orchestrator.call(&bench.ctx, "plan", request()).await.unwrap();
    assert_eq!((first.text.as_str(), first.provider.as_str(), first.model.as_str()), ("answer 0", "gemini", "served"));
    let later = Bench::attempt(&bench.recorder, 2);
    assert_eq!(orchestrator.call(&later.ctx, "plan", request()).await.unwrap(), first);
    assert_eq!(stub.count(), 1);
    let closed = bench.closed();
    assert_eq!(closed.len(), 1);
    assert_eq!((closed[0].0.as_str(), closed[0].1.state), ("plan.a1.0", CallState::Succeeded));
    assert!(bench.recorder.checkpoints.lock().unwrap().contains_key("call:plan"));
}

#[tokio::test]
async fn an_unreadable_record_is_an_error_and_not_a_second_purchase() {
    let stub = Stub::new("gemini", |_, _| Ok(said("x")));
    let orchestrator = orchestrator(&[candidate("gemini", "m")], &[Arc::clone(&stub)]);
    let bench = Bench::new();
    bench.recorder.checkpoints.lock().unwrap().insert("call:plan".into(), json!({"no": "reply"}));
    let failure = orchestrator.call(&bench.ctx, "plan", request()).await.unwrap_err();
    assert_eq!((failure.code.as_str(), stub.count()), ("model.record_unreadable", 0));
}

#[tokio::test]
async fn an_unknown_outcome_is_recorded_as_such_and_not_repeated_within_its_attempt() {
    let stub = Stub::new("openrouter", |call, n| match n {
        0 => {
            call.request_id.offer("gen-1");
            Err(ProviderError { state: CallState::Unknown, ..failed("transient.network", Advice::SameModel) })
        }
        _ => Ok(said("there")),
    });
    let orchestrator =
        orchestrator(&[candidate("openrouter", "m"), candidate("openrouter", "n")], &[Arc::clone(&stub)]);
    let bench = Bench::attempt(&Arc::default(), 3);
    let failure = orchestrator.call(&bench.ctx, "plan", request()).await.unwrap_err();
    assert_eq!((failure.code.as_str(), failure.kind), ("transient.network", FailureKind::Retryable));
    assert!(failure.uncounted, "an outage of minutes ends no run");
    assert_eq!(stub.count(), 1, "neither model of a server that may have billed it is asked again");
    // As the engine waits before the next attempt.
    tokio::time::sleep(Duration::from_millis(failure.retry_after_ms.unwrap() + 1)).await;
    let next = Bench::attempt(&bench.recorder, 4);
    orchestrator.call(&next.ctx, "plan", request()).await.unwrap();
    let closed = bench.closed();
    assert_eq!(bench.keys(), ["plan.a3.0", "plan.a4.0"]);
    assert_eq!((closed[0].1.state, closed[0].1.provider_request_id.as_deref()), (CallState::Unknown, Some("gen-1")));
    assert_eq!(closed[0].1.error_class.as_deref(), Some("transient.network"));
    assert_eq!(closed[1].1.state, CallState::Succeeded);
}

#[tokio::test]
async fn candidates_are_asked_in_order_and_each_at_most_twice() {
    let ill = Stub::new("gemini", |_, _| Err(failed("transient.http", Advice::SameModel)));
    let full = Stub::new("openrouter", |_, _| Err(failed("transient.rate_limited", Advice::SameModel)));
    let good = Stub::new("openai_compatible", |_, _| Ok(said("at last")));
    let list = [
        candidate("gemini", "a"),
        candidate("gemini", "b"),
        candidate("openrouter", "c"),
        candidate("openai_compatible", "d"),
    ];
    let orchestrator = orchestrator(&list, &[Arc::clone(&ill), Arc::clone(&full), good]);
    let bench = Bench::new();
    let reply = orchestrator.call(&bench.ctx, "plan", request()).await.unwrap();
    assert_eq!(reply.provider, "openai_compatible");
    assert_eq!((ill.count(), full.count()), (4, 2));
    assert_eq!(bench.closed().len(), 7);
    let expected: Vec<_> =
        ["gemini", "gemini", "openrouter", "openai_compatible"].into_iter().zip(["a", "b", "c", "d"]).collect();
    let candidates = orchestrator.candidates(Role::Architect);
    assert_eq!(candidates.iter().map(|(p, m)| (p.as_str(), m.as_str())).collect::<Vec<_>>(), expected);
}

#[tokio::test]
async fn a_refusal_goes_to_the_next_model_at_once_and_ends_as_a_refusal() {
    let stub = Stub::new("gemini", |_, _| Err(failed("model.refused", Advice::OtherModel)));
    let orchestrator = orchestrator(&[candidate("gemini", "a"), candidate("gemini", "b")], &[Arc::clone(&stub)]);
    let failure = orchestrator.call(&Bench::new().ctx, "plan", request()).await.unwrap_err();
    assert_eq!((failure.code.as_str(), failure.kind, stub.count()), ("model.refused", FailureKind::Permanent, 2));
    assert_eq!(failure.detail["model"], "a");
    assert_eq!(failure.detail["others"][0]["code"], "model.refused");
}

#[tokio::test]
async fn a_long_wait_becomes_a_failure_with_the_wait_and_frees_the_worker() {
    let stub = Stub::new("gemini", |call, _| {
        let mut error = failed("transient.rate_limited", Advice::SameModel);
        error.failure.retry_after_ms = Some(if call.model == "a" { 90_000 } else { 60_000 });
        Err(error)
    });
    let orchestrator = orchestrator(&[candidate("gemini", "a"), candidate("gemini", "b")], &[Arc::clone(&stub)]);
    let failure = orchestrator.call(&Bench::new().ctx, "plan", request()).await.unwrap_err();
    assert_eq!((failure.code.as_str(), failure.retry_after_ms), ("transient.rate_limited", Some(60_000)));
    assert_eq!(stub.count(), 2, "nobody is asked twice when the wait is known to be long");
}

#[tokio::test]
async fn while_one_candidate_may_recover_the_failure_is_retryable() {
    let wrong = Stub::new("gemini", |_, _| Err(failed("provider.key_invalid", Advice::OtherProvider)));
    let ill = Stub::new("openrouter", |_, _| Err(failed("transient.http", Advice::SameModel)));
    let orchestrator = orchestrator(&[candidate("gemini", "a"), candidate("openrouter", "b")], &[wrong, ill]);
    let failure = orchestrator.call(&Bench::new().ctx, "plan", request()).await.unwrap_err();
    assert_eq!((failure.code.as_str(), failure.kind), ("transient.http", FailureKind::Retryable));
    assert_eq!(failure.detail["others"][0]["code"], "provider.key_invalid");
}

#[tokio::test]
async fn a_wrong_key_is_one_message_and_no_storm() {
    for dialect in Dialect::ALL {
        let server = FakeProvider::always(answer_json(401, "", &dialect.error(401, "UNAUTHENTICATED"))).await;
        let list = [candidate(dialect.name(), "a"), candidate(dialect.name(), "b")];
        let orchestrator =
            Orchestrator::with_pace(routing(&list), vec![client(dialect, &server.base(), Timeouts::default())], QUICK);
        let bench = Bench::new();
        for n in 0..3 {
            let failure = orchestrator.call(&bench.ctx, &format!("turn-{n}"), request()).await.unwrap_err();
            assert_eq!((failure.code.as_str(), failure.kind), ("provider.key_invalid", FailureKind::Retryable));
            assert!(failure.uncounted, "it waits for the operator");
            assert!(failure.message.contains(dialect.key_setting()), "{}", failure.message);
        }
        assert_eq!(server.seen().len(), 1, "{dialect:?}: asked once, remembered");
        let closed = bench.closed();
        assert_eq!((closed.len(), closed[0].1.state, closed[0].1.usage.clone()), (1, CallState::Failed, None));
        assert_eq!(closed[0].1.http_status, Some(401));
    }
}

#[tokio::test]
async fn an_invalid_answer_is_repaired_once_and_paid_for() {
    let stub = Stub::new("gemini", |call, n| {
        if n == 0 {
            return Ok(said("```json\n{\"a\": \"one\"}\n```"));
        }
        assert!(call.key.ends_with("~repair"));
        Ok(said("Sorry! {\"a\": 1}"))
    });
    let orchestrator = orchestrator(&[candidate("gemini", "m")], &[Arc::clone(&stub)]);
    let bench = Bench::new();
    let reply = orchestrator.call(&bench.ctx, "plan", with_schema()).await.unwrap();
    assert_eq!(reply.json, Some(json!({"a": 1})));
    let closed = bench.closed();
    assert_eq!(closed[0].1.state, CallState::Succeeded, "it was served");
    assert_eq!(closed[0].1.error_class.as_deref(), Some("model.output_invalid"));
    assert_eq!(closed[0].1.usage.as_ref().unwrap().tokens_output, 3, "and is billed");
    assert_eq!(closed[1].1.error_class, None);
    let asked = stub.calls.lock().unwrap()[1].1.clone();
    let Some(Message::User { text }) = asked.messages.last() else { panic!("{asked:?}") };
    assert!(text.contains("/a: \"one\" is not of type \"integer\""), "{text}");
}

#[tokio::test]
async fn second_invalid_answers_of_two_candidates_end_the_call() {
    let stub = Stub::new("gemini", |_, _| Ok(said("no JSON today")));
    let list = ["a", "b", "c"].map(|model| candidate("gemini", model));
    let orchestrator = orchestrator(&list, &[Arc::clone(&stub)]);
    let bench = Bench::new();
    let failure = orchestrator.call(&bench.ctx, "plan", with_schema()).await.unwrap_err();
    assert_eq!((failure.code.as_str(), failure.kind), ("model.output_invalid", FailureKind::Retryable));
    assert!(!failure.uncounted && failure.message.starts_with("a answered twice"), "{failure:?}");
    let models = || stub.calls.lock().unwrap().iter().map(|(model, ..)| model.clone()).collect::<Vec<_>>();
    assert_eq!(models(), ["a", "a", "b", "b"], "each is paid for: no third one is asked");
    assert!(!bench.recorder.checkpoints.lock().unwrap().contains_key("call:plan"));
    assert_eq!(bench.closed().len(), 4);
    // The worker died before it could say so: nothing is bought by the attempt that carries on.
    let again = Bench::counted(&bench.recorder, 2, 1);
    let repeated = orchestrator.call(&again.ctx, "plan", with_schema()).await.unwrap_err();
    assert_eq!((repeated.code, repeated.message, repeated.kind), (failure.code, failure.message, failure.kind));
    assert_eq!(stub.count(), 4);
    // It had said so, and the policy wants another attempt: that one asks anew.
    let next = Bench::counted(&bench.recorder, 3, 2);
    orchestrator.call(&next.ctx, "plan", with_schema()).await.unwrap_err();
    let calls = stub.calls.lock().unwrap();
    assert!(calls.len() == 8 && calls[4].1 == calls[0].1, "{calls:?}");
}

#[tokio::test]
async fn an_unusable_answer_is_not_bought_again_when_its_repair_is_lost() {
    let stub = Stub::new("gemini", |call, n| match n {
        0 => Ok(said("{\"a\": \"one\"}")),
        1 => Err(failed("transient.overloaded", Advice::OtherModel)),
        2 => Err(failed("transient.http", Advice::Stop)),
        _ => {
            assert_eq!((call.model, call.key), ("b", "plan~repair"));
            Ok(said("{\"a\": 1}"))
        }
    });
    // The first candidate is away, the second answers badly, its repair goes under with the worker.
    let away = Stub::new("openrouter", |_, _| Err(failed("transient.overloaded", Advice::OtherProvider)));
    let orchestrator = orchestrator(
        &[candidate("openrouter", "a"), candidate("gemini", "b")],
        &[Arc::clone(&away), Arc::clone(&stub)],
    );
    let bench = Bench::new();
    orchestrator.call(&bench.ctx, "plan", with_schema()).await.unwrap_err();
    assert_eq!((away.count(), stub.count()), (1, 2));
    let again = Bench::counted(&bench.recorder, 2, 1);
    orchestrator.call(&again.ctx, "plan", with_schema()).await.unwrap_err();
    let again = Bench::counted(&bench.recorder, 3, 1);
    let reply = orchestrator.call(&again.ctx, "plan", with_schema()).await.unwrap();
    assert_eq!((reply.json, reply.model.as_str()), (Some(json!({"a": 1})), "served"));
    assert_eq!((away.count(), stub.count()), (1, 4), "the repair, and nothing before it");
    let calls = stub.calls.lock().unwrap();
    assert!(calls[1].1 == calls[2].1 && calls[2].1 == calls[3].1, "the same repair each time");
}

#[tokio::test]
async fn asking_again_under_the_same_key_makes_new_calls_with_new_names() {
    let stub = Stub::new("gemini", |_, n| match n {
        0 | 1 => Err(failed("transient.http", Advice::SameModel)),
        _ => Ok(said("x")),
    });
    let orchestrator = orchestrator(&[candidate("gemini", "m")], &[stub]);
    let bench = Bench::new();
    orchestrator.call(&bench.ctx, "plan", request()).await.unwrap_err();
    orchestrator.call(&bench.ctx, "plan", request()).await.unwrap();
    assert_eq!(bench.keys(), ["plan.a1.0", "plan.a1.1", "plan.a1.2"]);
}

#[tokio::test]
async fn an_answer_that_hit_its_limit_is_asked_for_again_with_more_room() {
    let stub = Stub::new("gemini", |call, _| {
        if call.max_output_tokens < 2_000 {
            let mut error = failed("model.truncated", Advice::SameModel);
            error.stream_completed = true;
            error.usage = Some(Box::new(Usage { tokens_output: 1_000, ..Usage::default() }));
            return Err(error);
        }
        Ok(said("long"))
    });
    let orchestrator = orchestrator(&[candidate("gemini", "m")], &[Arc::clone(&stub)]);
    let bench = Bench::new();
    orchestrator.call(&bench.ctx, "plan", request()).await.unwrap();
    let limits: Vec<u32> = stub.calls.lock().unwrap().iter().map(|(_, _, limit)| *limit).collect();
    assert_eq!(limits, [1_000, 4_000]);
    assert_eq!(bench.closed()[0].1.usage.as_ref().unwrap().tokens_output, 1_000);
}

#[tokio::test]
async fn thinking_gets_its_room_within_the_limit_of_the_model() {
    let stub = Stub::new("gemini", |_, _| Ok(said("x")));
    let list = [Candidate { thinking_tokens: 3_500, ..candidate("gemini", "m") }];
    let orchestrator = orchestrator(&list, &[Arc::clone(&stub)]);
    orchestrator.call(&Bench::new().ctx, "plan", request()).await.unwrap();
    assert_eq!(stub.calls.lock().unwrap()[0].2, 4_000);
    assert_eq!(orchestrator.planned((Role::Architect, "plan"), &Value::Null, 2, 50, 100).output_tokens, 3_600);
}

#[tokio::test]
async fn what_is_planned_follows_the_definition_and_the_purpose() {
    let stubs = [Stub::new("gemini", |_, _| Ok(said("x"))), Stub::new("openrouter", |_, _| Ok(said("x")))];
    let dear = Candidate { tasks: vec!["plan".into()], output_umtok_max: Some(5), ..candidate("gemini", "dear") };
    let thinks = Candidate { thinking_tokens: 500, ..candidate("openrouter", "thinks") };
    let orchestrator = orchestrator(&[dear, candidate("gemini", "m"), thinks], &stubs);
    let planned = |purpose: &str, extras: &Value| {
        let planned = orchestrator.planned((Role::Architect, purpose), extras, 1, 50, 100);
        let models: Vec<String> = planned.candidates.iter().map(|(_, model)| model.clone()).collect();
        (models.join(" "), planned.output_tokens, planned.ceilings[0].1)
    };
    assert_eq!(planned("plan", &Value::Null), ("dear m thinks".into(), 600, Some(5)));
    assert_eq!(planned("verify", &Value::Null), ("m thinks".into(), 600, None));
    let extras = json!({"models": {"architect": ["gemini/new", "openai_compatible/absent", "gemini/m"]}});
    assert_eq!(planned("plan", &extras), ("new m".into(), 100, None), "in its order, as far as somebody serves them");
    // And so is it asked.
    let mut info = detached::info("plan@1", json!({}));
    info.extras = Arc::new(extras);
    let ctx = detached::context(info, BTreeMap::new(), Arc::new(Recorder::default()));
    assert_eq!(orchestrator.call(&ctx, "plan", request()).await.unwrap().text, "x");
    assert_eq!(stubs[0].calls.lock().unwrap()[0].0, "new");
}

#[tokio::test]
async fn a_cancelled_attempt_closes_its_call_and_makes_no_other() {
    let stub = Stub::new("gemini", |call, _| {
        call.cancellation.cancel();
        Err(ProviderError::cancelled(CallState::Unknown))
    });
    let orchestrator = orchestrator(&[candidate("gemini", "a"), candidate("gemini", "b")], &[Arc::clone(&stub)]);
    let bench = Bench::new();
    let failure = orchestrator.call(&bench.ctx, "plan", request()).await.unwrap_err();
    assert_eq!((failure.kind, stub.count()), (FailureKind::Cancelled, 1));
    assert_eq!(bench.closed()[0].1.state, CallState::Unknown);
    assert_eq!(orchestrator.call(&bench.ctx, "next", request()).await.unwrap_err().kind, FailureKind::Cancelled);
    assert_eq!(stub.count(), 1);
}

#[tokio::test]
async fn nobody_to_ask_is_said_with_the_remedy() {
    let none = Orchestrator::new(Routing::shipped(), vec![]);
    let failure = none.call(&Bench::new().ctx, "plan", request()).await.unwrap_err();
    assert_eq!((failure.code.as_str(), failure.kind), ("model.unavailable", FailureKind::Permanent));
    assert!(failure.message.contains("GEMINI_API_KEY"));
    let stub = Stub::new("gemini", |_, _| Ok(said("x")));
    let toolless = [Candidate { tools: false, ..candidate("gemini", "m") }];
    let tool = loopwright_activities::orchestrator::ToolSpec {
        name: "read".into(),
        description: String::new(),
        parameters: json!({}),
    };
    let with_tools = Request { tools: vec![tool], ..request() };
    let failure = orchestrator(&toolless, &[stub]).call(&Bench::new().ctx, "plan", with_tools).await.unwrap_err();
    assert!(failure.message.contains("LOOPWRIGHT_MODEL_ARCHITECT"), "{}", failure.message);
}

#[tokio::test]
async fn the_rehearsed_model_answers_by_identity_and_says_what_it_is() {
    let script = "- at: 'step:plan'\n  reply: { json: { a: 1 } }\n  delay_ms: 2\n  chunks: 2\n\
                  - at: 'step:turn-*'\n  reply: { text: ok, tool_calls: [{ name: read, arguments: { path: x } }] }\n";
    let provider: Arc<dyn Provider> = Arc::new(Scripted::from_yaml(script).unwrap());
    let orchestrator = Orchestrator::new(Routing::rehearsed(), vec![provider]);
    assert!(orchestrator.is_rehearsed());
    let bench = Bench::new();
    let turn = orchestrator.call(&bench.ctx, "turn-9", request()).await.unwrap();
    assert_eq!((turn.tool_calls[0].name.as_str(), &turn.tool_calls[0].arguments), ("read", &json!({"path": "x"})));
    let plan = orchestrator.call(&bench.ctx, "plan", with_schema()).await.unwrap();
    assert_eq!((plan.provider.as_str(), plan.model.as_str()), ("rehearsed", "rehearsed/architect"));
    assert_eq!(plan.json, Some(json!({"a": 1})));
    assert_eq!(plan.tokens_output, 2, "7 bytes, 4 to a token");
    let failure = orchestrator.call(&bench.ctx, "other", request()).await.unwrap_err();
    assert_eq!((failure.code.as_str(), failure.kind), ("rehearsal.no_answer", FailureKind::Permanent));
    assert!(failure.message.contains("step:other"));
}

#[tokio::test]
async fn a_local_server_without_a_named_model_is_asked_for_its_list() {
    let server = FakeProvider::start(|seen, _| match seen.path.as_str() {
        "/v1/models" => answer_json(200, "", &json!({"data": [{"id": "tiny.gguf"}]})),
        _ => stream(&Dialect::OpenAi.good("hi")),
    })
    .await;
    let base = server.base();
    let settings = Settings::from_lookup(&|name| (name == "OPENAI_BASE_URL").then(|| format!("{base}/v1"))).unwrap();
    let orchestrator = Orchestrator::configured(Routing::shipped(), &settings, None).await.unwrap();
    for role in Role::ALL {
        assert_eq!(orchestrator.candidates(role), [("openai_compatible".to_owned(), "tiny.gguf".to_owned())]);
    }
    let reply = orchestrator.call(&Bench::new().ctx, "plan", request()).await.unwrap();
    assert_eq!((reply.text.as_str(), reply.model.as_str()), ("hi", "tiny.gguf"));

    let server = FakeProvider::always(answer_json(200, "", &json!({"data": []}))).await;
    let base = server.base();
    let settings = Settings::from_lookup(&|name| (name == "OPENAI_BASE_URL").then(|| base.clone())).unwrap();
    let error = Orchestrator::configured(Routing::shipped(), &settings, None).await.err().unwrap().to_string();
    assert!(error.contains("OPENAI_MODEL"), "{error}");
}
