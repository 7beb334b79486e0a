//! The program: installs the one crypto backend, reads the command line, and turns the result into an exit code.

use clap::Parser;
use loopwright_server::{cli, rest};
use std::process::ExitCode;

fn main() -> ExitCode {
    rest::install_crypto();
    let cli = match cli::Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return ExitCode::from(cli::usage(&error)),
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("loopwright: the runtime could not be started: {error}");
            return ExitCode::from(cli::EXIT_MACHINE);
        }
    };
    ExitCode::from(runtime.block_on(cli::run(cli)))
}
