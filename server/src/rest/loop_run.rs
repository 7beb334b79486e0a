//! `POST /orchestrate/run-loop`: the trigger of a project's development loop.
//!
//! It starts the loop or wakes the open one, waits until a task has ended or the run waits for somebody, and tells
//! which. It never starts a second loop: the business key of the run is the project, and an idempotency key stands for one
//! run, also after that has closed.

use super::{
    Code, Error, State,
    call::{Call, Need, json_text, to_the_end},
    projects::{located, replay},
};
use crate::{
    read::task::{self, Task},
    store::{
        idempotency::{ABANDONED_S, Claim, Ticket},
        projects::Project,
    },
};
use loopwright_engine::{client::Start, ids::RunId, view::Waiting};
use serde::Serialize;
use serde_json::json;
use std::time::Duration;
use tokio::time::Instant;
use uuid::Uuid;
use warp::{http::HeaderValue, reply::Response};

/// Wait when nobody says, in seconds. Source: surfaces document.
const WAIT_DEFAULT_S: u64 = 120;
/// Longest wait, in seconds: below what proxies and clients give up after.
const WAIT_MAX_S: u64 = 600;
/// Longest sleep between two looks at the run.
const LOOK: Duration = Duration::from_secs(10);
/// Transitions before the request that are read for the titles of tasks.
const TITLES: u64 = 100;

/// How long the caller wants to wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Prefer {
    Wait(Duration),
    Async,
}

/// # Errors
/// `project_invalid` for a project that is missing, no UUID, unknown or somebody else's: one answer, so that nobody can
/// probe. `loop_failed` when the loop could not be run.
pub(super) async fn run(mut call: Call) -> Result<Response, Error> {
    let caller = call.principal(Need::Run).await?;
    let key = call.idempotency_key()?;
    let prefer = prefer(&call)?;
    let invalid = || Error::new(Code::ProjectInvalid, "project_id must be the UUID of one of your projects.");
    let body: serde_json::Value = serde_json::from_slice(&call.bytes()?).map_err(|_| invalid())?;
    let id = body["project_id"].as_str().and_then(|text| Uuid::parse_str(text).ok()).ok_or_else(invalid)?;
    let project = call.state.store.project(caller.user, id).await?.ok_or_else(invalid)?;
    let state = call.state.clone();
    match key {
        Some(key) => to_the_end(once(state, caller.user, project, prefer, key)).await,
        None => {
            answer(&state, caller.user, &project, prefer, None).await.map(|a| a.into_response(prefer)).map_err(failed)
        }
    }
}

/// The request that has this key, or its first answer.
async fn once(state: State, user: Uuid, project: Project, prefer: Prefer, key: String) -> Result<Response, Error> {
    // How long somebody waits is not what is asked for.
    let request = format!("POST /orchestrate/run-loop\n{}", project.id);
    let ticket = match state.store.claim(user, &key, &request, ABANDONED_S).await? {
        Claim::Fresh(ticket) => ticket,
        settled => return replay(settled),
    };
    match answered(&state, user, &project, prefer, &ticket).await {
        Ok(answer) => Ok(answer.into_response(prefer)),
        Err(error) => {
            // Not forgotten: the loop may have started, and the next request must find it.
            if let Err(error) = state.store.release(&ticket).await {
                // The row is taken over when it is abandoned long enough.
                tracing::warn!(%error, "an idempotency key could not be given back");
            }
            Err(failed(error))
        }
    }
}

async fn answered(
    state: &State,
    user: Uuid,
    project: &Project,
    prefer: Prefer,
    ticket: &Ticket,
) -> Result<Answer, Error> {
    let answer = answer(state, user, project, prefer, Some(ticket)).await?;
    state.store.answer(ticket, answer.status, Some(&answer.location), &answer.body).await?;
    Ok(answer)
}

/// What cannot be carried out is this route's own failure, except when the caller is to come again.
fn failed(error: Error) -> Error {
    match error.code {
        Code::Internal => Error::new(Code::LoopFailed, error.detail),
        _ => error,
    }
}

struct Answer {
    status: u16,
    body: String,
    location: String,
}

impl Answer {
    fn into_response(self, prefer: Prefer) -> Response {
        let mut response = located(json_text(self.status, self.body), &self.location);
        if prefer == Prefer::Async {
            response.headers_mut().insert("preference-applied", HeaderValue::from_static("respond-async"));
        }
        response
    }
}

async fn answer(
    state: &State,
    user: Uuid,
    project: &Project,
    prefer: Prefer,
    ticket: Option<&Ticket>,
) -> Result<Answer, Error> {
    let begun = start(state, user, project, ticket).await?;
    let run = begun.run;
    let location = format!("/v1/runs/{run}");
    let wait = match prefer {
        Prefer::Async => {
            let body = json!({"status": "accepted", "project_id": project.id, "run_id": run}).to_string();
            return Ok(Answer { status: 202, body, location });
        }
        Prefer::Wait(wait) => wait,
    };
    let Task { task, message } = watch(state, &begun, wait).await?;
    let success = Success { status: "success", project_id: project.id, result: Outcome { task, message } };
    let body = serde_json::to_string(&success).map_err(|e| Error::new(Code::Internal, e.to_string()))?;
    Ok(Answer { status: 200, body, location })
}

/// The answer as the specification shows it, in its order.
#[derive(Serialize)]
struct Success {
    status: &'static str,
    project_id: Uuid,
    result: Outcome,
}

#[derive(Serialize)]
struct Outcome {
    task: String,
    message: String,
}

/// A loop under way.
struct Begun {
    run: RunId,
    /// Transitions it had made before.
    seq: u64,
}

/// Starts the loop or wakes the open one. With a ticket it is the run that an earlier turn started or found, open or
/// closed.
async fn start(state: &State, user: Uuid, project: &Project, ticket: Option<&Ticket>) -> Result<Begun, Error> {
    let client = &state.client;
    let definition = client.pointer(&project.workflow_name, "current").await?;
    let start = Start { run_id: ticket.map(Ticket::run), ..project.start(user, definition) };
    let started = client.start(start).await?;
    if let Some(ticket) = ticket
        && started.run_id != ticket.run()
    {
        // Whoever dies before this has started nothing under the key yet.
        state.store.keep_run(ticket, started.run_id).await?;
    }
    if started.created {
        return Ok(Begun { run: started.run_id, seq: 0 });
    }
    let view = client.describe(started.run_id).await?;
    let blocked = view.waiting.iter().any(|w| matches!(w, Waiting::Blocked { .. }));
    if blocked {
        state.store.wake(client, project.id).await?;
    }
    Ok(Begun { run: started.run_id, seq: view.seq })
}

/// Waits for the first task that ends from now on, for the run to park, or for the time to be over.
async fn watch(state: &State, begun: &Begun, wait: Duration) -> Result<Task, Error> {
    let client = &state.client;
    let (run, after) = (begun.run, begun.seq);
    let deadline = Instant::now() + wait;
    let from = after.saturating_sub(TITLES);
    let mut rows = Vec::new();
    let mut seen = from;
    let mut stop = state.stop.clone();
    loop {
        loop {
            let more = client.history(run, seen, 1000).await?;
            let Some(last) = more.last() else { break };
            seen = last.seq;
            rows.extend(more);
        }
        if let Some(task) = task::ended(&rows, after) {
            return Ok(task);
        }
        let view = client.describe(run).await?;
        if view.seq > seen {
            continue;
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if task::is_parked(&view) || left.is_zero() || *stop.borrow() {
            return Ok(task::standing(&view));
        }
        tokio::select! {
            changed = client.wait_change(run, view.seq, left.min(LOOK)) => { changed?; }
            // Stopping: whoever waits is told what is in progress.
            _ = stop.wait_for(|stop| *stop) => {}
        }
    }
}

/// Reads `Prefer`. What is not understood is ignored, as RFC 7240 asks.
pub(super) fn prefer(call: &Call) -> Result<Prefer, Error> {
    let mut out = Prefer::Wait(Duration::from_secs(WAIT_DEFAULT_S));
    for value in call.headers.get_all("prefer") {
        for part in value.to_str().unwrap_or_default().split([',', ';']) {
            let part = part.trim().to_ascii_lowercase();
            if part == "respond-async" {
                return Ok(Prefer::Async);
            }
            if let Some(seconds) = part.strip_prefix("wait=").and_then(|s| s.trim_matches('"').parse::<u64>().ok()) {
                out = Prefer::Wait(Duration::from_secs(seconds.min(WAIT_MAX_S)));
            }
        }
    }
    Ok(out)
}
