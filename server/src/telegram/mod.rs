//! The bot: how a user lives with the product.
//!
//! ```text
//! Telegram ─▶ poll ─▶ telegram_inbox ─▶ act (intent, payments) ─▶ engine::Client, ledger
//!    ▲                                     │ one transaction with what it causes
//!    └── send ◀── telegram_outbox ◀────────┴──── notify ◀── the engine's outbox, describe
//! ```
//!
//! No state is kept in memory: a conversation is a run that waits for a signal. Whatever is acted upon was stored before,
//! and whatever is said is stored before it is sent. Start reading at [`run`].

mod act;
mod api;
pub mod intent;
mod notify;
mod payments;
mod poll;
pub mod render;
mod run;
mod send;
mod stars;

pub use run::run;
pub use stars::StarList;

use crate::{config, rest::Archives, store::Store};
use loopwright_activities::billing::ledger::LedgerError;
use loopwright_engine::client::Client;
use std::{sync::Arc, time::Duration};

/// What the bot works with. Cheap to clone.
#[derive(Clone)]
pub struct Parts {
    pub store: Store,
    pub client: Client,
    /// Where `/download` comes from.
    pub archives: Arc<dyn Archives>,
    pub settings: config::Telegram,
    pub billing: config::Billing,
    pub pace: Pace,
}

/// How fast things go. The defaults are for Telegram; tests are faster.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Between two messages of one chat. Source: Telegram's advice of one a second.
    pub chat: Duration,
    /// Between any two requests. Source: Telegram's advice of 30 a second.
    pub overall: Duration,
    /// Between two looks at a table when nothing said that there is something.
    pub look: Duration,
    /// First pause after a failure; doubled up to [`Self::pause_max`].
    pub pause: Duration,
    pub pause_max: Duration,
    /// Longest wait of a long poll.
    pub poll: Duration,
    /// A run is looked at this often though it did not move: its attempts report progress.
    pub refresh: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            chat: Duration::from_millis(1_050),
            overall: Duration::from_millis(35),
            look: Duration::from_millis(500),
            pause: Duration::from_secs(1),
            pause_max: Duration::from_secs(60),
            poll: Duration::from_secs(30),
            refresh: Duration::from_secs(10),
        }
    }
}

impl Pace {
    /// The pause after `tries` failures in a row.
    fn after(&self, tries: u32) -> Duration {
        self.pause.saturating_mul(1 << tries.saturating_sub(1).min(10)).min(self.pause_max)
    }
}

/// Why something could not be done.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Store(#[from] crate::store::Error),
    #[error(transparent)]
    Engine(loopwright_engine::Error),
    #[error(transparent)]
    Ledger(LedgerError),
    #[error("Telegram refuses the token; set TELEGRAM_BOT_TOKEN to the one that BotFather shows")]
    Token,
    #[error("the right to poll was lost")]
    LeaseLost,
    #[error("Telegram: {0}")]
    Telegram(String),
}

// A database that is away is the same to us whoever was asked: it is waited for, and counts as nobody's failure.
impl From<loopwright_engine::Error> for Error {
    fn from(error: loopwright_engine::Error) -> Self {
        match error {
            loopwright_engine::Error::Sql(error) => Self::Store(error.into()),
            other => Self::Engine(other),
        }
    }
}

impl From<LedgerError> for Error {
    fn from(error: LedgerError) -> Self {
        match error {
            LedgerError::Sql(error) => Self::Store(error.into()),
            other => Self::Ledger(other),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::telegram::testing;

    #[test]
    fn a_database_that_is_away_is_away_whoever_was_asked() {
        let away = |error: Error| matches!(error, Error::Store(crate::store::Error::Unavailable(_)));
        assert!(away(LedgerError::Sql(testing::away()).into()));
        assert!(away(loopwright_engine::Error::Sql(testing::away()).into()));
        assert!(!away(LedgerError::Sql(testing::broken()).into()));
        assert!(!away(LedgerError::NotPositive.into()));
        assert!(!away(loopwright_engine::Error::LeaseLost.into()));
    }
}
