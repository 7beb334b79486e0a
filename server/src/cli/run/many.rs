//! What many runs are asked at once (`--where`): in pages, each run with its verdict, and a cursor to go on from.

use crate::{
    app::App,
    cli::{EXIT_FAILED, print, table},
};
use anyhow::Context as _;
use loopwright_engine::{Error, client::Filter, filter::Query, ids::RunId, machine::Finding, view::RunSummary};
use serde::Serialize;
use std::collections::BTreeMap;

/// Most runs of one `--where`. Chosen: more than a person looks through; the cursor leads to the rest.
pub(super) const RUNS_MAX: i64 = 10_000;
/// Runs listed at once.
const PAGE: usize = 200;

/// Which runs.
pub(super) struct Which {
    /// Open ones that satisfy it.
    pub(super) matching: Query,
    /// Begin after this one, in the order of `run list`.
    pub(super) after: Option<RunId>,
    pub(super) limit: u16,
    pub(super) dry_run: bool,
}

/// What became of one of many.
#[derive(Serialize)]
pub(super) struct Verdict {
    pub(super) run_id: RunId,
    /// A word of the command's, or `refused`.
    pub(super) outcome: String,
    /// Why it was not, or would not be, done: a code of the engine's errors.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) code: Option<&'static str>,
    /// What stands in its way.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) why: Vec<Finding>,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) remedy: Option<String>,
}

impl Verdict {
    pub(super) fn of(run_id: RunId, outcome: &str) -> Self {
        Self { run_id, outcome: outcome.to_owned(), code: None, why: Vec::new(), remedy: None }
    }

    pub(super) fn refused(run_id: RunId, error: &Error) -> Self {
        Self { code: Some(error.code()), remedy: Some(error.to_string()), ..Self::of(run_id, "refused") }
    }
}

/// A page of runs, each with its verdict. Where it stops, also by an error or by death, the same command goes on from the cursor;
/// twice is once: where it was done, the run is `unchanged` then.
#[derive(Serialize)]
struct Page {
    dry_run: bool,
    /// How many runs came to each outcome or code.
    outcomes: BTreeMap<String, usize>,
    runs: Vec<Verdict>,
    /// Give it as `--after` for the next page; absent on the last.
    #[serde(skip_serializing_if = "Option::is_none")]
    next_after: Option<RunId>,
}

/// Judges a page of runs, one after the other, and prints what became of them. The exit code is 1 if one was refused.
///
/// # Errors
/// The first that is not one run's; what was done until then is printed before.
pub(super) async fn each(
    which: Which,
    app: &App,
    json: bool,
    judge: impl AsyncFnMut(&RunSummary) -> anyhow::Result<Verdict>,
) -> anyhow::Result<u8> {
    let Which { matching, after, limit, dry_run } = which;
    let matching = app.store.with_projects(None, matching).await?;
    let mut page = Page { dry_run, outcomes: BTreeMap::new(), runs: Vec::new(), next_after: after };
    let stopped = look(&matching, usize::from(limit), app, &mut page, judge).await;
    for verdict in &page.runs {
        *page.outcomes.entry(verdict.code.unwrap_or(&verdict.outcome).to_owned()).or_default() += 1;
    }
    if stopped.is_ok() || !page.runs.is_empty() {
        print(json, &page, told)?;
    }
    stopped?;
    Ok(if page.runs.iter().all(|verdict| verdict.code.is_none()) { 0 } else { EXIT_FAILED })
}

/// Fills the page. What is in it when an error ends it has been done.
async fn look(
    matching: &Query,
    limit: usize,
    app: &App,
    page: &mut Page,
    mut judge: impl AsyncFnMut(&RunSummary) -> anyhow::Result<Verdict>,
) -> anyhow::Result<()> {
    loop {
        // One more than is wanted says whether there is another page.
        let wanted = (limit - page.runs.len() + 1).min(PAGE);
        let filter = Filter {
            matching: Some(matching.clone()),
            open_only: true,
            after: page.next_after,
            limit: u32::try_from(wanted).unwrap_or(1),
            ..Filter::default()
        };
        let found = app.client.list(filter).await?;
        let last = found.len() < wanted;
        for summary in found {
            if page.runs.len() == limit {
                return Ok(());
            }
            let run = summary.run_id;
            let verdict = judge(&summary).await.with_context(|| match page.next_after {
                Some(before) => format!("run {run}; go on with --after {before}"),
                None => format!("run {run}"),
            })?;
            page.runs.push(verdict);
            page.next_after = Some(run);
        }
        if last {
            page.next_after = None;
            return Ok(());
        }
    }
}

fn told(page: &Page) -> String {
    if page.runs.is_empty() {
        return "No open run matches.".to_owned();
    }
    let row = |verdict: &Verdict| {
        let why = verdict
            .why
            .iter()
            .map(|f| if f.path.is_empty() { f.text.clone() } else { format!("`{}`: {}", f.path, f.text) });
        let todo: Vec<String> = why.chain(verdict.remedy.clone()).collect();
        let code = verdict.code.unwrap_or_default().to_owned();
        vec![verdict.run_id.to_string(), verdict.outcome.clone(), code, todo.join("; ")]
    };
    let mut out = table(&["run", "verdict", "code", "what to do"], &page.runs.iter().map(row).collect::<Vec<_>>());
    let counts: Vec<String> = page.outcomes.iter().map(|(word, n)| format!("{n} {word}")).collect();
    out.push_str(&format!("\n\n{} runs: {}", page.runs.len(), counts.join(", ")));
    if let Some(next) = page.next_after {
        out.push_str(&format!("\nThere are more; go on with --after {next}"));
    }
    out
}
