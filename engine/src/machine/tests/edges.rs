//! Deadlines, stops and late arrivals: what the plain tests of a construct do not reach.

use super::*;

pub(super) fn group(id: &str, steps: Vec<Step>) -> Step {
    step(id, Kind::Group { steps, outputs: None })
}

#[test]
fn a_block_that_is_too_slow_fails_when_everything_below_has_stopped() {
    let blocks: Vec<(Kind, Vec<&str>)> = vec![
        (Kind::Group { steps: vec![act("a", &[]), act("b", &[])], outputs: None }, vec!["g/a"]),
        (parallel(Join::All).kind, vec!["g:l/do_l", "g:r/do_r"]),
        (foreach(OnItemFailure::Continue, 2).kind, vec!["g[a]/do", "g[b]/do"]),
        (
            Kind::Repeat {
                steps: vec![act("a", &[])],
                max_rounds: 3,
                condition: RepeatCondition::Until(e("false")),
                delay_ms: 0,
                exhausted: Exhausted::Fail,
                transparent: false,
                gate: None,
                outputs: None,
            },
            vec!["g~1/a"],
        ),
        (
            Kind::Switch { cases: vec![Case { when: None, steps: vec![group("in", vec![act("a", &[])])] }] },
            vec!["g/in/a"],
        ),
    ];
    for (kind, live) in blocks {
        let mut block = step("g", kind);
        block.timeouts.total_ms = Some(1_000);
        let mut run =
            Bench::start_with(definition(vec![block]), json!({"items": [{"id": "a"}, {"id": "b"}, {"id": "c"}]}));
        assert_eq!(next_due(&run.definition, &run.state), run.now + chrono::Duration::seconds(1));
        assert_eq!(run.live(), live);
        run.later(1_000);
        assert_eq!(run.cancels, live, "what runs is told to stop");
        for (at, path) in live.iter().enumerate() {
            assert_eq!(run.state.status, RunStatus::Running, "the failure waits for {path}");
            // One stops, the others succeed although they were told to: nothing after them begins.
            run.end(path, if at == 0 { Ok(json!(1)) } else { Err(Failure::cancelled()) });
        }
        assert_eq!(run.failed_code(), "timeout.total");
    }
}

#[test]
fn waits_and_calls_have_a_total_timeout_too() {
    let mut wait = step("w", Kind::Wait { until: WaitUntil::For(60_000) });
    wait.timeouts.total_ms = Some(1_000);
    let mut run = Bench::start(definition(vec![wait]));
    run.later(1_000);
    assert_eq!(run.failed_code(), "timeout.total");
    let mut call = call_step();
    call.timeouts.total_ms = Some(1_000);
    let mut run = Bench::start(definition(vec![call]));
    run.later(1_000);
    assert_eq!(run.failed_code(), "timeout.total");
    assert_eq!(run.children.len(), 2, "started, then told to stop");
}

pub(super) fn call_step() -> Step {
    step(
        "c",
        Kind::Call {
            workflow: "child".into(),
            version: crate::definition::CallVersion::Latest,
            with: BTreeMap::new(),
            parent_close: crate::definition::ParentClose::Cancel,
        },
    )
}

#[test]
fn where_a_call_leads_is_settled_when_the_run_starts() {
    let mut run = Bench::start(definition(vec![act("a", &[]), call_step()]));
    assert_eq!(run.state.calls["child@latest"], DefinitionHash([7; 32]));
    let other = BTreeMap::from([("child@latest".to_owned(), DefinitionHash([8; 32]))]);
    let moment = Moment {
        now: run.now,
        draw: 0,
        permits: Cell::new(1),
        refused: &Refusals::default(),
        catalog: &run.catalog,
        calls: &other,
        current: None,
        depth: 0,
        bounds_calls: true,
        workflow: "test",
    };
    let input = Input::AttemptEnded { path: "a".into(), attempt: 1, result: Ok(json!(1)) };
    let decision = decide(&run.definition, &mut run.state, input, &moment).expect("legal");
    assert!(
        decision
            .commands
            .iter()
            .any(|c| matches!(c, Command::StartChild { definition, .. } if *definition == DefinitionHash([7; 32])))
    );
}

#[test]
fn an_attempt_that_ran_into_an_outer_deadline_says_so() {
    let late = || Err(Failure::new(FailureKind::TimedOut, "timeout.run", "x"));
    let mut slow = act("a", &[]);
    slow.timeouts.total_ms = Some(1_000);
    let mut run = Bench::start(definition(vec![slow]));
    run.now += chrono::Duration::milliseconds(1_000);
    run.end("a", late());
    assert_eq!(run.failed_code(), "timeout.total");
    let mut d = definition(vec![act("a", &[])]);
    d.timeout_ms = 2_000;
    let mut run = Bench::start(d);
    // The worker's clock may be a hair early: the verdict does not depend on it.
    run.now += chrono::Duration::milliseconds(1_999);
    run.end("a", late());
    assert_eq!(run.failed_code(), "timeout.run_total");
}

#[test]
fn the_winner_is_the_branch_that_succeeded_first() {
    let mut run = Bench::start(definition(vec![parallel(Join::First), set("w", "v", x("steps.p.output.winner"))]));
    run.ok("p:r/do_r", json!("r"));
    assert_eq!(run.cancels, ["p:l/do_l"]);
    // The loser had finished before it could notice.
    run.ok("p:l/do_l", json!("l"));
    assert_eq!(run.state.status, RunStatus::Completed);
    let mut d = definition(vec![parallel(Join::First)]);
    d.outputs.insert("winner".into(), x("steps.p.output.winner"));
    let mut run = Bench::start(d);
    run.ok("p:r/do_r", json!("r"));
    run.ok("p:l/do_l", json!("l"));
    assert_eq!(run.state.output, Some(json!({"winner": "r"})));
}

#[test]
fn finally_sees_the_steps_of_a_redo_that_failed_or_was_cancelled() {
    let redo = || {
        let kind = Kind::Repeat {
            steps: vec![act("make", &[]), act("check", &[])],
            max_rounds: 3,
            condition: RepeatCondition::While(e("!steps.check.output.ok")),
            delay_ms: 0,
            exhausted: Exhausted::Fail,
            transparent: true,
            gate: Some("check".into()),
            outputs: None,
        };
        let mut d = definition(vec![step("make..check", kind)]);
        d.finally = vec![act("clean", &[("made", x("steps.make.output")), ("check", x("steps.check.status"))])];
        d
    };
    let mut run = Bench::start(redo());
    run.ok("make..check~1/make", json!("thing"));
    run.end("make..check~1/check", Err(Failure::permanent("user.broken", "x")));
    assert_eq!(run.live["!finally/clean"].1, json!({"made": "thing", "check": "failed"}));
    let mut run = Bench::start(redo());
    run.ok("make..check~1/make", json!("thing"));
    run.input(Input::Messages(vec![Inbound::Cancel { reason: "enough".into(), until: None }]));
    run.end("make..check~1/check", Err(Failure::cancelled()));
    assert_eq!(run.live["!finally/clean"].1, json!({"made": "thing", "check": "cancelled"}));
}

#[test]
fn waiting_for_credits_is_not_waiting_for_a_worker() {
    let mut a = act("a", &[]);
    a.timeouts.queue_ms = 60_000;
    let wait = step("w", Kind::Wait { until: WaitUntil::For(1) });
    let mut run = Bench::start(definition(vec![wait, a]));
    run.refused = Some(("credits".into(), "none left".into()));
    run.later(1);
    run.later(86_400_000);
    run.refused = None;
    run.input(Input::Messages(vec![Inbound::Unblock]));
    assert_eq!(run.live(), ["a"]);
}

#[test]
fn a_decision_on_the_round_before_approves_nothing() {
    let one = Some(Approval { quorum: 1, fail_on_reject: true });
    let kind = Kind::Repeat {
        steps: vec![act("plan", &[]), await_step("ok", one, OnTimeout::Fail)],
        max_rounds: 3,
        condition: RepeatCondition::While(e("steps.ok.output.decision == 'changes_requested'")),
        delay_ms: 0,
        exhausted: Exhausted::Fail,
        transparent: true,
        gate: Some("ok".into()),
        outputs: None,
    };
    let mut run = Bench::start_with(definition(vec![step("plan..ok", kind)]), json!({"q": "?"}));
    run.ok("plan..ok~1/plan", json!(1));
    run.signal("ok", json!({"decision": "changes_requested"}));
    // A second click, sent before the second plan exists.
    run.signal("ok", json!({"decision": "approved"}));
    run.now += chrono::Duration::seconds(1);
    run.ok("plan..ok~2/plan", json!(2));
    assert_eq!(run.state.status, RunStatus::Running);
    run.signal("ok", json!({"decision": "approved"}));
    assert_eq!(run.state.status, RunStatus::Completed);
}

#[test]
fn a_long_way_without_waiting_is_committed_in_pieces() {
    let pure = |id: &str, steps: Vec<Step>| {
        step(
            id,
            Kind::Foreach {
                list: e("inputs.list"),
                key: None,
                max_items: 100,
                concurrency: 1,
                on_item_failure: OnItemFailure::FailFast,
                steps,
                outputs: None,
            },
        )
    };
    let d = definition(vec![pure("outer", vec![pure("inner", vec![set("s", "v", lit(json!(1)))])])]);
    let list: Vec<u32> = (0..80).collect();
    // 6,400 executions, some 25,000 events: within the definition's limit, so it must come to its end.
    let run = Bench::start_with(d, json!({ "list": list }));
    assert_eq!(run.state.status, RunStatus::Completed);
}

#[test]
fn a_run_that_is_stopping_does_not_spin_on_a_deadline_that_has_passed() {
    let mut d = definition(vec![act("a", &[])]);
    d.timeout_ms = 1_000;
    d.finally = vec![act("clean", &[])];
    let mut run = Bench::start(d);
    run.later(1_000);
    run.later(10_000);
    assert_eq!(run.live(), ["a"], "it does not listen");
    run.end("a", Err(Failure::cancelled()));
    run.later(FINALLY_MS);
    run.later(10_000);
    run.end("!finally/clean", Err(Failure::cancelled()));
    assert_eq!(run.failed_code(), "timeout.run_total");
}

#[test]
fn a_text_that_doubles_in_every_round_ends_the_step_and_not_the_worker() {
    let double = set("s", "v", x("round.number == 1 ? 'xxxxxxxx' : round.previous.s.v + round.previous.s.v"));
    let kind = Kind::Repeat {
        steps: vec![double],
        max_rounds: 100,
        condition: RepeatCondition::Until(e("false")),
        delay_ms: 0,
        exhausted: Exhausted::Fail,
        transparent: false,
        gate: None,
        outputs: None,
    };
    assert_eq!(Bench::start(definition(vec![step("r", kind)])).failed_code(), "limit.size");
    let wide: BTreeMap<String, Data> = (0..5).map(|n| (format!("v{n}"), x("inputs.big"))).collect();
    let run = Bench::start_with(
        definition(vec![step("s", Kind::Set { values: wide })]),
        json!({"big": "x".repeat(1_000_000)}),
    );
    assert_eq!(run.failed_code(), "limit.size");
}

#[test]
fn a_call_below_the_depth_limit_fails_its_step_and_starts_nothing() {
    for (depth, started) in [(0, true), (CALL_DEPTH_MAX - 1, true), (CALL_DEPTH_MAX, false), (u32::MAX, false)] {
        let mut run = Bench::start(definition(vec![act("a", &[]), call_step()]));
        run.depth = depth;
        run.ok("a", json!(1));
        assert_eq!(run.children.len(), usize::from(started), "{depth}");
        if !started {
            assert_eq!(run.failed_code(), "call.failed");
            assert!(run.state.failure.as_ref().is_some_and(|f| f.message.contains("at most 8 runs")), "{depth}");
        }
    }
}
