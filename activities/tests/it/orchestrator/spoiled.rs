//! Answers that a provider spoils: when they are bought again, and who is left alone meanwhile.

use super::*;
use chrono::{DateTime, TimeDelta, Utc};

/// A wait of a hundred seconds where a worker has one of one.
const SLOW: Pace = Pace { backoff: Duration::from_secs(100), wait_max: Duration::from_secs(30) };

fn lost() -> ProviderError {
    ProviderError { state: CallState::Unknown, ..failed("transient.network", Advice::SameModel) }
}

fn with(pace: Pace, candidates: &[Candidate], providers: &[&Arc<Stub>]) -> Orchestrator {
    let providers = providers.iter().map(|stub| Arc::clone(*stub) as Arc<dyn Provider>).collect();
    Orchestrator::with_pace(routing(candidates), providers, pace)
}

/// What an attempt before has recorded as the `n`-th spoiled answer of the call `plan`.
fn spoiled_before(recorder: &Recorder, n: u32, provider: &str, until: DateTime<Utc>) {
    let rest = json!({"keys": [provider, null], "until": until});
    recorder.checkpoints.lock().unwrap().insert(format!("call:plan~spoiled.{n}"), rest);
}

#[tokio::test]
async fn after_a_lost_answer_another_provider_may_be_asked_and_many_lost_answers_count() {
    let loses = Stub::new("gemini", |_, _| Err(lost()));
    let other = Stub::new("openrouter", |_, n| match n {
        0 => Ok(said("there")),
        _ => Err(failed("model.refused", Advice::OtherModel)),
    });
    let list = [candidate("gemini", "a"), candidate("gemini", "b"), candidate("openrouter", "c")];
    let orchestrator = orchestrator(&list, &[Arc::clone(&loses), Arc::clone(&other)]);
    let reply = orchestrator.call(&Bench::new().ctx, "plan", request()).await.unwrap();
    assert_eq!((reply.provider.as_str(), loses.count()), ("openrouter", 1));
    let recorder = Arc::default();
    for n in 1..=10 {
        let bench = Bench::attempt(&recorder, 1 + n);
        let failure = orchestrator.call(&bench.ctx, "other", request()).await.unwrap_err();
        assert!(failure.uncounted, "{n}");
        // 1 ms is a second here.
        let (wait, longest) = (failure.retry_after_ms.unwrap(), 2_u64.pow(n).min(600) * 11 / 8 + 1);
        assert!(wait <= longest, "{n} {failure:?}");
        tokio::time::sleep(Duration::from_millis(wait + 1)).await;
    }
    let late = orchestrator.call(&Bench::attempt(&recorder, 12).ctx, "other", request()).await.unwrap_err();
    assert_eq!((late.code.as_str(), late.uncounted, loses.count()), ("transient.network", false, 12));
}

#[tokio::test]
async fn who_spoils_answers_is_left_alone_while_others_are_asked() {
    let spoils = Stub::new("gemini", |_, _| Err(lost()));
    let rests = Stub::new("openrouter", |_, _| {
        let error = failed("transient.rate_limited", Advice::SameModel);
        Err(ProviderError { failure: error.failure.with_retry_after_ms(5), ..error })
    });
    let list = [candidate("gemini", "a"), candidate("openrouter", "b")];
    let (recorder, begun) = (Arc::default(), Instant::now());
    for n in 1..=40 {
        let bench = Bench::attempt(&recorder, n);
        // Another process each time.
        let orchestrator = orchestrator(&list, &[Arc::clone(&spoils), Arc::clone(&rests)]);
        let failure = orchestrator.call(&bench.ctx, "plan", request()).await.unwrap_err();
        if spoils.count() > 10 {
            // On a machine so slow that the time for ten is over.
            break;
        }
        // It is waited for whoever is free first.
        assert!(failure.uncounted && failure.retry_after_ms <= Some(6), "{n} {failure:?}");
    }
    // Each answer is bought only when the time behind the one before is over; 1 ms is a second here.
    let bought = u32::try_from(spoils.count()).unwrap();
    let left_alone: u64 = (1..bought).map(|n| 2_u64.pow(n).min(600)).sum();
    assert!(bought > 1 && u128::from(left_alone) <= begun.elapsed().as_millis(), "{bought} {:?}", begun.elapsed());
}

#[tokio::test]
async fn a_spoiled_answer_is_made_good_at_once_and_later_ones_are_bought_once_a_model() {
    let spoils = Stub::new("gemini", |_, _| {
        Err(ProviderError { unfinished: true, ..failed("transient.http", Advice::SameModel) })
    });
    let list = [candidate("gemini", "a"), candidate("gemini", "b")];
    let orchestrator = orchestrator(&list, &[Arc::clone(&spoils)]);
    let recorder: Arc<Recorder> = Arc::default();
    for (n, bought) in [(1, 3), (2, 5), (3, 7)] {
        let failure = orchestrator.call(&Bench::attempt(&recorder, n).ctx, "plan", request()).await.unwrap_err();
        assert_eq!((failure.uncounted, spoils.count()), (true, bought), "{failure:?}");
        tokio::time::sleep(Duration::from_millis(failure.retry_after_ms.unwrap() + 1)).await;
    }
    // A rest that is longer than any can be was written by a clock that is wrong.
    spoiled_before(&recorder, 7, "gemini", Utc::now() + TimeDelta::days(1));
    orchestrator.call(&Bench::attempt(&recorder, 4).ctx, "plan", request()).await.unwrap_err();
    assert_eq!(spoils.count(), 9);
}

#[tokio::test]
async fn attempts_that_count_are_not_used_up_while_somebody_rests() {
    let spoils = Stub::new("gemini", |_, _| Err(lost()));
    let unusable = Stub::new("openrouter", |_, _| {
        Err(ProviderError::new(Failure::retryable("model.output_invalid", "as ordered"), Advice::OtherModel))
    });
    let list = [candidate("gemini", "a"), candidate("openrouter", "b")];
    let orchestrator = with(SLOW, &list, &[&spoils, &unusable]);
    let failure = orchestrator.call(&Bench::new().ctx, "plan", request()).await.unwrap_err();
    assert_eq!((failure.code.as_str(), failure.uncounted), ("model.output_invalid", false));
    assert!(failure.retry_after_ms >= Some(200_000), "{failure:?}");
}

#[tokio::test]
async fn the_word_of_a_breaker_is_no_reason_to_ask_earlier_who_spoils_answers() {
    // Two models behind one key and its breaker, as shipped.
    let spoils = Stub::new("gemini", |_, _| {
        Err(ProviderError { unwell: true, unfinished: true, ..failed("transient.http", Advice::OtherModel) })
    });
    let list = [candidate("gemini", "a"), candidate("gemini", "b")];
    let orchestrator = with(SLOW, &list, &[&spoils]);
    // Each question is spoiled by both. The breaker opens with the fifth answer, and refuses the second model for 30 s.
    for (question, bought, least_s) in [("a", 2, 400), ("b", 4, 400), ("c", 5, 200)] {
        let failure = orchestrator.call(&Bench::new().ctx, question, request()).await.unwrap_err();
        assert_eq!((failure.uncounted, spoils.count()), (true, bought), "{failure:?}");
        assert!(failure.retry_after_ms >= Some(least_s * 1_000), "{question} {failure:?}");
    }
}

#[tokio::test]
async fn a_second_answer_that_was_cut_short_by_a_limit_is_not_asked_of_a_third_key() {
    let used = || Some(Box::new(Usage { tokens_prompt: 10, source: UsageSource::Provider, ..Usage::default() }));
    let busy = |key| {
        Stub::with_key("gemini", key, move |_, _| {
            Err(ProviderError { usage: used(), ..failed("transient.rate_limited", Advice::SameModel) })
        })
    };
    let keys = ['a', 'b', 'c'].map(busy);
    let orchestrator = with(QUICK, &[candidate("gemini", "m")], &keys.each_ref());
    let failure = orchestrator.call(&Bench::new().ctx, "plan", request()).await.unwrap_err();
    assert!(failure.uncounted, "{failure:?}");
    assert_eq!(keys.map(|stub| stub.count()), [1, 1, 0]);
}

#[tokio::test]
async fn an_attempt_that_was_billed_waits_for_all_who_rest() {
    let spoils = Stub::new("gemini", |_, _| Err(lost()));
    let billed = Stub::new("openrouter", |_, _| {
        let usage = Usage { tokens_prompt: 10, tokens_output: 3, source: UsageSource::Provider, ..Usage::default() };
        Err(ProviderError { usage: Some(Box::new(usage)), ..failed("model.refused", Advice::OtherModel) })
    });
    let busy = Stub::new("openai_compatible", |_, _| {
        let error = failed("transient.rate_limited", Advice::SameModel);
        Err(ProviderError { failure: error.failure.with_retry_after_ms(31_000), ..error })
    });
    let list = [candidate("gemini", "a"), candidate("openrouter", "b"), candidate("openai_compatible", "c")];
    let orchestrator = with(SLOW, &list, &[&spoils, &billed, &busy]);
    let failure = orchestrator.call(&Bench::new().ctx, "plan", request()).await.unwrap_err();
    assert_eq!((failure.code.as_str(), failure.uncounted), ("transient.rate_limited", false));
    assert!(failure.retry_after_ms >= Some(200_000), "{failure:?}");
}

#[tokio::test]
async fn an_attempt_that_counts_for_its_spoiled_answers_waits_for_all_who_rest() {
    let spoils = Stub::new("gemini", |_, _| Err(lost()));
    let other = Stub::new("openrouter", |_, _| Ok(said("there")));
    let orchestrator = with(SLOW, &[candidate("gemini", "a"), candidate("openrouter", "b")], &[&spoils, &other]);
    let bench = Bench::attempt(&Arc::default(), 11);
    let now = Utc::now();
    for n in 1..10 {
        spoiled_before(&bench.recorder, n, "gemini", now);
    }
    // Longer than what the eleventh answer can cost its provider.
    spoiled_before(&bench.recorder, 10, "openrouter", now + TimeDelta::seconds(89_000));
    let failure = orchestrator.call(&bench.ctx, "plan", request()).await.unwrap_err();
    assert_eq!((failure.uncounted, spoils.count(), other.count()), (false, 1, 0), "{failure:?}");
    assert!(failure.retry_after_ms >= Some(88_000_000), "{failure:?}");
}

#[tokio::test]
async fn who_is_not_cured_by_waiting_is_not_asked_again_and_again_while_another_is_waited_for() {
    let rests = Stub::new("gemini", |_, _| Ok(said("there")));
    let asks_not_to = Stub::new("openrouter", |_, _| {
        Err(ProviderError { counts: true, ..failed("transient.http", Advice::OtherModel) })
    });
    let orchestrator = with(SLOW, &[candidate("gemini", "a"), candidate("openrouter", "b")], &[&rests, &asks_not_to]);
    let bench = Bench::attempt(&Arc::default(), 2);
    spoiled_before(&bench.recorder, 1, "gemini", Utc::now() + TimeDelta::seconds(1_000));
    let failure = orchestrator.call(&bench.ctx, "plan", request()).await.unwrap_err();
    assert_eq!((failure.uncounted, rests.count(), asks_not_to.count()), (true, 0, 1), "{failure:?}");
    assert!(failure.retry_after_ms >= Some(900_000), "{failure:?}");
}

#[tokio::test]
async fn who_has_rested_while_another_answered_is_asked_in_the_same_attempt() {
    let until = Utc::now() + TimeDelta::milliseconds(800);
    let slow = Stub::new("gemini", move |_, _| {
        // Its answer takes until then.
        std::thread::sleep((until - Utc::now()).to_std().unwrap_or_default());
        Err(failed("model.refused", Advice::OtherModel))
    });
    let rested = Stub::new("openrouter", |_, _| Ok(said("there")));
    let orchestrator = with(QUICK, &[candidate("gemini", "a"), candidate("openrouter", "b")], &[&slow, &rested]);
    let bench = Bench::attempt(&Arc::default(), 2);
    spoiled_before(&bench.recorder, 1, "openrouter", until);
    assert_eq!(orchestrator.call(&bench.ctx, "plan", request()).await.unwrap().text, "there");
}
