//! The two doors at which people ask: REST at our server, and the engine's client. Behind both is the wire that is cut and slow.
//!
//! A request that makes a run can be sent again until somebody answers, and is one request all the same: by its idempotency key, by an
//! id that no second run may have, or by the id of the run itself.

use crate::{
    config::Auth,
    rest::auth::{SCOPE_RUN, mint},
};
use loopwright_engine::{
    Error,
    client::{Client, Fork, Start},
    ids::RunId,
    transaction::is_transient,
};
use serde_json::Value;
use std::net::SocketAddr;
use uuid::Uuid;

/// How a request ended.
pub(super) enum Answer<T = ()> {
    Acknowledged(T),
    /// By code; what the product says to a request that makes no sense.
    Declined(String),
    /// No answer, or one that says "later": it may have happened.
    Unknown(String),
}

impl<T> Answer<T> {
    fn and_then<U>(self, next: impl FnOnce(T) -> Answer<U>) -> Answer<U> {
        match self {
            Self::Acknowledged(value) => next(value),
            Self::Declined(code) => Answer::Declined(code),
            Self::Unknown(why) => Answer::Unknown(why),
        }
    }

    fn map<U>(self, of: impl FnOnce(T) -> U) -> Answer<U> {
        self.and_then(|value| Answer::Acknowledged(of(value)))
    }
}

/// A request that makes a run.
#[derive(Clone, Debug)]
pub(super) enum Begin {
    /// By REST, under an idempotency key.
    Keyed {
        path: String,
        key: String,
        body: Value,
    },
    /// A start by REST without a key: its body has an id, and says `reject_duplicate`. The run of a sending whose answer was lost is
    /// open: nobody knows of it who could end it.
    Named {
        body: Value,
    },
    Start(Box<Start>),
    Fork(RunId, Fork),
    Reset(RunId, Fork),
}

impl Begin {
    pub(super) fn is_rest(&self) -> bool {
        matches!(self, Self::Keyed { .. } | Self::Named { .. })
    }
}

/// A run that was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Begun {
    pub(super) run: RunId,
    /// An earlier sending had made it, and its answer was lost.
    pub(super) found: bool,
}

/// Life of a token in seconds: one request's, however long it takes.
const TOKEN_S: u64 = 300;

/// Somebody at both doors.
#[derive(Clone)]
pub(super) struct Doors {
    /// Through the proxy, like the server.
    pub(super) client: Client,
    pub(super) http: reqwest::Client,
    pub(super) server: SocketAddr,
    pub(super) user: Uuid,
    pub(super) auth: Auth,
}

impl Doors {
    /// Sends it once.
    pub(super) async fn begin(&self, begin: &Begin) -> Answer<Begun> {
        match begin.clone() {
            Begin::Keyed { path, key, body } => self.post(&path, Some(&key), &body).await.begun(),
            Begin::Named { body } => self.post("/v1/runs", None, &body).await.begun(),
            Begin::Start(start) => of(self.client.start(*start).await.map(|s| (s.run_id, s.created))).found(),
            Begin::Fork(run, fork) => of(self.client.fork(run, fork).await.map(|s| (s.run_id, s.created))).found(),
            // It does not say whether it was the first.
            Begin::Reset(run, fork) => of(self.client.reset(run, fork).await.map(|r| (r.run_id, true))).found(),
        }
    }

    pub(super) async fn post(&self, path: &str, key: Option<&str>, body: &Value) -> Answer<Told> {
        let token = mint(&self.auth, &self.user.to_string(), SCOPE_RUN, TOKEN_S).expect("a key of our own");
        let request = self.http.post(format!("http://{}{path}", self.server)).bearer_auth(token).json(body);
        sent(match key {
            Some(key) => request.header("idempotency-key", key),
            None => request,
        })
        .await
    }
}

/// What REST said.
pub(super) struct Told {
    body: Value,
    /// The answer of an earlier sending.
    replayed: bool,
}

impl Answer<Told> {
    fn begun(self) -> Answer<Begun> {
        self.and_then(|Told { body, replayed }| match body["run_id"].as_str().and_then(|id| id.parse().ok()) {
            Some(run) => Answer::Acknowledged(Begun { run, found: replayed || body["created"] == false }),
            None => Answer::Declined(format!("an answer without a run: {body}")),
        })
    }

    pub(super) fn heard(self) -> Answer {
        self.map(drop)
    }
}

impl Answer<(RunId, bool)> {
    fn found(self) -> Answer<Begun> {
        self.map(|(run, created)| Begun { run, found: !created })
    }
}

async fn sent(request: reqwest::RequestBuilder) -> Answer<Told> {
    let response = match request.send().await {
        Ok(response) => response,
        Err(error) => return Answer::Unknown(error.to_string()),
    };
    let (status, replayed) = (response.status(), response.headers().contains_key("idempotency-replayed"));
    let body: Value = match response.json().await {
        Ok(body) => body,
        Err(error) => return Answer::Unknown(format!("{status}: {error}")),
    };
    if status.is_success() {
        return Answer::Acknowledged(Told { body, replayed });
    }
    let code = body["code"].as_str().unwrap_or("no code").to_owned();
    match (status.as_u16(), code.as_str()) {
        (429 | 503, _) | (_, "request_in_progress") => Answer::Unknown(code),
        _ => Answer::Declined(code),
    }
}

/// What the client said.
pub(super) fn of<T>(done: Result<T, Error>) -> Answer<T> {
    match done {
        Ok(value) => Answer::Acknowledged(value),
        Err(Error::Sql(error)) if is_transient(&error) => Answer::Unknown(error.to_string()),
        // It moved meanwhile: ask again.
        Err(error @ (Error::LeaseLost | Error::InDoubt(_))) => Answer::Unknown(error.to_string()),
        Err(error) => Answer::Declined(error.code().to_owned()),
    }
}
