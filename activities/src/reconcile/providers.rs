//! Sums, every day: what the provider says that our key has used since yesterday beside what our books say; and, by model, what it
//! charged beside what our price says.

use super::{Books, Output, asked, store, tell};
use crate::{
    billing::books::{self, Finding, Totals},
    decimal::usd_from_pusd,
};
use loopwright_engine::{Failure, transaction};

const JOB: &str = "reconcile-providers";
/// A difference that is told: more than both. Source: money.md, section 5.
const DIFFERENCE_PUSD: i128 = 100_000_000_000;
const DIFFERENCE_BPS: i128 = 50;
/// A price that is told as stale. Source: money.md, section 5.
const DRIFT_BPS: i64 = 200;

pub(super) async fn run(b: &Books) -> Result<Output, Failure> {
    let mut found = Vec::new();
    let mut done = Output::default();
    // No connection is held while the provider is asked.
    let said = match &b.openrouter {
        Some(account) => Some((account.fingerprint(), account.totals().await.map_err(asked)?)),
        None => None,
    };
    // The sums are kept with what they showed, or not at all: who dies between compares the same sums again.
    let mut tx = transaction::begin(&b.pool).await.map_err(|e| store(&e))?;
    if let Some((fingerprint, (usage, whole))) = said {
        let own = books::owed(&mut tx, "openrouter", fingerprint).await.map_err(|e| store(&e))?;
        let now = Totals { usage: usage.into(), account: whole.into(), own };
        let before = books::keep_totals(&mut tx, "openrouter", fingerprint, now).await;
        let before = before.map_err(|e| store(&e))?;
        done.checked += 1;
        found.extend(before.and_then(|before| difference(before, now)));
    } else {
        done.skipped = "OpenRouter is not configured; only prices were compared".into();
    }
    for drift in books::drifted(&mut tx, DRIFT_BPS).await.map_err(|e| store(&e))? {
        let (theirs, ours) = (usd_from_pusd(drift.provider_cost.0.into()), usd_from_pusd(drift.own_cost.0.into()));
        found.push(Finding {
            kind: "price_stale",
            subject: format!("{}/{}", drift.provider, drift.model),
            message: format!(
                "the provider charged {theirs} USD in a day, our price says {ours}; `loopwright pricing sync`"
            ),
            user: None,
        });
    }
    let new = books::keep_findings(&mut tx, JOB, &found, true).await.map_err(|e| store(&e))?;
    tx.commit().await.map_err(|e| store(&e))?;
    tell(JOB, &new);
    done.findings = u64::try_from(found.len()).unwrap_or(u64::MAX);
    Ok(done)
}

/// What is to be said about the time between two looks. The account's sum includes other keys and fees: it is only told when it
/// rose by less than its key did, which cannot be.
fn difference(before: Totals, now: Totals) -> Option<Finding> {
    let (theirs, ours, whole) = (now.usage - before.usage, now.own - before.own, now.account - before.account);
    let apart = (theirs - ours).abs();
    let largest = theirs.abs().max(ours.abs());
    let differs = apart > DIFFERENCE_PUSD || (apart * 10_000 > DIFFERENCE_BPS * largest && largest > 0);
    let usd = usd_from_pusd;
    let message = if differs {
        format!("the key used {} USD since the last look, our books say {}", usd(theirs), usd(ours))
    } else if theirs - whole > DIFFERENCE_PUSD {
        format!("the key used {} USD since the last look, its whole account only {}", usd(theirs), usd(whole))
    } else {
        return None;
    };
    Some(Finding { kind: "total_differs", subject: "openrouter".into(), message, user: None })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_a_percent_or_ten_cents_apart_is_told() {
        let usd = |n: i128| n * 1_000_000_000_000 / 1_000;
        let at = |usage, own| Totals { usage: usd(usage), account: usd(usage), own: usd(own) };
        let told = |usage: i128, own: i128| difference(at(1_000, 900), at(1_000 + usage, 900 + own)).is_some();
        assert!(!told(1_000, 1_000) && !told(1_000, 996) && !told(0, 0));
        assert!(told(1_000, 994) && told(100_000, 99_880) && told(0, 200) && told(10, 0));
        let short = Totals { account: usd(1_000), ..at(2_000, 1_900) };
        assert!(difference(at(1_000, 900), short).is_some(), "an account that rises less than its key");
    }
}
