//! `readme@1`: the architect writes `README.md`; the commands in it are executed before it is accepted.
//!
//! Every line of a fenced `sh` block is run in the sandbox, in order, in one copy of the tree. What fails goes back to
//! the architect; what still fails at the end is named in the file, so that no reader is promised what was not seen.

use crate::{
    ask,
    check::{self, CheckResult},
    contract,
    fact::Requirements,
    implement::{self, ARCHITECTURE, reserve},
    landing::{Landing, bill, land},
    orchestrator::{Message, Opening, Orchestrator, Question, Request, Role},
    record::{self, Kind},
    todo::{self, COMMAND_BYTES_MAX, Check},
    toolbox::Toolbox,
    tools::prompt::{self, Spare},
    usage::PlannedCall,
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
use std::{fmt::Write as _, sync::Arc};
use uuid::Uuid;

/// Its name in definitions.
pub const NAME: &str = "readme@1";
/// What its calls are for, as routing and usage name it.
const PURPOSE: &str = "readme";
/// The prompt file, in the bundle of a definition.
pub const PROMPT: &str = "prompts/readme.hbs";
const SHIPPED_PROMPT: &str = include_str!("../../workflow-defs/prompts/readme.hbs");
/// The file.
pub const FILE: &str = "README.md";

/// Times that the architect may write it, in one attempt.
const VERSIONS_MAX: u32 = 3;
/// Commands of one version that are executed.
const COMMANDS_MAX: usize = 20;
/// Longest run of one command, in seconds.
const TIMEOUT_S: u32 = 120;
const OUTPUT_TOKENS_MAX: u32 = 6_144;
const RESERVED_INPUT_TOKENS: u64 = 16_000;
const BYTES_MAX: usize = 48 << 10;
const MAP_TOKENS: usize = 2_500;
const PACK_TOKENS: usize = 5_000;
const ARCHITECTURE_BYTES_MAX: usize = 10 << 10;
const EVIDENCE_BYTES_MAX: usize = 8 << 10;
/// What is given up of the prompt where a window is too small. The requirements and the list of files stay.
const SPARE: &Spare =
    &[&[("code", 6 << 10), ("map", 3 << 10)], &[("architecture", 4 << 10), ("before", 0)], &[("code", 0), ("map", 0)]];

/// What `readme@1` is given.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
pub struct Input {
    #[schemars(with = "String")]
    pub project_id: Uuid,
}

/// What `readme@1` returns.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Output {
    pub commit: String,
    /// Whether every command in it ran as it should.
    pub verified: bool,
    pub commands: Vec<CheckResult>,
    /// Times that it was written.
    pub versions: u32,
    pub model: String,
}

/// The activity.
pub struct Readme(Arc<Toolbox>);

impl Readme {
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
        "Writes README.md and executes its commands",
        &[&["transient.sandbox", "workspace.conflict"], contract::MODEL_FAILURES].concat(),
    )
}

/// What one README is expected to ask for at most.
pub(crate) fn planned(orchestrator: &Orchestrator, extras: &Value) -> PlannedCall {
    orchestrator.planned((Role::Architect, PURPOSE), extras, 1, RESERVED_INPUT_TOKENS, OUTPUT_TOKENS_MAX)
}

impl Activity for Readme {
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

async fn work(toolbox: &Toolbox, ctx: &Context, input: Input) -> Result<Output, Failure> {
    let (info, project) = (ctx.info(), input.project_id);
    let (opening, head) = opening(toolbox, ctx, project).await?;
    let request = Request {
        role: Role::Architect,
        purpose: PURPOSE.to_owned(),
        messages: Vec::new(),
        tools: Vec::new(),
        output_schema: None,
        max_output_tokens: OUTPUT_TOKENS_MAX,
    };
    let mut question = Question::opened(opening, request);
    let (mut version, mut bought) = (0, 0);
    let (text, results, model) = loop {
        version += 1;
        let key = format!("readme-{version}");
        bought += u32::from(!ask::is_recorded(ctx, &key).await?);
        let reply = toolbox.orchestrator.call(ctx, &key, question.clone()).await?;
        let text = unfenced(&reply.text);
        let commands = usable(&text);
        let results = match &commands {
            Ok(commands) => tried(toolbox, ctx, project, version, &text, commands).await?,
            Err(_) => Vec::new(),
        };
        let failed: Vec<&CheckResult> = results.iter().filter(|result| !result.passed).collect();
        if commands.is_ok() && (failed.is_empty() || version >= VERSIONS_MAX) {
            break (text, results, reply.model);
        }
        // Recorded versions are judged again by a later attempt, which may buy as many new ones, and not those as well that former
        // attempts had no time for.
        if bought >= VERSIONS_MAX || version >= VERSIONS_MAX.saturating_mul(info.counted) {
            return Err(Failure::retryable("model.output_invalid", "the model wrote no README.md that can be used"));
        }
        question.request.messages.push(reply.to_message());
        question.request.messages.push(Message::User { text: complaint(commands.err(), &failed) });
    };
    let verified = results.iter().all(|result| result.passed);
    let file = FileChange { path: FILE.to_owned(), content: Some(finished(&text, &results)) };
    let landing = Landing {
        project,
        work: None,
        subject: "readme: What it is and how to use it".to_owned(),
        body: if verified { "Every command in it was executed." } else { "" }.to_owned(),
        trailers: bill(&toolbox.pool, info, &info.path).await?,
    };
    tracing::debug!(%project, head, version, verified, "README.md is written");
    let commit = land(ctx, &toolbox.workspaces, landing, |workspace| workspace.write(&[file])).await?;
    Ok(Output { commit: commit.oid, verified, commands: results, versions: version, model })
}

/// The commands of a version; why it cannot be used otherwise.
fn usable(text: &str) -> Result<Vec<Check>, String> {
    if text.is_empty() || text.len() > BYTES_MAX {
        return Err(format!("the file is empty or longer than {BYTES_MAX} bytes"));
    }
    commands(text)
}

fn complaint(problem: Option<String>, failed: &[&CheckResult]) -> String {
    if let Some(problem) = problem {
        return format!("That file cannot be used: {problem}.\nWrite the whole file again.");
    }
    let evidence = prompt::readable(&check::lesson(&json!({"results": failed}))["results"], EVIDENCE_BYTES_MAX);
    format!(
        "These commands of your file failed when they were executed, in order, in a fresh copy of the repository:\n\
         <evidence>\n{evidence}\n</evidence>\nWrite the whole file again with commands that work."
    )
}

async fn opening(toolbox: &Toolbox, ctx: &Context, project: Uuid) -> Result<(Opening, String), Failure> {
    let info = ctx.info();
    let requirements: Option<Requirements> = record::newest(&toolbox.pool, project, Kind::Requirements, info).await?;
    let name = record::project_name(&toolbox.pool, project).await?;
    let desk = implement::open(toolbox, info, project, None).await?;
    let workspace = desk.tree.workspace();
    let query = "main entry point command line usage arguments configuration environment build run test".to_owned();
    let (map, code) =
        desk.tree.ask(move |index| Ok((index.map(MAP_TOKENS)?, index.pack(&query, PACK_TOKENS)?.text))).await?;
    let files: Vec<String> = workspace.files().await?.into_iter().map(|(path, _)| path).take(200).collect();
    let data = json!({
        "name": name,
        "requirements": requirements.map(|r| r.requirements).unwrap_or_default(),
        "architecture": implement::excerpt(workspace, ARCHITECTURE, ARCHITECTURE_BYTES_MAX),
        "before": implement::excerpt(workspace, FILE, ARCHITECTURE_BYTES_MAX),
        "files": files,
        "map": map,
        "code": code,
    });
    let head = workspace.head().unwrap_or_default().to_owned();
    Ok((prompt::opening(ctx, PROMPT, SHIPPED_PROMPT, &data, SPARE)?, head))
}

/// Runs the commands of a version, once: a later attempt finds what came of them.
async fn tried(
    toolbox: &Toolbox,
    ctx: &Context,
    project: Uuid,
    version: u32,
    text: &str,
    commands: &[Check],
) -> Result<Vec<CheckResult>, Failure> {
    let saved = format!("tried:{version}");
    if let Some(results) = ctx.checkpoint(&saved).await? {
        return contract::parse(results);
    }
    let workspace = toolbox.workspaces.open(project, ctx.info().attempt_id, None).await?;
    workspace.write(&[FileChange { path: FILE.to_owned(), content: Some(text.to_owned()) }])?;
    let results = check::run_all(toolbox, ctx, workspace.dir(), commands).await?;
    ctx.save(&saved, &json!(results)).await?;
    Ok(results)
}

/// The lines of fenced `sh`, `bash` and `shell` blocks that are commands, continued lines joined.
///
/// # Errors
/// When there are more, or longer ones, than are executed: nothing in the file may pass for executed that was not.
fn commands(markdown: &str) -> Result<Vec<Check>, String> {
    let mut found = Vec::new();
    let (mut inside, mut pending) = (None::<bool>, String::new());
    for line in markdown.lines() {
        let trimmed = line.trim();
        if let Some(info) = trimmed.strip_prefix("```") {
            inside = match inside {
                None => Some(matches!(info.trim(), "sh" | "bash" | "shell")),
                Some(_) => None,
            };
            if !pending.is_empty() {
                return Err(format!("a command ends with a backslash and its block: {}", todo::code(&pending)));
            }
            continue;
        }
        if inside != Some(true) || (pending.is_empty() && (trimmed.is_empty() || trimmed.starts_with('#'))) {
            continue;
        }
        let line = if pending.is_empty() { trimmed.strip_prefix("$ ").unwrap_or(trimmed) } else { trimmed };
        if let Some(begun) = line.strip_suffix('\\') {
            pending.push_str(begun);
            continue;
        }
        pending.push_str(line);
        let command = std::mem::take(&mut pending);
        if command.len() > COMMAND_BYTES_MAX {
            return Err(format!(
                "a command is longer than {COMMAND_BYTES_MAX} bytes; put it into a script of the project"
            ));
        }
        if found.len() == COMMANDS_MAX {
            return Err(format!(
                "more than {COMMANDS_MAX} commands are in `sh` blocks; keep the ones that a reader needs"
            ));
        }
        found.push(Check { command, expect_exit: 0, timeout_s: TIMEOUT_S });
    }
    Ok(found)
}

/// The text without the fence that models like to put around a whole file.
fn unfenced(text: &str) -> String {
    let text = text.trim();
    let inner = ["```markdown\n", "```md\n"].iter().find_map(|fence| text.strip_prefix(fence));
    let inner = inner.and_then(|inner| inner.trim_end().strip_suffix("```"));
    inner.unwrap_or(text).trim().to_owned()
}

/// The file as it is committed: what did not work is said.
fn finished(text: &str, results: &[CheckResult]) -> String {
    let mut out = format!("{}\n", text.trim_end());
    let failed: Vec<&CheckResult> = results.iter().filter(|result| !result.passed).collect();
    if !failed.is_empty() {
        out.push_str(
            "\n## Not verified\n\nThese commands failed when this file was written, in a sandbox without network:\n\n",
        );
        for result in failed {
            let _ = writeln!(out, "- {}", todo::code(&result.command));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_the_lines_of_shell_blocks() {
        let text = "# T\n```sh\n# build\ncargo build\n\n$ cargo run -- \\\n  --top 2\n```\n```text\nrm -rf /\n```\n~~~\n```bash\necho done\n```\n";
        let found: Vec<String> = commands(text).expect("few").into_iter().map(|check| check.command).collect();
        assert_eq!(found, ["cargo build", "cargo run -- --top 2", "echo done"]);
        assert!(commands("no blocks, ```sh``` inline").expect("none").is_empty());
        assert_eq!(commands("```sh\nx\n").expect("an open block").len(), 1);
        let many = format!("```sh\n{}```\n", "true\n".repeat(COMMANDS_MAX + 1));
        assert!(commands(&many).expect_err("too many").contains("more than 20"));
        assert!(commands(&format!("```sh\n{}\n```", "x".repeat(COMMAND_BYTES_MAX + 1))).is_err());
        assert!(commands("```sh\ncargo run \\\n```").expect_err("cut").contains("backslash"));
    }

    #[test]
    fn a_fence_around_the_whole_file_is_taken_off() {
        assert_eq!(unfenced("```markdown\n# T\n```sh\nx\n```\n```"), "# T\n```sh\nx\n```");
        assert_eq!(unfenced("# T\n"), "# T");
    }

    #[test]
    fn what_failed_is_named() {
        let result = |command: &str, passed| CheckResult {
            command: command.into(),
            passed,
            expect_exit: 0,
            exit_code: Some(i32::from(!passed)),
            timed_out: false,
            duration_ms: 1,
            output_tail: String::new(),
            log_sha256: String::new(),
            sandbox: "bubblewrap".into(),
        };
        let all = finished("# T\n\n", &[result("a", true)]);
        assert_eq!(all, "# T\n");
        let some = finished("# T", &[result("a", true), result("b", false)]);
        assert!(some.contains("## Not verified") && some.ends_with("- `b`\n"), "{some}");
    }
}
