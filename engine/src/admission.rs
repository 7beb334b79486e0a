//! On what terms a run comes into the queue: how urgent it is and whose turn it takes.

#[cfg(feature = "runtime")]
use crate::definition::Definition;
pub use crate::definition::OnConflict;
use crate::{Error, Result, view::RunStatus};
use serde::{Deserialize, Serialize};
use serde_json::Value;
#[cfg(feature = "runtime")]
use sha2::{Digest, Sha256};
use std::{str::FromStr, time::Duration};

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

/// Longest time that a chain of runs may have. Chosen: whoever wants longer wants no end.
#[cfg(feature = "runtime")]
const CHAIN_TIMEOUT_MAX: Duration = Duration::from_secs(3_650 * 86_400);

/// What a start under an id (`Start::workflow_id`) may do when no run under it is open and one has closed. Temporal's words.
///
/// The run that counts is the one that closed last. In a chain that is its last run, never one that continued as another. A run
/// that came from a file does not count, and one that retention has taken away leaves the id free.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum IdReuse {
    #[default]
    AllowDuplicate,
    /// Only if that run failed (timed out included), was cancelled or was terminated.
    AllowDuplicateFailedOnly,
    RejectDuplicate,
}

impl IdReuse {
    pub const ALL: [Self; 3] = [Self::AllowDuplicate, Self::AllowDuplicateFailedOnly, Self::RejectDuplicate];

    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::AllowDuplicate => "allow_duplicate",
            Self::AllowDuplicateFailedOnly => "allow_duplicate_failed_only",
            Self::RejectDuplicate => "reject_duplicate",
        }
    }

    /// Whether a run may follow one that closed so.
    #[must_use]
    pub fn allows(self, closed: RunStatus) -> bool {
        match self {
            Self::AllowDuplicate => true,
            Self::AllowDuplicateFailedOnly => {
                matches!(closed, RunStatus::Failed | RunStatus::Cancelled | RunStatus::Terminated)
            }
            Self::RejectDuplicate => false,
        }
    }
}

impl FromStr for IdReuse {
    type Err = String;
    fn from_str(text: &str) -> std::result::Result<Self, String> {
        word(text, Self::ALL, Self::as_str)
    }
}

/// What a start under an id does when a run under it is open; one that is paused or quarantined is. Temporal's words.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum IdConflict {
    /// The open run is the answer.
    #[default]
    UseExisting,
    Fail,
    /// It is terminated, and the new run starts in the same transaction.
    TerminateExisting,
}

impl IdConflict {
    pub const ALL: [Self; 3] = [Self::UseExisting, Self::Fail, Self::TerminateExisting];

    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::UseExisting => "use_existing",
            Self::Fail => "fail",
            Self::TerminateExisting => "terminate_existing",
        }
    }
}

impl FromStr for IdConflict {
    type Err = String;
    fn from_str(text: &str) -> std::result::Result<Self, String> {
        word(text, Self::ALL, Self::as_str)
    }
}

/// The value that is written so.
fn word<T: Copy>(text: &str, all: [T; 3], of: fn(T) -> &'static str) -> std::result::Result<T, String> {
    let found = all.into_iter().find(|value| of(*value) == text);
    found.ok_or_else(|| format!("`{text}` is none of {}", all.map(of).join(", ")))
}

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
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// The same text is the same group, whatever the workflow.
    pub group: String,
    pub limit: u32,
    pub on_conflict: OnConflict,
}

/// At most `starts` runs of a key begin in any period of `per_ms`; the others wait for their time, in order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
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
    /// The runs that continue this one have it too, and its forks.
    pub place: Option<Place>,
    /// The same: each start of a chain counts, and each fork.
    pub rate: Option<Rate>,
    /// What becomes of the start if the last run under its id has closed, or one is open.
    pub id_reuse: IdReuse,
    pub id_conflict: IdConflict,
    /// Counted from this start: no run of the chain goes on for longer, only its `finally`, nor one that a reset puts in the place of one
    /// of them. Temporal's execution timeout. 1 s to ten years.
    pub chain_timeout: Option<Duration>,
}

/// What of a start's terms the next runs of its chain and its forks must have and no definition says: column `runs.admission`.
#[cfg(feature = "runtime")]
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Named {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) place: Option<Place>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) rate: Option<Rate>,
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

    /// Whether it says anything that only an id gives a meaning.
    #[cfg(feature = "runtime")]
    pub(crate) fn speaks_of_an_id(&self) -> bool {
        self.id_reuse != IdReuse::default() || self.id_conflict != IdConflict::default()
    }

    /// What goes along a chain. `None`: the definition says all.
    #[cfg(feature = "runtime")]
    pub(crate) fn named(&self) -> Option<Named> {
        let there = |place: Place| Place { on_conflict: place.on_conflict.once_there(), ..place };
        let named = Named { place: self.place.clone().map(there), rate: self.rate.clone() };
        (named != Named::default()).then_some(named)
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
        if self.chain_timeout.is_some_and(|t| !(Duration::from_secs(1)..=CHAIN_TIMEOUT_MAX).contains(&t)) {
            wrong.push("chain timeout: 1 s to ten years".into());
        }
        // Temporal refuses it too: nothing could ever start after the termination.
        if (self.id_reuse, self.id_conflict) == (IdReuse::RejectDuplicate, IdConflict::TerminateExisting) {
            wrong.push(
                "`terminate_existing` closes the run, and `reject_duplicate` lets none follow it: choose one".into(),
            );
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
    fn policies_are_written_as_in_temporal_and_contradictions_are_refused() {
        for reuse in IdReuse::ALL {
            assert_eq!(reuse.as_str().parse(), Ok(reuse));
            assert_eq!(serde_json::to_value(reuse).unwrap(), json!(reuse.as_str()));
        }
        for conflict in IdConflict::ALL {
            assert_eq!(conflict.as_str().parse(), Ok(conflict));
            assert_eq!(serde_json::to_value(conflict).unwrap(), json!(conflict.as_str()));
        }
        let wrong = "none".parse::<IdConflict>().unwrap_err();
        assert_eq!(wrong, "`none` is none of use_existing, fail, terminate_existing");
        let followed: Vec<RunStatus> =
            RunStatus::ALL.into_iter().filter(|s| IdReuse::AllowDuplicateFailedOnly.allows(*s)).collect();
        assert_eq!(followed, [RunStatus::Failed, RunStatus::Cancelled, RunStatus::Terminated]);
        for wrong in [
            Admission {
                id_reuse: IdReuse::RejectDuplicate,
                id_conflict: IdConflict::TerminateExisting,
                ..Admission::default()
            },
            Admission { chain_timeout: Some(Duration::ZERO), ..Admission::default() },
        ] {
            assert_eq!(wrong.check(&json!({})).unwrap_err().code(), "input_invalid");
        }
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
