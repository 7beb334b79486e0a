//! The ring of payload keys, for operators: which key sealed how much, and sealing it all under the newest.

use super::{Client, LONG_MAX};
use crate::{
    Error, Result,
    ids::RunId,
    payload,
    store::sealed,
    transaction::{ask, in_transaction_within},
};

/// How many rows of a table a payload key has sealed.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Sealed {
    pub table: &'static str,
    /// `None`: plain.
    pub key: Option<String>,
    pub rows: u64,
}

/// How far a resealing came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resealed {
    /// To go on after; `None` when there is no further run.
    pub after: Option<RunId>,
    pub runs: u64,
    /// Rows that were written.
    pub rows: u64,
}

impl Client {
    /// Counts what each key has sealed, and what is plain. Reads every row: it takes as long as a dump, at most an hour.
    ///
    /// # Errors
    /// `database`.
    pub async fn sealed(&self) -> Result<Vec<Sealed>> {
        let counted =
            in_transaction_within(&self.pool, LONG_MAX, |conn| Box::pin(async move { sealed::count(conn).await }));
        let counts = counted.await?;
        let rows = |n: i64| u64::try_from(n).unwrap_or(0);
        Ok(counts.into_iter().map(|c| Sealed { table: c.table, key: c.key, rows: rows(c.rows) }).collect())
    }

    /// Seals what other keys have sealed, or nobody, under the ring's first key: up to 100 runs, those behind `after`, and before
    /// the first of them the schedules. Contents do not change. Afterwards the other keys can leave the ring, once every worker
    /// has the new one and a second pass finds nothing.
    ///
    /// # Errors
    /// `input_invalid` without a ring; `payload_key_missing`: put that key back, or delete what it had sealed.
    /// # Transaction
    /// One statement a row. Dies anywhere, goes on anywhere: what is done is not done again.
    pub async fn reseal(&self, after: Option<RunId>) -> Result<Resealed> {
        let key = payload::sealing_key().ok_or_else(|| {
            Error::InputInvalid(vec!["there is no payload key to seal with: set LOOPWRIGHT_PAYLOAD_KEYS".into()])
        })?;
        let passed = ask(&self.pool, LONG_MAX, async |conn| {
            let mut rows = if after.is_none() { sealed::reseal_schedules(conn, &key).await? } else { 0 };
            let runs = sealed::runs(conn, after).await?;
            for run in &runs {
                rows += sealed::reseal(conn, *run, &key).await?;
            }
            Ok((runs, rows))
        });
        let (runs, rows) = passed.await?;
        Ok(Resealed { after: runs.last().copied(), runs: runs.len() as u64, rows })
    }
}
