//! How an answer is put together, from a stream or from one document.

use super::{TOOL_CALLS_MAX, request::assistant};
use crate::{
    decimal::pusd_from_decimal,
    orchestrator::ToolCall,
    provider::{
        Call, Completion, estimate,
        http::Answer,
        model_named,
        retry::{Hints, Names, ProviderError, Report, classify},
        sse::{DONE, Event, documents},
    },
    usage::{CallState, DOUBTFUL_BYTES_MAX, Usage, UsageSource},
};
use serde::Deserialize;
use serde_json::{Map, Value, json, value::RawValue};
use std::{collections::BTreeSet, ops::ControlFlow};

/// Largest count of tokens that is believed. Chosen: far above every context window, and sums of them stay within what the
/// database holds.
pub(in crate::provider) const TOKENS_MAX: u64 = 1 << 40;

/// Reads an answer with a good status to its end.
///
/// # Errors
/// Everything that is not a complete, usable answer.
pub(in crate::provider) async fn read(
    mut answer: Answer<'_>,
    call: &Call<'_>,
    names: &Names,
    model_served: ServedModel,
) -> Result<Completion, ProviderError> {
    let status = answer.status.as_u16();
    let mut gathered = Gathered::default();
    let outcome = if answer.is_json() {
        match answer.text().await {
            Ok(text) => gathered.document(&text, call, names),
            Err(error) => Err(error),
        }
    } else {
        answer.events(|event| gathered.event(&event, call, names)).await
    };
    let complete = match outcome {
        Ok(()) => gathered.complete(call, names, model_served),
        // The finish reason was seen: what got lost after it is at most the usage.
        Err(error)
            if error.state == CallState::Unknown
                && error.http_status.is_none()
                && gathered.finish_reason.is_some()
                && !call.cancellation.is_cancelled() =>
        {
            gathered.complete(call, names, model_served)
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

/// Whether the `model` of an answer says something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::provider) enum ServedModel {
    /// It names the model that is billed.
    Reported,
    /// It may be a file path or an alias: what was asked for counts.
    Requested,
}

#[derive(Default)]
struct Gathered {
    text: String,
    refusal: String,
    tool_calls: Vec<Partial>,
    reasoning_details: Vec<Value>,
    finish_reason: Option<String>,
    usage: Option<Usage>,
    model: Option<String>,
}

#[derive(Default)]
struct Partial {
    index: Option<u64>,
    id: String,
    name: String,
    arguments: String,
}

impl Partial {
    fn is_whole(&self) -> bool {
        serde_json::from_str::<Map<String, Value>>(&self.arguments).is_ok()
    }
}

impl Gathered {
    fn event(&mut self, event: &Event, call: &Call<'_>, names: &Names) -> Result<ControlFlow<()>, ProviderError> {
        let (Event::Data(text) | Event::Bare(text)) = event;
        if text.trim() == DONE {
            return Ok(ControlFlow::Break(()));
        }
        if text.trim().is_empty() {
            return Ok(ControlFlow::Continue(()));
        }
        let Ok(chunks) = documents(text) else {
            let what = "the stream holds something that is not JSON";
            return Err(ProviderError::broken(names, what, CallState::Unknown));
        };
        for (chunk, text) in &chunks {
            self.chunk(chunk, text, call, names)?;
        }
        Ok(ControlFlow::Continue(()))
    }

    fn document(&mut self, text: &str, call: &Call<'_>, names: &Names) -> Result<(), ProviderError> {
        let Ok(document) = serde_json::from_str::<Value>(text) else {
            return Err(ProviderError::broken(names, "the answer is not JSON", CallState::Unknown));
        };
        self.chunk(&document, text, call, names)?;
        // A document is whole because it parsed: some servers leave the reason out.
        if self.finish_reason.is_none() && document.pointer("/choices/0/message").is_some() {
            self.finish_reason = Some("stop".to_owned());
        }
        Ok(())
    }

    fn chunk(&mut self, chunk: &Value, text: &str, call: &Call<'_>, names: &Names) -> Result<(), ProviderError> {
        if let Some(id) = chunk.get("id").and_then(Value::as_str) {
            call.request_id.offer(id);
        }
        if let Some(model) = chunk.get("model").and_then(Value::as_str).and_then(model_named) {
            self.model = Some(model);
        }
        if let Some(usage) = usage(chunk, text) {
            self.usage = Some(usage);
        }
        let choice = chunk.pointer("/choices/0");
        if let Some(choice) = choice {
            // A stream says `delta`, a document `message`.
            if let Some(delta) = choice.get("delta").or_else(|| choice.get("message")) {
                self.delta(delta, names)?;
            }
            if let Some(reason) = choice.get("finish_reason").and_then(Value::as_str).filter(|r| !r.is_empty()) {
                self.finish_reason = Some(reason.to_owned());
            }
        }
        let error = [Some(chunk), choice].into_iter().flatten().find(|v| v.get("error").is_some_and(|e| !e.is_null()));
        if let Some(error) = error.or_else(|| (chunk.get("object") == Some(&json!("error"))).then_some(chunk)) {
            let report = Report::from_value(error);
            let status = report.code.filter(|code| (400..600).contains(code)).unwrap_or(500);
            let error = classify(names, status, Hints::default(), &report);
            // Of one that is unknown the books ask the provider; an estimate would stand where its answer belongs.
            let usage = if error.state == CallState::Unknown { None } else { self.generated_so_far(call) };
            return Err(error.with_usage(usage).with_finish_reason(self.finish_reason.clone()));
        }
        Ok(())
    }

    fn delta(&mut self, delta: &Value, names: &Names) -> Result<(), ProviderError> {
        match delta.get("content") {
            Some(Value::String(text)) => self.text.push_str(text),
            Some(Value::Array(parts)) => {
                for text in parts.iter().filter_map(|part| part.get("text").and_then(Value::as_str)) {
                    self.text.push_str(text);
                }
            }
            _ => {}
        }
        if let Some(text) = delta.get("refusal").and_then(Value::as_str) {
            self.refusal.push_str(text);
        }
        for piece in delta.get("tool_calls").and_then(Value::as_array).into_iter().flatten() {
            self.tool_call(piece);
            if self.tool_calls.len() > TOOL_CALLS_MAX {
                return Err(ProviderError::unusable(names, "too_many_tool_calls"));
            }
        }
        for detail in delta.get("reasoning_details").and_then(Value::as_array).into_iter().flatten() {
            self.reasoning_detail(detail);
        }
        Ok(())
    }

    /// Joins the pieces of a call. Servers number them, or do not, or number all of them 0; they repeat the id, leave
    /// it empty, or send the whole call at once.
    fn tool_call(&mut self, piece: &Value) {
        let index = piece.get("index").and_then(Value::as_u64);
        let id = piece.get("id").and_then(Value::as_str).unwrap_or_default();
        let name = piece.pointer("/function/name").and_then(Value::as_str).unwrap_or_default();
        let arguments = match piece.pointer("/function/arguments") {
            Some(Value::String(text)) => text.clone(),
            Some(Value::Null) | None => String::new(),
            Some(object) => object.to_string(),
        };
        let found = match index {
            Some(_) => self.tool_calls.iter().rposition(|call| call.index == index),
            None if id.is_empty() && name.is_empty() => self.tool_calls.len().checked_sub(1),
            None if id.is_empty() => None,
            None => self.tool_calls.iter().rposition(|call| call.id == id),
        };
        let continues = found.filter(|&at| {
            let call = &self.tool_calls[at];
            let other_id = !id.is_empty() && !call.id.is_empty() && id != call.id;
            let other_name = id.is_empty() && !name.is_empty() && !call.name.is_empty() && name != call.name;
            // A name where a whole call stands already begins the next one.
            let next_call =
                !name.is_empty() && !arguments.is_empty() && call.is_whole() && (id.is_empty() || id != call.id);
            !(other_id || other_name || next_call)
        });
        let at = continues.unwrap_or_else(|| {
            self.tool_calls.push(Partial { index, ..Partial::default() });
            self.tool_calls.len() - 1
        });
        let call = &mut self.tool_calls[at];
        if call.id.is_empty() {
            id.clone_into(&mut call.id);
        }
        if call.name.is_empty() {
            name.clone_into(&mut call.name);
        }
        call.arguments.push_str(&arguments);
    }

    /// Joins the pieces of a reasoning block: the provider wants it back as it made it. Pieces of one block have its type and index,
    /// and no other id; those of several blocks may alternate. Without an index words belong to the block before them, if it is of
    /// their type; what is encrypted stands for itself then.
    fn reasoning_detail(&mut self, detail: &Value) {
        let text = |value: &Value, key: &str| value.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        let index = detail.get("index").filter(|index| !index.is_null());
        let (kind, id) = (text(detail, "type"), text(detail, "id"));
        let same = |other: &Value| {
            let other_id = text(other, "id");
            let one_id = id.is_empty() || other_id.is_empty() || id == other_id;
            one_id && text(other, "type") == kind && other.get("index").filter(|index| !index.is_null()) == index
        };
        let known = match index {
            Some(_) => self.reasoning_details.iter().rposition(same),
            None if kind == "reasoning.encrypted" => None,
            None => self.reasoning_details.len().checked_sub(1).filter(|last| same(&self.reasoning_details[*last])),
        };
        let Some(known) = known.map(|at| &mut self.reasoning_details[at]) else {
            self.reasoning_details.push(detail.clone());
            return;
        };
        for (key, value) in detail.as_object().into_iter().flatten() {
            match (known.get(key).and_then(Value::as_str), value) {
                (Some(before), Value::String(text)) if matches!(key.as_str(), "text" | "summary" | "data") => {
                    known[key.as_str()] = Value::String(format!("{before}{text}"));
                }
                // What is known of it already is not taken back.
                (_, Value::Null) => {}
                (Some(before), Value::String(text)) if text.is_empty() && !before.is_empty() => {}
                _ => known[key.as_str()] = value.clone(),
            }
        }
    }

    fn output_bytes(&self) -> usize {
        self.text.len()
            + self.refusal.len()
            + self.tool_calls.iter().map(|call| call.name.len() + call.arguments.len()).sum::<usize>()
    }

    /// Reported, or estimated if anything was generated at all.
    fn usage_so_far(&self, call: &Call<'_>) -> Option<Usage> {
        let bytes = self.output_bytes();
        self.usage.clone().or_else(|| (bytes > 0).then(|| estimate::usage(call.request, bytes, call.max_output_tokens)))
    }

    /// The usage of an answer that failed at the server: without a completion token it is not billed (OpenRouter says so,
    /// the others do not say otherwise).
    fn generated_so_far(&self, call: &Call<'_>) -> Option<Usage> {
        self.usage_so_far(call).filter(|usage| usage.tokens_output > 0)
    }

    fn complete(mut self, call: &Call<'_>, names: &Names, served: ServedModel) -> Result<Completion, ProviderError> {
        let model_served = match (served, self.model.take()) {
            (ServedModel::Reported, Some(model)) => model,
            _ => call.model.to_owned(),
        };
        let unbilled = self.finish_reason.as_deref().is_none_or(|reason| reason == "error");
        let usage = if unbilled { self.generated_so_far(call) } else { self.usage_so_far(call) };
        let failed = |error: ProviderError, completed: bool| {
            let mut error = error.with_usage(usage.clone()).with_finish_reason(self.finish_reason.clone());
            error.stream_completed = completed;
            error.model_served = Some(model_served.clone());
            Err(error)
        };
        let Some(reason) = self.finish_reason.clone() else {
            return failed(ProviderError::unfinished(names), false);
        };
        if !self.refusal.is_empty() && self.text.is_empty() {
            return failed(ProviderError::refused(names, "refusal"), true);
        }
        match reason.as_str() {
            "stop" | "tool_calls" | "tool_use" | "function_call" | "eos" | "end_turn" | "stop_sequence" => {}
            "length" | "max_tokens" | "MAX_TOKENS" => {
                let what = format!("the answer reached its limit of {} tokens", call.max_output_tokens);
                return failed(ProviderError::truncated(names, &what), true);
            }
            "content_filter" => return failed(ProviderError::refused(names, "content_filter"), true),
            // The model's server failed. OpenRouter bills nothing for it unless something was generated.
            "error" => {
                let mut error = ProviderError::broken(names, "the model's server failed", CallState::Failed);
                error.failure.detail = json!({ "finish_reason": reason });
                return failed(error, true);
            }
            // Whatever is invented next.
            other => return failed(ProviderError::unusable(names, other), true),
        }
        let usage = usage.unwrap_or_else(|| estimate::usage(call.request, self.output_bytes(), call.max_output_tokens));
        let tool_calls = finish_tool_calls(std::mem::take(&mut self.tool_calls));
        let mut parts = assistant(&self.text, &tool_calls);
        if !self.reasoning_details.is_empty() {
            parts["reasoning_details"] = Value::Array(self.reasoning_details);
        }
        Ok(Completion {
            text: self.text,
            tool_calls,
            parts,
            continuation_token: None,
            model_served,
            finish_reason: reason,
            usage,
            http_status: None,
            provider_request_id: call.request_id.get(),
        })
    }
}

/// Calls with unique ids and parsed arguments. A call without a name is dropped: nothing can be done with it.
fn finish_tool_calls(partials: Vec<Partial>) -> Vec<ToolCall> {
    let mut seen = BTreeSet::new();
    let mut calls = Vec::new();
    for partial in partials.into_iter().filter(|partial| !partial.name.is_empty()) {
        let mut id = partial.id;
        if id.is_empty() || !seen.insert(id.clone()) {
            id = format!("call_{}", calls.len() + 1);
            seen.insert(id.clone());
        }
        calls.push(ToolCall { id, name: partial.name, arguments: parse_arguments(&partial.arguments) });
    }
    calls
}

/// Arguments as an object; text that is none arrives as `{"_invalid": "<text>"}`.
pub(in crate::provider) fn parse_arguments(text: &str) -> Value {
    if text.trim().is_empty() {
        return json!({});
    }
    match serde_json::from_str::<Value>(text) {
        Ok(object @ Value::Object(_)) => object,
        // Encoded twice, as some proxies do.
        Ok(Value::String(inner)) => match serde_json::from_str::<Map<String, Value>>(&inner) {
            Ok(object) => Value::Object(object),
            Err(_) => json!({ "_invalid": text }),
        },
        _ => json!({ "_invalid": text }),
    }
}

/// The usage of a chunk, if it has one.
fn usage(chunk: &Value, text: &str) -> Option<Usage> {
    let raw = chunk.get("usage").filter(|usage| usage.is_object())?;
    let count = |pointer: &str| raw.pointer(pointer).and_then(Value::as_u64).unwrap_or(0).min(TOKENS_MAX);
    if raw.get("prompt_tokens").is_none() && raw.get("completion_tokens").is_none() {
        return None;
    }
    let tokens_prompt = count("/prompt_tokens");
    let tokens_output = count("/completion_tokens");
    let said = verbatim(text);
    let Costs { charged: provider_cost_pusd, upstream: upstream_cost_pusd, upstream_key, doubtful: doubtful_cost } =
        said.map(costs).unwrap_or_default();
    // Proxies that do not count send zeros; a price beside them (a cache hit of OpenRouter) says they are meant.
    if tokens_prompt == 0 && tokens_output == 0 && provider_cost_pusd.is_none() {
        return None;
    }
    let tokens_cached = count("/prompt_tokens_details/cached_tokens").min(tokens_prompt);
    Some(Usage {
        tokens_prompt,
        tokens_cached,
        tokens_cache_write: count("/prompt_tokens_details/cache_write_tokens").min(tokens_prompt - tokens_cached),
        tokens_output,
        tokens_reasoning: count("/completion_tokens_details/reasoning_tokens").min(tokens_output),
        source: UsageSource::Provider,
        provider_cost_pusd,
        upstream_key,
        upstream_cost_pusd,
        doubtful_cost,
        raw: said.map_or_else(|| raw.clone(), Value::from),
    })
}

/// What `usage` says of money.
#[derive(Debug, Default, PartialEq, Eq)]
struct Costs {
    /// `cost`: what the account was charged. Where the call was served by a key of its owner's, the fee alone.
    charged: Option<i64>,
    /// `cost_details.upstream_inference_cost`.
    upstream: Option<i64>,
    /// `is_byok`. A server that leaves it out and names what the vendor charged means the same.
    upstream_key: bool,
    /// One of them that is no amount of money, as it was said.
    doubtful: Option<String>,
}

/// The usage of a chunk in its own spelling: as floats, amounts would lose digits.
fn verbatim(chunk: &str) -> Option<&str> {
    #[derive(Deserialize)]
    struct Chunk<'a> {
        #[serde(borrow)]
        usage: Option<&'a RawValue>,
    }
    serde_json::from_str::<Chunk<'_>>(chunk).ok()?.usage.map(RawValue::get)
}

/// The amounts in a usage.
fn costs(usage: &str) -> Costs {
    #[derive(Deserialize)]
    struct Cost<'a> {
        #[serde(borrow, default)]
        cost: Option<&'a RawValue>,
        #[serde(borrow, default)]
        is_byok: Option<&'a RawValue>,
        #[serde(borrow, default)]
        cost_details: Option<&'a RawValue>,
    }
    #[derive(Deserialize)]
    struct Details<'a> {
        #[serde(borrow, default)]
        upstream_inference_cost: Option<&'a RawValue>,
    }
    let Ok(cost) = serde_json::from_str::<Cost<'_>>(usage) else { return Costs::default() };
    let amount = |raw: Option<&RawValue>| raw.and_then(|raw| pusd_from_decimal(raw.get()));
    let doubtful = |raw: Option<&RawValue>| {
        let said = raw.map(RawValue::get).filter(|said| *said != "null" && pusd_from_decimal(said).is_none())?;
        Some(said[..said.floor_char_boundary(DOUBTFUL_BYTES_MAX)].to_owned())
    };
    let details = cost.cost_details.and_then(|raw| serde_json::from_str::<Details<'_>>(raw.get()).ok());
    let inference = details.and_then(|details| details.upstream_inference_cost);
    let upstream = amount(inference);
    let doubtful = doubtful(cost.cost).or_else(|| doubtful(inference));
    let upstream_key = match cost.is_byok.map(RawValue::get) {
        Some("true") => true,
        Some("false") => false,
        _ => upstream.is_some_and(|cost| cost > 0),
    };
    Costs { charged: amount(cost.cost), upstream, upstream_key, doubtful }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn joined(pieces: &[Value]) -> Vec<ToolCall> {
        let mut gathered = Gathered::default();
        for piece in pieces {
            gathered.tool_call(piece);
        }
        finish_tool_calls(gathered.tool_calls)
    }

    fn call(id: &str, name: &str, arguments: Value) -> ToolCall {
        ToolCall { id: id.to_owned(), name: name.to_owned(), arguments }
    }

    #[test]
    fn pieces_of_tool_calls_are_joined_however_they_are_numbered() {
        let f = |arguments: Value| json!({ "name": "f", "arguments": arguments });
        // As the original does it.
        assert_eq!(
            joined(&[
                json!({"index": 0, "id": "a", "type": "function", "function": {"name": "f", "arguments": ""}}),
                json!({"index": 0, "function": {"arguments": "{\"x\""}}),
                json!({"index": 1, "id": "b", "function": {"name": "g", "arguments": "{}"}}),
                json!({"index": 0, "id": "", "function": {"name": null, "arguments": ":1}"}}),
            ]),
            [call("a", "f", json!({"x": 1})), call("b", "g", json!({}))]
        );
        // Index 0 for all, with ids.
        assert_eq!(
            joined(&[
                json!({"index": 0, "id": "a", "function": f(json!("{\"x\":1}"))}),
                json!({"index": 0, "id": "b", "function": f(json!("{\"x\":2}"))}),
            ]),
            [call("a", "f", json!({"x": 1})), call("b", "f", json!({"x": 2}))]
        );
        // Index 0 for all, without ids, arguments as objects.
        assert_eq!(
            joined(&[
                json!({"index": 0, "function": f(json!({"x": 1}))}),
                json!({"index": 0, "function": f(json!({"x": 2}))}),
            ]),
            [call("call_1", "f", json!({"x": 1})), call("call_2", "f", json!({"x": 2}))]
        );
        // No index at all: whole calls, then one in pieces.
        assert_eq!(
            joined(&[
                json!({"id": "a", "function": f(json!("{}"))}),
                json!({"id": "b", "function": f(json!(""))}),
                json!({"function": {"arguments": "{\"x\":"}}),
                json!({"function": {"arguments": "3}"}}),
            ]),
            [call("a", "f", json!({})), call("b", "f", json!({"x": 3}))]
        );
        // Id and name repeated with every piece; two calls with one id.
        assert_eq!(
            joined(&[
                json!({"index": 0, "id": "a", "function": f(json!("{\"x\":"))}),
                json!({"index": 0, "id": "a", "function": f(json!("1}"))}),
                json!({"index": 1, "id": "a", "function": f(json!("{}"))}),
            ]),
            [call("a", "f", json!({"x": 1})), call("call_2", "f", json!({}))]
        );
        assert_eq!(joined(&[json!({"index": 0, "id": "a", "function": {"arguments": "{}"}})]), []);
    }

    #[test]
    fn pieces_of_reasoning_are_joined_by_block_however_they_alternate() {
        let joined = |pieces: &[Value]| {
            let mut gathered = Gathered::default();
            pieces.iter().for_each(|piece| gathered.reasoning_detail(piece));
            gathered.reasoning_details
        };
        let text =
            |index: u64, text: &str| json!({"type": "reasoning.text", "index": index, "text": text, "signature": null});
        assert_eq!(
            joined(&[
                text(0, "a"),
                text(1, "x"),
                text(0, "b"),
                json!({"type": "reasoning.encrypted", "index": 1, "data": "se", "id": "r1", "format": "f"}),
                json!({"type": "reasoning.text", "index": 0, "text": "", "signature": "signed"}),
                text(1, "y"),
                json!({"type": "reasoning.encrypted", "index": 1, "data": "cret", "id": "r1", "format": "f"}),
                // The same place, and another block all the same.
                json!({"type": "reasoning.encrypted", "index": 1, "data": "other", "id": "r2", "format": "f"}),
                json!({"type": "reasoning.text", "index": 0, "text": "", "signature": null}),
                json!({"type": "reasoning.text", "index": 0, "text": "", "signature": ""}),
            ]),
            [
                json!({"type": "reasoning.text", "index": 0, "text": "ab", "signature": "signed"}),
                json!({"type": "reasoning.text", "index": 1, "text": "xy", "signature": null}),
                json!({"type": "reasoning.encrypted", "index": 1, "data": "secret", "id": "r1", "format": "f"}),
                json!({"type": "reasoning.encrypted", "index": 1, "data": "other", "id": "r2", "format": "f"}),
            ]
        );
        // Without numbers.
        let words = |kind: &str, key: &str, text: &str| json!({"type": kind, key: text});
        assert_eq!(
            joined(&[
                words("reasoning.summary", "summary", "a"),
                words("reasoning.summary", "summary", "b"),
                words("reasoning.encrypted", "data", "1"),
                words("reasoning.encrypted", "data", "2"),
                words("reasoning.summary", "summary", "c"),
            ]),
            [
                words("reasoning.summary", "summary", "ab"),
                words("reasoning.encrypted", "data", "1"),
                words("reasoning.encrypted", "data", "2"),
                words("reasoning.summary", "summary", "c"),
            ]
        );
    }

    #[test]
    fn arguments_are_an_object_or_marked_invalid() {
        assert_eq!(parse_arguments(""), json!({}));
        assert_eq!(parse_arguments("{\"a\":1}"), json!({"a": 1}));
        assert_eq!(parse_arguments("\"{\\\"a\\\":1}\""), json!({"a": 1}));
        for bad in ["[1]", "{", "null", "7"] {
            assert_eq!(parse_arguments(bad), json!({"_invalid": bad}));
        }
    }

    #[test]
    fn usage_is_normalized_and_cost_stays_decimal() {
        let text = r#"{"usage":{"prompt_tokens":194,"completion_tokens":12,"cost":0.000310000001,
            "prompt_tokens_details":{"cached_tokens":1000},"completion_tokens_details":{"reasoning_tokens":5}}}"#;
        let usage = usage(&serde_json::from_str(text).unwrap(), text).unwrap();
        assert_eq!((usage.tokens_prompt, usage.tokens_cached, usage.tokens_output), (194, 194, 12));
        assert_eq!((usage.tokens_reasoning, usage.provider_cost_pusd), (5, Some(310_000_001)));
    }

    #[test]
    fn a_sum_that_is_no_money_is_kept_as_it_was_said() {
        for (said, doubtful) in [
            (r#""cost":-0.5"#, Some("-0.5")),
            (r#""cost":"NaN""#, Some("\"NaN\"")),
            (r#""cost":"1e999""#, Some("\"1e999\"")),
            (r#""cost":{"usd":1}"#, Some(r#"{"usd":1}"#)),
            (r#""cost":0,"is_byok":true,"cost_details":{"upstream_inference_cost":-1}"#, Some("-1")),
            (r#""cost":null"#, None),
            (r#""cost":0.25"#, None),
        ] {
            let text = format!(r#"{{"usage":{{"prompt_tokens":194,"completion_tokens":12,{said}}}}}"#);
            let usage = usage(&serde_json::from_str(&text).unwrap(), &text).unwrap();
            assert_eq!(usage.doubtful_cost.as_deref(), doubtful, "{said}");
        }
        let long = format!(r#"{{"usage":{{"prompt_tokens":1,"completion_tokens":1,"cost":"{}"}}}}"#, "ä".repeat(500));
        let usage = usage(&serde_json::from_str(&long).unwrap(), &long).unwrap();
        assert!(usage.doubtful_cost.is_some_and(|said| said.len() <= DOUBTFUL_BYTES_MAX));
    }

    #[test]
    fn a_call_on_a_deposited_key_costs_its_fee_and_what_the_vendor_takes() {
        let total = |said: &str| {
            let text = format!(r#"{{"usage":{{"prompt_tokens":194,"completion_tokens":12,{said}}}}}"#);
            let usage = usage(&serde_json::from_str(&text).unwrap(), &text).unwrap();
            (usage.provider_cost_pusd, usage.total_cost_pusd())
        };
        let (fee, all) = (Some(15_500_000), Some(325_500_001));
        for (said, expected) in [
            (
                r#""cost":0.0000155,"is_byok":true,"cost_details":{"upstream_inference_cost":0.000310000001}"#,
                (fee, all),
            ),
            (r#""cost":0.0000155,"cost_details":{"upstream_inference_cost":0.000310000001}"#, (fee, all)),
            (
                r#""cost":0,"is_byok":true,"cost_details":{"upstream_inference_cost":3.1e-4}"#,
                (Some(0), Some(310_000_000)),
            ),
            // Not said, or nothing: our own arithmetic.
            (r#""cost":0.0000155,"is_byok":true"#, (fee, None)),
            (r#""cost":0.0000155,"is_byok":true,"cost_details":null"#, (fee, None)),
            (r#""cost":0,"is_byok":true,"cost_details":{"upstream_inference_cost":null}"#, (Some(0), None)),
            (r#""cost":0,"is_byok":true,"cost_details":{"upstream_inference_cost":0}"#, (Some(0), None)),
            (r#""cost":0,"is_byok":true,"cost_details":{"upstream_inference_cost":-1}"#, (Some(0), None)),
            (r#""cost":0,"is_byok":true,"cost_details":"none""#, (Some(0), None)),
            // OpenRouter's own key: what it says is all.
            (r#""cost":0.0000155,"is_byok":false,"cost_details":{"upstream_inference_cost":null}"#, (fee, fee)),
            (r#""cost":0.0000155,"is_byok":false,"cost_details":{"upstream_inference_cost":0.00031}"#, (fee, fee)),
            (r#""cost":0"#, (Some(0), Some(0))),
        ] {
            assert_eq!(total(said), expected, "{said}");
        }
    }

    #[test]
    fn absurd_counts_are_cut() {
        let text = r#"{"usage":{"prompt_tokens":18446744073709551615,"completion_tokens":9223372036854775807,
            "completion_tokens_details":{"reasoning_tokens":18446744073709551615}}}"#;
        let usage = usage(&serde_json::from_str(text).unwrap(), text).unwrap();
        assert_eq!(
            (usage.tokens_prompt, usage.tokens_output, usage.tokens_reasoning),
            (TOKENS_MAX, TOKENS_MAX, TOKENS_MAX)
        );
    }
}
