//! `on`: what starts runs besides people. `cron` becomes what the engine's schedules take; `event` is kept for later.

use crate::{
    diagnostic::{Severity, Sink, Span},
    document::{Content, Node},
    read::Fields,
};
use loopwright_engine::{
    definition::{Definition, inputs::prepare},
    schedule::{
        Overlap, Spec, When,
        cron::{Cron, parse_zone},
    },
};
use serde_json::{Map, Value, json};

/// Most `cron` triggers of a document.
const CRONS_MAX: usize = 16;
/// The overlap policies by the words of the language.
const OVERLAPS: &[(&str, Overlap)] = &[
    ("skip", Overlap::Skip),
    ("queue-one", Overlap::BufferOne),
    ("queue", Overlap::BufferAll),
    ("cancel-running", Overlap::CancelOther),
    ("terminate-running", Overlap::TerminateOther),
    ("allow", Overlap::AllowAll),
];
const FIELDS: &[&str] = &["schedule", "timezone", "overlap", "catchup", "jitter", "inputs"];

/// The value of `on` as it is kept in the definition's extras, and the places of its triggers' inputs.
pub(crate) struct Triggers {
    pub(crate) on: Value,
    crons: Vec<(Spec, Span, String)>,
}

/// Reads `on`; `None` if it holds nothing but `manual`.
pub(crate) fn on(node: &Node, workflow: &str, sink: &mut Sink) -> Option<Triggers> {
    let on = Fields::new(node, "`on`", &["manual", "cron", "event"], sink)?;
    if on.has("event") {
        let message = "nothing starts a run by `event` yet; it is kept for a later version";
        let help = "start runs by `cron`, with `loopwright run`, the REST API or the bot";
        sink.add("WF224", Severity::Warning, on.key_span("event"), &node.path, message, Some(help.to_owned()));
    }
    let mut kept = match node.value() {
        Value::Object(kept) => kept,
        _ => Map::new(),
    };
    let mut crons = Vec::new();
    if let Some(list) = on.get("cron") {
        let Content::List(items) = &list.kind else {
            let message = format!("expected a list for `cron`, found {}", list.type_name());
            let help = "for example `cron: [{ schedule: \"0 9 * * mon\", timezone: Europe/Berlin }]`";
            sink.error_help("WF106", list.span, &list.path, message, help);
            return None;
        };
        if items.is_empty() || items.len() > CRONS_MAX {
            let message = format!("{} triggers; from 1 to {CRONS_MAX}", items.len());
            sink.error_help("WF422", list.span, &list.path, message, "leave `cron` out, or deploy a second workflow");
        }
        crons.extend(items.iter().filter_map(|item| cron(item, workflow, sink)));
        kept.insert("cron".into(), crons.iter().map(|(spec, ..)| json!(spec)).collect());
    }
    (kept.contains_key("cron") || kept.contains_key("event")).then_some(Triggers { on: Value::Object(kept), crons })
}

fn cron(item: &Node, workflow: &str, sink: &mut Sink) -> Option<(Spec, Span, String)> {
    let fields = Fields::new(item, "a `cron` trigger", FIELDS, sink)?;
    let Some(schedule) = fields.get("schedule") else {
        let help = "five fields: minute hour day month weekday";
        sink.error_help("WF106", item.span, &item.path, "`schedule` is required", help);
        return None;
    };
    let expression = fields.text("schedule", sink)?;
    if let Err(error) = Cron::parse(&expression, "UTC") {
        let message = format!("cron expression `{expression}`: at its column {}: {}", error.column, error.message);
        sink.error_help("WF901", schedule.span, &schedule.path, message, error.help);
    }
    let timezone = match fields.get("timezone") {
        Some(zone) => {
            let name = fields.text("timezone", sink)?;
            if let Err(error) = parse_zone(&name) {
                sink.error_help("WF903", zone.span, &zone.path, error.message, error.help);
            }
            name
        }
        None => {
            let (message, help) =
                ("no time zone: the hours are those of UTC", "write `timezone: UTC` if that is meant");
            sink.add("WF902", Severity::Warning, schedule.span, &schedule.path, message, Some(help.to_owned()));
            "UTC".to_owned()
        }
    };
    let mut spec = Spec {
        overlap: fields.word("overlap", OVERLAPS, Overlap::Skip, sink),
        catchup_ms: fields.duration("catchup", sink).unwrap_or(0),
        jitter_ms: fields.duration("jitter", sink).unwrap_or(0),
        ..Spec::new(workflow, When::Cron { expression: "* * * * *".into(), timezone: "UTC".into() })
    };
    // The calendar has its own findings.
    for violation in spec.violations() {
        sink.error("WF422", item.span, &item.path, violation);
    }
    spec.when = When::Cron { expression, timezone };
    let (mut span, mut path) = (item.span, item.path.clone());
    if let Some(inputs) = fields.get("inputs") {
        (span, path) = (inputs.span, inputs.path.clone());
        spec.inputs = inputs.value();
        if spec.inputs.to_string().contains("${{") {
            let message = "a `cron` trigger has nothing to read from: its inputs are plain values";
            sink.error_help("WF305", span, &path, message, "compute it in a step, or give the input a default");
            return None;
        }
    }
    Some((spec, span, path))
}

impl Triggers {
    /// Whether the workflow takes what its triggers give it.
    pub(crate) fn check_inputs(&self, definition: &Definition, sink: &mut Sink) {
        for (spec, span, path) in &self.crons {
            if let Err(problems) = prepare(definition, &spec.inputs) {
                let message = format!("the workflow does not take these inputs: {}", problems.join("; "));
                sink.error("WF905", *span, path, message);
            }
        }
    }
}

/// The schedules that a definition asks for by `on: cron`, in its order. Whose runs they are is for whoever deploys it to say.
#[must_use]
pub fn schedules(definition: &Definition) -> Vec<Spec> {
    let crons = definition.extras["on"]["cron"].as_array().into_iter().flatten();
    crons.filter_map(|spec| serde_json::from_value(spec.clone()).ok()).collect()
}
