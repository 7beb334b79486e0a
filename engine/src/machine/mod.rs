//! The pure core: `fold` turns a history into the state of a run, `decide` turns an input into events and commands.
//!
//! Nothing here reads a clock, draws a random number or waits: instants and draws arrive in [`Moment`]. `decide` is built
//! on `fold`: it emits an event, folds it, looks again, until nothing can move. So the state after a decision is by
//! construction what folding its events gives, and recovery needs no other code.
//!
//! ```text
//! Input ──▶ react ──▶ events ──▶ fold ──▶ state ──▶ walk ──▶ next event ─┐
//!                                  ▲                                       │
//!                                  └───────────────────────────────────────┘
//! ```

mod fold;
mod fork;
mod migrate;
mod query;
mod react;
mod refusal;
pub mod replay;
mod scope;
mod signal;
mod state;
mod timer;
mod view;
mod walk;

#[cfg(feature = "runtime")]
pub(crate) use fork::put_off;
pub use fork::{Fork, fork};
pub use migrate::{FINDINGS_MAX, Finding, Migrate, Migration, Rule, migrate};
pub use query::query;
pub use refusal::Refusals;
pub use signal::{Door, problems};
pub use state::{Cleanup, Frame, Live, Message, Node, Phase, RunState, Stopped};
pub use timer::next_due;
pub use view::{live_attempts, nodes, waiting, waiting_reason};
#[cfg(feature = "runtime")]
pub(crate) use walk::is_final;

use crate::{
    definition::Definition,
    event::Event,
    failure::Failure,
    ids::{AttemptId, DefinitionHash, RunId},
    signature::Catalog,
};
use chrono::{DateTime, Utc};
use serde_json::Value;
use std::{cell::Cell, collections::BTreeMap};

/// Events after which a decision is committed although the run could move on at once: a history row stays below a few
/// hundred kilobytes. What is left is the next transition.
pub const EVENTS_MAX: usize = 2_000;
/// Signals of one name that wait in the mailbox. The client refuses later ones; what comes in all the same is dropped and recorded as
/// dropped.
pub const MAILBOX_MAX: usize = 100;
/// Attempts of one step that may be lost before the step fails: a step that kills its worker each time must end.
pub const LOST_MAX: u32 = 100;
/// How often a blocked step asks again by itself, in milliseconds. Whoever unblocks wakes it at once; this is the net below.
pub const BLOCKED_RETRY_MS: i64 = 300_000;
/// Shortest delay of an attempt that nothing but time bounds, because those before it do not count, in milliseconds: a policy
/// without a delay must not keep a worker busy for as long as a provider is away. Chosen, not measured.
pub const UNCOUNTED_DELAY_MIN_MS: u64 = 100;
/// Up to which that delay grows, whatever the policy says: it doubles with each such attempt. Chosen: an outage of a day is asked
/// after some thousand times, and its end is seen in half a minute.
pub const UNCOUNTED_DELAY_MAX_MS: u64 = 30_000;
/// Runs that may stand one below the other: a `call` at that depth fails. A definition that calls itself, also by way of
/// another, has no other end. Chosen, not measured.
pub const CALL_DEPTH_MAX: u32 = 8;
/// Least time between two starts in a chain of runs that continue as new, in milliseconds: a definition that does so at once and
/// for ever must not keep a worker busy. Chosen, not measured.
pub const CONTINUE_EVERY_MS: i64 = 1_000;
/// Longest time for `finally`, in milliseconds.
pub const FINALLY_MS: i64 = 3_600_000;
/// How long a call that stops waits for a child that was told to stop, before it looks whether the child has heard of it, in
/// milliseconds: its `finally` has an hour, and what runs when it is told has 20 s to notice.
pub const CALL_STOP_MS: i64 = FINALLY_MS + 300_000;
/// The same of a child that was told to end at once, and of each that was ended: it takes a transaction. In milliseconds. Chosen, not
/// measured.
pub const CALL_END_MS: i64 = 60_000;
/// How often a child is ended before its call gives it up. Chosen: one worker may die over it, and one more.
pub const CALL_ENDS_MAX: u32 = 3;
/// Largest data that one step evaluates (its `with`, its values, its outputs), in bytes of JSON.
pub const DATA_BYTES_MAX: usize = 4 << 20;
/// Largest output of a step, in bytes of JSON.
pub const OUTPUT_BYTES_MAX: usize = 1 << 20;

/// Something that moves a run.
#[derive(Clone, Debug, PartialEq)]
pub enum Input {
    /// The first claim. `until`: no run of its chain goes on beyond that instant.
    Started { inputs: Value, until: Option<DateTime<Utc>> },
    /// A worker took the run over; attempts that ran elsewhere are lost.
    TakenOver,
    /// An attempt of the step at `path` came to its end.
    AttemptEnded { path: String, attempt: u32, result: Result<Value, Failure> },
    /// Messages from the inbox, in order.
    Messages(Vec<Inbound>),
    /// Time went by, or room for attempts became free.
    Tick,
    /// An operator ends the run at once.
    Terminated { reason: String },
    /// The time of its chain is over, and nobody has let it begin: it fails at once. There is nothing to clean up.
    Expired,
    /// Several at one instant, in this order: a claim, and what the inbox held then.
    Several(Vec<Input>),
}

impl Input {
    /// Whether messages are among it: the run has read them, also if nothing follows from them.
    #[must_use]
    pub fn reads_inbox(&self) -> bool {
        match self {
            Self::Messages(_) => true,
            Self::Several(inputs) => inputs.iter().any(Self::reads_inbox),
            _ => false,
        }
    }
}

/// One message of the inbox.
#[derive(Clone, Debug, PartialEq)]
pub enum Inbound {
    Signal {
        n: u64,
        name: String,
        payload: Value,
        sender: Option<String>,
        at: DateTime<Utc>,
    },
    /// A request that is answered: see [`Event::UpdateAccepted`], `UpdateRejected`, `UpdateCompleted`.
    Update {
        n: u64,
        /// The sender's, under which the answer is found.
        id: String,
        name: String,
        payload: Value,
        sender: Option<String>,
        at: DateTime<Utc>,
    },
    Cancel {
        reason: String,
        /// By then it is to have stopped, its cleanup included.
        until: Option<DateTime<Utc>>,
    },
    /// Its parent closed, and it was to end with it at once.
    Terminate {
        reason: String,
    },
    /// Its concurrency group was full, and it was to give way to those who are there: it ends as cancelled, and has begun nothing.
    TurnedAway {
        reason: String,
    },
    Unblock,
    /// Nothing new begins until somebody resumes the run.
    Pause {
        reason: String,
        by: Option<String>,
    },
    /// `halted`: what had broken, if the run had been set aside. Without it a run that is not paused takes no notice.
    Resume {
        reason: String,
        by: Option<String>,
        halted: Option<String>,
    },
    Child {
        run_id: RunId,
        completed: bool,
        output: Option<Value>,
        failure: Option<Failure>,
        cancelled: bool,
    },
}

/// What the outside contributes to a decision.
pub struct Moment<'a> {
    pub now: DateTime<Utc>,
    /// Random bits for jitter.
    pub draw: u64,
    /// Attempts that may start now.
    pub permits: Cell<u32>,
    /// What the hook refused of former versions of this decision.
    pub refused: &'a Refusals,
    /// What this worker can run.
    pub catalog: &'a Catalog,
    /// Where each `call` of the definition leads, by `name@version` as written.
    pub calls: &'a BTreeMap<String, DefinitionHash>,
    /// What `current` of the run's workflow is, if that is another definition than the run's.
    pub current: Option<&'a Current>,
    /// How many runs stand above this one.
    pub depth: u32,
    /// Stopped calls have a time. False only for a row of an earlier release that is decided again.
    pub bounds_calls: bool,
    /// Facts for the `run` scope.
    pub workflow: &'a str,
}

/// What a run that continues as new goes on under, if not under its own definition.
#[derive(Clone, Debug, PartialEq)]
pub enum Current {
    Version {
        hash: DefinitionHash,
        /// As it declares them.
        inputs: BTreeMap<String, crate::definition::Input>,
    },
    /// Of a history that is decided again: it did not take the inputs then.
    Refused(Failure),
}

/// What a decision asks for, to be carried out after it is committed.
#[derive(Clone, Debug, PartialEq)]
pub enum Command {
    StartAttempt {
        path: String,
        attempt: u32,
        attempt_id: AttemptId,
        activity: String,
        /// As [`crate::activity::AttemptInfo::counted`].
        counted: u32,
        input: Value,
        deadline: DateTime<Utc>,
        heartbeat_ms: Option<u64>,
    },
    CancelAttempt {
        path: String,
    },
    StartChild {
        path: String,
        run_id: RunId,
        workflow: String,
        definition: DefinitionHash,
        inputs: Value,
    },
    CancelChild {
        run_id: RunId,
        /// By then it is to have stopped.
        until: Option<DateTime<Utc>>,
    },
    /// A child ends at once with its call.
    TerminateChild {
        run_id: RunId,
    },
    /// A child that was told to end and has not is ended, whether it reads its messages or not; `spares`: unless it has read them.
    EndChild {
        run_id: RunId,
        spares: bool,
    },
}

/// The result of a decision.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Decision {
    pub events: Vec<Event>,
    pub commands: Vec<Command>,
    /// The run can move on at once: decide again, on a tick.
    pub more: bool,
}

/// A history that the state cannot follow: our bug, never the user's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Illegal(pub String);

/// Folds one event into the state.
///
/// # Errors
/// [`Illegal`] if the event cannot follow what was folded before.
pub fn fold(state: &mut RunState, event: &Event) -> Result<(), Illegal> {
    fold::fold(state, event)
}

/// Decides what follows from an input. `state` moves along; if the decision cannot be committed, drop it and reload.
///
/// # Errors
/// [`Illegal`] if an invariant is broken.
pub fn decide(
    definition: &Definition,
    state: &mut RunState,
    input: Input,
    moment: &Moment<'_>,
) -> Result<Decision, Illegal> {
    let mut decision = Decision::default();
    react::react(definition, state, input, moment, &mut decision)?;
    while !state.status.is_closed() {
        let events = walk::next(definition, state, moment, &mut decision.commands)?;
        if events.is_empty() {
            break;
        }
        for event in events {
            emit(state, event, &mut decision)?;
        }
        if decision.events.len() >= EVENTS_MAX {
            decision.more = !state.status.is_closed();
            break;
        }
    }
    Ok(decision)
}

fn emit(state: &mut RunState, event: Event, decision: &mut Decision) -> Result<(), Illegal> {
    fold::fold(state, &event)?;
    decision.events.push(event);
    Ok(())
}

/// The steps of a definition's `call`s, as `name@version` keys of [`Moment::calls`].
#[must_use]
pub fn call_key(workflow: &str, version: &crate::definition::CallVersion) -> String {
    use crate::definition::CallVersion as V;
    match version {
        V::Latest => format!("{workflow}@latest"),
        V::Number(n) => format!("{workflow}@{n}"),
        V::Hash(h) => format!("{workflow}@sha256:{h}"),
    }
}

#[cfg(test)]
mod tests;
