//! A fork begins where its parent was, does nothing again that had ended, and runs nothing in its parent's name.

use super::*;

/// The run that branches off after `seq`.
fn branch(run: &Bench, seq: usize, change: impl FnOnce(&mut Fork)) -> Result<Bench, Vec<String>> {
    branch_with(run, run.definition.clone(), seq, change)
}

fn branch_with(
    run: &Bench,
    definition: Definition,
    seq: usize,
    change: impl FnOnce(&mut Fork),
) -> Result<Bench, Vec<String>> {
    let mut other = Bench::start(definition);
    let id = RunId::new();
    (other.state, other.mirror, other.now) = (RunState::new(id), RunState::new(id), run.now);
    (other.rows, other.children, other.n) = (run.rows[..seq].to_vec(), Vec::new(), run.n);
    other.live.clear();
    for event in run.rows[..seq].iter().flat_map(|r| &r.events) {
        let event: Event = serde_json::from_value(event.clone()).expect("event");
        fold(&mut other.state, &event).expect("legal");
    }
    let mut asked = Fork {
        parent: run.state.run_id,
        seq: seq as u64,
        reason: "try".into(),
        definition: DefinitionHash([1; 32]),
        inputs: None,
        migrated: false,
        again: None,
        until: None,
    };
    change(&mut asked);
    let calls = BTreeMap::new();
    let catalog = Catalog::default();
    let moment = Moment {
        now: other.now,
        draw: 0,
        permits: Cell::new(0),
        refused: &Refusals::default(),
        catalog: &catalog,
        calls: &calls,
        current: None,
        depth: 0,
        bounds_calls: true,
        workflow: "test",
    };
    let event = fork(&other.definition, &other.state, asked, &moment)?;
    fold(&mut other.state, &event).expect("legal");
    let stored = serde_json::to_value(&event).expect("json");
    other.rows.push(crate::view::HistoryRow {
        seq: seq as u64 + 1,
        epoch: 0,
        format: event.format(),
        events: vec![stored],
        at: other.now,
    });
    other.mirror = other.state.clone();
    other.input(Input::TakenOver);
    Ok(other)
}

#[test]
fn what_had_ended_is_not_done_again_and_what_was_under_way_begins_anew() {
    let mut run = Bench::start(definition(vec![act("a", &[]), act("b", &[("n", x("steps.a.output.n"))])]));
    run.ok("a", json!({"n": 1}));
    run.end("b", Err(Failure::retryable("transient.network", "x")));
    run.later(10_000);
    assert_eq!(run.live["b"].0, 2);
    run.now += chrono::Duration::days(30);
    let mut other = branch(&run, 4, |_| {}).expect("forks");
    assert_eq!(other.live["b"], (1, json!({"n": 1})), "its first attempt, in time although the parent's is over");
    let id = |state: &RunState| match &state.node("b").and_then(|n| n.live.as_ref()) {
        Some(Live::Activity { phase: Phase::Running { attempt_id, .. }, .. }) => *attempt_id,
        other => panic!("{other:?}"),
    };
    assert_ne!(id(&run.state), id(&other.state), "an attempt of its own");
    other.ok("b", json!({}));
    assert_eq!(other.state.status, RunStatus::Completed);
}

#[test]
fn changed_inputs_reach_what_begins_anew() {
    let mut d = definition(vec![act("a", &[]), act("b", &[("n", x("inputs.n")), ("e", x("env.e"))])]);
    d.env.insert("e".into(), x("inputs.n * 10"));
    let mut run = Bench::start_with(d, json!({"n": 1}));
    run.ok("a", json!({}));
    assert_eq!(run.live["b"].1, json!({"n": 1, "e": 10}));
    let other = branch(&run, 2, |f| f.inputs = Some(json!({"n": 2}))).expect("forks");
    assert_eq!(other.live["b"].1, json!({"n": 2, "e": 20}));
    // The whole block again, from a step that had ended.
    let other = branch(&run, 2, |f| f.again = Some("a".into())).expect("forks");
    assert_eq!((other.live(), other.live["a"].0), (vec!["a"], 1));
    assert!(branch(&run, 2, |f| f.again = Some("nowhere".into())).is_err());
}

#[test]
fn blocks_stay_open_with_what_has_ended_in_them() {
    let each = step(
        "each",
        Kind::Foreach {
            list: e("[1, 2, 3]"),
            key: None,
            max_items: 3,
            concurrency: 2,
            on_item_failure: OnItemFailure::FailFast,
            steps: vec![act("i", &[("n", x("item"))]), await_step("ok", None, OnTimeout::Fail)],
            outputs: None,
        },
    );
    let mut timed = edges::group("g", vec![each, edges::call_step()]);
    timed.timeouts.total_ms = Some(60_000);
    let mut run = Bench::start_with(definition(vec![timed]), json!({"q": "?"}));
    run.ok("g/each[0]/i", json!({}));
    run.signal("ok", json!({"text": "x"}));
    let rows = run.rows.len();
    run.now += chrono::Duration::days(1);
    let mut other = branch(&run, rows, |_| {}).expect("forks");
    assert_eq!(other.live(), ["g/each[1]/i", "g/each[2]/i"]);
    assert!(other.rows.iter().flat_map(|r| &r.events).filter(|e| e["path"] == "g/each[0]/i").count() > 2);
    for item in [1, 2] {
        other.ok(&format!("g/each[{item}]/i"), json!({}));
        other.signal("ok", json!({"text": "y"}));
    }
    let child = other.children.pop().expect("called by the fork");
    assert!(!run.children.contains(&child));
    other.input(Input::Messages(vec![Inbound::Child {
        run_id: child,
        completed: true,
        output: None,
        failure: None,
        cancelled: false,
    }]));
    assert_eq!(other.state.status, RunStatus::Completed);
}

#[test]
fn a_step_of_a_round_that_is_over_does_not_begin_anew_in_the_present_one() {
    let again = step(
        "r",
        Kind::Repeat {
            steps: vec![act("a", &[]), act("b", &[])],
            max_rounds: 3,
            condition: RepeatCondition::Until(e("false")),
            delay_ms: 0,
            exhausted: Exhausted::Continue,
            transparent: false,
            gate: None,
            outputs: None,
        },
    );
    let mut run = Bench::start(definition(vec![again]));
    run.ok("r~1/a", json!({}));
    run.ok("r~1/b", json!({}));
    run.ok("r~2/a", json!({}));
    assert_eq!(run.live(), ["r~2/b"]);
    let rows = run.rows.len();
    let other = branch(&run, rows, |f| f.again = Some("r~2/a".into())).expect("forks");
    assert_eq!(other.live(), ["r~2/a"]);
    let why = branch(&run, rows, |f| f.again = Some("r~1/a".into())).err().expect("refused");
    assert!(why[0].contains("does not stand there"), "{why:?}");
}

#[test]
fn a_call_under_way_is_called_again_under_the_fork() {
    let run = Bench::start(definition(vec![edges::call_step()]));
    let other = branch(&run, 1, |_| {}).expect("forks");
    assert_eq!(other.children.len(), 1);
    assert_ne!(other.children, run.children);
}

#[test]
fn another_definition_must_have_a_place_for_what_is_under_way() {
    let inner = || edges::group("g", vec![act("a", &[]), act("b", &[])]);
    let mut run = Bench::start(definition(vec![inner()]));
    run.ok("g/a", json!({}));
    let migrate = |steps: Vec<Step>| branch_with(&run, definition(steps), 2, |f| f.migrated = true);
    // The leaf may be gone, the block may not.
    let other = migrate(vec![edges::group("g", vec![act("a", &[]), act("c", &[])])]).expect("fits");
    assert_eq!(other.live(), ["g/c"]);
    for (steps, why) in [
        (vec![act("x", &[])], "`g` is under way and not in the definition"),
        (vec![act("g", &[])], "`g` is under way and something else in the definition"),
    ] {
        assert_eq!(migrate(steps).err().expect("refused"), [why]);
    }
}

#[test]
fn there_is_no_fork_of_a_run_that_has_not_begun_or_is_ending() {
    let mut d = definition(vec![act("a", &[])]);
    d.finally = vec![act("clean", &[])];
    let mut run = Bench::start(d);
    assert!(branch(&run, 0, |_| {}).is_err());
    run.ok("a", json!({}));
    assert!(branch(&run, 2, |_| {}).is_err(), "in finally");
    run.ok("!finally/clean", json!({}));
    assert!(branch(&run, 3, |_| {}).is_err(), "closed");
    assert!(branch(&run, 1, |_| {}).is_ok());
}

#[test]
fn a_fork_of_a_paused_run_goes_on() {
    let mut run = Bench::start(definition(vec![act("a", &[]), act("b", &[])]));
    run.input(Input::Messages(vec![Inbound::Pause { reason: String::new(), by: None }]));
    run.ok("a", json!({}));
    let other = branch(&run, 3, |_| {}).expect("forks");
    assert_eq!((other.state.status, other.live()), (RunStatus::Running, vec!["b"]));
}

#[test]
fn the_time_of_a_fork_that_is_held_back_counts_from_when_it_may_begin() {
    let mut timed = edges::group("g", vec![act("a", &[]), act("b", &[])]);
    timed.timeouts.total_ms = Some(60_000);
    let mut run = Bench::start(definition(vec![timed]));
    run.ok("g/a", json!({}));
    let other = branch(&run, 2, |_| {}).expect("forks");
    let forked: Event = serde_json::from_value(other.rows[2].events[0].clone()).expect("event");
    let Event::RunForked { at, deadline, .. } = forked.clone() else { panic!("{forked:?}") };
    let hours = chrono::Duration::hours;
    let held = |begins: DateTime<Utc>, until: Option<DateTime<Utc>>| {
        let event = put_off(forked.clone(), begins, until);
        let mut state = RunState::new(other.state.run_id);
        for event in run.rows[..2].iter().flat_map(|r| &r.events) {
            fold(&mut state, &serde_json::from_value(event.clone()).expect("event")).expect("legal");
        }
        fold(&mut state, &event).expect("legal");
        let block = state.node("g").expect("open").started_at;
        (event.format(), state.deadline, block)
    };
    let begins = at + hours(300);
    assert!(begins > deadline, "its time would be over");
    assert_eq!(held(begins, None), (8, deadline + hours(300), Some(begins)));
    assert_eq!(held(begins, Some(deadline + hours(1))), (8, deadline + hours(1), Some(begins)));
    assert_eq!(held(at, None), (2, deadline, Some(at)), "as every release has written it");
}

#[test]
fn a_fork_anywhere_in_any_history_comes_to_its_end_and_starts_nothing_twice() {
    let (mut forked, mut refused) = (0, 0);
    for seed in 0..60 {
        let run = random::disturbed(seed);
        for seq in (0..=run.rows.len()).step_by(3) {
            let mut other = match branch(&run, seq, |_| {}) {
                Ok(other) => other,
                Err(why) => {
                    let expected = why[0].starts_with("the run was ending") || why[0].starts_with("the run had not");
                    assert!(expected && why.len() == 1, "seed {seed}, fork after {seq}: {why:?}");
                    refused += 1;
                    continue;
                }
            };
            forked += 1;
            random::to_the_end(&mut other, seed);
            let ids = |rows: &[crate::view::HistoryRow]| -> Vec<Value> {
                let events = rows.iter().flat_map(|r| &r.events);
                events.filter(|e| e["type"] == "attempt_started").map(|e| e["attempt_id"].clone()).collect()
            };
            let (shared, own) = (ids(&other.rows[..seq]), ids(&other.rows[seq..]));
            assert!(own.iter().all(|id| !shared.contains(id)), "seed {seed}, fork after {seq}");
            let ended = |id: &Value| {
                let own = other.rows[seq..].iter().flat_map(|r| &r.events);
                own.filter(|e| e["type"] == "attempt_ended" && e["attempt_id"] == *id).count()
            };
            assert!(shared.iter().all(|id| ended(id) == 0), "seed {seed}: the parent's attempts are its own to end");
            assert!(own.iter().all(|id| ended(id) == 1), "seed {seed}, fork after {seq}");
            assert_eq!(other.replayed(&other.definition, seq as u64).divergence, None, "seed {seed}, fork after {seq}");
        }
    }
    assert!(forked > 100 && refused > 60, "{forked} {refused}");
}
