//! Classifies what went wrong with a call, once, at the edge that saw it: HTTP status and error body become a
//! [`ProviderError`] with a failure code, advice and the wait that the provider asked for.
//!
//! Nothing of an upstream body reaches a failure, which is stored in histories and shown to users: of its codes those that are
//! known by name, anything else is `other`.

pub use super::report::{Hints, Report};
use super::report::{known_code, reason_word};
use crate::usage::{CallState, Usage};
use chrono::{DateTime, Utc};
use loopwright_engine::{Failure, FailureKind};
use serde_json::json;
use std::time::Duration;

/// What the orchestrator should do after a failed call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Advice {
    /// The same model may answer if asked again, after `Failure::retry_after_ms` where the provider named a wait.
    SameModel,
    /// This model will not do it; another may.
    OtherModel,
    /// This key will not do it at present; another may. Where there is none: if the code is `transient.rate_limited`, a
    /// quota of this model is used up and another model may do it; after a 403, or a 429 that names a quota of 0
    /// (`model.unavailable`), the key may not use this model; otherwise no model of this provider will.
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
    /// Its failure may be retryable, but waiting is not known to help: a retry policy has to bound how often it is asked again.
    pub counts: bool,
    /// The answer ended in good order, and without a reason: part of one, or nothing at all.
    pub unfinished: bool,
    pub http_status: Option<u16>,
    pub finish_reason: Option<String>,
    pub model_served: Option<String>,
    /// The stream was read to its proper end.
    pub stream_completed: bool,
    /// What was consumed all the same, as far as it is known.
    pub usage: Option<Box<Usage>>,
    /// Until when the key is of no use, where the provider says so.
    pub key_rests_until: Option<DateTime<Utc>>,
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
            counts: false,
            unfinished: false,
            http_status: None,
            finish_reason: None,
            model_served: None,
            stream_completed: false,
            usage: None,
            key_rests_until: None,
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
    /// The answer ended in good order, and too early: no finish reason came. Whoever cut it, it was not the model; of a provider
    /// that does so to everybody one call at a time finds out whether it is over.
    #[must_use]
    pub fn unfinished(provider: &Names) -> Self {
        let text = format!("{}: the answer ended without a finish reason", provider.title);
        Self {
            unwell: true,
            unfinished: true,
            ..Self::new(Failure::retryable("transient.http", text), Advice::SameModel)
        }
    }
    /// The model came to a limit before it had finished.
    #[must_use]
    pub fn truncated(provider: &Names, what: &str) -> Self {
        Self::new(Failure::retryable("model.truncated", format!("{}: {what}", provider.title)), Advice::SameModel)
    }
    /// The model or a filter before it declined.
    #[must_use]
    pub fn refused(provider: &Names, reason: &str) -> Self {
        let failure = Failure::permanent("model.refused", format!("{}: the model declined to answer", provider.title))
            .with_detail(json!({ "reason": reason_word(reason) }));
        Self::new(failure, Advice::OtherModel)
    }
    /// The model ended in a way that leaves nothing usable, `reason` as it called it.
    #[must_use]
    pub fn unusable(provider: &Names, reason: &str) -> Self {
        let failure =
            Failure::retryable("model.output_invalid", format!("{}: the answer is not usable", provider.title))
                .with_detail(json!({ "finish_reason": reason_word(reason) }));
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
        self.usage = usage.map(Box::new);
        self
    }
    /// With the finish reason in the provider's words, if it is one that may be stored.
    #[must_use]
    pub fn with_finish_reason(mut self, reason: Option<String>) -> Self {
        self.finish_reason = reason.map(|reason| reason_word(&reason).to_owned());
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

/// What an error answer means.
///
/// # Shape
/// `status` is the HTTP status, or the code inside an error that came with status 200 or in mid-stream. The tables of
/// Gemini, OpenRouter and the OpenAI dialect agree where they overlap; what only one of them says (a prepaid balance,
/// a budget of running requests, a quota per day) is recognized by its own words. Who lost patience knows nothing of what the server
/// behind it did and billed: such a call is unknown, wherever it is said.
#[must_use]
pub fn classify(names: &Names, status: u16, hints: Hints, report: &Report) -> ProviderError {
    let retry_after = hints.retry_after.or(report.retry_after);
    let title = names.title;
    let mut error = match status {
        _ if (report.key_refused() || key_blocked(report)) && (400..=403).contains(&status) => {
            ProviderError::new(names.key_refused(), Advice::DisableKey)
        }
        401 => ProviderError::new(names.key_refused(), Advice::DisableKey),
        // A prepaid account that is empty, and credits that are spent: no wait fills them, whatever comes along.
        402 if report.has("resource_exhausted") => no_balance(names, Advice::DisableKey),
        402 if report.limit_source.as_deref() == Some("openrouter_credits") => no_balance(names, Advice::OtherKey),
        402 if hints.retry_after.is_some()
            || report.limit_source.as_deref() == Some("openrouter_in_flight_budget")
            || report.retryable == Some(true) =>
        {
            limited(format!("{title}: the estimated cost of running requests fills the budget"), Advice::SameModel)
        }
        // Nobody has to act: it is filled again by itself.
        402 | 403
            if (report.resets_at.is_some() || report.retryable == Some(true))
                && (status == 402 || is_spent(report)) =>
        {
            limited(format!("{title}: the budget of the key is spent, and is filled again later"), Advice::OtherKey)
        }
        // A balance may come back by itself.
        402 => no_balance(names, Advice::OtherKey),
        403 if is_spent(report) => ProviderError::new(
            Failure::permanent(
                "provider.no_balance",
                format!("{title}: the budget of the key is spent: raise it or change {}", names.key_setting),
            ),
            Advice::OtherKey,
        ),
        400 | 403 | 422 if report.refusal() => ProviderError::refused(names, "moderation"),
        // Without a key that is what is missing, but an open server may also refuse one model.
        403 if !names.key_is_set => ProviderError::new(names.key_refused(), Advice::OtherKey),
        // A page instead of the API's own words may come from a proxy, which knows nothing of the key.
        403 if report.is_empty() => forbidden(format!("{title}: something before the server forbids it (HTTP 403)")),
        // It may be about one model or one region: it must not take the key from everybody for good.
        403 => forbidden(format!("{title}: the key may not use the model (HTTP 403)")),
        400 | 413 | 422 | 500 if report.context_overflow() => overflow(format!("{title}: the prompt is too long")),
        413 => overflow(format!("{title}: the request is too large")),
        404 => ProviderError::new(
            Failure::permanent("model.unavailable", format!("{title}: the model is unknown or not offered")),
            Advice::OtherModel,
        ),
        408 | 409 | 499 | 504 | 522 | 524 => {
            unwell("transient.http", format!("{title}: the request timed out at the server"))
        }
        // There is nothing to wait for, whatever wait it names beside it.
        429 if report.no_quota => ProviderError::new(
            Failure::permanent(
                "model.unavailable",
                format!("{title}: the key has no quota at all for the model: another model, or a paid account"),
            ),
            Advice::OtherKey,
        ),
        429 if report.per_day => limited(format!("{title}: the quota of the day is used up"), Advice::OtherKey),
        429 if report.has("insufficient_quota") => ProviderError::new(
            Failure::permanent(
                "provider.no_balance",
                format!("{title}: the account has no quota left: top it up or change {}", names.key_setting),
            ),
            Advice::OtherKey,
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
    if matches!(status, 408 | 499 | 504 | 524) {
        error.state = CallState::Unknown;
    }
    error.http_status = Some(status);
    error.context_tokens = report.context_tokens;
    error.key_rests_until = report.resets_at;
    // What the server says of itself counts more than its status.
    match report.retryable.or(hints.should_retry) {
        Some(false) if error.advice == Advice::SameModel => {
            error.advice = Advice::OtherModel;
            // A server that is there and says so is no outage that is waited for.
            if error.unwell {
                (error.unwell, error.counts) = (false, true);
            }
        }
        Some(true)
            if matches!(error.failure.code.as_str(), "provider.bad_request" | "model.unavailable")
                && !report.no_quota =>
        {
            error.failure = Failure::retryable("transient.http", format!("{title}: it asks for another try"));
            error.advice = Advice::SameModel;
        }
        _ => {}
    }
    if let (FailureKind::Retryable, Some(wait)) = (error.failure.kind, retry_after) {
        error.failure.retry_after_ms = Some(u64::try_from(wait.as_millis()).unwrap_or(u64::MAX));
    }
    let mut codes: Vec<&str> = report.codes.iter().map(|code| known_code(code)).collect();
    codes.dedup();
    error.failure.detail = json!({ "http_status": status, "upstream_codes": codes });
    error
}

/// Whether a budget that was set for a key or a workspace is used up. OpenRouter's older form has no source of the limit, only words.
fn is_spent(report: &Report) -> bool {
    report.limit_source.is_some() || report.mentions("key limit exceeded")
}

/// Gemini's reasons that are about the key or its project and not about the model.
fn key_blocked(report: &Report) -> bool {
    ["service_disabled", "consumer_suspended", "consumer_invalid", "api_key_service_blocked"]
        .iter()
        .any(|reason| report.has(reason))
}

fn no_balance(names: &Names, advice: Advice) -> ProviderError {
    let message =
        format!("{}: the account has no balance left: top it up or change {}", names.title, names.key_setting);
    ProviderError::new(Failure::permanent("provider.no_balance", message), advice)
}
fn forbidden(message: String) -> ProviderError {
    ProviderError::new(Failure::permanent("model.unavailable", message), Advice::OtherKey)
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
    use super::{
        super::report::{RETRY_AFTER_MAX, seconds},
        *,
    };
    use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
    use serde_json::Value;

    const NAMES: Names = Names { title: "Gemini", key_setting: "GEMINI_API_KEY", key_is_set: true };

    fn classified(status: u16, body: &Value) -> ProviderError {
        classify(&NAMES, status, Hints::default(), &Report::from_value(body))
    }

    #[test]
    fn a_wrong_key_names_the_provider_and_the_setting() {
        assert_eq!(classified(401, &json!({})).failure.message, "Gemini refused the key: check GEMINI_API_KEY");
        let keyless = Names { title: "The OpenAI-compatible server", key_setting: "OPENAI_API_KEY", key_is_set: false };
        let error = classify(&keyless, 401, Hints::default(), &Report::default());
        assert_eq!(error.failure.message, "The OpenAI-compatible server asks for a key: set OPENAI_API_KEY");
    }

    #[test]
    fn only_a_reason_about_the_key_disables_it() {
        let reason = |reason: &str| json!({"error": {"status": "PERMISSION_DENIED", "details": [{"reason": reason}]}});
        for (body, code, advice) in [
            (reason("SERVICE_DISABLED"), "provider.key_invalid", Advice::DisableKey),
            (reason("API_KEY_INVALID"), "provider.key_invalid", Advice::DisableKey),
            (reason("IAM_PERMISSION_DENIED"), "model.unavailable", Advice::OtherKey),
            (json!({"error": {"code": "model_not_found"}}), "model.unavailable", Advice::OtherKey),
            (
                json!({"error": {"message": "Key limit exceeded (daily limit)."}}),
                "provider.no_balance",
                Advice::OtherKey,
            ),
            (json!("a page"), "model.unavailable", Advice::OtherKey),
        ] {
            let error = classified(403, &body);
            assert_eq!((error.failure.code.as_str(), error.advice), (code, advice), "{body}");
        }
        let keyless = Names { key_is_set: false, ..NAMES };
        let error = classify(&keyless, 403, Hints::default(), &Report::default());
        assert_eq!((error.failure.code.as_str(), error.advice), ("provider.key_invalid", Advice::OtherKey));
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
        // The server's own clock, not this machine's.
        let headers = [("retry-after", "Tue, 24 Nov 2026 11:01:00 GMT"), ("date", "Tue, 24 Nov 2026 11:00:00 GMT")];
        let headers = headers.map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)));
        assert_eq!(Hints::parse(&HeaderMap::from_iter(headers), now).retry_after, Some(Duration::from_secs(60)));
        let endless = Hints { retry_after: seconds(1e15), should_retry: None };
        assert_eq!(endless.retry_after, Some(RETRY_AFTER_MAX));
    }

    #[test]
    fn availability_and_should_retry_are_preferred_to_the_status() {
        let body = json!({"error": {"code": 503, "availability": {"code": "x", "retryable": false, "retry_after": 3}}});
        let error = classified(503, &body);
        assert_eq!((error.advice, error.failure.retry_after_ms), (Advice::OtherModel, Some(3000)));
        let hints = Hints { retry_after: None, should_retry: Some(false) };
        let error = classify(&NAMES, 500, hints, &Report::default());
        assert_eq!((error.advice, error.unwell, error.counts), (Advice::OtherModel, false, true));
        // A limit is waited for, whatever it says of trying again.
        let error = classify(&NAMES, 429, hints, &Report::default());
        assert_eq!((error.advice, error.counts), (Advice::OtherModel, false));
        let error = classified(500, &json!({}));
        assert_eq!((error.advice, error.unwell, error.counts), (Advice::SameModel, true, false));
    }

    #[test]
    fn a_budget_that_says_when_it_is_filled_again_is_waited_for() {
        let body = |metadata: Value| json!({"error": {"code": 403, "message": "m", "metadata": metadata}});
        let at = "2026-11-27T00:00:00Z";
        for (status, metadata, code, kind) in [
            (403, json!({"limit_source": "key", "resets_at": at}), "transient.rate_limited", FailureKind::Retryable),
            (402, json!({"limit_source": "x", "resets_at": at}), "transient.rate_limited", FailureKind::Retryable),
            (403, json!({"limit_source": "key"}), "provider.no_balance", FailureKind::Permanent),
            (402, json!({"limit_source": "openrouter_credits"}), "provider.no_balance", FailureKind::Permanent),
            // It is not a budget that this is about.
            (403, json!({"resets_at": at}), "model.unavailable", FailureKind::Permanent),
        ] {
            let error = classified(status, &body(metadata.clone()));
            assert_eq!((error.failure.code.as_str(), error.failure.kind), (code, kind), "{status} {metadata}");
            assert_eq!(
                (error.advice, error.key_rests_until.is_some()),
                (Advice::OtherKey, metadata["resets_at"] == at)
            );
        }
    }

    #[test]
    fn a_spent_key_of_which_the_server_says_that_it_may_be_asked_again_is_waited_for() {
        for (retryable, code) in [(true, "transient.rate_limited"), (false, "provider.no_balance")] {
            let body = json!({"error": {"code": 403, "message": "Key limit exceeded",
                "availability": {"retryable": retryable, "retry_after": 7}}});
            let error = classified(403, &body);
            assert_eq!((error.failure.code.as_str(), error.advice), (code, Advice::OtherKey));
            assert_eq!(error.failure.retry_after_ms, retryable.then_some(7_000));
        }
    }

    #[test]
    fn nothing_of_the_body_reaches_the_failure() {
        let body = json!({"error": {"code": "model_not_found", "message": "SECRET in <html>", "type": "SECRET_TYPE", "status": "SECRET"}});
        let failure = classified(418, &body).failure;
        assert!(!format!("{failure:?}").to_lowercase().contains("secret"), "{failure:?}");
        assert_eq!(failure.detail["upstream_codes"], json!(["other", "model_not_found"]));
    }
}
