//! Very many runs that sleep, and their common awakening.

use super::{
    Options, Result,
    host::Host,
    limits::Batch,
    process::Worker,
    report::{Figure, Report, quantile},
    scene,
};
use chrono::{DateTime, Utc};
use serde_json::json;
use std::time::{Duration, Instant};

const SLOTS: u32 = 512;
const LEASE: Duration = Duration::from_secs(15);
const PATIENCE: Duration = Duration::from_secs(1_800);
const LAG_GOAL: f64 = 5.0;
/// Runs that are not asleep yet.
const AWAKE: &str = "select count(*) from runs where not parked or seq = 0";

/// Runs that are due and nobody's, one at most.
const DUE: &str =
    "select count(*) from (select from ready where queue = 'default' and due_at <= (select engine_now()) limit 1) due";

pub(super) async fn measure(
    host: &Host,
    options: &Options,
    alone: &Batch,
    progress: &dyn Fn(&str),
    report: &mut Report,
) -> Result<()> {
    let runs = if options.percent < 100 { options.share(options.parked) } else { options.parked };
    let definition = scene::deploy(host, scene::sleeper()).await?;
    let worker = Worker::start(host, options, SLOTS, LEASE).await?;
    let idle = Worker::idle(host, options).await?;
    // How fast do they fall asleep? The instant of the awakening must be named before they are started.
    let trial = (runs / 20).max(200);
    let begun = Instant::now();
    let far = json!({ "at": (Utc::now() + chrono::Duration::hours(24)).to_rfc3339() });
    scene::start(host, definition, &far, "", trial).await?;
    host.until_none("the park of some runs", AWAKE, PATIENCE).await?;
    let rate = trial as f64 / begun.elapsed().as_secs_f64();
    let now: DateTime<Utc> = sqlx::query_scalar("select engine_now()").fetch_one(&host.pool).await?;
    let needed = Duration::from_secs_f64(runs as f64 / rate * 1.6) + Duration::from_secs(5);
    let at = now + needed;
    progress(&format!("parked runs: they wake in {} s", needed.as_secs()));
    let begun = Instant::now();
    let at_instant = json!({ "at": at.to_rfc3339() });
    scene::start(host, definition, &at_instant, "", runs / 2).await?;
    host.until_none("the park of half of the runs", AWAKE, PATIENCE).await?;
    // The allocator has its working set by now: what the second half adds is what parked runs cost.
    let (half, _) = worker.memory_mb();
    let (idle_half, _) = idle.memory_mb();
    scene::start(host, definition, &at_instant, "", runs - runs / 2).await?;
    host.until_none("the park of all runs", AWAKE, PATIENCE).await?;
    let parked_in = begun.elapsed().as_secs_f64();
    let (full, _) = worker.memory_mb();
    let (idle_full, _) = idle.memory_mb();
    idle.stop().await?;
    let early: bool = sqlx::query_scalar("select engine_now() < $1").bind(at).fetch_one(&host.pool).await?;
    if !early {
        return Err(super::Error::failed(
            "parked runs",
            "the machine is too slow today: not all slept in time; use fewer",
        ));
    }
    progress("parked runs: the awakening");
    tokio::time::sleep(needed.saturating_sub(begun.elapsed())).await;
    let trial = i64::try_from(trial).unwrap_or(i64::MAX);
    // Counting all runs takes a seventh of a processor: not while they wake.
    host.until_none("the awakening", DUE, PATIENCE).await?;
    loop {
        let open: i64 = sqlx::query_scalar(scene::OPEN).fetch_one(&host.pool).await?;
        if open <= trial {
            break;
        }
        if begun.elapsed() > PATIENCE {
            return Err(super::Error::TooSlow("the awakening", PATIENCE.as_secs()));
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    let (_, most) = worker.memory_mb();
    worker.kill().await?;
    let lags: Vec<f64> =
        sqlx::query_scalar("select extract(epoch from at - $1)::float8 as lag from history where seq = 2 order by lag")
            .bind(at)
            .fetch_all(&host.pool)
            .await?;
    let (p50, p99, last) = (quantile(&lags, 0.5), quantile(&lags, 0.99), quantile(&lags, 1.0));
    report.figures.push(
        Figure::new("lag of timers at one instant, p99", p99, "s")
            .limit("one transition each, by the batch statement alone", 0.99 * lags.len() as f64 / alone.rate)
            .goal("below 5 s (of 100,000)", p99 < LAG_GOAL)
            .counts_if(lags.len() >= super::PARKED, format!("{} runs, not {}", lags.len(), super::PARKED))
            .detail("runs", lags.len() as f64, "")
            .detail("p50", p50, "s")
            .detail("last", last, "s")
            .detail("woken and closed", lags.len() as f64 / last, "/s")
            .detail("started and parked", runs as f64 / parked_in, "/s"),
    );
    let grown = |half: f64, full: f64| (full - half) * 1024.0 * 1024.0 / (runs - runs / 2) as f64;
    let (each, without) = (grown(half, full), grown(idle_half, idle_full));
    report.figures.push(
        // Noise of an allocator is some hundred kilobytes; a run that stayed would cost kilobytes.
        Figure::new("memory of a parked run", if each < 0.0 { 0.0 } else { each }, "bytes")
            .limit("growth of an idle process meanwhile", if without < 0.0 { 0.0 } else { without })
            .goal("nothing: below 200 bytes", each < 200.0)
            .detail("worker with half of them parked", half, "MB")
            .detail("worker with all parked", full, "MB")
            .detail("worker, most", most, "MB"),
    );
    scene::reset(host).await
}
