//! Projects' files on real Postgres and real git: the same ids everywhere, caches that come back, hostile trees.

use chrono::{DateTime, Utc};
use loopwright_activities::{
    MIGRATIONS,
    workspace::{FILE_BYTES_MAX, FILES_MAX, FileChange, NewCommit, TREE_BYTES_MAX, Workspace, Workspaces},
};
use loopwright_engine::{
    embedded::testing::database,
    ids::{AttemptId, RunId},
};
use sqlx::PgPool;
use std::{
    os::unix::fs::{PermissionsExt, symlink},
    path::Path,
    process::Command,
};
use tempfile::TempDir;
use uuid::Uuid;

/// A project with a cache of its own.
pub(crate) struct Place {
    pub(crate) pool: PgPool,
    pub(crate) project: Uuid,
    pub(crate) root: TempDir,
    pub(crate) all: Workspaces,
}

impl Place {
    pub(crate) async fn new() -> Self {
        let pool = database(MIGRATIONS).await;
        let user: Uuid =
            sqlx::query_scalar("insert into users (auth_issuer, auth_subject) values ('i', 's') returning id")
                .fetch_one(&pool)
                .await
                .unwrap();
        let project: Uuid =
            sqlx::query_scalar("insert into projects (user_id, name) values ($1, 'Tally') returning id")
                .bind(user)
                .fetch_one(&pool)
                .await
                .unwrap();
        let root = tempfile::tempdir().unwrap();
        let all = Workspaces::new(root.path().to_owned(), pool.clone());
        Self { pool, project, root, all }
    }

    pub(crate) async fn open(&self, work: Option<&str>) -> Workspace {
        self.all.open(self.project, attempt(), work).await.unwrap()
    }

    pub(crate) async fn count(&self, table: &str) -> i64 {
        let sql = format!("select count(*) from {table}");
        sqlx::query_scalar(sqlx::AssertSqlSafe(sql)).fetch_one(&self.pool).await.unwrap()
    }
}

pub(crate) fn attempt() -> AttemptId {
    AttemptId::derive(RunId::new(), "step", 1)
}

fn at() -> DateTime<Utc> {
    DateTime::from_timestamp(1_800_000_000, 0).unwrap()
}

fn file(path: &str, content: &str) -> FileChange {
    FileChange { path: path.into(), content: Some(content.into()) }
}

fn new(subject: &str) -> NewCommit {
    NewCommit {
        subject: subject.into(),
        body: "Why.".into(),
        trailers: vec![("Loopwright-Step".into(), "step".into())],
        at: at(),
        attempt_id: attempt(),
    }
}

/// git in a folder, with an identity and no configuration of the machine.
fn git(dir: &Path, args: &[&str]) {
    let mut command = Command::new("git");
    command.env("GIT_CONFIG_GLOBAL", "/dev/null").env("GIT_CONFIG_NOSYSTEM", "1").current_dir(dir);
    let status = command.args(["-c", "user.name=x", "-c", "user.email=x@x"]).args(args).output().unwrap();
    assert!(status.status.success(), "{status:?}");
}

#[tokio::test]
async fn the_same_history_has_the_same_ids_on_every_machine() {
    let mut seen = Vec::new();
    for _ in 0..2 {
        let place = Place::new().await;
        let first = place.open(None).await;
        first.write(&[file("a/b.txt", "1\n"), file("run.sh", "echo\n")]).unwrap();
        std::fs::set_permissions(first.dir().join("run.sh"), std::fs::Permissions::from_mode(0o755)).unwrap();
        let one = first.commit(new("one")).await.unwrap();
        let second = place.open(None).await;
        second.write(&[file("a/b.txt", "2\n")]).unwrap();
        let work = second.snapshot("work", at()).await.unwrap();
        assert_eq!(second.snapshot("work", at()).await.unwrap(), work);
        let third = place.open(Some(&work)).await;
        assert_eq!(third.parent_of(&work).await.unwrap().as_deref(), Some(one.oid.as_str()));
        let two = third.commit(new("two")).await.unwrap();
        seen.push((one.oid, one.tree, work, two.oid));
    }
    assert_eq!(seen[0], seen[1]);
}

#[tokio::test]
async fn a_lost_cache_is_rebuilt_from_postgres_alone() {
    let place = Place::new().await;
    let first = place.open(None).await;
    first.write(&[file("a/b.txt", "1\n"), file("run.sh", "echo\n"), file("ü ö.txt", "ü")]).unwrap();
    std::fs::set_permissions(first.dir().join("run.sh"), std::fs::Permissions::from_mode(0o755)).unwrap();
    symlink("a/b.txt", first.dir().join("link")).unwrap();
    let one = first.commit(new("one")).await.unwrap();
    let second = place.open(None).await;
    second.write(&[file("new", "n"), FileChange { path: "ü ö.txt".into(), content: None }]).unwrap();
    let work = second.snapshot("work", at()).await.unwrap();
    drop((first, second));
    std::fs::remove_dir_all(place.root.path()).unwrap();

    let main = place.open(None).await;
    assert_eq!(main.head(), Some(one.oid.as_str()));
    assert_eq!(main.read("ü ö.txt").unwrap().as_deref(), Some("ü"));
    assert_eq!(std::fs::read_link(main.dir().join("link")).unwrap(), Path::new("a/b.txt"));
    assert_eq!(std::fs::metadata(main.dir().join("run.sh")).unwrap().permissions().mode() & 0o111, 0o111);
    // On another machine, straight to the snapshot.
    let elsewhere = tempfile::tempdir().unwrap();
    let other = Workspaces::new(elsewhere.path().to_owned(), place.pool.clone());
    let there = other.open(place.project, attempt(), Some(&work)).await.unwrap();
    assert_eq!((there.read("new").unwrap().as_deref(), there.read("ü ö.txt").unwrap()), (Some("n"), None));
    assert_eq!(there.snapshot("work", at()).await.unwrap(), work);
    let failure = other.open(place.project, attempt(), Some(&"0".repeat(40))).await.err().unwrap();
    assert_eq!(failure.code, "workspace.missing");
}

/// Every file below `dir` whose name passes.
fn damage(dir: &Path, what: &impl Fn(&Path) -> bool, how: &impl Fn(&Path)) -> usize {
    let mut done = 0;
    for entry in std::fs::read_dir(dir).unwrap().flatten() {
        let path = entry.path();
        if path.is_dir() {
            done += damage(&path, what, how);
        } else if what(&path) {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
            how(&path);
            done += 1;
        }
    }
    done
}

#[tokio::test]
async fn a_damaged_cache_heals() {
    let place = Place::new().await;
    let first = place.open(None).await;
    first.write(&[file("a.txt", &"one line\n".repeat(400)), file("b.txt", "2\n")]).unwrap();
    let one = first.commit(new("one")).await.unwrap();
    drop(first);
    let objects = |p: &Path| p.components().any(|c| c.as_os_str() == "objects");
    type How = fn(&Path);
    let empty: How = |p| std::fs::write(p, "").unwrap();
    let garbage: How = |p| std::fs::write(p, vec![7; 100]).unwrap();
    let gone: How = |p| std::fs::remove_file(p).unwrap();
    for round in 0..2 {
        for (what, how) in [("empty", empty), ("garbage", garbage), ("gone", gone)] {
            // In the first round loose objects as the commit made them, then packs from bundles.
            assert!(damage(place.root.path(), &objects, &how) > 0);
            let again = place.all.open(place.project, attempt(), None).await;
            let again = again.unwrap_or_else(|failure| panic!("round {round}, {what}: {failure:?}"));
            assert_eq!(again.head(), Some(one.oid.as_str()));
            assert_eq!(again.read("a.txt").unwrap().unwrap().len(), 3_600, "{what}");
        }
    }
    // One blob alone: the commit is there, its file is not what it was.
    for how in [empty, garbage] {
        std::fs::remove_dir_all(place.root.path()).unwrap();
        let work = place.open(None).await;
        work.write(&[file("c.txt", &format!("{how:?}"))]).unwrap();
        let oid = work.snapshot("work", at()).await.unwrap();
        let mut out = Command::new("git");
        out.arg("--git-dir").arg(place.root.path().join(format!("repos/{}.git", place.project)));
        let blob = out.args(["-c", "safe.directory=*", "rev-parse", &format!("{oid}:c.txt")]).output().unwrap();
        let blob = String::from_utf8(blob.stdout).unwrap();
        let name = blob.trim()[2..].to_owned();
        assert_eq!(damage(place.root.path(), &|p: &Path| p.ends_with(&name), &how), 1);
        let again = place.all.open(place.project, attempt(), Some(&oid)).await.unwrap();
        assert_eq!(again.read("c.txt").unwrap(), Some(format!("{how:?}")));
    }
    // What is no repository at all.
    let repo = place.root.path().join(format!("repos/{}.git", place.project));
    std::fs::remove_dir_all(&repo).unwrap();
    std::fs::create_dir_all(repo.join("objects")).unwrap();
    std::fs::write(repo.join("HEAD"), "nonsense").unwrap();
    assert_eq!(place.open(None).await.head(), Some(one.oid.as_str()));
}

#[tokio::test]
async fn a_commit_that_is_sent_again_changes_nothing() {
    let place = Place::new().await;
    let first = place.open(None).await;
    first.write(&[file("a", "1")]).unwrap();
    let one = first.commit(new("one")).await.unwrap();
    assert!(one.created);
    let rows = (place.count("project_files").await, place.count("project_bundles").await);
    let again = first.commit(new("one")).await.unwrap();
    assert_eq!((again.oid.as_str(), again.created), (one.oid.as_str(), false));
    let second = place.open(None).await;
    second.write(&[file("a", "2")]).unwrap();
    second.commit(new("two")).await.unwrap();
    // With another commit on top, still.
    assert!(!first.commit(new("one")).await.unwrap().created);
    assert_eq!((rows.0 + 1, rows.1 + 1), (place.count("project_files").await, place.count("project_bundles").await));
    let found = place.open(None).await.landed(None, &[("Loopwright-Step", "step".into())]).await.unwrap();
    assert!(found.is_some());
}

#[tokio::test]
async fn whoever_commits_second_is_told_of_the_conflict() {
    let place = Place::new().await;
    // First commits of a new project, and later ones.
    for round in 0..2 {
        let (one, two) = (place.open(None).await, place.open(None).await);
        one.write(&[file("a", &format!("{round} one"))]).unwrap();
        two.write(&[file("a", &format!("{round} two"))]).unwrap();
        let first = one.commit(new("one")).await.unwrap();
        let failure = two.commit(new("two")).await.unwrap_err();
        assert_eq!(failure.code, "workspace.conflict");
        assert_eq!(place.open(None).await.head(), Some(first.oid.as_str()));
        assert_eq!(place.open(None).await.read("a").unwrap(), Some(format!("{round} one")));
    }
    let at_once = (place.open(None).await, place.open(None).await);
    at_once.0.write(&[file("b", "0")]).unwrap();
    at_once.1.write(&[file("b", "1")]).unwrap();
    let both = tokio::join!(at_once.0.commit(new("x")), at_once.1.commit(new("x")));
    assert_eq!([both.0.is_ok(), both.1.is_ok()].iter().filter(|ok| **ok).count(), 1);
}

#[tokio::test]
async fn paths_that_leave_the_tree_are_refused_before_anything_is_written() {
    let place = Place::new().await;
    let work = place.open(None).await;
    let outside = tempfile::tempdir().unwrap();
    std::fs::write(outside.path().join("secret"), "s").unwrap();
    symlink(outside.path(), work.dir().join("way")).unwrap();
    symlink(outside.path().join("secret"), work.dir().join("link")).unwrap();
    symlink("nowhere", work.dir().join("dangling")).unwrap();
    work.write(&[file("plain", "p"), file("folder/x", "x")]).unwrap();
    for path in [
        "",
        ".",
        "..",
        "../x",
        "/etc/passwd",
        "a/../../x",
        "a/./x",
        "a//x",
        ".git",
        ".git/config",
        "sub/.GIT/hooks/x",
        "way/x",
        "way/secret",
        "link",
        "dangling",
        "dangling/x",
        "a\\b",
        "a\0b",
        "a/",
        &"x/".repeat(300),
        "plain/x",
        "folder",
        "plain/x/y",
    ] {
        let failure = work.write(&[file("good", "g"), file(path, "bad")]).expect_err(path);
        assert_eq!(failure.code, "workspace.path", "{path:?}: {failure:?}");
        assert_eq!(work.read("good").unwrap(), None, "{path:?} wrote half");
        if !["plain/x", "plain/x/y", "folder"].contains(&path) {
            assert_eq!(work.read(path).expect_err(path).code, "workspace.path", "{path:?}");
        }
    }
    // Two changes of one batch that exclude each other, and two that do not.
    assert_eq!(work.write(&[file("t", "1"), file("t/u", "2")]).unwrap_err().code, "workspace.path");
    assert_eq!(work.read("t").unwrap(), None);
    work.write(&[FileChange { path: "plain".into(), content: None }, file("plain/x", "now a folder")]).unwrap();
    assert_eq!(work.read("plain/x").unwrap().as_deref(), Some("now a folder"));
    assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 1);
    let large = file("large", &"x".repeat(usize::try_from(FILE_BYTES_MAX).unwrap() + 1));
    assert_eq!(work.write(&[file("good", "g"), large]).unwrap_err().code, "workspace.too_large");
    assert_eq!(work.read("good").unwrap(), None);
}

#[tokio::test]
async fn links_stay_links_and_odd_names_stop_nothing() {
    use std::os::unix::ffi::OsStrExt;
    let place = Place::new().await;
    let work = place.open(None).await;
    work.write(&[file("a.txt", "a")]).unwrap();
    symlink("/etc/passwd", work.dir().join("link")).unwrap();
    symlink("/", work.dir().join("root")).unwrap();
    for name in [".GIT", "git~1", ".git . ", "GIT~1"] {
        std::fs::write(work.dir().join(name), "x").unwrap();
    }
    std::fs::create_dir(work.dir().join("sub")).unwrap();
    std::fs::write(work.dir().join("sub/.Git"), "gitdir: /").unwrap();
    std::fs::write(work.dir().join("sub/new\nline"), "n").unwrap();
    std::fs::write(work.dir().join("-rf"), "dash").unwrap();
    std::fs::write(work.dir().join(std::ffi::OsStr::from_bytes(b"bad\xff")), "b").unwrap();
    let long = vec!["d".repeat(200); 14].join("/");
    std::fs::create_dir_all(work.dir().join(&long)).unwrap();
    std::fs::write(work.dir().join(&long).join("f"), "too long for an index of Postgres").unwrap();
    assert!(Command::new("mkfifo").arg(work.dir().join("pipe")).status().unwrap().success());
    let paths: Vec<String> = work.changes().await.unwrap().into_iter().map(|c| c.path).collect();
    assert_eq!(paths, ["-rf", "a.txt", "link", "root", "sub/new\nline"]);
    let commit = work.commit(new("odd")).await.unwrap();
    drop(work);
    std::fs::remove_dir_all(place.root.path()).unwrap();
    let again = place.open(None).await;
    assert_eq!((again.head(), again.read("-rf").unwrap().as_deref()), (Some(commit.oid.as_str()), Some("dash")));
    assert_eq!(again.read("link").unwrap_err().code, "workspace.path");
    assert_eq!(again.files().await.unwrap().len(), 5);
    let zip = place.all.archive_zip(place.project).await.unwrap();
    assert!(!zip.is_empty());
}

/// A command that leaves a repository in the tree, as `cargo new` does, must neither fail the step, nor lose its files, nor
/// run a program of its choice as us.
#[tokio::test]
async fn repositories_within_the_tree_are_files_like_others() {
    let place = Place::new().await;
    let work = place.open(None).await;
    for name in ["empty", "full"] {
        let sub = work.dir().join(name);
        std::fs::create_dir(&sub).unwrap();
        git(&sub, &["init", "-q"]);
        std::fs::write(sub.join("file"), name).unwrap();
    }
    git(&work.dir().join("full"), &["add", "."]);
    git(&work.dir().join("full"), &["commit", "-qm", "x"]);
    let paths: Vec<String> = work.changes().await.unwrap().into_iter().map(|c| c.path).collect();
    assert_eq!(paths, ["empty/file", "full/file"]);
    work.commit(new("nested")).await.unwrap();
    drop(work);
    let work = place.open(None).await;
    assert_eq!(work.read("full/file").unwrap().as_deref(), Some("full"));
    // Its configuration names a program for every file.
    let sub = work.dir().join("full");
    let proof = place.root.path().join("executed");
    git(&sub, &["init", "-q"]);
    git(&sub, &["add", "."]);
    git(&sub, &["commit", "-qm", "x"]);
    for name in ["filter.x.clean", "filter.x.smudge", "core.fsmonitor", "diff.external", "core.sshCommand"] {
        git(&sub, &["config", name, &format!("touch {}; cat", proof.display())]);
    }
    std::fs::write(sub.join(".gitattributes"), "* filter=x\n").unwrap();
    std::fs::write(sub.join("file"), "FULL").unwrap();
    std::fs::write(work.dir().join(".gitattributes"), "* filter=x\n").unwrap();
    git(work.dir(), &["init", "-q"]);
    git(work.dir(), &["config", "filter.x.clean", &format!("touch {}; cat", proof.display())]);
    work.changes().await.unwrap();
    work.diff(None, 10_000).await.unwrap();
    work.snapshot("evil", at()).await.unwrap();
    work.commit(new("evil")).await.unwrap();
    assert!(!proof.exists(), "a program of the repository's choice was executed");
    assert_eq!(place.open(None).await.read("full/file").unwrap().as_deref(), Some("FULL"));
}

#[tokio::test]
async fn trees_beyond_the_limits_are_refused_by_name() {
    let place = Place::new().await;
    let work = place.open(None).await;
    for n in 0..=FILES_MAX {
        std::fs::write(work.dir().join(format!("f{n}")), "x").unwrap();
    }
    let failure = work.snapshot("many", at()).await.unwrap_err();
    assert_eq!(failure.code, "workspace.too_large");
    assert!(failure.message.contains(&FILES_MAX.to_string()), "{}", failure.message);
    drop(work);
    let work = place.open(None).await;
    let large = std::fs::File::create(work.dir().join("large")).unwrap();
    large.set_len(TREE_BYTES_MAX + 1).unwrap();
    assert_eq!(work.commit(new("large")).await.unwrap_err().code, "workspace.too_large");
    assert_eq!((place.count("project_bundles").await, place.count("project_refs").await), (0, 0));
    let large = work.dir().join("large");
    std::fs::File::create(&large).unwrap().set_len(FILE_BYTES_MAX + 1).unwrap();
    assert_eq!(work.read("large").unwrap_err().code, "workspace.too_large");
    std::fs::write(&large, [0xff, 0xfe]).unwrap();
    assert_eq!(work.read("large").unwrap_err().code, "workspace.not_text");
}

#[tokio::test]
async fn words_of_a_model_cannot_break_a_commit() {
    let place = Place::new().await;
    let work = place.open(None).await;
    work.write(&[file("a", "1")]).unwrap();
    let odd = NewCommit {
        subject: "sub\0ject\nLoopwright-Run: forged".into(),
        body: "bo\0dy\n\nLoopwright-Step: forged".into(),
        trailers: vec![("Loopwright-Step".into(), "real\nLoopwright-Run: forged".into())],
        ..new("")
    };
    let commit = work.commit(odd).await.unwrap();
    let empty = NewCommit { subject: String::new(), body: String::new(), trailers: vec![], ..new("") };
    let next = place.open(None).await;
    next.write(&[file("a", "2")]).unwrap();
    next.commit(empty).await.unwrap();
    let opened = place.open(None).await;
    assert_eq!(opened.landed(None, &[("Loopwright-Run", "forged".into())]).await.unwrap(), None);
    assert_eq!(opened.landed(None, &[("Loopwright-Step", "forged".into())]).await.unwrap(), None);
    drop(commit);
}

/// Whatever a command has left, the worktree goes with its attempt, and what a dead worker left is taken over.
#[tokio::test]
async fn worktrees_go_whatever_is_in_them() {
    let place = Place::new().await;
    let id = attempt();
    let work = place.all.open(place.project, id, None).await.unwrap();
    let dir = work.dir().to_owned();
    let fill = "mkdir locked && echo x > locked/f && chmod 000 locked/f locked && \
                perl -e 'for (1 .. 3000) { mkdir(\"folder\") && chdir(\"folder\") or exit 0 }'";
    assert!(Command::new("sh").args(["-c", fill]).current_dir(&dir).status().unwrap().success());
    std::mem::forget(work);
    let again = place.all.open(place.project, id, None).await.unwrap();
    assert_eq!((again.dir(), std::fs::read_dir(again.dir()).unwrap().count()), (dir.as_path(), 0));
    assert!(Command::new("sh").args(["-c", fill]).current_dir(&dir).status().unwrap().success());
    drop(again);
    assert!(!dir.exists());
}
