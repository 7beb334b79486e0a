//! Which names an expression may use at its place. Visibility is lexical: a step may read steps that are earlier in its
//! own block or in a block around it.

use crate::{
    diagnostic::{Severity, Sink, Span, suggestion},
    read::Site,
};
use loopwright_engine::definition::{Template, expr, template};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

/// What is known about a step that may be read.
#[derive(Clone, Debug, Default)]
pub(crate) struct Known {
    /// Fields of its output, where its contract lists them all.
    pub(crate) fields: Option<BTreeSet<String>>,
    /// It may be skipped: its `if` stands in that line.
    pub(crate) conditional: Option<u32>,
}

/// Names at one place.
#[derive(Clone, Debug, Default)]
pub(crate) struct Scope {
    pub(crate) inputs: BTreeSet<String>,
    pub(crate) steps: BTreeMap<String, Known>,
    /// Ids of the whole document, for better messages.
    pub(crate) all_steps: BTreeSet<String>,
    pub(crate) item: bool,
    pub(crate) round: bool,
    pub(crate) signal: bool,
    pub(crate) error: bool,
    pub(crate) event: bool,
    /// Reading this step needs no guard here (its own `redo.if`).
    pub(crate) guarded: Option<String>,
    /// Evaluated whenever somebody asks: no step need have ended, or begun.
    pub(crate) any_time: bool,
}

const ROOTS: &[&str] = &["inputs", "env", "steps", "item", "index", "round", "signal", "error", "event", "run"];
const STEP_FIELDS: &[&str] = &[
    "status",
    "reason",
    "output",
    "error",
    "attempts",
    "rounds",
    "started_at",
    "ended_at",
    "by",
    "at",
    "timed_out",
    "exhausted",
];
/// Functions of CEL itself; our own are in the engine's list.
const CEL_FUNCTIONS: &[&str] = &[
    "size",
    "contains",
    "startsWith",
    "endsWith",
    "matches",
    "int",
    "uint",
    "double",
    "string",
    "bool",
    "bytes",
    "type",
    "dyn",
    "has",
    "all",
    "exists",
    "exists_one",
    "map",
    "filter",
    "optMap",
    "hasValue",
    "value",
    "orValue",
];

impl Scope {
    /// Checks an expression: syntax, names, fields.
    pub(crate) fn check(&self, site: &Site, sink: &mut Sink) {
        match expr::check(&site.expr) {
            Ok(found) => {
                for function in &found.functions {
                    if !CEL_FUNCTIONS.contains(&function.as_str()) && !expr::FUNCTIONS.contains(&function.as_str()) {
                        let known = CEL_FUNCTIONS.iter().chain(expr::FUNCTIONS).copied();
                        let help = suggestion(function, known).map(|s| format!("did you mean `{s}`?"));
                        sink.add(
                            "WF304",
                            Severity::Error,
                            site.span,
                            &site.path,
                            format!("unknown function `{function}`"),
                            help,
                        );
                    }
                }
                for path in &found.variables {
                    self.name(path, &site.expr.0, site.span, &site.path, sink);
                }
            }
            Err(error) => {
                let code = if error.message.contains("longer than")
                    || error.message.contains("nested")
                    || error.message.contains("larger")
                {
                    "WF310"
                } else {
                    "WF309"
                };
                let mut span = site.span;
                if let (Some(offset), 1) = (site.offset, error.line) {
                    span.column += offset + error.column - 1;
                    span.end_column = span.end_column.max(span.column + 1);
                }
                sink.error(code, span, &site.path, format!("expression: {}", error.message));
            }
        }
    }

    /// Checks a template.
    pub(crate) fn check_template(&self, text: &str, span: Span, at: &str, sink: &mut Sink) {
        if text.contains("${{") {
            sink.error_help("WF111", span, at, "`${{ ... }}` in a template field", "use `{{...}}`");
            return;
        }
        match template::check(&Template(text.to_owned())) {
            Ok(paths) => {
                for path in &paths {
                    self.name(path, text, span, at, sink);
                }
            }
            Err(error) => {
                let (line, column) = (error.line, error.column);
                let message = format!("template: {} (line {line}, column {column} of the template)", error.message);
                sink.error("WF311", span, at, message);
            }
        }
    }

    fn name(&self, path: &[String], text: &str, span: Span, at: &str, sink: &mut Sink) {
        let Some(root) = path.first().map(String::as_str) else { return };
        let available = match root {
            "inputs" => {
                if let Some(name) = path.get(1)
                    && !self.inputs.contains(name)
                {
                    let list: Vec<&str> = self.inputs.iter().map(String::as_str).collect();
                    let help = suggestion(name, list.iter().copied())
                        .map_or_else(|| format!("declared: {}", list.join(", ")), |s| format!("did you mean `{s}`?"));
                    sink.error_help("WF302", span, at, format!("no input `{name}`"), help);
                }
                true
            }
            "steps" => {
                self.step(path, text, span, at, sink);
                true
            }
            "env" | "run" => true,
            "item" | "index" => self.item,
            "round" => self.round,
            "signal" => self.signal,
            "error" => self.error,
            "event" => self.event,
            other => {
                let help = suggestion(other, ROOTS.iter().copied()).map(|s| format!("did you mean `{s}`?"));
                sink.add("WF304", Severity::Error, span, at, format!("unknown name `{other}`"), help);
                true
            }
        };
        if !available {
            let help = match root {
                "item" | "index" => "it exists inside `foreach`",
                "round" => "it exists inside `repeat` and in the range of a `redo`",
                "signal" => "it exists in `await.where` and `await.reply`",
                "error" => "it exists in `catch`",
                _ => "it exists in triggers",
            };
            sink.error_help("WF305", span, at, format!("`{root}` is not available here"), help);
        }
    }

    fn step(&self, path: &[String], text: &str, span: Span, at: &str, sink: &mut Sink) {
        let Some(id) = path.get(1) else { return };
        let Some(known) = self.steps.get(id) else {
            let (message, help) = if self.all_steps.contains(id) {
                (format!("step `{id}` is not visible here"), "a step can read earlier steps of its own block and of the blocks around it; use the block's `outputs`".to_owned())
            } else {
                let like = suggestion(id, self.steps.keys().map(String::as_str));
                (
                    format!("there is no step `{id}`"),
                    like.map_or_else(|| "steps are named by their `id`".to_owned(), |s| format!("did you mean `{s}`?")),
                )
            };
            sink.error_help("WF301", span, at, message, help);
            return;
        };
        if let Some(field) = path.get(2)
            && !STEP_FIELDS.contains(&field.as_str())
        {
            let help = suggestion(field, STEP_FIELDS.iter().copied())
                .map_or_else(|| format!("there are {}", STEP_FIELDS.join(", ")), |s| format!("did you mean `{s}`?"));
            sink.error_help("WF303", span, at, format!("a step has no field `{field}`"), help);
        }
        if let (Some("output"), Some(name), Some(fields)) =
            (path.get(2).map(String::as_str), path.get(3), &known.fields)
            && !fields.contains(name)
        {
            let list: Vec<&str> = fields.iter().map(String::as_str).collect();
            let help = suggestion(name, list.iter().copied())
                .map_or_else(|| format!("it has {}", list.join(", ")), |s| format!("did you mean `{s}`?"));
            sink.error_help("WF303", span, at, format!("no field `{name}` in the output of `{id}`"), help);
        }
        let guarded = text.contains("has(") || text.contains("default(");
        if self.any_time && !guarded {
            let help = format!("guard with `has(steps.{id})` or `default(…)`");
            let message = format!("`{id}` may not have begun, or ended, when the query is asked");
            sink.add("WF306", Severity::Warning, span, at, message, Some(help));
            return;
        }
        if let Some(line) = known.conditional
            && path.get(2).is_some_and(|f| f == "output")
            && self.guarded.as_ref() != Some(id)
            && !text.contains(&format!("steps.{id}.status"))
            && !guarded
        {
            let help = format!("guard with `steps.{id}.status == 'succeeded'` or `default(…)`");
            sink.add(
                "WF306",
                Severity::Warning,
                span,
                at,
                format!("`{id}` can be skipped (its `if` is in line {line})"),
                Some(help),
            );
        }
    }
}

/// The fields of a JSON Schema of an object, if it lists them all.
pub(crate) fn fields_of(schema: &Value) -> Option<BTreeSet<String>> {
    if schema.get("additionalProperties").is_some_and(|a| a != &Value::Bool(false)) {
        return None;
    }
    let properties = schema.get("properties")?.as_object()?;
    Some(properties.keys().cloned().collect())
}
