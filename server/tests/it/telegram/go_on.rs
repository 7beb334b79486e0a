//! The button under a run that failed.

use super::*;
use loopwright_engine::Failure;
use std::{collections::BTreeMap, sync::Mutex};
use uuid::Uuid;

/// As [`works`], and the second item fails in its first attempts. Counts the attempts of each item.
pub(super) fn works_that_fail(times: u32) -> (Vec<Work>, Arc<Mutex<BTreeMap<String, u32>>>) {
    works_that_fail_with("provider.bad_request", times)
}

fn works_that_fail_with(code: &'static str, times: u32) -> (Vec<Work>, Arc<Mutex<BTreeMap<String, u32>>>) {
    let attempts: Arc<Mutex<BTreeMap<String, u32>>> = Arc::default();
    let counted = Arc::clone(&attempts);
    let implement: Script = Arc::new(move |_, input| {
        let item = input["todo"]["id"].as_str().expect("an id").to_owned();
        let attempt = {
            let mut attempts = counted.lock().unwrap();
            let attempt = attempts.entry(item.clone()).or_default();
            *attempt += 1;
            *attempt
        };
        Box::pin(async move {
            match (item.as_str(), attempt) {
                ("two", n) if n <= times => Err(Failure::permanent(code, "not <accepted>")),
                _ => Ok(json!({"work": "w", "summary": "done"})),
            }
        })
    });
    let mut works = works(None);
    let at = works.iter().position(|work| work.signature().name == "implement@1").unwrap();
    works[at] = Work::new("implement@1", implement).metered();
    (works, attempts)
}

/// Drives an idea to where its second item fails: what is said then, with its button.
pub(super) async fn until_it_fails(bot: &Bot) -> Call {
    bot.fake.says(ADA, IDEA);
    bot.fake.message("Which").await;
    bot.fake.says(ADA, "Green");
    let plan = bot.fake.message("needs your decision").await;
    bot.fake.presses(ADA, plan.message_id, &plan.button("Approve").unwrap());
    ends(bot, 1).await
}

/// The message of the end of the `n`th run that has failed.
async fn ends(bot: &Bot, n: usize) -> Call {
    let told = |calls: &[Call]| {
        let mut ends =
            calls.iter().filter(|call| call.method == "sendmessage" && call.text().contains("could not be finished"));
        ends.nth(n - 1).filter(|call| call.done()).cloned()
    };
    bot.fake.until("a run has failed", told).await
}

#[tokio::test]
async fn a_run_that_failed_goes_on_where_it_failed() {
    let mut bot = Bot::start().await;
    let (works, attempts) = works_that_fail(1);
    let worker = bot.worker_with(Arc::new(NoHook), works).await;
    let end = until_it_fails(&bot).await;
    assert!(end.text().contains("provider.bad_request") && end.text().contains("not &lt;accepted&gt;"), "{end:?}");
    let again = end.button("Try that again").unwrap();
    bot.fake.presses(EVE, end.message_id, &again);
    bot.fake.count("AnswerCallbackQuery", 2).await;
    assert_eq!(bot.number("select count(*) from runs").await, 1, "it is not hers");
    // Twice, and its updates come twice.
    bot.fake.presses(ADA, end.message_id, &again);
    bot.fake.presses(ADA, end.message_id, &again);
    bot.fake.repeat(1);
    bot.fake.message("</b> is done").await;
    let answers = bot.fake.count("AnswerCallbackQuery", 4).await;
    let said: BTreeSet<_> = answers[2..].iter().map(|c| c.text().to_owned()).collect();
    assert_eq!(said, BTreeSet::from(["It goes on.".to_owned(), "It goes on already.".to_owned()]));
    assert_eq!(*attempts.lock().unwrap(), BTreeMap::from([("one".to_owned(), 1), ("two".to_owned(), 2)]));
    let runs = "select count(*) from runs where status in ('completed', 'failed')";
    assert_eq!((bot.number(runs).await, bot.number("select count(*) from runs").await), (2, 2));
    // It is the project's run, as the one before was.
    assert_eq!(bot.number("select count(workflow_id) from runs").await, 2);
    assert_eq!(bot.number("select count(distinct workflow_id) from runs").await, 1);
    // Nothing is under way, and what is said of the project is its end.
    bot.fake.says(ADA, "/cancel");
    bot.fake.message("Nothing is under way").await;
    worker.drain(Duration::from_secs(5)).await;
    bot.stop().await;
}

#[tokio::test]
async fn a_step_that_fails_again_and_again_is_offered_three_times() {
    let mut bot = Bot::start().await;
    let (works, attempts) = works_that_fail(u32::MAX);
    let worker = bot.worker_with(Arc::new(NoHook), works).await;
    let mut end = until_it_fails(&bot).await;
    for n in 2..=4 {
        bot.fake.presses(ADA, end.message_id, &end.button("Try that again").unwrap());
        end = ends(&bot, n).await;
    }
    assert_eq!(end.button("Try that again"), None);
    assert!(!end.text().contains("The button"), "{end:?}");
    assert_eq!(attempts.lock().unwrap()["two"], 4);
    worker.drain(Duration::from_secs(5)).await;
    bot.stop().await;
}

#[tokio::test]
async fn a_limit_that_was_met_is_not_met_again_for_credits() {
    let mut bot = Bot::start().await;
    let (works, _) = works_that_fail_with("limit.rounds", 1);
    let worker = bot.worker_with(Arc::new(NoHook), works).await;
    let end = until_it_fails(&bot).await;
    assert!(end.text().contains("limit.rounds") && end.button("Try that again").is_none(), "{end:?}");
    worker.drain(Duration::from_secs(5)).await;
    bot.stop().await;
}

#[tokio::test]
async fn a_run_that_failed_does_not_go_on_beside_another_of_its_project() {
    let mut bot = Bot::start().await;
    let (works, attempts) = works_that_fail(1);
    let worker = bot.worker_with(Arc::new(NoHook), works).await;
    let end = until_it_fails(&bot).await;
    // As REST starts it.
    let client = &bot.parts.client;
    let (project, user): (Uuid, Uuid) =
        sqlx::query_as("select id, user_id from projects").fetch_one(&bot.pool).await.unwrap();
    let definition = client.pointer("dev-loop", "current").await.unwrap();
    let project = bot.parts.store.project(user, project).await.unwrap().unwrap();
    let other = client.start(project.start(user, definition)).await.unwrap();
    assert!(other.created);
    bot.fake.presses(ADA, end.message_id, &end.button("Try that again").unwrap());
    let answers = bot.fake.count("AnswerCallbackQuery", 2).await;
    assert!(answers[1].text().contains("cannot go on now"), "{answers:?}");
    assert_eq!(bot.number("select count(*) from runs").await, 2);
    assert_eq!(bot.number("select count(*) from telegram_runs").await, 1);
    assert_eq!(attempts.lock().unwrap()["two"], 1);
    // When that has ended the same button works.
    client.terminate(other.run_id, "to make place").await.unwrap();
    bot.fake.presses(ADA, end.message_id, &end.button("Try that again").unwrap());
    bot.fake.message("</b> is done").await;
    assert_eq!(attempts.lock().unwrap()["two"], 2);
    worker.drain(Duration::from_secs(5)).await;
    bot.stop().await;
}
