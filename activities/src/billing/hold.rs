//! Holds: credits reserved for one attempt, taken or given back at its end.

use super::{
    ledger::{Balance, Entry, LedgerError, append},
    money::{MicroCredits, Rate},
    policy,
};
use chrono::{DateTime, Utc};
use sqlx::{PgConnection, Row};
use uuid::Uuid;

/// What may be reserved, and the instant that this is true of: a grant that expires a moment later still counts.
#[derive(Clone, Copy, Debug)]
pub struct Reservable {
    pub credits: MicroCredits,
    pub at: DateTime<Utc>,
}

/// Places hold number `hold_no` of an attempt. The user row must be locked and have had that much available at `at`, which is
/// what [`reservable`] says: between two statements the clock goes on, and a grant may pass its date.
/// Placing the same hold again changes nothing.
///
/// # Transaction
/// One statement. Takes from grants in burn order: priority, earliest expiry, age.
pub async fn place(
    conn: &mut PgConnection,
    user: Uuid,
    attempt: Uuid,
    hold_no: i32,
    amount: MicroCredits,
    rate: Rate,
    at: DateTime<Utc>,
) -> Result<(), LedgerError> {
    let key = format!("hold:{attempt}:{hold_no}");
    // The user's row is locked, so nobody else changes its grants, and what the statement saw when it began is what there is.
    let (placed, before, covered): (bool, bool, i64) = sqlx::query_as(
        "with u as (
           update users set credit_held_ucr = credit_held_ucr + $3, ledger_seq = ledger_seq + 1
           where id = $1 and not exists (select from credit_transactions where idempotency_key = $5)
           returning ledger_seq, credit_balance_ucr, credit_held_ucr),
         hold as (
           insert into credit_transactions (user_id, seq, kind, amount_ucr, held_delta_ucr, balance_after_ucr, held_after_ucr,
                        counter_account, idempotency_key, attempt_id, hold_no, rate_credits_per_usd, markup_bps)
           select $1, u.ledger_seq, 'hold', 0, $3, u.credit_balance_ucr, u.credit_held_ucr, 'platform:pending', $5, $2, $4, $6, $7 from u
           returning id),
         free as (
           select id, remaining_ucr - held_ucr as free,
                  sum(remaining_ucr - held_ucr) over (order by priority, expires_at nulls last, created_at, id) as upto
           from credit_grants where user_id = $1 and remaining_ucr > held_ucr and (expires_at is null or expires_at > $8)),
         part as (
           select free.id as grant_id, hold.id as hold_id, least(free.free, $3 - (upto - free.free))::bigint as part
           from free, hold where upto - free.free < $3),
         taken as (update credit_grants g set held_ucr = g.held_ucr + p.part from part p where g.id = p.grant_id),
         allocated as (
           insert into credit_allocations (hold_txn_id, grant_id, held_ucr) select hold_id, grant_id, part from part)
         select exists (select from hold), exists (select from credit_transactions where idempotency_key = $5),
                coalesce((select sum(part) from part), 0)::bigint",
    )
    .bind(user)
    .bind(attempt)
    .bind(amount.0)
    .bind(hold_no)
    .bind(&key)
    .bind(rate.credits_per_usd)
    .bind(rate.markup_bps)
    .bind(at)
    .fetch_one(conn)
    .await?;
    if before {
        return Ok(());
    }
    if !placed {
        return Err(LedgerError::NoUser(user));
    }
    let missing = amount.0 - covered;
    if missing > 0 {
        // Credits that expired and are not booked yet still stand in the balance.
        return Err(LedgerError::Mismatch(format!("{} of a hold is covered by no grant", MicroCredits(missing))));
    }
    Ok(())
}

/// What a user may reserve now: the available balance less what has expired and is not booked yet.
///
/// # Transaction
/// The user row must be locked: nobody else changes its grants until the transaction ends.
pub async fn reservable(conn: &mut PgConnection, user: Uuid, balance: Balance) -> Result<Reservable, LedgerError> {
    let (expired, at): (i64, DateTime<Utc>) = sqlx::query_as(
        "with clock as materialized (select engine_now() as at)
         select coalesce(sum(g.remaining_ucr - g.held_ucr), 0)::bigint, c.at
         from clock c left join credit_grants g on g.user_id = $1 and g.expires_at <= c.at and g.remaining_ucr > g.held_ucr group by c.at",
    )
    .bind(user)
    .fetch_one(conn)
    .await?;
    Ok(Reservable { credits: MicroCredits((balance.available().0 - expired).max(0)), at })
}

/// Why an attempt ended, beside how.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ended<'a> {
    /// `completed`, `failed` or `lost`.
    pub state: &'a str,
    /// Its failure code, if it failed.
    pub failure: Option<&'a str>,
    /// Another attempt of the step follows.
    pub again: bool,
    /// What the call needs that was refused in its middle, in micro-credits.
    pub needed: Option<i64>,
}

/// Settles an attempt: its open calls become unknown and free, its cost is captured from its holds in their order, the
/// rest of them is released; then the refund policy is asked. Once per attempt: a second settlement finds nothing running and
/// changes nothing.
///
/// # Transaction
/// The user row must be locked. Keys `settle:<attempt>:<hold_no>`.
pub async fn settle(conn: &mut PgConnection, attempt: Uuid, ended: Ended<'_>) -> Result<(), LedgerError> {
    let user: Option<Uuid> = sqlx::query_scalar(
        "update activity_attempts set state = $2, failure_code = left($3, 200), again = $4, needed_ucr = $5, ended_at = engine_now()
         where id = $1 and state = 'running' returning user_id",
    )
    .bind(attempt)
    .bind(ended.state)
    .bind(ended.failure)
    .bind(ended.again)
    .bind(ended.needed)
    .fetch_optional(&mut *conn)
    .await?;
    let Some(user) = user else { return Ok(()) };
    crate::crash_point("capture.after_attempt");
    sqlx::query("update api_key_usage set state = 'unknown', finished_at = engine_now() where attempt_id = $1 and state = 'started'")
        .bind(attempt)
        .execute(&mut *conn)
        .await?;
    crate::crash_point("capture.after_calls");
    let cost: String =
        sqlx::query_scalar("select coalesce(sum(cost_pusd), 0)::text from api_key_usage where attempt_id = $1")
            .bind(attempt)
            .fetch_one(&mut *conn)
            .await?;
    let holds = sqlx::query(
        "select id, hold_no, held_delta_ucr, rate_credits_per_usd, markup_bps from credit_transactions
         where attempt_id = $1 and kind = 'hold' order by hold_no",
    )
    .bind(attempt)
    .fetch_all(&mut *conn)
    .await?;
    let mut left: Option<i64> = None;
    let count = holds.len();
    for (at, row) in holds.iter().enumerate() {
        let (hold, hold_no, held): (i64, i32, i64) = (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
        let rate = Rate { credits_per_usd: row.try_get(3)?, markup_bps: row.try_get(4)? };
        // The first hold's rate is the one that the user agreed to.
        let due = *left.get_or_insert_with(|| rate.credits(cost.parse().unwrap_or(i128::MAX)).0);
        let taken = due.min(held);
        let uncollected = if at + 1 == count { due - taken } else { 0 };
        let key = format!("settle:{attempt}:{hold_no}");
        let entry = Entry {
            hold: Some(hold),
            attempt: Some(attempt),
            actual: Some(taken + uncollected),
            uncollected,
            ..Entry::new(user, "capture", -taken, -held, "platform:revenue", &key)
        };
        append(conn, &entry).await?;
        crate::crash_point("capture.after_entry");
        capture(conn, hold, taken).await?;
        crate::crash_point("capture.after_capture");
        if uncollected > 0 {
            tracing::error!(%attempt, uncollected_ucr = uncollected, "an attempt cost more than was held");
            metrics::counter!("loopwright_uncollected_ucr_total").increment(uncollected.unsigned_abs());
        }
        left = Some(due - taken);
    }
    if ended.failure.is_some() { policy::attempt_ended(conn, attempt).await } else { Ok(()) }
}

/// Minutes beyond its deadline after which an attempt is nobody's: a worker that lives ends it at its deadline, one that died is taken
/// over within its lease. Source: money.md, I15; its grace is the same.
const ABANDONED_MINUTES: i32 = 10;

/// Attempts, and their users, that are so long over their deadlines that nobody works on them. Their runs wait for a worker that does not
/// come (of their queue there is none any more), and what they hold would be held until one does.
///
/// # Transaction
/// Reads only.
pub async fn abandoned(conn: &mut PgConnection, limit: i64) -> Result<Vec<(Uuid, Uuid)>, sqlx::Error> {
    sqlx::query_as(
        "select id, user_id from activity_attempts
         where state = 'running' and lease_expires_at < engine_now() - make_interval(mins => $2) order by lease_expires_at limit $1",
    )
    .bind(limit)
    .bind(ABANDONED_MINUTES)
    .fetch_all(conn)
    .await
}

/// Settles one of [`abandoned`] as lost, if it still is one: it pays for the answers that it has recorded, and the rest comes back. Whoever
/// ends it later finds it settled; a worker that was only late makes no further call, and what it reports is kept and free.
///
/// # Transaction
/// The caller's. Locks the user row and no run: a transition of that run has it or waits for it.
pub async fn release_abandoned(conn: &mut PgConnection, attempt: Uuid, user: Uuid) -> Result<bool, LedgerError> {
    super::ledger::lock(conn, user).await?;
    let still: Option<i32> = sqlx::query_scalar(
        "select 1 from activity_attempts
         where id = $1 and state = 'running' and lease_expires_at < engine_now() - make_interval(mins => $2)",
    )
    .bind(attempt)
    .bind(ABANDONED_MINUTES)
    .fetch_optional(&mut *conn)
    .await?;
    if still.is_some() {
        settle(conn, attempt, Ended { state: "lost", ..Ended::default() }).await?;
    }
    Ok(still.is_some())
}

/// Takes `taken` from a hold's grants in burn order and frees the rest.
async fn capture(conn: &mut PgConnection, hold: i64, mut taken: i64) -> Result<(), LedgerError> {
    let rows = sqlx::query(
        "select a.grant_id, a.held_ucr from credit_allocations a join credit_grants g on g.id = a.grant_id where a.hold_txn_id = $1
         order by g.priority, g.expires_at nulls last, g.created_at, g.id for no key update of g",
    )
    .bind(hold)
    .fetch_all(&mut *conn)
    .await?;
    crate::crash_point("capture.after_lock");
    for row in rows {
        let (grant, held): (Uuid, i64) = (row.try_get(0)?, row.try_get(1)?);
        let part = held.min(taken);
        sqlx::query("update credit_allocations set captured_ucr = $3 where hold_txn_id = $1 and grant_id = $2")
            .bind(hold)
            .bind(grant)
            .bind(part)
            .execute(&mut *conn)
            .await?;
        crate::crash_point("capture.after_allocation");
        sqlx::query(
            "update credit_grants set held_ucr = held_ucr - $2, remaining_ucr = remaining_ucr - $3 where id = $1",
        )
        .bind(grant)
        .bind(held)
        .bind(part)
        .execute(&mut *conn)
        .await?;
        crate::crash_point("capture.after_grant");
        taken -= part;
    }
    Ok(())
}
