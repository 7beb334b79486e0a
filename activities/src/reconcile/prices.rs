//! Prices, every week: ours beside the provider's list, models of a role without a price, and changes that come within two weeks.

use super::{Books, Output, asked, report, store};
use crate::billing::{
    books::Finding,
    price::{self, Rows},
    pricelist::{self, Trust},
};
use chrono::{Duration, Utc};
use loopwright_engine::Failure;
use std::collections::{BTreeMap, BTreeSet};

const JOB: &str = "reconcile-prices";
/// Days ahead in which a change of prices is told. Source: money.md, section 5.
const AHEAD_DAYS: i64 = 14;

pub(super) async fn run(b: &Books) -> Result<Output, Failure> {
    let mut found = Vec::new();
    let mut done = Output::default();
    let listed = match &b.openrouter {
        Some(account) => {
            let text = account.models().await.map_err(asked)?;
            let list = pricelist::from_openrouter(&text, Trust { free: true });
            list.map_err(|refusal| Failure::retryable("transient.http", refusal.to_string()))?.quotes
        }
        None => {
            done.skipped = "OpenRouter is not configured; only our own rows were looked at".into();
            Vec::new()
        }
    };
    let theirs: BTreeMap<_, _> = listed.iter().map(|quote| (quote.model.as_str(), quote)).collect();
    let mut conn = b.pool.acquire().await.map_err(|e| store(&e))?;
    let rows = pricelist::list(&mut conn, false, None).await.map_err(|e| store(&e))?;
    let now = Utc::now();
    let ours: BTreeSet<&str> = rows.iter().filter(|r| r.provider == "openrouter").map(|r| r.model.as_str()).collect();
    for model in ours {
        let Some(quote) = theirs.get(model) else { continue };
        done.checked += 1;
        let in_force = pricelist::in_force(&mut conn, "openrouter", model, now).await.map_err(|e| store(&e))?;
        let basis = |tiers: &[pricelist::Tier]| {
            tiers.iter().map(|t| (t.min_prompt_tokens, t.input_umtok, t.output_umtok)).collect::<Vec<_>>()
        };
        if !in_force.is_empty() && basis(&in_force) != basis(&quote.tiers) {
            found.push(finding(
                "price_differs",
                format!("openrouter/{model}"),
                "the provider's list says another price; `loopwright pricing sync`",
            ));
        }
    }
    for (provider, model) in &b.candidates {
        done.checked += 1;
        let own = price::find_among(&mut conn, Rows::Own, provider, model, 0, None).await;
        if own.map_err(|e| store(&e))?.is_none() {
            let text = "a model of a role has no price, so it is not used; `loopwright pricing import` or `sync`";
            found.push(finding("price_missing", format!("{provider}/{model}"), text));
        }
    }
    for row in rows.iter().filter(|r| r.effective_from > now && r.effective_from < now + Duration::days(AHEAD_DAYS)) {
        let subject = format!("{}/{} from {}", row.provider, row.model, row.effective_from.format("%F"));
        if found.iter().all(|f: &Finding| f.subject != subject) {
            found.push(finding("price_changes", subject, "a new price begins within two weeks"));
        }
    }
    drop(conn);
    done.findings = report(b, JOB, &found, true).await?;
    Ok(done)
}

fn finding(kind: &'static str, subject: String, message: &str) -> Finding {
    Finding { kind, message: format!("{subject}: {message}"), subject, user: None }
}
