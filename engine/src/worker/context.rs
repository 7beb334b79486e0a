//! The store behind an attempt's context.
//!
//! What an attempt has bought outside is in its memory alone until it is stored here. So a store call is made again while Postgres
//! is away, for [`INSIST_MAX`]; and what is to be stored goes on being stored when the attempt is dropped meanwhile, because its
//! worker lost its lease or its time is over. What may still be written then says the fence: of a run that has another epoch, or of
//! an attempt that has ended here, nothing but readings.

use super::{Shared, outside::Outside};
use crate::{
    Error,
    activity::{CHECKPOINT_BYTES_MAX, ContextBackend},
    committer::crash_point,
    definition::inputs::is_too_deep,
    failure::{Failure, FailureKind},
    hook::{AttemptRef, HookError, Phase, Reading, Verdict},
    machine,
    store::{self, Fault, checkpoints::Progress, spread::Spread},
    transaction,
};
use futures_util::future::BoxFuture;
use serde_json::Value;
use sqlx::PgConnection;
use std::{
    collections::HashSet,
    future::Future,
    io,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};
use tokio_util::sync::CancellationToken;

/// How long a store call is tried while Postgres is away. Chosen: a restart takes seconds, a failover of a hosted Postgres one or
/// two minutes; whoever waits longer holds an answer that may be stale anyway. The last try may add [`TRY_MAX`].
pub(super) const INSIST_MAX: Duration = Duration::from_secs(120);
/// One try: a connection whose other end has vanished gives no error.
const TRY_MAX: Duration = Duration::from_secs(20);
/// First and longest pause between two tries, each shortened by up to a half so that not all come back at once.
const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// How often an attempt that waits for Postgres gives a sign of life. Chosen: shorter than any useful heartbeat timeout.
const BEAT: Duration = Duration::from_millis(500);

/// Keys of a step's checkpoints that are remembered; of a step with more, each is asked for.
const KEYS_MAX: usize = 2_000;

/// Under which keys a step has saved something.
///
/// What earlier attempts have saved is there when an attempt begins, because their writes hold the run's row; from then on this
/// attempt alone writes. So of what is not in here nobody has to ask.
#[derive(Default)]
pub(super) struct Saved {
    /// Those of this attempt stand here before they are written.
    keys: HashSet<String>,
    /// Whether those of earlier attempts are among them: not asked yet; yes; there are too many.
    earlier: Option<bool>,
}

#[derive(Clone)]
pub(super) struct Backend {
    pub(super) shared: Arc<Shared>,
    pub(super) attempt: AttemptRef,
    pub(super) epoch: i64,
    pub(super) beat: Arc<Mutex<Instant>>,
    /// The attempt has ended while its worker goes on: the next one may have begun under the same epoch.
    pub(super) over: CancellationToken,
    pub(super) outside: Arc<Outside>,
    pub(super) saved: Arc<Mutex<Saved>>,
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

    /// Whether this attempt's results count. Its end waits for the caller's transaction, and so does the next attempt.
    async fn counts(&self, conn: &mut PgConnection) -> Result<bool, Error> {
        let owned = store::checkpoints::fence(conn, self.attempt.run_id, self.epoch).await?;
        // Behind the lock: an attempt that ends from now on is followed by one that sees what is written here.
        Ok(owned && !self.over.is_cancelled())
    }

    /// Makes a store call until it has an answer, [`INSIST_MAX`] long. Everything in here is idempotent by its keys: after a COMMIT
    /// whose answer was lost the same is written again, finds itself, and is done.
    async fn insist<T, F>(&self, once: impl Fn() -> F) -> Result<T, Failure>
    where
        F: Future<Output = Result<T, Error>>,
    {
        let (began, mut pause) = (Instant::now(), PAUSE_MIN);
        let trying = async {
            loop {
                let error = match tokio::time::timeout(TRY_MAX, once()).await {
                    Ok(Ok(value)) => return Ok(value),
                    Ok(Err(error)) => error,
                    Err(_) => Error::Sql(io::Error::from(io::ErrorKind::TimedOut).into()),
                };
                // Rights, plans and schemas as well: somebody mends them, another session has them, and what was bought is not thrown away.
                let passes = matches!(&error, Error::Sql(sql) if store::fault(sql) != Fault::Sent);
                if !passes || began.elapsed() + pause > INSIST_MAX {
                    return Err(store_failure(&error));
                }
                tracing::warn!(run_id = %self.attempt.run_id, path = self.attempt.path, %error, "an attempt cannot reach its store yet");
                tokio::time::sleep(pause.mul_f64(0.5 + fastrand::f64() / 2.0)).await;
                pause = (pause * 2).min(PAUSE_MAX);
            }
        };
        let alive = async {
            loop {
                self.beat();
                tokio::time::sleep(BEAT).await;
            }
        };
        tokio::select! {
            biased;
            result = trying => result,
            () = alive => Err(Failure::retryable("transient.store", "nobody waits for it any more")),
        }
    }

    /// The same for what must be stored, in a task of its own: it goes on when the attempt is dropped.
    async fn insist_alone<F>(&self, once: impl Fn(Self) -> F + Send + Sync + 'static) -> Result<(), Failure>
    where
        F: Future<Output = Result<(), Error>> + Send,
    {
        let own = self.clone();
        let stored = self.shared.storing.spawn(async move { own.insist(|| once(own.clone())).await });
        // Only a runtime that shuts down has no answer.
        stored.await.unwrap_or_else(|error| Err(Failure::retryable("transient.store", error.to_string())))
    }

    /// Stores a note, once, in a task of its own. Nobody's work depends on it.
    async fn note_alone(&self, key: &str, reading: &Value) -> Result<(), Failure> {
        let (own, key, reading) = (self.clone(), key.to_owned(), reading.clone());
        let stored = self.shared.storing.spawn(async move {
            match tokio::time::timeout(TRY_MAX, own.note_once(&key, &reading)).await {
                Ok(done) => done.map_err(|error| store_failure(&error)),
                Err(_) => Err(Failure::retryable("transient.store", "the database did not answer in time")),
            }
        });
        stored.await.unwrap_or_else(|error| Err(Failure::retryable("transient.store", error.to_string())))
    }

    fn beat(&self) {
        *self.beat.lock().expect("no panic while held") = Instant::now();
    }

    /// Before it is saved: until then nobody has it under that key.
    fn will_save(&self, key: &str) {
        self.saved.lock().expect("no panic while held").keys.insert(key.to_owned());
    }

    /// Reads a checkpoint, and once for the attempt which there are.
    async fn read(&self, key: &str) -> Result<Option<Value>, Error> {
        let (run, path) = (self.attempt.run_id, self.attempt.path.as_str());
        let asked = {
            let saved = self.saved.lock().expect("no panic while held");
            if saved.earlier == Some(true) && !saved.keys.contains(key) {
                return Ok(None);
            }
            saved.earlier.is_some()
        };
        if asked {
            return store::checkpoints::get(&self.shared.pool, run, path, key).await;
        }
        let (value, keys) = store::checkpoints::get_with_keys(&self.shared.pool, run, path, key, KEYS_MAX).await?;
        let mut saved = self.saved.lock().expect("no panic while held");
        saved.earlier = Some(keys.is_some());
        saved.keys.extend(keys.into_iter().flatten());
        Ok(value)
    }

    /// Records a reading in one statement, if its hook can and the case is ordinary. False: nothing is recorded, and a transaction
    /// decides.
    async fn at_once(&self, reading: &Reading<'_>, checkpoint: Option<(&str, &Value)>) -> Result<bool, Error> {
        // Elsewhere the statement would have to name its shard.
        if self.shared.spread != Spread::Together || self.over.is_cancelled() {
            return Ok(false);
        }
        let (run, path) = (self.attempt.run_id, self.attempt.path.as_str());
        let small = match checkpoint {
            None => None,
            Some((_, value)) if is_too_deep(value) => return Ok(false),
            Some((key, value)) => match store::checkpoints::small(run, path, key, value)? {
                Some(small) => Some(small),
                None => return Ok(false),
            },
        };
        let Some(hook) = self.shared.hook.at_once(&self.attempt, reading) else { return Ok(false) };
        match reading.phase {
            Phase::Open => crash_point("open.after_fence"),
            Phase::Close => crash_point("meter.after_fence"),
            Phase::Note => {}
        }
        let ask = async |conn: &mut PgConnection| {
            store::checkpoints::at_once(conn, run, self.epoch, hook, small.as_ref()).await
        };
        self.shared.calls.ask(ask).await
    }

    async fn save_once(&self, key: &str, value: &Value) -> Result<(), Error> {
        Self::limit(value)?;
        let mut tx = transaction::begin(&self.shared.pool).await?;
        if !self.counts(&mut tx).await? {
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
        let reading = Reading { key, phase: Phase::Open, current: true, body: reading };
        if self.at_once(&reading, None).await? {
            crash_point("open.after_commit");
            return Ok(());
        }
        let mut tx = transaction::begin(&self.shared.pool).await?;
        if !self.counts(&mut tx).await? {
            return Err(Error::LeaseLost);
        }
        crash_point("open.after_fence");
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

    /// Without the fence, whose lock the stream of an answer would share with everything that the run does: the hook changes
    /// nothing of a call that is closed.
    async fn note_once(&self, key: &str, reading: &Value) -> Result<(), Error> {
        let reading = Reading { key, phase: Phase::Note, current: true, body: reading };
        crash_point("note.before_write");
        let ask =
            async |conn: &mut PgConnection| self.shared.hook.meter(conn, &self.attempt, reading).await.map_err(of_hook);
        self.shared.calls.ask(ask).await.map(drop)
    }

    async fn close_once(&self, key: &str, reading: &Value, checkpoint: Option<(&str, &Value)>) -> Result<(), Error> {
        let ordinary = Reading { key, phase: Phase::Close, current: true, body: reading };
        if self.at_once(&ordinary, checkpoint).await? {
            crash_point("meter.after_commit");
            return Ok(());
        }
        // What cannot be kept was consumed all the same.
        let fits = checkpoint.map_or(Ok(()), |(_, value)| Self::limit(value));
        let mut tx = transaction::begin(&self.shared.pool).await?;
        let owned = self.counts(&mut tx).await?;
        // The reading is a fact about the outside: it is stored even when the attempt is stale. Its result is not,
        // and the hook is told so: nobody should pay for what is thrown away.
        let reading = Reading { key, phase: Phase::Close, current: owned, body: reading };
        crash_point("meter.after_fence");
        self.shared.hook.meter(&mut tx, &self.attempt, reading).await.map_err(of_hook)?;
        crash_point("meter.after_hook");
        if let (true, true, Some((key, value))) = (owned, fits.is_ok(), checkpoint) {
            store::checkpoints::put(&mut tx, self.attempt.run_id, &self.attempt.path, key, value).await?;
        }
        crash_point("meter.before_commit");
        tx.commit().await?;
        crash_point("meter.after_commit");
        if owned { fits } else { Err(Error::LeaseLost) }
    }
}

impl ContextBackend for Backend {
    fn checkpoint<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<Value>, Failure>> {
        Box::pin(self.insist(move || self.read(key)))
    }
    fn save<'a>(&'a self, key: &'a str, value: &'a Value) -> BoxFuture<'a, Result<(), Failure>> {
        self.will_save(key);
        let saved = Arc::new((key.to_owned(), value.clone()));
        Box::pin(self.insist_alone(move |own| {
            let saved = saved.clone();
            async move { own.save_once(&saved.0, &saved.1).await }
        }))
    }
    fn meter_open<'a>(&'a self, key: &'a str, reading: &'a Value) -> BoxFuture<'a, Result<(), Failure>> {
        Box::pin(async move {
            self.outside.begins(key)?;
            let opened = self.insist(|| self.open_once(key, reading)).await;
            if opened.is_err() {
                self.outside.ends(key);
            }
            opened
        })
    }
    fn meter_note<'a>(&'a self, key: &'a str, reading: &'a Value) -> BoxFuture<'a, Result<(), Failure>> {
        Box::pin(self.note_alone(key, reading))
    }
    fn meter_close<'a>(
        &'a self,
        key: &'a str,
        reading: &'a Value,
        checkpoint: Option<(&'a str, &'a Value)>,
    ) -> BoxFuture<'a, Result<(), Failure>> {
        if let Some((key, _)) = checkpoint {
            self.will_save(key);
        }
        let checkpoint = checkpoint.map(|(key, value)| (key.to_owned(), value.clone()));
        let closed = Arc::new((key.to_owned(), reading.clone(), checkpoint));
        Box::pin(async move {
            let stored = self.insist_alone(move |own| {
                let closed = closed.clone();
                async move {
                    let (key, reading, checkpoint) = &*closed;
                    own.close_once(key, reading, checkpoint.as_ref().map(|(key, value)| (key.as_str(), value))).await
                }
            });
            let stored = stored.await;
            self.outside.ends(key);
            stored
        })
    }
    fn heartbeat(&self, progress: Value) {
        self.beat();
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
