//! `loopwright pricing`: what models cost. Prices are added with a date, never changed.

use super::{Context, EXIT_FAILED, failure::refuse, print, table};
use crate::app::App;
use anyhow::Context as _;
use chrono::{DateTime, Utc};
use clap::builder::PossibleValuesParser;
use loopwright_activities::{
    billing::pricelist::{self, Applied, LIST_BYTES_MAX, List, Listed, Quote, Refusal, Trust},
    decimal::usd_from_pusd,
};
use serde_json::json;
use std::{collections::BTreeSet, path::PathBuf};

/// Providers that have prices.
const PROVIDERS: [&str; 3] = ["gemini", "openrouter", "openai_compatible"];

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// List the prices in force and to come, in USD per million tokens
    List {
        /// Only models whose name contains this
        #[arg(value_name = "TEXT")]
        containing: Option<String>,
        /// Those of before too
        #[arg(long)]
        history: bool,
    },
    /// Take over OpenRouter's list; models that are not used yet only with --all. Others publish none: import
    Sync {
        #[command(flatten)]
        how: How,
        /// Models without a price here too
        #[arg(long)]
        all: bool,
    },
    /// Take over a JSON price map (input_cost_per_token and so on, USD per token); `-` reads standard input
    Import {
        #[arg(value_name = "FILE")]
        file: PathBuf,
        #[command(flatten)]
        how: How,
        /// Every model of the file is this provider's, whatever the file says
        #[arg(long, value_parser = PossibleValuesParser::new(PROVIDERS))]
        provider: Option<String>,
        /// Take nothing over: only keep the map, with which the weekly comparison tells what differs from our prices
        #[arg(long)]
        compare: bool,
    },
}

#[derive(Debug, clap::Args)]
struct How {
    /// Only say what would be new
    #[arg(long)]
    dry_run: bool,
    /// When the prices begin [default: in a minute]
    #[arg(long, value_name = "INSTANT", value_parser = super::schedule::instant)]
    from: Option<DateTime<Utc>>,
    /// Believe that a model is free if the list says 0
    #[arg(long)]
    allow_free: bool,
}

pub(crate) async fn run(args: Args, context: Context) -> anyhow::Result<u8> {
    let json = context.json;
    // A file that cannot be read needs no database.
    let read = match &args.command {
        Command::Import { file, how, provider, .. } => {
            let text = text(file)?;
            Some(pricelist::from_map(&text, provider.as_deref(), Trust { free: how.allow_free })?)
        }
        _ => None,
    };
    let app = context.open().await?;
    let done = act(args.command, read, &app, json).await;
    app.close().await;
    done
}

fn text(file: &std::path::Path) -> anyhow::Result<String> {
    use std::io::Read as _;
    let what = || format!("{} cannot be read", file.display());
    let mut bytes = Vec::new();
    let limit = LIST_BYTES_MAX as u64 + 1;
    if file.as_os_str() == "-" {
        std::io::stdin().take(limit).read_to_end(&mut bytes).with_context(what)?;
    } else {
        std::fs::File::open(file).with_context(what)?.take(limit).read_to_end(&mut bytes).with_context(what)?;
    }
    String::from_utf8(bytes)
        .map_err(|_| refuse("file_failed", format!("{} is not UTF-8 text; save it as that", file.display())))
}

async fn act(command: Command, read: Option<List>, app: &App, json: bool) -> anyhow::Result<u8> {
    match (command, read) {
        (Command::List { containing, history }, _) => {
            let rows = app.store.prices(history, containing.as_deref()).await?;
            print(json, &rows, |rows| {
                let head = ["provider", "model", "from (UTC)", "above", "input", "cached", "output", "source"];
                table(&head, &rows.iter().map(row).collect::<Vec<_>>())
            })?;
            Ok(0)
        }
        (Command::Import { file, mut how, compare, .. }, Some(list)) => {
            // A file is somebody's to correct: with one bad price nothing of it is taken.
            if !list.refused.is_empty() {
                refused(&list.refused, json)?;
                return Ok(EXIT_FAILED);
            }
            let name = file.file_name().map_or_else(|| "-".into(), |name| name.to_string_lossy().into_owned());
            if !how.dry_run {
                app.store.keep_price_map(&list.quotes, &name).await?;
            }
            how.dry_run |= compare;
            take(&list.quotes, &list, &how, &format!("import {name}"), app, json).await
        }
        (Command::Sync { how, all }, _) => {
            let account = app.books(Vec::new())?.openrouter;
            let unset = || refuse("configuration_invalid", "OpenRouter is not configured; set OPENROUTER_API_KEY");
            let list = account.ok_or_else(unset)?.models().await;
            let text = list.map_err(|error| refuse("provider_failed", error.failure.message))?.ok_or_else(unset)?;
            let list = pricelist::from_openrouter(&text, Trust { free: how.allow_free })?;
            let rows = app.store.prices(false, None).await?;
            let priced = rows.iter().map(|row| row.provider.clone());
            let unlisted: BTreeSet<String> =
                priced.filter(|name| name != "openrouter" && PROVIDERS.contains(&name.as_str())).collect();
            let known: Vec<String> = rows.into_iter().map(|row| row.model).collect();
            let wanted: Vec<Quote> =
                list.quotes.iter().filter(|quote| all || known.contains(&quote.model)).cloned().collect();
            // What others list wrongly cannot be corrected here: it is left out, and told if we use it.
            let ours: Vec<Refusal> = list.refused.iter().filter(|r| all || known.contains(&r.model)).cloned().collect();
            let done = take(&wanted, &list, &how, "openrouter /models", app, json).await?;
            for refusal in &ours {
                eprintln!("{refusal}");
            }
            if !unlisted.is_empty() {
                let whose = unlisted.into_iter().collect::<Vec<_>>().join(", ");
                eprintln!("compared with nothing, because no list is published: {whose}; see `pricing import`");
            }
            Ok(if ours.is_empty() { done } else { EXIT_FAILED })
        }
        (Command::Import { .. }, None) => unreachable!("an import is read before the database is opened"),
    }
}

fn refused(refused: &[Refusal], json: bool) -> anyhow::Result<()> {
    if json {
        print(true, &json!({ "refused": refused }), |_| String::new())?;
    } else {
        for refusal in refused {
            eprintln!("{refusal}");
        }
        eprintln!("Nothing was taken over.");
    }
    Ok(())
}

async fn take(quotes: &[Quote], list: &List, how: &How, source: &str, app: &App, json: bool) -> anyhow::Result<u8> {
    let applied: Applied = app.store.take_prices(quotes, how.from, source, !how.dry_run).await??;
    let report = json!({
        "dry_run": how.dry_run, "effective_from": applied.effective_from, "new": applied.new, "changed": applied.changed,
        "unchanged": applied.unchanged, "withdrawn": applied.withdrawn, "skipped": list.skipped, "refused": list.refused,
    });
    if quotes.is_empty() && !list.refused.is_empty() && !json {
        return Err(refuse("prices_unusable", "no price of the list can be used: correct what is said of each"));
    }
    print(json, &report, |_| {
        let would = if how.dry_run { "would be " } else { "" };
        let count = |n: usize| if n == 1 { "1 model".to_owned() } else { format!("{n} models") };
        let mut lines: Vec<String> = [("new", &applied.new), ("changed", &applied.changed)]
            .into_iter()
            .flat_map(|(word, quotes)| {
                quotes.iter().map(move |q| {
                    let (input, output) = (per_million(q.tiers[0].input_umtok), per_million(q.tiers[0].output_umtok));
                    format!("{word} {}/{}: {input} in, {output} out", q.provider, q.model)
                })
            })
            .collect();
        lines.extend(applied.withdrawn.iter().map(|model| format!("withdrawn here, left so: {model}")));
        let from = applied.effective_from.map(|at| at.format(" from %F %T UTC").to_string()).unwrap_or_default();
        lines.push(format!(
            "{} {would}priced anew{from}; {} as before, {} skipped",
            count(applied.new.len() + applied.changed.len()),
            applied.unchanged,
            list.skipped
        ));
        lines.join("\n")
    })?;
    Ok(0)
}

fn row(row: &Listed) -> Vec<String> {
    let tier = &row.tier;
    let cached = tier.cached_input_umtok.map(per_million).unwrap_or_default();
    let above = if tier.min_prompt_tokens == 0 { String::new() } else { tier.min_prompt_tokens.to_string() };
    let output = if row.billable { per_million(tier.output_umtok) } else { "withdrawn".into() };
    vec![
        row.provider.clone(),
        row.model.clone(),
        row.effective_from.format("%F %R").to_string(),
        above,
        per_million(tier.input_umtok),
        cached,
        output,
        row.source.clone(),
    ]
}

/// Micro-USD per million tokens as USD.
fn per_million(umtok: i64) -> String {
    usd_from_pusd(i128::from(umtok) * 1_000_000)
}

#[cfg(test)]
mod tests {
    #[test]
    fn prices_are_shown_in_usd_per_million() {
        for (umtok, text) in [(75_000, "0.075"), (20_000_000, "20"), (1, "0.000001"), (0, "0")] {
            assert_eq!(super::per_million(umtok), text);
        }
    }
}
