//! `redo`: a range of a sequence that is done again, lowered to a repeat around it.

use super::Steps;
use crate::{
    diagnostic::{Severity, Sink, suggestion},
    document::{Content, Node},
    read::{Fields, bare},
    scope::Scope,
};
use loopwright_engine::definition::{Exhausted, Expr, Kind, RepeatCondition, Step};

const REDO: &[&str] = &["from", "if", "max-rounds", "exhausted", "delay"];

/// A `redo` of a sequence: positions from and to, and the repeat it becomes.
pub(super) struct Redo {
    from: usize,
    to: usize,
    condition: Expr,
    max_rounds: u32,
    delay_ms: u64,
    exhausted: Exhausted,
}

impl Steps<'_> {
    pub(super) fn redo_ranges(&mut self, items: &[Node], ids: &[Option<String>]) -> Vec<(usize, usize)> {
        let mut ranges: Vec<(usize, usize)> = Vec::new();
        for (to, item) in items.iter().enumerate() {
            let Content::Map(entries) = &item.kind else { continue };
            let Some((_, redo)) = entries.iter().find(|(k, _)| k.name == "redo") else { continue };
            let Some(fields) = Fields::new(redo, "`redo`", REDO, self.sink) else { continue };
            let Some(from_node) = fields.get("from") else {
                let help = "add `from:` with the id of the first step of the range";
                self.sink.error_help("WF421", redo.span, &redo.path, "`redo` needs `from`", help);
                continue;
            };
            let from = from_node.value().as_str().map(str::to_owned).unwrap_or_default();
            match ids[..=to].iter().position(|id| id.as_deref() == Some(&from)) {
                Some(from) => {
                    if let Some((f, t)) = ranges.iter().find(|(f, t)| from <= *t && *f < from) {
                        let name = |i: usize| ids[i].clone().unwrap_or_default();
                        let message = format!(
                            "redo ranges {}..{} and {}..{} overlap without nesting",
                            name(*f),
                            name(*t),
                            name(from),
                            name(to)
                        );
                        self.sink.error("WF221", redo.span, &redo.path, message);
                    } else {
                        ranges.push((from, to));
                    }
                }
                None => {
                    let like = suggestion(&from, ids[..=to].iter().flatten().map(String::as_str))
                        .map(|s| format!("did you mean `{s}`?"));
                    let message = "`redo.from` must name this step or an earlier sibling in the sequence";
                    self.sink.add("WF220", Severity::Error, from_node.span, &from_node.path, message, like);
                }
            }
        }
        ranges
    }

    pub(super) fn redo(
        &mut self,
        fields: &Fields<'_>,
        (from, to): (usize, usize),
        id: &str,
        scope: &Scope,
    ) -> Option<Redo> {
        let node = fields.get("redo")?;
        let redo = Fields::new(node, "`redo`", REDO, self.sink)?;
        if !redo.has("max-rounds") {
            self.sink.error_help("WF421", node.span, &node.path, "`redo` needs `max-rounds`", "add `max-rounds: 3`");
        }
        let max_rounds = redo.integer("max-rounds", 1..=50, self.sink).unwrap_or(1);
        let Some(condition) = redo.get("if") else {
            self.sink.error_help("WF421", node.span, &node.path, "`redo` needs `if`", "say when the range is repeated");
            return None;
        };
        let site = bare(condition, self.sink)?;
        let mut inner = scope.clone();
        inner.round = true;
        // The condition is asked only when the step ended well.
        inner.guarded = Some(id.to_owned());
        inner.check(&site, self.sink);
        Some(Redo {
            from,
            to,
            condition: site.expr,
            max_rounds,
            delay_ms: redo.duration("delay", self.sink).unwrap_or(0),
            exhausted: exhausted(&redo, self.sink),
        })
    }
}

pub(super) fn exhausted(fields: &Fields<'_>, sink: &mut Sink) -> Exhausted {
    fields.word("exhausted", &[("fail", Exhausted::Fail), ("continue", Exhausted::Continue)], Exhausted::Fail, sink)
}

/// Wraps each redo's range into a repeat, inner ranges first.
pub(super) fn fold_redos(steps: Vec<Step>, positions: &[usize], mut redos: Vec<Redo>) -> Vec<Step> {
    redos.sort_by_key(|r| r.to - r.from);
    let mut slots: Vec<(usize, usize, Step)> =
        positions.iter().copied().zip(steps).map(|(at, step)| (at, at, step)).collect();
    for redo in redos {
        let Some(first) = slots.iter().position(|(from, ..)| *from == redo.from) else { continue };
        let Some(last) = slots.iter().position(|(_, to, _)| *to == redo.to) else { continue };
        let gate = innermost_last(&slots[last].2);
        let inside: Vec<Step> = slots.drain(first..=last).map(|(_, _, step)| step).collect();
        let id = format!("{}..{gate}", innermost_first(&inside[0]));
        let repeat = Step {
            id,
            condition: None,
            kind: Kind::Repeat {
                steps: inside,
                max_rounds: redo.max_rounds,
                condition: RepeatCondition::While(redo.condition),
                delay_ms: redo.delay_ms,
                exhausted: redo.exhausted,
                transparent: true,
                gate: Some(gate),
                outputs: None,
            },
            retry: Default::default(),
            timeouts: Default::default(),
            catch: Vec::new(),
            continue_on_error: false,
        };
        slots.insert(first, (redo.from, redo.to, repeat));
    }
    slots.into_iter().map(|(_, _, step)| step).collect()
}

/// The user's id at the start of a lowered range.
fn innermost_first(step: &Step) -> String {
    step.id.split("..").next().unwrap_or(&step.id).to_owned()
}

/// The user's id at the end of a lowered range.
fn innermost_last(step: &Step) -> String {
    step.id.rsplit("..").next().unwrap_or(&step.id).to_owned()
}
