//! Tells chats what their runs do: one message that is edited as the run goes, questions, approvals, the end.
//!
//! The engine's outbox only says that a run has moved; what is told is how the run stands now. So a hundred moves are
//! one look, and a look that is repeated says nothing twice.

use super::{
    Error, Parts,
    act::{Action, DECIDE, Verdict},
    render,
    run::{Session, pause},
};
use crate::{
    read::progress::{self, Standing},
    store::{
        credits::decimal,
        telegram::{
            Tx,
            chats::{self, Followed},
            commit,
            outbox::{self, Outgoing},
        },
    },
};
use loopwright_engine::{
    Error as Engine,
    ids::RunId,
    view::{RunView, Waiting},
};
use teloxide::utils::html::escape;

/// Moves that are taken at once.
const MOVES: u32 = 500;
/// Runs that are looked at for their progress at once.
const RUNS: i64 = 20;
/// Newest transitions that are read for the last thing done.
const ROWS: u64 = 60;
/// How often it is offered in a chat that a project goes on at one step, as long as buttons are kept. What such a step costs is given back
/// where its provider was at fault, and bought again at the platform's cost.
const AGAIN_MAX: i64 = 3;
/// Suggested answers that become buttons.
const SUGGESTIONS: usize = 8;

/// How a run stands, and what its message says.
pub(super) struct Seen {
    pub view: RunView,
    pub name: String,
    pub text: String,
    standing: Standing,
    spent_ucr: i64,
}

/// Tells until the stop.
///
/// # Errors
/// The database.
pub(super) async fn run(session: &Session) -> Result<(), Error> {
    let parts = &session.parts;
    let mut stop = session.stop.clone();
    while !session.stopped() {
        let mut tx = parts.store.begin().await?;
        let moved = parts.client.moved_in(&mut tx, chats::TOPIC, MOVES).await?;
        let mut runs = chats::followed_among(&mut tx, moved).await?;
        let unseen = chats::unseen(&mut tx, parts.pace.refresh.as_secs_f64(), RUNS).await?;
        runs.extend(unseen.into_iter().filter(|run| !runs.iter().any(|r| r.run == run.run)).collect::<Vec<_>>());
        for run in &runs {
            tell(parts, &mut tx, run).await?;
        }
        commit(tx).await?;
        if !runs.is_empty() {
            session.queued.notify_one();
        }
        // Also after work: what moves within the pause is one look.
        if pause(parts.pace.look, &mut stop).await {
            break;
        }
    }
    Ok(())
}

/// Looks at a run and writes what its chat should hear.
async fn tell(parts: &Parts, tx: &mut Tx, run: &Followed) -> Result<(), Error> {
    if run.closed {
        return Ok(());
    }
    let seen = match see(parts, run).await {
        Ok(seen) => seen,
        // What is wrong with one run keeps nobody else from being told.
        Err(Error::Engine(error)) if !matches!(error, Engine::Sql(_)) => {
            tracing::error!(run = %run.run, %error, "a run cannot be told about");
            let gone = matches!(error, Engine::RunNotFound(_) | Engine::RunArchived { .. });
            return Ok(chats::looked(tx, run.run, gone).await?);
        }
        Err(error) => return Err(error),
    };
    outbox::replace(tx, &progress_message(run, &seen.text)).await?;
    if let Some(next) = seen.view.chain.continued_as {
        // The chat follows the run that goes on; nothing has ended for it.
        let next = Followed { run: next, ..*run };
        chats::follow(tx, &next).await?;
        // The next look tells of it: a chain may be long.
        return Ok(chats::looked(tx, run.run, true).await?);
    }
    ask(tx, run, &seen, None).await?;
    for waiting in &seen.view.waiting {
        let Waiting::Blocked { message, .. } = waiting else { continue };
        let (what, text) = match seen.standing {
            Standing::Credits => ("credits", render::no_credits(&seen.name, message)),
            Standing::Limit => ("limit", render::limit_used(&seen.name, message)),
            _ => continue,
        };
        once(tx, run, format!("{what}:{}:{}", run.run, seen.view.seq), &text, Vec::new()).await?;
    }
    let closed = seen.view.status.is_closed();
    if closed {
        let mut keyboard = Vec::new();
        if let Some(path) = render::failed_at(&seen.view)
            && chats::offers_to_go_on(tx, run.project, path).await? < AGAIN_MAX
        {
            let action = Action::GoOn { as_run: RunId::new() }.to_json();
            let token = chats::button(tx, run.chat_id, Some((run.run, path)), &action).await?;
            keyboard.push(vec![("▶️ Try that again".to_owned(), token)]);
        }
        let text = render::end(&seen.name, &seen.view, seen.spent_ucr, !keyboard.is_empty());
        once(tx, run, format!("end:{}", run.run), &text, keyboard).await?;
    }
    Ok(chats::looked(tx, run.run, closed).await?)
}

/// Reads how a run stands.
pub(super) async fn see(parts: &Parts, run: &Followed) -> Result<Seen, Error> {
    let view = parts.client.describe(run.run).await?;
    let rows = parts.client.history(run.run, view.seq.saturating_sub(ROWS), 1_000).await?;
    let name = parts.store.project(None, run.project).await?.map(|project| project.name).unwrap_or_default();
    let spent_ucr = parts.store.spent(run.project).await?;
    let available = parts.store.balance(run.user).await?.map_or_else(|| decimal(0), |balance| balance.available);
    let progress = progress::progress(&view, &rows);
    let text = render::progress(&name, &progress, spent_ucr, &available);
    Ok(Seen { view, name, text, standing: progress.standing, spent_ucr })
}

/// The first text of a run's message, in the transaction from which on the chat follows it.
pub(super) async fn begun(tx: &mut Tx, run: &Followed, name: &str, what: &str) -> Result<(), Error> {
    let text = format!("🔧 <b>{}</b>\n{what}", escape(name));
    Ok(outbox::replace(tx, &progress_message(run, &text)).await?)
}

fn progress_message(run: &Followed, text: &str) -> Outgoing {
    Outgoing {
        chat_id: run.chat_id,
        dedupe_key: format!("progress:{}", run.run),
        method: "SendMessage",
        body: render::message(run.chat_id, text, Vec::new()),
        urgent: false,
    }
}

async fn once(tx: &mut Tx, run: &Followed, key: String, html: &str, keyboard: render::Keyboard) -> Result<(), Error> {
    let new = Outgoing {
        chat_id: run.chat_id,
        dedupe_key: key,
        method: "SendMessage",
        body: render::message(run.chat_id, html, keyboard),
        urgent: false,
    };
    outbox::enqueue(tx, &new).await?;
    Ok(())
}

/// Asks what the run waits for: each place once, or everything unanswered again for the update that wants to know.
pub(super) async fn ask(tx: &mut Tx, run: &Followed, seen: &Seen, again: Option<i64>) -> Result<(), Error> {
    for waiting in &seen.view.waiting {
        let (Waiting::Signal { path, show, .. } | Waiting::Approval { path, show, .. }) = waiting else { continue };
        let due = match again {
            None => chats::ask(tx, run.run, path).await?,
            Some(_) => !chats::is_answered(tx, run.run, path).await?,
        };
        if !due {
            continue;
        }
        let key = match again {
            None => format!("ask:{}:{path}", run.run),
            Some(update) => format!("again:{update}:{}:{path}", run.run),
        };
        let show = show.as_deref();
        match waiting {
            Waiting::Approval { step, .. } => approval(tx, run, seen, &key, path, step, show).await?,
            _ => question(tx, run, seen, &key, path, show).await?,
        }
    }
    Ok(())
}

/// Asks a question, with the suggested answers as buttons.
async fn question(
    tx: &mut Tx,
    run: &Followed,
    seen: &Seen,
    key: &str,
    path: &str,
    show: Option<&str>,
) -> Result<(), Error> {
    let mut keyboard = Vec::new();
    for text in suggestions(&seen.view, path) {
        let action = Action::Answer { text: text.clone() }.to_json();
        let token = chats::button(tx, run.chat_id, Some((run.run, path)), &action).await?;
        keyboard.push(vec![(text, token)]);
    }
    let text = format!("{}\n\nPress an answer or write your own.", show.unwrap_or("What should I know?"));
    shown(tx, run, key, &format!("💬 <b>{}</b>\n", escape(&seen.name)), &text, keyboard).await
}

/// Answers that the step before the question suggests: `output.suggestions` of its sibling.
fn suggestions(view: &RunView, path: &str) -> Vec<String> {
    let parent = |path: &str| path.rsplit_once('/').map_or(String::new(), |(parent, _)| parent.to_owned());
    let beside = parent(path);
    view.nodes
        .iter()
        .rev()
        .filter(|node| parent(&node.path) == beside)
        .find_map(|node| node.output.as_ref()?["suggestions"].as_array())
        .into_iter()
        .flatten()
        .filter_map(|text| text.as_str().map(str::trim).filter(|text| !text.is_empty()).map(str::to_owned))
        .take(SUGGESTIONS)
        .collect()
}

/// Asks for an approval.
async fn approval(
    tx: &mut Tx,
    run: &Followed,
    seen: &Seen,
    key: &str,
    path: &str,
    step: &str,
    show: Option<&str>,
) -> Result<(), Error> {
    let decide = |decision| Action::Decide { step: step.to_owned(), decision };
    let choices = if step == DECIDE {
        vec![("✅ Accept as it is", decide(Verdict::Approved)), ("❌ Reject", decide(Verdict::Rejected))]
    } else {
        vec![
            ("✅ Approve", decide(Verdict::Approved)),
            ("✏️ Change", Action::Change { step: step.to_owned() }),
            ("⏹ Cancel", Action::Stop),
        ]
    };
    let mut row = Vec::new();
    for (label, action) in choices {
        let token = chats::button(tx, run.chat_id, Some((run.run, path)), &action.to_json()).await?;
        row.push((label.to_owned(), token));
    }
    let heading = format!("📋 <b>{}</b> needs your decision.\n\n", escape(&seen.name));
    shown(tx, run, key, &heading, show.unwrap_or("Shall I go on?"), vec![row]).await
}

/// Writes a text of any length; the buttons are under its last piece.
async fn shown(
    tx: &mut Tx,
    run: &Followed,
    key: &str,
    heading: &str,
    text: &str,
    keyboard: render::Keyboard,
) -> Result<(), Error> {
    let mut pieces = render::split(text, render::TEXT_MAX);
    if pieces.is_empty() {
        pieces.push(String::new());
    }
    let last = pieces.len() - 1;
    let mut keyboard = Some(keyboard);
    for (n, piece) in pieces.iter().enumerate() {
        let heading = if n == 0 { heading } else { "" };
        let keys = if n == last { keyboard.take().unwrap_or_default() } else { Vec::new() };
        let html = format!("{heading}{}", escape(piece));
        once(tx, run, format!("{key}:{n}"), &html, keys).await?;
    }
    Ok(())
}
