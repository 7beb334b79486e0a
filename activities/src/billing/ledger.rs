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
    /// A key that belongs to another user or another amount.
    #[error("{0} was used before, for another user or another amount; nothing was changed")]
    KeyReused(String),
    #[error("{available} credits are neither used nor held; {wanted} cannot be taken")]
    Short { wanted: MicroCredits, available: MicroCredits },
    #[error(transparent)]
    Sql(#[from] sqlx::Error),
}

impl LedgerError {
    /// A stable code for programs; listed in the crate's README.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::NoUser(_) => "user_not_found",
            Self::NotPositive => "amount_invalid",
            Self::Mismatch(_) => "payment_mismatch",
            Self::Used(_) => "purchase_used",
            Self::KeyReused(_) => "key_reused",
            Self::Short { .. } => "credits_short",
            Self::Sql(_) => "database",
        }
    }
}

/// The constraint that keeps a key from being used twice.
const KEY_CONSTRAINT: &str = "credit_transactions_idempotency_key";

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
    /// A correction by the operator, or credits back by a rule.
    Adjustment,
}

impl GrantSource {
    fn as_str(self) -> &'static str {
        match self {
            Self::Welcome => "welcome",
            Self::Purchase => "purchase",
            Self::Promo => "promo",
            Self::Adjustment => "adjustment",
        }
    }
    /// Lower burns first: what was given burns before what was bought.
    fn priority(self) -> i16 {
        match self {
            Self::Welcome => 10,
            Self::Promo => 20,
            // Given back for what was used, be it given or bought: after what was given, before what was bought.
            Self::Adjustment => 30,
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
    /// An audit has stopped new holds until an operator looks.
    pub stopped: bool,
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
    const SQL: &str = "select credit_balance_ucr, credit_held_ucr, holds_stopped_at is not null from users where id = $1 for no key update";
    read(conn, user, SQL).await
}

/// A balance, without a lock.
///
/// # Errors
/// [`LedgerError::NoUser`].
pub async fn balance(conn: &mut PgConnection, user: Uuid) -> Result<Balance, LedgerError> {
    read(
        conn,
        user,
        "select credit_balance_ucr, credit_held_ucr, holds_stopped_at is not null from users where id = $1",
    )
    .await
}

async fn read(conn: &mut PgConnection, user: Uuid, sql: &'static str) -> Result<Balance, LedgerError> {
    let row = sqlx::query(sql).bind(user).fetch_optional(conn).await?.ok_or(LedgerError::NoUser(user))?;
    Ok(Balance {
        balance: MicroCredits(row.try_get(0)?),
        held: MicroCredits(row.try_get(1)?),
        stopped: row.try_get(2)?,
    })
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
/// [`LedgerError::NotPositive`], [`LedgerError::NoUser`]; [`LedgerError::KeyReused`] when the reference is another user's.
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
    crate::crash_point("grant.after_lock");
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
    crate::crash_point("grant.after_row");
    let Some(id) = id else {
        let owner: Uuid = sqlx::query_scalar("select user_id from credit_grants where source = $1 and source_ref = $2")
            .bind(source.as_str())
            .bind(reference)
            .fetch_one(&mut *conn)
            .await?;
        return if owner == user { Ok(false) } else { Err(LedgerError::KeyReused(reference.to_owned())) };
    };
    let (kind, account) = match source {
        GrantSource::Welcome => ("grant", "platform:welcome"),
        GrantSource::Promo => ("grant", "platform:promo"),
        GrantSource::Purchase => ("purchase", "platform:purchase"),
        GrantSource::Adjustment => ("grant", "platform:adjustment"),
    };
    let key = match source {
        GrantSource::Adjustment => format!("adjust:{reference}"),
        _ => format!("{}:{reference}", source.as_str()),
    };
    append(conn, &Entry { grant: Some(id), ..Entry::new(user, kind, amount.0, 0, account, &key) }).await?;
    Ok(true)
}

/// Corrects a balance by the operator's word, once per ticket: a positive amount is a grant, a negative one is taken from
/// what is not held, in burn order. False if that was done before.
///
/// # Errors
/// [`LedgerError::NotPositive`] for zero; [`LedgerError::Short`] when less is free; [`LedgerError::KeyReused`] when the ticket
/// stands for another user or amount.
/// # Transaction
/// Locks the user, then grants. Keys `adjust:<ticket>`, and `adjust:<ticket>:<grant>` for the further grants of a taking.
pub async fn adjust(
    conn: &mut PgConnection,
    user: Uuid,
    ticket: &str,
    amount: MicroCredits,
) -> Result<bool, LedgerError> {
    match adjusted(conn, user, ticket, amount).await {
        // Another user's correction under the same ticket was committed meanwhile.
        Err(LedgerError::Sql(sqlx::Error::Database(e))) if e.constraint() == Some(KEY_CONSTRAINT) => {
            Err(LedgerError::KeyReused(ticket.to_owned()))
        }
        done => done,
    }
}

async fn adjusted(
    conn: &mut PgConnection,
    user: Uuid,
    ticket: &str,
    amount: MicroCredits,
) -> Result<bool, LedgerError> {
    let key = format!("adjust:{ticket}");
    if amount.0 == 0 {
        return Err(LedgerError::NotPositive);
    }
    lock(conn, user).await?;
    let before: (i64, bool) = sqlx::query_as(
        "select coalesce(sum(amount_ucr), 0)::bigint, coalesce(bool_and(user_id = $2), false) from credit_transactions
         where idempotency_key = $1 or (user_id = $2 and kind = 'adjustment' and idempotency_key = $1 || ':' || grant_id)",
    )
    .bind(&key)
    .bind(user)
    .fetch_one(&mut *conn)
    .await?;
    match before {
        (0, _) => {}
        (same, true) if same == amount.0 => return Ok(false),
        _ => return Err(LedgerError::KeyReused(ticket.to_owned())),
    }
    if amount.0 > 0 {
        return grant(conn, user, GrantSource::Adjustment, ticket, amount, None).await;
    }
    let grants: Vec<(Uuid, i64)> = sqlx::query_as(
        "select id, remaining_ucr - held_ucr from credit_grants where user_id = $1 and remaining_ucr > held_ucr
         order by priority, expires_at nulls last, created_at, id for no key update",
    )
    .bind(user)
    .fetch_all(&mut *conn)
    .await?;
    let wanted = MicroCredits(amount.0.saturating_neg());
    let available = MicroCredits(grants.iter().map(|(_, free)| free).sum());
    if available < wanted {
        return Err(LedgerError::Short { wanted, available });
    }
    let mut left = wanted.0;
    for (n, (grant, free)) in grants.into_iter().enumerate() {
        let part = free.min(left);
        if part == 0 {
            break;
        }
        sqlx::query("update credit_grants set remaining_ucr = remaining_ucr - $2 where id = $1")
            .bind(grant)
            .bind(part)
            .execute(&mut *conn)
            .await?;
        let key = if n == 0 { key.clone() } else { format!("{key}:{grant}") };
        let entry =
            Entry { grant: Some(grant), ..Entry::new(user, "adjustment", -part, 0, "platform:adjustment", &key) };
        append(conn, &entry).await?;
        left -= part;
    }
    Ok(true)
}

/// Lets a user hold credits again whose holds an audit has stopped. False if they were not stopped. What stands open now does
/// not stop him again.
///
/// Wake the user's runs in the same transaction and before this, as for [`grant`].
pub async fn resume_holds(conn: &mut PgConnection, user: Uuid) -> Result<bool, LedgerError> {
    lock(conn, user).await?;
    let done = sqlx::query(
        "update users set holds_stopped_at = null, holds_stopped_why = null, holds_released_at = engine_now()
         where id = $1 and holds_stopped_at is not null",
    )
    .bind(user)
    .execute(conn)
    .await?;
    Ok(done.rows_affected() > 0)
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
