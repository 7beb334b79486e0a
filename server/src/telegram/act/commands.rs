//! What is said to a slash command.

use super::{Action, Scene, talk};
use crate::{
    store::{
        quotes::{self, MORE_MAX, More},
        telegram::{
            chats::{self, Chat},
            outbox,
        },
        users::User,
    },
    telegram::{Error, intent::Command, notify, payments, render, send},
};
use loopwright_activities::billing::MicroCredits;
use loopwright_engine::Error as Engine;
use serde_json::json;
use teloxide::utils::html::escape;
use uuid::Uuid;

/// Projects that are listed.
const PROJECTS: u32 = 10;
/// Changes of a balance that are listed. Holds are among them and not shown.
const CHANGES: u32 = 60;

pub(super) async fn command(scene: &mut Scene<'_>, chat: &Chat, user: &User, command: Command) -> Result<(), Error> {
    match command {
        Command::Start => {
            let text = match balance(scene, user).await? {
                Some(balance) => render::greeting(&balance),
                None => return Ok(()),
            };
            scene.say(&text).await
        }
        Command::New(idea) if idea.is_empty() => scene.say("Write your idea after it: /new A program that …").await,
        Command::New(idea) => talk::start(scene, user, &idea).await,
        Command::Projects => projects(scene, user).await,
        Command::Status => status(scene, chat, user).await,
        Command::Credits => match balance(scene, user).await? {
            Some(balance) => scene.say(&render::credits(&balance)).await,
            None => Ok(()),
        },
        Command::Usage => {
            let rows = scene.parts.store.transactions(user.id, None, CHANGES).await?.items;
            let shown: Vec<_> = rows.into_iter().filter(|row| row.amount_ucr != 0).take(15).collect();
            scene.say(&render::usage(&shown)).await
        }
        Command::Buy(stars) => match payments::offer(scene.tx, scene.chat_id, user.id, stars).await? {
            Some(invoice) => scene.queue("SendInvoice", invoice).await,
            None => {
                let packs: Vec<String> = payments::PACKS
                    .iter()
                    .map(|(stars, credits)| format!("/buy {stars} – {credits} credits"))
                    .collect();
                scene.say(&format!("There is no such amount. You can buy:\n{}", packs.join("\n"))).await
            }
        },
        Command::Limit(credits) => limit(scene, chat, user, &credits).await,
        Command::Download => download(scene, chat, user).await,
        Command::Cancel => cancel(scene, chat).await,
        Command::Key => scene.say(render::KEY).await,
        Command::Help => scene.say(&render::help()).await,
        Command::PaySupport => {
            let text = render::pay_support(scene.from);
            scene.say(&text).await
        }
        Command::Terms => scene.say(render::TERMS).await,
        Command::Unknown(word) => {
            scene.say(&format!("I do not know /{}. /help lists what I understand.", escape(&word))).await
        }
    }
}

/// Read inside the transaction, which may just have granted the welcome credits.
async fn balance(scene: &mut Scene<'_>, user: &User) -> Result<Option<crate::store::credits::Balance>, Error> {
    Ok(crate::store::credits::balance(&mut **scene.tx, user.id).await?)
}

async fn projects(scene: &mut Scene<'_>, user: &User) -> Result<(), Error> {
    let page = scene.parts.store.projects(user.id, None, PROJECTS).await?;
    if page.items.is_empty() {
        return scene.say("You have no projects yet. Write your idea to start one.").await;
    }
    let mut lines = vec!["<b>Your projects</b>, newest first. Choose the one that commands mean:".to_owned()];
    let mut keyboard = Vec::new();
    for project in page.items {
        let open = scene.parts.client.open_run(&crate::rest::workflow_id(project.id)).await?.is_some();
        let state = if open { "under way" } else { project.status.as_str() };
        lines.push(format!("• {} – {state}", escape(&render::cut(&project.name, 60))));
        let action = Action::Choose { project: project.id }.to_json();
        let token = chats::button(scene.tx, scene.chat_id, None, &action).await?;
        keyboard.push(vec![(project.name, token)]);
    }
    scene.say_with(&lines.join("\n"), keyboard).await
}

/// The project that commands mean: the chosen one, or the newest.
async fn current(scene: &mut Scene<'_>, chat: &Chat, user: &User) -> Result<Option<(Uuid, String)>, Error> {
    let store = &scene.parts.store;
    let chosen = match chat.project {
        Some(id) => store.project(user.id, id).await?,
        None => store.projects(user.id, None, 1).await?.items.into_iter().next(),
    };
    Ok(chosen.map(|project| (project.id, project.name)))
}

async fn status(scene: &mut Scene<'_>, chat: &Chat, user: &User) -> Result<(), Error> {
    let Some((project, name)) = current(scene, chat, user).await? else {
        return scene.say("You have no projects yet. Write your idea to start one.").await;
    };
    match chats::newest_run(scene.tx, scene.chat_id, project).await? {
        Some(run) => {
            let seen = notify::see(scene.parts, &run).await?;
            scene.say(&seen.text).await?;
            // Also what is asked, with its buttons: the first time it may have been lost.
            notify::ask(scene.tx, &run, &seen, Some(scene.update_id)).await
        }
        None => scene.say(&format!("<b>{}</b> has no run from this chat.", escape(&name))).await,
    }
}

async fn download(scene: &mut Scene<'_>, chat: &Chat, user: &User) -> Result<(), Error> {
    let Some((project, name)) = current(scene, chat, user).await? else {
        return scene.say("You have no projects yet. Write your idea to start one.").await;
    };
    let safe: String =
        name.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' }).take(40).collect();
    let name = safe.split('-').filter(|part| !part.is_empty()).collect::<Vec<_>>().join("-");
    let name = if name.is_empty() { "project".to_owned() } else { name };
    let new = outbox::Outgoing {
        chat_id: scene.chat_id,
        dedupe_key: format!("update:{}:download", scene.update_id),
        method: send::DOCUMENT,
        body: json!({"project_id": project.to_string(), "name": name}),
        urgent: false,
    };
    outbox::enqueue(scene.tx, &new).await?;
    Ok(())
}

/// Lets the project's open run spend more than was approved.
async fn limit(scene: &mut Scene<'_>, chat: &Chat, user: &User, credits: &str) -> Result<(), Error> {
    let credits = credits.parse::<MicroCredits>().ok().filter(|more| more.0 > 0 && *more <= MORE_MAX);
    let Some(credits) = credits else {
        return scene.say(&format!("Write how many credits more, up to {MORE_MAX}: /limit 20")).await;
    };
    let open = chats::open_runs(scene.tx, scene.chat_id).await?;
    let Some(run) = open.into_iter().find(|run| chat.project.is_none_or(|project| project == run.project)) else {
        return scene.say("Nothing is under way in this project.").await;
    };
    let (key, by) = (format!("telegram:{}", scene.update_id), format!("user:{}", user.id));
    let more = More { user: user.id, run: run.run, credits, key: &key, by: &by };
    let text = match quotes::allow_more(scene.tx, &scene.parts.client, &more).await? {
        Some(limit) => format!("The project may spend {} credits more now.", limit.left),
        None => "Nothing limits this project but its budget: no plan was approved yet.".to_owned(),
    };
    scene.say(&text).await
}

async fn cancel(scene: &mut Scene<'_>, chat: &Chat) -> Result<(), Error> {
    chats::set_asks(scene.tx, scene.chat_id, None).await?;
    let open = chats::open_runs(scene.tx, scene.chat_id).await?;
    // Only the chosen project: a word must not stop another one.
    let Some(run) = open.into_iter().find(|run| chat.project.is_none_or(|project| project == run.project)) else {
        return scene.say("Nothing is under way in this project.").await;
    };
    stop(scene, run.run).await?;
    scene.say("Stopping. What was done so far stays: /download").await
}

/// Asks a run to stop. A run that has ended meanwhile is as good as stopped.
/// One that goes on as another is stopped there.
pub(super) async fn stop(scene: &mut Scene<'_>, mut run: loopwright_engine::ids::RunId) -> Result<(), Error> {
    let client = &scene.parts.client;
    loop {
        match client.cancel(run, "the user stopped it in Telegram").await {
            Ok(()) => return Ok(()),
            Err(Engine::RunClosed(_)) => match client.describe(run).await {
                Ok(view) => match view.chain.continued_as {
                    Some(next) => run = next,
                    None => return Ok(()),
                },
                Err(error @ Engine::Sql(_)) => return Err(error.into()),
                // Nobody can say more of it: it has ended.
                Err(_) => return Ok(()),
            },
            Err(error) => return Err(error.into()),
        }
    }
}
