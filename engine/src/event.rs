//! The records of a history. One row of history holds the events of one transition; folding them all, in order,
//! gives the state of the run. Past tense, numbered format: a changed meaning is a new variant or a new [`FORMAT`].

use crate::{
    failure::Failure,
    ids::{AttemptId, DefinitionHash, RunId},
};
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;

/// Number of this event vocabulary. A row is stored with the lowest number that knows all its events ([`format_of`]), so
/// that an older release still reads what says nothing new.
///
/// - 1: the first.
/// - 2: `run_paused`, `run_resumed`, `run_forked`.
/// - 3: `update_accepted`, `update_rejected`, `update_completed`; calls that `terminate` their children.
/// - 4: runs that end and close as continued.
/// - 5: `run_migrated`.
/// - 6: nothing new is said; the row is stored in parts or sealed (`APART`).
/// - 7: nothing new is said; the run has terms that an older release would drop (`TERMS`).
/// - 8: `retry_scheduled` after an attempt that does not count (`uncounted`): an older release would count it, and end the step over
///   it. `attempt_ended` as blocked, with the mark that it does not count. `run_forked` with `not_before`.
/// - 9: `call_stopped`, `call_overdue`: a stopped call waits for its child so long and no longer. `cleanup_bounded`: a cancel that says
///   how long stopping may take.
pub const FORMAT: u16 = 9;

/// The number of a row, or of a stored state, whose text is not all that was said: a value lies apart in `blobs`, or all of it is
/// sealed. The vocabulary is that of 5. A release that does not know it would take a reference for the value. It belongs to what is
/// stored: whoever reads the events gets their vocabulary's number.
#[cfg(feature = "runtime")]
pub(crate) const APART: u16 = 6;

/// The number of every stored state of a run whose start named what goes along a chain: a group, a rate, the time of the chain. A
/// release that does not know it would start the next run without them.
#[cfg(feature = "runtime")]
pub(crate) const TERMS: u16 = 7;

/// How an attempt ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    Succeeded,
    Failed,
    TimedOut,
    Cancelled,
    /// Its worker died or handed it back; the next attempt continues from its checkpoints.
    Lost,
    /// It stopped itself until the run is unblocked.
    Blocked,
}

/// How a step ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StepStatus {
    Succeeded,
    Failed,
    /// A `catch` handler took the failure.
    Recovered,
    Skipped,
    Cancelled,
}

/// What a step looks like when it has just begun: everything that was evaluated, so that nothing is evaluated twice.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Opened {
    Activity {
        activity: String,
        input: Value,
        /// (from attempt, replaced inputs), ascending.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        overrides: Vec<(u32, serde_json::Map<String, Value>)>,
        queue_deadline: DateTime<Utc>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        total_deadline: Option<DateTime<Utc>>,
    },
    Group,
    Switch {
        case: usize,
    },
    Parallel {
        branches: Vec<String>,
    },
    Foreach {
        keys: Vec<String>,
        items: Vec<Value>,
    },
    Repeat,
    Wait {
        until: DateTime<Utc>,
    },
    Await {
        signal: String,
        deadline: DateTime<Utc>,
        show: Option<String>,
    },
    Call {
        child: RunId,
        workflow: String,
        inputs: Value,
        /// Definition hash, hex.
        definition: String,
        /// Stopped with its parent: asked to cancel, if `terminate` does not say more.
        propagate: bool,
        /// Ended at once with its parent.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        terminate: bool,
    },
}

/// Why the body of a run stops.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Ending {
    /// It came to its end, or a `finish` step said so.
    Completed {
        output: Value,
    },
    Failed {
        failure: Failure,
    },
    Cancelled {
        reason: String,
    },
    /// Another run goes on in its place.
    Continued {
        run: RunId,
        /// Checked, defaults filled in.
        inputs: Value,
        /// Another than its own.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        definition: Option<DefinitionHash>,
    },
}

impl Ending {
    /// The steps came to an end that they wanted.
    pub(crate) fn is_wanted(&self) -> bool {
        matches!(self, Self::Completed { .. } | Self::Continued { .. })
    }
}

/// One recorded fact.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Event {
    RunStarted {
        inputs: Value,
        env: BTreeMap<String, Value>,
        /// Where each `call` of the definition leads, by `name@version` as written: a later deployment changes nothing.
        #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
        calls: BTreeMap<String, DefinitionHash>,
        at: DateTime<Utc>,
        deadline: DateTime<Utc>,
    },
    StepSkipped {
        path: String,
        reason: String,
    },
    StepStarted {
        path: String,
        at: DateTime<Utc>,
        opened: Opened,
    },
    AttemptStarted {
        path: String,
        attempt: u32,
        attempt_id: AttemptId,
        activity: String,
        at: DateTime<Utc>,
        deadline: DateTime<Utc>,
    },
    /// The hook refused to let an attempt start; none was started.
    AttemptBlocked {
        path: String,
        reason: String,
        message: String,
        at: DateTime<Utc>,
    },
    AttemptEnded {
        path: String,
        attempt: u32,
        attempt_id: AttemptId,
        activity: String,
        outcome: Outcome,
        #[serde(default, deserialize_with = "present", skip_serializing_if = "Option::is_none")]
        output: Option<Value>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        failure: Option<Failure>,
        at: DateTime<Utc>,
    },
    /// Another attempt follows at `due_at`; the jitter is in it.
    RetryScheduled {
        path: String,
        due_at: DateTime<Utc>,
        failure: Failure,
    },
    /// The next attempt may start: its delay is over, the run was unblocked, or the last one was lost.
    AttemptReady {
        path: String,
    },
    RoundStarted {
        path: String,
        round: u32,
        previous: Value,
    },
    /// The next round begins at that instant.
    RoundDelayed {
        path: String,
        until: DateTime<Utc>,
    },
    ItemStarted {
        path: String,
        index: usize,
    },
    ItemEnded {
        path: String,
        index: usize,
        status: StepStatus,
        #[serde(default, deserialize_with = "present", skip_serializing_if = "Option::is_none")]
        output: Option<Value>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        failure: Option<Failure>,
    },
    BranchEnded {
        path: String,
        branch: String,
        status: StepStatus,
        #[serde(default, deserialize_with = "present", skip_serializing_if = "Option::is_none")]
        output: Option<Value>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        failure: Option<Failure>,
    },
    CatchStarted {
        path: String,
        handler: usize,
        failure: Failure,
    },
    SignalReceived {
        n: u64,
        name: String,
        payload: Value,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        sender: Option<String>,
        at: DateTime<Utc>,
    },
    /// More messages of a name than the mailbox holds.
    SignalDropped {
        n: u64,
        name: String,
    },
    SignalConsumed {
        path: String,
        n: u64,
    },
    /// A request that some step takes: it waits in the mailbox as a signal does, until that step answers it.
    UpdateAccepted {
        n: u64,
        /// The sender's, unique in the run.
        id: String,
        name: String,
        payload: Value,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        sender: Option<String>,
        at: DateTime<Utc>,
    },
    /// A request that no step takes; nothing else follows from it.
    UpdateRejected {
        n: u64,
        id: String,
        name: String,
        payload: Value,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        sender: Option<String>,
        /// What is wrong with it, for people.
        problems: Vec<String>,
        at: DateTime<Utc>,
    },
    /// A step has taken the request and answers it, by a result or a failure.
    UpdateCompleted {
        path: String,
        n: u64,
        id: String,
        #[serde(default, deserialize_with = "present", skip_serializing_if = "Option::is_none")]
        result: Option<Value>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        failure: Option<Failure>,
    },
    /// One person's decision on an approval that needs more of them.
    DecisionCounted {
        path: String,
        n: u64,
    },
    Reminded {
        path: String,
        count: u32,
    },
    Unblocked {},
    /// The step and everything below it must stop.
    StopRequested {
        path: String,
        reason: String,
    },
    /// The child of a call that stops was told to end, and has until then. Said again when the run has less time than that.
    CallStopped {
        path: String,
        at: DateTime<Utc>,
        until: DateTime<Utc>,
    },
    /// The child has not ended in time: it is ended at once, as by an operator, and has until then to be gone.
    CallOverdue {
        path: String,
        /// How often that was so.
        times: u32,
        /// Not if it has heard that it is to end and is at its cleanup.
        #[serde(default, skip_serializing_if = "is_default")]
        spares: bool,
        at: DateTime<Utc>,
        until: DateTime<Utc>,
    },
    /// Whoever cancels the run wants it to have stopped by then, its cleanup included.
    CleanupBounded {
        at: DateTime<Utc>,
        until: DateTime<Utc>,
    },
    StepEnded {
        path: String,
        status: StepStatus,
        #[serde(default, deserialize_with = "present", skip_serializing_if = "Option::is_none")]
        output: Option<Value>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        failure: Option<Failure>,
        /// The block goes on although the step failed.
        #[serde(default, skip_serializing_if = "is_default")]
        tolerated: bool,
        /// The steps of the last round become visible beside the step.
        #[serde(default, skip_serializing_if = "is_default")]
        hoist: bool,
        /// Kind-specific fields beside `output` (for example `by` of an await).
        #[serde(default, skip_serializing_if = "Value::is_null")]
        extras: Value,
        at: DateTime<Utc>,
    },
    /// Nothing new begins until the run is resumed; what runs comes to its end.
    RunPaused {
        reason: String,
        /// Who asked for it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        by: Option<String>,
        at: DateTime<Utc>,
    },
    RunResumed {
        reason: String,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        by: Option<String>,
        /// What had broken, when the run had been set aside and an operator lets it go on.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        halted: Option<String>,
        at: DateTime<Utc>,
    },
    /// The run begins here, with what its parent had done until its transition `seq`; the rows up to there are the parent's.
    RunForked {
        parent: RunId,
        seq: u64,
        reason: String,
        definition: DefinitionHash,
        /// All inputs, as this run sees them.
        inputs: Value,
        env: BTreeMap<String, Value>,
        #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
        calls: BTreeMap<String, DefinitionHash>,
        /// Steps that begin anew: those that were under way and have no steps below them, and those that were asked for.
        restarted: Vec<String>,
        at: DateTime<Utc>,
        /// It is held back until then; its time and that of the blocks that are open in it counts from there.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        not_before: Option<DateTime<Utc>>,
        deadline: DateTime<Utc>,
    },
    /// The run goes on under another definition.
    RunMigrated {
        from: DefinitionHash,
        to: DefinitionHash,
        /// New ids of steps, by their path without items and rounds.
        #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
        map: BTreeMap<String, String>,
        /// Steps of the new definition that stand before what has run, by their path: they never run.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        skipped: Vec<String>,
        reason: String,
        /// Who asked for it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        by: Option<String>,
        /// All inputs, if they are not what they were.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        inputs: Option<Value>,
        #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
        env: BTreeMap<String, Value>,
        #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
        calls: BTreeMap<String, DefinitionHash>,
        /// What is to be known of it, for people.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        notes: Vec<String>,
        at: DateTime<Utc>,
    },
    RunEnding {
        ending: Ending,
        at: DateTime<Utc>,
    },
    FinallyStarted {
        at: DateTime<Utc>,
        deadline: DateTime<Utc>,
    },
    RunClosed {
        /// `completed`, `failed`, `cancelled`, `terminated` or `continued`.
        status: crate::view::RunStatus,
        #[serde(default, deserialize_with = "present", skip_serializing_if = "Option::is_none")]
        output: Option<Value>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        failure: Option<Failure>,
        at: DateTime<Utc>,
    },
}

/// What is not said is the default: and takes no room in every row of a history.
pub(crate) fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// Reads a value that is there, `null` or not: an `Option` takes `null` for nothing, and a step whose output is null would have
/// none after its run was loaded again.
pub(crate) fn present<'de, D: serde::Deserializer<'de>>(stored: D) -> Result<Option<Value>, D::Error> {
    Value::deserialize(stored).map(Some)
}

impl Event {
    /// The number of the vocabulary that brought this event.
    #[must_use]
    pub fn format(&self) -> u16 {
        match self {
            Self::RetryScheduled { failure, .. } if failure.uncounted => 8,
            Self::AttemptEnded { outcome: Outcome::Blocked, failure: Some(failure), .. } if failure.uncounted => 8,
            Self::RunForked { not_before: Some(_), .. } => 8,
            Self::CallStopped { .. } | Self::CallOverdue { .. } | Self::CleanupBounded { .. } => 9,
            Self::RunEnding { ending: Ending::Continued { .. }, .. }
            | Self::RunClosed { status: crate::view::RunStatus::Continued, .. } => 4,
            Self::RunMigrated { .. } => 5,
            Self::UpdateAccepted { .. }
            | Self::UpdateRejected { .. }
            | Self::UpdateCompleted { .. }
            | Self::StepStarted { opened: Opened::Call { terminate: true, .. }, .. } => 3,
            Self::RunPaused { .. } | Self::RunResumed { .. } | Self::RunForked { .. } => 2,
            _ => 1,
        }
    }
}

/// The lowest format that knows all of these events.
#[must_use]
pub fn format_of(events: &[Event]) -> u16 {
    events.iter().map(Event::format).max().unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_null_that_was_given_comes_back_as_one() {
        let ended = |output: Value| {
            let mut said =
                json!({"type": "step_ended", "path": "a", "status": "succeeded", "at": "2026-11-25T10:00:00Z"});
            said.as_object_mut().expect("object").extend(output.as_object().expect("object").clone());
            let event: Event = serde_json::from_value(said).expect("an event");
            let again: Event = serde_json::from_value(serde_json::to_value(&event).expect("json")).expect("an event");
            assert_eq!(again, event);
            match event {
                Event::StepEnded { output, .. } => output,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(ended(json!({"output": null})), Some(Value::Null));
        assert_eq!(ended(json!({})), None);
    }

    /// An older release would fold them to another state, and end a step that has attempts left.
    #[test]
    fn what_an_older_release_would_take_for_something_else_has_a_number_of_its_own() {
        let at = "2026-11-25T10:00:00Z";
        let retry = |failure: Failure| Event::RetryScheduled {
            path: "a".into(),
            due_at: at.parse().expect("an instant"),
            failure,
        };
        let away = Failure::retryable("transient.unavailable", "nobody is there");
        assert_eq!(retry(away.clone()).format(), 1);
        assert_eq!(retry(away.clone().without_counting()).format(), 8);
        let cause = Failure::retryable("a.b", "text").with_cause(away.clone().without_counting());
        assert_eq!(retry(cause).format(), 1, "what it counts as, it says itself");
        assert_eq!(format_of(&[retry(away.clone()), retry(away.without_counting())]), 8);
        let fork = json!({"type": "run_forked", "parent": RunId::new(), "seq": 1, "reason": "", "definition": DefinitionHash([1; 32]),
                          "inputs": {}, "env": {}, "restarted": [], "at": at, "deadline": at});
        let fork: Event = serde_json::from_value(fork).expect("an event");
        assert_eq!(fork.format(), 2);
        let mut held = serde_json::to_value(&fork).expect("JSON");
        held["not_before"] = json!(at);
        assert_eq!(serde_json::from_value::<Event>(held).expect("an event").format(), 8);
    }

    /// Rows of earlier releases say the defaults; they mean the same and are read for ever.
    #[test]
    fn what_is_not_said_is_the_default() {
        let said = json!({"type": "step_ended", "path": "a", "status": "succeeded", "output": 1, "tolerated": false,
                          "hoist": false, "at": "2026-11-25T10:00:00.123456789Z"});
        let event: Event = serde_json::from_value(said.clone()).expect("an old row");
        let mut short = said;
        for default in ["tolerated", "hoist"] {
            short.as_object_mut().expect("object").remove(default);
        }
        assert_eq!(serde_json::to_value(&event).expect("JSON"), short);
        assert_eq!(serde_json::from_value::<Event>(short.clone()).expect("a new row"), event);
        for said in ["tolerated", "hoist"] {
            short[said] = json!(true);
        }
        let event: Event = serde_json::from_value(short.clone()).expect("an event");
        assert!(matches!(event, Event::StepEnded { tolerated: true, hoist: true, .. }));
        assert_eq!(serde_json::to_value(&event).expect("JSON"), short);
    }
}
