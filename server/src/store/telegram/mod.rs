//! The bot's rows: updates that came in, messages that go out, chats and their runs, orders.
//!
//! What belongs together happens in one transaction of the caller: [`Store::begin`] gives it, functions here take it.

pub mod chats;
pub mod inbox;
pub mod lease;
pub mod orders;
pub mod outbox;

use super::{Error, Store};
use loopwright_engine::transaction;

/// A transaction over the bot's, the ledger's and the engine's rows.
pub type Tx = transaction::Transaction;

impl Store {
    /// Begins a transaction. Dropping it undoes everything.
    pub async fn begin(&self) -> Result<Tx, Error> {
        Ok(transaction::begin(&self.pool).await?)
    }
}

/// Makes a transaction last.
pub async fn commit(tx: Tx) -> Result<(), Error> {
    Ok(tx.commit().await?)
}

/// Errors of the database, for tests of rooms that may not name its library.
#[cfg(test)]
pub(crate) mod testing {
    pub fn away() -> sqlx::Error {
        sqlx::Error::PoolTimedOut
    }

    pub fn broken() -> sqlx::Error {
        sqlx::Error::RowNotFound
    }
}
