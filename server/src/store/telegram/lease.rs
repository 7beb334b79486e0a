//! One process at a time polls: Telegram refuses a second one, and the pace of sending is counted in one place.

use super::{Error, Store};
use sqlx::{Connection, PgConnection};

/// Key of the advisory lock. Chosen: "loop" and "tele" as bytes.
const KEY: i64 = 0x6c6f_6f70_7465_6c65;

/// The right to poll, for as long as its database session lives.
pub struct Lease(PgConnection);

impl Store {
    /// Takes the lease; `None` while another process has it.
    pub async fn bot_lease(&self) -> Result<Option<Lease>, Error> {
        // Out of the pool: a connection that goes back would keep the lock.
        let mut conn = self.pool.acquire().await?.detach();
        let taken: bool = sqlx::query_scalar("select pg_try_advisory_lock($1)").bind(KEY).fetch_one(&mut conn).await?;
        Ok(taken.then_some(Lease(conn)))
    }
}

impl Lease {
    /// Whether the session, and with it the lock, still lives.
    pub async fn check(&mut self) -> Result<(), Error> {
        Ok(self.0.ping().await?)
    }

    /// Gives it back.
    pub async fn release(self) {
        // A session that cannot be closed in order has lost the lock with its socket.
        let _ = self.0.close().await;
    }
}
