//! What a run may spend at most because somebody approved it: a sum that is not exceeded. Where it is used up the run waits as
//! [`LIMIT`], and goes on when more is allowed.

use super::{
    hold,
    ledger::{self, LedgerError},
    money::MicroCredits,
};
use loopwright_engine::ids::RunId;
use sqlx::PgConnection;
use uuid::Uuid;

/// What a step waits for when the approved sum is used up.
pub const LIMIT: &str = "limit";

/// Forks of forks whose origins are asked for a limit.
const ORIGINS_MAX: i32 = 32;

/// A limit as it stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    /// For the run and all runs below it, from its beginning on.
    pub cap: MicroCredits,
    /// What of it is neither captured nor held.
    pub left: MicroCredits,
}

/// Allows a run to spend `allowed` from now on, and no more: the approval of a plan. Setting it again under the same `key`
/// changes nothing and returns what is in force.
///
/// # Errors
/// [`LedgerError::NoUser`].
/// # Transaction
/// The caller's. Locks the user row, so that nothing is held or captured between the sum and the limit.
pub async fn set(
    conn: &mut PgConnection,
    user: Uuid,
    run: Uuid,
    key: &str,
    allowed: MicroCredits,
    by: &str,
) -> Result<Limit, LedgerError> {
    ledger::lock(conn, user).await?;
    let spent = hold::spent_by_tree(conn, run).await?;
    insert(conn, run, key, allowed, MicroCredits(spent.0.saturating_add(allowed.0)), by).await?;
    Ok(in_force(conn, run).await?.unwrap_or(Limit { cap: allowed, left: allowed }))
}

/// Allows a run to spend `more` than it may now. `None` where no limit is in force: there is nothing to raise, and nothing is
/// written. Raising again under the same `key` changes nothing.
///
/// # Errors
/// [`LedgerError::NoUser`].
/// # Transaction
/// The caller's; locks the user row. Wake the run afterwards.
pub async fn raise(
    conn: &mut PgConnection,
    user: Uuid,
    run: Uuid,
    key: &str,
    more: MicroCredits,
    by: &str,
) -> Result<Option<Limit>, LedgerError> {
    ledger::lock(conn, user).await?;
    let Some(limit) = in_force(conn, run).await? else { return Ok(None) };
    let (left, cap) = (limit.left.0.saturating_add(more.0), limit.cap.0.saturating_add(more.0));
    insert(conn, run, key, MicroCredits(left), MicroCredits(cap), by).await?;
    in_force(conn, run).await
}

async fn insert(
    conn: &mut PgConnection,
    run: Uuid,
    key: &str,
    allowed: MicroCredits,
    cap: MicroCredits,
    by: &str,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "insert into spending_limits (run_id, key, allowed_ucr, cap_ucr, set_by) values ($1, $2, $3, $4, $5)
         on conflict (run_id, key) do nothing",
    )
    .bind(run)
    .bind(key)
    .bind(allowed.0)
    .bind(cap.0)
    .bind(by)
    .execute(conn)
    .await?;
    Ok(())
}

/// The limit of a run, or `None` if nobody set one for it or, if it is a fork, for its origin.
///
/// # Transaction
/// Reads only. Exact while the user row is locked.
pub async fn in_force(conn: &mut PgConnection, run: Uuid) -> Result<Option<Limit>, LedgerError> {
    let found: Option<(i32, i64, i64)> = sqlx::query_as(
        "with recursive line as (
           select $3::smallint as shard, $1::uuid as run_id, 0 as n union all
           select r.forked_shard, r.forked_from, line.n + 1 from line join runs r on r.shard = line.shard and r.run_id = line.run_id
           where r.forked_from is not null and line.n < $2)
         select line.n, s.allowed_ucr, s.cap_ucr from line
         cross join lateral (select allowed_ucr, cap_ucr from spending_limits where run_id = line.run_id order by id desc limit 1) s
         order by line.n limit 1",
    )
    .bind(run)
    .bind(ORIGINS_MAX)
    .bind(RunId(run).shard())
    .fetch_optional(&mut *conn)
    .await?;
    let Some((n, allowed, cap)) = found else { return Ok(None) };
    let cap = if n == 0 { cap } else { allowed };
    let spent = hold::spent_by_tree(conn, run).await?;
    Ok(Some(Limit { cap: MicroCredits(cap), left: MicroCredits(cap.saturating_sub(spent.0).max(0)) }))
}
