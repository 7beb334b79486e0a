//! The document's top level, and the retry, timeout and trigger fields that steps share.

use crate::{
    bound, check,
    diagnostic::{Severity, Sink, Span, suggestion},
    document::{Content, Node},
    read::{Fields, data},
    scope::Scope,
    steps::Steps,
    trigger::{self, Triggers},
};
use loopwright_engine::{
    definition::{Bundle, Concurrency, Data, Definition, Escalate, FORMAT, Input, OnConflict, RetryPolicy, Timeouts},
    labels::{LABEL_VALUE_BYTES_MAX, LABELS_MAX, SEARCH_LABELS_MAX, is_label},
    signature::{Catalog, Signature},
};
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, BTreeSet};

const TOP: &[&str] = &[
    "dsl",
    "name",
    "title",
    "description",
    "labels",
    "on",
    "inputs",
    "env",
    "secrets",
    "models",
    "defaults",
    "concurrency",
    "runs-on",
    "timeout",
    "budget",
    "limits",
    "steps",
    "finally",
    "outputs",
    "queries",
];
/// Defaults and limits of the language, in milliseconds.
const RUN_TIMEOUT_MS: u64 = 7 * 86_400_000;
const RUN_TIMEOUT_MAX_MS: u64 = 90 * 86_400_000;
const EXECUTIONS: u32 = 10_000;
const EXECUTIONS_MAX: u32 = 100_000;
/// Largest limit of a concurrency group.
const CONCURRENCY_MAX: u32 = 1_000;
/// Largest budget of a run, in credits: in micro-credits it is far from the end of 64 bits.
const BUDGET_CREDITS_MAX: u32 = 1_000_000_000;
/// Queries of a workflow. As many as outputs.
const QUERIES_MAX: usize = 32;
/// Attempts of a `uses` step whose retry policy says nothing.
const USES_ATTEMPTS: u32 = 3;

/// What `defaults` may say about an activity.
pub(crate) const DEFAULTS: &[&str] = &["timeout", "retry", "budget"];

/// Patterns that error patterns may name; a contract's own codes are added.
const KNOWN_ERRORS: &[&str] = &[
    "transient.",
    "timeout.",
    "activity.",
    "run.",
    "model.",
    "budget.",
    "input.",
    "output.",
    "expr.",
    "template.",
    "limit.",
    "signal.",
    "approval.",
    "join.",
    "call.",
    "user.",
    "provider.",
    "workspace.",
    "sandbox.",
    "readme.",
    "rehearsal.",
    "internal.",
];

pub(crate) fn document(root: &Node, files: &Bundle, catalog: &Catalog, sink: &mut Sink) -> Option<Definition> {
    let top = Fields::new(root, "the document", TOP, sink)?;
    for (key, hint) in [("dsl", "add `dsl: 1`"), ("name", "add `name: my-workflow`"), ("steps", "add `steps:`")] {
        if !top.has(key) {
            sink.error_help("WF106", root.span, "", format!("`{key}` is required"), hint);
        }
    }
    if top.get("dsl").is_some_and(|n| n.value() != json!(1)) {
        sink.error("WF106", top.key_span("dsl"), "/dsl", "`dsl` must be 1");
    }
    let name = top.text("name", sink).unwrap_or_default();
    if top.has("name") && !is_name(&name) {
        sink.error_help(
            "WF106",
            top.get("name")?.span,
            "/name",
            format!("`{name}` is no workflow name"),
            "lower-case letters, digits and hyphens, at most 63, starting with a letter",
        );
    }
    top.refuse_later("secrets", sink);
    let inputs = inputs(&top, sink);
    let mut scope = Scope { inputs: inputs.keys().cloned().collect(), all_steps: all_ids(&top), ..Scope::default() };
    let env = map_of_data(top.get("env"), &scope, sink);
    let timeout_ms = timeout(&top, sink);
    let concurrency = concurrency(&top, &scope, sink);
    let runs_on = runs_on(&top, sink);
    let triggers = top.get("on").and_then(|node| trigger::on(node, &name, sink));
    let extras = extras(&top, triggers.as_ref(), sink);
    let budget = budget(&top, sink);
    let limit = top
        .get("limits")
        .and_then(|n| Fields::new(n, "`limits`", &["executions"], sink))
        .and_then(|f| f.integer("executions", 1..=EXECUTIONS_MAX, sink))
        .unwrap_or(EXECUTIONS);
    let defaults = top.get("defaults").and_then(|n| {
        let known: Vec<&str> = ["uses", "run"].into_iter().chain(catalog.iter().map(|s| s.name.as_str())).collect();
        Fields::new(n, "`defaults`", &known, sink)
    });
    for entry in defaults.iter().flat_map(Fields::values) {
        if let Some(fields) = Fields::new(entry, "`defaults`", DEFAULTS, sink) {
            fields.refuse_later("budget", sink);
        }
    }
    let mut steps =
        Steps { name: name.clone(), files, catalog, defaults, seen: BTreeMap::new(), count: 0, timeout_ms, sink };
    let body = top.get("steps").map(|n| steps.sequence(n, &mut scope, 1)).unwrap_or_default();
    let after = scope.clone();
    let finally = top.get("finally").map(|n| {
        let mut scope = scope.clone();
        let lowered = steps.sequence(n, &mut scope, 1);
        steps.check_finally(n, &lowered);
        lowered
    });
    let sink = steps.sink;
    let outputs = map_of_data(top.get("outputs"), &after, sink);
    let queries = queries(&top, after, sink);
    let mut definition = Definition {
        format: FORMAT,
        name,
        inputs,
        env,
        timeout_ms,
        budget,
        concurrency,
        runs_on,
        executions_max: limit,
        steps: body,
        finally: finally.unwrap_or_default(),
        outputs,
        queries,
        extras,
    };
    definition.format = definition.lowest_format();
    if let Some(triggers) = triggers {
        triggers.check_inputs(&definition, sink);
    }
    bound::check(&definition, limit, top.key_span("steps"), sink);
    Some(definition)
}

/// What may be asked of a run at any time: a step that is read may not have begun.
fn queries(top: &Fields<'_>, mut scope: Scope, sink: &mut Sink) -> BTreeMap<String, Data> {
    let Some(node) = top.get("queries") else { return BTreeMap::new() };
    scope.any_time = true;
    let queries = map_of_data(Some(node), &scope, sink);
    if queries.len() > QUERIES_MAX {
        sink.error("WF422", node.span, &node.path, format!("at most {QUERIES_MAX} queries"));
    }
    if let Content::Map(entries) = &node.kind {
        for (key, value) in entries.iter().filter(|(key, _)| !is_id(&key.name)) {
            let message = format!("`{}` is no name of a query", key.name);
            let help = "lower-case letters, digits and underscores, at most 40, starting with a letter";
            sink.error_help("WF203", value.span, &value.path, message, help);
        }
    }
    queries
}

fn is_id(text: &str) -> bool {
    text.len() <= 40
        && text.starts_with(|c: char| c.is_ascii_lowercase())
        && text.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
}

fn is_name(text: &str) -> bool {
    text.len() <= 63
        && text.starts_with(|c: char| c.is_ascii_lowercase())
        && text.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-')
}

/// How many runs of a group may be under way. The group is evaluated before the run begins, so it sees its inputs alone.
fn concurrency(top: &Fields<'_>, scope: &Scope, sink: &mut Sink) -> Option<Concurrency> {
    let node = top.get("concurrency")?;
    let fields = Fields::new(node, "`concurrency`", &["group", "limit", "on-conflict"], sink)?;
    for key in ["group", "limit"] {
        if !fields.has(key) {
            let help = "for example `{ group: \"${{ inputs.project_id }}\", limit: 1 }`";
            sink.error_help("WF106", node.span, &node.path, format!("`concurrency` needs `{key}`"), help);
        }
    }
    let limit = fields.integer("limit", 1..=CONCURRENCY_MAX, sink).unwrap_or(1);
    let words = [OnConflict::Queue, OnConflict::CancelNew, OnConflict::CancelRunning, OnConflict::Fail]
        .map(|policy| (policy.as_str(), policy));
    let on_conflict = fields.word("on-conflict", &words, OnConflict::Queue, sink);
    let group = fields.get("group")?;
    let mut sites = Vec::new();
    let lowered = data(group, &mut sites, sink);
    sites.iter().for_each(|site| scope.check(site, sink));
    if matches!(lowered, Data::List(_) | Data::Map(_) | Data::Literal(Value::Array(_) | Value::Object(_) | Value::Null))
    {
        sink.error("WF106", group.span, &group.path, "a group is a text");
    }
    Some(Concurrency { group: lowered, limit, on_conflict })
}

/// Labels that a worker must have, sorted, each once.
fn runs_on(top: &Fields<'_>, sink: &mut Sink) -> Vec<String> {
    let Some(node) = top.get("runs-on") else { return Vec::new() };
    let labels = match &node.kind {
        Content::Scalar { .. } => top.text("runs-on", sink).map(|label| (label, node.span)).into_iter().collect(),
        _ => top.texts("runs-on", sink),
    };
    for (label, span) in labels.iter().filter(|(label, _)| !is_label(label)) {
        let help = "lower-case letters, digits and hyphens, at most 63, starting with a letter; no expression";
        sink.error_help("WF106", *span, &node.path, format!("`{label}` is no label"), help);
    }
    let labels: BTreeSet<String> = labels.into_iter().map(|(label, _)| label).collect();
    let is_empty_list = matches!(&node.kind, Content::List(items) if items.is_empty());
    if is_empty_list || labels.len() > LABELS_MAX {
        sink.error("WF422", node.span, &node.path, format!("`runs-on` has 1 to {LABELS_MAX} labels"));
    }
    labels.into_iter().collect()
}

/// By which people find runs of the workflow: texts by names.
fn labels(top: &Fields<'_>, sink: &mut Sink) -> Option<Map<String, Value>> {
    let node = top.get("labels")?;
    let Content::Map(entries) = &node.kind else {
        let message = format!("expected a map for `labels`, found {}", node.type_name());
        sink.error_help("WF106", node.span, &node.path, message, "for example `labels: { team: core }`");
        return None;
    };
    if entries.len() > SEARCH_LABELS_MAX {
        sink.error("WF422", node.span, &node.path, format!("at most {SEARCH_LABELS_MAX} labels"));
    }
    let mut labels = Map::new();
    for (key, value) in entries {
        if !is_label(&key.name) {
            let help = "lower-case letters, digits and hyphens, at most 63, starting with a letter";
            sink.error_help("WF106", key.span, &value.path, format!("`{}` is no name of a label", key.name), help);
        }
        match value.value() {
            Value::String(text) if (1..=LABEL_VALUE_BYTES_MAX).contains(&text.len()) && !text.contains('\0') => {
                labels.insert(key.name.clone(), Value::String(text));
            }
            Value::String(_) => {
                let message = format!("a label is a text of 1 to {LABEL_VALUE_BYTES_MAX} bytes");
                sink.error("WF422", value.span, &value.path, message);
            }
            _ => {
                let message = format!("expected text for the label `{}`, found {}", key.name, value.type_name());
                sink.error_help("WF106", value.span, &value.path, message, "write it in quotes");
            }
        }
    }
    (!labels.is_empty()).then_some(labels)
}

/// What a run may cost. A budget that caps nothing would be believed, so it says how many credits.
fn budget(top: &Fields<'_>, sink: &mut Sink) -> Value {
    let Some(node) = top.get("budget") else { return Value::Null };
    if let Some(fields) = Fields::new(node, "`budget`", &["credits", "credits-per-item", "tokens"], sink) {
        fields.refuse_later("tokens", sink);
        if fields.has("credits-per-item") {
            fields.integer("credits-per-item", 1..=BUDGET_CREDITS_MAX, sink);
        }
        if fields.has("credits") {
            fields.integer("credits", 1..=BUDGET_CREDITS_MAX, sink);
        } else {
            sink.error_help("WF421", node.span, &node.path, "`budget` needs `credits`", "add `credits: 500`");
        }
    }
    node.value()
}

fn timeout(top: &Fields<'_>, sink: &mut Sink) -> u64 {
    let Some(ms) = top.duration("timeout", sink) else { return RUN_TIMEOUT_MS };
    if ms == 0 || ms > RUN_TIMEOUT_MAX_MS {
        let span = top.get("timeout").map_or_else(Span::default, |n| n.span);
        sink.error("WF422", span, "/timeout", "the run's `timeout` must be a literal in 1ms..90d");
    }
    ms
}

/// Every step id of the document, wherever it stands.
fn all_ids(top: &Fields<'_>) -> BTreeSet<String> {
    fn visit(node: &Node, found: &mut BTreeSet<String>) {
        match &node.kind {
            Content::Map(entries) => {
                for (key, value) in entries {
                    if let ("id", Value::String(id)) = (key.name.as_str(), value.value()) {
                        found.insert(id);
                    }
                    visit(value, found);
                }
            }
            Content::List(items) => items.iter().for_each(|item| visit(item, found)),
            Content::Scalar { .. } => {}
        }
    }
    let mut found = BTreeSet::new();
    for part in ["steps", "finally"] {
        if let Some(node) = top.get(part) {
            visit(node, &mut found);
        }
    }
    found
}

fn inputs(top: &Fields<'_>, sink: &mut Sink) -> BTreeMap<String, Input> {
    let Some(node) = top.get("inputs") else { return BTreeMap::new() };
    let Content::Map(entries) = &node.kind else {
        sink.error("WF106", node.span, &node.path, format!("expected a map for `inputs`, found {}", node.type_name()));
        return BTreeMap::new();
    };
    let mut out = BTreeMap::new();
    for (key, node) in entries {
        let (Value::Object(mut schema), Some(fields)) = (node.value(), Fields::open(node)) else {
            let message = format!("expected a map for the input `{}`, found {}", key.name, node.type_name());
            sink.error_help(
                "WF106",
                node.span,
                &node.path,
                message,
                "for example `idea: { type: string, required: true }`",
            );
            continue;
        };
        // A list is JSON Schema's own `required`, which would be taken for ours and lost.
        let listed = fields.get("required").filter(|n| matches!(n.kind, Content::List(_)));
        if let Some(list) = listed {
            let message = "here `required` says whether the input must be given: true or false";
            let help = "for the fields of an object write `schema: { type: object, required: [x] }`";
            sink.error_help("WF106", list.span, &list.path, message, help);
        }
        let required = listed.is_none() && fields.boolean("required", false, sink);
        schema.remove("required");
        let default = schema.remove("default");
        let schema = schema.remove("schema").unwrap_or(Value::Object(schema));
        let written = fields.get("schema").unwrap_or(node);
        let usable = check::schema(&schema, written, &format!("the input `{}`", key.name), sink);
        if let (Some(default), Some(at), true) = (&default, fields.get("default"), usable) {
            let problems = loopwright_engine::definition::inputs::violations(&schema, default);
            if !problems.is_empty() {
                let message = format!("the default of `{}` {}", key.name, problems.join("; "));
                sink.error("WF621", at.span, &at.path, message);
            }
        }
        out.insert(key.name.clone(), Input { schema, required, default });
    }
    out
}

/// Triggers, models and labels: kept for those who read them; the engine gives the labels to the runs, among their attributes.
fn extras(top: &Fields<'_>, triggers: Option<&Triggers>, sink: &mut Sink) -> Value {
    let mut extras = Map::new();
    if let Some(triggers) = triggers {
        extras.insert("on".into(), triggers.on.clone());
    }
    if let Some(node) = top.get("models") {
        check::models(node, sink);
        extras.insert("models".into(), node.value());
    }
    if let Some(labels) = labels(top, sink) {
        extras.insert("labels".into(), Value::Object(labels));
    }
    if extras.is_empty() { Value::Null } else { Value::Object(extras) }
}

/// A map of data fields, checked in `scope`.
pub(crate) fn map_of_data(node: Option<&Node>, scope: &Scope, sink: &mut Sink) -> BTreeMap<String, Data> {
    let Some(node) = node else { return BTreeMap::new() };
    let Content::Map(entries) = &node.kind else {
        sink.error("WF106", node.span, &node.path, format!("expected a map, found {}", node.type_name()));
        return BTreeMap::new();
    };
    let mut sites = Vec::new();
    let map = entries.iter().map(|(key, value)| (key.name.clone(), data(value, &mut sites, sink))).collect();
    sites.iter().for_each(|site| scope.check(site, sink));
    map
}

/// The retry policy of a step: its own, else the document's default for its activity or kind, else the language's.
pub(crate) fn retry(
    step: &Fields<'_>,
    defaults: &[&Fields<'_>],
    activity: bool,
    scope: &Scope,
    signature: Option<&Signature>,
    sink: &mut Sink,
) -> RetryPolicy {
    let node = step.get("retry").or_else(|| defaults.iter().find_map(|d| d.get("retry")));
    let base = RetryPolicy { attempts: if activity { USES_ATTEMPTS } else { 1 }, ..RetryPolicy::default() };
    let Some(node) = node else { return base };
    let known = ["attempts", "delay", "backoff", "max-delay", "jitter", "on", "not-on", "escalate"];
    let Some(fields) = Fields::new(node, "`retry`", &known, sink) else { return base };
    if !fields.has("attempts") {
        sink.error_help("WF421", node.span, &node.path, "`retry` needs `attempts`", "add `attempts: 3`");
    }
    let attempts = fields.integer("attempts", 1..=20, sink).unwrap_or(base.attempts);
    // A step's own `retry` replaces the default as a whole; what it leaves out is the language's default.
    let patterns = |name: &str, sink: &mut Sink| -> Vec<String> {
        let list = fields.texts(name, sink);
        for (pattern, span) in &list {
            let known = KNOWN_ERRORS.iter().any(|k| pattern.starts_with(k)) || pattern == "*";
            let declared = signature.is_some_and(|s| s.failure_codes.iter().any(|c| c == pattern));
            if !known && !declared {
                let families: Vec<String> = KNOWN_ERRORS.iter().map(|k| format!("{k}*")).collect();
                let like =
                    suggestion(pattern, families.iter().map(String::as_str)).map(|s| format!("did you mean `{s}`?"));
                let message = format!("error pattern `{pattern}` matches no known type");
                sink.add("WF505", Severity::Error, *span, &node.path, message, like);
            }
        }
        list.into_iter().map(|(p, _)| p).collect()
    };
    let on = if fields.has("on") { patterns("on", sink) } else { base.on.clone() };
    let not_on = patterns("not-on", sink);
    let mut escalate = Vec::new();
    if let Some(list) = fields.get("escalate") {
        let Content::List(items) = &list.kind else {
            sink.error("WF106", list.span, &list.path, "expected a list for `escalate`");
            return base;
        };
        for item in items {
            let Some(entry) = Fields::new(item, "`escalate`", &["from-attempt", "with"], sink) else { continue };
            let from_attempt = entry.integer("from-attempt", 2..=20, sink).unwrap_or(2);
            if from_attempt > attempts {
                sink.error(
                    "WF506",
                    item.span,
                    &item.path,
                    format!("`from-attempt: {from_attempt}` is above `attempts: {attempts}`"),
                );
            }
            escalate.push(Escalate { from_attempt, with: map_of_data(entry.get("with"), scope, sink) });
        }
    }
    RetryPolicy {
        attempts,
        delay_ms: fields.duration("delay", sink).unwrap_or(base.delay_ms),
        backoff: fields.float("backoff", 1.0..=10.0, sink).unwrap_or(base.backoff),
        max_delay_ms: fields.duration("max-delay", sink).unwrap_or(base.max_delay_ms),
        jitter: fields.float("jitter", 0.0..=1.0, sink).unwrap_or(base.jitter),
        on,
        not_on,
        escalate,
    }
}

/// The four timeouts of a step. A bare duration is `run` of an activity and, where the step as a `whole` is limited, `total`.
pub(crate) fn timeouts(
    step: &Fields<'_>,
    defaults: &[&Fields<'_>],
    signature: Option<&Signature>,
    whole: bool,
    sink: &mut Sink,
) -> Timeouts {
    let mut out = Timeouts::default();
    if let Some(signature) = signature {
        out.run_ms = signature.run_timeout_ms;
        out.heartbeat_ms = signature.heartbeat_timeout_ms;
    }
    let Some(node) = step.get("timeout").or_else(|| defaults.iter().find_map(|d| d.get("timeout"))) else { return out };
    if matches!(node.kind, Content::Scalar { .. }) {
        let ms = crate::read::duration(node, sink);
        if whole {
            out.total_ms = ms;
        } else if let Some(ms) = ms {
            out.run_ms = ms;
        }
        return out;
    }
    let Some(fields) = Fields::new(node, "`timeout`", &["run", "queue", "heartbeat", "total"], sink) else {
        return out;
    };
    out.run_ms = fields.duration("run", sink).unwrap_or(out.run_ms);
    out.queue_ms = fields.duration("queue", sink).unwrap_or(out.queue_ms);
    // Only activities that report can be silent.
    if signature.is_none_or(|s| s.heartbeat_timeout_ms.is_some()) || step.has("timeout") {
        out.heartbeat_ms = fields.duration("heartbeat", sink).or(out.heartbeat_ms);
    }
    out.total_ms = fields.duration("total", sink);
    out
}

/// An unknown activity, with what is like it.
pub(crate) fn unknown_activity(name: &str, node: &Node, catalog: &Catalog, sink: &mut Sink) {
    let names: Vec<&str> = catalog.iter().map(|s| s.name.as_str()).collect();
    let help = suggestion(name, names.iter().copied())
        .map_or_else(|| format!("there are {}", names.join(", ")), |s| format!("did you mean `{s}`?"));
    sink.add("WF801", Severity::Error, node.span, &node.path, format!("unknown activity `{name}`"), Some(help));
}
