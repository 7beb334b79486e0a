//! `plan@1`: requirements become an architecture, a stack with reasons, and a TODO list with executable checks.
//!
//! The architect answers with data; the documents are rendered from it and committed, so that what is approved is what
//! the repository says. Checks come from here and from nowhere else: who implements an item cannot change them.

use crate::{
    ask::ask,
    billing::forecast::{self, Forecast, Part, Work},
    contract,
    fact::{Choice, Plan, Requirements},
    implement::{self, ARCHITECTURE, reserve},
    landing::{Landing, bill, land},
    orchestrator::{Opening, Question, Reply, Request, Role},
    readme,
    record::{self, Kind, TURN_BYTES_MAX},
    sandbox::Sandbox,
    todo::{self, State, Todo},
    toolbox::Toolbox,
    tools::prompt::{self, Spare},
    verify,
    workspace::FileChange,
};
use futures_util::future::BoxFuture;
use loopwright_engine::{
    Failure,
    activity::{Activity, Context},
    signature::Signature,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::{collections::BTreeSet, fmt::Write as _, sync::Arc};
use uuid::Uuid;

/// What its calls are for, as routing and usage name it.
const PURPOSE: &str = "plan";
/// The prompt file, in the bundle of a definition.
pub const PROMPT: &str = "prompts/plan.hbs";
const SHIPPED_PROMPT: &str = include_str!("../../workflow-defs/prompts/plan.hbs");

const OUTPUT_TOKENS_MAX: u32 = 16_384;
const RESERVED_INPUT_TOKENS: u64 = 12_000;
const ARCHITECTURE_BYTES_MAX: usize = 64 << 10;
/// Tokens of the map of existing code in the prompt.
const MAP_TOKENS: usize = 3_000;
/// What is given up of the prompt where a window is too small. The idea, the requirements and what the person wants changed stay.
const SPARE: &Spare = &[&[("map", 3 << 10), ("agents", 2 << 10)], &[("map", 0), ("agents", 0), ("before", 8 << 10)]];
/// Most bytes of the summary that is shown for approval.
const SUMMARY_BYTES_MAX: usize = 16 << 10;
/// Calls of a model that an item takes at least: write, run, done.
const CALLS_PER_ITEM_MIN: u32 = 3;

/// What `plan@1` is given.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
pub struct Input {
    #[schemars(with = "String")]
    pub project_id: Uuid,
    /// What the user wants changed in the last plan; empty for a first one.
    #[serde(default)]
    pub changes: String,
}

/// What `plan@1` returns.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Output {
    /// For the approval.
    pub summary_markdown: String,
    /// What is to be done, in order.
    pub todo: Vec<Todo>,
    pub stack: Vec<Choice>,
    /// What the rest of the loop is likely to cost, without rounds that a rejection adds.
    pub forecast_low_credits: String,
    pub forecast_high_credits: String,
    /// What to approve as not to be exceeded: the upper end, and room for the dearest call.
    pub limit_credits: String,
    /// The same, item by item, and for what is done once.
    pub forecast: Vec<PartForecast>,
    pub commit: String,
    pub model: String,
}

/// What a part of the work is likely to cost.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PartForecast {
    /// Id of an item, or the name of an activity.
    pub part: String,
    pub low_credits: String,
    pub high_credits: String,
}

impl From<&Part> for PartForecast {
    fn from(part: &Part) -> Self {
        let Forecast { low, high } = part.forecast;
        Self { part: part.part.clone(), low_credits: low.to_string(), high_credits: high.to_string() }
    }
}

/// The activity.
pub struct MakePlan(Arc<Toolbox>);

impl MakePlan {
    #[must_use]
    pub fn new(toolbox: Arc<Toolbox>) -> Self {
        Self(toolbox)
    }
}

/// The contract.
#[must_use]
pub fn signature() -> Signature {
    contract::signature::<Input, Output>(
        "plan@1",
        "Writes the architecture and the TODO list of a project",
        &[&["workspace.conflict"], contract::MODEL_FAILURES].concat(),
    )
}

impl Activity for MakePlan {
    fn signature(&self) -> Signature {
        signature()
    }

    fn run(&self, ctx: Context, input: Value) -> BoxFuture<'static, Result<Value, Failure>> {
        let toolbox = self.0.clone();
        contract::run(ctx, input, move |ctx, input| async move { work(&toolbox, &ctx, input).await })
    }

    fn reserve(&self, _input: &Value, extras: &Value) -> Value {
        reserve(self.0.orchestrator.planned(
            (Role::Architect, PURPOSE),
            extras,
            1,
            RESERVED_INPUT_TOKENS,
            OUTPUT_TOKENS_MAX,
        ))
    }
}

async fn work(toolbox: &Toolbox, ctx: &Context, input: Input) -> Result<Output, Failure> {
    let (info, pool, project) = (ctx.info(), &toolbox.pool, input.project_id);
    let name = record::project_name(pool, project).await?;
    let known: Requirements = record::newest(pool, project, Kind::Requirements, info).await?.ok_or_else(|| {
        Failure::permanent(
            "input.invalid",
            "the project has no requirements yet; a step with gather@1 has to come first",
        )
    })?;
    let before: Option<Plan> = record::newest(pool, project, Kind::Plan, info).await?;
    let states = record::states(pool, project, info).await?;
    let done: Vec<Todo> = before
        .iter()
        .flat_map(|plan| plan.items.iter().filter(|item| states.get(&item.id) == Some(&State::Done)).cloned())
        .collect();
    let opening = opening(toolbox, ctx, &input, &known, before.as_ref(), &done).await?;
    let request = Request {
        role: Role::Architect,
        purpose: PURPOSE.to_owned(),
        messages: Vec::new(),
        tools: Vec::new(),
        output_schema: Some(schema()),
        max_output_tokens: OUTPUT_TOKENS_MAX,
    };
    let taken: BTreeSet<String> = done.iter().map(|item| item.id.clone()).collect();
    let judge = |reply: &Reply| judge(reply.json.as_ref(), &known, &taken, &done);
    let question = Question::opened(opening, request);
    let (answer, reply) = ask(&toolbox.orchestrator, ctx, "plan", question, judge).await?;

    let plan = Plan {
        summary: answer.summary.clone(),
        stack: answer.stack.clone(),
        items: done.into_iter().chain(answer.todo.iter().cloned()).collect(),
    };
    let files = [
        FileChange { path: ARCHITECTURE.to_owned(), content: Some(architecture(&name, &answer, &known)) },
        FileChange { path: todo::FILE.to_owned(), content: Some(todo::markdown(&name, &plan.items, &states)) },
    ];
    let landing = Landing {
        project,
        work: None,
        subject: if before.is_some() { "plan: Change the plan" } else { "plan: Architecture and TODO list" }.to_owned(),
        body: answer.summary.clone(),
        trailers: bill(pool, info, &info.path).await?,
    };
    let commit = land(ctx, &toolbox.workspaces, landing, |workspace| workspace.write(&files)).await?;
    record::put(pool, project, Kind::Plan, info, &plan).await?;
    let parts = expected(toolbox, ctx, project, &answer.todo).await?;
    let sum = forecast::sum(&parts);
    Ok(Output {
        summary_markdown: summary(&answer, &known, &parts),
        todo: answer.todo,
        stack: answer.stack,
        forecast_low_credits: sum.low.to_string(),
        forecast_high_credits: sum.high.to_string(),
        limit_credits: forecast::limit(&parts).to_string(),
        forecast: parts.iter().map(PartForecast::from).collect(),
        commit: commit.oid,
        model: reply.model,
    })
}

async fn opening(
    toolbox: &Toolbox,
    ctx: &Context,
    input: &Input,
    known: &Requirements,
    before: Option<&Plan>,
    done: &[Todo],
) -> Result<Opening, Failure> {
    let desk = implement::open(toolbox, ctx.info(), input.project_id, None).await?;
    let map = desk.tree.ask(|index| index.map(MAP_TOKENS)).await?;
    let data = json!({
        "idea": known.idea,
        "requirements": known.requirements,
        "assumptions": known.assumptions,
        "changes": prompt::middle_out(input.changes.trim(), TURN_BYTES_MAX),
        "before": before.map(|plan| prompt::readable(&json!(plan), TURN_BYTES_MAX)).unwrap_or_default(),
        "done": done.iter().map(|item| format!("{}: {}", item.id, item.title)).collect::<Vec<_>>(),
        "map": map,
        "agents": implement::excerpt(desk.tree.workspace(), "AGENTS.md", implement::AGENTS_BYTES_MAX),
        "tools": toolchains(&toolbox.sandbox),
    });
    prompt::opening(ctx, PROMPT, SHIPPED_PROMPT, &data, SPARE)
}

/// Programs that the checks may count on: those that confined commands find.
fn toolchains(sandbox: &Sandbox) -> Vec<&'static str> {
    const KNOWN: [&str; 12] =
        ["cargo", "python3", "node", "npm", "go", "javac", "gcc", "g++", "make", "ruby", "php", "bash"];
    let folders = sandbox.program_folders();
    KNOWN.into_iter().filter(|name| folders.iter().any(|folder| folder.join(name).exists())).collect()
}

/// A model's answer, as asked for.
#[derive(Clone, Debug, Deserialize)]
struct Answer {
    summary: String,
    stack: Vec<Choice>,
    architecture_markdown: String,
    todo: Vec<Todo>,
}

fn schema() -> Value {
    json!({
        "type": "object",
        "properties": {
            "summary": {"type": "string"},
            "stack": {"type": "array", "items": {
                "type": "object",
                "properties": {"choice": {"type": "string"}, "reason": {"type": "string"}},
                "required": ["choice", "reason"]
            }},
            "architecture_markdown": {"type": "string"},
            "todo": {"type": "array", "items": todo::schema()}
        },
        "required": ["summary", "stack", "architecture_markdown", "todo"]
    })
}

fn judge(
    json: Option<&Value>,
    known: &Requirements,
    taken: &BTreeSet<String>,
    done: &[Todo],
) -> Result<Answer, String> {
    let mut answer = Answer::deserialize(json.unwrap_or(&Value::Null)).map_err(|e| e.to_string())?;
    if answer.todo.is_empty() {
        return Err("there is no item to do".to_owned());
    }
    if answer.architecture_markdown.trim().is_empty() || answer.architecture_markdown.len() > ARCHITECTURE_BYTES_MAX {
        return Err(format!("`architecture_markdown` is empty or longer than {ARCHITECTURE_BYTES_MAX} bytes"));
    }
    answer.summary = prompt::middle_out(answer.summary.trim(), 2_000);
    // Ids of finished items that are given again mean those.
    answer.todo.retain(|item| !taken.contains(&todo::slug(&item.id)));
    answer.todo = todo::settle(answer.todo, taken)?;
    let served = |id: &str| {
        answer.todo.iter().chain(done).any(|item| item.requirements.iter().any(|r| r.eq_ignore_ascii_case(id)))
    };
    let missing: Vec<&str> = known.requirements.iter().map(|r| r.id.as_str()).filter(|id| !served(id)).collect();
    if !missing.is_empty() {
        return Err(format!("no item serves {}; every requirement needs one", missing.join(", ")));
    }
    if answer.todo.is_empty() {
        return Err("every item is finished already; plan what is new".to_owned());
    }
    Ok(answer)
}

fn architecture(name: &str, answer: &Answer, known: &Requirements) -> String {
    let mut out = String::new();
    let text = answer.architecture_markdown.trim();
    if !text.starts_with("# ") {
        let _ = writeln!(out, "# Architecture of {name}\n");
    }
    let _ = writeln!(out, "{text}\n\n## Stack\n");
    for choice in &answer.stack {
        let _ = writeln!(out, "- **{}**: {}", choice.choice.trim(), choice.reason.trim());
    }
    let _ = writeln!(out, "\n## Requirements\n");
    for requirement in &known.requirements {
        let _ = writeln!(out, "- **{}** {}", requirement.id, requirement.text.trim());
    }
    if !known.assumptions.is_empty() {
        let _ = writeln!(out, "\n## Assumptions\n");
        for assumption in &known.assumptions {
            let _ = writeln!(out, "- {}", assumption.trim());
        }
    }
    out
}

fn summary(answer: &Answer, known: &Requirements, parts: &[Part]) -> String {
    let mut out = format!("{}\n\n**Stack**\n", answer.summary);
    for choice in &answer.stack {
        let _ = writeln!(out, "- {}: {}", choice.choice.trim(), choice.reason.trim());
    }
    out.push_str("\n**Requirements**\n");
    for requirement in &known.requirements {
        let _ = writeln!(out, "- {} {}", requirement.id, requirement.text.trim());
    }
    if !known.assumptions.is_empty() {
        out.push_str("\n**Assumptions**\n");
        for assumption in &known.assumptions {
            let _ = writeln!(out, "- {}", assumption.trim());
        }
    }
    let _ = writeln!(out, "\n**To do** ({} items)", answer.todo.len());
    for (n, item) in answer.todo.iter().enumerate() {
        let checks: Vec<String> = item.checks.iter().map(|check| todo::code(&check.command)).collect();
        let cost = parts.iter().find(|part| part.part == item.id && part.limits.0 > 0).map(|part| part.forecast);
        let cost = cost.map(|Forecast { low, high }| format!(" ({low} to {high} credits)")).unwrap_or_default();
        let _ = writeln!(out, "{}. {} — {}{cost}", n + 1, item.title, checks.join(", "));
    }
    let Forecast { low, high } = forecast::sum(parts);
    let _ = match high.0 {
        0 if !parts.is_empty() => write!(out, "\n**Expected cost**: no credits, your own keys are asked"),
        _ => write!(out, "\n**Expected cost**: {low} to {high} credits"),
    };
    prompt::middle_out(&out, SUMMARY_BYTES_MAX)
}

/// What the rest of the loop is likely to cost, kept for the comparison with what it will have cost.
async fn expected(toolbox: &Toolbox, ctx: &Context, project: Uuid, todo: &[Todo]) -> Result<Vec<Part>, Failure> {
    let store = |e: sqlx::Error| Failure::retryable("transient.store", format!("the database did not answer: {e}"));
    let (orchestrator, extras) = (&toolbox.orchestrator, &*ctx.info().extras);
    let items = todo.iter().map(|item| Work {
        part: item.id.clone(),
        activity: implement::NAME,
        calls: implement::planned(orchestrator, Role::Implementer, extras, 1),
        // Each file is written once.
        fewest: CALLS_PER_ITEM_MIN + u32::try_from(item.files.len().saturating_sub(1)).unwrap_or(u32::MAX),
    });
    let once =
        [(verify::NAME, verify::planned(orchestrator, extras)), (readme::NAME, readme::planned(orchestrator, extras))];
    let once = once.map(|(activity, calls)| Work { part: activity.to_owned(), activity, calls, fewest: 1 });
    let work: Vec<Work> = items.chain(once).collect();
    let mut conn = toolbox.pool.acquire().await.map_err(store)?;
    let info = ctx.info();
    let user = info.attributes["user_id"].as_str().and_then(|id| Uuid::parse_str(id).ok());
    let parts = forecast::price(&mut conn, toolbox.rate, user, &work).await.map_err(store)?;
    forecast::keep(&mut conn, info.run_id.0, &info.path, project, &parts).await.map_err(store)?;
    Ok(parts)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{billing::MicroCredits, fact::Requirement};

    fn known() -> Requirements {
        let requirement = |id: &str| Requirement { id: id.into(), text: format!("Does {id}.") };
        Requirements {
            idea: "words".into(),
            requirements: vec![requirement("R1"), requirement("R2")],
            assumptions: vec!["Input is UTF-8.".into()],
        }
    }

    fn answer(items: &[(&str, &str)]) -> Value {
        let todo: Vec<Value> = items
            .iter()
            .map(|(id, serves)| {
                json!({"id": id, "title": format!("Do {id}"), "detail": "", "requirements": [serves], "depends_on": [],
                       "files": [], "checks": [{"command": "true", "expect_exit": 0}]})
            })
            .collect();
        json!({"summary": "Counts words.", "stack": [{"choice": "Rust", "reason": "it is there"}],
               "architecture_markdown": "One file.", "todo": todo})
    }

    #[test]
    fn every_requirement_needs_an_item() {
        let none = BTreeSet::new();
        let all = judge(Some(&answer(&[("a", "R1"), ("b", "r2")])), &known(), &none, &[]).expect("complete");
        assert_eq!(all.todo.len(), 2);
        let gap = judge(Some(&answer(&[("a", "R1")])), &known(), &none, &[]).expect_err("R2 is not served");
        assert!(gap.contains("no item serves R2"), "{gap}");
        assert!(judge(Some(&answer(&[])), &known(), &none, &[]).expect_err("empty").contains("no item to do"));
        assert!(judge(None, &known(), &none, &[]).is_err());
    }

    #[test]
    fn finished_items_keep_their_ids_and_are_not_done_again() {
        let first = judge(
            Some(&answer(&[("a", "R1")])),
            &Requirements { requirements: vec![], ..known() },
            &BTreeSet::new(),
            &[],
        );
        let done = first.expect("one item").todo;
        let taken: BTreeSet<String> = ["a".to_owned()].into();
        let more = judge(Some(&answer(&[("a", "R1"), ("b", "R2")])), &known(), &taken, &done).expect("b is new");
        assert_eq!(more.todo.iter().map(|item| item.id.as_str()).collect::<Vec<_>>(), ["b"]);
        assert!(judge(Some(&answer(&[("a", "R1")])), &known(), &taken, &done).is_err());
    }

    #[test]
    fn documents_say_what_was_decided() {
        let answer =
            judge(Some(&answer(&[("a", "R1"), ("b", "R2")])), &known(), &BTreeSet::new(), &[]).expect("usable");
        let text = architecture("Words", &answer, &known());
        assert!(
            text.starts_with("# Architecture of Words\n\nOne file.\n\n## Stack\n\n- **Rust**: it is there\n"),
            "{text}"
        );
        assert!(text.contains("- **R2** Does R2.") && text.contains("## Assumptions\n\n- Input is UTF-8."), "{text}");
        let part = |part: &str, low: i64, high: i64| Part {
            part: part.into(),
            activity: implement::NAME,
            forecast: Forecast { low: MicroCredits(low), high: MicroCredits(high) },
            limits: MicroCredits(high),
            call: MicroCredits(1),
        };
        let shown =
            summary(&answer, &known(), &[part("b", 500_000, 8_000_000), part(verify::NAME, 1_000_000, 1_000_000)]);
        assert!(
            shown.contains("2. Do b — `true` (0.5 to 8 credits)\n") && shown.contains("1. Do a — `true`\n"),
            "{shown}"
        );
        assert!(shown.ends_with("1.5 to 9 credits"), "{shown}");
    }
}
