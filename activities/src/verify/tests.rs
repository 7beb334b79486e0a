//! The verdict and what follows from it, as pure functions of the facts.

use super::*;
use crate::{fact::Requirement, todo::Check};

fn item(id: &str, requirement: &str) -> Todo {
    Todo {
        id: id.into(),
        title: format!("Do {id}"),
        detail: String::new(),
        requirements: vec![requirement.into()],
        depends_on: vec![],
        files: vec![],
        checks: vec![Check { command: format!("test {id}"), expect_exit: 0, timeout_s: 10 }],
        frozen: vec![],
    }
}

fn result(command: &str, exit: i32) -> CheckResult {
    CheckResult {
        command: command.into(),
        passed: exit == 0,
        expect_exit: 0,
        exit_code: Some(exit),
        timed_out: false,
        duration_ms: 1,
        output_tail: String::new(),
        log_sha256: String::new(),
        sandbox: "bubblewrap".into(),
    }
}

fn facts(results: Vec<(String, CheckResult)>, states: &[(&str, State)]) -> Facts {
    let requirement = |id: &str| Requirement { id: id.into(), text: id.into() };
    Facts {
        requirements: Requirements {
            idea: "x".into(),
            requirements: vec![requirement("R1"), requirement("R2")],
            assumptions: vec![],
        },
        plan: Plan { summary: String::new(), stack: vec![], items: vec![item("a", "R1"), item("b", "R2")] },
        states: states.iter().map(|(id, state)| ((*id).to_owned(), *state)).collect(),
        results,
        files: Files::new(),
        carried: vec![],
    }
}

fn criterion(requirement: &str, verdict: Verdict) -> Criterion {
    Criterion { requirement: requirement.into(), verdict, reason: "because".into(), citations: vec![], carried: false }
}

const DONE: [(&str, State); 2] = [("a", State::Done), ("b", State::Done)];

fn green() -> Vec<(String, CheckResult)> {
    vec![("a".into(), result("test a", 0)), ("b".into(), result("test b", 0))]
}

#[test]
fn only_green_checks_done_items_and_accepted_criteria_accept() {
    let accepted = [criterion("R1", Verdict::Accept), criterion("R2", Verdict::Accept)];
    assert_eq!(facts(green(), &DONE).verdict(&accepted), Verdict::Accept);
    let mut red = green();
    red[1].1 = result("test b", 1);
    assert_eq!(facts(red, &DONE).verdict(&accepted), Verdict::Reject, "a check cannot be argued away");
    assert_eq!(facts(green(), &[DONE[0], ("b", State::Blocked)]).verdict(&accepted), Verdict::Reject);
    assert_eq!(facts(green(), &DONE[..1]).verdict(&accepted), Verdict::Reject, "never committed");
    assert_eq!(facts(green(), &DONE).verdict(&accepted[..1]), Verdict::Reject, "R2 is not judged");
    assert_eq!(
        facts(green(), &DONE).verdict(&[accepted[0].clone(), criterion("R2", Verdict::Reject)]),
        Verdict::Reject
    );
}

#[test]
fn a_rejection_always_names_something_to_do() {
    let ids = |items: Vec<Todo>| items.into_iter().map(|item| item.id).collect::<Vec<_>>();
    let rejected = [criterion("R1", Verdict::Accept), criterion("R2", Verdict::Reject)];
    assert_eq!(ids(facts(green(), &DONE).next(&rejected, vec![])), ["mend-r2-1"]);
    assert_eq!(ids(facts(green(), &DONE).next(&rejected, vec![item("errors", "R2")])), ["errors"]);
    let blocked = facts(green(), &[DONE[0], ("b", State::Blocked)]);
    assert_eq!(ids(blocked.next(&rejected, vec![])), ["b"], "a blocked item is taken up again as it is");
    let mut red = green();
    red[0].1 = result("test a", 2);
    let broken = facts(red, &DONE);
    let accepted = [criterion("R1", Verdict::Accept), criterion("R2", Verdict::Accept)];
    let next = broken.next(&accepted, vec![]);
    assert_eq!((next[0].id.as_str(), next[0].checks[0].command.as_str()), ("mend-a-1", "test a"));
    assert!(next[0].detail.contains("exits with 2"));
    // A plan that was extended knows each item once.
    assert_eq!(broken.plan.with(&next).with(&next).items.len(), 3);
}

#[test]
fn the_report_says_what_was_judged_and_on_what() {
    let mut criteria = vec![criterion("R1", Verdict::Accept), criterion("R2", Verdict::Reject)];
    criteria[0].citations =
        vec![Citation { path: "src/a.rs".into(), line: 3, check: String::new(), sha256: String::new() }];
    let facts = facts(green(), &DONE);
    let report = facts.report(Verdict::Reject, &criteria, &[item("errors", "R2")], "Nearly.");
    for part in ["**Rejected.** Nearly.", "2 of 2 pass", "R1 accepted: because [src/a.rs:3]", "- errors: Do errors"] {
        assert!(report.contains(part), "{part}: {report}");
    }
}
