//! `loopwright credits`: for whoever operates this installation, over all users.

use super::{Context, EXIT_FAILED, print, schedule::no_user, table, token::DEVELOPER};
use crate::{
    app::App,
    store::{
        credits::{Transaction, decimal},
        users::User,
    },
};
use chrono::{DateTime, Utc};
use clap::builder::{PossibleValuesParser, TypedValueParser};
use loopwright_activities::billing::{
    MicroCredits, audit,
    ledger::{self, GrantSource},
    report::{By, Span, Spent},
};
use loopwright_engine::transaction;
use serde_json::json;
use uuid::Uuid;

/// Most credits of one grant: a slip of the keyboard ends here. Chosen, not measured.
const GRANT_CREDITS_MAX: i64 = 1_000_000;
/// What a report over all users covers if it does not say since when. Chosen: a month.
const REPORT_SPAN: chrono::Duration = chrono::Duration::days(31);
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
        /// What is left of them then goes: 2026-12-31 or 2026-12-31T10:00:00Z [default: never]
        #[arg(long, value_name = "INSTANT", value_parser = super::schedule::instant)]
        expires: Option<DateTime<Utc>>,
    },
    /// Correct a balance, once per ticket; `--take` takes what is not held
    Adjust {
        /// Credits, with up to six decimals
        #[arg(value_parser = amount)]
        amount: MicroCredits,
        #[command(flatten)]
        who: Who,
        /// What the correction is known by; the same ticket changes nothing a second time
        #[arg(long, value_name = "TEXT", value_parser = reference)]
        ticket: String,
        /// Take instead of give
        #[arg(long)]
        take: bool,
    },
    /// Give a purchase back that nothing was used of: the credits go now, and the bot returns the Stars
    Refund {
        /// Telegram's id of the charge
        charge: String,
        /// Why; the payer is told
        #[arg(long, value_name = "TEXT", value_parser = reference)]
        reason: Option<String>,
    },
    /// Let a user hold credits again whom an audit has stopped; runs that wait go on
    Release { user: Uuid },
    /// What was spent, added up
    Report {
        #[arg(long, value_parser = by(), default_value = "activity")]
        by: By,
        /// Attempts that ended from then on: 2026-11-25 or 2026-11-25T10:00:00Z [default: 31 days ago without --user]
        #[arg(long, value_name = "INSTANT", value_parser = super::schedule::instant)]
        from: Option<DateTime<Utc>>,
        /// And before then
        #[arg(long, value_name = "INSTANT", value_parser = super::schedule::instant)]
        to: Option<DateTime<Utc>>,
        /// Of one user only
        #[arg(long, value_name = "USER")]
        user: Option<Uuid>,
    },
    /// What the reconciliation has found and nothing has resolved
    Findings,
    /// Resolve a finding that somebody has looked into; a job that sees the same again opens it again
    Resolve {
        /// Its number in `credits findings`
        id: i64,
        /// What came of it
        #[arg(long, value_name = "TEXT", value_parser = reference)]
        why: String,
    },
    /// Check that every balance, hold, price and payment adds up; exit code 1 if one does not
    Audit {
        /// Stop new holds of the users that are affected, as the hourly audit does
        #[arg(long)]
        stop: bool,
    },
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
        Command::Grant { amount, who, reason, key, expires } => {
            if let Some(at) = expires {
                anyhow::ensure!(
                    at > Utc::now(),
                    "the credits would expire at {at}, which is over; give a later instant"
                );
            }
            let user = user(app, who).await?;
            let reference = match (key, reason) {
                // A key belongs to one user: the same ticket may serve two of them.
                (Some(key), _) => format!("{key}:{user}"),
                (None, Some(reason)) => format!("{reason}:{}", Uuid::now_v7()),
                (None, None) => format!("operator:{}", Uuid::now_v7()),
            };
            let granted = grant(app, user, amount, &reference, expires).await?;
            let told = json!({"granted": granted, "reference": format!("promo:{reference}"), "expires_at": expires});
            show(app, user, json, told).await?;
            if !granted && !json {
                eprintln!("Credits were given under this key before; nothing was changed.");
            }
        }
        Command::Adjust { amount, who, ticket, take } => {
            let user = user(app, who).await?;
            let amount = if take { MicroCredits(-amount.0) } else { amount };
            let mut tx = transaction::begin(&app.pool).await?;
            app.client.unblock_in(&mut tx, &json!({"user_id": user.to_string()})).await?;
            let adjusted = ledger::adjust(&mut tx, user, &ticket, amount).await?;
            tx.commit().await?;
            app.client.wake().await;
            show(app, user, json, json!({"adjusted": adjusted, "reference": format!("adjust:{ticket}")})).await?;
            if !adjusted && !json {
                eprintln!("This ticket was honored before; nothing was changed.");
            }
        }
        Command::Refund { charge, reason } => {
            let refunded = app.store.refund(&charge, reason.as_deref()).await?;
            print(json, &json!({"charge_id": charge, "refunded": refunded}), |_| {
                if refunded {
                    "The credits are taken back; the bot returns the Stars within a minute.".to_owned()
                } else {
                    "This purchase was given back before; nothing was changed.".to_owned()
                }
            })?;
        }
        Command::Release { user } => {
            let mut tx = transaction::begin(&app.pool).await?;
            app.client.unblock_in(&mut tx, &json!({"user_id": user.to_string()})).await?;
            let released = ledger::resume_holds(&mut tx, user).await?;
            tx.commit().await?;
            app.client.wake().await;
            show(app, user, json, json!({ "released": released })).await?;
        }
        Command::Report { by, from, to, user } => {
            // Of all users only what was asked for: the ledger grows for ever.
            let from = from.or_else(|| user.is_none().then(|| to.unwrap_or_else(Utc::now) - REPORT_SPAN));
            let spent = app.store.spent_by(by, Span { from, to, user }).await?;
            print(json, &spent, |spent| {
                let row = |s: &Spent| {
                    let tokens = format!("{}/{}", s.tokens_prompt, s.tokens_output);
                    let (credits, back) = (s.credits.clone(), s.given_back.clone());
                    vec![
                        s.key.clone(),
                        s.attempts.to_string(),
                        s.calls.to_string(),
                        tokens,
                        s.cost_usd.clone(),
                        credits,
                        back,
                    ]
                };
                let head = [by.as_str(), "attempts", "calls", "tokens in/out", "cost USD", "credits", "given back"];
                table(&head, &spent.iter().map(row).collect::<Vec<_>>())
            })?;
        }
        Command::Findings => {
            let found = app.store.findings(crate::store::PAGE_MAX).await?;
            print(json, &found, |found| {
                if found.is_empty() {
                    return "Nothing is open.".to_owned();
                }
                let row = |f: &loopwright_activities::billing::books::Kept| {
                    let since = f.first_seen_at.format("%F %R").to_string();
                    vec![f.id.to_string(), since, f.seen.to_string(), f.job.clone(), f.kind.clone(), f.message.clone()]
                };
                table(&["id", "since (UTC)", "seen", "job", "kind", "what"], &found.iter().map(row).collect::<Vec<_>>())
            })?;
        }
        Command::Resolve { id, why } => {
            let resolved = app.store.resolve_finding(id, &why).await?;
            anyhow::ensure!(resolved, "no finding {id} is open; `loopwright credits findings` lists those that are");
            print(json, &json!({"id": id, "resolved": resolved}), |_| format!("Finding {id} is resolved."))?;
        }
        Command::Audit { stop } => {
            let found = app.store.audit().await?;
            if stop && !found.violations.is_empty() {
                let mut tx = transaction::begin(&app.pool).await?;
                let stopped = audit::stop_affected(&mut tx, &found).await?;
                tx.commit().await?;
                for user in stopped {
                    eprintln!("User {user} holds no more credits; look, then `loopwright credits release {user}`.");
                }
            }
            let found = found.violations;
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
async fn grant(
    app: &App,
    user: Uuid,
    amount: MicroCredits,
    reference: &str,
    expires: Option<DateTime<Utc>>,
) -> anyhow::Result<bool> {
    let mut tx = transaction::begin(&app.pool).await?;
    app.client.unblock_in(&mut tx, &json!({"user_id": user.to_string()})).await?;
    let granted = ledger::grant(&mut tx, user, GrantSource::Promo, reference, amount, expires).await?;
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
    let balance = app.store.balance(user).await?.ok_or_else(|| no_user(user))?;
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

fn by() -> impl TypedValueParser<Value = By> {
    PossibleValuesParser::new(By::ALL.map(By::as_str)).map(|text| By::parse(&text).unwrap_or(By::Activity))
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
