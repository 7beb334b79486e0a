//! What a server tells whoever scales workers.

use crate::processes::{GUARD, Stage};
use loopwright_engine::{
    client::{Client, Start},
    hook::NoHook,
    ids::RunId,
};
use serde_json::json;
use std::{net::SocketAddr, sync::Arc, time::Instant};

/// A gauge of a queue, as a scraper reads it.
async fn gauge(stage: &Stage, server: SocketAddr, name: &str, queue: &str) -> Option<f64> {
    let text = stage.http.get(format!("http://{server}/metrics")).send().await.unwrap().text().await.unwrap();
    let line = format!("{name}{{queue=\"{queue}\"}} ");
    text.lines().find_map(|found| found.strip_prefix(&line)).map(|value| value.parse().unwrap())
}

/// No worker has a listener: what waits for them is read from the database, by every server.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_tells_how_much_waits_in_each_queue_and_for_how_long() {
    let mut stage = Stage::new().await;
    let client = Client::new(stage.pool.clone(), Arc::new(NoHook));
    let definition = client.pointer("dev-loop", "current").await.unwrap();
    let mut runs = Vec::new();
    for queue in ["", "", "large"] {
        let start = Start {
            run_id: None,
            definition,
            inputs: json!({"project_id": RunId::new().0, "idea": "A script."}),
            workflow_id: None,
            attributes: json!({}),
            queue: queue.into(),
            topic: None,
            admission: Default::default(),
        };
        runs.push(client.start(start).await.unwrap().run_id);
    }
    sqlx::query("update ready set due_at = engine_now() - interval '1 hour' where queue = 'large'")
        .execute(&stage.pool)
        .await
        .unwrap();
    let (_server, address) = stage.server(10_000).await;
    let (due, oldest) = ("loopwright_queue_due_runs", "loopwright_queue_oldest_seconds");
    let until = async |name: &str, queue: &str, holds: fn(f64) -> bool| {
        let began = Instant::now();
        loop {
            match gauge(&stage, address, name, queue).await {
                Some(value) if holds(value) => return,
                seen => assert!(began.elapsed() < GUARD, "{name} of {queue}: {seen:?}"),
            }
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
    };
    until(due, "default", |n| n == 2.0).await;
    until(due, "large", |n| n == 1.0).await;
    until(oldest, "large", |age| (3_600.0..4_000.0).contains(&age)).await;
    until(oldest, "default", |age| (0.0..600.0).contains(&age)).await;
    // What is empty is 0, and not gone: whoever scales down by it sees a number.
    for run in runs {
        client.terminate(run, "enough").await.unwrap();
    }
    for queue in ["default", "large"] {
        until(due, queue, |n| n == 0.0).await;
        until(oldest, queue, |age| age == 0.0).await;
    }
}
