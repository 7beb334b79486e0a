//! An incremental decoder of server-sent events, as tolerant as the servers are odd.
//!
//! It accepts LF, CRLF and CR line ends, comments, several `data:` lines in one event, a missing space after the
//! colon, a byte order mark, a missing blank line at the end, and bytes cut anywhere (in the middle of a UTF-8
//! character included). Lines that belong to no field are collected: Gemini reports an error in mid-stream as bare
//! JSON lines. It does not know what an event means.

use serde_json::Value;

/// Largest event that is put together, in bytes. Equal to the limit of a whole body: one event may be all of it.
pub const EVENT_BYTES_MAX: usize = super::BODY_BYTES_MAX;

/// Ends a stream of the chat-completions dialect.
pub(super) const DONE: &str = "[DONE]";
/// Largest bare document that is recognized before the stream ends, in bytes: an error has a few hundred.
const BARE_BYTES_MAX: usize = 64 * 1024;
/// How often it is held against the parser; an error has some ten closing lines. Without both limits, a hostile stream of
/// brackets would keep a processor busy for minutes.
const BARE_TRIES_MAX: u32 = 256;

/// One thing that a stream said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The joined `data:` lines of one event.
    Data(String),
    /// A JSON document that stood in the stream without any `data:` in front.
    Bare(String),
}

/// An event grew beyond [`EVENT_BYTES_MAX`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an event of the stream exceeds {EVENT_BYTES_MAX} bytes")]
pub struct EventTooLarge;

/// The documents of one event. Several `data:` lines are one text by the standard, but some proxies forget the empty line
/// between events: where the text as a whole is no JSON, each of its lines has to be.
///
/// # Errors
/// Neither of both is JSON.
pub(super) fn documents(text: &str) -> Result<Vec<(Value, &str)>, serde_json::Error> {
    match serde_json::from_str::<Value>(text) {
        Ok(value) => Ok(vec![(value, text)]),
        Err(_) if text.trim().contains('\n') => text
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty() && *line != DONE)
            .map(|line| Ok((serde_json::from_str(line)?, line)))
            .collect(),
        Err(error) => Err(error),
    }
}

/// Turns chunks of bytes into events.
#[derive(Debug, Default)]
pub struct Decoder {
    line: Vec<u8>,
    data: String,
    has_data: bool,
    bare: String,
    bare_tries: u32,
    /// The last byte was CR: an LF that follows belongs to the same line end.
    after_cr: bool,
    started: bool,
}

impl Decoder {
    /// A decoder at the beginning of a stream.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the next bytes and appends the events they complete to `out`.
    ///
    /// # Errors
    /// [`EventTooLarge`]; the decoder is of no use afterwards.
    pub fn push(&mut self, bytes: &[u8], out: &mut Vec<Event>) -> Result<(), EventTooLarge> {
        for &byte in bytes {
            match byte {
                b'\n' if self.after_cr => self.after_cr = false,
                b'\n' | b'\r' => {
                    self.after_cr = byte == b'\r';
                    self.end_line(out);
                }
                _ => {
                    self.after_cr = false;
                    if self.line.len() + self.data.len() + self.bare.len() >= EVENT_BYTES_MAX {
                        return Err(EventTooLarge);
                    }
                    self.line.push(byte);
                }
            }
        }
        Ok(())
    }

    /// The stream has ended: what is pending is delivered even if its blank line is missing.
    pub fn finish(&mut self, out: &mut Vec<Event>) {
        if !self.line.is_empty() {
            self.end_line(out);
        }
        self.dispatch(out);
        let bare = std::mem::take(&mut self.bare);
        if !bare.trim().is_empty() {
            out.push(Event::Bare(bare));
        }
    }

    fn end_line(&mut self, out: &mut Vec<Event>) {
        let bytes = std::mem::take(&mut self.line);
        let text = String::from_utf8_lossy(&bytes);
        let mut line = text.as_ref();
        if !self.started {
            self.started = true;
            line = line.strip_prefix('\u{feff}').unwrap_or(line);
        }
        if line.is_empty() {
            self.dispatch(out);
            return;
        }
        if line.starts_with(':') {
            return;
        }
        if let Some(value) = field(line, "data") {
            if self.has_data {
                self.data.push('\n');
            }
            self.data.push_str(value);
            self.has_data = true;
            return;
        }
        if field(line, "event").or_else(|| field(line, "id")).or_else(|| field(line, "retry")).is_some() {
            return;
        }
        self.bare.push_str(line);
        self.bare.push('\n');
        // A closing bracket may end the document; asking the parser is the only sure way to know.
        let may_end = line.trim_end().ends_with(['}', ']'])
            && self.bare.len() <= BARE_BYTES_MAX
            && self.bare_tries < BARE_TRIES_MAX;
        if may_end {
            self.bare_tries += 1;
            if serde_json::from_str::<Value>(&self.bare).is_ok() {
                self.bare_tries = 0;
                out.push(Event::Bare(std::mem::take(&mut self.bare)));
            }
        }
    }

    fn dispatch(&mut self, out: &mut Vec<Event>) {
        if self.has_data {
            self.has_data = false;
            out.push(Event::Data(std::mem::take(&mut self.data)));
        }
    }
}

/// The value of `line` if it is the field `name`, without the one optional space after the colon.
fn field<'a>(line: &'a str, name: &str) -> Option<&'a str> {
    let rest = line.strip_prefix(name)?;
    if rest.is_empty() {
        return Some("");
    }
    let value = rest.strip_prefix(':')?;
    Some(value.strip_prefix(' ').unwrap_or(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode_in_pieces(bytes: &[u8], size: usize) -> Vec<Event> {
        let mut decoder = Decoder::new();
        let mut out = Vec::new();
        for piece in bytes.chunks(size) {
            decoder.push(piece, &mut out).unwrap();
        }
        decoder.finish(&mut out);
        out
    }

    fn check(bytes: &[u8], expected: &[Event]) {
        for size in [1, 2, 3, 7, bytes.len().max(1)] {
            assert_eq!(decode_in_pieces(bytes, size), expected, "in pieces of {size}");
        }
    }

    fn data(text: &str) -> Event {
        Event::Data(text.to_owned())
    }

    #[test]
    fn line_ends_comments_and_missing_space_do_not_matter() {
        check(
            "data: a\n\ndata:b\r\n\r\n: comment\r\rdata: c\r\rdata: d".as_bytes(),
            &[data("a"), data("b"), data("c"), data("d")],
        );
    }

    #[test]
    fn several_data_lines_are_one_event() {
        check(b"event: x\nid: 1\nretry: 5\ndata: a\ndata: b\n\n", &[data("a\nb")]);
    }

    #[test]
    fn lines_that_are_no_document_together_are_read_one_by_one() {
        let values = |text| documents(text).map(|all| all.into_iter().map(|(value, _)| value).collect::<Vec<_>>());
        assert_eq!(values("{\"a\":\n1}").unwrap(), [serde_json::json!({"a": 1})]);
        assert_eq!(values("{\"a\":1}\n[2]\n[DONE]").unwrap(), [serde_json::json!({"a": 1}), serde_json::json!([2])]);
        assert!(values("{").is_err() && values("{\"a\":1}\n{").is_err());
    }

    #[test]
    fn characters_survive_being_cut() {
        check("\u{feff}data: \u{1f980}\u{e4}\r\n\r\n".as_bytes(), &[data("\u{1f980}\u{e4}")]);
    }

    #[test]
    fn bare_json_lines_are_kept_together() {
        let text = "data: 1\n\n{\n  \"error\": {\n    \"code\": 503\n  }\n}\n\ndata: 2\n\n";
        let out = decode_in_pieces(text.as_bytes(), 5);
        assert_eq!(out[0], data("1"));
        let Event::Bare(bare) = &out[1] else { panic!("{out:?}") };
        assert_eq!(serde_json::from_str::<Value>(bare).unwrap()["error"]["code"], 503);
        assert_eq!(out[2], data("2"));
    }

    #[test]
    fn a_stream_of_brackets_costs_no_more_than_reading_it() {
        let mut decoder = Decoder::new();
        let mut out = Vec::new();
        let begin = format!("\"{}\n", "x".repeat(1 << 20));
        decoder.push(begin.as_bytes(), &mut out).unwrap();
        let brackets = "}\n".repeat(1 << 20);
        let started = std::time::Instant::now();
        decoder.push(brackets.as_bytes(), &mut out).unwrap();
        // A parser asked a million times about a megabyte would take hours.
        assert!(out.is_empty() && started.elapsed().as_secs() < 30);
    }

    #[test]
    fn a_stream_of_comments_says_nothing() {
        check(b": OPENROUTER PROCESSING\n\n: OPENROUTER PROCESSING\n\n", &[]);
    }

    #[test]
    fn an_endless_line_is_refused() {
        let mut decoder = Decoder::new();
        let mut out = Vec::new();
        let piece = vec![b'x'; 1 << 20];
        let refused = (0..=EVENT_BYTES_MAX / piece.len() + 1).any(|_| decoder.push(&piece, &mut out).is_err());
        assert!(refused && out.is_empty());
    }
}
