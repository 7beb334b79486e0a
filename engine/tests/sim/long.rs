//! `cargo sim -- --hours 1`: simulates new seeds for that long, on every processor, and stops at the first that fails.
//! `--seeds N` does so many instead, `--from N` begins with that seed and counts on. With both it ends at whichever comes first.
//! A seed that panics, or is not over after [`SEED_MAX`], has failed. The first seed is told at the beginning: whoever ends this
//! process before it has said anything still knows where it was.

use loopwright_engine::sim::{SEED_MAX, replay, simulate_within};
use std::{
    process::ExitCode,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

const USAGE: &str = "arguments: --hours H | --minutes M | --seeds N, and perhaps --from SEED";
const REPORT: Duration = Duration::from_secs(60);

/// So many units.
fn time(text: &str, unit_s: f64) -> Option<Duration> {
    text.parse::<f64>().ok().and_then(|n| Duration::try_from_secs_f64(n * unit_s).ok())
}

fn main() -> ExitCode {
    let (mut length, mut seeds, mut from) = (None, None, None);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        if ["--hours", "--minutes", "--seeds", "--from"].contains(&argument.as_str()) {
            let text = arguments.next().unwrap_or_default();
            let known = match argument.as_str() {
                "--hours" => time(&text, 3_600.0).map(|t| length = Some(t)),
                "--minutes" => time(&text, 60.0).map(|t| length = Some(t)),
                // A seed is any number of 64 bits.
                "--seeds" => text.parse().ok().map(|n: u64| seeds = Some(n)),
                _ => text.parse().ok().map(|n: u64| from = Some(n)),
            };
            if known.is_none() {
                eprintln!("{argument} needs a number; {USAGE}");
                return ExitCode::from(2);
            }
        } else if argument != "--" {
            eprintln!("{argument} is not understood; {USAGE}");
            return ExitCode::from(2);
        }
    }
    if length.is_none() && seeds.is_none() {
        eprintln!("for how long? {USAGE}");
        return ExitCode::from(2);
    }
    let first = from.unwrap_or_else(|| fastrand::u64(..));
    println!("seeds from {first} on; one alone: {}", replay(first));
    let (begun, next, failed) = (Instant::now(), AtomicU64::new(0), Mutex::new(None));
    let transitions = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                let mut reported = Instant::now();
                loop {
                    let n = next.fetch_add(1, Ordering::Relaxed);
                    let over = length.is_some_and(|l| begun.elapsed() >= l) || seeds.is_some_and(|s| n >= s);
                    if over || failed.lock().is_ok_and(|f| f.is_some()) {
                        return;
                    }
                    let seed = first.wrapping_add(n);
                    let outcome = simulate_within(seed, None, SEED_MAX);
                    transitions.fetch_add(u64::from(outcome.happened.transitions), Ordering::Relaxed);
                    if !outcome.findings.is_empty() {
                        if let Ok(mut failed) = failed.lock() {
                            failed.get_or_insert((seed, outcome.findings));
                        }
                        return;
                    }
                    if reported.elapsed() > REPORT {
                        reported = Instant::now();
                        eprintln!("… {n} seeds in {} s", begun.elapsed().as_secs());
                    }
                }
            });
        }
    });
    let transitions = transitions.into_inner();
    match failed.into_inner() {
        Ok(None) => {
            println!(
                "{transitions} transitions from seed {first} on, in {} s: nothing found",
                begun.elapsed().as_secs()
            );
            ExitCode::SUCCESS
        }
        Ok(Some((seed, findings))) => {
            println!("{}", replay(seed));
            findings.iter().for_each(|finding| println!("{finding}"));
            ExitCode::FAILURE
        }
        Err(_) => ExitCode::FAILURE,
    }
}
