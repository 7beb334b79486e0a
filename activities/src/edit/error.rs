//! Why edits were refused, in words that a model can act on.

use super::{EDITS_MAX, FILE_BYTES_MAX, path::PathError};
use loopwright_engine::Failure;
use std::fmt;

/// A refused call: which block, in which file, and why. Nothing of the call was applied.
#[derive(Clone, Debug, PartialEq)]
pub struct EditError {
    /// 0-based position of the edit in the call; `None` when the call as a whole is refused.
    pub index: Option<usize>,
    /// As the model wrote it; empty when the call as a whole is refused.
    pub path: String,
    pub reason: Reason,
}

/// Why an edit was refused.
#[derive(Clone, Debug, PartialEq)]
pub enum Reason {
    Path(PathError),
    /// The implementer may not change this file.
    Frozen,
    TooMany(usize),
    NoEdits,
    TooLarge(usize),
    /// A NUL in a text.
    Binary,
    /// A block of a file that does not exist.
    Missing,
    /// A file where a folder is needed, or the reverse.
    Occupied(String),
    EmptySearch,
    NotFound {
        /// Line-numbered text of the most similar place; empty when nothing is similar.
        nearest: String,
    },
    Ambiguous {
        /// 1-based first lines of the places, at most ten.
        lines: Vec<usize>,
    },
    /// The block matches an outdented place, but the replacement has less indentation than would go.
    Indentation {
        line: usize,
    },
    Syntax {
        language: &'static str,
        /// 1-based.
        line: usize,
        what: String,
        /// Line-numbered text around the place.
        around: String,
    },
    /// The file could not be read.
    Read(Box<Failure>),
}

impl EditError {
    /// The infrastructure failure behind it, if it is one that a model cannot cure.
    #[must_use]
    pub fn failure(&self) -> Option<&Failure> {
        match &self.reason {
            Reason::Read(failure) if failure.kind != loopwright_engine::FailureKind::Permanent => Some(failure),
            _ => None,
        }
    }
}

impl fmt::Display for EditError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.index {
            Some(index) => write!(f, "edit {} ({:?}) was refused: ", index + 1, self.path)?,
            None => f.write_str("the edits were refused: ")?,
        }
        match &self.reason {
            Reason::Path(error) => write!(f, "that is not a usable path: {error}."),
            Reason::Frozen => f.write_str("this file is frozen: the plan owns it. Change other files."),
            Reason::TooMany(count) => write!(f, "{count} edits in one call; at most {EDITS_MAX}."),
            Reason::NoEdits => f.write_str("the list of edits is empty."),
            Reason::TooLarge(bytes) => write!(f, "the file would have {bytes} bytes; at most {FILE_BYTES_MAX}."),
            Reason::Binary => f.write_str("the text contains NUL; only text files can be edited."),
            Reason::Missing => f.write_str("the file does not exist. Use op \"write\" with its whole content."),
            Reason::Occupied(other) => write!(f, "{other:?} is already there as something else (file or folder)."),
            Reason::EmptySearch => {
                f.write_str("`search` is empty. Give the lines to be replaced, or use op \"write\" for the whole file.")
            }
            Reason::NotFound { nearest } if nearest.is_empty() => f.write_str(
                "`search` does not occur in the file and nothing resembles it. Read the file and copy the lines exactly.",
            ),
            Reason::NotFound { nearest } => {
                write!(f, "`search` does not occur in the file. The nearest lines are:\n{nearest}Copy them exactly.")
            }
            Reason::Ambiguous { lines } => {
                let lines: Vec<_> = lines.iter().map(ToString::to_string).collect();
                write!(
                    f,
                    "`search` occurs more than once (from lines {}). Add neighboring lines until it is unique.",
                    lines.join(", ")
                )
            }
            Reason::Indentation { line } => write!(
                f,
                "`search` matches at line {line} with less indentation, but `replace` has lines that cannot be moved as far left. Use the file's own indentation in both."
            ),
            Reason::Syntax { language, line, what, around } => write!(
                f,
                "the result would not be valid {language}: {what} at line {line}. The result there would be:\n{around}Correct it and send all edits of this call again."
            ),
            Reason::Read(failure) => write!(f, "the file cannot be read: {}.", failure.message),
        }?;
        f.write_str(" Nothing was changed.")
    }
}

impl std::error::Error for EditError {}
