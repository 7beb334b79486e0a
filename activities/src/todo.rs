//! The plan as data: items with executable checks, and their rendering as `TODO.md`.

use crate::edit::path;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
};

/// Most items that one answer of a model may add. The workflow's `max-items` is the outer bound.
pub const ITEMS_MAX: usize = 40;
/// Most checks of one item.
pub const CHECKS_MAX: usize = 8;
/// Longest command of a check, in bytes.
pub const COMMAND_BYTES_MAX: usize = 2_000;
/// Longest run of one check, in seconds.
pub const TIMEOUT_S_MAX: u32 = 600;
/// Longest id, in characters: it is part of step paths.
const ID_MAX: usize = 40;
const TITLE_MAX: usize = 200;
const DETAIL_BYTES_MAX: usize = 6_000;

/// The file in the repository.
pub const FILE: &str = "TODO.md";

/// A command that decides whether an item is done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Check {
    /// Run by `sh -c` in the root of the project, without network.
    pub command: String,
    #[serde(default)]
    pub expect_exit: i32,
    #[serde(default = "timeout_s")]
    pub timeout_s: u32,
}

fn timeout_s() -> u32 {
    180
}

/// An item of the plan.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Todo {
    /// Stable: lower-case letters, digits and hyphens.
    pub id: String,
    pub title: String,
    #[serde(default)]
    pub detail: String,
    /// Ids of the requirements that it serves.
    #[serde(default)]
    pub requirements: Vec<String>,
    #[serde(default)]
    pub depends_on: Vec<String>,
    /// Files it will touch.
    #[serde(default)]
    pub files: Vec<String>,
    #[serde(default)]
    pub checks: Vec<Check>,
    /// Files and folders that belong to the checks and are not to be changed.
    #[serde(default)]
    pub frozen: Vec<String>,
}

/// The schema of one item in a model's answer.
pub(crate) fn schema() -> Value {
    let texts = json!({"type": "array", "items": {"type": "string"}});
    json!({
        "type": "object",
        "properties": {
            "id": {"type": "string"}, "title": {"type": "string"}, "detail": {"type": "string"},
            "requirements": texts, "depends_on": texts, "files": texts,
            "checks": {"type": "array", "items": {
                "type": "object",
                "properties": {"command": {"type": "string"}, "expect_exit": {"type": "integer"}},
                "required": ["command", "expect_exit"]
            }}
        },
        "required": ["id", "title", "detail", "requirements", "depends_on", "files", "checks"]
    })
}

/// How far an item is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Its checks passed and its work is committed.
    Done,
    /// Its checks failed to the end; its work is kept as a snapshot and not in the tree.
    Blocked,
}

/// Puts a model's items into their normal form and order: dependencies first, otherwise as given.
///
/// `taken` are ids that the project already uses; items may depend on them and not reuse them.
/// # Errors
/// Everything that makes them unusable, in words for the model.
pub fn settle(items: Vec<Todo>, taken: &BTreeSet<String>) -> Result<Vec<Todo>, String> {
    let mut problems = Vec::new();
    if items.len() > ITEMS_MAX {
        problems.push(format!("{} items are too many; {ITEMS_MAX} are allowed", items.len()));
    }
    let mut settled: Vec<Todo> = Vec::new();
    for mut item in items {
        item.id = slug(&item.id);
        item.title = head(item.title.split_whitespace().collect::<Vec<_>>().join(" "), TITLE_MAX);
        item.detail = head(item.detail.trim().to_owned(), DETAIL_BYTES_MAX);
        item.depends_on = item.depends_on.iter().map(|id| slug(id)).filter(|id| *id != item.id).collect();
        item.files.retain(|file| path::normal(file).is_ok());
        item.frozen.retain(|file| path::normal(file).is_ok());
        item.checks.truncate(CHECKS_MAX);
        let id = &item.id;
        if id.is_empty() || item.title.is_empty() {
            problems.push("every item needs an `id` and a `title`".to_owned());
        } else if taken.contains(id) || settled.iter().any(|other| other.id == *id) {
            problems.push(format!("the id `{id}` is taken; every item needs one of its own"));
        }
        if item.checks.is_empty() {
            problems.push(format!("`{id}` has no check; give a command whose exit code shows that it is done"));
        }
        for check in &mut item.checks {
            check.timeout_s = check.timeout_s.clamp(1, TIMEOUT_S_MAX);
            if check.command.trim().is_empty()
                || check.command.len() > COMMAND_BYTES_MAX
                || check.command.contains('\0')
            {
                problems.push(format!("a check of `{id}` is empty or longer than {COMMAND_BYTES_MAX} bytes"));
            }
        }
        settled.push(item);
    }
    let known: BTreeSet<&String> = settled.iter().map(|item| &item.id).chain(taken).collect();
    for item in &settled {
        for missing in item.depends_on.iter().filter(|id| !known.contains(id)) {
            problems.push(format!("`{}` depends on `{missing}`, which is no item", item.id));
        }
    }
    if !problems.is_empty() {
        problems.dedup();
        return Err(problems.join("; "));
    }
    in_order(settled, taken)
}

/// Dependencies first; of those that could come next, the one that was given first.
fn in_order(mut items: Vec<Todo>, taken: &BTreeSet<String>) -> Result<Vec<Todo>, String> {
    let mut done = taken.clone();
    let mut ordered = Vec::with_capacity(items.len());
    while !items.is_empty() {
        let next = items.iter().position(|item| item.depends_on.iter().all(|id| done.contains(id)));
        let Some(next) = next else {
            let ids: Vec<&str> = items.iter().map(|item| item.id.as_str()).collect();
            return Err(format!("the items {} depend on each other in a circle", ids.join(", ")));
        };
        let item = items.remove(next);
        done.insert(item.id.clone());
        ordered.push(item);
    }
    Ok(ordered)
}

/// `TODO.md`: a ticked box for what is done, a reason for what is blocked.
#[must_use]
pub fn markdown(project: &str, items: &[Todo], states: &BTreeMap<String, State>) -> String {
    let done = items.iter().filter(|item| states.get(&item.id) == Some(&State::Done)).count();
    let mut out = format!("# TODO: {project}\n\n{done} of {} done.\n", items.len());
    // Writing to a String cannot fail.
    for item in items {
        let (tick, mark) = match states.get(&item.id) {
            Some(State::Done) => ('x', ""),
            Some(State::Blocked) => (' ', " *(blocked: its checks fail)*"),
            None => (' ', ""),
        };
        let _ = write!(out, "\n- [{tick}] **{}** {}{mark}\n", item.id, item.title);
        if !item.requirements.is_empty() {
            let _ = writeln!(out, "  - serves {}", item.requirements.join(", "));
        }
        for check in &item.checks {
            let exit =
                if check.expect_exit == 0 { String::new() } else { format!(" exits with {}", check.expect_exit) };
            let _ = writeln!(out, "  - check: {}{exit}", code(&check.command));
        }
    }
    out
}

/// A command as inline code, however many backticks it holds.
pub(crate) fn code(text: &str) -> String {
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let longest = text.split(|c| c != '`').map(str::len).max().unwrap_or(0);
    let fence = "`".repeat(longest + 1);
    let pad = if text.starts_with('`') || text.ends_with('`') { " " } else { "" };
    format!("{fence}{pad}{text}{pad}{fence}")
}

/// An id from what a model calls an item.
pub(crate) fn slug(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        if c.is_ascii_alphanumeric() {
            out.push(c.to_ascii_lowercase());
        } else if !out.is_empty() && !out.ends_with('-') {
            out.push('-');
        }
        if out.len() == ID_MAX {
            break;
        }
    }
    out.trim_end_matches('-').to_owned()
}

fn head(text: String, bytes_max: usize) -> String {
    if text.len() <= bytes_max {
        return text;
    }
    text.chars()
        .scan(0, |used, c| {
            *used += c.len_utf8();
            (*used <= bytes_max).then_some(c)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(id: &str, depends_on: &[&str]) -> Todo {
        Todo {
            id: id.into(),
            title: format!("Do {id}"),
            detail: String::new(),
            requirements: vec!["R1".into()],
            depends_on: depends_on.iter().map(|id| (*id).to_owned()).collect(),
            files: vec!["src/a.rs".into(), "../out".into()],
            checks: vec![Check { command: "true".into(), expect_exit: 0, timeout_s: 9_999 }],
            frozen: vec![],
        }
    }

    #[test]
    fn items_come_in_order_of_their_dependencies_with_clean_ids_and_paths() {
        let items =
            settle(vec![item("B two", &["A_one"]), item("A_one", &[]), item("c", &["old"])], &["old".into()].into());
        let items = items.expect("usable");
        assert_eq!(items.iter().map(|i| i.id.as_str()).collect::<Vec<_>>(), ["a-one", "b-two", "c"]);
        assert_eq!(
            (items[0].files.as_slice(), items[0].checks[0].timeout_s),
            (&["src/a.rs".to_owned()][..], TIMEOUT_S_MAX)
        );
    }

    #[test]
    fn what_cannot_be_worked_off_is_named() {
        let refused = |items: Vec<Todo>| settle(items, &["old".into()].into()).expect_err("unusable");
        assert!(refused(vec![item("a", &["b"]), item("b", &["a"])]).contains("circle"));
        assert!(refused(vec![item("a", &["zz"])]).contains("`zz`, which is no item"));
        assert!(refused(vec![item("old", &[])]).contains("`old` is taken"));
        assert!(refused(vec![item("a", &[]), item("A", &[])]).contains("`a` is taken"));
        assert!(refused(vec![item("日本", &[])]).contains("needs an `id`"));
        let mut bare = item("a", &[]);
        bare.checks.clear();
        assert!(refused(vec![bare]).contains("has no check"));
        assert!(refused((0..=ITEMS_MAX).map(|n| item(&format!("i{n}"), &[])).collect()).contains("too many"));
    }

    #[test]
    fn the_file_ticks_what_is_done_and_says_what_is_blocked() {
        let mut items = vec![item("a", &[]), item("b", &[]), item("c", &[])];
        items[1].checks[0] = Check { command: "echo `x`\n| grep x".into(), expect_exit: 1, timeout_s: 1 };
        let states = [("a".to_owned(), State::Done), ("b".to_owned(), State::Blocked)].into();
        let text = markdown("Words", &items, &states);
        assert!(text.starts_with("# TODO: Words\n\n1 of 3 done.\n"), "{text}");
        assert!(text.contains("- [x] **a** Do a\n  - serves R1\n  - check: `true`\n"), "{text}");
        assert!(text.contains("- [ ] **b** Do b *(blocked: its checks fail)*"), "{text}");
        assert!(text.contains("- check: ``echo `x` | grep x`` exits with 1"), "{text}");
    }
}
