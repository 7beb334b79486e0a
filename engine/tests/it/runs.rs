//! Runs from start to end, through deaths, signals, refusals and cancels.

use crate::bench::{Bench, Gate, definition, e, step, work};
use loopwright_engine::{
    Error, Failure,
    client::{Decision, Signal},
    definition::{
        Approval, Await, CallVersion, Data, Input, Kind, OnItemFailure, OnTimeout, ParentClose, Template, WaitUntil,
    },
    view::{RunStatus, Waiting},
};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicU32, Ordering},
    sync::{Arc, Mutex},
    time::Duration,
};

const GRACE: Duration = Duration::from_secs(10);
/// Longer than anything takes: a guard against hangs.
const GUARD: Duration = Duration::from_secs(120);

#[tokio::test(flavor = "multi_thread")]
async fn a_run_goes_from_start_to_end_in_one_transition_per_step() {
    let bench = Bench::new().await;
    let worker = bench.worker().await;
    let mut d = definition(
        "seq",
        vec![
            work("a", &[("n", Data::Expr(e("inputs.n")))]),
            work("b", &[("n", Data::Expr(e("steps.a.output.n + 1")))]),
        ],
    );
    d.inputs.insert("n".into(), Input { schema: json!({"type": "integer"}), required: true, default: None });
    d.outputs.insert("n".into(), Data::Expr(e("steps.b.output.n")));
    let run = bench.start(d, json!({"n": 1})).await;
    let view = bench.closed(run).await;
    assert_eq!((view.status, view.output), (RunStatus::Completed, Some(json!({"n": 2}))));
    assert_eq!(view.seq, 3, "start of a; end of a and start of b; end of b and of the run");
    worker.drain(GRACE).await;
    bench.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_worker_s_attempt_goes_on_elsewhere_from_its_checkpoint() {
    let bench = Bench::new().await;
    let (gate, calls) = (Gate::new(), Arc::new(AtomicU32::new(0)));
    {
        let (gate, calls) = (gate.clone(), calls.clone());
        bench.script(move |ctx, _| {
            let (gate, calls) = (gate.clone(), calls.clone());
            async move {
                for n in 0..3 {
                    let key = format!("call-{n}");
                    if ctx.checkpoint(&key).await?.is_none() {
                        ctx.meter_open(&key, &Value::Null).await?;
                        calls.fetch_add(1, Ordering::SeqCst);
                        ctx.meter_close(&key, &Value::Null, Some((&key, &json!(n)))).await?;
                    }
                    if n == 1 && ctx.info().attempt == 1 {
                        gate.pass().await;
                    }
                }
                Ok(json!({"attempt": ctx.info().attempt}))
            }
        });
    }
    let first = bench.worker().await;
    let run = bench.start(definition("crash", vec![work("a", &[]), work("b", &[])]), json!({})).await;
    gate.arrived(1).await;
    bench.dies(first).await;
    let second = bench.worker().await;
    gate.open(8);
    let view = bench.until(run, "b runs", |v| v.status.is_closed() || v.live.iter().any(|l| l.path == "b")).await;
    if !view.status.is_closed() {
        gate.open(8);
    }
    let view = bench.closed(run).await;
    assert_eq!(view.status, RunStatus::Completed);
    assert_eq!(calls.load(Ordering::SeqCst), 6, "three calls a step, none made twice");
    assert_eq!(bench.outcomes().await, BTreeMap::from([("Lost".into(), 1), ("Succeeded".into(), 2)]));
    second.drain(GRACE).await;
    bench.audit().await;
}

fn waits(id: &str) -> loopwright_engine::definition::Step {
    step(
        id,
        Kind::Await(Box::new(Await {
            signal: "answer".into(),
            timeout_ms: 600_000,
            form: Some(json!({"type": "object", "required": ["text"], "properties": {"text": {"type": "string"}}})),
            show: Some(Template("Which?".into())),
            to: vec![],
            filter: None,
            remind_ms: vec![],
            on_timeout: OnTimeout::Fail,
            default: None,
            approval: None,
            reply: None,
        })),
    )
}

fn answer(text: &str, id: &str) -> Signal {
    Signal {
        name: "answer".into(),
        payload: json!({"text": text}),
        dedupe_id: Some(id.into()),
        sender: Some("user:1".into()),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_parked_run_is_in_nobody_s_memory_and_a_signal_wakes_it_once() {
    let bench = Bench::new().await;
    let worker = bench.worker().await;
    let mut d = definition("ask", vec![waits("first"), waits("second")]);
    d.outputs.insert("got".into(), Data::Expr(e("[steps.first.output.text, steps.second.output.text]")));
    let run = bench.start(d, json!({})).await;
    let view = bench.until(run, "waits", |v| !v.waiting.is_empty()).await;
    assert!(matches!(&view.waiting[0], Waiting::Signal { show: Some(s), .. } if s == "Which?"));
    let parked: bool =
        sqlx::query_scalar("select parked and owner is null from runs").fetch_one(&bench.pool).await.expect("row");
    assert!(parked);
    let bad = Signal { name: "answer".into(), payload: json!({"text": 5}), ..Signal::default() };
    assert!(matches!(bench.client.signal(run, bad).await, Err(Error::SignalInvalid(_))));
    assert!(bench.client.signal(run, answer("one", "m1")).await.expect("sent"));
    assert!(!bench.client.signal(run, answer("one", "m1")).await.expect("duplicate"));
    assert!(bench.client.signal(run, answer("two", "m2")).await.expect("sent"));
    let view = bench.closed(run).await;
    assert_eq!(view.output, Some(json!({"got": ["one", "two"]})));
    assert!(matches!(bench.client.signal(run, answer("late", "m3")).await, Err(Error::RunClosed(_))));
    worker.drain(GRACE).await;
    bench.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_approval_is_answered_by_its_step() {
    let bench = Bench::new().await;
    let worker = bench.worker().await;
    let mut ok = waits("ok");
    if let Kind::Await(spec) = &mut ok.kind {
        spec.signal = "ok".into();
        spec.form = None;
        spec.approval = Some(Approval { quorum: 1, fail_on_reject: true });
    }
    let run = bench.start(definition("approve", vec![ok]), json!({})).await;
    bench.until(run, "waits", |v| !v.waiting.is_empty()).await;
    let wrong = bench.client.approve(run, "other", Decision::Approved, None, None, None).await;
    assert!(matches!(wrong, Err(Error::ApprovalNotWaiting(..))));
    bench.client.approve(run, "ok", Decision::Rejected, Some("no".into()), None, None).await.expect("sent");
    let view = bench.closed(run).await;
    assert_eq!(view.failure.map(|f| f.code), Some("approval.rejected".into()));
    worker.drain(GRACE).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signal_that_no_step_takes_is_refused_with_the_names_that_there_are() {
    let bench = Bench::new().await;
    let mut gate = waits("gate");
    if let Kind::Await(spec) = &mut gate.kind {
        spec.signal = "gate".into();
        spec.form = None;
        spec.approval = Some(Approval { quorum: 1, fail_on_reject: true });
    }
    let run = bench.start(definition("names", vec![gate, waits("w")]), json!({})).await;
    let named = |name: &str| Signal { name: name.into(), ..Signal::default() };
    for name in ["anwser", "w", ""] {
        let Err(Error::SignalInvalid(why)) = bench.client.signal(run, named(name)).await else { panic!("{name}") };
        assert_eq!(why, [format!("no step waits for a signal `{name}`; this workflow's are `answer`, `gate`")]);
    }
    let Err(Error::SignalInvalid(why)) = bench.client.signal(run, named("gate")).await else { panic!("no decision") };
    assert!(why[0].starts_with("at /decision: "), "{why:?}");
    // Before its step waits, before even the run has begun.
    assert!(bench.client.signal(run, answer("early", "m1")).await.expect("kept"));
    let worker = bench.worker().await;
    bench.until(run, "waits", |v| !v.waiting.is_empty()).await;
    let yes = Signal { payload: json!({"decision": "approved"}), sender: Some("user:1".into()), ..named("gate") };
    assert!(bench.client.signal(run, yes).await.expect("sent"));
    assert_eq!(bench.closed(run).await.status, RunStatus::Completed);
    worker.drain(GRACE).await;
    let quiet = bench.start(definition("quiet", vec![work("a", &[])]), json!({})).await;
    let Err(Error::SignalInvalid(why)) = bench.client.signal(quiet, named("x")).await else { panic!("nothing waits") };
    assert_eq!(why, ["no step waits for a signal `x`, nor for any other"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_start_parks_the_run_and_a_grant_lets_it_go_on() {
    let bench = Bench::new().await;
    let gate = bench.gate();
    let worker = bench.worker().await;
    let run = bench.start(definition("broke", vec![work("a", &[]), work("b", &[])]), json!({})).await;
    gate.arrived(1).await;
    bench.hook.refuse.store(true, Ordering::SeqCst);
    gate.open(10);
    let view = bench.until(run, "blocked", |v| v.waiting.iter().any(|w| matches!(w, Waiting::Blocked { .. }))).await;
    assert!(
        view.nodes.iter().any(|n| n.step == "a" && n.status == "succeeded"),
        "the end of a is kept though the start of b is refused"
    );
    bench.hook.refuse.store(false, Ordering::SeqCst);
    let mut tx = bench.pool.begin().await.expect("tx");
    assert_eq!(bench.client.unblock_in(&mut tx, &json!({"user_id": "u1"})).await.expect("woken"), 1);
    tx.commit().await.expect("commit");
    bench.client.wake().await;
    assert_eq!(bench.closed(run).await.status, RunStatus::Completed);
    worker.drain(GRACE).await;
    bench.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cancel_runs_finally_and_terminate_does_not() {
    let bench = Bench::new().await;
    let gate = Gate::new();
    {
        let gate = gate.clone();
        bench.script(move |ctx, input| {
            let gate = gate.clone();
            async move {
                if input.get("clean").is_none() {
                    tokio::select! {
                        () = ctx.cancellation().cancelled() => return Err(Failure::cancelled()),
                        () = gate.pass() => {}
                    }
                }
                Ok(json!(1))
            }
        });
    }
    let worker = bench.worker().await;
    let mut d = definition("stop", vec![work("a", &[])]);
    d.finally = vec![work("clean", &[("clean", Data::Literal(json!(true)))])];
    let hash = bench.deploy(d).await;
    let (one, two) =
        (bench.start_as(hash, json!({}), None).await.run_id, bench.start_as(hash, json!({}), None).await.run_id);
    gate.arrived(2).await;
    bench.client.cancel(one, "enough").await.expect("cancel");
    let view = bench.closed(one).await;
    assert_eq!(view.status, RunStatus::Cancelled);
    bench.client.terminate(two, "now").await.expect("terminate");
    let view = bench.closed(two).await;
    assert_eq!(view.status, RunStatus::Terminated);
    assert!(matches!(bench.client.cancel(two, "again").await, Err(Error::RunClosed(_))));
    worker.drain(GRACE).await;
    bench.audit().await;
    assert_eq!(bench.outcomes().await, BTreeMap::from([("Cancelled".into(), 2), ("Succeeded".into(), 1)]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drained_worker_hands_its_runs_on() {
    let bench = Bench::new().await;
    let gate = Gate::new();
    {
        let gate = gate.clone();
        bench.script(move |ctx, _| {
            let gate = gate.clone();
            async move {
                if ctx.info().attempt == 1 {
                    tokio::select! {
                        () = ctx.cancellation().cancelled() => return Err(Failure::cancelled()),
                        () = gate.pass() => {}
                    }
                }
                Ok(json!(ctx.info().attempt))
            }
        });
    }
    let first = bench.worker().await;
    let run = bench.start(definition("drain", vec![work("a", &[])]), json!({})).await;
    gate.arrived(1).await;
    first.drain(GRACE).await;
    let second = bench.worker().await;
    assert_eq!(bench.closed(run).await.status, RunStatus::Completed);
    assert_eq!(bench.outcomes().await, BTreeMap::from([("Lost".into(), 1), ("Succeeded".into(), 1)]));
    second.drain(GRACE).await;
    bench.audit().await;
}

/// What was bought before the drain is not bought again by the next worker, and nothing is bought in the drain.
#[tokio::test(flavor = "multi_thread")]
async fn a_drained_worker_hears_out_the_call_that_is_under_way() {
    let bench = Bench::new().await;
    let gate = Gate::new();
    let bought = Arc::new(Mutex::new(Vec::new()));
    {
        let (gate, bought) = (gate.clone(), bought.clone());
        bench.script(move |ctx, _| {
            let (gate, bought) = (gate.clone(), bought.clone());
            async move {
                for key in ["one", "two"] {
                    if ctx.checkpoint(key).await?.is_some() {
                        continue;
                    }
                    ctx.meter_open(key, &json!({})).await?;
                    bought.lock().expect("no panic").push((ctx.info().attempt, key));
                    let cut_off = tokio::select! {
                        () = ctx.cancellation().cancelled() => true,
                        () = gate.pass() => false,
                    };
                    ctx.meter_close(key, &json!({}), (!cut_off).then_some((key, &json!(key)))).await?;
                    ctx.check_cancelled()?;
                }
                Ok(json!(ctx.info().attempt))
            }
        });
    }
    let first = bench.worker().await;
    let run = bench.start(definition("drain", vec![work("a", &[])]), json!({})).await;
    gate.arrived(1).await;
    let mut drain = Box::pin(first.drain(GUARD));
    tokio::select! {
        biased;
        () = &mut drain => panic!("nothing but its answer ends a call"),
        // It has begun.
        () = std::future::ready(()) => {}
    }
    let second = bench.worker().await;
    gate.open(8);
    drain.await;
    assert_eq!(bench.closed(run).await.status, RunStatus::Completed);
    assert_eq!(*bought.lock().expect("no panic"), [(1, "one"), (2, "two")], "each was bought once");
    assert_eq!(bench.outcomes().await, BTreeMap::from([("Lost".into(), 1), ("Succeeded".into(), 1)]));
    second.drain(GRACE).await;
    bench.audit().await;
}

/// The time of a drain is bounded, whatever the outside does; a call that was cut off is closed as such.
#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_outlasts_the_drain_is_cut_off() {
    let bench = Bench::new().await;
    let gate = Gate::new();
    {
        let gate = gate.clone();
        bench.script(move |ctx, _| {
            let gate = gate.clone();
            async move {
                if ctx.info().attempt == 1 {
                    ctx.meter_open("one", &json!({})).await?;
                    tokio::select! {
                        () = ctx.cancellation().cancelled() => {}
                        () = gate.pass() => {}
                    }
                    ctx.meter_close("one", &json!({}), Some(("cut off", &json!(true)))).await?;
                    ctx.check_cancelled()?;
                }
                Ok(json!(ctx.checkpoint("cut off").await?))
            }
        });
    }
    let first = bench.worker().await;
    let run = bench.start(definition("drain", vec![work("a", &[])]), json!({})).await;
    gate.arrived(1).await;
    // The gate stays shut.
    first.drain(Duration::from_secs(4)).await;
    let second = bench.worker().await;
    assert_eq!(bench.closed(run).await.status, RunStatus::Completed);
    let outcomes = bench.outcomes().await;
    assert_eq!(outcomes, BTreeMap::from([("Lost".into(), 1), ("Succeeded".into(), 1)]), "it was told to stop, and did");
    let saved = "select value from checkpoints where key = 'cut off'";
    assert_eq!(sqlx::query_scalar::<_, Value>(saved).fetch_one(&bench.pool).await.expect("row"), json!(true));
    second.drain(GRACE).await;
    bench.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_business_key_has_one_open_run_however_many_start_it() {
    let bench = Bench::new().await;
    let hash = bench.deploy(definition("key", vec![waits("w")])).await;
    let starts =
        futures_util::future::join_all((0..20).map(|_| bench.start_as(hash, json!({}), Some("project:1")))).await;
    assert_eq!(starts.iter().filter(|s| s.created).count(), 1);
    assert!(starts.iter().all(|s| s.run_id == starts[0].run_id));
    let worker = bench.worker().await;
    bench.client.signal(starts[0].run_id, answer("x", "1")).await.expect("sent");
    bench.closed(starts[0].run_id).await;
    assert!(bench.start_as(hash, json!({}), Some("project:1")).await.created, "the key is free again");
    worker.drain(GRACE).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_child_run_returns_to_its_parent() {
    let bench = Bench::new().await;
    let worker = bench.worker().await;
    let mut child = definition("child", vec![work("w", &[("x", Data::Expr(e("inputs.x")))])]);
    child.inputs.insert("x".into(), Input { schema: json!({"type": "integer"}), required: true, default: None });
    child.outputs.insert("y".into(), Data::Expr(e("steps.w.output.x * 2")));
    bench.deploy(child).await;
    let call = |x: Value| {
        let with = BTreeMap::from([("x".to_owned(), Data::Literal(x))]);
        Kind::Call { workflow: "child".into(), version: CallVersion::Latest, with, parent_close: ParentClose::Cancel }
    };
    let mut parent = definition("parent", vec![step("c", call(json!(21)))]);
    parent.outputs.insert("y".into(), Data::Expr(e("steps.c.output.y")));
    let run = bench.start(parent, json!({})).await;
    assert_eq!(bench.closed(run).await.output, Some(json!({"y": 42})));
    let bad = bench.start(definition("bad", vec![step("c", call(json!("text")))]), json!({})).await;
    let failure = bench.closed(bad).await.failure.expect("failed");
    assert_eq!((failure.code.as_str(), failure.cause.map(|c| c.code)), ("call.failed", Some("input.invalid".into())));
    worker.drain(GRACE).await;
    bench.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn timers_retries_and_panics_come_to_their_end() {
    let bench = Bench::new().await;
    bench.script(|ctx, input| async move {
        match (input["mode"].as_str(), ctx.info().attempt) {
            (Some("flaky"), 1) => Err(Failure::retryable("transient.network", "x")),
            (Some("flaky"), 2) => panic!("boom"),
            (Some("slow"), _) => std::future::pending().await,
            _ => Ok(json!(ctx.info().attempt)),
        }
    });
    let worker = bench.worker().await;
    let mode = |m: &str| [("mode", Data::Literal(json!(m)))];
    let mut slow = work("slow", &mode("slow"));
    slow.timeouts.run_ms = 50;
    slow.retry.attempts = 1;
    slow.continue_on_error = true;
    let mut d = definition(
        "time",
        vec![step("w", Kind::Wait { until: WaitUntil::For(30) }), work("flaky", &mode("flaky")), slow],
    );
    d.outputs.insert("n".into(), Data::Expr(e("steps.flaky.output")));
    d.outputs.insert("slow".into(), Data::Expr(e("steps.slow.error.type")));
    let run = bench.start(d, json!({})).await;
    assert_eq!(bench.closed(run).await.output, Some(json!({"n": 3, "slow": "timeout.run"})));
    worker.drain(GRACE).await;
    bench.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_runs_on_two_workers_all_end_although_one_dies() {
    let bench = Bench::new().await;
    let (one, two) = (bench.worker().await, bench.worker().await);
    let each = Kind::Foreach {
        list: e("[1, 2, 3]"),
        key: None,
        max_items: 3,
        concurrency: 2,
        on_item_failure: OnItemFailure::FailFast,
        steps: vec![work("i", &[("n", Data::Expr(e("item")))])],
        outputs: None,
    };
    let hash = bench.deploy(definition("many", vec![work("a", &[]), step("each", each), work("z", &[])])).await;
    let mut runs = Vec::new();
    for _ in 0..120 {
        runs.push(bench.start_as(hash, json!({}), None).await.run_id);
    }
    // In the middle of whatever it was doing.
    bench.dies(one).await;
    for run in runs {
        assert_eq!(bench.closed(run).await.status, RunStatus::Completed);
    }
    two.drain(GRACE).await;
    bench.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn deploying_again_changes_nothing_and_an_edit_is_a_new_version() {
    let bench = Bench::new().await;
    let worker = bench.worker().await;
    let first = bench.deploy(definition("v", vec![waits("w")])).await;
    let run = bench.start_as(first, json!({}), None).await.run_id;
    bench.until(run, "waits", |v| !v.waiting.is_empty()).await;
    assert_eq!(bench.deploy(definition("v", vec![waits("w")])).await, first);
    let second = bench.deploy(definition("v", vec![waits("w"), work("more", &[])])).await;
    let versions = bench.client.versions("v").await.expect("versions");
    assert_eq!(versions.iter().map(|v| (v.version, v.current)).collect::<Vec<_>>(), [(2, true), (1, false)]);
    assert_eq!(bench.client.pointer("v", "current").await.expect("pointer"), second);
    bench.client.signal(run, answer("x", "1")).await.expect("sent");
    let view = bench.closed(run).await;
    assert_eq!(view.definition, first, "a run in flight keeps its definition");
    assert!(view.status == RunStatus::Completed);
    worker.drain(GRACE).await;
}

#[tokio::test]
async fn more_runs_than_one_statement_wakes_are_all_woken_once() {
    let bench = Bench::new().await;
    let hash = bench.deploy(definition("many", vec![work("a", &[])])).await;
    // Some are held back, which nobody is to claim, or closed, which hear nothing. A run's shard is its last byte's.
    sqlx::query(
        "insert into runs (shard, run_id, workflow, definition, status, parked, inputs, attributes, admitted, closed_at)
         select get_byte(uuid_send(id), 15) % 128, id, 'many', $1, case when n > 1210 then 'completed' else 'running' end, true, '{}',
                '{\"user_id\": \"u7\"}', n > 10, case when n > 1210 then engine_now() end
         from (select n, gen_random_uuid() as id from generate_series(1, 1220) n) r",
    )
    .bind(&hash.0[..])
    .execute(&bench.pool)
    .await
    .expect("runs");
    for times in 1..=2_i64 {
        let mut tx = loopwright_engine::transaction::begin(&bench.pool).await.expect("begin");
        let woken = bench.client.unblock_in(&mut tx, &json!({"user_id": "u7"})).await.expect("woken");
        tx.commit().await.expect("commit");
        assert_eq!(woken, 1_210);
        let (messages, due, wrong): (i64, i64, i64) = sqlx::query_as(
            "select (select count(*) from inbox where kind = 'unblock' and payload = 'null'), (select count(*) from ready),
                    (select count(*) from runs where inbox_n <> case when closed_at is null then $1 else 0 end)",
        )
        .bind(times)
        .fetch_one(&bench.pool)
        .await
        .expect("count");
        assert_eq!((messages, due, wrong), (times * 1_210, 1_200, 0));
    }
}
