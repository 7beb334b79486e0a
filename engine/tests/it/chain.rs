//! Runs that continue as new on a real database: what goes along, who hears of the end, what a crash between leaves.

use crate::{
    archive::exported,
    bench::{Bench, Gate, definition, e, step, waits_for, work},
    faults::GRACE,
};
use loopwright_engine::{
    admission::{OnConflict, Place, Rate},
    archive::Archive,
    client::{At, Filter, Fork, Signal, Update},
    definition::{CallVersion, Concurrency, Data, Definition, Input, Kind, ParentClose, Step},
    filter::Query,
    ids::RunId,
    schedule::{Overlap, Spec, When, door::NewSchedule},
    view::{Answer, RunStatus, Waiting},
};
use serde_json::{Map, Value, json};
use std::{collections::BTreeMap, time::Duration};

/// Long enough for any answer; a test that waits that long has found a bug.
const LONG: Duration = Duration::from_secs(60);

fn named(data: &[(&str, Data)]) -> BTreeMap<String, Data> {
    data.iter().map(|(name, data)| ((*name).to_owned(), data.clone())).collect()
}

fn expr(text: &str) -> Data {
    Data::Expr(e(text))
}

/// Goes on with a number that is one larger, while it is below `most`.
fn again(most: u32, current: bool) -> Step {
    let mut again = step("again", Kind::ContinueAsNew { with: named(&[("n", expr("inputs.n + 1"))]), current });
    again.condition = Some(e(&format!("inputs.n < {most}")));
    again
}

/// With an input `n`, 1 at first, which is its output.
fn counting(name: &str, steps: Vec<Step>) -> Definition {
    let mut d = definition(name, steps);
    let n = Input { schema: json!({"type": "integer"}), required: false, default: Some(json!(1)) };
    d.inputs.insert("n".into(), n);
    d.outputs = named(&[("n", expr("inputs.n"))]);
    d
}

fn awaits(id: &str, signal: &str) -> Step {
    step(id, Kind::Await(Box::new(waits_for(signal))))
}

fn only_in(n: u32, mut step: Step) -> Step {
    step.condition = Some(e(&format!("inputs.n == {n}")));
    step
}

fn signal(name: &str, id: &str) -> Signal {
    Signal { name: name.into(), payload: json!({"id": id}), dedupe_id: Some(id.into()), sender: None }
}

/// The run after this one, which has closed as continued.
async fn next_of(bench: &Bench, run: RunId) -> RunId {
    let view = bench.closed(run).await;
    assert_eq!(view.status, RunStatus::Continued, "{:?}", view.failure);
    view.chain.continued_as.expect("a successor")
}

async fn count(bench: &Bench, query: &str) -> u64 {
    let matching = Some(Query::parse(query).expect("query"));
    bench.client.count(&Filter { matching, ..Filter::default() }).await.expect("count")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_parent_hears_of_the_last_of_three() {
    let bench = Bench::new().await;
    let worker = bench.worker().await;
    let mut child = counting("child", vec![work("a", &[]), again(3, false)]);
    child.finally = vec![work("clean", &[])];
    bench.deploy(child).await;
    let (workflow, version, with) = ("child".into(), CallVersion::Latest, BTreeMap::new());
    let call = Kind::Call { workflow, version, with, parent_close: ParentClose::Cancel };
    let mut parent = definition("parent", vec![step("c", call)]);
    parent.outputs = named(&[("n", expr("steps.c.output.n"))]);
    let run = bench.start(parent, json!({})).await;
    let waits = |w: &Waiting| if let Waiting::Child { run_id, .. } = w { Some(*run_id) } else { None };
    let view = bench.until(run, "calls", |v| v.waiting.iter().any(|w| waits(w).is_some())).await;
    let first = view.waiting.iter().find_map(waits).expect("a child");
    let view = bench.closed(run).await;
    assert_eq!((view.status, view.output), (RunStatus::Completed, Some(json!({"n": 3}))));
    let second = next_of(&bench, first).await;
    let third = next_of(&bench, second).await;
    let last = bench.closed(third).await;
    assert_eq!((last.status, &last.inputs), (RunStatus::Completed, &json!({"n": 3})));
    assert_eq!((last.chain.first, last.chain.continued_from), (Some(first), Some(second)));
    assert_eq!((last.chain.continued_as, last.attributes), (None, json!({"user_id": "u1"})));
    let rows: Vec<(Option<uuid::Uuid>, Option<String>, i32)> =
        sqlx::query_as("select parent_run_id, parent_path, depth from runs where run_id = any($1)")
            .bind([first.0, second.0, third.0])
            .fetch_all(&bench.pool)
            .await
            .expect("rows");
    assert!(rows.iter().all(|row| *row == (Some(run.0), Some("c".into()), 1)), "{rows:?}");
    // Never two starts of a chain within a second.
    for (before, after) in [(first, second), (second, third)] {
        let begun = async |run| {
            let rows = bench.client.history(run, 0, 1).await.expect("history");
            rows[0].events[0]["at"].as_str().expect("at").parse::<chrono::DateTime<chrono::Utc>>().expect("instant")
        };
        assert!(begun(after).await - begun(before).await >= chrono::Duration::milliseconds(990));
    }
    assert_eq!(count(&bench, "status = 'continued'").await, 2);
    for run in [run, first, second, third] {
        assert_eq!(bench.client.replay(run, None).await.expect("replays").divergence, None);
    }
    worker.drain(GRACE).await;
    bench.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_business_key_and_what_nobody_has_taken_go_along() {
    let bench = Bench::new().await;
    let client = &bench.client;
    let ask = vec![
        only_in(1, awaits("next", "next")),
        again(2, false),
        awaits("one", "data"),
        awaits("two", "data"),
        awaits("last", "last"),
    ];
    let mut d = counting("keyed", ask);
    d.outputs = named(&[("ids", expr("[steps.one.output.id, steps.two.output.id]"))]);
    let hash = bench.deploy(d).await;
    let first = bench.start_as(hash, json!({}), Some("key")).await.run_id;
    for message in [signal("data", "d1"), signal("next", "n1"), signal("data", "d2")] {
        assert!(client.signal(first, message).await.expect("sent"));
    }
    let worker = bench.worker().await;
    let second = next_of(&bench, first).await;
    assert_eq!(client.open_run("key").await.expect("asked"), Some(second));
    let again = bench.start_as(hash, json!({}), Some("key")).await;
    assert_eq!((again.run_id, again.created), (second, false));
    bench.until(second, "took both", |v| v.nodes.iter().any(|n| n.path == "last")).await;
    // Whoever repeats is not heard twice, whichever of the two it asks.
    for id in ["d1", "n1", "d2"] {
        let name = if id == "n1" { "next" } else { "data" };
        for run in [first, second] {
            assert!(!client.signal(run, signal(name, id)).await.expect("known"), "{id}");
        }
    }
    for error in [
        client.signal(first, signal("last", "l1")).await.expect_err("closed"),
        client.cancel(first, "enough").await.expect_err("closed"),
        client.terminate(first, "enough").await.expect_err("closed"),
    ] {
        assert_eq!(error.code(), "run_closed");
        assert!(error.to_string().contains(&second.to_string()), "{error}");
    }
    assert!(client.signal(second, signal("last", "l1")).await.expect("sent"));
    let view = bench.closed(second).await;
    assert_eq!(view.output, Some(json!({"ids": ["d1", "d2"]})), "{:?}", view.failure);
    assert_eq!(client.open_run("key").await.expect("asked"), None);
    assert_eq!(client.replay(second, None).await.expect("replays").divergence, None);
    worker.drain(GRACE).await;
    bench.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_update_is_answered_by_whichever_run_takes_it() {
    let bench = Bench::new().await;
    let client = &bench.client;
    let d = counting(
        "asked",
        vec![only_in(1, awaits("next", "next")), again(2, false), awaits("ask", "ask"), awaits("last", "last")],
    );
    let first = bench.start(d, json!({})).await;
    let update = |name: &str, id: &str| Update {
        name: name.into(),
        payload: json!({"id": id}),
        id: Some(id.into()),
        sender: None,
    };
    let pending = client.update(first, update("ask", "u1"), Duration::ZERO).await.expect_err("no worker");
    assert_eq!(pending.code(), "update_pending");
    let worker = bench.worker().await;
    let completed = |id: &str| Answer::Completed { result: json!({ "id": id }) };
    assert_eq!(client.update(first, update("next", "u0"), LONG).await.expect("answered").answer, completed("u0"));
    let second = next_of(&bench, first).await;
    for run in [first, second] {
        for (name, id) in [("next", "u0"), ("ask", "u1")] {
            assert_eq!(client.updated(run, id, LONG).await.expect("answered").answer, completed(id), "{id}");
            let sent_again = client.update(run, update(name, id), LONG).await.expect("answered");
            assert_eq!(sent_again.answer, completed(id), "{id}");
        }
        assert_eq!(client.updated(run, "u9", LONG).await.expect_err("never sent").code(), "update_not_found");
    }
    assert_eq!(client.update(first, update("ask", "u2"), LONG).await.expect_err("closed").code(), "run_closed");
    client.terminate(second, "seen").await.expect("terminated");
    worker.drain(GRACE).await;
    bench.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_cancels_while_it_cleans_up_has_cancelled_the_chain() {
    let bench = Bench::new().await;
    let gate = Gate::new();
    let held = gate.clone();
    bench.script(move |ctx, input| {
        let gate = held.clone();
        async move {
            if ctx.info().path == "!finally/clean" {
                gate.pass().await;
            }
            Ok(input)
        }
    });
    let mut d = counting("cleans", vec![work("a", &[]), again(9, false)]);
    d.finally = vec![work("clean", &[])];
    let hash = bench.deploy(d).await;
    let worker = bench.worker().await;
    for (n, ends) in [RunStatus::Cancelled, RunStatus::Terminated].into_iter().enumerate() {
        let key = format!("key {n}");
        let run = bench.start_as(hash, json!({}), Some(&key)).await.run_id;
        gate.arrived(1).await;
        match ends {
            RunStatus::Cancelled => bench.client.cancel(run, "enough").await.expect("cancelled"),
            _ => bench.client.terminate(run, "enough").await.expect("terminated"),
        }
        bench.until(run, "told", |v| v.status != RunStatus::Running).await;
        gate.open(1);
        let view = bench.closed(run).await;
        assert_eq!((view.status, view.chain.is_alone()), (ends, true));
        assert_eq!(bench.client.open_run(&key).await.expect("asked"), None);
        assert_eq!(bench.client.replay(run, None).await.expect("replays").divergence, None);
    }
    assert_eq!(count(&bench, "workflow = 'cleans'").await, 2, "nothing went on");
    worker.drain(GRACE).await;
    bench.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_parent_asks_of_its_child_reaches_the_open_run_of_the_chain() {
    let bench = Bench::new().await;
    bench.deploy(counting("child", vec![again(2, false), awaits("wait", "never")])).await;
    let worker = bench.worker().await;
    for (parent_close, ends) in
        [(ParentClose::Cancel, RunStatus::Cancelled), (ParentClose::Terminate, RunStatus::Terminated)]
    {
        let (workflow, version, with) = ("child".into(), CallVersion::Latest, BTreeMap::new());
        let call = step("c", Kind::Call { workflow, version, with, parent_close });
        let run = bench.start(definition("parent", vec![call]), json!({})).await;
        let waits = |w: &Waiting| if let Waiting::Child { run_id, .. } = w { Some(*run_id) } else { None };
        let view = bench.until(run, "calls", |v| v.waiting.iter().any(|w| waits(w).is_some())).await;
        let second = next_of(&bench, view.waiting.iter().find_map(waits).expect("a child")).await;
        bench.until(second, "waits", |v| !v.waiting.is_empty()).await;
        bench.client.cancel(run, "enough").await.expect("cancelled");
        assert_eq!(bench.closed(second).await.status, ends);
        assert_eq!(bench.closed(run).await.status, RunStatus::Cancelled);
    }
    worker.drain(GRACE).await;
    bench.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_next_run_waits_for_a_place_behind_those_who_came_before() {
    let bench = Bench::new().await;
    let mut d = counting("grouped", vec![again(2, false), awaits("go", "go")]);
    let concurrency = Concurrency { group: Data::Literal(json!("g")), limit: 1, on_conflict: OnConflict::Fail };
    d.concurrency = Some(concurrency);
    let hash = bench.deploy(d.clone()).await;
    let first = bench.start_as(hash, json!({}), None).await.run_id;
    let refused = bench.client.start(start_of(hash, json!({"n": 2}))).await.expect_err("full");
    assert_eq!(refused.code(), "concurrency_full");
    d.concurrency = d.concurrency.map(|c| Concurrency { on_conflict: OnConflict::Queue, ..c });
    let queues = bench.deploy(d).await;
    let other = bench.start_as(queues, json!({"n": 2}), None).await.run_id;
    let worker = bench.worker().await;
    let second = next_of(&bench, first).await;
    bench.until(other, "has the place", |v| !v.waiting.is_empty()).await;
    assert!(bench.client.describe(second).await.expect("run").held.is_some(), "never turned away");
    for run in [other, second] {
        bench.until(run, "waits", |v| !v.waiting.is_empty()).await;
        bench.client.signal(run, signal("go", "go")).await.expect("sent");
        assert_eq!(bench.closed(run).await.status, RunStatus::Completed);
    }
    worker.drain(GRACE).await;
    bench.audit().await;
}

fn start_of(definition: loopwright_engine::ids::DefinitionHash, inputs: Value) -> loopwright_engine::client::Start {
    loopwright_engine::client::Start {
        run_id: None,
        definition,
        inputs,
        workflow_id: None,
        attributes: json!({}),
        queue: String::new(),
        topic: None,
        admission: Default::default(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_and_a_rate_that_only_the_start_named_go_along() {
    let bench = Bench::new().await;
    let hash = bench.deploy(counting("placed", vec![only_in(1, awaits("next", "next")), again(3, false)])).await;
    let mut start = start_of(hash, json!({}));
    start.admission.place = Some(Place { group: "named".into(), limit: 1, on_conflict: OnConflict::Queue });
    start.admission.rate = Some(Rate { key: "hourly".into(), starts: 2, per_ms: 3_600_000 });
    let worker = bench.worker_with(LONG, 8).await;
    let first = bench.client.start(start).await.expect("start").run_id;
    bench.until(first, "waits", |v| !v.waiting.is_empty()).await;
    bench.client.signal(first, signal("next", "n")).await.expect("sent");
    // The second start of the hour is now, the third is in an hour: as everywhere, no start is earlier for being in a chain.
    let second = next_of(&bench, first).await;
    let third = next_of(&bench, second).await;
    let held = bench.client.describe(third).await.expect("run").held.expect("held back");
    assert!(held.starts_with("for its rate limit, until "), "{held}");
    let (group, minutes): (Option<String>, f64) = sqlx::query_as(
        "select group_name, (extract(epoch from not_before - engine_now()) / 60)::float8 from admissions where run_id = $1",
    )
    .bind(third.0)
    .fetch_one(&bench.pool)
    .await
    .expect("held back");
    assert_eq!(group.as_deref(), Some("named"));
    assert!((55.0..=60.0).contains(&minutes), "{minutes}");
    // The hour is over.
    sqlx::query("update admissions set not_before = engine_now()").execute(&bench.pool).await.expect("time");
    assert_eq!(bench.closed(third).await.status, RunStatus::Completed);
    worker.drain(GRACE).await;
    bench.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_run_of_a_chain_goes_on_beyond_the_chains_time() {
    let bench = Bench::new().await;
    let steps = vec![only_in(1, awaits("next", "next")), again(2, false), awaits("never", "never")];
    let hash = bench.deploy(counting("bounded", steps)).await;
    let worker = bench.worker_with(LONG, 8).await;
    let chain_timeout = Duration::from_secs(12);
    let mut start = start_of(hash, json!({}));
    start.admission.chain_timeout = Some(chain_timeout);
    let first = bench.client.start(start).await.expect("start").run_id;
    bench.until(first, "waits", |v| !v.waiting.is_empty()).await;
    bench.client.signal(first, signal("next", "n")).await.expect("sent");
    let second = bench.closed(next_of(&bench, first).await).await;
    assert_eq!(
        (second.status, second.failure.expect("a failure").code.as_str()),
        (RunStatus::Failed, "timeout.run_total")
    );
    let began = bench.client.describe(first).await.expect("run").started_at;
    assert!(second.closed_at.expect("closed") - began >= chrono::Duration::from_std(chain_timeout).expect("short"));
    for run in [first, second.run_id] {
        assert_eq!(bench.client.replay(run, None).await.expect("replays").divergence, None);
    }
    worker.drain(GRACE).await;
    bench.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chain_may_go_on_under_what_is_current() {
    let bench = Bench::new().await;
    let old = counting("moves", vec![only_in(1, awaits("next", "next")), again(2, true)]);
    let hash = bench.deploy(old.clone()).await;
    let worker = bench.worker().await;
    let first = bench.start_as(hash, json!({}), None).await.run_id;
    bench.until(first, "waits", |v| !v.waiting.is_empty()).await;
    let mut new = counting("moves", vec![work("a", &[])]);
    let more = Input { schema: json!({"type": "integer"}), required: false, default: Some(json!(5)) };
    new.inputs.insert("more".into(), more);
    let newer = bench.deploy(new).await;
    bench.client.signal(first, signal("next", "n")).await.expect("sent");
    let second = bench.closed(next_of(&bench, first).await).await;
    assert_eq!((second.definition, second.inputs), (newer, json!({"n": 2, "more": 5})));
    assert_eq!(second.status, RunStatus::Completed);
    assert_eq!(bench.client.replay(first, None).await.expect("replays").divergence, None);

    // A version that does not take the inputs: the run fails, and is not lost.
    let mut other = counting("moves", vec![work("a", &[])]);
    other.inputs.clear();
    other.outputs.clear();
    let run = bench.start_as(hash, json!({}), None).await.run_id;
    bench.until(run, "waits", |v| !v.waiting.is_empty()).await;
    bench.deploy(other).await;
    bench.client.signal(run, signal("next", "n")).await.expect("sent");
    let view = bench.closed(run).await;
    assert_eq!(view.failure.expect("a failure").code, "input.invalid");
    assert_eq!(bench.client.replay(run, None).await.expect("replays").divergence, None);
    worker.drain(GRACE).await;
    bench.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_continued_run_is_exported_forked_and_not_reset() {
    let bench = Bench::new().await;
    let worker = bench.worker().await;
    let first = bench.start(counting("kept", vec![work("a", &[]), again(2, false)]), json!({})).await;
    let second = next_of(&bench, first).await;
    bench.closed(second).await;
    let ask = || Fork {
        run_id: None,
        at: At::Step("a".into()),
        inputs: Map::new(),
        definition: None,
        attributes: None,
        reason: "try".into(),
    };
    let refused = bench.client.reset(first, ask()).await.expect_err("it goes on");
    assert_eq!(refused.code(), "fork_invalid");
    assert!(refused.to_string().contains(&second.to_string()), "{refused}");
    let fork = bench.client.fork(first, ask()).await.expect("fork").run_id;
    assert_eq!(bench.closed(next_of(&bench, fork).await).await.status, RunStatus::Completed, "a chain of its own");

    let elsewhere = Bench::new().await;
    for run in [first, second] {
        let text = exported(&bench, run).await;
        let archive = Archive::read(text.as_bytes()).expect("valid");
        assert_eq!(elsewhere.client.import(archive.clone()).await.expect("imported"), run);
        let (here, there) = (bench.client.describe(run).await, elsewhere.client.describe(run).await);
        let (here, there) = (here.expect("run"), there.expect("run"));
        assert_eq!((here.status, here.chain), (there.status, there.chain));
        assert_eq!(elsewhere.client.replay(run, None).await.expect("replays").divergence, None);
        let mut other = archive;
        other.header.run.run_id = RunId::new();
        other.header.run.chain.continued_as = Some(RunId::new());
        assert_eq!(elsewhere.client.import(other).await.expect_err("another").code(), "archive_invalid");
    }
    worker.drain(GRACE).await;
    bench.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_schedule_counts_the_open_run_of_the_chain() {
    let bench = Bench::new().await;
    bench.deploy(counting("w", vec![again(2, false), awaits("go", "go")])).await;
    let schedules = bench.client.schedules();
    let when = When::Cron { expression: "0 0 1 1 *".into(), timezone: "UTC".into() };
    let spec = Spec { overlap: Overlap::Skip, ..Spec::new("w", when) };
    let new = NewSchedule { name: "s".into(), spec, paused: false, note: None, owner: None };
    schedules.create(new).await.expect("schedule");
    let worker = bench.worker().await;
    schedules.trigger("s", None).await.expect("triggered");
    let deadline = tokio::time::Instant::now() + LONG;
    let second = loop {
        let open = schedules.describe("s").await.expect("schedule").open;
        let mut chains = Vec::new();
        for run in open {
            chains.push((run, bench.client.describe(run).await.expect("run").chain));
        }
        if let Some((run, _)) = chains.iter().find(|(_, chain)| chain.continued_from.is_some()) {
            break *run;
        }
        assert!(tokio::time::Instant::now() < deadline, "{chains:?}");
        tokio::task::yield_now().await;
    };
    bench.until(second, "waits", |v| !v.waiting.is_empty()).await;
    assert_eq!(schedules.describe("s").await.expect("schedule").open, [second]);
    bench.client.signal(second, signal("go", "go")).await.expect("sent");
    bench.closed(second).await;
    assert_eq!(schedules.describe("s").await.expect("schedule").open, []);
    worker.drain(GRACE).await;
    bench.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_goes_on_as_another_while_it_is_reset_is_not_done_twice() {
    let bench = Bench::new().await;
    let worker = bench.worker().await;
    // Which of the two comes first is left to chance; what holds either way is that one of them is refused.
    for n in 0..12 {
        let run =
            bench.start(counting(&format!("reset{n}"), vec![awaits("go", "go"), again(2, false)]), json!({})).await;
        bench.until(run, "waits", |v| !v.waiting.is_empty()).await;
        let asked = Fork {
            run_id: None,
            at: At::Seq(1),
            inputs: Map::new(),
            definition: None,
            attributes: None,
            reason: String::new(),
        };
        let (reset, sent) = tokio::join!(bench.client.reset(run, asked), bench.client.signal(run, signal("go", "1")));
        let old = bench.closed(run).await;
        let next = match (reset, sent) {
            (Ok(reset), sent) => {
                assert!(sent.is_ok() || sent.as_ref().is_err_and(|e| e.code() == "run_closed"), "{sent:?}");
                assert_eq!((old.status, old.chain.continued_as), (RunStatus::Terminated, None));
                reset.run_id
            }
            (Err(refused), sent) => {
                assert!(sent.expect("sent"), "it went on because of it");
                let next = old.chain.continued_as.expect("another run goes on");
                assert!(
                    refused.code() == "fork_invalid" && refused.to_string().contains(&next.to_string()),
                    "{refused}"
                );
                next
            }
        };
        let sql = "select array_agg(run_id) from runs where closed_at is null and workflow = $1";
        let open: Option<Vec<uuid::Uuid>> =
            sqlx::query_scalar(sql).bind(format!("reset{n}")).fetch_one(&bench.pool).await.expect("sql");
        assert_eq!(open, Some(vec![next.0]), "one of them goes on, and only one");
        bench.client.terminate(next, "enough").await.expect("ended");
    }
    worker.drain(GRACE).await;
    bench.audit().await;
}
