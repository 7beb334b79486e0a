//! Classifies what went wrong with a call, once, at the edge that saw it: HTTP status and error body become a
//! [`ProviderError`] with a failure code, advice and the wait that the provider asked for.
//!
//! Nothing of an upstream body reaches a message: a failure is stored in histories and shown to users. Short codes
//! are kept in its detail.

use crate::usage::{CallState, Usage};
use chrono::{DateTime, Utc};
use loopwright_engine::{Failure, FailureKind};
use reqwest::header::HeaderMap;
use serde_json::{Value, json};
use std::time::Duration;

/// Longest wait that is believed, however long a provider says: a week.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(7 * 24 * 3600);
/// Longest upstream code that is kept, in bytes.
const CODE_BYTES_MAX: usize = 64;

/// What the orchestrator should do after a failed call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Advice {
    /// The same model may answer if asked again, after `Failure::retry_after_ms` where the provider named a wait.
    SameModel,
    /// This model will not do it; another may.
    OtherModel,
    /// This key will not do it at present; another may. Where there is none: if the code is `transient.rate_limited`, a
    /// quota of this model is used up and another model may do it; otherwise no model of this provider will.
    OtherKey,
    /// The key is refused, or its account is empty for good: it should not be sent again until a person has acted.
    DisableKey,
    /// Neither another model nor another key of this provider will help.
    OtherProvider,
    /// Nobody will do it, or nobody should: stop.
    Stop,
}

/// A call that brought no usable answer.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{failure}")]
pub struct ProviderError {
    /// Fit for histories: code, text without upstream content, wait.
    pub failure: Failure,
    pub advice: Advice,
    /// `Failed` when the provider said no or was never reached, `Unknown` when it may have served and billed the call.
    pub state: CallState,
    /// The provider's side is unwell: counts for its circuit breaker.
    pub unwell: bool,
    pub http_status: Option<u16>,
    pub finish_reason: Option<String>,
    pub model_served: Option<String>,
    /// The stream was read to its proper end.
    pub stream_completed: bool,
    /// What was consumed all the same, as far as it is known.
    pub usage: Option<Usage>,
    /// Context window that the server named when it refused a prompt, in tokens.
    pub context_tokens: Option<u64>,
}

impl ProviderError {
    /// An error around `failure`; the provider answered or was never reached, and it is not its health.
    #[must_use]
    pub fn new(failure: Failure, advice: Advice) -> Self {
        Self {
            failure,
            advice,
            state: CallState::Failed,
            unwell: false,
            http_status: None,
            finish_reason: None,
            model_served: None,
            stream_completed: false,
            usage: None,
            context_tokens: None,
        }
    }
    /// The connection failed; `state` tells whether the request may have been served.
    #[must_use]
    pub fn network(provider: &Names, what: &str, state: CallState) -> Self {
        Self {
            state,
            unwell: true,
            ..Self::new(
                Failure::retryable("transient.network", format!("{}: {what}", provider.title)),
                Advice::SameModel,
            )
        }
    }
    /// The answer cannot be read, or says that the server failed.
    #[must_use]
    pub fn broken(provider: &Names, what: &str, state: CallState) -> Self {
        Self {
            state,
            unwell: true,
            ..Self::new(Failure::retryable("transient.http", format!("{}: {what}", provider.title)), Advice::SameModel)
        }
    }
    /// The output ended before the model had finished.
    #[must_use]
    pub fn truncated(provider: &Names, what: &str) -> Self {
        Self::new(Failure::retryable("model.truncated", format!("{}: {what}", provider.title)), Advice::SameModel)
    }
    /// The model or a filter before it declined.
    #[must_use]
    pub fn refused(provider: &Names, reason: &str) -> Self {
        let failure = Failure::permanent("model.refused", format!("{}: the model declined to answer", provider.title))
            .with_detail(json!({ "reason": short_code(reason) }));
        Self::new(failure, Advice::OtherModel)
    }
    /// The model ended in a way that leaves nothing usable, `reason` as it called it.
    #[must_use]
    pub fn unusable(provider: &Names, reason: &str) -> Self {
        let failure =
            Failure::retryable("model.output_invalid", format!("{}: the answer is not usable", provider.title))
                .with_detail(json!({ "finish_reason": short_code(reason) }));
        Self::new(failure, Advice::SameModel)
    }
    /// The run asked the call to stop.
    #[must_use]
    pub fn cancelled(state: CallState) -> Self {
        Self { state, ..Self::new(Failure::cancelled(), Advice::Stop) }
    }
    /// With what was consumed all the same.
    #[must_use]
    pub fn with_usage(mut self, usage: Option<Usage>) -> Self {
        self.usage = usage;
        self
    }
    /// With the finish reason in the provider's words, cut to what is safe to store.
    #[must_use]
    pub fn with_finish_reason(mut self, reason: Option<String>) -> Self {
        self.finish_reason = reason.map(|r| short_code(&r));
        self
    }
    /// The wait that the provider asked for.
    #[must_use]
    pub fn retry_after(&self) -> Option<Duration> {
        self.failure.retry_after_ms.map(Duration::from_millis)
    }
}

/// How a provider is called in messages.
#[derive(Clone, Copy, Debug)]
pub struct Names {
    /// For people: `Gemini`.
    pub title: &'static str,
    /// The setting that holds its key: `GEMINI_API_KEY`.
    pub key_setting: &'static str,
    pub key_is_set: bool,
}

impl Names {
    fn key_refused(&self) -> Failure {
        let message = if self.key_is_set {
            format!("{} refused the key: check {}", self.title, self.key_setting)
        } else {
            format!("{} asks for a key: set {}", self.title, self.key_setting)
        };
        Failure::permanent("provider.key_invalid", message)
    }
}

/// What an error answer says, whichever dialect it speaks.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    /// In lower case, only for recognizing; never shown.
    message: String,
    /// `status`, `type`, `code` (if it is text), `error_type` and reasons, in lower case.
    codes: Vec<String>,
    /// A number in `code`: the real status of an error inside an answer with 200.
    pub code: Option<u16>,
    retry_after: Option<Duration>,
    retryable: Option<bool>,
    per_day: bool,
    limit_source: Option<String>,
    context_tokens: Option<u64>,
}

impl Report {
    /// Reads an error body. What is not JSON (a proxy's HTML page) gives an empty report.
    #[must_use]
    pub fn parse(body: &[u8]) -> Self {
        serde_json::from_slice(body).map(|value| Self::from_value(&value)).unwrap_or_default()
    }

    /// Reads an error object, bare or under `error`, also in a list of one.
    #[must_use]
    pub fn from_value(value: &Value) -> Self {
        let mut report = Self::default();
        let value = value.as_array().and_then(|list| list.first()).unwrap_or(value);
        let error = match value.get("error") {
            Some(Value::String(text)) => {
                report.message = text.to_lowercase();
                value
            }
            Some(error @ Value::Object(_)) => error,
            _ => value,
        };
        if let Some(text) = error.get("message").and_then(Value::as_str) {
            report.message = text.to_lowercase();
        }
        for pointer in ["/status", "/type", "/code", "/metadata/error_type", "/availability/code", "/metadata/reason"] {
            report.add_code(error.pointer(pointer));
        }
        report.code = match error.get("code") {
            Some(Value::Number(n)) => n.as_u64().and_then(|n| u16::try_from(n).ok()),
            Some(Value::String(s)) => s.parse().ok(),
            _ => None,
        };
        report.limit_source = error
            .pointer("/metadata/limit_source")
            .or_else(|| error.get("limit_source"))
            .and_then(Value::as_str)
            .map(str::to_owned);
        report.retryable = error.pointer("/availability/retryable").and_then(Value::as_bool);
        report.retry_after = ["/availability/retry_after", "/metadata/retry_after", "/metadata/retry_after_seconds"]
            .iter()
            .find_map(|pointer| error.pointer(pointer))
            .and_then(Value::as_f64)
            .and_then(seconds);
        report.context_tokens =
            error.get("n_ctx").or_else(|| value.get("n_ctx")).and_then(Value::as_u64).filter(|n| *n > 0);
        for detail in error.get("details").and_then(Value::as_array).into_iter().flatten() {
            report.add_code(detail.get("reason"));
            if let Some(delay) = detail.get("retryDelay").and_then(Value::as_str) {
                report.retry_after = delay.strip_suffix('s').and_then(|s| s.parse().ok()).and_then(seconds);
            }
            for violation in detail.get("violations").and_then(Value::as_array).into_iter().flatten() {
                let id = violation.get("quotaId").and_then(Value::as_str).unwrap_or_default();
                report.per_day |= id.contains("PerDay") || violation.get("quotaValue") == Some(&json!("0"));
            }
        }
        report.per_day |= report.message.contains("limit: 0,") || report.message.ends_with("limit: 0");
        report
    }

    fn add_code(&mut self, value: Option<&Value>) {
        if let Some(text) = value.and_then(Value::as_str) {
            self.codes.push(text.to_lowercase());
        }
    }
    fn has(&self, code: &str) -> bool {
        self.codes.iter().any(|c| c == code)
    }
    /// Whether the text or a code mentions `needle` (lower case).
    #[must_use]
    pub fn mentions(&self, needle: &str) -> bool {
        self.message.contains(needle) || self.codes.iter().any(|c| c.contains(needle))
    }
    fn context_overflow(&self) -> bool {
        ["context_length_exceeded", "exceed_context_size_error", "context_length", "string_above_max_length"]
            .iter()
            .any(|code| self.has(code))
            || [
                "maximum context length",
                "context length",
                "context size",
                "context window",
                "exceeds the maximum number of tokens",
                "input token count",
                "prompt is too long",
                "too many tokens",
            ]
            .iter()
            .any(|text| self.message.contains(text))
    }
    fn key_refused(&self) -> bool {
        ["api_key_invalid", "api_key_expired", "invalid_api_key", "authentication_error", "unauthenticated"]
            .iter()
            .any(|code| self.has(code))
            || self.message.contains("api key not valid")
            || self.message.contains("api key expired")
    }
    fn refusal(&self) -> bool {
        ["content_policy_violation", "refusal", "moderation", "content_filter", "guardrail", "flagged"]
            .iter()
            .any(|code| self.mentions(code))
    }
}

/// The waits and wishes in the headers of an error answer.
#[derive(Clone, Copy, Debug, Default)]
pub struct Hints {
    pub retry_after: Option<Duration>,
    /// `x-should-retry`.
    pub should_retry: Option<bool>,
}

impl Hints {
    /// Reads `retry-after-ms`, then `Retry-After` (seconds or a date), and `x-should-retry`.
    #[must_use]
    pub fn parse(headers: &HeaderMap, now: DateTime<Utc>) -> Self {
        let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).map(str::trim);
        let milliseconds = text("retry-after-ms").and_then(|s| s.parse::<f64>().ok()).and_then(|ms| seconds(ms / 1e3));
        let retry_after = milliseconds.or_else(|| {
            let value = text("retry-after")?;
            if let Ok(number) = value.parse::<f64>() {
                return seconds(number);
            }
            let date = DateTime::parse_from_rfc2822(value).ok()?;
            Some((date.with_timezone(&Utc) - now).to_std().unwrap_or_default().min(RETRY_AFTER_MAX))
        });
        let should_retry = match text("x-should-retry") {
            Some("true") => Some(true),
            Some("false") => Some(false),
            _ => None,
        };
        Self { retry_after, should_retry }
    }
}

fn seconds(number: f64) -> Option<Duration> {
    Duration::try_from_secs_f64(number).ok().map(|d| d.min(RETRY_AFTER_MAX))
}

/// An upstream code, cut to what is safe to store and show.
pub(super) fn short_code(code: &str) -> String {
    code.chars()
        .filter(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.' | ':' | '/'))
        .take(CODE_BYTES_MAX)
        .collect()
}

/// What an error answer means.
///
/// # Shape
/// `status` is the HTTP status, or the code inside an error that came with status 200 or in mid-stream. The tables of
/// Gemini, OpenRouter and the OpenAI dialect agree where they overlap; what only one of them says (a prepaid balance,
/// a budget of running requests, a quota per day) is recognized by its own words.
#[must_use]
pub fn classify(names: &Names, status: u16, hints: Hints, report: &Report) -> ProviderError {
    let retry_after = hints.retry_after.or(report.retry_after);
    let title = names.title;
    let mut error = match status {
        _ if report.key_refused() && (400..=403).contains(&status) => {
            ProviderError::new(names.key_refused(), Advice::OtherProvider)
        }
        401 => ProviderError::new(names.key_refused(), Advice::OtherProvider),
        402 if hints.retry_after.is_some() || report.limit_source.as_deref() == Some("openrouter_in_flight_budget") => {
            limited(format!("{title}: the estimated cost of running requests fills the budget"), Advice::SameModel)
        }
        402 => ProviderError::new(
            Failure::permanent(
                "provider.no_balance",
                format!("{title}: the account has no balance left: top it up or change {}", names.key_setting),
            ),
            Advice::OtherProvider,
        ),
        403 if report.limit_source.is_some() => ProviderError::new(
            Failure::permanent(
                "provider.no_balance",
                format!("{title}: the budget of the key is spent: raise it or change {}", names.key_setting),
            ),
            Advice::OtherProvider,
        ),
        400 | 403 | 422 if report.refusal() => ProviderError::refused(names, "moderation"),
        403 => ProviderError::new(names.key_refused(), Advice::OtherProvider),
        400 | 413 | 422 | 500 if report.context_overflow() => overflow(format!("{title}: the prompt is too long")),
        413 => overflow(format!("{title}: the request is too large")),
        404 => ProviderError::new(
            Failure::permanent("model.unavailable", format!("{title}: the model is unknown or not offered")),
            Advice::OtherModel,
        ),
        408 | 409 | 499 | 504 | 522 | 524 => {
            unwell("transient.http", format!("{title}: the request timed out at the server"))
        }
        429 if report.per_day => limited(format!("{title}: the quota of the day is used up"), Advice::OtherModel),
        429 if report.has("insufficient_quota") => ProviderError::new(
            Failure::permanent(
                "provider.no_balance",
                format!("{title}: the account has no quota left: top it up or change {}", names.key_setting),
            ),
            Advice::OtherProvider,
        ),
        429 => limited(format!("{title}: too many requests"), Advice::SameModel),
        // A small server says so of a template without tools; asking again cannot help.
        500 | 501 if report.mentions("tools param requires") => ProviderError::new(
            Failure::permanent(
                "provider.bad_request",
                format!("{title}: it was started without support for tools (llama.cpp: --jinja)"),
            ),
            Advice::OtherModel,
        ),
        // Overloaded, by whatever number it is called.
        500..=599 => unwell("transient.http", format!("{title}: the server failed (HTTP {status})")),
        300..=399 => ProviderError::new(
            Failure::permanent("provider.bad_request", format!("{title}: the server redirects, which is not followed")),
            Advice::OtherProvider,
        ),
        400..=499 => ProviderError::new(
            Failure::permanent(
                "provider.bad_request",
                format!("{title}: the request was not accepted (HTTP {status})"),
            ),
            Advice::OtherModel,
        ),
        _ => unwell("transient.http", format!("{title}: unexpected status {status}")),
    };
    error.http_status = Some(status);
    error.context_tokens = report.context_tokens;
    if error.failure.kind == FailureKind::Retryable {
        if let Some(wait) = retry_after {
            error.failure.retry_after_ms = Some(u64::try_from(wait.as_millis()).unwrap_or(u64::MAX));
        }
        if error.advice == Advice::SameModel && report.retryable.or(hints.should_retry) == Some(false) {
            error.advice = Advice::OtherModel;
        }
    }
    let codes: Vec<String> = report.codes.iter().map(|c| short_code(c)).collect();
    error.failure.detail = json!({ "http_status": status, "upstream_codes": codes });
    error
}

fn overflow(message: String) -> ProviderError {
    ProviderError::new(Failure::permanent("model.context_overflow", message), Advice::OtherModel)
}
fn limited(message: String, advice: Advice) -> ProviderError {
    ProviderError::new(Failure::retryable("transient.rate_limited", message), advice)
}
fn unwell(code: &str, message: String) -> ProviderError {
    ProviderError { unwell: true, ..ProviderError::new(Failure::retryable(code, message), Advice::SameModel) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use reqwest::header::HeaderValue;

    const NAMES: Names = Names { title: "Gemini", key_setting: "GEMINI_API_KEY", key_is_set: true };

    fn classified(status: u16, body: &Value) -> ProviderError {
        classify(&NAMES, status, Hints::default(), &Report::from_value(body))
    }

    #[test]
    fn the_error_tables_hold_row_by_row() {
        use Advice::{OtherModel, OtherProvider, SameModel};
        let rpc = |status: &str| json!({"error": {"code": 1, "status": status, "message": "m"}});
        let bad_key = json!({"error": {"status": "INVALID_ARGUMENT", "message": "API key not valid.",
            "details": [{"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "API_KEY_INVALID"}]}});
        let per_day = json!({"error": {"status": "RESOURCE_EXHAUSTED", "message": "m", "details": [
            {"violations": [{"quotaId": "GenerateRequestsPerDayPerProjectPerModel-FreeTier", "quotaValue": "50"}]}]}});
        let in_flight = json!({"error": {"code": 402, "metadata": {"limit_source": "openrouter_in_flight_budget"}}});
        let credits = json!({"error": {"code": 402, "metadata": {"limit_source": "openrouter_credits"}}});
        let spent = json!({"error": {"code": 403, "metadata": {"limit_source": "key", "resets_at": "x"}}});
        let moderation =
            json!({"error": {"code": 403, "message": "flagged", "metadata": {"error_type": "moderation"}}});
        let ctx = json!({"error": {"code": 400, "type": "exceed_context_size_error", "message": "m", "n_ctx": 4096}});
        let old_vllm = json!({"object": "error", "code": 400,
            "message": "This model's maximum context length is 4096 tokens"});
        let openai_key = json!({"error": {"message": "m", "type": "invalid_request_error", "code": "invalid_api_key"}});
        let quota = json!({"error": {"message": "m", "type": "insufficient_quota", "code": "insufficient_quota"}});
        for (status, body, code, advice) in [
            (400, rpc("INVALID_ARGUMENT"), "provider.bad_request", OtherModel),
            (400, bad_key, "provider.key_invalid", OtherProvider),
            (400, rpc("FAILED_PRECONDITION"), "provider.bad_request", OtherModel),
            (401, rpc("UNAUTHENTICATED"), "provider.key_invalid", OtherProvider),
            (401, openai_key, "provider.key_invalid", OtherProvider),
            (403, rpc("PERMISSION_DENIED"), "provider.key_invalid", OtherProvider),
            (403, spent, "provider.no_balance", OtherProvider),
            (403, moderation, "model.refused", OtherModel),
            (402, rpc("RESOURCE_EXHAUSTED"), "provider.no_balance", OtherProvider),
            (402, credits, "provider.no_balance", OtherProvider),
            (402, in_flight, "transient.rate_limited", SameModel),
            (404, rpc("NOT_FOUND"), "model.unavailable", OtherModel),
            (400, ctx, "model.context_overflow", OtherModel),
            (400, old_vllm, "model.context_overflow", OtherModel),
            (413, json!({}), "model.context_overflow", OtherModel),
            (429, per_day, "transient.rate_limited", OtherModel),
            (429, quota, "provider.no_balance", OtherProvider),
            (429, rpc("RESOURCE_EXHAUSTED"), "transient.rate_limited", SameModel),
            (408, json!({}), "transient.http", SameModel),
            (499, rpc("CANCELLED"), "transient.http", SameModel),
            (500, rpc("INTERNAL"), "transient.http", SameModel),
            (503, rpc("UNAVAILABLE"), "transient.http", SameModel),
            (
                500,
                json!({"error": {"message": "tools param requires --jinja flag"}}),
                "provider.bad_request",
                OtherModel,
            ),
            (504, rpc("DEADLINE_EXCEEDED"), "transient.http", SameModel),
            (524, json!({}), "transient.http", SameModel),
            (529, json!({"error": {"code": "server_error"}}), "transient.http", SameModel),
            (418, json!("teapot"), "provider.bad_request", OtherModel),
            (307, json!({}), "provider.bad_request", OtherProvider),
        ] {
            let error = classified(status, &body);
            assert_eq!((error.failure.code.as_str(), error.advice), (code, advice), "{status} {body}");
        }
    }

    #[test]
    fn a_wrong_key_names_the_provider_and_the_setting() {
        assert_eq!(classified(401, &json!({})).failure.message, "Gemini refused the key: check GEMINI_API_KEY");
        let keyless = Names { title: "The OpenAI-compatible server", key_setting: "OPENAI_API_KEY", key_is_set: false };
        let error = classify(&keyless, 401, Hints::default(), &Report::default());
        assert_eq!(error.failure.message, "The OpenAI-compatible server asks for a key: set OPENAI_API_KEY");
    }

    #[test]
    fn waits_come_from_headers_then_from_the_body() {
        let body = json!({"error": {"status": "RESOURCE_EXHAUSTED", "details": [{"retryDelay": "53.01s"}]}});
        assert_eq!(classified(429, &body).failure.retry_after_ms, Some(53_010));
        let now = DateTime::parse_from_rfc3339("2026-11-24T10:00:00Z").unwrap().with_timezone(&Utc);
        for (name, value, expected) in [
            ("retry-after-ms", "1500", Some(1500)),
            ("retry-after", "7", Some(7000)),
            ("retry-after", "0.5", Some(500)),
            ("retry-after", "Tue, 24 Nov 2026 10:01:00 GMT", Some(60_000)),
            ("retry-after", "Tue, 24 Nov 2020 10:01:00 GMT", Some(0)),
            ("retry-after", "soon", None),
            ("retry-after", "-4", None),
            ("retry-after", "1e300", None),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(name, HeaderValue::from_static(value));
            let error = classify(&NAMES, 429, Hints::parse(&headers, now), &Report::default());
            assert_eq!(error.failure.retry_after_ms, expected, "{name}: {value}");
        }
        let endless = Hints { retry_after: seconds(1e15), should_retry: None };
        assert_eq!(endless.retry_after, Some(RETRY_AFTER_MAX));
    }

    #[test]
    fn availability_and_should_retry_are_preferred_to_the_status() {
        let body = json!({"error": {"code": 503, "availability": {"code": "x", "retryable": false, "retry_after": 3}}});
        let error = classified(503, &body);
        assert_eq!((error.advice, error.failure.retry_after_ms), (Advice::OtherModel, Some(3000)));
        let hints = Hints { retry_after: None, should_retry: Some(false) };
        assert_eq!(classify(&NAMES, 500, hints, &Report::default()).advice, Advice::OtherModel);
    }

    #[test]
    fn nothing_of_the_body_reaches_the_message() {
        let body = json!({"error": {"code": "co de<b>", "message": "SECRET in <html>", "type": "SECRET TYPE\n"}});
        let failure = classified(418, &body).failure;
        assert!(!failure.message.contains("SECRET"));
        assert_eq!(failure.detail["upstream_codes"], json!(["secrettype", "codeb"]));
    }
}
