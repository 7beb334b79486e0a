//! `loopwright api-keys`: the keys of providers, the platform's and those of users. A key is read from a file or from
//! standard input, never from an argument: arguments are seen by everybody on the machine.

pub(crate) mod test;

use super::{Context, failure::refuse, print, table, token::DEVELOPER};
use crate::{app::App, store::users::User};
use anyhow::Context as _;
use clap::Subcommand;
use loopwright_activities::keys::{KeyView, Keys, NewKey};
use secrecy::SecretString;
use serde_json::json;
use std::{
    io::{IsTerminal, Read},
    path::PathBuf,
};
use test::Tested;
use uuid::Uuid;

/// Longest input that is read as a key, in bytes; the keys themselves have a smaller limit.
const INPUT_BYTES_MAX: u64 = 16 * 1024;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Keep a key for a user's own runs, or with --platform for everybody's; read from standard input
    Add {
        /// gemini, openrouter or openai_compatible
        provider: String,
        /// Whose; otherwise the developer's
        #[arg(long, value_name = "USER")]
        user: Option<Uuid>,
        /// The platform's: every worker with the ring uses it beside the keys of its environment
        #[arg(long, conflicts_with_all = ["user", "base_url", "model", "platform_fallback"])]
        platform: bool,
        /// Read the key from this file instead
        #[arg(long, value_name = "FILE")]
        file: Option<PathBuf>,
        #[arg(long, value_name = "TEXT", default_value = "")]
        label: String,
        /// Address of an openai_compatible server
        #[arg(long, value_name = "URL")]
        base_url: Option<String>,
        /// Asked first for every role
        #[arg(long, value_name = "NAME")]
        model: Option<String>,
        /// Let the platform's keys, at the user's credits, serve what this one cannot
        #[arg(long)]
        platform_fallback: bool,
    },
    /// List the platform's keys and those of users
    List {
        /// Only of this user
        #[arg(long, value_name = "USER")]
        user: Option<Uuid>,
    },
    /// Ask the provider whether a key works; costs nothing, changes nothing
    Test {
        /// Its id or label
        #[arg(value_name = "KEY", required_unless_present = "all")]
        key: Option<String>,
        /// Every key of the platform
        #[arg(long, conflicts_with = "key")]
        all: bool,
    },
    /// Put a key back into service
    Enable {
        #[arg(value_name = "KEY")]
        id: Uuid,
    },
    /// Take a key out of service until it is enabled
    Disable {
        #[arg(value_name = "KEY")]
        id: Uuid,
    },
    /// Destroy a key for good; its usage stays
    Revoke {
        #[arg(value_name = "KEY")]
        id: Uuid,
    },
    /// Wrap every key by the first of LOOPWRIGHT_KEY_ENCRYPTION_KEYS, so that the others can leave it
    Rewrap {
        /// Also encrypt each under a new key of its own
        #[arg(long)]
        anew: bool,
    },
}

pub(crate) async fn run(args: Args, context: Context) -> anyhow::Result<()> {
    let json = context.json;
    let app = context.open().await?;
    let keys = app.store.keys(&app.config.keys);
    let done = act(args.command, &app, &keys, json).await;
    app.close().await;
    done
}

async fn act(command: Command, app: &App, keys: &Keys, json: bool) -> anyhow::Result<()> {
    match command {
        Command::Add { provider, platform: true, file, label, .. } => {
            let address = test::settings(&app.config)?.address(&provider).map_err(anyhow::Error::msg)?;
            let key = read(file.as_deref())?;
            let new = NewKey { provider, key, label, base_url: None, model: None, platform_fallback: false };
            shown(json, &[keys.put_platform(&new, address.as_str()).await?])
        }
        Command::Add { provider, user, platform: false, file, label, base_url, model, platform_fallback } => {
            let user = match user {
                Some(user) => user,
                None => {
                    let issuer = &app.config.auth.issuer;
                    let User { id, .. } = app.store.user_of(issuer, DEVELOPER, issuer).await?;
                    id
                }
            };
            let key = read(file.as_deref())?;
            let new = NewKey { provider, key, label, base_url, model, platform_fallback };
            shown(json, &[keys.put(user, &new).await?])
        }
        Command::List { user } => {
            let list = keys.list(user).await?;
            let wrapped = keys.wrapped_by().await?;
            print(json, &json!({"items": list, "wrapped_by": wrapped}), |_| {
                let counts = wrapped.iter().map(|(kek, rows)| format!("\n{rows} wrapped by `{kek}`"));
                rows(&list) + "\n" + &counts.collect::<String>()
            })
        }
        Command::Test { key, .. } => {
            let (settings, subjects) = test::meant(app, keys, key.as_deref()).await?;
            let tested = test::ask(&settings, subjects).await;
            print(json, &tested, |tested| tested.iter().map(line).collect::<Vec<_>>().join("\n"))?;
            let bad = tested.iter().filter(|one| !one.works()).count();
            match bad {
                0 => Ok(()),
                _ => Err(refuse(
                    "keys_failed",
                    format!("{bad} of {} keys do not work: do what each line says", tested.len()),
                )),
            }
        }
        Command::Enable { id } => {
            let view = keys.set_enabled(id, true).await?;
            shown(json, &[view])
        }
        Command::Disable { id } => shown(json, &[keys.set_enabled(id, false).await?]),
        Command::Revoke { id } => {
            keys.revoke(None, id).await?;
            print(json, &json!({"revoked": id}), |_| format!("{id} is destroyed; its usage stays."))
        }
        Command::Rewrap { anew } => {
            let (mut after, mut done, mut left) = (None, 0, 0);
            loop {
                let step = keys.rewrap(after, anew).await?;
                (done, left) = (done + step.rows, left + step.left);
                match step.after {
                    Some(_) => after = step.after,
                    None => break,
                }
            }
            print(json, &json!({"rows": done, "left": left}), |_| {
                format!("{done} keys were wrapped anew; {left} could not be, see the log.")
            })
        }
    }
}

/// A key that was tested, with what to do.
fn line(tested: &Tested) -> String {
    let id = tested.id.map_or_else(|| "-".to_owned(), |id| id.to_string());
    let remedy = if tested.remedy.is_empty() { String::new() } else { format!("\n  → {}", tested.remedy) };
    format!("{id}  {}{remedy}", tested.finding())
}

fn shown(json: bool, list: &[KeyView]) -> anyhow::Result<()> {
    print(json, &list, |list| rows(list))
}

fn rows(list: &[KeyView]) -> String {
    let row = |key: &KeyView| {
        let whose = key.user_id.map_or_else(|| "platform".to_owned(), |user| user.to_string());
        let until = key.cooldown_until.map_or_else(String::new, |at| format!(" until {}", at.format("%F %T")));
        let status = format!("{}{until}", key.status);
        let reason = key.reason.clone().unwrap_or_default();
        let last4 = format!("…{}", key.last4);
        vec![key.id.to_string(), key.provider.clone(), last4, whose, status, reason, key.label.clone()]
    };
    table(
        &["key", "provider", "ends in", "whose", "status", "reason", "label"],
        &list.iter().map(row).collect::<Vec<_>>(),
    )
}

/// The key: a file's content, or standard input to its end.
fn read(file: Option<&std::path::Path>) -> anyhow::Result<SecretString> {
    let mut text = String::new();
    match file {
        Some(path) => {
            let file = std::fs::File::open(path).with_context(|| format!("{} cannot be read", path.display()))?;
            file.take(INPUT_BYTES_MAX).read_to_string(&mut text).context("the file is no text")?;
        }
        None if std::io::stdin().is_terminal() => {
            eprint!("The key, then Enter (it is shown; `< file` does not show it): ");
            std::io::BufRead::read_line(&mut std::io::stdin().lock().take(INPUT_BYTES_MAX), &mut text)?;
        }
        None => {
            std::io::stdin().take(INPUT_BYTES_MAX).read_to_string(&mut text).context("standard input is no text")?;
        }
    }
    Ok(SecretString::from(text.trim().to_owned()))
}
