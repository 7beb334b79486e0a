//! Finds the JSON in an answer and holds it against its schema.
//!
//! Models wrap JSON in fences, put prose or their thoughts in front of it and add remarks after it. All of that is
//! tolerated; a value that does not satisfy the schema is not.

use loopwright_engine::Failure;
use serde_json::Value;

/// Most places at which a value is looked for: a text full of braces must not cost a second.
const STARTS_MAX: usize = 256;
/// Most errors that are told to the model at once: it repairs a few at a time.
const ERRORS_MAX: usize = 8;
/// Longest text of one error, in characters.
const ERROR_CHARS_MAX: usize = 300;

/// A compiled schema of answers.
pub struct Shape(jsonschema::Validator);

impl Shape {
    /// Compiles a schema.
    ///
    /// # Errors
    /// Permanent `model.schema_invalid`: the activity asks for something impossible.
    pub fn new(schema: &Value) -> Result<Self, Failure> {
        jsonschema::validator_for(schema).map(Self).map_err(|error| {
            let text: String = error.to_string().chars().take(ERROR_CHARS_MAX).collect();
            Failure::permanent("model.schema_invalid", format!("the output schema of the call is not valid: {text}"))
        })
    }

    /// The value in `text` that satisfies the schema.
    ///
    /// # Errors
    /// What is wrong, one line each, fit for the model to repair it.
    pub fn read(&self, text: &str) -> Result<Value, Vec<String>> {
        let values = candidates(text);
        if let Some(valid) = values.iter().find(|value| self.0.is_valid(value)) {
            return Ok(valid.clone());
        }
        // The largest value is what was meant.
        let Some(meant) = values.into_iter().max_by_key(|value| value.to_string().len()) else {
            let why = serde_json::from_str::<Value>(text.trim()).err().map(|e| e.to_string()).unwrap_or_default();
            return Err(vec![format!("the answer is not JSON: {why}")]);
        };
        let errors = self.0.iter_errors(&meant).take(ERRORS_MAX).map(|error| {
            let path = error.instance_path().to_string();
            let text: String = error.to_string().chars().take(ERROR_CHARS_MAX).collect();
            format!("{}: {text}", if path.is_empty() { "(root)" } else { &path })
        });
        Err(errors.collect())
    }
}

/// JSON values in a text, the most likely first.
fn candidates(text: &str) -> Vec<Value> {
    let text = without_thoughts(text).trim();
    if let Ok(value) = serde_json::from_str(text) {
        return vec![value];
    }
    let mut values = Vec::new();
    let mut position = 0;
    for _ in 0..STARTS_MAX {
        let Some(start) = text[position..].find(['{', '[']).map(|found| position + found) else { break };
        let mut stream = serde_json::Deserializer::from_str(&text[start..]).into_iter::<Value>();
        match stream.next() {
            Some(Ok(value)) => {
                position = start + stream.byte_offset();
                values.push(value);
            }
            _ => position = start + 1,
        }
    }
    values
}

/// The text after the thoughts that some local models speak aloud.
fn without_thoughts(text: &str) -> &str {
    for (open, close) in [("<think>", "</think>"), ("<thinking>", "</thinking>")] {
        let trimmed = text.trim_start();
        if (trimmed.starts_with(open) || (text.contains(close) && !text.contains(open)))
            && let Some(end) = text.find(close)
        {
            return &text[end + close.len()..];
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn shape() -> Shape {
        Shape::new(&json!({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})).unwrap()
    }

    #[test]
    fn json_is_found_in_whatever_surrounds_it() {
        for text in [
            "{\"a\": 1}",
            "  \n{\"a\": 1}\n",
            "```json\n{\"a\": 1}\n```",
            "Here you go (see [1] and {x}):\n```\n{\"a\": 1}\n```\nHope that helps! {}",
            "<think>maybe {\"a\": 2}?</think>{\"a\": 1}",
            "maybe {\"a\": 2}?</think>\n{\"a\": 1}",
            "{\"b\": {\"a\": \"long text that is no answer\"}} {\"a\": 1}",
        ] {
            assert_eq!(shape().read(text), Ok(json!({"a": 1})), "{text}");
        }
    }

    #[test]
    fn what_is_wrong_is_said_so_that_it_can_be_repaired() {
        assert_eq!(shape().read("{\"a\": \"x\"}").unwrap_err(), ["/a: \"x\" is not of type \"integer\""]);
        assert!(shape().read("{}").unwrap_err()[0].starts_with("(root): "));
        assert!(shape().read("I cannot.").unwrap_err()[0].starts_with("the answer is not JSON"));
        assert!(shape().read("").unwrap_err()[0].starts_with("the answer is not JSON"));
        assert!(shape().read("{\"a\": 1").is_err());
    }

    #[test]
    fn a_flood_of_braces_is_bounded() {
        assert!(shape().read(&"[{".repeat(500_000)).is_err());
    }

    #[test]
    fn an_impossible_schema_is_a_permanent_failure() {
        let failure = Shape::new(&json!({"type": 7})).err().unwrap();
        assert_eq!(failure.code, "model.schema_invalid");
    }
}
