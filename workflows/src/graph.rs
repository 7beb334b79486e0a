//! A definition as a mermaid flow chart.

use loopwright_engine::definition::{Definition, Kind, RepeatCondition, Step};
use std::fmt::Write as _;

/// Draws the definition, top down. Blocks are subgraphs; a `redo` is an edge back.
#[must_use]
pub fn mermaid(definition: &Definition) -> String {
    let mut chart = Chart { out: String::from("flowchart TD\n"), indent: 1 };
    chart.line("start([start])");
    let last = chart.sequence(&definition.steps, vec!["start".to_owned()]);
    chart.line("done([end])");
    chart.edges(&last, "done", "");
    if !definition.finally.is_empty() {
        chart.line("subgraph finally");
        chart.indent += 1;
        chart.sequence(&definition.finally, Vec::new());
        chart.indent -= 1;
        chart.line("end");
        chart.line("done -.-> finally");
    }
    chart.out
}

struct Chart {
    out: String,
    indent: usize,
}

impl Chart {
    fn line(&mut self, text: &str) {
        // Writing to a String cannot fail.
        let _ = writeln!(self.out, "{}{text}", "    ".repeat(self.indent));
    }

    fn edges(&mut self, from: &[String], to: &str, label: &str) {
        for source in from {
            let label = if label.is_empty() { String::new() } else { format!("|{}|", quote(label)) };
            self.line(&format!("{source} -->{label} {to}"));
        }
    }

    /// Draws steps in sequence after `from`; returns what leads on.
    fn sequence(&mut self, steps: &[Step], mut from: Vec<String>) -> Vec<String> {
        for step in steps {
            from = self.step(step, from);
        }
        from
    }

    fn step(&mut self, step: &Step, from: Vec<String>) -> Vec<String> {
        let id = node_id(&step.id);
        let label = step.condition.as_ref().map_or(String::new(), |c| format!("if {}", c.0));
        let leaf = |chart: &mut Self, text: String, shape: (&str, &str)| {
            chart.line(&format!("{id}{}{}{}", shape.0, quote(&text), shape.1));
            chart.edges(&from, &id, &label);
            vec![id.clone()]
        };
        match &step.kind {
            Kind::Activity { name, .. } => leaf(self, format!("{} · {name}", step.id), ("[", "]")),
            Kind::Set { .. } => leaf(self, format!("{} · set", step.id), ("[", "]")),
            Kind::Wait { .. } => leaf(self, format!("{} · wait", step.id), ("[/", "/]")),
            Kind::Await(spec) => {
                let what = if spec.approval.is_some() { "approval" } else { "await" };
                leaf(self, format!("{} · {what}", step.id), ("[/", "/]"))
            }
            Kind::Call { workflow, .. } => leaf(self, format!("{} · call {workflow}", step.id), ("[[", "]]")),
            Kind::Fail { code, .. } => {
                leaf(self, format!("{} · fail {code}", step.id), ("[", "]"));
                Vec::new()
            }
            Kind::Finish { .. } => {
                leaf(self, format!("{} · finish", step.id), ("([", "])"));
                Vec::new()
            }
            Kind::ContinueAsNew { .. } => {
                leaf(self, format!("{} · continue as new", step.id), ("([", "])"));
                Vec::new()
            }
            Kind::Group { steps, .. } => {
                self.block(&id, &step.id, &label, &from, |chart| chart.sequence(steps, Vec::new()))
            }
            Kind::Foreach { list, max_items, steps, .. } => {
                let title = format!("{} · for each of {} (at most {max_items})", step.id, list.0);
                self.block(&id, &title, &label, &from, |chart| chart.sequence(steps, Vec::new()))
            }
            Kind::Repeat { steps, max_rounds, condition, transparent, .. } => {
                let text = match condition {
                    RepeatCondition::Until(e) => format!("until {}", e.0),
                    RepeatCondition::While(e) => format!("while {}", e.0),
                };
                let what = if *transparent { "redo" } else { "repeat" };
                let title = format!("{what} {text} (at most {max_rounds} rounds)");
                self.block(&id, &title, &label, &from, |chart| chart.sequence(steps, Vec::new()))
            }
            Kind::Parallel { branches, .. } => {
                let title = format!("{} · parallel", step.id);
                self.block(&id, &title, &label, &from, |chart| {
                    branches.iter().flat_map(|b| chart.sequence(&b.steps, Vec::new())).collect()
                })
            }
            Kind::Switch { cases } => {
                self.line(&format!("{id}{{{}}}", quote(&step.id)));
                self.edges(&from, &id, &label);
                let mut ends = Vec::new();
                for case in cases {
                    let when = case.when.as_ref().map_or("else", |w| w.0.as_str());
                    if let Some((first, rest)) = case.steps.split_first() {
                        let next = self.step(first, Vec::new());
                        self.edges(std::slice::from_ref(&id), &node_id(&first.id), when);
                        ends.extend(self.sequence(rest, next));
                    }
                }
                ends
            }
        }
    }

    fn block(
        &mut self,
        id: &str,
        title: &str,
        label: &str,
        from: &[String],
        inside: impl FnOnce(&mut Self) -> Vec<String>,
    ) -> Vec<String> {
        self.line(&format!("subgraph {id}[{}]", quote(title)));
        self.indent += 1;
        inside(self);
        self.indent -= 1;
        self.line("end");
        self.edges(from, id, label);
        vec![id.to_owned()]
    }
}

/// `end` is a word of mermaid, dots are not allowed.
fn node_id(id: &str) -> String {
    format!("s_{}", id.replace("..", "_to_"))
}

fn quote(text: &str) -> String {
    format!("\"{}\"", text.replace('"', "'").replace('\n', " "))
}
