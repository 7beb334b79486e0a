//! Long ones: does a pinned snapshot, or a run with very many steps, slow the engine down?

use super::{
    Error, Options, Result,
    host::Host,
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
    pinned(host, duration, progress, report).await
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
async fn pinned(host: &Host, duration: Duration, progress: &dyn Fn(&str), report: &mut Report) -> Result<()> {
    let definition = scene::deploy(host, scene::chain("soak", STEPS)).await?;
    let steps = Arc::new(AtomicU64::new(0));
    let counted = steps.clone();
    let registry = scene::registry_of(move |_| {
        counted.fetch_add(1, Ordering::Relaxed);
    });
    let mut config = WorkerConfig::new(host.pool.clone(), registry);
    config.slots = 512;
    let worker = worker::start(config).await?;
    let before = (duration / 10).clamp(Duration::from_secs(5), Duration::from_secs(120));
    progress("steady load");
    // The first moments fill caches and the first connections.
    let mut started = 0;
    load(host, definition, (&steps, &mut started), before / 5).await?;
    let alone = load(host, definition, (&steps, &mut started), before).await?;
    let mut tx = transaction::begin(&host.pool).await?;
    sqlx::query("set transaction isolation level repeatable read").execute(&mut *tx).await?;
    sqlx::query("set local idle_in_transaction_session_timeout = 0").execute(&mut *tx).await?;
    sqlx::query("select count(*) from runs").execute(&mut *tx).await?;
    progress("steady load beside a pinned snapshot");
    let mut rates = Vec::new();
    for _ in 0..10 {
        rates.push(load(host, definition, (&steps, &mut started), duration / 10).await?);
    }
    tx.rollback().await?;
    worker.drain(Duration::from_secs(10)).await;
    let last = rates.last().copied().unwrap_or(f64::NAN);
    let worst = rates.iter().copied().fold(f64::INFINITY, f64::min);
    let dead: i64 =
        sqlx::query_scalar("select coalesce(n_dead_tup, 0) from pg_stat_user_tables where relname = 'ready'")
            .fetch_one(&host.pool)
            .await?;
    report.figures.push(
        // By the worst: a mean, or the end, would forgive what lasted for minutes.
        Figure::new("steps/s in the worst tenth of a pinned snapshot", worst, "/s")
            .limit("before it", alone)
            .goal(GOAL, worst >= alone * (1.0 - LOSS_MAX))
            .counts_if(
                duration >= super::SOAK,
                format!("{} s of it, not {}", duration.as_secs(), super::SOAK.as_secs()),
            )
            .detail("last tenth", last, "/s")
            .detail("length", duration.as_secs_f64(), "s")
            .detail("dead rows in `ready`", dead as f64, ""),
    );
    scene::reset(host).await
}

/// Keeps the backlog for that long; `started` are the steps of all runs so far. Steps per second.
async fn load(
    host: &Host,
    definition: DefinitionHash,
    (steps, started): (&AtomicU64, &mut u64),
    length: Duration,
) -> Result<f64> {
    let half = ((BACKLOG / 2) * STEPS) as u64;
    let (begun, before) = (Instant::now(), steps.load(Ordering::Relaxed));
    while begun.elapsed() < length {
        scene::start(host, definition, &json!({}), "", BACKLOG / 2).await?;
        *started += half;
        // Not by asking the tables: that would be one more load that grows with the dead rows.
        while steps.load(Ordering::Relaxed) + half < *started && begun.elapsed() < length {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        if begun.elapsed() > length + PATIENCE {
            return Err(Error::TooSlow("the steady load", PATIENCE.as_secs()));
        }
    }
    Ok((steps.load(Ordering::Relaxed) - before) as f64 / begun.elapsed().as_secs_f64())
}
