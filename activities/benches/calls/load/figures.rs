//! From what was stamped to figures.

use super::{CORES, Counted, FAULTS_PERCENT, Options, Outcome, Phase, provider::Span, scene::Measured, wire::PING};
use loopwright_engine::bench::{Detail, Figure, Goal, Limit, Report};
use std::{collections::HashMap, time::Duration};

/// What is said less often than this, on average, is not said for each call.
const OF_EACH: f64 = 0.5;
/// Milliseconds that a call may take beyond the provider's time, p99.
const GOAL_MS: f64 = 5.0;

/// The calls of a phase by what happened to them; added latencies in milliseconds, sorted.
#[derive(Default)]
struct Sorted {
    /// One request, nothing spoiled, to the model that is asked first.
    plain: Vec<f64>,
    /// The same, but another model or key answered, because a limit that somebody else met let the first one rest.
    moved: Vec<f64>,
    /// A request of it was spoiled, or it took several; waits before another try included.
    troubled: Vec<f64>,
    /// The provider's own time of the plain ones.
    provider: Vec<f64>,
    /// Answered by a former attempt: nothing was asked.
    replayed: usize,
    /// Without an answer; its attempt was made again.
    failed: usize,
    /// Provider's time larger than the call's: the clock or the bench is wrong.
    negative: usize,
}

impl Sorted {
    fn of(measured: &[Measured], spans: &[Span]) -> Self {
        let mut asked: HashMap<&str, Vec<&Span>> = HashMap::new();
        for span in spans {
            asked.entry(&span.question).or_default().push(span);
        }
        let mut sorted = Self::default();
        for call in measured {
            let mine = asked.get(call.question.as_str()).into_iter().flatten();
            let mine: Vec<_> = mine.filter(|s| (call.begun_ns..=call.ended_ns).contains(&s.received_ns)).collect();
            if !call.answered {
                sorted.failed += 1;
                continue;
            }
            if mine.is_empty() {
                sorted.replayed += 1;
                continue;
            }
            let provider = mine.iter().map(|span| span.written_ns.saturating_sub(span.received_ns)).sum::<u64>();
            let total = call.ended_ns - call.begun_ns;
            sorted.negative += usize::from(provider > total);
            let added = total.saturating_sub(provider) as f64 / 1e6;
            match (mine.as_slice(), call.by_first) {
                ([span], true) if !span.spoiled => {
                    sorted.plain.push(added);
                    sorted.provider.push(provider as f64 / 1e6);
                }
                ([span], false) if !span.spoiled => sorted.moved.push(added),
                _ => sorted.troubled.push(added),
            }
        }
        for part in [&mut sorted.plain, &mut sorted.moved, &mut sorted.troubled, &mut sorted.provider] {
            part.sort_by(f64::total_cmp);
        }
        sorted
    }

    fn answered(&self) -> usize {
        self.plain.len() + self.moved.len() + self.troubled.len()
    }
}

/// The value below which that share of the sorted values lies, the next higher where it falls between two; NaN of none.
fn quantile(sorted: &[f64], share: f64) -> f64 {
    let at = ((sorted.len().saturating_sub(1)) as f64 * share).ceil();
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "an index below the length")]
    sorted.get(at as usize).copied().unwrap_or(f64::NAN)
}

fn figure(name: &'static str, value: f64, unit: &'static str) -> Figure {
    Figure { name, value, unit, limit: None, goal: None, details: Vec::new() }
}

fn detail(name: &'static str, value: f64, unit: &'static str) -> Detail {
    Detail { name, value, unit }
}

fn beside(figure: Figure, what: &'static str, limit: f64) -> Figure {
    Figure { limit: Some(Limit::of(figure.value, what, limit)), ..figure }
}

/// A count that has to be 0.
fn none(name: &'static str, count: usize, text: &'static str) -> Figure {
    Figure { goal: Some(Goal { text, reached: count == 0, void: Vec::new() }), ..figure(name, count as f64, "") }
}

/// Seconds from the first call's beginning to the last one's end.
fn seconds(measured: &[Measured]) -> f64 {
    let begun = measured.iter().map(|call| call.begun_ns).min().unwrap_or(0);
    let ended = measured.iter().map(|call| call.ended_ns).max().unwrap_or(0);
    (ended - begun) as f64 / 1e9
}

/// Time between the beginnings of two calls, on average.
pub fn pace(measured: &[Measured]) -> Duration {
    Duration::from_secs_f64(seconds(measured) / measured.len().max(1) as f64)
}

/// Names of the figures of one phase, and of what they stand beside; of the other in the same order.
struct Names {
    rate: &'static str,
    p50: &'static str,
    p99: &'static str,
    limit: &'static str,
}

const FAST: Names = Names {
    rate: "calls a second at full speed",
    p50: "added latency of a plain call at full speed, p50",
    p99: "added latency of a plain call at full speed, p99",
    limit: "two commits alone",
};
const LOADED: Names = Names {
    rate: "calls a second under the stated load",
    p50: "added latency of a plain call under it, p50",
    p99: "added latency of a plain call under it, p99",
    limit: "two commits alone, at that pace",
};

fn figures_of(phase: &Phase, sorted: &Sorted, names: &Names, limit: &[f64]) -> [Figure; 3] {
    let calls = sorted.answered().max(1) as f64;
    let (before, after) = (&phase.before, &phase.after);
    let per_call = |from: Duration, to: Duration| (to.saturating_sub(from)).as_secs_f64() * 1e6 / calls;
    let mut rate = figure(names.rate, calls / seconds(&phase.measured), "/s");
    rate.details = vec![
        detail("plain", sorted.plain.len() as f64, ""),
        detail("moved to another model by a limit", sorted.moved.len() as f64, ""),
        detail("spoiled or repeated", sorted.troubled.len() as f64, ""),
        detail("without an answer, their attempts made again", sorted.failed as f64, ""),
        detail("replayed from a former attempt", sorted.replayed as f64, ""),
        detail("CPU of the worker per call", per_call(before.worker_cpu, after.worker_cpu), "µs"),
        detail("CPU of Postgres per call", per_call(before.postgres_cpu, after.postgres_cpu), "µs"),
        detail("CPU of the fake provider per call", phase.provider_cpu.as_secs_f64() * 1e6 / calls, "µs"),
        detail("commits per call", (after.commits - before.commits) as f64 / calls, ""),
        detail("WAL per call", (after.wal_bytes - before.wal_bytes) as f64 / calls, "bytes"),
        detail("the provider's own time, p50", quantile(&sorted.provider, 0.5), "ms"),
    ];
    let at = |share: f64| quantile(&sorted.plain, share);
    let p50 = beside(figure(names.p50, at(0.5), "ms"), names.limit, quantile(limit, 0.5));
    let mut p99 = beside(figure(names.p99, at(0.99), "ms"), names.limit, quantile(limit, 0.99));
    p99.details = vec![
        detail("p90", at(0.9), "ms"),
        detail("worst", at(1.0), "ms"),
        detail("moved: p99", quantile(&sorted.moved, 0.99), "ms"),
        detail("spoiled or repeated, waits included: p50", quantile(&sorted.troubled, 0.5), "ms"),
        detail("spoiled or repeated, waits included: p99", quantile(&sorted.troubled, 0.99), "ms"),
    ];
    [rate, p50, p99]
}

/// Round trips of a call, in the order of how often; and as a figure.
fn round_trips(counted: &Counted) -> (Vec<(String, f64)>, Figure) {
    let per_call = |count: usize| count as f64 / counted.calls as f64;
    let mut said: Vec<(String, f64)> =
        counted.trips.iter().map(|(said, count)| (said.clone(), per_call(*count))).collect();
    said.sort_by(|a, b| b.1.total_cmp(&a.1));
    let of = |is: &dyn Fn(&str, f64) -> bool| said.iter().filter(|(said, n)| is(said, *n)).map(|(_, n)| n).sum::<f64>();
    let alone = quantile(&counted.alone, 0.5);
    // What most calls say, and not what is said by the clock or at a run's beginning and end.
    let each = of(&|said, n| n >= OF_EACH && said != PING);
    let mut figure = figure("round trips to Postgres of each call", each, "");
    figure.details = vec![
        detail("announced in one statement", of(&|said, _| said.contains("call_announced(")), ""),
        detail("closed in one statement", of(&|said, _| said.contains("call_ended(")), ""),
        detail("beside them, now and then and by the clock", of(&|said, n| n < OF_EACH && said != PING), ""),
        detail("the pool's, after each use", of(&|said, _| said == PING), ""),
        detail("one alone, p50", alone, "ms"),
        detail("those of each call, one after another, at that pace", each * alone, "ms"),
    ];
    (said, figure)
}

pub fn outcome(
    options: &Options,
    (server, void): (String, Vec<String>),
    [limit, paced]: [&[f64]; 2],
    counted: &Counted,
    [fast, loaded]: [&Phase; 2],
    mut broken: Vec<String>,
    deadlocks_logged: usize,
) -> Outcome {
    let sorted = [fast, loaded].map(|phase| Sorted::of(&phase.measured, &phase.spans));
    let mut figures = Vec::new();
    figures.extend(figures_of(fast, &sorted[0], &FAST, limit));
    let mut under = figures_of(loaded, &sorted[1], &LOADED, paced);
    under[0].details.insert(0, detail("of full speed", 100.0 * under[0].value / figures[0].value, "%"));
    // What the goal speaks of, beside the amounts.
    let mut otherwise = Vec::new();
    if options.cores != Some(CORES) {
        otherwise.push(format!("not on {CORES} processors"));
    }
    if options.faults_percent != FAULTS_PERCENT {
        otherwise.push(format!("{} % of the requests spoiled, not {FAULTS_PERCENT}", options.faults_percent));
    }
    under[2].goal = Some(Goal { text: "below 5 ms", reached: under[2].value < GOAL_MS, void: otherwise });
    figures.extend(under);
    let (said, trips) = round_trips(counted);
    figures.push(trips);
    let sum = |of: fn(&Phase) -> usize| of(fast) + of(loaded);
    let unrecorded = sum(|phase| phase.spans.len().abs_diff(phase.recorded));
    let counted = usize::try_from(loaded.after.deadlocks - fast.before.deadlocks).unwrap_or(usize::MAX);
    let unmeasured = sorted.iter().map(|sorted| sorted.negative).sum();
    let checks = [
        none("deadlocks", counted.max(deadlocks_logged), "none"),
        none("invariants broken", broken.len(), "none"),
        none("runs that did not complete", sum(|phase| phase.failed_runs.len()), "none"),
        none("requests of the provider's journal that are not recorded, or the other way", unrecorded, "none"),
        none("calls shorter than their provider's time", unmeasured, "none"),
    ];
    let adds_up = checks.iter().all(|check| check.value == 0.0);
    figures.extend(checks);
    broken.extend([fast, loaded].into_iter().flat_map(|phase| phase.failed_runs.iter().cloned()));
    let report = Report { server, percent: options.percent(), void, figures }.judged();
    Outcome { report, adds_up, broken, said }
}
