//! From the call that sends a signal to the first instruction of the step that waited for it.

use super::{
    Error, Options, Result,
    host::Host,
    limits::Commit,
    report::{Figure, Report, quantile},
    scene,
};
use crate::{client::Signal, worker};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

const SIGNALS: usize = 300;
const PATIENCE: Duration = Duration::from_secs(30);

pub(super) async fn measure(host: &Host, options: &Options, commit: &Commit, report: &mut Report) -> Result<()> {
    let signals = options.share(SIGNALS);
    let definition = scene::deploy(host, scene::listener()).await?;
    let (resumed, mut told) = tokio::sync::mpsc::unbounded_channel();
    // In this process: one clock for both ends.
    let registry = scene::registry_of(move |run| {
        // Nobody listens any more when the measurement has failed.
        let _ = resumed.send((run, Instant::now()));
    });
    let worker = worker::start(worker::WorkerConfig::new(host.pool.clone(), registry)).await?;
    let runs = scene::start(host, definition, &json!({}), "", signals).await?;
    let working = "select count(*) from runs where not parked or seq = 0";
    host.until_none("the park of all runs", working, PATIENCE).await?;
    let mut times = Vec::with_capacity(signals);
    for run in runs {
        let before = Instant::now();
        let signal = Signal { name: "go".into(), payload: Value::Null, dedupe_id: None, sender: None };
        host.client.signal(run, signal).await?;
        let (who, at) = tokio::time::timeout(PATIENCE, told.recv())
            .await
            .ok()
            .flatten()
            .ok_or(Error::TooSlow("the resumption of a run", PATIENCE.as_secs()))?;
        if who != run {
            return Err(Error::failed("signal to resumed step", "another run was resumed"));
        }
        times.push(at.duration_since(before).as_secs_f64() * 1000.0);
        // Let it end: the next one should find a worker that has nothing to do.
        host.client.wait_change(run, 2, PATIENCE).await?;
    }
    worker.drain(PATIENCE).await;
    times.sort_by(f64::total_cmp);
    let (p50, p99) = (quantile(&times, 0.5), quantile(&times, 0.99));
    report.figures.push(
        Figure::new("signal to resumed step, p99", p99, "ms")
            .limit("one insert per commit, p99", commit.p99)
            .goal("below 3 commits (their p99)", p99 < 3.0 * commit.p99)
            .detail("p50", p50, "ms"),
    );
    scene::reset(host).await
}
