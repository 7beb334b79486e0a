//! Keys of providers: which of them may be used now, and the sealed ones of users and of the platform.
//!
//! ```text
//! user ─ REST, CLI ─▶ Keys::put ──────────┐
//! operator ─ CLI ──▶ Keys::put_platform ──┴ envelope (random DEK, wrapped by the ring's first KEK) ─▶ api_keys
//! orchestrator ─▶ Keys::own, Keys::platform (opened in memory) · Board (cooling, disabled; read once a second) · Rates (per minute)
//! ```
//!
//! It makes no request and chooses no model: that is [`crate::orchestrator`]. A key leaves it as a [`secrecy::SecretString`] only.

mod board;
mod envelope;
mod rate;
mod ring;
mod rotate;
mod rows;
mod store;

pub use board::{Board, FORBIDDEN, FORBIDDEN_FOR, KeyRef, RESTS_MAX, STANDING_AGE_MAX, Standing, Wait};
pub use envelope::{Content, Envelope, Place, VERSION, open, rewrap, seal};
pub use rate::{Grant, Rates, Taken, WINDOW};
pub use ring::Ring;
pub use rotate::Rewrapped;
pub use rows::{KeyView, SealedKey, Status};
pub use store::{KEY_ROWS_PER_USER_MAX, KEYS_PER_USER_MAX, Keys, NewKey};

use crate::provider::address::AddressError;
use uuid::Uuid;

/// Why a key is not stored, found or opened. No text holds anything of a key.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("keys cannot be kept here: the operator has set no LOOPWRIGHT_KEY_ENCRYPTION_KEYS")]
    Unavailable,
    #[error("{0}")]
    Invalid(String),
    #[error("the base URL is refused: {0}")]
    Address(#[from] AddressError),
    #[error("there is no such key")]
    NotFound,
    #[error(
        "a user keeps at most {KEYS_PER_USER_MAX} keys, and {KEY_ROWS_PER_USER_MAX} with those that he deleted: delete one, or use a former one again"
    )]
    TooMany,
    #[error("key {id} does not open: its row was changed, or copied from another one")]
    Corrupt { id: Uuid },
    #[error(
        "key encryption key `{kek}` is not in this program's ring: put it back into LOOPWRIGHT_KEY_ENCRYPTION_KEYS, behind the first"
    )]
    KekMissing { kek: String },
    #[error("database: {0}")]
    Sql(#[from] sqlx::Error),
}

impl Error {
    /// Stable text for programs; listed in the crate's README.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Unavailable => "keys_unavailable",
            Self::Invalid(_) => "key_invalid",
            Self::Address(_) => "address_refused",
            Self::NotFound => "key_not_found",
            Self::TooMany => "keys_too_many",
            Self::Corrupt { .. } => "key_corrupt",
            Self::KekMissing { .. } => "key_encryption_key_missing",
            Self::Sql(_) => "store",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_readme_lists_every_code() {
        let readme = include_str!("../../README.md");
        for error in [
            Error::Unavailable,
            Error::Invalid(String::new()),
            Error::Address(AddressError::NotPublic),
            Error::NotFound,
            Error::TooMany,
            Error::Corrupt { id: Uuid::nil() },
            Error::KekMissing { kek: String::new() },
        ] {
            assert!(readme.contains(&format!("`{}`", error.code())), "{} is not in the README", error.code());
        }
    }
}
