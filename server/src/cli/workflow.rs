//! `loopwright workflow`: definitions as files and as deployed versions. Checking needs no database.

use super::{Context, EXIT_FAILED, failure::refuse, print, run::migrate, schedule::belongs_to, table};
use crate::app::{self, App};
use anyhow::Context as _;
use loopwright_engine::{
    Error,
    client::{Deploy, Version},
    definition::Bundle,
    schedule::{ScheduleView, Spec, door::NewSchedule},
};
use loopwright_workflows::{Compiled, Diagnostic, Severity, compile, mermaid, render, schedules};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use uuid::Uuid;

/// Author of what is deployed from here.
const AUTHOR: &str = "operator";
/// Folder beside a definition whose `*.hbs` go with it.
const PROMPTS: &str = "prompts";
/// Most prompt files of one definition. Chosen, not measured: the shipped ones are fewer than ten.
const PROMPTS_MAX: usize = 100;
/// Largest prompt file, in bytes. Chosen, not measured: a prompt above it leaves a model no room to work.
const PROMPT_BYTES_MAX: u64 = 256 << 10;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Check definitions; exit code 1 if one has an error
    Lint {
        #[arg(required = true, value_name = "FILE")]
        files: Vec<PathBuf>,
    },
    /// Draw a definition as a mermaid flow chart
    Graph { file: PathBuf },
    /// Check a definition and deploy it with the prompts beside it; runs that begin from now on use it
    Deploy {
        file: PathBuf,
        /// What changed, for the list of versions
        #[arg(long, value_name = "TEXT")]
        message: Option<String>,
        #[command(flatten)]
        whose: Whose,
    },
    /// List the deployed versions of a definition, newest first
    Versions { name: String },
    /// The same as `run migrate`
    Migrate(Box<migrate::Args>),
}

/// Whose the runs of `on: cron` are.
#[derive(Debug, clap::Args)]
struct Whose {
    /// Whose the runs of `on: cron` are, and who pays for them [default: as before, else the developer]
    #[arg(long, value_name = "UUID")]
    user: Option<Uuid>,
    /// A project of that user, whose they are and never two at a time
    #[arg(long, value_name = "UUID")]
    project: Option<Uuid>,
}

pub(crate) async fn run(args: Args, context: Context) -> anyhow::Result<u8> {
    match args.command {
        Command::Lint { files } => lint(&files, context.json),
        Command::Graph { file } => graph(&file, context.json),
        Command::Deploy { file, message, whose } => deploy(&file, message, whose, context).await,
        Command::Versions { name } => {
            let json = context.json;
            let app = context.open().await?;
            let done = versions(&name, &app, json).await;
            app.close().await;
            done
        }
        Command::Migrate(args) => {
            let json = context.json;
            let app = context.open().await?;
            let done = migrate::act(*args, &app, json).await;
            app.close().await;
            done
        }
    }
}

/// A file, compiled.
struct Checked {
    source: String,
    compiled: Option<Compiled>,
    found: Vec<Diagnostic>,
}

impl Checked {
    /// What a definition that was to be drawn or deployed came to. Findings go to standard error; in JSON the errors
    /// are printed in place of the result.
    fn accept(self, json: bool) -> anyhow::Result<Option<(Compiled, String)>> {
        match self.compiled {
            Some(compiled) => {
                eprint!("{}", render(&self.found, &self.source));
                Ok(Some((compiled, self.source)))
            }
            None => {
                if json {
                    print(true, &self.found, |_| String::new())?;
                } else {
                    eprint!("{}", render(&self.found, &self.source));
                }
                Ok(None)
            }
        }
    }
}

/// A definition from a file; `None` if it has errors, which are then printed.
pub(super) fn compiled(file: &Path, json: bool) -> anyhow::Result<Option<Compiled>> {
    Ok(check(file)?.accept(json)?.map(|(compiled, _)| compiled))
}

fn check(file: &Path) -> anyhow::Result<Checked> {
    let source = std::fs::read(file).with_context(|| format!("{} cannot be read", file.display()))?;
    let source = String::from_utf8(source)
        .map_err(|_| refuse("file_failed", format!("{} is not UTF-8 text; save it as that", file.display())))?;
    let bundle = prompts(file)?;
    let (compiled, found) = compile(&source, &file.display().to_string(), &bundle, &app::catalog());
    Ok(Checked { source, compiled, found })
}

/// The prompt files beside a definition, by relative path.
fn prompts(file: &Path) -> anyhow::Result<Bundle> {
    let folder = file.parent().unwrap_or(Path::new("")).join(PROMPTS);
    let unreadable = |path: &Path| format!("{} cannot be read", path.display());
    let mut bundle = Bundle::new();
    if !folder.is_dir() {
        return Ok(bundle);
    }
    for entry in std::fs::read_dir(&folder).with_context(|| unreadable(&folder))? {
        let path = entry.with_context(|| unreadable(&folder))?.path();
        let Some(name) = path.file_name().and_then(|n| n.to_str()).filter(|n| n.ends_with(".hbs")) else { continue };
        let size = path.metadata().with_context(|| unreadable(&path))?.len();
        if size > PROMPT_BYTES_MAX {
            let text = format!("{} has {size} bytes; at most {PROMPT_BYTES_MAX}", path.display());
            return Err(refuse("too_large", text));
        }
        let text = std::fs::read_to_string(&path).with_context(|| unreadable(&path))?;
        bundle.insert(format!("{PROMPTS}/{name}"), text);
        if bundle.len() > PROMPTS_MAX {
            let text = format!("{} has more than {PROMPTS_MAX} prompts; take some away", folder.display());
            return Err(refuse("too_large", text));
        }
    }
    Ok(bundle)
}

fn lint(files: &[PathBuf], json: bool) -> anyhow::Result<u8> {
    let (mut found, mut text) = (Vec::new(), String::new());
    for file in files {
        let checked = check(file)?;
        text.push_str(&render(&checked.found, &checked.source));
        found.extend(checked.found);
    }
    let errors = found.iter().filter(|d| d.severity == Severity::Error).count();
    print(json, &found, |found| {
        let count = |n: usize, what: &str| format!("{n} {what}{}", if n == 1 { "" } else { "s" });
        let rest = found.len() - errors;
        format!("{text}{}: {}, {}", count(files.len(), "file"), count(errors, "error"), count(rest, "other finding"))
    })?;
    Ok(if errors > 0 { EXIT_FAILED } else { 0 })
}

fn graph(file: &Path, json: bool) -> anyhow::Result<u8> {
    let Some((compiled, _)) = check(file)?.accept(json)? else { return Ok(EXIT_FAILED) };
    let chart = json!({"name": compiled.definition.name, "mermaid": mermaid(&compiled.definition)});
    print(json, &chart, |chart| chart["mermaid"].as_str().unwrap_or_default().to_owned())?;
    Ok(0)
}

async fn deploy(file: &Path, message: Option<String>, whose: Whose, context: Context) -> anyhow::Result<u8> {
    let json = context.json;
    let Some((compiled, source)) = check(file)?.accept(json)? else {
        if !json {
            eprintln!("Nothing was deployed.");
        }
        return Ok(EXIT_FAILED);
    };
    let app = context.open().await?;
    let deployed = deploy_in(&app, compiled, source, message, whose).await;
    app.close().await;
    print(json, &deployed?, |report| {
        let text = |key: &str| report[key].as_str().unwrap_or_default().to_owned();
        let how = if report["created"] == true { "new" } else { "was deployed before" };
        let mut out = format!("{} version {} is current ({how})\n{}", text("name"), report["version"], text("hash"));
        for schedule in report["schedules"].as_array().into_iter().flatten() {
            let next = schedule["next_at"].as_str().unwrap_or("no time: paused");
            out.push_str(&format!("\n{} next at {next}", schedule["name"].as_str().unwrap_or_default()));
        }
        out
    })?;
    Ok(0)
}

async fn deploy_in(
    app: &App,
    compiled: Compiled,
    source: String,
    message: Option<String>,
    whose: Whose,
) -> anyhow::Result<Value> {
    let name = compiled.definition.name.clone();
    let crons = schedules(&compiled.definition);
    let Compiled { definition, bundle } = compiled;
    let deploy = Deploy { definition, bundle, source, author: Some(AUTHOR.into()), message };
    let deployed = app.client.deploy(deploy).await?;
    // If we die here, the schedules are those of the version before until the same command is given again.
    let kept = keep_schedules(app, &name, crons, &whose)
        .await
        .context("the definition is deployed, its schedules are not yet; deploy again")?;
    let kept: Vec<_> = kept.iter().map(|s| json!({"name": s.name, "next_at": s.next_at})).collect();
    Ok(json!({
        "name": name, "version": deployed.version, "hash": deployed.hash.to_string(), "created": deployed.created,
        "schedules": kept,
    }))
}

/// Makes, changes and deletes the schedules of a definition's `on: cron`. Idempotent.
async fn keep_schedules(
    app: &App,
    workflow: &str,
    crons: Vec<Spec>,
    whose: &Whose,
) -> anyhow::Result<Vec<ScheduleView>> {
    let door = app.client.schedules();
    let named = |n: usize| format!("{workflow}/cron/{n}");
    let mut kept = Vec::new();
    for (n, mut spec) in (1..).zip(crons) {
        let before = match door.describe(&named(n)).await {
            Ok(detail) => Some(detail.schedule),
            Err(Error::ScheduleNotFound(_)) => None,
            Err(error) => return Err(error.into()),
        };
        (spec.attributes, spec.workflow_id) = match &before {
            Some(view) if whose.user.is_none() && whose.project.is_none() => {
                (view.spec.attributes.clone(), view.spec.workflow_id.clone())
            }
            _ => belongs_to(app, whose.user, whose.project).await?,
        };
        kept.push(match before {
            Some(view) => door.update(&view.name, spec).await?,
            None => {
                let owner = Some(AUTHOR.to_owned());
                door.create(NewSchedule { name: named(n), spec, paused: false, note: None, owner }).await?
            }
        });
    }
    for gone in kept.len() + 1.. {
        match door.delete(&named(gone)).await {
            Ok(()) => {}
            Err(Error::ScheduleNotFound(_)) => break,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(kept)
}

async fn versions(name: &str, app: &App, json: bool) -> anyhow::Result<u8> {
    let versions = app.client.versions(name).await?;
    if versions.is_empty() {
        let text = format!("no workflow {name} is deployed; `loopwright workflow deploy FILE`");
        return Err(refuse("definition_not_found", text));
    }
    let value = |v: &Version| {
        json!({
            "version": v.version, "hash": v.hash.to_string(), "current": v.current, "author": v.author,
            "message": v.message, "created_at": v.created_at,
        })
    };
    print(json, &versions.iter().map(value).collect::<Vec<Value>>(), |_| {
        let row = |v: &Version| {
            vec![
                v.version.to_string(),
                if v.current { "current".into() } else { String::new() },
                v.hash.to_string()[..12].to_owned(),
                v.created_at.format("%F %R").to_string(),
                v.author.clone().unwrap_or_default(),
                v.message.clone().unwrap_or_default(),
            ]
        };
        let head = ["version", "", "hash", "deployed", "author", "message"];
        table(&head, &versions.iter().map(row).collect::<Vec<_>>())
    })?;
    Ok(0)
}
