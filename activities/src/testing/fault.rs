//! The faults that the server can be told to have, and when.

use super::{
    act::{Act, answer, chunk, end, frames, gzip, stream_head},
    dialect::Dialect,
    reply::Reply,
    route::Seen,
};
use flate2::{Compress, Compression, FlushCompress};
use serde_json::{Value, json};
use std::{fmt, sync::Arc};

/// What goes wrong with an answer. The good answer that it spoils is that of the script.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    ResetBeforeHeaders,
    CloseBeforeHeaders,
    ResetAfterHeaders,
    ResetMidBody,
    CloseMidBody,
    /// The connection breaks when all was said and its proper end is missing.
    CloseAfterFinish,
    /// A clean end that nobody has announced. Gemini has counted on the way there.
    NoFinishReason,
    /// A stream without `[DONE]`, which Gemini never sends.
    NoDone,
    StallBeforeHeaders,
    StallAfterHeaders,
    StallMidBody,
    /// Comment lines and a clean end.
    CommentsOnly,
    CommentsForever,
    /// CRLF line ends, comments, no space after the colon, every chunk cut in the middle of a character or a line end.
    Split,
    /// One byte per chunk and packet.
    OneByte,
    ErrorMidStream,
    /// Status 200, then an error where the answer should be.
    ErrorInside,
    /// 429, with `Retry-After` in seconds where given.
    RateLimited(Option<u32>),
    /// 402: nothing left.
    NoBalance,
    /// 402 with `Retry-After: 2`: running requests fill the budget.
    BudgetInFlight,
    /// 401.
    BadKey,
    /// 500 with a page in HTML.
    HtmlError,
    /// 200 with a page in HTML.
    HtmlPage,
    UsageAbsent,
    /// A partial snapshot of usage comes before the last one.
    UsageTwice,
    UnknownFinishReason,
    /// A good status and 64 MB.
    HugeBody,
    /// 503 and 64 MB.
    HugeError,
    Gzip,
    /// Says gzip and is not.
    GzipDamaged,
    /// 4 GB of spaces, compressed.
    GzipBomb,
    /// 307 to that address.
    Redirect(String),
}

/// Bytes of a body that is too large; the client has to give up long before.
const HUGE_PIECE: usize = 64 * 1024;
const HUGE_TIMES: usize = 1024;
/// Unpacked bytes of one piece of the bomb, and how many there are.
const BOMB_PIECE: usize = 1024 * 1024;
const BOMB_TIMES: usize = 4096;

type Pick = dyn Fn(&Seen, usize) -> bool + Send + Sync;

/// Which requests a fault is for.
#[derive(Clone)]
pub enum When {
    /// The n-th question of a dialect, from 0.
    Nth(Dialect, usize),
    /// Every question of a dialect.
    Every(Dialect),
    /// What a function picks, among all requests; its number is that of [`When::Nth`].
    Picked(Arc<Pick>),
}

impl When {
    /// Requests for which `pick` says so.
    #[must_use]
    pub fn picked(pick: impl Fn(&Seen, usize) -> bool + Send + Sync + 'static) -> Self {
        Self::Picked(Arc::new(pick))
    }
    pub(super) fn holds(&self, seen: &Seen, ordinal: usize) -> bool {
        let question = matches!(seen.endpoint, super::Endpoint::Generate { .. });
        match self {
            Self::Nth(dialect, n) => question && seen.dialect == *dialect && ordinal == *n,
            Self::Every(dialect) => question && seen.dialect == *dialect,
            Self::Picked(pick) => pick(seen, ordinal),
        }
    }
}

impl fmt::Debug for When {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nth(dialect, n) => write!(f, "question {n} of {dialect:?}"),
            Self::Every(dialect) => write!(f, "every question of {dialect:?}"),
            Self::Picked(_) => f.write_str("what a function picks"),
        }
    }
}

/// What a fault needs to know of the answer that it spoils.
pub(super) struct Spoiled<'a> {
    pub dialect: Dialect,
    pub stream: bool,
    pub reply: &'a Reply,
    pub id: &'a str,
    pub model: &'a str,
}

impl Spoiled<'_> {
    fn id_headers(&self) -> String {
        match self.dialect {
            Dialect::Gemini => String::new(),
            Dialect::OpenRouter => format!("x-generation-id: {}\r\n", self.id),
            Dialect::OpenAi => format!("x-request-id: {}\r\n", self.id),
        }
    }
    fn events(&self) -> Vec<Value> {
        self.reply.events(self.dialect, self.id, self.model)
    }
    fn document(&self) -> Value {
        self.reply.document(self.dialect, self.id, self.model)
    }
    fn done(&self) -> &'static [u8] {
        if self.dialect == Dialect::Gemini { b"" } else { b"data: [DONE]\n\n" }
    }
    /// The bytes of the good body.
    fn body(&self) -> Vec<u8> {
        self.body_of(self.reply)
    }
    fn body_of(&self, reply: &Reply) -> Vec<u8> {
        if self.stream {
            [&frames(&reply.events(self.dialect, self.id, self.model)), self.done()].concat()
        } else {
            reply.document(self.dialect, self.id, self.model).to_string().into_bytes()
        }
    }
    fn head(&self, extra: &str) -> Vec<u8> {
        let head = stream_head(&format!("{}{extra}", self.id_headers()));
        if self.stream {
            return head;
        }
        String::from_utf8_lossy(&head).replace("text/event-stream", "application/json").into_bytes()
    }
    fn whole(&self, body: &[u8]) -> Vec<Act> {
        vec![Act::Bytes([self.head(""), chunk(body), end()].concat())]
    }
    fn half(&self) -> Vec<u8> {
        let body = if self.stream {
            let events = self.events();
            // Something of the answer, and never its end.
            frames(&events[..events.len().saturating_sub(2).max(1)])
        } else {
            let body = self.body();
            body[..body.len() / 2].to_vec()
        };
        [self.head(""), chunk(&body)].concat()
    }
    fn refused(&self, status: u16, headers: &str, words: &str) -> Vec<Act> {
        let body = self.dialect.error(status, words).to_string();
        let headers = format!("{}{headers}", self.id_headers());
        answer(status, &headers, "application/json", body.as_bytes())
    }
    fn without_finish(&self) -> Vec<u8> {
        let mut reply = self.reply.clone();
        reply.usage = None;
        if self.stream {
            let mut events = reply.events(self.dialect, self.id, self.model);
            events.pop();
            if let (Dialect::Gemini, Some(told)) = (self.dialect, &self.reply.usage) {
                for (event, output) in events.iter_mut().zip(1..) {
                    let so_far = super::Told { output, reasoning: 0, ..told.clone() };
                    event[super::Told::field(self.dialect)] = so_far.value(self.dialect);
                }
            }
            return frames(&events);
        }
        let mut document = reply.document(self.dialect, self.id, self.model);
        for pointer in ["/candidates/0", "/choices/0"] {
            if let Some(choice) = document.pointer_mut(pointer).and_then(Value::as_object_mut) {
                choice.remove("finishReason");
                choice.remove("finish_reason");
            }
        }
        document.to_string().into_bytes()
    }
}

impl Fault {
    /// Whether an answer with this fault has a proper end.
    pub(super) fn is_whole(&self) -> bool {
        !matches!(self, Self::CloseBeforeHeaders | Self::CloseMidBody | Self::CloseAfterFinish)
    }

    pub(super) fn acts(&self, spoiled: &Spoiled<'_>) -> Vec<Act> {
        let Spoiled { dialect, stream, reply, .. } = *spoiled;
        let finished = || [spoiled.head(""), chunk(&spoiled.body())].concat();
        match self {
            Self::ResetBeforeHeaders => vec![Act::Reset],
            Self::CloseBeforeHeaders => Vec::new(),
            Self::ResetAfterHeaders => vec![Act::Bytes(spoiled.head("")), Act::Reset],
            Self::ResetMidBody => vec![Act::Bytes(spoiled.half()), Act::Reset],
            Self::CloseMidBody => vec![Act::Bytes(spoiled.half())],
            Self::CloseAfterFinish => vec![Act::Bytes(finished())],
            Self::NoFinishReason => spoiled.whole(&spoiled.without_finish()),
            Self::NoDone => spoiled.whole(&if stream { frames(&spoiled.events()) } else { spoiled.body() }),
            Self::StallBeforeHeaders => vec![Act::Stall],
            Self::StallAfterHeaders => vec![Act::Bytes(spoiled.head("")), Act::Stall],
            Self::StallMidBody => vec![Act::Bytes(spoiled.half()), Act::Stall],
            Self::CommentsOnly => spoiled.whole(b": OPENROUTER PROCESSING\n\n: OPENROUTER PROCESSING\n\n"),
            Self::CommentsForever => vec![Act::Bytes(spoiled.head("")), Act::CommentsForever],
            Self::Split => vec![Act::Bytes(spoiled.head("")), Act::Bytes(cut(&odd(spoiled))), Act::Bytes(end())],
            Self::OneByte => {
                let bytes = odd(spoiled).iter().flat_map(|byte| chunk(&[*byte])).collect();
                vec![Act::Bytes(spoiled.head("")), Act::Trickle(bytes), Act::Bytes(end())]
            }
            Self::ErrorMidStream => {
                let events = spoiled.events();
                let begun = frames(&events[..events.len().saturating_sub(2).max(1)]);
                spoiled.whole(&[begun, dialect.error_in_stream()].concat())
            }
            Self::ErrorInside => {
                let error = dialect.error(503, "UNAVAILABLE");
                spoiled.whole(&if stream { frames(&[error]) } else { error.to_string().into_bytes() })
            }
            Self::RateLimited(wait) => {
                let hint = wait.map(|seconds| format!("retry-after: {seconds}\r\n")).unwrap_or_default();
                spoiled.refused(429, &hint, "RESOURCE_EXHAUSTED")
            }
            Self::NoBalance => {
                let body = match dialect {
                    Dialect::Gemini => dialect.error(402, "RESOURCE_EXHAUSTED"),
                    Dialect::OpenRouter => json!({"error": {"code": 402, "message": "upstream text",
                        "metadata": {"limit_source": "openrouter_credits"}}}),
                    Dialect::OpenAi => dialect.error(402, "insufficient_quota"),
                };
                answer(402, &spoiled.id_headers(), "application/json", body.to_string().as_bytes())
            }
            Self::BudgetInFlight => {
                let body = json!({"error": {"code": 402, "message": "upstream text",
                    "metadata": {"limit_source": "openrouter_in_flight_budget"}}});
                let headers = format!("{}retry-after: 2\r\n", spoiled.id_headers());
                answer(402, &headers, "application/json", body.to_string().as_bytes())
            }
            Self::BadKey => spoiled.refused(401, "", "UNAUTHENTICATED"),
            Self::HtmlError => answer(500, &spoiled.id_headers(), "text/html", b"<html><h1>It broke</h1></html>"),
            Self::HtmlPage => answer(200, &spoiled.id_headers(), "text/html", b"<html>please log in</html>"),
            Self::UsageAbsent => spoiled.whole(&spoiled.body_of(&reply.clone().with_usage(None))),
            Self::UsageTwice => spoiled.whole(&twice(spoiled)),
            Self::UnknownFinishReason => {
                let mut reply = reply.clone();
                reply.finish_reason = "some_new_reason".to_owned();
                spoiled.whole(&spoiled.body_of(&reply))
            }
            Self::HugeBody => {
                let begin = if stream { b"data: \"".as_slice() } else { b"\"" };
                vec![Act::Bytes([spoiled.head(""), chunk(begin)].concat()), huge(), Act::Bytes(end())]
            }
            Self::HugeError => {
                let head = format!(
                    "HTTP/1.1 503 X\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\nconnection: close\r\n{}\r\n",
                    spoiled.id_headers()
                );
                vec![Act::Bytes(head.into_bytes()), huge(), Act::Bytes(end())]
            }
            Self::Gzip => {
                let head = spoiled.head("content-encoding: gzip\r\n");
                vec![Act::Bytes([head, chunk(&gzip(&spoiled.body())), end()].concat())]
            }
            Self::GzipDamaged => {
                let head = spoiled.head("content-encoding: gzip\r\n");
                vec![Act::Bytes([head, chunk(b"this is not gzip"), end()].concat())]
            }
            Self::GzipBomb => {
                let head = spoiled.head("content-encoding: gzip\r\n");
                let begin = [0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255];
                vec![
                    Act::Bytes([head, chunk(&begin)].concat()),
                    Act::Repeat(chunk(&bomb_piece()), BOMB_TIMES),
                    Act::Bytes(end()),
                ]
            }
            Self::Redirect(to) => answer(307, &format!("location: {to}\r\n"), "text/plain", b""),
        }
    }
}

/// The good body as a proxy may pass it on.
fn odd(spoiled: &Spoiled<'_>) -> Vec<u8> {
    let body = spoiled.body();
    if !spoiled.stream {
        return body;
    }
    let text = String::from_utf8_lossy(&body).replace('\n', "\r\n").replace("data: ", "data:");
    format!(": hi\r\n\r\n{text}").into_bytes()
}

/// Chunks that end after the first byte of every character of several bytes and after every CR.
fn cut(bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut piece = Vec::new();
    for &byte in bytes {
        piece.push(byte);
        if byte >= 0xc0 || byte == b'\r' {
            out.extend(chunk(&piece));
            piece.clear();
        }
    }
    if !piece.is_empty() {
        out.extend(chunk(&piece));
    }
    out
}

/// The good body with a smaller snapshot of usage on an earlier event, which still has choices.
fn twice(spoiled: &Spoiled<'_>) -> Vec<u8> {
    if !spoiled.stream {
        return spoiled.document().to_string().into_bytes();
    }
    let early = super::Told { prompt: 5, output: 1, ..super::Told::default() };
    let mut events = spoiled.events();
    events[0][super::Told::field(spoiled.dialect)] = early.value(spoiled.dialect);
    [&frames(&events), spoiled.done()].concat()
}

fn huge() -> Act {
    Act::Repeat(chunk(&vec![b'x'; HUGE_PIECE]), HUGE_TIMES)
}

/// A deflate block of spaces that ends on a byte and refers to nothing before it, so that it can be repeated.
fn bomb_piece() -> Vec<u8> {
    let mut compress = Compress::new(Compression::best(), false);
    let mut out = Vec::with_capacity(BOMB_PIECE);
    compress.compress_vec(&vec![b' '; BOMB_PIECE], &mut out, FlushCompress::Full).expect("memory is large enough");
    out
}
