//! A run as a file for its owner: what `loopwright run export` writes, and `run import` and `run replay` read.

use super::{
    Code, Error,
    call::{Call, Need},
    runs::owned,
};
use bytes::Bytes;
use futures_util::{StreamExt, stream};
use loopwright_engine::ids::RunId;
use std::io;
use tokio::sync::mpsc;
use uuid::Uuid;
use warp::{
    http::header,
    reply::{Reply, Response},
};

/// `GET /v1/runs/{id}/export`: lines of JSON. One whose last line is no `end` is not whole: the connection broke, or the database was
/// away.
pub(super) async fn export(id: Uuid, call: Call) -> Result<Response, Error> {
    let caller = call.principal(Need::Read).await?;
    owned(&call, caller, id).await?;
    let permit =
        call.state.streams.clone().try_acquire_owned().map_err(|_| {
            Error::new(Code::StreamsExhausted, "Too many streams are open; try again soon.").retry_after(5)
        })?;
    let mut export = call.state.client.export(RunId(id)).await?;
    // As with events: a task reads, the stream passes on, and nothing is read ahead of a slow reader but one line.
    let (sender, receiver) = mpsc::channel(1);
    tokio::spawn(async move {
        loop {
            let line = match export.next().await {
                Ok(Some(line)) => Ok(Bytes::from(line)),
                Ok(None) => break,
                Err(error) => {
                    tracing::warn!(%error, run = %id, "an export ended early");
                    // The reader sees a body that breaks off; what was wrong is the log's.
                    Err(io::Error::other("the export cannot go on"))
                }
            };
            let over = line.is_err();
            if sender.send(line).await.is_err() || over {
                break;
            }
        }
        drop(permit);
    });
    let lines = stream::unfold(receiver, |mut receiver| async { receiver.recv().await.map(|line| (line, receiver)) });
    // Whoever compresses it asks once more behind the end.
    let lines = lines.fuse();
    let reply = warp::reply::with_header(warp::reply::stream(lines), header::CONTENT_TYPE, "application/x-ndjson");
    let disposition = format!("attachment; filename=\"run-{id}.jsonl\"");
    Ok(warp::reply::with_header(reply, header::CONTENT_DISPOSITION, disposition).into_response())
}
