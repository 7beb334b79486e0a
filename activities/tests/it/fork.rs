//! Forks and resets over the real ledger: the shared part is paid once, every hold is settled once, by whoever placed it.

use futures_util::future::BoxFuture;
use loopwright_activities::{
    MIGRATIONS,
    billing::{
        BillingSettings, LedgerHook, MicroCredits, audit,
        ledger::{self, Identity},
    },
    usage::{CallClosed, CallOpened, CallState, PlannedCall, Reserve, Usage, UsageSource},
};
use loopwright_engine::{
    Failure,
    activity::{Activity, Context, Registry},
    archive::Archive,
    client::{At, Client, Deploy, Fork, Start, Why},
    definition::{Bundle, Data, Definition, FORMAT, Kind, RetryPolicy, Step, Timeouts},
    embedded::testing::database,
    ids::RunId,
    signature::Signature,
    view::RunStatus,
    worker::{self, WorkerConfig},
};
use serde_json::{Map, Value, json};
use sqlx::PgPool;
use std::{collections::BTreeMap, sync::Arc, time::Duration};
use tokio::sync::Semaphore;
use uuid::Uuid;

const GRACE: Duration = Duration::from_secs(10);
const PATIENCE: Duration = Duration::from_secs(60);
const MODEL: (&str, &str) = ("rehearsed", "rehearsed/architect");

/// An activity that makes one call, and then waits at a gate if its step says so.
struct Work {
    arrived: Arc<Semaphore>,
    gate: Arc<Semaphore>,
}

impl Activity for Work {
    fn signature(&self) -> Signature {
        Signature {
            name: "work@1".into(),
            summary: "one call".into(),
            input_schema: json!({"type": "object"}),
            output_schema: json!({}),
            run_timeout_ms: 60_000,
            heartbeat_timeout_ms: None,
            metered: true,
            idempotent: true,
            failure_codes: vec![],
        }
    }
    fn reserve(&self, _: &Value, _extras: &Value) -> Value {
        let candidates = vec![(MODEL.0.to_owned(), MODEL.1.to_owned())];
        let call =
            PlannedCall { ceilings: Vec::new(), candidates, count: 1, input_tokens: 1_000, output_tokens: 1_000 };
        serde_json::to_value(Reserve { calls: vec![call] }).expect("json")
    }
    fn run(&self, ctx: Context, input: Value) -> BoxFuture<'static, Result<Value, Failure>> {
        let (arrived, gate) = (self.arrived.clone(), self.gate.clone());
        Box::pin(async move {
            let opened = CallOpened {
                provider: MODEL.0.into(),
                model: MODEL.1.into(),
                purpose: "test".into(),
                request_sha256: "00".into(),
                key_fingerprint: "00".into(),
                key_last4: String::new(),
                own_key_id: None,
                local: false,
                input_tokens_max: 1_000,
                output_tokens_max: 1_000,
                input_umtok_max: None,
                output_umtok_max: None,
            };
            ctx.meter_open("call", &serde_json::to_value(opened).expect("json")).await?;
            let usage =
                Usage { tokens_prompt: 1_000, tokens_output: 1_000, source: UsageSource::Provider, ..Usage::default() };
            let closed = CallClosed {
                state: CallState::Succeeded,
                usage: Some(usage),
                model_served: None,
                provider_request_id: None,
                http_status: Some(200),
                error_class: None,
                finish_reason: None,
                stream_completed: true,
            };
            ctx.meter_close("call", &serde_json::to_value(closed).expect("json"), Some(("call", &json!(1)))).await?;
            if input["waits"] == true {
                arrived.add_permits(1);
                tokio::select! {
                    () = ctx.cancellation().cancelled() => return Err(Failure::cancelled()),
                    permit = gate.acquire() => permit.expect("open").forget(),
                }
            }
            Ok(input)
        })
    }
}

struct Bench {
    pool: PgPool,
    client: Client,
    user: Uuid,
    work: (Arc<Semaphore>, Arc<Semaphore>),
}

fn step(id: &str, waits: bool) -> Step {
    let with = BTreeMap::from([("waits".to_owned(), Data::Literal(json!(waits)))]);
    Step {
        id: id.into(),
        condition: None,
        kind: Kind::Activity { name: "work@1".into(), with },
        retry: RetryPolicy::default(),
        timeouts: Timeouts::default(),
        catch: vec![],
        continue_on_error: false,
    }
}

impl Bench {
    async fn new() -> (Self, worker::WorkerHandle) {
        let pool = database(MIGRATIONS).await;
        let settings = BillingSettings { welcome: MicroCredits::from_credits(100), ..BillingSettings::default() };
        let mut tx = pool.begin().await.expect("tx");
        let (user, _) = ledger::ensure_user(&mut tx, &Identity::Telegram(7), settings.welcome).await.expect("user");
        tx.commit().await.expect("commit");
        let hook = Arc::new(LedgerHook::new(settings));
        let work = (Arc::new(Semaphore::new(0)), Arc::new(Semaphore::new(0)));
        let registry = Registry::new().with(Work { arrived: work.0.clone(), gate: work.1.clone() });
        let mut config = WorkerConfig::new(pool.clone(), registry);
        config.hook = hook.clone();
        let worker = worker::start(config).await.expect("worker");
        (Self { client: Client::new(pool.clone(), hook), pool, user, work }, worker)
    }

    /// `a` ends at once, `b` waits at the gate, `c` follows. Budget: 10 credits a run.
    async fn start(&self) -> RunId {
        let definition = Definition {
            format: FORMAT,
            name: "three".into(),
            inputs: BTreeMap::new(),
            env: BTreeMap::new(),
            timeout_ms: 600_000,
            budget: json!({"credits": 10}),
            concurrency: None,
            executions_max: 100,
            steps: vec![step("a", false), step("b", true), step("c", false)],
            finally: vec![],
            outputs: BTreeMap::new(),
            runs_on: Vec::new(),
            queries: BTreeMap::new(),
            extras: Value::Null,
        };
        let deploy = Deploy { definition, bundle: Bundle::new(), source: String::new(), author: None, message: None };
        let start = Start {
            run_id: None,
            definition: self.client.deploy(deploy).await.expect("deploy").hash,
            inputs: json!({}),
            workflow_id: Some(format!("key:{}", Uuid::new_v4())),
            attributes: json!({"user_id": self.user.to_string()}),
            queue: String::new(),
            topic: None,
            admission: Default::default(),
        };
        self.client.start(start).await.expect("start").run_id
    }

    async fn arrived(&self) {
        tokio::time::timeout(PATIENCE, self.work.0.acquire()).await.expect("arrives").expect("open").forget();
    }

    fn open(&self, n: usize) {
        self.work.1.add_permits(n);
    }

    async fn closed(&self, run: RunId) -> RunStatus {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        loop {
            let view = self.client.describe(run).await.expect("run");
            if view.status.is_closed() {
                return view.status;
            }
            assert!(tokio::time::Instant::now() < deadline, "{view:#?}");
            self.client.wait_change(run, view.seq, Duration::from_millis(200)).await.expect("run");
        }
    }

    /// Charged micro-credits of a run.
    async fn charged(&self, run: RunId) -> i64 {
        sqlx::query_scalar(
            "select coalesce(-sum(t.amount_ucr), 0)::bigint from credit_transactions t
             join activity_attempts a on a.id = t.attempt_id where a.run_id = $1",
        )
        .bind(run.0)
        .fetch_one(&self.pool)
        .await
        .expect("sum")
    }

    async fn in_order(&self) {
        let mut conn = self.pool.acquire().await.expect("conn");
        assert_eq!(audit::run(&mut conn).await.expect("audit"), []);
        let twice: i64 = sqlx::query_scalar(
            "select count(*) from (select from credit_transactions where kind = 'capture' group by hold_txn_id having count(*) > 1) t",
        )
        .fetch_one(&mut *conn)
        .await
        .expect("count");
        assert_eq!(twice, 0);
    }
}

fn after(seq: u64) -> Fork {
    Fork {
        run_id: None,
        at: At::Seq(seq),
        inputs: Map::new(),
        definition: None,
        attributes: None,
        reason: "try".into(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fork_pays_nothing_for_what_it_shares_and_settles_nothing_of_its_parent_s() {
    let (bench, worker) = Bench::new().await;
    let run = bench.start().await;
    bench.arrived().await;
    // The parent holds credits for `b`, which runs.
    let held = || async {
        sqlx::query_scalar::<_, i64>("select credit_held_ucr from users").fetch_one(&bench.pool).await.expect("held")
    };
    let before = held().await;
    let fork = bench.client.fork(run, after(2)).await.expect("fork").run_id;
    bench.arrived().await;
    assert_eq!(held().await, 2 * before, "each holds for its own attempt");
    bench.in_order().await;
    bench.open(2);
    assert_eq!((bench.closed(run).await, bench.closed(fork).await), (RunStatus::Completed, RunStatus::Completed));
    let (whole, part) = (bench.charged(run).await, bench.charged(fork).await);
    assert!(whole > 0 && part * 3 == whole * 2, "three steps cost {whole}, two of them {part}");
    assert_eq!(held().await, 0);
    // An export that comes back into another ledger moves nothing there.
    let mut export = bench.client.export(fork).await.expect("export");
    let mut text = String::new();
    while let Some(line) = export.next().await.expect("line") {
        text.push_str(&line);
    }
    let (other, elsewhere) = Bench::new().await;
    other.client.import(Archive::read(text.as_bytes()).expect("valid")).await.expect("import");
    let rows: i64 = sqlx::query_scalar("select (select count(*) from activity_attempts) + (select count(*) from credit_transactions where kind <> 'grant')")
        .fetch_one(&other.pool)
        .await
        .expect("count");
    assert_eq!(rows, 0);
    other.in_order().await;
    elsewhere.drain(GRACE).await;
    worker.drain(GRACE).await;
    bench.in_order().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reset_settles_the_old_run_s_attempt_once_and_the_new_run_starts_with_its_whole_budget() {
    let (bench, worker) = Bench::new().await;
    let run = bench.start().await;
    bench.arrived().await;
    // A reset of the reset, again and again: each run ends and settles its own.
    let (mut newest, mut runs) = (run, vec![run]);
    for _ in 0..3 {
        let reset = bench.client.reset(newest, after(2)).await.expect("reset");
        assert!(reset.terminated);
        bench.arrived().await;
        bench.in_order().await;
        newest = reset.run_id;
        runs.push(newest);
    }
    // The attempts of the runs that were reset wait there as well; what they come to counts for nothing.
    bench.open(4);
    assert_eq!(bench.closed(newest).await, RunStatus::Completed);
    let mut charged = Vec::new();
    for run in &runs {
        charged.push(bench.charged(*run).await);
    }
    // The first: a and b. Those between: their b. The last: b and c.
    assert!(charged[0] == charged[3] && charged[1] == charged[2] && charged[1] * 2 == charged[0], "{charged:?}");
    let running: i64 = sqlx::query_scalar("select count(*) from activity_attempts where state = 'running'")
        .fetch_one(&bench.pool)
        .await
        .expect("count");
    assert_eq!(running, 0);
    worker.drain(GRACE).await;
    bench.in_order().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_run_s_attempt_is_charged_and_its_hold_given_back() {
    let (bench, worker) = Bench::new().await;
    let run = bench.start().await;
    bench.arrived().await;
    bench.client.pause(run, Why::default()).await.expect("pause");
    while bench.client.describe(run).await.expect("run").status != RunStatus::Paused {
        tokio::task::yield_now().await;
    }
    bench.open(1);
    while !bench.client.describe(run).await.expect("run").live.is_empty() {
        tokio::task::yield_now().await;
    }
    let held: i64 = sqlx::query_scalar("select credit_held_ucr from users").fetch_one(&bench.pool).await.expect("held");
    assert_eq!(held, 0, "a paused run holds nothing");
    bench.in_order().await;
    bench.client.resume(run, Why::default()).await.expect("resume");
    assert_eq!(bench.closed(run).await, RunStatus::Completed);
    worker.drain(GRACE).await;
    bench.in_order().await;
}
