//! Who has a run: claims, workers that come, die and leave, runs that are given back.

use super::{Memory, Mutant};
use crate::{
    ids::{RunId, WorkerId},
    store::turns::{Due, Turns},
};
use chrono::{DateTime, Duration, Utc};
use std::collections::BTreeSet;

impl Memory {
    /// Whether two runs are due since the same instant: which one goes first, only a clock that goes on can say.
    #[cfg_attr(not(test), allow(dead_code))]
    pub(crate) fn ties(&self) -> bool {
        let due: Vec<DateTime<Utc>> = self.ready.values().copied().filter(|at| *at <= self.now).collect();
        BTreeSet::from_iter(&due).len() < due.len()
    }

    /// [`crate::store::ready::due`], of a queue that is not too long for a window.
    pub(crate) fn due(&self, queues: &[&str]) -> Vec<Due> {
        let waiting = self.ready.iter().filter(|(_, at)| **at <= self.now);
        let due = waiting.filter_map(|(id, at)| {
            let row = self.runs.get(id).filter(|r| queues.contains(&r.queue.as_str()))?;
            Some(Due { run: *id, priority: row.priority, lane: row.lane, due_at: *at })
        });
        due.collect()
    }

    /// A look, its order and [`crate::store::ready::take`]. `None` if this worker was declared dead and something is due.
    pub(crate) fn claim(
        &mut self,
        worker: WorkerId,
        queues: &[&str],
        turns: &Turns,
        limit: usize,
    ) -> Option<Vec<(RunId, i64)>> {
        let order = turns.order(self.due(queues));
        if order.is_empty() { Some(Vec::new()) } else { self.take(worker, &order, limit) }
    }

    /// [`crate::store::ready::take_messaged`]. `None` if this worker was declared dead.
    pub(crate) fn claim_messaged(
        &mut self,
        worker: WorkerId,
        queues: &[&str],
        limit: usize,
    ) -> Option<Vec<(RunId, i64)>> {
        let mut due = self.due(queues);
        due.retain(|d| self.runs.get(&d.run).is_some_and(|r| r.inbox_n > r.inbox_seen));
        due.sort_unstable_by_key(|d| (d.due_at, d.run));
        self.take(worker, &due, limit)
    }

    fn take(&mut self, worker: WorkerId, order: &[Due], limit: usize) -> Option<Vec<(RunId, i64)>> {
        if !self.workers.contains_key(&worker) && !self.is(Mutant::DeadMayClaim) {
            return None;
        }
        let silently = self.is(Mutant::ClaimsSilently);
        let mut claimed = Vec::new();
        for due in order {
            let Some(row) = self.runs.get_mut(&due.run).filter(|r| r.is_claimable()) else { continue };
            if claimed.len() == limit {
                break;
            }
            row.owner = Some(worker);
            row.parked = false;
            row.epoch += i64::from(!silently);
            claimed.push((due.run, row.epoch));
            self.ready.remove(&due.run);
        }
        Some(claimed)
    }

    /// [`crate::store::workers::register`].
    pub(crate) fn register(&mut self, worker: WorkerId, lease: Duration) {
        self.workers.insert(worker, (self.now, lease));
    }

    /// [`crate::store::workers::heartbeat`]. False if this worker was declared dead.
    pub(crate) fn heartbeat(&mut self, worker: WorkerId) -> bool {
        match self.workers.get_mut(&worker) {
            Some((at, _)) => {
                *at = self.now;
                true
            }
            None => false,
        }
    }

    /// [`crate::store::workers::bury`]: how many.
    pub(crate) fn bury(&mut self) -> usize {
        let now = self.now;
        let late: Vec<WorkerId> =
            self.workers.iter().filter(|(_, (at, lease))| *at + *lease < now).map(|(id, _)| *id).collect();
        for worker in &late {
            self.workers.remove(worker);
            self.dead.entry(*worker).or_insert(false);
        }
        late.len()
    }

    /// [`crate::store::workers::leave`].
    pub(crate) fn leave(&mut self, worker: WorkerId) {
        if self.workers.remove(&worker).is_some() {
            self.dead.entry(worker).or_insert(false);
        }
    }

    /// [`crate::store::workers::take_over`].
    pub(crate) fn take_over(&mut self, limit: usize) -> Vec<RunId> {
        let orphans: Vec<RunId> = self
            .runs
            .iter()
            .filter(|(_, r)| r.owner.is_some_and(|o| self.dead.get(&o) == Some(&false)))
            .map(|(id, _)| *id)
            .take(limit)
            .collect();
        let silently = self.is(Mutant::TakesOverSilently);
        for run in &orphans {
            if let Some(row) = self.runs.get_mut(run) {
                row.owner = None;
                row.parked = true;
                row.epoch += i64::from(!silently);
            }
            self.queue(*run, self.now);
        }
        if orphans.is_empty() {
            let owners: BTreeSet<WorkerId> = self.runs.values().filter_map(|r| r.owner).collect();
            self.dead.iter_mut().filter(|(id, _)| !owners.contains(id)).for_each(|(_, taken)| *taken = true);
        }
        orphans
    }

    /// [`crate::store::runs::give_back`].
    pub(crate) fn give_back(&mut self, run: RunId, owner: WorkerId, epoch: i64) -> bool {
        let Some(row) = self.runs.get_mut(&run) else { return false };
        if row.owner != Some(owner) || row.epoch != epoch || row.closed {
            return false;
        }
        (row.owner, row.parked) = (None, true);
        row.epoch += 1;
        self.queue(run, self.now + Duration::seconds(1));
        true
    }

    /// [`crate::store::runs::strays`].
    pub(crate) fn strays(&self, worker: WorkerId, driven: &BTreeSet<RunId>) -> Vec<(RunId, i64)> {
        self.runs
            .iter()
            .filter(|(id, r)| r.owner == Some(worker) && !driven.contains(id))
            .map(|(id, r)| (*id, r.epoch))
            .collect()
    }

    /// [`crate::store::runs::seize`].
    pub(crate) fn seize(&mut self, run: RunId) -> Option<i64> {
        let row = self.runs.get_mut(&run).filter(|r| !r.closed)?;
        (row.owner, row.parked) = (None, true);
        row.epoch += 1;
        if !row.admitted || row.status == "quarantined" {
            return Some(row.epoch);
        }
        let epoch = row.epoch;
        let due = self.now + Duration::seconds(30);
        let at = self.ready.entry(run).or_insert(due);
        *at = due.max(*at);
        Some(epoch)
    }

    /// [`crate::store::runs::release`].
    pub(crate) fn release(&mut self, run: RunId, epoch: i64, inbox_seen: i64, due: DateTime<Utc>) -> bool {
        let Some(row) = self.runs.get_mut(&run) else { return false };
        if row.epoch != epoch || row.inbox_n != inbox_seen || row.closed {
            return false;
        }
        (row.owner, row.parked) = (None, true);
        self.queue(run, due);
        true
    }

    /// [`crate::store::runs::quarantine`].
    pub(crate) fn quarantine(&mut self, run: RunId, epoch: i64) {
        if let Some(row) = self.runs.get_mut(&run).filter(|r| r.epoch == epoch && !r.closed) {
            row.status = "quarantined".to_owned();
            (row.owner, row.parked) = (None, true);
            row.epoch += 1;
            self.ready.remove(&run);
        }
    }
}
