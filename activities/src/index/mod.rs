//! The code index: symbols and full text of a project's files, searchable within a token budget.
//!
//! Everything it holds can be built again from the files; its folder may be deleted at any time. It knows no language
//! model, no workflow and no git. Start reading at [`Index`], then `update` and `search`.
//!
//! ```text
//! update: walk ─▶ extract ─▶ unit ─▶ store (one commit)
//! ask:    query ─▶ score · lookup ─▶ search │ map │ pack
//! ```

mod budget;
mod catalog;
mod extract;
mod kind;
mod lang;
mod lookup;
mod map;
mod pack;
mod query;
mod score;
mod search;
mod store;
#[cfg(test)]
mod tests;
mod tokenize;
mod unit;
mod update;
mod walk;

pub use extract::too_deep;

use serde::Serialize;
use std::{
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError, RwLock},
};
use store::Loaded;

/// Why the index could not be opened, brought up to date or asked.
#[derive(Debug, thiserror::Error)]
pub enum IndexError {
    /// `index.disk`: a folder cannot be read or made. The index is as it was.
    #[error("{path} cannot be used: {source}")]
    Disk { path: PathBuf, source: std::io::Error },
    /// `index.busy`: another process writes this index or has just written it. Ask again.
    #[error("another process is writing this index; try again")]
    Busy,
    /// `index.full_text`: the full text failed and could not be built anew either: out of space or memory, most likely.
    #[error("the full-text index failed: {0}")]
    FullText(#[from] tantivy::TantivyError),
}

impl IndexError {
    /// A stable code; the README lists them.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Disk { .. } => "index.disk",
            Self::Busy => "index.busy",
            Self::FullText(_) => "index.full_text",
        }
    }
}

/// A place that answers a query.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Hit {
    pub path: String,
    /// 1-based, inclusive.
    pub start_line: u32,
    pub end_line: u32,
    /// The symbol whose body this is, if it is one.
    pub symbol: Option<String>,
    /// First lines of the place.
    pub snippet: String,
    /// The lanes that found it with their ranks, as in `file 1, unit 3`.
    pub why: String,
}

/// A definition.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Symbol {
    pub name: String,
    /// `function`, `method`, `struct`, `class`, …
    pub kind: String,
    pub path: String,
    pub start_line: u32,
    pub end_line: u32,
    /// Its first line, without the body.
    pub signature: String,
    /// The name of what contains it.
    pub parent: Option<String>,
}

/// Code for a prompt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Pack {
    /// Never above the budget, headers included.
    pub text: String,
    /// By the safe bound of the index: bytes / 3.2.
    pub tokens: usize,
    pub items: Vec<Packed>,
    /// The next candidates that did not fit.
    pub omitted: Vec<Packed>,
}

/// A piece of a [`Pack`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Packed {
    pub path: String,
    pub start_line: u32,
    pub end_line: u32,
    pub symbol: Option<String>,
    pub tokens: usize,
}

/// What an update did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct UpdateReport {
    /// Files in the index after it.
    pub files: usize,
    pub added: usize,
    pub changed: usize,
    pub removed: usize,
    /// Files that are findable by path only or have no symbols, and what was left out, with the reason. At most 1000.
    pub skipped: Vec<(String, String)>,
}

/// The size of an index.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Status {
    pub files: usize,
    pub units: usize,
    pub symbols: usize,
    /// Pieces of the full text on disk; merges keep them few.
    pub segments: usize,
}

/// An index in a folder of its own. Any number of threads may ask; one updates.
pub struct Index {
    dir: PathBuf,
    loaded: RwLock<Loaded>,
    updating: Mutex<()>,
}

impl Index {
    /// Opens the index in `dir`; what is damaged or of another release is thrown away and empty then.
    ///
    /// # Errors
    /// `index.disk`, `index.full_text`.
    pub fn open(dir: &Path) -> Result<Self, IndexError> {
        std::fs::create_dir_all(dir).map_err(|source| IndexError::Disk { path: dir.to_owned(), source })?;
        Ok(Self { dir: dir.to_owned(), loaded: RwLock::new(Loaded::open(dir)?), updating: Mutex::new(()) })
    }

    /// Brings the index up to date with the files below `root`. Unchanged files are not read.
    ///
    /// What is asked meanwhile is answered from before. All of it becomes visible at once; if the process dies, none of it.
    ///
    /// # Errors
    /// `index.disk` when `root` cannot be read; `index.busy`; `index.full_text` when building anew does not help either.
    pub fn update(&self, root: &Path) -> Result<UpdateReport, IndexError> {
        let _one = self.updating.lock().unwrap_or_else(PoisonError::into_inner);
        let walked = walk::walk(root)?;
        let first = self.follow_others().and_then(|()| update::bring(&self.loaded, root, &walked));
        match first {
            Err(IndexError::FullText(error)) => {
                tracing::warn!(%error, "the code index is damaged and is built anew");
                let fresh = Loaded::create(&self.dir)?;
                *self.loaded.write().unwrap_or_else(PoisonError::into_inner) = fresh;
                update::bring(&self.loaded, root, &walked)
            }
            first => first,
        }
    }

    /// Places that answer a question, best first, one a file.
    ///
    /// # Errors
    /// `index.full_text`: the next update repairs it.
    pub fn search(&self, query: &str, limit: usize) -> Result<Vec<Hit>, IndexError> {
        Ok(search::search(&self.loaded(), query, limit)?)
    }

    /// Definitions of a name or of `Parent::name`: exactly so, in any case, beginning so, containing it.
    ///
    /// # Errors
    /// None at present.
    pub fn symbols(&self, name: &str, limit: usize) -> Result<Vec<Symbol>, IndexError> {
        Ok(search::symbols(&self.loaded(), name, limit))
    }

    /// The signatures that the rest of the code uses most, under their files; never above the budget.
    ///
    /// # Errors
    /// None at present.
    pub fn map(&self, budget_tokens: usize) -> Result<String, IndexError> {
        Ok(map::map(&self.loaded(), budget_tokens))
    }

    /// The code that a question needs; never above the budget. The same files and question give the same bytes.
    ///
    /// # Errors
    /// `index.full_text`: the next update repairs it.
    pub fn pack(&self, query: &str, budget_tokens: usize) -> Result<Pack, IndexError> {
        Ok(pack::pack(&self.loaded(), query, budget_tokens)?)
    }

    /// How large the index is.
    #[must_use]
    pub fn status(&self) -> Status {
        let loaded = self.loaded();
        Status {
            files: loaded.catalog.files.len(),
            units: loaded.catalog.units,
            symbols: loaded.catalog.files.values().map(|record| record.defs.len()).sum(),
            segments: loaded.segments(),
        }
    }

    /// Reads again what another process has committed.
    fn follow_others(&self) -> Result<(), IndexError> {
        if !self.loaded().is_current()? {
            let loaded = Loaded::open(&self.dir)?;
            *self.loaded.write().unwrap_or_else(PoisonError::into_inner) = loaded;
        }
        Ok(())
    }

    fn loaded(&self) -> std::sync::RwLockReadGuard<'_, Loaded> {
        self.loaded.read().unwrap_or_else(PoisonError::into_inner)
    }
}
