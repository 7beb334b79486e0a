//! Children on a real database when their parent closes.

use crate::bench::{Bench, definition, gated, step, work};
use loopwright_engine::{
    definition::{CallVersion, Kind, ParentClose, Step},
    ids::RunId,
    view::{RunStatus, Waiting},
};
use serde_json::json;
use std::{collections::BTreeMap, time::Duration};

const GRACE: Duration = Duration::from_secs(10);

fn call(parent_close: ParentClose) -> Step {
    let (workflow, version, with) = ("child".into(), CallVersion::Latest, BTreeMap::new());
    step("c", Kind::Call { workflow, version, with, parent_close })
}

async fn child_of(bench: &Bench, run: RunId) -> RunId {
    let view = bench.until(run, "calls", |v| v.waiting.iter().any(|w| matches!(w, Waiting::Child { .. }))).await;
    view.waiting
        .iter()
        .find_map(|w| if let Waiting::Child { run_id, .. } = w { Some(*run_id) } else { None })
        .expect("a child")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_child_ends_with_its_parent_as_the_call_says() {
    let (bench, gate) = gated().await;
    let mut child = definition("child", vec![work("w", &[])]);
    child.finally = vec![work("clean", &[])];
    bench.deploy(child).await;
    let worker = bench.worker().await;
    for (how, terminated, wanted) in [
        (ParentClose::Cancel, false, RunStatus::Cancelled),
        (ParentClose::Cancel, true, RunStatus::Cancelled),
        (ParentClose::Terminate, false, RunStatus::Terminated),
        (ParentClose::Terminate, true, RunStatus::Terminated),
        (ParentClose::Abandon, false, RunStatus::Completed),
        (ParentClose::Abandon, true, RunStatus::Completed),
    ] {
        let run = bench.start(definition("parent", vec![call(how)]), json!({})).await;
        let child = child_of(&bench, run).await;
        gate.arrived(1).await;
        if terminated {
            bench.client.terminate(run, "enough").await.expect("terminated");
        } else {
            bench.client.cancel(run, "enough").await.expect("cancelled");
        }
        bench.closed(run).await;
        if how == ParentClose::Abandon {
            gate.open(1);
        }
        assert_eq!(bench.closed(child).await.status, wanted, "{how:?}, {terminated}");
        assert_eq!(bench.client.replay(run, None).await.expect("replays").divergence, None);
        assert_eq!(bench.client.replay(child, None).await.expect("replays").divergence, None);
    }
    let cleaned: i64 =
        sqlx::query_scalar("select count(*) from history where events @> '[{\"type\": \"finally_started\"}]'")
            .fetch_one(&bench.pool)
            .await
            .expect("count");
    assert_eq!(cleaned, 4, "whoever is terminated does not clean up");
    worker.drain(GRACE).await;
    bench.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_child_whose_worker_died_ends_with_its_parent() {
    let (bench, gate) = gated().await;
    bench.deploy(definition("child", vec![work("w", &[])])).await;
    let first = bench.worker().await;
    let run = bench.start(definition("parent", vec![call(ParentClose::Terminate)]), json!({})).await;
    let child = child_of(&bench, run).await;
    gate.arrived(1).await;
    bench.client.pause(child, loopwright_engine::client::Why::default()).await.expect("paused");
    bench.until(child, "paused", |v| v.status == RunStatus::Paused).await;
    bench.dies(first).await;
    bench.client.terminate(run, "enough").await.expect("terminated");
    let second = bench.worker().await;
    assert_eq!(bench.closed(child).await.status, RunStatus::Terminated);
    assert_eq!(bench.client.replay(child, None).await.expect("replays").divergence, None);
    second.drain(GRACE).await;
    bench.audit().await;
}
