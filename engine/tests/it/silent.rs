//! A Postgres that takes what it is asked and answers nothing, all of it or one shard: whoever asks has an end and a code, what he left
//! ends on the server as well, and the other shards go on.

use crate::{
    bench::{Bench, Gate, PATIENCE, Work, definition, gated, step, waits_for, work},
    faults::{GRACE, LONG, reaches},
    way::Way,
};
use loopwright_engine::{
    Error,
    activity::Registry,
    client::{At, Client, Filter, Fork, Signal, Start, Update, Why},
    definition::Kind,
    embedded::testing::url,
    ids::RunId,
    transaction,
    view::RunStatus,
    worker::{self, WorkerConfig, WorkerHandle},
};
use serde_json::json;
use sqlx::{AssertSqlSafe, Connection, PgConnection, PgPool, postgres::PgConnectOptions};
use std::{sync::Arc, time::Duration};

/// How long these clients wait for an answer, and their pools for a connection.
const WAIT: Duration = Duration::from_secs(1);
/// How long these workers wait for an answer: two seconds for one shard.
const ANSWER_MAX: Duration = Duration::from_secs(12);

async fn pool(options: PgConnectOptions, connections: u32) -> PgPool {
    let pool = transaction::pool(&options).max_connections(connections).acquire_timeout(WAIT);
    // As the server's: an idle connection is not asked whether it is well.
    pool.test_before_acquire(false).connect_with(options).await.expect("pool")
}

fn go() -> Signal {
    Signal { name: "go".into(), dedupe_id: Some("once".into()), ..Signal::default() }
}

async fn asks(bench: &Bench) -> RunId {
    bench.start(definition("asks", vec![step("ask", Kind::Await(Box::new(waits_for("go"))))]), json!({})).await
}

/// It ends, and says that nothing was done.
async fn ends<T>(what: &str, asked: impl Future<Output = Result<T, Error>>) {
    let answer = tokio::time::timeout(PATIENCE, asked).await.expect(what);
    let Err(error) = answer else { panic!("{what}: an answer from nowhere") };
    assert_eq!(error.code(), "database", "{what}: {error}");
    assert!(error.to_string().contains("try again"), "{what}: {error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_a_client_asks_of_a_server_that_says_nothing_has_an_end_and_a_code() {
    const CONNECTIONS: u32 = 24;
    let bench = Bench::new().await;
    let run = asks(&bench).await;
    let hash = bench.client.describe(run).await.expect("run").definition;
    let way = Way::to(&bench.pool).await;
    let pool = pool(way.options(), CONNECTIONS).await;
    // One for each question: it is asked on a connection that stands.
    let mut standing = Vec::new();
    for _ in 0..CONNECTIONS {
        standing.push(pool.acquire().await.expect("connection"));
    }
    drop(standing);
    while pool.num_idle() < CONNECTIONS as usize {
        tokio::task::yield_now().await;
    }
    let client = Client::new(pool, bench.hook.clone()).waiting(WAIT);
    way.falls_silent();
    let start = Start {
        run_id: None,
        definition: hash,
        inputs: json!({}),
        workflow_id: None,
        attributes: json!({}),
        queue: String::new(),
        topic: None,
        admission: Default::default(),
    };
    let fork = || Fork {
        run_id: None,
        at: At::Seq(1),
        inputs: serde_json::Map::new(),
        definition: None,
        attributes: None,
        reason: "try".into(),
    };
    ends("start", client.start(start)).await;
    ends("signal", client.signal(run, go())).await;
    ends("cancel", client.cancel(run, "enough")).await;
    ends("pause", client.pause(run, Why::default())).await;
    ends("terminate", client.terminate(run, "enough")).await;
    ends("update", client.update(run, Update { name: "go".into(), ..Update::default() }, Duration::ZERO)).await;
    ends("describe", client.describe(run)).await;
    ends("history", client.history(run, 0, 10)).await;
    ends("query", client.query(run, "any")).await;
    ends("list", client.list(Filter { limit: 10, ..Filter::default() })).await;
    ends("count", client.count(&Filter::default())).await;
    ends("wait_change", client.wait_change(run, 9, Duration::from_secs(600))).await;
    ends("open_run", client.open_run("any")).await;
    ends("fork", client.fork(run, fork())).await;
    ends("reset", client.reset(run, fork())).await;
    ends("versions", client.versions("asks")).await;
    ends("replay", client.replay(run, None)).await;
    ends("schedules", client.schedules().list(None, 10)).await;
    tokio::time::timeout(PATIENCE, client.wake()).await.expect("wake");
    // Nothing of it was done.
    for sql in ["select count(*) - 1 from runs", "select count(*) from inbox"] {
        let n: i64 = sqlx::query_scalar(sql).fetch_one(&bench.pool).await.expect("count");
        assert_eq!(n, 0, "{sql}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_nobody_answers_is_in_doubt_and_is_asked_for_again_under_its_id() {
    let bench = Bench::new().await;
    let run = asks(&bench).await;
    let way = Way::to(&bench.pool).await;
    let client = Client::new(pool(way.options(), 4).await, bench.hook.clone()).waiting(WAIT);
    let held = way.holds_at("COMMIT");
    let sent = tokio::spawn(async move { client.signal(run, go()).await });
    tokio::time::timeout(PATIENCE, held.arrived.cancelled()).await.expect("it commits");
    way.falls_silent();
    held.goes_on.cancel();
    let doubt = tokio::time::timeout(PATIENCE, sent).await.expect("it ends").expect("task").expect_err("no answer");
    assert_eq!(doubt.code(), "in_doubt");
    assert!(doubt.to_string().contains("same id"), "{doubt}");
    reaches(&bench.pool, "select count(*) from inbox", 1).await;
    assert!(!bench.client.signal(run, go()).await.expect("the same id"), "it was done");
}

/// Sessions of this database that wait for a lock.
const WAITING: &str =
    "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'";

async fn nobody_waits(pool: &PgPool) {
    let gone = async {
        while sqlx::query_scalar::<_, i64>(WAITING).fetch_one(pool).await.expect("count") > 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, gone).await.expect("what was left ends on the server");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_statement_that_was_left_ends_on_the_server_and_its_place_in_the_pool_is_free() {
    let bench = Bench::new().await;
    let run = asks(&bench).await;
    let options = bench.pool.connect_options().as_ref().clone();
    let pool = pool(options, 1).await;
    let client = Client::new(pool.clone(), bench.hook.clone()).waiting(WAIT);
    let mut held = PgConnection::connect(&url(&bench.pool)).await.expect("session");
    sqlx::raw_sql("begin; select from runs for update").execute(&mut held).await.expect("locked");
    ends("cancel", client.cancel(run, "enough")).await;
    // The lock is still held.
    nobody_waits(&bench.pool).await;
    let again = async { while client.describe(run).await.is_err() {} };
    tokio::time::timeout(PATIENCE, again).await.expect("the only connection is not kept");
    held.close().await.expect("free");
    let sent: i64 = sqlx::query_scalar("select count(*) from inbox").fetch_one(&pool).await.expect("count");
    assert_eq!(sent, 0, "nothing was done, then or later");
    assert!(bench.client.signal(run, go()).await.expect("sent"));
}

/// A shard whose runs nobody can change in that way until [`Silent::speaks`]: whoever tries has no answer.
struct Silent(PgConnection);

impl Silent {
    async fn shard(bench: &Bench, shard: i16, when: &str) -> Self {
        let mut held = PgConnection::connect(&url(&bench.pool)).await.expect("session");
        sqlx::query("select pg_advisory_lock(77)").execute(&mut held).await.expect("held");
        for sql in [
            "create function test_silent() returns trigger language plpgsql as $$ begin
               perform pg_advisory_xact_lock_shared(77); return new; end $$"
                .to_owned(),
            format!(
                "create trigger test_silent before update on runs for each row when (new.shard = {shard} and {when}) execute function test_silent()"
            ),
        ] {
            sqlx::query(AssertSqlSafe(sql)).execute(&bench.pool).await.expect("silent");
        }
        Self(held)
    }

    async fn speaks(self) {
        self.0.close().await.expect("session");
    }
}

/// A worker that asks shard by shard; its attempts wait at the gate, if there is one.
async fn impatient(bench: &Bench, gate: Option<&Gate>) -> WorkerHandle {
    let at_once = || Work(Arc::new(|_, input| Box::pin(async { Ok(input) })));
    let work = gate.map_or_else(at_once, Gate::work);
    let mut config = WorkerConfig::new(bench.pool.clone(), Registry::new().with(work));
    (config.hook, config.lease) = (bench.hook.clone(), LONG);
    worker::start_impatient(config, ANSWER_MAX).await.expect("worker")
}

/// Runs of different shards, in their order; with one in the middle whose shard is another's of the same lane, or of none.
async fn runs_of(bench: &Bench, shards: impl Fn(i16, &[i16]) -> bool, many: usize) -> Vec<RunId> {
    let hash = bench.deploy(definition("spread", vec![work("a", &[]), work("b", &[])])).await;
    let mut runs: Vec<RunId> = Vec::new();
    while runs.len() < many {
        let run = RunId::new();
        let known: Vec<i16> = runs.iter().map(RunId::shard).collect();
        if !known.contains(&run.shard()) && shards(run.shard(), &known) {
            runs.push(run);
        }
    }
    runs.sort_by_key(RunId::shard);
    for run in &runs {
        let start = Start {
            run_id: Some(*run),
            definition: hash,
            inputs: json!({}),
            workflow_id: None,
            attributes: json!({}),
            queue: String::new(),
            topic: None,
            admission: Default::default(),
        };
        bench.client.start(start).await.expect("start");
    }
    runs
}

async fn all_but(bench: &Bench, runs: &[RunId], silent: RunId) {
    for run in runs.iter().filter(|run| **run != silent) {
        assert_eq!(bench.closed(*run).await.status, RunStatus::Completed);
    }
    assert!(!bench.client.describe(silent).await.expect("run").status.is_closed(), "its shard says nothing");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_claimed_before_a_shard_fell_silent_is_driven_and_so_is_what_comes_behind_it() {
    let bench = Bench::new().await;
    bench.by_shard().await;
    let runs = runs_of(&bench, |_, _| true, 9).await;
    let silent = runs[4];
    let shard = Silent::shard(&bench, silent.shard(), "new.owner is not null and old.owner is null").await;
    let worker = impatient(&bench, None).await;
    all_but(&bench, &runs, silent).await;
    nobody_waits(&bench.pool).await;
    shard.speaks().await;
    assert_eq!(bench.closed(silent).await.status, RunStatus::Completed);
    worker.drain(GRACE).await;
    bench.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_shard_keeps_nobody_from_taking_over_the_others() {
    let bench = Bench::new().await;
    bench.by_shard().await;
    let runs = runs_of(&bench, |_, _| true, 5).await;
    let (silent, gate) = (runs[2], Gate::new());
    let gone = impatient(&bench, Some(&gate)).await;
    gate.arrived(5).await;
    let shard = Silent::shard(&bench, silent.shard(), "new.owner is null and old.owner is not null").await;
    bench.dies(gone).await;
    let worker = impatient(&bench, None).await;
    all_but(&bench, &runs, silent).await;
    shard.speaks().await;
    assert_eq!(bench.closed(silent).await.status, RunStatus::Completed);
    worker.drain(GRACE).await;
    bench.audit().await;
}

/// Both runs have their transitions committed by one lane.
#[tokio::test(flavor = "multi_thread")]
async fn a_silent_shard_keeps_nobody_from_committing_in_the_same_lane() {
    let bench = Bench::new().await;
    bench.by_shard().await;
    let runs = runs_of(&bench, |shard, known| known.first().is_none_or(|first| shard % 8 == first % 8), 2).await;
    let silent = runs[0];
    let shard = Silent::shard(&bench, silent.shard(), "new.seq > old.seq").await;
    let worker = impatient(&bench, None).await;
    all_but(&bench, &runs, silent).await;
    shard.speaks().await;
    assert_eq!(bench.closed(silent).await.status, RunStatus::Completed);
    worker.drain(GRACE).await;
    bench.audit().await;
}

/// The look for messages stands still for some seconds, as everything does on a machine that is frozen. The next one is not a minute
/// away for that.
#[tokio::test(flavor = "multi_thread")]
async fn a_look_that_took_long_once_is_repeated_soon() {
    let (bench, gate) = gated().await;
    let way = Way::to(&bench.pool).await;
    let held = way.holds_at("r.inbox_n > r.inbox_seen");
    let mut config = WorkerConfig::new(way.pool(4).await, Registry::new().with(gate.work()));
    (config.hook, config.lease) = (bench.hook.clone(), LONG * 6);
    let worker = worker::start(config).await.expect("worker");
    let asks = vec![work("w", &[]), step("ask", Kind::Await(Box::new(waits_for("go"))))];
    let run = bench.start(definition("late", asks), json!({})).await;
    gate.arrived(1).await;
    tokio::time::timeout(PATIENCE, held.arrived.cancelled()).await.expect("it looks for messages");
    // So long that twenty times as long is longer than anybody waits here.
    tokio::time::sleep(PATIENCE / 12).await;
    held.goes_on.cancel();
    let seq = bench.client.describe(run).await.expect("run").seq;
    bench.client.signal(run, go()).await.expect("sent");
    bench.until(run, "hears of it while its attempt runs", |v| v.seq > seq).await;
    gate.open(1);
    assert_eq!(bench.closed(run).await.status, RunStatus::Completed);
    worker.drain(GRACE).await;
    bench.audit().await;
}
