//! `loopwright completion SHELL`.

use clap::CommandFactory;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    shell: clap_complete::Shell,
}

pub(crate) fn run(args: &Args) {
    clap_complete::generate(args.shell, &mut super::Cli::command(), "loopwright", &mut std::io::stdout());
}
