//! What an activity is, and what it may ask of the engine while it works.
//!
//! An activity is ordinary async code. It runs outside any transaction, may take hours, and may be started
//! again after a crash: its [`Context`] tells it which attempt this is and hands it the checkpoints that
//! earlier attempts left. Start reading at [`Activity`].

use crate::{
    definition::{Bundle, inputs::Schema},
    failure::{Failure, FailureKind},
    ids::{AttemptId, RunId},
    signature::{Catalog, Signature},
};
use chrono::{DateTime, Utc};
use futures_util::future::BoxFuture;
use serde_json::Value;
use std::{collections::BTreeMap, sync::Arc, time::Duration};
use tokio_util::sync::CancellationToken;

/// A registered kind of work.
pub trait Activity: Send + Sync + 'static {
    /// Its contract. Called once, at registration.
    fn signature(&self) -> Signature;

    /// Does the work of one attempt.
    ///
    /// # Errors
    /// A [`Failure`] tells the machine whether to try again. A panic is caught and becomes one.
    fn run(&self, ctx: Context, input: Value) -> BoxFuture<'static, Result<Value, Failure>>;

    /// What an attempt with this input may consume at most, for the transition hook. `extras` are those of the run's definition
    /// ([`AttemptInfo::extras`]). Opaque to the engine.
    fn reserve(&self, input: &Value, extras: &Value) -> Value {
        let _ = (input, extras);
        Value::Null
    }
}

/// The activities of a worker, by contract name.
#[derive(Clone, Default)]
pub struct Registry {
    activities: BTreeMap<String, Arc<dyn Activity>>,
    signatures: BTreeMap<String, Signature>,
    checks: BTreeMap<String, Arc<Checks>>,
}

/// What an attempt's input and output are checked against, read once.
#[derive(Debug)]
pub(crate) struct Checks {
    /// Contract name.
    pub(crate) name: String,
    pub(crate) input: Schema,
    pub(crate) output: Schema,
}

impl Registry {
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }
    /// Adds an activity; a later one with the same contract name replaces an earlier one.
    #[must_use]
    pub fn with(mut self, activity: impl Activity) -> Self {
        let signature = activity.signature();
        let checks = Checks {
            name: signature.name.clone(),
            input: Schema::new(&signature.input_schema),
            output: Schema::new(&signature.output_schema),
        };
        self.activities.insert(signature.name.clone(), Arc::new(activity));
        self.checks.insert(signature.name.clone(), Arc::new(checks));
        self.signatures.insert(signature.name.clone(), signature);
        self
    }
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&Arc<dyn Activity>> {
        self.activities.get(name)
    }
    #[must_use]
    pub fn signature(&self, name: &str) -> Option<&Signature> {
        self.signatures.get(name)
    }
    pub(crate) fn checks(&self, name: &str) -> Option<&Arc<Checks>> {
        self.checks.get(name)
    }
    /// The contracts, as pure data for a front end.
    #[must_use]
    pub fn catalog(&self) -> Catalog {
        Catalog::new(self.signatures.values().cloned())
    }
}

/// Everything about one attempt that does not change while it runs.
#[derive(Clone, Debug)]
pub struct AttemptInfo {
    pub run_id: RunId,
    pub attempt_id: AttemptId,
    /// Contract name, for example `implement@1`.
    pub activity: String,
    /// Step path without attempt number, for example `implement[a-1]/code`.
    pub path: String,
    /// 1-based; lost and blocked attempts count here.
    pub attempt: u32,
    /// 1-based number among the attempts that the retry policy counts: lost and blocked ones are left out, and those
    /// that ended uncounted (`Failure::uncounted`), so an attempt that carries on for one of them has its number.
    pub counted: u32,
    /// Stable over all attempts of this step: hash of run and step path.
    pub idempotency_key: String,
    /// Attributes of the run, given at its start.
    pub attributes: Arc<Value>,
    /// When this attempt was recorded as started, database time.
    pub started_at: DateTime<Utc>,
    /// When the run was recorded as started, database time.
    pub run_started_at: DateTime<Utc>,
    /// The attempt may not run beyond this instant.
    pub deadline: DateTime<Utc>,
    /// The attempt may not be silent for longer; `None`: its deadline alone counts.
    pub heartbeat: Option<Duration>,
    /// Opaque front-end data of the definition.
    pub extras: Arc<Value>,
    /// Definition budget, opaque.
    pub budget: Arc<Value>,
}

/// Largest value of one checkpoint, in bytes of JSON.
pub const CHECKPOINT_BYTES_MAX: usize = 8 << 20;

/// The store's side of a context: fenced checkpoints, readings, progress.
pub(crate) trait ContextBackend: Send + Sync {
    fn checkpoint<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<Value>, Failure>>;
    fn save<'a>(&'a self, key: &'a str, value: &'a Value) -> BoxFuture<'a, Result<(), Failure>>;
    fn meter_open<'a>(&'a self, key: &'a str, reading: &'a Value) -> BoxFuture<'a, Result<(), Failure>>;
    fn meter_note<'a>(&'a self, key: &'a str, reading: &'a Value) -> BoxFuture<'a, Result<(), Failure>>;
    fn meter_close<'a>(
        &'a self,
        key: &'a str,
        reading: &'a Value,
        checkpoint: Option<(&'a str, &'a Value)>,
    ) -> BoxFuture<'a, Result<(), Failure>>;
    fn heartbeat(&self, progress: Value);
}

/// What an attempt may ask of the engine. Cheap to clone.
#[derive(Clone)]
pub struct Context {
    pub(crate) info: Arc<AttemptInfo>,
    pub(crate) bundle: Arc<Bundle>,
    pub(crate) cancellation: CancellationToken,
    pub(crate) backend: Arc<dyn ContextBackend>,
}

impl Context {
    /// The facts of this attempt.
    #[must_use]
    pub fn info(&self) -> &AttemptInfo {
        &self.info
    }
    /// Files deployed with the definition that this run is pinned to.
    #[must_use]
    pub fn bundle(&self) -> &Bundle {
        &self.bundle
    }
    /// Cancelled when the run wants this attempt to stop, or when the worker lost the run.
    #[must_use]
    pub fn cancellation(&self) -> &CancellationToken {
        &self.cancellation
    }
    /// # Errors
    /// `cancelled` once the attempt should stop; call it between units of work.
    pub fn check_cancelled(&self) -> Result<(), Failure> {
        if self.cancellation.is_cancelled() { Err(Failure::cancelled()) } else { Ok(()) }
    }
    /// Says that the attempt is alive, with progress for people. Never blocks; the newest value wins.
    pub fn heartbeat(&self, progress: Value) {
        self.backend.heartbeat(progress);
    }
    /// The value that this or an earlier attempt of the step saved under `key`.
    ///
    /// # Errors
    /// `transient.store` when Postgres cannot be reached.
    pub async fn checkpoint(&self, key: &str) -> Result<Option<Value>, Failure> {
        self.backend.checkpoint(key).await
    }
    /// Saves a durable value under (run, step path, key). The first value stays: saving again is a no-op.
    ///
    /// # Errors
    /// `lease_lost` when another worker took the run over: stop, nothing was written.
    pub async fn save(&self, key: &str, value: &Value) -> Result<(), Failure> {
        self.backend.save(key, value).await
    }
    /// Announces an outside call before it is made. `key` names the call: stable over attempts, unique in the step. While it is
    /// open, a worker that drains lets the attempt go on, as long as it may: close it, then look at
    /// [`cancellation`](Self::cancellation).
    ///
    /// # Errors
    /// Kind `Blocked` when the hook refuses (no credits): return it. `lease_lost` as in [`Self::save`]. Kind `Cancelled` when the
    /// worker drains: return it, and the next attempt makes the call.
    /// # Transaction
    /// One short transaction around `TransitionHook::meter`.
    pub async fn meter_open(&self, key: &str, reading: &Value) -> Result<(), Failure> {
        self.backend.meter_open(key, reading).await
    }
    /// Records what became known of a call that is under way, for the case that this process dies before it can close it. Await
    /// it beside the call: a failure is no reason to give the call up.
    ///
    /// # Errors
    /// `transient.store`: nothing was recorded. It is tried once.
    /// # Transaction
    /// One short transaction around `TransitionHook::meter`, in a task of its own and without a lock on the run.
    pub async fn meter_note(&self, key: &str, reading: &Value) -> Result<(), Failure> {
        self.backend.meter_note(key, reading).await
    }
    /// Records what the call consumed, and with it the checkpoint of its answer, in one transaction.
    ///
    /// A reading is a fact: it is accepted even from an attempt that lost its lease, or with a checkpoint that cannot be kept,
    /// while the checkpoint is not.
    /// # Errors
    /// `lease_lost` after the reading was stored, when the attempt is stale; `limit.size` after it was stored, when the
    /// checkpoint is larger than [`CHECKPOINT_BYTES_MAX`] or nested deeper than `definition::inputs::DEPTH_MAX`.
    pub async fn meter_close(
        &self,
        key: &str,
        reading: &Value,
        checkpoint: Option<(&str, &Value)>,
    ) -> Result<(), Failure> {
        self.backend.meter_close(key, reading, checkpoint).await
    }
}

/// The failure of a panicking activity, from the payload that `catch_unwind` caught.
pub(crate) fn panic_failure(payload: &(dyn std::any::Any + Send)) -> Failure {
    let text = payload
        .downcast_ref::<&str>()
        .map(|s| (*s).to_owned())
        .or_else(|| payload.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "no message".to_owned());
    Failure::new(FailureKind::Panicked, "internal.panic", format!("the activity panicked: {text}"))
}

/// A context without a store behind it, for tests of activities: checkpoints in memory, readings collected.
pub mod detached {
    use super::*;
    use std::sync::Mutex;

    /// What a detached context has recorded.
    #[derive(Default)]
    pub struct Recorder {
        pub checkpoints: Mutex<BTreeMap<String, Value>>,
        /// (`open` or `close`, key, reading), in order.
        pub readings: Mutex<Vec<(&'static str, String, Value)>>,
        /// (key, reading) of calls under way.
        pub notes: Mutex<Vec<(String, Value)>>,
        pub progress: Mutex<Vec<Value>>,
    }

    impl ContextBackend for Recorder {
        fn checkpoint<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<Value>, Failure>> {
            let found = self.checkpoints.lock().expect("no panic while held").get(key).cloned();
            Box::pin(async move { Ok(found) })
        }
        fn save<'a>(&'a self, key: &'a str, value: &'a Value) -> BoxFuture<'a, Result<(), Failure>> {
            self.checkpoints
                .lock()
                .expect("no panic while held")
                .entry(key.to_owned())
                .or_insert_with(|| value.clone());
            Box::pin(async { Ok(()) })
        }
        fn meter_open<'a>(&'a self, key: &'a str, reading: &'a Value) -> BoxFuture<'a, Result<(), Failure>> {
            self.readings.lock().expect("no panic while held").push(("open", key.to_owned(), reading.clone()));
            Box::pin(async { Ok(()) })
        }
        fn meter_note<'a>(&'a self, key: &'a str, reading: &'a Value) -> BoxFuture<'a, Result<(), Failure>> {
            self.notes.lock().expect("no panic while held").push((key.to_owned(), reading.clone()));
            Box::pin(async { Ok(()) })
        }
        fn meter_close<'a>(
            &'a self,
            key: &'a str,
            reading: &'a Value,
            checkpoint: Option<(&'a str, &'a Value)>,
        ) -> BoxFuture<'a, Result<(), Failure>> {
            self.readings.lock().expect("no panic while held").push(("close", key.to_owned(), reading.clone()));
            Box::pin(async move {
                match checkpoint {
                    Some((key, value)) => self.save(key, value).await,
                    None => Ok(()),
                }
            })
        }
        fn heartbeat(&self, progress: Value) {
            self.progress.lock().expect("no panic while held").push(progress);
        }
    }

    /// A context over `recorder` for the given attempt.
    #[must_use]
    pub fn context(info: AttemptInfo, bundle: Bundle, recorder: Arc<Recorder>) -> Context {
        Context {
            info: Arc::new(info),
            bundle: Arc::new(bundle),
            cancellation: CancellationToken::new(),
            backend: recorder,
        }
    }

    /// Plausible facts for tests: attempt 1 of `activity` at path `step`, run attributes as given.
    #[must_use]
    pub fn info(activity: &str, attributes: Value) -> AttemptInfo {
        let run_id = RunId::new();
        let now = Utc::now();
        AttemptInfo {
            run_id,
            attempt_id: AttemptId::derive(run_id, "step", 1),
            activity: activity.to_owned(),
            path: "step".to_owned(),
            attempt: 1,
            counted: 1,
            idempotency_key: "test".to_owned(),
            attributes: Arc::new(attributes),
            started_at: now,
            run_started_at: now,
            deadline: now + chrono::Duration::minutes(20),
            heartbeat: None,
            extras: Arc::new(Value::Null),
            budget: Arc::new(Value::Null),
        }
    }
}
