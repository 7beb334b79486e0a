//! Definitions in one file's text. Depends on nothing but the text and its language.

use super::lang::Lang;
use serde::{Deserialize, Serialize};
use std::{collections::HashMap, ops::ControlFlow, time::Duration};
use streaming_iterator::StreamingIterator;
use tree_sitter::{Node, ParseOptions, Parser, Point, QueryCursor, QueryCursorOptions, Range, Tree};

/// Longest work of a grammar on one file, in processor time of its thread, so that what is found does not depend on what
/// else the machine does. A megabyte takes about a tenth of a second; more is a hang.
const PARSE_TIME: Duration = Duration::from_secs(5);
/// Definitions of one file; data files have more keys than anyone looks up.
const SYMBOLS_MAX: usize = 5000;
/// Bytes of a name; what is longer is no name.
const NAME_BYTES_MAX: usize = 200;
/// Bytes of a signature, for maps and answers.
const SIGNATURE_BYTES_MAX: usize = 240;
/// Lines of a definition above its body that still count as its head.
const HEAD_LINES_MAX: u32 = 8;
/// How often bodies of macros are parsed again: a macro in a macro in a macro.
const REPARSES_MAX: usize = 3;
/// Deepest indentation of a line, in characters, and most block marks in a line of YAML, that a grammar gets to see. The
/// scanners of YAML (0.7, at 254 levels) and Python (0.25, at about 500) write past their buffer of 1024 bytes beyond,
/// which ends the process.
const INDENT_MAX: usize = 200;
const YAML_MARKS_MAX: usize = 100;
/// Candidates of a query at one time; a file that needs more loses some matches, not its time.
const MATCHES_MAX: u32 = 4096;
/// Names of a file that count as uses of definitions elsewhere.
const NAMES_MAX: usize = 4000;
/// Shortest name that counts as a use, in bytes: shorter ones mean too many things.
pub(super) const USE_BYTES_MIN: usize = 4;

/// A definition in a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Def {
    pub(super) name: String,
    pub(super) kind: String,
    /// 1-based, inclusive.
    pub(super) start: u32,
    pub(super) end: u32,
    /// The last line of its signature.
    pub(super) head_end: u32,
    pub(super) signature: String,
    pub(super) parent: Option<String>,
    /// The definition around this one, by its place in the list.
    pub(super) outer: Option<u32>,
}

impl Def {
    pub(super) fn is_function(&self) -> bool {
        matches!(self.kind.as_str(), "function" | "method" | "constructor" | "macro")
    }
    /// Holds other definitions, or is a piece of text with a name.
    pub(super) fn is_container(&self) -> bool {
        matches!(
            self.kind.as_str(),
            "struct"
                | "class"
                | "enum"
                | "union"
                | "trait"
                | "interface"
                | "record"
                | "impl"
                | "module"
                | "namespace"
                | "annotation"
                | "section"
                | "type"
                | "concept"
        )
    }
}

/// What a file gives.
#[derive(Debug, Default)]
pub(super) struct Extracted {
    /// In order of their places.
    pub(super) defs: Vec<Def>,
    /// Why the grammar was not asked or did not end; `defs` is empty then.
    pub(super) unread: Option<&'static str>,
}

struct Found {
    name: String,
    kind: &'static str,
    bytes: std::ops::Range<usize>,
    start: u32,
    end: u32,
    head_end: u32,
    signature: String,
    parent: Option<String>,
    pattern: usize,
}

/// The definitions of a text.
///
/// # Units
/// At most [`PARSE_TIME`]; at most [`SYMBOLS_MAX`] definitions.
pub(super) fn extract(lang: Lang, text: &str) -> Extracted {
    extract_until(lang, text, thread_time() + PARSE_TIME)
}

fn extract_until(lang: Lang, text: &str, deadline: Duration) -> Extracted {
    let timed_out = Extracted { defs: Vec::new(), unread: Some("the grammar took too long; full text only") };
    if too_deep(text, lang == Lang::Yaml) {
        return Extracted { defs: Vec::new(), unread: Some("nested too deeply for the grammar; full text only") };
    }
    let mut parser = Parser::new();
    if parser.set_language(&lang.grammar().language).is_err() {
        return Extracted::default();
    }
    // By the place of the name: of several patterns that fit one name, the first in the file of queries counts.
    let mut found: HashMap<usize, Found> = HashMap::new();
    let mut ranges = Vec::new();
    for round in 0..=REPARSES_MAX {
        if round > 0 && (ranges.is_empty() || parser.set_included_ranges(&ranges).is_err()) {
            break;
        }
        let Some(tree) = parse(&mut parser, text, deadline) else { return timed_out };
        let Some(again) = collect(lang, text, &tree, round > 0, deadline, &mut found) else { return timed_out };
        ranges = again;
    }
    Extracted { defs: arrange(lang, found.into_values().collect()), unread: None }
}

/// The processor time that this thread has used.
fn thread_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a valid place to write to, and that is all that the call does.
    let known = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) } == 0;
    let whole = |value: i64| u64::try_from(value).unwrap_or(0);
    if known { Duration::new(whole(time.tv_sec), whole(time.tv_nsec).min(999_999_999) as u32) } else { Duration::ZERO }
}

/// Whether a text is nested so deeply that a grammar's scanner may end the process. Ask before any parse of a text that
/// somebody else wrote.
///
/// # Source
/// `serialize` in `scanner.c` of tree-sitter-yaml 0.7 and tree-sitter-python 0.25; six hundred bytes are enough.
#[must_use]
pub fn too_deep(text: &str, yaml: bool) -> bool {
    text.lines().any(|line| {
        let marks = || line.split([' ', '\t']).filter(|word| matches!(*word, "-" | "?" | ":")).count();
        let indent = line.len() - line.trim_start().len();
        indent > INDENT_MAX || (yaml && indent + marks() > YAML_MARKS_MAX)
    })
}

fn parse(parser: &mut Parser, text: &str, deadline: Duration) -> Option<Tree> {
    let bytes = text.as_bytes();
    let mut progress = |_: &tree_sitter::ParseState| {
        if thread_time() > deadline { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    parser.parse_with_options(
        &mut |at, _| bytes.get(at..).unwrap_or_default(),
        None,
        Some(ParseOptions::new().progress_callback(&mut progress)),
    )
}

/// Runs the query; gives the ranges to parse once more, or `None` when the time is up.
fn collect(
    lang: Lang,
    text: &str,
    tree: &Tree,
    sound_only: bool,
    deadline: Duration,
    found: &mut HashMap<usize, Found>,
) -> Option<Vec<Range>> {
    let query = &lang.grammar().query;
    let names = query.capture_names();
    let mut late = false;
    let mut progress = |_: &tree_sitter::QueryCursorState| {
        late = thread_time() > deadline;
        if late { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let mut cursor = QueryCursor::new();
    cursor.set_match_limit(MATCHES_MAX);
    let options = QueryCursorOptions::new().progress_callback(&mut progress);
    let mut matches = cursor.matches_with_options(query, tree.root_node(), text.as_bytes(), options);
    let mut again: Vec<Range> = Vec::new();
    while let Some(one) = matches.next() {
        if found.len() >= SYMBOLS_MAX {
            break;
        }
        let (mut name, mut definition, mut body, mut parent) = (None, None, None, None);
        for capture in one.captures() {
            let node = capture.node;
            match names[capture.index as usize] {
                "name" => name = Some(node),
                "declarator" => name = declared(node),
                "body" => body = Some(node),
                "parent" => parent = text.get(node.byte_range()).map(str::to_owned),
                "reparse" => again.extend(inside(node, text)),
                other => {
                    if let Some(kind) = other.strip_prefix("definition.") {
                        definition = Some((node, kind));
                    }
                }
            }
        }
        let (Some(name), Some((node, kind))) = (name, definition) else { continue };
        if sound_only && node.has_error() {
            continue;
        }
        let pattern = one.pattern_index;
        let at = name.start_byte();
        if found.get(&at).is_some_and(|known| known.pattern <= pattern) {
            continue;
        }
        if let Some(def) = define(text, name, node, kind, body, parent, pattern) {
            found.insert(at, def);
        }
    }
    drop(matches);
    again.sort_by_key(|range| range.start_byte);
    again.dedup_by(|next, kept| next.start_byte < kept.end_byte);
    (!late).then_some(again)
}

fn define(
    text: &str,
    name: Node<'_>,
    node: Node<'_>,
    kind: &str,
    body: Option<Node<'_>>,
    parent: Option<String>,
    pattern: usize,
) -> Option<Found> {
    let raw = text.get(name.byte_range())?;
    let raw = raw.trim().trim_matches(|c| matches!(c, '"' | '\''));
    // `Scope::name` of C++: the scope is the parent.
    let (scope, raw) = match raw.rsplit_once("::") {
        Some((scope, last)) if kind != "key" && kind != "section" => (Some(scope.to_owned()), last),
        _ => (None, raw),
    };
    if raw.is_empty() || raw.len() > NAME_BYTES_MAX || raw.contains('\n') {
        return None;
    }
    // A heading's section is its parent, so that it ends where the next of its rank begins.
    let body = body.filter(|body| *body != node).or_else(|| node.child_by_field_name("body"));
    let start = line(node.start_position());
    let end = last_line(node);
    let from = line_start(text, node.start_byte());
    let until = body.map_or(node.end_byte(), |body| body.start_byte());
    let whole = text.get(from..until).unwrap_or_default();
    let one_line = body.is_none() && !matches!(kind, "function" | "method" | "prototype" | "macro");
    let signature = squeeze(if one_line { whole.lines().next().unwrap_or_default() } else { whole });
    let head_end = body
        .map_or(start, |body| line(body.start_position()))
        .clamp(start, (start + HEAD_LINES_MAX).min(end.max(start)));
    // The kinds are those of our queries: a closed list of short words.
    let kind = KINDS.iter().find(|known| **known == kind).copied().unwrap_or("definition");
    Some(Found {
        name: raw.to_owned(),
        kind,
        bytes: node.byte_range(),
        start,
        end: end.max(start),
        head_end,
        signature,
        parent: parent.or(scope),
        pattern,
    })
}

/// Every kind that a query may give.
const KINDS: &[&str] = &[
    "annotation",
    "class",
    "concept",
    "const",
    "constructor",
    "enum",
    "field",
    "function",
    "id",
    "impl",
    "interface",
    "key",
    "keyframes",
    "macro",
    "method",
    "module",
    "namespace",
    "prototype",
    "record",
    "section",
    "static",
    "struct",
    "trait",
    "type",
    "union",
    "variable",
    "variant",
];

/// Puts definitions in order and finds what is around each.
fn arrange(lang: Lang, mut found: Vec<Found>) -> Vec<Def> {
    found.sort_by(|a, b| {
        (a.bytes.start, std::cmp::Reverse(a.bytes.end), &a.name).cmp(&(
            b.bytes.start,
            std::cmp::Reverse(b.bytes.end),
            &b.name,
        ))
    });
    let mut defs: Vec<Def> = Vec::with_capacity(found.len());
    let mut open: Vec<(std::ops::Range<usize>, u32)> = Vec::new();
    for (ord, one) in (0u32..).zip(found) {
        while open.last().is_some_and(|(bytes, _)| bytes.end <= one.bytes.start) {
            open.pop();
        }
        // Two names of one node (`a, b = …`, `.cart .line`) stand side by side.
        let outer = open.iter().rev().find(|(bytes, _)| *bytes != one.bytes).map(|(_, outer)| *outer);
        let around = outer.map(|outer| &defs[outer as usize]);
        let in_type = around.is_some_and(|around| {
            matches!(
                around.kind.as_str(),
                "class" | "struct" | "impl" | "trait" | "interface" | "enum" | "union" | "record"
            )
        });
        let scoped = lang == Lang::Cpp && one.parent.is_some();
        let kind = if one.kind == "function" && (in_type || scoped) { "method" } else { one.kind };
        open.push((one.bytes.clone(), ord));
        defs.push(Def {
            kind: kind.to_owned(),
            start: one.start,
            end: one.end,
            head_end: one.head_end,
            signature: one.signature,
            parent: one.parent.or_else(|| around.map(|around| around.name.clone())),
            outer,
            name: one.name,
        });
    }
    defs
}

/// The name inside a C declarator: through pointers, references, parentheses and parameters.
fn declared(node: Node<'_>) -> Option<Node<'_>> {
    let mut node = node;
    // Declarators nest as deep as the source likes; a name lies a few levels down.
    for _ in 0..16 {
        let inner = node.child_by_field_name("declarator").or_else(|| match node.kind() {
            "reference_declarator" | "parenthesized_declarator" | "attributed_declarator" => {
                let count = u32::try_from(node.named_child_count()).unwrap_or(u32::MAX);
                node.named_child(count.checked_sub(1)?)
            }
            _ => None,
        });
        match inner {
            Some(inner) => node = inner,
            None => break,
        }
    }
    matches!(
        node.kind(),
        "identifier"
            | "field_identifier"
            | "type_identifier"
            | "qualified_identifier"
            | "destructor_name"
            | "operator_name"
            | "operator_cast"
    )
    .then_some(node)
}

/// What stands between the braces of a token tree.
fn inside(node: Node<'_>, text: &str) -> Option<Range> {
    let bytes = node.byte_range();
    let tree = text.get(bytes.clone())?;
    if !(tree.len() > 2 && tree.starts_with('{') && tree.ends_with('}')) {
        return None;
    }
    let (start, end) = (node.start_position(), node.end_position());
    Some(Range {
        start_byte: bytes.start + 1,
        end_byte: bytes.end - 1,
        start_point: Point { row: start.row, column: start.column + 1 },
        end_point: Point { row: end.row, column: end.column.checked_sub(1)? },
    })
}

/// Where the line of a definition begins, if only words stand before it: `export const`, `public static`.
fn line_start(text: &str, at: usize) -> usize {
    let Some(above) = text.get(..at) else { return at };
    let start = above.rfind('\n').map_or(0, |newline| newline + 1);
    let before = &above[start..];
    let words = before.len() <= 60 && before.chars().all(|c| c.is_ascii_alphanumeric() || c == ' ' || c == '\t');
    if words { start } else { at }
}

fn line(point: Point) -> u32 {
    u32::try_from(point.row + 1).unwrap_or(u32::MAX)
}

fn last_line(node: Node<'_>) -> u32 {
    let end = node.end_position();
    // A node that ends where a line begins has nothing of that line.
    if end.column == 0 && end.row > node.start_position().row { line(end) - 1 } else { line(end) }
}

/// One line without double spaces, at most [`SIGNATURE_BYTES_MAX`].
fn squeeze(text: &str) -> String {
    let mut out = String::new();
    for word in text.split_whitespace() {
        if out.len() + word.len() + 1 > SIGNATURE_BYTES_MAX {
            out.push_str(" …");
            break;
        }
        if !out.is_empty() {
            out.push(' ');
        }
        out.push_str(word);
    }
    let kept = out.trim_end_matches([' ', '{']).len();
    out.truncate(kept);
    out
}

/// Marks of the names that a text uses, each once, in order: [`mark`] of every word long enough.
pub(super) fn uses(text: &str) -> Vec<u32> {
    let mut marks: Vec<u32> = text
        .split(|c| !super::tokenize::in_word(c))
        .filter(|word| {
            (USE_BYTES_MIN..=NAME_BYTES_MAX).contains(&word.len()) && !word.starts_with(|c: char| c.is_ascii_digit())
        })
        .map(mark)
        .collect();
    marks.sort_unstable();
    marks.dedup();
    marks.truncate(NAMES_MAX);
    marks
}

/// A name as a number that is the same on every machine and in every release: FNV-1a, 32 bits.
///
/// Two names that share one only add up their uses, which moves an entry of a map.
pub(super) fn mark(name: &str) -> u32 {
    name.bytes().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

#[cfg(test)]
#[path = "extract_tests.rs"]
mod tests;
