//! What an error answer says: its body in whichever dialect, and the hints in its headers. It does not decide what that
//! means: [`super::retry::classify`] does.

use chrono::{DateTime, Utc};
use reqwest::header::HeaderMap;
use serde_json::{Value, json};
use std::time::Duration;

/// Longest wait that is believed, however long a provider says: a week.
pub(super) const RETRY_AFTER_MAX: Duration = Duration::from_secs(7 * 24 * 3600);

/// What an error answer says, whichever dialect it speaks.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    /// In lower case, only for recognizing; never shown.
    pub(super) message: String,
    /// `status`, `type`, `code` (if it is text), `error_type` and reasons, in lower case.
    pub(super) codes: Vec<String>,
    /// A number in `code`: the real status of an error inside an answer with 200.
    pub code: Option<u16>,
    pub(super) retry_after: Option<Duration>,
    pub(super) retryable: Option<bool>,
    pub(super) per_day: bool,
    /// It names a quota of 0: one that no wait fills.
    pub(super) no_quota: bool,
    pub(super) limit_source: Option<String>,
    /// When a spent budget is filled again.
    pub(super) resets_at: Option<DateTime<Utc>>,
    pub(super) context_tokens: Option<u64>,
    /// It quotes what a moderator took offence at.
    pub(super) flagged: bool,
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
        // The last is OpenRouter's copy of the header that its limit of requests came with.
        report.resets_at = ["/metadata/resets_at", "/resets_at", "/metadata/headers/X-RateLimit-Reset"]
            .iter()
            .find_map(|pointer| error.pointer(pointer))
            .and_then(instant);
        report.retryable = error.pointer("/availability/retryable").and_then(Value::as_bool);
        report.retry_after = ["/availability/retry_after", "/metadata/retry_after", "/metadata/retry_after_seconds"]
            .iter()
            .find_map(|pointer| error.pointer(pointer))
            .and_then(Value::as_f64)
            .and_then(seconds);
        report.context_tokens =
            error.get("n_ctx").or_else(|| value.get("n_ctx")).and_then(Value::as_u64).filter(|n| *n > 0);
        report.flagged = error.pointer("/metadata/flagged_input").is_some_and(|input| !input.is_null());
        for detail in error.get("details").and_then(Value::as_array).into_iter().flatten() {
            report.add_code(detail.get("reason"));
            if let Some(delay) = detail.get("retryDelay").and_then(Value::as_str) {
                report.retry_after = delay.strip_suffix('s').and_then(|s| s.parse().ok()).and_then(seconds);
            }
            for violation in detail.get("violations").and_then(Value::as_array).into_iter().flatten() {
                let id = violation.get("quotaId").and_then(Value::as_str).unwrap_or_default();
                report.per_day |= id.contains("PerDay");
                report.no_quota |= violation.get("quotaValue") == Some(&json!("0"));
            }
        }
        report.per_day |=
            ["per-day", "requests per day", "tokens per day"].iter().any(|words| report.message.contains(words));
        report.no_quota |= names_zero(&report.message);
        report
    }

    fn add_code(&mut self, value: Option<&Value>) {
        if let Some(text) = value.and_then(Value::as_str) {
            self.codes.push(text.to_lowercase());
        }
    }
    /// Whether the body said nothing that any dialect knows.
    pub(super) fn is_empty(&self) -> bool {
        *self == Self::default()
    }
    pub(super) fn has(&self, code: &str) -> bool {
        self.codes.iter().any(|c| c == code)
    }
    /// Whether the text or a code mentions `needle` (lower case).
    #[must_use]
    pub fn mentions(&self, needle: &str) -> bool {
        self.message.contains(needle) || self.codes.iter().any(|c| c.contains(needle))
    }
    pub(super) fn context_overflow(&self) -> bool {
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
    /// By its reason. Its words count only where they begin the message and no code says more than that something was wrong:
    /// Gemini quotes names of the request in its messages, and a refused key is out of service for everybody.
    pub(super) fn key_refused(&self) -> bool {
        ["api_key_invalid", "api_key_expired", "invalid_api_key", "authentication_error", "unauthenticated"]
            .iter()
            .any(|code| self.has(code))
            || self.codes.iter().all(|code| code == "invalid_argument")
                && ["api key not valid", "api key expired"].iter().any(|words| self.message.starts_with(words))
    }
    /// Whether what was asked was against rules. By a code, or by what the moderators say; a message may quote a name of the
    /// request, such as that of a tool, and single words in it mean nothing.
    pub(super) fn refusal(&self) -> bool {
        self.flagged
            || ["content_policy_violation", "refusal", "moderation", "content_filter", "guardrail", "flagged"]
                .iter()
                .any(|word| self.codes.iter().any(|code| code.contains(word)))
            || ["was flagged", "were flagged", "content policy", "usage policies", "requires moderation"]
                .iter()
                .any(|words| self.message.contains(words))
    }
}

/// Whether a message (in lower case) names a limit of 0, and not of a number that only begins so.
fn names_zero(message: &str) -> bool {
    message.split("limit: 0").skip(1).any(|rest| {
        let digit = |text: &str| text.starts_with(|c: char| c.is_ascii_digit());
        !digit(rest) && !rest.strip_prefix('.').is_some_and(digit)
    })
}

/// An instant as a date, or in milliseconds, as JavaScript counts, or seconds.
fn instant(value: &Value) -> Option<DateTime<Utc>> {
    let number = match value {
        Value::String(text) => match text.parse() {
            Ok(number) => number,
            Err(_) => return DateTime::parse_from_rfc3339(text).ok().map(|at| at.with_timezone(&Utc)),
        },
        Value::Number(number) => number.as_i64()?,
        _ => return None,
    };
    if number > 100_000_000_000 { DateTime::from_timestamp_millis(number) } else { DateTime::from_timestamp(number, 0) }
}

/// The waits and wishes in the headers of an error answer.
#[derive(Clone, Copy, Debug, Default)]
pub struct Hints {
    pub retry_after: Option<Duration>,
    /// `x-should-retry`.
    pub should_retry: Option<bool>,
}

impl Hints {
    /// Reads `retry-after-ms`, then `Retry-After` (seconds or a date), and `x-should-retry`. A date is held against the server's own
    /// clock (`Date`), and against `now`, which is this machine's, only where it says none.
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
            let now = text("date").and_then(|said| DateTime::parse_from_rfc2822(said).ok()).map_or(now, Into::into);
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

pub(super) fn seconds(number: f64) -> Option<Duration> {
    Duration::try_from_secs_f64(number).ok().map(|d| d.min(RETRY_AFTER_MAX))
}

/// Error codes of the three dialects, in lower case: those that are documented and those that were seen. Nothing else of an error
/// goes into a history: a server may say anything there, the key that it was sent too.
const KNOWN_CODES: &[&str] = &[
    // Statuses of google.rpc, and reasons of its ErrorInfo.
    "aborted",
    "already_exists",
    "cancelled",
    "data_loss",
    "deadline_exceeded",
    "failed_precondition",
    "internal",
    "invalid_argument",
    "not_found",
    "out_of_range",
    "permission_denied",
    "resource_exhausted",
    "unauthenticated",
    "unavailable",
    "unimplemented",
    "unknown",
    "api_key_expired",
    "api_key_invalid",
    "api_key_service_blocked",
    "billing_disabled",
    "consumer_invalid",
    "consumer_suspended",
    "iam_permission_denied",
    "service_disabled",
    // OpenRouter's `error_type`.
    "authentication",
    "content_policy_violation",
    "context_length_exceeded",
    "guardrail",
    "insufficient_credits",
    "invalid_request",
    "moderation",
    "no_provider",
    "overloaded",
    "payload_too_large",
    "payment_required",
    "provider_unavailable",
    "rate_limited",
    "refusal",
    "server_error",
    "timeout",
    "unprocessable",
    // `type` and `code` of OpenAI and of the servers that resemble it.
    "api_error",
    "authentication_error",
    "badrequesterror",
    "content_filter",
    "context_length",
    "exceed_context_size_error",
    "flagged",
    "insufficient_quota",
    "internal_server_error",
    "internalservererror",
    "invalid_api_key",
    "invalid_request_error",
    "invalid_value",
    "missing_required_parameter",
    "model_not_found",
    "not_found_error",
    "notfounderror",
    "not_supported_error",
    "overloaded_error",
    "permission_error",
    "rate_limit_error",
    "rate_limit_exceeded",
    "requests",
    "string_above_max_length",
    "tokens",
    "unavailable_error",
    "unsupported_parameter",
    "unsupported_value",
];
/// What stands for every other code.
const OTHER: &str = "other";
/// Longest finish reason that is kept, in bytes: longer than any that is known.
const REASON_BYTES_MAX: usize = 40;

/// An upstream code as a history may hold it.
pub(super) fn known_code(code: &str) -> &'static str {
    KNOWN_CODES.iter().find(|known| known.eq_ignore_ascii_case(code)).copied().unwrap_or(OTHER)
}

/// A finish reason as a history may hold it. Reasons are an open list whose new words have to be seen, so what looks like a word is
/// kept: letters and single underscores. A key has digits or signs, or is longer.
pub(super) fn reason_word(reason: &str) -> &str {
    let word = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphabetic());
    if reason.len() <= REASON_BYTES_MAX && reason.split('_').all(word) { reason } else { OTHER }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_of_zero_is_told_from_numbers_that_begin_so() {
        for (message, zero) in [
            ("quota exceeded, limit: 0", true),
            ("limit: 0, model: gemini-3.8-flash", true),
            ("limit: 0\nplease retry in 26.4s.", true),
            ("the quota has limit: 0. please retry", true),
            ("limit: 05, and another limit: 0 too", true),
            ("limit: 0.5 per second", false),
            ("limit: 05", false),
            ("limit: 10", false),
            ("limit: ", false),
        ] {
            assert_eq!(names_zero(message), zero, "{message}");
        }
    }

    #[test]
    fn only_known_codes_and_plain_words_are_kept() {
        assert_eq!((known_code("RESOURCE_EXHAUSTED"), known_code("sk-or-v1-0123")), ("resource_exhausted", OTHER));
        for reason in ["stop", "MAX_TOKENS", "some_new_reason", "IMAGE_PROHIBITED_CONTENT"] {
            assert_eq!(reason_word(reason), reason);
        }
        for reason in
            ["", "_", "a__b", "sk-abc", "AIzaSyA1", "a b", "a\0", "abcdefghijklmnopqrstuvwxyz_abcdefghijklmno"]
        {
            assert_eq!(reason_word(reason), OTHER, "{reason:?}");
        }
    }
}
