//! A process dies at every crash point of the engine, and somebody else brings its runs to their end.

use crate::{
    bench::{Bench, PATIENCE, definition, e, step, work},
    faults::{DATABASE, GRACE, LONG, SHORT, audit_outside, ended, long_work, outside, scheduled, several},
};
use futures_util::{StreamExt, stream};
use loopwright_engine::{
    Error,
    admission::{Admission, IdConflict},
    client::{Migrate, MigrationOutcome, Signal, Start, Started},
    definition::{Await, CallVersion, Data, Definition, Input, Kind, OnTimeout, ParentClose, WaitUntil},
    embedded::testing::url,
    ids::RunId,
    testing::CRASH_POINTS,
    view::RunStatus,
};
use serde_json::json;
use sqlx::PgPool;
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
    process::{Child, Command, Stdio},
    sync::atomic::Ordering,
    time::Duration,
};

/// Tells the child what it is: see [`Role`].
const ROLE: &str = "LOOPWRIGHT_TEST_ROLE";
/// Tells a child that is no worker which run it acts on.
const RUN: &str = "LOOPWRIGHT_TEST_RUN";
/// Where the child dies.
const POINT: &str = "LOOPWRIGHT_CRASH_POINT";
/// Children for one point: on a busy machine a worker loses its lease before it gets there, and ends in good order.
const CHILDREN: usize = 10;
/// Points that are tried at once: most of the time a dead worker's lease is waited for.
const AT_ONCE: usize = 4;
/// Steps with an activity in one run of [`everything`], its child's included.
const STEPS: usize = 6;

/// Who dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Worker,
    /// A worker whose hook refuses every start.
    Refused,
    Sender,
    Operator,
    Migrator,
    /// Starts a run in the place of the open one.
    Starter,
}

impl Role {
    fn of(point: &str) -> Self {
        match point.split('.').next() {
            Some("send") => Self::Sender,
            Some("terminate") => Self::Operator,
            Some("migrate") => Self::Migrator,
            Some("start") => Self::Starter,
            _ if point.ends_with("_rollback") => Self::Refused,
            _ => Self::Worker,
        }
    }
}

/// A wait, what [`several`] does, a question, a call: every path through the committer and out of memory.
fn everything(name: &str) -> Definition {
    let mut all = several(name);
    let question = Await {
        signal: "go".into(),
        timeout_ms: 600_000,
        form: None,
        show: None,
        to: vec![],
        filter: None,
        remind_ms: vec![],
        on_timeout: OnTimeout::Fail,
        default: None,
        approval: None,
        reply: None,
    };
    let call = Kind::Call {
        workflow: "inner".into(),
        version: CallVersion::Latest,
        with: BTreeMap::new(),
        parent_close: ParentClose::Cancel,
    };
    all.steps.insert(0, step("nap", Kind::Wait { until: WaitUntil::For(200) }));
    all.steps.push(step("question", Kind::Await(Box::new(question))));
    all.steps.push(step("call", call));
    all
}

/// A chain of two, of which the second works.
fn inner() -> Definition {
    let with = BTreeMap::from([("n".to_owned(), Data::Literal(json!(1)))]);
    let mut again = step("again", Kind::ContinueAsNew { with, current: false });
    again.condition = Some(e("inputs.n < 1"));
    let mut inner = definition("inner", vec![again, work("inner", &[])]);
    let n = Input { schema: json!({"type": "integer"}), required: false, default: Some(json!(0)) };
    inner.inputs.insert("n".into(), n);
    inner
}

/// The process that dies, whatever it is.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "started by the other test of this file in a process of its own"]
async fn child_process() {
    let (Ok(database), Ok(role)) = (std::env::var(DATABASE), std::env::var(ROLE)) else { return };
    let pool = PgPool::connect(&database).await.expect("database");
    let bench = Bench::over(pool.clone());
    let run = std::env::var(RUN).map(|text| text.parse::<RunId>().expect("run"));
    match role.as_str() {
        "Sender" => send(&bench, run.expect("run")).await,
        "Starter" => drop(replace(&bench, run.expect("run")).await),
        "Migrator" => drop(migrate(&bench, run.expect("run")).await),
        "Operator" => bench.client.terminate(run.expect("run"), "enough").await.expect("terminated"),
        _ => {
            bench.hook.refuse.store(role == "Refused", Ordering::SeqCst);
            let large = std::env::var(POINT).is_ok_and(|point| point.starts_with("large"));
            bench.script(move |ctx, _| noted_work(pool.clone(), ctx, large));
            // Strays are looked for every two seconds.
            let rare = std::env::var(POINT).is_ok_and(|point| point.starts_with("strays"));
            bench.worker_with(if rare { LONG } else { SHORT }, 4).await.fenced().await;
        }
    }
}

/// [`long_work`] that saves a value of its own first, and whose result is perhaps a large one.
async fn noted_work(
    pool: PgPool,
    ctx: loopwright_engine::activity::Context,
    large: bool,
) -> Result<serde_json::Value, loopwright_engine::Failure> {
    ctx.save("note", &json!(ctx.info().attempt)).await?;
    let result = long_work(pool, ctx).await?;
    Ok(if large { json!({ "text": "much ".repeat(20_000) }) } else { result })
}

async fn send(bench: &Bench, run: RunId) {
    let signal = Signal { name: "go".into(), dedupe_id: Some("once".into()), ..Signal::default() };
    match bench.client.signal(run, signal).await {
        // It had the answer already, and has ended.
        Ok(_) | Err(Error::RunClosed(_)) => {}
        Err(error) => panic!("{error}"),
    }
}

/// The run that is started in the place of another: each sender of the request names the same.
fn in_place_of(old: RunId) -> RunId {
    RunId(uuid::Uuid::from_u128(old.0.as_u128() ^ 1))
}

async fn replace(bench: &Bench, old: RunId) -> Started {
    let start = Start {
        run_id: Some(in_place_of(old)),
        definition: bench.client.pointer("points", "current").await.expect("deployed"),
        inputs: json!({}),
        workflow_id: Some("id".into()),
        attributes: json!({}),
        queue: String::new(),
        topic: None,
        admission: Admission { id_conflict: IdConflict::TerminateExisting, ..Admission::default() },
    };
    bench.client.start(start).await.expect("started")
}

/// To the same steps and one more.
async fn migrate(bench: &Bench, run: RunId) -> MigrationOutcome {
    let mut longer = everything("points");
    longer.steps.push(step("added", Kind::Set { values: BTreeMap::new() }));
    let to = bench.deploy(longer).await;
    let (map, catalog) = (BTreeMap::new(), Default::default());
    let asked = Migrate { to, map, reason: "one more".into(), by: None, dry_run: false, catalog };
    bench.client.migrate(run, asked).await.expect("migrates").outcome
}

fn child(bench: &Bench, role: Role, point: &str, run: RunId) -> Child {
    Command::new(std::env::current_exe().expect("this binary"))
        .args(["crash::child_process", "--exact", "--ignored", "--nocapture"])
        .env(DATABASE, url(&bench.pool))
        .env(ROLE, format!("{role:?}"))
        .env(RUN, run.to_string())
        .env(POINT, point)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("child")
}

/// Makes happen what is rare, until it is dropped: runs woken for nothing, messages for runs in memory, runs without a driver.
async fn stir(pool: PgPool, point: &str) {
    let wakes = point.starts_with("park.");
    let messages = point.starts_with("messages.");
    let strays = point.starts_with("strays.");
    loop {
        let statement = match (wakes, messages, strays) {
            (true, ..) => Some("update ready set due_at = engine_now() where due_at > engine_now()"),
            (_, true, _) => Some(
                "with r as (update runs set inbox_n = inbox_n + 1 where owner is not null returning shard, run_id, inbox_n)
                 insert into inbox (shard, run_id, n, kind) select shard, run_id, inbox_n, 'unblock' from r",
            ),
            // As after a claim whose answer was lost: the worker owns it and does not know.
            (.., true) => Some(
                "with q as (delete from ready where due_at > engine_now() returning shard, run_id)
                 update runs r set owner = w.id, epoch = epoch + 1, parked = false, waiting = null
                 from q, (select id from workers limit 1) w where r.shard = q.shard and r.run_id = q.run_id and r.owner is null",
            ),
            _ => None,
        };
        let Some(statement) = statement else { return std::future::pending().await };
        sqlx::query(statement).execute(&pool).await.expect("stirred");
        tokio::time::sleep(Duration::from_millis(15)).await;
    }
}

async fn dies_at(point: &'static str, nth: u32, by_shard: bool) {
    let role = Role::of(point);
    let bench = Bench::new().await;
    if by_shard {
        bench.by_shard().await;
    }
    outside(&bench.pool).await;
    let pool = bench.pool.clone();
    bench.script(move |ctx, _| noted_work(pool.clone(), ctx, point.starts_with("large")));
    bench.deploy(inner()).await;
    let hash = bench.deploy(everything("points")).await;
    if point.starts_with("takeover") {
        // Somebody to bury.
        let dead = "insert into workers (id, host, pid, version, queues, lease_ms, heartbeat_at)
                    values (gen_random_uuid(), '', 0, '', '{}', 1, now() - interval '1 hour')";
        sqlx::query(dead).execute(&bench.pool).await.expect("worker");
    }
    let mut runs = Vec::new();
    for n in 0..3 {
        let id = (n == 0 && role == Role::Starter).then_some("id");
        runs.push(bench.start_as(hash, json!({}), id).await.run_id);
    }
    if point == "takeover.after_take_over" {
        let theirs = "with q as (delete from ready) update runs set owner = (select id from workers limit 1), epoch = epoch + 1, parked = false";
        sqlx::query(theirs).execute(&bench.pool).await.expect("owned");
    }
    let mut steps = runs.len() * STEPS;
    if point.starts_with("schedule") {
        let run = scheduled(&bench, "points").await;
        runs.push(run);
        steps += STEPS;
    }
    if role != Role::Sender {
        // Early: nothing waits for it yet.
        for run in &runs[..3] {
            send(&bench, *run).await;
        }
    }
    let mut code = Some(0);
    for _ in 0..CHILDREN {
        let process = child(&bench, role, &format!("{point}:{nth}"), runs[0]);
        code = tokio::select! {
            code = ended(process) => code,
            () = stir(bench.pool.clone(), point) => code,
        };
        if code != Some(0) || !matches!(role, Role::Worker | Role::Refused) {
            break;
        }
    }
    assert_eq!(code, None, "{point}:{nth}: the child dies of its crash point");
    // Its lease is over: that a lease is waited for is not what is tried here.
    let over = "update workers set heartbeat_at = heartbeat_at - interval '1 day'";
    sqlx::query(over).execute(&bench.pool).await.expect("lease");

    // Whoever was not answered asks again.
    let mut terminated = None;
    match role {
        Role::Sender => send(&bench, runs[0]).await,
        Role::Operator => {
            terminated = Some(runs[0]);
            let again = bench.client.terminate(runs[0], "enough").await;
            let closed = bench.client.describe(runs[0]).await.expect("run").status;
            assert_eq!(closed, RunStatus::Terminated, "{point}: {again:?}");
        }
        Role::Starter => {
            let new = replace(&bench, runs[0]).await;
            assert_eq!((new.run_id, new.created), (in_place_of(runs[0]), point != "start.after_commit"), "{point}");
            assert_eq!(bench.client.open_run("id").await.expect("asked"), Some(new.run_id), "{point}");
            let closed = bench.client.describe(runs[0]).await.expect("run").status;
            assert_eq!(closed, RunStatus::Terminated, "{point}");
            terminated = Some(runs[0]);
            runs.push(new.run_id);
            steps += STEPS;
        }
        Role::Migrator => {
            let after_commit = point == "migrate.after_commit";
            let expected = if after_commit { MigrationOutcome::Unchanged } else { MigrationOutcome::Migrated };
            assert_eq!(migrate(&bench, runs[0]).await, expected, "{point}");
        }
        Role::Worker | Role::Refused => {}
    }
    let last = bench.worker_with(LONG, 32).await;
    let count = i64::try_from(runs.len()).expect("few");
    crate::faults::reaches(&bench.pool, "select count(*) from runs where parent_run_id is null", count).await;
    for run in &runs {
        if terminated != Some(*run) {
            send(&bench, *run).await;
            assert_eq!(bench.closed(*run).await.status, RunStatus::Completed, "{point}:{nth}");
        }
    }
    last.drain(GRACE).await;
    bench.audit().await;
    if terminated.is_some() {
        steps -= STEPS;
    }
    audit_outside(&bench.pool, steps).await;
    for (what, sql) in [
        ("a dead worker's runs were not taken over", "select count(*) from dead_workers where not runs_taken"),
        (
            "a signal was not stored once",
            "select count(*) from (select run_id from inbox where dedupe_id = 'once' group by run_id having count(*) <> 1) t",
        ),
        (
            "a chain has not two runs",
            "select count(*) from (select parent_run_id from runs where parent_run_id is not null group by 1 having count(*) <> 2) t",
        ),
        (
            "a call has several children",
            "select count(*) from (select parent_run_id from runs where parent_run_id is not null and first_run_id is null group by 1 having count(*) <> 1) t",
        ),
    ] {
        let n: i64 = sqlx::query_scalar(sql).fetch_one(&bench.pool).await.expect("audit");
        assert_eq!(n, 0, "{point}:{nth}: {what}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_death_at_every_crash_point_leaves_a_database_that_others_go_on_with() {
    // What every transition or call passes is met once more later, in the middle of the work.
    let often = ["commit.before_commit", "commit.after_commit", "meter.before_commit", "meter.after_commit"];
    // Those of retention are met in its own test.
    let here = CRASH_POINTS.iter().filter(|(point, _)| !point.starts_with("retire."));
    let all = here.map(|(point, _)| (*point, 1)).chain(often.map(|point| (point, 4)));
    stream::iter(all)
        .for_each_concurrent(AT_ONCE, |(point, nth)| async move {
            println!("{point}:{nth}");
            let all = dies_at(point, nth, false);
            assert!(tokio::time::timeout(PATIENCE * 2, all).await.is_ok(), "{point}:{nth} takes too long");
            println!("{point}:{nth} done");
        })
        .await;
}

/// The same where the committer, claims and takeovers go shard by shard.
#[tokio::test(flavor = "multi_thread")]
async fn a_death_between_two_shards_leaves_a_database_that_others_go_on_with() {
    let parts = ["claim.", "commit.", "strays.", "takeover."];
    let there = |point: &&(&str, &str)| parts.iter().any(|part| point.0.starts_with(part));
    let all = CRASH_POINTS.iter().filter(there).flat_map(|(point, _)| [(*point, 1), (*point, 2)]);
    // Some pass by once only.
    let all = all.filter(|(point, nth)| {
        *nth == 1 || ["claim.after_alive", "commit.before_commit", "commit.after_commit"].contains(point)
    });
    stream::iter(all)
        .for_each_concurrent(AT_ONCE, |(point, nth)| async move {
            let all = dies_at(point, nth, true);
            assert!(tokio::time::timeout(PATIENCE * 2, all).await.is_ok(), "{point}:{nth} takes too long");
        })
        .await;
}

/// (name, file) of every crash point that the sources name.
fn in_the_sources(folder: &Path, found: &mut BTreeSet<(String, String)>) {
    for entry in fs::read_dir(folder).expect("folder") {
        let path = entry.expect("entry").path();
        if path.is_dir() {
            in_the_sources(&path, found);
            continue;
        }
        let text = fs::read_to_string(&path).expect("source");
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        let file = path.strip_prefix(root).expect("below").to_str().expect("text").to_owned();
        for rest in text.split("crash_point(\"").skip(1) {
            found.insert((rest.split('"').next().expect("name").to_owned(), file.clone()));
        }
    }
}

#[test]
fn the_table_of_crash_points_is_what_the_sources_say() {
    let mut found = BTreeSet::new();
    in_the_sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut found);
    let listed: BTreeSet<(String, String)> =
        CRASH_POINTS.iter().map(|(name, file)| ((*name).to_owned(), (*file).to_owned())).collect();
    assert_eq!(found, listed);
    assert_eq!(listed.len(), CRASH_POINTS.len(), "none twice");
}
