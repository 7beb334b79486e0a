//! The terms of a start and the id of a signal, from the command line.

use super::{SMALL, loopwright};
use loopwright_engine::embedded::testing;
use serde_json::{Value, json};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_start_says_its_terms_and_a_signal_with_an_id_arrives_once() {
    let pool = testing::database(loopwright_activities::MIGRATIONS).await;
    let dir = tempfile::tempdir().unwrap();
    let url = testing::url(&pool);
    let run = |args: &[&str]| {
        let output = loopwright(dir.path()).env("DATABASE_URL", &url).args(args).output().unwrap();
        let stdout = String::from_utf8(output.stdout).unwrap();
        (output.status.code(), stdout, String::from_utf8(output.stderr).unwrap())
    };
    let listens = SMALL.replace("wait: { for: 1s }", "await: { signal: hello, timeout: 1h }");
    std::fs::write(dir.path().join("small.yaml"), listens).unwrap();
    assert_eq!(run(&["workflow", "deploy", "small.yaml"]).0, Some(0));
    let start = |terms: &[&str]| {
        let args = [&["run", "start", "small", "--json"][..], terms].concat();
        let (code, stdout, stderr) = run(&args);
        assert_eq!(code, Some(0), "{stderr}");
        serde_json::from_str::<Value>(&stdout).unwrap()["run_id"].as_str().unwrap().to_owned()
    };
    let group = ["--group", "line", "--group-limit", "1"];
    let first = start(&[&group[..], &["--fairness-key", "ann", "--priority", "1"]].concat());
    // Nobody works here: what stands in the queue is what the starts said.
    let queued: (i16, String) = sqlx::query_as("select priority, fairness_key from runs where run_id = $1::uuid")
        .bind(&first)
        .fetch_one(&pool)
        .await
        .unwrap();
    assert_eq!(queued, (1, "ann".to_owned()));
    let behind = start(&group);
    let held: (String, Option<i32>) =
        sqlx::query_as("select group_name, place from admissions where run_id = $1::uuid")
            .bind(&behind)
            .fetch_one(&pool)
            .await
            .unwrap();
    assert_eq!(held, ("line".to_owned(), None), "it waits for the first");
    let (code, _, stderr) =
        run(&[&["run", "start", "small", "--json"][..], &group, &["--group-full", "fail"]].concat());
    let told: Value = serde_json::from_str(&stderr).unwrap();
    assert_eq!((code, &told["error"]["code"]), (Some(1), &json!("concurrency_full")), "{stderr}");

    let away = start(&[&group[..], &["--group-full", "cancel-new"]].concat());
    let told: String = sqlx::query_scalar(
        "select payload #>> '{}' from inbox where run_id = $1::uuid and kind = 'terminate' and name = 'turned_away'",
    )
    .bind(&away)
    .fetch_one(&pool)
    .await
    .unwrap();
    assert!(told.contains("holds a place in concurrency group `line`"), "{told}");

    let rate = ["--rate", "slow", "--rate-starts", "1", "--rate-per", "3600"];
    start(&rate);
    let late = start(&rate);
    let wait: f64 = sqlx::query_scalar(
        "select extract(epoch from not_before - engine_now())::float8 from admissions where run_id = $1::uuid",
    )
    .bind(&late)
    .fetch_one(&pool)
    .await
    .unwrap();
    assert!((3_000.0..=3_600.0).contains(&wait), "{wait}");
    for incomplete in [&["--rate", "slow"][..], &["--group-limit", "2"]] {
        assert_eq!(run(&[&["run", "start", "small"][..], incomplete].concat()).0, Some(2), "{incomplete:?}");
    }

    let signal = ["run", "signal", &first, "hello", "--id", "one"];
    assert_eq!(run(&signal).0, Some(0));
    let again = run(&signal);
    assert_eq!(again.0, Some(0), "{}", again.2);
    let stored: i64 = sqlx::query_scalar("select count(*) from inbox where run_id = $1::uuid")
        .bind(&first)
        .fetch_one(&pool)
        .await
        .unwrap();
    assert_eq!(stored, 1, "{}", again.1);
    let (code, _, stderr) = run(&["run", "signal", "01890000-0000-7000-8000-000000000000", "hello"]);
    assert!(code == Some(1) && stderr.trim_end().ends_with("[run_not_found]"), "{stderr}");
}
