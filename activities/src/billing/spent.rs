//! What has been captured and is held: by a run with all that goes on in its place and below it, by an item of it, by a project.
//!
//! A child pays from its parent's user, so the user row that a caller has locked keeps these sums from moving. Whose run is whose stands in
//! `run_kin`, beside the ledger: nothing here asks `runs`, whose rows may lie elsewhere.

use super::{ledger::LedgerError, money::MicroCredits};
use sqlx::{AssertSqlSafe, PgConnection};
use uuid::Uuid;

/// Captured and held credits in rows `t` of the ledger.
const SUM: &str = "coalesce(sum(case t.kind when 'capture' then -t.amount_ucr + t.held_delta_ucr else t.held_delta_ucr end), 0)::bigint";

/// `chain`: the run `$1`, and those before and after it that went on in its place.
const CHAIN: &str = "first as (select coalesce((select k.first_run_id from run_kin k where k.run_id = $1), $1) as run_id),
         chain as (select $1 as run_id union select f.run_id from first f
                   union select k.run_id from run_kin k join first f on k.first_run_id = f.run_id and k.first_run_id is not null)";

/// Of some runs and of all runs below them, open or closed, detached or not, of all their attempts. None of them is below another.
///
/// # Transaction
/// Reads only.
pub(super) async fn by_trees(conn: &mut PgConnection, tops: &[Uuid]) -> Result<MicroCredits, LedgerError> {
    let sql = format!(
        "with recursive tree as (
           select unnest($1::uuid[]) as run_id union all
           select k.run_id from tree join run_kin k on k.parent_run_id = tree.run_id)
         select {SUM} from tree join activity_attempts a using (run_id) join credit_transactions t on t.attempt_id = a.id"
    );
    let sum: i64 = sqlx::query_scalar(AssertSqlSafe(sql)).bind(tops).fetch_one(conn).await?;
    Ok(MicroCredits(sum))
}

/// Of a run, of those of its chain, and of all runs below them.
///
/// # Transaction
/// Reads only.
pub(super) async fn by_chain(conn: &mut PgConnection, run: Uuid) -> Result<MicroCredits, LedgerError> {
    let sql = format!(
        "with recursive {CHAIN},
         tree as (select run_id from chain union all select k.run_id from tree join run_kin k on k.parent_run_id = tree.run_id)
         select {SUM} from tree join activity_attempts a using (run_id) join credit_transactions t on t.attempt_id = a.id"
    );
    let sum: i64 = sqlx::query_scalar(AssertSqlSafe(sql)).bind(run).fetch_one(conn).await?;
    Ok(MicroCredits(sum))
}

/// Of one item of a run, in whichever round of what is around it and whichever run of its chain, with all runs that the item's steps
/// have started and what is below those. `item` is a segment of a path: `implement[a-1]`.
///
/// # Transaction
/// Reads only.
pub(super) async fn by_item(conn: &mut PgConnection, run: Uuid, item: &str) -> Result<MicroCredits, LedgerError> {
    let sql = format!(
        "with recursive {CHAIN},
         tree as (select k.run_id from chain c join run_kin k on k.parent_run_id = c.run_id and $2 = any(string_to_array(k.parent_path, '/'))
                  union all select k.run_id from tree join run_kin k on k.parent_run_id = tree.run_id),
         mine as (select a.id from chain join activity_attempts a using (run_id) where $2 = any(string_to_array(a.path, '/'))
                  union all select a.id from tree join activity_attempts a using (run_id))
         select {SUM} from mine join credit_transactions t on t.attempt_id = mine.id"
    );
    let sum: i64 = sqlx::query_scalar(AssertSqlSafe(sql)).bind(run).bind(item).fetch_one(conn).await?;
    Ok(MicroCredits(sum))
}

/// What a project's cap leaves, perhaps less than nothing. `None`: it has no cap.
///
/// # Transaction
/// Reads only.
pub(super) async fn left_of_project(
    conn: &mut PgConnection,
    project: Uuid,
) -> Result<Option<MicroCredits>, LedgerError> {
    let sql = format!(
        "select p.budget_cap_ucr - (select {SUM} from activity_attempts a join credit_transactions t on t.attempt_id = a.id where a.project_id = p.id)
         from projects p where p.id = $1 and p.budget_cap_ucr is not null"
    );
    let left: Option<i64> = sqlx::query_scalar(AssertSqlSafe(sql)).bind(project).fetch_optional(conn).await?;
    Ok(left.map(MicroCredits))
}

/// Whether another attempt than `attempt` works in the chain of a run or below it: it will give back what it does not use.
///
/// # Transaction
/// Reads only.
pub(super) async fn others_work(conn: &mut PgConnection, run: Uuid, attempt: Uuid) -> Result<bool, sqlx::Error> {
    let sql = format!(
        "with recursive {CHAIN},
         tree as (select run_id from chain union all select k.run_id from tree join run_kin k on k.parent_run_id = tree.run_id)
         select exists (select from tree join activity_attempts a using (run_id) where a.state = 'running' and a.id <> $2)"
    );
    sqlx::query_scalar(AssertSqlSafe(sql)).bind(run).bind(attempt).fetch_one(conn).await
}

/// The same of a project.
pub(super) async fn others_work_in(
    conn: &mut PgConnection,
    project: Option<Uuid>,
    attempt: Uuid,
) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar(
        "select exists (select from activity_attempts where state = 'running' and id <> $2 and project_id = $1)",
    )
    .bind(project)
    .bind(attempt)
    .fetch_one(conn)
    .await
}
