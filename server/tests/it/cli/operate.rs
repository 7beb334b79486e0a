//! A run is asked, answered, watched and ended from the command line.

use super::{
    loopwright,
    shell::{COMMAND_MAX, Shell},
};
use loopwright_engine::{
    activity::Registry,
    worker::{self, WorkerConfig},
};
use serde_json::json;
use std::{process::Stdio, time::Duration};
use tokio::io::{AsyncBufReadExt, BufReader};

const TALKS: &str = "dsl: 1
name: talks
steps:
  - { id: ear, await: { signal: hello, timeout: 1h, reply: { heard: \"${{ signal.text }}\" } } }
  - { id: ok, approve: { timeout: 1h } }
outputs: { words: \"${{ steps.ear.output.text }}\" }
queries: { heard: \"${{ default(steps.ear.output.text, 'nothing') }}\" }
";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_is_watched_asked_answered_and_ended_from_the_command_line() {
    let shell = Shell::new().await;
    shell.deploy("talks.yaml", TALKS).await;
    let worker = worker::start(WorkerConfig::new(shell.pool.clone(), Registry::new())).await.unwrap();
    let run = shell.start("talks", &[]).await;
    // It comes back when the run waits for somebody.
    let watched = shell.run(&["run", "watch", &run]).await;
    assert!(watched.code == Some(0) && watched.stdout.contains("step_started ear"), "{watched:?}");
    assert_eq!(shell.json(&["run", "query", &run, "heard"]).await["result"], "nothing");
    let answer = shell.run(&["run", "update", &run, "hello", "{\"text\": \"hi\"}", "--id", "u1"]).await;
    assert!(answer.code == Some(0) && answer.stdout.contains("\"heard\": \"hi\""), "{answer:?}");
    assert_eq!(shell.json(&["run", "query", &run, "heard"]).await["result"], "hi");
    let decided = shell.json(&["run", "approve", &run, "--comment", "fine"]).await;
    assert_eq!(decided, json!({"status": "accepted", "step": "ok"}));
    let watched = shell.run(&["run", "watch", &run]).await;
    assert!(watched.code == Some(0) && watched.stdout.contains("completed"), "{watched:?}");
    let history = shell.run(&["run", "history", &run]).await;
    assert!(history.stdout.lines().last().unwrap().contains("run_closed completed"), "{history:?}");
    let shown = shell.json(&["run", "show", &run]).await;
    assert_eq!(shown["output"], json!({"words": "hi"}));
    // The end of a history is no error.
    let rest = shell.run(&["run", "history", &run, "--after", &shown["seq"].to_string()]).await;
    assert_eq!((rest.code, rest.stdout.as_str()), (Some(0), ""), "{rest:?}");

    let forecast = shell.run(&["run", "forecast", &run]).await;
    assert!(forecast.code == Some(0) && forecast.stdout.contains("together"), "{forecast:?}");
    let quality = shell.run(&["run", "forecast"]).await;
    assert_eq!(quality.stdout, "No part of a closed run had a forecast.\n", "{quality:?}");

    for (command, more, end) in [
        ("cancel", &[][..], "cancelled"),
        ("cancel", &["--within", "10m"], "cancelled"),
        ("terminate", &[], "terminated"),
    ] {
        let run = shell.start("talks", &[]).await;
        let done = shell.run(&[&["run", command, &run, "--reason", "enough"], more].concat()).await;
        assert_eq!(done.code, Some(0), "{done:?}");
        let watched = shell.run(&["run", "watch", &run]).await;
        assert!(watched.stdout.trim_end().lines().last().unwrap().starts_with(end), "{watched:?}");
    }
    let limited = shell.start("talks", &[]).await;
    let nobody = shell.run(&["run", "limit", &limited, "5"]).await;
    assert_eq!((nobody.code, nobody.refusal()), (Some(1), Some("user_not_found")), "{nobody:?}");
    worker.drain(Duration::from_secs(10)).await;
}

#[tokio::test]
async fn keys_completions_and_stopped_holds_have_their_commands() {
    let shell = Shell::new().await;
    let entry = shell.json(&["keys", "generate", "2026-11"]).await;
    assert_eq!(entry["id"], "2026-11");
    assert!(entry["entry"].as_str().unwrap().starts_with("2026-11:"), "{entry}");
    let listed = shell.run(&["keys", "list"]).await;
    assert!(listed.code == Some(0) && listed.stdout.starts_with("table"), "{listed:?}");
    let completion = shell.run(&["completion", "bash"]).await;
    assert!(completion.code == Some(0) && completion.stdout.contains("loopwright,run)"), "{completion:?}");

    shell.json(&["credits", "balance"]).await;
    let user: uuid::Uuid =
        sqlx::query_scalar("update users set holds_stopped_at = now(), holds_stopped_why = 'a test' returning id")
            .fetch_one(&shell.pool)
            .await
            .unwrap();
    let user = user.to_string();
    assert_eq!(shell.json(&["credits", "release", &user]).await["released"], true);
    assert_eq!(shell.json(&["credits", "release", &user]).await["released"], false);
    let left: i64 = sqlx::query_scalar("select count(*) from users where holds_stopped_at is not null")
        .fetch_one(&shell.pool)
        .await
        .unwrap();
    assert_eq!(left, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dev_serves_and_works_until_it_is_interrupted() {
    let shell = Shell::new().await;
    let mut command = tokio::process::Command::from(loopwright(shell.dir.path()));
    command.env("DATABASE_URL", shell.url()).args(["dev", "--listen", "127.0.0.1:0", "--rehearsal", "demo"]);
    let mut child = command.stderr(Stdio::piped()).stdout(Stdio::null()).kill_on_drop(true).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let serves = async {
        while let Some(line) = lines.next_line().await.unwrap() {
            if let Some(address) = line.split("serves at ").nth(1) {
                return address.split_whitespace().next().unwrap().to_owned();
            }
        }
        panic!("it ended before it served");
    };
    let address = tokio::time::timeout(COMMAND_MAX, serves).await.expect("it serves");
    let ready = reqwest::get(format!("{address}/readyz")).await.unwrap();
    assert_eq!(ready.status(), 200);
    let pid = child.id().unwrap().to_string();
    assert!(tokio::process::Command::new("kill").args(["-INT", &pid]).status().await.unwrap().success());
    // It must be able to say what it does while it drains.
    let rest = tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
    let ended = tokio::time::timeout(COMMAND_MAX, child.wait()).await.expect("it drains").unwrap();
    assert_eq!(ended.code(), Some(0));
    rest.await.unwrap();
}
