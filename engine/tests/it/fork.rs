//! Forks and resets on a real database: what is shared is not done, copied or settled again.

use crate::{
    archive::exported,
    bench::{Bench, Gate, definition, e, step, work},
};
use loopwright_engine::{
    archive::Archive,
    client::{At, Fork},
    definition::{CallVersion, Data, Input, Kind, ParentClose, WaitUntil},
    ids::RunId,
    view::{Origin, RunStatus},
};
use serde_json::{Map, Value, json};
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};

const GRACE: Duration = Duration::from_secs(10);

fn at(at: At) -> Fork {
    Fork { run_id: None, at, inputs: Map::new(), definition: None, reason: "try".into() }
}

fn seq(seq: u64) -> Fork {
    at(At::Seq(seq))
}

/// Records which step ran in which run, and lets it wait where the test says.
fn watched(bench: &Bench, gate: &Gate) -> Arc<Mutex<Vec<(RunId, String)>>> {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let (gate, log) = (gate.clone(), seen.clone());
    bench.script(move |ctx, input| {
        let (gate, log) = (gate.clone(), log.clone());
        async move {
            log.lock().expect("lock").push((ctx.info().run_id, ctx.info().path.clone()));
            if input["waits"] == true {
                gate.pass().await;
            }
            Ok(input)
        }
    });
    seen
}

fn three() -> loopwright_engine::definition::Definition {
    let mut d = definition(
        "three",
        vec![
            work("a", &[("n", Data::Expr(e("inputs.n")))]),
            work("b", &[("n", Data::Expr(e("inputs.n + steps.a.output.n"))), ("waits", Data::Literal(json!(true)))]),
            work("c", &[]),
        ],
    );
    d.inputs.insert("n".into(), Input { schema: json!({"type": "integer"}), required: true, default: None });
    d.outputs.insert("b".into(), Data::Expr(e("steps.b.output.n")));
    d
}

async fn count(bench: &Bench, sql: &'static str) -> i64 {
    sqlx::query_scalar(sql).fetch_one(&bench.pool).await.expect("count")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fork_shares_the_past_and_has_a_future_of_its_own() {
    let bench = Bench::new().await;
    let gate = Gate::new();
    let seen = watched(&bench, &gate);
    let worker = bench.worker().await;
    let run = bench.start(three(), json!({"n": 1})).await;
    gate.arrived(1).await;
    // The parent is in its second step, and stays there.
    let inputs = json!({"n": 10}).as_object().expect("map").clone();
    let fork = Fork { run_id: Some(RunId::new()), inputs, ..seq(2) };
    let started = bench.client.fork(run, fork.clone()).await.expect("fork");
    assert!(started.created);
    let again = bench.client.fork(run, fork).await.expect("fork");
    assert_eq!((again.created, again.run_id), (false, started.run_id), "the same request is the same fork");
    gate.arrived(1).await;
    let log = seen.lock().expect("lock").clone();
    assert_eq!(
        log,
        [(run, "a".to_owned()), (run, "b".into()), (started.run_id, "b".into())],
        "the first step is not done again"
    );
    gate.open(2);
    let (parent, child) = (bench.closed(run).await, bench.closed(started.run_id).await);
    assert_eq!((parent.output, child.output), (Some(json!({"b": 2})), Some(json!({"b": 11}))));
    assert_eq!(child.forked_from, Some(Origin { run_id: run, seq: 2 }));
    // The past is read from the parent; its rows are nowhere else.
    let (theirs, ours) = (
        bench.client.history(run, 0, 100).await.expect("history"),
        bench.client.history(started.run_id, 0, 100).await.expect("history"),
    );
    assert_eq!(theirs[..2], ours[..2]);
    assert_eq!(ours.iter().map(|r| r.seq).collect::<Vec<_>>(), (1..=child.seq).collect::<Vec<_>>());
    assert_eq!(ours[2].events[0]["type"], "run_forked");
    assert_eq!(ours[2].events[0]["restarted"], json!(["b"]));
    for (after, limit) in [(0, 1), (1, 1), (1, 2), (2, 1), (0, 3), (1, 100)] {
        let page = bench.client.history(started.run_id, after, limit).await.expect("page");
        let from = usize::try_from(after).expect("small");
        assert_eq!(page[..], ours[from..(from + limit as usize).min(ours.len())], "{after} {limit}");
    }
    assert_eq!(count(&bench, "select count(*) from test_starts").await, 5, "a b c, b c");
    let replayed = bench.client.replay(started.run_id, None).await.expect("folds");
    assert_eq!((&replayed.divergence, replayed.folded, replayed.decided), (&None, 3, child.seq - 3));
    let archive = Archive::read(exported(&bench, started.run_id).await.as_bytes()).expect("needs no other");
    assert_eq!(archive.replay(None).expect("folds").divergence, None);
    // Imported, it has the shared rows itself, and they are still its parent's to be decided.
    let there = Bench::new().await;
    let run = there.client.import(archive).await.expect("import");
    assert_eq!(there.client.replay(run, None).await.expect("folds"), replayed);
    let again = Archive::read(exported(&there, run).await.as_bytes()).expect("valid");
    assert_eq!(again.replay(None).expect("folds"), replayed);
    worker.drain(GRACE).await;
    bench.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_step_begins_anew_by_its_path_under_another_definition() {
    let bench = Bench::new().await;
    let gate = Gate::new();
    let seen = watched(&bench, &gate);
    let worker = bench.worker().await;
    gate.open(10);
    let run = bench.start(three(), json!({"n": 1})).await;
    assert_eq!(bench.closed(run).await.status, RunStatus::Completed);
    let mut other = three();
    other.steps[1] = work("b", &[("n", Data::Literal(json!(99)))]);
    let other = bench.deploy(other).await;
    let fork = Fork { definition: Some(other), ..at(At::Step("b".into())) };
    let fork = bench.client.fork(run, fork).await.expect("fork").run_id;
    let view = bench.closed(fork).await;
    assert_eq!((view.output, view.definition), (Some(json!({"b": 99})), other));
    let ran: Vec<String> =
        seen.lock().expect("lock").iter().filter(|(r, _)| *r == fork).map(|(_, p)| p.clone()).collect();
    assert_eq!(ran, ["b", "c"]);
    // A fork of the fork, before and after the place where it branched off.
    let before = bench.client.fork(fork, seq(1)).await.expect("fork").run_id;
    let view = bench.closed(before).await;
    assert_eq!(view.forked_from, Some(Origin { run_id: run, seq: 1 }), "that past is the first run's");
    assert_eq!(view.output, Some(json!({"b": 2})), "under its definition");
    let after = bench.client.fork(fork, at(At::Step("c".into()))).await.expect("fork").run_id;
    let view = bench.closed(after).await;
    assert_eq!((view.forked_from.map(|o| o.run_id), view.output), (Some(fork), Some(json!({"b": 99}))));
    let rows = bench.client.history(after, 0, 100).await.expect("history");
    assert_eq!(rows.iter().map(|r| r.seq).collect::<Vec<_>>(), (1..=view.seq).collect::<Vec<_>>());
    for run in [before, after] {
        assert_eq!(bench.client.replay(run, None).await.expect("folds").divergence, None);
    }
    worker.drain(GRACE).await;
    bench.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reset_ends_the_old_run_and_takes_its_key() {
    let bench = Bench::new().await;
    let gate = Gate::new();
    watched(&bench, &gate);
    let worker = bench.worker().await;
    let hash = bench.deploy(three()).await;
    let run = bench.start_as(hash, json!({"n": 1}), Some("project:1")).await.run_id;
    gate.arrived(1).await;
    let reset = bench.client.reset(run, seq(1)).await.expect("reset");
    assert!(reset.terminated);
    let old = bench.closed(run).await;
    assert_eq!(old.status, RunStatus::Terminated);
    assert!(old.failure.expect("why").message.starts_with("reset to transition 1 as run "));
    assert_eq!(bench.client.open_run("project:1").await.expect("key"), Some(reset.run_id));
    gate.open(10);
    let view = bench.closed(reset.run_id).await;
    assert_eq!((view.status, view.workflow_id.as_deref()), (RunStatus::Completed, Some("project:1")));
    assert_eq!(bench.client.open_run("project:1").await.expect("key"), None);
    // The request comes again, because its answer was lost.
    let again = Fork { run_id: Some(reset.run_id), ..seq(1) };
    let again = bench.client.reset(run, again).await.expect("done before");
    assert_eq!(again, reset);
    // A run that has ended is reset, too; its key is free.
    let second = bench.client.reset(reset.run_id, at(At::Step("c".into()))).await.expect("reset");
    assert!(!second.terminated);
    assert_eq!(bench.closed(second.run_id).await.status, RunStatus::Completed);
    // Not if somebody else has the key by now; then nothing happened.
    let taken = bench.start_as(hash, json!({"n": 5}), Some("project:1")).await.run_id;
    let runs = count(&bench, "select count(*) from runs").await;
    assert_eq!(bench.client.reset(run, seq(1)).await.expect_err("taken").code(), "fork_invalid");
    assert_eq!(count(&bench, "select count(*) from runs").await, runs);
    bench.closed(taken).await;
    worker.drain(GRACE).await;
    bench.audit().await;
    let outcomes = bench.outcomes().await;
    assert_eq!(outcomes.get("Cancelled"), Some(&1), "the old run settled its own attempt: {outcomes:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reset_that_cannot_be_stored_leaves_the_old_run_as_it_was() {
    let bench = Bench::new().await;
    let gate = Gate::new();
    watched(&bench, &gate);
    let worker = bench.worker().await;
    let run = bench.start(three(), json!({"n": 1})).await;
    gate.arrived(1).await;
    let taken = Fork { run_id: Some(run), ..seq(1) };
    assert_eq!(bench.client.reset(run, taken).await.expect_err("taken").code(), "run_exists");
    gate.open(10);
    let view = bench.closed(run).await;
    assert_eq!(view.status, RunStatus::Completed, "its worker was never disturbed");
    worker.drain(GRACE).await;
    bench.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn children_timers_and_signals_belong_to_whoever_waits_for_them() {
    let bench = Bench::new().await;
    let gate = Gate::new();
    watched(&bench, &gate);
    let worker = bench.worker().await;
    bench.deploy(definition("child", vec![work("w", &[("waits", Data::Literal(json!(true)))])])).await;
    let call = Kind::Call {
        workflow: "child".into(),
        version: CallVersion::Latest,
        with: BTreeMap::new(),
        parent_close: ParentClose::Cancel,
    };
    let parent = definition("calls", vec![step("w", Kind::Wait { until: WaitUntil::For(10) }), step("c", call)]);
    let run = bench.start(parent, json!({})).await;
    gate.arrived(1).await;
    let view = bench.client.describe(run).await.expect("run");
    let fork = bench.client.fork(run, seq(view.seq)).await.expect("fork").run_id;
    gate.arrived(1).await;
    let children: Vec<Value> =
        sqlx::query_scalar("select to_jsonb(parent_run_id) from runs where parent_run_id is not null order by run_id")
            .fetch_all(&bench.pool)
            .await
            .expect("children");
    assert_eq!(children, [json!(run), json!(fork)], "each has a child of its own");
    // A child is not reset over the head of its parent, but may be forked.
    let child: uuid::Uuid = sqlx::query_scalar("select run_id from runs where parent_run_id = $1")
        .bind(run.0)
        .fetch_one(&bench.pool)
        .await
        .expect("child");
    assert_eq!(bench.client.reset(RunId(child), seq(1)).await.expect_err("child").code(), "fork_invalid");
    bench.client.terminate(run, "enough").await.expect("terminate");
    gate.open(10);
    assert_eq!(bench.closed(fork).await.status, RunStatus::Completed);
    bench.closed(RunId(child)).await;
    worker.drain(GRACE).await;
    bench.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nonsense_is_refused_with_a_code_and_leaves_nothing() {
    let bench = Bench::new().await;
    let gate = Gate::new();
    watched(&bench, &gate);
    let worker = bench.worker().await;
    gate.open(10);
    let run = bench.start(three(), json!({"n": 1})).await;
    let view = bench.closed(run).await;
    let wrong = json!({"n": "text"}).as_object().expect("map").clone();
    let strange = bench.deploy(definition("strange", vec![])).await;
    for (asked, code) in [
        (seq(0), "fork_invalid"),
        (seq(view.seq), "fork_invalid"),
        (seq(view.seq + 1), "fork_invalid"),
        (seq(u64::MAX), "fork_invalid"),
        (at(At::Step("nowhere".into())), "fork_invalid"),
        (Fork { inputs: wrong, ..seq(1) }, "input_invalid"),
        (Fork { definition: Some(loopwright_engine::ids::DefinitionHash([0; 32])), ..seq(1) }, "definition_not_found"),
        (Fork { reason: "x".repeat(5_000), ..seq(1) }, "too_large"),
    ] {
        let what = format!("{asked:?}");
        assert_eq!(bench.client.fork(run, asked.clone()).await.expect_err("refused").code(), code, "{what}");
        assert_eq!(bench.client.reset(run, asked).await.expect_err("refused").code(), code, "{what}");
    }
    for asked in [seq(1), at(At::Step("a".into()))] {
        assert_eq!(bench.client.fork(RunId::new(), asked.clone()).await.expect_err("no run").code(), "run_not_found");
        assert_eq!(bench.client.reset(RunId::new(), asked).await.expect_err("no run").code(), "run_not_found");
    }
    assert_eq!(count(&bench, "select count(*) from runs").await, 1);
    // A definition in which nothing that had ended has a place, and nothing is open, ends at once.
    let fork = bench.client.fork(run, Fork { definition: Some(strange), ..seq(1) }).await.expect("fork").run_id;
    assert_eq!(bench.closed(fork).await.status, RunStatus::Completed);
    worker.drain(GRACE).await;
    bench.audit().await;
}
