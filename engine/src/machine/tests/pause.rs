//! Pause: what runs comes to its end, nothing begins, what came due fires later.

use super::*;

fn pause(run: &mut Bench) -> Vec<Event> {
    run.input(Input::Messages(vec![Inbound::Pause { reason: "look".into(), by: Some("user:1".into()) }]))
}
fn resume(run: &mut Bench) -> Vec<Event> {
    run.input(Input::Messages(vec![Inbound::Resume { reason: "seen".into(), by: None, halted: None }]))
}

#[test]
fn a_running_attempt_ends_and_the_next_step_begins_after_the_resume() {
    let mut run = Bench::start(definition(vec![act("a", &[]), act("b", &[("n", x("steps.a.output.n"))])]));
    pause(&mut run);
    assert_eq!((run.state.status, run.live()), (RunStatus::Paused, vec!["a"]));
    assert!(pause(&mut run).is_empty(), "twice is once");
    run.ok("a", json!({"n": 7}));
    assert!(run.live().is_empty());
    assert_eq!(run.state.node("a").and_then(|n| n.output.clone()), Some(json!({"n": 7})));
    run.later(3_600_000);
    assert!(run.live().is_empty());
    resume(&mut run);
    assert_eq!(run.live["b"], (1, json!({"n": 7})));
    assert!(resume(&mut run).is_empty());
    run.ok("b", json!({}));
    assert_eq!(run.state.status, RunStatus::Completed);
}

#[test]
fn a_failed_attempt_waits_for_its_next_one_until_the_resume() {
    let mut run = Bench::start(definition(vec![act("a", &[])]));
    pause(&mut run);
    run.end("a", Err(Failure::retryable("transient.network", "x")));
    run.later(3_600_000);
    assert!(run.live().is_empty());
    run.input(Input::TakenOver);
    assert!(run.live().is_empty());
    resume(&mut run);
    assert_eq!(run.live["a"].0, 2);
}

#[test]
fn timers_and_deadlines_that_came_due_fire_at_the_resume() {
    let wait = step("w", Kind::Wait { until: WaitUntil::For(1_000) });
    let mut run = Bench::start(definition(vec![wait, act("a", &[])]));
    pause(&mut run);
    run.later(5_000);
    assert!(run.state.node("w").is_some_and(|n| n.live.is_some()));
    resume(&mut run);
    assert_eq!(run.live(), ["a"]);

    let mut run = Bench::start(Definition { timeout_ms: 10_000, ..definition(vec![act("a", &[]), act("b", &[])]) });
    pause(&mut run);
    run.later(20_000);
    run.ok("a", json!({}));
    assert_eq!(run.state.status, RunStatus::Paused);
    resume(&mut run);
    assert_eq!(run.failed_code(), "timeout.run_total");
}

#[test]
fn signals_are_kept_and_children_are_heard() {
    let asks = definition(vec![await_step("answer", None, OnTimeout::Fail), edges::call_step()]);
    let mut run = Bench::start_with(asks, json!({"q": "?"}));
    pause(&mut run);
    run.signal("answer", json!({"text": "x"}));
    assert_eq!(run.state.mailbox.len(), 1);
    resume(&mut run);
    assert!(run.state.mailbox.is_empty());
    pause(&mut run);
    let child = run.children.pop().expect("called");
    run.input(Input::Messages(vec![Inbound::Child {
        run_id: child,
        completed: true,
        output: None,
        failure: None,
        cancelled: false,
    }]));
    assert_eq!(run.state.status, RunStatus::Paused);
    resume(&mut run);
    assert_eq!(run.state.status, RunStatus::Completed);
}

#[test]
fn a_cancel_lifts_the_pause_and_a_termination_needs_not() {
    let mut d = definition(vec![act("a", &[])]);
    d.finally = vec![act("clean", &[])];
    let mut run = Bench::start(d.clone());
    pause(&mut run);
    let events = run.input(Input::Messages(vec![Inbound::Cancel { reason: "enough".into(), until: None }]));
    assert!(matches!(&events[0], Event::RunResumed { reason, .. } if reason == "to stop: enough"), "{events:?}");
    assert_eq!(run.cancels, ["a"]);
    run.end("a", Err(Failure::cancelled()));
    // The cleanup itself may be paused, and a second cancel lets it go on.
    pause(&mut run);
    run.ok("!finally/clean", json!({}));
    assert_eq!(run.state.status, RunStatus::Paused);
    run.input(Input::Messages(vec![Inbound::Cancel { reason: "again".into(), until: None }]));
    assert_eq!(run.state.status, RunStatus::Cancelled);

    let mut run = Bench::start(d);
    pause(&mut run);
    run.input(Input::Terminated { reason: "now".into() });
    assert_eq!(run.state.status, RunStatus::Terminated);
}

#[test]
fn a_run_that_is_paused_before_its_first_claim_starts_nothing() {
    let mut run = Bench::start(definition(vec![act("a", &[])]));
    (run.state, run.mirror) = (RunState::new(run.state.run_id), RunState::new(run.state.run_id));
    run.live.clear();
    let pause = Inbound::Pause { reason: String::new(), by: None };
    let inputs = vec![Input::Started { inputs: json!({}), until: None }, Input::Messages(vec![pause])];
    run.input(Input::Several(inputs));
    assert_eq!((run.state.status, run.live().len()), (RunStatus::Paused, 0));
    resume(&mut run);
    assert_eq!(run.live(), ["a"]);
}

#[test]
fn what_was_set_aside_says_in_its_history_why_it_goes_on() {
    let mut run = Bench::start(definition(vec![act("a", &[])]));
    let released = Inbound::Resume { reason: "mended".into(), by: None, halted: Some("a gap".into()) };
    let events = run.input(Input::Several(vec![Input::TakenOver, Input::Messages(vec![released])]));
    assert!(events.iter().any(|e| matches!(e, Event::RunResumed { halted: Some(why), .. } if why == "a gap")));
    assert_eq!(run.live["a"].0, 2);
    assert_eq!(crate::event::format_of(&events), 2);
    assert_eq!(crate::event::format_of(&events[..1]), 1, "an older release reads what says nothing new");
}
