//! What the processes write while people talk to the bot: nothing of what they say, at any level.

use super::{ADA, KEY};
use crate::{
    fake_telegram::{Fake, TOKEN, Wrong},
    processes::Stage,
};
use serde_json::json;

/// Words that only Ada uses.
const WORDS: [&str; 4] = ["zanzibarian", "quokkas", "xylophonist", "marzipanned"];
/// A bot of hers, whose token she pastes.
const HER_TOKEN: &str = "87654321:AAHdqTcvCH1vGWJxfSeofSAs0K5PALDsaw";

#[tokio::test(flavor = "multi_thread")]
async fn no_word_no_key_and_no_token_of_people_is_in_any_log() {
    let fake = Fake::start().await;
    let [idea, answer, unreadable, refused] = WORDS;
    let mut stage = Stage::new().await;
    stage.log = "trace";
    let url = fake.url.to_string();
    let telegram =
        [("TELEGRAM_BOT_TOKEN", TOKEN), ("TELEGRAM_API_URL", url.as_str()), ("LOOPWRIGHT_TELEGRAM_ACCESS", "open")];
    // Polls that break and are refused are told of, with what the library says.
    fake.wrong("getUpdates", Wrong::HangUp);
    fake.wrong("getUpdates", Wrong::Conflict);
    let (mut server, _) = stage.server_with(10_000, &telegram).await;
    let mut worker = stage.worker(10_000, 100);

    fake.says(ADA, "/start");
    fake.message("Hello").await;
    fake.says(ADA, &format!("A {idea} tea shop"));
    fake.message("Which greeting?").await;
    fake.says(ADA, &format!("For {answer}"));
    // The rehearsal knows no more: what becomes of that is logged, and told.
    let failed = "select exists (select from history, jsonb_array_elements(events) e
                                 where e->>'type' = 'attempt_ended' and e->>'outcome' = 'failed')";
    stage.until("the end of what is rehearsed", failed).await;
    for pasted in [format!("use my key {KEY} please"), format!("/key {KEY}"), format!("my bot is {HER_TOKEN}")] {
        fake.says(ADA, &pasted);
    }
    fake.count("DeleteMessage", 3).await;
    // One that cannot be read, and an answer that Telegram does not take.
    fake.sends(json!({"message": {"message_id": "many", "text": unreadable}}));
    fake.wrong("sendMessage", Wrong::Refused);
    fake.says(ADA, &format!("/{refused}"));
    let settled = "select count(*) >= 7 and bool_and(processed_at is not null) from telegram_inbox";
    stage.until("everything was acted upon", settled).await;
    let said = "select not exists (select from telegram_outbox where state in ('queued', 'sending'))";
    stage.until("everything was said", said).await;
    for process in [&mut server, &mut worker] {
        process.terminate();
        assert_eq!(process.end().await.0.code(), Some(0), "{}", stage.logs());
    }

    let log = stage.logs();
    // It is the whole of it: of every level, from both, and of what went wrong.
    for words in ["TRACE", "DEBUG", "INFO", "WARN", "the bot is here", "worker started", "polling failed"] {
        assert!(log.contains(words), "{words} is not in the log, so this proves nothing: {log}");
    }
    let (_, secret) = TOKEN.split_once(':').unwrap();
    let (_, her_secret) = HER_TOKEN.split_once(':').unwrap();
    let key = KEY.rsplit('-').next().unwrap();
    for never in WORDS.into_iter().chain([secret, her_secret, key, crate::support::SECRET]) {
        let found: Vec<&str> = log.lines().filter(|line| line.contains(never)).collect();
        assert!(found.is_empty(), "{never} is in the log: {found:#?}");
    }
}
