//! Answers by their meaning, to be spelled in any dialect, as a stream or as one document.

use super::{act::Act, dialect::Dialect};
use serde_json::{Value, json};

/// The usage that an answer reports.
///
/// # Shape
/// `prompt` includes `cached`; `output` includes `reasoning`. `cost` is decimal text in USD, said by OpenRouter only.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Told {
    pub prompt: u64,
    pub cached: u64,
    pub output: u64,
    pub reasoning: u64,
    pub cost: String,
}

impl Default for Told {
    fn default() -> Self {
        Self { prompt: 11, cached: 0, output: 7, reasoning: 0, cost: "0.00031".to_owned() }
    }
}

impl Told {
    pub(super) fn field(dialect: Dialect) -> &'static str {
        if dialect == Dialect::Gemini { "usageMetadata" } else { "usage" }
    }
    /// As the dialect spells it.
    pub(super) fn value(&self, dialect: Dialect) -> Value {
        if dialect == Dialect::Gemini {
            return json!({"promptTokenCount": self.prompt, "cachedContentTokenCount": self.cached,
                "candidatesTokenCount": self.output - self.reasoning, "thoughtsTokenCount": self.reasoning,
                "totalTokenCount": self.prompt + self.output,
                "promptTokensDetails": [{"modality": "TEXT", "tokenCount": self.prompt}]});
        }
        let mut usage = json!({"prompt_tokens": self.prompt, "completion_tokens": self.output,
            "total_tokens": self.prompt + self.output, "prompt_tokens_details": {"cached_tokens": self.cached},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning}});
        if dialect == Dialect::OpenRouter {
            usage["cost"] = serde_json::from_str(&self.cost).unwrap_or(Value::Null);
            usage["is_byok"] = json!(false);
        }
        usage
    }
}

/// A good answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Reply {
    pub text: String,
    /// Reasoning that is shown; empty for none. OpenRouter adds it as signed blocks, to be sent back.
    pub thought: String,
    /// Name and arguments.
    pub tool_calls: Vec<(String, Value)>,
    /// In the words of chat completions: `stop`, `tool_calls`, `length`, `content_filter`, …
    pub finish_reason: String,
    /// Gemini's, beside the finish reason.
    pub continuation_token: Option<String>,
    /// `None` leaves usage out.
    pub usage: Option<Told>,
    /// `None` serves the model that was asked for.
    pub model_served: Option<String>,
}

impl Reply {
    /// A text, with usage of 11 and 7 tokens.
    #[must_use]
    pub fn text(text: &str) -> Self {
        Self {
            text: text.to_owned(),
            thought: String::new(),
            tool_calls: Vec::new(),
            finish_reason: "stop".to_owned(),
            continuation_token: None,
            usage: Some(Told::default()),
            model_served: None,
        }
    }
    /// A call of one tool.
    #[must_use]
    pub fn tool_call(name: &str, arguments: Value) -> Self {
        Self {
            tool_calls: vec![(name.to_owned(), arguments)],
            finish_reason: "tool_calls".to_owned(),
            ..Self::text("")
        }
    }
    /// The beginning of an answer, whose rest is given for this token.
    #[must_use]
    pub fn continued(mut self, token: &str) -> Self {
        self.finish_reason = "continuation".to_owned();
        self.continuation_token = Some(token.to_owned());
        self
    }
    /// With this usage, or none.
    #[must_use]
    pub fn with_usage(mut self, usage: Option<Told>) -> Self {
        self.usage = usage;
        self
    }

    /// The events of its stream, `[DONE]` not included.
    #[must_use]
    pub fn events(&self, dialect: Dialect, id: &str, model: &str) -> Vec<Value> {
        let mut events = match dialect {
            Dialect::Gemini => self.gemini_events(),
            Dialect::OpenRouter | Dialect::OpenAi => self.chat_events(dialect),
        };
        if let Some(usage) = &self.usage {
            let value = usage.value(dialect);
            match dialect {
                // On the last event, the one with the reason.
                Dialect::Gemini => {
                    if let Some(last) = events.last_mut() {
                        last["usageMetadata"] = value;
                    }
                }
                Dialect::OpenRouter | Dialect::OpenAi => events.push(json!({"choices": [], "usage": value})),
            }
        }
        for event in &mut events {
            self.envelope(dialect, id, model, "chat.completion.chunk", event);
        }
        events
    }

    /// Its one document.
    #[must_use]
    pub fn document(&self, dialect: Dialect, id: &str, model: &str) -> Value {
        let mut document = match dialect {
            Dialect::Gemini => {
                let mut candidate = json!({"index": 0, "content": {"role": "model", "parts": self.gemini_parts()}, "safetyRatings": []});
                self.gemini_end(&mut candidate);
                json!({ "candidates": [candidate] })
            }
            Dialect::OpenRouter | Dialect::OpenAi => {
                let message = self.chat_message(dialect);
                json!({"choices": [{"index": 0, "message": message, "finish_reason": self.finish_reason}]})
            }
        };
        if let Some(usage) = &self.usage {
            document[Told::field(dialect)] = usage.value(dialect);
        }
        self.envelope(dialect, id, model, "chat.completion", &mut document);
        document
    }

    fn envelope(&self, dialect: Dialect, id: &str, model: &str, object: &str, event: &mut Value) {
        let served = self.model_served.as_deref().unwrap_or(model);
        let fields: Value = match dialect {
            Dialect::Gemini => json!({"modelVersion": served, "responseId": id}),
            Dialect::OpenRouter => json!({"id": id, "object": object, "created": 1_790_000_000_u64, "model": served,
                "provider": "Fake", "system_fingerprint": null}),
            Dialect::OpenAi => json!({"id": id, "object": object, "created": 1_790_000_000_u64, "model": served,
                "system_fingerprint": null}),
        };
        if let (Some(event), Value::Object(fields)) = (event.as_object_mut(), fields) {
            event.extend(fields);
        }
    }

    fn gemini_parts(&self) -> Vec<Value> {
        let mut parts = Vec::new();
        if !self.thought.is_empty() {
            parts.push(json!({"text": self.thought, "thought": true}));
        }
        if !self.text.is_empty() {
            parts.push(json!({"text": self.text}));
        }
        for (n, (name, arguments)) in self.tool_calls.iter().enumerate() {
            let mut part = json!({"functionCall": {"name": name, "args": arguments}});
            // Of parallel calls the first is signed.
            if n == 0 {
                part["thoughtSignature"] = json!("c2lnbmVk");
            }
            parts.push(part);
        }
        parts
    }

    fn gemini_events(&self) -> Vec<Value> {
        let event = |part: Value| json!({"candidates": [{"index": 0, "content": {"role": "model", "parts": [part]}}]});
        let mut events = Vec::new();
        for part in self.gemini_parts() {
            match part.get("text").and_then(Value::as_str) {
                Some(text) => {
                    for piece in pieces(text) {
                        let mut part = part.clone();
                        part["text"] = json!(piece);
                        events.push(event(part));
                    }
                }
                None => events.push(event(part)),
            }
        }
        // The last event may hold nothing but an empty part with a signature.
        let mut last = event(json!({"text": "", "thoughtSignature": "bGFzdA=="}));
        self.gemini_end(&mut last["candidates"][0]);
        events.push(last);
        events
    }

    fn gemini_end(&self, candidate: &mut Value) {
        candidate["finishReason"] = json!(Dialect::Gemini.reason(&self.finish_reason));
        if let Some(token) = &self.continuation_token {
            candidate["continuationToken"] = json!(token);
        }
    }

    fn chat_message(&self, dialect: Dialect) -> Value {
        let mut message = json!({"role": "assistant", "content": self.text, "refusal": null});
        if !self.thought.is_empty() {
            message["reasoning"] = json!(self.thought);
            if dialect == Dialect::OpenRouter {
                message["reasoning_details"] =
                    json!([reasoning(&self.thought, Some("c2lnbmVk")), encrypted_reasoning()]);
            }
        }
        if !self.tool_calls.is_empty() {
            message["content"] = Value::Null;
            let calls = self.tool_calls.iter().enumerate().map(|(n, (name, arguments))| {
                json!({"id": call_id(n), "type": "function",
                    "function": {"name": name, "arguments": arguments.to_string()}})
            });
            message["tool_calls"] = calls.collect();
        }
        message
    }

    fn chat_events(&self, dialect: Dialect) -> Vec<Value> {
        let event =
            |delta: Value, reason: Value| json!({"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]});
        let mut events = vec![event(json!({"role": "assistant", "content": null}), Value::Null)];
        for piece in pieces(&self.thought) {
            let mut delta = json!({"reasoning": piece});
            if dialect == Dialect::OpenRouter {
                delta["reasoning_details"] = json!([reasoning(&piece, None)]);
            }
            events.push(event(delta, Value::Null));
        }
        if dialect == Dialect::OpenRouter && !self.thought.is_empty() {
            // The signature of a block follows its text.
            let details = json!([reasoning("", Some("c2lnbmVk")), encrypted_reasoning()]);
            events.push(event(json!({"reasoning_details": details}), Value::Null));
        }
        for piece in pieces(&self.text) {
            events.push(event(json!({"content": piece}), Value::Null));
        }
        for (n, (name, arguments)) in self.tool_calls.iter().enumerate() {
            let first = json!({"index": n, "id": call_id(n), "type": "function",
                "function": {"name": name, "arguments": ""}});
            events.push(event(json!({"tool_calls": [first]}), Value::Null));
            for piece in pieces(&arguments.to_string()) {
                let more = json!({"index": n, "function": {"arguments": piece}});
                events.push(event(json!({"tool_calls": [more]}), Value::Null));
            }
        }
        events.push(event(json!({}), json!(self.finish_reason)));
        events
    }
}

/// A block of reasoning of OpenRouter's, or a piece of one.
fn reasoning(text: &str, signature: Option<&str>) -> Value {
    json!({"type": "reasoning.text", "text": text, "signature": signature, "format": "anthropic-claude-v1", "index": 0})
}

fn encrypted_reasoning() -> Value {
    json!({"type": "reasoning.encrypted", "data": "c2VjcmV0", "id": "rs_1", "format": "anthropic-claude-v1", "index": 1})
}

fn call_id(n: usize) -> String {
    format!("call_{}", n + 1)
}

/// A text in up to three pieces, none of them empty.
fn pieces(text: &str) -> Vec<String> {
    let characters: Vec<char> = text.chars().collect();
    let size = characters.len().div_ceil(3).max(1);
    characters.chunks(size).map(|piece| piece.iter().collect()).collect()
}

/// What a script answers.
#[derive(Clone, Debug)]
pub enum Answer {
    Reply(Reply),
    /// An error status with further headers.
    Refused {
        status: u16,
        headers: Vec<(&'static str, String)>,
        body: Value,
    },
    /// Bytes by hand.
    Acts(Vec<Act>),
}

impl Answer {
    /// An error in the shape of the dialect: `status` as its RPC status, `error_type` or `type`.
    #[must_use]
    pub fn error(dialect: Dialect, code: u16, status: &str) -> Self {
        Self::Refused { status: code, headers: Vec::new(), body: dialect.error(code, status) }
    }
}

impl From<Reply> for Answer {
    fn from(reply: Reply) -> Self {
        Self::Reply(reply)
    }
}

impl From<Vec<Act>> for Answer {
    fn from(acts: Vec<Act>) -> Self {
        Self::Acts(acts)
    }
}

/// An error with a message, in the shape of the dialect.
pub(super) fn refusal(dialect: Dialect, code: u16, status: &str, message: &str) -> Answer {
    let mut body = dialect.error(code, status);
    body["error"]["message"] = json!(message);
    if dialect == Dialect::OpenAi {
        body["error"]["type"] = json!("invalid_request_error");
    }
    Answer::Refused { status: code, headers: Vec::new(), body }
}
