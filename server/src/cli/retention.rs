//! `loopwright retention`: runs that ended long ago, out of the database into files and back. Workers do the first by themselves if
//! the configuration says `retention`.

use super::{Context, print, table};
use crate::{app::App, config};
use loopwright_engine::{
    ids::RunId,
    retention::{self, Imported, Policy, Recorded, Report},
};
use std::{path::PathBuf, time::Duration};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Write what is old into archives and delete it
    Run {
        /// How long runs stay after their end [default: retention.keep of the configuration]
        #[arg(long, value_name = "DURATION", value_parser = config::keep_of)]
        keep: Option<Duration>,
        /// Folder of the archives [default: retention.archive of the configuration]
        #[arg(long, value_name = "DIR")]
        archive: Option<PathBuf>,
        /// Say what would leave; write and delete nothing
        #[arg(long)]
        dry_run: bool,
    },
    /// List archives, newest first
    List {
        #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=1000))]
        limit: u32,
    },
    /// Verify an archive and read its runs back, to be looked at and forked
    Import {
        file: PathBuf,
        /// This one only
        #[arg(long)]
        run: Option<RunId>,
    },
}

pub(crate) async fn run(args: Args, context: Context) -> anyhow::Result<()> {
    let json = context.json;
    let app = context.open().await?;
    let done = act(args.command, &app, json).await;
    app.close().await;
    done
}

async fn act(command: Command, app: &App, json: bool) -> anyhow::Result<()> {
    let configured = app.config.retention.as_ref();
    match command {
        Command::Run { keep, archive, dry_run } => {
            let keep = keep
                .or(configured.map(|policy| policy.keep))
                .ok_or_else(|| missing("keep", "say how long runs stay, for example --keep 90d"))?;
            if dry_run {
                return print(json, &retention::plan(&app.client, keep).await?, planned);
            }
            let archive = archive
                .or(configured.map(|policy| policy.archive.clone()))
                .ok_or_else(|| missing("archive", "name the folder: --archive DIR"))?;
            // Where workers may not change tables, this is who makes the months to come.
            retention::prepare(&app.client, chrono::Utc::now()).await?;
            let report = retention::run(&app.client, &Policy { keep, archive }).await?;
            print(json, &report, done)
        }
        Command::List { limit } => print(json, &retention::archives(&app.client, limit).await?, |archives| {
            table(&["file", "runs", "bytes", "closed before", "sha256"], &archives.iter().map(row).collect::<Vec<_>>())
        }),
        Command::Import { file, run } => {
            let imported = retention::import(&app.client, &file, run).await?;
            print(json, &imported, |Imported { runs, there }| {
                let there = if *there > 0 { format!(" {there} were there already.") } else { String::new() };
                format!("{} runs can be read here; they are never executed.{there}", runs.len())
            })
        }
    }
}

/// Nothing is kept for a time, or put into a folder, that nobody has named.
fn missing(key: &str, what: &str) -> config::Error {
    config::Error::value(format!("retention.{key}"), format!("is not configured; {what}"))
}

const BUSY: &str = "Somebody else retires runs now; nothing was done.";

fn planned(report: &Report) -> String {
    if report.busy {
        return BUSY.into();
    }
    format!("{} runs would leave. Months that are over: {}.", report.runs, names(&report.dropped))
}

fn done(report: &Report) -> String {
    if report.busy {
        return BUSY.into();
    }
    let mut out = format!(
        "{} runs left. Archives: {}. Partitions dropped: {}.",
        report.runs,
        names(&report.archives),
        names(&report.dropped)
    );
    if !report.needed.is_empty() {
        out.push_str(&format!(" Still needed by many runs: {}.", names(&report.needed)));
    }
    if report.unfit > 0 {
        out.push_str(&format!(
            " {} runs stay because they could not be imported again; the log says why.",
            report.unfit
        ));
    }
    out
}

fn names(names: &[String]) -> String {
    if names.is_empty() { "none".into() } else { names.join(", ") }
}

fn row(archive: &Recorded) -> Vec<String> {
    vec![
        archive.file.clone(),
        archive.runs.to_string(),
        archive.bytes.to_string(),
        archive.closed_before.format("%F").to_string(),
        archive.sha256.clone(),
    ]
}
