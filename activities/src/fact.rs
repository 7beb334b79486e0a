//! What the loop establishes about a project, as data: the bodies of its records. Written and read by [`crate::record`].

use crate::{
    check,
    todo::{State, Todo},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// One thing that the result has to do or be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Requirement {
    /// `R1`, `R2`, … for the life of the project.
    pub id: String,
    /// One sentence that can be checked.
    pub text: String,
}

/// The record of what was understood.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Requirements {
    pub idea: String,
    pub requirements: Vec<Requirement>,
    pub assumptions: Vec<String>,
}

/// One choice of the stack.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Choice {
    pub choice: String,
    pub reason: String,
}

/// The record of a plan: what the loop works off.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    pub summary: String,
    pub stack: Vec<Choice>,
    /// Finished items of earlier plans included.
    pub items: Vec<Todo>,
}

/// The record of an item's end: what "done" rests on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    pub item: String,
    pub state: State,
    pub commit: String,
    pub tree: String,
    pub evidence: check::Output,
}

impl Plan {
    /// This plan with further items.
    #[must_use]
    pub fn with(&self, more: &[Todo]) -> Self {
        let mut plan = self.clone();
        plan.items.extend(more.iter().filter(|item| self.items.iter().all(|known| known.id != item.id)).cloned());
        plan
    }
}
