//! Texts and buttons: ideas, answers, decisions.

use super::{Scene, commands};
use crate::{
    rest::WORKFLOW,
    store::{
        projects,
        telegram::chats::{self, Chat, Followed, Place, TOPIC},
        users::User,
    },
    telegram::{Error, notify, render},
};
use loopwright_engine::{
    Error as Engine,
    client::{At, Decision, Fork, Signal},
    ids::RunId,
    view::Waiting,
};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use teloxide::utils::html::escape;
use uuid::Uuid;

/// The signal that carries what a user types.
const MESSAGE: &str = "user_message";
/// The approval after the verification: there is nothing left to change then.
pub(in crate::telegram) const DECIDE: &str = "decide";
/// Longest text that is taken. The workflow takes 20,000; Telegram sends 4,096.
const TEXT_MAX: usize = 20_000;

/// Said to a press that comes too late.
const STALE: &str = "This was answered already or is no longer asked.";
const CHANGED: &str = "Thank you. I work your changes into the plan.";

/// What a button does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case")]
pub(in crate::telegram) enum Action {
    /// Answers a question with a text.
    Answer { text: String },
    /// Decides an approval.
    Decide { step: String, decision: Verdict },
    /// Asks what to change.
    Change { step: String },
    /// Decides an approval by asking for changes that were typed already.
    ChangeTo { step: String, text: String },
    /// Stops the run instead of deciding.
    Stop,
    /// Starts a project from a text that was typed.
    Start { text: String },
    /// Leaves it at that.
    Nothing,
    /// Chooses what commands mean.
    Choose { project: Uuid },
    /// Begins the step again that ended a run, with a run of this id: however often it is pressed, there is one.
    GoOn { as_run: RunId },
}

/// As [`Decision`], for storing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(in crate::telegram) enum Verdict {
    Approved,
    Rejected,
}

impl Action {
    pub(in crate::telegram) fn to_json(&self) -> Value {
        serde_json::to_value(self).unwrap_or_default()
    }
}

/// A text: the change that was asked for, the answer to an open question, or an idea.
pub(super) async fn text(scene: &mut Scene<'_>, chat: &Chat, user: &User, text: &str) -> Result<(), Error> {
    if text.chars().count() > TEXT_MAX {
        return scene.say("That is too long for me; please shorten it.").await;
    }
    if let Some(place) = &chat.asks {
        chats::set_asks(scene.tx, scene.chat_id, None).await?;
        if decide(scene, user, place, Decision::ChangesRequested, Some(text)).await? {
            return scene.say(CHANGED).await;
        }
        // That plan waits no more: the text is one like any other.
    }
    let open = chats::open_runs(scene.tx, scene.chat_id).await?;
    for run in &open {
        if let Some(path) = question(scene, run).await?
            && reply(scene, user, run.run, &path, text).await?
        {
            return Ok(());
        }
    }
    match open.first() {
        None => start(scene, user, text).await,
        Some(run) => offer_start(scene, run, text).await,
    }
}

/// Where a run waits for a text, if it does and nobody has answered.
async fn question(scene: &mut Scene<'_>, run: &Followed) -> Result<Option<String>, Error> {
    let view = scene.parts.client.describe(run.run).await?;
    for waiting in &view.waiting {
        if let Waiting::Signal { path, signal, .. } = waiting
            && signal == MESSAGE
            && !chats::is_answered(scene.tx, run.run, path).await?
        {
            return Ok(Some(path.clone()));
        }
    }
    Ok(None)
}

/// Sends the one answer of a place into its run. False if it was answered before, or the run has closed.
async fn reply(scene: &mut Scene<'_>, user: &User, run: RunId, path: &str, text: &str) -> Result<bool, Error> {
    if !chats::answer(scene.tx, run, path).await? {
        return Ok(false);
    }
    let signal = Signal {
        name: MESSAGE.to_owned(),
        payload: json!({ "text": text }),
        dedupe_id: Some(format!("tg:{}", scene.update_id)),
        sender: Some(format!("user:{}", user.id)),
    };
    match scene.parts.client.signal_in(scene.tx, run, signal).await {
        Ok(_) => Ok(true),
        Err(Engine::RunClosed(_) | Engine::RunNotFound(_) | Engine::RunArchived { .. }) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Sends the one decision of an approval. False if it does not wait any more.
async fn decide(
    scene: &mut Scene<'_>,
    user: &User,
    place: &Place,
    decision: Decision,
    comment: Option<&str>,
) -> Result<bool, Error> {
    if !waits(scene, place.run_id, &place.path).await? || !chats::answer(scene.tx, place.run_id, &place.path).await? {
        return Ok(false);
    }
    let signal = Signal {
        name: place.step.clone(),
        payload: json!({"decision": decision.as_str(), "comment": comment.unwrap_or_default()}),
        dedupe_id: Some(format!("tg:{}", scene.update_id)),
        sender: Some(format!("user:{}", user.id)),
    };
    match scene.parts.client.signal_in(scene.tx, place.run_id, signal).await {
        Ok(_) => Ok(true),
        Err(Engine::RunClosed(_) | Engine::RunNotFound(_) | Engine::RunArchived { .. }) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Whether a run still waits at a place for its owner.
async fn waits(scene: &Scene<'_>, run: RunId, at: &str) -> Result<bool, Error> {
    let view = match scene.parts.client.describe(run).await {
        Ok(view) => view,
        Err(Engine::RunNotFound(_) | Engine::RunArchived { .. }) => return Ok(false),
        Err(error) => return Err(error.into()),
    };
    Ok(view
        .waiting
        .iter()
        .any(|w| matches!(w, Waiting::Signal { path, .. } | Waiting::Approval { path, .. } if path == at)))
}

/// Starts a project and its run.
pub(super) async fn start(scene: &mut Scene<'_>, user: &User, idea: &str) -> Result<(), Error> {
    let client = &scene.parts.client;
    let definition = match client.pointer(WORKFLOW, "current").await {
        Ok(definition) => definition,
        Err(Engine::DefinitionNotFound(_)) => {
            tracing::error!(workflow = WORKFLOW, "no such workflow is deployed; ideas cannot be started");
            return scene.say("I cannot start projects right now; the operator has to set me up first.").await;
        }
        Err(error) => return Err(error.into()),
    };
    let name = render::project_name(idea);
    let project = projects::create(&mut **scene.tx, user.id, &name, idea, WORKFLOW).await?;
    let mut request = project.start(user.id, definition);
    request.inputs["approve_plan"] = json!(true);
    request.topic = Some(TOPIC.to_owned());
    let started = client.start_in(scene.tx, request).await?;
    let followed =
        Followed { run: started.run_id, chat_id: scene.chat_id, user: user.id, project: project.id, closed: false };
    chats::follow(scene.tx, &followed).await?;
    chats::set_project(scene.tx, scene.chat_id, project.id).await?;
    notify::begun(scene.tx, &followed, &name, "Started. I read your idea now and may ask a few questions.").await
}

/// Lets a run that has failed go on as another in its place, which begins its last step again; the chat follows it. As the project's one
/// run it takes the business key, and where another has that by now nothing begins. Says what became of the press, and whether the button
/// is of no use any more.
async fn go_on(scene: &mut Scene<'_>, at: Place, as_run: RunId) -> Result<(&'static str, bool), Error> {
    let Some(old) = chats::followed_among(scene.tx, [at.run_id]).await?.pop() else { return Ok((STALE, true)) };
    if !chats::followed_among(scene.tx, [as_run]).await?.is_empty() {
        return Ok(("It goes on already.", true));
    }
    // Before the runs are locked: it is read on another connection.
    let name = scene.parts.store.project(None, old.project).await?.map(|project| project.name).unwrap_or_default();
    let fork = Fork {
        run_id: Some(as_run),
        at: At::Step(at.path),
        inputs: Map::new(),
        definition: None,
        attributes: None,
        reason: "its owner let it go on in Telegram".to_owned(),
    };
    match scene.parts.client.reset_in(scene.tx, at.run_id, fork).await {
        Ok(_) => {}
        Err(Engine::RunNotFound(_) | Engine::RunArchived { .. } | Engine::RunImported(_)) => {
            return Ok((
                "That is too long ago: nothing is kept from which it could go on. Start it anew with /new.",
                true,
            ));
        }
        Err(Engine::ForkInvalid(why)) => {
            tracing::warn!(run = %at.run_id, ?why, "a failed run cannot go on");
            let said = "It cannot go on now: the project has another run that is under way (/projects), or that step cannot begin again.";
            return Ok((said, false));
        }
        Err(error) => return Err(error.into()),
    }
    let followed = Followed { run: as_run, closed: false, ..old };
    chats::follow(scene.tx, &followed).await?;
    chats::set_project(scene.tx, scene.chat_id, old.project).await?;
    notify::begun(scene.tx, &followed, &name, "Goes on with the step that failed.").await?;
    Ok(("It goes on.", true))
}

/// A text while work is under way and no question is open: it is nobody's answer, and a project costs credits.
async fn offer_start(scene: &mut Scene<'_>, run: &Followed, text: &str) -> Result<(), Error> {
    let name = scene.parts.store.project(None, run.project).await?.map(|p| p.name).unwrap_or_default();
    let view = scene.parts.client.describe(run.run).await?;
    let plan = view.waiting.iter().find_map(|waiting| match waiting {
        Waiting::Approval { path, step, .. } if step != DECIDE => Some((path, step)),
        _ => None,
    });
    let mut choices = Vec::new();
    if let Some((path, step)) = plan {
        let action = Action::ChangeTo { step: step.clone(), text: text.to_owned() };
        choices.push(("Change the plan like this", action, Some((run.run, path.as_str()))));
    }
    choices.push(("Start a new project", Action::Start { text: text.to_owned() }, None));
    choices.push(("Neither", Action::Nothing, None));
    let mut keyboard = Vec::new();
    for (label, action, place) in choices {
        let token = chats::button(scene.tx, scene.chat_id, place, &action.to_json()).await?;
        keyboard.push(vec![(label.to_owned(), token)]);
    }
    let text = format!(
        "<b>{}</b> is under way and has no open question (/status). What shall I do with your text?",
        escape(&render::cut(&name, 60))
    );
    scene.say_with(&text, keyboard).await
}

/// A button. Only those of this chat do anything, and each place of a run takes one answer.
pub(super) async fn button(
    scene: &mut Scene<'_>,
    chat: &Chat,
    user: &User,
    query: &str,
    message_id: Option<i32>,
    token: &str,
) -> Result<(), Error> {
    // In a private chat the chat's id is its user's.
    let pressed = match scene.chat_id == scene.from {
        true => chats::pressed(scene.tx, scene.chat_id, token).await?,
        false => None,
    };
    let action = pressed.as_ref().and_then(|p| serde_json::from_value::<Action>(p.action.clone()).ok());
    let (Some(pressed), Some(action)) = (pressed, action) else {
        return answered(scene, query, "This button is not yours or no longer works.").await;
    };
    let place = |step: &str| {
        let (run_id, path) = (pressed.run?, pressed.path.clone()?);
        Some(Place { run_id, path, step: step.to_owned() })
    };
    let (said, spent) = match action {
        Action::Answer { text } => match place("") {
            Some(at)
                if waits(scene, at.run_id, &at.path).await?
                    && reply(scene, user, at.run_id, &at.path, &text).await? =>
            {
                (text, true)
            }
            _ => (STALE.to_owned(), true),
        },
        Action::Decide { step, decision } => match place(&step) {
            Some(at) => {
                let (decision, said) = match decision {
                    Verdict::Approved => (Decision::Approved, "Approved."),
                    Verdict::Rejected => (Decision::Rejected, "Rejected."),
                };
                let done = decide(scene, user, &at, decision, None).await?;
                if done && chat.asks.as_ref() == Some(&at) {
                    chats::set_asks(scene.tx, scene.chat_id, None).await?;
                }
                (if done { said } else { STALE }.to_owned(), true)
            }
            None => (STALE.to_owned(), true),
        },
        Action::Change { step } => match place(&step) {
            Some(at)
                if waits(scene, at.run_id, &at.path).await?
                    && !chats::is_answered(scene.tx, at.run_id, &at.path).await? =>
            {
                chats::set_asks(scene.tx, scene.chat_id, Some(&at)).await?;
                scene.say("What should be different? Write it in one message.").await?;
                // The other buttons still work: he may think better of it.
                ("Tell me what to change.".to_owned(), false)
            }
            _ => (STALE.to_owned(), true),
        },
        Action::ChangeTo { step, text } => match place(&step) {
            Some(at) if decide(scene, user, &at, Decision::ChangesRequested, Some(&text)).await? => {
                chats::set_asks(scene.tx, scene.chat_id, None).await?;
                (CHANGED.to_owned(), true)
            }
            _ => (STALE.to_owned(), true),
        },
        Action::Stop => match place("") {
            Some(at)
                if waits(scene, at.run_id, &at.path).await? && chats::answer(scene.tx, at.run_id, &at.path).await? =>
            {
                chats::set_asks(scene.tx, scene.chat_id, None).await?;
                commands::stop(scene, at.run_id).await?;
                ("Stopped.".to_owned(), true)
            }
            _ => (STALE.to_owned(), true),
        },
        Action::Start { text } => {
            chats::take_button(scene.tx, token).await?;
            start(scene, user, &text).await?;
            ("Started.".to_owned(), true)
        }
        Action::Nothing => ("All right.".to_owned(), true),
        Action::Choose { project } => match scene.parts.store.project(user.id, project).await? {
            Some(project) => {
                chats::set_project(scene.tx, scene.chat_id, project.id).await?;
                (format!("Commands mean “{}” now.", project.name), false)
            }
            None => (STALE.to_owned(), true),
        },
        Action::GoOn { as_run } => match place("") {
            Some(at) => {
                let (said, spent) = go_on(scene, at, as_run).await?;
                (said.to_owned(), spent)
            }
            None => (STALE.to_owned(), true),
        },
    };
    if let Some(message_id) = message_id.filter(|_| spent) {
        let body = json!({"chat_id": scene.chat_id, "message_id": message_id});
        scene.queue_once(format!("plain:{}:{message_id}", scene.chat_id), "EditMessageReplyMarkup", body).await?;
    }
    answered(scene, query, &said).await
}

async fn answered(scene: &mut Scene<'_>, query: &str, text: &str) -> Result<(), Error> {
    let body = render::callback_answer(query, text);
    scene.queue("AnswerCallbackQuery", body).await
}
