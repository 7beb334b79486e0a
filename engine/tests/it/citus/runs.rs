//! What runs do while their statements are listened to.

use crate::bench::{Bench, Gate, definition, e, step, waits_for, work};
use loopwright_engine::{
    Failure,
    activity::Context,
    admission::{Admission, IdConflict, IdReuse, OnConflict, Place, Rate},
    client::{At, Fork, Migrate, MigrationOutcome, Signal, Start, Update, Why},
    definition::{Await, CallVersion, Concurrency, Data, Definition, Input, Kind, ParentClose, Step, WaitUntil},
    ids::{DefinitionHash, RunId},
    retention,
    view::{RunStatus, RunView, Waiting},
};
use serde_json::{Map, Value, json};
use sqlx::PgPool;
use std::{collections::BTreeMap, time::Duration};

const GRACE: Duration = Duration::from_secs(10);

/// More than a row holds: it lies apart.
fn large() -> Value {
    json!({ "text": "much ".repeat(20_000) })
}

fn asks(name: &str) -> Step {
    step(name, Kind::Await(Box::new(Await { reply: None, ..waits_for(name) })))
}

/// Whether a run waits for this signal.
fn waits(name: &'static str) -> impl Fn(&RunView) -> bool {
    move |view| view.waiting.iter().any(|w| matches!(w, Waiting::Signal { signal, .. } if signal == name))
}

async fn send(bench: &Bench, run: RunId, name: &str, payload: Value) {
    let signal = Signal { name: name.into(), payload, dedupe_id: Some(format!("{name}-once")), sender: None };
    assert!(bench.client.signal(run, signal).await.expect("signal"));
}

fn start(definition: DefinitionHash, key: Option<&str>, admission: Admission) -> Start {
    Start {
        run_id: None,
        definition,
        inputs: json!({}),
        workflow_id: key.map(str::to_owned),
        attributes: json!({}),
        queue: String::new(),
        topic: None,
        admission,
    }
}

fn everything() -> Definition {
    let call = Kind::Call {
        workflow: "inner".into(),
        version: CallVersion::Latest,
        with: BTreeMap::new(),
        parent_close: ParentClose::Cancel,
    };
    definition(
        "everything",
        vec![
            work("first", &[]),
            step("nap", Kind::Wait { until: WaitUntil::For(100) }),
            asks("go"),
            asks("answer"),
            step("call", call),
            work("last", &[]),
        ],
    )
}

/// What an attempt does.
async fn works(ctx: &Context, stays: &Gate) -> Result<Value, Failure> {
    if ctx.info().path == "stays" {
        stays.pass().await;
        return Ok(json!({}));
    }
    ctx.heartbeat(json!({"at": 1}));
    ctx.meter_open("call", &Value::Null).await?;
    ctx.meter_close("call", &Value::Null, Some(("answer", &json!(1)))).await?;
    if ctx.checkpoint("note").await?.is_none() {
        ctx.save("note", &json!(1)).await?;
    }
    if ctx.info().path == "first" && ctx.info().attempt == 1 {
        // Long enough for progress to be written, and for its worker to die.
        tokio::time::sleep(Duration::from_millis(1_500)).await;
        return Err(Failure::retryable("transient.network", "x"));
    }
    if ctx.info().path == "large" {
        ctx.save("draft", &large()).await?;
        return Ok(large());
    }
    Ok(json!({}))
}

/// Runs do everything that runs do, under workers of which one dies.
pub async fn everything_happens(pool: &PgPool) {
    let bench = Bench::over(pool.clone());
    let gate = Gate::new();
    let stays = gate.clone();
    bench.script(move |ctx, _| {
        let stays = stays.clone();
        async move { works(&ctx, &stays).await }
    });
    bench.deploy(definition("inner", vec![work("i", &[])])).await;
    let hash = bench.deploy(everything()).await;
    let mut runs = Vec::new();
    for n in 0..4 {
        runs.push(bench.start_as(hash, json!({}), Some(&format!("key:{n}"))).await.run_id);
    }
    let dies = bench.worker().await;
    for run in &runs {
        bench.until(*run, "first", |v| !v.live.is_empty()).await;
    }
    bench.dies(dies).await;
    let worker = bench.worker().await;
    let client = &bench.client;
    for run in &runs {
        bench.until(*run, "go", waits("go")).await;
        let go = || Signal { name: "go".into(), dedupe_id: Some("1".into()), ..Signal::default() };
        client.pause(*run, Why { reason: "look".into(), ..Why::default() }).await.expect("pause");
        bench.until(*run, "paused", |v| v.status == RunStatus::Paused).await;
        client.resume(*run, Why::default()).await.expect("resume");
        client.signal(*run, go()).await.expect("signal");
        client.signal(*run, go()).await.expect("signal");
        bench.until(*run, "answer", waits("answer")).await;
    }
    let mut tx = pool.begin().await.expect("transaction");
    assert_eq!(client.unblock_in(&mut tx, &json!({"user_id": "u1"})).await.expect("woken"), 4);
    tx.commit().await.expect("commit");
    let update = Update { name: "answer".into(), id: Some("u".into()), ..Update::default() };
    client.update(runs[0], update, Duration::from_secs(20)).await.expect("update");
    client.signal(runs[1], Signal { name: "answer".into(), ..Signal::default() }).await.expect("signal");
    client.cancel(runs[2], "enough").await.expect("cancel");
    client.terminate(runs[3], "enough").await.expect("terminate");
    for run in &runs {
        bench.closed(*run).await;
    }
    // Under ids that were used before: `key:0` by a run that has completed.
    let under = |id: &str, id_reuse, id_conflict| {
        start(hash, Some(id), Admission { id_reuse, id_conflict, ..Admission::default() })
    };
    let strict = under("key:0", IdReuse::AllowDuplicateFailedOnly, IdConflict::Fail);
    assert_eq!(client.start(strict).await.expect_err("was used").code(), "workflow_id_used");
    let mut last = None;
    for _ in 0..2 {
        let start = under("key:9", IdReuse::AllowDuplicate, IdConflict::TerminateExisting);
        last = Some(client.start(start).await.expect("start").run_id);
    }
    client.terminate(last.expect("started"), "enough").await.expect("terminate");
    let fork = Fork {
        run_id: None,
        at: At::Seq(3),
        inputs: Map::new(),
        definition: None,
        attributes: None,
        reason: "try".into(),
    };
    let fork = client.fork(runs[0], fork).await.expect("fork").run_id;
    bench.until(fork, "go", |v| !v.waiting.is_empty()).await;
    client.history(fork, 0, 100).await.expect("history");
    client.query(runs[0], "nothing").await.map(drop).expect_err("no such query");
    is_reset(&bench).await;
    is_told_of(&bench).await;
    has_labels(&bench).await;
    goes_on_as_new(&bench).await;
    takes_places(&bench).await;
    migrates(&bench).await;
    stops_a_child_that_has_gone_on(&bench).await;
    assert_eq!(client.describe(RunId::new()).await.expect_err("none").code(), "run_not_found");
    retention::plan(client, Duration::ZERO).await.expect("plan");
    let hears = bench.start(definition("hears", vec![asks("go"), asks("answer")]), json!({})).await;
    bench.until(hears, "go", waits("go")).await;
    worker.drain(GRACE).await;
    is_heard_without_room(&bench, hears, &gate).await;
}

/// The only worker has so much to do that it takes no run but one that has heard something.
async fn is_heard_without_room(bench: &Bench, hears: RunId, gate: &Gate) {
    /// More than a worker of one slot claims in advance.
    const MANY: usize = 20;
    let hash = bench.deploy(definition("stays", vec![work("stays", &[])])).await;
    let mut runs = Vec::new();
    for _ in 0..MANY {
        runs.push(bench.start_as(hash, json!({}), None).await.run_id);
    }
    let worker = bench.worker_with(GRACE, 1).await;
    gate.arrived(1).await;
    send(bench, hears, "go", Value::Null).await;
    bench.until(hears, "answer", waits("answer")).await;
    gate.open(MANY);
    for run in runs {
        assert_eq!(bench.closed(run).await.status, RunStatus::Completed);
    }
    worker.drain(GRACE).await;
}

/// A call is stopped whose child has gone on as new: who is open in its place hears of it.
async fn stops_a_child_that_has_gone_on(bench: &Bench) {
    let with = BTreeMap::from([("n".to_owned(), Data::Literal(json!(1)))]);
    let mut again = step("again", Kind::ContinueAsNew { with, current: true });
    again.condition = Some(e("inputs.n < 1"));
    let mut child = definition("goes-on", vec![again, asks("go")]);
    let n = Input { schema: json!({"type": "integer"}), required: false, default: Some(json!(0)) };
    child.inputs.insert("n".into(), n);
    bench.deploy(child).await;
    let call = Kind::Call {
        workflow: "goes-on".into(),
        version: CallVersion::Latest,
        with: BTreeMap::new(),
        parent_close: ParentClose::Cancel,
    };
    let parent = bench.start(definition("stops", vec![step("call", call)]), json!({})).await;
    let called = |view: &RunView| {
        view.waiting.iter().find_map(|w| match w {
            Waiting::Child { run_id, .. } => Some(*run_id),
            _ => None,
        })
    };
    bench.until(parent, "its child", |view| called(view).is_some()).await;
    let first = called(&bench.client.describe(parent).await.expect("run")).expect("a child");
    let next = bench.closed(first).await.chain.continued_as.expect("the next");
    bench.until(next, "go", waits("go")).await;
    bench.client.cancel(parent, "enough").await.expect("cancel");
    assert_eq!(bench.closed(next).await.status, RunStatus::Cancelled);
    assert_eq!(bench.closed(parent).await.status, RunStatus::Cancelled);
}

/// A run begins again as another, which has its key.
async fn is_reset(bench: &Bench) {
    let hash = bench.deploy(definition("reset", vec![work("first", &[]), asks("go"), work("last", &[])])).await;
    let old = bench.start_as(hash, json!({}), Some("reset")).await.run_id;
    bench.until(old, "go", waits("go")).await;
    let fork = Fork {
        run_id: None,
        at: At::Seq(1),
        inputs: Map::new(),
        definition: None,
        attributes: None,
        reason: "again".into(),
    };
    let reset = bench.client.reset(old, fork).await.expect("reset");
    assert!(reset.terminated);
    assert_eq!(bench.client.open_run("reset").await.expect("key"), Some(reset.run_id));
    bench.until(reset.run_id, "go", waits("go")).await;
    send(bench, reset.run_id, "go", Value::Null).await;
    assert_eq!(bench.closed(reset.run_id).await.status, RunStatus::Completed);
}

/// Somebody reads along, of a run that goes on by itself and of one that waits and is ended; and takes what there is, of several shards.
async fn is_told_of(bench: &Bench) {
    let hash = bench.deploy(definition("told", vec![work("one", &[]), work("two", &[]), asks("go")])).await;
    let ids = BTreeMap::from_iter(std::iter::repeat_with(RunId::new).take(64).map(|run| (run.shard(), run)));
    let [goes_on, ends]: [RunId; 2] = ids.into_values().take(2).collect::<Vec<_>>().try_into().expect("two shards");
    for run in [goes_on, ends] {
        let told = Start { run_id: Some(run), topic: Some("told".into()), ..start(hash, None, Admission::default()) };
        bench.client.start(told).await.expect("start");
        bench.until(run, "go", waits("go")).await;
    }
    send(bench, goes_on, "go", Value::Null).await;
    assert_eq!(bench.closed(goes_on).await.status, RunStatus::Completed);
    bench.client.terminate(ends, "enough").await.expect("terminate");
    let mut transitions = 0;
    for run in [goes_on, ends] {
        transitions += bench.client.describe(run).await.expect("run").seq;
    }
    let taken = async |limit| {
        let mut tx = bench.pool.begin().await.expect("transaction");
        let moved = bench.client.moved_in(&mut tx, "told", limit).await.expect("moved");
        (tx, moved)
    };
    let all = [goes_on, ends].into();
    let (tx, moved) = taken(1_000).await;
    assert_eq!(moved, all);
    assert_eq!(taken(1_000).await.1, [].into(), "they are somebody's");
    tx.rollback().await.expect("rollback");
    let (mut tx, moved) = taken(u32::try_from(transitions).expect("few")).await;
    assert_eq!(moved, all, "and there again");
    assert_eq!(bench.client.moved_in(&mut tx, "told", 1).await.expect("moved"), [].into(), "one of each transition");
    tx.commit().await.expect("commit");
}

/// A run is for a worker that has its label.
async fn has_labels(bench: &Bench) {
    let mut labelled = definition("labelled", vec![work("one", &[])]);
    labelled.runs_on = vec!["large".into()];
    let run = bench.start(labelled, json!({})).await;
    bench.until(run, "nobody has its label", |view| view.held.is_some()).await;
    let worker = bench.worker_having(GRACE, &["large"]).await;
    assert_eq!(bench.closed(run).await.status, RunStatus::Completed);
    worker.drain(GRACE).await;
}

/// A run that has heard something large for later continues as new, in its group and under its business key; the next takes it.
async fn goes_on_as_new(bench: &Bench) {
    let first = |mut step: Step| {
        step.condition = Some(e("inputs.n < 1"));
        step
    };
    let with = BTreeMap::from([("n".to_owned(), Data::Literal(json!(1)))]);
    let again = step("again", Kind::ContinueAsNew { with, current: true });
    let mut chain = definition("chain", vec![first(asks("turn")), first(again), asks("go"), work("last", &[])]);
    let n = Input { schema: json!({"type": "integer"}), required: false, default: Some(json!(0)) };
    chain.inputs.insert("n".into(), n);
    let group = Data::Literal(json!("chain"));
    chain.concurrency = Some(Concurrency { group, limit: 1, on_conflict: OnConflict::Queue });
    let hash = bench.deploy(chain).await;
    let run = bench.start_as(hash, json!({}), Some("chain")).await.run_id;
    bench.until(run, "its turn", waits("turn")).await;
    send(bench, run, "go", large()).await;
    send(bench, run, "turn", Value::Null).await;
    let view = bench.closed(run).await;
    assert_eq!(view.status, RunStatus::Continued);
    let next = view.chain.continued_as.expect("the next");
    assert_eq!(bench.closed(next).await.status, RunStatus::Completed, "it was handed what the first has heard");
}

/// Runs take places of groups, wait for one, give way, and wait for their time.
async fn takes_places(bench: &Bench) {
    let hash = bench.deploy(definition("guest", vec![asks("go"), work("last", &[])])).await;
    let at = |group: &str, on_conflict| Admission {
        place: Some(Place { group: group.into(), limit: 1, on_conflict }),
        ..Admission::default()
    };
    let arrives = async |admission| bench.client.start(start(hash, None, admission)).await.expect("start").run_id;
    let (first, second) =
        (arrives(at("queue", OnConflict::Queue)).await, arrives(at("queue", OnConflict::Queue)).await);
    bench.until(second, "no place", |view| view.held.is_some()).await;
    let gone = arrives(at("queue", OnConflict::Queue)).await;
    bench.client.cancel(gone, "enough").await.expect("cancel");
    bench.closed(gone).await;
    let turned_away = arrives(at("queue", OnConflict::CancelNew)).await;
    assert_eq!(bench.closed(turned_away).await.status, RunStatus::Cancelled);
    for run in [first, second] {
        bench.until(run, "its place", waits("go")).await;
        send(bench, run, "go", Value::Null).await;
        assert_eq!(bench.closed(run).await.status, RunStatus::Completed);
    }
    let old = arrives(at("newest", OnConflict::CancelRunning)).await;
    bench.until(old, "its place", waits("go")).await;
    let new = arrives(at("newest", OnConflict::CancelRunning)).await;
    assert_eq!(bench.closed(old).await.status, RunStatus::Cancelled);
    let rate = || Some(Rate { key: "rate".into(), starts: 1, per_ms: 200 });
    let mut runs = vec![new];
    for _ in 0..2 {
        runs.push(arrives(Admission { rate: rate(), ..Admission::default() }).await);
    }
    for run in runs {
        bench.until(run, "its time", waits("go")).await;
        send(bench, run, "go", Value::Null).await;
        assert_eq!(bench.closed(run).await.status, RunStatus::Completed);
    }
}

/// A run that has something large goes on under another definition.
async fn migrates(bench: &Bench) {
    let of = |more: &[Step]| definition("moving", [&[work("large", &[]), asks("go")], more].concat());
    let old = bench.deploy(of(&[])).await;
    let run = bench.start_as(old, json!({}), None).await.run_id;
    bench.until(run, "go", waits("go")).await;
    let to = bench.deploy(of(&[work("added", &[])])).await;
    let (map, catalog) = (BTreeMap::new(), Default::default());
    let asked = Migrate { to, map, reason: "one more".into(), by: None, dry_run: false, catalog };
    assert_eq!(bench.client.migrate(run, asked).await.expect("migrate").outcome, MigrationOutcome::Migrated);
    send(bench, run, "go", Value::Null).await;
    assert_eq!(bench.closed(run).await.status, RunStatus::Completed);
    assert_eq!(bench.client.replay(run, None).await.expect("replay").divergence, None);
}
