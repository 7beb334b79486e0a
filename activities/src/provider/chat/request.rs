//! How a request is written.

use crate::{
    orchestrator::{Message, Request, ToolCall},
    provider::StructuredOutput,
};
use serde_json::{Value, json};
use std::collections::BTreeSet;

/// The turns of a request. `provider` decides whose own content is replayed verbatim.
pub(in crate::provider) fn messages(request: &Request, provider: &str, structured: StructuredOutput) -> Vec<Value> {
    let mut out: Vec<Value> = request
        .messages
        .iter()
        .map(|message| match message {
            Message::System { text } => json!({ "role": "system", "content": text }),
            Message::User { text } => json!({ "role": "user", "content": text }),
            Message::Model { parts, provider: origin, .. } if origin == provider && parts.is_object() => parts.clone(),
            Message::Model { text, tool_calls, .. } => assistant(text, tool_calls),
            Message::Tool { call_id, output, .. } => {
                json!({ "role": "tool", "tool_call_id": call_id, "content": output })
            }
        })
        .collect();
    if let (Some(schema), true) = (&request.output_schema, structured != StructuredOutput::JsonSchema) {
        let instruction = schema_instruction(schema);
        match out.first_mut() {
            Some(first) if first["role"] == "system" => {
                let text = format!("{}\n\n{instruction}", first["content"].as_str().unwrap_or_default());
                first["content"] = Value::String(text);
            }
            _ => out.insert(0, json!({ "role": "system", "content": instruction })),
        }
    }
    out
}

/// What a model is told when the server cannot be told the schema.
pub(in crate::provider) fn schema_instruction(schema: &Value) -> String {
    format!(
        "Answer with exactly one JSON value and nothing else: no prose, no code fence. It must satisfy this JSON \
         Schema:\n{schema}"
    )
}

pub(super) fn assistant(text: &str, tool_calls: &[ToolCall]) -> Value {
    let mut message = json!({ "role": "assistant", "content": text });
    if !tool_calls.is_empty() {
        let calls: Vec<Value> = tool_calls
            .iter()
            .map(|call| {
                json!({ "id": call.id, "type": "function",
                    "function": { "name": call.name, "arguments": call.arguments.to_string() } })
            })
            .collect();
        message["tool_calls"] = Value::Array(calls);
        if text.is_empty() {
            message["content"] = Value::Null;
        }
    }
    message
}

/// The tools of a request in this dialect; `None` when there are none.
pub(in crate::provider) fn tools(request: &Request) -> Option<Value> {
    if request.tools.is_empty() {
        return None;
    }
    let list = request
        .tools
        .iter()
        .map(|tool| {
            json!({ "type": "function", "function": {
                "name": tool.name, "description": tool.description, "parameters": tool.parameters } })
        })
        .collect();
    Some(Value::Array(list))
}

/// `response_format` for a level; `None` when the prompt alone has to do.
pub(in crate::provider) fn response_format(schema: &Value, structured: StructuredOutput) -> Option<Value> {
    match structured {
        StructuredOutput::JsonSchema => Some(json!({ "type": "json_schema",
            "json_schema": { "name": "answer", "strict": is_strict(schema), "schema": schema } })),
        StructuredOutput::JsonObject => Some(json!({ "type": "json_object" })),
        StructuredOutput::Prompt => None,
    }
}

/// Whether strict mode accepts a schema: every object closed and every property required.
fn is_strict(schema: &Value) -> bool {
    match schema {
        Value::Object(map) => {
            let closed = match map.get("properties").and_then(Value::as_object) {
                Some(properties) => {
                    let required: BTreeSet<&str> = map
                        .get("required")
                        .and_then(Value::as_array)
                        .into_iter()
                        .flatten()
                        .filter_map(Value::as_str)
                        .collect();
                    map.get("additionalProperties") == Some(&Value::Bool(false))
                        && properties.keys().all(|key| required.contains(key.as_str()))
                }
                None => map.get("type") != Some(&json!("object")),
            };
            closed && map.values().all(is_strict)
        }
        Value::Array(list) => list.iter().all(is_strict),
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strict_mode_is_asked_for_only_where_it_is_accepted() {
        let closed = json!({"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"],
            "additionalProperties": false});
        assert!(is_strict(&closed));
        assert!(!is_strict(&json!({"type": "object", "properties": {"a": {}}, "required": ["a"]})));
        assert!(!is_strict(&json!({"type": "array", "items": {"type": "object"}})));
    }
}
