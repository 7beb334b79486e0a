//! What a model call consumed, provider-neutral and before price: the one vocabulary that providers, the
//! orchestrator and billing share. These values travel as the opaque readings of `Context::meter_open`,
//! `Context::meter_note` and `Context::meter_close`, and as `Activity::reserve`.

use crate::nul;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json, value::RawValue};

/// Where token counts come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UsageSource {
    Provider,
    Lookup,
    Estimated,
    #[default]
    None,
}

/// Tokens of one call.
///
/// # Shape
/// `tokens_prompt` is all input, the cached part and tool-use prompt included; `tokens_output` is all billed output,
/// reasoning included.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Usage {
    pub tokens_prompt: u64,
    #[serde(default)]
    pub tokens_cached: u64,
    #[serde(default)]
    pub tokens_cache_write: u64,
    pub tokens_output: u64,
    #[serde(default)]
    pub tokens_reasoning: u64,
    pub source: UsageSource,
    /// What the provider says it charged, in pico-USD, parsed from its decimal text.
    #[serde(default)]
    pub provider_cost_pusd: Option<i64>,
    /// The call was served by a key that the account's owner has deposited with the provider (OpenRouter's `is_byok`): what the
    /// provider charged is its fee, and the vendor behind it charges the call itself.
    #[serde(default)]
    pub upstream_key: bool,
    /// What that vendor charged, in pico-USD, where the provider says it.
    #[serde(default)]
    pub upstream_cost_pusd: Option<i64>,
    /// What the provider said that it charged, if that can be no sum of money (negative, no number, millions): in its own spelling,
    /// at most [`DOUBTFUL_BYTES_MAX`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub doubtful_cost: Option<String>,
    /// The provider's own usage object: its JSON as a text, to the letter, where a number could lose digits; else the object.
    #[serde(default)]
    pub raw: Value,
}

/// Most of a doubtful cost that is kept, in bytes.
pub const DOUBTFUL_BYTES_MAX: usize = 64;

/// Largest usage object of a provider that is kept, in bytes of JSON: ten times the longest that is known.
pub const RAW_BYTES_MAX: usize = 16 * 1024;
/// Most digits in a row, and in an exponent, of a number that is kept as it was written. Chosen: several times what a price has.
const DIGITS_MAX: u32 = 200;
const EXPONENT_DIGITS_MAX: u32 = 3;

impl Usage {
    /// What the call cost in all by the provider's words, in pico-USD. `None`: it does not say, and our own arithmetic counts.
    #[must_use]
    pub fn total_cost_pusd(&self) -> Option<i64> {
        let charged = self.provider_cost_pusd?;
        if !self.upstream_key {
            return Some(charged);
        }
        // A vendor that took nothing is not known from one whose price is not known.
        let upstream = self.upstream_cost_pusd.filter(|cost| *cost > 0)?;
        charged.checked_add(upstream)
    }

    /// The provider's own usage object as it can be kept: its numbers as they were written, without NUL, and of one that is too
    /// large only its size.
    #[must_use]
    pub fn raw_to_keep(&self) -> Box<RawValue> {
        let text = match &self.raw {
            Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        if text.len() > RAW_BYTES_MAX {
            return written(&json!({ "too_large_bytes": text.len() }));
        }
        match serde_json::from_str::<Value>(&text) {
            Ok(read) if text.contains("\\u0000") || !has_usual_numbers(&text) => written(&nul::value(read)),
            Ok(_) => RawValue::from_string(text).unwrap_or_default(),
            Err(_) => written(&nul::value(self.raw.clone())),
        }
    }
}

fn written(value: &Value) -> Box<RawValue> {
    serde_json::value::to_raw_value(value).unwrap_or_default()
}

/// Whether Postgres takes every number of a JSON text as it is: it knows 16,383 digits behind the point, and a server may write
/// more. Nobody's usage has a number of more than [`DIGITS_MAX`] digits or [`EXPONENT_DIGITS_MAX`] in its exponent.
fn has_usual_numbers(text: &str) -> bool {
    let mut digits = 0;
    let mut most = DIGITS_MAX;
    let mut before = b' ';
    for byte in text.bytes() {
        if byte.is_ascii_digit() {
            digits += 1;
            if digits > most {
                return false;
            }
        } else if !(matches!(byte, b'+' | b'-') && most == EXPONENT_DIGITS_MAX && digits == 0) {
            let exponent = matches!(byte, b'e' | b'E') && before.is_ascii_digit();
            most = if exponent { EXPONENT_DIGITS_MAX } else { DIGITS_MAX };
            digits = 0;
        }
        before = byte;
    }
    true
}

/// Reading of `meter_open`: a call is about to be made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CallOpened {
    /// `gemini`, `openrouter`, `openai_compatible`, `rehearsed`.
    pub provider: String,
    pub model: String,
    /// `gather`, `plan`, `implement`, `verify`, `readme`, `agent`, …
    pub purpose: String,
    /// 64 hex digits.
    pub request_sha256: String,
    /// Identifies the key without revealing it: keyed hash, 64 hex digits.
    pub key_fingerprint: String,
    /// Last characters of the key for display, at most four; empty for the rehearsed provider.
    pub key_last4: String,
    /// Row of the user's own key; `None`: a key of the platform, found by its fingerprint. Calls on own keys are booked and
    /// never charged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub own_key_id: Option<uuid::Uuid>,
    /// Its server is on this machine or its network: a price for every model of the provider may count. Elsewhere only a price of
    /// the model itself does.
    #[serde(default)]
    pub local: bool,
    /// Upper estimate of the prompt.
    pub input_tokens_max: u64,
    /// Output limit sent with the request.
    pub output_tokens_max: u64,
    /// Dearest price of input, in micro-USD per million tokens, at which the call may be made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub input_umtok_max: Option<u64>,
    /// The same of output.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output_umtok_max: Option<u64>,
}

/// Reading of `meter_note`: what is known of a call that is under way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CallNoted {
    /// The provider's name for it.
    pub provider_request_id: String,
}

/// How a call ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CallState {
    Succeeded,
    Failed,
    /// It may have been served and billed, but its answer was lost.
    Unknown,
}

/// Reading of `meter_close`: a call ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CallClosed {
    pub state: CallState,
    pub model_served: Option<String>,
    pub provider_request_id: Option<String>,
    pub http_status: Option<u16>,
    /// Failure code of a call that did not succeed, for example `transient.rate_limited`.
    pub error_class: Option<String>,
    pub finish_reason: Option<String>,
    pub stream_completed: bool,
    /// Also present on failed calls that the provider bills (truncated, refused after tokens).
    pub usage: Option<Usage>,
}

impl CallClosed {
    /// Whether the user pays for it: an answer, or one that the model itself did not bring to a good end (cut at its limit, not
    /// usable, declined in the middle) and whose tokens the provider reports. What the provider spoiled, what is unknown, what was
    /// refused before a token came, what ended without a finish reason and what only we have estimated of a failure is free.
    #[must_use]
    pub fn is_charged(&self) -> bool {
        let Some(usage) = &self.usage else { return false };
        match self.state {
            CallState::Succeeded => true,
            CallState::Unknown => false,
            CallState::Failed => {
                let class = self.error_class.as_deref().unwrap_or_default();
                // Without a finish reason no limit cut it, but somebody between the model and us; the counts on the way there say
                // what was generated until then, and that nobody can use.
                let by_its_model = class.starts_with("model.") && (class != "model.truncated" || self.stream_completed);
                by_its_model && usage.source == UsageSource::Provider && usage.tokens_output > 0
            }
        }
    }
}

/// What one attempt may consume at most: `Activity::reserve`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Reserve {
    pub calls: Vec<PlannedCall>,
}

/// Calls that an attempt expects to make with one role.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PlannedCall {
    /// Candidate (provider, model) pairs in order; the dearest bounds the hold.
    pub candidates: Vec<(String, String)>,
    /// Prices of input and output above which the candidate at the same place is not asked, in micro-USD per million tokens. Shorter
    /// where none has any.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ceilings: Vec<(Option<u64>, Option<u64>)>,
    pub count: u32,
    /// Per call.
    pub input_tokens: u64,
    /// Per call.
    pub output_tokens: u64,
}

impl PlannedCall {
    /// The candidates in order, with the prices of input and output above which they are not asked.
    pub fn offered(&self) -> impl Iterator<Item = (&str, &str, (Option<u64>, Option<u64>))> {
        let ceilings = self.ceilings.iter().copied().chain(std::iter::repeat((None, None)));
        self.candidates
            .iter()
            .zip(ceilings)
            .map(|((provider, model), ceiling)| (provider.as_str(), model.as_str(), ceiling))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_provider_says_of_its_usage_is_kept_to_the_letter_as_far_as_postgres_takes_it() {
        let kept = |raw: Value| Usage { raw, ..Usage::default() }.raw_to_keep().get().to_owned();
        let exact = r#"{"cost": 0.000310000000000000012300, "n": 1e-7,"is_byok":false}"#;
        assert_eq!(kept(exact.into()), exact);
        // An object, as older readings have it and Gemini's, whose numbers are whole.
        assert_eq!(kept(json!({"totalTokenCount": 3})), r#"{"totalTokenCount":3}"#);
        assert_eq!(kept(Value::Null), "null");
        for (odd, expected) in [
            (r#"{"cost": 1e-20000}"#.to_owned(), r#"{"cost":0.0}"#.to_owned()),
            (r#"{"cost": 1E+0300}"#.to_owned(), r#"{"cost":1e+300}"#.to_owned()),
            (format!(r#"{{"cost": 0.1{}}}"#, "0".repeat(300)), r#"{"cost":0.1}"#.to_owned()),
            (r#"{"a": "b\u0000"}"#.to_owned(), "{\"a\":\"b\u{2400}\"}".to_owned()),
            ("no JSON".to_owned(), "\"no JSON\"".to_owned()),
            (format!("\"{}\"", "x".repeat(RAW_BYTES_MAX)), format!(r#"{{"too_large_bytes":{}}}"#, RAW_BYTES_MAX + 2)),
        ] {
            assert_eq!(kept(odd.clone().into()), expected, "{}", &odd[..odd.len().min(60)]);
        }
    }
}
