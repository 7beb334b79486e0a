//! What work exists, as pure data: the contract of each activity that a definition may name.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;

/// The contract of one activity at one major version.
///
/// # Shape
/// `input_schema` and `output_schema` are JSON Schemas (2020-12 subset). `name` is `gather@1`: a contract
/// name, an at sign, its major version.
/// # Units
/// Timeouts in milliseconds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Signature {
    pub name: String,
    pub summary: String,
    pub input_schema: Value,
    pub output_schema: Value,
    /// Start-to-close limit of one attempt where the definition sets none.
    pub run_timeout_ms: u64,
    /// Longest silence between heartbeats; `None` for activities that do not report.
    pub heartbeat_timeout_ms: Option<u64>,
    /// The transition hook is called when an attempt starts and ends, and its readings are recorded.
    pub metered: bool,
    /// A second execution with the same idempotency key is harmless.
    pub idempotent: bool,
    /// Failure codes that the activity declares, for `catch` and `retry` patterns.
    pub failure_codes: Vec<String>,
}

/// All contracts that a worker offers, by full name (`gather@1`).
#[derive(Clone, Debug, Default)]
pub struct Catalog(BTreeMap<String, Signature>);

impl Catalog {
    /// A catalog of the given contracts; a later one with the same name replaces an earlier one.
    pub fn new(signatures: impl IntoIterator<Item = Signature>) -> Self {
        Self(signatures.into_iter().map(|s| (s.name.clone(), s)).collect())
    }
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&Signature> {
        self.0.get(name)
    }
    /// Contracts in order of their names.
    pub fn iter(&self) -> impl Iterator<Item = &Signature> {
        self.0.values()
    }
}
