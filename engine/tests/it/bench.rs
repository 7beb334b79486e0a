//! What the tests share: an activity whose behavior a test scripts, a hook that keeps accounts, a started worker.

use futures_util::future::BoxFuture;
use loopwright_engine::{
    Failure, MIGRATIONS,
    activity::{Activity, Context, Registry},
    client::{Client, Deploy, Start, Started},
    definition::{Await, Bundle, Data, Definition, Expr, FORMAT, Kind, OnTimeout, RetryPolicy, Step, Timeouts},
    embedded::testing::database,
    hook::{HookError, Reading, Refusal, Transition, TransitionHook, Verdict},
    ids::RunId,
    signature::Signature,
    view::RunView,
    worker::{self, WorkerConfig, WorkerHandle},
};
use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, PgConnection, PgPool};
use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use tokio::sync::Semaphore;

/// Nothing in these tests takes that long; a test that waits longer has found a bug.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// Lease of a worker that is not to lose it, however busy the machine is. Who is to die, dies by [`Bench::dies`].
const LEASE: Duration = Duration::from_secs(10);

type Script = Arc<dyn Fn(Context, Value) -> BoxFuture<'static, Result<Value, Failure>> + Send + Sync>;

/// An activity `work@1` that does what the test says.
pub struct Work(pub Script);

impl Activity for Work {
    fn signature(&self) -> Signature {
        Signature {
            name: "work@1".into(),
            summary: "what the test says".into(),
            input_schema: json!({"type": "object"}),
            output_schema: json!({}),
            run_timeout_ms: 60_000,
            heartbeat_timeout_ms: None,
            metered: true,
            idempotent: true,
            failure_codes: vec![],
        }
    }
    fn run(&self, ctx: Context, input: Value) -> BoxFuture<'static, Result<Value, Failure>> {
        (self.0)(ctx, input)
    }
    fn reserve(&self, input: &Value, _extras: &Value) -> Value {
        input.clone()
    }
}

/// A hook that writes what it sees into a table, in the engine's transaction.
#[derive(Default)]
pub struct Accounts {
    pub refuse: AtomicBool,
    /// It breaks an invariant of its own whenever something starts.
    pub broken: AtomicBool,
}

impl TransitionHook for Accounts {
    fn apply<'a>(
        &'a self,
        conn: &'a mut PgConnection,
        transitions: &'a [Transition],
    ) -> BoxFuture<'a, Result<Vec<Refusal>, HookError>> {
        Box::pin(async move {
            let mut refusals = Vec::new();
            for t in transitions {
                for end in &t.ended {
                    sqlx::query("insert into test_ends (attempt_id, outcome) values ($1, $2)")
                        .bind(end.attempt.attempt_id.0)
                        .bind(format!("{:?}", end.outcome))
                        .execute(&mut *conn)
                        .await?;
                }
                if !t.started.is_empty() && self.broken.load(Ordering::SeqCst) {
                    return Err(HookError::Invariant("the hook is broken".into()));
                }
                if !t.started.is_empty() && self.refuse.load(Ordering::SeqCst) {
                    refusals.push(Refusal { ord: t.ord, reason: "credits".into(), message: "none left".into() });
                    continue;
                }
                for start in &t.started {
                    sqlx::query("insert into test_starts (attempt_id, run_id) values ($1, $2)")
                        .bind(start.attempt.attempt_id.0)
                        .bind(start.attempt.run_id.0)
                        .execute(&mut *conn)
                        .await?;
                }
            }
            Ok(refusals)
        })
    }
    fn abandon<'a>(&'a self, conn: &'a mut PgConnection, run: RunId) -> BoxFuture<'a, Result<(), HookError>> {
        Box::pin(async move {
            sqlx::query(
                "insert into test_ends select attempt_id, 'Abandoned' from test_starts s
                 where s.run_id = $1 and not exists (select from test_ends e where e.attempt_id = s.attempt_id)",
            )
            .bind(run.0)
            .execute(conn)
            .await?;
            Ok(())
        })
    }
    fn meter<'a>(
        &'a self,
        conn: &'a mut PgConnection,
        attempt: &'a loopwright_engine::hook::AttemptRef,
        reading: Reading<'a>,
    ) -> BoxFuture<'a, Result<Verdict, HookError>> {
        Box::pin(async move {
            sqlx::query("insert into test_readings (attempt_id, key, phase, current) values ($1, $2, $3, $4)")
                .bind(attempt.attempt_id.0)
                .bind(reading.key)
                .bind(format!("{:?}", reading.phase))
                .bind(reading.current)
                .execute(&mut *conn)
                .await?;
            Ok(Verdict::Accepted)
        })
    }
}

/// What must hold when everything is quiet: a name, and how many break it. Histories without gaps, every started attempt ended once, no
/// owner left.
pub const RULES: &[(&str, &str)] = &[
    (
        "gap in a history",
        "select count(*) from runs r where r.seq - coalesce(r.forked_seq, 0) <> (select count(*) from history h where h.run_id = r.run_id)
            or r.seq <> (select coalesce(max(seq), 0) from history h where h.run_id = r.run_id)
            or (select min(seq) from history h where h.run_id = r.run_id) <> coalesce(r.forked_seq, 0) + 1",
    ),
    (
        "attempt started and not ended, or the reverse",
        "select count(*) from test_starts s full join test_ends e using (attempt_id) where s.attempt_id is null or e.attempt_id is null",
    ),
    (
        "attempt that a history starts and does not end exactly once",
        "select count(*) from (
           select count(*) filter (where e->>'type' = 'attempt_started') as started,
                  count(*) filter (where e->>'type' = 'attempt_ended') as ended
           from history h join runs r using (shard, run_id), jsonb_array_elements(h.events) e
           where r.closed_at is not null and e->>'type' in ('attempt_started', 'attempt_ended')
           group by e->>'attempt_id') a where started <> 1 or ended <> 1",
    ),
    (
        "business key of a closed run",
        "select count(*) from workflow_ids w join runs r using (shard, run_id) where r.closed_at is not null",
    ),
    (
        "closed run with an owner or a place in the queue",
        "select count(*) from runs r where closed_at is not null
            and (owner is not null or exists (select from ready q where q.run_id = r.run_id))",
    ),
    (
        "open run that nobody owns and nobody may claim",
        "select count(*) from runs r where closed_at is null and owner is null and imported_at is null
            and not exists (select from ready q where q.run_id = r.run_id)
            and not exists (select from admissions a where a.run_id = r.run_id and a.place is null and not r.admitted)",
    ),
    (
        "place of a closed run, or a run that is held back and waits for nothing",
        "select count(*) from runs r left join admissions a using (shard, run_id)
         where (r.closed_at is not null and a.run_id is not null)
            or (r.closed_at is null and not r.admitted and (a.run_id is null or a.place is not null))",
    ),
    (
        "continued run without one run in its place, or the reverse",
        "select count(*) from runs r
         where r.imported_at is null and (r.status = 'continued') <> (r.continued_as is not null)
            or r.continued_as is not null and r.imported_at is null and not exists
                (select from runs n where n.run_id = r.continued_as and n.continued_from = r.run_id
                   and n.first_run_id = coalesce(r.first_run_id, r.run_id))",
    ),
    (
        "two open runs of one chain",
        "select count(*) from (select 1 from runs where closed_at is null and imported_at is null
           group by coalesce(first_run_id, run_id) having count(*) > 1) c",
    ),
    (
        "group with more holders than its largest limit",
        "select count(*) from (select group_name from admissions where place is not null group by 1 having count(*) > max(places)) g",
    ),
];

/// The rules that are broken, and how often.
pub async fn broken<'a>(
    conn: &mut PgConnection,
    rules: impl IntoIterator<Item = (&'a str, &str)>,
) -> Vec<(&'a str, i64)> {
    let mut found = Vec::new();
    for (rule, sql) in rules {
        let n: i64 = sqlx::query_scalar(AssertSqlSafe(sql)).fetch_one(&mut *conn).await.expect("audit");
        if n > 0 {
            found.push((rule, n));
        }
    }
    found
}

/// A database, a client, a hook and a scripted activity.
pub struct Bench {
    pub pool: PgPool,
    pub client: Client,
    pub hook: Arc<Accounts>,
    script: Mutex<Script>,
}

impl Bench {
    pub async fn new() -> Self {
        Self::on(database(MIGRATIONS).await).await
    }

    /// On a migrated database that nobody has used yet.
    pub async fn on(pool: PgPool) -> Self {
        let bench = Self::over(pool);
        let pool = &bench.pool;
        for table in [
            "create table test_starts (attempt_id uuid primary key, run_id uuid)",
            "create table test_ends (attempt_id uuid primary key, outcome text)",
            "create table test_readings (attempt_id uuid, key text, phase text, current bool)",
        ] {
            sqlx::query(table).execute(pool).await.expect("table");
        }
        if std::env::var("LOOPWRIGHT_SHARD_BATCHES").is_ok_and(|all| all == "on") {
            bench.by_shard().await;
        }
        bench
    }

    /// Workers that start from now on say what concerns many runs shard by shard, as on Citus.
    pub async fn by_shard(&self) {
        let sql = format!(
            "alter database {} set loopwright.shard_batches = 'on'",
            self.pool.connect_options().get_database().expect("database")
        );
        sqlx::query(AssertSqlSafe(sql)).execute(&self.pool).await.expect("setting");
    }

    /// Over a database that another process has prepared.
    pub fn over(pool: PgPool) -> Self {
        let hook = Arc::new(Accounts::default());
        let client = Client::new(pool.clone(), hook.clone());
        Self { pool, client, hook, script: Mutex::new(Arc::new(|_, input| Box::pin(async move { Ok(input) }))) }
    }

    /// What `work@1` does in workers started from now on.
    pub fn script<F, Fut>(&self, f: F)
    where
        F: Fn(Context, Value) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<Value, Failure>> + Send + 'static,
    {
        *self.script.lock().expect("lock") = Arc::new(move |ctx, input| Box::pin(f(ctx, input)));
    }

    /// A gate at which every attempt of workers that are started from now on waits, whatever it is told; its result is its input.
    pub fn gate(&self) -> Gate {
        let gate = Gate::new();
        *self.script.lock().expect("lock") = gate.work().0;
        gate
    }

    pub async fn worker(&self) -> WorkerHandle {
        self.worker_with(LEASE, 32).await
    }

    /// A worker dies as `kill -9` does, and its lease is over.
    pub async fn dies(&self, worker: WorkerHandle) {
        let id = worker.id();
        worker.crash();
        sqlx::query("update workers set heartbeat_at = heartbeat_at - interval '1 day' where id = $1")
            .bind(id.0)
            .execute(&self.pool)
            .await
            .expect("its lease is over");
    }

    pub async fn worker_with(&self, lease: Duration, slots: u32) -> WorkerHandle {
        let script = self.script.lock().expect("lock").clone();
        let mut config = WorkerConfig::new(self.pool.clone(), Registry::new().with(Work(script)));
        config.hook = self.hook.clone();
        (config.lease, config.slots) = (lease, slots);
        worker::start(config).await.expect("worker")
    }

    /// A worker that has labels.
    pub async fn worker_having(&self, lease: Duration, labels: &[&str]) -> WorkerHandle {
        let script = self.script.lock().expect("lock").clone();
        let mut config = WorkerConfig::new(self.pool.clone(), Registry::new().with(Work(script)));
        config.hook = self.hook.clone();
        (config.lease, config.labels) = (lease, labels.iter().map(|l| (*l).to_owned()).collect());
        worker::start(config).await.expect("worker")
    }

    pub async fn deploy(&self, definition: Definition) -> loopwright_engine::ids::DefinitionHash {
        let deploy = Deploy { definition, bundle: Bundle::new(), source: String::new(), author: None, message: None };
        self.client.deploy(deploy).await.expect("deploy").hash
    }

    pub async fn start(&self, definition: Definition, inputs: Value) -> RunId {
        let definition = self.deploy(definition).await;
        self.start_as(definition, inputs, None).await.run_id
    }

    pub async fn start_as(
        &self,
        definition: loopwright_engine::ids::DefinitionHash,
        inputs: Value,
        key: Option<&str>,
    ) -> Started {
        let start = Start {
            run_id: None,
            definition,
            inputs,
            workflow_id: key.map(str::to_owned),
            attributes: json!({"user_id": "u1"}),
            queue: String::new(),
            topic: None,
            admission: Default::default(),
        };
        self.client.start(start).await.expect("start")
    }

    /// Waits until the run looks as wanted.
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
            self.client.wait_change(run, seq, Duration::from_millis(200)).await.expect("run");
        }
    }

    pub async fn closed(&self, run: RunId) -> RunView {
        self.until(run, "closed", |v| v.status.is_closed()).await
    }

    /// That none of the [`RULES`] is broken.
    pub async fn audit(&self) {
        let mut conn = self.pool.acquire().await.expect("connection");
        assert_eq!(broken(&mut conn, RULES.iter().copied()).await, []);
    }

    pub async fn outcomes(&self) -> BTreeMap<String, i64> {
        sqlx::query_as::<_, (String, i64)>("select outcome, count(*) from test_ends group by 1")
            .fetch_all(&self.pool)
            .await
            .expect("outcomes")
            .into_iter()
            .collect()
    }
}

pub fn e(text: &str) -> Expr {
    Expr(text.to_owned())
}

pub fn step(id: &str, kind: Kind) -> Step {
    Step {
        id: id.into(),
        condition: None,
        kind,
        retry: RetryPolicy { attempts: 3, delay_ms: 10, jitter: 0.0, ..RetryPolicy::default() },
        timeouts: Timeouts::default(),
        catch: vec![],
        continue_on_error: false,
    }
}

pub fn work(id: &str, with: &[(&str, Data)]) -> Step {
    let with = with.iter().map(|(k, d)| ((*k).to_owned(), d.clone())).collect();
    step(id, Kind::Activity { name: "work@1".into(), with })
}

pub fn definition(name: &str, steps: Vec<Step>) -> Definition {
    Definition {
        format: FORMAT,
        name: name.into(),
        inputs: BTreeMap::new(),
        env: BTreeMap::new(),
        timeout_ms: 3_600_000,
        budget: Value::Null,
        concurrency: None,
        executions_max: 10_000,
        steps,
        finally: vec![],
        outputs: BTreeMap::new(),
        runs_on: Vec::new(),
        queries: BTreeMap::new(),
        extras: Value::Null,
    }
}

/// Waits an hour for a signal of any form, then fails.
pub fn waits_for(signal: &str) -> Await {
    Await {
        signal: signal.into(),
        timeout_ms: 3_600_000,
        form: None,
        show: None,
        to: vec![],
        filter: None,
        remind_ms: vec![],
        on_timeout: OnTimeout::Fail,
        default: None,
        approval: None,
        reply: None,
    }
}

/// A gate that attempts wait at until the test opens it.
#[derive(Clone)]
pub struct Gate(Arc<Semaphore>, Arc<Semaphore>);

impl Gate {
    pub fn new() -> Self {
        Self(Arc::new(Semaphore::new(0)), Arc::new(Semaphore::new(0)))
    }
    /// Called by the attempt: says that it is there, waits to be let through.
    pub async fn pass(&self) {
        self.0.add_permits(1);
        self.1.acquire().await.expect("open").forget();
    }
    /// An activity whose attempts wait here, whatever they are told, and whose result is its input.
    pub fn work(&self) -> Work {
        let gate = self.clone();
        Work(Arc::new(move |_, input| {
            let gate = gate.clone();
            Box::pin(async move {
                gate.pass().await;
                Ok(input)
            })
        }))
    }
    /// Waits until `n` attempts have arrived.
    pub async fn arrived(&self, n: u32) {
        tokio::time::timeout(PATIENCE, self.0.acquire_many(n)).await.expect("attempts arrive").expect("open").forget();
    }
    pub fn open(&self, n: usize) {
        self.1.add_permits(n);
    }
}

/// A bench in which steps called `w` wait at the gate until they are let through or stopped.
pub async fn gated() -> (Bench, Gate) {
    let bench = Bench::new().await;
    let gate = Gate::new();
    {
        let gate = gate.clone();
        bench.script(move |ctx, _| {
            let gate = gate.clone();
            async move {
                if ctx.info().path.rsplit('/').next() == Some("w") {
                    tokio::select! {
                        () = gate.pass() => {}
                        () = ctx.cancellation().cancelled() => return Err(Failure::cancelled()),
                    }
                }
                Ok(json!(1))
            }
        });
    }
    (bench, gate)
}

/// Waits until somebody waits for what this session has locked.
pub async fn is_waited_for(pool: &PgPool, session: &mut PgConnection) {
    let pid: i32 = sqlx::query_scalar("select pg_backend_pid()").fetch_one(session).await.expect("pid");
    let waits = async {
        let sql = "select exists (select from pg_stat_activity where $1 = any(pg_blocking_pids(pid)))";
        while !sqlx::query_scalar::<_, bool>(sql).bind(pid).fetch_one(pool).await.expect("asked") {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, waits).await.expect("somebody waits");
}
