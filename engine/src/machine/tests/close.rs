//! What becomes of a child when its parent's call is stopped, by every way in which a parent closes.

use super::*;
use crate::{
    definition::{Branch, ParentClose},
    event::StepStatus,
};

/// What the child was told.
#[derive(Debug, PartialEq)]
enum Told {
    Nothing,
    Cancel,
    Terminate,
}

/// A run with a call beside a step that can end it.
fn calling(parent_close: ParentClose) -> Bench {
    let (workflow, version) = ("child".into(), crate::definition::CallVersion::Latest);
    let call = step("c", Kind::Call { workflow, version, with: BTreeMap::new(), parent_close });
    let mut out = step("out", Kind::Finish { outputs: BTreeMap::new() });
    out.condition = Some(e("steps.a.output == 'finish'"));
    let branches = vec![
        Branch { name: "l".into(), steps: vec![call] },
        Branch { name: "r".into(), steps: vec![act("a", &[]), out] },
    ];
    let both = step("both", Kind::Parallel { branches, join: Join::All, fail_fast: true });
    let mut d = definition(vec![both]);
    d.timeout_ms = 60_000;
    let mut run = Bench::start(d);
    run.permits = 100;
    run
}

/// Tells the child's end to the run.
fn child_ends(run: &mut Bench, child: RunId) {
    let failure = Some(Failure::permanent("cancelled", "stopped"));
    let ended = Inbound::Child { run_id: child, completed: false, output: None, failure, cancelled: true };
    run.input(Input::Messages(vec![ended]));
}

#[test]
fn a_child_is_told_once_by_every_way_in_which_its_parent_closes() {
    let cancel = || Input::Messages(vec![Inbound::Cancel { reason: "enough".into(), until: None }]);
    let by_parent = || Input::Messages(vec![Inbound::Terminate { reason: "parent".into() }]);
    for (how, wanted) in [
        (ParentClose::Cancel, Told::Cancel),
        (ParentClose::Terminate, Told::Terminate),
        (ParentClose::Abandon, Told::Nothing),
    ] {
        for way in ["completed", "failed", "timed out", "cancelled", "terminated", "terminated by its parent"] {
            let mut run = calling(how);
            let child = run.children.pop().expect("started");
            match way {
                "completed" => run.ok("both:r/a", json!("finish")),
                "failed" => drop(run.end("both:r/a", Err(Failure::permanent("user.bad", "x")))),
                "timed out" => run.later(60_000),
                "cancelled" => drop(run.input(cancel())),
                "terminated" => drop(run.input(Input::Terminated { reason: "operator".into() })),
                _ => drop(run.input(by_parent())),
            }
            let told = match (run.children.as_slice(), run.ended_children.as_slice()) {
                ([], []) => Told::Nothing,
                ([one], []) if *one == child => Told::Cancel,
                ([], [one]) if *one == child => Told::Terminate,
                other => panic!("{how:?}, {way}: {other:?}"),
            };
            assert_eq!(told, wanted, "{how:?}, {way}");
            for path in run.live.keys().cloned().collect::<Vec<_>>() {
                run.end(&path, Err(Failure::cancelled()));
            }
            // A parent that is terminated waits for nobody; otherwise for those whom it told.
            let waits = !way.starts_with("terminated") && how != ParentClose::Abandon;
            assert_eq!(run.state.status.is_closed(), !waits, "{how:?}, {way}");
            child_ends(&mut run, child);
            assert!(run.state.status.is_closed(), "{how:?}, {way}");
            assert!(run.children.len() + run.ended_children.len() <= 1, "{how:?}, {way}: told once");
            assert_eq!(run.replayed(&run.definition, 0).divergence, None, "{how:?}, {way}");
        }
    }
}

#[test]
fn a_termination_among_other_messages_is_the_last_that_a_run_hears() {
    let mut run = Bench::start(definition(vec![act("a", &[])]));
    let cancel = || Inbound::Cancel { reason: "late".into(), until: None };
    let messages = vec![Inbound::Unblock, Inbound::Terminate { reason: "parent".into() }, cancel()];
    run.input(Input::Messages(messages));
    assert_eq!(run.state.status, RunStatus::Terminated);
    assert_eq!(run.cancels, ["a"]);
    assert_eq!(run.replayed(&run.definition, 0).divergence, None);
}

#[test]
fn what_was_written_before_there_was_a_choice_is_read_as_it_was() {
    for (word, how) in
        [("propagate", ParentClose::Cancel), ("detach", ParentClose::Abandon), ("terminate", ParentClose::Terminate)]
    {
        let kind: Kind = serde_json::from_value(
            json!({"call": {"workflow": "w", "version": "latest", "with": {}, "on_cancel": word}}),
        )
        .expect("read");
        assert!(matches!(kind, Kind::Call { parent_close, .. } if parent_close == how));
    }
    let old = json!({"type": "step_started", "path": "c", "at": "2026-11-24T12:00:00Z", "opened": {
        "kind": "call", "child": RunId::new(), "workflow": "w", "inputs": {}, "definition": "00", "propagate": true}});
    let event: Event = serde_json::from_value(old.clone()).expect("read");
    assert_eq!(event.format(), 1);
    assert_eq!(serde_json::to_value(&event).expect("json"), old, "and written as it was");
}

/// A run that stops and waits for its child, and the child.
fn stopping(how: ParentClose, until: Option<DateTime<Utc>>) -> (Bench, RunId) {
    let mut run = calling(how);
    let child = run.children.pop().expect("started");
    run.input(Input::Messages(vec![Inbound::Cancel { reason: "enough".into(), until }]));
    run.end("both:r/a", Err(Failure::cancelled()));
    run.children.clear();
    (run, child)
}

/// To the next instant at which something is due. Returns how long that took, in ms.
fn next(run: &mut Bench) -> i64 {
    let due = next_due(&run.definition, &run.state);
    let waited = (due - run.now).num_milliseconds();
    run.later(waited - 1);
    assert!(!run.state.status.is_closed(), "not before its time");
    run.later(1);
    waited
}

fn end_of_call(run: &Bench) -> (StepStatus, Option<String>) {
    let events = run.rows.iter().flat_map(|row| &row.events).map(|e| serde_json::from_value(e.clone()).expect("event"));
    events
        .filter_map(|event| match event {
            Event::StepEnded { path, status, failure, .. } if path == "both:l/c" => {
                Some((status, failure.map(|f| f.code)))
            }
            _ => None,
        })
        .next_back()
        .expect("the call has ended")
}

#[test]
fn a_child_that_never_hears_does_not_keep_its_parent() {
    // Each run that may stand below has its hour; then it is ended at once, three times.
    let cleanups = vec![CALL_STOP_MS; 7];
    for (how, spared) in [(ParentClose::Cancel, cleanups), (ParentClose::Terminate, vec![])] {
        let (mut run, child) = stopping(how, None);
        let first = if how == ParentClose::Cancel { CALL_STOP_MS } else { CALL_END_MS };
        let waits: Vec<i64> = std::iter::from_fn(|| (!run.state.status.is_closed()).then(|| next(&mut run))).collect();
        assert_eq!(waits, [&[first], &spared[..], &[CALL_END_MS; 3]].concat(), "{how:?}");
        let mut told: Vec<(RunId, bool)> = spared.iter().map(|_| (child, true)).collect();
        // And once more when it is given up.
        told.extend([(child, false); 4]);
        assert_eq!(run.overdue_children, told, "{how:?}");
        assert_eq!(
            (run.state.status, end_of_call(&run)),
            (RunStatus::Cancelled, (StepStatus::Cancelled, Some("call.abandoned".into())))
        );
        assert_eq!(run.replayed(&run.definition, 0).divergence, None, "{how:?}");
    }
}

#[test]
fn the_deeper_a_call_stands_the_fewer_cleanups_it_waits_for() {
    let mut run = calling(ParentClose::Cancel);
    run.depth = CALL_DEPTH_MAX - 1;
    run.input(Input::Messages(vec![Inbound::Cancel { reason: "enough".into(), until: None }]));
    run.end("both:r/a", Err(Failure::cancelled()));
    assert_eq!(next(&mut run), CALL_STOP_MS);
    assert_eq!(run.overdue_children.last().map(|(_, spares)| *spares), Some(false), "nobody stands below its child");
}

#[test]
fn a_child_that_ends_late_ends_its_call() {
    for turns in [0, 1, 8, 10] {
        let (mut run, child) = stopping(ParentClose::Cancel, None);
        for _ in 0..turns {
            next(&mut run);
        }
        child_ends(&mut run, child);
        assert_eq!(end_of_call(&run), (StepStatus::Cancelled, Some("cancelled".into())), "{turns}");
        assert_eq!(run.state.status, RunStatus::Cancelled);
        assert_eq!(run.replayed(&run.definition, 0).divergence, None, "{turns}");
    }
}

#[test]
fn a_cancel_that_says_how_long_leaves_half_of_it_to_the_child() {
    let minutes = |run: &Bench, n: i64| run.now + chrono::Duration::minutes(n);
    let mut run = calling(ParentClose::Cancel);
    run.definition.finally = vec![act("clean", &[])];
    let child = run.children.pop().expect("started");
    let until = minutes(&run, 8);
    run.input(Input::Messages(vec![Inbound::Cancel { reason: "enough".into(), until: Some(until) }]));
    run.end("both:r/a", Err(Failure::cancelled()));
    assert_eq!((run.children.pop(), run.child_until), (Some(child), Some(minutes(&run, 4))));
    assert_eq!(next(&mut run), 6 * 60_000, "after three quarters it is ended, whatever it does");
    assert_eq!(run.overdue_children, [(child, false)]);
    child_ends(&mut run, child);
    assert_eq!(run.live(), ["!finally/clean"]);
    assert_eq!(run.state.deadline, until, "what is left of it");
    assert_eq!(next(&mut run), 2 * 60_000);
    assert_eq!(run.cancels.last().map(String::as_str), Some("!finally/clean"));
    run.end("!finally/clean", Err(Failure::cancelled()));
    assert_eq!(run.state.status, RunStatus::Cancelled);
    assert_eq!(run.replayed(&run.definition, 0).divergence, None);
}

#[test]
fn a_child_that_has_heard_is_spared_until_three_quarters_of_a_long_time_are_over() {
    let minute = 60_000;
    let mut run = calling(ParentClose::Cancel);
    let child = run.children.pop().expect("started");
    let until = run.now + chrono::Duration::hours(4);
    run.input(Input::Messages(vec![Inbound::Cancel { reason: "enough".into(), until: Some(until) }]));
    run.end("both:r/a", Err(Failure::cancelled()));
    assert_eq!((next(&mut run), next(&mut run), next(&mut run)), (CALL_STOP_MS, CALL_STOP_MS, 50 * minute));
    assert_eq!(
        run.overdue_children,
        [(child, true), (child, true), (child, false)],
        "told to stop within two of four hours"
    );
    child_ends(&mut run, child);
    assert_eq!(run.state.status, RunStatus::Cancelled);
    assert_eq!(run.replayed(&run.definition, 0).divergence, None);
}

#[test]
fn who_cancels_again_shortens_what_is_left() {
    let (mut run, child) = stopping(ParentClose::Cancel, None);
    next(&mut run);
    let until = run.now + chrono::Duration::seconds(40);
    let again = |until| Input::Messages(vec![Inbound::Cancel { reason: "now".into(), until }]);
    run.input(again(Some(until)));
    assert_eq!((run.children.pop(), run.child_until), (Some(child), Some(run.now + chrono::Duration::seconds(20))));
    let rows = run.rows.len();
    for more in [Some(until), Some(until + chrono::Duration::hours(1)), None] {
        assert_eq!(run.input(again(more)), [], "it has less already");
    }
    assert_eq!(run.rows.len(), rows + 3);
    assert_eq!(next(&mut run), 30_000);
    assert_eq!(run.overdue_children.last(), Some(&(child, false)));
    assert_eq!(run.replayed(&run.definition, 0).divergence, None);

    // Of one that cleans up already.
    let mut run = Bench::start({
        let mut d = definition(vec![act("a", &[])]);
        d.finally = vec![act("clean", &[])];
        d
    });
    run.ok("a", json!(1));
    let until = run.now + chrono::Duration::seconds(5);
    run.input(again(Some(until)));
    assert_eq!(next(&mut run), 5_000);
    run.end("!finally/clean", Err(Failure::cancelled()));
    assert_eq!(run.failed_code(), "timeout.run_total");
    assert_eq!(run.replayed(&run.definition, 0).divergence, None);
}

#[test]
fn a_paused_run_is_resumed_to_stop_in_time() {
    let mut run = calling(ParentClose::Cancel);
    run.input(Input::Messages(vec![Inbound::Pause { reason: "look".into(), by: None }]));
    let until = run.now + chrono::Duration::seconds(40);
    run.input(Input::Messages(vec![Inbound::Cancel { reason: "enough".into(), until: Some(until) }]));
    run.input(Input::Messages(vec![Inbound::Pause { reason: "look".into(), by: None }]));
    let until = run.now + chrono::Duration::seconds(20);
    run.input(Input::Messages(vec![Inbound::Cancel { reason: "enough".into(), until: Some(until) }]));
    run.end("both:r/a", Err(Failure::cancelled()));
    assert_eq!(next(&mut run), 15_000);
    assert_eq!(run.replayed(&run.definition, 0).divergence, None);
}

/// A release before format 9 gave such calls no time; what it wrote is decided again as it was.
#[test]
fn a_history_of_before_has_no_such_instant_and_is_decided_again() {
    let (mut run, child) = stopping(ParentClose::Cancel, None);
    child_ends(&mut run, child);
    for row in &mut run.rows {
        row.events.retain(|event| event["type"] != "call_stopped");
    }
    assert_eq!(run.replayed(&run.definition, 0).divergence, None);
    // Whoever takes such a run over gives the call its time from then on.
    let mut state = RunState::new(run.state.run_id);
    let before = run
        .rows
        .iter()
        .take_while(|row| !row.events.iter().any(|e| e["path"] == "both:l/c" && e["type"] == "step_ended"));
    for event in before.flat_map(|row| &row.events) {
        fold(&mut state, &serde_json::from_value(event.clone()).expect("event")).expect("folds");
    }
    assert_eq!(next_due(&run.definition, &state), state.deadline + chrono::Duration::days(3_650), "as it was");
    (run.state, run.mirror) = (state.clone(), state);
    run.input(Input::TakenOver);
    assert_eq!(next_due(&run.definition, &run.state), run.now + chrono::Duration::milliseconds(CALL_STOP_MS));
}
