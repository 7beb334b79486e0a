//! The three dialects: how each spells text, calls, ends, usage and errors.

use super::act::frames;
use serde_json::{Value, json};

/// The dialects that the server speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    Gemini,
    OpenRouter,
    OpenAi,
}

impl Dialect {
    pub const ALL: [Self; 3] = [Self::Gemini, Self::OpenRouter, Self::OpenAi];

    /// The provider's name in our records.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Gemini => "gemini",
            Self::OpenRouter => "openrouter",
            Self::OpenAi => "openai_compatible",
        }
    }
    /// The setting that holds its key.
    #[must_use]
    pub fn key_setting(self) -> &'static str {
        match self {
            Self::Gemini => "GEMINI_API_KEY",
            Self::OpenRouter => "OPENROUTER_API_KEY",
            Self::OpenAi => "OPENAI_API_KEY",
        }
    }
    /// The setting that holds its address.
    #[must_use]
    pub fn base_setting(self) -> &'static str {
        match self {
            Self::Gemini => "GEMINI_BASE_URL",
            Self::OpenRouter => "OPENROUTER_BASE_URL",
            Self::OpenAi => "OPENAI_BASE_URL",
        }
    }
    /// A finish reason in the words of the dialect.
    #[must_use]
    pub fn reason(self, reason: &str) -> String {
        match (self, reason) {
            (Self::Gemini, "length") => "MAX_TOKENS".to_owned(),
            (Self::Gemini, "content_filter") => "SAFETY".to_owned(),
            (Self::Gemini, "tool_calls") => "STOP".to_owned(),
            (Self::Gemini, other) => other.to_uppercase(),
            (_, other) => other.to_owned(),
        }
    }
    /// A piece of text.
    #[must_use]
    pub fn text(self, text: &str) -> Value {
        match self {
            Self::Gemini => {
                json!({"candidates": [{"index": 0, "content": {"role": "model", "parts": [{"text": text}]}}],
                "modelVersion": "served-model", "responseId": "gen-7"})
            }
            _ => json!({"id": "gen-7", "object": "chat.completion.chunk", "created": 1, "model": "served-model",
                "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": null}]}),
        }
    }
    /// A call of the tool `read`, whole.
    #[must_use]
    pub fn tool_call(self, arguments: &Value) -> Value {
        match self {
            Self::Gemini => json!({"candidates": [{"index": 0, "content": {"role": "model", "parts": [
                {"functionCall": {"name": "read", "args": arguments}, "thoughtSignature": "c2lnbmVk"}]}}]}),
            _ => json!({"id": "gen-7", "model": "served-model", "choices": [{"index": 0, "delta": {"tool_calls": [
                {"index": 0, "id": "call_a", "type": "function",
                 "function": {"name": "read", "arguments": arguments.to_string()}}]}, "finish_reason": null}]}),
        }
    }
    /// The end, with a reason and perhaps usage in the same event.
    #[must_use]
    pub fn finish(self, reason: &str, usage: Option<(u64, u64)>) -> Value {
        let mut event = match self {
            Self::Gemini => json!({"candidates": [{"index": 0, "finishReason": self.reason(reason),
                "content": {"role": "model", "parts": [{"text": ""}]}}]}),
            _ => json!({"id": "gen-7", "model": "served-model",
                "choices": [{"index": 0, "delta": {}, "finish_reason": self.reason(reason)}]}),
        };
        if let Some((prompt, output)) = usage {
            self.put_usage(&mut event, prompt, output);
        }
        event
    }
    /// Usage on its own, as the dialects send it after the end.
    #[must_use]
    pub fn usage(self, prompt: u64, output: u64) -> Value {
        let mut event = match self {
            Self::Gemini => json!({}),
            _ => json!({"id": "gen-7", "model": "served-model", "choices": []}),
        };
        self.put_usage(&mut event, prompt, output);
        event
    }
    fn put_usage(self, event: &mut Value, prompt: u64, output: u64) {
        match self {
            Self::Gemini => {
                event["usageMetadata"] = json!({"promptTokenCount": prompt, "candidatesTokenCount": output,
                    "totalTokenCount": prompt + output});
            }
            Self::OpenRouter => {
                event["usage"] = json!({"prompt_tokens": prompt, "completion_tokens": output, "cost": 0.00031});
            }
            Self::OpenAi => event["usage"] = json!({"prompt_tokens": prompt, "completion_tokens": output}),
        }
    }
    /// A well-behaved stream of one text.
    #[must_use]
    pub fn good(self, text: &str) -> Vec<u8> {
        let mut body = frames(&[self.text(text), self.finish("stop", None), self.usage(11, 7)]);
        if self != Self::Gemini {
            body.extend_from_slice(b"data: [DONE]\n\n");
        }
        body
    }
    /// An error in the shape of the dialect.
    #[must_use]
    pub fn error(self, code: u16, status: &str) -> Value {
        match self {
            Self::Gemini => json!({"error": {"code": code, "status": status, "message": "upstream text"}}),
            Self::OpenRouter => json!({"error": {"code": code, "message": "upstream text",
                "metadata": {"error_type": status.to_lowercase()}}}),
            Self::OpenAi => {
                json!({"error": {"message": "upstream text", "type": status.to_lowercase(), "param": null, "code": null}})
            }
        }
    }
    /// The same error, as it arrives in the middle of a stream.
    ///
    /// # Panics
    /// Never: a document that was just made can be written.
    #[must_use]
    pub fn error_in_stream(self) -> Vec<u8> {
        match self {
            // Bare and pretty, without `data:`.
            Self::Gemini => {
                serde_json::to_vec_pretty(&self.error(503, "UNAVAILABLE")).expect("a JSON value can be written")
            }
            Self::OpenRouter => frames(&[json!({"id": "gen-7", "model": "served-model",
                "error": {"code": 502, "message": "upstream text", "metadata": {"error_type": "provider_unavailable"}},
                "choices": [{"index": 0, "delta": {"content": ""}, "finish_reason": "error"}]})]),
            Self::OpenAi => frames(&[
                json!({"error": {"message": "upstream text", "type": "server_error", "code": "server_error"}}),
            ]),
        }
    }
}
