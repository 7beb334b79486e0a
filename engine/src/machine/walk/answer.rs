//! Signals and approvals: what an await takes, counts, lets pass, or does without.

use super::{Progress, Walk, container};
use crate::{
    definition::{Await, Kind, OnTimeout, Step, expr},
    event::{Event, StepStatus},
    failure::Failure,
    machine::{
        Illegal, OUTPUT_BYTES_MAX,
        state::{Live, Message, Node},
        timer::millis,
    },
};
use serde_json::{Value, json};

impl Walk<'_> {
    pub(super) fn awaiting(&self, step: &Step, node: &Node, live: &Live, path: &str) -> Result<Progress, Illegal> {
        let (Live::Await { signal, deadline, reminded, counted, .. }, Kind::Await(spec)) = (live, &step.kind) else {
            return Err(Illegal(format!("`{path}` is no await")));
        };
        if node.stopping {
            return Ok(self.cancelled(step, path));
        }
        let now = self.moment.now;
        for message in self.state.mailbox.iter().filter(|m| m.name == *signal) {
            // A signal of that name may be an await's; an update is an await's only.
            if spec.approval.is_some() && message.update.is_some() {
                continue;
            }
            // Nobody decides on what was not shown yet: a second click on the plan of the round before approves nothing.
            if spec.approval.is_some() && node.started_at.is_some_and(|began| message.at < began) {
                return Ok(Progress::Emit(vec![Event::SignalConsumed { path: path.to_owned(), n: message.n }]));
            }
            if let Some(filter) = &spec.filter {
                let mut place = self.place(container(path))?;
                place.extra.insert("signal".into(), candidate(message));
                match expr::condition(filter, &place) {
                    Ok(true) => {}
                    Ok(false) => continue,
                    Err(failure) => return Ok(Progress::Emit(self.fail(step, path, failure)?)),
                }
            }
            return self.message(step, spec, message, counted, path).map(Progress::Emit);
        }
        if now >= *deadline {
            return self.await_timed_out(step, spec, path).map(Progress::Emit);
        }
        if let (Some(after), Some(began)) = (spec.remind_ms.get(*reminded as usize), node.started_at)
            && now >= began + millis(*after)
        {
            return Ok(Progress::Emit(vec![Event::Reminded { path: path.to_owned(), count: reminded + 1 }]));
        }
        Ok(Progress::Idle)
    }

    /// The events of one message that an await takes.
    pub(super) fn message(
        &self,
        step: &Step,
        spec: &Await,
        message: &Message,
        counted: &[String],
        path: &str,
    ) -> Result<Vec<Event>, Illegal> {
        // The form was checked before: when it was sent, or accepted. But of steps that wait for one name another may take it.
        let fits = spec.form.as_ref().is_none_or(|form| jsonschema::is_valid(form, &message.payload));
        let consumed = match &message.update {
            None => Event::SignalConsumed { path: path.to_owned(), n: message.n },
            Some(id) => {
                let (result, failure) = match self.reply(spec, message, fits, path)? {
                    Ok(result) => (Some(result), None),
                    Err(failure) => (None, Some(failure)),
                };
                Event::UpdateCompleted { path: path.to_owned(), n: message.n, id: id.clone(), result, failure }
            }
        };
        if !fits {
            return Ok(vec![consumed]);
        }
        let extras = json!({ "by": message.sender, "at": message.at, "timed_out": false });
        let succeed = |output: Value| Event::StepEnded {
            path: path.to_owned(),
            status: StepStatus::Succeeded,
            output: Some(output),
            failure: None,
            tolerated: false,
            hoist: false,
            extras: extras.clone(),
            at: self.moment.now,
        };
        let Some(approval) = spec.approval else { return Ok(vec![consumed, succeed(message.payload.clone())]) };
        let field = |name: &str| message.payload.get(name).cloned().unwrap_or(Value::Null);
        let decision = field("decision");
        let output = json!({
            "decision": decision,
            "by": message.sender,
            "at": message.at,
            "comment": field("comment").as_str().unwrap_or_default(),
            "data": field("data"),
        });
        match decision.as_str() {
            Some("approved") => {
                let sender = message.sender.clone().unwrap_or_default();
                if counted.contains(&sender) {
                    return Ok(vec![consumed]);
                }
                if counted.len() + 1 < approval.quorum as usize {
                    return Ok(vec![Event::DecisionCounted { path: path.to_owned(), n: message.n }]);
                }
                Ok(vec![consumed, succeed(output)])
            }
            Some("rejected") if approval.fail_on_reject => {
                let text = field("comment")
                    .as_str()
                    .filter(|c| !c.is_empty())
                    .map_or_else(|| "rejected".to_owned(), |c| format!("rejected: {c}"));
                let mut events = vec![consumed];
                events.extend(self.fail(
                    step,
                    path,
                    Failure::permanent("approval.rejected", text).with_detail(output),
                )?);
                Ok(events)
            }
            Some("rejected" | "changes_requested") => Ok(vec![consumed, succeed(output)]),
            _ => Ok(vec![consumed]),
        }
    }

    /// What the sender of an update is told by the step that takes it.
    fn reply(
        &self,
        spec: &Await,
        message: &Message,
        fits: bool,
        path: &str,
    ) -> Result<Result<Value, Failure>, Illegal> {
        if !fits {
            let text = format!("`{path}` took it, whose form it does not satisfy: give its signal a name of its own");
            return Ok(Err(Failure::permanent("update.form", text)));
        }
        let Some(reply) = &spec.reply else { return Ok(Ok(message.payload.clone())) };
        let mut place = self.place(container(path))?;
        place.extra.insert("signal".into(), candidate(message));
        Ok(place.resolve(reply).and_then(|result| {
            let bytes = serde_json::to_string(&result).map_or(usize::MAX, |t| t.len());
            if bytes > OUTPUT_BYTES_MAX {
                let text = format!("the reply is {bytes} bytes; the limit is {OUTPUT_BYTES_MAX}");
                return Err(Failure::permanent("limit.size", text));
            }
            Ok(result)
        }))
    }

    pub(super) fn await_timed_out(&self, step: &Step, spec: &Await, path: &str) -> Result<Vec<Event>, Illegal> {
        let now = self.moment.now;
        let decided =
            |decision: &str| Ok(json!({ "decision": decision, "by": null, "at": now, "comment": "", "data": null }));
        let code = if spec.approval.is_some() { "approval.timeout" } else { "signal.timeout" };
        let output = match (spec.on_timeout, &spec.default) {
            (OnTimeout::Default, Some(default)) => self.place(container(path))?.resolve(default),
            (OnTimeout::Approve, _) => decided("approved"),
            (OnTimeout::Reject, _) if spec.approval.is_some_and(|a| a.fail_on_reject) => {
                Err(Failure::permanent("approval.rejected", "nobody decided in time, which counts as rejected"))
            }
            (OnTimeout::Reject, _) => decided("rejected"),
            (OnTimeout::Fail | OnTimeout::Default, _) => Err(Failure::permanent(code, "nobody answered in time")),
        };
        match output {
            Err(failure) => self.fail(step, path, failure),
            Ok(output) => Ok(vec![Event::StepEnded {
                path: path.to_owned(),
                status: StepStatus::Succeeded,
                output: Some(output),
                failure: None,
                tolerated: false,
                hoist: false,
                extras: json!({ "by": null, "at": now, "timed_out": true }),
                at: now,
            }]),
        }
    }
}

/// `signal` in expressions.
fn candidate(message: &Message) -> Value {
    let mut candidate = message.payload.clone();
    if let Value::Object(map) = &mut candidate {
        map.insert("meta".into(), json!({ "by": message.sender }));
    }
    candidate
}
