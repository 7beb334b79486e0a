//! Credits for Stars: offers, the check before a payment, the payment itself.

use super::{
    Error, Parts,
    intent::{Charge, Money},
    render,
};
use crate::store::telegram::{
    Tx, chats,
    orders::{self, Dispute},
};
use loopwright_activities::billing::{
    MicroCredits,
    ledger::{self, LedgerError},
    purchase::{self, Payment},
};
use serde_json::{Value, json};
use uuid::Uuid;

/// What can be bought: Stars and the credits for them. Chosen: a Star pays out about 0.013 USD and a credit is worth
/// about 0.01, so a credit costs a Star and larger amounts a little less.
pub const PACKS: &[(i32, i64)] = &[(100, 100), (250, 260), (500, 540), (1_000, 1_120)];
/// The pack of a bare `/buy`.
pub const STANDARD: i32 = 250;
/// An offer stands so long. Chosen: prices may change within days.
const OFFER_HOURS: i32 = 24;
/// Characters of an unreadable payment that a dispute keeps. Chosen: a readable one has about 300.
const RAW_CHARS_MAX: usize = 2_000;

/// Opens an order. Returns the invoice; `None` if there is no such pack.
pub(super) async fn offer(tx: &mut Tx, chat_id: i64, user: Uuid, stars: Option<i32>) -> Result<Option<Value>, Error> {
    let wanted = stars.unwrap_or(STANDARD);
    let Some((stars, credits)) = PACKS.iter().copied().find(|(stars, _)| *stars == wanted) else { return Ok(None) };
    let payload = orders::open(tx, user, stars, MicroCredits::from_credits(credits), OFFER_HOURS).await?;
    Ok(Some(render::invoice(chat_id, stars, credits, &payload)))
}

/// The answer to the question whether a payment may be made.
pub(super) async fn check(
    tx: &mut Tx,
    from: i64,
    query: &str,
    currency: &str,
    amount: i64,
    payload: &str,
) -> Result<Value, Error> {
    Ok(match orders::payable(tx, from, payload, currency, amount).await? {
        Ok(()) => json!({"pre_checkout_query_id": query, "ok": true}),
        Err(why) => {
            tracing::info!(from, ?why, "a payment was refused before it was made");
            json!({"pre_checkout_query_id": query, "ok": false, "error_message": render::unpayable(why)})
        }
    })
}

/// Books a payment that was made. Returns what to say; nothing if it was booked before.
///
/// # Transaction
/// Wakes what waits for credits (locks runs), then grants (locks the user): the lock order of workers. Idempotent by
/// charge id. A payment that does not fit its order is kept for an operator and grants nothing.
pub(super) async fn paid(parts: &Parts, tx: &mut Tx, from: i64, charge: &Charge) -> Result<Option<String>, Error> {
    let user = chats::user(tx, from).await?.map(|user| user.id);
    let refused = match user {
        None => "the payer is no user".to_owned(),
        Some(user) => {
            let payment = Payment {
                charge_id: &charge.id,
                payload: &charge.payload,
                currency: &charge.currency,
                stars: i32::try_from(charge.amount).unwrap_or(0),
                recurring: charge.recurring,
            };
            parts.client.unblock_in(tx, &json!({ "user_id": user.to_string() })).await?;
            match purchase::purchase(tx, user, &payment).await {
                Ok(None) => return Ok(None),
                Ok(Some(credits)) => {
                    let balance = ledger::balance(tx, user).await?.available();
                    return Ok(Some(format!(
                        "Thank you! <b>{credits}</b> credits were added; you have {balance} now. Work that waited for \
                         credits goes on.\nReceipt: <code>{}</code>",
                        teloxide::utils::html::escape(&charge.id)
                    )));
                }
                Err(LedgerError::Mismatch(why)) => why,
                Err(error) => return Err(error.into()),
            }
        }
    };
    let dispute = Dispute {
        charge_id: &charge.id,
        telegram_user_id: from,
        user,
        payload: &charge.payload,
        currency: &charge.currency,
        amount: charge.amount,
        reason: &refused,
    };
    if !orders::dispute(tx, &dispute).await? {
        return Ok(None);
    }
    tracing::error!(from, charge = charge.id, why = refused, "a payment does not fit its order; it was not granted");
    Ok(Some(disputed(
        "Your payment arrived, but it does not fit its invoice, so no credits were added yet.",
        &charge.id,
    )))
}

/// Keeps money that cannot be read for an operator. Returns what to say; nothing if it is known already.
///
/// # Transaction
/// Idempotent by charge id, or by update id where there is none. A refund is kept as `refund:<charge>`: the payment may
/// be in dispute itself.
pub(super) async fn unread(tx: &mut Tx, update_id: i64, money: &Money<'_>) -> Result<Option<String>, Error> {
    let text = |name: &str| money.body[name].as_str().unwrap_or_default();
    let charge = match text("telegram_payment_charge_id") {
        "" => format!("update:{update_id}"),
        id => id.to_owned(),
    };
    let from = money.from().unwrap_or_default();
    let paid = money.kind == "successful_payment";
    let raw: String = money.body.to_string().chars().take(RAW_CHARS_MAX).collect();
    let dispute = Dispute {
        charge_id: &if paid { charge.clone() } else { format!("refund:{charge}") },
        telegram_user_id: from,
        user: chats::user(tx, from).await?.map(|user| user.id),
        payload: text("invoice_payload"),
        currency: text("currency"),
        amount: money.body["total_amount"].as_i64().unwrap_or_default(),
        reason: &format!("the {} of update {update_id} cannot be read: {raw}", money.kind),
    };
    if !orders::dispute(tx, &dispute).await? {
        return Ok(None);
    }
    tracing::error!(
        from,
        charge,
        update = update_id,
        kind = money.kind,
        "a payment or refund cannot be read; see payment_disputes"
    );
    Ok(paid.then(|| disputed("Your payment arrived, but I could not read it, so no credits were added yet.", &charge)))
}

/// Keeps a refund of a payment that is not known, or is another user's, for an operator. Once per charge.
pub(super) async fn unknown_refund(tx: &mut Tx, from: i64, user: Option<Uuid>, charge_id: &str) -> Result<(), Error> {
    let dispute = Dispute {
        charge_id: &format!("refund:{charge_id}"),
        telegram_user_id: from,
        user,
        payload: "",
        currency: "XTR",
        amount: 0,
        reason: "Telegram gave back a payment that is not known of this user",
    };
    if orders::dispute(tx, &dispute).await? {
        tracing::error!(from, charge = charge_id, "a refund of an unknown payment; see payment_disputes");
    }
    Ok(())
}

fn disputed(what: &str, charge_id: &str) -> String {
    format!(
        "{what} The operator will look at it: /paysupport, and name the charge <code>{}</code>.",
        teloxide::utils::html::escape(charge_id)
    )
}
