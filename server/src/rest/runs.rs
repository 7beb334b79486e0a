//! Runs: looking at them and acting on them. A run that is somebody else's is not there.

use super::{
    Code, Error,
    call::{Call, Need, Principal, json, limit, parse},
};
use crate::store::filter;
use loopwright_engine::{
    client::{Decision, Filter, Signal, Why},
    ids::RunId,
    view::RunView,
};
use loopwright_workflows::parse_duration;
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Value, json as object};
use std::time::Duration;
use uuid::Uuid;
use warp::reply::Response;

/// Most transitions in one answer.
const HISTORY_MAX: u32 = 1000;
/// Transitions in one answer when nobody says.
const HISTORY_DEFAULT: u32 = 200;
/// Longest reason or comment, in characters. Chosen, not measured.
const TEXT_MAX: usize = 4000;

/// The caller's run.
///
/// # Errors
/// `not_found` for one that is not there and for one that is somebody else's.
pub(super) async fn owned(call: &Call, caller: Principal, id: Uuid) -> Result<RunView, Error> {
    let view = call.state.client.describe(RunId(id)).await?;
    if view.attributes["user_id"].as_str() == Some(&caller.user.to_string()) {
        Ok(view)
    } else {
        Err(Error::not_found("run"))
    }
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct ListQuery {
    project_id: Option<String>,
    open: Option<String>,
    workflow: Option<String>,
    #[serde(rename = "where")]
    matching: Option<String>,
    limit: Option<String>,
    cursor: Option<String>,
}

/// `GET /v1/runs?project_id=&open=true&workflow=&where=&cursor=&limit=`: newest first. `where` is a filter, over the caller's runs.
pub(super) async fn list(call: Call) -> Result<Response, Error> {
    let caller = call.principal(Need::Read).await?;
    let query: ListQuery = call.query()?;
    let limit = limit(query.limit.as_deref())?;
    let mut attributes = object!({ "user_id": caller.user.to_string() });
    if let Some(project) = parse::<Uuid>("project_id", query.project_id.as_deref())? {
        attributes["project_id"] = project.to_string().into();
    }
    let matching = match query.matching.as_deref().map(filter::parse).transpose() {
        Ok(Some(matching)) => Some(call.state.store.with_projects(Some(caller.user), matching).await?),
        Ok(None) => None,
        Err(error) => return Err(Error::new(Code::QueryInvalid, format!("`where`: {error}."))),
    };
    let filter = Filter {
        attributes: Some(attributes),
        workflow: query.workflow,
        matching,
        open_only: parse("open", query.open.as_deref())?.unwrap_or(false),
        after: parse("cursor", query.cursor.as_deref())?,
        limit: limit + 1,
    };
    let runs = call.state.client.list(filter).await?;
    json(200, &crate::store::Page::of(runs, limit, |run| run.run_id.to_string()))
}

/// `GET /v1/runs/{id}`.
pub(super) async fn show(id: Uuid, call: Call) -> Result<Response, Error> {
    let caller = call.principal(Need::Read).await?;
    let view = owned(&call, caller, id).await?;
    let standing = crate::read::task::standing(&view);
    let mut body = serde_json::to_value(&view).map_err(Error::internal)?;
    body["standing"] = object!({ "task": standing.task, "message": standing.message });
    json(200, &body)
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct HistoryQuery {
    after: Option<String>,
    limit: Option<String>,
}

/// `GET /v1/runs/{id}/history?after=&limit=`: transitions in order.
pub(super) async fn history(id: Uuid, call: Call) -> Result<Response, Error> {
    let caller = call.principal(Need::Read).await?;
    let view = owned(&call, caller, id).await?;
    let query: HistoryQuery = call.query()?;
    let after = parse::<u64>("after", query.after.as_deref())?.unwrap_or(0);
    let limit = parse::<u32>("limit", query.limit.as_deref())?.unwrap_or(HISTORY_DEFAULT);
    if !(1..=HISTORY_MAX).contains(&limit) {
        return Err(Error::new(Code::QueryInvalid, format!("`limit` is between 1 and {HISTORY_MAX}.")));
    }
    let rows = call.state.client.history(RunId(id), after, limit).await?;
    let next = rows.last().map(|r| r.seq).filter(|seq| *seq < view.seq);
    json(200, &object!({ "items": rows, "seq": view.seq, "next_after": next }))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NewSignal {
    name: String,
    #[serde(default)]
    payload: Value,
}

/// `POST /v1/runs/{id}/signals` `{name, payload}`. The `Idempotency-Key` is the signal's own.
pub(super) async fn signal(id: Uuid, mut call: Call) -> Result<Response, Error> {
    let caller = call.principal(Need::Run).await?;
    let key = call.idempotency_key()?;
    owned(&call, caller, id).await?;
    let new: NewSignal = call.json()?;
    if new.name.is_empty() || new.name.chars().count() > 100 {
        return Err(Error::new(Code::InputInvalid, "The signal has no usable name.")
            .at("/name", "must have 1 to 100 characters"));
    }
    let signal = Signal {
        name: new.name,
        payload: new.payload,
        dedupe_id: key.map(|k| format!("rest:{k}")),
        sender: Some(format!("user:{}", caller.user)),
    };
    let accepted = call.state.client.signal(RunId(id), signal).await?;
    json(202, &object!({ "status": if accepted { "accepted" } else { "duplicate" } }))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NewDecision {
    decision: String,
    #[serde(default)]
    comment: Option<String>,
}

/// `POST /v1/runs/{id}/approvals/{step}` `{decision: approved | rejected | changes_requested, comment}`.
pub(super) async fn approve(id: Uuid, step: String, mut call: Call) -> Result<Response, Error> {
    let caller = call.principal(Need::Run).await?;
    let key = call.idempotency_key()?;
    owned(&call, caller, id).await?;
    let new: NewDecision = call.json()?;
    let decision = [Decision::Approved, Decision::Rejected, Decision::ChangesRequested]
        .into_iter()
        .find(|d| d.as_str() == new.decision)
        .ok_or_else(|| {
            Error::new(Code::InputInvalid, "There is no such decision.")
                .at("/decision", "must be approved, rejected or changes_requested")
        })?;
    check_text("/comment", new.comment.as_deref())?;
    let sender = Some(format!("user:{}", caller.user));
    let dedupe = key.map(|k| format!("rest:{k}"));
    let accepted = call.state.client.approve(RunId(id), &step, decision, new.comment, dedupe, sender).await?;
    json(202, &object!({ "status": if accepted { "accepted" } else { "duplicate" } }))
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct Reason {
    reason: Option<String>,
}

/// The body `{reason}`, which may be absent.
fn reason(call: &mut Call) -> Result<Option<String>, Error> {
    let Reason { reason } = body(call)?;
    check_text("/reason", reason.as_deref())?;
    Ok(reason)
}

/// A body that may be absent.
fn body<T: Default + DeserializeOwned>(call: &mut Call) -> Result<T, Error> {
    let bytes = call.bytes()?;
    if bytes.is_empty() {
        return Ok(T::default());
    }
    serde_json::from_slice(&bytes).map_err(|e| Error::new(Code::BodyInvalid, format!("{e}.")))
}

/// `POST /v1/runs/{id}/pause` and `…/resume` `{reason}`; the body may be absent. The `Idempotency-Key` is the message's own.
pub(super) async fn pause_or_resume(id: Uuid, pause: bool, mut call: Call) -> Result<Response, Error> {
    let caller = call.principal(Need::Run).await?;
    let key = call.idempotency_key()?;
    owned(&call, caller, id).await?;
    let why = Why {
        reason: reason(&mut call)?.unwrap_or_else(|| "asked for by its owner".into()),
        dedupe_id: key.map(|k| format!("rest:{}:{k}", if pause { "pause" } else { "resume" })),
        by: Some(format!("user:{}", caller.user)),
    };
    let (client, run) = (&call.state.client, RunId(id));
    let accepted = if pause { client.pause(run, why).await? } else { client.resume(run, why).await? };
    json(202, &object!({ "status": if accepted { "accepted" } else { "duplicate" } }))
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct Cancel {
    reason: Option<String>,
    /// As in a definition: `90s`, `10m`.
    within: Option<String>,
}

/// `POST /v1/runs/{id}/cancel` `{reason, within}`; the body may be absent.
pub(super) async fn cancel(id: Uuid, mut call: Call) -> Result<Response, Error> {
    let caller = call.principal(Need::Run).await?;
    let view = owned(&call, caller, id).await?;
    let Cancel { reason, within } = body(&mut call)?;
    check_text("/reason", reason.as_deref())?;
    let wrong =
        || Error::new(Code::InputInvalid, "That is no time.").at("/within", "must be a duration such as 90s or 10m");
    let within = within.map(|text| parse_duration(&text).ok_or_else(wrong)).transpose()?.map(Duration::from_millis);
    if view.status.is_closed() {
        let goes_on = view.chain.continued_as.map(|next| format!(" Run {next} goes on in its place."));
        return Err(Error::new(Code::RunClosed, format!("The run has ended.{}", goes_on.unwrap_or_default())));
    }
    let beyond = |error| match error {
        loopwright_engine::Error::InputInvalid(list) => {
            list.into_iter().fold(Error::new(Code::InputInvalid, "That is no time."), |e, text| e.at("/within", text))
        }
        other => other.into(),
    };
    let reason = reason.unwrap_or_else(|| "cancelled by its owner".into());
    let client = &call.state.client;
    match within {
        Some(within) => client.cancel_within(RunId(id), &reason, within).await.map_err(beyond)?,
        None => client.cancel(RunId(id), &reason).await?,
    }
    json(202, &object!({ "status": "cancelling" }))
}

/// `POST /v1/runs/{id}/terminate` `{reason}`: at once, without its `finally`; the body may be absent.
pub(super) async fn terminate(id: Uuid, mut call: Call) -> Result<Response, Error> {
    let caller = call.principal(Need::Run).await?;
    owned(&call, caller, id).await?;
    let reason = reason(&mut call)?.unwrap_or_else(|| "terminated by its owner".into());
    call.state.client.terminate(RunId(id), &reason).await?;
    json(200, &object!({ "status": "terminated" }))
}

fn check_text(pointer: &str, text: Option<&str>) -> Result<(), Error> {
    match text {
        Some(text) if text.chars().count() > TEXT_MAX => Err(Error::new(Code::InputInvalid, "The text is too long.")
            .at(pointer, format!("must have at most {TEXT_MAX} characters"))),
        _ => Ok(()),
    }
}
