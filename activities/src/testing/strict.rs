//! What the originals refuse about a question; without it, a fake would take anything.

use super::{
    dialect::Dialect,
    reply::{Answer, refusal},
    route::Seen,
};
use serde_json::Value;
use std::collections::BTreeSet;

/// The fields of a Gemini part that hold its content; one of them, exactly.
const PART_CONTENT: [&str; 5] = ["text", "inlineData", "fileData", "functionCall", "functionResponse"];
/// JSON Schema as Gemini knows it.
const GEMINI_SCHEMA: [&str; 21] = [
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
];

/// The refusal of a question, if it deserves one.
pub(super) fn check(seen: &Seen) -> Option<Answer> {
    let refuse = |code, status, message: &str| Some(refusal(seen.dialect, code, status, message));
    match (seen.dialect, seen.key()) {
        (Dialect::Gemini, None) => {
            return refuse(403, "PERMISSION_DENIED", "Method doesn't allow unregistered callers");
        }
        (Dialect::OpenRouter, None) => return refuse(401, "UNAUTHENTICATED", "No auth credentials found"),
        _ => {}
    }
    let problem = match seen.dialect {
        Dialect::Gemini => gemini(seen),
        Dialect::OpenRouter | Dialect::OpenAi => chat(seen),
    };
    problem.err().and_then(|message| refuse(400, "INVALID_ARGUMENT", &message))
}

fn all<'a>(value: &'a Value, field: &str) -> impl Iterator<Item = &'a Value> + use<'a> {
    value.get(field).and_then(Value::as_array).into_iter().flatten()
}

/// The value of a field in camel case or, because it is proto JSON, in snake case.
fn field<'a>(value: &'a Value, camel: &str) -> Option<&'a Value> {
    let snake: String = camel
        .chars()
        .flat_map(|c| if c.is_ascii_uppercase() { vec!['_', c.to_ascii_lowercase()] } else { vec![c] })
        .collect();
    value.get(camel).or_else(|| value.get(&snake)).filter(|value| !value.is_null())
}

fn gemini(seen: &Seen) -> Result<(), String> {
    let body = &seen.body;
    let contents: Vec<&Value> = all(body, "contents").collect();
    if contents.is_empty() {
        return Err("contents is not specified".to_owned());
    }
    let mut calls_before = 0;
    for turn in contents {
        let role = turn["role"].as_str().unwrap_or("user");
        if role != "user" && role != "model" {
            return Err("Please use a valid role: user, model.".to_owned());
        }
        let (mut calls, mut results, mut signed) = (0, 0, false);
        for part in all(turn, "parts") {
            if PART_CONTENT.iter().filter(|name| field(part, name).is_some()).count() != 1 {
                return Err("required oneof field 'data' must have one initialized field".to_owned());
            }
            calls += usize::from(field(part, "functionCall").is_some());
            results += usize::from(field(part, "functionResponse").is_some());
            signed |= field(part, "functionCall").is_some() && field(part, "thoughtSignature").is_some();
            if field(part, "functionCall").is_some_and(|call| call.get("args").is_some_and(|args| !args.is_object())) {
                return Err("args must be an object".to_owned());
            }
        }
        if role == "model" && calls > 0 && !signed {
            return Err("Function call is missing a thought_signature in functionCall parts".to_owned());
        }
        if results != calls_before && (results > 0 || calls_before > 0) {
            return Err("the number of function response parts is not equal to that of the call turn".to_owned());
        }
        calls_before = calls;
    }
    for tool in all(body, "tools") {
        for declaration in
            field(tool, "functionDeclarations").into_iter().flat_map(|d| d.as_array().into_iter().flatten())
        {
            if field(declaration, "parameters").is_some() && field(declaration, "parametersJsonSchema").is_some() {
                return Err("parameters and parameters_json_schema are mutually exclusive".to_owned());
            }
            known_keywords(field(declaration, "parametersJsonSchema"))?;
        }
    }
    let Some(config) = field(body, "generationConfig") else { return Ok(()) };
    let schema = field(config, "responseJsonSchema");
    if schema.is_some() && field(config, "responseSchema").is_some() {
        return Err("response_schema and response_json_schema are mutually exclusive".to_owned());
    }
    let mime = field(config, "responseMimeType").and_then(Value::as_str).unwrap_or("text/plain");
    if (schema.is_some() || field(config, "responseSchema").is_some()) && mime == "text/plain" {
        return Err("a response schema needs response_mime_type application/json".to_owned());
    }
    known_keywords(schema)?;
    if let Some(thinking) = field(config, "thinkingConfig")
        && field(thinking, "thinkingLevel").is_some()
        && field(thinking, "thinkingBudget").is_some()
    {
        return Err("You can only set only one of thinking budget and thinking level.".to_owned());
    }
    Ok(())
}

fn known_keywords(schema: Option<&Value>) -> Result<(), String> {
    let Some(Value::Object(map)) = schema else { return Ok(()) };
    for (keyword, value) in map {
        if !GEMINI_SCHEMA.contains(&keyword.as_str()) {
            return Err(format!("Unknown keyword in schema: {keyword}"));
        }
        match keyword.as_str() {
            "properties" | "$defs" => {
                value.as_object().into_iter().flatten().try_for_each(|(_, v)| known_keywords(Some(v)))?
            }
            "anyOf" | "oneOf" | "prefixItems" => {
                value.as_array().into_iter().flatten().try_for_each(|v| known_keywords(Some(v)))?;
            }
            "items" | "additionalProperties" => known_keywords(Some(value))?,
            _ => {}
        }
    }
    Ok(())
}

fn chat(seen: &Seen) -> Result<(), String> {
    let body = &seen.body;
    if !body.is_object() {
        return Err("We could not parse the JSON body of your request.".to_owned());
    }
    if body["model"].as_str().is_none_or(str::is_empty) {
        return Err("you must provide a model parameter".to_owned());
    }
    if body.get("max_tokens").is_some() && body.get("max_completion_tokens").is_some() {
        return Err("Setting 'max_tokens' and 'max_completion_tokens' at the same time is not supported.".to_owned());
    }
    let mut waiting: BTreeSet<&str> = BTreeSet::new();
    if all(body, "messages").next().is_none() {
        return Err("messages: too short".to_owned());
    }
    for message in all(body, "messages") {
        let role = message["role"].as_str().unwrap_or_default();
        if role == "tool" {
            let id = message["tool_call_id"].as_str().unwrap_or_default();
            if !waiting.remove(id) {
                return Err("a message with role 'tool' must answer a preceding message with 'tool_calls'".to_owned());
            }
            continue;
        }
        if !waiting.is_empty() {
            return Err("an assistant message with 'tool_calls' must be followed by their answers".to_owned());
        }
        if !["system", "developer", "user", "assistant"].contains(&role) {
            return Err(format!("unknown role '{role}'"));
        }
        for call in all(message, "tool_calls") {
            if !call["function"]["arguments"].is_string() {
                return Err("arguments of a tool call must be a string".to_owned());
            }
            waiting.insert(call["id"].as_str().unwrap_or_default());
        }
        if message["content"].is_null() && waiting.is_empty() {
            return Err("content is missing".to_owned());
        }
    }
    let format = &body["response_format"];
    match format["type"].as_str() {
        Some("json_schema") => {
            let schema = &format["json_schema"];
            if schema["name"].as_str().is_none_or(str::is_empty) {
                return Err("response_format.json_schema.name is missing".to_owned());
            }
            if schema["strict"] == true && !is_closed(&schema["schema"]) {
                return Err("strict: 'additionalProperties' must be false and all properties required".to_owned());
            }
        }
        Some("json_object") if !body["messages"].to_string().to_lowercase().contains("json") => {
            return Err("'messages' must contain the word 'json' to use 'response_format' of 'json_object'".to_owned());
        }
        _ => {}
    }
    Ok(())
}

fn is_closed(schema: &Value) -> bool {
    let here = schema["type"] != "object"
        || (schema["additionalProperties"] == false
            && schema["properties"]
                .as_object()
                .is_none_or(|properties| properties.keys().all(|key| all(schema, "required").any(|name| name == key))));
    here && match schema {
        Value::Object(map) => map.values().all(is_closed),
        Value::Array(list) => list.iter().all(is_closed),
        _ => true,
    }
}
