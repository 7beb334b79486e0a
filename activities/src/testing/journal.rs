//! What the server remembers of every request, to be compared with what the product says about it.

use super::{dialect::Dialect, reply::Told, route::Endpoint};
use std::time::Instant;

/// How far an answer got.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// The request has arrived, nothing was answered yet.
    Received,
    /// Its headers were handed to the socket.
    Headers,
    /// Some of its body too.
    Body,
    /// All of it.
    Finished,
}

/// Who ended it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// It is still going on.
    Open,
    /// The server had nothing more to say, or broke off as it was told to.
    Server,
    /// The client went away.
    Client,
}

/// One request and its answer.
#[derive(Clone, Debug)]
pub struct Entry {
    pub dialect: Dialect,
    pub endpoint: Endpoint,
    pub method: String,
    /// With its query.
    pub path: String,
    /// Place among the questions (`Endpoint::Generate`) of its dialect, from 0; for others the count so far.
    pub ordinal: usize,
    /// As `provider::KeyIdentity` computes it; that of the empty key where none was sent.
    pub key_fingerprint: String,
    /// 64 hex digits.
    pub body_sha256: String,
    /// The model that was asked for, as the request spells it.
    pub model: Option<String>,
    /// `reply`, `refused`, `script`, `catalog`, or the fault.
    pub answered: String,
    pub status: Option<u16>,
    /// The id that the server gave this request, whether or not the answer got as far as saying it.
    pub provider_request_id: Option<String>,
    /// What the answer says that it consumed, or would have said.
    pub usage: Option<Told>,
    pub stage: Stage,
    pub end: End,
    /// Bytes handed to the socket by acts; 0 for what hyper wrote.
    pub bytes_sent: u64,
    /// When all of the request had been read, before anything was made of it.
    pub received_at: Instant,
    /// When the last bytes so far were handed over to be written; of an answer without any, when it ended.
    pub written_at: Option<Instant>,
}
