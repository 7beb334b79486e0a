//! Prompts that are too long for a window.

use super::*;

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
