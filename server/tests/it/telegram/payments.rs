//! Stars: what is sold, refused, given back, and what Telegram loses on the way.

use super::{ADA, Bot, EVE, invoice, pace};
use crate::fake_telegram::Wrong;
use loopwright_activities::billing::{MicroCredits, ledger};
use loopwright_server::telegram::Pace;
use serde_json::{Value, json};
use std::time::Duration;

/// A payment that fits no order, or that nobody has made.
fn payment(currency: &str, amount: i64, payload: &str, charge: &str) -> Value {
    json!({"currency": currency, "total_amount": amount, "invoice_payload": payload,
        "telegram_payment_charge_id": charge, "provider_payment_charge_id": "p"})
}

#[tokio::test]
async fn payments_are_booked_once_and_only_as_ordered() {
    let mut bot = Bot::start().await;
    bot.fake.says(ADA, "/start");
    bot.fake.says(EVE, "/start");
    bot.fake.says(ADA, "/buy 7");
    bot.fake.message("no such amount").await;
    bot.fake.says(ADA, "/buy 100");
    let (payload, amount) = invoice(&bot, 1).await;
    // Nobody else, nothing else, and no other amount.
    bot.fake.wants_to_pay(EVE, "1", amount, &payload);
    bot.fake.wants_to_pay(ADA, "2", amount, "order:none");
    bot.fake.wants_to_pay(ADA, "3", amount + 1, &payload);
    let refusals = bot.fake.count("AnswerPreCheckoutQuery", 3).await;
    assert!(refusals.iter().all(|c| c.body["ok"] == false && c.body["error_message"].is_string()), "{refusals:?}");
    // Twice the same charge, then the forwarded copy of the invoice.
    bot.fake.pays(ADA, "stx1", amount, &payload);
    bot.fake.pays(ADA, "stx1", amount, &payload);
    bot.fake.message("you have 200 now").await;
    bot.fake.wants_to_pay(ADA, "4", amount, &payload);
    let late = bot.fake.count("AnswerPreCheckoutQuery", 4).await.pop().unwrap();
    assert!(late.body["error_message"].as_str().unwrap().contains("paid already"));
    // Money that does not fit is kept for an operator, and grants nothing.
    bot.fake.pays(ADA, "stx2", 1, &payload);
    bot.fake.pays(ADA, "stx2", 1, &payload);
    bot.fake.message("does not fit its invoice").await;
    bot.fake.pays(ADA, "stx3", amount, &payload);
    bot.fake.message("you have 300 now").await;
    // Telegram gives one back.
    let refund = json!({"currency": "XTR", "total_amount": amount, "invoice_payload": payload,
        "telegram_payment_charge_id": "stx3", "provider_payment_charge_id": "p"});
    bot.fake.says_with(ADA, json!({"refunded_payment": refund}));
    bot.fake.says(ADA, "/usage");
    let usage = bot.fake.message("Latest changes").await;
    assert!(usage.text().contains("+100  bought") && usage.text().contains("-100  given back"), "{}", usage.text());
    bot.settled(14).await;
    let ada = bot.number("select credit_balance_ucr from users where telegram_user_id = 42").await;
    assert_eq!(ada, 200_000_000);
    assert_eq!(bot.number("select count(*) from payments").await, 2);
    assert_eq!(bot.number("select count(*) from payment_disputes").await, 1);
    assert_eq!(bot.number("select count(*) from payments where refund_state = 'done'").await, 1);
    assert_eq!(bot.fake.done("SendMessage").iter().filter(|c| c.text().contains("does not fit")).count(), 1);
    bot.stop().await;
}

#[tokio::test]
async fn an_operators_refund_reaches_telegram_whatever_happens_in_between() {
    let ms = Duration::from_millis;
    let mut bot = Bot::start_with(|parts| parts.pace = Pace { refresh: ms(20), ..pace() }).await;
    bot.fake.says(ADA, "/start");
    for (n, charge) in ["stx1", "stx2"].into_iter().enumerate() {
        bot.fake.says(ADA, "/buy 100");
        let (payload, amount) = invoice(&bot, n + 1).await;
        bot.fake.pays(ADA, charge, amount, &payload);
        bot.fake.message(&format!("you have {} now", 200 + 100 * n)).await;
    }
    bot.settled(5).await;
    bot.stop().await;
    // The ledger first, and then this process is gone.
    let store = bot.parts.store.clone();
    assert!(store.refund("stx1", Some("bought <twice>")).await.unwrap());
    assert!(!store.refund("stx1", Some("again")).await.unwrap());
    assert_eq!(store.refund("stx9", None).await.unwrap_err().code(), "payment_mismatch");
    let ada = "select credit_balance_ucr from users where telegram_user_id = 42";
    assert_eq!(bot.number(ada).await, 200_000_000);
    // Telegram does it and hangs up, so that nobody knows; asked again, it says that it was done.
    bot.fake.wrong("RefundStarPayment", Wrong::HangUp);
    let mut bot = bot.resume();
    bot.fake
        .until("two requests", |calls| {
            (calls.iter().filter(|c| c.method == "refundstarpayment").count() >= 2).then_some(())
        })
        .await;
    let state = async |bot: &Bot, sql: &'static str| {
        let wait = async {
            while bot.number(sql).await == 0 {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), wait).await.expect(sql);
    };
    state(&bot, "select count(*) from payments where charge_id = 'stx1' and refund_state = 'done'").await;
    assert_eq!(bot.number(ada).await, 200_000_000);
    let said = bot.fake.message("was given back").await;
    assert!(
        said.text().contains("<b>100 Stars</b> was given back: bought &lt;twice&gt;. Its 100 credits were taken"),
        "{}",
        said.text()
    );
    // What Telegram refuses for good is not lost: the credits come back.
    bot.fake.wrong("RefundStarPayment", Wrong::Refused);
    assert!(store.refund("stx2", None).await.unwrap());
    state(&bot, "select count(*) from payments where charge_id = 'stx2' and refund_state = 'refused'").await;
    assert_eq!(bot.number(ada).await, 200_000_000);
    let said = bot.fake.message("could not be given back").await;
    assert!(
        said.text().contains("Telegram says: ") && said.text().contains("Its 100 credits are in your balance again"),
        "{}",
        said.text()
    );
    assert_eq!(store.audit().await.unwrap().violations, []);
    // And where it gives the Stars back all the same, they go again.
    bot.fake.says_with(ADA, json!({"refunded_payment": payment("XTR", 100, "order", "stx2")}));
    state(&bot, "select count(*) from payments where charge_id = 'stx2' and refund_state = 'done'").await;
    assert_eq!(bot.number(ada).await, 100_000_000);
    assert_eq!(bot.number("select count(*) from payment_disputes").await, 0);
    assert_eq!(store.audit().await.unwrap().violations, []);
    bot.stop().await;
}

#[tokio::test]
async fn an_error_after_a_refund_was_booked_does_not_book_it_again_and_keeps_no_other_waiting() {
    let ms = Duration::from_millis;
    let quick = Pace { refresh: ms(5), pause: ms(1), pause_max: ms(5), ..pace() };
    let mut bot = Bot::start_with(|parts| parts.pace = quick).await;
    bot.fake.says(ADA, "/start");
    for (n, charge) in ["stx1", "stx2"].into_iter().enumerate() {
        bot.fake.says(ADA, "/buy 100");
        let (payload, amount) = invoice(&bot, n + 1).await;
        bot.fake.pays(ADA, charge, amount, &payload);
        bot.fake.message(&format!("you have {} now", 200 + 100 * n)).await;
    }
    bot.settled(5).await;
    // Telegram does it, and what is written of that is undone: the payer cannot be told.
    sqlx::raw_sql(
        "create function no_message() returns trigger language plpgsql as $$ begin raise exception 'broken'; end $$;
         create trigger no_message before insert on telegram_outbox for each row when (new.dedupe_key like 'refund:%:stx1')
           execute function no_message()",
    )
    .execute(&bot.pool)
    .await
    .unwrap();
    let store = bot.parts.store.clone();
    let mut booked = vec![store.refund("stx1", None).await.unwrap()];
    for requests in [1, 3] {
        bot.fake
            .until("it is asked for again", |calls| {
                (calls.iter().filter(|c| c.method == "refundstarpayment").count() >= requests).then_some(())
            })
            .await;
        // Whoever saw the error does all of it again.
        booked.push(store.refund("stx1", Some("again")).await.unwrap());
        assert_eq!(bot.number("select count(*) from payments where refund_state = 'requested'").await, 1);
    }
    assert_eq!(booked, [true, false, false]);
    assert!(store.refund("stx2", None).await.unwrap());
    bot.fake.message("was given back").await;
    assert_eq!(bot.number("select count(*) from payments where charge_id = 'stx2' and refund_state = 'done'").await, 1);
    sqlx::raw_sql("drop trigger no_message on telegram_outbox").execute(&bot.pool).await.unwrap();
    bot.fake
        .until("both are told", |calls| {
            (calls.iter().filter(|c| c.done() && c.text().contains("was given back")).count() == 2).then_some(())
        })
        .await;
    bot.settled(5).await;
    assert_eq!(bot.number("select count(*) from payments where refund_state = 'done'").await, 2);
    assert_eq!(bot.number("select count(*) from credit_transactions where kind = 'refund'").await, 2);
    assert_eq!(bot.number("select credit_balance_ucr from users where telegram_user_id = 42").await, 100_000_000);
    assert_eq!(bot.fake.done("SendMessage").iter().filter(|c| c.text().contains("was given back")).count(), 2);
    assert_eq!(store.audit().await.unwrap().violations, []);
    bot.stop().await;
}

#[tokio::test]
async fn a_payment_is_tried_until_it_is_booked() {
    let ms = Duration::from_millis;
    let mut bot = Bot::start_with(|parts| parts.pace = Pace { pause: ms(1), pause_max: ms(5), ..pace() }).await;
    bot.fake.says(ADA, "/start");
    bot.fake.says(ADA, "/buy 100");
    let (payload, amount) = invoice(&bot, 1).await;
    // Nothing can be booked, for more tries than any other update has.
    sqlx::raw_sql(
        "create function no_payment() returns trigger language plpgsql as $$ begin raise exception 'broken'; end $$;
         create trigger no_payment before insert or update on payments for each row execute function no_payment();",
    )
    .execute(&bot.pool)
    .await
    .unwrap();
    bot.fake.pays(ADA, "sk_charge1234567890123456789", amount, &payload);
    let tried = async {
        while bot.number("select coalesce(max(tries), 0)::bigint from telegram_inbox").await < 23 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), tried).await.unwrap();
    assert_eq!(bot.number("select count(*) from telegram_inbox where processed_at is null").await, 1);
    sqlx::raw_sql("drop trigger no_payment on payments").execute(&bot.pool).await.unwrap();
    bot.fake.message("you have 200 now").await;
    bot.settled(3).await;
    // Its id looks like a key, and is kept to the letter.
    let known = "select count(*) from payments where charge_id = 'sk_charge1234567890123456789'";
    assert_eq!(bot.number(known).await, 1);
    assert!(bot.fake.calls().iter().all(|c| !c.text().contains("Something went wrong")));
    bot.stop().await;
}

#[tokio::test]
async fn money_that_cannot_be_read_is_kept_for_an_operator() {
    let mut bot = Bot::start().await;
    bot.fake.says(ADA, "/start");
    let payment = |charge: Value, amount: Value| {
        json!({"currency": "XTR", "total_amount": amount, "invoice_payload": "order:1",
            "telegram_payment_charge_id": charge, "provider_payment_charge_id": "p"})
    };
    for _ in 0..2 {
        bot.fake.says_with(ADA, json!({"successful_payment": payment(json!("stx1"), json!("many"))}));
    }
    bot.fake.says_with(EVE, json!({"successful_payment": payment(json!(7), json!(100))}));
    bot.fake.says_with(ADA, json!({"refunded_payment": payment(json!("stx1"), json!("many"))}));
    // Who answers to a payment does not pay again.
    let paid = json!({"message_id": 1, "date": 1, "chat": {"id": ADA, "type": "private", "first_name": "Ada"},
        "successful_payment": payment(json!("stx2"), json!("many"))});
    bot.fake.says_with(ADA, json!({"text": "/help", "reply_to_message": paid}));
    bot.settled(6).await;
    let kept: Vec<(String, i64, i64, String)> = sqlx::query_as(
        "select charge_id, telegram_user_id, amount, reason from payment_disputes order by received_at, charge_id",
    )
    .fetch_all(&bot.pool)
    .await
    .unwrap();
    let kept: Vec<_> = kept.iter().map(|(charge, from, amount, _)| (charge.as_str(), *from, *amount)).collect();
    let update = bot.number("select update_id from telegram_inbox where chat_id = 43").await;
    let expected = [("stx1", ADA, 0), (&*format!("update:{update}"), EVE, 100), ("refund:stx1", ADA, 0)];
    assert_eq!(kept, expected);
    let reason = "select count(*) from payment_disputes where reason like '%cannot be read: {%\"many\"%'";
    assert_eq!(bot.number(reason).await, 2);
    let said: Vec<_> = bot.fake.done("SendMessage");
    assert_eq!(said.iter().filter(|c| c.text().contains("could not read it")).count(), 2, "{said:?}");
    assert_eq!(bot.number("select count(*) from credit_transactions").await, 1);
    bot.stop().await;
}

#[tokio::test]
async fn money_that_does_not_fit_is_refused_and_every_refusal_leaves_a_row() {
    let mut bot = Bot::start().await;
    bot.fake.says(ADA, "/start");
    bot.fake.says(EVE, "/start");
    bot.fake.says(ADA, "/buy 100");
    let (payload, amount) = invoice(&bot, 1).await;
    // Before a payment: another currency, and an offer whose time is over.
    let person = json!({"id": ADA, "is_bot": false, "first_name": "Ada"});
    bot.fake.sends(json!({"pre_checkout_query": {"id": "1", "from": person, "currency": "USD", "total_amount": amount,
        "invoice_payload": payload}}));
    let refused = bot.fake.count("AnswerPreCheckoutQuery", 1).await.pop().unwrap();
    assert_eq!(refused.body["ok"], false, "{refused:?}");
    sqlx::query("update orders set expires_at = engine_now()").execute(&bot.pool).await.unwrap();
    bot.fake.wants_to_pay(ADA, "2", amount, &payload);
    let refused = bot.fake.count("AnswerPreCheckoutQuery", 2).await.pop().unwrap();
    assert_eq!(refused.body["ok"], false, "{refused:?}");
    // Money that came all the same: another currency, no order, somebody else's order, nobody we know. Each twice.
    for _ in 0..2 {
        bot.fake.says_with(ADA, json!({"successful_payment": payment("USD", amount, &payload, "usd")}));
        bot.fake.says_with(ADA, json!({"successful_payment": payment("XTR", amount, "order:none", "none")}));
        bot.fake.says_with(EVE, json!({"successful_payment": payment("XTR", amount, &payload, "eve")}));
        bot.fake.says_with(77, json!({"successful_payment": payment("XTR", amount, &payload, "stranger")}));
        // Given back, and never known; and somebody else's.
        bot.fake.says_with(ADA, json!({"refunded_payment": payment("XTR", amount, &payload, "never")}));
    }
    bot.fake.pays(ADA, "stx1", amount, &payload);
    bot.fake.message("you have 200 now").await;
    bot.fake.says_with(EVE, json!({"refunded_payment": payment("XTR", amount, &payload, "stx1")}));
    bot.settled(17).await;
    let kept: Vec<(String, i64, String, i64, bool)> = sqlx::query_as(
        "select charge_id, telegram_user_id, currency, amount, user_id is null from payment_disputes order by charge_id",
    )
    .fetch_all(&bot.pool)
    .await
    .unwrap();
    let kept: Vec<_> =
        kept.iter().map(|(id, from, xtr, stars, n)| (id.as_str(), *from, xtr.as_str(), *stars, *n)).collect();
    let expected = [
        ("eve", EVE, "XTR", amount, false),
        ("none", ADA, "XTR", amount, false),
        ("refund:never", ADA, "XTR", 0, false),
        ("refund:stx1", EVE, "XTR", 0, false),
        ("stranger", 77, "XTR", amount, true),
        ("usd", ADA, "USD", amount, false),
    ];
    assert_eq!(kept, expected);
    assert_eq!(bot.number("select credit_balance_ucr from users where telegram_user_id = 42").await, 200_000_000);
    assert_eq!(bot.number("select credit_balance_ucr from users where telegram_user_id = 43").await, 100_000_000);
    assert_eq!(bot.number("select count(*) from payments where refund_state = 'none'").await, 1);
    let said = bot.fake.done("SendMessage");
    assert_eq!(said.iter().filter(|c| c.text().contains("does not fit")).count(), 4, "once each: {said:#?}");
    assert_eq!(bot.parts.store.audit().await.unwrap().violations, []);
    bot.stop().await;
}

#[tokio::test]
async fn a_purchase_that_is_taken_back_after_use_loses_what_is_left_of_it() {
    let mut bot = Bot::start().await;
    bot.fake.says(ADA, "/start");
    bot.fake.says(ADA, "/buy 100");
    let (payload, amount) = invoice(&bot, 1).await;
    bot.fake.pays(ADA, "stx1", amount, &payload);
    bot.fake.message("you have 200 now").await;
    // The welcome credits and 30 of the bought ones are gone.
    let mut conn = bot.pool.acquire().await.unwrap();
    let user = sqlx::query_scalar("select id from users").fetch_one(&mut *conn).await.unwrap();
    let taken = MicroCredits::from_credits(-130);
    ledger::adjust(&mut conn, user, "T1", taken).await.unwrap();
    assert_eq!(bot.parts.store.refund("stx1", None).await.unwrap_err().code(), "purchase_used");
    for _ in 0..2 {
        bot.fake.says_with(ADA, json!({"refunded_payment": payment("XTR", amount, &payload, "stx1")}));
    }
    bot.settled(5).await;
    assert_eq!(bot.number("select credit_balance_ucr from users").await, 0);
    assert_eq!(bot.number("select count(*) from payments where refund_state = 'done'").await, 1);
    // Its payer is told what was taken, and an operator what is owed: once each.
    let said = bot.fake.message("was given back").await;
    assert!(said.text().contains("Of its 100 credits 70 were taken from your balance; 30 are used"), "{}", said.text());
    let found = bot.parts.store.findings(100).await.unwrap();
    assert!(found.len() == 1 && found[0].kind == "payment_used" && found[0].seen == 1, "{found:?}");
    assert!(
        found[0].message.contains("30 of its 100 credits were used") && found[0].message.ends_with("30 are owed"),
        "{found:?}"
    );
    assert_eq!(bot.number("select count(*) from payment_disputes").await, 0);
    // The same charge reported as paid once more gives nothing.
    bot.fake.pays(ADA, "stx1", amount, &payload);
    bot.settled(6).await;
    assert_eq!(bot.number("select credit_balance_ucr from users").await, 0);
    assert_eq!(bot.parts.store.audit().await.unwrap().violations, []);
    bot.stop().await;
}

#[tokio::test]
async fn a_refund_is_asked_for_until_telegram_has_answered() {
    let ms = Duration::from_millis;
    let mut bot = Bot::start_with(|parts| parts.pace = Pace { refresh: ms(20), ..pace() }).await;
    bot.fake.says(ADA, "/start");
    bot.fake.says(ADA, "/buy 100");
    let (payload, amount) = invoice(&bot, 1).await;
    bot.fake.pays(ADA, "stx1", amount, &payload);
    bot.fake.message("you have 200 now").await;
    for wrong in [Wrong::Broken, Wrong::Quiet(1), Wrong::Blocked, Wrong::HangUp] {
        bot.fake.wrong("RefundStarPayment", wrong);
    }
    assert!(bot.parts.store.refund("stx1", None).await.unwrap());
    bot.fake
        .until("five requests", |calls| {
            (calls.iter().filter(|c| c.method == "refundstarpayment").count() >= 5).then_some(())
        })
        .await;
    let done = async {
        while bot.number("select count(*) from payments where refund_state = 'done'").await == 0 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), done).await.unwrap();
    assert_eq!(bot.number("select credit_balance_ucr from users").await, 100_000_000, "taken once");
    assert_eq!(bot.parts.store.audit().await.unwrap().violations, []);
    bot.stop().await;
}
