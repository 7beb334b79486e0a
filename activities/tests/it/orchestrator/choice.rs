//! Which candidate is asked: by its tasks, by what it can do, by how it has been.

use super::*;

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
