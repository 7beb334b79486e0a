//! People: await and approve.

use crate::bench::Bench;
use loopwright_engine::{
    Error,
    client::{Client, Decision, Signal, Update},
    hook::NoHook,
    view::{Answer, RunStatus, Waiting},
};
use serde_json::json;
use std::{sync::Arc, time::Duration};

fn ask(more: &str) -> String {
    format!(
        r#"
inputs: {{ color: {{ type: string, default: red }} }}
steps:
  - id: before
    uses: work@1
    with: {{ gate: x }}
  - id: ask
    await:
      signal: answer
      to: ["role:owner"]
      show: "Is it {{{{inputs.color}}}}?"
      form: {{ type: object, required: [text], properties: {{ text: {{ type: string, minLength: 1 }} }} }}
{more}
outputs: {{ text: "${{{{ steps.ask.output.text }}}}", by: "${{{{ default(steps.ask.by, 'nobody') }}}}", timed_out: "${{{{ steps.ask.timed_out }}}}" }}
"#
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_must_satisfy_the_form_and_is_read_once() {
    let bench = Bench::new().await;
    bench.world.open("x", 1);
    let run = bench.start(&ask("      timeout: 1h"), json!({})).await;
    let view = bench.waits(run).await;
    let Waiting::Signal { show, to, form, signal, .. } = &view.waiting[0] else { panic!("{view:#?}") };
    assert_eq!((show.as_deref(), signal.as_str()), (Some("Is it red?"), "answer"));
    assert!(to == &["role:owner"] && form.is_some());
    let send = |payload, id: &str| {
        let signal =
            Signal { name: "answer".into(), payload, dedupe_id: Some(id.into()), sender: Some("user:1".into()) };
        bench.client.signal(run, signal)
    };
    let refused = send(json!({"text": ""}), "m0").await;
    assert!(matches!(&refused, Err(Error::SignalInvalid(why)) if why[0].contains("/text")), "{refused:?}");
    assert!(send(json!({"text": "yes"}), "m1").await.expect("sent"));
    let twice = send(json!({"text": "no"}), "m1").await;
    assert!(matches!(twice, Ok(false) | Err(Error::RunClosed(_))), "the same message again: {twice:?}");
    assert_eq!(bench.output(run).await, json!({"text": "yes", "by": "user:1", "timed_out": false}));
    bench.done().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_early_signal_is_kept_until_somebody_waits_for_it() {
    let bench = Bench::new().await;
    let run = bench.start(&ask("      timeout: 1h"), json!({})).await;
    bench.world.arrived("x", 1).await;
    assert!(bench.signal(run, "answer", json!({"text": "early"})).await);
    bench.world.open("x", 1);
    assert_eq!(bench.output(run).await["text"], "early");
    bench.done().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn silence_takes_the_default_or_fails() {
    let bench = Bench::new().await;
    bench.world.open("x", 2);
    let silent = ask(
        "      timeout: 60ms\n      on-timeout: default\n      default: { text: \"nothing about ${{ inputs.color }}\" }",
    );
    let out = bench.completes(&silent, json!({})).await;
    assert_eq!(out, json!({"text": "nothing about red", "by": "nobody", "timed_out": true}));
    let failing = ask("      timeout: 1s\n      remind: [10ms, 20ms]");
    let run = bench.start(&failing, json!({})).await;
    assert_eq!(bench.failure(run).await.code, "signal.timeout");
    let reminders = bench.events(run).await.into_iter().filter(|e| e["type"] == "reminded").count();
    assert_eq!(reminders, 2);
    bench.done().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_filter_leaves_other_messages_for_others() {
    let bench = Bench::new().await;
    let body = r#"
steps:
  - id: mine
    await: { signal: note, timeout: 1h, where: "signal.kind == 'mine' && signal.meta.by == 'user:1'" }
  - id: any
    await: { signal: note, timeout: 1h }
outputs: { mine: "${{ steps.mine.output.n }}", any: "${{ steps.any.output.n }}" }
"#;
    let run = bench.start(body, json!({})).await;
    bench.waits(run).await;
    bench.signal(run, "note", json!({"kind": "other", "n": 1})).await;
    bench.signal(run, "note", json!({"kind": "mine", "n": 2})).await;
    assert_eq!(bench.output(run).await, json!({"mine": 2, "any": 1}));
    bench.done().await;
}

fn gate(options: &str) -> String {
    format!(
        r#"
steps:
  - id: ok
    approve: {{ to: ["role:owner"], show: "Go?", {options} }}
outputs: {{ decision: "${{{{ steps.ok.output.decision }}}}", comment: "${{{{ steps.ok.output.comment }}}}" }}
"#
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn an_approval_is_approved_or_rejected_by_somebody() {
    let bench = Bench::new().await;
    let run = bench.start(&gate("timeout: 1h"), json!({})).await;
    let view = bench.waits(run).await;
    assert!(matches!(&view.waiting[0], Waiting::Approval { step, show: Some(s), .. } if step == "ok" && s == "Go?"));
    bench.approve(run, "ok", Decision::Approved, "fine", "user:1").await;
    assert_eq!(bench.output(run).await, json!({"decision": "approved", "comment": "fine"}));
    let late = bench.client.approve(run, "ok", Decision::Approved, None, None, None).await;
    assert!(matches!(late, Err(Error::RunClosed(_))));
    let run = bench.start(&gate("timeout: 1h"), json!({})).await;
    bench.waits(run).await;
    bench.approve(run, "ok", Decision::Rejected, "too dear", "user:1").await;
    let failure = bench.failure(run).await;
    assert_eq!((failure.code.as_str(), failure.message.as_str()), ("approval.rejected", "rejected: too dear"));
    let run = bench.start(&gate("timeout: 1h, on-reject: continue"), json!({})).await;
    bench.waits(run).await;
    bench.approve(run, "ok", Decision::Rejected, "no", "user:1").await;
    assert_eq!(bench.output(run).await["decision"], "rejected");
    bench.done().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn requested_changes_lead_back_and_the_comment_comes_along() {
    let bench = Bench::new().await;
    let body = r#"
steps:
  - id: plan
    uses: work@1
    with: { value: { changes: "${{ round.number == 1 ? '' : round.previous.ok.comment }}" } }
  - id: ok
    approve: { to: ["role:owner"], timeout: 1h }
    redo: { from: plan, if: "steps.ok.output.decision == 'changes_requested'", max-rounds: 3, exhausted: fail }
outputs: { changes: "${{ steps.plan.output.changes }}", rounds: "${{ steps.ok.output.decision }}" }
"#;
    let run = bench.start(body, json!({})).await;
    for (round, decision) in [(1, Decision::ChangesRequested), (2, Decision::Approved)] {
        let path = format!("plan..ok~{round}/ok");
        bench
            .until(run, "the round's approval", |v| {
                v.waiting.iter().any(|w| matches!(w, Waiting::Approval { path: p, .. } if *p == path))
            })
            .await;
        bench.approve(run, "ok", decision, "smaller", "user:1").await;
    }
    assert_eq!(bench.output(run).await, json!({"changes": "smaller", "rounds": "approved"}));
    bench.done().await;
}

/// How many sessions of this database wait for a lock.
async fn blocked(bench: &Bench, sessions: i64) {
    let waiting =
        "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'";
    let deadline = tokio::time::Instant::now() + crate::bench::PATIENCE;
    while sqlx::query_scalar::<_, i64>(waiting).fetch_one(&bench.pool).await.expect("count") != sessions {
        assert!(tokio::time::Instant::now() < deadline, "{sessions} wait");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_decision_does_not_meet_a_later_round() {
    let bench = Bench::new().await;
    let body = r#"
steps:
  - id: plan
    uses: work@1
    with: { value: 1 }
  - id: ok
    approve: { to: ["role:owner"], timeout: 1h }
    redo: { from: plan, if: "steps.ok.output.decision == 'changes_requested'", max-rounds: 3, exhausted: fail }
"#;
    let run = bench.start(body, json!({})).await;
    let first = bench.waits(run).await;
    // The other's decision is read and not yet committed when ours looks what waits.
    let mut history = bench.pool.begin().await.expect("transaction");
    sqlx::query("lock table history in share mode").execute(&mut *history).await.expect("locked");
    bench.approve(run, "ok", Decision::ChangesRequested, "smaller", "user:2").await;
    blocked(&bench, 1).await;
    let mut row = bench.pool.begin().await.expect("transaction");
    sqlx::query("select from runs where run_id = $1 for update").bind(run.0).execute(&mut *row).await.expect("locked");
    history.rollback().await.expect("released");
    blocked(&bench, 1).await;
    let client = bench.client.clone();
    let ours = tokio::spawn(async move { client.approve(run, "ok", Decision::Approved, None, None, None).await });
    blocked(&bench, 2).await;
    row.rollback().await.expect("released");
    let answer = ours.await.expect("answered");
    assert!(matches!(answer, Err(Error::ApprovalNotWaiting(..))), "{answer:?}");
    let second = bench.until(run, "the second round", |v| v.waiting.len() == 1 && v.waiting != first.waiting).await;
    assert_eq!(second.status, RunStatus::Running, "the second plan was not approved");
    bench.approve(run, "ok", Decision::Approved, "", "user:1").await;
    bench.output(run).await;
    bench.done().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_decision_on_a_round_that_ended_is_refused_while_the_next_one_waits() {
    let bench = Bench::new().await;
    let body = r#"
steps:
  - id: plan
    uses: work@1
    with: { value: 1 }
  - id: ok
    approve: { to: ["role:owner"], timeout: 1h }
    redo: { from: plan, if: "steps.ok.output.decision == 'changes_requested'", max-rounds: 3, exhausted: fail }
"#;
    let run = bench.start(body, json!({})).await;
    let first = bench.waits(run).await;
    // One connection: ours looks what waits, then it is the test's turn, and ours decides after that.
    let pool = sqlx::postgres::PgPoolOptions::new().max_connections(1);
    let pool = pool.connect_with((*bench.pool.connect_options()).clone()).await.expect("pool");
    let one = pool.acquire().await.expect("connection");
    let client = Client::new(pool.clone(), Arc::new(NoHook));
    let mut ours = Box::pin(client.approve(run, "ok", Decision::Approved, None, None, None));
    let begun = tokio::time::timeout(Duration::ZERO, &mut ours).await;
    assert!(begun.is_err(), "ours waits for the connection");
    let mut turn = Box::pin(pool.acquire());
    assert!(tokio::time::timeout(Duration::ZERO, &mut turn).await.is_err(), "the test waits behind ours");
    drop(one);
    let turn = tokio::select! {
        early = &mut ours => panic!("decided without a second look: {early:?}"),
        turn = &mut turn => turn.expect("connection"),
    };
    bench.approve(run, "ok", Decision::ChangesRequested, "smaller", "user:2").await;
    bench.until(run, "the second round", |v| v.waiting.len() == 1 && v.waiting != first.waiting).await;
    drop(turn);
    let answer = ours.await;
    assert!(matches!(answer, Err(Error::ApprovalNotWaiting(..))), "{answer:?}");
    bench.approve(run, "ok", Decision::Approved, "", "user:1").await;
    bench.output(run).await;
    bench.done().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_deciding_is_what_on_timeout_says() {
    let bench = Bench::new().await;
    let reject = bench.start(&gate("timeout: 50ms, on-timeout: reject"), json!({})).await;
    assert_eq!(bench.failure(reject).await.code, "approval.rejected");
    let on = bench.completes(&gate("timeout: 50ms, on-timeout: reject, on-reject: continue"), json!({})).await;
    assert_eq!(on["decision"], "rejected");
    assert_eq!(bench.fails(&gate("timeout: 50ms"), json!({})).await.code, "approval.timeout");
    bench.done().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_quorum_counts_people_not_clicks() {
    let bench = Bench::new().await;
    let run = bench.start(&gate("timeout: 1h, quorum: 2"), json!({})).await;
    bench.waits(run).await;
    bench.approve(run, "ok", Decision::Approved, "", "user:1").await;
    bench.approve(run, "ok", Decision::Approved, "", "user:1").await;
    let two = |e: &serde_json::Value| e["type"] == "signal_consumed" || e["type"] == "decision_counted";
    let deadline = tokio::time::Instant::now() + crate::bench::PATIENCE;
    while bench.events(run).await.iter().filter(|e| two(e)).count() < 2 {
        assert!(tokio::time::Instant::now() < deadline, "both clicks are read");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(bench.client.describe(run).await.expect("run").status, RunStatus::Running);
    bench.approve(run, "ok", Decision::Approved, "", "user:2").await;
    assert_eq!(bench.output(run).await["decision"], "approved");
    bench.done().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_await_replies_to_whoever_sends_an_update() {
    let bench = Bench::new().await;
    let body = r#"
inputs: { price: { type: integer, default: 3 } }
steps:
  - id: order
    await:
      signal: order
      timeout: 1h
      form: { type: object, required: [n], properties: { n: { type: integer } } }
      reply: { total: "${{ signal.n * inputs.price }}", for: "${{ signal.meta.by }}" }
outputs: { n: "${{ steps.order.output.n }}" }
"#;
    let run = bench.start(body, json!({})).await;
    let send = |id: &str, payload| {
        let update = Update { name: "order".into(), payload, id: Some(id.into()), sender: Some("user:1".into()) };
        bench.client.update(run, update, Duration::from_secs(60))
    };
    let wrong = send("u0", json!({"n": "x"})).await.expect("answered");
    assert!(matches!(wrong.answer, Answer::Rejected { .. }), "{wrong:?}");
    let right = send("u1", json!({"n": 2})).await.expect("answered");
    assert_eq!(right.answer, Answer::Completed { result: json!({"total": 6, "for": "user:1"}) });
    assert_eq!(bench.output(run).await, json!({"n": 2}));
    bench.done().await;
}
