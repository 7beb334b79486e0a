//! `agent@1`: a prompt of the team's own, with the tools they choose, for an object or a text.

use crate::{
    contract,
    edit::Frozen,
    implement::{self, AGENTS_BYTES_MAX, FROZEN, SUMMARY_BYTES_MAX},
    orchestrator::{Opening, Question, Request, Role},
    toolbox::Toolbox,
    tools::{
        AgentLoop, Goal, Tool,
        prompt::{self, Spare},
    },
};
use futures_util::future::BoxFuture;
use loopwright_engine::{
    Failure,
    activity::{Activity, Context},
    signature::Signature,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::sync::Arc;
use uuid::Uuid;

/// What its calls are for, as routing and usage name it.
const PURPOSE: &str = "agent";
/// The prompt file around the team's own, in the bundle of a definition.
pub const PROMPT: &str = "prompts/agent.hbs";
const SHIPPED_PROMPT: &str = include_str!("../../workflow-defs/prompts/agent.hbs");
/// Turns unless the input says otherwise.
const TURNS: u32 = 16;
/// Most turns that an input may ask for.
const TURNS_MAX: u32 = 60;
/// Output limit of one answer unless the input says otherwise, in tokens.
const OUTPUT_TOKENS: u32 = 4096;
/// Most output tokens that an input may ask for.
const OUTPUT_TOKENS_MAX: u32 = 32_768;
/// Prompt tokens per call that the hold covers.
const RESERVED_INPUT_TOKENS: u64 = 12_000;
/// Turns with tools that the first hold covers.
const RESERVED_TURNS: u32 = 6;
/// What is given up of the prompt where a window is too small: the team's own words stay.
const SPARE: &Spare = &[&[("agents", 2 << 10)], &[("agents", 0)]];
/// Longest text that is passed on, in bytes: a page or two belongs into a file.
const TEXT_BYTES_MAX: usize = 64 << 10;

/// What `agent@1` is given.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
pub struct Input {
    /// Needed where there are tools.
    #[serde(default)]
    #[schemars(with = "Option<String>")]
    pub project_id: Option<Uuid>,
    /// A file deployed with the definition (`prompts/review.hbs`), or plain words: YAML refuses a template here.
    pub prompt: String,
    /// What the template reads. Data of users, models and repositories belongs here and never into the template.
    #[serde(default)]
    pub data: Map<String, Value>,
    /// `done` comes by itself.
    #[serde(default)]
    pub tools: Vec<Tool>,
    /// The answer is an object that satisfies this JSON Schema; without it a text.
    #[serde(default)]
    pub output_schema: Option<Value>,
    #[serde(default = "implementer")]
    pub role: Chosen,
    #[serde(default)]
    pub turns_max: Option<u32>,
    #[serde(default)]
    pub max_output_tokens: Option<u32>,
    /// A snapshot (`work` of another step) to start from.
    #[serde(default)]
    pub work: Option<String>,
}

/// The roles by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Chosen {
    Architect,
    Implementer,
    Utility,
}

fn implementer() -> Chosen {
    Chosen::Implementer
}

impl From<Chosen> for Role {
    fn from(chosen: Chosen) -> Self {
        match chosen {
            Chosen::Architect => Self::Architect,
            Chosen::Implementer => Self::Implementer,
            Chosen::Utility => Self::Utility,
        }
    }
}

/// What `agent@1` leaves.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Output {
    /// The model's words; empty where an object was asked for and it added none.
    pub text: String,
    /// The object, where `output_schema` was given.
    pub object: Option<Value>,
    /// The snapshot of the worktree, where the agent could change it.
    pub work: Option<String>,
    /// Files that differ from the last commit, by path.
    pub changed_files: Vec<String>,
    pub turns: u32,
    pub model: String,
    pub provider: String,
}

/// The activity.
pub struct Agent(Arc<Toolbox>);

impl Agent {
    #[must_use]
    pub fn new(toolbox: Arc<Toolbox>) -> Self {
        Self(toolbox)
    }
}

/// The contract.
#[must_use]
pub fn signature() -> Signature {
    contract::signature::<Input, Output>(
        "agent@1",
        "Answers a prompt with an object or a text, with the tools that it is given",
        &[&["template.missing", "template.syntax", "template.size", "model.no_progress"], contract::MODEL_FAILURES]
            .concat(),
    )
}

impl Activity for Agent {
    fn signature(&self) -> Signature {
        signature()
    }

    fn run(&self, ctx: Context, input: Value) -> BoxFuture<'static, Result<Value, Failure>> {
        let toolbox = self.0.clone();
        contract::run(ctx, input, move |ctx, input| async move { work(&toolbox, &ctx, input).await })
    }

    fn reserve(&self, input: &Value, extras: &Value) -> Value {
        let role = input.get("role").and_then(|role| Chosen::deserialize(role).ok()).unwrap_or_else(implementer);
        let limit = input.get("max_output_tokens").and_then(Value::as_u64).and_then(|n| u32::try_from(n).ok());
        let tools = input.get("tools").and_then(Value::as_array).is_some_and(|tools| !tools.is_empty());
        let count = if tools { RESERVED_TURNS } else { 1 };
        let limit = limit.unwrap_or(OUTPUT_TOKENS).min(OUTPUT_TOKENS_MAX);
        implement::reserve(self.0.orchestrator.planned(
            (role.into(), PURPOSE),
            extras,
            count,
            RESERVED_INPUT_TOKENS,
            limit,
        ))
    }
}

async fn work(toolbox: &Toolbox, ctx: &Context, input: Input) -> Result<Output, Failure> {
    let limits = limits(&input)?;
    let task = task(ctx, &input)?;
    if input.tools.is_empty() {
        answer(toolbox, ctx, input, task, limits).await
    } else {
        act(toolbox, ctx, input, task, limits).await
    }
}

struct Limits {
    turns: u32,
    output_tokens: u32,
}

fn limits(input: &Input) -> Result<Limits, Failure> {
    let within = |name: &str, value: Option<u32>, default: u32, max: u32| match value.unwrap_or(default) {
        value if (1..=max).contains(&value) => Ok(value),
        value => Err(Failure::permanent("input.invalid", format!("`{name}` is {value}; it goes from 1 to {max}"))),
    };
    if let Some(schema) = &input.output_schema {
        jsonschema::validator_for(schema).map_err(|error| {
            Failure::permanent("input.invalid", format!("`output_schema` is not a usable JSON Schema: {error}"))
        })?;
    }
    Ok(Limits {
        turns: within("turns_max", input.turns_max, TURNS, TURNS_MAX)?,
        output_tokens: within("max_output_tokens", input.max_output_tokens, OUTPUT_TOKENS, OUTPUT_TOKENS_MAX)?,
    })
}

/// The team's own prompt, rendered: a file of the bundle, or the text itself.
fn task(ctx: &Context, input: &Input) -> Result<String, Failure> {
    let name = input.prompt.trim();
    let file = ctx.bundle().get(name).or_else(|| ctx.bundle().get(&format!("prompts/{name}")));
    let data = Value::Object(input.data.clone());
    match file {
        Some(source) => prompt::render(name, source, &data),
        None if name.ends_with(".hbs") && !name.contains(char::is_whitespace) => {
            Err(Failure::permanent("input.invalid", format!("the prompt {name} was not deployed with the definition")))
        }
        None => prompt::render("prompt", &input.prompt, &data),
    }
}

fn opening(ctx: &Context, task: &str, tools: &[Tool], agents: &str) -> Result<Opening, Failure> {
    let data = json!({
        "prompt": task,
        "tools": !tools.is_empty(),
        "edit": tools.contains(&Tool::Edit),
        "agents": agents,
    });
    prompt::opening(ctx, PROMPT, SHIPPED_PROMPT, &data, SPARE)
}

/// One question, one answer.
async fn answer(
    toolbox: &Toolbox,
    ctx: &Context,
    input: Input,
    task: String,
    limits: Limits,
) -> Result<Output, Failure> {
    let request = Request {
        role: input.role.into(),
        purpose: PURPOSE.to_owned(),
        messages: Vec::new(),
        tools: Vec::new(),
        output_schema: input.output_schema,
        max_output_tokens: limits.output_tokens,
    };
    let question = Question::opened(opening(ctx, &task, &[], "")?, request);
    let reply = toolbox.orchestrator.call(ctx, "answer", question).await?;
    let text = if reply.json.is_some() { String::new() } else { prompt::middle_out(&reply.text, TEXT_BYTES_MAX) };
    Ok(Output {
        text,
        object: reply.json,
        work: None,
        changed_files: Vec::new(),
        turns: 1,
        model: reply.model,
        provider: reply.provider,
    })
}

/// Work with tools over a worktree.
async fn act(toolbox: &Toolbox, ctx: &Context, input: Input, task: String, limits: Limits) -> Result<Output, Failure> {
    let Some(project) = input.project_id else {
        return Err(Failure::permanent("input.invalid", "`tools` need a `project_id`: they work on its files"));
    };
    let info = ctx.info();
    let desk = implement::open(toolbox, info, project, input.work.as_deref().filter(|oid| !oid.is_empty())).await?;
    let mut tools = input.tools.clone();
    tools.push(Tool::Done);
    tools.sort();
    tools.dedup();
    let agent = AgentLoop {
        orchestrator: toolbox.orchestrator.clone(),
        role: input.role.into(),
        purpose: PURPOSE.to_owned(),
        tools: tools.clone(),
        goal: Goal::Answer { schema: input.output_schema.clone() },
        frozen: Frozen::new(FROZEN),
        turns_max: limits.turns,
        max_output_tokens: limits.output_tokens,
    };
    let workspace = desk.tree.workspace();
    let first = || async { opening(ctx, &task, &tools, &implement::excerpt(workspace, "AGENTS.md", AGENTS_BYTES_MAX)) };
    let outcome = agent.run(ctx, &desk.tree, first).await?;
    let changes = tools.contains(&Tool::Edit) || tools.contains(&Tool::Run);
    let work = if changes {
        let message =
            format!("agent: {}", prompt::middle_out(outcome.summary.lines().next().unwrap_or(""), SUMMARY_BYTES_MAX));
        Some(workspace.snapshot(&message, implement::instant(info)).await?)
    } else {
        None
    };
    Ok(Output {
        text: prompt::middle_out(&outcome.summary, TEXT_BYTES_MAX),
        object: outcome.answer,
        work,
        changed_files: if changes { implement::changed(workspace).await? } else { Vec::new() },
        turns: outcome.turns,
        model: outcome.model,
        provider: outcome.provider,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use loopwright_engine::activity::detached;

    fn input(value: Value) -> Input {
        contract::parse(value).expect("fits the contract")
    }

    #[test]
    fn prompts_come_from_the_bundle_or_are_given() {
        let bundle = [("prompts/review.hbs".to_owned(), "Review {{what}}.".to_owned())].into();
        let ctx = detached::context(detached::info("agent@1", Value::Null), bundle, Default::default());
        let run = |prompt: &str| task(&ctx, &input(json!({"prompt": prompt, "data": {"what": "{{it}}"}})));
        for prompt in ["review.hbs", "prompts/review.hbs", "Review {{what}}."] {
            assert_eq!(run(prompt), Ok("Review {{it}}.".to_owned()), "{prompt}");
        }
        assert_eq!(run("missing.hbs").map_err(|f| f.code), Err("input.invalid".to_owned()));
        assert_eq!(run("{{other}}").map_err(|f| f.code), Err("template.missing".to_owned()));
    }

    #[test]
    fn limits_and_schemas_are_checked_before_anything_is_bought() {
        for bad in [
            json!({"prompt": "x", "turns_max": 0}),
            json!({"prompt": "x", "turns_max": 61}),
            json!({"prompt": "x", "max_output_tokens": 100_000}),
            json!({"prompt": "x", "output_schema": {"type": 7}}),
        ] {
            assert_eq!(limits(&input(bad)).map(|_| ()).map_err(|f| f.code), Err("input.invalid".to_owned()));
        }
        let fine = input(json!({"prompt": "x", "tools": ["read"], "role": "utility"}));
        assert_eq!(limits(&fine).map(|l| (l.turns, l.output_tokens)), Ok((TURNS, OUTPUT_TOKENS)));
    }

    #[test]
    fn the_prompt_says_what_there_is() {
        let ctx = detached::context(detached::info("agent@1", Value::Null), Default::default(), Default::default());
        let text =
            |tools: &[Tool], agents| format!("{:?}", opening(&ctx, "TASK {{x}}", tools, agents).expect("renders"));
        let plain = text(&[], "");
        assert!(plain.contains("TASK {{x}}") && plain.contains("Answer directly") && !plain.contains("<agents"));
        let editing = text(&[Tool::Edit], "NOTES");
        assert!(editing.contains("and to change it; call `done`") && editing.contains("NOTES"), "{editing}");
    }
}
