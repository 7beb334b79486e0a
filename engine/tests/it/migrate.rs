//! Runs that go on under another definition, on a real database.

use crate::{
    archive::exported,
    bench::{Bench, Gate, definition, e, step, waits_for, work},
};
use loopwright_engine::{
    Error, Result,
    archive::Archive,
    client::{At, Fork, Migrate, MigrationOutcome, MigrationReport, Signal, Why},
    definition::{CallVersion, Data, Definition, Kind, ParentClose, Step},
    ids::{DefinitionHash, RunId},
    machine::Rule,
    signature::Catalog,
    view::RunStatus,
};
use serde_json::{Map, Value, json};
use std::{collections::BTreeMap, time::Duration};

const GRACE: Duration = Duration::from_secs(10);

fn to(to: DefinitionHash) -> Migrate {
    Migrate {
        to,
        map: BTreeMap::new(),
        reason: "better".into(),
        by: Some("user:1".into()),
        dry_run: false,
        catalog: Catalog::default(),
    }
}

async fn asked(bench: &Bench, run: RunId, hash: DefinitionHash) -> Result<MigrationReport> {
    bench.client.migrate(run, Migrate { dry_run: true, ..to(hash) }).await
}

fn ask() -> Step {
    step("ask", Kind::Await(Box::new(waits_for("go"))))
}

fn old() -> Definition {
    let mut d = definition("doc", vec![work("a", &[("n", Data::Literal(json!(1)))]), ask(), work("z", &[])]);
    d.outputs.insert("is".into(), Data::Literal(json!("old")));
    d
}

/// A step before what has run, one behind it, and another result.
fn new() -> Definition {
    let mut d = old();
    d.steps.insert(0, work("first", &[]));
    d.steps[3] = work("y", &[("n", Data::Expr(e("steps.a.output.n + 1")))]);
    d.outputs.insert("is".into(), Data::Expr(e("steps.y.output.n")));
    d
}

async fn waiting(bench: &Bench, definition: DefinitionHash) -> RunId {
    let run = bench.start_as(definition, json!({}), None).await.run_id;
    bench.until(run, "asks", |v| !v.waiting.is_empty()).await;
    // Out of memory.
    let parked = "select count(*) from runs where owner is null and parked";
    crate::faults::reaches(&bench.pool, parked, 1).await;
    run
}

async fn go(bench: &Bench, run: RunId) -> Result<bool> {
    bench.client.signal(run, Signal { name: "go".into(), payload: json!({"text": "x"}), ..Signal::default() }).await
}

/// Paths of the steps that have begun, in order.
async fn began(bench: &Bench, run: RunId) -> Vec<String> {
    let rows = bench.client.history(run, 0, 1_000).await.expect("history");
    let started = rows.iter().flat_map(|row| &row.events).filter(|e| e["type"] == "step_started");
    started.map(|e| e["path"].as_str().expect("path").to_owned()).collect()
}

async fn everything(bench: &Bench) -> Value {
    let sql = "select jsonb_build_object('runs', (select jsonb_agg(to_jsonb(r)) from runs r), 'history', (select count(*) from history),
                 'ready', (select jsonb_agg(to_jsonb(q)) from ready q), 'former', (select count(*) from former_definitions))";
    sqlx::query_scalar(sql).fetch_one(&bench.pool).await.expect("rows")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_waits_is_asked_about_then_migrated_and_goes_on_under_the_new_steps() {
    let bench = Bench::new().await;
    let worker = bench.worker().await;
    let (before, after) = (bench.deploy(old()).await, bench.deploy(new()).await);
    let run = waiting(&bench, before).await;
    let rows = everything(&bench).await;
    let report = asked(&bench, run, after).await.expect("dry run");
    assert_eq!((report.outcome, report.from, report.violations.len()), (MigrationOutcome::Possible, before, 0));
    assert_eq!(
        report.notes.iter().map(|n| (n.path.as_str(), n.rule)).collect::<Vec<_>>(),
        [("z", Rule::Removed), ("first", Rule::Skipped)]
    );
    assert_eq!(everything(&bench).await, rows, "a dry run changes nothing");
    let report = bench.client.migrate(run, to(after)).await.expect("migrates");
    assert_eq!((report.outcome, report.seq), (MigrationOutcome::Migrated, Some(3)));
    let again = bench.client.migrate(run, to(after)).await.expect("no-op");
    assert_eq!((again.outcome, again.seq), (MigrationOutcome::Unchanged, None));
    assert_eq!(bench.client.describe(run).await.expect("run").definition, after);
    go(&bench, run).await.expect("signal");
    let view = bench.closed(run).await;
    assert_eq!((view.status, &view.output), (RunStatus::Completed, &Some(json!({"is": 2}))));
    assert_eq!(began(&bench, run).await, ["a", "ask", "y"]);

    // Its history is decided again under the definition of each time; under one of them all, it is not.
    let replayed = bench.client.replay(run, None).await.expect("folds");
    assert_eq!((replayed.divergence, replayed.folded, replayed.decided), (None, 1, view.seq - 1));
    assert!(bench.client.replay(run, Some(before)).await.expect("folds").divergence.is_some());
    // A fork before the migration has the definition of then, one behind it that of now.
    let fork = |seq| Fork {
        run_id: None,
        at: At::Seq(seq),
        inputs: Map::new(),
        definition: None,
        attributes: None,
        reason: "try".into(),
    };
    for (seq, is, definition) in [(2, json!("old"), before), (3, json!(2), after)] {
        let fork = bench.client.fork(run, fork(seq)).await.expect("fork").run_id;
        bench.until(fork, "asks", |v| !v.waiting.is_empty()).await;
        go(&bench, fork).await.expect("signal");
        let view = bench.closed(fork).await;
        assert_eq!((view.definition, view.output), (definition, Some(json!({ "is": is }))), "after {seq}");
        assert_eq!(bench.client.replay(fork, None).await.expect("folds").divergence, None);
    }
    // The file has both definitions, and so has whoever imports it.
    let file = exported(&bench, run).await;
    let archive = Archive::read(file.as_bytes()).expect("valid");
    assert_eq!(archive.header.former.iter().map(|f| (f.until, f.definition.hash)).collect::<Vec<_>>(), [(2, before)]);
    assert_eq!(archive.replay(None).expect("folds").divergence, None);
    let there = Bench::new().await;
    there.client.import(archive.clone()).await.expect("import");
    assert_eq!(there.client.replay(run, None).await.expect("folds").divergence, None);
    assert_eq!(
        Archive::read(exported(&there, run).await.as_bytes()).expect("valid").header.former,
        archive.header.former
    );
    let forked = there.client.fork(run, Fork { attributes: Some(json!({})), ..fork(2) }).await.expect("fork").run_id;
    assert_eq!(there.client.describe(forked).await.expect("run").definition, before);
    assert_eq!(there.client.migrate(run, to(before)).await.expect_err("closed").code(), "run_closed");
    worker.drain(GRACE).await;
    bench.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_migrated_says_why_and_stays_as_it_is() {
    let bench = Bench::new().await;
    let gate = Gate::new();
    let held = gate.clone();
    bench.script(move |_, input| {
        let gate = held.clone();
        async move {
            if input["waits"] == true {
                gate.pass().await;
            }
            Ok(input)
        }
    });
    let worker = bench.worker().await;
    let before = bench.deploy(old()).await;
    let run = waiting(&bench, before).await;
    let mut other = old();
    other.steps[1] = work("ask", &[]);
    other.steps[2] = work("z", &[("n", Data::Expr(e("steps.a.output.gone")))]);
    let other = bench.deploy(other).await;
    let rows = everything(&bench).await;
    let report = asked(&bench, run, other).await.expect("dry run");
    assert_eq!(report.outcome, MigrationOutcome::Impossible);
    assert_eq!(report.violations.iter().map(|v| v.rule).collect::<Vec<_>>(), [Rule::KindChanged, Rule::OutputMissing]);
    let refused = bench.client.migrate(run, to(other)).await.expect_err("refused");
    assert!(matches!(&refused, Error::MigrationInvalid(why) if why.len() == 2), "{refused}");
    assert_eq!(refused.code(), "migration_invalid");
    assert_eq!(everything(&bench).await, rows);
    assert_eq!(bench.client.migrate(RunId::new(), to(before)).await.expect_err("none").code(), "run_not_found");
    let unknown = DefinitionHash([9; 32]);
    assert_eq!(bench.client.migrate(run, to(unknown)).await.expect_err("none").code(), "definition_not_found");

    // While an attempt runs: first pause, then wait for its end.
    let busy = |waits| {
        definition(
            "busy",
            vec![work("a", &[("waits", Data::Literal(json!(true)))]), work(if waits { "b" } else { "c" }, &[])],
        )
    };
    let (first, second) = (bench.deploy(busy(true)).await, bench.deploy(busy(false)).await);
    let run = bench.start_as(first, json!({}), None).await.run_id;
    gate.arrived(1).await;
    let report = asked(&bench, run, second).await.expect("dry run");
    assert_eq!((report.outcome, report.running), (MigrationOutcome::Busy, vec!["a".to_owned()]));
    assert_eq!(bench.client.migrate(run, to(second)).await.expect_err("busy").code(), "migration_busy");
    bench.client.pause(run, Why::default()).await.expect("pause");
    bench.until(run, "paused", |v| v.status == RunStatus::Paused).await;
    gate.open(1);
    bench.until(run, "quiet", |v| v.live.is_empty()).await;
    assert_eq!(bench.client.migrate(run, to(second)).await.expect("migrates").outcome, MigrationOutcome::Migrated);
    assert_eq!(bench.client.describe(run).await.expect("run").status, RunStatus::Paused);
    bench.client.resume(run, Why::default()).await.expect("resume");
    bench.closed(run).await;
    assert_eq!(began(&bench, run).await, ["a", "c"]);
    assert_eq!(bench.client.replay(run, None).await.expect("folds").divergence, None);
    assert_eq!(bench.client.migrate(run, to(first)).await.expect_err("closed").code(), "run_closed");
    sqlx::query("update runs set status = 'quarantined' where closed_at is null")
        .execute(&bench.pool)
        .await
        .expect("sql");
    let set_aside: Vec<uuid::Uuid> = sqlx::query_scalar("select run_id from runs where closed_at is null")
        .fetch_all(&bench.pool)
        .await
        .expect("run");
    assert_eq!(
        bench.client.migrate(RunId(set_aside[0]), to(other)).await.expect_err("set aside").code(),
        "run_quarantined"
    );
    worker.drain(GRACE).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signal_and_a_migration_at_once_come_one_after_the_other() {
    let bench = Bench::new().await;
    let worker = bench.worker().await;
    let before = bench.deploy(old()).await;
    let mut strict = new();
    let mut asks = waits_for("go");
    asks.form = Some(json!({"type": "object", "required": ["n"]}));
    strict.steps[2] = step("ask", Kind::Await(Box::new(asks)));
    let after = bench.deploy(strict).await;
    for _ in 0..10 {
        let run = waiting(&bench, before).await;
        let (sent, migrated) = tokio::join!(go(&bench, run), bench.client.migrate(run, to(after)));
        match (&sent, &migrated) {
            // The signal first, and the run has gone on to its end or on its way; or its payload stood in the way.
            (Ok(true), Err(Error::MigrationInvalid(_) | Error::MigrationBusy { .. } | Error::RunClosed(_))) => {}
            // Taken already: `ask` had ended and had not the new form, or was not read any more.
            (Ok(true), Ok(report)) => assert!(report.seq > Some(3), "{report:?}"),
            // The migration first: the payload does not satisfy the new form.
            (Err(Error::SignalInvalid(_)), Ok(_)) => {
                let fits = Signal { name: "go".into(), payload: json!({"n": 1}), ..Signal::default() };
                bench.client.signal(run, fits).await.expect("fits");
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(bench.closed(run).await.status, RunStatus::Completed);
        assert_eq!(bench.client.replay(run, None).await.expect("folds").divergence, None);
    }
    worker.drain(GRACE).await;
    bench.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_late_owner_is_fenced_and_a_child_under_way_is_nobody_elses() {
    let bench = Bench::new().await;
    let gate = bench.gate();
    let worker = bench.worker().await;
    bench.deploy(definition("child", vec![work("w", &[])])).await;
    let call = || {
        let (workflow, version) = ("child".to_owned(), CallVersion::Latest);
        step("c", Kind::Call { workflow, version, with: BTreeMap::new(), parent_close: ParentClose::Cancel })
    };
    let parent = bench.deploy(definition("parent", vec![call()])).await;
    let longer =
        bench.deploy(definition("parent", vec![call(), step("more", Kind::Set { values: BTreeMap::new() })])).await;
    let run = bench.start_as(parent, json!({}), Some("key:1")).await.run_id;
    gate.arrived(1).await;
    // As if a worker had it in memory, and another had begun to write.
    let epoch: i64 = sqlx::query_scalar("select epoch from runs where run_id = $1")
        .bind(run.0)
        .fetch_one(&bench.pool)
        .await
        .expect("epoch");
    bench.client.migrate(run, to(longer)).await.expect("migrates");
    let late = sqlx::query("update runs set seq = seq + 1 where run_id = $1 and epoch = $2").bind(run.0).bind(epoch);
    assert_eq!(late.execute(&bench.pool).await.expect("sql").rows_affected(), 0);
    assert_eq!(bench.client.open_run("key:1").await.expect("key"), Some(run));
    gate.open(1);
    bench.closed(run).await;
    assert_eq!(began(&bench, run).await, ["c", "more"]);
    let children: i64 = sqlx::query_scalar("select count(*) from runs where parent_run_id is not null")
        .fetch_one(&bench.pool)
        .await
        .expect("count");
    assert_eq!(children, 1, "not called again");
    // A run that nobody has begun yet begins under the new definition.
    let early = bench.client.start(loopwright_engine::client::Start {
        run_id: None,
        definition: parent,
        inputs: json!({}),
        workflow_id: None,
        attributes: json!({}),
        queue: "nowhere".into(),
        topic: Some("told".into()),
        admission: Default::default(),
    });
    let early = early.await.expect("start").run_id;
    bench.client.migrate(early, to(longer)).await.expect("migrates");
    let told: i64 = sqlx::query_scalar("select count(*) from outbox where topic = 'told'")
        .fetch_one(&bench.pool)
        .await
        .expect("count");
    assert_eq!(told, 1, "the outside hears of it");
    for table in ["update runs set queue = 'default'", "update ready set queue = 'default'"] {
        sqlx::query(table).execute(&bench.pool).await.expect("sql");
    }
    gate.open(1);
    let view = bench.closed(early).await;
    assert_eq!((view.status, view.definition), (RunStatus::Completed, longer));
    assert_eq!(bench.client.replay(early, None).await.expect("folds").divergence, None);
    worker.drain(GRACE).await;
    bench.audit().await;
}
