//! Starts, places in groups, and the rows that come of them.

use super::{Memory, Mutant, Post, Row, Seat};
use crate::{
    admission::{IdConflict, IdReuse, OnConflict, Place},
    ids::RunId,
    store::{
        groups::{self, Arrival},
        inbox::{self, Kind},
    },
    view::RunStatus,
};
use chrono::{DateTime, Utc};
use serde_json::{Value, json};

impl Memory {
    /// A start without a business key, of a priority and a lane. False if the run is there already.
    pub(crate) fn start(&mut self, run: RunId, workflow: &str, queue: &str, turn: (i16, i32), inputs: Value) -> bool {
        self.insert(run, workflow, queue, turn, inputs, None)
    }

    /// A start of a run with a group. `None` if the run is there already.
    pub(crate) fn start_in_group(
        &mut self,
        run: RunId,
        workflow: &str,
        turn: (i16, i32),
        inputs: Value,
        group: &Place,
    ) -> Option<Arrival> {
        if !self.insert(run, workflow, "default", turn, inputs, None) {
            return None;
        }
        let arrival = self.arrive(run, group, self.now, true);
        if arrival == Arrival::Refused {
            self.runs.remove(&run);
            self.ready.remove(&run);
        } else if let Some(row) = self.runs.get_mut(&run) {
            row.named = Some(group.clone());
        }
        Some(arrival)
    }

    /// A start under a business key: which run is the answer and whether it is a new one, or the code of the refusal. With
    /// `terminate_existing` it takes the machine to end a run, which is not the store's.
    #[cfg_attr(not(test), allow(dead_code))]
    pub(crate) fn start_under(
        &mut self,
        run: RunId,
        workflow: &str,
        turn: (i16, i32),
        (id, reuse, conflict): (&str, IdReuse, IdConflict),
        group: Option<&Place>,
    ) -> Result<(RunId, bool), &'static str> {
        if self.runs.contains_key(&run) {
            return Ok((run, false));
        }
        let under = |row: &Row| row.id.as_deref() == Some(id) && row.status != "continued";
        if let Some((open, _)) = self.runs.iter().find(|(_, row)| under(row) && !row.closed) {
            return if conflict == IdConflict::UseExisting { Ok((*open, false)) } else { Err("workflow_id_open") };
        }
        let last = self.runs.values().filter(|row| under(row)).max_by_key(|row| row.closed_n);
        let status = last.and_then(|row| RunStatus::parse(&row.status));
        if status.is_some_and(|status| !reuse.allows(status)) {
            return Err("workflow_id_used");
        }
        let refused = match group {
            Some(group) => self.start_in_group(run, workflow, turn, json!({}), group) == Some(Arrival::Refused),
            None => !self.start(run, workflow, "default", turn, json!({})),
        };
        if refused {
            return Err("concurrency_full");
        }
        if let Some(row) = self.runs.get_mut(&run) {
            row.id = Some(id.to_owned());
        }
        Ok((run, true))
    }

    /// [`crate::store::groups::arrive`] of a run that was inserted in this transaction.
    pub(super) fn arrive(&mut self, run: RunId, group: &Place, not_before: DateTime<Utc>, refuses: bool) -> Arrival {
        let n = self.arrivals.get(&group.group).copied().unwrap_or_default() + 1;
        let taken = self.taken(&group.group);
        let waiting = self.seats.values().filter(|s| s.group == group.group && s.place.is_none()).count();
        let place = groups::free_place(&taken, group.limit).filter(|_| waiting == 0 && not_before <= self.now);
        if place.is_none() && refuses && group.on_conflict == OnConflict::Fail {
            return Arrival::Refused;
        }
        if refuses && group.on_conflict == OnConflict::CancelNew && (taken.len() >= group.limit as usize || waiting > 0)
        {
            let Some(row) = self.runs.get_mut(&run) else { return Arrival::Refused };
            row.epoch += 1;
            self.ready.insert(run, self.now);
            let reason = json!(format!("concurrency group `{}` was full", group.group));
            self.post(&Post::new(run, Kind::Terminate, inbox::TURNED_AWAY, reason));
            return Arrival::TurnedAway;
        }
        self.arrivals.insert(group.group.clone(), n);
        self.seats.insert(run, Seat { group: group.group.clone(), n, places: group.limit, place, not_before });
        let Some(row) = self.runs.get_mut(&run) else { return Arrival::Refused };
        if place.is_some() {
            row.epoch += 1;
            self.ready.insert(run, self.now);
            return Arrival::Admitted;
        }
        row.admitted = false;
        self.ready.remove(&run);
        Arrival::Waits
    }

    fn taken(&self, group: &str) -> Vec<i32> {
        self.seats.values().filter(|s| s.group == group).filter_map(|s| s.place).collect()
    }

    /// [`crate::store::groups::let_in`].
    pub(crate) fn let_in(&mut self, group: &str) -> usize {
        let more = u32::from(self.is(Mutant::Overfills));
        let mut waiting: Vec<(u64, RunId, u32)> = self
            .seats
            .iter()
            .filter(|(_, s)| s.group == group && s.place.is_none() && s.not_before <= self.now)
            .map(|(run, s)| (s.n, *run, s.places + more))
            .collect();
        waiting.sort_unstable();
        let (mut taken, mut admitted) = (self.taken(group), 0);
        for (_, run, places) in waiting {
            let Some(place) = groups::free_place(&taken, places) else { break };
            if let Some(seat) = self.seats.get_mut(&run) {
                seat.place = Some(place);
            }
            if let Some(row) = self.runs.get_mut(&run) {
                row.admitted = true;
                row.epoch += 1;
            }
            self.queue(run, self.now);
            taken.push(place);
            admitted += 1;
        }
        admitted
    }

    /// Those that were cancelled while they waited, as [`crate::store::groups::cancelled`] finds them.
    pub(crate) fn cancelled_before(&self) -> Vec<RunId> {
        let cancelled = |run: &RunId| {
            self.inbox.get(run).into_iter().flatten().any(|m| [Kind::Cancel, Kind::Terminate].contains(&m.kind))
        };
        let held_back = |run: &RunId| self.runs.get(run).is_some_and(|r| !r.admitted && !r.closed);
        self.seats.keys().filter(|run| held_back(run) && cancelled(run)).copied().collect()
    }

    /// `parent` comes with the depth of this run.
    pub(super) fn insert(
        &mut self,
        run: RunId,
        workflow: &str,
        queue: &str,
        (priority, lane): (i16, i32),
        inputs: Value,
        parent: Option<(RunId, i32)>,
    ) -> bool {
        if self.runs.contains_key(&run) {
            return false;
        }
        let row = Row {
            workflow: workflow.to_owned(),
            status: "pending".to_owned(),
            parked: true,
            owner: None,
            epoch: 0,
            seq: 0,
            inbox_n: 0,
            inbox_seen: 0,
            queue: queue.to_owned(),
            cursor: None,
            cursor_seq: 0,
            parent: parent.map(|(parent, _)| parent),
            first: None,
            continued_from: None,
            depth: parent.map_or(0, |(_, depth)| depth),
            priority,
            lane,
            inputs,
            closed: false,
            admitted: true,
            id: None,
            closed_n: 0,
            named: None,
        };
        self.runs.insert(run, row);
        self.queue(run, self.now);
        true
    }
}
