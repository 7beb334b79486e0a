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
/// Locks grants in burn order: priority, earliest expiry, age.
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
    let placed: Option<i64> = sqlx::query_scalar("select id from credit_transactions where idempotency_key = $1")
        .bind(&key)
        .fetch_optional(&mut *conn)
        .await?;
    if placed.is_some() {
        return Ok(());
    }
    let entry = Entry {
        attempt: Some(attempt),
        hold_no: Some(hold_no),
        rate: Some(rate),
        ..Entry::new(user, "hold", 0, amount.0, "platform:pending", &key)
    };
    let hold = append(conn, &entry).await?;
    crate::crash_point("hold.after_entry");
    let grants = sqlx::query(
        "select id, remaining_ucr - held_ucr as free from credit_grants
         where user_id = $1 and remaining_ucr > held_ucr and (expires_at is null or expires_at > $2)
         order by priority, expires_at nulls last, created_at, id for no key update",
    )
    .bind(user)
    .bind(at)
    .fetch_all(&mut *conn)
    .await?;
    crate::crash_point("hold.after_lock");
    let mut missing = amount.0;
    for row in grants {
        let (grant, free): (Uuid, i64) = (row.try_get(0)?, row.try_get(1)?);
        let part = free.min(missing);
        if part == 0 {
            break;
        }
        sqlx::query("update credit_grants set held_ucr = held_ucr + $2 where id = $1")
            .bind(grant)
            .bind(part)
            .execute(&mut *conn)
            .await?;
        crate::crash_point("hold.after_grant");
        sqlx::query("insert into credit_allocations (hold_txn_id, grant_id, held_ucr) values ($1, $2, $3)")
            .bind(hold)
            .bind(grant)
            .bind(part)
            .execute(&mut *conn)
            .await?;
        crate::crash_point("hold.after_allocation");
        missing -= part;
    }
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
}

/// Captured and held credits of a run and of all runs below it, open or closed, detached or not, of all their attempts.
///
/// # Transaction
/// Reads only. Locked user rows keep the sum from moving: a child pays from its parent's user.
pub(super) async fn spent_by_tree(conn: &mut PgConnection, top: Uuid) -> Result<MicroCredits, LedgerError> {
    spent_by_trees(conn, &[top]).await
}

/// [`spent_by_tree`] of several, none of them below another.
pub(super) async fn spent_by_trees(conn: &mut PgConnection, tops: &[Uuid]) -> Result<MicroCredits, LedgerError> {
    let sum: i64 = sqlx::query_scalar(
        "with recursive tree as (
           select unnest($1::uuid[]) as run_id union all
           select r.run_id from tree join runs r on r.parent_run_id = tree.run_id)
         select coalesce(sum(case t.kind when 'capture' then -t.amount_ucr + t.held_delta_ucr else t.held_delta_ucr end), 0)::bigint
         from tree join activity_attempts a using (run_id) join credit_transactions t on t.attempt_id = a.id",
    )
    .bind(tops)
    .fetch_one(conn)
    .await?;
    Ok(MicroCredits(sum))
}

/// Settles an attempt: its open calls become unknown and free, its cost is captured from its holds in their order, the
/// rest of them is released; then the refund policy is asked. Once per attempt: a second settlement finds nothing running and
/// changes nothing.
///
/// # Transaction
/// The user row must be locked. Keys `settle:<attempt>:<hold_no>`.
pub async fn settle(conn: &mut PgConnection, attempt: Uuid, ended: Ended<'_>) -> Result<(), LedgerError> {
    let user: Option<Uuid> = sqlx::query_scalar(
        "update activity_attempts set state = $2, failure_code = left($3, 200), again = $4, ended_at = engine_now()
         where id = $1 and state = 'running' returning user_id",
    )
    .bind(attempt)
    .bind(ended.state)
    .bind(ended.failure)
    .bind(ended.again)
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
