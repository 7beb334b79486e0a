//! What a finished turn leaves behind, and the tree's state as the loop knows it.

use super::watch::Rule;
use crate::workspace::FileChange;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;

/// The checkpoint `turn:<n>`: everything that the next turns need of this one besides the model's reply.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct TurnRecord {
    /// In the order of the calls.
    pub(super) results: Vec<ToolResult>,
    /// What the model is told after the results, as the user.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) note: Option<String>,
    /// Files that the turn changed, with their content after it (null: deleted).
    #[serde(default)]
    pub(super) delta: Vec<Delta>,
    /// Files whose edits were refused, by cause.
    #[serde(default)]
    pub(super) refused: Refused,
    /// The model was reminded to use its tools.
    #[serde(default)]
    pub(super) reminded: bool,
    /// The model said that it was done although nothing had changed, and was asked whether it was sure.
    #[serde(default)]
    pub(super) doubted: bool,
    /// Set by the last turn.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) end: Option<End>,
}

/// Files whose edits were refused, once for each refusal.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Refused {
    /// By the syntax gate.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) syntax: Vec<String>,
    /// Because a search block was not found or not unique.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) missed: Vec<String>,
}

impl Refused {
    pub(super) fn add(&mut self, other: &Self) {
        self.syntax.extend_from_slice(&other.syntax);
        self.missed.extend_from_slice(&other.missed);
    }
}

/// The answer to one tool call.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct ToolResult {
    /// The tree that the call was made on, as [`Tree::state`].
    pub(super) state: String,
    pub(super) call_id: String,
    pub(super) name: String,
    pub(super) output: String,
}

/// A file after a turn.
///
/// # Shape
/// Checkpoints are `jsonb`, which cannot hold NUL: a content that contains one is kept as its JSON text, `escaped`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Delta {
    path: String,
    content: Option<String>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    escaped: bool,
}

impl Delta {
    pub(super) fn new(path: String, content: Option<String>) -> Self {
        match content {
            Some(text) if text.contains('\0') => {
                Self { path, content: Some(Value::String(text).to_string()), escaped: true }
            }
            content => Self { path, content, escaped: false },
        }
    }

    pub(super) fn to_change(&self) -> FileChange {
        let content = match &self.content {
            Some(text) if self.escaped => Some(serde_json::from_str(text).unwrap_or_else(|_| text.clone())),
            content => content.clone(),
        };
        FileChange { path: self.path.clone(), content }
    }
}

/// Why a loop ended with a turn.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "end", rename_all = "snake_case")]
pub(super) enum End {
    /// The model said so.
    Done {
        summary: String,
        result: Option<Value>,
    },
    /// It answered in words instead of calling a tool.
    Text {
        text: String,
    },
    Stopped {
        rule: Rule,
    },
}

type Hash = [u8; 32];

/// The tree against the loop's start: which files differ, by content.
#[derive(Default)]
pub(super) struct Tree {
    /// Per path that ever changed: content at the start and now.
    files: BTreeMap<String, (Option<Hash>, Option<Hash>)>,
}

impl Tree {
    /// A file went from `before` to `after`; `false` if that is no change.
    pub(super) fn set(&mut self, path: &str, before: Option<&str>, after: Option<&str>) -> bool {
        let hash = |text: &str| -> Hash { Sha256::digest(text).into() };
        let (before, after) = (before.map(hash), after.map(hash));
        self.files.entry(path.to_owned()).or_insert((before, before)).1 = after;
        before != after
    }

    /// Number of files that differ from the start.
    pub(super) fn changed(&self) -> usize {
        self.files.values().filter(|(start, now)| start != now).count()
    }

    /// A text that is equal for equal trees.
    pub(super) fn state(&self) -> String {
        let mut sha = Sha256::new();
        for (path, (_, now)) in self.files.iter().filter(|(_, (start, now))| start != now) {
            sha.update(path.as_bytes());
            sha.update([0, u8::from(now.is_some())]);
            sha.update(now.unwrap_or_default());
        }
        sha.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_content_survives_a_checkpoint() {
        for content in [None, Some("a\nb"), Some("a\0b\u{fffd}\"")] {
            let delta = Delta::new("p".into(), content.map(str::to_owned));
            let stored = serde_json::to_string(&delta).expect("serializes");
            assert!(!stored.contains("\\u0000") || stored.contains("\\\\u0000"), "{stored}");
            let back: Delta = serde_json::from_str(&stored).expect("parses");
            assert_eq!(back.to_change().content.as_deref(), content);
        }
    }

    #[test]
    fn a_tree_that_comes_back_has_its_old_state() {
        let mut tree = Tree::default();
        let start = tree.state();
        assert!(tree.set("a", Some("1"), Some("2")));
        let changed = tree.state();
        assert_ne!(start, changed);
        assert!(!tree.set("b", None, None));
        assert_eq!((tree.state(), tree.changed()), (changed, 1));
        assert!(tree.set("a", Some("2"), Some("1")));
        assert_eq!((tree.state(), tree.changed()), (start, 0));
    }
}
