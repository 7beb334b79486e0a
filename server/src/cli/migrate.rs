//! `loopwright migrate`: safe to run from several places at once, and again.

use super::{Context, failure, print};
use crate::{app::App, postgres::Fallback};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Only say what is missing
    #[arg(long)]
    check: bool,
}

pub(crate) async fn run(args: Args, context: Context) -> anyhow::Result<()> {
    let json = context.json;
    let app = App::open(context.config, Fallback::Embedded).await?;
    let missing = app.store.missing_migrations().await?;
    if !args.check {
        app.migrate().await?;
        app.deploy_shipped().await?;
        app.schedule_shipped().await?;
    }
    let applied = if args.check { Vec::new() } else { missing.clone() };
    let report = serde_json::json!({"missing": if args.check { missing } else { Vec::new() }, "applied": applied});
    print(json, &report, |report| {
        let list = |key: &str| {
            report[key]
                .as_array()
                .into_iter()
                .flatten()
                .map(|v| format!("{:04}", v.as_i64().unwrap_or(0)))
                .collect::<Vec<_>>()
        };
        match (list("missing"), list("applied")) {
            (missing, applied) if missing.is_empty() && applied.is_empty() => "The database is up to date.".to_owned(),
            (missing, _) if !missing.is_empty() => format!("Missing: {}", missing.join(", ")),
            (_, applied) => format!("Applied: {}", applied.join(", ")),
        }
    })?;
    let behind = args.check && !report["missing"].as_array().is_some_and(Vec::is_empty);
    app.close().await;
    if behind { Err(failure::behind()) } else { Ok(()) }
}
