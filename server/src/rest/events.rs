//! A run's transitions as they happen, as server-sent events. A client that lost the connection says the last id it
//! saw and misses nothing: the history is the stream.

use super::{
    Code, Error,
    call::{Call, Need, parse},
    runs,
};
use futures_util::stream;
use loopwright_engine::{
    client::Client,
    ids::RunId,
    view::{HistoryRow, RunView},
};
use serde::Deserialize;
use std::{convert::Infallible, time::Duration};
use tokio::sync::{mpsc, watch};
use uuid::Uuid;
use warp::{
    reply::{Reply, Response},
    sse::Event,
};

/// Transitions read at once.
const BATCH: u32 = 100;
/// Longest wait for a change before the run is looked at again.
const WAIT: Duration = Duration::from_secs(20);
/// Between two comments that keep proxies from closing an idle stream. Source: common proxies give up after 30 s.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct Query {
    after: Option<String>,
}

/// `GET /v1/runs/{id}/events?after=` with `Last-Event-ID`.
///
/// # Shape
/// `id: <seq>`, `event: transition`, `data: <history row>`; after the last one of a closed run `event: end`.
pub(super) async fn stream(id: Uuid, call: Call) -> Result<Response, Error> {
    let caller = call.principal(Need::Read).await?;
    runs::owned(&call, caller, id).await?;
    let query: Query = call.query()?;
    let after = match call.header("last-event-id")? {
        Some(text) => {
            text.trim().parse().map_err(|_| Error::new(Code::HeaderInvalid, "`Last-Event-ID` is not a number."))?
        }
        None => parse("after", query.after.as_deref())?.unwrap_or(0),
    };
    let permit = call.state.streams.clone().try_acquire_owned().map_err(|_| {
        Error::new(Code::StreamsExhausted, "Too many event streams are open; try again soon.").retry_after(5)
    })?;
    // The framework wants a stream that threads may share, which a query under way is not: a task reads, the stream
    // passes on.
    let (sender, receiver) = mpsc::channel(1);
    let (client, stop) = (call.state.client.clone(), call.state.stop.clone());
    tokio::spawn(async move {
        follow(&client, RunId(id), after, &sender, stop).await;
        drop(permit);
    });
    let events = stream::unfold(receiver, |mut receiver| async {
        receiver.recv().await.map(|event| (Ok::<Event, Infallible>(event), receiver))
    });
    let stream = warp::sse::keep_alive().interval(KEEP_ALIVE).stream(events);
    let mut response = warp::sse::reply(stream).into_response();
    // Proxies that buffer would turn live into late.
    response.headers_mut().insert("x-accel-buffering", warp::http::HeaderValue::from_static("no"));
    Ok(response)
}

/// Sends transitions until the run has closed, nobody listens, or the server stops.
async fn follow(
    client: &Client,
    run: RunId,
    mut after: u64,
    listener: &mpsc::Sender<Event>,
    mut stop: watch::Receiver<bool>,
) {
    loop {
        let read = async {
            let rows = client.history(run, after, BATCH).await?;
            if !rows.is_empty() {
                return Ok((rows, false));
            }
            let over = is_over(&client.describe(run).await?, after);
            if !over {
                client.wait_change(run, after, WAIT).await?;
            }
            Ok::<_, loopwright_engine::Error>((rows, over))
        };
        let result = tokio::select! {
            result = read => result,
            () = listener.closed() => return,
            _ = async { stop.wait_for(|stop| *stop).await.is_ok() } => return,
        };
        let (rows, mut closed) = match result {
            Ok(found) => found,
            Err(error) => {
                // The client reconnects with the last id it saw.
                tracing::warn!(%error, %run, "an event stream ended");
                return;
            }
        };
        for row in rows {
            after = row.seq;
            closed = closes(&row);
            let data = serde_json::to_string(&row).unwrap_or_default();
            let event = Event::default().id(row.seq.to_string()).event("transition").data(data);
            if listener.send(event).await.is_err() {
                return;
            }
        }
        if closed {
            // Nobody there any more is as good an end.
            let _ = listener.send(Event::default().event("end").data("{}")).await;
            return;
        }
    }
}

/// Whether a listener who has seen `after` has seen all there will be: a stream that resumed behind the end is told so.
/// A run that closed since its history was read has one more transition.
fn is_over(view: &RunView, after: u64) -> bool {
    view.status.is_closed() && view.seq <= after
}

fn closes(row: &HistoryRow) -> bool {
    row.events.iter().any(|event| event["type"] == "run_closed")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(status: &str, seq: u64) -> RunView {
        let view = serde_json::json!({
            "run_id": Uuid::nil(), "workflow": "w", "definition": "0".repeat(64), "workflow_id": null,
            "status": status, "seq": seq, "attributes": {}, "inputs": {}, "started_at": "2026-11-27T08:00:00Z",
            "closed_at": null, "output": null, "failure": null, "waiting": [], "live": [], "nodes": [],
        });
        serde_json::from_value(view).unwrap()
    }

    #[test]
    fn a_run_that_closed_since_its_history_was_read_has_one_more_transition() {
        assert!(!is_over(&view("completed", 4), 3));
        assert!(is_over(&view("completed", 4), 4));
        assert!(is_over(&view("completed", 4), 9));
        assert!(!is_over(&view("running", 4), 4));
    }
}
