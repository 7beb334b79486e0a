//! A decision as it is committed: the transition, its effects, and the large values that are stored before it.

use super::{Driver, UNREACHABLE_PAUSE_MAX, UNREACHABLE_PAUSE_MIN};
use crate::{
    Error, Result,
    event::{Event, format_of},
    hook::{AttemptEnd, AttemptRef, AttemptStart},
    ids::AttemptId,
    machine::{Command, Decision},
    payload::{self, Blob, Slot},
    store::{
        self,
        chain::Successor,
        transitions::{Child, Effects, Item, Text, child_result},
    },
};
use chrono::{DateTime, Utc};
use serde_json::Value;
use std::time::Duration;

/// Transitions between two writings of the folded state: loading a run folds at most that many rows. A run that parks or
/// closes before writes none: its history says the same, and the state of a short run is larger than its rows are dear to fold.
const CURSOR_EVERY: i64 = 32;
/// Events after which a run that leaves memory writes its state although its rows are few.
const CURSOR_EVENTS: usize = 256;

impl Driver {
    /// The transition, and what must be stored before it: a large value does not travel with others' transitions.
    pub(super) async fn item(&self, decision: &Decision) -> Result<(Item, Vec<Blob>)> {
        let state = &self.run.state;
        let closed = state.status.is_closed();
        let due = if closed || decision.more { None } else { self.park_until() };
        let waiting = due.and_then(|_| self.waiting());
        let leaves = closed || due.is_some();
        let write_cursor = self.run.seq + 1 - self.run.cursor_seq >= CURSOR_EVERY
            || (leaves && self.run.tail_events + decision.events.len() >= CURSOR_EVENTS);
        let (run, seq, mut large) = (self.run.run_id, self.run.seq + 1, Vec::new());
        let events = payload::pack(run, Slot::Events { seq }, &decision.events, &mut large)?;
        let output = state.output.as_ref().map(|o| payload::pack(run, Slot::Output, o, &mut large)).transpose()?;
        let failure = state.failure.as_ref().map(|f| payload::pack(run, Slot::Failure, f, &mut large)).transpose()?;
        let cursor = if write_cursor { Some(self.cursor(seq, &large).await?) } else { None };
        let item = Item {
            run_id: run,
            epoch: self.run.epoch,
            seq: self.run.seq,
            status: state.status.as_str(),
            parked: due.is_some(),
            due,
            waiting,
            inbox_seen: self.run.inbox_seen,
            queue: self.run.queue.clone(),
            topic: self.run.topic.clone(),
            cursor,
            format: payload::format(&events, format_of(&decision.events)),
            events,
            output,
            failure,
            effects: self.effects(decision),
        };
        Ok((item, large))
    }

    pub(super) async fn cursor(&self, seq: i64, large: &[Blob]) -> Result<Text> {
        let (run, slot, mut pause) = (self.run.run_id, Slot::Cursor { seq }, UNREACHABLE_PAUSE_MIN);
        if let Some(small) = payload::pack_small(run, slot, &self.run.state)? {
            return Ok(small);
        }
        loop {
            let packed =
                self.shared.ask(async |conn| payload::pack_known(conn, run, slot, &self.run.state, large).await);
            match packed.await {
                Ok(text) => return Ok(text),
                Err(error) => self.away(error, &mut pause).await?,
            }
        }
    }

    /// Stores large values. Nothing refers to them if we die here, and the next owner finds them there.
    pub(super) async fn put(&self, large: &[Blob]) -> Result<()> {
        let mut pause = UNREACHABLE_PAUSE_MIN;
        while !large.is_empty() {
            match self.shared.ask(async |conn| store::blobs::put(conn, large).await).await {
                Ok(()) => {
                    crate::committer::crash_point("large.after_put");
                    break;
                }
                Err(error) => self.away(error, &mut pause).await?,
            }
        }
        Ok(())
    }

    /// Waits a little if Postgres is away: what was decided is decided. Any other error comes back.
    pub(super) async fn away(&self, error: Error, pause: &mut Duration) -> Result<()> {
        match error {
            Error::Sql(error) if store::is_transient(&error) => {
                tracing::warn!(run_id = %self.run.run_id, %error, "run cannot go on yet");
                tokio::select! {
                    () = self.shared.fenced.cancelled() => return Err(Error::LeaseLost),
                    () = tokio::time::sleep(*pause) => *pause = (*pause * 2).min(UNREACHABLE_PAUSE_MAX),
                }
                Ok(())
            }
            other => Err(other),
        }
    }

    pub(super) fn effects(&self, decision: &Decision) -> Effects {
        let mut effects = Effects::default();
        let metered = |activity: &str| self.shared.registry.signature(activity).is_some_and(|s| s.metered);
        // One that is not known here, of a newer release or another kind of worker, may have been metered where it began. The hook
        // ignores those it never saw.
        let was_metered = |activity: &str| self.shared.registry.signature(activity).is_none_or(|s| s.metered);
        for event in &decision.events {
            match event {
                Event::AttemptStarted { path, attempt, attempt_id, activity, deadline, .. } if metered(activity) => {
                    let input = decision.commands.iter().find_map(|c| match c {
                        Command::StartAttempt { path: p, input, .. } if p == path => Some(input),
                        _ => None,
                    });
                    let reserve = match (input, self.shared.registry.get(activity)) {
                        (Some(input), Some(code)) => code.reserve(input, &self.pinned.extras),
                        _ => Value::Null,
                    };
                    let attempt = self.attempt_ref(path, *attempt, *attempt_id, activity, *deadline);
                    effects.started.push(AttemptStart { attempt, reserve });
                }
                Event::AttemptEnded { path, attempt, attempt_id, activity, outcome, failure, at, .. }
                    if was_metered(activity) =>
                {
                    let attempt = self.attempt_ref(path, *attempt, *attempt_id, activity, *at);
                    let failure = failure.as_ref().map(|f| f.code.clone());
                    let retried = |e: &Event| matches!(e, Event::RetryScheduled { path: p, .. } if p == path);
                    let again = decision.events.iter().any(retried);
                    effects.ended.push(AttemptEnd { attempt, outcome: *outcome, failure, again });
                }
                Event::RunClosed { status, output, failure, .. } => {
                    effects.successor = Successor::of(&self.run.state);
                    // A parent knows the first run of a chain, and hears of the last one's end.
                    let known = self.run.chain.first.unwrap_or(self.run.run_id);
                    effects.parent =
                        self.run.parent.as_ref().filter(|_| effects.successor.is_none()).map(|(parent, _)| {
                            (*parent, child_result(known, status.as_str(), output.clone(), failure.clone()))
                        });
                }
                _ => {}
            }
        }
        for command in &decision.commands {
            match command {
                Command::StartChild { path, run_id, workflow, definition, inputs } => effects.children.push(Child {
                    run_id: *run_id,
                    workflow: workflow.clone(),
                    definition: *definition,
                    path: path.clone(),
                    depth: self.run.depth.saturating_add(1),
                    queue: self.run.queue.clone(),
                    attributes: self.run.attributes.clone(),
                    inputs: inputs.clone(),
                }),
                Command::CancelChild { run_id, until } => effects.cancelled_children.push((*run_id, *until)),
                Command::TerminateChild { run_id } => effects.terminated_children.push(*run_id),
                Command::StartAttempt { .. } | Command::CancelAttempt { .. } | Command::EndChild { .. } => {}
            }
        }
        effects
    }

    pub(super) fn attempt_ref(
        &self,
        path: &str,
        attempt: u32,
        attempt_id: AttemptId,
        activity: &str,
        deadline: DateTime<Utc>,
    ) -> AttemptRef {
        AttemptRef {
            run_id: self.run.run_id,
            attempt_id,
            activity: activity.to_owned(),
            path: path.to_owned(),
            attempt,
            attributes: self.attributes.clone(),
            budget: self.pinned.budget.clone(),
            deadline,
        }
    }
}
