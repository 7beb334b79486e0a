//! Starts under an id that was used before: every policy in every state, many at once, and what an ended run leaves.

use crate::{
    bench::{Bench, definition, e, step, waits_for, work},
    faults::{GRACE, LONG},
};
use futures_util::future::join_all;
use loopwright_engine::{
    Error, Failure,
    admission::{Admission, IdConflict, IdReuse, OnConflict, Place},
    client::{At, Fork, Signal, Start},
    definition::{CallVersion, Data, Definition, Input, Kind, ParentClose, Step},
    ids::{DefinitionHash, RunId},
    view::{RunStatus, Waiting},
};
use serde_json::{Map, json};
use std::collections::BTreeMap;

use IdConflict::{Fail, TerminateExisting, UseExisting};
use IdReuse::{AllowDuplicate, AllowDuplicateFailedOnly, RejectDuplicate};

/// Every policy but the one that contradicts itself.
const POLICIES: [(IdReuse, IdConflict); 8] = [
    (AllowDuplicate, UseExisting),
    (AllowDuplicate, Fail),
    (AllowDuplicate, TerminateExisting),
    (AllowDuplicateFailedOnly, UseExisting),
    (AllowDuplicateFailedOnly, Fail),
    (AllowDuplicateFailedOnly, TerminateExisting),
    (RejectDuplicate, UseExisting),
    (RejectDuplicate, Fail),
];

/// What is under the id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Before {
    Nothing,
    Open,
    Completed,
    Failed,
    /// The second of a chain is open.
    ChainOpen,
    ChainCompleted,
}

const STATES: [Before; 6] =
    [Before::Nothing, Before::Open, Before::Completed, Before::Failed, Before::ChainOpen, Before::ChainCompleted];

fn ask(id: &str) -> Step {
    step(id, Kind::Await(Box::new(waits_for("go"))))
}

/// Goes on as another run, once; that one waits for `go` if it is to.
fn chain(name: &str, waits: bool) -> Definition {
    let with = BTreeMap::from([("n".to_owned(), Data::Literal(json!(2)))]);
    let mut again = step("again", Kind::ContinueAsNew { with, current: false });
    again.condition = Some(e("inputs.n == 1"));
    let last = if waits { ask("last") } else { step("last", Kind::Set { values: BTreeMap::new() }) };
    let mut chain = definition(name, vec![again, last]);
    let n = Input { schema: json!({"type": "integer"}), required: false, default: Some(json!(1)) };
    chain.inputs.insert("n".into(), n);
    chain
}

fn request(definition: DefinitionHash, id: &str, (id_reuse, id_conflict): (IdReuse, IdConflict)) -> Start {
    Start {
        run_id: None,
        definition,
        inputs: json!({}),
        workflow_id: Some(id.to_owned()),
        attributes: json!({ "user_id": "u1" }),
        queue: String::new(),
        topic: None,
        admission: Admission { id_reuse, id_conflict, ..Admission::default() },
    }
}

fn replaces(definition: DefinitionHash, id: &str) -> Start {
    request(definition, id, (AllowDuplicate, TerminateExisting))
}

fn go() -> Signal {
    Signal { name: "go".into(), ..Signal::default() }
}

async fn status(bench: &Bench, run: RunId) -> RunStatus {
    bench.client.describe(run).await.expect("run").status
}

async fn never_two_open(bench: &Bench) {
    let twice = "select count(*) from (select workflow_id from runs where closed_at is null and workflow_id is not null group by 1 having count(*) > 1) t";
    let lost = "select count(*) from runs r where closed_at is null and workflow_id is not null
                  and not exists (select from workflow_ids w where w.workflow_id = r.workflow_id and w.run_id = r.run_id)";
    for sql in [twice, lost] {
        let n: i64 = sqlx::query_scalar(sql).fetch_one(&bench.pool).await.expect("count");
        assert_eq!(n, 0, "{sql}");
    }
}

/// Fails at the step `bad`.
async fn bench() -> Bench {
    let bench = Bench::new().await;
    bench.script(|ctx, _| async move {
        if ctx.info().path == "bad" { Err(Failure::permanent("bad", "as it is meant to")) } else { Ok(json!({})) }
    });
    bench
}

#[tokio::test(flavor = "multi_thread")]
async fn every_policy_does_what_it_says_in_every_state() {
    let bench = bench().await;
    let open = bench.deploy(definition("open", vec![ask("ask")])).await;
    let ok = bench.deploy(definition("ok", vec![step("a", Kind::Set { values: BTreeMap::new() })])).await;
    let bad = bench.deploy(definition("bad", vec![work("bad", &[])])).await;
    let goes_on = bench.deploy(chain("goes-on", true)).await;
    let ends = bench.deploy(chain("ends", false)).await;
    let worker = bench.worker_with(LONG, 32).await;
    let mut cases = Vec::new();
    for (at, before) in STATES.into_iter().enumerate() {
        for (n, policy) in POLICIES.into_iter().enumerate() {
            let id = format!("id:{at}:{n}");
            let definition = match before {
                Before::Nothing => None,
                Before::Open => Some(open),
                Before::Completed => Some(ok),
                Before::Failed => Some(bad),
                Before::ChainOpen => Some(goes_on),
                Before::ChainCompleted => Some(ends),
            };
            let first = match definition {
                Some(definition) => Some(bench.start_as(definition, json!({}), Some(&id)).await.run_id),
                None => None,
            };
            cases.push((before, policy, id, first));
        }
    }
    for (before, (reuse, conflict), id, first) in cases {
        // The run that counts.
        let counts = match (before, first) {
            (_, None) => None,
            (Before::Open, Some(run)) => {
                bench.until(run, "waits", |v| !v.waiting.is_empty()).await;
                Some(run)
            }
            (Before::ChainOpen | Before::ChainCompleted, Some(run)) => {
                let next = bench.closed(run).await.chain.continued_as.expect("a chain");
                if before == Before::ChainCompleted {
                    bench.closed(next).await;
                } else {
                    bench.until(next, "waits", |v| !v.waiting.is_empty()).await;
                }
                Some(next)
            }
            (_, Some(run)) => Some(bench.closed(run).await.run_id),
        };
        let case = format!("{before:?} {reuse:?} {conflict:?}");
        let answer = bench.client.start(request(open, &id, (reuse, conflict))).await;
        let created = |answer: Result<loopwright_engine::client::Started, Error>| {
            let started = answer.unwrap_or_else(|error| panic!("{case}: {error}"));
            assert!(started.created && Some(started.run_id) != counts, "{case}");
            started.run_id
        };
        match (before, reuse, conflict) {
            (Before::Nothing, ..)
            | (Before::Completed | Before::Failed | Before::ChainCompleted, AllowDuplicate, _)
            | (Before::Failed, AllowDuplicateFailedOnly, _) => {
                let run = created(answer);
                assert_eq!(bench.client.open_run(&id).await.expect("asked"), Some(run), "{case}");
            }
            (Before::Open | Before::ChainOpen, _, UseExisting) => {
                let started = answer.expect("the open one");
                assert_eq!((started.created, Some(started.run_id)), (false, counts), "{case}");
            }
            (Before::Open | Before::ChainOpen, _, Fail) => {
                let error = answer.expect_err("is open");
                assert_eq!(error.code(), "workflow_id_open", "{case}");
                assert!(error.to_string().contains(&counts.expect("open").to_string()), "{case}: {error}");
            }
            (Before::Open | Before::ChainOpen, _, TerminateExisting) => {
                let run = created(answer);
                assert_eq!(bench.client.open_run(&id).await.expect("asked"), Some(run), "{case}");
                let ended = bench.client.describe(counts.expect("open")).await.expect("run");
                assert_eq!(ended.status, RunStatus::Terminated, "{case}");
                let why = ended.failure.expect("a reason").message;
                assert_eq!(why, format!("run {run} was started in its place, under the id `{id}`"));
            }
            (Before::Completed | Before::Failed | Before::ChainCompleted, ..) => {
                let error = answer.expect_err("was used");
                assert_eq!(error.code(), "workflow_id_used", "{case}");
                let (run, text) = (counts.expect("closed"), error.to_string());
                let ended = status(&bench, run).await.as_str();
                assert!(
                    text.contains(&format!("run {run}")) && text.contains(&format!("as {ended},")),
                    "{case}: {text}"
                );
                assert_eq!(bench.client.open_run(&id).await.expect("asked"), None, "{case}");
            }
        }
    }
    never_two_open(&bench).await;
    worker.drain(GRACE).await;
    bench.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_starts_at_once_one_wins_and_never_two_runs_are_open() {
    const MANY: usize = 6;
    let bench = bench().await;
    let open = bench.deploy(definition("open", vec![ask("ask")])).await;
    for (n, policy) in POLICIES.into_iter().enumerate() {
        for before in [Before::Nothing, Before::Open] {
            let id = format!("id:{n}:{before:?}");
            let first = match before {
                Before::Open => Some(bench.start_as(open, json!({}), Some(&id)).await.run_id),
                _ => None,
            };
            let all = (0..MANY).map(|_| bench.client.start(request(open, &id, policy)));
            let answers = join_all(all).await;
            let case = format!("{policy:?} {before:?}: {answers:?}");
            let winner = bench.client.open_run(&id).await.expect("asked").expect("one is open");
            let created = answers.iter().flatten().filter(|s| s.created).count();
            let (wins, others) = match (policy.1, before) {
                (TerminateExisting, _) => (MANY, 0),
                (_, Before::Nothing) => (1, MANY - 1),
                _ => (0, MANY),
            };
            assert_eq!(created, wins, "{case}");
            let found = answers.iter().flatten().filter(|s| !s.created && s.run_id == winner).count();
            let refused = answers.iter().filter(|a| a.as_ref().is_err_and(|e| e.code() == "workflow_id_open")).count();
            let expected = if policy.1 == Fail { (0, others) } else { (others, 0) };
            assert_eq!((found, refused), expected, "{case}");
            if policy.1 == TerminateExisting {
                let ended: i64 =
                    sqlx::query_scalar("select count(*) from runs where workflow_id = $1 and status = 'terminated'")
                        .bind(&id)
                        .fetch_one(&bench.pool)
                        .await
                        .expect("count");
                let before = usize::from(first.is_some());
                assert_eq!(usize::try_from(ended).expect("few"), MANY - 1 + before, "{case}");
            } else if let Some(first) = first {
                assert_eq!(winner, first, "{case}");
            }
        }
    }
    never_two_open(&bench).await;
    bench.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_is_replaced_is_settled_and_its_children_hear_of_it() {
    let bench = Bench::new().await;
    let gate = bench.gate();
    bench.deploy(definition("inner", vec![ask("ask")])).await;
    let call = |parent_close| Kind::Call {
        workflow: "inner".into(),
        version: CallVersion::Latest,
        with: BTreeMap::new(),
        parent_close,
    };
    let worker = bench.worker_with(LONG, 8).await;
    let busy = bench.deploy(definition("busy", vec![work("a", &[])])).await;
    let old = bench.client.start(replaces(busy, "busy")).await.expect("start").run_id;
    gate.arrived(1).await;
    let new = bench.client.start(replaces(busy, "busy")).await.expect("start").run_id;
    assert_eq!(status(&bench, old).await, RunStatus::Terminated);
    // One permit is for the attempt of the old run, which may have been dropped before it took it.
    gate.open(2);
    assert_eq!(bench.closed(new).await.status, RunStatus::Completed);
    for (parent_close, becomes) in [
        (ParentClose::Cancel, RunStatus::Cancelled),
        (ParentClose::Terminate, RunStatus::Terminated),
        (ParentClose::Abandon, RunStatus::Running),
    ] {
        let name = format!("calls-{parent_close:?}").to_lowercase();
        let calls = bench.deploy(definition(&name, vec![step("c", call(parent_close))])).await;
        let old = bench.client.start(replaces(calls, &name)).await.expect("start").run_id;
        let child = |w: &Waiting| if let Waiting::Child { run_id, .. } = w { Some(*run_id) } else { None };
        let view = bench.until(old, "calls", |v| v.waiting.iter().any(|w| child(w).is_some())).await;
        let called = view.waiting.iter().find_map(child).expect("a child");
        bench.until(called, "waits", |v| !v.waiting.is_empty()).await;
        let new = bench.client.start(replaces(calls, &name)).await.expect("start").run_id;
        assert_eq!(status(&bench, old).await, RunStatus::Terminated);
        if parent_close == ParentClose::Abandon {
            assert_eq!(status(&bench, called).await, becomes);
            bench.client.signal(called, go()).await.expect("sent");
            bench.closed(called).await;
        } else {
            assert_eq!(bench.closed(called).await.status, becomes, "{parent_close:?}");
        }
        bench.client.terminate(new, "done").await.expect("ended");
    }
    worker.drain(GRACE).await;
    bench.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_place_of_a_replaced_run_is_free_and_who_waits_for_it_comes_first() {
    let bench = bench().await;
    let open = bench.deploy(definition("open", vec![ask("ask")])).await;
    let placed = |id: &str, group: &str, on_conflict| {
        let mut start = replaces(open, id);
        start.admission.place = Some(Place { group: group.into(), limit: 1, on_conflict });
        start
    };
    let worker = bench.worker_with(LONG, 8).await;
    // Nobody waits: the place goes from one to the other.
    let old = bench.client.start(placed("a", "strict", OnConflict::Fail)).await.expect("start").run_id;
    let new = bench.client.start(placed("a", "strict", OnConflict::Fail)).await.expect("start").run_id;
    assert_eq!(status(&bench, old).await, RunStatus::Terminated);
    bench.until(new, "waits", |v| !v.waiting.is_empty()).await;
    // Somebody waits: that one is let in, and the new one stands behind it.
    let old = bench.client.start(placed("b", "queue", OnConflict::Queue)).await.expect("start").run_id;
    let waits = bench.client.start(placed("c", "queue", OnConflict::Queue)).await.expect("start").run_id;
    assert!(bench.client.describe(waits).await.expect("run").held.is_some());
    let behind = bench.client.start(placed("b", "queue", OnConflict::Queue)).await.expect("start").run_id;
    assert_eq!(status(&bench, old).await, RunStatus::Terminated);
    bench.until(waits, "waits", |v| !v.waiting.is_empty()).await;
    assert!(bench.client.describe(behind).await.expect("run").held.is_some());
    // What is refused has ended nobody.
    let stays = bench.client.start(replaces(open, "d")).await.expect("start").run_id;
    let error = bench.client.start(placed("d", "strict", OnConflict::Fail)).await.expect_err("full");
    assert_eq!(error.code(), "concurrency_full");
    assert_eq!(bench.client.open_run("d").await.expect("asked"), Some(stays));
    assert!(!status(&bench, stays).await.is_closed());
    // One that waits for its place can be replaced too.
    let newer = bench.client.start(placed("b", "queue", OnConflict::Queue)).await.expect("start").run_id;
    assert_eq!(status(&bench, behind).await, RunStatus::Terminated);
    for run in [new, waits, stays, newer] {
        bench.client.terminate(run, "done").await.expect("ended");
    }
    worker.drain(GRACE).await;
    bench.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_that_is_sent_again_ends_nobody() {
    let bench = bench().await;
    let open = bench.deploy(definition("open", vec![ask("ask")])).await;
    let start = Start { run_id: Some(RunId::new()), ..replaces(open, "id") };
    let first = bench.client.start(start.clone()).await.expect("start");
    let again = bench.client.start(start.clone()).await.expect("start");
    assert_eq!((first.created, again.created, again.run_id), (true, false, first.run_id));
    assert_eq!(status(&bench, first.run_id).await, RunStatus::Pending);
    let newer = bench.client.start(replaces(open, "id")).await.expect("start").run_id;
    // Late, when another run has its place: it is the answer to its own request, and leaves the other alone.
    let late = bench.client.start(start.clone()).await.expect("start");
    assert_eq!((late.created, late.run_id), (false, first.run_id));
    assert_eq!(bench.client.open_run("id").await.expect("asked"), Some(newer));
    // Six at once with one run id are one run, and the run before is ended once.
    let same = Start { run_id: Some(RunId::new()), ..replaces(open, "id") };
    let answers = join_all((0..6).map(|_| bench.client.start(same.clone()))).await;
    let created = answers.iter().filter(|a| a.as_ref().expect("start").created).count();
    assert_eq!(created, 1, "{answers:?}");
    assert_eq!(bench.client.open_run("id").await.expect("asked"), same.run_id);
    let without = Start { workflow_id: None, ..start };
    assert_eq!(bench.client.start(without).await.expect_err("no id").code(), "input_invalid");
    let both = request(open, "id", (RejectDuplicate, TerminateExisting));
    assert_eq!(bench.client.start(both).await.expect_err("contradiction").code(), "input_invalid");
    never_two_open(&bench).await;
    bench.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn forks_files_and_retired_runs_do_not_hold_an_id() {
    let bench = bench().await;
    let open = bench.deploy(definition("open", vec![ask("ask")])).await;
    let worker = bench.worker_with(LONG, 8).await;
    let strict = || request(open, "id", (RejectDuplicate, Fail));
    let run = bench.client.start(strict()).await.expect("start").run_id;
    bench.until(run, "waits", |v| !v.waiting.is_empty()).await;
    let asked = Fork {
        run_id: None,
        at: At::Seq(1),
        inputs: Map::new(),
        definition: None,
        attributes: None,
        reason: "try".into(),
    };
    // A reset takes the id; a fork has none, so its end is not the id's.
    let reset = bench.client.reset(run, asked.clone()).await.expect("reset").run_id;
    let error = bench.client.start(strict()).await.expect_err("open");
    assert!(matches!(&error, Error::WorkflowIdOpen { run, .. } if *run == reset.to_string()), "{error}");
    let fork = bench.client.fork(reset, asked).await.expect("fork").run_id;
    bench.client.signal(reset, go()).await.expect("sent");
    assert_eq!(bench.closed(reset).await.status, RunStatus::Completed);
    bench.client.terminate(fork, "later than the reset").await.expect("ended");
    let failed_only = request(open, "id", (AllowDuplicateFailedOnly, Fail));
    let error = bench.client.start(failed_only).await.expect_err("completed");
    assert!(matches!(&error, Error::WorkflowIdUsed { run, .. } if *run == reset.to_string()), "{error}");
    // What came from a file does not count; what retention has taken is not there to count.
    sqlx::query("update runs set imported_at = engine_now() where run_id = any($1)")
        .bind([reset.0, run.0])
        .execute(&bench.pool)
        .await
        .expect("as if imported");
    let run = bench.client.start(strict()).await.expect("the id is free").run_id;
    bench.client.terminate(run, "done").await.expect("ended");
    assert_eq!(bench.client.start(strict()).await.expect_err("used").code(), "workflow_id_used");
    for sql in [
        "delete from history where run_id = $1",
        "delete from inbox where run_id = $1",
        "delete from runs where run_id = $1",
    ] {
        sqlx::query(sql).bind(run.0).execute(&bench.pool).await.expect("as retention does");
    }
    let run = bench.client.start(strict()).await.expect("the id is free").run_id;
    bench.client.terminate(run, "done").await.expect("ended");
    worker.drain(GRACE).await;
}

/// The index of ids has no column that a step changes.
#[tokio::test]
async fn no_step_changes_what_the_index_of_ids_holds() {
    let bench = bench().await;
    let columns: Vec<String> = sqlx::query_scalar(
        "select distinct a.attname::text from pg_depend d join pg_attribute a on a.attrelid = d.refobjid and a.attnum = d.refobjsubid
         where d.objid = 'runs_workflow_id'::regclass and d.refobjid = 'runs'::regclass and d.refobjsubid > 0 order by 1",
    )
    .fetch_all(&bench.pool)
    .await
    .expect("columns");
    assert_eq!(columns, ["closed_at", "continued_as", "imported_at", "run_id", "workflow_id"]);
}
