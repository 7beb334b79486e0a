//! What an operator may set: a file, then the environment, then flags; the later wins. Keys that nobody knows are
//! errors, because a misspelt limit is no limit.
//!
//! Does not connect to anything. Start reading at [`Config::load`].

mod env;
mod file;

pub use env::{VARIABLES, Variable};
pub use file::File;
pub(crate) use file::{keep_of, labels};

use loopwright_engine::payload::PayloadKeys;
use secrecy::{ExposeSecret, SecretString};
use std::{net::SocketAddr, path::PathBuf};
use url::Url;

/// Shortest secret of a symmetric key, in bytes. Source: RFC 7518 section 3.2, a key as long as the hash.
pub const JWT_SECRET_BYTES_MIN: usize = 32;
/// Longest leeway between clocks, in seconds.
pub const LEEWAY_S_MAX: u64 = 30;

/// Longest life of a token, in seconds, unless somebody says otherwise: machines fetch a new one as often as they like.
pub const LIFETIME_S_MAX: u64 = 900;
/// The same with this machine's own key, which people try things with by hand.
pub const LIFETIME_S_MAX_DEVELOPMENT: u64 = 86_400;

/// Why the configuration does not stand. Each names the key and what helps.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the configuration file {} cannot be read: {reason}", path.display())]
    Unreadable { path: PathBuf, reason: String },
    #[error("the configuration file {}: {reason}", path.display())]
    File { path: PathBuf, reason: String },
    #[error("unknown environment variable {name}{}; known ones are listed by `loopwright doctor --environment`", near.as_ref().map(|n| format!(" (did you mean {n}?)")).unwrap_or_default())]
    UnknownVariable { name: String, near: Option<&'static str> },
    #[error("{key}: {reason}")]
    Value { key: String, reason: String },
}

impl Error {
    pub(crate) fn value(key: impl Into<String>, reason: impl ToString) -> Self {
        Self::Value { key: key.into(), reason: reason.to_string() }
    }
}

/// Everything that can be set, complete and valid.
///
/// `Debug` prints `[REDACTED]` in place of every secret.
#[derive(Clone, Debug)]
pub struct Config {
    /// `None`: the embedded Postgres.
    pub database_url: Option<SecretString>,
    /// Caches, the embedded Postgres, the development secret. Nothing in it is the only copy but the first and last.
    pub data_dir: PathBuf,
    /// What runs store is sealed with these. `None`: it is plain.
    pub payload_keys: Option<PayloadKeys>,
    pub keys: Keys,
    pub http: Http,
    pub auth: Auth,
    pub sandbox: Sandbox,
    pub providers: Providers,
    pub models: Models,
    pub telegram: Telegram,
    pub billing: Billing,
    pub worker: Worker,
    /// `None`: nothing ever leaves the database.
    pub retention: Option<loopwright_engine::retention::Policy>,
    pub log: Log,
}

/// Where keys of users are kept.
#[derive(Clone, Debug)]
pub struct Keys {
    /// `None`: users keep no keys here.
    pub encryption: Option<loopwright_activities::keys::Ring>,
    /// Whether users may name servers on this machine.
    pub loopback: bool,
}

/// The listener and its limits.
#[derive(Clone, Debug)]
pub struct Http {
    pub listen: SocketAddr,
    /// Largest request body, in bytes.
    pub body_bytes_max: usize,
    pub connections_max: usize,
    /// From the first byte of a request to the end of its headers.
    pub header_timeout_ms: u64,
    /// Per user, with bursts of a quarter of it.
    pub requests_per_minute: u32,
    /// Open event streams of this process.
    pub streams_max: usize,
    /// From the request to stop until connections are cut.
    pub drain_ms: u64,
}

/// Who may call.
#[derive(Clone, Debug)]
pub struct Auth {
    /// The only issuer that is believed.
    pub issuer: String,
    /// What a token's `aud` must contain.
    pub audience: String,
    /// At most [`LEEWAY_S_MAX`].
    pub leeway_s: u64,
    /// Longest life of a token that is accepted, from its issue.
    pub lifetime_s_max: u64,
    pub keys: Vec<Key>,
    /// Where the issuer publishes more of them; https, or this machine. `None`: it publishes none.
    pub jwks_url: Option<Url>,
}

/// One key that tokens may be signed with.
#[derive(Clone, Debug)]
pub struct Key {
    pub kid: String,
    pub material: KeyMaterial,
}

/// A key, with the one algorithm it serves.
#[derive(Clone, Debug)]
pub enum KeyMaterial {
    /// HS256: a shared secret of at least 32 bytes.
    Hs256(SecretString),
    /// RS256: a public key as PEM.
    Rs256(String),
    /// ES256: a public key as PEM.
    Es256(String),
    /// EdDSA: an Ed25519 public key as PEM.
    EdDsa(String),
}

#[derive(Clone, Debug)]
pub struct Sandbox {
    /// Run generated code without confinement. Only where the machine itself is disposable.
    pub unconfined: bool,
    /// Toolchains outside the system's folders that confined commands may use, each with a `bin`.
    pub toolchains: Vec<PathBuf>,
}

impl Sandbox {
    /// As the activities take it.
    #[must_use]
    pub fn settings(&self) -> loopwright_activities::sandbox::SandboxConfig {
        loopwright_activities::sandbox::SandboxConfig {
            unconfined: self.unconfined,
            extra_toolchains: self.toolchains.clone(),
            ..Default::default()
        }
    }
}

/// Keys and addresses of model providers. A provider without a key is not used.
#[derive(Clone, Debug, Default)]
pub struct Providers {
    pub gemini: Provider,
    pub openrouter: Provider,
    pub openai: Provider,
}

impl Providers {
    /// Whether any can be used.
    #[must_use]
    pub fn any(&self) -> bool {
        [&self.gemini, &self.openrouter, &self.openai].iter().any(|provider| provider.is_configured())
    }
}

#[derive(Clone, Debug, Default)]
pub struct Provider {
    pub api_key: Option<SecretString>,
    /// More of them, with commas.
    pub api_keys: Option<SecretString>,
    /// `None`: the provider's own address.
    pub base_url: Option<Url>,
    pub api_version: Option<String>,
    pub model: Option<String>,
    pub context_tokens: Option<u64>,
}

/// Which models serve which role, beyond what ships.
#[derive(Clone, Debug, Default)]
pub struct Models {
    /// A routing file in place of the shipped `workflow-defs/models.yaml`.
    pub file: Option<PathBuf>,
    /// `<provider>/<model>`, put first for its role.
    pub architect: Option<String>,
    pub implementer: Option<String>,
    pub utility: Option<String>,
}

impl Provider {
    /// Whether it can be used: a key, or an address of one's own that may need none.
    #[must_use]
    pub fn is_configured(&self) -> bool {
        self.api_key.is_some() || self.api_keys.is_some() || self.base_url.is_some()
    }
}

#[derive(Clone, Debug)]
pub struct Telegram {
    /// `None`: no bot.
    pub token: Option<SecretString>,
    /// `None`: the official server.
    pub api_url: Option<Url>,
    pub access: Access,
}

/// Who may talk to the bot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Access {
    Open,
    /// Telegram user ids. Empty: nobody, which is where it starts.
    Only(Vec<i64>),
}

/// What credits are worth.
#[derive(Clone, Copy, Debug)]
pub struct Billing {
    /// Whole credits granted to a new user.
    pub welcome_credits: u32,
    pub credits_per_usd: u32,
    /// On top of cost, in basis points (100 = 1 %).
    pub markup_bps: u32,
}

#[derive(Clone, Debug)]
pub struct Worker {
    /// Attempts at the same time.
    pub slots: usize,
    /// After this long without a heartbeat others take the worker's runs over.
    pub lease_ms: u32,
    pub queues: Vec<String>,
    /// It claims runs whose definition asks for no others.
    pub labels: Vec<String>,
    /// From the request to stop until live attempts are handed back.
    pub drain_ms: u64,
}

#[derive(Clone, Debug)]
pub struct Log {
    pub format: LogFormat,
    /// As in `info,loopwright_engine=debug`.
    pub filter: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum LogFormat {
    /// For people.
    Plain,
    /// One JSON object a line.
    Json,
}

/// The flags that every command has.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Flags {
    /// Configuration file [default: loopwright.yaml, if there is one]
    #[arg(long, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Postgres to use instead of the embedded one
    #[arg(long, global = true, value_name = "URL")]
    pub database_url: Option<String>,
    /// Where the embedded Postgres and caches are kept
    #[arg(long, global = true, value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    /// How to write logs
    #[arg(long, global = true, value_name = "FORMAT")]
    pub log_format: Option<LogFormat>,
}

impl Config {
    /// What the activities' providers ask for, by the name of its environment variable.
    #[must_use]
    pub fn provider_setting(&self, name: &str) -> Option<String> {
        let Providers { gemini, openrouter, openai } = &self.providers;
        let key = |provider: &Provider| provider.api_key.as_ref().map(|key| key.expose_secret().to_owned());
        let keys = |provider: &Provider| provider.api_keys.as_ref().map(|keys| keys.expose_secret().to_owned());
        let url = |provider: &Provider| provider.base_url.as_ref().map(Url::to_string);
        match name {
            "GEMINI_API_KEY" => key(gemini),
            "GEMINI_API_KEYS" => keys(gemini),
            "GEMINI_BASE_URL" => url(gemini),
            "GEMINI_API_VERSION" => gemini.api_version.clone(),
            "OPENROUTER_API_KEY" => key(openrouter),
            "OPENROUTER_API_KEYS" => keys(openrouter),
            "OPENROUTER_BASE_URL" => url(openrouter),
            "OPENAI_API_KEY" => key(openai),
            "OPENAI_API_KEYS" => keys(openai),
            "OPENAI_BASE_URL" => url(openai),
            "OPENAI_MODEL" => openai.model.clone(),
            "OPENAI_CONTEXT_TOKENS" => openai.context_tokens.map(|tokens| tokens.to_string()),
            "LOOPWRIGHT_MODEL_ARCHITECT" => self.models.architect.clone(),
            "LOOPWRIGHT_MODEL_IMPLEMENTER" => self.models.implementer.clone(),
            "LOOPWRIGHT_MODEL_UTILITY" => self.models.utility.clone(),
            _ => None,
        }
    }

    /// Reads file, environment and flags, in that order.
    ///
    /// # Errors
    /// The first thing that does not stand, by name.
    pub fn load(flags: &Flags) -> Result<Self, Error> {
        let variables: Vec<(String, String)> = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
            .collect();
        let path = flags
            .config
            .clone()
            .or_else(|| variables.iter().find(|(n, _)| n == "LOOPWRIGHT_CONFIG").map(|(_, v)| PathBuf::from(v)));
        let mut file = File::read(path.as_deref())?;
        env::apply(&mut file, &variables)?;
        if let Some(url) = &flags.database_url {
            file.database_url = Some(SecretString::from(url.clone()));
        }
        if let Some(dir) = &flags.data_dir {
            file.data_dir = Some(dir.clone());
        }
        if let Some(format) = flags.log_format {
            file.log.format = Some(format);
        }
        file.resolve()
    }

    /// A configuration of defaults over a database, for tests and tools.
    ///
    /// # Errors
    /// Never with the defaults of this release.
    pub fn with_database(url: &str, data_dir: PathBuf) -> Result<Self, Error> {
        File { database_url: Some(SecretString::from(url.to_owned())), data_dir: Some(data_dir), ..File::default() }
            .resolve()
    }
}

/// A secret given as itself or as a file that holds it. Both is an error, because one of them would be ignored.
fn secret(key: &str, value: Option<SecretString>, path: Option<PathBuf>) -> Result<Option<SecretString>, Error> {
    let text = match (value, path) {
        (Some(_), Some(_)) => return Err(Error::value(key, format!("give {key} or {key}_file, not both"))),
        (Some(value), None) => value.expose_secret().to_owned(),
        (None, Some(path)) => std::fs::read_to_string(&path)
            .map_err(|e| Error::value(format!("{key}_file"), format!("{} cannot be read: {e}", path.display())))?,
        (None, None) => return Ok(None),
    };
    let text = text.trim();
    if text.is_empty() {
        return Err(Error::value(key, "is empty"));
    }
    Ok(Some(SecretString::from(text.to_owned())))
}
