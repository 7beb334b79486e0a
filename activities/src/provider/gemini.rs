//! The Gemini Developer API: `streamGenerateContent` over server-sent events.

use super::{
    Advice, Call, Completion, KeyIdentity, Provider, ProviderError, StructuredOutput, Timeouts,
    address::{Trust, join},
    chat::{TOKENS_MAX, TOOL_CALLS_MAX, schema_instruction},
    estimate,
    http::{Answer, Http, header, secret_header},
    model_named,
    retry::{Hints, Names, Report, classify},
    sse::{DONE, Event, documents},
};
use crate::{
    orchestrator::{Message, Request, ToolCall},
    usage::{CallState, Usage, UsageSource},
};
use futures_util::future::BoxFuture;
use loopwright_engine::Failure;
use reqwest::{Url, header::HeaderMap};
use secrecy::SecretString;
use serde_json::{Map, Value, json};
use std::{
    collections::BTreeMap,
    ops::ControlFlow,
    sync::{Mutex, PoisonError},
};

/// Where the API lives.
pub const BASE_URL: &str = "https://generativelanguage.googleapis.com";
/// The version that knows every model; `v1` lacks aliases and previews.
pub const VERSION_DEFAULT: &str = "v1beta";

/// Begins the id of a call that Gemini gave none: such an id is ours and is not sent back.
const OWN_ID_PREFIX: &str = "own-";
/// Stands in for the signature of a call that another provider's model made; the API documents it for this purpose.
const FOREIGN_SIGNATURE: &str = "skip_thought_signature_validator";
/// Longest `continuationToken` that is sent back, in bytes. Chosen, as much as is kept of an error: nobody has said how long they are.
const TOKEN_BYTES_MAX: usize = 64 * 1024;
/// Keywords of JSON Schema that `responseJsonSchema` and `parametersJsonSchema` know.
const SCHEMA_KEYWORDS: [&str; 22] = [
    "$id",
    "$defs",
    "$ref",
    "$anchor",
    "type",
    "format",
    "title",
    "description",
    "enum",
    "items",
    "prefixItems",
    "minItems",
    "maxItems",
    "minimum",
    "maximum",
    "anyOf",
    "oneOf",
    "properties",
    "additionalProperties",
    "required",
    "propertyOrdering",
    "const",
];

/// The Gemini API.
#[derive(Debug)]
pub struct Gemini {
    http: Http,
    base: Url,
    headers: HeaderMap,
    names: Names,
    key: KeyIdentity,
    /// What models turned out to accept.
    learned: Mutex<BTreeMap<String, Learned>>,
}

/// What a model accepts, learned from its refusals; kept for the life of the process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Learned {
    level: StructuredOutput,
    /// It knows no `thinkingLevel`.
    no_thinking: bool,
}

impl Gemini {
    /// A client for the API at `base`; `version` (`v1beta`, `v1`) is appended unless the path ends with one.
    ///
    /// # Errors
    /// A sentence that names what cannot be used.
    pub fn new(base: Url, version: &str, key: &SecretString, timeouts: Timeouts, trust: Trust) -> Result<Self, String> {
        let versioned = base.path_segments().and_then(|mut s| s.next_back()).is_some_and(|last| last.starts_with("v1"));
        let base = if versioned { base } else { join(&base, &[version]) };
        let mut headers = HeaderMap::new();
        header(&mut headers, "x-goog-api-key", secret_header("", key)?);
        Ok(Self {
            http: Http::new(&base, timeouts, trust)?,
            base,
            headers,
            names: Names { title: "Gemini", key_setting: "GEMINI_API_KEY", key_is_set: true },
            key: KeyIdentity::of("gemini", Some(key)),
            learned: Mutex::default(),
        })
    }

    async fn complete(&self, mut call: Call<'_>) -> Result<Completion, ProviderError> {
        let before = self.learned.lock().unwrap_or_else(PoisonError::into_inner).get(call.model).copied();
        let mut learned = before.unwrap_or_default();
        learned.level = learned.level.max(call.structured_output);
        let model = call.model.strip_prefix("models/").unwrap_or(call.model);
        let mut url = join(&self.base, &["models", &format!("{model}:streamGenerateContent")]);
        url.set_query(Some("alt=sse"));
        // Two levels of output and the thinking: each is given up at most once, so this ends.
        let mut simplified = false;
        loop {
            if learned.no_thinking {
                call.thinking = None;
            }
            // Several generations refuse functions together with a JSON answer.
            let level = if call.request.tools.is_empty() { learned.level } else { StructuredOutput::Prompt };
            let body = body(&call, level).to_string().into_bytes();
            let answer = self.http.post(&self.names, &call, url.clone(), self.headers.clone(), body).await?;
            if answer.status.is_success() {
                return read(answer, &call, &self.names).await;
            }
            let (error, report) = answer.into_error().await;
            if error.failure.code != "provider.bad_request" || error.http_status != Some(400) {
                return Err(error);
            }
            if call.thinking.is_some() && report.mentions("thinking") {
                learned.no_thinking = true;
                simplified = true;
                self.learn(call.model, Some(learned));
                continue;
            }
            let schema_refused = call.request.output_schema.is_some()
                && ["schema", "response_mime_type", "responsemimetype", "mime type"].iter().any(|w| report.mentions(w));
            match level.step_down().filter(|_| schema_refused) {
                // It has said what it does not take: that need not be heard twice, whatever becomes of the simpler form.
                Some(simpler) => {
                    learned.level = simpler;
                    simplified = true;
                    self.learn(call.model, Some(learned));
                }
                None => {
                    // Refused in every form: it was not the form.
                    if simplified {
                        self.learn(call.model, before);
                    }
                    return Err(error);
                }
            }
        }
    }

    /// Keeps what is known of a model; `None`: nothing is.
    fn learn(&self, model: &str, learned: Option<Learned>) {
        let mut all = self.learned.lock().unwrap_or_else(PoisonError::into_inner);
        match learned {
            Some(learned) => all.insert(model.to_owned(), learned),
            None => all.remove(model),
        };
    }
}

impl Provider for Gemini {
    fn name(&self) -> &'static str {
        "gemini"
    }
    fn key(&self) -> KeyIdentity {
        self.key.clone()
    }
    fn complete<'a>(&'a self, call: Call<'a>) -> BoxFuture<'a, Result<Completion, ProviderError>> {
        Box::pin(self.complete(call))
    }
}

/// What Gemini is told of thinking. 2.5 has no levels and takes a number of tokens, which the output limit includes. Chosen: what its
/// makers give for the same words elsewhere, and never more than half of the limit, or nothing would be left for the answer. Nothing
/// is said if that is less than each of them takes.
fn thinking(model: &str, level: &str, max_output_tokens: u32) -> Option<Value> {
    const LEAST: u32 = 512;
    if !model.strip_prefix("models/").unwrap_or(model).starts_with("gemini-2.5") {
        return Some(json!({ "thinkingLevel": level }));
    }
    let tokens = match level {
        "medium" => 8_192,
        "high" => 24_576,
        _ => 1_024,
    };
    let tokens = tokens.min(max_output_tokens / 2);
    (tokens >= LEAST).then(|| json!({ "thinkingBudget": tokens }))
}

fn body(call: &Call<'_>, level: StructuredOutput) -> Value {
    let mut config = json!({ "maxOutputTokens": call.max_output_tokens, "candidateCount": 1 });
    let schema = call.request.output_schema.as_ref();
    if let Some(schema) = schema {
        if level != StructuredOutput::Prompt {
            config["responseMimeType"] = json!("application/json");
        }
        if level == StructuredOutput::JsonSchema {
            config["responseJsonSchema"] = subset(schema);
        }
    }
    if let Some(thinking) = call.thinking.and_then(|level| thinking(call.model, level, call.max_output_tokens)) {
        config["thinkingConfig"] = thinking;
    }
    let mut body = json!({ "contents": contents(call.request), "generationConfig": config });
    if let Some(continuation) = call.continuation {
        body["continuationToken"] = json!(continuation.token);
    }
    let mut system: Vec<Value> = call
        .request
        .messages
        .iter()
        .filter_map(|message| match message {
            Message::System { text } => Some(json!({ "text": text })),
            Message::User { .. } | Message::Model { .. } | Message::Tool { .. } => None,
        })
        .collect();
    if let Some(schema) = schema.filter(|_| level != StructuredOutput::JsonSchema) {
        system.push(json!({ "text": schema_instruction(schema) }));
    }
    if !system.is_empty() {
        body["systemInstruction"] = json!({ "parts": system });
    }
    if !call.request.tools.is_empty() {
        let declarations: Vec<Value> = call
            .request
            .tools
            .iter()
            .map(|tool| {
                json!({ "name": tool.name, "description": tool.description,
                    "parametersJsonSchema": subset(&tool.parameters) })
            })
            .collect();
        body["tools"] = json!([{ "functionDeclarations": declarations }]);
        body["toolConfig"] = json!({ "functionCallingConfig": { "mode": "AUTO" } });
    }
    body
}

/// The turns: two roles only; results of functions in one user turn right after the model's.
fn contents(request: &Request) -> Vec<Value> {
    let mut turns: Vec<(&'static str, Vec<Value>)> = Vec::new();
    let mut push = |role: &'static str, parts: Vec<Value>| {
        if parts.is_empty() {
            return;
        }
        match turns.last_mut() {
            // Neighbours of one role are one turn; parallel results have to be.
            Some((last, known)) if *last == role => known.extend(parts),
            _ => turns.push((role, parts)),
        }
    };
    for message in &request.messages {
        match message {
            Message::System { .. } => {}
            Message::User { text } => push("user", vec![json!({ "text": text })]),
            Message::Model { parts: Value::Array(parts), provider, .. } if provider == "gemini" => {
                push("model", parts.clone());
            }
            Message::Model { text, tool_calls, .. } => push("model", foreign_parts(text, tool_calls)),
            Message::Tool { call_id, name, output } => {
                let mut response = json!({ "name": name, "response": { "output": output } });
                if !call_id.starts_with(OWN_ID_PREFIX) {
                    response["id"] = json!(call_id);
                }
                push("user", vec![json!({ "functionResponse": response })]);
            }
        }
    }
    turns.into_iter().map(|(role, parts)| json!({ "role": role, "parts": parts })).collect()
}

/// A turn of another provider's model, as Gemini accepts it.
fn foreign_parts(text: &str, tool_calls: &[ToolCall]) -> Vec<Value> {
    let mut parts = Vec::new();
    if !text.is_empty() {
        parts.push(json!({ "text": text }));
    }
    for (position, call) in tool_calls.iter().enumerate() {
        let mut part = json!({ "functionCall": { "id": call.id, "name": call.name, "args": call.arguments } });
        if call.id.starts_with(OWN_ID_PREFIX) {
            part["functionCall"] = json!({ "name": call.name, "args": call.arguments });
        }
        if position == 0 {
            part["thoughtSignature"] = json!(FOREIGN_SIGNATURE);
        }
        parts.push(part);
    }
    parts
}

/// A schema without the keywords that the API does not know; `const` becomes an `enum` of one.
fn subset(schema: &Value) -> Value {
    let Value::Object(map) = schema else { return schema.clone() };
    let mut out = Map::new();
    for (key, value) in map.iter().filter(|(key, _)| SCHEMA_KEYWORDS.contains(&key.as_str())) {
        match key.as_str() {
            "const" => {
                out.insert("enum".to_owned(), json!([value]));
            }
            "properties" | "$defs" => {
                let named: Map<String, Value> = value
                    .as_object()
                    .into_iter()
                    .flatten()
                    .map(|(name, schema)| (name.clone(), subset(schema)))
                    .collect();
                out.insert(key.clone(), Value::Object(named));
            }
            "items" | "additionalProperties" => {
                out.insert(key.clone(), subset(value));
            }
            "anyOf" | "oneOf" | "prefixItems" => {
                let list = value.as_array().into_iter().flatten().map(subset).collect();
                out.insert(key.clone(), Value::Array(list));
            }
            _ => {
                out.insert(key.clone(), value.clone());
            }
        }
    }
    Value::Object(out)
}

async fn read(mut answer: Answer<'_>, call: &Call<'_>, names: &Names) -> Result<Completion, ProviderError> {
    let status = answer.status.as_u16();
    let mut gathered = Gathered::after(call);
    let outcome = if answer.is_json() {
        match answer.text().await {
            Ok(text) => gathered.text_event(&text, call, names),
            Err(error) => Err(error),
        }
    } else {
        answer
            .events(|event| {
                let (Event::Data(text) | Event::Bare(text)) = &event;
                gathered.text_event(text, call, names).map(|()| ControlFlow::Continue(()))
            })
            .await
    };
    let complete = match outcome {
        Ok(()) => gathered.complete(call, names),
        // The finish reason was seen: what got lost after it is nothing.
        Err(error)
            if error.state == CallState::Unknown
                && error.http_status.is_none()
                && gathered.ended()
                && !call.cancellation.is_cancelled() =>
        {
            gathered.complete(call, names)
        }
        Err(error) => Err(error),
    };
    complete
        .map(|mut completion| {
            completion.http_status = Some(status);
            completion
        })
        .map_err(|mut error| {
            error.http_status.get_or_insert(status);
            error
        })
}

#[derive(Default)]
struct Gathered {
    parts: Vec<Value>,
    /// So many calls of functions came in former calls of the same answer.
    calls_before: usize,
    /// Text of this call.
    text_bytes: usize,
    token: Option<String>,
    finish_reason: Option<String>,
    block_reason: Option<String>,
    usage: Option<Value>,
    model: Option<String>,
}

impl Gathered {
    /// What there is of the answer before this call.
    fn after(call: &Call<'_>) -> Self {
        let parts = call.continuation.and_then(|before| before.parts.as_array()).cloned().unwrap_or_default();
        let mut gathered = Self { parts, ..Self::default() };
        gathered.calls_before = gathered.calls().len();
        gathered
    }

    fn ended(&self) -> bool {
        self.finish_reason.is_some() || self.block_reason.is_some()
    }

    fn text_event(&mut self, text: &str, call: &Call<'_>, names: &Names) -> Result<(), ProviderError> {
        if text.trim().is_empty() || text.trim() == DONE {
            return Ok(());
        }
        let Ok(documents) = documents(text) else {
            let what = "the stream holds something that is not JSON";
            return Err(ProviderError::broken(names, what, CallState::Unknown));
        };
        documents.iter().try_for_each(|(value, _)| match value {
            // Without `alt=sse` the stream is one list.
            Value::Array(list) if !list.iter().any(|v| v.get("error").is_some()) => {
                list.iter().try_for_each(|response| self.response(response, call, names))
            }
            response => self.response(response, call, names),
        })
    }

    fn response(&mut self, response: &Value, call: &Call<'_>, names: &Names) -> Result<(), ProviderError> {
        let error = response.as_array().and_then(|list| list.iter().find(|v| v.get("error").is_some()));
        if let Some(error) = error.or_else(|| response.get("error").is_some().then_some(response)) {
            let report = Report::from_value(error);
            let status = report.code.filter(|code| (400..600).contains(code)).unwrap_or(500);
            let error = classify(names, status, Hints::default(), &report);
            // Of one that is unknown the books ask the provider; an estimate would stand where its answer belongs.
            let usage = if error.state == CallState::Unknown { None } else { self.usage_so_far(call) };
            return Err(error.with_usage(usage));
        }
        if let Some(id) = response.get("responseId").and_then(Value::as_str) {
            call.request_id.offer(id);
        }
        let named = response.get("modelVersion").and_then(Value::as_str);
        if let Some(model) = named.and_then(|model| model_named(model.strip_prefix("models/").unwrap_or(model))) {
            self.model = Some(model);
        }
        if let Some(usage) = response.get("usageMetadata").filter(|usage| usage.is_object()) {
            self.usage = Some(usage.clone());
        }
        if let Some(reason) = response.pointer("/promptFeedback/blockReason").and_then(Value::as_str) {
            self.block_reason = Some(reason.to_owned());
        }
        let Some(candidate) = response.pointer("/candidates/0") else { return Ok(()) };
        for part in candidate.pointer("/content/parts").and_then(Value::as_array).into_iter().flatten() {
            self.part(part);
            if self.parts.len() > TOOL_CALLS_MAX * 8 {
                return Err(ProviderError::unusable(names, "too_many_parts").with_usage(self.usage_so_far(call)));
            }
        }
        if let Some(reason) = candidate.get("finishReason").and_then(Value::as_str)
            && reason != "FINISH_REASON_UNSPECIFIED"
        {
            self.finish_reason = Some(reason.to_owned());
        }
        // It goes into a record, and back to where it came from.
        if let Some(token) = candidate.get("continuationToken").and_then(Value::as_str)
            && !token.is_empty()
            && token.len() <= TOKEN_BYTES_MAX
            && token.bytes().all(|b| b.is_ascii_graphic())
        {
            self.token = Some(token.to_owned());
        }
        Ok(())
    }

    /// Keeps a part as it came; pieces of plain text that follow each other become one.
    fn part(&mut self, part: &Value) {
        let Some(fields) = part.as_object() else { return };
        self.text_bytes += fields.get("text").and_then(Value::as_str).map_or(0, str::len);
        let plain = |fields: &Map<String, Value>| {
            fields.get("text").is_some_and(Value::is_string)
                && fields.keys().all(|key| key == "text" || key == "thought")
        };
        if plain(fields) {
            let piece = fields["text"].as_str().unwrap_or_default();
            if let Some(last) = self.parts.last_mut().and_then(Value::as_object_mut)
                && plain(last)
                && last.get("thought") == fields.get("thought")
                && let Some(Value::String(text)) = last.get_mut("text")
            {
                text.push_str(piece);
                return;
            }
            if piece.is_empty() {
                return;
            }
        }
        self.parts.push(part.clone());
    }

    /// Reported, or estimated if anything was generated at all.
    fn usage_so_far(&self, call: &Call<'_>) -> Option<Usage> {
        let calls = self.calls();
        let arguments = calls.iter().skip(self.calls_before).map(|call| call.arguments.to_string().len());
        let bytes = self.text_bytes + arguments.sum::<usize>();
        self.usage
            .as_ref()
            .map(usage)
            .or_else(|| (bytes > 0).then(|| estimate::usage(call.request, bytes, call.max_output_tokens)))
    }

    fn calls(&self) -> Vec<ToolCall> {
        let functions = self.parts.iter().filter_map(|part| part.get("functionCall"));
        functions
            .enumerate()
            .filter_map(|(position, function)| {
                let name = function.get("name").and_then(Value::as_str).filter(|name| !name.is_empty())?;
                let id = function.get("id").and_then(Value::as_str).filter(|id| !id.is_empty());
                let arguments = match function.get("args") {
                    Some(object @ Value::Object(_)) => object.clone(),
                    Some(Value::Null) | None => json!({}),
                    Some(other) => json!({ "_invalid": other.to_string() }),
                };
                Some(ToolCall {
                    id: id.map_or_else(|| format!("{OWN_ID_PREFIX}{}", position + 1), str::to_owned),
                    name: name.to_owned(),
                    arguments,
                })
            })
            .collect()
    }

    fn complete(self, call: &Call<'_>, names: &Names) -> Result<Completion, ProviderError> {
        let model_served = self.model.clone().unwrap_or_else(|| call.model.to_owned());
        let usage = self.usage_so_far(call);
        let reason = self.finish_reason.clone();
        let failed = |error: ProviderError, completed: bool| {
            let mut error = error.with_usage(usage.clone());
            if reason.is_some() {
                error = error.with_finish_reason(reason.clone());
            }
            error.stream_completed = completed;
            error.model_served = Some(model_served.clone());
            Err(error)
        };
        if let (Some(block), None) = (&self.block_reason, &reason) {
            return failed(ProviderError::refused(names, block).with_finish_reason(Some(block.clone())), true);
        }
        let Some(reason) = reason.clone() else {
            return failed(ProviderError::unfinished(names), false);
        };
        let mut continuation_token = None;
        match reason.as_str() {
            "STOP" => {}
            "MAX_TOKENS" => {
                let what = format!("the answer reached its limit of {} tokens", call.max_output_tokens);
                return failed(ProviderError::truncated(names, &what), true);
            }
            // The rest is another request with the token that came along, which only a call of its own may make.
            "CONTINUATION" if self.token.is_some() => continuation_token.clone_from(&self.token),
            // The provider's doing: it is free, and asking again would end as it did.
            "CONTINUATION" => {
                let mut error = ProviderError::truncated(names, "the answer is to be continued, and nothing says how");
                error.advice = Advice::OtherModel;
                return failed(error, false);
            }
            // A client bug: asking again cannot help, another provider's dialect may.
            "MISSING_THOUGHT_SIGNATURE" => {
                let failure = Failure::permanent("provider.bad_request", "Gemini: a thought signature is missing");
                return failed(ProviderError::new(failure, Advice::OtherProvider), true);
            }
            refused if is_refusal(refused) => return failed(ProviderError::refused(names, refused), true),
            other => return failed(ProviderError::unusable(names, other), true),
        }
        let text: String = self
            .parts
            .iter()
            .filter(|part| part.get("thought") != Some(&Value::Bool(true)))
            .filter_map(|part| part.get("text").and_then(Value::as_str))
            .collect();
        Ok(Completion {
            tool_calls: self.calls(),
            continuation_token,
            model_served,
            finish_reason: reason,
            usage: usage.unwrap_or_else(|| estimate::usage(call.request, self.text_bytes, call.max_output_tokens)),
            text,
            parts: Value::Array(self.parts),
            http_status: None,
            provider_request_id: call.request_id.get(),
        })
    }
}

fn is_refusal(reason: &str) -> bool {
    matches!(reason, "SAFETY" | "RECITATION" | "LANGUAGE" | "BLOCKLIST" | "PROHIBITED_CONTENT" | "SPII")
        || reason.starts_with("IMAGE_")
}

/// Usage by the provider's arithmetic. Some models count thoughts within candidates, so the total decides.
fn usage(raw: &Value) -> Usage {
    let count = |name: &str| raw.get(name).and_then(Value::as_u64).unwrap_or(0).min(TOKENS_MAX);
    let tokens_prompt = (count("promptTokenCount") + count("toolUsePromptTokenCount")).min(TOKENS_MAX);
    let thoughts = count("thoughtsTokenCount");
    let parts = count("candidatesTokenCount") + thoughts;
    let total = match raw.get("totalTokenCount").and_then(Value::as_u64) {
        Some(total) => total.checked_sub(tokens_prompt).unwrap_or(parts),
        None => parts,
    };
    let tokens_output = total.min(TOKENS_MAX);
    Usage {
        tokens_prompt,
        tokens_cached: count("cachedContentTokenCount").min(tokens_prompt),
        tokens_cache_write: 0,
        tokens_output,
        tokens_reasoning: thoughts.min(tokens_output),
        source: UsageSource::Provider,
        raw: raw.clone(),
        ..Usage::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::orchestrator::{Role, ToolSpec};

    fn request(messages: Vec<Message>) -> Request {
        Request {
            role: Role::Architect,
            purpose: "test".into(),
            messages,
            tools: Vec::new(),
            output_schema: None,
            max_output_tokens: 100,
        }
    }

    #[test]
    fn usage_follows_the_total_whether_thoughts_are_inside_or_not() {
        let outside =
            usage(&json!({"promptTokenCount": 220, "cachedContentTokenCount": 128, "candidatesTokenCount": 5,
            "thoughtsTokenCount": 185, "totalTokenCount": 410}));
        assert_eq!((outside.tokens_prompt, outside.tokens_cached), (220, 128));
        assert_eq!((outside.tokens_output, outside.tokens_reasoning), (190, 185));
        let inside = usage(&json!({"promptTokenCount": 220, "candidatesTokenCount": 190, "thoughtsTokenCount": 185,
            "totalTokenCount": 410}));
        assert_eq!((inside.tokens_output, inside.tokens_reasoning), (190, 185));
        let with_tools = usage(&json!({"promptTokenCount": 100, "toolUsePromptTokenCount": 20,
            "candidatesTokenCount": 30, "totalTokenCount": 150}));
        assert_eq!((with_tools.tokens_prompt, with_tools.tokens_output), (120, 30));
        let no_total = usage(&json!({"promptTokenCount": 1, "candidatesTokenCount": 2, "thoughtsTokenCount": 3}));
        assert_eq!(no_total.tokens_output, 5);
        let absurd = usage(&json!({"promptTokenCount": 9, "candidatesTokenCount": 2, "totalTokenCount": 1}));
        assert_eq!(absurd.tokens_output, 2);
        let endless = usage(&json!({"promptTokenCount": u64::MAX, "toolUsePromptTokenCount": u64::MAX,
            "candidatesTokenCount": u64::MAX, "thoughtsTokenCount": u64::MAX, "totalTokenCount": u64::MAX}));
        assert_eq!((endless.tokens_prompt, endless.tokens_output), (TOKENS_MAX, TOKENS_MAX));
    }

    #[test]
    fn turns_keep_parts_verbatim_and_results_together() {
        let signed = json!([{"functionCall": {"name": "f", "args": {}}, "thoughtSignature": "b64"},
            {"functionCall": {"id": "c2", "name": "g", "args": {}}}]);
        let tool = |id: &str, name: &str| Message::Tool { call_id: id.into(), name: name.into(), output: "o".into() };
        let contents = contents(&request(vec![
            Message::System { text: "s".into() },
            Message::User { text: "a".into() },
            Message::User { text: "b".into() },
            Message::Model {
                text: String::new(),
                tool_calls: vec![],
                parts: signed.clone(),
                provider: "gemini".into(),
            },
            tool("own-1", "f"),
            tool("c2", "g"),
        ]));
        assert_eq!(contents[0], json!({"role": "user", "parts": [{"text": "a"}, {"text": "b"}]}));
        assert_eq!(contents[1], json!({"role": "model", "parts": signed}));
        let response = |mut value: Value| {
            value["response"] = json!({"output": "o"});
            json!({"functionResponse": value})
        };
        assert_eq!(
            contents[2],
            json!({"role": "user", "parts": [response(json!({"name": "f"})), response(json!({"id": "c2", "name": "g"}))]})
        );
    }

    #[test]
    fn a_turn_of_another_provider_is_translated() {
        let call = ToolCall { id: "call_1".into(), name: "f".into(), arguments: json!({"a": 1}) };
        let turn = Message::Model {
            text: "t".into(),
            tool_calls: vec![call],
            parts: json!({"role": "assistant"}),
            provider: "openrouter".into(),
        };
        let contents = contents(&request(vec![turn]));
        assert_eq!(contents[0]["parts"][0]["text"], "t");
        assert_eq!(contents[0]["parts"][1]["functionCall"], json!({"id": "call_1", "name": "f", "args": {"a": 1}}));
        assert_eq!(contents[0]["parts"][1]["thoughtSignature"], FOREIGN_SIGNATURE);
    }

    #[test]
    fn schemas_keep_only_what_the_api_knows() {
        let schema = json!({"$schema": "x", "type": "object", "additionalProperties": false, "properties": {
            "default": {"type": "string", "minLength": 1, "pattern": "x"},
            "kind": {"const": "a"}, "list": {"type": "array", "items": {"type": "integer", "default": 1}}}});
        assert_eq!(
            subset(&schema),
            json!({"type": "object", "additionalProperties": false, "properties": {
                "default": {"type": "string"}, "kind": {"enum": ["a"]},
                "list": {"type": "array", "items": {"type": "integer"}}}})
        );
        let tool = ToolSpec { name: "f".into(), description: String::new(), parameters: schema };
        assert_eq!(subset(&tool.parameters)["type"], "object");
    }
}
