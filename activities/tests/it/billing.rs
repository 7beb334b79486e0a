//! Money on a real Postgres: holds, calls, settlements, caps. The rooms beside this one hold purchases, rules, corruptions, random
//! interleavings, the bugs that others shipped, and the reconciliation.

use loopwright_activities::{
    MIGRATIONS,
    billing::{
        BillingSettings, LedgerHook, MicroCredits, audit,
        ledger::{self, GrantSource, Identity},
    },
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

pub(crate) struct Bench {
    pub(crate) pool: PgPool,
    pub(crate) hook: LedgerHook,
    pub(crate) user: Uuid,
    pub(crate) project: Uuid,
}

/// The start of an attempt that plans so many calls of 1.44 credits.
pub(crate) fn planning(attempt: &AttemptRef, count: u32) -> AttemptStart {
    let call = PlannedCall { candidates: vec![model()], count, input_tokens: 1_000, output_tokens: 1_000 };
    let reserve = serde_json::to_value(Reserve { calls: vec![call] }).expect("json");
    AttemptStart { attempt: attempt.clone(), reserve }
}

impl Bench {
    pub(crate) async fn new(credits: i64) -> Self {
        let pool = database(MIGRATIONS).await;
        let settings = BillingSettings { welcome: MicroCredits::from_credits(credits), ..BillingSettings::default() };
        let mut tx = pool.begin().await.expect("tx");
        let (user, created) =
            ledger::ensure_user(&mut tx, &Identity::Telegram(42), settings.welcome).await.expect("user");
        assert!(created);
        let project: Uuid = sqlx::query_scalar("insert into projects (user_id, name) values ($1, 'p') returning id")
            .bind(user)
            .fetch_one(&mut *tx)
            .await
            .expect("project");
        tx.commit().await.expect("commit");
        Self { pool, hook: LedgerHook::new(settings), user, project }
    }

    pub(crate) fn attempt(&self, run: RunId, number: u32) -> AttemptRef {
        AttemptRef {
            run_id: run,
            attempt_id: AttemptId::derive(run, "step", number),
            activity: "work@1".into(),
            path: "step".into(),
            attempt: number,
            attributes: Arc::new(json!({"user_id": self.user.to_string(), "project_id": self.project.to_string()})),
            budget: Arc::new(json!({"credits": 50})),
            deadline: chrono::Utc::now() + chrono::Duration::minutes(20),
        }
    }

    /// An open run whose definition has that budget, below `parent`.
    pub(crate) async fn run(&self, budget: Value, parent: Option<RunId>) -> RunId {
        let run = RunId::new();
        sqlx::query(
            "with d as (insert into definitions (hash, name, version, format, source, bundle, ir)
                        values (sha256($1::text::bytea), $1::text, 1, 1, '', '{}', jsonb_build_object('budget', $3::jsonb)) returning hash)
             insert into runs (shard, run_id, workflow, definition, status, inputs, parent_shard, parent_run_id, parent_path)
             select $2, $1, $1::text, hash, 'running', '{}', $4, $5, 'c' from d",
        )
        .bind(run.0)
        .bind(run.shard())
        .bind(budget)
        .bind(parent.map(|p| p.shard()))
        .bind(parent.map(|p| p.0))
        .execute(&self.pool)
        .await
        .expect("run");
        run
    }

    /// Starts an attempt that plans one call. The reason of a refusal, if there was one.
    pub(crate) async fn start(&self, attempt: &AttemptRef) -> Option<String> {
        self.transition(attempt.run_id, vec![], vec![planning(attempt, 1)]).await
    }

    pub(crate) async fn end(&self, attempt: &AttemptRef, outcome: Outcome) {
        self.end_with(attempt, outcome, None, false).await;
    }

    /// With a failure code, and whether another attempt follows.
    pub(crate) async fn end_with(&self, attempt: &AttemptRef, outcome: Outcome, failure: Option<&str>, again: bool) {
        let failure = failure.map(str::to_owned);
        let end = AttemptEnd { attempt: attempt.clone(), outcome, failure, again };
        assert_eq!(self.transition(attempt.run_id, vec![end], vec![]).await, None);
    }

    /// As the engine does it: refused transitions are rolled back.
    pub(crate) async fn transition(
        &self,
        run_id: RunId,
        ended: Vec<AttemptEnd>,
        started: Vec<AttemptStart>,
    ) -> Option<String> {
        let mut tx = self.pool.begin().await.expect("tx");
        let transition = Transition { ord: 0, run_id, ended, started };
        let refused = match self.hook.apply(&mut tx, std::slice::from_ref(&transition)).await {
            Ok(refused) => refused,
            Err(error) => panic!("{error}"),
        };
        match refused.into_iter().next() {
            Some(refusal) => {
                tx.rollback().await.expect("rollback");
                Some(refusal.reason)
            }
            None => {
                tx.commit().await.expect("commit");
                None
            }
        }
    }

    pub(crate) async fn open(&self, attempt: &AttemptRef, key: &str, output_tokens: u64) -> Verdict {
        self.meter(attempt, key, Phase::Open, opening(output_tokens)).await
    }

    pub(crate) async fn close(&self, attempt: &AttemptRef, key: &str, state: CallState, prompt: u64, output: u64) {
        self.meter(attempt, key, Phase::Close, closing(state, prompt, output)).await;
    }

    /// A call that failed for a reason of the model's or the provider's, and reports what it used.
    pub(crate) async fn cut(&self, attempt: &AttemptRef, key: &str, code: &str, prompt: u64, output: u64) {
        let mut closed: CallClosed =
            serde_json::from_value(closing(CallState::Succeeded, prompt, output)).expect("closing");
        closed.state = CallState::Failed;
        closed.error_class = Some(code.into());
        self.meter(attempt, key, Phase::Close, serde_json::to_value(closed).expect("json")).await;
    }

    pub(crate) async fn meter(&self, attempt: &AttemptRef, key: &str, phase: Phase, body: Value) -> Verdict {
        let mut tx = self.pool.begin().await.expect("tx");
        let verdict =
            self.hook.meter(&mut tx, attempt, Reading { key, phase, current: true, body: &body }).await.expect("meter");
        match verdict {
            Verdict::Accepted => tx.commit().await.expect("commit"),
            Verdict::Refused { .. } => tx.rollback().await.expect("rollback"),
        }
        verdict
    }

    pub(crate) async fn grant(&self, reference: &str, credits: i64) -> bool {
        let mut tx = self.pool.begin().await.expect("tx");
        let done =
            ledger::grant(&mut tx, self.user, GrantSource::Promo, reference, MicroCredits::from_credits(credits), None)
                .await;
        tx.commit().await.expect("commit");
        done.expect("grant")
    }

    pub(crate) async fn balance(&self) -> (i64, i64) {
        let mut conn = self.pool.acquire().await.expect("conn");
        let balance = ledger::balance(&mut conn, self.user).await.expect("balance");
        (balance.balance.0, balance.held.0)
    }

    pub(crate) async fn violations(&self) -> Vec<&'static str> {
        let mut conn = self.pool.acquire().await.expect("conn");
        let mut names: Vec<_> = audit::run(&mut conn).await.expect("audit").into_iter().map(|v| v.invariant).collect();
        names.dedup();
        names
    }
}

pub(crate) fn model() -> (String, String) {
    ("rehearsed".into(), "rehearsed/architect".into())
}

pub(crate) fn one_call() -> Reserve {
    Reserve {
        calls: vec![PlannedCall { candidates: vec![model()], count: 1, input_tokens: 1_000, output_tokens: 1_000 }],
    }
}

pub(crate) fn opening(output_tokens: u64) -> Value {
    let (provider, model) = model();
    let call = CallOpened {
        provider,
        model,
        purpose: "test".into(),
        request_sha256: "00".repeat(32),
        key_fingerprint: "11".repeat(32),
        key_last4: "abcd".into(),
        own_key_id: None,
        local: false,
        input_tokens_max: 1_000,
        output_tokens_max: output_tokens,
        input_umtok_max: None,
        output_umtok_max: None,
    };
    serde_json::to_value(call).expect("json")
}

pub(crate) fn closing(state: CallState, prompt: u64, output: u64) -> Value {
    let usage =
        Usage { tokens_prompt: prompt, tokens_output: output, source: UsageSource::Provider, ..Usage::default() };
    let call = CallClosed {
        state,
        model_served: None,
        provider_request_id: Some("req-1".into()),
        http_status: Some(200),
        error_class: None,
        finish_reason: Some("stop".into()),
        stream_completed: true,
        usage: (state == CallState::Succeeded).then_some(usage),
    };
    serde_json::to_value(call).expect("json")
}

/// 1,000 prompt and 100 output tokens at 2 and 10 USD per million, 120 credits per USD.
pub(crate) const CALL_UCR: i64 = (1_000 * 2 + 100 * 10) * 120;

#[tokio::test]
async fn an_attempt_is_held_priced_and_captured_once() {
    let bench = Bench::new(100).await;
    let attempt = bench.attempt(RunId::new(), 1);
    assert_eq!(bench.start(&attempt).await, None);
    let (balance, held) = bench.balance().await;
    assert_eq!((balance, held), (100_000_000, (1_000 * 2 + 1_000 * 10) * 120));
    assert!(matches!(bench.open(&attempt, "a.0", 1_000).await, Verdict::Accepted));
    assert!(
        matches!(bench.open(&attempt, "a.0", 1_000).await, Verdict::Accepted),
        "the same call announced twice is one call"
    );
    bench.close(&attempt, "a.0", CallState::Succeeded, 1_000, 100).await;
    bench.close(&attempt, "a.0", CallState::Succeeded, 9_000, 900).await;
    bench.end(&attempt, Outcome::Succeeded).await;
    bench.end(&attempt, Outcome::Failed).await;
    assert_eq!(bench.balance().await, (100_000_000 - CALL_UCR, 0));
    assert_eq!(bench.violations().await, [""; 0]);
}

#[tokio::test]
async fn what_was_under_way_when_the_worker_died_is_unknown_and_free_even_when_it_is_reported_later() {
    let bench = Bench::new(100).await;
    let attempt = bench.attempt(RunId::new(), 1);
    bench.start(&attempt).await;
    bench.open(&attempt, "a.0", 100).await;
    bench.close(&attempt, "a.0", CallState::Succeeded, 1_000, 100).await;
    bench.open(&attempt, "a.1", 100).await;
    bench.end(&attempt, Outcome::Lost).await;
    assert_eq!(bench.balance().await, (100_000_000 - CALL_UCR, 0));
    bench.close(&attempt, "a.1", CallState::Succeeded, 5_000, 500).await;
    let row: (String, bool, i64, Option<i64>) =
        sqlx::query_as("select state, late, cost_pusd, tokens_prompt from api_key_usage where call_key = 'a.1'")
            .fetch_one(&bench.pool)
            .await
            .expect("row");
    assert_eq!(row, ("succeeded".into(), true, 0, Some(5_000)));
    assert_eq!(bench.balance().await, (100_000_000 - CALL_UCR, 0));
    assert!(
        matches!(bench.open(&attempt, "a.2", 100).await, Verdict::Refused { .. }),
        "an ended attempt makes no call"
    );
    assert_eq!(bench.violations().await, [""; 0]);
}

#[tokio::test]
async fn a_hold_grows_with_its_calls_until_credits_or_budget_end() {
    let bench = Bench::new(100).await;
    let attempt = bench.attempt(RunId::new(), 1);
    bench.start(&attempt).await;
    assert!(matches!(bench.open(&attempt, "a.0", 10_000).await, Verdict::Accepted));
    assert_eq!(bench.balance().await.1, (1_000 * 2 + 10_000 * 10) * 120);
    bench.close(&attempt, "a.0", CallState::Succeeded, 1_000, 10_000).await;
    let Verdict::Refused { reason, .. } = bench.open(&attempt, "a.1", 40_000).await else {
        panic!("beyond the run's budget of 50")
    };
    assert_eq!(reason, "budget.run");
    let Verdict::Refused { reason, .. } = bench.open(&attempt, "a.2", 4_000_000).await else {
        panic!("beyond all credits")
    };
    assert_eq!(reason, "credits");
    bench.end(&attempt, Outcome::Blocked).await;
    assert_eq!(bench.balance().await, (100_000_000 - (1_000 * 2 + 10_000 * 10) * 120, 0));
    assert_eq!(bench.violations().await, [""; 0]);
}

#[tokio::test]
async fn a_budget_pays_for_the_runs_below_its_run_too() {
    let bench = Bench::new(100).await;
    let root = bench.run(json!({"credits": 30}), None).await;
    let child = bench.run(Value::Null, Some(root)).await;
    let grandchild = bench.run(json!({"credits": 50}), Some(child)).await;
    let spend = async |run: RunId, number: u32, budget: Value| {
        let attempt = AttemptRef { budget: Arc::new(budget), ..bench.attempt(run, number) };
        assert_eq!(bench.start(&attempt).await, None);
        let verdict = bench.open(&attempt, "a.0", 10_000).await;
        bench.close(&attempt, "a.0", CallState::Succeeded, 1_000, 10_000).await;
        bench.end(&attempt, Outcome::Succeeded).await;
        verdict
    };
    let refused = |verdict: &Verdict| matches!(verdict, Verdict::Refused { reason, .. } if reason == "budget.run");
    // 12.24 credits each: two fit, wherever in the tree they are made.
    assert!(matches!(spend(root, 1, json!({"credits": 30})).await, Verdict::Accepted));
    assert!(matches!(spend(grandchild, 1, json!({"credits": 50})).await, Verdict::Accepted));
    for (run, budget) in [(root, json!({"credits": 30})), (child, Value::Null), (grandchild, json!({"credits": 50}))] {
        assert!(refused(&spend(run, 2, budget).await), "5.52 are left");
    }
    // A budget of its own is counted from its own run downwards: what others spent does not use it up.
    let sibling = bench.run(json!({"credits": 2}), Some(root)).await;
    let attempt = AttemptRef { budget: Arc::new(json!({"credits": 2})), ..bench.attempt(sibling, 1) };
    assert_eq!(bench.start(&attempt).await, None);
    assert!(refused(&bench.open(&attempt, "a.0", 1_500).await), "2 are the smaller budget");
    bench.end(&attempt, Outcome::Succeeded).await;
    let other = bench.run(json!({"credits": 30}), None).await;
    assert!(matches!(spend(other, 1, json!({"credits": 30})).await, Verdict::Accepted), "another tree");
    assert_eq!(bench.balance().await, (100_000_000 - 3 * (1_000 * 2 + 10_000 * 10) * 120, 0));
    assert_eq!(bench.violations().await, [""; 0]);
}

#[tokio::test]
async fn without_credits_nothing_starts_and_nothing_is_left_behind() {
    let bench = Bench::new(1).await;
    let attempt = bench.attempt(RunId::new(), 1);
    assert_eq!(bench.start(&attempt).await.as_deref(), Some("credits"));
    let rows: i64 =
        sqlx::query_scalar("select count(*) from activity_attempts").fetch_one(&bench.pool).await.expect("count");
    assert_eq!(rows, 0);
    assert!(bench.grant("t1", 10).await);
    assert!(!bench.grant("t1", 10).await, "a ticket is honored once");
    assert_eq!(bench.start(&attempt).await, None);
    assert_eq!(bench.violations().await, [""; 0]);
}

#[tokio::test]
async fn steps_that_start_together_leave_each_other_what_they_need() {
    let bench = Bench::new(5).await;
    let run = RunId::new();
    let (first, second) = (bench.attempt(run, 1), bench.attempt(run, 2));
    // Each would like to hold eight calls of 1.44 credits and needs one.
    let starts = vec![planning(&first, 8), planning(&second, 8)];
    assert_eq!(bench.transition(run, vec![], starts).await, None);
    assert_eq!(bench.balance().await, (5_000_000, 5_000_000));
    bench.end(&first, Outcome::Succeeded).await;
    assert_eq!(bench.balance().await.1, 1_440_000);
    bench.end(&second, Outcome::Succeeded).await;
    assert_eq!(bench.violations().await, [""; 0]);
}

#[tokio::test]
async fn a_budget_that_others_hold_is_waited_for_and_one_that_is_spent_is_not() {
    let bench = Bench::new(200).await;
    let run = RunId::new();
    let (first, second, third) = (bench.attempt(run, 1), bench.attempt(run, 2), bench.attempt(run, 3));
    assert_eq!(bench.transition(run, vec![], vec![planning(&first, 100)]).await, None);
    assert_eq!(bench.balance().await.1, 50_000_000, "all of the run's budget");
    assert_eq!(bench.start(&second).await.as_deref(), Some("budget"), "the first gives it back");
    bench.open(&first, "a.0", 40_000).await;
    bench.close(&first, "a.0", CallState::Succeeded, 1_000, 40_000).await;
    bench.end(&first, Outcome::Succeeded).await;
    assert_eq!(bench.start(&second).await, None);
    bench.end(&second, Outcome::Succeeded).await;
    let spent = bench.balance().await;
    assert_eq!(spent, (200_000_000 - 48_240_000, 0));
    // 1.76 are left of it; 2.88 are needed for a call of twice the size.
    let mut big = planning(&third, 1);
    big.reserve = serde_json::to_value(Reserve {
        calls: vec![PlannedCall { candidates: vec![model()], count: 1, input_tokens: 2_000, output_tokens: 2_000 }],
    })
    .expect("json");
    assert_eq!(bench.transition(run, vec![], vec![big]).await.as_deref(), Some("budget.run"));
    assert_eq!(bench.violations().await, [""; 0]);
}

#[tokio::test]
async fn a_model_without_a_price_is_not_used() {
    let bench = Bench::new(100).await;
    let attempt = bench.attempt(RunId::new(), 1);
    bench.start(&attempt).await;
    let call = CallOpened {
        provider: "gemini".into(),
        model: "gemini-unheard-of".into(),
        purpose: "test".into(),
        request_sha256: "00".repeat(32),
        key_fingerprint: "11".repeat(32),
        key_last4: String::new(),
        own_key_id: None,
        local: false,
        input_tokens_max: 1,
        output_tokens_max: 1,
        input_umtok_max: None,
        output_umtok_max: None,
    };
    let verdict = bench.meter(&attempt, "a.0", Phase::Open, serde_json::to_value(call).expect("json")).await;
    assert!(matches!(verdict, Verdict::Refused { reason, .. } if reason == "price_missing"));
}

#[tokio::test]
async fn the_welcome_is_given_once_however_many_ask_at_once() {
    let pool = database(MIGRATIONS).await;
    let welcome = MicroCredits::from_credits(5);
    let asks = (0..10).map(|_| {
        let pool = pool.clone();
        async move {
            let mut tx = pool.begin().await.expect("tx");
            let (user, _) = ledger::ensure_user(&mut tx, &Identity::Telegram(7), welcome).await.expect("user");
            tx.commit().await.expect("commit");
            user
        }
    });
    let users = futures_util::future::join_all(asks).await;
    assert!(users.iter().all(|u| *u == users[0]));
    let mut conn = pool.acquire().await.expect("conn");
    assert_eq!(ledger::balance(&mut conn, users[0]).await.expect("balance").balance, welcome);
}

#[tokio::test]
async fn the_ledger_cannot_be_rewritten() {
    let bench = Bench::new(1).await;
    for sql in [
        "update credit_transactions set amount_ucr = 1",
        "delete from credit_transactions",
        "update model_pricing set input_umtok = 0",
    ] {
        let error = sqlx::query(sql).execute(&bench.pool).await.expect_err("refused").to_string();
        assert!(error.contains("append-only"), "{error}");
    }
}
