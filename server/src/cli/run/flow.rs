//! Commands that move a run as a whole: pause, resume.

use super::SENDER;
use crate::{app::App, cli::print};
use loopwright_engine::{client::Why, ids::RunId, view::RunStatus};
use serde_json::json;

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Let what runs come to its end and begin nothing new until it is resumed
    Pause {
        run: RunId,
        #[arg(long, default_value = "paused by the operator")]
        reason: String,
    },
    /// Let a paused run go on; also one that is quarantined, once its cause is mended
    Resume {
        run: RunId,
        #[arg(long, default_value = "resumed by the operator")]
        reason: String,
    },
}

pub(super) async fn act(command: Command, app: &App, json: bool) -> anyhow::Result<()> {
    let client = &app.client;
    let why = |reason| Why { reason, dedupe_id: None, by: Some(SENDER.into()) };
    match command {
        Command::Pause { run, reason } => {
            client.pause(run, why(reason)).await?;
            print(json, &json!({"status": "accepted"}), |_| "Asked to pause.".into())
        }
        Command::Resume { run, reason } => {
            let quarantined = client.describe(run).await?.status == RunStatus::Quarantined;
            if quarantined {
                client.unquarantine(run, why(reason)).await?;
            } else {
                client.resume(run, why(reason)).await?;
            }
            print(json, &json!({"status": "accepted", "was_quarantined": quarantined}), |_| {
                if quarantined { "Given back to the workers.".into() } else { "Asked to go on.".into() }
            })
        }
    }
}
