//! The append-only ledger: every change of a balance is one row here, under a key made of identities.
//!
//! All functions run inside the caller's transaction. Lock order: user row (`for no key update`), then grants in burn
//! order. A key that was used before returns what it did then and changes nothing.

use super::money::MicroCredits;
use chrono::{DateTime, Utc};
use sqlx::{PgConnection, Row};
use uuid::Uuid;

/// Why the ledger refused.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    #[error("there is no user {0}")]
    NoUser(Uuid),
    #[error("the amount must be positive")]
    NotPositive,
    #[error("the payment does not match its order: {0}")]
    Mismatch(String),
    #[error("the purchase {0} cannot be refunded: part of it is used or held")]
    Used(String),
    #[error(transparent)]
    Sql(#[from] sqlx::Error),
}

/// Who a user is, as the outside tells.
#[derive(Clone, Debug)]
pub enum Identity {
    Telegram(i64),
    Token { issuer: String, subject: String },
}

/// Where credits come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GrantSource {
    Welcome,
    Purchase,
    Promo,
}

impl GrantSource {
    fn as_str(self) -> &'static str {
        match self {
            Self::Welcome => "welcome",
            Self::Purchase => "purchase",
            Self::Promo => "promo",
        }
    }
    /// Lower burns first: what was given burns before what was bought.
    fn priority(self) -> i16 {
        match self {
            Self::Welcome => 10,
            Self::Promo => 20,
            Self::Purchase => 50,
        }
    }
}

/// A balance as its owner sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Balance {
    pub balance: MicroCredits,
    /// Part of it that running attempts have reserved.
    pub held: MicroCredits,
}

impl Balance {
    /// What may still be reserved.
    #[must_use]
    pub fn available(&self) -> MicroCredits {
        MicroCredits(self.balance.0 - self.held.0)
    }
}

/// One row to append.
pub(super) struct Entry<'a> {
    pub user: Uuid,
    pub kind: &'a str,
    pub amount: i64,
    pub held_delta: i64,
    pub counter_account: &'a str,
    pub key: &'a str,
    pub hold: Option<i64>,
    pub attempt: Option<Uuid>,
    pub hold_no: Option<i32>,
    pub grant: Option<Uuid>,
    pub rate: Option<super::Rate>,
    pub actual: Option<i64>,
    pub uncollected: i64,
}

/// Appends a row and moves the cache with it. The user row must be locked. Returns the row's id.
pub(super) async fn append(conn: &mut PgConnection, e: &Entry<'_>) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar(
        "with u as (update users set credit_balance_ucr = credit_balance_ucr + $3, credit_held_ucr = credit_held_ucr + $4,
                      ledger_seq = ledger_seq + 1 where id = $1
                    returning ledger_seq, credit_balance_ucr, credit_held_ucr)
         insert into credit_transactions (user_id, seq, kind, amount_ucr, held_delta_ucr, balance_after_ucr, held_after_ucr,
                      counter_account, idempotency_key, hold_txn_id, attempt_id, hold_no, grant_id, rate_credits_per_usd, markup_bps,
                      actual_ucr, uncollected_ucr)
         select $1, u.ledger_seq, $2, $3, $4, u.credit_balance_ucr, u.credit_held_ucr, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14 from u
         returning id",
    )
    .bind(e.user)
    .bind(e.kind)
    .bind(e.amount)
    .bind(e.held_delta)
    .bind(e.counter_account)
    .bind(e.key)
    .bind(e.hold)
    .bind(e.attempt)
    .bind(e.hold_no)
    .bind(e.grant)
    .bind(e.rate.map(|r| r.credits_per_usd))
    .bind(e.rate.map(|r| r.markup_bps))
    .bind(e.actual)
    .bind(e.uncollected)
    .fetch_one(conn)
    .await
}

/// Locks a user row and reads its balance.
///
/// # Errors
/// [`LedgerError::NoUser`].
pub async fn lock(conn: &mut PgConnection, user: Uuid) -> Result<Balance, LedgerError> {
    let row = sqlx::query("select credit_balance_ucr, credit_held_ucr from users where id = $1 for no key update")
        .bind(user)
        .fetch_optional(conn)
        .await?
        .ok_or(LedgerError::NoUser(user))?;
    Ok(Balance { balance: MicroCredits(row.try_get(0)?), held: MicroCredits(row.try_get(1)?) })
}

/// A balance, without a lock.
///
/// # Errors
/// [`LedgerError::NoUser`].
pub async fn balance(conn: &mut PgConnection, user: Uuid) -> Result<Balance, LedgerError> {
    let row = sqlx::query("select credit_balance_ucr, credit_held_ucr from users where id = $1")
        .bind(user)
        .fetch_optional(conn)
        .await?
        .ok_or(LedgerError::NoUser(user))?;
    Ok(Balance { balance: MicroCredits(row.try_get(0)?), held: MicroCredits(row.try_get(1)?) })
}

/// The user of an identity, created with the welcome grant on first sight. True if it was created now.
///
/// # Transaction
/// Idempotent under concurrency: one user, one welcome grant (`welcome:<user>`).
pub async fn ensure_user(
    conn: &mut PgConnection,
    identity: &Identity,
    welcome: MicroCredits,
) -> Result<(Uuid, bool), LedgerError> {
    let (telegram, issuer, subject) = match identity {
        Identity::Telegram(id) => (Some(*id), None, None),
        Identity::Token { issuer, subject } => (None, Some(issuer), Some(subject)),
    };
    let created: Option<Uuid> = sqlx::query_scalar(
        "insert into users (telegram_user_id, auth_issuer, auth_subject) values ($1, $2, $3) on conflict do nothing returning id",
    )
    .bind(telegram)
    .bind(issuer)
    .bind(subject)
    .fetch_optional(&mut *conn)
    .await?;
    let user = match created {
        Some(id) => id,
        None => {
            sqlx::query_scalar(
                "select id from users where telegram_user_id = $1 or (auth_issuer = $2 and auth_subject = $3)",
            )
            .bind(telegram)
            .bind(issuer)
            .bind(subject)
            .fetch_one(&mut *conn)
            .await?
        }
    };
    if welcome.0 > 0 {
        grant(conn, user, GrantSource::Welcome, &user.to_string(), welcome, None).await?;
    }
    Ok((user, created.is_some()))
}

/// Gives credits once per (source, reference). False if that was done before.
///
/// Wake the user's blocked runs in the same transaction and before this: `engine::Client::unblock_in`. It locks the runs,
/// this locks the account, and the workers take both in that order.
///
/// # Errors
/// [`LedgerError::NotPositive`], [`LedgerError::NoUser`].
/// # Transaction
/// Locks the user row. Idempotency key: (source, reference).
pub async fn grant(
    conn: &mut PgConnection,
    user: Uuid,
    source: GrantSource,
    reference: &str,
    amount: MicroCredits,
    expires_at: Option<DateTime<Utc>>,
) -> Result<bool, LedgerError> {
    if amount.0 <= 0 {
        return Err(LedgerError::NotPositive);
    }
    lock(conn, user).await?;
    let id: Option<Uuid> = sqlx::query_scalar(
        "insert into credit_grants (user_id, source, source_ref, amount_ucr, remaining_ucr, priority, expires_at)
         values ($1, $2, $3, $4, $4, $5, $6) on conflict (source, source_ref) do nothing returning id",
    )
    .bind(user)
    .bind(source.as_str())
    .bind(reference)
    .bind(amount.0)
    .bind(source.priority())
    .bind(expires_at)
    .fetch_optional(&mut *conn)
    .await?;
    let Some(id) = id else { return Ok(false) };
    let (kind, account) = match source {
        GrantSource::Welcome => ("grant", "platform:welcome"),
        GrantSource::Promo => ("grant", "platform:promo"),
        GrantSource::Purchase => ("purchase", "platform:purchase"),
    };
    let key = format!("{}:{reference}", source.as_str());
    append(conn, &Entry { grant: Some(id), ..Entry::new(user, kind, amount.0, 0, account, &key) }).await?;
    Ok(true)
}

impl<'a> Entry<'a> {
    pub(super) fn new(
        user: Uuid,
        kind: &'a str,
        amount: i64,
        held_delta: i64,
        counter_account: &'a str,
        key: &'a str,
    ) -> Self {
        Self {
            user,
            kind,
            amount,
            held_delta,
            counter_account,
            key,
            hold: None,
            attempt: None,
            hold_no: None,
            grant: None,
            rate: None,
            actual: None,
            uncollected: 0,
        }
    }
}

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
/// [`expire`] takes it. What is used stays with the platform.
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
    sqlx::query("update credit_grants set remaining_ucr = held_ucr, expires_at = engine_now() where id = $1")
        .bind(grant)
        .execute(&mut *conn)
        .await?;
    if free > 0 {
        let key = format!("refund:{charge_id}");
        append(
            conn,
            &Entry { grant: Some(grant), ..Entry::new(user, "adjustment", -free, 0, "platform:purchase", &key) },
        )
        .await?;
    }
    sqlx::query("update payments set refund_state = $2 where charge_id = $1")
        .bind(charge_id)
        .bind(if free > 0 { "done" } else { "chargeback" })
        .execute(&mut *conn)
        .await?;
    Ok(Some(MicroCredits(free)))
}

/// The payment provider carried a refund out.
pub async fn refund_done(conn: &mut PgConnection, charge_id: &str) -> Result<(), LedgerError> {
    sqlx::query("update payments set refund_state = 'done' where charge_id = $1 and refund_state = 'requested'")
        .bind(charge_id)
        .execute(conn)
        .await?;
    Ok(())
}

/// Expires what is over its date and not held, at most `limit` grants. Returns how many.
pub async fn expire(conn: &mut PgConnection, limit: i64) -> Result<u64, LedgerError> {
    let due: Vec<(Uuid, Uuid)> = sqlx::query_as(
        "select id, user_id from credit_grants where expires_at <= engine_now() and remaining_ucr > held_ucr order by user_id, id limit $1",
    )
    .bind(limit)
    .fetch_all(&mut *conn)
    .await?;
    let mut expired = 0;
    for (grant, user) in due {
        lock(conn, user).await?;
        let left: Option<i64> = sqlx::query_scalar(
            "with g as (select id, remaining_ucr - held_ucr as free from credit_grants where id = $1 and expires_at <= engine_now()
                        and remaining_ucr > held_ucr for no key update)
             update credit_grants c set remaining_ucr = c.held_ucr from g where c.id = g.id returning g.free",
        )
        .bind(grant)
        .fetch_optional(&mut *conn)
        .await?;
        let Some(free) = left else { continue };
        let remaining: i64 = sqlx::query_scalar("select remaining_ucr from credit_grants where id = $1")
            .bind(grant)
            .fetch_one(&mut *conn)
            .await?;
        let key = format!("expire:{grant}:{remaining}");
        append(conn, &Entry { grant: Some(grant), ..Entry::new(user, "expire", -free, 0, "platform:expired", &key) })
            .await?;
        expired += 1;
    }
    Ok(expired)
}
