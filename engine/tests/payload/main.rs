//! Sealed payloads, on a real Postgres. The ring is the process's, so these tests have one of their own and run one by one.

#[path = "../it/bench.rs"]
#[allow(dead_code)]
mod bench;

use bench::{Bench, definition, e, step, waits_for, work};
use loopwright_engine::{
    Error, Failure, MIGRATIONS,
    client::{At, Fork, Signal, Update, Why},
    definition::{Data, Definition, Input, Kind},
    embedded::testing::database,
    ids::RunId,
    payload::{PayloadKeys, install},
    schedule::{Spec, When, door::NewSchedule},
    view::RunStatus,
};
use secrecy::SecretString;
use serde_json::{Map, Value, json};
use std::{collections::BTreeSet, time::Duration};
use tokio::sync::{Mutex, MutexGuard};

const GRACE: Duration = Duration::from_secs(10);
/// In everything that is somebody's.
const MARKER: &str = "pelican-7431";

static ONE_BY_ONE: Mutex<()> = Mutex::const_new(());

/// A ring of keys with these ids, the first seals; the same id is the same key.
fn ring(ids: &str) {
    let entry = |id: &str| format!("{id}:{}A=", id.repeat(42 / id.len()));
    let entries: Vec<String> = ids.split_whitespace().map(entry).collect();
    let keys = (!entries.is_empty()).then(|| PayloadKeys::parse(&SecretString::from(entries.join(","))).expect("ring"));
    install(keys);
}

async fn alone(ids: &str) -> (MutexGuard<'static, ()>, Bench) {
    let guard = ONE_BY_ONE.lock().await;
    ring(ids);
    (guard, Bench::new().await)
}

fn large() -> String {
    format!("{MARKER} ").repeat(20_000)
}

/// Everything that a run can keep: inputs, a checkpoint, progress, large and small results, a message, an output.
fn talkative() -> Definition {
    let mut d = definition(
        "talkative",
        vec![
            work("a", &[("said", Data::Expr(e("inputs.said")))]),
            step("q", Kind::Await(Box::new(waits_for("go")))),
            work("b", &[("said", Data::Expr(e("steps.q.output"))), ("fails", Data::Expr(e("inputs.fails")))]),
        ],
    );
    d.inputs.insert("said".into(), Input { schema: json!({}), required: true, default: None });
    d.inputs.insert("fails".into(), Input { schema: json!({}), required: false, default: Some(json!(false)) });
    d.outputs.insert("text".into(), Data::Expr(e("steps.a.output.text")));
    d.outputs.insert("said".into(), Data::Expr(e("inputs.said")));
    d
}

fn talks(bench: &Bench) {
    bench.script(|ctx, input| async move {
        ctx.save("small", &json!(MARKER)).await?;
        ctx.save("large", &json!({ "text": large() })).await?;
        ctx.heartbeat(json!({ "at": MARKER }));
        if input["fails"] == true {
            return Err(Failure::permanent("test.failed", format!("because of {MARKER}")));
        }
        Ok(json!({ "text": large(), "n": MARKER }))
    });
}

async fn tell(bench: &Bench, run: RunId) {
    let signal = Signal { name: "go".into(), payload: json!({ "words": MARKER }), ..Signal::default() };
    assert!(bench.client.signal(run, signal).await.expect("sent"));
}

/// Every row of every table, as text.
async fn dump(bench: &Bench) -> Vec<(String, String)> {
    let tables: Vec<String> = sqlx::query_scalar(
        "select table_name::text from information_schema.tables where table_schema = 'public' and table_type = 'BASE TABLE'",
    )
    .fetch_all(&bench.pool)
    .await
    .expect("tables");
    let mut all = Vec::new();
    for table in tables {
        let sql = sqlx::AssertSqlSafe(format!("select t::text from {table} t"));
        let rows: Vec<Option<String>> = sqlx::query_scalar(sql).fetch_all(&bench.pool).await.expect("rows");
        all.extend(rows.into_iter().flatten().map(|row| (table.clone(), row)));
    }
    all
}

async fn marked(bench: &Bench) -> BTreeSet<String> {
    let hex: String = MARKER.bytes().map(|b| format!("{b:02x}")).collect();
    let dump = dump(bench).await;
    assert!(dump.len() > 5);
    dump.into_iter().filter(|(_, row)| row.contains(MARKER) || row.contains(&hex)).map(|(table, _)| table).collect()
}

/// How many rows each key has sealed, tables together; `-` is nobody.
async fn keys(bench: &Bench) -> Vec<(String, u64)> {
    let mut sums: std::collections::BTreeMap<String, u64> = Default::default();
    for found in bench.client.sealed().await.expect("counted") {
        *sums.entry(found.key.unwrap_or_else(|| "-".into())).or_default() += found.rows;
    }
    sums.into_iter().collect()
}

async fn reseal(bench: &Bench) -> u64 {
    let (mut after, mut rows) = (None, 0);
    loop {
        let done = bench.client.reseal(after).await.expect("resealed");
        rows += done.rows;
        match done.after {
            Some(last) => after = Some(last),
            None => return rows,
        }
    }
}

fn schedule() -> NewSchedule {
    let every = When::Every { ms: 86_400_000, offset_ms: 0 };
    let spec = Spec { inputs: json!({ "said": MARKER }), ..Spec::new("talkative", every) };
    NewSchedule { name: "daily".into(), spec, paused: true, note: None, owner: None }
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_that_somebody_said_is_in_the_database_and_everything_comes_back() {
    let (_alone, bench) = alone("a").await;
    talks(&bench);
    let worker = bench.worker().await;
    let hash = bench.deploy(talkative()).await;
    let run = bench.start_as(hash, json!({ "said": MARKER }), None).await.run_id;
    let fails = bench.start_as(hash, json!({ "said": large(), "fails": true }), None).await.run_id;
    bench.until(run, "waiting", |v| !v.waiting.is_empty()).await;
    // One that is read while it waits, with a state that was written: it was paused by a reason, too.
    bench.client.pause(run, Why { reason: MARKER.into(), ..Why::default() }).await.expect("paused");
    bench.until(run, "paused", |v| v.status == RunStatus::Paused).await;
    bench.client.resume(run, Why { reason: MARKER.into(), ..Why::default() }).await.expect("resumed");
    tell(&bench, run).await;
    tell(&bench, fails).await;
    let (done, failed) = (bench.closed(run).await, bench.closed(fails).await);
    assert_eq!(done.output, Some(json!({ "text": large(), "said": MARKER })));
    assert_eq!(done.inputs["said"], MARKER);
    assert_eq!(failed.failure.expect("failure").message, format!("because of {MARKER}"));
    let fork = Fork {
        run_id: None,
        at: At::Step("b".into()),
        inputs: Map::from_iter([("fails".into(), json!(false))]),
        definition: None,
        attributes: None,
        reason: MARKER.into(),
    };
    let fork = bench.client.fork(fails, fork).await.expect("fork").run_id;
    assert_eq!(bench.closed(fork).await.output, Some(json!({ "text": large(), "said": large() })));
    bench.client.schedules().create(schedule()).await.expect("schedule");
    assert_eq!(
        bench.client.schedules().describe("daily").await.expect("schedule").schedule.spec.inputs["said"],
        MARKER
    );
    worker.drain(GRACE).await;

    assert_eq!(marked(&bench).await, BTreeSet::new());
    assert_eq!(keys(&bench).await.iter().map(|(key, _)| key.as_str()).collect::<Vec<_>>(), ["a"]);
    assert!(bench.client.replay(run, None).await.expect("folds").divergence.is_none());

    // A file is plain, and a database without keys takes it.
    let mut export = bench.client.export(fork).await.expect("export");
    let mut text = String::new();
    while let Some(line) = export.next().await.expect("line") {
        text.push_str(&line);
    }
    assert!(text.contains(MARKER) && !text.contains("$sealed"));
    let other = Bench::over(database(MIGRATIONS).await);
    ring("");
    other
        .client
        .import(loopwright_engine::archive::Archive::read(text.as_bytes()).expect("archive"))
        .await
        .expect("import");
    assert_eq!(
        other.client.describe(fork).await.expect("run").output,
        Some(json!({ "text": large(), "said": large() }))
    );
    assert!(other.client.replay(fork, None).await.expect("folds").divergence.is_none());
    // Imported under a key, the fork's history says where it was forked, although SQL cannot look into it.
    ring("a");
    let third = Bench::over(database(MIGRATIONS).await);
    third
        .client
        .import(loopwright_engine::archive::Archive::read(text.as_bytes()).expect("archive"))
        .await
        .expect("import");
    assert!(third.client.replay(fork, None).await.expect("folds").divergence.is_none());
    assert_eq!(marked(&third).await, BTreeSet::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_is_rotated_out_and_what_was_plain_is_sealed() {
    let (_alone, bench) = alone("").await;
    talks(&bench);
    let worker = bench.worker().await;
    let hash = bench.deploy(talkative()).await;
    let plain = bench.start_as(hash, json!({ "said": MARKER }), None).await.run_id;
    bench.until(plain, "waiting", |v| !v.waiting.is_empty()).await;
    bench.client.schedules().create(schedule()).await.expect("schedule");
    assert!(marked(&bench).await.contains("history"));
    ring("a");
    // What is plain is read as it is; what is written from now on is sealed.
    let open = bench.start_as(hash, json!({ "said": MARKER }), None).await.run_id;
    bench.until(open, "waiting", |v| !v.waiting.is_empty()).await;
    tell(&bench, plain).await;
    let wanted = Some(json!({ "text": large(), "said": MARKER }));
    assert_eq!(bench.closed(plain).await.output, wanted);
    let before = keys(&bench).await;
    assert_eq!(before.iter().map(|(key, _)| key.as_str()).collect::<Vec<_>>(), ["-", "a"]);

    ring("b a");
    let sealed = reseal(&bench).await;
    assert_eq!(keys(&bench).await, [("b".to_owned(), before.iter().map(|(_, n)| n).sum())]);
    assert_eq!(sealed, before.iter().map(|(_, n)| n).sum::<u64>());
    assert_eq!(reseal(&bench).await, 0, "twice is once");
    assert_eq!(marked(&bench).await, BTreeSet::new());

    ring("b");
    assert_eq!(bench.client.describe(plain).await.expect("run").output, wanted);
    assert!(bench.client.replay(plain, None).await.expect("folds").divergence.is_none());
    tell(&bench, open).await;
    assert_eq!(bench.closed(open).await.output, wanted);
    assert_eq!(
        bench.client.schedules().describe("daily").await.expect("schedule").schedule.spec.inputs["said"],
        MARKER
    );
    worker.drain(GRACE).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_its_key_a_run_is_left_alone_and_goes_on_when_the_key_is_back() {
    let (_alone, bench) = alone("a").await;
    talks(&bench);
    let hash = bench.deploy(talkative()).await;
    let worker = bench.worker().await;
    let run = bench.start_as(hash, json!({ "said": MARKER }), None).await.run_id;
    bench.until(run, "waiting", |v| !v.waiting.is_empty()).await;
    tell(&bench, run).await;
    bench.closed(run).await;
    let waits = bench.start_as(hash, json!({ "said": MARKER }), None).await.run_id;
    bench.until(waits, "waiting", |v| !v.waiting.is_empty()).await;
    worker.drain(GRACE).await;

    for ids in ["c", ""] {
        ring(ids);
        for error in [
            bench.client.describe(run).await.expect_err("sealed"),
            bench.client.history(run, 0, 10).await.expect_err("sealed"),
            bench.client.replay(run, None).await.expect_err("sealed"),
            bench.client.export(run).await.map(drop).expect_err("sealed"),
        ] {
            assert_eq!(error.code(), "payload_key_missing");
            assert!(
                error.to_string().contains("`a`") && error.to_string().contains("LOOPWRIGHT_PAYLOAD_KEYS"),
                "{error}"
            );
        }
    }
    assert!(matches!(bench.client.reseal(None).await, Err(Error::InputInvalid(_))));
    // A worker without the key gives it back and does not set it aside.
    ring("c");
    let worker = bench.worker().await;
    tell(&bench, waits).await;
    let deadline = tokio::time::Instant::now() + bench::PATIENCE;
    loop {
        let (status, waiting): (String, Option<String>) =
            sqlx::query_as("select status, waiting from runs where run_id = $1")
                .bind(waits.0)
                .fetch_one(&bench.pool)
                .await
                .expect("run");
        assert_eq!(status, "running");
        if waiting.as_deref() == Some("worker") {
            break;
        }
        assert!(tokio::time::Instant::now() < deadline, "it is not given back");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    ring("c a");
    assert_eq!(bench.closed(waits).await.status, RunStatus::Completed);
    worker.drain(GRACE).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chain_whose_messages_a_worker_cannot_open_waits_for_one_that_can() {
    let (_alone, bench) = alone("a").await;
    let with = std::collections::BTreeMap::from([("n".to_owned(), Data::Literal(json!(2)))]);
    let mut again = step("again", Kind::ContinueAsNew { with, current: false });
    again.condition = Some(e("inputs.n == 1"));
    let ask = |name: &str| step(name, Kind::Await(Box::new(waits_for(name))));
    let mut first = ask("next");
    first.condition = Some(e("inputs.n == 1"));
    let mut d = definition("chain", vec![first, again, ask("go")]);
    d.inputs.insert("n".into(), Input { schema: json!({}), required: false, default: Some(json!(1)) });
    let worker = bench.worker().await;
    let run = bench.start(d, json!({})).await;
    bench.until(run, "waits", |v| !v.waiting.is_empty()).await;
    tell(&bench, run).await;
    bench.until(run, "has read it", |v| v.seq > 1).await;
    worker.drain(GRACE).await;
    // The message as another key would have sealed it.
    let foreign = "update inbox set payload = jsonb_set(payload, '{$sealed,key}', '\"z\"') where run_id = $1";
    assert_eq!(sqlx::query(foreign).bind(run.0).execute(&bench.pool).await.expect("sealed").rows_affected(), 1);
    let signal = Signal { name: "next".into(), ..Signal::default() };
    assert!(bench.client.signal(run, signal).await.expect("sent"));
    let worker = bench.worker().await;
    let deadline = tokio::time::Instant::now() + bench::PATIENCE;
    loop {
        let (status, epoch, waiting): (String, i64, Option<String>) =
            sqlx::query_as("select status, epoch, waiting from runs where run_id = $1")
                .bind(run.0)
                .fetch_one(&bench.pool)
                .await
                .expect("run");
        assert_eq!(status, "running", "it is not set aside");
        if waiting.as_deref() == Some("worker") && epoch > 2 {
            break;
        }
        assert!(tokio::time::Instant::now() < deadline, "it is not given back");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let back = "update inbox set payload = jsonb_set(payload, '{$sealed,key}', '\"a\"') where run_id = $1 and payload->'$sealed'->>'key' = 'z'";
    sqlx::query(back).bind(run.0).execute(&bench.pool).await.expect("the key is back");
    let view = bench.closed(run).await;
    assert_eq!(view.status, RunStatus::Continued);
    let second = bench.closed(view.chain.continued_as.expect("a successor")).await;
    assert_eq!(second.status, RunStatus::Completed, "with the message that went along");
    worker.drain(GRACE).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_moved_to_another_place_is_refused() {
    let (_alone, bench) = alone("a").await;
    talks(&bench);
    let hash = bench.deploy(talkative()).await;
    let worker = bench.worker().await;
    let mut runs = Vec::new();
    for _ in 0..2 {
        let run = bench.start_as(hash, json!({ "said": MARKER }), None).await.run_id;
        tell(&bench, run).await;
        bench.closed(run).await;
        runs.push(run);
    }
    worker.drain(GRACE).await;
    let (one, two) = (runs[0], runs[1]);
    let hashes = "select count(distinct hash) from blobs";
    let names: i64 = sqlx::query_scalar(hashes).fetch_one(&bench.pool).await.expect("count");
    assert_eq!(names, 2, "the same value has another name in another run");
    for change in [
        // A row's events in another row of its run; in another run's.
        "update history h set events = (select events from history o where o.run_id = h.run_id and o.seq = 1) where run_id = $1 and seq = 2 and $2 <> run_id",
        "update history h set events = (select events from history o where o.run_id = $2 and o.seq = h.seq) where run_id = $1 and seq = 1",
        "update runs r set output = (select output from runs o where o.run_id = $2) where run_id = $1",
        "update runs r set output = r.inputs where run_id = $1 and $2 <> run_id",
        "update blobs b set bytes = (select bytes from blobs o where o.run_id = $2) where run_id = $1",
        "update blobs b set bytes = set_byte(bytes, octet_length(bytes) - 1, get_byte(bytes, octet_length(bytes) - 1) # 1) where run_id = $1 and $2 <> run_id",
    ] {
        let mut tx = bench.pool.acquire().await.expect("connection");
        let kept = "create temporary table kept_history as select * from history; create temporary table kept_runs as select * from runs;
                    create temporary table kept_blobs as select * from blobs";
        sqlx::raw_sql(kept).execute(&mut *tx).await.expect("kept");
        let changed = sqlx::query(change).bind(one.0).bind(two.0).execute(&mut *tx).await.expect(change);
        assert_eq!(changed.rows_affected(), 1, "{change}");
        let error = bench.client.export(one).await.map(drop).err();
        let error = match error {
            Some(error) => error,
            None => bench.client.history(one, 0, 100).await.map(drop).expect_err(change),
        };
        assert_eq!(error.code(), "payload_corrupt", "{change}: {error}");
        let back =
            "update history h set events = k.events from kept_history k where k.run_id = h.run_id and k.seq = h.seq;
                    update runs r set output = k.output from kept_runs k where k.run_id = r.run_id;
                    update blobs b set bytes = k.bytes from kept_blobs k where k.run_id = b.run_id and k.hash = b.hash;
                    drop table kept_history; drop table kept_runs; drop table kept_blobs";
        sqlx::raw_sql(back).execute(&mut *tx).await.expect("back");
        bench.client.describe(one).await.expect("as it was");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_update_is_answered_although_sql_cannot_look_into_its_history() {
    let (_alone, bench) = alone("a").await;
    let mut await_ = waits_for("ask");
    await_.reply = Some(Data::Expr(e("{'heard': signal}")));
    let d = definition("asked", vec![step("q", Kind::Await(Box::new(await_)))]);
    let worker = bench.worker().await;
    let run = bench.start(d, Value::Object(Map::new())).await;
    bench.until(run, "waiting", |v| !v.waiting.is_empty()).await;
    let update = Update { name: "ask".into(), payload: json!({ "w": MARKER }), ..Update::default() };
    let answer = bench.client.update(run, update, bench::PATIENCE).await.expect("answered");
    assert!(format!("{answer:?}").contains(MARKER), "{answer:?}");
    bench.closed(run).await;
    worker.drain(GRACE).await;
    assert_eq!(marked(&bench).await, BTreeSet::new());
}
