//! Signals and approvals: what an await takes, counts, lets pass, or does without.

use super::{Progress, Walk, container};
use crate::{
    definition::{Await, Kind, OnTimeout, Step, expr},
    event::{Event, StepStatus},
    failure::Failure,
    machine::{
        Illegal,
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
            // Nobody decides on what was not shown yet: a second click on the plan of the round before approves nothing.
            if spec.approval.is_some() && node.started_at.is_some_and(|began| message.at < began) {
                return Ok(Progress::Emit(vec![Event::SignalConsumed { path: path.to_owned(), n: message.n }]));
            }
            if let Some(filter) = &spec.filter {
                let mut place = self.place(container(path))?;
                let mut candidate = message.payload.clone();
                if let Value::Object(map) = &mut candidate {
                    map.insert("meta".into(), json!({ "by": message.sender }));
                }
                place.extra.insert("signal".into(), candidate);
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
        let consumed = Event::SignalConsumed { path: path.to_owned(), n: message.n };
        // Surfaces check the form before they send; what slipped through is dropped here.
        if spec.form.as_ref().is_some_and(|form| !jsonschema::is_valid(form, &message.payload)) {
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
