//! Random states under randomly edited definitions: whatever the checks accept goes on as if it had always been so.

use super::{
    migrate::{apply, ask, checked, hash, paused},
    *,
};

/// Random edits of a definition.
fn edited(definition: &Definition, random: &mut fastrand::Rng) -> (Definition, Vec<(String, String)>) {
    let (mut new, mut map) = (definition.clone(), Vec::new());
    for n in 0..random.usize(1..4) {
        let edit = random.u8(0..9);
        let tag = random.u32(0..1_000_000);
        let fresh = match random.u8(0..3) {
            0 => act(&format!("x{n}_{tag}"), &[]),
            1 => ask(&format!("x{n}_{tag}")),
            _ => set(&format!("x{n}_{tag}"), "v", x("1 + 1")),
        };
        let blocks = count(&mut new.steps);
        let wanted = random.usize(0..blocks);
        in_block(&mut new.steps, wanted, &mut |steps: &mut Vec<Step>| {
            let at = random.usize(0..=steps.len());
            let one = at.min(steps.len().saturating_sub(1));
            match edit {
                0..=2 => steps.insert(at, fresh.clone()),
                3 if steps.len() > 1 => drop(steps.remove(one)),
                4 if steps.len() > 1 => steps.swap(0, one),
                5 if !steps.is_empty() => {
                    let to = format!("{}_{tag}", steps[one].id);
                    map.push((steps[one].id.clone(), to.clone()));
                    steps[one].id = to;
                }
                6 if !steps.is_empty() => steps[one] = Step { id: steps[one].id.clone(), ..fresh.clone() },
                7 if !steps.is_empty() => match &mut steps[one].kind {
                    Kind::Repeat { max_rounds, .. } => *max_rounds = random.u32(1..5),
                    Kind::Foreach { concurrency, .. } => *concurrency = random.u32(1..4),
                    Kind::Parallel { join, .. } => *join = Join::Settled,
                    Kind::Activity { with, .. } => drop(with.insert("more".into(), lit(json!(tag)))),
                    _ => steps[one].continue_on_error = true,
                },
                8 if !steps.is_empty() => {
                    steps[one].timeouts.total_ms = random.bool().then(|| random.u64(1_000..100_000));
                    steps[one].catch.clear();
                }
                _ => {}
            }
        });
    }
    (new, map)
}

fn count(steps: &mut Vec<Step>) -> usize {
    let mut n = 0;
    each_block(steps, &mut |_| n += 1);
    n
}

fn in_block(steps: &mut Vec<Step>, wanted: usize, edit: &mut dyn FnMut(&mut Vec<Step>)) {
    let mut n = 0;
    each_block(steps, &mut |steps| {
        if n == wanted {
            edit(steps);
        }
        n += 1;
    });
}

fn each_block(steps: &mut Vec<Step>, visit: &mut dyn FnMut(&mut Vec<Step>)) {
    for step in steps.iter_mut() {
        match &mut step.kind {
            Kind::Group { steps, .. } | Kind::Foreach { steps, .. } | Kind::Repeat { steps, .. } => {
                each_block(steps, visit)
            }
            Kind::Parallel { branches, .. } => branches.iter_mut().for_each(|b| each_block(&mut b.steps, visit)),
            Kind::Switch { cases } => cases.iter_mut().for_each(|c| each_block(&mut c.steps, visit)),
            _ => {}
        }
        step.catch.iter_mut().for_each(|c| each_block(&mut c.steps, visit));
    }
    visit(steps);
}

#[test]
fn whatever_the_checks_accept_goes_on_without_a_breach_and_ends() {
    let (mut accepted, mut refused, mut again) = (0, 0, 0);
    let all = random::try_seeds("whatever_the_checks_accept", 0..120, |seed| {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut run = random::disturbed(seed);
        let first = run.definition.clone();
        let mut definitions = BTreeMap::new();
        for _ in 0..2 {
            // As whoever migrates does it: pause, and wait until what runs has ended.
            if !run.live.is_empty() {
                paused(&mut run);
                for path in run.live.keys().cloned().collect::<Vec<_>>() {
                    run.ok(&path, json!({"v": 1}));
                }
            }
            if run.state.status.is_closed() || !run.live.is_empty() {
                break;
            }
            let (new, map) = edited(&run.definition, &mut random);
            let map: Vec<(&str, &str)> = map.iter().map(|(a, b)| (a.as_str(), b.as_str())).collect();
            let found = checked(&run, &new, &map, &[]);
            let Some(event) = found.event else {
                assert!(!found.violations.is_empty(), "seed {seed}");
                refused += 1;
                continue;
            };
            definitions.insert(hash(&new), new.clone());
            apply(&mut run, new, event);
            accepted += 1;
            run.input(Input::TakenOver);
            random::disturb_some(&mut run, seed);
            again += 1;
        }
        random::to_the_end(&mut run, seed);
        let started: Vec<Value> = run
            .rows
            .iter()
            .flat_map(|r| &r.events)
            .filter(|e| e["type"] == "attempt_started")
            .map(|e| e["attempt_id"].clone())
            .collect();
        let ids: std::collections::BTreeSet<String> = started.iter().map(ToString::to_string).collect();
        assert_eq!(ids.len(), started.len(), "seed {seed}: an attempt was started twice");
        let mut replay =
            crate::machine::replay::Replay::new(&first, run.state.run_id, run.depth, 0).migrating(&definitions);
        for row in &run.rows {
            if !replay.row(row).expect("folds") {
                break;
            }
        }
        assert_eq!(replay.done().divergence, None, "seed {seed}");
    });
    // One seed alone need not meet all of it.
    assert!(!all || (accepted > 15 && refused > 15 && again > 0), "{accepted} {refused}");
}
