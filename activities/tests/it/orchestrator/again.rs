//! What is asked again, of whom, and how often: each of it may be paid for.

use super::*;
use std::sync::atomic::{AtomicBool, Ordering};

/// As a server says it that has failed, with this status.
fn broke(status: u16) -> ProviderError {
    ProviderError { unwell: true, http_status: Some(status), ..failed("transient.http", Advice::SameModel) }
}

/// An answer of so many tokens: what is allowed less is cut there, and billed.
fn needing(tokens: u32) -> impl Fn(&Call<'_>, usize) -> Result<Completion, ProviderError> + Send + Sync {
    move |call, _| {
        if call.max_output_tokens >= tokens {
            return Ok(said("long"));
        }
        let usage = Usage { tokens_output: call.max_output_tokens.into(), ..Usage::default() };
        let error = ProviderError::new(Failure::retryable("model.truncated", "as ordered"), Advice::SameModel);
        Err(ProviderError { stream_completed: true, usage: Some(Box::new(usage)), ..error })
    }
}

fn limits(stub: &Stub) -> Vec<u32> {
    stub.calls.lock().unwrap().iter().map(|(_, _, limit)| *limit).collect()
}

#[tokio::test]
async fn a_question_that_a_server_always_fails_at_counts_once_many_others_were_answered() {
    let stub = Stub::new("gemini", |call, _| if call.key == "poison" { Err(broke(500)) } else { Ok(said("x")) });
    let orchestrator = orchestrator(&[candidate("gemini", "m")], &[Arc::clone(&stub)]);
    let recorder = Arc::default();
    let ask = |attempt: u32, key: &'static str| {
        let (orchestrator, bench) = (orchestrator.clone(), Bench::attempt(&recorder, attempt));
        async move { orchestrator.call(&bench.ctx, key, request()).await }
    };
    ask(1, "before").await.unwrap();
    for attempt in [1, 2] {
        let failure = ask(attempt, "poison").await.unwrap_err();
        assert_eq!((failure.code.as_str(), failure.uncounted), ("transient.http", true), "it may be an outage");
    }
    for other in ["1", "2", "3", "4", "5", "6", "7"] {
        ask(2, other).await.unwrap();
    }
    for attempt in 3..9 {
        ask(attempt, ["c", "d", "e", "f", "g", "h"][attempt as usize - 3]).await.unwrap();
        let failure = ask(attempt, "poison").await.unwrap_err();
        assert_eq!((failure.code.as_str(), failure.kind), ("transient.http", FailureKind::Retryable));
        assert!(!failure.uncounted, "attempt {attempt}: others are answered");
    }
    // Nobody else was turned away for it, and an outage that begins now is none of its doing.
    assert!(ask(9, "poison").await.unwrap_err().uncounted);
}

#[tokio::test]
async fn a_server_that_fails_at_every_second_question_of_everybody_is_waited_for() {
    // A brown-out: the unlucky one is answered when it is over.
    let over = Arc::new(AtomicBool::new(false));
    let healed = Arc::clone(&over);
    let stub = Stub::new("gemini", move |call, n| match call.key {
        "unlucky" if !healed.load(Ordering::SeqCst) => Err(broke(500)),
        "unlucky" => Ok(said("there")),
        _ if n % 2 == 0 && !healed.load(Ordering::SeqCst) => Err(broke(500)),
        _ => Ok(said("x")),
    });
    let orchestrator = orchestrator(&[candidate("gemini", "m")], &[stub]);
    let recorder = Arc::default();
    for attempt in 1..=20 {
        let bench = Bench::attempt(&recorder, attempt);
        let failure = orchestrator.call(&bench.ctx, "unlucky", request()).await.unwrap_err();
        assert!(failure.uncounted, "attempt {attempt}: {failure:?}");
        for other in 0..4 {
            // The first of its two tries fails.
            orchestrator.call(&bench.ctx, &format!("{attempt} {other}"), request()).await.unwrap();
        }
    }
    over.store(true, Ordering::SeqCst);
    let bench = Bench::attempt(&recorder, 21);
    assert_eq!(orchestrator.call(&bench.ctx, "unlucky", request()).await.unwrap().text, "there");
}

#[tokio::test]
async fn what_is_overloaded_is_waited_for_although_others_are_answered() {
    let stub = Stub::new("gemini", |call, _| if call.key == "unlucky" { Err(broke(503)) } else { Ok(said("x")) });
    let orchestrator = orchestrator(&[candidate("gemini", "m")], &[stub]);
    let recorder = Arc::default();
    for (attempt, other) in [(1, "a"), (2, "b"), (3, "c")] {
        let bench = Bench::attempt(&recorder, attempt);
        assert!(orchestrator.call(&bench.ctx, "unlucky", request()).await.unwrap_err().uncounted);
        orchestrator.call(&bench.ctx, other, request()).await.unwrap();
    }
}

#[tokio::test]
async fn one_who_asks_not_to_be_asked_again_does_not_end_the_wait_for_another() {
    let no = || ProviderError { counts: true, ..failed("transient.http", Advice::OtherModel) };
    let stub = Stub::new("gemini", move |_, _| Err(no()));
    let away = Stub::new("openrouter", |_, _| Err(broke(503)));
    let alone = orchestrator(&[candidate("gemini", "a")], &[Arc::clone(&stub)]);
    let failure = alone.call(&Bench::new().ctx, "plan", request()).await.unwrap_err();
    assert_eq!((failure.code.as_str(), failure.uncounted, stub.count()), ("transient.http", false, 1));
    let both = orchestrator(&[candidate("gemini", "a"), candidate("openrouter", "b")], &[stub, away]);
    assert!(both.call(&Bench::new().ctx, "plan", request()).await.unwrap_err().uncounted);
}

#[tokio::test]
async fn an_answer_that_is_cut_where_the_window_ends_it_is_bought_once() {
    let stub = Stub::new("gemini", needing(u32::MAX));
    let small = Candidate { context_tokens: 16_384, max_output_tokens: 12_000, ..candidate("gemini", "m") };
    let orchestrator = orchestrator(&[small], &[Arc::clone(&stub)]);
    let asked = Request { max_output_tokens: 12_000, ..request() };
    let failure = orchestrator.call(&Bench::new().ctx, "plan", asked).await.unwrap_err();
    assert_eq!((failure.code.as_str(), failure.uncounted), ("model.truncated", false));
    assert_eq!(limits(&stub), [8_192], "half the window is all that it gets");
}

#[tokio::test]
async fn an_answer_that_is_cut_gets_all_the_room_that_its_model_has() {
    let stub = Stub::new("gemini", needing(3_000));
    let orchestrator = orchestrator(&[candidate("gemini", "m")], &[Arc::clone(&stub)]);
    let bench = Bench::new();
    assert_eq!(orchestrator.call(&bench.ctx, "plan", request()).await.unwrap().text, "long");
    assert_eq!(limits(&stub), [1_000, 4_000]);
    assert_eq!(bench.closed().len(), 2);
}

#[tokio::test]
async fn an_answer_that_is_cut_with_all_the_room_there_is_is_bought_twice_at_most_however_many_attempts_there_are() {
    let gemini = Stub::new("gemini", needing(u32::MAX));
    let alone = orchestrator(&[candidate("gemini", "m")], &[Arc::clone(&gemini)]);
    let recorder = Arc::default();
    let ask = |orchestrator: &Orchestrator, attempt| {
        let (orchestrator, bench) = (orchestrator.clone(), Bench::attempt(&recorder, attempt));
        async move { orchestrator.call(&bench.ctx, "plan", request()).await }
    };
    let failure = ask(&alone, 1).await.unwrap_err();
    assert_eq!((failure.code.as_str(), failure.kind), ("model.truncated", FailureKind::Retryable));
    assert_eq!(limits(&gemini), [1_000, 4_000]);
    // It may have rambled. Nobody is asked with a limit that is known to be too small.
    let failure = ask(&alone, 2).await.unwrap_err();
    assert_eq!((failure.code.as_str(), failure.kind), ("model.truncated", FailureKind::Permanent));
    assert!(failure.message.contains("4000 tokens"), "{}", failure.message);
    assert_eq!(limits(&gemini), [1_000, 4_000, 4_000]);
    // Nor is anybody else, although the routing names more by now.
    let other = Stub::new("openrouter", needing(u32::MAX));
    let list = [candidate("gemini", "m"), candidate("openrouter", "n")];
    let both = orchestrator(&list, &[Arc::clone(&gemini), Arc::clone(&other)]);
    assert_eq!(ask(&both, 3).await.unwrap_err().kind, FailureKind::Permanent);
    assert_eq!((gemini.count(), other.count()), (3, 0));
    // Two that fill their room are enough as well, and each answer is booked.
    let bench = Bench::new();
    let failure = both.call(&bench.ctx, "plan", request()).await.unwrap_err();
    assert_eq!((failure.code.as_str(), failure.kind), ("model.truncated", FailureKind::Permanent));
    assert_eq!((gemini.count(), limits(&other)), (5, vec![4_000]));
    let closed = bench.closed();
    assert_eq!(closed.len(), 3);
    assert!(closed.iter().all(|(_, closed)| closed.usage.as_ref().is_some_and(|usage| usage.tokens_output > 0)));
    // A larger model gets what the others could not hold.
    let large = Stub::new("openrouter", needing(8_000));
    let roomy = Candidate { max_output_tokens: 16_000, context_tokens: 64_000, ..candidate("openrouter", "n") };
    let both = orchestrator(&[candidate("gemini", "m"), roomy], &[Arc::clone(&gemini), Arc::clone(&large)]);
    assert_eq!(both.call(&Bench::new().ctx, "plan", request()).await.unwrap().text, "long");
    assert_eq!(limits(&large), [16_000]);
}

#[tokio::test]
async fn a_fault_of_a_provider_is_not_looked_for_at_its_next_model() {
    let events = [Dialect::Gemini.text("a"), Dialect::Gemini.finish("MISSING_THOUGHT_SIGNATURE", None)];
    let server = FakeProvider::always(stream(&loopwright_activities::testing::frames(&events))).await;
    let other = Stub::new("openrouter", |_, _| Ok(said("there")));
    let list = [candidate("gemini", "a"), candidate("gemini", "b"), candidate("openrouter", "c")];
    let gemini = client(Dialect::Gemini, &server.base_of(Dialect::Gemini), Timeouts::default());
    let orchestrator = Orchestrator::with_pace(routing(&list), vec![gemini, other.clone() as Arc<dyn Provider>], QUICK);
    let reply = orchestrator.call(&Bench::new().ctx, "plan", request()).await.unwrap();
    assert_eq!((reply.provider.as_str(), server.seen().len(), other.count()), ("openrouter", 1, 1));
}

#[tokio::test]
async fn a_candidate_that_answers_badly_twice_is_left_for_the_next() {
    let bad = Stub::new("gemini", |_, _| Ok(said("no JSON today")));
    let good = Stub::new("openrouter", |call, _| {
        assert!(!call.key.ends_with("~repair"), "it has nothing to repair");
        Ok(said("{\"a\": 1}"))
    });
    let list = [candidate("gemini", "a"), candidate("openrouter", "b")];
    let orchestrator = orchestrator(&list, &[Arc::clone(&bad), Arc::clone(&good)]);
    let bench = Bench::new();
    let reply = orchestrator.call(&bench.ctx, "plan", with_schema()).await.unwrap();
    assert_eq!((reply.json, bad.count(), good.count()), (Some(json!({"a": 1})), 2, 1));
    assert_eq!(good.calls.lock().unwrap()[0].1, with_schema(), "the question as it was");
    assert_eq!(bench.closed().len(), 3);
}

#[tokio::test]
async fn the_attempt_that_carries_on_asks_nobody_who_has_answered_badly_twice() {
    let bad = Stub::new("gemini", |_, _| Ok(said("no JSON today")));
    // Its worker dies with its first answer; the one that carries on repairs it.
    let slow = Stub::new("openrouter", |call, n| match n {
        0 => Ok(said("{\"a\": \"one\"}")),
        1 => Err(failed("transient.http", Advice::Stop)),
        _ => {
            assert!(call.key.ends_with("~repair"));
            Ok(said("{\"a\": 1}"))
        }
    });
    let list = [candidate("gemini", "a"), candidate("openrouter", "b"), candidate("openrouter", "c")];
    let orchestrator = orchestrator(&list, &[Arc::clone(&bad), Arc::clone(&slow)]);
    let bench = Bench::new();
    orchestrator.call(&bench.ctx, "plan", with_schema()).await.unwrap_err();
    assert_eq!((bad.count(), slow.count()), (2, 2));
    let again = Bench::counted(&bench.recorder, 2, 1);
    let reply = orchestrator.call(&again.ctx, "plan", with_schema()).await.unwrap();
    assert_eq!((reply.json, bad.count(), slow.count()), (Some(json!({"a": 1})), 2, 3));
}

#[tokio::test]
async fn a_first_bad_answer_of_a_second_candidate_is_repaired_too() {
    // A answers badly and is away for its repair; B answers badly once.
    let a = Stub::new("gemini", |_, n| match n {
        0 => Ok(said("no JSON today")),
        _ => Err(failed("transient.http", Advice::OtherModel)),
    });
    let b = Stub::new("openrouter", |call, n| match n {
        0 => Ok(said("nor today")),
        _ => {
            let Some(Message::User { text }) = call.request.messages.last() else { panic!() };
            assert!(call.key.ends_with("~repair") && text.contains("cannot be used"));
            Ok(said("{\"a\": 1}"))
        }
    });
    let list = [candidate("gemini", "a"), candidate("openrouter", "b")];
    let orchestrator = orchestrator(&list, &[Arc::clone(&a), Arc::clone(&b)]);
    let reply = orchestrator.call(&Bench::new().ctx, "plan", with_schema()).await.unwrap();
    assert_eq!((reply.json, a.count(), b.count()), (Some(json!({"a": 1})), 2, 2));
}

#[tokio::test]
async fn only_keys_that_are_out_of_service_wait_for_the_operator() {
    for code in ["provider.key_invalid", "provider.no_balance"] {
        let out = Stub::new("gemini", move |_, _| Err(failed(code, Advice::DisableKey)));
        let list = [candidate("gemini", "a"), candidate("gemini", "b")];
        let alone = orchestrator(&list, &[Arc::clone(&out)]);
        for _ in 0..2 {
            let failure = alone.call(&Bench::new().ctx, "plan", request()).await.unwrap_err();
            assert_eq!((failure.code.as_str(), failure.kind), (code, FailureKind::Retryable));
            assert!(failure.uncounted && failure.retry_after_ms == Some(300_000), "{failure:?}");
        }
        assert_eq!(out.count(), 1, "asked once, remembered");
        // Somebody else was asked, and the answer is about the question.
        let declines = Stub::new("openrouter", |_, _| Err(failed("model.refused", Advice::OtherModel)));
        let list = [candidate("gemini", "a"), candidate("openrouter", "b")];
        let failure =
            orchestrator(&list, &[out, declines]).call(&Bench::new().ctx, "plan", request()).await.unwrap_err();
        assert_eq!((failure.kind, failure.uncounted), (FailureKind::Permanent, false));
    }
}
