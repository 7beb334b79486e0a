//! What workers do for time to pass: make the partitions of months to come, retire what is old. Any worker may; who comes second
//! finds it done.

use crate::{client::Client, retention, store, transaction::answered};
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// Before the first look, so that a start is not slower for it.
const FIRST_LOOK: Duration = Duration::from_secs(20);
/// Between two looks. Chosen: partitions are made months ahead, and runs are kept for days at least.
const LOOK_EVERY: Duration = Duration::from_secs(3600);

/// Longest look; what is left is the next one's. A server that gives no answer must not end all looks.
const LOOK_MAX: Duration = LOOK_EVERY;

/// Looks until the worker drains. A turn under way is dropped: it begins anew somewhere else.
pub(super) async fn keep(client: Client, policy: Option<retention::Policy>, draining: CancellationToken) {
    let mut pause = FIRST_LOOK;
    loop {
        tokio::select! {
            () = draining.cancelled() => return,
            () = tokio::time::sleep(pause.mul_f64(0.75 + fastrand::f64() / 2.0)) => {}
        }
        pause = LOOK_EVERY;
        let look = async {
            let now = client.ask(async |conn| store::runs::now(conn).await).await?;
            retention::prepare(&client, now).await?;
            match &policy {
                Some(policy) => retention::run(&client, policy).await.map(drop),
                None => Ok(()),
            }
        };
        let done: crate::Result<()> = tokio::select! {
            () = draining.cancelled() => return,
            done = answered(LOOK_MAX, look) => done,
        };
        if let Err(error) = done {
            metrics::counter!("loopwright_retention_failures_total").increment(1);
            tracing::error!(%error, "cannot look after old runs; the next look begins anew");
        }
    }
}
