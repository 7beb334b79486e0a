//! Who runs Postgres: it refuses root, so root hands it to an unprivileged account and the folders with it.

use super::Error;
use std::{
    ffi::CString,
    fs, io,
    os::unix::fs::{MetadataExt, PermissionsExt},
    os::unix::process::CommandExt,
    path::Path,
    process::Command,
};

/// An account to drop to. `None` wherever it appears means: the current one.
#[derive(Clone, Debug)]
pub(super) struct Account {
    pub name: &'static str,
    pub uid: u32,
    pub gid: u32,
}

pub(super) fn is_root() -> bool {
    // SAFETY: takes nothing, cannot fail.
    unsafe { libc::geteuid() == 0 }
}

/// The account under which Postgres runs: for root `postgres`, else `nobody`; for everybody else the current one.
pub(super) fn choose() -> Result<Option<Account>, Error> {
    if !is_root() {
        return Ok(None);
    }
    ["postgres", "nobody"]
        .into_iter()
        .find_map(lookup)
        .map(Some)
        .ok_or_else(|| Error::failed("choosing an account for Postgres", "neither `postgres` nor `nobody` exists"))
}

fn lookup(name: &'static str) -> Option<Account> {
    let c_name = CString::new(name).ok()?;
    let mut buffer = vec![0 as libc::c_char; 16 * 1024];
    // SAFETY: plain data; all-zero is a valid value of it.
    let mut entry: libc::passwd = unsafe { std::mem::zeroed() };
    let mut found = std::ptr::null_mut();
    // SAFETY: every pointer is valid for the call and the buffer's length is given; the reentrant form is used.
    let code = unsafe { libc::getpwnam_r(c_name.as_ptr(), &mut entry, buffer.as_mut_ptr(), buffer.len(), &mut found) };
    (code == 0 && !found.is_null() && entry.pw_uid != 0).then_some(Account {
        name,
        uid: entry.pw_uid,
        gid: entry.pw_gid,
    })
}

/// A command that runs as `account`, in `/`, with an environment of exactly what Postgres needs.
pub(super) fn command(program: &Path, account: Option<&Account>) -> Command {
    let mut command = Command::new(program);
    command.env_clear().env("LC_ALL", if cfg!(target_os = "linux") { "C.UTF-8" } else { "C" }).env("TZ", "UTC");
    command.env("PATH", "/usr/bin:/bin").current_dir("/");
    if let Some(account) = account {
        // Setting the uid as root also clears the supplementary groups.
        command.uid(account.uid).gid(account.gid);
    }
    command
}

/// Creates a folder that only `account` may enter.
pub(super) fn private_dir(path: &Path, account: Option<&Account>) -> io::Result<()> {
    if !path.is_dir() {
        fs::create_dir(path)?;
    }
    if let Some(account) = account {
        std::os::unix::fs::chown(path, Some(account.uid), Some(account.gid))?;
    }
    fs::set_permissions(path, fs::Permissions::from_mode(0o700))
}

/// Checks that `account` can get to `path` through every folder above it.
///
/// # Errors
/// `data_dir_unreachable`, naming the topmost folder that shuts it out.
pub(super) fn check_reach(path: &Path, account: Option<&Account>) -> Result<(), Error> {
    let Some(account) = account else { return Ok(()) };
    let mut folders: Vec<&Path> = path.ancestors().skip(1).filter(|p| !p.as_os_str().is_empty()).collect();
    folders.reverse();
    for folder in folders {
        let Ok(meta) = fs::metadata(folder) else { continue };
        if !may_enter(meta.mode(), meta.uid(), meta.gid(), account) {
            return Err(Error::NotTraversable { path: folder.to_owned(), account: account.name.to_owned() });
        }
    }
    Ok(())
}

fn may_enter(mode: u32, uid: u32, gid: u32, account: &Account) -> bool {
    let bit = if uid == account.uid {
        0o100
    } else if gid == account.gid {
        0o010
    } else {
        0o001
    };
    mode & bit != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entering_a_folder_goes_by_the_first_class_that_matches() {
        let account = Account { name: "postgres", uid: 7, gid: 8 };
        assert!(may_enter(0o700, 7, 0, &account) && !may_enter(0o077, 7, 8, &account));
        assert!(may_enter(0o010, 1, 8, &account) && !may_enter(0o701, 1, 8, &account));
        assert!(may_enter(0o701, 1, 1, &account) && !may_enter(0o770, 1, 1, &account));
    }

    #[test]
    fn the_folder_that_shuts_out_is_named() {
        let top = std::env::temp_dir().join(format!("loopwright-reach-{}", std::process::id()));
        let shut = top.join("shut");
        fs::create_dir_all(shut.join("data")).unwrap();
        fs::set_permissions(&shut, fs::Permissions::from_mode(0o700)).unwrap();
        let account = Account { name: "postgres", uid: 4_000_000, gid: 4_000_000 };
        let error = check_reach(&shut.join("data"), Some(&account)).unwrap_err();
        fs::remove_dir_all(&top).unwrap();
        assert_eq!(error.code(), "data_dir_unreachable");
        assert!(error.to_string().contains(&shut.display().to_string()), "{error}");
        assert!(check_reach(&shut, None).is_ok());
    }
}
