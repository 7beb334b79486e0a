//! What the world itself finds when it comes to rest, and that nothing else does: of a world in which one thing is wrong.

use super::{
    super::{auditor, scenario},
    *,
};

const RUN: RunId = RunId(Uuid::from_u128(1));

/// One run, nobody's yet.
fn fine() -> World {
    let mut world = World::new(1, None);
    world.store.start(RUN, scenario::PARENT, "default", (3, 0), json!({}));
    world
}

/// As [`crate::sim::simulate`] after its chaos.
fn found(world: &mut World) -> Vec<Finding> {
    let mut findings = world.calm();
    findings.extend(auditor::audit(&world.evidence()));
    findings
}

/// What is wrong: the check that notices, words of what it says, and how.
type Wrong = (Check, &'static str, fn(&mut World));

/// At least one for each thing that the world says at its end.
pub(in crate::sim) const WRONGS: &[Wrong] = &[
    (Check::Quarantined, "is quarantined", |world| world.store.quarantine(RUN, 0)),
    (Check::Quarantined, "is quarantined: cursor of run", |world| {
        world.store.runs.get_mut(&RUN).expect("the run").cursor = Some(json!("nonsense"));
    }),
    (Check::Ends, "never ends", |world| {
        // Nobody works for that queue.
        world.store.runs.get_mut(&RUN).expect("the run").queue = "nowhere".into();
    }),
];

#[test]
fn each_wrong_is_noticed_by_its_own_check_and_by_no_other() {
    assert_eq!(found(&mut fine()), [], "all is well");
    let mut wrong = Vec::new();
    for (n, (check, words, corrupt)) in WRONGS.iter().enumerate() {
        let mut world = fine();
        corrupt(&mut world);
        let findings = found(&mut world);
        let own = findings.iter().all(|finding| finding.check == *check);
        if !own || !findings.iter().any(|finding| finding.text.contains(words)) {
            wrong.push(format!("{n}: {check:?}, `{words}`: {findings:#?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn a_migration_that_finds_a_broken_run_is_a_finding() {
    let mut world = fine();
    world.store.runs.get_mut(&RUN).expect("the run").cursor = Some(json!("nonsense"));
    world.migrate_something();
    let findings = world.complaints();
    assert_eq!(findings.iter().map(|finding| finding.check).collect::<Vec<_>>(), [Check::Quarantined], "{findings:?}");
}
