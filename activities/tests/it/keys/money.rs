//! What calls on own keys, and on the platform's in their place, cost.

use super::{SECRET, new_key, ring, user};
use loopwright_activities::{
    MIGRATIONS,
    billing::{BillingSettings, LedgerHook, MicroCredits, audit, ledger},
    keys::{Keys, NewKey},
    usage::{CallClosed, CallOpened, CallState, PlannedCall, Reserve, Usage, UsageSource},
};
use loopwright_engine::{
    embedded::testing::database,
    hook::{AttemptEnd, AttemptRef, AttemptStart, Outcome, Phase, Reading, Transition, TransitionHook, Verdict},
    ids::{AttemptId, RunId},
};
use serde_json::{Value, json};
use sqlx::PgPool;
use std::sync::Arc;
use uuid::Uuid;

struct Ledger {
    pool: PgPool,
    hook: LedgerHook,
}

impl Ledger {
    fn attempt(user: Uuid) -> AttemptRef {
        let run = RunId::new();
        AttemptRef {
            run_id: run,
            attempt_id: AttemptId::derive(run, "step", 1),
            activity: "work@1".into(),
            path: "step".into(),
            attempt: 1,
            attributes: Arc::new(json!({"user_id": user.to_string()})),
            budget: Arc::new(Value::Null),
            deadline: chrono::Utc::now() + chrono::Duration::minutes(20),
        }
    }
    /// Plans one call of 1.44 credits. The reason of a refusal.
    async fn start(&self, attempt: &AttemptRef) -> Option<String> {
        let calls = vec![PlannedCall {
            ceilings: Vec::new(),
            candidates: vec![("openai_compatible".into(), "m".into())],
            count: 1,
            input_tokens: 1_000,
            output_tokens: 1_000,
        }];
        let reserve = serde_json::to_value(Reserve { calls }).unwrap();
        let started = vec![AttemptStart { attempt: attempt.clone(), reserve }];
        self.apply(Transition { ord: 0, run_id: attempt.run_id, ended: vec![], started }).await
    }
    async fn end(&self, attempt: &AttemptRef) {
        let ended =
            vec![AttemptEnd { attempt: attempt.clone(), outcome: Outcome::Succeeded, failure: None, again: false }];
        assert_eq!(self.apply(Transition { ord: 0, run_id: attempt.run_id, ended, started: vec![] }).await, None);
    }
    async fn apply(&self, transition: Transition) -> Option<String> {
        let mut tx = self.pool.begin().await.unwrap();
        let refused = self.hook.apply(&mut tx, std::slice::from_ref(&transition)).await.map_err(|e| e.to_string());
        let refused = refused.unwrap().into_iter().next();
        if refused.is_none() {
            tx.commit().await.unwrap();
        }
        refused.map(|refusal| refusal.reason)
    }
    async fn meter(&self, attempt: &AttemptRef, key: &str, phase: Phase, body: Value) -> Verdict {
        let mut tx = self.pool.begin().await.unwrap();
        let reading = Reading { key, phase, body: &body, current: true };
        let verdict = self.hook.meter(&mut tx, attempt, reading).await.map_err(|e| e.to_string()).unwrap();
        tx.commit().await.unwrap();
        verdict
    }
    async fn violations(&self) -> Vec<&'static str> {
        let mut conn = self.pool.acquire().await.unwrap();
        audit::run(&mut conn).await.unwrap().into_iter().map(|violation| violation.invariant).collect()
    }
}

fn opening(key: &str, own: Option<Uuid>) -> Value {
    let identity = loopwright_activities::provider::KeyIdentity::of("openai_compatible", Some(&key.into()));
    serde_json::to_value(CallOpened {
        provider: "openai_compatible".into(),
        model: "m".into(),
        purpose: "plan".into(),
        request_sha256: "0".repeat(64),
        key_fingerprint: identity.fingerprint,
        key_last4: identity.last4,
        own_key_id: own,
        local: true,
        input_tokens_max: 1_000,
        output_tokens_max: 1_000,
        input_umtok_max: None,
        output_umtok_max: None,
    })
    .unwrap()
}

fn closing() -> Value {
    let usage = Usage {
        tokens_prompt: 1_000,
        tokens_output: 500,
        source: UsageSource::Provider,
        provider_cost_pusd: Some(7_000_000_000),
        ..Usage::default()
    };
    serde_json::to_value(CallClosed {
        state: CallState::Succeeded,
        model_served: Some("m".into()),
        provider_request_id: None,
        http_status: Some(200),
        error_class: None,
        finish_reason: Some("stop".into()),
        stream_completed: true,
        usage: Some(usage),
    })
    .unwrap()
}

#[tokio::test]
async fn a_call_on_an_own_key_is_booked_and_costs_nothing_even_without_credits() {
    let pool = database(MIGRATIONS).await;
    let (ann, bob) = (user(&pool, 1).await, user(&pool, 2).await);
    let keys = Keys::new(pool.clone(), Some(ring(&[("a", 1)])), true);
    let ledger = Ledger { pool: pool.clone(), hook: LedgerHook::new(BillingSettings::default()) };
    assert_eq!(ledger.start(&Ledger::attempt(ann)).await.as_deref(), Some("credits"), "without a key he has to pay");
    let new = NewKey {
        base_url: Some("http://127.0.0.1:9".into()),
        model: Some("m".into()),
        ..new_key("openai_compatible", SECRET)
    };
    let id = keys.put(ann, &new).await.unwrap().id;
    let attempt = Ledger::attempt(ann);
    assert_eq!(ledger.start(&attempt).await, None);
    let verdict = ledger.meter(&attempt, "a", Phase::Open, opening(SECRET, Some(id))).await;
    assert!(matches!(verdict, Verdict::Accepted), "{verdict:?}");
    ledger.meter(&attempt, "a", Phase::Close, closing()).await;
    // A key of the platform all the same needs credits; another's key is nobody's.
    let refused = ledger.meter(&attempt, "b", Phase::Open, opening("platform", None)).await;
    assert!(matches!(refused, Verdict::Refused { reason, .. } if reason == "credits"));
    let other = keys.put(bob, &new).await.unwrap().id;
    for (key, row) in [(SECRET, other), (SECRET, Uuid::now_v7()), ("sk-another", id)] {
        let refused = ledger.meter(&attempt, "c", Phase::Open, opening(key, Some(row))).await;
        assert!(matches!(refused, Verdict::Refused { reason, .. } if reason == "key_revoked"));
    }
    ledger.end(&attempt).await;
    let booked: (Uuid, String, i64, Option<i64>, Option<i64>) =
        sqlx::query_as("select api_key_id, state, cost_pusd, provider_cost_pusd, tokens_prompt from api_key_usage")
            .fetch_one(&pool)
            .await
            .unwrap();
    assert_eq!(booked, (id, "succeeded".into(), 0, Some(7_000_000_000), Some(1_000)));
    let rows: i64 = sqlx::query_scalar("select count(*) from credit_transactions").fetch_one(&pool).await.unwrap();
    assert_eq!(rows, 0, "nothing was held, nothing taken");
    assert_eq!(ledger.violations().await, [""; 0]);

    // The invariants still bite.
    for (invariant, sql) in [
        ("I18", "update api_key_usage set cost_pusd = 1"),
        ("I18", "update api_key_usage set cost_pusd = 0, user_id = (select id from users where telegram_user_id = 2)"),
        (
            "I8",
            "update api_keys set user_id = null, source = 'environment', ciphertext = null, nonce = null, wrapped_dek = null, kek_id = null where id in (select api_key_id from api_key_usage)",
        ),
    ] {
        sqlx::raw_sql(sql).execute(&pool).await.unwrap();
        assert!(ledger.violations().await.contains(&invariant), "{invariant}: {sql}");
    }
}

#[tokio::test]
async fn a_fallback_to_the_platform_is_held_and_charged_by_itself() {
    let pool = database(MIGRATIONS).await;
    let ann = user(&pool, 1).await;
    let mut tx = pool.begin().await.unwrap();
    ledger::grant(&mut tx, ann, ledger::GrantSource::Promo, "t", MicroCredits::from_credits(10), None).await.unwrap();
    tx.commit().await.unwrap();
    let keys = Keys::new(pool.clone(), Some(ring(&[("a", 1)])), true);
    let new = NewKey {
        base_url: Some("http://127.0.0.1:9".into()),
        model: Some("m".into()),
        ..new_key("openai_compatible", SECRET)
    };
    let id = keys.put(ann, &new).await.unwrap().id;
    let ledger = Ledger { pool: pool.clone(), hook: LedgerHook::new(BillingSettings::default()) };
    let attempt = Ledger::attempt(ann);
    ledger.start(&attempt).await;
    for (key, body) in
        [("a", opening(SECRET, Some(id))), ("b", opening("platform", None)), ("c", opening("platform", None))]
    {
        let verdict = ledger.meter(&attempt, key, Phase::Open, body).await;
        assert!(matches!(verdict, Verdict::Accepted), "{key} {verdict:?}");
        ledger.meter(&attempt, key, Phase::Close, closing()).await;
    }
    ledger.end(&attempt).await;
    let costs: Vec<i64> =
        sqlx::query_scalar("select cost_pusd from api_key_usage order by call_no").fetch_all(&pool).await.unwrap();
    assert_eq!(costs, [0, 7_000_000_000, 7_000_000_000]);
    assert_eq!(ledger.violations().await, [""; 0]);
    let held: i64 =
        sqlx::query_scalar("select credit_held_ucr from users where id = $1").bind(ann).fetch_one(&pool).await.unwrap();
    assert_eq!(held, 0);
}
