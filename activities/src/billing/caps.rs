//! Caps: what an attempt may still spend under its run's budget, its item's share of it and its project's cap. Each is compared
//! with captured + held, under the lock of the user row that the caller holds.

use super::{hold::spent_by_tree, ledger::LedgerError, limit, money::MicroCredits, returned::BUDGET_HELD};
use loopwright_engine::hook::AttemptRef;
use serde_json::Value;
use sqlx::PgConnection;
use uuid::Uuid;

/// In a definition's `budget`: most credits of one item of a `foreach`, over all of its rounds and attempts in a run.
const PER_ITEM: &str = "credits-per-item";

/// Whose cap it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CapKind {
    Run,
    /// What its owner approved.
    Approved,
    Item,
    Project,
}

impl CapKind {
    pub fn of_what(self) -> &'static str {
        match self {
            Self::Run => "the run's budget",
            Self::Approved => "the approved sum",
            Self::Item => "the item's share of the run's budget",
            Self::Project => "the project's cap",
        }
    }

    /// What helps, to be said after the numbers.
    pub fn remedy(self) -> &'static str {
        match self {
            Self::Approved => "; allow more and it goes on by itself",
            Self::Run | Self::Item | Self::Project => "",
        }
    }

    /// Failure code of a step that nothing it could wait for gives more; or what it waits for.
    fn code(self) -> &'static str {
        match self {
            Self::Run => "budget.run",
            Self::Approved => limit::LIMIT,
            Self::Item => "budget.item",
            Self::Project => "budget.project",
        }
    }
}

/// A cap, and what is left of it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cap {
    pub kind: CapKind,
    pub left: MicroCredits,
}

impl Cap {
    /// Why there is nothing left: for good (a dotted failure code), or only until others that work now have settled (a word).
    pub async fn used_up(
        self,
        conn: &mut PgConnection,
        attempt: &AttemptRef,
        project: Option<Uuid>,
    ) -> Result<&'static str, LedgerError> {
        let others: bool = sqlx::query_scalar(
            "select exists (select from activity_attempts where state = 'running' and id <> $2 and run_id = $1)
                 or exists (select from activity_attempts where state = 'running' and id <> $2 and project_id = $3)",
        )
        .bind(attempt.run_id.0)
        .bind(attempt.attempt_id.0)
        .bind(project)
        .fetch_one(conn)
        .await?;
        Ok(if others { BUDGET_HELD } else { self.kind.code() })
    }
}

/// The smallest of: the definition's budget, the approved sum, those of the runs above, the item's share, the project's cap. A budget pays
/// for its run and all runs below it. `None`: nothing caps the attempt.
///
/// # Transaction
/// Reads, and writes once per run that has its limit from its chain or its origin. Locked user rows keep the sums from moving: a
/// child pays from its parent's user.
pub(super) async fn tightest(
    conn: &mut PgConnection,
    attempt: &AttemptRef,
    project: Option<Uuid>,
) -> Result<Option<Cap>, LedgerError> {
    // The budgets of the runs above, and what is left of the project's cap, which is no run's.
    let rows: Vec<(Option<Uuid>, Value, Option<i64>)> = sqlx::query_as(
        "with recursive up as (
           select parent_shard, parent_run_id from runs where shard = $1 and run_id = $2 union all
           select r.parent_shard, r.parent_run_id from up join runs r on r.shard = up.parent_shard and r.run_id = up.parent_run_id)
         select r.run_id, coalesce(d.ir->'budget', 'null'), null::bigint
         from up join runs r on r.shard = up.parent_shard and r.run_id = up.parent_run_id join definitions d on d.hash = r.definition
         union all
         select null, 'null', p.budget_cap_ucr - coalesce((select sum(case t.kind when 'capture' then -t.amount_ucr + t.held_delta_ucr else t.held_delta_ucr end)
                from activity_attempts a join credit_transactions t on t.attempt_id = a.id where a.project_id = p.id), 0)::bigint
         from projects p where p.id = $3 and p.budget_cap_ucr is not null",
    )
    .bind(attempt.run_id.shard())
    .bind(attempt.run_id.0)
    .bind(project)
    .fetch_all(&mut *conn)
    .await?;
    let of_project = rows.iter().find_map(|(_, _, left)| *left);
    let above: Vec<(Uuid, &Value)> = rows.iter().filter_map(|(run, terms, _)| Some(((*run)?, terms))).collect();
    let mut caps = Vec::new();
    let own = (attempt.run_id.0, &*attempt.budget);
    for (run, terms) in std::iter::once(own).chain(above.iter().copied()) {
        let Some(credits) = terms.get("credits").and_then(Value::as_i64) else { continue };
        let left = MicroCredits::from_credits(credits).0.saturating_sub(spent_by_tree(conn, run).await?.0);
        caps.push(Cap { kind: CapKind::Run, left: MicroCredits(left) });
    }
    for run in std::iter::once(attempt.run_id.0).chain(above.iter().map(|(run, _)| *run)) {
        caps.extend(limit::binding(conn, run).await?.map(|limit| Cap { kind: CapKind::Approved, left: limit.left }));
    }
    let share = attempt.budget.get(PER_ITEM).and_then(Value::as_i64);
    if let (Some(credits), Some(item)) = (share, item(&attempt.path)) {
        let left = MicroCredits::from_credits(credits).0.saturating_sub(spent_by_item(conn, attempt, item).await?.0);
        caps.push(Cap { kind: CapKind::Item, left: MicroCredits(left) });
    }
    caps.extend(of_project.map(|left| Cap { kind: CapKind::Project, left: MicroCredits(left) }));
    let tightest = caps.into_iter().min_by_key(|cap| cap.left);
    Ok(tightest.map(|cap| Cap { left: cap.left.max(MicroCredits(0)), ..cap }))
}

/// The item that a step path belongs to, the outermost if there are several: `implement[a-1]` of `loop~2/implement[a-1]/code`.
fn item(path: &str) -> Option<&str> {
    path.split('/').find(|segment| segment.ends_with(']'))
}

/// Captured and held credits of one item of a run, in whichever round of what is around it.
async fn spent_by_item(conn: &mut PgConnection, attempt: &AttemptRef, item: &str) -> Result<MicroCredits, LedgerError> {
    let sum: i64 = sqlx::query_scalar(
        "select coalesce(sum(case t.kind when 'capture' then -t.amount_ucr + t.held_delta_ucr else t.held_delta_ucr end), 0)::bigint
         from activity_attempts a join credit_transactions t on t.attempt_id = a.id
         where a.run_id = $1 and $2 = any(string_to_array(a.path, '/'))",
    )
    .bind(attempt.run_id.0)
    .bind(item)
    .fetch_one(conn)
    .await?;
    Ok(MicroCredits(sum))
}

#[cfg(test)]
mod tests {
    use super::item;

    #[test]
    fn an_item_is_the_outermost_of_a_path() {
        for (path, expected) in [
            ("implement[a-1]/code", Some("implement[a-1]")),
            ("loop~2/implement[a%2F1]/again~3/inner[x]/code", Some("implement[a%2F1]")),
            ("plan", None),
            ("all:left/ask", None),
        ] {
            assert_eq!(item(path), expected, "{path}");
        }
    }
}
