//! Pausing a run, letting it go on, and letting go on what had been set aside.

use super::{Client, short_id};
use crate::{
    Error, Result,
    ids::RunId,
    store::{self, inbox::Kind},
    view::RunStatus,
};
use serde_json::json;
use std::sync::Arc;

/// Longest reason, in bytes. Chosen: it is in the history and on screens.
pub(super) const REASON_BYTES_MAX: usize = 4 << 10;

/// Why somebody pauses a run or lets it go on.
#[derive(Clone, Debug, Default)]
pub struct Why {
    /// At most 4 KiB.
    pub reason: String,
    /// Sender's id of this message: a second message with the same id, of whatever kind, is dropped.
    pub dedupe_id: Option<String>,
    /// Who asks, as `user:<id>`.
    pub by: Option<String>,
}

impl Why {
    /// # Errors
    /// `too_large`: the ids.
    pub(super) fn fits(&self) -> Result<()> {
        short_id("the message's id", self.dedupe_id.as_deref())?;
        short_id("the sender", self.by.as_deref())
    }
}

impl Client {
    /// Pauses a run: attempts that run come to their end, are settled and recorded; nothing new begins and no timer fires.
    /// What comes due meanwhile, the run's own timeout too, fires when it is resumed. Its children are runs of their own and
    /// go on. A run that is paused takes no notice.
    /// Returns false when the dedupe id was seen before.
    ///
    /// # Errors
    /// `run_not_found`, `run_closed`, `run_quarantined`, `run_imported`, `too_large`, `inbox_full`.
    /// # Transaction
    /// One: a message into the inbox. The run is paused when it has read it, which is at once if it is in memory
    /// or parked; until then it may still begin a step.
    pub async fn pause(&self, run: RunId, why: Why) -> Result<bool> {
        self.tell(run, Kind::Pause, why).await
    }

    /// Lets a paused run go on; one that is not paused takes no notice.
    /// Returns false when the dedupe id was seen before.
    ///
    /// # Errors
    /// As [`Self::pause`]. A quarantined run is an operator's to release: [`Self::unquarantine`].
    pub async fn resume(&self, run: RunId, why: Why) -> Result<bool> {
        self.tell(run, Kind::Resume, why).await
    }

    /// Gives a quarantined run back to the workers, for an operator who has mended what had broken. What had broken and why
    /// the run goes on is recorded in its history. If it breaks again, it is quarantined again.
    ///
    /// # Errors
    /// `run_not_found`, `run_closed`; `invariant` if its history still cannot be folded here: nothing was done.
    /// # Transaction
    /// One, behind the epoch. Twice: false, the run was not quarantined any more.
    pub async fn unquarantine(&self, run: RunId, why: Why) -> Result<bool> {
        why.fits()?;
        let why = Arc::new(Why { reason: checked(&why.reason)?, ..why });
        let freed = self.once(|conn| {
            let (client, why) = (self.clone(), why.clone());
            Box::pin(async move {
                client.open(conn, run).await?;
                let loaded = store::runs::load(conn, run).await?;
                let (status, by) = (loaded.state.status.as_str(), why.by.as_deref());
                store::runs::unquarantine(conn, run, loaded.epoch, status, &why.reason, by).await
            })
        });
        let freed = freed.await?;
        crate::committer::crash_point("release.after_send");
        if freed {
            tracing::warn!(run_id = %run, reason = why.reason, "a quarantined run goes on");
            self.wake().await;
        }
        Ok(freed)
    }

    async fn tell(&self, run: RunId, kind: Kind, why: Why) -> Result<bool> {
        let why = Why { reason: checked(&why.reason)?, ..why };
        if self.ask(async |conn| self.open(conn, run).await).await?.status == RunStatus::Quarantined {
            return Err(Error::RunQuarantined(run.to_string()));
        }
        let stored = self.order(run, kind, json!({ "reason": why.reason }), &why).await?;
        crate::committer::crash_point("tell.after_send");
        self.wake().await;
        Ok(stored)
    }
}

/// A reason that is short enough, without what Postgres cannot hold.
pub(super) fn checked(reason: &str) -> Result<String> {
    if reason.len() > REASON_BYTES_MAX {
        return Err(Error::TooLarge { what: "the reason", actual: reason.len(), limit: REASON_BYTES_MAX });
    }
    Ok(reason.replace('\0', " "))
}
