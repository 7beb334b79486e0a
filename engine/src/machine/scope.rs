//! Which names an expression sees at a place of the tree, and the evaluation of data there.

use super::{
    DATA_BYTES_MAX, Illegal, Moment,
    state::{Below, FINALLY_PREFIX, Frame, Live, Node, RunState, split_segment},
};
use crate::{
    definition::{
        Data, Definition, Kind, Step, Template, expr,
        inputs::{DEPTH_MAX, is_too_deep},
        template,
    },
    event::StepStatus,
    failure::Failure,
};
use serde_json::{Map, Value, json};
use std::{cell::Cell, collections::BTreeMap};

/// One block on the way from the run's body to a place.
struct Layer<'a> {
    frame: &'a Frame,
    /// Number, maximum, outputs of the previous round.
    round: Option<(u32, u32, &'a Value)>,
    item: Option<(&'a Value, usize)>,
    error: Option<Value>,
}

/// The names visible inside a container, which is a path that ends with `/` (or is empty for the body).
pub(super) struct Place<'a> {
    state: &'a RunState,
    moment: &'a Moment<'a>,
    layers: Vec<Layer<'a>>,
    /// Overrides of the innermost scope: the candidate `signal`, the `item` whose key is computed, the `error` of a handler.
    pub(super) extra: Map<String, Value>,
    /// Bytes that data evaluated here may still have.
    room: Cell<usize>,
}

impl<'a> Place<'a> {
    /// The scope inside `container`.
    pub(super) fn inside(
        definition: &'a Definition,
        state: &'a RunState,
        moment: &'a Moment<'a>,
        container: &str,
    ) -> Result<Self, Illegal> {
        let missing = || Illegal(format!("no container `{container}`"));
        let (steps, frame, rest) = match container.strip_prefix(FINALLY_PREFIX) {
            Some(rest) => (&definition.finally, state.finally.as_ref().ok_or_else(missing)?, rest),
            None => (&definition.steps, &state.body, container),
        };
        let mut layers = vec![Layer { frame: &state.body, round: None, item: None, error: None }];
        if !std::ptr::eq(frame, &raw const state.body) {
            layers.push(Layer { frame, round: None, item: None, error: None });
        }
        let (mut steps, mut frame): (&[Step], &Frame) = (steps, frame);
        for segment in rest.split('/').filter(|s| !s.is_empty()) {
            let (id, below) = split_segment(segment);
            let step = steps.iter().find(|s| s.id == id).ok_or_else(missing)?;
            let live = frame.nodes.get(id).and_then(|n| n.live.as_ref()).ok_or_else(missing)?;
            let inner = live.frame(below).ok_or_else(missing)?;
            let mut layer = Layer { frame: inner, round: None, item: None, error: None };
            match (live, &step.kind) {
                (Live::Repeat { round, previous, .. }, Kind::Repeat { max_rounds, .. }) => {
                    layer.round = Some((*round, *max_rounds, previous));
                }
                (Live::Foreach { keys, items, .. }, _) => {
                    if let Below::Item(key) = below {
                        let index = keys.iter().position(|k| k == key).ok_or_else(missing)?;
                        layer.item = Some((&items[index], index));
                    }
                }
                (Live::Catch { failure, .. }, _) => layer.error = Some(error_value(failure)),
                _ => {}
            }
            layers.push(layer);
            frame = inner;
            steps = live_children(step, live, below).ok_or_else(missing)?;
        }
        Ok(Self { state, moment, layers, extra: Map::new(), room: Cell::new(DATA_BYTES_MAX) })
    }

    fn step(&self, id: &str) -> Option<Value> {
        self.layers.iter().rev().find_map(|layer| layer.frame.nodes.get(id)).map(node_value)
    }

    fn round(&self) -> Option<Value> {
        let mut outer = Value::Null;
        let mut seen = false;
        for (number, max, previous) in self.layers.iter().filter_map(|l| l.round) {
            outer = json!({ "number": number, "max": max, "previous": previous, "outer": outer });
            seen = true;
        }
        seen.then_some(outer)
    }

    /// Evaluates data.
    pub(super) fn resolve(&self, data: &Data) -> Result<Value, Failure> {
        match data {
            Data::Literal(value) => Ok(value.clone()),
            Data::Expr(e) => {
                let value = expr::evaluate(e, self)?;
                let bytes = serde_json::to_string(&value).map_or(usize::MAX, |t| t.len());
                let Some(left) = self.room.get().checked_sub(bytes) else {
                    let text = format!("the data of one step is more than {DATA_BYTES_MAX} bytes");
                    return Err(Failure::permanent("limit.size", text));
                };
                self.room.set(left);
                if is_too_deep(&value) {
                    let text = format!("the value is nested deeper than {DEPTH_MAX} levels");
                    return Err(Failure::permanent("limit.size", text));
                }
                Ok(value)
            }
            Data::Concat(parts) => {
                let mut text = String::new();
                for part in parts {
                    match self.resolve(part)? {
                        Value::String(s) => text.push_str(&s),
                        Value::Bool(b) => text.push_str(&b.to_string()),
                        Value::Number(n) => text.push_str(&n.to_string()),
                        other => {
                            return Err(Failure::permanent(
                                "expr.type",
                                format!(
                                    "only text, numbers and booleans can be joined to text, not {}",
                                    expr::type_name(&other)
                                ),
                            ));
                        }
                    }
                }
                Ok(Value::String(text))
            }
            Data::List(items) => items.iter().map(|d| self.resolve(d)).collect::<Result<_, _>>().map(Value::Array),
            Data::Map(map) => self.resolve_map(map).map(Value::Object),
            Data::Template(t) => self.render(t).map(Value::String),
        }
    }

    /// Evaluates a map of data.
    pub(super) fn resolve_map(&self, map: &BTreeMap<String, Data>) -> Result<Map<String, Value>, Failure> {
        map.iter().map(|(k, d)| Ok((k.clone(), self.resolve(d)?))).collect()
    }

    /// Renders a template.
    pub(super) fn render(&self, t: &Template) -> Result<String, Failure> {
        use crate::definition::expr::Scope;
        let paths = template::check(t).map_err(|e| Failure::permanent("template.syntax", e.message))?;
        let mut data = Map::new();
        for path in &paths {
            let Some(name) = path.first() else { continue };
            if data.contains_key(name) {
                continue;
            }
            let wanted: Vec<&[String]> = paths.iter().filter(|p| p[0] == *name).map(|p| &p[1..]).collect();
            if let Some(value) = self.root(name, &wanted) {
                data.insert(name.clone(), value);
            }
        }
        template::render(t, &Value::Object(data))
    }
}

impl expr::Scope for Place<'_> {
    fn root(&self, name: &str, wanted: &[&[String]]) -> Option<Value> {
        if let Some(value) = self.extra.get(name) {
            return Some(value.clone());
        }
        match name {
            "inputs" => Some(self.state.inputs.clone()),
            "env" => Some(Value::Object(self.state.env.iter().map(|(k, v)| (k.clone(), v.clone())).collect())),
            "steps" => {
                let whole = wanted.iter().any(|p| p.is_empty());
                let ids: Vec<&str> = if whole {
                    self.layers.iter().flat_map(|l| l.frame.nodes.keys()).map(String::as_str).collect()
                } else {
                    wanted.iter().map(|p| p[0].as_str()).collect()
                };
                let found = ids.into_iter().filter_map(|id| Some((id.to_owned(), self.step(id)?)));
                Some(Value::Object(found.collect()))
            }
            "item" => self.layers.iter().rev().find_map(|l| l.item).map(|(v, _)| v.clone()),
            "index" => self.layers.iter().rev().find_map(|l| l.item).map(|(_, i)| Value::from(i)),
            "round" => self.round(),
            "error" => self.layers.iter().rev().find_map(|l| l.error.clone()),
            "run" => Some(json!({
                "id": self.state.run_id,
                "workflow": self.moment.workflow,
                "started_at": self.state.started_at,
            })),
            _ => None,
        }
    }
}

/// `steps.ID` as expressions see it. Absent fields are absent: reading them is an error, never silently empty.
pub(super) fn node_value(node: &Node) -> Value {
    let mut out = Map::new();
    let status = node.status.map_or("running", status_name);
    out.insert("status".into(), status.into());
    if let Some(reason) = &node.reason {
        out.insert("reason".into(), reason.as_str().into());
    }
    if let Some(output) = &node.output {
        out.insert("output".into(), output.clone());
    }
    if let Some(failure) = &node.failure {
        out.insert("error".into(), error_value(failure));
    }
    out.insert("attempts".into(), node.attempts.into());
    out.insert("rounds".into(), node.rounds.into());
    if let Some(at) = node.started_at {
        out.insert("started_at".into(), json!(at));
    }
    if let Some(at) = node.ended_at {
        out.insert("ended_at".into(), json!(at));
    }
    if let Value::Object(extras) = &node.extras {
        out.extend(extras.clone());
    }
    Value::Object(out)
}

/// A failure as expressions see it.
pub(super) fn error_value(failure: &Failure) -> Value {
    json!({
        "type": failure.code,
        "message": failure.message,
        "path": failure.path,
        "data": failure.detail,
        "cause": failure.cause.as_deref().map(error_value),
    })
}

/// Names of step states, as everywhere outside.
pub(super) fn status_name(status: StepStatus) -> &'static str {
    match status {
        StepStatus::Succeeded => "succeeded",
        StepStatus::Failed => "failed",
        StepStatus::Recovered => "recovered",
        StepStatus::Skipped => "skipped",
        StepStatus::Cancelled => "cancelled",
    }
}

/// The steps of the definition that a path segment leads into, where the definition alone tells.
fn children<'a>(step: &'a Step, below: Below<'_>) -> Option<&'a [Step]> {
    match (&step.kind, below) {
        (Kind::Group { steps, .. }, Below::Block)
        | (Kind::Repeat { steps, .. }, Below::Round)
        | (Kind::Foreach { steps, .. }, Below::Item(_)) => Some(steps),
        (Kind::Parallel { branches, .. }, Below::Branch(name)) => {
            branches.iter().find(|b| b.name == name).map(|b| b.steps.as_slice())
        }
        _ => None,
    }
}

/// The step of the definition at a path.
pub(super) fn find_step<'a>(definition: &'a Definition, state: &RunState, path: &str) -> Result<&'a Step, Illegal> {
    let missing = || Illegal(format!("no step `{path}` in the definition"));
    let (mut steps, mut frame, rest): (&[Step], &Frame, &str) = match path.strip_prefix(FINALLY_PREFIX) {
        Some(rest) => (&definition.finally, state.finally.as_ref().ok_or_else(missing)?, rest),
        None => (&definition.steps, &state.body, path),
    };
    let mut segments = rest.split('/').peekable();
    loop {
        let (id, below) = split_segment(segments.next().ok_or_else(missing)?);
        let step = steps.iter().find(|s| s.id == id).ok_or_else(missing)?;
        if segments.peek().is_none() {
            return Ok(step);
        }
        let live = frame.nodes.get(id).and_then(|n| n.live.as_ref()).ok_or_else(missing)?;
        steps = live_children(step, live, below).ok_or_else(missing)?;
        frame = live.frame(below).ok_or_else(missing)?;
    }
}

/// The steps that a path segment leads into; the chosen case or handler is in the state.
pub(super) fn live_children<'a>(step: &'a Step, live: &Live, below: Below<'_>) -> Option<&'a [Step]> {
    match live {
        Live::Catch { handler, .. } => step.catch.get(*handler).map(|c| c.steps.as_slice()),
        Live::Switch { case, .. } => match &step.kind {
            Kind::Switch { cases } => cases.get(*case).map(|c| c.steps.as_slice()),
            _ => None,
        },
        _ => children(step, below),
    }
}
