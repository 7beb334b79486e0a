//! Finding the one place in a file that a search block means.

use super::error::Reason;
use similar::TextDiff;
use std::time::Duration;

/// Lines of context shown for a block that was not found. Enough to copy from, small enough not to be a read.
const NEAREST_LINES_MAX: usize = 24;
/// Longest line that is shown or compared, in characters.
const LINE_CHARS_MAX: usize = 300;
/// Candidate places compared character by character; each costs up to [`COMPARE_TIME`].
const CANDIDATES_MAX: usize = 5;
/// Lines of a block that take part in the search for similar places.
const BLOCK_LINES_MAX: usize = 200;
/// Longest comparison of two texts.
const COMPARE_TIME: Duration = Duration::from_millis(50);
/// Likeness from which a place is worth showing, 0 to 1. Chosen, not measured.
const LIKENESS_MIN: f32 = 0.45;
/// Places listed for an ambiguous block.
const PLACES_MAX: usize = 10;

/// What a replacement comes to.
#[derive(Debug, PartialEq)]
pub(super) enum Outcome {
    /// The file's new text.
    Replaced(String),
    /// The file already reads as if the replacement had been made.
    Already,
}

/// Replaces the one place in `text` that `search` means.
///
/// Tried in this order: exact text (line ends of the file), whole lines with one uniform shift of indentation. A
/// block that is not found but whose replacement stands in the file as whole lines, once, counts as applied.
pub(super) fn replace(text: &str, search: &str, replace: &str) -> Result<Outcome, Reason> {
    let crlf = text.contains("\r\n") && !search.contains('\r');
    let (search, replace) = if crlf {
        (search.replace('\n', "\r\n"), replace.replace("\r\n", "\n").replace('\n', "\r\n"))
    } else {
        (search.to_owned(), replace.to_owned())
    };
    let (search, replace) = (search.as_str(), replace.as_str());
    if search.trim().is_empty() {
        return Err(Reason::EmptySearch);
    }
    if search == replace {
        return if text.contains(search) { Ok(Outcome::Already) } else { Err(not_found(text, search)) };
    }

    let exact = occurrences(text, search);
    if !exact.is_empty() && inside_replacement(text, search, replace, &exact) {
        return Ok(Outcome::Already);
    }
    match exact.as_slice() {
        [at] => return Ok(Outcome::Replaced(format!("{}{replace}{}", &text[..*at], &text[at + search.len()..]))),
        [] => {}
        many => {
            return Err(Reason::Ambiguous {
                lines: many.iter().take(PLACES_MAX).map(|at| line_of(text, *at)).collect(),
            });
        }
    }

    let lines = Lines::of(text);
    let block = Block::of(search);
    match shifted(&lines, &block).as_slice() {
        [place] => lines.put(place, &block, replace).map(Outcome::Replaced),
        [] if stands(&lines, replace) => Ok(Outcome::Already),
        [] => Err(not_found(text, search)),
        many => Err(Reason::Ambiguous { lines: many.iter().take(PLACES_MAX).map(|p| p.first + 1).collect() }),
    }
}

/// Byte positions of `needle`, overlapping ones included, so that "unique" is not an accident of the scan.
fn occurrences(text: &str, needle: &str) -> Vec<usize> {
    let mut found = Vec::new();
    let mut from = 0;
    while let Some(at) = text[from..].find(needle) {
        found.push(from + at);
        // The next start must be a character border of `text`.
        from += at + text[from + at..].chars().next().map_or(1, char::len_utf8);
    }
    found
}

/// Whether the replacement contains the search block and every place of the block lies inside a place of the
/// replacement: the edit was made before, and making it again would double it.
fn inside_replacement(text: &str, search: &str, replace: &str, exact: &[usize]) -> bool {
    if !replace.contains(search) {
        return false;
    }
    let done = occurrences(text, replace);
    !done.is_empty()
        && exact.iter().all(|at| done.iter().any(|start| *start <= *at && at + search.len() <= start + replace.len()))
}

/// Whether `replace` stands in the file as whole lines, exactly once, and says something.
fn stands(lines: &Lines<'_>, replace: &str) -> bool {
    let block = Block::of(replace);
    block.lines.iter().any(|l| l.chars().any(char::is_alphanumeric)) && shifted(lines, &block).len() == 1
}

/// The lines of a file with their places.
struct Lines<'t> {
    text: &'t str,
    /// Start, end without line break, end with line break; in bytes.
    spans: Vec<(usize, usize, usize)>,
}

impl<'t> Lines<'t> {
    fn of(text: &'t str) -> Self {
        let mut spans = Vec::new();
        let mut start = 0;
        for piece in text.split_inclusive('\n') {
            let end = start + piece.len();
            let bare = piece.strip_suffix('\n').map_or(piece, |p| p.strip_suffix('\r').unwrap_or(p));
            spans.push((start, start + bare.len(), end));
            start = end;
        }
        Self { text, spans }
    }

    fn get(&self, index: usize) -> &'t str {
        let (start, end, _) = self.spans[index];
        &self.text[start..end]
    }

    /// The text with `replace` in the given place, indented as the place is.
    fn put(&self, place: &Place, block: &Block<'_>, replace: &str) -> Result<String, Reason> {
        let (first, last) = (place.first, place.first + block.lines.len() - 1);
        let newline = if self.text.contains("\r\n") { "\r\n" } else { "\n" };
        let mut moved = Vec::new();
        for line in Block::of(replace).lines {
            moved.push(match &place.shift {
                _ if line.trim().is_empty() => String::new(),
                Shift::Right(prefix) => format!("{prefix}{line}"),
                Shift::Left(prefix) => match line.strip_prefix(prefix.as_str()) {
                    Some(rest) => rest.to_owned(),
                    None => return Err(Reason::Indentation { line: first + 1 }),
                },
            });
        }
        let (start, end, after) = (self.spans[first].0, self.spans[last].1, self.spans[last].2);
        // Lines that are replaced by nothing take their line break with them.
        let end = if replace.is_empty() { after } else { end };
        Ok(format!("{}{}{}", &self.text[..start], moved.join(newline), &self.text[end..]))
    }
}

/// A search block as lines, without its last line break.
struct Block<'t> {
    lines: Vec<&'t str>,
}

impl<'t> Block<'t> {
    fn of(text: &'t str) -> Self {
        Self { lines: text.lines().collect() }
    }
}

/// How far a place is indented beyond the block.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Shift {
    /// The file has this much more.
    Right(String),
    /// The file has this much less.
    Left(String),
}

struct Place {
    /// 0-based line.
    first: usize,
    shift: Shift,
}

/// All places where the block's lines stand with one uniform shift of indentation; blank lines match blank lines.
fn shifted(lines: &Lines<'_>, block: &Block<'_>) -> Vec<Place> {
    let wanted = block.lines.len();
    if wanted == 0 || wanted > lines.spans.len() || block.lines.iter().all(|l| l.trim().is_empty()) {
        return Vec::new();
    }
    (0..=lines.spans.len() - wanted)
        .filter_map(|first| {
            let mut shift: Option<Shift> = None;
            for (offset, wanted) in block.lines.iter().enumerate() {
                let have = lines.get(first + offset);
                match (have.trim().is_empty(), wanted.trim().is_empty()) {
                    (true, true) => continue,
                    (false, false) => {}
                    _ => return None,
                }
                let one = shift_between(have, wanted)?;
                match &shift {
                    None => shift = Some(one),
                    Some(known) if *known == one => {}
                    Some(_) => return None,
                }
            }
            shift.map(|shift| Place { first, shift })
        })
        .collect()
}

/// The shift that makes `wanted` into `have`, if indentation at the front is all they differ in.
fn shift_between(have: &str, wanted: &str) -> Option<Shift> {
    let blank = |prefix: &str| prefix.chars().all(|c| c == ' ' || c == '\t');
    if let Some(prefix) = have.strip_suffix(wanted).filter(|p| blank(p)) {
        return Some(Shift::Right(prefix.to_owned()));
    }
    wanted.strip_suffix(have).filter(|p| blank(p)).map(|prefix| Shift::Left(prefix.to_owned()))
}

fn line_of(text: &str, at: usize) -> usize {
    text[..at].matches('\n').count() + 1
}

/// The refusal of a block that is not there, with the most similar lines of the file.
fn not_found(text: &str, search: &str) -> Reason {
    Reason::NotFound { nearest: nearest(text, search) }
}

fn nearest(text: &str, search: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    let block: Vec<&str> = search.lines().skip_while(|l| l.trim().is_empty()).take(BLOCK_LINES_MAX).collect();
    if lines.is_empty() || block.is_empty() {
        return String::new();
    }
    // Cheap score first: lines equal but for white space, then shared words of the first telling line.
    let telling = block.iter().max_by_key(|l| l.trim().chars().count()).map_or("", |l| l.trim());
    let telling_at = block.iter().position(|l| l.trim() == telling).unwrap_or(0);
    let words = |line: &str| -> Vec<String> {
        line.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|w| w.len() > 1).map(str::to_owned).collect()
    };
    let telling_words = words(telling);
    let mut scored: Vec<(usize, usize)> = (0..lines.len())
        .map(|first| {
            let equal =
                block.iter().zip(&lines[first..]).filter(|(a, b)| !a.trim().is_empty() && a.trim() == b.trim()).count();
            let shared = lines.get(first + telling_at).map_or(0, |line| {
                let have = words(line);
                telling_words.iter().filter(|w| have.contains(w)).count()
            });
            (equal * 4 + shared, first)
        })
        .filter(|(score, _)| *score > 0)
        .collect();
    scored.sort_by(|a, b| b.0.cmp(&a.0).then(a.1.cmp(&b.1)));

    let wanted = clip_lines(&block);
    let best = scored
        .iter()
        .take(CANDIDATES_MAX)
        .map(|(_, first)| {
            let end = (first + block.len()).min(lines.len());
            let have = clip_lines(&lines[*first..end]);
            let likeness =
                TextDiff::configure().timeout(COMPARE_TIME).diff_chars(have.as_str(), wanted.as_str()).ratio();
            (likeness, *first, end)
        })
        .max_by(|a, b| a.0.total_cmp(&b.0).then(b.1.cmp(&a.1)));
    match best {
        Some((likeness, first, end)) if likeness >= LIKENESS_MIN => {
            numbered(&lines, first.saturating_sub(1), (end + 1).min(lines.len()))
        }
        _ => String::new(),
    }
}

fn clip(line: &str) -> String {
    match line.char_indices().nth(LINE_CHARS_MAX) {
        Some((at, _)) => format!("{}…", &line[..at]),
        None => line.to_owned(),
    }
}

fn clip_lines(lines: &[&str]) -> String {
    lines.iter().take(NEAREST_LINES_MAX).map(|l| clip(l.trim())).collect::<Vec<_>>().join("\n")
}

/// Lines `first..end` (0-based) with their numbers, capped.
pub(super) fn numbered(lines: &[&str], first: usize, end: usize) -> String {
    lines
        .iter()
        .enumerate()
        .take(end)
        .skip(first)
        .take(NEAREST_LINES_MAX)
        .map(|(at, line)| format!("{:>5}| {}\n", at + 1, clip(line)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(text: &str, search: &str, with: &str) -> String {
        match replace(text, search, with) {
            Ok(Outcome::Replaced(text)) => text,
            Ok(Outcome::Already) => "<already>".to_owned(),
            Err(Reason::Ambiguous { lines }) => format!("<ambiguous {lines:?}>"),
            Err(Reason::NotFound { nearest }) => format!("<not found>\n{nearest}"),
            Err(Reason::Indentation { line }) => format!("<indentation {line}>"),
            Err(Reason::EmptySearch) => "<empty>".to_owned(),
            Err(other) => format!("{other:?}"),
        }
    }

    #[test]
    fn blocks_are_found_exactly_or_shifted_and_only_once() {
        for (what, text, search, with, expected) in [
            ("exact", "a\nb\nc\n", "b\n", "B\n", "a\nB\nc\n"),
            ("part of a line", "let x = 1;", "1", "2", "let x = 2;"),
            ("deletion", "a\nb\nc\n", "b\n", "", "a\nc\n"),
            ("deletion of shifted lines", "a\n  b\n  c\nd\n", "b\nc\n", "", "a\nd\n"),
            ("twice", "x\ny\nx\n", "x\n", "z\n", "<ambiguous [1, 3]>"),
            ("overlapping", "aaa", "aa", "b", "<ambiguous [1, 1]>"),
            ("last line without break", "a\nb", "b\n", "c\n", "a\nc"),
            ("shifted right", "if x:\n    a()\n    b()\n", "a()\nb()\n", "c()\n", "if x:\n    c()\n"),
            (
                "shifted right keeps inner shape",
                "class A:\n  def f():\n    x\n",
                "def f():\n  x\n",
                "def f():\n\n  y\n",
                "class A:\n  def f():\n\n    y\n",
            ),
            (
                "shifted left",
                "def f():\n  x\n",
                "    def f():\n      x\n",
                "    def g():\n      x\n",
                "def g():\n  x\n",
            ),
            ("shifted left too far", "def f():\n  x\n", "    def f():\n      x\n", "  y\n", "<indentation 1>"),
            ("tabs", "{\n\t\ta\n\t\tb\n}", "\ta\n\tb", "\tc", "{\n\t\tc\n}"),
            ("uneven shift", "  a\n   b\n", " a\n b\n", "c", "<not found>\n    1|   a\n    2|    b\n"),
            ("shifted twice", " a\n b\n  a\n  b\n", "   a\n   b\n", "c", "<ambiguous [1, 3]>"),
            ("blank lines of another width", "a\n  \nb\n", "a\n\nb\n", "c\n", "c\n"),
            ("windows line ends", "a\r\nb\r\nc\r\n", "a\nb\n", "x\ny\n", "x\r\ny\r\nc\r\n"),
            ("windows, shifted", "{\r\n  a\r\n  b\r\n}\r\n", "a\nb", "x\ny", "{\r\n  x\r\n  y\r\n}\r\n"),
            ("already there", "fn f() {\n    new();\n}\n", "old();\n", "new();\n", "<already>"),
            ("already there, grown", "use a;\nuse b;\n", "use a;\n", "use a;\nuse b;\n", "<already>"),
            ("grown for the first time", "use a;\n", "use a;\n", "use a;\nuse b;\n", "use a;\nuse b;\n"),
            ("a brace is no evidence", "}\n", "old();\n", "}\n", "<not found>\n"),
            ("twice is no evidence", "new();\nnew();\n", "old();\n", "new();\n", "<not found>\n"),
            ("same text", "a\n", "a", "a", "<already>"),
            ("empty", "a\n", " \n", "b", "<empty>"),
            ("umlauts", "ää", "ä", "b", "<ambiguous [1, 1]>"),
        ] {
            if what == "twice is no evidence" {
                assert!(run(text, search, with).starts_with("<not found>"), "{what}");
                continue;
            }
            assert_eq!(run(text, search, with), expected, "{what}");
        }
    }

    #[test]
    fn a_refused_block_is_answered_with_the_nearest_lines() {
        let text =
            "fn one() {\n    first();\n}\n\nfn two(count: u32) {\n    let total = count + 1;\n    print(total);\n}\n";
        let answer = run(text, "fn two(count: u64) {\n    let total = count + 2;\n", "x");
        assert!(answer.contains("    5| fn two(count: u32) {\n    6|     let total = count + 1;\n"), "{answer}");
        assert!(run(text, "SELECT nothing FROM anywhere", "x").ends_with("<not found>\n"));
    }
}
