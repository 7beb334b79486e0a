//! `loopwright run resume`: a run that was paused or set aside goes on, or many of them after an outage.

use super::{
    SENDER,
    many::{self, RUNS_MAX, Verdict, Which},
};
use crate::{
    app::App,
    cli::{failure::refuse, print},
    store::filter,
};
use loopwright_engine::{
    Error,
    client::Why,
    filter::Query,
    ids::RunId,
    view::{RunStatus, RunSummary},
};
use serde_json::json;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The run
    #[arg(conflicts_with = "matching")]
    run: Option<RunId>,
    /// All open runs that satisfy a condition instead, for example "status = 'quarantined' and workflow = 'dev-loop'"; those that
    /// go on already are left as they are
    #[arg(long = "where", value_name = "FILTER", value_parser = filter::parse)]
    matching: Option<Query>,
    /// Begin after this run, in the order of `run list`: the cursor that the page before has named
    #[arg(long, value_name = "CURSOR", requires = "matching")]
    after: Option<RunId>,
    /// Runs of one page
    #[arg(long, value_name = "RUNS", requires = "matching", default_value_t = 1_000, value_parser = clap::value_parser!(u16).range(1..=RUNS_MAX))]
    limit: u16,
    /// Only say what would happen
    #[arg(long, requires = "matching")]
    dry_run: bool,
    #[arg(long, default_value = "resumed by the operator")]
    reason: String,
}

pub(super) async fn act(args: Args, app: &App, json: bool) -> anyhow::Result<u8> {
    let Args { run, matching, after, limit, dry_run, reason } = args;
    let why = Why { reason, dedupe_id: None, by: Some(SENDER.into()) };
    match (run, matching) {
        (Some(run), _) => {
            let quarantined = app.client.describe(run).await?.status == RunStatus::Quarantined;
            go_on(run, quarantined, why, app).await?;
            print(json, &json!({"status": "accepted", "was_quarantined": quarantined}), |_| {
                if quarantined { "Given back to the workers.".into() } else { "Asked to go on.".into() }
            })?;
            Ok(0)
        }
        (None, Some(matching)) => {
            let which = Which { matching, after, limit, dry_run };
            many::each(which, app, json, async |run: &RunSummary| verdict(run, dry_run, &why, app).await).await
        }
        (None, None) => Err(refuse("usage_invalid", "say which: a run, or --where FILTER")),
    }
}

async fn go_on(run: RunId, quarantined: bool, why: Why, app: &App) -> loopwright_engine::Result<bool> {
    if quarantined { app.client.unquarantine(run, why).await } else { app.client.resume(run, why).await }
}

async fn verdict(run: &RunSummary, dry_run: bool, why: &Why, app: &App) -> anyhow::Result<Verdict> {
    let quarantined = match run.status {
        RunStatus::Quarantined => true,
        RunStatus::Paused => false,
        _ => return Ok(Verdict::of(run.run_id, "unchanged")),
    };
    let done = match dry_run {
        // What still cannot be folded here would be set aside again.
        true => app.client.describe(run.run_id).await.map(|_| "possible"),
        false => go_on(run.run_id, quarantined, why.clone(), app).await.map(|done| match (done, quarantined) {
            (false, _) => "unchanged",
            (true, true) => "released",
            (true, false) => "resumed",
        }),
    };
    match done {
        Ok(outcome) => Ok(Verdict::of(run.run_id, outcome)),
        Err(error @ (Error::Sql(_) | Error::InDoubt(_) | Error::TooLarge { .. })) => Err(error.into()),
        // It moved meanwhile, or still cannot be read: the others are looked at nevertheless.
        Err(error) => Ok(Verdict::refused(run.run_id, &error)),
    }
}
