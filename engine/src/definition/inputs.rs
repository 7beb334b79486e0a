//! Inputs of a run: defaults filled in, every declared one checked.

use super::{Definition, Input};
use serde_json::{Map, Value};
use std::collections::BTreeMap;

/// Largest inputs of a run, in bytes of JSON.
pub const INPUTS_BYTES_MAX: usize = 1 << 20;

/// Deepest JSON that somebody gives, an activity returns or a step makes: lists and objects inside each other. Chosen: a parser
/// reads 128 levels, and what is around a value in an event or in the state of nested blocks needs the rest.
pub const DEPTH_MAX: usize = 48;

/// Whether lists and objects stand deeper inside each other than [`DEPTH_MAX`].
#[must_use]
pub fn is_too_deep(value: &Value) -> bool {
    fn deeper(value: &Value, left: usize) -> bool {
        match value {
            Value::Array(items) => left == 0 || items.iter().any(|item| deeper(item, left - 1)),
            Value::Object(map) => left == 0 || map.values().any(|item| deeper(item, left - 1)),
            _ => false,
        }
    }
    deeper(value, DEPTH_MAX)
}

/// Fills in defaults and checks every input against its schema.
///
/// # Errors
/// All violations, one sentence each; unknown names are violations.
pub fn prepare(definition: &Definition, inputs: &Value) -> Result<Value, Vec<String>> {
    prepare_for(&definition.inputs, inputs)
}

/// [`prepare`] by the declarations alone.
///
/// # Errors
/// As there.
pub fn prepare_for(declared: &BTreeMap<String, Input>, inputs: &Value) -> Result<Value, Vec<String>> {
    let empty = Map::new();
    let given = match inputs {
        Value::Object(map) => map,
        Value::Null => &empty,
        _ => return Err(vec!["inputs must be an object".into()]),
    };
    let mut problems = Vec::new();
    let mut out = Map::new();
    for (name, input) in declared {
        match given.get(name).or(input.default.as_ref()) {
            Some(value) => {
                out.insert(name.clone(), value.clone());
                problems.extend(violations(&input.schema, value).into_iter().map(|v| format!("`{name}` {v}")));
            }
            None if input.required => problems.push(format!("`{name}` is required")),
            None => {}
        }
    }
    for name in given.keys().filter(|name| !declared.contains_key(*name)) {
        problems.push(format!("there is no input `{name}`"));
    }
    let out = Value::Object(out);
    if is_too_deep(&out) {
        problems.push(format!("inputs are nested deeper than {DEPTH_MAX} levels"));
    }
    let bytes = serde_json::to_string(&out).map_or(usize::MAX, |t| t.len());
    if bytes > INPUTS_BYTES_MAX {
        problems.push(format!("inputs are {bytes} bytes; the limit is {INPUTS_BYTES_MAX}"));
    }
    if problems.is_empty() { Ok(out) } else { Err(problems) }
}

/// How a value violates a JSON Schema, one sentence each, at most ten.
#[must_use]
pub fn violations(schema: &Value, value: &Value) -> Vec<String> {
    Schema::new(schema).violations(value)
}

/// A JSON Schema that is checked more than once: reading it takes longer than most checks.
#[derive(Debug)]
pub struct Schema(Result<jsonschema::Validator, String>);

impl Schema {
    /// Reads it; a broken one says so at every check.
    #[must_use]
    pub fn new(schema: &Value) -> Self {
        Self(jsonschema::validator_for(schema).map_err(|error| error.to_string()))
    }

    /// [`violations`].
    #[must_use]
    pub fn violations(&self, value: &Value) -> Vec<String> {
        match &self.0 {
            // Without the list of errors, which costs even when it is empty.
            Ok(validator) if validator.is_valid(value) => Vec::new(),
            Ok(validator) => validator
                .iter_errors(value)
                .take(10)
                .map(|error| {
                    let at = error.instance_path().to_string();
                    let text: String = error.to_string().chars().take(300).collect();
                    if at.is_empty() { text } else { format!("at {at}: {text}") }
                })
                .collect(),
            Err(error) => vec![format!("cannot be checked, its schema is broken: {error}")],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn depth_is_counted_in_lists_and_objects() {
        let nested = |levels: usize| {
            (0..levels).fold(json!(1), |inner, n| if n % 2 == 0 { json!([inner]) } else { json!({ "a": inner }) })
        };
        assert!(!is_too_deep(&nested(DEPTH_MAX)));
        assert!(is_too_deep(&nested(DEPTH_MAX + 1)));
        assert!(is_too_deep(&json!([1, nested(DEPTH_MAX)])));
    }
}
