//! Each check is seen to fire: a round ends cleanly, is broken in one way, and exactly the one check says so.

use super::*;
use crate::{
    cli::chaos::{
        deploy,
        recorder::{Receipt, Recorder, Shown},
        work,
    },
    store::Store,
};
use loopwright_activities::billing::{BillingSettings, LedgerHook, MicroCredits};
use loopwright_engine::{
    admission::Admission,
    client::{At, Client, Fork, Signal, Start, Update},
    embedded::testing::database,
    ids::{DefinitionHash, RunId},
    worker::{self, WorkerConfig},
};
use serde_json::{Map, Value, json};
use sqlx::PgPool;
use std::{collections::BTreeSet, sync::Arc};
use uuid::Uuid;

/// Where the attempts of the first step fail: after they have shown their key, so that it is seen again.
const AFTER_IT_SHOWED: u32 = 2;
/// Where the attempts of the bought step fail: after they have saved, so that the next one shows nothing.
const AFTER_IT_SAVED: u32 = 3;
/// A guard against hangs, nothing else.
const GUARD: Duration = Duration::from_secs(120);

/// One way in which an end is broken.
enum Break {
    /// What the database says: statements, of which at least one changes something.
    Rows(&'static str),
    /// What else was seen.
    Seen(fn(&mut Evidence)),
}
use Break::{Rows, Seen};

/// The ways to break what a query checks; none for a check that this does not know.
fn breaks_of_rows(check: &str) -> Vec<Break> {
    match check {
        "open_run" => vec![
            Rows("delete from ready where run_id in (select run_id from runs where closed_at is null)"),
            Rows("update runs set waiting = 'timer' where closed_at is null"),
        ],
        "closed_run" => vec![
            Rows(
                "insert into workflow_ids select 'left behind', shard, run_id from runs where closed_at is not null limit 1",
            ),
            Rows(
                "insert into ready (shard, run_id, queue) select shard, run_id, queue from runs where closed_at is not null limit 1",
            ),
        ],
        "failed_run" => vec![Rows(
            "update runs set status = 'failed' where run_id in
               (select run_id from runs where status = 'completed' and parent_run_id is null limit 1)",
        )],
        "history_gap" => vec![Rows("update runs set seq = seq + 1 where closed_at is null")],
        "history_epoch" => vec![Rows(
            "update history set epoch = 1000000 where seq = 1 and run_id =
               (select run_id from history group by 1 having count(*) > 1 and min(seq) = 1 limit 1)",
        )],
        "history_end" => vec![
            Rows(
                "update history h set events = events || '[{\"type\": \"run_closed\"}]' from runs r
                 where r.run_id = h.run_id and r.closed_at is null and h.seq = r.seq",
            ),
            Rows(
                "update history h set events = (select coalesce(jsonb_agg(e), '[]') from jsonb_array_elements(h.events) e where e->>'type' <> 'run_closed')
                 from runs r where r.run_id = h.run_id and r.status = 'terminated' and h.seq = r.seq",
            ),
        ],
        "attempt" => vec![Rows(
            "update history h set events = events || jsonb_build_array(e) from
               (select run_id, seq, e from history, jsonb_array_elements(events) e where e->>'type' = 'attempt_ended' limit 1) x
             where x.run_id = h.run_id and x.seq = h.seq",
        )],
        "step" => vec![Rows(
            "update history h set events = events || jsonb_build_array(e) from
               (select run_id, seq, e from history, jsonb_array_elements(events) e where e->>'type' = 'step_started' limit 1) x
             where x.run_id = h.run_id and x.seq = h.seq",
        )],
        "signal" => vec![Rows(
            "update history h set events = events || jsonb_build_array(e) from
               (select run_id, seq, e from history, jsonb_array_elements(events) e where e->>'type' = 'signal_consumed' limit 1) x
             where x.run_id = h.run_id and x.seq = h.seq",
        )],
        "update" => vec![Rows(
            "update history h set events = events || jsonb_build_array(e) from
               (select run_id, seq, e from history, jsonb_array_elements(events) e where e->>'type' = 'update_completed' limit 1) x
             where x.run_id = h.run_id and x.seq = h.seq",
        )],
        "group" => vec![Rows(
            "update history h set at = '2020-01-01' from runs r
             where r.run_id = h.run_id and r.workflow = 'chaos-part' and h.events @> '[{\"type\": \"run_started\"}]'",
        )],
        "child" => vec![Rows(
            "update runs set output = '{\"n\": -1}' where run_id in
               (select run_id from runs where status = 'completed' and parent_run_id is not null limit 1)",
        )],
        "chain" => vec![Rows(
            "update runs set status = 'continued' where run_id in
               (select run_id from runs where status = 'completed' and parent_run_id is null limit 1)",
        )],
        "dead_worker" => vec![Rows("insert into dead_workers (id) values (gen_random_uuid())")],
        "settled" => vec![Rows(
            "insert into activity_attempts (id, run_id, path, activity, attempt_no, user_id, state, lease_expires_at, ended_at)
             select gen_random_uuid(), run_id, path, activity, 99, user_id, 'completed', lease_expires_at, ended_at
             from activity_attempts where state = 'completed' limit 1",
        )],
        "charged" => vec![Rows(
            "update activity_attempts set path = 'elsewhere' where id =
               (select attempt_id from api_key_usage where state = 'succeeded' limit 1)",
        )],
        _ => vec![],
    }
}

/// The ways to break what the others check.
fn breaks_of(check: Check) -> Vec<Break> {
    match check {
        Check::Settle => vec![Seen(|e| e.left.push("run 1 is running".into()))],
        Check::Drain => vec![Seen(|e| e.processes[0].in_order = false)],
        Check::Process => vec![Seen(|e| e.processes[0].signals.push(libc::SIGSEGV))],
        Check::Log => vec![
            Seen(|e| e.processes[0].log.push_str("thread 'main' panicked at src/main.rs:1:1\n")),
            Seen(|e| e.processes[0].log.push_str("ERROR the run is quarantined\n")),
        ],
        Check::Fault => vec![Seen(|e| {
            // It was tried, and met nobody.
            e.faults.first_entry().expect("a fault").get_mut().struck = 0;
        })],
        Check::Coverage => vec![
            Seen(|e| {
                *e.requests.first_entry().expect("a request").get_mut() = Said { unknown: 3, ..Said::default() };
            }),
            Seen(|e| e.requests.get_mut("start").expect("starts").found = 0),
        ],
        Check::Request => vec![Seen(|e| e.declined.push("start of run 1: input_invalid".into()))],
        Check::Ledger => vec![Rows("update users set credit_balance_ucr = credit_balance_ucr + 1")],
        Check::PromiseRun => vec![
            Seen(|e| e.promises.runs.push(RunId::new())),
            // Two requests, one run.
            Seen(|e| e.promises.runs.push(e.promises.runs[0])),
        ],
        Check::PromiseTerminated => vec![Seen(|e| {
            // It has ended, but not so.
            let reset = e.promises.cancelled[0];
            e.promises.terminated.push(reset);
        })],
        Check::PromiseReset => vec![Seen(|e| e.promises.reset.push(e.promises.kept[0]))],
        Check::PromiseUpdate => vec![Seen(|e| e.promises.updates[0].1.push_str("-lost"))],
        Check::PromiseMessage => vec![
            Seen(|e| e.promises.messages[0].1.push_str("-lost")),
            Rows("update inbox set dedupe_id = 'another' where dedupe_id = 'rest:0'"),
        ],
        Check::PromiseCancel => vec![Seen(|e| e.promises.cancelled.push(e.promises.kept[0]))],
        Check::PromiseKept => vec![Seen(|e| e.promises.kept.clear())],
        Check::RunUnasked => vec![Seen(|e| e.promises.runs.truncate(1))],
        Check::SignalRead => vec![Rows(
            "update history h set events = (select coalesce(jsonb_agg(e), '[]') from jsonb_array_elements(h.events) e
                                            where e->>'type' <> 'signal_received')
             where (run_id, seq) in (select run_id, seq from history where events @> '[{\"type\": \"signal_received\"}]' limit 1)",
        )],
        Check::EffectKey => vec![
            // A step shows two keys.
            Seen(|e| {
                let again = e.seen.iter_mut().find(|sight| sight.receipt.effect != sight.receipt.n);
                again.expect("a key that was shown again").shown.key.push_str("-another");
            }),
            // Two steps show one key, for the same.
            Seen(|e| {
                let ours = first_steps(e);
                let key = e.seen[ours[0]].shown.key.clone();
                let theirs = e.seen[ours[1]].shown.run;
                let of_theirs = |sight: &&mut Sight| sight.shown.run == theirs && sight.shown.path.ends_with("first");
                e.seen.iter_mut().filter(of_theirs).for_each(|sight| sight.shown.key.clone_from(&key));
            }),
        ],
        Check::EffectContent => vec![
            // The same key, another effect.
            Seen(|e| {
                let again = e.seen.iter_mut().find(|sight| sight.receipt.effect != sight.receipt.n);
                again.expect("a key that was shown again").shown.content = json!({ "activity": "effect@1", "input": 7 });
            }),
            // Always the same, and not what the step says.
            Seen(|e| bought(e).shown.content["input"]["work_ms"] = json!(1)),
        ],
        Check::EffectTwice => vec![Seen(|e| {
            let again = bought(e).clone();
            again_by(e, again, |_| {});
        })],
        Check::EffectUnstarted => vec![Seen(|e| {
            let n = e.seen.len() as u64 + 1;
            let (run, path) = (e.promises.kept[0].0, "nowhere".to_owned());
            let shown = Shown { key: "nowhere".into(), run, path, attempt: 1, content: Value::Null };
            e.seen.push(Sight { shown, receipt: Receipt { n, effect: n } });
        })],
        Check::EffectRepeated => vec![Seen(|e| {
            // Its second attempt found the answer of the first, and shows the key all the same.
            let again = bought(e).clone();
            again_by(e, again, |sight| sight.shown.attempt += 1);
        })],
        Check::EffectMissing => vec![
            // Nobody has seen what was saved.
            Seen(|e| {
                let n = bought(e).receipt.n;
                e.seen.retain(|sight| sight.receipt.n != n);
            }),
            // A result names the effect of another.
            Rows(
                "update checkpoints set value = jsonb_set(value, '{effect}', '1') where (value->>'effect')::int > 1 and
                   (run_id, path, key) in (select run_id, path, key from checkpoints order by created_at desc limit 1)",
            ),
            Rows(
                "update history h set events = replace(events::text, '\"effect\": ', '\"effect\": 9')::jsonb where (run_id, seq) in
                   (select run_id, seq from history where events @> '[{\"type\": \"attempt_ended\", \"activity\": \"effect@1\", \"outcome\": \"succeeded\"}]'
                      and events @> '[{\"type\": \"step_ended\", \"status\": \"succeeded\"}]' limit 1)",
            ),
        ],
    }
}

/// Places among the sights of two runs' first steps.
fn first_steps(evidence: &Evidence) -> Vec<usize> {
    let mut runs = BTreeSet::new();
    let first = |(n, sight): (usize, &Sight)| {
        (sight.shown.path.ends_with("first")
            && sight.shown.content["input"]["stumble"] == json!(AFTER_IT_SHOWED)
            && runs.insert(sight.shown.run))
        .then_some(n)
    };
    evidence.seen.iter().enumerate().filter_map(first).collect()
}

/// The one sight of a step that saved its answer, failed, and found the answer in its second attempt.
fn bought(evidence: &mut Evidence) -> &mut Sight {
    let bought = |sight: &&mut Sight| {
        sight.shown.path.ends_with("bought")
            && sight.shown.content["input"]["stumble"] == json!(AFTER_IT_SAVED)
            && sight.shown.attempt == 1
    };
    evidence.seen.iter_mut().find(bought).expect("a bought step")
}

/// The recorder sees it once more, changed.
fn again_by(evidence: &mut Evidence, mut sight: Sight, change: fn(&mut Sight)) {
    sight.receipt.n = evidence.seen.len() as u64 + 1;
    change(&mut sight);
    evidence.seen.push(sight);
}

async fn started(client: &Client, definition: DefinitionHash, user: Uuid, a: u32, b: u32) -> RunId {
    let run = RunId::new();
    let start = Start {
        run_id: Some(run),
        definition,
        inputs: json!({ "a": a, "b": b }),
        workflow_id: Some(format!("chaos:{run}")),
        attributes: json!({ "user_id": user }),
        queue: String::new(),
        topic: None,
        admission: Admission::default(),
    };
    client.start(start).await.expect("started");
    run
}

async fn until(pool: &PgPool, what: &str, holds: &'static str) {
    let wait = async {
        while !sqlx::query_scalar::<_, bool>(holds).fetch_one(pool).await.expect("sql") {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(GUARD, wait).await.unwrap_or_else(|_| panic!("{what} in time"));
}

/// A round without faults: real runs of a real worker that show their keys to a real recorder. One waits at the end.
async fn clean(pool: &PgPool) -> Evidence {
    let folder = tempfile::tempdir().expect("folder");
    let recorder = Recorder::start(folder.path()).expect("recorder");
    let billing = BillingSettings { welcome: MicroCredits::from_credits(10_000), ..BillingSettings::default() };
    let hook = Arc::new(LedgerHook::new(billing));
    let client = Client::new(pool.clone(), hook.clone());
    let definition = deploy(&client, &recorder).await.expect("deployed");
    let store = Store::new(pool.clone(), billing.welcome);
    let user = store.user_of("chaos", "person", "chaos").await.expect("user").id;
    let mut promises = Promises::default();

    // Signals that are there before anybody waits for them; three children in one group.
    for n in 0..3 {
        let run = started(&client, definition, user, AFTER_IT_SHOWED, AFTER_IT_SAVED).await;
        let dedupe_id = Some(format!("rest:{n}"));
        let signal =
            Signal { name: "go".into(), payload: json!({ "n": n }), dedupe_id: dedupe_id.clone(), sender: None };
        client.signal(run, signal).await.expect("sent");
        promises.runs.push(run);
        promises.messages.extend(dedupe_id.map(|id| (run, id)));
    }
    let (asked, reset) =
        (started(&client, definition, user, 0, 0).await, started(&client, definition, user, 0, 1).await);
    let terminated = started(&client, definition, user, 1, 1).await;
    let cancelled = started(&client, definition, user, 1, 1).await;
    promises.kept = vec![started(&client, definition, user, 0, 0).await];
    promises.runs.extend([asked, reset, terminated, cancelled, promises.kept[0]]);
    client.cancel(cancelled, "chaos").await.expect("cancelled");
    client.terminate(terminated, "chaos").await.expect("terminated");
    promises.cancelled.push(cancelled);
    promises.terminated.push(terminated);

    let registry = work::registry(recorder.socket.clone());
    let worker =
        worker::start(WorkerConfig { hook, ..WorkerConfig::new(pool.clone(), registry) }).await.expect("worker");
    let waiting = "select count(*) >= 3 from runs where closed_at is null and parked and waiting = 'signal'";
    until(pool, "runs that wait for a signal", waiting).await;
    let update = Update { name: "go".into(), payload: json!({}), id: Some("chaos-1".into()), sender: None };
    client.update(asked, update, GUARD).await.expect("answered");
    promises.updates.push((asked, "chaos-1".into()));
    for of in [asked, reset] {
        let fork = Fork {
            run_id: None,
            at: At::Seq(2),
            inputs: Map::new(),
            definition: None,
            attributes: None,
            reason: "chaos".into(),
        };
        let run = if of == reset {
            promises.reset.push(reset);
            client.reset(of, fork).await.expect("reset").run_id
        } else {
            client.fork(of, fork).await.expect("forked").run_id
        };
        let signal = Signal { name: "go".into(), payload: Value::Null, dedupe_id: None, sender: None };
        client.signal(run, signal).await.expect("sent");
        promises.runs.push(run);
    }
    let quiet = "select count(*) = 1 and bool_and(parked and waiting = 'signal') from runs where closed_at is null";
    until(pool, "quiet", quiet).await;
    worker.drain(GUARD).await;

    let process =
        Ended { name: "worker-1".into(), in_order: true, signals: vec![], log: "INFO all is well\n".to_owned() };
    let granted = Said { acknowledged: 1, found: 1, ..Said::default() };
    Evidence {
        time: round::COVERAGE_AFTER,
        left: vec![],
        processes: vec![process],
        faults: Fault::all().map(|fault| (fault, Strikes { tried: 2, struck: 1 })).collect(),
        requests: BTreeMap::from([("start", granted), ("signal", granted)]),
        declined: vec![],
        promises,
        seen: recorder.seen(),
    }
}

/// The check, and what is broken for it.
fn all_breaks() -> Vec<(&'static str, Vec<Break>)> {
    let rows = CHECKS.iter().map(|(name, ..)| (*name, breaks_of_rows(name)));
    rows.chain(Check::ALL.into_iter().map(|check| (check.name(), breaks_of(check)))).collect()
}

#[test]
fn every_check_has_a_name_of_its_own_and_something_that_it_would_find() {
    let names = names();
    assert_eq!(names.iter().collect::<BTreeSet<_>>().len(), names.len(), "{names:?}");
    let breaks = all_breaks();
    assert_eq!(breaks.iter().map(|(name, _)| *name).collect::<Vec<_>>(), names);
    for (name, breaks) in breaks {
        assert!(!breaks.is_empty(), "the check `{name}` has nothing that it would find: add it above");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_check_finds_what_it_is_for_and_no_other_does() {
    let pool = database(loopwright_activities::MIGRATIONS).await;
    let evidence = clean(&pool).await;
    let mut conn = pool.acquire().await.expect("connection");
    let (sights, found) = run(&mut conn, &evidence).await.expect("audit");
    assert!(found.is_empty(), "a clean end: {found:#?}");
    assert!(sights.sights > sights.keys && sights.again > 0, "keys were shown again: {sights:?}");
    drop(conn);

    let mut wrong = Vec::new();
    for (check, breaks) in all_breaks() {
        for (n, one) in breaks.into_iter().enumerate() {
            let (mut tx, mut evidence) = (pool.begin().await.expect("transaction"), evidence.clone());
            match one {
                Rows(statements) => {
                    // What guards these tables is another test's: here it is broken all the same.
                    sqlx::query("set local session_replication_role = replica").execute(&mut *tx).await.expect("set");
                    match sqlx::raw_sql(statements).execute(&mut *tx).await {
                        Ok(done) if done.rows_affected() > 0 => {}
                        other => {
                            wrong.push(format!("{check}, way {n}: nothing was broken: {other:?}"));
                            continue;
                        }
                    }
                }
                Seen(change) => change(&mut evidence),
            }
            let audited = run(&mut tx, &evidence).await;
            let checks = audited.as_ref().map(|(_, found)| found.iter().map(|f| f.check).collect::<BTreeSet<_>>());
            if checks.ok() != Some(BTreeSet::from([check])) {
                wrong.push(format!("{check}, way {n}: {audited:#?}"));
            }
            tx.rollback().await.expect("rolled back");
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n\n"));
}

#[test]
fn a_short_round_need_not_have_met_everything() {
    let time = round::COVERAGE_AFTER - Duration::from_secs(1);
    let faults: BTreeMap<_, _> = Fault::all().map(|fault| (fault, Strikes::default())).collect();
    let requests = BTreeMap::from([("start", Said::default())]);
    let mut evidence = Evidence { time, faults, requests, ..Evidence::default() };
    assert!(round::findings(&evidence).is_empty());
    evidence.time = round::COVERAGE_AFTER;
    let found = round::findings(&evidence);
    // No start, so none whose answer was lost.
    assert_eq!(found.len(), Fault::all().count() + 2, "{found:?}");
}
