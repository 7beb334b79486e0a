//! What a user pays for beside good answers, and what he never does: answers that their model spoiled, models without a price, own keys.

use crate::bench::{Bench, CALL_UCR, closing, opening};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use loopwright_activities::{
    billing::{
        price::{self, Rows},
        report::{self, By, Span},
    },
    keys::{Keys, NewKey, Ring},
    provider::KeyIdentity,
    usage::{CallClosed, CallOpened, CallState, UsageSource},
};
use loopwright_engine::{
    hook::{Outcome, Phase, Verdict},
    ids::RunId,
};

/// A call that reports what it used, and how it ended; `finished`: with a finish reason.
fn ended(state: CallState, class: &str, source: UsageSource, output: u64, finished: bool) -> serde_json::Value {
    let mut closed: CallClosed =
        serde_json::from_value(closing(CallState::Succeeded, 1_000, output)).expect("a closing");
    closed.state = state;
    closed.error_class = Some(class.to_owned());
    closed.usage.as_mut().expect("usage").source = source;
    closed.stream_completed = finished;
    closed.finish_reason = finished.then(|| "stop".into());
    serde_json::to_value(closed).expect("json")
}

#[tokio::test]
async fn an_answer_that_its_model_spoiled_is_paid_and_one_that_its_provider_spoiled_is_not() {
    use CallState as S;
    use UsageSource as U;
    for (state, class, source, output, finished, paid) in [
        (S::Failed, "model.truncated", U::Provider, 100, true, CALL_UCR),
        (S::Failed, "model.output_invalid", U::Provider, 100, true, CALL_UCR),
        (S::Failed, "model.refused", U::Provider, 100, true, CALL_UCR),
        // Declined before a token came.
        (S::Failed, "model.refused", U::Provider, 0, true, 0),
        // The provider failed in mid-stream.
        (S::Failed, "transient.http", U::Provider, 100, true, 0),
        (S::Failed, "provider.bad_request", U::Provider, 100, true, 0),
        // Nobody but us says so.
        (S::Failed, "model.truncated", U::Estimated, 100, true, 0),
        (S::Unknown, "transient.network", U::Provider, 100, true, 0),
        (S::Unknown, "model.truncated", U::Provider, 100, true, 0),
        // A proxy has cut it: there are counts, and no finish reason.
        (S::Failed, "model.truncated", U::Provider, 100, false, 0),
    ] {
        let bench = Bench::new(100).await;
        let attempt = bench.attempt(RunId::new(), 1);
        bench.start(&attempt).await;
        bench.open(&attempt, "a.0", 100).await;
        bench.meter(&attempt, "a.0", Phase::Close, ended(state, class, source, output, finished)).await;
        bench.end_with(&attempt, Outcome::Failed, Some("workspace.git"), false).await;
        assert_eq!(bench.balance().await, (100_000_000 - paid, 0), "{state:?} {class} {source:?} {output} {finished}");
        let span = Span { from: None, to: None, user: Some(bench.user) };
        let mut conn = bench.pool.acquire().await.expect("conn");
        let shown = report::spent(&mut conn, By::Model, span).await.expect("report");
        assert_eq!(shown[0].credits, if paid > 0 { "0.36" } else { "0" }, "and is shown: {class}");
        assert_eq!(bench.violations().await, [""; 0], "{state:?} {class}");
    }
}

#[tokio::test]
async fn a_spoiled_answer_takes_its_part_of_hold_and_cap() {
    let bench = Bench::new(100).await;
    sqlx::query("update projects set budget_cap_ucr = 2000000").execute(&bench.pool).await.expect("cap");
    let attempt = bench.attempt(RunId::new(), 1);
    bench.start(&attempt).await;
    // 1.44 credits are held: for this call, and nothing of it is free again when it was cut.
    bench.open(&attempt, "a.0", 1_000).await;
    bench.cut(&attempt, "a.0", "model.truncated", 1_000, 1_000).await;
    let again = bench.open(&attempt, "a.1", 1_000).await;
    assert!(matches!(&again, Verdict::Refused { reason, .. } if reason == "cap"), "{again:?}");
    bench.end(&attempt, Outcome::Succeeded).await;
    assert_eq!(bench.balance().await, (100_000_000 - 1_440_000, 0), "also in an attempt that succeeded");
    assert_eq!(bench.violations().await, [""; 0]);
}

#[tokio::test]
async fn unusable_ends_are_given_back_by_rule_and_truncated_ones_are_not() {
    for (class, back) in [("model.output_invalid", CALL_UCR), ("model.truncated", 0)] {
        let bench = Bench::new(100).await;
        let attempt = bench.attempt(RunId::new(), 1);
        bench.start(&attempt).await;
        bench.open(&attempt, "a.0", 100).await;
        bench.cut(&attempt, "a.0", class, 1_000, 100).await;
        bench.end_with(&attempt, Outcome::Failed, Some(class), false).await;
        assert_eq!(bench.balance().await, (100_000_000 - CALL_UCR + back, 0), "{class}");
        assert_eq!(bench.violations().await, [""; 0]);
    }
}

fn call(provider: &str, model: &str, local: bool) -> CallOpened {
    let call: CallOpened = serde_json::from_value(opening(1_000)).expect("an opening");
    CallOpened { provider: provider.into(), model: model.into(), local, ..call }
}

#[tokio::test]
async fn the_price_for_every_model_counts_on_ones_own_server_only() {
    let bench = Bench::new(100).await;
    let attempt = bench.attempt(RunId::new(), 1);
    bench.start(&attempt).await;
    let announce = async |key: &str, call: CallOpened| {
        bench.meter(&attempt, key, Phase::Open, serde_json::to_value(call).expect("json")).await
    };
    let paid_service = announce("a.0", call("openai_compatible", "gpt-unheard-of", false)).await;
    let Verdict::Refused { reason, message } = paid_service else { panic!("sold at a guess") };
    assert_eq!(reason, "price_missing");
    assert!(message.contains("gpt-unheard-of") && message.contains("pricing import"), "{message}");
    let own_server = announce("a.1", call("openai_compatible", "tiny.gguf", true)).await;
    assert!(matches!(own_server, Verdict::Accepted), "{own_server:?}");
    // What an older process announces does not say where its server is.
    let mut silent = serde_json::to_value(call("openai_compatible", "gpt-unheard-of", true)).expect("json");
    silent.as_object_mut().expect("object").remove("local");
    let silent = bench.meter(&attempt, "a.2", Phase::Open, silent).await;
    assert!(matches!(silent, Verdict::Refused { .. }));
    // With a price of its own it is used, and priced by it.
    sqlx::query(
        "insert into model_pricing (provider, model_id, effective_from, input_umtok, output_umtok, source)
         values ('openai_compatible', 'gpt-unheard-of', '2026-01-02', 5000000, 20000000, 'operator')",
    )
    .execute(&bench.pool)
    .await
    .expect("price");
    let priced = announce("a.3", call("openai_compatible", "gpt-unheard-of", false)).await;
    assert!(matches!(priced, Verdict::Accepted), "{priced:?}");
    bench.close(&attempt, "a.1", CallState::Succeeded, 1_000, 100).await;
    bench.close(&attempt, "a.3", CallState::Succeeded, 1_000, 100).await;
    bench.end(&attempt, Outcome::Succeeded).await;
    let costs: Vec<i64> = sqlx::query_scalar("select cost_pusd from api_key_usage order by call_no")
        .fetch_all(&bench.pool)
        .await
        .expect("costs");
    assert_eq!(costs, [1_000 * 100_000 + 100 * 400_000, 1_000 * 5_000_000 + 100 * 20_000_000]);
    let mut conn = bench.pool.acquire().await.expect("conn");
    let own = price::find_among(&mut conn, Rows::Own, "openai_compatible", "tiny.gguf", 0, None).await;
    assert_eq!(own.expect("look"), None);
    let known = ("rehearsed".to_owned(), "rehearsed/utility".to_owned());
    let unknown = ("openai_compatible".to_owned(), "tiny.gguf".to_owned());
    let missing = price::missing(&bench.pool, [known, unknown.clone(), unknown.clone()]).await.expect("look");
    assert_eq!(missing.into_iter().collect::<Vec<_>>(), [unknown]);
    assert_eq!(bench.violations().await, [""; 0]);
}

#[tokio::test]
async fn an_own_key_needs_no_price_of_ours() {
    const SECRET: &str = "AIzaSyOwnKey0123456789";
    let bench = Bench::new(100).await;
    let ring = Ring::parse(&format!("a:{}", BASE64_STANDARD.encode([1; 32])).into()).expect("ring");
    let keys = Keys::new(bench.pool.clone(), Some(ring), false);
    let new = NewKey {
        provider: "gemini".into(),
        key: SECRET.into(),
        label: "mine".into(),
        base_url: None,
        model: None,
        platform_fallback: true,
    };
    let id = keys.put(bench.user, &new).await.expect("kept").id;
    let attempt = bench.attempt(RunId::new(), 1);
    assert_eq!(bench.start(&attempt).await, None);
    let identity = KeyIdentity::of("gemini", Some(&SECRET.into()));
    let unlisted = call("gemini", "gemini-of-tomorrow", false);
    let own = CallOpened { key_fingerprint: identity.fingerprint, own_key_id: Some(id), ..unlisted.clone() };
    let verdict = bench.meter(&attempt, "a.0", Phase::Open, serde_json::to_value(own).expect("json")).await;
    assert!(matches!(verdict, Verdict::Accepted), "{verdict:?}");
    bench.close(&attempt, "a.0", CallState::Succeeded, 1_000, 100).await;
    let platform = bench.meter(&attempt, "a.1", Phase::Open, serde_json::to_value(unlisted).expect("json")).await;
    assert!(matches!(platform, Verdict::Refused { reason, .. } if reason == "price_missing"), "never on our key");
    bench.end(&attempt, Outcome::Succeeded).await;
    let row: (String, i64, Option<i64>, Option<i64>) =
        sqlx::query_as("select state, cost_pusd, pricing_id, tokens_output from api_key_usage")
            .fetch_one(&bench.pool)
            .await
            .expect("one call");
    assert_eq!(row, ("succeeded".into(), 0, None, Some(100)), "booked, and not charged");
    assert_eq!(bench.balance().await, (100_000_000, 0));
    assert_eq!(bench.violations().await, [""; 0]);
}

#[tokio::test]
async fn a_candidate_above_its_ceiling_is_not_used() {
    let bench = Bench::new(100).await;
    let attempt = bench.attempt(RunId::new(), 1);
    bench.start(&attempt).await;
    // The architect costs 2 and 10 USD per million.
    for (ceiling, fits) in [(9_999_999, false), (10_000_000, true)] {
        let call =
            CallOpened { output_umtok_max: Some(ceiling), ..serde_json::from_value(opening(100)).expect("an opening") };
        let key = format!("a.{ceiling}");
        match bench.meter(&attempt, &key, Phase::Open, serde_json::to_value(call).expect("json")).await {
            Verdict::Accepted => assert!(fits, "{ceiling}"),
            Verdict::Refused { reason, message } => {
                assert_eq!((reason.as_str(), fits), ("price_above_ceiling", false));
                assert!(message.contains("ceiling"), "{message}");
            }
        }
    }
    let limits = price::limits(&bench.pool).await.expect("limits");
    assert_eq!(limits[&("gemini".into(), "gemini-2.5-pro".into())], (1_048_576, 65_536));
    assert!(!limits.keys().any(|(provider, _)| provider == "rehearsed"), "nobody has said");
}
