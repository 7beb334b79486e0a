//! `loopwright run`: for whoever operates this installation, over all users.

mod archive;
mod ask;
mod flow;
mod many;
pub(super) mod migrate;
mod quote;
mod resume;
mod start;

use super::{Context, failure::refuse, print, table};
use crate::{app::App, read::task, store::filter};
use loopwright_engine::{
    client::{Decision, Filter, Signal},
    filter::Query,
    ids::RunId,
    view::{HistoryRow, RunView},
};
use std::{path::PathBuf, time::Duration};
use uuid::Uuid;

/// Sender of what is sent from here.
const SENDER: &str = "operator";
/// Transitions read at once.
const BATCH: u32 = 500;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// List runs, newest first
    List {
        /// Of this project only
        #[arg(long, value_name = "UUID")]
        project: Option<Uuid>,
        /// Open ones only
        #[arg(long)]
        open: bool,
        /// That satisfy a condition, for example "status = 'running' and project = 'Greeter' and started_at > '2026-11-25'"
        #[arg(long = "where", value_name = "FILTER", value_parser = filter::parse)]
        matching: Option<Query>,
        /// Begin after this run
        #[arg(long, value_name = "RUN", conflicts_with = "count")]
        after: Option<RunId>,
        /// Print how many there are instead
        #[arg(long)]
        count: bool,
        #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=200))]
        limit: u32,
    },
    /// Start a run of a deployed workflow
    Start(start::Args),
    /// Show one run
    Show { run: RunId },
    /// Follow a run until it closes or waits for somebody
    Watch { run: RunId },
    /// Print every transition
    History {
        run: RunId,
        /// Begin after this transition
        #[arg(long, default_value_t = 0)]
        after: u64,
    },
    /// Send a signal
    Signal {
        run: RunId,
        name: String,
        /// Words, which become {"text": …}, or JSON that begins with { or [
        #[arg(default_value = "{}")]
        payload: String,
        /// Yours: the same signal sent twice under one id arrives once
        #[arg(long)]
        id: Option<String>,
    },
    /// Decide an approval
    Approve {
        run: RunId,
        /// The step that waits [default: the only one that does]
        step: Option<String>,
        #[arg(long, value_enum, default_value_t = Verdict::Approved)]
        decision: Verdict,
        #[arg(long)]
        comment: Option<String>,
    },
    #[command(flatten)]
    Ask(ask::Command),
    #[command(flatten)]
    Flow(flow::Command),
    #[command(flatten)]
    Quote(quote::Command),
    /// Let a paused run, or many, go on; also those that are quarantined, once their cause is mended; exit code 1 if one cannot
    Resume(Box<resume::Args>),
    /// Let a run in flight, or many, go on under another version; exit code 1 if one cannot
    Migrate(Box<migrate::Args>),
    /// Write a run with its history, definition and checkpoints to standard output
    Export { run: RunId },
    /// Read an exported run into this database; it can be looked at, never executed
    Import { file: PathBuf },
    /// Decide a history again and show the first difference; exit code 1 if there is one
    Replay {
        /// A run of the database, or an exported one
        #[arg(value_name = "RUN|FILE")]
        target: String,
        /// Under another definition: a deployed one for a run, by its version or the beginning of its hash; a definition's file for
        /// an exported run
        #[arg(long, value_name = "VERSION|HASH|FILE")]
        definition: Option<String>,
    },
    /// Ask a run to stop; what it has to clean up, it does
    Cancel {
        run: RunId,
        /// How long that may take, its cleanup included [default: an hour for its `finally`]; again, with less, to hurry it
        #[arg(long, value_name = "DURATION", value_parser = migrate::duration)]
        within: Option<Duration>,
        #[arg(long, default_value = "cancelled by the operator")]
        reason: String,
    },
    /// End a run at once, without its `finally`; also one that is quarantined
    Terminate {
        run: RunId,
        #[arg(long, default_value = "terminated by the operator")]
        reason: String,
    },
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Verdict {
    Approved,
    Rejected,
    ChangesRequested,
}

pub(crate) async fn run(args: Args, context: Context) -> anyhow::Result<u8> {
    let json = context.json;
    if let Command::Replay { target, definition } = &args.command {
        return archive::replay(target, definition.as_deref(), context).await;
    }
    let app = context.open().await?;
    let done = match args.command {
        Command::Ask(command) => ask::act(command, &app, json).await,
        Command::Migrate(args) => migrate::act(*args, &app, json).await,
        Command::Resume(args) => resume::act(*args, &app, json).await,
        command => act(command, &app, json).await.map(|()| 0),
    };
    app.close().await;
    done
}

async fn act(command: Command, app: &App, json: bool) -> anyhow::Result<()> {
    let client = &app.client;
    match command {
        Command::List { project, open, matching, after, count, limit } => {
            let attributes = project.map(|p| serde_json::json!({"project_id": p.to_string()}));
            let matching = match matching {
                Some(matching) => Some(app.store.with_projects(None, matching).await?),
                None => None,
            };
            let filter = Filter { attributes, open_only: open, matching, after, limit, ..Filter::default() };
            if count {
                let count = serde_json::json!({"count": client.count(&filter).await?});
                return print(json, &count, |count| count["count"].to_string());
            }
            let runs = client.list(filter).await?;
            print(json, &runs, |runs| {
                let rows: Vec<_> = runs
                    .iter()
                    .map(|r| {
                        let waiting = r.waiting.clone().unwrap_or_default();
                        let started = r.started_at.format("%F %R").to_string();
                        vec![
                            r.run_id.to_string(),
                            r.workflow.clone(),
                            r.status.as_str().to_owned(),
                            waiting,
                            r.seq.to_string(),
                            started,
                        ]
                    })
                    .collect();
                table(&["run", "workflow", "status", "waits for", "seq", "started"], &rows)
            })
        }
        Command::Start(args) => start::act(args, app, json).await,
        Command::Show { run } => print(json, &client.describe(run).await?, show),
        Command::Watch { run } => watch(app, run, json).await,
        Command::History { run, after } => {
            let mut after = after;
            loop {
                let rows = client.history(run, after, BATCH).await?;
                let Some(last) = rows.last() else { return Ok(()) };
                after = last.seq;
                for row in &rows {
                    print(json, row, transition)?;
                }
            }
        }
        Command::Signal { run, name, payload, id } => {
            let payload = payload_of(&payload);
            let signal = Signal { name, payload, dedupe_id: id, sender: Some(SENDER.into()) };
            client.signal(run, signal).await?;
            print(json, &serde_json::json!({"status": "accepted"}), |_| "Sent.".into())
        }
        Command::Approve { run, step, decision, comment } => {
            let step = match step {
                Some(step) => step,
                None => waiting_step(&client.describe(run).await?)?,
            };
            let decision = match decision {
                Verdict::Approved => Decision::Approved,
                Verdict::Rejected => Decision::Rejected,
                Verdict::ChangesRequested => Decision::ChangesRequested,
            };
            client.approve(run, &step, decision, comment, None, Some(SENDER.into())).await?;
            print(json, &serde_json::json!({"status": "accepted", "step": step}), |_| {
                format!("Decided `{step}`: {}.", decision.as_str())
            })
        }
        Command::Flow(command) => flow::act(command, app, json).await,
        Command::Quote(command) => quote::act(command, app, json).await,
        Command::Export { run } => archive::export(run, app).await,
        Command::Import { file } => archive::import(&file, app, json).await,
        Command::Replay { .. } | Command::Ask(_) | Command::Migrate(_) | Command::Resume(_) => {
            anyhow::bail!("this command is carried out elsewhere")
        }
        Command::Cancel { run, within, reason } => {
            match within {
                Some(within) => client.cancel_within(run, &reason, within).await?,
                None => client.cancel(run, &reason).await?,
            }
            print(json, &serde_json::json!({"status": "cancelling"}), |_| "Asked to stop.".into())
        }
        Command::Terminate { run, reason } => {
            client.terminate(run, &reason).await?;
            print(json, &serde_json::json!({"status": "terminated"}), |_| "Ended.".into())
        }
    }
}

/// What somebody typed: an object or a list as it is, everything else, numbers too, as words.
fn payload_of(text: &str) -> serde_json::Value {
    let json = if text.trim_start().starts_with(['{', '[']) { serde_json::from_str(text).ok() } else { None };
    json.unwrap_or_else(|| serde_json::json!({ "text": text }))
}

fn waiting_step(view: &RunView) -> anyhow::Result<String> {
    let mut steps = view.waiting.iter().filter_map(|w| match w {
        loopwright_engine::view::Waiting::Approval { step, .. } => Some(step.clone()),
        _ => None,
    });
    let none = || {
        let text = format!("run {} waits for no approval now: `run show` says what it waits for", view.run_id);
        refuse("approval_not_waiting", text)
    };
    let first = steps.next().ok_or_else(none)?;
    if let Some(second) = steps.next() {
        let text = format!("several approvals wait, `{first}` and `{second}` among them; name the step");
        return Err(refuse("usage_invalid", text));
    }
    Ok(first)
}

async fn watch(app: &App, run: RunId, json: bool) -> anyhow::Result<()> {
    let mut after = 0;
    loop {
        let rows = app.client.history(run, after, BATCH).await?;
        for row in &rows {
            after = row.seq;
            print(json, row, transition)?;
        }
        if rows.is_empty() {
            let view = app.client.describe(run).await?;
            if task::is_parked(&view) && view.seq <= after {
                return print(json, &view, |view| {
                    let standing = task::standing(view);
                    format!("{}: {} {}", view.status.as_str(), standing.task, standing.message)
                });
            }
            // An order that changes nothing is read without a transition.
            app.client.wait_change(run, after, Duration::from_secs(5)).await?;
        }
    }
}

fn show(view: &RunView) -> String {
    let standing = task::standing(view);
    let mut out = format!(
        "run       {}\nworkflow  {} ({})\nstatus    {}\nnow       {}: {}\nstarted   {}\n",
        view.run_id,
        view.workflow,
        &view.definition.to_string()[..12],
        view.status.as_str(),
        standing.task,
        standing.message,
        view.started_at.format("%F %T UTC"),
    );
    if let Some(closed) = view.closed_at {
        out.push_str(&format!("closed    {}\n", closed.format("%F %T UTC")));
    }
    if let Some(before) = view.chain.continued_from {
        out.push_str(&format!("before    {before}, which continued as new\n"));
    }
    if let Some(next) = view.chain.continued_as {
        out.push_str(&format!("next      {next}\n"));
    }
    if let Some(origin) = view.forked_from {
        out.push_str(&format!("forked    from {} after transition {}\n", origin.run_id, origin.seq));
    }
    if let Some(at) = view.imported_at {
        out.push_str(&format!("imported  {}: never executed here\n", at.format("%F %T UTC")));
    }
    out.push_str(&format!("seq       {}\n\n", view.seq));
    let rows: Vec<_> = view
        .nodes
        .iter()
        .map(|n| {
            let count = match (n.done, n.total) {
                (Some(done), Some(total)) => format!("{done}/{total}"),
                _ => String::new(),
            };
            let failure = n.failure.as_ref().map(|f| f.code.clone()).unwrap_or_default();
            vec![n.path.clone(), n.status.clone(), count, failure]
        })
        .collect();
    out + &table(&["step", "status", "done", "failure"], &rows)
}

/// One transition as lines of `seq time type path …`.
fn transition(row: &HistoryRow) -> String {
    let line = |event: &serde_json::Value| {
        let text = |key: &str| event[key].as_str().unwrap_or_default().to_owned();
        let mut parts = vec![format!("{:>5}", row.seq), row.at.format("%T%.3f").to_string(), text("type")];
        for key in ["path", "activity", "outcome", "status", "name", "reason"] {
            if !text(key).is_empty() {
                parts.push(text(key));
            }
        }
        if let Some(code) = event["failure"]["code"].as_str() {
            parts.push(code.to_owned());
        }
        parts.join(" ")
    };
    row.events.iter().map(line).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn numbers_and_words_are_answers() {
        for (typed, payload) in [
            ("42", json!({"text": "42"})),
            ("null", json!({"text": "null"})),
            ("{not json", json!({"text": "{not json"})),
            ("{\"text\": \"x\"}", json!({"text": "x"})),
        ] {
            assert_eq!(payload_of(typed), payload, "{typed}");
        }
    }
}
