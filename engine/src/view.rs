//! What people and programs see of a run: pure data, folded from its history. Read models are built from these
//! and never read back by a decision.

use crate::{
    failure::Failure,
    ids::{DefinitionHash, RunId},
};
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Status of a run. `Pending` is a run that nobody has claimed yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunStatus {
    Pending,
    Running,
    Paused,
    /// The body is being stopped, or `finally` runs after a failure or a cancel.
    Cancelling,
    Completed,
    Failed,
    Cancelled,
    /// Ended at once by an operator, without `finally`.
    Terminated,
    /// Another run goes on in its place: [`Chain::continued_as`].
    Continued,
    /// An invariant broke; an operator decides.
    Quarantined,
}

impl RunStatus {
    /// Whether nothing will happen to the run any more.
    #[must_use]
    pub fn is_closed(self) -> bool {
        matches!(self, Self::Completed | Self::Failed | Self::Cancelled | Self::Terminated | Self::Continued)
    }
    /// As in SQL, JSON and chat.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Cancelling => "cancelling",
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
            Self::Terminated => "terminated",
            Self::Continued => "continued",
            Self::Quarantined => "quarantined",
        }
    }
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::Pending,
        Self::Running,
        Self::Paused,
        Self::Cancelling,
        Self::Completed,
        Self::Failed,
        Self::Cancelled,
        Self::Terminated,
        Self::Continued,
        Self::Quarantined,
    ];

    /// The inverse of [`Self::as_str`].
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|s| s.as_str() == text)
    }
}

/// Something that a run waits for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Waiting {
    /// A signal from a person or a program.
    Signal {
        path: String,
        signal: String,
        show: Option<String>,
        form: Option<Value>,
        to: Vec<String>,
        deadline: DateTime<Utc>,
    },
    /// An approval: answer with `Client::approve` under the step's id.
    Approval { path: String, step: String, show: Option<String>, to: Vec<String>, deadline: DateTime<Utc> },
    /// A `wait` step.
    Timer { path: String, until: DateTime<Utc> },
    /// The next attempt of a failed activity.
    Retry { path: String, until: DateTime<Utc>, failure: Failure },
    /// Something outside, such as credits.
    Blocked { path: String, reason: String, message: String },
    /// A child run.
    Child { path: String, run_id: RunId },
    /// A worker with room, or one that offers the activity.
    Queued { path: String, activity: String },
}

/// What became of an update.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "status", rename_all = "snake_case")]
pub enum Answer {
    /// A step took it and says this.
    Completed { result: Value },
    /// No step takes it; nothing happened.
    Rejected { problems: Vec<String> },
    /// It was accepted and has no result: the reply failed, or the run closed before a step took it.
    Failed { failure: Failure },
}

/// An update that is answered. The same id has the same answer for ever.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Updated {
    pub id: String,
    #[serde(flatten)]
    pub answer: Answer,
}

/// What a query says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Queried {
    pub name: String,
    pub result: Value,
    /// Of the run, when it was asked.
    pub status: RunStatus,
    /// The run's transitions that it has seen.
    pub seq: u64,
}

/// An attempt that runs now.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LiveAttempt {
    pub path: String,
    pub activity: String,
    /// 1-based.
    pub attempt: u32,
    pub started_at: DateTime<Utc>,
    /// Newest heartbeat's progress, `null` if there was none.
    pub progress: Value,
}

/// One node of the run's tree that has begun, in order of the definition; finished blocks are folded into one node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NodeView {
    pub path: String,
    /// Step id.
    pub step: String,
    /// `running`, `waiting`, `succeeded`, `failed`, `recovered`, `skipped`, `cancelled`.
    pub status: String,
    /// For `foreach`: ended items and all items; for `repeat`: round and its maximum.
    pub done: Option<u32>,
    pub total: Option<u32>,
    pub output: Option<Value>,
    pub failure: Option<Failure>,
}

/// A run, as read.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RunView {
    pub run_id: RunId,
    pub workflow: String,
    pub definition: DefinitionHash,
    pub workflow_id: Option<String>,
    pub status: RunStatus,
    /// Number of transitions so far; also the newest history row.
    pub seq: u64,
    pub attributes: Value,
    pub inputs: Value,
    pub started_at: DateTime<Utc>,
    pub closed_at: Option<DateTime<Utc>>,
    pub output: Option<Value>,
    pub failure: Option<Failure>,
    pub waiting: Vec<Waiting>,
    pub live: Vec<LiveAttempt>,
    pub nodes: Vec<NodeView>,
    /// Where it branched off, if it is a fork.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub forked_from: Option<Origin>,
    /// Its place among runs of which each goes on as the next.
    #[serde(default, skip_serializing_if = "Chain::is_alone")]
    pub chain: Chain,
    /// When it came from a file: it can be read and forked, nothing else.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub imported_at: Option<DateTime<Utc>>,
    /// What else it waits for: `for a place in concurrency group …`, `for a worker of queue … with the labels …`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held: Option<String>,
    /// Messages and orders that were sent to it and that it has not read: what it waits for may have come.
    #[serde(default)]
    pub unread: u64,
}

/// A run's place among runs of which each goes on as the next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chain {
    /// The first of them, by which its parent knows it; absent in the first itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first: Option<RunId>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub continued_from: Option<RunId>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub continued_as: Option<RunId>,
}

impl Chain {
    /// Neither before nor after another run.
    #[must_use]
    pub fn is_alone(&self) -> bool {
        *self == Self::default()
    }
}

/// The place in another run where a fork begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    pub run_id: RunId,
    /// The last transition that both share.
    pub seq: u64,
}

/// A row of a list of runs.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RunSummary {
    pub run_id: RunId,
    pub workflow: String,
    pub workflow_id: Option<String>,
    pub status: RunStatus,
    /// Why it is parked, empty when it is not: `signal`, `approval`, `timer`, `credits`, …
    pub waiting: Option<String>,
    pub attributes: Value,
    pub seq: u64,
    pub started_at: DateTime<Utc>,
    pub closed_at: Option<DateTime<Utc>>,
    #[serde(default, skip_serializing_if = "Chain::is_alone")]
    pub chain: Chain,
}

/// One transition of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HistoryRow {
    /// 1, 2, 3 … without gaps.
    pub seq: u64,
    pub epoch: u64,
    pub format: u16,
    /// Each is an object with a `type` and its fields; see `event`.
    pub events: Vec<Value>,
    pub at: DateTime<Utc>,
}

/// An archive of retired runs, as it is recorded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Recorded {
    /// Its name, without the folder.
    pub file: String,
    /// Of the file as it lies there; hex.
    pub sha256: String,
    pub bytes: u64,
    pub runs: u64,
    /// Its runs had closed before.
    pub closed_before: DateTime<Utc>,
    pub made_at: DateTime<Utc>,
}
