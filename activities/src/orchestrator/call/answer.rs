//! A finished answer, held against the shape that was asked for: usable, or to be repaired once. Both are paid for and recorded.

use super::{
    super::{Message, Reply, Request, ToolCall},
    Task,
};
use crate::{orchestrator::route::Candidate, provider::Completion};
use loopwright_engine::{Failure, activity::Context};
use serde_json::{Value, json};

/// A finished answer that did not have the required shape. It has been paid for, so it is recorded like a usable one: an
/// attempt that carries on for a lost one begins where that one was.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub(super) struct Unusable {
    pub(super) provider: String,
    pub(super) model: String,
    pub(super) text: String,
    pub(super) errors: Vec<String>,
}

impl Unusable {
    /// Checkpoint of the `n`-th unusable answer, 1 or 2, of the attempts that count as one for the retry policy.
    pub(super) fn key(ctx: &Context, key: &str, n: u32) -> String {
        format!("call:{key}~unusable.{}.{n}", ctx.info().counted)
    }

    pub(super) fn is_from(&self, candidate: &Candidate) -> bool {
        (self.provider.as_str(), self.model.as_str()) == (candidate.provider.as_str(), candidate.model.as_str())
    }

    pub(super) async fn recorded(ctx: &Context, key: &str, n: u32) -> Result<Option<Self>, Failure> {
        let found = ctx.checkpoint(&Self::key(ctx, key, n)).await?;
        found.map(serde_json::from_value).transpose().map_err(|error| unreadable(key, &error))
    }

    /// How the call ends when the repair was unusable too.
    pub(super) fn twice(self) -> Failure {
        let text = format!("{} answered twice without the required shape", self.model);
        Failure::retryable("model.output_invalid", text).with_detail(json!({ "errors": self.errors }))
    }
}

/// Asking again would pay twice, so an unreadable record is an error and not a miss.
pub(super) fn unreadable(key: &str, error: &serde_json::Error) -> Failure {
    let text = format!("the recorded answer {key} cannot be read: {error}");
    Failure::permanent("model.record_unreadable", text)
}

/// An answer, held against what was asked for.
pub(super) enum Judged {
    Reply(Reply),
    Unusable(Unusable),
}

pub(super) fn judge(task: &Task<'_>, candidate: &Candidate, completion: &Completion) -> Judged {
    let json = match &task.shape {
        // A model that calls tools first will answer later.
        Some(shape) if completion.tool_calls.is_empty() => match shape.read(&completion.text) {
            Ok(json) => Some(json),
            Err(errors) => {
                return Judged::Unusable(Unusable {
                    provider: candidate.provider.clone(),
                    model: candidate.model.clone(),
                    text: recordable(&completion.text).chars().take(REPAIR_CHARS_MAX).collect(),
                    errors: errors.iter().map(|error| recordable(error)).collect(),
                });
            }
        },
        _ => None,
    };
    let tool_calls = completion.tool_calls.iter().cloned();
    Judged::Reply(Reply {
        text: recordable(&completion.text),
        json: json.map(without_nul),
        tool_calls: tool_calls.map(|call| ToolCall { arguments: without_nul(call.arguments), ..call }).collect(),
        parts: without_nul(completion.parts.clone()),
        provider: candidate.provider.clone(),
        model: completion.model_served.clone(),
        tokens_prompt: completion.usage.tokens_prompt,
        tokens_output: completion.usage.tokens_output,
    })
}

/// A text as Postgres takes it: an answer with a NUL would be paid for and could not be recorded, again and again.
pub(super) fn recordable(text: &str) -> String {
    text.replace('\0', "\u{2400}")
}

pub(super) fn without_nul(value: Value) -> Value {
    match value {
        Value::String(text) => Value::String(recordable(&text)),
        Value::Array(items) => items.into_iter().map(without_nul).collect(),
        Value::Object(fields) => {
            fields.into_iter().map(|(name, value)| (recordable(&name), without_nul(value))).collect()
        }
        other => other,
    }
}

/// Most of an unusable answer that is kept and shown to the model again, in characters.
pub(super) const REPAIR_CHARS_MAX: usize = 8_000;

pub(super) fn append_repair(request: &mut Request, text: &str, errors: &[String]) {
    if !text.trim().is_empty() {
        request.messages.push(Message::Model {
            text: text.to_owned(),
            tool_calls: vec![],
            parts: Value::Null,
            provider: String::new(),
        });
    }
    let text = format!(
        "This answer cannot be used:\n- {}\nAnswer again, completely, with exactly one JSON value that satisfies the \
         required schema, and nothing else.",
        errors.join("\n- ")
    );
    request.messages.push(Message::User { text });
}
