//! Edits of a project's files as a model asks for them: checked, applied to a view in memory, all or nothing.
//!
//! Nothing here writes a file. [`plan`] (and [`apply`], its short form) reads through a closure and answers with the
//! changes that the workspace then writes at once, or with an [`EditError`] whose text a model can act on. Start
//! reading at [`plan`]; `matching` finds where a block belongs, `syntax` is the gate, `path` keeps paths in the tree.

mod apply;
mod error;
mod matching;
pub mod path;
pub mod syntax;

pub use apply::{Plan, apply, plan};
pub use error::{EditError, Reason};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// Most edits in one call. Chosen, not measured: more than a careful change of one TODO item needs.
pub const EDITS_MAX: usize = 50;
/// Largest file that an edit may read or leave behind, in bytes: the limit of the code index too.
pub const FILE_BYTES_MAX: usize = 1 << 20;

/// One change that a model asks for.
///
/// # Shape
/// Tagged by `op`: `{"op":"write","path":…,"content":…}`, `{"op":"replace","path":…,"search":…,"replace":…}`,
/// `{"op":"delete","path":…}`. Paths are relative to the root of the project, with `/`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "op", rename_all = "snake_case", deny_unknown_fields)]
pub enum Edit {
    /// The whole file: for new and for small files.
    Write { path: String, content: String },
    /// One block that occurs exactly once; indentation may be shifted as a whole.
    Replace { path: String, search: String, replace: String },
    /// The file goes.
    Delete { path: String },
}

impl Edit {
    /// The name of its operation.
    #[must_use]
    pub fn op(&self) -> &'static str {
        match self {
            Self::Write { .. } => "write",
            Self::Replace { .. } => "replace",
            Self::Delete { .. } => "delete",
        }
    }

    /// The path as the model wrote it.
    #[must_use]
    pub fn path(&self) -> &str {
        match self {
            Self::Write { path, .. } | Self::Replace { path, .. } | Self::Delete { path } => path,
        }
    }
}

/// Paths that edits may not touch: what others answer for, such as `TODO.md` and the files of the plan's checks.
#[derive(Clone, Debug, Default)]
pub struct Frozen(BTreeSet<String>);

impl Frozen {
    /// The given files and folders; those that are no paths of a project are left out, since no edit can reach them anyway.
    pub fn new<S: AsRef<str>>(paths: impl IntoIterator<Item = S>) -> Self {
        Self(paths.into_iter().filter_map(|p| path::normal(p.as_ref().trim_end_matches('/')).ok()).collect())
    }
    /// Whether `path`, in normal form, is frozen: by its own name or because a folder above it is.
    #[must_use]
    pub fn contains(&self, path: &str) -> bool {
        self.0.contains(path) || path.match_indices('/').any(|(at, _)| self.0.contains(&path[..at]))
    }
    /// The frozen paths in order.
    pub fn iter(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(String::as_str)
    }
}
