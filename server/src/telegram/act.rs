//! Acts on stored updates, once each: what an update causes and the mark that it was acted upon are one transaction.

use super::{
    Error, Parts,
    intent::{self, Incoming, Intent, Money},
    payments, render,
    run::Session,
    stars,
};
use crate::{
    config::Access,
    store::{
        telegram::{
            Tx,
            chats::{self, Chat},
            commit,
            inbox::{self, Stored},
            outbox::{self, Outgoing},
        },
        users::User,
    },
};
use loopwright_activities::billing::{
    MicroCredits,
    ledger::{Identity, ensure_user},
};
use serde_json::{Value, json};

mod commands;
mod talk;

pub(super) use talk::{Action, DECIDE, Verdict};

/// Tries of an update before it is given up: a quarter of an hour with the back-off. Later ones of its chat wait for it.
/// An update that tells of money is never given up.
const TRIES: i32 = 20;

/// Acts until the stop.
///
/// # Errors
/// The database.
pub(super) async fn run(session: &Session) -> Result<(), Error> {
    while !session.stopped() {
        if !next(session).await? && session.idle(&session.arrived).await {
            break;
        }
    }
    Ok(())
}

/// Acts on one update. False if there is none.
async fn next(session: &Session) -> Result<bool, Error> {
    let store = &session.parts.store;
    let mut tx = store.begin().await?;
    let Some(update) = inbox::next(&mut tx).await? else { return Ok(false) };
    let acted = match act(&session.parts, &mut tx, &update).await {
        Ok(()) => match inbox::processed(&mut tx, update.update_id).await {
            Ok(()) => commit(tx).await.map_err(Error::from),
            Err(error) => Err(error.into()),
        },
        Err(error) => {
            drop(tx);
            Err(error)
        }
    };
    if let Err(error) = acted {
        if let Error::Store(crate::store::Error::Unavailable(_)) = error {
            return Err(error);
        }
        let tries = update.tries.saturating_add(1);
        let money = intent::money(&update.raw).is_some();
        if money {
            tracing::error!(update = update.update_id, tries, %error, "a payment or refund is not booked yet; it is tried again");
        } else {
            tracing::warn!(update = update.update_id, tries, %error, "an update could not be acted upon");
        }
        let pause = session.parts.pace.after(tries.unsigned_abs());
        let pause_ms = i64::try_from(pause.as_millis()).unwrap_or(i64::MAX);
        let again = (money || tries < TRIES).then_some(pause_ms);
        store.update_failed(update.update_id, &error.to_string(), again).await?;
        if again.is_none() {
            give_up(session, &update).await?;
        }
        return Ok(true);
    }
    session.parts.client.wake().await;
    session.queued.notify_one();
    Ok(true)
}

/// Tells the sender that his message came to nothing.
async fn give_up(session: &Session, update: &Stored) -> Result<(), Error> {
    let Some(Incoming { chat_id, .. }) = intent::parse(&update.raw, update.redacted) else { return Ok(()) };
    let text = "Something went wrong here, and your last message came to nothing. Please send it again later.";
    let new = Outgoing {
        chat_id,
        dedupe_key: format!("failed:{}", update.update_id),
        method: "SendMessage",
        body: render::message(chat_id, text, Vec::new()),
        urgent: false,
    };
    let mut tx = session.parts.store.begin().await?;
    chats::chat(&mut tx, chat_id).await?;
    outbox::enqueue(&mut tx, &new).await?;
    Ok(commit(tx).await?)
}

/// One update under way: who, where, and the transaction of everything that follows from it.
pub(super) struct Scene<'a> {
    pub parts: &'a Parts,
    pub tx: &'a mut Tx,
    pub update_id: i64,
    pub chat_id: i64,
    pub from: i64,
    /// Messages said so far: numbers their keys.
    said: u32,
}

impl Scene<'_> {
    /// Says something in the chat.
    pub async fn say(&mut self, html: &str) -> Result<(), Error> {
        self.say_with(html, Vec::new()).await
    }

    /// Says something with buttons.
    pub async fn say_with(&mut self, html: &str, keyboard: render::Keyboard) -> Result<(), Error> {
        let body = render::message(self.chat_id, html, keyboard);
        self.queue("SendMessage", body).await
    }

    /// Puts a request into the outbox, under a key of this update.
    pub async fn queue(&mut self, method: &'static str, body: Value) -> Result<(), Error> {
        self.said += 1;
        let dedupe_key = format!("update:{}:{}", self.update_id, self.said);
        self.queue_once(dedupe_key, method, body).await
    }

    /// Puts a request into the outbox unless there was one with this key.
    pub async fn queue_once(&mut self, dedupe_key: String, method: &'static str, body: Value) -> Result<(), Error> {
        let urgent = method.starts_with("Answer") || method == "DeleteMessage";
        let new = Outgoing { chat_id: self.chat_id, dedupe_key, method, body, urgent };
        outbox::enqueue(self.tx, &new).await?;
        Ok(())
    }
}

async fn act(parts: &Parts, tx: &mut Tx, update: &Stored) -> Result<(), Error> {
    let incoming = intent::parse(&update.raw, update.redacted);
    if let Some(money) = intent::money(&update.raw)
        && !matches!(&incoming, Some(Incoming { intent: Intent::Paid(_) | Intent::Refunded { .. }, .. }))
    {
        return unread(parts, tx, update.update_id, &money).await;
    }
    let Some(Incoming { chat_id, from, intent }) = incoming else { return Ok(()) };
    let chat = chats::chat(tx, chat_id).await?;
    let mut scene = Scene { parts, tx, update_id: update.update_id, chat_id, from, said: 0 };
    let scene = &mut scene;
    // Money that was taken is booked whoever paid it; everything else is for those who are let in.
    match &intent {
        Intent::Paid(charge) => {
            if let Some(text) = payments::paid(parts, scene.tx, from, charge).await? {
                scene.say(&text).await?;
            }
            return Ok(());
        }
        Intent::Refunded { charge_id } => return refunded(scene, charge_id).await,
        Intent::Group => {
            let body = render::message(chat_id, "I work in private chats only: write to me directly.", Vec::new());
            return scene.queue_once(format!("group:{chat_id}"), "SendMessage", body).await;
        }
        // Whoever sent it: a key does not stay in a chat.
        Intent::Secret { message_id } => {
            let body = json!({"chat_id": chat_id, "message_id": message_id});
            scene.queue("DeleteMessage", body).await?;
        }
        _ => {}
    }
    if !allowed(&parts.settings.access, from) {
        return refuse(scene, &intent).await;
    }
    let user = user(scene).await?;
    if user.blocked {
        return match &intent {
            Intent::Button { query, .. } => {
                let body = render::callback_answer(query, "Your account is blocked.");
                scene.queue("AnswerCallbackQuery", body).await
            }
            Intent::PreCheckout { query, .. } => refuse_payment(scene, query, "Your account is blocked.").await,
            _ => scene.say("Your account is blocked. Ask the operator of this bot.").await,
        };
    }
    wish(scene, &chat, &user, intent).await
}

/// What somebody who may wants.
async fn wish(scene: &mut Scene<'_>, chat: &Chat, user: &User, intent: Intent) -> Result<(), Error> {
    match intent {
        Intent::Command(command) => commands::command(scene, chat, user, command).await,
        Intent::Text(text) => talk::text(scene, chat, user, &text).await,
        Intent::Button { query, message_id, token } => {
            talk::button(scene, chat, user, &query, message_id, &token).await
        }
        Intent::Unreadable => scene.say("I read text only. Please describe it in words.").await,
        Intent::Secret { .. } => {
            scene
                .say(
                    "Your message looked like it held a key or a token. I deleted it and kept nothing of it. Consider \
                     the key as seen: replace it at its provider. I never need one in this chat.",
                )
                .await
        }
        Intent::PreCheckout { query, currency, amount, payload } => {
            let body = payments::check(scene.tx, scene.from, &query, &currency, amount, &payload).await?;
            scene.queue("AnswerPreCheckoutQuery", body).await
        }
        Intent::Paid(_) | Intent::Refunded { .. } | Intent::Group => Ok(()),
    }
}

fn allowed(access: &Access, from: i64) -> bool {
    match access {
        Access::Open => true,
        Access::Only(ids) => ids.contains(&from),
    }
}

/// The one answer to somebody who is not let in.
async fn refuse(scene: &mut Scene<'_>, intent: &Intent) -> Result<(), Error> {
    match intent {
        Intent::Button { query, .. } => {
            let body = render::callback_answer(query, "This bot is not open to you.");
            scene.queue("AnswerCallbackQuery", body).await
        }
        Intent::PreCheckout { query, .. } => refuse_payment(scene, query, "This bot is not open to you.").await,
        _ => {
            let body = render::message(scene.chat_id, &render::not_allowed(scene.from), Vec::new());
            scene.queue_once(format!("refused:{}", scene.from), "SendMessage", body).await
        }
    }
}

async fn refuse_payment(scene: &mut Scene<'_>, query: &str, why: &str) -> Result<(), Error> {
    let body = json!({"pre_checkout_query_id": query, "ok": false, "error_message": why});
    scene.queue("AnswerPreCheckoutQuery", body).await
}

/// Money in an update that cannot be read: an operator decides.
async fn unread(parts: &Parts, tx: &mut Tx, update_id: i64, money: &Money<'_>) -> Result<(), Error> {
    let Some(text) = payments::unread(tx, update_id, money).await? else { return Ok(()) };
    let Some(from) = money.from() else { return Ok(()) };
    chats::chat(tx, from).await?;
    Scene { parts, tx, update_id, chat_id: from, from, said: 0 }.say(&text).await
}

async fn refunded(scene: &mut Scene<'_>, charge_id: &str) -> Result<(), Error> {
    let user = chats::user(scene.tx, scene.from).await?.map(|user| user.id);
    let known = match user {
        Some(user) => loopwright_activities::billing::purchase::taken_back(scene.tx, user, charge_id).await?,
        None => false,
    };
    if !known {
        return payments::unknown_refund(scene.tx, scene.from, user, charge_id).await;
    }
    let refund = loopwright_activities::billing::purchase::refund_of(scene.tx, charge_id).await;
    let Some(refund) = refund.map_err(crate::store::Error::from)? else { return Ok(()) };
    let told = stars::told(scene.chat_id, charge_id, &refund);
    scene.queue_once(told.dedupe_key, told.method, told.body).await
}

/// The sender's user, created with the welcome credits at first sight. A known user is only read: his row is locked
/// after runs, never before.
async fn user(scene: &mut Scene<'_>) -> Result<User, Error> {
    if let Some(user) = chats::user(scene.tx, scene.from).await? {
        return Ok(user);
    }
    let welcome = MicroCredits::from_credits(scene.parts.billing.welcome_credits.into());
    let (id, _) = ensure_user(scene.tx, &Identity::Telegram(scene.from), welcome).await?;
    Ok(User { id, blocked: false })
}
