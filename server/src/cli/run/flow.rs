//! Commands that move a run as a whole: pause, fork, reset.

use super::SENDER;
use crate::{
    app::App,
    cli::{failure::refuse, print, schedule::belongs_to},
};
use loopwright_engine::{
    client::{At, Fork, Why},
    ids::RunId,
};
use serde_json::{Map, Value, json};
use uuid::Uuid;

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Let what runs come to its end and begin nothing new until it is resumed
    Pause {
        run: RunId,
        #[arg(long, default_value = "paused by the operator")]
        reason: String,
    },
    /// Start another run from the middle of this one; what had ended there is not done again
    Fork {
        run: RunId,
        #[command(flatten)]
        place: Place,
        #[command(flatten)]
        changes: Changes,
        #[arg(long, default_value = "forked by the operator")]
        reason: String,
    },
    /// Fork a run and end the old one; the new one takes its business key
    Reset {
        run: RunId,
        #[command(flatten)]
        place: Place,
        #[command(flatten)]
        changes: Changes,
        #[arg(long, default_value = "reset by the operator")]
        reason: String,
    },
}

#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
pub(super) struct Place {
    /// After this transition; see `run history`
    #[arg(long, value_name = "SEQ")]
    at: Option<u64>,
    /// Where this step began; it begins anew
    #[arg(long, value_name = "PATH")]
    step: Option<String>,
}

#[derive(Debug, clap::Args)]
pub(super) struct Changes {
    /// Replace an input; JSON, or words
    #[arg(long = "input", value_name = "NAME=VALUE")]
    inputs: Vec<String>,
    /// Go on under this deployed definition, with its inputs: those of the run that it declares, its defaults, and --input
    #[arg(long, value_name = "[NAME@]VERSION|HASH|POINTER")]
    definition: Option<String>,
    /// Whose the new run is, and who pays for it [default: as before; of a run that came from a file, the developer]
    #[arg(long, value_name = "UUID")]
    user: Option<Uuid>,
    /// A project of that user, whose it is
    #[arg(long, value_name = "UUID")]
    project: Option<Uuid>,
}

pub(super) async fn act(command: Command, app: &App, json: bool) -> anyhow::Result<()> {
    let client = &app.client;
    let why = |reason| Why { reason, dedupe_id: None, by: Some(SENDER.into()) };
    match command {
        Command::Pause { run, reason } => {
            client.pause(run, why(reason)).await?;
            print(json, &json!({"status": "accepted"}), |_| "Asked to pause.".into())
        }
        Command::Fork { run, place, changes, reason } => {
            let forked = client.fork(run, with(app, run, asked(place, &changes, reason)?, &changes).await?).await?;
            let report = json!({"run_id": forked.run_id, "forked_from": run});
            print(json, &report, |_| format!("Run {} goes on from there; {run} is as it was.", forked.run_id))
        }
        Command::Reset { run, place, changes, reason } => {
            let reset = client.reset(run, with(app, run, asked(place, &changes, reason)?, &changes).await?).await?;
            let report = json!({"run_id": reset.run_id, "forked_from": run, "terminated": reset.terminated});
            print(json, &report, |_| format!("Run {} goes on from there; {run} has ended.", reset.run_id))
        }
    }
}

/// The request with what only the database knows: its definition, and the attributes of the new run, if they are not those of the
/// old one.
async fn with(app: &App, run: RunId, asked: Fork, changes: &Changes) -> anyhow::Result<Fork> {
    let view = app.client.describe(run).await?;
    let definition = match &changes.definition {
        Some(text) => Some(app.client.definition_named(&view.workflow, text).await?),
        None => None,
    };
    let named = changes.user.is_some() || changes.project.is_some();
    // Whoever a file names has not asked for a fork of it.
    let attributes = match named || view.imported_at.is_some() {
        true => Some(belongs_to(app, changes.user, changes.project).await?.0),
        false => None,
    };
    Ok(Fork { definition, attributes, ..asked })
}

fn asked(place: Place, changes: &Changes, reason: String) -> anyhow::Result<Fork> {
    let at = match (place.at, place.step) {
        (Some(seq), _) => At::Seq(seq),
        (None, Some(path)) => At::Step(path),
        (None, None) => return Err(refuse("usage_invalid", "say where: --at SEQ or --step PATH")),
    };
    let mut inputs = Map::new();
    for text in &changes.inputs {
        let wrong = || refuse("usage_invalid", format!("`{text}` is no input; write --input name=value"));
        let (name, value) = text.split_once('=').filter(|(name, _)| !name.is_empty()).ok_or_else(wrong)?;
        let value = serde_json::from_str(value).unwrap_or_else(|_| Value::String(value.to_owned()));
        inputs.insert(name.to_owned(), value);
    }
    Ok(Fork { run_id: None, at, inputs, definition: None, attributes: None, reason })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inputs_are_json_or_words() {
        let asked = |texts: &[&str]| {
            let place = Place { at: Some(3), step: None };
            let inputs = texts.iter().map(|t| (*t).to_owned()).collect();
            asked(place, &Changes { inputs, definition: None, user: None, project: None }, String::new())
        };
        let inputs = asked(&["n=5", "idea=make it a=b", "list=[1]", "empty="]).unwrap().inputs;
        assert_eq!(Value::Object(inputs), json!({"n": 5, "idea": "make it a=b", "list": [1], "empty": ""}));
        assert!(asked(&["n"]).is_err() && asked(&["=5"]).is_err());
    }
}
