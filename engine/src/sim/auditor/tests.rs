//! Every check of the auditor notices its own corruption of evidence that is fine, and no other check does.

use super::*;
use crate::{
    event::{Ending, Event, Opened, Outcome, StepStatus},
    failure::Failure,
    ids::{AttemptId, RunId},
    view::RunStatus,
};
use serde_json::json;
use uuid::Uuid;

/// A run that calls [`FIRST`] and cleans up, under two owners.
const CALLER: u128 = 1;
/// Continues as [`SECOND`], which takes what was sent to it.
const FIRST: u128 = 2;
const SECOND: u128 = 3;
/// Not there, if no corruption brings it.
const OTHER: u128 = 4;
const CLEAN: &str = "!finally/clean";

fn run(n: u128) -> RunId {
    RunId(Uuid::from_u128(n))
}

fn attempt_id(n: u32) -> AttemptId {
    AttemptId(Uuid::from_u128(100 + u128::from(n)))
}

fn at() -> Instant {
    "2026-11-25T12:00:00Z".parse().expect("an instant")
}

fn run_started() -> Event {
    let (env, calls) = (BTreeMap::new(), BTreeMap::new());
    Event::RunStarted { inputs: json!({}), env, calls, at: at(), deadline: at() }
}

fn step_started(path: &str, opened: Opened) -> Event {
    Event::StepStarted { path: path.into(), at: at(), opened }
}

fn step_ended(path: &str) -> Event {
    Event::StepEnded {
        path: path.into(),
        status: StepStatus::Succeeded,
        output: None,
        failure: None,
        tolerated: false,
        hoist: false,
        extras: Value::Null,
        at: at(),
    }
}

fn working() -> Opened {
    let (activity, queue_deadline) = ("work@1".into(), at());
    Opened::Activity { activity, input: json!({}), overrides: Vec::new(), queue_deadline, total_deadline: None }
}

fn asking() -> Opened {
    Opened::Await { signal: "answer".into(), deadline: at(), show: None }
}

fn calling(child: u128, terminate: bool) -> Opened {
    let (workflow, definition) = ("child".into(), String::new());
    Opened::Call { child: run(child), workflow, inputs: json!({}), definition, propagate: true, terminate }
}

/// The n-th of its step; `id` is the only one of the evidence.
fn attempt_started(path: &str, n: u32, id: u32) -> Event {
    let (path, activity) = (path.into(), "work@1".into());
    Event::AttemptStarted { path, attempt: n, attempt_id: attempt_id(id), activity, at: at(), deadline: at() }
}

fn attempt_ended(path: &str, n: u32, id: u32, outcome: Outcome) -> Event {
    Event::AttemptEnded {
        path: path.into(),
        attempt: n,
        attempt_id: attempt_id(id),
        activity: "work@1".into(),
        outcome,
        output: None,
        failure: None,
        at: at(),
    }
}

fn received(n: u64) -> Event {
    Event::SignalReceived { n, name: "answer".into(), payload: json!({}), sender: None, at: at() }
}

fn consumed(path: &str, n: u64) -> Event {
    Event::SignalConsumed { path: path.into(), n }
}

fn accepted(n: u64, id: &str) -> Event {
    let (id, name) = (id.into(), "answer".into());
    Event::UpdateAccepted { n, id, name, payload: json!({}), sender: None, at: at() }
}

fn rejected(n: u64, id: &str) -> Event {
    let (id, name, problems) = (id.into(), "answer".into(), Vec::new());
    Event::UpdateRejected { n, id, name, payload: json!({}), sender: None, problems, at: at() }
}

fn answered(path: &str, n: u64, id: &str) -> Event {
    let (path, id) = (path.into(), id.into());
    Event::UpdateCompleted { path, n, id, result: Some(json!("heard")), failure: None }
}

fn paused() -> Event {
    Event::RunPaused { reason: String::new(), by: None, at: at() }
}

fn resumed() -> Event {
    Event::RunResumed { reason: String::new(), by: None, halted: None, at: at() }
}

fn run_ending(ending: Ending) -> Event {
    Event::RunEnding { ending, at: at() }
}

fn wanted() -> Event {
    run_ending(Ending::Completed { output: json!({}) })
}

fn continued(next: u128) -> Event {
    run_ending(Ending::Continued { run: run(next), inputs: json!({}), definition: None })
}

fn cleans_up() -> Event {
    Event::FinallyStarted { at: at(), deadline: at() }
}

fn run_closed(status: RunStatus) -> Event {
    Event::RunClosed { status, output: None, failure: None, at: at() }
}

/// Evidence in which all is well: a takeover, a pause, an update, a call of a chain of two and a message that is handed on. What is in
/// it are the machine's own events, so that a word that the auditor does not know any more is one that it cannot judge here either.
fn fine() -> Evidence {
    let work = |n, id| attempt_started("work", n, id);
    let caller = [
        (1, vec![run_started(), step_started("work", working()), work(1, 1)]),
        (1, vec![attempt_ended("work", 1, 1, Outcome::Failed), work(2, 2)]),
        (2, vec![attempt_ended("work", 2, 2, Outcome::Lost), work(3, 3)]),
        (
            2,
            vec![
                attempt_ended("work", 3, 3, Outcome::Succeeded),
                step_ended("work"),
                step_started("call", calling(FIRST, false)),
                step_started("ask", asking()),
            ],
        ),
        (2, vec![accepted(1, "u"), answered("ask", 1, "u"), step_ended("ask")]),
        (2, vec![paused(), resumed(), step_ended("call"), wanted(), cleans_up()]),
        (2, vec![step_started(CLEAN, working()), attempt_started(CLEAN, 1, 4)]),
        (2, vec![attempt_ended(CLEAN, 1, 4, Outcome::Succeeded), step_ended(CLEAN), run_closed(RunStatus::Completed)]),
    ];
    let first = vec![run_started(), received(1), continued(SECOND), cleans_up(), run_closed(RunStatus::Continued)];
    let second = [
        (1, vec![run_started(), received(1), step_started("ask", asking()), consumed("ask", 1), step_ended("ask")]),
        (1, vec![wanted(), cleans_up(), run_closed(RunStatus::Completed)]),
    ];
    let mut evidence = Evidence::default();
    let fact = |n, status: &str, epoch| RunFact {
        id: run(n).to_string(),
        status: status.into(),
        epoch,
        inbox_n: 1,
        parent: (n != CALLER).then(|| run(CALLER).to_string()),
        ..RunFact::default()
    };
    evidence.runs = vec![fact(CALLER, "completed", 2), fact(FIRST, "continued", 1), fact(SECOND, "completed", 1)];
    goes_on_from(&mut evidence, SECOND, FIRST);
    write(&mut evidence, CALLER, caller);
    write(&mut evidence, FIRST, [(1, first)]);
    write(&mut evidence, SECOND, second);
    let attempts: Vec<String> = (1..=4).map(|n| attempt_id(n).to_string()).collect();
    (evidence.hook_started, evidence.hook_ended, evidence.acted) = (attempts.clone(), attempts.clone(), attempts);
    let message = |n, id: &str| (run(n).to_string(), 1, Some(id.to_owned()));
    evidence.messages = vec![message(CALLER, "update u"), message(FIRST, "m"), message(SECOND, "m")];
    evidence
}

/// Rows (epoch, events) of a run.
fn write(evidence: &mut Evidence, n: u128, rows: impl IntoIterator<Item = (i64, Vec<Event>)>) {
    for (epoch, events) in rows {
        let fact = fact(evidence, n);
        fact.seq += 1;
        let (id, seq) = (fact.id.clone(), fact.seq);
        evidence.history.push((id, seq, epoch, json!(events)));
    }
}

fn goes_on_from(evidence: &mut Evidence, n: u128, before: u128) {
    let fact = fact(evidence, n);
    (fact.first, fact.continued_from) = (Some(run(FIRST).to_string()), Some(run(before).to_string()));
}

/// Of a run, as its row says.
fn fact(evidence: &mut Evidence, n: u128) -> &mut RunFact {
    let id = run(n).to_string();
    evidence.runs.iter_mut().find(|fact| fact.id == id).expect("a run of the evidence")
}

/// A row of the history.
fn row(evidence: &mut Evidence, n: u128, seq: i64) -> &mut (String, i64, i64, Value) {
    let id = run(n).to_string();
    evidence.history.iter_mut().find(|row| row.0 == id && row.1 == seq).expect("a row of the evidence")
}

fn events(evidence: &mut Evidence, n: u128, seq: i64) -> &mut Vec<Value> {
    row(evidence, n, seq).3.as_array_mut().expect("events")
}

/// Puts an event into a row, before the one that is there at this place.
fn insert(evidence: &mut Evidence, (n, seq): (u128, i64), place: usize, event: Event) {
    events(evidence, n, seq).insert(place, json!(event));
}

/// Takes an event of a kind out of a row.
fn remove(evidence: &mut Evidence, (n, seq): (u128, i64), kind: &str) -> Value {
    let events = events(evidence, n, seq);
    let place = events.iter().position(|event| event["type"] == kind).expect("an event of the kind");
    events.remove(place)
}

/// The event of a kind in a row.
fn edit<'a>(evidence: &'a mut Evidence, (n, seq): (u128, i64), kind: &str) -> &'a mut Value {
    events(evidence, n, seq).iter_mut().find(|event| event["type"] == kind).expect("an event of the kind")
}

/// The second of the chain has not ended yet, and somebody drives it.
fn reopen(evidence: &mut Evidence) {
    let fact = fact(evidence, SECOND);
    (fact.status, fact.owned, fact.seq) = ("running".into(), true, 1);
    evidence.history.retain(|(of, seq, ..)| *of != run(SECOND).to_string() || *seq == 1);
}

/// One run more: it is terminated and has done nothing.
fn another(evidence: &mut Evidence) -> &mut RunFact {
    let fact = RunFact { id: run(OTHER).to_string(), status: "terminated".into(), ..RunFact::default() };
    evidence.runs.push(fact);
    write(evidence, OTHER, [(0, vec![run_closed(RunStatus::Terminated)])]);
    self::fact(evidence, OTHER)
}

/// What is corrupted: the check that notices, words of what it says, and how.
type Corruption = (Check, &'static str, fn(&mut Evidence));

/// At least one for each thing that the auditor says.
pub(in crate::sim) const CORRUPTIONS: &[Corruption] = &[
    (Check::Leftover, "has an owner", |e| fact(e, CALLER).owned = true),
    (Check::Leftover, "a place in the queue", |e| fact(e, FIRST).queued = true),
    (Check::Reachable, "nobody owns or may claim it", |e| {
        reopen(e);
        fact(e, SECOND).owned = false;
    }),
    (Check::Closed, "and then unblocked", |e| insert(e, (CALLER, 8), 3, Event::Unblocked {})),
    (Check::Closed, "and then run_closed", |e| insert(e, (CALLER, 8), 3, run_closed(RunStatus::Completed))),
    (Check::Closed, "its history says Some(\"completed\")", |e| fact(e, CALLER).status = "failed".into()),
    (Check::Closed, "its history says None", |e| drop(remove(e, (CALLER, 8), "run_closed"))),
    (Check::History, "goes from 4 to 6", |e| {
        e.history.retain(|(of, seq, ..)| *of != run(CALLER).to_string() || *seq != 5);
    }),
    (Check::History, "counts 9 transitions and has 8", |e| fact(e, CALLER).seq += 1),
    (Check::Epochs, "written under epoch 1, after 2", |e| row(e, CALLER, 5).2 = 1),
    (Check::Epochs, "written under epoch 3, after 2", |e| row(e, CALLER, 6).2 = 3),
    (Check::Epochs, "written under epoch 2, after 2", |e| fact(e, CALLER).epoch = 1),
    (Check::Once, "step work of run", |e| insert(e, (CALLER, 2), 0, step_started("work", working()))),
    (Check::Once, "step ask of run", |e| insert(e, (CALLER, 5), 3, step_started("ask", asking()))),
    (Check::Once, "ended without being open", |e| drop(remove(e, (CALLER, 1), "step_started"))),
    (Check::Once, "ended without being open", |e| insert(e, (CALLER, 5), 3, step_ended("ask"))),
    (Check::Once, "was started 1 and ended 0 times", |e| {
        remove(e, (CALLER, 8), "attempt_ended");
        e.hook_ended.pop();
    }),
    (Check::Once, "was started 1 and ended 2 times", |e| {
        insert(e, (CALLER, 8), 1, attempt_ended(CLEAN, 1, 4, Outcome::Cancelled));
    }),
    (Check::Once, "was started 2 and ended 1 times", |e| insert(e, (CALLER, 7), 2, attempt_started(CLEAN, 2, 4))),
    (Check::Once, "ended before it started", |e| {
        let mut ended = remove(e, (CALLER, 8), "attempt_ended");
        ended["outcome"] = json!(Outcome::Cancelled);
        events(e, CALLER, 7).insert(1, ended);
    }),
    (Check::Order, "an attempt of work of run", |e| {
        let ended = remove(e, (CALLER, 4), "step_ended");
        events(e, CALLER, 3).insert(1, ended);
    }),
    (Check::Order, "started after its end", |e| {
        let ending = remove(e, (CALLER, 6), "run_ending");
        events(e, CALLER, 3).insert(1, ending);
    }),
    (Check::Order, "attempt 3 of work", |e| edit(e, (CALLER, 2), "attempt_started")["attempt"] = json!(3)),
    (Check::Order, "attempt 1 of work", |e| edit(e, (CALLER, 3), "attempt_started")["attempt"] = json!(1)),
    (Check::Results, "of epoch 1 succeeded in 2", |e| {
        edit(e, (CALLER, 3), "attempt_ended")["outcome"] = json!(Outcome::Succeeded);
    }),
    (Check::Results, "of epoch 1 failed in 2", |e| {
        edit(e, (CALLER, 3), "attempt_ended")["outcome"] = json!(Outcome::Failed);
    }),
    (Check::Messages, "received twice or never sent", |e| insert(e, (SECOND, 1), 2, received(1))),
    (Check::Messages, "received twice or never sent", |e| insert(e, (SECOND, 1), 2, received(2))),
    // One that its sender has given no id.
    (Check::Messages, "was consumed twice", |e| {
        fact(e, CALLER).inbox_n = 2;
        for event in [consumed("ask", 2), Event::DecisionCounted { path: "ask".into(), n: 2 }, received(2)] {
            insert(e, (CALLER, 5), 0, event);
        }
    }),
    (Check::Messages, "before it came", |e| events(e, SECOND, 1).swap(1, 3)),
    (Check::Inbox, "message 2 of run", |e| e.messages.push((run(CALLER).to_string(), 2, Some("update u".into())))),
    (Check::Updates, "was [], and then update_completed", |e| {
        edit(e, (CALLER, 5), "update_completed")["id"] = json!("v");
    }),
    (Check::Updates, "was [\"update_accepted\"], and then update_accepted", |e| {
        fact(e, CALLER).inbox_n = 2;
        insert(e, (CALLER, 5), 1, accepted(2, "u"));
        events(e, CALLER, 5).remove(2);
    }),
    (Check::Updates, "was [\"update_accepted\", \"update_completed\"], and then update_rejected", |e| {
        fact(e, CALLER).inbox_n = 2;
        insert(e, (CALLER, 5), 2, rejected(2, "u"));
    }),
    (Check::Updates, "was [\"update_accepted\", \"update_completed\"], and then update_completed", |e| {
        fact(e, CALLER).inbox_n = 2;
        insert(e, (CALLER, 5), 2, received(2));
        insert(e, (CALLER, 5), 3, answered("ask", 2, "u"));
    }),
    (Check::Updates, "was [\"update_accepted\"], and then update_completed", |e| {
        edit(e, (CALLER, 5), "update_completed")["failure"] = json!(Failure::cancelled());
    }),
    (Check::Updates, "was [\"update_accepted\"], and then update_completed", |e| {
        drop(edit(e, (CALLER, 5), "update_completed").as_object_mut().expect("an event").remove("result"));
    }),
    (Check::Paused, "and then finally_started", |e| {
        let resumed = remove(e, (CALLER, 6), "run_resumed");
        events(e, CALLER, 6).push(resumed);
    }),
    (Check::Paused, "and then step_started", |e| insert(e, (CALLER, 4), 2, paused())),
    (Check::Paused, "and then attempt_started work", |e| insert(e, (CALLER, 3), 1, paused())),
    (Check::Ending, "did not clean up", |e| drop(remove(e, (CALLER, 6), "finally_started"))),
    (Check::Ending, "was ending as None", |e| drop(remove(e, (CALLER, 6), "run_ending"))),
    (Check::Ending, "was ending as Some(\"cancelled\")", |e| {
        *edit(e, (CALLER, 6), "run_ending") = json!(run_ending(Ending::Cancelled { reason: String::new() }));
    }),
    (Check::Hook, "told twice that an attempt started", |e| e.hook_started.push(attempt_id(1).to_string())),
    (Check::Hook, "told twice that an attempt ended", |e| e.hook_ended.push(attempt_id(1).to_string())),
    (Check::Hook, "do not agree", |e| drop(e.hook_started.pop())),
    (Check::Hook, "do not agree", |e| e.hook_ended.push(attempt_id(5).to_string())),
    (Check::Acts, "ran twice", |e| e.acted.push(attempt_id(1).to_string())),
    (Check::Acts, "no history knows of it", |e| e.acted.push(attempt_id(5).to_string())),
    (Check::Chains, "is continued, and [] go on in its place", |e| fact(e, SECOND).continued_from = None),
    (Check::Chains, "is completed, and [\"00000000-0000-0000-0000-000000000004\"] go on", |e| {
        another(e);
        goes_on_from(e, OTHER, SECOND);
        fact(e, OTHER).parent = Some(run(CALLER).to_string());
        e.messages.push((run(OTHER).to_string(), 1, Some("m".into())));
    }),
    (Check::Chains, "000000000003\", \"00000000-0000-0000-0000-000000000004\"] go on", |e| {
        another(e);
        goes_on_from(e, OTHER, FIRST);
        fact(e, OTHER).parent = Some(run(CALLER).to_string());
        e.messages.push((run(OTHER).to_string(), 1, Some("m".into())));
    }),
    (Check::Chains, "000000000003\"] go on in its place", |e| {
        *edit(e, (FIRST, 1), "run_ending") = json!(continued(OTHER))
    }),
    (Check::Chains, "two runs of the chain", |e| {
        reopen(e);
        let row = another(e);
        (row.status, row.owned, row.seq, row.first) = ("running".into(), true, 0, Some(run(FIRST).to_string()));
        e.history.retain(|(of, ..)| *of != run(OTHER).to_string());
    }),
    (Check::HandedOn, "message m to run", |e| drop(e.messages.pop())),
    (Check::HandedOn, "message m was taken twice", |e| insert(e, (FIRST, 1), 2, consumed("ask", 1))),
    (Check::Children, "and there is none", |e| {
        insert(e, (CALLER, 4), 4, step_started("more", calling(OTHER, false)));
    }),
    (Check::Children, "outlives its parent", |e| {
        reopen(e);
        edit_call(e)["terminate"] = json!(true);
    }),
    (Check::Children, "calls it", |e| fact(e, FIRST).parent = Some(run(SECOND).to_string())),
    (Check::Children, "and None calls it", |e| another(e).parent = Some(run(CALLER).to_string())),
    (Check::Children, "call_stopped of call before its time", |e| {
        let stopped = || Event::CallStopped { path: "call".into(), at: at(), until: at() };
        insert(e, (CALLER, 5), 0, stopped());
        insert(e, (CALLER, 5), 0, stopped());
    }),
];

/// What the caller's call opened.
fn edit_call(evidence: &mut Evidence) -> &mut Value {
    let call = events(evidence, CALLER, 4).iter_mut().find(|event| event["path"] == "call").expect("the call");
    &mut call["opened"]
}

#[test]
fn each_corruption_is_noticed_by_its_own_check_and_by_no_other() {
    assert_eq!(audit(&fine()), [], "all is well");
    let mut wrong = Vec::new();
    for (n, (check, words, corrupt)) in CORRUPTIONS.iter().enumerate() {
        let mut evidence = fine();
        corrupt(&mut evidence);
        let findings = audit(&evidence);
        let own = findings.iter().all(|finding| finding.check == *check);
        if !own || !findings.iter().any(|finding| finding.text.contains(words)) {
            wrong.push(format!("{n}: {check:?}, `{words}`: {findings:#?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// What is found in one history of a closed run.
fn found(status: &str, events: &[Value]) -> Vec<Check> {
    let run = RunFact { id: "r".into(), status: status.into(), seq: 1, epoch: 1, ..RunFact::default() };
    let history = vec![("r".to_owned(), 1, 1, json!(events))];
    let evidence = Evidence { runs: vec![run], history, ..Evidence::default() };
    audit(&evidence).into_iter().map(|finding| finding.check).collect()
}

fn event(kind: &str) -> Value {
    json!({ "type": kind })
}
fn ending(kind: &str) -> Value {
    json!({"type": "run_ending", "ending": {"kind": kind}})
}
fn closed(status: &str) -> Value {
    json!({"type": "run_closed", "status": status})
}

#[test]
fn a_run_that_was_cancelled_cleans_up_and_ends_as_cancelled() {
    let cleans = event("finally_started");
    assert_eq!(found("cancelled", &[ending("cancelled"), cleans.clone(), closed("cancelled")]), []);
    assert_eq!(found("cancelled", &[ending("cancelled"), closed("cancelled")]), [Check::Ending]);
    assert_eq!(found("completed", &[ending("cancelled"), cleans.clone(), closed("completed")]), [Check::Ending]);
    assert_eq!(found("failed", &[ending("completed"), cleans.clone(), closed("failed")]), []);
    assert_eq!(found("failed", &[ending("cancelled"), cleans, closed("failed")]), [Check::Ending]);
    assert_eq!(found("terminated", &[closed("terminated")]), [], "at once");
    assert_eq!(found("completed", &[closed("completed")]), [Check::Ending], "it never ended");
}

#[test]
fn a_stopped_call_waits_as_long_as_it_says() {
    let at = |second: u32| format!("2026-11-25T12:00:{second:02}Z");
    let call = |kind: &str, now: u32, until: u32| json!({"type": kind, "path": "c", "at": at(now), "until": at(until)});
    let end =
        |now: u32| json!({"type": "step_ended", "path": "c", "at": at(now), "failure": {"code": "call.abandoned"}});
    let stopped = || call("call_stopped", 0, 10);
    let overdue = |n: u32| call("call_overdue", 10 * n, 10 * n + 10);
    let whole = |middle: &[Value]| {
        let begun = json!({"type": "step_started", "path": "c"});
        found("terminated", &[&[begun], middle, &[closed("terminated")]].concat())
    };
    assert_eq!(whole(&[stopped(), overdue(1), overdue(2), overdue(3), end(40)]), []);
    assert_eq!(whole(&[stopped(), call("call_stopped", 1, 5), call("call_overdue", 5, 6)]), [], "it had less time");
    assert_eq!(whole(&[stopped(), call("call_stopped", 1, 11)]), [Check::Children]);
    assert_eq!(whole(&[stopped(), call("call_overdue", 9, 20)]), [Check::Children]);
    assert_eq!(whole(&[overdue(1)]), [Check::Children]);
    assert_eq!(
        whole(&[stopped(), overdue(1), overdue(2), end(40)]),
        [Check::Children],
        "it was not ended often enough"
    );
    assert_eq!(whole(&[stopped(), overdue(1), overdue(2), overdue(3), end(39)]), [Check::Children]);
}

#[test]
fn nothing_begins_in_a_paused_run() {
    let end = [event("run_resumed"), ending("completed"), event("finally_started"), closed("completed")];
    let begins = json!({"type": "step_started", "path": "a"});
    let with = |middle: &[Value]| [&[event("run_paused")], middle, &end].concat();
    assert_eq!(found("completed", &with(&[])), []);
    assert_eq!(found("completed", &with(&[begins])), [Check::Paused]);
}
