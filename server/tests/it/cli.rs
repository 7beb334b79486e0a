//! The real binary: exit codes and sentences.

use loopwright_engine::embedded::testing;
use std::{
    path::Path,
    process::{Command, Output},
};

/// The binary in an environment that holds nothing of this machine's configuration.
fn loopwright(dir: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_loopwright"));
    command.env_clear().current_dir(dir).env("PATH", std::env::var_os("PATH").unwrap_or_default());
    command.env("LOOPWRIGHT_DATA_DIR", dir.join("data"));
    command
}

/// Arguments, environment, what the sentence must contain.
type Case<'a> = (&'a [&'a str], &'a [(&'a str, &'a str)], &'a str);

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

#[test]
fn a_wrong_configuration_is_one_sentence_and_exit_code_2() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("bad.yaml"), "http: { lisen: x }").unwrap();
    std::fs::write(dir.path().join("torn.yaml"), "http: [").unwrap();
    let cases: [Case; 6] = [
        (&["token", "--config", "bad.yaml"], &[], "lisen"),
        (&["token", "--config", "torn.yaml"], &[], "torn.yaml"),
        (&["token", "--config", "none.yaml"], &[], "none.yaml"),
        (&["token"], &[("LOOPWRIGHT_LISEN", "x")], "LOOPWRIGHT_LISTEN"),
        (&["token"], &[("LOOPWRIGHT_JWT_SECRET", "short")], "32"),
        (&["server"], &[], "LOOPWRIGHT_JWT_SECRET"),
    ];
    for (args, env, expected) in cases {
        let output = loopwright(dir.path()).args(args).envs(env.iter().copied()).output().unwrap();
        let text = text(&output);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {text}");
        assert!(text.contains(expected) && text.trim().lines().count() == 1, "{args:?}: {text}");
    }
    assert_eq!(loopwright(dir.path()).arg("nonsense").output().unwrap().status.code(), Some(2));
}

#[test]
fn what_the_machine_lacks_is_exit_code_3() {
    let dir = tempfile::tempdir().unwrap();
    let secret = ("LOOPWRIGHT_JWT_SECRET", "0123456789abcdef0123456789abcdef");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().to_string();
    let url = "postgres://u:hunter2@127.0.0.1:1/d";
    let cases: [Case; 4] = [
        (&["server", "--listen", &port], &[secret, ("DATABASE_URL", url)], "--listen"),
        (&["server", "--listen", "127.0.0.1:0"], &[secret], "DATABASE_URL"),
        (&["worker"], &[("DATABASE_URL", url)], "cannot be reached"),
        (&["migrate"], &[("LOOPWRIGHT_PG_BIN", "/nonexistent")], "LOOPWRIGHT_PG_BIN"),
    ];
    for (args, env, expected) in cases {
        let output = loopwright(dir.path()).args(args).envs(env.iter().copied()).output().unwrap();
        let text = text(&output);
        assert_eq!(output.status.code(), Some(3), "{args:?}: {text}");
        assert!(text.contains(expected) && !text.contains("hunter2"), "{args:?}: {text}");
    }
    // A data folder that cannot be one.
    std::fs::write(dir.path().join("taken"), "a file").unwrap();
    let output = loopwright(dir.path()).args(["migrate", "--data-dir", "taken"]).output().unwrap();
    assert_eq!(output.status.code(), Some(3), "{}", text(&output));
    assert!(text(&output).contains("LOOPWRIGHT_DATA_DIR"), "{}", text(&output));
}

#[test]
fn the_development_secret_is_made_once_and_private() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let mut children: Vec<_> = (0..4)
        .map(|_| loopwright(dir.path()).arg("token").stdout(std::process::Stdio::null()).spawn().unwrap())
        .collect();
    assert!(children.iter_mut().all(|child| child.wait().unwrap().success()));
    let path = dir.path().join("data/jwt.secret");
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(std::fs::read_to_string(&path).unwrap().len(), 64);
    assert_eq!(std::fs::read_dir(dir.path().join("data")).unwrap().count(), 1);
}

#[tokio::test]
async fn the_command_line_works_on_a_configured_database() {
    let pool = testing::database(&[]).await;
    let dir = tempfile::tempdir().unwrap();
    let url = testing::url(&pool);
    let run = |args: &[&str]| {
        let output = loopwright(dir.path()).env("DATABASE_URL", &url).args(args).output().unwrap();
        (output.status.code(), text(&output))
    };
    assert_eq!(run(&["migrate", "--check"]).0, Some(1));
    assert!(run(&["migrate"]).1.contains("Applied: 0001"));
    assert!(run(&["migrate"]).1.contains("up to date"));
    let (code, id) = run(&["project", "new", "A program that greets.", "--name", "Greeter"]);
    assert_eq!(code, Some(0), "{id}");
    let (_, list) = run(&["project", "list"]);
    assert!(list.contains(id.trim()) && list.contains("Greeter"), "{list}");
    let (_, json) = run(&["project", "show", id.trim(), "--json"]);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["idea"], "A program that greets.");
    let (code, text) = run(&["project", "show", &uuid::Uuid::nil().to_string()]);
    assert!(code == Some(1) && text.contains("there is no project"), "{text}");
    let (_, doctor) = run(&["doctor", "--offline", "--json"]);
    let doctor: serde_json::Value = serde_json::from_str(doctor.lines().next().unwrap()).unwrap();
    let state = |name: &str| doctor.as_array().unwrap().iter().find(|c| c["name"] == name).unwrap()["state"].clone();
    assert!(["database", "schema", "clock", "data"].iter().all(|n| state(n) == "ok"), "{doctor}");
}
