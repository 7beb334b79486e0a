//! The store's contract in memory: what the statements of this folder promise, without Postgres. For the simulator; the
//! conformance suite beside it runs on both, so that neither says what the other does not.
//!
//! One call is one transaction. [`Mutant`]s are the mistakes that a statement could make; tests break one promise after the
//! other and expect the auditor to see it.

mod commits;
mod messages;
mod owners;
mod starts;

use super::{inbox::Kind, transitions::Text};
use crate::{
    admission::Place,
    ids::{AttemptId, RunId, WorkerId},
};
use chrono::{DateTime, Duration, Utc};
use serde_json::Value;
use std::collections::BTreeMap;

/// A promise that is broken on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutant {
    /// A commit does not look at the epoch.
    NoEpochFence,
    /// A commit does not look at the sequence number.
    NoSeqFence,
    /// A run parks although it has unread messages.
    ParksPastMessages,
    /// A parked run gets no place in the queue.
    ForgetsToQueue,
    /// What the hook wrote stays when its transaction is rolled back.
    KeepsRefusedStarts,
    /// A takeover frees a run under its old epoch.
    TakesOverSilently,
    /// A worker that was declared dead may claim.
    DeadMayClaim,
    /// A claim leaves the epoch as it is.
    ClaimsSilently,
    /// A sender's second message with one id is stored.
    StoresDuplicates,
    /// A message is handed out again.
    RepeatsMessages,
    /// A transition is counted and not written.
    LosesHistory,
    /// A message to a parked run does not wake it.
    SleepsOn,
    /// A closed run keeps its place in the queue.
    LeavesQueued,
    /// A closed run keeps its place in its group.
    LeavesSeated,
    /// A group takes in one more than its limit.
    Overfills,
    /// A message to a run that waits for a place wakes it.
    WakesHeldBack,
    /// What a run that continues as new has not taken is not handed on.
    ForgetsMessages,
    /// An attempt starts before its start is committed. The worker's, not the store's.
    ActsEarly,
    /// A lost answer is taken for a success. The worker's, not the store's.
    TrustsLostAnswers,
}

impl Mutant {
    /// All of them.
    pub const ALL: &[Self] = &[
        Self::NoEpochFence,
        Self::NoSeqFence,
        Self::ParksPastMessages,
        Self::ForgetsToQueue,
        Self::KeepsRefusedStarts,
        Self::TakesOverSilently,
        Self::DeadMayClaim,
        Self::ClaimsSilently,
        Self::StoresDuplicates,
        Self::RepeatsMessages,
        Self::LosesHistory,
        Self::SleepsOn,
        Self::LeavesQueued,
        Self::LeavesSeated,
        Self::Overfills,
        Self::WakesHeldBack,
        Self::ForgetsMessages,
        Self::ActsEarly,
        Self::TrustsLostAnswers,
    ];
}

/// A row of `runs`.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    pub(crate) workflow: String,
    pub(crate) status: String,
    pub(crate) parked: bool,
    pub(crate) owner: Option<WorkerId>,
    pub(crate) epoch: i64,
    pub(crate) seq: i64,
    pub(crate) inbox_n: i64,
    pub(crate) inbox_seen: i64,
    pub(crate) queue: String,
    pub(crate) cursor: Option<Value>,
    pub(crate) cursor_seq: i64,
    pub(crate) parent: Option<RunId>,
    /// First and previous run of its chain.
    pub(crate) first: Option<RunId>,
    pub(crate) continued_from: Option<RunId>,
    pub(crate) depth: i32,
    pub(crate) priority: i16,
    pub(crate) lane: i32,
    pub(crate) inputs: Value,
    pub(crate) closed: bool,
    /// Not held back.
    pub(crate) admitted: bool,
    /// Business key.
    id: Option<String>,
    /// How many had closed before it, and it.
    closed_n: u64,
    /// The place that its start named, or that of the first in its chain.
    named: Option<Place>,
}

/// A row of `admissions`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Seat {
    pub(crate) group: String,
    /// Number of arrival.
    n: u64,
    places: u32,
    pub(crate) place: Option<i32>,
    not_before: DateTime<Utc>,
}

impl Row {
    fn is_claimable(&self) -> bool {
        self.owner.is_none() && !self.closed && self.status != "quarantined" && self.admitted
    }
}

/// What Postgres makes of a text.
fn parsed(text: &Text) -> Value {
    serde_json::from_str(text.get()).expect("a written value")
}

/// A row of `inbox`.
#[derive(Clone, Debug)]
pub(crate) struct Message {
    pub(crate) n: i64,
    pub(crate) kind: Kind,
    pub(crate) name: String,
    pub(crate) payload: Value,
    pub(crate) dedupe_id: Option<String>,
    pub(crate) at: DateTime<Utc>,
}

/// A row of `history`.
#[derive(Clone, Debug)]
pub(crate) struct HistoryRow {
    pub(crate) seq: i64,
    pub(crate) epoch: i64,
    pub(crate) events: Value,
}

/// A message that somebody sends.
#[derive(Clone, Debug)]
pub(crate) struct Post {
    pub(crate) run: RunId,
    pub(crate) kind: Kind,
    pub(crate) name: String,
    pub(crate) payload: Value,
    pub(crate) dedupe_id: Option<String>,
    /// [`super::inbox::Outgoing::unread_max`].
    pub(crate) unread_max: Option<i64>,
}

/// What the hook has written, in the store's transactions.
#[derive(Clone, Debug, Default)]
pub(crate) struct Accounts {
    pub(crate) started: Vec<AttemptId>,
    pub(crate) ended: Vec<AttemptId>,
}

/// The tables.
#[derive(Clone, Debug)]
pub(crate) struct Memory {
    pub(crate) now: DateTime<Utc>,
    pub(crate) runs: BTreeMap<RunId, Row>,
    pub(crate) ready: BTreeMap<RunId, DateTime<Utc>>,
    pub(crate) history: BTreeMap<RunId, Vec<HistoryRow>>,
    pub(crate) inbox: BTreeMap<RunId, Vec<Message>>,
    /// Last heartbeat and length of the lease.
    pub(crate) workers: BTreeMap<WorkerId, (DateTime<Utc>, Duration)>,
    /// Whether its runs were taken.
    pub(crate) dead: BTreeMap<WorkerId, bool>,
    pub(crate) seats: BTreeMap<RunId, Seat>,
    /// Arrivals at each group.
    arrivals: BTreeMap<String, u64>,
    /// Runs that have closed.
    closings: u64,
    pub(crate) accounts: Accounts,
    /// By run, step path and key.
    pub(crate) checkpoints: BTreeMap<(RunId, String, String), Value>,
    pub(crate) mutant: Option<Mutant>,
}

impl Memory {
    pub(crate) fn new(now: DateTime<Utc>) -> Self {
        Self {
            now,
            runs: BTreeMap::new(),
            ready: BTreeMap::new(),
            history: BTreeMap::new(),
            inbox: BTreeMap::new(),
            workers: BTreeMap::new(),
            dead: BTreeMap::new(),
            seats: BTreeMap::new(),
            arrivals: BTreeMap::new(),
            closings: 0,
            accounts: Accounts::default(),
            checkpoints: BTreeMap::new(),
            mutant: None,
        }
    }

    fn is(&self, mutant: Mutant) -> bool {
        self.mutant == Some(mutant)
    }

    fn queue(&mut self, run: RunId, due: DateTime<Utc>) {
        let at = self.ready.entry(run).or_insert(due);
        *at = due.min(*at);
    }
}
