//! Another client than ours talks to the fake Bot API: if it can, what the bot is tested against is credible.

use super::ADA;
use crate::fake_telegram::{Fake, TOKEN, Wrong};
use loopwright_activities::testing::python;
use serde_json::{Value, json};
use std::{path::Path, time::Duration};

/// Pinned: a new one is a change of this line.
const PACKAGES: [&str; 1] = ["aiogram==3.31.0"];
/// Longest time that it may take for its handful of calls; most of it is spent on imports.
const TALK_MAX: Duration = Duration::from_secs(120);

#[tokio::test]
async fn aiogram_can_talk_to_the_fake() {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let Some(interpreter) = python::interpreter("aiogram", folder, &PACKAGES).await else { return };
    let fake = Fake::start().await;
    let message = fake.says(ADA, "hello, bot");
    fake.presses(ADA, message, "apr:9f2c");
    fake.wrong("sendMessage", Wrong::Quiet(7));
    fake.wrong("sendMessage", Wrong::Blocked);
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/telegram/official.py");
    let (url, chat) = (fake.url.to_string(), ADA.to_string());
    let output = python::run(&interpreter, &[&script.to_string_lossy(), &url, TOKEN, &chat], TALK_MAX).await.unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let read: Value = serde_json::from_slice(&output.stdout).unwrap();
    let expected = json!({"bot": "loopwright_bot", "sent": "h\u{e4}llo \u{1f980} & 42", "read": "hello, bot", "pressed": "apr:9f2c", "wait": 7});
    assert_eq!(read, expected);
    // What it sent is what the fake has understood.
    let [sent] = &*fake.done("sendMessage") else { panic!("{:?}", fake.calls()) };
    assert_eq!((&sent.body["chat_id"], sent.button("Approve").as_deref()), (&json!(ADA), Some("apr:9f2c")));
    assert_eq!(fake.done("answerCallbackQuery")[0].body["text"], "Approved");
    assert_eq!(fake.done("editMessageText")[0].message_id, sent.message_id);
}
