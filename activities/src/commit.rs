//! `commit@1`: one item becomes one commit, or a line in `TODO.md` that says why not.
//!
//! Work whose checks passed lands on `main` with its item ticked. Work whose checks failed to the end does not: the tree
//! that others build on stays whole, the snapshot stays stored under the id that the trailer names, and the item is
//! marked as blocked.

use crate::{
    check, contract,
    fact::{Outcome, Plan},
    landing::{Landing, bill, land},
    record::{self, Kind},
    todo::{self, State, Todo},
    toolbox::Toolbox,
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
use serde_json::Value;
use std::{fmt::Write as _, sync::Arc};
use uuid::Uuid;

/// What `commit@1` is given.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
pub struct Input {
    #[schemars(with = "String")]
    pub project_id: Uuid,
    pub todo: Todo,
    /// Output of `check@1`.
    pub checks: check::Output,
    /// The snapshot that was checked; empty when there is none.
    #[serde(default)]
    pub work: String,
}

/// What `commit@1` returns.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Output {
    pub oid: String,
    pub tree: String,
    pub state: State,
    /// Why it is blocked; empty when done.
    pub reason: String,
}

/// The activity.
pub struct Commit(Arc<Toolbox>);

impl Commit {
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
            "commit@1",
            "Commits an item whose checks passed, or marks it as blocked",
            &["workspace.conflict", "workspace.missing"],
        )
    }
}

impl Activity for Commit {
    fn signature(&self) -> Signature {
        signature()
    }

    fn run(&self, ctx: Context, input: Value) -> BoxFuture<'static, Result<Value, Failure>> {
        let toolbox = self.0.clone();
        contract::run(ctx, input, move |ctx, input| async move { work(&toolbox, &ctx, input).await })
    }
}

async fn work(toolbox: &Toolbox, ctx: &Context, input: Input) -> Result<Output, Failure> {
    let (info, pool, project, item) = (ctx.info(), &toolbox.pool, input.project_id, &input.todo);
    // Evidence counts only for the snapshot that it was taken from.
    let passed = input.checks.passed && !input.work.is_empty() && input.checks.work == input.work;
    let state = if passed { State::Done } else { State::Blocked };
    let plan: Option<Plan> = record::newest(pool, project, Kind::Plan, info).await?;
    let mut items = plan.map(|plan| plan.items).unwrap_or_default();
    if !items.iter().any(|known| known.id == item.id) {
        items.push(item.clone());
    }
    let mut states = record::states(pool, project, info).await?;
    states.insert(item.id.clone(), state);
    let name = record::project_name(pool, project).await?;
    let list = FileChange { path: todo::FILE.to_owned(), content: Some(todo::markdown(&name, &items, &states)) };

    let block = info.path.rsplit_once('/').map_or("", |(block, _)| block);
    let mut trailers = vec![("Loopwright-Item".to_owned(), item.id.clone())];
    if !passed && !input.work.is_empty() {
        trailers.push(("Loopwright-Work".to_owned(), input.work.clone()));
    }
    trailers.extend(bill(pool, info, &format!("{block}/")).await?);
    let landing = Landing {
        project,
        work: passed.then_some(input.work.as_str()),
        subject: subject(item, state),
        body: body(item, &input.checks),
        trailers,
    };
    let commit = land(ctx, &toolbox.workspaces, landing, |workspace| workspace.write(&[list])).await?;
    let outcome = Outcome {
        item: item.id.clone(),
        state,
        commit: commit.oid.clone(),
        tree: commit.tree.clone(),
        evidence: input.checks.clone(),
    };
    record::put(pool, project, Kind::Outcome, info, &outcome).await?;
    let reason = if passed { String::new() } else { input.checks.reason };
    Ok(Output { oid: commit.oid, tree: commit.tree, state, reason })
}

/// At most 72 characters, as git shows them.
fn subject(item: &Todo, state: State) -> String {
    let text = match state {
        State::Done => format!("{}: {}", item.id, item.title),
        State::Blocked => format!("{}: Blocked, {}", item.id, item.title),
    };
    if text.chars().count() <= 72 { text } else { text.chars().take(71).chain(['…']).collect() }
}

fn body(item: &Todo, checks: &check::Output) -> String {
    let mut out = String::new();
    if !item.requirements.is_empty() {
        let _ = writeln!(out, "Serves {}.", item.requirements.join(", "));
    }
    for result in &checks.results {
        let how = if result.passed { "passed" } else { "failed" };
        let _ = writeln!(out, "- {how}: {}", todo::code(&result.command));
    }
    if checks.results.is_empty() && !checks.reason.is_empty() {
        let _ = writeln!(out, "{}", checks.reason);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subjects_fit_and_say_what_is_blocked() {
        let item = |title: &str| Todo {
            id: "count".into(),
            title: title.into(),
            detail: String::new(),
            requirements: vec!["R1".into()],
            depends_on: vec![],
            files: vec![],
            checks: vec![],
            frozen: vec![],
        };
        assert_eq!(subject(&item("Count words"), State::Done), "count: Count words");
        assert_eq!(subject(&item("Count words"), State::Blocked), "count: Blocked, Count words");
        let long = subject(&item(&"é".repeat(100)), State::Done);
        assert!(long.chars().count() == 72 && long.ends_with('…'), "{long}");
    }
}
