//! Schedules of a user: runs that the clock starts. Those of others, and the operator's, are not there.

use super::{
    Code, Error, State,
    begin::{invalid_project, own_projects, startable},
    call::{Call, Need, PageQuery, Principal, json},
    workflow_id,
};
use chrono::{DateTime, Utc};
use loopwright_engine::{
    Error as Engine,
    schedule::{Overlap, ScheduleDetail, ScheduleView, Spec, When, door::NewSchedule},
};
use serde::Deserialize;
use serde_json::{Map, Value, json as object};
use uuid::Uuid;
use warp::reply::Response;

/// Most schedules of a user. Chosen: the engine has 10,000 for all.
const SCHEDULES_MAX: usize = 50;
/// Longest name, in characters: with the user's id before it, it fits the engine's.
const NAME_MAX: usize = 50;
/// Schedules read at once to find a user's.
const BATCH: u32 = 200;

/// The engine's names are of all users together: each has a room of his own.
fn room(caller: Principal) -> String {
    format!("user:{}/", caller.user)
}

/// The engine's name of the caller's schedule.
///
/// # Errors
/// `not_found`: there can be none of that name.
fn named(caller: Principal, name: &str) -> Result<String, Error> {
    if !is_name(name) {
        return Err(Error::not_found("schedule"));
    }
    Ok(format!("{}{name}", room(caller)))
}

fn is_name(name: &str) -> bool {
    (1..=NAME_MAX).contains(&name.len()) && name.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
}

/// A schedule as its owner sees it: under the name that he gave it.
fn shown(caller: Principal, view: &impl serde::Serialize) -> Result<Value, Error> {
    let mut value = serde_json::to_value(view).map_err(Error::internal)?;
    if let Some(own) = value["name"].as_str().and_then(|name| name.strip_prefix(&room(caller))) {
        value["name"] = Value::String(own.to_owned());
    }
    Ok(value)
}

/// All schedules of the caller.
async fn of(state: &State, caller: Principal) -> Result<Vec<ScheduleView>, Error> {
    let (room, mut found, mut after) = (room(caller), Vec::new(), None::<String>);
    loop {
        let page = state.client.schedules().list(after.as_deref(), BATCH).await?;
        let Some(last) = page.last() else { return Ok(found) };
        after = Some(last.name.clone());
        found.extend(page.into_iter().filter(|view| view.name.starts_with(&room)));
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct New {
    name: String,
    workflow: String,
    when: When,
    #[serde(default)]
    inputs: Map<String, Value>,
    #[serde(default)]
    project_id: Option<String>,
    #[serde(default)]
    overlap: Overlap,
    #[serde(default)]
    catchup_ms: u64,
    #[serde(default)]
    jitter_ms: u64,
    #[serde(default)]
    run_limit: Option<u32>,
}

/// `POST /v1/schedules` `{name, workflow, when, inputs, project_id, overlap, catchup_ms, jitter_ms, run_limit}`: 201.
pub(super) async fn create(mut call: Call) -> Result<Response, Error> {
    let caller = call.principal(Need::Run).await?;
    let new: New = call.json()?;
    if !is_name(&new.name) {
        return Err(Error::new(Code::InputInvalid, "The schedule has no usable name.")
            .at("/name", format!("must have 1 to {NAME_MAX} letters, digits and `._-`")));
    }
    startable(&call.state, &new.workflow).await?;
    let mut inputs = Value::Object(new.inputs);
    own_projects(&call.state, caller, &inputs).await?;
    let mut attributes = object!({"user_id": caller.user.to_string()});
    let mut id = None;
    if let Some(project) = new.project_id {
        let project = Uuid::parse_str(&project).map_err(|_| invalid_project())?;
        call.state.store.project(caller.user, project).await?.ok_or_else(invalid_project)?;
        attributes["project_id"] = project.to_string().into();
        inputs["project_id"] = project.to_string().into();
        id = Some(workflow_id(project));
    }
    if of(&call.state, caller).await?.len() >= SCHEDULES_MAX {
        return Err(Error::new(
            Code::SchedulesFull,
            format!("A user has at most {SCHEDULES_MAX} schedules; delete one."),
        ));
    }
    let spec = Spec {
        inputs,
        attributes,
        workflow_id: id,
        overlap: new.overlap,
        catchup_ms: new.catchup_ms,
        jitter_ms: new.jitter_ms,
        run_limit: new.run_limit,
        ..Spec::new(new.workflow, new.when)
    };
    let name = named(caller, &new.name)?;
    let owner = Some(format!("user:{}", caller.user));
    let made = call.state.client.schedules().create(NewSchedule { name, spec, paused: false, note: None, owner }).await;
    let made = made.map_err(|error| match error {
        Engine::ScheduleExists(_) => Error::new(Code::ScheduleExists, "You have a schedule of that name already.")
            .at("/name", "must be another, or delete that one"),
        other => other.into(),
    })?;
    json(201, &shown(caller, &made)?)
}

/// `GET /v1/schedules?cursor=&limit=`: by name.
pub(super) async fn list(call: Call) -> Result<Response, Error> {
    let caller = call.principal(Need::Read).await?;
    let page: PageQuery = call.query()?;
    let limit = page.limit()?;
    let mut all = Vec::new();
    for view in of(&call.state, caller).await? {
        all.push(shown(caller, &view)?);
    }
    let name = |view: &Value| view["name"].as_str().unwrap_or_default().to_owned();
    all.sort_by_key(name);
    all.retain(|view| page.cursor.as_ref().is_none_or(|after| name(view) > *after));
    all.truncate(limit as usize + 1);
    json(200, &crate::store::Page::of(all, limit, name))
}

/// `GET /v1/schedules/{name}`: with its next instants and newest actions.
pub(super) async fn show(name: String, call: Call) -> Result<Response, Error> {
    let caller = call.principal(Need::Read).await?;
    let detail: ScheduleDetail = call.state.client.schedules().describe(&named(caller, &name)?).await?;
    json(200, &shown(caller, &detail)?)
}

/// `DELETE /v1/schedules/{name}`: its runs go on.
pub(super) async fn delete(name: String, call: Call) -> Result<Response, Error> {
    let caller = call.principal(Need::Run).await?;
    call.state.client.schedules().delete(&named(caller, &name)?).await?;
    json(200, &object!({"status": "deleted"}))
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct Note {
    note: Option<String>,
}

/// `POST /v1/schedules/{name}/pause` and `…/resume` `{note}`; the body may be absent.
pub(super) async fn pause_or_resume(name: String, pause: bool, mut call: Call) -> Result<Response, Error> {
    let caller = call.principal(Need::Run).await?;
    let name = named(caller, &name)?;
    let Note { note } = call.json_or_default()?;
    let schedules = call.state.client.schedules();
    let view = if pause { schedules.pause(&name, note).await? } else { schedules.resume(&name, note).await? };
    json(200, &shown(caller, &view)?)
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct Now {
    overlap: Option<Overlap>,
}

/// `POST /v1/schedules/{name}/trigger` `{overlap}`: a run now; the body may be absent.
pub(super) async fn trigger(name: String, mut call: Call) -> Result<Response, Error> {
    let caller = call.principal(Need::Run).await?;
    let name = named(caller, &name)?;
    let Now { overlap } = call.json_or_default()?;
    json(200, &call.state.client.schedules().trigger(&name, overlap).await?)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Past {
    from: DateTime<Utc>,
    to: DateTime<Utc>,
    #[serde(default)]
    overlap: Option<Overlap>,
}

/// `POST /v1/schedules/{name}/backfill` `{from, to, overlap}`: instants of the past that have no run. May be sent again.
pub(super) async fn backfill(name: String, mut call: Call) -> Result<Response, Error> {
    let caller = call.principal(Need::Run).await?;
    let name = named(caller, &name)?;
    let Past { from, to, overlap } = call.json()?;
    let filled = call.state.client.schedules().backfill(&name, from, to, overlap).await?;
    json(200, &object!({"instants": filled.instants, "added": filled.added}))
}
