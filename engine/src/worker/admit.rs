//! What workers do for runs that are held back: see who may begin. Any worker may; the lock of a group's row says who does.

use crate::{client::Client, store::groups};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

/// How often a worker forgets groups and rates that nobody uses. A pass takes a hundred of each.
const FORGET_EVERY: Duration = Duration::from_secs(60);
/// How often a worker looks when no run of a group has ended here. A place is empty for that long at most.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// Looks until the worker drains.
pub(super) async fn keep(client: Client, freed: Arc<Notify>, draining: CancellationToken) {
    let mut forgot = Instant::now();
    loop {
        tokio::select! {
            () = draining.cancelled() => return,
            () = freed.notified() => {}
            () = tokio::time::sleep(LOOK_EVERY.mul_f64(0.75 + fastrand::f64() / 2.0)) => {}
        }
        if let Err(error) = groups::advance(&client).await {
            tracing::warn!(%error, "cannot look after the runs that are held back");
        }
        if forgot.elapsed() >= FORGET_EVERY {
            forgot = Instant::now();
            if let Err(error) = groups::forget(client.pool()).await {
                tracing::warn!(%error, "cannot forget groups that nobody uses");
            }
        }
    }
}
