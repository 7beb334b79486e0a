//! The world of one seed: the store, the workers, the clients and everything that goes wrong between them.

#[cfg(test)]
pub(super) mod tests;
mod watch;

use super::{
    Check, Finding, Happened, scenario,
    worker::{Answer, At, Driver, Library, Next, Worker, migration, termination},
};
use crate::{
    admission::{OnConflict, Place},
    failure::{Failure, FailureKind},
    ids::{AttemptId, RunId, WorkerId},
    machine::Refusals,
    store::{
        groups::Arrival,
        inbox::{Kind, Sent, cancel_text},
        memory::{Memory, Mutant, Post},
        transitions::{Item, Verdict},
        turns::Turns,
    },
};
use chrono::{Duration, TimeZone, Utc};
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};
use uuid::Uuid;
use watch::Seen;

/// Random actions of the chaotic phase.
const ACTIONS: u32 = 1_200;
/// Turns within which everything must end once nothing goes wrong any more.
const TURNS: u32 = 3_000;
const WORKERS_MAX: usize = 4;
const RUNS_MAX: u32 = 6;
/// Children that are set aside when nothing else goes wrong any more.
const BREAKS: u32 = 2;
/// The group of most runs.
const GROUP: &str = "group";
const GROUP_LIMIT: usize = 2;
/// Length of a lease, in seconds.
const LEASE: i64 = 15;

pub(super) struct World {
    random: fastrand::Rng,
    library: Library,
    store: Memory,
    workers: Vec<Worker>,
    /// Statements whose sender has given up and that Postgres may still execute.
    air: Vec<Vec<Item>>,
    /// Transitions of operators who are between seizing a run and ending it.
    terminations: Vec<Item>,
    posts: Vec<Post>,
    /// Children that were set aside, as if something of them had broken.
    set_aside: BTreeSet<RunId>,
    /// Runs of [`GROUP`].
    grouped: BTreeSet<RunId>,
    /// Attempts that really started, in order.
    acted: Vec<AttemptId>,
    /// The hook refuses starts.
    refusing: bool,
    /// Nothing goes wrong any more.
    calm: bool,
    complaints: Vec<Finding>,
    /// How each run stood when it was looked at last.
    seen: BTreeMap<RunId, Seen>,
    pub(super) happened: Happened,
}

impl World {
    pub(super) fn new(seed: u64, mutant: Option<Mutant>) -> Self {
        let now = Utc.with_ymd_and_hms(2026, 11, 25, 12, 0, 0).single().unwrap_or_default();
        let mut store = Memory::new(now);
        store.mutant = mutant;
        Self {
            random: fastrand::Rng::with_seed(seed),
            library: Library::new(),
            store,
            workers: Vec::new(),
            air: Vec::new(),
            terminations: Vec::new(),
            posts: Vec::new(),
            set_aside: BTreeSet::new(),
            grouped: BTreeSet::new(),
            acted: Vec::new(),
            refusing: false,
            calm: false,
            complaints: Vec::new(),
            seen: BTreeMap::new(),
            happened: Happened::default(),
        }
    }

    fn uuid(&mut self) -> Uuid {
        Uuid::from_u128(self.random.u128(..))
    }

    /// Anything, in any order.
    pub(super) fn chaos(&mut self) {
        for _ in 0..2 {
            self.start_run();
            self.start_worker();
        }
        for _ in 0..ACTIONS {
            match self.random.u8(0..100) {
                0..=9 => self.some_worker(Self::poll),
                10..=36 => self.some_worker(Self::decide_some),
                37..=56 => self.some_worker(Self::send_some),
                57..=74 => self.some_worker(Self::answer_some),
                75..=84 => self.some_worker(Self::finish_some),
                85..=87 => self.sweep(),
                88..=90 => self.time(),
                91 => self.start_run(),
                92 | 93 => self.post_something(),
                94 if self.random.u8(0..4) == 0 => self.migrate_something(),
                94 => self.operator(),
                95 => self.harm_some(),
                96 => self.freeze_or_thaw(),
                97 if self.workers.len() < WORKERS_MAX => self.start_worker(),
                97 => self.late_statement(),
                98 => self.refusing = !self.refusing && self.random.bool(),
                _ => self.some_worker(Self::look_for_strays),
            }
            self.watch();
        }
    }

    /// Nothing goes wrong any more: every run must come to its end. What stays open is a finding.
    pub(super) fn calm(&mut self) -> Vec<Finding> {
        (self.refusing, self.calm) = (false, true);
        while !self.air.is_empty() {
            self.late_statement();
        }
        self.terminations.clear();
        for worker in &mut self.workers {
            (worker.frozen, worker.draining, worker.skew) = (false, false, Duration::zero());
        }
        let open: Vec<RunId> = self.store.runs.iter().filter(|(_, r)| !r.closed).map(|(id, _)| *id).collect();
        for run in open {
            self.store.post(&Post::new(run, Kind::Unblock, "", json!(null)));
            self.store.post(&Post::new(run, Kind::Resume, "", json!(null)));
        }
        self.set_aside.clone().into_iter().for_each(|child| self.stop_parent(child));
        let mut breaks = BREAKS;
        for _ in 0..TURNS {
            // Most children begin now. That one breaks is nobody's fault.
            if breaks > 0
                && self.random.u8(0..8) == 0
                && let Some(child) = self.break_a_child()
            {
                breaks -= 1;
                self.stop_parent(child);
            }
            self.end_what_is_left_aside();
            if self.store.runs.values().all(|r| r.closed || r.status == "quarantined") {
                return self.quarantined();
            }
            if !self.turn() {
                // A run that only waits for others to stop is due in ten years.
                self.pass_time(Duration::hours(2));
            }
            if !self.complaints.is_empty() {
                return self.complaints();
            }
        }
        let open = self.store.runs.iter().filter(|(_, r)| !r.closed);
        open.map(|(id, row)| {
            Check::Ends.finds(format!("run {id} never ends: {row:?}, due {:?}", self.store.ready.get(id)))
        })
        .collect()
    }

    /// Everybody does all they can. False if nothing moved.
    fn turn(&mut self) -> bool {
        if self.workers.is_empty() {
            self.start_worker();
        }
        let before =
            (self.store.history.values().map(Vec::len).sum::<usize>(), self.store.ready.len(), self.acted.len());
        for at in (0..self.workers.len()).rev() {
            self.heartbeat(at);
        }
        self.look_after_groups();
        self.store.bury();
        while !self.store.take_over(100).is_empty() {}
        for at in (0..self.workers.len()).rev() {
            self.look_for_strays(at);
        }
        for at in (0..self.workers.len()).rev() {
            let owned = self.workers.len();
            self.poll(at);
            if self.workers.len() < owned {
                continue;
            }
            for run in self.workers[at].drivers.keys().copied().collect::<Vec<_>>() {
                self.decide(at, run);
                self.send(at, &[run], Fault::None);
                self.answer(at, run);
                if let Some(driver) = self.workers[at].drivers.get_mut(&run) {
                    let done: Vec<(String, u32)> = driver.running.iter().map(|(p, (n, _))| (p.clone(), *n)).collect();
                    let queued: BTreeSet<String> = driver.finished.iter().map(|(p, ..)| p.clone()).collect();
                    let fresh = done.into_iter().filter(|(p, _)| !queued.contains(p));
                    driver.finished.extend(fresh.map(|(p, n)| (p, n, Ok(json!(1)))));
                }
            }
        }
        let after =
            (self.store.history.values().map(Vec::len).sum::<usize>(), self.store.ready.len(), self.acted.len());
        before != after
            || self.workers.iter().any(|w| w.drivers.values().any(|d| d.flight.is_some() || !d.finished.is_empty()))
    }

    /// To the next instant at which something is due, unless it is further away than that.
    fn pass_time(&mut self, most: Duration) {
        let queued = self.store.ready.values().copied();
        let driven = self.workers.iter().flat_map(|w| w.drivers.values()).map(|d| d.next_due(&self.library));
        let soon = self.store.now + most;
        let next = queued.chain(driven).filter(|at| *at > self.store.now && *at < soon).min();
        let second = self.store.now + Duration::seconds(1);
        self.store.now = next.unwrap_or(second).max(second);
    }

    fn quarantined(&self) -> Vec<Finding> {
        let set_aside = self.store.runs.iter().filter(|(_, r)| r.status == "quarantined");
        set_aside.map(|(id, _)| Check::Quarantined.finds(format!("run {id} is quarantined"))).collect()
    }

    /// What was wrong at some instant, whatever came of it.
    pub(super) fn complaints(&mut self) -> Vec<Finding> {
        std::mem::take(&mut self.complaints)
    }

    fn some_worker(&mut self, act: fn(&mut Self, usize)) {
        let awake: Vec<usize> = (0..self.workers.len()).filter(|at| !self.workers[*at].frozen).collect();
        if let Some(at) = self.random.choice(&awake) {
            act(self, *at);
        }
    }

    fn some_run(&mut self, at: usize, wanted: impl Fn(&Driver) -> bool) -> Option<RunId> {
        let runs: Vec<RunId> = self.workers[at].drivers.iter().filter(|(_, d)| wanted(d)).map(|(id, _)| *id).collect();
        self.random.choice(&runs).copied()
    }

    fn at(&mut self, at: usize) -> At {
        let worker = &self.workers[at];
        At {
            worker: worker.id,
            now: self.store.now + worker.skew,
            draw: self.random.u64(..),
            free: worker.free(),
            draining: worker.draining,
        }
    }

    fn start_worker(&mut self) {
        let id = WorkerId(self.uuid());
        self.store.register(id, Duration::seconds(LEASE));
        let slots = self.random.u32(1..5);
        self.workers.push(Worker::new(id, slots));
    }

    fn start_run(&mut self) {
        if self.happened.runs < RUNS_MAX {
            self.happened.runs += 1;
            let run = RunId(self.uuid());
            let turn = (self.random.i16(1..6), self.random.i32(0..3));
            if self.random.u8(0..3) == 0 {
                self.store.start(run, scenario::PARENT, "default", turn, json!({}));
            } else {
                let limit = u32::try_from(GROUP_LIMIT).unwrap_or(1);
                let group = Place { group: GROUP.into(), limit, on_conflict: OnConflict::Queue };
                let arrival = self.store.start_in_group(run, scenario::PARENT, turn, json!({}), &group);
                self.happened.held_back += u32::from(arrival == Some(Arrival::Waits));
                self.grouped.insert(run);
            }
        }
    }

    /// As `worker::poll_once`.
    fn poll(&mut self, at: usize) {
        let (id, draining) = (self.workers[at].id, self.workers[at].draining);
        for run in self.store.unread(id) {
            if let Some(driver) = self.workers[at].drivers.get_mut(&run) {
                driver.notified = true;
            }
        }
        if draining {
            if self.workers[at].drivers.is_empty() {
                self.store.leave(id);
                while !self.store.take_over(2).is_empty() {}
                self.workers.remove(at);
            }
            return;
        }
        let room = self.workers[at].free() as usize + 1;
        let messaged = !self.calm && self.random.u8(0..8) == 0;
        let claimed = if messaged {
            self.store.claim_messaged(id, &["default"], room)
        } else {
            self.store.claim(id, &["default"], &self.turns(at), room)
        };
        let Some(claimed) = claimed else {
            self.workers.remove(at);
            return;
        };
        // An answer that is lost leaves runs that have an owner and no driver.
        if !self.calm && self.random.u8(0..40) == 0 {
            self.happened.lost_answers += 1;
            return;
        }
        for (run, epoch) in claimed {
            match Driver::load(&self.store, run, id, epoch) {
                Ok(Some(driver)) => drop(self.workers[at].drivers.insert(run, driver)),
                Ok(None) => {}
                Err(text) => self.set_aside(run, epoch, &text),
            }
        }
    }

    /// Whose runs this worker has.
    fn turns(&self, at: usize) -> Turns {
        let mut turns = Turns::default();
        for run in self.workers[at].drivers.keys() {
            turns.took(self.store.runs.get(run).map_or(0, |r| r.lane));
        }
        turns
    }

    fn set_aside(&mut self, run: RunId, epoch: i64, why: &str) {
        self.complaints.push(Check::Quarantined.finds(format!("run {run} is quarantined: {why}")));
        self.store.quarantine(run, epoch);
    }

    /// A child is set aside, as if its history were broken: it hears nothing any more.
    fn break_a_child(&mut self) -> Option<RunId> {
        let open = self.store.runs.iter().filter(|(_, row)| !row.closed && row.parent.is_some() && row.admitted);
        let open: Vec<(RunId, i64)> = open.map(|(run, row)| (*run, row.epoch)).collect();
        let (run, epoch) = self.random.choice(&open).copied()?;
        self.store.quarantine(run, epoch);
        self.set_aside.insert(run);
        Some(run)
    }

    /// Nobody mends what was set aside: whoever waits for it is told to stop.
    fn stop_parent(&mut self, child: RunId) {
        if let Some(parent) = self.store.runs.get(&child).and_then(|row| row.parent) {
            self.store.post(&Post::new(parent, Kind::Cancel, "", json!("its child is broken")));
        }
    }

    /// What was set aside and nobody waits for any more, an operator ends.
    fn end_what_is_left_aside(&mut self) {
        for run in self.set_aside.clone() {
            let closed = |store: &Memory, run: RunId| store.runs.get(&run).is_none_or(|row| row.closed);
            let parent = self.store.runs.get(&run).and_then(|row| row.parent);
            if !closed(&self.store, run) && parent.is_none_or(|parent| closed(&self.store, parent)) {
                self.end_at_once(run);
            }
        }
    }

    /// As `worker::terminate`.
    fn end_at_once(&mut self, run: RunId) {
        let at = At { worker: WorkerId(Uuid::nil()), now: self.store.now, draw: 0, free: 0, draining: false };
        if self.store.seize(run).is_some()
            && let Some(item) = termination(&self.library, &self.store, run, &at)
        {
            self.execute(&[item]);
        }
    }

    /// As `worker::overdue`; the worker may die before it comes to it.
    fn end_overdue(&mut self, child: RunId, spares: bool) {
        let dies = !self.calm && self.random.u8(0..4) == 0;
        if let Some((run, hears)) = self.store.overdue(child)
            && !(spares && hears)
            && !dies
        {
            self.happened.ended_children += 1;
            self.end_at_once(run);
        }
    }

    fn look_for_strays(&mut self, at: usize) {
        let worker = &self.workers[at];
        let driven: BTreeSet<RunId> = worker.drivers.keys().copied().collect();
        let found: BTreeSet<(RunId, i64)> = self.store.strays(worker.id, &driven).into_iter().collect();
        let (id, again) = (worker.id, found.intersection(&worker.strays).copied().collect::<Vec<_>>());
        for (run, epoch) in again {
            self.store.give_back(run, id, epoch);
        }
        self.workers[at].strays = found;
    }

    fn decide_some(&mut self, at: usize) {
        let mut runs: Vec<RunId> = self.workers[at].drivers.keys().copied().collect();
        self.random.shuffle(&mut runs);
        for run in runs {
            let idle = self.workers[at].drivers.get(&run).is_some_and(|d| d.flight.is_none());
            if idle && self.decide(at, run) {
                return;
            }
        }
    }

    /// Lets a driver handle its next input. False if there is none.
    fn decide(&mut self, at: usize, run: RunId) -> bool {
        let moment = self.at(at);
        let free = if moment.draining { 0 } else { moment.free };
        let Some(driver) = self.workers[at].drivers.get_mut(&run) else { return false };
        let Some(input) = driver.next_input(&self.library, &self.store, moment.now, free) else { return false };
        let next = driver.decide(&self.library, &mut self.store, &moment, input, Refusals::default());
        if self.store.mutant == Some(Mutant::ActsEarly) {
            driver.act_early(&mut |id| self.acted.push(id));
        }
        self.follow(at, run, next);
        true
    }

    fn follow(&mut self, at: usize, run: RunId, next: Next) {
        match next {
            Next::Goes => {}
            Next::Ends => drop(self.workers[at].drivers.remove(&run)),
            Next::Broken(text) => {
                if let Some(driver) = self.workers[at].drivers.remove(&run) {
                    self.set_aside(run, driver.epoch, &text);
                }
            }
        }
    }

    fn send_some(&mut self, at: usize) {
        let unsent: Vec<RunId> = self.workers[at]
            .drivers
            .iter()
            .filter(|(_, d)| d.flight.as_ref().is_some_and(|f| f.answer.is_none()))
            .map(|(id, _)| *id)
            .collect();
        let most = self.random.usize(1..4);
        let fault = match self.random.u8(0..10) {
            0 => Fault::LostBefore,
            1 => Fault::LostAfter,
            2 => Fault::Doubled,
            3 => Fault::Late,
            _ => Fault::None,
        };
        self.send(at, &unsent[..unsent.len().min(most)], fault);
    }

    /// As the committer: a batch, perhaps twice, and again without what the hook refuses.
    fn send(&mut self, at: usize, runs: &[RunId], fault: Fault) {
        let items: Vec<(RunId, Item)> = runs
            .iter()
            .filter_map(|run| {
                let flight = self.workers[at].drivers.get(run)?.flight.as_ref()?;
                flight.answer.is_none().then(|| (*run, flight.item.clone()))
            })
            .collect();
        if items.is_empty() {
            return;
        }
        let batch: Vec<Item> = items.iter().map(|(_, item)| item.clone()).collect();
        let mut answers: Vec<Answer> = match fault {
            Fault::LostBefore | Fault::Late => vec![Answer::Lost; batch.len()],
            Fault::None | Fault::LostAfter | Fault::Doubled => {
                self.execute(&batch).into_iter().map(Answer::Verdict).collect()
            }
        };
        match fault {
            Fault::None => {}
            Fault::LostBefore => self.happened.lost_answers += 1,
            Fault::LostAfter => {
                self.happened.lost_answers += 1;
                answers.fill(Answer::Lost);
            }
            Fault::Doubled => {
                self.happened.doubled += 1;
                answers = self.execute(&batch).into_iter().map(Answer::Verdict).collect();
            }
            Fault::Late => self.air.push(batch),
        }
        for ((run, _), answer) in items.into_iter().zip(answers) {
            if let Some(flight) = self.workers[at].drivers.get_mut(&run).and_then(|d| d.flight.as_mut()) {
                flight.answer = Some(answer);
            }
        }
    }

    /// As `committer::commit_batch`.
    fn execute(&mut self, batch: &[Item]) -> Vec<Verdict> {
        let mut verdicts: Vec<Option<Verdict>> = vec![None; batch.len()];
        loop {
            let rest: Vec<usize> = (0..batch.len()).filter(|i| verdicts[*i].is_none()).collect();
            let items: Vec<Item> = rest.iter().map(|i| batch[*i].clone()).collect();
            let refusing = self.refusing;
            match self.store.commit_with_effects(&items, &|_| refusing) {
                Ok(found) => {
                    rest.into_iter().zip(found).for_each(|(i, verdict)| verdicts[i] = Some(verdict));
                    let all: Vec<Verdict> = verdicts.into_iter().flatten().collect();
                    let stale = all.iter().filter(|v| matches!(v, Verdict::Stale { .. })).count();
                    self.happened.refused_commits += u32::try_from(stale).unwrap_or(0);
                    return all;
                }
                Err(refused) => {
                    self.happened.refused_starts += 1;
                    for i in refused {
                        let refusal = Verdict::Refused { reason: "quota".into(), message: "none left".into() };
                        verdicts[rest[i]] = Some(refusal);
                    }
                }
            }
        }
    }

    /// A statement whose sender has long given up is executed after all.
    fn late_statement(&mut self) {
        if !self.air.is_empty() {
            let at = self.random.usize(0..self.air.len());
            let batch = self.air.swap_remove(at);
            self.happened.late += 1;
            // A refusal by the hook rolls it back; nobody sends it again.
            let refusing = self.refusing;
            let _ = self.store.commit_with_effects(&batch, &|_| refusing);
        }
    }

    fn answer_some(&mut self, at: usize) {
        if let Some(run) = self.some_run(at, |d| d.flight.as_ref().is_some_and(|f| f.answer.is_some())) {
            self.answer(at, run);
        }
    }

    fn answer(&mut self, at: usize, run: RunId) {
        let moment = self.at(at);
        let Some(driver) = self.workers[at].drivers.get_mut(&run) else { return };
        let next = driver.answered(&self.library, &mut self.store, &moment, &mut |id| self.acted.push(id));
        let overdue = std::mem::take(&mut driver.overdue);
        self.follow(at, run, next);
        overdue.into_iter().for_each(|(child, spares)| self.end_overdue(child, spares));
    }

    fn finish_some(&mut self, at: usize) {
        let Some(run) = self.some_run(at, |d| !d.running.is_empty()) else { return };
        let luck = self.random.u8(0..12);
        let Some(driver) = self.workers[at].drivers.get_mut(&run) else { return };
        let idle = driver.running.iter().filter(|(path, _)| !driver.finished.iter().any(|(p, ..)| p == *path));
        let idle: Vec<(String, u32, bool)> = idle.map(|(p, (n, stopped))| (p.clone(), *n, *stopped)).collect();
        let Some((path, attempt, stopped)) = self.random.choice(&idle).cloned() else { return };
        self.happened.attempts += 1;
        let result = match luck {
            // One that was asked to stop may have finished before it heard of it.
            _ if stopped && luck > 3 => Err(Failure::cancelled()),
            0..=7 => Ok(json!({ "n": attempt })),
            8 => Err(Failure::retryable("transient.store", "x")),
            9 => Err(Failure::permanent("user.bad", "x")),
            10 => Err(Failure::new(FailureKind::TimedOut, "timeout.run", "x")),
            _ => Err(Failure::blocked("quota", "none")),
        };
        driver.finished.push_back((path, attempt, result));
    }

    fn heartbeat(&mut self, at: usize) {
        self.workers[at].skew = Duration::zero();
        if !self.store.heartbeat(self.workers[at].id) {
            self.workers.remove(at);
        }
    }

    /// As `worker::admit`.
    fn look_after_groups(&mut self) {
        for run in self.store.cancelled_before() {
            self.store.seize(run);
            let at = At { worker: WorkerId(Uuid::nil()), now: self.store.now, draw: 0, free: 0, draining: false };
            if let Some(item) = termination(&self.library, &self.store, run, &at) {
                self.execute(&[item]);
            }
        }
        self.store.let_in(GROUP);
    }

    /// Two statements; anything may happen between them.
    fn sweep(&mut self) {
        if self.random.u8(0..3) == 0 {
            self.look_after_groups();
        } else if self.random.bool() {
            self.store.bury();
        } else if !self.store.take_over(self.random.usize(1..4)).is_empty() {
            self.happened.takeovers += 1;
        }
    }

    fn time(&mut self) {
        let mut silent = 12;
        match self.random.u8(0..20) {
            0 | 1 => {
                // All leases may be over before anybody is asked to renew one.
                silent = 2;
                // The database's clock is set; a second back at most, as `ntpd` would.
                self.happened.clock_jumps += 1;
                self.store.now += Duration::seconds(self.random.i64(-1..600));
            }
            2 => {
                self.happened.clock_jumps += 1;
                let skew = Duration::seconds(self.random.i64(-3_600..3_600));
                if let Some(worker) = self.random.choice(&mut self.workers) {
                    worker.skew = skew;
                }
            }
            3 => self.store.now += Duration::seconds(self.random.i64(0..2 * LEASE)),
            4..=9 => self.pass_time(Duration::seconds(40)),
            _ => self.store.now += Duration::milliseconds(self.random.i64(0..4_000)),
        }
        // A lease is renewed by a thread that has nothing else to do; now and then that fails.
        for at in (0..self.workers.len()).rev() {
            if !self.workers[at].frozen && self.random.u8(0..silent) != 0 {
                self.heartbeat(at);
            }
        }
    }

    fn post_something(&mut self) {
        // One that is open, mostly: a closed one hears nothing.
        let open = self.random.u8(0..8) != 0;
        let runs: Vec<RunId> =
            self.store.runs.iter().filter(|(_, row)| !open || !row.closed).map(|(run, _)| *run).collect();
        let paused: Vec<RunId> =
            self.store.runs.iter().filter(|(_, row)| row.status == "paused").map(|(run, _)| *run).collect();
        let Some(run) = self.random.choice(&runs).copied() else { return };
        let mut post = match self.random.u8(0..20) {
            0..=3 => Post::new(run, Kind::Signal, "answer", json!({"text": "x"})),
            4..=7 => {
                let decision = ["approved", "rejected", "changes_requested"][self.random.usize(0..3)];
                Post::new(run, Kind::Signal, "ok", json!({ "decision": decision }))
            }
            8 => Post::new(run, Kind::Unblock, "", json!(null)),
            9 | 10 => Post::new(run, Kind::Pause, "", json!(null)),
            // Whoever pauses a run lets it go on as well; sometimes one that is not paused.
            11..=13 => {
                let run = self.random.choice(&paused).copied().unwrap_or(run);
                Post::new(run, Kind::Resume, "", json!(null))
            }
            14..=16 => Post::new(run, Kind::Update, "answer", json!({"text": "x"})),
            // No step takes it: an approval is no await.
            17 => Post::new(run, Kind::Update, "ok", json!({"decision": "approved"})),
            18 => Post::new(run, Kind::Cancel, "", json!("enough")),
            _ => {
                let until = self.store.now + Duration::seconds(self.random.i64(1..600));
                Post::new(run, Kind::Cancel, "", cancel_text("enough", Some(until)))
            }
        };
        if post.kind == Kind::Signal {
            self.happened.signals += 1;
            post.dedupe_id = Some(self.uuid().to_string());
        }
        if post.kind == Kind::Update {
            post.dedupe_id = Some(crate::store::inbox::update_key(&self.uuid().to_string()));
        }
        if self.store.post(&post) == Sent::Stored && post.dedupe_id.is_some() {
            self.posts.push(post.clone());
        }
        // A sender that heard nothing sends again, now or later.
        if self.random.bool()
            && let Some(earlier) = self.random.choice(&self.posts).cloned()
        {
            self.happened.duplicates += u32::from(self.store.post(&earlier) == Sent::Duplicate);
        }
    }

    /// As `Client::migrate`: a run goes on under another definition, whoever drives it.
    fn migrate_something(&mut self) {
        let runs: Vec<RunId> = self.store.runs.iter().filter(|(_, row)| !row.closed).map(|(run, _)| *run).collect();
        let Some(run) = self.random.choice(&runs).copied() else { return };
        let at = At { worker: WorkerId(Uuid::nil()), now: self.store.now, draw: 0, free: 0, draining: false };
        match migration(&self.library, &self.store, run, &at) {
            Ok(Some((to, events, state))) => {
                let stands = self.store.runs.get(&run).map_or((0, 0), |row| (row.epoch, row.seq));
                self.store.migrate(run, stands, to, events, state);
            }
            Ok(None) => {}
            Err(text) => self.complaints.push(Check::Quarantined.finds(format!("migration of run {run}: {text}"))),
        }
    }

    /// Ends a run at once, or dies between taking and ending it.
    fn operator(&mut self) {
        if let Some(item) = self.terminations.pop() {
            self.execute(&[item]);
            return;
        }
        let runs: Vec<RunId> = self.store.runs.keys().copied().collect();
        let Some(run) = self.random.choice(&runs).copied() else { return };
        let luck = self.random.u8(0..6);
        if luck == 1 || luck == 2 {
            self.break_a_child();
            return;
        }
        if luck != 0 || self.store.seize(run).is_none() {
            return;
        }
        let at = At { worker: WorkerId(Uuid::nil()), now: self.store.now, draw: 0, free: 0, draining: false };
        if let Some(item) = termination(&self.library, &self.store, run, &at)
            && self.random.u8(0..4) != 0
        {
            self.terminations.push(item);
        }
    }

    /// Kills a worker, or asks it to leave.
    fn harm_some(&mut self) {
        if self.workers.is_empty() || self.random.bool() {
            return;
        }
        let at = self.random.usize(0..self.workers.len());
        if self.random.u8(0..3) == 0 {
            self.workers[at].draining = true;
            for (_, stopped) in self.workers[at].drivers.values_mut().flat_map(|d| d.running.values_mut()) {
                *stopped = true;
            }
            return;
        }
        self.happened.kills += 1;
        self.workers.swap_remove(at);
    }

    fn freeze_or_thaw(&mut self) {
        let freezes = self.random.u8(0..3) == 0;
        if let Some(worker) = self.random.choice(&mut self.workers) {
            worker.frozen = !worker.frozen && freezes;
            self.happened.freezes += u32::from(worker.frozen);
        }
    }
}

/// What happens to a batch on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    None,
    /// It never arrived.
    LostBefore,
    /// It was committed, and its answer is lost.
    LostAfter,
    /// It was executed twice; the second answer arrives.
    Doubled,
    /// Its sender hears nothing, and it is executed much later.
    Late,
}
