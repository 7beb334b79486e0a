//! What becomes of a child when its parent's call is stopped, by every way in which a parent closes.

use super::*;
use crate::definition::{Branch, ParentClose};

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
    let cancel = || Input::Messages(vec![Inbound::Cancel { reason: "enough".into() }]);
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
    let cancel = || Inbound::Cancel { reason: "late".into() };
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
