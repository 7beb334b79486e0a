//! The code index: symbols and full text of a project's files, searchable within a token budget.

use serde::Serialize;
use std::path::{Path, PathBuf};

/// Why the index could not be opened, brought up to date or asked.
#[derive(Debug, thiserror::Error)]
pub enum IndexError {
    #[error("{path}: {source}")]
    Disk { path: PathBuf, source: std::io::Error },
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
    pub files: usize,
    pub added: usize,
    pub changed: usize,
    pub removed: usize,
    /// Files that are findable by path only, and why.
    pub skipped: Vec<(String, String)>,
}

/// An index in a folder of its own.
pub struct Index {}

impl Index {
    pub fn open(dir: &Path) -> Result<Self, IndexError> {
        std::fs::create_dir_all(dir).map_err(|source| IndexError::Disk { path: dir.to_owned(), source })?;
        Ok(Self {})
    }
    pub fn update(&self, _root: &Path) -> Result<UpdateReport, IndexError> {
        Ok(UpdateReport::default())
    }
    pub fn search(&self, _query: &str, _limit: usize) -> Result<Vec<Hit>, IndexError> {
        Ok(Vec::new())
    }
    pub fn symbols(&self, _name: &str, _limit: usize) -> Result<Vec<Symbol>, IndexError> {
        Ok(Vec::new())
    }
    pub fn map(&self, _budget_tokens: usize) -> Result<String, IndexError> {
        Ok(String::new())
    }
    pub fn pack(&self, _query: &str, _budget_tokens: usize) -> Result<Pack, IndexError> {
        Ok(Pack { text: String::new(), tokens: 0, items: Vec::new(), omitted: Vec::new() })
    }
}
