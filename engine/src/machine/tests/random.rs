//! Random histories: whatever happens in whatever order, the test bench's invariants hold after every decision (folding
//! the events gives the state, no due instant is left behind, no run closes over a live attempt), and once the world
//! behaves, every run comes to its end.
//!
//! The same seeds every time, and some new ones. A seed that fails is named with the command that shows it again:
//! `MACHINE_SEED=7 cargo test -p loopwright-engine --lib -- whatever_happens`.

use super::*;
use edges::{call_step, group};
use std::ops::Range;

/// Names a seed that is tried alone.
const SEED: &str = "MACHINE_SEED";
/// Seeds that nobody has chosen.
const RANDOM: usize = 20;

/// A seed that is being tried; says so if that panics, wherever it does.
struct Tried {
    seed: u64,
    test: &'static str,
}

impl Drop for Tried {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{SEED}={} cargo test -p loopwright-engine --lib -- {}", self.seed, self.test);
        }
    }
}

/// Tries the fixed seeds and some new ones, or only the one that somebody names; false if it was that one.
pub(super) fn try_seeds(test: &'static str, fixed: Range<u64>, mut check: impl FnMut(u64)) -> bool {
    let named = std::env::var(SEED).ok().map(|text| text.parse().expect("MACHINE_SEED is a number"));
    let mut random = fastrand::Rng::new();
    let seeds = match named {
        Some(seed) => vec![seed],
        None => fixed.chain((0..RANDOM).map(|_| random.u64(..))).collect(),
    };
    for seed in seeds {
        let _tried = Tried { seed, test };
        check(seed);
    }
    named.is_none()
}

/// Every kind of step, nested, with every limit set.
fn everything() -> Definition {
    let mut slow =
        group("slow", vec![act("a", &[]), step("pause", Kind::Wait { until: WaitUntil::For(3_000) }), act("b", &[])]);
    slow.timeouts.total_ms = Some(20_000);
    slow.catch = vec![Catch { on: vec!["*".into()], condition: None, steps: vec![act("handler", &[])] }];
    let mut checked = act("work", &[("round", x("round.number"))]);
    checked.timeouts.total_ms = Some(15_000);
    let redo = step(
        "work..ok",
        Kind::Repeat {
            steps: vec![
                checked,
                await_step("ok", Some(Approval { quorum: 1, fail_on_reject: true }), OnTimeout::Reject),
            ],
            max_rounds: 3,
            condition: RepeatCondition::While(e("steps.ok.output.decision == 'changes_requested'")),
            delay_ms: 500,
            exhausted: Exhausted::Continue,
            transparent: true,
            gate: Some("ok".into()),
            outputs: None,
        },
    );
    let each = step(
        "each",
        Kind::Foreach {
            list: e("[1, 2, 3]"),
            key: None,
            max_items: 3,
            concurrency: 2,
            on_item_failure: OnItemFailure::Continue,
            steps: vec![redo, act("after", &[])],
            outputs: None,
        },
    );
    let branch = |name: &str, steps| crate::definition::Branch { name: name.into(), steps };
    let mut race = step(
        "race",
        Kind::Parallel {
            branches: vec![
                branch("l", vec![act("l1", &[]), call_step()]),
                branch("r", vec![await_step("answer", None, OnTimeout::Default)]),
                branch("m", vec![group("inner", vec![act("m1", &[]), act("m2", &[])])]),
            ],
            join: Join::AtLeast(2),
            fail_fast: true,
        },
    );
    race.continue_on_error = true;
    race.timeouts.total_ms = Some(60_000);
    let mut early = step("early", Kind::Finish { outputs: BTreeMap::new() });
    early.condition = Some(e("steps.race.status == 'failed'"));
    let choice = step(
        "choice",
        Kind::Switch {
            cases: vec![
                Case { when: Some(e("size(steps.each.output) == 3")), steps: vec![act("three", &[])] },
                Case { when: None, steps: vec![act("other", &[])] },
            ],
        },
    );
    let mut again =
        step("again", Kind::ContinueAsNew { with: BTreeMap::from([("q".into(), x("inputs.q"))]), current: false });
    again.condition = Some(e("steps.choice.output.case == 0 && steps.race.status != 'failed'"));
    let mut d = definition(vec![slow, race, early, each, choice, again]);
    d.timeout_ms = 600_000;
    d.finally = vec![act("clean", &[]), group("last", vec![act("l", &[])])];
    d.finally[0].continue_on_error = true;
    d
}

fn outcome(random: &mut fastrand::Rng) -> Result<Value, Failure> {
    match random.u8(0..10) {
        0..=4 => Ok(json!({"v": 1})),
        5 => Err(Failure::retryable("transient.network", "x")),
        6 => Err(Failure::permanent("user.bad", "x")),
        7 => Err(Failure::new(FailureKind::TimedOut, "timeout.run", "x")),
        8 => Err(Failure::cancelled()),
        _ => Err(Failure::blocked("credits", "none")),
    }
}

/// As a driver takes them: every result that is there, up to a failure.
fn together(run: &mut Bench, live: Vec<String>, random: &mut fastrand::Rng) {
    let mut inputs = Vec::new();
    for path in live {
        let (attempt, _) = run.live[&path];
        let result = outcome(random);
        let failed = result.is_err();
        inputs.push(Input::AttemptEnded { path, attempt, result });
        if failed {
            break;
        }
    }
    if !inputs.is_empty() {
        run.input(Input::Several(inputs));
    }
}

fn child_ended(run: &mut Bench, completed: bool) {
    let Some(child) = run.children.pop() else { return };
    run.input(Input::Messages(vec![Inbound::Child {
        run_id: child,
        completed,
        output: Some(json!({})),
        failure: (!completed).then(|| Failure::permanent("user.child", "x")),
        cancelled: false,
    }]));
}

/// As much as the bench takes to write a row: what comes next is decided behind its commit. A replay relies on that.
const COMMIT: chrono::Duration = chrono::Duration::milliseconds(3);

fn disturb(run: &mut Bench, random: &mut fastrand::Rng) {
    run.now += COMMIT;
    run.permits = random.usize(0..4);
    run.room = (random.u8(0..3) == 0).then(|| random.usize(0..3));
    run.refused = (random.u8(0..6) == 0).then(|| ("credits".into(), "none left".into()));
    match random.u8(0..21) {
        0..=8 => {
            let live: Vec<String> = run.live.keys().cloned().collect();
            if random.bool() {
                together(run, live, random);
            } else if let Some(path) = random.choice(&live) {
                run.end(path, outcome(random));
            }
        }
        9..=11 => {
            let due = next_due(&run.definition, &run.state);
            if !run.state.status.is_closed() && due < run.now + chrono::Duration::days(30) {
                run.now = run.now.max(due);
            }
            run.input(Input::Tick);
        }
        12 | 13 => run.later(random.i64(0..4_000)),
        14 if random.bool() => run.update("answer", json!({"text": "x"})),
        14 => run.signal("answer", json!({"text": "x"})),
        15 => {
            let decision = ["approved", "rejected", "changes_requested", "nonsense"][random.usize(0..4)];
            run.signal("ok", json!({ "decision": decision }));
        }
        16 => drop(run.input(Input::TakenOver)),
        17 => drop(run.input(Input::Messages(vec![Inbound::Unblock]))),
        18 => child_ended(run, random.bool()),
        19 if random.u8(0..4) == 0 => {
            let message = if random.bool() {
                Inbound::Pause { reason: "look".into(), by: None }
            } else {
                Inbound::Resume { reason: "go on".into(), by: None, halted: None }
            };
            drop(run.input(Input::Messages(vec![message])));
        }
        _ if random.u8(0..8) == 0 => {
            let until = random.bool().then(|| run.now + chrono::Duration::seconds(random.i64(-5..600)));
            drop(run.input(Input::Messages(vec![Inbound::Cancel { reason: "enough".into(), until }])));
        }
        _ if random.u8(0..30) == 0 => {
            let by_parent = Input::Messages(vec![Inbound::Unblock, Inbound::Terminate { reason: "parent".into() }]);
            let by_operator = Input::Terminated { reason: "op".into() };
            drop(run.input(if random.bool() { by_parent } else { by_operator }));
        }
        _ => drop(run.input(Input::Tick)),
    }
}

/// A run to which anything has happened.
pub(super) fn disturbed(seed: u64) -> Bench {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut run = Bench::start_with(everything(), json!({"q": "?"}));
    for _ in 0..random.usize(5..120) {
        disturb(&mut run, &mut random);
    }
    run
}

/// More of it.
pub(super) fn disturb_some(run: &mut Bench, seed: u64) {
    let mut random = fastrand::Rng::with_seed(seed ^ 0x5eed);
    for _ in 0..random.usize(0..40) {
        disturb(run, &mut random);
    }
}

/// From now on the world behaves: the run comes to its end.
pub(super) fn to_the_end(run: &mut Bench, seed: u64) {
    (run.permits, run.refused, run.room) = (100, None, Some(1));
    run.now += COMMIT;
    let go_on = Inbound::Resume { reason: String::new(), by: None, halted: None };
    run.input(Input::Messages(vec![Inbound::Unblock, go_on]));
    let mut turns = 0;
    while !run.state.status.is_closed() {
        turns += 1;
        assert!(turns < 300, "seed {seed} does not end: {:#?}", waiting(&run.definition, &run.state));
        let live: Vec<String> = run.live.keys().cloned().collect();
        for path in live {
            if run.live.contains_key(&path) {
                run.ok(&path, json!({"v": 1}));
            }
        }
        // Some children never hear of anything.
        if seed.is_multiple_of(3) {
            run.children.clear();
        }
        while !run.children.is_empty() {
            child_ended(run, true);
        }
        if run.live.is_empty() && !run.state.status.is_closed() {
            run.now = next_due(&run.definition, &run.state);
            run.input(Input::Tick);
        }
    }
    assert!(run.live.is_empty(), "seed {seed}");
}

#[test]
fn some_of_them_continue_as_new() {
    let ended = (0..200).map(|seed| {
        let mut run = disturbed(seed);
        to_the_end(&mut run, seed);
        run.state.status
    });
    assert!(ended.filter(|status| *status == RunStatus::Continued).count() > 5);
}

#[test]
fn whatever_happens_every_run_ends_and_closes_what_it_started() {
    try_seeds("whatever_happens", 0..200, |seed| {
        let mut run = disturbed(seed);
        to_the_end(&mut run, seed);
        let replayed = run.replayed(&run.definition, 0);
        assert_eq!(replayed.divergence, None, "seed {seed}");
        assert_eq!(replayed.decided, run.rows.len() as u64);
    });
}
