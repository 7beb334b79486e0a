//! How a process is confined: its arguments, its environment, and what happens between fork and exec.
//!
//! Started by root, the command runs as `nobody` from before bubblewrap starts. Folders that `nobody` cannot reach (a toolchain
//! below a private home, the worktree) are bound to a reachable place first, in a mount namespace of the child alone.

use super::{Level, Limits, SandboxCommand};
use landlock::{
    ABI, Access, AccessFs, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr, RulesetCreated,
    RulesetCreatedAttr, Scope,
};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};
use std::{
    collections::BTreeMap,
    ffi::{CString, OsString},
    io::{self, PipeReader},
    os::unix::{ffi::OsStrExt, process::CommandExt},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// User and group of confined commands when the worker runs as root.
const NOBODY: u32 = 65534;

/// A folder that is readable inside.
#[derive(Clone, Debug)]
pub(super) struct Toolchain {
    /// On this machine.
    host: PathBuf,
    /// Name below `/toolchain`.
    name: String,
    env: Vec<(&'static str, &'static str)>,
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
    _scratch: tempfile::TempDir,
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
    let root = is_root();
    let (reader, writer) = io::pipe().map_err(|e| e.to_string())?;
    let errors = writer.try_clone().map_err(|e| e.to_string())?;
    if root {
        open_to_others(scratch.path())?;
        give_away(&plan.command.dir).map_err(|e| format!("{}: {e}", plan.command.dir.display()))?;
    }
    // (from, to): bound before the uid is dropped.
    let mut binds: Vec<(CString, CString)> = Vec::new();
    let mut reachable = |host: &Path, name: &str| -> Result<PathBuf, String> {
        if !root || plan.level == Level::Unconfined {
            return Ok(host.to_path_buf());
        }
        let to = scratch.path().join(name);
        std::fs::create_dir(&to).map_err(|e| e.to_string())?;
        binds.push((c_path(host)?, c_path(&to)?));
        Ok(to)
    };
    let work = reachable(&plan.command.dir, "work")?;
    let mut tools = Vec::new();
    for tool in plan.toolchains {
        tools.push((reachable(&tool.host, &tool.name)?, tool));
    }
    let private = scratch.path().join("tmp");
    std::fs::create_dir(&private).map_err(|e| e.to_string())?;
    if root {
        own(&private).map_err(|e| e.to_string())?;
    }
    let mut command = match plan.level {
        Level::Bubblewrap => bubblewrap(plan, &work, &tools),
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
        Level::Landlock => Some(Confinement::new(&plan.command.dir, &private, plan.toolchains, plan.command.network)?),
        Level::Bubblewrap | Level::Unconfined => None,
    };
    let enter = if inside || binds.is_empty() { None } else { Some(c_path(&work)?) };
    let mut child = Child {
        binds,
        root: root && plan.level != Level::Unconfined,
        limits: plan.command.limits.clone(),
        enter,
        confinement,
    };
    // SAFETY: between fork and exec the closure calls only async-signal-safe system calls on memory prepared above.
    unsafe {
        command.pre_exec(move || child.enter());
    }
    Ok(Prepared { command, reader, keep: Keep { _scratch: scratch } })
}

fn bubblewrap(plan: &Plan<'_>, work: &Path, tools: &[(PathBuf, &Toolchain)]) -> Command {
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
    command.args(["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"]);
    for (host, tool) in tools {
        command.arg("--ro-bind").arg(host).arg(format!("/toolchain/{}", tool.name));
    }
    command.arg("--bind").arg(work).args(["/workspace", "--chdir", "/workspace"]);
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
    root: bool,
    limits: Limits,
    /// Current folder, when it exists only after the mounts.
    enter: Option<CString>,
    confinement: Option<Confinement>,
}

impl Child {
    fn enter(&mut self) -> io::Result<()> {
        // SAFETY: plain system calls; pointers are to C strings that live in `self`.
        unsafe {
            check(libc::setpgid(0, 0))?;
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
            let processes = if self.root { limits.processes } else { limits.processes.max(8192) };
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
            if self.root {
                check(libc::setgroups(0, std::ptr::null()))?;
                check(libc::setgid(NOBODY))?;
                check(libc::setuid(NOBODY))?;
            }
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

fn check(result: libc::c_int) -> io::Result<()> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Level two, prepared before the fork.
struct Confinement {
    files: RulesetCreated,
    calls: BpfProgram,
}

impl Confinement {
    fn new(work: &Path, tmp: &Path, toolchains: &[Toolchain], network: bool) -> Result<Self, String> {
        let abi = ABI::V5;
        let read = AccessFs::from_read(abi);
        let all = AccessFs::from_all(abi);
        let mut files = Ruleset::default()
            .set_compatibility(CompatLevel::HardRequirement)
            .handle_access(AccessFs::from_all(ABI::V1))
            .map_err(|e| format!("landlock: {e}"))?
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(all)
            .and_then(|r| r.scope(Scope::Signal | Scope::AbstractUnixSocket))
            .and_then(Ruleset::create)
            .map_err(|e| format!("landlock: {e}"))?;
        let system = [
            "/usr",
            "/bin",
            "/sbin",
            "/lib",
            "/lib32",
            "/lib64",
            "/etc/ld.so.cache",
            "/etc/ld.so.conf",
            "/etc/ld.so.conf.d",
            "/etc/alternatives",
        ];
        let readable = system.iter().map(Path::new).chain(toolchains.iter().map(|t| t.host.as_path()));
        let writable = [work, tmp, Path::new("/dev/null"), Path::new("/dev/zero"), Path::new("/dev/tty")];
        let devices = ["/dev/urandom", "/dev/random"].map(Path::new);
        for (path, access) in
            readable.map(|p| (p, read)).chain(writable.map(|p| (p, all))).chain(devices.map(|p| (p, read)))
        {
            // What does not exist needs no rule.
            let Ok(fd) = PathFd::new(path) else { continue };
            let access = if path.is_dir() { access } else { access & AccessFs::from_file(abi) };
            files = files.add_rule(PathBeneath::new(fd, access)).map_err(|e| format!("landlock: {e}"))?;
        }
        Ok(Self { files, calls: calls(network).map_err(|e| format!("seccomp: {e}"))? })
    }

    fn enforce(self) -> io::Result<()> {
        self.files.restrict_self().map_err(|_| io::Error::from_raw_os_error(libc::EPERM))?;
        seccompiler::apply_filter(&self.calls).map_err(|_| io::Error::from_raw_os_error(libc::EPERM))
    }
}

/// System calls that confined code does not get: everything else is allowed.
fn calls(network: bool) -> Result<BpfProgram, seccompiler::BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = [
        libc::SYS_ptrace,
        libc::SYS_process_vm_readv,
        libc::SYS_process_vm_writev,
        libc::SYS_mount,
        libc::SYS_umount2,
        libc::SYS_pivot_root,
        libc::SYS_unshare,
        libc::SYS_setns,
        libc::SYS_bpf,
        libc::SYS_keyctl,
        libc::SYS_add_key,
        libc::SYS_request_key,
        libc::SYS_userfaultfd,
        libc::SYS_perf_event_open,
        libc::SYS_io_uring_setup,
        libc::SYS_kexec_load,
        libc::SYS_init_module,
        libc::SYS_finit_module,
        libc::SYS_delete_module,
        libc::SYS_reboot,
        libc::SYS_swapon,
        libc::SYS_open_by_handle_at,
    ]
    .into_iter()
    .map(|call| (call, Vec::new()))
    .collect();
    if !network {
        // Sockets within the machine's own file system stay: build tools use them between their processes.
        let unix = u64::try_from(libc::AF_UNIX).unwrap_or(1);
        let other = SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Ne, unix)?;
        rules.insert(libc::SYS_socket, vec![SeccompRule::new(vec![other])?]);
    }
    let denied = SeccompAction::Errno(u32::try_from(libc::EPERM).unwrap_or(1));
    SeccompFilter::new(rules, SeccompAction::Allow, denied, std::env::consts::ARCH.try_into()?)?.try_into()
}

/// Kills a process group; one that is gone is no error.
pub(super) fn kill(group: i32) {
    if group > 1 {
        // SAFETY: a plain system call.
        unsafe { libc::kill(-group, libc::SIGKILL) };
    }
}

fn is_root() -> bool {
    // SAFETY: a plain system call.
    unsafe { libc::geteuid() == 0 }
}

fn c_path(path: &Path) -> Result<CString, String> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| format!("{} holds a NUL", path.display()))
}

/// Lets the unprivileged user walk through a folder of ours.
fn open_to_others(path: &Path) -> Result<(), String> {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).map_err(|e| e.to_string())
}

fn own(path: &Path) -> io::Result<()> {
    std::os::unix::fs::lchown(path, Some(NOBODY), Some(NOBODY))
}

/// Hands a worktree to the unprivileged user, links not followed.
fn give_away(path: &Path) -> io::Result<()> {
    own(path)?;
    if std::fs::symlink_metadata(path)?.is_dir() {
        for entry in std::fs::read_dir(path)? {
            give_away(&entry?.path())?;
        }
    }
    Ok(())
}
