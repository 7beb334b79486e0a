//! Crash points: named places at which a test lets the process die, by the environment variable
//! `LOOPWRIGHT_CRASH_POINT=<name>[:<nth time>]`. Compiled only for tests.

use std::sync::{
    LazyLock,
    atomic::{AtomicU32, Ordering},
};

/// Every crash point of the engine.
pub const CRASH_POINTS: &[&str] = &[
    "claim.after_commit",
    "commit.after_transitions",
    "commit.before_commit",
    "commit.after_commit",
    "meter.before_commit",
    "meter.after_commit",
    "schedule.before_commit",
    "schedule.after_commit",
    "takeover.after_bury",
];

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
