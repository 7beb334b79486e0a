//! The vendors' own clients talk to the fake: if they can, what our clients are tested against is credible.

use super::KEY;
use loopwright_activities::testing::{Answer, Dialect, End, Endpoint, FakeProvider, Reply, Seen, Stage, python};
use serde_json::{Value, json};
use std::{path::Path, time::Duration};

/// The clients, pinned: a new one is a change of this line.
const PACKAGES: [&str; 3] = ["google-genai==3.6.1", "openai==3.57.0", "openrouter==1.3.84"];
/// Longest time that one of them may take for its handful of calls; most of it is spent on imports.
const TALK_MAX: Duration = Duration::from_secs(240);
const TEXT: &str = "h\u{e4}llo \u{1f980}";

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
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let Some(interpreter) = python::interpreter("the official clients of models", folder, &PACKAGES).await else {
        return;
    };
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/provider/official.py");
    for (dialect, name) in
        [(Dialect::Gemini, "gemini"), (Dialect::OpenRouter, "openrouter"), (Dialect::OpenAi, "openai")]
    {
        let server = FakeProvider::serve(|seen, _| model(seen)).await;
        let base = server.base_of(dialect);
        let output = python::run(&interpreter, &[&script.to_string_lossy(), name, &base, KEY], TALK_MAX).await.unwrap();
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
