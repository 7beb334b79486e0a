//! The language in which people ask for runs: `status = 'running' and attributes.project_id = '…' and started_at > '2026-11-01'`.
//!
//! Text becomes a tree here ([`Query::parse`]), and the tree becomes a condition with bound parameters in `store::filter`; no
//! character of the text reaches SQL. Pure. Start reading at [`Query`].

mod parse;

use crate::view::RunStatus;
use chrono::{DateTime, Utc};
use std::fmt;
use uuid::Uuid;

/// Longest filter, in bytes. Chosen: fifty ids fit.
pub const TEXT_BYTES_MAX: usize = 4 << 10;
/// Most comparisons of a filter. Chosen, not measured.
pub const COMPARISONS_MAX: usize = 50;
/// Most values of an `in`. Chosen, not measured.
pub const VALUES_MAX: usize = 100;
/// Deepest nesting of brackets and `not`. The parser calls itself that often.
pub const DEPTH_MAX: usize = 24;

/// Why a filter cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FilterError {
    /// Of the first wrong character, from 1; 0 if the filter as a whole is at fault.
    pub column: usize,
    pub message: String,
    /// What to write instead.
    pub help: String,
}

impl fmt::Display for FilterError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.column > 0 {
            write!(f, "at column {}: ", self.column)?;
        }
        write!(f, "{}; {}", self.message, self.help)
    }
}
impl std::error::Error for FilterError {}

/// A filter that was read.
///
/// # Shape
/// ```text
/// query      := or
/// or         := and ("or" and)*
/// and        := unary ("and" unary)*
/// unary      := "not" unary | "(" or ")" | comparison
/// comparison := field ("=" | "!=" | "<" | "<=" | ">" | ">=") value
///             | field ["not"] "in" "(" value ("," value)* ")"
///             | field ["not"] "like" 'beginning%'
///             | field "is" ["not"] "null"
/// field      := run_id | workflow | workflow_id | status | queue | started_at | closed_at | waiting
///             | "attributes." (name | "\"any text\"")
/// value      := 'text' ('' is a quote) | number | true | false
/// ```
/// Key words in any case. Every comparison is true or false: with a field that is empty or has a value of another type it is
/// false, and `!=`, `not in`, `not like` are the opposite of `=`, `in`, `like`. Texts compare by their bytes.
/// # Units
/// Instants are a date, or a date and a time up to minutes, seconds or fractions, with a zone (`Z`, `+02:00`, `+0200`, `+02`) or in
/// UTC, with a `T` or a space between: RFC 3339 and what ISO 8601 leaves out.
/// Limits: 4 KiB, 50 comparisons, 100 values of an `in`, 24 levels.
#[derive(Clone, Debug, PartialEq)]
pub struct Query(pub(crate) Condition);

impl Query {
    /// # Errors
    /// What is wrong, at which column, and what to write instead.
    pub fn parse(text: &str) -> Result<Self, FilterError> {
        parse::parse(text, &[]).map(Self)
    }

    /// [`Self::parse`] with words of the caller's own that stand for attributes: pairs of word and attribute.
    ///
    /// # Errors
    /// As there.
    pub fn parse_with(text: &str, words: &[(&'static str, &'static str)]) -> Result<Self, FilterError> {
        parse::parse(text, words).map(Self)
    }

    /// The texts that an attribute is compared with by `=`, `!=`, `in` or `not in`, in order.
    #[must_use]
    pub fn texts_of(&self, attribute: &str) -> Vec<&str> {
        let mut found = Vec::new();
        self.0.visit(&mut |condition| {
            let (field, values) = match condition {
                Condition::Compare(field, Compare::Equal, value) => (field, std::slice::from_ref(value)),
                Condition::In(field, values) => (field, &values[..]),
                _ => return,
            };
            if matches!(field, Field::Attribute(name) if name == attribute) {
                found.extend(
                    values.iter().filter_map(|v| if let Value::Text(text) = v { Some(text.as_str()) } else { None }),
                );
            }
        });
        found
    }

    /// Puts what each of [`Self::texts_of`] stands for in its place, any of them; `None` leaves it as it is.
    #[must_use]
    pub fn replacing(mut self, attribute: &str, stands_for: &dyn Fn(&str) -> Option<Vec<String>>) -> Self {
        self.0.replace(attribute, stands_for);
        self
    }
}

impl std::str::FromStr for Query {
    type Err = FilterError;
    fn from_str(text: &str) -> Result<Self, FilterError> {
        Self::parse(text)
    }
}

/// What must hold of a run.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Condition {
    All(Vec<Condition>),
    Any(Vec<Condition>),
    Not(Box<Condition>),
    Compare(Field, Compare, Value),
    /// Equal to one of them.
    In(Field, Vec<Value>),
    StartsWith(Field, String),
    Empty(Field),
}

impl Condition {
    fn visit<'a>(&'a self, see: &mut dyn FnMut(&'a Self)) {
        see(self);
        match self {
            Self::All(parts) | Self::Any(parts) => parts.iter().for_each(|part| part.visit(see)),
            Self::Not(part) => part.visit(see),
            Self::Compare(..) | Self::In(..) | Self::StartsWith(..) | Self::Empty(_) => {}
        }
    }

    fn replace(&mut self, attribute: &str, stands_for: &dyn Fn(&str) -> Option<Vec<String>>) {
        let of = |value: &Value| -> Option<Vec<Value>> {
            let Value::Text(text) = value else { return None };
            stands_for(text).map(|texts| texts.into_iter().map(Value::Text).collect())
        };
        match self {
            Self::All(parts) | Self::Any(parts) => {
                parts.iter_mut().for_each(|part| part.replace(attribute, stands_for))
            }
            Self::Not(part) => part.replace(attribute, stands_for),
            Self::Compare(Field::Attribute(name), Compare::Equal, value) if name.as_str() == attribute => {
                if let Some(values) = of(value) {
                    *self = Self::In(Field::Attribute(attribute.to_owned()), values);
                }
            }
            Self::In(Field::Attribute(name), values) if name.as_str() == attribute => {
                *values = values.iter().flat_map(|value| of(value).unwrap_or_else(|| vec![value.clone()])).collect();
            }
            Self::Compare(..) | Self::In(..) | Self::StartsWith(..) | Self::Empty(_) => {}
        }
    }
}

/// `!=` is the opposite of `Equal`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Compare {
    Equal,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
}

/// What of a run is looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Field {
    RunId,
    Workflow,
    WorkflowId,
    Status,
    Queue,
    StartedAt,
    ClosedAt,
    Waiting,
    Attribute(String),
}

impl Field {
    const NAMED: [(&'static str, Self); 8] = [
        ("run_id", Self::RunId),
        ("workflow", Self::Workflow),
        ("workflow_id", Self::WorkflowId),
        ("status", Self::Status),
        ("queue", Self::Queue),
        ("started_at", Self::StartedAt),
        ("closed_at", Self::ClosedAt),
        ("waiting", Self::Waiting),
    ];
}

/// What it is compared with: of the field's type.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Value {
    Text(String),
    /// Decimal, as JSON writes it.
    Number(String),
    Bool(bool),
    Id(Uuid),
    Instant(DateTime<Utc>),
    Status(RunStatus),
}
