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
    shipped,
    store::Store,
    telegram, telemetry,
};
use anyhow::Context;
use loopwright_activities::{
    billing::{BillingSettings, LedgerHook, MicroCredits, Rate, price},
    git::Git,
    keys::Keys,
    orchestrator::{Orchestrator, Role, Routing, route::ListedLimits},
    provider::{Scripted, Settings as ProviderSettings, account::OpenRouterAccount},
    reconcile::{self, Books, Stars},
    sandbox::Sandbox,
    toolbox::Toolbox,
    workspace::Workspaces,
};
use loopwright_engine::{
    client::Client,
    migrate,
    signature::Catalog,
    transaction::is_transient,
    worker::{self, WorkerConfig, WorkerHandle},
};
use secrecy::SecretString;
use sqlx::PgPool;
use std::{
    io::Write,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use tokio::{net::TcpListener, sync::watch};

/// Key id of the development secret.
const DEVELOPMENT_KID: &str = "development";
/// Said while the database that a worker was lost with is away.
pub const NOT_YET: &str = "a new worker cannot start yet";
/// Before a worker that lost its lease is replaced, and between tries to.
const RESTART_PAUSE: Duration = Duration::from_secs(1);
/// Exit code of a program that was interrupted twice.
pub const EXIT_INTERRUPTED: u8 = 130;
/// Its file in the data folder.
const DEVELOPMENT_SECRET: &str = "jwt.secret";

/// What a command works with.
pub struct App {
    pub config: Config,
    pub pool: PgPool,
    pub client: Client,
    pub store: Store,
    /// The ledger; the same for workers and client.
    pub hook: Arc<LedgerHook>,
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
        loopwright_engine::payload::install(config.payload_keys.clone());
        let Database { pool, url, server } = postgres::open(&config, fallback).await?;
        let hook = hook(&config);
        let client = Client::new(pool.clone(), hook.clone());
        let store = Store::new(pool.clone(), billing(&config).welcome);
        Ok(Self { config, pool, client, store, hook, database_url: url, server })
    }

    /// [`Self::open`], then migrates: for commands of one machine, where nobody else does. Where there are two roles, the
    /// application's leaves that to the owner and finds it done.
    pub async fn open_migrated(config: Config, fallback: Fallback) -> Result<Self, postgres::Error> {
        let app = Self::open(config, fallback).await?;
        if !app.finds_it_done().await? {
            app.migrate().await?;
        }
        Ok(app)
    }

    /// Whether this role makes no tables, and none is missing: to migrate would be refused though there is nothing to do.
    async fn finds_it_done(&self) -> Result<bool, postgres::Error> {
        let makes: bool = sqlx::query_scalar("select coalesce(has_schema_privilege(current_schema(), 'create'), true)")
            .fetch_one(&self.pool)
            .await
            .map_err(migrate::Error::Sql)?;
        let missing = migrate::missing(&self.pool, loopwright_activities::MIGRATIONS);
        Ok(!makes && missing.await.map_err(migrate::Error::Sql)?.is_empty())
    }

    /// Brings the database to the schema of this program.
    pub async fn migrate(&self) -> Result<(), postgres::Error> {
        Ok(loopwright_engine::migrate::run(&self.pool, loopwright_activities::MIGRATIONS).await?)
    }

    /// Deploys the definitions that this program ships, unless a team's own version is current.
    ///
    /// # Errors
    /// Those of [`shipped::deploy`].
    pub async fn deploy_shipped(&self) -> Result<(), loopwright_engine::Error> {
        shipped::deploy(&self.client, shipped::SHIPPED, &catalog()).await.map(drop)
    }

    /// Has the embedded Postgres started again when it dies. Resolves when that is given up; never, if this process did not
    /// start it.
    pub async fn database_lost(&self) -> loopwright_engine::embedded::Error {
        match &self.server {
            Some(server) => server.supervise().await,
            None => std::future::pending().await,
        }
    }

    /// Makes the schedules of what this program ships, unless they are there.
    ///
    /// # Errors
    /// Those of [`shipped::schedule`].
    pub async fn schedule_shipped(&self) -> Result<(), loopwright_engine::Error> {
        shipped::schedule(&self.client, shipped::SHIPPED, &catalog()).await.map(drop)
    }

    /// What the reconciliation works with, as far as it is configured here.
    ///
    /// # Errors
    /// A setting cannot be used.
    pub fn books(&self, candidates: Vec<(String, String)>) -> anyhow::Result<Books> {
        let settings = ProviderSettings::from_lookup(&|name| self.config.provider_setting(name))?;
        let sealed = Arc::new(self.store.keys(&self.config.keys));
        let openrouter = match OpenRouterAccount::with_more(&settings, Some(sealed)) {
            Ok(account) => Some(account),
            Err(why) if settings.openrouter.is_some() => return Err(anyhow::Error::msg(why)),
            // Nobody has configured it: a machine without certificates must not fail for it.
            Err(why) => {
                tracing::debug!(why, "sealed keys of OpenRouter are not reconciled by this process");
                None
            }
        };
        let stars = telegram::StarList::configured(&self.config.telegram)?;
        // A server of one's own has the price for every model.
        let own_server = |provider: &str| provider == "openai_compatible" && settings.openai_is_local();
        let candidates = candidates.into_iter().filter(|(provider, _)| !own_server(provider)).collect();
        Ok(Books {
            pool: self.pool.clone(),
            client: self.client.clone(),
            openrouter: openrouter.map(Arc::new),
            stars: stars.map(|stars| Arc::new(stars) as Arc<dyn Stars>),
            candidates,
        })
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
    let depths = worker::publish_queue_depths(app.pool.clone(), app.config.worker.queues.clone());
    let depths = tokio::spawn(depths);
    serve::serve(listener, &app.config.http, state, stop).await;
    upkeep.abort();
    depths.abort();
    Ok(())
}

/// Runs the bot until `stop` turns true; without a token there is none, and this only waits.
///
/// # Errors
/// The token is refused.
pub async fn run_bot(app: &App, mut stop: watch::Receiver<bool>) -> anyhow::Result<()> {
    if app.config.telegram.token.is_none() {
        // Nobody left to say so means stop as well.
        drop(stop.wait_for(|stop| *stop).await);
        return Ok(());
    }
    let parts = telegram::Parts {
        store: app.store.clone(),
        client: app.client.clone(),
        archives: Arc::new(app.store.clone()),
        settings: app.config.telegram.clone(),
        billing: app.config.billing,
        pace: telegram::Pace::default(),
    };
    telegram::run(parts, stop).await
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
                std::process::exit(EXIT_INTERRUPTED.into());
            }
            tracing::info!("stopping: open work is finished or handed back; once more stops at once");
            sender.send_replace(true);
        }
    });
    Ok(receiver)
}

/// The machine lacks something that work needs; the text says what helps.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Lacks(String);

/// Makes a folder, if it is not there.
///
/// # Errors
/// [`Lacks`] a folder that can be written.
pub(crate) fn writable(dir: &Path) -> Result<(), Lacks> {
    std::fs::create_dir_all(dir).map_err(|e| {
        Lacks(format!(
            "the data folder {} cannot be written ({e}); name another one with LOOPWRIGHT_DATA_DIR",
            dir.display()
        ))
    })
}

/// Who answers when activities ask a model.
#[derive(Clone, Debug, Default)]
pub enum Models {
    /// The providers of the configuration.
    #[default]
    Configured,
    /// A script of rehearsed answers; it says so wherever a model is named.
    Rehearsed(PathBuf),
    /// The rehearsal of the demo.
    Demo,
}

impl Models {
    /// From a command line: a file, or `demo`.
    #[must_use]
    pub fn from_rehearsal(file: Option<PathBuf>) -> Self {
        match file {
            None => Self::Configured,
            Some(file) if file.as_os_str() == "demo" => Self::Demo,
            Some(file) => Self::Rehearsed(file),
        }
    }
}

/// Starts the engine's worker over the activities.
///
/// # Errors
/// What the activities need is missing, such as a sandbox; the worker cannot register.
pub async fn start_worker(app: &App, toolbox: &Arc<Toolbox>) -> anyhow::Result<WorkerHandle> {
    let worker = &app.config.worker;
    let orchestrator = &toolbox.orchestrator;
    let books = app.books(Role::ALL.iter().flat_map(|role| orchestrator.candidates(*role)).collect())?;
    let config = WorkerConfig {
        pool: app.pool.clone(),
        registry: reconcile::register(loopwright_activities::registry(toolbox.clone()), &Arc::new(books)),
        hook: app.hook.clone(),
        queues: worker.queues.clone(),
        labels: worker.labels.clone(),
        slots: u32::try_from(worker.slots).unwrap_or(u32::MAX),
        retention: app.config.retention.clone(),
        lease: Duration::from_millis(worker.lease_ms.into()),
    };
    Ok(worker::start(config).await?)
}

/// Works until `stop` turns true, then drains.
///
/// # Errors
/// Those of [`start_worker`].
pub async fn run_worker(app: &App, models: &Models, stop: watch::Receiver<bool>) -> anyhow::Result<()> {
    let toolbox = Arc::new(toolbox(app, models).await?);
    tracing::info!(sandbox = ?toolbox.sandbox.level(), "generated code is confined");
    if toolbox.orchestrator.is_rehearsed() {
        tracing::warn!("models are rehearsed: answers come from a script");
    } else if !toolbox.orchestrator.is_served() {
        tracing::warn!(
            "no model provider is configured; set GEMINI_API_KEY, OPENROUTER_API_KEY or OPENAI_BASE_URL, or `loopwright api-keys add --platform`"
        );
    }
    let grace = Duration::from_millis(app.config.worker.drain_ms);
    tokio::select! {
        done = keep_working(async || start_worker(app, &toolbox).await, grace, stop) => done,
        never = app.hook.wake_waiting(&app.client) => match never {},
        never = toolbox.orchestrator.keep_keys() => match never {},
    }
}

/// Works by what `start` starts until `stop` turns true, then drains within `grace`. A worker that lost its lease (the process slept, the
/// database was away) counts as dead, so another one takes its place, as soon as the database is there again.
///
/// # Errors
/// Those of `start`: the first time all, later those that no waiting cures.
pub(crate) async fn keep_working(
    start: impl AsyncFn() -> anyhow::Result<WorkerHandle>,
    grace: Duration,
    mut stop: watch::Receiver<bool>,
) -> anyhow::Result<()> {
    let mut worker = start().await?;
    loop {
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
        worker = loop {
            let begun = async {
                tokio::time::sleep(RESTART_PAUSE).await;
                start().await
            };
            let begun = tokio::select! {
                begun = begun => begun,
                _ = async { stop.wait_for(|stop| *stop).await.is_ok() } => return Ok(()),
            };
            match begun {
                Ok(worker) => break worker,
                Err(error) if is_away(&error) => {
                    tracing::warn!(%error, "{NOT_YET}");
                }
                Err(error) => return Err(error),
            }
        };
    }
}

/// Whether the database is at fault, and may be there a moment later.
fn is_away(error: &anyhow::Error) -> bool {
    match error.downcast_ref::<loopwright_engine::Error>() {
        Some(loopwright_engine::Error::Sql(error)) => is_transient(error),
        Some(loopwright_engine::Error::InDoubt(_)) => true,
        _ => false,
    }
}

/// Contracts of the activities that definitions may name.
#[must_use]
pub fn catalog() -> Catalog {
    loopwright_activities::catalog()
}

/// What the activities of this program work with.
///
/// # Errors
/// No sandbox works here; a provider's setting cannot be used; the rehearsal cannot be read; no git.
pub async fn toolbox(app: &App, models: &Models) -> anyhow::Result<Toolbox> {
    let config = &app.config;
    let keys = app.store.keys(&config.keys);
    // Without them limits that no file names are guessed.
    let listed = price::limits(&app.pool).await.unwrap_or_else(|error| {
        tracing::warn!(%error, "limits of models could not be read from the price list");
        ListedLimits::new()
    });
    let orchestrator = orchestrator(config, models, &keys, listed).await?;
    let settings = config.sandbox.settings();
    // Finding out starts processes and waits for them.
    let sandbox = tokio::task::spawn_blocking(move || Sandbox::detect(settings)).await??;
    Git::installed().await.map_err(|failure| Lacks(failure.message))?;
    let data_dir = config.data_dir.join("work");
    writable(&data_dir)?;
    Ok(Toolbox {
        orchestrator,
        workspaces: Workspaces::new(data_dir.clone(), app.pool.clone()),
        sandbox,
        pool: app.pool.clone(),
        data_dir,
        rate: billing(config).rate,
    })
}

/// Which models are configured, and how to reach them; nobody is asked.
///
/// # Errors
/// The routing file or a setting cannot be used, by name.
pub fn providers(config: &Config) -> anyhow::Result<(Routing, ProviderSettings)> {
    let routing = match &config.models.file {
        Some(path) => {
            let text = std::fs::read_to_string(path)
                .with_context(|| format!("the routing file {} cannot be read", path.display()))?;
            Routing::from_yaml(&text).with_context(|| path.display().to_string())?
        }
        None => Routing::shipped(),
    };
    let settings = ProviderSettings::from_lookup(&|name| config.provider_setting(name))?;
    Ok((routing, settings))
}

async fn orchestrator(
    config: &Config,
    models: &Models,
    keys: &Keys,
    listed: ListedLimits,
) -> anyhow::Result<Orchestrator> {
    let script = match models {
        Models::Configured => {
            let (routing, settings) = providers(config)?;
            let routing = routing.with_settings(&settings, None).with_listed_limits(&listed);
            return Ok(Orchestrator::configured(routing, &settings, Some(keys)).await?);
        }
        Models::Rehearsed(path) => Scripted::load(path).with_context(|| path.display().to_string())?,
        Models::Demo => Scripted::from_yaml(shipped::REHEARSAL)?,
    };
    Ok(Orchestrator::new(Routing::rehearsed(), vec![Arc::new(script)]))
}

/// How credits are counted.
#[must_use]
pub fn billing(config: &Config) -> BillingSettings {
    BillingSettings {
        rate: Rate {
            credits_per_usd: i64::from(config.billing.credits_per_usd),
            markup_bps: i32::try_from(config.billing.markup_bps).unwrap_or(i32::MAX),
        },
        welcome: MicroCredits::from_credits(i64::from(config.billing.welcome_credits)),
    }
}

/// The ledger's part in the engine's transactions.
fn hook(config: &Config) -> Arc<LedgerHook> {
    Arc::new(LedgerHook::new(billing(config)))
}
