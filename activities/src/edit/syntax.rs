//! The syntax gate: a file that parsed before, or is new, must parse after an edit.
//!
//! It only says no to what a grammar rejects; whether the program is right is the checks' business. A file in a
//! language without a grammar, or one that a grammar cannot read in time, passes.

use std::{
    ops::ControlFlow,
    time::{Duration, Instant},
};
use tree_sitter::{Language, Node, ParseOptions, Parser};

/// Longest parse of one file. A megabyte takes about a tenth of a second; more is a hang.
const PARSE_TIME: Duration = Duration::from_secs(2);
/// Characters of the offending text that are quoted.
const QUOTE_CHARS_MAX: usize = 40;

/// How far a grammar's refusal can be trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trust {
    /// What it rejects, the language rejects.
    Exact,
    /// Preprocessors, templates or shells let valid files look broken.
    Rough,
}

/// A language that has a gate.
#[derive(Clone)]
pub struct Grammar {
    pub name: &'static str,
    pub trust: Trust,
    language: Language,
}

/// The grammar for a path, by its name.
#[must_use]
pub fn grammar(path: &str) -> Option<Grammar> {
    let name = path.rsplit('/').next().unwrap_or(path).to_ascii_lowercase();
    let extension = name.rsplit_once('.').map(|(_, e)| e)?;
    let exact = |name, language| Some(Grammar { name, trust: Trust::Exact, language });
    let rough = |name, language| Some(Grammar { name, trust: Trust::Rough, language });
    match extension {
        "rs" => exact("Rust", tree_sitter_rust::LANGUAGE.into()),
        "py" | "pyi" => exact("Python", tree_sitter_python::LANGUAGE.into()),
        "js" | "mjs" | "cjs" | "jsx" => exact("JavaScript", tree_sitter_javascript::LANGUAGE.into()),
        "ts" | "mts" | "cts" => exact("TypeScript", tree_sitter_typescript::LANGUAGE_TYPESCRIPT.into()),
        "tsx" => exact("TSX", tree_sitter_typescript::LANGUAGE_TSX.into()),
        "go" => exact("Go", tree_sitter_go::LANGUAGE.into()),
        "java" => exact("Java", tree_sitter_java::LANGUAGE.into()),
        "rb" => exact("Ruby", tree_sitter_ruby::LANGUAGE.into()),
        "php" => exact("PHP", tree_sitter_php::LANGUAGE_PHP.into()),
        "css" => exact("CSS", tree_sitter_css::LANGUAGE.into()),
        // Configuration files that are read as JSON with comments and trailing commas.
        "json" if name.starts_with("tsconfig") || path.contains(".vscode/") => {
            rough("JSON", tree_sitter_json::LANGUAGE.into())
        }
        "json" => exact("JSON", tree_sitter_json::LANGUAGE.into()),
        "yaml" | "yml" => rough("YAML", tree_sitter_yaml::LANGUAGE.into()),
        "md" | "markdown" => rough("Markdown", tree_sitter_md::LANGUAGE.into()),
        "c" | "h" => rough("C", tree_sitter_c::LANGUAGE.into()),
        "cc" | "cpp" | "cxx" | "hpp" | "hh" | "hxx" => rough("C++", tree_sitter_cpp::LANGUAGE.into()),
        "sh" | "bash" => rough("Bash", tree_sitter_bash::LANGUAGE.into()),
        "html" | "htm" => rough("HTML", tree_sitter_html::LANGUAGE.into()),
        _ => None,
    }
}

/// The first place that a grammar rejects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// 1-based.
    pub line: usize,
    /// `unexpected "…"` or `missing "…"`.
    pub what: String,
}

/// The first syntax error of `text`, if it has one.
///
/// # Units
/// At most two seconds; a text that takes longer has no verdict and passes.
#[must_use]
pub fn fault(grammar: &Grammar, text: &str) -> Option<Fault> {
    // A scanner that meets more nesting than it holds ends the whole process.
    if crate::index::too_deep(text, grammar.name == "YAML") {
        return None;
    }
    let mut parser = Parser::new();
    parser.set_language(&grammar.language).ok()?;
    let bytes = text.as_bytes();
    let deadline = Instant::now() + PARSE_TIME;
    let mut progress = |_: &tree_sitter::ParseState| {
        if Instant::now() > deadline { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let tree = parser.parse_with_options(
        &mut |at, _| bytes.get(at..).unwrap_or_default(),
        None,
        Some(ParseOptions::new().progress_callback(&mut progress)),
    )?;
    let root = tree.root_node();
    if !root.has_error() {
        return None;
    }
    let node = first_fault(root);
    let line = node.start_position().row + 1;
    let what = if node.is_missing() {
        format!("missing {:?}", node.kind())
    } else {
        let quote: String = text
            .get(node.byte_range())
            .unwrap_or_default()
            .trim_start()
            .chars()
            .take_while(|c| *c != '\n')
            .take(QUOTE_CHARS_MAX)
            .collect();
        if quote.is_empty() { "something is incomplete".to_owned() } else { format!("unexpected {quote:?}") }
    };
    Some(Fault { line, what })
}

/// Descends to the first node that is itself an error or missing.
fn first_fault(root: Node<'_>) -> Node<'_> {
    let mut node = root;
    loop {
        if node.is_missing() {
            return node;
        }
        let mut cursor = node.walk();
        let next = node.children(&mut cursor).find(|child| child.has_error() || child.is_missing());
        match next {
            Some(child) => node = child,
            None => return node,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nesting_that_would_end_the_process_is_not_parsed() {
        let yaml = grammar("a.yaml").expect("a grammar");
        assert_eq!(fault(&yaml, &"- ".repeat(300)), None);
    }

    #[test]
    fn every_gated_language_tells_good_from_broken() {
        for (path, good, broken) in [
            ("a.rs", "fn main() { let x = 1; }\n", "fn main() { let x = ; \n"),
            ("a.py", "def f(x):\n    return x\n", "def f(x:\n    return x\n"),
            ("a.js", "const f = (x) => x + 1;\n", "const f = (x => { x + ;\n"),
            ("a.jsx", "const a = <b c={1}>d</b>;\n", "const a = <b c={1}>d</;\n"),
            ("a.ts", "const f = (x: number): number => x;\n", "const f = (x: ): number => {\n"),
            ("a.tsx", "const a = <b c={1 as number}>d</b>;\n", "const a = <b\n"),
            ("a.go", "package a\n\nfunc F() int { return 1 }\n", "package a\n\nfunc F( int { return 1 \n"),
            ("a.java", "class A { int f() { return 1; } }\n", "class A { int f( { return 1; }\n"),
            ("a.c", "int main(void) { return 0; }\n", "int main(void) { return 0; \n"),
            ("a.cpp", "template <class T> T f(T x) { return x; }\n", "template <class T T f(T x) { return x; \n"),
            ("a.rb", "def f(x)\n  x + 1\nend\n", "def f(x\n  x + \n"),
            ("a.php", "<?php\nfunction f($x) { return $x; }\n", "<?php\nfunction f($x { return $x; \n"),
            ("a.sh", "if true; then echo a; fi\n", "if true; then echo a;\n"),
            ("a.html", "<p>a</p>\n", "<p <b></p\n"),
            ("a.css", "a { color: red; }\n", "a { color: red; \n"),
            ("a.json", "{\"a\": [1, 2]}\n", "{\"a\": [1, 2}\n"),
            ("a.yaml", "a:\n  - b\n  - c: d\n", "a: [b, c\nd: }\n"),
        ] {
            let grammar = grammar(path).expect("has a grammar");
            assert_eq!(fault(&grammar, good), None, "{path}");
            assert!(fault(&grammar, broken).is_some(), "{path}");
        }
        assert!(grammar("Makefile").is_none() && grammar("a.unknown").is_none());
    }

    #[test]
    fn the_place_is_named() {
        let grammar = grammar("a.go").expect("has a grammar");
        let found = fault(&grammar, "package a\n\nfunc F() {\n\tx := 1 + ] 2\n}\n").expect("broken");
        assert_eq!((found.line, found.what.as_str()), (4, "unexpected \"]\""));
    }
}
