//! Schedules and filters over the command line: the real binary.

use loopwright_engine::embedded::testing;
use serde_json::{Value, json};
use std::{
    path::Path,
    process::{Command, Output},
};

const WORKFLOW: &str = "dsl: 1
name: sleepy
labels: { team: night }
inputs:
  n: { type: integer, default: 1 }
steps:
  - id: rest
    wait: { for: 1h }
";

struct Cli<'a> {
    dir: &'a Path,
    url: String,
}

impl Cli<'_> {
    fn output(&self, args: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_loopwright"));
        command.env_clear().current_dir(self.dir).env("PATH", std::env::var_os("PATH").unwrap_or_default());
        command.env("LOOPWRIGHT_DATA_DIR", self.dir.join("data")).env("DATABASE_URL", &self.url);
        command.args(args).output().unwrap()
    }

    fn text(&self, args: &[&str]) -> (Option<i32>, String) {
        let output = self.output(args);
        let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        (output.status.code(), text)
    }

    fn json(&self, args: &[&str]) -> Value {
        let output = self.output(&[args, &["--json"]].concat());
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_makes_watches_and_stops_a_schedule() {
    let pool = testing::database(loopwright_activities::MIGRATIONS).await;
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("sleepy.yaml"), WORKFLOW).unwrap();
    let cli = Cli { dir: dir.path(), url: testing::url(&pool) };
    cli.json(&["workflow", "deploy", "sleepy.yaml"]);

    let nightly = ["schedule", "create", "nightly", "sleepy", "--cron", "30 2 * * *", "--timezone", "Europe/Berlin"];
    let made = cli.json(&[&nightly[..], &["--jitter", "10m", "--catchup", "1h", "--inputs", "{\"n\": 3}"]].concat());
    assert_eq!(made["spec"]["when"], json!({"cron": {"expression": "30 2 * * *", "timezone": "Europe/Berlin"}}));
    assert_eq!((&made["spec"]["jitter_ms"], &made["spec"]["overlap"]), (&json!(600_000), &json!("skip")));
    assert!(made["spec"]["attributes"]["user_id"].is_string(), "the developer's: {made}");
    let (code, text) = cli.text(&nightly);
    assert!(code == Some(1) && text.contains("there is a schedule `nightly` already"), "{text}");
    let changed = cli.json(&[&nightly[..], &["--replace", "--overlap", "buffer_one"]].concat());
    assert_eq!((&changed["id"], &changed["spec"]["overlap"]), (&made["id"], &json!("buffer_one")));

    let run = cli.json(&["schedule", "trigger", "nightly"]);
    assert_eq!(run["state"], "started", "{run}");
    let waits = cli.json(&["schedule", "trigger", "nightly"]);
    assert_eq!(waits["state"], "pending");
    let beside = cli.json(&["schedule", "trigger", "nightly", "--overlap", "allow_all"]);
    assert_eq!(beside["state"], "started");
    let filled = cli.json(&[
        "schedule",
        "backfill",
        "nightly",
        "--from",
        "2026-01-01",
        "--to",
        "2026-01-05",
        "--overlap",
        "allow_all",
    ]);
    assert_eq!(filled, json!({"instants": 4, "added": 4}));

    let filter = format!(
        "attributes.schedule = 'nightly' and status = 'pending' and run_id != '{}'",
        run["run_id"].as_str().unwrap()
    );
    let found = cli.json(&["run", "list", "--where", &filter]);
    assert_eq!(found.as_array().unwrap().len(), 1, "{found}");
    assert_eq!(found[0]["run_id"], beside["run_id"]);
    // By a label of its workflow.
    let labelled = |team: &str| format!("attributes.\"label.team\" = '{team}' and attributes.schedule = 'nightly'");
    let of_team = |team: &str| cli.json(&["run", "list", "--count", "--where", &labelled(team)]);
    assert_eq!((of_team("night"), of_team("day")), (json!({"count": 2}), json!({"count": 0})));
    assert_eq!(cli.json(&["run", "list", "--count", "--where", "workflow = 'sleepy'"]), json!({"count": 2}));
    let (code, text) = cli.text(&["run", "list", "--where", "status = 'runing'"]);
    assert!(code == Some(2) && text.contains("at column 10") && text.contains("did you mean 'running'?"), "{text}");

    let (_, text) = cli.text(&["schedule", "list"]);
    assert!(text.contains("nightly") && text.contains("30 2 * * * Europe/Berlin"), "{text}");
    let paused = cli.json(&["schedule", "pause", "nightly", "--note", "moving"]);
    assert!(paused["paused_at"].is_string() && paused["note"] == "moving", "{paused}");
    let (_, text) = cli.text(&["schedule", "show", "nightly"]);
    for word in ["note      moving", "paused", "open ", "manual", "backfill", "jitter    0s"] {
        assert!(text.contains(word), "{word}: {text}");
    }
    assert!(cli.json(&["schedule", "resume", "nightly"])["next_at"].is_string());
    cli.json(&["schedule", "delete", "nightly"]);
    let (code, text) = cli.text(&["schedule", "show", "nightly"]);
    assert!(code == Some(1) && text.contains("no schedule `nightly`"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_a_schedule_is_one_sentence() {
    let pool = testing::database(loopwright_activities::MIGRATIONS).await;
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("sleepy.yaml"), WORKFLOW).unwrap();
    let cli = Cli { dir: dir.path(), url: testing::url(&pool) };
    cli.json(&["workflow", "deploy", "sleepy.yaml"]);
    let nobody = "0193a1b2-0000-7000-8000-000000000001";
    for (args, code, expected) in [
        (&["create", "s", "sleepy"][..], 2, "--cron"),
        (&["create", "s", "sleepy", "--every", "ten"], 2, "1h30m"),
        (&["create", "s", "sleepy", "--cron", "* * * * *", "--overlap", "stop"], 2, "terminate_other"),
        (&["create", "s", "sleepy", "--cron", "0 3 * * * *"], 1, "leave out the seconds"),
        (&["create", "s", "sleepy", "--cron", "0 3 * * *", "--timezone", "Berlin"], 1, "`Europe/Berlin`"),
        (&["create", "s", "sleepy", "--every", "1ms"], 1, "a second"),
        (&["create", "s", "nobody", "--every", "1h"], 1, "nobody@current"),
        (&["create", "s", "sleepy", "--every", "1h", "--inputs", "{\"n\": \"x\"}"], 1, "integer"),
        (&["create", "s", "sleepy", "--every", "1h", "--inputs", "[]"], 1, "not a JSON object"),
        (&["create", "s", "sleepy", "--every", "1h", "--inputs", "@none.json"], 1, "none.json cannot be read"),
        (&["create", "s", "sleepy", "--every", "1h", "--project", nobody], 1, "--user"),
        (&["create", "a b", "sleepy", "--every", "1h"], 1, "cannot be a name"),
        (&["pause", "none"], 1, "no schedule `none`"),
        (&["backfill", "s", "--from", "yesterday", "--to", "2026-01-01"], 2, "2026-11-25"),
    ] {
        let (found, text) = cli.text(&[&["schedule"], args].concat());
        assert!(found == Some(code) && text.contains(expected), "{args:?}: {found:?} {text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_definition_s_cron_triggers_are_its_schedules() {
    let pool = testing::database(loopwright_activities::MIGRATIONS).await;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("sleepy.yaml");
    let cli = Cli { dir: dir.path(), url: testing::url(&pool) };
    let with = |on: &str| std::fs::write(&file, WORKFLOW.replace("inputs:", &format!("{on}inputs:"))).unwrap();
    let names = |value: &Value| -> Vec<String> {
        value.as_array().unwrap().iter().map(|s| s["name"].as_str().unwrap().to_owned()).collect()
    };
    with(
        "on:
  cron:
    - { schedule: \"0 9 * * mon\", timezone: Europe/Berlin, overlap: queue, catchup: 2h, inputs: { n: 7 } }
    - { schedule: \"0 10 * * *\", timezone: UTC }
",
    );
    let deployed = cli.json(&["workflow", "deploy", "sleepy.yaml"]);
    assert_eq!(names(&deployed["schedules"]), ["sleepy/cron/1", "sleepy/cron/2"]);
    let first = cli.json(&["schedule", "show", "sleepy/cron/1"]);
    assert_eq!(first["spec"]["when"], json!({"cron": {"expression": "0 9 * * mon", "timezone": "Europe/Berlin"}}));
    let spec = &first["spec"];
    assert_eq!(
        (&spec["overlap"], &spec["catchup_ms"], &spec["inputs"]),
        (&json!("buffer_all"), &json!(7_200_000), &json!({"n": 7}))
    );
    let owner = &spec["attributes"]["user_id"];
    assert!(owner.is_string(), "{first}");
    // Paused stays paused, changed is changed, gone is gone; whose they are stays.
    cli.json(&["schedule", "pause", "sleepy/cron/1"]);
    with("on: { cron: [{ schedule: \"30 9 * * mon\", timezone: Europe/Berlin }] }\n");
    cli.json(&["workflow", "deploy", "sleepy.yaml"]);
    assert_eq!(names(&cli.json(&["schedule", "list"])), ["sleepy/cron/1"]);
    let changed = cli.json(&["schedule", "show", "sleepy/cron/1"]);
    assert_eq!((&changed["id"], &changed["spec"]["attributes"]["user_id"]), (&first["id"], owner));
    assert_eq!(changed["spec"]["when"]["cron"]["expression"], "30 9 * * mon");
    assert!(changed["paused_at"].is_string() && changed["next_at"].is_null(), "{changed}");
    let (_, text) = cli.text(&["workflow", "deploy", "sleepy.yaml"]);
    assert!(text.contains("sleepy/cron/1 next at no time: paused"), "{text}");
    with("");
    assert_eq!(cli.json(&["workflow", "deploy", "sleepy.yaml"])["schedules"], json!([]));
    assert_eq!(cli.json(&["schedule", "list"]), json!([]));
}
