//! What a run has just done, does now, or waits for, in words: the answer of the loop's trigger.

use loopwright_engine::view::{HistoryRow, LiveAttempt, RunStatus, RunView, Waiting};
use serde_json::Value;

/// Longest text taken from a run into an answer, in characters. Chosen, not measured.
const TEXT_MAX: usize = 500;

/// A task and how it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Task {
    pub task: String,
    pub message: String,
}

/// The first task that ended for good after transition `after`, if one did.
///
/// An attempt that is tried again, was lost or is blocked has not ended its task. `rows` may begin before `after`:
/// the earlier ones only lend titles.
#[must_use]
pub fn ended(rows: &[HistoryRow], after: u64) -> Option<Task> {
    rows.iter()
        .filter(|row| row.seq > after)
        .find_map(|row| row.events.iter().find_map(|event| end_of(event, row, rows)))
}

/// The task that ended for good last, if `rows` show one.
#[must_use]
pub fn latest(rows: &[HistoryRow]) -> Option<Task> {
    rows.iter().rev().find_map(|row| row.events.iter().rev().find_map(|event| end_of(event, row, rows)))
}

fn end_of(event: &Value, row: &HistoryRow, rows: &[HistoryRow]) -> Option<Task> {
    if text(event, "type") != "attempt_ended" {
        return None;
    }
    let (path, activity) = (text(event, "path"), text(event, "activity"));
    let again = |kind: &str| row.events.iter().any(|e| text(e, "type") == kind && text(e, "path") == path);
    let outcome = text(event, "outcome");
    if matches!(outcome, "lost" | "blocked")
        || (outcome != "succeeded" && (again("retry_scheduled") || again("attempt_ready")))
    {
        return None;
    }
    let attempt = event["attempt"].as_u64().unwrap_or(1);
    let message = match outcome {
        "succeeded" => format!("Succeeded in attempt {attempt}."),
        "cancelled" => "Was cancelled.".to_owned(),
        _ => {
            let failure = &event["failure"];
            shorten(&format!("Failed in attempt {attempt}: {}: {}", text(failure, "code"), text(failure, "message")))
        }
    };
    Some(Task { task: name(activity, path, title(rows, path)), message })
}

/// What an attempt works on, by the title of its item if `rows` show its start.
#[must_use]
pub fn working(live: &LiveAttempt, rows: &[HistoryRow]) -> String {
    name(&live.activity, &live.path, title(rows, &live.path))
}

/// How a run stands when no task has ended: what is in progress, what it waits for, or how it closed.
#[must_use]
pub fn standing(view: &RunView) -> Task {
    if view.status.is_closed() || view.status == RunStatus::Quarantined {
        let message = match (&view.status, &view.failure) {
            (RunStatus::Completed, _) => "Completed.".to_owned(),
            (RunStatus::Continued, _) => match view.chain.continued_as {
                Some(next) => format!("Goes on as run {next}."),
                None => "Goes on as another run.".to_owned(),
            },
            (RunStatus::Quarantined, _) => "Halted: an operator has to look at it.".to_owned(),
            (status, Some(failure)) => shorten(&format!("{}: {}: {}", status.as_str(), failure.code, failure.message)),
            (status, None) => format!("{}.", status.as_str()),
        };
        return Task { task: "The development loop".into(), message };
    }
    if let Some(live) = view.live.first() {
        return Task {
            task: name(&live.activity, &live.path, None),
            message: format!("In progress, attempt {}.", live.attempt),
        };
    }
    if view.status == RunStatus::Paused {
        return Task { task: "The development loop".into(), message: "Paused: it goes on when it is resumed.".into() };
    }
    match (view.waiting.first(), &view.held) {
        (Some(waiting), _) => waits(waiting),
        (None, Some(held)) => Task { task: "The development loop".into(), message: shorten(&format!("Waits {held}.")) },
        (None, None) => Task { task: "The development loop".into(), message: format!("{}.", view.status.as_str()) },
    }
}

/// Whether nothing will happen by itself: the run is closed, or waits for a person, for credits or for a date, and nothing was sent
/// to it that it has not read.
#[must_use]
pub fn is_parked(view: &RunView) -> bool {
    if view.status.is_closed() || view.status == RunStatus::Quarantined {
        return true;
    }
    let idle = |w: &Waiting| match w {
        Waiting::Signal { .. } | Waiting::Approval { .. } | Waiting::Timer { .. } | Waiting::Blocked { .. } => true,
        Waiting::Retry { .. } | Waiting::Child { .. } | Waiting::Queued { .. } => false,
    };
    let waits = view.live.is_empty() && !view.waiting.is_empty() && view.waiting.iter().all(idle);
    view.unread == 0 && (waits || view.status == RunStatus::Paused)
}

fn waits(waiting: &Waiting) -> Task {
    let show = |show: &Option<String>| show.clone().unwrap_or_default();
    let (task, message) = match waiting {
        Waiting::Signal { signal, show: text, .. } => {
            (format!("Waiting for an answer (`{signal}`)"), format!("Needs the user: {}", show(text)))
        }
        Waiting::Approval { step, show: text, .. } => {
            (format!("Waiting for an approval (`{step}`)"), format!("Needs the user: {}", show(text)))
        }
        Waiting::Timer { path, until } => (format!("Waiting at {path}"), format!("Until {}.", until.to_rfc3339())),
        Waiting::Retry { path, until, failure } => (
            name("", path, None),
            format!("Is tried again at {}: {}: {}", until.to_rfc3339(), failure.code, failure.message),
        ),
        Waiting::Blocked { path, reason, message } => (name("", path, None), format!("Blocked ({reason}): {message}")),
        Waiting::Child { path, run_id } => (format!("Waiting at {path}"), format!("For run {run_id}.")),
        Waiting::Queued { path, activity } => (name(activity, path, None), "Queued for a worker.".to_owned()),
    };
    Task { task, message: shorten(&message) }
}

/// A step in words. `title` is that of the TODO item it works on.
fn name(activity: &str, path: &str, title: Option<&str>) -> String {
    let item = title.map(str::to_owned).or_else(|| item_key(path)).map(|t| format!(" “{t}”")).unwrap_or_default();
    match activity.split('@').next().unwrap_or_default() {
        "gather" => "Gather requirements".into(),
        "plan" => "Plan the architecture and the TODO list".into(),
        "limit" => "Put the approved sum into force".into(),
        "implement" => format!("Implement{item}"),
        "check" => format!("Run the checks{}", of(&item)),
        "commit" => format!("Commit{item}"),
        "verify" => "Verify the work against the requirements".into(),
        "readme" => "Write README.md".into(),
        "deliver" => "Deliver the repository".into(),
        "" => path.to_owned(),
        other => format!("{other} ({path})"),
    }
}

fn of(item: &str) -> String {
    if item.is_empty() { String::new() } else { format!(" of{item}") }
}

/// The innermost `[key]` of a step path.
fn item_key(path: &str) -> Option<String> {
    let open = path.rfind('[')?;
    let rest = &path[open + 1..];
    Some(rest[..rest.find(']')?].to_owned())
}

/// Title of the TODO item in the input of the step at `path`, if `rows` show its start.
fn title<'a>(rows: &'a [HistoryRow], path: &str) -> Option<&'a str> {
    rows.iter().rev().flat_map(|row| row.events.iter()).find_map(|event| {
        (text(event, "type") == "step_started" && text(event, "path") == path)
            .then(|| event["opened"]["input"]["todo"]["title"].as_str())
            .flatten()
    })
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_default()
}

fn shorten(text: &str) -> String {
    let mut out: String = text.chars().take(TEXT_MAX).collect();
    if out.len() < text.len() {
        out.push('…');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn row(seq: u64, events: Vec<Value>) -> HistoryRow {
        HistoryRow { seq, epoch: 1, format: 1, events, at: chrono::Utc::now() }
    }

    fn end(path: &str, activity: &str, outcome: &str) -> Value {
        json!({"type": "attempt_ended", "path": path, "activity": activity, "attempt": 2, "outcome": outcome,
               "failure": {"code": "transient.network", "message": "reset"}})
    }

    #[test]
    fn the_first_task_that_ended_for_good_is_told_by_its_title() {
        let path = "implement[greeting]/code";
        let rows = [
            row(
                4,
                vec![
                    json!({"type": "step_started", "path": path, "opened": {"input": {"todo": {"title": "Greet by name"}}}}),
                ],
            ),
            row(5, vec![end(path, "implement@1", "failed"), json!({"type": "retry_scheduled", "path": path})]),
            row(6, vec![end(path, "implement@1", "lost"), json!({"type": "attempt_ready", "path": path})]),
            row(7, vec![end(path, "implement@1", "succeeded")]),
            row(8, vec![end("verify", "verify@1", "failed")]),
        ];
        assert_eq!(
            ended(&rows, 4).unwrap(),
            Task { task: "Implement “Greet by name”".into(), message: "Succeeded in attempt 2.".into() }
        );
        let last = ended(&rows, 7).unwrap();
        assert_eq!(last.task, "Verify the work against the requirements");
        assert!(last.message.contains("transient.network: reset"));
        assert_eq!(ended(&rows, 8), None);
        assert_eq!(ended(&rows[..3], 4), None);
    }

    #[test]
    fn without_a_title_the_item_key_serves() {
        assert_eq!(
            name("check@1", "implement..verify~1/implement[a-1]/code..check~2/check", None),
            "Run the checks of “a-1”"
        );
        assert_eq!(name("lint@2", "lint", None), "lint (lint)");
    }

    #[test]
    fn a_run_that_has_not_read_what_was_sent_to_it_is_not_parked() {
        let waiting = Waiting::Timer { path: "pause".into(), until: chrono::Utc::now() };
        let view = |status: &str, unread: u64| -> RunView {
            let view = json!({
                "run_id": uuid::Uuid::nil(), "workflow": "w", "definition": "0".repeat(64), "workflow_id": null,
                "status": status, "seq": 4, "attributes": {}, "inputs": {}, "started_at": "2026-11-27T08:00:00Z",
                "closed_at": null, "output": null, "failure": null, "live": [], "nodes": [], "unread": unread,
                "waiting": [waiting],
            });
            serde_json::from_value(view).unwrap()
        };
        assert!(is_parked(&view("running", 0)));
        assert!(!is_parked(&view("running", 1)));
        assert!(is_parked(&view("paused", 0)));
        assert!(!is_parked(&view("paused", 1)), "it may be the order to go on");
        assert!(is_parked(&view("completed", 1)) && is_parked(&view("quarantined", 1)), "nobody reads it");
    }

    #[test]
    fn texts_of_a_run_are_bounded() {
        assert_eq!(shorten(&"é".repeat(600)).chars().count(), TEXT_MAX + 1);
    }
}
