//! How a run ended, from what the database and the repository say; and whether two runs ended alike.

use super::stage::Stage;
use crate::{
    config,
    store::{
        credits::decimal,
        loops::{Calls, Spend},
    },
};
use anyhow::Context as _;
use loopwright_activities::{billing::audit, workspace::Workspaces};
use loopwright_engine::{
    ids::RunId,
    view::{RunStatus, RunView, Waiting},
};
use serde::Serialize;
use std::{
    fmt::Write as _,
    path::{Path, PathBuf},
    process::Command,
};

/// Codes of failures that mean: the loop came to an honest end, and its owner decides what next.
const BLOCKED: [&str; 4] = ["model.", "approval.", "budget.", "user."];

/// The end of a run.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Report {
    pub run_id: String,
    pub project_id: String,
    /// `completed`, `blocked` (the work was not accepted, or models gave nothing usable), `waiting`, `failed`, `cancelled`.
    pub status: String,
    /// `accept`, `reject`, or `none` when no verification took place.
    pub verdict: String,
    /// Why it did not complete.
    pub reason: Option<String>,
    /// `null` when there is no commit.
    pub repository: Option<String>,
    pub commit: Option<String>,
    pub tree: Option<String>,
    pub commits: Vec<String>,
    pub todo: Todo,
    /// Finished calls of models.
    pub model_calls: i64,
    /// Calls whose answer was lost with their worker; they cost nothing.
    pub unknown_calls: i64,
    /// Attempts of activities, lost ones included.
    pub attempts: u64,
    /// Workers that were killed.
    pub crashes: u32,
    pub credits: Credits,
    /// Models by name; rehearsed ones say so.
    pub models: Vec<String>,
    pub rehearsed: bool,
    /// Broken rules of the ledger: none.
    pub violations: usize,
    pub seconds: u64,
    /// Only with `--crash`: each fact beside that of the undisturbed run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub comparison: Option<Vec<Compared>>,
    #[serde(skip)]
    spend: Vec<Spend>,
    #[serde(skip)]
    granted_ucr: i64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Todo {
    pub done: i64,
    pub total: i64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Credits {
    pub charged_ucr: i64,
    pub held_ucr: i64,
    pub balance_ucr: i64,
}

/// One fact of two runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Compared {
    pub what: &'static str,
    pub undisturbed: String,
    pub killed: String,
    pub same: bool,
}

impl Report {
    /// Reads the facts and takes the repository out.
    pub(super) async fn of(stage: &Stage, out: Option<&Path>) -> anyhow::Result<Self> {
        let (app, run) = (&stage.app, stage.run);
        let store = &app.store;
        let view = app.client.describe(run).await?;
        let (status, reason) = status(&view);
        let balance = store.balance(stage.user).await?.context("the demo's user is gone")?;
        let Calls { finished, unknown, .. } = store.calls(run).await?;
        let (done, total) = store.todo(stage.project).await?;
        let violations = audit::run(&mut *app.pool.acquire().await?).await?;
        let spend = store.spend(run).await?;
        let mut models: Vec<String> = spend.iter().map(|s| s.model.clone()).collect();
        models.sort();
        models.dedup();
        let (attempts, lost) = attempts(stage).await?;
        let mut report = Self {
            run_id: run.to_string(),
            project_id: stage.project.to_string(),
            status,
            verdict: store.verdict(stage.project).await?.unwrap_or_else(|| "none".into()),
            reason,
            repository: None,
            commit: None,
            tree: None,
            commits: Vec::new(),
            todo: Todo { done, total },
            model_calls: finished,
            unknown_calls: unknown,
            attempts,
            // An earlier call of the same command may have killed it.
            crashes: stage.crashes.max(lost),
            credits: Credits {
                charged_ucr: store.charged(stage.user).await?,
                held_ucr: balance.held_ucr,
                balance_ucr: balance.balance_ucr,
            },
            models,
            rehearsed: false,
            violations: violations.len(),
            seconds: 0,
            comparison: None,
            spend,
            granted_ucr: store.granted(stage.user).await?,
        };
        // What is not finished is not handed over: the same command goes on with it.
        if report.status != "waiting" {
            report.take_out(stage, out).await?;
        }
        Ok(report)
    }

    /// Clones the repository out of the database; an earlier clone of the same run is replaced.
    async fn take_out(&mut self, stage: &Stage, out: Option<&Path>) -> anyhow::Result<()> {
        let project = stage.app.store.project(None, stage.project).await?.context("the project is gone")?;
        let to = match out {
            Some(out) => {
                free(out)?;
                std::path::absolute(out)?
            }
            None => {
                let name = if stage.label == "reference" { "undisturbed" } else { &project.name };
                let to = folder(&stage.work, name, stage.run);
                if to.exists() {
                    std::fs::remove_dir_all(&to).with_context(|| format!("{} cannot be replaced", to.display()))?;
                }
                to
            }
        };
        let workspaces = Workspaces::new(stage.work.join("clone"), stage.app.pool.clone());
        match workspaces.export(stage.project, &to).await {
            Ok(commit) => self.commit = Some(commit),
            Err(failure) if failure.code == "workspace.empty" => return Ok(()),
            Err(failure) => anyhow::bail!("the repository cannot be taken out: {}", failure.message),
        }
        self.tree = git(&to, &["rev-parse", "HEAD^{tree}"])?.pop();
        self.commits = git(&to, &["log", "--reverse", "--format=%H"])?;
        self.repository = Some(to.display().to_string());
        Ok(())
    }

    /// Puts every fact that a crash must not change beside that of the undisturbed run.
    pub(super) fn compare(&mut self, undisturbed: Option<Self>) {
        let Some(other) = undisturbed else { return };
        let short = |text: &Option<String>| text.as_deref().map_or("none", |t| &t[..t.len().min(12)]).to_owned();
        let oids = |report: &Self| {
            format!(
                "{} ({})",
                report.commits.len(),
                report.commits.last().map_or("none", |oid| &oid[..oid.len().min(12)])
            )
        };
        let row = |what, undisturbed: String, killed: String, same| Compared { what, undisturbed, killed, same };
        self.comparison = Some(vec![
            row("status", other.status.clone(), self.status.clone(), other.status == self.status),
            row("verdict", other.verdict.clone(), self.verdict.clone(), other.verdict == self.verdict),
            row("tree", short(&other.tree), short(&self.tree), other.tree.is_some() && other.tree == self.tree),
            row("commits (last)", oids(&other), oids(self), other.commits == self.commits),
            row(
                "items done",
                format!("{}/{}", other.todo.done, other.todo.total),
                format!("{}/{}", self.todo.done, self.todo.total),
                other.todo == self.todo,
            ),
            row(
                "model calls",
                other.model_calls.to_string(),
                self.model_calls.to_string(),
                other.model_calls == self.model_calls,
            ),
            row(
                "credits charged",
                decimal(other.credits.charged_ucr),
                decimal(self.credits.charged_ucr),
                other.credits.charged_ucr == self.credits.charged_ucr,
            ),
        ]);
    }

    /// Whether everything is as it should be: accepted, books in order, and nothing changed by a crash.
    pub(super) fn good(&self) -> bool {
        self.status == "completed"
            && self.verdict == "accept"
            && self.violations == 0
            && self.comparison.as_ref().is_none_or(|rows| self.crashes > 0 && rows.iter().all(|row| row.same))
    }

    /// For people.
    pub(super) fn text(&self) -> String {
        let mut out = String::new();
        // Writing to a String cannot fail.
        let _ = writeln!(
            out,
            "{}: verdict {}, {} of {} items done, {} s",
            self.status, self.verdict, self.todo.done, self.todo.total, self.seconds
        );
        if let Some(reason) = &self.reason {
            let _ = writeln!(out, "  {reason}");
        }
        let _ = writeln!(out, "\nLedger (credits)");
        let _ = writeln!(out, "  {:<34} {:>12}", "granted", decimal(self.granted_ucr));
        for line in &self.spend {
            let what = format!("{} · {} · {} calls", line.purpose, line.model, line.calls);
            let _ = writeln!(out, "  {what:<34} {:>12}  {} + {} tokens", "", line.tokens_prompt, line.tokens_output);
        }
        let _ = writeln!(out, "  {:<34} {:>12}", "charged, once per attempt", decimal(-self.credits.charged_ucr));
        let _ = writeln!(out, "  {:<34} {:>12}", "balance", decimal(self.credits.balance_ucr));
        let _ = writeln!(
            out,
            "  {} model calls in {} attempts, {} killed workers, {} lost calls, {} broken rules of the ledger",
            self.model_calls, self.attempts, self.crashes, self.unknown_calls, self.violations
        );
        if let Some(rows) = &self.comparison {
            let _ = writeln!(out, "\n  {:<16} {:<30} {:<30}", "", "undisturbed", "worker killed");
            for row in rows {
                let sign = if row.same { "=" } else { "≠ DIFFERENT" };
                let _ = writeln!(out, "  {:<16} {:<30} {:<30} {sign}", row.what, row.undisturbed, row.killed);
            }
        }
        if let Some(repository) = &self.repository {
            let _ = writeln!(out, "\nThe repository: {repository}\n  git -C {repository} log --stat");
        }
        out.trim_end().to_owned()
    }
}

/// Checks that a repository can be put into a folder: asked before anything is paid, and again before it is written.
pub(super) fn free(out: &Path) -> Result<(), config::Error> {
    let bad = |reason: String| Err(config::Error::value("--out", reason));
    match std::fs::read_dir(out).map(|mut entries| entries.next().is_none()) {
        Ok(true) => {}
        Ok(false) => return bad(format!("{} is not empty; name another folder", out.display())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return bad(format!("{} cannot be used: {error}", out.display())),
    }
    match std::fs::create_dir_all(out) {
        Ok(()) => Ok(()),
        Err(error) => bad(format!("{} cannot be made: {error}", out.display())),
    }
}

/// The status in the demo's words, and why.
fn status(view: &RunView) -> (String, Option<String>) {
    let failure = view.failure.as_ref().map(|f| format!("{}: {}", f.code, f.message));
    let honest = view.failure.as_ref().is_some_and(|f| BLOCKED.iter().any(|prefix| f.code.starts_with(prefix)));
    let status = match view.status {
        RunStatus::Failed if honest => "blocked",
        status if status.is_closed() => status.as_str(),
        _ => "waiting",
    };
    let waits = view.waiting.iter().find_map(|waiting| match waiting {
        Waiting::Blocked { message, .. } => Some(message.clone()),
        _ => None,
    });
    (status.to_owned(), failure.or(waits))
}

/// A folder name for a repository.
fn folder(work: &Path, name: &str, run: RunId) -> PathBuf {
    let slug: String =
        name.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' }).collect();
    let id = run.to_string();
    // The last part of a time-ordered id is its random one.
    work.join(format!("{}-{}", slug.trim_matches('-'), &id[id.len() - 6..]))
}

/// Attempts that the history has started, and how many of them were lost with their worker.
async fn attempts(stage: &Stage) -> anyhow::Result<(u64, u32)> {
    let (mut after, mut started, mut lost) = (0, 0, 0);
    loop {
        let rows = stage.app.client.history(stage.run, after, 1000).await?;
        let Some(last) = rows.last() else { return Ok((started, lost)) };
        after = last.seq;
        for event in rows.iter().flat_map(|row| &row.events) {
            started += u64::from(event["type"] == "attempt_started");
            lost += u32::from(event["outcome"] == "lost");
        }
    }
}

/// Lines that git prints over the clone.
fn git(dir: &Path, args: &[&str]) -> anyhow::Result<Vec<String>> {
    let output = Command::new("git").arg("-C").arg(dir).args(args).output().context("git could not be started")?;
    anyhow::ensure!(output.status.success(), "git {}: {}", args[0], String::from_utf8_lossy(&output.stderr).trim());
    Ok(String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect())
}
