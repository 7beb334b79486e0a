//! Makes a worktree fit for git before it is looked at: confined commands leave in it what they like.

use crate::sandbox;
use loopwright_engine::Failure;
use std::{
    fs::Permissions,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
};

/// Longest path of a file that is kept, in bytes; what tools may name is as long.
pub(super) const PATH_BYTES_MAX: usize = 512;
/// Folders that are never committed; nothing in them matters.
const SKIPPED: [&str; 3] = ["target", "node_modules", "__pycache__"];

/// Removes what is no file of a project, and opens what is locked against its owner.
///
/// Removed are repositories within the tree (git would take them for submodules, lose their files, and run the programs that
/// their configuration names, unconfined), and names that are no text or longer than [`PATH_BYTES_MAX`].
/// # Errors
/// `transient.disk`.
pub(super) fn tidy(root: &Path) -> Result<(), Failure> {
    let mut open: Vec<PathBuf> = vec![root.to_owned()];
    while let Some(dir) = open.pop() {
        let entries = std::fs::read_dir(&dir).map_err(|e| crate::git::disk(&dir, &e))?;
        for entry in entries {
            let entry = entry.map_err(|e| crate::git::disk(&dir, &e))?;
            let path = entry.path();
            let within = path.strip_prefix(root).unwrap_or(&path);
            let name = entry.file_name();
            if within.as_os_str().len() > PATH_BYTES_MAX || name.to_str().is_none_or(is_repository) {
                tracing::info!(path = %within.display(), "removed from a worktree");
                sandbox::remove(&path);
                continue;
            }
            let meta = std::fs::symlink_metadata(&path).map_err(|e| crate::git::disk(&path, &e))?;
            let needed = if meta.is_dir() { 0o700 } else { 0o600 };
            if (meta.is_dir() || meta.is_file()) && meta.mode() & needed != needed {
                // An ordinary user's own file: if even that fails, git says what it cannot read.
                drop(std::fs::set_permissions(&path, Permissions::from_mode(meta.mode() & 0o7777 | needed)));
            }
            if meta.is_dir() && !SKIPPED.iter().any(|skipped| name == *skipped) {
                open.push(path);
            }
        }
    }
    Ok(())
}

/// Whether git, on any file system, could take a name for that of a repository. It refuses whole trees with such a name.
fn is_repository(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    [".git", "git~1"].iter().any(|git| {
        let rest = name.strip_prefix(git).map(|rest| rest.trim_start_matches(['.', ' ']));
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with([':', '\\']))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_repositories_are_known_in_every_disguise() {
        for name in [".git", ".GIT", ".Git", "git~1", "GIT~1", ".git.", ".git . ", ".git::$INDEX_ALLOCATION"] {
            assert!(is_repository(name), "{name}");
        }
        for name in [".gitignore", ".gitattributes", ".github", "git", "git~10", ".git-x", "git~1x"] {
            assert!(!is_repository(name), "{name}");
        }
    }
}
