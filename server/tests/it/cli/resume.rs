//! Many runs go on after an outage: in pages, each with its verdict.

use super::shell::Shell;
use loopwright_engine::{
    activity::Registry,
    client::Client,
    hook::NoHook,
    view::{RunStatus, RunView},
    worker::{self, WorkerConfig},
};
use serde_json::{Value, json};
use std::{sync::Arc, time::Duration};

const WAITS: &str = "dsl: 1
name: waits
steps:
  - { id: ear, await: { signal: go, timeout: 1h } }
";

async fn until(client: &Client, run: &str, wanted: impl Fn(&RunView) -> bool) {
    let run = run.parse().unwrap();
    let deadline = tokio::time::Instant::now() + Duration::from_secs(120);
    loop {
        let view = client.describe(run).await.unwrap();
        if wanted(&view) {
            return;
        }
        assert!(tokio::time::Instant::now() < deadline, "{view:#?}");
        client.wait_change(run, view.seq, Duration::from_millis(200)).await.unwrap();
    }
}

fn of<'a>(page: &'a Value, run: &str) -> &'a Value {
    page["runs"].as_array().unwrap().iter().find(|verdict| verdict["run_id"] == run).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_runs_go_on_in_pages_and_each_has_its_verdict() {
    let shell = Shell::new().await;
    shell.deploy("waits.yaml", WAITS).await;
    shell.deploy("other.yaml", &WAITS.replace("waits", "other")).await;
    let worker = worker::start(WorkerConfig::new(shell.pool.clone(), Registry::new())).await.unwrap();
    let client = Client::new(shell.pool.clone(), Arc::new(NoHook));
    let mut runs = Vec::new();
    for workflow in ["waits", "waits", "waits", "waits", "waits", "other"] {
        let run = shell.start(workflow, &[]).await;
        until(&client, &run, |v| !v.waiting.is_empty()).await;
        runs.push(run);
    }
    let [going, paused, aside, aside_too, broken, other] = &runs[..] else { panic!("{runs:?}") };
    assert_eq!(shell.run(&["run", "pause", paused]).await.code, Some(0));
    until(&client, paused, |v| v.status == RunStatus::Paused).await;
    for run in [aside, aside_too, broken, other] {
        // As an invariant that breaks does it.
        sqlx::query(
            "with q as (update runs set status = 'quarantined', owner = null, parked = true, epoch = epoch + 1, waiting = 'a test'
                        where run_id = $1::uuid returning shard, run_id)
             delete from ready r using q where r.shard = q.shard and r.run_id = q.run_id",
        )
        .bind(run)
        .execute(&shell.pool)
        .await
        .unwrap();
    }
    let (deleted,): (i64,) = sqlx::query_as(
        "with d as (delete from history where run_id = $1::uuid and seq = 1 returning 1) select count(*) from d",
    )
    .bind(broken)
    .fetch_one(&shell.pool)
    .await
    .unwrap();
    assert_eq!(deleted, 1, "its history cannot be folded any more");

    let all = ["run", "resume", "--where", "workflow = 'waits'", "--json"];
    let page = async |more: &[&str]| {
        let done = shell.run(&[&all[..], more].concat()).await;
        let page: Value = serde_json::from_str(&done.stdout).unwrap_or_else(|e| panic!("{e}: {done:?}"));
        (done.code, page)
    };
    let (code, asked) = page(&["--dry-run"]).await;
    assert_eq!(
        (code, &asked["outcomes"]),
        (Some(1), &json!({"invariant": 1, "possible": 3, "unchanged": 1})),
        "{asked}"
    );
    assert_eq!(asked["dry_run"], true);
    let aside_still: i64 = sqlx::query_scalar("select count(*) from runs where status = 'quarantined'")
        .fetch_one(&shell.pool)
        .await
        .unwrap();
    assert_eq!(aside_still, 4, "a dry run changes nothing");

    // Newest first: the broken one and one of those set aside; then the rest.
    let (code, first) = page(&["--limit", "2", "--reason", "the disk is back"]).await;
    assert_eq!((code, &first["outcomes"]), (Some(1), &json!({"invariant": 1, "released": 1})), "{first}");
    let refused = of(&first, broken);
    assert!(refused["outcome"] == "refused" && refused["remedy"].as_str().unwrap().contains("gap"), "{refused}");
    let (code, rest) = page(&["--after", first["next_after"].as_str().unwrap()]).await;
    assert_eq!((code, rest.get("next_after")), (Some(0), None), "{rest}");
    for (run, outcome) in [(going, "unchanged"), (paused, "resumed"), (aside, "released")] {
        assert_eq!(of(&rest, run)["outcome"], outcome, "{rest}");
    }
    for run in [going, paused, aside, aside_too] {
        until(&client, run, |v| v.status == RunStatus::Running).await;
    }
    let history = shell.run(&["run", "history", aside_too]).await;
    assert!(history.stdout.contains("run_resumed the disk is back"), "{history:?}");
    // Twice is once.
    let (_, again) = page(&[]).await;
    assert_eq!(again["outcomes"], json!({"invariant": 1, "unchanged": 4}), "{again}");
    // Nobody has asked for the other workflow's.
    let one = shell.json(&["run", "resume", other]).await;
    assert_eq!(one, json!({"status": "accepted", "was_quarantined": true}));
    let none = shell.run(&["run", "resume", "--where", "workflow = 'nobody'"]).await;
    assert_eq!((none.code, none.stdout.as_str()), (Some(0), "No open run matches.\n"), "{none:?}");
    worker.drain(Duration::from_secs(10)).await;
}
