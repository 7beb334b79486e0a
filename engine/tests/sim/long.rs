//! `cargo sim -- --hours 1`: simulates new seeds for that long, on every processor, and stops at the first that fails.
//! `--seeds N` does so many instead, `--from N` begins with that seed and counts on.

use loopwright_engine::sim::simulate;
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

fn main() -> ExitCode {
    let (mut length, mut seeds, mut from) = (None, None, None);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        if ["--hours", "--minutes", "--seeds", "--from"].contains(&argument.as_str()) {
            let Some(number) = arguments.next().and_then(|n| n.parse::<f64>().ok()).filter(|n| *n >= 0.0) else {
                eprintln!("{argument} needs a number; {USAGE}");
                return ExitCode::from(2);
            };
            match argument.as_str() {
                "--hours" => length = Some(Duration::from_secs_f64(number * 3_600.0)),
                "--minutes" => length = Some(Duration::from_secs_f64(number * 60.0)),
                "--seeds" => seeds = Some(number as u64),
                _ => from = Some(number as u64),
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
    let first = from.unwrap_or_else(|| fastrand::u64(..1 << 53));
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
                    let outcome = simulate(seed, None);
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
            println!("SIM_SEED={seed} cargo test -p loopwright-engine --test sim -- the_seed\n{}", findings.join("\n"));
            ExitCode::FAILURE
        }
        Err(_) => ExitCode::FAILURE,
    }
}
