//! One request as a handler sees it, and what every handler does with it: identify the caller, read the body, read
//! the query.

use super::{
    State,
    auth::SCOPE_RUN,
    error::{Code, Error},
};
use bytes::{Buf, Bytes, BytesMut};
use futures_util::{Stream, StreamExt};
use serde::de::DeserializeOwned;
use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};
use uuid::Uuid;
use warp::{
    Filter,
    filters::BoxedFilter,
    http::{HeaderMap, header},
    reply::{Reply, Response},
};

/// From the end of the headers to the end of the body.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest `Idempotency-Key`, in bytes; the table holds no longer one.
const KEY_BYTES_MAX: usize = 255;

/// The other end of the connection.
#[derive(Clone, Copy, Debug)]
pub struct Peer(pub SocketAddr);

/// A request that matched a route.
pub(super) struct Call {
    pub state: State,
    pub headers: HeaderMap,
    query: String,
    body: Result<Bytes, Error>,
}

/// The caller, known and within his rate.
#[derive(Clone, Copy, Debug)]
pub(super) struct Principal {
    pub user: Uuid,
}

/// What a caller must be allowed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Need {
    Read,
    Run,
}

/// Extracts a [`Call`]. Comes last in a route: it reads the body.
pub(super) fn call(state: &State) -> BoxedFilter<(Call,)> {
    let state = state.clone();
    let query = warp::query::raw().or(warp::any().map(String::new)).unify();
    warp::header::headers_cloned()
        .and(query)
        .and(warp::body::stream())
        .then(move |headers: HeaderMap, query: String, body| {
            let state = state.clone();
            async move {
                let body = read(&headers, body, state.body_bytes_max).await;
                Call { state, headers, query, body }
            }
        })
        .boxed()
}

async fn read<S, B>(headers: &HeaderMap, body: S, limit: usize) -> Result<Bytes, Error>
where
    S: Stream<Item = Result<B, warp::Error>>,
    B: Buf,
{
    let too_large = || Error::new(Code::BodyTooLarge, format!("The limit is {limit} bytes."));
    let announced = headers.get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
    if announced.is_some_and(|n| n > limit as u64) {
        return Err(too_large());
    }
    let collect = async {
        let mut body = std::pin::pin!(body);
        let mut out = BytesMut::new();
        while let Some(chunk) = body.next().await {
            let mut chunk = chunk.map_err(|_| Error::new(Code::BodyInvalid, "The body ended too early."))?;
            if out.len() + chunk.remaining() > limit {
                return Err(too_large());
            }
            out.extend_from_slice(&chunk.copy_to_bytes(chunk.remaining()));
        }
        Ok(out.freeze())
    };
    tokio::time::timeout(BODY_TIMEOUT, collect)
        .await
        .unwrap_or_else(|_| Err(Error::new(Code::BodyInvalid, "The body did not arrive in time.")))
}

impl Call {
    /// Who calls. Nothing else of the request is looked at before.
    ///
    /// # Errors
    /// `token_missing`, `token_invalid`, `scope_insufficient`, `user_blocked`, `rate_limited`.
    pub async fn principal(&self, need: Need) -> Result<Principal, Error> {
        let authorization = self.headers.get(header::AUTHORIZATION).map(|v| v.to_str().unwrap_or_default());
        let verified = self.state.registry.verify(authorization).await?;
        if need == Need::Run && !verified.may(SCOPE_RUN) {
            return Err(Error::new(Code::ScopeInsufficient, format!("This needs the scope `{SCOPE_RUN}`.")));
        }
        let own = self.state.registry.issuer();
        let user = self.state.store.user_of(&verified.issuer, &verified.subject, own).await?;
        if user.blocked {
            return Err(Error::new(Code::UserBlocked, "This user may not use the service."));
        }
        self.state.limit.take(user.id, Instant::now())?;
        Ok(Principal { user: user.id })
    }

    /// The body as it came.
    pub fn bytes(&mut self) -> Result<Bytes, Error> {
        std::mem::replace(&mut self.body, Ok(Bytes::new()))
    }

    /// The body as JSON of a known shape.
    ///
    /// # Errors
    /// `media_type_unsupported`, `body_invalid` with line and column, `body_too_large`.
    pub fn json<T: DeserializeOwned>(&mut self) -> Result<T, Error> {
        let kind = self.headers.get(header::CONTENT_TYPE).map(|v| v.to_str().unwrap_or_default());
        let kind = kind.map(|k| k.split(';').next().unwrap_or_default().trim().to_ascii_lowercase());
        if kind.is_some_and(|k| k != "application/json" && !k.ends_with("+json")) {
            return Err(Error::new(Code::MediaTypeUnsupported, "Send `Content-Type: application/json`."));
        }
        let bytes = self.bytes()?;
        serde_json::from_slice(&bytes).map_err(|e| Error::new(Code::BodyInvalid, format!("{e}.")))
    }

    /// [`Self::json`]; an absent body is what is the default.
    pub fn json_or_default<T: DeserializeOwned + Default>(&mut self) -> Result<T, Error> {
        if self.body.as_ref().is_ok_and(Bytes::is_empty) { Ok(T::default()) } else { self.json() }
    }

    /// The query as a known shape.
    ///
    /// # Errors
    /// `query_invalid`.
    pub fn query<T: DeserializeOwned>(&self) -> Result<T, Error> {
        let pairs: serde_json::Map<String, serde_json::Value> = url::form_urlencoded::parse(self.query.as_bytes())
            .map(|(k, v)| (k.into_owned(), v.into_owned().into()))
            .collect();
        serde_json::from_value(pairs.into()).map_err(|e| Error::new(Code::QueryInvalid, format!("{e}.")))
    }

    /// A header's text; `None` if absent.
    ///
    /// # Errors
    /// `header_invalid` when it is not text.
    pub fn header(&self, name: &str) -> Result<Option<&str>, Error> {
        let invalid = |_| Error::new(Code::HeaderInvalid, format!("`{name}` is not plain text."));
        self.headers.get(name).map(|v| v.to_str().map_err(invalid)).transpose()
    }

    /// The `Idempotency-Key`.
    pub fn idempotency_key(&self) -> Result<Option<String>, Error> {
        match self.header("idempotency-key")? {
            Some(key) if key.is_empty() || key.len() > KEY_BYTES_MAX => {
                Err(Error::new(Code::HeaderInvalid, format!("`Idempotency-Key` has 1 to {KEY_BYTES_MAX} characters.")))
            }
            key => Ok(key.map(str::to_owned)),
        }
    }
}

/// `limit` and `cursor` of a list.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct PageQuery {
    limit: Option<String>,
    pub cursor: Option<String>,
}

impl PageQuery {
    pub fn limit(&self) -> Result<u32, Error> {
        limit(self.limit.as_deref())
    }
}

/// A page's size.
///
/// # Errors
/// `query_invalid` unless it is between 1 and the most.
pub(super) fn limit(text: Option<&str>) -> Result<u32, Error> {
    use crate::store::{PAGE_DEFAULT, PAGE_MAX};
    let Some(text) = text else { return Ok(PAGE_DEFAULT) };
    text.parse()
        .ok()
        .filter(|n| (1..=PAGE_MAX).contains(n))
        .ok_or_else(|| Error::new(Code::QueryInvalid, format!("`limit` is between 1 and {PAGE_MAX}.")))
}

/// A value of the query.
pub(super) fn parse<T: std::str::FromStr>(name: &str, text: Option<&str>) -> Result<Option<T>, Error> {
    text.map(|t| t.parse().map_err(|_| Error::new(Code::QueryInvalid, format!("`{name}` is not valid.")))).transpose()
}

/// JSON with a status.
pub(super) fn json(status: u16, body: &impl serde::Serialize) -> Result<Response, Error> {
    let text = serde_json::to_string(body).map_err(Error::internal)?;
    Ok(json_text(status, text))
}

/// JSON text with a status.
pub(super) fn json_text(status: u16, text: String) -> Response {
    let status = warp::http::StatusCode::from_u16(status).unwrap_or(warp::http::StatusCode::INTERNAL_SERVER_ERROR);
    let reply = warp::reply::with_status(text, status);
    warp::reply::with_header(reply, header::CONTENT_TYPE, "application/json").into_response()
}

/// Carries work to its end although the caller may go away: what was begun under an idempotency key must be answered.
pub(super) async fn to_the_end<F>(work: F) -> Result<Response, Error>
where
    F: Future<Output = Result<Response, Error>> + Send + 'static,
{
    use tracing::Instrument;
    tokio::spawn(work.in_current_span()).await.unwrap_or_else(|error| Err(Error::internal(error)))
}

/// Turns a handler's result into the reply and counts it under its route.
pub(super) async fn respond<F>(route: &'static str, handler: F) -> Response
where
    F: Future<Output = Result<Response, Error>>,
{
    let start = Instant::now();
    let response = handler.await.unwrap_or_else(Reply::into_response);
    let status = response.status().as_str().to_owned();
    metrics::counter!("http_requests_total", "route" => route, "status" => status).increment(1);
    metrics::histogram!("http_request_duration_seconds", "route" => route).record(start.elapsed().as_secs_f64());
    response
}
