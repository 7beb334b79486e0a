//! The store behind an attempt's context.

use super::Shared;
use crate::{
    Error,
    activity::ContextBackend,
    committer::crash_point,
    definition::inputs::is_too_deep,
    failure::{Failure, FailureKind},
    hook::{AttemptRef, HookError, Phase, Reading, Verdict},
    machine,
    store::{self, checkpoints::Progress},
    transaction,
};
use futures_util::future::BoxFuture;
use serde_json::Value;
use std::{
    sync::{Arc, Mutex},
    time::Instant,
};

/// Largest value of one checkpoint, in bytes of JSON.
const CHECKPOINT_BYTES_MAX: usize = 8 << 20;

pub(super) struct Backend {
    pub(super) shared: Arc<Shared>,
    pub(super) attempt: AttemptRef,
    pub(super) epoch: i64,
    pub(super) beat: Arc<Mutex<Instant>>,
}

/// A failed store call, as an activity sees it.
fn store_failure(error: &Error) -> Failure {
    match error {
        Error::LeaseLost => Failure::new(FailureKind::Lost, "transient.lease_lost", "another worker owns the run now"),
        Error::TooLarge { .. } | Error::TooDeep { .. } => Failure::permanent("limit.size", error.to_string()),
        Error::Refused { reason, message } if machine::is_final(reason) => {
            Failure::permanent(reason.clone(), message.clone())
        }
        Error::Refused { reason, message } => Failure::blocked(reason.clone(), message.clone()),
        Error::PayloadCorrupt(_) => Failure::permanent("internal.invariant", error.to_string()),
        Error::Invariant(text) => Failure::permanent("internal.invariant", text.clone()),
        other => Failure::retryable("transient.store", other.to_string()),
    }
}

fn of_hook(error: HookError) -> Error {
    match error {
        HookError::Sql(e) => Error::Sql(e),
        HookError::Invariant(text) => Error::Invariant(text),
    }
}

impl Backend {
    fn limit(value: &Value) -> Result<(), Error> {
        let actual = serde_json::to_string(value).map_or(usize::MAX, |t| t.len());
        if actual > CHECKPOINT_BYTES_MAX {
            return Err(Error::TooLarge { what: "a checkpoint", actual, limit: CHECKPOINT_BYTES_MAX });
        }
        crate::client::shallow("a checkpoint", value)
    }

    async fn save_once(&self, key: &str, value: &Value) -> Result<(), Error> {
        Self::limit(value)?;
        let mut tx = transaction::begin(&self.shared.pool).await?;
        if !store::checkpoints::fence(&mut tx, self.attempt.run_id, self.epoch).await? {
            return Err(Error::LeaseLost);
        }
        crash_point("save.after_fence");
        store::checkpoints::put(&mut tx, self.attempt.run_id, &self.attempt.path, key, value).await?;
        crash_point("save.before_commit");
        tx.commit().await?;
        crash_point("save.after_commit");
        Ok(())
    }

    async fn open_once(&self, key: &str, reading: &Value) -> Result<(), Error> {
        let mut tx = transaction::begin(&self.shared.pool).await?;
        if !store::checkpoints::fence(&mut tx, self.attempt.run_id, self.epoch).await? {
            return Err(Error::LeaseLost);
        }
        crash_point("open.after_fence");
        let reading = Reading { key, phase: Phase::Open, current: true, body: reading };
        match self.shared.hook.meter(&mut tx, &self.attempt, reading).await.map_err(of_hook)? {
            Verdict::Accepted => {
                crash_point("open.before_commit");
                tx.commit().await?;
                crash_point("open.after_commit");
                Ok(())
            }
            Verdict::Refused { reason, message } => Err(Error::Refused { reason, message }),
        }
    }

    async fn close_once(&self, key: &str, reading: &Value, checkpoint: Option<(&str, &Value)>) -> Result<(), Error> {
        if let Some((_, value)) = checkpoint {
            Self::limit(value)?;
        }
        let mut tx = transaction::begin(&self.shared.pool).await?;
        let owned = store::checkpoints::fence(&mut tx, self.attempt.run_id, self.epoch).await?;
        // The reading is a fact about the outside: it is stored even when the attempt is stale. Its result is not,
        // and the hook is told so: nobody should pay for what is thrown away.
        let reading = Reading { key, phase: Phase::Close, current: owned, body: reading };
        crash_point("meter.after_fence");
        self.shared.hook.meter(&mut tx, &self.attempt, reading).await.map_err(of_hook)?;
        crash_point("meter.after_hook");
        if let (true, Some((key, value))) = (owned, checkpoint) {
            store::checkpoints::put(&mut tx, self.attempt.run_id, &self.attempt.path, key, value).await?;
        }
        crash_point("meter.before_commit");
        tx.commit().await?;
        crash_point("meter.after_commit");
        if owned { Ok(()) } else { Err(Error::LeaseLost) }
    }
}

/// Pauses if the transaction may be sent again: everything in here is idempotent by its keys. Otherwise the failure.
async fn pause(error: Error, tries: &mut u32) -> Result<(), Failure> {
    if let Error::Sql(sql) = &error
        && store::is_transient(sql)
        && let Some(pause) = store::retry_pause(*tries)
    {
        *tries += 1;
        tokio::time::sleep(pause * 8).await;
        return Ok(());
    }
    Err(store_failure(&error))
}

impl ContextBackend for Backend {
    fn checkpoint<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<Value>, Failure>> {
        Box::pin(async move {
            store::checkpoints::get(&self.shared.pool, self.attempt.run_id, &self.attempt.path, key)
                .await
                .map_err(|e| store_failure(&e))
        })
    }
    fn save<'a>(&'a self, key: &'a str, value: &'a Value) -> BoxFuture<'a, Result<(), Failure>> {
        Box::pin(async move {
            let mut tries = 0;
            loop {
                match self.save_once(key, value).await {
                    Ok(()) => return Ok(()),
                    Err(error) => pause(error, &mut tries).await?,
                }
            }
        })
    }
    fn meter_open<'a>(&'a self, key: &'a str, reading: &'a Value) -> BoxFuture<'a, Result<(), Failure>> {
        Box::pin(async move {
            let mut tries = 0;
            loop {
                match self.open_once(key, reading).await {
                    Ok(()) => return Ok(()),
                    Err(error) => pause(error, &mut tries).await?,
                }
            }
        })
    }
    fn meter_close<'a>(
        &'a self,
        key: &'a str,
        reading: &'a Value,
        checkpoint: Option<(&'a str, &'a Value)>,
    ) -> BoxFuture<'a, Result<(), Failure>> {
        Box::pin(async move {
            let mut tries = 0;
            loop {
                match self.close_once(key, reading, checkpoint).await {
                    Ok(()) => return Ok(()),
                    Err(error) => pause(error, &mut tries).await?,
                }
            }
        })
    }
    fn heartbeat(&self, progress: Value) {
        *self.beat.lock().expect("no panic while held") = Instant::now();
        // What cannot be read again is not progress for anybody.
        if !progress.is_null() && !is_too_deep(&progress) {
            let (run, path) = (self.attempt.run_id, self.attempt.path.clone());
            let attempt = i32::try_from(self.attempt.attempt).unwrap_or(i32::MAX);
            self.shared
                .progress
                .lock()
                .expect("no panic while held")
                .insert((run, path.clone()), Progress { run, path, attempt, value: progress });
        }
    }
}
