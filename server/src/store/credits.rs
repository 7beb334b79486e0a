//! Credits as their owner sees them: the balance and every change of it. Read only; the ledger writes.

use super::{Error, Page, Store};
use chrono::{DateTime, Utc};
use loopwright_activities::billing::{
    audit::{self, Audit},
    books::{self, Kept},
    doubt,
    ledger::LedgerError,
    pricelist::{self, Applied, Listed, Quote, Refusal},
    purchase::{self, Known},
    report::{self, By, Span, Spent},
};
use loopwright_engine::transaction;
use serde::Serialize;
use sqlx::PgExecutor;
use uuid::Uuid;

/// Micro-credits of one credit.
const UCR: i64 = 1_000_000;

/// What a user has.
#[derive(Clone, Debug, Serialize)]
pub struct Balance {
    /// Micro-credits, what is held included.
    pub balance_ucr: i64,
    /// Micro-credits reserved for work under way.
    pub held_ucr: i64,
    /// Micro-credits that can be spent now.
    pub available_ucr: i64,
    /// The same in credits, as exact decimal text.
    pub available: String,
    /// An audit has stopped new holds until an operator has looked.
    pub stopped: bool,
}

/// One change of a balance.
#[derive(Clone, Debug, Serialize)]
pub struct Transaction {
    /// 1, 2, 3 … per user.
    pub seq: i64,
    pub kind: String,
    pub amount_ucr: i64,
    pub held_delta_ucr: i64,
    pub balance_after_ucr: i64,
    pub held_after_ucr: i64,
    pub attempt_id: Option<Uuid>,
    /// What caused it, as in `welcome:<user>`, `promo:<reason>`, `settle:<attempt>:1`; unique.
    pub reference: String,
    pub created_at: DateTime<Utc>,
}

/// The user's balance as the caller's transaction sees it; `None` for nobody.
pub async fn balance(executor: impl PgExecutor<'_>, user: Uuid) -> Result<Option<Balance>, Error> {
    let row: Option<(i64, i64, bool)> = sqlx::query_as(
        "select credit_balance_ucr, credit_held_ucr, holds_stopped_at is not null from users where id = $1",
    )
    .bind(user)
    .fetch_optional(executor)
    .await?;
    Ok(row.map(|(balance, held, stopped)| Balance {
        balance_ucr: balance,
        held_ucr: held,
        available_ucr: balance - held,
        available: decimal(balance - held),
        stopped,
    }))
}

impl Store {
    /// The user's balance; `None` for nobody.
    pub async fn balance(&self, user: Uuid) -> Result<Option<Balance>, Error> {
        balance(&self.pool, user).await
    }

    /// Changes of the user's balance, newest first, below sequence number `before`.
    pub async fn transactions(&self, user: Uuid, before: Option<i64>, limit: u32) -> Result<Page<Transaction>, Error> {
        type Row = (i64, String, i64, i64, i64, i64, Option<Uuid>, String, DateTime<Utc>);
        let rows: Vec<Row> = sqlx::query_as(
            "select seq, kind, amount_ucr, held_delta_ucr, balance_after_ucr, held_after_ucr, attempt_id, idempotency_key, created_at
             from credit_transactions where user_id = $1 and ($2::bigint is null or seq < $2) order by seq desc limit $3",
        )
        .bind(user)
        .bind(before)
        .bind(i64::from(limit) + 1)
        .fetch_all(&self.pool)
        .await?;
        let rows = rows
            .into_iter()
            .map(
                |(
                    seq,
                    kind,
                    amount_ucr,
                    held_delta_ucr,
                    balance_after_ucr,
                    held_after_ucr,
                    attempt_id,
                    reference,
                    created_at,
                )| {
                    Transaction {
                        seq,
                        kind,
                        amount_ucr,
                        held_delta_ucr,
                        balance_after_ucr,
                        held_after_ucr,
                        attempt_id,
                        reference,
                        created_at,
                    }
                },
            )
            .collect();
        Ok(Page::of(rows, limit, |t: &Transaction| t.seq.to_string()))
    }

    /// Broken invariants of money, over all users; none if money is in order.
    ///
    /// # Transaction
    /// One snapshot, so that work going on does not look like a difference. Read only.
    pub async fn audit(&self) -> Result<Audit, Error> {
        let mut tx = transaction::begin(&self.pool).await?;
        let found = audit::snapshot(&mut tx).await?;
        tx.rollback().await?;
        Ok(found)
    }

    /// What was spent, added up.
    pub async fn spent_by(&self, by: By, span: Span) -> Result<Vec<Spent>, Error> {
        let mut conn = self.pool.acquire().await?;
        Ok(report::spent(&mut conn, by, span).await?)
    }

    /// Findings of the reconciliation that nothing has resolved, newest first.
    pub async fn findings(&self, limit: u32) -> Result<Vec<Kept>, Error> {
        let mut conn = self.pool.acquire().await?;
        Ok(books::open_findings(&mut conn, limit.into()).await?)
    }

    /// Resolves a finding by an operator's word. False if there is none that is open.
    ///
    /// # Transaction
    /// One.
    pub async fn resolve_finding(&self, id: i64, why: &str) -> Result<bool, Error> {
        let mut tx = transaction::begin(&self.pool).await?;
        let done = doubt::resolve_finding(&mut tx, id, why).await?;
        tx.commit().await?;
        Ok(done)
    }

    /// Takes a purchase back, ledger first; the bot asks Telegram for it and tells the payer `reason`. False if that was done before.
    ///
    /// # Errors
    /// Those of the ledger: `payment_mismatch`, `purchase_used`.
    /// # Transaction
    /// One.
    pub async fn refund(&self, charge_id: &str, reason: Option<&str>) -> Result<bool, LedgerError> {
        let mut tx = transaction::begin(&self.pool).await?;
        let Known::Payment { user, .. } = purchase::known(&mut tx, charge_id).await? else {
            return Err(LedgerError::Mismatch("no such payment".into()));
        };
        let done = purchase::refund(&mut tx, user, charge_id).await?;
        if let (true, Some(reason)) = (done, reason) {
            purchase::give_reason(&mut tx, charge_id, reason).await?;
        }
        tx.commit().await?;
        Ok(done)
    }

    /// Prices in force and to come, or all.
    pub async fn prices(&self, history: bool, containing: Option<&str>) -> Result<Vec<Listed>, Error> {
        let mut conn = self.pool.acquire().await?;
        Ok(pricelist::list(&mut conn, history, containing).await?)
    }

    /// Keeps an imported price map for the weekly comparison.
    ///
    /// # Transaction
    /// One.
    pub async fn keep_price_map(&self, quotes: &[Quote], source: &str) -> Result<(), Error> {
        let mut tx = transaction::begin(&self.pool).await?;
        pricelist::keep_map(&mut tx, quotes, source).await?;
        tx.commit().await?;
        Ok(())
    }

    /// Takes prices over, or says what would be new.
    ///
    /// # Transaction
    /// One, all or nothing.
    pub async fn take_prices(
        &self,
        quotes: &[Quote],
        from: Option<DateTime<Utc>>,
        source: &str,
        write: bool,
    ) -> Result<Result<Applied, Refusal>, Error> {
        let mut tx = transaction::begin(&self.pool).await?;
        let applied = pricelist::apply(&mut tx, quotes, from, source, write).await?;
        tx.commit().await?;
        Ok(applied)
    }
}

/// Micro-credits as credits, without a float and without trailing zeros.
#[must_use]
pub fn decimal(ucr: i64) -> String {
    let sign = if ucr < 0 { "-" } else { "" };
    let (whole, rest) = (ucr.unsigned_abs() / UCR.unsigned_abs(), ucr.unsigned_abs() % UCR.unsigned_abs());
    if rest == 0 {
        return format!("{sign}{whole}");
    }
    format!("{sign}{whole}.{}", format!("{rest:06}").trim_end_matches('0'))
}

#[cfg(test)]
mod tests {
    #[test]
    fn credits_are_exact_decimals() {
        for (ucr, text) in [
            (0, "0"),
            (1, "0.000001"),
            (1_500_000, "1.5"),
            (-2_000_010, "-2.00001"),
            (i64::MIN, "-9223372036854.775808"),
        ] {
            assert_eq!(super::decimal(ucr), text);
        }
    }
}
