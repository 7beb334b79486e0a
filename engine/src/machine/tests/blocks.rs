//! Blocks: sequences, rounds, items, branches, cases, handlers, and what the steps after them see.

use super::*;

#[test]
fn a_sequence_hands_outputs_on_and_yields_the_run_s_outputs() {
    let mut d = definition(vec![
        act("a", &[("n", x("inputs.n"))]),
        set("b", "m", x("steps.a.output.m + 1")),
        act("c", &[("m", x("steps.b.output.m"))]),
    ]);
    d.outputs.insert("last".into(), x("steps.c.output"));
    let mut run = Bench::start_with(d, json!({"n": 4}));
    assert_eq!(run.live["a"], (1, json!({"n": 4})));
    run.ok("a", json!({"m": 5}));
    assert_eq!(run.live["c"], (1, json!({"m": 6})));
    run.ok("c", json!("done"));
    assert_eq!((run.state.status, run.state.output), (RunStatus::Completed, Some(json!({"last": "done"}))));
}

#[test]
fn a_skipped_step_has_no_output_and_reading_it_fails() {
    let mut first = set("a", "v", lit(json!(1)));
    first.condition = Some(e("inputs.on"));
    let mut run =
        Bench::start_with(definition(vec![first.clone(), set("b", "v", x("steps.a.output.v"))]), json!({"on": false}));
    assert_eq!(run.failed_code(), "expr.missing");
    run = Bench::start_with(definition(vec![first, set("b", "v", x("steps.a.status"))]), json!({"on": false}));
    assert_eq!(run.state.status, RunStatus::Completed);
}

#[test]
fn a_redo_repeats_its_range_and_leaves_the_last_round_visible() {
    let redo = step(
        "code..check",
        Kind::Repeat {
            steps: vec![
                act("code", &[("evidence", x("round.number == 1 ? {} : round.previous.check"))]),
                act("check", &[]),
            ],
            max_rounds: 3,
            condition: RepeatCondition::While(e("!steps.check.output.passed")),
            delay_ms: 0,
            exhausted: Exhausted::Continue,
            transparent: true,
            gate: Some("check".into()),
            outputs: None,
        },
    );
    let mut run = Bench::start(definition(vec![redo, act("commit", &[("checks", x("steps.check.output"))])]));
    run.ok("code..check~1/code", json!({}));
    run.ok("code..check~1/check", json!({"passed": false, "why": "E1"}));
    assert_eq!(run.live["code..check~2/code"].1, json!({"evidence": {"passed": false, "why": "E1"}}));
    run.ok("code..check~2/code", json!({}));
    run.ok("code..check~2/check", json!({"passed": true}));
    assert_eq!(run.live["commit"].1, json!({"checks": {"passed": true}}));
}

#[test]
fn a_redo_whose_last_step_was_skipped_does_not_ask_its_condition() {
    let mut approve = act("approve", &[]);
    approve.condition = Some(e("false"));
    let redo = step(
        "plan..approve",
        Kind::Repeat {
            steps: vec![act("plan", &[]), approve],
            max_rounds: 2,
            condition: RepeatCondition::While(e("steps.approve.output.decision == 'changes_requested'")),
            delay_ms: 0,
            exhausted: Exhausted::Fail,
            transparent: true,
            gate: Some("approve".into()),
            outputs: None,
        },
    );
    let mut run = Bench::start(definition(vec![redo]));
    run.ok("plan..approve~1/plan", json!(1));
    assert_eq!(run.state.status, RunStatus::Completed);
}

#[test]
fn rounds_end_by_condition_or_by_exhaustion() {
    for (exhausted, expected) in [(Exhausted::Fail, "limit.rounds"), (Exhausted::Continue, "")] {
        let repeat = step(
            "r",
            Kind::Repeat {
                steps: vec![act("a", &[("n", x("round.number"))])],
                max_rounds: 2,
                condition: RepeatCondition::Until(e("steps.a.output")),
                delay_ms: 1_000,
                exhausted,
                transparent: false,
                gate: None,
                outputs: None,
            },
        );
        let mut run = Bench::start(definition(vec![repeat]));
        run.ok("r~1/a", json!(false));
        assert!(run.live().is_empty());
        run.later(1_000);
        assert_eq!(run.live["r~2/a"].1, json!({"n": 2}));
        run.ok("r~2/a", json!(false));
        match expected {
            "" => assert_eq!(run.state.status, RunStatus::Completed),
            code => assert_eq!(run.failed_code(), code),
        }
    }
}

#[test]
fn items_run_in_a_window_and_come_back_in_order() {
    let items = json!({"items": [{"id": "a/1"}, {"id": "b"}, {"id": "c"}]});
    let mut run = Bench::start_with(
        definition(vec![foreach(OnItemFailure::FailFast, 2), set("end", "v", x("steps.all.output"))]),
        items,
    );
    assert_eq!(run.live(), ["all[a%2F1]/do", "all[b]/do"]);
    run.ok("all[b]/do", json!(2));
    assert_eq!(run.live(), ["all[a%2F1]/do", "all[c]/do"]);
    run.ok("all[a%2F1]/do", json!(1));
    run.end("all[c]/do", Ok(json!(3)));
    assert_eq!(run.state.status, RunStatus::Completed);
}

#[test]
fn item_failures_follow_their_policy() {
    let items = json!({"items": [{"id": "a"}, {"id": "b"}, {"id": "c"}]});
    let bad = || Err(Failure::permanent("user.bad", "x"));
    let mut fast = Bench::start_with(definition(vec![foreach(OnItemFailure::FailFast, 2)]), items.clone());
    fast.end("all[a]/do", bad());
    assert_eq!(fast.cancels, ["all[b]/do"]);
    fast.end("all[b]/do", Err(Failure::cancelled()));
    assert_eq!(fast.failed_code(), "user.bad");

    let mut after = Bench::start_with(definition(vec![foreach(OnItemFailure::FailAfter, 2)]), items.clone());
    after.end("all[a]/do", bad());
    after.ok("all[b]/do", json!(2));
    after.ok("all[c]/do", json!(3));
    assert_eq!(after.failed_code(), "user.bad");

    let mut on = Bench::start_with(
        definition(vec![foreach(OnItemFailure::Continue, 3), set("s", "v", x("steps.all.output.map(i, i.status)"))]),
        items,
    );
    on.end("all[a]/do", bad());
    on.ok("all[b]/do", json!(2));
    let events = on.end("all[c]/do", Ok(json!(3)));
    let s = events.iter().find_map(|e| match e {
        Event::StepEnded { path, output, .. } if path == "s" => output.clone(),
        _ => None,
    });
    assert_eq!(s, Some(json!({"v": ["failed", "succeeded", "succeeded"]})));
}

#[test]
fn lists_beyond_their_bound_and_doubled_keys_fail_before_any_item() {
    for (items, code) in [
        (json!([1, 2, 3, 4, 5].map(|n| json!({"id": n}))), "limit.items"),
        (json!([{"id": "a"}, {"id": "a"}]), "limit.keys"),
        (json!({"not": "a list"}), "expr.type"),
    ] {
        let run = Bench::start_with(definition(vec![foreach(OnItemFailure::FailFast, 1)]), json!({"items": items}));
        assert_eq!(run.failed_code(), code);
    }
}

#[test]
fn joins() {
    let mut first = Bench::start(definition(vec![parallel(Join::First), set("s", "w", x("steps.p.output.winner"))]));
    first.ok("p:r/do_r", json!(1));
    assert_eq!(first.cancels, ["p:l/do_l"]);
    let events = first.end("p:l/do_l", Err(Failure::cancelled()));
    assert!(events.iter().any(
        |e| matches!(e, Event::StepEnded { path, output: Some(o), .. } if path == "s" && *o == json!({"w": "r"}))
    ));

    let mut none = Bench::start(definition(vec![parallel(Join::First)]));
    none.end("p:r/do_r", Err(Failure::permanent("user.r", "x")));
    none.end("p:l/do_l", Err(Failure::permanent("user.l", "x")));
    assert_eq!(none.failed_code(), "join.none_succeeded");

    let mut all = Bench::start(definition(vec![parallel(Join::All)]));
    all.end("p:r/do_r", Err(Failure::permanent("user.r", "x")));
    all.end("p:l/do_l", Err(Failure::cancelled()));
    assert_eq!(all.failed_code(), "user.r");

    let mut settled = Bench::start(definition(vec![parallel(Join::Settled)]));
    settled.end("p:r/do_r", Err(Failure::permanent("user.r", "x")));
    settled.ok("p:l/do_l", json!(1));
    assert_eq!(settled.state.status, RunStatus::Completed);

    let mut two = Bench::start(definition(vec![parallel(Join::AtLeast(2))]));
    two.end("p:r/do_r", Err(Failure::permanent("user.r", "x")));
    two.end("p:l/do_l", Err(Failure::cancelled()));
    assert_eq!(two.failed_code(), "join.failed");
}

#[test]
fn a_switch_takes_the_first_case_that_holds() {
    let switch = |when: &str| {
        step(
            "s",
            Kind::Switch {
                cases: vec![
                    Case { when: Some(e(when)), steps: vec![set("one", "v", lit(json!(1)))] },
                    Case { when: None, steps: vec![set("two", "v", lit(json!(2)))] },
                ],
            },
        )
    };
    for (when, case) in [("true", 0), ("false", 1)] {
        let mut d = definition(vec![switch(when)]);
        d.outputs.insert("case".into(), x("steps.s.output.case"));
        assert_eq!(Bench::start(d).state.output, Some(json!({"case": case})));
    }
}

#[test]
fn a_handler_takes_the_failure_and_sees_it() {
    let mut a = act("a", &[]);
    a.catch = vec![
        Catch { on: vec!["user.other".into()], condition: None, steps: vec![set("no", "v", lit(json!(0)))] },
        Catch {
            on: vec!["user.*".into()],
            condition: Some(e("error.message == 'boom'")),
            steps: vec![set("h", "seen", x("error.type"))],
        },
    ];
    let mut d = definition(vec![a.clone()]);
    d.outputs.insert("seen".into(), x("steps.a.output.seen"));
    let mut run = Bench::start(d.clone());
    run.end("a", Err(Failure::permanent("user.mine", "boom")));
    assert_eq!(run.state.output, Some(json!({"seen": "user.mine"})));
    let mut run = Bench::start(d);
    run.end("a", Err(Failure::permanent("user.mine", "silence")));
    assert_eq!(run.failed_code(), "user.mine");
}

#[test]
fn a_tolerated_failure_lets_the_block_go_on() {
    let mut a = act("a", &[]);
    a.continue_on_error = true;
    let mut run = Bench::start(definition(vec![a, set("b", "s", x("steps.a.status"))]));
    run.end("a", Err(Failure::permanent("user.x", "x")));
    assert_eq!(run.state.status, RunStatus::Completed);
}
