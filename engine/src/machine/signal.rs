//! What steps take: the names and the forms of signals and updates, as the definition declares them.

use crate::definition::{Definition, Kind, inputs::violations};
use serde_json::Value;
use std::collections::BTreeSet;

/// Through which door a message comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Door {
    /// Nobody hears what became of it. An approval takes it under the id of its step.
    Signal,
    /// It is answered. Only an `await` without an approval takes it.
    Update,
}

impl Door {
    fn word(self) -> &'static str {
        match self {
            Self::Signal => "a signal",
            Self::Update => "an update",
        }
    }
}

/// Why no step of the definition takes this message; empty if one does. A message fits if it fits one of the steps that
/// wait for its name.
#[must_use]
pub fn problems(definition: &Definition, name: &str, payload: &Value, door: Door) -> Vec<String> {
    let (mut names, mut problems, mut fits) = (BTreeSet::new(), Vec::new(), false);
    definition.walk(&mut |step| {
        let Kind::Await(spec) = &step.kind else { return };
        if door == Door::Signal || spec.approval.is_none() {
            names.insert(format!("`{}`", spec.signal));
        }
        if spec.signal != name {
            return;
        }
        // An approval has no form: it reads `decision`.
        let found = match (&spec.form, spec.approval, door) {
            (_, Some(_), Door::Update) => {
                vec![format!("`{name}` is an approval and takes no update: decide it by an approval or a signal")]
            }
            (_, Some(_), Door::Signal) if decides(payload) => Vec::new(),
            (_, Some(_), Door::Signal) => {
                vec!["at /decision: not `approved`, `rejected` or `changes_requested`".to_owned()]
            }
            (Some(form), None, _) => violations(form, payload),
            (None, None, _) => Vec::new(),
        };
        fits |= found.is_empty();
        problems.extend(found);
    });
    if fits {
        return Vec::new();
    }
    if problems.is_empty() {
        let what = door.word();
        problems.push(if names.is_empty() {
            format!("no step waits for {what} `{name}`, nor for any other")
        } else {
            let names: Vec<String> = names.into_iter().collect();
            format!("no step waits for {what} `{name}`; this workflow's are {}", names.join(", "))
        });
    }
    problems
}

fn decides(payload: &Value) -> bool {
    ["approved", "rejected", "changes_requested"].iter().any(|d| payload["decision"] == *d)
}
