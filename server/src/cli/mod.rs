//! The command line: one file per command, each with its arguments and a `run`.
//!
//! # Exit codes
//! 0 done; 1 it could not be done, or a check found something; 2 wrong usage or configuration; 3 the machine lacks
//! something (database, port, folder, git, sandbox); 130 interrupted.

mod api_keys;
mod bench;
mod chaos;
mod completion;
mod credits;
mod demo;
mod dev;
mod doctor;
mod failure;
mod index;
mod keys;
mod migrate;
mod pricing;
mod project;
mod retention;
mod run;
mod schedule;
mod server;
mod token;
mod worker;
mod workflow;

use crate::{
    app::App,
    config::{Config, Flags},
    postgres, telemetry,
};
use clap::{Parser, Subcommand};
use serde::Serialize;

/// It could not be done, or a check found something.
pub const EXIT_FAILED: u8 = 1;
/// Wrong usage or configuration.
pub const EXIT_USAGE: u8 = 2;
/// The machine lacks something.
pub const EXIT_MACHINE: u8 = 3;
pub use crate::app::EXIT_INTERRUPTED;
pub use failure::usage;

/// From an idea to a working repository, durably.
#[derive(Debug, Parser)]
#[command(name = "loopwright", version, propagate_version = true, max_term_width = 110)]
pub struct Cli {
    #[command(flatten)]
    flags: Flags,
    /// Print JSON
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

/// Every command; one file and one line here each.
#[derive(Debug, Subcommand)]
enum Command {
    /// Watch the whole loop build a sample, or your idea
    Demo(demo::Args),
    /// Postgres, server and worker in one process, for every day
    Dev(dev::Args),
    /// Serve REST
    Server(server::Args),
    /// Work on runs
    Worker(worker::Args),
    /// Bring the database to the schema of this program
    Migrate(migrate::Args),
    /// Check what this machine has and say what to do
    Doctor(doctor::Args),
    /// Mint a token for development
    Token(token::Args),
    /// Look at runs and act on them
    Run(run::Args),
    /// Start runs by the clock
    Schedule(schedule::Args),
    /// Move runs that ended long ago into files, and bring them back
    Retention(retention::Args),
    /// Look at projects, make new ones
    Project(project::Args),
    /// Check definitions, draw them, deploy them
    Workflow(workflow::Args),
    /// Show credits, give some, check the ledger
    Credits(credits::Args),
    /// Keep, list and rotate keys of model providers
    ApiKeys(api_keys::Args),
    /// Look at prices of models, take over price lists
    Pricing(pricing::Args),
    /// Make and rotate the keys that seal what runs store
    Keys(keys::Args),
    /// Look into the code index of a folder
    Index(index::Args),
    /// Measure the engine beside the limits of this machine's Postgres
    Bench(bench::Args),
    /// Let processes, network and Postgres fail under real work, and audit what is left
    Chaos(chaos::Args),
    /// Print a completion script for a shell
    Completion(completion::Args),
}

/// What every command is handed.
pub(crate) struct Context {
    pub config: Config,
    pub json: bool,
    pub flags: Flags,
}

impl Context {
    /// The database of this configuration, migrated; the embedded one if none is configured.
    pub async fn open(self) -> anyhow::Result<App> {
        Ok(App::open_migrated(self.config, postgres::Fallback::Embedded).await?)
    }
}

/// Runs the command line and gives the exit code.
pub async fn run(cli: Cli) -> u8 {
    let json = cli.json;
    match dispatch(cli).await {
        Ok(code) => code,
        Err(error) => {
            let (exit, text) = failure::tell(&error, json);
            eprintln!("{text}");
            exit
        }
    }
}

async fn dispatch(cli: Cli) -> anyhow::Result<u8> {
    if let Command::Completion(args) = cli.command {
        completion::run(&args);
        return Ok(0);
    }
    if let Command::Doctor(args) = &cli.command
        && args.environment
    {
        doctor::environment(cli.json);
        return Ok(0);
    }
    let config = Config::load(&cli.flags)?;
    telemetry::init(&config.log)?;
    let context = Context { config, json: cli.json, flags: cli.flags };
    let done = match cli.command {
        Command::Demo(args) => return demo::run(args, context).await,
        Command::Dev(args) => dev::run(args, context).await,
        Command::Server(args) => server::run(args, context).await,
        Command::Worker(args) => worker::run(args, context).await,
        Command::Migrate(args) => migrate::run(args, context).await,
        Command::Doctor(args) => return doctor::run(args, context).await,
        Command::Token(args) => token::run(args, context),
        Command::Run(args) => return run::run(args, context).await,
        Command::Schedule(args) => schedule::run(args, context).await,
        Command::Retention(args) => retention::run(args, context).await,
        Command::Project(args) => project::run(args, context).await,
        Command::Workflow(args) => return workflow::run(args, context).await,
        Command::Credits(args) => return credits::run(args, context).await,
        Command::ApiKeys(args) => api_keys::run(args, context).await,
        Command::Pricing(args) => return pricing::run(args, context).await,
        Command::Keys(args) => keys::run(args, context).await,
        Command::Index(args) => index::run(args, context).await,
        Command::Bench(args) => return bench::run(args, context).await,
        Command::Chaos(args) => return chaos::run(args, context).await,
        Command::Completion(_) => Ok(()),
    };
    done.map(|()| 0)
}

/// Prints a value as JSON, or as `plain` renders it.
pub(crate) fn print<T: Serialize>(json: bool, value: &T, plain: impl FnOnce(&T) -> String) -> anyhow::Result<()> {
    let text = if json { serde_json::to_string(value)? } else { plain(value) };
    // A reader that has seen enough closes the pipe.
    match std::io::Write::write_all(&mut std::io::stdout(), format!("{}\n", text.trim_end()).as_bytes()) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => Err(e.into()),
        _ => Ok(()),
    }
}

/// Columns of text, padded.
pub(crate) fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let width =
        |i: usize| rows.iter().map(|r| r[i].chars().count()).chain([head[i].chars().count()]).max().unwrap_or(0);
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let mut out = String::new();
        for (cell, width) in cells.zip(&widths) {
            out.push_str(cell);
            out.extend(std::iter::repeat_n(' ', width + 2 - cell.chars().count()));
        }
        out.trim_end().to_owned()
    };
    let mut lines = vec![line(&mut head.iter().copied())];
    lines.extend(rows.iter().map(|row| line(&mut row.iter().map(String::as_str))));
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn columns_line_up() {
        let text = table(&["a", "name"], &[vec!["1".into(), "x".into()], vec!["long".into(), "é".into()]]);
        assert_eq!(text, "a     name\n1     x\nlong  é");
    }
}
