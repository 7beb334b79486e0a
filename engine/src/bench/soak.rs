//! Long ones: does a pinned snapshot, or a run with very many steps, slow the engine down?

use super::{
    Error, Options, Result,
    host::Host,
    process::cpu_of_thread,
    report::{Figure, Report},
    scene,
};
use crate::{
    definition::{Exhausted, Expr, Kind, RepeatCondition},
    ids::DefinitionHash,
    transaction,
    worker::{self, WorkerConfig},
};
use serde_json::json;
use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

/// Runs that are kept in the queue; between half of them and all.
const BACKLOG: usize = 1_000;
/// Steps of one of them.
const STEPS: usize = 10;
/// Steps of the long run.
const LONG: u32 = 10_000;
/// Steps of the long run whose rate is its rate at the start and at the end.
const EDGE: i64 = 1_000;
const PATIENCE: Duration = Duration::from_secs(3_600);
/// Largest part of the throughput that may be lost.
const LOSS_MAX: f64 = 1.0 / 3.0;
const GOAL: &str = "not a third below the rate before";

pub(super) async fn measure(
    host: &Host,
    options: &Options,
    progress: &dyn Fn(&str),
    report: &mut Report,
) -> Result<()> {
    let duration = options.soak.unwrap_or(super::SOAK);
    progress("a run of 10,000 steps");
    long_run(host, options, report).await?;
    pinned(host, options, duration, progress, report).await
}

/// One run of 10,000 steps: its first thousand and its last.
async fn long_run(host: &Host, options: &Options, report: &mut Report) -> Result<()> {
    let rounds = u32::try_from(options.share(LONG as usize)).unwrap_or(LONG).max(100);
    let kind = Kind::Repeat {
        steps: vec![scene::noop("one")],
        max_rounds: rounds,
        condition: RepeatCondition::Until(Expr("false".into())),
        delay_ms: 0,
        exhausted: Exhausted::Continue,
        transparent: false,
        gate: None,
        outputs: None,
    };
    let definition = scene::deploy(host, scene::definition("long", vec![scene::step("rounds", kind)])).await?;
    let worker = worker::start(WorkerConfig::new(host.pool.clone(), scene::registry())).await?;
    scene::start(host, definition, &json!({}), "", 1).await?;
    host.until_none("the end of the long run", scene::OPEN, PATIENCE).await?;
    worker.drain(Duration::from_secs(5)).await;
    let edge = EDGE.min(i64::from(rounds) / 4);
    let (first, last): (f64, f64) = sqlx::query_as(
        "select extract(epoch from (select at from history where seq = $1 + 2) - (select at from history where seq = 2))::float8,
                extract(epoch from max(at) - (select at from history where seq = (select max(seq) - $1 from history)))::float8
         from history",
    )
    .bind(edge)
    .fetch_one(&host.pool)
    .await?;
    let (first, last) = (edge as f64 / first, edge as f64 / last);
    report.figures.push(
        Figure::new("last steps of a run of 10,000", last, "/s")
            .limit("its first steps", first)
            .goal(GOAL, last >= first * (1.0 - LOSS_MAX))
            .counts_if(rounds == LONG, format!("{rounds} steps, not {LONG}"))
            .detail("steps", f64::from(rounds), ""),
    );
    scene::reset(host).await
}

/// Steady load, first alone, then beside a transaction that keeps an old snapshot.
async fn pinned(
    host: &Host,
    options: &Options,
    duration: Duration,
    progress: &dyn Fn(&str),
    report: &mut Report,
) -> Result<()> {
    let backlog = options.share(BACKLOG).max(2);
    let definition = scene::deploy(host, scene::chain("soak", STEPS)).await?;
    let steps = Arc::new(AtomicU64::new(0));
    let counted = steps.clone();
    let registry = scene::registry_of(move |_| {
        counted.fetch_add(1, Ordering::Relaxed);
    });
    let mut config = WorkerConfig::new(host.pool.clone(), registry);
    config.slots = 512;
    let worker = worker::start(config).await?;
    let speed = Speed::new()?;
    let before = (duration / 10).clamp(Duration::from_secs(5), Duration::from_secs(120));
    progress("steady load");
    // The first moments fill caches and the first connections.
    let mut started = 0;
    load(host, definition, backlog, (&steps, &mut started), &speed, before / 5).await?;
    let alone = load(host, definition, backlog, (&steps, &mut started), &speed, before).await?;
    let mut tx = transaction::begin(&host.pool).await?;
    sqlx::query("set transaction isolation level repeatable read").execute(&mut *tx).await?;
    sqlx::query("set local idle_in_transaction_session_timeout = 0").execute(&mut *tx).await?;
    sqlx::query("select count(*) from runs").execute(&mut *tx).await?;
    progress("steady load beside a pinned snapshot");
    let mut tenths = Vec::new();
    for _ in 0..10 {
        tenths.push(load(host, definition, backlog, (&steps, &mut started), &speed, duration / 10).await?);
    }
    tx.rollback().await?;
    worker.drain(Duration::from_secs(10)).await;
    let last = tenths.last().copied().unwrap_or(alone);
    let worst = tenths.iter().copied().min_by(|a, b| a.of(alone).total_cmp(&b.of(alone))).unwrap_or(alone);
    let dead: i64 =
        sqlx::query_scalar("select coalesce(n_dead_tup, 0) from pg_stat_user_tables where relname = 'ready'")
            .fetch_one(&host.pool)
            .await?;
    report.figures.push(
        // By the worst: a mean, or the end, would forgive what lasted for minutes.
        Figure::new("steps/s in the worst tenth of a pinned snapshot", worst.rate, "/s")
            .limit("before it, by as fast a processor", worst.owed(alone))
            .goal(GOAL, worst.of(alone) >= 1.0 - LOSS_MAX)
            .counts_if(
                duration >= super::SOAK,
                format!("{} s of it, not {}", duration.as_secs(), super::SOAK.as_secs()),
            )
            .detail("before it", alone.rate, "/s")
            .detail("processor's speed in that tenth, of before", worst.speed / alone.speed, "")
            .detail("last tenth", last.rate, "/s")
            .detail("processor's speed in the last, of before", last.speed / alone.speed, "")
            .detail("length", duration.as_secs_f64(), "s")
            .detail("dead rows in `ready`", dead as f64, ""),
    );
    scene::reset(host).await
}

/// What a stretch of time came to.
#[derive(Clone, Copy)]
struct Stretch {
    /// Steps a second.
    rate: f64,
    /// Of the processor, as [`Speed::now`].
    speed: f64,
}

impl Stretch {
    /// Of the rate before, what is left.
    fn of(self, before: Self) -> f64 {
        self.rate / self.owed(before)
    }

    /// The rate before, by a processor as fast as now. A machine that is slower than it was then, for whatever reason, is not the
    /// engine's loss; one that is faster is no excuse.
    fn owed(self, before: Self) -> f64 {
        before.rate * (self.speed / before.speed).min(1.0)
    }
}

/// How fast this machine is by itself: half an hour on shared hardware is not of one speed.
struct Speed {
    text: String,
}

impl Speed {
    /// Readings of one look: some milliseconds.
    const READINGS: u32 = 20;

    fn new() -> Result<Self> {
        let event = json!({"type": "step_ended", "path": "s1", "status": "succeeded", "output": {"n": 1, "text": "some words"}});
        let speed = Self { text: json!(vec![event; 500]).to_string() };
        speed.now()?;
        Ok(speed)
    }

    /// Readings of a fixed text per second that the processor gave to it: what waits for a processor does not count.
    fn now(&self) -> Result<f64> {
        let before = cpu_of_thread()?;
        for _ in 0..Self::READINGS {
            std::hint::black_box(serde_json::from_str::<serde_json::Value>(std::hint::black_box(&self.text)).ok());
        }
        Ok(f64::from(Self::READINGS) / (cpu_of_thread()? - before).as_secs_f64())
    }
}

/// Keeps the backlog for that long; `started` are the steps of all runs so far.
async fn load(
    host: &Host,
    definition: DefinitionHash,
    backlog: usize,
    (steps, started): (&AtomicU64, &mut u64),
    speed: &Speed,
    length: Duration,
) -> Result<Stretch> {
    let (mut speeds, mut looks) = (0.0, 0.0);
    let half = ((backlog / 2) * STEPS) as u64;
    let (begun, before) = (Instant::now(), steps.load(Ordering::Relaxed));
    while begun.elapsed() < length {
        scene::start(host, definition, &json!({}), "", backlog / 2).await?;
        *started += half;
        speeds += speed.now()?;
        looks += 1.0;
        // Not by asking the tables: that would be one more load that grows with the dead rows.
        while steps.load(Ordering::Relaxed) + half < *started && begun.elapsed() < length {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        if begun.elapsed() > length + PATIENCE {
            return Err(Error::TooSlow("the steady load", PATIENCE.as_secs()));
        }
    }
    let rate = (steps.load(Ordering::Relaxed) - before) as f64 / begun.elapsed().as_secs_f64();
    Ok(Stretch { rate, speed: speeds / looks })
}

#[cfg(test)]
mod tests {
    use super::Stretch;

    #[test]
    fn a_slower_processor_is_no_loss_and_a_faster_one_no_excuse() {
        let before = Stretch { rate: 1_000.0, speed: 200.0 };
        for (rate, speed, owed, left) in [
            (1_000.0, 200.0, 1_000.0, 1.0),
            (500.0, 200.0, 1_000.0, 0.5),
            // Half the speed: half the rate is all that was there.
            (500.0, 100.0, 500.0, 1.0),
            (250.0, 100.0, 500.0, 0.5),
            (1_000.0, 100.0, 500.0, 2.0),
            // Twice the speed: what was there before is still what is asked for, and no more.
            (1_000.0, 400.0, 1_000.0, 1.0),
            (500.0, 400.0, 1_000.0, 0.5),
            // Nothing is a loss of everything, and no unknown figure.
            (0.0, 100.0, 500.0, 0.0),
        ] {
            let now = Stretch { rate, speed };
            assert_eq!((now.owed(before), now.of(before)), (owed, left), "{rate} at {speed}");
        }
    }
}
