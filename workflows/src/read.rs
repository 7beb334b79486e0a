//! Reading typed fields from the tree, with a finding for everything that does not fit.

use crate::{
    diagnostic::{Severity, Sink, Span, suggestion},
    document::{Content, Key, Node},
};
use loopwright_engine::definition::{Data, Expr};
use serde_json::Value;

/// A field as it is written, for those who wrote it in another shape.
pub(crate) fn example(name: &str) -> Option<&'static str> {
    Some(match name {
        "call" => "call: { workflow: other@3, with: { idea: x } }",
        "wait" => "wait: { for: 5m }",
        "fail" => "fail: { type: user.no_tests, message: there are no tests }",
        "finish" => "finish: { outputs: { status: done } }",
        "continue-as-new" => "continue-as-new: { with: { cursor: \"${{ steps.read.output.cursor }}\" } }",
        "await" => "await: { signal: user_message, timeout: 7d }",
        "approve" => "approve: { to: [\"role:owner\"], timeout: 7d }",
        "parallel" => "parallel: { branches: { left: […steps], right: […steps] } }",
        "foreach" => "foreach: { in: steps.plan.output.todo, max-items: 20 }",
        "repeat" => "repeat: { max-rounds: 5, until: steps.check.output.passed }",
        "redo" => "redo: { from: code, if: \"!steps.check.output.passed\", max-rounds: 3 }",
        "retry" => "retry: { attempts: 3, delay: 5s }",
        "budget" => "budget: { credits: 500 }",
        "limits" => "limits: { executions: 20000 }",
        "on" => "on: { manual: {} }",
        "to" => "to: [\"role:owner\"]",
        _ => return None,
    })
}

/// What does today what a key of a later version is to do.
fn instead(name: &str) -> Option<&'static str> {
    Some(match name {
        "concurrency" => "move the step into a workflow with this `concurrency` at its top, and `call` that",
        "key" => "tell messages of one name apart by `where`, for example `where: signal.item == item.id`",
        "form" => "ask with an `await` that has this `form`",
        "allow-self" => "leave it out: the owner of the run decides, whoever started it",
        _ => return None,
    })
}

/// A map whose keys must all be known.
pub(crate) struct Fields<'a> {
    pub(crate) node: &'a Node,
    entries: &'a [(Key, Node)],
    /// A key was not known, which may explain what is missing.
    pub(crate) unknown: bool,
}

impl<'a> Fields<'a> {
    /// The node as a map. Keys outside `known` are findings, `x-…` are ignored.
    pub(crate) fn new(node: &'a Node, what: &str, known: &[&str], sink: &mut Sink) -> Option<Self> {
        let Content::Map(entries) = &node.kind else {
            let message = format!("expected a map for {what}, found {}", node.type_name());
            let help = example(what.trim_matches('`')).map(|e| format!("for example `{e}`"));
            sink.add("WF106", Severity::Error, node.span, &node.path, message, help);
            return None;
        };
        let mut unknown = false;
        for (key, _) in entries {
            if known.contains(&key.name.as_str()) || key.name.starts_with("x-") {
                continue;
            }
            unknown = true;
            let message = format!("unknown key `{}` in {what}", key.name);
            match suggestion(&key.name, known.iter().copied()) {
                Some(like) => {
                    sink.error_help("WF102", key.span, &node.path, message, format!("did you mean `{like}`?"))
                }
                None => {
                    sink.error_help("WF102", key.span, &node.path, message, format!("known keys: {}", known.join(", ")))
                }
            }
        }
        Some(Self { node, entries, unknown })
    }
    /// The node as a map of any keys.
    pub(crate) fn open(node: &'a Node) -> Option<Self> {
        let Content::Map(entries) = &node.kind else { return None };
        Some(Self { node, entries, unknown: false })
    }
    pub(crate) fn values(&self) -> impl Iterator<Item = &'a Node> + use<'a> {
        self.entries.iter().filter(|(k, _)| !k.name.starts_with("x-")).map(|(_, v)| v)
    }
    /// Refuses a key that the language keeps for later.
    pub(crate) fn refuse_later(&self, name: &str, sink: &mut Sink) {
        if self.has(name) {
            let message = format!("`{name}` is planned for a later version and not accepted yet");
            let path = format!("{}/{name}", self.node.path);
            let help = instead(name).map(str::to_owned);
            sink.add("WF224", Severity::Error, self.key_span(name), &path, message, help);
        }
    }
    pub(crate) fn get(&self, name: &str) -> Option<&'a Node> {
        self.entries.iter().find(|(k, _)| k.name == name).map(|(_, v)| v)
    }
    pub(crate) fn key_span(&self, name: &str) -> Span {
        self.entries.iter().find(|(k, _)| k.name == name).map_or(self.node.span, |(k, _)| k.span)
    }
    pub(crate) fn has(&self, name: &str) -> bool {
        self.get(name).is_some()
    }
    pub(crate) fn text(&self, name: &str, sink: &mut Sink) -> Option<String> {
        let node = self.get(name)?;
        match node.value() {
            Value::String(text) => Some(text),
            _ => {
                sink.error(
                    "WF106",
                    node.span,
                    &node.path,
                    format!("expected text for `{name}`, found {}", node.type_name()),
                );
                None
            }
        }
    }
    pub(crate) fn boolean(&self, name: &str, default: bool, sink: &mut Sink) -> bool {
        let Some(node) = self.get(name) else { return default };
        match node.value() {
            Value::Bool(b) => b,
            Value::String(word) if ["yes", "no", "on", "off", "y", "n"].contains(&word.to_lowercase().as_str()) => {
                sink.error("WF108", node.span, &node.path, format!("`{word}` is text here; write true or false"));
                default
            }
            _ => {
                sink.error(
                    "WF106",
                    node.span,
                    &node.path,
                    format!("expected true or false for `{name}`, found {}", node.type_name()),
                );
                default
            }
        }
    }
    /// A whole number in a range; a literal, never an expression.
    pub(crate) fn integer(&self, name: &str, range: std::ops::RangeInclusive<u32>, sink: &mut Sink) -> Option<u32> {
        let node = self.get(name)?;
        match node.value().as_u64().and_then(|n| u32::try_from(n).ok()).filter(|n| range.contains(n)) {
            Some(n) => Some(n),
            None => {
                let (low, high) = (range.start(), range.end());
                sink.error("WF422", node.span, &node.path, format!("`{name}` must be a literal in {low}..{high}"));
                None
            }
        }
    }
    pub(crate) fn float(&self, name: &str, range: std::ops::RangeInclusive<f64>, sink: &mut Sink) -> Option<f64> {
        let node = self.get(name)?;
        match node.value().as_f64().filter(|n| range.contains(n)) {
            Some(n) => Some(n),
            None => {
                let (low, high) = (range.start(), range.end());
                sink.error("WF422", node.span, &node.path, format!("`{name}` must be a literal in {low}..{high}"));
                None
            }
        }
    }
    /// A duration in milliseconds.
    pub(crate) fn duration(&self, name: &str, sink: &mut Sink) -> Option<u64> {
        self.get(name).and_then(|node| duration(node, sink))
    }
    /// One of a few words.
    pub(crate) fn word<T: Copy>(&self, name: &str, words: &[(&str, T)], default: T, sink: &mut Sink) -> T {
        let Some(node) = self.get(name) else { return default };
        let text = node.value().as_str().map(str::to_owned).unwrap_or_default();
        if let Some((_, value)) = words.iter().find(|(w, _)| *w == text) {
            return *value;
        }
        let list: Vec<&str> = words.iter().map(|(w, _)| *w).collect();
        let message = format!("`{name}` must be one of {}", list.join(", "));
        match suggestion(&text, list.iter().copied()) {
            Some(like) => sink.error_help("WF106", node.span, &node.path, message, format!("did you mean `{like}`?")),
            None => sink.error("WF106", node.span, &node.path, message),
        }
        default
    }
    pub(crate) fn texts(&self, name: &str, sink: &mut Sink) -> Vec<(String, Span)> {
        let Some(node) = self.get(name) else { return Vec::new() };
        let Content::List(items) = &node.kind else {
            let message = format!("expected a list for `{name}`, found {}", node.type_name());
            let help = example(name).map(|e| format!("for example `{e}`"));
            sink.add("WF106", Severity::Error, node.span, &node.path, message, help);
            return Vec::new();
        };
        items
            .iter()
            .filter_map(|item| match item.value() {
                Value::String(text) => Some((text, item.span)),
                _ => {
                    sink.error("WF106", item.span, &item.path, format!("expected text, found {}", item.type_name()));
                    None
                }
            })
            .collect()
    }
}

/// Parses `1h30m`, `250ms`, `7d`.
pub(crate) fn duration(node: &Node, sink: &mut Sink) -> Option<u64> {
    let text = match node.value() {
        Value::String(text) => text,
        other => other.to_string(),
    };
    let parsed = parse_duration(&text);
    if parsed.is_none() {
        let (span, path) = (node.span, node.path.clone());
        let message = format!("duration `{text}` is not valid");
        let help =
            iso_duration(&text).map_or_else(|| "write for example `1h30m`".to_owned(), |fix| format!("write `{fix}`"));
        sink.error_help("WF107", span, &path, message, help);
    }
    parsed
}

/// `1h30m`, `250ms`, `7d` in milliseconds.
#[must_use]
pub fn parse_duration(text: &str) -> Option<u64> {
    let mut rest = text;
    let mut total = 0u64;
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let n: u64 = rest.get(..digits)?.parse().ok()?;
        rest = &rest[digits..];
        let (unit, factor) = [("ms", 1), ("s", 1_000), ("m", 60_000), ("h", 3_600_000), ("d", 86_400_000)]
            .into_iter()
            .find(|(unit, _)| rest.starts_with(unit))?;
        total = total.checked_add(n.checked_mul(factor)?)?;
        rest = &rest[unit.len()..];
    }
    Some(total)
}

/// `PT1H30M` and `90 min` as we write them.
fn iso_duration(text: &str) -> Option<String> {
    let lower = text.to_lowercase().replace(' ', "");
    let fixed = lower
        .strip_prefix("pt")
        .unwrap_or(&lower)
        .replace("minutes", "m")
        .replace("min", "m")
        .replace("hours", "h")
        .replace("sec", "s");
    parse_duration(&fixed).map(|_| fixed)
}

/// An expression and where it stands in the source.
pub(crate) struct Site {
    pub(crate) expr: Expr,
    pub(crate) span: Span,
    pub(crate) path: String,
    /// Columns from the span's start to the expression, where it stands in one line as written.
    pub(crate) offset: Option<u32>,
}

/// A bare expression field.
pub(crate) fn bare(node: &Node, sink: &mut Sink) -> Option<Site> {
    let text = match node.value() {
        Value::String(text) => text,
        Value::Bool(b) => b.to_string(),
        _ => {
            sink.error("WF106", node.span, &node.path, format!("expected an expression, found {}", node.type_name()));
            return None;
        }
    };
    if text.contains("${{") || text.contains("{{") {
        sink.error_help(
            "WF112",
            node.span,
            &node.path,
            "delimiters are not allowed in a condition",
            "write the bare expression",
        );
        return None;
    }
    let offset = match &node.kind {
        Content::Scalar { block: true, .. } | Content::List(_) | Content::Map(_) => None,
        Content::Scalar { plain, .. } => Some(u32::from(!plain)),
    };
    Some(Site { expr: Expr(text.trim().to_owned()), span: node.span, path: node.path.clone(), offset })
}

/// A data field: any YAML value; text may contain `${{ }}`. Expressions found are appended to `sites`.
pub(crate) fn data(node: &Node, sites: &mut Vec<Site>, sink: &mut Sink) -> Data {
    match &node.kind {
        Content::List(items) => {
            let items: Vec<Data> = items.iter().map(|item| data(item, sites, sink)).collect();
            if items.iter().all(|d| matches!(d, Data::Literal(_))) {
                Data::Literal(node.value())
            } else {
                Data::List(items)
            }
        }
        Content::Map(entries) => {
            let map: std::collections::BTreeMap<String, Data> =
                entries.iter().map(|(k, v)| (k.name.clone(), data(v, sites, sink))).collect();
            if map.values().all(|d| matches!(d, Data::Literal(_))) {
                Data::Literal(node.value())
            } else {
                Data::Map(map)
            }
        }
        Content::Scalar { text, .. } => {
            if !text.contains("${{") {
                if text.contains("{{") {
                    sink.error_help(
                        "WF110",
                        node.span,
                        &node.path,
                        "template braces in a data field",
                        "use `${{ ... }}`",
                    );
                }
                return Data::Literal(node.value());
            }
            scalar_data(text, node, sites, sink)
        }
    }
}

fn scalar_data(text: &str, node: &Node, sites: &mut Vec<Site>, sink: &mut Sink) -> Data {
    let mut parts: Vec<Data> = Vec::new();
    let mut rest = text;
    let mut literal = String::new();
    loop {
        let Some(at) = rest.find("${{") else {
            literal.push_str(rest);
            break;
        };
        // `$${{` is the escape.
        if at > 0 && rest.as_bytes()[at - 1] == b'$' {
            literal.push_str(&rest[..at - 1]);
            literal.push_str("${{");
            rest = &rest[at + 3..];
            continue;
        }
        let Some(end) = expression_end(&rest[at + 3..]) else {
            sink.error_help(
                "WF103",
                node.span,
                &node.path,
                "the expression has no `}}`",
                "quote the value: YAML cuts it at `: ` and ` #`",
            );
            return Data::Literal(Value::Null);
        };
        literal.push_str(&rest[..at]);
        if !literal.is_empty() {
            parts.push(Data::Literal(Value::String(std::mem::take(&mut literal))));
        }
        let expr = Expr(rest[at + 3..at + 3 + end].trim().to_owned());
        sites.push(Site { expr: expr.clone(), span: node.span, path: node.path.clone(), offset: None });
        parts.push(Data::Expr(expr));
        rest = &rest[at + 3 + end + 2..];
    }
    if !literal.is_empty() {
        parts.push(Data::Literal(Value::String(literal)));
    }
    match parts.len() {
        0 => Data::Literal(Value::String(String::new())),
        1 => parts.remove(0),
        _ => Data::Concat(parts),
    }
}

/// Where `}}` ends the expression: outside of texts and of braces that the expression itself opened.
fn expression_end(text: &str) -> Option<usize> {
    let (mut depth, mut quote) = (0usize, None);
    let bytes = text.as_bytes();
    let mut i = 0;
    while i < bytes.len() {
        match (quote, bytes[i]) {
            (Some(_), b'\\') => i += 1,
            (Some(q), c) if c == q => quote = None,
            (Some(_), _) => {}
            (None, c @ (b'"' | b'\'')) => quote = Some(c),
            (None, b'{') => depth += 1,
            (None, b'}') if depth > 0 => depth -= 1,
            (None, b'}') if bytes.get(i + 1) == Some(&b'}') => return Some(i),
            (None, _) => {}
        }
        i += 1;
    }
    None
}
