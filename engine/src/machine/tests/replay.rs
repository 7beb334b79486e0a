//! A history is decided again as it was; another definition, or a history that was touched, is found out.

use super::*;
use crate::machine::replay::Replayed;

fn diverges(replayed: &Replayed) -> (u64, usize) {
    let found = replayed.divergence.as_ref().unwrap_or_else(|| panic!("no divergence: {replayed:?}"));
    (found.seq, found.event)
}

fn small() -> Bench {
    let mut a = act("a", &[("n", x("inputs.n"))]);
    a.retry.jitter = 0.5;
    let mut run = Bench::start_with(definition(vec![a, set("b", "m", x("steps.a.output.m + 1"))]), json!({"n": 1}));
    run.end("a", Err(Failure::retryable("transient.network", "x")));
    run.now += chrono::Duration::days(1);
    run.input(Input::Tick);
    run.ok("a", json!({"m": 2}));
    assert_eq!(run.state.status, RunStatus::Completed);
    run
}

#[test]
fn an_unchanged_definition_decides_as_recorded() {
    let run = small();
    let replayed = run.replayed(&run.definition, 0);
    assert_eq!((replayed.divergence, replayed.decided, replayed.folded), (None, 4, 0));
}

#[test]
fn the_first_thing_that_another_definition_does_otherwise_is_named() {
    let run = small();
    let mut other = run.definition.clone();
    other.steps[1] = set("b", "m", x("steps.a.output.m + 2"));
    let found = run.replayed(&other, 0).divergence.expect("diverges");
    assert_eq!((found.seq, found.event), (4, 3), "{found:?}");
    let output = |v: &Option<Value>| v.as_ref().map(|v| v["output"]["m"].clone());
    assert_eq!((output(&found.expected), output(&found.found)), (Some(json!(4)), Some(json!(3))));
    let mut other = run.definition.clone();
    other.steps[0].retry.attempts = 1;
    assert_eq!(diverges(&run.replayed(&other, 0)), (2, 1), "there is no retry");
    let mut other = run.definition.clone();
    other.steps.remove(0);
    assert_eq!(diverges(&run.replayed(&other, 0)).0, 1);
    let mut other = run.definition.clone();
    other.steps.push(act("c", &[]));
    let found = run.replayed(&other, 0).divergence.expect("diverges");
    assert_eq!(found.found.expect("the run ends")["type"], "run_ending");
}

#[test]
fn a_retry_whose_delay_no_draw_gives_is_found() {
    let mut run = small();
    for row in &mut run.rows {
        for event in &mut row.events {
            if event["type"] == "retry_scheduled" {
                event["due_at"] = json!(run.now + chrono::Duration::days(9));
            }
        }
    }
    assert_eq!(diverges(&run.replayed(&run.definition, 0)), (2, 1));
}

#[test]
fn refusals_lost_workers_children_and_cancels_are_told_from_their_events() {
    let mut d = definition(vec![act("a", &[]), edges::call_step(), act("z", &[])]);
    d.finally = vec![act("clean", &[])];
    let mut run = Bench::start(d);
    run.input(Input::TakenOver);
    run.refused = Some(("credits".into(), "none".into()));
    run.input(Input::TakenOver);
    run.refused = None;
    run.input(Input::Messages(vec![Inbound::Unblock]));
    run.ok("a", json!({}));
    let child = run.children.pop().expect("called");
    let ended =
        Inbound::Child { run_id: child, completed: true, output: Some(json!(1)), failure: None, cancelled: false };
    run.input(Input::Messages(vec![ended, Inbound::Pause { reason: "p".into(), by: None }]));
    run.input(Input::Messages(vec![Inbound::Cancel { reason: "enough".into(), until: None }]));
    run.ok("!finally/clean", json!({}));
    assert_eq!(run.state.status, RunStatus::Cancelled);
    assert_eq!(run.replayed(&run.definition, 0).divergence, None);
    // A refusal for good fails the step.
    let mut run = Bench::start(definition(vec![act("a", &[])]));
    run.refused = Some(("budget.run".into(), "used up".into()));
    run.input(Input::TakenOver);
    assert_eq!(run.failed_code(), "budget.run");
    assert_eq!(run.replayed(&run.definition, 0).divergence, None);
    let mut run = Bench::start(definition(vec![act("a", &[])]));
    run.input(Input::Terminated { reason: "now".into() });
    assert_eq!(run.replayed(&run.definition, 0).divergence, None);
    // Before it began, as it is; and with an attempt under way, which cannot be, and is told all the same.
    let mut held = Bench::pending(definition(vec![act("a", &[])]));
    let mut run = Bench::start(definition(vec![act("a", &[])]));
    for run in [&mut held, &mut run] {
        run.input(Input::Expired);
        assert_eq!(run.failed_code(), "timeout.run_total");
        assert_eq!(run.replayed(&run.definition, 0).divergence, None);
    }
}

#[test]
fn a_run_that_was_turned_away_has_begun_nothing_and_replays() {
    // Also one whose inputs do not fit.
    for inputs in [json!({}), json!({"undeclared": 1})] {
        let mut definition = definition(vec![act("a", &[])]);
        definition.finally = vec![act("clean", &[])];
        let mut run = Bench::pending(definition);
        let away = Inbound::TurnedAway { reason: "run r holds the place".into() };
        let started = Input::Started { inputs, until: None };
        run.input(Input::Several(vec![started, Input::Messages(vec![away, Inbound::Unblock])]));
        let why = run.state.failure.as_ref().expect("why");
        assert_eq!((run.state.status, why.code.as_str()), (RunStatus::Cancelled, "cancelled"));
        assert_eq!(why.message, "run r holds the place");
        assert_eq!(run.state.executions, 0, "neither a step nor `finally`");
        assert_eq!(run.replayed(&run.definition, 0).divergence, None);
    }
}

#[test]
fn a_history_that_cannot_be_folded_is_no_divergence_but_broken() {
    let run = small();
    let mut rows = run.rows.clone();
    rows.swap(1, 2);
    let mut replay = crate::machine::replay::Replay::new(&run.definition, run.state.run_id, 0, 0);
    assert!(replay.row(&rows[0]).expect("folds"));
    assert!(replay.row(&rows[1]).expect_err("broken").0.starts_with("row 3: "));
}
