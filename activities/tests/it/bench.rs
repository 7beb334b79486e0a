//! The set-up of the ledger's tests: one user with a project on a real Postgres, and the hook as the engine calls it.

use loopwright_activities::{
    MIGRATIONS,
    billing::{
        BillingSettings, LedgerHook, MicroCredits, audit,
        ledger::{self, GrantSource, Identity, LedgerError},
        purchase::{self, Payment},
    },
    usage::{CallClosed, CallOpened, CallState, PlannedCall, Reserve, Usage, UsageSource},
};
use loopwright_engine::{
    embedded::testing::database,
    hook::{AttemptEnd, AttemptRef, AttemptStart, Outcome, Phase, Reading, Transition, TransitionHook, Verdict},
    ids::{AttemptId, RunId},
};
use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, PgConnection, PgPool};
use std::sync::Arc;
use uuid::Uuid;

/// Stars of every order here.
pub(crate) const STARS: i32 = 250;

pub(crate) struct Bench {
    pub(crate) pool: PgPool,
    pub(crate) hook: LedgerHook,
    pub(crate) user: Uuid,
    pub(crate) project: Uuid,
}

/// The start of an attempt that plans so many calls of 1.44 credits.
pub(crate) fn planning(attempt: &AttemptRef, count: u32) -> AttemptStart {
    let call = PlannedCall {
        ceilings: Vec::new(),
        candidates: vec![model()],
        count,
        input_tokens: 1_000,
        output_tokens: 1_000,
    };
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

    /// As the engine does it: at once, or else in a transaction.
    pub(crate) async fn meter(&self, attempt: &AttemptRef, key: &str, phase: Phase, body: Value) -> Verdict {
        if self.at_once(attempt, key, phase, &body).await {
            return Verdict::Accepted;
        }
        self.in_transaction(attempt, key, phase, body).await
    }

    /// Whether the hook took the reading for ordinary and recorded it.
    pub(crate) async fn at_once(&self, attempt: &AttemptRef, key: &str, phase: Phase, body: &Value) -> bool {
        let Some(once) = self.hook.at_once(attempt, &Reading { key, phase, current: true, body }) else { return false };
        let sql = AssertSqlSafe(format!("select coalesce({}, false)", once.sql));
        sqlx::query_scalar_with(sql, once.arguments).fetch_one(&self.pool).await.expect("at once")
    }

    pub(crate) async fn in_transaction(&self, attempt: &AttemptRef, key: &str, phase: Phase, body: Value) -> Verdict {
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

    /// Somebody else, without credits.
    pub(crate) async fn another(&self, telegram_user_id: i64) -> Uuid {
        sqlx::query_scalar("insert into users (telegram_user_id) values ($1) returning id")
            .bind(telegram_user_id)
            .fetch_one(&self.pool)
            .await
            .expect("user")
    }

    /// An order of so many micro-credits for [`STARS`].
    pub(crate) async fn order(&self, payload: &str, credits_ucr: i64) {
        let mut conn = self.pool.acquire().await.expect("conn");
        order(&mut conn, self.user, payload, credits_ucr).await.expect("order");
    }

    /// Reports a payment of [`STARS`] for an order.
    pub(crate) async fn pay(&self, charge_id: &str, payload: &str) -> Result<Option<MicroCredits>, LedgerError> {
        let mut tx = self.pool.begin().await.expect("tx");
        let paid = purchase::purchase(&mut tx, self.user, &payment(charge_id, payload)).await;
        tx.commit().await.expect("commit");
        paid
    }

    /// An order of 50 credits, paid under this charge.
    pub(crate) async fn buy(&self, charge_id: &str) {
        self.order(charge_id, 50_000_000).await;
        assert_eq!(self.pay(charge_id, charge_id).await.expect("paid"), Some(MicroCredits(50_000_000)));
    }

    pub(crate) async fn balance(&self) -> (i64, i64) {
        let mut conn = self.pool.acquire().await.expect("conn");
        let balance = ledger::balance(&mut conn, self.user).await.expect("balance");
        (balance.balance.0, balance.held.0)
    }

    /// Waits until somebody waits for a lock of this database.
    pub(crate) async fn until_somebody_waits(&self) {
        let waits = "select exists (select from pg_stat_activity where wait_event_type = 'Lock' and datname = current_database())";
        while !sqlx::query_scalar::<_, bool>(waits).fetch_one(&self.pool).await.expect("activity") {
            tokio::task::yield_now().await;
        }
    }

    /// A price of [`model`] beside those that are shipped, in force since an early date. `umtok`: floor, input, output.
    pub(crate) async fn price(&self, effective_from: &str, umtok: [i64; 3]) {
        let (provider, model) = model();
        sqlx::query(
            "insert into model_pricing (provider, model_id, effective_from, min_prompt_tokens, input_umtok, output_umtok, source)
             values ($1, $2, $3::timestamptz, $4, $5, $6, 'test')",
        )
        .bind(provider)
        .bind(model)
        .bind(effective_from)
        .bind(umtok[0])
        .bind(umtok[1])
        .bind(umtok[2])
        .execute(&self.pool)
        .await
        .expect("price");
    }

    pub(crate) async fn violations(&self) -> Vec<&'static str> {
        let mut conn = self.pool.acquire().await.expect("conn");
        let mut names: Vec<_> = audit::run(&mut conn).await.expect("audit").into_iter().map(|v| v.invariant).collect();
        names.dedup();
        names
    }
}

/// An order of a user, in the caller's transaction.
pub(crate) async fn order(
    conn: &mut PgConnection,
    user: Uuid,
    payload: &str,
    credits_ucr: i64,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "insert into orders (payload, user_id, stars, credits_ucr, state, expires_at)
         values ($1, $2, $3, $4, 'open', engine_now() + interval '1 hour')",
    )
    .bind(payload)
    .bind(user)
    .bind(STARS)
    .bind(credits_ucr)
    .execute(conn)
    .await
    .map(drop)
}

pub(crate) fn payment<'a>(charge_id: &'a str, payload: &'a str) -> Payment<'a> {
    Payment { charge_id, payload, currency: "XTR", stars: STARS, recurring: false }
}

pub(crate) fn model() -> (String, String) {
    ("rehearsed".into(), "rehearsed/architect".into())
}

pub(crate) fn one_call() -> Reserve {
    Reserve {
        calls: vec![PlannedCall {
            ceilings: Vec::new(),
            candidates: vec![model()],
            count: 1,
            input_tokens: 1_000,
            output_tokens: 1_000,
        }],
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
    closing_with(state, usage)
}

pub(crate) fn closing_with(state: CallState, usage: Usage) -> Value {
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
