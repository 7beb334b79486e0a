//! Where a run branches off another: the state of the parent at one of its transitions, as the beginning of a new run.
//!
//! What had ended stays as it ended and is never done again. What was under way begins anew under the new run: its attempts
//! are the parent's, which ends and settles them itself. Blocks that were under way stay open with what has ended in them.

use super::{
    Moment,
    scope::{Place, live_children},
    state::{Frame, Live, RunState, split_segment},
    timer::millis,
};
use crate::{
    definition::{Definition, Kind, Step},
    event::Event,
    ids::{DefinitionHash, RunId},
    view::RunStatus,
};
use chrono::{DateTime, Utc};
use serde_json::Value;
use std::collections::BTreeMap;

/// What is changed at the fork.
#[derive(Clone, Debug)]
pub struct Fork {
    pub parent: RunId,
    /// The last transition that both share.
    pub seq: u64,
    pub reason: String,
    pub definition: DefinitionHash,
    /// All inputs, checked; `None` leaves them and what follows from them as they are.
    pub inputs: Option<Value>,
    /// Another definition than the parent's: its calls lead where they lead now.
    pub migrated: bool,
    /// A step that begins anew although it had begun, with the steps after it in its block.
    pub again: Option<String>,
    /// No run of its chain goes on beyond it: of one that takes the parent's place.
    pub until: Option<DateTime<Utc>>,
}

/// The first event of a fork. `state` is the fold of the shared rows, under the new run's id.
///
/// # Errors
/// Everything that stands in the way, for people.
pub fn fork(definition: &Definition, state: &RunState, fork: Fork, moment: &Moment<'_>) -> Result<Event, Vec<String>> {
    if state.status == RunStatus::Pending {
        return Err(vec!["the run had not started there: start another".into()]);
    }
    if state.ending.is_some() || state.status.is_closed() {
        return Err(vec!["the run was ending there: choose an earlier transition".into()]);
    }
    let mut problems = Vec::new();
    let mut restarted = Vec::new();
    if let Some(path) = &fork.again {
        match after(definition, state, path) {
            Some(paths) => restarted.extend(paths),
            None => problems.push(format!(
                "`{path}` does not stand there: it had not begun, or the block around it had ended; fork at that block"
            )),
        }
    }
    let below = |path: &str, above: &[String]| {
        above.iter().any(|a| path.strip_prefix(a.as_str()).is_some_and(|r| r.starts_with(['/', '[', ':', '~', '!'])))
    };
    let mut leaves = Vec::new();
    state.visit_live(&mut |path, node| {
        let covered = restarted.iter().any(|r| r == path) || below(path, &restarted);
        if node.live.as_ref().is_some_and(Live::is_leaf) && !covered {
            leaves.push(path.to_owned());
        }
    });
    restarted.extend(leaves);
    fits(&definition.steps, &state.body, "", &restarted, &mut problems);
    let mut next = state.clone();
    if let Some(inputs) = &fork.inputs {
        next.inputs = inputs.clone();
    }
    if fork.inputs.is_some() || fork.migrated {
        match env(definition, &next, moment) {
            Ok(env) => next.env = env,
            Err(why) => problems.push(why),
        }
    }
    if fork.migrated {
        next.calls.clone_from(moment.calls);
    }
    if !problems.is_empty() {
        return Err(problems);
    }
    let deadline = moment.now + millis(definition.timeout_ms);
    Ok(Event::RunForked {
        parent: fork.parent,
        seq: fork.seq,
        reason: fork.reason,
        definition: fork.definition,
        inputs: next.inputs,
        env: next.env,
        calls: next.calls,
        restarted,
        at: moment.now,
        not_before: None,
        deadline: fork.until.map_or(deadline, |until| deadline.min(until)),
    })
}

/// A [`fork`] that may not begin before `begins`: its whole time is still before it then, up to `until`.
#[cfg(feature = "runtime")]
pub(crate) fn put_off(mut forked: Event, begins: DateTime<Utc>, until: Option<DateTime<Utc>>) -> Event {
    if let Event::RunForked { at, not_before, deadline, .. } = &mut forked
        && begins > *at
    {
        *not_before = Some(begins);
        // If `until` has cut it before, it does so again.
        *deadline += begins - *at;
        *deadline = until.map_or(*deadline, |until| until.min(*deadline));
    }
    forked
}

fn env(definition: &Definition, state: &RunState, moment: &Moment<'_>) -> Result<BTreeMap<String, Value>, String> {
    let place = Place::inside(definition, state, moment, "").map_err(|e| e.0)?;
    definition
        .env
        .iter()
        .map(|(name, data)| match place.resolve(data) {
            Ok(value) => Ok((name.clone(), value)),
            Err(failure) => Err(format!("env `{name}`: {}", failure.message)),
        })
        .collect()
}

/// The step at `path` and those after it in its block, as far as they have begun. `None` if it has not.
fn after(definition: &Definition, state: &RunState, path: &str) -> Option<Vec<String>> {
    state.node(path)?;
    let (prefix, id) = path.rfind('/').map_or(("", path), |at| (&path[..=at], &path[at + 1..]));
    let (mut steps, mut frame): (&[Step], &Frame) = (&definition.steps, &state.body);
    for segment in prefix.split('/').filter(|s| !s.is_empty()) {
        let (id, below) = split_segment(segment);
        let step = steps.iter().find(|s| s.id == id)?;
        let live = frame.nodes.get(id)?.live.as_ref()?;
        // A round that is over has the same steps as the present one.
        live.frames().iter().find(|(suffix, _)| *suffix == segment[id.len()..])?;
        steps = live_children(step, live, below)?;
        frame = live.frame(below)?;
    }
    let first = steps.iter().position(|s| s.id == id)?;
    let begun = steps[first..].iter().filter(|s| frame.nodes.contains_key(&s.id));
    Some(begun.map(|s| format!("{prefix}{}", s.id)).collect())
}

/// Whether what is under way has its place in the definition.
fn fits(steps: &[Step], frame: &Frame, prefix: &str, restarted: &[String], problems: &mut Vec<String>) {
    for (id, node) in &frame.nodes {
        let path = format!("{prefix}{id}");
        let Some(live) = node.live.as_ref().filter(|_| !restarted.contains(&path)) else { continue };
        let Some(step) = steps.iter().find(|s| s.id == *id) else {
            problems.push(format!("`{path}` is under way and not in the definition"));
            continue;
        };
        let same = match (live, &step.kind) {
            (Live::Group { .. }, Kind::Group { .. })
            | (Live::Switch { .. }, Kind::Switch { .. })
            | (Live::Foreach { .. }, Kind::Foreach { .. })
            | (Live::Repeat { .. }, Kind::Repeat { .. })
            | (Live::Catch { .. }, _) => true,
            (Live::Parallel { branches, .. }, Kind::Parallel { branches: specs, .. }) => {
                branches.len() == specs.len() && specs.iter().all(|s| branches.contains_key(&s.name))
            }
            _ => false,
        };
        if !same {
            problems.push(format!("`{path}` is under way and something else in the definition"));
            continue;
        }
        for (suffix, inner) in live.frames() {
            let segment = format!("{id}{suffix}");
            match live_children(step, live, split_segment(&segment).1) {
                Some(steps) => fits(steps, inner, &format!("{path}{suffix}/"), restarted, problems),
                None => problems.push(format!("`{path}{suffix}` is under way and not in the definition")),
            }
        }
    }
}
