//! A model's tool call as typed data. Models get details wrong: what is meant without doubt is accepted, everything
//! else is answered with a text that says what is missing.

use super::{COMMAND_BYTES_MAX, Tool};
use crate::{edit::Edit, orchestrator::ToolCall};
use serde_json::{Map, Value};

/// A tool call that can be executed.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Call {
    Read { path: String, start_line: Option<usize>, end_line: Option<usize> },
    Search { query: String },
    Symbols { name: String },
    Edit { edits: Vec<Edit> },
    Run { command: String },
    Done { summary: String, result: Option<Value> },
}

impl Call {
    /// Its path, command or query, for progress.
    pub(super) fn subject(&self) -> &str {
        match self {
            Self::Read { path, .. } => path,
            Self::Search { query } => query,
            Self::Symbols { name } => name,
            Self::Edit { edits } => edits.first().map_or("", Edit::path),
            Self::Run { command } => command,
            Self::Done { .. } => "",
        }
    }
}

/// Reads a tool call.
///
/// # Errors
/// A text for the model: unknown tool, arguments that are no object, a field that is missing or of the wrong type.
pub(super) fn parse(call: &ToolCall, tools: &[Tool]) -> Result<Call, String> {
    let Some(tool) = Tool::named(&call.name).filter(|tool| tools.contains(tool)) else {
        let names: Vec<_> = tools.iter().map(|tool| tool.name()).collect();
        return Err(format!("there is no tool {:?}; there are: {}.", call.name, names.join(", ")));
    };
    let Value::Object(arguments) = &call.arguments else {
        return Err("the arguments must be one JSON object.".to_owned());
    };
    if let (1, Some(text)) = (arguments.len(), arguments.get("_invalid")) {
        let text: String = text.as_str().unwrap_or_default().chars().take(120).collect();
        return Err(format!("the arguments were not valid JSON; they began with {text:?}. Send them again."));
    }
    Ok(match tool {
        Tool::Read => Call::Read {
            path: text(arguments, "path")?,
            start_line: line(arguments, "start_line")?,
            end_line: line(arguments, "end_line")?,
        },
        Tool::Search => Call::Search { query: filled(arguments, "query")? },
        Tool::Symbols => Call::Symbols { name: filled(arguments, "name")? },
        Tool::Edit => Call::Edit { edits: edits(&call.arguments)? },
        Tool::Run => {
            let command = filled(arguments, "command")?;
            if command.len() > COMMAND_BYTES_MAX {
                return Err(format!(
                    "the command is longer than {COMMAND_BYTES_MAX} bytes; write a script file instead."
                ));
            }
            if command.contains('\0') {
                return Err("the command contains NUL.".to_owned());
            }
            Call::Run { command }
        }
        Tool::Done => Call::Done {
            summary: arguments.get("summary").and_then(Value::as_str).unwrap_or_default().trim().to_owned(),
            result: arguments.get("result").cloned(),
        },
    })
}

/// Edits from `{"edits": […]}`; a single edit may stand for the list, and `op` may be left out where only one fits.
///
/// # Errors
/// A text for the model that names the entry.
pub(super) fn edits(value: &Value) -> Result<Vec<Edit>, String> {
    let list = match (value.get("edits"), value.get("path")) {
        (Some(Value::Array(list)), _) => list.clone(),
        (Some(one @ Value::Object(_)), _) => vec![one.clone()],
        (None, Some(_)) => vec![value.clone()],
        _ => return Err("`edits` must be a list of {op, path, …}.".to_owned()),
    };
    list.iter()
        .enumerate()
        .map(|(index, entry)| one_edit(entry).map_err(|why| format!("edit {}: {why} Nothing was changed.", index + 1)))
        .collect()
}

fn one_edit(entry: &Value) -> Result<Edit, String> {
    let Value::Object(fields) = entry else { return Err("it must be an object {op, path, …}.".to_owned()) };
    let path = text(fields, "path")?;
    let op = match fields.get("op") {
        Some(Value::String(op)) => op.as_str(),
        None | Some(Value::Null) if fields.contains_key("search") => "replace",
        None | Some(Value::Null) if fields.contains_key("content") => "write",
        _ => return Err("`op` must be \"write\", \"replace\" or \"delete\".".to_owned()),
    };
    match op {
        "write" => Ok(Edit::Write { path, content: text(fields, "content")? }),
        "replace" => Ok(Edit::Replace { path, search: text(fields, "search")?, replace: text(fields, "replace")? }),
        "delete" => Ok(Edit::Delete { path }),
        other => Err(format!("there is no op {other:?}; there are write, replace, delete.")),
    }
}

fn text(fields: &Map<String, Value>, name: &str) -> Result<String, String> {
    match fields.get(name) {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(_) => Err(format!("`{name}` must be a string.")),
        None => Err(format!("`{name}` is missing.")),
    }
}

fn filled(fields: &Map<String, Value>, name: &str) -> Result<String, String> {
    text(fields, name).and_then(|t| if t.trim().is_empty() { Err(format!("`{name}` is empty.")) } else { Ok(t) })
}

fn line(fields: &Map<String, Value>, name: &str) -> Result<Option<usize>, String> {
    let number = match fields.get(name) {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::Number(number)) => {
            number.as_u64().or_else(|| number.as_f64().filter(|f| f.fract() == 0.0 && *f >= 1.0).map(|f| f as u64))
        }
        Some(Value::String(text)) => text.trim().parse().ok(),
        Some(_) => None,
    };
    match number.and_then(|n| usize::try_from(n).ok()).filter(|n| *n >= 1) {
        Some(number) => Ok(Some(number)),
        None => Err(format!("`{name}` must be a line number from 1.")),
    }
}

/// What a model without tools may answer instead: one JSON object in its text.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct TextAnswer {
    /// The `edits` of the object, still to be read with [`edits`].
    pub(super) value: Value,
    /// `done`: true or a summary.
    pub(super) done: Option<String>,
}

/// Finds `{"edits": […], "done": …}` in a text, alone or in a fenced block.
pub(super) fn text_answer(text: &str) -> Option<TextAnswer> {
    let value = json_object(text)?;
    value.get("edits")?;
    let done = match value.get("done") {
        Some(Value::String(summary)) => Some(summary.clone()),
        Some(Value::Bool(true)) => Some(value.get("summary").and_then(Value::as_str).unwrap_or_default().to_owned()),
        _ => None,
    };
    Some(TextAnswer { value, done })
}

/// The JSON object that a text consists of, contains in a fence, or spans from its first to its last brace.
pub(super) fn json_object(text: &str) -> Option<Value> {
    let whole = Some(text.trim());
    let fenced = text.split("```").skip(1).step_by(2).map(|block| {
        let body = block.split_once('\n').map_or(block, |(_, body)| body);
        body.trim()
    });
    let braces = text.find('{').zip(text.rfind('}')).filter(|(a, b)| a < b).map(|(a, b)| &text[a..=b]);
    whole
        .into_iter()
        .chain(fenced)
        .chain(braces)
        .filter_map(|candidate| serde_json::from_str::<Value>(candidate).ok())
        .find(Value::is_object)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn call(name: &str, arguments: Value) -> Result<Call, String> {
        parse(&ToolCall { id: "1".into(), name: name.into(), arguments }, &Tool::ALL)
    }

    #[test]
    fn what_is_meant_without_doubt_is_accepted() {
        let read = |start, end| Ok(Call::Read { path: "a".into(), start_line: start, end_line: end });
        assert_eq!(call("read", json!({"path": "a"})), read(None, None));
        assert_eq!(call("read", json!({"path": "a", "start_line": "3", "end_line": 4.0})), read(Some(3), Some(4)));
        let write = Edit::Write { path: "a".into(), content: "b".into() };
        for arguments in [
            json!({"edits": [{"op": "write", "path": "a", "content": "b"}]}),
            json!({"edits": [{"path": "a", "content": "b"}]}),
            json!({"edits": {"op": "write", "path": "a", "content": "b"}}),
            json!({"path": "a", "content": "b"}),
        ] {
            assert_eq!(call("edit", arguments), Ok(Call::Edit { edits: vec![write.clone()] }));
        }
        assert_eq!(call("done", json!({})), Ok(Call::Done { summary: String::new(), result: None }));
    }

    #[test]
    fn everything_else_is_answered_with_a_text() {
        for (name, arguments, says) in [
            ("rm", json!({}), "there is no tool \"rm\"; there are: read, search"),
            ("read", json!([]), "one JSON object"),
            ("read", json!({"_invalid": "{\"path\": "}), "not valid JSON"),
            ("read", json!({}), "`path` is missing"),
            ("read", json!({"path": 3}), "`path` must be a string"),
            ("read", json!({"path": "a", "start_line": 0}), "line number from 1"),
            ("read", json!({"path": "a", "start_line": -1.5}), "line number from 1"),
            ("search", json!({"query": " "}), "`query` is empty"),
            ("edit", json!({"edits": 3}), "`edits` must be a list"),
            ("edit", json!({"edits": ["a"]}), "edit 1: it must be an object"),
            ("edit", json!({"edits": [{"op": "write", "path": "a"}]}), "edit 1: `content` is missing"),
            ("edit", json!({"edits": [{"op": "move", "path": "a"}]}), "no op \"move\""),
            ("edit", json!({"edits": [{"path": "a"}]}), "`op` must be"),
            ("run", json!({"command": "x".repeat(COMMAND_BYTES_MAX + 1)}), "longer than"),
            ("run", json!({"command": "a\0b"}), "NUL"),
        ] {
            let answer = call(name, arguments).expect_err(says);
            assert!(answer.contains(says), "{answer}");
        }
        let reader = [Tool::Read, Tool::Done];
        let run = ToolCall { id: String::new(), name: "run".into(), arguments: json!({"command": "ls"}) };
        assert!(parse(&run, &reader).expect_err("not offered").contains("there are: read, done"));
    }

    #[test]
    fn edits_are_found_in_plain_text() {
        let object = "{\"edits\": [{\"path\": \"a\", \"content\": \"{}\"}], \"done\": \"all\"}";
        for text in [object.to_owned(), format!("Sure!\n```json\n{object}\n```\nBye"), format!("Here: {object} ok")] {
            let answer = text_answer(&text).expect("found");
            assert_eq!(answer.done.as_deref(), Some("all"));
            assert_eq!(edits(&answer.value).map(|e| e.len()), Ok(1));
        }
        for text in ["", "no", "{\"a\": 1}", "{\"edits\": [", "[1]", "} {"] {
            assert_eq!(text_answer(text), None, "{text}");
        }
    }
}
