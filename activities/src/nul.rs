//! Text of models and servers as Postgres takes it. One NUL in an answer, and the answer would be paid for and could not be
//! recorded, at every attempt again.

use serde_json::Value;

/// `text` with a visible mark in the place of every NUL.
#[must_use]
pub(crate) fn text(text: &str) -> String {
    text.replace('\0', "\u{2400}")
}

/// The same for every text and every name in a value.
#[must_use]
pub(crate) fn value(value: Value) -> Value {
    match value {
        Value::String(held) => Value::String(text(&held)),
        Value::Array(items) => items.into_iter().map(self::value).collect(),
        Value::Object(fields) => fields.into_iter().map(|(name, held)| (text(&name), self::value(held))).collect(),
        other => other,
    }
}
