//! What is wrong with a document, where, and what helps.

use serde::Serialize;
use std::{
    collections::HashSet,
    fmt::Write as _,
    hash::{DefaultHasher, Hash as _, Hasher as _},
};

/// Most findings of one document. Nobody reads more, and one line can hold tens of thousands of mistakes.
pub const FINDINGS_MAX: usize = 100;
/// Longest part of a source line in a rendered finding, in characters: about what a terminal shows.
const EXCERPT_CHARS_MAX: usize = 160;
/// Longest message, help or step id of a finding, in characters: they quote what the document holds, however long.
const TEXT_CHARS_MAX: usize = 1_000;

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
    /// The line that it stands in, where `file` is another one than the document.
    #[serde(skip)]
    pub(crate) line_text: Option<String>,
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
        let line = || source.lines().nth(self.span.line.saturating_sub(1) as usize);
        if let Some(line) = self.line_text.as_deref().or_else(line) {
            let width = if self.span.end_line == self.span.line {
                self.span.end_column.saturating_sub(self.span.column)
            } else {
                1
            };
            let (excerpt, pad) = excerpt(line, self.span.column.saturating_sub(1) as usize);
            // Writing to a String cannot fail.
            let _ =
                writeln!(out, "    | {excerpt}\n    | {}{}", " ".repeat(pad), "^".repeat(width.clamp(1, 60) as usize));
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

/// The part of a line around a 0-based column, and the column in that part.
fn excerpt(line: &str, column: usize) -> (String, usize) {
    let chars = line.chars().count();
    if chars <= EXCERPT_CHARS_MAX {
        return (line.to_owned(), column.min(chars));
    }
    let start = column.saturating_sub(EXCERPT_CHARS_MAX / 2).min(chars - EXCERPT_CHARS_MAX);
    let before = if start > 0 { "…" } else { "" };
    let after = if start + EXCERPT_CHARS_MAX < chars { "…" } else { "" };
    let part: String = line.chars().skip(start).take(EXCERPT_CHARS_MAX).collect();
    (format!("{before}{part}{after}"), column.min(chars) - start + usize::from(start > 0))
}

/// A text of at most [`TEXT_CHARS_MAX`].
fn cut(mut text: String) -> String {
    if let Some((at, _)) = text.char_indices().nth(TEXT_CHARS_MAX) {
        text.truncate(at);
        text.push('…');
    }
    text
}

/// Longest word for which a similar one is looked for, in bytes.
const SUGGESTION_BYTES_MAX: usize = 100;

/// Collects findings; none twice, at most [`FINDINGS_MAX`] of them.
#[derive(Debug, Default)]
pub(crate) struct Sink {
    pub(crate) file: String,
    found: Vec<Diagnostic>,
    /// Hashes of code, place and message of all that were added, kept or not.
    seen: HashSet<u64>,
    /// Ids of the steps around the place that is being read.
    pub(crate) steps: Vec<String>,
}

impl Sink {
    pub(crate) fn new(file: &str) -> Self {
        Self { file: file.to_owned(), ..Self::default() }
    }
    pub(crate) fn add(
        &mut self,
        code: &'static str,
        severity: Severity,
        span: Span,
        path: &str,
        message: impl Into<String>,
        help: Option<String>,
    ) {
        let help = help.or_else(|| remedy(code).map(str::to_owned));
        self.keep(Diagnostic {
            code,
            severity,
            message: message.into(),
            file: self.file.clone(),
            span,
            path: path.to_owned(),
            step: self.steps.last().cloned(),
            help,
            line_text: None,
        });
    }
    /// An error in a file beside the document; `line` is the text of the line it stands in.
    pub(crate) fn error_in(&mut self, file: &str, line: &str, code: &'static str, span: Span, message: String) {
        self.keep(Diagnostic {
            code,
            severity: Severity::Error,
            message,
            file: file.to_owned(),
            span,
            path: String::new(),
            step: None,
            help: remedy(code).map(str::to_owned),
            line_text: Some(line.to_owned()),
        });
    }
    fn keep(&mut self, finding: Diagnostic) {
        let mut hasher = DefaultHasher::new();
        (finding.code, &finding.file, finding.span.line, finding.span.column, &finding.message).hash(&mut hasher);
        if !self.seen.insert(hasher.finish()) {
            return;
        }
        if self.found.len() >= FINDINGS_MAX {
            // What blocks is shown before what does not: a hidden error means that all shown ones are errors.
            let Some(least) = self.found.iter().rposition(|d| d.severity < finding.severity) else { return };
            self.found.remove(least);
        }
        self.found.push(Diagnostic {
            message: cut(finding.message),
            step: finding.step.map(cut),
            help: finding.help.map(cut),
            ..finding
        });
    }
    /// The findings in order of their places, the document's first; a last one says how many are not among them.
    pub(crate) fn finish(self) -> Vec<Diagnostic> {
        let Self { file, mut found, seen, .. } = self;
        found.sort_by(|a, b| (a.file != file, &a.file, a.span, a.code).cmp(&(b.file != file, &b.file, b.span, b.code)));
        let more = seen.len().saturating_sub(found.len());
        if more > 0 {
            found.push(Diagnostic {
                code: "WF210",
                severity: Severity::Info,
                message: format!("{more} more findings are not shown"),
                file,
                span: Span { line: 1, column: 1, end_line: 1, end_column: 2 },
                path: String::new(),
                step: None,
                help: Some("mend the ones above and check again".to_owned()),
                line_text: None,
            });
        }
        found
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
        "WF106" => "see \"The language in one page\" in workflows/README.md",
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
        "WF403" => "repeat a part with `repeat` or `redo`; `call` another workflow",
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
        "WF701" => "for example `implementer: [gemini/gemini-3.8-flash, openrouter/google/gemini-3.8-flash]`",
        "WF801" => "see the arguments of the activity's contract",
        "WF802" => "write `name@3`, `name@latest` or `name@sha256:<64 hex digits>`",
        "WF805" => "write `name@3` to pin a version in the document",
        "WF905" => "give them under `inputs` of the trigger, or give the workflow's inputs defaults",
        _ => return None,
    })
}

/// The candidate that is most like `word`, if one is like it.
pub(crate) fn suggestion<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    // Comparing takes time by length, and a long text is like no name.
    if word.len() > SUGGESTION_BYTES_MAX {
        return None;
    }
    candidates
        .into_iter()
        .map(|c| (strsim::damerau_levenshtein(word, c), c))
        .filter(|(distance, c)| *distance <= 1 + c.len() / 4)
        .min()
        .map(|(_, c)| c)
}
