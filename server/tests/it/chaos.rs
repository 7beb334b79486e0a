//! `loopwright chaos` for half a minute: a real Postgres that is shut down, real processes that are killed and frozen.
//! What it finds is printed by it; the long rounds are a stage of their own in CI.

use serde_json::Value;
use std::process::Command;

fn chaos(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_loopwright"));
    command
        .env_clear()
        .envs(["PATH", "HOME", "LOOPWRIGHT_PG_BIN"].iter().filter_map(|n| Some((n, std::env::var_os(n)?))))
        .arg("chaos")
        .args(args);
    command
}

#[test]
fn half_a_minute_of_faults_breaks_no_promise() {
    let output = chaos(&["--minutes", "0.5", "--json"]).output().unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{told}");
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    let report: Value = serde_json::from_str(stdout.lines().last().unwrap()).unwrap();
    assert_eq!((&report["ok"], &report["violations"]), (&Value::Bool(true), &Value::Array(vec![])), "{report}");
    // It was not quiet, and it was not idle.
    let faults: u64 = report["faults"].as_object().unwrap().values().filter_map(Value::as_u64).sum();
    assert!(faults >= 5, "{report}");
    for (what, number) in [
        ("starts", &report["requests"]["start"]["acknowledged"]),
        ("signals", &report["requests"]["signal"]["acknowledged"]),
        ("completed runs", &report["runs"]["completed"]),
        ("effects", &report["effects"]["keys"]),
    ] {
        assert!(number.as_u64().is_some_and(|n| n > 0), "{what}: {report}");
    }
    assert!(told.contains(&format!("seed {}", report["seed"])), "{told}");
}

#[test]
fn the_time_is_bounded() {
    for time in ["0", "-1", "61", "soon"] {
        let output = chaos(&[&format!("--minutes={time}")]).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{time}");
    }
}
