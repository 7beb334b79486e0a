//! Executing tool calls on a bench. Every answer is capped text; a call that cannot be done is an answer too.

use super::{
    Bench, FIND_BYTES_MAX, READ_BYTES_MAX, RUN_BYTES_MAX, RUN_FILES_MAX, Ran, TURN_BYTES_MAX,
    bench::head,
    call::Call,
    record::{Delta, Refused, Tree},
};
use crate::{
    edit::{self, Edit, Frozen, path},
    workspace::FileChange,
};
use loopwright_engine::{Failure, FailureKind, activity::Context};
use std::collections::{BTreeMap, BTreeSet};

/// Refusals by a grammar that is only rough, after which a file is let pass: the checks decide then.
const ROUGH_REFUSALS_MAX: usize = 3;
/// Blocks that missed in a file, after which the model is asked for the whole file.
const MISSES_MAX: usize = 2;

/// The answer to a call.
pub(super) struct Answer {
    pub(super) text: String,
    /// The call did what it said.
    pub(super) ok: bool,
}

impl Answer {
    fn ok(text: impl Into<String>) -> Self {
        Self { text: text.into(), ok: true }
    }
    pub(super) fn refused(text: impl Into<String>) -> Self {
        Self { text: format!("error: {}", text.into()), ok: false }
    }
}

/// Does what tool calls ask, and keeps account of what changed.
pub(super) struct Hands<'b> {
    bench: &'b dyn Bench,
    frozen: &'b Frozen,
    /// The model whose calls are executed, for the metric.
    pub(super) model: String,
    pub(super) tree: Tree,
    /// Files as the current turn left them.
    turn: BTreeMap<String, Option<String>>,
    /// Refusals since the start; those of the current turn apart.
    refused: Refused,
    refused_now: Refused,
}

impl<'b> Hands<'b> {
    pub(super) fn new(bench: &'b dyn Bench, frozen: &'b Frozen) -> Self {
        Self {
            bench,
            frozen,
            model: String::new(),
            tree: Tree::default(),
            turn: BTreeMap::new(),
            refused: Refused::default(),
            refused_now: Refused::default(),
        }
    }

    /// Repeats what a finished turn did to the tree.
    ///
    /// # Errors
    /// The bench's, when it cannot be written.
    pub(super) fn replay(&mut self, delta: &[Delta], refused: &Refused) -> Result<(), Failure> {
        let changes: Vec<_> = delta.iter().map(Delta::to_change).collect();
        for change in &changes {
            let before = self.bench.read(&change.path)?;
            self.tree.set(&change.path, before.as_deref(), change.content.as_deref());
        }
        self.refused.add(refused);
        if changes.is_empty() { Ok(()) } else { self.bench.write(&changes) }
    }

    /// What the turn did to the tree, and which edits were refused; the next turn begins.
    pub(super) fn end_turn(&mut self) -> (Vec<Delta>, Refused) {
        let turn = std::mem::take(&mut self.turn);
        let delta = turn.into_iter().map(|(path, content)| Delta::new(path, content)).collect();
        let refused = std::mem::take(&mut self.refused_now);
        self.refused.add(&refused);
        (delta, refused)
    }

    /// Answers one call; `done` is not among them.
    ///
    /// # Errors
    /// Infrastructure failures and cancellation; what a model can cure is an [`Answer`].
    pub(super) async fn execute(&mut self, ctx: &Context, call: &Call) -> Result<Answer, Failure> {
        match call {
            Call::Read { path, start_line, end_line } => self.read(path, *start_line, *end_line),
            Call::Search { query } => found(self.bench.search(query.clone()).await),
            Call::Symbols { name } => found(self.bench.symbols(name.clone()).await),
            Call::Edit { edits } => self.edit(edits),
            Call::Run { command } => self.run(ctx, command).await,
            Call::Done { .. } => Ok(Answer::ok("")),
        }
    }

    fn read(&self, raw: &str, start: Option<usize>, end: Option<usize>) -> Result<Answer, Failure> {
        let path = match path::normal(raw) {
            Ok(path) => path,
            Err(error) => return Ok(Answer::refused(format!("{raw:?} is not a usable path: {error}."))),
        };
        let text = match told(self.bench.read(&path))? {
            Ok(Some(text)) => text,
            Ok(None) => return Ok(Answer::refused(format!("there is no file {path:?}."))),
            Err(why) => return Ok(Answer::refused(why)),
        };
        Ok(slice(&path, &text, start, end))
    }

    fn edit(&mut self, edits: &[Edit]) -> Result<Answer, Failure> {
        let bench = self.bench;
        let read = |path: &str| bench.read(path);
        let lenient = |path: &str| self.times(path, |refused| &refused.syntax) >= ROUGH_REFUSALS_MAX;
        let plan = match edit::plan(&read, edits, self.frozen, &lenient) {
            Ok(plan) => plan,
            Err(error) => {
                if let Some(failure) = error.failure() {
                    return Err(failure.clone());
                }
                self.count(error.index.and_then(|index| edits.get(index)).into_iter(), "refused");
                let mut text = error.to_string();
                match (&error.reason, path::normal(&error.path)) {
                    (edit::Reason::Syntax { .. }, Ok(path)) => self.refused_now.syntax.push(path),
                    (edit::Reason::NotFound { .. } | edit::Reason::Ambiguous { .. }, Ok(path)) => {
                        self.refused_now.missed.push(path.clone());
                        if self.times(&path, |refused| &refused.missed) >= MISSES_MAX {
                            text.push_str(" Blocks miss in this file: send it whole, with op \"write\".");
                        }
                    }
                    _ => {}
                }
                return Ok(Answer::refused(text));
            }
        };
        if !self.has_room(&plan.changes) {
            let why = format!("the files changed in this turn would have more than {TURN_BYTES_MAX} bytes.");
            return Ok(Answer::refused(format!("{why} Nothing was changed; go on in the next turn.")));
        }
        let mut text = String::new();
        if !plan.changes.is_empty() {
            let mut before = Vec::with_capacity(plan.changes.len());
            for change in &plan.changes {
                before.push(self.bench.read(&change.path)?);
            }
            if let Err(why) = told(self.bench.write(&plan.changes))? {
                return Ok(Answer::refused(format!("{why} Nothing was changed.")));
            }
            text.push_str("Changed:");
            for (change, before) in plan.changes.iter().zip(before) {
                text.push_str(match (&before, &change.content) {
                    (None, _) => "\n  new ",
                    (_, None) => "\n  deleted ",
                    _ => "\n  ",
                });
                text.push_str(&change.path);
                self.note(change, before.as_deref());
            }
        }
        self.count(edits.iter(), "taken");
        if !plan.already.is_empty() {
            let list: Vec<_> = plan.already.iter().map(|i| (i + 1).to_string()).collect();
            text.push_str(&format!("\nAlready in place, nothing to do: edit {}.", list.join(", ")));
        }
        for doubt in &plan.doubts {
            text.push_str(&format!("\nA grammar doubts {doubt}; the checks decide."));
        }
        Ok(Answer::ok(text.trim_start()))
    }

    /// Which form of edit succeeds with which model.
    fn count<'e>(&self, edits: impl Iterator<Item = &'e Edit>, outcome: &'static str) {
        for edit in edits {
            metrics::counter!("loopwright_edits_total", "model" => self.model.clone(), "op" => edit.op(), "outcome" => outcome)
                .increment(1);
        }
    }

    /// Whether the turn's checkpoint can hold these changes too.
    fn has_room(&self, changes: &[FileChange]) -> bool {
        let weight = |content: &Option<String>| match content {
            // The exact size, escapes included, only where it matters.
            Some(text) if text.len() > 4096 => serde_json::to_string(text).map_or(usize::MAX, |json| json.len()),
            Some(text) => text.len() * 6,
            None => 0,
        };
        let earlier = self.turn.iter().filter(|(path, _)| changes.iter().all(|change| change.path != **path));
        let total = earlier.map(|(_, content)| weight(content)).sum::<usize>()
            + changes.iter().map(|change| weight(&change.content)).sum::<usize>();
        total <= TURN_BYTES_MAX
    }

    /// How often edits of `path` were refused for a cause.
    fn times(&self, path: &str, cause: fn(&Refused) -> &Vec<String>) -> usize {
        cause(&self.refused).iter().chain(cause(&self.refused_now)).filter(|refused| *refused == path).count()
    }

    fn note(&mut self, change: &FileChange, before: Option<&str>) {
        if self.tree.set(&change.path, before, change.content.as_deref()) {
            self.turn.insert(change.path.clone(), change.content.clone());
        }
    }

    async fn run(&mut self, ctx: &Context, command: &str) -> Result<Answer, Failure> {
        let before = by_path(self.bench.changes().await?);
        let ran = self.bench.run(command.to_owned(), ctx.cancellation()).await?;
        ctx.check_cancelled()?;
        let after = by_path(self.bench.changes().await?);
        let mut text = summary(&ran);

        let touched: BTreeSet<&String> =
            before.keys().chain(after.keys()).filter(|path| before.get(*path) != after.get(*path)).collect();
        let bytes: usize = touched.iter().filter_map(|path| after.get(*path)?.as_ref()).map(String::len).sum();
        let now = touched.iter().filter_map(|path| {
            let content = after.get(*path)?.clone();
            Some(FileChange { path: (*path).clone(), content })
        });
        let too_much =
            touched.len() > RUN_FILES_MAX || bytes > RUN_BYTES_MAX || !self.has_room(&now.collect::<Vec<_>>());
        let mut undone = Vec::new();
        let mut kept = Vec::new();
        for path in &touched {
            let old = match before.get(*path) {
                Some(content) => content.clone(),
                None => self.bench.committed(path).await?,
            };
            if too_much || self.frozen.contains(path) {
                undone.push(FileChange { path: (*path).clone(), content: old });
                continue;
            }
            let new = match after.get(*path) {
                Some(content) => content.clone(),
                None => self.bench.committed(path).await?,
            };
            kept.push((FileChange { path: (*path).clone(), content: new }, old));
        }
        if !undone.is_empty() {
            self.bench.write(&undone)?;
        }
        if too_much {
            text.push_str(&format!(
                "\nThe command changed {} files with {bytes} bytes; at most {RUN_FILES_MAX} files with {RUN_BYTES_MAX} \
                 bytes are kept, so all of it was undone. Put what tools generate into .gitignore first.",
                touched.len()
            ));
        } else {
            for change in &undone {
                text.push_str(&format!("\n{} is frozen; its change was undone.", change.path));
            }
            if !kept.is_empty() {
                let names: Vec<_> = kept.iter().take(20).map(|(change, _)| change.path.as_str()).collect();
                text.push_str(&format!("\nFiles changed by the command: {}", names.join(", ")));
            }
        }
        for (change, old) in &kept {
            self.note(change, old.as_deref());
        }
        Ok(Answer { text, ok: ran.exit_code == Some(0) })
    }
}

fn by_path(changes: Vec<FileChange>) -> BTreeMap<String, Option<String>> {
    changes.into_iter().map(|change| (change.path, change.content)).collect()
}

/// Parts what a model can be told (permanent failures) from what ends the attempt.
fn told<T>(result: Result<T, Failure>) -> Result<Result<T, String>, Failure> {
    match result {
        Ok(value) => Ok(Ok(value)),
        Err(failure) if failure.kind == FailureKind::Permanent => Ok(Err(format!("{}.", failure.message))),
        Err(failure) => Err(failure),
    }
}

fn found(result: Result<String, Failure>) -> Result<Answer, Failure> {
    Ok(match told(result)? {
        Ok(text) if text.trim().is_empty() => Answer::ok("Nothing found."),
        Ok(text) if text.len() > FIND_BYTES_MAX => {
            Answer::ok(format!("{}\n[cut: there is more; ask more narrowly]", head(&text, FIND_BYTES_MAX)))
        }
        Ok(text) => Answer::ok(text),
        Err(why) => Answer::refused(why),
    })
}

/// Lines `start..=end` of a file under a heading, cut at a line where the cap is reached.
fn slice(path: &str, text: &str, start: Option<usize>, end: Option<usize>) -> Answer {
    let lines: Vec<&str> = text.split_inclusive('\n').collect();
    let total = lines.len();
    let first = start.unwrap_or(1);
    let last = end.unwrap_or(total).min(total);
    if total == 0 {
        return Answer::ok(format!("{path} is empty."));
    }
    if first > total || last < first {
        return Answer::refused(format!("{path} has {total} lines; there are none from {first} to {last}."));
    }
    let mut body = String::new();
    let mut shown = first - 1;
    for line in &lines[first - 1..last] {
        if body.len() + line.len() > READ_BYTES_MAX {
            break;
        }
        body.push_str(line);
        shown += 1;
    }
    if shown < first {
        // One line alone is over the cap.
        return Answer::ok(format!(
            "{path}, the start of line {first} of {total}:\n{}\n[cut: the line is longer than {READ_BYTES_MAX} bytes]",
            head(lines[first - 1], READ_BYTES_MAX)
        ));
    }
    let mut out = format!("{path}, lines {first}-{shown} of {total}:\n{body}");
    if !out.ends_with('\n') {
        out.push('\n');
    }
    if shown < last {
        out.push_str(&format!("[cut at {READ_BYTES_MAX} bytes; go on with start_line {}]\n", shown + 1));
    }
    Answer::ok(out)
}

fn summary(ran: &Ran) -> String {
    let mut text = match (ran.timed_out, ran.exit_code, ran.signal) {
        (true, ..) => format!("The command was stopped after {} ms: time limit.", ran.duration_ms),
        (_, Some(code), _) => format!("Exit code {code}."),
        (_, None, Some(signal)) => format!("The command was ended by signal {signal}."),
        (_, None, None) => "The command ended without an exit code.".to_owned(),
    };
    let shown = u64::try_from(ran.output_tail.len()).unwrap_or(u64::MAX);
    match (shown, ran.output_bytes > shown) {
        (0, false) => text.push_str(" No output."),
        (_, true) => text.push_str(&format!(" The end of {} bytes of output:\n{}", ran.output_bytes, ran.output_tail)),
        (_, false) => text.push_str(&format!(" Output:\n{}", ran.output_tail)),
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_are_cut_at_lines_and_say_how_to_go_on() {
        let text: String = (1..=3000).map(|n| format!("line number {n:04}\n")).collect();
        let all = slice("a", &text, None, None);
        assert!(all.text.starts_with("a, lines 1-1927 of 3000:\nline number 0001\n"), "{}", &all.text[..60]);
        assert!(all.text.ends_with("go on with start_line 1928]\n"));
        assert_eq!(slice("a", &text, Some(3), Some(3)).text, "a, lines 3-3 of 3000:\nline number 0003\n");
        assert!(!slice("a", &text, Some(3001), None).ok && !slice("a", &text, Some(5), Some(4)).ok);
        assert_eq!(slice("a", "x", None, Some(9)).text, "a, lines 1-1 of 1:\nx\n");
        assert_eq!(slice("a", "", None, None).text, "a is empty.");
        let long = slice("a", &"ü".repeat(READ_BYTES_MAX), None, None);
        assert!(long.ok && long.text.len() < READ_BYTES_MAX + 200);
    }

    #[test]
    fn a_command_s_end_is_told_in_words() {
        let ran = Ran {
            exit_code: Some(1),
            signal: None,
            timed_out: false,
            duration_ms: 5,
            output_tail: "boom".into(),
            output_bytes: 4,
        };
        assert_eq!(summary(&ran), "Exit code 1. Output:\nboom");
        assert_eq!(
            summary(&Ran { output_bytes: 9, ..ran.clone() }),
            "Exit code 1. The end of 9 bytes of output:\nboom"
        );
        assert!(summary(&Ran { exit_code: None, signal: Some(9), ..ran.clone() }).contains("signal 9"));
        assert!(summary(&Ran { timed_out: true, ..ran }).contains("time limit"));
    }
}
