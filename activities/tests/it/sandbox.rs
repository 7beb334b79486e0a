//! The sandbox against real commands, at every level that works on this machine, as root and as an ordinary user.
//!
//! A level that does not work here is skipped with a word on standard error; at least one has to work.

use loopwright_activities::sandbox::{Evidence, Level, Limits, Sandbox, SandboxCommand, SandboxConfig};
use loopwright_engine::{
    FailureKind,
    embedded::testing::{ALL_TESTS, left_out},
};
use sha2::{Digest, Sha256};
use std::{
    collections::BTreeMap,
    io::ErrorKind,
    net::{TcpListener, UdpSocket},
    os::unix::{
        fs::PermissionsExt,
        net::UnixListener,
        process::{CommandExt, ExitStatusExt},
    },
    path::Path,
    process::{Child, Command, Stdio},
    sync::OnceLock,
    time::{Duration, Instant},
};
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

/// Far more than any command here takes, far less than the commands that have to be stopped would.
const SOON: Duration = Duration::from_secs(20);

/// A sandbox for each level that works here.
pub(crate) fn levels() -> &'static [Sandbox] {
    static LEVELS: OnceLock<Vec<Sandbox>> = OnceLock::new();
    LEVELS.get_or_init(|| {
        let mut found = Vec::new();
        for (wanted, forbid_bubblewrap) in [(Level::Bubblewrap, false), (Level::Landlock, true)] {
            match Sandbox::detect(SandboxConfig { forbid_bubblewrap, ..SandboxConfig::default() }) {
                Ok(sandbox) if sandbox.level() == wanted => found.push(sandbox),
                // Landlock is the kernel's to have; Bubblewrap needs the rights that make namespaces.
                Ok(_) if wanted == Level::Bubblewrap => {
                    left_out("the sandbox of Bubblewrap", "it does not work on this machine")
                }
                Err(error) if wanted == Level::Bubblewrap => left_out("the sandbox of Bubblewrap", &error.to_string()),
                Ok(_) => eprintln!("SKIPPED: {wanted:?} does not work on this machine"),
                Err(error) => eprintln!("SKIPPED: {wanted:?} does not work on this machine: {error}"),
            }
        }
        assert!(!found.is_empty(), "no level of the sandbox works on this machine");
        found
    })
}

fn is_root() -> bool {
    // SAFETY: a plain system call.
    unsafe { libc::geteuid() == 0 }
}

fn folder() -> TempDir {
    tempfile::Builder::new().prefix("loopwright-test-").tempdir().unwrap()
}

fn command(dir: &Path, script: &str) -> SandboxCommand {
    SandboxCommand {
        script: script.to_owned(),
        dir: dir.to_owned(),
        env: BTreeMap::new(),
        limits: Limits { wall: Duration::from_secs(60), ..Limits::default() },
        network: false,
    }
}

async fn run(sandbox: &Sandbox, command: SandboxCommand) -> Evidence {
    sandbox.run(command, &CancellationToken::new()).await.unwrap()
}

async fn sh(sandbox: &Sandbox, dir: &Path, script: &str) -> Evidence {
    run(sandbox, command(dir, script)).await
}

/// A number that no other test uses, as an argument that marks a process.
fn token() -> String {
    format!("86400.{}", uuid::Uuid::now_v7().as_u128() % 1_000_000_000_000_000)
}

/// Whether a process with this argument lives, in whatever namespace.
fn lives(token: &str) -> bool {
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    entries.filter(|e| e.file_name().to_string_lossy().bytes().all(|b| b.is_ascii_digit())).any(|entry| {
        let cmdline = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        cmdline.split(|b| *b == 0).any(|argument| argument == token.as_bytes())
    })
}

/// Waits, bounded, for what another process or thread does.
async fn until(what: &str, holds: impl Fn() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < SOON, "{what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn exit_code_streams_and_hash_are_evidence() {
    for sandbox in levels() {
        let dir = folder();
        let evidence = sh(sandbox, dir.path(), "echo out; echo err >&2; echo more; exit 3").await;
        assert_eq!((evidence.exit_code, evidence.signal, evidence.timed_out), (Some(3), None, false));
        assert_eq!((evidence.output_tail.as_str(), evidence.output_bytes), ("out\nerr\nmore\n", 13));
        let hash: String = Sha256::digest("out\nerr\nmore\n").iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!((evidence.log_sha256, evidence.level), (hash, sandbox.level()));
        assert_eq!(sh(sandbox, dir.path(), "true").await.exit_code, Some(0));
        assert_eq!(sh(sandbox, dir.path(), "no-such-program").await.exit_code, Some(127));
        let killed = sh(sandbox, dir.path(), "kill -9 $$").await;
        // Bubblewrap is the parent and tells of a signal as shells do.
        assert!(killed.exit_code == Some(137) || killed.signal == Some(9), "{killed:?}");
    }
}

#[tokio::test]
async fn long_output_is_hashed_whole_and_its_end_kept() {
    let whole: String = (1..=50_000).map(|n| format!("{n}\n")).collect();
    let hash: String = Sha256::digest(&whole).iter().map(|b| format!("{b:02x}")).collect();
    for sandbox in levels() {
        let dir = folder();
        let mut long = command(dir.path(), "seq 1 50000");
        long.limits.tail_bytes = 1_000;
        let evidence = run(sandbox, long).await;
        assert_eq!((evidence.output_bytes, evidence.log_sha256), (whole.len() as u64, hash.clone()));
        assert!(evidence.output_tail.starts_with("… (cut)\n") && evidence.output_tail.ends_with("\n50000\n"));
        assert!(evidence.output_tail.len() <= 1_020);
    }
}

/// Postgres takes no NUL in text or JSON: a command that prints one would make its step impossible to record.
#[tokio::test]
async fn output_that_is_no_text_becomes_text_that_postgres_takes() {
    for sandbox in levels() {
        let dir = folder();
        let evidence = sh(sandbox, dir.path(), r"printf 'a\000b\377c'").await;
        assert_eq!(evidence.output_bytes, 5);
        assert!(!evidence.output_tail.contains('\0'), "{:?}", evidence.output_tail);
        assert!(evidence.output_tail.starts_with('a') && evidence.output_tail.ends_with('c'));
    }
}

#[tokio::test]
async fn a_flood_of_output_is_stopped() {
    for sandbox in levels() {
        let (dir, token) = (folder(), token());
        let mut flood = command(dir.path(), &format!("sleep {token} & yes"));
        flood.limits.output_bytes_max = 1 << 20;
        let evidence = run(sandbox, flood).await;
        assert!(evidence.output_bytes > 1 << 20 && evidence.exit_code != Some(0), "{:?}", evidence.exit_code);
        assert!(evidence.duration_ms < 20_000 && !evidence.timed_out);
        until("the rest of a flood goes on", || !lives(&token)).await;
    }
}

#[tokio::test]
async fn the_wall_limit_ends_everything_that_was_started() {
    for sandbox in levels() {
        let (dir, token) = (folder(), token());
        let script = format!("sleep {token} & (sleep {token} &) ; setsid sleep {token} & sleep {token}");
        let mut slow = command(dir.path(), &script);
        slow.limits.wall = Duration::from_millis(700);
        let run = tokio::time::timeout(SOON, run(sandbox, slow)).await;
        let evidence = run.unwrap_or_else(|_| panic!("{:?}: the limit did not end the run", sandbox.level()));
        assert!(evidence.timed_out && evidence.exit_code.is_none(), "{evidence:?}");
        until(&format!("{:?}: something survived", sandbox.level()), || !lives(&token)).await;
    }
}

#[tokio::test]
async fn what_a_command_leaves_in_the_background_goes_with_it() {
    for sandbox in levels() {
        let (dir, token) = (folder(), token());
        let daemon = format!(
            "perl -MPOSIX -e 'exit if fork; POSIX::setsid(); setpgrp(0, 0); exit if fork; exec \"sleep\", \"{token}\"'"
        );
        for left in [
            format!("sleep {token} & echo gone"),
            format!("setsid sleep {token} & echo gone"),
            format!("{daemon}; echo gone"),
        ] {
            let run = tokio::time::timeout(SOON, sh(sandbox, dir.path(), &left)).await;
            let evidence = run.unwrap_or_else(|_| panic!("{:?}: `{left}` holds the run", sandbox.level()));
            assert_eq!((evidence.exit_code, evidence.output_tail.as_str()), (Some(0), "gone\n"), "{left}");
            until(&format!("{:?}: `{left}` survived", sandbox.level()), || !lives(&token)).await;
        }
    }
}

#[tokio::test]
async fn memory_and_file_size_are_limited() {
    for sandbox in levels() {
        let dir = folder();
        // `tail` keeps what it may have to print.
        let mut hungry = command(dir.path(), "head -c 700000000 /dev/zero | tail -c 600000000 | wc -c");
        hungry.limits.memory_bytes = 256 << 20;
        let evidence = run(sandbox, hungry).await;
        assert!(evidence.output_tail.contains("memory exhausted"), "{evidence:?}");
        let mut large = command(dir.path(), "head -c 3000000 /dev/zero > large");
        large.limits.file_bytes = 1 << 20;
        assert_ne!(run(sandbox, large).await.exit_code, Some(0));
        assert!(std::fs::metadata(dir.path().join("large")).unwrap().len() <= 1 << 20);
        let mut busy = command(dir.path(), "while :; do :; done");
        busy.limits.cpu_seconds = 1;
        let evidence = run(sandbox, busy).await;
        assert!(evidence.exit_code != Some(0) && !evidence.timed_out, "{evidence:?}");
    }
}

#[tokio::test]
async fn a_fork_bomb_is_bounded_and_cleared_away() {
    if !is_root() {
        let why = "the limit of an ordinary user counts all of its processes and is too large for a test";
        return left_out("a fork bomb", why);
    }
    for sandbox in levels() {
        let (dir, token) = (folder(), token());
        let script = format!("n=0; while [ $n -lt 300 ]; do sleep {token} & n=$((n+1)); echo $n; done");
        let mut bomb = command(dir.path(), &script);
        bomb.limits.processes = 64;
        let evidence = run(sandbox, bomb).await;
        assert_ne!(evidence.exit_code, Some(0));
        assert!(evidence.output_tail.to_lowercase().contains("fork"), "{evidence:?}");
        until("part of the bomb survived", || !lives(&token)).await;
        let mut bomb = command(dir.path(), &format!("b() {{ b | b & sleep {token}; }}; b; sleep {token}"));
        bomb.limits.processes = 64;
        bomb.limits.wall = Duration::from_millis(1_500);
        assert!(tokio::time::timeout(SOON, run(sandbox, bomb)).await.is_ok(), "{:?}", sandbox.level());
        until("part of the bomb survived", || !lives(&token)).await;
    }
}

#[tokio::test]
async fn there_is_no_network_unless_it_is_asked_for() {
    for sandbox in levels() {
        let (dir, outside) = (folder(), folder());
        std::fs::set_permissions(outside.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        let path = outside.path().join("socket");
        let unix = UnixListener::bind(&path).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o777)).unwrap();
        tcp.set_nonblocking(true).unwrap();
        udp.set_nonblocking(true).unwrap();
        unix.set_nonblocking(true).unwrap();
        let (tcp_port, udp_port) = (tcp.local_addr().unwrap().port(), udp.local_addr().unwrap().port());
        let connect = format!("bash -c 'echo hi >/dev/tcp/127.0.0.1/{tcp_port}'");
        let send = format!("bash -c 'echo hi >/dev/udp/127.0.0.1/{udp_port}'");
        let local =
            format!("perl -MIO::Socket::UNIX -e 'IO::Socket::UNIX->new(Peer => \"{}\") or exit 7'", path.display());
        assert_ne!(sh(sandbox, dir.path(), &connect).await.exit_code, Some(0));
        sh(sandbox, dir.path(), &send).await;
        assert_ne!(sh(sandbox, dir.path(), &local).await.exit_code, Some(0), "{:?}", sandbox.level());
        assert_eq!(tcp.accept().unwrap_err().kind(), ErrorKind::WouldBlock);
        assert_eq!(udp.recv(&mut [0; 8]).unwrap_err().kind(), ErrorKind::WouldBlock);
        assert_eq!(unix.accept().unwrap_err().kind(), ErrorKind::WouldBlock, "{:?}", sandbox.level());
        // What build tools use between their own processes stays.
        let pair = "perl -MSocket -e 'socketpair(my $a, my $b, AF_UNIX, SOCK_STREAM, PF_UNSPEC) or exit 7'";
        assert_eq!(sh(sandbox, dir.path(), pair).await.exit_code, Some(0));

        let open = SandboxCommand { network: true, ..command(dir.path(), &connect) };
        let evidence = run(sandbox, open).await;
        assert_eq!(evidence.exit_code, Some(0), "{evidence:?}");
        assert!(tcp.accept().is_ok());
    }
}

#[tokio::test]
async fn files_outside_can_be_neither_read_nor_written() {
    for sandbox in levels() {
        let (dir, outside) = (folder(), folder());
        let secret = outside.path().join("secret");
        std::fs::write(&secret, "s3cret").unwrap();
        let shown = secret.display();
        let own = std::process::id();
        std::os::unix::fs::symlink(&secret, dir.path().join("link")).unwrap();
        std::os::unix::fs::symlink(outside.path(), dir.path().join("way")).unwrap();
        // A folder that only its owner may enter, and one that the whole world may write to.
        for mode in [0o700, 0o777] {
            std::fs::set_permissions(outside.path(), std::fs::Permissions::from_mode(mode)).unwrap();
            for script in [
                format!("cat {shown}"),
                "cat link".into(),
                "cat way/secret".into(),
                format!("cat ../{}/secret", outside.path().file_name().unwrap().to_str().unwrap()),
                format!("cat /proc/{own}/environ"),
                "cat /proc/1/environ | tr '\\0' '\\n' | grep -v '^[A-Z_]*=' ; false".into(),
                format!("cat /proc/{own}/root{shown}"),
                format!("ls {}", outside.path().display()),
                "ls /root/.ssh || ls /root || ls /home".into(),
                "cat /etc/shadow".into(),
                format!("ls {}", env!("CARGO_MANIFEST_DIR")),
                format!("echo changed > {shown}"),
                "echo changed > link".into(),
                "echo changed > way/new".into(),
                format!("touch {}/new", outside.path().display()),
                "touch /usr/new".into(),
                "touch /etc/new".into(),
                format!("rm -f {shown} && test ! -e {shown} && test -e /nowhere"),
                format!("ln {shown} hard"),
                format!("mv {shown} moved"),
                format!("perl -e 'truncate(\"{shown}\", 0) or exit 1'"),
            ] {
                let evidence = sh(sandbox, dir.path(), &script).await;
                assert_ne!(evidence.exit_code, Some(0), "{:?}: {script}: {evidence:?}", sandbox.level());
                assert!(!evidence.output_tail.contains("s3cret"), "{:?}: {script}", sandbox.level());
            }
        }
        assert_eq!(std::fs::read_to_string(&secret).unwrap(), "s3cret");
        assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 1);
        let seen = sh(sandbox, dir.path(), "cat /proc/1/environ").await.output_tail;
        assert!(!seen.contains("CARGO_MANIFEST_DIR"), "{seen}");
    }
}

#[tokio::test]
async fn the_environment_of_the_worker_is_not_passed_on() {
    assert!(std::env::var_os("CARGO_MANIFEST_DIR").is_some(), "something to hide");
    for sandbox in levels() {
        let dir = folder();
        let mut asked = command(dir.path(), "env");
        asked.env.insert("WANTED".into(), "yes".into());
        let evidence = run(sandbox, asked).await;
        let mut names: Vec<&str> = evidence.output_tail.lines().filter_map(|l| l.split('=').next()).collect();
        names.retain(|name| !["PWD", "OLDPWD", "SHLVL", "_"].contains(name));
        names.sort_unstable();
        let expected =
            ["CARGO_HOME", "CARGO_NET_OFFLINE", "CARGO_TERM_COLOR", "HOME", "LANG", "PATH", "TMPDIR", "WANTED"];
        assert_eq!(names, expected, "{:?}", sandbox.level());
        // Nor is an open file of the worker.
        let files =
            "perl -e 'for $n (3 .. 255) { print \"$n\\n\" if open(my $f, \"<&=\", $n) && $n != fileno(STDIN) }'";
        let evidence = sh(sandbox, dir.path(), files).await;
        assert_eq!((evidence.exit_code, evidence.output_tail.as_str()), (Some(0), ""), "{:?}", sandbox.level());
    }
}

/// A process of ours that confined code is to leave alone.
struct Victim(Child);

impl Drop for Victim {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

#[tokio::test]
async fn processes_of_the_worker_are_out_of_reach() {
    for sandbox in levels() {
        let dir = folder();
        let mut victim = Victim(Command::new("sleep").arg("600").stdin(Stdio::null()).spawn().unwrap());
        let id = victim.0.id();
        for script in [
            format!("kill -9 {id}"),
            format!("kill -0 {}", std::process::id()),
            format!("kill -0 {}", std::os::unix::process::parent_id()),
        ] {
            let evidence = sh(sandbox, dir.path(), &script).await;
            // In a process table of its own the numbers belong to nobody, or to the command itself.
            assert!(evidence.exit_code != Some(0), "{:?}: {script}: {evidence:?}", sandbox.level());
        }
        sh(sandbox, dir.path(), "kill -9 -1").await;
        assert!(victim.0.try_wait().unwrap().is_none(), "{:?}: it was killed", sandbox.level());
        let seen = sh(sandbox, dir.path(), "ps ax -o args || cat /proc/[0-9]*/cmdline | tr '\\0' ' '").await;
        assert!(!seen.output_tail.contains("sleep 600"), "{seen:?}");
    }
}

#[tokio::test]
async fn results_are_ours_afterwards_and_the_next_command_s_too() {
    for sandbox in levels() {
        let dir = folder();
        std::fs::write(dir.path().join("ours"), "1\n").unwrap();
        let first = sh(
            sandbox,
            dir.path(),
            "mkdir -p a/b && cat ours > a/b/c && echo 2 >> ours && umask 077 && mkdir p && echo x > p/q",
        )
        .await;
        assert_eq!(first.exit_code, Some(0), "{first:?}");
        assert_eq!(std::fs::read_to_string(dir.path().join("a/b/c")).unwrap(), "1\n");
        assert_eq!(std::fs::read_to_string(dir.path().join("p/q")).unwrap(), "x\n");
        // Files that we write between two commands, in folders of the first.
        std::fs::write(dir.path().join("a/b/c"), "changed\n").unwrap();
        std::fs::create_dir(dir.path().join("a/new")).unwrap();
        std::fs::write(dir.path().join("a/new/file"), "new\n").unwrap();
        let second = sh(sandbox, dir.path(), "cat a/b/c ours && rm -r a/new && echo 3 > a/b/c").await;
        assert_eq!((second.exit_code, second.output_tail.as_str()), (Some(0), "changed\n1\n2\n"));
        let path = dir.path().to_owned();
        dir.close().unwrap();
        assert!(!path.exists());
    }
}

#[tokio::test]
async fn a_link_that_a_command_leaves_gives_nothing_outside_away() {
    for sandbox in levels() {
        let (dir, outside) = (folder(), folder());
        let file = outside.path().join("file");
        std::fs::write(&file, "ours").unwrap();
        let before = std::os::unix::fs::MetadataExt::uid(&std::fs::metadata(&file).unwrap());
        let links = format!("ln -s {0} folder; ln -s {0}/file file; ln -s / root", outside.path().display());
        assert_eq!(sh(sandbox, dir.path(), &links).await.exit_code, Some(0));
        assert_eq!(sh(sandbox, dir.path(), "true").await.exit_code, Some(0));
        assert_eq!(std::os::unix::fs::MetadataExt::uid(&std::fs::metadata(&file).unwrap()), before);
    }
}

/// A program that nests folders without end must not take the worker with it.
#[tokio::test]
async fn folders_deeper_than_a_path_may_be_stop_nothing() {
    for sandbox in levels() {
        let dir = folder();
        let deep = "perl -e 'for (1 .. 3000) { mkdir(\"folder\") && chdir(\"folder\") or exit 0 }'";
        sh(sandbox, dir.path(), deep).await;
        let evidence = sh(sandbox, dir.path(), "echo still here").await;
        assert_eq!(evidence.output_tail, "still here\n");
        // `TempDir` would do it, and says nothing.
        let status = Command::new("rm").arg("-rf").arg(dir.path()).status().unwrap();
        assert!(status.success());
    }
}

#[tokio::test]
async fn cancellation_ends_the_command_at_once() {
    for sandbox in levels() {
        let (dir, token, cancel) = (folder(), token(), CancellationToken::new());
        let slow = command(dir.path(), &format!("setsid sleep {token} & touch started; sleep {token}"));
        let (sandbox, asked) = (sandbox.clone(), cancel.clone());
        let running = tokio::spawn(async move { sandbox.run(slow, &asked).await });
        until("it never started", || dir.path().join("started").exists()).await;
        cancel.cancel();
        let failure = tokio::time::timeout(SOON, running).await.expect("in time").unwrap().unwrap_err();
        assert_eq!(failure.kind, FailureKind::Cancelled);
        until("something survived", || !lives(&token)).await;
    }
}

/// The engine drops the future of an attempt that ran out of time.
#[tokio::test]
async fn a_run_that_nobody_waits_for_any_more_ends_its_command() {
    for sandbox in levels() {
        let (dir, token) = (folder(), token());
        let slow = command(dir.path(), &format!("touch started; sleep {token}"));
        let inner = sandbox.clone();
        let running = tokio::spawn(async move { inner.run(slow, &CancellationToken::new()).await });
        until("it never started", || dir.path().join("started").exists()).await;
        running.abort();
        assert!(running.await.unwrap_err().is_cancelled());
        until(&format!("{:?}: it goes on without us", sandbox.level()), || !lives(&token)).await;
    }
}

/// `bwrap --die-with-parent` means the thread that forked it.
#[test]
fn a_command_outlives_the_thread_that_began_to_wait_for_it() {
    for sandbox in levels() {
        let dir = folder();
        let slow = command(dir.path(), "touch started; while [ ! -e go ]; do sleep 0.05; done; echo done");
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let cancel = CancellationToken::new();
        let mut running = Box::pin(sandbox.run(slow, &cancel));
        // The first polls happen in a thread of its own, which then ends.
        let guard = runtime.handle().clone();
        std::thread::scope(|scope| {
            let polled = scope.spawn(|| {
                let _entered = guard.enter();
                let mut context = std::task::Context::from_waker(std::task::Waker::noop());
                let begun = Instant::now();
                while !dir.path().join("started").exists() {
                    assert!(running.as_mut().poll(&mut context).is_pending() && begun.elapsed() < SOON);
                    std::thread::yield_now();
                }
            });
            polled.join().unwrap();
        });
        std::fs::write(dir.path().join("go"), "").unwrap();
        let evidence = runtime.block_on(running).unwrap();
        assert_eq!((evidence.exit_code, evidence.output_tail.as_str()), (Some(0), "done\n"), "{:?}", sandbox.level());
    }
}

#[tokio::test]
async fn a_small_crate_is_built_and_tested() {
    for sandbox in levels() {
        let dir = folder();
        std::fs::create_dir(dir.path().join("src")).unwrap();
        let manifest = "[package]\nname = \"tiny\"\nversion = \"0.1.0\"\nedition = \"2021\"\n";
        std::fs::write(dir.path().join("Cargo.toml"), manifest).unwrap();
        let code = "pub fn two() -> u8 { 2 }\n#[cfg(test)]\nmod tests { #[test] fn it_is_two() { assert_eq!(super::two(), 2); } }\n";
        std::fs::write(dir.path().join("src/lib.rs"), code).unwrap();
        let evidence = sh(sandbox, dir.path(), "cargo build --offline && cargo test --offline").await;
        assert_eq!(evidence.exit_code, Some(0), "{:?}: {}", sandbox.level(), evidence.output_tail);
        assert!(evidence.output_tail.contains("1 passed"), "{}", evidence.output_tail);
    }
}

/// The same tests again as an ordinary user, when this is root.
#[test]
fn an_ordinary_user_s_sandbox_holds_too() {
    if !is_root() {
        return left_out("the sandbox of an ordinary user", "this is one already");
    }
    let home = folder();
    std::os::unix::fs::chown(home.path(), Some(USER), Some(USER)).unwrap();
    let ordinary = |program: &Path| {
        let mut command = Command::new(program);
        command.uid(USER).gid(USER).env("HOME", home.path()).env("TMPDIR", home.path());
        // What needs root is done here.
        command.env_remove(ALL_TESTS);
        command.current_dir("/");
        command
    };
    let binary = std::env::current_exe().unwrap();
    match ordinary(&binary).arg("--list").stdout(Stdio::null()).status() {
        Ok(status) if status.success() => {}
        other => {
            eprintln!("SKIPPED: an ordinary user cannot execute {}: {other:?}", binary.display());
            return;
        }
    }
    let mut tests = ordinary(&binary);
    tests.args(["sandbox::", "--test-threads=2", "--nocapture"]);
    // Its home, with the toolchain, may be closed to others.
    eprintln!("SKIPPED: building a crate as an ordinary user");
    let skipped = ["an_ordinary_user_s_sandbox_holds_too", "a_small_crate_is_built_and_tested"];
    tests.args(skipped.iter().flat_map(|name| ["--skip", *name]));
    let output = tests.output().unwrap();
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    eprintln!("as an ordinary user:\n{text}");
    assert!(output.status.success(), "exit code {:?}, signal {:?}", output.status.code(), output.status.signal());
}

/// An id that no account here has.
const USER: u32 = 54_321;
