//! A server on a real socket over a database of its own.

use loopwright_engine::{embedded::testing, migrate::Migration};
use loopwright_server::{
    app::{self, App},
    config::{Config, File, Key, KeyMaterial},
    postgres::Fallback,
    rest::{auth, serve},
};
use reqwest::{Client, Method, RequestBuilder, Response};
use serde_json::Value;
use sqlx::PgPool;
use std::net::SocketAddr;
use tokio::{sync::watch, task::JoinHandle};

pub const SECRET: &str = "test-secret-test-secret-test-secret-0";
pub const OTHER_SECRET: &str = "another-secret-another-secret-another";

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
