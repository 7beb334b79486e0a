//! The environment's part of the configuration: one table, from which the documents are made too.

use super::{Error, File, LogFormat, file::KeyFile};
use secrecy::SecretString;
use std::path::PathBuf;

/// One variable that is read.
#[derive(Clone, Copy, Debug)]
pub struct Variable {
    pub name: &'static str,
    /// Its key in the file; empty where there is none.
    pub key: &'static str,
    pub meaning: &'static str,
}

const fn v(name: &'static str, key: &'static str, meaning: &'static str) -> Variable {
    Variable { name, key, meaning }
}

/// Every variable that is read, in the order of the documents. A variable that begins with `LOOPWRIGHT_` and is not
/// here is an error.
pub const VARIABLES: &[Variable] = &[
    v("LOOPWRIGHT_CONFIG", "", "configuration file; otherwise loopwright.yaml in the working folder, if there is one"),
    v(
        "DATABASE_URL",
        "database_url",
        "Postgres 15 or newer; without it `dev` and the command line use the embedded one",
    ),
    v("DATABASE_URL_FILE", "database_url_file", "file that holds it"),
    v(
        "LOOPWRIGHT_DATA_DIR",
        "data_dir",
        "embedded Postgres and caches; default ~/.local/share/loopwright, for root /var/lib/loopwright",
    ),
    v("LOOPWRIGHT_PG_BIN", "", "folder with postgres and initdb for the embedded Postgres"),
    v(
        "LOOPWRIGHT_PAYLOAD_KEYS",
        "payload.keys",
        "keys that seal what runs store, <id>:<base64 of 32 bytes> with commas: the first seals, all open; default plain",
    ),
    v("LOOPWRIGHT_PAYLOAD_KEYS_FILE", "payload.keys_file", "file that holds it"),
    v(
        "LOOPWRIGHT_KEY_ENCRYPTION_KEYS",
        "keys.encryption_keys",
        "keys that wrap the sealed keys of providers, of users and of the platform, <id>:<base64 of 32 bytes> with commas: the first wraps, all unwrap; default: none are kept",
    ),
    v("LOOPWRIGHT_KEY_ENCRYPTION_KEYS_FILE", "keys.encryption_keys_file", "file that holds it"),
    v(
        "LOOPWRIGHT_KEYS_LOOPBACK",
        "keys.loopback",
        "true: users may name servers on the machine itself, without TLS; default false",
    ),
    v("LOOPWRIGHT_LISTEN", "http.listen", "address and port; default 127.0.0.1:8080"),
    v("LOOPWRIGHT_REQUESTS_PER_MINUTE", "http.requests_per_minute", "per user; default 240"),
    v(
        "LOOPWRIGHT_JWT_SECRET",
        "auth.keys[].secret",
        "secret of HS256 tokens, at least 32 bytes; becomes key `default`",
    ),
    v("LOOPWRIGHT_JWT_SECRET_FILE", "auth.keys[].secret_file", "file that holds it"),
    v("LOOPWRIGHT_JWT_ISSUER", "auth.issuer", "the only issuer that is believed; default loopwright"),
    v("LOOPWRIGHT_JWT_AUDIENCE", "auth.audience", "what tokens must be for; default loopwright"),
    v("LOOPWRIGHT_JWT_JWKS_URL", "auth.jwks_url", "where the issuer publishes its keys (JWKS); https"),
    v("LOOPWRIGHT_SANDBOX_UNCONFINED", "sandbox.unconfined", "true: run generated code without confinement"),
    v(
        "LOOPWRIGHT_SANDBOX_TOOLCHAINS",
        "sandbox.toolchains",
        "folders with a bin, with colons, that generated code may use, such as /usr/local/go",
    ),
    v("GEMINI_API_KEY", "providers.gemini.api_key", "key of Google Gemini"),
    v("GEMINI_API_KEY_FILE", "providers.gemini.api_key_file", "file that holds it"),
    v("GEMINI_API_KEYS", "providers.gemini.api_keys", "more of them, with commas: they take turns"),
    v("GEMINI_API_KEYS_FILE", "providers.gemini.api_keys_file", "file that holds them"),
    v("GEMINI_BASE_URL", "providers.gemini.base_url", "another server that speaks the same protocol"),
    v("OPENROUTER_API_KEY", "providers.openrouter.api_key", "key of OpenRouter"),
    v("OPENROUTER_API_KEY_FILE", "providers.openrouter.api_key_file", "file that holds it"),
    v("OPENROUTER_API_KEYS", "providers.openrouter.api_keys", "more of them, with commas: they take turns"),
    v("OPENROUTER_API_KEYS_FILE", "providers.openrouter.api_keys_file", "file that holds them"),
    v("OPENROUTER_BASE_URL", "providers.openrouter.base_url", "another server that speaks the same protocol"),
    v("OPENAI_API_KEY", "providers.openai.api_key", "key of an OpenAI-compatible server"),
    v("OPENAI_API_KEY_FILE", "providers.openai.api_key_file", "file that holds it"),
    v("OPENAI_API_KEYS", "providers.openai.api_keys", "more of them, with commas: they take turns"),
    v("OPENAI_API_KEYS_FILE", "providers.openai.api_keys_file", "file that holds them"),
    v("OPENAI_BASE_URL", "providers.openai.base_url", "its address, up to and including /v1"),
    v("GEMINI_API_VERSION", "providers.gemini.api_version", "v1 or v1beta; default v1beta"),
    v("OPENAI_MODEL", "providers.openai.model", "its model for every role; otherwise the first that it lists"),
    v("OPENAI_CONTEXT_TOKENS", "providers.openai.context_tokens", "its window; default as the server says, or 16384"),
    v("LOOPWRIGHT_MODELS_FILE", "models.file", "routing of roles to models, in place of workflow-defs/models.yaml"),
    v("LOOPWRIGHT_MODEL_ARCHITECT", "models.architect", "<provider>/<model>, put first for this role"),
    v("LOOPWRIGHT_MODEL_IMPLEMENTER", "models.implementer", "the same for the role that edits code"),
    v("LOOPWRIGHT_MODEL_UTILITY", "models.utility", "the same for summaries"),
    v("TELEGRAM_BOT_TOKEN", "telegram.token", "token of the bot; without it there is no bot"),
    v("TELEGRAM_BOT_TOKEN_FILE", "telegram.token_file", "file that holds it"),
    v("TELEGRAM_API_URL", "telegram.api_url", "another Bot API server"),
    v("LOOPWRIGHT_TELEGRAM_ACCESS", "telegram.access", "`open`, or Telegram user ids with commas; default nobody"),
    v("LOOPWRIGHT_WELCOME_CREDITS", "billing.welcome_credits", "granted once to a new user; default 100"),
    v("LOOPWRIGHT_CREDITS_PER_USD", "billing.credits_per_usd", "default 100"),
    v("LOOPWRIGHT_MARKUP_BPS", "billing.markup_bps", "on top of cost, in basis points; default 2000 (20 %)"),
    v("LOOPWRIGHT_WORKER_SLOTS", "worker.slots", "attempts at the same time in one worker; default 4"),
    v("LOOPWRIGHT_WORKER_LABELS", "worker.labels", "what a worker has for `runs-on`, with commas; default nothing"),
    v(
        "LOOPWRIGHT_WORKER_LEASE_MS",
        "worker.lease_ms",
        "after this long without a heartbeat others take over; default 15000",
    ),
    v(
        "LOOPWRIGHT_RETENTION_KEEP",
        "retention.keep",
        "how long runs stay after their end, as 90d; default for ever. Needs the next",
    ),
    v("LOOPWRIGHT_RETENTION_ARCHIVE", "retention.archive", "folder that workers write older runs to; back it up"),
    v("LOOPWRIGHT_LOG", "log.filter", "as in info,loopwright_engine=debug"),
    v("LOOPWRIGHT_LOG_FORMAT", "log.format", "plain or json; default plain"),
];

/// Lays the environment over the file. Empty values count as absent.
pub(super) fn apply(file: &mut File, variables: &[(String, String)]) -> Result<(), Error> {
    let mut jwt = KeyFile { kid: Some("default".into()), ..KeyFile::default() };
    for (name, value) in variables {
        if value.is_empty() {
            continue;
        }
        let secret = || Some(SecretString::from(value.clone()));
        let text = || Some(value.clone());
        let path = || Some(PathBuf::from(value));
        match name.as_str() {
            "LOOPWRIGHT_CONFIG" | "LOOPWRIGHT_PG_BIN" => {}
            "DATABASE_URL" => file.database_url = secret(),
            "DATABASE_URL_FILE" => file.database_url_file = path(),
            "LOOPWRIGHT_DATA_DIR" => file.data_dir = path(),
            "LOOPWRIGHT_PAYLOAD_KEYS" => file.payload.keys = secret(),
            "LOOPWRIGHT_PAYLOAD_KEYS_FILE" => file.payload.keys_file = path(),
            "LOOPWRIGHT_KEY_ENCRYPTION_KEYS" => file.keys.encryption_keys = secret(),
            "LOOPWRIGHT_KEY_ENCRYPTION_KEYS_FILE" => file.keys.encryption_keys_file = path(),
            "LOOPWRIGHT_KEYS_LOOPBACK" => file.keys.loopback = Some(boolean(name, value)?),
            "LOOPWRIGHT_LISTEN" => file.http.listen = text(),
            "LOOPWRIGHT_REQUESTS_PER_MINUTE" => file.http.requests_per_minute = Some(number(name, value)?),
            "LOOPWRIGHT_JWT_SECRET" => jwt.secret = secret(),
            "LOOPWRIGHT_JWT_SECRET_FILE" => jwt.secret_file = path(),
            "LOOPWRIGHT_JWT_ISSUER" => file.auth.issuer = text(),
            "LOOPWRIGHT_JWT_AUDIENCE" => file.auth.audience = text(),
            "LOOPWRIGHT_JWT_JWKS_URL" => file.auth.jwks_url = text(),
            "LOOPWRIGHT_SANDBOX_UNCONFINED" => file.sandbox.unconfined = Some(boolean(name, value)?),
            "LOOPWRIGHT_SANDBOX_TOOLCHAINS" => file.sandbox.toolchains = std::env::split_paths(value).collect(),
            "GEMINI_API_KEY" => file.providers.gemini.api_key = secret(),
            "GEMINI_API_KEY_FILE" => file.providers.gemini.api_key_file = path(),
            "GEMINI_API_KEYS" => file.providers.gemini.api_keys = secret(),
            "GEMINI_API_KEYS_FILE" => file.providers.gemini.api_keys_file = path(),
            "GEMINI_BASE_URL" => file.providers.gemini.base_url = text(),
            "OPENROUTER_API_KEY" => file.providers.openrouter.api_key = secret(),
            "OPENROUTER_API_KEY_FILE" => file.providers.openrouter.api_key_file = path(),
            "OPENROUTER_API_KEYS" => file.providers.openrouter.api_keys = secret(),
            "OPENROUTER_API_KEYS_FILE" => file.providers.openrouter.api_keys_file = path(),
            "OPENROUTER_BASE_URL" => file.providers.openrouter.base_url = text(),
            "OPENAI_API_KEY" => file.providers.openai.api_key = secret(),
            "OPENAI_API_KEY_FILE" => file.providers.openai.api_key_file = path(),
            "OPENAI_API_KEYS" => file.providers.openai.api_keys = secret(),
            "OPENAI_API_KEYS_FILE" => file.providers.openai.api_keys_file = path(),
            "OPENAI_BASE_URL" => file.providers.openai.base_url = text(),
            "GEMINI_API_VERSION" => file.providers.gemini.api_version = text(),
            "OPENAI_MODEL" => file.providers.openai.model = text(),
            "OPENAI_CONTEXT_TOKENS" => file.providers.openai.context_tokens = Some(number(name, value)?),
            "LOOPWRIGHT_MODELS_FILE" => file.models.file = path(),
            "LOOPWRIGHT_MODEL_ARCHITECT" => file.models.architect = text(),
            "LOOPWRIGHT_MODEL_IMPLEMENTER" => file.models.implementer = text(),
            "LOOPWRIGHT_MODEL_UTILITY" => file.models.utility = text(),
            "TELEGRAM_BOT_TOKEN" => file.telegram.token = secret(),
            "TELEGRAM_BOT_TOKEN_FILE" => file.telegram.token_file = path(),
            "TELEGRAM_API_URL" => file.telegram.api_url = text(),
            "LOOPWRIGHT_TELEGRAM_ACCESS" => file.telegram.access = Some(access(name, value)?),
            "LOOPWRIGHT_WELCOME_CREDITS" => file.billing.welcome_credits = Some(number(name, value)?),
            "LOOPWRIGHT_CREDITS_PER_USD" => file.billing.credits_per_usd = Some(number(name, value)?),
            "LOOPWRIGHT_MARKUP_BPS" => file.billing.markup_bps = Some(number(name, value)?),
            "LOOPWRIGHT_WORKER_SLOTS" => file.worker.slots = Some(number(name, value)?),
            "LOOPWRIGHT_WORKER_LABELS" => {
                let labels = value.split(',').map(|label| label.trim().to_owned()).filter(|label| !label.is_empty());
                file.worker.labels = Some(labels.collect());
            }
            "LOOPWRIGHT_WORKER_LEASE_MS" => file.worker.lease_ms = Some(number(name, value)?),
            "LOOPWRIGHT_RETENTION_KEEP" => file.retention.keep = text(),
            "LOOPWRIGHT_RETENTION_ARCHIVE" => file.retention.archive = path(),
            "LOOPWRIGHT_LOG" => file.log.filter = text(),
            "LOOPWRIGHT_LOG_FORMAT" => {
                file.log.format = Some(match value.as_str() {
                    "plain" => LogFormat::Plain,
                    "json" => LogFormat::Json,
                    other => return Err(Error::value(name, format!("`{other}` is not plain or json"))),
                });
            }
            // Read by the engine in programs that are built for tests, and only there.
            "LOOPWRIGHT_CRASH_POINT" => {}
            unknown if unknown.starts_with("LOOPWRIGHT_") => {
                return Err(Error::UnknownVariable { name: unknown.to_owned(), near: nearest(unknown) });
            }
            _ => {}
        }
    }
    // What the environment gives in one form replaces what the file gives in the other.
    let set = |name: &str| variables.iter().any(|(n, v)| n == name && !v.is_empty());
    if set("DATABASE_URL") && !set("DATABASE_URL_FILE") {
        file.database_url_file = None;
    }
    if set("DATABASE_URL_FILE") && !set("DATABASE_URL") {
        file.database_url = None;
    }
    for (provider, prefix) in [
        (&mut file.providers.gemini, "GEMINI_API_KEY"),
        (&mut file.providers.openrouter, "OPENROUTER_API_KEY"),
        (&mut file.providers.openai, "OPENAI_API_KEY"),
    ] {
        match (set(prefix), set(&format!("{prefix}_FILE"))) {
            (true, false) => provider.api_key_file = None,
            (false, true) => provider.api_key = None,
            _ => {}
        }
        match (set(&format!("{prefix}S")), set(&format!("{prefix}S_FILE"))) {
            (true, false) => provider.api_keys_file = None,
            (false, true) => provider.api_keys = None,
            _ => {}
        }
    }
    match (set("TELEGRAM_BOT_TOKEN"), set("TELEGRAM_BOT_TOKEN_FILE")) {
        (true, false) => file.telegram.token_file = None,
        (false, true) => file.telegram.token = None,
        _ => {}
    }
    if jwt.secret.is_some() || jwt.secret_file.is_some() {
        file.auth.keys.retain(|key| key.kid.as_deref() != Some("default"));
        file.auth.keys.insert(0, jwt);
    }
    Ok(())
}

fn number<T: std::str::FromStr>(name: &str, value: &str) -> Result<T, Error> {
    value.trim().parse().map_err(|_| Error::value(name, format!("`{value}` is not a whole number in range")))
}

fn boolean(name: &str, value: &str) -> Result<bool, Error> {
    match value.trim() {
        "true" | "1" => Ok(true),
        "false" | "0" => Ok(false),
        other => Err(Error::value(name, format!("`{other}` is not true or false"))),
    }
}

fn access(name: &str, value: &str) -> Result<serde_json::Value, Error> {
    if value.trim() == "open" {
        return Ok("open".into());
    }
    let ids: Result<Vec<i64>, _> =
        value.split(',').map(str::trim).filter(|p| !p.is_empty()).map(|part| number(name, part)).collect();
    ids.map(Into::into)
}

/// The known name that shares the longest beginning, if that is most of it.
fn nearest(name: &str) -> Option<&'static str> {
    let shared = |a: &str| a.bytes().zip(name.bytes()).take_while(|(x, y)| x == y).count();
    VARIABLES.iter().map(|v| v.name).max_by_key(|n| shared(n)).filter(|n| shared(n) > "LOOPWRIGHT_".len() + 2)
}

#[cfg(test)]
mod tests {
    use super::*;
    use secrecy::ExposeSecret;

    fn applied(pairs: &[(&str, &str)]) -> Result<File, Error> {
        let mut file =
            File::parse("providers: { gemini: { api_key_file: /f } }\nhttp: { listen: '1.1.1.1:1' }").unwrap();
        let pairs: Vec<_> = pairs.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect();
        apply(&mut file, &pairs).map(|()| file)
    }

    #[test]
    fn the_environment_wins_over_the_file() {
        let config = applied(&[
            ("GEMINI_API_KEY", "k"),
            ("LOOPWRIGHT_LISTEN", "127.0.0.1:9"),
            ("LOOPWRIGHT_JWT_SECRET", &"s".repeat(32)),
        ])
        .unwrap()
        .resolve()
        .unwrap();
        assert_eq!(config.http.listen.port(), 9);
        assert_eq!(config.providers.gemini.api_key.unwrap().expose_secret(), "k");
        assert_eq!(config.auth.keys[0].kid, "default");
    }

    #[test]
    fn a_misspelt_variable_is_an_error_with_a_suggestion() {
        let error = applied(&[("LOOPWRIGHT_LISEN", "x")]).unwrap_err().to_string();
        assert!(error.contains("LOOPWRIGHT_LISEN") && error.contains("LOOPWRIGHT_LISTEN"), "{error}");
        assert!(applied(&[("PATH", "x"), ("LOOPWRIGHT_LISTEN", "")]).is_ok());
    }

    #[test]
    fn bad_values_name_their_variable() {
        for (name, value) in [
            ("LOOPWRIGHT_WORKER_SLOTS", "many"),
            ("LOOPWRIGHT_LOG_FORMAT", "xml"),
            ("LOOPWRIGHT_SANDBOX_UNCONFINED", "yes"),
            ("LOOPWRIGHT_TELEGRAM_ACCESS", "me"),
        ] {
            let error = applied(&[(name, value)]).unwrap_err().to_string();
            assert!(error.starts_with(name), "{error}");
        }
    }

    #[test]
    fn every_variable_of_the_table_is_read() {
        for variable in VARIABLES {
            let result = applied(&[(variable.name, "1")]);
            assert!(
                !matches!(result, Err(Error::UnknownVariable { .. })),
                "{} is documented but not read",
                variable.name
            );
        }
    }
}
