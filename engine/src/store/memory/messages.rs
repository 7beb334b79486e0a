//! Messages into runs.

use super::{Memory, Message, Mutant, Post};
use crate::{
    ids::{RunId, WorkerId},
    machine::Inbound,
    store::inbox::{self, ChildResult, Kind, Sent},
};
use serde_json::Value;
use std::collections::BTreeSet;

impl Memory {
    /// [`crate::store::inbox::unblock`] of all. Returns how many.
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

    /// [`crate::store::inbox::overdue`].
    pub(crate) fn overdue(&self, child: RunId) -> Option<(RunId, bool)> {
        let run = self.open_of(child);
        let row = self.runs.get(&run).filter(|r| !r.closed)?;
        let unread = self.inbox.get(&run).into_iter().flatten().filter(|m| m.n > row.inbox_seen);
        let told = unread.filter(|m| [Kind::Cancel, Kind::Terminate].contains(&m.kind)).count();
        Some((run, row.status != "quarantined" && told == 0))
    }

    /// [`crate::store::inbox::send`].
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

    /// [`crate::store::inbox::read`].
    pub(crate) fn read(&self, run: RunId, after: i64, up_to: i64) -> Vec<Inbound> {
        let after = if self.is(Mutant::RepeatsMessages) { (after - 1).max(0) } else { after };
        let messages = self.inbox.get(&run).map_or(&[][..], Vec::as_slice);
        messages.iter().filter(|m| m.n > after && m.n <= up_to).map(Message::inbound).collect()
    }

    /// [`crate::store::workers::unread`].
    pub(crate) fn unread(&self, worker: WorkerId) -> BTreeSet<RunId> {
        self.runs
            .iter()
            .filter(|(_, r)| r.owner == Some(worker) && r.inbox_n > r.inbox_seen)
            .map(|(id, _)| *id)
            .collect()
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
                id: inbox::update_id(self.dedupe_id.as_deref().unwrap_or_default()),
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
