//! To whom files of confined commands belong, and how they go again.

use std::{
    io,
    os::unix::fs::{MetadataExt, PermissionsExt, lchown},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// First user id of commands that root starts: the range that systemd keeps for users of the moment.
/// Source: systemd, "Users, Groups, UIDs and GIDs on systemd systems".
const FIRST: u32 = 61_184;
/// Ids from there on.
const COUNT: u32 = 4_336;

/// The unprivileged user (and group) of a worktree. Each has one of its own, so that what runs in one neither uses up the
/// processes of another nor can signal them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct User(pub(super) u32);

impl User {
    /// The user for commands in `dir`; `None` where we cannot become another one. The same folder, the same user.
    pub(super) fn of(dir: &Path) -> Option<Self> {
        // SAFETY: a plain system call.
        let root = unsafe { libc::geteuid() == 0 };
        // FNV-1a: any spread will do, and a clash of two worktrees only makes them share.
        let hash = dir
            .as_os_str()
            .as_encoded_bytes()
            .iter()
            .fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193));
        root.then_some(Self(FIRST + hash % COUNT))
    }

    /// Hands over a folder and all in it, links not followed. Nothing of this user may be running.
    pub(super) fn give(self, dir: &Path) -> io::Result<()> {
        // A list and not recursion: how deep it is was decided by confined code.
        let mut open: Vec<PathBuf> = vec![dir.to_owned()];
        while let Some(path) = open.pop() {
            let meta = match std::fs::symlink_metadata(&path) {
                Ok(meta) => meta,
                // Longer than a path can be: we did not make it, so it is its owner's already.
                Err(error) if error.raw_os_error() == Some(libc::ENAMETOOLONG) => continue,
                Err(error) => return Err(error),
            };
            if meta.uid() != self.0 || meta.gid() != self.0 {
                lchown(&path, Some(self.0), Some(self.0))?;
            }
            if meta.is_dir() {
                match std::fs::read_dir(&path) {
                    Ok(entries) => {
                        for entry in entries {
                            open.push(entry?.path());
                        }
                    }
                    Err(error) if error.raw_os_error() == Some(libc::ENAMETOOLONG) => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(())
    }
}

/// Lets everybody walk through a folder of ours.
pub(super) fn open_to_others(path: &Path) -> io::Result<()> {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755))
}

/// Removes a folder in which confined commands have worked, as far as that can be done.
///
/// By `rm` and not by the standard library, which recurses with a file open at each level: a tree of any depth would cost us
/// our files or our stack. Folders that their owner has locked are opened first.
pub(crate) fn remove(path: &Path) {
    if std::fs::symlink_metadata(path).is_err_and(|error| error.kind() == io::ErrorKind::NotFound) {
        return;
    }
    let quiet = |program: &str, arguments: &[&str]| {
        let mut command = Command::new(program);
        command.args(arguments).arg("--").arg(path).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command.status().is_ok_and(|status| status.success())
    };
    if quiet("rm", &["-rf", "--one-file-system"]) {
        return;
    }
    quiet("chmod", &["-R", "u+rwX"]);
    if !quiet("rm", &["-rf", "--one-file-system"]) {
        tracing::warn!(path = %path.display(), "a folder of a confined command could not be removed");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_keeps_its_user_and_another_has_another() {
        let (Some(a), Some(b)) = (User::of(Path::new("/w/a")), User::of(Path::new("/w/b"))) else {
            eprintln!("SKIPPED: only root becomes another user");
            return;
        };
        assert_eq!(User::of(Path::new("/w/a")), Some(a));
        assert_ne!(a, b);
        assert!((FIRST..FIRST + COUNT).contains(&a.0));
    }
}
