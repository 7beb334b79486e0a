//! A run out into a file, in from one, and decided again.

use super::{Client, LONG_MAX};
use crate::{
    Error, Result,
    archive::{Archive, Header, Record, Writer, check},
    ids::{DefinitionHash, RunId},
    machine::replay::{Replay, Replayed},
    store,
    transaction::in_transaction_within,
};
use sqlx::PgConnection;
use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};

/// History rows read at once.
const ROWS: u32 = 200;
/// Checkpoints read at once: each may have 8 MiB.
const CHECKPOINTS: i64 = 8;

/// An export under way.
pub struct Export {
    client: Client,
    run: RunId,
    writer: Writer,
    lines: VecDeque<String>,
    /// The row of the run; nothing beyond its seq is exported.
    seq: u64,
    next: Next,
}

enum Next {
    History(u64),
    Checkpoints(String, String),
    Done,
}

impl Export {
    /// The next line with its end, or `None` after the last.
    ///
    /// # Errors
    /// `database`.
    pub async fn next(&mut self) -> Result<Option<String>> {
        while self.lines.is_empty() {
            match std::mem::replace(&mut self.next, Next::Done) {
                Next::History(after) if after < self.seq => {
                    let mut rows = self.client.history(self.run, after, ROWS).await?;
                    rows.retain(|row| row.seq <= self.seq);
                    let Some(last) = rows.last().map(|row| row.seq) else {
                        let ends = Error::Invariant(format!("the history of run {} ends at {after}", self.run));
                        return Err(self.client.unless_gone(self.run, ends).await);
                    };
                    for row in rows {
                        self.lines.push_back(self.writer.line(&Record::History(row))?);
                    }
                    self.next = Next::History(last);
                }
                Next::History(_) => self.next = Next::Checkpoints(String::new(), String::new()),
                Next::Checkpoints(path, key) => {
                    let asked = async |conn: &mut PgConnection| {
                        store::archive::checkpoints(conn, self.run, (&path, &key), CHECKPOINTS).await
                    };
                    let found = self.client.ask(asked).await?;
                    match found.last() {
                        Some(last) => self.next = Next::Checkpoints(last.path.clone(), last.key.clone()),
                        None => {
                            let end = self.writer.end();
                            self.lines.push_back(self.writer.line(&end)?);
                        }
                    }
                    for checkpoint in found {
                        self.lines.push_back(self.writer.line(&Record::Checkpoint(checkpoint))?);
                    }
                }
                Next::Done => return Ok(None),
            }
        }
        Ok(self.lines.pop_front())
    }
}

impl Client {
    /// Begins to export a run with its definition, its history up to now and its checkpoints; see [`crate::archive`]. The
    /// history of a fork is exported whole: its archive needs no other.
    ///
    /// # Errors
    /// `run_not_found`.
    pub async fn export(&self, run: RunId) -> Result<Export> {
        let header: Header = self.ask(async |conn| store::archive::header(conn, run).await).await?;
        let (mut writer, seq) = (Writer::default(), header.run.seq);
        let lines = VecDeque::from([writer.line(&Record::Header(Box::new(header)))?]);
        Ok(Export { client: self.clone(), run, writer, lines, seq, next: Next::History(0) })
    }

    /// Stores an archive so that it can be read: shown, listed, replayed, exported, forked. It is never executed and nothing
    /// of it is charged: nobody may own it, it has no place in a queue, takes no message, tells no parent and no outbox. One
    /// that was open is `quarantined` here and cannot be released.
    ///
    /// # Errors
    /// `archive_invalid` if its history does not fold to what its row says or something in it cannot be kept, `too_large`,
    /// `run_exists`.
    /// # Transaction
    /// One, everything or nothing: definition (if it is not there; `current` stays), run, history, checkpoints.
    pub async fn import(&self, archive: Archive) -> Result<RunId> {
        let run = archive.header.run.run_id;
        let checked = check::check(&archive)?;
        let state = serde_json::to_value(checked.state).map_err(|e| Error::Invariant(e.to_string()))?;
        let shared = Arc::new((archive, state));
        in_transaction_within(&self.pool, LONG_MAX, |conn| {
            let shared = shared.clone();
            Box::pin(async move {
                if store::archive::insert(conn, &shared.0, &shared.1, checked.messages).await? {
                    return Ok(run);
                }
                // An error, so that the definition is not left behind.
                Err(Error::RunExists(run.to_string()))
            })
        })
        .await
    }

    /// Decides the history of a run again, under the definition it is pinned to or under another, and says where it differs
    /// first. What is checked and what is not: [`crate::machine::replay`]. Reads only.
    ///
    /// # Errors
    /// `run_not_found`, `definition_not_found`; `invariant` if the history cannot be folded.
    /// # Shape
    /// A run that was migrated is decided under the definition that it had at each transition; under another one, all of it is.
    pub async fn replay(&self, run: RunId, definition: Option<DefinitionHash>) -> Result<Replayed> {
        let asked = async |conn: &mut PgConnection| {
            let header = store::archive::header(conn, run).await?;
            let former = store::migrations::former(conn, run).await?;
            let first = former.first().map_or(header.definition.hash, |(_, hash)| *hash);
            let pinned = store::definitions::load(conn, definition.unwrap_or(first)).await?;
            // Under another definition, all of it: the question is what that one would have decided.
            let hashes: Vec<_> = former.iter().skip(1).map(|(_, hash)| *hash).chain([header.definition.hash]).collect();
            let later = match definition {
                None if !former.is_empty() => super::migrate::definitions(conn, hashes).await?,
                _ => BTreeMap::new(),
            };
            Ok((header, pinned, later))
        };
        let (header, pinned, later) = self.ask(asked).await?;
        let mut replay = Replay::new(&pinned.definition, run, header.run.depth, header.run.forked_seq);
        if definition.is_none() {
            replay = replay.migrating(&later);
        }
        let mut after = 0;
        while after < header.run.seq {
            let rows = self.history(run, after, ROWS).await?;
            let Some(last) = rows.last() else {
                let ends = Error::Invariant(format!("the history of run {run} ends at {after}"));
                return Err(self.unless_gone(run, ends).await);
            };
            after = last.seq;
            for row in &rows {
                if !replay.row(row).map_err(|e| Error::Invariant(format!("run {run}, {e}")))? {
                    return Ok(replay.done());
                }
            }
        }
        Ok(replay.done())
    }
}
