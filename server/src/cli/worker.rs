//! `loopwright worker`: works on runs of a configured database until it is asked to stop.

use super::{
    Context,
    failure::{behind, refuse},
};
use crate::{
    app::{self, App, Models},
    config,
    postgres::Fallback,
};
use std::path::PathBuf;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Attempts at the same time
    #[arg(long, value_name = "N")]
    slots: Option<usize>,
    /// Queues to work on
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    queues: Option<Vec<String>>,
    /// What this worker has, for workflows that ask for it by `runs-on`
    #[arg(long, value_name = "LABEL", value_delimiter = ',')]
    labels: Option<Vec<String>>,
    /// Answer from a script instead of asking models: the path of a rehearsal, or `demo`
    #[arg(long, value_name = "FILE")]
    rehearsal: Option<PathBuf>,
}

pub(crate) async fn run(args: Args, context: Context) -> anyhow::Result<()> {
    let mut config = context.config;
    if let Some(slots) = args.slots {
        if slots == 0 {
            return Err(refuse("usage_invalid", "--slots must be more than 0"));
        }
        config.worker.slots = slots;
    }
    if let Some(queues) = args.queues {
        config.worker.queues = queues;
    }
    if let Some(labels) = args.labels {
        config.worker.labels = config::labels("--labels", labels)?;
    }
    let stop = app::stop_on_signal()?;
    let app = App::open(config, Fallback::None).await?;
    let missing = app.store.missing_migrations().await?;
    if !missing.is_empty() {
        return Err(behind());
    }
    let models = Models::from_rehearsal(args.rehearsal);
    let done = app::run_worker(&app, &models, stop).await;
    app.close().await;
    done
}
