//! Text to tree. Tokens by `winnow`; the few rules above them by hand, for the sake of their messages.

use super::{COMPARISONS_MAX, Compare, Condition, DEPTH_MAX, Field, FilterError, TEXT_BYTES_MAX, VALUES_MAX, Value};
use crate::view::RunStatus;
use chrono::{DateTime, NaiveDate, NaiveDateTime, Utc};
use std::ops::Range;
use winnow::{
    LocatingSlice,
    ascii::{digit1, multispace0},
    combinator::{alt, delimited, opt, preceded, repeat},
    prelude::*,
    token::{any, none_of, take_while},
};

/// How alike two names must be for one to be suggested. Chosen.
const ALIKE: f64 = 0.75;
/// Longest number, in characters.
const NUMBER_CHARS_MAX: usize = 40;
/// Longest piece of the text that a message repeats.
const SHOWN_CHARS_MAX: usize = 40;

#[derive(Clone, Debug, PartialEq)]
enum Token {
    /// A field, a key word.
    Word(String),
    /// A name in double quotes.
    Quoted(String),
    Text(String),
    Number(String),
    Symbol(&'static str),
}

type Input<'s> = LocatingSlice<&'s str>;
type Spanned = (Token, Range<usize>);

fn quoted<'s>(quote: char) -> impl Parser<Input<'s>, String, winnow::error::ContextError> {
    let twice: &'static str = if quote == '\'' { "''" } else { "\"\"" };
    delimited(quote, repeat(0.., alt((twice.value(quote), none_of(quote)))), quote)
}

fn token(input: &mut Input<'_>) -> winnow::Result<Token> {
    alt((
        quoted('\'').map(Token::Text),
        quoted('"').map(Token::Quoted),
        (opt('-'), digit1, opt(('.', digit1))).take().map(|s: &str| Token::Number(s.to_owned())),
        (
            take_while(1, |c: char| c.is_ascii_alphabetic() || c == '_'),
            take_while(0.., |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-'),
        )
            .take()
            .map(|s: &str| Token::Word(s.to_owned())),
        alt(("!=".value("!="), "<>".value("!="), "<=".value("<="), ">=".value(">="))).map(Token::Symbol),
        alt(["=", "<", ">", "(", ")", ",", "."].map(|symbol| symbol.value(symbol))).map(Token::Symbol),
    ))
    .parse_next(input)
}

fn tokens(text: &str) -> Result<Vec<Spanned>, FilterError> {
    let mut input = LocatingSlice::new(text);
    let found: winnow::Result<Vec<Spanned>> =
        repeat(0.., preceded(multispace0, token.with_span())).parse_next(&mut input);
    let found = found.unwrap_or_default();
    let end = text.len() - input.len();
    let rest = text[end..].trim_start();
    let at = text.len() - rest.len();
    let help = match rest.chars().next() {
        None => return Ok(found),
        Some('\'') => "a text ends with `'`; a quote inside is written twice".to_owned(),
        Some('"') => "a name ends with `\"`; texts are in single quotes".to_owned(),
        Some('&') => "write `and`".into(),
        Some('|') => "write `or`".into(),
        Some('!') => "write `not` or `!=`".into(),
        Some(';') => "one filter has no statements".into(),
        Some(_) => "texts are in single quotes".into(),
    };
    let mut shown = rest;
    // One character, unless it opens a quote: then the reader needs to see which.
    let taken: winnow::Result<&str> = any.take().parse_next(&mut shown);
    Err(error(text, at, format!("`{}` cannot be read", taken.unwrap_or_default()), help))
}

fn error(text: &str, at: usize, message: String, help: impl Into<String>) -> FilterError {
    FilterError { column: text[..at].chars().count() + 1, message, help: help.into() }
}

/// `words` of the caller's stand for attributes.
pub(super) fn parse(text: &str, words: &[(&'static str, &'static str)]) -> Result<Condition, FilterError> {
    if text.len() > TEXT_BYTES_MAX {
        return Err(FilterError {
            column: 0,
            message: format!("the filter has {} bytes", text.len()),
            help: format!("at most {TEXT_BYTES_MAX}"),
        });
    }
    if let Some(at) = text.find('\0') {
        return Err(error(text, at, "a NUL".into(), "leave it out"));
    }
    let tokens = tokens(text)?;
    let mut reader = Reader { text, words, tokens, at: 0, depth: 0, comparisons: 0 };
    let condition = reader.or()?;
    match reader.peek() {
        None => Ok(condition),
        Some(Token::Symbol(")")) => Err(reader.wrong("this bracket was never opened", "take it away")),
        Some(_) => Err(reader.wrong("something follows the condition", "join conditions by `and` or `or`")),
    }
}

struct Reader<'s> {
    text: &'s str,
    words: &'s [(&'static str, &'static str)],
    tokens: Vec<Spanned>,
    at: usize,
    depth: usize,
    comparisons: usize,
}

type Parsed = Result<Condition, FilterError>;

impl Reader<'_> {
    fn peek(&self) -> Option<&Token> {
        self.tokens.get(self.at).map(|(token, _)| token)
    }

    fn is_word(&self, ahead: usize, word: &str) -> bool {
        matches!(self.tokens.get(self.at + ahead), Some((Token::Word(w), _)) if w.eq_ignore_ascii_case(word))
    }

    fn eat_word(&mut self, word: &str) -> bool {
        let found = self.is_word(0, word);
        self.at += usize::from(found);
        found
    }

    fn eat_symbol(&mut self, symbol: &str) -> bool {
        let found = matches!(self.peek(), Some(Token::Symbol(s)) if *s == symbol);
        self.at += usize::from(found);
        found
    }

    /// An error at the next token, or at the end.
    fn wrong(&self, message: impl Into<String>, help: impl Into<String>) -> FilterError {
        self.wrong_at(self.at, message, help)
    }

    fn wrong_at(&self, token: usize, message: impl Into<String>, help: impl Into<String>) -> FilterError {
        let at = self.tokens.get(token).map_or(self.text.trim_end().len(), |(_, span)| span.start);
        error(self.text, at, message.into(), help)
    }

    /// The next token as written.
    fn shown(&self, token: usize) -> String {
        self.tokens.get(token).map_or_else(
            || "the end".to_owned(),
            |(_, span)| {
                let text = &self.text[span.clone()];
                let cut: String = text.chars().take(SHOWN_CHARS_MAX).collect();
                format!("`{cut}{}`", if cut.len() < text.len() { "…" } else { "" })
            },
        )
    }

    fn or(&mut self) -> Parsed {
        self.chain("or", Self::and, Condition::Any)
    }

    fn and(&mut self) -> Parsed {
        self.chain("and", Self::unary, Condition::All)
    }

    fn chain(&mut self, word: &str, part: fn(&mut Self) -> Parsed, join: fn(Vec<Condition>) -> Condition) -> Parsed {
        let mut parts = vec![part(self)?];
        while self.eat_word(word) {
            parts.push(part(self)?);
        }
        Ok(if parts.len() == 1 { parts.remove(0) } else { join(parts) })
    }

    fn unary(&mut self) -> Parsed {
        if self.depth >= DEPTH_MAX {
            return Err(self.wrong(format!("more than {DEPTH_MAX} levels"), "write it flatter"));
        }
        self.depth += 1;
        let open = self.at;
        let condition = if self.eat_word("not") {
            Condition::Not(Box::new(self.unary()?))
        } else if self.eat_symbol("(") {
            let inner = self.or()?;
            if !self.eat_symbol(")") {
                let message = format!("expected `)`, found {}", self.shown(self.at));
                return Err(if self.peek().is_none() {
                    self.wrong_at(open, "this bracket is never closed", "close it with `)`")
                } else {
                    self.wrong(message, "join conditions by `and` or `or`")
                });
            }
            inner
        } else {
            self.comparison()?
        };
        self.depth -= 1;
        Ok(condition)
    }

    fn comparison(&mut self) -> Parsed {
        self.comparisons += 1;
        if self.comparisons > COMPARISONS_MAX {
            return Err(self.wrong(format!("more than {COMPARISONS_MAX} comparisons"), "use `in`, or ask twice"));
        }
        let field = self.field()?;
        if self.eat_word("is") {
            let not = self.eat_word("not");
            if !self.eat_word("null") {
                return Err(self.wrong("expected `null`", "write `is null` or `is not null`"));
            }
            return Ok(negated(not, Condition::Empty(field)));
        }
        let not = (self.is_word(1, "in") || self.is_word(1, "like")) && self.eat_word("not");
        if self.eat_word("in") {
            return Ok(negated(not, Condition::In(field.clone(), self.list(&field)?)));
        }
        if self.eat_word("like") {
            return Ok(negated(not, self.like(field)?));
        }
        let operator = self.at;
        let (not, compare) = match self.peek() {
            Some(Token::Symbol("=")) => (false, Compare::Equal),
            Some(Token::Symbol("!=")) => (true, Compare::Equal),
            Some(Token::Symbol("<")) => (false, Compare::Less),
            Some(Token::Symbol("<=")) => (false, Compare::LessOrEqual),
            Some(Token::Symbol(">")) => (false, Compare::Greater),
            Some(Token::Symbol(">=")) => (false, Compare::GreaterOrEqual),
            _ => {
                let message = format!("expected a comparison, found {}", self.shown(self.at));
                return Err(self.wrong(message, "write =, !=, <, <=, >, >=, in, like or is null"));
            }
        };
        self.at += 1;
        if self.is_word(0, "null") {
            return Err(self.wrong("nothing is equal to null", "write `is null` or `is not null`"));
        }
        if self.eat_symbol("=") {
            return Err(self.wrong_at(self.at - 1, "`==` is not a comparison", "write `=`"));
        }
        let value = self.value(&field)?;
        if compare != Compare::Equal && matches!(value, Value::Bool(_) | Value::Status(_)) {
            return Err(self.wrong_at(
                operator,
                format!("{} has no order here", self.shown(operator + 1)),
                "use =, != or in",
            ));
        }
        Ok(negated(not, Condition::Compare(field, compare, value)))
    }

    fn field(&mut self) -> Result<Field, FilterError> {
        let first = self.at;
        let Some(Token::Word(name)) = self.peek().cloned() else {
            let help = format!("write a field: {}, attributes.NAME", self.known().join(", "));
            return Err(self.wrong(format!("expected a field, found {}", self.shown(self.at)), help));
        };
        self.at += 1;
        let lower = name.to_ascii_lowercase();
        if lower == "attributes" {
            if !self.eat_symbol(".") {
                return Err(self.wrong("which attribute?", "write for example `attributes.project_id`"));
            }
            return match self.peek().cloned() {
                Some(Token::Word(name) | Token::Quoted(name)) => {
                    self.at += 1;
                    if matches!(self.peek(), Some(Token::Symbol("."))) {
                        return Err(
                            self.wrong("attributes are flat", "a name with a dot is quoted: attributes.\"a.b\"")
                        );
                    }
                    Ok(Field::Attribute(name))
                }
                _ => Err(self.wrong("which attribute?", "a name, in double quotes if it is not plain")),
            };
        }
        if let Some((_, field)) = Field::NAMED.into_iter().find(|(known, _)| *known == lower) {
            return Ok(field);
        }
        if let Some((_, attribute)) = self.words.iter().find(|(word, _)| *word == lower) {
            return Ok(Field::Attribute((*attribute).to_owned()));
        }
        let help = match nearest(&lower, self.known()) {
            Some(known) => format!("did you mean `{known}`?"),
            None if ["and", "or", "in", "like", "is", "null"].contains(&lower.as_str()) => {
                "a condition is missing before it".into()
            }
            None => format!("did you mean `attributes.{name}`?"),
        };
        Err(self.wrong_at(first, format!("there is no field {}", self.shown(first)), help))
    }

    /// Names of fields.
    fn known(&self) -> Vec<&'static str> {
        Field::NAMED.iter().map(|(name, _)| *name).chain(self.words.iter().map(|(word, _)| *word)).collect()
    }

    fn list(&mut self, field: &Field) -> Result<Vec<Value>, FilterError> {
        if !self.eat_symbol("(") {
            return Err(self.wrong("expected `(` after `in`", "write for example `in ('a', 'b')`"));
        }
        let mut values = vec![self.value(field)?];
        while self.eat_symbol(",") {
            if values.len() >= VALUES_MAX {
                return Err(self.wrong(format!("more than {VALUES_MAX} values"), "ask twice"));
            }
            values.push(self.value(field)?);
        }
        if !self.eat_symbol(")") {
            let message = format!("expected `,` or `)`, found {}", self.shown(self.at));
            return Err(self.wrong(message, "write for example `in ('a', 'b')`"));
        }
        Ok(values)
    }

    fn like(&mut self, field: Field) -> Parsed {
        if matches!(field, Field::RunId | Field::Status | Field::StartedAt | Field::ClosedAt) {
            return Err(self.wrong_at(self.at - 1, "this field has no beginnings", "use =, <, > or in"));
        }
        let Some(Token::Text(pattern)) = self.peek().cloned() else {
            return Err(self
                .wrong(format!("expected a text, found {}", self.shown(self.at)), "write for example `like 'abc%'`"));
        };
        match pattern.strip_suffix('%') {
            Some(beginning) if !beginning.contains('%') => {
                self.at += 1;
                Ok(Condition::StartsWith(field, beginning.to_owned()))
            }
            Some(_) => Err(self.wrong("only beginnings can be asked for", "one `%`, at the end")),
            None => Err(self.wrong("the text has no `%` at its end", "add it, or use `=`")),
        }
    }

    fn value(&mut self, field: &Field) -> Result<Value, FilterError> {
        let found = match self.peek().cloned() {
            Some(Token::Text(text)) => Value::Text(text),
            Some(Token::Number(number)) if number.len() <= NUMBER_CHARS_MAX => Value::Number(decimal(&number)),
            Some(Token::Number(_)) => {
                return Err(self.wrong("a long number", format!("at most {NUMBER_CHARS_MAX} characters")));
            }
            Some(Token::Word(word)) if word.eq_ignore_ascii_case("true") => Value::Bool(true),
            Some(Token::Word(word)) if word.eq_ignore_ascii_case("false") => Value::Bool(false),
            Some(Token::Word(word)) if word.eq_ignore_ascii_case("null") => {
                return Err(self.wrong("null is not a value", "write `is null` or `is not null`"));
            }
            Some(Token::Word(_) | Token::Quoted(_)) => {
                let bare = self.shown(self.at);
                let bare = bare.trim_matches('`').trim_matches('"');
                return Err(
                    self.wrong(format!("expected a value, found {}", self.shown(self.at)), format!("write '{bare}'"))
                );
            }
            _ => {
                let message = format!("expected a value, found {}", self.shown(self.at));
                return Err(self.wrong(message, "write a 'text', a number, true or false"));
            }
        };
        let typed = match (field, found) {
            (Field::Attribute(_), found) => found,
            (Field::RunId, Value::Text(text)) => Value::Id(
                text.parse()
                    .map_err(|_| self.wrong("this is not the id of a run", "write all of it: 36 characters"))?,
            ),
            (Field::StartedAt | Field::ClosedAt, Value::Text(text)) => {
                Value::Instant(instant(&text).ok_or_else(|| {
                    self.wrong(
                        "this is not an instant",
                        "write 2026-11-25 or 2026-11-25T10:00:00Z, or with a zone: 2026-11-25T10:00+01:00",
                    )
                })?)
            }
            (Field::Status, Value::Text(text)) => Value::Status(RunStatus::parse(&text).ok_or_else(|| {
                let known = RunStatus::ALL.map(RunStatus::as_str);
                let help = nearest(&text.to_lowercase(), known.into())
                    .map_or_else(|| format!("one of {}", known.join(", ")), |known| format!("did you mean '{known}'?"));
                self.wrong(format!("there is no status {}", self.shown(self.at)), help)
            })?),
            (_, Value::Text(text)) => Value::Text(text),
            _ => {
                return Err(
                    self.wrong(format!("expected a text, found {}", self.shown(self.at)), "put it in single quotes")
                );
            }
        };
        self.at += 1;
        Ok(typed)
    }
}

/// A number as JSON writes it: without zeros before it.
fn decimal(written: &str) -> String {
    let (sign, digits) = written.strip_prefix('-').map_or(("", written), |rest| ("-", rest));
    let plain = digits.trim_start_matches('0');
    let zero = if plain.is_empty() || plain.starts_with('.') { "0" } else { "" };
    format!("{sign}{zero}{plain}")
}

fn negated(not: bool, condition: Condition) -> Condition {
    if not { Condition::Not(Box::new(condition)) } else { condition }
}

fn nearest(name: &str, known: Vec<&'static str>) -> Option<&'static str> {
    let scored = known.into_iter().map(|k| (strsim::jaro_winkler(k, name), k));
    scored.max_by(|a, b| a.0.total_cmp(&b.0)).filter(|(score, _)| *score >= ALIKE).map(|(_, k)| k)
}

/// RFC 3339; a date; a date and a time of a zone, or of UTC. Within what Postgres can hold and compare.
fn instant(text: &str) -> Option<DateTime<Utc>> {
    const TIMES: [&str; 2] = ["%H:%M:%S%.f", "%H:%M"];
    let day = || text.parse::<NaiveDate>().ok()?.and_hms_opt(0, 0, 0).map(|t| t.and_utc());
    let formats = || TIMES.iter().flat_map(|time| ["T", " "].map(|between| format!("%Y-%m-%d{between}{time}")));
    let plain = text.strip_suffix(['Z', 'z']).unwrap_or(text);
    let utc = || formats().find_map(|f| NaiveDateTime::parse_from_str(plain, &f).ok()).map(|t| t.and_utc());
    let zoned = || {
        let formats = formats().flat_map(|f| [format!("{f}%#z"), format!("{f} %#z")]);
        formats.into_iter().find_map(|f| DateTime::parse_from_str(text, &f).ok()).map(|t| t.with_timezone(&Utc))
    };
    let parsed = DateTime::parse_from_rfc3339(text).map(|t| t.with_timezone(&Utc)).ok();
    parsed.or_else(day).or_else(utc).or_else(zoned).filter(|t| (0..=9999).contains(&chrono::Datelike::year(t)))
}

#[cfg(test)]
#[path = "parse_tests.rs"]
mod tests;
