//! Old runs out of the database into files, and back: on a real database, also when the process dies in between.

use crate::{
    archive::exported,
    bench::{Bench, definition, step, waits_for, work},
    faults::{DATABASE, ended},
};
use futures_util::{StreamExt, stream};
use loopwright_engine::{
    client::{At, Fork, Signal, Start},
    definition::{CallVersion, Definition, Kind, ParentClose},
    embedded::testing::url,
    ids::RunId,
    retention::{self, Policy},
    testing::CRASH_POINTS,
    transaction,
    view::RunStatus,
};
use serde_json::{Map, json};
use sqlx::PgPool;
use std::{
    collections::BTreeMap,
    fs,
    path::PathBuf,
    process::{Command, Stdio},
    time::Duration,
};

const GRACE: Duration = Duration::from_secs(10);
/// Points that are tried at once.
const AT_ONCE: usize = 3;
const DAY: Duration = Duration::from_secs(86_400);
/// Where a child writes its archives.
const FOLDER: &str = "LOOPWRIGHT_TEST_FOLDER";

/// A folder that is gone with the test.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Self {
        Self(std::env::temp_dir().join(format!("loopwright-retention-{}", uuid::Uuid::now_v7().simple())))
    }
    fn policy(&self) -> Policy {
        Policy { keep: 90 * DAY, archive: self.0.clone() }
    }
    /// Names in it, by name.
    fn names(&self) -> Vec<String> {
        let Ok(entries) = fs::read_dir(&self.0) else { return Vec::new() };
        let mut names: Vec<String> =
            entries.map(|e| e.expect("entry").file_name().into_string().expect("text")).collect();
        names.sort();
        names
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A year passes in half a second.
async fn later(pool: &PgPool, days: u32) {
    let sql = format!(
        "create or replace function engine_now() returns timestamptz language sql stable as $$ select clock_timestamp() + interval '{days} days' $$"
    );
    sqlx::raw_sql(sqlx::AssertSqlSafe(sql)).execute(pool).await.expect("clock");
}

fn patient(mut definition: Definition) -> Definition {
    definition.timeout_ms = 400 * 86_400_000;
    definition
}

/// Calls `inner`, then waits for `go`.
fn calls() -> Definition {
    let call = Kind::Call {
        workflow: "inner".into(),
        version: CallVersion::Latest,
        with: BTreeMap::new(),
        parent_close: ParentClose::Cancel,
    };
    let mut waits = waits_for("go");
    waits.timeout_ms = 300 * 86_400_000;
    patient(definition("calls", vec![step("call", call), step("wait", Kind::Await(Box::new(waits)))]))
}

fn small() -> Definition {
    definition("small", vec![work("a", &[]), work("b", &[])])
}

/// Closed ones of `small`, one a fork of another, and an open one whose child has closed.
struct Scene {
    bench: Bench,
    folder: Folder,
    closed: Vec<RunId>,
    origin: RunId,
    fork: RunId,
    open: RunId,
    child: RunId,
}

impl Scene {
    async fn new() -> Self {
        let bench = Bench::new().await;
        bench.script(|ctx, input| async move {
            ctx.save("k", &json!({"n": 1})).await?;
            Ok(input)
        });
        bench.deploy(definition("inner", vec![work("i", &[])])).await;
        let worker = bench.worker().await;
        let mut closed = Vec::new();
        for _ in 0..3 {
            closed.push(bench.start(small(), json!({})).await);
        }
        for run in &closed {
            bench.closed(*run).await;
        }
        let origin = closed[0];
        let fork = bench.client.fork(origin, forked(2)).await.expect("fork").run_id;
        bench.closed(fork).await;
        let open = bench.start(calls(), json!({})).await;
        bench.until(open, "waits", |v| v.waiting.iter().any(|w| format!("{w:?}").contains("go"))).await;
        let child = sqlx::query_scalar("select run_id from runs where parent_run_id = $1")
            .bind(open.0)
            .fetch_one(&bench.pool)
            .await
            .map(RunId)
            .expect("child");
        worker.drain(GRACE).await;
        Self { bench, folder: Folder::new(), closed, origin, fork, open, child }
    }

    fn leaving(&self) -> Vec<RunId> {
        self.closed.iter().copied().chain([self.fork]).collect()
    }

    async fn retire(&self) -> retention::Report {
        loop {
            let report = retention::run(&self.bench.client, &self.folder.policy()).await.expect("retired");
            // Postgres may need a moment to see that a process is gone.
            if !report.busy {
                return report;
            }
            tokio::task::yield_now().await;
        }
    }

    async fn count(&self, sql: &'static str) -> i64 {
        sqlx::query_scalar(sql).fetch_one(&self.bench.pool).await.expect("count")
    }

    /// Every run is in the database, whole, or recorded in a file that is whole; and nothing of it lies about.
    async fn nothing_is_lost(&self, bodies: &BTreeMap<RunId, String>, what: &str) {
        let mut elsewhere = None;
        for run in self.leaving() {
            match self.bench.client.describe(run).await {
                Ok(_) => {
                    assert_eq!(body(&exported(&self.bench, run).await), bodies[&run], "{what}");
                }
                Err(error) => {
                    assert_eq!(error.code(), "run_archived", "{what}: {error}");
                    let file: String = sqlx::query_scalar(
                        "select file from archives join archived_runs on archive_id = id where run_id = $1",
                    )
                    .bind(run.0)
                    .fetch_one(&self.bench.pool)
                    .await
                    .expect("recorded");
                    assert!(error.to_string().contains(&file), "{what}: {error}");
                    if elsewhere.is_none() {
                        elsewhere = Some(Bench::new().await);
                    }
                    let other = elsewhere.as_ref().expect("just made");
                    let imported = retention::import(&other.client, &self.folder.0.join(&file), Some(run)).await;
                    assert_eq!(imported.expect("whole").runs, [run], "{what}");
                    assert_eq!(body(&exported(other, run).await), bodies[&run], "{what}");
                }
            }
        }
        for table in ["inbox", "checkpoints", "attempt_progress", "ready"] {
            let sql = format!(
                "select count(*) from {table} t where not exists (select from runs r where r.run_id = t.run_id)"
            );
            let n: i64 = sqlx::query_scalar(sqlx::AssertSqlSafe(sql)).fetch_one(&self.bench.pool).await.expect("count");
            assert_eq!(n, 0, "{what}: {table}");
        }
        assert_eq!(
            self.count(
                "select count(*) from history_default h where not exists (select from runs r where r.run_id = h.run_id)"
            )
            .await,
            0,
            "{what}"
        );
        // An imported fork has the rows of its origin as well, so the same attempt is in two histories.
        if self.count("select count(*) from runs where imported_at is not null").await == 0 {
            self.bench.audit().await;
        }
    }

    async fn bodies(&self) -> BTreeMap<RunId, String> {
        let mut bodies = BTreeMap::new();
        for run in self.leaving() {
            bodies.insert(run, body(&exported(&self.bench, run).await));
        }
        bodies
    }
}

fn forked(seq: u64) -> Fork {
    Fork {
        run_id: None,
        at: At::Seq(seq),
        inputs: Map::new(),
        definition: None,
        attributes: None,
        reason: "try".into(),
    }
}

/// History and checkpoints: what is the same wherever and whenever a run is exported.
fn body(text: &str) -> String {
    text.lines().filter(|l| !l.starts_with("{\"header\"") && !l.starts_with("{\"end\"")).collect::<Vec<_>>().join("\n")
}

#[tokio::test(flavor = "multi_thread")]
async fn old_runs_leave_for_a_file_and_can_be_brought_back() {
    let scene = Scene::new().await;
    let (client, bodies) = (&scene.bench.client, scene.bodies().await);
    // Nothing is old yet.
    assert_eq!(scene.retire().await, retention::Report::default());
    assert!(scene.folder.names().is_empty());

    later(&scene.bench.pool, 200).await;
    let plan = retention::plan(client, 90 * DAY).await.expect("plan");
    assert_eq!((plan.runs, plan.archives.len(), plan.dropped.len()), (4, 0, 3));
    assert_eq!(scene.count("select count(*) from archives").await, 0);

    let report = scene.retire().await;
    assert_eq!((report.runs, report.unfit, report.archives.len()), (4, 0, 1), "{report:?}");
    assert_eq!(report.dropped.len(), 3, "the months are over: {report:?}");
    assert_eq!(scene.folder.names(), report.archives);
    scene.nothing_is_lost(&bodies, "retired").await;
    // Who is open keeps his child, and their rows have a place.
    let kept: Vec<uuid::Uuid> =
        sqlx::query_scalar("select run_id from runs order by run_id").fetch_all(&scene.bench.pool).await.expect("runs");
    assert_eq!(kept, [scene.open.0, scene.child.0]);
    let listed = retention::archives(client, 10).await.expect("list");
    assert_eq!((listed.len(), listed[0].runs, &listed[0].file), (1, 4, &report.archives[0]));

    // Whoever asks is told where it is, and nothing is half done.
    let gone = scene.origin;
    let codes = [
        client.export(gone).await.map(drop).expect_err("gone"),
        client.replay(gone, None).await.map(drop).expect_err("gone"),
        client.fork(gone, forked(1)).await.map(drop).expect_err("gone"),
        client.reset(gone, forked(1)).await.map(drop).expect_err("gone"),
        client.cancel(gone, "x").await.expect_err("gone"),
        client.terminate(gone, "x").await.expect_err("gone"),
        client.signal(gone, Signal { name: "go".into(), ..Signal::default() }).await.map(drop).expect_err("gone"),
        client.wait_change(gone, 0, Duration::ZERO).await.map(drop).expect_err("gone"),
    ];
    for error in codes {
        assert_eq!(error.code(), "run_archived", "{error}");
    }
    // An id has one run, ever.
    let again = Start {
        run_id: Some(gone),
        definition: scene.bench.deploy(small()).await,
        inputs: json!({}),
        workflow_id: None,
        attributes: json!({}),
        queue: String::new(),
        topic: None,
        admission: Default::default(),
    };
    assert!(!client.start(again).await.expect("start").created);
    let late = client.fork(scene.open, Fork { run_id: Some(gone), ..forked(1) }).await.expect("found");
    assert_eq!((late.created, late.run_id), (false, gone), "a fork under a retired run's id makes none");
    assert_eq!(client.describe(gone).await.expect_err("gone").code(), "run_archived");
    assert_eq!(scene.retire().await, retention::Report::default(), "all is done");

    // One comes back, then the others.
    let path = scene.folder.0.join(&report.archives[0]);
    let one = retention::import(client, &path, Some(scene.fork)).await.expect("import");
    assert_eq!((one.runs, one.there), (vec![scene.fork], 0));
    assert_eq!(retention::import(client, &path, Some(scene.fork)).await.expect_err("there").code(), "run_exists");
    assert_eq!(retention::import(client, &path, Some(scene.open)).await.expect_err("other").code(), "run_not_found");
    let rest = retention::import(client, &path, None).await.expect("import");
    assert_eq!((rest.runs.len(), rest.there), (3, 1));
    for run in scene.leaving() {
        let view = client.describe(run).await.expect("back");
        assert!(view.imported_at.is_some() && view.status == RunStatus::Completed);
        assert_eq!(client.replay(run, None).await.expect("folds").divergence, None);
    }
    scene.nothing_is_lost(&bodies, "imported").await;
    // They stay as long as others, from now on, and then leave into a newer file.
    assert_eq!(scene.retire().await.runs, 0);
    later(&scene.bench.pool, 300).await;
    let report = scene.retire().await;
    assert_eq!(report.runs, 4);
    scene.nothing_is_lost(&bodies, "retired again").await;

    // A file that was touched is refused.
    let path = scene.folder.0.join(&report.archives[0]);
    let mut bytes = fs::read(&path).expect("file");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&path, &bytes).expect("file");
    assert_eq!(retention::import(client, &path, None).await.expect_err("damaged").code(), "archive_invalid");
    assert_eq!(client.describe(gone).await.expect_err("gone").code(), "run_archived");

    // The open run has not noticed.
    later(&scene.bench.pool, 201).await;
    let worker = scene.bench.worker().await;
    client.signal(scene.open, Signal { name: "go".into(), ..Signal::default() }).await.expect("signal");
    assert_eq!(scene.bench.closed(scene.open).await.status, RunStatus::Completed);
    worker.drain(GRACE).await;
    scene.bench.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_written_or_could_not_come_back_stays() {
    let scene = Scene::new().await;
    later(&scene.bench.pool, 200).await;
    let bodies = scene.bodies().await;
    let policy = Policy { archive: "/proc/nowhere".into(), ..scene.folder.policy() };
    let error = retention::run(&scene.bench.client, &policy).await.expect_err("unwritable");
    assert_eq!(error.code(), "archive_unwritable");
    // The month is not touched either: its runs are there.
    assert_eq!(scene.count("select count(*) from archives").await, 0);
    scene.nothing_is_lost(&bodies, "unwritable").await;

    // A history that does not fold could not be imported; who needs it stays as well.
    sqlx::query("update history set events = events - 0 where run_id = $1 and seq = 1")
        .bind(scene.origin.0)
        .execute(&scene.bench.pool)
        .await
        .expect("damaged");
    let report = scene.retire().await;
    assert_eq!((report.unfit, report.runs, report.archives.len()), (2, 2, 1), "{report:?}");
    let stays = scene.count("select count(*) from runs").await;
    assert_eq!(stays, 4, "the damaged one and its fork, whose history begins there; the open one and its child");
    let again = scene.retire().await;
    assert_eq!((again.runs, again.archives.len(), scene.folder.names().len()), (0, 0, 1), "no file of nothing");
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_forks_meanwhile_keeps_the_run_or_finds_it_gone() {
    let scene = Scene::new().await;
    later(&scene.bench.pool, 200).await;
    // A fork that is under way holds its origin.
    let mut fork = transaction::begin(&scene.bench.pool).await.expect("begin");
    sqlx::query("select from runs where run_id = $1 for key share")
        .bind(scene.closed[1].0)
        .execute(&mut *fork)
        .await
        .expect("held");
    assert_eq!(scene.retire().await.runs, 3);
    fork.rollback().await.expect("rollback");
    scene.bench.client.describe(scene.closed[1]).await.expect("it stayed");
    // A fork that has been decided, and whose origin leaves before it is stored.
    let mut leaving = transaction::begin(&scene.bench.pool).await.expect("begin");
    let gone = scene.closed[1];
    for sql in [
        "select from runs where run_id = $1 for update",
        "insert into archived_runs select shard, run_id, (select id from archives limit 1) from runs where run_id = $1",
        "delete from runs where run_id = $1",
    ] {
        sqlx::query(sql).bind(gone.0).execute(&mut *leaving).await.expect("left");
    }
    let client = scene.bench.client.clone();
    let forking = tokio::spawn(async move { client.fork(gone, forked(2)).await });
    let waits = "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'";
    while scene.count(waits).await == 0 {
        tokio::task::yield_now().await;
    }
    leaving.commit().await.expect("commit");
    assert_eq!(forking.await.expect("task").expect_err("gone").code(), "run_archived");
    assert_eq!(scene.count("select count(*) from runs where forked_from is not null").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_leaves_while_it_is_started_again_is_not_made_twice() {
    let scene = Scene::new().await;
    later(&scene.bench.pool, 200).await;
    assert!(scene.retire().await.runs > 0);
    let id = RunId::new();
    let definition = scene.bench.deploy(definition("twice", vec![work("a", &[])])).await;
    let start = Start {
        run_id: Some(id),
        definition,
        inputs: json!({}),
        workflow_id: None,
        attributes: json!({}),
        queue: "nobody's".into(),
        topic: None,
        admission: Default::default(),
    };
    assert!(scene.bench.client.start(start.clone()).await.expect("started").created);
    let mut leaving = transaction::begin(&scene.bench.pool).await.expect("begin");
    for sql in [
        "select from runs where run_id = $1 for update",
        "insert into archived_runs select shard, run_id, (select id from archives limit 1) from runs where run_id = $1",
        "delete from ready where run_id = $1",
        "delete from runs where run_id = $1",
    ] {
        sqlx::query(sql).bind(id.0).execute(&mut *leaving).await.expect("left");
    }
    let client = scene.bench.client.clone();
    let starting = tokio::spawn(async move { client.start(start).await });
    let waits = "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'";
    while scene.count(waits).await == 0 {
        tokio::task::yield_now().await;
    }
    leaving.commit().await.expect("commit");
    assert!(!starting.await.expect("task").expect("it was here").created);
    let there = sqlx::query_scalar::<_, i64>("select count(*) from runs where run_id = $1").bind(id.0);
    assert_eq!(there.fetch_one(&scene.bench.pool).await.expect("n"), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_reads_meanwhile_sees_all_of_a_run_or_is_told_where_it_is() {
    let scene = Scene::new().await;
    later(&scene.bench.pool, 200).await;
    // Back from a file, they lie in no partition: their rows are deleted one by one.
    let file = scene.retire().await.archives.remove(0);
    retention::import(&scene.bench.client, &scene.folder.0.join(file), None).await.expect("import");
    later(&scene.bench.pool, 300).await;
    let readers = scene.leaving().into_iter().map(|run| {
        let client = scene.bench.client.clone();
        tokio::spawn(async move {
            let mut whole = 0;
            loop {
                let read = async {
                    client.describe(run).await?;
                    let mut export = client.export(run).await?;
                    while export.next().await?.is_some() {}
                    client.replay(run, None).await
                };
                match read.await {
                    Ok(replayed) => assert_eq!(replayed.divergence, None),
                    Err(error) => break (error, whole),
                }
                whole += 1;
            }
        })
    });
    let readers: Vec<_> = readers.collect();
    assert_eq!(scene.retire().await.runs, 4);
    for reader in readers {
        let (error, whole) = reader.await.expect("task");
        assert_eq!(error.code(), "run_archived", "after {whole} readings: {error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_that_retire_at_once_write_each_run_once() {
    let scene = Scene::new().await;
    later(&scene.bench.pool, 200).await;
    let bodies = scene.bodies().await;
    let policy = scene.folder.policy();
    let all = futures_util::future::join_all((0..4).map(|_| retention::run(&scene.bench.client, &policy))).await;
    let runs: u64 = all.into_iter().map(|r| r.expect("report").runs).sum();
    assert_eq!((runs, scene.folder.names().len()), (4, 1));
    assert_eq!(scene.count("select count(*) from archived_runs").await, 4);
    scene.nothing_is_lost(&bodies, "at once").await;
}

/// The process that dies while it retires.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "started by the other test of this file in a process of its own"]
async fn child_process() {
    let (Ok(database), Ok(folder)) = (std::env::var(DATABASE), std::env::var(FOLDER)) else { return };
    let bench = Bench::over(PgPool::connect(&database).await.expect("database"));
    retention::run(&bench.client, &Policy { keep: 90 * DAY, archive: folder.into() }).await.expect("retired");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_death_anywhere_leaves_every_run_in_the_database_or_in_a_file() {
    let points = CRASH_POINTS.iter().map(|(point, _)| *point).filter(|point| point.starts_with("retire."));
    stream::iter(points).for_each_concurrent(AT_ONCE, dies_at).await;
}

async fn dies_at(point: &str) {
    let scene = Scene::new().await;
    let bodies = scene.bodies().await;
    later(&scene.bench.pool, 200).await;
    let child = Command::new(std::env::current_exe().expect("this binary"))
        .args(["retention::child_process", "--exact", "--ignored", "--nocapture"])
        .env(DATABASE, url(&scene.bench.pool))
        .env(FOLDER, &scene.folder.0)
        .env("LOOPWRIGHT_CRASH_POINT", point)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("child");
    assert_eq!(ended(child).await, None, "{point}: the child dies of its crash point");
    scene.nothing_is_lost(&bodies, point).await;
    scene.retire().await;
    scene.nothing_is_lost(&bodies, point).await;
    assert_eq!(scene.count("select count(*) from runs").await, 2, "{point}");
    assert_eq!(scene.count("select count(*) from archived_runs").await, 4, "{point}");
    assert_eq!(scene.retire().await, retention::Report::default(), "{point}: all is done");
}
