//! YAML text to a tree in which every key and value knows its place. Only the structure: what the values mean is
//! [`crate::read`]'s business. The parser behind it does not recurse, and its events are bounded here.

use crate::diagnostic::{Sink, Span};
use granit_parser::{Event, Parser, ScalarStyle};
use serde_json::Value;
use std::collections::HashMap;

/// Largest document, in bytes.
pub const BYTES_MAX: usize = 512 << 10;
/// Most nodes after aliases are resolved.
const NODES_MAX: usize = 50_000;
/// Deepest nesting of YAML collections.
const DEPTH_MAX: usize = 64;
/// Longest JSON pointer of a value, in bytes: every value holds its own, so long names would be stored many times.
const PATH_BYTES_MAX: usize = 2_048;

/// A value with its place.
#[derive(Clone, Debug)]
pub(crate) struct Node {
    pub(crate) kind: Content,
    pub(crate) span: Span,
    pub(crate) path: String,
}

#[derive(Clone, Debug)]
pub(crate) enum Content {
    Scalar { text: String, plain: bool, block: bool },
    List(Vec<Node>),
    Map(Vec<(Key, Node)>),
}

#[derive(Clone, Debug)]
pub(crate) struct Key {
    pub(crate) name: String,
    pub(crate) span: Span,
}

impl Node {
    /// The JSON value, by the YAML 1.2 core schema: `true`, `false`, `null`, numbers; everything else is text.
    pub(crate) fn value(&self) -> Value {
        match &self.kind {
            Content::Scalar { text, plain: false, .. } => Value::String(text.clone()),
            Content::Scalar { text, .. } => plain_value(text),
            Content::List(items) => Value::Array(items.iter().map(Node::value).collect()),
            Content::Map(entries) => Value::Object(entries.iter().map(|(k, v)| (k.name.clone(), v.value())).collect()),
        }
    }
    /// The value at a JSON pointer from here.
    pub(crate) fn at(&self, pointer: &str) -> Option<&Self> {
        pointer.split('/').skip(1).try_fold(self, |node, token| match &node.kind {
            Content::Map(entries) => {
                let name = token.replace("~1", "/").replace("~0", "~");
                entries.iter().find(|(k, _)| k.name == name).map(|(_, v)| v)
            }
            Content::List(items) => items.get(token.parse::<usize>().ok()?),
            Content::Scalar { .. } => None,
        })
    }
    pub(crate) fn type_name(&self) -> &'static str {
        match self.value() {
            Value::Null => "nothing",
            Value::Bool(_) => "true/false",
            Value::Number(_) => "a number",
            Value::String(_) => "text",
            Value::Array(_) => "a list",
            Value::Object(_) => "a map",
        }
    }
}

fn plain_value(text: &str) -> Value {
    match text {
        "" | "~" | "null" | "Null" | "NULL" => return Value::Null,
        "true" | "True" | "TRUE" => return Value::Bool(true),
        "false" | "False" | "FALSE" => return Value::Bool(false),
        _ => {}
    }
    let digits = text.strip_prefix(['-', '+']).unwrap_or(text);
    // `017` and `1_000` stay text: other readers disagree about them.
    let leading_zero = digits.len() > 1 && digits.starts_with('0') && digits.as_bytes()[1].is_ascii_digit();
    if digits.starts_with(|c: char| c.is_ascii_digit()) && !leading_zero {
        if let Ok(n) = text.parse::<i64>() {
            return n.into();
        }
        if let Some(n) = text.parse::<f64>().ok().and_then(serde_json::Number::from_f64) {
            return Value::Number(n);
        }
    }
    Value::String(text.to_owned())
}

enum Frame {
    List(Vec<Node>),
    /// Entries, the key whose value comes next, where each name stands.
    Map(Vec<(Key, Node)>, Option<Key>, HashMap<String, Span>),
}

/// Parses a document. `None` after an error: one mistake of syntax is one finding.
pub(crate) fn parse(source: &str, sink: &mut Sink) -> Option<Node> {
    let top = Span { line: 1, column: 1, end_line: 1, end_column: 2 };
    if source.len() > BYTES_MAX {
        sink.error("WF210", top, "", format!("the document is {} bytes; the limit is {BYTES_MAX}", source.len()));
        return None;
    }
    let mut stack: Vec<(Frame, Span, String, usize)> = Vec::new();
    let mut anchors: HashMap<usize, Node> = HashMap::new();
    let (mut root, mut nodes, mut documents) = (None, 0usize, 0usize);
    for event in Parser::new_from_str(source) {
        let (event, span) = match event {
            Ok(pair) => pair,
            Err(error) => {
                let mark = error.marker();
                let at = point(mark.line(), mark.col());
                let text = error.to_string();
                let (code, help) = if text.contains("mapping values are not allowed") {
                    ("WF103", Some("quote the value: it contains `: `, which YAML reads as a key".to_owned()))
                } else if text.contains('\t') || text.to_lowercase().contains("tab") {
                    ("WF105", Some("indent with spaces".to_owned()))
                } else {
                    ("WF100", None)
                };
                sink.add(code, crate::Severity::Error, at, "", format!("YAML: {text}"), help);
                return None;
            }
        };
        let at = Span {
            line: number(span.start.line()),
            column: number(span.start.col() + 1),
            end_line: number(span.end.line()),
            end_column: number(span.end.col() + 1),
        };
        let path = match stack.last() {
            None => String::new(),
            Some((Frame::List(items), _, path, _)) => format!("{path}/{}", items.len()),
            Some((Frame::Map(_, Some(key), _), _, path, _)) => {
                format!("{path}/{}", key.name.replace('~', "~0").replace('/', "~1"))
            }
            Some((Frame::Map(_, None, _), _, path, _)) => path.clone(),
        };
        nodes += 1;
        if nodes > NODES_MAX || stack.len() > DEPTH_MAX {
            sink.error("WF210", at, &path, format!("more than {NODES_MAX} nodes or deeper than {DEPTH_MAX}"));
            return None;
        }
        if path.len() > PATH_BYTES_MAX {
            let message = format!("the names around this value are longer than {PATH_BYTES_MAX} bytes together");
            sink.error_help("WF210", at, "", message, "shorten the keys");
            return None;
        }
        let done = match event {
            Event::DocumentStart(..) => {
                documents += 1;
                if documents > 1 {
                    sink.error("WF105", at, "", "a file holds one document");
                    return None;
                }
                None
            }
            Event::Scalar(text, style, anchor, tag) => {
                if tag.is_some() {
                    sink.error_help(
                        "WF104",
                        at_tag(source, at),
                        &path,
                        "YAML tags are not part of this language",
                        "quote an expression that starts with `!`",
                    );
                    return None;
                }
                let block = matches!(style, ScalarStyle::Literal | ScalarStyle::Folded);
                let kind = Content::Scalar { text: text.into_owned(), plain: style == ScalarStyle::Plain, block };
                Some((Node { kind, span: at, path }, anchor))
            }
            Event::SequenceStart(_, anchor, tag) => {
                if tag.is_some() {
                    sink.error("WF105", at, &path, "YAML tags are not part of this language");
                    return None;
                }
                stack.push((Frame::List(Vec::new()), at, path, anchor));
                None
            }
            Event::MappingStart(_, anchor, tag) => {
                if tag.is_some() {
                    sink.error("WF105", at, &path, "YAML tags are not part of this language");
                    return None;
                }
                stack.push((Frame::Map(Vec::new(), None, HashMap::new()), at, path, anchor));
                None
            }
            Event::SequenceEnd | Event::MappingEnd => stack.pop().map(|(frame, start, path, anchor)| {
                let kind = match frame {
                    Frame::List(items) => Content::List(items),
                    Frame::Map(entries, ..) => Content::Map(entries),
                };
                (Node { kind, span: start, path }, anchor)
            }),
            Event::Alias(id) => match anchors.get(&id) {
                Some(node) => {
                    nodes += size(node);
                    Some((Node { span: at, path, ..node.clone() }, 0))
                }
                None => {
                    sink.error("WF100", at, &path, "the alias names an anchor that is not complete yet");
                    return None;
                }
            },
            _ => None,
        };
        let Some((node, anchor)) = done else { continue };
        if anchor != 0 {
            anchors.insert(anchor, node.clone());
        }
        match stack.last_mut() {
            None => root = Some(node),
            Some((Frame::List(items), ..)) => items.push(node),
            Some((Frame::Map(entries, pending, names), ..)) => match pending.take() {
                Some(key) => entries.push((key, node)),
                None => {
                    let Content::Scalar { text, .. } = node.kind else {
                        sink.error("WF100", node.span, &node.path, "a key must be text");
                        return None;
                    };
                    if text == "<<" {
                        sink.error("WF105", node.span, &node.path, "merge keys are not allowed");
                        return None;
                    }
                    let first = *names.entry(text.clone()).or_insert(node.span);
                    if first != node.span {
                        let (line, column) = (first.line, first.column);
                        sink.error(
                            "WF101",
                            node.span,
                            &node.path,
                            format!("duplicate key `{text}`, first at {line}:{column}"),
                        );
                    }
                    *pending = Some(Key { name: text, span: node.span });
                }
            },
        }
    }
    if root.is_none() {
        sink.error("WF100", top, "", "the document is empty");
    }
    root
}

/// Where the tag stands: the parser's place is behind it, where the value would be.
fn at_tag(source: &str, after: Span) -> Span {
    let line = source.lines().nth(after.line.saturating_sub(1) as usize).unwrap_or_default();
    let before: Vec<char> = line.chars().take(after.column.saturating_sub(1) as usize).collect();
    match before.iter().rposition(|c| *c == '!') {
        Some(at) => Span { column: number(at + 1), ..after },
        None => after,
    }
}

fn size(node: &Node) -> usize {
    1 + match &node.kind {
        Content::Scalar { .. } => 0,
        Content::List(items) => items.iter().map(size).sum(),
        Content::Map(entries) => entries.iter().map(|(_, v)| 1 + size(v)).sum(),
    }
}

fn number(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

fn point(line: usize, col: usize) -> Span {
    Span { line: number(line), column: number(col + 1), end_line: number(line), end_column: number(col + 2) }
}
