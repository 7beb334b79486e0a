//! Purchases with Stars: what was paid is granted once per charge, and what is given back is taken once.
//!
//! ```text
//! none ─refund─▶ requested ─provider gave it back─▶ done
//!   │                └──────provider refuses──────▶ refused (the credits are given again)
//!   │                                                  └─provider gave it back after all─▶ done (what is free of them is taken)
//!   └─charge_back (the provider took it by itself)─▶ done, or chargeback if nothing was left
//! ```
//!
//! All functions run inside the caller's transaction, as those of [`super::ledger`].

use super::{
    books::{self, Finding},
    ledger::{Entry, GrantSource, LedgerError, append, grant, lock},
    money::MicroCredits,
};
use sqlx::PgConnection;
use uuid::Uuid;

/// A payment in Stars that the outside reports.
#[derive(Clone, Debug)]
pub struct Payment<'a> {
    /// The provider's id of the charge; a second report of it changes nothing.
    pub charge_id: &'a str,
    /// Payload of the invoice: names the order.
    pub payload: &'a str,
    pub currency: &'a str,
    pub stars: i32,
    pub recurring: bool,
}

/// Books a payment and grants what its order promised, once per charge. Returns the credits; `None` if it was booked before.
///
/// # Errors
/// [`LedgerError::Mismatch`] when the order does not exist, belongs to somebody else, or currency or amount differ.
pub async fn purchase(
    conn: &mut PgConnection,
    user: Uuid,
    payment: &Payment<'_>,
) -> Result<Option<MicroCredits>, LedgerError> {
    if payment.currency != "XTR" {
        return Err(LedgerError::Mismatch(format!("currency {}", payment.currency)));
    }
    lock(conn, user).await?;
    let order: Option<(Uuid, Uuid, i32, i64)> =
        sqlx::query_as("select id, user_id, stars, credits_ucr from orders where payload = $1")
            .bind(payment.payload)
            .fetch_optional(&mut *conn)
            .await?;
    let Some((order, owner, stars, credits)) = order else { return Err(LedgerError::Mismatch("no such order".into())) };
    if owner != user || stars != payment.stars {
        return Err(LedgerError::Mismatch(if owner == user {
            "another amount".into()
        } else {
            "another buyer".into()
        }));
    }
    // A forwarded invoice may be paid twice: each charge is a purchase of its own.
    let booked = sqlx::query(
        "insert into payments (charge_id, order_id, user_id, stars, recurring) values ($1, $2, $3, $4, $5) on conflict (charge_id) do nothing",
    )
    .bind(payment.charge_id)
    .bind(order)
    .bind(user)
    .bind(stars)
    .bind(payment.recurring)
    .execute(&mut *conn)
    .await?;
    if booked.rows_affected() == 0 {
        return Ok(None);
    }
    sqlx::query("update orders set state = 'paid' where id = $1").bind(order).execute(&mut *conn).await?;
    grant(conn, user, GrantSource::Purchase, payment.charge_id, MicroCredits(credits), None).await?;
    Ok(Some(MicroCredits(credits)))
}

/// Takes an untouched purchase back, ledger first: afterwards tell the payment provider, then [`refund_done`].
/// False if that was done before.
///
/// # Errors
/// [`LedgerError::Used`] when part of it is spent or held.
pub async fn refund(conn: &mut PgConnection, user: Uuid, charge_id: &str) -> Result<bool, LedgerError> {
    lock(conn, user).await?;
    let state: Option<String> =
        sqlx::query_scalar("select refund_state from payments where charge_id = $1 and user_id = $2")
            .bind(charge_id)
            .bind(user)
            .fetch_optional(&mut *conn)
            .await?;
    match state.as_deref() {
        None => return Err(LedgerError::Mismatch("no such payment".into())),
        Some("none") => {}
        Some(_) => return Ok(false),
    }
    let grant: Option<(Uuid, i64)> = sqlx::query_as(
        "update credit_grants set remaining_ucr = 0 where source = 'purchase' and source_ref = $1 and user_id = $2
           and remaining_ucr = amount_ucr and held_ucr = 0 returning id, amount_ucr",
    )
    .bind(charge_id)
    .bind(user)
    .fetch_optional(&mut *conn)
    .await?;
    let Some((grant, amount)) = grant else { return Err(LedgerError::Used(charge_id.to_owned())) };
    let key = format!("refund:{charge_id}");
    append(conn, &Entry { grant: Some(grant), ..Entry::new(user, "refund", -amount, 0, "platform:purchase", &key) })
        .await?;
    sqlx::query("update payments set refund_state = 'requested' where charge_id = $1")
        .bind(charge_id)
        .execute(&mut *conn)
        .await?;
    Ok(true)
}

/// Books a purchase that the payment provider has taken back although part of it is used: what is neither used nor held
/// is taken as an `adjustment`. Returns the credits taken, perhaps zero; `None` if the purchase was taken back before.
///
/// What is still held pays for its attempts; the rest of it can never be held again, because the grant ends here, and
/// its expiry takes it. What is used stays with the platform.
///
/// # Errors
/// [`LedgerError::Mismatch`] when the user made no such payment.
/// # Transaction
/// Locks the user, then the grant. Key `refund:<charge>`. The payment is `done` if something was taken, otherwise
/// `chargeback`.
pub async fn charge_back(
    conn: &mut PgConnection,
    user: Uuid,
    charge_id: &str,
) -> Result<Option<MicroCredits>, LedgerError> {
    lock(conn, user).await?;
    let grant: Option<(Uuid, i64, String)> = sqlx::query_as(
        "select g.id, g.remaining_ucr - g.held_ucr, p.refund_state from payments p
           join credit_grants g on g.source = 'purchase' and g.source_ref = p.charge_id and g.user_id = p.user_id
         where p.charge_id = $1 and p.user_id = $2 for no key update of g",
    )
    .bind(charge_id)
    .bind(user)
    .fetch_optional(&mut *conn)
    .await?;
    let Some((grant, free, state)) = grant else { return Err(LedgerError::Mismatch("no such payment".into())) };
    if state != "none" {
        return Ok(None);
    }
    let key = format!("refund:{charge_id}");
    end_grant(conn, user, grant, free, "platform:purchase", &key).await?;
    sqlx::query("update payments set refund_state = $2 where charge_id = $1")
        .bind(charge_id)
        .bind(if free > 0 { "done" } else { "chargeback" })
        .execute(&mut *conn)
        .await?;
    Ok(Some(MicroCredits(free)))
}

/// Ends a grant of which so much is neither used nor held: that is taken, and what is held expires once it is released.
///
/// # Transaction
/// The user and the grant must be locked.
async fn end_grant(
    conn: &mut PgConnection,
    user: Uuid,
    grant: Uuid,
    free: i64,
    account: &str,
    key: &str,
) -> Result<(), LedgerError> {
    sqlx::query("update credit_grants set remaining_ucr = held_ucr, expires_at = engine_now() where id = $1")
        .bind(grant)
        .execute(&mut *conn)
        .await?;
    if free > 0 {
        append(conn, &Entry { grant: Some(grant), ..Entry::new(user, "adjustment", -free, 0, account, key) }).await?;
    }
    Ok(())
}

/// The payment provider carried a refund out.
pub async fn refund_done(conn: &mut PgConnection, charge_id: &str) -> Result<(), LedgerError> {
    sqlx::query("update payments set refund_state = 'done' where charge_id = $1 and refund_state = 'requested'")
        .bind(charge_id)
        .execute(conn)
        .await?;
    Ok(())
}

/// A refund that the ledger has booked and the payment provider has not carried out yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenRefund {
    pub charge_id: String,
    pub user: Uuid,
    /// Who paid, as Telegram knows him; `None` if the user has no such identity.
    pub telegram_user_id: Option<i64>,
}

/// Refunds that are to be carried out, at most `limit`: whoever died between ledger and provider goes on here.
pub async fn open_refunds(conn: &mut PgConnection, limit: i64) -> Result<Vec<OpenRefund>, sqlx::Error> {
    let rows: Vec<(String, Uuid, Option<i64>)> = sqlx::query_as(
        "select p.charge_id, p.user_id, u.telegram_user_id from payments p join users u on u.id = p.user_id
         where p.refund_state = 'requested' order by p.received_at, p.charge_id limit $1",
    )
    .bind(limit)
    .fetch_all(conn)
    .await?;
    Ok(rows
        .into_iter()
        .map(|(charge_id, user, telegram_user_id)| OpenRefund { charge_id, user, telegram_user_id })
        .collect())
}

/// The payment provider will not give the money back: the credits are given again, once. False if that was done before, or
/// nothing was requested.
///
/// # Transaction
/// Locks the user. Key `adjust:refund-refused:<charge>`.
pub async fn refund_refused(conn: &mut PgConnection, charge_id: &str, why: &str) -> Result<bool, LedgerError> {
    let user: Option<Uuid> = sqlx::query_scalar("select user_id from payments where charge_id = $1")
        .bind(charge_id)
        .fetch_optional(&mut *conn)
        .await?;
    let Some(user) = user else { return Err(LedgerError::Mismatch("no such payment".into())) };
    lock(conn, user).await?;
    let refused = sqlx::query(
        "update payments set refund_state = 'refused', refund_error = left($2, 500) where charge_id = $1 and refund_state = 'requested'",
    )
    .bind(charge_id)
    .bind(why)
    .execute(&mut *conn)
    .await?;
    if refused.rows_affected() == 0 {
        return Ok(false);
    }
    let taken: i64 =
        sqlx::query_scalar("select -amount_ucr from credit_transactions where idempotency_key = 'refund:' || $1")
            .bind(charge_id)
            .fetch_one(&mut *conn)
            .await?;
    grant(conn, user, GrantSource::Adjustment, &format!("refund-refused:{charge_id}"), MicroCredits(taken), None).await
}

/// The payment provider gave back after all what it had refused to: of the credits that [`refund_refused`] has given again, what is
/// neither used nor held is taken. Returns the credits taken, perhaps zero; `None` if the payment is not `refused`.
///
/// # Transaction
/// Locks the user, then the grant. Key `refund-again:<charge>`. The payment is `done`.
async fn refused_after_all(
    conn: &mut PgConnection,
    user: Uuid,
    charge_id: &str,
) -> Result<Option<MicroCredits>, LedgerError> {
    lock(conn, user).await?;
    let refused = sqlx::query(
        "update payments set refund_state = 'done' where charge_id = $1 and user_id = $2 and refund_state = 'refused'",
    )
    .bind(charge_id)
    .bind(user)
    .execute(&mut *conn)
    .await?;
    if refused.rows_affected() == 0 {
        return Ok(None);
    }
    // It is there: the refusal was booked together with it.
    let (grant, free): (Uuid, i64) = sqlx::query_as(
        "select id, remaining_ucr - held_ucr from credit_grants
         where source = 'adjustment' and source_ref = 'refund-refused:' || $1 and user_id = $2 for no key update",
    )
    .bind(charge_id)
    .bind(user)
    .fetch_one(&mut *conn)
    .await?;
    let key = format!("refund-again:{charge_id}");
    end_grant(conn, user, grant, free, "platform:adjustment", &key).await?;
    Ok(Some(MicroCredits(free)))
}

/// Books what the payment provider says it has given back: an untouched purchase as a refund, of any other what is left of it, and
/// of one whose refund it had refused what is left of the credits that were given again. Twice is once. False if nothing is known of
/// the payment.
pub async fn taken_back(conn: &mut PgConnection, user: Uuid, charge_id: &str) -> Result<bool, LedgerError> {
    match refund(conn, user, charge_id).await {
        Ok(_) => {
            refund_done(conn, charge_id).await?;
            if refused_after_all(conn, user, charge_id).await?.is_some() {
                owed(conn, user, charge_id).await?;
            }
        }
        Err(LedgerError::Used(_)) => {
            if charge_back(conn, user, charge_id).await?.is_some() {
                owed(conn, user, charge_id).await?;
            }
        }
        Err(LedgerError::Mismatch(_)) => return Ok(false),
        Err(error) => return Err(error),
    }
    Ok(true)
}

/// The job under which debts of payments are found, beside what it finds itself.
const JOB: &str = "reconcile-payments";

/// Tells an operator of a payment that was given back although credits of it are used: the platform has neither the Stars nor the credits.
/// Nothing is told where all of them were taken. No balance becomes negative, and nothing is taken from other purchases: what is owed is a
/// finding, for a person to decide about.
///
/// # Transaction
/// That of the taking, so that none is without the other.
async fn owed(conn: &mut PgConnection, user: Uuid, charge_id: &str) -> Result<(), LedgerError> {
    let Some(refund) = refund_of(conn, charge_id).await? else { return Ok(()) };
    let Refund { stars, granted, taken, held, .. } = refund;
    let gone = MicroCredits(granted.0 - taken.0 - held.0);
    let owed = MicroCredits(granted.0 - taken.0);
    if owed.0 == 0 {
        return Ok(());
    }
    let message = format!(
        "charge {charge_id} of {stars} Stars was given back when {gone} of its {granted} credits were used and {held} held; {taken} were \
         taken, so up to {owed} are owed"
    );
    tracing::error!(%user, charge = charge_id, "{message}");
    let finding = Finding { kind: "payment_used", subject: charge_id.to_owned(), message, user: Some(user) };
    books::keep_findings(conn, JOB, &[finding], false).await?;
    Ok(())
}

/// How a payment stands that is given back, or was to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refund {
    pub stars: i32,
    /// `refund_state` of the payment.
    pub state: String,
    /// Why, in the operator's words; `None`: the provider gave it back by itself, or nobody said.
    pub reason: Option<String>,
    /// What the provider said when it refused.
    pub error: Option<String>,
    /// What was paid for; of a payment whose refund was refused the credits that were given again.
    pub granted: MicroCredits,
    /// Of them what the refund took.
    pub taken: MicroCredits,
    /// Of them what attempts have reserved now.
    pub held: MicroCredits,
}

/// How the refund of a payment stands. `None`: there is no such payment.
///
/// # Transaction
/// Reads only.
pub async fn refund_of(conn: &mut PgConnection, charge_id: &str) -> Result<Option<Refund>, sqlx::Error> {
    type Row = (i32, String, Option<String>, Option<String>, i64, i64, i64);
    let row: Option<Row> = sqlx::query_as(
        "select p.stars, p.refund_state, p.refund_reason, p.refund_error, g.amount_ucr, coalesce(-t.amount_ucr, 0), g.held_ucr
         from payments p
         left join credit_grants again on again.source = 'adjustment' and again.source_ref = 'refund-refused:' || p.charge_id
         join credit_grants g on g.id = coalesce(again.id, (select id from credit_grants where source = 'purchase' and source_ref = p.charge_id))
         left join credit_transactions t
           on t.idempotency_key = case when again.id is null then 'refund:' else 'refund-again:' end || p.charge_id
         where p.charge_id = $1",
    )
    .bind(charge_id)
    .fetch_optional(conn)
    .await?;
    Ok(row.map(|(stars, state, reason, error, granted, taken, held)| Refund {
        stars,
        state,
        reason,
        error,
        granted: MicroCredits(granted),
        taken: MicroCredits(taken),
        held: MicroCredits(held),
    }))
}

/// Keeps why a payment is given back, for its payer.
pub async fn give_reason(conn: &mut PgConnection, charge_id: &str, reason: &str) -> Result<(), sqlx::Error> {
    sqlx::query("update payments set refund_reason = left($2, 500) where charge_id = $1")
        .bind(charge_id)
        .bind(reason)
        .execute(conn)
        .await?;
    Ok(())
}

/// A payment that was not granted.
#[derive(Clone, Debug)]
pub struct Dispute<'a> {
    pub charge_id: &'a str,
    pub telegram_user_id: i64,
    pub user: Option<Uuid>,
    pub payload: &'a str,
    pub currency: &'a str,
    pub amount: i64,
    pub reason: &'a str,
}

/// Keeps a payment that was not granted, for an operator. Once per charge, and never one that was granted.
pub async fn dispute(conn: &mut PgConnection, dispute: &Dispute<'_>) -> Result<bool, sqlx::Error> {
    let done = sqlx::query(
        "insert into payment_disputes (charge_id, telegram_user_id, user_id, payload, currency, amount, reason)
         select $1, $2, $3, $4, $5, $6, $7 where not exists (select from payments where charge_id = $1)
         on conflict (charge_id) do nothing",
    )
    .bind(dispute.charge_id)
    .bind(dispute.telegram_user_id)
    .bind(dispute.user)
    .bind(dispute.payload)
    .bind(dispute.currency)
    .bind(dispute.amount)
    .bind(dispute.reason)
    .execute(conn)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// What is known of a charge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Known {
    /// Booked, for that user, with that `refund_state`.
    Payment {
        user: Uuid,
        refund_state: String,
    },
    /// Kept for an operator.
    Disputed,
    Nothing,
}

/// What is known of a charge.
pub async fn known(conn: &mut PgConnection, charge_id: &str) -> Result<Known, sqlx::Error> {
    let payment: Option<(Uuid, String)> =
        sqlx::query_as("select user_id, refund_state from payments where charge_id = $1")
            .bind(charge_id)
            .fetch_optional(&mut *conn)
            .await?;
    if let Some((user, refund_state)) = payment {
        return Ok(Known::Payment { user, refund_state });
    }
    let disputed: bool = sqlx::query_scalar("select exists (select from payment_disputes where charge_id = $1)")
        .bind(charge_id)
        .fetch_one(conn)
        .await?;
    Ok(if disputed { Known::Disputed } else { Known::Nothing })
}

/// The user of a Telegram identity.
pub async fn payer(conn: &mut PgConnection, telegram_user_id: i64) -> Result<Option<Uuid>, sqlx::Error> {
    sqlx::query_scalar("select id from users where telegram_user_id = $1")
        .bind(telegram_user_id)
        .fetch_optional(conn)
        .await
}
