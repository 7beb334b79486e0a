//! Steps that have steps below them: rounds, items, branches, and the total timeout of all of them.

use super::{End, Progress, Walk, with_cause};
use crate::{
    definition::{Data, Exhausted, Join, Kind, OnItemFailure, RepeatCondition, Step, expr},
    event::{Event, StepStatus},
    failure::Failure,
    machine::{
        Command, Illegal,
        react::{step_ended, stop_child},
        scope::{error_value, live_children, status_name},
        state::{Branch, Ended, Frame, Live, Node, split_segment},
        timer::millis,
    },
};
use chrono::{DateTime, Utc};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

impl Walk<'_> {
    /// A block, a wait or a call whose total timeout is over. What is under way below it is told to stop first, and the
    /// failure stands when all of it has: an attempt that is left behind would never be closed.
    pub(super) fn overdue(
        &self,
        step: &Step,
        node: &Node,
        live: &Live,
        path: &str,
        commands: &mut Vec<Command>,
    ) -> Result<Option<Progress>, Illegal> {
        let (Some(total), Some(began), false) = (step.timeouts.total_ms, node.started_at, node.stopping) else {
            return Ok(None);
        };
        if matches!(live, Live::Activity { .. } | Live::Catch { .. }) || self.moment.now < began + millis(total) {
            return Ok(None);
        }
        let fresh = self.live_children_of(live, path);
        if !fresh.is_empty() {
            let stops = fresh.into_iter().map(|p| self.stop(p, "timeout.total", commands)).collect();
            return Ok(Some(Progress::Emit(stops)));
        }
        let mut idle = false;
        for (suffix, frame) in live.frames() {
            let segment = format!("{}{suffix}", step.id);
            let steps = live_children(step, live, split_segment(&segment).1)
                .ok_or_else(|| Illegal(format!("`{path}{suffix}` is no block")))?;
            match self.frame(steps, frame, &format!("{path}{suffix}/"), true, commands)? {
                Progress::Emit(events) => return Ok(Some(Progress::Emit(events))),
                Progress::Idle => idle = true,
                Progress::Ended(_) => {}
            }
        }
        if idle {
            return Ok(Some(Progress::Idle));
        }
        commands.extend(stop_child(self.state, live));
        let failure = Failure::permanent("timeout.total", "the step took longer than its total timeout");
        Ok(Some(Progress::Emit(self.fail(step, path, failure)?)))
    }

    /// Paths of the live steps directly below, those that are not stopping yet.
    pub(super) fn live_children_of(&self, live: &Live, path: &str) -> Vec<String> {
        live.frames()
            .into_iter()
            .flat_map(|(suffix, frame)| {
                frame
                    .nodes
                    .iter()
                    .filter(|(_, n)| n.live.is_some() && !n.stopping)
                    .map(move |(id, _)| format!("{path}{suffix}/{id}"))
            })
            .collect()
    }

    pub(super) fn block_succeeded(
        &self,
        step: &Step,
        live: &Live,
        path: &str,
        last: Option<Value>,
    ) -> Result<Progress, Illegal> {
        let output = match (&step.kind, live) {
            (Kind::Group { outputs: Some(outputs), .. }, _) => {
                match self.place(&format!("{path}/"))?.resolve_map(outputs) {
                    Ok(map) => Some(Value::Object(map)),
                    Err(failure) => return Ok(Progress::Emit(self.fail(step, path, failure)?)),
                }
            }
            (_, Live::Switch { case, .. }) => Some(json!({ "case": case, "output": last })),
            _ => last,
        };
        Ok(Progress::Emit(vec![step_ended(path, StepStatus::Succeeded, output, None, self.moment.now)]))
    }

    pub(super) fn block_ended(&self, step: &Step, path: &str, progress: Progress) -> Result<Progress, Illegal> {
        match progress {
            Progress::Ended(End::Failed(failure)) => Ok(Progress::Emit(self.fail(step, path, failure)?)),
            Progress::Ended(End::Cancelled) => Ok(self.cancelled(step, path)),
            Progress::Ended(End::Succeeded(output)) => {
                Ok(Progress::Emit(vec![step_ended(path, StepStatus::Succeeded, output, None, self.moment.now)]))
            }
            other => Ok(other),
        }
    }

    pub(super) fn repeat(
        &self,
        step: &Step,
        node: &Node,
        path: &str,
        (round, frame, delayed_until): (u32, &Frame, Option<DateTime<Utc>>),
        commands: &mut Vec<Command>,
    ) -> Result<Progress, Illegal> {
        let Kind::Repeat { steps, max_rounds, condition, delay_ms, exhausted, transparent, gate, outputs } = &step.kind
        else {
            return Err(Illegal(format!("`{path}` is no repeat")));
        };
        let now = self.moment.now;
        let next_round =
            || Event::RoundStarted { path: path.to_owned(), round: round + 1, previous: outputs_of(frame) };
        if let Some(until) = delayed_until {
            if node.stopping {
                return Ok(self.cancelled(step, path));
            }
            return Ok(if now < until { Progress::Idle } else { Progress::Emit(vec![next_round()]) });
        }
        let inside = format!("{path}~{round}/");
        let last = match self.frame(steps, frame, &inside, node.stopping, commands)? {
            Progress::Ended(End::Succeeded(last)) => last,
            other => return self.block_ended(step, path, other),
        };
        if node.stopping {
            return Ok(self.cancelled(step, path));
        }
        let place = self.place(&inside)?;
        let open = gate.as_ref().is_none_or(|id| {
            frame.nodes.get(id).is_some_and(|n| matches!(n.status, Some(StepStatus::Succeeded | StepStatus::Recovered)))
        });
        let again = if open {
            let decided = match condition {
                RepeatCondition::Until(e) => expr::condition(e, &place).map(|b| !b),
                RepeatCondition::While(e) => expr::condition(e, &place),
            };
            match decided {
                Ok(again) => again,
                Err(failure) => return Ok(Progress::Emit(self.fail(step, path, failure)?)),
            }
        } else {
            false
        };
        if again && round < *max_rounds {
            return Ok(Progress::Emit(vec![if *delay_ms > 0 {
                Event::RoundDelayed { path: path.to_owned(), until: now + millis(*delay_ms) }
            } else {
                next_round()
            }]));
        }
        if again && *exhausted == Exhausted::Fail {
            let failure = Failure::permanent("limit.rounds", format!("{max_rounds} rounds did not meet the condition"));
            return Ok(Progress::Emit(self.fail(step, path, failure)?));
        }
        let output = match outputs.as_ref().map(|map| place.resolve_map(map)) {
            None => last,
            Some(Ok(map)) => Some(Value::Object(map)),
            Some(Err(failure)) => return Ok(Progress::Emit(self.fail(step, path, failure)?)),
        };
        Ok(Progress::Emit(vec![Event::StepEnded {
            path: path.to_owned(),
            status: StepStatus::Succeeded,
            output,
            failure: None,
            tolerated: false,
            hoist: *transparent,
            extras: json!({ "exhausted": again }),
            at: now,
        }]))
    }

    pub(super) fn foreach(
        &self,
        step: &Step,
        node: &Node,
        live: &Live,
        path: &str,
        commands: &mut Vec<Command>,
    ) -> Result<Progress, Illegal> {
        let (
            Live::Foreach { keys, items, next, active, results },
            Kind::Foreach { concurrency, on_item_failure, steps, outputs, .. },
        ) = (live, &step.kind)
        else {
            return Err(Illegal(format!("`{path}` is no foreach")));
        };
        let first_failure = results.values().find(|r| r.status == StepStatus::Failed).and_then(|r| r.failure.clone());
        let failing = *on_item_failure == OnItemFailure::FailFast && first_failure.is_some();
        if failing {
            let rest = self.live_children_of(live, path);
            if !rest.is_empty() {
                return Ok(Progress::Emit(rest.into_iter().map(|p| self.stop(p, "item failed", commands)).collect()));
            }
        }
        let stopping = node.stopping || failing;
        for (index, frame) in active {
            let inside = format!("{path}[{}]/", keys[*index]);
            let ended = match self.frame(steps, frame, &inside, stopping, commands)? {
                Progress::Emit(events) => return Ok(Progress::Emit(events)),
                Progress::Idle => continue,
                Progress::Ended(End::Succeeded(last)) => {
                    match outputs.as_ref().map(|map| self.outputs_at(&inside, map)) {
                        None => Ended { status: StepStatus::Succeeded, output: last, failure: None },
                        Some(Ok(map)) => {
                            Ended { status: StepStatus::Succeeded, output: Some(Value::Object(map)), failure: None }
                        }
                        Some(Err(ResolveError::Failure(f))) => {
                            Ended { status: StepStatus::Failed, output: None, failure: Some(*f) }
                        }
                        Some(Err(ResolveError::Illegal(e))) => return Err(e),
                    }
                }
                Progress::Ended(End::Failed(f)) => Ended { status: StepStatus::Failed, output: None, failure: Some(f) },
                Progress::Ended(End::Cancelled) => Ended { status: StepStatus::Cancelled, output: None, failure: None },
            };
            return Ok(Progress::Emit(vec![Event::ItemEnded {
                path: path.to_owned(),
                index: *index,
                status: ended.status,
                output: ended.output,
                failure: ended.failure,
            }]));
        }
        if !stopping && *next < items.len() && active.len() < *concurrency as usize {
            return Ok(Progress::Emit(vec![Event::ItemStarted { path: path.to_owned(), index: *next }]));
        }
        if !active.is_empty() {
            return Ok(Progress::Idle);
        }
        if node.stopping {
            return Ok(self.cancelled(step, path));
        }
        if let (Some(failure), true) = (first_failure, *on_item_failure != OnItemFailure::Continue) {
            return Ok(Progress::Emit(self.fail(step, path, failure)?));
        }
        let list: Vec<Value> = results
            .iter()
            .map(|(index, r)| ended_value(r, &[("index", (*index).into()), ("key", keys[*index].as_str().into())]))
            .collect();
        Ok(Progress::Emit(vec![step_ended(
            path,
            StepStatus::Succeeded,
            Some(Value::Array(list)),
            None,
            self.moment.now,
        )]))
    }

    pub(super) fn parallel(
        &self,
        step: &Step,
        node: &Node,
        (branches, winner): (&BTreeMap<String, Branch>, Option<&str>),
        path: &str,
        commands: &mut Vec<Command>,
    ) -> Result<Progress, Illegal> {
        let Kind::Parallel { branches: specs, join, fail_fast } = &step.kind else {
            return Err(Illegal(format!("`{path}` is no parallel")));
        };
        let total = specs.len();
        let count = |status| branches.values().filter(|b| b.ended.as_ref().is_some_and(|e| e.status == status)).count();
        let (good, bad) = (
            count(StepStatus::Succeeded),
            total - count(StepStatus::Succeeded) - branches.values().filter(|b| b.ended.is_none()).count(),
        );
        let all_ended = branches.values().all(|b| b.ended.is_some());
        // Some(true): succeeds; Some(false): fails; None: undecided.
        let decided = match join {
            Join::All if bad > 0 && (*fail_fast || all_ended) => Some(false),
            Join::All | Join::Settled => all_ended.then_some(true),
            Join::First if good > 0 => Some(true),
            Join::First => all_ended.then_some(false),
            Join::AtLeast(n) if good >= *n as usize => Some(true),
            Join::AtLeast(n) => (total - bad < *n as usize).then_some(false),
        };
        let stopping = node.stopping || decided.is_some();
        let mut idle = false;
        for spec in specs {
            let Some(branch) = branches.get(&spec.name).filter(|b| b.ended.is_none()) else { continue };
            if decided.is_some() && !node.stopping {
                let rest: Vec<String> = branch
                    .frame
                    .nodes
                    .iter()
                    .filter(|(_, n)| n.live.is_some() && !n.stopping)
                    .map(|(id, _)| format!("{path}:{}/{id}", spec.name))
                    .collect();
                if !rest.is_empty() {
                    return Ok(Progress::Emit(rest.into_iter().map(|p| self.stop(p, "lost race", commands)).collect()));
                }
            }
            let (status, output, failure) =
                match self.frame(&spec.steps, &branch.frame, &format!("{path}:{}/", spec.name), stopping, commands)? {
                    Progress::Emit(events) => return Ok(Progress::Emit(events)),
                    Progress::Idle => {
                        idle = true;
                        continue;
                    }
                    Progress::Ended(End::Succeeded(last)) => (StepStatus::Succeeded, last, None),
                    Progress::Ended(End::Failed(f)) => (StepStatus::Failed, None, Some(f)),
                    Progress::Ended(End::Cancelled) => (StepStatus::Cancelled, None, None),
                };
            return Ok(Progress::Emit(vec![Event::BranchEnded {
                path: path.to_owned(),
                branch: spec.name.clone(),
                status,
                output,
                failure,
            }]));
        }
        if idle {
            return Ok(Progress::Idle);
        }
        if node.stopping {
            return Ok(self.cancelled(step, path));
        }
        if decided == Some(false) {
            let cause = branches.values().filter_map(|b| b.ended.as_ref()).find_map(|e| e.failure.clone());
            let failure = match (join, cause) {
                (Join::All, Some(cause)) => cause,
                (Join::First, cause) => {
                    with_cause(Failure::permanent("join.none_succeeded", "no branch succeeded"), cause)
                }
                (_, cause) => with_cause(Failure::permanent("join.failed", "too few branches succeeded"), cause),
            };
            return Ok(Progress::Emit(self.fail(step, path, failure)?));
        }
        let map: Map<String, Value> =
            branches.iter().filter_map(|(name, b)| Some((name.clone(), ended_value(b.ended.as_ref()?, &[])))).collect();
        let output = json!({ "winner": winner, "branches": map });
        Ok(Progress::Emit(vec![step_ended(path, StepStatus::Succeeded, Some(output), None, self.moment.now)]))
    }
}

/// Data that cannot be evaluated, or a broken invariant on the way to it.
enum ResolveError {
    Failure(Box<Failure>),
    Illegal(Illegal),
}

impl From<Illegal> for ResolveError {
    fn from(illegal: Illegal) -> Self {
        Self::Illegal(illegal)
    }
}

impl Walk<'_> {
    fn outputs_at(&self, container: &str, map: &BTreeMap<String, Data>) -> Result<Map<String, Value>, ResolveError> {
        self.place(container)?.resolve_map(map).map_err(|f| ResolveError::Failure(Box::new(f)))
    }
}

/// Outputs of a round by step id: what the next round sees as `round.previous`.
fn outputs_of(frame: &Frame) -> Value {
    Value::Object(frame.nodes.iter().filter_map(|(id, node)| Some((id.clone(), node.output.clone()?))).collect())
}

/// An item or branch in its step's output.
fn ended_value(ended: &Ended, fields: &[(&str, Value)]) -> Value {
    let mut map: Map<String, Value> = fields.iter().map(|(k, v)| ((*k).to_owned(), v.clone())).collect();
    map.insert("status".into(), status_name(ended.status).into());
    map.insert("output".into(), ended.output.clone().unwrap_or(Value::Null));
    map.insert("error".into(), ended.failure.as_ref().map_or(Value::Null, error_value));
    Value::Object(map)
}
