//! A project's files. Postgres is the truth: commits are stored as git bundles, and a worktree is a cache that any worker
//! rebuilds bit for bit.
//!
//! ```text
//! project_refs, project_bundles ──▶ repos/<project>.git (cache) ──▶ attempts/<attempt>/ (private worktree)
//!          ▲                                                              │
//!          └────────── one transaction: bundle, ref, project_files ◀── commit
//! ```

mod tidy;

use crate::{
    git::{EMPTY_TREE, Git, disk},
    sandbox,
};
use chrono::{DateTime, Utc};
use loopwright_engine::{Failure, ids::AttemptId, transaction};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use sqlx::PgPool;
use std::{
    fs::File,
    io::ErrorKind,
    path::{Component, Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};
use uuid::Uuid;

/// Largest file, in bytes.
pub const FILE_BYTES_MAX: u64 = 1 << 20;
/// Most files of a tree.
pub const FILES_MAX: usize = 2_000;
/// Largest tree, in bytes.
pub const TREE_BYTES_MAX: u64 = 50 << 20;
/// Largest bundle, in bytes.
const BUNDLE_BYTES_MAX: usize = 64 << 20;
/// Worktrees that an earlier process left are removed after that time.
const STALE: Duration = Duration::from_secs(86_400);

/// One changed file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileChange {
    /// Relative, with `/`.
    pub path: String,
    /// `None`: deleted.
    pub content: Option<String>,
}

/// A commit to make.
#[derive(Clone, Debug)]
pub struct NewCommit {
    pub subject: String,
    pub body: String,
    pub trailers: Vec<(String, String)>,
    pub at: DateTime<Utc>,
    pub attempt_id: AttemptId,
}

/// A commit on `main`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Commit {
    pub oid: String,
    pub tree: String,
    /// False if it was there already.
    pub created: bool,
}

/// All projects' files on this machine. Cheap to clone.
#[derive(Clone)]
pub struct Workspaces {
    root: Arc<PathBuf>,
    pool: PgPool,
}

/// A private worktree of one attempt; removed when dropped.
pub struct Workspace {
    project: Uuid,
    git: Git,
    pool: PgPool,
    dir: PathBuf,
    head: Option<String>,
}

impl Drop for Workspace {
    fn drop(&mut self) {
        // What stays is swept a day later.
        sandbox::remove(&self.dir);
    }
}

fn store(error: &sqlx::Error) -> Failure {
    Failure::retryable("transient.store", error.to_string())
}

impl Workspaces {
    /// Files under `root`; everything in it can be rebuilt.
    #[must_use]
    pub fn new(root: PathBuf, pool: PgPool) -> Self {
        let attempts = root.join("attempts");
        for entry in std::fs::read_dir(&attempts).into_iter().flatten().flatten() {
            let old = entry
                .metadata()
                .and_then(|m| m.modified())
                .is_ok_and(|at| SystemTime::now().duration_since(at).is_ok_and(|age| age > STALE));
            if old {
                sandbox::remove(&entry.path());
            }
        }
        Self { root: Arc::new(root), pool }
    }

    /// Opens a private worktree at the newest state of `main`, with the snapshot `work` on top.
    ///
    /// # Errors
    /// `workspace.missing` when the snapshot is unknown; `transient.store`, `transient.disk`, `workspace.git`.
    pub async fn open(&self, project: Uuid, attempt: AttemptId, work: Option<&str>) -> Result<Workspace, Failure> {
        let (git, head) = self.repository(project, work).await?;
        let dir = self.root.join("attempts").join(attempt.to_string());
        let workspace = Workspace { project, git, pool: self.pool.clone(), dir, head };
        if let Err(first) = workspace.check_out(work).await {
            if first.code != "workspace.git" {
                return Err(first);
            }
            // The commit is there and its files are not what they were: a damaged cache shows itself only now.
            self.rebuild(&workspace, work).await?;
            workspace.check_out(work).await?;
        }
        Ok(workspace)
    }

    /// Builds the cache repository of an open worktree anew.
    async fn rebuild(&self, workspace: &Workspace, work: Option<&str>) -> Result<(), Failure> {
        tracing::warn!(project = %workspace.project, "rebuilding a cache repository with damaged files");
        let held = self.lock(workspace.project).await?;
        drop(std::fs::remove_dir_all(workspace.git.dir()));
        let wanted: Vec<&str> = workspace.head.as_deref().into_iter().chain(work).collect();
        self.fill(&workspace.git, workspace.project, &wanted).await?;
        drop(held);
        Ok(())
    }

    /// Writes an ordinary clone of the project to `to`, which must not exist. Returns the commit that it stands at.
    ///
    /// # Errors
    /// `workspace.empty` when the project has no commit, and those of [`Self::open`].
    pub async fn export(&self, project: Uuid, to: &Path) -> Result<String, Failure> {
        let (git, head) = self.repository(project, None).await?;
        let head = head.ok_or_else(|| Failure::permanent("workspace.empty", "the project has no commit yet"))?;
        let source = git.dir().to_path_buf();
        if let Some(parent) = to.parent() {
            std::fs::create_dir_all(parent).map_err(|e| disk(parent, &e))?;
        }
        git.run(&["update-ref", "refs/heads/main", &head]).await?;
        let clone = tokio::process::Command::new("git")
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("HOME", &source)
            .env("GIT_CONFIG_NOSYSTEM", "1")
            .env("GIT_CONFIG_GLOBAL", "/dev/null")
            .args([
                "-c",
                "safe.directory=*",
                "clone",
                "--quiet",
                "--no-hardlinks",
                "--single-branch",
                "--branch",
                "main",
            ])
            .arg(&source)
            .arg(to)
            .output()
            .await
            .map_err(|e| Failure::retryable("transient.git", e.to_string()))?;
        if !clone.status.success() {
            return Err(Failure::permanent("workspace.git", String::from_utf8_lossy(&clone.stderr).trim().to_owned()));
        }
        // The cache is no remote that its owner could use.
        let there = Git::new(to.join(".git"));
        there.run(&["remote", "remove", "origin"]).await?;
        Ok(head)
    }

    /// The files of `main` as a zip.
    ///
    /// # Errors
    /// `workspace.empty`, and those of [`Self::open`].
    pub async fn archive_zip(&self, project: Uuid) -> Result<Vec<u8>, Failure> {
        let (git, head) = self.repository(project, None).await?;
        let head = head.ok_or_else(|| Failure::permanent("workspace.empty", "the project has no commit yet"))?;
        git.run(&["archive", "--format=zip", &head]).await
    }

    /// The cache repository with everything that `main` and `work` need, and the commit of `main`.
    async fn repository(&self, project: Uuid, work: Option<&str>) -> Result<(Git, Option<String>), Failure> {
        let held = self.lock(project).await?;
        let git = Git::new(self.repos().join(format!("{project}.git")));
        let head: Option<String> =
            sqlx::query_scalar("select oid from project_refs where project_id = $1 and name = 'main'")
                .bind(project)
                .fetch_optional(&self.pool)
                .await
                .map_err(|e| store(&e))?;
        let wanted: Vec<&str> = head.as_deref().into_iter().chain(work).collect();
        if let Err(first) = self.fill(&git, project, &wanted).await {
            // A damaged cache heals by being built anew.
            tracing::warn!(%project, error = %first, "rebuilding a cache repository");
            drop(std::fs::remove_dir_all(git.dir()));
            self.fill(&git, project, &wanted).await?;
        }
        drop(held);
        Ok((git, head))
    }

    fn repos(&self) -> PathBuf {
        self.root.join("repos")
    }

    /// Two processes on one machine build one cache: one after the other, as long as the file is held.
    async fn lock(&self, project: Uuid) -> Result<File, Failure> {
        let repos = self.repos();
        std::fs::create_dir_all(&repos).map_err(|e| disk(&repos, &e))?;
        let lock = repos.join(format!("{project}.lock"));
        tokio::task::spawn_blocking(move || {
            let file = File::create(&lock).map_err(|e| disk(&lock, &e))?;
            file.lock().map_err(|e| disk(&lock, &e))?;
            Ok::<File, Failure>(file)
        })
        .await
        .map_err(|e| Failure::retryable("transient.disk", e.to_string()))?
    }

    async fn fill(&self, git: &Git, project: Uuid, wanted: &[&str]) -> Result<(), Failure> {
        git.init().await?;
        let mut missing = false;
        for oid in wanted {
            missing |= !git.has(oid).await;
        }
        if !missing {
            return Ok(());
        }
        let bundles: Vec<(String, Vec<u8>)> =
            sqlx::query_as("select oid, bundle from project_bundles where project_id = $1 order by id")
                .bind(project)
                .fetch_all(&self.pool)
                .await
                .map_err(|e| store(&e))?;
        for (oid, bundle) in bundles {
            if git.has(&oid).await {
                continue;
            }
            let file = git.dir().join("incoming.bundle");
            std::fs::write(&file, &bundle).map_err(|e| disk(&file, &e))?;
            git.run(&[&"bundle".into(), &"unbundle".into(), &file.as_os_str().to_owned()]).await?;
            // Objects without a ref are garbage to git.
            git.run(&["update-ref", &format!("refs/loopwright/{oid}"), &oid]).await?;
        }
        for oid in wanted {
            if !git.has(oid).await {
                return Err(Failure::permanent("workspace.missing", format!("no stored bundle holds {oid}")));
            }
        }
        Ok(())
    }
}

impl Workspace {
    /// Fills the folder with the files of `work`, or of `head` without one; what was in it before is gone.
    async fn check_out(&self, work: Option<&str>) -> Result<(), Failure> {
        sandbox::remove(&self.dir);
        std::fs::create_dir_all(&self.dir).map_err(|e| disk(&self.dir, &e))?;
        let Some(from) = work.or(self.head.as_deref()) else { return Ok(()) };
        let index = self.index();
        let tree = Some((self.dir.as_path(), index.as_path()));
        let done = async {
            self.git.command(&["read-tree", from], tree, &[], &[]).await?;
            self.git.command(&["checkout-index", "--all", "--force"], tree, &[], &[]).await
        }
        .await;
        drop(std::fs::remove_file(&index));
        done.map(drop)
    }

    /// Where the files are.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }
    /// Commit of `main` when the worktree was opened; `None` in a new project.
    #[must_use]
    pub fn head(&self) -> Option<&str> {
        self.head.as_deref()
    }

    /// The commit between `base` (exclusive; the beginning without one) and `head` whose message has all of `trailers`.
    ///
    /// # Errors
    /// `workspace.git`.
    pub async fn landed(&self, base: Option<&str>, trailers: &[(&str, String)]) -> Result<Option<Commit>, Failure> {
        let Some(head) = &self.head else { return Ok(None) };
        let range = base.map_or_else(|| head.clone(), |base| format!("{base}..{head}"));
        let out = self.git.run(&["log", "-z", "--format=%H%n%T%n%B", &range]).await?;
        let found = String::from_utf8_lossy(&out).split('\0').find_map(|entry| {
            let mut lines = entry.lines();
            let (oid, tree) = (lines.next()?, lines.next()?);
            // Trailers are the last paragraph; a line like one in the body is a model's.
            let message: Vec<&str> = lines.collect();
            let end = message.iter().rposition(|line| !line.is_empty()).map_or(0, |last| last + 1);
            let start = message[..end].iter().rposition(|line| line.is_empty()).map_or(0, |blank| blank + 1);
            let last = &message[start..end];
            let all = trailers.iter().all(|(name, value)| last.contains(&format!("{name}: {value}").as_str()));
            all.then(|| Commit { oid: oid.to_owned(), tree: tree.to_owned(), created: false })
        });
        Ok(found)
    }

    /// The first parent of a commit; `None` for a first commit.
    ///
    /// # Errors
    /// `workspace.git` when the commit is unknown.
    pub async fn parent_of(&self, oid: &str) -> Result<Option<String>, Failure> {
        let parents = self.git.line(&["log", "-1", "--format=%P", oid]).await?;
        Ok(parents.split_whitespace().next().map(str::to_owned))
    }

    /// Every file of the worktree that git would commit, by path, with its size in bytes.
    ///
    /// # Errors
    /// `workspace.git`, `workspace.too_large`.
    pub async fn files(&self) -> Result<Vec<(String, u64)>, Failure> {
        let tree = self.tree().await?;
        let out = self.git.run(&["ls-tree", "-r", "-l", "-z", "--full-tree", &tree]).await?;
        let entry = |line: &str| {
            let (meta, path) = line.split_once('\t')?;
            Some((path.to_owned(), meta.split_whitespace().nth(3)?.parse().unwrap_or(0)))
        };
        Ok(String::from_utf8_lossy(&out).split('\0').filter_map(entry).collect())
    }

    fn index(&self) -> PathBuf {
        self.dir.with_extension(format!("index-{}", Uuid::now_v7().simple()))
    }

    /// A file as text; `None` if it does not exist.
    ///
    /// # Errors
    /// `workspace.path` for a path that leaves the tree, `workspace.too_large`, `workspace.not_text`.
    pub fn read(&self, path: &str) -> Result<Option<String>, Failure> {
        let full = self.resolve(path)?;
        let meta = match std::fs::symlink_metadata(&full) {
            Ok(meta) => meta,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) if error.kind() == ErrorKind::NotADirectory => return Ok(None),
            Err(error) => return Err(disk(&full, &error)),
        };
        if !meta.is_file() {
            return if meta.is_dir() { Ok(None) } else { Err(outside(path)) };
        }
        if meta.len() > FILE_BYTES_MAX {
            return Err(Failure::permanent(
                "workspace.too_large",
                format!("{path} is {} bytes; the limit is {FILE_BYTES_MAX}", meta.len()),
            ));
        }
        let bytes = std::fs::read(&full).map_err(|e| disk(&full, &e))?;
        String::from_utf8(bytes)
            .map(Some)
            .map_err(|_| Failure::permanent("workspace.not_text", format!("{path} is not text")))
    }

    /// A file as the last commit has it; `None` where there is none. Content that is not text is given as its lossy reading.
    ///
    /// # Errors
    /// `workspace.path`, `workspace.git`.
    pub async fn committed(&self, path: &str) -> Result<Option<String>, Failure> {
        self.resolve(path)?;
        let Some(head) = &self.head else { return Ok(None) };
        let listed = self.git.run(&["ls-tree", "-z", "--full-tree", head, "--", path]).await?;
        let listed = String::from_utf8_lossy(&listed).into_owned();
        let Some(blob) = listed.split_whitespace().nth(2).filter(|_| listed.contains(" blob ")) else {
            return Ok(None);
        };
        let content = self.git.run(&["cat-file", "blob", blob]).await?;
        Ok(Some(String::from_utf8_lossy(&content).into_owned()))
    }

    /// Writes and deletes files: everything is checked before anything is written.
    ///
    /// # Errors
    /// `workspace.path`, `workspace.too_large`, `transient.disk`.
    pub fn write(&self, changes: &[FileChange]) -> Result<(), Failure> {
        let mut resolved = Vec::with_capacity(changes.len());
        for change in changes {
            let size = change.content.as_ref().map_or(0, |c| c.len() as u64);
            if size > FILE_BYTES_MAX {
                return Err(Failure::permanent(
                    "workspace.too_large",
                    format!("{} would be {size} bytes; the limit is {FILE_BYTES_MAX}", change.path),
                ));
            }
            resolved.push(self.resolve(&change.path)?);
        }
        self.fits(changes)?;
        let (kept, deleted): (Vec<_>, Vec<_>) = changes.iter().zip(resolved).partition(|(c, _)| c.content.is_some());
        // Deletions first: a file may become a folder.
        for (_, full) in deleted {
            match std::fs::remove_file(&full) {
                Ok(()) => {}
                Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {}
                Err(error) => return Err(disk(&full, &error)),
            }
        }
        for (change, full) in kept {
            if let Some(parent) = full.parent() {
                std::fs::create_dir_all(parent).map_err(|e| disk(parent, &e))?;
            }
            std::fs::write(&full, change.content.as_deref().unwrap_or_default()).map_err(|e| disk(&full, &e))?;
        }
        Ok(())
    }

    /// Refuses changes that no tree can hold: a file where a folder is, or is to be, and the other way round.
    fn fits(&self, changes: &[FileChange]) -> Result<(), Failure> {
        let is_kind = |path: &str, folder: bool| {
            std::fs::symlink_metadata(self.dir.join(path)).is_ok_and(|meta| meta.is_dir() == folder)
        };
        let deleted = |path: &str| changes.iter().any(|c| c.path == path && c.content.is_none());
        let written = |path: &str| changes.iter().any(|c| c.path == path && c.content.is_some());
        for change in changes {
            if is_kind(&change.path, true) {
                return Err(Failure::permanent("workspace.path", format!("{} is a folder", change.path)));
            }
            let above = change.path.match_indices('/').map(|(at, _)| &change.path[..at]);
            let file = above.into_iter().find(|path| written(path) || (is_kind(path, false) && !deleted(path)));
            if let (Some(file), true) = (file, change.content.is_some()) {
                return Err(Failure::permanent(
                    "workspace.path",
                    format!("{file} is a file and cannot hold {}", change.path),
                ));
            }
        }
        Ok(())
    }

    /// The place of a relative path; refuses everything that could leave the tree, symbolic links included.
    fn resolve(&self, path: &str) -> Result<PathBuf, Failure> {
        let bad = path.is_empty()
            || path.len() > tidy::PATH_BYTES_MAX
            || path.contains(['\0', '\\'])
            || Path::new(path).components().any(|c| !matches!(c, Component::Normal(_)))
            || path.split('/').any(|part| part.eq_ignore_ascii_case(".git") || part.is_empty() || part == ".");
        if bad {
            return Err(outside(path));
        }
        let mut full = self.dir.clone();
        for part in path.split('/') {
            full.push(part);
            if std::fs::symlink_metadata(&full).is_ok_and(|m| m.file_type().is_symlink()) {
                return Err(outside(path));
            }
        }
        Ok(full)
    }

    /// The tree of everything that git would commit here.
    async fn tree(&self) -> Result<String, Failure> {
        let dir = self.dir.clone();
        tokio::task::spawn_blocking(move || tidy::tidy(&dir))
            .await
            .map_err(|e| Failure::retryable("transient.disk", e.to_string()))??;
        let index = self.index();
        let tree = Some((self.dir.as_path(), index.as_path()));
        let written = async {
            if let Some(head) = &self.head {
                self.git.command(&["read-tree", head], tree, &[], &[]).await?;
            }
            self.git.command(&["add", "--all", "."], tree, &[], &[]).await?;
            let listed = self.git.command(&["ls-files", "--stage", "-z"], tree, &[], &[]).await?;
            let oid = self.git.command(&["write-tree"], tree, &[], &[]).await?;
            Ok::<_, Failure>((listed, String::from_utf8_lossy(&oid).trim().to_owned()))
        }
        .await;
        drop(std::fs::remove_file(&index));
        let (listed, oid) = written?;
        let files = listed.split(|b| *b == 0).filter(|l| !l.is_empty()).count();
        if files > FILES_MAX {
            return Err(Failure::permanent("workspace.too_large", format!("{files} files; the limit is {FILES_MAX}")));
        }
        let sizes = self.git.run(&["ls-tree", "-r", "-l", &oid]).await?;
        let total: u64 = String::from_utf8_lossy(&sizes)
            .lines()
            .filter_map(|line| line.split_whitespace().nth(3)?.parse::<u64>().ok())
            .sum();
        if total > TREE_BYTES_MAX {
            return Err(Failure::permanent(
                "workspace.too_large",
                format!("the tree is {total} bytes; the limit is {TREE_BYTES_MAX}"),
            ));
        }
        Ok(oid)
    }

    /// Paths that differ between two trees: status letter and path.
    async fn differing(&self, from: &str, to: &str) -> Result<Vec<(char, String)>, Failure> {
        let out = self.git.run(&["diff-tree", "-r", "-z", "--no-renames", "--name-status", from, to]).await?;
        let mut parts = out.split(|b| *b == 0).map(|p| String::from_utf8_lossy(p).into_owned());
        let mut found = Vec::new();
        while let (Some(status), Some(path)) = (parts.next().filter(|s| !s.is_empty()), parts.next()) {
            found.push((status.chars().next().unwrap_or('M'), path));
        }
        Ok(found)
    }

    /// What differs from `head`, by path. Content that is not text is given as its lossy reading.
    ///
    /// # Errors
    /// `workspace.git`, `workspace.too_large`.
    pub async fn changes(&self) -> Result<Vec<FileChange>, Failure> {
        let tree = self.tree().await?;
        let from = self.head.as_ref().map_or(EMPTY_TREE.to_owned(), |h| format!("{h}^{{tree}}"));
        let mut changes = Vec::new();
        for (status, path) in self.differing(&from, &tree).await? {
            let content = if status == 'D' {
                None
            } else {
                Some(
                    String::from_utf8_lossy(&self.git.run(&["cat-file", "blob", &format!("{tree}:{path}")]).await?)
                        .into_owned(),
                )
            };
            changes.push(FileChange { path, content });
        }
        changes.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(changes)
    }

    /// The difference between `from` (nothing, if `None`) and the worktree as a unified diff, cut at `bytes_max`.
    ///
    /// # Errors
    /// `workspace.git`.
    pub async fn diff(&self, from: Option<&str>, bytes_max: usize) -> Result<String, Failure> {
        let tree = self.tree().await?;
        let out = self
            .git
            .run(&["diff", "--no-color", "--no-ext-diff", "--no-textconv", from.unwrap_or(EMPTY_TREE), &tree])
            .await?;
        let mut text = String::from_utf8_lossy(&out).into_owned();
        if text.len() > bytes_max {
            let cut = (0..=bytes_max).rev().find(|i| text.is_char_boundary(*i)).unwrap_or(0);
            text.truncate(cut);
            text.push_str("\n… (cut)\n");
        }
        Ok(text)
    }

    /// Stores the worktree as a commit that no branch names. The same tree, message and instant give the same id.
    ///
    /// # Errors
    /// `workspace.git`, `workspace.too_large`, `transient.store`.
    pub async fn snapshot(&self, message: &str, at: DateTime<Utc>) -> Result<String, Failure> {
        let tree = self.tree().await?;
        let message = message.replace('\0', "\u{2400}");
        let oid = self.git.commit_tree(&tree, self.head.as_deref(), &message, at).await?;
        let bundle = self.bundle(&oid).await?;
        sqlx::query("insert into project_bundles (project_id, oid, base, bundle) values ($1, $2, $3, $4) on conflict do nothing")
            .bind(self.project)
            .bind(&oid)
            .bind(&self.head)
            .bind(bundle)
            .execute(&self.pool)
            .await
            .map_err(|e| store(&e))?;
        Ok(oid)
    }

    /// Commits the worktree to `main`. The same call again returns the same commit and changes nothing.
    ///
    /// # Errors
    /// `workspace.conflict` when `main` moved to something else since the worktree was opened.
    /// # Transaction
    /// One: bundle, compare-and-set of the ref, a new version of each changed file.
    pub async fn commit(&self, new: NewCommit) -> Result<Commit, Failure> {
        let tree = self.tree().await?;
        let line = |text: &str| text.replace(['\n', '\r'], " ").trim().to_owned();
        let mut message = format!("{}\n", line(&new.subject));
        if !new.body.trim().is_empty() {
            message.push_str(&format!("\n{}\n", new.body.trim()));
        }
        if !new.trailers.is_empty() {
            message.push('\n');
            for (name, value) in &new.trailers {
                message.push_str(&format!("{name}: {}\n", line(value)));
            }
        }
        // git takes no NUL in a message.
        let message = message.replace('\0', "\u{2400}");
        let oid = self.git.commit_tree(&tree, self.head.as_deref(), &message, new.at).await?;
        let bundle = self.bundle(&oid).await?;
        let from = self.head.as_ref().map_or(EMPTY_TREE.to_owned(), |h| format!("{h}^{{tree}}"));
        let mut files = Vec::new();
        for (status, path) in self.differing(&from, &tree).await? {
            let content = if status == 'D' {
                None
            } else {
                Some(self.git.run(&["cat-file", "blob", &format!("{tree}:{path}")]).await?)
            };
            files.push((path, content));
        }
        let created = self.store_commit(&oid, bundle, &files, new.attempt_id).await?;
        self.git.run(&["update-ref", &format!("refs/loopwright/{oid}"), &oid]).await?;
        Ok(Commit { oid, tree, created })
    }

    async fn store_commit(
        &self,
        oid: &str,
        bundle: Vec<u8>,
        files: &[(String, Option<Vec<u8>>)],
        attempt: AttemptId,
    ) -> Result<bool, Failure> {
        let mut tx = transaction::begin(&self.pool).await.map_err(|e| store(&e))?;
        // Two first commits of one project: the row to lock does not exist yet.
        sqlx::query("select pg_advisory_xact_lock(hashtext('project_refs'), hashtext($1))")
            .bind(self.project.to_string())
            .execute(&mut *tx)
            .await
            .map_err(|e| store(&e))?;
        let current: Option<String> =
            sqlx::query_scalar("select oid from project_refs where project_id = $1 and name = 'main' for update")
                .bind(self.project)
                .fetch_optional(&mut *tx)
                .await
                .map_err(|e| store(&e))?;
        if current.as_deref() == Some(oid) {
            return Ok(false);
        }
        if current != self.head {
            // The same commit may lie further back: an earlier sending of this call, with others on top.
            let known: Option<i32> = sqlx::query_scalar(
                "select 1 from project_bundles where project_id = $1 and oid = $2 and base is not distinct from $3",
            )
            .bind(self.project)
            .bind(oid)
            .bind(&self.head)
            .fetch_optional(&mut *tx)
            .await
            .map_err(|e| store(&e))?;
            if known.is_some() {
                return Ok(false);
            }
            return Err(Failure::permanent("workspace.conflict", "the project's main branch moved meanwhile"));
        }
        let bad = |e: sqlx::Error| store(&e);
        sqlx::query("insert into project_bundles (project_id, oid, base, bundle) values ($1, $2, $3, $4) on conflict do nothing")
            .bind(self.project)
            .bind(oid)
            .bind(&self.head)
            .bind(bundle)
            .execute(&mut *tx)
            .await
            .map_err(bad)?;
        sqlx::query(
            "insert into project_refs (project_id, name, oid) values ($1, 'main', $2)
             on conflict (project_id, name) do update set oid = excluded.oid, moved_at = engine_now()",
        )
        .bind(self.project)
        .bind(oid)
        .execute(&mut *tx)
        .await
        .map_err(bad)?;
        for (path, content) in files {
            let bytes = content.as_deref().unwrap_or_default();
            sqlx::query(
                "insert into project_files (project_id, path, version, sha256, size_bytes, content, deleted, attempt_id)
                 select $1, $2, coalesce(max(version), 0) + 1, $3, $4, $5, $6, $7 from project_files where project_id = $1 and path = $2",
            )
            .bind(self.project)
            .bind(path)
            .bind(&Sha256::digest(bytes)[..])
            .bind(i64::try_from(bytes.len()).unwrap_or(i64::MAX))
            .bind(content.as_deref())
            .bind(content.is_none())
            .bind(attempt.0)
            .execute(&mut *tx)
            .await
            .map_err(bad)?;
        }
        tx.commit().await.map_err(bad)?;
        Ok(true)
    }

    /// The objects of a commit that `head` does not have.
    async fn bundle(&self, oid: &str) -> Result<Vec<u8>, Failure> {
        let name = format!("refs/loopwright/{oid}");
        self.git.run(&["update-ref", &name, oid]).await?;
        let mut args = vec!["bundle".to_owned(), "create".into(), "--quiet".into(), "-".into(), name];
        args.extend(self.head.as_ref().map(|h| format!("^{h}")));
        let bytes = self.git.run(&args).await?;
        if bytes.len() > BUNDLE_BYTES_MAX {
            return Err(Failure::permanent(
                "workspace.too_large",
                format!("the bundle is {} bytes; the limit is {BUNDLE_BYTES_MAX}", bytes.len()),
            ));
        }
        Ok(bytes)
    }
}

fn outside(path: &str) -> Failure {
    let shown: String = path.chars().take(200).collect();
    Failure::permanent("workspace.path", format!("`{shown}` is no path inside the project"))
}
