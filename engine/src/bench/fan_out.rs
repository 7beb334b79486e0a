//! One run that does a thousand steps side by side and joins them.

use super::{
    Options, Result,
    host::Host,
    limits::Commit,
    process::Worker,
    report::{Figure, Report},
    scene,
};
use serde_json::json;
use std::time::Duration;

const WIDTH: u32 = 1_000;

pub(super) async fn measure(host: &Host, options: &Options, commit: &Commit, report: &mut Report) -> Result<()> {
    let width = u32::try_from(options.share(WIDTH as usize)).unwrap_or(WIDTH);
    let definition = scene::deploy(host, scene::fan_out(width)).await?;
    let worker = Worker::start(host, options, width, Duration::from_secs(15)).await?;
    let items: Vec<u32> = (0..width).collect();
    scene::start(host, definition, &json!({ "items": items }), "", 1).await?;
    host.until_none("the join", scene::OPEN, Duration::from_secs(300)).await?;
    worker.stop().await?;
    let (seconds, rows): (f64, i64) =
        sqlx::query_as("select extract(epoch from max(at) - min(at))::float8, count(*) from history")
            .fetch_one(&host.pool)
            .await?;
    let rate = f64::from(width) / seconds;
    report.figures.push(
        Figure::new("fan-out of 1,000 and join, one run", rate, "steps/s")
            .limit("a commit per step", 1000.0 / commit.p50)
            .detail("whole", seconds * 1000.0, "ms")
            .detail("transitions", rows as f64, ""),
    );
    scene::reset(host).await
}
