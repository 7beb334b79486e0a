//! Which texts are paths of a project.

use std::fmt;

/// Longest path, in bytes. Chosen below the 4096 of Linux, so that a workspace folder before it still fits.
pub const PATH_BYTES_MAX: usize = 512;
/// Longest name of one folder or file, in bytes: the limit of Linux file systems.
pub const NAME_BYTES_MAX: usize = 255;

/// Why a text is not a path of a project.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PathError {
    Empty,
    Absolute,
    Parent,
    Git,
    Character,
    Segment,
    Long,
}

impl fmt::Display for PathError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Empty => "it is empty",
            Self::Absolute => "it is absolute; give it relative to the root of the project",
            Self::Parent => "it contains `..`; paths stay inside the project",
            Self::Git => "it names git's own folder",
            Self::Character => "it contains a backslash, NUL or another control character",
            Self::Segment => "it has an empty or `.` part or ends with `/`; name one file",
            Self::Long => "it is too long",
        })
    }
}

/// The normal form of a path inside a project: a leading `./` goes, nothing else is forgiven.
///
/// # Errors
/// A [`PathError`] for everything that is absolute, climbs, reaches into `.git`, or could mean two files.
pub fn normal(path: &str) -> Result<String, PathError> {
    let mut rest = path;
    while let Some(stripped) = rest.strip_prefix("./") {
        rest = stripped;
    }
    if rest.is_empty() {
        return Err(PathError::Empty);
    }
    if rest.len() > PATH_BYTES_MAX {
        return Err(PathError::Long);
    }
    if rest.starts_with('/') || rest.starts_with('~') {
        return Err(PathError::Absolute);
    }
    if rest.chars().any(|c| c == '\\' || c.is_control()) {
        return Err(PathError::Character);
    }
    for name in rest.split('/') {
        match name {
            ".." => return Err(PathError::Parent),
            "" | "." => return Err(PathError::Segment),
            _ if name.len() > NAME_BYTES_MAX => return Err(PathError::Long),
            _ if is_git(name) => return Err(PathError::Git),
            _ => {}
        }
    }
    Ok(rest.to_owned())
}

/// The names that git itself refuses in a tree, because some file system takes them for `.git`.
fn is_git(name: &str) -> bool {
    let lower = name.to_ascii_lowercase();
    let bare = lower.split(':').next().unwrap_or(&lower).trim_end_matches([' ', '.']);
    bare == ".git" || bare == "git~1"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_paths_inside_the_project_are_paths() {
        for (path, expected) in [
            ("src/main.py", Ok("src/main.py")),
            ("./a", Ok("a")),
            ("././a/b", Ok("a/b")),
            (".gitignore", Ok(".gitignore")),
            (".github/workflows/ci.yml", Ok(".github/workflows/ci.yml")),
            ("a b/ü.txt", Ok("a b/ü.txt")),
            ("..a/b..", Ok("..a/b..")),
            ("", Err(PathError::Empty)),
            ("./", Err(PathError::Empty)),
            ("/etc/passwd", Err(PathError::Absolute)),
            (".//etc/passwd", Err(PathError::Absolute)),
            ("~/x", Err(PathError::Absolute)),
            ("../x", Err(PathError::Parent)),
            ("a/../../x", Err(PathError::Parent)),
            ("a/..", Err(PathError::Parent)),
            ("a//b", Err(PathError::Segment)),
            ("a/./b", Err(PathError::Segment)),
            ("a/", Err(PathError::Segment)),
            (".", Err(PathError::Segment)),
            (".git/config", Err(PathError::Git)),
            ("sub/.GIT/hooks/post-commit", Err(PathError::Git)),
            (".git. /x", Err(PathError::Git)),
            (".git::$INDEX_ALLOCATION/x", Err(PathError::Git)),
            ("GIT~1/config", Err(PathError::Git)),
            ("a\\b", Err(PathError::Character)),
            ("a\0b", Err(PathError::Character)),
            ("a\nb", Err(PathError::Character)),
        ] {
            assert_eq!(normal(path).as_deref(), expected.as_ref().copied(), "{path:?}");
        }
        assert_eq!(normal(&"a".repeat(256)), Err(PathError::Long));
        assert_eq!(normal(&"a/".repeat(300)), Err(PathError::Long));
    }
}
