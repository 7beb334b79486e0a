//! The files of a folder, and reading one of them. Nothing outside of the folder is read.

use super::IndexError;
use ignore::{DirEntry, WalkBuilder};
use serde::{Deserialize, Serialize};
use std::{
    io::Read as _,
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::Path,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// Files of an index. A repository with more is not one project; a walk over more takes seconds.
const FILES_MAX: usize = 100_000;
/// Text of an index in bytes, in the order of the paths; the rest is findable by path.
const TEXT_BYTES_MAX: u64 = 512 << 20;
/// Largest file that is read; larger ones are data. The edit gate has the same limit.
pub(super) const FILE_BYTES_MAX: u64 = 1 << 20;
/// Longest line in bytes; longer ones are data or made by a machine.
const LINE_BYTES_MAX: usize = 8000;
/// Longest path in bytes.
const PATH_BYTES_MAX: usize = 1024;
/// A file written so shortly before it was read may be written again under the same stamp; it is read again instead.
const UNSETTLED: Duration = Duration::from_secs(2);

/// Folders that hold copies, builds and caches, wherever they are.
const SKIPPED_FOLDERS: &[&str] = &[
    ".git",
    ".hg",
    ".svn",
    ".jj",
    "node_modules",
    "bower_components",
    "__pycache__",
    ".venv",
    ".tox",
    ".nox",
    ".mypy_cache",
    ".pytest_cache",
    ".ruff_cache",
    ".gradle",
    ".next",
    ".nuxt",
    ".terraform",
    ".bundle",
    ".eggs",
    ".parcel-cache",
    ".turbo",
];
/// `target` is a build folder only beside one of these.
const TARGET_OWNERS: &[&str] = &["Cargo.toml", "pom.xml", "build.sbt"];
/// Files that mark the folder they are in as something that tools made.
const MADE_BY_TOOLS: &[&str] = &["CACHEDIR.TAG", "pyvenv.cfg"];

/// What tells a changed file from an unchanged one without reading it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Stamp {
    pub(super) bytes: u64,
    /// Times in nanoseconds since 1970; `changed_ns` cannot be set back by a program.
    modified_ns: i64,
    changed_ns: i64,
    inode: u64,
}

/// A file as the walk saw it.
#[derive(Clone, Debug)]
pub(super) struct Seen {
    pub(super) path: String,
    pub(super) stamp: Stamp,
    /// Beyond [`TEXT_BYTES_MAX`]: by path only.
    pub(super) beyond: bool,
}

/// What a walk saw, by path, and what it left out.
pub(super) struct Walked {
    pub(super) files: Vec<Seen>,
    pub(super) left_out: Vec<(String, String)>,
}

/// A file's content.
pub(super) enum Content {
    Text(String),
    /// Findable by path only, and why.
    PathOnly(&'static str),
    /// It went away since the walk.
    Gone,
}

/// The regular files below `root` that version control would keep, in order; symbolic links are not followed.
///
/// # Errors
/// `index.disk` when `root` is no readable folder. What cannot be read below it is left out and named.
pub(super) fn walk(root: &Path) -> Result<Walked, IndexError> {
    walk_up_to(root, FILES_MAX)
}

fn walk_up_to(root: &Path, files_max: usize) -> Result<Walked, IndexError> {
    let disk = |source| IndexError::Disk { path: root.to_owned(), source };
    // An unreadable root is no empty project.
    std::fs::read_dir(root).map_err(disk)?;
    let mut walked = Walked { files: Vec::new(), left_out: Vec::new() };
    let walker = WalkBuilder::new(root)
        .hidden(false)
        .parents(false)
        .git_global(false)
        .git_exclude(false)
        .require_git(false)
        .follow_links(false)
        .sort_by_file_name(std::ffi::OsStr::cmp)
        .filter_entry(|entry| entry.depth() == 0 || !is_skipped(entry))
        .build();
    for entry in walker {
        let entry = match entry {
            Ok(entry) => entry,
            Err(error) => {
                walked.left_out.push((".".to_owned(), format!("cannot be read: {}", without_root(&error, root))));
                continue;
            }
        };
        if !entry.file_type().is_some_and(|kind| kind.is_file()) {
            continue;
        }
        let relative = entry.path().strip_prefix(root).unwrap_or(entry.path());
        let Some(path) = relative.to_str() else {
            walked.left_out.push((relative.to_string_lossy().into_owned(), "its name is not UTF-8".to_owned()));
            continue;
        };
        if path.len() > PATH_BYTES_MAX || path.contains(['\n', '\r']) {
            walked.left_out.push((path.chars().take(80).collect(), "its name is no usable path".to_owned()));
            continue;
        }
        if walked.files.len() == files_max {
            walked
                .left_out
                .push((".".to_owned(), format!("more than {files_max} files; those after {path:?} are left out")));
            break;
        }
        // Gone since the folder was listed.
        let Ok(about) = entry.metadata() else { continue };
        walked.files.push(Seen { path: path.to_owned(), stamp: Stamp::of(&about), beyond: false });
    }
    walked.files.sort_by(|a, b| a.path.cmp(&b.path));
    let mut total = 0;
    for file in &mut walked.files {
        if file.stamp.bytes <= FILE_BYTES_MAX {
            total += file.stamp.bytes;
            file.beyond = total > TEXT_BYTES_MAX;
        }
    }
    Ok(walked)
}

fn is_skipped(entry: &DirEntry) -> bool {
    // `.git` of a linked worktree is a file.
    let Some(name) = entry.file_name().to_str() else { return false };
    if SKIPPED_FOLDERS.contains(&name) && (name == ".git" || entry.file_type().is_some_and(|kind| kind.is_dir())) {
        return true;
    }
    if !entry.file_type().is_some_and(|kind| kind.is_dir()) {
        return false;
    }
    let beside = |owner: &&str| entry.path().parent().is_some_and(|parent| parent.join(owner).is_file());
    (name == "target" && TARGET_OWNERS.iter().any(beside))
        || MADE_BY_TOOLS.iter().any(|mark| entry.path().join(mark).is_file())
}

/// Messages go to people and models; where the worktree lies is not theirs.
fn without_root(error: &ignore::Error, root: &Path) -> String {
    error.to_string().replace(&format!("{}/", root.display()), "")
}

impl Stamp {
    fn of(about: &std::fs::Metadata) -> Self {
        let ns = |seconds: i64, ns: i64| seconds.saturating_mul(1_000_000_000).saturating_add(ns);
        Self {
            bytes: about.len(),
            modified_ns: ns(about.mtime(), about.mtime_nsec()),
            changed_ns: ns(about.ctime(), about.ctime_nsec()),
            inode: about.ino(),
        }
    }

    /// Whether a file read at `now` could have been changed since without a change of its stamp.
    pub(super) fn is_unsettled(&self, now: SystemTime) -> bool {
        let since = |time: SystemTime| time.duration_since(UNIX_EPOCH).unwrap_or_default();
        let latest = Duration::from_nanos(u64::try_from(self.modified_ns.max(self.changed_ns)).unwrap_or(0));
        latest + UNSETTLED > since(now)
    }
}

/// Reads a file that the walk saw.
///
/// # Errors
/// None: what cannot be read is findable by path.
pub(super) fn read(root: &Path, seen: &Seen) -> Content {
    if seen.beyond {
        return Content::PathOnly("beyond the 512 MB of text that an index holds");
    }
    if seen.stamp.bytes > FILE_BYTES_MAX {
        return Content::PathOnly(TOO_LARGE);
    }
    let bytes = match bytes(&root.join(&seen.path)) {
        Ok(Some(bytes)) => bytes,
        Ok(None) => return Content::PathOnly("no regular file"),
        Err(error) if matches!(error.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory) => {
            return Content::Gone;
        }
        Err(_) => return Content::PathOnly("cannot be read"),
    };
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Content::PathOnly(TOO_LARGE);
    }
    if bytes.contains(&0) {
        return Content::PathOnly("binary");
    }
    if bytes.split(|byte| *byte == b'\n').any(|line| line.len() > LINE_BYTES_MAX) {
        return Content::PathOnly("lines of more than 8000 bytes");
    }
    // Old encodings stay searchable by their ASCII words.
    Content::Text(
        String::from_utf8(bytes).unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned()),
    )
}

const TOO_LARGE: &str = "larger than 1 MB";

/// At most one byte more than [`FILE_BYTES_MAX`]; `None` if it is no regular file.
fn bytes(path: &Path) -> std::io::Result<Option<Vec<u8>>> {
    let mut options = std::fs::OpenOptions::new();
    options.read(true);
    // A link put in place of the file since the walk is not followed; a pipe does not hold us up.
    options.custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
    let file = match options.open(path) {
        Err(error) if error.raw_os_error() == Some(libc::ELOOP) => return Ok(None),
        file => file?,
    };
    if !file.metadata()?.is_file() {
        return Ok(None);
    }
    let mut bytes = Vec::new();
    file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes)?;
    Ok(Some(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn tree(files: &[&str]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for file in files {
            let path = root.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "x\n").unwrap();
        }
        root
    }

    fn paths(root: &Path) -> Vec<String> {
        walk(root).unwrap().files.into_iter().map(|file| file.path).collect()
    }

    #[test]
    fn what_version_control_or_tools_made_is_skipped() {
        let root = tree(&[
            "src/target/a.rs",
            "target/debug/x",
            "Cargo.toml",
            "a/node_modules/b.js",
            ".git/config",
            ".github/ci.yml",
            "cache/CACHEDIR.TAG",
            "cache/b",
            "log/x.log",
            "keep.log",
            "sub/.git",
            "sub/a.py",
        ]);
        fs::write(root.path().join(".gitignore"), "*.log\n!keep.log\n").unwrap();
        assert_eq!(
            paths(root.path()),
            [".github/ci.yml", ".gitignore", "Cargo.toml", "keep.log", "src/target/a.rs", "sub/a.py"]
        );
        // Where the tree lies says nothing about it.
        fs::write(root.path().join("sub/.gitignore"), "").unwrap();
        fs::write(root.path().join(".gitignore"), "sub\n").unwrap();
        assert_eq!(paths(&root.path().join("sub")), [".gitignore", "a.py"]);
    }

    #[test]
    fn links_are_not_followed_and_pipes_do_not_hold_up() {
        use std::os::unix::fs::symlink;
        let outside = tree(&["secret"]);
        let root = tree(&["a"]);
        symlink(outside.path().join("secret"), root.path().join("link")).unwrap();
        symlink(outside.path(), root.path().join("folder")).unwrap();
        symlink(root.path(), root.path().join("round")).unwrap();
        let pipe = std::ffi::CString::new(root.path().join("pipe").to_str().unwrap()).unwrap();
        assert_eq!(unsafe { libc::mkfifo(pipe.as_ptr(), 0o600) }, 0);
        assert_eq!(paths(root.path()), ["a"]);
        // A link or a pipe in place of a file that the walk saw.
        for path in ["link", "pipe"] {
            let seen = Seen { path: path.to_owned(), stamp: Stamp::default(), beyond: false };
            assert!(matches!(read(root.path(), &seen), Content::PathOnly("no regular file")), "{path}");
        }
    }

    #[test]
    fn what_is_no_text_is_findable_by_path() {
        let root = tree(&[]);
        let read = |bytes: &[u8]| {
            fs::write(root.path().join("f"), bytes).unwrap();
            read(root.path(), &walk(root.path()).unwrap().files[0])
        };
        assert!(matches!(read(b"a\0b"), Content::PathOnly("binary")));
        assert!(matches!(read(&vec![b'x'; LINE_BYTES_MAX + 1]), Content::PathOnly(why) if why.contains("lines")));
        assert!(matches!(read(&b"x\n".repeat((FILE_BYTES_MAX / 2) as usize + 1)), Content::PathOnly(TOO_LARGE)));
        assert!(matches!(read(b"caf\xe9 x"), Content::Text(text) if text == "caf\u{fffd} x"));
        let gone = Seen { path: "f/g".to_owned(), stamp: Stamp::default(), beyond: false };
        assert!(matches!(super::read(root.path(), &gone), Content::Gone));
    }

    #[test]
    fn the_number_of_files_is_bounded_and_a_missing_root_is_an_error() {
        let root = tree(&["a", "b", "c"]);
        let walked = walk_up_to(root.path(), 2).unwrap();
        assert_eq!(walked.files.len(), 2);
        assert!(walked.left_out[0].1.contains("more than 2 files"));
        let error = walk(&root.path().join("none")).err().unwrap();
        assert_eq!(error.code(), "index.disk");
    }
}
