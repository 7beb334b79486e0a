//! How much waits in the queues, as metrics for whoever adds and removes workers.

use crate::{
    store::{ready, spread::Spread},
    transaction::{ANSWER_MAX, Session, answered},
};
use sqlx::PgPool;
use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

/// How often a process looks. Whoever scales by it looks less often.
const LOOK_EVERY: Duration = Duration::from_secs(10);
/// A look that took so long is repeated after at least this many times as long, and after [`REST_MAX`]: beside a pinned snapshot it
/// reads what was claimed since.
const REST: u32 = 50;
const REST_MAX: Duration = Duration::from_secs(60);

/// Sets the gauges of all queues, for ever. `queues` are those that must be 0 when they are empty, and not absent.
pub async fn publish_queue_depths(pool: PgPool, queues: Vec<String>) {
    let mut known: BTreeSet<String> = queues.into_iter().collect();
    let (mut spread, mut session) = (None, Session::like(&pool));
    loop {
        let began = Instant::now();
        let depths = async {
            let spread = match spread {
                Some(spread) => spread,
                None => *spread.insert(answered(ANSWER_MAX, Spread::of(&pool)).await?),
            };
            ready::depths(&mut session, spread).await
        };
        match depths.await {
            Ok(depths) => {
                let empty = known.iter().filter(|queue| !depths.iter().any(|d| d.queue == **queue));
                empty.for_each(|queue| set(queue, 0, 0.0));
                depths.iter().for_each(|d| set(&d.queue, d.due, d.oldest_s));
                known.extend(depths.into_iter().map(|d| d.queue));
            }
            Err(error) => tracing::debug!(%error, "cannot look how much waits"),
        }
        let rest = LOOK_EVERY.max((began.elapsed() * REST).min(REST_MAX));
        tokio::time::sleep(rest.mul_f64(0.75 + fastrand::f64() / 2.0)).await;
    }
}

#[expect(clippy::cast_precision_loss, reason = "a gauge of at most 10,001")]
fn set(queue: &str, due: i64, oldest_s: f64) {
    metrics::gauge!("loopwright_queue_due_runs", "queue" => queue.to_owned()).set(due as f64);
    metrics::gauge!("loopwright_queue_oldest_seconds", "queue" => queue.to_owned()).set(oldest_s);
}
