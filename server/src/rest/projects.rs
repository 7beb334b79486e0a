//! Projects: what a user wants built, and what has been built of it.

use super::{
    Code, Error, State,
    call::{Call, Need, PageQuery, json, json_text, parse, to_the_end},
};
use crate::store::idempotency::{ABANDONED_S, Claim};
use serde::Deserialize;
use uuid::Uuid;
use warp::{
    http::{HeaderValue, header},
    reply::{Reply, Response},
};

/// Longest name, in characters. Chosen, not measured.
const NAME_MAX: usize = 200;
/// Longest idea, in characters: what the shipped workflow takes.
pub(crate) const IDEA_MAX: usize = 20_000;
/// The workflow of a new project.
pub(crate) const WORKFLOW: &str = "dev-loop";

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NewProject {
    name: String,
    idea: String,
}

/// `POST /v1/projects` `{name, idea}`.
pub(super) async fn create(mut call: Call) -> Result<Response, Error> {
    let caller = call.principal(Need::Run).await?;
    let key = call.idempotency_key()?;
    let new: NewProject = call.json()?;
    let (name, idea) = (new.name.trim(), new.idea.trim());
    for (pointer, text, max) in [("/name", name, NAME_MAX), ("/idea", idea, IDEA_MAX)] {
        if text.is_empty() || text.chars().count() > max || text.contains('\0') {
            return Err(Error::new(Code::InputInvalid, "The project cannot be created like this.")
                .at(pointer, format!("must have 1 to {max} characters")));
        }
    }
    let (name, idea) = (name.to_owned(), idea.to_owned());
    to_the_end(create_once(call.state.clone(), caller.user, name, idea, key)).await
}

/// Creates the project, once per key.
async fn create_once(
    state: State,
    user: Uuid,
    name: String,
    idea: String,
    key: Option<String>,
) -> Result<Response, Error> {
    let store = &state.store;
    let ticket = match key {
        Some(key) => match store.claim(user, &key, &format!("POST /v1/projects\n{name}\n{idea}"), ABANDONED_S).await? {
            Claim::Fresh(ticket) => Some(ticket),
            settled => return replay(settled),
        },
        None => None,
    };
    let project = match store.create_project(user, &name, &idea, WORKFLOW).await {
        Ok(project) => project,
        Err(error) => {
            if let Some(ticket) = &ticket {
                store.forget(ticket).await?;
            }
            return Err(error.into());
        }
    };
    let body = serde_json::to_string(&project).map_err(Error::internal)?;
    let location = format!("/v1/projects/{}", project.id);
    if let Some(ticket) = &ticket {
        store.answer(ticket, 201, Some(&location), &body).await?;
    }
    Ok(located(json_text(201, body), &location))
}

/// The reply to a request whose key was used before.
pub(super) fn replay(claim: Claim) -> Result<Response, Error> {
    match claim {
        Claim::Answered { status, location, body } => {
            let mut response = json_text(status, body);
            response.headers_mut().insert("idempotency-replayed", HeaderValue::from_static("true"));
            Ok(match location {
                Some(location) => located(response, &location),
                None => response,
            })
        }
        Claim::InProgress => {
            Err(Error::new(Code::RequestInProgress, "The first request with this key is not answered yet.")
                .retry_after(2))
        }
        Claim::Mismatch => {
            Err(Error::new(Code::IdempotencyKeyReused, "The key was used for another request; take a new one."))
        }
        Claim::Fresh(_) => Err(Error::internal("a fresh claim has nothing to replay")),
    }
}

/// Adds `Location`.
pub(super) fn located(mut response: Response, location: &str) -> Response {
    if let Ok(value) = HeaderValue::from_str(location) {
        response.headers_mut().insert(header::LOCATION, value);
    }
    response
}

/// `GET /v1/projects?cursor=&limit=`: newest first.
pub(super) async fn list(call: Call) -> Result<Response, Error> {
    let caller = call.principal(Need::Read).await?;
    let page: PageQuery = call.query()?;
    let after: Option<Uuid> = parse("cursor", page.cursor.as_deref())?;
    json(200, &call.state.store.projects(caller.user, after, page.limit()?).await?)
}

/// `GET /v1/projects/{id}`.
pub(super) async fn show(id: Uuid, call: Call) -> Result<Response, Error> {
    let caller = call.principal(Need::Read).await?;
    let project = call.state.store.project(caller.user, id).await?.ok_or_else(|| Error::not_found("project"))?;
    let run = call.state.client.open_run(&super::workflow_id(id)).await?;
    let mut body = serde_json::to_value(&project).map_err(Error::internal)?;
    body["open_run"] = serde_json::json!(run);
    json(200, &body)
}

/// `GET /v1/projects/{id}/files?cursor=&limit=`: by path.
pub(super) async fn files(id: Uuid, call: Call) -> Result<Response, Error> {
    let caller = call.principal(Need::Read).await?;
    let page: PageQuery = call.query()?;
    let store = &call.state.store;
    store.project(caller.user, id).await?.ok_or_else(|| Error::not_found("project"))?;
    json(200, &store.project_files(caller.user, id, page.cursor.as_deref(), page.limit()?).await?)
}

/// `GET /v1/projects/{id}/files/{path}`: the bytes.
pub(super) async fn file(id: Uuid, path: String, call: Call) -> Result<Response, Error> {
    let caller = call.principal(Need::Read).await?;
    let path = percent_decode(&path).ok_or_else(|| Error::not_found("file"))?;
    let content = call.state.store.project_file(caller.user, id, &path).await?;
    let content = content.ok_or_else(|| Error::not_found("file"))?;
    // Never as something that a browser would run.
    let kind =
        if std::str::from_utf8(&content).is_ok() { "text/plain; charset=utf-8" } else { "application/octet-stream" };
    Ok(warp::reply::with_header(content, header::CONTENT_TYPE, kind).into_response())
}

/// `GET /v1/projects/{id}/archive`: the repository as a zip.
pub(super) async fn archive(id: Uuid, call: Call) -> Result<Response, Error> {
    let caller = call.principal(Need::Read).await?;
    let project = call.state.store.project(caller.user, id).await?.ok_or_else(|| Error::not_found("project"))?;
    let zip = call.state.archives.zip(id).await.map_err(Error::internal)?;
    let name: String = project
        .name
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() || c == '-' { c.to_ascii_lowercase() } else { '-' })
        .take(60)
        .collect();
    let disposition = format!("attachment; filename=\"{}.zip\"", name.trim_matches('-'));
    let reply = warp::reply::with_header(zip, header::CONTENT_TYPE, "application/zip");
    Ok(warp::reply::with_header(reply, header::CONTENT_DISPOSITION, disposition).into_response())
}

fn percent_decode(text: &str) -> Option<String> {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut i = 0;
    while i < bytes.len() {
        if bytes[i] == b'%' {
            let hex = text.get(i + 1..i + 3)?;
            out.push(u8::from_str_radix(hex, 16).ok()?);
            i += 3;
        } else {
            out.push(bytes[i]);
            i += 1;
        }
    }
    String::from_utf8(out).ok().filter(|path| !path.contains('\0'))
}
