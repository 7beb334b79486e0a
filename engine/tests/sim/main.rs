//! The seeded simulator: the same seeds every time, some new ones every time, and the proof that the auditor would notice.
//! One seed alone: `SIM_SEED=7 cargo test -p loopwright-engine --test sim`. For hours: `cargo sim -- --hours 1`.

mod matrix;

use loopwright_engine::sim::{Happened, Mutant, Outcome, simulate};

/// Seeds that are always simulated.
const FIXED: std::ops::Range<u64> = 0..40;
/// Seeds that nobody has chosen.
const RANDOM: usize = 20;
/// Seeds within which every mutant must be found.
const HUNT: std::ops::Range<u64> = 0..200;

fn check(seed: u64) -> Happened {
    let Outcome { findings, happened } = simulate(seed, None);
    assert!(
        findings.is_empty(),
        "SIM_SEED={seed} cargo test -p loopwright-engine --test sim -- the_seed\n{}",
        findings.join("\n")
    );
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

#[test]
fn the_auditor_finds_every_broken_promise() {
    for mutant in Mutant::ALL {
        let found = HUNT.into_iter().find_map(|seed| {
            let findings = simulate(seed, Some(*mutant)).findings;
            findings.into_iter().next().map(|finding| (seed, finding))
        });
        match found {
            Some((seed, finding)) => println!("{mutant:?}: seed {seed}: {finding}"),
            None => panic!("{mutant:?} goes unnoticed"),
        }
    }
}
