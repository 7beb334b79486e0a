//! How a process is confined: its arguments, its environment, and what happens between fork and exec.
//!
//! Started by root, the command runs as an unprivileged user of its own from before bubblewrap starts. Folders that this user
//! cannot reach (a toolchain below a private home, the worktree) are bound to a reachable place first, in a mount namespace
//! of the child alone.

use super::{
    Level, Limits, SandboxCommand,
    owner::{self, User},
    rules::Confinement,
};
use std::{
    collections::BTreeMap,
    ffi::{CString, OsString},
    io::{self, PipeReader},
    os::unix::{ffi::OsStrExt, process::CommandExt},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// A folder that is readable inside.
#[derive(Clone, Debug)]
pub(super) struct Toolchain {
    /// On this machine.
    pub(super) host: PathBuf,
    /// Name below `/toolchain`.
    name: String,
    env: Vec<(&'static str, &'static str)>,
}

impl Toolchain {
    /// Where its programs are on this machine.
    pub(super) fn programs(&self) -> PathBuf {
        self.host.join("bin")
    }
}

/// What is to be run, and how.
pub(super) struct Plan<'a> {
    pub(super) level: Level,
    pub(super) toolchains: &'a [Toolchain],
    pub(super) command: &'a SandboxCommand,
}

/// A command that is ready to start, the read end of its output, and what must live as long as it.
pub(super) struct Prepared {
    pub(super) command: Command,
    pub(super) reader: PipeReader,
    pub(super) keep: Keep,
}

/// Mount points and scratch folder of one run.
pub(super) struct Keep {
    scratch: PathBuf,
}

impl Drop for Keep {
    fn drop(&mut self) {
        owner::remove(&self.scratch);
    }
}

/// Toolchains that do not lie in the system's own folders: Rust, as the machine's `rustc` names it, and what the
/// configuration adds.
pub(super) fn toolchains(extra: &[PathBuf]) -> Vec<Toolchain> {
    let mut found = Vec::new();
    let sysroot = Command::new("rustc").args(["--print", "sysroot"]).stderr(Stdio::null()).output().ok();
    if let Some(path) =
        sysroot.filter(|o| o.status.success()).map(|o| PathBuf::from(String::from_utf8_lossy(&o.stdout).trim()))
        && path.is_dir()
        && !path.starts_with("/usr")
    {
        found.push(Toolchain { host: path, name: "rust".into(), env: Vec::new() });
    }
    for (n, path) in extra.iter().enumerate().filter(|(_, p)| p.is_dir()) {
        found.push(Toolchain { host: path.clone(), name: format!("extra{n}"), env: Vec::new() });
    }
    found
}

/// Builds the command with everything that can be built before the fork.
pub(super) fn prepare(plan: &Plan<'_>) -> Result<Prepared, String> {
    let scratch =
        tempfile::Builder::new().prefix("loopwright-run-").tempdir().map_err(|e| format!("no scratch folder: {e}"))?;
    // What a command leaves there is removed with more care than a `TempDir` takes.
    let keep = Keep { scratch: scratch.keep() };
    let scratch = keep.scratch.as_path();
    let user = User::of(&plan.command.dir);
    let root = user.is_some();
    let (reader, writer) = io::pipe().map_err(|e| e.to_string())?;
    let errors = writer.try_clone().map_err(|e| e.to_string())?;
    if let Some(user) = user {
        owner::open_to_others(scratch).map_err(|e| e.to_string())?;
        user.give(&plan.command.dir).map_err(|e| format!("{}: {e}", plan.command.dir.display()))?;
    }
    // (from, to): bound before the uid is dropped.
    let mut binds: Vec<(CString, CString)> = Vec::new();
    let mut reachable = |host: &Path, name: &str| -> Result<PathBuf, String> {
        if !root || plan.level == Level::Unconfined {
            return Ok(host.to_path_buf());
        }
        let to = scratch.join(name);
        std::fs::create_dir(&to).map_err(|e| e.to_string())?;
        binds.push((c_path(host)?, c_path(&to)?));
        Ok(to)
    };
    let work = reachable(&plan.command.dir, "work")?;
    let mut tools = Vec::new();
    for tool in plan.toolchains {
        tools.push((reachable(&tool.host, &tool.name)?, tool));
    }
    let private = scratch.join("tmp");
    std::fs::create_dir(&private).map_err(|e| e.to_string())?;
    if let Some(user) = user {
        user.give(&private).map_err(|e| e.to_string())?;
    }
    let mut command = match plan.level {
        Level::Bubblewrap => bubblewrap(plan, &work, &private, &tools),
        Level::Landlock | Level::Unconfined => {
            let mut command = Command::new("/bin/sh");
            command.arg("-c").arg(&plan.command.script);
            command
        }
    };
    let inside = plan.level == Level::Bubblewrap;
    let tool_path = |host: &Path, name: &str| {
        if inside { format!("/toolchain/{name}/bin") } else { format!("{}/bin", host.display()) }
    };
    let mut path: Vec<String> = tools.iter().map(|(host, tool)| tool_path(host, &tool.name)).collect();
    path.extend(["/usr/local/bin".into(), "/usr/bin".into(), "/bin".into()]);
    let tmp = if inside { "/tmp".to_owned() } else { private.display().to_string() };
    command
        .env_clear()
        .env("PATH", path.join(":"))
        .env("HOME", &tmp)
        .env("TMPDIR", &tmp)
        .env("LANG", "C.UTF-8")
        .env("CARGO_HOME", format!("{tmp}/cargo"))
        .env("CARGO_NET_OFFLINE", "true")
        .env("CARGO_TERM_COLOR", "never")
        .envs(tools.iter().flat_map(|(_, t)| t.env.iter().copied()))
        .envs(&plan.command.env)
        .stdin(Stdio::null())
        .stdout(writer)
        .stderr(errors);
    if !inside && binds.is_empty() {
        command.current_dir(&work);
    }
    let confinement = match plan.level {
        Level::Landlock => {
            let tools = plan.toolchains.iter().map(|tool| tool.host.as_path());
            Some(Confinement::new(&plan.command.dir, &private, tools, plan.command.network)?)
        }
        Level::Bubblewrap | Level::Unconfined => None,
    };
    let enter = if inside || binds.is_empty() { None } else { Some(c_path(&work)?) };
    let mut child = Child {
        binds,
        user: user.filter(|_| plan.level != Level::Unconfined),
        limits: plan.command.limits.clone(),
        enter,
        confinement,
    };
    // SAFETY: between fork and exec the closure calls only async-signal-safe system calls on memory prepared above.
    unsafe {
        command.pre_exec(move || child.enter());
    }
    Ok(Prepared { command, reader, keep })
}

fn bubblewrap(plan: &Plan<'_>, work: &Path, private: &Path, tools: &[(PathBuf, &Toolchain)]) -> Command {
    let mut command = Command::new("bwrap");
    command.args([
        "--unshare-all",
        "--unshare-user",
        "--disable-userns",
        "--uid",
        "65534",
        "--gid",
        "65534",
        "--cap-drop",
        "ALL",
    ]);
    command.args(["--die-with-parent", "--new-session", "--hostname", "sandbox", "--clearenv"]);
    if plan.command.network {
        command.arg("--share-net");
        command.args([
            "--ro-bind-try",
            "/etc/resolv.conf",
            "/etc/resolv.conf",
            "--ro-bind-try",
            "/etc/ssl",
            "/etc/ssl",
        ]);
    }
    command.args(["--ro-bind", "/usr", "/usr"]);
    for name in ["bin", "sbin", "lib", "lib32", "lib64"] {
        let host = Path::new("/").join(name);
        match std::fs::read_link(&host) {
            Ok(target) => {
                command.arg("--symlink").arg(target).arg(&host);
            }
            Err(_) if host.is_dir() => {
                command.arg("--ro-bind").arg(&host).arg(&host);
            }
            Err(_) => {}
        }
    }
    for file in ["/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/alternatives"] {
        command.args(["--ro-bind-try", file, file]);
    }
    // A folder on disk: what fills a tmpfs is the memory of the machine.
    command.args(["--proc", "/proc", "--dev", "/dev", "--bind"]).arg(private).arg("/tmp");
    for (host, tool) in tools {
        command.arg("--ro-bind").arg(host).arg(format!("/toolchain/{}", tool.name));
    }
    command.arg("--bind").arg(work).args(["/workspace", "--chdir", "/workspace", "--remount-ro", "/"]);
    // The environment is set by hand: bwrap itself runs with the same small one.
    let tmp = "/tmp";
    let path: Vec<String> = tools
        .iter()
        .map(|(_, t)| format!("/toolchain/{}/bin", t.name))
        .chain(["/usr/local/bin".into(), "/usr/bin".into(), "/bin".into()])
        .collect();
    let mut env: BTreeMap<OsString, OsString> = BTreeMap::new();
    for (name, value) in [
        ("PATH", path.join(":")),
        ("HOME", tmp.into()),
        ("TMPDIR", tmp.into()),
        ("LANG", "C.UTF-8".into()),
        ("CARGO_HOME", format!("{tmp}/cargo")),
        ("CARGO_NET_OFFLINE", "true".into()),
        ("CARGO_TERM_COLOR", "never".into()),
    ] {
        env.insert(name.into(), value.into());
    }
    env.extend(plan.command.env.iter().map(|(k, v)| (k.into(), v.into())));
    for (name, value) in env {
        command.arg("--setenv").arg(name).arg(value);
    }
    command.args(["--", "/bin/sh", "-c"]).arg(&plan.command.script);
    command
}

/// What the child does between fork and exec.
struct Child {
    binds: Vec<(CString, CString)>,
    /// Taken before anything else is started.
    user: Option<User>,
    limits: Limits,
    /// Current folder, when it exists only after the mounts.
    enter: Option<CString>,
    confinement: Option<Confinement>,
}

impl Child {
    fn enter(&mut self) -> io::Result<()> {
        // SAFETY: plain system calls; pointers are to C strings that live in `self`.
        unsafe {
            // A session of its own: no terminal of the worker's, and a mark by which everything of this run is found again.
            check(libc::setsid())?;
            close_on_exec();
            if !self.binds.is_empty() {
                check(libc::unshare(libc::CLONE_NEWNS))?;
                check(libc::mount(
                    std::ptr::null(),
                    c"/".as_ptr(),
                    std::ptr::null(),
                    libc::MS_REC | libc::MS_PRIVATE,
                    std::ptr::null(),
                ))?;
                for (from, to) in &self.binds {
                    check(libc::mount(
                        from.as_ptr(),
                        to.as_ptr(),
                        std::ptr::null(),
                        libc::MS_BIND | libc::MS_REC,
                        std::ptr::null(),
                    ))?;
                }
            }
            let limits = &self.limits;
            let processes = if self.user.is_some() { limits.processes } else { limits.processes.max(8192) };
            for (what, value) in [
                (libc::RLIMIT_AS, limits.memory_bytes),
                (libc::RLIMIT_FSIZE, limits.file_bytes),
                (libc::RLIMIT_CPU, limits.cpu_seconds),
                (libc::RLIMIT_NOFILE, 1024),
                (libc::RLIMIT_CORE, 0),
                (libc::RLIMIT_NPROC, processes),
            ] {
                let mut now = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
                check(libc::getrlimit(what, &raw mut now))?;
                let value = value.min(now.rlim_max);
                check(libc::setrlimit(what, &libc::rlimit { rlim_cur: value, rlim_max: value }))?;
            }
            if let Some(User(id)) = self.user {
                check(libc::setgroups(0, std::ptr::null()))?;
                check(libc::setgid(id))?;
                check(libc::setuid(id))?;
            }
            // A worker that is killed takes the command with it; changing the user would have cleared this.
            check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL))?;
            if let Some(dir) = &self.enter {
                check(libc::chdir(dir.as_ptr()))?;
            }
        }
        match self.confinement.take() {
            Some(confinement) => confinement.enforce(),
            None => Ok(()),
        }
    }
}

/// Files of the worker that its own parent left open, or a library opened without care, stay behind.
///
/// # Safety
/// Only async-signal-safe calls.
unsafe fn close_on_exec() {
    // SAFETY: plain system calls on numbers.
    unsafe {
        if libc::syscall(libc::SYS_close_range, 3u32, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) == 0 {
            return;
        }
        // Kernels before 5.11.
        for file in 3..4096 {
            libc::fcntl(file, libc::F_SETFD, libc::FD_CLOEXEC);
        }
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn c_path(path: &Path) -> Result<CString, String> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| format!("{} holds a NUL", path.display()))
}
