//! Every statement that the engine sends to Postgres, one file per noun. No statement decides anything: fences and
//! compare-and-sets are theirs, choices are the machine's.

pub(crate) mod archive;
pub(crate) mod blobs;
pub(crate) mod chain;
pub(crate) mod checkpoints;
#[cfg(test)]
mod conformance;
pub(crate) mod definitions;
pub(crate) mod filter;
pub(crate) mod forks;
pub(crate) mod groups;
pub(crate) mod history;
pub(crate) mod inbox;
#[cfg(feature = "test-util")]
pub(crate) mod memory;
pub(crate) mod migrations;
pub(crate) mod partitions;
pub(crate) mod ready;
pub(crate) mod retention;
pub(crate) mod runs;
pub(crate) mod schedules;
pub(crate) mod sealed;
pub(crate) mod spread;
pub(crate) mod starts;
pub(crate) mod transitions;
pub(crate) mod turns;
pub(crate) mod workers;

use crate::transaction::answered;
use sqlx::PgPool;
use std::time::Duration;

/// Wake-ups sent through this channel; the poll is the truth and right without it.
pub(crate) const WAKE_CHANNEL: &str = "loopwright_ready";

/// What this program can read.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Known {
    /// Newest format of a row of history, and of a stored state.
    pub(crate) history: u16,
    /// Newest format of a definition.
    pub(crate) definition: u32,
}

impl Known {
    /// Whether it knows a kind of message.
    fn reads(self, kind: &str) -> bool {
        let since = match kind {
            "pause" | "resume" => 2,
            "update" | "terminate" => 3,
            _ => 1,
        };
        self.history >= since
    }
}

/// Everything up to this release; less in a test that lets the process be of an older one.
pub(crate) fn known() -> Known {
    #[cfg(feature = "test-util")]
    if let Some(history) = crate::testing::known_format() {
        // `continue_as_new` came with format 4, labels after 7.
        let definition = if history < 4 { 1 } else { 2 };
        return Known { history, definition };
    }
    Known { history: crate::event::FORMAT, definition: crate::definition::FORMAT }
}

/// Attempts of one transaction that Postgres refused for serialization, deadlock or a broken connection.
const TRANSACTION_TRIES: u32 = 5;

/// Whether the same statement may be sent again: the connection or the server is at fault, not what was sent.
pub fn is_transient(error: &sqlx::Error) -> bool {
    match error {
        // A connection that broke in the middle of an answer shows as a protocol error.
        sqlx::Error::Io(_)
        | sqlx::Error::Tls(_)
        | sqlx::Error::Protocol(_)
        | sqlx::Error::PoolTimedOut
        | sqlx::Error::PoolClosed
        | sqlx::Error::WorkerCrashed => true,
        sqlx::Error::Database(e) => e.code().is_some_and(|c| is_passing(&c)),
        _ => false,
    }
}

/// Whether an SQLSTATE says that the server's condition is at fault, which may pass. Source: appendix A of the manual.
fn is_passing(code: &str) -> bool {
    // Serialization failure, deadlock, lock not available; a cancelled or too slow statement; a standby.
    matches!(code, "40001" | "40P01" | "55P03" | "57014" | "25006")
        // The connection; disk, memory or connections used up; the server stops or starts; its files.
        || ["08", "53", "57P0", "58"].iter().any(|class| code.starts_with(class))
}

/// The pause before try number `tries + 1` of a transaction, or `None` when there is none.
pub(crate) fn retry_pause(tries: u32) -> Option<Duration> {
    (tries < TRANSACTION_TRIES).then(|| Duration::from_millis(fastrand::u64(1..=20) << tries))
}

/// Longest wait of whoever wakes workers: what it has done is done.
const WAKE_MAX: Duration = Duration::from_secs(5);

/// Tells workers that something may be claimable. Best effort: an error is not an error.
pub(crate) async fn wake(pool: &PgPool) {
    let told = sqlx::query("select pg_notify($1, '')").bind(WAKE_CHANNEL).execute(pool);
    if let Err(error) = answered(WAKE_MAX, told).await {
        tracing::debug!(%error, "a wake-up could not be sent; the poll will find the run");
    }
}

#[cfg(test)]
mod tests {
    use super::{is_passing, is_transient};

    #[test]
    fn what_may_pass_is_sent_again_and_what_was_sent_wrong_is_not() {
        for code in ["08006", "40001", "40P01", "55P03", "53100", "53300", "57014", "57P01", "57P03", "25006", "58030"]
        {
            assert!(is_passing(code), "{code}");
        }
        for code in ["22P02", "23505", "23514", "25P02", "42P01", "54000", "XX000", "P0001"] {
            assert!(!is_passing(code), "{code}");
        }
        assert!(is_transient(&sqlx::Error::Protocol("unexpected end".into())));
        assert!(is_transient(&sqlx::Error::WorkerCrashed));
        assert!(!is_transient(&sqlx::Error::RowNotFound));
    }
}
