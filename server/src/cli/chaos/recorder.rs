//! The outside world: it sees the idempotency keys of attempts, acknowledges each sight, and forgets nothing.
//!
//! # Shape
//! One connection a sight: a line of JSON ([`Shown`]), answered by a line with the number of the sight, from 1.

use anyhow::Context as _;
use serde::{Deserialize, Serialize};
use std::{
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{UnixListener, UnixStream},
    task::JoinHandle,
};
use uuid::Uuid;

/// Longest line of a sight, in bytes.
const LINE_MAX: u64 = 4 << 10;
/// A sight takes no longer, from the connection to its answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// What an attempt shows.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Shown {
    pub(super) key: String,
    pub(super) run: Uuid,
    pub(super) path: String,
    /// 1-based, lost attempts counted.
    pub(super) attempt: u32,
}

/// A running recorder. Dropping it ends it.
pub(super) struct Recorder {
    pub(super) socket: PathBuf,
    /// In order; number n is at place n - 1.
    seen: Arc<Mutex<Vec<Shown>>>,
    task: JoinHandle<()>,
}

impl Recorder {
    /// Listens on a socket in `folder`.
    pub(super) fn start(folder: &Path) -> anyhow::Result<Self> {
        let socket = folder.join("recorder.sock");
        let listener = UnixListener::bind(&socket).with_context(|| socket.display().to_string())?;
        let seen = Arc::new(Mutex::new(Vec::new()));
        let task = tokio::spawn(listen(listener, seen.clone()));
        Ok(Self { socket, seen, task })
    }

    /// Everything that was seen, in order.
    pub(super) fn seen(&self) -> Vec<Shown> {
        self.seen.lock().expect("no panic while held").clone()
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn listen(listener: UnixListener, seen: Arc<Mutex<Vec<Shown>>>) {
    // An error of one connection is that attempt's; it says so and is tried again.
    while let Ok((stream, _)) = listener.accept().await {
        let seen = seen.clone();
        tokio::spawn(async move { tokio::time::timeout(PATIENCE, record(stream, &seen)).await });
    }
}

async fn record(stream: UnixStream, seen: &Mutex<Vec<Shown>>) -> io::Result<()> {
    let (read, mut write) = stream.into_split();
    let mut line = String::new();
    BufReader::new(read.take(LINE_MAX)).read_line(&mut line).await?;
    let shown: Shown = serde_json::from_str(&line)?;
    let n = {
        let mut seen = seen.lock().expect("no panic while held");
        seen.push(shown);
        seen.len()
    };
    write.write_all(format!("{n}\n").as_bytes()).await
}

/// Shows a key and waits for the acknowledgement: the number of the sight.
pub(super) async fn show(socket: &Path, shown: &Shown) -> io::Result<u64> {
    let say = async {
        let (read, mut write) = UnixStream::connect(socket).await?.into_split();
        write.write_all(format!("{}\n", serde_json::to_string(shown)?).as_bytes()).await?;
        let mut line = String::new();
        BufReader::new(read.take(LINE_MAX)).read_line(&mut line).await?;
        line.trim().parse().map_err(io::Error::other)
    };
    tokio::time::timeout(PATIENCE, say).await?
}
