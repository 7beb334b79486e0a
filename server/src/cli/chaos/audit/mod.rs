//! What must hold when everything is quiet. Reads rows and JSON, shares no code with the engine, and believes only the
//! recorder, the answers that were given, the ends of the processes, and Postgres.
//!
//! Every check is seen to fire: `tests` breaks a clean end in one way for each of them, and stops the build, or fails, for one that
//! it does not know.

mod effects;
mod promises;
mod round;
mod rows;
#[cfg(test)]
mod tests;

use super::{
    faults::{Fault, Strikes},
    recorder::Sight,
    report::{Finding, Said, Sights},
    traffic::Promises,
};
use loopwright_activities::billing::audit as money;
use rows::CHECKS;
use sqlx::PgConnection;
use std::{collections::BTreeMap, time::Duration};

/// Checks that are more than a query over the database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Check {
    /// Everything closed, or waits.
    Settle,
    /// Processes end in good order when they are asked to.
    Drain,
    /// No process dies of a signal that is none of ours.
    Process,
    /// No process panics or sets a run aside.
    Log,
    /// Every kind of fault struck.
    Fault,
    /// Every kind of request was granted, and a start whose answer was lost was found.
    Coverage,
    /// No request was declined for a wrong reason.
    Request,
    Ledger,
    PromiseRun,
    PromiseTerminated,
    PromiseReset,
    PromiseUpdate,
    PromiseMessage,
    PromiseCancel,
    PromiseKept,
    RunUnasked,
    SignalRead,
    EffectKey,
    EffectContent,
    EffectTwice,
    EffectUnstarted,
    EffectRepeated,
    /// The last of them: [`Check::ALL`] is as long as it says.
    EffectMissing,
}

impl Check {
    pub(super) const ALL: [Self; Self::EffectMissing as usize + 1] = [
        Self::Settle,
        Self::Drain,
        Self::Process,
        Self::Log,
        Self::Fault,
        Self::Coverage,
        Self::Request,
        Self::Ledger,
        Self::PromiseRun,
        Self::PromiseTerminated,
        Self::PromiseReset,
        Self::PromiseUpdate,
        Self::PromiseMessage,
        Self::PromiseCancel,
        Self::PromiseKept,
        Self::RunUnasked,
        Self::SignalRead,
        Self::EffectKey,
        Self::EffectContent,
        Self::EffectTwice,
        Self::EffectUnstarted,
        Self::EffectRepeated,
        Self::EffectMissing,
    ];

    /// Its name, and what it means when it finds something.
    const fn words(self) -> (&'static str, &'static str) {
        match self {
            Self::Settle => ("settle", "a run neither closed nor waits although nothing goes wrong any more"),
            Self::Drain => ("drain", "a process did not end in good order when asked to"),
            Self::Process => ("process", "a process died of a signal that nobody here had sent"),
            Self::Log => ("log", "a process panicked or set a run aside"),
            Self::Fault => ("fault", "a fault never struck"),
            Self::Coverage => ("coverage", "no request of a kind was granted, or no answer was lost"),
            Self::Request => ("request", "a request was declined for a wrong reason"),
            Self::Ledger => ("ledger", "an invariant of the ledger is broken"),
            Self::PromiseRun => ("promise_run", "an acknowledged start, fork or reset is not there"),
            Self::PromiseTerminated => ("promise_terminated", "an acknowledged termination did not happen"),
            Self::PromiseReset => ("promise_reset", "a run is open although its reset was acknowledged"),
            Self::PromiseUpdate => ("promise_update", "the answer of an update is not in the history"),
            Self::PromiseMessage => ("promise_message", "an acknowledged message is not there"),
            Self::PromiseCancel => ("promise_cancel", "an acknowledged cancel is not there"),
            Self::PromiseKept => ("promise_kept", "a run is open that nobody leaves waiting"),
            Self::RunUnasked => {
                ("run_unasked", "a run is there that no answer names: a request made two, or nobody knows of it")
            }
            Self::SignalRead => ("signal_read", "a signal that was read is not in the history once"),
            Self::EffectKey => ("effect_key", "an idempotency key is not one step's, or a step has several"),
            Self::EffectContent => {
                ("effect_content", "the world was asked for two things under one key, or for what no step says")
            }
            Self::EffectTwice => ("effect_twice", "an attempt's effect was seen twice"),
            Self::EffectUnstarted => ("effect_unstarted", "an effect was seen of an attempt that no history starts"),
            Self::EffectRepeated => ("effect_repeated", "an effect was repeated after its result was committed"),
            Self::EffectMissing => {
                ("effect_missing", "a completed attempt's effect was not seen, or what it committed is another's")
            }
        }
    }

    pub(super) fn name(self) -> &'static str {
        self.words().0
    }

    fn finds(self, subject: impl Into<String>) -> Finding {
        let (check, meaning) = self.words();
        Finding { check, meaning, subject: subject.into() }
    }
}

/// Names of all checks.
pub(super) fn names() -> Vec<&'static str> {
    CHECKS.iter().map(|(name, ..)| *name).chain(Check::ALL.into_iter().map(Check::name)).collect()
}

/// How a process was at the end.
#[derive(Clone, Debug)]
pub(super) struct Ended {
    pub(super) name: String,
    /// It ended by itself, in time and with code 0, when it was asked to.
    pub(super) in_order: bool,
    /// Signals that ended it before, none of them ours.
    pub(super) signals: Vec<i32>,
    pub(super) log: String,
}

/// What the round saw besides what is in the database.
#[derive(Clone, Default)]
pub(super) struct Evidence {
    /// How long things went wrong.
    pub(super) time: Duration,
    /// What has not settled, in words.
    pub(super) left: Vec<String>,
    pub(super) processes: Vec<Ended>,
    pub(super) faults: BTreeMap<Fault, Strikes>,
    pub(super) requests: BTreeMap<&'static str, Said>,
    /// Declined for a wrong reason, in words.
    pub(super) declined: Vec<String>,
    pub(super) promises: Promises,
    pub(super) seen: Vec<Sight>,
}

/// Looks for whatever must not be.
///
/// # Errors
/// The database cannot be asked.
/// # Transaction
/// The caller's, or none: everything is quiet. Reads only.
pub(super) async fn run(conn: &mut PgConnection, evidence: &Evidence) -> anyhow::Result<(Sights, Vec<Finding>)> {
    let mut found = round::findings(evidence);
    for (check, meaning, query) in CHECKS {
        let subjects: Vec<String> = sqlx::query_scalar(*query).fetch_all(&mut *conn).await?;
        found.extend(subjects.into_iter().map(|subject| Finding { check, meaning, subject }));
    }
    for broken in money::run(&mut *conn).await? {
        found.push(Check::Ledger.finds(format!("{}: {}, {}", broken.invariant, broken.meaning, broken.subject)));
    }
    promises::findings(&mut *conn, &evidence.promises, &mut found).await?;
    let sights = effects::findings(conn, &evidence.seen, &mut found).await?;
    Ok((sights, found))
}
