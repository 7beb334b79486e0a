//! Caps over trees and chains of runs, and steps that wait until there is enough.

use crate::{
    bench::{Bench, CALL_UCR, closing, one_call, opening, planning},
    billing_worker::{Calls, closed, signature, start, waiting},
};
use futures_util::future::{BoxFuture, join_all};
use loopwright_activities::{
    billing::{BillingSettings, LedgerHook, MicroCredits, ledger, limit},
    usage::CallState,
};
use loopwright_engine::{
    Failure,
    activity::{Activity, Context, Registry},
    client::Client,
    hook::{AttemptRef, Outcome, Transition, TransitionHook, Verdict},
    ids::{AttemptId, RunId},
    signature::Signature,
    view::RunStatus,
    worker::{self, WorkerConfig, WorkerHandle},
};
use serde_json::{Value, json};
use std::{sync::Arc, time::Duration};

/// What the hold of an attempt takes that plans one call.
const HOLD_UCR: i64 = (1_000 * 2 + 1_000 * 10) * 120;

fn at(bench: &Bench, run: RunId, path: &str, number: u32, budget: &Value) -> AttemptRef {
    let attempt_id = AttemptId::derive(run, path, number);
    AttemptRef { attempt_id, path: path.into(), budget: Arc::new(budget.clone()), ..bench.attempt(run, number) }
}

/// An attempt that makes one call of [`CALL_UCR`], or why it does not start.
async fn spend(bench: &Bench, attempt: &AttemptRef) -> Option<String> {
    let refused = bench.start(attempt).await;
    if refused.is_none() {
        assert!(matches!(bench.open(attempt, "a.0", 1_000).await, Verdict::Accepted));
        bench.close(attempt, "a.0", CallState::Succeeded, 1_000, 100).await;
        bench.end(attempt, Outcome::Succeeded).await;
    }
    refused
}

/// The run that goes on in the place of `before`.
async fn next_of(bench: &Bench, before: RunId, budget: &Value) -> RunId {
    let next = bench.run(budget.clone(), None).await;
    for sql in [
        "update runs set status = 'continued', closed_at = engine_now(), continued_as = $2 where run_id = $1",
        "update runs n set continued_from = b.run_id, first_run_id = coalesce(b.first_run_id, b.run_id), parent_shard = b.parent_shard,
           parent_run_id = b.parent_run_id, parent_path = b.parent_path from runs b where b.run_id = $1 and n.run_id = $2",
    ] {
        sqlx::query(sql).bind(before.0).bind(next.0).execute(&bench.pool).await.expect("continued");
    }
    next
}

async fn below(bench: &Bench, parent: RunId, path: &str) -> RunId {
    let child = bench.run(Value::Null, Some(parent)).await;
    sqlx::query("update runs set parent_path = $2 where run_id = $1")
        .bind(child.0)
        .bind(path)
        .execute(&bench.pool)
        .await
        .expect("path");
    child
}

#[tokio::test]
async fn two_children_that_start_at_one_instant_do_not_pass_their_parents_cap_together() {
    for round in 0..8 {
        let bench = Bench::new(100).await;
        let budget = json!({"credits": 2});
        let root = bench.run(budget.clone(), None).await;
        let children = [below(&bench, root, "all:a/call").await, below(&bench, root, "all:b/call").await];
        // Each wants 1.44 of 2, and each sees that nothing is held when it looks: the lock decides.
        let attempts = children.map(|child| at(&bench, child, "call", 1, &Value::Null));
        let reasons = join_all(attempts.iter().map(|attempt| bench.start(attempt))).await;
        let refused: Vec<&str> = reasons.iter().flatten().map(String::as_str).collect();
        assert_eq!(refused, ["budget"], "round {round}: the other one may give some of it back");
        assert_eq!(bench.balance().await.1, HOLD_UCR);
        // A hold that grows is a part of the cap too, and so is what the parent does itself.
        let first = attempts.iter().zip(&reasons).find(|(_, refused)| refused.is_none()).expect("one").0;
        let verdict = bench.open(first, "a.0", 2_000).await;
        assert!(matches!(&verdict, Verdict::Refused { reason, .. } if reason == "budget.run"), "{verdict:?}");
        let own = at(&bench, root, "own", 1, &budget);
        assert_eq!(bench.start(&own).await.as_deref(), Some("budget"));
        assert!(matches!(bench.open(first, "a.1", 1_000).await, Verdict::Accepted));
        bench.close(first, "a.1", CallState::Succeeded, 1_000, 1_000).await;
        bench.end(first, Outcome::Succeeded).await;
        assert_eq!(bench.start(&own).await.as_deref(), Some("budget.run"), "0.56 are left, and nobody works");
        assert_eq!(bench.violations().await, [""; 0]);
    }
}

#[tokio::test]
async fn a_budget_is_one_for_all_runs_of_a_chain_and_what_is_below_them() {
    let bench = Bench::new(100).await;
    // Room for two calls, and for a third one no more.
    let budget = json!({"credits": 2});
    let first = bench.run(budget.clone(), None).await;
    assert_eq!(spend(&bench, &at(&bench, first, "a", 1, &budget)).await, None);
    let child = below(&bench, first, "call").await;
    let second = next_of(&bench, first, &budget).await;
    // The child of the one before has its parent's cap and is a part of that of the next.
    assert_eq!(spend(&bench, &at(&bench, child, "a", 1, &Value::Null)).await, None);
    let third = next_of(&bench, second, &budget).await;
    for run in [second, third, first] {
        let refused = spend(&bench, &at(&bench, run, "b", 1, &budget)).await;
        assert_eq!(refused.as_deref(), Some("budget.run"), "1.28 are left of it, the next needs 1.44");
    }
    // A child that continues as new is below its parent as before.
    let root = bench.run(budget.clone(), None).await;
    let one = below(&bench, root, "call").await;
    assert_eq!(spend(&bench, &at(&bench, one, "a", 1, &Value::Null)).await, None);
    let two = next_of(&bench, one, &Value::Null).await;
    assert_eq!(spend(&bench, &at(&bench, two, "a", 1, &Value::Null)).await, None);
    assert_eq!(spend(&bench, &at(&bench, two, "b", 1, &Value::Null)).await.as_deref(), Some("budget.run"));
    assert_eq!(spend(&bench, &at(&bench, root, "b", 1, &budget)).await.as_deref(), Some("budget.run"));
    assert_eq!(bench.balance().await, (100_000_000 - 4 * CALL_UCR, 0));
    assert_eq!(bench.violations().await, [""; 0]);
}

#[tokio::test]
async fn a_budget_pays_for_what_was_below_runs_that_have_left_into_an_archive() {
    let bench = Bench::new(100).await;
    let budget = json!({"credits": 2});
    let first = bench.run(budget.clone(), None).await;
    let middle = below(&bench, first, "call").await;
    let child = below(&bench, middle, "call").await;
    assert_eq!(spend(&bench, &at(&bench, child, "a", 1, &Value::Null)).await, None);
    let second = next_of(&bench, first, &budget).await;
    assert_eq!(spend(&bench, &at(&bench, second, "a", 1, &budget)).await, None);
    let third = next_of(&bench, second, &budget).await;
    sqlx::query("delete from runs where run_id <> $1").bind(third.0).execute(&bench.pool).await.expect("gone");
    assert_eq!(spend(&bench, &at(&bench, third, "a", 1, &budget)).await.as_deref(), Some("budget.run"));
    assert_eq!(bench.violations().await, [""; 0]);
}

/// A row as the release before writes it.
#[tokio::test]
async fn what_an_older_release_starts_counts_against_the_caps_above_it() {
    let bench = Bench::new(100).await;
    let budget = json!({"credits": 2});
    let root = bench.run(budget.clone(), None).await;
    let middle = next_of(&bench, below(&bench, root, "call").await, &Value::Null).await;
    let child = below(&bench, middle, "call").await;
    let attempt = at(&bench, child, "a", 1, &Value::Null);
    sqlx::query(
        "insert into activity_attempts (id, run_id, path, activity, attempt_no, user_id, project_id, state, lease_expires_at)
         values ($1, $2, 'a', 'work@1', 1, $3, $4, 'running', engine_now())",
    )
    .bind(attempt.attempt_id.0)
    .bind(child.0)
    .bind(bench.user)
    .bind(bench.project)
    .execute(&bench.pool)
    .await
    .expect("attempt");
    // It makes its call here, where its hold grows from nothing.
    assert!(matches!(bench.open(&attempt, "a.0", 1_000).await, Verdict::Accepted));
    let own = at(&bench, root, "own", 1, &budget);
    assert_eq!(bench.start(&own).await.as_deref(), Some("budget"), "1.44 of 2 are held below it");
    bench.close(&attempt, "a.0", CallState::Succeeded, 1_000, 1_000).await;
    bench.end(&attempt, Outcome::Succeeded).await;
    assert_eq!(bench.start(&own).await.as_deref(), Some("budget.run"));
}

#[tokio::test]
async fn an_items_share_pays_for_the_runs_that_it_starts_and_for_the_same_item_in_the_chain() {
    let bench = Bench::new(100).await;
    let budget = json!({"credits": 50, "credits-per-item": 2});
    let run = bench.run(budget.clone(), None).await;
    let child = below(&bench, run, "loop~1/implement[a]/call").await;
    let grandchild = below(&bench, child, "deep").await;
    assert_eq!(spend(&bench, &at(&bench, grandchild, "x", 1, &Value::Null)).await, None);
    assert_eq!(spend(&bench, &at(&bench, run, "loop~1/implement[a]/code", 1, &budget)).await, None);
    for (run, path, budget) in [
        (run, "loop~2/implement[a]/code", &budget),
        (child, "y", &Value::Null),
        (grandchild, "y", &Value::Null),
        (next_of(&bench, run, &budget).await, "implement[a]/code", &budget),
    ] {
        assert_eq!(spend(&bench, &at(&bench, run, path, 1, budget)).await.as_deref(), Some("budget.item"), "{path}");
    }
    // Another item's child has a share of its own.
    let other = below(&bench, run, "loop~1/implement[b]/call").await;
    assert_eq!(spend(&bench, &at(&bench, other, "x", 1, &Value::Null)).await, None);
    assert_eq!(bench.violations().await, [""; 0]);
}

#[tokio::test]
async fn children_of_several_runs_that_race_do_not_pass_the_projects_cap() {
    let bench = Bench::new(100).await;
    sqlx::query("update projects set budget_cap_ucr = 3000000").execute(&bench.pool).await.expect("cap");
    let mut attempts = Vec::new();
    for _ in 0..3 {
        let root = bench.run(Value::Null, None).await;
        for path in ["a", "b"] {
            attempts.push(at(&bench, below(&bench, root, path).await, "call", 1, &Value::Null));
        }
    }
    let reasons = join_all(attempts.iter().map(|attempt| bench.start(attempt))).await;
    assert_eq!(reasons.iter().filter(|refused| refused.is_none()).count(), 2, "{reasons:?}");
    assert!(reasons.iter().flatten().all(|reason| reason == "budget"), "{reasons:?}");
    assert_eq!(bench.balance().await.1, 2 * HOLD_UCR);
    assert_eq!(bench.violations().await, [""; 0]);
}

/// One call of 12.24 credits at most, which its plan does not know of.
pub(crate) struct Surprised;

impl Activity for Surprised {
    fn signature(&self) -> Signature {
        Signature { name: "surprised@1".into(), ..signature() }
    }
    fn run(&self, ctx: Context, _input: Value) -> BoxFuture<'static, Result<Value, Failure>> {
        Box::pin(async move {
            ctx.meter_open("a.0", &opening(10_000)).await?;
            ctx.meter_close("a.0", &closing(CallState::Succeeded, 1_000, 100), None).await?;
            Ok(json!(ctx.info().attempt))
        })
    }
    fn reserve(&self, _input: &Value, _extras: &Value) -> Value {
        serde_json::to_value(one_call()).expect("json")
    }
}

struct Scene {
    bench: Bench,
    hook: Arc<LedgerHook>,
    client: Client,
    worker: WorkerHandle,
}

impl Scene {
    async fn new(credits: i64) -> Self {
        let bench = Bench::new(credits).await;
        let hook = Arc::new(LedgerHook::new(BillingSettings::default()));
        let client = Client::new(bench.pool.clone(), hook.clone());
        let mut config = WorkerConfig::new(bench.pool.clone(), Registry::new().with(Surprised).with(Calls));
        config.hook = hook.clone();
        let worker = worker::start(config).await.expect("worker");
        Self { bench, hook, client, worker }
    }

    async fn attempts(&self, run: RunId) -> i64 {
        sqlx::query_scalar("select count(*) from activity_attempts where run_id = $1")
            .bind(run.0)
            .fetch_one(&self.bench.pool)
            .await
            .expect("count")
    }

    fn whose(&self) -> Value {
        json!({"user_id": self.bench.user.to_string()})
    }

    /// Wakes the run as often as it might wake itself, and waits until it has looked and waits again.
    async fn wake_in_vain(&self, run: RunId, reason: &str) {
        for n in 0..5 {
            let before = self.client.describe(run).await.expect("run").seq;
            let mut tx = self.bench.pool.begin().await.expect("tx");
            assert_eq!(self.client.unblock_in(&mut tx, &self.whose()).await.expect("woken"), 1, "{n}");
            tx.commit().await.expect("commit");
            self.client.wake().await;
            let looked = async {
                let mut seq = before;
                loop {
                    seq = self.client.wait_change(run, seq, Duration::from_secs(1)).await.expect("run");
                    if seq > before && waiting(&self.client, reason).await == run {
                        return;
                    }
                }
            };
            tokio::time::timeout(Duration::from_secs(120), looked).await.expect("it does not look");
        }
    }

    async fn end(self) {
        self.worker.drain(Duration::from_secs(10)).await;
        assert_eq!(self.bench.violations().await, [""; 0]);
    }
}

fn step(activity: &str) -> Value {
    json!([{"id": "call", "kind": {"activity": {"name": activity, "with": {}}}}])
}

// It began anew twice a second, was refused at the same call and gave back what it held, which woke it: until `limit.executions`.
#[tokio::test]
async fn a_step_that_was_stopped_at_a_call_makes_no_attempt_until_that_call_can_be_paid() {
    let scene = Scene::new(5).await;
    let run = start(&scene.bench, &scene.client, step("surprised@1")).await;
    assert_eq!(waiting(&scene.client, "credits").await, run);
    assert_eq!(scene.attempts(run).await, 1, "it may start, and meets the call");
    assert_eq!(scene.bench.balance().await, (5_000_000, 0), "and holds nothing while it waits");
    scene.wake_in_vain(run, "credits").await;
    assert_eq!(scene.attempts(run).await, 1);

    // Some credits, and too few of them.
    assert!(scene.bench.grant("t1", 7).await);
    scene.wake_in_vain(run, "credits").await;
    assert_eq!(scene.attempts(run).await, 1, "12 are there, 12.24 are needed");
    let view = scene.client.describe(run).await.expect("run");
    let said = format!("{:?}", view.waiting);
    assert!(said.contains("needs 12.24 credits, 12 are available"), "{said}");

    // A top-up, as the bot and the command do it.
    let mut tx = scene.bench.pool.begin().await.expect("tx");
    scene.client.unblock_in(&mut tx, &scene.whose()).await.expect("woken");
    let one = MicroCredits::from_credits(1);
    ledger::grant(&mut tx, scene.bench.user, ledger::GrantSource::Promo, "t2", one, None).await.expect("granted");
    tx.commit().await.expect("commit");
    scene.client.wake().await;
    assert_eq!(closed(&scene.client, run).await, RunStatus::Completed);
    assert_eq!(scene.attempts(run).await, 2, "the one that was stopped, and the one that was paid");
    assert_eq!(scene.bench.balance().await, (13_000_000 - CALL_UCR, 0));
    scene.end().await;
}

#[tokio::test]
async fn what_another_run_gives_back_wakes_the_one_that_needs_it() {
    let scene = Scene::new(13).await;
    // Another run of the user holds some.
    let holder = at(&scene.bench, RunId::new(), "hold", 1, &Value::Null);
    let mut tx = scene.bench.pool.begin().await.expect("tx");
    let begins = Transition { ord: 0, run_id: holder.run_id, ended: vec![], started: vec![planning(&holder, 1)] };
    assert!(scene.hook.apply(&mut tx, &[begins]).await.expect("applied").is_empty());
    tx.commit().await.expect("commit");
    let run = start(&scene.bench, &scene.client, step("surprised@1")).await;
    assert_eq!(waiting(&scene.client, "credits").await, run, "11.56 are free");
    scene.wake_in_vain(run, "credits").await;
    assert_eq!(scene.attempts(run).await, 1);

    // It ends in this process, and nobody else tells the one that waits.
    let mut tx = scene.bench.pool.begin().await.expect("tx");
    let end = loopwright_engine::hook::AttemptEnd {
        attempt: holder.clone(),
        outcome: Outcome::Failed,
        failure: None,
        again: false,
    };
    let ends = Transition { ord: 0, run_id: holder.run_id, ended: vec![end], started: vec![] };
    assert!(scene.hook.apply(&mut tx, &[ends]).await.expect("applied").is_empty());
    tx.commit().await.expect("commit");
    let ended = tokio::select! {
        ended = closed(&scene.client, run) => ended,
        never = scene.hook.wake_waiting(&scene.client) => match never {},
    };
    assert_eq!((ended, scene.attempts(run).await), (RunStatus::Completed, 2));
    scene.end().await;
}

#[tokio::test]
async fn a_raised_limit_and_a_raised_cap_wake_the_step_that_they_stopped() {
    for (reason, project) in [(limit::LIMIT, false), ("cap", true)] {
        let scene = Scene::new(100).await;
        let run = RunId::new();
        let mut conn = scene.bench.pool.acquire().await.expect("conn");
        if project {
            sqlx::query("update projects set budget_cap_ucr = 5000000").execute(&mut *conn).await.expect("cap");
        } else {
            let five = MicroCredits::from_credits(5);
            limit::set(&mut conn, scene.bench.user, run.0, "test", five, "test").await.expect("limit");
        }
        crate::billing_worker::start_as(&scene.bench, &scene.client, step("surprised@1"), Some(run)).await;
        assert_eq!(waiting(&scene.client, reason).await, run);
        scene.wake_in_vain(run, reason).await;
        assert_eq!(scene.attempts(run).await, 1, "{reason}");

        let mut tx = scene.bench.pool.begin().await.expect("tx");
        scene.client.unblock_in(&mut tx, &scene.whose()).await.expect("woken");
        if project {
            sqlx::query("update projects set budget_cap_ucr = 12240000").execute(&mut *tx).await.expect("cap");
        } else {
            let more = MicroCredits(7_240_000);
            limit::raise(&mut tx, scene.bench.user, run.0, "more", more, "test").await.expect("raised");
        }
        tx.commit().await.expect("commit");
        scene.client.wake().await;
        assert_eq!(closed(&scene.client, run).await, RunStatus::Completed, "{reason}");
        assert_eq!(scene.attempts(run).await, 2, "{reason}");
        scene.end().await;
    }
}

#[tokio::test]
async fn a_released_account_goes_on_at_once() {
    let scene = Scene::new(100).await;
    sqlx::query("update users set holds_stopped_at = engine_now(), holds_stopped_why = 'I1'")
        .execute(&scene.bench.pool)
        .await
        .expect("stopped");
    let run = start(&scene.bench, &scene.client, step("calls@1")).await;
    assert_eq!(waiting(&scene.client, "review").await, run);
    scene.wake_in_vain(run, "review").await;
    assert_eq!(scene.attempts(run).await, 0);
    let mut tx = scene.bench.pool.begin().await.expect("tx");
    scene.client.unblock_in(&mut tx, &scene.whose()).await.expect("woken");
    assert!(ledger::resume_holds(&mut tx, scene.bench.user).await.expect("released"));
    tx.commit().await.expect("commit");
    scene.client.wake().await;
    assert_eq!(closed(&scene.client, run).await, RunStatus::Completed);
    scene.end().await;
}
