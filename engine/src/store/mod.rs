//! Every statement that the engine sends to Postgres, one file per noun. No statement decides anything: fences and
//! compare-and-sets are theirs, choices are the machine's.

pub(crate) mod checkpoints;
pub(crate) mod definitions;
pub(crate) mod history;
pub(crate) mod inbox;
pub(crate) mod ready;
pub(crate) mod runs;
pub(crate) mod transitions;
pub(crate) mod workers;

use sqlx::PgPool;
use std::time::Duration;

/// Wake-ups sent through this channel; the poll is the truth and right without it.
pub(crate) const WAKE_CHANNEL: &str = "loopwright_ready";
/// Attempts of one transaction that Postgres refused for serialization, deadlock or a broken connection.
const TRANSACTION_TRIES: u32 = 5;

/// Whether the same statement may be sent again: serialization failure, deadlock, a connection that broke or a server
/// that is starting or stopping.
pub(crate) fn is_transient(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(_) | sqlx::Error::PoolTimedOut | sqlx::Error::PoolClosed | sqlx::Error::WorkerCrashed => true,
        sqlx::Error::Database(e) => e.code().is_some_and(|c| {
            matches!(c.as_ref(), "40001" | "40P01" | "55P03") || c.starts_with("08") || c.starts_with("57P")
        }),
        _ => false,
    }
}

/// The pause before try number `tries + 1` of a transaction, or `None` when there is none.
pub(crate) fn retry_pause(tries: u32) -> Option<Duration> {
    (tries < TRANSACTION_TRIES).then(|| Duration::from_millis(fastrand::u64(1..=20) << tries))
}

/// Tells workers that something may be claimable. Best effort: an error is not an error.
pub(crate) async fn wake(pool: &PgPool) {
    if let Err(error) = sqlx::query("select pg_notify($1, '')").bind(WAKE_CHANNEL).execute(pool).await {
        tracing::debug!(%error, "a wake-up could not be sent; the poll will find the run");
    }
}
