//! What is asked of the engine, and what is answered, as plain data: what [`Client`](crate::client::Client) takes and gives and the store
//! keeps. It knows neither of the two.

use crate::{
    admission::Admission,
    definition::{Bundle, Definition},
    filter::Query,
    ids::{DefinitionHash, RunId},
};
use serde_json::Value;

/// A request to start a run.
#[derive(Clone, Debug)]
pub struct Start {
    /// Given by callers who must name the run themselves; otherwise a new id. An existing run with this id is returned.
    pub run_id: Option<RunId>,
    pub definition: DefinitionHash,
    /// Checked against the definition's inputs; defaults are filled in.
    pub inputs: Value,
    /// Business key, in the words of policies *the id*: at most one open run has it. A start under a taken one returns the open run,
    /// unless `admission` says otherwise.
    pub workflow_id: Option<String>,
    /// Flat JSON object for hooks, filters and read models. Fixed for the life of the run. At most 8 KiB.
    pub attributes: Value,
    /// Task queue; `default` if empty. No brackets.
    pub queue: String,
    /// Outbox topic that hears of every transition.
    pub topic: Option<String>,
    /// How urgent it is and whose turn it takes.
    pub admission: Admission,
}

/// What a start came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Started {
    pub run_id: RunId,
    /// False when the run id or the business key named a run, which is the one returned.
    pub created: bool,
}

/// A message into a run.
#[derive(Clone, Debug, Default)]
pub struct Signal {
    pub name: String,
    /// At most 256 KiB.
    pub payload: Value,
    /// Sender's id of this message: a second message with the same id is dropped.
    pub dedupe_id: Option<String>,
    /// Who sent it, as `user:<id>`.
    pub sender: Option<String>,
}

/// A definition to deploy.
#[derive(Clone, Debug)]
pub struct Deploy {
    pub definition: Definition,
    pub bundle: Bundle,
    /// The text as written.
    pub source: String,
    pub author: Option<String>,
    pub message: Option<String>,
}

/// What a deployment came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deployed {
    pub hash: DefinitionHash,
    pub version: u32,
    /// False when this hash was deployed before; then only the pointer may have moved.
    pub created: bool,
}

/// A deployed definition.
#[derive(Clone, Debug)]
pub struct Version {
    pub name: String,
    pub version: u32,
    pub hash: DefinitionHash,
    pub author: Option<String>,
    pub message: Option<String>,
    pub created_at: chrono::DateTime<chrono::Utc>,
    /// Whether `current` points here.
    pub current: bool,
}

/// Which runs to list: newest first, `after` is the last run id of the page before.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// All of these attributes must be equal, for example `{"user_id": "…"}`.
    pub attributes: Option<Value>,
    pub workflow: Option<String>,
    pub open_only: bool,
    pub after: Option<RunId>,
    /// What else must hold; see [`Query`].
    pub matching: Option<Query>,
    /// At most 200.
    pub limit: u32,
}
