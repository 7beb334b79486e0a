//! Payments, every day: Telegram's own list of Stars beside ours. What is missing is booked under the same key as ever, and told.

use super::{Books, Output, ledger_failure, report, store};
use crate::billing::{
    books::{self, Finding},
    ledger::LedgerError,
    purchase::{self, Dispute, Known, Payment},
};
use chrono::{DateTime, Duration, Utc};
use futures_util::future::BoxFuture;
use loopwright_engine::{Failure, transaction};
use serde_json::json;

const JOB: &str = "reconcile-payments";
/// Transactions of one page. Source: the Bot API's limit.
const PAGE: i64 = 100;
/// Pages that one run reads. Chosen: ten thousand payments a day.
const PAGES_MAX: i64 = 100;
/// Younger transactions are left to the update that tells of them. Chosen.
const YOUNG_MINUTES: i64 = 15;

/// A line of Telegram's list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StarTransaction {
    /// The charge; a refund has the id of its payment.
    pub id: String,
    /// A payment to us, or money that left us.
    pub incoming: bool,
    /// Who paid or was paid; `None` for what is no user, as a withdrawal.
    pub telegram_user_id: Option<i64>,
    pub stars: i64,
    /// Of the invoice.
    pub payload: Option<String>,
    pub at: DateTime<Utc>,
}

/// Telegram's list of Stars, oldest first.
pub trait Stars: Send + Sync + 'static {
    /// At most `limit` transactions after the first `offset`.
    fn transactions(&self, offset: i64, limit: i64) -> BoxFuture<'_, Result<Vec<StarTransaction>, Failure>>;
}

pub(super) async fn run(b: &Books) -> Result<Output, Failure> {
    let Some(stars) = &b.stars else { return Ok(Output::skipped("no bot is configured")) };
    let mut conn = b.pool.acquire().await.map_err(|e| store(&e))?;
    let mut position = books::cursor(&mut conn, JOB).await.map_err(|e| store(&e))?;
    drop(conn);
    let (mut done, mut found) = (Output::default(), Vec::new());
    let young = Utc::now() - Duration::minutes(YOUNG_MINUTES);
    'pages: for _ in 0..PAGES_MAX {
        let page = stars.transactions(position, PAGE).await?;
        let last = i64::try_from(page.len()).unwrap_or(PAGE) < PAGE;
        for line in page {
            if line.at > young {
                break 'pages;
            }
            let finding = one(b, &line).await?;
            done.checked += 1;
            done.changed += u64::from(finding.is_some());
            found.extend(finding);
            position += 1;
        }
        // What was found is kept before the position: whoever dies between looks at this page again, and nothing is booked twice.
        done.findings += report(b, JOB, &found, false).await?;
        found.clear();
        let mut conn = b.pool.acquire().await.map_err(|e| store(&e))?;
        books::advance(&mut conn, JOB, position).await.map_err(|e| store(&e))?;
        if last {
            break;
        }
    }
    done.findings += report(b, JOB, &found, false).await?;
    let mut conn = b.pool.acquire().await.map_err(|e| store(&e))?;
    books::advance(&mut conn, JOB, position).await.map_err(|e| store(&e))?;
    Ok(done)
}

/// Compares one line, and books what is missing. What was missing, if anything.
async fn one(b: &Books, line: &StarTransaction) -> Result<Option<Finding>, Failure> {
    let Some(payer) = line.telegram_user_id else { return Ok(None) };
    let mut tx = transaction::begin(&b.pool).await.map_err(|e| store(&e))?;
    let known = purchase::known(&mut tx, &line.id).await.map_err(|e| store(&e))?;
    let finding = |kind, user, text: &str| {
        let message = format!("charge {} of {} Stars: {text}", line.id, line.stars);
        Some(Finding { kind, subject: line.id.clone(), message, user })
    };
    let found = match (line.incoming, known) {
        (true, Known::Payment { .. } | Known::Disputed) | (false, Known::Disputed) => None,
        (true, Known::Nothing) => {
            let user = purchase::payer(&mut tx, payer).await.map_err(|e| store(&e))?;
            match book(b, &mut tx, line, payer, user).await? {
                None => finding("payment_missing", user, "it was paid and not booked; it is now"),
                Some(why) => finding(
                    "payment_disputed",
                    user,
                    &format!("it was paid and cannot be booked: {why}; see payment_disputes"),
                ),
            }
        }
        (false, Known::Payment { user, refund_state }) => match refund_state.as_str() {
            "none" => {
                purchase::taken_back(&mut tx, user, &line.id).await.map_err(|e| ledger_failure(&e))?;
                finding("refund_missing", Some(user), "Telegram gave it back and we did not know; it is booked now")
            }
            "requested" => {
                purchase::refund_done(&mut tx, &line.id).await.map_err(|e| ledger_failure(&e))?;
                None
            }
            // The same as the bot does when the update of it comes, so that neither takes what the other has taken.
            "refused" => {
                purchase::taken_back(&mut tx, user, &line.id).await.map_err(|e| ledger_failure(&e))?;
                finding(
                    "refund_twice",
                    Some(user),
                    "Telegram gave back what it had refused to; what was left of the credits given again is taken now",
                )
            }
            _ => None,
        },
        (false, Known::Nothing) => finding("refund_unknown", None, "Telegram gave back a payment that we do not know"),
    };
    tx.commit().await.map_err(|e| store(&e))?;
    if found.is_some() {
        b.client.wake().await;
    }
    Ok(found)
}

/// Books a payment; what stands in the way, if it becomes a dispute.
async fn book(
    b: &Books,
    conn: &mut sqlx::PgConnection,
    line: &StarTransaction,
    payer: i64,
    user: Option<uuid::Uuid>,
) -> Result<Option<String>, Failure> {
    let payload = line.payload.as_deref().unwrap_or_default();
    let why = match user {
        None => "the payer is no user".to_owned(),
        Some(user) => {
            // Runs before accounts, as workers lock them.
            let whose = json!({ "user_id": user.to_string() });
            b.client
                .unblock_in(conn, &whose)
                .await
                .map_err(|e| Failure::retryable("transient.store", e.to_string()))?;
            let stars = i32::try_from(line.stars).unwrap_or(0);
            let payment = Payment { charge_id: &line.id, payload, currency: "XTR", stars, recurring: false };
            match purchase::purchase(conn, user, &payment).await {
                Ok(_) => return Ok(None),
                Err(LedgerError::Mismatch(why)) => why,
                Err(error) => return Err(ledger_failure(&error)),
            }
        }
    };
    let dispute = Dispute {
        charge_id: &line.id,
        telegram_user_id: payer,
        user,
        payload,
        currency: "XTR",
        amount: line.stars,
        reason: &why,
    };
    purchase::dispute(conn, &dispute).await.map_err(|e| store(&e))?;
    Ok(Some(why))
}
