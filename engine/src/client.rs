//! The one door in: everything that asks something of a run comes through here.

use crate::{
    Error, Result,
    definition::{Bundle, Definition},
    ids::{DefinitionHash, RunId},
    view::{HistoryRow, RunSummary, RunView},
};
use serde_json::Value;
use sqlx::{PgConnection, PgPool};
use std::time::Duration;

/// A request to start a run.
#[derive(Clone, Debug)]
pub struct Start {
    /// Given by callers who must name the run themselves; otherwise a new id. An existing run with this id is returned.
    pub run_id: Option<RunId>,
    pub definition: DefinitionHash,
    /// Checked against the definition's inputs; defaults are filled in.
    pub inputs: Value,
    /// Business key: at most one open run has it. A start under a taken key returns the open run.
    pub workflow_id: Option<String>,
    /// Flat JSON object for hooks, filters and read models. Fixed for the life of the run. At most 8 KiB.
    pub attributes: Value,
    /// Task queue; `default` if empty.
    pub queue: String,
    /// Outbox topic that hears of every transition.
    pub topic: Option<String>,
}

/// What a start came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Started {
    pub run_id: RunId,
    /// False when the business key named an open run, which is the one returned.
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

/// The decision of an approval.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    Approved,
    Rejected,
    ChangesRequested,
}

impl Decision {
    /// As in payloads.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Approved => "approved",
            Self::Rejected => "rejected",
            Self::ChangesRequested => "changes_requested",
        }
    }
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
    /// At most 200.
    pub limit: u32,
}

/// The door. Cheap to clone.
#[derive(Clone)]
pub struct Client {
    pool: PgPool,
}

impl Client {
    /// A client over a pool of a migrated database.
    #[must_use]
    pub fn new(pool: PgPool) -> Self {
        Self { pool }
    }

    /// Stores a definition, gives it the next version number of its name and moves `current` to it.
    ///
    /// # Transaction
    /// One. Idempotent by content hash.
    pub async fn deploy(&self, deploy: Deploy) -> Result<Deployed> {
        let _ = (deploy, &self.pool);
        Err(pending())
    }
    /// Versions of a name, newest first.
    pub async fn versions(&self, name: &str) -> Result<Vec<Version>> {
        let _ = name;
        Err(pending())
    }
    /// Where a pointer (`current`) of a name stands.
    ///
    /// # Errors
    /// `definition_not_found`.
    pub async fn pointer(&self, name: &str, pointer: &str) -> Result<DefinitionHash> {
        let _ = (name, pointer);
        Err(pending())
    }
    /// Starts a run, or returns the open one that has the same business key.
    ///
    /// # Errors
    /// `input_invalid`, `definition_not_found`, `too_large`.
    /// # Transaction
    /// One: business key, run, queue row.
    pub async fn start(&self, start: Start) -> Result<Started> {
        let _ = start;
        Err(pending())
    }
    /// [`Self::start`] inside the caller's transaction.
    pub async fn start_in(&self, conn: &mut PgConnection, start: Start) -> Result<Started> {
        let _ = (conn, start);
        Err(pending())
    }
    /// Sends a signal. It is kept until the run reads it, also when it comes early.
    /// Returns false when its dedupe id was seen before.
    ///
    /// # Errors
    /// `run_not_found`, `run_closed`, `signal_invalid` (the form's violations), `too_large`.
    pub async fn signal(&self, run: RunId, signal: Signal) -> Result<bool> {
        let _ = (run, signal);
        Err(pending())
    }
    /// [`Self::signal`] inside the caller's transaction.
    pub async fn signal_in(&self, conn: &mut PgConnection, run: RunId, signal: Signal) -> Result<bool> {
        let _ = (conn, run, signal);
        Err(pending())
    }
    /// Decides the approval that waits at the step with id `step`.
    ///
    /// # Errors
    /// `approval_not_waiting` when no such approval waits now, and those of [`Self::signal`].
    pub async fn approve(
        &self,
        run: RunId,
        step: &str,
        decision: Decision,
        comment: Option<String>,
        dedupe_id: Option<String>,
        sender: Option<String>,
    ) -> Result<bool> {
        let _ = (run, step, decision, comment, dedupe_id, sender);
        Err(pending())
    }
    /// Asks a run to stop: live attempts are cancelled, `finally` runs.
    pub async fn cancel(&self, run: RunId, reason: &str) -> Result<()> {
        let _ = (run, reason);
        Err(pending())
    }
    /// Ends a run at once, without `finally`. Its attempts are closed as cancelled and settled.
    pub async fn terminate(&self, run: RunId, reason: &str) -> Result<()> {
        let _ = (run, reason);
        Err(pending())
    }
    /// Wakes the open runs whose attributes match and that wait as blocked; they try again.
    /// Runs inside the caller's transaction, for example the one that grants credits. Returns how many.
    pub async fn unblock_in(&self, conn: &mut PgConnection, attributes: &Value) -> Result<u64> {
        let _ = (conn, attributes);
        Err(pending())
    }
    /// A run, folded from its history.
    ///
    /// # Errors
    /// `run_not_found`.
    pub async fn describe(&self, run: RunId) -> Result<RunView> {
        let _ = run;
        Err(pending())
    }
    /// Transitions with `seq > after`, in order, at most `limit` (1000).
    pub async fn history(&self, run: RunId, after: u64, limit: u32) -> Result<Vec<HistoryRow>> {
        let _ = (run, after, limit);
        Err(pending())
    }
    /// Runs that match, newest first.
    pub async fn list(&self, filter: Filter) -> Result<Vec<RunSummary>> {
        let _ = filter;
        Err(pending())
    }
    /// Waits until the run has more than `seq` transitions, or `timeout` is over. Returns its newest seq.
    pub async fn wait_change(&self, run: RunId, seq: u64, timeout: Duration) -> Result<u64> {
        let _ = (run, seq, timeout);
        Err(pending())
    }
    /// The open run under a business key.
    pub async fn open_run(&self, workflow_id: &str) -> Result<Option<RunId>> {
        let _ = workflow_id;
        Err(pending())
    }
}

fn pending() -> Error {
    Error::Invariant("the client is not built yet".into())
}
