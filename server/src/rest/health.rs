//! For whoever runs the process: alive, ready, measured. No token: they tell nothing about users.

use super::{
    State,
    error::{Code, Error},
};
use std::time::Duration;
use warp::reply::{Reply, Response};

/// Longest wait for the database. Probes give up after a few seconds.
const READY_TIMEOUT: Duration = Duration::from_secs(2);

/// The process answers.
pub(super) fn live() -> Response {
    warp::reply::json(&serde_json::json!({"status": "ok"})).into_response()
}

/// The database is there and has our schema, and nobody asked us to stop.
pub(super) async fn ready(state: State) -> Response {
    if *state.stop.borrow() {
        return Error::new(Code::Unavailable, "Stopping.").into_response();
    }
    match tokio::time::timeout(READY_TIMEOUT, state.store.missing_migrations()).await {
        Ok(Ok(missing)) if missing.is_empty() => {
            warp::reply::json(&serde_json::json!({"status": "ready"})).into_response()
        }
        Ok(Ok(_)) => {
            Error::new(Code::Unavailable, "The database is not migrated; run `loopwright migrate`.").into_response()
        }
        Ok(Err(_)) | Err(_) => Error::new(Code::Unavailable, "The database cannot be reached.").into_response(),
    }
}

/// Prometheus text.
pub(super) fn metrics(state: &State) -> Response {
    let text = state.metrics.render();
    warp::reply::with_header(text, "content-type", "text/plain; version=0.0.4; charset=utf-8").into_response()
}
