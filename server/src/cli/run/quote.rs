//! `loopwright run forecast` and `run limit`: what runs were expected to cost, what they cost, what they may cost.

use super::SENDER;
use crate::{
    app::App,
    cli::{failure::refuse, print, table},
    store::quotes::{Allowed, MORE_MAX, More, Quote},
};
use loopwright_activities::billing::{MicroCredits, forecast::Quality};
use loopwright_engine::ids::RunId;
use uuid::Uuid;

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Show what a run was expected to cost beside what it cost; without a run, how good the forecasts were
    Forecast {
        run: Option<RunId>,
        /// Forecasts of so many days
        #[arg(long, default_value_t = 90, value_parser = clap::value_parser!(u16).range(1..=3650), conflicts_with = "run")]
        days: u16,
    },
    /// Let a run spend more than was approved; if it waits for that, it goes on
    Limit {
        run: RunId,
        /// Credits more, with up to six decimals
        credits: MicroCredits,
    },
}

pub(super) async fn act(command: Command, app: &App, json: bool) -> anyhow::Result<()> {
    match command {
        Command::Forecast { run: Some(run), .. } => {
            app.client.describe(run).await?;
            print(json, &app.store.quote(run).await?, show)
        }
        Command::Forecast { run: None, days } => {
            print(json, &app.store.forecast_quality(i32::from(days)).await?, |all| judged(all))
        }
        Command::Limit { run, credits } => {
            if credits.0 <= 0 || credits > MORE_MAX {
                return Err(refuse("usage_invalid", format!("more than 0 and at most {MORE_MAX} credits at once")));
            }
            let view = app.client.describe(run).await?;
            if view.status.is_closed() {
                return Err(loopwright_engine::Error::RunClosed(run.to_string()).into());
            }
            let user = view.attributes["user_id"].as_str().and_then(|id| Uuid::parse_str(id).ok());
            let nobody =
                || refuse("user_not_found", "the run has no user whose credits it spends: fork it with --user");
            let user = user.ok_or_else(nobody)?;
            let key = format!("operator:{}", Uuid::now_v7());
            let more = More { user, run, credits, key: &key, by: SENDER };
            let limit = app.store.allow_more(&app.client, &more).await?;
            let none = || refuse("limit_missing", "the run has no limit to raise; its budget is in its definition");
            let limit = limit.ok_or_else(none)?;
            print(json, &Allowed::from(limit), |limit| {
                format!("{} credits in all, {} of them left.", limit.limit_credits, limit.left_credits)
            })
        }
    }
}

fn show(quote: &Quote) -> String {
    let mut rows: Vec<Vec<String>> = quote
        .parts
        .iter()
        .map(|p| {
            let of = if p.part == p.activity { String::new() } else { p.activity.clone() };
            vec![p.part.clone(), of, p.low_credits.clone(), p.high_credits.clone(), p.spent_credits.clone()]
        })
        .collect();
    let (low, high, spent) = (&quote.low_credits, &quote.high_credits, &quote.spent_credits);
    rows.push(vec!["together".into(), String::new(), low.clone(), high.clone(), spent.clone()]);
    let limit = match &quote.limit {
        Some(limit) => format!("limit {} credits in all, {} of them left", limit.limit_credits, limit.left_credits),
        None => "no limit was approved".to_owned(),
    };
    format!("{}\n{limit}", table(&["part", "activity", "low", "high", "spent"], &rows))
}

fn judged(all: &[Quality]) -> String {
    if all.is_empty() {
        return "No part of a closed run had a forecast.".to_owned();
    }
    let row = |q: &Quality| {
        let counts = [q.parts, q.within, q.below, q.above].map(|n| n.to_string());
        [vec![q.activity.clone()], counts.to_vec(), vec![format!("{} %", q.spent_percent)]].concat()
    };
    let head = ["activity", "parts", "within", "below", "above", "spent of high"];
    table(&head, &all.iter().map(row).collect::<Vec<_>>())
}
