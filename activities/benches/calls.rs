//! `cargo bench -p loopwright-activities`: many runs that call models at the same time, against a provider that fails now and
//! then. How long a call takes beyond the provider's own time, beside what its two commits take alone; and whether all the
//! money adds up.
//!
//! Arguments after `--`: `--runs N` (200), `--calls N` a run (50), `--think MS`, the provider's mean time for an answer (2000).
//! A Postgres with fsync of its own is brought up and removed. Everything stays on loopback.

use futures_util::future::BoxFuture;
use loopwright_activities::{
    MIGRATIONS,
    billing::{
        BillingSettings, LedgerHook, MicroCredits, audit,
        ledger::{self, Identity},
    },
    orchestrator::{Message, Orchestrator, Pace, Request, Role, Routing},
    provider::{Call, Completion, KeyIdentity, Provider, ProviderError, Settings},
    testing::{Dialect, Endpoint, FakeProvider, Fault, Reply, When},
};
use loopwright_engine::{
    Failure,
    activity::{Activity, Context, Registry},
    client::{Client, Deploy, Start},
    definition::{Bundle, Data, Definition, FORMAT, Kind, RetryPolicy, Step, Timeouts},
    embedded,
    ids::{DefinitionHash, RunId},
    migrate,
    signature::Signature,
    worker::{self, WorkerConfig},
};
use serde_json::{Value, json};
use sqlx::{
    ConnectOptions, Connection, PgPool,
    postgres::{PgConnectOptions, PgPoolOptions},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    process::ExitCode,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};
use uuid::Uuid;

/// Users that the runs are spread over: several runs share a balance, as with real people.
const USERS: usize = 20;
/// One question in so many is spoiled.
const FAULT_EVERY: usize = 20;
/// What goes wrong, in turn.
const FAULTS: [Fault; 5] =
    [Fault::RateLimited(None), Fault::HtmlError, Fault::ResetMidBody, Fault::NoFinishReason, Fault::CloseBeforeHeaders];
/// Connections of a worker, as the product has them.
const POOL: u32 = 20;
const GOAL: Duration = Duration::from_millis(5);
/// Commits of the kind that a call makes, made one after another while nothing else happens.
const COMMITS: usize = 200;
const PATIENCE: Duration = Duration::from_secs(1_800);

struct Options {
    runs: usize,
    calls: usize,
    think: Duration,
}

/// A call as it was measured.
struct Measured {
    /// From asking the orchestrator to having the answer, without the provider's time.
    added: Duration,
    /// Requests that it took.
    requests: u32,
}

#[derive(Default)]
struct Log(Mutex<Vec<Measured>>);

/// The real client; before it asks, time passes, as if the model thought. That time is what the provider costs.
struct Thinking {
    client: Arc<dyn Provider>,
    mean: Duration,
}

impl Provider for Thinking {
    fn name(&self) -> &'static str {
        self.client.name()
    }
    fn key(&self) -> KeyIdentity {
        self.client.key()
    }
    fn complete<'a>(&'a self, call: Call<'a>) -> BoxFuture<'a, Result<Completion, ProviderError>> {
        Box::pin(async move {
            // Half to one and a half of the mean.
            let think = self.mean / 2 + self.mean.mul_f64(fastrand::f64());
            let begun = Instant::now();
            tokio::time::sleep(think).await;
            THOUGHT.with(begun.elapsed());
            self.client.complete(call).await
        })
    }
}

tokio::task_local! {
    /// What the provider took for the call that this task makes, and its requests.
    static SPENT: Mutex<(Duration, u32)>;
}

/// The way to [`SPENT`].
struct Thought;
const THOUGHT: Thought = Thought;
impl Thought {
    fn with(&self, took: Duration) {
        let _outside_of_a_call = SPENT.try_with(|spent| {
            let mut spent = spent.lock().expect("no panic while held");
            spent.0 += took;
            spent.1 += 1;
        });
    }
}

/// Asks a model so many times, one after another, as `implement@1` does.
struct Asks {
    orchestrator: Orchestrator,
    calls: usize,
    log: Arc<Log>,
}

fn request(n: usize) -> Request {
    Request {
        role: Role::Implementer,
        purpose: "bench".into(),
        messages: vec![Message::User { text: format!("question {n}: {}", "words ".repeat(500)) }],
        tools: Vec::new(),
        output_schema: None,
        max_output_tokens: 1_000,
    }
}

impl Activity for Asks {
    fn signature(&self) -> Signature {
        Signature {
            name: "asks@1".into(),
            summary: "many model calls".into(),
            input_schema: json!({"type": "object"}),
            output_schema: json!({}),
            run_timeout_ms: 3_600_000,
            heartbeat_timeout_ms: None,
            metered: true,
            idempotent: true,
            failure_codes: vec![],
        }
    }
    fn run(&self, ctx: Context, _input: Value) -> BoxFuture<'static, Result<Value, Failure>> {
        let (orchestrator, calls, log) = (self.orchestrator.clone(), self.calls, self.log.clone());
        Box::pin(async move {
            for n in 0..calls {
                let key = format!("turn-{n}");
                let measured = SPENT.scope(Mutex::default(), async {
                    let begun = Instant::now();
                    orchestrator.call(&ctx, &key, request(n)).await?;
                    let (thought, requests) = SPENT.with(|spent| *spent.lock().expect("no panic while held"));
                    Ok::<_, Failure>(Measured { added: begun.elapsed().saturating_sub(thought), requests })
                });
                let measured = measured.await?;
                log.0.lock().expect("no panic while held").push(measured);
            }
            Ok(json!({ "calls": calls }))
        })
    }
    fn reserve(&self, _input: &Value) -> Value {
        // A few calls: the rest extends the hold, as in a long attempt.
        let planned = self.orchestrator.planned(Role::Implementer, 5, 1_500, 1_000);
        json!({ "calls": [planned] })
    }
}

fn definition() -> Definition {
    let step = Step {
        id: "ask".into(),
        condition: None,
        kind: Kind::Activity { name: "asks@1".into(), with: BTreeMap::<String, Data>::new() },
        retry: RetryPolicy { attempts: 20, delay_ms: 200, ..RetryPolicy::default() },
        timeouts: Timeouts::default(),
        catch: vec![],
        continue_on_error: false,
    };
    Definition {
        format: FORMAT,
        name: "calls".into(),
        inputs: BTreeMap::new(),
        env: BTreeMap::new(),
        timeout_ms: 3_600_000,
        budget: Value::Null,
        concurrency: None,
        runs_on: Vec::new(),
        executions_max: 100,
        steps: vec![step],
        finally: Vec::new(),
        outputs: BTreeMap::new(),
        queries: BTreeMap::new(),
        extras: Value::Null,
    }
}

fn main() -> ExitCode {
    let mut options = Options { runs: 200, calls: 50, think: Duration::from_millis(2_000) };
    let mut arguments = std::env::args().skip(1).filter(|a| a != "--bench");
    while let Some(argument) = arguments.next() {
        let number = arguments.next().and_then(|n| n.parse::<usize>().ok()).filter(|n| *n > 0);
        match (argument.as_str(), number) {
            ("--runs", Some(n)) => options.runs = n,
            ("--calls", Some(n)) => options.calls = n,
            ("--think", Some(n)) => options.think = Duration::from_millis(n as u64),
            _ => {
                eprintln!("{argument} is not understood; arguments: [--runs N] [--calls N] [--think MS]");
                return ExitCode::from(2);
            }
        }
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    match runtime.block_on(measure(&options)) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

type Result<T, E = Box<dyn std::error::Error + Send + Sync>> = std::result::Result<T, E>;

/// False if something does not add up.
async fn measure(options: &Options) -> Result<bool> {
    let folder = std::env::temp_dir().join(format!("loopwright-calls-{}", std::process::id()));
    let settings = embedded::Settings { data_dir: Some(folder.clone()), ..embedded::Settings::default() };
    let server = embedded::start(settings).await?;
    let connect: PgConnectOptions = server.url().parse()?;
    let connect = connect.disable_statement_logging();
    let pool = PgPoolOptions::new()
        .max_connections(POOL)
        .acquire_timeout(Duration::from_secs(60))
        .test_before_acquire(false)
        .connect_lazy_with(connect.clone());
    migrate::run(&pool, MIGRATIONS).await?;
    let single = commits(&connect).await?;
    let done = load(options, &pool, &single).await;
    pool.close().await;
    tokio::task::spawn_blocking(move || server.stop()).await?;
    std::fs::remove_dir_all(&folder)?;
    done
}

/// Single-row inserts, a commit each, sorted: what one durable write takes here.
async fn commits(connect: &PgConnectOptions) -> Result<Vec<Duration>> {
    let mut conn = connect.connect().await?;
    sqlx::query("create table limit_of_commits (n bigint primary key, body text not null)").execute(&mut conn).await?;
    let body = "x".repeat(300);
    let mut took = Vec::with_capacity(COMMITS);
    for n in 0..COMMITS {
        let begun = Instant::now();
        sqlx::query("insert into limit_of_commits values ($1, $2)")
            .bind(i64::try_from(n)?)
            .bind(&body)
            .execute(&mut conn)
            .await?;
        took.push(begun.elapsed());
    }
    conn.close().await?;
    took.sort_unstable();
    Ok(took)
}

async fn load(options: &Options, pool: &PgPool, single: &[Duration]) -> Result<bool> {
    let fake = FakeProvider::saying(Reply::text("an answer of some words")).await;
    for (n, fault) in FAULTS.into_iter().enumerate() {
        let every = FAULT_EVERY * FAULTS.len();
        let pick = move |seen: &loopwright_activities::testing::Seen, ordinal: usize| {
            matches!(seen.endpoint, Endpoint::Generate { .. }) && ordinal % every == n * FAULT_EVERY
        };
        fake.inject(When::picked(pick), fault);
    }
    let environment: BTreeMap<&str, String> =
        fake.environment(&[Dialect::Gemini, Dialect::OpenRouter], "sk-bench-0123456789abcdef").into_iter().collect();
    let settings = Settings::from_lookup(&|name| environment.get(name).cloned())?;
    let clients = settings.providers()?.into_iter();
    let clients = clients.map(|client| Arc::new(Thinking { client, mean: options.think }) as Arc<dyn Provider>);
    let pace = Pace { backoff: Duration::from_millis(100), ..Pace::default() };
    let routing = Routing::shipped().with_settings(&settings, None);
    let orchestrator = Orchestrator::with_pace(routing, clients.collect(), pace);

    let log = Arc::new(Log::default());
    let hook = Arc::new(LedgerHook::new(BillingSettings::default()));
    let client = Client::new(pool.clone(), hook.clone());
    let registry =
        Registry::new().with(Asks { orchestrator: orchestrator.clone(), calls: options.calls, log: log.clone() });
    let deployed = client
        .deploy(Deploy {
            definition: definition(),
            bundle: Bundle::new(),
            source: String::new(),
            author: None,
            message: None,
        })
        .await?;
    let users = users(pool).await?;
    let config =
        WorkerConfig { hook, slots: u32::try_from(options.runs)?, ..WorkerConfig::new(pool.clone(), registry) };
    let worker = worker::start(config).await?;
    let before = counters(pool).await?;
    let begun = Instant::now();
    for n in 0..options.runs {
        start(&client, deployed.hash, &users[n % users.len()]).await?;
    }
    loop {
        let open: i64 = sqlx::query_scalar("select count(*) from runs where closed_at is null").fetch_one(pool).await?;
        if open == 0 {
            break;
        }
        if begun.elapsed() > PATIENCE {
            return Err(format!("{open} runs are open after {} s", PATIENCE.as_secs()).into());
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    let took = begun.elapsed();
    worker.drain(Duration::from_secs(10)).await;
    let after = counters(pool).await?;
    report(options, pool, &fake, &log, single, took, (before, after)).await
}

async fn users(pool: &PgPool) -> Result<Vec<(Uuid, Uuid)>> {
    let mut users = Vec::with_capacity(USERS);
    for n in 0..USERS {
        let mut tx = pool.begin().await?;
        let identity = Identity::Telegram(i64::try_from(n)? + 1);
        let (user, _) = ledger::ensure_user(&mut tx, &identity, MicroCredits::from_credits(100_000)).await?;
        let project = sqlx::query_scalar("insert into projects (user_id, name) values ($1, 'bench') returning id")
            .bind(user)
            .fetch_one(&mut *tx)
            .await?;
        tx.commit().await?;
        users.push((user, project));
    }
    Ok(users)
}

async fn start(client: &Client, definition: DefinitionHash, (user, project): &(Uuid, Uuid)) -> Result<RunId> {
    let attributes = json!({"user_id": user.to_string(), "project_id": project.to_string()});
    let start = Start {
        run_id: None,
        definition,
        inputs: json!({}),
        workflow_id: None,
        attributes,
        queue: String::new(),
        topic: None,
        admission: Default::default(),
    };
    let started = client.start(start).await?;
    Ok(started.run_id)
}

/// Commits, rollbacks and deadlocks of the database.
async fn counters(pool: &PgPool) -> Result<(i64, i64, i64)> {
    // Backends write down what they counted at most once a second.
    tokio::time::sleep(Duration::from_millis(1_100)).await;
    let sql = "select xact_commit, xact_rollback, deadlocks from pg_stat_database where datname = current_database()";
    Ok(sqlx::query_as(sql).fetch_one(pool).await?)
}

fn quantile(sorted: &[Duration], q: f64) -> Duration {
    let at = ((sorted.len() as f64 * q) as usize).min(sorted.len().saturating_sub(1));
    sorted.get(at).copied().unwrap_or_default()
}

async fn report(
    options: &Options,
    pool: &PgPool,
    fake: &FakeProvider,
    log: &Log,
    single: &[Duration],
    took: Duration,
    (before, after): ((i64, i64, i64), (i64, i64, i64)),
) -> Result<bool> {
    let measured = std::mem::take(&mut *log.0.lock().expect("no panic while held"));
    let of = |pick: &dyn Fn(&Measured) -> bool| {
        let mut added: Vec<Duration> = measured.iter().filter(|m| pick(m)).map(|m| m.added).collect();
        added.sort_unstable();
        added
    };
    let (plain, repeated) = (of(&|m| m.requests == 1), of(&|m| m.requests > 1));
    let asked = fake.journal().iter().filter(|entry| matches!(entry.endpoint, Endpoint::Generate { .. })).count();
    let rows: Vec<(String, i64)> =
        sqlx::query_as("select state, count(*) from api_key_usage group by state order by state")
            .fetch_all(pool)
            .await?;
    let recorded: i64 = rows.iter().map(|(_, n)| n).sum();
    let completed: i64 =
        sqlx::query_scalar("select count(*) from runs where status = 'completed'").fetch_one(pool).await?;
    let broken = audit::run(&mut *pool.acquire().await?).await?;
    let invariants: BTreeSet<&str> = broken.iter().map(|violation| violation.invariant).collect();
    let ms = |d: Duration| format!("{:.2} ms", d.as_secs_f64() * 1_000.0);
    let two = |q: f64| quantile(single, q) * 2;
    let build = if cfg!(debug_assertions) { " — DEBUG BUILD, figures mean nothing" } else { "" };
    println!(
        "{} runs of {} calls, {} users, one fault in {FAULT_EVERY}, the provider thinks {} on average{build}",
        options.runs,
        options.calls,
        USERS,
        ms(options.think)
    );
    println!(
        "calls that were answered       {} in {:.1} s: {:.0}/s",
        measured.len(),
        took.as_secs_f64(),
        measured.len() as f64 / took.as_secs_f64()
    );
    println!("requests that the provider saw {asked}, recorded {recorded}: {rows:?}");
    for (q, name) in [(0.5, "p50"), (0.99, "p99")] {
        let (ours, limit) = (quantile(&plain, q), two(q));
        println!(
            "added latency of a call, {name}    {}   limit (two single-row commits, alone): {}   ratio {:.2}",
            ms(ours),
            ms(limit),
            ours.as_secs_f64() / limit.as_secs_f64()
        );
    }
    let p99 = quantile(&plain, 0.99);
    println!("  goal: p99 below {}: {}", ms(GOAL), if p99 < GOAL { "reached" } else { "NOT REACHED" });
    println!(
        "  of {} calls that needed more than one request, waits included: p50 {}, p99 {}",
        repeated.len(),
        ms(quantile(&repeated, 0.5)),
        ms(quantile(&repeated, 0.99))
    );
    println!("commits per call               {:.2}", (after.0 - before.0) as f64 / measured.len().max(1) as f64);
    println!("deadlocks                      {}", after.2 - before.2);
    println!("runs completed                 {completed} of {}", options.runs);
    println!(
        "invariants broken              {}",
        if broken.is_empty() { "none".to_owned() } else { format!("{invariants:?}") }
    );
    Ok(broken.is_empty()
        && after.2 == before.2
        && completed == i64::try_from(options.runs)?
        && i64::try_from(asked)? == recorded)
}
