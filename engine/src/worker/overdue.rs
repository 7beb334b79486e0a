//! Ends the children of stopped calls that have not ended in time: one that was set aside, that no worker serves, or that takes longer
//! than all cleanups may.
//!
//! After the commit that says so, in transactions of its own, as `fire` does for its schedules: what stands in the way of the child's
//! end (a payload key that this worker lacks, a lock, a hook that fails) must not keep its caller from being committed. If we die
//! before it is done, the call is overdue again in a minute.

use super::Shared;
use crate::{Error, Result, client::Client, committer::crash_point, ids::RunId, store};
use std::sync::Arc;
use tokio::sync::Semaphore;

/// Why the child ended.
const REASON: &str = "its parent was stopped, and it did not end in time";

/// Children that are ended at once: they take connections from whoever works. Chosen.
const AT_ONCE: usize = 4;
static TURNS: Semaphore = Semaphore::const_new(AT_ONCE);

/// Ends a child, or the open run of its chain. `spares`: not if it has read that it is to end.
pub(super) fn end(shared: &Arc<Shared>, child: RunId, spares: bool) {
    let shared = shared.clone();
    tokio::spawn(async move {
        let Ok(_turn) = TURNS.acquire().await else { return };
        let client = Client::new(shared.pool.clone(), shared.hook.clone()).waiting(shared.answer_max);
        tokio::select! {
            () = shared.fenced.cancelled() => {}
            ended = end_now(&client, child, spares) => match ended {
                Ok(true) => {
                    tracing::warn!(run_id = %child, "a child that did not end with its parent was terminated");
                    crash_point("overdue.before_wake");
                    client.wake().await;
                }
                Ok(false) => {}
                Err(error) => tracing::warn!(run_id = %child, %error, "a child cannot be ended yet"),
            }
        }
    });
}

/// False: there is nothing to end.
async fn end_now(client: &Client, child: RunId, spares: bool) -> Result<bool> {
    let found = client.ask(async |conn| store::inbox::overdue(conn, child).await).await?;
    let Some((run, _)) = found.filter(|(_, hears)| !(spares && *hears)) else { return Ok(false) };
    crash_point("overdue.after_look");
    match super::terminate(client, run, REASON).await {
        Ok(()) => Ok(true),
        Err(Error::RunClosed(_) | Error::RunNotFound(_)) => Ok(false),
        Err(error) => Err(error),
    }
}
