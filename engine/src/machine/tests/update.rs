//! Updates: accepted or rejected when they are read, answered by the step that takes them.

use super::*;

fn ask(reply: Option<Data>) -> Step {
    match await_step("ask", None, OnTimeout::Default).kind {
        Kind::Await(mut spec) => {
            (spec.reply, spec.show) = (reply, None);
            step("ask", Kind::Await(spec))
        }
        other => step("ask", other),
    }
}

/// The events of a type.
fn told(run: &Bench, kind: &str) -> Vec<Value> {
    run.rows.iter().flat_map(|r| &r.events).filter(|e| e["type"] == kind).cloned().collect()
}

#[test]
fn an_update_is_answered_by_the_step_that_takes_it_in_the_transition_in_which_it_is_read() {
    let reply = Data::Map(BTreeMap::from([
        ("was".to_owned(), x("steps.a.output.v")),
        ("you".to_owned(), x("signal.meta.by")),
        ("said".to_owned(), x("signal.text")),
    ]));
    let mut run = Bench::start(definition(vec![act("a", &[]), ask(Some(reply))]));
    run.ok("a", json!({"v": 7}));
    let rows = run.rows.len();
    run.update("ask", json!({"text": "hello"}));
    assert_eq!(run.rows.len(), rows + 1, "read, accepted, answered and gone on: one transition");
    let answer = &told(&run, "update_completed")[0];
    assert_eq!(answer["result"], json!({"was": 7, "you": "user:1", "said": "hello"}));
    assert_eq!((&answer["id"], &answer["path"]), (&json!("u1"), &json!("ask")));
    assert_eq!(run.state.status, RunStatus::Completed);
    assert_eq!(run.rows.last().map(|r| r.format), Some(3));
    assert_eq!(run.replayed(&run.definition, 0).divergence, None);
    let mut other = run.definition.clone();
    other.steps[1] = ask(None);
    assert!(run.replayed(&other, 0).divergence.is_some(), "another reply is another decision");
}

#[test]
fn an_early_update_waits_and_without_a_reply_the_payload_is_the_answer() {
    let mut run = Bench::start(definition(vec![act("a", &[]), ask(None)]));
    run.update("ask", json!({"text": "early"}));
    assert_eq!((told(&run, "update_accepted").len(), told(&run, "update_completed").len()), (1, 0));
    assert_eq!(run.state.mailbox[0].update.as_deref(), Some("u1"));
    run.ok("a", json!({}));
    assert_eq!(told(&run, "update_completed")[0]["result"], json!({"text": "early"}));
    assert_eq!(run.replayed(&run.definition, 0).divergence, None);
}

#[test]
fn what_no_step_takes_is_rejected_with_every_reason_and_changes_nothing() {
    let approval = await_step("ok", Some(Approval { quorum: 1, fail_on_reject: true }), OnTimeout::Fail);
    let mut run = Bench::start_with(definition(vec![act("a", &[]), ask(None), approval]), json!({"q": "?"}));
    // Its history has a newer vocabulary from now on; nothing else.
    let before = crate::machine::RunState { format: 3, ..run.state.clone() };
    run.update("nothing", json!({}));
    run.update("ask", json!({"no": "form"}));
    run.update("ok", json!({"decision": "approved"}));
    assert_eq!(run.state, before);
    let problems: Vec<String> = told(&run, "update_rejected").iter().map(|e| e["problems"].to_string()).collect();
    assert_eq!(problems.len(), 3);
    assert!(problems[0].contains("no step waits for an update `nothing`; this workflow's are `ask`"), "{problems:?}");
    assert!(problems[1].contains("text"), "{problems:?}");
    assert!(problems[2].contains("is an approval"), "{problems:?}");
    assert_eq!(run.replayed(&run.definition, 0).divergence, None);
}

#[test]
fn a_full_mailbox_rejects_and_the_hundred_that_wait_stay() {
    let mut run = Bench::start(definition(vec![act("a", &[]), ask(None)]));
    for _ in 0..=MAILBOX_MAX {
        run.update("ask", json!({"text": "x"}));
    }
    assert_eq!(run.state.mailbox.len(), MAILBOX_MAX);
    let rejected = told(&run, "update_rejected");
    assert!(rejected.len() == 1 && rejected[0]["problems"][0].as_str().expect("text").contains("under another id"));
    assert_eq!(run.replayed(&run.definition, 0).divergence, None);
}

#[test]
fn a_reply_that_cannot_be_evaluated_is_a_failure_for_the_sender_and_not_for_the_run() {
    let mut run = Bench::start(definition(vec![ask(Some(x("signal.nothing.more")))]));
    run.update("ask", json!({"text": "x"}));
    let answer = &told(&run, "update_completed")[0];
    assert_eq!((&answer["failure"]["code"], answer.get("result")), (&json!("expr.missing"), None));
    assert_eq!(run.state.status, RunStatus::Completed);
    assert_eq!(run.state.output, Some(json!({})));
}

#[test]
fn a_step_of_the_same_name_with_another_form_answers_that_it_does_not_fit() {
    let Kind::Await(mut spec) = ask(None).kind else { panic!("an await") };
    spec.form = Some(json!({"type": "object", "required": ["other"]}));
    let run_of = |payload| {
        let mut run = Bench::start(definition(vec![step("first", Kind::Await(spec.clone())), ask(None)]));
        run.update("ask", payload);
        run
    };
    let run = run_of(json!({"text": "for the second"}));
    assert_eq!(told(&run, "update_completed")[0]["failure"]["code"], "update.form");
    assert!(run.state.node("first").expect("there").live.is_some(), "it goes on waiting");
    let run = run_of(json!({"other": 1}));
    assert_eq!(told(&run, "update_completed")[0]["result"], json!({"other": 1}));
}

#[test]
fn a_paused_run_accepts_and_answers_when_it_goes_on() {
    let mut run = Bench::start(definition(vec![ask(None)]));
    run.input(Input::Messages(vec![Inbound::Pause { reason: String::new(), by: None }]));
    run.update("ask", json!({"text": "x"}));
    assert_eq!((told(&run, "update_accepted").len(), told(&run, "update_completed").len()), (1, 0));
    run.input(Input::Messages(vec![Inbound::Resume { reason: String::new(), by: None, halted: None }]));
    assert_eq!(told(&run, "update_completed").len(), 1);
    assert_eq!(run.replayed(&run.definition, 0).divergence, None);
}

#[test]
fn an_update_that_waits_at_a_fork_is_a_signal_there() {
    let mut run = Bench::start(definition(vec![act("a", &[]), ask(None)]));
    run.update("ask", json!({"text": "x"}));
    let event = Event::RunForked {
        parent: run.state.run_id,
        seq: 2,
        reason: String::new(),
        definition: DefinitionHash([1; 32]),
        inputs: json!({}),
        env: BTreeMap::new(),
        calls: BTreeMap::new(),
        restarted: vec!["a".into()],
        at: run.now,
        not_before: None,
        deadline: run.now,
    };
    // What runs is not ours, so it is not begun anew here: `a` is.
    let mut state = run.state.clone();
    fold(&mut state, &event).expect("legal");
    assert_eq!((state.mailbox.len(), &state.mailbox[0].update), (1, &None));
}
