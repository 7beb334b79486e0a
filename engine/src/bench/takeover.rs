//! `kill -9` of a worker that has its hands full, and what becomes of its runs.

use super::{
    Error, Options, Result,
    host::Host,
    limits::Commit,
    process::Worker,
    report::{Figure, Report},
    scene,
};
use chrono::{DateTime, Utc};
use serde_json::json;
use std::time::{Duration, Instant};

const RUNS: usize = 2_000;
const STEPS: usize = 5;
const STEP_MS: u64 = 400;
const LEASE: Duration = Duration::from_secs(5);
const PATIENCE: Duration = Duration::from_secs(300);

pub(super) async fn measure(host: &Host, options: &Options, commit: &Commit, report: &mut Report) -> Result<()> {
    let runs = options.share(RUNS);
    let slots = u32::try_from(runs + 48).unwrap_or(u32::MAX);
    let definition = scene::deploy(host, scene::naps(STEPS, STEP_MS)).await?;
    scene::start(host, definition, &json!({}), "", runs).await?;
    let victim = Worker::start(host, options, slots, LEASE).await?;
    let begun = Instant::now();
    // Everything is under way, and the first runs are in their third step.
    loop {
        let (owned, rows): (i64, i64) = sqlx::query_as(
            "select (select count(*) from runs where owner is not null), (select count(*) from history where seq >= 3)",
        )
        .fetch_one(&host.pool)
        .await?;
        if usize::try_from(owned).is_ok_and(|n| n >= runs * 9 / 10) && rows > 0 {
            break;
        }
        if begun.elapsed() > PATIENCE {
            return Err(Error::TooSlow("the claim of all runs", PATIENCE.as_secs()));
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let in_flight: i64 =
        sqlx::query_scalar("select count(*) from runs where owner is not null").fetch_one(&host.pool).await?;
    victim.kill().await?;
    let killed: DateTime<Utc> = sqlx::query_scalar("select clock_timestamp()").fetch_one(&host.pool).await?;
    let heir = Worker::start(host, options, slots, LEASE).await?;
    host.until_none("the end of all runs", scene::OPEN, PATIENCE).await?;
    heir.stop().await?;
    let (first, all): (f64, f64) = sqlx::query_as(
        "select extract(epoch from min(at) - $1)::float8, extract(epoch from max(at) - $1)::float8 from history
         where at > $1 and epoch > 1",
    )
    .bind(killed)
    .fetch_one(&host.pool)
    .await?;
    let (lost, wrong) = audit(host, runs).await?;
    report.figures.push(
        Figure::new("kill -9 to the first resumed step", first, "s")
            .limit("the lease", LEASE.as_secs_f64())
            .goal("within the lease of 5 s and 1 s", first <= LEASE.as_secs_f64() + 1.0)
            .counts_if(
                usize::try_from(in_flight).is_ok_and(|n| n >= RUNS * 9 / 10),
                format!("{in_flight} runs in flight, not {RUNS}"),
            )
            .detail("runs in flight", in_flight as f64, "")
            .detail("to the end of all runs", all, "s"),
    );
    report.figures.push(
        Figure::new("steps lost or done twice, attempts open or closed twice", wrong, "")
            .limit("rows of the single commits, lost or double", commit.lost)
            .goal("none", wrong == 0.0)
            .detail("attempts lost and repeated", lost, ""),
    );
    scene::reset(host).await
}

/// (attempts that were lost, what should not be).
async fn audit(host: &Host, runs: usize) -> Result<(f64, f64)> {
    let (lost, torn, steps): (i64, i64, i64) = sqlx::query_as(
        "with e as (select h.run_id, e from history h, jsonb_array_elements(h.events) e),
              a as (select e->>'attempt_id' as id,
                           count(*) filter (where e->>'type' = 'attempt_started') as started,
                           count(*) filter (where e->>'type' = 'attempt_ended') as ended
                    from e where e->>'type' in ('attempt_started', 'attempt_ended') group by 1)
         select (select count(*) from e where e->>'outcome' = 'lost'),
                (select count(*) from a where started <> 1 or ended <> 1),
                (select count(*) from (select run_id, e->>'path' from e where e->>'type' = 'attempt_ended'
                   and e->>'outcome' = 'succeeded' group by 1, 2 having count(*) = 1) s)",
    )
    .fetch_one(&host.pool)
    .await?;
    let gaps: i64 = sqlx::query_scalar(
        "select count(*) from runs r where status <> 'completed'
            or r.seq <> (select count(*) from history h where h.shard = r.shard and h.run_id = r.run_id)",
    )
    .fetch_one(&host.pool)
    .await?;
    let missing = (runs * STEPS) as f64 - steps as f64;
    Ok((lost as f64, torn as f64 + gaps as f64 + missing.abs()))
}
