//! `loopwright run migrate` (and `workflow migrate`, which is the same): runs in flight that go on under another version.

use super::many::{self, RUNS_MAX, Verdict, Which};
use crate::{
    app::{self, App},
    cli::{EXIT_FAILED, failure::refuse, print, table},
    store::filter,
};
use loopwright_engine::{
    Error,
    client::{Migrate, MigrationOutcome, MigrationReport, Why},
    filter::Query,
    ids::{DefinitionHash, RunId},
    machine::Finding,
    view::{RunStatus, RunSummary, RunView},
};
use loopwright_workflows::parse_duration;
use serde_json::json;
use std::{
    collections::{BTreeMap, btree_map::Entry},
    time::Duration,
};
use tokio::time::Instant;

/// Who migrates from here.
const BY: &str = "operator";
/// Longest pause between two looks at a run that is to become quiet.
const LOOK_EVERY: Duration = Duration::from_secs(5);

#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Args {
    /// The run
    #[arg(conflicts_with = "matching")]
    run: Option<RunId>,
    /// All open runs that satisfy a condition instead; those that nothing stands in the way of are migrated
    #[arg(long = "where", value_name = "FILTER", value_parser = filter::parse)]
    matching: Option<Query>,
    /// Begin after this run, in the order of `run list`: the cursor that the page before has named
    #[arg(long, value_name = "CURSOR", requires = "matching")]
    after: Option<RunId>,
    /// Runs of one page
    #[arg(long, value_name = "RUNS", requires = "matching", default_value_t = 1_000, value_parser = clap::value_parser!(u16).range(1..=RUNS_MAX))]
    limit: u16,
    /// The version to go on under: its number, the beginning of its hash, or a pointer such as `current`
    #[arg(long, value_name = "VERSION|HASH|POINTER")]
    to: String,
    /// A step that has another id there, by its old id or path
    #[arg(long = "map", value_name = "OLD=NEW")]
    map: Vec<String>,
    /// Only say what would happen
    #[arg(long)]
    dry_run: bool,
    /// How long to wait for attempts that run: the run is paused meanwhile
    #[arg(long, value_name = "DURATION", default_value = "10m", value_parser = duration)]
    wait: Duration,
    #[arg(long, default_value = "migrated by the operator")]
    reason: String,
}

pub(super) fn duration(text: &str) -> Result<Duration, String> {
    parse_duration(text).map(Duration::from_millis).ok_or_else(|| "write for example 90s, 10m or 1h30m".to_owned())
}

pub(in crate::cli) async fn act(args: Args, app: &App, json: bool) -> anyhow::Result<u8> {
    let map = renamed(&args.map)?;
    match (args.run, &args.matching) {
        (Some(run), _) => one(run, &args, map, app, json).await,
        (None, Some(matching)) => many(matching.clone(), &args, map, app, json).await,
        (None, None) => Err(refuse("usage_invalid", "say which: a run, or --where FILTER")),
    }
}

fn renamed(texts: &[String]) -> anyhow::Result<BTreeMap<String, String>> {
    texts
        .iter()
        .map(|text| {
            let pair = text.split_once('=').filter(|(old, new)| !old.is_empty() && !new.is_empty());
            let wrong = || refuse("usage_invalid", format!("`{text}` is no pair of steps; write --map old=new"));
            let (old, new) = pair.ok_or_else(wrong)?;
            Ok((old.to_owned(), new.to_owned()))
        })
        .collect()
}

fn asked(args: &Args, to: DefinitionHash, map: BTreeMap<String, String>, dry_run: bool) -> Migrate {
    Migrate { to, map, reason: args.reason.clone(), by: Some(BY.into()), dry_run, catalog: app::catalog() }
}

async fn one(run: RunId, args: &Args, map: BTreeMap<String, String>, app: &App, json: bool) -> anyhow::Result<u8> {
    let view = app.client.describe(run).await?;
    let to = app.client.definition_named(&view.workflow, &args.to).await?;
    let mut report = app.client.migrate(run, asked(args, to, map.clone(), true)).await?;
    if !args.dry_run && matches!(report.outcome, MigrationOutcome::Possible | MigrationOutcome::Busy) {
        report = quietly(&view, args, asked(args, to, map, false), app).await?;
    }
    print(json, &report, text)?;
    Ok(if report.outcome == MigrationOutcome::Impossible { EXIT_FAILED } else { 0 })
}

/// Migrates a run; one that works is paused, waited for and resumed, whatever became of it.
async fn quietly(view: &RunView, args: &Args, asked: Migrate, app: &App) -> anyhow::Result<MigrationReport> {
    let run = view.run_id;
    match app.client.migrate(run, asked.clone()).await {
        Err(Error::MigrationBusy { .. }) => {}
        done => return Ok(done?),
    }
    let why = |reason: &str| Why { reason: reason.to_owned(), dedupe_id: None, by: Some(BY.into()) };
    let pauses = view.status != RunStatus::Paused;
    if pauses {
        app.client.pause(run, why("to be migrated")).await?;
    }
    let done = match quiet(run, args.wait, app).await {
        Ok(()) => app.client.migrate(run, asked).await.map_err(anyhow::Error::from),
        Err(error) => Err(error),
    };
    if pauses {
        // Also when it was refused: it is left as it was found.
        match app.client.resume(run, why("was paused to be migrated")).await {
            Ok(_) | Err(Error::RunClosed(_)) => {}
            Err(error) if done.is_ok() => return Err(error.into()),
            Err(error) => tracing::warn!(run_id = %run, %error, "the run is still paused; `run resume` it"),
        }
    }
    done
}

/// Waits until a paused run has no attempt under way.
async fn quiet(run: RunId, wait: Duration, app: &App) -> anyhow::Result<()> {
    let until = Instant::now() + wait;
    loop {
        let view = app.client.describe(run).await?;
        if view.status.is_closed() {
            return Err(Error::RunClosed(run.to_string()).into());
        }
        if view.status == RunStatus::Paused && view.live.is_empty() {
            return Ok(());
        }
        let left = until.saturating_duration_since(Instant::now());
        let running: Vec<&str> = view.live.iter().map(|attempt| attempt.path.as_str()).collect();
        if left.is_zero() {
            let text = format!(
                "attempts still run after {} s at {}: the run goes on as it was; give it more time by --wait",
                wait.as_secs(),
                running.join(", ")
            );
            return Err(refuse("migration_busy", text));
        }
        app.client.wait_change(run, view.seq, left.min(LOOK_EVERY)).await?;
    }
}

async fn many(
    matching: Query,
    args: &Args,
    map: BTreeMap<String, String>,
    app: &App,
    json: bool,
) -> anyhow::Result<u8> {
    let mut named = BTreeMap::new();
    let judge = async |summary: &RunSummary| {
        let to = match named.entry(summary.workflow.clone()) {
            Entry::Occupied(known) => *known.get(),
            Entry::Vacant(new) => {
                let to = match app.client.definition_named(new.key(), &args.to).await {
                    Ok(to) => Some(to),
                    // Another workflow may have it.
                    Err(Error::DefinitionNotFound(_)) => None,
                    Err(error) => return Err(error.into()),
                };
                *new.insert(to)
            }
        };
        match to {
            Some(to) => verdict(summary.run_id, args, to, &map, app).await,
            None => Ok(Verdict::refused(summary.run_id, &Error::DefinitionNotFound(args.to.clone()))),
        }
    };
    let which = Which { matching, after: args.after, limit: args.limit, dry_run: args.dry_run };
    many::each(which, app, json, judge).await
}

/// Nobody is paused here.
async fn verdict(
    run: RunId,
    args: &Args,
    to: DefinitionHash,
    map: &BTreeMap<String, String>,
    app: &App,
) -> anyhow::Result<Verdict> {
    let mut report = match app.client.migrate(run, asked(args, to, map.clone(), true)).await {
        Ok(report) => report,
        Err(error @ (Error::Sql(_) | Error::DefinitionNotFound(_) | Error::TooLarge { .. })) => {
            return Err(error.into());
        }
        Err(error) => return Ok(Verdict::refused(run, &error)),
    };
    if !args.dry_run && report.outcome == MigrationOutcome::Possible {
        report = match app.client.migrate(run, asked(args, to, map.clone(), false)).await {
            Ok(report) => report,
            Err(error @ Error::Sql(_)) => return Err(error.into()),
            // It moved meanwhile.
            Err(error) => return Ok(Verdict::refused(run, &error)),
        };
    }
    let outcome = json!(report.outcome).as_str().unwrap_or_default().to_owned();
    let (code, remedy) = match report.outcome {
        MigrationOutcome::Impossible => (
            Some("migration_invalid"),
            Some("do what each reason says: keep or --map a step, raise a bound, choose another version".into()),
        ),
        MigrationOutcome::Busy => (
            Some("migration_busy"),
            Some(format!(
                "attempts run at {}: give it again when they have ended, or `run migrate {run} --to {}`, which waits for them",
                report.running.join(", "),
                args.to
            )),
        ),
        MigrationOutcome::Migrated | MigrationOutcome::Unchanged | MigrationOutcome::Possible => (None, None),
    };
    Ok(Verdict { run_id: run, outcome, code, why: report.violations, remedy })
}

fn text(report: &MigrationReport) -> String {
    let short = |hash: DefinitionHash| hash.to_string()[..12].to_owned();
    let (from, to) = (short(report.from), short(report.to));
    let mut out = match (report.outcome, report.seq) {
        (MigrationOutcome::Migrated, seq) => {
            format!("Migrated from {from} to {to} by transition {}.", seq.unwrap_or_default())
        }
        (MigrationOutcome::Unchanged, _) => format!("The run has {to} already; nothing was done."),
        (MigrationOutcome::Possible, _) => format!("Can be migrated from {from} to {to}."),
        (MigrationOutcome::Busy, _) => {
            format!("Can be migrated from {from} to {to} when its attempts have ended: {}.", report.running.join(", "))
        }
        (MigrationOutcome::Impossible, _) => format!(
            "Cannot be migrated from {from} to {to}; nothing was done. Do what each error says: keep or --map a step, raise a bound, \
             choose another version. [migration_invalid]"
        ),
    };
    let row = |kind: &str, f: &Finding| {
        vec![kind.to_owned(), if f.path.is_empty() { "(run)".into() } else { f.path.clone() }, f.text.clone()]
    };
    let rows: Vec<_> =
        report.violations.iter().map(|f| row("error", f)).chain(report.notes.iter().map(|f| row("note", f))).collect();
    if !rows.is_empty() {
        out.push_str(&format!("\n\n{}", table(&["", "step", "what"], &rows)));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_is_pairs_of_steps() {
        let renamed = |texts: &[&str]| renamed(&texts.iter().map(|t| (*t).to_owned()).collect::<Vec<_>>());
        let map = renamed(&["a=b", "each/code=build"]).unwrap();
        assert_eq!(map, BTreeMap::from([("a".into(), "b".into()), ("each/code".into(), "build".into())]));
        for wrong in ["a", "=b", "a="] {
            assert!(renamed(&[wrong]).is_err(), "{wrong}");
        }
        assert_eq!(duration("1h30m"), Ok(Duration::from_secs(5_400)));
        assert!(duration("soon").is_err());
    }
}
