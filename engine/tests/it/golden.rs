//! Histories that earlier releases wrote, kept in `tests/golden`, one archive a line of the folder: every release folds them
//! to what they were and decides them again as they were decided.
//!
//! A new kind of event needs a history that holds it: let a scenario below meet it, then
//! `GOLDEN=<name> cargo test -p loopwright-engine --test it golden -- --ignored` writes `tests/golden/<name>-*.jsonl`.
//! Files that are there stay as they are: they are the evidence of what was once stored.

use crate::{
    archive::exported,
    bench::{Bench, Gate, definition, e, step, work},
};
use loopwright_engine::{
    Failure,
    admission::{Admission, Rate},
    archive::Archive,
    client::{At, Decision, Fork, Migrate, Signal, Start, Update, Why},
    definition::{
        Approval, Await, Branch, CallVersion, Catch, Data, Definition, Exhausted, Input, Join, Kind, OnItemFailure,
        OnTimeout, ParentClose, RepeatCondition, Step, WaitUntil,
    },
    event::{Event, FORMAT},
    ids::RunId,
    view::{RunStatus, RunView, Waiting},
};
use serde_json::{Map, Value, json};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::Write,
    path::PathBuf,
    sync::atomic::Ordering,
    time::Duration,
};

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

/// Name and text of every archive.
fn golden() -> Vec<(String, String)> {
    let mut found: Vec<_> = fs::read_dir(folder())
        .expect("folder")
        .map(|entry| entry.expect("entry").path())
        .filter(|path| path.extension().is_some_and(|end| end == "jsonl"))
        .map(|path| (path.file_name().expect("name").display().to_string(), fs::read_to_string(&path).expect("text")))
        .collect();
    found.sort();
    found
}

/// Words of the vocabulary, from the one place where none can be left out.
fn vocabulary() -> BTreeSet<String> {
    let source = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/src/event.rs")).expect("source");
    let body = source.split("pub enum Event {").nth(1).expect("enum").split("\n}\n").next().expect("end");
    let variants = body.lines().filter_map(|l| l.strip_prefix("    ")).filter(|l| l.starts_with(char::is_uppercase));
    let snake = |name: &str| {
        name.chars().enumerate().fold(String::new(), |mut word, (i, c)| {
            if c.is_uppercase() && i > 0 {
                word.push('_');
            }
            word.push(c.to_ascii_lowercase());
            word
        })
    };
    variants.map(|l| snake(l.split([' ', '{', ',']).next().expect("name"))).collect()
}

#[test]
fn every_golden_history_folds_and_is_decided_again() {
    let (mut words, mut formats) = (BTreeSet::new(), BTreeSet::new());
    for (name, text) in golden() {
        let archive = Archive::read(text.as_bytes()).unwrap_or_else(|error| panic!("{name}: {error}"));
        let replayed = archive.replay(None).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(replayed.divergence, None, "{name}");
        formats.extend(archive.history.iter().flat_map(|row| events(&row.events)).map(|event| event.format()));
        words.extend(archive.history.iter().flat_map(|row| events(&row.events)).map(word));
    }
    // 6 and 7 say how something is stored.
    let missing: Vec<_> = (1..=FORMAT).filter(|n| !matches!(n, 6 | 7) && !formats.contains(n)).collect();
    assert!(missing.is_empty(), "no golden history holds events of format {missing:?}: see the top of this file");
    let missing: Vec<_> = vocabulary().into_iter().filter(|w| !words.contains(w)).collect();
    assert!(missing.is_empty(), "no golden history holds {missing:?}: see the top of this file");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_golden_history_is_imported_and_shows_what_it_did() {
    let bench = Bench::new().await;
    for (name, text) in golden() {
        let archive = Archive::read(text.as_bytes()).expect("valid");
        let stored = archive.header.run.status;
        let run = bench.client.import(archive.clone()).await.unwrap_or_else(|error| panic!("{name}: {error}"));
        let view = bench.client.describe(run).await.expect("run");
        let closed = archive.history.iter().flat_map(|row| events(&row.events)).find_map(|event| match event {
            Event::RunClosed { status, output, .. } => Some((status, output)),
            _ => None,
        });
        let (status, output) = closed.expect("golden runs are closed");
        assert_eq!((view.status, &view.output), (status, &output), "{name}");
        assert_eq!(status, stored, "{name}");
        assert_eq!(bench.client.replay(run, None).await.expect("folds").divergence, None, "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_of_a_newer_release_is_left_to_its_workers_and_the_others_go_on() {
    let bench = Bench::new().await;
    let worker = bench.worker().await;
    let nap = || vec![step("nap", Kind::Wait { until: WaitUntil::For(60_000) }), work("a", &[])];
    let newer = [
        ("update history set format = 900 where run_id = $1", "update history set format = 1 where run_id = $1"),
        (
            "update runs set cursor = '{\"format\": 900, \"unheard\": \"of\"}', cursor_seq = seq where run_id = $1",
            "update runs set cursor = null, cursor_seq = 0 where run_id = $1",
        ),
    ];
    for (n, (write, take_back)) in newer.into_iter().enumerate() {
        let run = bench.start(definition(&format!("newer{n}"), nap()), json!({})).await;
        bench.until(run, "naps", |v| !v.waiting.is_empty()).await;
        let execute = async |sql: &'static str| {
            sqlx::query(sql).bind(run.0).execute(&bench.pool).await.expect("sql");
        };
        execute(write).await;
        execute("update ready set due_at = engine_now() where run_id = $1").await;
        // Claimed and given back: the epoch has risen twice, and nobody has set it aside.
        let epochs =
            "select coalesce(max(epoch), 0) from runs where closed_at is null and owner is null and status = 'running'";
        crate::faults::reaches(&bench.pool, epochs, 3).await;
        let refused = bench.client.describe(run).await.expect_err("not ours to read");
        assert_eq!(refused.code(), "newer_release", "{refused}");
        let other = bench.start(definition("other", vec![work("a", &[])]), json!({})).await;
        assert_eq!(bench.closed(other).await.status, RunStatus::Completed);
        execute(take_back).await;
        bench.client.terminate(run, "seen").await.expect("readable again");
    }
    worker.drain(Duration::from_secs(10)).await;
    bench.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_calls_a_workflow_of_a_newer_release_is_left_to_its_workers_too() {
    let bench = Bench::new().await;
    let mut callee = definition("callee", vec![work("a", &[])]);
    callee.runs_on = vec!["linux".into()];
    let callee = bench.deploy(callee).await;
    let call = Kind::Call {
        workflow: "callee".into(),
        version: CallVersion::Latest,
        with: BTreeMap::new(),
        parent_close: ParentClose::Abandon,
    };
    let run = bench.start(definition("caller", vec![step("c", call)]), json!({})).await;
    let execute = async |sql: &'static str| {
        sqlx::query(sql).bind(&callee.0[..]).execute(&bench.pool).await.expect("sql");
    };
    execute(
        "update definitions set format = 900, ir = ir || '{\"concurrency\": {\"unheard\": \"of\"}}' where hash = $1",
    )
    .await;
    let worker = bench.worker().await;
    let epochs = "select coalesce(max(epoch), 0) from runs where closed_at is null and owner is null and status <> 'quarantined'";
    crate::faults::reaches(&bench.pool, epochs, 3).await;
    execute("update definitions set format = (ir->>'format')::int, ir = ir - 'concurrency' where hash = $1").await;
    bench.until(run, "calls", |v| v.waiting.iter().any(|w| matches!(w, Waiting::Child { .. }))).await;
    worker.drain(Duration::from_secs(10)).await;
}

fn events(stored: &[Value]) -> Vec<Event> {
    stored.iter().map(|event| serde_json::from_value(event.clone()).expect("event")).collect()
}

fn word(event: Event) -> String {
    serde_json::to_value(event).expect("json")["type"].as_str().expect("tag").to_owned()
}

fn awaits(id: &str, remind_ms: Vec<u64>, approval: Option<Approval>) -> Step {
    step(
        id,
        Kind::Await(Box::new(Await {
            signal: id.into(),
            timeout_ms: 600_000,
            form: None,
            show: None,
            to: vec![],
            filter: None,
            remind_ms,
            on_timeout: OnTimeout::Fail,
            default: None,
            approval,
            reply: None,
        })),
    )
}

/// Nearly everything that a run can do.
fn everything() -> Definition {
    let literal = |value: Value| vec![("is", Data::Literal(value))];
    let mut skipped = work("skipped", &[]);
    skipped.condition = Some(e("false"));
    let mut caught = work("caught", &literal(json!("permanent")));
    caught.catch = vec![Catch { on: vec!["*".into()], condition: None, steps: vec![work("handler", &[])] }];
    let mut endures = work("endures", &literal(json!("permanent")));
    endures.continue_on_error = true;
    let branch = |name: &str, steps| Branch { name: name.into(), steps };
    let parallel = Kind::Parallel {
        branches: vec![branch("l", vec![work("l1", &[])]), branch("r", vec![endures])],
        join: Join::Settled,
        fail_fast: false,
    };
    let race = Kind::Parallel {
        branches: vec![branch("won", vec![work("w", &[])]), branch("lost", vec![work("s", &literal(json!("slow")))])],
        join: Join::First,
        fail_fast: false,
    };
    let each = Kind::Foreach {
        list: e("[1, 2, 3]"),
        key: None,
        max_items: 3,
        concurrency: 2,
        on_item_failure: OnItemFailure::Continue,
        steps: vec![work("i", &[("n", Data::Expr(e("item")))])],
        outputs: None,
    };
    let rounds = Kind::Repeat {
        steps: vec![work("draft", &[])],
        max_rounds: 2,
        condition: RepeatCondition::While(e("true")),
        delay_ms: 20,
        exhausted: Exhausted::Continue,
        transparent: false,
        gate: None,
        outputs: None,
    };
    let call = Kind::Call {
        workflow: "part".into(),
        version: CallVersion::Latest,
        with: Default::default(),
        parent_close: ParentClose::Cancel,
    };
    let mut all = definition(
        "everything",
        vec![
            skipped,
            work("flaky", &literal(json!("retryable"))),
            caught,
            step("both", parallel),
            step("race", race),
            step("each", each),
            step("rounds", rounds),
            step("pause", Kind::Wait { until: WaitUntil::For(20) }),
            awaits("word", vec![10], None),
            awaits("release", vec![], Some(Approval { quorum: 2, fail_on_reject: false })),
            step("part", call),
            work("last", &[]),
        ],
    );
    all.finally = vec![work("clean", &[])];
    all
}

async fn says(bench: &Bench, run: RunId, name: &str, id: &str) {
    let signal = Signal { name: name.into(), payload: json!({"text": id}), dedupe_id: Some(id.into()), sender: None };
    bench.client.signal(run, signal).await.expect("signal");
}

fn waits_at(view: &RunView, path: &str) -> bool {
    view.nodes.iter().any(|node| node.path == path) && !view.waiting.is_empty()
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "writes files: see the top"]
async fn write_golden() {
    let name = std::env::var("GOLDEN").expect("GOLDEN=<name>");
    let bench = Bench::new().await;
    let gate = Gate::new();
    let held = gate.clone();
    bench.script(move |ctx, input| {
        let gate = held.clone();
        async move {
            match input["is"].as_str() {
                Some("retryable") if ctx.info().attempt == 1 => Err(Failure::retryable("transient.network", "x")),
                Some("away") if ctx.info().attempt <= 2 => {
                    Err(Failure::retryable("transient.unavailable", "x").with_retry_after_ms(5).without_counting())
                }
                Some("permanent") => Err(Failure::permanent("check.failed", "x")),
                Some("slow") => {
                    ctx.cancellation().cancelled().await;
                    Err(Failure::permanent("cancelled", "x"))
                }
                Some("held") => {
                    gate.pass().await;
                    Ok(input)
                }
                _ => Ok(input),
            }
        }
    });
    bench.deploy(definition("part", vec![work("inner", &[])])).await;
    bench.hook.refuse.store(true, Ordering::SeqCst);
    let worker = bench.worker().await;
    let whole = bench.start(everything(), json!({})).await;
    bench.until(whole, "blocked", |v| !v.waiting.is_empty()).await;
    for n in 0..=100 {
        says(&bench, whole, "word", &format!("{n}")).await;
    }
    bench.client.pause(whole, Why { reason: "look".into(), ..Why::default() }).await.expect("pause");
    bench.until(whole, "paused", |v| v.status == RunStatus::Paused).await;
    bench.hook.refuse.store(false, Ordering::SeqCst);
    bench.client.resume(whole, Why::default()).await.expect("resume");
    let mut tx = loopwright_engine::transaction::begin(&bench.pool).await.expect("begin");
    bench.client.unblock_in(&mut tx, &json!({})).await.expect("unblock");
    tx.commit().await.expect("commit");
    bench.client.wake().await;
    bench.until(whole, "approval", |v| waits_at(v, "release")).await;
    for person in ["ada", "bob"] {
        bench
            .client
            .approve(whole, "release", Decision::Approved, None, Some(person.into()), Some(person.into()))
            .await
            .expect("approve");
    }
    bench.closed(whole).await;

    let at_part = Fork {
        run_id: None,
        at: At::Step("part".into()),
        inputs: Map::new(),
        attributes: None,
        definition: None,
        reason: "try".into(),
    };
    let forked = bench.client.fork(whole, at_part.clone()).await.expect("fork").run_id;
    bench.closed(forked).await;

    let patient = definition("patient", vec![awaits("word", vec![10], None), work("never", &[])]);
    let cancelled = bench.start(patient, json!({})).await;
    bench.until(cancelled, "reminded", |v| !v.waiting.is_empty() && v.seq >= 2).await;
    bench.client.cancel(cancelled, "enough").await.expect("cancel");
    bench.closed(cancelled).await;

    let asked = bench.start(definition("asked", vec![awaits("word", vec![], None)]), json!({})).await;
    bench.until(asked, "waits", |v| !v.waiting.is_empty()).await;
    for name in ["nobody", "word"] {
        let update = Update { name: name.into(), payload: json!({"n": 1}), id: Some(name.into()), sender: None };
        bench.client.update(asked, update, Duration::from_secs(60)).await.expect("answered");
    }
    bench.closed(asked).await;

    let busy = definition("busy", vec![work("held", &[("is", Data::Literal(json!("held")))])]);
    let ended = bench.start(busy, json!({})).await;
    gate.arrived(1).await;
    bench.client.terminate(ended, "at once").await.expect("terminate");
    bench.closed(ended).await;
    gate.open(1);

    let with = BTreeMap::from([("n".to_owned(), Data::Expr(e("inputs.n + 1")))]);
    let mut again = step("again", Kind::ContinueAsNew { with, current: false });
    again.condition = Some(e("inputs.n < 2"));
    let mut chained = definition("chained", vec![work("a", &[]), again]);
    let n = Input { schema: json!({"type": "integer"}), required: false, default: Some(json!(1)) };
    chained.inputs.insert("n".into(), n);
    chained.finally = vec![work("clean", &[])];
    let continued = bench.start(chained, json!({})).await;
    bench.closed(continued).await;
    let once = |more: &str| definition("moved", vec![awaits("word", vec![], None), work(more, &[])]);
    let moved = bench.start(once("before"), json!({})).await;
    bench.until(moved, "waits", |v| !v.waiting.is_empty()).await;
    let mut later = once("after");
    later.steps.insert(0, work("first", &[]));
    let later = Migrate {
        to: bench.deploy(later).await,
        map: Default::default(),
        reason: "better".into(),
        by: Some("user:1".into()),
        dry_run: false,
        catalog: Default::default(),
    };
    bench.client.migrate(moved, later).await.expect("migrates");
    says(&bench, moved, "word", "1").await;
    bench.closed(moved).await;

    let mut away = definition("waited", vec![work("a", &[("is", Data::Literal(json!("away")))]), work("b", &[])]);
    // The steps and one attempt of each.
    away.executions_max = 4;
    let waited = bench.start(away, json!({})).await;
    bench.closed(waited).await;

    let block = Kind::Group { steps: vec![work("a", &[]), work("b", &[])], outputs: None };
    let rated = bench.deploy(definition("rated", vec![step("g", block)])).await;
    let rate = Some(Rate { key: "golden".into(), starts: 1, per_ms: 5_000 });
    let start = Start {
        run_id: None,
        definition: rated,
        inputs: json!({}),
        workflow_id: None,
        attributes: json!({"user_id": "u1"}),
        queue: String::new(),
        topic: None,
        admission: Admission { rate, ..Admission::default() },
    };
    let rated = bench.client.start(start).await.expect("start").run_id;
    bench.closed(rated).await;
    let fork = Fork { at: At::Seq(2), ..at_part };
    let held = bench.client.fork(rated, fork).await.expect("fork").run_id;
    bench.closed(held).await;
    let first = bench.client.history(held, 2, 1).await.expect("history");
    assert!(first[0].events[0]["not_before"].is_string(), "it was too late to be held back");

    // Nobody serves the child; it is ended when the time that the cancel leaves is nearly over.
    let mut nobody = definition("nobody", vec![work("inner", &[])]);
    nobody.runs_on = vec!["nowhere".into()];
    bench.deploy(nobody).await;
    let (workflow, version, with) = ("nobody".into(), CallVersion::Latest, BTreeMap::new());
    let call = step("part", Kind::Call { workflow, version, with, parent_close: ParentClose::Cancel });
    let bounded = bench.start(definition("bounded", vec![call]), json!({})).await;
    bench.until(bounded, "calls", |v| !v.waiting.is_empty()).await;
    bench.client.cancel_within(bounded, "enough", Duration::from_secs(1)).await.expect("cancel");
    bench.closed(bounded).await;

    fs::create_dir_all(folder()).expect("folder");
    let runs = [
        ("everything", whole),
        ("fork", forked),
        ("cancelled", cancelled),
        ("asked", asked),
        ("terminated", ended),
        ("continued", continued),
        ("moved", moved),
        ("waited", waited),
        ("held", held),
        ("bounded", bounded),
    ];
    for (what, run) in runs {
        let path = folder().join(format!("{name}-{what}.jsonl"));
        // What is there stays.
        if let Ok(mut file) = fs::File::create_new(path) {
            file.write_all(exported(&bench, run).await.as_bytes()).expect("written");
        }
    }
    worker.drain(Duration::from_secs(10)).await;
}
