//! `loopwright bench`: what the engine does on this machine and this Postgres, beside what they could do at most.

use super::{Context, EXIT_FAILED, print};
use loopwright_engine::bench::{self, Options, PARKED, PARKED_QUICK, SOAK};
use secrecy::ExposeSecret;
use std::time::Duration;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Park 10,000 runs instead of 100,000: some minutes less, and one goal is void
    #[arg(long)]
    quick: bool,
    /// Do this share of everything, in percent: for a trial
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=100))]
    percent: u32,
    /// Only the long measurements: a run of 10,000 steps, a load beside a pinned snapshot
    #[arg(long)]
    soak: bool,
    /// Length of the pinned snapshot
    #[arg(long, requires = "soak", value_parser = clap::value_parser!(u32).range(1..=1440))]
    minutes: Option<u32>,
    /// Fail if a goal is not reached, or could not be: of a trial, of a server without fsync, with --quick
    #[arg(long)]
    strict: bool,
}

pub(crate) async fn run(args: Args, context: Context) -> anyhow::Result<u8> {
    if bench::child().await? {
        return Ok(0);
    }
    let soak = args.soak.then(|| args.minutes.map_or(SOAK, |n| Duration::from_secs(u64::from(n) * 60)));
    let options = Options {
        database_url: context.config.database_url.as_ref().map(|url| url.expose_secret().to_owned()),
        folder: context.config.data_dir.clone(),
        percent: args.percent,
        parked: if args.quick { PARKED_QUICK } else { PARKED },
        soak,
        child_arguments: vec!["bench".into()],
    };
    let report = bench::run(&options, &|what| eprintln!("… {what}")).await?;
    print(context.json, &report, bench::Report::table)?;
    Ok(if args.strict && !report.all_reached() { EXIT_FAILED } else { 0 })
}
