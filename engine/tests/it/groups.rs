//! Runs that begin when there is a place, or when it is time.

use crate::{
    bench::{Bench, Gate, definition, e, step, work},
    faults::{GRACE, LONG},
};
use loopwright_engine::{
    Error,
    admission::{Admission, IdConflict, OnConflict, Place, Rate},
    client::{At, Fork, Start, Why},
    definition::{CallVersion, Concurrency, Data, Definition, Kind, ParentClose},
    ids::{DefinitionHash, RunId},
    view::RunStatus,
};
use serde_json::json;
use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

/// A definition whose runs share a group of that limit.
fn grouped(name: &str, limit: u32, on_conflict: OnConflict) -> Definition {
    let mut definition = definition(name, vec![work("a", &[]), work("b", &[])]);
    let group = Data::Concat(vec![Data::Literal(json!("deploy-")), Data::Expr(e("1 + 1"))]);
    definition.concurrency = Some(Concurrency { group, limit, on_conflict });
    definition
}

fn request(definition: DefinitionHash, admission: Admission) -> Start {
    Start {
        run_id: None,
        definition,
        inputs: json!({}),
        workflow_id: None,
        attributes: json!({ "user_id": "u1" }),
        queue: String::new(),
        topic: None,
        admission,
    }
}

async fn start(bench: &Bench, definition: DefinitionHash) -> RunId {
    bench.client.start(request(definition, Admission::default())).await.expect("start").run_id
}

/// Attempts wait at the gate; the most that were there at the same time.
fn counted(bench: &Bench, gate: &Gate) -> Arc<AtomicUsize> {
    let (now, most): (Arc<AtomicUsize>, Arc<AtomicUsize>) = Default::default();
    let (gate, seen) = (gate.clone(), most.clone());
    bench.script(move |_, _| {
        let (gate, now, most) = (gate.clone(), now.clone(), seen.clone());
        async move {
            most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            gate.pass().await;
            now.fetch_sub(1, Ordering::SeqCst);
            Ok(json!({}))
        }
    });
    most
}

#[tokio::test]
async fn a_group_is_never_fuller_than_its_limit_and_goes_on_in_the_order_of_arrival() {
    let (bench, gate) = (Bench::new().await, Gate::new());
    let most = counted(&bench, &gate);
    let hash = bench.deploy(grouped("deploys", 2, OnConflict::Queue)).await;
    let mut runs = Vec::new();
    for _ in 0..5 {
        runs.push(start(&bench, hash).await);
    }
    let worker = bench.worker_with(LONG, 8).await;
    gate.arrived(2).await;
    let last = bench.client.describe(runs[4]).await.unwrap();
    assert_eq!(last.status, RunStatus::Pending);
    assert_eq!(last.held.as_deref(), Some("for a place in concurrency group `deploy-2`, behind 2 others"));
    // A message does not let it in.
    bench.client.pause(runs[4], Why::default()).await.unwrap();
    bench.client.resume(runs[4], Why::default()).await.unwrap();
    gate.open(1_000);
    let mut begun = Vec::new();
    for run in &runs {
        assert_eq!(bench.closed(*run).await.status, RunStatus::Completed);
        let first = bench.client.history(*run, 0, 1).await.unwrap();
        begun.push(first[0].at);
    }
    assert!(begun[1] <= begun[2] && begun[2] <= begun[3] && begun[3] <= begun[4], "{begun:?}");
    assert_eq!(most.load(Ordering::SeqCst), 2);
    worker.drain(GRACE).await;
    bench.audit().await;
    let left: i64 = sqlx::query_scalar("select count(*) from admissions").fetch_one(&bench.pool).await.unwrap();
    assert_eq!(left, 0);
}

#[tokio::test]
async fn a_place_outlives_its_holders_worker_and_goes_with_its_holder() {
    let (bench, gate) = (Bench::new().await, Gate::new());
    let most = counted(&bench, &gate);
    let hash = bench.deploy(grouped("deploys", 1, OnConflict::Queue)).await;
    let (first, cancelled, second, third) =
        (start(&bench, hash).await, start(&bench, hash).await, start(&bench, hash).await, start(&bench, hash).await);
    let worker = bench.worker().await;
    gate.arrived(1).await;
    bench.dies(worker).await;
    // Who waits and is cancelled is gone, without a place; its worker is dead, another one sees to it.
    bench.client.cancel(cancelled, "not needed").await.unwrap();
    let worker = bench.worker_with(LONG, 8).await;
    assert_eq!(bench.closed(cancelled).await.status, RunStatus::Terminated);
    // The first was taken over with its place; nobody else has begun.
    gate.arrived(1).await;
    assert_eq!(bench.client.describe(second).await.unwrap().status, RunStatus::Pending);
    bench.client.terminate(first, "enough").await.unwrap();
    gate.arrived(1).await;
    assert_ne!(bench.client.describe(second).await.unwrap().status, RunStatus::Pending);
    assert_eq!(bench.client.describe(third).await.unwrap().status, RunStatus::Pending);
    gate.open(1_000);
    assert_eq!(bench.closed(third).await.status, RunStatus::Completed);
    assert_eq!(bench.closed(second).await.status, RunStatus::Completed);
    worker.drain(GRACE).await;
    bench.audit().await;
    // The attempt of the dead worker never left the gate.
    assert!(most.load(Ordering::SeqCst) <= 3);
}

#[tokio::test]
async fn the_newest_takes_the_place_or_is_refused() {
    let (bench, gate) = (Bench::new().await, Gate::new());
    counted(&bench, &gate);
    gate.open(1_000);
    let hash = bench.deploy(grouped("previews", 1, OnConflict::CancelRunning)).await;
    let mut runs = Vec::new();
    for _ in 0..3 {
        runs.push(start(&bench, hash).await);
    }
    let worker = bench.worker_with(LONG, 8).await;
    assert_eq!(bench.closed(runs[2]).await.status, RunStatus::Completed);
    assert_eq!(bench.closed(runs[1]).await.status, RunStatus::Terminated, "it waited");
    let oldest = bench.closed(runs[0]).await.status;
    assert!([RunStatus::Cancelled, RunStatus::Completed].contains(&oldest), "{oldest:?}");

    let place = Place { group: "strict".into(), limit: 1, on_conflict: OnConflict::Fail };
    let strict = Admission { place: Some(place), ..Admission::default() };
    let awaits = definition(
        "waits",
        vec![step("pause", Kind::Wait { until: loopwright_engine::definition::WaitUntil::For(3_600_000) })],
    );
    let hash = bench.deploy(awaits).await;
    let held = bench.client.start(request(hash, strict.clone())).await.unwrap().run_id;
    let refused = bench.client.start(request(hash, strict.clone())).await.unwrap_err();
    assert_eq!(refused.code(), "concurrency_full");
    assert!(matches!(&refused, Error::ConcurrencyFull(group) if group == "strict"));
    // Asked again for the run that there is: no second place.
    let again = bench.client.start(Start { run_id: Some(held), ..request(hash, strict.clone()) }).await.unwrap();
    assert!(!again.created);
    bench.client.terminate(held, "done").await.unwrap();
    let next = bench.client.start(request(hash, strict)).await.unwrap().run_id;
    bench.client.terminate(next, "done").await.unwrap();
    worker.drain(GRACE).await;
    bench.audit().await;
}

#[tokio::test]
async fn who_gives_way_is_cancelled_before_it_begins_and_names_the_holder() {
    let (bench, gate) = (Bench::new().await, Gate::new());
    let most = counted(&bench, &gate);
    let mut definition = grouped("child", 1, OnConflict::CancelNew);
    definition.finally = vec![work("clean", &[])];
    definition.format = definition.lowest_format();
    assert_eq!(definition.format, 4, "a release that does not know it leaves its runs alone");
    let hash = bench.deploy(definition).await;
    let call = Kind::Call {
        workflow: "child".into(),
        version: CallVersion::Latest,
        with: BTreeMap::new(),
        parent_close: ParentClose::Cancel,
    };
    let parent = bench.deploy(self::definition("parent", vec![step("sub", call)])).await;
    let holder = start(&bench, hash).await;
    let worker = bench.worker_with(LONG, 8).await;
    gate.arrived(1).await;
    // A start, a start that named the group itself and continues under its name, and a call.
    let place = Place { group: "deploy-2".into(), limit: 1, on_conflict: OnConflict::CancelNew };
    let plain = bench.deploy(self::definition("plain", vec![work("a", &[])])).await;
    let named = Admission { place: Some(place), ..Admission::default() };
    let second = start(&bench, hash).await;
    let third = bench.client.start(request(plain, named.clone())).await.expect("start");
    assert!(third.created);
    for run in [second, third.run_id] {
        let view = bench.closed(run).await;
        assert_eq!(view.status, RunStatus::Cancelled);
        let why = view.failure.expect("why");
        let (code, text) = (why.code.as_str(), why.message);
        assert_eq!(code, "cancelled");
        assert!(text.contains(&holder.to_string()) && text.contains("`deploy-2`"), "{text}");
        let rows = bench.client.history(run, 0, 10).await.expect("history");
        assert_eq!(rows.len(), 1, "one transition: {rows:?}");
        assert_eq!(bench.client.replay(run, None).await.expect("replay").divergence, None);
    }
    let parent = start(&bench, parent).await;
    let failed = bench.closed(parent).await;
    assert_eq!((failed.status, failed.failure.expect("why").code.as_str()), (RunStatus::Failed, "call.cancelled"));
    gate.open(1_000);
    assert_eq!(bench.closed(holder).await.status, RunStatus::Completed);
    // The place is free again, and so it is for who gives way.
    let next = bench.client.start(request(plain, named)).await.expect("start").run_id;
    assert_eq!(bench.closed(next).await.status, RunStatus::Completed);
    assert_eq!(bench.closed(start(&bench, hash).await).await.status, RunStatus::Completed);
    assert_eq!(most.load(Ordering::SeqCst), 1);
    worker.drain(GRACE).await;
    bench.audit().await;
}

#[tokio::test]
async fn who_ends_the_holder_under_its_id_gives_way_to_nobody() {
    let (bench, gate) = (Bench::new().await, Gate::new());
    counted(&bench, &gate);
    gate.open(1_000);
    let hash = bench.deploy(grouped("deploys", 1, OnConflict::CancelNew)).await;
    let start = async |id_conflict| {
        let admission = Admission { id_conflict, ..Admission::default() };
        let start = Start { workflow_id: Some("one".into()), ..request(hash, admission) };
        bench.client.start(start).await.expect("start").run_id
    };
    let (old, new) = (start(IdConflict::UseExisting).await, start(IdConflict::TerminateExisting).await);
    let worker = bench.worker_with(LONG, 8).await;
    assert_eq!(bench.closed(old).await.status, RunStatus::Terminated);
    assert_eq!(bench.closed(new).await.status, RunStatus::Completed, "the place was free");
    worker.drain(GRACE).await;
    bench.audit().await;
}

#[tokio::test]
async fn a_fork_waits_where_a_start_gives_way() {
    let (bench, gate) = (Bench::new().await, Gate::new());
    let most = counted(&bench, &gate);
    let hash = bench.deploy(grouped("deploys", 1, OnConflict::CancelNew)).await;
    let holder = start(&bench, hash).await;
    let worker = bench.worker_with(LONG, 8).await;
    gate.arrived(1).await;
    let asked = Fork {
        run_id: None,
        at: At::Seq(1),
        inputs: Default::default(),
        definition: None,
        attributes: None,
        reason: "again".into(),
    };
    let fork = bench.client.fork(holder, asked).await.expect("forked").run_id;
    let held = bench.client.describe(fork).await.expect("run").held;
    assert!(held.expect("waits").contains("`deploy-2`"));
    gate.open(1_000);
    for run in [holder, fork] {
        assert_eq!(bench.closed(run).await.status, RunStatus::Completed);
    }
    assert_eq!(most.load(Ordering::SeqCst), 1);
    worker.drain(GRACE).await;
    bench.audit().await;
}

#[tokio::test]
async fn a_child_and_a_fork_wait_for_a_place_too() {
    let (bench, gate) = (Bench::new().await, Gate::new());
    let most = counted(&bench, &gate);
    bench.deploy(grouped("child", 1, OnConflict::Fail)).await;
    let call = |id: &str| {
        step(
            id,
            Kind::Call {
                workflow: "child".into(),
                version: CallVersion::Latest,
                with: BTreeMap::new(),
                parent_close: ParentClose::Cancel,
            },
        )
    };
    let hash = bench.deploy(definition("parent", vec![call("sub")])).await;
    let parents = [start(&bench, hash).await, start(&bench, hash).await];
    gate.open(1_000);
    let worker = bench.worker_with(LONG, 8).await;
    for parent in parents {
        assert_eq!(bench.closed(parent).await.status, RunStatus::Completed);
    }
    assert_eq!(most.load(Ordering::SeqCst), 1);
    worker.drain(GRACE).await;
    bench.audit().await;
}

#[tokio::test]
async fn a_child_that_waits_for_the_place_of_its_parent_ends_with_it() {
    for parent_close in [ParentClose::Cancel, ParentClose::Terminate] {
        let bench = Bench::new().await;
        bench.deploy(grouped("child", 1, OnConflict::Queue)).await;
        let call =
            Kind::Call { workflow: "child".into(), version: CallVersion::Latest, with: BTreeMap::new(), parent_close };
        let mut parent = grouped("parent", 1, OnConflict::Queue);
        parent.steps = vec![step("sub", call)];
        let hash = bench.deploy(parent).await;
        let worker = bench.worker_with(LONG, 8).await;
        let parent = start(&bench, hash).await;
        let held = "select count(*) from runs where parent_run_id is not null and not admitted";
        crate::faults::reaches(&bench.pool, held, 1).await;
        bench.client.cancel(parent, "enough").await.expect("sent");
        assert_eq!(bench.closed(parent).await.status, RunStatus::Cancelled, "{parent_close:?}");
        worker.drain(GRACE).await;
        bench.audit().await;
    }
}

#[tokio::test]
async fn the_last_place_under_a_lower_limit_stays_empty_until_enough_have_left() {
    let bench = Bench::new().await;
    let hash = bench.deploy(definition("shared", vec![work("a", &[])])).await;
    let admission = |limit| {
        let place = Place { group: "shared".into(), limit, on_conflict: OnConflict::Queue };
        Admission { place: Some(place), ..Admission::default() }
    };
    let client = &bench.client;
    let mut wide = Vec::new();
    for _ in 0..3 {
        wide.push(client.start(request(hash, admission(3))).await.expect("start").run_id);
    }
    let narrow = client.start(request(hash, admission(1))).await.expect("start").run_id;
    let others = start(&bench, hash).await;
    // The first place is free, two others are taken.
    client.terminate(wide[0], "done").await.expect("ended");
    let worker = bench.worker_with(LONG, 8).await;
    for run in [others, wide[1], wide[2], narrow] {
        assert_eq!(bench.closed(run).await.status, RunStatus::Completed);
    }
    let order = "select array_agg(run_id order by closed_at) from runs where run_id = any($1)";
    let ended: Vec<uuid::Uuid> =
        sqlx::query_scalar(order).bind([wide[1].0, wide[2].0, narrow.0]).fetch_one(&bench.pool).await.expect("order");
    assert_eq!(ended.last(), Some(&narrow.0), "it began when the others had left");
    worker.drain(GRACE).await;
    bench.audit().await;
}

#[tokio::test]
async fn a_rate_spreads_starts_and_no_message_makes_one_earlier() {
    let bench = Bench::new().await;
    let hash = bench.deploy(definition("limited", vec![work("a", &[])])).await;
    let hourly = Rate { key: "u1".into(), starts: 2, per_ms: 3_600_000 };
    let admission = Admission { rate: Some(hourly), ..Admission::default() };
    let mut runs = Vec::new();
    for _ in 0..5 {
        runs.push(bench.client.start(request(hash, admission.clone())).await.unwrap().run_id);
    }
    let worker = bench.worker_with(LONG, 8).await;
    bench.closed(runs[0]).await;
    bench.closed(runs[1]).await;
    let instants: Vec<chrono::DateTime<chrono::Utc>> =
        sqlx::query_scalar("select not_before from admissions order by 1").fetch_all(&bench.pool).await.unwrap();
    assert_eq!(instants.len(), 3);
    let minutes = |from: usize, to: usize| (instants[to] - instants[from]).num_minutes();
    assert_eq!((minutes(0, 1), minutes(0, 2)), (0, 60), "two in each hour: {instants:?}");
    bench.client.pause(runs[2], Why::default()).await.unwrap();
    bench.client.resume(runs[2], Why::default()).await.unwrap();
    let held = bench.client.describe(runs[2]).await.unwrap().held.unwrap();
    assert!(held.starts_with("for its rate limit, until "), "{held}");
    // The hour is over.
    sqlx::query("update admissions set not_before = engine_now() where run_id = $1")
        .bind(runs[2].0)
        .execute(&bench.pool)
        .await
        .unwrap();
    assert_eq!(bench.closed(runs[2]).await.status, RunStatus::Completed);
    for run in &runs[3..] {
        bench.client.cancel(*run, "not needed").await.unwrap();
        assert_eq!(bench.closed(*run).await.status, RunStatus::Terminated);
    }
    let wrong = Admission { rate: Some(Rate { key: String::new(), starts: 0, per_ms: 0 }), ..Admission::default() };
    assert_eq!(bench.client.start(request(hash, wrong)).await.unwrap_err().code(), "input_invalid");
    worker.drain(GRACE).await;
    bench.audit().await;
}
