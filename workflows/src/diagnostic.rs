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
        let help = help.or_else(|| remedy(code).map(str::to_owned));
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

/// What helps against a finding that has nothing more particular to say.
fn remedy(code: &str) -> Option<&'static str> {
    Some(match code {
        "WF100" => "check the indentation, brackets and quotes around this place",
        "WF101" => "remove one of the two, or rename it",
        "WF102" => "remove the key, or move it to the step or block it belongs to",
        "WF105" => "write the values out: one document a file, no `<<`, no `!tag`",
        "WF106" => "see the grammar of this field in the language's reference",
        "WF108" => "write `true` or `false`; quote the word if text is meant",
        "WF201" => "give every step of the document an id of its own",
        "WF202" => "a step does one thing: split it in two",
        "WF203" => "choose another id, for example with a suffix",
        "WF207" => "remove the step, or put an `if` on the one that ends the block",
        "WF208" => "remove the `if`, or write the condition that was meant",
        "WF209" => "each case has `when: <condition>`; only the last may have `else: true` instead",
        "WF210" => "split the workflow: move a part into one of its own and `call` it",
        "WF103" => "quote the value",
        "WF104" => "quote an expression that starts with `!`",
        "WF107" => "write for example `1h30m`",
        "WF110" => "use `${{ ... }}`",
        "WF111" => "use `{{...}}`",
        "WF112" => "write the bare expression",
        "WF220" => "name a step that stands before this one in the same list",
        "WF302" => "declare it under `inputs`",
        "WF303" => "see the step's contract or `outputs`",
        "WF305" => "compute it where the name exists, and hand it on in `outputs`",
        "WF306" => "guard it with the step's `status`, `has(…)` or `default(…)`",
        "WF401" => "lower a bound, or raise `limits: { executions: … }`",
        "WF421" => "add what is missing: every block is bounded and every branch has steps",
        "WF221" => "let one range contain the other, or end before it begins",
        "WF224" => "leave it out for now; the README of the compiler lists what is accepted",
        "WF301" => "a step can read earlier steps of its own block and of the blocks around it",
        "WF304" => "the names are inputs, env, steps, item, index, round, signal, error and run",
        "WF309" => "conditions and data are CEL: texts in quotes, `&&`, `||`, `!`, `==`, `a ? b : c`",
        "WF310" => "compute parts of it in a `set` step before",
        "WF311" => "templates are Handlebars: `{{path}}`, `{{#if}}…{{/if}}`, `{{#each}}…{{/each}}`, no partials",
        "WF422" => "bounds are plain numbers or durations in this range, never expressions",
        "WF425" => "raise the top-level `timeout`, or shorten the wait",
        "WF504" => "for example `on: [\"model.*\", \"user.*\"]`",
        "WF505" => "for example `transient.*`, `timeout.*`, `model.*`, `user.*`, or a code that the activity declares",
        "WF506" => "raise `attempts`, or escalate earlier",
        "WF508" => "move the step into `steps`; `finally` only cleans up",
        "WF621" => "change the default so that it satisfies the schema, or the schema",
        "WF622" => "use `on-timeout: reject` or `fail` if silence is not consent",
        "WF801" => "see the arguments of the activity's contract",
        "WF802" => "write `name@3`, `name@latest` or `name@sha256:<64 hex digits>`",
        "WF805" => "write `name@3` to pin a version in the document",
        _ => return None,
    })
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
