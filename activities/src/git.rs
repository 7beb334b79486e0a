//! The git command line, hardened: no shell, no hooks, no configuration of the machine, no prompt, bounded in time and output.

use chrono::{DateTime, Utc};
use loopwright_engine::Failure;
use std::{
    ffi::OsStr,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};
use tokio::{io::AsyncWriteExt, process::Command};

/// Author and committer of everything that Loopwright commits.
pub const AUTHOR: (&str, &str) = ("Loopwright", "loopwright@localhost");
/// Longest run of one command: a bundle of the largest tree takes a few seconds.
const TIMEOUT: Duration = Duration::from_secs(120);
/// Never committed, whatever a project's own `.gitignore` says.
const EXCLUDES: &str = "target/\nnode_modules/\n__pycache__/\n*.pyc\n.DS_Store\n";
/// Object id of the empty tree, which git knows without having it.
pub const EMPTY_TREE: &str = "4b825dc642cb6eb9a060e54bf8d69288fbee4904";

/// A bare repository, and commands over it.
#[derive(Clone, Debug)]
pub struct Git {
    dir: PathBuf,
}

impl Git {
    /// A repository at `dir`, which need not exist yet.
    #[must_use]
    pub fn new(dir: PathBuf) -> Self {
        Self { dir }
    }
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Whether git is there at all.
    ///
    /// # Errors
    /// `workspace.git`, with the command that helps.
    pub async fn installed() -> Result<(), Failure> {
        Self::new(std::env::temp_dir()).run(&["--version"]).await.map(drop)
    }

    /// Creates the bare repository if it is not there.
    ///
    /// # Errors
    /// `workspace.git` when git is missing or fails: says which command helps.
    pub async fn init(&self) -> Result<(), Failure> {
        if self.dir.join("HEAD").is_file() && self.dir.join("objects").is_dir() {
            return Ok(());
        }
        std::fs::create_dir_all(&self.dir).map_err(|e| disk(&self.dir, &e))?;
        self.run(&["init", "--quiet", "--bare", "--initial-branch=main", "."]).await?;
        std::fs::write(self.dir.join("loopwright-excludes"), EXCLUDES).map_err(|e| disk(&self.dir, &e))
    }

    /// Runs a command in the repository and returns what it prints.
    ///
    /// # Errors
    /// `workspace.git` with the tail of what it said.
    pub async fn run<S: AsRef<OsStr>>(&self, args: &[S]) -> Result<Vec<u8>, Failure> {
        self.command(args, None, &[], &[]).await
    }

    /// Like [`Self::run`], over a work tree with an index of its own, with more environment and standard input.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub async fn command<S: AsRef<OsStr>>(
        &self,
        args: &[S],
        tree: Option<(&Path, &Path)>,
        env: &[(&str, String)],
        input: &[u8],
    ) -> Result<Vec<u8>, Failure> {
        let mut command = Command::new("git");
        command
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_else(|| "/usr/local/bin:/usr/bin:/bin".into()))
            .env("HOME", &self.dir)
            .env("LC_ALL", "C")
            .env("GIT_CONFIG_NOSYSTEM", "1")
            .env("GIT_CONFIG_GLOBAL", "/dev/null")
            .env("GIT_TERMINAL_PROMPT", "0")
            .env("GIT_DIR", &self.dir)
            .args([
                "-c",
                "core.hooksPath=/dev/null",
                "-c",
                "safe.directory=*",
                "-c",
                "core.fsmonitor=false",
                "-c",
                "gc.auto=0",
            ])
            .args([
                "-c",
                "core.autocrlf=false",
                "-c",
                "core.symlinks=true",
                "-c",
                "core.bare=false",
                "-c",
                "protocol.allow=never",
            ])
            .arg("-c")
            .arg(format!("core.excludesFile={}", self.dir.join("loopwright-excludes").display()))
            .current_dir(tree.map_or(self.dir.as_path(), |(root, _)| root))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        if let Some((root, index)) = tree {
            command.env("GIT_WORK_TREE", root).env("GIT_INDEX_FILE", index);
        }
        for (name, value) in env {
            command.env(name, value);
        }
        command.args(args);
        let mut child = command.spawn().map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => Failure::permanent(
                "workspace.git",
                "git was not found; install it, for example with: apt-get install git",
            ),
            _ => Failure::retryable("transient.git", format!("git cannot be started: {error}")),
        })?;
        let mut stdin = child.stdin.take();
        let work = async {
            if let Some(stdin) = &mut stdin {
                // A command that does not read its input closes it: its own exit code tells.
                drop(stdin.write_all(input).await);
            }
            drop(stdin.take());
            child.wait_with_output().await
        };
        let output = tokio::time::timeout(TIMEOUT, work)
            .await
            .map_err(|_| Failure::retryable("transient.git", "git took longer than two minutes"))?
            .map_err(|e| Failure::retryable("transient.git", format!("git broke off: {e}")))?;
        if output.status.success() {
            return Ok(output.stdout);
        }
        let said = String::from_utf8_lossy(&output.stderr);
        let said: String = said.trim().chars().take(500).collect();
        let verb = args.first().map(|a| a.as_ref().to_string_lossy().into_owned()).unwrap_or_default();
        Err(Failure::permanent("workspace.git", format!("git {verb} failed: {said}")))
    }

    /// Runs a command that prints one line.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub async fn line<S: AsRef<OsStr>>(&self, args: &[S]) -> Result<String, Failure> {
        Ok(String::from_utf8_lossy(&self.run(args).await?).trim().to_owned())
    }

    /// Whether the repository has a commit with everything it needs.
    pub async fn has(&self, oid: &str) -> bool {
        self.run(&["rev-list", "--objects", "--max-count=1", "--quiet", oid]).await.is_ok()
    }

    /// Makes a commit object. Same arguments, same id.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub async fn commit_tree(
        &self,
        tree: &str,
        parent: Option<&str>,
        message: &str,
        at: DateTime<Utc>,
    ) -> Result<String, Failure> {
        // With the sign, a number of few digits is a time too.
        let date = format!("@{} +0000", at.timestamp());
        let env: Vec<(&str, String)> = vec![
            ("GIT_AUTHOR_NAME", AUTHOR.0.into()),
            ("GIT_AUTHOR_EMAIL", AUTHOR.1.into()),
            ("GIT_AUTHOR_DATE", date.clone()),
            ("GIT_COMMITTER_NAME", AUTHOR.0.into()),
            ("GIT_COMMITTER_EMAIL", AUTHOR.1.into()),
            ("GIT_COMMITTER_DATE", date),
        ];
        let mut args = vec!["commit-tree", tree];
        if let Some(parent) = parent {
            args.extend(["-p", parent]);
        }
        args.extend(["-F", "-"]);
        let out = self.command(&args, None, &env, message.as_bytes()).await?;
        Ok(String::from_utf8_lossy(&out).trim().to_owned())
    }
}

/// A disk that cannot be used, as a failure.
pub(crate) fn disk(path: &Path, error: &std::io::Error) -> Failure {
    Failure::retryable("transient.disk", format!("{} cannot be used: {error}", path.display()))
}
