//! `loopwright index`: the code index over a folder, as agents use it. Needs no database.

use super::{Context, failure::refuse, print, table};
use crate::config::Config;
use anyhow::Context as _;
use loopwright_activities::index::{Hit, Index, Packed, Symbol, UpdateReport};
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};

/// Folder of indexes in the data folder.
const FOLDER: &str = "index";
/// Most results that are asked for.
const RESULTS_MAX: u64 = 200;
/// Largest budget of a map or a pack. Chosen, not measured: above it a model's context is the limit.
const TOKENS_MAX: u64 = 1_000_000;
/// Files that were skipped, as far as they are listed on a terminal.
const SKIPPED_SHOWN: usize = 20;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

/// Every command brings the index up to date first: a stale one would name wrong lines.
#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Bring the index of a folder up to date
    Build { dir: PathBuf },
    /// Find places by words and names
    Search {
        dir: PathBuf,
        query: String,
        #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=RESULTS_MAX))]
        limit: u64,
    },
    /// Find definitions by name
    Symbols {
        dir: PathBuf,
        name: String,
        #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..=RESULTS_MAX))]
        limit: u64,
    },
    /// Print the most important files and definitions
    Map {
        dir: PathBuf,
        /// Largest size
        #[arg(long, value_name = "N", default_value_t = 1500, value_parser = clap::value_parser!(u64).range(1..=TOKENS_MAX))]
        tokens: u64,
    },
    /// Print the code that a model would be given for a query
    Pack {
        dir: PathBuf,
        query: String,
        /// Largest size
        #[arg(long, value_name = "N", default_value_t = 4500, value_parser = clap::value_parser!(u64).range(1..=TOKENS_MAX))]
        tokens: u64,
    },
}

impl Command {
    fn dir(&self) -> &Path {
        match self {
            Self::Build { dir }
            | Self::Search { dir, .. }
            | Self::Symbols { dir, .. }
            | Self::Map { dir, .. }
            | Self::Pack { dir, .. } => dir,
        }
    }
}

pub(crate) async fn run(args: Args, context: Context) -> anyhow::Result<()> {
    // Reading and parsing a folder blocks.
    tokio::task::spawn_blocking(move || act(args.command, &context)).await?
}

fn act(command: Command, context: &Context) -> anyhow::Result<()> {
    let json = context.json;
    let dir = command.dir();
    let root = dir.canonicalize().with_context(|| format!("{} cannot be read", dir.display()))?;
    if !root.is_dir() {
        return Err(refuse("file_failed", format!("{} is not a folder; name a folder", root.display())));
    }
    let index = Index::open(&folder(&context.config, &root))?;
    let report = index.update(&root)?;
    let count = |n: u64| usize::try_from(n).unwrap_or(usize::MAX);
    match command {
        Command::Build { .. } => print(json, &report, built),
        Command::Search { query, limit, .. } => print(json, &index.search(&query, count(limit))?, |hits| found(hits)),
        Command::Symbols { name, limit, .. } => print(json, &index.symbols(&name, count(limit))?, |list| {
            let row = |s: &Symbol| {
                let name = s.parent.as_ref().map_or_else(|| s.name.clone(), |parent| format!("{parent}.{}", s.name));
                vec![s.kind.clone(), name, place(&s.path, s.start_line, s.end_line), s.signature.clone()]
            };
            table(&["kind", "name", "place", "signature"], &list.iter().map(row).collect::<Vec<_>>())
        }),
        Command::Map { tokens, .. } => {
            let map = index.map(count(tokens))?;
            print(json, &serde_json::json!({ "map": map }), |_| map.clone())
        }
        Command::Pack { query, tokens, .. } => print(json, &index.pack(&query, count(tokens))?, |pack| {
            let omitted = |p: &Packed| format!("omitted: {}\n", place(&p.path, p.start_line, p.end_line));
            pack.text.trim_end().to_owned() + "\n\n" + &pack.omitted.iter().map(omitted).collect::<String>()
        }),
    }
}

/// Where the index of a folder is kept: by the hash of its absolute path, so that two folders never share one.
fn folder(config: &Config, root: &Path) -> PathBuf {
    let hash = Sha256::digest(root.as_os_str().as_encoded_bytes());
    let name: String = hash.iter().take(16).map(|byte| format!("{byte:02x}")).collect();
    config.data_dir.join(FOLDER).join(name)
}

fn built(report: &UpdateReport) -> String {
    let UpdateReport { files, added, changed, removed, skipped } = report;
    let mut out = format!("{files} files: {added} added, {changed} changed, {removed} removed\n");
    for (path, why) in skipped.iter().take(SKIPPED_SHOWN) {
        out.push_str(&format!("by path only: {path} ({why})\n"));
    }
    if skipped.len() > SKIPPED_SHOWN {
        out.push_str(&format!("… and {} more\n", skipped.len() - SKIPPED_SHOWN));
    }
    out
}

fn found(hits: &[Hit]) -> String {
    let hit = |hit: &Hit| {
        let symbol = hit.symbol.as_ref().map(|s| format!(" {s}")).unwrap_or_default();
        let place = place(&hit.path, hit.start_line, hit.end_line);
        let snippet: String = hit.snippet.lines().map(|line| format!("    {line}\n")).collect();
        format!("{place}{symbol} ({})\n{snippet}", hit.why)
    };
    if hits.is_empty() { "Nothing was found.".to_owned() } else { hits.iter().map(hit).collect() }
}

fn place(path: &str, start: u32, end: u32) -> String {
    format!("{path}:{start}-{end}")
}
