//! Caps: what an attempt may still spend under its run's budget, its item's share of it and its project's cap. Each is compared
//! with captured + held, under the lock of the user row that the caller holds.
//!
//! A budget is written in a definition, so where it is used up the step fails; what somebody can raise (the approved sum, the project's
//! cap) is waited for.

use super::{kin::Kin, ledger::LedgerError, limit, money::MicroCredits, returned::BUDGET_HELD, spent};
use loopwright_engine::hook::AttemptRef;
use serde_json::Value;
use sqlx::PgConnection;
use uuid::Uuid;

/// What a step waits for when its project's cap is used up and nobody works who could give something of it back.
pub const PROJECT_CAP: &str = "cap";

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
            Self::Project => "; raise it (`loopwright project cap`) and it goes on by itself",
            Self::Run | Self::Item => "",
        }
    }

    /// Failure code of a step that nothing it could wait for gives more; or what it waits for.
    fn code(self) -> &'static str {
        match self {
            Self::Run => "budget.run",
            Self::Approved => limit::LIMIT,
            Self::Item => "budget.item",
            Self::Project => PROJECT_CAP,
        }
    }
}

/// A cap, and what is left of it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cap {
    pub kind: CapKind,
    pub left: MicroCredits,
    /// Whose it is; of a project's cap the attempt's own.
    run: Uuid,
}

impl Cap {
    /// Why there is nothing left: for good (a dotted failure code), or only until somebody allows more or others that work now
    /// have settled (a word).
    pub async fn used_up(
        self,
        conn: &mut PgConnection,
        attempt: &AttemptRef,
        project: Option<Uuid>,
    ) -> Result<&'static str, LedgerError> {
        let id = attempt.attempt_id.0;
        let others = match self.kind {
            CapKind::Project => spent::others_work_in(conn, project, id).await?,
            CapKind::Run | CapKind::Approved | CapKind::Item => spent::others_work(conn, self.run, id).await?,
        };
        Ok(if others { BUDGET_HELD } else { self.kind.code() })
    }
}

/// The smallest of: budgets, approved sums and items' shares of the attempt's run and of all runs above it, and the project's cap. Each
/// pays for its run, for those that go on in its place, and for all runs below them. `line`: those runs, as [`super::kin::line`] says.
///
/// `None`: nothing caps the attempt.
///
/// # Transaction
/// Reads, and writes once per run that has its limit from its chain or its origin. Locked user rows keep the sums from moving: a
/// child pays from its parent's user.
pub(super) async fn tightest(
    conn: &mut PgConnection,
    attempt: &AttemptRef,
    project: Option<Uuid>,
    line: &[Kin],
) -> Result<Option<Cap>, LedgerError> {
    let mut caps = Vec::new();
    // Step path in the payer of the attempt, or of the run that the attempt is in or below.
    let (mut terms, mut path): (&Value, &str) = (&attempt.budget, &attempt.path);
    for (n, payer) in line.iter().enumerate() {
        if let Some(below) = n.checked_sub(1) {
            (terms, path) = (&payer.budget, line[below].path());
        }
        let run = payer.run;
        let mut cap = |kind, most: MicroCredits, spent: MicroCredits| {
            caps.push(Cap { kind, left: MicroCredits(most.0.saturating_sub(spent.0)), run });
        };
        let credits = |name: &str| terms.get(name).and_then(Value::as_i64).map(MicroCredits::from_credits);
        if let Some(most) = credits("credits") {
            cap(CapKind::Run, most, spent::by_chain(conn, run).await?);
        }
        if let (Some(most), Some(item)) = (credits(PER_ITEM), item(path)) {
            cap(CapKind::Item, most, spent::by_item(conn, run, item).await?);
        }
        if let Some(limit) = limit::binding(conn, payer).await? {
            cap(CapKind::Approved, limit.left, MicroCredits(0));
        }
    }
    if let Some(project) = project
        && let Some(left) = spent::left_of_project(conn, project).await?
    {
        caps.push(Cap { kind: CapKind::Project, left, run: attempt.run_id.0 });
    }
    let tightest = caps.into_iter().min_by_key(|cap| cap.left);
    Ok(tightest.map(|cap| Cap { left: cap.left.max(MicroCredits(0)), ..cap }))
}

/// The item that a step path belongs to, the outermost if there are several: `implement[a-1]` of `loop~2/implement[a-1]/code`.
fn item(path: &str) -> Option<&str> {
    path.split('/').find(|segment| segment.ends_with(']'))
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
