//! The store's contract in memory: what the statements of this folder promise, without Postgres. For the simulator; the
//! conformance suite beside it runs on both, so that neither says what the other does not.
//!
//! One call is one transaction. [`Mutant`]s are the mistakes that a statement could make; tests break one promise after the
//! other and expect the auditor to see it.

use super::{
    chain::{KNOWN_MAX, Successor},
    groups::{self, Arrival},
    inbox::{self, ChildResult, Kind, Sent, cancel_text},
    transitions::{Child, Item, Text, Verdict},
    turns::{Due, Turns},
};
use crate::{
    admission::{IdConflict, IdReuse, OnConflict, Place},
    hook::AttemptRef,
    ids::{RunId, WorkerId},
    machine::{CONTINUE_EVERY_MS, Inbound},
    view::RunStatus,
};
use chrono::{DateTime, Duration, Utc};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};

/// A promise that is broken on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutant {
    /// A commit does not look at the epoch.
    NoEpochFence,
    /// A commit does not look at the sequence number.
    NoSeqFence,
    /// A run parks although it has unread messages.
    ParksPastMessages,
    /// A parked run gets no place in the queue.
    ForgetsToQueue,
    /// What the hook wrote stays when its transaction is rolled back.
    KeepsRefusedStarts,
    /// A takeover frees a run under its old epoch.
    TakesOverSilently,
    /// A worker that was declared dead may claim.
    DeadMayClaim,
    /// A claim leaves the epoch as it is.
    ClaimsSilently,
    /// A sender's second message with one id is stored.
    StoresDuplicates,
    /// A message is handed out again.
    RepeatsMessages,
    /// A transition is counted and not written.
    LosesHistory,
    /// A message to a parked run does not wake it.
    SleepsOn,
    /// A closed run keeps its place in the queue.
    LeavesQueued,
    /// A closed run keeps its place in its group.
    LeavesSeated,
    /// A group takes in one more than its limit.
    Overfills,
    /// A message to a run that waits for a place wakes it.
    WakesHeldBack,
    /// What a run that continues as new has not taken is not handed on.
    ForgetsMessages,
    /// An attempt starts before its start is committed. The worker's, not the store's.
    ActsEarly,
    /// A lost answer is taken for a success. The worker's, not the store's.
    TrustsLostAnswers,
}

impl Mutant {
    /// All of them.
    pub const ALL: &[Self] = &[
        Self::NoEpochFence,
        Self::NoSeqFence,
        Self::ParksPastMessages,
        Self::ForgetsToQueue,
        Self::KeepsRefusedStarts,
        Self::TakesOverSilently,
        Self::DeadMayClaim,
        Self::ClaimsSilently,
        Self::StoresDuplicates,
        Self::RepeatsMessages,
        Self::LosesHistory,
        Self::SleepsOn,
        Self::LeavesQueued,
        Self::LeavesSeated,
        Self::Overfills,
        Self::WakesHeldBack,
        Self::ForgetsMessages,
        Self::ActsEarly,
        Self::TrustsLostAnswers,
    ];
}

/// A row of `runs`.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    pub(crate) workflow: String,
    pub(crate) status: String,
    pub(crate) parked: bool,
    pub(crate) owner: Option<WorkerId>,
    pub(crate) epoch: i64,
    pub(crate) seq: i64,
    pub(crate) inbox_n: i64,
    pub(crate) inbox_seen: i64,
    pub(crate) queue: String,
    pub(crate) cursor: Option<Value>,
    pub(crate) cursor_seq: i64,
    pub(crate) parent: Option<RunId>,
    /// First and previous run of its chain.
    pub(crate) first: Option<RunId>,
    pub(crate) continued_from: Option<RunId>,
    pub(crate) depth: i32,
    pub(crate) priority: i16,
    pub(crate) lane: i32,
    pub(crate) inputs: Value,
    pub(crate) closed: bool,
    /// Not held back.
    pub(crate) admitted: bool,
    /// Business key.
    id: Option<String>,
    /// How many had closed before it, and it.
    closed_n: u64,
    /// The place that its start named, or that of the first in its chain.
    named: Option<Place>,
}

/// A row of `admissions`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Seat {
    pub(crate) group: String,
    /// Number of arrival.
    n: u64,
    places: u32,
    pub(crate) place: Option<i32>,
    not_before: DateTime<Utc>,
}

impl Row {
    fn is_claimable(&self) -> bool {
        self.owner.is_none() && !self.closed && self.status != "quarantined" && self.admitted
    }
}

/// What Postgres makes of a text.
fn parsed(text: &Text) -> Value {
    serde_json::from_str(text.get()).expect("a written value")
}

/// A row of `inbox`.
#[derive(Clone, Debug)]
pub(crate) struct Message {
    pub(crate) n: i64,
    pub(crate) kind: Kind,
    pub(crate) name: String,
    pub(crate) payload: Value,
    pub(crate) dedupe_id: Option<String>,
    pub(crate) at: DateTime<Utc>,
}

/// A row of `history`.
#[derive(Clone, Debug)]
pub(crate) struct HistoryRow {
    pub(crate) seq: i64,
    pub(crate) epoch: i64,
    pub(crate) events: Value,
}

/// A message that somebody sends.
#[derive(Clone, Debug)]
pub(crate) struct Post {
    pub(crate) run: RunId,
    pub(crate) kind: Kind,
    pub(crate) name: String,
    pub(crate) payload: Value,
    pub(crate) dedupe_id: Option<String>,
    /// [`super::inbox::Outgoing::unread_max`].
    pub(crate) unread_max: Option<i64>,
}

/// What the hook has written, in the store's transactions.
#[derive(Clone, Debug, Default)]
pub(crate) struct Accounts {
    pub(crate) started: Vec<crate::ids::AttemptId>,
    pub(crate) ended: Vec<crate::ids::AttemptId>,
}

/// The tables.
#[derive(Clone, Debug)]
pub(crate) struct Memory {
    pub(crate) now: DateTime<Utc>,
    pub(crate) runs: BTreeMap<RunId, Row>,
    pub(crate) ready: BTreeMap<RunId, DateTime<Utc>>,
    pub(crate) history: BTreeMap<RunId, Vec<HistoryRow>>,
    pub(crate) inbox: BTreeMap<RunId, Vec<Message>>,
    /// Last heartbeat and length of the lease.
    pub(crate) workers: BTreeMap<WorkerId, (DateTime<Utc>, Duration)>,
    /// Whether its runs were taken.
    pub(crate) dead: BTreeMap<WorkerId, bool>,
    pub(crate) seats: BTreeMap<RunId, Seat>,
    /// Arrivals at each group.
    arrivals: BTreeMap<String, u64>,
    /// Runs that have closed.
    closings: u64,
    pub(crate) accounts: Accounts,
    /// By run, step path and key.
    pub(crate) checkpoints: BTreeMap<(RunId, String, String), Value>,
    pub(crate) mutant: Option<Mutant>,
}

impl Memory {
    pub(crate) fn new(now: DateTime<Utc>) -> Self {
        Self {
            now,
            runs: BTreeMap::new(),
            ready: BTreeMap::new(),
            history: BTreeMap::new(),
            inbox: BTreeMap::new(),
            workers: BTreeMap::new(),
            dead: BTreeMap::new(),
            seats: BTreeMap::new(),
            arrivals: BTreeMap::new(),
            closings: 0,
            accounts: Accounts::default(),
            checkpoints: BTreeMap::new(),
            mutant: None,
        }
    }

    fn is(&self, mutant: Mutant) -> bool {
        self.mutant == Some(mutant)
    }

    fn queue(&mut self, run: RunId, due: DateTime<Utc>) {
        let at = self.ready.entry(run).or_insert(due);
        *at = due.min(*at);
    }

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

    /// [`groups::arrive`] of a run that was inserted in this transaction.
    fn arrive(&mut self, run: RunId, group: &Place, not_before: DateTime<Utc>, refuses: bool) -> Arrival {
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

    /// [`super::groups::let_in`].
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

    /// Those that were cancelled while they waited, as [`super::groups::cancelled`] finds them.
    pub(crate) fn cancelled_before(&self) -> Vec<RunId> {
        let cancelled = |run: &RunId| {
            self.inbox.get(run).into_iter().flatten().any(|m| [Kind::Cancel, Kind::Terminate].contains(&m.kind))
        };
        let held_back = |run: &RunId| self.runs.get(run).is_some_and(|r| !r.admitted && !r.closed);
        self.seats.keys().filter(|run| held_back(run) && cancelled(run)).copied().collect()
    }

    /// `parent` comes with the depth of this run.
    fn insert(
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

    /// [`super::transitions::send`].
    pub(crate) fn commit(&mut self, items: &[Item]) -> Vec<Verdict> {
        items.iter().map(|item| self.commit_one(item)).collect()
    }

    fn commit_one(&mut self, item: &Item) -> Verdict {
        let (any_epoch, any_seq) = (self.is(Mutant::NoEpochFence), self.is(Mutant::NoSeqFence));
        let blind = self.is(Mutant::ParksPastMessages);
        let Some(row) = self.runs.get_mut(&item.run_id) else { return Verdict::Stale { epoch: -1, seq: -1 } };
        let fenced = (row.epoch != item.epoch && !any_epoch) || (row.seq != item.seq && !any_seq) || row.closed;
        if fenced {
            return Verdict::Stale { epoch: row.epoch, seq: row.seq };
        }
        if item.parked && row.inbox_n != item.inbox_seen && !blind {
            return Verdict::Unread { inbox_n: row.inbox_n };
        }
        let closed = item.is_closed();
        row.seq += 1;
        row.status = item.status.to_owned();
        row.parked = item.parked;
        row.inbox_seen = item.inbox_seen;
        row.closed = closed;
        if closed {
            self.closings += 1;
            row.closed_n = self.closings;
        }
        if item.parked || closed {
            row.owner = None;
        }
        if let Some(cursor) = &item.cursor {
            (row.cursor, row.cursor_seq) = (Some(parsed(cursor)), row.seq);
        }
        let (seq, inbox_n) = (row.seq, row.inbox_n);
        let rows = self.history.entry(item.run_id).or_default();
        if self.mutant != Some(Mutant::LosesHistory) || seq % 5 != 4 {
            rows.push(HistoryRow { seq, epoch: item.epoch, events: parsed(&item.events) });
        }
        if let (true, Some(due), false) = (item.parked, item.due, self.is(Mutant::ForgetsToQueue)) {
            self.queue(item.run_id, due);
        }
        if closed && !self.is(Mutant::LeavesSeated) {
            self.seats.remove(&item.run_id);
        }
        if closed && !self.is(Mutant::LeavesQueued) {
            self.ready.remove(&item.run_id);
        }
        Verdict::Accepted { inbox_n }
    }

    /// The committer's transaction: a batch, what it does beside its own rows, and the hook last. `refuses` says which
    /// starts the hook does not allow; then everything is rolled back and the answer is their positions.
    pub(crate) fn commit_with_effects(
        &mut self,
        items: &[Item],
        refuses: &dyn Fn(&AttemptRef) -> bool,
    ) -> Result<Vec<Verdict>, Vec<usize>> {
        // A copy of everything is dear; without a refusal nothing is rolled back.
        let may_refuse = items.iter().flat_map(|i| &i.effects.started).any(|s| refuses(&s.attempt));
        let before = may_refuse.then(|| self.clone());
        let verdicts = self.commit(items);
        let accepted: Vec<&Item> = items
            .iter()
            .zip(&verdicts)
            .filter(|(_, v)| matches!(v, Verdict::Accepted { .. }))
            .map(|(i, _)| i)
            .collect();
        for item in &accepted {
            for Child { run_id, workflow, queue, inputs, depth, .. } in &item.effects.children {
                let turn = self.runs.get(&item.run_id).map_or((3, 0), |r| (r.priority, r.lane));
                self.insert(*run_id, workflow, queue, turn, inputs.clone(), Some((item.run_id, *depth)));
            }
            if let Some(next) = &item.effects.successor {
                self.succeed(item.run_id, next);
            }
        }
        let mut messages = Vec::new();
        for item in &accepted {
            let cancelled = item.effects.cancelled_children.iter();
            messages.extend(
                cancelled.map(|(c, until)| (*c, Kind::Cancel, cancel_text("its parent was cancelled", *until))),
            );
            let terminated = item.effects.terminated_children.iter();
            messages.extend(terminated.map(|c| (*c, Kind::Terminate, json!("its parent was stopped"))));
            messages.extend(item.effects.parent.clone().map(|(parent, result)| (parent, Kind::Child, result)));
        }
        messages.sort_by_key(|(run, ..)| *run);
        for (run, kind, payload) in messages {
            let open = if kind == Kind::Child { run } else { self.open_of(run) };
            self.post(&Post::new(open, kind, "", payload));
        }
        for item in &accepted {
            self.accounts.ended.extend(item.effects.ended.iter().map(|e| e.attempt.attempt_id));
            self.accounts.started.extend(item.effects.started.iter().map(|s| s.attempt.attempt_id));
        }
        let refused: Vec<usize> = (0..items.len())
            .filter(|i| matches!(verdicts[*i], Verdict::Accepted { .. }))
            .filter(|i| items[*i].effects.started.iter().any(|s| refuses(&s.attempt)))
            .collect();
        let Some(before) = before.filter(|_| !refused.is_empty()) else { return Ok(verdicts) };
        let accounts = std::mem::take(&mut self.accounts);
        *self = before;
        if self.is(Mutant::KeepsRefusedStarts) {
            self.accounts = accounts;
        }
        Err(refused)
    }

    /// [`super::chain::start`].
    fn succeed(&mut self, old: RunId, next: &Successor) {
        let Some(row) = self.runs.get(&old).cloned() else { return };
        let parent = row.parent.map(|parent| (parent, row.depth));
        self.insert(next.run_id, &row.workflow, &row.queue, (row.priority, row.lane), next.inputs.clone(), parent);
        let due = next.not_before.min(self.now + Duration::milliseconds(CONTINUE_EVERY_MS)).max(self.now);
        self.ready.insert(next.run_id, due);
        let kept = |m: &Message| next.kept.iter().any(|k| i64::try_from(k.n) == Ok(m.n));
        let unread = |m: &Message| m.n > row.inbox_seen && m.kind != Kind::Child;
        let (mut known, mut handed_on) = (Vec::new(), Vec::new());
        for message in self.inbox.get(&old).into_iter().flatten() {
            let of_people = matches!(message.kind, Kind::Signal | Kind::Update) && message.dedupe_id.is_some();
            if kept(message) || unread(message) {
                handed_on.push(message.clone());
            } else if of_people && message.n <= row.inbox_seen {
                known.push(Message { name: String::new(), payload: Value::Null, ..message.clone() });
            }
        }
        let excess = known.len().saturating_sub(usize::try_from(KNOWN_MAX).unwrap_or(usize::MAX));
        known.drain(..excess);
        if self.is(Mutant::ForgetsMessages) {
            handed_on.clear();
        }
        if let Some(new) = self.runs.get_mut(&next.run_id) {
            (new.first, new.continued_from) = (Some(row.first.unwrap_or(old)), Some(old));
            new.inbox_seen = i64::try_from(known.len()).unwrap_or(i64::MAX);
            known.extend(handed_on);
            new.inbox_n = i64::try_from(known.len()).unwrap_or(i64::MAX);
        }
        for (n, message) in (1..).zip(&mut known) {
            message.n = n;
        }
        self.inbox.insert(next.run_id, known);
        if let Some(new) = self.runs.get_mut(&next.run_id) {
            (new.id, new.named) = (row.id, row.named.clone());
        }
        if let Some(group) = row.named {
            self.arrive(next.run_id, &group, due, false);
        }
    }

    /// Whether two runs are due since the same instant: which one goes first, only a clock that goes on can say.
    #[cfg_attr(not(test), allow(dead_code))]
    pub(crate) fn ties(&self) -> bool {
        let due: Vec<DateTime<Utc>> = self.ready.values().copied().filter(|at| *at <= self.now).collect();
        BTreeSet::from_iter(&due).len() < due.len()
    }

    /// Keeps a step's value, the first under its key. False if the hook has not accepted what it is saved with, or `epoch` does not own
    /// the run: then nothing is kept.
    #[cfg_attr(not(test), allow(dead_code))]
    pub(crate) fn save(
        &mut self,
        run: RunId,
        epoch: i64,
        (path, key): (&str, &str),
        value: Value,
        accepted: bool,
    ) -> bool {
        let done = accepted && self.runs.get(&run).is_some_and(|row| row.epoch == epoch && !row.closed);
        if done {
            self.checkpoints.entry((run, path.to_owned(), key.to_owned())).or_insert(value);
        }
        done
    }

    /// A step's value.
    #[cfg_attr(not(test), allow(dead_code))]
    pub(crate) fn checkpoint(&self, run: RunId, path: &str, key: &str) -> Option<&Value> {
        self.checkpoints.get(&(run, path.to_owned(), key.to_owned()))
    }

    /// [`super::inbox::unblock`] of all. Returns how many.
    #[cfg_attr(not(test), allow(dead_code))]
    pub(crate) fn unblock(&mut self) -> usize {
        let open = self.runs.iter().filter(|(_, row)| !row.closed && row.status != "quarantined");
        let open: Vec<RunId> = open.map(|(run, _)| *run).collect();
        open.iter().filter(|run| self.post(&Post::new(**run, Kind::Unblock, "", Value::Null)) == Sent::Stored).count()
    }

    /// The open run of a chain, by its first one.
    pub(crate) fn open_of(&self, first: RunId) -> RunId {
        self.runs.iter().find(|(_, r)| r.first == Some(first) && !r.closed).map_or(first, |(id, _)| *id)
    }

    /// [`super::inbox::overdue`].
    pub(crate) fn overdue(&self, child: RunId) -> Option<(RunId, bool)> {
        let run = self.open_of(child);
        let row = self.runs.get(&run).filter(|r| !r.closed)?;
        let unread = self.inbox.get(&run).into_iter().flatten().filter(|m| m.n > row.inbox_seen);
        let told = unread.filter(|m| [Kind::Cancel, Kind::Terminate].contains(&m.kind)).count();
        Some((run, row.status != "quarantined" && told == 0))
    }

    /// [`super::inbox::send`].
    pub(crate) fn post(&mut self, post: &Post) -> Sent {
        let Some(row) = self.runs.get_mut(&post.run).filter(|r| !r.closed) else { return Sent::NoOpenRun };
        let messages = self.inbox.entry(post.run).or_default();
        let seen = post.dedupe_id.is_some() && messages.iter().any(|m| m.dedupe_id == post.dedupe_id);
        if seen && self.mutant != Some(Mutant::StoresDuplicates) {
            return Sent::Duplicate;
        }
        let alike = |m: &&Message| m.n > row.inbox_seen && post.kind.alike().contains(&m.kind.as_str());
        let waiting = messages.iter().filter(alike).count();
        if post.unread_max.is_some_and(|most| i64::try_from(waiting).unwrap_or(i64::MAX) >= most) {
            return Sent::Full;
        }
        row.inbox_n += 1;
        messages.push(Message {
            n: row.inbox_n,
            kind: post.kind,
            name: post.name.clone(),
            payload: post.payload.clone(),
            dedupe_id: post.dedupe_id.clone(),
            at: self.now,
        });
        let held_back = !row.admitted && self.mutant != Some(Mutant::WakesHeldBack);
        if self.mutant == Some(Mutant::WakesHeldBack) {
            row.admitted = true;
        }
        if row.parked && row.status != "quarantined" && !held_back && self.mutant != Some(Mutant::SleepsOn) {
            self.queue(post.run, self.now);
        }
        Sent::Stored
    }

    /// [`super::inbox::read`].
    pub(crate) fn read(&self, run: RunId, after: i64, up_to: i64) -> Vec<Inbound> {
        let after = if self.is(Mutant::RepeatsMessages) { (after - 1).max(0) } else { after };
        let messages = self.inbox.get(&run).map_or(&[][..], Vec::as_slice);
        messages.iter().filter(|m| m.n > after && m.n <= up_to).map(Message::inbound).collect()
    }

    /// [`super::workers::unread`].
    pub(crate) fn unread(&self, worker: WorkerId) -> BTreeSet<RunId> {
        self.runs
            .iter()
            .filter(|(_, r)| r.owner == Some(worker) && r.inbox_n > r.inbox_seen)
            .map(|(id, _)| *id)
            .collect()
    }

    /// [`super::ready::due`], of a queue that is not too long for a window.
    pub(crate) fn due(&self, queues: &[&str]) -> Vec<Due> {
        let waiting = self.ready.iter().filter(|(_, at)| **at <= self.now);
        let due = waiting.filter_map(|(id, at)| {
            let row = self.runs.get(id).filter(|r| queues.contains(&r.queue.as_str()))?;
            Some(Due { run: *id, priority: row.priority, lane: row.lane, due_at: *at })
        });
        due.collect()
    }

    /// A look, its order and [`super::ready::take`]. `None` if this worker was declared dead and something is due.
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

    /// [`super::ready::take_messaged`]. `None` if this worker was declared dead.
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

    /// [`super::workers::register`].
    pub(crate) fn register(&mut self, worker: WorkerId, lease: Duration) {
        self.workers.insert(worker, (self.now, lease));
    }

    /// [`super::workers::heartbeat`]. False if this worker was declared dead.
    pub(crate) fn heartbeat(&mut self, worker: WorkerId) -> bool {
        match self.workers.get_mut(&worker) {
            Some((at, _)) => {
                *at = self.now;
                true
            }
            None => false,
        }
    }

    /// [`super::workers::bury`]: how many.
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

    /// [`super::workers::leave`].
    pub(crate) fn leave(&mut self, worker: WorkerId) {
        if self.workers.remove(&worker).is_some() {
            self.dead.entry(worker).or_insert(false);
        }
    }

    /// [`super::workers::take_over`].
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

    /// [`super::runs::give_back`].
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

    /// [`super::runs::strays`].
    pub(crate) fn strays(&self, worker: WorkerId, driven: &BTreeSet<RunId>) -> Vec<(RunId, i64)> {
        self.runs
            .iter()
            .filter(|(id, r)| r.owner == Some(worker) && !driven.contains(id))
            .map(|(id, r)| (*id, r.epoch))
            .collect()
    }

    /// [`super::runs::seize`].
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

    /// [`super::history::is_there`].
    pub(crate) fn is_there(&self, item: &Item) -> bool {
        let rows = self.history.get(&item.run_id).map_or(&[][..], Vec::as_slice);
        let events = parsed(&item.events);
        rows.iter().any(|row| row.seq == item.seq + 1 && row.epoch == item.epoch && row.events == events)
    }

    /// [`super::migrations::apply`]: `from` are the epoch and the sequence number that were read.
    pub(crate) fn migrate(&mut self, run: RunId, from: (i64, i64), to: &str, events: Text, state: Text) -> bool {
        let stands = |row: &Row| !row.closed && (row.epoch, row.seq) == from;
        let Some(row) = self.runs.get_mut(&run).filter(|r| stands(r)) else { return false };
        (row.owner, row.parked) = (None, true);
        row.epoch += 1;
        row.seq += 1;
        row.workflow = to.to_owned();
        (row.cursor, row.cursor_seq) = (Some(parsed(&state)), row.seq);
        let written = HistoryRow { seq: row.seq, epoch: row.epoch, events: parsed(&events) };
        let admitted = row.admitted;
        self.history.entry(run).or_default().push(written);
        if admitted {
            self.queue(run, self.now);
        }
        true
    }

    /// [`super::runs::release`].
    pub(crate) fn release(&mut self, run: RunId, epoch: i64, inbox_seen: i64, due: DateTime<Utc>) -> bool {
        let Some(row) = self.runs.get_mut(&run) else { return false };
        if row.epoch != epoch || row.inbox_n != inbox_seen || row.closed {
            return false;
        }
        (row.owner, row.parked) = (None, true);
        self.queue(run, due);
        true
    }

    /// [`super::runs::quarantine`].
    pub(crate) fn quarantine(&mut self, run: RunId, epoch: i64) {
        if let Some(row) = self.runs.get_mut(&run).filter(|r| r.epoch == epoch && !r.closed) {
            row.status = "quarantined".to_owned();
            (row.owner, row.parked) = (None, true);
            row.epoch += 1;
            self.ready.remove(&run);
        }
    }
}

impl Post {
    pub(crate) fn new(run: RunId, kind: Kind, name: &str, payload: Value) -> Self {
        Self { run, kind, name: name.to_owned(), payload, dedupe_id: None, unread_max: None }
    }
}

impl Message {
    fn inbound(&self) -> Inbound {
        match self.kind {
            Kind::Cancel => inbox::cancel(&self.payload),
            Kind::Terminate if self.name == inbox::TURNED_AWAY => {
                Inbound::TurnedAway { reason: self.payload.as_str().unwrap_or_default().to_owned() }
            }
            Kind::Terminate => Inbound::Terminate { reason: self.payload.as_str().unwrap_or_default().to_owned() },
            Kind::Unblock => Inbound::Unblock,
            Kind::Pause => Inbound::Pause { reason: "paused".into(), by: None },
            Kind::Resume => Inbound::Resume { reason: "resumed".into(), by: None, halted: None },
            Kind::Child => match serde_json::from_value::<ChildResult>(self.payload.clone()) {
                Ok(child) => Inbound::Child {
                    run_id: child.run_id,
                    completed: child.completed,
                    cancelled: child.cancelled,
                    output: child.output,
                    failure: child.failure,
                },
                // Only this module and `transitions` write such messages.
                Err(error) => Inbound::Cancel { reason: error.to_string(), until: None },
            },
            Kind::Update => Inbound::Update {
                n: u64::try_from(self.n).unwrap_or(0),
                id: super::inbox::update_id(self.dedupe_id.as_deref().unwrap_or_default()),
                name: self.name.clone(),
                payload: self.payload.clone(),
                sender: None,
                at: self.at,
            },
            Kind::Signal => Inbound::Signal {
                n: u64::try_from(self.n).unwrap_or(0),
                name: self.name.clone(),
                payload: self.payload.clone(),
                sender: None,
                at: self.at,
            },
        }
    }
}
