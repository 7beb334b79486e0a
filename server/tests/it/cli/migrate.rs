//! Many runs in flight go on under another version: in pages, each with its verdict.

use super::shell::Shell;
use loopwright_engine::{
    activity::Registry,
    client::Client,
    hook::NoHook,
    worker::{self, WorkerConfig},
};
use serde_json::{Value, json};
use std::{collections::BTreeSet, sync::Arc, time::Duration};

const FIRST: &str = "dsl: 1
name: greet
steps:
  - { id: ear, await: { signal: go, timeout: 1h } }
  - { id: last, set: { said: bye } }
";

fn ids(page: &Value) -> Vec<String> {
    page["runs"].as_array().unwrap().iter().map(|run| run["run_id"].as_str().unwrap().to_owned()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_runs_are_migrated_in_pages_and_each_has_its_verdict() {
    let shell = Shell::new().await;
    shell.deploy("greet.yaml", FIRST).await;
    shell.deploy("other.yaml", &FIRST.replace("greet", "other")).await;
    let worker = worker::start(WorkerConfig::new(shell.pool.clone(), Registry::new())).await.unwrap();
    let client = Client::new(shell.pool.clone(), Arc::new(NoHook));
    let mut all = BTreeSet::new();
    for n in 0..6 {
        let run = shell.start(if n < 5 { "greet" } else { "other" }, &[]).await;
        let deadline = tokio::time::Instant::now() + Duration::from_secs(120);
        loop {
            let view = client.describe(run.parse().unwrap()).await.unwrap();
            if !view.waiting.is_empty() {
                break;
            }
            assert!(tokio::time::Instant::now() < deadline, "{view:#?}");
            client.wait_change(run.parse().unwrap(), view.seq, Duration::from_secs(1)).await.unwrap();
        }
        if n < 5 {
            all.insert(run);
        }
    }
    shell.deploy("greet.yaml", &FIRST.replace("bye", "good night")).await;
    shell.deploy("greet.yaml", &FIRST.replace("  - { id: ear, await: { signal: go, timeout: 1h } }\n", "")).await;

    let of_greet = ["run", "migrate", "--where", "workflow = 'greet'"];
    let page = async |more: &[&str]| shell.json(&[&of_greet[..], more].concat()).await;
    // Asked first, in pages of two.
    let (mut seen, mut pages, mut after) = (Vec::new(), 0, None::<String>);
    loop {
        let cursor = after.iter().flat_map(|run| ["--after", run.as_str()]);
        let asked: Vec<&str> = ["--to", "v2", "--dry-run", "--limit", "2"].into_iter().chain(cursor).collect();
        let found = page(&asked).await;
        assert!(found["runs"].as_array().unwrap().iter().all(|run| run["outcome"] == "possible"), "{found}");
        seen.extend(ids(&found));
        pages += 1;
        match found["next_after"].as_str() {
            Some(next) => after = Some(next.to_owned()),
            None => break,
        }
    }
    assert_eq!((pages, seen.len(), seen.iter().cloned().collect::<BTreeSet<_>>()), (3, 5, all.clone()));

    let first = page(&["--to", "v2", "--limit", "3"]).await;
    assert_eq!((&first["outcomes"], &ids(&first)[..]), (&json!({"migrated": 3}), &seen[..3]), "{first}");
    // Whoever does not know how far it came gives it again.
    let again = page(&["--to", "v2", "--limit", "3"]).await;
    assert_eq!(again["outcomes"], json!({"unchanged": 3}));
    let rest = page(&["--to", "v2", "--after", first["next_after"].as_str().unwrap()]).await;
    assert_eq!((&rest["outcomes"], rest.get("next_after")), (&json!({"migrated": 2}), None), "{rest}");

    // What cannot be says why, by codes, and what to do.
    let args = [&of_greet[..], &["--to", "v3", "--json"]].concat();
    let refused = shell.run(&args).await;
    assert_eq!(refused.code, Some(1), "{refused:?}");
    let told: Value = serde_json::from_str(&refused.stdout).unwrap();
    assert_eq!(told["outcomes"], json!({"migration_invalid": 5}));
    let one = &told["runs"][0];
    assert_eq!((&one["code"], &one["why"][0]["rule"]), (&json!("migration_invalid"), &json!("step_missing")), "{one}");
    assert!(one["remedy"].as_str().unwrap().contains("--map"), "{one}");
    let plain = shell.run(&args[..args.len() - 1]).await;
    for word in ["migration_invalid", "what to do", "`ear`", "5 runs: 5 migration_invalid"] {
        assert!(plain.stdout.contains(word), "{word}: {plain:?}");
    }
    // A workflow that has no such version is told so; the others are looked at nevertheless.
    let mixed = shell.run(&["run", "migrate", "--where", "status != 'completed'", "--to", "v2", "--json"]).await;
    let told: Value = serde_json::from_str(&mixed.stdout).unwrap();
    assert_eq!((mixed.code, &told["outcomes"]), (Some(1), &json!({"definition_not_found": 1, "unchanged": 5})));
    let none = shell.run(&["run", "migrate", "--where", "workflow = 'nobody'", "--to", "v2"]).await;
    assert_eq!((none.code, none.stdout.as_str()), (Some(0), "No open run matches.\n"), "{none:?}");

    let run = seen[0].as_str();
    let refused = shell.run(&["run", "migrate", run, "--to", "v3"]).await;
    assert!(refused.code == Some(1) && refused.stdout.contains("[migration_invalid]"), "{refused:?}");
    let back = shell.json(&["workflow", "migrate", run, "--to", "v1"]).await;
    assert_eq!(back["outcome"], "migrated", "{back}");
    worker.drain(Duration::from_secs(10)).await;
}
