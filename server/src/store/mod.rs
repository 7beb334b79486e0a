//! The server's own rows: users by token, projects, idempotency keys, credits as shown, what the bot keeps. The only
//! place of REST and the bot that speaks SQL.

mod archive;
pub mod credits;
pub mod filter;
pub mod health;
pub mod idempotency;
pub mod loops;
pub mod projects;
pub mod quotes;
pub mod telegram;
pub mod users;

use loopwright_activities::billing::{MicroCredits, ledger::LedgerError};
use loopwright_engine::transaction::is_transient;
use sqlx::PgPool;

/// Most rows of a page.
pub const PAGE_MAX: u32 = 100;
/// Rows of a page when nobody says.
pub const PAGE_DEFAULT: u32 = 25;

/// The door to the rows. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Store {
    pool: PgPool,
    /// Granted once to a new user.
    welcome: MicroCredits,
}

impl Store {
    /// Over a pool of a migrated database.
    #[must_use]
    pub fn new(pool: PgPool, welcome: MicroCredits) -> Self {
        Self { pool, welcome }
    }

    /// The door to the keys of providers, over the same rows.
    #[must_use]
    pub fn keys(&self, config: &crate::config::Keys) -> loopwright_activities::keys::Keys {
        loopwright_activities::keys::Keys::new(self.pool.clone(), config.encryption.clone(), config.loopback)
    }
}

/// Why a row could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The database cannot be reached now; trying again may help.
    #[error("the database cannot be reached: {0}")]
    Unavailable(String),
    /// Everything else is ours.
    #[error("database: {0}")]
    Broken(String),
}

impl From<LedgerError> for Error {
    fn from(error: LedgerError) -> Self {
        match error {
            LedgerError::Sql(error) => error.into(),
            other => Self::Broken(other.to_string()),
        }
    }
}

impl From<sqlx::Error> for Error {
    fn from(error: sqlx::Error) -> Self {
        // A server that stops, starts or has run out of something says so by a code, on a connection that stands.
        if is_transient(&error) { Self::Unavailable(error.to_string()) } else { Self::Broken(error.to_string()) }
    }
}

/// One page of a list.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Page<T> {
    pub items: Vec<T>,
    /// Given back as `cursor` for the next page; absent on the last one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next_cursor: Option<String>,
}

impl<T> Page<T> {
    /// From one row more than the page holds: the extra one only says that there is a next page.
    pub fn of(mut items: Vec<T>, limit: u32, cursor: impl Fn(&T) -> String) -> Self {
        let limit = limit as usize;
        let more = items.len() > limit;
        items.truncate(limit);
        let next_cursor = if more { items.last().map(cursor) } else { None };
        Self { items, next_cursor }
    }
}

#[cfg(test)]
mod tests {
    use super::Error;
    use loopwright_engine::embedded::testing::database;

    #[tokio::test]
    async fn a_session_that_the_server_ends_is_unavailable_and_a_wrong_statement_is_ours() {
        let pool = database(&[]).await;
        let error = async |statement: &'static str| {
            Error::from(sqlx::query(statement).execute(&pool).await.expect_err("refused"))
        };
        let ended = error("select pg_terminate_backend(pg_backend_pid())").await;
        assert!(matches!(ended, Error::Unavailable(_)), "{ended}");
        let wrong = error("select nothing from nowhere").await;
        assert!(matches!(wrong, Error::Broken(_)), "{wrong}");
    }
}
