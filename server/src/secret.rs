//! Keys where none belong, in what people write to a chat and in lines of a log: found by their shapes and cut out.
//!
//! Shapes, not proof: a long word with a digit after `sk-` is cut. Keys without a known beginning are found by what names them
//! (`/key …`, `API_KEY=…`, `Bearer …`), and in what a person writes to a chat by looking like chance (`by_chance`). Those in
//! hexadecimal look like commits and checksums: they are cut if the words before them speak of a key, or if nothing else was written.

use serde_json::Value;

/// Written in place of a key.
const CUT: &str = "[redacted]";
/// (what a key begins with, fewest characters after it). Source: the providers' pages, November 2026.
const SHAPES: &[(&str, usize)] = &[
    ("sk-", 16),
    ("sk_", 20),
    ("csk-", 20),
    ("nvapi-", 20),
    ("fw_", 20),
    ("AIza", 30),
    ("AQ.", 30),
    ("gsk_", 20),
    ("xai-", 20),
    ("hf_", 20),
    ("r8_", 20),
    ("pplx-", 20),
    ("ghp_", 20),
    ("gho_", 20),
    ("ghs_", 20),
    ("github_pat_", 20),
    ("glpat-", 16),
    ("xoxb-", 16),
    ("xoxp-", 16),
    ("AKIA", 16),
    ("eyJ", 60),
];
/// What names a key that follows, in lower case, `_` and blanks read as `-`.
const LABELS: &[&str] = &["api-key", "apikey", "access-token", "secret-key", "bearer", "x-goog-api-key"];
/// The same behind `=` or `:`, for what looks like chance: tables have keys, too.
const WEAK_LABELS: &[&str] = &["key", "token", "secret", "password"];
/// Fewest characters after a label.
const LABELLED_MIN: usize = 16;
/// Fewest letters and digits in a row that look like chance without a name. Chosen: the shortest keys without a shape have 32.
const CHANCE_MIN: usize = 28;
/// Fewest hexadecimal digits that may be a key, and as many as a commit has.
const HEX_MIN: usize = 32;
const COMMIT: usize = 40;
/// What people call a key before they write it, and within how many words; what else hexadecimal digits are called.
const CALLED: &[&str] = &["key", "keys", "apikey", "token", "tokens", "secret", "password"];
const CALLED_WITHIN: usize = 12;
const SUMS: &[&str] = &[
    "commit",
    "commits",
    "sha",
    "sha1",
    "sha256",
    "sha512",
    "md5",
    "hash",
    "hashes",
    "checksum",
    "checksums",
    "digest",
    "revision",
    "etag",
];
const SUMS_WITHIN: usize = 6;
/// Where people write.
const WRITTEN: [&str; 4] = ["/message/text", "/message/caption", "/edited_message/text", "/edited_message/caption"];
/// Fewest characters after `/key`: an explanation has blanks, a key has none.
const COMMANDED_MIN: usize = 8;
/// Digits of a bot's id, and characters of its secret after the colon.
const BOT_ID: std::ops::RangeInclusive<usize> = 8..=12;
const BOT_SECRET_MIN: usize = 30;
/// Parts of an update that Telegram writes, not a person: nothing is cut out of them.
const MONEY: [&str; 3] = ["successful_payment", "refunded_payment", "pre_checkout_query"];

/// The text without its keys; `None` if there are none.
#[must_use]
pub fn redact(text: &str) -> Option<String> {
    let mut out = String::new();
    let mut found = false;
    let named = named(text);
    found |= named.is_some();
    let mut rest = named.as_deref().unwrap_or(text);
    while let Some(start) = rest.find(is_key_char) {
        let end = rest[start..].find(|c| !is_key_char(c)).map_or(rest.len(), |n| start + n);
        out.push_str(&rest[..start]);
        let word = &rest[start..end];
        // What introduces a key, as in `KEY=sk-…` or `key:sk-…`, is a word of its own.
        match key_at(word) {
            Some(at) => {
                found = true;
                out.push_str(&word[..at]);
                out.push_str(CUT);
                // Base64 has more characters than a word.
                let tail = |c: char| is_key_char(c) || "+/=".contains(c);
                rest = rest[end..].trim_start_matches(tail);
            }
            None => {
                out.push_str(word);
                rest = &rest[end..];
            }
        }
    }
    out.push_str(rest);
    found.then_some(out)
}

/// A text of a chat without its keys, and without a private key that was pasted, to the end; `None` if there are none.
fn pasted(text: &str) -> Option<String> {
    let mut out = redact(text);
    let plain = out.as_deref().unwrap_or(text);
    if let Some(at) = plain.find("PRIVATE KEY-----") {
        let start = plain[..at].rfind("-----BEGIN").unwrap_or(at);
        out = Some(format!("{}{CUT}", &plain[..start]));
    }
    out
}

/// The text without what follows `/key` or a label.
fn named(text: &str) -> Option<String> {
    let mut cuts: Vec<std::ops::Range<usize>> = Vec::new();
    // Blanks included: whatever was meant, it was meant to be a key.
    if let Some(command) = text.trim_start().strip_prefix('/') {
        let (word, argument) = command.split_once(char::is_whitespace).unwrap_or((command, ""));
        let word = word.split('@').next().unwrap_or_default();
        let long = argument.split_whitespace().any(|part| part.chars().count() >= COMMANDED_MIN);
        if (word.eq_ignore_ascii_case("key") || word.eq_ignore_ascii_case("keys")) && long {
            cuts.push(text.len() - argument.len()..text.len());
        }
    }
    // Byte for byte as long as the text: only ASCII changes.
    let plain: String = text.chars().map(|c| if c == '_' || c == ' ' { '-' } else { c.to_ascii_lowercase() }).collect();
    for label in LABELS {
        for (at, _) in plain.match_indices(label) {
            let after = &text[at + label.len()..];
            let value = after.trim_start_matches(|c: char| c.is_whitespace() || "=:\"'`".contains(c));
            let start = text.len() - value.len();
            let length = value.find(|c: char| c.is_whitespace() || "\"'`,;&<>".contains(c)).unwrap_or(value.len());
            let word = &value[..length];
            if start > at + label.len() && length >= LABELLED_MIN && word.contains(|c: char| c.is_ascii_digit()) {
                cuts.push(start..start + length);
            }
        }
    }
    for label in WEAK_LABELS {
        for (at, _) in plain.match_indices(label) {
            let after = text[at + label.len()..].trim_start_matches(|c: char| c == ' ' || "\"'`".contains(c));
            let Some(value) = after.strip_prefix(['=', ':']) else { continue };
            let value = value.trim_start_matches(|c: char| c.is_whitespace() || "\"'`".contains(c));
            let length = value.find(|c: char| c.is_whitespace() || "\"'`,;&<>".contains(c)).unwrap_or(value.len());
            let start = text.len() - value.len();
            if length >= LABELLED_MIN && is_chance(&value[..length]) {
                cuts.push(start..start + length);
            }
        }
    }
    cuts.sort_by_key(|cut| cut.start);
    let mut out = String::new();
    let mut kept_to = 0;
    for cut in &cuts {
        if cut.start >= kept_to {
            out.push_str(&text[kept_to..cut.start]);
            out.push_str(CUT);
        }
        kept_to = kept_to.max(cut.end);
    }
    out.push_str(&text[kept_to..]);
    (!cuts.is_empty()).then_some(out)
}

/// What a person wrote, without words that look like chance: a key of a provider that nobody here knows. `None` if there are none.
/// Addresses stay: documents are shared by long ids.
fn by_chance(text: &str) -> Option<String> {
    let words: Vec<&str> = text.split_whitespace().collect();
    let (mut out, mut n) = (String::new(), 0);
    for word in text.split_inclusive(char::is_whitespace) {
        let end = word.trim_end();
        let looks = !end.is_empty() && !end.contains("://") && rows(end).any(|row| looks_like_key(row, &words, n));
        out.push_str(if looks { CUT } else { end });
        out.push_str(&word[end.len()..]);
        n += usize::from(!end.is_empty());
    }
    (out != text).then_some(out)
}

/// Letters and digits in a row.
fn rows(word: &str) -> impl Iterator<Item = &str> {
    word.split(|c: char| !c.is_ascii_alphanumeric())
}

/// Whether a row of the `n`-th word may be a key, by itself or by what is said before it.
fn looks_like_key(row: &str, words: &[&str], n: usize) -> bool {
    if !row.bytes().all(|b| b.is_ascii_hexdigit()) {
        return row.len() >= CHANCE_MIN && is_chance(row);
    }
    let mixed = row.contains(|c: char| c.is_ascii_digit()) && row.contains(|c: char| c.is_ascii_alphabetic());
    if row.len() < HEX_MIN || !mixed {
        return false;
    }
    let said = |names: &[&str], within: usize| {
        let before = words[n.saturating_sub(within)..=n].iter().flat_map(|word| rows(word));
        before.into_iter().any(|word| names.iter().any(|name| word.eq_ignore_ascii_case(name)))
    };
    !said(SUMS, SUMS_WITHIN) && (said(CALLED, CALLED_WITHIN) || words.len() == 1 && row.len() != COMMIT)
}

/// Whether letters, capitals and digits change as often as by chance: at every fourth place at least (two of five in most keys), with two
/// groups of digits. Words, names and dates do not. A capital belongs to the word that it begins.
fn is_chance(word: &str) -> bool {
    let class = |b: &u8| (b.is_ascii_digit(), b.is_ascii_uppercase(), b.is_ascii_lowercase());
    let goes_on = |a: &u8, b: &u8| class(a) == class(b) || a.is_ascii_uppercase() && b.is_ascii_lowercase();
    let rows: Vec<_> = word.as_bytes().chunk_by(goes_on).collect();
    let digits = rows.iter().filter(|row| row[0].is_ascii_digit()).count();
    digits >= 2 && rows.len() * 4 >= word.len()
}

/// Cuts keys, and what Postgres cannot keep, out of every text of an update. True if there was a key.
///
/// What Telegram says of money keeps its ids to the letter, whatever they look like.
pub fn clean(value: &mut Value) -> bool {
    let mut found = cut(value, false);
    for place in WRITTEN {
        if let Some(Value::String(text)) = value.pointer_mut(place)
            && let Some(redacted) = by_chance(text)
        {
            *text = redacted;
            found = true;
        }
    }
    found
}

fn cut(value: &mut Value, money: bool) -> bool {
    match value {
        Value::String(text) => {
            if text.contains('\0') {
                *text = text.replace('\0', "");
            }
            match pasted(text).filter(|_| !money) {
                Some(redacted) => {
                    *text = redacted;
                    true
                }
                None => false,
            }
        }
        Value::Array(items) => items.iter_mut().fold(false, |found, item| cut(item, money) | found),
        Value::Object(map) => {
            map.iter_mut().fold(false, |found, (name, item)| cut(item, money || MONEY.contains(&name.as_str())) | found)
        }
        _ => false,
    }
}

fn is_key_char(c: char) -> bool {
    c.is_ascii_alphanumeric() || "_-.:".contains(c)
}

/// Where in a word a key begins.
fn key_at(word: &str) -> Option<usize> {
    let fits = |rest: &str, min: usize| {
        let body: usize = rest.chars().take_while(|c| *c != ':').count();
        body >= min && rest[..body].contains(|c: char| c.is_ascii_digit())
    };
    for (prefix, min) in SHAPES {
        for (at, _) in word.match_indices(prefix) {
            let inside = word[..at].ends_with(|c: char| c.is_ascii_alphanumeric());
            if !inside && fits(&word[at + prefix.len()..], *min) {
                return Some(at);
            }
        }
    }
    let (id, secret) = word.split_once(':')?;
    let digits = id.len() - id.trim_end_matches(|c: char| c.is_ascii_digit()).len();
    (BOT_ID.contains(&digits) && secret.len() >= BOT_SECRET_MIN).then_some(id.len() - digits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_cut_and_words_stay() {
        for (text, expected) in [
            ("my key is sk-or-v1-0123456789abcdef0123 ok?", Some("my key is [redacted] ok?")),
            ("OPENAI_API_KEY=sk-proj-Abc_123456789012345", Some("OPENAI_API_KEY=[redacted]")),
            ("key:AIzaSyA1234567890abcdefghijklmnopqrstuvw", Some("key:[redacted]")),
            ("gsk_a1b2c3d4e5f6g7h8i9j0k1l2", Some("[redacted]")),
            ("csk-a1b2c3d4e5f6g7h8i9j0k1l2", Some("[redacted]")),
            ("use nvapi-A1b2C3d4_E5f6-G7h8I9j0k1l2m3 please", Some("use [redacted] please")),
            ("FIREWORKS=fw_3aB4cD5eF6gH7iJ8kL9mN0", Some("FIREWORKS=[redacted]")),
            ("fw_upgrade_the_firmware_please", None),
            ("12345678:AAF7-g0gYncWnm5IyfZlpPRqRRv6kNAGlao", Some("[redacted]")),
            ("-----BEGIN RSA PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY-----", Some("[redacted]")),
            ("/key abcdefgh12345678", Some("/key [redacted]")),
            ("/keys@some_bot  gemini some words zzzzzzzz", Some("/keys@some_bot [redacted]")),
            ("GEMINI_API_KEY=zq81-unknown-shape-0042 please", Some("GEMINI_API_KEY=[redacted] please")),
            ("my api key: \"zq81+unknown/shape=0042\"", Some("my api key: \"[redacted]\"")),
            ("Authorization: Bearer zq81unknownshape0042", Some("Authorization: Bearer [redacted]")),
            ("x-goog-api-key: zq81unknownshape0042 größe", Some("x-goog-api-key: [redacted] größe")),
            ("AQ.Ab8RN6abcdefghijklmnopqrstuvwxyz0123", Some("[redacted]")),
            ("AIzaSyA1234567890abcdefghijklmnopqrst+uv/w== ok", Some("[redacted] ok")),
            ("MISTRAL_KEY=5vXkQ2wZ8rTn4LpA, thanks", Some("MISTRAL_KEY=[redacted], thanks")),
            ("the token: \"a8f3k2m9x7q4w1z6\"", Some("the token: \"[redacted]\"")),
            ("primary key: order_items_2024_by_customer", None),
            ("its key:value-store-for-everybody-2024", None),
            ("/key", None),
            ("/key how do I", None),
            ("/keyboard abcdefgh12345678", None),
            ("an api key is needed for authentication of users", None),
            ("the bearer of 1234567890123456 letters", None),
            ("sk-short1", None),
            ("a task-management-system-with-42-features", None),
            ("https://example.org/sk-learn-pipeline-for-words", None),
            ("meet at 12:30, see 123e4567-e89b-12d3-a456-426614174000", None),
            ("größe: 5 … ok", None),
        ] {
            assert_eq!(pasted(text).as_deref(), expected, "{text}");
        }
    }

    #[test]
    fn what_looks_like_chance_is_cut_out_of_what_people_write() {
        for (text, expected) in [
            ("my key is 5vXkQ2wZ8rTn4LpA7sYd1GhJ6mBc3EfK ok", Some("my key is [redacted] ok")),
            ("(a8f3k2m9x7q4w1z6b5n0c8v2l3p7r9t1)", Some("[redacted]")),
            ("take\n5vXkQ2wZ8rTn4LpA7sYd1GhJ6mBc3EfK/+w==\tplease", Some("take\n[redacted]\tplease")),
            // In hexadecimal if it is called so, or if there is nothing else.
            ("My API key is 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822c.", Some("My API key is [redacted]")),
            ("use this key 9f86d081884c7d659a2feaa0c55ad015", Some("use this key [redacted]")),
            (
                "the token of my\nserver:\n\n9f86d081884c7d659a2feaa0c55ad015 ok",
                Some("the token of my\nserver:\n\n[redacted] ok"),
            ),
            (" 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08\n", Some(" [redacted]\n")),
            ("the key lookup is wrong since commit 4f0c2b7d9e1a3c5f7b9d2e4f6a8c0b1d3e5f7a9b", None),
            ("the key file's sha256 is e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855", None),
            ("the keyboard sends 9f86d081884c7d659a2feaa0c55ad015", None),
            ("its key is 12345678901234567890123456789012", None),
            ("4f0c2b7d9e1a3c5f7b9d2e4f6a8c0b1d3e5f7a9b", None),
            // Commits, checksums, ids, shared documents, names, and words of languages that write them together.
            ("see 4f0c2b7d9e1a3c5f7b9d2e4f6a8c0b1d3e5f7a9b", None),
            ("sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855", None),
            ("run 123e4567-e89b-12d3-a456-426614174000", None),
            ("https://docs.example.org/d/1BxiMVs0XRA5nFMdKvBdBZjgmUUqptlbs74OgvE2upms/edit", None),
            ("getUserAccountBalanceForMonth2024AndYear2025", None),
            ("Donaudampfschifffahrtsgesellschaftskapitän", None),
            ("IMG20241126WA0001_and_IMG20241126WA0002.jpeg", None),
        ] {
            assert_eq!(by_chance(text).as_deref(), expected, "{text}");
        }
        // Telegram's own ids look so, and are in other places.
        let id = "AgACAgIAAxkBAAIB5vXkQ2wZ8rTn4LpA7sYd1GhJ6mBc3EfK";
        let mut raw = serde_json::json!({"message": {"text": format!("key {id}"), "photo": [{"file_id": id}]}});
        assert!(clean(&mut raw));
        assert_eq!(raw["message"], serde_json::json!({"text": "key [redacted]", "photo": [{"file_id": id}]}));
    }

    #[test]
    fn every_text_of_an_update_is_cleaned() {
        let mut raw = serde_json::json!({"message": {"text": "a\u{0}b", "reply_to_message": {"text": "sk-1234567890abcdefgh"},
            "entities": [{"url": "https://x/?k=AIzaSyA1234567890abcdefghijklmnopqrstuvw"}]}});
        assert!(clean(&mut raw));
        assert_eq!(raw["message"]["text"], "ab");
        assert!(!raw.to_string().contains("1234567890"), "{raw}");
        assert!(!clean(&mut raw));
    }

    #[test]
    fn ids_of_money_stay_as_they_came() {
        let id = "sk_1234567890abcdefghijklmnop";
        let payment = serde_json::json!({"telegram_payment_charge_id": id, "invoice_payload": id});
        for mut raw in [
            serde_json::json!({"message": {"successful_payment": payment}}),
            serde_json::json!({"message": {"refunded_payment": payment}}),
            serde_json::json!({"pre_checkout_query": {"id": id, "invoice_payload": "a\u{0}b"}}),
        ] {
            let before = raw.to_string().replace("\\u0000", "");
            assert!(!clean(&mut raw));
            assert_eq!(raw.to_string(), before);
        }
        // Beside it, a text is a text.
        let mut raw = serde_json::json!({"message": {"text": id, "successful_payment": payment}});
        assert!(clean(&mut raw));
        assert_eq!((&raw["message"]["text"], &raw["message"]["successful_payment"]), (&CUT.into(), &payment));
    }
}
