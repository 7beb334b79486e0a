//! What came of it, for people and for programs.

use super::faults::{Fault, Strikes};
use crate::cli::table;
use serde::Serialize;
use std::collections::BTreeMap;

/// Findings of one kind that are printed; the JSON has all.
const SHOWN: usize = 10;

/// Something that must not be.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Finding {
    pub(super) check: &'static str,
    pub(super) meaning: &'static str,
    /// What is at fault: a run, an attempt, a key.
    pub(super) subject: String,
}

/// A run that is open at the end, and may be.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Waits {
    pub(super) run: String,
    pub(super) waits_for: String,
    pub(super) why: String,
}

/// Requests of one kind.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(super) struct Said {
    pub(super) acknowledged: u32,
    /// Of these, by a sending that found it done: the answer of an earlier one was lost. As far as the answer tells.
    pub(super) found: u32,
    pub(super) declined: u32,
    /// Nobody answered: they may have happened or not.
    pub(super) unknown: u32,
}

impl Said {
    pub(super) fn add(&mut self, other: Self) {
        self.acknowledged += other.acknowledged;
        self.found += other.found;
        self.declined += other.declined;
        self.unknown += other.unknown;
    }
}

/// What the recorder saw.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(super) struct Sights {
    pub(super) sights: usize,
    pub(super) keys: usize,
    /// Sights of a key that had been seen: of attempts whose result was not committed.
    pub(super) again: usize,
    /// Of these, by an attempt that had been taken over and woke up late.
    pub(super) late: usize,
}

#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) seed: u64,
    pub(super) seconds: u64,
    /// From the last fault until everything was closed or waited.
    pub(super) settled_ms: Option<u64>,
    pub(super) faults: BTreeMap<Fault, Strikes>,
    /// Ends of processes that nobody had killed: a lost lease is no reason to end, a database that is away at the start is.
    pub(super) ended_by_itself: u32,
    pub(super) requests: BTreeMap<&'static str, Said>,
    pub(super) runs: BTreeMap<String, i64>,
    /// Every run that is open.
    pub(super) waits: Vec<Waits>,
    pub(super) attempts: BTreeMap<String, i64>,
    pub(super) effects: Sights,
    pub(super) checks: Vec<&'static str>,
    pub(super) violations: Vec<Finding>,
    pub(super) ok: bool,
}

impl Report {
    pub(super) fn text(&self) -> String {
        let mut parts = Vec::new();
        let rows: Vec<Vec<String>> =
            self.faults.iter().map(|(f, n)| vec![f.text().into(), n.struck.to_string(), n.tried.to_string()]).collect();
        parts.push(table(&["fault", "struck", "tried"], &rows));
        let rows: Vec<Vec<String>> = self
            .requests
            .iter()
            .map(|(ask, said)| {
                let counts = [said.acknowledged, said.found, said.declined, said.unknown].map(|n| n.to_string());
                [vec![(*ask).to_owned()], counts.to_vec()].concat()
            })
            .collect();
        parts.push(table(&["request", "acknowledged", "of these found done", "declined", "unknown"], &rows));
        for (what, counts) in [("runs", &self.runs), ("attempts", &self.attempts)] {
            let rows: Vec<Vec<String>> = counts.iter().map(|(end, n)| vec![end.clone(), n.to_string()]).collect();
            parts.push(table(&[what, "number"], &rows));
        }
        let rows: Vec<Vec<String>> =
            self.waits.iter().map(|w| vec![w.run.clone(), w.waits_for.clone(), w.why.clone()]).collect();
        if !rows.is_empty() {
            parts.push(table(&["open run", "waits for", "why that is right"], &rows));
        }
        let Sights { sights, keys, again, late } = self.effects;
        parts.push(format!(
            "effects: {sights} sights of {keys} keys; {again} seen again before their result was committed, {late} of \
             them late, by an attempt that others had replaced"
        ));
        let settled =
            self.settled_ms.map_or("not settled".to_owned(), |ms| format!("settled {ms} ms after the last fault"));
        let (seed, seconds, ended) = (self.seed, self.seconds, self.ended_by_itself);
        parts.push(format!("seed {seed}, {seconds} s of faults, {settled}; {ended} processes ended by themselves"));
        if self.violations.is_empty() {
            parts.push(format!("{} checks, no violation", self.checks.len()));
        } else {
            let mut by_check: BTreeMap<&str, Vec<&Finding>> = BTreeMap::new();
            self.violations.iter().for_each(|v| by_check.entry(v.check).or_default().push(v));
            parts.push(format!("{} checks, {} violations:", self.checks.len(), self.violations.len()));
            for (check, found) in by_check {
                let lines = found.iter().take(SHOWN).map(|f| format!("  {}: {}", f.meaning, f.subject));
                let more = found.len().saturating_sub(SHOWN);
                let more = (more > 0).then(|| format!("  … and {more} more"));
                parts.push(format!("{check}\n{}", lines.chain(more).collect::<Vec<_>>().join("\n")));
            }
        }
        parts.join("\n\n")
    }
}
