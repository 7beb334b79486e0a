//! What this Postgres does without an engine, by the same driver on the same connections.

use super::{
    Result,
    host::Host,
    process,
    report::{Figure, quantile},
    scene,
};
use crate::{
    ids::RunId,
    store::transitions::{self, Effects, Item, Verdict},
};
use serde_json::Value;
use std::time::{Duration, Instant};

/// How long the batch statement is repeated.
const BATCH_TIME: Duration = Duration::from_secs(3);
/// Inserts that are not timed.
const WARM_UP: usize = 20;

/// One insert per commit on one connection, in milliseconds.
#[derive(Clone, Copy, Debug)]
pub(super) struct Commit {
    pub(super) p50: f64,
    pub(super) p99: f64,
    /// Rows that were committed and are not there, or are there and were not.
    pub(super) lost: f64,
}

impl Commit {
    pub(super) fn figure(&self) -> Figure {
        Figure::new("one insert per commit, p50", self.p50, "ms").detail("p99", self.p99, "ms")
    }
}

/// Inserts single rows, a commit each.
pub(super) async fn commit(host: &Host, rows: usize) -> Result<Commit> {
    sqlx::query("create table if not exists bench_rows (id bigint generated always as identity primary key, at timestamptz not null default clock_timestamp(), body jsonb not null)")
        .execute(&host.pool).await?;
    let mut conn = host.pool.acquire().await?;
    let body = serde_json::json!([{"type": "step_ended", "path": "s1", "status": "succeeded", "output": 1}]);
    let mut times = Vec::with_capacity(rows);
    for _ in 0..rows + WARM_UP {
        let before = Instant::now();
        sqlx::query("insert into bench_rows (body) values ($1)").bind(&body).execute(&mut *conn).await?;
        times.push(before.elapsed().as_secs_f64() * 1000.0);
    }
    // The first ones prepare the statement and extend the table.
    times.drain(..WARM_UP);
    times.sort_by(f64::total_cmp);
    let there: i64 = sqlx::query_scalar("select count(*) from bench_rows").fetch_one(&mut *conn).await?;
    let lost = (there as f64 - (rows + WARM_UP) as f64).abs();
    Ok(Commit { p50: quantile(&times, 0.5), p99: quantile(&times, 0.99), lost })
}

/// What one transition costs in the engine's own batch statement, and nothing but it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Batch {
    /// Transitions a second.
    pub(super) rate: f64,
    /// Transitions of each commit.
    pub(super) size: usize,
    pub(super) wal_bytes: f64,
    /// Microseconds of Postgres.
    pub(super) postgres_cpu: f64,
    /// Microseconds of the process that sends it: the driver, and writing the parameters.
    pub(super) driver_cpu: f64,
}

/// The batch statement with the events of real transitions, on runs that nobody claims, on one connection.
pub(super) async fn batch(host: &Host, size: usize, events: &Value) -> Result<Batch> {
    let size = size.max(1);
    let definition = scene::deploy(host, scene::chain("raw", 1)).await?;
    let runs = scene::start(host, definition, &serde_json::json!({}), "raw", size * 4).await?;
    let mut conn = host.pool.acquire().await?;
    let events = transitions::text(events)?;
    let item = |run_id: RunId, seq: i64| Item {
        run_id,
        epoch: 0,
        seq,
        status: "running",
        parked: false,
        due: None,
        waiting: None,
        inbox_seen: 0,
        queue: "raw".into(),
        topic: None,
        cursor: None,
        format: crate::event::FORMAT,
        events: events.clone(),
        output: None,
        failure: None,
        effects: Effects::default(),
    };
    let (mut begun, mut committed, mut seq) = (Instant::now(), 0usize, 0);
    let (mut before, mut own) = (host.counters().await?, process::cpu_of_this());
    while begun.elapsed() < BATCH_TIME {
        for some in runs.chunks(size) {
            let items: Vec<Item> = some.iter().map(|run| item(*run, seq)).collect();
            let verdicts = transitions::send(&mut conn, None, &items).await?;
            if let Some(other) = verdicts.iter().find(|v| !matches!(v, Verdict::Accepted { .. })) {
                return Err(super::Error::failed("the batch statement alone", format!("{other:?}")));
            }
            committed += some.len();
        }
        if seq == 0 {
            // The first ones prepare the statement.
            (before, own) = (host.counters().await?, process::cpu_of_this());
            (begun, committed) = (Instant::now(), 0);
        }
        seq += 1;
    }
    let committed = committed as f64;
    let rate = committed / begun.elapsed().as_secs_f64();
    let (after, own) = (host.counters().await?, process::cpu_of_this() - own);
    let alone = Batch {
        rate,
        size,
        wal_bytes: (after.wal_bytes - before.wal_bytes) / committed,
        postgres_cpu: (after.postgres_cpu - before.postgres_cpu) * 1e6 / committed,
        driver_cpu: own * 1e6 / committed,
    };
    sqlx::query("delete from history where run_id in (select run_id from runs where queue = 'raw')")
        .execute(&mut *conn)
        .await?;
    sqlx::query("delete from ready where queue = 'raw'").execute(&mut *conn).await?;
    sqlx::query("delete from runs where queue = 'raw'").execute(&mut *conn).await?;
    Ok(alone)
}
