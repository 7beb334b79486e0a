//! `loopwright demo`: the whole development loop on a sample idea, live, with a worker process of its own.
//!
//! ```text
//! demo ─▶ Stage { database, run, worker process } ─▶ drive: narrate · answer · (kill the worker once) ─▶ Report
//!   └─ --crash: a second stage runs the same run id undisturbed in a database of its own; reports are compared
//! ```
//!
//! The run is durable like any other: the same command after Ctrl-C goes on with it.

mod beside;
mod narrate;
mod report;
mod stage;
mod worker;

use super::{Context, EXIT_FAILED, EXIT_INTERRUPTED};
use crate::{
    app::{self, App, Models},
    config::{self, Config},
    postgres::Fallback,
};
use loopwright_engine::ids::RunId;
use report::Report;
use stage::{Answers, Ended, Stage, Subject};
use std::{io::IsTerminal, path::PathBuf, time::Instant};

/// What the rehearsal builds.
const IDEA: &str = "A small command line tool that prints the most frequent words of a text.";
const NAME: &str = "tally";
/// Longest idea, in bytes; the workflow's own limit is in characters.
const IDEA_BYTES_MAX: usize = 20_000;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Build this instead of the sample, with the models that are configured
    #[arg(long, value_name = "TEXT", conflicts_with = "crash")]
    idea: Option<String>,
    /// Approve the plan and let the defaults answer questions
    #[arg(long)]
    yes: bool,
    /// Kill the worker process in the middle, let another take over, and compare with an undisturbed run
    #[arg(long)]
    crash: bool,
    /// Where to put the repository [default: below the data folder]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

pub(crate) async fn run(args: Args, context: Context) -> anyhow::Result<u8> {
    let begun = Instant::now();
    let (json, flags, config) = (context.json, context.flags, context.config);
    let subject = subject(&args, &config)?;
    if let Some(out) = &args.out {
        report::free(out)?;
    }
    let stop = app::stop_on_signal()?;
    let app = App::open_migrated(config, Fallback::Embedded).await?;
    let rehearsed = subject.rehearsed;

    // What the worker would lack is said here, in one sentence, and not at the end of its log.
    app::toolbox(&app, if rehearsed { &Models::Demo } else { &Models::Configured }).await?;

    let open = stage::open_run(&app, &subject).await?;
    let run = open.unwrap_or_else(RunId::new);
    if open.is_some() {
        eprintln!("Going on with run {run}.");
    } else if rehearsed {
        eprintln!("The models are rehearsed: their answers come from a script. Everything else is real.");
    }
    let config_file = flags.config.as_deref();
    let label = if args.crash { "disturbed" } else { subject.kind() };
    let mut main = Stage::begin(app, &subject, run, label, config_file).await?;

    let mut reference = None;
    if args.crash {
        eprintln!("\nFirst the undisturbed run, in a database of its own.\n");
        let app = beside::open(&main.app, open.is_none()).await?;
        // As long a name as the other's: confined commands may see where they are, and say so in what is paid for.
        let mut stage = Stage::begin(app, &subject, run, "reference", config_file).await?;
        let ended = stage.drive(&subject, stop.clone(), None).await?;
        if ended == Ended::Stopped {
            stage.close().await;
            main.close().await;
            return Ok(interrupted());
        }
        reference = Some(Report::of(&stage, None).await?);
        stage.close().await;
        eprintln!("\nNow the same run, and its worker is killed in the middle of an attempt.\n");
    }
    let wanted = (args.crash && main.crashes == 0).then_some(stage::Crash::InAttempt);
    let ended = main.drive(&subject, stop, wanted).await?;
    if ended == Ended::Stopped {
        main.close().await;
        return Ok(interrupted());
    }
    let mut report = Report::of(&main, args.out.as_deref()).await?;
    main.close().await;
    report.seconds = begun.elapsed().as_secs();
    report.rehearsed = rehearsed;
    report.compare(reference);
    eprintln!("\n{}", report.text());
    if json {
        super::print(true, &report, |_| String::new())?;
    }
    Ok(if report.good() { 0 } else { EXIT_FAILED })
}

fn interrupted() -> u8 {
    eprintln!("\nStopped; nothing is lost. The same command goes on with the run.");
    EXIT_INTERRUPTED
}

/// What is to be built and who answers for its owner.
fn subject(args: &Args, config: &Config) -> anyhow::Result<Subject> {
    let Some(idea) = &args.idea else {
        let answers = Answers::Suggested;
        return Ok(Subject { idea: IDEA.into(), name: NAME.into(), answers, crash: args.crash, rehearsed: true });
    };
    let idea = idea.trim();
    if idea.is_empty() || idea.len() > IDEA_BYTES_MAX {
        return Err(config::Error::value("--idea", format!("is empty or longer than {IDEA_BYTES_MAX} bytes")).into());
    }
    if !config.providers.any() {
        return Err(config::Error::value(
            "--idea",
            "needs a model; set GEMINI_API_KEY, OPENROUTER_API_KEY, or OPENAI_BASE_URL for a server of your own",
        )
        .into());
    }
    let answers = if args.yes { Answers::Default } else { Answers::Terminal };
    if !args.yes && !std::io::stdin().is_terminal() {
        return Err(config::Error::value("--yes", "is needed where there is no terminal to ask at").into());
    }
    let name: String = idea.split_whitespace().take(5).collect::<Vec<_>>().join(" ").chars().take(60).collect();
    Ok(Subject { idea: idea.into(), name, answers, crash: false, rehearsed: false })
}
