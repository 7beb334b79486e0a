//! Whether what is to come finds what it reads: every expression that may still be evaluated, against the outputs that there are.

use super::{
    Migration, Rule,
    names::{Names, visible},
};
use crate::{
    definition::{
        Await, Data, Definition, Expr, Kind, RepeatCondition, Step, Template, WaitUntil, expr, inputs::violations,
        template,
    },
    event::StepStatus,
    machine::{
        Moment, call_key,
        scope::{live_children, node_value},
        state::{FINALLY_PREFIX, Frame, Live, Node, RunState, SKIPPED, split_segment},
    },
};
use serde_json::Value;
use std::collections::BTreeSet;

/// One block around an expression. Without a frame it is still to come.
struct Level<'a> {
    steps: &'a [Step],
    frame: Option<&'a Frame>,
}

struct Reads<'a, 'f> {
    names: &'a Names<'a>,
    after: &'a RunState,
    moment: &'a Moment<'a>,
    /// Expressions of the old definition: what they read and did not find, they did not find before.
    before: BTreeSet<&'a str>,
    found: &'f mut Migration,
    levels: Vec<Level<'a>>,
}

/// `after` is the state under the new names.
pub(super) fn check<'a>(
    old: &'a Definition,
    new: &'a Definition,
    names: &'a Names<'a>,
    after: &'a RunState,
    moment: &'a Moment<'a>,
    found: &mut Migration,
) {
    let mut before = BTreeSet::new();
    texts(old, &mut before);
    let mut reads = Reads { names, after, moment, before, found, levels: Vec::new() };
    reads.block(&new.steps, Some(&after.body), "", |reads| {
        reads.map(&new.outputs, "");
        reads.block(&new.finally, after.finally.as_ref(), FINALLY_PREFIX, |_| {});
    });
}

impl<'a> Reads<'a, '_> {
    /// The steps of a block that are to come, and then what is evaluated in it.
    fn block(&mut self, steps: &'a [Step], frame: Option<&'a Frame>, prefix: &str, then: impl FnOnce(&mut Self)) {
        self.levels.push(Level { steps, frame });
        for step in steps {
            let path = format!("{prefix}{}", step.id);
            match frame.and_then(|f| f.nodes.get(&step.id)) {
                Some(Node { live: Some(live), .. }) => self.under_way(step, live, &path),
                Some(_) => {}
                None => {
                    if frame.is_some() {
                        self.free(&path);
                    }
                    self.pending(step, &path);
                }
            }
        }
        then(self);
        self.levels.pop();
    }

    /// No other step may have run under the path of one that is to come.
    fn free(&mut self, path: &str) {
        let below = |f: &str| {
            f.strip_prefix(path).is_some_and(|rest| rest.is_empty() || rest.starts_with(['/', '[', ':', '~', '!']))
        };
        if self.after.former.iter().any(|f| below(f)) {
            let text =
                "a step that was renamed has run under this path, where its attempts and checkpoints stand: choose \
                        another id"
                    .into();
            self.found.violation(path, Rule::NameTaken, text);
        }
    }

    fn pending(&mut self, step: &'a Step, path: &str) {
        if let Some(condition) = &step.condition {
            self.expr(condition, path);
        }
        for escalate in &step.retry.escalate {
            self.map(&escalate.with, path);
        }
        match &step.kind {
            Kind::Activity { with, .. } => self.map(with, path),
            Kind::Set { values } => self.map(values, path),
            Kind::Group { steps, outputs } => {
                self.block(steps, None, &format!("{path}/"), |r| r.maybe(outputs.as_ref(), path))
            }
            Kind::Parallel { branches, .. } => {
                for branch in branches {
                    self.block(&branch.steps, None, &format!("{path}:{}/", branch.name), |_| {});
                }
            }
            Kind::Foreach { list, key, steps, outputs, .. } => {
                self.expr(list, path);
                if let Some(key) = key {
                    self.expr(key, path);
                }
                self.block(steps, None, &format!("{path}/"), |r| r.maybe(outputs.as_ref(), path));
            }
            Kind::Repeat { steps, condition, outputs, .. } => {
                self.block(steps, None, &format!("{path}/"), |r| r.round_ends(condition, outputs.as_ref(), path));
            }
            Kind::Switch { cases } => {
                for case in cases {
                    if let Some(when) = &case.when {
                        self.expr(when, path);
                    }
                    self.block(&case.steps, None, &format!("{path}/"), |_| {});
                }
            }
            Kind::Wait { until: WaitUntil::Instant { at, .. } } => self.expr(at, path),
            Kind::Wait { until: WaitUntil::For(_) } => {}
            Kind::Await(spec) => {
                if let Some(show) = &spec.show {
                    self.template(show, path);
                }
                self.answers(spec, path);
            }
            Kind::Call { workflow, version, with, .. } => {
                let key = call_key(workflow, version);
                if !self.moment.calls.contains_key(&key) {
                    let text = format!("`{key}` is not deployed: deploy it first");
                    self.found.violation(path, Rule::CallUnresolved, text);
                }
                self.map(with, path);
            }
            Kind::Fail { message, .. } => {
                if let Some(message) = message {
                    self.data(message, path);
                }
            }
            Kind::Finish { outputs } => self.map(outputs, path),
            Kind::ContinueAsNew { with, .. } => self.map(with, path),
        }
        self.handlers(step, path);
    }

    fn under_way(&mut self, step: &'a Step, live: &'a Live, path: &str) {
        for (suffix, frame) in live.frames() {
            let segment = format!("{}{suffix}", step.id);
            let Some(steps) = live_children(step, live, split_segment(&segment).1) else { continue };
            let prefix = format!("{path}{suffix}/");
            self.block(steps, Some(frame), &prefix, |reads| match &step.kind {
                _ if matches!(live, Live::Catch { .. }) => {}
                Kind::Group { outputs, .. } | Kind::Foreach { outputs, .. } => reads.maybe(outputs.as_ref(), path),
                Kind::Repeat { condition, outputs, .. } => reads.round_ends(condition, outputs.as_ref(), path),
                _ => {}
            });
        }
        match (live, &step.kind) {
            (Live::Catch { .. }, _) => return,
            // Items and rounds that have not begun.
            (Live::Foreach { next, items, .. }, Kind::Foreach { steps, outputs, .. }) if *next < items.len() => {
                self.block(steps, None, &format!("{path}/"), |r| r.maybe(outputs.as_ref(), path));
            }
            (Live::Repeat { round, .. }, Kind::Repeat { steps, max_rounds, condition, outputs, .. })
                if round < max_rounds =>
            {
                self.block(steps, None, &format!("{path}/"), |r| r.round_ends(condition, outputs.as_ref(), path));
            }
            (Live::Await { .. }, Kind::Await(spec)) => self.answers(spec, path),
            _ => {}
        }
        self.handlers(step, path);
    }

    fn handlers(&mut self, step: &'a Step, path: &str) {
        for catch in &step.catch {
            if let Some(condition) = &catch.condition {
                self.expr(condition, path);
            }
            self.block(&catch.steps, None, &format!("{path}!/"), |_| {});
        }
    }

    fn answers(&mut self, spec: &'a Await, path: &str) {
        if let Some(filter) = &spec.filter {
            self.expr(filter, path);
        }
        for data in spec.default.iter().chain(&spec.reply) {
            self.data(data, path);
        }
    }

    fn round_ends(
        &mut self,
        condition: &'a RepeatCondition,
        outputs: Option<&'a std::collections::BTreeMap<String, Data>>,
        path: &str,
    ) {
        let (RepeatCondition::Until(condition) | RepeatCondition::While(condition)) = condition;
        self.expr(condition, path);
        self.maybe(outputs, path);
    }

    fn maybe(&mut self, outputs: Option<&'a std::collections::BTreeMap<String, Data>>, path: &str) {
        if let Some(outputs) = outputs {
            self.map(outputs, path);
        }
    }

    fn map(&mut self, map: &'a std::collections::BTreeMap<String, Data>, path: &str) {
        map.values().for_each(|data| self.data(data, path));
    }

    fn data(&mut self, data: &'a Data, path: &str) {
        match data {
            Data::Literal(_) => {}
            Data::Expr(text) => self.expr(text, path),
            Data::Template(text) => self.template(text, path),
            Data::Concat(items) | Data::List(items) => items.iter().for_each(|item| self.data(item, path)),
            Data::Map(map) => self.map(map, path),
        }
    }

    fn expr(&mut self, text: &'a Expr, path: &str) {
        // What cannot be parsed was the compiler's to refuse, and fails when it is reached.
        let Ok(references) = expr::check(text) else { return };
        let read = &references.variables;
        for variable in read.iter().filter(|v| v[0] == "steps" && v.len() > 1) {
            // `has(steps.a.output)` reads `steps.a`; so does who asks for its status first.
            let asked = |v: &Vec<String>| {
                v.len() > 1
                    && v[1] == variable[1]
                    && ((v.len() < variable.len() && variable.starts_with(v))
                        || v.get(2).is_some_and(|f| f == "status"))
            };
            let guarded = read.iter().any(|v| v[0] == "steps" && asked(v));
            self.step(&variable[1], &variable[2..], &text.0, guarded, path);
        }
    }

    fn template(&mut self, text: &'a Template, path: &str) {
        for read in template::check(text).unwrap_or_default().iter().filter(|v| v[0] == "steps" && v.len() > 1) {
            self.step(&read[1], &read[2..], &text.0, false, path);
        }
    }

    /// `steps.ID.FIELDS`, read at `path`.
    fn step(&mut self, id: &str, fields: &[String], text: &str, guarded: bool, path: &str) {
        let reads = format!("reads `steps.{id}{}`", fields.iter().map(|f| format!(".{f}")).collect::<String>());
        for level in self.levels.iter().rev() {
            let node = level.frame.and_then(|frame| frame.nodes.get(id));
            match (node, visible(level.steps, id)) {
                (Some(node), Some(step)) => return self.ended(node, step, fields, text, guarded, path),
                (Some(_), None) => break,
                (None, Some(_)) => return,
                (None, None) => {}
            }
        }
        // What no definition knows was missing before.
        if self.names.was(id) {
            let text = format!("it {reads}, which is not there in the new definition: keep that step, or read another");
            self.found.violation(path, Rule::OutputMissing, text);
        }
    }

    fn ended(&mut self, node: &Node, step: &Step, fields: &[String], text: &str, guarded: bool, path: &str) {
        if node.live.is_some() {
            return;
        }
        let never = node.reason.as_deref() == Some(SKIPPED);
        let mut value = &node_value(node);
        let mut at = format!("steps.{}", step.id);
        for field in fields {
            at.push_str(&format!(".{field}"));
            if let Some(inner) = value.get(field) {
                value = inner;
                continue;
            }
            if !never && self.before.contains(text) {
                return;
            }
            let why = if never { "that step never runs in this run" } else { "that step has ended without it" };
            if guarded {
                self.found.note(path, Rule::Changed, format!("it asks for `{at}`, and {why}"));
            } else {
                let text = format!("it reads `{at}`, and {why}: guard it by `has()` or `default()`, or read another");
                self.found.violation(path, Rule::OutputMissing, text);
            }
            return;
        }
        if fields.first().is_some_and(|f| f == "output") && node.status == Some(StepStatus::Succeeded) {
            self.form(node.output.as_ref().unwrap_or(&Value::Null), step, path);
        }
    }

    /// An output that is still read satisfies what the new definition says of it.
    fn form(&mut self, output: &Value, step: &Step, path: &str) {
        let schema = match &step.kind {
            Kind::Await(spec) if spec.approval.is_none() => spec.form.as_ref(),
            Kind::Activity { name, .. } => {
                let same = matches!(self.names.origin(&step.id).map(|o| &o.kind), Some(Kind::Activity { name: was, .. }) if was == name);
                self.moment.catalog.get(name).filter(|_| !same).map(|signature| &signature.output_schema)
            }
            _ => None,
        };
        let problems = schema.map(|schema| violations(schema, output)).unwrap_or_default();
        if !problems.is_empty() {
            let text = format!(
                "it reads the output of `{}`, which does not satisfy the new schema: {}; widen that, or read another",
                step.id,
                problems.join("; ")
            );
            self.found.violation(path, Rule::OutputMissing, text);
        }
    }
}

/// Every expression and template of a definition, as text.
fn texts<'a>(definition: &'a Definition, into: &mut BTreeSet<&'a str>) {
    definition.walk(&mut |step| {
        into.extend(
            step.condition.iter().chain(step.catch.iter().filter_map(|c| c.condition.as_ref())).map(|e| e.0.as_str()),
        );
        step.retry.escalate.iter().for_each(|e| e.with.values().for_each(|d| data(d, into)));
        let mut map = |map: &'a std::collections::BTreeMap<String, Data>| map.values().for_each(|d| data(d, into));
        match &step.kind {
            Kind::Activity { with, .. } | Kind::Call { with, .. } | Kind::ContinueAsNew { with, .. } => map(with),
            Kind::Set { values } => map(values),
            Kind::Finish { outputs } => map(outputs),
            Kind::Group { outputs, .. } => outputs.iter().for_each(map),
            Kind::Foreach { list, key, outputs, .. } => {
                outputs.iter().for_each(map);
                into.insert(&list.0);
                into.extend(key.iter().map(|k| k.0.as_str()));
            }
            Kind::Repeat { condition: RepeatCondition::Until(e) | RepeatCondition::While(e), outputs, .. } => {
                outputs.iter().for_each(map);
                into.insert(&e.0);
            }
            Kind::Switch { cases } => into.extend(cases.iter().filter_map(|c| c.when.as_ref()).map(|e| e.0.as_str())),
            Kind::Wait { until: WaitUntil::Instant { at, .. } } => {
                into.insert(&at.0);
            }
            Kind::Await(spec) => {
                spec.default.iter().chain(&spec.reply).for_each(|d| data(d, into));
                into.extend(spec.show.iter().map(|t| t.0.as_str()).chain(spec.filter.iter().map(|e| e.0.as_str())));
            }
            Kind::Fail { message, .. } => message.iter().for_each(|d| data(d, into)),
            Kind::Parallel { .. } | Kind::Wait { .. } => {}
        }
    });
    definition.outputs.values().for_each(|d| data(d, into));
}

fn data<'a>(value: &'a Data, into: &mut BTreeSet<&'a str>) {
    match value {
        Data::Literal(_) => {}
        Data::Expr(e) => {
            into.insert(&e.0);
        }
        Data::Template(t) => {
            into.insert(&t.0);
        }
        Data::Concat(items) | Data::List(items) => items.iter().for_each(|d| data(d, into)),
        Data::Map(map) => map.values().for_each(|d| data(d, into)),
    }
}
