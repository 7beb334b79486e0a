//! Runs that are this worker's and that nobody here drives, and the reverse.

use super::{Shared, pace::Pace};
use crate::{
    Result,
    committer::crash_point,
    ids::RunId,
    store::{self, spread::Spread},
    transaction::{Session, asked},
};
use std::{
    collections::HashSet,
    time::{Duration, Instant},
};

/// Shortest pause between two looks.
const LOOK: Duration = Duration::from_secs(2);
/// Longest pause between two looks for strays while nothing makes one. They are rare, and beside a pinned snapshot the look reads every
/// claim of half an hour (two to three seconds, measured), while the poll waits for it.
const LOOK_MAX: Duration = Duration::from_secs(180);
/// Most such runs of one look; the rest waits for the next.
const FOUND_MAX: i64 = 256;

/// What the poll knows of them. A stray's claim had no answer, or its driver panicked.
pub(super) struct Strays {
    /// What the last look has found, with the epochs.
    suspects: HashSet<(RunId, i64)>,
    strays: Pace,
    lost: Pace,
}

impl Strays {
    pub(super) fn new() -> Self {
        let mut paces = [Pace::new(LOOK), Pace::new(LOOK).up_to(LOOK_MAX)];
        for pace in &mut paces {
            pace.looked(Instant::now());
        }
        let [lost, strays] = paces;
        Self { suspects: HashSet::new(), strays, lost }
    }

    /// A claim may have been done without an answer.
    pub(super) fn expected(&mut self) {
        self.strays.soon();
    }

    /// Looks for both, if it is time.
    ///
    /// Called between two claims only: a run that is claimed and has no driver yet is not taken for a stray.
    pub(super) async fn look(&mut self, shared: &Shared, session: &mut Session) {
        if self.lost.is_due() {
            let began = Instant::now();
            if let Err(error) = tell_lost(shared, session).await {
                session.leave();
                tracing::warn!(%error, "cannot look for drivers whose run was ended or taken");
            }
            self.lost.looked(began);
            crash_point("strays.after_lost");
        }
        if self.strays.is_due() {
            let began = Instant::now();
            match self.give_back(shared, session).await {
                Ok(found) => self.suspects = found,
                Err(error) => {
                    session.leave();
                    tracing::warn!(%error, "cannot look for runs without a driver");
                }
            }
            // What a look has found the next one gives back: that comes soon then, however dear a look is.
            self.strays.looked(if self.suspects.is_empty() { began } else { Instant::now() });
        }
    }

    /// Frees the strays that the look before has found as well. Returns what this one has found.
    async fn give_back(&self, shared: &Shared, session: &mut Session) -> Result<HashSet<(RunId, i64)>> {
        let found = store::runs::strays(session, shared.spread, shared.id, &driven(shared), FOUND_MAX).await?;
        crash_point("strays.after_strays");
        for (run, epoch) in found.iter().filter(|stray| self.suspects.contains(stray)) {
            crash_point("strays.after_look");
            let shard = (shared.spread == Spread::ByShard).then(|| run.shard());
            let pause = Duration::from_secs(1);
            let given = asked!(session, shard, |conn| store::runs::give_back(conn, *run, shared.id, *epoch, pause));
            if given == Some(true) {
                crash_point("strays.after_give_back");
                tracing::warn!(run_id = %run, "run had an owner and no driver; given back");
                metrics::counter!("loopwright_runs_stray_total").increment(1);
            }
        }
        Ok(found.into_iter().collect())
    }
}

/// A driver whose run was ended or taken looks at its inbox, sees that, and stops what it runs.
async fn tell_lost(shared: &Shared, session: &mut Session) -> Result<()> {
    for run in store::runs::lost(session, shared.spread, shared.id, &driven(shared)).await? {
        if let Some(notify) = shared.drivers.lock().expect("no panic while held").get(&run) {
            notify.notify_one();
        }
    }
    Ok(())
}

fn driven(shared: &Shared) -> Vec<RunId> {
    shared.drivers.lock().expect("no panic while held").keys().copied().collect()
}
