//! `loopwright credits`: for whoever operates this installation, over all users.

use super::{Context, EXIT_FAILED, print, table, token::DEVELOPER};
use crate::{
    app::App,
    store::{
        credits::{Transaction, decimal},
        users::User,
    },
};
use anyhow::Context as _;
use loopwright_activities::billing::{
    MicroCredits,
    ledger::{self, GrantSource},
};
use loopwright_engine::transaction;
use serde_json::json;
use uuid::Uuid;

/// Most credits of one grant: a slip of the keyboard ends here. Chosen, not measured.
const GRANT_CREDITS_MAX: i64 = 1_000_000;
/// Longest reason or key, in bytes. Chosen, not measured: it stands in a column of the ledger.
const REFERENCE_BYTES_MAX: usize = 200;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Args)]
struct Who {
    /// Whose credits [default: the developer's]
    #[arg(value_name = "USER", conflicts_with = "user")]
    id: Option<Uuid>,
    /// The same, as an option
    #[arg(long, value_name = "USER")]
    user: Option<Uuid>,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Show a balance
    Balance {
        #[command(flatten)]
        who: Who,
    },
    /// List the changes of a balance, newest first
    Ledger {
        #[command(flatten)]
        who: Who,
        /// Below this number
        #[arg(long, value_name = "SEQ")]
        before: Option<i64>,
        #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=100))]
        limit: u32,
    },
    /// Give credits; runs that wait for them go on
    Grant {
        /// Credits, with up to six decimals
        #[arg(value_parser = amount)]
        amount: MicroCredits,
        #[command(flatten)]
        who: Who,
        /// What for; stands in the ledger
        #[arg(long, value_name = "TEXT", value_parser = reference)]
        reason: Option<String>,
        /// Give once under this key, a ticket for example; stands in the ledger in place of a reason
        #[arg(long, value_name = "TEXT", value_parser = reference, conflicts_with = "reason")]
        key: Option<String>,
    },
    /// Check that every balance, hold, price and payment adds up; exit code 1 if one does not
    Audit,
}

pub(crate) async fn run(args: Args, context: Context) -> anyhow::Result<u8> {
    let json = context.json;
    let app = context.open().await?;
    let done = act(args.command, &app, json).await;
    app.close().await;
    done
}

async fn act(command: Command, app: &App, json: bool) -> anyhow::Result<u8> {
    match command {
        Command::Balance { who } => {
            let user = user(app, who).await?;
            show(app, user, json, json!({})).await?;
        }
        Command::Ledger { who, before, limit } => {
            let page = app.store.transactions(user(app, who).await?, before, limit).await?;
            print(json, &page, |page| {
                let row = |t: &Transaction| {
                    let moved = if t.amount_ucr == 0 { String::new() } else { decimal(t.amount_ucr) };
                    let at = t.created_at.format("%F %T").to_string();
                    let (held, balance) = (decimal(t.held_after_ucr), decimal(t.balance_after_ucr));
                    vec![t.seq.to_string(), at, t.kind.clone(), moved, balance, held, t.reference.clone()]
                };
                let head = ["seq", "at (UTC)", "kind", "credits", "balance", "of it held", "reference"];
                table(&head, &page.items.iter().map(row).collect::<Vec<_>>())
            })?;
        }
        Command::Grant { amount, who, reason, key } => {
            let user = user(app, who).await?;
            let reference = match (key, reason) {
                // A key belongs to one user: the same ticket may serve two of them.
                (Some(key), _) => format!("{key}:{user}"),
                (None, Some(reason)) => format!("{reason}:{}", Uuid::now_v7()),
                (None, None) => format!("operator:{}", Uuid::now_v7()),
            };
            let granted = grant(app, user, amount, &reference).await?;
            show(app, user, json, json!({"granted": granted, "reference": format!("promo:{reference}")})).await?;
            if !granted && !json {
                eprintln!("Credits were given under this key before; nothing was changed.");
            }
        }
        Command::Audit => {
            let found = app.store.audit().await?;
            print(json, &found, |found| {
                if found.is_empty() {
                    return "Money is in order.".to_owned();
                }
                let row = |v: &loopwright_activities::billing::audit::Violation| {
                    vec![v.invariant.to_owned(), v.subject.clone(), v.meaning.to_owned()]
                };
                table(&["invariant", "row", "what is broken"], &found.iter().map(row).collect::<Vec<_>>())
            })?;
            return Ok(if found.is_empty() { 0 } else { EXIT_FAILED });
        }
    }
    Ok(0)
}

/// Gives credits and wakes the user's runs that wait for some. False if that was done under this reference before.
///
/// # Transaction
/// One; locks runs, then the account. Waking first is not too early: the runs hear of it with the commit.
async fn grant(app: &App, user: Uuid, amount: MicroCredits, reference: &str) -> anyhow::Result<bool> {
    let mut tx = transaction::begin(&app.pool).await?;
    app.client.unblock_in(&mut tx, &json!({"user_id": user.to_string()})).await?;
    let granted = ledger::grant(&mut tx, user, GrantSource::Promo, reference, amount, None).await?;
    tx.commit().await?;
    app.client.wake().await;
    Ok(granted)
}

async fn user(app: &App, who: Who) -> anyhow::Result<Uuid> {
    match who.id.or(who.user) {
        Some(user) => Ok(user),
        None => {
            let issuer = &app.config.auth.issuer;
            let User { id, .. } = app.store.user_of(issuer, DEVELOPER, issuer).await?;
            Ok(id)
        }
    }
}

/// Prints the balance, with `extra` in front of it in JSON.
async fn show(app: &App, user: Uuid, json: bool, extra: serde_json::Value) -> anyhow::Result<()> {
    let balance = app.store.balance(user).await?.with_context(|| format!("there is no user {user}"))?;
    let mut value = extra;
    value["user_id"] = json!(user);
    if let (Some(value), serde_json::Value::Object(fields)) = (value.as_object_mut(), serde_json::to_value(&balance)?) {
        value.extend(fields);
    }
    print(json, &value, |_| {
        format!(
            "{} credits available ({} in all, {} of it held)",
            balance.available,
            decimal(balance.balance_ucr),
            decimal(balance.held_ucr)
        )
    })
}

/// Credits as text to micro-credits, exactly.
fn amount(text: &str) -> Result<MicroCredits, String> {
    match text.parse()? {
        MicroCredits(0) => Err("the amount must be more than 0".into()),
        amount if amount > MicroCredits::from_credits(GRANT_CREDITS_MAX) => {
            Err(format!("at most {GRANT_CREDITS_MAX} credits at once"))
        }
        amount => Ok(amount),
    }
}

fn reference(text: &str) -> Result<String, String> {
    let text = text.trim();
    if text.is_empty() || text.len() > REFERENCE_BYTES_MAX || text.chars().any(char::is_control) {
        return Err(format!("1 to {REFERENCE_BYTES_MAX} bytes of one line are needed"));
    }
    Ok(text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credits_are_read_exactly() {
        for (text, ucr) in [("50", 50_000_000), ("12.5", 12_500_000), ("0.000001", 1), ("1000000", 1_000_000_000_000)] {
            assert_eq!(amount(text), Ok(MicroCredits(ucr)), "{text}");
        }
        for text in
            ["", "0", "0.0", "-1", "+1", "1e3", "1.", ".5", "1.0000001", "1000000.1", "9999999999999999999999", "1 "]
        {
            assert!(amount(text).is_err(), "{text}");
        }
    }
}
