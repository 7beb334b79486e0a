//! Crash points: named places at which a test lets the process die, by the environment variable
//! `LOOPWRIGHT_CRASH_POINT=<name>[:<nth time>]`; a clock that is wrong ([`CLOCK_SKEW`]); a worker of an older release
//! ([`KNOWN_FORMAT`]). Compiled only for tests.

use std::sync::{
    LazyLock,
    atomic::{AtomicU32, Ordering},
};

/// Every crash point of the engine and the file, below `src`, that has it: before and after each await of what commits,
/// claims, takes over, parks, sends and settles. A test compares the table with the sources and lets a process die at each.
pub const CRASH_POINTS: &[(&str, &str)] = &[
    ("claim.after_begin", "store/ready.rs"),
    ("claim.after_alive", "store/ready.rs"),
    ("claim.before_commit", "store/ready.rs"),
    ("claim.after_commit", "worker/mod.rs"),
    ("load.after_run", "worker/drive.rs"),
    ("load.after_definition", "worker/drive.rs"),
    ("load.after_calls", "worker/drive.rs"),
    ("messages.after_sent", "worker/drive.rs"),
    ("messages.after_read", "worker/drive.rs"),
    ("large.after_put", "worker/drive/item.rs"),
    ("step.before_commit", "worker/drive.rs"),
    ("step.after_commit", "worker/drive.rs"),
    ("park.before_release", "worker/drive.rs"),
    ("park.after_release", "worker/drive.rs"),
    ("commit.before_plain", "committer.rs"),
    ("commit.after_plain", "committer.rs"),
    ("commit.after_begin", "committer.rs"),
    ("commit.after_lock", "committer.rs"),
    ("commit.after_transitions", "committer.rs"),
    ("commit.before_rollback", "committer.rs"),
    ("commit.after_rollback", "committer.rs"),
    ("commit.before_commit", "committer.rs"),
    ("commit.after_commit", "committer.rs"),
    ("commit.before_answers", "committer.rs"),
    ("settle.after_child", "store/transitions.rs"),
    ("settle.after_successor", "store/transitions.rs"),
    ("settle.after_arrivals", "store/transitions.rs"),
    ("settle.after_message", "store/transitions.rs"),
    ("settle.before_hook", "store/transitions.rs"),
    ("save.after_fence", "worker/context.rs"),
    ("save.before_commit", "worker/context.rs"),
    ("save.after_commit", "worker/context.rs"),
    ("open.after_fence", "worker/context.rs"),
    ("open.before_commit", "worker/context.rs"),
    ("open.after_commit", "worker/context.rs"),
    ("meter.after_fence", "worker/context.rs"),
    ("meter.after_hook", "worker/context.rs"),
    ("meter.before_commit", "worker/context.rs"),
    ("meter.after_commit", "worker/context.rs"),
    ("takeover.after_bury", "worker/mod.rs"),
    ("takeover.after_take_over", "worker/mod.rs"),
    ("strays.after_look", "worker/mod.rs"),
    ("strays.after_give_back", "worker/mod.rs"),
    ("schedule.before_commit", "worker/fire.rs"),
    ("schedule.after_commit", "worker/fire.rs"),
    ("retire.before_file", "retention/mod.rs"),
    ("retire.after_file", "retention/mod.rs"),
    ("retire.before_commit", "store/retention.rs"),
    ("retire.after_commit", "retention/mod.rs"),
    ("retire.after_detach", "store/partitions.rs"),
    ("retire.before_drop", "store/partitions.rs"),
    ("retire.after_drop", "store/partitions.rs"),
    ("send.after_open", "client.rs"),
    ("send.before_commit", "client.rs"),
    ("send.after_commit", "client.rs"),
    ("start.after_terminate", "client/start.rs"),
    ("start.before_commit", "client/start.rs"),
    ("start.after_commit", "client/start.rs"),
    ("migrate.before_store", "client/migrate.rs"),
    ("migrate.before_commit", "client/migrate.rs"),
    ("migrate.after_commit", "client/migrate.rs"),
    ("terminate.after_seize", "worker/terminate.rs"),
    ("terminate.before_commit", "worker/terminate.rs"),
    ("terminate.after_commit", "worker/terminate.rs"),
];

/// Names how much later than the truth this process takes it to be, in ms: a clock that is wrong.
pub const CLOCK_SKEW: &str = "LOOPWRIGHT_CLOCK_SKEW_MS";

static SKEW: LazyLock<chrono::Duration> = LazyLock::new(|| {
    let text = std::env::var(CLOCK_SKEW).unwrap_or_default();
    chrono::Duration::milliseconds(text.parse().unwrap_or(0))
});

/// How wrong the clock of this process is.
pub(crate) fn clock_skew() -> chrono::Duration {
    *SKEW
}

/// Names the newest format of histories that this process knows, if it is to be a worker of an older release.
pub const KNOWN_FORMAT: &str = "LOOPWRIGHT_KNOWN_FORMAT";

static KNOWN: LazyLock<Option<u16>> = LazyLock::new(|| {
    let text = std::env::var(KNOWN_FORMAT).ok()?;
    Some(text.parse().expect("the number of a format"))
});

/// What this process knows, if less than its program does.
pub(crate) fn known_format() -> Option<u16> {
    *KNOWN
}

static WANTED: LazyLock<Option<(String, u32)>> = LazyLock::new(|| {
    let text = std::env::var("LOOPWRIGHT_CRASH_POINT").ok()?;
    let (name, nth) = text.split_once(':').unwrap_or((&text, "1"));
    Some((name.to_owned(), nth.parse().unwrap_or(1)))
});
static PASSED: AtomicU32 = AtomicU32::new(0);

/// Dies here, without unwinding, if the environment asks for it.
pub fn crash_point(name: &str) {
    if let Some((wanted, nth)) = WANTED.as_ref()
        && wanted == name
        && PASSED.fetch_add(1, Ordering::SeqCst) + 1 == *nth
    {
        std::process::abort();
    }
}
