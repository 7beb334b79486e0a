//! The intermediate representation that the engine interprets. A front end (the YAML compiler, a test)
//! builds it; the engine pins it to each run by content hash and must still understand it years later,
//! so every change of meaning is a new [`FORMAT`].
//!
//! Nothing here knows YAML. Expressions and templates are kept as source text and evaluated by
//! [`expr`] and [`template`], each in its cage.

pub mod expr;
pub mod inputs;
pub mod template;

use crate::{
    admission::{KEY_BYTES_MAX, Place},
    failure::Failure,
    ids::DefinitionHash,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;

/// Number of this representation. A definition is stored with the lowest number that knows all of it
/// ([`Definition::lowest_format`]): a release that does not know it leaves its runs to newer ones.
///
/// - 1: the first.
/// - 2: `continue_as_new`.
/// - 3: `runs_on`.
/// - 4: [`OnConflict::CancelNew`].
pub const FORMAT: u32 = 4;

/// A compiled, validated workflow.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Definition {
    pub format: u32,
    pub name: String,
    #[serde(default)]
    pub inputs: BTreeMap<String, Input>,
    #[serde(default)]
    pub env: BTreeMap<String, Data>,
    /// Whole run, waits included. Milliseconds.
    pub timeout_ms: u64,
    /// Opaque to the engine: the transition hook reads it from the run's attributes.
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub budget: Value,
    /// How many of its runs may be under way at the same time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub concurrency: Option<Concurrency>,
    /// Labels that a worker must have to claim its runs, sorted; see [`crate::labels`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub runs_on: Vec<String>,
    /// Most executions (attempts, waits, blocks) that one run may make. Attempts that the hook stopped are none.
    pub executions_max: u32,
    pub steps: Vec<Step>,
    #[serde(default)]
    pub finally: Vec<Step>,
    #[serde(default)]
    pub outputs: BTreeMap<String, Data>,
    /// What may be asked of a run at any time, by name; evaluated over the body's steps, never recorded.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub queries: BTreeMap<String, Data>,
    /// Front-end data that activities read (for example model overrides). The engine reads `labels` of it, by which runs are found
    /// ([`crate::labels::labelled`]).
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub extras: Value,
}

/// Files deployed with a definition, by relative path (prompts, schemas). Part of its hash.
pub type Bundle = BTreeMap<String, String>;

/// At most `limit` runs of a group at the same time.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Concurrency {
    /// Over `inputs`; evaluated once, at the start. The same text is the same group, whatever the workflow.
    pub group: Data,
    /// 1 to 1,000.
    pub limit: u32,
    pub on_conflict: OnConflict,
}

/// What a run does that finds no place in its group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnConflict {
    /// It waits, in the order of arrival.
    Queue,
    /// It is cancelled before it begins anything; a fork and the next run of a chain wait.
    CancelNew,
    /// The oldest are cancelled; it begins when they have closed, their `finally` included.
    CancelRunning,
    /// It is not started.
    Fail,
}

impl OnConflict {
    /// As in documents.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Queue => "queue",
            Self::CancelNew => "cancel-new",
            Self::CancelRunning => "cancel-running",
            Self::Fail => "fail",
        }
    }

    /// What is kept of it with a run that is in the group, or waits: it is nobody's to refuse or to cancel any more.
    #[cfg(feature = "runtime")]
    #[must_use]
    pub(crate) fn once_there(self) -> Self {
        match self {
            Self::CancelNew => Self::Fail,
            other @ (Self::Queue | Self::CancelRunning | Self::Fail) => other,
        }
    }
}

impl Concurrency {
    /// The place that a run with these inputs needs.
    ///
    /// # Errors
    /// What the evaluation of the group says; `limit.size` if it is no text of 1 to 200 bytes.
    pub fn place(&self, inputs: &Value) -> Result<Place, Failure> {
        let scope = serde_json::Map::from_iter([("inputs".to_owned(), inputs.clone())]);
        let group = joined(&self.group, &scope)?;
        if group.is_empty() || group.len() > KEY_BYTES_MAX {
            let text = format!("a group is a text of 1 to {KEY_BYTES_MAX} bytes, not `{group}`");
            return Err(Failure::permanent("limit.size", text.chars().take(300).collect::<String>()));
        }
        Ok(Place { group, limit: self.limit, on_conflict: self.on_conflict })
    }

    /// The place of a run whose group cannot be evaluated: one for all of its workflow.
    #[cfg(feature = "runtime")]
    pub(crate) fn fallback(&self, workflow: &str) -> Place {
        Place { group: workflow.to_owned(), limit: self.limit, on_conflict: self.on_conflict }
    }
}

/// Text of literals and expressions.
fn joined(data: &Data, scope: &serde_json::Map<String, Value>) -> Result<String, Failure> {
    let value = match data {
        Data::Concat(parts) => return parts.iter().map(|part| joined(part, scope)).collect(),
        Data::Literal(value) => value.clone(),
        Data::Expr(text) => expr::evaluate(text, scope)?,
        Data::List(_) | Data::Map(_) | Data::Template(_) => Value::Null,
    };
    match value {
        Value::String(text) => Ok(text),
        Value::Number(n) => Ok(n.to_string()),
        Value::Bool(b) => Ok(b.to_string()),
        other => Err(Failure::permanent("expr.type", format!("a group is a text, not {}", expr::type_name(&other)))),
    }
}

/// One declared input.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Input {
    /// JSON Schema of the value.
    pub schema: Value,
    #[serde(default)]
    pub required: bool,
    #[serde(default, deserialize_with = "crate::event::present", skip_serializing_if = "Option::is_none")]
    pub default: Option<Value>,
}

/// A bare CEL expression, as text.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Expr(pub String);

/// A Handlebars template, as text.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Template(pub String);

/// A value that may contain expressions, resolved once and recorded.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Data {
    /// A constant.
    Literal(Value),
    /// Exactly one `${{ }}`: the typed value.
    Expr(Expr),
    /// Text with embedded expressions: text, numbers and booleans are joined.
    Concat(Vec<Data>),
    List(Vec<Data>),
    Map(BTreeMap<String, Data>),
    Template(Template),
}

/// A node of the definition.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Step {
    pub id: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub condition: Option<Expr>,
    pub kind: Kind,
    #[serde(default)]
    pub retry: RetryPolicy,
    #[serde(default)]
    pub timeouts: Timeouts,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub catch: Vec<Catch>,
    #[serde(default)]
    pub continue_on_error: bool,
}

/// What a step does.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Run an activity, named as in the catalog (`gather@1`).
    Activity { name: String, with: BTreeMap<String, Data> },
    /// Compute values; output is the map.
    Set { values: BTreeMap<String, Data> },
    /// Steps in sequence. Output: `outputs` if given, else the last succeeded step's output.
    Group {
        steps: Vec<Step>,
        #[serde(default)]
        outputs: Option<BTreeMap<String, Data>>,
    },
    /// Branches side by side. Output: `{winner, branches: {name: {status, output, error}}}`.
    Parallel { branches: Vec<Branch>, join: Join, fail_fast: bool },
    /// The steps for each item. Output: list of `{index, key, status, output, error}` in input order.
    Foreach {
        list: Expr,
        #[serde(default)]
        key: Option<Expr>,
        max_items: u32,
        concurrency: u32,
        on_item_failure: OnItemFailure,
        steps: Vec<Step>,
        #[serde(default)]
        outputs: Option<BTreeMap<String, Data>>,
    },
    /// The steps in rounds until the condition says stop. Output: the last round's block output.
    Repeat {
        steps: Vec<Step>,
        max_rounds: u32,
        condition: RepeatCondition,
        delay_ms: u64,
        exhausted: Exhausted,
        /// The lowered form of `redo`: the steps of the last round stay visible to the siblings that follow.
        #[serde(default)]
        transparent: bool,
        /// Evaluate the condition only if this step of the round ended succeeded or recovered; else stop.
        #[serde(default)]
        gate: Option<String>,
        #[serde(default)]
        outputs: Option<BTreeMap<String, Data>>,
    },
    /// The first case whose `when` holds; `None` is `else`. Output `{case, output}`, case = index or -1.
    Switch { cases: Vec<Case> },
    /// A durable timer. Output `{waited_ms}`.
    Wait { until: WaitUntil },
    /// Wait for a signal. Output: its payload; for an approval the collected decision.
    Await(Box<Await>),
    /// Run another workflow as a child. Output: its outputs.
    Call {
        workflow: String,
        version: CallVersion,
        with: BTreeMap<String, Data>,
        /// `on_cancel` is its first name.
        #[serde(rename = "on_cancel")]
        parent_close: ParentClose,
    },
    /// End the block with a failure whose code starts with `user.`.
    Fail {
        code: String,
        #[serde(default)]
        message: Option<Data>,
    },
    /// End the run as completed from any depth; `finally` still runs.
    Finish { outputs: BTreeMap<String, Data> },
    /// End the run as continued from any depth, after `finally`, and start another in its place with these inputs.
    ContinueAsNew {
        with: BTreeMap<String, Data>,
        /// Under what `current` of its name points to when a worker last took the run; otherwise under its own definition.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        current: bool,
    },
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Branch {
    pub name: String,
    pub steps: Vec<Step>,
}

/// When a parallel step ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Join {
    /// All branches succeeded; fails on the first failure (`fail_fast`) or after all.
    All,
    /// All branches ended, however.
    Settled,
    /// The first success; the others are cancelled.
    First,
    /// That many successes.
    AtLeast(u32),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnItemFailure {
    /// Cancel the items under way, then fail.
    FailFast,
    /// Let all items end, then fail.
    FailAfter,
    /// Succeed; the failures stand in the output.
    Continue,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RepeatCondition {
    /// Stop when true after a round.
    Until(Expr),
    /// Go on while true after a round.
    While(Expr),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Exhausted {
    /// Fail with `limit.rounds`.
    Fail,
    /// Succeed with the last round's output.
    Continue,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Case {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub when: Option<Expr>,
    pub steps: Vec<Step>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WaitUntil {
    /// So many milliseconds from the moment the step starts.
    For(u64),
    /// An RFC 3339 instant, at most `max_ms` ahead.
    Instant { at: Expr, max_ms: u64 },
}

/// Waits for a signal, or for an approval (a signal with a fixed form and a quorum).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Await {
    /// Name of the signal. For an approval: the step's id.
    pub signal: String,
    pub timeout_ms: u64,
    /// JSON Schema that a payload must satisfy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub form: Option<Value>,
    /// What the person is shown; rendered when the wait begins.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub show: Option<Template>,
    /// Who may answer, as `role:owner`, `user:<id>`; checked by the surfaces.
    #[serde(default)]
    pub to: Vec<String>,
    /// Condition over `signal` that a payload must meet to be consumed here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub filter: Option<Expr>,
    /// Reminders, in milliseconds after the wait began.
    #[serde(default)]
    pub remind_ms: Vec<u64>,
    pub on_timeout: OnTimeout,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub default: Option<Data>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub approval: Option<Approval>,
    /// What the sender of an update is told when this step takes it, over `signal`; otherwise the payload.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reply: Option<Data>,
}

/// What makes an await an approval. Payload: `{decision: approved | rejected | changes_requested, comment?, data?}`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Approval {
    pub quorum: u32,
    /// Whether `rejected` fails the step with `approval.rejected`.
    pub fail_on_reject: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnTimeout {
    /// Fail with `signal.timeout` or `approval.timeout`.
    Fail,
    /// Go on with `default`.
    Default,
    /// Approval only: as if approved.
    Approve,
    /// Approval only: as if rejected.
    Reject,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CallVersion {
    /// Whatever `current` points to when the run starts; recorded there, so that no deployment changes a run in flight.
    Latest,
    Number(u32),
    Hash(DefinitionHash),
}

/// What becomes of a child that is under way when its call is stopped or its parent closes, in whatever way. The first two
/// have in definitions the words that they were given first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ParentClose {
    /// It is asked to stop and cleans up; its parent waits for it, unless it is terminated itself.
    #[serde(rename = "propagate")]
    Cancel,
    /// It goes on alone.
    #[serde(rename = "detach")]
    Abandon,
    /// It ends at once, without its `finally`, and so do the children that it would terminate.
    Terminate,
}

/// When and how an activity is tried again. Every count includes the first attempt.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RetryPolicy {
    /// 1 to 20.
    pub attempts: u32,
    pub delay_ms: u64,
    /// Factor per attempt, at least 1.
    pub backoff: f64,
    pub max_delay_ms: u64,
    /// 0 to 1: the delay is multiplied by a factor drawn from `[1 - jitter, 1]`.
    pub jitter: f64,
    /// Patterns of failure codes that are tried again.
    pub on: Vec<String>,
    /// Patterns that are not; they win.
    #[serde(default)]
    pub not_on: Vec<String>,
    /// Overrides of `with`, from an attempt on; a later entry wins.
    #[serde(default)]
    pub escalate: Vec<Escalate>,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self {
            attempts: 1,
            delay_ms: 5_000,
            backoff: 2.0,
            max_delay_ms: 120_000,
            jitter: 0.2,
            on: vec!["transient.*".into(), "timeout.run".into(), "timeout.heartbeat".into()],
            not_on: Vec::new(),
            escalate: Vec::new(),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Escalate {
    pub from_attempt: u32,
    pub with: BTreeMap<String, Data>,
}

/// The four timeouts, milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timeouts {
    /// Start to close of one attempt.
    pub run_ms: u64,
    /// Schedule to start.
    pub queue_ms: u64,
    /// Longest silence between heartbeats.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub heartbeat_ms: Option<u64>,
    /// Schedule to close, over all attempts and their delays. For blocks: the whole block.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total_ms: Option<u64>,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self { run_ms: 20 * 60_000, queue_ms: 24 * 3_600_000, heartbeat_ms: None, total_ms: None }
    }
}

/// A handler: the first whose patterns and condition match takes the failure; its block's output becomes
/// the step's output.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Catch {
    pub on: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub condition: Option<Expr>,
    pub steps: Vec<Step>,
}

impl Definition {
    /// Content hash of this definition with its bundle: object keys sorted, no insignificant white space.
    #[must_use]
    pub fn hash(&self, bundle: &Bundle) -> DefinitionHash {
        let value = serde_json::json!({ "definition": self, "bundle": bundle });
        let mut out = Vec::with_capacity(4096);
        write_canonical(&value, &mut out);
        DefinitionHash::of(&out)
    }

    /// Every step, depth first, blocks before their contents.
    pub fn walk<'a>(&'a self, visit: &mut dyn FnMut(&'a Step)) {
        walk_steps(&self.steps, visit);
        walk_steps(&self.finally, visit);
    }

    /// The lowest [`FORMAT`] that knows all of it.
    #[must_use]
    pub fn lowest_format(&self) -> u32 {
        let mut format = 1;
        self.walk(&mut |step| {
            if matches!(step.kind, Kind::ContinueAsNew { .. }) {
                format = 2;
            }
        });
        if !self.runs_on.is_empty() {
            format = 3;
        }
        if self.concurrency.as_ref().is_some_and(|group| group.on_conflict == OnConflict::CancelNew) {
            format = 4;
        }
        format
    }
}

fn walk_steps<'a>(steps: &'a [Step], visit: &mut dyn FnMut(&'a Step)) {
    for step in steps {
        visit(step);
        match &step.kind {
            Kind::Group { steps, .. } | Kind::Foreach { steps, .. } | Kind::Repeat { steps, .. } => {
                walk_steps(steps, visit);
            }
            Kind::Parallel { branches, .. } => branches.iter().for_each(|b| walk_steps(&b.steps, visit)),
            Kind::Switch { cases } => cases.iter().for_each(|c| walk_steps(&c.steps, visit)),
            Kind::Activity { .. }
            | Kind::Set { .. }
            | Kind::Wait { .. }
            | Kind::Await(_)
            | Kind::Call { .. }
            | Kind::Fail { .. }
            | Kind::Finish { .. }
            | Kind::ContinueAsNew { .. } => {}
        }
        step.catch.iter().for_each(|c| walk_steps(&c.steps, visit));
    }
}

/// Canonical JSON: keys sorted, whatever map order the JSON library was built with.
fn write_canonical(value: &Value, out: &mut Vec<u8>) {
    match value {
        Value::Object(map) => {
            let sorted: BTreeMap<&String, &Value> = map.iter().collect();
            out.push(b'{');
            for (i, (key, item)) in sorted.into_iter().enumerate() {
                if i > 0 {
                    out.push(b',');
                }
                write_canonical(&Value::String(key.clone()), out);
                out.push(b':');
                write_canonical(item, out);
            }
            out.push(b'}');
        }
        Value::Array(items) => {
            out.push(b'[');
            for (i, item) in items.iter().enumerate() {
                if i > 0 {
                    out.push(b',');
                }
                write_canonical(item, out);
            }
            out.push(b']');
        }
        scalar => out.extend_from_slice(scalar.to_string().as_bytes()),
    }
}
