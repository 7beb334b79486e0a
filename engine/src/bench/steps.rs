//! No-op steps: as many as go, and one after the other.

use super::{
    Options, Result,
    host::{Host, POOL_MAX},
    limits::{self, Batch, Commit},
    process::Worker,
    report::{Figure, Report, quantile},
    scene,
};
use serde_json::{Value, json};
use std::time::Duration;

const RUNS: usize = 4_000;
const STEPS: usize = 10;
/// Attempts that run side by side: enough for a full batch to wait while another one is under way.
const SLOTS: u32 = 512;
/// The committer's most.
const BATCH: usize = 256;
const LEASE: Duration = Duration::from_secs(15);
const PATIENCE: Duration = Duration::from_secs(600);
/// Runs and steps of the measurement of one step.
const ALONE: (usize, usize) = (20, 25);

/// Many runs of ten no-op steps, all there before the worker starts. Gives the batch statement alone, full and of one transition.
pub(super) async fn many(host: &Host, options: &Options, report: &mut Report) -> Result<(Batch, Batch)> {
    let runs = options.share(RUNS);
    let definition = scene::deploy(host, scene::chain("chain", STEPS)).await?;
    scene::start(host, definition, &json!({}), "", runs).await?;
    host.settle().await;
    let (before, written) = (host.counters().await?, host.written().await?);
    let worker = Worker::start(host, options, SLOTS, LEASE).await?;
    host.until_none("the end of all runs", scene::OPEN, PATIENCE).await?;
    let (engine_cpu, memory) = (worker.cpu(), worker.memory_mb());
    worker.stop().await?;
    let written = host.written().await? - written;
    let idle = Worker::idle(host, options).await?;
    let (_, idle_memory) = idle.memory_mb();
    idle.stop().await?;
    host.settle().await;
    let after = host.counters().await?;
    let (seconds, rows): (f64, i64) =
        sqlx::query_as("select extract(epoch from max(at) - min(at))::float8, count(*) from history")
            .fetch_one(&host.pool)
            .await?;
    // Every transaction that committed transitions, once. The server's own count holds the reads as well.
    let batches: i64 =
        sqlx::query_scalar("select count(distinct xmin::text) from history").fetch_one(&host.pool).await?;
    let events: Value =
        sqlx::query_scalar("select events from history where seq = 5 limit 1").fetch_one(&host.pool).await?;
    let steps = (runs * STEPS) as f64;
    let transitions = rows as f64 / seconds;
    let (alone, single) = (limits::batch(host, BATCH, &events).await?, limits::batch(host, 1, &events).await?);
    let (commits, written) = (batches as f64 / steps, written as f64 / steps);
    // The statement is of one transition; a run has one more than it has steps.
    let each = rows as f64 / steps;
    let transactions = (after.commits - before.commits) / steps;
    let wal = (after.wal_bytes - before.wal_bytes) / steps;
    let postgres_cpu = (after.postgres_cpu - before.postgres_cpu) * 1e6 / steps;
    let engine_cpu = engine_cpu * 1e6 / steps;
    report.figures.push(
        Figure::new("transitions/s, many runs of 10 no-op steps", transitions, "/s")
            .limit("batch statement alone, 256 a batch", alone.rate)
            .goal("at least half of the limit", transitions >= alone.rate / 2.0)
            .detail("no-op steps", steps / seconds, "/s")
            .detail("runs", runs as f64 / seconds, "/s"),
    );
    report.figures.push(
        Figure::new("commits of transitions per step, loaded", commits, "")
            .limit("full batches", each / alone.size as f64)
            .goal("below 0.02", commits < 0.02)
            .detail("transitions per commit", rows as f64 / batches as f64, "")
            .detail("transactions per step, reads included", transactions, ""),
    );
    // Claims, closed runs and heartbeats too: whatever waits for the disk, or could.
    report.figures.push(
        Figure::new("transactions that write, per step, loaded", written, "")
            .limit("full batches", each / alone.size as f64)
            .goal("below 0.02", written < 0.02),
    );
    report.figures.push(
        Figure::new("WAL per step", wal, "bytes")
            .limit("batch statement alone", each * alone.wal_bytes)
            .goal("below 1,000 bytes", wal < 1_000.0),
    );
    report.figures.push(
        Figure::new("CPU of the worker per step", engine_cpu, "µs")
            .limit("sending the batch statement", each * alone.driver_cpu)
            .goal("below 10 µs", engine_cpu < 10.0),
    );
    report.figures.push(
        Figure::new("CPU of Postgres per step", postgres_cpu, "µs")
            .limit("batch statement alone", each * alone.postgres_cpu)
            .goal("below 10 µs", postgres_cpu < 10.0),
    );
    report.figures.push(
        Figure::new("memory of the worker, most", memory.1, "MB")
            .limit("the same process with its connections, idle", idle_memory)
            .detail("connections", f64::from(POOL_MAX), ""),
    );
    scene::reset(host).await?;
    Ok((alone, single))
}

/// One run at a time, one step at a time.
pub(super) async fn sequential(
    host: &Host,
    options: &Options,
    commit: &Commit,
    single: &Batch,
    report: &mut Report,
) -> Result<()> {
    let (runs, steps) = (options.share(ALONE.0), ALONE.1);
    let definition = scene::deploy(host, scene::chain("alone", steps)).await?;
    let worker = Worker::start(host, options, 8, LEASE).await?;
    for _ in 0..runs {
        scene::start(host, definition, &json!({}), "", 1).await?;
        host.until_none("the end of a run", scene::OPEN, PATIENCE).await?;
    }
    worker.stop().await?;
    // From the second transition on: before it stands the claim.
    let times: Vec<f64> = sqlx::query_scalar::<_, Option<f64>>(
        "select 1000 * extract(epoch from at - lag(at) over (partition by run_id order by seq))::float8 as ms from history order by ms",
    )
    .fetch_all(&host.pool)
    .await?
    .into_iter()
    .flatten()
    .collect();
    let (p50, p99) = (quantile(&times, 0.5), quantile(&times, 0.99));
    report.figures.push(
        Figure::new("a sequential step, p50", p50, "ms")
            .limit("one insert per commit, p50", commit.p50)
            .goal("at most 1.3 times the limit", p50 <= 1.3 * commit.p50)
            .detail("p99", p99, "ms")
            .detail("batch statement alone, one transition, mean", 1000.0 / single.rate, "ms"),
    );
    scene::reset(host).await
}
