//! Where the tools work: a worktree with its index and the sandbox around it.

use super::{HITS_MAX, RUN_TAIL_BYTES_MAX};
use crate::{
    index::Index,
    sandbox::{Evidence, Limits, Sandbox, SandboxCommand},
    workspace::{FileChange, Workspace},
};
use futures_util::future::BoxFuture;
use loopwright_engine::Failure;
use std::{
    collections::BTreeMap,
    fmt::Write as _,
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};
use tokio_util::sync::CancellationToken;

/// How a command ended, as far as a model needs to know.
#[derive(Clone, Debug, PartialEq)]
pub struct Ran {
    pub exit_code: Option<i32>,
    pub signal: Option<i32>,
    pub timed_out: bool,
    pub duration_ms: u64,
    /// The end of its output.
    pub output_tail: String,
    pub output_bytes: u64,
}

impl From<Evidence> for Ran {
    fn from(evidence: Evidence) -> Self {
        Self {
            exit_code: evidence.exit_code,
            signal: evidence.signal,
            timed_out: evidence.timed_out,
            duration_ms: evidence.duration_ms,
            output_tail: tail(&evidence.output_tail, RUN_TAIL_BYTES_MAX).to_owned(),
            output_bytes: evidence.output_bytes,
        }
    }
}

/// What the tools act on.
///
/// # Errors
/// Failures of kind `permanent` from everything but `run` and `changes` are told to the model (a path that leaves the
/// tree, say); all others end the attempt.
pub trait Bench: Send + Sync {
    /// A file of the tree; `None` where there is none.
    fn read(&self, path: &str) -> Result<Option<String>, Failure>;
    /// Writes all of the changes or none.
    fn write(&self, changes: &[FileChange]) -> Result<(), Failure>;
    /// The tree against its last commit.
    fn changes(&self) -> BoxFuture<'_, Result<Vec<FileChange>, Failure>>;
    /// A file as the last commit has it; `None` where there is none.
    fn committed<'a>(&'a self, path: &'a str) -> BoxFuture<'a, Result<Option<String>, Failure>>;
    /// Places for a query, as text.
    fn search(&self, query: String) -> BoxFuture<'_, Result<String, Failure>>;
    /// Definitions of a name, as text.
    fn symbols(&self, name: String) -> BoxFuture<'_, Result<String, Failure>>;
    /// Runs a command in the root of the tree.
    fn run<'a>(&'a self, command: String, cancel: &'a CancellationToken) -> BoxFuture<'a, Result<Ran, Failure>>;
}

/// The bench of production: a private worktree, its index, the sandbox.
pub struct Worktree {
    workspace: Workspace,
    sandbox: Sandbox,
    index: Arc<Mutex<Index>>,
    /// The index is behind the tree.
    stale: Arc<AtomicBool>,
}

impl Worktree {
    /// A bench over an open worktree; the index is brought up to date before its first use.
    #[must_use]
    pub fn new(workspace: Workspace, sandbox: Sandbox, index: Index) -> Self {
        Self { workspace, sandbox, index: Arc::new(Mutex::new(index)), stale: Arc::new(AtomicBool::new(true)) }
    }

    /// The worktree underneath.
    #[must_use]
    pub fn workspace(&self) -> &Workspace {
        &self.workspace
    }

    /// Asks the index, after an update if the tree changed since the last. Parsing is work for a blocking thread.
    ///
    /// # Errors
    /// `index.failed`, permanent: the index could not be read or brought up to date.
    pub async fn ask<T: Send + 'static>(
        &self,
        question: impl FnOnce(&Index) -> Result<T, crate::index::IndexError> + Send + 'static,
    ) -> Result<T, Failure> {
        let (index, stale, root) = (self.index.clone(), self.stale.clone(), PathBuf::from(self.workspace.dir()));
        let answer = tokio::task::spawn_blocking(move || {
            // A panic while the index was held leaves at worst an old state, which the update below repairs.
            let index = index.lock().unwrap_or_else(PoisonError::into_inner);
            // Before the update: a write that comes while it runs makes it stale again.
            if stale.swap(false, Ordering::AcqRel)
                && let Err(error) = index.update(&root)
            {
                stale.store(true, Ordering::Release);
                return Err(error);
            }
            question(&index)
        });
        match answer.await {
            Ok(answer) => {
                answer.map_err(|e| Failure::permanent("index.failed", format!("the code index cannot answer: {e}")))
            }
            Err(error) => {
                self.stale.store(true, Ordering::Release);
                Err(Failure::permanent("index.failed", format!("the code index stopped: {error}")))
            }
        }
    }
}

impl Bench for Worktree {
    fn read(&self, path: &str) -> Result<Option<String>, Failure> {
        self.workspace.read(path)
    }

    fn write(&self, changes: &[FileChange]) -> Result<(), Failure> {
        self.stale.store(true, Ordering::Release);
        self.workspace.write(changes)
    }

    fn changes(&self) -> BoxFuture<'_, Result<Vec<FileChange>, Failure>> {
        Box::pin(self.workspace.changes())
    }

    fn committed<'a>(&'a self, path: &'a str) -> BoxFuture<'a, Result<Option<String>, Failure>> {
        Box::pin(self.workspace.committed(path))
    }

    fn search(&self, query: String) -> BoxFuture<'_, Result<String, Failure>> {
        Box::pin(async move {
            let hits = self.ask(move |index| index.search(&query, HITS_MAX)).await?;
            let mut out = String::new();
            for hit in hits {
                let symbol = hit.symbol.map(|name| format!(" {name}")).unwrap_or_default();
                // Writing to a String cannot fail.
                let _ = writeln!(out, "{}:{}-{}{symbol}", hit.path, hit.start_line, hit.end_line);
                for line in hit.snippet.lines() {
                    let _ = writeln!(out, "    {line}");
                }
            }
            Ok(out)
        })
    }

    fn symbols(&self, name: String) -> BoxFuture<'_, Result<String, Failure>> {
        Box::pin(async move {
            let symbols = self.ask(move |index| index.symbols(&name, HITS_MAX)).await?;
            let mut out = String::new();
            for symbol in symbols {
                let parent = symbol.parent.map(|name| format!(" in {name}")).unwrap_or_default();
                let place = format!("{}:{}-{}", symbol.path, symbol.start_line, symbol.end_line);
                // Writing to a String cannot fail.
                let _ = writeln!(out, "{place} {} {}{parent}: {}", symbol.kind, symbol.name, symbol.signature);
            }
            Ok(out)
        })
    }

    fn run<'a>(&'a self, command: String, cancel: &'a CancellationToken) -> BoxFuture<'a, Result<Ran, Failure>> {
        Box::pin(async move {
            self.stale.store(true, Ordering::Release);
            let command = SandboxCommand {
                script: command,
                dir: self.workspace.dir().to_owned(),
                env: BTreeMap::new(),
                limits: Limits::default(),
                network: false,
            };
            self.sandbox.run(command, cancel).await.map(Ran::from)
        })
    }
}

/// The end of a text, at most `bytes` long, from a character border.
pub(super) fn tail(text: &str, bytes: usize) -> &str {
    let mut from = text.len().saturating_sub(bytes);
    while !text.is_char_boundary(from) {
        from += 1;
    }
    &text[from..]
}

/// The start of a text, at most `bytes` long, to a character border.
pub(super) fn head(text: &str, bytes: usize) -> &str {
    let mut to = text.len().min(bytes);
    while !text.is_char_boundary(to) {
        to -= 1;
    }
    &text[..to]
}
