//! Every fault of a provider × every moment at which a worker dies around a call: real worker processes on a real Postgres, and
//! a provider that keeps a journal. Whatever happens, journal and ledger tell the same story.
//!
//! And a worker that dies at each crash point of the ledger, behind which nothing is at fault.
//!
//! By default each pair meets one dialect. `LOOPWRIGHT_MATRIX=full` takes all three; other words pick the pairs whose name holds
//! them.

mod books;
mod pairs;

use futures_util::{StreamExt, future::BoxFuture, stream};
use loopwright_activities::{
    MIGRATIONS,
    billing::{
        BillingSettings, LedgerHook, MicroCredits, audit,
        ledger::{self, Identity},
        limit,
    },
    orchestrator::{Message, Orchestrator, Pace, Request, Role, Routing},
    provider::{KeyIdentity, Settings, Timeouts},
    testing::{
        CRASH_POINTS, ClosedPort, Dialect, Endpoint, Entry, FakeProvider, Fault, Reply, Seen, Stage, Told, When,
    },
};
use loopwright_engine::{
    Failure,
    activity::{Activity, Context, Registry},
    client::{Client, Deploy, Start},
    definition::{Bundle, Data, Definition, Expr, FORMAT, Input, Kind, RetryPolicy, Step},
    embedded::testing::{database, url},
    ids::{DefinitionHash, RunId},
    signature::Signature,
    view::{RunStatus, RunView},
    worker::{self, WorkerConfig, WorkerHandle},
};
use pairs::{Death, FINAL, PRICES, Pair, address, faults, gives_back, pairs, told};
use secrecy::SecretString;
use serde_json::{Value, json};
use sqlx::{PgPool, Row, postgres::PgRow};
use std::{
    collections::BTreeMap,
    net::SocketAddr,
    os::unix::process::ExitStatusExt,
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};
use tokio_util::task::AbortOnDropHandle;
use uuid::Uuid;

/// The child's database and task queue.
const DATABASE: &str = "LOOPWRIGHT_TEST_DATABASE";
const QUEUE: &str = "LOOPWRIGHT_TEST_QUEUE";
/// The engine's: where the child dies.
const POINT: &str = "LOOPWRIGHT_CRASH_POINT";
const MATRIX: &str = "LOOPWRIGHT_MATRIX";
/// A dead worker's runs are taken over after so long.
const LEASE: Duration = Duration::from_millis(1_500);
/// How long a worker waits for the first byte of an answer, and for any other.
const FIRST_BYTE: Duration = Duration::from_secs(1);
const PATIENCE: Duration = Duration::from_secs(180);
/// Runs of one pair, until its first worker ends as it should; none is begun when those before took longer than `PATIENCE`.
const ROUNDS: usize = 5;
/// The signals of a process that dies at a crash point, and by our hand: SIGABRT, SIGKILL.
const ABORTED: i32 = 6;
const KILLED: i32 = 9;
/// Pairs that are tried at once: most of their time they wait for a lease or a time-out.
const AT_ONCE: usize = 6;
/// How often a process is asked whether it has ended.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// What a user has at first.
const CREDITS: i64 = 1_000;

/// Two calls, one after the other.
struct Asks(Orchestrator);

impl Activity for Asks {
    fn signature(&self) -> Signature {
        Signature {
            name: "asks@1".into(),
            summary: "two model calls".into(),
            input_schema: json!({"type": "object"}),
            output_schema: json!({}),
            run_timeout_ms: 120_000,
            heartbeat_timeout_ms: None,
            metered: true,
            idempotent: true,
            failure_codes: vec![],
        }
    }
    fn run(&self, ctx: Context, _input: Value) -> BoxFuture<'static, Result<Value, Failure>> {
        let orchestrator = self.0.clone();
        Box::pin(async move {
            let mut texts = Vec::new();
            for name in ["a", "b"] {
                let request = Request {
                    role: Role::Utility,
                    purpose: "test".into(),
                    messages: vec![Message::User { text: format!("call {name}") }],
                    tools: Vec::new(),
                    output_schema: None,
                    max_output_tokens: 200,
                };
                texts.push(orchestrator.call(&ctx, name, request).await?.text);
            }
            Ok(json!({ "texts": texts }))
        })
    }
    fn reserve(&self, _input: &Value, extras: &Value) -> Value {
        json!({ "calls": [self.0.planned((Role::Utility, "test"), extras, 2, 100, 200)] })
    }
}

/// A worker of one queue with the given settings.
async fn worker(pool: PgPool, queue: &str, lookup: impl Fn(&str) -> Option<String>) -> WorkerHandle {
    let mut settings = Settings::from_lookup(&lookup).expect("settings");
    settings.timeouts =
        Timeouts { connect: FIRST_BYTE, first_byte: FIRST_BYTE, idle: FIRST_BYTE, total: 3 * FIRST_BYTE };
    let routing = Routing::shipped().with_settings(&settings, None);
    let pace = Pace { backoff: Duration::from_millis(10), ..Pace::default() };
    let orchestrator = Orchestrator::with_pace(routing, settings.providers().expect("providers"), pace);
    let hook = Arc::new(LedgerHook::new(BillingSettings::default()));
    let registry = Registry::new().with(Asks(orchestrator));
    let config = WorkerConfig {
        hook,
        queues: vec![queue.to_owned()],
        slots: 2,
        lease: LEASE,
        ..WorkerConfig::new(pool, registry)
    };
    worker::start(config).await.expect("worker")
}

/// The process that dies, or the one that goes on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "started by the other test of this file in a process of its own"]
async fn child_process() {
    let (Ok(database), Ok(queue)) = (std::env::var(DATABASE), std::env::var(QUEUE)) else { return };
    let pool = PgPool::connect(&database).await.expect("database");
    worker(pool, &queue, |name| std::env::var(name).ok()).await.fenced().await;
}

/// A worker of its own; nobody who stops waiting leaves it behind.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // Whoever has ended by itself is only buried by this.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// Waits for the end of a process.
async fn ended(Process(child): &mut Process) -> ExitStatus {
    loop {
        if let Some(status) = child.try_wait().expect("child") {
            return status;
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

struct Bench {
    pool: PgPool,
    client: Client,
    fake: FakeProvider,
    asks: DefinitionHash,
    /// Goes on as another run first, which then does what `asks` does.
    continues: DefinitionHash,
}

/// A step as it is by default.
fn step(id: &str, kind: Kind) -> Step {
    Step {
        id: id.into(),
        condition: None,
        kind,
        retry: RetryPolicy { attempts: 8, delay_ms: 20, ..RetryPolicy::default() },
        timeouts: Default::default(),
        catch: vec![],
        continue_on_error: false,
    }
}

async fn deploy(client: &Client, name: &str, steps: Vec<Step>) -> DefinitionHash {
    let n = Input { schema: json!({"type": "integer"}), required: false, default: Some(json!(0)) };
    let definition = Definition {
        format: FORMAT,
        name: name.into(),
        inputs: BTreeMap::from([("n".to_owned(), n)]),
        env: BTreeMap::new(),
        timeout_ms: 3_600_000,
        budget: Value::Null,
        concurrency: None,
        runs_on: Vec::new(),
        executions_max: 100,
        steps,
        finally: Vec::new(),
        outputs: BTreeMap::new(),
        queries: BTreeMap::new(),
        extras: Value::Null,
    };
    let new = Deploy { definition, bundle: Bundle::new(), source: String::new(), author: None, message: None };
    client.deploy(new).await.expect("deployed").hash
}

impl Bench {
    async fn new(pairs: &[Pair]) -> Self {
        let pool = database(MIGRATIONS).await;
        let client = Client::new(pool.clone(), Arc::new(LedgerHook::new(BillingSettings::default())));
        let ask = step("ask", Kind::Activity { name: "asks@1".into(), with: BTreeMap::new() });
        let with = BTreeMap::from([("n".to_owned(), Data::Literal(json!(1)))]);
        let mut again = step("again", Kind::ContinueAsNew { with, current: true });
        again.condition = Some(Expr("inputs.n < 1".into()));
        let asks = deploy(&client, "asks", vec![ask.clone()]).await;
        let continues = deploy(&client, "continues", vec![again, ask]).await;
        for (provider, model, [input, cached, output, reasoning]) in PRICES {
            sqlx::query(
                "insert into model_pricing (provider, model_id, effective_from, input_umtok, cached_input_umtok, output_umtok, reasoning_umtok, source)
                 values ($1, $2, engine_now(), $3, $4, $5, $6, 'test')",
            )
            .bind(provider)
            .bind(model)
            .bind(input)
            .bind(cached)
            .bind(output)
            .bind(reasoning)
            .execute(&pool)
            .await
            .expect("price");
        }
        // A rule is asked once a request; which question of its key it is, is counted here.
        let known: Arc<BTreeMap<String, Pair>> =
            Arc::new(pairs.iter().flat_map(|p| (0..ROUNDS).map(|n| p.of_round(n))).map(|p| (p.key(), p)).collect());
        let asked = known.clone();
        let fake = FakeProvider::serve(move |seen, n| {
            let pair = seen.key().and_then(|key| asked.get(key));
            Reply::text("words").with_usage(Some(pair.map_or_else(|| told(n), |pair| pair.told(n))))
        })
        .await;
        /// Which question of its key a request is, by dialect and ordinal; questions so far, by key.
        type Counted = (BTreeMap<(&'static str, usize), usize>, BTreeMap<String, usize>);
        let counted: Arc<Mutex<Counted>> = Arc::default();
        let mut all: Vec<Fault> = faults().into_iter().flatten().collect();
        all.dedup();
        for fault in all {
            let (known, counted, fault_here) = (known.clone(), counted.clone(), fault.clone());
            let pick = move |seen: &Seen, ordinal: usize| {
                let Some(pair) = seen.key().and_then(|key| known.get(key)) else { return false };
                if !matches!(seen.endpoint, Endpoint::Generate { .. }) {
                    return false;
                }
                let mut counted = counted.lock().expect("no panic while held");
                let (requests, counts) = &mut *counted;
                let nth = *requests.entry((seen.dialect.name(), ordinal)).or_insert_with(|| {
                    let count = counts.entry(pair.key()).or_default();
                    *count += 1;
                    *count - 1
                });
                pair.fault_of(nth).as_ref() == Some(&fault_here)
            };
            fake.inject(When::picked(pick), fault);
        }
        Self { pool, client, fake, asks, continues }
    }

    async fn user(&self, pair: &Pair) -> Uuid {
        let mut tx = self.pool.begin().await.expect("tx");
        let identity = Identity::Telegram(i64::try_from(pair.n * ROUNDS + pair.round).expect("small") + 1);
        let (user, _) =
            ledger::ensure_user(&mut tx, &identity, MicroCredits::from_credits(CREDITS)).await.expect("user");
        tx.commit().await.expect("commit");
        user
    }

    /// A worker process of a pair, which dies where `death` says.
    fn child(&self, pair: &Pair, death: Death, door: Option<SocketAddr>) -> Process {
        let mut command = Command::new(std::env::current_exe().expect("this binary"));
        command
            .args(["under_fire::child_process", "--exact", "--ignored", "--nocapture"])
            .env(DATABASE, url(&self.pool))
            .env(QUEUE, pair.queue())
            .envs(pair.environment(&self.fake, door))
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        match death {
            Death::Point(name, nth) => command.env(POINT, format!("{name}:{nth}")),
            Death::Second(_, name) => command.env(POINT, name),
            Death::PointOfCall(name) => command.env(POINT, format!("{name}:{}", pair.struck() + 1)),
            Death::Never | Death::Sent | Death::Headers => command.env_remove(POINT),
        };
        Process(command.spawn().expect("child"))
    }

    /// The journal of a pair, with what each question was.
    fn story(&self, pair: &Pair) -> Vec<(Entry, String)> {
        let (seen, journal, mine) = (self.fake.seen(), self.fake.journal(), pair.fingerprint());
        let asked =
            |entry: &Entry| matches!(entry.endpoint, Endpoint::Generate { .. }) && entry.key_fingerprint == mine;
        let all = journal.into_iter().zip(seen).filter(|(entry, _)| asked(entry));
        all.map(|(entry, seen)| (entry, if seen.body.to_string().contains("call b") { "b" } else { "a" }.to_owned()))
            .collect()
    }

    /// Whether the struck call is named by the headers behind which its worker dies. Gemini names a call in its body.
    fn names(&self, pair: &Pair) -> bool {
        pair.death.1 == Death::Headers && pair.dialect != Dialect::Gemini
    }

    /// How the keys of the struck call's requests begin, in whatever attempt: one that is refused twice is made in the second.
    fn struck_call(&self, pair: &Pair) -> &'static str {
        ["a.", "b."][pair.struck()]
    }

    /// Whether the books have the name of the call under way, or it is over: on a busy machine its headers may come after its time-out.
    async fn named(&self, pair: &Pair) -> bool {
        sqlx::query_scalar(
            "select exists (select from api_key_usage k join api_keys y on y.id = k.api_key_id
             where y.fingerprint = decode($1, 'hex') and starts_with(k.call_key, $2)
               and (k.provider_request_id is not null or k.state = 'unknown'))",
        )
        .bind(pair.fingerprint())
        .bind(self.struck_call(pair))
        .fetch_one(&self.pool)
        .await
        .expect("row")
    }

    /// As [`Self::until_killed`], and until the run is closed: where a question took longer than its time-out on a busy machine, the
    /// fault met another one, and the first worker may never come to where it would have died.
    async fn until_dead(&self, pair: &Pair, run: RunId, child: &mut Process) -> (ExitStatus, bool) {
        tokio::select! {
            end = self.until_killed(pair, child) => return end,
            _ = self.until_closed(run) => {}
        }
        // It may be about to: behind what has closed the run.
        if let Ok(end) = tokio::time::timeout(LEASE, self.until_killed(pair, child)).await {
            return end;
        }
        // It may have ended by itself at this very moment.
        let _ = child.0.kill();
        (ended(child).await, false)
    }

    /// Waits for the end of a pair's first worker, and returns how it ended, and whether that is the death that the pair names: on a
    /// machine that is busy with bodies of 64 MB a process may be silent for longer than its lease, and ends in good order then.
    async fn until_killed(&self, pair: &Pair, child: &mut Process) -> (ExitStatus, bool) {
        if let Death::Sent | Death::Headers = pair.death.1 {
            let (mine, at) = (pair.fingerprint(), pair.struck());
            let stage = if pair.death.1 == Death::Sent { Stage::Received } else { Stage::Headers };
            let reached = |journal: &[Entry]| {
                let mut asked = journal.iter().filter(|entry| entry.key_fingerprint == mine);
                asked.nth(at).is_some_and(|entry| entry.stage >= stage)
            };
            let struck = async {
                self.fake.journal_when(reached).await;
                // What the headers said is recorded while the answer is awaited.
                while self.names(pair) && !self.named(pair).await {
                    tokio::time::sleep(LOOK_EVERY).await;
                }
            };
            tokio::select! {
                () = struck => {}
                status = ended(child) => return (status, false),
            }
            child.0.kill().expect("killed");
            // It may have ended by itself at this very moment.
            let status = ended(child).await;
            return (status, status.signal() == Some(KILLED));
        }
        // It dies by itself at its point.
        let status = ended(child).await;
        (status, status.signal() == Some(ABORTED))
    }

    /// Whether the call was still under way behind whose question or headers a worker was killed: where that took longer than the call's
    /// time-out the worker had closed it, and was somewhere else. Looks at a run that has ended.
    async fn was_under_way(&self, pair: &Pair) -> bool {
        if !matches!(pair.death.1, Death::Sent | Death::Headers) {
            return true;
        }
        // The first of its requests that was not refused a connection. Whoever takes the run over knows of no error.
        sqlx::query_scalar(
            "select k.state = 'unknown' and k.error_class is null from api_key_usage k join api_keys y on y.id = k.api_key_id
             where y.fingerprint = decode($1, 'hex') and starts_with(k.call_key, $2) and k.state <> 'failed' order by k.id limit 1",
        )
        .bind(pair.fingerprint())
        .bind(self.struck_call(pair))
        .fetch_one(&self.pool)
        .await
        .expect("row")
    }

    /// What may be spent at most stands with the first run of a chain, so that the next one has it from there. It is written for that one
    /// where it first holds: at the start of its attempt, or, of a user who has brought keys, at a call on a key of the platform.
    async fn allow(&self, pair: &Pair, user: Uuid, first: RunId) {
        let mut tx = self.pool.begin().await.expect("tx");
        let allowed = MicroCredits::from_credits(CREDITS);
        limit::set(&mut tx, user, first.0, "test", allowed, "test").await.expect("limit");
        if pair.death.0 == "call.after_caps" {
            let sql = "insert into api_keys (provider, user_id, source, last4, fingerprint, ciphertext, nonce, wrapped_dek, kek_id)
                       values ('gemini', $1, 'sealed', '', decode(repeat('33', 32), 'hex'), '', '', '', 'a')";
            sqlx::query(sql).bind(user).execute(&mut *tx).await.expect("key");
        }
        tx.commit().await.expect("commit");
    }

    /// The end of a run, or of the one that it went on as.
    async fn until_closed(&self, mut run: RunId) -> RunView {
        loop {
            let view = self.client.describe(run).await.expect("view");
            if let Some(next) = view.chain.continued_as {
                run = next;
                continue;
            }
            if view.status.is_closed() {
                return view;
            }
            self.client.wait_change(run, view.seq, Duration::from_secs(1)).await.expect("waits");
        }
    }

    /// Drives one run to its end and returns what is wrong with it, and whether its first worker ended as the pair says.
    async fn drive(&self, pair: &Pair) -> (Vec<String>, bool) {
        let user = self.user(pair).await;
        let attributes = json!({ "user_id": user.to_string() });
        let start = Start {
            run_id: None,
            definition: if pair.inherits() { self.continues } else { self.asks },
            inputs: json!({}),
            workflow_id: None,
            attributes,
            queue: pair.queue(),
            topic: None,
            admission: Default::default(),
        };
        let run = self.client.start(start).await.expect("started").run_id;
        if pair.inherits() {
            self.allow(pair, user, run).await;
        }
        // An address that nothing listens at; from the first refusal on it leads to the fake.
        let closed = pair.refused.then(ClosedPort::new);
        let door = closed.as_ref().map(ClosedPort::address);
        let opened = closed.map(|closed| AbortOnDropHandle::new(tokio::spawn(self.open_when_refused(pair, closed))));
        let before = match pair.death.1 {
            Death::Second(name, _) => {
                let before = Pair { death: (name, Death::Point(name, 1)), ..pair.clone() };
                self.until_dead(&before, run, &mut self.child(&before, before.death.1, door)).await.1
            }
            _ => true,
        };
        let mut child = self.child(pair, pair.death.1, door);
        let end = if pair.death.1 == Death::Never {
            tokio::select! {
                _ = self.until_closed(run) => None,
                status = ended(&mut child) => Some((status, false)),
            }
        } else {
            Some(self.until_dead(pair, run, &mut child).await)
        };
        if let Some((status, false)) = end {
            println!("          {}: its first worker did not end as it should: {status}", pair.name());
        }
        let at_its_place = before && end.is_none_or(|(_, at_its_place)| at_its_place);
        let (view, lost) =
            if end.is_none() { (self.until_closed(run).await, false) } else { self.rescue(pair, run, door).await };
        drop(opened);
        drop(child);
        let as_named = at_its_place && self.was_under_way(pair).await;
        if at_its_place && !as_named {
            println!("          {}: the call was over when its first worker was killed", pair.name());
        }
        (self.check(pair, user, &view, !as_named || lost).await, as_named)
    }

    /// Tries a pair, in run after run, until its first worker has ended as it should: what another end leaves behind says nothing of
    /// that one. Returns what is wrong.
    async fn meet(&self, pair: &Pair) -> Vec<String> {
        let begun = Instant::now();
        for round in (0..ROUNDS).take_while(|_| begun.elapsed() < PATIENCE) {
            let pair = pair.of_round(round);
            let Ok((wrong, as_named)) = tokio::time::timeout(PATIENCE, self.drive(&pair)).await else {
                return vec![format!(
                    "{}: has not ended after {} s: {:#?}\n{}",
                    pair.name(),
                    PATIENCE.as_secs(),
                    self.story(&pair),
                    self.standing(&pair).await
                )];
            };
            if as_named || !wrong.is_empty() {
                return wrong;
            }
        }
        vec![format!(
            "{}: in up to {ROUNDS} runs, within {} s, the first worker never ended as it should",
            pair.name(),
            begun.elapsed().as_secs()
        )]
    }

    /// Waits until a call of the pair was refused, then lets everything through to the fake.
    fn open_when_refused(&self, pair: &Pair, door: ClosedPort) -> impl Future<Output = ()> + Send + use<> {
        let (pool, mine) = (self.pool.clone(), pair.fingerprint());
        let fake = address(&self.fake.base_of(pair.dialect)).to_owned();
        async move {
            let refused = "select exists (select from api_key_usage k join api_keys y on y.id = k.api_key_id
                           where y.fingerprint = decode($1, 'hex') and k.state = 'failed' and k.error_class = 'transient.network')";
            while !sqlx::query_scalar::<_, bool>(refused).bind(&mine).fetch_one(&pool).await.expect("row") {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            let listener = door.open();
            loop {
                let (mut caller, _) = listener.accept().await.expect("a connection");
                let fake = fake.clone();
                tokio::spawn(async move {
                    let Ok(mut server) = tokio::net::TcpStream::connect(fake).await else { return };
                    // Whoever hangs up ends both.
                    let _ = tokio::io::copy_bidirectional(&mut caller, &mut server).await;
                });
            }
        }
    }

    /// Another worker process, which may lose its lease as well and end: who runs one starts it anew then. Also whether that was so.
    async fn rescue(&self, pair: &Pair, run: RunId, door: Option<SocketAddr>) -> (RunView, bool) {
        let mut lost = false;
        loop {
            let mut rescuer = self.child(pair, Death::Never, door);
            tokio::select! {
                view = self.until_closed(run) => return (view, lost),
                status = ended(&mut rescuer) => {
                    println!("          {}: the second worker has ended and is started anew: {status}", pair.name());
                    lost = true;
                }
            }
        }
    }

    /// Where a run stands that does not end: its row, its queue, its attempts and calls, and the workers that are there.
    async fn standing(&self, pair: &Pair) -> String {
        let rows: Result<Vec<String>, _> = sqlx::query_scalar(
            "select 'run ' || to_jsonb(r)::text from runs r where r.queue = $1
             union all select 'ready ' || to_jsonb(q)::text from ready q where q.queue = $1
             union all select 'worker ' || to_jsonb(w)::text from workers w
             union all select 'dead ' || to_jsonb(d)::text from dead_workers d join runs r on r.owner = d.id
             union all select 'attempt ' || to_jsonb(a)::text from activity_attempts a join runs r on r.run_id = a.run_id where r.queue = $1
             union all select 'call ' || to_jsonb(k)::text from api_key_usage k join activity_attempts a on a.id = k.attempt_id
                              join runs r on r.run_id = a.run_id where r.queue = $1",
        )
        .bind(pair.queue())
        .fetch_all(&self.pool)
        .await;
        rows.map_or_else(|error| error.to_string(), |rows| rows.join("\n"))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_fault_at_no_moment_loses_work_buys_twice_or_charges_twice() {
    let pairs = pairs();
    all_end_well(&Bench::new(&pairs).await, &pairs).await;
}

/// Each in the middle of a transaction of the engine: it is done wholly by whoever comes next, or was done.
#[tokio::test(flavor = "multi_thread")]
async fn a_death_at_every_crash_point_of_the_ledger_leaves_its_books_in_order() {
    let pair = |(at, (point, _)): (usize, &(&'static str, &str))| {
        // What is given back is given for an attempt that has failed at the second call, and has paid for the first.
        let refund = gives_back(point);
        let (n, fault) = (at * 2 + usize::from(refund || at % 2 == 0), refund.then_some(Fault::BadKey));
        // An earlier attempt is one whose worker died before, at the same settlement.
        let death = match *point {
            "refund.after_earlier" => Death::Second("refund.after_attempt", point),
            _ => Death::Point(point, 1),
        };
        let pair = Pair { n, round: 0, dialect: Dialect::ALL[at % 3], fault, refused: false, death: (*point, death) };
        // Who reports no cost reports none that could be doubted.
        if pair.doubts() { Pair { dialect: Dialect::OpenRouter, ..pair } } else { pair }
    };
    let pairs: Vec<Pair> = CRASH_POINTS.iter().enumerate().map(pair).collect();
    let bench = Bench::new(&pairs).await;
    let rule = "insert into refund_rules (rule, effective_from, gives, failures, final_only, share_bps, source)
                values ('test', '2026-01-01', 'attempt', '{provider.key_invalid}', true, 10000, 'test')";
    sqlx::query(rule).execute(&bench.pool).await.expect("rule");
    all_end_well(&bench, &pairs).await;
}

#[test]
fn the_table_of_crash_points_is_what_the_sources_say() {
    let billing = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src/billing");
    let mut found = Vec::new();
    for entry in std::fs::read_dir(billing).expect("folder") {
        let path = entry.expect("entry").path();
        let file = format!("billing/{}", path.file_name().expect("name").to_str().expect("text"));
        let text = std::fs::read_to_string(&path).expect("source");
        let names = text.split("crash_point(\"").skip(1).map(|rest| rest.split('"').next().expect("name").to_owned());
        found.extend(names.map(|name| (name, file.clone())));
    }
    let mut listed: Vec<_> = CRASH_POINTS.iter().map(|(name, file)| ((*name).to_owned(), (*file).to_owned())).collect();
    found.sort();
    listed.sort();
    assert_eq!(found, listed);
}

/// Drives these pairs to their ends; nothing may be wrong with any.
async fn all_end_well(bench: &Bench, pairs: &[Pair]) {
    let driven = stream::iter(pairs).map(|pair| async move {
        let begun = Instant::now();
        let wrong = bench.meet(pair).await;
        println!(
            "{:>6.1} s  {}{}",
            begun.elapsed().as_secs_f64(),
            pair.name(),
            if wrong.is_empty() { "" } else { "  WRONG" }
        );
        wrong
    });
    let wrong: Vec<Vec<String>> = driven.buffer_unordered(AT_ONCE).collect().await;
    let wrong = wrong.concat();
    assert!(wrong.is_empty(), "{} of {} pairs:\n{}", wrong.len(), pairs.len(), wrong.join("\n"));
    let broken = audit::run(&mut bench.pool.acquire().await.expect("conn")).await.expect("audit");
    assert!(broken.is_empty(), "{broken:?}");
}
