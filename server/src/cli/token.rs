//! `loopwright token`: a token for development, signed with the configured secret or this machine's own.

use super::{Context, failure::refuse, print};
use crate::{
    app,
    rest::auth::{SCOPE_RUN, mint},
};
use uuid::Uuid;

/// Subject of the user that development works with.
pub(crate) const DEVELOPER: &str = "developer";

const TTL_S: u64 = 3_600;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Id of an existing user [default: the developer]
    #[arg(long, value_name = "UUID", conflicts_with = "subject")]
    user: Option<Uuid>,
    /// Subject of the token; its user is created when it is first seen
    #[arg(long, value_name = "TEXT")]
    subject: Option<String>,
    /// Space-separated scopes
    #[arg(long, default_value = SCOPE_RUN)]
    scope: String,
    /// Seconds until it expires, at most `auth.lifetime_s_max` [default: an hour, or that if it is less]
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    ttl: Option<u64>,
}

pub(crate) fn run(args: Args, context: Context) -> anyhow::Result<()> {
    let config = app::with_development_key(context.config)?;
    let subject = args.user.map(|u| u.to_string()).or(args.subject).unwrap_or_else(|| DEVELOPER.into());
    let longest = config.auth.lifetime_s_max;
    let ttl = args.ttl.unwrap_or(TTL_S.min(longest));
    if ttl > longest {
        let text =
            format!("--ttl {ttl}: a token that lives longer than {longest} s is refused here (`auth.lifetime_s_max`)");
        return Err(refuse("usage_invalid", text));
    }
    let token = mint(&config.auth, &subject, &args.scope, ttl)?;
    let report = serde_json::json!({"token": token, "subject": subject, "expires_in_s": ttl});
    print(context.json, &report, |_| token.clone())
}
