//! A database, a worker and one obedient activity, `work@1`, whose input says what it does.

use futures_util::future::BoxFuture;
use loopwright_engine::{
    Failure, MIGRATIONS,
    activity::{Activity, Context, Registry},
    client::{Client, Decision, Deploy, Signal, Start, Started},
    definition::Bundle,
    embedded::testing::database,
    hook::NoHook,
    ids::{DefinitionHash, RunId},
    signature::Signature,
    view::{RunStatus, RunView},
    worker::{self, WorkerConfig, WorkerHandle},
};
use loopwright_workflows::{Severity, compile, render};
use serde_json::{Value, json};
use sqlx::PgPool;
use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::sync::Semaphore;

/// Nothing in these tests takes that long; a test that waits longer has found a bug.
pub const PATIENCE: Duration = Duration::from_secs(60);
const GRACE: Duration = Duration::from_secs(10);

/// One attempt of `work@1`.
#[derive(Clone, Debug)]
pub struct Call {
    pub path: String,
    pub input: Value,
}

/// Attempts that stand at a gate, and those that may pass.
type Gate = (Arc<Semaphore>, Arc<Semaphore>);

/// What the test and the activities share.
#[derive(Default)]
pub struct World {
    pub calls: Mutex<Vec<Call>>,
    /// Paths of attempts that were told to stop.
    pub cancelled: Mutex<Vec<String>>,
    gates: Mutex<HashMap<String, Gate>>,
}

impl World {
    fn gate(&self, name: &str) -> Gate {
        let fresh = || (Arc::new(Semaphore::new(0)), Arc::new(Semaphore::new(0)));
        self.gates.lock().expect("lock").entry(name.to_owned()).or_insert_with(fresh).clone()
    }
    /// Waits until `n` more attempts stand at the gate.
    pub async fn arrived(&self, name: &str, n: u32) {
        let (here, _) = self.gate(name);
        tokio::time::timeout(PATIENCE, here.acquire_many(n)).await.expect("attempts arrive").expect("open").forget();
    }
    /// Lets `n` attempts through.
    pub fn open(&self, name: &str, n: usize) {
        self.gate(name).1.add_permits(n);
    }
    pub fn paths(&self) -> Vec<String> {
        self.calls.lock().expect("lock").iter().map(|c| c.path.clone()).collect()
    }
    pub fn cancelled(&self) -> Vec<String> {
        let mut paths = self.cancelled.lock().expect("lock").clone();
        paths.sort();
        paths
    }

    /// Does what the input says, in this order: `fails` (so many attempts fail, with `code`), `fail` (for good), `hang`,
    /// `beats` (so many signs of life, 20 ms apart), `gate` (waits there, or for its cancellation), then yields `value`.
    async fn work(&self, ctx: Context, input: Value) -> Result<Value, Failure> {
        let info = ctx.info();
        let call = Call { path: info.path.clone(), input: input.clone() };
        self.calls.lock().expect("lock").push(call);
        let code = input["code"].as_str().unwrap_or("transient.test").to_owned();
        if u64::from(info.attempt) <= input["fails"].as_u64().unwrap_or(0) {
            return Err(Failure::retryable(code, "not yet"));
        }
        if let Some(code) = input["fail"].as_str() {
            return Err(Failure::permanent(code, "for good").with_detail(json!({"why": "the test"})));
        }
        if input["hang"] == json!(true) {
            std::future::pending::<()>().await;
        }
        for _ in 0..input["beats"].as_u64().unwrap_or(0) {
            ctx.heartbeat(Value::Null);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        if let Some(name) = input["gate"].as_str() {
            let (here, through) = self.gate(name);
            here.add_permits(1);
            tokio::select! {
                permit = through.acquire() => permit.expect("open").forget(),
                () = ctx.cancellation().cancelled() => {
                    self.cancelled.lock().expect("lock").push(info.path.clone());
                    return Err(Failure::cancelled());
                }
            }
        }
        Ok(input["value"].clone())
    }
}

type Script = Arc<dyn Fn(Context, Value) -> BoxFuture<'static, Result<Value, Failure>> + Send + Sync>;

/// An activity of any name.
pub struct Named {
    name: String,
    heartbeat_ms: Option<u64>,
    script: Script,
}

impl Named {
    pub fn new<F, Fut>(name: &str, script: F) -> Self
    where
        F: Fn(Context, Value) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<Value, Failure>> + Send + 'static,
    {
        let script: Script = Arc::new(move |ctx, input| Box::pin(script(ctx, input)));
        Self { name: name.into(), heartbeat_ms: None, script }
    }
}

impl Activity for Named {
    fn signature(&self) -> Signature {
        Signature {
            name: self.name.clone(),
            summary: "what the test says".into(),
            input_schema: json!({"type": "object"}),
            output_schema: json!({}),
            run_timeout_ms: 60_000,
            heartbeat_timeout_ms: self.heartbeat_ms,
            metered: false,
            idempotent: true,
            failure_codes: vec![],
        }
    }
    fn run(&self, ctx: Context, input: Value) -> BoxFuture<'static, Result<Value, Failure>> {
        (self.script)(ctx, input)
    }
}

pub struct Bench {
    pub pool: PgPool,
    pub client: Client,
    pub world: Arc<World>,
    known: Registry,
    worker: WorkerHandle,
}

impl Bench {
    /// A worker that offers `work@1` and `beat@1`, which has a heartbeat; `absent@1` is known and offered by nobody.
    pub async fn new() -> Self {
        let world = Arc::new(World::default());
        let work = |name: &str, heartbeat_ms| {
            let world = world.clone();
            let script = move |ctx: Context, input: Value| {
                let world = world.clone();
                async move { world.work(ctx, input).await }
            };
            Named { heartbeat_ms, ..Named::new(name, script) }
        };
        let offered = Registry::new().with(work("work@1", None)).with(work("beat@1", Some(60_000)));
        let known = offered.clone().with(work("absent@1", None));
        Self::with(world.clone(), offered, known).await
    }

    /// One more worker, with labels, whose `work@1` is in a world of its own.
    pub async fn another(&self, world: &Arc<World>, labels: &[&str]) -> WorkerHandle {
        let world = world.clone();
        let script = move |ctx: Context, input: Value| {
            let world = world.clone();
            async move { world.work(ctx, input).await }
        };
        let mut config = WorkerConfig::new(self.pool.clone(), Registry::new().with(Named::new("work@1", script)));
        config.labels = labels.iter().map(|label| (*label).to_owned()).collect();
        worker::start(config).await.expect("worker")
    }

    pub async fn with(world: Arc<World>, offered: Registry, known: Registry) -> Self {
        let pool = database(MIGRATIONS).await;
        let client = Client::new(pool.clone(), Arc::new(NoHook));
        let mut config = WorkerConfig::new(pool.clone(), offered);
        config.lease = Duration::from_secs(5);
        let worker = worker::start(config).await.expect("worker");
        Self { pool, client, world, known, worker }
    }

    /// Compiles and deploys; a finding other than information fails the test.
    pub async fn deploy(&self, source: &str) -> DefinitionHash {
        let (compiled, found) = compile(source, "test.yaml", &Bundle::new(), &self.known.catalog());
        let serious: Vec<_> = found.into_iter().filter(|d| d.severity != Severity::Info).collect();
        assert!(serious.is_empty(), "{}", render(&serious, source));
        let compiled = compiled.expect("no finding");
        let deploy = Deploy {
            definition: compiled.definition,
            bundle: compiled.bundle,
            source: source.to_owned(),
            author: None,
            message: None,
        };
        self.client.deploy(deploy).await.expect("deploy").hash
    }

    pub fn request(definition: DefinitionHash, inputs: Value) -> Start {
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

    pub async fn start_hash(&self, definition: DefinitionHash, inputs: Value) -> Started {
        self.client.start(Self::request(definition, inputs)).await.expect("start")
    }

    /// Starts a run of a document without its head.
    pub async fn start(&self, body: &str, inputs: Value) -> RunId {
        let hash = self.deploy(&document("t", body)).await;
        self.start_hash(hash, inputs).await.run_id
    }

    pub async fn until(&self, run: RunId, what: &str, wanted: impl Fn(&RunView) -> bool) -> RunView {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        let mut seq = 0;
        loop {
            let view = self.client.describe(run).await.expect("run");
            if wanted(&view) {
                return view;
            }
            assert!(tokio::time::Instant::now() < deadline, "{what}: still {view:#?}");
            seq = seq.max(view.seq);
            self.client.wait_change(run, seq, Duration::from_millis(100)).await.expect("run");
        }
    }

    pub async fn closed(&self, run: RunId) -> RunView {
        self.until(run, "closed", |v| v.status.is_closed()).await
    }

    /// Waits until the run waits for somebody or something, and nothing of it runs.
    pub async fn waits(&self, run: RunId) -> RunView {
        self.until(run, "waits", |v| !v.waiting.is_empty() && v.live.is_empty()).await
    }

    /// The outputs of a run that must complete.
    pub async fn completes(&self, body: &str, inputs: Value) -> Value {
        let run = self.start(body, inputs).await;
        self.output(run).await
    }

    pub async fn output(&self, run: RunId) -> Value {
        let view = self.closed(run).await;
        assert_eq!(view.status, RunStatus::Completed, "{:?}", view.failure);
        view.output.expect("outputs")
    }

    /// The failure of a run that must fail.
    pub async fn fails(&self, body: &str, inputs: Value) -> Failure {
        let run = self.start(body, inputs).await;
        self.failure(run).await
    }

    pub async fn failure(&self, run: RunId) -> Failure {
        let view = self.closed(run).await;
        assert_eq!(view.status, RunStatus::Failed, "{:?}", view.output);
        view.failure.expect("failure")
    }

    pub async fn signal(&self, run: RunId, name: &str, payload: Value) -> bool {
        let signal = Signal { name: name.into(), payload, dedupe_id: None, sender: Some("user:1".into()) };
        self.client.signal(run, signal).await.expect("sent")
    }

    pub async fn approve(&self, run: RunId, step: &str, decision: Decision, comment: &str, sender: &str) {
        let (comment, sender) = (Some(comment.to_owned()), Some(sender.to_owned()));
        assert!(self.client.approve(run, step, decision, comment, None, sender).await.expect("sent"));
    }

    /// Every event of a run, in order, as JSON.
    pub async fn events(&self, run: RunId) -> Vec<Value> {
        sqlx::query_scalar(
            "select e from history h, jsonb_array_elements(h.events) with ordinality as x(e, n) where run_id = $1 order by seq, n",
        )
        .bind(run.0)
        .fetch_all(&self.pool)
        .await
        .expect("events")
    }

    /// Ends the worker and checks that every attempt that was started has been closed.
    pub async fn done(self) {
        self.worker.drain(GRACE).await;
        let open: i64 = sqlx::query_scalar(
            "select count(*) from (
               select count(*) filter (where e->>'type' = 'attempt_started') as started,
                      count(*) filter (where e->>'type' = 'attempt_ended') as ended
               from history h join runs r using (shard, run_id), jsonb_array_elements(h.events) e
               where r.closed_at is not null and e->>'type' in ('attempt_started', 'attempt_ended')
               group by e->>'attempt_id') a where started <> 1 or ended <> 1",
        )
        .fetch_one(&self.pool)
        .await
        .expect("audit");
        assert_eq!(open, 0, "attempts that were not closed exactly once");
    }
}

/// A document of this name.
pub fn document(name: &str, body: &str) -> String {
    format!("dsl: 1\nname: {name}\n{body}")
}
