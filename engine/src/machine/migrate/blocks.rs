//! Whether everything that has begun has its place in the new definition, block by block.

use super::{
    Migration, Rule,
    names::{Names, visible},
    word,
};
use crate::{
    definition::{Definition, Kind, Step, inputs::violations},
    machine::{
        state::{FINALLY_PREFIX, Frame, Live, Node, RunState, SKIPPED, shape_of},
        timer::millis,
    },
};
use chrono::{DateTime, Utc};
use std::collections::BTreeSet;

struct Compare<'a> {
    names: &'a Names<'a>,
    state: &'a RunState,
    now: DateTime<Utc>,
    found: &'a mut Migration,
    /// Paths, under the new names, of steps that never run.
    skipped: Vec<String>,
}

/// Where a block stands: its path under the old and the new names, and its shape; each with its trailing slash.
struct At {
    old: String,
    new: String,
    shape: String,
}

/// Compares what has begun, and gives the paths of the steps that are marked as skipped.
pub(super) fn compare(
    old: &Definition,
    new: &Definition,
    state: &RunState,
    names: &Names<'_>,
    now: DateTime<Utc>,
    found: &mut Migration,
) -> Vec<String> {
    let mut compare = Compare { names, state, now, found, skipped: Vec::new() };
    let root = |prefix: &str| At { old: prefix.to_owned(), new: prefix.to_owned(), shape: prefix.to_owned() };
    compare.block(&old.steps, &new.steps, &state.body, &root(""));
    if let Some(frame) = &state.finally {
        compare.block(&old.finally, &new.finally, frame, &root(FINALLY_PREFIX));
    }
    compare.skipped
}

impl Compare<'_> {
    fn block(&mut self, old: &[Step], new: &[Step], frame: &Frame, at: &At) {
        let mut images = BTreeSet::new();
        for (id, node) in &frame.nodes {
            let (path, image) = (format!("{}{id}", at.old), self.names.image(&at.shape, id).to_owned());
            if !images.insert(image.clone()) {
                let text = format!("two steps would be called `{image}`: give them different names");
                self.found.violation(&path, Rule::MapInvalid, text);
            }
            let was = visible(old, id);
            match &node.live {
                Some(live) => match (was, new.iter().find(|s| s.id == image)) {
                    (Some(was), Some(is)) => self.under_way(was, is, node, live, &path, &image, at),
                    _ => {
                        let text = format!(
                            "it is under way and its block in the new definition has no step `{image}`: say what it is \
                             called there by the map, or let it end first"
                        );
                        self.found.violation(&path, Rule::StepMissing, text);
                    }
                },
                None => self.ended(was, visible(new, &image), &path),
            }
        }
        for step in old.iter().filter(|s| !frame.nodes.contains_key(&s.id)) {
            if visible(new, self.names.image(&at.shape, &step.id)).is_none() && !passed(step, frame) {
                let text = "it had still to come and is not in its block of the new definition: it does not run".into();
                self.found.note(&format!("{}{}", at.old, step.id), Rule::Removed, text);
            }
        }
        self.cursor(old, new, frame, &images, &self.spent(old, frame, at), at);
    }

    /// Names of steps that are not what they were: skipped by an earlier migration, or ended under a definition before the present
    /// one. A step of that name never runs in this run.
    fn spent(&self, old: &[Step], frame: &Frame, at: &At) -> BTreeSet<String> {
        let spent = |id: &str, node: &Node| node.reason.as_deref() == Some(SKIPPED) || visible(old, id).is_none();
        let nodes = frame.nodes.iter().filter(|(id, node)| node.live.is_none() && spent(id, node));
        nodes.map(|(id, _)| self.names.image(&at.shape, id).to_owned()).collect()
    }

    /// Steps before the cursor that have not run: they never do.
    fn cursor(
        &mut self,
        old: &[Step],
        new: &[Step],
        frame: &Frame,
        images: &BTreeSet<String>,
        spent: &BTreeSet<String>,
        at: &At,
    ) {
        let live = frame.nodes.iter().find(|(_, n)| n.live.is_some()).map(|(id, _)| self.names.image(&at.shape, id));
        let has_run = |step: &Step| {
            (images.contains(&step.id) && !spent.contains(&step.id))
                || matches!(&step.kind, Kind::Repeat { steps, transparent: true, .. }
                    if images.iter().any(|image| visible(steps, image).is_some()))
        };
        let cursor = match live.and_then(|id| new.iter().position(|s| s.id == id)) {
            Some(at) => at,
            None => new.iter().rposition(has_run).map_or(0, |last| last + 1),
        };
        for step in new[..cursor].iter().filter(|s| !images.contains(&s.id)) {
            let path = format!("{}{}", at.new, step.id);
            let mut still_to_come = BTreeSet::new();
            within(step, &mut |inner| {
                let origin = self.names.origin(&inner.id).and_then(|origin| visible(old, &origin.id));
                if origin.is_some() && !images.contains(&inner.id) {
                    still_to_come.insert(inner.id.clone());
                }
            });
            if still_to_come.is_empty() {
                let text = "it stands before what has run and never runs in this run".to_owned();
                self.found.note(&path, Rule::Skipped, text);
            } else {
                let text = format!(
                    "{} had still to come and would never run, because later steps have run: put it behind them",
                    listed(still_to_come.iter())
                );
                self.found.violation(&path, Rule::StepMoved, text);
            }
            self.skipped.push(path);
        }
        for step in new[cursor..].iter().filter(|s| spent.contains(&s.id)) {
            let text = format!(
                "`{}` is the name of a step that is over in this run, so it would never run: give it another id",
                step.id
            );
            self.found.violation(&format!("{}{}", at.new, step.id), Rule::StepMoved, text);
        }
        // The steps of a `redo` are done again in its first round.
        for step in &new[cursor..] {
            if let Kind::Repeat { steps, transparent: true, .. } = &step.kind
                && !images.contains(&step.id)
                && let Some(image) = images.iter().find(|image| visible(steps, image).is_some())
            {
                let text = format!("`{image}` has run and would run again in it: let the `redo` begin behind it");
                self.found.violation(&format!("{}{}", at.new, step.id), Rule::StepMoved, text);
            }
        }
    }

    fn ended(&mut self, was: Option<&Step>, is: Option<&Step>, path: &str) {
        let Some(is) = is else {
            self.found.note(path, Rule::Removed, "it has ended and is not in its block of the new definition".into());
            return;
        };
        // Without an origin it ended under an earlier definition.
        let Some(was) = was else { return };
        if !same_kind(&was.kind, &is.kind) {
            let text = format!(
                "it has ended as `{}`, and `{}` of the new definition is `{}`, which would never run: give that another id",
                word(&was.kind),
                is.id,
                word(&is.kind)
            );
            self.found.violation(path, Rule::KindChanged, text);
        } else if let (Kind::Activity { name: before, .. }, Kind::Activity { name, .. }) = (&was.kind, &is.kind)
            && before != name
        {
            self.found.note(path, Rule::Kept, format!("its output is what `{before}` gave, not `{name}`"));
        }
    }

    #[expect(clippy::too_many_arguments, reason = "two steps, a node and where they stand")]
    fn under_way(&mut self, was: &Step, is: &Step, node: &Node, live: &Live, path: &str, image: &str, at: &At) {
        if !same_kind(&was.kind, &is.kind) {
            let text = format!(
                "it is under way as `{}`, and `{image}` of the new definition is `{}`: keep its kind, or let it end first",
                word(&was.kind),
                word(&is.kind)
            );
            self.found.violation(path, Rule::KindChanged, text);
            return;
        }
        self.total(was, is, node, live, path);
        let renamed = path != format!("{}{image}", at.new);
        match (live, &was.kind, &is.kind) {
            (
                Live::Activity { activity, attempt, .. },
                Kind::Activity { with, .. },
                Kind::Activity { name, with: new },
            ) => {
                if activity != name {
                    let text = format!(
                        "it is under way as `{activity}`, and as `{name}` in the new definition: let it end first, or keep \
                         the activity"
                    );
                    self.found.violation(path, Rule::WorkChanged, text);
                } else if renamed && *attempt > 0 {
                    let text = "an attempt of it has run, and its checkpoints and outside calls stand under its path: let it \
                                end first, or keep its name and those of the blocks around it";
                    self.found.violation(path, Rule::PathChanged, text.into());
                } else if with != new || was.timeouts != is.timeouts {
                    self.found.note(
                        path,
                        Rule::Kept,
                        "it goes on with the input and the deadlines it began with".into(),
                    );
                }
            }
            (Live::Group { frame }, Kind::Group { steps: old, .. }, Kind::Group { steps: new, .. }) => {
                self.below(old, new, frame, "", path, image, at);
            }
            (Live::Switch { case, frame }, Kind::Switch { cases: old }, Kind::Switch { cases: new }) => {
                let (Some(old), Some(new)) = (old.get(*case), new.get(*case)) else {
                    self.other_block(path, &format!("case {} is under way", case + 1), "keep it");
                    return;
                };
                if old.when != new.when && !self.related(&old.steps, &new.steps) {
                    self.other_block(path, &format!("case {} is under way", case + 1), "keep the order of the cases");
                    return;
                }
                self.below(&old.steps, &new.steps, frame, "", path, image, at);
            }
            (
                Live::Foreach { items, keys, active, next, .. },
                Kind::Foreach { list, key, steps: old, .. },
                Kind::Foreach { list: new_list, key: new_key, max_items, steps: new, .. },
            ) => {
                if items.len() > *max_items as usize {
                    let text = format!("it has {} items and `max-items` is {max_items}: raise it", items.len());
                    self.found.violation(path, Rule::ItemsExceeded, text);
                }
                if list != new_list || key != new_key {
                    let text =
                        format!("it goes on with the list it began with; {next} of {} items have begun", items.len());
                    self.found.note(path, Rule::Kept, text);
                }
                for (index, frame) in active {
                    self.below(old, new, frame, &format!("[{}]", keys[*index]), path, image, at);
                }
            }
            (
                Live::Parallel { branches, .. },
                Kind::Parallel { branches: old, .. },
                Kind::Parallel { branches: new, .. },
            ) => {
                let have: BTreeSet<&str> = branches.keys().map(String::as_str).collect();
                let wanted: BTreeSet<&str> = new.iter().map(|b| b.name.as_str()).collect();
                if have != wanted {
                    let text = format!("its branches are {}", listed(have.iter()));
                    self.other_block(path, &text, "keep them, no more and no fewer, or let it end first");
                }
                for (name, branch) in branches.iter().filter(|(_, b)| b.ended.is_none()) {
                    let steps = |specs: &'_ [crate::definition::Branch]| specs.iter().position(|b| b.name == *name);
                    if let (Some(i), Some(j)) = (steps(old), steps(new)) {
                        self.below(&old[i].steps, &new[j].steps, &branch.frame, &format!(":{name}"), path, image, at);
                    }
                }
            }
            (
                Live::Repeat { round, frame, .. },
                Kind::Repeat { steps: old, .. },
                Kind::Repeat { steps: new, max_rounds, .. },
            ) => {
                if round > max_rounds {
                    let text = format!("it is in round {round} and `max-rounds` is {max_rounds}: raise it");
                    self.found.violation(path, Rule::RoundsExceeded, text);
                }
                self.below(old, new, frame, &format!("~{round}"), path, image, at);
            }
            (Live::Catch { handler, frame, .. }, ..) => {
                let (Some(old), Some(new)) = (was.catch.get(*handler), is.catch.get(*handler)) else {
                    self.other_block(path, &format!("handler {} is under way", handler + 1), "keep it");
                    return;
                };
                if (old.on != new.on || old.condition != new.condition) && !self.related(&old.steps, &new.steps) {
                    let what = format!("handler {} is under way", handler + 1);
                    self.other_block(path, &what, "keep the order of the handlers");
                    return;
                }
                self.below(&old.steps, &new.steps, frame, "!", path, image, at);
            }
            (Live::Await { signal, counted, .. }, Kind::Await(before), Kind::Await(spec)) => {
                self.awaits(signal, counted, before, spec, path);
            }
            (
                Live::Call { workflow, .. },
                Kind::Call { parent_close, .. },
                Kind::Call { workflow: new, parent_close: now, .. },
            ) => {
                if workflow != new {
                    let text = format!(
                        "a child of `{workflow}` is under way, and the new definition calls `{new}`: let it end first, or \
                         keep the workflow"
                    );
                    self.found.violation(path, Rule::WorkChanged, text);
                } else if parent_close != now {
                    self.found.note(
                        path,
                        Rule::Kept,
                        "the child under way keeps the `parent-close` it was called with".into(),
                    );
                }
            }
            (Live::Wait { until }, Kind::Wait { until: before }, Kind::Wait { until: spec }) if before != spec => {
                self.found.note(path, Rule::Kept, format!("it waits until {} as before", until.to_rfc3339()));
            }
            _ => {}
        }
    }

    fn awaits(
        &mut self,
        signal: &str,
        counted: &[String],
        before: &crate::definition::Await,
        spec: &crate::definition::Await,
        path: &str,
    ) {
        if spec.signal != signal {
            let text = format!(
                "it waits for `{signal}`, and for `{}` in the new definition: keep the signal (an approval's is its id)",
                spec.signal
            );
            self.found.violation(path, Rule::SignalChanged, text);
        }
        for message in self.state.mailbox.iter().filter(|m| m.name == signal) {
            let (Some(form), None) = (&spec.form, spec.approval) else { continue };
            let fitted = before.form.as_ref().is_none_or(|form| violations(form, &message.payload).is_empty());
            let refused = violations(form, &message.payload);
            if fitted && !refused.is_empty() {
                let text = format!(
                    "message {} waits and does not satisfy the new form: {}; widen the form",
                    message.n,
                    refused.join("; ")
                );
                self.found.violation(path, Rule::PayloadRefused, text);
            }
        }
        if before.timeout_ms != spec.timeout_ms {
            self.found.note(path, Rule::Kept, "it keeps the deadline it began with".into());
        }
        if let Some(approval) = spec.approval
            && counted.len() >= approval.quorum as usize
        {
            let text = format!(
                "{} have approved, and {} are needed now: one more is asked for",
                counted.len(),
                approval.quorum
            );
            self.found.note(path, Rule::Changed, text);
        }
    }

    /// The `total` of a block, a wait or a call is counted from its beginning, by the definition.
    fn total(&mut self, was: &Step, is: &Step, node: &Node, live: &Live, path: &str) {
        if matches!(live, Live::Activity { .. } | Live::Catch { .. }) || was.timeouts.total_ms == is.timeouts.total_ms {
            return;
        }
        let (Some(began), Some(total)) = (node.started_at, is.timeouts.total_ms) else {
            self.found.note(path, Rule::Changed, "it has no total timeout any more".into());
            return;
        };
        let over = began + millis(total);
        if over <= self.now {
            let text = format!("its new total timeout was over at {}: give it more", over.to_rfc3339());
            self.found.violation(path, Rule::Overdue, text);
        } else {
            self.found.note(
                path,
                Rule::Changed,
                format!("its total timeout is over at {} from now on", over.to_rfc3339()),
            );
        }
    }

    #[expect(clippy::too_many_arguments, reason = "two lists of steps, a frame and where they stand")]
    fn below(&mut self, old: &[Step], new: &[Step], frame: &Frame, suffix: &str, path: &str, image: &str, at: &At) {
        let id = path.strip_prefix(at.old.as_str()).unwrap_or(path);
        let below = At {
            old: format!("{path}{suffix}/"),
            new: format!("{}{image}{suffix}/", at.new),
            shape: format!("{}{id}{}/", at.shape, shape_of(suffix)),
        };
        self.block(old, new, frame, &below);
    }

    /// Whether two blocks have a step in common, so that one is the other, edited.
    fn related(&self, old: &[Step], new: &[Step]) -> bool {
        new.iter().any(|n| self.names.origin(&n.id).is_some_and(|origin| old.iter().any(|o| o.id == origin.id)))
    }

    fn other_block(&mut self, path: &str, what: &str, remedy: &str) {
        let text = format!("{what}, which is not so in the new definition: {remedy}");
        self.found.violation(path, Rule::BlockChanged, text);
    }
}

/// Whether a step without a node is a `redo` whose steps stand beside it: it was migrated away, or was never there.
fn passed(step: &Step, frame: &Frame) -> bool {
    matches!(&step.kind, Kind::Repeat { steps, transparent: true, .. } if steps.iter().any(|s| frame.nodes.contains_key(&s.id)))
}

fn same_kind(a: &Kind, b: &Kind) -> bool {
    std::mem::discriminant(a) == std::mem::discriminant(b) && word(a) == word(b)
}

/// The step and everything below it.
fn within<'a>(step: &'a Step, visit: &mut dyn FnMut(&'a Step)) {
    visit(step);
    let mut all = |steps: &'a [Step]| steps.iter().for_each(|s| within(s, visit));
    match &step.kind {
        Kind::Group { steps, .. } | Kind::Foreach { steps, .. } | Kind::Repeat { steps, .. } => all(steps),
        Kind::Parallel { branches, .. } => branches.iter().for_each(|b| all(&b.steps)),
        Kind::Switch { cases } => cases.iter().for_each(|c| all(&c.steps)),
        Kind::Activity { .. }
        | Kind::Set { .. }
        | Kind::Wait { .. }
        | Kind::Await(_)
        | Kind::Call { .. }
        | Kind::Fail { .. }
        | Kind::Finish { .. }
        | Kind::ContinueAsNew { .. } => {}
    }
    step.catch.iter().for_each(|c| all(&c.steps));
}

fn listed<T: std::fmt::Display>(names: impl Iterator<Item = T>) -> String {
    names.map(|n| format!("`{n}`")).collect::<Vec<_>>().join(", ")
}
