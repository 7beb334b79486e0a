//! What is wrong with a document, where, and what helps.

use serde::Serialize;
use std::fmt::Write as _;

/// How bad it is. Errors block a deployment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    Info,
    Warning,
    Error,
}

/// A place in the source. Lines and columns are 1-based; columns count Unicode scalar values; the end is exclusive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Span {
    pub line: u32,
    pub column: u32,
    pub end_line: u32,
    pub end_column: u32,
}

/// One finding.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Diagnostic {
    /// Stable code, for example `WF421`; listed in the crate's README.
    pub code: &'static str,
    pub severity: Severity,
    pub message: String,
    pub file: String,
    #[serde(flatten)]
    pub span: Span,
    /// JSON pointer of the value, for example `/steps/0/uses`.
    pub path: String,
    /// Id of the innermost step around it.
    pub step: Option<String>,
    pub help: Option<String>,
}

impl Diagnostic {
    /// As text: place, severity, code, message; the line with a marker; the step; the help.
    #[must_use]
    pub fn render(&self, source: &str) -> String {
        let severity = match self.severity {
            Severity::Info => "info",
            Severity::Warning => "warning",
            Severity::Error => "error",
        };
        let mut out = format!(
            "{}:{}:{}: {severity}[{}]: {}\n",
            self.file, self.span.line, self.span.column, self.code, self.message
        );
        if let Some(line) = source.lines().nth(self.span.line.saturating_sub(1) as usize) {
            let width = if self.span.end_line == self.span.line {
                self.span.end_column.saturating_sub(self.span.column)
            } else {
                1
            };
            let (pad, marks) = (self.span.column.saturating_sub(1) as usize, width.clamp(1, 60) as usize);
            // Writing to a String cannot fail.
            let _ = writeln!(out, "    | {line}\n    | {}{}", " ".repeat(pad), "^".repeat(marks));
        }
        if let Some(step) = &self.step {
            let _ = writeln!(out, "    in step `{step}`");
        }
        if let Some(help) = &self.help {
            let _ = writeln!(out, "    help: {help}");
        }
        out
    }
}

/// Collects findings; none twice.
#[derive(Debug, Default)]
pub(crate) struct Sink {
    pub(crate) file: String,
    pub(crate) found: Vec<Diagnostic>,
    /// Ids of the steps around the place that is being read.
    pub(crate) steps: Vec<String>,
}

impl Sink {
    pub(crate) fn add(
        &mut self,
        code: &'static str,
        severity: Severity,
        span: Span,
        path: &str,
        message: impl Into<String>,
        help: Option<String>,
    ) {
        let message = message.into();
        if self.found.iter().any(|d| d.code == code && d.span == span && d.message == message) {
            return;
        }
        self.found.push(Diagnostic {
            code,
            severity,
            message,
            file: self.file.clone(),
            span,
            path: path.to_owned(),
            step: self.steps.last().cloned(),
            help,
        });
    }
    pub(crate) fn error(&mut self, code: &'static str, span: Span, path: &str, message: impl Into<String>) {
        self.add(code, Severity::Error, span, path, message, None);
    }
    pub(crate) fn error_help(
        &mut self,
        code: &'static str,
        span: Span,
        path: &str,
        message: impl Into<String>,
        help: impl Into<String>,
    ) {
        self.add(code, Severity::Error, span, path, message, Some(help.into()));
    }
    pub(crate) fn warn(&mut self, code: &'static str, span: Span, path: &str, message: impl Into<String>) {
        self.add(code, Severity::Warning, span, path, message, None);
    }
    pub(crate) fn has_errors(&self) -> bool {
        self.found.iter().any(|d| d.severity == Severity::Error)
    }
}

/// The candidate that is most like `word`, if one is like it.
pub(crate) fn suggestion<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    candidates
        .into_iter()
        .map(|c| (strsim::damerau_levenshtein(word, c), c))
        .filter(|(distance, c)| *distance <= 1 + c.len() / 4)
        .min()
        .map(|(_, c)| c)
}
