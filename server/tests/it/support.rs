//! A server on a real socket over a database of its own.

use futures_util::future::BoxFuture;
use loopwright_engine::{
    Failure,
    activity::{Activity, Context, Registry},
    client::Deploy,
    definition::{
        Approval, Await, Data, Definition, Expr, FORMAT, Input, Kind, OnTimeout, RetryPolicy, Step, Template, Timeouts,
    },
    embedded::testing,
    hook::{NoHook, TransitionHook},
    migrate::Migration,
    signature::Signature,
    worker::{self, WorkerConfig, WorkerHandle},
};
use loopwright_server::{
    app::{self, App},
    config::{Config, File, Key, KeyMaterial},
    postgres::Fallback,
    rest::{auth, serve},
};
use reqwest::{Client, Method, RequestBuilder, Response};
use serde_json::Value;
use sqlx::PgPool;
use std::{collections::BTreeMap, net::SocketAddr, sync::Arc};
use tokio::{sync::watch, task::JoinHandle};

pub const SECRET: &str = "test-secret-test-secret-test-secret-0";
pub const OTHER_SECRET: &str = "another-secret-another-secret-another";

/// A guard against hangs, nothing else.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(120);

pub struct Server {
    pub address: SocketAddr,
    pub config: Config,
    pub pool: PgPool,
    pub http: Client,
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
    _dir: tempfile::TempDir,
}

pub fn key(kid: &str, secret: &str) -> Key {
    Key { kid: kid.into(), material: KeyMaterial::Hs256(secret.to_owned().into()) }
}

impl Server {
    pub async fn start() -> Self {
        Self::start_with(|_| {}).await
    }

    /// With a configuration that `change` has had in its hands.
    pub async fn start_with(change: impl FnOnce(&mut Config)) -> Self {
        let pool = testing::database(MIGRATIONS).await;
        let dir = tempfile::tempdir().unwrap();
        let mut config = File::parse("http: { listen: '127.0.0.1:0' }").unwrap().resolve().unwrap();
        config.database_url = Some(testing::url(&pool).into());
        config.data_dir = dir.path().to_owned();
        config.auth.keys = vec![key("a", SECRET), key("b", OTHER_SECRET)];
        change(&mut config);
        let app = App::open(config.clone(), Fallback::None).await.unwrap();
        let listener = serve::bind(config.http.listen).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = watch::channel(false);
        let task = tokio::spawn(async move { app::serve_http(&app, listener, stopped).await.unwrap() });
        Self { address, config, pool, http: Client::new(), stop, task, _dir: dir }
    }

    pub fn token(&self, subject: &str) -> String {
        auth::mint(&self.config.auth, subject, "loop:run", 600).unwrap()
    }

    pub fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.http.request(method, format!("http://{}{path}", self.address))
    }

    /// As the user `subject`.
    pub fn get(&self, subject: &str, path: &str) -> RequestBuilder {
        self.request(Method::GET, path).bearer_auth(self.token(subject))
    }

    pub fn post(&self, subject: &str, path: &str, body: &Value) -> RequestBuilder {
        self.request(Method::POST, path).bearer_auth(self.token(subject)).json(body)
    }

    /// A project of the user, by its id.
    pub async fn project(&self, subject: &str) -> String {
        let body = serde_json::json!({"name": "Greeter", "idea": "A program that greets."});
        let (status, body) = read(self.post(subject, "/v1/projects", &body).send().await.unwrap()).await;
        assert_eq!(status, 201, "{body}");
        body["id"].as_str().unwrap().to_owned()
    }

    /// Stops as a signal would and waits until the last connection is closed.
    pub async fn stop(self) {
        self.stop.send_replace(true);
        self.task.await.unwrap();
    }
}

/// An activity that does what the test says.
pub struct Work {
    name: &'static str,
    script: Script,
    metered: bool,
}
pub type Script = Arc<dyn Fn(Context, Value) -> BoxFuture<'static, Result<Value, Failure>> + Send + Sync>;

impl Work {
    pub fn new(name: &'static str, script: Script) -> Self {
        Self { name, script, metered: false }
    }
    /// The hook hears of its attempts.
    pub fn metered(self) -> Self {
        Self { metered: true, ..self }
    }
}

impl Activity for Work {
    fn signature(&self) -> Signature {
        Signature {
            name: self.name.into(),
            summary: "what the test says".into(),
            input_schema: serde_json::json!({"type": "object"}),
            output_schema: serde_json::json!({}),
            run_timeout_ms: 60_000,
            heartbeat_timeout_ms: None,
            metered: self.metered,
            idempotent: true,
            failure_codes: vec![],
        }
    }
    fn run(&self, ctx: Context, input: Value) -> BoxFuture<'static, Result<Value, Failure>> {
        (self.script)(ctx, input)
    }
}

pub fn script<F, Fut>(f: F) -> Script
where
    F: Fn(Context) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<Value, Failure>> + Send + 'static,
{
    Arc::new(move |ctx, _| Box::pin(f(ctx)))
}

pub fn step(id: &str, kind: Kind) -> Step {
    Step {
        id: id.into(),
        condition: None,
        kind,
        retry: RetryPolicy { attempts: 2, delay_ms: 10, jitter: 0.0, ..RetryPolicy::default() },
        timeouts: Timeouts::default(),
        catch: vec![],
        continue_on_error: false,
    }
}

pub fn activity(id: &str, name: &str) -> Step {
    step(id, Kind::Activity { name: name.into(), with: BTreeMap::new() })
}

/// Waits for the signal `user_message` with a text.
pub fn question(id: &str, approval: Option<Approval>) -> Step {
    let form = serde_json::json!({"type": "object", "required": ["text"], "properties": {"text": {"type": "string"}}});
    step(
        id,
        Kind::Await(Box::new(Await {
            signal: if approval.is_some() { id.into() } else { "user_message".into() },
            timeout_ms: 600_000,
            form: approval.is_none().then_some(form),
            show: Some(Template("Which color?".into())),
            to: vec![],
            filter: None,
            remind_ms: vec![],
            on_timeout: OnTimeout::Fail,
            default: None,
            approval,
            reply: None,
        })),
    )
}

impl Server {
    pub fn client(&self) -> loopwright_engine::client::Client {
        loopwright_engine::client::Client::new(self.pool.clone(), Arc::new(loopwright_engine::hook::NoHook))
    }

    /// Deploys a `dev-loop` of these steps.
    pub async fn deploy(&self, steps: Vec<Step>) {
        self.deploy_as("dev-loop", &["project_id", "idea"], steps).await;
    }

    /// Deploys these steps under a name, with inputs that it must have.
    pub async fn deploy_as(&self, name: &str, inputs: &[&str], steps: Vec<Step>) {
        let input = || Input { schema: serde_json::json!({"type": "string"}), required: true, default: None };
        let definition = Definition {
            format: FORMAT,
            name: name.into(),
            inputs: inputs.iter().map(|name| ((*name).to_owned(), input())).collect(),
            env: BTreeMap::new(),
            timeout_ms: 3_600_000,
            budget: Value::Null,
            concurrency: None,
            executions_max: 1000,
            steps,
            finally: vec![],
            outputs: BTreeMap::new(),
            runs_on: Vec::new(),
            queries: BTreeMap::from([("at".to_owned(), Data::Expr(Expr("run.status".into())))]),
            extras: Value::Null,
        };
        let deploy = Deploy { definition, bundle: BTreeMap::new(), source: String::new(), author: None, message: None };
        self.client().deploy(deploy).await.unwrap();
    }

    /// Starts a worker with these activities.
    pub async fn worker(&self, activities: Vec<Work>) -> WorkerHandle {
        self.worker_with(activities, Arc::new(NoHook)).await
    }

    pub async fn worker_with(&self, activities: Vec<Work>, hook: Arc<dyn TransitionHook>) -> WorkerHandle {
        let registry = activities.into_iter().fold(Registry::new(), Registry::with);
        let config = WorkerConfig { hook, ..WorkerConfig::new(self.pool.clone(), registry) };
        worker::start(config).await.unwrap()
    }

    /// Asks the server to stop as soon as a request with an idempotency key is under way.
    pub async fn interrupt(&self) {
        self.claimed().await;
        self.stop.send_replace(true);
    }

    /// Waits until a request is under way under an idempotency key.
    pub async fn claimed(&self) {
        let open = "select exists (select from idempotency_keys where status is null)";
        while !sqlx::query_scalar::<_, bool>(open).fetch_one(&self.pool).await.unwrap() {}
    }

    /// From here on no answer is kept under an idempotency key.
    pub async fn break_answers(&self) {
        sqlx::raw_sql(
            "create function no_answer() returns trigger language plpgsql as $$ begin
               if new.status is not null then raise exception 'broken'; end if; return new; end $$;
             create trigger no_answer before update on idempotency_keys for each row execute function no_answer();",
        )
        .execute(&self.pool)
        .await
        .unwrap();
    }

    pub async fn mend_answers(&self) {
        sqlx::raw_sql("drop trigger no_answer on idempotency_keys; drop function no_answer")
            .execute(&self.pool)
            .await
            .unwrap();
    }

    /// Waits until the run is as `holds` says.
    pub async fn until(&self, run: &str, holds: impl Fn(&loopwright_engine::view::RunView) -> bool) {
        let (run, client) = (run.parse().unwrap(), self.client());
        let deadline = tokio::time::Instant::now() + PATIENCE;
        loop {
            let view = client.describe(run).await.unwrap();
            if holds(&view) {
                return;
            }
            assert!(tokio::time::Instant::now() < deadline, "{view:#?}");
            client.wait_change(run, view.seq, std::time::Duration::from_secs(1)).await.unwrap();
        }
    }

    /// Triggers the loop of the project.
    pub async fn trigger(&self, subject: &str, project: &str, prefer: &str) -> Response {
        let body = serde_json::json!({ "project_id": project });
        self.post(subject, "/orchestrate/run-loop", &body).header("prefer", prefer).send().await.unwrap()
    }
}

/// The run that an answer points to.
pub fn run_of(response: &Response) -> String {
    response.headers()["location"].to_str().unwrap().strip_prefix("/v1/runs/").unwrap().to_owned()
}

pub async fn read(response: Response) -> (u16, Value) {
    let status = response.status().as_u16();
    let text = response.text().await.unwrap();
    (status, serde_json::from_str(&text).unwrap_or(Value::String(text)))
}

/// Reads a refusal and checks that it is a problem document with this status and code.
pub async fn problem(response: Response, status: u16, code: &str) -> Value {
    let kind = response.headers().get("content-type").map(|v| v.to_str().unwrap().to_owned());
    let (got, body) = read(response).await;
    assert_eq!((got, body["code"].as_str()), (status, Some(code)), "{body}");
    assert_eq!(kind.as_deref(), Some("application/problem+json"));
    assert_eq!(body["status"], status);
    assert!(body["type"].is_string() && body["title"].is_string() && body["detail"].is_string(), "{body}");
    body
}

pub const MIGRATIONS: &[Migration] = loopwright_activities::MIGRATIONS;
