//! `loopwright schedule`: runs that the clock starts. For whoever operates this installation, over all users.

use super::{Context, failure::refuse, print, table, token::DEVELOPER};
use crate::{app::App, store::projects::workflow_id};
use anyhow::Context as _;
use chrono::{DateTime, NaiveDate, SecondsFormat, Utc};
use clap::builder::{PossibleValuesParser, TypedValueParser};
use loopwright_engine::schedule::{Action, Overlap, ScheduleDetail, ScheduleView, Spec, When, door::NewSchedule};
use loopwright_workflows::parse_duration;
use serde_json::{Value, json};
use uuid::Uuid;

/// Who makes what is made from here.
const OWNER: &str = "operator";
/// Largest file of inputs, in bytes. The engine's own limit on inputs is the same.
const INPUTS_BYTES_MAX: u64 = 1 << 20;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Make a schedule
    Create(Box<Create>),
    /// List schedules by name
    List {
        /// Begin after this name
        #[arg(long, value_name = "NAME")]
        after: Option<String>,
        #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=200))]
        limit: u32,
    },
    /// Show a schedule, its next instants and what the last ones came to
    Show { name: String },
    /// Start nothing by the clock from now on; what waits is skipped
    Pause {
        name: String,
        /// Why, for others to read
        #[arg(long, value_name = "TEXT")]
        note: Option<String>,
    },
    /// Go on with the next instant; what passed meanwhile is not caught up
    Resume {
        name: String,
        #[arg(long, value_name = "TEXT")]
        note: Option<String>,
    },
    /// Start a run now
    Trigger {
        name: String,
        /// If an earlier run is open [default: the schedule's]
        #[arg(long, value_name = "POLICY", value_parser = overlap())]
        overlap: Option<Overlap>,
    },
    /// Start the runs of a time in the past that has none
    Backfill {
        name: String,
        /// First instant: 2026-11-25 or 2026-11-25T10:00:00Z
        #[arg(long, value_name = "INSTANT", value_parser = instant)]
        from: DateTime<Utc>,
        /// Last instant
        #[arg(long, value_name = "INSTANT", value_parser = instant)]
        to: DateTime<Utc>,
        /// If an earlier run is open [default: the schedule's; `skip` would start one only]
        #[arg(long, value_name = "POLICY", value_parser = overlap())]
        overlap: Option<Overlap>,
    },
    /// Delete a schedule; its runs go on
    Delete { name: String },
}

#[derive(Debug, clap::Args)]
#[command(group(clap::ArgGroup::new("when").required(true).args(["cron", "every"])))]
struct Create {
    name: String,
    /// The workflow that it starts, in its current version
    workflow: String,
    /// Five fields: minute hour day month weekday, for example "0 3 * * mon-fri"
    #[arg(long, value_name = "EXPRESSION")]
    cron: Option<String>,
    /// Of the expression
    #[arg(long, value_name = "ZONE", default_value = "UTC", conflicts_with = "every")]
    timezone: String,
    /// An interval instead: 10m, 1h30m, 7d
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    every: Option<u64>,
    /// Of the interval's multiples since 1970
    #[arg(long, value_name = "DURATION", value_parser = duration, default_value = "0s", requires = "every")]
    offset: u64,
    /// A JSON object, or @FILE
    #[arg(long, value_name = "JSON", default_value = "{}")]
    inputs: String,
    /// Whose runs they are, and who pays for them [default: the developer]
    #[arg(long, value_name = "UUID")]
    user: Option<Uuid>,
    /// A project of that user: the runs are its, and never two at a time
    #[arg(long, value_name = "UUID")]
    project: Option<Uuid>,
    /// If an earlier run is open
    #[arg(long, value_name = "POLICY", value_parser = overlap(), default_value = "skip")]
    overlap: Overlap,
    /// How late an instant may start after a downtime
    #[arg(long, value_name = "DURATION", value_parser = duration, default_value = "1m")]
    catchup: u64,
    /// Start up to that much later, each instant by a part of its own
    #[arg(long, value_name = "DURATION", value_parser = duration, default_value = "0s")]
    jitter: u64,
    /// Rest after so many runs
    #[arg(long, value_name = "RUNS")]
    limit: Option<u32>,
    /// Task queue of its runs
    #[arg(long, default_value = "")]
    queue: String,
    /// Make it paused
    #[arg(long)]
    paused: bool,
    #[arg(long, value_name = "TEXT")]
    note: Option<String>,
    /// If there is one of this name, change it to this
    #[arg(long, conflicts_with_all = ["paused", "note"])]
    replace: bool,
}

fn overlap() -> impl TypedValueParser<Value = Overlap> {
    PossibleValuesParser::new(Overlap::ALL.iter().map(|o| o.as_str()))
        .map(|text| Overlap::parse(&text).unwrap_or_default())
}

fn duration(text: &str) -> Result<u64, String> {
    parse_duration(text).ok_or_else(|| "write for example 90s, 10m, 1h30m or 7d".to_owned())
}

pub(super) fn instant(text: &str) -> Result<DateTime<Utc>, String> {
    let day = || text.parse::<NaiveDate>().ok()?.and_hms_opt(0, 0, 0).map(|t| t.and_utc());
    let full = DateTime::parse_from_rfc3339(text).ok().map(|t| t.with_timezone(&Utc));
    full.or_else(day).ok_or_else(|| "write 2026-11-25 or 2026-11-25T10:00:00Z".to_owned())
}

pub(crate) async fn run(args: Args, context: Context) -> anyhow::Result<()> {
    let json = context.json;
    let app = context.open().await?;
    let done = act(args.command, &app, json).await;
    app.close().await;
    done
}

async fn act(command: Command, app: &App, json: bool) -> anyhow::Result<()> {
    let schedules = app.client.schedules();
    match command {
        Command::Create(create) => {
            let view = make(*create, app).await?;
            print(json, &view, |view| {
                let next = view.next_at.map_or_else(|| "never".to_owned(), shown);
                format!("{} starts {} next at {next}", view.name, view.spec.workflow)
            })
        }
        Command::List { after, limit } => {
            let page = schedules.list(after.as_deref(), limit).await?;
            print(json, &page, |page| {
                let head =
                    ["name", "workflow", "when", "overlap", "next (UTC)", "started", "skipped", "missed", "failed"];
                table(&head, &page.iter().map(row).collect::<Vec<_>>())
            })
        }
        Command::Show { name } => print(json, &schedules.describe(&name).await?, show),
        Command::Pause { name, note } => print(json, &schedules.pause(&name, note).await?, |_| "Paused.".into()),
        Command::Resume { name, note } => print(json, &schedules.resume(&name, note).await?, |view| {
            format!("Next at {}.", view.next_at.map_or_else(|| "no time: its run limit is reached".to_owned(), shown))
        }),
        Command::Trigger { name, overlap } => print(json, &schedules.trigger(&name, overlap).await?, came_to),
        Command::Backfill { name, from, to, overlap } => {
            let filled = schedules.backfill(&name, from, to, overlap).await?;
            let report = json!({"instants": filled.instants, "added": filled.added});
            print(json, &report, |_| {
                format!("{} of {} instants are to be run; the others have been.", filled.added, filled.instants)
            })
        }
        Command::Delete { name } => {
            schedules.delete(&name).await?;
            print(json, &json!({"status": "deleted"}), |_| "Deleted; its runs go on.".into())
        }
    }
}

async fn make(create: Create, app: &App) -> anyhow::Result<ScheduleView> {
    let when = match (create.cron, create.every) {
        (Some(expression), _) => When::Cron { expression, timezone: create.timezone },
        (None, every) => When::Every { ms: every.unwrap_or(0), offset_ms: create.offset },
    };
    let mut spec = Spec {
        inputs: inputs_of(&create.inputs)?,
        queue: create.queue,
        overlap: create.overlap,
        catchup_ms: create.catchup,
        jitter_ms: create.jitter,
        run_limit: create.limit,
        ..Spec::new(create.workflow, when)
    };
    (spec.attributes, spec.workflow_id) = belongs_to(app, create.user, create.project).await?;
    let schedules = app.client.schedules();
    if create.replace {
        match schedules.update(&create.name, spec.clone()).await {
            Err(loopwright_engine::Error::ScheduleNotFound(_)) => {}
            other => return Ok(other?),
        }
    }
    let (paused, note, owner) = (create.paused, create.note, Some(OWNER.to_owned()));
    Ok(schedules.create(NewSchedule { name: create.name, spec, paused, note, owner }).await?)
}

/// Attributes and business key of runs that belong to a user, or to a project of that user.
pub(super) async fn belongs_to(
    app: &App,
    user: Option<Uuid>,
    project: Option<Uuid>,
) -> anyhow::Result<(Value, Option<String>)> {
    let user = match user {
        Some(user) => match app.store.balance(user).await? {
            Some(_) => user,
            None => return Err(no_user(user)),
        },
        None => {
            let issuer = &app.config.auth.issuer;
            app.store.user_of(issuer, DEVELOPER, issuer).await?.id
        }
    };
    let Some(project) = project else { return Ok((json!({"user_id": user.to_string()}), None)) };
    app.store.project(user, project).await?.ok_or_else(|| {
        let text = "name its owner by --user (`loopwright project list` knows all)";
        refuse("project_not_found", format!("user {user} has no project {project}; {text}"))
    })?;
    let attributes = json!({"user_id": user.to_string(), "project_id": project.to_string()});
    Ok((attributes, Some(workflow_id(project))))
}

/// Said of an id that is no user's.
pub(super) fn no_user(user: Uuid) -> anyhow::Error {
    refuse("user_not_found", format!("there is no user {user}; a user begins with a token or with the bot"))
}

/// JSON as typed, or from a file.
pub(super) fn inputs_of(text: &str) -> anyhow::Result<Value> {
    let text = match text.strip_prefix('@') {
        None => text.to_owned(),
        Some(file) => {
            let unreadable = || format!("{file} cannot be read");
            let size = std::fs::metadata(file).with_context(unreadable)?.len();
            if size > INPUTS_BYTES_MAX {
                return Err(refuse("too_large", format!("{file} has {size} bytes; at most {INPUTS_BYTES_MAX}")));
            }
            std::fs::read_to_string(file).with_context(unreadable)?
        }
    };
    let inputs: Value =
        serde_json::from_str(&text).context("the inputs are not JSON; write --inputs '{\"name\": value}'")?;
    if !inputs.is_object() {
        return Err(refuse("json_invalid", "the inputs are not a JSON object; write --inputs '{\"name\": value}'"));
    }
    Ok(inputs)
}

fn shown(at: DateTime<Utc>) -> String {
    at.to_rfc3339_opts(SecondsFormat::AutoSi, true)
}

fn when(spec: &Spec) -> String {
    match &spec.when {
        When::Cron { expression, timezone } => format!("{expression} {timezone}"),
        When::Every { ms, offset_ms } => {
            let offset = if *offset_ms > 0 { format!(" + {}", span(*offset_ms)) } else { String::new() };
            format!("every {}{offset}", span(*ms))
        }
    }
}

/// Milliseconds as people write them: `1h30m`.
fn span(ms: u64) -> String {
    let mut rest = ms;
    let mut out = String::new();
    for (unit, size) in [("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1_000), ("ms", 1)] {
        if rest >= size {
            out.push_str(&format!("{}{unit}", rest / size));
            rest %= size;
        }
    }
    if out.is_empty() { "0s".into() } else { out }
}

fn row(view: &ScheduleView) -> Vec<String> {
    let next = match (view.paused_at, view.next_at) {
        (Some(_), _) => "paused".to_owned(),
        (None, Some(next)) => next.format("%F %T").to_string(),
        (None, None) => "rests".to_owned(),
    };
    let count = |n: u64| n.to_string();
    vec![
        view.name.clone(),
        view.spec.workflow.clone(),
        when(&view.spec),
        view.spec.overlap.as_str().to_owned(),
        next,
        count(view.started),
        count(view.skipped),
        count(view.missed),
        count(view.failed),
    ]
}

fn came_to(action: &Action) -> String {
    let run = action.run_id.map(|run| format!(" {run}")).unwrap_or_default();
    let note = action.note.as_ref().map(|note| format!(": {note}")).unwrap_or_default();
    format!("{}{run}{note}", action.state.as_str())
}

fn show(detail: &ScheduleDetail) -> String {
    let (view, spec) = (&detail.schedule, &detail.schedule.spec);
    let mut out = format!(
        "schedule  {}\nworkflow  {}@{}\nwhen      {}\noverlap   {}\ncatch-up  {}\njitter    {}\nruns are  {}\n",
        view.name,
        spec.workflow,
        spec.pointer,
        when(spec),
        spec.overlap.as_str(),
        span(spec.catchup_ms),
        span(spec.jitter_ms),
        spec.attributes,
    );
    if let Some(left) = view.runs_left {
        out.push_str(&format!("runs left {left}\n"));
    }
    if let Some(paused) = view.paused_at {
        out.push_str(&format!("paused    {}\n", shown(paused)));
    }
    if let Some(note) = &view.note {
        out.push_str(&format!("note      {note}\n"));
    }
    for at in &detail.upcoming {
        out.push_str(&format!("next      {}\n", shown(*at)));
    }
    for run in &detail.open {
        out.push_str(&format!("open      {run}\n"));
    }
    let rows: Vec<_> = detail
        .recent
        .iter()
        .map(|a| {
            let run = a.run_id.map(|run| run.to_string()).unwrap_or_default();
            vec![
                shown(a.instant),
                a.kind.as_str().into(),
                a.state.as_str().into(),
                run,
                a.note.clone().unwrap_or_default(),
            ]
        })
        .collect();
    format!("{out}\n{}", table(&["instant", "by", "came to", "run", "note"], &rows))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_are_written_as_they_are_read() {
        for text in ["0s", "90ms", "1s", "10m", "1h30m", "7d", "1d2h3m4s5ms"] {
            assert_eq!(span(duration(text).expect("duration")), text);
        }
        assert!(duration("ten").is_err() && duration("10").is_err() && duration("").is_err());
    }

    #[test]
    fn inputs_are_an_object() {
        assert_eq!(inputs_of("{\"a\": 1}").expect("inputs"), json!({"a": 1}));
        for bad in ["", "[]", "3", "{", "@/nowhere/at/all"] {
            assert!(inputs_of(bad).is_err(), "{bad}");
        }
        assert_eq!(instant("2026-11-25").expect("day"), instant("2026-11-25T01:00:00+01:00").expect("instant"));
        assert!(instant("yesterday").is_err());
    }
}
