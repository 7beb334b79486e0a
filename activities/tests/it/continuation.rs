//! Answers that Gemini gives in several calls: each is announced, recorded and paid by itself, none is bought twice, and what comes of
//! them is one answer.

use crate::provider::{PATIENT, client};
use loopwright_activities::{
    orchestrator::{Candidate, Message, Orchestrator, Pace, Question, Reply as Answered, Request, Role, Routing},
    provider::StructuredOutput,
    testing::{Answer, Dialect, FakeProvider, Fault, Reply, Seen, Told, When},
    usage::{CallClosed, CallOpened, CallState},
};
use loopwright_engine::{
    Failure,
    activity::{
        AttemptInfo,
        detached::{self, Recorder},
    },
};
use serde_json::{Value, json};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

const QUICK: Pace = Pace { backoff: Duration::from_millis(1), wait_max: Duration::from_secs(30) };
/// Parts that are continued, at most.
const PARTS_MAX: usize = 8;

struct Bench {
    fake: FakeProvider,
    recorder: Arc<Recorder>,
}

impl Bench {
    async fn new<A: Into<Answer>>(script: impl Fn(&Seen, usize) -> A + Send + Sync + 'static) -> Self {
        Self { fake: FakeProvider::serve(script).await, recorder: Arc::default() }
    }

    /// One call in attempt `attempt`, the `counted`-th that counts, by a process that knows nothing but the records.
    async fn ask(
        &self,
        attempt: u32,
        counted: u32,
        models: &[&str],
        schema: Option<Value>,
    ) -> Result<Answered, Failure> {
        let candidates = models.iter().map(|model| Candidate {
            provider: "gemini".into(),
            model: (*model).into(),
            context_tokens: 100_000,
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
        });
        let routing = Routing { roles: BTreeMap::from([(Role::Architect, candidates.collect())]) };
        let provider = client(Dialect::Gemini, &self.fake.base_of(Dialect::Gemini), PATIENT);
        let orchestrator = Orchestrator::with_pace(routing, vec![provider], QUICK);
        let info = AttemptInfo { attempt, counted, ..detached::info("plan@1", json!({})) };
        let ctx = detached::context(info, BTreeMap::new(), Arc::clone(&self.recorder));
        let request = Request {
            role: Role::Architect,
            purpose: "plan".into(),
            messages: vec![Message::User { text: "plan it".into() }],
            tools: vec![],
            output_schema: schema,
            max_output_tokens: 1_000,
        };
        orchestrator.call(&ctx, "plan", Question::from(request)).await
    }

    /// Readings by key; checks on the way that each was opened once and closed once.
    fn calls(&self) -> Vec<(String, CallOpened, CallClosed)> {
        let readings = self.recorder.readings.lock().unwrap();
        let mut open: BTreeMap<String, CallOpened> = BTreeMap::new();
        let (mut seen, mut calls) = (BTreeSet::new(), Vec::new());
        for (phase, key, body) in readings.iter() {
            if *phase == "open" {
                assert!(seen.insert(key.clone()), "{key} was used twice");
                open.insert(key.clone(), serde_json::from_value(body.clone()).unwrap());
            } else if *phase == "close" {
                let opened = open.remove(key).expect("open");
                calls.push((key.clone(), opened, serde_json::from_value(body.clone()).unwrap()));
            }
        }
        assert!(open.is_empty(), "left open: {open:?}");
        calls
    }

    /// Model and token of every question.
    fn asked(&self) -> Vec<(String, String)> {
        let token = |seen: &Seen| seen.body["continuationToken"].as_str().unwrap_or_default().to_owned();
        self.fake.seen().iter().map(|seen| (seen.model().unwrap(), token(seen))).collect()
    }
}

fn asked(list: &[(&str, &str)]) -> Vec<(String, String)> {
    list.iter().map(|(model, token)| ((*model).to_owned(), (*token).to_owned())).collect()
}

fn told(output: u64) -> Option<Told> {
    Some(Told { output, ..Told::default() })
}

/// `one`, `two`, `three` in three calls.
fn three(seen: &Seen) -> Reply {
    match seen.body["continuationToken"].as_str() {
        None => Reply::text("one, ").continued("t1").with_usage(told(5)),
        Some("t1") => Reply::text("two, ").continued("t2").with_usage(told(4)),
        _ => Reply::text("three").with_usage(told(3)),
    }
}

#[tokio::test]
async fn each_part_is_a_call_of_its_own_and_the_answer_is_one() {
    let bench = Bench::new(|seen, _| three(seen)).await;
    let reply = bench.ask(1, 1, &["m"], None).await.unwrap();
    assert_eq!((reply.text.as_str(), reply.tokens_prompt, reply.tokens_output), ("one, two, three", 33, 12));
    assert_eq!(bench.asked(), asked(&[("m", ""), ("m", "t1"), ("m", "t2")]));
    let calls = bench.calls();
    assert_eq!(calls.iter().map(|(key, ..)| key.as_str()).collect::<Vec<_>>(), ["plan.a1.0", "plan.a1.1", "plan.a1.2"]);
    let hashes: BTreeSet<_> = calls.iter().map(|(_, opened, _)| opened.request_sha256.as_str()).collect();
    assert_eq!(hashes.len(), 3, "each says what it asked");
    assert!(calls[0].1.input_tokens_max < calls[1].1.input_tokens_max, "what there is may be counted as its prompt");
    for ((_, _, closed), (reason, output)) in calls.iter().zip([("CONTINUATION", 5), ("CONTINUATION", 4), ("STOP", 3)])
    {
        assert_eq!((closed.state, closed.finish_reason.as_deref()), (CallState::Succeeded, Some(reason)));
        assert_eq!(closed.usage.as_ref().unwrap().tokens_output, output);
        assert!(closed.is_charged() && closed.error_class.is_none());
    }
    // What is recorded is the whole.
    let saved = bench.recorder.checkpoints.lock().unwrap()["call:plan"].clone();
    assert_eq!(saved["text"], "one, two, three");
    assert_eq!(bench.ask(2, 2, &["m"], None).await.unwrap(), reply);
    assert_eq!(bench.asked().len(), 3);
}

#[tokio::test]
async fn an_answer_in_parts_is_held_against_its_schema_as_a_whole() {
    let bench = Bench::new(|seen, _| match seen.body["continuationToken"].as_str() {
        None => Reply::text("{\"a\":").continued("t1"),
        Some(_) => Reply::text(" 1}"),
    })
    .await;
    let schema = json!({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]});
    let reply = bench.ask(1, 1, &["m"], Some(schema)).await.unwrap();
    assert_eq!((reply.json, bench.asked().len()), (Some(json!({"a": 1})), 2));
}

/// Waits as the engine does before the next attempt.
async fn as_told(failure: &Failure) {
    tokio::time::sleep(Duration::from_millis(failure.retry_after_ms.unwrap() + 1)).await;
}

#[tokio::test]
async fn after_the_death_of_its_worker_an_answer_goes_on_behind_its_last_part() {
    // The question, the first rest, and then a connection that breaks.
    let bench = Bench::new(|seen, _| three(seen)).await;
    bench.fake.inject(When::Nth(Dialect::Gemini, 2), Fault::ResetBeforeHeaders);
    let failure = bench.ask(1, 1, &["m"], None).await.unwrap_err();
    assert!(failure.code == "transient.network" && failure.uncounted, "{failure:?}");
    as_told(&failure).await;
    // The better candidate is there again: what has been paid of the other one's answer goes on all the same.
    let reply = bench.ask(2, 1, &["better", "m"], None).await.unwrap();
    assert_eq!((reply.text.as_str(), reply.tokens_output), ("one, two, three", 12));
    assert_eq!(bench.asked(), asked(&[("m", ""), ("m", "t1"), ("m", "t2"), ("m", "t2")]));
    let states: Vec<CallState> = bench.calls().iter().map(|(.., closed)| closed.state).collect();
    use CallState::{Succeeded, Unknown};
    assert_eq!(states, [Succeeded, Succeeded, Unknown, Succeeded]);
}

#[tokio::test]
async fn a_rest_that_fails_for_now_is_asked_for_once_more_with_its_token() {
    let bench = Bench::new(|seen, _| three(seen)).await;
    bench.fake.inject(When::Nth(Dialect::Gemini, 1), Fault::HtmlError);
    assert_eq!(bench.ask(1, 1, &["m"], None).await.unwrap().text, "one, two, three");
    assert_eq!(bench.asked(), asked(&[("m", ""), ("m", "t1"), ("m", "t1"), ("m", "t2")]));
}

#[tokio::test]
async fn a_token_that_is_not_taken_sends_the_question_from_its_beginning_once() {
    let bench = Bench::new(|seen, _| match seen.body["continuationToken"].as_str() {
        None => Answer::from(Reply::text("one").continued("t1")),
        Some(_) => Answer::error(Dialect::Gemini, 400, "INVALID_ARGUMENT"),
    })
    .await;
    let failure = bench.ask(1, 1, &["m"], None).await.unwrap_err();
    assert_eq!(failure.code, "provider.bad_request");
    assert_eq!(bench.asked(), asked(&[("m", ""), ("m", "t1"), ("m", ""), ("m", "t1")]));
    // The next attempt that counts begins at the beginning.
    bench.ask(2, 2, &["m"], None).await.unwrap_err();
    assert_eq!(bench.asked()[4], ("m".to_owned(), String::new()));
}

#[tokio::test]
async fn an_answer_without_an_end_is_given_up_after_eight_parts() {
    let endless = |seen: &Seen| match seen.model().as_deref() {
        Some("other") => Reply::text("done"),
        _ => Reply::text("and ").continued("more"),
    };
    let bench = Bench::new(move |seen, _| endless(seen)).await;
    let reply = bench.ask(1, 1, &["m", "other"], None).await.unwrap();
    assert_eq!(reply.text, "done");
    let calls = bench.calls();
    assert_eq!(calls.len(), 1 + PARTS_MAX + 1);
    let (_, _, last) = &calls[PARTS_MAX];
    assert_eq!((last.state, last.error_class.as_deref()), (CallState::Failed, Some("model.truncated")));
    assert!(last.is_charged(), "generated, and cut by a limit");

    // In an attempt that carries on for a lost one the parts of that one count.
    let bench = Bench::new(move |seen, _| endless(seen)).await;
    bench.fake.inject(When::Nth(Dialect::Gemini, 5), Fault::ResetBeforeHeaders);
    let failure = bench.ask(1, 1, &["m"], None).await.unwrap_err();
    assert!(failure.uncounted);
    as_told(&failure).await;
    assert_eq!(bench.ask(2, 1, &["m"], None).await.unwrap_err().code, "model.truncated");
    assert_eq!(bench.asked().len(), 1 + PARTS_MAX + 1, "and the one that was lost");
}
