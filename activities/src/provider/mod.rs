//! Talks to the providers of models: one trait, four implementations, one conformance suite.
//!
//! ```text
//! Call ─▶ gemini ────────────┐
//!      ─▶ openrouter ─┐      ├─▶ http (one request, limits, cancellation) ─▶ sse ─▶ Completion
//!      ─▶ openai_compatible ─┴─▶ chat (the shared dialect)            └─▶ retry (status + body ─▶ ProviderError)
//!      ─▶ scripted (no network)
//! ```
//!
//! A provider makes one request and says exactly what became of it. It does **not** retry, choose models, know of
//! money or of the engine's records: that is [`crate::orchestrator`]. Start reading at [`Provider`].

pub mod account;
pub mod address;
mod chat;
pub mod estimate;
pub mod gemini;
mod http;
pub mod openai_compatible;
pub mod openrouter;
pub mod probe;
mod report;
pub mod retry;
pub mod scripted;
pub mod settings;
mod shape;
pub mod sse;

pub use gemini::Gemini;
pub use openai_compatible::OpenAiCompatible;
pub use openrouter::OpenRouter;
pub use retry::{Advice, ProviderError};
pub use scripted::Scripted;
pub use settings::Settings;

use crate::{
    orchestrator::{Request, ToolCall},
    usage::Usage,
};
use futures_util::future::BoxFuture;
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::{
    fmt::Write as _,
    sync::{Arc, Once},
    time::Duration,
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Largest answer that is read, in bytes after decompression: forty times a long answer, small enough for a worker
/// that holds dozens at once.
pub const BODY_BYTES_MAX: usize = 10 * 1024 * 1024;
/// Largest part of an error answer that is read, in bytes: codes stand at its beginning.
pub const ERROR_BODY_BYTES_MAX: usize = 64 * 1024;
/// Time to reach a server: TCP and TLS.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Time from the sent request to headers, and from headers to the first byte of the body: a long prompt on a small
/// server takes minutes, a dead one should not take longer.
pub const FIRST_BYTE_TIMEOUT: Duration = Duration::from_secs(120);
/// The same for a server on this machine or network: it may compute the prompt on a processor.
pub const FIRST_BYTE_TIMEOUT_LOCAL: Duration = Duration::from_secs(600);
/// Longest silence in a running stream.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(60);
/// Longest call from start to end, however lively its stream.
pub const TOTAL_TIMEOUT: Duration = Duration::from_secs(15 * 60);

/// The time limits of a call; [`Default`] is what production uses, tests make them small.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    pub connect: Duration,
    pub first_byte: Duration,
    pub idle: Duration,
    pub total: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self { connect: CONNECT_TIMEOUT, first_byte: FIRST_BYTE_TIMEOUT, idle: IDLE_TIMEOUT, total: TOTAL_TIMEOUT }
    }
}

/// A vendor's API, or something that speaks like one.
pub trait Provider: Send + Sync + 'static {
    /// `gemini`, `openrouter`, `openai_compatible` or `rehearsed`.
    fn name(&self) -> &'static str;

    /// Which key is used, without revealing it.
    fn key(&self) -> KeyIdentity;

    /// Whether its server is on this machine or its network, by its address alone: nobody sends a bill for it.
    fn is_local(&self) -> bool {
        false
    }

    /// Makes one call and reads its answer to the end.
    ///
    /// # Errors
    /// A [`ProviderError`] that says what happened, whether the call may have been billed, and what to do next.
    fn complete<'a>(&'a self, call: Call<'a>) -> BoxFuture<'a, Result<Completion, ProviderError>>;
}

/// How an answer of a required shape is asked for; each level asks less of the server than the one before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StructuredOutput {
    /// The server takes a JSON Schema and keeps to it.
    #[default]
    JsonSchema,
    /// The server promises JSON; the schema stands in the prompt.
    JsonObject,
    /// Nothing is promised; the schema stands in the prompt.
    Prompt,
}

impl StructuredOutput {
    /// The next lower level.
    #[must_use]
    pub fn step_down(self) -> Option<Self> {
        match self {
            Self::JsonSchema => Some(Self::JsonObject),
            Self::JsonObject => Some(Self::Prompt),
            Self::Prompt => None,
        }
    }
}

/// One request to one model.
#[derive(Clone, Copy)]
pub struct Call<'a> {
    pub request: &'a Request,
    /// As the provider spells it.
    pub model: &'a str,
    /// Step path of the attempt: the rehearsed provider chooses its answer by it.
    pub path: &'a str,
    /// Name of the call in its step: likewise.
    pub key: &'a str,
    /// Output limit of this call, in tokens.
    pub max_output_tokens: u32,
    /// What input and output may cost where the provider chooses among servers, in micro-USD per million tokens.
    pub price_max: (Option<u64>, Option<u64>),
    pub structured_output: StructuredOutput,
    /// How much the model may think, in the provider's words (`low`, `medium`, `high`); `None` leaves it to the model.
    pub thinking: Option<&'a str>,
    /// What there is of the answer: its rest is asked for.
    pub continuation: Option<&'a Continuation>,
    /// Ends the call at once; the connection is closed.
    pub cancellation: &'a CancellationToken,
    /// Receives the provider's id of the request as soon as it is known, before the answer.
    pub request_id: &'a RequestIdSlot,
}

/// Holds the provider's id of a request from the moment it is known: it survives a call whose answer is lost.
#[derive(Clone, Debug, Default)]
pub struct RequestIdSlot(Arc<watch::Sender<Option<String>>>);

/// Longest request id that is kept, in bytes: it comes from outside and goes into an index.
const REQUEST_ID_BYTES_MAX: usize = 200;

impl RequestIdSlot {
    /// Stores the first id that is offered; an unusable one (empty, endless, not printable) is ignored.
    pub fn offer(&self, id: &str) {
        if id.is_empty() || id.len() > REQUEST_ID_BYTES_MAX || !id.bytes().all(|b| b.is_ascii_graphic()) {
            return;
        }
        self.0.send_if_modified(|slot| {
            let first = slot.is_none();
            if first {
                *slot = Some(id.to_owned());
            }
            first
        });
    }
    /// The id, once one is known.
    #[must_use]
    pub fn get(&self) -> Option<String> {
        self.0.borrow().clone()
    }
    /// Waits for the id.
    pub async fn known(&self) -> String {
        let mut changes = self.0.subscribe();
        loop {
            if let Some(id) = changes.borrow_and_update().clone() {
                return id;
            }
            // This slot holds the sender, so that it cannot be gone.
            if changes.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }
}

/// Longest name of a model that an answer is believed, in bytes: longer than any that is known.
const MODEL_BYTES_MAX: usize = 200;

/// The model that an answer names; nothing if that is no name of a model: it goes into rows and histories, and prices are looked
/// up by it.
fn model_named(name: &str) -> Option<String> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b':' | b'/' | b'@' | b'~' | b'+' | b'-');
    (!name.is_empty() && name.len() <= MODEL_BYTES_MAX && name.bytes().all(plain)).then(|| name.to_owned())
}

/// An answer that its provider gives in several calls (Gemini's `CONTINUATION`): with what the rest is asked for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Continuation {
    pub token: String,
    /// What there is of the answer, in the provider's own content.
    pub parts: Value,
}

/// A complete answer: a finish reason was seen and it is a good one.
#[derive(Clone, Debug, PartialEq)]
pub struct Completion {
    /// Of an answer in several calls: all of it so far.
    pub text: String,
    pub tool_calls: Vec<ToolCall>,
    /// The provider's own content, verbatim, for the next turn. Of an answer in several calls: all of it so far.
    pub parts: Value,
    /// With this the provider gives the rest in a further call; `None`: there is no rest.
    pub continuation_token: Option<String>,
    /// The model that served the call, as far as prices can know it: a local server's file name is not reported.
    pub model_served: String,
    pub finish_reason: String,
    /// Of this call alone.
    pub usage: Usage,
    pub http_status: Option<u16>,
    pub provider_request_id: Option<String>,
}

/// Which key a provider uses, fit for rows and screens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyIdentity {
    /// Keyed hash of the key, 64 hex digits.
    pub fingerprint: String,
    /// Its last four characters; empty for none, and for one so short that four would give it away.
    pub last4: String,
}

/// Shortest key of which the last four characters are shown, in characters.
const LAST4_KEY_CHARS_MIN: usize = 12;
/// Separates these hashes from every other use of the same key.
const FINGERPRINT_DOMAIN: &[u8] = b"loopwright/key-fingerprint/1";

impl KeyIdentity {
    /// The identity of `key` at `provider`.
    #[must_use]
    pub fn of(provider: &str, key: Option<&SecretString>) -> Self {
        let secret = key.map(ExposeSecret::expose_secret).unwrap_or_default();
        // HMAC by its two hashes (RFC 2104): the domain, shorter than a block, is the key.
        let pad = |byte: u8| -> Vec<u8> {
            (0..64).map(|i| FINGERPRINT_DOMAIN.get(i).copied().unwrap_or_default() ^ byte).collect()
        };
        let inner = Sha256::new()
            .chain_update(pad(0x36))
            .chain_update(provider.as_bytes())
            .chain_update([0])
            .chain_update(secret.as_bytes())
            .finalize();
        let outer = Sha256::new().chain_update(pad(0x5c)).chain_update(inner).finalize();
        let characters: Vec<char> = secret.chars().collect();
        let last4 = if characters.len() >= LAST4_KEY_CHARS_MIN {
            characters[characters.len() - 4..].iter().collect()
        } else {
            String::new()
        };
        Self { fingerprint: hex(&outer), last4 }
    }
}

/// Lower-case hex digits of `bytes`.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut out, byte| {
        // Writing to a String cannot fail.
        let _ = write!(out, "{byte:02x}");
        out
    })
}

/// Installs ring as the process's one crypto backend. Every client needs it before it is built; calling it again
/// does nothing.
pub fn install_crypto() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // An error means that somebody installed one already, which is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_identified_without_being_shown() {
        let key = SecretString::from("sk-0123456789abcdef");
        let identity = KeyIdentity::of("gemini", Some(&key));
        assert_eq!(identity.last4, "cdef");
        assert_eq!(identity.fingerprint.len(), 64);
        assert_ne!(identity.fingerprint, KeyIdentity::of("openrouter", Some(&key)).fingerprint);
        assert_eq!(KeyIdentity::of("gemini", Some(&SecretString::from("short"))).last4, "");
        assert_eq!(KeyIdentity::of("gemini", None).last4, "");
    }

    #[test]
    fn only_the_first_usable_request_id_is_kept() {
        let slot = RequestIdSlot::default();
        for id in ["", "with space", "gen-1", "gen-2"] {
            slot.offer(id);
        }
        assert_eq!(slot.get().as_deref(), Some("gen-1"));
    }

    #[tokio::test]
    async fn an_id_is_waited_for() {
        let slot = RequestIdSlot::default();
        let other = slot.clone();
        let (id, ()) = tokio::join!(slot.known(), async { other.offer("gen-1") });
        assert_eq!((id.as_str(), slot.known().await.as_str()), ("gen-1", "gen-1"));
    }

    #[test]
    fn what_is_no_name_of_a_model_is_none() {
        assert_eq!(model_named("google/gemini-3.8-flash:free").as_deref(), Some("google/gemini-3.8-flash:free"));
        for name in ["", "a b", "a\0b", "\u{e4}", &"x".repeat(MODEL_BYTES_MAX + 1)] {
            assert_eq!(model_named(name), None, "{name:?}");
        }
    }
}
