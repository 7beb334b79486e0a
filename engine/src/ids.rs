//! Identifiers. Every id is a newtype so that two of them cannot be swapped at a call site.

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::{fmt, str::FromStr};
use uuid::Uuid;

macro_rules! uuid_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub Uuid);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
        impl FromStr for $name {
            type Err = uuid::Error;
            fn from_str(text: &str) -> Result<Self, Self::Err> {
                Uuid::parse_str(text).map(Self)
            }
        }
    };
}

uuid_id! {
    /// One execution of a definition. A UUIDv7: its first 48 bits are the start time in milliseconds.
    RunId
}
uuid_id! {
    /// One try of one activity. Derived from (run, step path, attempt number), so that whoever decides
    /// the same attempt names it alike.
    AttemptId
}
uuid_id! {
    /// One start of one worker process. Never reused: a restarted process is another worker.
    WorkerId
}

/// Number of logical shards. Chosen, not measured: enough to spread over a few dozen nodes.
pub const SHARDS: i16 = 128;

impl RunId {
    /// A new id for a run that starts now: by this machine's clock, right or wrong. Of the time in it lists are sorted and pages read, and
    /// nothing is decided by it; what is, is the database's (`engine_now()`).
    #[must_use]
    pub fn new() -> Self {
        Self(Uuid::now_v7())
    }

    /// The logical shard that leads every key of this run, in `0..SHARDS`.
    #[must_use]
    pub fn shard(&self) -> i16 {
        // The last byte of a UUIDv7 is random; the first bytes are time and would put a burst on one shard.
        i16::from(self.0.as_bytes()[15]) % SHARDS
    }
}

impl Default for RunId {
    fn default() -> Self {
        Self::new()
    }
}

impl AttemptId {
    /// The id of attempt `number` (1-based) of the step at `path` in `run`.
    #[must_use]
    pub fn derive(run: RunId, path: &str, number: u32) -> Self {
        Self(Uuid::new_v5(&run.0, format!("{path}#{number}").as_bytes()))
    }
}

/// Content hash of a definition with its bundle: SHA-256 of their canonical JSON. Shown as 64 hex digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DefinitionHash(pub [u8; 32]);

impl DefinitionHash {
    /// Hash of the given bytes.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }
}

impl fmt::Display for DefinitionHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}
impl fmt::Debug for DefinitionHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
impl FromStr for DefinitionHash {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut out = [0u8; 32];
        if text.len() != 64 || !text.is_ascii() {
            return Err("a definition hash is 64 hex digits".into());
        }
        for (i, byte) in out.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&text[2 * i..2 * i + 2], 16)
                .map_err(|_| "a definition hash is 64 hex digits".to_owned())?;
        }
        Ok(Self(out))
    }
}
impl Serialize for DefinitionHash {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}
impl<'de> Deserialize<'de> for DefinitionHash {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}
