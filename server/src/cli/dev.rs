//! `loopwright dev`: everything in one process, with its own Postgres unless one is configured. Ctrl-C drains.

use super::Context;
use crate::{
    app::{self, App, Models},
    postgres::Fallback,
    rest::serve::bind,
};
use std::path::PathBuf;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Address and port of the server
    #[arg(long, value_name = "ADDRESS")]
    listen: Option<std::net::SocketAddr>,
    /// Answer from a script instead of asking models: the path of a rehearsal, or `demo`
    #[arg(long, value_name = "FILE")]
    rehearsal: Option<PathBuf>,
}

pub(crate) async fn run(args: Args, context: Context) -> anyhow::Result<()> {
    let mut config = app::with_development_key(context.config)?;
    if let Some(listen) = args.listen {
        config.http.listen = listen;
    }
    let models = Models::from_rehearsal(args.rehearsal);
    let stop = app::stop_on_signal()?;
    let listener = bind(config.http.listen).await?;
    let address = listener.local_addr()?;
    let app = App::open_migrated(config, Fallback::Embedded).await?;
    app.deploy_shipped().await?;
    app.schedule_shipped().await?;
    eprintln!("loopwright serves at http://{address} — a token: loopwright token — Ctrl-C stops");
    let done = tokio::try_join!(
        app::serve_http(&app, listener, stop.clone()),
        app::run_worker(&app, &models, stop.clone()),
        app::run_bot(&app, stop)
    );
    app.close().await;
    done.map(|((), (), ())| ())
}
