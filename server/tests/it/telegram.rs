//! The bot against a Bot API on loopback: conversations, payments, and what goes wrong between them.

mod deaths;
mod go_on;
mod logs;
mod official;
mod payments;

use crate::{
    fake_telegram::{Call, Fake, TOKEN, Wrong},
    support::{MIGRATIONS, Script, Work},
};
use futures_util::future::BoxFuture;
use loopwright_engine::{
    activity::{Activity, Registry},
    client::{Client, Deploy},
    embedded::testing,
    hook::{AttemptRef, HookError, NoHook, Reading, Refusal, Transition, TransitionHook, Verdict},
    worker::{self, WorkerConfig, WorkerHandle},
};
use loopwright_server::{
    config::{self, Access},
    store::Store,
    telegram::{self, Pace, Parts, intent},
};
use serde_json::{Value, json};
use sqlx::PgPool;
use std::{collections::BTreeSet, sync::Arc, time::Duration};
use tokio::{
    sync::{Semaphore, watch},
    task::JoinHandle,
};

const ADA: i64 = 42;
const EVE: i64 = 43;
const IDEA: &str = "A tea <shop> & more\nwith a cart";
const KEY: &str = "sk-or-v1-0123456789abcdef0123456789abcdef";

struct Bot {
    pool: PgPool,
    fake: Fake,
    parts: Parts,
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
}

fn pace() -> Pace {
    let ms = Duration::from_millis;
    Pace {
        chat: ms(1),
        overall: ms(1),
        look: ms(20),
        pause: ms(20),
        pause_max: ms(200),
        poll: Duration::from_secs(1),
        refresh: Duration::from_secs(10),
    }
}

impl Bot {
    async fn start() -> Self {
        Self::start_with(|_| {}).await
    }

    async fn start_with(change: impl FnOnce(&mut Parts)) -> Self {
        Self::prepare(change).await.resume()
    }

    /// Everything but the bot itself.
    async fn prepare(change: impl FnOnce(&mut Parts)) -> Self {
        let pool = testing::database(MIGRATIONS).await;
        let fake = Fake::start().await;
        let settings = config::Telegram {
            token: Some(TOKEN.to_owned().into()),
            api_url: Some(fake.url.clone()),
            access: Access::Open,
        };
        let store = Store::new(pool.clone(), loopwright_activities::billing::BillingSettings::default().welcome);
        let mut parts = Parts {
            store: store.clone(),
            client: Client::new(pool.clone(), Arc::new(NoHook)),
            archives: Arc::new(store),
            settings,
            billing: config::Billing { welcome_credits: 100, credits_per_usd: 100, markup_bps: 0 },
            pace: pace(),
        };
        change(&mut parts);
        let (stop, _) = watch::channel(false);
        Self { pool, fake, parts, stop, task: tokio::spawn(async {}) }
    }

    fn resume(mut self) -> Self {
        let parts = self.parts.clone();
        let (stop, stopped) = watch::channel(false);
        self.stop = stop;
        self.task = tokio::spawn(async move { telegram::run(parts, stopped).await.unwrap() });
        self
    }

    /// Stops in order, which ends in time.
    async fn stop(&mut self) {
        self.stop.send_replace(true);
        (&mut self.task).await.unwrap();
    }

    async fn number(&self, sql: &'static str) -> i64 {
        sqlx::query_scalar(sql).fetch_one(&self.pool).await.unwrap()
    }

    /// Waits until everything that came was acted upon, and everything to say was said.
    async fn settled(&self, updates: i64) {
        let sql = "select (select count(*) from telegram_inbox where processed_at is not null) >= $1
            and not exists (select from telegram_inbox where processed_at is null)
            and not exists (select from telegram_outbox where state in ('queued', 'sending'))";
        let wait = async {
            while !sqlx::query_scalar::<_, bool>(sql).bind(updates).fetch_one(&self.pool).await.unwrap() {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), wait).await.expect("the bot settles");
    }

    /// Deploys the shipped loop and works on it with activities of a few lines.
    async fn worker(&self, hook: Arc<dyn TransitionHook>, gate: Option<Arc<Semaphore>>) -> WorkerHandle {
        self.worker_with(hook, works(gate)).await
    }

    async fn worker_with(&self, hook: Arc<dyn TransitionHook>, works: Vec<Work>) -> WorkerHandle {
        let registry = works.into_iter().fold(Registry::new(), Registry::with);
        let source = include_str!("../../../workflow-defs/dev-loop.yaml");
        let (compiled, found) =
            loopwright_workflows::compile(source, "dev-loop.yaml", &Default::default(), &registry.catalog());
        let compiled = compiled.unwrap_or_else(|| panic!("{}", loopwright_workflows::render(&found, source)));
        let deploy = Deploy {
            definition: compiled.definition,
            bundle: compiled.bundle,
            source: source.to_owned(),
            author: None,
            message: None,
        };
        self.parts.client.deploy(deploy).await.unwrap();
        worker::start(WorkerConfig { hook, ..WorkerConfig::new(self.pool.clone(), registry) }).await.unwrap()
    }
}

fn works(gate: Option<Arc<Semaphore>>) -> Vec<Work> {
    let work = |name, f: fn(&Value) -> Value| {
        let script: Script = Arc::new(move |_, input| {
            let output = f(&input);
            Box::pin(async move { Ok(output) })
        });
        Work::new(name, script)
    };
    let implement: Script = Arc::new(move |_, _| {
        let gate = gate.clone();
        Box::pin(async move {
            if let Some(gate) = gate {
                gate.acquire().await.expect("open").forget();
            }
            Ok(json!({"work": "w", "summary": "done"}))
        })
    });
    vec![
        work("gather@1", |input| {
            if input["answer"] == "" {
                json!({"complete": false, "question": "Which <color>?", "suggestions": ["Red & green", "Blue"],
                       "requirements": [], "assumptions": []})
            } else {
                json!({"complete": true, "requirements": [input["answer"]], "assumptions": []})
            }
        }),
        work("plan@1", |input| {
            json!({"summary_markdown": format!("The plan. {}", input["changes"].as_str().unwrap_or_default()), "limit_credits": "5",
                   "todo": [{"id": "one", "title": "First"}, {"id": "two", "title": "Second"}]})
        }),
        Work::new("implement@1", implement).metered(),
        work("check@1", |input| json!({"passed": true, "again": false, "reason": "", "work": input["work"]})),
        work("commit@1", |_| json!({"oid": "c0ffee"})),
        work("verify@1", |_| json!({"verdict": "accept", "report_markdown": "", "todo": []})),
        work("limit@1", |input| json!({"left_credits": input["credits"], "limit_credits": input["credits"]})),
        work("readme@1", |_| json!({})),
        work("deliver@1", |_| json!({"commit": "c0ffee0123"})),
    ]
}

/// The payload of the invoice of a `/buy`.
async fn invoice(bot: &Bot, n: usize) -> (String, i64) {
    let call: Call = bot.fake.count("SendInvoice", n).await.pop().unwrap();
    assert_eq!(call.body["currency"], "XTR");
    (call.body["payload"].as_str().unwrap().to_owned(), call.body["prices"][0]["amount"].as_i64().unwrap())
}

#[tokio::test]
async fn a_start_greets_and_grants_once_and_unknown_words_are_answered() {
    let mut bot = Bot::start().await;
    bot.fake.says(ADA, "/start");
    bot.fake.says(ADA, "/start payload");
    bot.fake.says(ADA, "/fly");
    bot.fake.says(ADA, "/credits");
    bot.fake.says_with(ADA, json!({"voice": {"file_id": "f", "file_unique_id": "u", "duration": 1}}));
    bot.fake.repeat(2);
    bot.fake.message("I do not know /fly").await;
    let greeting = bot.fake.message("Hello").await;
    assert!(greeting.text().contains("<b>100</b> credits"), "{}", greeting.text());
    bot.fake.message("I read text only").await;
    bot.settled(5).await;
    // Repeated updates were neither stored nor answered again.
    assert_eq!(bot.fake.done("SendMessage").len(), 5);
    assert_eq!(bot.number("select count(*) from telegram_inbox").await, 5);
    assert_eq!(bot.number("select count(*) from credit_transactions").await, 1);
    assert_eq!(bot.number("select credit_balance_ucr from users").await, 100_000_000);
    let texts: Vec<_> = bot.fake.done("SendMessage").iter().map(|c| c.text().to_owned()).collect();
    assert!(texts[2].contains("/fly") && texts[3].contains("You have <b>100</b>"), "in order: {texts:?}");
    bot.stop().await;
}

#[tokio::test]
async fn an_idea_becomes_a_delivered_project() {
    let mut bot = Bot::start().await;
    let worker = bot.worker(Arc::new(NoHook), None).await;
    bot.fake.says(ADA, IDEA);
    let question = bot.fake.message("Which &lt;color&gt;?").await;
    let (red, blue) = (question.button("Red").unwrap(), question.button("Blue").unwrap());
    assert!(red.len() <= 64 && question.body["parse_mode"] == "HTML");
    // The same press comes as two updates, and everything is given twice.
    bot.fake.presses(ADA, question.message_id, &red);
    bot.fake.presses(ADA, question.message_id, &red);
    bot.fake.presses(ADA, question.message_id, &blue);
    bot.fake.repeat(1);
    let plan = bot.fake.message("needs your decision").await;
    bot.fake.count("AnswerCallbackQuery", 3).await;
    assert_eq!(bot.number("select count(*) from inbox where kind = 'signal'").await, 1);
    let answers: Vec<_> = bot.fake.done("AnswerCallbackQuery").iter().map(|c| c.text().to_owned()).collect();
    assert_eq!(answers.iter().filter(|text| *text == "Red & green").count(), 1, "{answers:?}");

    // Somebody else's press, and an invented one, do nothing.
    let approve = plan.button("Approve").unwrap();
    bot.fake.presses(EVE, plan.message_id, &approve);
    bot.fake.presses(ADA, plan.message_id, "0123456789abcdef0123456789abcdef");
    let answers = bot.fake.count("AnswerCallbackQuery", 5).await;
    assert!(answers[3..].iter().all(|c| c.text().contains("not yours")), "{answers:?}");

    // Changes first; the buttons of the old plan are stale then.
    bot.fake.presses(ADA, plan.message_id, &plan.button("Change").unwrap());
    bot.fake.message("What should be different?").await;
    bot.fake.says(ADA, "less <b>blue</b>");
    let second = bot.fake.message("The plan. less &lt;b&gt;blue").await;
    bot.fake.presses(ADA, plan.message_id, &approve);
    let answers = bot.fake.count("AnswerCallbackQuery", 7).await;
    assert!(answers[6].text().contains("answered already"), "{answers:?}");
    bot.fake.presses(ADA, second.message_id, &second.button("Approve").unwrap());
    let end = bot.fake.message("is done").await;
    assert!(end.text().contains("accepted") && end.text().contains("c0ffee0123") && end.text().contains("/download"));

    // One message was edited all along; its last text is the end.
    let edited = bot.fake.message("\nCompleted.\nLast: Deliver").await;
    let ids: std::collections::BTreeSet<_> =
        bot.fake.done("EditMessageText").iter().map(|call| call.message_id).collect();
    assert_eq!((ids.len(), ids.contains(&edited.message_id)), (1, true));

    // The archive comes from the rows of the project.
    bot.fake.says(ADA, "/download");
    bot.fake.message("nothing to download").await;
    // What came before the files were there stays as it is; a second request sends them.
    sqlx::query(
        "insert into project_files (project_id, path, version, sha256, size_bytes, content)
         select id, 'a.txt', 1, sha256('hi'), 2, 'hi' from projects",
    )
    .execute(&bot.pool)
    .await
    .unwrap();
    bot.fake.says(ADA, "/download");
    let document = bot.fake.count("SendDocument", 1).await.pop().unwrap();
    let body = document.body.as_str().unwrap();
    assert!(body.contains("a-tea-shop-more.zip") && body.contains("PK"), "{body:.300}");
    bot.fake.says(ADA, "/projects");
    bot.fake.message("A tea &lt;shop&gt; &amp; more").await;
    worker.drain(Duration::from_secs(5)).await;
    bot.stop().await;
}

#[tokio::test]
async fn a_typed_answer_reaches_the_run_and_a_stray_text_starts_nothing() {
    let mut bot = Bot::start().await;
    let worker = bot.worker(Arc::new(NoHook), Some(Arc::new(Semaphore::new(0)))).await;
    bot.fake.says(ADA, IDEA);
    bot.fake.message("Which").await;
    bot.fake.says(ADA, "Green");
    let plan = bot.fake.message("needs your decision").await;
    let (payload, dedupe): (Value, String) =
        sqlx::query_as("select payload, dedupe_id from inbox where kind = 'signal'")
            .fetch_one(&bot.pool)
            .await
            .unwrap();
    assert_eq!((payload["text"].as_str(), dedupe.starts_with("tg:")), (Some("Green"), true));
    // Who lost the plan gets it again, with buttons.
    bot.fake.says(ADA, "/status");
    bot.fake
        .until("the plan again", |calls| {
            (calls.iter().filter(|c| c.button("Approve").is_some()).count() == 2).then_some(())
        })
        .await;
    // A text beside the plan is nobody's answer: it can become the change.
    bot.fake.says(ADA, "with a blog");
    let offer = bot.fake.message("What shall I do with your text?").await;
    bot.fake.presses(ADA, offer.message_id, &offer.button("Change the plan").unwrap());
    let second = bot.fake.message("The plan. with a blog").await;
    bot.fake.presses(ADA, second.message_id, &second.button("Approve").unwrap());
    bot.fake.message("Building: item 1 of 2").await;
    assert_ne!(plan.message_id, second.message_id);
    // While it builds, a text starts a project only if that is wanted.
    bot.fake.says(ADA, "A second idea");
    let offer = bot
        .fake
        .until("the offer", |calls| calls.iter().filter(|c| c.text().contains("What shall I do")).nth(1).cloned())
        .await;
    assert_eq!(bot.number("select count(*) from projects").await, 1);
    assert!(offer.button("Change the plan").is_none());
    let start = offer.button("Start a new").unwrap();
    bot.fake.presses(ADA, offer.message_id, &start);
    bot.fake.presses(ADA, offer.message_id, &start);
    bot.fake.message("A second idea").await;
    bot.fake.count("AnswerCallbackQuery", 4).await;
    assert_eq!(bot.number("select count(*) from projects").await, 2);
    // Stops the second project, which commands mean now.
    bot.fake.says(ADA, "/cancel");
    bot.fake.message("was stopped").await;
    assert_eq!(bot.number("select count(*) from runs where closed_at is null").await, 1);
    bot.fake.says(ADA, "/status");
    bot.fake.message("Cancelled.").await;
    worker.drain(Duration::ZERO).await;
    bot.stop().await;
}

#[tokio::test]
async fn without_the_workflow_an_idea_is_answered() {
    let mut bot = Bot::start().await;
    bot.fake.says(ADA, IDEA);
    bot.fake.message("cannot start projects").await;
    assert_eq!(bot.number("select count(*) from projects").await, 0);
    bot.stop().await;
}

/// Refuses metered attempts until somebody has paid.
struct Broke;

impl TransitionHook for Broke {
    fn apply<'a>(
        &'a self,
        conn: &'a mut sqlx::PgConnection,
        transitions: &'a [Transition],
    ) -> BoxFuture<'a, Result<Vec<Refusal>, HookError>> {
        Box::pin(async move {
            let paid: i64 = sqlx::query_scalar("select count(*) from payments").fetch_one(conn).await.unwrap();
            let starts = transitions.iter().filter(|t| !t.started.is_empty() && paid == 0);
            Ok(starts.map(|t| Refusal { ord: t.ord, reason: "credits".into(), message: "none left".into() }).collect())
        })
    }
    fn meter<'a>(
        &'a self,
        _: &'a mut sqlx::PgConnection,
        _: &'a AttemptRef,
        _: Reading<'a>,
    ) -> BoxFuture<'a, Result<Verdict, HookError>> {
        Box::pin(async { Ok(Verdict::Accepted) })
    }
}

#[tokio::test]
async fn a_run_that_waits_for_credits_goes_on_after_a_purchase() {
    let mut bot = Bot::start().await;
    let worker = bot.worker(Arc::new(Broke), None).await;
    bot.fake.says(ADA, IDEA);
    bot.fake.message("Which").await;
    bot.fake.says(ADA, "Green");
    let plan = bot.fake.message("needs your decision").await;
    bot.fake.presses(ADA, plan.message_id, &plan.button("Approve").unwrap());
    bot.fake.message("waits for credits: none left").await;
    bot.fake.message("Waits for credits: /buy").await;
    bot.fake.says(ADA, "/buy");
    let (payload, amount) = invoice(&bot, 1).await;
    bot.fake.wants_to_pay(ADA, "77", amount, &payload);
    let answer = bot.fake.count("AnswerPreCheckoutQuery", 1).await.pop().unwrap();
    assert_eq!(answer.body, json!({"pre_checkout_query_id": "77", "ok": true}));
    bot.fake.pays(ADA, "stx1", amount, &payload);
    bot.fake.message("<b>260</b> credits were added; you have 360 now").await;
    bot.fake.message("is done").await;
    worker.drain(Duration::from_secs(5)).await;
    bot.stop().await;
}

#[tokio::test]
async fn a_button_of_somebody_else_does_nothing_and_is_kept() {
    let mut bot = Bot::start().await;
    let worker = bot.worker(Arc::new(NoHook), None).await;
    bot.fake.says(EVE, "/start");
    bot.fake.says(ADA, IDEA);
    bot.fake.message("Which").await;
    bot.fake.says(ADA, "Green");
    let plan = bot.fake.message("needs your decision").await;
    let approve = plan.button("Approve").unwrap();
    // In her own chat, and as if she were in Ada's.
    bot.fake.presses(EVE, plan.message_id, &approve);
    let message = json!({"message_id": plan.message_id, "date": 1_790_000_000, "text": "…",
        "chat": {"id": ADA, "type": "private", "first_name": "Ada"}});
    bot.fake
        .sends(json!({"callback_query": {"id": "forged", "chat_instance": "c", "data": approve, "message": message,
        "from": {"id": EVE, "is_bot": false, "first_name": "Eve"}}}));
    let answers = bot.fake.count("AnswerCallbackQuery", 2).await;
    assert!(answers.iter().all(|c| c.body["text"].as_str().unwrap().contains("not yours")), "{answers:?}");
    assert_eq!(
        bot.number("select count(*) from telegram_asks where answered_at is null").await,
        1,
        "nothing is decided"
    );
    let kept = "select count(*) from telegram_inbox where raw->'callback_query'->'from'->>'id' = '43' and processed_at is not null";
    assert_eq!(bot.number(kept).await, 2);
    bot.fake.presses(ADA, plan.message_id, &approve);
    bot.fake.message("is done").await;
    worker.drain(Duration::from_secs(5)).await;
    bot.stop().await;
}

#[tokio::test]
async fn a_pasted_key_is_deleted_and_nowhere_in_the_database() {
    let mut bot = Bot::start().await;
    bot.fake.says(ADA, "/start");
    let message = bot.fake.says(ADA, &format!("use my key {KEY} please"));
    let deleted = bot.fake.count("DeleteMessage", 1).await.pop().unwrap();
    assert_eq!(deleted.body, json!({"chat_id": ADA, "message_id": message}));
    bot.fake.message("looked like it held a key").await;
    // Whatever it looks like: what follows that word was meant to be one.
    let named = bot.fake.says(ADA, "/key zz0123456789abcdef01234567");
    let deleted = bot.fake.count("DeleteMessage", 2).await.pop().unwrap();
    assert_eq!(deleted.body, json!({"chat_id": ADA, "message_id": named}));
    bot.fake.says(ADA, "/key");
    bot.fake.message("Do not send the key in this chat").await;
    bot.settled(4).await;
    assert_eq!(bot.number("select count(*) from projects").await, 0);
    nowhere(&bot.pool).await;
    bot.stop().await;
}

/// No row of any table holds a part of [`KEY`].
async fn nowhere(pool: &PgPool) {
    let tables: Vec<String> =
        sqlx::query_scalar("select table_name::text from information_schema.tables where table_schema = 'public'")
            .fetch_all(pool)
            .await
            .unwrap();
    assert!(["telegram_inbox", "conversations"].iter().all(|name| tables.iter().any(|table| table == name)));
    for table in tables {
        let sql =
            format!("select count(*) from \"{table}\" t where to_jsonb(t)::text like '%0123456789abcdef01234567%'");
        let found: i64 = sqlx::query_scalar(sqlx::AssertSqlSafe(sql)).fetch_one(pool).await.unwrap();
        assert_eq!(found, 0, "the key is in {table}");
    }
}

#[tokio::test]
async fn a_key_in_a_caption_a_quote_or_an_edit_is_deleted_too_and_one_that_stays_is_nowhere_else() {
    let mut bot = Bot::start().await;
    bot.fake.says(ADA, "/start");
    let photo = json!([{"file_id": "f", "file_unique_id": "u", "width": 1, "height": 1}]);
    let caption = bot.fake.says_with(ADA, json!({"photo": photo, "caption": format!("my key: {KEY}")}));
    let first = bot.fake.says(ADA, "/help");
    bot.fake.edits(ADA, first, &format!("/help {KEY}"));
    let quote = json!({"message_id": 7, "date": 1_790_000_000, "text": KEY,
        "chat": {"id": ADA, "type": "private", "first_name": "Ada"}});
    let quoting = bot.fake.says_with(ADA, json!({"text": "is that right?", "reply_to_message": quote}));
    let deleted = bot.fake.count("DeleteMessage", 3).await;
    let ids: Vec<_> = deleted.iter().map(|call| call.body["message_id"].as_i64().unwrap()).collect();
    assert_eq!(ids, [caption, first, quoting]);
    // Telegram does not let it go (it is older than two days): the owner is told all the same, and nothing waits for it.
    bot.fake.wrong("DeleteMessage", Wrong::Refused);
    bot.fake.says(ADA, KEY);
    bot.fake.says(ADA, "/terms");
    bot.fake.message("Credits pay for the models").await;
    bot.settled(7).await;
    assert_eq!(bot.fake.done("DeleteMessage").len(), 3);
    assert_eq!(bot.number("select count(*) from projects").await, 0);
    nowhere(&bot.pool).await;
    bot.stop().await;
}

#[tokio::test]
async fn whoever_is_not_let_in_gets_one_answer_and_starts_nothing() {
    let mut bot = Bot::start_with(|parts| parts.settings.access = Access::Only(vec![ADA])).await;
    bot.worker(Arc::new(NoHook), None).await.drain(Duration::ZERO).await;
    bot.fake.says(EVE, "/start");
    bot.fake.says(EVE, IDEA);
    let message = bot.fake.says(EVE, KEY);
    bot.fake.presses(EVE, message, "x");
    bot.fake.wants_to_pay(EVE, "1", 100, "order:none");
    bot.fake.says_with(ADA, json!({"text": "hi", "chat": {"id": -7, "type": "group", "title": "g"}}));
    bot.fake.says_with(ADA, json!({"text": "hi", "chat": {"id": -7, "type": "group", "title": "g"}}));
    bot.settled(7).await;
    let said = bot.fake.done("SendMessage");
    assert_eq!(said.len(), 2, "{said:?}");
    assert!(said[0].text().contains("<code>43</code>") && said[1].text().contains("private chats only"));
    assert_eq!(bot.fake.done("DeleteMessage").len(), 1);
    assert_eq!(bot.fake.done("AnswerPreCheckoutQuery")[0].body["ok"], false);
    assert_eq!(bot.number("select count(*) from users").await, 0);
    assert_eq!(bot.number("select count(*) from runs").await, 0);
    bot.stop().await;
}

#[tokio::test]
async fn a_progress_message_is_edited_to_its_newest_text_only() {
    let mut bot = Bot::start().await;
    let gate = Arc::new(Semaphore::new(0));
    let worker = bot.worker(Arc::new(NoHook), Some(gate.clone())).await;
    bot.fake.says(ADA, IDEA);
    bot.fake.message("Which").await;
    bot.fake.says(ADA, "Green");
    let plan = bot.fake.message("needs your decision").await;
    bot.settled(2).await;
    // From here Telegram wants quiet at every edit; meanwhile the run goes to its end.
    let before = bot.fake.done("EditMessageText").len();
    bot.fake.wrong("EditMessageText", Wrong::Quiet(2));
    bot.fake.presses(ADA, plan.message_id, &plan.button("Approve").unwrap());
    let quiet = bot
        .fake
        .until("the refused edit", |calls| calls.iter().find(|c| c.wrong == Some(Wrong::Quiet(2))).cloned())
        .await;
    gate.add_permits(2);
    let last = bot.fake.message("\nCompleted.\nLast: Deliver").await;
    bot.fake.message("is done").await;
    bot.settled(3).await;
    assert!(last.at - quiet.at >= Duration::from_secs(2), "{:?}", last.at - quiet.at);
    let edits = bot.fake.done("EditMessageText");
    assert!(edits.len() - before <= 2, "{:?}", edits.iter().map(Call::text).collect::<Vec<_>>());
    // No edit repeats the text before it.
    assert!(edits.windows(2).all(|pair| pair[0].text() != pair[1].text()));
    worker.drain(Duration::from_secs(5)).await;
    bot.stop().await;
}

#[tokio::test]
async fn a_telegram_that_misbehaves_loses_and_doubles_nothing_it_need_not() {
    let mut bot = Bot::prepare(|_| {}).await;
    for method in ["GetMe", "GetUpdates"] {
        bot.fake.wrong(method, Wrong::HangUp);
    }
    bot.fake.wrong("GetUpdates", Wrong::Conflict);
    bot.fake.wrong("GetUpdates", Wrong::Quiet(0));
    bot.fake.wrong("SendMessage", Wrong::HangUp);
    bot.fake.wrong("SendMessage", Wrong::Broken);
    bot.fake.wrong("SendMessage", Wrong::HangUp);
    bot.fake.says(ADA, "/start");
    bot.fake.says(ADA, "/terms");
    bot = bot.resume();
    // The greeting was said and its answer lost: it is said twice more without certainty, and then given up.
    bot.fake.message("Credits pay for the models").await;
    bot.settled(2).await;
    let tries: Vec<_> = bot.fake.calls().into_iter().filter(|c| c.text().contains("Hello")).collect();
    assert_eq!(
        tries.iter().map(|c| c.wrong).collect::<Vec<_>>(),
        [Some(Wrong::HangUp), Some(Wrong::Broken), Some(Wrong::HangUp)]
    );
    assert_eq!(bot.number("select count(*) from telegram_outbox where state = 'unknown'").await, 1);
    // A user who has blocked the bot is let alone until he writes again.
    bot.fake.wrong("SendMessage", Wrong::Blocked);
    bot.fake.says(ADA, "/help");
    let blocked =
        async { while bot.number("select count(*) from telegram_chats where blocked_at is not null").await == 0 {} };
    tokio::time::timeout(Duration::from_secs(120), blocked).await.unwrap();
    bot.fake.says(ADA, "/paysupport");
    bot.fake.message("Questions about a payment").await;
    bot.fake.message("Write your idea to start a project").await;
    bot.stop().await;
}

#[tokio::test]
async fn what_telegram_does_not_take_is_said_otherwise() {
    let mut bot = Bot::start().await;
    // Its formatting was not understood: then without.
    bot.fake.wrong("SendMessage", Wrong::Says("Bad Request: can't parse entities: Unsupported start tag \"x\""));
    bot.fake.says(ADA, "/start");
    let greeting = bot.fake.count("SendMessage", 1).await.remove(0);
    assert!(greeting.body.get("parse_mode").is_none() && !greeting.text().contains("<b>"), "{greeting:?}");
    // The message that shows the progress was deleted: it is sent anew, and edited from then on.
    let worker = bot.worker(Arc::new(NoHook), None).await;
    bot.fake.wrong("EditMessageText", Wrong::Says("Bad Request: message to edit not found"));
    // The button was pressed long ago: the decision counts all the same.
    let old = "Bad Request: query is too old and response timeout expired or query ID is invalid";
    bot.fake.wrong("AnswerCallbackQuery", Wrong::Says(old));
    bot.fake.says(ADA, IDEA);
    let begins = |call: &&Call| call.done() && call.text().contains("Started. I read your idea");
    let first = bot.fake.until("the first progress", |calls| calls.iter().find(begins).cloned()).await;
    bot.fake.message("Which").await;
    bot.fake.says(ADA, "Green");
    let plan = bot.fake.message("needs your decision").await;
    bot.fake.presses(ADA, plan.message_id, &plan.button("Approve").unwrap());
    let last = bot.fake.message("\nCompleted.\nLast: Deliver").await;
    bot.fake.message("is done").await;
    assert_ne!(last.message_id, first.message_id);
    let refused = bot.fake.calls().into_iter().filter(|call| matches!(call.wrong, Some(Wrong::Says(_))));
    assert_eq!(refused.count(), 3, "each was met");
    worker.drain(Duration::from_secs(5)).await;
    bot.stop().await;
}

#[tokio::test]
async fn a_long_plan_comes_in_pieces_with_the_buttons_under_the_last() {
    let mut bot = Bot::start().await;
    let worker = bot.worker(Arc::new(NoHook), None).await;
    bot.fake.says(ADA, IDEA);
    bot.fake.message("Which").await;
    bot.fake.says(ADA, "Green");
    let plan = bot.fake.message("needs your decision").await;
    bot.fake.presses(ADA, plan.message_id, &plan.button("Change").unwrap());
    bot.fake.message("What should be different?").await;
    bot.fake.says(ADA, &"some & more ".repeat(700));
    let last = bot
        .fake
        .until("the last piece", |calls| {
            calls
                .iter()
                .rev()
                .find(|c| c.method == "sendmessage" && c.button("Approve").is_some())
                .cloned()
                .filter(|c| c.message_id != plan.message_id)
        })
        .await;
    let pieces: Vec<_> =
        bot.fake.done("SendMessage").into_iter().filter(|c| c.text().contains("some &amp; more")).collect();
    assert_eq!((pieces.len(), pieces[2].message_id), (3, last.message_id));
    assert!(pieces[..2].iter().all(|c| c.button("Approve").is_none()));
    worker.drain(Duration::from_secs(5)).await;
    bot.stop().await;
}

#[tokio::test]
async fn without_a_token_there_is_no_bot() {
    let bot = Bot::prepare(|parts| parts.settings.token = None).await;
    let (_stop, stopped) = watch::channel(false);
    telegram::run(bot.parts.clone(), stopped).await.unwrap();
    assert!(bot.fake.calls().is_empty());
}
