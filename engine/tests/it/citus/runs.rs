//! What runs do while their statements are listened to.

use crate::bench::{Bench, definition, e, step, waits_for, work};
use loopwright_engine::{
    Failure,
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

/// Runs do everything that runs do, under workers of which one dies.
pub async fn everything_happens(pool: &PgPool) {
    let bench = Bench::over(pool.clone());
    bench.script(|ctx, _| async move {
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
    goes_on_as_new(&bench).await;
    takes_places(&bench).await;
    migrates(&bench).await;
    retention::plan(client, Duration::from_secs(86_400)).await.expect("plan");
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
