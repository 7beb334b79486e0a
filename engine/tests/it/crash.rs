//! A process dies at every crash point of the engine, and somebody else brings its runs to their end.
//!
//! Some points of one scene are tried in one database, one death after the other, each with runs of its own; the next process meets
//! what the dead have left as well. A point that is not reached fails the test.

mod awaits;
mod callers;
mod scenes;

use crate::{
    bench::{Bench, PATIENCE, broken},
    faults::{DATABASE, GRACE, LONG, SHORT, ended, outside, reaches},
};
use futures_util::{StreamExt, stream};
use loopwright_engine::{
    client::{Decision, Signal, Why},
    embedded::testing::url,
    ids::RunId,
    testing::CRASH_POINTS,
    view::RunStatus,
};
use scenes::{Known, Scene, arrange, later, noted_work, stir};
use sqlx::PgPool;
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
    process::{Child, Command, Stdio},
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

/// Tells a child that is no worker which run it acts on.
const RUN: &str = "LOOPWRIGHT_TEST_RUN";
/// Where the child dies.
const POINT: &str = "LOOPWRIGHT_CRASH_POINT";
/// Children for one point: on a busy machine a worker loses its lease before it gets there, and ends in good order.
const CHILDREN: usize = 10;
/// Databases at once: most of the time something is waited for.
const AT_ONCE: usize = 4;
/// The same shard by shard, where a look is 128 statements.
const AT_ONCE_BY_SHARD: usize = 2;
/// Words; only points whose names hold one of them are tried.
const SOME: &str = "LOOPWRIGHT_CRASH_POINTS";
/// Deaths in one database. Chosen: to prepare and audit one takes as long as two or three deaths.
const DEATHS: usize = 7;
/// A worker that drains hands its runs over after that, whatever they do.
const DRAIN: Duration = Duration::from_millis(200);

/// The process that dies, whatever it is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "started by the other test of this file in a process of its own"]
async fn child_process() {
    let (Ok(database), Ok(point)) = (std::env::var(DATABASE), std::env::var(POINT)) else { return };
    let point = point.split(':').next().expect("name").to_owned();
    let pool = PgPool::connect(&database).await.expect("database");
    let (bench, scene) = (Bench::over(pool.clone()), Scene::of(&point));
    if let Some(call) = callers::of(&point).filter(|_| scene == Scene::Calls) {
        let run = std::env::var(RUN).expect("run").parse().expect("id");
        drop(callers::ask(&bench, call, run).await);
        return;
    }
    bench.hook.refuse.store(scene == Scene::Refuses, Ordering::SeqCst);
    bench.hook.broken.store(scene == Scene::Breaks, Ordering::SeqCst);
    let (large, stuck) = (point.starts_with("large"), matches!(scene, Scene::Crowded | Scene::Drains));
    let before = started(&bench.pool).await;
    bench.script(move |ctx, _| {
        let pool = pool.clone();
        async move { if stuck { std::future::pending().await } else { noted_work(pool, ctx, large).await } }
    });
    // Strays are looked for every two seconds; what is overdue is not so again for a minute.
    let lease = if point.starts_with("strays") || stuck || scene == Scene::Overdue { LONG } else { SHORT };
    let worker = bench.worker_with(lease, if scene == Scene::Crowded { 1 } else { 4 }).await;
    if scene != Scene::Drains {
        return worker.fenced().await;
    }
    while started(&bench.pool).await == before {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    worker.drain(DRAIN).await;
}

/// Attempts that have begun.
async fn started(pool: &PgPool) -> i64 {
    sqlx::query_scalar("select count(*) from test_starts").fetch_one(pool).await.expect("count")
}

fn child(bench: &Bench, point: &str, run: Option<RunId>) -> Child {
    Command::new(std::env::current_exe().expect("this binary"))
        .args(["crash::child_process", "--exact", "--ignored", "--nocapture"])
        .env(DATABASE, url(&bench.pool))
        .env(RUN, run.map(|run| run.to_string()).unwrap_or_default())
        .env(POINT, point)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("child")
}

/// Lets a process die at the n-th passing of a point.
async fn dies_at(bench: &Bench, point: &str, nth: u32, run: Option<RunId>) {
    let mut code = Some(0);
    for _ in 0..CHILDREN {
        let process = child(bench, &format!("{point}:{nth}"), run);
        code = tokio::select! {
            code = ended(process) => code,
            () = stir(bench.pool.clone(), point) => code,
        };
        if code != Some(0) || run.is_some() {
            break;
        }
    }
    assert_eq!(code, None, "{point}:{nth}: the child dies of its crash point");
    // Its lease is over: that a lease is waited for is not what is tried here.
    let over = "update workers set heartbeat_at = heartbeat_at - interval '1 day'";
    sqlx::query(over).execute(&bench.pool).await.expect("lease");
}

/// Deaths at these points in one database; then somebody goes on.
async fn story(scene: Scene, points: Vec<(&'static str, u32)>, by_shard: bool) {
    let bench = Bench::new().await;
    if by_shard {
        bench.by_shard().await;
    }
    outside(&bench.pool).await;
    let pool = bench.pool.clone();
    bench.script(move |ctx, _| noted_work(pool.clone(), ctx, false));
    let known = Known::deployed(&bench).await;
    let names: Vec<&'static str> = points.iter().map(|(point, _)| *point).collect();
    let mut ends: Vec<(RunId, Vec<RunStatus>)> = Vec::new();
    let asked = if scene == Scene::Calls { callers::arrange(&bench, &names).await } else { Vec::new() };
    for (n, (point, nth)) in points.iter().enumerate() {
        let began = Instant::now();
        if scene == Scene::Calls {
            dies_at(&bench, point, *nth, Some(asked[n])).await;
            let now = callers::again(&bench, point, asked[n]).await;
            ends.extend(now.into_iter().map(|(run, status)| (run, vec![status])));
        } else {
            let now = arrange(&bench, &known, scene, point, n == 0).await;
            ends.extend(now.into_iter().map(|(run, allowed)| (run, allowed.to_vec())));
            dies_at(&bench, point, *nth, None).await;
        }
        println!("{scene:?} {point}:{nth} {:?}", began.elapsed());
    }
    if scene == Scene::Overdue {
        later(&bench.pool).await;
    }
    let began = Instant::now();
    let last = bench.worker_with(LONG, 32).await;
    for (run, _) in &ends {
        // One of a schedule begins by the clock.
        reaches(&bench.pool, &format!("select count(*) from runs where run_id = '{run}'"), 1).await;
    }
    goes_on(&bench, &names).await;
    for (run, allowed) in ends {
        let status = bench.client.describe(run).await.expect("run").status;
        assert!(allowed.contains(&status), "{names:?}: run {run} has ended as {status:?} and not as {allowed:?}");
    }
    reaches(&bench.pool, "select count(*) where not exists (select from dead_workers where not runs_taken)", 1).await;
    last.drain(GRACE).await;
    bench.audit().await;
    audit(&bench.pool, &names).await;
    for (run, point) in asked.iter().zip(&names) {
        callers::answered(&bench, point, *run).await;
    }
    println!("{scene:?} {names:?} ends after {:?}", began.elapsed());
}

/// Answers what the open runs ask for, and lets go on what was set aside or paused, until none is open.
async fn goes_on(bench: &Bench, names: &[&str]) {
    let deadline = Instant::now() + PATIENCE * 2;
    loop {
        let open: Vec<(uuid::Uuid, String)> = sqlx::query_as("select run_id, status from runs where closed_at is null")
            .fetch_all(&bench.pool)
            .await
            .expect("open");
        if open.is_empty() {
            return;
        }
        assert!(Instant::now() < deadline, "{names:?}: still open: {}", standing(&bench.pool).await);
        for (run, status) in &open {
            // Ids of their own: whatever was sent to the run under another is not this.
            let (run, go, approved) = (RunId(*run), Some("last".to_owned()), Some("approved".to_owned()));
            // What a run does not ask for, it refuses; and it may have closed meanwhile.
            if status == "quarantined" {
                drop(bench.client.unquarantine(run, Why::default()).await);
            }
            let signal = Signal { name: "go".into(), dedupe_id: go, ..Signal::default() };
            drop(bench.client.signal(run, signal).await);
            drop(bench.client.approve(run, "review", Decision::Approved, None, approved, None).await);
            let why = Why { dedupe_id: Some("resumed".into()), ..Why::default() };
            drop(bench.client.resume(run, why).await);
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// All that Postgres knows of the open runs, for whoever asks why they do not end.
async fn standing(pool: &PgPool) -> String {
    let sql = "select coalesce(jsonb_pretty(jsonb_agg(to_jsonb(r) - 'inputs' - 'cursor' || jsonb_build_object(
                 'ready', (select to_jsonb(q) from ready q where q.run_id = r.run_id),
                 'admission', (select to_jsonb(a) from admissions a where a.run_id = r.run_id),
                 'inbox', (select jsonb_agg(to_jsonb(i)) from inbox i where i.run_id = r.run_id),
                 'history', (select jsonb_agg(h.events order by h.seq) from history h where h.run_id = r.run_id),
                 'workers', (select jsonb_agg(to_jsonb(w)) from workers w), 'now', engine_now()))), 'none')
               from runs r where r.closed_at is null";
    sqlx::query_scalar(sql).fetch_one(pool).await.expect("standing")
}

/// What must hold when all runs are closed, beside [`Bench::audit`]: a name, and how many break it.
pub fn rules() -> Vec<(&'static str, String)> {
    let succeeded = "select h.run_id, e->>'path' as path from history h, jsonb_array_elements(h.events) e
                     where e->>'type' = 'attempt_ended' and e->>'outcome' = 'succeeded'";
    vec![
        ("a step that has succeeded twice", format!("select count(*) from (select from ({succeeded}) s group by run_id, path having count(*) > 1) t")),
        (
            "a step that has succeeded without each of its calls, or without an answer that is saved",
            format!("select count(*) from ({succeeded}) s where 3 <> (select count(distinct call) from test_outside o
                       join checkpoints c on c.run_id = o.run_id and c.path = o.path and c.key = 'call-' || o.call
                       where o.run_id = s.run_id and o.path = s.path)"),
        ),
        (
            "a completed run without each of its steps",
            format!("select count(*) from runs r where workflow = 'points' and status = 'completed'
                       and 5 <> (select count(*) from ({succeeded}) s where s.run_id = r.run_id)"),
        ),
        (
            "a call made again although its answer was saved, or saved by an attempt that did not make it",
            "select count(*) from checkpoints c where c.key like 'call-%' and (c.value)::int <>
               (select max(attempt) from test_outside o where o.run_id = c.run_id and o.path = c.path and 'call-' || o.call = c.key)".to_owned(),
        ),
        (
            "an idempotency key that is not the step's alone, or several for one",
            "select count(*) from (select from test_outside group by key having count(distinct (run_id, path)) > 1
                                   union all select from test_outside group by run_id, path having count(distinct key) > 1) k".to_owned(),
        ),
        (
            "a chain without two runs, or whose last has not completed",
            "select count(*) from runs r where workflow in ('inner', 'relay') and first_run_id is null and not exists
               (select from runs n where n.first_run_id = r.run_id and n.status in ('completed', 'cancelled'))
               and r.status <> 'cancelled'".to_owned(),
        ),
        ("a run that has failed", "select count(*) from runs where status in ('failed', 'quarantined')".to_owned()),
        (
            "a call with several children",
            "select count(*) from (select from runs where parent_run_id is not null and first_run_id is null
                                   group by parent_run_id, parent_path having count(*) > 1) c".to_owned(),
        ),
        (
            "an action of a schedule without its run, or two with one",
            "select count(*) from schedule_actions a where a.state = 'started' and
               (not exists (select from runs r where r.run_id = a.run_id)
                or exists (select from schedule_actions b where b.run_id = a.run_id and (b.schedule_id, b.n) <> (a.schedule_id, a.n)))".to_owned(),
        ),
        ("a fork twice", "select count(*) from (select from runs where forked_from is not null group by forked_from having count(*) > 1) f".to_owned()),
    ]
}

async fn audit(pool: &PgPool, names: &[&str]) {
    let (mut conn, rules) = (pool.acquire().await.expect("connection"), rules());
    let found = broken(&mut conn, rules.iter().map(|(rule, sql)| (*rule, sql.as_str()))).await;
    assert_eq!(found, [], "{names:?}");
}

/// The points in the order in which they are tried, scene by scene, and as many in one database as are good for it.
fn stories(points: impl Iterator<Item = (&'static str, u32)>) -> Vec<(Scene, Vec<(&'static str, u32)>)> {
    let some = std::env::var(SOME).unwrap_or_default();
    let wanted = |point: &str| some.is_empty() || some.split_whitespace().any(|word| point.contains(word));
    let mut scenes: BTreeMap<Scene, Vec<_>> = BTreeMap::new();
    for (point, nth) in points.filter(|(point, _)| wanted(point)) {
        scenes.entry(Scene::of(point)).or_default().push((point, nth));
    }
    let divided = |(scene, all): (Scene, Vec<_>)| {
        let parts = all.len().div_ceil(DEATHS);
        let size = all.len().div_ceil(parts);
        all.chunks(size).map(|part| (scene, part.to_vec())).collect::<Vec<_>>()
    };
    scenes.into_iter().flat_map(divided).collect()
}

async fn tell(stories: Vec<(Scene, Vec<(&'static str, u32)>)>, by_shard: bool) {
    stream::iter(stories)
        .for_each_concurrent(if by_shard { AT_ONCE_BY_SHARD } else { AT_ONCE }, |(scene, points)| async move {
            let names = format!("{points:?}");
            let told = tokio::time::timeout(PATIENCE * 5, story(scene, points, by_shard)).await;
            assert!(told.is_ok(), "{scene:?} {names} takes too long");
        })
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_death_at_every_crash_point_leaves_a_database_that_others_go_on_with() {
    // What every transition or call passes is met once more later, in the middle of the work.
    let often = [
        "commit.before_commit",
        "commit.after_commit",
        "meter.before_commit",
        "meter.after_commit",
        "lease.after_heartbeat",
    ];
    // Those of retention are met in its own test.
    let here = CRASH_POINTS.iter().filter(|(point, _)| !point.starts_with("retire."));
    tell(stories(here.map(|(point, _)| (*point, 1)).chain(often.map(|point| (point, 4)))), false).await;
}

/// The same where the committer, claims and takeovers go shard by shard.
#[tokio::test(flavor = "multi_thread")]
async fn a_death_between_two_shards_leaves_a_database_that_others_go_on_with() {
    let parts = ["claim.", "commit.", "strays.", "takeover.", "write.", "lock."];
    // Runs of this size have a shard each, so that there is nothing to halve.
    let there = |(point, _): &&(&str, &str)| {
        parts.iter().any(|part| point.starts_with(part)) && *point != "commit.between_halves"
    };
    let once = CRASH_POINTS.iter().filter(there).map(|(point, _)| (*point, 1));
    // Between two of them.
    let twice = ["claim.after_alive", "commit.before_commit", "commit.after_commit"].map(|point| (point, 2));
    tell(stories(once.chain(twice)), true).await;
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
