//! One run in one database, with a worker process of its own: begun, driven to its end, its owner's part played.

use super::{
    narrate::Narrator,
    worker::{QUEUE, Worker},
};
use crate::{app::App, read::task};
use anyhow::Context as _;
use loopwright_activities::billing::{
    MicroCredits,
    ledger::{self, GrantSource},
};
use loopwright_engine::{
    client::{Decision, Filter, Signal, Start},
    ids::RunId,
    transaction,
    view::{RunView, Waiting},
};
use serde_json::{Value, json};
use std::{
    io::Write,
    path::{Path, PathBuf},
    time::Duration,
};
use tokio::sync::watch;
use uuid::Uuid;

/// How often the run is looked at.
const LOOK: Duration = Duration::from_millis(100);
/// Transitions read at once.
const BATCH: u32 = 500;
/// What a real idea may cost: the budget of the shipped workflow.
const IDEA_CREDITS: i64 = 500;

/// What is built, and who answers.
#[derive(Clone, Debug)]
pub(super) struct Subject {
    pub idea: String,
    pub name: String,
    pub answers: Answers,
    pub crash: bool,
    pub rehearsed: bool,
}

impl Subject {
    pub(super) fn kind(&self) -> &'static str {
        match (self.rehearsed, self.crash) {
            (false, _) => "idea",
            (true, true) => "crash",
            (true, false) => "rehearsal",
        }
    }

    /// Kept with a run, so that the same command finds it again.
    fn mark(&self) -> Value {
        json!({"demo": self.kind()})
    }
}

/// Who plays the owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answers {
    /// The first suggestion of each question, and approval: the rehearsed owner.
    Suggested,
    /// "You decide", and approval of the plan; a rejected work stays rejected.
    Default,
    /// Whoever sits at the terminal.
    Terminal,
}

/// When the worker is to be killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Crash {
    /// In an `implement` attempt that has bought answers and runs a command.
    InAttempt,
}

/// Why driving ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    /// The run is closed, or nothing more happens without its owner.
    Over,
    /// A signal asked this process to stop.
    Stopped,
}

/// One run with its database and worker.
pub(super) struct Stage {
    pub app: App,
    pub run: RunId,
    pub project: Uuid,
    pub user: Uuid,
    /// Which of the demo's runs it is.
    pub label: &'static str,
    /// Folder of the demo.
    pub work: PathBuf,
    /// Workers that were killed.
    pub crashes: u32,
    worker: Worker,
}

/// The open run of this subject, if an earlier call left one.
pub(super) async fn open_run(app: &App, subject: &Subject) -> anyhow::Result<Option<RunId>> {
    let filter = Filter { attributes: Some(subject.mark()), open_only: true, limit: 20, ..Filter::default() };
    for run in app.client.list(filter).await? {
        if app.client.describe(run.run_id).await?.inputs["idea"] == json!(subject.idea) {
            return Ok(Some(run.run_id));
        }
    }
    Ok(None)
}

impl Stage {
    /// Makes user, project and run, or finds them: everything follows from the run's id.
    pub(super) async fn begin(
        app: App,
        subject: &Subject,
        run: RunId,
        label: &'static str,
        config_file: Option<&Path>,
    ) -> anyhow::Result<Self> {
        app.deploy_shipped().await?;
        let issuer = &app.config.auth.issuer;
        // A user of its own, so that its credits tell the story of this run and of nothing else.
        let user = app.store.user_of(issuer, &format!("demo:{run}"), issuer).await?.id;
        let project = Uuid::new_v5(&run.0, b"project");
        app.store.create_project_as(project, user, &subject.name, &subject.idea, crate::rest::WORKFLOW).await?;
        let known = app.store.project(user, project).await?.context("the demo's project is gone")?;
        if !subject.rehearsed {
            let mut tx = transaction::begin(&app.pool).await?;
            let have = ledger::balance(&mut tx, user).await?.available();
            let missing = MicroCredits(MicroCredits::from_credits(IDEA_CREDITS).0 - have.0);
            if missing.0 > 0 {
                ledger::grant(&mut tx, user, GrantSource::Promo, &format!("demo:{run}"), missing, None).await?;
            }
            tx.commit().await?;
        }
        let definition = app.client.pointer(&known.workflow_name, "current").await?;
        // A queue of its own: the worker of a `dev` on the same database would answer with other models.
        let queue = QUEUE.to_owned();
        let mut start = Start { run_id: Some(run), queue, ..known.start(user, definition) };
        merge(&mut start.attributes, subject.mark());
        app.client.start(start).await?;
        let work = app.config.data_dir.join("demo");
        let worker = Worker::new(work.join(label), config_file, app.database_url.clone(), subject.rehearsed);
        Ok(Self { app, run, project, user, label, work, crashes: 0, worker })
    }

    /// Follows the run to its end, playing its owner and telling what happens.
    ///
    /// # Errors
    /// A worker that keeps ending by itself, with the end of its log.
    pub(super) async fn drive(
        &mut self,
        subject: &Subject,
        mut stop: watch::Receiver<bool>,
        mut crash: Option<Crash>,
    ) -> anyhow::Result<Ended> {
        let mut narrator = Narrator::new();
        let mut after = 0;
        let ended = loop {
            let rows = self.app.client.history(self.run, after, BATCH).await?;
            for row in &rows {
                after = row.seq;
                narrator.row(row);
            }
            if !rows.is_empty() {
                narrator.spent(self.app.store.charged(self.user).await?);
                continue;
            }
            let view = self.app.client.describe(self.run).await?;
            if view.seq > after {
                continue;
            }
            if view.status.is_closed() {
                break Ended::Over;
            }
            narrator.live(&view);
            if let Some(remark) = self.worker.keep()? {
                narrator.say(&format!("        {remark}"));
            }
            if crash.is_some() && self.is_the_moment(&view).await? {
                self.worker.kill()?;
                self.crashes += 1;
                crash = None;
                narrator.say(
                    "        ✗ the worker is killed with SIGKILL in the middle of this attempt; another one starts",
                );
                continue;
            }
            if task::is_parked(&view) && !self.answer(subject, &view, &mut narrator, &mut stop).await? {
                break if *stop.borrow() { Ended::Stopped } else { Ended::Over };
            }
            tokio::select! {
                changed = self.app.client.wait_change(self.run, after, LOOK) => { changed?; }
                _ = stop.wait_for(|stop| *stop) => break Ended::Stopped,
            }
        };
        narrator.finish();
        self.worker.stop().await;
        Ok(ended)
    }

    /// Stops the worker and closes the database.
    pub(super) async fn close(mut self) {
        self.worker.stop().await;
        self.app.close().await;
    }

    /// Whether an attempt of `implement` is in its middle: it has bought answers, and a command runs, so that no call is
    /// under way whose answer would be lost.
    async fn is_the_moment(&self, view: &RunView) -> anyhow::Result<bool> {
        let running = |live: &&loopwright_engine::view::LiveAttempt| {
            live.activity.starts_with("implement@")
                && live.progress["tool"] == "run"
                && live.progress["turn"].as_u64().is_some_and(|turn| turn >= 2)
        };
        if !view.live.iter().any(|live| running(&live)) {
            return Ok(false);
        }
        Ok(self.app.store.calls(self.run).await?.open == 0)
    }

    /// Answers what the run waits for. False when nobody can, or when this process is to stop.
    async fn answer(
        &mut self,
        subject: &Subject,
        view: &RunView,
        narrator: &mut Narrator,
        stop: &mut watch::Receiver<bool>,
    ) -> anyhow::Result<bool> {
        for waiting in &view.waiting {
            match waiting {
                Waiting::Signal { path, signal, show, .. } => {
                    let suggestions = suggestions(view);
                    let question = show.clone().unwrap_or_default();
                    let text = match subject.answers {
                        Answers::Suggested => suggestions.first().cloned(),
                        Answers::Default => None,
                        Answers::Terminal => {
                            narrator.pause();
                            match ask(&question, &suggestions, stop).await? {
                                Some(text) => Some(text).filter(|text| !text.is_empty()),
                                None => return Ok(false),
                            }
                        }
                    };
                    let text = text.unwrap_or_else(|| {
                        "You decide: take the simplest reasonable reading and list it as an assumption.".to_owned()
                    });
                    narrator.say(&format!("        answer: {text}"));
                    self.signal(signal, path, json!({ "text": text })).await?;
                }
                Waiting::Approval { step, path, show, .. } => {
                    let (decision, comment) = match subject.answers {
                        // A review that was not passed to the end is nobody's to wave through.
                        _ if step != "approve" && subject.answers != Answers::Terminal => (Decision::Rejected, None),
                        Answers::Suggested | Answers::Default => (Decision::Approved, None),
                        Answers::Terminal => {
                            narrator.pause();
                            match decide(show.as_deref().unwrap_or_default(), stop).await? {
                                Some(decision) => decision,
                                None => return Ok(false),
                            }
                        }
                    };
                    let dedupe = Some(format!("demo:{path}"));
                    match self.app.client.approve(self.run, step, decision, comment, dedupe, self.sender()).await {
                        Ok(true) => narrator.say(&format!("        {}", decision.as_str().replace('_', " "))),
                        // Said before: the run has not read it yet, or it has read it between our look and this.
                        Ok(false) | Err(loopwright_engine::Error::ApprovalNotWaiting(..)) => {}
                        Err(error) => return Err(error.into()),
                    }
                }
                Waiting::Blocked { message, .. } => {
                    narrator.say(&format!("        waits: {message}"));
                    narrator.say(&format!("        loopwright credits grant 100 --user {}", self.user));
                    return Ok(false);
                }
                Waiting::Timer { .. } | Waiting::Retry { .. } | Waiting::Child { .. } | Waiting::Queued { .. } => {}
            }
        }
        Ok(true)
    }

    async fn signal(&self, name: &str, path: &str, payload: Value) -> anyhow::Result<()> {
        let dedupe_id = Some(format!("demo:{path}"));
        let signal = Signal { name: name.to_owned(), payload, dedupe_id, sender: self.sender() };
        self.app.client.signal(self.run, signal).await?;
        Ok(())
    }

    fn sender(&self) -> Option<String> {
        Some(format!("user:{}", self.user))
    }
}

/// Adds the fields of an object to another.
fn merge(into: &mut Value, more: Value) {
    if let (Value::Object(into), Value::Object(more)) = (into, more) {
        into.extend(more);
    }
}

/// Suggested answers of the question that was asked last.
fn suggestions(view: &RunView) -> Vec<String> {
    let output = view.nodes.iter().rev().find(|node| node.step == "ask").and_then(|node| node.output.as_ref());
    let list = output.and_then(|output| output["suggestions"].as_array());
    list.into_iter().flatten().filter_map(|text| text.as_str().map(str::to_owned)).collect()
}

/// One line from the terminal; `None` when this process is to stop or the terminal is closed.
async fn line(stop: &mut watch::Receiver<bool>) -> anyhow::Result<Option<String>> {
    let read = tokio::task::spawn_blocking(|| {
        let mut text = String::new();
        std::io::stdin().read_line(&mut text).map(|n| (n > 0).then(|| text.trim().to_owned()))
    });
    tokio::select! {
        read = read => Ok(read??),
        _ = stop.wait_for(|stop| *stop) => Ok(None),
    }
}

async fn ask(
    question: &str,
    suggestions: &[String],
    stop: &mut watch::Receiver<bool>,
) -> anyhow::Result<Option<String>> {
    eprintln!("\n{question}");
    for (n, suggestion) in suggestions.iter().enumerate() {
        eprintln!("  {}. {suggestion}", n + 1);
    }
    eprint!("Your answer (a number, words, or nothing for \"you decide\"): ");
    std::io::stderr().flush()?;
    let Some(text) = line(stop).await? else { return Ok(None) };
    let chosen = text.parse::<usize>().ok().and_then(|n| suggestions.get(n.checked_sub(1)?)).cloned();
    Ok(Some(chosen.unwrap_or(text)))
}

async fn decide(show: &str, stop: &mut watch::Receiver<bool>) -> anyhow::Result<Option<(Decision, Option<String>)>> {
    eprintln!("\n{show}\n");
    loop {
        eprint!("Approve? (y: yes, n: no, or say what should change): ");
        std::io::stderr().flush()?;
        let Some(text) = line(stop).await? else { return Ok(None) };
        match text.to_lowercase().as_str() {
            "" => {}
            "y" | "yes" => return Ok(Some((Decision::Approved, None))),
            "n" | "no" => return Ok(Some((Decision::Rejected, None))),
            _ => return Ok(Some((Decision::ChangesRequested, Some(text)))),
        }
    }
}
