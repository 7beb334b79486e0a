//! Large values and what looks like a reference, without keys: on a real database. With keys: `tests/payload`.

use crate::{
    archive::exported,
    bench::{Bench, definition, e, step, waits_for, work},
};
use loopwright_engine::{
    archive::Archive,
    client::{At, Fork, Signal},
    definition::{Data, Definition, Input, Kind, OnItemFailure},
    ids::RunId,
    view::RunStatus,
};
use serde_json::{Map, Value, json};
use std::time::Duration;

const GRACE: Duration = Duration::from_secs(10);
const LARGE: usize = 300 << 10;

fn large() -> String {
    (0..LARGE / 20).map(|n| format!("line number {n:07}\n")).collect()
}

async fn number(bench: &Bench, sql: &'static str, run: RunId) -> i64 {
    sqlx::query_scalar(sql).bind(run.0).fetch_one(&bench.pool).await.expect("number")
}

const BLOBS: &str = "select count(*) from blobs where run_id = $1";
const LONGEST_ROW: &str = "select max(length(events::text))::bigint from history where run_id = $1";

/// A step with a large result and a large checkpoint, many steps after it, and the result as the run's output.
fn heavy() -> Definition {
    let many = Kind::Foreach {
        list: e(
            "[1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31,32,33,34,35,36,37,38,39,40]",
        ),
        key: None,
        max_items: 40,
        concurrency: 1,
        on_item_failure: OnItemFailure::FailFast,
        steps: vec![work("i", &[("n", Data::Expr(e("item")))])],
        outputs: None,
    };
    let mut d = definition(
        "heavy",
        vec![work("a", &[("large", Data::Literal(json!(true)))]), step("many", many), work("z", &[])],
    );
    d.outputs.insert("wrapped".into(), Data::Expr(e("steps.a.output")));
    d.outputs.insert("text".into(), Data::Expr(e("steps.a.output.text")));
    d
}

fn works(bench: &Bench) {
    bench.script(|ctx, input| async move {
        if input["large"] != true {
            return Ok(input);
        }
        let text = large();
        ctx.save("answer", &json!({ "choices": [{ "text": text }] })).await?;
        let read = ctx.checkpoint("answer").await?.expect("saved");
        assert_eq!(read["choices"][0]["text"], text);
        Ok(json!({ "text": text, "n": 1 }))
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_value_is_stored_once_a_run_and_comes_back_everywhere() {
    let bench = Bench::new().await;
    works(&bench);
    let worker = bench.worker().await;
    let run = bench.start(heavy(), json!({})).await;
    let view = bench.closed(run).await;
    let wanted = json!({ "wrapped": { "text": large(), "n": 1 }, "text": large() });
    assert_eq!((view.status, view.output.as_ref()), (RunStatus::Completed, Some(&wanted)));

    // In the history, the output, the checkpoint and the state it is one row.
    assert_eq!(number(&bench, BLOBS, run).await, 1);
    assert!(number(&bench, LONGEST_ROW, run).await < 8_000);
    let others = "select greatest(length(output::text), length(cursor::text),
                    (select max(length(value::text)) from checkpoints c where c.run_id = r.run_id))::bigint from runs r where run_id = $1";
    assert!(number(&bench, "select cursor_seq from runs where run_id = $1", run).await >= 32, "a cursor was written");
    assert!(number(&bench, others, run).await < 60_000);
    let stored = "select (size / 4 > octet_length(bytes))::int::bigint from blobs where run_id = $1";
    assert_eq!(number(&bench, stored, run).await, 1, "it is deflated");

    let rows = bench.client.history(run, 0, 1000).await.expect("history");
    let events: Vec<String> = rows.iter().flat_map(|r| &r.events).map(Value::to_string).collect();
    assert!(events.iter().any(|e| e.contains(&json!(large()).to_string())), "whole for whoever reads it");
    assert!(!events.iter().any(|e| e.contains("$loopwright")));
    let replayed = bench.client.replay(run, None).await.expect("folds");
    assert_eq!((replayed.divergence, replayed.decided), (None, view.seq));

    // A release that does not know references leaves the run alone: the rows that have one say so, and so does the state. Who reads
    // the events, gets them whole and in their own vocabulary.
    let apart =
        "select count(*) from history where run_id = $1 and (format = 6) <> (events::text like '%$loopwright%')";
    assert_eq!(number(&bench, apart, run).await, 0);
    assert!(number(&bench, "select count(*) from history where run_id = $1 and format = 6", run).await > 0);
    assert!(number(&bench, "select count(*) from history where run_id = $1 and format = 1", run).await > 30);
    assert_eq!(number(&bench, "select (cursor->>'format')::bigint from runs where run_id = $1", run).await, 6);
    assert!(rows.iter().all(|row| row.format < 6));

    // A fork reads its parent's rows, and keeps of them what is in its own state.
    let fork = Fork {
        run_id: None,
        at: At::Step("z".into()),
        inputs: Map::new(),
        definition: None,
        attributes: None,
        reason: "again".into(),
    };
    let fork = bench.client.fork(run, fork).await.expect("fork").run_id;
    let forked = bench.closed(fork).await;
    assert_eq!((forked.status, forked.output.as_ref()), (RunStatus::Completed, Some(&wanted)));
    assert!(number(&bench, LONGEST_ROW, fork).await < 8_000);
    worker.drain(GRACE).await;
    bench.audit().await;

    // A file has it whole, and another database takes it out again.
    let other = Bench::new().await;
    for id in [run, fork] {
        let text = exported(&bench, id).await;
        assert!(text.contains(&json!(large()).to_string()) && !text.contains("$loopwright"));
        let archive = Archive::read(text.as_bytes()).expect("archive");
        other.client.import(archive).await.expect("import");
        assert_eq!(other.client.describe(id).await.expect("run").output.as_ref(), Some(&wanted));
        assert!(number(&other, LONGEST_ROW, id).await < 8_000);
        assert_eq!(exported_body(&other, id).await, body(&text), "out and in and out");
    }

    // Its values go with a run.
    sqlx::query("delete from runs where run_id = $1").bind(run.0).execute(&other.pool).await.expect("deleted");
    assert_eq!(number(&other, BLOBS, run).await, 0);
}

/// History and checkpoints of an archive: the header says when it was exported.
fn body(text: &str) -> Vec<Value> {
    let lines = text.lines().skip(1).map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
    lines.filter(|line| line["history"].is_object() || line["checkpoint"].is_object()).collect()
}

async fn exported_body(bench: &Bench, run: RunId) -> Vec<Value> {
    body(&exported(bench, run).await)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_looks_like_ours_is_the_users_and_large_messages_and_inputs_come_whole() {
    let bench = Bench::new().await;
    bench.script(|ctx, input| async move {
        ctx.save("k", &input["odd"]).await?;
        assert_eq!(ctx.checkpoint("k").await?.as_ref(), Some(&input["odd"]));
        Ok(input["odd"].clone())
    });
    let odd = json!({ "$loopwright": { "blob": "ab".repeat(32), "size": 3 } });
    let sealed = json!({ "$sealed": { "key": "a", "data": "b" } });
    let mut d = definition(
        "odd",
        vec![step("q", Kind::Await(Box::new(waits_for("go")))), work("a", &[("odd", Data::Expr(e("inputs.odd")))])],
    );
    for name in ["odd", "large"] {
        d.inputs.insert(name.into(), Input { schema: json!({}), required: true, default: None });
    }
    d.outputs.insert("odd".into(), Data::Expr(e("steps.a.output")));
    d.outputs.insert("sent".into(), Data::Expr(e("steps.q.output")));
    let worker = bench.worker().await;
    for value in [odd, sealed] {
        let run = bench.start(d.clone(), json!({ "odd": value, "large": large() })).await;
        assert_eq!(bench.client.describe(run).await.expect("run").inputs["large"], large());
        let payload = json!({ "odd": value, "text": "y".repeat(200_000) });
        let signal = Signal { name: "go".into(), payload: payload.clone(), ..Signal::default() };
        assert!(bench.client.signal(run, signal).await.expect("sent"));
        let view = bench.closed(run).await;
        assert_eq!(view.status, RunStatus::Completed, "{:?}", view.failure);
        let output = view.output.expect("output");
        assert_eq!(output["odd"], value);
        assert!(output["sent"].to_string().contains(&payload["text"].to_string()), "the payload came whole");
        assert_eq!(number(&bench, BLOBS, run).await, 2, "inputs and payload");
        let inbox = "select (max(length(payload::text)) + max(length(inputs::text)))::bigint from inbox join runs using (run_id) where run_id = $1";
        assert!(number(&bench, inbox, run).await < 2_000);
    }
    // A message to a run that is not there leaves nothing.
    let nobody = RunId::new();
    let payload = json!({ "text": "y".repeat(200_000) });
    let error = bench.client.signal(nobody, Signal { name: "go".into(), payload, ..Signal::default() }).await;
    assert_eq!(error.expect_err("no run").code(), "run_not_found");
    assert_eq!(number(&bench, BLOBS, nobody).await, 0);
    worker.drain(GRACE).await;
    bench.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blob_that_is_gone_or_changed_is_said_and_not_guessed() {
    let bench = Bench::new().await;
    works(&bench);
    let worker = bench.worker().await;
    let run = bench.start(heavy(), json!({})).await;
    bench.closed(run).await;
    worker.drain(GRACE).await;
    let first = "(select bytes from blobs limit 1)";
    for change in [
        format!("update blobs set bytes = overlay({first} placing '\\xff' from octet_length({first}) / 2)"),
        "update blobs set bytes = '\\x007b7d'".to_owned(),
        "delete from blobs".to_owned(),
    ] {
        sqlx::query(sqlx::AssertSqlSafe(change)).execute(&bench.pool).await.expect("changed");
        let error = bench.client.describe(run).await.expect_err("corrupt");
        assert_eq!(error.code(), "payload_corrupt", "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_nobody_takes_leaves_no_blob() {
    let bench = Bench::new().await;
    let worker = bench.worker().await;
    let asks = |name: &str| step(name, Kind::Await(Box::new(waits_for(name))));
    let run = bench.start(definition("asks", vec![asks("go"), asks("end")]), json!({})).await;
    // Large, and as a message is allowed to be.
    let text = large()[..100_000].to_owned();
    let send = |name: &str, id: &str, n: usize| {
        let payload = json!({ "text": text, "n": n });
        let signal = Signal { name: name.into(), payload, dedupe_id: Some(id.into()), sender: None };
        bench.client.signal(run, signal)
    };
    assert!(send("go", "a", 1).await.expect("sent"));
    assert_eq!(number(&bench, BLOBS, run).await, 1);
    // It may be taken in the first transition.
    bench.until(run, "waits for the next", |v| v.nodes.iter().any(|node| node.path == "end")).await;
    // The same id with something else that is large.
    let other = |name: &str, id: &str| Signal {
        name: name.into(),
        payload: json!({ "text": text.to_uppercase() }),
        dedupe_id: Some(id.into()),
        sender: None,
    };
    assert!(!bench.client.signal(run, other("go", "a")).await.expect("known"));
    assert_eq!(number(&bench, BLOBS, run).await, 1);
    assert!(send("end", "b", 2).await.expect("sent"));
    bench.closed(run).await;
    let before = number(&bench, BLOBS, run).await;
    bench.client.signal(run, other("end", "c")).await.expect_err("closed");
    assert_eq!(number(&bench, BLOBS, run).await, before);
    worker.drain(GRACE).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn json_is_as_deep_as_can_be_read_again_and_no_deeper() {
    let bench = Bench::new().await;
    bench.script(|ctx, input| async move {
        if ctx.info().path == "deeper" {
            let refused = ctx.save("k", &json!([input["value"]])).await.expect_err("too deep");
            assert_eq!(refused.code, "limit.size");
            return Ok(json!({ "value": input["value"] }));
        }
        ctx.save("k", &input["value"]).await?;
        Ok(input["value"].clone())
    });
    let nested = |levels: usize| (0..levels).fold(json!(1), |inner, _| json!({ "$loopwright": inner }));
    let most = loopwright_engine::definition::inputs::DEPTH_MAX;
    let value = || Data::Expr(e("steps.q.output"));
    let asks = step("q", Kind::Await(Box::new(waits_for("go"))));
    let mut d = definition("deep", vec![asks, work("a", &[("value", value())])]);
    d.inputs.insert("value".into(), Input { schema: json!({}), required: false, default: None });
    d.outputs.insert("value".into(), Data::Expr(e("inputs.value")));
    let mut deeper = definition(
        "deeper",
        vec![step("q", Kind::Await(Box::new(waits_for("go")))), work("deeper", &[("value", value())])],
    );
    deeper.inputs.clone_from(&d.inputs);
    let (hash, deeper) = (bench.deploy(d).await, bench.deploy(deeper).await);
    let worker = bench.worker().await;
    // Inputs are an object themselves.
    let run = bench.start_as(hash, json!({ "value": nested(most - 1) }), None).await.run_id;
    let go = |payload: Value| Signal { name: "go".into(), payload, ..Signal::default() };
    let refused = bench.client.signal(run, go(nested(most + 1))).await.expect_err("too deep");
    assert_eq!(refused.code(), "too_deep");
    assert!(bench.client.signal(run, go(nested(most))).await.expect("sent"));
    let view = bench.closed(run).await;
    assert_eq!(
        (view.status, view.output),
        (RunStatus::Completed, Some(json!({ "value": nested(most - 1) }))),
        "{:?}",
        view.failure
    );
    assert_eq!(bench.client.replay(run, None).await.expect("folds").divergence, None);
    let archive = Archive::read(exported(&bench, run).await.as_bytes()).expect("reads");
    let other = Bench::new().await;
    other.client.import(archive).await.expect("import");
    // An output and a checkpoint that are deeper fail as what they are.
    let run = bench.start_as(deeper, json!({}), None).await.run_id;
    assert!(bench.client.signal(run, go(nested(most))).await.expect("sent"));
    let view = bench.closed(run).await;
    assert_eq!(view.failure.expect("a failure").code, "limit.size");
    for attributes in [nested(most), nested(most + 1)] {
        let start = loopwright_engine::client::Start {
            run_id: None,
            definition: hash,
            inputs: json!({ "value": nested(most) }),
            workflow_id: None,
            attributes: attributes.clone(),
            queue: String::new(),
            topic: None,
            admission: Default::default(),
        };
        let code = if attributes == nested(most) { "input_invalid" } else { "too_deep" };
        assert_eq!(bench.client.start(start).await.expect_err("too deep").code(), code);
    }
    worker.drain(GRACE).await;
    bench.audit().await;
}
