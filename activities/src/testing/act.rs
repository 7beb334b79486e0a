//! What the server does with a connection, byte by byte, and the builders of such bytes.

use flate2::{Compression, write::GzEncoder};
use serde_json::Value;
use std::io::Write as _;

/// What the server does with a request, in order; afterwards it closes the connection.
#[derive(Clone, Debug)]
pub enum Act {
    Bytes(Vec<u8>),
    /// One write, and one packet as far as the kernel goes along, per byte.
    Trickle(Vec<u8>),
    /// The same bytes so many times: a body that is too large to be held.
    Repeat(Vec<u8>, usize),
    /// Comment lines until the client goes away.
    CommentsForever,
    /// Nothing until the client goes away.
    Stall,
    /// RST instead of FIN: what was not read yet is lost.
    Reset,
}

/// The head of a stream that is chunked, with further header lines (each with its `\r\n`).
#[must_use]
pub fn stream_head(extra: &str) -> Vec<u8> {
    format!(
        "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\nconnection: close\r\n{extra}\r\n"
    )
    .into_bytes()
}

/// One chunk of the chunked encoding.
#[must_use]
pub fn chunk(bytes: &[u8]) -> Vec<u8> {
    let mut out = format!("{:x}\r\n", bytes.len()).into_bytes();
    out.extend_from_slice(bytes);
    out.extend_from_slice(b"\r\n");
    out
}

/// The proper end of the chunked encoding.
#[must_use]
pub fn end() -> Vec<u8> {
    b"0\r\n\r\n".to_vec()
}

/// A complete stream with a clean end.
#[must_use]
pub fn stream(body: &[u8]) -> Vec<Act> {
    vec![Act::Bytes([stream_head(""), chunk(body), end()].concat())]
}

/// A complete answer with a length and further header lines.
#[must_use]
pub fn answer(status: u16, headers: &str, content_type: &str, body: &[u8]) -> Vec<Act> {
    let head = format!(
        "HTTP/1.1 {status} X\r\ncontent-type: {content_type}\r\ncontent-length: {}\r\nconnection: close\r\n{headers}\r\n",
        body.len()
    );
    vec![Act::Bytes([head.as_bytes(), body].concat())]
}

/// A complete JSON answer.
#[must_use]
pub fn answer_json(status: u16, headers: &str, body: &Value) -> Vec<Act> {
    answer(status, headers, "application/json", body.to_string().as_bytes())
}

/// `data:` lines, one event each.
#[must_use]
pub fn frames(events: &[Value]) -> Vec<u8> {
    events.iter().map(|event| format!("data: {event}\n\n")).collect::<String>().into_bytes()
}

/// A gzip file.
///
/// # Panics
/// Never: memory takes every write.
#[must_use]
pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).and_then(|()| encoder.finish()).expect("memory takes every write")
}
