//! Steps: one kind each, lowered to the engine's instruction set. `redo` becomes a repeat around its range.

use crate::{
    check,
    diagnostic::{Severity, Sink, Span, suggestion},
    document::{Content, Node},
    lower::{DEFAULTS, map_of_data, retry, timeouts, unknown_activity},
    read::{Fields, bare, data},
    scope::{Known, Scope, fields_of},
};
use loopwright_engine::{
    definition::{
        Approval, Await, Branch, Bundle, CallVersion, Case, Catch, Data, Exhausted, Expr, Join, Kind, OnCancel,
        OnItemFailure, OnTimeout, RepeatCondition, Step, Template, WaitUntil, inputs::violations,
    },
    signature::Catalog,
};
use serde_json::Value;
use std::collections::BTreeMap;

const KINDS: &[&str] = &[
    "uses", "set", "steps", "parallel", "foreach", "repeat", "switch", "wait", "await", "approve", "call", "fail",
    "finish",
];
/// Known to the language, not accepted yet.
const LATER: &[&str] = &["run", "undo", "needs", "order", "env", "secrets", "concurrency", "budget"];
const COMMON: &[&str] =
    &["id", "name", "if", "timeout", "retry", "redo", "catch", "continue-on-error", "outputs", "with"];
const RESERVED: &[&str] = &[
    "true",
    "false",
    "null",
    "in",
    "as",
    "break",
    "const",
    "continue",
    "else",
    "for",
    "function",
    "if",
    "import",
    "let",
    "loop",
    "package",
    "namespace",
    "return",
    "var",
    "void",
    "while",
    "inputs",
    "env",
    "steps",
    "item",
    "index",
    "round",
    "signal",
    "error",
    "event",
    "run",
    "finally",
];
const REDO: &[&str] = &["from", "if", "max-rounds", "exhausted", "delay"];
/// The one whom the surfaces ask today.
const OWNER: &str = "role:owner";
const STEPS_MAX: usize = 200;
const NESTING_MAX: usize = 8;
const WAIT_MAX_MS: u64 = 90 * 86_400_000;

/// Lowers steps of one document.
pub(crate) struct Steps<'a> {
    /// Name of the document.
    pub(crate) name: String,
    /// The files beside the document.
    pub(crate) files: &'a Bundle,
    pub(crate) catalog: &'a Catalog,
    pub(crate) defaults: Option<Fields<'a>>,
    /// Ids of the document and where they first stand.
    pub(crate) seen: BTreeMap<String, Span>,
    pub(crate) count: usize,
    /// Of the whole run.
    pub(crate) timeout_ms: u64,
    pub(crate) sink: &'a mut Sink,
}

/// A `redo` of a sequence: positions from and to, and the repeat it becomes.
struct Redo {
    from: usize,
    to: usize,
    condition: Expr,
    max_rounds: u32,
    delay_ms: u64,
    exhausted: Exhausted,
}

impl Steps<'_> {
    /// The steps of one block. What they define becomes visible in `scope`.
    pub(crate) fn sequence(&mut self, node: &Node, scope: &mut Scope, depth: usize) -> Vec<Step> {
        let Content::List(items) = &node.kind else {
            self.sink.error(
                "WF106",
                node.span,
                &node.path,
                format!("expected a list of steps, found {}", node.type_name()),
            );
            return Vec::new();
        };
        if depth > NESTING_MAX {
            self.sink.error("WF210", node.span, &node.path, format!("nesting deeper than {NESTING_MAX}"));
            return Vec::new();
        }
        if items.is_empty() {
            self.sink.error("WF106", node.span, &node.path, "a block needs at least one step");
        }
        let ids: Vec<Option<String>> = items.iter().map(id_of).collect();
        let ranges = self.redo_ranges(items, &ids);
        let outer_round = scope.round;
        let mut out: Vec<Step> = Vec::new();
        let mut redos: Vec<Redo> = Vec::new();
        let mut positions: Vec<usize> = Vec::new();
        let mut ended = false;
        for (at, item) in items.iter().enumerate() {
            scope.round = outer_round || ranges.iter().any(|(from, to)| (*from..=*to).contains(&at));
            let known = [COMMON, KINDS, LATER].concat();
            let Some(fields) = Fields::new(item, "a step", &known, self.sink) else { continue };
            let id = self.id(&fields, ids[at].as_deref());
            self.sink.steps.push(id.clone());
            if ended {
                self.sink.error("WF207", item.span, &item.path, "unreachable: an earlier step always ends the block");
            }
            self.count += 1;
            if self.count == STEPS_MAX + 1 {
                self.sink.error("WF210", item.span, &item.path, format!("more than {STEPS_MAX} steps"));
            }
            if let Some((step, known)) = self.step(&fields, id.clone(), scope, depth) {
                ended |= step.condition.is_none() && matches!(step.kind, Kind::Fail { .. } | Kind::Finish { .. });
                scope.steps.insert(id.clone(), known);
                if let Some((from, to)) = ranges.iter().find(|(_, to)| *to == at).copied() {
                    redos.extend(self.redo(&fields, (from, to), &id, scope));
                }
                positions.push(at);
                out.push(step);
            }
            self.sink.steps.pop();
        }
        scope.round = outer_round;
        fold_redos(out, &positions, redos)
    }

    fn id(&mut self, fields: &Fields<'_>, id: Option<&str>) -> String {
        let Some(id) = id else {
            self.sink.error_help(
                "WF202",
                fields.node.span,
                &fields.node.path,
                "a step needs an `id`",
                "add `id: my_step`",
            );
            return format!("step_{}", self.count);
        };
        let span = fields.get("id").map_or(fields.node.span, |n| n.span);
        let well_formed = id.len() <= 40
            && id.starts_with(|c: char| c.is_ascii_lowercase())
            && id.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_');
        if RESERVED.contains(&id) {
            self.sink.error("WF203", span, &fields.node.path, format!("the id `{id}` is reserved"));
        } else if !well_formed {
            self.sink.error_help(
                "WF203",
                span,
                &fields.node.path,
                format!("`{id}` is no step id"),
                "lower-case letters, digits and `_`, at most 40, starting with a letter",
            );
        }
        match self.seen.get(id) {
            Some(first) => {
                let (line, column) = (first.line, first.column);
                self.sink.error(
                    "WF201",
                    span,
                    &fields.node.path,
                    format!("step id `{id}` already used at {line}:{column}"),
                );
            }
            None => {
                self.seen.insert(id.to_owned(), span);
            }
        }
        id.to_owned()
    }

    fn redo_ranges(&mut self, items: &[Node], ids: &[Option<String>]) -> Vec<(usize, usize)> {
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

    fn redo(&mut self, fields: &Fields<'_>, (from, to): (usize, usize), id: &str, scope: &Scope) -> Option<Redo> {
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

    fn step(&mut self, fields: &Fields<'_>, id: String, scope: &Scope, depth: usize) -> Option<(Step, Known)> {
        for later in LATER {
            fields.refuse_later(later, self.sink);
        }
        // `steps` is a kind of its own only where no other block claims it.
        let mut kinds: Vec<&str> = KINDS.iter().copied().filter(|k| fields.has(k)).collect();
        if kinds.len() > 1 && (kinds.contains(&"foreach") || kinds.contains(&"repeat")) {
            kinds.retain(|k| *k != "steps");
        }
        let kind_name = match kinds.as_slice() {
            [one] => *one,
            [] => {
                if !LATER.iter().any(|k| fields.has(k)) && !fields.unknown {
                    self.sink.error_help(
                        "WF202",
                        fields.node.span,
                        &fields.node.path,
                        format!("step `{id}` has no kind"),
                        format!("add one of {}", KINDS.join(", ")),
                    );
                }
                return None;
            }
            [a, b, ..] => {
                self.sink.error(
                    "WF202",
                    fields.key_span(b),
                    &fields.node.path,
                    format!("step `{id}` has two kinds, `{a}` and `{b}`"),
                );
                return None;
            }
        };
        let condition = fields.get("if").and_then(|n| bare(n, self.sink)).map(|site| {
            scope.check(&site, self.sink);
            if site.expr.0 == "true" || site.expr.0 == "false" {
                self.sink.warn("WF208", site.span, &site.path, format!("the condition is always {}", site.expr.0));
            }
            site.expr
        });
        if fields.has("with") && !["uses"].contains(&kind_name) {
            self.sink.error(
                "WF102",
                fields.key_span("with"),
                &fields.node.path,
                format!("`with` belongs to `uses`, not to `{kind_name}`"),
            );
        }
        if fields.has("outputs") && !["steps", "foreach", "repeat", "finish"].contains(&kind_name) {
            self.sink.error(
                "WF102",
                fields.key_span("outputs"),
                &fields.node.path,
                format!("`outputs` belongs to blocks, not to `{kind_name}`"),
            );
        }
        let node = fields.get(kind_name)?;
        let mut known = Known { fields: None, conditional: condition.is_some().then(|| fields.key_span("if").line) };
        let kind = match kind_name {
            "uses" => self.uses(fields, node, scope, &mut known)?,
            "set" => {
                known.fields = match &node.kind {
                    Content::Map(entries) => Some(entries.iter().map(|(k, _)| k.name.clone()).collect()),
                    _ => None,
                };
                Kind::Set { values: map_of_data(Some(node), scope, self.sink) }
            }
            "steps" => {
                let mut inner = scope.clone();
                let steps = self.sequence(node, &mut inner, depth + 1);
                Kind::Group { steps, outputs: self.block_outputs(fields, &inner, &mut known) }
            }
            "parallel" => self.parallel(node, scope, depth)?,
            "foreach" => self.foreach(fields, node, scope, depth)?,
            "repeat" => self.repeat(fields, node, scope, depth, &mut known)?,
            "switch" => self.switch(node, scope, depth)?,
            "wait" => self.wait(node, scope)?,
            "await" => self.awaiting(node, scope)?,
            "approve" => {
                known.fields = Some(["decision", "by", "at", "comment", "data"].map(str::to_owned).into());
                self.approve(node, &id, scope)?
            }
            "call" => self.call(node, scope)?,
            "fail" => self.fail(node, scope)?,
            _ => {
                let outputs = Fields::new(node, "`finish`", &["outputs"], self.sink)
                    .map(|f| map_of_data(f.get("outputs"), scope, self.sink));
                Kind::Finish { outputs: outputs.unwrap_or_default() }
            }
        };
        let signature = match &kind {
            Kind::Activity { name, .. } => self.catalog.get(name),
            _ => None,
        };
        let default_nodes: Vec<&Node> = match (&kind, &self.defaults) {
            (Kind::Activity { name, .. }, Some(d)) => d.get(name).into_iter().chain(d.get("uses")).collect(),
            _ => Vec::new(),
        };
        let default_fields: Vec<Fields<'_>> =
            default_nodes.into_iter().filter_map(|n| Fields::new(n, "`defaults`", DEFAULTS, self.sink)).collect();
        let default_refs: Vec<&Fields<'_>> = default_fields.iter().collect();
        let is_activity = signature.is_some();
        // Only an attempt can be too slow; everything else has one time limit, over the whole step.
        let whole = !matches!(kind, Kind::Activity { .. });
        if fields.has("retry") && !is_activity && !matches!(kind, Kind::Activity { .. }) {
            self.sink.error(
                "WF102",
                fields.key_span("retry"),
                &fields.node.path,
                format!("`retry` belongs to `uses`, not to `{kind_name}`"),
            );
        }
        let step = Step {
            condition,
            retry: retry(fields, &default_refs, matches!(kind, Kind::Activity { .. }), scope, signature, self.sink),
            timeouts: timeouts(fields, &default_refs, signature, whole, self.sink),
            catch: self.catch(fields, scope, depth),
            continue_on_error: fields.boolean("continue-on-error", false, self.sink),
            id,
            kind,
        };
        Some((step, known))
    }

    fn uses(&mut self, fields: &Fields<'_>, node: &Node, scope: &Scope, known: &mut Known) -> Option<Kind> {
        let name = fields.text("uses", self.sink)?;
        let with = map_of_data(fields.get("with"), scope, self.sink);
        let Some(signature) = self.catalog.get(&name) else {
            unknown_activity(&name, node, self.catalog, self.sink);
            return Some(Kind::Activity { name, with });
        };
        known.fields = fields_of(&signature.output_schema);
        let at = fields.get("with").unwrap_or(node);
        let given = fields.get("with").and_then(Fields::open);
        let escalations = match fields.node.at("/retry/escalate").map(|n| &n.kind) {
            Some(Content::List(items)) => items.as_slice(),
            _ => &[],
        };
        let prompts = escalations.iter().filter_map(|e| e.at("/with/prompt")).chain(fields.node.at("/with/prompt"));
        for prompt in prompts {
            if let Value::String(text) = prompt.value() {
                check::prompt_file(&text, prompt, self.files, self.sink);
            }
        }
        let properties = signature.input_schema.get("properties").and_then(Value::as_object);
        if let Some(properties) = properties {
            for argument in with.keys().filter(|k| !properties.contains_key(*k)) {
                let like =
                    suggestion(argument, properties.keys().map(String::as_str)).map(|s| format!("did you mean `{s}`?"));
                self.sink.add(
                    "WF801",
                    Severity::Error,
                    given.as_ref().map_or(at.span, |g| g.key_span(argument)),
                    &at.path,
                    format!("`{name}` takes no argument `{argument}`"),
                    like,
                );
            }
            for (argument, data) in &with {
                let (Data::Literal(value), Some(schema)) = (data, properties.get(argument)) else { continue };
                let mut schema = schema.clone();
                if let (Some(map), Some(defs)) = (schema.as_object_mut(), signature.input_schema.get("$defs")) {
                    map.insert("$defs".into(), defs.clone());
                }
                let at = given.as_ref().and_then(|g| g.get(argument)).unwrap_or(at);
                for problem in violations(&schema, value) {
                    self.sink.error(
                        "WF801",
                        at.span,
                        &at.path,
                        format!("the argument `{argument}` of `{name}`: {problem}"),
                    );
                }
            }
        }
        let required = signature.input_schema.get("required").and_then(Value::as_array).into_iter().flatten();
        for argument in required.filter_map(Value::as_str).filter(|a| !with.contains_key(*a)) {
            self.sink.error_help(
                "WF801",
                at.span,
                &at.path,
                format!("`{name}` needs the argument `{argument}`"),
                format!("add `{argument}:` under `with`"),
            );
        }
        Some(Kind::Activity { name, with })
    }

    fn block_outputs(
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

    fn parallel(&mut self, node: &Node, scope: &Scope, depth: usize) -> Option<Kind> {
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

    fn foreach(&mut self, step: &Fields<'_>, node: &Node, scope: &Scope, depth: usize) -> Option<Kind> {
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

    fn repeat(
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

    fn checked(&mut self, node: &Node, scope: &Scope) -> Option<Expr> {
        let site = bare(node, self.sink)?;
        scope.check(&site, self.sink);
        Some(site.expr)
    }

    fn switch(&mut self, node: &Node, scope: &Scope, depth: usize) -> Option<Kind> {
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

    fn wait(&mut self, node: &Node, scope: &Scope) -> Option<Kind> {
        let fields = Fields::new(node, "`wait`", &["for", "until", "max"], self.sink)?;
        let until = match (fields.get("for"), fields.get("until")) {
            (Some(_), None) => WaitUntil::For(self.bounded(&fields, "for")?),
            (None, Some(at)) => {
                let at = self.checked(at, scope)?;
                if !fields.has("max") {
                    self.sink.error_help("WF421", node.span, &node.path, "`wait.until` needs `max`", "add `max: 7d`");
                }
                WaitUntil::Instant { at, max_ms: self.bounded(&fields, "max").unwrap_or(WAIT_MAX_MS) }
            }
            _ => {
                let message = "`wait` needs `for`, or `until` with `max`";
                self.sink.error_help("WF421", node.span, &node.path, message, "for example `wait: { for: 5m }`");
                return None;
            }
        };
        Some(Kind::Wait { until })
    }

    /// A duration of at most 90 days.
    fn bounded(&mut self, fields: &Fields<'_>, name: &str) -> Option<u64> {
        let ms = fields.duration(name, self.sink)?;
        if ms > WAIT_MAX_MS {
            self.sink.error(
                "WF422",
                fields.key_span(name),
                &fields.node.path,
                format!("`{name}` must be a literal of at most 90d"),
            );
        }
        Some(ms)
    }

    fn human(
        &mut self,
        fields: &Fields<'_>,
        what: &str,
        scope: &Scope,
    ) -> (u64, Option<Template>, Vec<String>, Vec<u64>) {
        let node = fields.node;
        if !fields.has("timeout") {
            self.sink.error_help(
                "WF421",
                node.span,
                &node.path,
                format!("`{what}` needs `timeout`"),
                "add `timeout: 7d`",
            );
        }
        let timeout_ms = self.bounded(fields, "timeout").unwrap_or(self.timeout_ms);
        if timeout_ms > self.timeout_ms {
            self.sink.warn(
                "WF425",
                fields.key_span("timeout"),
                &node.path,
                "the wait is longer than the run's `timeout`",
            );
        }
        let show = fields.text("show", self.sink).map(|text| {
            let at = fields.get("show").map_or((node.span, node.path.as_str()), |n| (n.span, n.path.as_str()));
            scope.check_template(&text, at.0, at.1, self.sink);
            Template(text)
        });
        let to = fields.texts("to", self.sink);
        for (who, span) in to.iter().filter(|(who, _)| who != OWNER) {
            let message = format!("`{who}` is not asked yet: only the owner of the run can answer");
            let help = format!("write `to: [\"{OWNER}\"]`");
            self.sink.add("WF224", Severity::Warning, *span, &node.path, message, Some(help));
        }
        let to = to.into_iter().map(|(t, _)| t).collect();
        let mut remind_ms = Vec::new();
        if let Some(list) = fields.get("remind") {
            match &list.kind {
                Content::List(items) if items.len() <= 10 => {
                    remind_ms = items.iter().filter_map(|i| crate::read::duration(i, self.sink)).collect();
                    remind_ms.sort_unstable();
                }
                _ => self.sink.error("WF422", list.span, &list.path, "`remind` is a list of at most 10 durations"),
            }
        }
        (timeout_ms, show, to, remind_ms)
    }

    fn awaiting(&mut self, node: &Node, scope: &Scope) -> Option<Kind> {
        let known = ["signal", "timeout", "form", "show", "to", "where", "remind", "on-timeout", "default"];
        let fields = Fields::new(node, "`await`", &known, self.sink)?;
        let Some(signal) = fields.text("signal", self.sink) else {
            self.sink.error_help(
                "WF421",
                node.span,
                &node.path,
                "`await` needs `signal`",
                "add `signal: user_message`",
            );
            return None;
        };
        let (timeout_ms, show, to, remind_ms) = self.human(&fields, "await", scope);
        let on_timeout = fields.word(
            "on-timeout",
            &[("fail", OnTimeout::Fail), ("default", OnTimeout::Default)],
            OnTimeout::Fail,
            self.sink,
        );
        let form = fields.get("form").map(|n| (n.value(), n));
        let form_usable = form.as_ref().is_none_or(|(form, at)| check::schema(form, at, "`form`", self.sink));
        let form = form.map(|(form, _)| form);
        let mut sites = Vec::new();
        let default = fields.get("default").map(|n| data(n, &mut sites, self.sink));
        sites.iter().for_each(|site| scope.check(site, self.sink));
        if on_timeout == OnTimeout::Default && default.is_none() {
            self.sink.error_help(
                "WF621",
                node.span,
                &node.path,
                "`on-timeout: default` needs `default`",
                "add the payload that stands for silence",
            );
        }
        if let (Some(form), Some(Data::Literal(value)), true) = (&form, &default, form_usable) {
            let problems = violations(form, value);
            if !problems.is_empty() {
                self.sink.error(
                    "WF621",
                    fields.key_span("default"),
                    &node.path,
                    format!("`default` does not satisfy `form`: {}", problems.join("; ")),
                );
            }
        }
        let mut inner = scope.clone();
        inner.signal = true;
        let filter = fields.get("where").and_then(|n| self.checked(n, &inner));
        Some(Kind::Await(Box::new(Await {
            signal,
            timeout_ms,
            form,
            show,
            to,
            filter,
            remind_ms,
            on_timeout,
            default,
            approval: None,
        })))
    }

    fn approve(&mut self, node: &Node, id: &str, scope: &Scope) -> Option<Kind> {
        let known = ["to", "timeout", "show", "quorum", "remind", "on-timeout", "on-reject"];
        let fields = Fields::new(node, "`approve`", &known, self.sink)?;
        let (timeout_ms, show, to, remind_ms) = self.human(&fields, "approve", scope);
        let words = [("fail", OnTimeout::Fail), ("approve", OnTimeout::Approve), ("reject", OnTimeout::Reject)];
        let on_timeout = fields.word("on-timeout", &words, OnTimeout::Fail, self.sink);
        if on_timeout == OnTimeout::Approve {
            self.sink.warn("WF622", fields.key_span("on-timeout"), &node.path, "silence counts as approval");
        }
        let approval = Approval {
            quorum: fields.integer("quorum", 1..=100, self.sink).unwrap_or(1),
            fail_on_reject: fields.word("on-reject", &[("fail", true), ("continue", false)], true, self.sink),
        };
        Some(Kind::Await(Box::new(Await {
            signal: id.to_owned(),
            timeout_ms,
            form: None,
            show,
            to,
            filter: None,
            remind_ms,
            on_timeout,
            default: None,
            approval: Some(approval),
        })))
    }

    fn call(&mut self, node: &Node, scope: &Scope) -> Option<Kind> {
        let fields = Fields::new(node, "`call`", &["workflow", "with", "on-cancel"], self.sink)?;
        if !fields.has("workflow") {
            let help = "for example `call: { workflow: other@3 }`";
            self.sink.error_help("WF421", node.span, &node.path, "`call` needs `workflow`", help);
        }
        let text = fields.text("workflow", self.sink)?;
        let (workflow, version) = text.split_once('@').unwrap_or((&text, "latest"));
        let version = match version {
            "latest" => {
                let span = fields.get("workflow").map_or(node.span, |n| n.span);
                self.sink.add(
                    "WF805",
                    Severity::Info,
                    span,
                    &node.path,
                    "`@latest` is resolved and pinned when the run starts",
                    None,
                );
                CallVersion::Latest
            }
            v => match (v.parse::<u32>(), v.strip_prefix("sha256:").map(str::parse)) {
                (Ok(n), _) if n > 0 => CallVersion::Number(n),
                (_, Some(Ok(hash))) => CallVersion::Hash(hash),
                _ => {
                    self.sink.error(
                        "WF802",
                        node.span,
                        &node.path,
                        format!("`{v}` is no version: a number, `latest` or `sha256:<hex>`"),
                    );
                    CallVersion::Latest
                }
            },
        };
        if workflow == self.name {
            let span = fields.get("workflow").map_or(node.span, |n| n.span);
            let message = format!("`{workflow}` calls itself: nothing bounds how often");
            self.sink.error("WF403", span, &node.path, message);
        }
        Some(Kind::Call {
            workflow: workflow.to_owned(),
            version,
            with: map_of_data(fields.get("with"), scope, self.sink),
            on_cancel: fields.word(
                "on-cancel",
                &[("propagate", OnCancel::Propagate), ("detach", OnCancel::Detach)],
                OnCancel::Propagate,
                self.sink,
            ),
        })
    }

    fn fail(&mut self, node: &Node, scope: &Scope) -> Option<Kind> {
        let fields = Fields::new(node, "`fail`", &["type", "message"], self.sink)?;
        let code = fields.text("type", self.sink).unwrap_or_default();
        if !code.starts_with("user.") || code.len() <= 5 {
            self.sink.error_help(
                "WF106",
                node.span,
                &node.path,
                "`fail.type` must start with `user.`",
                "for example `fail: { type: user.no_tests, message: there are no tests }`",
            );
        }
        let mut sites = Vec::new();
        let message = fields.get("message").map(|n| data(n, &mut sites, self.sink));
        sites.iter().for_each(|site| scope.check(site, self.sink));
        Some(Kind::Fail { code, message })
    }

    fn catch(&mut self, fields: &Fields<'_>, scope: &Scope, depth: usize) -> Vec<Catch> {
        let Some(node) = fields.get("catch") else { return Vec::new() };
        let Content::List(items) = &node.kind else {
            self.sink.error(
                "WF106",
                node.span,
                &node.path,
                format!("expected a list of handlers, found {}", node.type_name()),
            );
            return Vec::new();
        };
        let mut out = Vec::new();
        for item in items {
            let Some(handler) = Fields::new(item, "a handler", &["on", "if", "steps"], self.sink) else { continue };
            let on: Vec<String> = handler.texts("on", self.sink).into_iter().map(|(p, _)| p).collect();
            if on.is_empty() {
                self.sink.error_help(
                    "WF421",
                    item.span,
                    &item.path,
                    "a handler needs `on`",
                    "the error types it takes, for example `on: [\"user.*\"]`",
                );
            }
            if on.iter().any(|p| p == "*") {
                self.sink.warn(
                    "WF504",
                    item.span,
                    &item.path,
                    "`*` hides `expr.*`, mistakes of this document; list what you expect",
                );
            }
            let mut inner = scope.clone();
            inner.error = true;
            let condition = handler.get("if").and_then(|n| self.checked(n, &inner));
            let Some(body) = handler.get("steps") else {
                self.sink.error("WF421", item.span, &item.path, "a handler needs `steps`");
                continue;
            };
            out.push(Catch { on, condition, steps: self.sequence(body, &mut inner, depth + 1) });
        }
        out
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
                Kind::Await(_) | Kind::Call { .. } | Kind::Finish { .. } => Some(step.id.as_str()),
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
                format!("`finally` may not contain human waits, `call` or `finish` (step `{id}`)"),
            );
        }
        if steps.len() > 20 {
            self.sink.error("WF210", node.span, &node.path, "`finally` has at most 20 steps");
        }
    }
}

fn exhausted(fields: &Fields<'_>, sink: &mut Sink) -> Exhausted {
    fields.word("exhausted", &[("fail", Exhausted::Fail), ("continue", Exhausted::Continue)], Exhausted::Fail, sink)
}

fn id_of(node: &Node) -> Option<String> {
    let Content::Map(entries) = &node.kind else { return None };
    let (_, id) = entries.iter().find(|(k, _)| k.name == "id")?;
    match id.value() {
        Value::String(text) => Some(text),
        other => Some(other.to_string()),
    }
}

/// Wraps each redo's range into a repeat, inner ranges first.
fn fold_redos(steps: Vec<Step>, positions: &[usize], mut redos: Vec<Redo>) -> Vec<Step> {
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
