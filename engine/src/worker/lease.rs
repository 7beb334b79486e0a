//! The lease of this process, renewed on a thread of its own: a worker whose runtime is busy is not dead.

use super::Shared;
use crate::{Error, Result, clock::Asked, store};
use sqlx::{ConnectOptions, PgConnection};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};
use tokio_util::sync::CancellationToken;

/// Starts the thread. When the lease cannot be kept, `fenced` is cancelled.
pub(super) fn keep(shared: Arc<Shared>, lease: Duration, stopped: CancellationToken) -> Result<()> {
    std::thread::Builder::new()
        .name("lease".into())
        .spawn(move || match tokio::runtime::Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => runtime.block_on(renew(&shared, lease, &stopped)),
            Err(error) => {
                tracing::error!(%error, "the lease thread cannot start");
                shared.fenced.cancel();
            }
        })
        .map(drop)
        .map_err(|e| Error::Invariant(format!("the lease thread cannot start: {e}")))
}

async fn renew(shared: &Shared, lease: Duration, stopped: &CancellationToken) {
    let options = shared.pool.connect_options();
    let mut conn: Option<PgConnection> = None;
    let mut renewed = Instant::now();
    while !stopped.is_cancelled() {
        let beat = async {
            let conn = match &mut conn {
                Some(conn) => conn,
                slot => slot.insert(options.connect().await?),
            };
            // Behind the connecting, which says nothing of when it was read.
            let asked = Asked::now();
            store::workers::heartbeat(conn, shared.id).await.map(|now| now.map(|now| (asked, now)))
        };
        match tokio::time::timeout(lease / 2, beat).await {
            Ok(Ok(Some((asked, now)))) => {
                crate::committer::crash_point("lease.after_heartbeat");
                renewed = Instant::now();
                shared.clock.set(asked, now);
            }
            Ok(Ok(None)) => {
                tracing::warn!(worker_id = %shared.id, "the lease ended and others took over");
                shared.fenced.cancel();
                return;
            }
            Ok(Err(error)) => {
                tracing::warn!(%error, "heartbeat failed");
                conn = None;
            }
            Err(_) => {
                tracing::warn!("heartbeat timed out");
                conn = None;
            }
        }
        if renewed.elapsed() > lease {
            // Others may own our runs by now. They are safe from us by their epochs; stopping early saves their money.
            tracing::warn!(worker_id = %shared.id, "no heartbeat for a whole lease; this worker stops");
            shared.fenced.cancel();
            return;
        }
        tokio::select! {
            () = stopped.cancelled() => {}
            () = tokio::time::sleep(lease / 4) => {}
        }
    }
}
