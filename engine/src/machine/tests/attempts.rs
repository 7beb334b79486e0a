//! Attempts: retries, refusals of the hook, room, results that come late.

use super::*;

#[test]
fn retries_follow_the_policy_and_escalate() {
    let mut a = act("a", &[("role", lit(json!("implementer")))]);
    a.retry.escalate =
        vec![Escalate { from_attempt: 3, with: BTreeMap::from([("role".into(), lit(json!("architect")))]) }];
    let mut run = Bench::start(definition(vec![a]));
    run.end("a", Err(Failure::retryable("transient.network", "x")));
    assert!(run.live().is_empty(), "the delay holds the next attempt back");
    run.later(4_999);
    assert!(run.live().is_empty());
    run.later(1);
    assert_eq!(run.live["a"].0, 2);
    run.end("a", Err(Failure::retryable("transient.network", "x").with_retry_after_ms(60_000)));
    run.later(59_999);
    assert!(run.live().is_empty(), "what the outside asked for wins over a shorter delay");
    run.later(1);
    assert_eq!(run.live["a"], (3, json!({"role": "architect"})));
    run.end("a", Err(Failure::retryable("transient.network", "last")));
    assert_eq!(run.failed_code(), "transient.network");
    assert_eq!(run.state.failure.as_ref().and_then(|f| f.path.as_deref()), Some("a"));
}

#[test]
fn a_failure_that_no_pattern_names_is_final() {
    let mut run = Bench::start(definition(vec![act("a", &[])]));
    run.end("a", Err(Failure::retryable("user.mine", "x")));
    assert_eq!(run.failed_code(), "user.mine");
}

#[test]
fn lost_and_blocked_attempts_do_not_count() {
    let mut run = Bench::start(definition(vec![act("a", &[])]));
    for n in 1..=10 {
        assert_eq!(run.live["a"].0, n);
        run.input(Input::TakenOver);
    }
    run.end("a", Err(Failure::blocked("credits", "no credits")));
    assert!(run.live().is_empty());
    assert_eq!(waiting_reason(&waiting(&run.definition, &run.state)).as_deref(), Some("credits"));
    run.input(Input::Messages(vec![Inbound::Unblock]));
    assert_eq!(run.live["a"].0, 12);
    for _ in 0..2 {
        run.end("a", Err(Failure::retryable("transient.x", "x")));
        run.later(3_600_000);
    }
    run.ok("a", json!(1));
    assert_eq!(run.state.status, RunStatus::Completed);
}

// It was ended by `limit.executions` after as many refusals.
#[test]
fn attempts_that_the_hook_stops_are_no_executions_of_the_run() {
    let mut d = definition(vec![act("a", &[])]);
    d.executions_max = 3;
    let mut run = Bench::start(d);
    for n in 1..=20 {
        assert_eq!(run.live["a"].0, n);
        run.end("a", Err(Failure::blocked("credits", "no credits")));
        assert_eq!(run.state.executions, 1, "the step has begun");
        run.input(Input::Messages(vec![Inbound::Unblock]));
    }
    run.ok("a", json!(1));
    assert_eq!(run.state.status, RunStatus::Completed);
}

#[test]
fn a_refused_start_blocks_and_goes_on_when_unblocked_or_by_itself() {
    let mut run = Bench::start(definition(vec![set("s", "v", lit(json!(1)))]));
    assert_eq!(run.state.status, RunStatus::Completed);
    run = Bench::start(definition(vec![act("a", &[]), act("b", &[])]));
    run.refused = Some(("credits".into(), "needs 5".into()));
    run.ok("a", json!(1));
    assert_eq!(run.state.node("a").and_then(|n| n.status), Some(crate::event::StepStatus::Succeeded));
    assert!(run.live().is_empty());
    run.later(BLOCKED_RETRY_MS);
    assert!(run.live().is_empty(), "asked again and refused again");
    run.refused = None;
    run.later(BLOCKED_RETRY_MS);
    assert_eq!(run.live(), ["b"]);
}

#[test]
fn starts_that_are_too_many_together_are_tried_one_by_one() {
    let mut run = Bench::start(definition(vec![step("w", Kind::Wait { until: WaitUntil::For(1) }), branches(3)]));
    run.room = Some(1);
    run.later(1);
    assert_eq!(run.live(), ["p:b1/a"], "the first has room alone");
    run.input(Input::Tick);
    assert_eq!(run.live(), ["p:b1/a"]);
    let blocked = waiting_reason(&waiting(&run.definition, &run.state));
    assert_eq!(blocked.as_deref(), Some("credits"), "the others wait for what the first one holds");
    run.ok("p:b1/a", json!(1));
    assert_eq!(run.live(), ["p:b2/a"], "and need no clock to go on");
    run.end("p:b2/a", Err(Failure::retryable("transient.network", "x")));
    assert_eq!(run.live(), ["p:b3/a"]);
    run.ok("p:b3/a", json!(3));
    run.later(5_000);
    run.ok("p:b2/a", json!(2));
    assert_eq!(run.state.status, RunStatus::Completed);
}

#[test]
fn a_final_refusal_of_one_start_fails_that_step_alone() {
    let mut wide = branches(2);
    if let Kind::Parallel { join, .. } = &mut wide.kind {
        *join = Join::Settled;
    }
    let mut d = definition(vec![step("w", Kind::Wait { until: WaitUntil::For(1) }), wide]);
    d.outputs.insert("branches".into(), x("steps.p.output.branches"));
    let mut run = Bench::start(d);
    run.permits = 1;
    run.later(1);
    assert_eq!(run.live(), ["p:b1/a"]);
    (run.permits, run.refused) = (2, Some(("budget.run".into(), "used up".into())));
    run.input(Input::Tick);
    run.ok("p:b1/a", json!(1));
    assert_eq!(run.state.status, RunStatus::Completed);
    let branches = &run.state.output.expect("output")["branches"];
    assert_eq!(
        (&branches["b1"]["status"], &branches["b2"]["error"]["type"]),
        (&json!("succeeded"), &json!("budget.run"))
    );
}

#[test]
fn two_steps_that_stop_each_other_in_the_middle_do_not_start_each_other() {
    let mut run = Bench::start(definition(vec![branches(2)]));
    run.end("p:b1/a", Err(Failure::blocked("credits", "none")));
    run.end("p:b2/a", Err(Failure::blocked("credits", "none")));
    assert!(run.live().is_empty());
    run.later(BLOCKED_RETRY_MS);
    assert_eq!(run.live(), ["p:b1/a", "p:b2/a"]);
}

#[test]
fn a_refusal_with_a_failure_code_fails_the_step_for_good() {
    let mut run = Bench::start(definition(vec![act("a", &[]), act("b", &[])]));
    run.refused = Some(("quota.used_up".into(), "nothing is left".into()));
    run.ok("a", json!(1));
    assert_eq!(run.state.status, RunStatus::Failed);
    let failure = run.state.failure.clone().expect("a failure");
    assert_eq!((failure.code.as_str(), failure.kind), ("quota.used_up", FailureKind::Permanent));
}

#[test]
fn without_room_attempts_wait_and_begin_when_there_is() {
    let wait = step("w", Kind::Wait { until: WaitUntil::For(1) });
    let mut run = Bench::start(definition(vec![wait, parallel(Join::All)]));
    run.permits = 1;
    run.later(1);
    assert_eq!(run.live(), ["p:l/do_l"]);
    run.permits = 1;
    run.input(Input::Tick);
    assert_eq!(run.live().len(), 2);
}

#[test]
fn late_results_change_nothing() {
    let mut run = Bench::start(definition(vec![act("a", &[])]));
    let before = run.state.clone();
    assert!(run.input(Input::AttemptEnded { path: "a".into(), attempt: 9, result: Ok(json!(1)) }).is_empty());
    assert!(run.input(Input::AttemptEnded { path: "zz".into(), attempt: 1, result: Ok(json!(1)) }).is_empty());
    assert_eq!(run.state, before);
    run.ok("a", json!(1));
    assert!(run.input(Input::AttemptEnded { path: "a".into(), attempt: 1, result: Ok(json!(2)) }).is_empty());
}

#[test]
fn panics_are_tried_again_within_the_bound() {
    let mut run = Bench::start(definition(vec![act("a", &[])]));
    for _ in 0..2 {
        run.end("a", Err(Failure::new(FailureKind::Panicked, "internal.panic", "x")));
        run.later(60_000);
    }
    run.end("a", Err(Failure::new(FailureKind::Panicked, "internal.panic", "x")));
    assert_eq!(run.failed_code(), "internal.panic");
}

#[test]
fn executions_are_bounded() {
    let mut d =
        definition(vec![set("a", "v", lit(json!(1))), set("b", "v", lit(json!(1))), set("c", "v", lit(json!(1)))]);
    d.executions_max = 2;
    assert_eq!(Bench::start(d).failed_code(), "limit.executions");
}
