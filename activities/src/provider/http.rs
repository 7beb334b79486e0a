//! One HTTP request and its answer, with every limit in force: time to connect, to the first byte, between bytes and
//! in total; bytes of the body; no redirects, no proxies from the environment, no hidden repetition.
//!
//! It says of every way to fail whether the request may have been served.

use super::{
    BODY_BYTES_MAX, Call, ERROR_BODY_BYTES_MAX, Timeouts,
    address::{Trust, is_refused_address},
    install_crypto,
    retry::{Hints, Names, ProviderError, Report, classify},
    sse,
};
use crate::usage::CallState;
use bytes::Bytes;
use chrono::Utc;
use loopwright_engine::Failure;
use reqwest::{
    Client, Response, StatusCode, Url,
    header::{ACCEPT, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue},
    redirect::Policy,
};
use secrecy::{ExposeSecret, SecretString};
use serde_json::Value;
use std::{future::Future, ops::ControlFlow, time::Duration};
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;

/// How long an unused connection is kept.
const POOL_IDLE: Duration = Duration::from_secs(30);
/// Longest wait for the rest of an error body, whose status is known already.
const ERROR_BODY_TIMEOUT: Duration = Duration::from_secs(5);

/// After so long a bad gateway may stand before a server that has worked; one whose server is not there says so at once. Chosen.
const BAD_GATEWAY_AT_ONCE: Duration = Duration::from_secs(1);

/// A client with our limits.
#[derive(Clone, Debug)]
pub(super) struct Http {
    client: Client,
    pub timeouts: Timeouts,
}

/// An answer whose headers have arrived.
pub(super) struct Answer<'a> {
    response: Response,
    pub status: StatusCode,
    pub headers: HeaderMap,
    names: &'a Names,
    cancellation: &'a CancellationToken,
    timeouts: Timeouts,
    deadline: Instant,
    /// From the request to the headers.
    took: Duration,
    bytes_read: usize,
}

impl Http {
    /// A client for a server at `base`.
    ///
    /// # Errors
    /// A sentence, when the machine has no certificates to trust.
    pub(super) fn new(base: &Url, timeouts: Timeouts, trust: Trust) -> Result<Self, String> {
        install_crypto();
        let mut builder = Client::builder()
            .connect_timeout(timeouts.connect)
            .redirect(Policy::none())
            .retry(reqwest::retry::never())
            .no_proxy()
            .referer(false)
            .tcp_nodelay(true)
            .pool_idle_timeout(POOL_IDLE)
            .user_agent(concat!("loopwright/", env!("CARGO_PKG_VERSION")));
        if let Some(resolver) = trust.resolver() {
            builder = builder.dns_resolver(resolver);
        }
        if base.scheme() == "http" {
            // A local server needs no certificates, and must not fail where none are installed.
            builder = builder.tls_certs_only(Vec::<reqwest::Certificate>::new());
        }
        let client = builder
            .build()
            .map_err(|_| "no TLS certificates found on this machine: install the package ca-certificates".to_owned())?;
        Ok(Self { client, timeouts })
    }

    /// Sends `body` and waits for headers.
    ///
    /// # Errors
    /// Never reached: state failed. Sent, but no headers: unknown.
    pub(super) async fn post<'a>(
        &self,
        names: &'a Names,
        call: &Call<'a>,
        url: Url,
        headers: HeaderMap,
        body: Vec<u8>,
    ) -> Result<Answer<'a>, ProviderError> {
        let sent_at = Instant::now();
        let deadline = sent_at + self.timeouts.total;
        let request = self
            .client
            .post(url)
            .headers(headers)
            .header(CONTENT_TYPE, HeaderValue::from_static("application/json"))
            .header(ACCEPT, HeaderValue::from_static("text/event-stream, application/json"))
            .body(body)
            .send();
        let first_byte = deadline.min(Instant::now() + self.timeouts.connect + self.timeouts.first_byte);
        let response = within(call.cancellation, first_byte, request)
            .await
            .map_err(|stop| stop.into_error(names, "no answer in time", CallState::Unknown))?
            .map_err(|error| send_error(names, &error))?;
        Ok(Answer {
            status: response.status(),
            headers: response.headers().clone(),
            response,
            names,
            cancellation: call.cancellation,
            timeouts: self.timeouts,
            deadline,
            took: sent_at.elapsed(),
            bytes_read: 0,
        })
    }

    /// Fetches a small JSON document.
    ///
    /// # Errors
    /// As [`Http::post`]; an error status is classified.
    pub(super) async fn get_json(&self, names: &Names, url: Url, headers: HeaderMap) -> Result<Value, ProviderError> {
        let text = self.get_text(names, url, headers).await?;
        serde_json::from_str(&text)
            .map_err(|_| ProviderError::broken(names, "the answer is not JSON", CallState::Failed))
    }

    /// Fetches a document as it is written: in a [`Value`] numbers of money would lose digits.
    ///
    /// # Errors
    /// As [`Http::post`]; an error status is classified.
    pub(super) async fn get_text(&self, names: &Names, url: Url, headers: HeaderMap) -> Result<String, ProviderError> {
        let cancellation = CancellationToken::new();
        let limit = Instant::now() + self.timeouts.connect + self.timeouts.idle.min(self.timeouts.first_byte);
        let request = self.client.get(url).headers(headers).header(ACCEPT, "application/json").send();
        let response = within(&cancellation, limit, request)
            .await
            .map_err(|stop| stop.into_error(names, "no answer in time", CallState::Failed))?
            .map_err(|error| send_error(names, &error))?;
        let mut answer = Answer {
            status: response.status(),
            headers: response.headers().clone(),
            response,
            names,
            cancellation: &cancellation,
            timeouts: self.timeouts,
            deadline: limit,
            took: Duration::ZERO,
            bytes_read: 0,
        };
        if !answer.status.is_success() {
            return Err(answer.into_error().await.0);
        }
        answer.text().await
    }
}

impl Answer<'_> {
    /// Whether the server answers with one JSON document instead of a stream.
    pub(super) fn is_json(&self) -> bool {
        self.headers
            .get(CONTENT_TYPE)
            .and_then(|value| value.to_str().ok())
            .is_some_and(|value| value.trim_start().to_ascii_lowercase().starts_with("application/json"))
    }

    /// The text of a header; empty where it is missing or no text.
    pub(super) fn header(&self, name: &str) -> String {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned()
    }

    async fn chunk(&mut self) -> Result<Option<Bytes>, ProviderError> {
        let silence = if self.bytes_read == 0 { self.timeouts.first_byte } else { self.timeouts.idle };
        let limit = self.deadline.min(Instant::now() + silence);
        let chunk = within(self.cancellation, limit, self.response.chunk())
            .await
            .map_err(|stop| stop.into_error(self.names, "the answer stalled", CallState::Unknown))?
            .map_err(|error| {
                let what = if error.is_decode() { "the answer cannot be decoded" } else { "the connection was lost" };
                ProviderError::network(self.names, what, CallState::Unknown)
            })?;
        if let Some(bytes) = &chunk {
            self.bytes_read += bytes.len();
            if self.bytes_read > BODY_BYTES_MAX {
                return Err(ProviderError::broken(self.names, "the answer is larger than 10 MB", CallState::Unknown));
            }
        }
        Ok(chunk)
    }

    /// Reads the stream and hands each event to `sink` until it breaks off or the stream ends.
    ///
    /// # Errors
    /// What `sink` returns, a lost connection, a limit.
    pub(super) async fn events(
        &mut self,
        mut sink: impl FnMut(sse::Event) -> Result<ControlFlow<()>, ProviderError>,
    ) -> Result<(), ProviderError> {
        let mut decoder = sse::Decoder::new();
        let mut events = Vec::new();
        loop {
            let chunk = self.chunk().await?;
            let ended = chunk.is_none();
            match chunk {
                Some(bytes) => decoder.push(&bytes, &mut events).map_err(|_| {
                    ProviderError::broken(self.names, "the answer is larger than 10 MB", CallState::Unknown)
                })?,
                None => decoder.finish(&mut events),
            }
            for event in events.drain(..) {
                if sink(event)?.is_break() {
                    return Ok(());
                }
            }
            if ended {
                return Ok(());
            }
        }
    }

    /// Reads the whole body as text.
    ///
    /// # Errors
    /// A lost connection or a limit.
    pub(super) async fn text(&mut self) -> Result<String, ProviderError> {
        let mut body = Vec::new();
        while let Some(bytes) = self.chunk().await? {
            body.extend_from_slice(&bytes);
        }
        Ok(String::from_utf8_lossy(&body).into_owned())
    }

    /// Classifies an answer with an error status, from its headers and the beginning of its body. A gateway that lost its server in the
    /// middle of the work knows nothing of what that server did and billed: the call is unknown.
    pub(super) async fn into_error(mut self) -> (ProviderError, Report) {
        let hints = Hints::parse(&self.headers, Utc::now());
        let mut body = Vec::new();
        // The status is known; a body that does not come, or comes without end, changes nothing.
        let limit = self.deadline.min(Instant::now() + ERROR_BODY_TIMEOUT);
        while body.len() < ERROR_BODY_BYTES_MAX {
            match within(self.cancellation, limit, self.response.chunk()).await {
                Ok(Ok(Some(bytes))) => body.extend_from_slice(&bytes),
                _ => break,
            }
        }
        body.truncate(ERROR_BODY_BYTES_MAX);
        let report = Report::parse(&body);
        let mut error = classify(self.names, self.status.as_u16(), hints, &report);
        if self.status == StatusCode::BAD_GATEWAY && self.took >= BAD_GATEWAY_AT_ONCE {
            error.state = CallState::Unknown;
        }
        (error, report)
    }
}

/// Why waiting ended without a result.
enum Stop {
    Cancelled,
    TimedOut,
}

impl Stop {
    fn into_error(self, names: &Names, what: &str, state: CallState) -> ProviderError {
        match self {
            Self::Cancelled => ProviderError::cancelled(state),
            Self::TimedOut => ProviderError::network(names, what, state),
        }
    }
}

async fn within<T>(cancellation: &CancellationToken, limit: Instant, work: impl Future<Output = T>) -> Result<T, Stop> {
    tokio::select! {
        biased;
        () = cancellation.cancelled() => Err(Stop::Cancelled),
        done = timeout_at(limit, work) => done.map_err(|_| Stop::TimedOut),
    }
}

fn send_error(names: &Names, error: &reqwest::Error) -> ProviderError {
    if error.is_builder() {
        let failure =
            Failure::permanent("provider.bad_request", format!("{}: the request cannot be built", names.title));
        return ProviderError::new(failure, super::Advice::OtherProvider);
    }
    if is_refused_address(error) {
        let text = format!("{}: its name leads to an address that is not a public one", names.title);
        return ProviderError::new(Failure::permanent("provider.address_refused", text), super::Advice::OtherProvider);
    }
    if error.is_connect() {
        return ProviderError::network(names, "the server cannot be reached", CallState::Failed);
    }
    ProviderError::network(names, "the connection was lost before an answer came", CallState::Unknown)
}

/// A header with a key in it, marked so that no log shows it.
///
/// # Errors
/// The key holds characters that no header can carry.
pub(super) fn secret_header(prefix: &str, key: &SecretString) -> Result<HeaderValue, String> {
    let mut value = HeaderValue::from_str(&format!("{prefix}{}", key.expose_secret().trim()))
        .map_err(|_| "the key holds characters that cannot be sent".to_owned())?;
    value.set_sensitive(true);
    Ok(value)
}

/// Adds one header.
pub(super) fn header(headers: &mut HeaderMap, name: &'static str, value: HeaderValue) {
    headers.insert(HeaderName::from_static(name), value);
}

#[cfg(test)]
mod tests {
    use super::*;
    use reqwest::header::AUTHORIZATION;

    const KEY: &str = "secret-key-0123456789";

    #[test]
    fn a_request_that_is_shown_does_not_show_its_key() {
        let value = secret_header("Bearer ", &SecretString::from(KEY)).unwrap();
        assert_eq!(value.to_str().unwrap(), format!("Bearer {KEY}"), "what is sent");
        let mut headers = HeaderMap::new();
        headers.insert(AUTHORIZATION, value.clone());
        let url = Url::parse("http://127.0.0.1/v1").unwrap();
        let http = Http::new(&url, Timeouts::default(), Trust::Operator).unwrap();
        let request = || http.client.post(url.clone()).headers(headers.clone());
        let built = request().build().unwrap();
        assert_eq!(built.headers()[AUTHORIZATION], format!("Bearer {KEY}"));
        for shown in [format!("{value:?}"), format!("{headers:?}"), format!("{:?}", request()), format!("{built:?}")] {
            assert!(!shown.contains(KEY), "{shown}");
        }
    }
}
