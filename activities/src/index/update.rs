//! Bringing an index up to date with a folder: only what changed is read and parsed, and one commit shows all of it.

use super::{
    IndexError, UpdateReport,
    catalog::Record,
    extract::{self, Extracted},
    kind::PathKind,
    lang::Lang,
    store::{Change, Lines, Loaded},
    unit,
    walk::{self, Content, Seen, Walked},
};
use sha2::{Digest as _, Sha256};
use std::{
    collections::HashSet,
    path::Path,
    sync::{Mutex, PoisonError, RwLock, mpsc},
    time::SystemTime,
};

/// Threads that read and parse. More than four would wait for the writer.
const THREADS_MAX: usize = 4;
/// Parsed files that wait for the writer, so that memory holds a few files and not a project.
const WAITING_MAX: usize = 32;
/// Files that a report names as skipped; a folder of images is no news.
const SKIPPED_MAX: usize = 1000;

/// Does one update; the caller sees to it that there is no other in this process.
///
/// # Errors
/// `index.disk`: the folder cannot be read; nothing has changed then. `index.busy`. `index.full_text`.
pub(super) fn bring(loaded: &RwLock<Loaded>, root: &Path, walked: &Walked) -> Result<UpdateReport, IndexError> {
    let mut report = UpdateReport { files: walked.files.len(), ..UpdateReport::default() };
    let now = SystemTime::now();
    let (candidates, removed) = differences(&read(loaded), walked, now);

    let mut outcome = Outcome::default();
    if !candidates.is_empty() || !removed.is_empty() {
        outcome = extract_all(&read(loaded), root, &candidates, removed)?;
    }
    report.changed = outcome.changed;
    report.added = outcome.records.len() - outcome.changed;
    report.removed = outcome.removed.len();
    {
        let mut loaded = loaded.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(generation) = outcome.generation {
            loaded.follow(generation)?;
        }
        for path in &outcome.removed {
            loaded.catalog.remove(path);
        }
        for record in outcome.records {
            loaded.catalog.insert(record);
        }
        for seen in outcome.touched {
            if let Some(record) = loaded.catalog.files.get_mut(seen.path.as_str()) {
                record.stamp = seen.stamp;
            }
        }
        report.files = loaded.catalog.files.len();
        report.skipped = skipped(&loaded, walked);
    }
    Ok(report)
}

/// The files to look into, and the paths that are gone.
fn differences(loaded: &Loaded, walked: &Walked, now: SystemTime) -> (Vec<Seen>, Vec<String>) {
    let mut candidates = Vec::new();
    let mut here = HashSet::with_capacity(walked.files.len());
    for seen in &walked.files {
        here.insert(seen.path.as_str());
        let unchanged = loaded.catalog.files.get(seen.path.as_str()).is_some_and(|record| {
            record.stamp == seen.stamp && record.beyond == seen.beyond && !seen.stamp.is_unsettled(now)
        });
        if !unchanged {
            candidates.push(seen.clone());
        }
    }
    let removed =
        loaded.catalog.files.keys().filter(|path| !here.contains(&***path)).map(|path| path.to_string()).collect();
    (candidates, removed)
}

#[derive(Default)]
struct Outcome {
    records: Vec<Record>,
    changed: usize,
    removed: Vec<String>,
    /// Files with another stamp and the same content.
    touched: Vec<Seen>,
    /// The mark of the commit, if there was anything to commit.
    generation: Option<String>,
}

enum Looked {
    Same(Seen),
    Gone(Seen),
    New(Box<Record>, String),
}

fn extract_all(loaded: &Loaded, root: &Path, candidates: &[Seen], removed: Vec<String>) -> Result<Outcome, IndexError> {
    let mut outcome = Outcome::default();
    let mut change: Option<Change> = None;
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(THREADS_MAX).min(candidates.len());
    let queue = Mutex::new(candidates.iter());
    let mut last_id = loaded.catalog.last_id();
    let known = |path: &str| loaded.catalog.files.get(path);

    let mut gone = removed;
    std::thread::scope(|scope| -> Result<(), IndexError> {
        let (sender, receiver) = mpsc::sync_channel(WAITING_MAX);
        for _ in 0..threads {
            let (sender, queue) = (sender.clone(), &queue);
            scope.spawn(move || {
                loop {
                    let next = queue.lock().unwrap_or_else(PoisonError::into_inner).next();
                    let Some(seen) = next else { break };
                    // The receiver is gone after an error: the rest is not wanted.
                    if sender.send(look(root, seen, known(&seen.path))).is_err() {
                        break;
                    }
                }
            });
        }
        drop(sender);
        for looked in receiver {
            match looked {
                Looked::Same(seen) => outcome.touched.push(seen),
                Looked::Gone(seen) => {
                    if known(&seen.path).is_some() {
                        gone.push(seen.path);
                    }
                }
                Looked::New(mut record, text) => {
                    last_id += 1;
                    record.id = last_id;
                    let change = match &mut change {
                        Some(change) => change,
                        none => none.insert(loaded.change(candidates.len())?),
                    };
                    if let Some(old) = known(&record.path) {
                        change.remove(old.id);
                        outcome.changed += 1;
                    }
                    change.add(&record, &text)?;
                    outcome.records.push(*record);
                }
            }
        }
        Ok(())
    })?;
    for path in gone {
        let Some(old) = known(&path) else { continue };
        let change = match &mut change {
            Some(change) => change,
            none => none.insert(loaded.change(0)?),
        };
        change.remove(old.id);
        outcome.removed.push(path);
    }
    outcome.generation = change.map(Change::commit).transpose()?;
    Ok(outcome)
}

/// Reads a file and, if it is another than the one that is known, takes it apart.
fn look(root: &Path, seen: &Seen, known: Option<&Record>) -> Looked {
    let content = walk::read(root, seen);
    let mark = match &content {
        Content::Gone => return Looked::Gone(seen.clone()),
        Content::PathOnly(why) => (*why).to_owned(),
        Content::Text(text) => Sha256::digest(text.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect(),
    };
    if known.is_some_and(|known| known.content == mark && known.beyond == seen.beyond) {
        return Looked::Same(seen.clone());
    }
    let mut record = Record {
        id: 0,
        path: seen.path.clone(),
        stamp: seen.stamp.clone(),
        beyond: seen.beyond,
        content: mark,
        skipped: None,
        lang: None,
        kind: PathKind::of(&seen.path, ""),
        lines: 0,
        defs: Vec::new(),
        units: Vec::new(),
        uses: Vec::new(),
    };
    let text = match content {
        Content::Text(text) => text,
        Content::PathOnly(why) => {
            record.skipped = Some(why.to_owned());
            return Looked::New(Box::new(record), String::new());
        }
        Content::Gone => return Looked::Gone(seen.clone()),
    };
    record.kind = PathKind::of(&seen.path, &text);
    record.lang = Lang::of(&seen.path, &text);
    record.lines = Lines::of(&text).count();
    if let Some(lang) = record.lang {
        let Extracted { defs, unread } = extract::extract(lang, &text);
        record.defs = defs;
        record.skipped = unread.map(str::to_owned);
        if lang.is_code() {
            record.uses = extract::uses(&text);
        }
    }
    record.units = unit::units(record.lang, &record.defs, &text);
    Looked::New(Box::new(record), text)
}

fn skipped(loaded: &Loaded, walked: &Walked) -> Vec<(String, String)> {
    let known = loaded.catalog.files.values().filter_map(|record| Some((record.path.clone(), record.skipped.clone()?)));
    let mut all: Vec<(String, String)> = walked.left_out.iter().cloned().chain(known).collect();
    if all.len() > SKIPPED_MAX {
        let more = all.len() - SKIPPED_MAX;
        all.truncate(SKIPPED_MAX);
        all.push((".".to_owned(), format!("{more} more")));
    }
    all
}

fn read(loaded: &RwLock<Loaded>) -> std::sync::RwLockReadGuard<'_, Loaded> {
    loaded.read().unwrap_or_else(PoisonError::into_inner)
}
