//! A run goes on under another definition, or everything that stands in the way is told.

use super::{
    edges::{call_step, group},
    *,
};
use crate::definition::Branch;

pub(super) fn hash(definition: &Definition) -> DefinitionHash {
    definition.hash(&Bundle::new())
}

pub(super) fn checked(run: &Bench, new: &Definition, map: &[(&str, &str)], unread: &[Inbound]) -> Migration {
    let mut calls = BTreeMap::new();
    new.walk(&mut |step| {
        if let Kind::Call { workflow, version, .. } = &step.kind
            && workflow == "child"
        {
            calls.insert(call_key(workflow, version), DefinitionHash([7; 32]));
        }
    });
    let mut catalog = vec![];
    for name in ["work@1", "other@1"] {
        let mut signature = run.catalog.get("work@1").expect("offered").clone();
        signature.name = name.into();
        signature.output_schema = json!({"type": "object", "required": ["v"]});
        catalog.push(signature);
    }
    let catalog = Catalog::new(catalog);
    let moment = Moment {
        now: run.now,
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
    let asked = Migrate {
        from: hash(&run.definition),
        to: hash(new),
        map: map.iter().map(|(from, to)| ((*from).to_owned(), (*to).to_owned())).collect(),
        inputs: run.state.inputs.clone(),
        reason: "better".into(),
        by: None,
    };
    migrate(&run.definition, new, &run.state, unread, asked, &moment)
}

/// As the store does it.
pub(super) fn apply(run: &mut Bench, new: Definition, event: Event) {
    fold(&mut run.state, &event).expect("legal");
    fold(&mut run.mirror, &event).expect("legal");
    let stored: RunState = serde_json::from_str(&serde_json::to_string(&run.state).expect("json")).expect("state");
    assert_eq!(run.mirror, stored);
    let seq = run.rows.len() as u64 + 1;
    let (format, events) = (event.format(), vec![serde_json::to_value(&event).expect("json")]);
    run.rows.push(crate::view::HistoryRow { seq, epoch: 1, format, events, at: run.now });
    run.definition = new;
}

/// Migrates and lets the run go on. The notes.
fn migrated(run: &mut Bench, new: Definition, map: &[(&str, &str)]) -> Vec<(String, Rule)> {
    let found = checked(run, &new, map, &[]);
    assert_eq!(found.violations, [], "{found:#?}");
    assert_eq!(found.running, Vec::<String>::new());
    apply(run, new, found.event.expect("possible"));
    run.input(Input::TakenOver);
    found.notes.into_iter().map(|n| (n.path, n.rule)).collect()
}

fn refused(run: &Bench, new: &Definition, map: &[(&str, &str)]) -> Vec<(String, Rule)> {
    let found = checked(run, new, map, &[]);
    assert!(found.event.is_none() && found.violations.iter().all(|v| !v.text.is_empty()), "{found:#?}");
    found.violations.into_iter().map(|v| (v.path, v.rule)).collect()
}

fn one(path: &str, rule: Rule) -> Vec<(String, Rule)> {
    vec![(path.to_owned(), rule)]
}

pub(super) fn paused(run: &mut Bench) {
    run.input(Input::Messages(vec![Inbound::Pause { reason: String::new(), by: None }]));
}

fn resumed(run: &mut Bench) {
    run.input(Input::Messages(vec![Inbound::Resume { reason: String::new(), by: None, halted: None }]));
}

pub(super) fn ask(id: &str) -> Step {
    let mut step = await_step(id, None, OnTimeout::Fail);
    if let Kind::Await(spec) = &mut step.kind {
        (spec.show, spec.timeout_ms) = (None, 600_000);
        spec.remind_ms.clear();
    }
    step
}

/// `a` has run, `ask` waits, `z` is to come.
fn waiting_run() -> Bench {
    let mut run = Bench::start(definition(vec![act("a", &[]), ask("ask"), act("z", &[("n", x("steps.a.output.n"))])]));
    run.ok("a", json!({"n": 1, "v": 1}));
    run
}

fn with(change: impl FnOnce(&mut Definition)) -> Definition {
    let mut new = definition(vec![act("a", &[]), ask("ask"), act("z", &[("n", x("steps.a.output.n"))])]);
    change(&mut new);
    new
}

#[test]
fn what_waits_goes_on_waiting_and_the_new_steps_follow() {
    let mut run = waiting_run();
    let deadline = run.state.deadline;
    let new = with(|d| {
        d.steps.insert(0, act("first", &[]));
        d.steps.insert(2, act("before", &[]));
        d.steps.insert(4, act("after", &[("n", x("steps.a.output.n + 1"))]));
        d.timeout_ms = 1_000;
    });
    let notes = migrated(&mut run, new, &[]);
    assert_eq!(notes, [("first".into(), Rule::Skipped), ("before".into(), Rule::Skipped), (String::new(), Rule::Kept)]);
    assert_eq!(run.state.deadline, deadline);
    assert!(run.live.is_empty(), "nothing begins before what waits: {:?}", run.live);
    run.signal("ask", json!({"text": "x"}));
    assert_eq!(run.live["after"], (1, json!({"n": 2})));
    run.ok("after", json!({}));
    run.ok("z", json!({}));
    assert_eq!(run.state.status, RunStatus::Completed);
    let skipped =
        run.rows.iter().flat_map(|r| &r.events).filter(|e| e["type"] == "step_started" && e["path"] == "first");
    assert_eq!(skipped.count(), 0);
}

#[test]
fn every_violation_is_told_and_not_the_first_only() {
    let run = waiting_run();
    let new = with(|d| {
        d.name = "another".into();
        d.executions_max = 2;
        d.steps[1] = act("ask", &[]);
        d.steps[2] = act("z", &[("n", x("steps.a.output.gone")), ("c", x("steps.ask.output"))]);
        d.inputs.insert("must".into(), crate::definition::Input { schema: json!({}), required: true, default: None });
        d.env.insert("e".into(), x("inputs.nothing"));
        d.steps.push(step(
            "far",
            Kind::Call {
                workflow: "nowhere".into(),
                version: crate::definition::CallVersion::Latest,
                with: BTreeMap::new(),
                parent_close: crate::definition::ParentClose::Cancel,
            },
        ));
    });
    let rules: Vec<Rule> = refused(&run, &new, &[("no", "where")]).into_iter().map(|(_, rule)| rule).collect();
    use Rule as R;
    assert_eq!(
        rules,
        [
            R::WorkflowDiffers,
            R::MapInvalid,
            R::MapInvalid,
            R::KindChanged,
            R::ExecutionsExceeded,
            R::InputInvalid,
            R::EnvInvalid,
            R::OutputMissing,
            R::CallUnresolved
        ]
    );
}

#[test]
fn what_is_under_way_needs_its_image() {
    let run = waiting_run();
    assert_eq!(refused(&run, &with(|d| drop(d.steps.remove(1))), &[]), one("ask", Rule::StepMissing));
    let renamed = with(|d| d.steps[1].id = "question".into());
    assert_eq!(refused(&run, &renamed, &[]), one("ask", Rule::StepMissing));
    let into_block = with(|d| d.steps[1] = group("g", vec![ask("ask")]));
    assert_eq!(refused(&run, &into_block, &[]), one("ask", Rule::StepMissing));
    let approval =
        with(|d| d.steps[1] = await_step("ask", Some(Approval { quorum: 1, fail_on_reject: false }), OnTimeout::Fail));
    assert_eq!(refused(&run, &approval, &[]), one("ask", Rule::KindChanged));
    // Its signal is what it waits for, whatever it is called.
    let mut run = run;
    let another = with(|d| d.steps[1] = ask("question"));
    assert_eq!(refused(&run, &another, &[("ask", "question")]), one("ask", Rule::SignalChanged));
    migrated(&mut run, renamed, &[("ask", "question")]);
    run.signal("ask", json!({"text": "x"}));
    assert_eq!(run.state.node("question").and_then(|n| n.status), Some(crate::event::StepStatus::Succeeded));
}

#[test]
fn a_message_that_waits_is_still_taken() {
    let form = |schema: Value| {
        with(|d| {
            if let Kind::Await(spec) = &mut d.steps[1].kind {
                spec.form = Some(schema);
                spec.filter = Some(e("false"));
            }
        })
    };
    let mut run = Bench::start(form(json!({"type": "object"})));
    run.ok("a", json!({"n": 1}));
    run.signal("ask", json!({"text": "x"}));
    let strict = form(json!({"type": "object", "required": ["n"]}));
    let found = refused(&run, &strict, &[]);
    assert_eq!(found, [("ask".into(), Rule::PayloadRefused), (String::new(), Rule::PayloadRefused)]);
    assert_eq!(checked(&run, &form(json!({"required": ["text"]})), &[], &[]).violations, []);
    // What was sent and not read counts as well.
    let unread = Inbound::Signal { n: 9, name: "ask".into(), payload: json!({"text": "y"}), sender: None, at: run.now };
    let mut run = Bench::start(form(json!({"type": "object"})));
    run.ok("a", json!({"n": 1}));
    let found = checked(&run, &strict, &[], &[unread]);
    assert_eq!(found.violations.iter().map(|v| v.rule).collect::<Vec<_>>(), [Rule::PayloadRefused]);
}

#[test]
fn what_is_to_come_finds_what_it_reads() {
    let run = waiting_run();
    let reads = |text: &str| with(|d| d.steps[2] = act("z", &[("n", x(text))]));
    assert_eq!(refused(&run, &reads("steps.a.output.m"), &[]), one("z", Rule::OutputMissing));
    for fine in [
        "steps.a.output.n",
        "steps.ask.output.text",
        "has(steps.a.output.m) ? steps.a.output.m : 0",
        "default(steps.a.output.m, 1)",
    ] {
        assert_eq!(checked(&run, &reads(fine), &[], &[]).violations, [], "{fine}");
    }
    // A step that was put in before what has run has no output.
    let inserted = |text: &str| {
        with(|d| {
            d.steps[2] = act("z", &[("n", x(text))]);
            d.steps.insert(0, act("first", &[]));
        })
    };
    assert_eq!(refused(&run, &inserted("steps.first.output.n"), &[]), one("z", Rule::OutputMissing));
    assert_eq!(
        checked(&run, &inserted("steps.first.status == 'skipped' ? 0 : steps.first.output.n"), &[], &[]).violations,
        []
    );
    // A step that was removed must not be read, wherever that is.
    for read in [
        with(|d| drop(d.steps.remove(0))),
        with(|d| {
            d.steps.remove(0);
            d.steps[1] = act("z", &[]);
            d.outputs.insert("n".into(), x("steps.a.output.n"));
        }),
        with(|d| {
            d.steps.remove(0);
            d.steps[1] =
                group("z", vec![act("inner", &[("n", Data::Template(Template("{{steps.a.output.n}}".into())))])]);
        }),
        with(|d| {
            d.steps.remove(0);
            d.steps[1] = act("z", &[]);
            d.finally = vec![act("clean", &[("n", x("steps.a.output.n"))])];
        }),
    ] {
        let found = refused(&run, &read, &[]);
        assert_eq!((found.len(), found[0].1), (1, Rule::OutputMissing), "{found:?}");
    }
    // What the old definition read and did not find is its own affair.
    let old = |d: &mut Definition| d.steps[2] = act("z", &[("n", x("steps.a.output.never"))]);
    let mut run = Bench::start(with(old));
    run.ok("a", json!({"n": 1}));
    let new = with(|d| {
        old(d);
        d.steps.push(act("more", &[]));
    });
    assert_eq!(checked(&run, &new, &[], &[]).violations, []);
}

#[test]
fn an_output_that_is_still_read_satisfies_the_new_form() {
    let awaited = |form: Value| {
        let mut first = ask("first");
        if let Kind::Await(spec) = &mut first.kind {
            spec.form = Some(form);
        }
        definition(vec![first, ask("ask"), act("z", &[("n", x("steps.first.output.text"))])])
    };
    let mut run = Bench::start(awaited(json!({"type": "object"})));
    run.signal("first", json!({"text": "x"}));
    assert_eq!(refused(&run, &awaited(json!({"required": ["more"]})), &[]), one("z", Rule::OutputMissing));
    // Of another activity by what is known of it.
    let named = |name: &str| with(|d| d.steps[0].kind = Kind::Activity { name: name.into(), with: BTreeMap::new() });
    let mut run = Bench::start(named("work@1"));
    run.ok("a", json!({"n": 1}));
    assert_eq!(checked(&run, &named("work@1"), &[], &[]).violations, []);
    assert_eq!(refused(&run, &named("other@1"), &[]), one("z", Rule::OutputMissing));
    let run = waiting_run();
    let found = checked(&run, &named("other@1"), &[], &[]);
    assert_eq!((found.violations, found.notes[0].rule), (vec![], Rule::Kept));
}

#[test]
fn what_had_still_to_come_is_not_passed_and_what_has_run_does_not_run_again() {
    let run = waiting_run();
    let moved = with(|d| {
        let z = d.steps.pop().expect("z");
        d.steps.insert(0, z);
    });
    assert_eq!(refused(&run, &moved, &[]), one("z", Rule::StepMoved));
    let removed = with(|d| drop(d.steps.pop()));
    assert_eq!(checked(&run, &removed, &[], &[]).notes[0].rule, Rule::Removed);
    // A `redo` around what has run would run it again; one that it is behind of is passed.
    let redo = |steps: Vec<Step>| {
        let id = format!("{}..{}", steps[0].id, steps[steps.len() - 1].id);
        step(
            &id,
            Kind::Repeat {
                steps,
                max_rounds: 3,
                condition: RepeatCondition::While(e("false")),
                delay_ms: 0,
                exhausted: Exhausted::Continue,
                transparent: true,
                gate: None,
                outputs: None,
            },
        )
    };
    let again = definition(vec![act("a", &[]), ask("ask"), redo(vec![act("z", &[])])]);
    assert_eq!(checked(&run, &again, &[], &[]).violations, []);
    let around = definition(vec![redo(vec![act("a", &[])]), ask("ask"), act("z", &[("n", x("steps.a.output.n"))])]);
    let mut passes = waiting_run();
    migrated(&mut passes, around.clone(), &[]);
    // And back: its step stands beside it.
    migrated(&mut passes, with(|_| {}), &[]);
    passes.signal("ask", json!({"text": "x"}));
    assert_eq!(passes.live["z"], (1, json!({"n": 1})));
    let mut run = Bench::start(definition(vec![act("a", &[]), act("b", &[]), act("c", &[])]));
    paused(&mut run);
    run.ok("a", json!({}));
    let both = definition(vec![redo(vec![act("a", &[]), act("b", &[])]), act("c", &[])]);
    let found = refused(&run, &both, &[]);
    assert_eq!(found, one("a..b", Rule::StepMoved));
}

#[test]
fn steps_with_retries_to_come_stay_what_and_where_they_are() {
    let mut run = Bench::start(definition(vec![group("g", vec![act("a", &[])])]));
    run.end("g/a", Err(Failure::retryable("transient.network", "x")));
    let other = |name: &str, g: &str, a: &str| {
        let mut inner = act(a, &[]);
        inner.kind = Kind::Activity { name: name.into(), with: BTreeMap::new() };
        definition(vec![group(g, vec![inner])])
    };
    assert_eq!(refused(&run, &other("work@2", "g", "a"), &[]), one("g/a", Rule::WorkChanged));
    assert_eq!(refused(&run, &other("work@1", "g", "b"), &[("a", "b")]), one("g/a", Rule::PathChanged));
    assert_eq!(refused(&run, &other("work@1", "h", "a"), &[("g", "h")]), one("g/a", Rule::PathChanged));
    assert_eq!(checked(&run, &other("work@1", "g", "a"), &[], &[]).violations, []);
    let mut run = Bench::start(definition(vec![call_step()]));
    let callee = |workflow: &str| {
        let mut call = call_step();
        if let Kind::Call { workflow: name, .. } = &mut call.kind {
            *name = workflow.into();
        }
        definition(vec![call])
    };
    assert_eq!(refused(&run, &callee("another"), &[]), one("c", Rule::WorkChanged));
    migrated(&mut run, callee("child"), &[]);
    assert_eq!(run.children.len(), 1, "the child under way is not called again");
}

#[test]
fn nobody_gets_a_path_under_which_another_step_has_run() {
    let mut run = waiting_run();
    let renamed = with(|d| {
        d.steps[0].id = "b".into();
        d.steps[2] = act("z", &[("n", x("steps.b.output.n"))]);
    });
    let taken = |d: &Definition| {
        let mut d = d.clone();
        d.steps.push(act("a", &[]));
        d
    };
    assert_eq!(refused(&run, &taken(&renamed), &[("a", "b")]), one("a", Rule::NameTaken));
    migrated(&mut run, renamed.clone(), &[("a", "b")]);
    assert_eq!(refused(&run, &taken(&renamed), &[]), one("a", Rule::NameTaken), "also later");
    // Back again, by the map the other way round.
    migrated(&mut run, with(|_| {}), &[("b", "a")]);
    run.signal("ask", json!({"text": "x"}));
    assert_eq!(run.live["z"], (1, json!({"n": 1})));
    run.ok("z", json!({}));
    assert_eq!(run.state.status, RunStatus::Completed);
    let run = waiting_run();
    let two = with(|d| d.steps[0].id = "ask".into());
    assert!(refused(&run, &two, &[("a", "ask")]).contains(&("ask".into(), Rule::MapInvalid)));
}

#[test]
fn an_ended_step_and_a_new_one_of_its_name_are_not_confused() {
    let run = waiting_run();
    let other = with(|d| d.steps[0] = set("a", "n", lit(json!(1))));
    assert_eq!(refused(&run, &other, &[]), one("a", Rule::KindChanged));
}

#[test]
fn a_step_that_is_over_lends_nobody_its_name() {
    let mut run = waiting_run();
    migrated(&mut run, with(|d| d.steps.insert(1, act("notify", &[]))), &[]);
    // Skipped, because it came before what waits. Behind that, under its own name, it would not run either.
    let moved = with(|d| d.steps.insert(2, act("notify", &[])));
    assert_eq!(refused(&run, &moved, &[]), one("notify", Rule::StepMoved));
    // Left where it is, or under another name, it is in nobody's way.
    migrated(&mut run, with(|d| d.steps.insert(1, act("notify", &[]))), &[]);
    migrated(&mut run, with(|d| d.steps.insert(2, act("tell", &[]))), &[]);

    let mut run = waiting_run();
    let without =
        |more: Option<Step>| definition([ask("ask"), act("z", &[])].into_iter().chain(more).collect::<Vec<_>>());
    migrated(&mut run, without(None), &[]);
    assert_eq!(refused(&run, &without(Some(act("a", &[]))), &[]), one("a", Rule::StepMoved));
}

#[test]
fn blocks_that_are_open_stay_the_blocks_they_are() {
    let branch = |name: &str| Branch { name: name.into(), steps: vec![ask(&format!("{name}1"))] };
    let parallel = |names: &[&str]| {
        let branches = names.iter().map(|n| branch(n)).collect();
        definition(vec![step("p", Kind::Parallel { branches, join: Join::All, fail_fast: true })])
    };
    let run = Bench::start(parallel(&["l", "r"]));
    assert_eq!(refused(&run, &parallel(&["l", "r", "m"]), &[]), one("p", Rule::BlockChanged));
    assert_eq!(refused(&run, &parallel(&["l"]), &[]), one("p", Rule::BlockChanged));
    let switch = |whens: &[&str]| {
        let cases = whens
            .iter()
            .map(|when| Case { when: Some(e(when)), steps: vec![ask(&format!("on_{}", when.replace(' ', "")))] })
            .collect();
        definition(vec![step("s", Kind::Switch { cases })])
    };
    let run = Bench::start(switch(&["false", "true"]));
    assert_eq!(refused(&run, &switch(&["false", "1 == 1", "true"]), &[]), one("s", Rule::BlockChanged));
    assert_eq!(refused(&run, &switch(&["true"]), &[]), one("s", Rule::BlockChanged));
    let mut edited = switch(&["false", "true"]);
    if let Kind::Switch { cases } = &mut edited.steps[0].kind {
        cases[1].when = Some(e("2 > 1"));
    }
    assert_eq!(checked(&run, &edited, &[], &[]).violations, [], "the same case, edited");
    let caught = |on: &[&str]| {
        let mut a = act("a", &[]);
        a.catch = on
            .iter()
            .map(|on| Catch {
                on: vec![(*on).to_owned()],
                condition: None,
                steps: vec![ask(&format!("h_{}", on.replace(['.', '*'], "")))],
            })
            .collect();
        definition(vec![a])
    };
    let mut run = Bench::start(caught(&["user.x", "user.*"]));
    run.end("a", Err(Failure::permanent("user.y", "x")));
    assert_eq!(refused(&run, &caught(&["user.x"]), &[]), one("a", Rule::BlockChanged));
    assert_eq!(refused(&run, &caught(&["user.x", "user.z", "user.*"]), &[]), one("a", Rule::BlockChanged));
    assert_eq!(checked(&run, &caught(&["user.x", "user.*", "*"]), &[], &[]).violations, []);
}

#[test]
fn rounds_items_and_times_have_room() {
    let repeat = |rounds: u32| {
        definition(vec![step(
            "r",
            Kind::Repeat {
                steps: vec![ask("ask")],
                max_rounds: rounds,
                condition: RepeatCondition::Until(e("round.number == 3")),
                delay_ms: 0,
                exhausted: Exhausted::Continue,
                transparent: false,
                gate: None,
                outputs: None,
            },
        )])
    };
    let mut run = Bench::start(repeat(5));
    run.signal("ask", json!({"text": "x"}));
    assert_eq!(refused(&run, &repeat(1), &[]), one("r", Rule::RoundsExceeded));
    migrated(&mut run, repeat(2), &[]);
    run.signal("ask", json!({"text": "x"}));
    assert_eq!(run.state.status, RunStatus::Completed, "exhausted after two");
    let each = |most: u32| {
        definition(vec![step(
            "f",
            Kind::Foreach {
                list: e("[1, 2, 3]"),
                key: None,
                max_items: most,
                concurrency: 2,
                on_item_failure: OnItemFailure::Continue,
                steps: vec![ask("ask")],
                outputs: None,
            },
        )])
    };
    let mut run = Bench::start(each(3));
    assert_eq!(refused(&run, &each(2), &[]), one("f", Rule::ItemsExceeded));
    // Items that have not begun have the new steps from their beginning.
    let mut longer = each(3);
    if let Kind::Foreach { steps, list, .. } = &mut longer.steps[0].kind {
        steps.insert(0, act("first", &[("n", x("item"))]));
        *list = e("[7]");
    }
    let notes = migrated(&mut run, longer, &[]);
    assert!(
        notes.contains(&("f[0]/first".into(), Rule::Skipped)) && notes.contains(&("f".into(), Rule::Kept)),
        "{notes:?}"
    );
    run.signal("ask", json!({"text": "x"}));
    assert_eq!(run.live["f[2]/first"], (1, json!({"n": 3})));
    let timed = |ms: u64| {
        let mut g = group("g", vec![ask("ask")]);
        g.timeouts.total_ms = Some(ms);
        definition(vec![g])
    };
    let mut run = Bench::start(timed(60_000));
    run.later(10_000);
    assert_eq!(refused(&run, &timed(10_000), &[]), one("g", Rule::Overdue));
    let notes = migrated(&mut run, timed(20_000), &[]);
    assert_eq!(notes, one("g", Rule::Changed));
    run.later(9_999);
    assert_eq!(run.state.status, RunStatus::Running);
    run.later(1);
    assert_eq!(run.failed_code(), "timeout.total");
}

#[test]
fn inputs_env_and_calls_are_those_of_the_new_definition() {
    let any = |default: Option<Value>| crate::definition::Input {
        schema: json!({"type": "integer"}),
        required: false,
        default,
    };
    let old = with(|d| {
        d.inputs.insert("n".into(), any(None));
        d.env.insert("same".into(), x("inputs.n"));
        d.env.insert("gone".into(), lit(json!(1)));
    });
    let mut run = Bench::start_with(old, json!({"n": 4}));
    run.ok("a", json!({"n": 1}));
    let new = with(|d| {
        d.inputs.insert("m".into(), any(Some(json!(7))));
        d.env.insert("same".into(), x("inputs.n"));
        d.env.insert("more".into(), x("inputs.m + 1"));
        d.steps[2] = act("z", &[("all", x("inputs.m + env.more + env.same"))]);
        d.steps.push(call_step());
    });
    let notes = migrated(&mut run, new, &[]);
    assert_eq!(notes.len(), 3, "{notes:?}");
    assert_eq!(run.state.inputs, json!({"n": 4, "m": 7}));
    assert_eq!(run.state.env, BTreeMap::from([("same".into(), json!(4)), ("more".into(), json!(8))]));
    run.signal("ask", json!({"text": "x"}));
    assert_eq!(run.live["z"].1, json!({"all": 19}));
    run.ok("z", json!({}));
    assert_eq!(run.children.len(), 1);
    let strict = with(|d| {
        d.inputs.insert(
            "n".into(),
            crate::definition::Input { schema: json!({"type": "string"}), required: true, default: None },
        );
    });
    let mut run = Bench::start_with(with(|_| {}), json!({"n": 4}));
    run.ok("a", json!({"n": 1}));
    assert_eq!(refused(&run, &strict, &[]), one("", Rule::InputInvalid));
}

#[test]
fn a_run_is_migrated_before_it_starts_and_while_it_is_paused_and_not_while_it_ends() {
    let mut run = waiting_run();
    paused(&mut run);
    migrated(&mut run, with(|d| d.steps.insert(2, act("y", &[]))), &[]);
    assert_eq!(run.state.status, RunStatus::Paused);
    run.signal("ask", json!({"text": "x"}));
    assert!(run.live.is_empty());
    resumed(&mut run);
    assert_eq!(run.live(), ["y"]);
    let found = checked(&run, &with(|d| d.steps.insert(2, act("y", &[]))), &[], &[]);
    assert_eq!(found.running, ["y"]);
    let event = found.event.expect("nothing else stands in the way");
    assert!(fold(&mut run.state.clone(), &event).is_err(), "not while an attempt runs");
    run.input(Input::Messages(vec![Inbound::Cancel { reason: "enough".into(), until: None }]));
    assert_eq!(refused(&run, &with(|_| {}), &[]), one("", Rule::RunEnding));

    let mut early = Bench::start(with(|_| {}));
    (early.state, early.mirror) = (RunState::new(early.state.run_id), RunState::new(early.state.run_id));
    early.rows.clear();
    early.live.clear();
    let new = with(|d| d.steps.insert(0, act("first", &[])));
    let found = checked(&early, &new, &[], &[]);
    apply(&mut early, new, found.event.expect("possible"));
    assert_eq!(early.state.status, RunStatus::Pending);
    early.input(Input::Started { inputs: json!({}), until: None });
    assert_eq!(early.live(), ["first"]);
}
