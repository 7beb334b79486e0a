//! The real binary on a database of its own.

use super::loopwright;
use loopwright_engine::embedded::testing;
use serde_json::Value;
use sqlx::PgPool;
use std::time::Duration;

/// A command that takes longer hangs.
pub const COMMAND_MAX: Duration = Duration::from_secs(120);

/// What a command came to.
#[derive(Debug)]
pub struct Done {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Done {
    /// The code of an error, as it stands behind the sentence.
    pub fn refusal(&self) -> Option<&str> {
        let line = self.stderr.lines().find(|line| line.starts_with("loopwright: ") || line.starts_with("error: "))?;
        let (_, code) = line.trim_end().strip_suffix(']')?.rsplit_once('[')?;
        Some(code)
    }
}

pub struct Shell {
    pub dir: tempfile::TempDir,
    pub pool: PgPool,
    url: String,
}

impl Shell {
    pub async fn new() -> Self {
        let pool = testing::database(loopwright_activities::MIGRATIONS).await;
        let url = testing::url(&pool);
        Self { dir: tempfile::tempdir().unwrap(), pool, url }
    }

    pub fn url(&self) -> &str {
        &self.url
    }

    pub fn write(&self, file: &str, text: impl AsRef<[u8]>) {
        std::fs::write(self.dir.path().join(file), text).unwrap();
    }

    pub async fn run(&self, args: &[&str]) -> Done {
        let mut command = tokio::process::Command::from(loopwright(self.dir.path()));
        command.env("DATABASE_URL", &self.url).args(args).kill_on_drop(true);
        command.stdin(std::process::Stdio::null());
        let output = tokio::time::timeout(COMMAND_MAX, command.output()).await;
        let output = output.unwrap_or_else(|_| panic!("{args:?} hangs")).unwrap();
        Done {
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// What a command that must succeed prints for programs.
    pub async fn json(&self, args: &[&str]) -> Value {
        let done = self.run(&[args, &["--json"]].concat()).await;
        assert_eq!(done.code, Some(0), "{args:?}: {done:?}");
        serde_json::from_str(&done.stdout).unwrap()
    }

    /// Deploys a document under a file name, by its hash.
    pub async fn deploy(&self, file: &str, text: &str) -> String {
        self.write(file, text);
        self.json(&["workflow", "deploy", file]).await["hash"].as_str().unwrap().to_owned()
    }

    /// Starts a run, by its id.
    pub async fn start(&self, workflow: &str, more: &[&str]) -> String {
        let started = self.json(&[&["run", "start", workflow], more].concat()).await;
        started["run_id"].as_str().unwrap().to_owned()
    }
}
