//! What work may cost: forecasts beside what it cost, and approved sums that are not exceeded.

use crate::bench::{Bench, CALL_UCR};
use loopwright_activities::{
    billing::{
        MicroCredits, Rate,
        forecast::{self, Work},
        limit::{self, Limit},
    },
    usage::{CallState, PlannedCall},
};
use loopwright_engine::{
    hook::{AttemptRef, Outcome, Verdict},
    ids::{AttemptId, RunId},
};
use serde_json::json;

/// What the hold of an attempt takes that plans one call.
const HOLD_UCR: i64 = (1_000 * 2 + 1_000 * 10) * 120;
const RATE: Rate = Rate { credits_per_usd: 100, markup_bps: 2_000 };

async fn set(bench: &Bench, run: RunId, key: &str, ucr: i64) -> Limit {
    let mut tx = bench.pool.begin().await.expect("tx");
    let limit = limit::set(&mut tx, bench.user, run.0, key, MicroCredits(ucr), "test").await.expect("limit");
    tx.commit().await.expect("commit");
    limit
}

async fn raise(bench: &Bench, run: RunId, key: &str, ucr: i64) -> Option<Limit> {
    let mut tx = bench.pool.begin().await.expect("tx");
    let limit = limit::raise(&mut tx, bench.user, run.0, key, MicroCredits(ucr), "test").await.expect("limit");
    tx.commit().await.expect("commit");
    limit
}

async fn in_force(bench: &Bench, run: RunId) -> Option<Limit> {
    limit::in_force(&mut bench.pool.acquire().await.expect("conn"), run.0).await.expect("limit")
}

/// An attempt that makes one call of [`CALL_UCR`].
async fn spend(bench: &Bench, attempt: &AttemptRef) {
    assert_eq!(bench.start(attempt).await, None, "{}", attempt.path);
    assert!(matches!(bench.open(attempt, "a.0", 1_000).await, Verdict::Accepted));
    bench.close(attempt, "a.0", CallState::Succeeded, 1_000, 100).await;
    bench.end(attempt, Outcome::Succeeded).await;
}

fn at(bench: &Bench, run: RunId, activity: &str, path: &str) -> AttemptRef {
    let attempt = bench.attempt(run, 1);
    AttemptRef { attempt_id: AttemptId::derive(run, path, 1), activity: activity.into(), path: path.into(), ..attempt }
}

#[tokio::test]
async fn what_was_approved_is_not_exceeded_and_more_can_be_allowed() {
    let bench = Bench::new(100).await;
    let run = bench.run(json!({}), None).await;
    assert_eq!(raise(&bench, run, "early", 1).await, None, "there is nothing to raise");
    spend(&bench, &bench.attempt(run, 1)).await;

    // What was spent before is not part of what was approved.
    let limit = set(&bench, run, "limit", HOLD_UCR + CALL_UCR).await;
    assert_eq!((limit.cap.0, limit.left.0), (HOLD_UCR + 2 * CALL_UCR, HOLD_UCR + CALL_UCR));
    let second = bench.attempt(run, 2);
    assert_eq!(bench.start(&second).await, None);
    assert!(matches!(bench.open(&second, "a.0", 1_000).await, Verdict::Accepted));
    bench.close(&second, "a.0", CallState::Succeeded, 1_000, 100).await;
    // Its sibling would not fit beside its hold; that comes back by itself, so it waits for that.
    assert_eq!(bench.start(&bench.attempt(run, 3)).await.as_deref(), Some("budget"));
    let Verdict::Refused { reason, .. } = bench.open(&second, "a.1", 9_000).await else { panic!("beyond the limit") };
    assert_eq!(reason, limit::LIMIT, "nobody else holds a part of it");
    bench.end(&second, Outcome::Succeeded).await;
    assert_eq!(in_force(&bench, run).await.expect("limit").left.0, HOLD_UCR);

    spend(&bench, &bench.attempt(run, 3)).await;
    assert_eq!(bench.start(&bench.attempt(run, 4)).await.as_deref(), Some(limit::LIMIT));

    // The same step, executed again after a crash, approves nothing anew; a request repeated raises once.
    set(&bench, run, "limit", 50_000_000).await;
    for _ in 0..2 {
        let limit = raise(&bench, run, "rest:1", CALL_UCR).await.expect("limit");
        assert_eq!((limit.cap.0, limit.left.0), (HOLD_UCR + 3 * CALL_UCR, HOLD_UCR));
    }
    spend(&bench, &bench.attempt(run, 4)).await;
    assert_eq!(bench.start(&bench.attempt(run, 5)).await.as_deref(), Some(limit::LIMIT));
    assert_eq!(bench.violations().await, [""; 0]);
}

#[tokio::test]
async fn a_limit_holds_for_the_runs_below_and_passes_to_forks() {
    let bench = Bench::new(100).await;
    let run = bench.run(json!({}), None).await;
    let child = bench.run(json!({}), Some(run)).await;
    set(&bench, run, "limit", HOLD_UCR).await;
    spend(&bench, &bench.attempt(child, 1)).await;
    assert_eq!(bench.start(&bench.attempt(child, 2)).await.as_deref(), Some(limit::LIMIT));
    assert_eq!(bench.start(&bench.attempt(run, 1)).await.as_deref(), Some(limit::LIMIT));

    let fork = bench.run(json!({}), None).await;
    sqlx::query("update runs set forked_from = $1, forked_shard = $2, forked_seq = 1 where run_id = $3")
        .bind(run.0)
        .bind(run.shard())
        .bind(fork.0)
        .execute(&bench.pool)
        .await
        .expect("fork");
    // The fork has spent nothing yet: it may spend what was approved once more, and no more than that.
    assert_eq!(in_force(&bench, fork).await.expect("limit").left.0, HOLD_UCR);
    spend(&bench, &bench.attempt(fork, 1)).await;
    assert_eq!(bench.start(&bench.attempt(fork, 2)).await.as_deref(), Some(limit::LIMIT));
    assert_eq!(in_force(&bench, run).await.expect("limit").left.0, HOLD_UCR - CALL_UCR);
}

/// A run that goes on in the place of `before`, which has closed.
async fn next_of(bench: &Bench, before: RunId) -> RunId {
    let next = bench.run(json!({}), None).await;
    for sql in [
        "update runs set status = 'continued', closed_at = engine_now(), continued_as = $2 where run_id = $1",
        "update runs n set continued_from = b.run_id, first_run_id = coalesce(b.first_run_id, b.run_id) from runs b where b.run_id = $1 and n.run_id = $2",
    ] {
        sqlx::query(sql).bind(before.0).bind(next.0).execute(&bench.pool).await.expect("continued");
    }
    next
}

#[tokio::test]
async fn the_runs_of_a_chain_spend_from_one_sum() {
    let bench = Bench::new(100).await;
    let first = bench.run(json!({}), None).await;
    let left = async |run: RunId| in_force(&bench, run).await.expect("limit").left.0;
    set(&bench, first, "limit", HOLD_UCR + CALL_UCR).await;
    spend(&bench, &bench.attempt(first, 1)).await;
    let second = next_of(&bench, first).await;
    assert_eq!(left(second).await, HOLD_UCR, "before it has held anything");
    spend(&bench, &bench.attempt(second, 1)).await;
    let third = next_of(&bench, second).await;
    assert_eq!(left(third).await, HOLD_UCR - CALL_UCR);
    assert_eq!(bench.start(&bench.attempt(third, 1)).await.as_deref(), Some(limit::LIMIT));

    // More is allowed to all of them: a run below the first one may spend it as well.
    let raised = raise(&bench, third, "more", CALL_UCR).await.expect("limit");
    assert_eq!((raised.cap.0, raised.left.0), (HOLD_UCR + 2 * CALL_UCR, HOLD_UCR));
    let below = bench.run(json!({}), Some(first)).await;
    spend(&bench, &bench.attempt(below, 1)).await;
    assert_eq!((left(first).await, left(third).await), (HOLD_UCR - CALL_UCR, HOLD_UCR - CALL_UCR));
    assert_eq!(bench.start(&bench.attempt(third, 1)).await.as_deref(), Some(limit::LIMIT));

    // A run that has left into an archive has spent what it has spent.
    sqlx::query("delete from runs where run_id = $1").bind(second.0).execute(&bench.pool).await.expect("retired");
    assert_eq!(left(third).await, HOLD_UCR - CALL_UCR);

    // The next approval counts from then on, once per run and step.
    let approved = set(&bench, third, "limit", HOLD_UCR).await;
    assert_eq!(approved.left.0, HOLD_UCR);
    spend(&bench, &bench.attempt(third, 1)).await;
    assert_eq!(left(third).await, HOLD_UCR - CALL_UCR);

    // A fork begins a chain of its own, from what was last allowed; whether its runs hold something or not.
    let fork = bench.run(json!({}), None).await;
    sqlx::query("update runs set forked_from = $1, forked_shard = $2, forked_seq = 1 where run_id = $3")
        .bind(third.0)
        .bind(third.shard())
        .bind(fork.0)
        .execute(&bench.pool)
        .await
        .expect("fork");
    let after = next_of(&bench, fork).await;
    assert_eq!(left(after).await, HOLD_UCR);
    spend(&bench, &bench.attempt(after, 1)).await;
    let last = next_of(&bench, after).await;
    assert_eq!((left(last).await, left(third).await), (HOLD_UCR - CALL_UCR, HOLD_UCR - CALL_UCR));
    assert_eq!(bench.start(&bench.attempt(last, 1)).await.as_deref(), Some(limit::LIMIT));
    assert_eq!(bench.violations().await, [""; 0]);
}

#[tokio::test]
async fn a_forecast_is_set_beside_what_was_paid_and_learns_from_it() {
    let bench = Bench::new(1_000).await;
    let calls = PlannedCall {
        ceilings: Vec::new(),
        candidates: vec![("nobody".into(), "none".into()), ("rehearsed".into(), "rehearsed/architect".into())],
        count: 10,
        input_tokens: 1_000,
        output_tokens: 1_000,
    };
    let item = |id: &str| Work { part: id.into(), activity: "implement@1", calls: calls.clone(), fewest: 3 };
    let verify = Work { part: "verify@1".into(), activity: "verify@1", calls: calls.clone(), fewest: 1 };
    let mut conn = bench.pool.acquire().await.expect("conn");

    // Nothing is known yet: the rule of thumb.
    let parts =
        forecast::price(&mut conn, RATE, Some(bench.user), &[item("a-1"), verify.clone()]).await.expect("priced");
    let (low, high) = (parts[0].forecast.low.0, parts[0].forecast.high.0);
    assert_eq!((low, high), (3 * HOLD_UCR / 4, 10 * HOLD_UCR));
    assert_eq!(forecast::limit(&parts).0, 20 * HOLD_UCR + HOLD_UCR);

    // Above its ceiling it is not asked, and so it tells nothing.
    let mut dear = item("a-2");
    dear.calls.ceilings = vec![(None, None), (Some(1), None)];
    assert_eq!(forecast::price(&mut conn, RATE, None, &[dear]).await.expect("priced"), []);

    let first = bench.run(json!({}), None).await;
    forecast::keep(&mut conn, first.0, "plan", bench.project, &parts).await.expect("kept");
    forecast::keep(&mut conn, first.0, "plan", bench.project, &parts).await.expect("kept once");
    for path in ["implement[a-1]/code~1", "implement[a-1]/code~2", "implement[xa-1]/code~1", "implement[a-1x]/code~1"] {
        spend(&bench, &at(&bench, first, "implement@1", path)).await;
    }
    spend(&bench, &at(&bench, first, "verify@1", "verify")).await;
    let paid = forecast::of_run(&mut conn, first.0).await.expect("read");
    let of = |part: &str| paid.iter().find(|p| p.part == part).expect("part").spent_ucr;
    assert_eq!((paid.len(), of("a-1"), of("verify@1")), (2, 2 * CALL_UCR, CALL_UCR));

    // A plan that was changed: only what comes after it is measured by it.
    forecast::keep(&mut conn, first.0, "plan~2", bench.project, &parts[..1]).await.expect("kept");
    let paid = forecast::of_run(&mut conn, first.0).await.expect("read");
    assert_eq!(paid.iter().find(|p| p.part == "a-1").expect("part").spent_ucr, 0);

    // Twenty items that are over: the interval is where four of five of them were.
    for n in 0..20 {
        let run = bench.run(json!({}), None).await;
        forecast::keep(&mut conn, run.0, "plan", bench.project, &parts[..1]).await.expect("kept");
        for again in 0..=n / 10 {
            spend(&bench, &at(&bench, run, "implement@1", &format!("implement[a-1]/code~{again}"))).await;
        }
        sqlx::query("update runs set status = 'completed', closed_at = engine_now() where run_id = $1")
            .bind(run.0)
            .execute(&bench.pool)
            .await
            .expect("closed");
    }
    let parts = forecast::price(&mut conn, RATE, None, &[item("b"), verify]).await.expect("priced");
    let near = |forecast: i64, calls: i64| (calls * CALL_UCR..calls * CALL_UCR + 20).contains(&forecast);
    let learned = parts[0].forecast;
    assert!(near(learned.low.0, 1) && near(learned.high.0, 2), "{learned:?}");
    assert_eq!(parts[1].forecast.high.0, 10 * HOLD_UCR, "of verifications too little is known");
    let quality = forecast::quality(&mut conn, 1).await.expect("read");
    assert_eq!(quality.len(), 1);
    assert_eq!((quality[0].parts, quality[0].within, quality[0].below, quality[0].above), (20, 0, 20, 0));
    assert_eq!(bench.violations().await, [""; 0]);
}

#[tokio::test]
async fn work_on_a_users_own_key_is_forecast_at_nothing_and_is_not_kept_from_it_by_that() {
    let bench = Bench::new(0).await;
    let calls = |provider: &str| PlannedCall {
        candidates: vec![(provider.into(), "gemini-3.8-flash".into())],
        ceilings: vec![],
        count: 10,
        input_tokens: 1_000,
        output_tokens: 1_000,
    };
    let work = Work { part: "a-1".into(), activity: "implement@1", calls: calls("gemini"), fewest: 3 };
    let mut conn = bench.pool.acquire().await.expect("conn");
    let paid = forecast::price(&mut conn, RATE, Some(bench.user), std::slice::from_ref(&work)).await.expect("priced");
    assert!(paid[0].forecast.low.0 > 0 && forecast::limit(&paid).0 > 0, "{paid:?}");
    sqlx::query(
        "insert into api_keys (provider, user_id, source, last4, fingerprint, ciphertext, nonce, wrapped_dek, kek_id)
         values ('gemini', $1, 'sealed', 'abcd', '\\x01', '\\x01', '\\x01', '\\x01', 'k')",
    )
    .bind(bench.user)
    .execute(&mut *conn)
    .await
    .expect("key");
    let free = forecast::price(&mut conn, RATE, Some(bench.user), std::slice::from_ref(&work)).await.expect("priced");
    assert_eq!((free[0].forecast.high.0, free[0].limits.0, forecast::limit(&free).0), (0, 0, 0));
    let others = forecast::price(&mut conn, RATE, Some(bench.another(7).await), &[work]).await.expect("priced");
    assert_eq!(others, paid, "nobody else's key");

    // The sum that is approved for it is nothing, and his own key needs none.
    let run = bench.run(json!({}), None).await;
    forecast::keep(&mut conn, run.0, "plan", bench.project, &free).await.expect("kept");
    assert_eq!(set(&bench, run, "limit", 0).await.left.0, 0);
    assert_eq!(bench.start(&bench.attempt(run, 1)).await, None);
    assert_eq!(bench.balance().await, (0, 0));
    assert_eq!(bench.violations().await, [""; 0]);
}
