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
pub(crate) mod outbox;
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

/// What an error of Postgres speaks against.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The connection or the server's condition, which may pass: the same may be sent again.
    Passing,
    /// Neither what was sent nor the run that it is about, but how things are set up: rights, or the schema of another release.
    /// Another session or another worker may have an answer, and so may this one when an operator has mended it.
    Setup,
    /// What was sent.
    Sent,
}

pub(crate) fn fault(error: &sqlx::Error) -> Fault {
    match error {
        // A connection that broke in the middle of an answer shows as a protocol error. The last is of connecting.
        sqlx::Error::Io(_)
        | sqlx::Error::Tls(_)
        | sqlx::Error::Protocol(_)
        | sqlx::Error::PoolTimedOut
        | sqlx::Error::PoolClosed
        | sqlx::Error::WorkerCrashed
        | sqlx::Error::Configuration(_) => Fault::Passing,
        sqlx::Error::Database(e) => e.code().map_or(Fault::Sent, |code| fault_of(&code)),
        sqlx::Error::ColumnNotFound(_)
        | sqlx::Error::ColumnIndexOutOfBounds { .. }
        | sqlx::Error::TypeNotFound { .. } => Fault::Setup,
        _ => Fault::Sent,
    }
}

/// Whether the same statement may be sent again: the connection or the server is at fault, not what was sent.
pub fn is_transient(error: &sqlx::Error) -> bool {
    fault(error) == Fault::Passing
}

/// What an SQLSTATE speaks against. Source: appendix A of the manual.
fn fault_of(code: &str) -> Fault {
    let of = |classes: &[&str]| classes.iter().any(|class| code.starts_with(class));
    // Serialization failure, deadlock, lock not available; a cancelled or too slow statement; a standby; a transaction that said
    // nothing for too long. The connection; credentials and the name of the database, which change while sessions live; disk, memory or
    // connections used up; the server stops or starts; its files.
    if matches!(code, "40001" | "40P01" | "55P03" | "57014" | "25006" | "25P03" | "25P04")
        || of(&["08", "28", "3D", "53", "57P0", "58"])
    {
        return Fault::Passing;
    }
    // A feature or a plan that the session does not have; transactions and prepared statements that somebody in between mixes up; rights,
    // and what is not there; Postgres' own faults.
    // What is damaged is this run's row, and no other session reads it better.
    if of(&["0A", "25", "26", "3F", "42", "XX"]) && code != "XX001" {
        return Fault::Setup;
    }
    Fault::Sent
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
    use super::{Fault, fault_of, is_transient};

    #[test]
    fn what_may_pass_is_sent_again_and_only_what_was_sent_wrong_speaks_against_its_run() {
        let passing = [
            "08006", "28000", "28P01", "3D000", "40001", "40P01", "55P03", "53100", "53300", "57014", "57P01", "57P03",
            "25006", "25P03", "58030",
        ];
        let setup = ["0A000", "25P02", "26000", "3F000", "42501", "42703", "42P01", "42883", "XX000"];
        let sent = ["21000", "22P02", "23505", "23514", "54000", "P0001", "XX001"];
        for (codes, fault) in [(&passing[..], Fault::Passing), (&setup, Fault::Setup), (&sent, Fault::Sent)] {
            for code in codes {
                assert_eq!(fault_of(code), fault, "{code}");
            }
        }
        assert!(is_transient(&sqlx::Error::Protocol("unexpected end".into())));
        assert!(is_transient(&sqlx::Error::WorkerCrashed));
        assert!(!is_transient(&sqlx::Error::RowNotFound));
    }
}
