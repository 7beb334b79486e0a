//! A finished answer, held against the shape that was asked for and against what can be kept: usable, or to be repaired once. Both
//! are paid for and recorded.

use super::{
    super::{Message, Reply, Request, ToolCall},
    Task,
};
use crate::{nul, orchestrator::route::Candidate, provider::Completion};
use loopwright_engine::{
    Failure,
    activity::{CHECKPOINT_BYTES_MAX, Context},
    definition::inputs::{DEPTH_MAX, is_too_deep},
};
use serde_json::{Value, json};

/// Unusable answers of one candidate within a call: the first is repaired, the second ends it.
pub(super) const UNUSABLE_PER_CANDIDATE: usize = 2;
/// Candidates that may answer unusably within a call: each such answer is paid for.
pub(super) const UNUSABLE_CANDIDATES: usize = 2;
/// Unusable answers of a call.
const UNUSABLE_MAX: usize = UNUSABLE_PER_CANDIDATE * UNUSABLE_CANDIDATES;

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
    /// Checkpoint of the `n`-th unusable answer, from 1 to [`UNUSABLE_MAX`], of the attempts that count as one for the retry policy.
    pub(super) fn key(ctx: &Context, key: &str, n: usize) -> String {
        format!("call:{key}~unusable.{}.{n}", ctx.info().counted)
    }

    pub(super) fn is_from(&self, candidate: &Candidate) -> bool {
        (self.provider.as_str(), self.model.as_str()) == (candidate.provider.as_str(), candidate.model.as_str())
    }

    /// Those that attempts of the same count have left, in order.
    pub(super) async fn recorded(ctx: &Context, key: &str) -> Result<Vec<Self>, Failure> {
        let mut all = Vec::new();
        for n in 1..=UNUSABLE_MAX {
            let Some(found) = ctx.checkpoint(&Self::key(ctx, key, n)).await? else { break };
            all.push(serde_json::from_value(found).map_err(|error| unreadable(key, &error))?);
        }
        Ok(all)
    }

    /// How a candidate ends whose repair was unusable too.
    pub(super) fn twice(&self) -> Failure {
        let text = format!("{} answered twice in a form that cannot be used", self.model);
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
    /// The beginning of one, recorded: its rest is another request.
    Part,
}

/// `own`: it was served by a key of the user's.
pub(super) fn judge(task: &Task<'_>, candidate: &Candidate, completion: &Completion, own: bool) -> Judged {
    let json = match &task.shape {
        // A model that calls tools first will answer later.
        Some(shape) if completion.tool_calls.is_empty() => match shape.read(&completion.text) {
            Ok(json) => Some(json),
            Err(errors) => {
                let errors = errors.iter().map(|error| error_text(error)).collect();
                return Judged::Unusable(unusable(candidate, completion, errors));
            }
        },
        _ => None,
    };
    let tool_calls = completion.tool_calls.iter().cloned();
    let reply = Reply {
        text: nul::text(&completion.text),
        json: json.map(nul::value),
        tool_calls: tool_calls.map(|call| ToolCall { arguments: nul::value(call.arguments), ..call }).collect(),
        parts: nul::value(completion.parts.clone()),
        provider: candidate.provider.clone(),
        model: completion.model_served.clone(),
        own,
        tokens_prompt: completion.usage.tokens_prompt,
        tokens_output: completion.usage.tokens_output,
    };
    match unkeepable(&reply) {
        None => Judged::Reply(reply),
        Some(why) => Judged::Unusable(unusable(candidate, completion, vec![why])),
    }
}

fn unusable(candidate: &Candidate, completion: &Completion, errors: Vec<String>) -> Unusable {
    Unusable {
        provider: candidate.provider.clone(),
        model: candidate.model.clone(),
        text: nul::text(&completion.text).chars().take(REPAIR_CHARS_MAX).collect(),
        errors,
    }
}

/// What is wrong with an answer, cut: the place of an error in a deep value is named by all names above it.
fn error_text(error: &str) -> String {
    nul::text(error).chars().take(ERROR_CHARS_MAX).collect()
}

/// Whether lists and objects stand more than `levels` deep inside each other. A parser has read the value: at most 128.
fn is_deeper(value: &Value, levels: usize) -> bool {
    match value {
        Value::Array(items) => levels == 0 || items.iter().any(|item| is_deeper(item, levels - 1)),
        Value::Object(fields) => levels == 0 || fields.values().any(|item| is_deeper(item, levels - 1)),
        _ => false,
    }
}

/// Why an answer cannot be kept as a checkpoint, said to its model. It has been paid for all the same.
fn unkeepable(reply: &Reply) -> Option<String> {
    let mut given = reply.tool_calls.iter().map(|call| &call.arguments).chain(&reply.json);
    // A reply can always be written.
    let value = serde_json::to_value(reply).unwrap_or_default();
    if given.any(|value| is_deeper(value, ANSWER_LEVELS_MAX)) || is_too_deep(&value) {
        return Some(format!(
            "lists and objects are nested in each other too deeply; stay below {ANSWER_LEVELS_MAX} levels"
        ));
    }
    let bytes = value.to_string().len();
    (bytes > CHECKPOINT_BYTES_MAX).then(|| "the answer is too large by far; say it in less".to_owned())
}

/// Nesting that a model is told to stay below. Chosen: what stands around its value in a record and in a history takes a few of the
/// levels that the engine keeps.
const ANSWER_LEVELS_MAX: usize = DEPTH_MAX - 8;
/// Longest description of one thing that is wrong, in characters.
const ERROR_CHARS_MAX: usize = 600;
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
    let again = if request.output_schema.is_some() {
        "Answer again, completely, with exactly one JSON value that satisfies the required schema, and nothing else."
    } else {
        "Nothing of it was done. Answer again, completely."
    };
    let text = format!("This answer cannot be used:\n- {}\n{again}", errors.join("\n- "));
    request.messages.push(Message::User { text });
}
