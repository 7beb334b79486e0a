//! A worker as `worker::drive` is one, cut into the pieces between which something may go wrong: an input is decided, the
//! transition is sent, its answer arrives, and only then is it acted on.

use super::scenario;
use crate::{
    definition::Definition,
    event::{Event, format_of},
    failure::Failure,
    hook::{AttemptEnd, AttemptRef, AttemptStart},
    ids::{AttemptId, DefinitionHash, RunId, WorkerId},
    machine::{self, Command, Decision, Illegal, Input, Live, Moment, Phase, Refusals, RunState, fold},
    signature::Catalog,
    store::{
        chain::Successor,
        memory::{Memory, Mutant},
        transitions::{Child, Effects, Item, Text, Verdict, child_result, size, text},
    },
    view::RunStatus,
};
use chrono::{DateTime, Duration, Utc};
use serde::Serialize;
use serde_json::Value;
use std::{
    cell::Cell,
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
};

/// As in `worker::drive`, but small: the simulator should load half-written states often.
const CURSOR_EVERY: i64 = 4;
/// As in `worker::drive`, but small.
const ENDED_BYTES: usize = 40;
/// Attempts that one decision may start.
const WIDTH: u32 = 3;

/// What the workers of a world share.
pub(super) struct Library {
    pub(super) definitions: BTreeMap<&'static str, Definition>,
    catalog: Catalog,
    calls: BTreeMap<String, DefinitionHash>,
}

impl Library {
    pub(super) fn new() -> Self {
        Self { definitions: scenario::definitions(), catalog: scenario::catalog(), calls: scenario::calls() }
    }
}

/// A process.
pub(super) struct Worker {
    pub(super) id: WorkerId,
    pub(super) slots: u32,
    /// Its clock less the database's.
    pub(super) skew: Duration,
    pub(super) frozen: bool,
    pub(super) draining: bool,
    pub(super) drivers: BTreeMap<RunId, Driver>,
    /// Found without a driver at the last look.
    pub(super) strays: BTreeSet<(RunId, i64)>,
}

/// One owned run.
pub(super) struct Driver {
    run: RunId,
    workflow: String,
    pub(super) epoch: i64,
    seq: i64,
    cursor_seq: i64,
    inbox_seen: i64,
    queue: String,
    parent: Option<RunId>,
    /// The first run of its chain.
    first_run: RunId,
    depth: i32,
    state: RunState,
    first: Option<Input>,
    pub(super) notified: bool,
    /// Attempts that work here, by path; true when they were asked to stop.
    pub(super) running: BTreeMap<String, (u32, bool)>,
    pub(super) finished: VecDeque<(String, u32, Result<Value, Failure>)>,
    /// Children that are to be ended, and whether they are spared if they hear.
    pub(super) overdue: Vec<(RunId, bool)>,
    pub(super) flight: Option<Flight>,
}

/// A decided transition that waits for its verdict.
pub(super) struct Flight {
    pub(super) item: Item,
    decision: Decision,
    input: Input,
    permits: u32,
    /// What the hook refused of former versions.
    refused: Refusals,
    /// The answer that is on its way; `None` while it is not sent.
    pub(super) answer: Option<Answer>,
}

/// What comes back from the store.
#[derive(Clone, Debug)]
pub(super) enum Answer {
    Verdict(Verdict),
    /// Nothing: the connection broke. Whether it was written is unknown.
    Lost,
}

/// What becomes of a driver.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next {
    Goes,
    Ends,
    /// An invariant is broken: the run is to be quarantined.
    Broken(String),
}

impl Worker {
    pub(super) fn new(id: WorkerId, slots: u32) -> Self {
        Self {
            id,
            slots,
            skew: Duration::zero(),
            frozen: false,
            draining: false,
            drivers: BTreeMap::new(),
            strays: BTreeSet::new(),
        }
    }
    pub(super) fn free(&self) -> u32 {
        let used: usize = self.drivers.values().map(|d| d.running.len()).sum();
        self.slots.saturating_sub(u32::try_from(used).unwrap_or(u32::MAX))
    }
}

impl Driver {
    /// As `Driver::load`: `Ok(None)` if the run is not this owner's any more.
    pub(super) fn load(store: &Memory, run: RunId, owner: WorkerId, epoch: i64) -> Result<Option<Self>, String> {
        let Some(row) = store.runs.get(&run) else { return Err(format!("no run {run}")) };
        if row.owner != Some(owner) || row.epoch != epoch || row.closed {
            return Ok(None);
        }
        let state = load_state(store, run)?;
        let first = if row.status == "pending" {
            Input::Started { inputs: row.inputs.clone(), until: None }
        } else {
            Input::TakenOver
        };
        let first = if row.inbox_n > row.inbox_seen {
            Input::Several(vec![first, Input::Messages(store.read(run, row.inbox_seen, row.inbox_n))])
        } else {
            first
        };
        Ok(Some(Self {
            run,
            workflow: row.workflow.clone(),
            epoch,
            seq: row.seq,
            cursor_seq: row.cursor_seq,
            inbox_seen: row.inbox_n,
            queue: row.queue.clone(),
            parent: row.parent,
            first_run: row.first.unwrap_or(run),
            depth: row.depth,
            state,
            first: Some(first),
            notified: false,
            running: BTreeMap::new(),
            finished: VecDeque::new(),
            overdue: Vec::new(),
            flight: None,
        }))
    }

    /// The next input that this driver would handle, in the order of `Driver::wait`.
    pub(super) fn next_input(
        &mut self,
        library: &Library,
        store: &Memory,
        now: DateTime<Utc>,
        free: u32,
    ) -> Option<Input> {
        if self.flight.is_some() {
            return None;
        }
        if let Some(first) = self.first.take() {
            return Some(first);
        }
        if let Some(ended) = self.ended() {
            return Some(ended);
        }
        if std::mem::take(&mut self.notified) {
            let up_to = store.runs.get(&self.run).map_or(0, |r| r.inbox_n);
            if up_to <= self.inbox_seen {
                return Some(Input::Tick);
            }
            let unread = store.read(self.run, self.inbox_seen, up_to);
            self.inbox_seen = up_to;
            return Some(Input::Messages(unread));
        }
        let waits_for_room = free > 0 && !self.paused() && self.phases().contains(&Phase::Queued);
        (waits_for_room || self.next_due(library) <= now).then_some(Input::Tick)
    }

    /// As `Driver::ended`: every result that is there, up to a failure.
    fn ended(&mut self) -> Option<Input> {
        let (mut inputs, mut bytes) = (Vec::new(), 0);
        while bytes < ENDED_BYTES {
            let Some((path, attempt, result)) = self.finished.pop_front() else { break };
            if self.running.get(&path).is_some_and(|(a, _)| *a == attempt) {
                self.running.remove(&path);
            }
            bytes += result.as_ref().map_or(ENDED_BYTES, size);
            inputs.push(Input::AttemptEnded { path, attempt, result });
        }
        if inputs.len() > 1 { Some(Input::Several(inputs)) } else { inputs.pop() }
    }

    /// When time alone moves the run.
    pub(super) fn next_due(&self, library: &Library) -> DateTime<Utc> {
        machine::next_due(&library.definitions[self.workflow.as_str()], &self.state)
    }

    fn paused(&self) -> bool {
        self.state.status == RunStatus::Paused
    }

    fn phases(&self) -> Vec<Phase> {
        let mut found = Vec::new();
        self.state.visit_live(&mut |_, node| {
            if let Some(Live::Activity { phase, .. }) = &node.live {
                found.push(phase.clone());
            }
        });
        found
    }

    /// Decides; what follows waits in [`Self::flight`].
    pub(super) fn decide(
        &mut self,
        library: &Library,
        store: &mut Memory,
        moment: &At,
        input: Input,
        refused: Refusals,
    ) -> Next {
        let room = if moment.draining { 0 } else { moment.free.min(WIDTH) };
        let permits = if refused.permits(2) == 1 { room.min(1) } else { room };
        let definition = &library.definitions[self.workflow.as_str()];
        let depth = u32::try_from(self.depth).unwrap_or(u32::MAX);
        let decided =
            machine::decide(definition, &mut self.state, input.clone(), &moment.of(library, permits, &refused, depth));
        let decision = match decided {
            Ok(decision) => decision,
            Err(Illegal(text)) => return Next::Broken(text),
        };
        if decision.events.is_empty() && !input.reads_inbox() {
            return self.nothing_happened(library, store, moment);
        }
        let item = self.item(library, &decision, moment);
        self.flight = Some(Flight { item, decision, input, permits, refused, answer: None });
        Next::Goes
    }

    fn nothing_happened(&mut self, library: &Library, store: &mut Memory, moment: &At) -> Next {
        let Some(due) = self.park_until(library, moment) else { return Next::Goes };
        if store.release(self.run, self.epoch, self.inbox_seen, due) {
            return Next::Ends;
        }
        let row = &store.runs[&self.run];
        if row.owner != Some(moment.worker) || row.epoch != self.epoch {
            return Next::Ends;
        }
        self.notified = true;
        Next::Goes
    }

    fn park_until(&self, library: &Library, moment: &At) -> Option<DateTime<Utc>> {
        let phases = self.phases();
        let live = phases.iter().any(|p| matches!(p, Phase::Running { .. }));
        let queued = phases.contains(&Phase::Queued) && !self.paused();
        if live || (queued && !moment.draining) {
            return None;
        }
        Some(if queued { moment.now } else { self.next_due(library) })
    }

    fn item(&self, library: &Library, decision: &Decision, moment: &At) -> Item {
        let state = &self.state;
        let closed = state.status.is_closed();
        let due = if closed || decision.more { None } else { self.park_until(library, moment) };
        let write_cursor = self.seq + 1 - self.cursor_seq >= CURSOR_EVERY;
        Item {
            run_id: self.run,
            epoch: self.epoch,
            seq: self.seq,
            status: state.status.as_str(),
            parked: due.is_some(),
            due,
            waiting: None,
            inbox_seen: self.inbox_seen,
            queue: self.queue.clone(),
            topic: None,
            cursor: write_cursor.then(|| json(state)),
            format: format_of(&decision.events),
            events: json(&decision.events),
            output: state.output.as_ref().map(json),
            failure: None,
            effects: self.effects(decision),
        }
    }

    fn effects(&self, decision: &Decision) -> Effects {
        let mut effects = effects_of(self.run, self.first_run, self.parent, &decision.events);
        effects.successor = Successor::of(&self.state);
        if effects.successor.is_some() {
            effects.parent = None;
        }
        for command in &decision.commands {
            match command {
                Command::StartChild { path, run_id, workflow, definition, inputs } => effects.children.push(Child {
                    run_id: *run_id,
                    workflow: workflow.clone(),
                    definition: *definition,
                    path: path.clone(),
                    depth: self.depth + 1,
                    queue: self.queue.clone(),
                    attributes: Value::Null,
                    inputs: inputs.clone(),
                }),
                Command::CancelChild { run_id, until } => effects.cancelled_children.push((*run_id, *until)),
                Command::TerminateChild { run_id } => effects.terminated_children.push(*run_id),
                Command::StartAttempt { .. } | Command::CancelAttempt { .. } | Command::EndChild { .. } => {}
            }
        }
        effects
    }

    /// Takes the answer that has arrived. `acted` hears of every attempt that really starts.
    pub(super) fn answered(
        &mut self,
        library: &Library,
        store: &mut Memory,
        moment: &At,
        acted: &mut dyn FnMut(AttemptId),
    ) -> Next {
        let Some(mut flight) = self.flight.take() else { return Next::Goes };
        let trusts = store.mutant == Some(Mutant::TrustsLostAnswers);
        let inbox_n = match flight.answer.take() {
            None => {
                self.flight = Some(flight);
                return Next::Goes;
            }
            Some(Answer::Lost) if !trusts => {
                // It is sent again: twice is harmless.
                self.flight = Some(flight);
                return Next::Goes;
            }
            Some(Answer::Lost) => self.inbox_seen,
            Some(Answer::Verdict(Verdict::Accepted { inbox_n })) => inbox_n,
            Some(Answer::Verdict(Verdict::Unread { .. })) => {
                flight.item.parked = false;
                flight.item.due = None;
                self.notified = true;
                self.flight = Some(flight);
                return Next::Goes;
            }
            // An earlier sending had succeeded and its answer was lost; or one of another decision, which was refused since, has
            // arrived late.
            Some(Answer::Verdict(Verdict::Stale { epoch, seq }))
                if epoch == flight.item.epoch && seq == flight.item.seq + 1 =>
            {
                if !store.is_there(&flight.item) {
                    return Next::Ends;
                }
                self.notified = true;
                self.inbox_seen
            }
            Some(Answer::Verdict(Verdict::Stale { .. })) => return Next::Ends,
            Some(Answer::Verdict(Verdict::Refused { reason, message })) => {
                // The same input again, on the state as it was, with the hook's answer known.
                let row = &store.runs[&self.run];
                if row.owner != Some(moment.worker) || row.epoch != self.epoch || row.seq != self.seq {
                    return Next::Ends;
                }
                match load_state(store, self.run) {
                    Ok(state) => self.state = state,
                    Err(text) => return Next::Broken(text),
                }
                if !flight.refused.note(&flight.decision.commands, &reason, &message) {
                    return Next::Broken(format!("a refusal without starts: {message}"));
                }
                return self.decide(library, store, moment, flight.input, flight.refused);
            }
        };
        self.seq += 1;
        if flight.item.cursor.is_some() {
            self.cursor_seq = self.seq;
        }
        self.notified |= inbox_n > self.inbox_seen;
        if store.mutant != Some(Mutant::ActsEarly) {
            self.act(&flight.decision.commands, flight.permits, acted);
        }
        if flight.item.parked || flight.item.is_closed() {
            return Next::Ends;
        }
        if flight.decision.more {
            return self.decide(library, store, moment, Input::Tick, Refusals::default());
        }
        Next::Goes
    }

    /// What [`Mutant::ActsEarly`] does before it sends anything.
    pub(super) fn act_early(&mut self, acted: &mut dyn FnMut(AttemptId)) {
        if let Some(flight) = &self.flight {
            let (commands, permits) = (flight.decision.commands.clone(), flight.permits);
            self.act(&commands, permits, acted);
        }
    }

    fn act(&mut self, commands: &[Command], permits: u32, acted: &mut dyn FnMut(AttemptId)) {
        let mut left = permits;
        for command in commands {
            match command {
                Command::StartAttempt { path, attempt, attempt_id, .. } => {
                    debug_assert!(left > 0, "an attempt needs room");
                    left = left.saturating_sub(1);
                    self.running.insert(path.clone(), (*attempt, false));
                    acted(*attempt_id);
                }
                Command::CancelAttempt { path } => {
                    if let Some((_, stopped)) = self.running.get_mut(path) {
                        *stopped = true;
                    }
                }
                Command::EndChild { run_id, spares } => self.overdue.push((*run_id, *spares)),
                Command::StartChild { .. } | Command::CancelChild { .. } | Command::TerminateChild { .. } => {}
            }
        }
    }
}

/// What the outside contributes to a worker's next instruction.
#[derive(Clone, Debug)]
pub(super) struct At {
    pub(super) worker: WorkerId,
    /// By the worker's clock.
    pub(super) now: DateTime<Utc>,
    pub(super) draw: u64,
    pub(super) free: u32,
    pub(super) draining: bool,
}

impl At {
    fn of<'a>(&self, library: &'a Library, permits: u32, refused: &'a Refusals, depth: u32) -> Moment<'a> {
        Moment {
            now: self.now,
            draw: self.draw,
            permits: Cell::new(permits),
            refused,
            catalog: &library.catalog,
            calls: &library.calls,
            current: None,
            depth,
            bounds_calls: true,
            workflow: "simulated",
        }
    }
}

fn json(value: &impl Serialize) -> Text {
    text(value).expect("what is stored can be written")
}

/// As `store::runs::load`: the cursor, and what has happened since.
fn load_state(store: &Memory, run: RunId) -> Result<RunState, String> {
    let row = store.runs.get(&run).ok_or_else(|| format!("no run {run}"))?;
    let mut state = match &row.cursor {
        Some(cursor) => serde_json::from_value(cursor.clone()).map_err(|e| format!("cursor of run {run}: {e}"))?,
        None => RunState::new(run),
    };
    let rows = store.history.get(&run).map_or(&[][..], Vec::as_slice);
    let tail: Vec<_> = rows.iter().filter(|r| r.seq > row.cursor_seq && r.seq <= row.seq).collect();
    if i64::try_from(tail.len()).ok() != Some(row.seq - row.cursor_seq) {
        return Err(format!("the history of run {run} has a gap after {}", row.cursor_seq));
    }
    for row in tail {
        let events: Vec<Event> = serde_json::from_value(row.events.clone()).map_err(|e| e.to_string())?;
        for event in &events {
            fold(&mut state, event).map_err(|e| format!("row {} of run {run}: {e}", row.seq))?;
        }
    }
    Ok(state)
}

fn effects_of(run: RunId, known: RunId, parent: Option<RunId>, events: &[Event]) -> Effects {
    let attempt = |path: &str, attempt: u32, attempt_id: AttemptId, activity: &str, at: DateTime<Utc>| AttemptRef {
        run_id: run,
        attempt_id,
        activity: activity.to_owned(),
        path: path.to_owned(),
        attempt,
        attributes: Arc::new(Value::Null),
        budget: Arc::new(Value::Null),
        deadline: at,
    };
    let mut effects = Effects::default();
    for event in events {
        match event {
            Event::AttemptStarted { path, attempt: n, attempt_id, activity, deadline, .. } => {
                let attempt = attempt(path, *n, *attempt_id, activity, *deadline);
                effects.started.push(AttemptStart { attempt, reserve: Value::Null });
            }
            Event::AttemptEnded { path, attempt: n, attempt_id, activity, outcome, at, .. } => {
                let attempt = attempt(path, *n, *attempt_id, activity, *at);
                effects.ended.push(AttemptEnd { attempt, outcome: *outcome, failure: None, again: false });
            }
            Event::RunClosed { status, output, failure, .. } => {
                effects.parent =
                    parent.map(|p| (p, child_result(known, status.as_str(), output.clone(), failure.clone())));
            }
            _ => {}
        }
    }
    effects
}

/// As `worker::terminate` after it has seized the run: the transition that ends it. `None` if it is closed.
pub(super) fn termination(library: &Library, store: &Memory, run: RunId, at: &At) -> Option<Item> {
    let row = store.runs.get(&run).filter(|r| !r.closed)?;
    let mut state = load_state(store, run).ok()?;
    let definition = &library.definitions[row.workflow.as_str()];
    let input = Input::Terminated { reason: "an operator".into() };
    let decision = machine::decide(definition, &mut state, input, &at.of(library, 0, &Refusals::default(), 0)).ok()?;
    let mut effects = effects_of(run, row.first.unwrap_or(run), row.parent, &decision.events);
    for command in &decision.commands {
        match command {
            Command::CancelChild { run_id, until } => effects.cancelled_children.push((*run_id, *until)),
            Command::TerminateChild { run_id } => effects.terminated_children.push(*run_id),
            Command::StartAttempt { .. }
            | Command::CancelAttempt { .. }
            | Command::StartChild { .. }
            | Command::EndChild { .. } => {}
        }
    }
    Some(Item {
        run_id: run,
        epoch: row.epoch,
        seq: row.seq,
        status: state.status.as_str(),
        parked: false,
        due: None,
        waiting: None,
        inbox_seen: row.inbox_seen,
        queue: row.queue.clone(),
        topic: None,
        cursor: Some(json(&state)),
        format: format_of(&decision.events),
        events: json(&decision.events),
        output: None,
        failure: None,
        effects,
    })
}

/// As `client::migrate`: under what a run may go on, the events of the transition, and the state after it. `None` if it cannot now.
pub(super) fn migration(
    library: &Library,
    store: &Memory,
    run: RunId,
    at: &At,
) -> Result<Option<(&'static str, Text, Text)>, String> {
    let Some(row) = store.runs.get(&run).filter(|r| !r.closed && r.status != "quarantined") else { return Ok(None) };
    let Some(to) = scenario::other_version(&row.workflow) else { return Ok(None) };
    let mut state = load_state(store, run)?;
    let (old, new) = (&library.definitions[row.workflow.as_str()], &library.definitions[to]);
    let unread = store.read(run, row.inbox_seen, row.inbox_n);
    let hash = |name: &str| DefinitionHash([u8::try_from(name.len()).unwrap_or(0); 32]);
    let asked = machine::Migrate {
        from: hash(&row.workflow),
        to: hash(to),
        map: BTreeMap::new(),
        inputs: if row.status == "pending" { row.inputs.clone() } else { state.inputs.clone() },
        reason: "a new version".into(),
        by: None,
    };
    let depth = u32::try_from(row.depth).unwrap_or(u32::MAX);
    let decided = machine::migrate(old, new, &state, &unread, asked, &at.of(library, 0, &Refusals::default(), depth));
    let Some(event) = decided.event.filter(|_| decided.running.is_empty()) else { return Ok(None) };
    fold(&mut state, &event).map_err(|e| e.to_string())?;
    Ok(Some((to, json(&[event]), json(&state))))
}
