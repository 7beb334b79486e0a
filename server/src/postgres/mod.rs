//! The way to the database: the one that is configured, or the embedded one.

use crate::{config::Config, telemetry::redact};
use loopwright_engine::{embedded, transaction};
use secrecy::ExposeSecret;
use sqlx::{ConnectOptions, Connection, PgConnection, PgPool, postgres::PgConnectOptions};
use std::time::Duration;

/// Connections of one process. Chosen, not measured: the committer needs one, a page of the server a few.
const POOL_MAX: u32 = 20;
/// Longest wait for a connection. Chosen, not measured.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a connection is trusted without a question: it was asked when it came back to the pool. Whoever takes one that
/// broke since then gets an error; after a restart of the server all have been idle for longer. A question each time would be a
/// round trip more for every transition.
const TRUSTED: Duration = Duration::from_secs(1);

/// Whether the embedded Postgres may stand in when no database is configured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fallback {
    Embedded,
    None,
}

/// Why there is no database. Each says what helps.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("no database is configured; set DATABASE_URL, or use `loopwright dev`, which brings its own")]
    NotConfigured,
    #[error("DATABASE_URL is not the address of a Postgres: {0}")]
    Address(String),
    #[error("the database at {address} cannot be reached: {reason}; check that it runs and that DATABASE_URL is right")]
    Unreachable { address: String, reason: String },
    #[error(transparent)]
    Embedded(#[from] embedded::Error),
    #[error(transparent)]
    Migrate(#[from] loopwright_engine::migrate::Error),
}

impl Error {
    /// A stable code for programs; listed in the crate's README.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::NotConfigured => "database_missing",
            Self::Address(_) => "database_address",
            Self::Unreachable { .. } => "database_unreachable",
            Self::Embedded(error) => error.code(),
            Self::Migrate(error) => error.code(),
        }
    }
}

/// An open database.
#[derive(Debug)]
pub struct Database {
    pub pool: PgPool,
    /// Where another process finds it.
    pub url: String,
    /// Held as long as the database is used: dropping it stops a server that this process started.
    pub server: Option<embedded::Server>,
}

/// Opens the database.
///
/// # Errors
/// One sentence with the remedy.
pub async fn open(config: &Config, fallback: Fallback) -> Result<Database, Error> {
    let (url, server) = match (&config.database_url, fallback) {
        (Some(url), _) => (url.expose_secret().to_owned(), None),
        (None, Fallback::None) => return Err(Error::NotConfigured),
        (None, Fallback::Embedded) => {
            let settings =
                embedded::Settings { data_dir: Some(config.data_dir.clone()), ..embedded::Settings::default() };
            let server = embedded::start(settings).await?;
            (server.url().to_owned(), Some(server))
        }
    };
    let options: PgConnectOptions = url.parse().map_err(|e: sqlx::Error| Error::Address(e.to_string()))?;
    let options =
        transaction::session(options).log_slow_statements(tracing::log::LevelFilter::Warn, Duration::from_secs(2));
    reach(&options)
        .await
        .map_err(|reason| Error::Unreachable { address: redact(&url).into_owned(), reason: one_line(&reason) })?;
    let pool = transaction::pool(&options)
        .max_connections(POOL_MAX)
        .acquire_timeout(ACQUIRE_TIMEOUT)
        .test_before_acquire(false)
        .before_acquire(|connection, meta| {
            Box::pin(async move {
                if meta.idle_for >= TRUSTED {
                    connection.ping().await?;
                }
                Ok(true)
            })
        })
        .connect_lazy_with(options);
    Ok(Database { pool, url, server })
}

/// Connects once, outside a pool: a pool tries a refused connection again until its timeout, and then says only that.
async fn reach(options: &PgConnectOptions) -> Result<(), String> {
    let connecting = tokio::time::timeout(ACQUIRE_TIMEOUT, PgConnection::connect_with(options));
    match connecting.await {
        Ok(Ok(connection)) => {
            // It answered; whether it hears the goodbye does not matter.
            let _ = connection.close().await;
            Ok(())
        }
        Ok(Err(sqlx::Error::Io(error))) => Err(error.to_string()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("no answer within {} seconds", ACQUIRE_TIMEOUT.as_secs())),
    }
}

fn one_line(text: &str) -> String {
    redact(text.lines().next().unwrap_or_default()).into_owned()
}
