//! Recurring starts of runs.
//!
//! ```text
//! Client::schedules() ──create, pause, backfill …──▶ schedules, schedule_actions
//!                                                        ▲ lock, advance, start: one transaction
//! worker::fire ──due?──▶ Timing (cron) ──▶ overlap ─┘──▶ runs
//! ```
//!
//! [`cron`] says when, [`overlap`] says what an instant comes to while earlier runs are open; both are pure. [`door`] is what
//! people ask for, `fire` is what workers do. A schedule never looks into a run: it knows whether it is open.

pub mod cron;
#[cfg(feature = "runtime")]
pub mod door;
pub mod overlap;
pub mod timing;

use crate::ids::RunId;
use chrono::{DateTime, Utc};
pub use overlap::Overlap;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
pub use timing::{Timing, When};
use uuid::Uuid;

/// Longest catch-up window: a year. Source: Temporal's default.
pub const CATCHUP_MS_MAX: u64 = 365 * 86_400_000;
/// Most jitter: a day. Chosen.
pub const JITTER_MS_MAX: u64 = 86_400_000;
/// Longest name, in characters. Chosen.
pub const NAME_CHARS_MAX: usize = 100;
/// Longest note, in characters. Chosen.
pub const NOTE_CHARS_MAX: usize = 500;
/// Most actions of backfills and by hand that wait, and instants of one backfill. Chosen: a week of minutes; each is a row.
pub const BACKFILL_MAX: usize = 10_000;
/// Most schedules of a database. Chosen, not measured.
pub const SCHEDULES_MAX: i64 = 10_000;
/// Attributes that the engine gives every run of a schedule.
pub const ATTRIBUTES_GIVEN: [&str; 2] = ["schedule", "scheduled_at"];

/// What a schedule starts, and when.
///
/// # Shape
/// Every run has the attributes given here, and `schedule` (the name) and `scheduled_at` (the instant, RFC 3339). Whoever the
/// attributes name owns the run, as if that one had started it.
/// # Units
/// Milliseconds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spec {
    pub workflow: String,
    /// Which version: where this pointer stands when a run starts.
    #[serde(default = "current")]
    pub pointer: String,
    #[serde(default = "empty")]
    pub inputs: Value,
    #[serde(default = "empty")]
    pub attributes: Value,
    /// Task queue; `default` if empty.
    #[serde(default)]
    pub queue: String,
    #[serde(default)]
    pub topic: Option<String>,
    /// Business key of its runs: while an open run has it, whoever started that one, an instant is skipped.
    #[serde(default)]
    pub workflow_id: Option<String>,
    pub when: When,
    #[serde(default)]
    pub overlap: Overlap,
    /// How late an instant may be dealt with, for example after a downtime. A minute at least.
    #[serde(default)]
    pub catchup_ms: u64,
    /// Each instant is late by a part of this that depends on the schedule and the instant, and never beyond the next instant.
    #[serde(default)]
    pub jitter_ms: u64,
    /// After so many runs by the calendar it rests.
    #[serde(default)]
    pub run_limit: Option<u32>,
}

fn current() -> String {
    "current".into()
}
fn empty() -> Value {
    Value::Object(Map::new())
}

impl Spec {
    /// Starts the current version of a workflow, without inputs and attributes; skips what overlaps.
    #[must_use]
    pub fn new(workflow: impl Into<String>, when: When) -> Self {
        Self {
            workflow: workflow.into(),
            pointer: current(),
            inputs: empty(),
            attributes: empty(),
            queue: String::new(),
            topic: None,
            workflow_id: None,
            when,
            overlap: Overlap::default(),
            catchup_ms: 0,
            jitter_ms: 0,
            run_limit: None,
        }
    }

    /// Everything that is wrong with it, apart from what needs the definition.
    #[must_use]
    pub fn violations(&self) -> Vec<String> {
        let mut found = Vec::new();
        if let Err(error) = Timing::new(&self.when) {
            found.push(error);
        }
        if self.catchup_ms > CATCHUP_MS_MAX {
            found.push(format!("the catch-up window is {} ms; at most {CATCHUP_MS_MAX} (a year)", self.catchup_ms));
        }
        if self.jitter_ms > JITTER_MS_MAX {
            found.push(format!("the jitter is {} ms; at most {JITTER_MS_MAX} (a day)", self.jitter_ms));
        }
        if self.run_limit == Some(0) || self.run_limit.is_some_and(|n| i32::try_from(n).is_err()) {
            found.push("the run limit is from 1 to 2147483647; leave it out for no limit".into());
        }
        found.extend(crate::labels::queue_violation(&self.queue));
        match &self.attributes {
            Value::Object(fields) => {
                for name in ATTRIBUTES_GIVEN.into_iter().filter(|name| fields.contains_key(*name)) {
                    found.push(format!("the attribute `{name}` is given by the schedule; use another name"));
                }
            }
            _ => found.push("the attributes are not an object".into()),
        }
        found
    }
}

/// Whether a name may be a schedule's.
#[must_use]
pub fn name_violation(name: &str) -> Option<String> {
    let fits = name.chars().all(|c| c.is_ascii_alphanumeric() || "._/:-".contains(c))
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.len() <= NAME_CHARS_MAX;
    (!fits).then(|| {
        let shown: String = name.chars().take(NAME_CHARS_MAX).collect();
        format!(
            "`{shown}` cannot be a name: letters, digits and `._/:-`, a letter or digit first, at most {NAME_CHARS_MAX}"
        )
    })
}

/// What an action came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ActionState {
    /// It waits for an earlier run to close.
    Pending,
    Started,
    /// The overlap policy, a pause or a limit said no.
    Skipped,
    /// Nobody dealt with the instant within the catch-up window.
    Missed,
    /// The run could not be started: the note says why.
    Failed,
}

/// Where an action comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ActionKind {
    /// The calendar.
    Scheduled,
    /// Somebody had a time in the past filled in.
    Backfill,
    /// Somebody wanted a run now.
    Manual,
}

macro_rules! text_enum {
    ($name:ident { $($variant:ident = $text:literal),+ $(,)? }) => {
        impl $name {
            /// As in SQL and JSON.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text),+ }
            }
            /// The inverse of [`Self::as_str`].
            #[must_use]
            pub fn parse(text: &str) -> Option<Self> {
                match text { $($text => Some(Self::$variant),)+ _ => None }
            }
            /// All of them.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];
        }
    };
}
pub(crate) use text_enum;

text_enum!(ActionState { Pending = "pending", Started = "started", Skipped = "skipped", Missed = "missed", Failed = "failed" });
text_enum!(ActionKind { Scheduled = "scheduled", Backfill = "backfill", Manual = "manual" });

/// One instant and what it came to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Action {
    /// Rising per schedule.
    pub n: i64,
    /// By the calendar, without jitter; of a manual one, when it was asked for.
    pub instant: DateTime<Utc>,
    pub kind: ActionKind,
    /// Its own policy, if it has one.
    pub overlap: Option<Overlap>,
    pub state: ActionState,
    pub run_id: Option<RunId>,
    pub note: Option<String>,
    pub decided_at: DateTime<Utc>,
}

/// A schedule, as read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ScheduleView {
    pub id: Uuid,
    pub name: String,
    pub spec: Spec,
    pub paused_at: Option<DateTime<Utc>>,
    pub note: Option<String>,
    /// Who made it.
    pub owner: Option<String>,
    /// The next instant, without jitter. Empty: paused, at its limit, or the calendar has ended.
    pub next_at: Option<DateTime<Utc>>,
    pub runs_left: Option<u32>,
    /// How many actions came to what, ever.
    pub started: u64,
    pub skipped: u64,
    /// Gaps, each of one or more instants.
    pub missed: u64,
    pub failed: u64,
    pub created_at: DateTime<Utc>,
    pub updated_at: DateTime<Utc>,
}

/// A schedule with its future and its past.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ScheduleDetail {
    #[serde(flatten)]
    pub schedule: ScheduleView,
    /// The next instants, at most 5, without jitter.
    pub upcoming: Vec<DateTime<Utc>>,
    /// Its runs that are open.
    pub open: Vec<RunId>,
    /// Newest first.
    pub recent: Vec<Action>,
}

/// The id of the run of an instant. An instant has one run, whoever asks for it and however often; a run by hand has the
/// number of its action instead.
///
/// # Shape
/// A UUIDv7 whose time is the instant. The rest is SHA-256 of schedule, instant and number.
#[must_use]
pub fn run_id(schedule: Uuid, instant: DateTime<Utc>, manual: Option<i64>) -> RunId {
    let draw = draw(schedule, instant, if manual.is_some() { "manual" } else { "run" }, manual.unwrap_or(0));
    let mut random = [0; 10];
    random.copy_from_slice(&draw[..10]);
    let ms = u64::try_from(instant.timestamp_millis()).unwrap_or(0);
    RunId(uuid::Builder::from_unix_timestamp_millis(ms, &random).into_uuid())
}

/// Bytes that look random and depend on nothing but these.
pub(crate) fn draw(schedule: Uuid, instant: DateTime<Utc>, use_: &str, n: i64) -> [u8; 32] {
    use sha2::{Digest, Sha256};
    let mut hash = Sha256::new();
    hash.update(schedule.as_bytes());
    hash.update(instant.timestamp_millis().to_be_bytes());
    hash.update(n.to_be_bytes());
    hash.update(use_.as_bytes());
    hash.finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn every(ms: u64) -> When {
        When::Every { ms, offset_ms: 0 }
    }

    #[test]
    fn a_run_s_id_depends_on_schedule_instant_and_hand_only() {
        let at = DateTime::from_timestamp(1_795_000_000, 0).expect("instant");
        let (one, two) = (Uuid::new_v4(), Uuid::new_v4());
        let id = run_id(one, at, None);
        assert_eq!(id, run_id(one, at, None));
        let others = [
            run_id(two, at, None),
            run_id(one, at + chrono::Duration::minutes(1), None),
            run_id(one, at, Some(0)),
            run_id(one, at, Some(1)),
        ];
        assert!(others.iter().all(|other| *other != id));
        assert_eq!(id.0.get_version_num(), 7);
        assert_eq!(id.0.get_timestamp().expect("v7").to_unix().0, 1_795_000_000);
        let shards: std::collections::BTreeSet<i16> =
            (0..200).map(|n| run_id(one, at + chrono::Duration::minutes(n), None).shard()).collect();
        assert!(shards.len() > 60, "runs of one schedule spread over {} shards", shards.len());
    }

    #[test]
    fn everything_that_is_wrong_is_said_at_once() {
        let mut spec = Spec::new("w", When::Cron { expression: "0 25 * * *".into(), timezone: "UTC".into() });
        spec.catchup_ms = CATCHUP_MS_MAX + 1;
        spec.jitter_ms = JITTER_MS_MAX + 1;
        spec.run_limit = Some(0);
        spec.attributes = json!({"schedule": "mine"});
        let found = spec.violations();
        assert_eq!(found.len(), 5, "{found:?}");
        assert!(found[0].contains("column 3"), "{found:?}");
        spec.attributes = json!([]);
        assert!(spec.violations().iter().any(|v| v.contains("not an object")));
        assert_eq!(Spec::new("w", every(60_000)).violations(), Vec::<String>::new());
    }

    #[test]
    fn names_are_short_and_plain() {
        for good in ["nightly", "project:1/nightly", "a", "9.b_c-d"] {
            assert_eq!(name_violation(good), None, "{good}");
        }
        for bad in ["", "-a", "a b", "ä", &"x".repeat(101), "a'b", "a\0"] {
            assert!(name_violation(bad).is_some(), "{bad}");
        }
    }

    #[test]
    fn a_spec_survives_its_json_and_has_defaults() {
        let spec: Spec =
            serde_json::from_value(json!({"workflow": "w", "when": {"cron": {"expression": "0 3 * * *"}}}))
                .expect("spec");
        assert_eq!((spec.pointer.as_str(), spec.overlap), ("current", Overlap::Skip));
        assert_eq!(spec.when, When::Cron { expression: "0 3 * * *".into(), timezone: "UTC".into() });
        let back: Spec = serde_json::from_value(serde_json::to_value(&spec).expect("json")).expect("spec");
        assert_eq!(back, spec);
        assert!(
            serde_json::from_value::<Spec>(
                json!({"workflow": "w", "when": {"every": {"ms": 1000}}, "overlaps": "skip"})
            )
            .is_err()
        );
        for state in ActionState::ALL {
            assert_eq!(ActionState::parse(state.as_str()), Some(*state));
            assert_eq!(serde_json::to_value(state).expect("json"), json!(state.as_str()));
        }
        for kind in ActionKind::ALL {
            assert_eq!(ActionKind::parse(kind.as_str()), Some(*kind));
            assert_eq!(serde_json::to_value(kind).expect("json"), json!(kind.as_str()));
        }
    }
}
