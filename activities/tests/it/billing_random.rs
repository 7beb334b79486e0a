//! Many clients, any interleaving: hold, extend, record, settle, lose, grant, expire, purchase, refund, chargeback, adjust. Afterwards,
//! and at any moment in between, the invariants are empty. `LOOPWRIGHT_LEDGER_SEED` makes the same choices again, as far as the order in
//! which clients meet allows; `LOOPWRIGHT_LEDGER_SECONDS` makes it longer.

use crate::bench::{Bench, closing, opening, order, payment, planning};
use loopwright_activities::{
    billing::{
        MicroCredits, audit,
        ledger::{self, GrantSource, LedgerError},
        purchase,
    },
    usage::CallState,
};
use loopwright_engine::{
    hook::{AttemptEnd, AttemptRef, HookError, Outcome, Phase, Reading, Transition, TransitionHook, Verdict},
    ids::{AttemptId, RunId},
};
use serde_json::{Value, json};
use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};
use uuid::Uuid;

const USERS: usize = 3;
const CLIENTS: u64 = 8;
/// Attempts that clients meet at; and payments, the newest. So few that what one of them began another one ends.
const ATTEMPTS: usize = 12;
const CHARGES: usize = 6;
/// Names of an attempt's calls.
const CALLS: u64 = 3;
/// In CI. Longer by the variable.
const SECONDS: u64 = 8;
/// So much longer it goes on for what has not happened by then: on a slow machine, or by chance. What is rarest happens two to ten times
/// in eight seconds, measured.
const SECONDS_MORE: u64 = 60;

/// What has to happen at least once, or the books are in order for want of use, and how often it did, without what the set-up gave. None
/// of these numbers ever falls.
const HAPPENED: &str = "
    with t as (select *, split_part(idempotency_key, ':', 1) as of from credit_transactions)
    select 'grant', count(*) from t where kind = 'grant' and of = 'promo'
    union all select 'purchase', count(*) from t where kind = 'purchase'
    union all select 'expire', count(*) from t where kind = 'expire'
    union all select 'adjust upwards', count(*) from t where kind = 'grant' and idempotency_key like 'adjust:t%'
    union all select 'adjust downwards', count(*) from t where kind = 'adjustment' and idempotency_key like 'adjust:t%'
    union all select 'refund', count(*) from t where kind = 'refund'
    union all select 'refund done', count(*) from t join payments p on t.idempotency_key = 'refund:' || p.charge_id
                where t.kind = 'refund' and p.refund_state = 'done'
    union all select 'refund refused', count(*) from t where kind = 'grant' and idempotency_key like 'adjust:refund-refused:%'
    union all select 'taken back after a refusal', count(*) from t where kind = 'adjustment' and of = 'refund-again'
    union all select 'chargeback', (select count(*) from t where kind = 'adjustment' and of = 'refund')
                                 + (select count(*) from payments where refund_state = 'chargeback')
    union all select 'hold', count(*) from t where kind = 'hold' and hold_no = 1
    union all select 'extend', count(*) from t where kind = 'hold' and hold_no > 1
    union all select 'capture', count(*) from t where kind = 'capture' and amount_ucr < 0
    union all select 'capture of all and more', count(*) from t where kind = 'capture' and uncollected_ucr > 0
    union all select 'release', count(*) from t where kind = 'capture' and amount_ucr = 0
    union all select 'give back by policy', count(*) from t where kind = 'grant' and idempotency_key like 'adjust:refund-policy:%'
    union all select 'attempt ' || s, (select count(*) from activity_attempts a where a.state = s)
                from unnest(array['completed', 'failed', 'lost']) s
    union all select 'call ' || s, (select count(*) from api_key_usage k where k.state = s and not late)
                from unnest(array['succeeded', 'failed', 'unknown']) s
    union all select 'late reading', count(*) from api_key_usage where late";

struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
    fn of<'a, T>(&mut self, list: &'a [T]) -> Option<&'a T> {
        let n = u64::try_from(list.len()).expect("small");
        (n > 0).then(|| &list[usize::try_from(self.below(n)).expect("small")])
    }
    fn amount(&mut self, most: u64) -> i64 {
        i64::try_from(1 + self.below(most)).expect("small")
    }
}

/// What the clients share.
struct World {
    bench: Bench,
    users: Vec<Uuid>,
    attempts: Mutex<Vec<AttemptRef>>,
    charges: Mutex<Vec<(Uuid, String)>>,
    deadlocks: AtomicU64,
    done: AtomicU64,
    over: AtomicBool,
}

/// An error of the database is a deadlock, which is counted, or a failure of the test. Refusals are answers.
fn judge(world: &World, what: &str, error: &sqlx::Error) {
    let code = error.as_database_error().and_then(|e| e.code()).unwrap_or_default().into_owned();
    assert_eq!(code, "40P01", "{what}: {error}");
    world.deadlocks.fetch_add(1, Ordering::Relaxed);
}

impl World {
    async fn ledger<T: Send>(
        &self,
        what: &str,
        work: impl AsyncFnOnce(&mut sqlx::PgConnection) -> Result<T, LedgerError>,
    ) -> Option<T> {
        let mut tx = self.bench.pool.begin().await.expect("tx");
        match work(&mut tx).await {
            Ok(done) => {
                if let Err(error) = tx.commit().await {
                    judge(self, what, &error);
                    return None;
                }
                Some(done)
            }
            Err(LedgerError::Sql(error)) => {
                judge(self, what, &error);
                None
            }
            // Used, mismatch, short: said, and nothing is changed.
            Err(_) => None,
        }
    }

    async fn transition(&self, transition: Transition) -> bool {
        let mut tx = self.bench.pool.begin().await.expect("tx");
        match self.bench.hook.apply(&mut tx, std::slice::from_ref(&transition)).await {
            Ok(refused) if refused.is_empty() => tx.commit().await.map_err(|e| judge(self, "commit", &e)).is_ok(),
            Ok(_) => false,
            Err(HookError::Sql(error)) => {
                judge(self, "transition", &error);
                false
            }
            Err(error) => panic!("{error}"),
        }
    }

    async fn start(&self, attempt: &AttemptRef, calls: u32) -> bool {
        let started = vec![planning(attempt, calls)];
        self.transition(Transition { ord: 0, run_id: attempt.run_id, ended: vec![], started }).await
    }

    async fn end(&self, attempt: &AttemptRef, outcome: Outcome, failure: Option<&str>, again: bool) {
        let end = AttemptEnd { attempt: attempt.clone(), outcome, failure: failure.map(str::to_owned), again };
        self.transition(Transition { ord: 0, run_id: attempt.run_id, ended: vec![end], started: vec![] }).await;
    }

    /// As the engine does it, and as it does it where runs are spread over nodes.
    async fn meter(&self, attempt: &AttemptRef, key: &str, phase: Phase, current: bool, body: Value) {
        if current && body.to_string().len().is_multiple_of(2) && self.bench.at_once(attempt, key, phase, &body).await {
            return;
        }
        let mut tx = self.bench.pool.begin().await.expect("tx");
        match self.bench.hook.meter(&mut tx, attempt, Reading { key, phase, current, body: &body }).await {
            Ok(Verdict::Accepted) => {
                if let Err(error) = tx.commit().await {
                    judge(self, "commit of a reading", &error);
                }
            }
            Ok(Verdict::Refused { .. }) => {}
            Err(HookError::Sql(error)) => judge(self, "reading", &error),
            Err(error) => panic!("{error}"),
        }
    }

    fn some_attempt(&self, random: &mut Random) -> Option<AttemptRef> {
        random.of(&self.attempts.lock().expect("no panic while held")).cloned()
    }

    async fn step(&self, client: u64, n: u64, random: &mut Random) {
        let user = *random.of(&self.users).expect("users");
        match random.below(24) {
            0..=1 if self.attempts.lock().expect("no panic while held").len() < ATTEMPTS => {
                let run = RunId::new();
                let attributes = json!({"user_id": user.to_string(), "project_id": self.bench.project.to_string()});
                let attempt_id = AttemptId::derive(run, "step", 1);
                let attempt = AttemptRef { attempt_id, attributes: Arc::new(attributes), ..self.bench.attempt(run, 1) };
                if self.start(&attempt, u32::try_from(1 + random.below(3)).expect("small")).await {
                    self.attempts.lock().expect("no panic while held").push(attempt);
                }
            }
            2..=6 => {
                // Sometimes larger than the hold: it is extended.
                let Some(attempt) = self.some_attempt(random) else { return };
                let key = format!("c{}", random.below(CALLS));
                self.meter(&attempt, &key, Phase::Open, true, opening(100 + random.below(4_000))).await;
            }
            7..=11 => {
                let Some(attempt) = self.some_attempt(random) else { return };
                let key = format!("c{}", random.below(CALLS));
                let state = [CallState::Succeeded, CallState::Succeeded, CallState::Failed, CallState::Unknown];
                let state = *random.of(&state).expect("states");
                // Sometimes more than was announced, and sometimes from a worker that lost its run.
                let body = closing(state, random.below(2_000), random.below(5_000));
                self.meter(&attempt, &key, Phase::Close, random.below(8) > 0, body).await;
            }
            0..=1 | 12..=13 => {
                let Some(attempt) = self.some_attempt(random) else { return };
                let ends = [
                    (Outcome::Succeeded, None, false),
                    (Outcome::Lost, None, false),
                    (Outcome::Blocked, None, false),
                    (Outcome::Cancelled, None, false),
                    (Outcome::Failed, Some("model.output_invalid"), true),
                    (Outcome::Failed, Some("transient.http"), false),
                    (Outcome::TimedOut, Some("timeout.run"), false),
                ];
                let (outcome, failure, again) = *random.of(&ends).expect("ends");
                self.end(&attempt, outcome, failure, again).await;
                // It stays in the list otherwise: others settle it again and report late.
                if random.below(3) > 0 {
                    self.attempts.lock().expect("no panic while held").retain(|a| a.attempt_id != attempt.attempt_id);
                }
            }
            14 => {
                let expires = match random.below(3) {
                    0 => None,
                    _ => Some(chrono::Utc::now() + chrono::Duration::milliseconds(random.amount(1_500))),
                };
                let (key, amount) = (format!("g{client}-{n}"), MicroCredits(random.amount(4_000_000)));
                self.ledger("grant", async |c| ledger::grant(c, user, GrantSource::Promo, &key, amount, expires).await)
                    .await;
            }
            15 => {
                let limit = random.amount(4);
                self.ledger("expire", async |c| ledger::expire(c, limit).await).await;
            }
            16 => {
                let charge = format!("p{client}-{n}");
                let credits = random.amount(5_000_000);
                let paid = self
                    .ledger("purchase", async |c| {
                        order(c, user, &charge, credits).await?;
                        purchase::purchase(c, user, &payment(&charge, &charge)).await
                    })
                    .await;
                if paid.is_some() {
                    self.charges.lock().expect("no panic while held").push((user, charge));
                }
            }
            17..=22 => {
                let charge = {
                    let charges = self.charges.lock().expect("no panic while held");
                    random.of(&charges[charges.len().saturating_sub(CHARGES)..]).cloned()
                };
                let Some((user, charge)) = charge else { return };
                // A refund that is refused and comes all the same takes three of them in a row.
                match random.below(8) {
                    0..=2 => drop(self.ledger("refund", async |c| purchase::refund(c, user, &charge).await).await),
                    3 => drop(self.ledger("done", async |c| purchase::refund_done(c, &charge).await).await),
                    4 => drop(self.ledger("chargeback", async |c| purchase::charge_back(c, user, &charge).await).await),
                    5 => drop(self.ledger("taken back", async |c| purchase::taken_back(c, user, &charge).await).await),
                    _ => drop(self.ledger("refused", async |c| purchase::refund_refused(c, &charge, "no").await).await),
                }
            }
            _ => {
                let sign = if random.below(2) == 0 { 1 } else { -1 };
                let (ticket, amount) =
                    (format!("t{}", random.below(500)), MicroCredits(sign * random.amount(1_000_000)));
                self.ledger("adjust", async |c| ledger::adjust(c, user, &ticket, amount).await).await;
            }
        }
        self.done.fetch_add(1, Ordering::Relaxed);
    }
}

fn variable(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(otherwise)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn any_interleaving_of_many_clients_leaves_money_in_order() {
    let seed = variable("LOOPWRIGHT_LEDGER_SEED", Uuid::new_v4().as_u64_pair().0);
    let seconds = variable("LOOPWRIGHT_LEDGER_SECONDS", SECONDS);
    println!("LOOPWRIGHT_LEDGER_SEED={seed}");
    let bench = Bench::new(3).await;
    let mut users = vec![bench.user];
    for n in 1..USERS {
        let telegram = 100 + i64::try_from(n).expect("small");
        users.push(bench.another(telegram).await);
    }
    let world = Arc::new(World {
        bench,
        users,
        attempts: Mutex::default(),
        charges: Mutex::default(),
        deadlocks: AtomicU64::new(0),
        done: AtomicU64::new(0),
        over: AtomicBool::new(false),
    });
    let begun = Instant::now();
    let mut clients = tokio::task::JoinSet::new();
    for client in 0..CLIENTS {
        let world = world.clone();
        clients.spawn(async move {
            let mut random = Random((seed ^ (client + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)).max(1));
            let mut n = 0;
            while !world.over.load(Ordering::Relaxed) {
                world.step(client, n, &mut random).await;
                n += 1;
            }
        });
    }
    // The books are in order at any moment, not only at the end.
    let mut looks = 0;
    let happened = loop {
        let mut tx = world.bench.pool.begin().await.expect("tx");
        assert_eq!(audit::snapshot(&mut tx).await.expect("audit").violations, [], "in between, seed {seed}");
        looks += 1;
        if begun.elapsed() < Duration::from_secs(seconds) {
            continue;
        }
        let happened: Vec<(String, i64)> = sqlx::query_as(HAPPENED).fetch_all(&mut *tx).await.expect("happened");
        let all = happened.iter().all(|(_, count)| *count > 0);
        if all || begun.elapsed() > Duration::from_secs(seconds + SECONDS_MORE) {
            break happened;
        }
    };
    world.over.store(true, Ordering::Relaxed);
    while let Some(client) = clients.join_next().await {
        client.expect("no client panics");
    }
    println!("{} operations, {looks} audits in between, {happened:?}", world.done.load(Ordering::Relaxed));
    let open: Vec<(Uuid, Uuid)> =
        sqlx::query_as("select run_id, user_id from activity_attempts where state = 'running'")
            .fetch_all(&world.bench.pool)
            .await
            .expect("open");
    for (run, user) in open {
        let attributes = Arc::new(json!({"user_id": user.to_string()}));
        let attempt = AttemptRef { attributes, ..world.bench.attempt(RunId(run), 1) };
        world.end(&attempt, Outcome::Lost, None, false).await;
    }
    assert_eq!(world.bench.violations().await, [""; 0], "seed {seed}");
    let held: i64 = sqlx::query_scalar("select sum(credit_held_ucr)::bigint from users")
        .fetch_one(&world.bench.pool)
        .await
        .expect("held");
    assert_eq!(held, 0, "nothing stays held, seed {seed}");
    assert_eq!(world.deadlocks.load(Ordering::Relaxed), 0, "deadlocks, seed {seed}");
    let never: Vec<&str> = happened.iter().filter(|(_, count)| *count == 0).map(|(what, _)| what.as_str()).collect();
    assert!(never.is_empty(), "these never happened, seed {seed}: {never:?}");
}
