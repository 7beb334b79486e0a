//! `cargo bench -p loopwright-activities`: many runs that call models at the same time, against a provider that fails now and
//! then. See `load/mod.rs`.
//!
//! Arguments after `--`: `--runs N` (200), `--calls N` a run (50), `--think MS`, the provider's mean time for an answer under the
//! stated load (2000), `--faults PERCENT` of the requests (5), `--json`, `--strict`: fail if a goal is missed.
//! A Postgres with fsync of its own is brought up and removed. Everything stays on loopback and on two processors.

mod load;

use load::Options;
use std::{process::ExitCode, time::Duration};

const USAGE: &str = "arguments: [--runs N] [--calls N] [--think MS] [--faults PERCENT] [--json] [--strict]";

fn main() -> ExitCode {
    let mut options = Options { cores: Some(load::CORES), ..Options::default() };
    let (mut json, mut strict) = (false, false);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut number = |least: u64| arguments.next().and_then(|n| n.parse::<u64>().ok()).filter(|n| *n >= least);
        let count = |n: u64| usize::try_from(n).unwrap_or(usize::MAX);
        let known = match argument.as_str() {
            // Cargo's own.
            "--bench" => true,
            "--json" => {
                json = true;
                true
            }
            "--strict" => {
                strict = true;
                true
            }
            "--runs" => number(1).map(|n| options.runs = count(n)).is_some(),
            "--calls" => number(1).map(|n| options.calls = count(n)).is_some(),
            "--think" => number(1).map(|n| options.think = Duration::from_millis(n)).is_some(),
            "--faults" => number(0).filter(|n| *n <= 100).map(|n| options.faults_percent = count(n)).is_some(),
            _ => false,
        };
        if !known {
            eprintln!("{argument} is not understood; {USAGE}");
            return ExitCode::from(2);
        }
    }
    // Before there is a second thread: threads and processes that come from this one stay where it is.
    if let Some(cores) = options.cores
        && let Err(error) = load::keep_to(cores)
    {
        eprintln!("the processors could not be chosen: {error}");
        return ExitCode::FAILURE;
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("the runtime could not be started: {error}");
            return ExitCode::FAILURE;
        }
    };
    let measured = runtime.block_on(async {
        match load::child().await? {
            true => Ok(None),
            false => load::run(&options, &|what| eprintln!("… {what}")).await.map(Some),
        }
    });
    match measured {
        Ok(None) => ExitCode::SUCCESS,
        Ok(Some(outcome)) => {
            match json {
                true => println!("{}", serde_json::to_string_pretty(&outcome.report).unwrap_or_default()),
                false => print!("{}", outcome.report.table()),
            }
            for (said, times) in &outcome.said {
                eprintln!("{times:.2} of a call: {said}");
            }
            for row in &outcome.broken {
                eprintln!("broken: {row}");
            }
            let failed = !outcome.adds_up || (strict && !outcome.report.all_reached());
            if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS }
        }
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
