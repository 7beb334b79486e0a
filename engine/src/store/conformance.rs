//! One suite for the store on Postgres and the store in memory: the same random calls on both, and after every call the same
//! answer and the same rows. Where they differ, one of them breaks a promise that the other keeps.
//!
//! Time stands still but for whole minutes: what is due at a half one is due on both or on neither, however long a call takes.

mod checkpoints;
mod effects;

use super::{
    chain::Successor,
    definitions,
    groups::{self, Arrival},
    inbox,
    inbox::{Kind, Outgoing},
    memory::{Memory, Post},
    migrations, ready, runs,
    spread::Spread,
    transitions,
    transitions::{Effects, Item, text},
    turns::Turns,
    workers,
};
use crate::{
    MIGRATIONS,
    admission::{Admission, IdConflict, IdReuse, OnConflict, Place, Priority},
    client::{Client, Deploy, Start},
    definition::{Bundle, Definition, FORMAT},
    embedded::testing::database,
    event::Event,
    hook::NoHook,
    ids::{DefinitionHash, RunId, WorkerId},
    transaction::{Session, begin},
};
use chrono::{DateTime, Duration, Utc};
use serde_json::{Value, json};
use sqlx::PgPool;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};
use uuid::Uuid;

const SEEDS: u64 = 14;
const CALLS: usize = 150;
const RUNS: usize = 4;
const WORKERS: usize = 3;
/// A lease: over after two minutes, not after one.
const LEASE_MS: i32 = 90_000;
const MANY: usize = 100;
const GROUP: &str = "group";
/// What transitions do besides, and that the hook has refused some.
const EFFECTS: &[&str] = &["starts-child", "cancels-child", "terminates-child", "tells-parent", "hooks", "Refused"];

/// A checkpoint is the first under its key, another came before it, or nothing is kept of it.
const SAVES: &[&str] = &["saves ", "saved-before", "saves-not"];

/// A run's row, as far as both stores must agree: id, status, parked, owner, epoch, seq, inbox_n, inbox_seen, cursor_seq,
/// closed, whether it is due (`None`: not in the queue), the epochs of its history.
type Seen = (Uuid, String, bool, Option<Uuid>, i64, i64, i64, i64, i64, bool, Option<bool>, Vec<i64>);

struct Pair {
    pool: PgPool,
    client: Client,
    /// Of the poll.
    session: Session,
    spread: Spread,
    hash: DefinitionHash,
    memory: Memory,
    /// Instant 0 of Postgres and of the memory.
    base: (DateTime<Utc>, DateTime<Utc>),
    minute: i64,
    runs: Vec<RunId>,
    workers: Vec<WorkerId>,
    random: fastrand::Rng,
}

impl Pair {
    async fn new(seed: u64, spread: Spread) -> Self {
        let pool = database(MIGRATIONS).await;
        sqlx::raw_sql(
            "create table test_clock (minutes int not null); insert into test_clock values (0);
             create or replace function engine_now() returns timestamptz language sql stable
               as $$ select clock_timestamp() + minutes * interval '1 minute' from test_clock $$",
        )
        .execute(&pool)
        .await
        .expect("clock");
        sqlx::raw_sql(effects::TABLE).execute(&pool).await.expect("table");
        let definition = Definition {
            format: FORMAT,
            name: "conformance".into(),
            inputs: BTreeMap::new(),
            env: BTreeMap::new(),
            timeout_ms: 1_000,
            budget: Value::Null,
            concurrency: None,
            executions_max: 1,
            steps: Vec::new(),
            finally: Vec::new(),
            outputs: BTreeMap::new(),
            runs_on: Vec::new(),
            queries: BTreeMap::new(),
            extras: Value::Null,
        };
        let deploy = Deploy { definition, bundle: Bundle::new(), source: String::new(), author: None, message: None };
        let hash = {
            let mut tx = begin(&pool).await.expect("begin");
            let hash = definitions::deploy(&mut tx, &deploy).await.expect("deploy").hash;
            tx.commit().await.expect("commit");
            hash
        };
        let base: DateTime<Utc> = sqlx::query_scalar("select engine_now()").fetch_one(&pool).await.expect("now");
        let mut random = fastrand::Rng::with_seed(seed);
        let mut id = || Uuid::from_u128(random.u128(..));
        let runs = (0..RUNS).map(|_| RunId(id())).collect();
        let workers = (0..WORKERS).map(|_| WorkerId(id())).collect();
        Self {
            client: Client::new(pool.clone(), Arc::new(NoHook)),
            session: Session::like(&pool),
            spread,
            pool,
            hash,
            memory: Memory::new(DateTime::UNIX_EPOCH),
            base: (base, DateTime::UNIX_EPOCH),
            minute: 0,
            runs,
            workers,
            random,
        }
    }

    async fn pass(&mut self, minutes: i64) {
        self.minute += minutes;
        self.memory.now += Duration::minutes(minutes);
        sqlx::query("update test_clock set minutes = $1")
            .bind(i32::try_from(self.minute).expect("small"))
            .execute(&self.pool)
            .await
            .expect("clock");
    }

    /// So many minutes and a half from now, by both clocks.
    fn later(&self, minutes: i64) -> (DateTime<Utc>, DateTime<Utc>) {
        let length = Duration::minutes(self.minute + minutes) + Duration::seconds(30);
        (self.base.0 + length, self.base.1 + length)
    }

    fn run(&mut self) -> RunId {
        self.runs[self.random.usize(0..self.runs.len())]
    }
    fn worker(&mut self) -> WorkerId {
        self.workers[self.random.usize(0..WORKERS)]
    }
    /// A run's epoch and sequence number, often the right ones.
    fn fence(&mut self, run: RunId) -> (i64, i64) {
        let row = self.memory.runs.get(&run);
        let (epoch, seq) = row.map_or((0, 0), |r| (r.epoch, r.seq));
        match self.random.u8(0..6) {
            0 => (epoch - 1, seq),
            1 => (epoch, seq - 1),
            2 => (epoch + 1, seq),
            _ => (epoch, seq),
        }
    }

    /// A transition for both, as they understand time.
    fn item(&mut self, run: RunId) -> (Item, Item) {
        let (epoch, seq) = self.fence(run);
        let (inbox_n, seen) = self.memory.runs.get(&run).map_or((0, 0), |r| (r.inbox_n, r.inbox_seen));
        let queue = self.memory.runs.get(&run).map_or_else(|| "default".to_owned(), |r| r.queue.clone());
        let status = match self.random.u8(0..12) {
            0 => "completed",
            1 => "cancelled",
            2 => "cancelling",
            _ => "running",
        };
        let parked = !matches!(status, "completed" | "cancelled") && self.random.bool();
        let minutes = self.random.i64(-2..3);
        let (there, here) = self.later(minutes);
        let item = |due: DateTime<Utc>, seen: i64, cursor: bool| Item {
            run_id: run,
            epoch,
            seq,
            status,
            parked,
            due: parked.then_some(due),
            waiting: None,
            inbox_seen: seen,
            queue: queue.clone(),
            topic: None,
            cursor: cursor.then(|| text(&json!({})).expect("JSON")),
            format: crate::event::FORMAT,
            events: text(&json!([])).expect("JSON"),
            output: None,
            failure: None,
            effects: Effects::default(),
        };
        let seen = if self.random.bool() { inbox_n } else { seen };
        let cursor = self.random.bool();
        (item(there, seen, cursor), item(here, seen, cursor))
    }

    async fn on_postgres(&self) -> Vec<Seen> {
        sqlx::query_as(
            "select run_id, status, parked, owner, epoch, seq, inbox_n, inbox_seen, cursor_seq, closed_at is not null as closed,
                    (select due_at <= engine_now() from ready q where q.shard = r.shard and q.run_id = r.run_id) as due,
                    array(select h.epoch from history h where h.shard = r.shard and h.run_id = r.run_id order by seq) as history
             from runs r order by run_id",
        )
        .fetch_all(&self.pool)
        .await
        .expect("rows")
    }

    /// Who has which place.
    async fn places(&self) -> (Vec<(Uuid, Option<i32>)>, Vec<(Uuid, Option<i32>)>) {
        let there = sqlx::query_as("select run_id, place from admissions order by 1").fetch_all(&self.pool).await;
        (there.expect("places"), self.memory.seats.iter().map(|(run, seat)| (run.0, seat.place)).collect())
    }

    fn in_memory(&self) -> Vec<Seen> {
        let memory = &self.memory;
        let due = |run: &RunId| memory.ready.get(run).map(|at| *at <= memory.now);
        let epochs = |run: &RunId| memory.history.get(run).into_iter().flatten().map(|h| h.epoch).collect();
        let rows = memory.runs.iter().map(|(run, r)| {
            let owner = r.owner.map(|w| w.0);
            let (status, due, epochs) = (r.status.clone(), due(run), epochs(run));
            let inbox = (r.inbox_n, r.inbox_seen);
            (run.0, status, r.parked, owner, r.epoch, r.seq, inbox.0, inbox.1, r.cursor_seq, r.closed, due, epochs)
        });
        rows.collect()
    }

    /// One call on both. Returns what it was and what each answered.
    async fn call(&mut self) -> (String, String, String) {
        let (run, worker) = (self.run(), self.worker());
        // What a call puts into the queue comes behind what earlier ones have.
        self.memory.now += Duration::microseconds(1);
        let pool = self.pool.clone();
        let mut conn = pool.acquire().await.expect("connection");
        let said = |what: &str, a: &dyn std::fmt::Debug, b: &dyn std::fmt::Debug| {
            (format!("{what} {run} {worker}"), format!("{a:?}"), format!("{b:?}"))
        };
        match self.random.u8(0..124) {
            0..=11 => {
                // Another one in the place of one that has closed.
                let run = if self.memory.runs.get(&run).is_some_and(|row| row.closed) {
                    let next = RunId(Uuid::from_u128(self.random.u128(..)));
                    self.runs.iter_mut().filter(|known| **known == run).for_each(|known| *known = next);
                    next
                } else {
                    run
                };
                let key = ["a", "b"][usize::from(self.random.bool())];
                let priority = self.random.i16(1..6);
                let on_conflict = [OnConflict::Queue, OnConflict::Fail][usize::from(self.random.bool())];
                let place = Place { group: GROUP.into(), limit: self.random.u32(1..3), on_conflict };
                let place = self.random.bool().then_some(place);
                // What ends a run is the machine's, and these runs have no histories that it could read.
                let conflict = [IdConflict::UseExisting, IdConflict::Fail][usize::from(self.random.bool())];
                let policy = self.random.bool().then(|| (IdReuse::ALL[self.random.usize(0..3)], conflict));
                let (id_reuse, id_conflict) = policy.unwrap_or_default();
                let admission = Admission {
                    priority: Priority::new(priority).expect("priority"),
                    fairness_key: Some(key.to_owned()),
                    place: place.clone(),
                    id_reuse,
                    id_conflict,
                    ..Admission::default()
                };
                let start = Start {
                    run_id: Some(run),
                    definition: self.hash,
                    inputs: json!({}),
                    workflow_id: policy.map(|_| "id".to_owned()),
                    attributes: json!({}),
                    queue: String::new(),
                    topic: None,
                    admission,
                };
                let mut tx = begin(&pool).await.expect("begin");
                let there = self.client.start_in(&mut tx, start).await;
                tx.commit().await.expect("commit");
                let turn = (priority, crate::admission::lane(key));
                // What is refused was never there.
                let there = there.map(|s| (s.run_id, s.created)).map_err(|error| error.code());
                let memory = &mut self.memory;
                let here = match (policy, place) {
                    (Some((reuse, conflict)), place) => {
                        memory.start_under(run, "conformance", turn, ("id", reuse, conflict), place.as_ref())
                    }
                    (None, None) => Ok((run, memory.start(run, "conformance", "default", turn, json!({})))),
                    (None, Some(place)) => match memory.start_in_group(run, "conformance", turn, json!({}), &place) {
                        Some(Arrival::Refused) => Err("concurrency_full"),
                        arrival => Ok((run, arrival.is_some())),
                    },
                };
                said("start", &there, &here)
            }
            12..=29 => {
                let queue = ["default", "other"][usize::from(self.random.u8(0..8) == 0)];
                let (queues, any) = ([queue.to_owned()], self.random.bool());
                // Whose turn it is shows when there is one place only.
                let limit = if self.random.bool() && !self.memory.ties() { 1 } else { MANY };
                let many = i64::try_from(if any { limit } else { MANY }).expect("small");
                let (there, here) = if any {
                    let mut turns = Turns::default();
                    (0..self.random.u8(0..3)).for_each(|_| turns.took(7));
                    let look = ready::due(&mut self.session, self.spread, &queues, None, many).await.expect("look");
                    let order: Vec<RunId> = turns.order(look.due).iter().map(|d| d.run).collect();
                    let there = ready::take(&mut self.session, self.spread, worker, &order, many)
                        .await
                        .ok()
                        .map(|(all, _)| all);
                    (there, self.memory.claim(worker, &[queue], &turns, limit))
                } else {
                    let there = ready::take_messaged(&mut self.session, self.spread, worker, &queues, many).await.ok();
                    let there = there.map(|(all, _)| all.into_iter().map(|(run, epoch, _)| (run, epoch)).collect());
                    (there, self.memory.claim_messaged(worker, &[queue], MANY))
                };
                let (there, here) = (there.map(BTreeSet::from_iter), here.map(BTreeSet::from_iter));
                said(&format!("claim {any} {limit} {queue}"), &there, &here)
            }
            30..=54 => {
                let (there, here) = self.item(run);
                let mut batch = (vec![there.clone()], vec![here]);
                let other = self.run();
                if other != run && self.random.bool() {
                    let (there, here) = self.item(other);
                    batch.0.push(there);
                    batch.1.push(here);
                }
                // As the committer does: by shard, and what is several statements in a transaction.
                let mut answers = BTreeMap::new();
                for (shard, part) in self.spread.divide(batch.0, |item| item.run_id.shard()) {
                    let mut tx = begin(&pool).await.expect("begin");
                    let verdicts = transitions::send(&mut tx, shard, &part).await.expect("commit");
                    tx.commit().await.expect("commit");
                    answers.extend(part.into_iter().map(|item| item.run_id).zip(verdicts));
                }
                let answer: Vec<_> = batch.1.iter().filter_map(|item| answers.remove(&item.run_id)).collect();
                said(&format!("commit {there:?}"), &answer, &self.memory.commit(&batch.1))
            }
            55..=66 => {
                let kind = [Kind::Signal, Kind::Signal, Kind::Cancel, Kind::Unblock][self.random.usize(0..4)];
                let dedupe = self.random.bool().then(|| format!("id-{}", self.random.u8(0..4)));
                let (name, payload) = ("go", json!("x"));
                let unread_max = self.random.bool().then_some(1);
                let there = Outgoing {
                    run,
                    kind,
                    name,
                    payload: &payload,
                    dedupe_id: dedupe.as_deref(),
                    sender: None,
                    definition: None,
                    unread_max,
                };
                let answer = inbox::send(&mut conn, &there).await.expect("send");
                let post =
                    Post { run, kind, name: name.into(), payload: payload.clone(), dedupe_id: dedupe, unread_max };
                said(&format!("send {kind:?}"), &answer, &self.memory.post(&post))
            }
            67..=69 => {
                let up_to = self.memory.runs.get(&run).map_or(0, |r| r.inbox_n);
                let (there, _) = inbox::read(&mut conn, run, 1, up_to).await.expect("read");
                let here = self.memory.read(run, 1, up_to);
                // Their instants are the clocks'.
                let kinds =
                    |all: &[crate::machine::Inbound]| all.iter().map(std::mem::discriminant).collect::<Vec<_>>();
                said("read", &kinds(&there), &kinds(&here))
            }
            70..=73 => {
                let known = self.memory.workers.contains_key(&worker) || self.memory.dead.contains_key(&worker);
                if known {
                    // A number is given once.
                    let there = workers::heartbeat(&mut conn, worker).await.expect("heartbeat").is_some();
                    return said("heartbeat", &there, &self.memory.heartbeat(worker));
                }
                workers::register(&mut conn, worker, &[], &[], LEASE_MS).await.expect("register");
                self.memory.register(worker, Duration::milliseconds(LEASE_MS.into()));
                said("register", &(), &())
            }
            74..=76 => {
                let there = workers::bury(&mut conn).await.expect("bury");
                said("bury", &there, &self.memory.bury())
            }
            77..=80 => {
                let there = workers::take_over(&mut self.session, self.spread, 100).await.expect("take over");
                let here = self.memory.take_over(MANY);
                said("take over", &there.iter().collect::<BTreeSet<_>>(), &here.iter().collect::<BTreeSet<_>>())
            }
            81 => {
                workers::leave(&self.pool, worker).await.expect("leave");
                self.memory.leave(worker);
                said("leave", &(), &())
            }
            82..=84 => {
                let (runs, memory) = (self.runs.clone(), &self.memory);
                let found = workers::unread(&mut self.session, self.spread, &runs).await.expect("unread");
                let owned = |id: &RunId| memory.runs.get(id).is_some_and(|r| r.owner == Some(worker));
                let there: BTreeSet<RunId> = found.into_iter().map(|(id, _)| id).filter(owned).collect();
                said("unread", &there, &memory.unread(worker))
            }
            85 | 86 => {
                let driven = BTreeSet::from([run]);
                let found = runs::strays(&mut self.session, self.spread, worker, &[run], 100).await.expect("strays");
                let here: BTreeSet<_> = self.memory.strays(worker, &driven).into_iter().collect();
                said("strays", &found.into_iter().collect::<BTreeSet<_>>(), &here)
            }
            87..=89 => {
                let (epoch, _) = self.fence(run);
                let seen = self.memory.runs.get(&run).map_or(0, |r| r.inbox_n) - i64::from(self.random.bool());
                let minutes = self.random.i64(-1..3);
                let (there, here) = self.later(minutes);
                let answer = runs::release(&mut conn, run, epoch, seen, there, None).await.expect("release");
                said("release", &answer, &self.memory.release(run, epoch, seen, here))
            }
            90..=92 => {
                let (epoch, _) = self.fence(run);
                let answer = runs::give_back(&mut conn, run, worker, epoch, std::time::Duration::from_secs(1))
                    .await
                    .expect("give back");
                let here = self.memory.give_back(run, worker, epoch);
                // It is due in a second, which may pass on one of them before it is looked at.
                self.pass(1).await;
                said("give back", &answer, &here)
            }
            96 | 97 => {
                // Closes as continued, with what was read and what was not.
                let (epoch, seq) = self.fence(run);
                let inbox = self.memory.inbox.get(&run).map_or(&[][..], Vec::as_slice);
                let inbox_n = self.memory.runs.get(&run).map_or(0, |r| r.inbox_n);
                let seen = self.random.i64(0..=inbox_n).max(self.memory.runs.get(&run).map_or(0, |r| r.inbox_seen));
                let read = inbox.iter().filter(|m| m.n <= seen && m.kind == Kind::Signal);
                let kept = read.filter(|m| m.n % 2 == 0).map(|m| crate::machine::Message {
                    n: u64::try_from(m.n).expect("number"),
                    name: m.name.clone(),
                    payload: m.payload.clone(),
                    sender: None,
                    at: m.at,
                    update: None,
                });
                let next = Successor {
                    run_id: RunId(Uuid::from_u128(self.random.u128(..))),
                    definition: None,
                    inputs: json!({}),
                    not_before: DateTime::UNIX_EPOCH,
                    kept: kept.collect(),
                };
                let (mut there, _) = self.item(run);
                there = Item { epoch, seq, status: "continued", parked: false, due: None, inbox_seen: seen, ..there };
                there.effects.successor = Some(next.clone());
                let mut tx = begin(&pool).await.expect("begin");
                let items = [there.clone()];
                let shard = (self.spread == Spread::ByShard).then(|| run.shard());
                let verdicts = transitions::send(&mut tx, shard, &items).await.expect("commit");
                transitions::apply_effects(&mut tx, &items, &verdicts, &NoHook).await.expect("effects");
                tx.commit().await.expect("commit");
                let here = self.memory.commit_with_effects(&items, &|_| false).expect("no hook");
                if matches!(verdicts[..], [transitions::Verdict::Accepted { .. }]) {
                    // From now on it is one of those that things happen to.
                    let at = self.runs.iter().position(|r| *r == run).expect("known");
                    self.runs[at] = next.run_id;
                    let (sent, _) = inbox::read(&mut conn, next.run_id, 0, i64::MAX).await.expect("read");
                    let told = self.memory.read(next.run_id, 0, i64::MAX);
                    assert_eq!(sent.len(), told.len(), "{sent:?} {told:?}");
                }
                said("continue", &verdicts, &here)
            }
            93 => {
                let mut tx = begin(&pool).await.expect("begin");
                let there = groups::let_in(&mut tx, GROUP).await.expect("let in");
                tx.commit().await.expect("commit");
                said("let in", &there, &self.memory.let_in(GROUP))
            }
            94 => {
                let there = runs::seize(&mut conn, run).await.expect("seize");
                said("seize", &there, &self.memory.seize(run))
            }
            95 => {
                let (epoch, _) = self.fence(run);
                runs::quarantine(&mut conn, run, epoch, "a test").await.expect("quarantine");
                self.memory.quarantine(run, epoch);
                said("quarantine", &(), &())
            }
            98 | 99 => {
                // Goes on under another definition; that it may, is the machine's to say.
                let (epoch, seq) = self.fence(run);
                let event = Event::RunMigrated {
                    from: self.hash,
                    to: self.hash,
                    map: BTreeMap::new(),
                    skipped: Vec::new(),
                    reason: String::new(),
                    by: None,
                    inputs: None,
                    env: BTreeMap::new(),
                    calls: BTreeMap::new(),
                    notes: Vec::new(),
                    at: self.base.0,
                };
                let state = json!({});
                let (from, to, event, state) = (self.hash, self.hash, &event, &state);
                let new = migrations::New { run, epoch, seq, from, to, inputs: None, event, state };
                let mut tx = begin(&pool).await.expect("begin");
                let there = migrations::apply(&mut tx, &new).await.expect("migrate");
                tx.commit().await.expect("commit");
                let (events, state) = (text(&json!([event])).expect("JSON"), text(state).expect("JSON"));
                said("migrate", &there, &self.memory.migrate(run, (epoch, seq), "conformance", events, state))
            }
            103..=116 => self.commit_with_effects(run).await,
            117 => self.unblock().await,
            118..=123 => self.save(run).await,
            _ => {
                let minutes = self.random.i64(1..3);
                self.pass(minutes).await;
                said("time", &(), &())
            }
        }
    }
}

#[tokio::test]
async fn postgres_and_memory_answer_alike_and_hold_the_same_rows() {
    alike(Spread::Together).await;
}

/// The same where what concerns many runs is said shard by shard, as on Citus.
#[tokio::test]
async fn postgres_by_shard_and_memory_answer_alike_and_hold_the_same_rows() {
    alike(Spread::ByShard).await;
}

async fn alike(spread: Spread) {
    let mut kinds = BTreeMap::<String, u32>::new();
    for seed in 0..SEEDS {
        let mut pair = Pair::new(seed, spread).await;
        for n in 0..CALLS {
            let (what, there, here) = pair.call().await;
            assert_eq!(there, here, "seed {seed}, call {n}: Postgres and memory answer differently: {what}");
            assert_eq!(pair.on_postgres().await, pair.in_memory(), "seed {seed}, call {n}: rows after: {what}");
            let (there_places, here_places) = pair.places().await;
            assert_eq!(there_places, here_places, "seed {seed}, call {n}: places after: {what}");
            let (there_told, here_told) = pair.told().await;
            assert_eq!(there_told, here_told, "seed {seed}, call {n}: messages and the hook after: {what}");
            let (there_saved, here_saved) = pair.saved().await;
            assert_eq!(there_saved, here_saved, "seed {seed}, call {n}: checkpoints after: {what}");
            for word in EFFECTS.iter().chain(SAVES) {
                *kinds.entry((*word).to_owned()).or_default() += u32::from(what.contains(word));
            }
            let kind = what.split(' ').next().unwrap_or_default();
            for answer in [
                "Accepted",
                "Unread",
                "Stale",
                "Duplicate",
                "NoOpenRun",
                "Full",
                "concurrency_full",
                "workflow_id_open",
                "workflow_id_used",
            ] {
                *kinds.entry(answer.to_owned()).or_default() += u32::from(there.contains(answer));
            }
            *kinds.entry(kind.to_owned()).or_default() += 1;
        }
        let taken: Vec<(Uuid, bool)> = sqlx::query_as("select id, runs_taken from dead_workers order by 1")
            .fetch_all(&pair.pool)
            .await
            .expect("dead");
        let here: Vec<(Uuid, bool)> = pair.memory.dead.iter().map(|(id, taken)| (id.0, *taken)).collect();
        assert_eq!(taken, here, "seed {seed}: dead workers");
    }
    // A suite that never came to a case has not tried it.
    for kind in [
        "Accepted",
        "Unread",
        "Stale",
        "Duplicate",
        "NoOpenRun",
        "Full",
        "concurrency_full",
        "workflow_id_open",
        "workflow_id_used",
        "let",
        "claim",
        "take",
        "seize",
        "continue",
        "migrate",
        "give",
        "release",
        "unblock",
    ]
    .iter()
    .chain(EFFECTS)
    .chain(SAVES)
    {
        assert!(kinds.get(*kind).is_some_and(|n| *n > 0), "{kind}: {kinds:?}");
    }
}
