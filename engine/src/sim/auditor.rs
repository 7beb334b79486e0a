//! Judges a finished history by its rows alone. It knows the words of the events and nothing of the code that wrote them.

use super::{Check, Finding};
use chrono::{DateTime, Utc};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

type Instant = DateTime<Utc>;

/// What a simulation leaves behind.
#[derive(Debug, Default)]
pub(super) struct Evidence {
    pub(super) runs: Vec<RunFact>,
    /// (run, seq, epoch, events), by run, in the order of writing.
    pub(super) history: Vec<(String, i64, i64, Value)>,
    /// Attempts that the hook was told to start and to settle, in order.
    pub(super) hook_started: Vec<String>,
    pub(super) hook_ended: Vec<String>,
    /// Attempts whose code really ran.
    pub(super) acted: Vec<String>,
    /// (run, number, sender's id).
    pub(super) messages: Vec<(String, i64, Option<String>)>,
}

/// A run, as its row says.
#[derive(Debug, Default)]
pub(super) struct RunFact {
    pub(super) id: String,
    pub(super) status: String,
    pub(super) owned: bool,
    pub(super) queued: bool,
    pub(super) seq: i64,
    pub(super) epoch: i64,
    pub(super) inbox_n: i64,
    /// The run that called it.
    pub(super) parent: Option<String>,
    /// First and previous run of its chain.
    pub(super) first: Option<String>,
    pub(super) continued_from: Option<String>,
}

impl Evidence {
    /// How often a text stands in the history.
    pub(super) fn count(&self, text: &str) -> u32 {
        let all = self.history.iter().map(|(.., events)| events.to_string().matches(text).count());
        u32::try_from(all.sum::<usize>()).unwrap_or(u32::MAX)
    }

    /// How many runs ended so.
    pub(super) fn closed_as(&self, status: &str) -> u32 {
        u32::try_from(self.runs.iter().filter(|run| run.status == status).count()).unwrap_or(u32::MAX)
    }
}

/// One attempt, as the history tells of it.
#[derive(Default)]
struct Attempt {
    run: String,
    path: String,
    starts: u32,
    ends: u32,
    started_in: i64,
}

/// Everything that is wrong, a sentence each. Empty is good.
pub(super) fn audit(evidence: &Evidence) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut attempts: BTreeMap<String, Attempt> = BTreeMap::new();
    for run in &evidence.runs {
        audit_row(run, &mut findings);
        audit_history(run, evidence, &mut attempts, &mut findings);
    }
    let closed: BTreeSet<&str> = evidence.runs.iter().filter(|r| is_closed(&r.status)).map(|r| r.id.as_str()).collect();
    for (id, attempt) in &attempts {
        let ends = u32::from(closed.contains(attempt.run.as_str()));
        if attempt.starts != 1 || attempt.ends > 1 || attempt.ends < ends {
            findings.push(Check::Once.finds(format!(
                "attempt {id} of {} was started {} and ended {} times",
                attempt.path, attempt.starts, attempt.ends
            )));
        }
    }
    audit_hook(evidence, &attempts, &mut findings);
    audit_acts(evidence, &attempts, &mut findings);
    audit_messages(evidence, &mut findings);
    audit_children(evidence, &mut findings);
    audit_chains(evidence, &mut findings);
    audit_handed_on(evidence, &mut findings);
    findings
}

fn is_closed(status: &str) -> bool {
    ["completed", "failed", "cancelled", "terminated", "continued"].contains(&status)
}

fn audit_row(run: &RunFact, findings: &mut Vec<Finding>) {
    let RunFact { id, status, owned, queued, .. } = run;
    if is_closed(status) && (*owned || *queued) {
        findings.push(Check::Leftover.finds(format!("run {id} is {status} and has an owner or a place in the queue")));
    }
    if !is_closed(status) && status != "quarantined" && !owned && !queued {
        findings.push(Check::Reachable.finds(format!("run {id} is {status}, and nobody owns or may claim it")));
    }
}

fn text<'a>(event: &'a Value, field: &str) -> &'a str {
    event[field].as_str().unwrap_or_default()
}

fn audit_history(
    run: &RunFact,
    evidence: &Evidence,
    attempts: &mut BTreeMap<String, Attempt>,
    findings: &mut Vec<Finding>,
) {
    let id = &run.id;
    let (mut next, mut newest, mut closed) = (1, 0, None);
    let (mut open, mut ended) = (BTreeSet::new(), BTreeSet::new());
    let mut ending = false;
    let mut told = Told::default();
    let (mut updates, mut calls) = (BTreeMap::new(), BTreeMap::new());
    let (mut received, mut used, mut numbers) = (BTreeSet::new(), BTreeSet::new(), BTreeMap::<String, u64>::new());
    for (_, seq, epoch, events) in evidence.history.iter().filter(|(of, ..)| of == id) {
        if *seq != next {
            findings.push(Check::History.finds(format!("the history of run {id} goes from {} to {seq}", next - 1)));
        }
        next = seq + 1;
        if *epoch < newest || *epoch > run.epoch {
            findings.push(
                Check::Epochs.finds(format!("row {seq} of run {id} was written under epoch {epoch}, after {newest}")),
            );
        }
        newest = newest.max(*epoch);
        for event in events.as_array().map_or(&[][..], Vec::as_slice) {
            let (kind, path) = (text(event, "type"), text(event, "path"));
            if closed.is_some() {
                findings.push(Check::Closed.finds(format!("run {id} closed, and then {kind} {path}")));
            }
            match kind {
                "run_closed" => closed = Some(text(event, "status").to_owned()),
                "run_ending" => ending = true,
                "step_started" if !open.insert(path.to_owned()) || ended.contains(path) => {
                    findings.push(Check::Once.finds(format!("step {path} of run {id} began twice")));
                }
                "step_ended" => {
                    let unstarted = !open.contains(path);
                    if unstarted || !ended.insert(path.to_owned()) {
                        findings.push(Check::Once.finds(format!("step {path} of run {id} ended without being open")));
                    }
                }
                "attempt_started" => {
                    let attempt = attempts.entry(text(event, "attempt_id").to_owned()).or_default();
                    (attempt.run, attempt.path) = (id.clone(), path.to_owned());
                    attempt.starts += 1;
                    attempt.started_in = *epoch;
                    if ended.contains(path) || (ending && !path.starts_with("!finally/")) {
                        findings.push(
                            Check::Order.finds(format!("an attempt of {path} of run {id} started after its end")),
                        );
                    }
                    let number = numbers.entry(path.to_owned()).or_default();
                    *number += 1;
                    if event["attempt"].as_u64() != Some(*number) {
                        findings.push(
                            Check::Order
                                .finds(format!("attempt {} of {path} of run {id} is its {number}th", event["attempt"])),
                        );
                    }
                }
                "attempt_ended" => {
                    let attempt = attempts.entry(text(event, "attempt_id").to_owned()).or_default();
                    attempt.ends += 1;
                    if attempt.starts == 0 {
                        findings.push(
                            Check::Once.finds(format!("an attempt of {path} of run {id} ended before it started")),
                        );
                    }
                    let outcome = text(event, "outcome");
                    // Only its own owner knows how it went; whoever comes later may say that it is lost or stopped.
                    if attempt.started_in != *epoch && !["lost", "cancelled"].contains(&outcome) {
                        findings.push(Check::Results.finds(format!(
                            "an attempt of {path} of run {id} of epoch {} {outcome} in {epoch}",
                            attempt.started_in
                        )));
                    }
                }
                "signal_received" | "signal_dropped" | "update_accepted" | "update_rejected" => {
                    let n = event["n"].as_i64().unwrap_or(-1);
                    if !received.insert(n) || n > run.inbox_n {
                        findings.push(
                            Check::Messages.finds(format!("message {n} of run {id} was received twice or never sent")),
                        );
                    }
                }
                "signal_consumed" | "decision_counted" | "update_completed" => {
                    let n = event["n"].as_i64().unwrap_or(-1);
                    if !used.insert(n) || !received.contains(&n) {
                        findings.push(
                            Check::Messages
                                .finds(format!("message {n} of run {id} was consumed twice or before it came")),
                        );
                    }
                }
                _ => {}
            }
            audit_update(run, event, &mut updates, findings);
            audit_call(run, event, &mut calls, findings);
            told.hear(run, event, findings);
        }
    }
    if next - 1 != run.seq {
        findings.push(Check::History.finds(format!("run {id} counts {} transitions and has {}", run.seq, next - 1)));
    }
    if is_closed(&run.status) && closed.as_deref() != Some(run.status.as_str()) {
        findings.push(Check::Closed.finds(format!("run {id} is {}, its history says {closed:?}", run.status)));
    }
}

/// What a run was told to do, by its history.
#[derive(Default)]
struct Told {
    paused: bool,
    /// Kind of the last `run_ending`.
    ending: Option<String>,
    cleans_up: bool,
}

impl Told {
    fn hear(&mut self, run: &RunFact, event: &Value, findings: &mut Vec<Finding>) {
        let (id, kind, path) = (&run.id, text(event, "type"), text(event, "path"));
        if self.paused && ["step_started", "attempt_started", "round_started", "finally_started"].contains(&kind) {
            findings.push(Check::Paused.finds(format!("run {id} is paused, and then {kind} {path}")));
        }
        match kind {
            "run_paused" => self.paused = true,
            "run_resumed" => self.paused = false,
            "run_ending" => self.ending = Some(text(&event["ending"], "kind").to_owned()),
            "finally_started" => self.cleans_up = true,
            "run_closed" => {
                let status = text(event, "status");
                // A cleanup that fails makes a failure of what went well; an operator ends anything.
                let legal = match self.ending.as_deref() {
                    _ if status == "terminated" => true,
                    Some("completed" | "continued") => status == "failed" || Some(status) == self.ending.as_deref(),
                    Some(ending) => ending == status,
                    None => false,
                };
                // Every definition here has something to clean up.
                if !legal || (status != "terminated" && !self.cleans_up) {
                    findings.push(Check::Ending.finds(format!(
                        "run {id} was ending as {:?}, closed as {status}, and did {}clean up",
                        self.ending,
                        if self.cleans_up { "" } else { "not " }
                    )));
                }
            }
            _ => {}
        }
    }
}

/// Whoever asks twice hears the same: one verdict an id, one answer, and none without being accepted.
fn audit_update(
    run: &RunFact,
    event: &Value,
    updates: &mut BTreeMap<String, Vec<String>>,
    findings: &mut Vec<Finding>,
) {
    let kind = text(event, "type");
    if !kind.starts_with("update_") {
        return;
    }
    let id = text(event, "id");
    let told = updates.entry(id.to_owned()).or_default();
    let legal = match kind {
        "update_completed" => told.as_slice() == ["update_accepted"],
        _ => told.is_empty(),
    };
    if !legal || kind == "update_completed" && event.get("result").is_some() == event.get("failure").is_some() {
        findings.push(Check::Updates.finds(format!("update {id} of run {} was {told:?}, and then {kind}", run.id)));
    }
    told.push(kind.to_owned());
}

/// A stopped call waits for its child as long as it says: none is ended before its time, and none given up that was not ended.
fn audit_call(run: &RunFact, event: &Value, calls: &mut BTreeMap<String, (Instant, u32)>, findings: &mut Vec<Finding>) {
    let instant = |field: &str| text(event, field).parse::<Instant>().ok();
    let (kind, path) = (text(event, "type"), text(event, "path"));
    let legal = match (kind, calls.get(path).copied()) {
        ("call_stopped", known) => {
            let until = instant("until");
            calls.insert(path.to_owned(), (until.unwrap_or_default(), known.map_or(0, |(_, ended)| ended)));
            // Said again, it is less.
            until.is_some() && known.is_none_or(|(before, ended)| until < Some(before) && ended == 0)
        }
        ("call_overdue", Some((until, ended))) => {
            let (at, next) = (instant("at"), instant("until"));
            let ends = u32::from(event["spares"] != true);
            calls.insert(path.to_owned(), (next.unwrap_or_default(), ended + ends));
            at >= Some(until) && next > at
        }
        ("call_overdue", None) => false,
        ("step_ended", known) if event["failure"]["code"] == "call.abandoned" => {
            known.is_some_and(|(until, ended)| ended >= 3 && instant("at") >= Some(until))
        }
        _ => true,
    };
    if !legal {
        findings.push(Check::Children.finds(format!("run {}: {kind} of {path} before its time", run.id)));
    }
}

fn audit_hook(evidence: &Evidence, attempts: &BTreeMap<String, Attempt>, findings: &mut Vec<Finding>) {
    for (what, told, wanted) in [
        ("started", &evidence.hook_started, attempts.iter().filter(|(_, a)| a.starts > 0).map(|(id, _)| id).collect()),
        (
            "ended",
            &evidence.hook_ended,
            attempts.iter().filter(|(_, a)| a.ends > 0).map(|(id, _)| id).collect::<BTreeSet<_>>(),
        ),
    ] {
        let once: BTreeSet<&String> = told.iter().collect();
        if once.len() != told.len() {
            findings.push(Check::Hook.finds(format!("the hook was told twice that an attempt {what}")));
        }
        if let Some(odd) = once.symmetric_difference(&wanted).next() {
            findings.push(Check::Hook.finds(format!("hook and history do not agree that attempt {odd} {what}")));
        }
    }
}

fn audit_acts(evidence: &Evidence, attempts: &BTreeMap<String, Attempt>, findings: &mut Vec<Finding>) {
    let mut seen = BTreeSet::new();
    for id in &evidence.acted {
        if !seen.insert(id) {
            findings.push(Check::Acts.finds(format!("the code of attempt {id} ran twice")));
        }
        if attempts.get(id).is_none_or(|a| a.starts == 0) {
            findings.push(Check::Acts.finds(format!("attempt {id} ran, and no history knows of it")));
        }
    }
}

/// A run that closed as continued has the one run in its place that its history names, and no other has one; of a chain one run is
/// open at most.
fn audit_chains(evidence: &Evidence, findings: &mut Vec<Finding>) {
    let mut named = BTreeMap::new();
    for (run, .., events) in &evidence.history {
        for event in events.as_array().map_or(&[][..], Vec::as_slice) {
            if event["ending"]["kind"] == "continued" {
                named.insert(run.as_str(), text(&event["ending"], "run"));
            }
        }
    }
    let mut open = BTreeSet::new();
    for run in &evidence.runs {
        let next: Vec<&str> = evidence
            .runs
            .iter()
            .filter(|r| r.continued_from.as_ref() == Some(&run.id))
            .map(|r| r.id.as_str())
            .collect();
        let wanted = named.get(run.id.as_str()).filter(|_| run.status == "continued");
        if next != wanted.copied().into_iter().collect::<Vec<_>>() || (run.status == "continued") != wanted.is_some() {
            findings.push(
                Check::Chains.finds(format!("run {} is {}, and {next:?} go on in its place", run.id, run.status)),
            );
        }
        if !is_closed(&run.status) && !open.insert(run.first.as_ref().unwrap_or(&run.id)) {
            findings.push(Check::Chains.finds(format!("two runs of the chain of {} are open", run.id)));
        }
    }
}

/// What was sent to a run that continued as new is known to the next one, and no two runs of a chain take it.
fn audit_handed_on(evidence: &Evidence, findings: &mut Vec<Finding>) {
    let ids: BTreeMap<(&str, i64), &str> = evidence
        .messages
        .iter()
        .filter_map(|(run, n, id)| id.as_ref().map(|id| ((run.as_str(), *n), id.as_str())))
        .collect();
    for run in &evidence.runs {
        let Some(before) = &run.continued_from else { continue };
        let of =
            |run: &str| -> BTreeSet<&str> { ids.iter().filter(|((of, _), _)| *of == run).map(|(_, id)| *id).collect() };
        for lost in of(before).difference(&of(&run.id)) {
            findings
                .push(Check::HandedOn.finds(format!("message {lost} to run {before} is not known to run {}", run.id)));
        }
    }
    let mut taken = BTreeSet::new();
    for (run, .., events) in &evidence.history {
        let chain = evidence.runs.iter().find(|r| r.id == *run).and_then(|r| r.first.as_ref()).unwrap_or(run);
        for event in events.as_array().map_or(&[][..], Vec::as_slice) {
            let takes = ["signal_consumed", "decision_counted", "update_completed"].contains(&text(event, "type"));
            let id = event["n"].as_i64().and_then(|n| ids.get(&(run.as_str(), n)));
            if let (true, Some(id)) = (takes, id)
                && !taken.insert((chain, *id))
            {
                findings.push(Check::HandedOn.finds(format!("message {id} was taken twice in the chain of {chain}")));
            }
        }
    }
}

/// A child is there if and only if its parent's history calls it, and none outlives a call that ends it at once.
fn audit_children(evidence: &Evidence, findings: &mut Vec<Finding>) {
    let mut called = BTreeMap::new();
    for (run, .., events) in &evidence.history {
        for event in events.as_array().map_or(&[][..], Vec::as_slice) {
            let opened = &event["opened"];
            if let Some(child) = opened["child"].as_str() {
                let place = (run.as_str(), text(event, "path"), opened["terminate"] == true);
                called.insert(child, place);
            }
        }
    }
    let status = |id: &str| evidence.runs.iter().find(|r| r.id == id).map(|r| r.status.as_str());
    for (child, (parent, path, terminates)) in &called {
        // The open run of its chain is the child.
        let open = evidence.runs.iter().find(|r| r.first.as_deref() == Some(*child) && !is_closed(&r.status));
        match open.map(|r| r.status.as_str()).or_else(|| status(child)) {
            None => {
                findings.push(Check::Children.finds(format!("run {parent} calls {child} at {path}, and there is none")))
            }
            Some("running" | "pending" | "paused" | "cancelling")
                if *terminates && status(parent).is_some_and(is_closed) =>
            {
                findings.push(
                    Check::Children
                        .finds(format!("run {child} outlives its parent {parent}, whose {path} was to end it")),
                );
            }
            Some(_) => {}
        }
    }
    for run in evidence.runs.iter().filter(|r| r.parent.is_some()) {
        let place = called.get(run.first.as_deref().unwrap_or(&run.id)).map(|(parent, ..)| (*parent).to_owned());
        if place != run.parent {
            findings.push(
                Check::Children
                    .finds(format!("run {} has the parent {:?}, and {place:?} calls it", run.id, run.parent)),
            );
        }
    }
}

fn audit_messages(evidence: &Evidence, findings: &mut Vec<Finding>) {
    let mut seen = BTreeSet::new();
    for (run, n, dedupe_id) in &evidence.messages {
        if dedupe_id.as_ref().is_some_and(|key| !seen.insert((run, key))) {
            findings.push(Check::Inbox.finds(format!("message {n} of run {run} is there twice")));
        }
    }
}

#[cfg(test)]
pub(super) mod tests;
