//! `implement@1`: one item of the plan becomes changed files.
//!
//! It opens a private worktree, packs what the item needs of the code, lets a model work there with tools, and leaves
//! a snapshot. Whether the work is any good is for `check@1` to say. See [`crate::tools`] for the loop.

use crate::{
    check, contract,
    edit::{Frozen, path},
    index::Index,
    orchestrator::{Opening, Orchestrator, Role},
    todo::{self, Todo},
    toolbox::Toolbox,
    tools::{
        AgentLoop, Ending, Goal, TURNS_MAX, Tool, Worktree,
        prompt::{self, Spare},
    },
    usage::{PlannedCall, Reserve},
    workspace::Workspace,
};
use chrono::{DateTime, Utc};
use futures_util::future::BoxFuture;
use loopwright_engine::{
    Failure,
    activity::{Activity, AttemptInfo, Context},
    signature::Signature,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::sync::Arc;
use uuid::Uuid;

/// Its name in definitions.
pub const NAME: &str = "implement@1";
/// What its calls are for, as routing and usage name it.
const PURPOSE: &str = "implement";
/// The prompt file, in the bundle of a definition.
pub const PROMPT: &str = "prompts/implement.hbs";
const SHIPPED_PROMPT: &str = include_str!("../../workflow-defs/prompts/implement.hbs");
/// Files that no implementer may change: the plan and the record of it.
pub const FROZEN: [&str; 2] = [todo::FILE, ARCHITECTURE];
/// The file of the architecture, which `plan@1` writes.
pub const ARCHITECTURE: &str = "docs/ARCHITECTURE.md";

/// Tokens of the repository map in the prompt.
const MAP_TOKENS: usize = 1500;
/// Tokens of packed code in the prompt; with the map 6,000.
const PACK_TOKENS: usize = 4500;
/// Most bytes of the architecture document in the prompt.
const ARCHITECTURE_BYTES_MAX: usize = 6 << 10;
/// Most bytes of `AGENTS.md` in the prompt: notes, not a manual.
pub(crate) const AGENTS_BYTES_MAX: usize = 8 << 10;
/// Most bytes of evidence in the prompt.
const EVIDENCE_BYTES_MAX: usize = 12 << 10;
/// What is given up of the prompt where a window is too small: most of it can be read with tools. The item with its checks stays.
const SPARE: &Spare = &[
    &[("context", 6 << 10), ("map", 2 << 10)],
    &[("architecture", 2 << 10), ("agents", 2 << 10), ("evidence", 6 << 10)],
    &[("context", 0), ("map", 0)],
    &[("architecture", 0), ("agents", 0), ("evidence", 3 << 10)],
];
/// Output limit of one turn: a file of some 600 lines.
const OUTPUT_TOKENS_MAX: u32 = 8192;
/// Turns that the first hold covers; most items need fewer, and a hold grows when a call would exceed it.
const RESERVED_TURNS: u32 = 8;
/// Prompt tokens per turn that the hold covers: opening and a conversation of medium length.
const RESERVED_INPUT_TOKENS: u64 = 16_000;
/// Longest summary that is passed on, in bytes.
pub(crate) const SUMMARY_BYTES_MAX: usize = 2000;

/// What `implement@1` is given.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
pub struct Input {
    #[schemars(with = "String")]
    pub project_id: Uuid,
    /// One item of the plan's data.
    pub todo: Todo,
    #[serde(default)]
    pub role: Worker,
    /// The last check's output, if this is a repair; its `work` is the snapshot to go on from.
    #[serde(default)]
    pub evidence: Value,
}

/// Which role does the work.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Worker {
    #[default]
    Implementer,
    Architect,
}

impl From<Worker> for Role {
    fn from(worker: Worker) -> Self {
        match worker {
            Worker::Implementer => Self::Implementer,
            Worker::Architect => Self::Architect,
        }
    }
}

/// What `implement@1` leaves.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Output {
    /// The snapshot of the worktree.
    pub work: String,
    /// Files that differ from the last commit, by path.
    pub changed_files: Vec<String>,
    /// The model's own words.
    pub summary: String,
    pub turns: u32,
    pub model: String,
    pub provider: String,
}

/// The activity.
pub struct Implement(Arc<Toolbox>);

impl Implement {
    #[must_use]
    pub fn new(toolbox: Arc<Toolbox>) -> Self {
        Self(toolbox)
    }
}

/// The contract.
#[must_use]
pub fn signature() -> Signature {
    contract::signature::<Input, Output>(
        NAME,
        "Changes a project's files until one item of its plan is done",
        &[&["model.no_progress"], contract::MODEL_FAILURES].concat(),
    )
}

impl Activity for Implement {
    fn signature(&self) -> Signature {
        signature()
    }

    fn run(&self, ctx: Context, input: Value) -> BoxFuture<'static, Result<Value, Failure>> {
        let toolbox = self.0.clone();
        contract::run(ctx, input, move |ctx, input| async move { work(&toolbox, &ctx, input).await })
    }

    fn reserve(&self, input: &Value, extras: &Value) -> Value {
        let role = input.get("role").and_then(|role| Worker::deserialize(role).ok()).unwrap_or_default();
        reserve(planned(&self.0.orchestrator, role.into(), extras, 1))
    }
}

/// What `items` items are expected to ask for at most.
pub(crate) fn planned(orchestrator: &Orchestrator, role: Role, extras: &Value, items: u32) -> PlannedCall {
    let turns = RESERVED_TURNS.saturating_mul(items);
    orchestrator.planned((role, PURPOSE), extras, turns, RESERVED_INPUT_TOKENS, OUTPUT_TOKENS_MAX)
}

pub(crate) fn reserve(call: PlannedCall) -> Value {
    // A struct of numbers and strings always has a JSON form.
    serde_json::to_value(Reserve { calls: vec![call] }).unwrap_or_default()
}

async fn work(toolbox: &Toolbox, ctx: &Context, input: Input) -> Result<Output, Failure> {
    let info = ctx.info();
    let base = input.evidence.get("work").and_then(Value::as_str).filter(|oid| !oid.is_empty());
    let bench = open(toolbox, info, input.project_id, base).await?;
    let frozen = Frozen::new(FROZEN.into_iter().chain(input.todo.frozen.iter().map(String::as_str)));
    let agent = AgentLoop {
        orchestrator: toolbox.orchestrator.clone(),
        role: input.role.into(),
        purpose: PURPOSE.to_owned(),
        tools: Tool::ALL.to_vec(),
        goal: Goal::Change,
        frozen: frozen.clone(),
        turns_max: TURNS_MAX,
        max_output_tokens: OUTPUT_TOKENS_MAX,
    };
    let outcome = agent.run(ctx, &bench.tree, || opening(ctx, &bench.tree, &input, &frozen, base.is_some())).await?;
    let summary = match outcome.ending {
        Ending::Done | Ending::Text if outcome.summary.is_empty() => input.todo.title.clone(),
        _ => prompt::middle_out(&outcome.summary, SUMMARY_BYTES_MAX),
    };
    let workspace = bench.tree.workspace();
    let message = format!("{}: {}", input.todo.id, input.todo.title);
    let work = workspace.snapshot(&message, instant(info)).await?;
    Ok(Output {
        work,
        changed_files: changed(workspace).await?,
        summary,
        turns: outcome.turns,
        model: outcome.model,
        provider: outcome.provider,
    })
}

/// A worktree with its index; the index goes with the attempt.
pub(crate) struct Desk {
    pub(crate) tree: Worktree,
    _scratch: tempfile::TempDir,
}

/// Opens a private worktree of the project for this attempt, on top of the snapshot `base` if there is one.
///
/// # Errors
/// The workspace's; `transient.disk` when the worker's scratch folder cannot be used; `index.failed`.
pub(crate) async fn open(
    toolbox: &Toolbox,
    info: &AttemptInfo,
    project: Uuid,
    base: Option<&str>,
) -> Result<Desk, Failure> {
    let workspace = toolbox.workspaces.open(project, info.attempt_id, base).await?;
    let root = toolbox.data_dir.join("scratch");
    let scratch = std::fs::create_dir_all(&root)
        .and_then(|()| tempfile::Builder::new().prefix("index-").tempdir_in(&root))
        .map_err(|error| {
            Failure::retryable("transient.disk", format!("the worker's scratch folder cannot be used: {error}"))
        })?;
    let index = Index::open(scratch.path())
        .map_err(|error| Failure::permanent("index.failed", format!("the code index cannot be opened: {error}")))?;
    Ok(Desk { tree: Worktree::new(workspace, toolbox.sandbox.clone(), index), _scratch: scratch })
}

/// Paths that differ from the last commit, in order.
pub(crate) async fn changed(workspace: &Workspace) -> Result<Vec<String>, Failure> {
    let mut paths: Vec<String> = workspace.changes().await?.into_iter().map(|change| change.path).collect();
    paths.sort();
    Ok(paths)
}

/// The instant that everything written by this run carries: the run's start, from its id.
///
/// The same history then gives the same commit ids, on whatever machine and however often it is worked off.
pub(crate) fn instant(info: &AttemptInfo) -> DateTime<Utc> {
    info.run_id
        .0
        .get_timestamp()
        .and_then(|stamp| {
            let (seconds, _) = stamp.to_unix();
            DateTime::from_timestamp(i64::try_from(seconds).ok()?, 0)
        })
        .unwrap_or(info.run_started_at)
}

/// A file of the worktree for a prompt: its start, at most `bytes_max`; empty where there is none.
pub(crate) fn excerpt(workspace: &Workspace, file: &str, bytes_max: usize) -> String {
    // What cannot be read as text says nothing to a model.
    let text = workspace.read(file).ok().flatten().unwrap_or_default();
    prompt::middle_out(text.trim(), bytes_max)
}

async fn opening(
    ctx: &Context,
    tree: &Worktree,
    input: &Input,
    frozen: &Frozen,
    continued: bool,
) -> Result<Opening, Failure> {
    let workspace = tree.workspace();
    let (map, context) = context(tree, &input.todo).await?;
    let evidence = check::lesson(&input.evidence);
    let evidence = match &evidence {
        Value::Null => String::new(),
        Value::Object(fields) if fields.is_empty() => String::new(),
        evidence => prompt::readable(evidence, EVIDENCE_BYTES_MAX),
    };
    let data = json!({
        "item": input.todo,
        "frozen": frozen.iter().collect::<Vec<_>>(),
        "architecture": excerpt(workspace, ARCHITECTURE, ARCHITECTURE_BYTES_MAX),
        "agents": excerpt(workspace, "AGENTS.md", AGENTS_BYTES_MAX),
        "map": map,
        "context": context,
        "evidence": evidence,
        "continued": continued,
    });
    prompt::opening(ctx, PROMPT, SHIPPED_PROMPT, &data, SPARE)
}

/// The repository map and the code that the item is likely to need.
async fn context(tree: &Worktree, todo: &Todo) -> Result<(String, String), Failure> {
    let files = todo.files.iter().filter(|file| path::normal(file).is_ok()).cloned().collect::<Vec<_>>().join(" ");
    let query = format!("{} {} {files}", todo.title, todo.detail);
    tree.ask(move |index| Ok((index.map(MAP_TOKENS)?, index.pack(&query, PACK_TOKENS)?.text))).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::orchestrator::Message;
    use loopwright_engine::{activity::detached, ids::RunId};

    fn todo() -> Value {
        json!({
            "id": "greeting", "title": "Greet by name", "detail": "Print {{name}}.", "requirements": ["R1", "R2"],
            "depends_on": [], "files": ["greet.sh"], "checks": [{"command": "sh test.sh", "expect_exit": 0, "timeout_s": 60}]
        })
    }

    #[test]
    fn the_prompt_renders_for_first_tries_and_repairs() {
        let ctx = detached::context(detached::info(NAME, Value::Null), Default::default(), Default::default());
        let todo: Todo = serde_json::from_value(todo()).expect("an item");
        let mut data = json!({
            "item": todo, "frozen": FROZEN, "architecture": "", "agents": "", "map": "", "context": "", "evidence": "",
            "continued": false,
        });
        let text =
            |data: &Value| match prompt::messages(&ctx, PROMPT, SHIPPED_PROMPT, data).expect("renders").as_slice() {
                [Message::System { text: system }, Message::User { text }] => {
                    assert!(system.starts_with("You are the implementer"));
                    text.clone()
                }
                other => panic!("{other:?}"),
            };
        let first = text(&data);
        assert!(first.contains("# Item greeting: Greet by name\n\nPrint {{name}}.\n"), "{first}");
        for part in [
            "Requirements: R1, R2",
            "- greet.sh",
            "- `sh test.sh` has to exit with 0",
            "TODO.md, docs/ARCHITECTURE.md",
            "no code yet",
        ] {
            assert!(first.contains(part), "{part}: {first}");
        }
        assert!(!first.contains("last try") && !first.contains("<architecture"));
        for (name, value) in
            [("map", "MAP"), ("agents", "NOTES"), ("evidence", "exit_code: 1"), ("architecture", "ARCH")]
        {
            data[name] = value.into();
        }
        data["continued"] = true.into();
        let repair = text(&data);
        for part in ["<map>\nMAP\n</map>", "rank below", "do not start over", "exit_code: 1", "ARCH"] {
            assert!(repair.contains(part), "{part}: {repair}");
        }
        // What all items of a run have in common comes first, what changes from round to round last.
        let places = ["ARCH", "NOTES", "MAP", "# Item greeting", "exit_code: 1"].map(|part| repair.find(part));
        assert!(places.is_sorted() && places[0].is_some(), "{places:?}");
    }

    #[test]
    fn the_smallest_packing_still_says_what_is_to_be_done() {
        let ctx = detached::context(detached::info(NAME, Value::Null), Default::default(), Default::default());
        let todo: Todo = serde_json::from_value(todo()).expect("an item");
        let long = "material\n".repeat(1_000);
        let data = json!({
            "item": todo, "frozen": FROZEN, "architecture": long, "agents": long, "map": long, "context": long,
            "evidence": long, "continued": true,
        });
        let opening = prompt::opening(&ctx, PROMPT, SHIPPED_PROMPT, &data, SPARE).expect("renders");
        assert_eq!(opening.smaller.len(), SPARE.len());
        for messages in &opening.smaller {
            let [system, Message::User { text }] = messages.as_slice() else { panic!("{messages:?}") };
            assert_eq!(*system, opening.messages[0]);
            for part in [
                "# Item greeting: Greet by name",
                "Print {{name}}.",
                "R1, R2",
                "`sh test.sh` has to exit with 0",
                "TODO.md",
            ] {
                assert!(text.contains(part), "{part}: {text}");
            }
            assert!(text.contains("left out"));
        }
        let Some([_, Message::User { text }]) = opening.smaller.last().map(Vec::as_slice) else { panic!() };
        assert!(text.len() < 5_000 && text.contains("material"), "{text}");
    }

    #[test]
    fn inputs_are_read_with_their_defaults() {
        let id = Uuid::nil().to_string();
        let input: Input = contract::parse(json!({"project_id": id, "todo": todo(), "evidence": {}})).expect("fits");
        assert_eq!((input.role, input.todo.checks[0].expect_exit), (Worker::Implementer, 0));
        let failure = contract::parse::<Input>(json!({"project_id": "x", "todo": todo()})).expect_err("no uuid");
        assert_eq!(failure.code, "input.invalid");
    }

    #[test]
    fn the_instant_is_the_run_s_start_in_whole_seconds() {
        let mut info = detached::info(NAME, Value::Null);
        info.run_id = RunId("01900000-0000-7000-8000-000000000000".parse().expect("a uuid"));
        assert_eq!(instant(&info).timestamp_millis(), 0x0190_0000_0000 / 1000 * 1000);
        info.run_id = RunId(Uuid::nil());
        assert_eq!(instant(&info), info.run_started_at);
    }
}
