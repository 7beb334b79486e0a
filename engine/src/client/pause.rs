//! Pausing a run, letting it go on, and letting go on what had been set aside.

use super::Client;
use crate::{
    Error, Result,
    ids::RunId,
    store::{
        self,
        inbox::{Kind, Outgoing, Sent},
    },
    view::RunStatus,
};
use serde_json::{Value, json};

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

impl Client {
    /// Pauses a run: attempts that run come to their end, are settled and recorded; nothing new begins and no timer fires.
    /// What comes due meanwhile, the run's own timeout too, fires when it is resumed. Its children are runs of their own and
    /// go on. A run that is paused takes no notice.
    /// Returns false when the dedupe id was seen before.
    ///
    /// # Errors
    /// `run_not_found`, `run_closed`, `run_quarantined`, `run_imported`, `too_large`, `inbox_full`.
    /// # Transaction
    /// One statement: a message into the inbox. The run is paused when it has read it, which is at once if it is in memory
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
    /// One statement behind the epoch. Twice: false, the run was not quarantined any more.
    pub async fn unquarantine(&self, run: RunId, why: Why) -> Result<bool> {
        let reason = checked(&why.reason)?;
        let mut conn = self.pool.acquire().await?;
        self.open(&mut conn, run).await?;
        let loaded = store::runs::load(&mut conn, run).await?;
        let status = loaded.state.status.as_str();
        let freed = store::runs::unquarantine(&mut conn, run, loaded.epoch, status, &reason, why.by.as_deref()).await?;
        crate::committer::crash_point("release.after_send");
        drop(conn);
        if freed {
            tracing::warn!(run_id = %run, reason, "a quarantined run goes on");
            self.wake().await;
        }
        Ok(freed)
    }

    async fn tell(&self, run: RunId, kind: Kind, why: Why) -> Result<bool> {
        let reason = checked(&why.reason)?;
        let mut conn = self.pool.acquire().await?;
        if self.open(&mut conn, run).await?.status == RunStatus::Quarantined {
            return Err(Error::RunQuarantined(run.to_string()));
        }
        let payload: Value = json!({ "reason": reason });
        let message = Outgoing {
            run,
            kind,
            name: "",
            payload: &payload,
            dedupe_id: why.dedupe_id.as_deref(),
            sender: why.by.as_deref(),
            definition: None,
            unread_max: Some(store::inbox::ORDERS_MAX),
        };
        let stored = match store::inbox::send(&mut conn, &message).await? {
            Sent::Stored => true,
            Sent::Duplicate => false,
            Sent::Full => return Err(super::full(run, store::inbox::ORDERS_MAX)),
            Sent::NoOpenRun => return Err(self.refusal(&mut conn, run).await),
        };
        crate::committer::crash_point("tell.after_send");
        drop(conn);
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
