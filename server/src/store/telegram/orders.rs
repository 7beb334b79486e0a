//! Orders, payments in Stars, and payments that do not fit.

use super::{Error, Store, Tx};
pub use loopwright_activities::billing::purchase::{Dispute, OpenRefund};
use loopwright_activities::billing::{MicroCredits, ledger, purchase};
use uuid::Uuid;

/// Why an order cannot be paid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unpayable {
    Currency,
    Unknown,
    Buyer,
    Amount,
    Paid,
    Expired,
}

/// Opens an order and returns its payload.
pub async fn open(tx: &mut Tx, user: Uuid, stars: i32, credits: MicroCredits, hours: i32) -> Result<String, Error> {
    let payload = format!("order:{}", Uuid::new_v4().simple());
    sqlx::query(
        "insert into orders (payload, user_id, stars, credits_ucr, state, expires_at)
         values ($1, $2, $3, $4, 'open', engine_now() + make_interval(hours => $5))",
    )
    .bind(&payload)
    .bind(user)
    .bind(stars)
    .bind(credits.0)
    .bind(hours)
    .execute(&mut **tx)
    .await?;
    Ok(payload)
}

/// Whether this user may pay this order now. `Err` of the outer result is the database's.
pub async fn payable(
    tx: &mut Tx,
    telegram_user_id: i64,
    payload: &str,
    currency: &str,
    stars: i64,
) -> Result<Result<(), Unpayable>, Error> {
    if currency != "XTR" {
        return Ok(Err(Unpayable::Currency));
    }
    let row: Option<(Option<i64>, i32, String, bool)> = sqlx::query_as(
        "select u.telegram_user_id, o.stars, o.state, o.expires_at <= engine_now()
         from orders o join users u on u.id = o.user_id where o.payload = $1",
    )
    .bind(payload)
    .fetch_optional(&mut **tx)
    .await?;
    Ok(match row {
        None => Err(Unpayable::Unknown),
        Some((owner, ..)) if owner != Some(telegram_user_id) => Err(Unpayable::Buyer),
        Some((_, price, ..)) if i64::from(price) != stars => Err(Unpayable::Amount),
        Some((.., state, _)) if state == "paid" => Err(Unpayable::Paid),
        Some((.., state, late)) if late || state != "open" => Err(Unpayable::Expired),
        Some(_) => Ok(()),
    })
}

/// Keeps a payment that was not granted, for an operator. Once per charge, and never one that was granted.
pub async fn dispute(tx: &mut Tx, dispute: &Dispute<'_>) -> Result<bool, Error> {
    Ok(purchase::dispute(tx, dispute).await?)
}

/// Refunds that one pass carries out. Chosen: as many requests as Telegram takes in a second or two.
const REFUNDS_MAX: i64 = 50;

/// Grants that one pass of [`Store::expire_credits`] ends. Chosen: far above what a bot's users lose in an hour.
const EXPIRED_MAX: u32 = 1_000;

impl Store {
    /// Takes what is left of grants whose time is over, as of purchases that were given back while they were held.
    ///
    /// # Transaction
    /// One per grant: of two users' locks none is taken under the other.
    pub async fn expire_credits(&self) -> Result<(), Error> {
        for _ in 0..EXPIRED_MAX {
            let mut tx = self.begin().await?;
            let expired = ledger::expire(&mut tx, 1).await?;
            tx.commit().await?;
            if expired == 0 {
                break;
            }
        }
        Ok(())
    }

    /// Refunds that the ledger has booked and Telegram has not carried out.
    pub async fn open_refunds(&self) -> Result<Vec<OpenRefund>, Error> {
        let mut conn = self.pool.acquire().await?;
        Ok(purchase::open_refunds(&mut conn, REFUNDS_MAX).await?)
    }

    /// Closes orders whose time is over.
    pub async fn expire_orders(&self) -> Result<(), Error> {
        sqlx::query("update orders set state = 'expired' where state = 'open' and expires_at <= engine_now()")
            .execute(&self.pool)
            .await?;
        Ok(())
    }
}
