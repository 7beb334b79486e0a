//! `cargo bench -p loopwright-engine`: measures the engine beside the limits of the same Postgres and prints a table.
//!
//! Arguments after `--`: `--json`; `--quick` parks 10,000 runs and not 100,000, for a goal that is void then; `--soak [--minutes N]` runs the long ones only;
//! `--percent N` does less of everything, and then no goal counts: the table says what is void and why. `DATABASE_URL` names a server; otherwise one is brought up.

use loopwright_engine::bench::{self, Options, PARKED_QUICK, SOAK};
use std::{process::ExitCode, time::Duration};

const USAGE: &str = "arguments: [--json] [--quick] [--soak [--minutes N]] [--percent N]";

fn main() -> ExitCode {
    let mut options =
        Options { database_url: std::env::var("DATABASE_URL").ok().filter(|u| !u.is_empty()), ..Options::default() };
    let (mut json, mut soak, mut minutes) = (false, false, None);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut number = || arguments.next().and_then(|n| n.parse::<u32>().ok());
        let known = match argument.as_str() {
            // Cargo's own.
            "--bench" => true,
            "--json" => {
                json = true;
                true
            }
            "--quick" => {
                options.parked = PARKED_QUICK;
                true
            }
            "--soak" => {
                soak = true;
                true
            }
            "--minutes" => number().map(|n| minutes = Some(n)).is_some(),
            "--percent" => number().map(|n| options.percent = n.clamp(1, 100)).is_some(),
            _ => false,
        };
        if !known {
            eprintln!("{argument} is not understood; {USAGE}");
            return ExitCode::from(2);
        }
    }
    options.soak = soak.then(|| minutes.map_or(SOAK, |n| Duration::from_secs(u64::from(n) * 60)));
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("the runtime could not be started: {error}");
            return ExitCode::FAILURE;
        }
    };
    runtime.block_on(async {
        match bench::child().await {
            Ok(false) => {}
            Ok(true) => return ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("{error}");
                return ExitCode::FAILURE;
            }
        }
        match bench::run(&options, &|what| eprintln!("… {what}")).await {
            Ok(report) if json => match serde_json::to_string_pretty(&report) {
                Ok(text) => println!("{text}"),
                Err(error) => eprintln!("{error}"),
            },
            Ok(report) => print!("{}", report.table()),
            Err(error) => {
                eprintln!("{error}");
                return ExitCode::FAILURE;
            }
        }
        ExitCode::SUCCESS
    })
}
