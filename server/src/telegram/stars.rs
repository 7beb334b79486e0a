//! Stars that go back, and Telegram's own list of them.
//!
//! A refund is booked by the ledger first; this asks Telegram for it until Telegram has said yes or no, whoever died in between.

use super::{
    Error, Parts,
    api::{self, Fault},
    render,
    run::{Session, pause},
};
use crate::{
    config,
    store::telegram::{
        Tx, commit,
        orders::OpenRefund,
        outbox::{self, Outgoing},
    },
};
use chrono::{DateTime, Utc};
use futures_util::future::BoxFuture;
use loopwright_activities::{
    billing::purchase::{self, Refund},
    reconcile::{StarTransaction, Stars},
};
use loopwright_engine::Failure;
use serde_json::{Value, json};
use teloxide::Bot;

/// Carries out refunds until the stop.
///
/// # Errors
/// The database.
pub(super) async fn run(session: &Session) -> Result<(), Error> {
    let mut stop = session.stop.clone();
    loop {
        refunds(session).await?;
        if pause(session.parts.pace.refresh, &mut stop).await {
            return Ok(());
        }
    }
}

/// One pass over the refunds that the ledger has booked.
async fn refunds(session: &Session) -> Result<(), Error> {
    let store = &session.parts.store;
    for refund in store.open_refunds().await? {
        match one(session, &refund).await {
            Ok(true) => {}
            Ok(false) => break,
            Err(Error::Token) => return Err(Error::Token),
            // Its own fault, or the database's: then the next question of that ends the session.
            Err(error) => {
                tracing::error!(charge = refund.charge_id, %error, "a refund cannot be booked; it is tried again");
            }
        }
    }
    Ok(())
}

/// Asks Telegram for one refund and books what it says. False if the next one would meet the same.
async fn one(session: &Session, refund: &OpenRefund) -> Result<bool, Error> {
    let Some(user) = refund.telegram_user_id else {
        refused(session, refund, "the payer has no Telegram identity").await?;
        return Ok(true);
    };
    let body = json!({"user_id": user, "telegram_payment_charge_id": refund.charge_id});
    match api::call(&session.bot, "RefundStarPayment", body).await {
        Ok(_) => done(session, refund).await?,
        // It was done before, and we died or heard nothing.
        Err(Fault::Refused(why)) if why.contains("CHARGE_ALREADY_REFUNDED") => done(session, refund).await?,
        Err(Fault::Refused(why)) => {
            let charge = &refund.charge_id;
            tracing::error!(charge, why, "Telegram will not give a payment back; its credits are given again");
            refused(session, refund, &why).await?;
        }
        Err(Fault::Token) => return Err(Error::Token),
        // Asking again is safe: a charge is given back once.
        Err(fault) => {
            tracing::warn!(charge = refund.charge_id, ?fault, "a refund is not carried out yet; it is tried again");
            return Ok(!concerns_all(&fault));
        }
    }
    Ok(true)
}

/// Telegram gave a payment back.
///
/// # Transaction
/// One, with what the payer is told.
async fn done(session: &Session, refund: &OpenRefund) -> Result<(), Error> {
    let mut tx = session.parts.store.begin().await?;
    purchase::refund_done(&mut tx, &refund.charge_id).await?;
    tell(&mut tx, refund).await?;
    commit(tx).await?;
    session.queued.notify_one();
    Ok(())
}

/// Telegram will not give a payment back: its credits are given again, and what waits for some goes on.
///
/// # Transaction
/// One, with what the payer is told. Locks runs, then the account.
async fn refused(session: &Session, refund: &OpenRefund, why: &str) -> Result<(), Error> {
    let Parts { store, client, .. } = &session.parts;
    let mut tx = store.begin().await?;
    client.unblock_in(&mut tx, &json!({ "user_id": refund.user.to_string() })).await?;
    if purchase::refund_refused(&mut tx, &refund.charge_id, why).await? {
        tell(&mut tx, refund).await?;
    }
    commit(tx).await?;
    client.wake().await;
    session.queued.notify_one();
    Ok(())
}

async fn tell(tx: &mut Tx, refund: &OpenRefund) -> Result<(), Error> {
    let Some(chat_id) = refund.telegram_user_id else { return Ok(()) };
    let standing = purchase::refund_of(tx, &refund.charge_id).await.map_err(crate::store::Error::from)?;
    let Some(standing) = standing else { return Ok(()) };
    outbox::enqueue(tx, &told(chat_id, &refund.charge_id, &standing)).await?;
    Ok(())
}

/// What a payer is told of a refund, once per charge and outcome: Telegram tells the bot of what the bot has asked for too.
pub(super) fn told(chat_id: i64, charge_id: &str, refund: &Refund) -> Outgoing {
    Outgoing {
        chat_id,
        dedupe_key: format!("refund:{}:{charge_id}", if refund.state == "refused" { "refused" } else { "done" }),
        method: "SendMessage",
        body: render::message(chat_id, &render::refund(charge_id, refund), Vec::new()),
        urgent: false,
    }
}

/// Whether the next refund would meet the same. A payer who has blocked the bot keeps nobody else waiting.
fn concerns_all(fault: &Fault) -> bool {
    match fault {
        Fault::Quiet(_) | Fault::NotSent(_) | Fault::Unknown(_) | Fault::Token => true,
        Fault::Blocked(_)
        | Fault::Conflict(_)
        | Fault::NotModified
        | Fault::Gone
        | Fault::Entities
        | Fault::Late
        | Fault::Refused(_) => false,
    }
}

/// Telegram's list of Stars of a bot.
pub struct StarList {
    bot: Bot,
}

impl StarList {
    /// Of the configured bot; `None` without a token.
    ///
    /// # Errors
    /// The HTTP client cannot be built.
    pub fn configured(settings: &config::Telegram) -> anyhow::Result<Option<Self>> {
        Ok(api::bot(settings)?.map(|bot| Self { bot }))
    }
}

impl Stars for StarList {
    fn transactions(&self, offset: i64, limit: i64) -> BoxFuture<'_, Result<Vec<StarTransaction>, Failure>> {
        Box::pin(async move {
            let answer = api::call(&self.bot, "GetStarTransactions", json!({"offset": offset, "limit": limit}));
            let answer = answer.await.map_err(|fault| {
                let text = match fault {
                    Fault::Token => "Telegram refuses the token".to_owned(),
                    other => format!("Telegram: {other:?}"),
                };
                Failure::retryable("transient.http", text)
            })?;
            let lines = answer["transactions"].as_array().map(Vec::as_slice).unwrap_or_default();
            lines.iter().map(line).collect()
        })
    }
}

/// A line of the list. One that cannot be read stops the look: to skip it might lose a payment.
fn line(raw: &Value) -> Result<StarTransaction, Failure> {
    let unread =
        || Failure::permanent("internal.output", format!("a transaction of Telegram's list cannot be read: {raw}"));
    let incoming = raw["source"].is_object();
    let partner = if incoming { &raw["source"] } else { &raw["receiver"] };
    let at = raw["date"].as_i64().and_then(|seconds| DateTime::<Utc>::from_timestamp(seconds, 0));
    Ok(StarTransaction {
        id: raw["id"].as_str().ok_or_else(unread)?.to_owned(),
        incoming,
        telegram_user_id: partner["user"]["id"].as_i64(),
        stars: raw["amount"].as_i64().ok_or_else(unread)?,
        payload: partner["invoice_payload"].as_str().map(str::to_owned),
        at: at.ok_or_else(unread)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn only_what_concerns_all_refunds_stops_a_pass() {
        for fault in [
            Fault::Quiet(Duration::from_secs(1)),
            Fault::NotSent(String::new()),
            Fault::Unknown(String::new()),
            Fault::Token,
        ] {
            assert!(concerns_all(&fault), "{fault:?}");
        }
        for fault in [Fault::Blocked(String::new()), Fault::Conflict(String::new()), Fault::Gone, Fault::Late] {
            assert!(!concerns_all(&fault), "{fault:?}");
        }
    }

    #[test]
    fn a_list_of_stars_is_read_or_stops() {
        let user = json!({"type": "user", "user": {"id": 42}, "invoice_payload": "order:1"});
        let paid = line(&json!({"id": "stx1", "amount": 100, "date": 1_790_000_000, "source": user})).expect("read");
        assert!(paid.incoming && paid.telegram_user_id == Some(42) && paid.payload.as_deref() == Some("order:1"));
        let back = line(&json!({"id": "stx1", "amount": 100, "date": 1_790_000_000, "receiver": user})).expect("read");
        assert!(!back.incoming && back.stars == 100);
        let fragment = json!({"id": "w", "amount": 1, "date": 1_790_000_000, "receiver": {"type": "fragment"}});
        assert_eq!(line(&fragment).expect("read").telegram_user_id, None);
        for broken in [json!({}), json!({"id": "x", "date": 1}), json!({"id": "x", "amount": 1})] {
            assert_eq!(line(&broken).expect_err("unread").code, "internal.output");
        }
    }
}
