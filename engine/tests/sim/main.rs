//! The seeded simulator: the same seeds every time, some new ones every time, and the proof that the auditor would notice.
//! A seed that fails, panics or hangs is named with the command that shows it again.
//! One seed alone: `SIM_SEED=7 cargo test -p loopwright-engine --test sim`. For hours: `cargo sim -- --hours 1`.

mod matrix;

use loopwright_engine::sim::{Happened, Mutant, Outcome, SEED_MAX, check_for, replay, simulate, simulate_within};

/// Seeds that are always simulated.
const FIXED: std::ops::Range<u64> = 0..40;
/// Seeds that nobody has chosen.
const RANDOM: usize = 20;
/// Seeds within which every mutant must be found.
const HUNT: std::ops::Range<u64> = 0..200;

fn check(seed: u64) -> Happened {
    let Outcome { findings, happened } = simulate_within(seed, None, SEED_MAX);
    let told: Vec<String> = findings.iter().map(ToString::to_string).collect();
    assert!(findings.is_empty(), "{}\n{}", replay(seed), told.join("\n"));
    happened
}

#[test]
fn the_seed_that_somebody_names() {
    if let Ok(text) = std::env::var("SIM_SEED") {
        let happened = check(text.parse().expect("SIM_SEED is a number"));
        println!("{happened:#?}");
    }
}

#[test]
fn fixed_seeds_end_well_and_meet_every_fault() {
    let mut sum = Happened::default();
    FIXED.for_each(|seed| sum += check(seed));
    let Happened {
        runs,
        transitions,
        attempts,
        kills,
        freezes,
        takeovers,
        lost_answers,
        doubled,
        late,
        refused_commits,
        refused_starts,
        clock_jumps,
        lost_attempts,
        signals,
        held_back,
        updates,
        continued,
        cancelled,
        terminated,
        pauses,
        resumes,
        duplicates,
        migrated,
        ended_children,
    } = sum;
    println!("{sum:#?}");
    for (what, times) in [
        ("runs", runs),
        ("transitions", transitions),
        ("attempts", attempts),
        ("kills", kills),
        ("freezes", freezes),
        ("takeovers", takeovers),
        ("lost answers", lost_answers),
        ("doubled deliveries", doubled),
        ("late deliveries", late),
        ("refused commits", refused_commits),
        ("refused starts", refused_starts),
        ("clock jumps", clock_jumps),
        ("lost attempts", lost_attempts),
        ("signals", signals),
        ("runs that waited for a place", held_back),
        ("updates", updates),
        ("runs that continued as new", continued),
        ("runs that were cancelled and cleaned up", cancelled),
        ("runs that were terminated", terminated),
        ("pauses", pauses),
        ("resumes", resumes),
        ("messages that came twice", duplicates),
        ("runs that went on under another definition", migrated),
        ("children that did not hear that they were to end", ended_children),
    ] {
        assert!(times >= 20, "only {times} {what}: the simulator does not try hard enough");
    }
}

#[test]
fn random_seeds_end_well() {
    let mut random = fastrand::Rng::new();
    for _ in 0..RANDOM {
        check(random.u64(..));
    }
}

#[test]
fn one_seed_is_one_history() {
    for seed in [1, 2, 3] {
        assert_eq!(simulate(seed, None).happened, simulate(seed, None).happened, "seed {seed}");
    }
}

/// By the check that is for it: another one that happens to notice may have been meant for something else, and go.
#[test]
fn every_broken_promise_is_found_by_its_own_check() {
    let (mut unnoticed, checks) = (Vec::new(), Mutant::ALL.iter().map(|mutant| (*mutant, check_for(*mutant))));
    for (mutant, own) in checks {
        let (mut others, mut found) = (std::collections::BTreeMap::new(), None);
        for seed in HUNT {
            let findings = simulate_within(seed, Some(mutant), SEED_MAX).findings;
            for finding in &findings {
                *others.entry(finding.check).or_insert(0) += 1;
            }
            found = findings.into_iter().find(|finding| finding.check == own).map(|finding| (seed, finding));
            if found.is_some() {
                break;
            }
        }
        match found {
            Some((seed, finding)) => println!("{mutant:?}: seed {seed}: {finding}"),
            None => unnoticed.push(format!("{mutant:?} is not found by {own:?}; found by {others:?}")),
        }
    }
    assert!(unnoticed.is_empty(), "{}", unnoticed.join("\n"));
}
