//! Jobs that hold the books against the outside and against themselves, each a schedule of our own engine.
//!
//! ```text
//! schedule ─▶ run ─▶ reconcile-…@1 ─▶ Books { pool, client, openrouter, stars } ─▶ findings: rows, a line, a metric
//! ```
//!
//! No job is metered: they run as nobody's, at no charge. Each may die anywhere and be done again; none is needed for the books to
//! be right, they only see what is not. Start reading at [`Books`].

mod calls;
mod grants;
mod ledger;
mod payments;
mod prices;
mod providers;

pub use payments::{StarTransaction, Stars};

use crate::{
    billing::{
        books::{self, Finding},
        ledger::LedgerError,
    },
    contract,
    provider::{ProviderError, account::OpenRouterAccount},
};
use futures_util::future::BoxFuture;
use loopwright_engine::{
    Failure,
    activity::{Activity, Context, Registry},
    client::Client,
    signature::Signature,
    transaction,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sqlx::PgPool;
use std::sync::Arc;

/// What the jobs work with. A job whose counterpart is not configured says so and does nothing.
#[derive(Clone)]
pub struct Books {
    pub pool: PgPool,
    pub client: Client,
    pub openrouter: Option<Arc<OpenRouterAccount>>,
    pub stars: Option<Arc<dyn Stars>>,
    /// (provider, model) of every role: each needs a price of its own. Those of a server of one's own are left out.
    pub candidates: Vec<(String, String)>,
}

/// No job has an input.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
pub struct Input {}

/// What a job did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Output {
    /// What was compared.
    pub checked: u64,
    /// What was filled in, granted, expired.
    pub changed: u64,
    /// Differences that stand, those seen before included.
    pub findings: u64,
    /// Why nothing was done; empty if something was.
    pub skipped: String,
}

impl Output {
    fn skipped(why: &str) -> Self {
        Self { skipped: why.to_owned(), ..Self::default() }
    }
}

type Work = for<'a> fn(&'a Books) -> BoxFuture<'a, Result<Output, Failure>>;

/// Name, what it does, how.
const JOBS: [(&str, &str, Work); 6] = [
    ("reconcile-calls@1", "Asks what became of calls whose answer was lost", |b| Box::pin(calls::run(b))),
    ("reconcile-grants@1", "Expires grants and gives back what the refund policy says", |b| Box::pin(grants::run(b))),
    ("reconcile-ledger@1", "Checks every invariant of money", |b| Box::pin(ledger::run(b))),
    ("reconcile-payments@1", "Compares payments with Telegram's list", |b| Box::pin(payments::run(b))),
    ("reconcile-prices@1", "Compares prices with the provider's list", |b| Box::pin(prices::run(b))),
    ("reconcile-providers@1", "Compares our sums with the provider's", |b| Box::pin(providers::run(b))),
];

struct Job {
    books: Arc<Books>,
    name: &'static str,
    summary: &'static str,
    work: Work,
}

fn signature(name: &str, summary: &str) -> Signature {
    Signature {
        metered: false,
        ..contract::signature::<Input, Output>(
            name,
            summary,
            &["transient.store", "transient.network", "transient.http"],
        )
    }
}

/// Contracts of all jobs.
pub(crate) fn signatures() -> impl Iterator<Item = Signature> {
    JOBS.iter().map(|(name, summary, _)| signature(name, summary))
}

/// The jobs beside the activities of the loop.
#[must_use]
pub fn register(registry: Registry, books: &Arc<Books>) -> Registry {
    JOBS.iter().fold(registry, |registry, (name, summary, work)| {
        registry.with(Job { books: books.clone(), name, summary, work: *work })
    })
}

/// Does one job now, by its name without the version.
///
/// # Errors
/// `transient.store`, and those of whom it asks. `None`: there is no such job.
pub async fn now(books: &Books, name: &str) -> Option<Result<Output, Failure>> {
    let (_, _, work) = JOBS.iter().find(|(known, ..)| known.strip_suffix("@1") == Some(name))?;
    Some(work(books).await)
}

impl Activity for Job {
    fn signature(&self) -> Signature {
        signature(self.name, self.summary)
    }

    fn run(&self, ctx: Context, input: Value) -> BoxFuture<'static, Result<Value, Failure>> {
        let (books, work) = (self.books.clone(), self.work);
        contract::run(ctx, input, move |_ctx: Context, _input: Input| async move { work(&books).await })
    }
}

/// Keeps what a job has found and tells the operator of what is new: one line each, and a metric.
async fn report(books: &Books, job: &'static str, found: &[Finding], complete: bool) -> Result<u64, Failure> {
    let mut tx = transaction::begin(&books.pool).await.map_err(|e| store(&e))?;
    let new = books::keep_findings(&mut tx, job, found, complete).await.map_err(|e| store(&e))?;
    tx.commit().await.map_err(|e| store(&e))?;
    tell(job, &new);
    Ok(u64::try_from(found.len()).unwrap_or(u64::MAX))
}

/// Tells the operator of findings that were kept and are new.
fn tell(job: &'static str, new: &[Finding]) {
    for finding in new {
        tracing::error!(job, kind = finding.kind, subject = finding.subject, "{}", finding.message);
        metrics::counter!("loopwright_reconcile_findings_total", "job" => job).increment(1);
    }
}

fn store(error: &sqlx::Error) -> Failure {
    Failure::retryable("transient.store", format!("the database did not answer: {error}"))
}

fn ledger_failure(error: &LedgerError) -> Failure {
    Failure::retryable("transient.store", format!("the ledger refused: {error}"))
}

fn asked(error: ProviderError) -> Failure {
    error.failure
}
