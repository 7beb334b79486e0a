//! `check@1`: runs an item's frozen commands over a snapshot, in the sandbox. What comes out is evidence.

use crate::{
    contract,
    sandbox::{Evidence, Level, Limits, SandboxCommand},
    todo::{Check, Todo},
    toolbox::Toolbox,
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
use std::{collections::BTreeMap, path::Path, sync::Arc, time::Duration};
use uuid::Uuid;

/// How often a running command is reported alive.
const HEARTBEAT_EVERY: Duration = Duration::from_secs(10);
/// End of a command's output that is kept as evidence, in bytes.
const TAIL_BYTES: usize = 6 << 10;

/// What `check@1` is given.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
pub struct Input {
    #[schemars(with = "String")]
    pub project_id: Uuid,
    pub todo: Todo,
    /// The snapshot to check; empty when the implementer left none.
    #[serde(default)]
    pub work: String,
    /// This step's output of the round before: who has failed the same way twice in a row is not asked a third time.
    #[serde(default)]
    pub previous: Value,
    /// Why there is no snapshot, where there is none.
    #[serde(default)]
    pub reason: String,
}

/// One command and what became of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct CheckResult {
    pub command: String,
    pub passed: bool,
    pub expect_exit: i32,
    /// `null` when it was killed.
    pub exit_code: Option<i32>,
    pub timed_out: bool,
    pub duration_ms: u64,
    pub output_tail: String,
    /// Of the whole output.
    pub log_sha256: String,
    /// How well it was confined.
    pub sandbox: String,
}

/// What `check@1` returns: the evidence of an item.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Output {
    pub passed: bool,
    /// Whether another round may help: there is work, and it has not failed the same way three times in a row.
    pub again: bool,
    /// It failed the same way as the round before: the next round is another model's, or there is none.
    #[serde(default)]
    pub repeated: bool,
    /// The snapshot that was checked.
    pub work: String,
    /// What failed, in one line; empty when passed.
    pub reason: String,
    pub results: Vec<CheckResult>,
}

/// The activity.
pub struct RunChecks(Arc<Toolbox>);

impl RunChecks {
    #[must_use]
    pub fn new(toolbox: Arc<Toolbox>) -> Self {
        Self(toolbox)
    }
}

/// The contract.
#[must_use]
pub fn signature() -> Signature {
    Signature {
        metered: false,
        ..contract::signature::<Input, Output>(
            "check@1",
            "Runs the checks of an item in the sandbox",
            &["transient.sandbox", "workspace.missing"],
        )
    }
}

impl Activity for RunChecks {
    fn signature(&self) -> Signature {
        signature()
    }

    fn run(&self, ctx: Context, input: Value) -> BoxFuture<'static, Result<Value, Failure>> {
        let toolbox = self.0.clone();
        contract::run(ctx, input, move |ctx, input| async move { work(&toolbox, &ctx, input).await })
    }
}

async fn work(toolbox: &Toolbox, ctx: &Context, input: Input) -> Result<Output, Failure> {
    if input.work.is_empty() {
        let reason = if input.reason.is_empty() { "nothing was implemented".to_owned() } else { input.reason };
        return Ok(Output {
            passed: false,
            again: false,
            repeated: false,
            work: String::new(),
            reason,
            results: Vec::new(),
        });
    }
    let workspace = toolbox.workspaces.open(input.project_id, ctx.info().attempt_id, Some(&input.work)).await?;
    let results = run_all(toolbox, ctx, workspace.dir(), &input.todo.checks).await?;
    // Without a single command there is no evidence, and "done" rests on evidence.
    let passed = !results.is_empty() && results.iter().all(|result| result.passed);
    let failed = !passed && !results.is_empty();
    let (before, stopped) = failures_of(&input.previous);
    let repeated = failed && failures(&results) == before;
    // The first repetition ends it for the model that made it, the second for everybody.
    let again = failed && !(repeated && stopped);
    let reason = match results.iter().find(|result| !result.passed) {
        Some(failed) => describe(failed),
        None if results.is_empty() => "the item has no check".to_owned(),
        None => String::new(),
    };
    Ok(Output { passed, again, repeated, work: input.work, reason, results })
}

/// Runs commands one after another, all of them whatever fails.
///
/// # Errors
/// `cancelled`, `transient.sandbox`.
pub(crate) async fn run_all(
    toolbox: &Toolbox,
    ctx: &Context,
    dir: &Path,
    checks: &[Check],
) -> Result<Vec<CheckResult>, Failure> {
    let mut results = Vec::with_capacity(checks.len());
    for (n, check) in checks.iter().enumerate() {
        ctx.check_cancelled()?;
        let progress = json!({"check": n + 1, "of": checks.len(), "command": check.command});
        results.push(run_one(toolbox, ctx, dir, check, &progress).await?);
    }
    Ok(results)
}

async fn run_one(
    toolbox: &Toolbox,
    ctx: &Context,
    dir: &Path,
    check: &Check,
    progress: &Value,
) -> Result<CheckResult, Failure> {
    let wall = Duration::from_secs(u64::from(check.timeout_s));
    let command = SandboxCommand {
        script: check.command.clone(),
        dir: dir.to_owned(),
        env: BTreeMap::new(),
        limits: Limits { wall, tail_bytes: TAIL_BYTES, ..Limits::default() },
        network: false,
    };
    let running = toolbox.sandbox.run(command, ctx.cancellation());
    tokio::pin!(running);
    let mut alive = tokio::time::interval(HEARTBEAT_EVERY);
    let evidence = loop {
        tokio::select! {
            evidence = &mut running => break evidence?,
            _ = alive.tick() => ctx.heartbeat(progress.clone()),
        }
    };
    Ok(result(check, evidence))
}

fn result(check: &Check, evidence: Evidence) -> CheckResult {
    CheckResult {
        command: check.command.clone(),
        passed: evidence.exit_code == Some(check.expect_exit) && !evidence.timed_out,
        expect_exit: check.expect_exit,
        exit_code: evidence.exit_code,
        timed_out: evidence.timed_out,
        duration_ms: evidence.duration_ms,
        output_tail: evidence.output_tail,
        log_sha256: evidence.log_sha256,
        sandbox: match evidence.level {
            Level::Bubblewrap => "bubblewrap",
            Level::Landlock => "landlock",
            Level::Unconfined => "unconfined",
        }
        .to_owned(),
    }
}

/// A failure in one line.
pub(crate) fn describe(result: &CheckResult) -> String {
    let how = match (result.timed_out, result.exit_code) {
        (true, _) => "did not end in time".to_owned(),
        (false, Some(code)) => format!("exits with {code} instead of {}", result.expect_exit),
        (false, None) => "was killed".to_owned(),
    };
    format!("`{}` {how}", result.command)
}

/// Which commands failed and how: the same twice in a row means that a repair changed nothing.
fn failures(results: &[CheckResult]) -> Vec<(String, Option<i32>, String)> {
    let failed = results.iter().filter(|result| !result.passed);
    failed.map(|result| (result.command.clone(), result.exit_code, steady(&result.output_tail))).collect()
}

/// Output without what differs from run to run: durations, ids of threads and processes, addresses.
fn steady(output: &str) -> String {
    let number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit() || b == b'.');
    let word = |word: &str| {
        let bare = word.trim_matches(|c: char| !c.is_alphanumeric());
        let duration = ["ms", "µs", "ns", "s"].iter().any(|unit| bare.strip_suffix(unit).is_some_and(number));
        let identity = word.starts_with('(') && word.ends_with(')') && number(bare);
        if duration || identity || bare.starts_with("0x") { "~".to_owned() } else { word.to_owned() }
    };
    let line = |line: &str| line.split(' ').map(word).collect::<Vec<_>>().join(" ");
    output.lines().map(line).collect::<Vec<_>>().join("\n")
}

/// What failed in the round before, and whether that was a repetition already.
fn failures_of(previous: &Value) -> (Vec<(String, Option<i32>, String)>, bool) {
    // An output of another release says nothing about this round.
    Output::deserialize(previous).map(|output| (failures(&output.results), output.repeated)).unwrap_or_default()
}

/// Evidence as an implementer should read it: without ids and figures that differ from run to run.
pub(crate) fn lesson(evidence: &Value) -> Value {
    let mut lesson = evidence.clone();
    if let Some(fields) = lesson.as_object_mut() {
        fields.remove("work");
        fields.remove("again");
        fields.remove("repeated");
    }
    for result in lesson.get_mut("results").and_then(Value::as_array_mut).into_iter().flatten() {
        if let Some(fields) = result.as_object_mut() {
            for name in ["duration_ms", "log_sha256", "sandbox"] {
                fields.remove(name);
            }
        }
    }
    lesson
}

#[cfg(test)]
mod tests {
    use super::*;

    fn result(command: &str, exit_code: Option<i32>, tail: &str) -> CheckResult {
        CheckResult {
            command: command.into(),
            passed: exit_code == Some(0),
            expect_exit: 0,
            exit_code,
            timed_out: false,
            duration_ms: 7,
            output_tail: tail.into(),
            log_sha256: "00".into(),
            sandbox: "bubblewrap".into(),
        }
    }

    #[test]
    fn the_same_failures_twice_are_recognized_whatever_their_timing() {
        let output = |tail: &str| Output {
            passed: false,
            again: true,
            repeated: false,
            work: "w".into(),
            reason: String::new(),
            results: vec![result("true", Some(0), "fine"), result("cargo test", Some(101), tail)],
        };
        let previous = serde_json::to_value(output("left 1, right 2")).expect("json");
        assert_eq!(failures(&output("left 1, right 2").results), failures_of(&previous).0);
        assert_ne!(failures(&output("left 2, right 2").results), failures_of(&previous).0);
        let told =
            |id, time| output(&format!("thread 'a' ({id}) panicked: left: 1\nFAILED. 1 failed; finished in {time}s"));
        let previous = serde_json::to_value(told(4_711, "0.02")).expect("json");
        assert_eq!(failures(&told(815, "0.13").results), failures_of(&previous).0);
        assert!(failures_of(&Value::Null).0.is_empty() && failures_of(&json!({})).0.is_empty());
    }

    #[test]
    fn lessons_hold_what_helps_and_nothing_that_varies() {
        let evidence = json!({"passed": false, "again": true, "work": "abc", "results": [result("x", None, "killed")]});
        let lesson = lesson(&evidence);
        assert!(lesson.get("work").is_none() && lesson["results"][0].get("duration_ms").is_none());
        assert_eq!(lesson["results"][0]["output_tail"], "killed");
        assert_eq!(super::lesson(&Value::Null), Value::Null);
        assert_eq!(describe(&result("x", None, "")), "`x` was killed");
    }
}
