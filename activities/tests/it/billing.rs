//! Money on a real Postgres: holds, calls, settlements, caps. The rooms beside this one hold purchases, rules, corruptions, random
//! interleavings, the bugs that others shipped, and the reconciliation.

use crate::bench::{Bench, CALL_UCR, closing_with, model, opening, planning};
use loopwright_activities::{
    MIGRATIONS,
    billing::{
        BillingSettings, LedgerHook, MicroCredits, Rate,
        ledger::{self, Identity},
    },
    usage::{CallOpened, CallState, PlannedCall, Reserve, Usage, UsageSource},
};
use loopwright_engine::{
    embedded::testing::database,
    hook::{AttemptRef, Outcome, Phase, Reading, TransitionHook, Verdict},
    ids::{AttemptId, RunId},
};
use serde_json::{Value, json};
use std::{collections::BTreeSet, sync::Arc};
use uuid::Uuid;

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

// Each call beyond the plan was a hold of its own.
#[tokio::test]
async fn many_calls_beyond_the_plan_extend_the_hold_a_few_times() {
    let bench = Bench::new(100).await;
    let attempt = bench.attempt(RunId::new(), 1);
    assert_eq!(bench.start(&attempt).await, None);
    let cap = 50_000_000;
    for n in 0..100 {
        let key = format!("a.{n}");
        assert!(matches!(bench.open(&attempt, &key, 100).await, Verdict::Accepted), "{n}");
        let held = bench.balance().await.1;
        assert!(held >= (n + 1) * CALL_UCR && held <= cap, "{n}: {held}");
        bench.close(&attempt, &key, CallState::Succeeded, 1_000, 100).await;
        assert_eq!(bench.violations().await.len(), 0, "{n}");
    }
    let holds: i64 = sqlx::query_scalar("select count(*) from credit_transactions where kind = 'hold'")
        .fetch_one(&bench.pool)
        .await
        .expect("count");
    assert!(holds <= 20, "{holds} holds for a hundred calls");
    // What was held ahead and not used is given back, to the last micro-credit.
    bench.end(&attempt, Outcome::Succeeded).await;
    assert_eq!(bench.balance().await, (100_000_000 - 100 * CALL_UCR, 0));
    assert_eq!(bench.violations().await, [""; 0]);
}

#[tokio::test]
async fn what_a_hold_takes_ahead_never_keeps_a_call_from_the_last_credits() {
    // Twelve calls fit, whatever was held ahead of them.
    let bench = Bench::new(0).await;
    bench.order("ord", 12 * CALL_UCR).await;
    bench.pay("c1", "ord").await.expect("paid");
    let attempt = bench.attempt(RunId::new(), 1);
    // Its plan is one call of that size.
    let mut start = planning(&attempt, 1);
    let call = PlannedCall {
        ceilings: Vec::new(),
        candidates: vec![model()],
        count: 1,
        input_tokens: 1_000,
        output_tokens: 100,
    };
    start.reserve = serde_json::to_value(Reserve { calls: vec![call] }).expect("json");
    assert_eq!(bench.transition(attempt.run_id, vec![], vec![start]).await, None);
    for n in 0..12 {
        let key = format!("a.{n}");
        assert!(matches!(bench.open(&attempt, &key, 100).await, Verdict::Accepted), "{n}");
        bench.close(&attempt, &key, CallState::Succeeded, 1_000, 100).await;
    }
    let verdict = bench.open(&attempt, "a.12", 100).await;
    assert!(matches!(&verdict, Verdict::Refused { reason, .. } if reason == "credits"), "{verdict:?}");
    bench.end(&attempt, Outcome::Blocked).await;
    assert_eq!(bench.balance().await, (0, 0));
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

/// Rows of `run_kin`: a run, the first of its chain, its parent.
async fn kin(bench: &Bench) -> BTreeSet<(Uuid, Option<Uuid>, Option<Uuid>)> {
    let rows = sqlx::query_as("select run_id, first_run_id, parent_run_id from run_kin");
    rows.fetch_all(&bench.pool).await.expect("rows").into_iter().collect()
}

#[tokio::test]
async fn what_a_family_has_spent_counts_when_its_database_is_migrated_and_while_an_older_release_works_on_it() {
    let bench = Bench::new(100).await;
    let budget = json!({"credits": 30});
    let root = bench.run(budget.clone(), None).await;
    let child = bench.run(Value::Null, Some(root)).await;
    let grandchild = bench.run(Value::Null, Some(child)).await;
    let next = bench.run(budget.clone(), None).await;
    let goes_on =
        sqlx::query("update runs set first_run_id = $3, continued_from = $3 where shard = $1 and run_id = $2");
    goes_on.bind(next.shard()).bind(next.0).bind(root.0).execute(&bench.pool).await.expect("a chain");
    let spend = async |run: RunId, number: u32| {
        let attempt = AttemptRef { budget: Arc::new(budget.clone()), ..bench.attempt(run, number) };
        assert_eq!(bench.start(&attempt).await, None);
        let verdict = bench.open(&attempt, "a.0", 10_000).await;
        bench.close(&attempt, "a.0", CallState::Succeeded, 1_000, 10_000).await;
        bench.end(&attempt, Outcome::Succeeded).await;
        verdict
    };
    // 12.24 credits each.
    for run in [grandchild, next] {
        assert!(matches!(spend(run, 1).await, Verdict::Accepted));
    }
    let noted = kin(&bench).await;
    assert_eq!(noted.len(), 3, "all but the root, which is alone: {noted:?}");
    // The schema of the release before, with the rows that are there.
    sqlx::raw_sql(
        "drop function note_kin cascade; drop table run_kin; alter table activity_attempts drop column kin_noted",
    )
    .execute(&bench.pool)
    .await
    .expect("undone");
    let again = MIGRATIONS.iter().find(|migration| migration.version == 32).expect("it is still there");
    let mut tx = bench.pool.begin().await.expect("tx");
    sqlx::raw_sql(again.sql).execute(&mut *tx).await.expect("migrated");
    tx.commit().await.expect("commit");
    assert_eq!(kin(&bench).await, noted);
    for run in [root, child, next] {
        let verdict = spend(run, 2).await;
        assert!(
            matches!(&verdict, Verdict::Refused { reason, .. } if reason == "budget.run"),
            "5.52 are left: {verdict:?}"
        );
    }
    // A worker of the release before starts an attempt in a run of which nothing is noted, and another.
    let top = bench.run(Value::Null, None).await;
    let middle = bench.run(Value::Null, Some(top)).await;
    let below = bench.run(Value::Null, Some(middle)).await;
    let mut tx = bench.pool.begin().await.expect("tx");
    for attempt in [1, 2] {
        sqlx::query(
            "insert into activity_attempts (id, run_id, path, activity, attempt_no, user_id, project_id, state, lease_expires_at)
             values ($1, $2, 'step', 'work@1', $3, $4, $5, 'running', engine_now())",
        )
        .bind(AttemptId::derive(below, "step", attempt).0)
        .bind(below.0)
        .bind(i32::try_from(attempt).expect("small"))
        .bind(bench.user)
        .bind(bench.project)
        .execute(&mut *tx)
        .await
        .expect("as the release before did it");
    }
    tx.commit().await.expect("commit");
    let more = BTreeSet::from([(middle.0, None, Some(top.0)), (below.0, None, Some(middle.0))]);
    assert_eq!(kin(&bench).await, noted.union(&more).copied().collect());
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
        calls: vec![PlannedCall {
            ceilings: Vec::new(),
            candidates: vec![model()],
            count: 1,
            input_tokens: 2_000,
            output_tokens: 2_000,
        }],
    })
    .expect("json");
    assert_eq!(bench.transition(run, vec![], vec![big]).await.as_deref(), Some("budget.run"));
    assert_eq!(bench.violations().await, [""; 0]);
}

#[tokio::test]
async fn a_candidate_above_its_ceiling_is_not_held_for() {
    let bench = Bench::new(200).await;
    let mut held = Vec::new();
    for ceilings in [vec![], vec![(None, Some(u64::MAX))], vec![(Some(1), None)]] {
        let attempt = bench.attempt(RunId::new(), 1);
        let mut start = planning(&attempt, 1);
        let call =
            PlannedCall { ceilings, candidates: vec![model()], count: 1, input_tokens: 2_000, output_tokens: 2_000 };
        start.reserve = serde_json::to_value(Reserve { calls: vec![call] }).expect("json");
        assert_eq!(bench.transition(attempt.run_id, vec![], vec![start]).await, None);
        held.push(bench.balance().await.1);
        bench.end(&attempt, Outcome::Succeeded).await;
    }
    // What nobody will be asked for is held by nobody, but for what every attempt holds.
    assert_eq!((held[0], held[1], held[2]), (2_880_000, 2_880_000, 10_000));
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
        "truncate credit_transactions cascade",
        "truncate model_pricing cascade",
        "truncate refund_rules",
        "truncate project_records",
        "truncate spending_limits",
    ] {
        let error = sqlx::query(sql).execute(&bench.pool).await.expect_err("refused").to_string();
        assert!(error.contains("append-only"), "{error}");
    }
}

#[tokio::test]
async fn no_constraint_is_left_unchecked_over_rows_of_before() {
    let before: Vec<_> = MIGRATIONS.iter().filter(|migration| migration.version < 24).copied().collect();
    let pool = database(&before).await;
    sqlx::raw_sql(
        "with u as (insert into users (telegram_user_id) values (1) returning id),
              o as (insert into orders (payload, user_id, stars, credits_ucr, state, expires_at)
                    select 'o', id, 1, 1, 'paid', engine_now() from u returning id, user_id)
         insert into payments (charge_id, order_id, user_id, stars, refund_state)
         select state, o.id, o.user_id, 1, state from o, unnest(array['none','requested','done','chargeback']) state",
    )
    .execute(&pool)
    .await
    .expect("rows of the release before");
    let unchecked = async || -> Vec<String> {
        sqlx::query_scalar("select conname::text from pg_constraint where not convalidated order by 1")
            .fetch_all(&pool)
            .await
            .expect("constraints")
    };
    assert_eq!(unchecked().await, ["payments_refund_state_check", "users_holds_stopped_check"]);
    loopwright_engine::migrate::run(&pool, MIGRATIONS).await.expect("migrated");
    assert_eq!(unchecked().await, [""; 0]);
}

// A process that was started with another rate went on with the attempt and held too little.
#[tokio::test]
async fn an_attempt_keeps_the_rate_that_its_user_agreed_to() {
    let bench = Bench::new(100).await;
    let attempt = bench.attempt(RunId::new(), 1);
    assert_eq!(bench.start(&attempt).await, None);
    let rate = Rate { credits_per_usd: 10, markup_bps: 0 };
    let other = LedgerHook::new(BillingSettings { rate, ..BillingSettings::default() });
    let mut tx = bench.pool.begin().await.expect("tx");
    let body = opening(10_000);
    let reading = Reading { key: "a.0", phase: Phase::Open, current: true, body: &body };
    let verdict = other.meter(&mut tx, &attempt, reading).await.expect("meter");
    tx.commit().await.expect("commit");
    assert!(matches!(verdict, Verdict::Accepted), "{verdict:?}");
    let whole = (1_000 * 2 + 10_000 * 10) * 120;
    assert_eq!(bench.balance().await.1, whole);
    bench.close(&attempt, "a.0", CallState::Succeeded, 1_000, 10_000).await;
    bench.end(&attempt, Outcome::Succeeded).await;
    assert_eq!(bench.balance().await, (100_000_000 - whole, 0), "nothing is uncollected");
    let rates: Vec<(i64, i32)> =
        sqlx::query_as("select distinct rate_credits_per_usd, markup_bps from credit_transactions where kind = 'hold'")
            .fetch_all(&bench.pool)
            .await
            .expect("rates");
    assert_eq!(rates, [(100, 2_000)]);
    assert_eq!(bench.violations().await, [""; 0]);
}

#[tokio::test]
async fn a_hold_covers_the_dearest_price_that_a_call_can_meet() {
    let bench = Bench::new(100).await;
    // Large prompts are cheaper than small ones: the dearest call is not the largest.
    bench.price("2026-01-02", [0, 4_000_000, 10_000_000]).await;
    bench.price("2026-01-02", [500, 1_000_000, 10_000_000]).await;
    let attempt = bench.attempt(RunId::new(), 1);
    assert_eq!(bench.start(&attempt).await, None);
    let dearest = (500 * 4 + 1_000 * 10) * 120;
    assert_eq!(bench.balance().await.1, dearest);
    assert!(matches!(bench.open(&attempt, "a.0", 1_000).await, Verdict::Accepted));
    bench.close(&attempt, "a.0", CallState::Succeeded, 500, 1_000).await;
    bench.end(&attempt, Outcome::Succeeded).await;
    assert_eq!(bench.balance().await, (100_000_000 - dearest, 0));
    let uncollected: i64 = sqlx::query_scalar("select sum(uncollected_ucr)::bigint from credit_transactions")
        .fetch_one(&bench.pool)
        .await
        .expect("sum");
    assert_eq!(uncollected, 0);
    assert_eq!(bench.violations().await, [""; 0]);
}

// By hand anything can be written: a date that leaves small prompts out, which the price of before served and the audit then
// found, and a price that nobody charges, for which a run would have waited for ever.
#[tokio::test]
async fn a_price_with_a_gap_or_that_nobody_charges_is_no_price() {
    for umtok in [[200_000, 4_000_000, 10_000_000], [0, i64::MAX, 10_000_000], [0, 1, 10_000_000_001]] {
        let bench = Bench::new(100).await;
        let attempt = bench.attempt(RunId::new(), 1);
        assert_eq!(bench.start(&attempt).await, None);
        bench.price("2026-01-02", umtok).await;
        let verdict = bench.open(&attempt, "a.0", 100).await;
        assert!(
            matches!(&verdict, Verdict::Refused { reason, .. } if reason == "price_missing"),
            "{umtok:?} {verdict:?}"
        );
        bench.end(&attempt, Outcome::Failed).await;
        assert_eq!(bench.balance().await, (100_000_000, 0));
        let another = bench.attempt(RunId::new(), 1);
        assert_eq!(bench.start(&another).await, None);
        assert_eq!(bench.balance().await.1, 10_000, "nothing of it can be called, so the least is held");
        bench.end(&another, Outcome::Failed).await;
        assert_eq!(bench.violations().await, [""; 0], "{umtok:?}");
    }
}

// The audit would have stopped the user for it.
#[tokio::test]
async fn parts_of_a_prompt_that_exceed_it_are_stored_as_they_are_priced() {
    let bench = Bench::new(100).await;
    let attempt = bench.attempt(RunId::new(), 1);
    bench.start(&attempt).await;
    bench.open(&attempt, "a.0", 1_000).await;
    let usage = Usage {
        tokens_prompt: 100,
        tokens_cached: 80,
        tokens_cache_write: 50,
        tokens_output: 10,
        tokens_reasoning: 70,
        source: UsageSource::Provider,
        ..Usage::default()
    };
    bench.meter(&attempt, "a.0", Phase::Close, closing_with(CallState::Succeeded, usage)).await;
    let parts: (i64, i64, i64, i64) =
        sqlx::query_as("select tokens_prompt, tokens_cached, tokens_cache_write, tokens_reasoning from api_key_usage")
            .fetch_one(&bench.pool)
            .await
            .expect("row");
    assert_eq!(parts, (100, 80, 20, 10));
    bench.end(&attempt, Outcome::Succeeded).await;
    assert_eq!(bench.violations().await, [""; 0]);
}

// A statement does not see the row that another one has made since it began: the second call failed.
#[tokio::test]
async fn two_workers_that_meet_a_key_first_at_once_both_make_their_calls() {
    let bench = Bench::new(100).await;
    let other = bench.another(43).await;
    let mut conn = bench.pool.acquire().await.expect("conn");
    let credits = MicroCredits::from_credits(100);
    ledger::grant(&mut conn, other, ledger::GrantSource::Promo, "o", credits, None).await.expect("grant");
    drop(conn);
    let one = bench.attempt(RunId::new(), 1);
    let attributes = Arc::new(json!({"user_id": other.to_string()}));
    let two = AttemptRef { attributes, ..bench.attempt(RunId::new(), 1) };
    for attempt in [&one, &two] {
        assert_eq!(bench.start(attempt).await, None);
    }
    let body = opening(100);
    let reading = || Reading { key: "a.0", phase: Phase::Open, current: true, body: &body };
    let mut first = bench.pool.begin().await.expect("tx");
    assert!(matches!(bench.hook.meter(&mut first, &one, reading()).await.expect("meter"), Verdict::Accepted));
    let late = async {
        let mut second = bench.pool.begin().await.expect("tx");
        let verdict = bench.hook.meter(&mut second, &two, reading()).await.expect("the row is there now");
        second.commit().await.expect("commit");
        verdict
    };
    let commit = async {
        bench.until_somebody_waits().await;
        first.commit().await.expect("commit");
    };
    let (verdict, ()) = tokio::join!(late, commit);
    assert!(matches!(verdict, Verdict::Accepted), "{verdict:?}");
    let keys: i64 = sqlx::query_scalar("select count(*) from api_keys").fetch_one(&bench.pool).await.expect("keys");
    assert_eq!(keys, 1);
}
