//! Every rule of [`bench::RULES`] and of [`crash::rules`] notices its own corruption, and that one only.

use crate::{
    bench::{self, Bench, broken, definition, e, step, waits_for, work},
    crash,
    faults::{GRACE, long_work, outside, several},
};
use loopwright_engine::{
    admission::{Admission, OnConflict, Place},
    client::{At, Fork, Start},
    definition::{CallVersion, Data, Definition, Input, Kind, ParentClose},
    ids::{DefinitionHash, RunId},
    schedule::{Overlap, Spec, When, door::NewSchedule},
    view::RunStatus,
};
use serde_json::json;
use sqlx::Connection;
use std::collections::BTreeMap;

/// What breaks one rule and no other, on the rows of [`busy`]. A constraint that stands in the way goes first: the rule is there for
/// the day on which it does not.
const CORRUPTIONS: &[(&str, &str)] = &[
    ("gap in a history", "update runs set seq = seq + 1 where workflow = 'quick' and forked_from is null"),
    ("gap in a history", "update history set seq = seq + 1 where (run_id, seq) in
        (select run_id, seq from runs where workflow = 'quick' and forked_from is null)"),
    (
        "gap in a history",
        "with gone as (delete from history where seq = 2 and run_id in (select run_id from runs where workflow = 'points') returning run_id, events)
         update history h set events = gone.events || h.events from gone where h.run_id = gone.run_id and h.seq = 3",
    ),
    (
        "gap in a history",
        "update history h set seq = r.forked_seq from runs r where h.run_id = r.run_id and h.seq = r.forked_seq + 1",
    ),
    ("attempt started and not ended, or the reverse", "delete from test_ends where attempt_id = (select min(attempt_id::text)::uuid from test_ends)"),
    ("attempt started and not ended, or the reverse", "insert into test_ends values (gen_random_uuid(), 'Succeeded')"),
    (
        "attempt that a history starts and does not end exactly once",
        "update history h set events = coalesce((select jsonb_agg(e) from jsonb_array_elements(h.events) e where e->>'type' <> 'attempt_ended'), '[]')
         where run_id in (select run_id from runs where workflow = 'quick')",
    ),
    (
        "attempt that a history starts and does not end exactly once",
        "update history h set events = events || (select coalesce(jsonb_agg(e), '[]') from jsonb_array_elements(h.events) e where e->>'type' = 'attempt_started')
         where run_id in (select run_id from runs where workflow = 'quick')",
    ),
    ("business key of a closed run", "insert into workflow_ids select 'other', shard, run_id from runs where workflow = 'points'"),
    (
        "closed run with an owner or a place in the queue",
        "insert into ready (shard, run_id, queue) select shard, run_id, queue from runs where workflow = 'points'",
    ),
    (
        "closed run with an owner or a place in the queue",
        "alter table runs drop constraint runs_owner_check; update runs set owner = gen_random_uuid() where workflow = 'points'",
    ),
    (
        "open run that nobody owns and nobody may claim",
        "delete from ready where run_id in (select run_id from runs where workflow = 'waits' and workflow_id is not null)",
    ),
    // It is let in and nobody queued it.
    (
        "open run that nobody owns and nobody may claim",
        "update runs set admitted = true where not admitted",
    ),
    (
        "place of a closed run, or a run that is held back and waits for nothing",
        "insert into admissions (shard, run_id, group_name, n, places, place, on_conflict)
         select shard, run_id, 'other', 1, 1, 1, 'queue' from runs where workflow = 'points'",
    ),
    (
        "place of a closed run, or a run that is held back and waits for nothing",
        "update runs set admitted = false where workflow = 'waits' and workflow_id is not null",
    ),
    (
        "place of a closed run, or a run that is held back and waits for nothing",
        "update runs set admitted = false where run_id in (select run_id from admissions where place = 1)",
    ),
    (
        "continued run without one run in its place, or the reverse",
        "update runs set continued_as = null where workflow = 'loop'",
    ),
    (
        "continued run without one run in its place, or the reverse",
        "update runs set continued_as = gen_random_uuid() where workflow = 'loop' and status = 'continued'",
    ),
    (
        "continued run without one run in its place, or the reverse",
        "update runs set first_run_id = gen_random_uuid() where workflow = 'loop' and continued_from is not null",
    ),
    (
        "two open runs of one chain",
        "update runs r set (first_run_id, continued_from) = (o.run_id, o.run_id) from runs o
         where r.workflow_id is not null and r.closed_at is null and o.run_id in (select run_id from admissions where place = 1)",
    ),
    (
        "group with more holders than its largest limit",
        "alter table admissions drop constraint admissions_place_check; update admissions set places = 1",
    ),
    (
        "a step that has succeeded twice",
        "update history h set events = events || (select coalesce(jsonb_agg(e), '[]') from jsonb_array_elements(h.events) e where e->>'type' = 'attempt_ended')
         where run_id in (select run_id from runs where workflow_id is not null and closed_at is null)",
    ),
    (
        "a step that has succeeded without each of its calls, or without an answer that is saved",
        "delete from checkpoints where key = 'call-0' and run_id in (select run_id from runs where workflow = 'points')",
    ),
    (
        "a step that has succeeded without each of its calls, or without an answer that is saved",
        "delete from test_outside where call = 0 and run_id in (select run_id from runs where workflow = 'points')",
    ),
    (
        "a completed run without each of its steps",
        "update runs set workflow = 'points' where workflow = 'quick' and forked_from is not null",
    ),
    (
        "a call made again although its answer was saved, or saved by an attempt that did not make it",
        "update test_outside set attempt = attempt + 1 where call = 0",
    ),
    ("an idempotency key that is not the step's alone, or several for one", "update test_outside set key = 'other' || run_id || path where call = 0"),
    (
        "an idempotency key that is not the step's alone, or several for one",
        "update test_outside o set key = o.run_id::text from runs r where r.run_id = o.run_id and workflow = 'points'",
    ),
    (
        "a chain without two runs, or whose last has not completed",
        "update runs set status = 'terminated' where workflow = 'relay' and continued_from is not null",
    ),
    (
        "a chain without two runs, or whose last has not completed",
        "update runs set workflow = 'relay' where workflow = 'quick' and forked_from is not null",
    ),
    ("a run that has failed", "update runs set status = 'failed' where workflow = 'quick'"),
    ("a run that has failed", "update runs set status = 'quarantined' where workflow = 'waits' and workflow_id is not null"),
    (
        "a call with several children",
        "update runs r set (parent_shard, parent_run_id, parent_path) = (c.parent_shard, c.parent_run_id, c.parent_path) from runs c
         where c.parent_run_id is not null and r.forked_from is not null",
    ),
    ("an action of a schedule without its run, or two with one", "update schedule_actions set run_id = gen_random_uuid()"),
    (
        "an action of a schedule without its run, or two with one",
        "insert into schedule_actions (schedule_id, n, instant, kind, state, shard, run_id)
         select schedule_id, n + 1, instant, kind, state, shard, run_id from schedule_actions",
    ),
    // Its rows go where those of a fork are.
    (
        "a fork twice",
        "update history set seq = seq + 100 where run_id in (select run_id from runs where workflow = 'points');
         update runs r set (seq, forked_shard, forked_from, forked_seq) = (r.seq + 100, f.forked_shard, f.forked_from, 100) from runs f
         where f.forked_from is not null and r.workflow = 'points'",
    ),
];

/// A chain of two.
fn chain(name: &str) -> Definition {
    let with = BTreeMap::from([("n".to_owned(), Data::Literal(json!(1)))]);
    let mut again = step("again", Kind::ContinueAsNew { with, current: false });
    again.condition = Some(e("inputs.n < 1"));
    let mut chain = definition(name, vec![again, work("one", &[])]);
    let n = Input { schema: json!({"type": "integer"}), required: false, default: Some(json!(0)) };
    chain.inputs.insert("n".into(), n);
    chain
}

/// One of a group of two.
async fn start_in_group(bench: &Bench, definition: DefinitionHash) -> RunId {
    let place = Place { group: "pair".into(), limit: 2, on_conflict: OnConflict::Queue };
    let start = Start {
        run_id: None,
        definition,
        inputs: json!({}),
        workflow_id: None,
        attributes: json!({"user_id": "u1"}),
        queue: String::new(),
        topic: None,
        admission: Admission { place: Some(place), ..Admission::default() },
    };
    bench.client.start(start).await.expect("started").run_id
}

/// A database in which something of everything that the rules speak of has happened: closed runs, two chains, a call, a fork, one of a
/// schedule; and open ones that wait for an answer, one of them with a key, two in a group and a third that has no place in it.
async fn busy() -> Bench {
    let bench = Bench::new().await;
    outside(&bench.pool).await;
    let pool = bench.pool.clone();
    bench.script(move |ctx, _| long_work(pool.clone(), ctx));
    let (workflow, version, with) = ("quick".into(), CallVersion::Latest, BTreeMap::new());
    let call = Kind::Call { workflow, version, with, parent_close: ParentClose::Cancel };
    let quick = bench.deploy(definition("quick", vec![work("one", &[])])).await;
    let waits = vec![work("one", &[]), step("question", Kind::Await(Box::new(waits_for("go"))))];
    let waits = bench.deploy(definition("waits", waits)).await;
    let worker = bench.worker().await;
    let mut closed = vec![bench.start_as(quick, json!({}), None).await.run_id];
    for definition in [several("points"), definition("calls", vec![step("call", call)])] {
        closed.push(bench.start(definition, json!({})).await);
    }
    for name in ["loop", "relay"] {
        let first = bench.start(chain(name), json!({})).await;
        closed.push(bench.closed(first).await.chain.continued_as.expect("a second"));
    }
    let when = When::Every { ms: 3_600_000, offset_ms: 0 };
    let spec = Spec { overlap: Overlap::AllowAll, ..Spec::new("quick", when) };
    let new = NewSchedule { name: "often".into(), spec, paused: false, note: None, owner: None };
    bench.client.schedules().create(new).await.expect("schedule");
    closed.extend(bench.client.schedules().trigger("often", None).await.expect("triggered").run_id);
    bench.closed(closed[0]).await;
    let (at, reason) = (At::Seq(1), "again".into());
    let fork = Fork { run_id: None, at, inputs: Default::default(), definition: None, attributes: None, reason };
    closed.push(bench.client.fork(closed[0], fork).await.expect("forked").run_id);
    for run in closed {
        assert_eq!(bench.closed(run).await.status, RunStatus::Completed);
    }
    let mut open = vec![bench.start_as(waits, json!({}), Some("key")).await.run_id];
    for _ in 0..2 {
        open.push(start_in_group(&bench, waits).await);
    }
    for run in open {
        bench.until(run, "it asks", |view| !view.waiting.is_empty()).await;
    }
    start_in_group(&bench, waits).await;
    worker.drain(GRACE).await;
    bench
}

#[tokio::test(flavor = "multi_thread")]
async fn every_rule_notices_its_corruption_and_no_other() {
    let of_crashes = crash::rules();
    let of_crashes = of_crashes.iter().map(|(rule, sql)| (*rule, sql.as_str()));
    let rules: Vec<(&str, &str)> = bench::RULES.iter().copied().chain(of_crashes).collect();
    let names: Vec<&str> = rules.iter().map(|(rule, _)| *rule).collect();
    let mut corrupted: Vec<&str> = CORRUPTIONS.iter().map(|(rule, _)| *rule).collect();
    corrupted.dedup();
    assert_eq!(names, corrupted, "each has one");
    let bench = busy().await;
    let mut conn = bench.pool.acquire().await.expect("connection");
    assert_eq!(broken(&mut conn, rules.iter().copied()).await, [], "all is well");
    let mut wrong = Vec::new();
    for (n, (rule, sql)) in CORRUPTIONS.iter().enumerate() {
        // Taken back when it is dropped.
        let mut tx = conn.begin().await.expect("begun");
        match sqlx::raw_sql(*sql).execute(&mut *tx).await {
            Ok(_) => {
                let found = broken(&mut tx, rules.iter().copied()).await;
                if found.iter().map(|(rule, _)| *rule).ne([*rule]) {
                    wrong.push(format!("{n}: {rule}: {found:?}"));
                }
            }
            Err(error) => wrong.push(format!("{n}: {rule}: {error}")),
        }
        tx.rollback().await.expect("taken back");
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert_eq!(broken(&mut conn, rules.iter().copied()).await, [], "all is taken back");
}
