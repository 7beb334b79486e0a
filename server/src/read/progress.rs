//! How far a development loop is: its stage, its items, what it does, what it waits for.

use super::task;
use loopwright_activities::billing::limit::LIMIT;
use loopwright_engine::view::{HistoryRow, RunStatus, RunView, Waiting};

/// Step ids of the shipped loop in their order, with what people call them.
const STAGES: &[(&str, &str)] = &[
    ("gather", "Requirements"),
    ("plan", "Plan"),
    ("approve", "Approval of the plan"),
    ("implement", "Building"),
    ("verify", "Verification"),
    ("decide", "Your decision"),
    ("readme", "README"),
    ("deliver", "Delivery"),
];

/// What stands in the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    Working,
    /// Its owner is asked something.
    Asking,
    /// Blocked for want of credits.
    Credits,
    /// Blocked because the approved sum is used up.
    Limit,
    /// Blocked for another reason.
    Blocked,
    Paused,
    Stopping,
    Halted,
    Closed(RunStatus),
}

/// A run at a glance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Progress {
    pub standing: Standing,
    pub stage: &'static str,
    /// TODO items that are done, and all of them, once there is a plan.
    pub items: Option<(u32, u32)>,
    /// What it does or waits for now.
    pub now: String,
    /// What ended last.
    pub last: Option<String>,
}

/// From a run and the end of its history.
#[must_use]
pub fn progress(view: &RunView, rows: &[HistoryRow]) -> Progress {
    let standing = standing(view);
    let open = |status: &str| status == "running" || status == "waiting";
    let place = |path: &str| STAGES.iter().rposition(|(id, _)| path.split('/').any(|part| ids(part).any(|p| p == *id)));
    let active = view.live.first().map(|live| live.path.as_str()).or_else(|| view.waiting.first().map(path_of));
    let stage = active
        .and_then(place)
        .or_else(|| view.nodes.iter().filter(|n| open(&n.status)).filter_map(|n| place(&n.path)).next_back())
        .or_else(|| view.nodes.iter().filter_map(|n| place(&n.path)).max())
        .unwrap_or(0);
    let items = view
        .nodes
        .iter()
        .rfind(|node| node.step == "implement" && node.total.is_some())
        .and_then(|node| Some((node.done?, node.total?)));
    let task::Task { task, message } = task::standing(view);
    let now = match standing {
        Standing::Working => {
            view.live.first().map_or_else(|| format!("{task}: {message}"), |live| task::working(live, rows))
        }
        Standing::Asking => "Waits for you.".to_owned(),
        _ => message,
    };
    let last = task::latest(rows).map(|t| format!("{}: {}", t.task, t.message));
    Progress { standing, stage: STAGES[stage].1, items, now, last }
}

/// Step ids that a part of a path names: `plan..approve~1` and `implement[a]` name `approve` and `implement`.
fn ids(part: &str) -> impl Iterator<Item = &str> {
    // A redo block is named after both its ends; the step itself follows in the next part.
    let whole = part.split_once("..").is_none().then_some(part);
    whole.into_iter().map(|p| p.split(['[', '~']).next().unwrap_or_default())
}

fn path_of(waiting: &Waiting) -> &str {
    match waiting {
        Waiting::Signal { path, .. }
        | Waiting::Approval { path, .. }
        | Waiting::Timer { path, .. }
        | Waiting::Retry { path, .. }
        | Waiting::Blocked { path, .. }
        | Waiting::Child { path, .. }
        | Waiting::Queued { path, .. } => path,
    }
}

fn standing(view: &RunView) -> Standing {
    match view.status {
        status if status.is_closed() => return Standing::Closed(status),
        RunStatus::Quarantined => return Standing::Halted,
        RunStatus::Paused => return Standing::Paused,
        RunStatus::Cancelling => return Standing::Stopping,
        _ => {}
    }
    if !view.live.is_empty() {
        return Standing::Working;
    }
    let blocked = view.waiting.iter().find_map(|w| match w {
        Waiting::Blocked { reason, .. } => Some(reason.as_str()),
        _ => None,
    });
    match blocked {
        Some("credits") => Standing::Credits,
        Some(LIMIT) => Standing::Limit,
        Some(_) => Standing::Blocked,
        None if view.waiting.iter().any(|w| matches!(w, Waiting::Signal { .. } | Waiting::Approval { .. })) => {
            Standing::Asking
        }
        None => Standing::Working,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_step_is_found_behind_redo_blocks_and_items() {
        let found = |path: &str| STAGES.iter().rposition(|(id, _)| path.split('/').any(|p| ids(p).any(|i| i == *id)));
        for (path, stage) in [
            ("gather~2/ask", Some(0)),
            ("plan..approve~1/approve", Some(2)),
            ("plan..approve~2/plan", Some(1)),
            ("implement..verify~1/implement[a-1]/code..check~2/check", Some(3)),
            ("implement..verify~1/verify", Some(4)),
            ("other", None),
        ] {
            assert_eq!(found(path), stage, "{path}");
        }
    }
}
