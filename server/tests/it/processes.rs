//! Real processes over one database: servers and workers whose model is rehearsed and takes its time.

use crate::{
    e2e::{binary, folder},
    support::{MIGRATIONS, SECRET, key, read},
};
use loopwright_activities::testing::ClosedPort;
use loopwright_engine::{client::Client, embedded::testing, hook::NoHook};
use loopwright_server::{
    app,
    config::{Config, File},
    rest::auth::{SCOPE_RUN, mint},
    shipped,
};
use reqwest::Method;
use serde_json::{Value, json};
use sqlx::PgPool;
use std::{
    fs,
    net::SocketAddr,
    path::PathBuf,
    process::{Child, ExitStatus},
    sync::Arc,
    time::{Duration, Instant},
};

/// A guard against hangs, nothing else.
pub const GUARD: Duration = Duration::from_secs(120);
/// As long as a rehearsed answer may take.
pub const NEVER_MS: u64 = 30_000;

/// A process of ours, killed when it is forgotten.
pub struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

impl Process {
    pub fn terminate(&self) {
        let pid = i32::try_from(self.0.id()).unwrap();
        // SAFETY: our own child, not waited for yet.
        assert_eq!(unsafe { libc::kill(pid, libc::SIGTERM) }, 0);
    }

    /// Its end, and how long that took.
    pub async fn end(&mut self) -> (ExitStatus, Duration) {
        let began = Instant::now();
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                return (status, began.elapsed());
            }
            assert!(began.elapsed() < GUARD, "it does not end");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

pub struct Stage {
    pub pool: PgPool,
    dir: tempfile::TempDir,
    /// As the server process has it.
    config: Config,
    pub http: reqwest::Client,
    /// What the processes log.
    pub log: &'static str,
    started: u32,
    /// Where its servers listen, which nobody else is given meanwhile.
    ports: Vec<ClosedPort>,
}

impl Stage {
    pub async fn new() -> Self {
        loopwright_server::rest::install_crypto();
        let pool = testing::database(MIGRATIONS).await;
        let client = Client::new(pool.clone(), Arc::new(NoHook));
        shipped::deploy(&client, shipped::SHIPPED, &app::catalog()).await.unwrap();
        let mut config = File::parse("{}").unwrap().resolve().unwrap();
        config.auth.keys = vec![key("default", SECRET)];
        Self { pool, dir: folder(), config, http: reqwest::Client::new(), log: "info", started: 0, ports: Vec::new() }
    }

    fn spawn(&mut self, drain_ms: u64, arguments: &[&str], environment: &[(&str, &str)]) -> Process {
        self.started += 1;
        let dir = self.dir.path().join(self.started.to_string());
        fs::create_dir_all(&dir).unwrap();
        let file = dir.join("loopwright.yaml");
        fs::write(&file, format!("worker: {{ drain_ms: {drain_ms} }}\nhttp: {{ drain_ms: {drain_ms} }}\n")).unwrap();
        let log = fs::File::create(dir.join("log")).unwrap();
        let mut command = binary(&dir.join("data"), &self.pool);
        command
            .env("LOOPWRIGHT_CONFIG", file)
            .env("LOOPWRIGHT_JWT_SECRET", SECRET)
            .env("LOOPWRIGHT_LOG", self.log)
            .envs(environment.iter().copied())
            .args(arguments)
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        Process(command.spawn().unwrap())
    }

    /// A worker whose model thinks for so long before it asks for the greeting.
    pub fn worker(&mut self, drain_ms: u64, thinks_ms: u64) -> Process {
        let rehearsal = self.rehearsal(thinks_ms);
        self.spawn(drain_ms, &["worker", "--rehearsal", rehearsal.to_str().unwrap()], &[])
    }

    fn rehearsal(&self, thinks_ms: u64) -> PathBuf {
        let question = json!({"complete": false, "question": "Which greeting?", "suggestions": ["Hello"],
            "requirements": [], "assumptions": []});
        let entry = json!([{"at": "gather~1/ask:ask", "delay_ms": thinks_ms, "reply": {"json": question}}]);
        let path = self.dir.path().join(format!("thinks-{thinks_ms}.yaml"));
        // JSON is YAML.
        fs::write(&path, entry.to_string()).unwrap();
        path
    }

    pub async fn server(&mut self, drain_ms: u64) -> (Process, SocketAddr) {
        self.server_with(drain_ms, &[]).await
    }

    pub async fn server_with(&mut self, drain_ms: u64, environment: &[(&str, &str)]) -> (Process, SocketAddr) {
        let port = ClosedPort::new();
        let listen = port.address();
        self.ports.push(port);
        let process = self.spawn(drain_ms, &["server", "--listen", &listen.to_string()], environment);
        let began = Instant::now();
        while self.http.get(format!("http://{listen}/readyz")).send().await.is_err() {
            assert!(began.elapsed() < GUARD, "no server");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        (process, listen)
    }

    fn request(&self, server: SocketAddr, method: Method, path: &str) -> reqwest::RequestBuilder {
        let token = mint(&self.config.auth, "owner", SCOPE_RUN, 600).unwrap();
        self.http.request(method, format!("http://{server}{path}")).bearer_auth(token).timeout(GUARD)
    }

    pub async fn project(&self, server: SocketAddr) -> Value {
        let body = json!({"name": "Greeter", "idea": "A script that greets."});
        let made = self.request(server, Method::POST, "/v1/projects").json(&body).send().await.unwrap();
        let (status, body) = read(made).await;
        assert_eq!(status, 201, "{body}");
        body["id"].clone()
    }

    /// Starts the loop of a project and waits for its next task to end, under one key.
    pub fn trigger(&self, server: SocketAddr, project: &Value, prefer: &str) -> reqwest::RequestBuilder {
        self.request(server, Method::POST, "/orchestrate/run-loop")
            .header("prefer", prefer)
            .header("idempotency-key", "one loop")
            .json(&json!({ "project_id": project }))
    }

    pub async fn until(&self, what: &str, holds: &'static str) {
        let began = Instant::now();
        while !sqlx::query_scalar::<_, bool>(holds).fetch_one(&self.pool).await.unwrap() {
            assert!(began.elapsed() < GUARD, "{what} does not happen; logs: {}", self.logs());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Everything that the processes have written, standard output and standard error.
    pub fn logs(&self) -> String {
        let log = |n| fs::read_to_string(self.dir.path().join(format!("{n}/log"))).unwrap_or_default();
        (1..=self.started).map(log).collect::<Vec<_>>().join("\n---\n")
    }

    /// The model is asked, and has not answered.
    pub async fn asked(&self) {
        self.until("a call", "select exists (select from api_key_usage where state = 'started')").await;
    }

    pub async fn answered(&self) {
        let waits = "select exists (select from runs where waiting = 'signal' and parked)";
        self.until("the question", waits).await;
    }

    /// How the calls ended, in order, and what each cost.
    pub async fn calls(&self) -> Vec<(String, bool)> {
        let calls = "select state, cost_pusd > 0 from api_key_usage order by id";
        sqlx::query_as(calls).fetch_all(&self.pool).await.unwrap()
    }

    /// The `n`th process is a worker that has begun, and hears signals.
    pub async fn works(&self, n: u32) {
        let began = Instant::now();
        while !self.said(n, "worker started") {
            assert!(began.elapsed() < GUARD, "no worker; logs: {}", self.logs());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Whether the `n`th process has written these words.
    pub fn said(&self, n: u32, words: &str) -> bool {
        fs::read_to_string(self.dir.path().join(format!("{n}/log"))).unwrap().contains(words)
    }
}
