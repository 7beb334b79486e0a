//! `loopwright project`: for whoever operates this installation, over all users.

use super::{Context, failure::refuse, print, schedule::no_user, table, token::DEVELOPER};
use crate::{app::App, rest::IDEA_MAX, store::projects::Project};
use anyhow::Context as _;
use loopwright_activities::billing::MicroCredits;
use serde_json::json;
use std::io::Read;
use uuid::Uuid;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Create a project
    New {
        /// What is to be built; `-` reads it from standard input
        idea: String,
        /// Its name [default: the beginning of the idea]
        #[arg(long)]
        name: Option<String>,
        /// Its owner [default: the developer]
        #[arg(long, value_name = "UUID")]
        user: Option<Uuid>,
    },
    /// List projects, newest first
    List {
        /// Of this user only
        #[arg(long, value_name = "UUID")]
        user: Option<Uuid>,
        #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=100))]
        limit: u32,
    },
    /// Show one project
    Show { id: Uuid },
    /// Bound what all runs of a project may spend together; what waits for more of it goes on
    Cap {
        id: Uuid,
        /// Credits from its beginning on, with up to six decimals; `none` lifts the cap
        #[arg(value_parser = cap)]
        credits: Cap,
    },
}

/// A project's cap; `None` for none.
#[derive(Clone, Copy, Debug)]
struct Cap(Option<MicroCredits>);

fn cap(text: &str) -> Result<Cap, String> {
    if text == "none" {
        return Ok(Cap(None));
    }
    match text.parse()? {
        MicroCredits(0) => Err("the cap must be more than 0".into()),
        credits => Ok(Cap(Some(credits))),
    }
}

pub(crate) async fn run(args: Args, context: Context) -> anyhow::Result<()> {
    let json = context.json;
    let app = context.open().await?;
    let done = act(args.command, &app, json).await;
    app.close().await;
    done
}

async fn act(command: Command, app: &App, json: bool) -> anyhow::Result<()> {
    match command {
        Command::New { idea, name, user } => {
            let idea = if idea == "-" {
                let mut text = String::new();
                std::io::stdin().read_to_string(&mut text).context("the idea could not be read from standard input")?;
                text
            } else {
                idea
            };
            let idea = idea.trim();
            if idea.is_empty() || idea.chars().count() > IDEA_MAX {
                return Err(refuse(
                    "input_invalid",
                    format!("an idea has 1 to {IDEA_MAX} characters: say it in so many"),
                ));
            }
            let name: String =
                name.unwrap_or_else(|| idea.lines().next().unwrap_or_default().chars().take(60).collect());
            let user = match user {
                Some(user) => match app.store.balance(user).await? {
                    Some(_) => user,
                    None => return Err(no_user(user)),
                },
                None => {
                    let issuer = &app.config.auth.issuer;
                    app.store.user_of(issuer, DEVELOPER, issuer).await?.id
                }
            };
            let project = app.store.create_project(user, &name, idea, crate::rest::WORKFLOW).await?;
            print(json, &project, |p| p.id.to_string())
        }
        Command::List { user, limit } => {
            let page = app.store.projects(user, None, limit).await?;
            print(json, &page, |page| {
                let row = |p: &Project| {
                    vec![p.id.to_string(), p.status.clone(), p.created_at.format("%F %R").to_string(), p.name.clone()]
                };
                table(&["id", "status", "created", "name"], &page.items.iter().map(row).collect::<Vec<_>>())
            })
        }
        Command::Cap { id, credits: Cap(cap) } => {
            let set = app.store.cap_project(&app.client, id, cap).await?;
            anyhow::ensure!(set, "there is no project {id}");
            let credits = cap.map(|cap| cap.to_string());
            print(json, &json!({"project_id": id, "cap_credits": credits}), |_| match &credits {
                Some(credits) => format!("All runs of the project together may spend {credits} credits."),
                None => "The project has no cap.".to_owned(),
            })
        }
        Command::Show { id } => {
            let project = app.store.project(None, id).await?.ok_or_else(|| {
                refuse("project_not_found", format!("there is no project {id}; `project list` shows which there are"))
            })?;
            let run = app.client.open_run(&crate::rest::workflow_id(id)).await?;
            let mut value = serde_json::to_value(&project)?;
            value["open_run"] = json!(run);
            print(json, &value, |_| {
                let run = run.map_or_else(|| "none".to_owned(), |r| r.to_string());
                format!(
                    "project   {}\nname      {}\nstatus    {}\nworkflow  {}\ncreated   {}\nopen run  {run}\n\n{}",
                    project.id,
                    project.name,
                    project.status,
                    project.workflow_name,
                    project.created_at.format("%F %T UTC"),
                    project.idea
                )
            })
        }
    }
}
