//! The rehearsed model: answers from a file, for the demo and for tests. It says `rehearsed` wherever a name is shown.
//!
//! An answer is chosen by the identity of the call, step path and call key, and never by the order of calls: after a
//! crash, or with parallel steps, the same call gets the same answer.

use super::{Advice, Call, Completion, KeyIdentity, Provider, ProviderError, estimate};
use crate::{
    orchestrator::ToolCall,
    usage::{CallState, Usage, UsageSource},
};
use futures_util::future::BoxFuture;
use loopwright_engine::{Failure, FailureKind};
use serde::Deserialize;
use serde_json::{Value, json};
use std::{path::Path, time::Duration};

/// Longest delay of one answer: a rehearsal may seem to think, not to hang.
pub const DELAY_MAX: Duration = Duration::from_secs(30);
/// Largest script, in bytes: a demo needs a hundredth of it.
pub const SCRIPT_BYTES_MAX: usize = 4 * 1024 * 1024;
/// Most pieces that a delay is cut into.
const CHUNKS_MAX: u32 = 1000;

/// A script that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ScriptError {
    #[error("the rehearsal script cannot be read: {0}")]
    Read(#[from] std::io::Error),
    #[error("the rehearsal script exceeds {SCRIPT_BYTES_MAX} bytes")]
    TooLarge,
    /// The parser's text, with line and column.
    #[error("the rehearsal script is not valid: {0}")]
    Invalid(String),
}

/// One rehearsed answer.
///
/// # Shape
/// In YAML a list of `{at, reply, delay_ms?, chunks?}`. `at` is a glob over `<step path>:<call key>` in which `*` is any
/// text and `?` any one character; everything else, brackets and tildes included, is literal. The first entry that
/// fits is used.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    pub at: String,
    pub reply: Answer,
    /// How long the model seems to think, in milliseconds; cut at [`DELAY_MAX`].
    #[serde(default)]
    pub delay_ms: u64,
    /// Pieces in which the answer seems to arrive; the delay is spread over them.
    #[serde(default)]
    pub chunks: Option<u32>,
}

/// What is answered: text, JSON, calls of tools, or a failure of the provider.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Answer {
    pub text: Option<String>,
    pub json: Option<Value>,
    pub tool_calls: Vec<Tool>,
    pub failure: Option<Fault>,
}

/// A rehearsed call of a tool.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tool {
    pub name: String,
    #[serde(default)]
    pub arguments: Value,
}

/// A rehearsed fault of the provider.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fault {
    /// Failure code, for example `transient.rate_limited`.
    pub code: String,
    #[serde(default)]
    pub permanent: bool,
    #[serde(default)]
    pub retry_after_ms: Option<u64>,
}

/// A provider that reads its answers from a script.
#[derive(Clone, Debug, Default)]
pub struct Scripted {
    entries: Vec<Entry>,
}

impl Scripted {
    /// A provider that answers with these entries.
    #[must_use]
    pub fn new(entries: Vec<Entry>) -> Self {
        Self { entries }
    }

    /// Reads a script.
    ///
    /// # Errors
    /// It is too large or not what [`Entry`] describes.
    pub fn from_yaml(text: &str) -> Result<Self, ScriptError> {
        if text.len() > SCRIPT_BYTES_MAX {
            return Err(ScriptError::TooLarge);
        }
        let options = serde_yaml::options! {
            strict_booleans: true,
            leading_zero_numbers_as_strings: true,
            budget: serde_yaml::budget! { max_depth: 64, max_nodes: 100_000, max_documents: 1,
                max_total_scalar_bytes: SCRIPT_BYTES_MAX },
        };
        let entries =
            serde_yaml::from_str_with_options(text, options).map_err(|e| ScriptError::Invalid(e.to_string()))?;
        Ok(Self { entries })
    }

    /// Reads a script from a file.
    ///
    /// # Errors
    /// As [`Scripted::from_yaml`], or the file cannot be read.
    pub fn load(path: &Path) -> Result<Self, ScriptError> {
        Self::from_yaml(&std::fs::read_to_string(path)?)
    }

    async fn complete(&self, call: Call<'_>) -> Result<Completion, ProviderError> {
        let identity = format!("{}:{}", call.path, call.key);
        let Some(entry) = self.entries.iter().find(|entry| glob_matches(&entry.at, &identity)) else {
            let failure =
                Failure::permanent("rehearsal.no_answer", format!("the rehearsal has no answer for {identity}"));
            return Err(ProviderError::new(failure, Advice::Stop));
        };
        let delay = Duration::from_millis(entry.delay_ms).min(DELAY_MAX);
        let chunks = entry.chunks.unwrap_or(1).clamp(1, CHUNKS_MAX);
        if !delay.is_zero() {
            for _ in 0..chunks {
                tokio::select! {
                    biased;
                    () = call.cancellation.cancelled() => return Err(ProviderError::cancelled(CallState::Unknown)),
                    () = tokio::time::sleep(delay / chunks) => {}
                }
            }
        }
        let prompt = estimate::tokens(estimate::request_bytes(call.request), estimate::BYTES_PER_TOKEN);
        let usage = |output: &str| Usage {
            tokens_prompt: prompt,
            tokens_output: estimate::tokens(output.len(), estimate::BYTES_PER_TOKEN),
            source: UsageSource::Provider,
            ..Usage::default()
        };
        if let Some(fault) = &entry.reply.failure {
            let kind = if fault.permanent { FailureKind::Permanent } else { FailureKind::Retryable };
            let mut failure = Failure::new(kind, fault.code.clone(), "a rehearsed fault");
            failure.retry_after_ms = fault.retry_after_ms;
            let advice = if fault.permanent { Advice::OtherModel } else { Advice::SameModel };
            return Err(ProviderError::new(failure, advice));
        }
        let text = match (&entry.reply.text, &entry.reply.json) {
            (Some(text), _) => text.clone(),
            (None, Some(json)) => json.to_string(),
            (None, None) => String::new(),
        };
        let tool_calls: Vec<ToolCall> = entry
            .reply
            .tool_calls
            .iter()
            .enumerate()
            .map(|(position, tool)| ToolCall {
                id: format!("call_{}", position + 1),
                name: tool.name.clone(),
                arguments: if tool.arguments.is_null() { json!({}) } else { tool.arguments.clone() },
            })
            .collect();
        let mut spoken = text.clone();
        for tool in &tool_calls {
            spoken.push_str(&tool.name);
            spoken.push_str(&tool.arguments.to_string());
        }
        Ok(Completion {
            text,
            tool_calls,
            parts: Value::Null,
            continuation_token: None,
            model_served: call.model.to_owned(),
            finish_reason: "stop".to_owned(),
            usage: usage(&spoken),
            http_status: None,
            provider_request_id: None,
        })
    }
}

impl Provider for Scripted {
    fn name(&self) -> &'static str {
        "rehearsed"
    }
    fn key(&self) -> KeyIdentity {
        KeyIdentity::of("rehearsed", None)
    }
    fn complete<'a>(&'a self, call: Call<'a>) -> BoxFuture<'a, Result<Completion, ProviderError>> {
        Box::pin(self.complete(call))
    }
}

/// Whether `pattern` covers the whole of `text`. Linear in practice: only the newest `*` is ever reconsidered.
fn glob_matches(pattern: &str, text: &str) -> bool {
    let (pattern, text): (Vec<char>, Vec<char>) = (pattern.chars().collect(), text.chars().collect());
    let (mut p, mut t) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while t < text.len() {
        match pattern.get(p) {
            Some('*') => {
                star = Some((p, t));
                p += 1;
            }
            Some(&c) if c == '?' || c == text[t] => {
                p += 1;
                t += 1;
            }
            _ => match star {
                Some((star_p, star_t)) => {
                    star = Some((star_p, star_t + 1));
                    p = star_p + 1;
                    t = star_t + 1;
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|&c| c == '*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn globs_take_brackets_and_tildes_literally() {
        for (pattern, text, expected) in [
            ("gather~1/ask:*", "gather~1/ask:turn", true),
            (
                "*implement[greeting]/code*:turn-?",
                "implement..verify~1/implement[greeting]/code..check~2/code:turn-3",
                true,
            ),
            ("*[greeting]*:turn-1", "implement[parting]/code:turn-1", false),
            ("*", "", true),
            ("a*b*c", "a-b-b-c", true),
            ("a*b", "a-b-c", false),
            ("", "x", false),
            ("plan:plan", "plan:plan2", false),
        ] {
            assert_eq!(glob_matches(pattern, text), expected, "{pattern} on {text}");
        }
    }

    #[test]
    fn a_script_is_checked_when_it_is_read() {
        let script = Scripted::from_yaml(
            "- at: 'plan:*'\n  reply: { json: { ok: true, n: 1 } }\n- at: '*'\n  delay_ms: 5\n  chunks: 2\n  reply:\n    \
             tool_calls: [{ name: read, arguments: { path: a.rs } }]\n",
        )
        .unwrap();
        assert_eq!(script.entries.len(), 2);
        assert_eq!(script.entries[0].reply.json, Some(json!({"ok": true, "n": 1})));
        assert!(matches!(Scripted::from_yaml("- at: x\n  replies: {}\n"), Err(ScriptError::Invalid(_))));
        assert!(matches!(Scripted::from_yaml(&" ".repeat(SCRIPT_BYTES_MAX + 1)), Err(ScriptError::TooLarge)));
    }
}
