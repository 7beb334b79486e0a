//! Rules: burn order and expiry, caps, the refund policy, users whose holds are stopped.

use crate::bench::{Bench, CALL_UCR, closing, opening};
use loopwright_activities::{
    billing::{
        BillingSettings, MicroCredits, audit, hold,
        ledger::{self, GrantSource},
        policy,
        report::{self, By, Span},
    },
    usage::{CallClosed, CallState},
};
use loopwright_engine::{
    hook::{AttemptRef, Outcome, Phase, Verdict},
    ids::{AttemptId, RunId},
};
use serde_json::json;
use std::sync::Arc;
use uuid::Uuid;

/// A grant of so many credits that expires in so many seconds.
async fn expiring(bench: &Bench, reference: &str, credits: i64, seconds: i64) {
    let mut conn = bench.pool.acquire().await.expect("conn");
    let until = chrono::Utc::now() + chrono::Duration::seconds(seconds);
    let amount = MicroCredits::from_credits(credits);
    ledger::grant(&mut conn, bench.user, GrantSource::Promo, reference, amount, Some(until)).await.expect("grant");
}

async fn left_of(bench: &Bench, reference: &str) -> (i64, i64) {
    sqlx::query_as("select remaining_ucr, held_ucr from credit_grants where source_ref = $1")
        .bind(reference)
        .fetch_one(&bench.pool)
        .await
        .expect("grant")
}

#[tokio::test]
async fn credits_burn_by_priority_then_expiry_then_age() {
    let bench = Bench::new(1).await;
    let welcome = bench.user.to_string();
    bench.grant("never", 1).await;
    expiring(&bench, "late", 1, 7_200).await;
    expiring(&bench, "soon", 1, 3_600).await;
    let attempt = bench.attempt(RunId::new(), 1);
    // 1.44 credits: the welcome grant first, then what expires first among its equals.
    assert_eq!(bench.start(&attempt).await, None);
    assert_eq!(left_of(&bench, &welcome).await.1, 1_000_000);
    assert_eq!(left_of(&bench, "soon").await.1, 440_000);
    bench.open(&attempt, "a.0", 1_000).await;
    bench.close(&attempt, "a.0", CallState::Succeeded, 1_000, 1_000).await;
    bench.end(&attempt, Outcome::Succeeded).await;
    assert_eq!(left_of(&bench, &welcome).await, (0, 0));
    assert_eq!(left_of(&bench, "soon").await, (560_000, 0));
    assert_eq!((left_of(&bench, "late").await.0, left_of(&bench, "never").await.0), (1_000_000, 1_000_000));
    assert_eq!(bench.violations().await, [""; 0]);
}

#[tokio::test]
async fn expiry_never_touches_what_is_held_and_counts_once() {
    let bench = Bench::new(0).await;
    expiring(&bench, "g", 2, 3_600).await;
    let attempt = bench.attempt(RunId::new(), 1);
    assert_eq!(bench.start(&attempt).await, None);
    sqlx::query("update credit_grants set expires_at = engine_now() - interval '1 second'")
        .execute(&bench.pool)
        .await
        .expect("expired");
    let mut conn = bench.pool.acquire().await.expect("conn");
    assert_eq!(ledger::expire(&mut conn, 10).await.expect("expired"), 1);
    assert_eq!(ledger::expire(&mut conn, 10).await.expect("again"), 0);
    assert_eq!(bench.balance().await, (1_440_000, 1_440_000));
    assert_eq!(bench.violations().await, [""; 0]);
    // What is held pays for its attempt; what the attempt gives back goes with the next look.
    bench.open(&attempt, "a.0", 1_000).await;
    bench.close(&attempt, "a.0", CallState::Succeeded, 1_000, 100).await;
    bench.end(&attempt, Outcome::Succeeded).await;
    assert_eq!(bench.balance().await, (1_440_000 - CALL_UCR, 0));
    assert_eq!(bench.start(&bench.attempt(RunId::new(), 1)).await.as_deref(), Some("credits"), "expired is not held");
    assert_eq!(ledger::expire(&mut conn, 10).await.expect("the rest"), 1);
    assert_eq!(bench.balance().await, (0, 0));
    assert_eq!(bench.violations().await, [""; 0]);
}

// Found by the random test: the clock goes on between the look at the balance and the hold, and the run was set aside.
#[tokio::test]
async fn a_grant_that_expires_between_the_look_and_the_hold_still_holds() {
    let bench = Bench::new(0).await;
    expiring(&bench, "g", 2, 3_600).await;
    let attempt = bench.attempt(RunId::new(), 1);
    let mut tx = bench.pool.begin().await.expect("tx");
    sqlx::query(
        "insert into activity_attempts (id, run_id, path, activity, attempt_no, user_id, state, lease_expires_at)
         values ($1, $2, 'step', 'work@1', 1, $3, 'running', engine_now() + interval '1 hour')",
    )
    .bind(attempt.attempt_id.0)
    .bind(attempt.run_id.0)
    .bind(bench.user)
    .execute(&mut *tx)
    .await
    .expect("attempt");
    let balance = ledger::lock(&mut tx, bench.user).await.expect("lock");
    let seen = hold::reservable(&mut tx, bench.user, balance).await.expect("reservable");
    assert_eq!(seen.credits, MicroCredits::from_credits(2));
    // Its date passes now, one statement later.
    sqlx::query("update credit_grants set expires_at = $1::timestamptz + interval '1 microsecond'")
        .bind(seen.at)
        .execute(&mut *tx)
        .await
        .expect("passes");
    let rate = BillingSettings::default().rate;
    hold::place(&mut tx, bench.user, attempt.attempt_id.0, 1, seen.credits, rate, seen.at).await.expect("held");
    tx.commit().await.expect("commit");
    assert_eq!(bench.balance().await, (2_000_000, 2_000_000));
    bench.end(&attempt, Outcome::Failed).await;
    assert_eq!(bench.violations().await, [""; 0]);
}

fn at(bench: &Bench, run: RunId, path: &str, budget: &serde_json::Value) -> AttemptRef {
    let attempt_id = AttemptId::derive(run, path, 1);
    AttemptRef { attempt_id, path: path.into(), budget: Arc::new(budget.clone()), ..bench.attempt(run, 1) }
}

#[tokio::test]
async fn an_item_has_its_share_over_all_rounds_and_other_items_have_theirs() {
    let bench = Bench::new(100).await;
    let run = RunId::new();
    let budget = json!({"credits": 50, "credits-per-item": 15});
    // 12.24 credits a call.
    let spend = async |path: &str| {
        let attempt = at(&bench, run, path, &budget);
        if let Some(reason) = bench.start(&attempt).await {
            return reason;
        }
        let verdict = bench.open(&attempt, "a.0", 10_000).await;
        bench.close(&attempt, "a.0", CallState::Succeeded, 1_000, 10_000).await;
        bench.end(&attempt, Outcome::Succeeded).await;
        match verdict {
            Verdict::Accepted => String::new(),
            Verdict::Refused { reason, .. } => reason,
        }
    };
    assert_eq!(spend("loop~1/implement[a]/code").await, "");
    assert_eq!(spend("loop~2/implement[a]/again~1/code").await, "budget.item", "2.76 are left of the item's share");
    assert_eq!(spend("loop~1/implement[b]/code").await, "", "another item");
    assert_eq!(spend("plan").await, "", "no item");
    assert_eq!(spend("loop~1/implement[c]/code").await, "", "the fourth");
    assert_eq!(spend("loop~1/implement[d]/code").await, "budget.run", "the run's budget is the smaller one now");
    assert_eq!(bench.violations().await, [""; 0]);
}

#[tokio::test]
async fn a_projects_cap_bounds_all_of_its_runs() {
    let bench = Bench::new(100).await;
    sqlx::query("update projects set budget_cap_ucr = 2000000").execute(&bench.pool).await.expect("cap");
    let first = bench.attempt(RunId::new(), 1);
    let second = bench.attempt(RunId::new(), 1);
    assert_eq!(bench.start(&first).await, None);
    assert_eq!(bench.start(&second).await.as_deref(), Some("budget"), "the first may give it back");
    bench.open(&first, "a.0", 1_000).await;
    bench.close(&first, "a.0", CallState::Succeeded, 1_000, 1_000).await;
    bench.end(&first, Outcome::Succeeded).await;
    assert_eq!(bench.start(&second).await.as_deref(), Some("cap"), "until somebody raises it");
    assert_eq!(bench.violations().await, [""; 0]);
}

/// An answer that was received, paid, and had not the required shape.
async fn unusable(bench: &Bench, attempt: &AttemptRef, key: &str) {
    assert!(matches!(bench.meter(attempt, key, Phase::Open, opening(100)).await, Verdict::Accepted));
    let mut closed: CallClosed = serde_json::from_value(closing(CallState::Succeeded, 1_000, 100)).expect("closing");
    closed.error_class = Some("model.output_invalid".into());
    bench.meter(attempt, key, Phase::Close, serde_json::to_value(closed).expect("json")).await;
}

#[tokio::test]
async fn unusable_answers_are_given_back_once_and_usable_ones_are_not() {
    let bench = Bench::new(100).await;
    let attempt = bench.attempt(RunId::new(), 1);
    bench.start(&attempt).await;
    bench.open(&attempt, "a.0", 100).await;
    bench.close(&attempt, "a.0", CallState::Succeeded, 1_000, 100).await;
    unusable(&bench, &attempt, "a.1").await;
    bench.end_with(&attempt, Outcome::Failed, Some("model.output_invalid"), true).await;
    bench.end_with(&attempt, Outcome::Failed, Some("model.output_invalid"), true).await;
    assert_eq!(bench.balance().await, (100_000_000 - CALL_UCR, 0), "two calls captured, one given back");
    let grant: (String, i64, i64) = sqlx::query_as(
        "select g.source_ref, g.amount_ucr, count(*) over () from credit_grants g where g.source = 'adjustment'",
    )
    .fetch_one(&bench.pool)
    .await
    .expect("one");
    assert_eq!(grant, (format!("refund-policy:{}", attempt.attempt_id.0), CALL_UCR, 1));
    // The same answers in an attempt that succeeded by its repair are paid.
    let repaired = bench.attempt(RunId::new(), 1);
    bench.start(&repaired).await;
    unusable(&bench, &repaired, "a.0").await;
    bench.end(&repaired, Outcome::Succeeded).await;
    assert_eq!(bench.balance().await.0, 100_000_000 - 2 * CALL_UCR);
    assert_eq!(bench.violations().await, [""; 0]);
}

#[tokio::test]
async fn a_providers_fault_gives_back_what_every_attempt_of_the_failed_step_paid() {
    let bench = Bench::new(100).await;
    let run = RunId::new();
    let given = async |attempt: &AttemptRef, suffix: &str| -> i64 {
        sqlx::query_scalar("select coalesce(sum(amount_ucr), 0)::bigint from credit_grants where source_ref = $1")
            .bind(format!("refund-policy:{}{suffix}", attempt.attempt_id.0))
            .fetch_one(&bench.pool)
            .await
            .expect("sum")
    };
    // The first buys two answers, one of them unusable; the second dies with its worker; the third finds nobody.
    let attempts: Vec<AttemptRef> = (1..=3).map(|number| bench.attempt(run, number)).collect();
    bench.start(&attempts[0]).await;
    bench.open(&attempts[0], "a.0", 100).await;
    bench.close(&attempts[0], "a.0", CallState::Succeeded, 1_000, 100).await;
    unusable(&bench, &attempts[0], "a.1").await;
    bench.end_with(&attempts[0], Outcome::Failed, Some("model.output_invalid"), true).await;
    assert_eq!(given(&attempts[0], "").await, CALL_UCR);
    bench.start(&attempts[1]).await;
    bench.open(&attempts[1], "a.0", 100).await;
    bench.close(&attempts[1], "a.0", CallState::Succeeded, 1_000, 100).await;
    bench.end(&attempts[1], Outcome::Lost).await;
    assert_eq!(bench.balance().await.0, 100_000_000 - 2 * CALL_UCR);
    bench.start(&attempts[2]).await;
    // Settled again, nothing is given again.
    for _ in 0..2 {
        bench.end_with(&attempts[2], Outcome::Failed, Some("transient.unavailable"), false).await;
        assert_eq!(bench.balance().await.0, 100_000_000, "he paid for a step that failed");
    }
    assert_eq!((given(&attempts[0], ":step").await, given(&attempts[1], ":step").await), (CALL_UCR, CALL_UCR));
    let span = Span { from: None, to: None, user: None };
    let spent =
        report::spent(&mut bench.pool.acquire().await.expect("conn"), By::Activity, span).await.expect("report");
    assert_eq!((spent[0].attempts, spent[0].credits.as_str(), spent[0].given_back.as_str()), (3, "1.08", "1.08"));
    // A rule is turned off by a newer row, for what ends from then on.
    sqlx::query(
        "insert into refund_rules (rule, effective_from, gives, failures, final_only, share_bps, source)
         values ('provider_fault', engine_now(), 'attempt', '{transient.http}', true, 0, 'operator')",
    )
    .execute(&bench.pool)
    .await
    .expect("rule");
    let attempt = bench.attempt(RunId::new(), 1);
    bench.start(&attempt).await;
    bench.open(&attempt, "a.0", 100).await;
    bench.close(&attempt, "a.0", CallState::Succeeded, 1_000, 100).await;
    bench.end_with(&attempt, Outcome::Failed, Some("transient.http"), false).await;
    assert_eq!(bench.balance().await.0, 100_000_000 - CALL_UCR);
    let changed = sqlx::query("update refund_rules set share_bps = 0").execute(&bench.pool).await;
    assert!(changed.expect_err("append-only").to_string().contains("append-only"));
    assert_eq!(bench.violations().await, [""; 0]);
}

#[tokio::test]
async fn the_fault_of_a_users_own_provider_gives_nothing_back() {
    let bench = Bench::new(100).await;
    for (own, given) in [(true, 0), (false, 1)] {
        let attempt = bench.attempt(RunId::new(), 1);
        bench.start(&attempt).await;
        bench.open(&attempt, "a.0", 100).await;
        bench.close(&attempt, "a.0", CallState::Succeeded, 1_000, 100).await;
        bench.open(&attempt, "a.1", 100).await;
        bench.close(&attempt, "a.1", CallState::Failed, 0, 0).await;
        // As if the call that failed had been made on a key that the user brought.
        sqlx::query(
            "with k as (insert into api_keys (provider, user_id, source, last4, fingerprint)
                        select 'rehearsed', $2, 'environment', '', decode(repeat('22', 32), 'hex') where $3 returning id)
             update api_key_usage set api_key_id = k.id, worst_pusd = 0 from k where attempt_id = $1 and call_key = 'a.1'",
        )
        .bind(attempt.attempt_id.0)
        .bind(bench.user)
        .bind(own)
        .execute(&bench.pool)
        .await
        .expect("own key");
        bench.end_with(&attempt, Outcome::Failed, Some("transient.http"), false).await;
        let back: i64 =
            sqlx::query_scalar("select count(*) from credit_grants where source_ref = 'refund-policy:' || $1")
                .bind(attempt.attempt_id.0)
                .fetch_one(&bench.pool)
                .await
                .expect("count");
        assert_eq!(back, given, "own: {own}");
    }
    assert_eq!(bench.violations().await, [""; 0]);
}

/// A key of the user's, sealed so many seconds ago.
async fn bring_a_key(bench: &Bench, seconds: f64) {
    sqlx::query(
        "insert into api_keys (provider, user_id, source, last4, fingerprint, ciphertext, nonce, wrapped_dek, kek_id, sealed_at)
         values ('openrouter', $1, 'sealed', '', decode(repeat('33', 32), 'hex'), '', '', '', 'a', engine_now() - make_interval(secs => $2))",
    )
    .bind(bench.user)
    .bind(seconds)
    .execute(&bench.pool)
    .await
    .expect("key");
}

async fn delete_the_key(bench: &Bench) {
    sqlx::query("update api_keys set status = 'revoked', kek_id = '' where source = 'sealed'")
        .execute(&bench.pool)
        .await
        .expect("revoked");
}

/// Grants of the policy for an attempt, under its own key or that of its step.
async fn refunds(bench: &Bench, attempt: &AttemptRef) -> i64 {
    sqlx::query_scalar(
        "select count(*) from credit_grants where source_ref in ('refund-policy:' || $1, 'refund-policy:' || $1 || ':step')",
    )
    .bind(attempt.attempt_id.0)
    .fetch_one(&bench.pool)
    .await
    .expect("count")
}

// Who had bought answers ended the step by a key of his own with which nobody could be asked, and had all of it back.
#[tokio::test]
async fn an_end_without_a_call_gives_back_to_who_brought_no_key_meanwhile() {
    let bench = Bench::new(100).await;
    for (name, given) in [
        ("none", 1),
        ("deleted long before", 1),
        ("before the last attempt", 0),
        ("during it", 0),
        ("before it, and deleted during it", 0),
        ("during it, and deleted at once", 0),
    ] {
        let run = RunId::new();
        let (first, last) = (bench.attempt(run, 1), bench.attempt(run, 2));
        bench.start(&first).await;
        bench.open(&first, "a.0", 100).await;
        bench.close(&first, "a.0", CallState::Succeeded, 1_000, 100).await;
        bench.end(&first, Outcome::Lost).await;
        match name {
            "deleted long before" => {
                bring_a_key(&bench, 3_600.0).await;
                delete_the_key(&bench).await;
            }
            "before the last attempt" | "before it, and deleted during it" => bring_a_key(&bench, 0.0).await,
            _ => {}
        }
        assert_eq!(bench.start(&last).await, None, "{name}");
        match name {
            "during it" => bring_a_key(&bench, 0.0).await,
            "during it, and deleted at once" => {
                bring_a_key(&bench, 0.0).await;
                delete_the_key(&bench).await;
            }
            "before it, and deleted during it" => delete_the_key(&bench).await,
            _ => {}
        }
        bench.end_with(&last, Outcome::Failed, Some("model.unavailable"), false).await;
        assert_eq!((refunds(&bench, &first).await, refunds(&bench, &last).await), (given, 0), "{name}");
        sqlx::query("delete from api_keys where source = 'sealed'").execute(&bench.pool).await.expect("away");
    }
    assert_eq!(bench.balance().await, (100_000_000 - 4 * CALL_UCR, 0));
    assert_eq!(bench.violations().await, [""; 0]);
}

#[tokio::test]
async fn a_failure_before_a_later_answer_does_not_say_whose_fault_the_end_was() {
    let bench = Bench::new(100).await;
    for (key, given) in [(true, 0), (false, 1)] {
        let attempt = bench.attempt(RunId::new(), 1);
        bench.start(&attempt).await;
        bench.open(&attempt, "a.0", 100).await;
        bench.close(&attempt, "a.0", CallState::Failed, 0, 0).await;
        bench.open(&attempt, "a.1", 100).await;
        bench.close(&attempt, "a.1", CallState::Succeeded, 1_000, 100).await;
        if key {
            bring_a_key(&bench, 0.0).await;
        }
        bench.end_with(&attempt, Outcome::Failed, Some("transient.rate_limited"), false).await;
        assert_eq!(refunds(&bench, &attempt).await, given, "a key: {key}");
        sqlx::query("delete from api_keys where source = 'sealed'").execute(&bench.pool).await.expect("away");
    }
    // It is the platform's where its call was the last and failed, also of who has keys.
    let attempt = bench.attempt(RunId::new(), 1);
    bench.start(&attempt).await;
    bring_a_key(&bench, 0.0).await;
    bench.open(&attempt, "a.0", 100).await;
    bench.close(&attempt, "a.0", CallState::Succeeded, 1_000, 100).await;
    bench.open(&attempt, "a.1", 100).await;
    bench.close(&attempt, "a.1", CallState::Failed, 0, 0).await;
    bench.end_with(&attempt, Outcome::Failed, Some("transient.http"), false).await;
    assert_eq!(refunds(&bench, &attempt).await, 1);
    assert_eq!(bench.violations().await, [""; 0]);
}

#[tokio::test]
async fn a_run_that_ends_rejected_gives_its_verification_back() {
    let bench = Bench::new(100).await;
    let run = bench.run(json!({"credits": 50}), None).await;
    let verify = AttemptRef { activity: "verify@1".into(), ..bench.attempt(run, 1) };
    let other = at(&bench, run, "plan", &json!({"credits": 50}));
    for attempt in [&verify, &other] {
        bench.start(attempt).await;
        bench.open(attempt, "a.0", 100).await;
        bench.close(attempt, "a.0", CallState::Succeeded, 1_000, 100).await;
        bench.end(attempt, Outcome::Succeeded).await;
    }
    let verdict = async |n: i32, verdict: &str| {
        sqlx::query("insert into project_records (project_id, kind, key, run_id, body) values ($1, 'verdict', $2, $3, jsonb_build_object('verdict', $4::text))")
            .bind(bench.project)
            .bind(n.to_string())
            .bind(run.0)
            .bind(verdict)
            .execute(&bench.pool)
            .await
            .expect("record");
    };
    verdict(1, "accept").await;
    verdict(2, "reject").await;
    let mut conn = bench.pool.acquire().await.expect("conn");
    assert_eq!(policy::rejected_runs(&mut conn, 10).await.expect("open run"), Vec::<Uuid>::new(), "it is not over");
    sqlx::query("update runs set status = 'cancelled', closed_at = engine_now()")
        .execute(&bench.pool)
        .await
        .expect("closed");
    assert_eq!(policy::rejected_runs(&mut conn, 10).await.expect("cancelled"), Vec::<Uuid>::new(), "by its user");
    sqlx::query("update runs set status = 'completed'").execute(&bench.pool).await.expect("closed");
    assert_eq!(policy::rejected_runs(&mut conn, 10).await.expect("rejected"), [bench.user]);
    assert_eq!(policy::rejected_runs(&mut conn, 10).await.expect("again"), Vec::<Uuid>::new());
    assert_eq!(bench.balance().await.0, 100_000_000 - CALL_UCR);
    assert_eq!(bench.violations().await, [""; 0]);
}

#[tokio::test]
async fn a_broken_invariant_stops_new_holds_of_its_user_and_of_nobody_else() {
    let bench = Bench::new(100).await;
    let running = bench.attempt(RunId::new(), 1);
    assert_eq!(bench.start(&running).await, None);
    let mut conn = bench.pool.acquire().await.expect("conn");
    let other = bench.another(43).await;
    ledger::grant(&mut conn, other, GrantSource::Promo, "o", MicroCredits::from_credits(10), None)
        .await
        .expect("grant");
    sqlx::query("update users set credit_balance_ucr = credit_balance_ucr + 1 where id = $1")
        .bind(bench.user)
        .execute(&mut *conn)
        .await
        .expect("corrupted");
    let found = audit::run(&mut conn).await.expect("audit");
    assert!(found.iter().all(|violation| violation.user == Some(bench.user)), "{found:?}");
    let at = sqlx::query_scalar("select engine_now()").fetch_one(&mut *conn).await.expect("now");
    let found = audit::Audit { at, violations: found };
    assert_eq!(audit::stop_affected(&mut conn, &found).await.expect("stopped"), [bench.user]);
    assert_eq!(audit::stop_affected(&mut conn, &found).await.expect("again"), Vec::<Uuid>::new());
    // No new attempt and no larger hold; what is held already goes on.
    assert_eq!(bench.start(&bench.attempt(RunId::new(), 1)).await.as_deref(), Some("review"));
    assert!(matches!(bench.open(&running, "a.0", 1_000).await, Verdict::Accepted));
    assert!(matches!(bench.open(&running, "a.1", 1_000).await, Verdict::Refused { reason, .. } if reason == "review"));
    let attributes = Arc::new(json!({"user_id": other.to_string()}));
    let theirs = AttemptRef { attributes, ..bench.attempt(RunId::new(), 1) };
    assert_eq!(bench.start(&theirs).await, None, "nobody else");
    sqlx::query("update users set credit_balance_ucr = credit_balance_ucr - 1 where id = $1")
        .bind(bench.user)
        .execute(&mut *conn)
        .await
        .expect("mended");
    bench.end(&running, Outcome::Succeeded).await;
    assert!(ledger::resume_holds(&mut conn, bench.user).await.expect("released"));
    assert!(!ledger::resume_holds(&mut conn, bench.user).await.expect("again"));
    // An audit that had begun before and reports late: what it has seen may be mended, though nothing of it stands open any more.
    sqlx::query("update reconcile_findings set resolved_at = engine_now()")
        .execute(&mut *conn)
        .await
        .expect("resolved");
    assert_eq!(audit::stop_affected(&mut conn, &found).await.expect("late"), Vec::<Uuid>::new());
    assert_eq!(bench.start(&bench.attempt(RunId::new(), 1)).await, None);
    bench.end(&theirs, Outcome::Succeeded).await;
    assert_eq!(bench.violations().await, [""; 0]);
}

#[tokio::test]
async fn a_model_that_is_withdrawn_under_way_costs_what_was_said() {
    let bench = Bench::new(100).await;
    let attempt = bench.attempt(RunId::new(), 1);
    bench.start(&attempt).await;
    bench.open(&attempt, "a.0", 100).await;
    // As if the row had been there before the call: the worst that a correction can be.
    sqlx::query(
        "insert into model_pricing (provider, model_id, effective_from, input_umtok, output_umtok, billable, source)
         values ('rehearsed', 'rehearsed/architect', '2026-01-02', 0, 0, false, 'withdrawn')",
    )
    .execute(&bench.pool)
    .await
    .expect("withdrawn");
    bench.close(&attempt, "a.0", CallState::Succeeded, 1_000, 100).await;
    bench.end(&attempt, Outcome::Succeeded).await;
    assert_eq!(bench.balance().await, (100_000_000 - CALL_UCR, 0), "never free");
    assert!(matches!(bench.open(&attempt, "a.1", 100).await, Verdict::Refused { .. }));
}
