//! Composition: the only place that constructs things. Everything else is handed what it works with.
//!
//! ```text
//! Config ─▶ App { pool, client, store } ─┬─▶ serve_http   (REST)
//!                                        ├─▶ start_worker (engine's worker over the activities)
//!                                        └─▶ the command line
//! ```

use crate::{
    config::{Config, Key, KeyMaterial},
    postgres::{self, Database, Fallback},
    rest::{self, Archives, State, serve},
    store::Store,
    telemetry,
};
use anyhow::Context;
use loopwright_engine::{
    activity::Registry,
    client::Client,
    hook::{NoHook, TransitionHook},
    signature::Catalog,
    worker::{self, WorkerConfig, WorkerHandle},
};
use secrecy::SecretString;
use sqlx::PgPool;
use std::{io::Write, os::unix::fs::OpenOptionsExt, path::Path, sync::Arc, time::Duration};
use tokio::{net::TcpListener, sync::watch};

/// Key id of the development secret.
const DEVELOPMENT_KID: &str = "development";
/// Before a worker that lost its lease is replaced.
const RESTART_PAUSE: Duration = Duration::from_secs(1);
/// Its file in the data folder.
const DEVELOPMENT_SECRET: &str = "jwt.secret";

/// What a command works with.
pub struct App {
    pub config: Config,
    pub pool: PgPool,
    pub client: Client,
    pub store: Store,
    /// The ledger; the same for workers and client.
    pub hook: Arc<dyn TransitionHook>,
    /// Address of the database, for child processes.
    pub database_url: String,
    server: Option<loopwright_engine::embedded::Server>,
}

impl App {
    /// Opens the database, as it stands.
    ///
    /// # Errors
    /// No database: one sentence with the remedy.
    pub async fn open(config: Config, fallback: Fallback) -> Result<Self, postgres::Error> {
        rest::install_crypto();
        let Database { pool, url, server } = postgres::open(&config, fallback).await?;
        let hook = hook(&config);
        let client = Client::new(pool.clone(), hook.clone());
        let store = Store::new(pool.clone());
        Ok(Self { config, pool, client, store, hook, database_url: url, server })
    }

    /// [`Self::open`], then migrates: for commands of one machine, where nobody else does.
    pub async fn open_migrated(config: Config, fallback: Fallback) -> Result<Self, postgres::Error> {
        let app = Self::open(config, fallback).await?;
        app.migrate().await?;
        Ok(app)
    }

    /// Brings the database to the schema of this program.
    pub async fn migrate(&self) -> Result<(), postgres::Error> {
        Ok(loopwright_engine::migrate::run(&self.pool, loopwright_activities::MIGRATIONS).await?)
    }

    /// Closes the connections and stops the embedded Postgres, if this process started it.
    pub async fn close(self) {
        self.pool.close().await;
        if let Some(server) = self.server {
            // Waiting blocks; a server that is not waited for ends by itself.
            let _ = tokio::task::spawn_blocking(move || server.stop()).await;
        }
    }
}

/// Serves REST until `stop` turns true and open requests have finished.
///
/// # Errors
/// A signing key that cannot be read.
pub async fn serve_http(app: &App, listener: TcpListener, stop: watch::Receiver<bool>) -> anyhow::Result<()> {
    let state = rest_state(app, stop.clone())?;
    let upkeep = tokio::spawn(telemetry::metrics_upkeep());
    serve::serve(listener, &app.config.http, state, stop).await;
    upkeep.abort();
    Ok(())
}

/// What the routes work with.
///
/// # Errors
/// A signing key that cannot be read.
pub fn rest_state(app: &App, stop: watch::Receiver<bool>) -> Result<State, crate::config::Error> {
    let archives: Arc<dyn Archives> = Arc::new(app.store.clone());
    State::new(&app.config, app.store.clone(), app.client.clone(), archives, telemetry::metrics(), stop)
}

/// Gives the configuration a key for tokens of this machine, kept in the data folder, unless it has one.
///
/// # Errors
/// The data folder cannot be written.
pub fn with_development_key(mut config: Config) -> anyhow::Result<Config> {
    if config.auth.keys.is_empty() {
        let path = config.data_dir.join(DEVELOPMENT_SECRET);
        let secret = development_secret(&path).with_context(|| {
            format!(
                "the development secret {} can be neither read nor written; set LOOPWRIGHT_JWT_SECRET or name another \
                 folder with LOOPWRIGHT_DATA_DIR",
                path.display()
            )
        })?;
        config.auth.keys.push(Key { kid: DEVELOPMENT_KID.into(), material: KeyMaterial::Hs256(secret) });
    }
    Ok(config)
}

fn development_secret(path: &Path) -> anyhow::Result<SecretString> {
    if let Ok(text) = std::fs::read_to_string(path)
        && text.trim().len() >= crate::config::JWT_SECRET_BYTES_MIN
    {
        return Ok(text.trim().to_owned().into());
    }
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let mut bytes = [0u8; 32];
    ring::rand::SecureRandom::fill(&ring::rand::SystemRandom::new(), &mut bytes)
        .map_err(|_| anyhow::anyhow!("no random bytes"))?;
    let text: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
    // Written beside and linked into place: of two processes at once one wins and both read the same.
    let staging = path.with_extension(format!("{}", std::process::id()));
    let mut file = std::fs::File::options().write(true).create(true).truncate(true).mode(0o600).open(&staging)?;
    file.write_all(text.as_bytes())?;
    let linked = std::fs::hard_link(&staging, path);
    std::fs::remove_file(&staging)?;
    match linked {
        Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => Err(e.into()),
        _ => Ok(std::fs::read_to_string(path)?.trim().to_owned().into()),
    }
}

/// Turns true at the first SIGINT or SIGTERM. A second one ends the process at once.
///
/// # Errors
/// The process may not watch its signals.
pub fn stop_on_signal() -> anyhow::Result<watch::Receiver<bool>> {
    use tokio::signal::unix::{SignalKind, signal};
    let (sender, receiver) = watch::channel(false);
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::spawn(async move {
        for count in 0.. {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
            if count > 0 {
                tracing::warn!("stopped at once; runs go on where they were");
                std::process::exit(crate::cli::EXIT_INTERRUPTED.into());
            }
            tracing::info!("stopping: open work is finished or handed back; once more stops at once");
            sender.send_replace(true);
        }
    });
    Ok(receiver)
}

/// Starts the engine's worker over the activities.
///
/// # Errors
/// What the activities need is missing, such as a sandbox; the worker cannot register.
pub async fn start_worker(app: &App) -> anyhow::Result<WorkerHandle> {
    let worker = &app.config.worker;
    let config = WorkerConfig {
        pool: app.pool.clone(),
        registry: registry(app)?,
        hook: app.hook.clone(),
        queues: worker.queues.clone(),
        slots: u32::try_from(worker.slots).unwrap_or(u32::MAX),
        lease: Duration::from_millis(worker.lease_ms.into()),
    };
    Ok(worker::start(config).await?)
}

/// Works until `stop` turns true, then drains. A worker that lost its lease (the process slept, the database was away)
/// counts as dead, so another one takes its place.
///
/// # Errors
/// Those of [`start_worker`].
pub async fn run_worker(app: &App, mut stop: watch::Receiver<bool>) -> anyhow::Result<()> {
    let grace = Duration::from_millis(app.config.worker.drain_ms);
    loop {
        let worker = start_worker(app).await?;
        let fenced = tokio::select! {
            () = worker.fenced() => true,
            // Nobody left to say so means stop as well.
            _ = async { stop.wait_for(|stop| *stop).await.is_ok() } => false,
        };
        worker.drain(if fenced { Duration::ZERO } else { grace }).await;
        if !fenced {
            return Ok(());
        }
        tracing::warn!("the worker lost its lease; a new one starts");
        tokio::time::sleep(RESTART_PAUSE).await;
    }
}

/// The activities of this program.
fn registry(app: &App) -> anyhow::Result<Registry> {
    let _ = app;
    Ok(Registry::new())
}

/// The contracts of the activities of this program. Needs no database.
#[must_use]
pub fn catalog() -> Catalog {
    loopwright_activities::catalog()
}

/// The ledger's part in the engine's transactions.
fn hook(config: &Config) -> Arc<dyn TransitionHook> {
    let _ = config;
    Arc::new(NoHook)
}
