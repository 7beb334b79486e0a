//! The orchestrator over providers that do as they are told, with a context that remembers every reading.

mod again;
mod own;

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
    time::Duration,
};

const QUICK: Pace = Pace { backoff: Duration::from_millis(1), wait_max: Duration::from_secs(30) };

type Reaction = dyn Fn(&Call<'_>, usize) -> Result<Completion, ProviderError> + Send + Sync;

/// A provider that is a function of the call and of how many came before.
struct Stub {
    name: &'static str,
    react: Box<Reaction>,
    calls: Mutex<Vec<(String, Request, u32)>>,
}

impl Stub {
    fn new(
        name: &'static str,
        react: impl Fn(&Call<'_>, usize) -> Result<Completion, ProviderError> + Send + Sync + 'static,
    ) -> Arc<Self> {
        Arc::new(Self { name, react: Box::new(react), calls: Mutex::default() })
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
        KeyIdentity { fingerprint: "f".repeat(64), last4: "last".into() }
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
    let next = Bench::attempt(&bench.recorder, 4);
    orchestrator.call(&next.ctx, "plan", request()).await.unwrap();
    let closed = bench.closed();
    assert_eq!(bench.keys(), ["plan.a3.0", "plan.a4.0"]);
    assert_eq!((closed[0].1.state, closed[0].1.provider_request_id.as_deref()), (CallState::Unknown, Some("gen-1")));
    assert_eq!(closed[0].1.error_class.as_deref(), Some("transient.network"));
    assert_eq!(closed[1].1.state, CallState::Succeeded);
}

#[tokio::test]
async fn after_a_lost_answer_another_provider_may_be_asked_and_many_lost_answers_count() {
    let lost = Stub::new("gemini", |_, _| {
        Err(ProviderError { state: CallState::Unknown, ..failed("transient.network", Advice::SameModel) })
    });
    let other = Stub::new("openrouter", |_, n| match n {
        0 => Ok(said("there")),
        _ => Err(failed("model.refused", Advice::OtherModel)),
    });
    let list = [candidate("gemini", "a"), candidate("gemini", "b"), candidate("openrouter", "c")];
    let orchestrator = orchestrator(&list, &[Arc::clone(&lost), Arc::clone(&other)]);
    let reply = orchestrator.call(&Bench::new().ctx, "plan", request()).await.unwrap();
    assert_eq!((reply.provider.as_str(), lost.count()), ("openrouter", 1));
    let recorder = Arc::default();
    for attempt in 2..=6 {
        let bench = Bench::attempt(&recorder, attempt);
        assert!(orchestrator.call(&bench.ctx, "other", request()).await.unwrap_err().uncounted);
    }
    let late = orchestrator.call(&Bench::attempt(&recorder, 7).ctx, "other", request()).await.unwrap_err();
    assert_eq!((late.code.as_str(), late.uncounted, lost.count()), ("transient.network", false, 7));
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
async fn a_prompt_that_is_too_long_loses_old_tool_outputs_or_goes_elsewhere() {
    let tool = |n: usize| Message::Tool { call_id: n.to_string(), name: "read".into(), output: "x".repeat(10_500) };
    let long = Request { messages: (0..3).map(tool).collect(), ..request() };
    let stub = Stub::new("gemini", |_, _| Ok(said("x")));
    let small = candidate("gemini", "small");
    let orchestrator_of = |list: &[Candidate]| orchestrator(list, &[Arc::clone(&stub)]);
    orchestrator_of(std::slice::from_ref(&small)).call(&Bench::new().ctx, "plan", long.clone()).await.unwrap();
    let sent = stub.calls.lock().unwrap().pop().unwrap().1;
    let sizes: Vec<bool> =
        sent.messages.iter().map(|m| matches!(m, Message::Tool { output, .. } if output.len() == 10_500)).collect();
    assert_eq!(sizes, [false, true, true], "the oldest first");

    let endless = Request { messages: vec![Message::User { text: "x".repeat(60_000) }], ..request() };
    let large = Candidate { context_tokens: 1_000_000, ..candidate("gemini", "large") };
    orchestrator_of(&[small.clone(), large]).call(&Bench::new().ctx, "plan", endless.clone()).await.unwrap();
    assert_eq!(stub.calls.lock().unwrap().pop().unwrap().0, "large");
    let failure = orchestrator_of(&[small]).call(&Bench::new().ctx, "plan", endless).await.unwrap_err();
    assert_eq!((failure.code.as_str(), failure.kind), ("model.context_overflow", FailureKind::Permanent));
}

#[tokio::test]
async fn a_window_that_a_server_names_is_learned() {
    let stub = Stub::new("openai_compatible", |call, _| {
        if loopwright_activities::provider::estimate::request_tokens_max(call.request) > 4_000 {
            let mut error = failed("model.context_overflow", Advice::OtherModel);
            error.context_tokens = Some(4_096);
            return Err(error);
        }
        Ok(said("x"))
    });
    let tool = |n: usize| Message::Tool { call_id: n.to_string(), name: "read".into(), output: "x".repeat(9_000) };
    let long = Request { messages: (0..3).map(tool).collect(), ..request() };
    let list = [Candidate { context_tokens: 100_000, ..candidate("openai_compatible", "m") }];
    let orchestrator = orchestrator(&list, &[Arc::clone(&stub)]);
    let bench = Bench::new();
    orchestrator.call(&bench.ctx, "one", long.clone()).await.unwrap();
    orchestrator.call(&bench.ctx, "two", long).await.unwrap();
    assert_eq!(stub.count(), 3, "refused once, shortened from then on");
}

/// A question of `bytes` that may be given up down to each of `smaller`.
fn packed(bytes: usize, smaller: &[usize]) -> Question {
    let messages = |bytes: usize| {
        vec![Message::System { text: "rules".into() }, Message::User { text: format!("{}plan it", "c".repeat(bytes)) }]
    };
    let opening =
        Opening { messages: messages(bytes), smaller: smaller.iter().map(|bytes| messages(*bytes)).collect() };
    Question::opened(opening, Request { messages: vec![], ..request() })
}

/// The bytes of each prompt that may be given up.
fn given(stub: &Stub) -> Vec<(String, usize)> {
    let calls = stub.calls.lock().unwrap();
    let bytes = |request: &Request| match request.messages.as_slice() {
        [Message::System { text: rules }, Message::User { text }] if rules == "rules" => {
            text.strip_suffix("plan it").expect("the question itself").len()
        }
        other => panic!("{other:?}"),
    };
    calls.iter().map(|(model, request, _)| (model.clone(), bytes(request))).collect()
}

#[tokio::test]
async fn a_small_window_gets_the_same_question_packed_smaller() {
    let stub = Stub::new("gemini", |_, _| Ok(said("x")));
    let list = [candidate("gemini", "small"), Candidate { context_tokens: 1_000_000, ..candidate("gemini", "large") }];
    let orchestrator = orchestrator(&list, &[Arc::clone(&stub)]);
    let bench = Bench::new();
    orchestrator.call(&bench.ctx, "a", packed(60_000, &[40_000, 20_000, 10_000])).await.unwrap();
    // Where even the smallest packing does not fit, another model gets the whole.
    orchestrator.call(&bench.ctx, "b", packed(60_000, &[50_000, 40_000])).await.unwrap();
    assert_eq!(given(&stub), [("small".to_owned(), 20_000), ("large".to_owned(), 60_000)]);
    assert_eq!(bench.closed().len(), 2, "what does not fit is not sent");
}

#[tokio::test]
async fn a_prompt_that_a_provider_finds_too_long_is_packed_smaller_a_bounded_number_of_times() {
    let too_long = || failed("model.context_overflow", Advice::OtherModel);
    let sizes = [60_000, 40_000, 30_000, 20_000, 10_000, 5_000, 1_000];
    // It takes less than half of what it was said to take, and does not say how much.
    let stub = Stub::new("gemini", move |call, _| {
        let Some(Message::User { text }) = call.request.messages.get(1) else { panic!() };
        if text.len() > 25_000 { Err(too_long()) } else { Ok(said("x")) }
    });
    let list = [Candidate { context_tokens: 1_000_000, ..candidate("gemini", "m") }];
    let orchestrator_of = |list: &[Candidate], stub: &Arc<Stub>| orchestrator(list, &[Arc::clone(stub)]);
    let asking = orchestrator_of(&list, &stub);
    let bench = Bench::new();
    asking.call(&bench.ctx, "a", packed(sizes[0], &sizes[1..])).await.unwrap();
    let asked: Vec<usize> = given(&stub).into_iter().map(|(_, bytes)| bytes).collect();
    assert!(asked.len() <= 4 && asked.is_sorted_by(|a, b| a > b) && asked.last() < Some(&25_000), "{asked:?}");
    let closed = bench.closed();
    assert_eq!(closed[0].1.error_class.as_deref(), Some("model.context_overflow"));
    // What it took is remembered.
    asking.call(&bench.ctx, "b", packed(sizes[0], &sizes[1..])).await.unwrap();
    assert_eq!(given(&stub).len(), asked.len() + 1);
    // Another attempt, on a worker that knows nothing yet, asks the same bytes.
    let fresh = orchestrator_of(&list, &stub);
    fresh.call(&Bench::new().ctx, "a", packed(sizes[0], &sizes[1..])).await.unwrap();
    let again: Vec<usize> = given(&stub).into_iter().skip(asked.len() + 1).map(|(_, bytes)| bytes).collect();
    assert_eq!(again, asked);

    // One that refuses everything is asked four times, and then the next model is asked the whole question.
    let never = Stub::new("openrouter", move |_, _| Err(too_long()));
    let other = Stub::new("gemini", |_, _| Ok(said("x")));
    let list = ["openrouter", "gemini"].map(|name| Candidate { context_tokens: 1_000_000, ..candidate(name, "m") });
    let both = orchestrator(&list, &[Arc::clone(&never), Arc::clone(&other)]);
    let bench = Bench::new();
    for key in ["a", "b"] {
        both.call(&bench.ctx, key, packed(sizes[0], &sizes[1..])).await.unwrap();
    }
    assert_eq!(
        (never.count(), given(&other)[1].1),
        (8, 60_000),
        "and nothing is concluded from a refusal of everything"
    );
}

#[tokio::test]
async fn a_window_that_a_server_names_too_large_is_not_the_last_word() {
    // It counts more tokens than we do: what fits its window by our count does not.
    let stub = Stub::new("openai_compatible", |call, _| {
        if loopwright_activities::provider::estimate::request_tokens_max(call.request) > 3_000 {
            let mut error = failed("model.context_overflow", Advice::OtherModel);
            error.context_tokens = Some(8_192);
            return Err(error);
        }
        Ok(said("x"))
    });
    let list = [Candidate { context_tokens: 8_192, ..candidate("openai_compatible", "m") }];
    let orchestrator = orchestrator(&list, &[Arc::clone(&stub)]);
    orchestrator.call(&Bench::new().ctx, "a", packed(20_000, &[15_000, 10_000, 8_000, 5_000, 2_000])).await.unwrap();
    assert!(given(&stub).len() <= 4, "{:?}", given(&stub));
}

#[tokio::test]
async fn every_dialect_that_says_context_length_exceeded_gets_less() {
    for dialect in Dialect::ALL {
        let server = FakeProvider::serve(move |seen, _| match seen.body.to_string().len() {
            size if size > 30_000 => Answer::error(dialect, 400, "CONTEXT_LENGTH_EXCEEDED"),
            _ => Reply::text("short enough").into(),
        })
        .await;
        let list = [Candidate { context_tokens: 1_000_000, ..candidate(dialect.name(), "fake-large") }];
        let provider = client(dialect, &server.base_of(dialect), Timeouts::default());
        let orchestrator = Orchestrator::with_pace(routing(&list), vec![provider], QUICK);
        let bench = Bench::new();
        let question = packed(60_000, &[40_000, 20_000, 10_000]);
        let reply = orchestrator.call(&bench.ctx, "plan", question).await.unwrap();
        assert_eq!(reply.text, "short enough", "{dialect:?}");
        let bodies: Vec<String> = server.seen().iter().map(|seen| seen.body.to_string()).collect();
        assert!((2..=4).contains(&bodies.len()), "{dialect:?}: {}", bodies.len());
        assert!(bodies.iter().all(|body| body.contains("rules") && body.contains("plan it")), "{dialect:?}");
        let states: Vec<CallState> = bench.closed().iter().map(|(_, closed)| closed.state).collect();
        assert_eq!(states[0], CallState::Failed, "{dialect:?}");
        assert!(bench.closed()[0].1.usage.is_none(), "{dialect:?}: a prompt that was refused costs nothing");
    }
}

#[tokio::test]
async fn candidates_serve_the_tasks_that_they_are_for() {
    let stub = Stub::new("gemini", |call, _| Ok(said(call.model)));
    let list = [
        Candidate { tasks: vec!["verify".into()], ..candidate("gemini", "judge") },
        Candidate { tasks: vec!["plan".into(), "verify".into()], ..candidate("gemini", "planner") },
        candidate("gemini", "any"),
    ];
    let orchestrator = orchestrator(&list, &[stub]);
    for (task, expected) in [("plan", "planner"), ("verify", "judge"), ("readme", "any")] {
        let request = Request { purpose: task.into(), ..request() };
        assert_eq!(orchestrator.call(&Bench::new().ctx, task, request).await.unwrap().text, expected);
    }
}

#[tokio::test]
async fn only_models_that_can_call_tools_are_asked_with_tools() {
    let stub = Stub::new("gemini", |call, _| Ok(said(call.model)));
    let list = [Candidate { tools: false, ..candidate("gemini", "writer") }, candidate("gemini", "worker")];
    let orchestrator = orchestrator(&list, &[stub]);
    let tool = loopwright_activities::orchestrator::ToolSpec {
        name: "read".into(),
        description: String::new(),
        parameters: json!({}),
    };
    let with_tools = Request { tools: vec![tool], ..request() };
    assert_eq!(orchestrator.call(&Bench::new().ctx, "a", with_tools).await.unwrap().text, "worker");
    assert_eq!(orchestrator.call(&Bench::new().ctx, "b", request()).await.unwrap().text, "writer");
}

#[tokio::test]
async fn a_candidate_is_asked_for_json_at_the_level_that_its_line_says() {
    let levels = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&levels);
    let stub = Stub::new("gemini", move |call, n| {
        seen.lock().unwrap().push(call.structured_output);
        if n < 2 { Err(failed("model.refused", Advice::OtherModel)) } else { Ok(said("{\"a\": 1}")) }
    });
    let list = [StructuredOutput::JsonSchema, StructuredOutput::JsonObject, StructuredOutput::Prompt]
        .map(|level| Candidate { structured_output: level, ..candidate("gemini", "m") });
    let orchestrator = orchestrator(&list, &[stub]);
    let reply = orchestrator.call(&Bench::new().ctx, "plan", with_schema()).await.unwrap();
    assert_eq!(reply.json, Some(json!({"a": 1})));
    let levels = levels.lock().unwrap().clone();
    assert_eq!(levels, [StructuredOutput::JsonSchema, StructuredOutput::JsonObject, StructuredOutput::Prompt]);
}

#[tokio::test]
async fn repeated_failure_of_one_provider_sends_calls_to_the_next_at_once() {
    let ill =
        Stub::new("gemini", |_, _| Err(ProviderError { unwell: true, ..failed("transient.http", Advice::SameModel) }));
    let good = Stub::new("openrouter", |_, _| Ok(said("here")));
    let list = [candidate("gemini", "a"), candidate("openrouter", "b")];
    let orchestrator = orchestrator(&list, &[Arc::clone(&ill), Arc::clone(&good)]);
    let bench = Bench::new();
    for n in 0..6 {
        assert_eq!(orchestrator.call(&bench.ctx, &format!("k{n}"), request()).await.unwrap().provider, "openrouter");
    }
    assert_eq!((ill.count(), good.count()), (5, 6), "five failures open the breaker");
}

#[tokio::test]
async fn an_overloaded_server_is_tried_once_more_and_then_left_for_the_next() {
    for dialect in Dialect::ALL {
        let server = FakeProvider::serve(move |_, n| {
            if n < 2 { Answer::error(dialect, 503, "UNAVAILABLE") } else { Reply::text("late").into() }
        })
        .await;
        let list = [candidate(dialect.name(), "fake-large"), candidate(dialect.name(), "fake-small")];
        let provider = client(dialect, &server.base_of(dialect), Timeouts::default());
        let orchestrator = Orchestrator::with_pace(routing(&list), vec![provider], QUICK);
        orchestrator.call(&Bench::new().ctx, "plan", request()).await.unwrap();
        let models: Vec<Option<String>> = server.seen().iter().map(|seen| seen.model()).collect();
        assert_eq!(models.iter().flatten().collect::<Vec<_>>(), ["fake-large", "fake-large", "fake-small"]);
    }
}

#[tokio::test]
async fn a_provider_that_keeps_failing_is_left_alone_for_a_while() {
    let stub =
        Stub::new("gemini", |_, _| Err(ProviderError { unwell: true, ..failed("transient.http", Advice::SameModel) }));
    let orchestrator = orchestrator(&[candidate("gemini", "m")], &[Arc::clone(&stub)]);
    let bench = Bench::new();
    for n in 0..2 {
        let failure = orchestrator.call(&bench.ctx, &format!("k{n}"), request()).await.unwrap_err();
        assert_eq!(failure.code, "transient.http");
    }
    let failure = orchestrator.call(&bench.ctx, "k2", request()).await.unwrap_err();
    assert_eq!((failure.code.as_str(), stub.count()), ("transient.unavailable", 5));
    let failure = orchestrator.call(&bench.ctx, "k3", request()).await.unwrap_err();
    assert_eq!((failure.kind, failure.uncounted, stub.count()), (FailureKind::Retryable, true, 5));
    assert!((1..=30_000).contains(&failure.retry_after_ms.unwrap()));
    assert_eq!(bench.closed().len(), 5);
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
