//! Words of code: one function for what is indexed and what is asked.

use tantivy::tokenizer::{Token, TokenStream, Tokenizer};

/// Longest token in bytes; longer runs are data, not names.
const TOKEN_BYTES_MAX: usize = 64;

/// Words of a question that say nothing about the code it is about. Query side only: in code they may be names.
const STOP_WORDS: &[&str] = &[
    "a", "an", "and", "are", "as", "at", "be", "but", "by", "can", "do", "does", "for", "from", "has", "have", "how",
    "if", "in", "into", "is", "it", "its", "not", "of", "on", "or", "should", "so", "that", "the", "their", "then",
    "there", "these", "this", "to", "was", "we", "what", "when", "where", "which", "who", "why", "will", "with", "you",
];

/// Emits the tokens of a text in order: of every identifier the whole and its parts, of every kebab word the whole too.
///
/// # Shape
/// Lower case. `parseHTTPRequest2` gives `parsehttprequest2`, `parse`, `http`, `request`, `2`; `max-retry` gives `max`,
/// `retry`, `max-retry`. What is asked of a piece of a text, cut where its words end, is a subset of what the text gives.
pub(super) fn tokens(text: &str, emit: &mut dyn FnMut(String)) {
    let mut rest = text;
    while let Some(start) = rest.find(in_word) {
        rest = &rest[start..];
        let mut end = run(rest);
        let mut names = 1;
        identifier(&rest[..end], emit);
        // A hyphen between two identifiers without spaces: CSS classes, flags, YAML keys, file names.
        while let Some(next) = rest[end..].strip_prefix('-')
            && next.starts_with(in_word)
        {
            let length = run(next);
            identifier(&next[..length], emit);
            end += 1 + length;
            names += 1;
        }
        if names > 1 && end <= TOKEN_BYTES_MAX {
            emit(rest[..end].to_lowercase());
        }
        rest = &rest[end..];
    }
}

/// The tokens of a query, each once, in order, at most `max`; without stop words unless nothing else is left.
pub(super) fn query_tokens(query: &str, max: usize) -> Vec<String> {
    let mut all = Vec::new();
    let mut seen = std::collections::HashSet::new();
    tokens(query, &mut |token| {
        if seen.insert(token.clone()) {
            all.push(token);
        }
    });
    let telling: Vec<String> = all.iter().filter(|token| !is_stop_word(token)).cloned().collect();
    let mut kept = if telling.is_empty() { all } else { telling };
    kept.truncate(max);
    kept
}

pub(super) fn is_stop_word(word: &str) -> bool {
    STOP_WORDS.binary_search(&word).is_ok()
}

/// Whether a character belongs to an identifier or number.
pub(super) fn in_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_' || c == '$'
}

fn run(text: &str) -> usize {
    text.find(|c| !in_word(c)).unwrap_or(text.len())
}

/// One identifier: the whole, and its parts if it has several.
fn identifier(name: &str, emit: &mut dyn FnMut(String)) {
    if name.len() > TOKEN_BYTES_MAX {
        return;
    }
    let whole = name.to_lowercase();
    let mut parts = Vec::new();
    for piece in name.split(['_', '$']).filter(|piece| !piece.is_empty()) {
        let mut from = 0;
        let mut chars = piece.char_indices().peekable();
        let mut before: Option<char> = None;
        while let Some((at, c)) = chars.next() {
            let border = before.is_some_and(|b| {
                let after_lower = b.is_lowercase() && c.is_uppercase();
                // The end of an acronym: in `HTTPServer`, before the S.
                let acronym =
                    b.is_uppercase() && c.is_uppercase() && chars.peek().is_some_and(|(_, next)| next.is_lowercase());
                after_lower || acronym || b.is_numeric() != c.is_numeric()
            });
            if border {
                parts.push(piece[from..at].to_lowercase());
                from = at;
            }
            before = Some(c);
        }
        parts.push(piece[from..].to_lowercase());
    }
    let single = parts.len() == 1 && parts[0] == whole;
    emit(whole);
    if !single {
        parts.into_iter().for_each(emit);
    }
}

/// [`tokens`] for tantivy.
#[derive(Clone, Default)]
pub(super) struct CodeTokenizer;

pub(super) struct CodeTokens {
    tokens: std::vec::IntoIter<String>,
    token: Token,
}

impl Tokenizer for CodeTokenizer {
    type TokenStream<'a> = CodeTokens;

    fn token_stream<'a>(&'a mut self, text: &'a str) -> CodeTokens {
        let mut all = Vec::with_capacity(text.len() / 4);
        tokens(text, &mut |token| all.push(token));
        CodeTokens { tokens: all.into_iter(), token: Token { position: 0, ..Token::default() } }
    }
}

impl TokenStream for CodeTokens {
    fn advance(&mut self) -> bool {
        match self.tokens.next() {
            Some(text) => {
                self.token.text = text;
                true
            }
            None => false,
        }
    }
    fn token(&self) -> &Token {
        &self.token
    }
    fn token_mut(&mut self) -> &mut Token {
        &mut self.token
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn all(text: &str) -> Vec<String> {
        let mut out = Vec::new();
        tokens(text, &mut |token| out.push(token));
        out
    }

    #[test]
    fn identifiers_give_the_whole_and_the_parts() {
        for (text, expected) in [
            ("parseHTTPRequest2", "parsehttprequest2 parse http request 2"),
            ("max_retry_count", "max_retry_count max retry count"),
            ("HTTPServer", "httpserver http server"),
            ("getURL", "geturl get url"),
            ("_private", "_private private"),
            ("$name", "$name name"),
            ("word", "word"),
            ("Word", "word"),
            ("X", "x"),
            ("a.b(c)", "a b c"),
            ("0xFF 12", "0xff 0 x ff 12"),
            ("max-retry", "max retry max-retry"),
            ("--dry-run", "dry run dry-run"),
            ("a - b", "a b"),
            ("größeÄndern", "größeändern größe ändern"),
            ("数据", "数据"),
            ("___", "___"),
            ("", ""),
        ] {
            assert_eq!(all(text).join(" "), expected, "{text}");
        }
        assert!(all(&"x".repeat(TOKEN_BYTES_MAX + 1)).is_empty());
    }

    #[test]
    fn stop_words_go_unless_nothing_else_is_left() {
        assert!(STOP_WORDS.is_sorted());
        assert_eq!(query_tokens("where is the retryPolicy and retry", 9), ["retrypolicy", "retry", "policy"]);
        assert_eq!(query_tokens("to be or not to be", 9), ["to", "be", "or", "not"]);
        assert_eq!(query_tokens("one two three", 2), ["one", "two"]);
    }

    proptest! {
        #[test]
        fn what_is_asked_of_a_piece_is_in_the_text(words in proptest::collection::vec("[a-zA-Z0-9_$-]{1,12}|[äßÄ数É]{1,3}", 1..12),
            from in 0usize..12, count in 1usize..12) {
            let text = words.join(" ");
            let piece = words.iter().skip(from).take(count).cloned().collect::<Vec<_>>().join(" ");
            let have = all(&text);
            for token in all(&piece) {
                prop_assert!(have.contains(&token), "{token} of {piece} is not in {text}");
            }
        }

        #[test]
        fn any_text_has_tokens_without_harm(text in "\\PC{0,200}") {
            for token in all(&text) {
                prop_assert!(!token.is_empty());
            }
        }
    }
}
