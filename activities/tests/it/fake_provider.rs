//! A provider to be mistreated by: it speaks each dialect over a real socket, byte by byte as a test orders it.

use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::Notify,
    task::JoinHandle,
};

/// A request as it arrived.
#[derive(Clone, Debug)]
pub struct Seen {
    pub path: String,
    pub headers: BTreeMap<String, String>,
    pub body: Value,
}

/// What the server does with a request, in order; afterwards it closes the connection.
#[derive(Clone, Debug)]
pub enum Act {
    Bytes(Vec<u8>),
    /// One write, and one packet as far as the kernel goes along, per byte.
    Trickle(Vec<u8>),
    /// Comment lines until the client goes away.
    CommentsForever,
    /// Nothing until the client goes away.
    Stall,
    /// RST instead of FIN: what was not read yet is lost.
    Reset,
}

type Script = dyn Fn(&Seen, usize) -> Vec<Act> + Send + Sync;

/// The running server; it ends when this is dropped.
pub struct FakeProvider {
    address: String,
    seen: Arc<Mutex<Vec<Seen>>>,
    arrived: Arc<Notify>,
    left: Arc<Notify>,
    task: JoinHandle<()>,
}

impl Drop for FakeProvider {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl FakeProvider {
    /// Answers request `n` (0-based) with what `script` says.
    pub async fn start(script: impl Fn(&Seen, usize) -> Vec<Act> + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (seen, arrived, left) = (Arc::default(), Arc::new(Notify::new()), Arc::new(Notify::new()));
        let script: Arc<Script> = Arc::new(script);
        let task = tokio::spawn({
            let (seen, arrived, left) = (Arc::clone(&seen), Arc::clone(&arrived), Arc::clone(&left));
            async move {
                while let Ok((stream, _)) = listener.accept().await {
                    tokio::spawn(serve(
                        stream,
                        Arc::clone(&script),
                        Arc::clone(&seen),
                        Arc::clone(&arrived),
                        Arc::clone(&left),
                    ));
                }
            }
        });
        Self { address, seen, arrived, left, task }
    }

    /// Answers every request alike.
    pub async fn always(acts: Vec<Act>) -> Self {
        Self::start(move |_, _| acts.clone()).await
    }

    pub fn base(&self) -> String {
        format!("http://{}", self.address)
    }
    pub fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }
    /// Waits for the next request that arrives.
    pub async fn arrived(&self) {
        self.arrived.notified().await;
    }
    /// Waits until a client has closed a connection on which the server stalled.
    pub async fn left(&self) {
        self.left.notified().await;
    }
}

async fn serve(
    mut stream: TcpStream,
    script: Arc<Script>,
    seen: Arc<Mutex<Vec<Seen>>>,
    arrived: Arc<Notify>,
    left: Arc<Notify>,
) {
    stream.set_nodelay(true).unwrap();
    let Some(request) = read_request(&mut stream).await else { return };
    let n = {
        let mut seen = seen.lock().unwrap();
        seen.push(request.clone());
        seen.len() - 1
    };
    arrived.notify_one();
    for act in script(&request, n) {
        let written = match act {
            Act::Bytes(bytes) => stream.write_all(&bytes).await,
            Act::Trickle(bytes) => {
                let mut written = Ok(());
                for byte in bytes {
                    written = stream.write_all(&[byte]).await;
                    tokio::task::yield_now().await;
                }
                written
            }
            Act::CommentsForever => {
                let mut pace = tokio::time::interval(Duration::from_millis(10));
                loop {
                    pace.tick().await;
                    if stream.write_all(&chunk(b": OPENROUTER PROCESSING\n\n")).await.is_err() {
                        break;
                    }
                }
                left.notify_one();
                return;
            }
            Act::Stall => {
                let mut rest = Vec::new();
                let _ = stream.read_to_end(&mut rest).await;
                left.notify_one();
                return;
            }
            Act::Reset => {
                stream.set_zero_linger().unwrap();
                return;
            }
        };
        if written.is_err() {
            left.notify_one();
            return;
        }
    }
    let _ = stream.shutdown().await;
    let mut rest = Vec::new();
    let _ = stream.read_to_end(&mut rest).await;
}

async fn read_request(stream: &mut TcpStream) -> Option<Seen> {
    let mut bytes = Vec::new();
    let mut buffer = [0_u8; 16 * 1024];
    let head_end = loop {
        if let Some(at) = bytes.windows(4).position(|w| w == b"\r\n\r\n") {
            break at;
        }
        let n = stream.read(&mut buffer).await.ok().filter(|n| *n > 0)?;
        bytes.extend_from_slice(&buffer[..n]);
    };
    let head = String::from_utf8_lossy(&bytes[..head_end]).into_owned();
    let mut lines = head.lines();
    let path = lines.next()?.split(' ').nth(1)?.to_owned();
    let headers: BTreeMap<String, String> = lines
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
        .collect();
    let length: usize = headers.get("content-length").and_then(|v| v.parse().ok()).unwrap_or(0);
    let mut body = bytes[head_end + 4..].to_vec();
    while body.len() < length {
        let n = stream.read(&mut buffer).await.ok().filter(|n| *n > 0)?;
        body.extend_from_slice(&buffer[..n]);
    }
    Some(Seen { path, headers, body: serde_json::from_slice(&body).unwrap_or(Value::Null) })
}

/// The head of a stream that is chunked, with further header lines.
pub fn stream_head(extra: &str) -> Vec<u8> {
    format!(
        "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\nconnection: close\r\n{extra}\r\n"
    )
    .into_bytes()
}

/// One chunk of the chunked encoding.
pub fn chunk(bytes: &[u8]) -> Vec<u8> {
    let mut out = format!("{:x}\r\n", bytes.len()).into_bytes();
    out.extend_from_slice(bytes);
    out.extend_from_slice(b"\r\n");
    out
}

/// The proper end of the chunked encoding.
pub fn end() -> Vec<u8> {
    b"0\r\n\r\n".to_vec()
}

/// A complete stream with a clean end.
pub fn stream(body: &[u8]) -> Vec<Act> {
    vec![Act::Bytes([stream_head(""), chunk(body), end()].concat())]
}

/// A complete answer with a length.
pub fn answer(status: u16, headers: &str, content_type: &str, body: &[u8]) -> Vec<Act> {
    let head = format!(
        "HTTP/1.1 {status} X\r\ncontent-type: {content_type}\r\ncontent-length: {}\r\nconnection: close\r\n{headers}\r\n",
        body.len()
    );
    vec![Act::Bytes([head.as_bytes(), body].concat())]
}

/// A complete JSON answer.
pub fn answer_json(status: u16, headers: &str, body: &Value) -> Vec<Act> {
    answer(status, headers, "application/json", body.to_string().as_bytes())
}

/// `data:` lines, one event each.
pub fn frames(events: &[Value]) -> Vec<u8> {
    events.iter().map(|event| format!("data: {event}\n\n")).collect::<String>().into_bytes()
}

/// A gzip file of one stored block each 60 kB: enough to be decoded, and no compressor needed.
pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut out = vec![0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255];
    let mut pieces = bytes.chunks(60_000).peekable();
    while let Some(piece) = pieces.next() {
        out.push(u8::from(pieces.peek().is_none()));
        let length = u16::try_from(piece.len()).unwrap();
        out.extend_from_slice(&length.to_le_bytes());
        out.extend_from_slice(&(!length).to_le_bytes());
        out.extend_from_slice(piece);
    }
    let crc = bytes.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| if crc & 1 == 1 { (crc >> 1) ^ 0xedb8_8320 } else { crc >> 1 })
    });
    out.extend_from_slice(&(!crc).to_le_bytes());
    out.extend_from_slice(&u32::try_from(bytes.len()).unwrap().to_le_bytes());
    out
}

/// The dialects that the server speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    Gemini,
    OpenRouter,
    OpenAi,
}

impl Dialect {
    pub const ALL: [Self; 3] = [Self::Gemini, Self::OpenRouter, Self::OpenAi];

    /// The provider's name in our records.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gemini => "gemini",
            Self::OpenRouter => "openrouter",
            Self::OpenAi => "openai_compatible",
        }
    }
    pub fn key_setting(self) -> &'static str {
        match self {
            Self::Gemini => "GEMINI_API_KEY",
            Self::OpenRouter => "OPENROUTER_API_KEY",
            Self::OpenAi => "OPENAI_API_KEY",
        }
    }
    /// A finish reason in the words of the dialect.
    pub fn reason(self, reason: &str) -> String {
        match (self, reason) {
            (Self::Gemini, "length") => "MAX_TOKENS".to_owned(),
            (Self::Gemini, "content_filter") => "SAFETY".to_owned(),
            (Self::Gemini, other) => other.to_uppercase(),
            (_, other) => other.to_owned(),
        }
    }
    /// A piece of text.
    pub fn text(self, text: &str) -> Value {
        match self {
            Self::Gemini => {
                json!({"candidates": [{"index": 0, "content": {"role": "model", "parts": [{"text": text}]}}],
                "modelVersion": "served-model", "responseId": "gen-7"})
            }
            _ => json!({"id": "gen-7", "object": "chat.completion.chunk", "created": 1, "model": "served-model",
                "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": null}]}),
        }
    }
    /// A call of the tool `read`, whole.
    pub fn tool_call(self, arguments: &Value) -> Value {
        match self {
            Self::Gemini => json!({"candidates": [{"index": 0, "content": {"role": "model", "parts": [
                {"functionCall": {"name": "read", "args": arguments}, "thoughtSignature": "c2lnbmVk"}]}}]}),
            _ => json!({"id": "gen-7", "model": "served-model", "choices": [{"index": 0, "delta": {"tool_calls": [
                {"index": 0, "id": "call_a", "type": "function",
                 "function": {"name": "read", "arguments": arguments.to_string()}}]}, "finish_reason": null}]}),
        }
    }
    /// The end, with a reason and perhaps usage in the same event.
    pub fn finish(self, reason: &str, usage: Option<(u64, u64)>) -> Value {
        let mut event = match self {
            Self::Gemini => json!({"candidates": [{"index": 0, "finishReason": self.reason(reason),
                "content": {"role": "model", "parts": [{"text": ""}]}}]}),
            _ => json!({"id": "gen-7", "model": "served-model",
                "choices": [{"index": 0, "delta": {}, "finish_reason": self.reason(reason)}]}),
        };
        if let Some((prompt, output)) = usage {
            self.put_usage(&mut event, prompt, output);
        }
        event
    }
    /// Usage on its own, as the dialects send it after the end.
    pub fn usage(self, prompt: u64, output: u64) -> Value {
        let mut event = match self {
            Self::Gemini => json!({}),
            _ => json!({"id": "gen-7", "model": "served-model", "choices": []}),
        };
        self.put_usage(&mut event, prompt, output);
        event
    }
    fn put_usage(self, event: &mut Value, prompt: u64, output: u64) {
        match self {
            Self::Gemini => {
                event["usageMetadata"] = json!({"promptTokenCount": prompt, "candidatesTokenCount": output,
                    "totalTokenCount": prompt + output});
            }
            Self::OpenRouter => {
                event["usage"] = json!({"prompt_tokens": prompt, "completion_tokens": output, "cost": 0.00031});
            }
            Self::OpenAi => event["usage"] = json!({"prompt_tokens": prompt, "completion_tokens": output}),
        }
    }
    /// A well-behaved answer of one text.
    pub fn good(self, text: &str) -> Vec<u8> {
        let mut body = frames(&[self.text(text), self.finish("stop", None), self.usage(11, 7)]);
        if self != Self::Gemini {
            body.extend_from_slice(b"data: [DONE]\n\n");
        }
        body
    }
    /// An error in the shape of the dialect.
    pub fn error(self, code: u16, status: &str) -> Value {
        match self {
            Self::Gemini => json!({"error": {"code": code, "status": status, "message": "upstream text"}}),
            Self::OpenRouter => json!({"error": {"code": code, "message": "upstream text",
                "metadata": {"error_type": status.to_lowercase()}}}),
            Self::OpenAi => {
                json!({"error": {"message": "upstream text", "type": status.to_lowercase(), "param": null, "code": null}})
            }
        }
    }
    /// The same error, as it arrives in the middle of a stream.
    pub fn error_in_stream(self) -> Vec<u8> {
        match self {
            // Bare and pretty, without `data:`.
            Self::Gemini => serde_json::to_vec_pretty(&self.error(503, "UNAVAILABLE")).unwrap(),
            Self::OpenRouter => frames(&[json!({"id": "gen-7", "model": "served-model",
                "error": {"code": 502, "message": "upstream text", "metadata": {"error_type": "provider_unavailable"}},
                "choices": [{"index": 0, "delta": {"content": ""}, "finish_reason": "error"}]})]),
            Self::OpenAi => frames(&[
                json!({"error": {"message": "upstream text", "type": "server_error", "code": "server_error"}}),
            ]),
        }
    }
}
