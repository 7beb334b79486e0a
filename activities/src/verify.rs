//! `verify@1`: is what stands on `main` what was asked for?
//!
//! ```text
//! checks of all items, run again ─┐
//! items that are blocked          ├─▶ verdict: accept only if nothing fails and every criterion is accepted
//! architect: criterion by criterion, with citations ─┘            reject: new items for the plan
//! ```
//!
//! Machine results come first and cannot be argued away. The architect sees code, diff and results, never an
//! implementer's claim. A criterion that was accepted stays so until a file that it cites changes.

use crate::{
    ask::ask,
    check::{self, CheckResult},
    contract,
    fact::{Plan, Requirements},
    implement::{self, Desk, reserve},
    orchestrator::{Orchestrator, Question, Reply, Request, Role},
    record::{self, Kind},
    todo::{self, State, Todo},
    toolbox::Toolbox,
    tools::prompt::{self, Spare},
    usage::PlannedCall,
    workspace::Workspace,
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
use sha2::{Digest, Sha256};
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    sync::Arc,
};
use uuid::Uuid;

/// Its name in definitions.
pub const NAME: &str = "verify@1";
/// What its calls are for, as routing and usage name it.
const PURPOSE: &str = "verify";
/// The prompt file, in the bundle of a definition.
pub const PROMPT: &str = "prompts/verify.hbs";
const SHIPPED_PROMPT: &str = include_str!("../../workflow-defs/prompts/verify.hbs");

/// Checkpoint: what the checks showed.
const RESULTS: &str = "results";

const OUTPUT_TOKENS_MAX: u32 = 8_192;
const RESERVED_INPUT_TOKENS: u64 = 40_000;
/// Tokens of code in the prompt, packed for the requirements.
const PACK_TOKENS: usize = 12_000;
const MAP_TOKENS: usize = 2_000;
/// Most bytes of the diff in the prompt.
const DIFF_BYTES_MAX: usize = 60 << 10;
const RESULTS_BYTES_MAX: usize = 16 << 10;
/// What is given up of the prompt where a window is too small: the diff says again what the code says. Requirements, items and
/// what is blocked stay, and so much code that something can be cited.
const SPARE: &Spare = &[
    &[("diff", 16 << 10)],
    &[("code", 16 << 10), ("map", 2 << 10)],
    &[("diff", 0), ("results", 8 << 10)],
    &[("code", 6 << 10), ("map", 0), ("results", 4 << 10)],
];
/// Citations of one criterion that are kept.
const CITATIONS_MAX: usize = 6;
/// Most bytes of the report that is shown.
const REPORT_BYTES_MAX: usize = 16 << 10;

/// What `verify@1` is given.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
pub struct Input {
    #[schemars(with = "String")]
    pub project_id: Uuid,
}

/// The judgement of the whole, or of one criterion.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    Accept,
    Reject,
}

/// A place that shows something: a line of a file as it was, or a check by its command.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Citation {
    /// A file of the project; empty for a check.
    #[serde(default)]
    pub path: String,
    /// 1-based.
    #[serde(default)]
    pub line: u32,
    /// A command that was run; empty for a file.
    #[serde(default)]
    pub check: String,
    /// Of the file's content when it was cited.
    #[serde(default)]
    pub sha256: String,
}

/// The judgement of one requirement.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Criterion {
    pub requirement: String,
    pub verdict: Verdict,
    pub reason: String,
    pub citations: Vec<Citation>,
    /// Taken over from an earlier round: no file that it cites has changed.
    #[serde(default)]
    pub carried: bool,
}

/// What `verify@1` returns, and the record of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Output {
    pub verdict: Verdict,
    pub criteria: Vec<Criterion>,
    /// What is to be done next; empty when accepted.
    pub todo: Vec<Todo>,
    /// For people.
    pub report_markdown: String,
    pub checks_passed: u32,
    pub checks_failed: u32,
    /// The commit that was judged.
    pub commit: String,
    pub model: String,
}

/// The activity.
pub struct Verify(Arc<Toolbox>);

impl Verify {
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
        "Judges a project against its requirements, with evidence",
        contract::MODEL_FAILURES,
    )
}

/// What one verification is expected to ask for at most.
pub(crate) fn planned(orchestrator: &Orchestrator, extras: &Value) -> PlannedCall {
    orchestrator.planned((Role::Architect, PURPOSE), extras, 1, RESERVED_INPUT_TOKENS, OUTPUT_TOKENS_MAX)
}

impl Activity for Verify {
    fn signature(&self) -> Signature {
        signature()
    }

    fn run(&self, ctx: Context, input: Value) -> BoxFuture<'static, Result<Value, Failure>> {
        let toolbox = self.0.clone();
        contract::run(ctx, input, move |ctx, input| async move { work(&toolbox, &ctx, input).await })
    }

    fn reserve(&self, _input: &Value, extras: &Value) -> Value {
        reserve(planned(&self.0.orchestrator, extras))
    }
}

/// Everything that a judgement rests on.
struct Facts {
    requirements: Requirements,
    plan: Plan,
    states: BTreeMap<String, State>,
    /// Results of the checks of finished items, in order of the plan, by item.
    results: Vec<(String, CheckResult)>,
    /// What may be cited.
    files: Files,
    /// Judgements that still stand.
    carried: Vec<Criterion>,
}

/// Text files of the commit by path: hash of the content and number of lines.
type Files = BTreeMap<String, (String, usize)>;

async fn work(toolbox: &Toolbox, ctx: &Context, input: Input) -> Result<Output, Failure> {
    let (info, pool, project) = (ctx.info(), &toolbox.pool, input.project_id);
    let missing = |what: &str| Failure::permanent("input.invalid", format!("the project has no {what} yet"));
    let requirements: Requirements =
        record::newest(pool, project, Kind::Requirements, info).await?.ok_or_else(|| missing("requirements"))?;
    let plan: Plan = record::newest(pool, project, Kind::Plan, info).await?.ok_or_else(|| missing("plan"))?;
    let states = record::states(pool, project, info).await?;
    let before: Option<Output> = record::newest(pool, project, Kind::Verdict, info).await?;
    let desk = implement::open(toolbox, info, project, None).await?;
    let workspace = desk.tree.workspace();
    let commit = workspace.head().unwrap_or_default().to_owned();
    // What is shown to the model, and what it may cite, is read before commands have left anything in the tree.
    let files = cited_files(workspace).await?;
    let carried = standing(&files, before.map(|output| output.criteria).unwrap_or_default(), &requirements);
    let shown = shown(&desk, &requirements).await?;
    let results = rerun(toolbox, ctx, workspace, &plan, &states).await?;
    let facts = Facts { requirements, plan, states, results, files, carried };

    let open = facts.open();
    let (mut answer, model) = if open.is_empty() {
        (Answer::default(), String::new())
    } else {
        let request = Request {
            role: Role::Architect,
            purpose: PURPOSE.to_owned(),
            messages: Vec::new(),
            tools: Vec::new(),
            output_schema: Some(schema()),
            max_output_tokens: OUTPUT_TOKENS_MAX,
        };
        let judge = |reply: &Reply| judge(reply.json.as_ref(), &open, &facts);
        let opening = prompt::opening(ctx, PROMPT, SHIPPED_PROMPT, &facts.data(&open, &shown), SPARE)?;
        let question = Question::opened(opening, request);
        let (answer, reply) = ask(&toolbox.orchestrator, ctx, "verify", question, judge).await?;
        (answer, reply.model)
    };
    let mut criteria = facts.carried.clone();
    criteria.append(&mut answer.criteria);
    criteria.sort_by_key(|c| facts.requirements.requirements.iter().position(|r| r.id == c.requirement));
    let verdict = facts.verdict(&criteria);
    let todo = if verdict == Verdict::Accept { Vec::new() } else { facts.next(&criteria, answer.items) };
    if verdict == Verdict::Reject {
        record::put(pool, project, Kind::Plan, info, &facts.plan.with(&todo)).await?;
    }
    let failed = facts.results.iter().filter(|(_, result)| !result.passed).count();
    let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    let output = Output {
        verdict,
        report_markdown: facts.report(verdict, &criteria, &todo, answer.summary.trim()),
        criteria,
        todo,
        checks_passed: count(facts.results.len() - failed),
        checks_failed: count(failed),
        commit,
        model,
    };
    record::put(pool, project, Kind::Verdict, info, &output).await?;
    Ok(output)
}

/// Accepted criteria whose cited files are what they were. A criterion that cites only checks is judged anew.
fn standing(files: &Files, before: Vec<Criterion>, requirements: &Requirements) -> Vec<Criterion> {
    let unchanged = |citation: &Citation| {
        citation.path.is_empty() || files.get(&citation.path).is_some_and(|(hash, _)| *hash == citation.sha256)
    };
    before
        .into_iter()
        .filter(|c| c.verdict == Verdict::Accept && c.citations.iter().any(|citation| !citation.path.is_empty()))
        .filter(|c| requirements.requirements.iter().any(|r| r.id == c.requirement))
        .filter(|c| c.citations.iter().all(unchanged))
        .map(|c| Criterion { carried: true, ..c })
        .collect()
}

async fn cited_files(workspace: &Workspace) -> Result<Files, Failure> {
    // What cannot be read as text cannot be cited.
    let text = |path: String| workspace.read(&path).ok().flatten().map(|text| (path, text));
    let texts = workspace.files().await?.into_iter().filter_map(|(path, _)| text(path));
    Ok(texts.map(|(path, text)| (path, (sha256(&text), text.lines().count()))).collect())
}

fn sha256(text: &str) -> String {
    Sha256::digest(text.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Map, code and diff for the prompt.
struct Shown {
    map: String,
    code: String,
    diff: String,
}

async fn shown(desk: &Desk, requirements: &Requirements) -> Result<Shown, Failure> {
    let texts: Vec<&str> = requirements.requirements.iter().map(|r| r.text.as_str()).collect();
    let query = format!("{} {}", requirements.idea, texts.join(" "));
    let (map, code) =
        desk.tree.ask(move |index| Ok((index.map(MAP_TOKENS)?, index.pack(&query, PACK_TOKENS)?.text))).await?;
    let diff = desk.tree.workspace().diff(None, DIFF_BYTES_MAX).await?;
    Ok(Shown { map, code, diff })
}

/// Runs the checks of every finished item on `main`; a command that several items have runs once. A later attempt finds
/// what came of them: a verdict and the plan that it extends rest on the same results.
async fn rerun(
    toolbox: &Toolbox,
    ctx: &Context,
    workspace: &Workspace,
    plan: &Plan,
    states: &BTreeMap<String, State>,
) -> Result<Vec<(String, CheckResult)>, Failure> {
    if let Some(results) = ctx.checkpoint(RESULTS).await? {
        return contract::parse(results);
    }
    let done = plan.items.iter().filter(|item| states.get(&item.id) == Some(&State::Done));
    let mut results: Vec<(String, CheckResult)> = Vec::new();
    for item in done {
        for one in &item.checks {
            let known = results.iter().find(|(_, r)| r.command == one.command && r.expect_exit == one.expect_exit);
            let result = match known {
                Some((_, result)) => result.clone(),
                None => check::run_all(toolbox, ctx, workspace.dir(), std::slice::from_ref(one)).await?.remove(0),
            };
            results.push((item.id.clone(), result));
        }
    }
    ctx.save(RESULTS, &json!(results)).await?;
    Ok(results)
}

/// A model's answer, as asked for.
#[derive(Clone, Debug, Default, Deserialize)]
struct Answer {
    summary: String,
    criteria: Vec<Criterion>,
    #[serde(default)]
    items: Vec<Todo>,
}

fn schema() -> Value {
    json!({
        "type": "object",
        "properties": {
            "summary": {"type": "string"},
            "criteria": {"type": "array", "items": {
                "type": "object",
                "properties": {
                    "requirement": {"type": "string"},
                    "verdict": {"type": "string", "enum": ["accept", "reject"]},
                    "reason": {"type": "string"},
                    "citations": {"type": "array", "items": {
                        "type": "object",
                        "properties": {"path": {"type": "string"}, "line": {"type": "integer"}, "check": {"type": "string"}},
                        "required": ["path", "line", "check"]
                    }}
                },
                "required": ["requirement", "verdict", "reason", "citations"]
            }},
            "items": {"type": "array", "items": todo::schema()}
        },
        "required": ["summary", "criteria", "items"]
    })
}

/// Reads an answer: every open criterion judged once, every acceptance with a citation that exists.
fn judge(json: Option<&Value>, open: &[String], facts: &Facts) -> Result<Answer, String> {
    let mut answer = Answer::deserialize(json.unwrap_or(&Value::Null)).map_err(|e| e.to_string())?;
    answer.criteria.retain(|c| open.contains(&c.requirement));
    let mut problems = Vec::new();
    for id in open {
        match answer.criteria.iter().filter(|c| c.requirement == *id).count() {
            1 => {}
            0 => problems.push(format!("{id} is not judged")),
            n => problems.push(format!("{id} is judged {n} times")),
        }
    }
    for criterion in &mut answer.criteria {
        criterion.carried = false;
        criterion.citations.retain_mut(|citation| holds(citation, facts));
        criterion.citations.truncate(CITATIONS_MAX);
        if criterion.verdict == Verdict::Accept && criterion.citations.is_empty() {
            problems.push(format!(
                "{} is accepted without a citation that exists: give a path and a line of a file, or a check's command",
                criterion.requirement
            ));
        }
    }
    let taken: BTreeSet<String> = facts.plan.items.iter().map(|item| item.id.clone()).collect();
    match todo::settle(std::mem::take(&mut answer.items), &taken) {
        Ok(items) => answer.items = items,
        Err(problem) => problems.push(problem),
    }
    if problems.is_empty() { Ok(answer) } else { Err(problems.join("; ")) }
}

/// Whether a citation exists; the hash of the cited file is noted.
fn holds(citation: &mut Citation, facts: &Facts) -> bool {
    citation.sha256.clear();
    if !citation.path.is_empty() {
        citation.check.clear();
        let Some((hash, lines)) = facts.files.get(&citation.path) else { return false };
        citation.sha256.clone_from(hash);
        return (1..=*lines).contains(&(citation.line as usize));
    }
    citation.line = 0;
    facts.results.iter().any(|(_, result)| result.command == citation.check && result.passed)
}

impl Facts {
    /// Requirements that need a judgement now.
    fn open(&self) -> Vec<String> {
        let ids = self.requirements.requirements.iter().map(|r| r.id.clone());
        ids.filter(|id| !self.carried.iter().any(|c| c.requirement == *id)).collect()
    }

    fn blocked(&self) -> impl Iterator<Item = &Todo> {
        // An item that was never committed is as good as blocked.
        self.plan.items.iter().filter(|item| self.states.get(&item.id) != Some(&State::Done))
    }

    fn data(&self, open: &[String], shown: &Shown) -> Value {
        let results: Vec<Value> = self
            .results
            .iter()
            .map(|(item, result)| {
                let mut value = json!({"item": item, "command": result.command, "passed": result.passed});
                if !result.passed {
                    value["exit_code"] = json!(result.exit_code);
                    value["output_tail"] = json!(result.output_tail);
                }
                value
            })
            .collect();
        let blocked: Vec<String> = self.blocked().map(|item| format!("{}: {}", item.id, item.title)).collect();
        let open: Vec<_> = self.requirements.requirements.iter().filter(|r| open.contains(&r.id)).collect();
        let items: Vec<String> = self.plan.items.iter().map(|item| format!("{}: {}", item.id, item.title)).collect();
        json!({
            "requirements": open,
            "items": items,
            "results": prompt::readable(&json!(results), RESULTS_BYTES_MAX),
            "blocked": blocked,
            "map": shown.map,
            "code": shown.code,
            "diff": shown.diff,
        })
    }

    fn verdict(&self, criteria: &[Criterion]) -> Verdict {
        let all = self
            .requirements
            .requirements
            .iter()
            .all(|r| criteria.iter().any(|c| c.requirement == r.id && c.verdict == Verdict::Accept));
        let green = self.results.iter().all(|(_, result)| result.passed) && self.blocked().next().is_none();
        if all && green { Verdict::Accept } else { Verdict::Reject }
    }

    /// What is to be done after a rejection: blocked items again, then what the architect asks for, then an item for each
    /// failing check or rejected criterion that nobody has taken up.
    fn next(&self, criteria: &[Criterion], asked: Vec<Todo>) -> Vec<Todo> {
        let mut next: Vec<Todo> = self.blocked().cloned().collect();
        next.extend(asked);
        let taken_up = |next: &[Todo], requirement: &str| {
            next.iter().any(|item| item.requirements.iter().any(|id| id.eq_ignore_ascii_case(requirement)))
        };
        for item in &self.plan.items {
            let failing: Vec<&CheckResult> =
                self.results.iter().filter(|(id, r)| *id == item.id && !r.passed).map(|(_, r)| r).collect();
            if failing.is_empty() || item.requirements.iter().any(|id| taken_up(&next, id)) {
                continue;
            }
            let reasons: Vec<String> = failing.iter().map(|result| check::describe(result)).collect();
            let detail = format!("A check that passed before fails on main now: {}.", reasons.join("; "));
            next.push(self.repair(&next, &item.id, format!("Make the checks of {} pass again", item.id), detail, item));
        }
        for criterion in criteria.iter().filter(|c| c.verdict == Verdict::Reject) {
            let id = &criterion.requirement;
            let serves = |item: &&Todo| item.requirements.iter().any(|r| r.eq_ignore_ascii_case(id));
            let (false, Some(item)) = (taken_up(&next, id), self.plan.items.iter().rev().find(serves)) else {
                continue;
            };
            let detail = format!("The review rejected {id}: {}", criterion.reason);
            next.push(self.repair(&next, id, format!("Satisfy {id}"), detail, item));
        }
        next
    }

    /// An item of our own, with the checks of the one that it mends.
    fn repair(&self, next: &[Todo], about: &str, title: String, detail: String, like: &Todo) -> Todo {
        let about = about.to_ascii_lowercase();
        let free = |id: &String| self.plan.items.iter().chain(next).all(|item| item.id != *id);
        // Fewer ids are taken than there are numbers.
        let id = (1u32..).map(|n| format!("mend-{about}-{n}")).find(free).unwrap_or_default();
        Todo { id, title, detail, depends_on: vec![], ..like.clone() }
    }

    fn report(&self, verdict: Verdict, criteria: &[Criterion], todo: &[Todo], summary: &str) -> String {
        let mut out = match verdict {
            Verdict::Accept => "**Accepted.**".to_owned(),
            Verdict::Reject => "**Rejected.**".to_owned(),
        };
        let _ = writeln!(out, " {summary}\n");
        let passed = self.results.iter().filter(|(_, result)| result.passed).count();
        let _ = writeln!(out, "Checks: {passed} of {} pass.", self.results.len());
        for (item, result) in self.results.iter().filter(|(_, result)| !result.passed) {
            let _ = writeln!(out, "- {item}: {}", check::describe(result));
        }
        for item in self.blocked() {
            let _ = writeln!(out, "- {} is not done: {}", item.id, item.title);
        }
        out.push('\n');
        for criterion in criteria {
            let word = if criterion.verdict == Verdict::Accept { "accepted" } else { "rejected" };
            let places: Vec<String> = criterion.citations.iter().map(Citation::to_string).collect();
            let _ = writeln!(
                out,
                "- {} {word}: {} [{}]",
                criterion.requirement,
                criterion.reason.trim(),
                places.join(", ")
            );
        }
        if !todo.is_empty() {
            out.push_str("\nNext:\n");
            for item in todo {
                let _ = writeln!(out, "- {}: {}", item.id, item.title);
            }
        }
        prompt::middle_out(out.trim(), REPORT_BYTES_MAX)
    }
}

impl std::fmt::Display for Citation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.path.is_empty() { write!(f, "`{}`", self.check) } else { write!(f, "{}:{}", self.path, self.line) }
    }
}

#[cfg(test)]
mod tests;
