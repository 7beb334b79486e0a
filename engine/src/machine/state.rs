//! The state of a run: a tree of nodes that mirrors the part of the definition that is under way. Finished blocks are
//! folded into one node, so the state stays as small as what is still needed.

use super::Illegal;
use crate::{
    event::{Ending, StepStatus, is_default},
    failure::Failure,
    ids::{AttemptId, DefinitionHash, RunId},
    view::RunStatus,
};
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

/// Why a step that a migration put in before what has run is skipped.
pub(super) const SKIPPED: &str = "migrated";

/// A run, folded from its history.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunState {
    pub run_id: RunId,
    pub status: RunStatus,
    /// The newest vocabulary among the events that it was folded from: a release that does not know it may not go on from here.
    #[serde(default, skip_serializing_if = "is_default")]
    pub format: u16,
    pub inputs: Value,
    pub env: BTreeMap<String, Value>,
    /// Where the definition's `call`s led when the run started, by `name@version` as written.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub calls: BTreeMap<String, DefinitionHash>,
    /// Paths that steps had before migrations renamed them: no other step may have one of them.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub former: BTreeSet<String>,
    pub started_at: DateTime<Utc>,
    /// The whole run must end before.
    pub deadline: DateTime<Utc>,
    pub body: Frame,
    /// Steps of `finally`, once they have begun.
    pub finally: Option<Frame>,
    /// Set when the body must stop or has stopped.
    pub ending: Option<Ending>,
    /// Somebody has said by when it is to have stopped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cleanup: Option<Cleanup>,
    /// Signals that no step has consumed yet, oldest first.
    pub mailbox: Vec<Message>,
    /// Steps begun and attempts started, against the definition's limit; without attempts that do not count
    /// ([`crate::failure::Failure::uncounted`]).
    pub executions: u32,
    pub output: Option<Value>,
    pub failure: Option<Failure>,
}

/// A signal that waits to be consumed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Message {
    pub n: u64,
    pub name: String,
    pub payload: Value,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sender: Option<String>,
    pub at: DateTime<Utc>,
    /// Of an update that waits for its answer: its id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub update: Option<String>,
}

/// The steps of one block that have begun, by id.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Frame {
    pub nodes: BTreeMap<String, Node>,
}

/// One executed step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Node {
    /// `None` while it is under way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<StepStatus>,
    #[serde(default, deserialize_with = "crate::event::present", skip_serializing_if = "Option::is_none")]
    pub output: Option<Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<Failure>,
    /// Why it was skipped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    #[serde(default, skip_serializing_if = "is_default")]
    pub tolerated: bool,
    /// It must stop; no new step below it begins.
    #[serde(default, skip_serializing_if = "is_default")]
    pub stopping: bool,
    #[serde(default, skip_serializing_if = "is_default")]
    pub attempts: u32,
    #[serde(default, skip_serializing_if = "is_default")]
    pub rounds: u32,
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub extras: Value,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<DateTime<Utc>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_at: Option<DateTime<Utc>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub live: Option<Live>,
}

/// What a step that is under way consists of.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
// Not internally tagged: maps by item index would not come back from JSON.
#[serde(rename_all = "snake_case")]
pub enum Live {
    Activity {
        activity: String,
        input: Value,
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        overrides: Vec<(u32, serde_json::Map<String, Value>)>,
        /// Number of the newest attempt.
        attempt: u32,
        /// Attempts that count against the retry policy: all but lost and blocked ones, and those that said so
        /// themselves ([`crate::failure::Failure::uncounted`]).
        counted: u32,
        lost: u32,
        phase: Phase,
        queue_deadline: DateTime<Utc>,
        total_deadline: Option<DateTime<Utc>>,
    },
    Group {
        frame: Frame,
    },
    Switch {
        case: usize,
        frame: Frame,
    },
    Parallel {
        branches: BTreeMap<String, Branch>,
        /// The first branch that succeeded.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        winner: Option<String>,
    },
    Foreach {
        keys: Vec<String>,
        items: Vec<Value>,
        /// Items begun so far; they begin in order.
        next: usize,
        active: BTreeMap<usize, Frame>,
        results: BTreeMap<usize, Ended>,
    },
    Repeat {
        round: u32,
        frame: Frame,
        /// Outputs of the previous round by step id, null in the first.
        previous: Value,
        /// The next round waits until then.
        delayed_until: Option<DateTime<Utc>>,
    },
    Wait {
        until: DateTime<Utc>,
    },
    Await {
        signal: String,
        deadline: DateTime<Utc>,
        show: Option<String>,
        reminded: u32,
        /// Senders whose approval was counted.
        counted: Vec<String>,
    },
    Call {
        child: RunId,
        workflow: String,
        propagate: bool,
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        terminate: bool,
        /// Since the call stops.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        stopped: Option<Stopped>,
    },
    /// A handler runs; the failure it handles is in scope.
    Catch {
        handler: usize,
        failure: Failure,
        frame: Frame,
    },
}

/// How long a stopped call waits for its child.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Stopped {
    pub until: DateTime<Utc>,
    /// How often the child was found overdue.
    #[serde(default, skip_serializing_if = "is_default")]
    pub times: u32,
    /// How often it was ended for that, whatever it was about to do.
    #[serde(default, skip_serializing_if = "is_default")]
    pub ended: u32,
}

/// The time that a cancel leaves a run to stop and to clean up.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cleanup {
    /// When that was said.
    pub at: DateTime<Utc>,
    pub until: DateTime<Utc>,
}

impl Cleanup {
    /// Until when a child is to have stopped: half of the time, so that its caller can clean up after it.
    pub(super) fn of_child(self) -> DateTime<Utc> {
        self.at + (self.until - self.at) / 2
    }

    /// When a child is ended that has not: between its own time and its caller's.
    pub(super) fn ends_child(self) -> DateTime<Utc> {
        self.at + (self.until - self.at) * 3 / 4
    }
}

/// A branch of a parallel step.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Branch {
    pub frame: Frame,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended: Option<Ended>,
}

/// How an item or a branch ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ended {
    pub status: StepStatus,
    #[serde(default, deserialize_with = "crate::event::present", skip_serializing_if = "Option::is_none")]
    pub output: Option<Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<Failure>,
}

/// Where an activity stands between its attempts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "phase", rename_all = "snake_case")]
pub enum Phase {
    /// Waits for room.
    Queued,
    Running {
        attempt_id: AttemptId,
        started_at: DateTime<Utc>,
        deadline: DateTime<Utc>,
    },
    Backoff {
        until: DateTime<Utc>,
        failure: Failure,
    },
    Blocked {
        reason: String,
        message: String,
        since: DateTime<Utc>,
    },
}

impl RunState {
    /// A run before its first event.
    #[must_use]
    pub fn new(run_id: RunId) -> Self {
        Self {
            run_id,
            status: RunStatus::Pending,
            format: 0,
            inputs: Value::Null,
            env: BTreeMap::new(),
            calls: BTreeMap::new(),
            former: BTreeSet::new(),
            started_at: DateTime::UNIX_EPOCH,
            deadline: DateTime::<Utc>::MAX_UTC,
            body: Frame::default(),
            finally: None,
            ending: None,
            cleanup: None,
            mailbox: Vec::new(),
            executions: 0,
            output: None,
            failure: None,
        }
    }

    /// The node at a path such as `implement[a-1]/check`.
    #[must_use]
    pub fn node(&self, path: &str) -> Option<&Node> {
        let (mut frame, path) = match path.strip_prefix(FINALLY_PREFIX) {
            Some(rest) => (self.finally.as_ref()?, rest),
            None => (&self.body, path),
        };
        let mut segments = path.split('/').peekable();
        loop {
            let (id, below) = split_segment(segments.next()?);
            let node = frame.nodes.get(id)?;
            if segments.peek().is_none() {
                return Some(node);
            }
            frame = node.live.as_ref()?.frame(below)?;
        }
    }

    /// The frame that holds the step at `path`, and the step's id.
    pub(super) fn frame_mut<'a, 'p>(&'a mut self, path: &'p str) -> Result<(&'a mut Frame, &'p str), Illegal> {
        let missing = || Illegal(format!("no place `{path}` in the state"));
        let (mut frame, rest) = match path.strip_prefix(FINALLY_PREFIX) {
            Some(rest) => (self.finally.as_mut().ok_or_else(missing)?, rest),
            None => (&mut self.body, path),
        };
        let mut segments = rest.split('/').peekable();
        loop {
            let segment = segments.next().ok_or_else(missing)?;
            let (id, below) = split_segment(segment);
            if segments.peek().is_none() {
                return Ok((frame, id));
            }
            frame = frame
                .nodes
                .get_mut(id)
                .and_then(|n| n.live.as_mut())
                .and_then(|l| l.frame_mut(below))
                .ok_or_else(missing)?;
        }
    }

    pub(super) fn node_mut(&mut self, path: &str) -> Result<&mut Node, Illegal> {
        let (frame, id) = self.frame_mut(path)?;
        frame.nodes.get_mut(id).ok_or_else(|| Illegal(format!("no step `{path}` in the state")))
    }
}

/// Prefix of the paths of `finally` steps.
pub(super) const FINALLY_PREFIX: &str = "!finally/";

/// What of a live step the rest of a path goes through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Below<'a> {
    Block,
    Round,
    Item(&'a str),
    Branch(&'a str),
    Catch,
}

/// `implement[a-1]` is (`implement`, item a-1); `x~2` is round 2; `p:left` is a branch; `s!` is a handler.
pub(super) fn split_segment(segment: &str) -> (&str, Below<'_>) {
    if let Some((id, rest)) = segment.split_once('[') {
        return (id, Below::Item(rest.trim_end_matches(']')));
    }
    if let Some((id, branch)) = segment.split_once(':') {
        return (id, Below::Branch(branch));
    }
    if let Some((id, _)) = segment.split_once('~') {
        return (id, Below::Round);
    }
    if let Some(id) = segment.strip_suffix('!') {
        return (id, Below::Catch);
    }
    (segment, Below::Block)
}

/// What a suffix of a path says to a definition: a branch or a handler, no item and no round.
pub(super) fn shape_of(suffix: &str) -> &str {
    if suffix.starts_with(['[', '~']) { "" } else { suffix }
}

impl Live {
    pub(super) fn frame(&self, below: Below<'_>) -> Option<&Frame> {
        match (self, below) {
            (Self::Group { frame } | Self::Switch { frame, .. }, Below::Block)
            | (Self::Repeat { frame, .. }, Below::Round)
            | (Self::Catch { frame, .. }, Below::Catch) => Some(frame),
            (Self::Foreach { keys, active, .. }, Below::Item(key)) => active.get(&keys.iter().position(|k| k == key)?),
            (Self::Parallel { branches, .. }, Below::Branch(name)) => branches.get(name).map(|b| &b.frame),
            _ => None,
        }
    }

    pub(super) fn frame_mut(&mut self, below: Below<'_>) -> Option<&mut Frame> {
        match (self, below) {
            (Self::Group { frame } | Self::Switch { frame, .. }, Below::Block)
            | (Self::Repeat { frame, .. }, Below::Round)
            | (Self::Catch { frame, .. }, Below::Catch) => Some(frame),
            (Self::Foreach { keys, active, .. }, Below::Item(key)) => {
                active.get_mut(&keys.iter().position(|k| k == key)?)
            }
            (Self::Parallel { branches, .. }, Below::Branch(name)) => branches.get_mut(name).map(|b| &mut b.frame),
            _ => None,
        }
    }

    /// Whether no step can stand below it.
    pub(super) fn is_leaf(&self) -> bool {
        matches!(self, Self::Activity { .. } | Self::Wait { .. } | Self::Await { .. } | Self::Call { .. })
    }

    /// Every frame below, with the text that leads to it from the step's own path.
    pub(super) fn frames(&self) -> Vec<(String, &Frame)> {
        match self {
            Self::Group { frame } | Self::Switch { frame, .. } => vec![(String::new(), frame)],
            Self::Repeat { frame, round, .. } => vec![(format!("~{round}"), frame)],
            Self::Catch { frame, .. } => vec![("!".to_owned(), frame)],
            Self::Foreach { active, keys, .. } => {
                active.iter().map(|(i, frame)| (format!("[{}]", keys[*i]), frame)).collect()
            }
            Self::Parallel { branches, .. } => {
                branches.iter().map(|(name, b)| (format!(":{name}"), &b.frame)).collect()
            }
            Self::Activity { .. } | Self::Wait { .. } | Self::Await { .. } | Self::Call { .. } => Vec::new(),
        }
    }
}

impl Live {
    /// [`Self::frames`], to be changed.
    pub(super) fn frames_mut(&mut self) -> Vec<(String, &mut Frame)> {
        match self {
            Self::Group { frame } | Self::Switch { frame, .. } => vec![(String::new(), frame)],
            Self::Repeat { frame, round, .. } => vec![(format!("~{round}"), frame)],
            Self::Catch { frame, .. } => vec![("!".to_owned(), frame)],
            Self::Foreach { active, keys, .. } => {
                active.iter_mut().map(|(i, frame)| (format!("[{}]", keys[*i]), frame)).collect()
            }
            Self::Parallel { branches, .. } => {
                branches.iter_mut().map(|(name, b)| (format!(":{name}"), &mut b.frame)).collect()
            }
            Self::Activity { .. } | Self::Wait { .. } | Self::Await { .. } | Self::Call { .. } => Vec::new(),
        }
    }
}

impl Node {
    /// A step that has just begun.
    pub(super) fn begun(live: Live, at: DateTime<Utc>) -> Self {
        Self {
            status: None,
            output: None,
            failure: None,
            reason: None,
            tolerated: false,
            stopping: false,
            attempts: 0,
            rounds: 0,
            extras: Value::Null,
            started_at: Some(at),
            ended_at: None,
            live: Some(live),
        }
    }
}

impl Frame {
    /// Visits every node that is under way, with its path, depth first, parents before children.
    pub(super) fn visit_live<'a>(&'a self, prefix: &str, visit: &mut dyn FnMut(&str, &'a Node)) {
        for (id, node) in &self.nodes {
            let Some(live) = &node.live else { continue };
            let path = format!("{prefix}{id}");
            visit(&path, node);
            for (suffix, frame) in live.frames() {
                frame.visit_live(&format!("{path}{suffix}/"), visit);
            }
        }
    }
}

impl RunState {
    /// Visits every node that is under way, in the body and in `finally`.
    pub(crate) fn visit_live<'a>(&'a self, visit: &mut dyn FnMut(&str, &'a Node)) {
        self.body.visit_live("", visit);
        if let Some(frame) = &self.finally {
            frame.visit_live(FINALLY_PREFIX, visit);
        }
    }
}

/// Makes a text fit for a path: letters, digits, `.`, `_` and `-` stay, everything else is percent-encoded.
pub(super) fn path_key(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-') {
            out.push(byte as char);
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}
