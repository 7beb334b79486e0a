//! The door through which a product takes part in the engine's transactions without the engine knowing why:
//! a ledger, an audit trail, a quota. The engine hands over opaque JSON and takes back verdicts.

use crate::ids::{AttemptId, RunId};
use chrono::{DateTime, Utc};
use futures_util::future::BoxFuture;
use serde_json::Value;
use sqlx::{PgConnection, postgres::PgArguments};
use std::sync::Arc;

/// One attempt, as a hook sees it.
#[derive(Clone, Debug)]
pub struct AttemptRef {
    pub run_id: RunId,
    pub attempt_id: AttemptId,
    pub activity: String,
    pub path: String,
    /// 1-based.
    pub attempt: u32,
    /// Attributes of the run.
    pub attributes: Arc<Value>,
    /// The definition's budget, opaque.
    pub budget: Arc<Value>,
    /// The attempt may not run beyond this instant.
    pub deadline: DateTime<Utc>,
}

pub use crate::event::Outcome;

/// An attempt that this transition starts.
#[derive(Clone, Debug)]
pub struct AttemptStart {
    pub attempt: AttemptRef,
    /// `Activity::reserve` of its input.
    pub reserve: Value,
}

/// An attempt that this transition ends.
#[derive(Clone, Debug)]
pub struct AttemptEnd {
    pub attempt: AttemptRef,
    pub outcome: Outcome,
    /// Code of the failure that it ended with, if with one.
    pub failure: Option<String>,
    /// Another attempt of the step follows by its retry policy.
    pub again: bool,
}

/// The metered part of one accepted transition: ends come before starts.
#[derive(Clone, Debug)]
pub struct Transition {
    /// Position in the batch; refusals name it.
    pub ord: usize,
    pub run_id: RunId,
    pub ended: Vec<AttemptEnd>,
    pub started: Vec<AttemptStart>,
}

/// The hook will not let this transition start its attempts.
#[derive(Clone, Debug)]
pub struct Refusal {
    pub ord: usize,
    /// A word such as `credits`, under which the run waits until it is unblocked; or a dotted failure code such as
    /// `quota.used_up`, with which the step fails for good.
    pub reason: String,
    /// For people: what is missing and what helps.
    pub message: String,
}

/// Whether an outside call is about to be made, is under way, or has been.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    Open,
    /// Something has become known of a call that is under way, and the process that makes it may die: a fact for later. It may
    /// arrive after the call was closed and must not change what is recorded of it then.
    Note,
    Close,
}

/// A reading of consumption, keyed by the outside call.
#[derive(Clone, Debug)]
pub struct Reading<'a> {
    pub key: &'a str,
    pub phase: Phase,
    /// Whether the attempt's result still counts. If not, another worker has the run or is about to take it: what this
    /// call brought is thrown away and a later attempt may make it again. Looked at for [`Phase::Close`], otherwise true.
    pub current: bool,
    pub body: &'a Value,
}

/// The hook's answer to a reading.
#[derive(Clone, Debug)]
pub enum Verdict {
    Accepted,
    /// Only in answer to [`Phase::Open`]: the call may not be made. The transaction is rolled back.
    Refused {
        /// As in [`Refusal::reason`].
        reason: String,
        message: String,
    },
}

/// A reading as one expression of SQL, for [`TransitionHook::at_once`].
#[derive(Debug)]
pub struct AtOnce {
    /// Boolean, and volatile where it writes: a call of a function of the hook's. It is evaluated once, behind the fence. True: the
    /// reading is recorded. False, or null: it has written nothing.
    pub sql: &'static str,
    /// `$1` and so on in it.
    pub arguments: PgArguments,
}

/// Why a hook could not do its work.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    #[error(transparent)]
    Sql(#[from] sqlx::Error),
    /// A rule of the product is broken: the run is quarantined.
    #[error("invariant broken: {0}")]
    Invariant(String),
}

/// Takes part in the engine's transactions.
///
/// # Transaction
/// All methods that are given a connection run inside an open transaction of the engine, last in it, and cannot commit; for
/// [`Phase::Note`] there is none, and what is recorded must be one statement. They must be idempotent: after a lost answer the same
/// transition is sent again. Lock order: worker → run → the hook's rows.
pub trait TransitionHook: Send + Sync + 'static {
    /// Sees the accepted transitions of a batch that start or end attempts of metered activities.
    ///
    /// Returns the transitions whose starts it refuses. If there are any, the whole transaction is rolled back and
    /// the batch is sent again without them; each refused run then records its ends and waits.
    fn apply<'a>(
        &'a self,
        conn: &'a mut PgConnection,
        transitions: &'a [Transition],
    ) -> BoxFuture<'a, Result<Vec<Refusal>, HookError>>;

    /// Sees a reading of a running (or already ended) attempt.
    fn meter<'a>(
        &'a self,
        conn: &'a mut PgConnection,
        attempt: &'a AttemptRef,
        reading: Reading<'a>,
    ) -> BoxFuture<'a, Result<Verdict, HookError>>;

    /// The ordinary case of a reading that opens or closes a call, for the engine to record in one statement with its fence and the
    /// checkpoint: a call pays for each round trip. `None`, and an expression that is false, leave it to [`Self::meter`], which
    /// decides everything; `None` is always right. Asks nobody.
    ///
    /// # Transaction
    /// The statement's own. Behind it nobody in this process looks again whether the attempt goes on, as before `meter`; so the expression must
    /// be false by what is committed when the attempt's end is recorded (see [`Self::apply`]), also if it arrives late, and if
    /// the reading is recorded already.
    fn at_once(&self, attempt: &AttemptRef, reading: &Reading<'_>) -> Option<AtOnce> {
        let _ = (attempt, reading);
        None
    }

    /// Ends as lost whatever this hook has open for a run that is ended although it cannot be read: nobody can say any more which
    /// attempts were under way.
    fn abandon<'a>(&'a self, conn: &'a mut PgConnection, run: RunId) -> BoxFuture<'a, Result<(), HookError>> {
        let _ = (conn, run);
        Box::pin(async { Ok(()) })
    }
}

/// A hook that accepts everything and records nothing.
pub struct NoHook;

impl TransitionHook for NoHook {
    fn apply<'a>(
        &'a self,
        _conn: &'a mut PgConnection,
        _transitions: &'a [Transition],
    ) -> BoxFuture<'a, Result<Vec<Refusal>, HookError>> {
        Box::pin(async { Ok(Vec::new()) })
    }
    fn meter<'a>(
        &'a self,
        _conn: &'a mut PgConnection,
        _attempt: &'a AttemptRef,
        _reading: Reading<'a>,
    ) -> BoxFuture<'a, Result<Verdict, HookError>> {
        Box::pin(async { Ok(Verdict::Accepted) })
    }
}
