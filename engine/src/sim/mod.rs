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

use world::World;

/// How a simulated history came out.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// What the auditor found; empty when all is well.
    pub findings: Vec<String>,
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
    happened.transitions = u32::try_from(evidence.history.len()).unwrap_or(u32::MAX);
    Outcome { findings, happened }
}
