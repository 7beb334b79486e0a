//! What the hook did not let start, while one decision is made again and again until it can be committed.

use super::Command;
use std::collections::BTreeMap;

/// Starts that the hook refused in former versions of a decision.
///
/// A hook answers a transition as a whole. If the transition starts several attempts, each of them might have started
/// alone, so the next version starts one; only an attempt that was refused alone is refused.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Refusals {
    /// Reason and message, by step path.
    by_path: BTreeMap<String, (String, String)>,
    one_by_one: bool,
}

impl Refusals {
    /// How many of `free` permits the next version of the decision may use.
    #[must_use]
    pub fn permits(&self, free: usize) -> usize {
        if self.one_by_one { free.min(1) } else { free }
    }

    /// Why the step at `path` may not start now.
    #[must_use]
    pub fn of(&self, path: &str) -> Option<(&str, &str)> {
        self.by_path.get(path).map(|(reason, message)| (reason.as_str(), message.as_str()))
    }

    /// The step at `path` may not start.
    pub(super) fn add(&mut self, path: &str, reason: &str, message: &str) {
        self.by_path.insert(path.to_owned(), (reason.to_owned(), message.to_owned()));
    }

    /// Notes that a version with these commands was refused. False if it started nothing that could be left out: then
    /// deciding again would change nothing.
    #[must_use]
    pub fn note(&mut self, commands: &[Command], reason: &str, message: &str) -> bool {
        let starts: Vec<&str> = commands
            .iter()
            .filter_map(|c| match c {
                Command::StartAttempt { path, .. } => Some(path.as_str()),
                _ => None,
            })
            .collect();
        match starts[..] {
            [] => return false,
            [path] => self.add(path, reason, message),
            _ => self.one_by_one = true,
        }
        true
    }
}
