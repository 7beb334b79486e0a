//! Languages: which a file is in, its grammar and our query for its definitions.

use std::sync::OnceLock;
use tree_sitter::{Language, Query};

/// A language with a grammar; every other file is text only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Lang {
    Rust,
    Python,
    JavaScript,
    TypeScript,
    Tsx,
    Go,
    Java,
    C,
    Cpp,
    Ruby,
    Php,
    Bash,
    Html,
    Css,
    Json,
    Yaml,
    Markdown,
}

pub(super) const ALL: [Lang; 17] = [
    Lang::Rust,
    Lang::Python,
    Lang::JavaScript,
    Lang::TypeScript,
    Lang::Tsx,
    Lang::Go,
    Lang::Java,
    Lang::C,
    Lang::Cpp,
    Lang::Ruby,
    Lang::Php,
    Lang::Bash,
    Lang::Html,
    Lang::Css,
    Lang::Json,
    Lang::Yaml,
    Lang::Markdown,
];

impl Lang {
    /// By the name of the file; a `.h` and a script without a suffix by their text too.
    pub(super) fn of(path: &str, text: &str) -> Option<Self> {
        let name = path.rsplit('/').next().unwrap_or(path).to_ascii_lowercase();
        let Some((_, extension)) = name.rsplit_once('.') else {
            let first = text.lines().next().unwrap_or_default();
            return match first.strip_prefix("#!")? {
                first if first.contains("python") => Some(Self::Python),
                first if first.contains("node") => Some(Self::JavaScript),
                first if first.contains("ruby") => Some(Self::Ruby),
                first if first.ends_with("sh") || first.contains("bash") => Some(Self::Bash),
                _ => None,
            };
        };
        Some(match extension {
            "rs" => Self::Rust,
            "py" | "pyi" => Self::Python,
            "js" | "mjs" | "cjs" | "jsx" => Self::JavaScript,
            "ts" | "mts" | "cts" => Self::TypeScript,
            "tsx" => Self::Tsx,
            "go" => Self::Go,
            "java" => Self::Java,
            "h" if ["class ", "namespace ", "template<", "template <"].iter().any(|word| text.contains(word)) => {
                Self::Cpp
            }
            "c" | "h" => Self::C,
            "cc" | "cpp" | "cxx" | "hpp" | "hh" | "hxx" | "ipp" => Self::Cpp,
            "rb" | "rake" | "gemspec" => Self::Ruby,
            "php" => Self::Php,
            "sh" | "bash" => Self::Bash,
            "html" | "htm" => Self::Html,
            "css" => Self::Css,
            "json" => Self::Json,
            "yaml" | "yml" => Self::Yaml,
            "md" | "markdown" => Self::Markdown,
            _ => return None,
        })
    }

    fn language(self) -> Language {
        match self {
            Self::Rust => tree_sitter_rust::LANGUAGE.into(),
            Self::Python => tree_sitter_python::LANGUAGE.into(),
            Self::JavaScript => tree_sitter_javascript::LANGUAGE.into(),
            Self::TypeScript => tree_sitter_typescript::LANGUAGE_TYPESCRIPT.into(),
            Self::Tsx => tree_sitter_typescript::LANGUAGE_TSX.into(),
            Self::Go => tree_sitter_go::LANGUAGE.into(),
            Self::Java => tree_sitter_java::LANGUAGE.into(),
            Self::C => tree_sitter_c::LANGUAGE.into(),
            Self::Cpp => tree_sitter_cpp::LANGUAGE.into(),
            Self::Ruby => tree_sitter_ruby::LANGUAGE.into(),
            Self::Php => tree_sitter_php::LANGUAGE_PHP.into(),
            Self::Bash => tree_sitter_bash::LANGUAGE.into(),
            Self::Html => tree_sitter_html::LANGUAGE.into(),
            Self::Css => tree_sitter_css::LANGUAGE.into(),
            Self::Json => tree_sitter_json::LANGUAGE.into(),
            Self::Yaml => tree_sitter_yaml::LANGUAGE.into(),
            Self::Markdown => tree_sitter_md::LANGUAGE.into(),
        }
    }

    fn source(self) -> &'static str {
        match self {
            Self::Rust => include_str!("queries/rust.scm"),
            Self::Python => include_str!("queries/python.scm"),
            Self::JavaScript => include_str!("queries/javascript.scm"),
            Self::TypeScript | Self::Tsx => include_str!("queries/typescript.scm"),
            Self::Go => include_str!("queries/go.scm"),
            Self::Java => include_str!("queries/java.scm"),
            Self::C => include_str!("queries/c.scm"),
            Self::Cpp => include_str!("queries/cpp.scm"),
            Self::Ruby => include_str!("queries/ruby.scm"),
            Self::Php => include_str!("queries/php.scm"),
            Self::Bash => include_str!("queries/bash.scm"),
            Self::Html => include_str!("queries/html.scm"),
            Self::Css => include_str!("queries/css.scm"),
            Self::Json => include_str!("queries/json.scm"),
            Self::Yaml => include_str!("queries/yaml.scm"),
            Self::Markdown => include_str!("queries/markdown.scm"),
        }
    }

    /// Whether its words refer to definitions: prose and data do not count as uses.
    pub(super) fn is_code(self) -> bool {
        !matches!(self, Self::Html | Self::Css | Self::Json | Self::Yaml | Self::Markdown)
    }

    /// Whether a line that starts with `#` is a comment (and not a preprocessor's line or a heading).
    pub(super) fn has_hash_comments(self) -> bool {
        matches!(self, Self::Python | Self::Ruby | Self::Bash | Self::Yaml | Self::Php)
    }

    /// Its grammar with our query, compiled once.
    pub(super) fn grammar(self) -> &'static Grammar {
        static GRAMMARS: [OnceLock<Grammar>; ALL.len()] = [const { OnceLock::new() }; ALL.len()];
        GRAMMARS[self as usize].get_or_init(|| {
            let language = self.language();
            // Both are parts of this program; a test compiles every one of them.
            let query = Query::new(&language, self.source()).expect("the query fits its grammar, as a test checks");
            Grammar { language, query }
        })
    }
}

/// A grammar and the query for definitions in it.
pub(super) struct Grammar {
    pub(super) language: Language,
    pub(super) query: Query,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_query_fits_its_grammar() {
        for lang in ALL {
            if let Err(error) = Query::new(&lang.language(), lang.source()) {
                panic!("{lang:?}: {error}");
            }
            assert_eq!(ALL[lang as usize], lang);
            assert!(lang.grammar().query.pattern_count() > 0);
        }
    }

    #[test]
    fn a_file_s_name_and_head_tell_its_language() {
        for (path, text, lang) in [
            ("a/b.rs", "", Some(Lang::Rust)),
            ("B.TSX", "", Some(Lang::Tsx)),
            ("x.h", "int f(void);", Some(Lang::C)),
            ("x.h", "namespace a {}", Some(Lang::Cpp)),
            ("run", "#!/usr/bin/env bash\n", Some(Lang::Bash)),
            ("run", "#!/bin/sh\n", Some(Lang::Bash)),
            ("run", "#!/usr/bin/env python3\n", Some(Lang::Python)),
            ("LICENSE", "MIT", None),
            ("Cargo.toml", "", None),
        ] {
            assert_eq!(Lang::of(path, text), lang, "{path}");
        }
    }
}
