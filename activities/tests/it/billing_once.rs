//! What the ledger records of a call in one statement: the same as in a transaction, and nothing where something is to be decided.

use crate::bench::{Bench, closing, closing_with, opening, planning};
use loopwright_activities::usage::{CallClosed, CallState, Usage, UsageSource};
use loopwright_engine::{
    hook::{AttemptRef, Outcome, Phase, Verdict},
    ids::RunId,
};
use serde_json::{Value, json};

impl Bench {
    /// An attempt with room for twenty calls, and prices that are known because a first call was made.
    async fn under_way(&self) -> AttemptRef {
        let attempt = self.attempt(RunId::new(), 1);
        let started = vec![planning(&attempt, 20)];
        assert_eq!(self.transition(attempt.run_id, vec![], started).await, None);
        let key = "known";
        assert!(matches!(self.in_transaction(&attempt, key, Phase::Open, opening(100)).await, Verdict::Accepted));
        self.in_transaction(&attempt, key, Phase::Close, closing(CallState::Failed, 0, 0)).await;
        attempt
    }

    async fn rows_of(&self, attempt: &AttemptRef) -> Vec<Value> {
        let sql = "select to_jsonb(k) - '{id, attempt_id, started_at, finished_at}'::text[] from api_key_usage k where attempt_id = $1 order by call_no";
        sqlx::query_scalar(sql).bind(attempt.attempt_id.0).fetch_all(&self.pool).await.expect("rows")
    }
}

fn ends() -> Vec<Value> {
    let usage = Usage {
        tokens_prompt: 1_000,
        tokens_cached: 2_000,
        tokens_cache_write: 10,
        tokens_output: 100,
        tokens_reasoning: 500,
        source: UsageSource::Provider,
        ..Usage::default()
    };
    let failed = |code: &str, stream_completed: bool| {
        let closed = CallClosed {
            state: CallState::Failed,
            error_class: Some(code.into()),
            stream_completed,
            ..serde_json::from_value(closing_with(CallState::Succeeded, usage.clone())).expect("closing")
        };
        serde_json::to_value(closed).expect("json")
    };
    let named = CallClosed {
        model_served: Some("a\0b".into()),
        provider_request_id: None,
        http_status: None,
        ..serde_json::from_value(closing_with(CallState::Succeeded, usage.clone())).expect("closing")
    };
    let charged = Usage { provider_cost_pusd: Some(77), raw: json!({"cost": 0.1}), ..usage.clone() };
    let guessed = Usage { source: UsageSource::None, ..usage.clone() };
    vec![
        closing_with(CallState::Succeeded, usage.clone()),
        closing_with(CallState::Succeeded, charged),
        closing_with(CallState::Succeeded, guessed),
        closing(CallState::Failed, 0, 0),
        closing(CallState::Unknown, 0, 0),
        failed("model.truncated", true),
        failed("model.truncated", false),
        failed("transient.http", true),
        serde_json::to_value(named).expect("json"),
    ]
}

#[tokio::test]
async fn what_is_recorded_at_once_is_what_a_transaction_records() {
    let bench = Bench::new(1_000).await;
    let (quick, slow) = (bench.under_way().await, bench.under_way().await);
    for (n, end) in ends().into_iter().enumerate() {
        let key = format!("a.{n}");
        assert!(bench.at_once(&quick, &key, Phase::Open, &opening(500)).await, "{key}");
        bench.in_transaction(&slow, &key, Phase::Open, opening(500)).await;
        assert_eq!(bench.rows_of(&quick).await, bench.rows_of(&slow).await, "announced: {end}");
        assert!(bench.at_once(&quick, &key, Phase::Close, &end).await, "{end}");
        bench.in_transaction(&slow, &key, Phase::Close, end.clone()).await;
        assert_eq!(bench.rows_of(&quick).await, bench.rows_of(&slow).await, "{end}");
    }
    let charged = bench.rows_of(&quick).await.iter().filter(|row| row["cost_pusd"].as_i64() > Some(0)).count();
    assert_eq!(charged, 5, "four answers, and one that was cut at its limit");
    for attempt in [&quick, &slow] {
        bench.end(attempt, Outcome::Succeeded).await;
    }
    assert_eq!(bench.violations().await, [""; 0]);
}

#[tokio::test]
async fn where_something_is_to_be_decided_nothing_is_recorded_at_once() {
    let bench = Bench::new(1_000).await;
    let attempt = bench.under_way().await;
    let open = async |key: &str, tokens: u64| bench.at_once(&attempt, key, Phase::Open, &opening(tokens)).await;
    let close =
        async |key: &str| bench.at_once(&attempt, key, Phase::Close, &closing(CallState::Succeeded, 10, 10)).await;
    assert!(open("a.0", 500).await);
    assert!(!open("a.0", 500).await, "announced before");
    assert!(close("a.0").await);
    assert!(!close("a.0").await, "closed before");
    assert!(!open("a.0", 500).await, "made before");
    assert!(!open("a.1", 1_000_000).await, "more than is held");
    let mut other = opening(500);
    other["key_fingerprint"] = json!("22".repeat(32));
    assert!(!bench.at_once(&attempt, "a.2", Phase::Open, &other).await, "a key that nobody has seen");
    other["own_key_id"] = json!(uuid::Uuid::nil());
    assert!(!bench.at_once(&attempt, "a.2", Phase::Open, &other).await, "a key that is not his");
    let mut dear = opening(500);
    dear["output_umtok_max"] = json!(1);
    assert!(!bench.at_once(&attempt, "a.2", Phase::Open, &dear).await, "above its ceiling");
    // A price that is in force since, and a call that was announced before it was known.
    assert!(open("a.3", 500).await);
    bench.price("2026-01-02", [0, 4_000_000, 20_000_000]).await;
    assert!(!open("a.4", 500).await, "at a price of before");
    assert!(!close("a.3").await, "the same");
    bench.in_transaction(&attempt, "a.3", Phase::Close, closing(CallState::Succeeded, 10, 10)).await;
    assert!(matches!(bench.in_transaction(&attempt, "a.4", Phase::Open, opening(500)).await, Verdict::Accepted));
    assert!(close("a.4").await, "what the transaction has read is known");
    assert!(open("a.5", 500).await && open("a.6", 500).await);
    bench.end(&attempt, Outcome::Failed).await;
    assert!(!close("a.5").await && !open("a.7", 500).await, "the attempt has ended");
    let rows = bench.rows_of(&attempt).await;
    let states: Vec<_> = rows.iter().map(|row| row["state"].as_str().expect("text")).collect();
    assert_eq!(states, ["failed", "succeeded", "succeeded", "succeeded", "unknown", "unknown"]);
    // Only the price that was dated back by hand.
    assert_eq!(bench.violations().await, ["I13"]);
}

/// What is held is announced to the last micro-credit, and not one more: the same border as in a transaction.
#[tokio::test]
async fn a_call_that_just_fits_is_announced_at_once() {
    let bench = Bench::new(1_000).await;
    let attempt = bench.under_way().await;
    let held: i64 =
        sqlx::query_scalar("select sum(held_delta_ucr)::bigint from credit_transactions where attempt_id = $1")
            .bind(attempt.attempt_id.0)
            .fetch_one(&bench.pool)
            .await
            .expect("held");
    // 1,000 prompt tokens at 2 and the output at 10 USD per million, 120 credits per USD.
    let just = (u64::try_from(held).expect("positive") / 120 - 2_000) / 10;
    assert!(!bench.at_once(&attempt, "more", Phase::Open, &opening(just + 1)).await);
    assert!(bench.at_once(&attempt, "just", Phase::Open, &opening(just)).await);
    assert!(!bench.at_once(&attempt, "next", Phase::Open, &opening(1)).await);
    assert_eq!(bench.violations().await, [""; 0]);
}
