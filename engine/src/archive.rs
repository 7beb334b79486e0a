//! A run as a file: its definition, its row, its whole history and its checkpoints. To be kept, sent to somebody who is to
//! find a fault, replayed, or read in another database.
//!
//! # Shape
//! JSON lines, each an object with one key: `header` first, then `history` by rising seq from 1 without a gap, then
//! `checkpoint`s, then `end` with their numbers and the SHA-256 of all lines before it, line ends included.
//! # Limits
//! 256 MiB in all, 64 MiB a line. Chosen: a file is held in memory to be verified before anything of it is believed.

#[cfg(feature = "runtime")]
pub(crate) mod check;
mod instants;

use crate::{
    Error, Result,
    definition::{Bundle, Definition},
    ids::{DefinitionHash, RunId},
    machine::replay::{Replay, Replayed},
    view::{Chain, HistoryRow, RunStatus},
};
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::{collections::BTreeMap, io::BufRead};

/// Number of this format. A changed meaning is a new number.
pub const FORMAT: u32 = 1;
/// Largest archive, in bytes.
pub const BYTES_MAX: u64 = 256 << 20;
/// Longest line, in bytes.
pub const LINE_BYTES_MAX: u64 = 64 << 20;

/// The first line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Header {
    pub format: u32,
    pub exported_at: DateTime<Utc>,
    pub definition: Deployed,
    /// The definitions that the run had before it was migrated, oldest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub former: Vec<Former>,
    pub run: Run,
}

/// A definition that the run had up to a transition.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Former {
    /// The last transition that was decided under it.
    pub until: u64,
    pub definition: Deployed,
}

/// The definition that the run is pinned to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Deployed {
    pub hash: DefinitionHash,
    pub name: String,
    pub version: u32,
    /// The text as written.
    pub source: String,
    pub bundle: Bundle,
    /// As compiled.
    pub ir: Value,
    pub author: Option<String>,
    pub message: Option<String>,
}

/// The run's row.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Run {
    pub run_id: RunId,
    pub workflow: String,
    pub workflow_id: Option<String>,
    /// When it was exported.
    pub status: RunStatus,
    /// Number of history rows.
    pub seq: u64,
    pub queue: String,
    pub attributes: Value,
    pub inputs: Value,
    pub output: Option<Value>,
    pub failure: Option<Value>,
    /// How many runs stood above it.
    pub depth: u32,
    pub parent: Option<RunId>,
    /// Rows up to here were another run's, from which this one was forked; 0 if it was not. For readers: whoever decides
    /// looks at the history.
    #[serde(default)]
    pub forked_seq: u64,
    /// The runs before and after it, if it is one of a chain.
    #[serde(default, skip_serializing_if = "Chain::is_alone")]
    pub chain: Chain,
    pub started_at: DateTime<Utc>,
    pub closed_at: Option<DateTime<Utc>>,
}

/// A durable value that a step left behind.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Checkpoint {
    pub path: String,
    pub key: String,
    pub value: Value,
    pub created_at: DateTime<Utc>,
}

/// The last line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct End {
    pub history: u64,
    pub checkpoints: u64,
    /// Hex.
    pub sha256: String,
}

/// One line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Record {
    Header(Box<Header>),
    History(HistoryRow),
    Checkpoint(Checkpoint),
    End(End),
}

/// Writes an archive, a line at a time.
#[derive(Default)]
pub struct Writer {
    digest: Sha256,
    history: u64,
    checkpoints: u64,
}

impl Writer {
    /// A record as its line, with the line's end.
    ///
    /// # Errors
    /// `archive_invalid` if it cannot be JSON, which is our bug.
    pub fn line(&mut self, record: &Record) -> Result<String> {
        let broken = |e: serde_json::Error| Error::ArchiveInvalid { line: 0, why: e.to_string() };
        let mut line = serde_json::to_string(record).map_err(broken)?;
        line.push('\n');
        self.digest.update(line.as_bytes());
        match record {
            Record::History(_) => self.history += 1,
            Record::Checkpoint(_) => self.checkpoints += 1,
            Record::Header(_) | Record::End(_) => {}
        }
        Ok(line)
    }

    /// The last record.
    #[must_use]
    pub fn end(&self) -> Record {
        let sha256 = hex(&self.digest.clone().finalize());
        Record::End(End { history: self.history, checkpoints: self.checkpoints, sha256 })
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// A verified archive.
#[derive(Clone, Debug)]
pub struct Archive {
    pub header: Header,
    /// Compiled; its hash is the header's.
    pub definition: Definition,
    /// Those of `header.former`, compiled, and the last one, by hash.
    pub definitions: BTreeMap<DefinitionHash, Definition>,
    pub history: Vec<HistoryRow>,
    pub checkpoints: Vec<Checkpoint>,
}

impl Archive {
    /// Reads and verifies an archive: order, numbers, gaps, the sum of all bytes and the definition's hash. Whether the
    /// history folds is left to [`Self::replay`]: an archive of a broken run is still an archive.
    ///
    /// # Errors
    /// `archive_invalid` with the line and what is wrong there, `too_large`.
    pub fn read(input: impl BufRead) -> Result<Self> {
        let mut lines = Lines { input, number: 0, bytes: 0 };
        let mut writer = Writer::default();
        let invalid = |line: u64, why: &str| Error::ArchiveInvalid { line, why: why.to_owned() };
        let first = lines.next()?.ok_or_else(|| invalid(1, "the file is empty"))?;
        let header = match header(&first) {
            Ok(header) => header,
            Err(why) => return Err(Error::ArchiveInvalid { line: 1, why }),
        };
        let definition = compiled(&header.definition).map_err(|why| Error::ArchiveInvalid { line: 1, why })?;
        let mut definitions = BTreeMap::from([(header.definition.hash, definition.clone())]);
        for former in &header.former {
            let compiled = compiled(&former.definition).map_err(|why| Error::ArchiveInvalid { line: 1, why })?;
            definitions.insert(former.definition.hash, compiled);
        }
        writer.digest.update(first.as_bytes());
        let (mut history, mut checkpoints) = (Vec::<HistoryRow>::new(), Vec::new());
        loop {
            let Some(line) = lines.next()? else {
                return Err(invalid(lines.number, "the file ends before its `end`: it is cut off"));
            };
            let number = lines.number;
            let record: Record = serde_json::from_str(&line)
                .map_err(|e| Error::ArchiveInvalid { line: number, why: format!("no record of this format: {e}") })?;
            match record {
                Record::Header(_) => return Err(invalid(number, "a second header")),
                Record::History(row) => {
                    if row.seq != history.len() as u64 + 1 || !checkpoints.is_empty() {
                        return Err(invalid(number, &format!("row {} is out of order", row.seq)));
                    }
                    writer.history += 1;
                    history.push(row);
                }
                Record::Checkpoint(checkpoint) => {
                    writer.checkpoints += 1;
                    checkpoints.push(checkpoint);
                }
                Record::End(end) => {
                    if Record::End(end) != writer.end() {
                        return Err(invalid(
                            number,
                            "the numbers or the sum differ: the file was changed or is damaged",
                        ));
                    }
                    if header.run.seq != history.len() as u64 {
                        return Err(invalid(number, "rows of the history are missing"));
                    }
                    if lines.next()?.is_some() {
                        return Err(invalid(lines.number, "something follows the `end`"));
                    }
                    return Ok(Self { header, definition, definitions, history, checkpoints });
                }
            }
            writer.digest.update(line.as_bytes());
        }
    }

    /// Rows up to here were another run's, by the history: the last `run_forked` is the run's own.
    pub(crate) fn forked_seq(&self) -> u64 {
        let forks = |row: &&HistoryRow| row.events.iter().any(|e| e["type"] == "run_forked");
        self.history.iter().rev().find(forks).map_or(0, |row| row.seq.saturating_sub(1))
    }

    /// The definition under which its own history begins.
    fn first(&self) -> &Definition {
        let first = self.header.former.first().and_then(|former| self.definitions.get(&former.definition.hash));
        first.unwrap_or(&self.definition)
    }

    /// Decides the history again, under its own definitions or another.
    ///
    /// # Errors
    /// `archive_invalid` if the history cannot be folded.
    pub fn replay(&self, definition: Option<&Definition>) -> Result<Replayed> {
        let run = &self.header.run;
        let mut replay = match definition {
            Some(other) => Replay::new(other, run.run_id, run.depth, self.forked_seq()),
            None => Replay::new(self.first(), run.run_id, run.depth, self.forked_seq()).migrating(&self.definitions),
        };
        for (row, line) in self.history.iter().zip(2..) {
            // What cannot be read as an event is the replay's to say.
            let told = row.events.iter().filter_map(|e| serde_json::from_value(e.clone()).ok());
            instants::sane(told.flat_map(|event| instants::of(&event)).chain([row.at]))
                .map_err(|why| Error::ArchiveInvalid { line, why })?;
            match replay.row(row) {
                Ok(true) => {}
                Ok(false) => break,
                Err(why) => return Err(Error::ArchiveInvalid { line, why: why.0 }),
            }
        }
        Ok(replay.done())
    }
}

fn header(line: &str) -> std::result::Result<Header, String> {
    let value: Value = serde_json::from_str(line).map_err(|_| "not an exported run".to_owned())?;
    let Some(header) = value.get("header") else { return Err("not an exported run".into()) };
    match header.get("format").and_then(Value::as_u64) {
        Some(format) if format > u64::from(FORMAT) => Err(format!(
            "format {format}, this program knows up to {FORMAT}: use the release that wrote it, or a newer one"
        )),
        Some(_) => serde_json::from_value(header.clone()).map_err(|e| format!("the header is damaged: {e}")),
        None => Err("not an exported run".into()),
    }
}

fn compiled(deployed: &Deployed) -> std::result::Result<Definition, String> {
    let definition: Definition =
        serde_json::from_value(deployed.ir.clone()).map_err(|e| format!("the definition cannot be read: {e}"))?;
    if definition.format > crate::definition::FORMAT {
        return Err(format!("the definition has format {}: use a newer release", definition.format));
    }
    if definition.hash(&deployed.bundle) != deployed.hash {
        return Err("the definition is not the one that its hash names".into());
    }
    Ok(definition)
}

/// Lines with their ends, within the limits.
struct Lines<R> {
    input: R,
    number: u64,
    bytes: u64,
}

impl<R: BufRead> Lines<R> {
    fn next(&mut self) -> Result<Option<String>> {
        self.number += 1;
        let mut line = Vec::new();
        let unreadable =
            |e: std::io::Error| Error::ArchiveInvalid { line: self.number, why: format!("cannot be read: {e}") };
        let most = LINE_BYTES_MAX.min(BYTES_MAX.saturating_sub(self.bytes)) + 1;
        std::io::Read::take(&mut self.input, most).read_until(b'\n', &mut line).map_err(unreadable)?;
        let length = line.len() as u64;
        self.bytes += length;
        let too_large = |what, limit: u64| {
            let size = |n: u64| usize::try_from(n).unwrap_or(usize::MAX);
            Error::TooLarge { what, actual: size(limit + 1), limit: size(limit) }
        };
        if self.bytes > BYTES_MAX {
            return Err(too_large("the archive", BYTES_MAX));
        }
        if length > LINE_BYTES_MAX {
            return Err(too_large("a line of the archive", LINE_BYTES_MAX));
        }
        if line.is_empty() {
            return Ok(None);
        }
        String::from_utf8(line)
            .map(Some)
            .map_err(|_| Error::ArchiveInvalid { line: self.number, why: "not text".into() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn lines() -> Vec<String> {
        let definition = Definition {
            format: crate::definition::FORMAT,
            name: "small".into(),
            inputs: BTreeMap::new(),
            env: BTreeMap::new(),
            timeout_ms: 1_000,
            budget: Value::Null,
            concurrency: None,
            executions_max: 10,
            steps: vec![],
            finally: vec![],
            outputs: BTreeMap::new(),
            runs_on: Vec::new(),
            queries: BTreeMap::new(),
            extras: Value::Null,
        };
        let now: DateTime<Utc> = "2026-11-25T12:00:00Z".parse().expect("instant");
        let bundle = Bundle::new();
        let header = Header {
            format: FORMAT,
            exported_at: now,
            definition: Deployed {
                hash: definition.hash(&bundle),
                name: "small".into(),
                version: 1,
                source: "name: small\n".into(),
                bundle,
                ir: serde_json::to_value(&definition).expect("json"),
                author: None,
                message: None,
            },
            former: Vec::new(),
            run: Run {
                run_id: RunId::new(),
                workflow: "small".into(),
                workflow_id: None,
                status: RunStatus::Completed,
                seq: 1,
                queue: "default".into(),
                attributes: json!({}),
                inputs: json!({}),
                output: Some(json!({})),
                failure: None,
                depth: 0,
                parent: None,
                forked_seq: 0,
                chain: Chain::default(),
                started_at: now,
                closed_at: Some(now),
            },
        };
        let events = json!([
            {"type": "run_started", "inputs": {}, "env": {}, "at": now, "deadline": now + chrono::Duration::seconds(1)},
            {"type": "run_ending", "ending": {"kind": "completed", "output": {}}, "at": now},
            {"type": "run_closed", "status": "completed", "output": {}, "at": now},
        ]);
        let row = HistoryRow { seq: 1, epoch: 1, format: 1, events: events.as_array().expect("list").clone(), at: now };
        let checkpoint = Checkpoint { path: "a".into(), key: "k".into(), value: json!("ä"), created_at: now };
        let mut writer = Writer::default();
        let mut out = Vec::new();
        for record in [Record::Header(Box::new(header)), Record::History(row), Record::Checkpoint(checkpoint)] {
            out.push(writer.line(&record).expect("line"));
        }
        out.push(writer.line(&writer.end()).expect("line"));
        out
    }

    fn read(lines: &[String]) -> Result<Archive> {
        Archive::read(lines.concat().as_bytes())
    }

    #[test]
    fn what_was_written_is_read_and_replays() {
        let archive = read(&lines()).expect("valid");
        assert_eq!((archive.history.len(), archive.checkpoints.len()), (1, 1));
        let replayed = archive.replay(None).expect("folds");
        assert_eq!((replayed.divergence, replayed.decided), (None, 1));
        let mut other = archive.definition.clone();
        other.timeout_ms = 5;
        assert!(archive.replay(Some(&other)).expect("folds").divergence.is_some());
    }

    #[test]
    fn what_is_damaged_is_refused_with_its_line() {
        let good = lines();
        let because = |lines: &[String], line: u64, what: &str| match read(lines) {
            Err(Error::ArchiveInvalid { line: at, why }) => {
                assert!(at == line && why.contains(what), "line {at}: {why}");
            }
            other => panic!("{what}: {other:?}"),
        };
        because(&[], 1, "empty");
        because(&["hello\n".into()], 1, "not an exported run");
        because(&["{\"header\": 5}\n".into()], 1, "not an exported run");
        because(&[good[0].replace("\"format\":1,\"exported_at\"", "\"format\":9,\"exported_at\"")], 1, "format 9");
        because(&[good[0].replace("\"queue\"", "\"kew\"")], 1, "damaged");
        because(&[good[0].replace("\"timeout_ms\":1000", "\"timeout_ms\":2000")], 1, "hash");
        because(&good[..2], 3, "cut off");
        because(&[good[0].clone(), good[2].clone(), good[1].clone()], 3, "out of order");
        because(&[good[0].clone(), good[1].clone(), good[1].clone()], 3, "out of order");
        because(&[good[0].clone(), good[0].clone()], 2, "second header");
        because(&[good[0].clone(), good[2].clone(), good[3].clone()], 3, "the numbers or the sum differ");
        let changed = good[1].replace("\"epoch\":1", "\"epoch\":2");
        because(&[good[0].clone(), changed, good[2].clone(), good[3].clone()], 4, "the numbers or the sum differ");
        because(&[good.concat(), "{}\n".into()], 5, "follows");
        because(&[good[0].clone(), "{\"history\": {}}\n".into()], 2, "no record");
        let cut = good.concat();
        for at in (1..cut.len() - 1).step_by(97) {
            if let Some(part) = cut.get(..at) {
                assert_eq!(Archive::read(part.as_bytes()).expect_err("cut").code(), "archive_invalid", "{at}");
            }
        }
        assert!(matches!(Archive::read(&b"\xff\xfe\n"[..]), Err(Error::ArchiveInvalid { line: 1, .. })));
    }

    #[test]
    fn a_line_without_end_is_not_read_to_its_end() {
        struct Endless;
        impl std::io::Read for Endless {
            fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
                buf.fill(b'x');
                Ok(buf.len())
            }
        }
        let endless = std::io::BufReader::with_capacity(1 << 20, Endless);
        assert_eq!(Archive::read(endless).expect_err("endless").code(), "too_large");
    }
}
