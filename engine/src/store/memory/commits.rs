//! Transitions with all that they do to others, and the values of steps.

use super::{HistoryRow, Memory, Message, Mutant, Post, Row, parsed};
use crate::{
    hook::AttemptRef,
    ids::RunId,
    machine::CONTINUE_EVERY_MS,
    store::{
        chain::{KNOWN_MAX, Successor},
        inbox::{Kind, cancel_text},
        transitions::{Child, Item, Text, Verdict},
    },
};
use chrono::Duration;
use serde_json::{Value, json};

impl Memory {
    /// [`crate::store::transitions::send`].
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

    /// [`crate::store::chain::start`].
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

    /// [`crate::store::history::is_there`].
    pub(crate) fn is_there(&self, item: &Item) -> bool {
        let rows = self.history.get(&item.run_id).map_or(&[][..], Vec::as_slice);
        let events = parsed(&item.events);
        rows.iter().any(|row| row.seq == item.seq + 1 && row.epoch == item.epoch && row.events == events)
    }

    /// [`crate::store::migrations::apply`]: `from` are the epoch and the sequence number that were read.
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
}
