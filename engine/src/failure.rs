//! Failures: data that says why an attempt, a step or a run did not succeed. They live in histories, so
//! every one of them survives serialization, and a changed meaning is a new code.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::fmt;

/// What the machine may do about a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureKind {
    /// Another attempt may succeed; the retry policy decides whether there is one.
    Retryable,
    /// No further attempt can succeed.
    Permanent,
    /// Work stopped because the run asked it to.
    Cancelled,
    /// One of the four timeouts expired; the code says which.
    TimedOut,
    /// The activity's code panicked.
    Panicked,
    /// The worker that ran the attempt died. Does not consume an attempt of the retry policy.
    Lost,
    /// The work may not go on until something outside changes (for example: no credits). The step waits
    /// and another attempt follows when the run is unblocked. Does not consume an attempt.
    Blocked,
}

/// Why something failed.
///
/// # Shape
/// `code` is a dotted type that retry policies and `catch` match by exact text or `prefix.*`, for example
/// `transient.rate_limited` or `model.output_invalid`. `message` is for people and holds no secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    pub kind: FailureKind,
    pub code: String,
    pub message: String,
    /// Structured detail, `null` when there is none.
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub detail: Value,
    /// Earliest sensible next attempt, in milliseconds from now, as the outside told us.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after_ms: Option<u64>,
    /// What the attempt met is waited for: the one that follows takes its place, and neither the retry policy nor the run's executions
    /// count it. The engine bounds it by time alone, the step's `total` and the run's `timeout`; an activity that has bought something in
    /// vain bounds how often it says this.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub uncounted: bool,
    /// Step path at which it was raised; the engine fills it in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cause: Option<Box<Failure>>,
}

impl Failure {
    /// A failure of the given kind and code.
    pub fn new(kind: FailureKind, code: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            kind,
            code: code.into(),
            message: message.into(),
            detail: Value::Null,
            retry_after_ms: None,
            uncounted: false,
            path: None,
            cause: None,
        }
    }
    /// A failure that another attempt may cure.
    pub fn retryable(code: impl Into<String>, message: impl Into<String>) -> Self {
        Self::new(FailureKind::Retryable, code, message)
    }
    /// A failure that no attempt can cure.
    pub fn permanent(code: impl Into<String>, message: impl Into<String>) -> Self {
        Self::new(FailureKind::Permanent, code, message)
    }
    /// The step must wait until the run is unblocked; `reason` is a code such as `credits`. Whoever is stopped again and again must not
    /// come to the end of the run's executions over it: the attempt does not count.
    pub fn blocked(reason: impl Into<String>, message: impl Into<String>) -> Self {
        Self::new(FailureKind::Blocked, reason, message).without_counting()
    }
    /// The activity noticed the cancellation and stopped.
    #[must_use]
    pub fn cancelled() -> Self {
        Self::new(FailureKind::Cancelled, "cancelled", "cancelled on request")
    }
    #[must_use]
    pub fn with_detail(mut self, detail: Value) -> Self {
        self.detail = detail;
        self
    }
    #[must_use]
    pub fn with_retry_after_ms(mut self, ms: u64) -> Self {
        self.retry_after_ms = Some(ms);
        self
    }
    /// The retry policy does not count the attempt that ends with this.
    #[must_use]
    pub fn without_counting(mut self) -> Self {
        self.uncounted = true;
        self
    }
    #[must_use]
    pub fn with_cause(mut self, cause: Failure) -> Self {
        self.cause = Some(Box::new(cause));
        self
    }

    /// Whether `pattern` (exact text, `prefix.*` or `*`) names this failure's code.
    #[must_use]
    pub fn matches(&self, pattern: &str) -> bool {
        match pattern.strip_suffix('*') {
            Some("") => true,
            Some(prefix) => self.code.starts_with(prefix),
            None => self.code == pattern,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code, self.message)?;
        if let Some(path) = &self.path {
            write!(f, " (at {path})")?;
        }
        Ok(())
    }
}
impl std::error::Error for Failure {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_survives_serialization() {
        use FailureKind as K;
        for kind in [K::Retryable, K::Permanent, K::Cancelled, K::TimedOut, K::Panicked, K::Lost, K::Blocked] {
            let failure = Failure::new(kind, "a.b", "text")
                .with_detail(serde_json::json!({"n": 1}))
                .with_retry_after_ms(5)
                .without_counting()
                .with_cause(Failure::cancelled());
            let text = serde_json::to_string(&failure).expect("serializes");
            assert_eq!(serde_json::from_str::<Failure>(&text).expect("parses"), failure);
        }
        let plain = serde_json::to_string(&Failure::retryable("a.b", "text")).expect("serializes");
        assert!(!plain.contains("uncounted"), "as every release has written it: {plain}");
    }

    #[test]
    fn patterns_are_exact_or_prefix() {
        let failure = Failure::retryable("transient.network", "x");
        assert!(failure.matches("transient.*") && failure.matches("*") && failure.matches("transient.network"));
        assert!(!failure.matches("transient") && !failure.matches("model.*"));
    }
}
