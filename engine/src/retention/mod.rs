//! Runs that ended long ago leave the database for a file, from which they can be imported again. See "Retention" in the README.
//!
//! ```text
//! old runs of a month ─judge─▶ export each ─▶ file.part ─fsync, rename─▶ ONE TRANSACTION: judge again · record · delete
//!                                                                        └─ nothing left of the month ─▶ detach · move · drop
//! ```
//!
//! Does not decide who may leave: that is one statement, `store::retention::JUDGE`.

pub(crate) mod file;

pub use crate::view::Recorded;
use crate::{
    Error, Result,
    archive::BYTES_MAX,
    client::Client,
    committer::crash_point,
    ids::RunId,
    store::{
        self,
        partitions::{self, Dropped},
        retention::{Old, Turn},
    },
};
use chrono::{DateTime, Utc};
use file::{Reader, Title, Writer};
use serde::Serialize;
use std::{
    path::{Path, PathBuf},
    time::Duration,
};

/// Shortest time that surfaces accept for [`Policy::keep`]. Chosen: what comes late (readings, answers that were not seen, somebody who
/// wants to look) comes within a day.
pub const KEEP_MIN: Duration = Duration::from_secs(86_400);
/// Runs of one file, and those that leave with them. Chosen: their rows go in one transaction of a second or two.
const RUNS_MAX: usize = 1_000;

/// Who is retired, and where to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// How long a run stays after its end, at least: up to a month longer.
    pub keep: Duration,
    /// Folder of the archives. Made if it is not there.
    pub archive: PathBuf,
}

/// What a turn came to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Somebody else retires runs now; nothing was done.
    pub busy: bool,
    /// Runs that left; in a trial, those that would.
    pub runs: u64,
    /// Runs that stay because what is stored of them could not be imported again; the log says why.
    pub unfit: u64,
    /// Names of the files.
    pub archives: Vec<String>,
    /// Partitions that are gone; in a trial, those that could be.
    pub dropped: Vec<String>,
    /// Partitions of months that are over and that many runs which stay have rows in.
    pub needed: Vec<String>,
}

/// What an import came to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Imported {
    pub runs: Vec<RunId>,
    /// Those that were there already.
    pub there: u64,
}

/// Makes the partitions of the month of `at` and the next two that are not there. Returns how many it made.
///
/// # Errors
/// `database`.
pub async fn prepare(client: &Client, at: DateTime<Utc>) -> Result<u32> {
    partitions::ahead(client.pool(), at).await
}

/// Retires the runs of months that are over and that nothing keeps, and drops the partitions that are left without any. Those
/// whose ids lie in no partition are retired as well.
///
/// # Errors
/// `archive_unwritable`: whoever was not recorded before stays. `database`.
/// # Transaction
/// One for each file: record, delete. Before it, the file is whole and in its place. Dying anywhere leaves a run in the database, or
/// recorded in a file; a file that is not recorded is a leftover.
pub async fn run(client: &Client, policy: &Policy) -> Result<Report> {
    turn(client, policy.keep, Some(&policy.archive)).await
}

/// What [`run`] would do. Reads only.
///
/// # Errors
/// `database`.
pub async fn plan(client: &Client, keep: Duration) -> Result<Report> {
    turn(client, keep, None).await
}

async fn turn(client: &Client, keep: Duration, folder: Option<&Path>) -> Result<Report> {
    let Some(turn) = Turn::claim(client.pool()).await? else { return Ok(Report { busy: true, ..Report::default() }) };
    let report = retire_all(client, keep, folder).await;
    turn.end().await;
    report
}

async fn retire_all(client: &Client, keep: Duration, folder: Option<&Path>) -> Result<Report> {
    let mut report = Report::default();
    let mut conn = client.pool().acquire().await?;
    let now = store::runs::now(&mut conn).await?;
    let keep = chrono::Duration::from_std(keep).ok();
    let Some(before) = keep.and_then(|keep| now.checked_sub_signed(keep)) else { return Ok(report) };
    let periods = store::retention::periods(&mut conn, before).await?;
    drop(conn);
    let mut planned = std::collections::BTreeSet::new();
    let mut families = store::retention::Families::new();
    for (ids, partition) in periods {
        let mut old = Old::new(ids, before);
        loop {
            let mut conn = client.pool().acquire().await?;
            let asked = old.next(&mut conn, RUNS_MAX).await?;
            let last = asked.len() < RUNS_MAX;
            let leaving = families.judge(&mut conn, asked, before).await?;
            drop(conn);
            match folder {
                Some(folder) if !leaving.is_empty() => {
                    match archive(client, folder, &leaving, before, &mut report).await {
                        // What is too slow for one transaction stays, and the others leave.
                        Err(Error::Sql(error)) if store::is_transient(&error) => {
                            tracing::warn!(runs = leaving.len(), %error, "runs could not leave now; the next look tries again");
                            report.unfit += leaving.len() as u64;
                        }
                        done => done?,
                    }
                }
                Some(_) => {}
                None => planned.extend(leaving),
            }
            if last {
                break;
            }
        }
        match (partition, folder) {
            (Some(partition), Some(_)) => match partitions::drop(client.pool(), &partition).await? {
                Dropped::Yes { moved } => {
                    tracing::info!(partition = partition.name, moved, "a partition of history is gone");
                    report.dropped.push(partition.name);
                }
                Dropped::Needed => report.needed.push(partition.name),
                Dropped::NotNow => {}
            },
            (Some(partition), None) => report.dropped.push(partition.name),
            (None, _) => {}
        }
    }
    if folder.is_none() {
        report.runs = planned.len() as u64;
    }
    Ok(report)
}

/// Writes runs into a file and lets them leave.
async fn archive(
    client: &Client,
    folder: &Path,
    leaving: &[RunId],
    before: DateTime<Utc>,
    report: &mut Report,
) -> Result<()> {
    let made_at = store::runs::now(&mut *client.pool().acquire().await?).await?;
    let title = Title { format: file::FORMAT, id: uuid::Uuid::now_v7(), closed_before: before, made_at };
    let folder = folder.to_owned();
    let at = folder.clone();
    let mut writer = aside(move || Writer::create(&at, &title)).await?;
    let mut written = Vec::new();
    for run in leaving {
        let text = match exported(client, *run).await {
            Ok(text) => text,
            // Somebody was faster.
            Err(Error::RunNotFound(_) | Error::RunArchived { .. }) => continue,
            Err(error @ (Error::Sql(_) | Error::ArchiveUnwritable(_))) => return Err(error),
            // Whatever is wrong with one run, the others leave.
            Err(error) => {
                unfit(*run, &error, report);
                continue;
            }
        };
        // What leaves must be able to come back, so it is read as an import would.
        let (back, result) = aside(move || {
            let result = file::fit(&text).map(drop);
            if result.is_ok() {
                writer.add(&text)?;
            }
            Ok((writer, result))
        })
        .await?;
        writer = back;
        match result {
            Ok(()) => written.push(*run),
            Err(error) => unfit(*run, &error, report),
        }
    }
    if written.is_empty() {
        return Ok(());
    }
    crash_point("retire.before_file");
    let made = aside(move || writer.finish()).await?;
    crash_point("retire.after_file");
    let left = match store::retention::retire(client.pool(), &made, &written, before).await {
        // All of them are kept since, or somebody else's file has them.
        Ok(0) => {
            discard(&folder.join(&made.name));
            return Ok(());
        }
        Ok(left) => left,
        Err(error) => {
            // If nobody knows, the file may be the only place of its runs.
            if store::retention::is_undone(&error) {
                discard(&folder.join(&made.name));
            }
            return Err(error);
        }
    };
    crash_point("retire.after_commit");
    metrics::counter!("loopwright_runs_retired_total").increment(left as u64);
    tracing::info!(file = made.name, runs = left, "runs were retired");
    report.runs += left as u64;
    report.archives.push(made.name);
    Ok(())
}

/// Removes a file whose runs are all in the database.
fn discard(path: &Path) {
    if let Err(error) = std::fs::remove_file(path) {
        tracing::warn!(file = %path.display(), %error, "a file of runs that are still here cannot be removed");
    }
}

fn unfit(run: RunId, why: &Error, report: &mut Report) {
    tracing::warn!(run_id = %run, %why, "a run stays: what is stored of it cannot be read, or could not be imported again");
    report.unfit += 1;
}

async fn exported(client: &Client, run: RunId) -> Result<String> {
    let (mut export, mut text) = (client.export(run).await?, String::new());
    while let Some(line) = export.next().await? {
        if (text.len() + line.len()) as u64 > BYTES_MAX {
            let limit = usize::try_from(BYTES_MAX).unwrap_or(usize::MAX);
            return Err(Error::TooLarge { what: "the archive", actual: text.len() + line.len(), limit });
        }
        text.push_str(&line);
    }
    Ok(text)
}

/// Runs what blocks, on a disk or by compressing.
async fn aside<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(|e| Error::Invariant(format!("an archive: {e}")))?
}

/// The newest archives.
///
/// # Errors
/// `database`.
pub async fn archives(client: &Client, limit: u32) -> Result<Vec<Recorded>> {
    store::retention::archives(client.pool(), limit.clamp(1, 1_000)).await
}

/// Imports the runs of an archive, or one of them, as [`Client::import`] does: they can be read and forked. The whole file is
/// verified before the first; if this database has recorded it, by that sum as well.
///
/// # Errors
/// `archive_invalid`; `run_not_found` if `only` is not in it, `run_exists` if that is there; those of [`Client::import`].
/// # Transaction
/// One a run. Doing it again goes on where it ended.
pub async fn import(client: &Client, path: &Path, only: Option<RunId>) -> Result<Imported> {
    let (name, at) = (path.file_name().unwrap_or_default().to_string_lossy().into_owned(), path.to_owned());
    let recorded = store::retention::recorded(client.pool(), &name).await?;
    let mut reader = aside(move || {
        if recorded.is_some_and(|sum| file::sum(&at).map_or(true, |found| sum != found)) {
            let why = "its sum is not the one that was recorded: the file was changed or is damaged";
            return Err(Error::ArchiveInvalid { line: 0, why: why.into() });
        }
        let (mut whole, _) = Reader::open(&at)?;
        while whole.next()?.is_some() {}
        Ok(Reader::open(&at)?.0)
    })
    .await?;
    let mut imported = Imported::default();
    loop {
        let (back, next) = aside(move || {
            let next = match reader.next()? {
                Some(text) => Some(file::fit(&text)?),
                None => None,
            };
            Ok((reader, next))
        })
        .await?;
        reader = back;
        let Some(next) = next else { break };
        let run = next.header.run.run_id;
        if only.is_some_and(|only| only != run) {
            continue;
        }
        match client.import(next).await {
            Ok(run) => imported.runs.push(run),
            Err(Error::RunExists(_)) if only.is_none() => imported.there += 1,
            Err(error) => return Err(error),
        }
    }
    match only {
        Some(run) if imported.runs.is_empty() => Err(Error::RunNotFound(run.to_string())),
        _ => Ok(imported),
    }
}
