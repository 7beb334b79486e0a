//! Workers that have labels, and runs that ask for some.

use crate::bench::{Bench, definition, step, waits_for, work};
use crate::faults::{GRACE, LONG, reaches};
use loopwright_engine::{
    Error,
    admission::Admission,
    client::{At, Fork, Migrate, Signal, Start},
    definition::{Await, CallVersion, Definition, Kind, ParentClose, Step},
    ids::RunId,
    signature::Catalog,
    view::RunStatus,
    worker::WorkerHandle,
};
use serde_json::{Map, json};
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

fn labelled(name: &str, steps: Vec<Step>, labels: &[&str]) -> Definition {
    Definition { runs_on: labels.iter().map(|l| (*l).to_owned()).collect(), ..definition(name, steps) }
}

fn asks() -> Step {
    step("ask", Kind::Await(Box::new(Await { reply: None, ..waits_for("go") })))
}

/// Who did what: the worker's name and the workflow's step.
type Done = Arc<Mutex<Vec<(String, String)>>>;

async fn worker(bench: &Bench, done: &Done, name: &str, labels: &[&str]) -> WorkerHandle {
    let (done, name) = (done.clone(), name.to_owned());
    bench.script(move |ctx, _| {
        done.lock().expect("lock").push((name.clone(), ctx.info().path.clone()));
        async { Ok(json!({})) }
    });
    bench.worker_having(LONG, labels).await
}

fn pairs(done: &Done) -> Vec<(String, String)> {
    let mut done = done.lock().expect("lock").clone();
    done.sort();
    done
}

fn pair(worker: &str, path: &str) -> (String, String) {
    (worker.to_owned(), path.to_owned())
}

async fn key(bench: &Bench, run: RunId) -> String {
    sqlx::query_scalar("select queue from runs where run_id = $1")
        .bind(run.0)
        .fetch_one(&bench.pool)
        .await
        .expect("a run")
}

async fn held(bench: &Bench, run: RunId) -> Option<String> {
    bench.client.describe(run).await.expect("run").held
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_goes_to_who_has_its_labels_and_delays_nobody_else() {
    let (bench, done) = (Bench::new().await, Done::default());
    // What nobody has, urgent and due for longer than anything else.
    sqlx::query(
        "insert into ready (shard, run_id, queue, priority, due_at)
         select 0, gen_random_uuid(), 'default[mainframe]', 1, engine_now() - interval '1 hour' from generate_series(1, 2000)",
    )
    .execute(&bench.pool)
    .await
    .expect("rows");
    let plain = worker(&bench, &done, "plain", &[]).await;
    let wanted = bench.start(labelled("wanted", vec![work("gpu", &[])], &["gpu", "linux"]), json!({})).await;
    assert_eq!(key(&bench, wanted).await, "default[gpu,linux]");
    let run = bench.start(definition("any", vec![work("any", &[])]), json!({})).await;
    bench.closed(run).await;
    let reason = "for a worker of queue `default` with the labels gpu, linux; none is there";
    assert_eq!(held(&bench, wanted).await.as_deref(), Some(reason));
    // One label is not enough.
    let half = worker(&bench, &done, "half", &["linux"]).await;
    assert_eq!(held(&bench, wanted).await.as_deref(), Some(reason));
    plain.drain(GRACE).await;
    let run = bench.start(labelled("half", vec![work("half", &[])], &["linux"]), json!({})).await;
    bench.closed(run).await;
    let run = bench.start(definition("any", vec![work("again", &[])]), json!({})).await;
    bench.closed(run).await;
    assert_eq!(bench.client.describe(wanted).await.expect("run").status, RunStatus::Pending);
    let whole = worker(&bench, &done, "whole", &["x64", "linux", "gpu"]).await;
    bench.closed(wanted).await;
    assert_eq!(held(&bench, wanted).await, None);
    assert_eq!(pairs(&done), [pair("half", "again"), pair("half", "half"), pair("plain", "any"), pair("whole", "gpu")]);
    let left: i64 = sqlx::query_scalar("select count(*) from ready where queue = 'default[mainframe]'")
        .fetch_one(&bench.pool)
        .await
        .expect("count");
    assert_eq!(left, 2_000);
    half.drain(GRACE).await;
    whole.drain(GRACE).await;
    bench.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_appears_while_a_worker_rests_is_found() {
    let (bench, done) = (Bench::new().await, Done::default());
    let here = worker(&bench, &done, "here", &["gpu"]).await;
    let hash = bench.deploy(labelled("wanted", vec![work("a", &[])], &["gpu"])).await;
    let mut shortest = chrono::Duration::MAX;
    for _ in 0..3 {
        let run = bench.start_as(hash, json!({}), None).await.run_id;
        let view = bench.closed(run).await;
        shortest = shortest.min(view.closed_at.expect("closed") - view.started_at);
    }
    // One of three is quick, also where the machine stands still for a while.
    assert!(shortest < chrono::Duration::seconds(5), "{shortest}");
    let labels: Vec<String> =
        sqlx::query_scalar("select labels from workers").fetch_one(&bench.pool).await.expect("a worker");
    assert_eq!(labels, ["gpu"]);
    here.drain(GRACE).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_child_says_its_own_labels() {
    let (bench, done) = (Bench::new().await, Done::default());
    let call = |workflow: &str| {
        step(
            "call",
            Kind::Call {
                workflow: workflow.into(),
                version: CallVersion::Latest,
                with: BTreeMap::new(),
                parent_close: ParentClose::Cancel,
            },
        )
    };
    bench.deploy(definition("third", vec![work("third", &[])])).await;
    bench.deploy(labelled("second", vec![work("second", &[]), call("third")], &["gpu"])).await;
    let plain = worker(&bench, &done, "plain", &[]).await;
    let run = bench.start(definition("first", vec![work("first", &[]), call("second")]), json!({})).await;
    let waits = "select count(*) from ready where queue = 'default[gpu]' and due_at <= engine_now()";
    reaches(&bench.pool, waits, 1).await;
    let special = worker(&bench, &done, "special", &["gpu"]).await;
    assert_eq!(bench.closed(run).await.status, RunStatus::Completed);
    let keys: Vec<(String, String)> =
        sqlx::query_as("select workflow, queue from runs order by depth").fetch_all(&bench.pool).await.expect("runs");
    assert_eq!(keys, [pair("first", "default"), pair("second", "default[gpu]"), pair("third", "default")]);
    // The others may be anybody's.
    assert!(pairs(&done).contains(&pair("special", "second")), "{:?}", pairs(&done));
    plain.drain(GRACE).await;
    special.drain(GRACE).await;
    bench.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_migration_a_fork_and_a_chain_move_to_the_labels_of_their_definition() {
    let (bench, done) = (Bench::new().await, Done::default());
    let plain = worker(&bench, &done, "plain", &[]).await;
    let before = bench.deploy(definition("doc", vec![asks(), work("z", &[])])).await;
    let run = bench.start_as(before, json!({}), None).await.run_id;
    bench.until(run, "asks", |v| !v.waiting.is_empty()).await;
    reaches(&bench.pool, "select count(*) from runs where owner is null and parked", 1).await;
    let after = bench.deploy(labelled("doc", vec![asks(), work("z", &[])], &["gpu"])).await;
    let to = |hash| Migrate {
        to: hash,
        map: BTreeMap::new(),
        reason: "another pool".into(),
        by: None,
        dry_run: false,
        catalog: Catalog::default(),
    };
    bench.client.migrate(run, to(after)).await.expect("migrates");
    let places: Vec<String> = sqlx::query_scalar("select queue from runs union all select queue from ready")
        .fetch_all(&bench.pool)
        .await
        .expect("rows");
    assert_eq!(places, ["default[gpu]", "default[gpu]"]);
    // And back, and there again.
    bench.client.migrate(run, to(before)).await.expect("migrates");
    assert_eq!(key(&bench, run).await, "default");
    // Nobody may be in the middle of it.
    reaches(&bench.pool, "select count(*) from runs where owner is null and parked", 1).await;
    bench.client.migrate(run, to(after)).await.expect("migrates");
    let fork = |definition| Fork {
        run_id: None,
        at: At::Seq(1),
        inputs: Map::new(),
        definition,
        attributes: None,
        reason: "try".into(),
    };
    let same = bench.client.fork(run, fork(None)).await.expect("fork").run_id;
    let other = bench.client.fork(run, fork(Some(after))).await.expect("fork").run_id;
    assert_eq!((key(&bench, same).await.as_str(), key(&bench, other).await.as_str()), ("default", "default[gpu]"));
    let go = || Signal { name: "go".into(), payload: json!({"text": "x"}), ..Signal::default() };
    bench.client.signal(run, go()).await.expect("signal");
    assert!(held(&bench, run).await.expect("held").contains("the labels gpu"));
    let special = worker(&bench, &done, "special", &["gpu"]).await;
    bench.closed(run).await;
    assert_eq!(pairs(&done), [pair("special", "z")]);
    for fork in [same, other] {
        bench.client.terminate(fork, "enough").await.expect("ends");
    }

    // A chain goes on under the labels of the definition that is current.
    let again = || step("again", Kind::ContinueAsNew { with: BTreeMap::new(), current: true });
    let first = bench.start(definition("chain", vec![asks(), again()]), json!({})).await;
    bench.until(first, "asks", |v| !v.waiting.is_empty()).await;
    bench.deploy(labelled("chain", vec![work("last", &[])], &["gpu"])).await;
    reaches(&bench.pool, "select count(*) from runs where owner is null and parked and closed_at is null", 1).await;
    bench.client.signal(first, go()).await.expect("signal");
    let next = bench.closed(first).await.chain.continued_as.expect("goes on");
    assert_eq!(key(&bench, next).await, "default[gpu]");
    bench.closed(next).await;
    assert_eq!(pairs(&done).last(), Some(&pair("special", "z")));
    assert!(pairs(&done).contains(&pair("special", "last")));
    plain.drain(GRACE).await;
    special.drain(GRACE).await;
    bench.audit().await;
}

#[tokio::test]
async fn no_queue_has_a_name_that_looks_like_labels() {
    let bench = Bench::new().await;
    let hash = bench.deploy(definition("one", vec![work("a", &[])])).await;
    let start = Start {
        run_id: None,
        definition: hash,
        inputs: json!({}),
        workflow_id: None,
        attributes: json!({}),
        queue: "default[gpu]".into(),
        topic: None,
        admission: Admission::default(),
    };
    let error = bench.client.start(start).await.expect_err("refused");
    assert!(matches!(&error, Error::InputInvalid(why) if why[0].contains("runs-on")), "{error}");
    // What has none is what it was.
    let plain = definition("one", vec![]);
    assert!(serde_json::to_value(&plain).expect("json").get("runs_on").is_none());
    assert_eq!((plain.lowest_format(), labelled("one", vec![], &["gpu"]).lowest_format()), (1, 3));
}
