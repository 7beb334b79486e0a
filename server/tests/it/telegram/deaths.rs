//! A bot that dies, and the next one.

use super::{
    go_on::{until_it_fails, works_that_fail},
    *,
};

#[tokio::test]
async fn what_was_stored_is_acted_upon_after_a_crash_once() {
    // The first process stored the updates and died; Telegram gives the second one again.
    let bot = Bot::prepare(|_| {}).await;
    let worker = bot.worker(Arc::new(NoHook), None).await;
    bot.fake.says(ADA, "/start");
    bot.fake.says(ADA, IDEA);
    let update = json!({"update_id": 900, "message": {"message_id": 1, "date": 1, "text": "/terms",
        "from": {"id": ADA, "is_bot": false, "first_name": "Ada"}, "chat": {"id": ADA, "type": "private"}}});
    let batch = [intent::arrived(update).unwrap()];
    assert_eq!(bot.parts.store.store_updates(&batch).await.unwrap(), 1);
    assert_eq!(bot.parts.store.store_updates(&batch).await.unwrap(), 0);
    // What it was sending has an unknown outcome: a text goes out once more.
    for (key, unknowns) in [("a", 0), ("b", 2)] {
        sqlx::query(
            "insert into telegram_outbox (chat_id, dedupe_key, method, body, state, unknowns)
             values ($1, $2, 'SendMessage', $3, 'sending', $4)",
        )
        .bind(ADA)
        .bind(key)
        .bind(json!({"chat_id": ADA, "text": format!("interrupted {key}")}))
        .bind(unknowns)
        .execute(&bot.pool)
        .await
        .unwrap();
    }
    let mut bot = bot.resume();
    bot.fake.message("Credits pay for the models").await;
    bot.fake.message("interrupted a").await;
    bot.fake.message("Which").await;
    bot.stop().await;
    let state: String = sqlx::query_scalar("select state from telegram_outbox where dedupe_key = 'b'")
        .fetch_one(&bot.pool)
        .await
        .unwrap();
    assert_eq!(state, "unknown");
    // A third process finds nothing left to do but the next update.
    let said = bot.fake.done("SendMessage").len();
    let mut bot = bot.resume();
    bot.fake.repeat(1);
    bot.fake.says(ADA, "/help");
    bot.fake.message("/paysupport").await;
    bot.settled(4).await;
    assert_eq!(bot.fake.done("SendMessage").len(), said + 1);
    assert_eq!(bot.number("select count(*) from projects").await, 1);
    worker.drain(Duration::from_secs(5)).await;
    bot.stop().await;
}

#[tokio::test]
async fn a_conversation_survives_a_bot_that_dies_at_every_turn() {
    let bot = Bot::prepare(|_| {}).await;
    let worker = bot.worker(Arc::new(NoHook), None).await;
    let fake = &bot.fake;
    let deaths = async {
        let mut seen = 0;
        for life in 0.. {
            let parts = bot.parts.clone();
            let (_stop, stopped) = watch::channel(false);
            let bot = tokio::spawn(async move { telegram::run(parts, stopped).await.unwrap() });
            // A life ends with its fourth call, wherever that finds the rest of it. Every tenth is a call longer than
            // those before it: on a busy machine four calls alone may never leave time enough to act on an update.
            let end = seen + 4 + life / 10;
            seen = fake.until("a life", |calls| (calls.len() >= end).then_some(calls.len())).await;
            bot.abort();
            assert!(bot.await.unwrap_err().is_cancelled());
        }
    };
    let conversation = async {
        fake.says(ADA, "/start");
        fake.says(ADA, IDEA);
        let question = fake.until("the question", |c| c.iter().find(|c| c.button("Red").is_some()).cloned()).await;
        fake.presses(ADA, question.message_id, &question.button("Red").unwrap());
        let plan = fake.until("the plan", |c| c.iter().find(|c| c.button("Approve").is_some()).cloned()).await;
        fake.presses(ADA, plan.message_id, &plan.button("Approve").unwrap());
        fake.message("</b> is done").await;
    };
    tokio::select! {
        () = deaths => {}
        () = conversation => {}
    }
    assert_eq!(bot.number("select count(*) from runs where status = 'completed'").await, 1);
    assert_eq!(bot.number("select count(*) from runs").await, 1);
    assert_eq!(bot.number("select count(*) from inbox where kind = 'signal'").await, 2);
    assert_eq!(bot.number("select count(*) from credit_transactions").await, 1);
    worker.drain(Duration::from_secs(5)).await;
}

/// From now on no update can be marked: as if the process died there.
async fn leave_no_mark(bot: &Bot) {
    sqlx::raw_sql(
        "create function no_mark() returns trigger language plpgsql as $$ begin
           if new.processed_at is not null and new.error is null then raise exception 'died'; end if; return new; end $$;
         create trigger no_mark before update on telegram_inbox for each row execute function no_mark();",
    )
    .execute(&bot.pool)
    .await
    .unwrap();
}

/// Waits until an update was acted upon in vain.
async fn until_it_was_tried(bot: &Bot) {
    let wait = async { while bot.number("select coalesce(max(tries), 0)::bigint from telegram_inbox").await == 0 {} };
    tokio::time::timeout(Duration::from_secs(120), wait).await.unwrap();
}

#[tokio::test]
async fn a_crash_behind_the_reset_of_a_failed_run_undoes_it() {
    let mut bot = Bot::start().await;
    let (works, attempts) = works_that_fail(1);
    let worker = bot.worker_with(Arc::new(NoHook), works).await;
    let end = until_it_fails(&bot).await;
    leave_no_mark(&bot).await;
    bot.fake.presses(ADA, end.message_id, &end.button("Try that again").unwrap());
    until_it_was_tried(&bot).await;
    // No run works of which its chat does not know, and which /cancel would not find.
    assert_eq!(bot.number("select count(*) from runs").await, 1);
    assert_eq!(bot.number("select count(*) from telegram_runs").await, 1);
    sqlx::raw_sql("drop trigger no_mark on telegram_inbox").execute(&bot.pool).await.unwrap();
    bot.fake.message("</b> is done").await;
    assert_eq!(bot.number("select count(*) from runs").await, 2);
    assert_eq!(attempts.lock().unwrap()["two"], 2);
    worker.drain(Duration::from_secs(5)).await;
    bot.stop().await;
}

#[tokio::test]
async fn a_crash_between_acting_and_the_mark_undoes_the_acting() {
    let bot = Bot::prepare(|_| {}).await;
    leave_no_mark(&bot).await;
    let mut bot = bot.resume();
    bot.fake.says(ADA, "/start");
    until_it_was_tried(&bot).await;
    assert_eq!(bot.number("select count(*) from users").await, 0);
    assert_eq!(bot.number("select count(*) from telegram_outbox").await, 0);
    sqlx::raw_sql("drop trigger no_mark on telegram_inbox").execute(&bot.pool).await.unwrap();
    bot.fake.message("Hello").await;
    bot.settled(1).await;
    assert_eq!(bot.number("select count(*) from credit_transactions").await, 1);
    bot.stop().await;
}

#[tokio::test]
async fn of_two_processes_one_works_and_the_other_takes_over() {
    let mut bot = Bot::start().await;
    bot.fake.says(ADA, "/start");
    bot.fake.message("Hello").await;
    let parts = bot.parts.clone();
    let (stop, stopped) = watch::channel(false);
    let other = tokio::spawn(async move { telegram::run(parts, stopped).await.unwrap() });
    bot.fake.says(ADA, "/help");
    bot.fake.message("Write your idea to start").await;
    assert_eq!(bot.fake.done("GetMe").len(), 1);
    bot.stop().await;
    bot.fake.says(ADA, "/terms");
    bot.fake.message("Credits pay").await;
    assert_eq!(bot.fake.done("GetMe").len(), 2);
    stop.send_replace(true);
    other.await.unwrap();
}
