//! Updates: requests into runs that are answered. And queries: what a run says of itself.

use super::{
    Code, Error,
    call::{Call, Need, json},
    loop_run::{Prefer, prefer},
    projects::located,
    runs::owned,
};
use loopwright_engine::{Error as EngineError, client::Update, ids::RunId, view::Updated};
use serde::Deserialize;
use serde_json::{Value, json as object};
use std::time::Duration;
use uuid::Uuid;
use warp::reply::Response;

/// Longest id of an update in a URL, in characters.
const ID_MAX: usize = 100;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NewUpdate {
    name: String,
    #[serde(default)]
    payload: Value,
    id: Option<String>,
}

/// `POST /v1/runs/{id}/updates` `{name, payload, id}`. Without an `id` the `Idempotency-Key` is it, and without that a new one.
/// Waits for the answer as `Prefer` says: 200 with it, a rejection too; 202 and `Location` while there is none.
pub(super) async fn send(id: Uuid, mut call: Call) -> Result<Response, Error> {
    let caller = call.principal(Need::Run).await?;
    let key = call.idempotency_key()?;
    owned(&call, caller, id).await?;
    let wait = wait(&call, prefer(&call)?);
    let new: NewUpdate = call.json()?;
    if new.name.is_empty() || new.name.chars().count() > 100 {
        return Err(Error::new(Code::InputInvalid, "The update has no usable name.")
            .at("/name", "must have 1 to 100 characters"));
    }
    let usable = format!("must have 1 to {ID_MAX} letters, digits, `.`, `_`, `:` or `-`");
    let update_id = match (new.id, key) {
        (Some(given), _) | (None, Some(given)) if is_id(&given) => given,
        (Some(_), _) => {
            return Err(Error::new(Code::InputInvalid, "The update has no usable id.").at("/id", usable));
        }
        (None, Some(_)) => {
            let detail = format!("`Idempotency-Key` is the update's id here and {usable}.");
            return Err(Error::new(Code::HeaderInvalid, detail));
        }
        (None, None) => Uuid::now_v7().to_string(),
    };
    let update = Update {
        name: new.name,
        payload: new.payload,
        id: Some(update_id.clone()),
        sender: Some(format!("user:{}", caller.user)),
    };
    // Sent at once; how long somebody waits is another matter.
    let client = call.state.client.clone();
    let sent = client.update(RunId(id), update, Duration::ZERO).await;
    match sent {
        Err(EngineError::UpdatePending { .. }) => awaited(id, &update_id, wait, &call).await,
        sent => answered(id, &update_id, sent),
    }
}

/// `GET /v1/runs/{id}/updates/{update_id}`: the answer, waited for as `Prefer` says.
pub(super) async fn show(id: Uuid, update_id: String, call: Call) -> Result<Response, Error> {
    let caller = call.principal(Need::Read).await?;
    owned(&call, caller, id).await?;
    let wait = wait(&call, prefer(&call)?);
    awaited(id, &update_id, wait, &call).await
}

/// `GET /v1/runs/{id}/queries/{name}`.
pub(super) async fn query(id: Uuid, name: String, call: Call) -> Result<Response, Error> {
    let caller = call.principal(Need::Read).await?;
    owned(&call, caller, id).await?;
    json(200, &call.state.client.query(RunId(id), &name).await?)
}

/// A server that stops makes nobody wait; nor does one that holds as many answers back as it may: it says 202.
fn wait(call: &Call, prefer: Prefer) -> Duration {
    match prefer {
        Prefer::Wait(wait) if !*call.state.stop.borrow() => wait,
        Prefer::Wait(_) | Prefer::Async => Duration::ZERO,
    }
}

async fn awaited(id: Uuid, update_id: &str, wait: Duration, call: &Call) -> Result<Response, Error> {
    let client = &call.state.client;
    let mut stop = call.state.stop.clone();
    let permit = call.state.streams.clone().try_acquire_owned();
    let wait = if permit.is_ok() { wait } else { Duration::ZERO };
    tokio::select! {
        found = client.updated(RunId(id), update_id, wait) => return answered(id, update_id, found),
        _ = stop.wait_for(|stop| *stop) => {}
    }
    answered(id, update_id, client.updated(RunId(id), update_id, Duration::ZERO).await)
}

fn answered(id: Uuid, update_id: &str, found: Result<Updated, EngineError>) -> Result<Response, Error> {
    match found {
        Ok(updated) => json(200, &updated),
        Err(EngineError::UpdatePending { why, .. }) => {
            let body = object!({ "id": update_id, "status": "pending", "detail": why });
            Ok(located(json(202, &body)?, &format!("/v1/runs/{id}/updates/{update_id}")))
        }
        Err(error) => Err(error.into()),
    }
}

fn is_id(text: &str) -> bool {
    let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | ':' | '-');
    (1..=ID_MAX).contains(&text.len()) && text.chars().all(legal)
}
