//! On what terms a run comes into the queue: how urgent it is and whose turn it takes.

#[cfg(feature = "runtime")]
use crate::definition::Definition;
pub use crate::definition::OnConflict;
use crate::{Error, Result};
use serde_json::Value;
#[cfg(feature = "runtime")]
use sha2::{Digest, Sha256};

/// The attribute that names whose turn a run takes, if its start does not.
pub const FAIRNESS_ATTRIBUTE: &str = "user_id";
/// Longest fairness key, in bytes. Chosen: an id or a name.
pub(crate) const KEY_BYTES_MAX: usize = 200;
#[cfg(feature = "runtime")]
/// Largest limit of a group, and most starts of a period. Source: section 3 of the workflow language.
const LIMIT_MAX: u32 = 1_000;
#[cfg(feature = "runtime")]
/// Longest period of a rate.
pub(crate) const PERIOD_MS_MAX: i64 = 30 * 86_400_000;

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

/// A group that a run takes part in: at most `limit` of its runs are under way at the same time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The same text is the same group, whatever the workflow.
    pub group: String,
    pub limit: u32,
    pub on_conflict: OnConflict,
}

/// At most `starts` runs of a key begin in any period of `per_ms`; the others wait for their time, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rate {
    pub key: String,
    /// 1 to 1,000.
    pub starts: u32,
    pub per_ms: i64,
}

/// The terms of one start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Admission {
    pub priority: Priority,
    /// Runs of one priority take turns by this key, for example a user's id: who has 10,000 runs does not delay who has one.
    /// `None`: the attribute [`FAIRNESS_ATTRIBUTE`], and nobody's if there is none. Children and forks have their parent's.
    pub fairness_key: Option<String>,
    /// `None`: the definition's `concurrency`, if it has one.
    pub place: Option<Place>,
    pub rate: Option<Rate>,
}

impl Admission {
    /// Whose turn it takes.
    #[must_use]
    pub fn key<'a>(&'a self, attributes: &'a Value) -> &'a str {
        let named = self.fairness_key.as_deref();
        named.or_else(|| attributes.get(FAIRNESS_ATTRIBUTE).and_then(Value::as_str)).unwrap_or_default()
    }

    /// The place that a run with these inputs needs.
    ///
    /// # Errors
    /// `input_invalid`: the definition's group cannot be evaluated.
    #[cfg(feature = "runtime")]
    pub(crate) fn place(&self, definition: &Definition, inputs: &Value) -> Result<Option<Place>> {
        let named = self.place.clone().map(Ok);
        let place = named.or_else(|| definition.concurrency.as_ref().map(|group| group.place(inputs)));
        place
            .transpose()
            .map_err(|failure| Error::InputInvalid(vec![format!("concurrency.group: {}", failure.message)]))
    }

    /// # Errors
    /// `too_large`, `input_invalid`.
    #[cfg(feature = "runtime")]
    pub(crate) fn check(&self, attributes: &Value) -> Result<()> {
        let mut wrong = Vec::new();
        if let Some(Place { group, limit, .. }) = &self.place
            && (group.is_empty() || group.len() > KEY_BYTES_MAX || !(1..=LIMIT_MAX).contains(limit))
        {
            wrong.push(format!("concurrency: a group of 1 to {KEY_BYTES_MAX} bytes and a limit of 1 to {LIMIT_MAX}"));
        }
        if let Some(Rate { key, starts, per_ms }) = &self.rate
            && (key.is_empty()
                || key.len() > KEY_BYTES_MAX
                || !(1..=LIMIT_MAX).contains(starts)
                || !(1..=PERIOD_MS_MAX).contains(per_ms))
        {
            wrong.push(format!(
                "rate: a key of 1 to {KEY_BYTES_MAX} bytes, 1 to {LIMIT_MAX} starts, a period up to 30 days"
            ));
        }
        if !wrong.is_empty() {
            return Err(Error::InputInvalid(wrong));
        }
        match self.key(attributes).len() {
            ..=KEY_BYTES_MAX => Ok(()),
            actual => Err(Error::TooLarge { what: "the fairness key", actual, limit: KEY_BYTES_MAX }),
        }
    }
}

/// The lane of a fairness key: a hash, so that lanes are spread evenly. Two keys in one lane share their turns.
#[cfg(feature = "runtime")]
pub(crate) fn lane(key: &str) -> i32 {
    if key.is_empty() {
        return 0;
    }
    let digest = Sha256::digest(key.as_bytes());
    i32::from_be_bytes([digest[0], digest[1], digest[2], digest[3]])
}

#[cfg(all(test, feature = "runtime"))]
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
