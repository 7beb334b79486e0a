//! The whole loop with the real binary, real Postgres, real git and a real sandbox; only the model is rehearsed. Once as
//! the demo shows it, once with its workers killed twenty times at random.

use crate::support::MIGRATIONS;
use loopwright_activities::billing::{BillingSettings, LedgerHook, MicroCredits, audit};
use loopwright_engine::{
    client::{Client, Decision, Signal, Start},
    embedded::testing,
    ids::RunId,
    view::{RunStatus, RunView, Waiting},
};
use loopwright_server::{app, shipped, store::Store};
use serde_json::{Value, json};
use sqlx::PgPool;
use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::Duration,
};
use uuid::Uuid;

/// Workers that are killed.
const KILLS: u32 = 20;
/// The loop has to end within that time, however slow the machine.
pub const PATIENCE: Duration = Duration::from_secs(480);

pub fn binary(data_dir: &Path, pool: &PgPool) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_loopwright"));
    command
        .env_clear()
        .envs(["PATH", "HOME", "CARGO_HOME", "RUSTUP_HOME"].iter().filter_map(|n| Some((n, std::env::var_os(n)?))))
        .env("DATABASE_URL", testing::url(pool))
        .env("LOOPWRIGHT_DATA_DIR", data_dir)
        .stdin(Stdio::null());
    command
}

/// What the model says.
pub fn rehearsal() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/rehearsal/greeter.yaml")
}

/// A folder that the account of confined commands can reach.
pub fn folder() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("loopwright-e2e-").tempdir().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_demo_ends_the_same_whether_its_worker_is_killed_or_not() {
    let pool = testing::database(MIGRATIONS).await;
    let dir = folder();
    let out = dir.path().join("repository");
    let mut command = binary(&dir.path().join("data"), &pool);
    command.args(["demo", "--crash", "--json", "--out"]).arg(&out);
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{told}");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {told}"));
    assert_eq!((&report["status"], &report["verdict"]), (&json!("completed"), &json!("accept")), "{report}");
    assert_eq!((&report["crashes"], &report["todo"]), (&json!(1), &json!({"done": 4, "total": 4})), "{report}");
    let rows = report["comparison"].as_array().unwrap();
    assert!(rows.len() >= 6 && rows.iter().all(|row| row["same"] == true), "{rows:?}");
    assert!(report["credits"]["charged_ucr"].as_i64().unwrap() > 0 && report["credits"]["held_ucr"] == 0, "{report}");
    assert!(report["models"].as_array().unwrap().iter().all(|m| m.as_str().unwrap().starts_with("rehearsed/")));
    for said in ["asks:", "✗ `cargo test", "verify    reject", "killed with SIGKILL", "rehearsed"] {
        assert!(told.contains(said), "{said}: {told}");
    }
    // What it left is a repository like any other.
    let read = |name: &str| std::fs::read_to_string(out.join(name)).unwrap();
    assert!(read("TODO.md").contains("4 of 4 done") && !read("TODO.md").contains("- [ ]"));
    assert!(read("README.md").contains("## Tests") && read("docs/ARCHITECTURE.md").contains("## Stack"));
    let built = Command::new("cargo").args(["test", "--offline", "--quiet"]).current_dir(&out).output().unwrap();
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stdout));
    assert_eq!(report["commit"], git(&out, &["rev-parse", "HEAD"]));
    audited(&pool).await;
}

fn git(dir: &Path, args: &[&str]) -> String {
    let output = Command::new("git").arg("-C").arg(dir).args(["-c", "safe.directory=*"]).args(args).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// Nothing in the ledger or in any history is broken.
pub async fn audited(pool: &PgPool) {
    let broken = audit::run(&mut pool.acquire().await.unwrap()).await.unwrap();
    assert!(broken.is_empty(), "{broken:?}");
    let gaps = "select run_id::text, count(*), max(seq) from history group by run_id having count(*) <> max(seq)";
    let gaps: Vec<(String, i64, i64)> = sqlx::query_as(gaps).fetch_all(pool).await.unwrap();
    assert!(gaps.is_empty(), "{gaps:?}");
    let twice = "select e->>'attempt_id', count(*) from history, jsonb_array_elements(events) e
                 where e->>'type' = 'attempt_ended' group by 1 having count(*) > 1";
    let twice: Vec<(String, i64)> = sqlx::query_as(twice).fetch_all(pool).await.unwrap();
    assert!(twice.is_empty(), "{twice:?}");
    let open = "select e->>'attempt_id' from history h, jsonb_array_elements(events) e
                where e->>'type' = 'attempt_started' and not exists (
                  select from history o, jsonb_array_elements(o.events) x
                  where o.run_id = h.run_id and x->>'type' = 'attempt_ended' and x->>'attempt_id' = e->>'attempt_id')";
    let open: Vec<String> = sqlx::query_scalar(open).fetch_all(pool).await.unwrap();
    assert!(open.is_empty(), "{open:?}");
    // What was decided would be decided again.
    let client = Client::new(pool.clone(), Arc::new(LedgerHook::new(BillingSettings::default())));
    let runs: Vec<Uuid> = sqlx::query_scalar("select run_id from runs").fetch_all(pool).await.unwrap();
    for run in runs {
        let replayed = client.replay(RunId(run), None).await.unwrap();
        assert!(replayed.divergence.is_none() && replayed.decided > 0, "run {run}: {replayed:#?}");
    }
}

/// A run of the shipped loop over the greeter's rehearsal, and the part of its owner.
pub struct Loop {
    client: Client,
    run: RunId,
    project: Uuid,
    user: Uuid,
}

impl Loop {
    pub async fn start(pool: &PgPool, run: RunId) -> Self {
        Self::start_with(pool, run, BillingSettings::default()).await
    }

    async fn start_with(pool: &PgPool, run: RunId, billing: BillingSettings) -> Self {
        let client = Client::new(pool.clone(), Arc::new(LedgerHook::new(billing)));
        shipped::deploy(&client, shipped::SHIPPED, &app::catalog()).await.unwrap();
        let store = Store::new(pool.clone(), billing.welcome);
        let user = store.user_of("test", "owner", "test").await.unwrap().id;
        let project = Uuid::new_v5(&run.0, b"project");
        store.create_project_as(project, user, "Greeter", "A script that greets.", "dev-loop").await.unwrap();
        let definition = client.pointer("dev-loop", "current").await.unwrap();
        let start = Start {
            run_id: Some(run),
            definition,
            inputs: json!({"project_id": project, "idea": "A script that greets."}),
            workflow_id: Some(format!("project:{project}")),
            attributes: json!({"user_id": user, "project_id": project}),
            queue: String::new(),
            topic: None,
            admission: Default::default(),
        };
        client.start(start).await.unwrap();
        Self { client, run, project, user }
    }

    pub async fn view(&self) -> RunView {
        self.client.describe(self.run).await.unwrap()
    }

    /// Answers and approves whatever waits; saying it twice is harmless.
    pub async fn play_the_owner(&self, view: &RunView) {
        for waiting in &view.waiting {
            match waiting {
                Waiting::Signal { path, signal, .. } => {
                    let signal = Signal {
                        name: signal.clone(),
                        payload: json!({"text": "Hello"}),
                        dedupe_id: Some(path.clone()),
                        sender: None,
                    };
                    self.client.signal(self.run, signal).await.unwrap();
                }
                Waiting::Approval { step, path, .. } => {
                    // The run may have read an earlier sending between our look and this one.
                    let sent = self.client.approve(self.run, step, Decision::Approved, None, Some(path.clone()), None);
                    drop(sent.await);
                }
                _ => {}
            }
        }
    }

    /// Commits, finished calls, charged micro-credits.
    pub async fn facts(&self, pool: &PgPool) -> (Vec<String>, i64, i64) {
        let store = Store::new(pool.clone(), BillingSettings::default().welcome);
        let commits = "select oid from project_bundles b where project_id = $1 and exists (
                         select from project_refs r where r.project_id = b.project_id and r.oid = b.oid)";
        let commits = sqlx::query_scalar(commits).bind(self.project).fetch_all(pool).await.unwrap();
        let calls = store.calls(self.run).await.unwrap();
        assert_eq!(calls.open, 0);
        (commits, calls.finished, store.charged(self.user).await.unwrap())
    }
}

struct Workers<'a> {
    pool: &'a PgPool,
    dir: &'a Path,
    started: u32,
}

impl Workers<'_> {
    fn start(&mut self) -> Child {
        self.started += 1;
        let dir = self.dir.join(self.started.to_string());
        let log = std::fs::File::create(self.dir.join(format!("{}.log", self.started))).unwrap();
        binary(&dir, self.pool)
            .env("LOOPWRIGHT_WORKER_LEASE_MS", "1000")
            .args(["worker", "--rehearsal"])
            .arg(rehearsal())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap()
    }
}

/// A pause of 0.2 to 1.8 seconds from a seed that the failure names.
fn pause(seed: &mut u64) -> Duration {
    *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    Duration::from_millis(200 + (*seed >> 33) % 1_600)
}

#[tokio::test(flavor = "multi_thread")]
async fn twenty_kills_at_random_moments_change_neither_the_commits_nor_the_bill() {
    let seed = u64::from(std::process::id()) ^ chrono::Utc::now().timestamp_millis().unsigned_abs();
    let run = RunId::new();
    let dir = folder();

    let undisturbed = testing::database(MIGRATIONS).await;
    let reference = Loop::start(&undisturbed, run).await;
    let mut workers = Workers { pool: &undisturbed, dir: &dir.path().join("a"), started: 0 };
    std::fs::create_dir_all(workers.dir).unwrap();
    let mut worker = workers.start();
    let view = to_the_end(&reference, seed, &mut worker).await;
    worker.kill().unwrap();
    worker.wait().unwrap();
    assert_eq!(view.status, RunStatus::Completed, "{:?}", view.failure);

    let killed = testing::database(MIGRATIONS).await;
    let disturbed = Loop::start(&killed, run).await;
    let mut workers = Workers { pool: &killed, dir: &dir.path().join("b"), started: 0 };
    std::fs::create_dir_all(workers.dir).unwrap();
    let (mut worker, mut moments, mut kills) = (workers.start(), seed, 0);
    while kills < KILLS {
        // The pause is what is tested: a kill at whatever moment it leads to.
        let next = tokio::time::Instant::now() + pause(&mut moments);
        while tokio::time::Instant::now() < next {
            let view = disturbed.view().await;
            assert!(!view.status.is_closed() || view.status == RunStatus::Completed, "seed {seed}: {:?}", view.failure);
            disturbed.play_the_owner(&view).await;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        worker.kill().unwrap();
        worker.wait().unwrap();
        kills += 1;
        worker = workers.start();
    }
    let view = to_the_end(&disturbed, seed, &mut worker).await;
    worker.kill().unwrap();
    worker.wait().unwrap();
    assert_eq!(view.status, RunStatus::Completed, "seed {seed}: {:?}", view.failure);
    assert_eq!(disturbed.facts(&killed).await, reference.facts(&undisturbed).await, "seed {seed}");
    audited(&undisturbed).await;
    audited(&killed).await;
}

async fn to_the_end(it: &Loop, seed: u64, worker: &mut Child) -> RunView {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    loop {
        let view = it.view().await;
        if view.status.is_closed() {
            return view;
        }
        it.play_the_owner(&view).await;
        let ended = worker.try_wait().unwrap();
        assert!(ended.is_none(), "seed {seed}: the worker ended: {ended:?}");
        let standing = || format!("seed {seed}: {:?} {:?} {:?}", view.status, view.waiting, view.live);
        assert!(tokio::time::Instant::now() < deadline, "{}", standing());
        it.client.wait_change(it.run, view.seq, Duration::from_millis(200)).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_version_of_the_loop_leaves_the_run_that_waits_alone() {
    let pool = testing::database(MIGRATIONS).await;
    let dir = folder();
    let waiting = Loop::start(&pool, RunId::new()).await;
    let mut workers = Workers { pool: &pool, dir: &dir.path().join("w"), started: 0 };
    std::fs::create_dir_all(workers.dir).unwrap();
    let mut worker = workers.start();
    let pinned = loop {
        let view = waiting.view().await;
        if view.waiting.iter().any(|w| matches!(w, Waiting::Signal { .. })) {
            break view.definition;
        }
        waiting.client.wait_change(waiting.run, view.seq, Duration::from_secs(1)).await.unwrap();
    };

    // A team takes the approval out.
    let (_, text) = shipped::DEFINITIONS.iter().find(|(file, _)| *file == "dev-loop.yaml").unwrap();
    let edited = text
        .replace("approve_plan: { type: boolean, default: true }", "approve_plan: { type: boolean, default: false }");
    assert_ne!(*text, edited);
    let file = dir.path().join("dev-loop.yaml");
    std::fs::write(&file, &edited).unwrap();
    let prompts = dir.path().join("prompts");
    std::fs::create_dir(&prompts).unwrap();
    for (path, prompt) in shipped::PROMPTS {
        std::fs::write(dir.path().join(path), prompt).unwrap();
    }
    let mut command = binary(&dir.path().join("data"), &pool);
    command.args(["workflow", "deploy"]).arg(&file);
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));

    let fresh = Loop::start(&pool, RunId::new()).await;
    let current = fresh.view().await.definition;
    assert_ne!(current, pinned);
    let (first, second) = (to_the_end(&waiting, 0, &mut worker).await, to_the_end(&fresh, 0, &mut worker).await);
    worker.kill().unwrap();
    worker.wait().unwrap();
    for (view, definition) in [(&first, pinned), (&second, current)] {
        assert_eq!((view.status, view.definition), (RunStatus::Completed, definition), "{:?}", view.failure);
    }
    assert!(asks_for_approval(&waiting).await, "it keeps the version that it began with");
    assert!(!asks_for_approval(&fresh).await, "the new version does not ask");
    audited(&pool).await;
}

async fn asks_for_approval(it: &Loop) -> bool {
    let history = it.client.history(it.run, 0, 1000).await.unwrap();
    let mut events = history.iter().flat_map(|row| &row.events);
    events.any(|e| e["type"] == "step_started" && e["path"].as_str().is_some_and(|path| path.ends_with("/approve")))
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_balance_parks_the_loop_and_a_grant_makes_it_go_on() {
    let pool = testing::database(MIGRATIONS).await;
    let dir = folder();
    let nothing = BillingSettings { welcome: MicroCredits(0), ..BillingSettings::default() };
    let poor = Loop::start_with(&pool, RunId::new(), nothing).await;
    let mut workers = Workers { pool: &pool, dir: &dir.path().join("w"), started: 0 };
    std::fs::create_dir_all(workers.dir).unwrap();
    let mut worker = workers.start();
    let message = loop {
        let view = poor.view().await;
        let blocked = view.waiting.iter().find_map(|w| match w {
            Waiting::Blocked { reason, message, .. } => Some((reason.clone(), message.clone())),
            _ => None,
        });
        if let Some((reason, message)) = blocked {
            assert_eq!(reason, "credits");
            break message;
        }
        poor.client.wait_change(poor.run, view.seq, Duration::from_secs(1)).await.unwrap();
    };
    assert!(message.contains("0 are available") && message.contains("goes on by itself"), "{message}");
    assert_eq!(poor.facts(&pool).await, (vec![], 0, 0), "nothing was asked and nothing charged");

    let mut command = binary(&dir.path().join("data"), &pool);
    command.args(["credits", "grant", "50", "--user", &poor.user.to_string()]);
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let view = to_the_end(&poor, 0, &mut worker).await;
    worker.kill().unwrap();
    worker.wait().unwrap();
    assert_eq!(view.status, RunStatus::Completed, "{:?}", view.failure);
    let (_, calls, charged) = poor.facts(&pool).await;
    assert!(calls > 0 && charged > 0);
    audited(&pool).await;
}
