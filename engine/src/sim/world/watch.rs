//! What is looked at after every action, and what is left for the auditor at the end.

use super::{
    super::{
        Check, Finding,
        auditor::{Evidence, RunFact},
    },
    GROUP_LIMIT, World,
};
use crate::ids::WorkerId;
use chrono::Duration;

/// What of a run must not change but by its rules.
#[derive(Clone, Copy, Default)]
pub(super) struct Seen {
    owner: Option<WorkerId>,
    epoch: i64,
    /// Rows of its history.
    rows: usize,
}

impl World {
    /// What must hold at every instant, and what an action may change.
    pub(super) fn watch(&mut self) {
        let now = self.store.now;
        let mut found: Vec<Finding> = Vec::new();
        let mut say = |check: Check, text: String| found.push(check.finds(text));
        for (id, row) in &self.store.runs {
            let due = self.store.ready.get(id);
            let seat = self.store.seats.get(id);
            let waits = seat.is_some_and(|s| s.place.is_none());
            let held_back = waits && !row.admitted;
            if !row.closed && row.owner.is_none() && row.status != "quarantined" && due.is_none() && !held_back {
                say(Check::Reachable, format!("run {id} is open, and nobody owns or may claim it"));
            }
            if waits && row.admitted {
                say(Check::Place, format!("run {id} has no place in its group and is let in"));
            }
            if row.closed && (row.owner.is_some() || due.is_some() || seat.is_some()) {
                say(Check::Leftover, format!("run {id} is closed and has an owner or a place"));
            }
            // Somebody who was fenced off has moved it all the same.
            if !row.closed && row.owner.is_none() && !row.parked {
                say(Check::Owned, format!("run {id} moves, and nobody owns it"));
            }
            // An operator who takes a run to end it has half a minute, and the clock may be set back meanwhile.
            let soon = now + Duration::seconds(60);
            if row.parked && row.inbox_n > row.inbox_seen && due.is_some_and(|at| *at > soon) {
                say(Check::Awake, format!("run {id} sleeps over a message"));
            }
            // A claim, a takeover and a park are actions of their own: who is the owner now and was not before, has claimed.
            let before = self.seen.get(id).copied().unwrap_or_default();
            if let Some(owner) = row.owner.filter(|owner| before.owner != Some(*owner)) {
                if row.epoch <= before.epoch {
                    say(Check::Claims, format!("run {id} was claimed under epoch {}, which it had before", row.epoch));
                }
                if !self.store.workers.contains_key(&owner) {
                    say(Check::Claims, format!("run {id} was claimed by {owner}, which was declared dead"));
                }
            }
            let history = self.store.history.get(id).map_or(&[][..], Vec::as_slice);
            for written in history.get(before.rows..).unwrap_or_default() {
                if written.epoch != before.epoch && written.epoch != row.epoch {
                    let (seq, epoch) = (written.seq, written.epoch);
                    say(
                        Check::Fence,
                        format!("row {seq} of run {id} of epoch {} was written under {epoch}", before.epoch),
                    );
                }
            }
            self.seen.insert(*id, Seen { owner: row.owner, epoch: row.epoch, rows: history.len() });
        }
        // By what they do, not by what their places say.
        let under_way = self.store.runs.iter().filter(|(id, row)| {
            self.grouped.contains(id) && !row.closed && (row.owner.is_some() || row.status != "pending")
        });
        let under_way = under_way.count();
        if under_way > GROUP_LIMIT {
            say(Check::Group, format!("{under_way} runs of a group of {GROUP_LIMIT} are under way"));
        }
        // One of each is enough, and the later ones repeat it.
        for finding in found {
            if self.complaints.iter().all(|known| known.check != finding.check) {
                self.complaints.push(finding);
            }
        }
    }

    /// What is left for the auditor: rows and texts.
    pub(in crate::sim) fn evidence(&self) -> Evidence {
        let rows = self.store.history.iter().flat_map(|(run, rows)| rows.iter().map(move |r| (run, r)));
        Evidence {
            runs: self
                .store
                .runs
                .iter()
                .map(|(id, row)| RunFact {
                    id: id.to_string(),
                    status: row.status.clone(),
                    owned: row.owner.is_some(),
                    queued: self.store.ready.contains_key(id),
                    seq: row.seq,
                    epoch: row.epoch,
                    inbox_n: row.inbox_n,
                    parent: row.parent.map(|p| p.to_string()),
                    first: row.first.map(|p| p.to_string()),
                    continued_from: row.continued_from.map(|p| p.to_string()),
                })
                .collect(),
            history: rows.map(|(run, r)| (run.to_string(), r.seq, r.epoch, r.events.clone())).collect(),
            hook_started: self.store.accounts.started.iter().map(ToString::to_string).collect(),
            hook_ended: self.store.accounts.ended.iter().map(ToString::to_string).collect(),
            acted: self.acted.iter().map(ToString::to_string).collect(),
            messages: self
                .store
                .inbox
                .iter()
                .flat_map(|(run, all)| all.iter().map(move |m| (run.to_string(), m.n, m.dedupe_id.clone())))
                .collect(),
        }
    }
}
