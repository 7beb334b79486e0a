//! Runs that a user begins: a start, a fork, a reset. Whose they are is the caller, always; which projects they work on is checked
//! here, because the activities take a `project_id` at its word.

use super::{
    Code, Error, State,
    call::{Call, Need, Principal, json_text, to_the_end},
    projects::{located, replay},
    runs::owned,
    workflow_id,
};
use crate::{
    shipped,
    store::idempotency::{Claim, Ticket},
};
use loopwright_engine::{
    Error as Engine,
    admission::{Admission, Priority},
    client::{At, Fork, Start},
    ids::{DefinitionHash, RunId},
};
use loopwright_workflows::parse_duration;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use std::{ops::RangeInclusive, str::FromStr, time::Duration};
use uuid::Uuid;
use warp::reply::Response;

/// Longest name of a workflow, and longest id of the caller's, in characters.
const NAME_MAX: usize = 63;
/// Longest reason, in characters; the engine's limit is in bytes.
const REASON_MAX: usize = 1_000;
/// What a user may choose. A smaller number is claimed first, whoever else waits: those are the operator's.
const PRIORITIES: RangeInclusive<i16> = 3..=5;
/// A beginning that is not answered for so long, in seconds, may be carried out once more beside it, because both make the same
/// run. Chosen: the database answers sooner, and its caller has lost the answer.
const UNANSWERED_S: u32 = 5;

/// A workflow that a user may start: deployed, and not one of the operator's jobs that come with the program.
///
/// # Errors
/// `not_found`.
pub(super) async fn startable(state: &State, name: &str) -> Result<DefinitionHash, Error> {
    let job = shipped::DEFINITIONS
        .iter()
        .any(|(file, _)| *file != "dev-loop.yaml" && file.strip_suffix(".yaml") == Some(name));
    if job || name.chars().count() > NAME_MAX {
        return Err(Error::not_found("workflow"));
    }
    state.client.pointer(name, "current").await.map_err(|error| match error {
        Engine::DefinitionNotFound(_) => Error::not_found("workflow"),
        other => other.into(),
    })
}

/// Refuses inputs that name a project of somebody else, wherever in them.
///
/// # Errors
/// `project_invalid`.
pub(super) async fn own_projects(state: &State, caller: Principal, inputs: &Value) -> Result<(), Error> {
    fn ids(value: &Value, found: &mut Vec<Uuid>) {
        match value {
            Value::String(text) => found.extend(Uuid::parse_str(text.trim()).ok()),
            Value::Array(items) => items.iter().for_each(|item| ids(item, found)),
            Value::Object(map) => map.values().for_each(|item| ids(item, found)),
            Value::Null | Value::Bool(_) | Value::Number(_) => {}
        }
    }
    let mut found = Vec::new();
    ids(inputs, &mut found);
    if !found.is_empty() && state.store.are_somebody_elses(caller.user, &found).await? {
        return Err(invalid_project());
    }
    Ok(())
}

pub(super) fn invalid_project() -> Error {
    Error::new(Code::ProjectInvalid, "project_id must be the UUID of one of your projects.")
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NewRun {
    workflow: String,
    #[serde(default)]
    inputs: Map<String, Value>,
    #[serde(default)]
    project_id: Option<String>,
    #[serde(default)]
    id: Option<String>,
    #[serde(default)]
    id_reuse: Option<String>,
    #[serde(default)]
    id_conflict: Option<String>,
    #[serde(default)]
    priority: Option<i16>,
    /// As in a definition: `90s`, `10m`.
    #[serde(default)]
    chain_timeout: Option<String>,
}

impl NewRun {
    /// On what terms it comes in, as far as that is the caller's own affair. A queue leads to workers that others count on, a group or
    /// a rate that a start names stands in the place of the workflow's, and a fairness key is a turn: with those a user would get
    /// before others.
    ///
    /// # Errors
    /// `input_invalid`, with what is wrong where.
    fn admission(&self, caller: Principal, has_id: bool) -> Result<Admission, Error> {
        for (pointer, policy) in [("/id_reuse", &self.id_reuse), ("/id_conflict", &self.id_conflict)] {
            if policy.is_some() && !has_id {
                return Err(Error::new(Code::InputInvalid, "A policy for an id that was used before needs an id.")
                    .at(pointer, "needs `id` or `project_id` beside it"));
            }
        }
        let priority = self.priority.unwrap_or_else(|| Priority::default().number());
        if !PRIORITIES.contains(&priority) {
            let usable = format!("must be {} (usual) to {} (last)", PRIORITIES.start(), PRIORITIES.end());
            return Err(Error::new(Code::InputInvalid, "There is no such priority.").at("/priority", usable));
        }
        let wrong = || {
            Error::new(Code::InputInvalid, "That is no time.")
                .at("/chain_timeout", "must be a duration such as 90s or 10m")
        };
        let chain_timeout =
            self.chain_timeout.as_deref().map(|text| parse_duration(text).ok_or_else(wrong)).transpose()?;
        Ok(Admission {
            priority: Priority::new(priority)?,
            id_reuse: word("/id_reuse", self.id_reuse.as_deref())?,
            id_conflict: word("/id_conflict", self.id_conflict.as_deref())?,
            chain_timeout: chain_timeout.map(Duration::from_millis),
            fairness_key: Some(caller.user.to_string()),
            ..Admission::default()
        })
    }
}

/// One of the engine's words.
fn word<T: FromStr<Err = String> + Default>(pointer: &str, text: Option<&str>) -> Result<T, Error> {
    let parsed = text.map_or_else(|| Ok(T::default()), str::parse);
    parsed.map_err(|why| Error::new(Code::InputInvalid, "There is no such policy.").at(pointer, why))
}

/// `POST /v1/runs` `{workflow, inputs, project_id, id, id_reuse, id_conflict, priority, chain_timeout}`: 201 with the run, 200 if one
/// was open under the id or the project.
pub(super) async fn start(mut call: Call) -> Result<Response, Error> {
    let caller = call.principal(Need::Run).await?;
    let key = call.idempotency_key()?;
    let bytes = call.json::<Value>()?;
    let request = format!("POST /v1/runs\n{bytes}");
    let new: NewRun =
        serde_json::from_value(bytes).map_err(|error| Error::new(Code::BodyInvalid, format!("{error}.")))?;
    let state = call.state.clone();
    let definition = startable(&state, &new.workflow).await?;
    let has_id = new.id.is_some() || new.project_id.is_some() || new.inputs.contains_key("project_id");
    let admission = new.admission(caller, has_id)?;
    let mut inputs = Value::Object(new.inputs);
    own_projects(&state, caller, &inputs).await?;
    let mut attributes = json!({"user_id": caller.user.to_string()});
    // Who names a project among the inputs means a run of it: there is one at a time.
    let project = new.project_id.or_else(|| inputs["project_id"].as_str().map(str::to_owned));
    let id = match (project, new.id) {
        (Some(_), Some(_)) => {
            return Err(Error::new(Code::InputInvalid, "A run of a project has the project as its id.")
                .at("/id", "must be left out with `project_id`"));
        }
        (Some(project), None) => {
            let project = Uuid::parse_str(&project).map_err(|_| invalid_project())?;
            state.store.project(caller.user, project).await?.ok_or_else(invalid_project)?;
            attributes["project_id"] = project.to_string().into();
            inputs["project_id"] = project.to_string().into();
            Some(workflow_id(project))
        }
        (None, Some(id)) if id.is_empty() || id.chars().count() > NAME_MAX || id.contains('\0') => {
            return Err(Error::new(Code::InputInvalid, "The run has no usable id.")
                .at("/id", format!("must have 1 to {NAME_MAX} characters")));
        }
        // Ids are of all users together; each has a room of his own.
        (None, Some(id)) => Some(format!("user:{}:{id}", caller.user)),
        (None, None) => None,
    };
    let start = Start {
        run_id: None,
        definition,
        inputs,
        workflow_id: id,
        attributes,
        queue: String::new(),
        topic: None,
        admission,
    };
    once(state, caller, key, request, move |state, run_id| async move {
        let started = state.client.start(Start { run_id, ..start }).await?;
        Ok((started.run_id, started.created, json!({"run_id": started.run_id, "created": started.created})))
    })
    .await
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NewFork {
    #[serde(default)]
    at: Option<u64>,
    #[serde(default)]
    step: Option<String>,
    #[serde(default)]
    inputs: Map<String, Value>,
    #[serde(default)]
    definition: Option<String>,
    #[serde(default)]
    reason: Option<String>,
}

/// `POST /v1/runs/{id}/fork` and `…/reset` `{at | step, inputs, definition, reason}`: 201 with the new run. `definition` is a version
/// of the run's workflow: its number, its hash or `current`.
pub(super) async fn fork_or_reset(id: Uuid, reset: bool, mut call: Call) -> Result<Response, Error> {
    let caller = call.principal(Need::Run).await?;
    let key = call.idempotency_key()?;
    let view = owned(&call, caller, id).await?;
    let body = call.json::<Value>()?;
    let request = format!("POST /v1/runs/{id}/{}\n{body}", if reset { "reset" } else { "fork" });
    let new: NewFork =
        serde_json::from_value(body).map_err(|error| Error::new(Code::BodyInvalid, format!("{error}.")))?;
    let state = call.state.clone();
    let at = match (new.at, new.step) {
        (Some(seq), None) => At::Seq(seq),
        (None, Some(path)) => At::Step(path),
        _ => {
            return Err(Error::new(Code::InputInvalid, "Say where: after which transition, or at which step.")
                .at("/at", "one of `at` and `step` must be given"));
        }
    };
    let inputs = Value::Object(new.inputs);
    own_projects(&state, caller, &inputs).await?;
    let definition = match new.definition {
        Some(text) => Some(version_of(&state, &view.workflow, &text).await?),
        None => None,
    };
    let reason = reason_of(new.reason)?;
    let Value::Object(inputs) = inputs else { return Err(Error::internal("inputs are a map")) };
    // Whoever asks owns the run; of one that came from a file it must be said again.
    let attributes = view.imported_at.is_some().then_some(view.attributes);
    once(state, caller, key, request, move |state, run_id| async move {
        let fork = Fork { run_id, at, inputs, definition, attributes, reason };
        let (run, body) = if reset {
            let done = state.client.reset(RunId(id), fork).await?;
            (done.run_id, json!({"run_id": done.run_id, "forked_from": id, "terminated": done.terminated}))
        } else {
            let done = state.client.fork(RunId(id), fork).await?;
            (done.run_id, json!({"run_id": done.run_id, "forked_from": id}))
        };
        Ok((run, true, body))
    })
    .await
}

/// Why, if somebody says so.
///
/// # Errors
/// `input_invalid`.
pub(super) fn reason_of(text: Option<String>) -> Result<String, Error> {
    match text {
        Some(text) if text.chars().count() > REASON_MAX => Err(Error::new(Code::InputInvalid, "The text is too long.")
            .at("/reason", format!("must have at most {REASON_MAX} characters"))),
        text => Ok(text.unwrap_or_else(|| "asked for by its owner".into())),
    }
}

/// A version of the workflow; one of another workflow is not there.
pub(super) async fn version_of(state: &State, workflow: &str, text: &str) -> Result<DefinitionHash, Error> {
    if text.contains('@') {
        return Err(Error::not_found("version"));
    }
    let found = state.client.definition_named(workflow, text).await.map_err(|error| match error {
        Engine::DefinitionNotFound(_) => Error::not_found("version"),
        other => other.into(),
    })?;
    match state.client.versions(workflow).await?.iter().any(|version| version.hash == found) {
        true => Ok(found),
        false => Err(Error::not_found("version")),
    }
}

/// Begins a run, once per key: under the run id of its ticket, so that a second turn finds what the first has begun.
async fn once<F, Fut>(
    state: State,
    caller: Principal,
    key: Option<String>,
    request: String,
    begin: F,
) -> Result<Response, Error>
where
    F: FnOnce(State, Option<RunId>) -> Fut + Send + 'static,
    Fut: Future<Output = Result<(RunId, bool, Value), Error>> + Send + 'static,
{
    to_the_end(async move {
        let ticket = match key {
            Some(key) => match state.store.claim(caller.user, &key, &request, UNANSWERED_S).await? {
                Claim::Fresh(ticket) => Some(ticket),
                settled => return replay(settled),
            },
            None => None,
        };
        let answered = answered(&state, ticket.as_ref(), begin).await;
        if answered.is_err()
            && let Some(ticket) = &ticket
            // What is not answered may have begun; the next turn finds it by its id.
            && let Err(error) = state.store.release(ticket).await
        {
            // Mostly the database is away. The next turn comes all the same, after a while.
            tracing::warn!(%error, "an idempotency key could not be given back");
        }
        answered
    })
    .await
}

async fn answered<F, Fut>(state: &State, ticket: Option<&Ticket>, begin: F) -> Result<Response, Error>
where
    F: FnOnce(State, Option<RunId>) -> Fut,
    Fut: Future<Output = Result<(RunId, bool, Value), Error>>,
{
    let (run, created, body) = begin(state.clone(), ticket.map(Ticket::run)).await?;
    if let Some(ticket) = ticket
        && run != ticket.run()
    {
        // It found another run open: later turns mean that one.
        state.store.keep_run(ticket, run).await?;
    }
    let (status, body, location) = (if created { 201 } else { 200 }, body.to_string(), format!("/v1/runs/{run}"));
    if let Some(ticket) = ticket {
        state.store.answer(ticket, status, Some(&location), &body).await?;
    }
    Ok(located(json_text(status, body), &location))
}
