//! The form of a chat-completions request: which of its optional parts a server takes, stepped down by its refusals
//! and remembered per model for the life of the process.

use super::{StructuredOutput, retry::Report};
use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
};

/// What a server is known to understand, learned from its refusals; kept per model for the life of the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    pub structured_output: StructuredOutput,
    pub token_limit: TokenLimit,
    /// The other name of the output limit was tried as well.
    pub token_limit_changed: bool,
    /// `stream_options.include_usage` is sent.
    pub include_usage: bool,
    /// Where a router stands before several servers: only one that knows what is optional, too, is asked.
    pub strict: bool,
}

/// The name of the output limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TokenLimit {
    MaxTokens,
    MaxCompletionTokens,
}

impl TokenLimit {
    pub(super) fn field(self) -> &'static str {
        match self {
            Self::MaxTokens => "max_tokens",
            Self::MaxCompletionTokens => "max_completion_tokens",
        }
    }
    fn other(self) -> Self {
        match self {
            Self::MaxTokens => Self::MaxCompletionTokens,
            Self::MaxCompletionTokens => Self::MaxTokens,
        }
    }
}

/// Most requests of one call that a server may refuse for their form: two levels of output, the limit's name, and the usage option
/// or what a router has to know, and one to be safe.
pub(super) const STEP_DOWNS_MAX: usize = 5;

/// Whether a refusal says which part of the form it is about: then it need not be heard twice, whatever becomes of the simpler form.
pub(super) fn names_its_part(report: &Report) -> bool {
    const PARTS: [&str; 7] = [
        "max_tokens",
        "max_completion_tokens",
        "stream_options",
        "include_usage",
        "response_format",
        "schema",
        "grammar",
    ];
    PARTS.iter().any(|part| report.mentions(part))
}

impl Shape {
    /// The next simpler form after a refusal: what the server named, otherwise whatever is left to drop.
    pub(super) fn step_down(self, report: &Report, with_schema: bool) -> Option<Self> {
        let simpler = || {
            let structured_output = self.structured_output.step_down().filter(|_| with_schema)?;
            Some(Self { structured_output, ..self })
        };
        let renamed = || {
            (!self.token_limit_changed).then(|| Self {
                token_limit: self.token_limit.other(),
                token_limit_changed: true,
                ..self
            })
        };
        let without_usage = || self.include_usage.then_some(Self { include_usage: false, ..self });
        if report.mentions("max_tokens") || report.mentions("max_completion_tokens") {
            return renamed().or_else(simpler).or_else(without_usage);
        }
        if report.mentions("stream_options") || report.mentions("include_usage") {
            return without_usage().or_else(simpler).or_else(renamed);
        }
        let anybody = || self.strict.then_some(Self { strict: false, ..self });
        simpler().or_else(renamed).or_else(without_usage).or_else(anybody)
    }
}

/// Remembered shapes by model. A client has one key, so they are of that key.
#[derive(Debug, Default)]
pub(super) struct Shapes(Mutex<BTreeMap<String, Shape>>);

impl Shapes {
    pub(super) fn get(&self, model: &str) -> Option<Shape> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(model).copied()
    }
    pub(super) fn remember(&self, model: &str, shape: Shape) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(model.to_owned(), shape);
    }
    /// What was known before a request that was refused in every form: it was not the form.
    pub(super) fn restore(&self, model: &str, before: Option<Shape>) {
        let mut shapes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match before {
            Some(shape) => shapes.insert(model.to_owned(), shape),
            None => shapes.remove(model),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_refused_form_is_simplified_until_nothing_is_left() {
        let mut shape = Shape {
            structured_output: StructuredOutput::JsonSchema,
            token_limit: TokenLimit::MaxTokens,
            token_limit_changed: false,
            include_usage: true,
            strict: true,
        };
        let named = Report::from_value(&json!({"error": {"message": "Unsupported parameter: 'max_tokens'"}}));
        assert_eq!(shape.step_down(&named, true).unwrap().token_limit, TokenLimit::MaxCompletionTokens);
        let mut steps = 0;
        while let Some(next) = shape.step_down(&Report::default(), true) {
            shape = next;
            steps += 1;
        }
        assert!(steps <= STEP_DOWNS_MAX);
        assert_eq!((shape.structured_output, shape.strict), (StructuredOutput::Prompt, false));
    }
}
