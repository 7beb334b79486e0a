//! What a machine can run out of: connections of the pool, sessions of the server, the disk under Postgres. Callers hear of
//! it in time and by code, and every run goes on when there is enough again.
//!
//! The disk is a small file system in a mount namespace of a child process; that needs root and `unshare`, and elsewhere the
//! test says that it was left out.

use crate::{
    bench::{Bench, Gate, PATIENCE, definition, work},
    faults::{GRACE, LONG, SHORT, ended, reaches},
    way::Way,
};
use loopwright_engine::{
    Error, MIGRATIONS,
    client::{Signal, Start},
    definition::{Data, Input},
    embedded::{self, Settings, testing::left_out},
    ids::{DefinitionHash, RunId},
    migrate,
    transaction::{is_transient, session},
    view::RunStatus,
};
use serde_json::{Value, json};
use sqlx::{
    AssertSqlSafe, Connection, PgConnection, PgPool,
    postgres::{PgConnectOptions, PgPoolOptions},
};
use std::{
    fs,
    io::Write,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

/// How long the pools of these tests wait for a connection.
const WAIT: Duration = Duration::from_secs(1);
/// Waits for a connection, one after the other, within which whoever waits once has an answer. Who waits for each of several tries
/// has not.
const WAITS: usize = 3;
/// Tries of a statement that Postgres refuses, each with the longest pause behind it, within which whoever tries as often as
/// `in_transaction` does has an answer: twice as many.
const TRIES: usize = 12;
const LONGEST_PAUSE: Duration = Duration::from_millis(320);

fn start(definition: DefinitionHash, inputs: Value) -> Start {
    Start {
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

/// The error is one of the database that passes, and it says what to do.
fn passes<T: std::fmt::Debug>(answer: Result<T, Error>, what: &str) -> sqlx::Error {
    let error = answer.expect_err(what);
    assert_eq!(error.code(), "database", "{what}: {error}");
    assert!(error.to_string().contains("try again"), "{what}: {error}");
    let Error::Sql(error) = error else { panic!("{what}: {error}") };
    assert!(is_transient(&error), "{what}: {error}");
    error
}

/// What is asked is answered before somebody else has done `other`. Both run here and now, so that a slow machine makes both slow:
/// nothing is said of a clock.
async fn sooner<T>(what: &str, asked: impl Future<Output = T>, other: impl Future<Output = ()>) -> T {
    tokio::select! {
        biased;
        answer = asked => answer,
        () = other => panic!("{what}: no answer within the time that it may take"),
    }
}

/// Waits for a connection that does not come, more often than anybody else may.
async fn waits(pool: &PgPool) {
    for _ in 0..WAITS {
        let none = pool.acquire().await.map(drop).expect_err("there is none");
        assert!(matches!(none, sqlx::Error::PoolTimedOut), "{none}");
    }
}

/// Everything that a client asks for is refused in time, because it gets no connection.
async fn refused_in_time(small: &Bench, run: RunId, definition: DefinitionHash) {
    let (client, pool) = (&small.client, &small.pool);
    let go = Signal { name: "go".into(), ..Signal::default() };
    passes(sooner("start", client.start(start(definition, json!({}))), waits(pool)).await, "start");
    passes(sooner("signal", client.signal(run, go), waits(pool)).await, "signal");
    passes(sooner("describe", client.describe(run), waits(pool)).await, "describe");
}

async fn nothing_is_half_done(pool: &PgPool, runs: i64) {
    for (sql, wanted) in [("select count(*) from runs", runs), ("select count(*) from inbox", 0)] {
        let n: i64 = sqlx::query_scalar(sql).fetch_one(pool).await.expect("count");
        assert_eq!(n, wanted, "{sql}");
    }
}

/// What `work@1` does: waits at the gate and counts that it was called.
fn behind(gate: &Gate, bench: &Bench) -> Arc<AtomicU32> {
    let (gate, calls) = (gate.clone(), Arc::new(AtomicU32::new(0)));
    let made = calls.clone();
    bench.script(move |_, input| {
        let (gate, made) = (gate.clone(), made.clone());
        async move {
            made.fetch_add(1, Ordering::SeqCst);
            gate.pass().await;
            let bytes = usize::try_from(input["bytes"].as_u64().unwrap_or(1)).expect("small");
            // Of letters at random: nothing compresses them away.
            Ok(json!((0..bytes).map(|_| fastrand::alphanumeric()).collect::<String>()))
        }
    });
    calls
}

/// `connections` of them, all held by others.
async fn a_pool_that_is_exhausted(connections: u32) {
    let bench = Bench::new().await;
    let options = bench.pool.connect_options().as_ref().clone();
    let small = PgPoolOptions::new().max_connections(connections).acquire_timeout(WAIT).connect_with(options);
    let small = Bench::over(small.await.expect("pool"));
    let gate = Gate::new();
    let calls = behind(&gate, &small);
    let worker = small.worker_with(LONG, 4).await;
    let hash = bench.deploy(definition("held", vec![work("a", &[]), work("b", &[])])).await;
    let first = bench.start_as(hash, json!({}), None).await.run_id;
    gate.arrived(1).await;
    // The worker's listener may have one of them; the last acquire waits in vain.
    let mut held = Vec::new();
    while let Ok(connection) = small.pool.acquire().await {
        held.push(connection);
    }
    assert!(!held.is_empty());
    // The first is in the worker's hands, and what claims the second has a session of its own.
    let second = bench.start_as(hash, json!({}), None).await.run_id;
    gate.open(4);
    refused_in_time(&small, first, hash).await;
    nothing_is_half_done(&bench.pool, 2).await;
    drop(held);
    for run in [first, second] {
        assert_eq!(bench.closed(run).await.status, RunStatus::Completed);
    }
    gate.open(2);
    let again = small.client.start(start(hash, json!({}))).await.expect("start").run_id;
    assert_eq!(bench.closed(again).await.status, RunStatus::Completed);
    worker.drain(GRACE).await;
    bench.audit().await;
    assert_eq!(calls.load(Ordering::SeqCst), 6, "each step was done once");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pool_of_one_connection_that_somebody_holds_refuses_in_time_and_loses_nothing() {
    a_pool_that_is_exhausted(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pool_of_two_connections_that_somebody_holds_refuses_in_time_and_loses_nothing() {
    a_pool_that_is_exhausted(2).await;
}

/// A role of a database's own, which the server gives a limited number of sessions, and a way for it.
struct Limited {
    role: String,
    proxy: Way,
    way: PgConnectOptions,
    /// Has the only place that there is, once there is a limit.
    holder: PgConnection,
}

impl Limited {
    async fn new(bench: &Bench) -> Self {
        let options = bench.pool.connect_options();
        // Roles are the server's: named like the database, which is this test's alone.
        let role = options.get_database().expect("database").to_owned();
        for sql in [
            format!("create role {role} login"),
            format!("grant all on all tables in schema public to {role}"),
            format!("grant all on all sequences in schema public to {role}"),
        ] {
            sqlx::query(AssertSqlSafe(sql)).execute(&bench.pool).await.expect("role");
        }
        let proxy = Way::to(&bench.pool).await;
        let way = proxy.options().username(&role).database(&role);
        let holder = PgConnection::connect_with(&way).await.expect("holder");
        Self { role, proxy, way, holder }
    }

    async fn bench(&self) -> Bench {
        let pool = PgPoolOptions::new().max_connections(4).acquire_timeout(WAIT).connect_with(self.way.clone());
        Bench::over(pool.await.expect("pool"))
    }

    /// From now on the role has one place, which the holder has; all its other sessions end.
    async fn exhaust(&mut self, pool: &PgPool) {
        let own: i32 = sqlx::query_scalar("select pg_backend_pid()").fetch_one(&mut self.holder).await.expect("pid");
        self.limit(pool, 1).await;
        sqlx::query("select pg_terminate_backend(pid) from pg_stat_activity where usename = $1 and pid <> $2")
            .bind(&self.role)
            .bind(own)
            .execute(pool)
            .await
            .expect("ended");
    }

    async fn limit(&self, pool: &PgPool, sessions: i32) {
        let sql = format!("alter role {} connection limit {sessions}", self.role);
        sqlx::query(AssertSqlSafe(sql)).execute(pool).await.expect("limit");
    }

    async fn has_refused(&self, wanted: u32) {
        let all = async {
            while self.proxy.refused() < wanted {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        assert!(tokio::time::timeout(PATIENCE, all).await.is_ok(), "{} of {wanted}", self.proxy.refused());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_waits_until_the_server_has_a_session_for_it() {
    let bench = Bench::new().await;
    let mut limited = Limited::new(&bench).await;
    let few = limited.bench().await;
    let gate = Gate::new();
    let calls = behind(&gate, &few);
    let worker = few.worker_with(6 * LONG, 4).await;
    let hash = bench.deploy(definition("sessions", vec![work("a", &[]), work("b", &[])])).await;
    let run = bench.start_as(hash, json!({}), None).await.run_id;
    gate.arrived(1).await;
    limited.exhaust(&bench.pool).await;
    let seq = bench.client.describe(run).await.expect("run").seq;
    gate.open(2);
    // The committer tries six times before it says so to the driver, which sends again; the pool and the lease try as well.
    limited.has_refused(24).await;
    refused_in_time(&few, run, hash).await;
    assert_eq!(bench.client.describe(run).await.expect("run").seq, seq, "nothing could be committed");
    nothing_is_half_done(&bench.pool, 1).await;
    limited.limit(&bench.pool, -1).await;
    assert_eq!(bench.closed(run).await.status, RunStatus::Completed);
    worker.drain(GRACE).await;
    bench.audit().await;
    assert_eq!(calls.load(Ordering::SeqCst), 2, "each step was done once");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_whose_lease_the_server_has_no_session_for_stops_and_another_goes_on() {
    let bench = Bench::new().await;
    let mut limited = Limited::new(&bench).await;
    let few = limited.bench().await;
    let gate = Gate::new();
    behind(&gate, &few);
    let worker = few.worker_with(SHORT, 4).await;
    let run = bench.start(definition("lease", vec![work("a", &[])]), json!({})).await;
    gate.arrived(1).await;
    limited.exhaust(&bench.pool).await;
    tokio::time::timeout(PATIENCE, worker.fenced()).await.expect("it stops by itself");
    limited.has_refused(1).await;
    let other = bench.worker_with(LONG, 4).await;
    assert_eq!(bench.closed(run).await.status, RunStatus::Completed);
    limited.limit(&bench.pool, -1).await;
    worker.drain(GRACE).await;
    other.drain(GRACE).await;
    bench.audit().await;
    let outcomes = bench.outcomes().await;
    assert_eq!((outcomes.get("Lost"), outcomes.get("Succeeded")), (Some(&1), Some(&1)), "{outcomes:?}");
}

/// Tells the child where to mount its disk.
const FOLDER: &str = "LOOPWRIGHT_TEST_DISK";
/// A new cluster, our tables, and some segments of its log.
const DISK: &str = "size=256m,mode=0755";
const RUNS: u32 = 8;
/// Of results, beside those that are stored as rows of their own: larger than what is free in the tables' pages.
const BYTES: [u64; 2] = [48 << 10, 160 << 10];

/// Whether this machine lets us mount.
fn possible() -> bool {
    let root = fs::metadata("/proc/self").is_ok_and(|own| own.uid() == 0);
    let mounts = ["--mount", "mount", "-t", "tmpfs", "-o", DISK, "tmpfs", "/mnt"];
    root && Command::new("unshare").args(mounts).output().is_ok_and(|output| output.status.success())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_is_full_until_postgres_dies_of_it_loses_nothing() {
    if !possible() {
        return left_out("a full disk under Postgres", "it needs root and unshare, to mount a small one");
    }
    let folder = PathBuf::from(format!("/tmp/loopwright-disk-{}", std::process::id()));
    fs::create_dir_all(&folder).expect("folder");
    let log = folder.with_extension("log");
    let output = fs::File::create(&log).expect("log");
    // What it mounts goes with it.
    let child = Command::new("unshare")
        .arg("--mount")
        .arg(std::env::current_exe().expect("this binary"))
        .args(["exhausted::child_with_a_small_disk", "--exact", "--ignored", "--nocapture"])
        .env(FOLDER, &folder)
        .stdin(Stdio::null())
        .stdout(output.try_clone().expect("log"))
        .stderr(output)
        .spawn()
        .expect("child");
    let code = ended(child).await;
    let said = fs::read_to_string(&log).expect("log");
    fs::remove_dir(&folder).expect("nothing is mounted there, and nothing is left");
    fs::remove_file(&log).expect("log");
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("1 passed"), "{said}");
}

/// Writes until there is no space left.
fn fill(path: &Path) {
    let mut file = fs::File::create(path).expect("ballast");
    for block in [vec![0; 1 << 20], vec![0; 1 << 12]] {
        while file.write_all(&block).is_ok() {}
    }
}

fn alive(pid: u32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "started by the other test of this file in a process of its own, which may mount"]
async fn child_with_a_small_disk() {
    let Ok(folder) = std::env::var(FOLDER) else { return };
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", DISK, "tmpfs", &folder]).status().expect("mount");
    assert!(mounted.success());
    let folder = PathBuf::from(folder);
    let settings = Settings { data_dir: Some(folder.join("data")), ..Settings::default() };
    let mut server = embedded::start(settings.clone()).await.expect("server");
    let options: PgConnectOptions = server.url().parse().expect("address");
    let pool = PgPoolOptions::new().max_connections(8).acquire_timeout(WAIT).connect_lazy_with(session(options));
    migrate::run(&pool, MIGRATIONS).await.expect("migrated");
    let bench = Bench::on(pool.clone()).await;
    let gate = Gate::new();
    let calls = behind(&gate, &bench);
    let worker = bench.worker_with(LONG * 6, RUNS).await;
    let bytes = |n: u32| Data::Literal(json!(BYTES[n as usize % 2]));
    let mut runs = Vec::new();
    let mut hashes = Vec::new();
    for n in 0..2 {
        let steps = vec![work("a", &[("bytes", bytes(n))]), work("b", &[("bytes", bytes(n))])];
        let mut definition = definition(&format!("disk{n}"), steps);
        let text = Input { schema: json!({"type": "string"}), required: false, default: Some(json!("")) };
        definition.inputs.insert("text".into(), text);
        hashes.push(bench.deploy(definition).await);
    }
    for n in 0..RUNS {
        runs.push(bench.start_as(hashes[n as usize % 2], json!({}), None).await.run_id);
    }
    gate.arrived(RUNS).await;

    sqlx::query("create table more (x text)").execute(&pool).await.expect("table");
    // Its log has a new segment, with room for what follows: the tables cannot grow, and it goes on without them.
    switch_log(&pool).await.expect("a segment");
    let ballast = folder.join("ballast");
    fill(&ballast);
    let large = json!({ "text": (0..1 << 18).map(|_| fastrand::alphanumeric()).collect::<String>() });
    // Somebody who tries the same, more often than anybody else may.
    let tries = async {
        let large = (0..1 << 18).map(|_| fastrand::alphanumeric()).collect::<String>();
        for _ in 0..TRIES {
            let mut tx = loopwright_engine::transaction::begin(&pool).await.expect("a connection");
            let full = sqlx::query("insert into more values ($1)").bind(&large).execute(&mut *tx).await;
            let full = full.map(drop).expect_err("there is no room");
            assert_eq!(full.as_database_error().and_then(|e| e.code()).as_deref(), Some("53100"), "{full}");
            drop(tx);
            tokio::time::sleep(LONGEST_PAUSE).await;
        }
    };
    let error = passes(sooner("start", bench.client.start(start(hashes[0], large)), tries).await, "start");
    assert_eq!(error.as_database_error().and_then(|e| e.code()).as_deref(), Some("53100"), "{error}");
    assert!(!bench.client.describe(runs[0]).await.expect("it can be read").status.is_closed());
    let failed = "select xact_rollback from pg_stat_database where datname = current_database()";
    let before: i64 = sqlx::query_scalar(failed).fetch_one(&pool).await.expect("count");
    gate.open(RUNS as usize);
    // One may still be of the tries above.
    reaches(&pool, failed, before + 7).await;

    // Its log cannot grow either: it panics, and cannot come up again before there is room.
    let dies = async {
        loop {
            match switch_log(&pool).await {
                Err(error) if error.as_database_error().is_none() => break error,
                Ok(()) | Err(_) => {}
            }
        }
    };
    let error = tokio::time::timeout(PATIENCE, dies).await.expect("its log ends");
    assert!(is_transient(&error), "{error}");
    let gone = async {
        while alive(server.pid()) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, gone).await.expect("it gives up");
    passes(sooner("describe", bench.client.describe(runs[0]), waits(&pool)).await, "describe");

    fs::remove_file(&ballast).expect("room");
    server = embedded::start(settings).await.expect("it comes up again");
    gate.open(RUNS as usize);
    for run in &runs {
        assert_eq!(bench.closed(*run).await.status, RunStatus::Completed);
    }
    nothing_is_half_done(&pool, i64::from(RUNS)).await;
    assert_eq!(calls.load(Ordering::SeqCst), 2 * RUNS, "each step was done once");
    gate.open(2);
    let again = bench.client.start(start(hashes[0], json!({}))).await.expect("start").run_id;
    assert_eq!(bench.closed(again).await.status, RunStatus::Completed);
    worker.drain(GRACE).await;
    bench.audit().await;
    let outcomes = bench.outcomes().await;
    assert_eq!(outcomes.into_iter().collect::<Vec<_>>(), [("Succeeded".to_owned(), i64::from(2 * RUNS + 2))]);
    pool.close().await;
    server.stop();
}

/// Ends the segment of Postgres' log that is written now, and begins the next.
async fn switch_log(pool: &PgPool) -> sqlx::Result<()> {
    sqlx::query("select pg_switch_wal()").execute(pool).await?;
    sqlx::query("select pg_logical_emit_message(true, 'test', 'next')").execute(pool).await.map(drop)
}
