//! On what terms a run comes into the queue: how urgent it is and whose turn it takes.

use crate::{Error, Result};
use serde_json::Value;
use sha2::{Digest, Sha256};

/// The attribute that names whose turn a run takes, if its start does not.
pub const FAIRNESS_ATTRIBUTE: &str = "user_id";
/// Longest fairness key, in bytes. Chosen: an id or a name.
const KEY_BYTES_MAX: usize = 200;

/// How urgent a run is. Of the runs that are due, those of a smaller number are claimed first, whoever else waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Priority(i16);

impl Priority {
    /// # Errors
    /// `input_invalid` outside 1 to 5.
    pub fn new(number: i16) -> Result<Self> {
        if (1..=5).contains(&number) {
            return Ok(Self(number));
        }
        Err(Error::InputInvalid(vec![format!("priority {number}: 1 is first, 3 is usual, 5 is last")]))
    }

    /// 1 to 5.
    #[must_use]
    pub fn number(self) -> i16 {
        self.0
    }
}

impl Default for Priority {
    fn default() -> Self {
        Self(3)
    }
}

/// The terms of one start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Admission {
    pub priority: Priority,
    /// Runs of one priority take turns by this key, for example a user's id: who has 10,000 runs does not delay who has one.
    /// `None`: the attribute [`FAIRNESS_ATTRIBUTE`], and nobody's if there is none. Children and forks have their parent's.
    pub fairness_key: Option<String>,
}

impl Admission {
    /// Whose turn it takes.
    #[must_use]
    pub fn key<'a>(&'a self, attributes: &'a Value) -> &'a str {
        let named = self.fairness_key.as_deref();
        named.or_else(|| attributes.get(FAIRNESS_ATTRIBUTE).and_then(Value::as_str)).unwrap_or_default()
    }

    /// # Errors
    /// `too_large`.
    pub(crate) fn check(&self, attributes: &Value) -> Result<()> {
        match self.key(attributes).len() {
            ..=KEY_BYTES_MAX => Ok(()),
            actual => Err(Error::TooLarge { what: "the fairness key", actual, limit: KEY_BYTES_MAX }),
        }
    }
}

/// The lane of a fairness key: a hash, so that lanes are spread evenly. Two keys in one lane share their turns.
pub(crate) fn lane(key: &str) -> i32 {
    if key.is_empty() {
        return 0;
    }
    let digest = Sha256::digest(key.as_bytes());
    i32::from_be_bytes([digest[0], digest[1], digest[2], digest[3]])
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_key_is_the_one_that_was_named_or_the_users() {
        let attributes = json!({ "user_id": "u1" });
        let named = Admission { fairness_key: Some("team".into()), ..Admission::default() };
        assert_eq!(named.key(&attributes), "team");
        assert_eq!(Admission::default().key(&attributes), "u1");
        assert_eq!(Admission::default().key(&json!({ "user_id": 7 })), "");
        let long = Admission { fairness_key: Some("x".repeat(201)), ..Admission::default() };
        assert_eq!(long.check(&attributes).unwrap_err().code(), "too_large");
        assert_ne!(lane("u1"), lane("u2"));
        assert_eq!(lane(""), 0);
    }

    #[test]
    fn a_priority_is_one_to_five() {
        assert_eq!(Priority::default().number(), 3);
        assert_eq!(Priority::new(1).unwrap().number(), 1);
        for wrong in [0, 6, -1] {
            assert_eq!(Priority::new(wrong).unwrap_err().code(), "input_invalid");
        }
    }
}
