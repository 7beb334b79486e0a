//! Commands that carry a run out into a file and in again, and decide its history once more.

use crate::{
    app::App,
    cli::{Context, EXIT_FAILED, failure::refuse, print, workflow},
};
use anyhow::Context as _;
use loopwright_engine::{archive::Archive, ids::RunId, machine::replay::Replayed};
use serde_json::json;
use std::{
    fs::File,
    io::{BufReader, Write},
    path::Path,
};

/// Writes a run to standard output, as lines of JSON.
pub(super) async fn export(run: RunId, app: &App) -> anyhow::Result<()> {
    let mut export = app.client.export(run).await?;
    let mut out = std::io::stdout().lock();
    while let Some(line) = export.next().await? {
        out.write_all(line.as_bytes()).context("the export cannot be written; what is there is not whole")?;
    }
    out.flush().context("the export cannot be written; what is there is not whole")
}

pub(super) async fn import(file: &Path, app: &App, json: bool) -> anyhow::Result<()> {
    let archive = read(file)?;
    let rows = archive.history.len();
    let run = app.client.import(archive).await?;
    print(json, &json!({"run_id": run, "transitions": rows}), |_| {
        format!("Run {run} can be read here; it is never executed. Transitions: {rows}.")
    })
}

/// Decides a history again. Exit code 1 if it differs.
///
/// A file needs no database; its other definition, if one is named, is a file too.
pub(super) async fn replay(target: &str, definition: Option<&str>, context: Context) -> anyhow::Result<u8> {
    let json = context.json;
    let replayed = match target.parse::<RunId>() {
        Ok(run) => {
            let app = context.open().await?;
            let replayed = replay_of(run, definition, &app).await;
            app.close().await;
            replayed?
        }
        Err(_) if !Path::new(target).exists() => {
            let text = format!("{target} is neither the id of a run nor a file; `run list` shows the runs");
            return Err(refuse("run_not_found", text));
        }
        Err(_) => {
            let archive = read(Path::new(target))?;
            match definition {
                None => archive.replay(None)?,
                Some(file) => match workflow::compiled(Path::new(file), json)? {
                    Some(compiled) => archive.replay(Some(&compiled.definition))?,
                    None => return Ok(EXIT_FAILED),
                },
            }
        }
    };
    print(json, &replayed, report)?;
    Ok(if replayed.divergence.is_some() { EXIT_FAILED } else { 0 })
}

async fn replay_of(run: RunId, definition: Option<&str>, app: &App) -> anyhow::Result<Replayed> {
    let definition = match definition {
        Some(text) => Some(app.client.definition_named(&app.client.describe(run).await?.workflow, text).await?),
        None => None,
    };
    Ok(app.client.replay(run, definition).await?)
}

fn report(replayed: &Replayed) -> String {
    let Replayed { decided, folded, events, divergence } = replayed;
    let shared = if *folded > 0 {
        format!("; {folded} that are another run's, or a fork or migration, were folded")
    } else {
        String::new()
    };
    match divergence {
        None => format!("The same decisions: {decided} transitions, {events} events{shared}."),
        Some(d) => {
            let side = |event: &Option<serde_json::Value>| match event {
                Some(event) => event.to_string(),
                None => "nothing".into(),
            };
            format!(
                "Transition {} differs at its event {}.\nexpected  {}\nfound     {}",
                d.seq,
                d.event,
                side(&d.expected),
                side(&d.found)
            )
        }
    }
}

fn read(file: &Path) -> anyhow::Result<Archive> {
    let open = File::open(file).with_context(|| format!("{} cannot be read", file.display()))?;
    Archive::read(BufReader::new(open)).with_context(|| file.display().to_string())
}
