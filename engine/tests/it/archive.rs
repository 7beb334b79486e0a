//! Runs out into files, in from files, and decided again: on a real database.

use crate::bench::{Bench, Gate, definition, e, step, waits_for, work};
use loopwright_engine::{
    Error, Failure,
    admission::Admission,
    archive::Archive,
    client::{At, Fork, Signal, Start, Why},
    definition::{Data, Definition, Kind, OnItemFailure, WaitUntil},
    ids::RunId,
    view::RunStatus,
};
use serde_json::{Map, Value, json};
use std::time::Duration;

const GRACE: Duration = Duration::from_secs(10);

pub async fn exported(bench: &Bench, run: RunId) -> String {
    let mut export = bench.client.export(run).await.expect("export");
    let mut text = String::new();
    while let Some(line) = export.next().await.expect("line") {
        assert!(line.ends_with('\n'));
        text.push_str(&line);
    }
    text
}

fn several() -> Definition {
    let each = Kind::Foreach {
        list: e("[1, 2, 3]"),
        key: None,
        max_items: 3,
        concurrency: 2,
        on_item_failure: OnItemFailure::FailFast,
        steps: vec![work("i", &[("n", Data::Expr(e("item")))])],
        outputs: None,
    };
    let mut flaky = work("flaky", &[("fails", Data::Literal(json!(true)))]);
    flaky.retry.jitter = 0.7;
    flaky.retry.delay_ms = 40;
    definition(
        "several",
        vec![flaky, step("each", each), step("w", Kind::Wait { until: WaitUntil::For(30) }), work("last", &[])],
    )
}

fn flaky(bench: &Bench) {
    bench.script(|ctx, input| async move {
        ctx.save("k", &json!({"n": 1})).await?;
        if input["fails"] == true && ctx.info().attempt == 1 {
            return Err(Failure::retryable("transient.network", "x"));
        }
        Ok(input)
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_is_decided_again_as_it_was_and_another_definition_is_told_from_it() {
    let bench = Bench::new().await;
    flaky(&bench);
    let worker = bench.worker().await;
    let run = bench.start(several(), json!({})).await;
    bench.client.pause(run, Why { reason: "look".into(), ..Why::default() }).await.expect("pause");
    bench.until(run, "paused", |v| v.status == RunStatus::Paused && v.live.is_empty()).await;
    bench.client.resume(run, Why::default()).await.expect("resume");
    let view = bench.closed(run).await;
    assert_eq!(view.status, RunStatus::Completed);
    let replayed = bench.client.replay(run, None).await.expect("folds");
    assert_eq!((replayed.divergence, replayed.decided), (None, view.seq));
    let mut other = several();
    other.steps[3] = work("last", &[("n", Data::Literal(json!(5)))]);
    let other = bench.deploy(other).await;
    let found = bench.client.replay(run, Some(other)).await.expect("folds").divergence.expect("differs");
    assert_eq!(found.expected.expect("event")["opened"]["input"], json!({"n": 5}));
    assert_eq!(found.found.expect("event")["opened"]["input"], json!({}));
    assert!(matches!(bench.client.replay(RunId::new(), None).await, Err(Error::RunNotFound(_))));
    // A history that somebody has touched.
    sqlx::query("update history set events = events - 0 where seq = 1").execute(&bench.pool).await.expect("sql");
    assert_eq!(bench.client.replay(run, None).await.expect_err("broken").code(), "invariant");
    worker.drain(GRACE).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_step_that_gives_null_has_an_output_also_after_its_run_was_loaded_again() {
    let bench = Bench::new().await;
    bench.script(|_, _| async { Ok(Value::Null) });
    let worker = bench.worker().await;
    let nap = step("nap", Kind::Wait { until: WaitUntil::For(30) });
    let last = work("last", &[("was", Data::Expr(e("has(steps.first.output) && steps.first.output == null")))]);
    let run = bench.start(definition("null", vec![work("first", &[]), nap, last]), json!({})).await;
    assert_eq!(bench.closed(run).await.status, RunStatus::Completed);
    assert_eq!(bench.client.replay(run, None).await.expect("folds").divergence, None);
    let rows = bench.client.history(run, 0, 100).await.expect("history");
    let opened = rows.iter().flat_map(|row| &row.events).find(|e| e["path"] == "last" && e["type"] == "step_started");
    assert_eq!(opened.expect("begun")["opened"]["input"], json!({"was": true}));
    worker.drain(GRACE).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_exported_run_is_read_elsewhere_and_nothing_of_it_is_ever_executed() {
    let (here, there) = (Bench::new().await, Bench::new().await);
    flaky(&here);
    let worker = here.worker().await;
    let closed = here.start(several(), json!({})).await;
    here.closed(closed).await;
    let waits = definition("waits", vec![step("w", Kind::Wait { until: WaitUntil::For(3_600_000) }), work("a", &[])]);
    let waits = here.deploy(waits).await;
    let open = here.start_as(waits, json!({}), Some("project:1")).await.run_id;
    here.until(open, "waits", |v| !v.waiting.is_empty()).await;
    let files = [exported(&here, closed).await, exported(&here, open).await];
    worker.drain(GRACE).await;

    let elsewhere = there.worker().await;
    for file in &files {
        let archive = Archive::read(file.as_bytes()).expect("valid");
        assert_eq!(archive.replay(None).expect("folds").divergence, None);
        let run = there.client.import(archive.clone()).await.expect("import");
        assert_eq!(there.client.import(archive).await.expect_err("again").code(), "run_exists");
        // The copy is the original, but for when it was exported and what it is here.
        let body =
            |text: &str| text.lines().skip(1).filter(|l| !l.starts_with("{\"end\"")).collect::<Vec<_>>().join("\n");
        assert_eq!(body(&exported(&there, run).await), body(file));
        assert_eq!(there.client.replay(run, None).await.expect("folds").divergence, None);
    }
    let (view, original) =
        (there.client.describe(closed).await.expect("run"), here.client.describe(closed).await.expect("run"));
    assert_eq!((view.status, &view.output, view.seq), (RunStatus::Completed, &original.output, original.seq));
    assert!(view.imported_at.is_some());
    let view = there.client.describe(open).await.expect("run");
    assert_eq!((view.status, view.nodes.len()), (RunStatus::Quarantined, 1));
    // Nobody can act on it.
    let signal = Signal { name: "x".into(), ..Signal::default() };
    for refused in [
        there.client.signal(open, signal).await.map(drop),
        there.client.cancel(open, "x").await,
        there.client.terminate(open, "x").await,
        there.client.pause(open, Why::default()).await.map(drop),
        there.client.unquarantine(open, Why::default()).await.map(drop),
    ] {
        assert_eq!(refused.expect_err("read only").code(), "run_imported");
    }
    for sql in [
        "update runs set owner = gen_random_uuid(), parked = false where closed_at is null",
        "update runs set status = 'running' where closed_at is null",
    ] {
        let error = sqlx::query(sql).execute(&there.pool).await.expect_err("refused by the database");
        assert!(error.to_string().contains("runs_imported_check"), "{error}");
    }
    let queued: i64 = sqlx::query_scalar("select (select count(*) from ready) + (select count(*) from workflow_ids) + (select count(*) from outbox) + (select count(*) from test_starts)")
        .fetch_one(&there.pool).await.expect("count");
    assert_eq!(queued, 0);
    // A name that was not deployed here has no current version because of it.
    assert_eq!(
        there.client.pointer("waits", "current").await.expect_err("not deployed").code(),
        "definition_not_found"
    );
    // It may be forked: that is another run.
    let fork = Fork { attributes: Some(json!({"user_id": "me"})), ..fork_at(1) };
    let fork = there.client.fork(open, fork).await.expect("fork").run_id;
    there.until(fork, "waits", |v| !v.waiting.is_empty()).await;
    there.client.terminate(fork, "enough").await.expect("terminate");
    elsewhere.drain(GRACE).await;
    there.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_archive_whose_history_does_not_fold_is_not_imported() {
    let (here, there) = (Bench::new().await, Bench::new().await);
    let worker = here.worker().await;
    let run = here.start(definition("two", vec![work("a", &[]), work("b", &[])]), json!({})).await;
    here.closed(run).await;
    worker.drain(GRACE).await;
    let good = Archive::read(exported(&here, run).await.as_bytes()).expect("valid");
    let mut broken = good.clone();
    broken.history[1].events.remove(0);
    let mut lies = good.clone();
    lies.header.run.status = RunStatus::Failed;
    let mut opened = good.clone();
    opened.header.run.closed_at = None;
    let mut newer = good.clone();
    newer.history[0].format = 900;
    for archive in [broken, lies, opened, newer] {
        assert_eq!(there.client.import(archive).await.expect_err("refused").code(), "archive_invalid");
    }
    let rows: i64 = sqlx::query_scalar("select (select count(*) from runs) + (select count(*) from definitions)")
        .fetch_one(&there.pool)
        .await
        .expect("count");
    assert_eq!(rows, 0, "nothing of it is there");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_running_can_be_exported_and_ends_where_it_stood() {
    let bench = Bench::new().await;
    let gate = Gate::new();
    {
        let gate = gate.clone();
        bench.script(move |ctx, _| {
            let gate = gate.clone();
            async move {
                ctx.save("k", &json!(7)).await?;
                gate.pass().await;
                Ok(json!(1))
            }
        });
    }
    let worker = bench.worker().await;
    let run = bench.start(definition("live", vec![work("a", &[]), work("b", &[])]), json!({})).await;
    gate.arrived(1).await;
    let mut export = bench.client.export(run).await.expect("export");
    gate.open(2);
    bench.closed(run).await;
    let mut text = String::new();
    while let Some(line) = export.next().await.expect("line") {
        text.push_str(&line);
    }
    let archive = Archive::read(text.as_bytes()).expect("valid");
    assert_eq!((archive.history.len(), archive.header.run.status), (1, RunStatus::Running));
    assert!(archive.checkpoints.iter().any(|c| c.path == "a" && c.value == json!(7)));
    assert!(matches!(bench.client.export(RunId::new()).await.err(), Some(Error::RunNotFound(_))));
    worker.drain(GRACE).await;
}

/// Imports are from people: what a file says of itself is compared with its history, and what cannot be kept is named.
#[tokio::test(flavor = "multi_thread")]
async fn an_archive_that_lies_or_holds_what_no_table_holds_is_refused_by_name() {
    let (here, there) = (Bench::new().await, Bench::new().await);
    flaky(&here);
    let worker = here.worker().await;
    let run = here.start(definition("two", vec![work("a", &[]), work("b", &[])]), json!({})).await;
    here.closed(run).await;
    worker.drain(GRACE).await;
    let good = Archive::read(exported(&here, run).await.as_bytes()).expect("valid");
    assert!(good.checkpoints.len() > 1);
    let far = "+262142-12-31T23:59:59Z";
    let blocked = json!({"type": "attempt_blocked", "path": "a", "reason": "x", "message": "y", "at": far});
    let signal = json!({"type": "signal_received", "n": u64::MAX, "name": "x", "payload": 1, "at": good.history[0].at});
    type Change = Box<dyn Fn(&mut Archive)>;
    let changes: Vec<(&str, &str, Change)> = vec![
        ("archive_invalid", "`other`", Box::new(|a| a.header.run.workflow = "other".into())),
        ("archive_invalid", "`other`", Box::new(|a| a.header.definition.name = "other".into())),
        ("archive_invalid", "output", Box::new(|a| a.header.run.output = Some(json!({"paid": true})))),
        ("archive_invalid", "failure", Box::new(|a| a.header.run.failure = Some(json!({"kind": "permanent"})))),
        ("archive_invalid", "forked", Box::new(|a| a.header.run.forked_seq = 2)),
        ("archive_invalid", "object", Box::new(|a| a.header.run.attributes = json!([1]))),
        ("too_large", "attributes", Box::new(|a| a.header.run.attributes = json!({"x": "y".repeat(9_000)}))),
        ("archive_invalid", "instant", Box::new(move |a| a.header.run.started_at = far.parse().expect("instant"))),
        ("archive_invalid", "instant", Box::new(move |a| a.history[1].at = far.parse().expect("instant"))),
        ("archive_invalid", "instant", Box::new(move |a| a.history[0].events.insert(2, blocked.clone()))),
        ("archive_invalid", "instant", Box::new(move |a| a.history[0].events[0]["deadline"] = json!(far))),
        ("archive_invalid", "signal", Box::new(move |a| a.history[0].events.push(signal.clone()))),
        ("archive_invalid", "NUL", Box::new(|a| a.header.run.queue = "a\0b".into())),
        ("archive_invalid", "NUL", Box::new(|a| a.header.run.attributes = json!({"x": "\0"}))),
        ("archive_invalid", "NUL", Box::new(|a| a.checkpoints[0].key = "\0".into())),
        ("archive_invalid", "NUL", Box::new(|a| a.history[0].events[0]["inputs"] = json!({"x": "\0"}))),
        ("archive_invalid", "twice", Box::new(|a| a.checkpoints[1] = a.checkpoints[0].clone())),
    ];
    for (code, word, change) in changes {
        let mut bad = good.clone();
        change(&mut bad);
        let error = there.client.import(bad).await.expect_err(word);
        assert_eq!(error.code(), code, "{word}: {error}");
        assert!(error.to_string().contains(word), "{word}: {error}");
    }
    let rows: i64 = sqlx::query_scalar("select (select count(*) from runs) + (select count(*) from definitions)")
        .fetch_one(&there.pool)
        .await
        .expect("count");
    assert_eq!(rows, 0, "nothing of it is there");
    // Nor is it replayed.
    let mut late = good.clone();
    late.history[0].events[0]["deadline"] = json!(far);
    assert_eq!(late.replay(None).expect_err("refused").code(), "archive_invalid");
    // Whose rows are only folded is read from the history, whatever the header says.
    let mut lies = good.clone();
    lies.header.run.forked_seq = good.header.run.seq;
    assert_eq!(lies.replay(None).expect("folds").decided, good.header.run.seq);
    there.client.import(good).await.expect("import");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_import_under_a_taken_id_leaves_no_definition_behind() {
    let (here, elsewhere, there) = (Bench::new().await, Bench::new().await, Bench::new().await);
    let id = RunId::new();
    let mut files = Vec::new();
    for (bench, name) in [(&here, "one"), (&elsewhere, "two")] {
        let definition = bench.deploy(definition(name, vec![work("a", &[])])).await;
        let start = Start {
            run_id: Some(id),
            definition,
            inputs: json!({}),
            workflow_id: None,
            attributes: json!({}),
            queue: String::new(),
            topic: None,
            admission: Admission::default(),
        };
        let worker = bench.worker().await;
        bench.client.start(start).await.expect("start");
        bench.closed(id).await;
        worker.drain(GRACE).await;
        files.push(Archive::read(exported(bench, id).await.as_bytes()).expect("valid"));
    }
    let second = files.remove(1);
    there.client.import(files.remove(0)).await.expect("import");
    assert_eq!(there.client.import(second).await.expect_err("taken").code(), "run_exists");
    let names: Vec<String> =
        sqlx::query_scalar("select name from definitions").fetch_all(&there.pool).await.expect("names");
    assert_eq!(names, ["one"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fork_of_a_file_takes_signals_beside_those_that_waited_in_it() {
    let (here, there) = (Bench::new().await, Bench::new().await);
    let await_for = |name| step(name, Kind::Await(Box::new(waits_for(name))));
    let run = here.start(definition("asks", vec![await_for("go"), await_for("later")]), json!({})).await;
    let signal = |name: &str| Signal { name: name.into(), payload: json!({"x": name}), ..Signal::default() };
    here.client.signal(run, signal("later")).await.expect("sent");
    let worker = here.worker().await;
    here.until(run, "waits", |v| !v.waiting.is_empty()).await;
    worker.drain(GRACE).await;
    let archive = Archive::read(exported(&here, run).await.as_bytes()).expect("valid");
    let seq = archive.header.run.seq;
    there.client.import(archive).await.expect("import");
    let asked = Fork { attributes: Some(json!({"user_id": "me"})), ..fork_at(seq) };
    let fork = there.client.fork(run, asked).await.expect("fork").run_id;
    let worker = there.worker().await;
    there.client.signal(fork, signal("go")).await.expect("sent");
    let view = there.until(fork, "ended", |v| v.status.is_closed() || v.status == RunStatus::Quarantined).await;
    assert_eq!(view.status, RunStatus::Completed);
    worker.drain(GRACE).await;
    there.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_a_file_names_does_not_pay_for_what_is_made_of_it() {
    let (here, there) = (Bench::new().await, Bench::new().await);
    let run = here
        .start(definition("waits", vec![step("w", Kind::Wait { until: WaitUntil::For(3_600_000) })]), json!({}))
        .await;
    let worker = here.worker().await;
    here.until(run, "waits", |v| !v.waiting.is_empty()).await;
    worker.drain(GRACE).await;
    there.client.import(Archive::read(exported(&here, run).await.as_bytes()).expect("valid")).await.expect("import");
    let error = there.client.fork(run, fork_at(1)).await.expect_err("whose?");
    assert_eq!(error.code(), "fork_invalid");
    assert!(error.to_string().contains("say whose"), "{error}");
    for (attributes, code) in [(json!(5), "fork_invalid"), (json!({"x": "y".repeat(9_000)}), "too_large")] {
        let asked = Fork { attributes: Some(attributes), ..fork_at(1) };
        assert_eq!(there.client.fork(run, asked).await.expect_err("refused").code(), code);
    }
    let asked = Fork { attributes: Some(json!({"user_id": "me"})), ..fork_at(1) };
    let fork = there.client.fork(run, asked).await.expect("fork").run_id;
    assert_eq!(there.client.describe(fork).await.expect("run").attributes, json!({"user_id": "me"}));
    there.client.terminate(fork, "enough").await.expect("terminate");
}

fn fork_at(seq: u64) -> Fork {
    Fork {
        run_id: None,
        at: At::Seq(seq),
        inputs: Map::new(),
        definition: None,
        attributes: None,
        reason: "try".into(),
    }
}
