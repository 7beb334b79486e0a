//! The shape of `loopwright.yaml`: everything optional, nothing unknown; and how it becomes a [`Config`].

use super::{
    Access, Auth, Billing, Config, Error, Http, JWT_SECRET_BYTES_MIN, Key, KeyMaterial, Keys, LEEWAY_S_MAX,
    LIFETIME_S_MAX, LIFETIME_S_MAX_DEVELOPMENT, Log, LogFormat, Models, Provider, Providers, Sandbox, Telegram, Worker,
    secret,
};
use loopwright_activities::keys::Ring;
use loopwright_engine::{
    labels::{WORKER_LABELS_MAX, is_label},
    payload::PayloadKeys,
    retention::{KEEP_MIN, Policy},
};
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};
use url::Url;

/// Read when nobody names another.
const DEFAULT_NAME: &str = "loopwright.yaml";
/// Largest file that is read, in bytes. Chosen, not measured.
const BYTES_MAX: u64 = 256 * 1024;

/// The configuration as written: what is absent keeps its default.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct File {
    pub database_url: Option<SecretString>,
    pub database_url_file: Option<PathBuf>,
    pub data_dir: Option<PathBuf>,
    pub payload: PayloadFile,
    pub keys: KeysFile,
    pub http: HttpFile,
    pub auth: AuthFile,
    pub sandbox: SandboxFile,
    pub providers: ProvidersFile,
    pub models: ModelsFile,
    pub telegram: TelegramFile,
    pub billing: BillingFile,
    pub worker: WorkerFile,
    pub retention: RetentionFile,
    pub log: LogFile,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PayloadFile {
    pub keys: Option<SecretString>,
    pub keys_file: Option<PathBuf>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct KeysFile {
    pub encryption_keys: Option<SecretString>,
    pub encryption_keys_file: Option<PathBuf>,
    pub loopback: Option<bool>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HttpFile {
    pub listen: Option<String>,
    pub body_bytes_max: Option<usize>,
    pub connections_max: Option<usize>,
    pub header_timeout_ms: Option<u64>,
    pub requests_per_minute: Option<u32>,
    pub streams_max: Option<usize>,
    pub drain_ms: Option<u64>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AuthFile {
    pub issuer: Option<String>,
    pub audience: Option<String>,
    pub leeway_s: Option<u64>,
    pub lifetime_s_max: Option<u64>,
    pub jwks_url: Option<String>,
    pub keys: Vec<KeyFile>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct KeyFile {
    pub kid: Option<String>,
    /// `HS256` (default), `RS256`, `ES256`, `EdDSA`.
    pub algorithm: Option<String>,
    pub secret: Option<SecretString>,
    pub secret_file: Option<PathBuf>,
    pub public_key_file: Option<PathBuf>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SandboxFile {
    pub unconfined: Option<bool>,
    /// Folders with a `bin` that confined commands may use beside the system's.
    pub toolchains: Vec<PathBuf>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ProvidersFile {
    pub gemini: ProviderFile,
    pub openrouter: ProviderFile,
    pub openai: ProviderFile,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ProviderFile {
    pub api_key: Option<SecretString>,
    pub api_key_file: Option<PathBuf>,
    /// More of them, with commas.
    pub api_keys: Option<SecretString>,
    pub api_keys_file: Option<PathBuf>,
    pub base_url: Option<String>,
    /// Gemini only.
    pub api_version: Option<String>,
    /// OpenAI-compatible servers only: their model for every role, and its window.
    pub model: Option<String>,
    pub context_tokens: Option<u64>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ModelsFile {
    pub file: Option<PathBuf>,
    pub architect: Option<String>,
    pub implementer: Option<String>,
    pub utility: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TelegramFile {
    pub token: Option<SecretString>,
    pub token_file: Option<PathBuf>,
    pub api_url: Option<String>,
    /// `open`, or a list of Telegram user ids.
    pub access: Option<serde_json::Value>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BillingFile {
    pub welcome_credits: Option<u32>,
    pub credits_per_usd: Option<u32>,
    pub markup_bps: Option<u32>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct WorkerFile {
    pub slots: Option<usize>,
    pub lease_ms: Option<u32>,
    pub queues: Option<Vec<String>>,
    pub labels: Option<Vec<String>>,
    pub drain_ms: Option<u64>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RetentionFile {
    /// As `90d`.
    pub keep: Option<String>,
    pub archive: Option<PathBuf>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LogFile {
    pub format: Option<LogFormat>,
    pub filter: Option<String>,
}

impl File {
    /// Reads the named file, or `loopwright.yaml` here if there is one.
    pub(super) fn read(named: Option<&Path>) -> Result<Self, Error> {
        let path = named.unwrap_or(Path::new(DEFAULT_NAME));
        if named.is_none() && !path.exists() {
            return Ok(Self::default());
        }
        let unreadable = |reason: String| Error::Unreadable { path: path.to_owned(), reason };
        let size = std::fs::metadata(path).map_err(|e| unreadable(e.to_string()))?.len();
        if size > BYTES_MAX {
            return Err(unreadable(format!("it is {size} bytes; the limit is {BYTES_MAX}")));
        }
        let text = std::fs::read_to_string(path).map_err(|e| unreadable(e.to_string()))?;
        Self::parse(&text).map_err(|reason| Error::File { path: path.to_owned(), reason })
    }

    /// Parses the text of a file. The error is one line with the key and where it stands.
    pub fn parse(text: &str) -> Result<Self, String> {
        if text.lines().all(|line| line.trim().is_empty() || line.trim_start().starts_with('#')) {
            return Ok(Self::default());
        }
        let options = serde_yaml::options! { strict_booleans: true,
        budget: serde_yaml::budget! { max_depth: 16, max_nodes: 2_000, max_aliases: 0, max_anchors: 0, max_documents: 1 } };
        serde_yaml::from_str_with_options(text, options).map_err(|e| first_line(&e.to_string()))
    }

    /// Fills in what is absent and checks the rest.
    pub fn resolve(self) -> Result<Config, Error> {
        let http = self.http;
        let listen = http.listen.unwrap_or_else(|| "127.0.0.1:8080".into());
        let listen: SocketAddr = listen
            .parse()
            .map_err(|_| Error::value("http.listen", format!("`{listen}` is not an address such as 127.0.0.1:8080")))?;
        let billing = Billing {
            welcome_credits: at_most(
                "billing.welcome_credits",
                self.billing.welcome_credits.unwrap_or(100),
                1_000_000,
            )?,
            credits_per_usd: positive("billing.credits_per_usd", self.billing.credits_per_usd.unwrap_or(100))?,
            markup_bps: at_most("billing.markup_bps", self.billing.markup_bps.unwrap_or(2_000), 100_000)?,
        };
        Ok(Config {
            database_url: secret("database_url", self.database_url, self.database_url_file)?,
            data_dir: self.data_dir.unwrap_or_else(loopwright_engine::embedded::default_data_dir),
            payload_keys: secret("payload.keys", self.payload.keys, self.payload.keys_file)?
                .map(|ring| PayloadKeys::parse(&ring).map_err(|why| Error::value("payload.keys", why)))
                .transpose()?,
            keys: Keys {
                encryption: secret("keys.encryption_keys", self.keys.encryption_keys, self.keys.encryption_keys_file)?
                    .map(|ring| Ring::parse(&ring).map_err(|why| Error::value("keys.encryption_keys", why)))
                    .transpose()?,
                loopback: self.keys.loopback.unwrap_or(false),
            },
            http: Http {
                listen,
                body_bytes_max: positive("http.body_bytes_max", http.body_bytes_max.unwrap_or(1 << 20))?,
                connections_max: positive("http.connections_max", http.connections_max.unwrap_or(1024))?,
                header_timeout_ms: positive("http.header_timeout_ms", http.header_timeout_ms.unwrap_or(10_000))?,
                requests_per_minute: positive("http.requests_per_minute", http.requests_per_minute.unwrap_or(240))?,
                streams_max: positive("http.streams_max", http.streams_max.unwrap_or(256))?,
                drain_ms: http.drain_ms.unwrap_or(10_000),
            },
            auth: self.auth.resolve()?,
            sandbox: Sandbox {
                unconfined: self.sandbox.unconfined.unwrap_or(false),
                toolchains: toolchains(self.sandbox.toolchains)?,
            },
            providers: Providers {
                gemini: self.providers.gemini.resolve("providers.gemini")?,
                openrouter: self.providers.openrouter.resolve("providers.openrouter")?,
                openai: self.providers.openai.resolve("providers.openai")?,
            },
            models: Models {
                file: self.models.file,
                architect: self.models.architect,
                implementer: self.models.implementer,
                utility: self.models.utility,
            },
            telegram: self.telegram.resolve()?,
            billing,
            worker: Worker {
                slots: positive("worker.slots", self.worker.slots.unwrap_or(4))?,
                lease_ms: lease(self.worker.lease_ms.unwrap_or(15_000))?,
                queues: self.worker.queues.unwrap_or_else(|| vec!["default".into()]),
                labels: labels("worker.labels", self.worker.labels.unwrap_or_default())?,
                drain_ms: self.worker.drain_ms.unwrap_or(20_000),
            },
            retention: self.retention.resolve()?,
            log: Log {
                format: self.log.format.unwrap_or(LogFormat::Plain),
                filter: self.log.filter.unwrap_or_else(|| "info,sqlx=warn,tantivy=warn,teloxide=warn".into()),
            },
        })
    }
}

impl RetentionFile {
    /// Both or neither: a time without a folder would have nowhere to put what is old.
    fn resolve(self) -> Result<Option<Policy>, Error> {
        match (self.keep, self.archive) {
            (None, None) => Ok(None),
            (Some(keep), Some(archive)) => {
                let keep = keep_of(&keep).map_err(|reason| Error::value("retention.keep", reason))?;
                Ok(Some(Policy { keep, archive }))
            }
            (Some(_), None) => Err(Error::value("retention.archive", "is missing: name the folder of the archives")),
            (None, Some(_)) => Err(Error::value("retention.keep", "is missing: say how long, for example 90d")),
        }
    }
}

/// How long runs are kept, as somebody writes it.
pub(crate) fn keep_of(text: &str) -> Result<Duration, String> {
    match loopwright_workflows::parse_duration(text).map(Duration::from_millis) {
        Some(keep) if keep >= KEEP_MIN => Ok(keep),
        Some(_) => Err(format!("`{text}` is less than a day")),
        None => Err(format!("`{text}` is no duration; write for example 90d")),
    }
}

fn lease(ms: u32) -> Result<u32, Error> {
    // Below a second, an ordinary pause of the process would look like its death.
    if (1_000..=600_000).contains(&ms) {
        Ok(ms)
    } else {
        Err(Error::value("worker.lease_ms", format!("{ms} is not between 1000 and 600000")))
    }
}

fn positive<T: Default + PartialEq + std::fmt::Display>(key: &str, value: T) -> Result<T, Error> {
    if value == T::default() { Err(Error::value(key, "must be more than 0")) } else { Ok(value) }
}

fn at_most(key: &str, value: u32, limit: u32) -> Result<u32, Error> {
    if value <= limit { Ok(value) } else { Err(Error::value(key, format!("{value} is more than {limit}"))) }
}

/// What a worker has.
pub(crate) fn labels(key: &str, labels: Vec<String>) -> Result<Vec<String>, Error> {
    if labels.len() > WORKER_LABELS_MAX {
        return Err(Error::value(key, format!("{} labels are more than {WORKER_LABELS_MAX}", labels.len())));
    }
    match labels.iter().find(|label| !is_label(label)) {
        Some(label) => Err(Error::value(
            key,
            format!(
                "`{label}` is no label: lower-case letters, digits and hyphens, at most 63, starting with a letter"
            ),
        )),
        None => Ok(labels),
    }
}

fn address(key: &str, text: Option<String>) -> Result<Option<Url>, Error> {
    let Some(text) = text.filter(|t| !t.trim().is_empty()) else { return Ok(None) };
    let url: Url = text.trim().parse().map_err(|e| Error::value(key, format!("`{text}` is not a URL: {e}")))?;
    if !matches!(url.scheme(), "http" | "https") || url.host().is_none() {
        return Err(Error::value(key, format!("`{text}` does not start with https:// or http://")));
    }
    Ok(Some(url))
}

impl ProviderFile {
    fn resolve(self, key: &str) -> Result<Provider, Error> {
        Ok(Provider {
            api_key: secret(&format!("{key}.api_key"), self.api_key, self.api_key_file)?,
            api_keys: secret(&format!("{key}.api_keys"), self.api_keys, self.api_keys_file)?,
            base_url: address(&format!("{key}.base_url"), self.base_url)?,
            api_version: self.api_version,
            model: self.model,
            context_tokens: self.context_tokens,
        })
    }
}

impl TelegramFile {
    fn resolve(self) -> Result<Telegram, Error> {
        use serde_json::Value as V;
        let bad = || Error::value("telegram.access", "must be `open` or a list of Telegram user ids");
        let access = match self.access {
            None | Some(V::Null) => Access::Only(Vec::new()),
            Some(V::String(text)) if text == "open" => Access::Open,
            Some(V::Number(id)) => Access::Only(vec![id.as_i64().ok_or_else(bad)?]),
            Some(V::Array(ids)) => {
                Access::Only(ids.iter().map(|id| id.as_i64().ok_or_else(bad)).collect::<Result<_, _>>()?)
            }
            Some(_) => return Err(bad()),
        };
        Ok(Telegram {
            token: secret("telegram.token", self.token, self.token_file)?,
            api_url: address("telegram.api_url", self.api_url)?,
            access,
        })
    }
}

/// Every folder must be there: a toolchain that is silently missing blocks every item that needs it.
fn toolchains(folders: Vec<PathBuf>) -> Result<Vec<PathBuf>, Error> {
    match folders.iter().find(|folder| !folder.is_absolute() || !folder.join("bin").is_dir()) {
        Some(bad) => {
            Err(Error::value("sandbox.toolchains", format!("{} is no absolute folder with a bin", bad.display())))
        }
        None => Ok(folders),
    }
}

impl AuthFile {
    fn resolve(self) -> Result<Auth, Error> {
        let leeway_s = self.leeway_s.unwrap_or(LEEWAY_S_MAX);
        if leeway_s > LEEWAY_S_MAX {
            return Err(Error::value("auth.leeway_s", format!("{leeway_s} is more than {LEEWAY_S_MAX}")));
        }
        let mut keys: Vec<Key> = Vec::new();
        for (i, key) in self.keys.into_iter().enumerate() {
            let key = key.resolve(&format!("auth.keys[{i}]"))?;
            if keys.iter().any(|k| k.kid == key.kid) {
                return Err(Error::value(format!("auth.keys[{i}].kid"), format!("`{}` is taken", key.kid)));
            }
            keys.push(key);
        }
        Ok(Auth {
            issuer: self.issuer.unwrap_or_else(|| "loopwright".into()),
            audience: self.audience.unwrap_or_else(|| "loopwright".into()),
            leeway_s,
            // Without a key there is only this machine's own, for people who try things by hand.
            lifetime_s_max: positive(
                "auth.lifetime_s_max",
                self.lifetime_s_max.unwrap_or(if keys.is_empty() && self.jwks_url.is_none() {
                    LIFETIME_S_MAX_DEVELOPMENT
                } else {
                    LIFETIME_S_MAX
                }),
            )?,
            keys,
            jwks_url: self.jwks_url.as_deref().map(jwks_url).transpose()?,
        })
    }
}

/// The address of a published set of keys: whoever can write there can sign for everybody, so the connection is private.
fn jwks_url(text: &str) -> Result<Url, Error> {
    let bad = |why: &str| Err(Error::value("auth.jwks_url", why));
    let Ok(url) = Url::parse(text.trim()) else { return bad("is not a URL") };
    let loopback = match url.host() {
        Some(url::Host::Ipv4(ip)) => ip.is_loopback(),
        Some(url::Host::Ipv6(ip)) => ip.is_loopback(),
        Some(url::Host::Domain(name)) => name == "localhost",
        None => return bad("is not a URL with a host"),
    };
    if url.scheme() != "https" && !(url.scheme() == "http" && loopback) {
        return bad("must be https (http only on this machine)");
    }
    if !url.username().is_empty() || url.password().is_some() || url.fragment().is_some() {
        return bad("must not hold a user, a password or a fragment");
    }
    Ok(url)
}

impl KeyFile {
    fn resolve(self, key: &str) -> Result<Key, Error> {
        let pem = |path: Option<PathBuf>| {
            let key = format!("{key}.public_key_file");
            let path = path.ok_or_else(|| Error::value(&key, "is missing"))?;
            std::fs::read_to_string(&path).map_err(|e| Error::value(&key, format!("{}: {e}", path.display())))
        };
        let material = match self.algorithm.as_deref().unwrap_or("HS256") {
            "HS256" => {
                let name = format!("{key}.secret");
                let secret =
                    secret(&name, self.secret, self.secret_file)?.ok_or_else(|| Error::value(&name, "is missing"))?;
                check_secret(&name, &secret)?;
                KeyMaterial::Hs256(secret)
            }
            "RS256" => KeyMaterial::Rs256(pem(self.public_key_file)?),
            "ES256" => KeyMaterial::Es256(pem(self.public_key_file)?),
            "EdDSA" => KeyMaterial::EdDsa(pem(self.public_key_file)?),
            other => {
                return Err(Error::value(
                    format!("{key}.algorithm"),
                    format!("`{other}` is not one of HS256, RS256, ES256, EdDSA"),
                ));
            }
        };
        Ok(Key { kid: self.kid.unwrap_or_else(|| "default".into()), material })
    }
}

fn check_secret(key: &str, secret: &SecretString) -> Result<(), Error> {
    let length = secret.expose_secret().len();
    if length < JWT_SECRET_BYTES_MIN {
        return Err(Error::value(
            key,
            format!("is {length} bytes; at least {JWT_SECRET_BYTES_MIN} random ones are needed (openssl rand -hex 32)"),
        ));
    }
    Ok(())
}

/// The library's message without its source excerpt, which could show a secret.
fn first_line(text: &str) -> String {
    let line = text.lines().find(|l| !l.trim().is_empty()).unwrap_or("not valid");
    line.trim().trim_start_matches("error: ").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retention_needs_a_time_and_a_folder() {
        let of = |text: &str| File::parse(text).unwrap().resolve().map(|config| config.retention);
        assert_eq!(of("retention: {}").unwrap(), None);
        let policy = of("retention: { keep: 90d, archive: /archives }").unwrap().unwrap();
        assert_eq!((policy.keep.as_secs(), policy.archive), (90 * 86_400, "/archives".into()));
        for (text, key) in [
            ("retention: { keep: 90d }", "retention.archive"),
            ("retention: { archive: /a }", "retention.keep"),
            ("retention: { keep: 90, archive: /a }", "retention.keep"),
            ("retention: { keep: 1h, archive: /a }", "less than a day"),
        ] {
            let error = of(text).unwrap_err().to_string();
            assert!(error.contains(key), "{text}: {error}");
        }
    }

    #[test]
    fn tokens_of_others_live_for_a_quarter_of_an_hour() {
        let of = |text: &str| File::parse(text).unwrap().resolve().unwrap().auth.lifetime_s_max;
        let key = format!("{{ kid: a, secret: {} }}", "s".repeat(JWT_SECRET_BYTES_MIN));
        assert_eq!(of("auth: {}"), 86_400, "only this machine's own key");
        assert_eq!(of(&format!("auth: {{ keys: [{key}] }}")), 900);
        assert_eq!(of("auth: { jwks_url: 'https://example.org/keys' }"), 900);
        assert_eq!(of(&format!("auth: {{ keys: [{key}], lifetime_s_max: 3600 }}")), 3_600);
    }

    #[test]
    fn labels_of_a_worker_are_names() {
        let of = |text: &str| File::parse(text).unwrap().resolve().map(|config| config.worker.labels);
        assert!(of("worker: {}").unwrap().is_empty());
        assert_eq!(of("worker: { labels: [gpu, linux] }").unwrap(), ["gpu", "linux"]);
        let many = (0..=WORKER_LABELS_MAX).map(|n| format!("l{n}")).collect::<Vec<_>>().join(", ");
        for bad in ["GPU".to_owned(), "'a,b'".to_owned(), many] {
            let error = of(&format!("worker: {{ labels: [{bad}] }}")).unwrap_err().to_string();
            assert!(error.contains("worker.labels"), "{error}");
        }
    }

    #[test]
    fn an_empty_file_is_all_defaults() {
        let config = File::parse("# nothing set\n").unwrap().resolve().unwrap();
        assert_eq!(config.http.listen, "127.0.0.1:8080".parse().unwrap());
        assert!(!config.sandbox.unconfined && config.telegram.access == Access::Only(Vec::new()));
        assert!(config.database_url.is_none() && config.auth.keys.is_empty());
    }

    #[test]
    fn unknown_keys_are_named() {
        for (text, key) in [
            ("htp: {}", "htp"),
            ("http:\n  lisen: 1", "lisen"),
            ("auth:\n  keys:\n    - kidd: a", "kidd"),
            ("billing: { markup: 3 }", "markup"),
        ] {
            let error = File::parse(text).map(drop).unwrap_err();
            assert!(error.contains(key), "{text}: {error}");
        }
    }

    #[test]
    fn values_that_cannot_be_are_refused_with_their_key() {
        for (text, key) in [
            ("http: { listen: nowhere }", "http.listen"),
            ("http: { body_bytes_max: 0 }", "http.body_bytes_max"),
            ("auth: { leeway_s: 60 }", "auth.leeway_s"),
            ("auth: { keys: [{ secret: short }] }", "auth.keys[0].secret"),
            ("auth: { jwks_url: 'http://id.example.com/keys' }", "auth.jwks_url"),
            ("auth: { jwks_url: 'https://me:x@id.example.com/keys' }", "auth.jwks_url"),
            ("auth: { jwks_url: 'file:///etc/passwd' }", "auth.jwks_url"),
            ("auth: { jwks_url: id.example.com }", "auth.jwks_url"),
            ("auth: { keys: [{ algorithm: none }] }", "auth.keys[0].algorithm"),
            (
                "auth: { keys: [{ algorithm: RS256, public_key_file: /nonexistent.pem }] }",
                "auth.keys[0].public_key_file",
            ),
            ("worker: { lease_ms: 10 }", "worker.lease_ms"),
            ("telegram: { access: everybody }", "telegram.access"),
            ("providers: { openai: { base_url: 'ftp://x' } }", "providers.openai.base_url"),
            ("providers: { gemini: { api_key: a, api_key_file: b } }", "providers.gemini.api_key"),
            ("database_url_file: /nonexistent", "database_url_file"),
        ] {
            let error = File::parse(text).unwrap().resolve().unwrap_err().to_string();
            assert!(error.starts_with(key), "{text}: {error}");
        }
    }

    #[test]
    fn secrets_are_never_printed() {
        let text = "database_url: postgres://u:hunter2@h/d\nproviders: { gemini: { api_key: hunter2 } }\n\
                    telegram: { token: hunter2 }\nauth: { keys: [{ secret: hunter2hunter2hunter2hunter2hunter2 }] }";
        let file = File::parse(text).unwrap();
        assert!(!format!("{file:?}").contains("hunter2"));
        assert!(!format!("{:?}", file.resolve().unwrap()).contains("hunter2"));
        // Nor by an error about the place where one stands.
        let error = File::parse("telegram:\n  tokn: hunter2\n").map(drop).unwrap_err();
        assert!(!error.contains("hunter2"), "{error}");
    }

    #[test]
    fn access_is_open_or_a_list() {
        let access = |t: &str| File::parse(t).unwrap().resolve().unwrap().telegram.access;
        assert_eq!(access("telegram: { access: open }"), Access::Open);
        assert_eq!(access("telegram: { access: [1, 2] }"), Access::Only(vec![1, 2]));
    }
}
