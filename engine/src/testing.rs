//! Crash points: named places at which a test lets the process die, by the environment variable
//! `LOOPWRIGHT_CRASH_POINT=<name>[:<nth time>]`; a clock that is wrong ([`CLOCK_SKEW`]); a worker of an older release
//! ([`KNOWN_FORMAT`]). Compiled only for tests.

pub mod routes;

use std::sync::{
    LazyLock,
    atomic::{AtomicU32, Ordering},
};

/// Every crash point of the engine and the file, below `src`, that has it: between any two awaits of what changes a run. A test
/// compares the table with the sources, one looks for awaits without a point, and one lets a process die at each.
pub const CRASH_POINTS: &[(&str, &str)] = &[
    ("register.after_row", "worker/mod.rs"),
    ("lease.after_heartbeat", "worker/lease.rs"),
    ("drain.after_attempts", "worker/mod.rs"),
    ("drain.after_storing", "worker/mod.rs"),
    ("drain.after_leave", "worker/mod.rs"),
    ("drain.after_burial", "worker/mod.rs"),
    ("drain.after_take_over", "worker/mod.rs"),
    ("drain.before_wake", "worker/mod.rs"),
    ("claim.before_poll", "worker/mod.rs"),
    ("strays.after_lost", "worker/strays.rs"),
    ("strays.after_strays", "worker/strays.rs"),
    ("strays.after_look", "worker/strays.rs"),
    ("strays.after_give_back", "worker/strays.rs"),
    ("claim.after_unread", "worker/mod.rs"),
    ("claim.after_commit", "worker/mod.rs"),
    ("claim.after_look", "worker/mod.rs"),
    ("crowded.after_commit", "worker/mod.rs"),
    ("crowded.after_look", "worker/mod.rs"),
    ("takeover.after_bury", "worker/mod.rs"),
    ("takeover.after_take_over", "worker/mod.rs"),
    ("claim.after_begin", "store/ready.rs"),
    ("claim.after_alive", "store/ready.rs"),
    ("claim.before_commit", "store/ready.rs"),
    ("crowded.after_alive", "store/ready.rs"),
    ("crowded.before_commit", "store/ready.rs"),
    ("load.after_all", "worker/drive.rs"),
    ("drive.before_run", "worker/drive.rs"),
    ("drive.after_run", "worker/drive.rs"),
    ("quarantine.before_run", "worker/drive.rs"),
    ("load.after_run", "worker/drive.rs"),
    ("load.after_definition", "worker/drive.rs"),
    ("load.after_resolved", "worker/drive.rs"),
    ("load.after_calls", "worker/drive.rs"),
    ("messages.after_unread", "worker/drive.rs"),
    ("step.before_first", "worker/drive.rs"),
    ("step.after_first", "worker/drive.rs"),
    ("messages.before_step", "worker/drive.rs"),
    ("messages.after_sent", "worker/drive.rs"),
    ("messages.after_read", "worker/drive.rs"),
    ("step.after_item", "worker/drive.rs"),
    ("step.before_commit", "worker/drive.rs"),
    ("step.after_commit", "worker/drive.rs"),
    ("step.after_refusal", "worker/drive.rs"),
    ("park.before_release", "worker/drive.rs"),
    ("park.after_release", "worker/drive.rs"),
    ("large.after_put", "worker/drive/item.rs"),
    ("commit.after_queued", "committer.rs"),
    ("commit.after_received", "committer.rs"),
    ("commit.before_answers", "committer.rs"),
    ("commit.before_rest", "committer.rs"),
    ("commit.between_halves", "committer.rs"),
    ("commit.before_plain", "committer.rs"),
    ("commit.after_plain", "committer.rs"),
    ("commit.after_begin", "committer.rs"),
    ("commit.after_lock", "committer.rs"),
    ("commit.after_transitions", "committer.rs"),
    ("commit.before_rollback", "committer.rs"),
    ("commit.after_rollback", "committer.rs"),
    ("commit.before_commit", "committer.rs"),
    ("commit.after_commit", "committer.rs"),
    ("write.after_rows", "store/transitions.rs"),
    ("write.after_keys", "store/transitions.rs"),
    ("keys.after_look", "store/transitions.rs"),
    ("lock.after_look", "store/transitions.rs"),
    ("lock.before_runs", "store/transitions.rs"),
    ("settle.after_child", "store/transitions.rs"),
    ("settle.after_successor", "store/transitions.rs"),
    ("settle.after_arrivals", "store/transitions.rs"),
    ("settle.after_sending", "store/transitions.rs"),
    ("settle.after_message", "store/transitions.rs"),
    ("settle.before_hook", "store/transitions.rs"),
    ("child.after_row", "store/transitions.rs"),
    ("arrive.after_plan", "store/chain.rs"),
    ("arrive.after_hold", "store/chain.rs"),
    ("arrive.after_place", "store/chain.rs"),
    ("chain.after_row", "store/chain.rs"),
    ("chain.after_key", "store/chain.rs"),
    ("chain.after_inputs", "store/chain.rs"),
    ("chain.after_messages", "store/chain.rs"),
    ("chain.after_schedule", "store/chain.rs"),
    ("hand.after_known", "store/chain.rs"),
    ("hand.after_inherited", "store/chain.rs"),
    ("hand.after_page", "store/chain.rs"),
    ("hand.after_blobs", "store/chain.rs"),
    ("settle.after_open_run", "store/chain.rs"),
    ("save.after_fence", "worker/context.rs"),
    ("save.before_commit", "worker/context.rs"),
    ("save.after_commit", "worker/context.rs"),
    ("open.after_fence", "worker/context.rs"),
    ("open.before_commit", "worker/context.rs"),
    ("open.after_commit", "worker/context.rs"),
    ("note.before_write", "worker/context.rs"),
    ("meter.after_fence", "worker/context.rs"),
    ("meter.after_hook", "worker/context.rs"),
    ("meter.before_commit", "worker/context.rs"),
    ("meter.after_commit", "worker/context.rs"),
    ("save.after_blobs", "store/checkpoints.rs"),
    ("takeover.after_runs", "store/workers.rs"),
    ("send.after_commit", "client.rs"),
    ("send.after_open", "client.rs"),
    ("send.after_lock", "client.rs"),
    ("send.after_room", "client.rs"),
    ("send.before_commit", "client.rs"),
    ("approve.after_lock", "client.rs"),
    ("approve.after_look", "client.rs"),
    ("approve.after_send", "client.rs"),
    ("cancel.after_send", "client.rs"),
    ("unblock.before_commit", "client.rs"),
    ("unblock.after_commit", "client.rs"),
    ("updating.after_send", "client/update.rs"),
    ("release.after_send", "client/pause.rs"),
    ("tell.after_send", "client/pause.rs"),
    ("inbox.after_blobs", "store/inbox.rs"),
    ("start.before_commit", "client/start.rs"),
    ("start.after_commit", "client/start.rs"),
    ("start.after_row", "client/start.rs"),
    ("start.after_id", "client/start.rs"),
    ("start.after_rate", "client/start.rs"),
    ("start.after_lock", "client/start.rs"),
    ("start.after_reserve", "client/start.rs"),
    ("start.after_terminate", "client/start.rs"),
    ("start.before_blobs", "store/starts.rs"),
    ("group.after_arrival", "store/groups.rs"),
    ("group.after_entry", "store/groups.rs"),
    ("group.after_rate", "store/groups.rs"),
    ("turned.after_admit", "store/groups.rs"),
    ("rate.after_row", "store/groups.rs"),
    ("rate.after_lock", "store/groups.rs"),
    ("admit.after_group", "store/groups.rs"),
    ("admit.after_lock", "store/groups.rs"),
    ("admit.after_run", "store/groups.rs"),
    ("admit.after_place", "store/groups.rs"),
    ("admit.after_let_go", "store/groups.rs"),
    ("room.after_message", "store/groups.rs"),
    ("admit.after_pass", "worker/admit.rs"),
    ("admit.after_room", "worker/admit.rs"),
    ("admit.after_ended", "worker/admit.rs"),
    ("admit.after_timed", "worker/admit.rs"),
    ("admit.before_wake", "worker/admit.rs"),
    ("vain.after_lock", "worker/admit.rs"),
    ("vain.before_end", "worker/admit.rs"),
    ("fork.after_insert", "client/fork.rs"),
    ("fork.before_commit", "client/fork.rs"),
    ("fork.after_commit", "client/fork.rs"),
    ("reset.after_lock", "client/fork.rs"),
    ("reset.after_reserve", "client/fork.rs"),
    ("reset.after_terminate", "client/fork.rs"),
    ("reset.after_id", "store/forks.rs"),
    ("reset.after_insert", "client/fork.rs"),
    ("reset.after_key", "client/fork.rs"),
    ("reset.after_schedule", "client/fork.rs"),
    ("reset.before_commit", "client/fork.rs"),
    ("reset.after_commit", "client/fork.rs"),
    ("fork.after_hold", "client/fork.rs"),
    ("fork.after_plan", "client/fork.rs"),
    ("fork.after_arrival", "client/fork.rs"),
    ("fork.after_row", "store/forks.rs"),
    ("fork.after_begin", "store/forks.rs"),
    ("migrate.after_commit", "client/migrate.rs"),
    ("migrate.before_store", "client/migrate.rs"),
    ("migrate.before_commit", "client/migrate.rs"),
    ("migrate.after_blobs", "store/migrations.rs"),
    ("terminate.before_commit", "worker/terminate.rs"),
    ("terminate.after_commit", "worker/terminate.rs"),
    ("terminate.before_end", "worker/terminate.rs"),
    ("terminate.after_lock", "worker/terminate.rs"),
    ("terminate.after_write", "worker/terminate.rs"),
    ("terminate.after_effects", "worker/terminate.rs"),
    ("terminate.after_seize", "worker/terminate.rs"),
    ("terminate.after_blobs", "worker/terminate.rs"),
    ("overdue.after_look", "worker/overdue.rs"),
    ("overdue.before_wake", "worker/overdue.rs"),
    ("schedule.after_lock", "worker/fire.rs"),
    ("schedule.before_commit", "worker/fire.rs"),
    ("schedule.after_commit", "worker/fire.rs"),
    ("schedule.before_wake", "worker/fire.rs"),
    ("schedule.after_terminate", "worker/fire.rs"),
    ("schedule.after_advance", "worker/fire.rs"),
    ("schedule.after_decide", "worker/fire.rs"),
    ("schedule.after_prune", "worker/fire.rs"),
    ("schedule.after_skip", "worker/fire.rs"),
    ("schedule.after_run", "worker/fire.rs"),
    ("schedule.after_cancel", "worker/fire.rs"),
    ("schedule.before_start", "worker/fire.rs"),
    ("schedule.after_start", "worker/fire.rs"),
    ("trigger.after_lock", "schedule/door.rs"),
    ("trigger.after_add", "schedule/door.rs"),
    ("trigger.after_commit", "schedule/door.rs"),
    ("trigger.before_wake", "schedule/door.rs"),
    ("backfill.after_lock", "schedule/door.rs"),
    ("backfill.after_add", "schedule/door.rs"),
    ("change.after_lock", "schedule/door.rs"),
    ("change.after_skip", "schedule/door.rs"),
    ("transaction.before_commit", "transaction.rs"),
    ("retire.before_file", "retention/mod.rs"),
    ("retire.after_file", "retention/mod.rs"),
    ("retire.after_commit", "retention/mod.rs"),
    ("retire.before_commit", "store/retention.rs"),
    ("retire.after_detach", "store/partitions.rs"),
    ("retire.before_drop", "store/partitions.rs"),
    ("retire.after_drop", "store/partitions.rs"),
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
