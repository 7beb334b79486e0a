//! Prices, every week: ours beside the provider's list, models of a role without a price, and changes that come within two weeks.

use super::{Books, Output, asked, report, store};
use crate::billing::{
    books::Finding,
    price::{self, Rows},
    pricelist::{self, Mapped, Tier, Trust},
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
    let list = match &b.openrouter {
        Some(account) => account.models().await.map_err(asked)?,
        None => None,
    };
    let listed = match list {
        Some(text) => {
            let list = pricelist::from_openrouter(&text, Trust { free: true });
            list.map_err(|refusal| Failure::retryable("transient.http", refusal.to_string()))?.quotes
        }
        None => {
            done.skipped =
                "OpenRouter is not configured; only our own rows and the imported price map were looked at".into();
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
        if in_force.is_empty() {
            continue;
        }
        let parts = differing(&in_force, &quote.tiers);
        if !parts.is_empty() {
            let text =
                format!("the provider's list says another price ({}); `loopwright pricing sync`", parts.join(", "));
            found.push(finding("price_differs", format!("openrouter/{model}"), &text));
        }
    }
    for mapped in pricelist::map(&mut conn).await.map_err(|e| store(&e))? {
        let Mapped { provider, model, tiers, source, read_at } = &mapped;
        // The provider's own list is newer than anybody's map of it.
        if provider == "openrouter" && theirs.contains_key(model.as_str()) {
            continue;
        }
        done.checked += 1;
        let now = pricelist::in_force(&mut conn, provider, model, now).await.map_err(|e| store(&e))?;
        let parts = if now.is_empty() { Vec::new() } else { differing(&now, tiers) };
        if parts.is_empty() {
            continue;
        }
        // What begins soon is told as that.
        let soon = Utc::now() + Duration::days(AHEAD_DAYS);
        let soon = pricelist::in_force(&mut conn, provider, model, soon).await.map_err(|e| store(&e))?;
        if !differing(&soon, tiers).is_empty() {
            let (parts, day) = (parts.join(", "), read_at.format("%F"));
            let text =
                format!("the price map `{source}` of {day} says another price ({parts}); `loopwright pricing import`");
            found.push(finding("price_differs", format!("{provider}/{model}"), &text));
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

/// Parts of a price that differ in effect: a part that has no price of its own costs what it is a part of, and a size of prompts
/// that has none costs what smaller ones do.
fn differing(ours: &[Tier], theirs: &[Tier]) -> Vec<&'static str> {
    type Part = (&'static str, fn(&Tier) -> i64);
    const PARTS: [Part; 6] = [
        ("input", |t| t.input_umtok),
        ("output", |t| t.output_umtok),
        ("cached input", |t| t.cached_input_umtok.unwrap_or(t.input_umtok)),
        ("cache write", |t| t.cache_write_umtok.unwrap_or(t.input_umtok)),
        ("reasoning", |t| t.reasoning_umtok.unwrap_or(t.output_umtok)),
        ("request", |t| t.per_request_pusd),
    ];
    let floors: BTreeSet<i64> = ours.iter().chain(theirs).map(|tier| tier.min_prompt_tokens).collect();
    let at = |tiers: &[Tier], floor: i64, part: fn(&Tier) -> i64| {
        tiers.iter().rfind(|tier| tier.min_prompt_tokens <= floor).map(part)
    };
    let differs =
        |part: fn(&Tier) -> i64| floors.iter().any(|floor| at(ours, *floor, part) != at(theirs, *floor, part));
    PARTS.into_iter().filter(|(_, part)| differs(*part)).map(|(name, _)| name).collect()
}

fn finding(kind: &'static str, subject: String, message: &str) -> Finding {
    Finding { kind, message: format!("{subject}: {message}"), subject, user: None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_of_a_price_is_compared_in_its_effect() {
        let ours = Tier { input_umtok: 100, output_umtok: 400, cached_input_umtok: Some(10), ..Tier::default() };
        let changed = |change: fn(&mut Tier)| {
            let mut theirs = ours.clone();
            change(&mut theirs);
            differing(std::slice::from_ref(&ours), &[theirs])
        };
        assert_eq!(changed(|_| {}), [""; 0]);
        assert_eq!(changed(|t| t.cached_input_umtok = Some(20)), ["cached input"]);
        assert_eq!(changed(|t| t.cached_input_umtok = None), ["cached input"]);
        assert_eq!(changed(|t| t.cache_write_umtok = Some(125)), ["cache write"]);
        assert_eq!(changed(|t| t.reasoning_umtok = Some(800)), ["reasoning"]);
        assert_eq!(changed(|t| t.per_request_pusd = 1), ["request"]);
        assert_eq!(changed(|t| t.input_umtok = 200), ["input", "cache write"]);
        // Said or not, it is the same price.
        assert_eq!(changed(|t| t.cache_write_umtok = Some(100)), [""; 0]);
        assert_eq!(changed(|t| t.reasoning_umtok = Some(400)), [""; 0]);

        let long = Tier { min_prompt_tokens: 200_000, ..ours.clone() };
        let dear = Tier { output_umtok: 600, ..long.clone() };
        assert_eq!(differing(std::slice::from_ref(&ours), &[ours.clone(), long]), [""; 0]);
        assert_eq!(differing(std::slice::from_ref(&ours), &[ours.clone(), dear]), ["output", "reasoning"]);
    }
}
