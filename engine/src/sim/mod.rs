//! A simulator of many workers over the store's contract in memory: seeded, without a clock, a thread or a Postgres. The
//! machine is the real one; the store is `store::memory`, which passes the same conformance suite as Postgres; the
//! workers follow `worker::drive` instruction by instruction, but every answer may be lost, late or doubled, and every worker
//! may die, freeze and come back.
//!
//! ```text
//! seed ─▶ world: chaos (N random actions) ─▶ calm (no faults: everything must end) ─▶ evidence ─▶ auditor ─▶ findings
//! ```
//!
//! The auditor reads rows and JSON and shares no code with the machine. What it would see is proved by
//! [`Mutant`]s: the store or a worker breaks one promise, and some seed must be found guilty.

mod auditor;
mod scenario;
mod worker;
mod world;

pub use crate::store::memory::Mutant;

use std::{
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::mpsc::{RecvTimeoutError, sync_channel},
    time::Duration,
};
use world::World;

/// A promise, and the question whether it was kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Check {
    /// Every open run has an owner, or may be claimed.
    Reachable,
    /// A run that moves is somebody's.
    Owned,
    /// No parked run sleeps over a message.
    Awake,
    /// A claim raises the epoch, and who was declared dead claims nothing.
    Claims,
    /// A transition is written under the epoch of its run.
    Fence,
    /// Of a group so many runs are under way as it has places.
    Group,
    /// Who waits for a place is not let in without one.
    Place,
    /// A closed run has no owner, no place in the queue and none in its group.
    Leftover,
    /// Nothing follows the end of a run, and its row says how it ended.
    Closed,
    /// A history is numbered without gaps.
    History,
    /// Epochs only rise.
    Epochs,
    /// What begins, begins once and ends once.
    Once,
    /// Attempts are numbered, and none begins behind the end of its step or of its run.
    Order,
    /// A result is its owner's.
    Results,
    /// A message is received once and taken once.
    Messages,
    /// What a sender sends twice is stored once.
    Inbox,
    /// An update is judged once and answered once.
    Updates,
    /// In a paused run nothing begins.
    Paused,
    /// A run that was told to end cleans up, and ends as what it was told.
    Ending,
    /// The hook hears of each attempt once.
    Hook,
    /// The code of an attempt runs once, and not before its start is committed.
    Acts,
    /// Of a chain one run is open, and each has the one in its place that its history names.
    Chains,
    /// What was sent to a run is known to the next one of its chain, and taken by one of them.
    HandedOn,
    /// A child is there if its parent calls it.
    Children,
    /// No invariant of the machine is broken.
    Quarantined,
    /// When nothing goes wrong any more, every run ends.
    Ends,
    /// The simulation itself comes to its end.
    Simulated,
}

impl Check {
    fn finds(self, text: String) -> Finding {
        Finding { check: self, text }
    }
}

/// A promise that was broken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    pub check: Check,
    /// What was seen, a sentence.
    pub text: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.check, self.text)
    }
}

/// The check that a broken promise is for: it must be found by that one, whatever else notices.
#[must_use]
pub fn check_for(mutant: Mutant) -> Check {
    match mutant {
        Mutant::NoEpochFence => Check::Fence,
        Mutant::NoSeqFence => Check::Once,
        Mutant::ParksPastMessages | Mutant::SleepsOn => Check::Awake,
        Mutant::ForgetsToQueue => Check::Reachable,
        Mutant::KeepsRefusedStarts => Check::Hook,
        Mutant::TakesOverSilently => Check::Owned,
        Mutant::DeadMayClaim | Mutant::ClaimsSilently => Check::Claims,
        Mutant::StoresDuplicates => Check::Inbox,
        Mutant::RepeatsMessages => Check::Messages,
        Mutant::LosesHistory => Check::History,
        Mutant::LeavesQueued | Mutant::LeavesSeated => Check::Leftover,
        Mutant::Overfills => Check::Group,
        Mutant::WakesHeldBack => Check::Place,
        Mutant::ForgetsMessages => Check::HandedOn,
        Mutant::ActsEarly | Mutant::TrustsLostAnswers => Check::Acts,
    }
}

/// How a simulated history came out.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// What the auditor found; empty when all is well.
    pub findings: Vec<Finding>,
    /// What happened, so that a test can tell that the faults it wants do occur.
    pub happened: Happened,
}

/// How often something happened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Happened {
    pub runs: u32,
    pub transitions: u32,
    pub attempts: u32,
    pub kills: u32,
    pub freezes: u32,
    pub takeovers: u32,
    pub lost_answers: u32,
    pub doubled: u32,
    pub late: u32,
    pub refused_commits: u32,
    pub refused_starts: u32,
    pub clock_jumps: u32,
    pub lost_attempts: u32,
    pub signals: u32,
    /// Runs that had to wait for a place in their group.
    pub held_back: u32,
    /// Updates that were answered with a result.
    pub updates: u32,
    /// Runs that closed as continued.
    pub continued: u32,
    /// Runs that were told to stop and cleaned up.
    pub cancelled: u32,
    /// Runs that were ended at once.
    pub terminated: u32,
    pub pauses: u32,
    pub resumes: u32,
    /// Messages that were sent again under their sender's id, and not stored again.
    pub duplicates: u32,
    /// Runs that went on under another definition.
    pub migrated: u32,
    /// Children that were ended because they had not when their calls had stopped.
    pub ended_children: u32,
}

impl std::ops::AddAssign for Happened {
    fn add_assign(&mut self, other: Self) {
        self.runs += other.runs;
        self.transitions += other.transitions;
        self.attempts += other.attempts;
        self.kills += other.kills;
        self.freezes += other.freezes;
        self.takeovers += other.takeovers;
        self.lost_answers += other.lost_answers;
        self.doubled += other.doubled;
        self.late += other.late;
        self.refused_commits += other.refused_commits;
        self.refused_starts += other.refused_starts;
        self.clock_jumps += other.clock_jumps;
        self.lost_attempts += other.lost_attempts;
        self.signals += other.signals;
        self.held_back += other.held_back;
        self.updates += other.updates;
        self.continued += other.continued;
        self.cancelled += other.cancelled;
        self.terminated += other.terminated;
        self.pauses += other.pauses;
        self.resumes += other.resumes;
        self.duplicates += other.duplicates;
        self.migrated += other.migrated;
        self.ended_children += other.ended_children;
    }
}

/// Simulates one seed. The same seed gives the same history, to the last byte.
#[must_use]
pub fn simulate(seed: u64, mutant: Option<Mutant>) -> Outcome {
    let mut world = World::new(seed, mutant);
    world.chaos();
    let mut findings = world.complaints();
    if findings.is_empty() {
        findings = world.calm();
    }
    let evidence = world.evidence();
    findings.extend(auditor::audit(&evidence));
    let mut happened = world.happened;
    happened.lost_attempts = evidence.count("\"outcome\":\"lost\"");
    happened.updates = evidence.count("\"type\":\"update_completed\"");
    happened.continued = evidence.count("\"status\":\"continued\"");
    happened.cancelled = evidence.closed_as("cancelled");
    happened.terminated = evidence.closed_as("terminated");
    happened.pauses = evidence.count("\"type\":\"run_paused\"");
    happened.resumes = evidence.count("\"type\":\"run_resumed\"");
    happened.migrated = evidence.count("\"type\":\"run_migrated\"");
    happened.transitions = u32::try_from(evidence.history.len()).unwrap_or(u32::MAX);
    Outcome { findings, happened }
}

/// Longest time for one seed. A seed takes tenths of a second in a debug build; what takes this long hangs.
pub const SEED_MAX: Duration = Duration::from_secs(120);

/// How to see a seed again.
#[must_use]
pub fn replay(seed: u64) -> String {
    format!("SIM_SEED={seed} cargo test -p loopwright-engine --test sim -- the_seed --nocapture")
}

/// [`simulate`] that always comes back: a panic, and a simulation that is not over after `longest`, are findings like any other. What
/// hangs is left behind in its thread.
#[must_use]
pub fn simulate_within(seed: u64, mutant: Option<Mutant>, longest: Duration) -> Outcome {
    watched(longest, move || simulate(seed, mutant))
}

fn watched(longest: Duration, simulation: impl FnOnce() -> Outcome + Send + 'static) -> Outcome {
    let (done, outcome) = sync_channel(1);
    std::thread::spawn(move || {
        let outcome = catch_unwind(AssertUnwindSafe(simulation)).map_err(|panic| {
            let text = panic.downcast_ref::<String>().cloned();
            text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default()
        });
        // Nobody listens any more if it took too long.
        let _ = done.send(outcome);
    });
    let broken = match outcome.recv_timeout(longest) {
        Ok(Ok(outcome)) => return outcome,
        Ok(Err(text)) => format!("it panicked: {text}"),
        Err(RecvTimeoutError::Timeout) => format!("it is not over after {} s", longest.as_secs()),
        Err(RecvTimeoutError::Disconnected) => "its thread has ended".to_owned(),
    };
    Outcome { findings: vec![Check::Simulated.finds(broken)], happened: Happened::default() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    macro_rules! all_checks {
        ($($name:ident)*) => {
            const CHECKS: &[Check] = &[$(Check::$name),*];
            // A new check does not compile until it is in the list.
            const _: fn(Check) = |check| match check { $(Check::$name => {})* };
        };
    }
    all_checks! {
        Reachable Owned Awake Claims Fence Group Place Leftover Closed History Epochs Once Order Results Messages Inbox Updates Paused
        Ending Hook Acts Chains HandedOn Children Quarantined Ends Simulated
    }

    /// A check that never finds anything looks the same as one that has nothing to find.
    #[test]
    fn every_check_is_shown_to_find_something() {
        let by_mutants = Mutant::ALL.iter().map(|mutant| check_for(*mutant));
        let by_evidence = auditor::tests::CORRUPTIONS.iter().map(|(check, ..)| *check);
        let at_the_end = world::tests::WRONGS.iter().map(|(check, ..)| *check);
        // The test below.
        let here = [Check::Simulated];
        let shown: BTreeSet<Check> = by_mutants.chain(by_evidence).chain(at_the_end).chain(here).collect();
        let unshown: Vec<_> = CHECKS.iter().filter(|check| !shown.contains(check)).collect();
        assert!(unshown.is_empty(), "{unshown:?}: give each a mutant, or a row of one of these tables");
    }

    #[test]
    fn a_simulation_that_panics_or_hangs_is_a_finding() {
        let panics = watched(SEED_MAX, || panic!("on purpose"));
        assert_eq!(panics.findings, [Check::Simulated.finds("it panicked: on purpose".into())]);
        let (hold, held) = sync_channel::<()>(0);
        let hangs = watched(Duration::from_millis(10), move || {
            // Until the test is over.
            let _ = held.recv();
            Outcome::default()
        });
        assert_eq!(hangs.findings, [Check::Simulated.finds("it is not over after 0 s".into())]);
        drop(hold);
    }
}
