//! What happens in a run, as lines for people, while it happens. On a terminal a last line shows what is under way.

use crate::store::credits::decimal;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use loopwright_engine::view::{HistoryRow, RunView};
use serde_json::Value;
use std::{io::IsTerminal, time::Duration};

/// Longest line of a text that a model or a command wrote, in characters.
const TEXT_MAX: usize = 110;

/// Tells a run.
pub(super) struct Narrator {
    bar: ProgressBar,
    script: Script,
    spent_ucr: i64,
}

impl Narrator {
    pub(super) fn new() -> Self {
        let target =
            if std::io::stderr().is_terminal() { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(None, target);
        if let Ok(style) = ProgressStyle::with_template("{spinner} {elapsed:>4}  {wide_msg}") {
            bar.set_style(style);
        }
        bar.enable_steady_tick(Duration::from_millis(120));
        Self { bar, script: Script::default(), spent_ucr: 0 }
    }

    /// One line.
    pub(super) fn say(&self, line: &str) {
        if self.bar.is_hidden() {
            eprintln!("{line}");
        } else {
            self.bar.suspend(|| eprintln!("{line}"));
        }
    }

    /// One transition.
    pub(super) fn row(&mut self, row: &HistoryRow) {
        for event in &row.events {
            for line in self.script.lines(event, &row.events) {
                self.say(&line);
            }
        }
    }

    /// What has been charged by now.
    pub(super) fn spent(&mut self, ucr: i64) {
        self.spent_ucr = ucr;
    }

    /// What is under way.
    pub(super) fn live(&self, view: &RunView) {
        let doing = view.live.first().map(|live| {
            let progress = &live.progress;
            let detail = match (progress["turn"].as_u64(), progress["tool"].as_str(), progress["command"].as_str()) {
                (_, None, Some(command)) => format!(": {}", short(command)),
                (Some(turn), Some(tool), _) => format!(", turn {turn}: {tool}"),
                (Some(turn), None, _) => format!(", turn {turn}"),
                _ => String::new(),
            };
            let again = if live.attempt > 1 { format!(" (attempt {})", live.attempt) } else { String::new() };
            format!("{}{detail}{again}", live.activity.split('@').next().unwrap_or_default())
        });
        let doing = doing.unwrap_or_else(|| view.status.as_str().to_owned());
        self.bar.set_message(format!("{doing} · {} · {} credits", self.script.position(), decimal(self.spent_ucr)));
    }

    /// Leaves the terminal to somebody else.
    pub(super) fn pause(&self) {
        self.bar.set_message("");
        self.bar.disable_steady_tick();
        self.bar.suspend(|| {});
    }

    pub(super) fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

/// What has been told, as far as later lines need it.
#[derive(Default)]
struct Script {
    /// Ids and titles of the plan's items in order.
    items: Vec<(String, String)>,
    done: usize,
}

impl Script {
    fn position(&self) -> String {
        if self.items.is_empty() {
            "no plan yet".into()
        } else {
            format!("{} of {} items done", self.done, self.items.len())
        }
    }

    /// The lines that an event is worth; `beside` are all events of its transition.
    fn lines(&mut self, event: &Value, beside: &[Value]) -> Vec<String> {
        let text = |key: &str| event[key].as_str().unwrap_or_default();
        let path = text("path");
        match text("type") {
            "attempt_started" if event["attempt"].as_u64() > Some(1) => {
                vec![format!("        attempt {} goes on from the checkpoints of the last", event["attempt"])]
            }
            "attempt_ended" => match text("outcome") {
                "succeeded" => {
                    // The output is the step's, and stands there.
                    let ended = beside.iter().find(|e| e["type"] == "step_ended" && e["path"] == path);
                    self.ended(text("activity"), path, ended.map_or(&Value::Null, |e| &e["output"]))
                }
                "lost" => vec!["        ✗ the attempt is lost: its worker is gone".to_owned()],
                outcome => {
                    let failure = &event["failure"];
                    let said = |key: &str| failure[key].as_str().unwrap_or_default();
                    vec![format!("        ✗ {outcome}: {}: {}", said("code"), short(said("message")))]
                }
            },
            "attempt_blocked" => vec![format!("        waits: {}", text("message"))],
            _ => Vec::new(),
        }
    }

    fn ended(&mut self, activity: &str, path: &str, output: &Value) -> Vec<String> {
        let said = |key: &str| output[key].as_str().unwrap_or_default();
        match activity.split('@').next().unwrap_or_default() {
            "gather" if output["complete"] == true => {
                let count = |key: &str| output[key].as_array().map_or(0, Vec::len);
                vec![format!("gather    {} requirements, {} assumptions", count("requirements"), count("assumptions"))]
            }
            "gather" => vec![format!("gather    asks: {}", said("question"))],
            "plan" => {
                self.items.clear();
                self.add(&output["todo"]);
                let mut lines = vec![format!(
                    "plan      {} items, {} to {} credits expected, commit {}",
                    self.items.len(),
                    said("forecast_low_credits"),
                    said("forecast_high_credits"),
                    hash(said("commit"))
                )];
                lines.extend(self.items.iter().map(|(id, title)| format!("          [ ] {id}: {title}")));
                lines
            }
            "limit" => vec![format!("limit     {} credits from here on, as approved", said("left_credits"))],
            "implement" => {
                let n = item(path).and_then(|id| self.items.iter().position(|(known, _)| *known == id));
                let title = n.map_or("", |n| self.items[n].1.as_str());
                let files = output["changed_files"].as_array().map_or(0, Vec::len);
                let place = n.map_or(0, |n| n + 1);
                vec![format!(
                    "implement {place}/{} {title}: {files} files in {} turns by {}",
                    self.items.len(),
                    output["turns"],
                    said("model")
                )]
            }
            "check" if output["passed"] == true => vec!["check     ✓ passed".to_owned()],
            "check" => vec![format!("check     ✗ {}", short(said("reason")))],
            "commit" => {
                self.done += usize::from(output["state"] == "done");
                let blocked = if output["state"] == "done" { "" } else { ", blocked" };
                vec![format!("commit    {}{blocked} ({})", hash(said("oid")), self.position())]
            }
            "verify" => {
                self.add(&output["todo"]);
                let checks = format!("{} checks pass, {} fail", output["checks_passed"], output["checks_failed"]);
                let mut lines = vec![format!("verify    {}: {checks}", said("verdict"))];
                for criterion in
                    output["criteria"].as_array().into_iter().flatten().filter(|c| c["verdict"] == "reject")
                {
                    let words = |key: &str| criterion[key].as_str().unwrap_or_default().to_owned();
                    lines.push(format!("          ✗ {}: {}", words("requirement"), short(&words("reason"))));
                }
                for added in output["todo"].as_array().into_iter().flatten() {
                    lines.push(format!("          [ ] {}: {}", text(added, "id"), text(added, "title")));
                }
                lines
            }
            "readme" => {
                let commands = output["commands"].as_array().map_or(0, Vec::len);
                let how = if output["verified"] == true { "all executed" } else { "some fail, and it says so" };
                vec![format!("readme    {commands} commands, {how}, commit {}", hash(said("commit")))]
            }
            "deliver" => vec![format!("deliver   {}", said("summary"))],
            other => vec![format!("{other:<9} done")],
        }
    }

    fn add(&mut self, todo: &Value) {
        for item in todo.as_array().into_iter().flatten() {
            let (id, title) = (text(item, "id"), text(item, "title"));
            if self.items.iter().all(|(known, _)| *known != id) {
                self.items.push((id, title));
            }
        }
    }
}

fn text(value: &Value, key: &str) -> String {
    value[key].as_str().unwrap_or_default().to_owned()
}

/// Key of the item that a step path lies in.
fn item(path: &str) -> Option<String> {
    let (_, rest) = path.split_once('[')?;
    Some(rest.split_once(']')?.0.to_owned())
}

fn hash(oid: &str) -> &str {
    oid.get(..10).unwrap_or(oid)
}

fn short(text: &str) -> String {
    let line = text.lines().next().unwrap_or_default();
    if line.chars().count() <= TEXT_MAX {
        line.to_owned()
    } else {
        line.chars().take(TEXT_MAX - 1).chain(['…']).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// The lines of a transition in which a step ends.
    fn ended(script: &mut Script, activity: &str, path: &str, output: Value) -> Vec<String> {
        let attempt =
            json!({"type": "attempt_ended", "activity": activity, "path": path, "outcome": "succeeded", "attempt": 1});
        let step = json!({"type": "step_ended", "path": path, "status": "succeeded", "output": output});
        let row = [attempt, step];
        row.iter().flat_map(|event| script.lines(event, &row)).collect()
    }

    #[test]
    fn items_are_counted_as_they_are_done_and_added() {
        let mut script = Script::default();
        let todo = json!([{"id": "a", "title": "Do a"}, {"id": "b", "title": "Do b"}]);
        let plan = ended(&mut script, "plan@1", "plan", json!({"todo": todo, "commit": "0123456789abcdef"}));
        assert!(plan[0].starts_with("plan      2 items") && plan[0].ends_with("0123456789"), "{plan:?}");
        let path = "implement..verify~1/implement[b]/code..check~1/code";
        let work = json!({"changed_files": ["x"], "turns": 3, "model": "rehearsed/implementer"});
        assert_eq!(
            ended(&mut script, "implement@1", path, work),
            ["implement 2/2 Do b: 1 files in 3 turns by rehearsed/implementer"]
        );
        ended(&mut script, "commit@1", "x", json!({"state": "done", "oid": "f"}));
        let blocked = ended(&mut script, "commit@1", "x", json!({"state": "blocked", "oid": "f"}));
        assert_eq!(blocked, ["commit    f, blocked (1 of 2 items done)"]);
        ended(
            &mut script,
            "verify@1",
            "v",
            json!({"verdict": "reject", "todo": [{"id": "c", "title": "Do c"}, {"id": "b", "title": "Do b"}]}),
        );
        assert_eq!(script.position(), "1 of 3 items done");
    }

    #[test]
    fn losses_and_failures_are_told() {
        let mut script = Script::default();
        let lost = json!({"type": "attempt_ended", "path": "p", "activity": "implement@1", "outcome": "lost"});
        assert!(script.lines(&lost, &[])[0].contains("its worker is gone"));
        let failed = json!({"type": "attempt_ended", "path": "p", "activity": "plan@1", "outcome": "failed",
                            "failure": {"code": "model.refused", "message": "no"}});
        assert_eq!(script.lines(&failed, &[]), ["        ✗ failed: model.refused: no"]);
        assert!(script.lines(&json!({"type": "step_started", "path": "p"}), &[]).is_empty());
    }
}
