//! What an attempt has held and not used is there for the user's other runs: those that wait for it are woken.

use loopwright_engine::client::Client;
use serde_json::json;
use std::{
    collections::BTreeSet,
    convert::Infallible,
    sync::{Mutex, PoisonError},
    time::Duration,
};
use tokio::sync::Notify;
use uuid::Uuid;

/// What a step waits for when the user has too few credits.
pub(super) const CREDITS: &str = "credits";

/// What a step waits for when others hold the rest of the budget.
pub(super) const BUDGET_HELD: &str = "budget";

/// Between an attempt's end and the wake-up. A run that was refused at the same moment has recorded by then that it waits;
/// one that has not looks again by itself some minutes later.
const PAUSE: Duration = Duration::from_millis(500);

/// Runs of one user that are woken at a time, oldest first. A hold gives room for a few; each one woken costs two transitions.
const WOKEN_MAX: u32 = 16;

/// Users whose attempts have ended in this process since the last look.
#[derive(Default)]
pub(super) struct Returned {
    users: Mutex<BTreeSet<Uuid>>,
    some: Notify,
}

impl Returned {
    /// May be called before the end is committed, and for one that never is: a run that is woken in vain waits again.
    pub(super) fn add(&self, user: Uuid) {
        self.users.lock().unwrap_or_else(PoisonError::into_inner).insert(user);
        self.some.notify_one();
    }

    /// Wakes runs that wait for credits or for their project's budget. Never returns; dropping it loses nothing but haste.
    pub(super) async fn wake(&self, client: &Client) -> Infallible {
        loop {
            self.some.notified().await;
            tokio::time::sleep(PAUSE).await;
            let users = std::mem::take(&mut *self.users.lock().unwrap_or_else(PoisonError::into_inner));
            for user in users {
                let attributes = json!({ "user_id": user.to_string() });
                if let Err(error) = client.unblock_waiting(&attributes, &[CREDITS, BUDGET_HELD], WOKEN_MAX).await {
                    tracing::debug!(%error, %user, "runs that wait for credits were not woken; they look by themselves");
                }
            }
        }
    }
}
