//! Clients of others, from the Python package registry: if they can talk to a fake of ours, the fake is credible.
//!
//! They are installed once, into a virtual environment below a folder of the caller's. A machine without Python, or whose pip reaches no
//! registry, has none: that is said, and nobody insists. Where a registry answers, a package that cannot be installed is left out, which
//! [`ALL_TESTS`](loopwright_engine::embedded::testing::ALL_TESTS) does not let pass.

use loopwright_engine::embedded::testing::{left_out, not_here};
use std::{
    path::{Path, PathBuf},
    process::{Output, Stdio},
    time::Duration,
};
use tokio::{process::Command, time::timeout};

/// Longest time that making an environment, or asking whether there is a registry, may take.
const ASK_MAX: Duration = Duration::from_secs(60);
/// Longest time that installing may cost a test run: some forty packages, on a busy machine.
const INSTALL_MAX: Duration = Duration::from_secs(240);
/// What the registry is asked for: small, and everywhere.
const PROBE: &str = "six";
/// Before the command of pip. Repeating a download helps nobody who has no network.
const PIP: [&str; 5] = ["-m", "pip", "--disable-pip-version-check", "--retries=0", "--timeout=20"];

/// Why there is no interpreter with the packages.
enum Without {
    /// No Python, or no registry.
    NotHere(String),
    /// There is one, and it does not work.
    Broken(String),
}

/// An interpreter that knows `packages` (each with its version), below `folder`. `None`: `test` is left out, and that was said.
///
/// # Panics
/// If a registry answers, the packages cannot be installed from it, and no test may be left out.
pub async fn interpreter(test: &str, folder: &Path, packages: &[&str]) -> Option<PathBuf> {
    match installed(folder, packages).await {
        Ok(python) => return Some(python),
        Err(Without::NotHere(why)) => not_here(test, &why),
        Err(Without::Broken(why)) => left_out(test, &why),
    }
    None
}

/// Runs a program to its end.
///
/// # Errors
/// A sentence, if it cannot be run or takes longer than `limit`; then it is killed.
pub async fn run(program: &Path, arguments: &[&str], limit: Duration) -> Result<Output, String> {
    let child = Command::new(program).args(arguments).stdin(Stdio::null()).kill_on_drop(true).output();
    match timeout(limit, child).await {
        Err(_) => Err(format!("{} took longer than {limit:?}", program.display())),
        Ok(Err(error)) => Err(format!("{}: {error}", program.display())),
        Ok(Ok(output)) => Ok(output),
    }
}

async fn installed(folder: &Path, packages: &[&str]) -> Result<PathBuf, Without> {
    let folder = folder.join(format!("python-{}", packages.join("-").replace("==", "-")));
    let (python, ready) = (folder.join("bin/python"), folder.join("ready"));
    if ready.exists() {
        return Ok(python);
    }
    succeeded("python3", &["-m", "venv", &folder.to_string_lossy()], ASK_MAX).await.map_err(Without::NotHere)?;
    let interpreter = python.to_string_lossy();
    let probe = folder.join("probe").to_string_lossy().into_owned();
    let ask = [&PIP[..], &["download", "--quiet", "--no-deps", "--no-cache-dir", "--dest", probe.as_str(), PROBE]];
    succeeded(&interpreter, &ask.concat(), ASK_MAX).await.map_err(Without::NotHere)?;
    let install = [&PIP[..], &["install", "--quiet", "--no-compile"], packages].concat();
    succeeded(&interpreter, &install, INSTALL_MAX).await.map_err(Without::Broken)?;
    std::fs::write(&ready, "").map_err(|error| Without::Broken(error.to_string()))?;
    Ok(python)
}

/// Runs a program that has to succeed; its last words if it does not.
async fn succeeded(program: &str, arguments: &[&str], limit: Duration) -> Result<(), String> {
    let output = run(Path::new(program), arguments, limit).await?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let last = said.trim().lines().next_back().unwrap_or_default();
    Err(format!("{program} {}: {last}", arguments.get(1).copied().unwrap_or_default()))
}
