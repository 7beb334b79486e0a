//! What a run may spend at most because somebody approved it: a sum that is not exceeded. Where it is used up the run waits as
//! [`LIMIT`], and goes on when more is allowed.

use super::{
    kin::Kin,
    ledger::{self, LedgerError},
    money::MicroCredits,
    spent as sums,
};
use sqlx::PgConnection;
use uuid::Uuid;

/// What a step waits for when the approved sum is used up.
pub const LIMIT: &str = "limit";

/// Key of the row that repeats a limit for a run that has it from its chain or its origin. No step has that path.
const INHERITED: &str = "(inherited)";

/// Runs that are asked for a limit, from a fork to its origin and from a chain to its first run.
const ORIGINS_MAX: i32 = 32;

/// A limit as it stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    /// For the run and all runs below it, from its beginning on; with those of its chain that have held under it.
    pub cap: MicroCredits,
    /// What of it is neither captured nor held.
    pub left: MicroCredits,
}

/// Allows a run to spend `allowed` from now on, and no more: the approval of a plan. Setting it again under the same `key`
/// changes nothing and returns what is in force. The runs that go on in its place spend from the same sum.
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
    let first = Kin::of(conn, run).await?.first();
    let spent = spent(conn, first, run).await?;
    let row = Row { allowed: allowed.0, cap: spent.0.saturating_add(allowed.0) };
    insert(conn, run, first, key, row, by).await?;
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
    let kin = Kin::of(conn, run).await?;
    let Some(bound) = bound(conn, &kin).await? else { return Ok(None) };
    let allowed = bound.left().saturating_add(more.0);
    let row = Row { allowed, cap: bound.spent.0.saturating_add(allowed) };
    insert(conn, run, kin.first(), key, row, by).await?;
    in_force(conn, run).await
}

/// What a row allows: from when it was written on, and in all.
#[derive(Clone, Copy, Debug)]
struct Row {
    allowed: i64,
    cap: i64,
}

async fn insert(
    conn: &mut PgConnection,
    run: Uuid,
    first: Uuid,
    key: &str,
    row: Row,
    by: &str,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "insert into spending_limits (run_id, first_run_id, key, allowed_ucr, cap_ucr, set_by) values ($1, nullif($2::uuid, $1), $3, $4, $5, $6)
         on conflict (run_id, key) do nothing",
    )
    .bind(run)
    .bind(first)
    .bind(key)
    .bind(row.allowed)
    .bind(row.cap)
    .bind(by)
    .execute(conn)
    .await?;
    Ok(())
}

/// The limit of a run, or `None` if nobody set one for it, for its chain or, if it is a fork, for its origin.
///
/// # Transaction
/// Reads only. Exact while the user row is locked.
pub async fn in_force(conn: &mut PgConnection, run: Uuid) -> Result<Option<Limit>, LedgerError> {
    let kin = Kin::of(conn, run).await?;
    Ok(bound(conn, &kin).await?.map(|bound| bound.limit()))
}

/// [`in_force`] for a run that is about to hold under it: what it spends then counts for all of its chain.
///
/// # Transaction
/// The user row must be locked. Writes once per run that has its limit from others.
pub(super) async fn binding(conn: &mut PgConnection, kin: &Kin) -> Result<Option<Limit>, LedgerError> {
    let Some(bound) = bound(conn, kin).await? else { return Ok(None) };
    if !bound.own {
        insert(conn, kin.run, kin.first(), INHERITED, bound.row, "chain").await?;
    }
    Ok(Some(bound.limit()))
}

/// A limit, and what counts against it.
struct Bound {
    row: Row,
    /// The run has a row itself.
    own: bool,
    spent: MicroCredits,
}

impl Bound {
    fn left(&self) -> i64 {
        self.row.cap.saturating_sub(self.spent.0).max(0)
    }
    fn limit(&self) -> Limit {
        Limit { cap: MicroCredits(self.row.cap), left: MicroCredits(self.left()) }
    }
}

async fn bound(conn: &mut PgConnection, kin: &Kin) -> Result<Option<Bound>, LedgerError> {
    let (mut row, own) = newest(conn, kin).await?;
    let mut at = kin.clone();
    for n in 0..=ORIGINS_MAX {
        if let Some(row) = row {
            // An origin's own spending is not its fork's: that may spend once more what was last allowed.
            let row = if n == 0 { row } else { Row { cap: row.allowed, ..row } };
            let spent = spent(conn, kin.first(), kin.run).await?;
            return Ok(Some(Bound { row, own, spent }));
        }
        let next = at.forked_from.unwrap_or(at.first());
        if next == at.run {
            break;
        }
        at = Kin::of(conn, next).await?;
        row = newest(conn, &at).await?.0;
    }
    Ok(None)
}

/// The newest row of a run's chain, and whether the run has one itself. Its origin is not asked.
async fn newest(conn: &mut PgConnection, kin: &Kin) -> Result<(Option<Row>, bool), sqlx::Error> {
    // `+ 0`: the newest of a few rows, not the first that fits on a walk back over all limits ever set.
    let (own, allowed, cap): (bool, Option<i64>, Option<i64>) = sqlx::query_as(
        "select coalesce(s.own, false), l.allowed_ucr, l.cap_ucr
         from (select max(n.id + 0) as newest, bool_or(n.run_id = $1) as own from spending_limits n
               where n.run_id = $1 or coalesce(n.first_run_id, n.run_id) = $2) s
         left join spending_limits l on l.id = s.newest",
    )
    .bind(kin.run)
    .bind(kin.first())
    .fetch_one(conn)
    .await?;
    Ok((allowed.zip(cap).map(|(allowed, cap)| Row { allowed, cap }), own))
}

/// Captured and held credits of a run, of those of its chain that have a row, and of all runs below them.
async fn spent(conn: &mut PgConnection, first: Uuid, run: Uuid) -> Result<MicroCredits, LedgerError> {
    let mut tops: Vec<Uuid> = sqlx::query_scalar(
        "select distinct run_id from spending_limits where coalesce(first_run_id, run_id) = $1 and run_id <> $2",
    )
    .bind(first)
    .bind(run)
    .fetch_all(&mut *conn)
    .await?;
    tops.push(run);
    sums::by_trees(conn, &tops).await
}
