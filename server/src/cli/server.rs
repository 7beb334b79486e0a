//! `loopwright server`: REST, and the bot if it has a token, over a configured database. Migrating is somebody else's (`loopwright migrate`); until
//! then it answers, and says at /readyz that it is not ready.

use super::Context;
use crate::{
    app::{self, App},
    config::Error,
    postgres::Fallback,
    rest::serve::bind,
};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Address and port
    #[arg(long, value_name = "ADDRESS")]
    listen: Option<std::net::SocketAddr>,
}

pub(crate) async fn run(args: Args, context: Context) -> anyhow::Result<()> {
    let mut config = context.config;
    if let Some(listen) = args.listen {
        config.http.listen = listen;
    }
    if config.auth.keys.is_empty() && config.auth.jwks_url.is_none() {
        return Err(Error::value(
            "auth.keys",
            "no key for tokens is configured; set LOOPWRIGHT_JWT_SECRET (openssl rand -hex 32), or LOOPWRIGHT_JWT_JWKS_URL",
        )
        .into());
    }
    let stop = app::stop_on_signal()?;
    let listener = bind(config.http.listen).await?;
    let app = App::open(config, Fallback::None).await?;
    tracing::info!(address = %listener.local_addr()?, "serving");
    let done = tokio::try_join!(app::serve_http(&app, listener, stop.clone()), app::run_bot(&app, stop));
    app.close().await;
    done.map(|((), ())| ())
}
