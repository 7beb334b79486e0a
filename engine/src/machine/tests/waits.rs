//! Attempts that found nobody to ask: they wait, they grow apart, and only time ends them.

use super::*;
use crate::view::Waiting;

fn away() -> Failure {
    Failure::retryable("transient.unavailable", "nobody is there").with_retry_after_ms(1_000).without_counting()
}

fn counted(run: &Bench) -> u32 {
    match &run.state.node("a").expect("a step").live {
        Some(Live::Activity { counted, .. }) => *counted,
        other => panic!("{other:?}"),
    }
}

#[test]
fn attempts_that_found_nobody_to_ask_do_not_count_and_do_not_escalate() {
    let mut a = act("a", &[("role", lit(json!("implementer")))]);
    a.retry.escalate =
        vec![Escalate { from_attempt: 3, with: BTreeMap::from([("role".into(), lit(json!("architect")))]) }];
    let mut run = Bench::start(definition(vec![a]));
    // 5, 10, 20, 40, 80, and then two minutes each.
    for (n, seconds) in [5, 10, 20, 40, 80, 120, 120, 120].into_iter().enumerate() {
        run.end("a", Err(away()));
        assert_eq!(run.rows.last().expect("a row").format, 8, "an older release would count it");
        let waiting = waiting(&run.definition, &run.state);
        assert!(matches!(&waiting[0], Waiting::Retry { failure, .. } if failure.code == "transient.unavailable"));
        run.later(seconds * 1_000 - 1);
        assert!(run.live().is_empty(), "wait {n} is {seconds} s");
        run.later(1);
        assert_eq!(run.live["a"], (u32::try_from(n).expect("small") + 2, json!({"role": "implementer"})));
        assert_eq!(counted(&run), 1, "the first of the policy's attempts, still");
    }
    // All three are left.
    for _ in 0..2 {
        run.end("a", Err(Failure::retryable("transient.network", "x")));
        run.later(3_600_000);
    }
    assert_eq!(run.live["a"].1, json!({"role": "architect"}));
    run.end("a", Err(away()));
    run.later(3_600_000);
    run.ok("a", json!(1));
    assert_eq!(run.state.status, RunStatus::Completed);
    assert_eq!(run.state.format, 8, "nor may one go on from its state");
    let replayed = run.replayed(&run.definition.clone(), 0);
    assert!(replayed.divergence.is_none(), "and decides so again: {:?}", replayed.divergence);
}

#[test]
fn what_the_outside_asks_for_wins_over_a_shorter_delay() {
    let mut run = Bench::start(definition(vec![act("a", &[])]));
    run.end("a", Err(away().with_retry_after_ms(8 * 3_600_000)));
    run.later(8 * 3_600_000 - 1);
    assert!(run.live().is_empty());
    run.later(1);
    assert_eq!(run.live["a"].0, 2);
}

#[test]
fn time_ends_the_waiting_and_so_does_a_policy_that_says_no() {
    let mut slow = act("a", &[]);
    slow.timeouts.total_ms = Some(60_000);
    let mut run = Bench::start(definition(vec![slow]));
    for _ in 0..10 {
        if run.state.status.is_closed() {
            break;
        }
        run.end("a", Err(away()));
        run.later(20_000);
    }
    assert_eq!(run.failed_code(), "transient.unavailable", "the next attempt would begin after the total");

    let mut once = act("a", &[]);
    once.retry.attempts = 1;
    let mut run = Bench::start(definition(vec![once]));
    run.end("a", Err(away()));
    assert_eq!(run.failed_code(), "transient.unavailable");

    let mut other = act("a", &[]);
    other.retry.on = vec!["transient.network".into()];
    let mut run = Bench::start(definition(vec![other]));
    run.end("a", Err(away()));
    assert_eq!(run.failed_code(), "transient.unavailable");
}

#[test]
fn they_are_no_executions_of_the_run() {
    let mut d = definition(vec![act("a", &[]), act("b", &[])]);
    // Two steps and their attempts, and one more.
    d.executions_max = 5;
    let mut run = Bench::start(d);
    for _ in 0..10 {
        run.end("a", Err(away()));
        assert_eq!(run.state.executions, 1, "the step has begun, and no attempt of it");
        run.later(3_600_000);
    }
    run.end("a", Err(Failure::retryable("transient.network", "x")));
    run.later(3_600_000);
    run.ok("a", json!(1));
    run.end("b", Err(away()));
    run.later(3_600_000);
    run.ok("b", json!(1));
    assert_eq!((run.state.status, run.state.executions), (RunStatus::Completed, 5));
    assert!(run.replayed(&run.definition.clone(), 0).divergence.is_none());
}

#[test]
fn a_policy_without_a_delay_does_not_ask_on_and_on() {
    let mut a = act("a", &[]);
    a.retry.delay_ms = 0;
    let mut run = Bench::start(definition(vec![a]));
    for (n, ms) in (2..).zip([100, 200, 400, 800, 1_600, 3_200, 6_400, 12_800, 25_600, 30_000, 30_000]) {
        run.end("a", Err(Failure::retryable("transient.unavailable", "nobody is there").without_counting()));
        run.later(ms - 1);
        assert!(run.live().is_empty(), "{ms} ms");
        run.later(1);
        assert_eq!(run.live["a"].0, n);
    }
    run.end("a", Err(Failure::retryable("transient.network", "x")));
    assert_eq!(run.live["a"].0, 13, "what counts has an end, and waits for nothing");
    assert!(run.replayed(&run.definition.clone(), 0).divergence.is_none());
}

/// What was recorded when these waits did not grow is decided again as it was: some draw gives every wait from the shortest up.
#[test]
fn the_draw_puts_a_wait_between_the_shortest_and_the_longest() {
    let policy = RetryPolicy { delay_ms: 0, ..RetryPolicy::default() };
    let mut run = Bench::start(definition(vec![act("a", &[])]));
    for _ in 0..4 {
        run.end("a", Err(away()));
        run.later(3_600_000);
    }
    let live = run.state.node("a").expect("a step").live.clone().expect("under way");
    let wait = |draw| super::super::react::wait_ms(&policy, &live, &away(), draw);
    assert_eq!((wait(0), wait(u64::MAX), wait(u64::MAX / 2)), (1_600, 100, 800));
}

#[test]
fn ten_thousand_waits_overflow_nothing() {
    let policy = RetryPolicy { delay_ms: 0, ..RetryPolicy::default() };
    assert_eq!(super::super::react::delay_ms(&policy, u32::MAX, u64::MAX), 0);
    assert_eq!(
        super::super::react::delay_ms(&RetryPolicy { jitter: 0.0, ..RetryPolicy::default() }, u32::MAX, 0),
        120_000
    );
}
