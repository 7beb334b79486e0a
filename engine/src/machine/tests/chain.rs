//! Runs that continue as new.

use super::*;
use crate::{
    definition::Input as Declared,
    event::{Ending, format_of},
};
use edges::group;

fn number(default: Option<i64>) -> Declared {
    Declared { schema: json!({"type": "integer"}), required: default.is_none(), default: default.map(Value::from) }
}

fn again(with: &[(&str, Data)], current: bool) -> Step {
    let with = with.iter().map(|(k, d)| ((*k).to_owned(), d.clone())).collect();
    step("again", Kind::ContinueAsNew { with, current })
}

/// Counts up, and cleans up.
fn counter() -> Definition {
    let mut d = definition(vec![act("a", &[]), again(&[("n", x("inputs.n + 1"))], false), act("never", &[])]);
    d.inputs = BTreeMap::from([("n".into(), number(Some(1))), ("step".into(), number(Some(7)))]);
    d.finally = vec![act("clean", &[])];
    d
}

fn continued(run: &Bench) -> (Value, Option<DefinitionHash>) {
    match &run.state.ending {
        Some(Ending::Continued { run: next, inputs, definition }) => {
            assert_ne!(*next, run.state.run_id);
            (inputs.clone(), *definition)
        }
        other => panic!("{other:?}"),
    }
}

fn replays(run: &Bench) {
    assert_eq!(run.replayed(&run.definition, 0).divergence, None);
}

#[test]
fn a_run_cleans_up_and_closes_as_continued_with_the_next_one_s_inputs() {
    let mut run = Bench::start(counter());
    run.signal("later", json!({"text": "x"}));
    run.ok("a", Value::Null);
    assert_eq!((run.live(), run.state.status), (vec!["!finally/clean"], RunStatus::Running));
    run.ok("!finally/clean", Value::Null);
    assert_eq!((run.state.status, &run.state.output, &run.state.failure), (RunStatus::Continued, &None, &None));
    assert_eq!(continued(&run), (json!({"n": 2, "step": 7}), None));
    let kept: Vec<&str> = run.state.mailbox.iter().map(|m| m.name.as_str()).collect();
    assert_eq!(kept, ["later"], "nobody has taken it");
    assert_eq!(run.rows.last().expect("rows").format, 4);
    replays(&run);
    let old = Event::RunClosed { status: RunStatus::Completed, output: None, failure: None, at: run.now };
    assert_eq!(format_of(&[old]), 1, "what says nothing new is read by older releases");
}

#[test]
fn what_runs_beside_the_step_is_stopped_first() {
    let branch = |name: &str, steps| crate::definition::Branch { name: name.into(), steps };
    let branches = vec![branch("l", vec![act("slow", &[])]), branch("r", vec![act("a", &[]), again(&[], false)])];
    let both = step("both", Kind::Parallel { branches, join: Join::All, fail_fast: false });
    let mut run = Bench::start(definition(vec![group("around", vec![both]), act("never", &[])]));
    run.ok("around/both:r/a", Value::Null);
    assert_eq!(
        (run.cancels.as_slice(), run.state.status),
        (&["around/both:l/slow".to_owned()][..], RunStatus::Running)
    );
    run.end("around/both:l/slow", Err(Failure::cancelled()));
    assert_eq!(run.state.status, RunStatus::Continued);
    replays(&run);
}

#[test]
fn a_cancel_while_it_cleans_up_leaves_nothing_to_go_on() {
    for paused in [false, true] {
        let mut run = Bench::start(counter());
        run.ok("a", Value::Null);
        if paused {
            run.input(Input::Messages(vec![Inbound::Pause { reason: "look".into(), by: None }]));
        }
        let cancel = || Inbound::Cancel { reason: "enough".into(), until: None };
        run.input(Input::Messages(vec![cancel(), cancel()]));
        assert_eq!((run.live(), run.state.status), (vec!["!finally/clean"], RunStatus::Cancelling));
        run.ok("!finally/clean", Value::Null);
        assert_eq!(run.state.status, RunStatus::Cancelled);
        replays(&run);
    }
}

#[test]
fn a_failure_or_a_termination_while_it_cleans_up_is_the_end() {
    let mut run = Bench::start(counter());
    run.ok("a", Value::Null);
    run.end("!finally/clean", Err(Failure::permanent("user.bad", "x")));
    assert_eq!(run.failed_code(), "user.bad");
    replays(&run);

    let mut run = Bench::start(counter());
    run.ok("a", Value::Null);
    run.input(Input::Terminated { reason: "operator".into() });
    assert_eq!(run.state.status, RunStatus::Terminated);
    replays(&run);
}

#[test]
fn inputs_that_are_refused_are_a_failure_of_the_step_that_can_be_caught() {
    let refused = |with: &[(&str, Data)]| {
        let mut d = counter();
        d.steps[1] = again(with, false);
        let mut run = Bench::start(d);
        run.ok("a", Value::Null);
        run.ok("!finally/clean", Value::Null);
        assert_eq!(run.failed_code(), "input.invalid");
        let failure = run.state.failure.clone().expect("a failure");
        assert_eq!(failure.path.as_deref(), Some("again"));
        replays(&run);
        failure.message
    };
    assert!(refused(&[("n", lit(json!("many")))]).contains("integer"));
    assert!(refused(&[("m", lit(json!(1)))]).contains("there is no input `m`"));

    let mut d = counter();
    d.steps[1] = again(&[("n", lit(json!("many")))], false);
    d.steps[1].catch = vec![Catch { on: vec!["input.*".into()], condition: None, steps: vec![act("mend", &[])] }];
    let mut run = Bench::start(d);
    run.ok("a", Value::Null);
    assert_eq!(run.live(), ["again!/mend"]);
    replays(&run);
}

#[test]
fn the_version_that_is_current_takes_its_own_inputs() {
    let run_under = |current: Option<Current>, with: &[(&str, Data)]| {
        let mut d = counter();
        d.steps[1] = group("around", vec![again(with, true)]);
        d.finally.clear();
        let mut run = Bench::start(d);
        run.current = current;
        run.ok("a", Value::Null);
        replays(&run);
        run
    };
    let hash = DefinitionHash([9; 32]);
    let newer = || {
        let inputs = BTreeMap::from([("m".into(), number(None)), ("more".into(), number(Some(5)))]);
        Some(Current::Version { hash, inputs })
    };
    let run = run_under(newer(), &[("m", x("inputs.n"))]);
    assert_eq!(continued(&run), (json!({"m": 1, "more": 5}), Some(hash)));
    assert_eq!(run_under(newer(), &[("n", x("inputs.n"))]).failed_code(), "input.invalid");
    // Its own is the current one.
    let run = run_under(None, &[("n", lit(json!(3)))]);
    assert_eq!(continued(&run), (json!({"n": 3, "step": 7}), None));
    assert_eq!(run_under(None, &[("m", lit(json!(3)))]).failed_code(), "input.invalid");
}

#[test]
fn another_definition_diverges_where_it_would_not_have_continued() {
    let mut run = Bench::start(counter());
    run.ok("a", Value::Null);
    let mut other = counter();
    other.steps[1] = again(&[("n", x("inputs.n + 2"))], false);
    let divergence = run.replayed(&other, 0).divergence.expect("another input");
    assert_eq!(divergence.found.expect("found")["type"], "run_ending");
}

#[test]
fn only_definitions_that_continue_need_the_newer_format() {
    assert_eq!(counter().lowest_format(), 2);
    assert_eq!(definition(vec![act("a", &[])]).lowest_format(), 1);
}
