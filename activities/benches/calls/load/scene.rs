//! The runs, and the worker that drives them: wired as the product is, with keys, their standing and their budgets per minute.

use super::{
    Options, Result,
    host::{Host, monotonic_ns},
    provider::QUESTION,
};
use futures_util::future::BoxFuture;
use loopwright_activities::{
    billing::{
        BillingSettings, LedgerHook, MicroCredits,
        ledger::{self, Identity},
    },
    keys::{Keys, Ring},
    orchestrator::{Message, Orchestrator, Request, Role, Routing},
    provider::Settings,
};
use loopwright_engine::{
    Failure,
    activity::{Activity, Context, Registry},
    client::{Client, Deploy, Start},
    definition::{Bundle, Definition, FORMAT, Kind, RetryPolicy, Step, Timeouts},
    ids::{DefinitionHash, RunId},
    signature::Signature,
    transaction,
    worker::{self, WorkerConfig, WorkerHandle},
};
use serde_json::{Value, json};
use sqlx::PgPool;
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};
use uuid::Uuid;

/// Users that the runs are spread over: several runs share a balance, as with real people.
const USERS: i64 = 20;
/// Words of a question, beside its name: some 3 KB.
const WORDS: usize = 500;
/// Budgets per minute of a key: far more than is asked, so that leases are taken and nobody waits.
const REQUESTS_PER_MINUTE: u32 = 600_000;
const TOKENS_PER_MINUTE: u64 = 6_000_000_000;
/// A ring of one key, for the look-up of users' keys; none is sealed by it.
const RING: &str = "bench:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=";
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// A call as the activity saw it.
pub struct Measured {
    pub question: String,
    /// As [`monotonic_ns`].
    pub begun_ns: u64,
    pub ended_ns: u64,
    pub answered: bool,
    /// By the model that the role asks first.
    pub by_first: bool,
}

/// Asks a model so many times, one after another, as `implement@1` does.
struct Asks {
    orchestrator: Orchestrator,
    calls: usize,
    log: Arc<Mutex<Vec<Measured>>>,
}

impl Asks {
    fn request(name: &str) -> Request {
        Request {
            role: Role::Implementer,
            purpose: "bench".into(),
            messages: vec![Message::User { text: format!("{QUESTION}{name}: {}", "words ".repeat(WORDS)) }],
            tools: Vec::new(),
            output_schema: None,
            max_output_tokens: 1_000,
        }
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
        let first = orchestrator.candidates(Role::Implementer).into_iter().next();
        Box::pin(async move {
            for n in 0..calls {
                let question = format!("{}.{n}", ctx.info().run_id.0);
                let request = Self::request(&question);
                let begun_ns = monotonic_ns();
                let reply = orchestrator.call(&ctx, &format!("turn-{n}"), request).await;
                let ended_ns = monotonic_ns();
                let by_first = reply.as_ref().is_ok_and(|reply| {
                    first.as_ref().is_some_and(|(provider, model)| (&reply.provider, &reply.model) == (provider, model))
                });
                let measured = Measured { question, begun_ns, ended_ns, answered: reply.is_ok(), by_first };
                log.lock().expect("no panic while held").push(measured);
                reply?;
            }
            Ok(json!({ "calls": calls }))
        })
    }
    fn reserve(&self, _input: &Value, extras: &Value) -> Value {
        // A few calls: the rest extends the hold, as in a long attempt.
        let planned = self.orchestrator.planned((Role::Implementer, "implement"), extras, 5, 1_500, 1_000);
        json!({ "calls": [planned] })
    }
}

fn definition() -> Definition {
    let step = Step {
        id: "ask".into(),
        condition: None,
        kind: Kind::Activity { name: "asks@1".into(), with: BTreeMap::new() },
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

/// Users with credits, and a project of each.
pub async fn users(pool: &PgPool) -> Result<Vec<(Uuid, Uuid)>> {
    let mut users = Vec::new();
    for n in 1..=USERS {
        let mut tx = transaction::begin(pool).await?;
        let credits = MicroCredits::from_credits(1_000_000);
        let (user, _) = ledger::ensure_user(&mut tx, &Identity::Telegram(n), credits).await?;
        let project = sqlx::query_scalar("insert into projects (user_id, name) values ($1, 'bench') returning id")
            .bind(user)
            .fetch_one(&mut *tx)
            .await?;
        tx.commit().await?;
        users.push((user, project));
    }
    Ok(users)
}

/// A worker, and the door to start runs.
pub struct Scene<'h> {
    host: &'h Host,
    client: Client,
    worker: WorkerHandle,
    definition: DefinitionHash,
    log: Arc<Mutex<Vec<Measured>>>,
}

impl<'h> Scene<'h> {
    /// A worker in this process whose models are at `environment`, with its connections from `pool`.
    pub async fn open(
        host: &'h Host,
        pool: &PgPool,
        options: &Options,
        environment: &BTreeMap<String, String>,
    ) -> Result<Self> {
        let settings = Settings::from_lookup(&|name| environment.get(name).cloned())?;
        let mut routing = Routing::shipped();
        for candidate in routing.roles.values_mut().flatten() {
            candidate.requests_per_minute = Some(REQUESTS_PER_MINUTE);
            candidate.tokens_per_minute = Some(TOKENS_PER_MINUTE);
        }
        let keys = Keys::new(pool.clone(), Some(Ring::parse(&RING.into())?), false);
        let orchestrator = Orchestrator::configured(routing, &settings, Some(&keys)).await?;
        let log = Arc::new(Mutex::default());
        let hook = Arc::new(LedgerHook::new(BillingSettings::default()));
        let client = Client::new(host.pool.clone(), hook.clone());
        let asks = Asks { orchestrator, calls: options.calls, log: Arc::clone(&log) };
        let deploy = Deploy {
            definition: definition(),
            bundle: Bundle::new(),
            source: String::new(),
            author: None,
            message: None,
        };
        let definition = client.deploy(deploy).await?.hash;
        let registry = Registry::new().with(asks);
        let slots = u32::try_from(options.runs)?;
        let worker = worker::start(WorkerConfig { hook, slots, ..WorkerConfig::new(pool.clone(), registry) });
        Ok(Self { host, client, worker: worker.await?, definition, log })
    }

    /// Starts so many runs, spread evenly over `over`: all at one instant is another question than a load.
    pub async fn start(&self, runs: usize, over: Duration) -> Result<Vec<RunId>> {
        let begun = Instant::now();
        let mut started = Vec::with_capacity(runs);
        for n in 0..runs {
            let due = over.mul_f64(n as f64 / runs as f64);
            tokio::time::sleep(due.saturating_sub(begun.elapsed())).await;
            let (user, project) = self.host.users[n % self.host.users.len()];
            let start = Start {
                run_id: None,
                definition: self.definition,
                inputs: json!({}),
                workflow_id: None,
                attributes: json!({"user_id": user.to_string(), "project_id": project.to_string()}),
                queue: String::new(),
                topic: None,
                admission: Default::default(),
            };
            started.push(self.client.start(start).await?.run_id);
        }
        Ok(started)
    }

    pub async fn until_closed(&self, runs: &[RunId], patience: Duration) -> Result<()> {
        let begun = Instant::now();
        let ids: Vec<Uuid> = runs.iter().map(|run| run.0).collect();
        loop {
            let sql = "select count(*) from runs where run_id = any($1) and closed_at is null";
            let open: i64 = sqlx::query_scalar(sql).bind(&ids).fetch_one(&self.host.pool).await?;
            if open == 0 {
                return Ok(());
            }
            if begun.elapsed() > patience {
                return Err(format!("{open} runs are open after {} s", patience.as_secs()).into());
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Those of the runs that did not complete, and why; and how many requests of all are recorded.
    pub async fn what_became_of(&self, runs: &[RunId]) -> Result<(Vec<String>, usize)> {
        let ids: Vec<Uuid> = runs.iter().map(|run| run.0).collect();
        let failed = sqlx::query_scalar(
            "select concat_ws(' ', run_id, status, failure) || '; calls: ' ||
                    (select coalesce(string_agg(concat_ws(' ', a.attempt_no, u.model_requested, u.state, u.error_class), ', ' order by u.started_at), '')
                     from api_key_usage u join activity_attempts a on a.id = u.attempt_id
                     where a.run_id = r.run_id and u.state <> 'succeeded')
             from runs r where run_id = any($1) and status <> 'completed'",
        );
        let recorded: i64 = sqlx::query_scalar(
            "select count(*) from api_key_usage u join activity_attempts a on a.id = u.attempt_id where a.run_id = any($1)",
        )
        .bind(&ids)
        .fetch_one(&self.host.pool)
        .await?;
        Ok((failed.bind(&ids).fetch_all(&self.host.pool).await?, usize::try_from(recorded)?))
    }

    /// Ends the worker and gives what was measured.
    pub async fn close(self) -> Vec<Measured> {
        self.worker.drain(Duration::from_secs(10)).await;
        std::mem::take(&mut *self.log.lock().expect("no panic while held"))
    }
}
