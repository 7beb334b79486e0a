//! Level two: landlock for files, seccomp for system calls. Prepared before the fork, enforced after it.

use landlock::{
    ABI, Access, AccessFs, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr, RulesetCreated,
    RulesetCreatedAttr, Scope,
};
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule,
};
use std::{collections::BTreeMap, io, path::Path};

/// Readable folders and files of the system.
const SYSTEM: [&str; 10] = [
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
/// Bit that turns a system call of x86-64 into the same one of the x32 ABI, where a kernel has it.
#[cfg(target_arch = "x86_64")]
const X32: i64 = 0x4000_0000;

/// The rules of one run.
pub(super) struct Confinement {
    files: RulesetCreated,
    calls: Vec<BpfProgram>,
}

impl Confinement {
    /// `work` and `tmp` may be written to, the system and the toolchains read.
    pub(super) fn new<'a>(
        work: &Path,
        tmp: &Path,
        toolchains: impl Iterator<Item = &'a Path>,
        network: bool,
    ) -> Result<Self, String> {
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
        let readable = SYSTEM.iter().map(Path::new).chain(toolchains);
        let writable = [work, tmp, Path::new("/dev/null"), Path::new("/dev/zero")];
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

    /// Confines the calling thread for good.
    pub(super) fn enforce(self) -> io::Result<()> {
        self.files.restrict_self().map_err(|_| io::Error::from_raw_os_error(libc::EPERM))?;
        for calls in &self.calls {
            seccompiler::apply_filter(calls).map_err(|_| io::Error::from_raw_os_error(libc::EPERM))?;
        }
        Ok(())
    }
}

/// One filter for each answer that a system call may get; what none of them names is allowed.
fn calls(network: bool) -> Result<Vec<BpfProgram>, BackendError> {
    let always = |calls: &[i64]| calls.iter().map(|call| (*call, Vec::new())).collect::<BTreeMap<_, _>>();
    let mut denied = always(&[
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
    ]);
    if !network {
        // Those of the file system too: landlock does not keep anybody from connecting to a database or an agent of the same
        // user. What build tools use between their own processes is `socketpair`.
        denied.insert(libc::SYS_socket, Vec::new());
    }
    let namespaces = u64::try_from(libc::CLONE_NEWUSER).unwrap_or_default();
    let user = SeccompCondition::new(0, SeccompCmpArgLen::Qword, SeccompCmpOp::MaskedEq(namespaces), namespaces)?;
    denied.insert(libc::SYS_clone, vec![SeccompRule::new(vec![user])?]);
    Ok(vec![
        filter(denied, libc::EPERM)?,
        // Its flags cannot be looked at; who is told that the kernel does not know it uses `clone`.
        filter(always(&[libc::SYS_clone3]), libc::ENOSYS)?,
        // It succeeds and does nothing: whoever detaches from us stays in the session by which a run is ended.
        filter(always(&[libc::SYS_setsid]), 0)?,
    ])
}

fn filter(rules: BTreeMap<i64, Vec<SeccompRule>>, errno: i32) -> Result<BpfProgram, BackendError> {
    #[cfg(target_arch = "x86_64")]
    let rules = rules.iter().flat_map(|(call, rules)| [*call, *call | X32].map(|call| (call, rules.clone()))).collect();
    let answer = SeccompAction::Errno(u32::try_from(errno).unwrap_or_default());
    SeccompFilter::new(rules, SeccompAction::Allow, answer, std::env::consts::ARCH.try_into()?)?.try_into()
}
