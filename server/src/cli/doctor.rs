//! `loopwright doctor`: what this machine has, what it lacks, what to do.

use super::{Context, EXIT_FAILED, api_keys::test, print, table};
use crate::{
    app::{self, App},
    config::{Config, VARIABLES},
    postgres::Fallback,
    telemetry::redact,
};
use loopwright_activities::{
    billing::price,
    orchestrator::Role,
    provider::Settings,
    sandbox::{Level, Sandbox},
};
use secrecy::ExposeSecret;
use serde::Serialize;
use std::{process::Command, time::Duration};

/// Largest difference between the clocks of this machine and of the database that is not worth a word.
const CLOCK_MS_MAX: i64 = 2_000;
/// Longest wait for the Bot API.
const TELEGRAM_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Only list the environment variables that are read
    #[arg(long)]
    pub environment: bool,
    /// Ask nobody outside this machine
    #[arg(long)]
    offline: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum State {
    Ok,
    /// Works, with less.
    Warning,
    /// Does not work.
    Failed,
}

#[derive(Debug, Serialize)]
struct Check {
    name: &'static str,
    state: State,
    finding: String,
    /// What to do; empty when nothing is to be done.
    remedy: String,
}

impl Check {
    fn new(name: &'static str, state: State, finding: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { name, state, finding: finding.into(), remedy: remedy.into() }
    }
}

/// Prints the table of variables.
pub(crate) fn environment(json: bool) {
    let rows: Vec<_> =
        VARIABLES.iter().map(|v| vec![v.name.to_owned(), v.key.to_owned(), v.meaning.to_owned()]).collect();
    let value: Vec<_> =
        VARIABLES.iter().map(|v| serde_json::json!({"name": v.name, "key": v.key, "meaning": v.meaning})).collect();
    // Only standard output can fail here, and then there is nobody to tell.
    let _ = print(json, &value, |_| table(&["variable", "key in the file", "meaning"], &rows));
}

pub(crate) async fn run(args: Args, context: Context) -> anyhow::Result<u8> {
    let json = context.json;
    let config = context.config;
    let mut checks =
        vec![data_dir(&config), git(), sandbox(&config), providers(&config), tokens(&config), payload(&config)];
    checks.extend(environment_keys(&config, args.offline).await);
    checks.push(telegram(&config, args.offline).await);
    checks.extend(database(config, args.offline).await);
    let failed = checks.iter().any(|c| c.state == State::Failed);
    print(json, &checks, |checks| {
        let mark = |state| match state {
            State::Ok => "ok",
            State::Warning => "warning",
            State::Failed => "FAILED",
        };
        let mut out = String::new();
        for check in checks {
            out.push_str(&format!("{:<8} {:<10} {}\n", mark(check.state), check.name, check.finding));
            if !check.remedy.is_empty() {
                out.push_str(&format!("{:<8} {:<10} → {}\n", "", "", check.remedy));
            }
        }
        out
    })?;
    Ok(if failed { EXIT_FAILED } else { 0 })
}

fn data_dir(config: &Config) -> Check {
    let dir = &config.data_dir;
    let probe = dir.join(format!(".doctor-{}", std::process::id()));
    let tried = std::fs::create_dir_all(dir)
        .and_then(|()| std::fs::write(&probe, b"x"))
        .and_then(|()| std::fs::remove_file(&probe));
    match tried {
        Ok(()) => Check::new("data", State::Ok, dir.display().to_string(), ""),
        Err(e) => Check::new(
            "data",
            State::Failed,
            format!("{} cannot be written: {e}", dir.display()),
            "name another folder with LOOPWRIGHT_DATA_DIR or make it writable",
        ),
    }
}

fn payload(config: &Config) -> Check {
    let Some(keys) = &config.payload_keys else {
        return Check::new("payload", State::Ok, "no key is configured: what runs store from now on is plain", "");
    };
    let ids: Vec<&str> = keys.ids().collect();
    let finding = match ids.split_first() {
        Some((first, [])) => format!("sealed by key `{first}`"),
        Some((first, others)) => format!("sealed by key `{first}`; also opens `{}`", others.join("`, `")),
        None => String::new(),
    };
    Check::new("payload", State::Ok, finding, "")
}

fn version(program: &str) -> Option<String> {
    let output = Command::new(program).arg("--version").output().ok().filter(|o| o.status.success())?;
    String::from_utf8_lossy(&output.stdout).lines().next().map(|l| l.trim().to_owned())
}

fn git() -> Check {
    match version("git") {
        Some(text) => Check::new("git", State::Ok, text, ""),
        None => Check::new("git", State::Failed, "git does not run", "apt-get install git (or brew install git)"),
    }
}

/// Tries the levels, as a worker does when it starts.
fn sandbox(config: &Config) -> Check {
    let check = |state, finding: &str, remedy: &str| Check::new("sandbox", state, finding, remedy);
    match Sandbox::detect(config.sandbox.settings()).map(|sandbox| sandbox.level()) {
        Ok(Level::Bubblewrap) => check(State::Ok, "bubblewrap", ""),
        Ok(Level::Landlock) => check(
            State::Warning,
            "landlock and seccomp (no bubblewrap)",
            "apt-get install bubblewrap for the stronger level",
        ),
        Ok(Level::Unconfined) => check(
            State::Warning,
            "generated code runs unconfined, as configured",
            "apt-get install bubblewrap, unless this machine is disposable",
        ),
        Err(error) => check(State::Failed, &error.to_string(), "apt-get install bubblewrap"),
    }
}

fn providers(config: &Config) -> Check {
    let read = app::providers(config).and_then(|(_, settings)| Ok(settings.providers()?));
    if let Err(error) = read {
        return Check::new("models", State::Failed, format!("{error:#}"), "correct that setting");
    }
    let p = &config.providers;
    let names: Vec<&str> = [("gemini", &p.gemini), ("openrouter", &p.openrouter), ("openai", &p.openai)]
        .into_iter()
        .filter(|(_, provider)| provider.is_configured())
        .map(|(name, _)| name)
        .collect();
    if names.is_empty() {
        Check::new(
            "models",
            State::Warning,
            "no provider is configured: only `demo` works, with its rehearsed models",
            "set GEMINI_API_KEY, OPENROUTER_API_KEY, or OPENAI_API_KEY with OPENAI_BASE_URL",
        )
    } else {
        Check::new("models", State::Ok, names.join(", "), "")
    }
}

fn tokens(config: &Config) -> Check {
    match crate::rest::auth::Registry::new(&config.auth) {
        Err(error) => Check::new("tokens", State::Failed, error.to_string(), "correct that key"),
        Ok(_) if config.auth.keys.is_empty() && config.auth.jwks_url.is_none() => Check::new(
            "tokens",
            State::Warning,
            "no key is configured: `dev` uses one of this machine, `server` will not start",
            "set LOOPWRIGHT_JWT_SECRET (openssl rand -hex 32)",
        ),
        Ok(_) => Check::new(
            "tokens",
            State::Ok,
            match config.auth.jwks_url.as_ref().and_then(|url| url.host_str()) {
                Some(host) => format!(
                    "{} key(s) and those published at {host}, issuer {}",
                    config.auth.keys.len(),
                    config.auth.issuer
                ),
                None => format!("{} key(s), issuer {}", config.auth.keys.len(), config.auth.issuer),
            },
            "",
        ),
    }
}

async fn telegram(config: &Config, offline: bool) -> Check {
    let Some(token) = &config.telegram.token else {
        return Check::new("telegram", State::Ok, "no bot is configured", "");
    };
    if offline {
        return Check::new("telegram", State::Ok, "a bot is configured; not asked", "");
    }
    crate::rest::install_crypto();
    let base = config.telegram.api_url.as_ref().map_or("https://api.telegram.org/", |u| u.as_str());
    let url = format!("{}/bot{}/getMe", base.trim_end_matches('/'), token.expose_secret());
    let ask = async {
        let client = reqwest::Client::builder().timeout(TELEGRAM_TIMEOUT).build()?;
        client.get(url).send().await?.json::<serde_json::Value>().await
    };
    match ask.await {
        Ok(answer) if answer["ok"] == true => {
            Check::new("telegram", State::Ok, format!("@{}", answer["result"]["username"].as_str().unwrap_or("?")), "")
        }
        Ok(_) => Check::new("telegram", State::Failed, "the token is refused", "correct TELEGRAM_BOT_TOKEN"),
        Err(error) => Check::new(
            "telegram",
            State::Failed,
            redact(&error.without_url().to_string()).into_owned(),
            "check the network, or TELEGRAM_API_URL",
        ),
    }
}

async fn database(config: Config, offline: bool) -> Vec<Check> {
    let embedded = config.database_url.is_none();
    let app = match App::open(config, Fallback::Embedded).await {
        Ok(app) => app,
        Err(error) => {
            // The sentence itself says what helps.
            let text = error.to_string();
            let (finding, remedy) = text.split_once("; ").unwrap_or((&text, ""));
            return vec![Check::new("database", State::Failed, finding, remedy)];
        }
    };
    let mut checks = Vec::new();
    let kind = if embedded { "embedded" } else { "configured" };
    checks.push(match app.store.server_version().await {
        Ok(number) if number >= 150_000 => {
            Check::new("database", State::Ok, format!("{kind}, Postgres {}.{}", number / 10_000, number % 10_000), "")
        }
        Ok(number) => {
            Check::new("database", State::Failed, format!("Postgres {}", number / 10_000), "use Postgres 15 or newer")
        }
        Err(error) => Check::new("database", State::Failed, error.to_string(), "check the database's log"),
    });
    checks.push(match app.store.missing_migrations().await {
        Ok(missing) if missing.is_empty() => Check::new("schema", State::Ok, "up to date", ""),
        Ok(missing) => Check::new(
            "schema",
            State::Warning,
            format!("{} migration(s) missing", missing.len()),
            "loopwright migrate",
        ),
        Err(error) => Check::new("schema", State::Failed, error.to_string(), "check the database's log"),
    });
    checks.push(match app.store.clock_difference_ms().await {
        Ok(ms) if ms.abs() <= CLOCK_MS_MAX => {
            Check::new("clock", State::Ok, format!("{ms} ms from the database's"), "")
        }
        Ok(ms) => Check::new(
            "clock",
            State::Warning,
            format!("{ms} ms from the database's"),
            "synchronize the clocks (chrony or systemd-timesyncd)",
        ),
        Err(error) => Check::new("clock", State::Failed, error.to_string(), "check the database's log"),
    });
    checks.push(keys(&app).await);
    checks.push(prices(&app).await);
    checks.extend(sealed_keys(&app, offline).await);
    app.close().await;
    checks
}

/// Models of roles that have no price, and so are not used.
async fn prices(app: &App) -> Check {
    // What is wrong with them stands under `models`.
    let Ok((routing, settings)) = app::providers(&app.config) else {
        return Check::new("prices", State::Warning, "the models are not known", "correct what `models` says");
    };
    let routing = routing.with_settings(&settings, None).only(&settings.names());
    let own_server = |provider: &str| provider == "openai_compatible" && settings.openai_is_local();
    let candidates = Role::ALL.iter().flat_map(|role| routing.candidates(*role));
    let candidates = candidates
        .filter(|candidate| !own_server(&candidate.provider))
        .map(|candidate| (candidate.provider.clone(), candidate.model.clone()));
    match price::missing(&app.pool, candidates.collect::<Vec<_>>()).await {
        Ok(missing) if missing.is_empty() => Check::new("prices", State::Ok, "every model of a role has one", ""),
        Ok(missing) => {
            let names: Vec<String> =
                missing.into_iter().map(|(provider, model)| format!("{provider}/{model}")).collect();
            Check::new(
                "prices",
                State::Failed,
                format!("no price, so never used: {}", names.join(", ")),
                "loopwright pricing import FILE, or pricing sync",
            )
        }
        Err(error) => Check::new("prices", State::Warning, error.to_string(), "loopwright migrate"),
    }
}

/// The keys of the environment, one line each. What is wrong with the settings themselves is told under `models`.
async fn environment_keys(config: &Config, offline: bool) -> Vec<Check> {
    match test::settings(config) {
        Ok(settings) => ask(&settings, test::of_environment(&settings), offline).await,
        Err(_) => Vec::new(),
    }
}

/// The same of the platform's sealed ones.
async fn sealed_keys(app: &App, offline: bool) -> Vec<Check> {
    let Ok(settings) = test::settings(&app.config) else { return Vec::new() };
    let keys = app.store.keys(&app.config.keys);
    match test::of_platform(&keys, &settings).await {
        Ok(subjects) => ask(&settings, subjects, offline).await,
        Err(error) => vec![Check::new("key", State::Warning, format!("{error:#}"), "loopwright migrate")],
    }
}

async fn ask(settings: &Settings, subjects: Vec<test::Subject>, offline: bool) -> Vec<Check> {
    if offline && !subjects.is_empty() {
        return vec![Check::new("key", State::Ok, format!("{} key(s); not asked", subjects.len()), "")];
    }
    let tested = test::ask(settings, subjects).await;
    let check = |one: test::Tested| {
        let state = match (one.works(), one.remedy.is_empty()) {
            (true, true) => State::Ok,
            (true, false) => State::Warning,
            (false, _) => State::Failed,
        };
        Check::new("key", state, one.finding(), one.remedy)
    };
    tested.into_iter().map(check).collect()
}

/// Keys of providers that are out of service, and whether users' can be opened.
async fn keys(app: &App) -> Check {
    let keys = app.store.keys(&app.config.keys);
    let (list, wrapped) = match (keys.list(None).await, keys.wrapped_by().await) {
        (Ok(list), Ok(wrapped)) => (list, wrapped),
        (Err(error), _) | (_, Err(error)) => {
            return Check::new("keys", State::Warning, error.to_string(), "loopwright migrate");
        }
    };
    let known = |kek: &str| app.config.keys.encryption.as_ref().is_some_and(|ring| ring.ids().any(|id| id == kek));
    if let Some((kek, rows)) = wrapped.iter().find(|(kek, _)| !known(kek)) {
        return Check::new(
            "keys",
            State::Failed,
            format!("{rows} sealed key(s) are wrapped by `{kek}`, which is not configured"),
            "put it back into LOOPWRIGHT_KEY_ENCRYPTION_KEYS, behind the first",
        );
    }
    let out = list.iter().filter(|key| key.user_id.is_none() && key.status == "disabled").count();
    let cooling = list.iter().filter(|key| key.user_id.is_none() && key.status == "cooling").count();
    if out > 0 {
        return Check::new(
            "keys",
            State::Warning,
            format!("{out} of the platform's keys are out of service, {cooling} rest"),
            "loopwright api-keys list; replace them, or `api-keys enable KEY`",
        );
    }
    let users = list.iter().filter(|key| key.user_id.is_some() && key.status != "revoked").count();
    let kept = match app.config.keys.encryption {
        Some(_) => format!("{users} key(s) of users"),
        None => "users keep no keys here".to_owned(),
    };
    Check::new("keys", State::Ok, format!("{kept}; {cooling} of the platform's rest"), "")
}
