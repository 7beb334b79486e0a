//! Commands that ask a run and hear an answer: updates and queries.

use super::{SENDER, payload_of};
use crate::{
    app::App,
    cli::{EXIT_FAILED, print},
};
use loopwright_engine::{
    client::Update,
    ids::RunId,
    view::{Answer, Queried, Updated},
};
use std::time::Duration;

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Send a request that a step answers, and wait for the answer; exit code 1 if it is rejected or fails
    Update {
        run: RunId,
        /// The signal of the `await` that takes it
        name: String,
        /// Words, which become {"text": …}, or JSON that begins with { or [
        #[arg(default_value = "{}")]
        payload: String,
        /// The same id is the same request: ask again with it
        #[arg(long)]
        id: Option<String>,
        /// How long to wait for the answer, in seconds
        #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(0..=86_400))]
        wait: u64,
    },
    /// Ask what the workflow lets people ask of a run; nothing happens to it
    Query { run: RunId, name: String },
}

pub(super) async fn act(command: Command, app: &App, json: bool) -> anyhow::Result<u8> {
    match command {
        Command::Update { run, name, payload, id, wait } => {
            let update = Update { name, payload: payload_of(&payload), id, sender: Some(SENDER.into()) };
            let updated = app.client.update(run, update, Duration::from_secs(wait)).await?;
            print(json, &updated, told)?;
            Ok(if matches!(updated.answer, Answer::Completed { .. }) { 0 } else { EXIT_FAILED })
        }
        Command::Query { run, name } => {
            print(json, &app.client.query(run, &name).await?, |queried: &Queried| text(&queried.result))?;
            Ok(0)
        }
    }
}

fn told(updated: &Updated) -> String {
    match &updated.answer {
        Answer::Completed { result } => text(result),
        Answer::Rejected { problems } => format!("Rejected: {}.", problems.join("; ")),
        Answer::Failed { failure } => format!("Failed: {}: {}.", failure.code, failure.message),
    }
}

/// A text as it is, everything else as JSON.
fn text(value: &serde_json::Value) -> String {
    value.as_str().map_or_else(|| format!("{value:#}"), str::to_owned)
}
