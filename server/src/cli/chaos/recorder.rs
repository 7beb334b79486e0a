//! The outside world: it sees the idempotency keys of attempts and what they ask for, makes one effect of each key, and forgets
//! nothing.
//!
//! # Shape
//! One connection a sight: a line of JSON ([`Shown`]), answered by a line of JSON ([`Receipt`]).

use anyhow::Context as _;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::{
    collections::BTreeMap,
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
    /// What the world is asked to do: `{"activity", "input"}`. The same for all attempts of a step.
    pub(super) content: Value,
}

/// What the recorder says to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Receipt {
    /// Number of this sight, from 1.
    pub(super) n: u64,
    /// Number of the sight that made the effect: the first of this key.
    pub(super) effect: u64,
}

/// What the recorder keeps of a sight.
#[derive(Clone, Debug)]
pub(super) struct Sight {
    pub(super) shown: Shown,
    pub(super) receipt: Receipt,
}

#[derive(Default)]
struct Book {
    /// In order.
    sights: Vec<Sight>,
    /// By key: the first sight of it.
    effects: BTreeMap<String, u64>,
}

impl Book {
    fn record(&mut self, shown: Shown) -> Receipt {
        let n = self.sights.len() as u64 + 1;
        let receipt = Receipt { n, effect: *self.effects.entry(shown.key.clone()).or_insert(n) };
        self.sights.push(Sight { shown, receipt });
        receipt
    }
}

/// A running recorder. Dropping it ends it.
pub(super) struct Recorder {
    pub(super) socket: PathBuf,
    book: Arc<Mutex<Book>>,
    task: JoinHandle<()>,
}

impl Recorder {
    /// Listens on a socket in `folder`.
    pub(super) fn start(folder: &Path) -> anyhow::Result<Self> {
        let socket = folder.join("recorder.sock");
        let listener = UnixListener::bind(&socket).with_context(|| socket.display().to_string())?;
        let book = Arc::<Mutex<Book>>::default();
        let task = tokio::spawn(listen(listener, book.clone()));
        Ok(Self { socket, book, task })
    }

    /// Everything that was seen, in order.
    pub(super) fn seen(&self) -> Vec<Sight> {
        self.book.lock().expect("no panic while held").sights.clone()
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn listen(listener: UnixListener, book: Arc<Mutex<Book>>) {
    // An error of one connection is that attempt's; it says so and is tried again.
    while let Ok((stream, _)) = listener.accept().await {
        let book = book.clone();
        tokio::spawn(async move { tokio::time::timeout(PATIENCE, record(stream, &book)).await });
    }
}

async fn record(stream: UnixStream, book: &Mutex<Book>) -> io::Result<()> {
    let (read, mut write) = stream.into_split();
    let mut line = String::new();
    BufReader::new(read.take(LINE_MAX)).read_line(&mut line).await?;
    let shown: Shown = serde_json::from_str(&line)?;
    let receipt = book.lock().expect("no panic while held").record(shown);
    write.write_all(format!("{}\n", serde_json::to_string(&receipt)?).as_bytes()).await
}

/// Shows a key and waits for the receipt.
pub(super) async fn show(socket: &Path, shown: &Shown) -> io::Result<Receipt> {
    let say = async {
        let (read, mut write) = UnixStream::connect(socket).await?.into_split();
        write.write_all(format!("{}\n", serde_json::to_string(shown)?).as_bytes()).await?;
        let mut line = String::new();
        BufReader::new(read.take(LINE_MAX)).read_line(&mut line).await?;
        Ok(serde_json::from_str(&line)?)
    };
    tokio::time::timeout(PATIENCE, say).await?
}
