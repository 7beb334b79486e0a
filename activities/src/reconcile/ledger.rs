//! The invariants of money, every hour: a user whom a newly broken one names holds nothing more until an operator has looked.

use super::{Books, Output, report, store};
use crate::billing::{
    audit::{self, INVARIANTS, JOB},
    books::Finding,
};
use loopwright_engine::{Failure, transaction};

pub(super) async fn run(b: &Books) -> Result<Output, Failure> {
    let mut tx = transaction::begin(&b.pool).await.map_err(|e| store(&e))?;
    let found = audit::snapshot(&mut tx).await.map_err(|e| store(&e))?;
    tx.rollback().await.map_err(|e| store(&e))?;
    let mut tx = transaction::begin(&b.pool).await.map_err(|e| store(&e))?;
    let stopped = audit::stop_affected(&mut tx, &found).await.map_err(|e| store(&e))?;
    tx.commit().await.map_err(|e| store(&e))?;
    for user in &stopped {
        tracing::error!(%user, "an invariant of money is broken: the user holds no more credits; look, then `loopwright credits release`");
    }
    let findings: Vec<Finding> = found
        .violations
        .iter()
        .map(|violation| Finding {
            kind: violation.invariant,
            subject: violation.subject.clone(),
            message: violation.meaning.to_owned(),
            user: violation.user,
        })
        .collect();
    let findings = report(b, JOB, &findings, true).await?;
    Ok(Output { checked: INVARIANTS.len() as u64, changed: stopped.len() as u64, findings, skipped: String::new() })
}
