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
    let faults: Vec<&Value> = report["faults"].as_object().unwrap().values().collect();
    let sum = |what: &str| faults.iter().filter_map(|fault| fault[what].as_u64()).sum::<u64>();
    assert!(sum("struck") >= 5 && sum("struck") <= sum("tried"), "{report}");
    // Whatever is open says what it waits for, and why it may.
    let waits = report["waits"].as_array().unwrap();
    let open = report["runs"].as_object().unwrap().iter().filter(|(end, _)| end.starts_with("waits for"));
    assert_eq!(open.filter_map(|(_, n)| n.as_u64()).sum::<u64>(), waits.len() as u64, "{report}");
    assert!(
        waits.iter().all(|run| run["waits_for"].as_str().is_some_and(|text| text.contains("signal `go`"))),
        "{report}"
    );
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
