//! Forks under another definition, and definitions by the beginning of their hash.

use super::shell::Shell;
use loopwright_engine::{
    activity::Registry,
    client::Client,
    hook::NoHook,
    ids::RunId,
    view::RunView,
    worker::{self, WorkerConfig, WorkerHandle},
};
use serde_json::{Value, json};
use std::{sync::Arc, time::Duration};

const OLD: &str = "dsl: 1
name: greet
inputs:
  who: { type: string, required: true }
  loud: { type: boolean, default: false }
steps:
  - { id: first, set: { said: \"hello ${{ inputs.who }}\" } }
  - { id: ear, await: { signal: go, timeout: 1h } }
  - { id: last, set: { said: \"bye ${{ inputs.who }}\" } }
outputs: { all: \"${{ steps.first.output.said }}, ${{ steps.last.output.said }}\" }
";

/// Without `loud`, with `times`, and another end.
fn new() -> String {
    OLD.replace("loud: { type: boolean, default: false }", "times: { type: integer, minimum: 1, default: 2 }")
        .replace("\"bye ${{ inputs.who }}\"", "\"bye ${{ inputs.who }} ${{ inputs.times }} times\"")
}

async fn worker(shell: &Shell) -> WorkerHandle {
    worker::start(WorkerConfig::new(shell.pool.clone(), Registry::new())).await.unwrap()
}

/// Sends `go` when it is waited for, and gives the view of the closed run. A signal that is there before the first transition is taken in
/// it: the run would be one transition, and nothing to fork.
async fn to_the_end(shell: &Shell, run: &str) -> Value {
    until(shell, run, |view| !view.waiting.is_empty()).await;
    let sent = shell.run(&["run", "signal", run, "go"]).await;
    assert_eq!(sent.code, Some(0), "{sent:?}");
    serde_json::to_value(until(shell, run, |view| view.status.is_closed()).await).unwrap()
}

async fn until(shell: &Shell, run: &str, is_so: impl Fn(&RunView) -> bool) -> RunView {
    let client = Client::new(shell.pool.clone(), Arc::new(NoHook));
    let id: RunId = run.parse().unwrap();
    let deadline = tokio::time::Instant::now() + Duration::from_secs(120);
    loop {
        let view = client.describe(id).await.unwrap();
        if is_so(&view) {
            return view;
        }
        assert!(tokio::time::Instant::now() < deadline, "{view:#?}");
        client.wait_change(id, view.seq, Duration::from_secs(1)).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fork_under_another_definition_has_the_inputs_that_it_declares() {
    let shell = Shell::new().await;
    let old = shell.deploy("greet.yaml", OLD).await;
    let worker = worker(&shell).await;
    let run = shell.start("greet", &["--inputs", "{\"who\": \"Ann\", \"loud\": true}"]).await;
    assert_eq!(to_the_end(&shell, &run).await["output"]["all"], "hello Ann, bye Ann");
    let hash = shell.deploy("greet.yaml", &new()).await;
    let fork = async |more: &[&str]| {
        let report = shell.json(&[&["run", "fork", &run, "--step", "ear"][..], more].concat()).await;
        report["run_id"].as_str().unwrap().to_owned()
    };

    // What only the former declared is gone, what is new has its default, and what had ended is not done again.
    let view = to_the_end(&shell, &fork(&["--definition", &hash]).await).await;
    assert_eq!(view["inputs"], json!({"who": "Ann", "times": 2}));
    assert_eq!(view["output"]["all"], "hello Ann, bye Ann 2 times");
    assert_eq!(view["definition"], json!(hash));
    let fork_of = view["run_id"].as_str().unwrap();
    let own: i64 = sqlx::query_scalar(
        "select count(*) from history, jsonb_array_elements(events) e where run_id = $1::uuid and e->>'path' = 'first'",
    )
    .bind(fork_of)
    .fetch_one(&shell.pool)
    .await
    .unwrap();
    assert_eq!(own, 0, "the first step is the parent's");
    let replayed = shell.run(&["run", "replay", fork_of]).await;
    assert_eq!(replayed.code, Some(0), "{replayed:?}");

    let changed = fork(&["--definition", "v2", "--input", "who=Bob", "--input", "times=3"]).await;
    let view = to_the_end(&shell, &changed).await;
    assert_eq!(view["inputs"], json!({"who": "Bob", "times": 3}));
    assert_eq!(view["output"]["all"], "hello Ann, bye Bob 3 times", "what the shared part made stays");
    // Under its own definition nothing of its inputs changes.
    let view = to_the_end(&shell, &fork(&["--definition", "v1"]).await).await;
    assert_eq!((&view["inputs"], &view["definition"]), (&json!({"who": "Ann", "loud": true}), &json!(old)));
    let reset = shell.json(&["run", "reset", &changed, "--step", "ear", "--definition", "greet@v2"]).await;
    let view = to_the_end(&shell, reset["run_id"].as_str().unwrap()).await;
    assert_eq!(view["inputs"], json!({"who": "Bob", "times": 3}));

    let count =
        async || -> i64 { sqlx::query_scalar("select count(*) from runs").fetch_one(&shell.pool).await.unwrap() };
    let before = count().await;
    let needy =
        new().replace("times: { type: integer, minimum: 1, default: 2 }", "times: { type: integer, required: true }");
    shell.deploy("greet.yaml", &needy).await;
    for (more, says) in [
        (vec!["--definition", "v2", "--input", "times=0"], "minimum"),
        (vec!["--definition", "v2", "--input", "times=many"], "integer"),
        (vec!["--definition", "v2", "--input", "loud=true"], "no input `loud`"),
        (vec!["--definition", "v3"], "`times` is required"),
    ] {
        for command in ["fork", "reset"] {
            let done = shell.run(&[&["run", command, &run, "--step", "ear"][..], &more].concat()).await;
            assert_eq!((done.code, done.refusal()), (Some(1), Some("input_invalid")), "{more:?}: {done:?}");
            assert!(done.stderr.contains(says), "{more:?}: {done:?}");
        }
    }
    assert_eq!(count().await, before);
    worker.drain(Duration::from_secs(10)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_beginning_of_a_hash_is_enough_if_no_other_begins_so() {
    let shell = Shell::new().await;
    let hash = shell.deploy("greet.yaml", OLD).await;
    let run = shell.start("greet", &["--inputs", "{\"who\": \"Ann\"}"]).await;
    let worker = worker(&shell).await;
    to_the_end(&shell, &run).await;
    let upper = hash[..12].to_uppercase();
    let prefixed = format!("sha256:{}", &hash[..20]);
    for text in [&hash[..12], &upper, &prefixed, &hash] {
        let done = shell.run(&["run", "replay", &run, "--definition", text]).await;
        assert_eq!(done.code, Some(0), "{text}: {done:?}");
        let forked = shell.run(&["run", "fork", &run, "--step", "ear", "--definition", text]).await;
        assert_eq!(forked.code, Some(0), "{text}: {forked:?}");
    }
    worker.drain(Duration::from_secs(10)).await;
    let open = shell.start("greet", &["--inputs", "{\"who\": \"Ann\"}"]).await;
    let migrated = shell.json(&["run", "migrate", &open, "--to", &hash[..12], "--dry-run"]).await;
    assert_eq!(migrated["outcome"], "unchanged");
    // Another one that differs in its last byte.
    let twin: String = sqlx::query_scalar(
        "insert into definitions (hash, name, version, format, source, bundle, ir)
         select set_byte(hash, 31, (get_byte(hash, 31) + 1) % 256), name, 7, format, source, bundle, ir from definitions
         returning encode(hash, 'hex')",
    )
    .fetch_one(&shell.pool)
    .await
    .unwrap();
    for args in [
        vec!["run", "replay", &run, "--definition"],
        vec!["run", "fork", &run, "--step", "ear", "--definition"],
        vec!["run", "reset", &run, "--step", "ear", "--definition"],
        vec!["run", "migrate", &open, "--dry-run", "--to"],
        vec!["run", "migrate", "--where", "status != 'completed'", "--dry-run", "--to"],
    ] {
        let done = shell.run(&[&args[..], &[&hash[..12]]].concat()).await;
        assert_eq!((done.code, done.refusal()), (Some(1), Some("definition_ambiguous")), "{args:?}: {done:?}");
        for candidate in [format!("{hash} (greet@1)"), format!("{twin} (greet@7)")] {
            assert!(done.stderr.contains(&candidate), "{args:?}: {done:?}");
        }
        // All of it is one.
        let done = shell.run(&[&args[..], &[hash.as_str()]].concat()).await;
        assert_eq!(done.code, Some(0), "{args:?}: {done:?}");
    }
    let zeros = "0".repeat(70);
    for (text, says) in [("zz", "greet@zz"), (&hash[..3], "greet@"), (zeros.as_str(), "no definition")] {
        let done = shell.run(&["run", "replay", &run, "--definition", text]).await;
        assert_eq!((done.code, done.refusal()), (Some(1), Some("definition_not_found")), "{text}: {done:?}");
        assert!(done.stderr.contains(says), "{text}: {done:?}");
    }
}
