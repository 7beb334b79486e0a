//! Under which keys of the queue a worker looks: its queues, and with labels also what is there for them.

use super::pace::Pace;
use crate::{
    Result, labels,
    store::{ready, spread::Spread},
    transaction::Session,
};
use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

/// Shortest pause between two looks for keys. Idle, a worker looks at every poll.
const LOOK: Duration = Duration::from_millis(50);
/// Keys that stay known while nothing stands under them. More would make every claim dearer.
const KEPT_MAX: usize = 32;

#[derive(Debug)]
pub(super) struct Keys {
    queues: Vec<String>,
    labels: Vec<String>,
    pace: Pace,
    /// Where the next look goes on: one reads no more than [`ready::KEYS_MAX`] keys.
    after: Option<String>,
    /// What this round has found.
    round: BTreeSet<String>,
    /// Keys with labels that are served.
    known: BTreeSet<String>,
    all: Vec<String>,
}

impl Keys {
    pub(super) fn new(queues: Vec<String>, labels: Vec<String>) -> Self {
        Self {
            all: queues.clone(),
            queues,
            labels,
            pace: Pace::new(LOOK),
            after: None,
            round: BTreeSet::new(),
            known: BTreeSet::new(),
        }
    }

    /// Where to look for runs.
    pub(super) fn all(&self) -> &[String] {
        &self.all
    }

    /// Looks which keys there are, if it is time. True if one is new: what stands under it may have been due for long.
    /// A worker without labels asks nothing.
    pub(super) async fn look(&mut self, session: &mut Session, spread: Spread) -> Result<bool> {
        if self.labels.is_empty() || !self.pace.is_due() {
            return Ok(false);
        }
        let began = Instant::now();
        let found = ready::keys(session, spread, self.after.as_deref()).await?;
        self.pace.looked(began);
        Ok(self.found(found))
    }

    /// `keys` are in the database's order; fewer than the most are the last ones.
    fn found(&mut self, keys: Vec<String>) -> bool {
        let last = keys.len() < ready::KEYS_MAX;
        self.after = if last { None } else { keys.last().cloned() };
        let before = self.known.len();
        for key in keys.into_iter().filter(|key| key.contains('[') && labels::serves(&self.queues, &self.labels, key)) {
            self.known.insert(key.clone());
            self.round.insert(key);
        }
        let new = self.known.len() > before;
        if last {
            let round = std::mem::take(&mut self.round);
            if self.known.len() > KEPT_MAX {
                self.known = round;
            }
        }
        self.all = self.queues.iter().chain(&self.known).cloned().collect();
        new
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(all: &[&str]) -> Vec<String> {
        all.iter().map(|l| (*l).to_owned()).collect()
    }

    #[test]
    fn what_is_served_is_looked_for_once_it_was_seen() {
        let mut here = Keys::new(keys(&["default"]), keys(&["gpu"]));
        assert_eq!(here.all(), ["default"]);
        assert!(here.found(keys(&["default", "default[arm]", "default[gpu]", "other[gpu]"])));
        assert_eq!(here.all(), ["default", "default[gpu]"]);
        assert!(!here.found(keys(&["default[gpu]"])));
        assert!(!here.found(keys(&[])), "empty for a while");
        assert_eq!(here.all(), ["default", "default[gpu]"]);
    }

    #[test]
    fn more_keys_than_one_look_reads_are_found_in_rounds_and_forgotten_when_they_are_gone() {
        let all: Vec<String> = (0..40).map(|n| format!("l{n:02}")).collect();
        let mut here = Keys::new(keys(&["default"]), all.clone());
        let foreign = (0..ready::KEYS_MAX).map(|n| format!("a{n:03}"));
        assert!(!here.found(foreign.collect()));
        assert_eq!(here.after.as_deref(), Some("a099"));
        assert!(here.found(all.iter().map(|l| format!("default[{l}]")).collect()));
        assert_eq!((here.after.as_deref(), here.all().len()), (None, 41));
        assert!(!here.found(keys(&["default[l07]"])));
        assert_eq!(here.all(), ["default", "default[l07]"], "more are kept by nobody");
    }
}
