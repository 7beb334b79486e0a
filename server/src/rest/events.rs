//! A run's transitions as they happen, as server-sent events. A client that lost the connection says the last id it
//! saw and misses nothing: the history is the stream.

use super::{
    Code, Error,
    call::{Call, Need, parse},
    runs,
};
use futures_util::stream;
use loopwright_engine::{client::Client, ids::RunId, view::HistoryRow};
use serde::Deserialize;
use std::{collections::VecDeque, convert::Infallible, time::Duration};
use tokio::sync::{OwnedSemaphorePermit, watch};
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

struct Cursor {
    client: Client,
    run: RunId,
    after: u64,
    rows: VecDeque<HistoryRow>,
    stop: watch::Receiver<bool>,
    ended: bool,
    /// Held as long as the stream lives.
    _permit: OwnedSemaphorePermit,
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
    let cursor = Cursor {
        client: call.state.client.clone(),
        run: RunId(id),
        after,
        rows: VecDeque::new(),
        stop: call.state.stop.clone(),
        ended: false,
        _permit: permit,
    };
    let events = stream::unfold(cursor, |cursor| async move { next(cursor).await });
    let stream = warp::sse::keep_alive().interval(KEEP_ALIVE).stream(events);
    let mut response = warp::sse::reply(stream).into_response();
    // Proxies that buffer would turn live into late.
    response.headers_mut().insert("x-accel-buffering", warp::http::HeaderValue::from_static("no"));
    Ok(response)
}

async fn next(mut cursor: Cursor) -> Option<(Result<Event, Infallible>, Cursor)> {
    loop {
        if let Some(row) = cursor.rows.pop_front() {
            cursor.after = row.seq;
            cursor.ended = closes(&row);
            let data = serde_json::to_string(&row).unwrap_or_default();
            return Some((Ok(Event::default().id(row.seq.to_string()).event("transition").data(data)), cursor));
        }
        if cursor.ended {
            cursor.ended = false;
            cursor.run = RunId(Uuid::nil());
            return Some((Ok(Event::default().event("end").data("{}")), cursor));
        }
        if cursor.run.0.is_nil() || *cursor.stop.borrow() {
            return None;
        }
        let (client, run, after) = (cursor.client.clone(), cursor.run, cursor.after);
        let read = async move {
            let rows = client.history(run, after, BATCH).await?;
            if rows.is_empty() {
                // A closed run has nothing more: a stream that resumed behind its end is told so.
                let closed = client.describe(run).await?.status.is_closed();
                if !closed {
                    client.wait_change(run, after, WAIT).await?;
                }
                return Ok::<_, loopwright_engine::Error>((rows, closed));
            }
            Ok((rows, false))
        };
        let mut stop = cursor.stop.clone();
        let result = tokio::select! {
            result = read => result,
            _ = stop.wait_for(|stop| *stop) => return None,
        };
        match result {
            Ok((rows, closed)) => {
                cursor.rows = rows.into();
                cursor.ended = closed;
            }
            Err(error) => {
                // The client reconnects with the last id it saw.
                tracing::warn!(%error, run = %cursor.run, "an event stream ended");
                return None;
            }
        }
    }
}

fn closes(row: &HistoryRow) -> bool {
    row.events.iter().any(|event| event["type"] == "run_closed")
}
