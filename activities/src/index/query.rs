//! What a question asks for: words, names, paths, and what it is about. A question is data; it has no syntax to break.

use super::{
    kind::About,
    lang::Lang,
    lookup::qualified,
    tokenize::{in_word, is_stop_word, query_tokens},
};

/// Bytes of a question that are read; what follows in a pasted log says little more.
const QUERY_BYTES_MAX: usize = 8 << 10;
/// Words of a question that are scored.
const TERMS_MAX: usize = 96;
/// Names of a question that are looked up.
const NAMES_MAX: usize = 48;

/// Words that ask for a definition or its users, and how many names such a question has at most.
const ASKING: &[&str] = &["defined", "definition", "declared", "implemented", "calls", "callers", "uses"];
const ASKED_MAX: usize = 3;

/// A question, parted.
#[derive(Debug, Default)]
pub(super) struct Query {
    pub(super) terms: Vec<String>,
    pub(super) names: Vec<Name>,
    /// Whole paths or their ends.
    pub(super) paths: Vec<String>,
    pub(super) about: About,
}

/// A word that may name a definition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Name {
    pub(super) text: String,
    pub(super) parent: Option<String>,
    /// It is written as a name, or the question asks where something is defined. Others are words of prose.
    pub(super) sure: bool,
}

impl Query {
    pub(super) fn of(text: &str) -> Self {
        let mut end = text.len().min(QUERY_BYTES_MAX);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        let text = &text[..end];
        let terms = query_tokens(text, TERMS_MAX);
        let mut query = Self { about: About::of(&terms), terms, ..Self::default() };
        let pieces: Vec<&str> = text.split('`').collect();
        for (number, piece) in pieces.iter().enumerate() {
            // Between two backticks, not after the last one.
            let quoted = number % 2 == 1 && number + 1 < pieces.len();
            for word in piece.split_whitespace() {
                query.word(word, quoted);
            }
        }
        // `where is open defined` asks for a definition by a word that may look like prose.
        let before = query.names.len();
        query.names.retain(|name| !ASKING.contains(&name.text.to_lowercase().as_str()) || name.sure);
        let asks = before > query.names.len() || text.trim_start().to_lowercase().starts_with("where is ");
        if asks && query.names.len() <= ASKED_MAX {
            query.names.iter_mut().for_each(|name| name.sure = true);
        }
        query
    }

    fn word(&mut self, raw: &str, quoted: bool) {
        let word = raw.trim_matches(|c: char| !in_word(c) && !matches!(c, '/' | '.' | '~' | '#'));
        let word = word.trim_end_matches(['.', '/']).trim_start_matches("./");
        if word.is_empty() || word.contains("://") {
            return;
        }
        let is_file = !word.contains("::") && (word.contains('/') || Lang::of(word, "").is_some());
        if is_file && word.contains(|c: char| c.is_alphanumeric()) {
            if self.paths.len() < NAMES_MAX {
                self.paths.push(word.trim_start_matches('/').to_owned());
            }
            return;
        }
        let called = raw.contains("()");
        let (parent, name) = qualified(word);
        if !name.contains(in_word) || self.names.len() >= NAMES_MAX {
            return;
        }
        let sure = quoted || called || parent.is_some() || is_shaped(name);
        let prose = name.len() < 3 || is_stop_word(&name.to_lowercase());
        if prose && !(sure && name.len() > 1) {
            return;
        }
        let name = Name { text: name.to_owned(), parent: parent.map(str::to_owned), sure };
        if !self.names.contains(&name) {
            self.names.push(name);
        }
    }
}

/// Whether a word is written as only names are: an underscore or an upper-case letter inside.
fn is_shaped(word: &str) -> bool {
    let inner = word.trim_matches(['_', '$']);
    let chars: Vec<char> = inner.chars().collect();
    let camel = chars.windows(2).any(|pair| pair[0].is_lowercase() && pair[1].is_uppercase());
    camel || inner.contains('_') || inner.len() < word.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(text: &str) -> Vec<String> {
        let name = |n: Name| {
            format!("{}{}{}", n.parent.map(|p| p + ".").unwrap_or_default(), n.text, if n.sure { "!" } else { "" })
        };
        Query::of(text).names.into_iter().map(name).collect()
    }

    #[test]
    fn names_are_told_from_prose() {
        assert_eq!(
            names("Fix the retry loop in fetchAll, see max_retry_count."),
            ["Fix", "retry", "loop", "fetchAll!", "see", "max_retry_count!"]
        );
        assert_eq!(names("where is open defined"), ["open!"]);
        assert_eq!(names("where is the lease of a worker checked on settle"), ["lease", "worker", "checked", "settle"]);
        assert_eq!(names("`run` stops"), ["run!", "stops"]);
        assert_eq!(names("Index::open and run()"), ["Index.open!", "run!"]);
        assert_eq!(names("a `b"), Vec::<String>::new());
    }

    #[test]
    fn paths_are_seen() {
        assert_eq!(
            Query::of("change ./src/main.rs and lib.py (docs/x) https://a.b/c").paths,
            ["src/main.rs", "lib.py", "docs/x"]
        );
        assert_eq!(Query::of("/ . .. // ?").paths, Vec::<String>::new());
    }

    #[test]
    fn query_syntax_means_nothing() {
        for text in ["body:x AND (y OR", "\"", "*", "a~2^3", "\0", "[1 TO 9]", "`", "``", &"ü".repeat(9000)] {
            Query::of(text);
        }
        assert_eq!(Query::of("path:main AND x").terms, ["path", "main", "x"]);
    }
}
