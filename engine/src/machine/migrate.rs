//! Whether a run in flight can go on under another definition, and the event by which it does.
//!
//! ```text
//! old, new, map ──▶ names ──▶ blocks: what is under way has its image, what is passed stays passed
//!                               └──▶ the state under the new names ──▶ reads: what is to come finds what it reads
//! ```
//!
//! Every violation is told, not the first only. Nothing is moved between blocks and nothing is done again: a migration renames
//! steps, marks those as skipped that were put in before what has run, and leaves everything else as it is. Instants stay: what
//! has a deadline keeps it, but for a block's or a wait's `total`, which is counted from its beginning as the new definition says.

mod blocks;
mod names;
mod reads;

use super::{
    Inbound, Moment,
    scope::Place,
    signal::{Door, problems},
    state::{Live, Phase, RunState},
};
use crate::{
    definition::{Definition, Kind, inputs::prepare},
    event::Event,
    ids::DefinitionHash,
    view::RunStatus,
};
use names::Names;
use serde::Serialize;
use serde_json::{Map, Value};
use std::collections::BTreeMap;

/// Violations, and notes, that a report lists. Chosen: more than anybody reads.
pub const FINDINGS_MAX: usize = 200;
/// Notes that the event keeps. Chosen: a history row stays small.
const KEPT_NOTES_MAX: usize = 50;

/// What is asked for.
#[derive(Clone, Debug)]
pub struct Migrate {
    pub from: DefinitionHash,
    pub to: DefinitionHash,
    /// New ids of steps, by their old id or path (`each/code`). A step stays in its block.
    pub map: BTreeMap<String, String>,
    /// All inputs of the run, as it was started with them or has them now.
    pub inputs: Value,
    pub reason: String,
    /// Who asks.
    pub by: Option<String>,
}

/// What a finding is about. Those from `Skipped` on are no violations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Rule {
    /// A definition of another workflow.
    WorkflowDiffers,
    /// The run is ending, or has ended.
    RunEnding,
    /// The map names what is not there, or gives two steps one name.
    MapInvalid,
    /// A step that is under way has no image.
    StepMissing,
    /// The image is a step of another kind.
    KindChanged,
    /// Branches, cases or handlers around what is under way are others.
    BlockChanged,
    /// A step would never run that had still to come, or run again though it has run.
    StepMoved,
    /// A step to come has a path under which another one has run.
    NameTaken,
    /// A step with retries to come would change its path, under which its checkpoints and its outside calls stand.
    PathChanged,
    /// A step with retries to come is another activity, or a child is another workflow's.
    WorkChanged,
    /// An `await` that waits has another signal.
    SignalChanged,
    /// A message that waits satisfies no form any more.
    PayloadRefused,
    InputInvalid,
    EnvInvalid,
    /// What is to come reads what is not there, or what does not satisfy the new form.
    OutputMissing,
    /// More items than `max-items`.
    ItemsExceeded,
    /// More rounds than `max-rounds`.
    RoundsExceeded,
    /// As many executions as the limit.
    ExecutionsExceeded,
    /// The new `total` timeout of what is under way is over.
    Overdue,
    /// No such workflow is deployed.
    CallUnresolved,
    /// A step that was put in before what has run: it never runs in this run.
    Skipped,
    /// A step that is not in the new definition.
    Removed,
    /// Something goes on as it began, whatever the new definition says.
    Kept,
    /// Something else is in force from now on.
    Changed,
}

/// One thing that a check found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Of the step, or empty for the run as a whole.
    pub path: String,
    pub rule: Rule,
    /// A sentence for people; of a violation, with what to do.
    pub text: String,
}

/// What the checks came to.
#[derive(Clone, Debug, Default)]
pub struct Migration {
    pub violations: Vec<Finding>,
    pub notes: Vec<Finding>,
    /// Steps whose attempts run now: nothing is migrated before they have ended.
    pub running: Vec<String>,
    /// Absent while there are violations.
    pub event: Option<Event>,
}

impl Migration {
    fn violation(&mut self, path: &str, rule: Rule, text: String) {
        add(&mut self.violations, path, rule, text);
    }
    fn note(&mut self, path: &str, rule: Rule, text: String) {
        add(&mut self.notes, path, rule, text);
    }
}

fn add(list: &mut Vec<Finding>, path: &str, rule: Rule, text: String) {
    let finding = Finding { path: path.to_owned(), rule, text };
    if list.len() < FINDINGS_MAX && !list.contains(&finding) {
        list.push(finding);
    }
}

/// Checks whether the run can go on under `new`, and decides the event. `old` is the definition it has; `unread` what was sent to
/// it and not yet read; `moment.calls` say where the calls of `new` lead now.
#[must_use]
pub fn migrate(
    old: &Definition,
    new: &Definition,
    state: &RunState,
    unread: &[Inbound],
    asked: Migrate,
    moment: &Moment<'_>,
) -> Migration {
    let mut found = Migration { running: running(state), ..Migration::default() };
    if old.name != new.name {
        let text = format!(
            "this is a definition of `{}`, and the run is one of `{}`: choose a version of that, or start another run",
            new.name, old.name
        );
        found.violation("", Rule::WorkflowDiffers, text);
    }
    if state.ending.is_some() || state.status.is_closed() {
        found.violation(
            "",
            Rule::RunEnding,
            "the run is ending: let it end, or fork it at an earlier transition".into(),
        );
        return found;
    }
    let names = Names::new(old, new, &asked.map, &mut found);
    let skipped = blocks::compare(old, new, state, &names, moment.now, &mut found);
    messages(old, new, state, unread, &mut found);
    bounds(old, new, state, &mut found);

    let mut after = state.clone();
    let under_new_names = super::fold::renamed(&mut after, names.map(), &skipped);
    let inputs = inputs(new, state, &asked.inputs, &mut found);
    if let Some(inputs) = &inputs {
        after.inputs = inputs.clone();
    }
    let pending = state.status == RunStatus::Pending;
    let env = if pending { BTreeMap::new() } else { env(old, new, &after, moment, &mut found) };
    let calls = if pending { BTreeMap::new() } else { moment.calls.clone() };
    match under_new_names {
        Ok(()) => reads::check(old, new, &names, &after, moment, &mut found),
        // Two steps under one name: said before.
        Err(why) if found.violations.is_empty() => found.violation("", Rule::MapInvalid, why.0),
        Err(_) => {}
    }
    for (key, to) in &calls {
        if state.calls.get(key).is_some_and(|before| before != to) {
            let text = format!("`{key}` leads to another definition from now on; children under way stay as they are");
            found.note("", Rule::Changed, text);
        }
    }
    if found.violations.is_empty() {
        let notes = found.notes.iter().take(KEPT_NOTES_MAX);
        found.event = Some(Event::RunMigrated {
            from: asked.from,
            to: asked.to,
            map: names.map().clone(),
            skipped,
            reason: asked.reason,
            by: asked.by,
            inputs,
            env,
            calls,
            notes: notes
                .map(|n| if n.path.is_empty() { n.text.clone() } else { format!("{}: {}", n.path, n.text) })
                .collect(),
            at: moment.now,
        });
    }
    found
}

/// Steps whose attempts run.
fn running(state: &RunState) -> Vec<String> {
    let mut paths = Vec::new();
    state.visit_live(&mut |path, node| {
        if matches!(node.live, Some(Live::Activity { phase: Phase::Running { .. }, .. })) {
            paths.push(path.to_owned());
        }
    });
    paths
}

/// What waits to be taken must still be taken by some step.
fn messages(old: &Definition, new: &Definition, state: &RunState, unread: &[Inbound], found: &mut Migration) {
    let kept = state
        .mailbox
        .iter()
        .map(|m| (m.n, m.name.as_str(), &m.payload, if m.update.is_some() { Door::Update } else { Door::Signal }));
    let sent = unread.iter().filter_map(|message| match message {
        Inbound::Signal { n, name, payload, .. } => Some((*n, name.as_str(), payload, Door::Signal)),
        // The run judges those itself when it reads them.
        _ => None,
    });
    for (n, name, payload, door) in kept.chain(sent) {
        let refused = problems(new, name, payload, door);
        if !refused.is_empty() && problems(old, name, payload, door).is_empty() {
            let text = format!(
                "message {n}, `{name}`, waits and no step of the new definition takes it: {}; let the run take it first, or \
                 keep the step that does",
                refused.join("; ")
            );
            found.violation("", Rule::PayloadRefused, text);
        }
    }
}

/// Limits of the run as a whole.
fn bounds(old: &Definition, new: &Definition, state: &RunState, found: &mut Migration) {
    if state.executions >= new.executions_max {
        let text = format!(
            "the run has made {} executions and the new definition allows {}: raise `limits.executions`",
            state.executions, new.executions_max
        );
        found.violation("", Rule::ExecutionsExceeded, text);
    }
    if state.status != RunStatus::Pending && old.timeout_ms != new.timeout_ms {
        found.note("", Rule::Kept, format!("the run keeps its deadline, {}", state.deadline.to_rfc3339()));
    }
    if old.budget != new.budget {
        found.note("", Rule::Changed, "the new budget is in force from the next attempt on".into());
    }
    if old.concurrency != new.concurrency {
        found.note(
            "",
            Rule::Kept,
            "the run keeps its queue, and its place in the concurrency group it came with".into(),
        );
    }
}

/// All inputs under the new definition; `None` if they are what they were. Inputs that it does not declare stay, so that the run
/// can be migrated back.
fn inputs(new: &Definition, state: &RunState, given: &Value, found: &mut Migration) -> Option<Value> {
    let empty = Map::new();
    let given = given.as_object().unwrap_or(&empty);
    let declared: Map<String, Value> =
        given.iter().filter(|(name, _)| new.inputs.contains_key(*name)).map(|(k, v)| (k.clone(), v.clone())).collect();
    let prepared = match prepare(new, &Value::Object(declared)) {
        Ok(Value::Object(prepared)) => prepared,
        Ok(_) => Map::new(),
        Err(problems) => {
            for problem in problems {
                let text =
                    format!("input {problem}: give it a default in the new definition, or accept what the run has");
                found.violation("", Rule::InputInvalid, text);
            }
            return None;
        }
    };
    for name in prepared.keys().filter(|name| !given.contains_key(*name)) {
        found.note("", Rule::Changed, format!("input `{name}` has its default"));
    }
    for name in given.keys().filter(|name| !new.inputs.contains_key(*name)) {
        found.note("", Rule::Removed, format!("input `{name}` is not declared any more"));
    }
    // A run that has not started begins with what is declared.
    let mut all = if state.status == RunStatus::Pending { Map::new() } else { given.clone() };
    all.extend(prepared);
    (all != *given).then_some(Value::Object(all))
}

/// `env` under the new definition: what it defines as before keeps its recorded value.
fn env(
    old: &Definition,
    new: &Definition,
    after: &RunState,
    moment: &Moment<'_>,
    found: &mut Migration,
) -> BTreeMap<String, Value> {
    let mut env = BTreeMap::new();
    for (name, data) in &new.env {
        if let (Some(before), Some(value)) = (old.env.get(name), after.env.get(name))
            && before == data
        {
            env.insert(name.clone(), value.clone());
            continue;
        }
        let resolved = Place::inside(new, after, moment, "").map(|place| place.resolve(data));
        match resolved {
            Ok(Ok(value)) => {
                found.note("", Rule::Changed, format!("env `{name}` is evaluated anew"));
                env.insert(name.clone(), value);
            }
            Ok(Err(failure)) => {
                let text = format!("env `{name}` cannot be evaluated: {}: correct it", failure.message);
                found.violation("", Rule::EnvInvalid, text);
            }
            Err(why) => found.violation("", Rule::EnvInvalid, why.0),
        }
    }
    env
}

/// What people call a step of this kind.
fn word(kind: &Kind) -> &'static str {
    match kind {
        Kind::Activity { .. } => "activity",
        Kind::Set { .. } => "set",
        Kind::Group { .. } => "group",
        Kind::Parallel { .. } => "parallel",
        Kind::Foreach { .. } => "foreach",
        Kind::Repeat { transparent: true, .. } => "redo",
        Kind::Repeat { .. } => "repeat",
        Kind::Switch { .. } => "switch",
        Kind::Wait { .. } => "wait",
        Kind::Await(spec) if spec.approval.is_some() => "approve",
        Kind::Await(_) => "await",
        Kind::Call { .. } => "call",
        Kind::Fail { .. } => "fail",
        Kind::Finish { .. } => "finish",
        Kind::ContinueAsNew { .. } => "continue-as-new",
    }
}
