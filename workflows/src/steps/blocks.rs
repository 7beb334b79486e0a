//! Steps that hold steps: `parallel`, `foreach`, `repeat`, `switch`; and what `finally` may hold.

use super::{Steps, redo::exhausted};
use crate::{
    document::{Content, Node},
    lower::map_of_data,
    read::{Fields, bare},
    scope::{Known, Scope},
};
use loopwright_engine::definition::{Branch, Case, Data, Join, Kind, OnItemFailure, RepeatCondition, Step};
use serde_json::Value;
use std::collections::BTreeMap;

impl Steps<'_> {
    pub(super) fn block_outputs(
        &mut self,
        fields: &Fields<'_>,
        inner: &Scope,
        known: &mut Known,
    ) -> Option<BTreeMap<String, Data>> {
        let node = fields.get("outputs")?;
        let map = map_of_data(Some(node), inner, self.sink);
        known.fields = Some(map.keys().cloned().collect());
        Some(map)
    }

    pub(super) fn parallel(&mut self, node: &Node, scope: &Scope, depth: usize) -> Option<Kind> {
        let fields = Fields::new(node, "`parallel`", &["branches", "join", "fail-fast"], self.sink)?;
        let Some(Content::Map(entries)) = fields.get("branches").map(|n| &n.kind) else {
            self.sink.error_help(
                "WF421",
                node.span,
                &node.path,
                "`parallel` needs `branches`",
                "a map from branch names to steps",
            );
            return None;
        };
        if !(2..=16).contains(&entries.len()) {
            self.sink.error("WF422", node.span, &node.path, "a `parallel` has 2..16 branches");
        }
        let mut branches = Vec::new();
        for (key, steps) in entries {
            if !key.name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-') {
                self.sink.error("WF106", key.span, &node.path, format!("`{}` is no branch name", key.name));
            }
            let mut inner = scope.clone();
            branches.push(Branch { name: key.name.clone(), steps: self.sequence(steps, &mut inner, depth + 1) });
        }
        let join = match fields.get("join").map(Node::value) {
            None => Join::All,
            Some(Value::String(word)) if word == "all" => Join::All,
            Some(Value::String(word)) if word == "settled" => Join::Settled,
            Some(Value::String(word)) if word == "first" => Join::First,
            Some(Value::Object(map)) if map.len() == 1 && map.get("at-least").is_some_and(Value::is_u64) => {
                let n = map["at-least"].as_u64().and_then(|n| u32::try_from(n).ok()).unwrap_or(1);
                if n == 0 || n as usize > branches.len() {
                    self.sink.error(
                        "WF422",
                        fields.key_span("join"),
                        &node.path,
                        format!("`at-least` must be in 1..{}", branches.len()),
                    );
                }
                Join::AtLeast(n)
            }
            Some(_) => {
                self.sink.error(
                    "WF106",
                    fields.key_span("join"),
                    &node.path,
                    "`join` must be all, settled, first or {at-least: n}",
                );
                Join::All
            }
        };
        Some(Kind::Parallel { branches, join, fail_fast: fields.boolean("fail-fast", true, self.sink) })
    }

    pub(super) fn foreach(&mut self, step: &Fields<'_>, node: &Node, scope: &Scope, depth: usize) -> Option<Kind> {
        let fields =
            Fields::new(node, "`foreach`", &["in", "max-items", "key", "concurrency", "on-item-failure"], self.sink)?;
        if !fields.has("max-items") {
            self.sink.error_help(
                "WF421",
                step.key_span("foreach"),
                &node.path,
                "`foreach` needs `max-items`",
                "add `max-items: 20`",
            );
        }
        let Some(list) = fields.get("in") else {
            self.sink.error_help(
                "WF421",
                step.key_span("foreach"),
                &node.path,
                "`foreach` needs `in`",
                "an expression that yields a list",
            );
            return None;
        };
        let list = bare(list, self.sink)?;
        scope.check(&list, self.sink);
        let mut inner = scope.clone();
        inner.item = true;
        let key = fields.get("key").and_then(|n| bare(n, self.sink)).map(|site| {
            inner.check(&site, self.sink);
            site.expr
        });
        let policies = [
            ("fail-fast", OnItemFailure::FailFast),
            ("fail-after", OnItemFailure::FailAfter),
            ("continue", OnItemFailure::Continue),
        ];
        let Some(body) = step.get("steps") else {
            self.sink.error_help(
                "WF421",
                step.key_span("foreach"),
                &node.path,
                "`foreach` needs `steps`",
                "what is done for each item",
            );
            return None;
        };
        let max_items = fields.integer("max-items", 1..=1000, self.sink).unwrap_or(1);
        let concurrency = fields.integer("concurrency", 1..=64, self.sink).unwrap_or(1);
        let on_item_failure = fields.word("on-item-failure", &policies, OnItemFailure::FailFast, self.sink);
        let steps = self.sequence(body, &mut inner, depth + 1);
        let outputs = step.get("outputs").map(|n| map_of_data(Some(n), &inner, self.sink));
        Some(Kind::Foreach { list: list.expr, key, max_items, concurrency, on_item_failure, steps, outputs })
    }

    pub(super) fn repeat(
        &mut self,
        step: &Fields<'_>,
        node: &Node,
        scope: &Scope,
        depth: usize,
        known: &mut Known,
    ) -> Option<Kind> {
        let fields = Fields::new(node, "`repeat`", &["max-rounds", "until", "while", "delay", "exhausted"], self.sink)?;
        if !fields.has("max-rounds") {
            self.sink.error_help(
                "WF421",
                step.key_span("repeat"),
                &node.path,
                "`repeat` needs `max-rounds`",
                "add `max-rounds: 5`",
            );
        }
        let Some(body) = step.get("steps") else {
            self.sink.error_help(
                "WF421",
                step.key_span("repeat"),
                &node.path,
                "`repeat` needs `steps`",
                "what is done in each round",
            );
            return None;
        };
        let mut inner = scope.clone();
        inner.round = true;
        let steps = self.sequence(body, &mut inner, depth + 1);
        let condition = match (fields.get("until"), fields.get("while")) {
            (Some(n), None) => RepeatCondition::Until(self.checked(n, &inner)?),
            (None, Some(n)) => RepeatCondition::While(self.checked(n, &inner)?),
            _ => {
                self.sink.error_help(
                    "WF421",
                    step.key_span("repeat"),
                    &node.path,
                    "`repeat` needs `until` or `while`, one of them",
                    "add `until: steps.check.output.passed`",
                );
                return None;
            }
        };
        let max_rounds = fields.integer("max-rounds", 1..=100, self.sink).unwrap_or(1);
        Some(Kind::Repeat {
            steps,
            max_rounds,
            condition,
            delay_ms: fields.duration("delay", self.sink).unwrap_or(0),
            exhausted: exhausted(&fields, self.sink),
            transparent: false,
            gate: None,
            outputs: self.block_outputs(step, &inner, known),
        })
    }

    pub(super) fn switch(&mut self, node: &Node, scope: &Scope, depth: usize) -> Option<Kind> {
        let Content::List(items) = &node.kind else {
            self.sink.error(
                "WF106",
                node.span,
                &node.path,
                format!("expected a list of cases, found {}", node.type_name()),
            );
            return None;
        };
        if !(1..=20).contains(&items.len()) {
            self.sink.error("WF422", node.span, &node.path, "a `switch` has 1..20 cases");
        }
        let mut cases = Vec::new();
        for (at, item) in items.iter().enumerate() {
            let Some(fields) = Fields::new(item, "a case", &["when", "else", "steps"], self.sink) else { continue };
            if fields.has("when") == fields.has("else") {
                self.sink.error("WF209", item.span, &item.path, "a case has `when` or `else: true`, one of them");
            }
            if fields.has("else") && at + 1 != items.len() {
                self.sink.error("WF209", item.span, &item.path, "`else` must be last");
            }
            let when = fields.get("when").and_then(|n| self.checked(n, scope));
            let mut inner = scope.clone();
            let steps = fields.get("steps").map(|n| self.sequence(n, &mut inner, depth + 1));
            let Some(steps) = steps else {
                self.sink.error("WF421", item.span, &item.path, "a case needs `steps`");
                continue;
            };
            cases.push(Case { when, steps });
        }
        Some(Kind::Switch { cases })
    }

    /// `finally` must come to its end by itself.
    pub(crate) fn check_finally(&mut self, node: &Node, steps: &[Step]) {
        fn forbidden(steps: &[Step]) -> Option<&str> {
            steps
                .iter()
                .find_map(|step| own(step).or_else(|| step.catch.iter().find_map(|handler| forbidden(&handler.steps))))
        }
        fn own(step: &Step) -> Option<&str> {
            match &step.kind {
                Kind::Await(_) | Kind::Call { .. } | Kind::Finish { .. } | Kind::ContinueAsNew { .. } => {
                    Some(step.id.as_str())
                }
                Kind::Group { steps, .. } | Kind::Foreach { steps, .. } | Kind::Repeat { steps, .. } => {
                    forbidden(steps)
                }
                Kind::Parallel { branches, .. } => branches.iter().find_map(|b| forbidden(&b.steps)),
                Kind::Switch { cases } => cases.iter().find_map(|c| forbidden(&c.steps)),
                Kind::Activity { .. } | Kind::Set { .. } | Kind::Wait { .. } | Kind::Fail { .. } => None,
            }
        }
        if let Some(id) = forbidden(steps) {
            self.sink.error(
                "WF508",
                node.span,
                &node.path,
                format!("`finally` may not contain human waits, `call`, `finish` or `continue-as-new` (step `{id}`)"),
            );
        }
        if steps.len() > 20 {
            self.sink.error("WF210", node.span, &node.path, "`finally` has at most 20 steps");
        }
    }
}
