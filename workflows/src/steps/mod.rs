//! Steps: one kind each, lowered to the engine's instruction set. `redo` becomes a repeat around its range.

mod blocks;
mod redo;
mod waits;

use self::redo::{Redo, fold_redos};
use crate::{
    check,
    diagnostic::{Severity, Sink, Span, suggestion},
    document::{Content, Node},
    lower::{DEFAULTS, map_of_data, retry, timeouts, unknown_activity},
    read::{Fields, bare, data},
    scope::{Known, Scope, fields_of},
};
use loopwright_engine::{
    definition::{Bundle, CallVersion, Catch, Data, Expr, Kind, ParentClose, Step, inputs::violations},
    signature::Catalog,
};
use serde_json::Value;
use std::collections::BTreeMap;

const KINDS: &[&str] = &[
    "uses",
    "set",
    "steps",
    "parallel",
    "foreach",
    "repeat",
    "switch",
    "wait",
    "await",
    "approve",
    "call",
    "fail",
    "finish",
    "continue-as-new",
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
const STEPS_MAX: usize = 200;
const NESTING_MAX: usize = 8;

/// Whether nothing after such a step is reached.
fn leaves_block(kind: &Kind) -> bool {
    matches!(kind, Kind::Fail { .. } | Kind::Finish { .. } | Kind::ContinueAsNew { .. })
}

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
                ended |= step.condition.is_none() && leaves_block(&step.kind);
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
            "continue-as-new" => self.continue_as_new(node, scope)?,
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

    fn checked(&mut self, node: &Node, scope: &Scope) -> Option<Expr> {
        let site = bare(node, self.sink)?;
        scope.check(&site, self.sink);
        Some(site.expr)
    }

    fn call(&mut self, node: &Node, scope: &Scope) -> Option<Kind> {
        let fields = Fields::new(node, "`call`", &["workflow", "with", "on-cancel", "parent-close"], self.sink)?;
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
        if let (true, Some(old)) = (fields.has("parent-close"), fields.get("on-cancel")) {
            let message = "`on-cancel` is the old word for `parent-close`: one of them";
            self.sink.error_help("WF102", fields.key_span("on-cancel"), &old.path, message, "remove `on-cancel`");
        }
        let words = [("propagate", ParentClose::Cancel), ("detach", ParentClose::Abandon)];
        let old = fields.word("on-cancel", &words, ParentClose::Cancel, self.sink);
        let words =
            [("cancel", ParentClose::Cancel), ("terminate", ParentClose::Terminate), ("abandon", ParentClose::Abandon)];
        let parent_close = fields.word("parent-close", &words, old, self.sink);
        Some(Kind::Call {
            workflow: workflow.to_owned(),
            version,
            with: map_of_data(fields.get("with"), scope, self.sink),
            parent_close,
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

    fn continue_as_new(&mut self, node: &Node, scope: &Scope) -> Option<Kind> {
        let fields = Fields::new(node, "`continue-as-new`", &["with", "version"], self.sink)?;
        let with = map_of_data(fields.get("with"), scope, self.sink);
        let current = fields.word("version", &[("same", false), ("current", true)], false, self.sink);
        // What another version takes is not known here.
        if let (false, Some(given)) = (current, fields.get("with").and_then(Fields::open)) {
            for name in with.keys().filter(|name| !scope.inputs.contains(*name)) {
                let at = given.get(name).unwrap_or(node);
                self.sink.error("WF302", given.key_span(name), &at.path, format!("there is no input `{name}`"));
            }
        }
        Some(Kind::ContinueAsNew { with, current })
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
}

fn id_of(node: &Node) -> Option<String> {
    let Content::Map(entries) = &node.kind else { return None };
    let (_, id) = entries.iter().find(|(k, _)| k.name == "id")?;
    match id.value() {
        Value::String(text) => Some(text),
        other => Some(other.to_string()),
    }
}
