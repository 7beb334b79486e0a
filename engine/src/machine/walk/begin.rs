//! How a step begins: everything that it evaluates is evaluated once, here, and recorded.

use super::Walk;
use crate::{
    definition::{Expr, Kind, ParentClose, Step, WaitUntil, expr, inputs::prepare_for},
    event::{Ending, Event, Opened, StepStatus},
    failure::Failure,
    ids::{DefinitionHash, RunId},
    machine::{
        CALL_DEPTH_MAX, Command, Current, Illegal, call_key,
        react::{step_ended, stop_commands},
        scope::Place,
        state::path_key,
        timer::millis,
    },
};
use chrono::{DateTime, Utc};
use serde_json::{Value, json};

impl Walk<'_> {
    /// The events of a step that begins.
    pub(super) fn begin(&self, step: &Step, prefix: &str, commands: &mut Vec<Command>) -> Result<Vec<Event>, Illegal> {
        let path = format!("{prefix}{}", step.id);
        let now = self.moment.now;
        let place = self.place(prefix)?;
        let begun = |opened| Event::StepStarted { path: path.clone(), at: now, opened };
        let failed = |failure: Failure| -> Result<Vec<Event>, Illegal> {
            let mut events = vec![begun(Opened::Group)];
            events.extend(self.fail(step, &path, failure)?);
            Ok(events)
        };
        if self.state.executions >= self.definition.executions_max {
            let most = self.definition.executions_max;
            return failed(Failure::permanent(
                "limit.executions",
                format!("the run made {most} executions, its limit"),
            ));
        }
        if let Some(condition) = &step.condition {
            match expr::condition(condition, &place) {
                Ok(true) => {}
                Ok(false) => return Ok(vec![Event::StepSkipped { path, reason: "if".into() }]),
                Err(failure) => return failed(failure),
            }
        }
        let total = step.timeouts.total_ms.map(|ms| now + millis(ms));
        let opened: Result<Vec<Event>, Failure> = match &step.kind {
            Kind::Activity { name, with } => place.resolve_map(with).and_then(|input| {
                let overrides = step
                    .retry
                    .escalate
                    .iter()
                    .map(|e| Ok((e.from_attempt, place.resolve_map(&e.with)?)))
                    .collect::<Result<Vec<_>, Failure>>()?;
                Ok(vec![begun(Opened::Activity {
                    activity: name.clone(),
                    input: Value::Object(input),
                    overrides,
                    queue_deadline: now + millis(step.timeouts.queue_ms),
                    total_deadline: total,
                })])
            }),
            Kind::Set { values } => place.resolve_map(values).map(|output| {
                vec![
                    begun(Opened::Group),
                    step_ended(&path, StepStatus::Succeeded, Some(Value::Object(output)), None, now),
                ]
            }),
            Kind::Group { .. } => Ok(vec![begun(Opened::Group)]),
            Kind::Parallel { branches, .. } => {
                Ok(vec![begun(Opened::Parallel { branches: branches.iter().map(|b| b.name.clone()).collect() })])
            }
            Kind::Foreach { list, key, max_items, .. } => self
                .items(list, key.as_ref(), *max_items, place)
                .map(|(keys, items)| vec![begun(Opened::Foreach { keys, items })]),
            Kind::Repeat { .. } => Ok(vec![
                begun(Opened::Repeat),
                Event::RoundStarted { path: path.clone(), round: 1, previous: Value::Null },
            ]),
            Kind::Switch { cases } => {
                let mut chosen = Ok(None);
                for (index, case) in cases.iter().enumerate() {
                    match case.when.as_ref().map_or(Ok(true), |when| expr::condition(when, &place)) {
                        Ok(true) => {
                            chosen = Ok(Some(index));
                            break;
                        }
                        Ok(false) => {}
                        Err(failure) => {
                            chosen = Err(failure);
                            break;
                        }
                    }
                }
                chosen.map(|case| match case {
                    Some(case) => vec![begun(Opened::Switch { case })],
                    None => vec![
                        begun(Opened::Group),
                        step_ended(
                            &path,
                            StepStatus::Succeeded,
                            Some(json!({ "case": -1, "output": null })),
                            None,
                            now,
                        ),
                    ],
                })
            }
            Kind::Wait { until } => wait_until(until, now, &place).map(|until| vec![begun(Opened::Wait { until })]),
            Kind::Await(spec) => spec.show.as_ref().map(|t| place.render(t)).transpose().map(|show| {
                vec![begun(Opened::Await {
                    signal: spec.signal.clone(),
                    deadline: now + millis(spec.timeout_ms),
                    show,
                })]
            }),
            Kind::Call { workflow, version, with, parent_close } => {
                if self.moment.depth >= CALL_DEPTH_MAX {
                    let text = format!(
                        "`{workflow}` is not started: at most {CALL_DEPTH_MAX} runs may stand one below the other; \
                         end the chain of calls earlier, or see whether a workflow calls itself"
                    );
                    return failed(Failure::permanent("call.failed", text));
                }
                let key = call_key(workflow, version);
                let pinned = self.state.calls.get(&key).or_else(|| self.moment.calls.get(&key));
                let Some(definition) = pinned else {
                    return failed(Failure::permanent("call.failed", format!("no workflow `{workflow}` is deployed")));
                };
                place.resolve_map(with).map(|inputs| {
                    let child = child_id(self.state.run_id, &path, now);
                    commands.push(Command::StartChild {
                        path: path.clone(),
                        run_id: child,
                        workflow: workflow.clone(),
                        definition: *definition,
                        inputs: Value::Object(inputs.clone()),
                    });
                    vec![begun(Opened::Call {
                        child,
                        workflow: workflow.clone(),
                        inputs: Value::Object(inputs),
                        definition: definition.to_string(),
                        propagate: *parent_close != ParentClose::Abandon,
                        terminate: *parent_close == ParentClose::Terminate,
                    })]
                })
            }
            Kind::Fail { code, message } => {
                let message = match message.as_ref().map(|m| place.resolve(m)).transpose() {
                    Ok(Some(Value::String(text))) => text,
                    Ok(Some(other)) => other.to_string(),
                    Ok(None) => "the workflow says so".to_owned(),
                    Err(failure) => return failed(failure),
                };
                return failed(Failure::permanent(code.clone(), message));
            }
            Kind::Finish { outputs } => place.resolve_map(outputs).map(|outputs| {
                commands.extend(stop_commands(self.state, ""));
                let output = Value::Object(outputs);
                vec![
                    begun(Opened::Group),
                    step_ended(&path, StepStatus::Succeeded, Some(output.clone()), None, now),
                    Event::RunEnding { ending: Ending::Completed { output }, at: now },
                ]
            }),
            Kind::ContinueAsNew { with, current } => place
                .resolve_map(with)
                .and_then(|inputs| self.successor(*current, Value::Object(inputs)))
                .map(|(definition, inputs)| {
                    commands.extend(stop_commands(self.state, ""));
                    let run = child_id(self.state.run_id, &path, now);
                    vec![
                        begun(Opened::Group),
                        step_ended(&path, StepStatus::Succeeded, None, None, now),
                        Event::RunEnding { ending: Ending::Continued { run, inputs, definition }, at: now },
                    ]
                }),
        };
        match opened {
            Ok(events) => Ok(events),
            Err(failure) => failed(failure),
        }
    }

    /// Under which other definition the next run of a chain runs, and its inputs as that takes them.
    fn successor(&self, current: bool, inputs: Value) -> Result<(Option<DefinitionHash>, Value), Failure> {
        let (definition, declared) = match self.moment.current.filter(|_| current) {
            Some(Current::Version { hash, inputs }) => (Some(*hash), inputs),
            Some(Current::Refused(failure)) => return Err(failure.clone()),
            None => (None, &self.definition.inputs),
        };
        match prepare_for(declared, &inputs) {
            Ok(inputs) => Ok((definition, inputs)),
            Err(problems) => Err(Failure::permanent("input.invalid", problems.join("; "))),
        }
    }

    pub(super) fn items(
        &self,
        list: &Expr,
        key: Option<&Expr>,
        max_items: u32,
        mut place: Place<'_>,
    ) -> Result<(Vec<String>, Vec<Value>), Failure> {
        let items = match expr::evaluate(list, &place)? {
            Value::Array(items) => items,
            other => {
                return Err(Failure::permanent(
                    "expr.type",
                    format!("`{}` is {}, not a list", list.0, expr::type_name(&other)),
                ));
            }
        };
        if items.len() > max_items as usize {
            return Err(Failure::permanent(
                "limit.items",
                format!("{} items; at most {max_items} are allowed", items.len()),
            ));
        }
        let mut keys = Vec::with_capacity(items.len());
        for (index, item) in items.iter().enumerate() {
            let Some(key) = key else {
                keys.push(index.to_string());
                continue;
            };
            place.extra.insert("item".into(), item.clone());
            place.extra.insert("index".into(), index.into());
            match expr::evaluate(key, &place)? {
                Value::String(text) if !text.is_empty() => keys.push(path_key(&text)),
                Value::Number(n) => keys.push(path_key(&n.to_string())),
                _ => {
                    return Err(Failure::permanent(
                        "limit.keys",
                        format!("`{}` must be text or a whole number", key.0),
                    ));
                }
            }
        }
        let mut seen = std::collections::BTreeSet::new();
        if let Some(twice) = keys.iter().find(|k| !seen.insert(k.as_str())) {
            return Err(Failure::permanent("limit.keys", format!("two items have the key `{twice}`")));
        }
        Ok((keys, items))
    }
}

fn wait_until(until: &WaitUntil, now: DateTime<Utc>, place: &Place<'_>) -> Result<DateTime<Utc>, Failure> {
    match until {
        WaitUntil::For(ms) => Ok(now + millis(*ms)),
        WaitUntil::Instant { at, max_ms } => {
            let value = expr::evaluate(at, place)?;
            let instant = value
                .as_str()
                .and_then(|text| DateTime::parse_from_rfc3339(text).ok())
                .ok_or_else(|| Failure::permanent("expr.type", format!("`{}` is no RFC 3339 instant", at.0)))?
                .to_utc();
            if instant > now + millis(*max_ms) {
                return Err(Failure::permanent("limit.wait", "the instant lies beyond `max`"));
            }
            Ok(instant)
        }
    }
}

/// The id of a child or of the next run of a chain: a UUIDv7 of this moment whose random part is derived from (parent, step
/// path), so that deciding the same step again at the same instant names the same run.
fn child_id(parent: RunId, path: &str, now: DateTime<Utc>) -> RunId {
    let derived = uuid::Uuid::new_v5(&parent.0, path.as_bytes());
    let mut bytes = *derived.as_bytes();
    let ms = u64::try_from(now.timestamp_millis()).unwrap_or(0).to_be_bytes();
    bytes[..6].copy_from_slice(&ms[2..]);
    RunId(
        uuid::Builder::from_bytes(bytes)
            .with_variant(uuid::Variant::RFC4122)
            .with_version(uuid::Version::SortRand)
            .into_uuid(),
    )
}
