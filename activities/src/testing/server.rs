//! The server: hyper reads requests and writes good answers; a fault takes the socket over and writes by hand.

use super::{
    act::Act,
    dialect::Dialect,
    fault::{Fault, Spoiled, When},
    journal::{End, Entry, Stage},
    reply::{Answer, Reply},
    route::{Endpoint, Seen, catalog, route},
    strict,
};
use crate::provider::{KeyIdentity, hex};
use bytes::Bytes;
use hyper::{
    Request, Response,
    body::{Body, Frame, Incoming, SizeHint},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use secrecy::SecretString;
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::{
    collections::VecDeque,
    convert::Infallible,
    future::poll_fn,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::Notify,
    task::JoinHandle,
};

/// Pace of endless comments.
const COMMENT_EVERY: Duration = Duration::from_millis(10);

type Script = dyn Fn(&Seen, usize) -> Answer + Send + Sync;
type Pause = dyn Fn() -> Duration + Send + Sync;

/// The running server; it ends when this is dropped.
pub struct FakeProvider {
    address: String,
    state: Arc<State>,
    task: JoinHandle<()>,
}

struct State {
    script: Box<Script>,
    /// The script answers everything, and nothing is checked.
    bare: bool,
    /// A document answers a request for a stream.
    documents: AtomicBool,
    rules: Mutex<Vec<(When, Fault)>>,
    seen: Mutex<Vec<Seen>>,
    journal: Mutex<Vec<Entry>>,
    /// Questions so far, by dialect; changed under the lock of the journal.
    questions: Mutex<[usize; 3]>,
    pause: Mutex<Option<Arc<Pause>>>,
    arrived: Notify,
    left: Notify,
    changed: Notify,
}

impl Drop for FakeProvider {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl FakeProvider {
    /// A credible server: it checks keys and questions as the originals do, lists models, knows generations, and
    /// answers question `n` (from 0, over all dialects) with what `script` says.
    pub async fn serve<A: Into<Answer>>(script: impl Fn(&Seen, usize) -> A + Send + Sync + 'static) -> Self {
        Self::run(Box::new(move |seen, n| script(seen, n).into()), false).await
    }

    /// A credible server that always says the same.
    pub async fn saying(reply: Reply) -> Self {
        Self::serve(move |_, _| reply.clone()).await
    }

    /// A server without opinions: `script` answers every request `n` (from 0), whatever it asks for.
    pub async fn start<A: Into<Answer>>(script: impl Fn(&Seen, usize) -> A + Send + Sync + 'static) -> Self {
        Self::run(Box::new(move |seen, n| script(seen, n).into()), true).await
    }

    /// Answers every request alike, byte by byte.
    pub async fn always(acts: Vec<Act>) -> Self {
        Self::start(move |_, _| acts.clone()).await
    }

    async fn run(script: Box<Script>, bare: bool) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback has a free port");
        let address = listener.local_addr().expect("a bound socket has an address").to_string();
        let state = Arc::new(State {
            script,
            bare,
            documents: AtomicBool::new(false),
            rules: Mutex::default(),
            seen: Mutex::default(),
            journal: Mutex::default(),
            questions: Mutex::default(),
            pause: Mutex::default(),
            arrived: Notify::new(),
            left: Notify::new(),
            changed: Notify::new(),
        });
        let accepting = Arc::clone(&state);
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(connection(stream, Arc::clone(&accepting)));
            }
        });
        Self { address, state, task }
    }

    /// Spoils the answers to requests that `when` describes; the first rule that holds counts.
    pub fn inject(&self, when: When, fault: Fault) {
        lock(&self.state.rules).push((when, fault));
    }
    /// Whether replies and faults come as one document even where a stream is asked for, as from a server that cannot
    /// stream.
    pub fn answer_documents(&self, documents: bool) {
        self.state.documents.store(documents, Ordering::Relaxed);
    }
    /// Lets time pass before each answer, as if the model thought.
    pub fn think(&self, pause: impl Fn() -> Duration + Send + Sync + 'static) {
        *lock(&self.state.pause) = Some(Arc::new(pause));
    }
    /// Behaves again.
    pub fn heal(&self) {
        lock(&self.state.rules).clear();
    }

    /// Its address without a path; the client adds its own.
    #[must_use]
    pub fn base(&self) -> String {
        format!("http://{}", self.address)
    }
    /// Its address for a client of `dialect`, as `*_BASE_URL` takes it. Unlike [`Self::base`] it leaves no doubt.
    #[must_use]
    pub fn base_of(&self, dialect: Dialect) -> String {
        let path = match dialect {
            Dialect::Gemini => "gemini",
            Dialect::OpenRouter => "openrouter/api/v1",
            Dialect::OpenAi => "openai/v1",
        };
        format!("http://{}/{path}", self.address)
    }
    /// The settings that point a process at it: addresses, and `key` for each provider.
    #[must_use]
    pub fn environment(&self, dialects: &[Dialect], key: &str) -> Vec<(&'static str, String)> {
        dialects
            .iter()
            .flat_map(|&dialect| {
                [(dialect.base_setting(), self.base_of(dialect)), (dialect.key_setting(), key.to_owned())]
            })
            .collect()
    }

    /// All requests, as they arrived.
    #[must_use]
    pub fn seen(&self) -> Vec<Seen> {
        lock(&self.state.seen).clone()
    }
    /// What became of them, in the same order.
    #[must_use]
    pub fn journal(&self) -> Vec<Entry> {
        lock(&self.state.journal).clone()
    }
    /// The journal as soon as it satisfies `ready`.
    pub async fn journal_when(&self, ready: impl Fn(&[Entry]) -> bool) -> Vec<Entry> {
        loop {
            let changed = self.state.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            let journal = self.journal();
            if ready(&journal) {
                return journal;
            }
            changed.await;
        }
    }
    /// Waits for the next request that arrives.
    pub async fn arrived(&self) {
        self.state.arrived.notified().await;
    }
    /// Waits until a client has closed a connection on which the server was not done.
    pub async fn left(&self) {
        self.state.left.notified().await;
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One line of the journal, while it is written.
#[derive(Clone)]
struct Record {
    state: Arc<State>,
    at: usize,
}

impl Record {
    fn change(&self, change: impl FnOnce(&mut Entry)) {
        change(&mut lock(&self.state.journal)[self.at]);
        self.state.changed.notify_waiters();
    }
    fn stage(&self, stage: Stage) {
        self.change(|entry| entry.stage = entry.stage.max(stage));
    }
    fn end(&self, end: End) {
        self.change(|entry| {
            entry.end = end;
            entry.written_at.get_or_insert_with(Instant::now);
        });
        if end == End::Client {
            self.state.left.notify_one();
        }
    }
}

/// What is written by hand instead of an answer, whether nothing is missing once it is, and its line in the journal.
type Takeover = (Vec<Act>, bool, Record);

/// Hyper gives the socket back: what follows is written by hand.
#[derive(Debug, thiserror::Error)]
#[error("the socket is taken over")]
struct TakenOver;

async fn connection(stream: TcpStream, state: Arc<State>) {
    // Without it a byte per write would not be a byte per packet.
    let _ = stream.set_nodelay(true);
    let takeover: Arc<Mutex<Option<Takeover>>> = Arc::default();
    let service = service_fn(|request: Request<Incoming>| {
        let (state, takeover) = (Arc::clone(&state), Arc::clone(&takeover));
        Box::pin(async move {
            let Some((seen, received_at)) = read(request).await else { return Err(TakenOver) };
            let (answer, record) = answer(&state, &seen, received_at);
            let pause = lock(&state.pause).clone();
            if let Some(pause) = pause {
                tokio::time::sleep(pause()).await;
            }
            match answer {
                Written::Response(response) => Ok(response),
                Written::Acts { acts, whole } => {
                    *lock(&takeover) = Some((acts, whole, record));
                    Err(TakenOver)
                }
            }
        })
    });
    let mut connection = http1::Builder::new().serve_connection(TokioIo::new(stream), service);
    // An error is either the takeover or a client that went away, which the body of its answer notices.
    let _ = poll_fn(|cx| connection.poll_without_shutdown(cx)).await;
    let stream = connection.into_parts().io.into_inner();
    let taken = lock(&takeover).take();
    if let Some((acts, whole, record)) = taken {
        act(stream, acts, whole, &record).await;
    }
}

async fn read(request: Request<Incoming>) -> Option<(Seen, Instant)> {
    let (head, mut incoming) = request.into_parts();
    let mut bytes = Vec::new();
    while let Some(frame) = poll_fn(|cx| Pin::new(&mut incoming).poll_frame(cx)).await {
        if let Ok(data) = frame.ok()?.into_data() {
            bytes.extend_from_slice(&data);
        }
    }
    let received_at = Instant::now();
    let path = head.uri.path_and_query().map_or("/", |path| path.as_str()).to_owned();
    let headers = head
        .headers
        .iter()
        .map(|(name, value)| (name.as_str().to_owned(), String::from_utf8_lossy(value.as_bytes()).into_owned()))
        .collect();
    let body = serde_json::from_slice(&bytes).unwrap_or(Value::Null);
    let (dialect, endpoint) = route(&path, &headers, &body);
    let body_sha256 = hex(&Sha256::digest(&bytes));
    let seen = Seen { method: head.method.to_string(), path, headers, body, dialect, endpoint, body_sha256 };
    Some((seen, received_at))
}

enum Written {
    Response(Response<Pieces>),
    /// `whole` if nothing is missing once they are played.
    Acts {
        acts: Vec<Act>,
        whole: bool,
    },
}

fn answer(state: &Arc<State>, seen: &Seen, received_at: Instant) -> (Written, Record) {
    let question = matches!(seen.endpoint, Endpoint::Generate { .. });
    let (n, ordinal, record) = {
        let mut all = lock(&state.seen);
        let mut journal = lock(&state.journal);
        let mut questions = lock(&state.questions);
        let n = if state.bare { journal.len() } else { questions.iter().sum() };
        let mine = &mut questions[seen.dialect as usize];
        let ordinal = *mine;
        *mine += usize::from(question);
        let at = journal.len();
        all.push(seen.clone());
        let key = seen.key().map(|key| SecretString::from(key.to_owned()));
        journal.push(Entry {
            dialect: seen.dialect,
            endpoint: seen.endpoint.clone(),
            method: seen.method.clone(),
            path: seen.path.clone(),
            ordinal,
            key_fingerprint: KeyIdentity::of(seen.dialect.name(), key.as_ref()).fingerprint,
            body_sha256: seen.body_sha256.clone(),
            model: seen.model(),
            answered: String::new(),
            status: None,
            provider_request_id: None,
            usage: None,
            stage: Stage::Received,
            end: End::Open,
            bytes_sent: 0,
            received_at,
            written_at: None,
        });
        (n, ordinal, Record { state: Arc::clone(state), at })
    };
    state.arrived.notify_one();
    let fault = lock(&state.rules).iter().find(|(when, _)| when.holds(seen, ordinal)).map(|(_, fault)| fault.clone());
    let id = format!("gen-{}", record.at + 1);
    let model = seen.model().unwrap_or_default();
    let streams = seen.wants_stream() && !state.documents.load(Ordering::Relaxed);
    if let Some(fault) = fault {
        let reply = match (state.script)(seen, n) {
            Answer::Reply(reply) => reply,
            Answer::Refused { .. } | Answer::Acts(_) => Reply::text("spoiled"),
        };
        record.change(|entry| {
            entry.answered = format!("{fault:?}");
            entry.provider_request_id = Some(id.clone());
            entry.usage.clone_from(&reply.usage);
        });
        let spoiled = Spoiled { dialect: seen.dialect, stream: streams, reply: &reply, id: &id, model: &model };
        return (Written::Acts { acts: fault.acts(&spoiled), whole: fault.is_whole() }, record);
    }
    let (answer, name) = if state.bare {
        ((state.script)(seen, n), "script")
    } else if !question {
        let journal = lock(&state.journal);
        (catalog(seen, &journal), "catalog")
    } else if let Some(refused) = strict::check(seen) {
        (refused, "refused")
    } else {
        ((state.script)(seen, n), "reply")
    };
    record.change(|entry| name.clone_into(&mut entry.answered));
    let written = match answer {
        Answer::Acts(acts) => Written::Acts { acts, whole: true },
        Answer::Refused { status, headers, body } => {
            record.change(|entry| entry.status = Some(status));
            let mut response = Response::builder().status(status).header("content-type", "application/json");
            for (name, value) in headers {
                response = response.header(name, value);
            }
            let pieces = Pieces::new(VecDeque::from([Bytes::from(body.to_string())]), &record);
            Written::Response(response.body(pieces).expect("a script's headers can be sent"))
        }
        Answer::Reply(reply) => {
            record.change(|entry| {
                entry.status = Some(200);
                entry.provider_request_id = Some(id.clone());
                entry.usage.clone_from(&reply.usage);
            });
            Written::Response(good(seen, streams, &reply, &id, &model, &record))
        }
    };
    (written, record)
}

fn good(seen: &Seen, streams: bool, reply: &Reply, id: &str, model: &str, record: &Record) -> Response<Pieces> {
    let mut response = Response::builder();
    match seen.dialect {
        Dialect::Gemini => {}
        Dialect::OpenRouter => response = response.header("x-generation-id", id),
        Dialect::OpenAi => response = response.header("x-request-id", id),
    }
    let data = |event: &Value| Bytes::from(format!("data: {event}\n\n"));
    // Without `alt=sse` a stream of Gemini is one list.
    let listed = seen.dialect == Dialect::Gemini && !seen.path.contains("alt=sse");
    let (kind, pieces) = if streams && !listed {
        let mut pieces: VecDeque<Bytes> = reply.events(seen.dialect, id, model).iter().map(data).collect();
        if seen.dialect == Dialect::OpenRouter {
            pieces.push_front(Bytes::from_static(b": OPENROUTER PROCESSING\n\n"));
        }
        if seen.dialect != Dialect::Gemini {
            pieces.push_back(Bytes::from_static(b"data: [DONE]\n\n"));
        }
        ("text/event-stream", pieces)
    } else if streams {
        let list = Value::Array(reply.events(seen.dialect, id, model));
        ("application/json", VecDeque::from([Bytes::from(list.to_string())]))
    } else {
        let document = reply.document(seen.dialect, id, model).to_string();
        ("application/json", VecDeque::from([Bytes::from(document)]))
    };
    let body = Pieces::new(pieces, record);
    response.header("content-type", kind).body(body).expect("our own headers can be sent")
}

/// A body in pieces that notes how far it got.
struct Pieces {
    rest: VecDeque<Bytes>,
    record: Record,
}

impl Pieces {
    fn new(rest: VecDeque<Bytes>, record: &Record) -> Self {
        Self { rest, record: record.clone() }
    }
}

impl Body for Pieces {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let piece = self.rest.pop_front();
        let stage = if self.rest.is_empty() { Stage::Finished } else { Stage::Body };
        self.record.change(|entry| {
            entry.stage = entry.stage.max(stage);
            entry.written_at = piece.as_ref().map(|_| Instant::now()).or(entry.written_at);
        });
        Poll::Ready(piece.map(|piece| Ok(Frame::data(piece))))
    }
    fn is_end_stream(&self) -> bool {
        self.rest.is_empty()
    }
    fn size_hint(&self) -> SizeHint {
        // One piece has a length; a stream is chunked.
        match self.rest.len() {
            1 => SizeHint::with_exact(u64::try_from(self.rest[0].len()).unwrap_or(u64::MAX)),
            _ => SizeHint::default(),
        }
    }
}

impl Drop for Pieces {
    fn drop(&mut self) {
        self.record.end(if self.rest.is_empty() { End::Server } else { End::Client });
    }
}

/// Plays `acts` on the socket.
async fn act(mut stream: TcpStream, acts: Vec<Act>, whole: bool, record: &Record) {
    for act in acts {
        let written = match act {
            Act::Bytes(bytes) => write(&mut stream, &bytes, record).await,
            Act::Trickle(bytes) => {
                let mut written = true;
                for byte in bytes {
                    written = written && write(&mut stream, &[byte], record).await;
                    tokio::task::yield_now().await;
                }
                written
            }
            Act::Repeat(bytes, times) => {
                let mut written = true;
                for _ in 0..times {
                    written = written && write(&mut stream, &bytes, record).await;
                }
                written
            }
            Act::CommentsForever => {
                let mut pace = tokio::time::interval(COMMENT_EVERY);
                let comment = super::chunk(b": OPENROUTER PROCESSING\n\n");
                while write(&mut stream, &comment, record).await {
                    pace.tick().await;
                }
                false
            }
            Act::Stall => {
                // However the client leaves, it has left.
                let _ = stream.read_to_end(&mut Vec::new()).await;
                false
            }
            Act::Reset => {
                // A failure would only make the end a polite one.
                let _ = stream.set_zero_linger();
                record.end(End::Server);
                return;
            }
        };
        if !written {
            record.end(End::Client);
            return;
        }
    }
    if whole {
        record.stage(Stage::Finished);
    }
    record.end(End::Server);
    let _ = stream.shutdown().await;
    let _ = stream.read_to_end(&mut Vec::new()).await;
}

/// Writes and notes how far the answer got: its head ends with an empty line.
async fn write(stream: &mut TcpStream, bytes: &[u8], record: &Record) -> bool {
    let written_at = Instant::now();
    if stream.write_all(bytes).await.is_err() {
        return false;
    }
    let head_end = bytes.windows(4).position(|window| window == b"\r\n\r\n").map(|at| at + 4);
    let status =
        bytes.strip_prefix(b"HTTP/1.1 ").and_then(|rest| std::str::from_utf8(rest.get(..3)?).ok()?.parse().ok());
    record.change(|entry| {
        entry.bytes_sent += u64::try_from(bytes.len()).unwrap_or_default();
        entry.written_at = Some(written_at);
        entry.status = entry.status.or(status);
        let reached = match (entry.stage, head_end) {
            (Stage::Received, Some(end)) if end == bytes.len() => Stage::Headers,
            (Stage::Received, None) => Stage::Received,
            _ => Stage::Body,
        };
        entry.stage = entry.stage.max(reached);
    });
    true
}
