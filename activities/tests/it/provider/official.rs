//! The vendors' own clients talk to the fake: if they can, what our clients are tested against is credible.
//!
//! They are installed once, into a virtual environment below the target folder. Where that is not possible the test says
//! so and passes: it shows something about the fake, not about the product.

use super::KEY;
use loopwright_activities::testing::{Answer, Dialect, End, Endpoint, FakeProvider, Reply, Seen, Stage};
use serde_json::{Value, json};
use std::{
    path::{Path, PathBuf},
    process::{Output, Stdio},
    time::Duration,
};
use tokio::{process::Command, time::timeout};

/// The clients, pinned: a new one is a change of this line.
const PACKAGES: [&str; 3] = ["google-genai==3.6.1", "openai==3.57.0", "openrouter==1.3.84"];
/// Longest time that installing them may cost a test run.
const INSTALL_MAX: Duration = Duration::from_secs(60);
/// Longest time that one of them may take for its handful of calls; most of it is spent on imports.
const TALK_MAX: Duration = Duration::from_secs(240);
const TEXT: &str = "h\u{e4}llo \u{1f980}";

async fn run(program: &Path, arguments: &[&str], limit: Duration) -> Result<Output, String> {
    let child = Command::new(program).args(arguments).stdin(Stdio::null()).kill_on_drop(true).output();
    match timeout(limit, child).await {
        Err(_) => Err(format!("{} took longer than {limit:?}", program.display())),
        Ok(Err(error)) => Err(format!("{}: {error}", program.display())),
        Ok(Ok(output)) => Ok(output),
    }
}

/// The interpreter that knows the clients; an error says why there is none.
async fn interpreter() -> Result<PathBuf, String> {
    let folder =
        Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("official-{}", PACKAGES.join("-").replace("==", "-")));
    let (python, ready) = (folder.join("bin/python"), folder.join("ready"));
    if ready.exists() {
        return Ok(python);
    }
    let made = run(Path::new("python3"), &["-m", "venv", &folder.to_string_lossy()], INSTALL_MAX).await?;
    if !made.status.success() {
        return Err("python3 -m venv does not work".to_owned());
    }
    let mut arguments =
        vec!["-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check", "--retries=0"];
    arguments.extend(PACKAGES);
    let installed = run(&python, &arguments, INSTALL_MAX).await?;
    if !installed.status.success() {
        return Err(format!("pip: {}", String::from_utf8_lossy(&installed.stderr)));
    }
    std::fs::write(&ready, "").map_err(|error| error.to_string())?;
    Ok(python)
}

/// What a model with one tool would say.
fn model(seen: &Seen) -> Answer {
    let asked = seen.body.to_string();
    if asked.contains("please fail") {
        return Answer::error(seen.dialect, 429, "RESOURCE_EXHAUSTED");
    }
    let reply = if asked.contains("functionResponse") || asked.contains("tool_call_id") {
        Reply::text("It is 12C.")
    } else if asked.contains("get_weather") {
        Reply::tool_call("get_weather", json!({"city": "Paris"}))
    } else if asked.contains("responseJsonSchema") || asked.contains("response_format") {
        Reply::text("{\"ok\": true}")
    } else {
        Reply::text(TEXT)
    };
    Answer::Reply(reply)
}

#[tokio::test]
async fn the_official_clients_can_talk_to_the_fake() {
    let python = match interpreter().await {
        Ok(python) => python,
        Err(why) => {
            eprintln!("skipped: the official clients cannot be installed here: {why}");
            return;
        }
    };
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/provider/official.py");
    for (dialect, name) in
        [(Dialect::Gemini, "gemini"), (Dialect::OpenRouter, "openrouter"), (Dialect::OpenAi, "openai")]
    {
        let server = FakeProvider::serve(|seen, _| model(seen)).await;
        let base = server.base_of(dialect);
        let output = run(&python, &[&script.to_string_lossy(), name, &base, KEY], TALK_MAX).await.unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{name}: {errors}");
        let texts: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(texts, json!([TEXT, TEXT, "It is 12C.", "{\"ok\": true}"]), "{name}");
        let journal = server.journal_when(|all| all.iter().all(|entry| entry.end != End::Open)).await;
        for entry in &journal {
            assert_ne!(entry.endpoint, Endpoint::Unknown, "{name}: {}", entry.path);
            assert_eq!((entry.dialect, entry.stage, entry.end), (dialect, Stage::Finished, End::Server), "{entry:?}");
        }
        let questions = journal.iter().filter(|entry| matches!(entry.endpoint, Endpoint::Generate { .. })).count();
        assert_eq!(questions, if dialect == Dialect::Gemini { 12 } else { 6 }, "{name}: nothing was repeated");
    }
}
