//! `loopwright keys`: the ring that seals what runs store (`LOOPWRIGHT_PAYLOAD_KEYS`).

use super::{Context, print, table};
use clap::Subcommand;
use loopwright_engine::{Error, payload::PayloadKeys};
use secrecy::ExposeSecret;

/// SQLSTATE of what a role may not do.
const DENIED: &str = "42501";

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Print a new entry for the ring; put it first, and keep it where no backup of the database lies
    Generate {
        /// a-z, 0-9, `-`, `_` and `.`
        #[arg(value_name = "ID")]
        id: String,
    },
    /// Count the rows that each key has sealed; reads everything
    List,
    /// Seal everything under the first key, so that the others can leave the ring
    Reseal {
        /// Go on behind this run, where an earlier one stopped
        #[arg(long, value_name = "RUN")]
        after: Option<uuid::Uuid>,
    },
}

pub(crate) async fn run(args: Args, context: Context) -> anyhow::Result<()> {
    let json = context.json;
    match args.command {
        Command::Generate { id } => {
            let entry = PayloadKeys::generate(&id)?;
            let report = serde_json::json!({"id": id, "entry": entry.expose_secret()});
            print(json, &report, |_| entry.expose_secret().to_owned())
        }
        Command::List => {
            let app = context.open().await?;
            let found = app.client.sealed().await?;
            app.close().await;
            print(json, &found, |found| {
                let key = |key: &Option<String>| key.clone().unwrap_or_else(|| "(plain)".into());
                let rows: Vec<Vec<String>> =
                    found.iter().map(|c| vec![c.table.to_owned(), key(&c.key), c.rows.to_string()]).collect();
                table(&["table", "key", "rows"], &rows)
            })
        }
        Command::Reseal { after } => {
            let app = context.open().await?;
            let (mut after, mut runs, mut rows) = (after.map(loopwright_engine::ids::RunId), 0, 0);
            loop {
                let done = app.client.reseal(after).await.map_err(|error| {
                    let error = if is_denied(&error) {
                        anyhow::Error::new(error).context(
                            "history is rewritten by its owner alone: use the owner's DATABASE_URL (RUNBOOK, \"Roles\")",
                        )
                    } else {
                        error.into()
                    };
                    match after {
                        Some(run) => error.context(format!("go on with --after {run}")),
                        None => error,
                    }
                })?;
                (runs, rows) = (runs + done.runs, rows + done.rows);
                match done.after {
                    Some(run) => after = Some(run),
                    None => break,
                }
            }
            app.close().await;
            let report = serde_json::json!({"runs": runs, "rows": rows});
            print(json, &report, |_| format!("{rows} rows of {runs} runs and the schedules were sealed anew."))
        }
    }
}

/// Whether it is the application's role that asks, where that is not the owner.
fn is_denied(error: &Error) -> bool {
    let Error::Sql(error) = error else { return false };
    error.as_database_error().and_then(|error| error.code()).as_deref() == Some(DENIED)
}
