//! `loopwright run start`: a run of a deployed workflow, by its name.

use crate::{
    app::App,
    cli::{failure::refuse, print, schedule::inputs_of},
};
use anyhow::Context as _;
use loopwright_engine::{
    admission::{Admission, IdConflict, IdReuse, OnConflict, Place, Priority, Rate},
    client::{Start, Started},
};
use serde_json::Value;
use std::time::Duration;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The workflow's name; `current` of it is started
    workflow: String,
    /// Its inputs: a JSON object, or @FILE
    #[arg(long, value_name = "JSON", default_value = "{}")]
    inputs: String,
    /// Whose it is and what it is found by
    #[arg(long, value_name = "JSON", default_value = "{}")]
    attributes: String,
    /// At most one open run has this id
    #[arg(long)]
    id: Option<String>,
    /// If the last run under the id has closed: allow_duplicate, allow_duplicate_failed_only, reject_duplicate
    #[arg(long, requires = "id", value_name = "POLICY", default_value = IdReuse::AllowDuplicate.as_str())]
    id_reuse: IdReuse,
    /// If a run under the id is open: use_existing, fail, terminate_existing
    #[arg(long, requires = "id", value_name = "POLICY", default_value = IdConflict::UseExisting.as_str())]
    id_conflict: IdConflict,
    /// The task queue
    #[arg(long, default_value = "default")]
    queue: String,
    /// 1 is first, 5 last
    #[arg(long, default_value_t = Priority::default().number())]
    priority: i16,
    /// Runs of one priority take turns by this [default: the attribute user_id]
    #[arg(long, value_name = "KEY")]
    fairness_key: Option<String>,
    /// At most --group-limit runs of this group are under way [default: what the definition says]
    #[arg(long, value_name = "NAME")]
    group: Option<String>,
    #[arg(long, requires = "group", value_name = "RUNS", default_value_t = 1)]
    group_limit: u32,
    /// If the group is full
    #[arg(long, requires = "group", value_enum, default_value_t = Full::Queue)]
    group_full: Full,
    /// Starts under this key begin at most so many in a period; the others wait for their time
    #[arg(long, value_name = "KEY", requires_all = ["rate_starts", "rate_per"])]
    rate: Option<String>,
    #[arg(long, requires = "rate", value_name = "STARTS")]
    rate_starts: Option<u32>,
    #[arg(long, requires = "rate", value_name = "SECONDS")]
    rate_per: Option<u32>,
    /// No run that continues it goes on for longer, counted from now
    #[arg(long, value_name = "SECONDS")]
    chain_timeout: Option<u64>,
}

/// What a run does that finds no place in its group.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Full {
    /// Wait, in the order of arrival
    Queue,
    /// Cancel it at once: it gives way to those that are there
    CancelNew,
    /// Cancel the oldest and wait for their end
    CancelRunning,
    /// Start nothing
    Fail,
}

impl From<Full> for OnConflict {
    fn from(full: Full) -> Self {
        match full {
            Full::Queue => Self::Queue,
            Full::CancelNew => Self::CancelNew,
            Full::CancelRunning => Self::CancelRunning,
            Full::Fail => Self::Fail,
        }
    }
}

pub(super) async fn act(args: Args, app: &App, json: bool) -> anyhow::Result<()> {
    let client = &app.client;
    let place = |group| Place { group, limit: args.group_limit, on_conflict: args.group_full.into() };
    let rate = |key| {
        let (starts, seconds) = (args.rate_starts?, args.rate_per?);
        Some(Rate { key, starts, per_ms: i64::from(seconds) * 1_000 })
    };
    let start = Start {
        run_id: None,
        definition: client.pointer(&args.workflow, "current").await?,
        inputs: inputs_of(&args.inputs)?,
        workflow_id: args.id,
        attributes: attributes_of(&args.attributes)?,
        queue: args.queue,
        topic: None,
        admission: Admission {
            priority: Priority::new(args.priority)?,
            id_reuse: args.id_reuse,
            id_conflict: args.id_conflict,
            chain_timeout: args.chain_timeout.map(Duration::from_secs),
            fairness_key: args.fairness_key,
            place: args.group.map(place),
            rate: args.rate.and_then(rate),
        },
    };
    let Started { run_id, created } = client.start(start).await?;
    print(json, &serde_json::json!({"run_id": run_id, "created": created}), |_| match created {
        true => format!("Started run {run_id}."),
        false => format!("Run {run_id} is open under this id; nothing was started."),
    })
}

fn attributes_of(text: &str) -> anyhow::Result<Value> {
    let value: Value =
        serde_json::from_str(text).context("the attributes are not JSON; write --attributes '{\"name\": value}'")?;
    if !value.is_object() {
        return Err(refuse("json_invalid", "the attributes are a JSON object: {\"name\": value}"));
    }
    Ok(value)
}
