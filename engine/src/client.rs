//! The one door in: everything that asks something of a run comes through here.

mod archive;
mod fork;
mod migrate;
mod pause;
mod payload;
mod query;
mod start;
mod update;

pub use crate::request::{Deploy, Deployed, Filter, Signal, Start, Started, Version};
pub use archive::Export;
pub use fork::{At, Fork, Reset};
pub use migrate::{Migrate, MigrationOutcome, MigrationReport};
pub use pause::Why;
pub use payload::{Resealed, Sealed};
pub use update::Update;

use crate::{
    Error, Result,
    definition::inputs::{DEPTH_MAX, is_too_deep},
    hook::TransitionHook,
    ids::{DefinitionHash, RunId},
    machine,
    store::{
        self,
        inbox::{Kind as Message, Outgoing, Sent},
        runs::Standing,
    },
    transaction::{ANSWER_MAX, Work, answered, ask, in_transaction_within},
    view::{Chain, HistoryRow, RunSummary, RunView, Waiting},
};
use chrono::{DateTime, Utc};
use serde_json::{Value, json};
use sqlx::{PgConnection, PgPool};
use std::{collections::BTreeSet, sync::Arc, time::Duration};

/// The decision of an approval.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    Approved,
    Rejected,
    ChangesRequested,
}

impl Decision {
    /// As in payloads.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Approved => "approved",
            Self::Rejected => "rejected",
            Self::ChangesRequested => "changes_requested",
        }
    }
}

/// Largest payload of a signal, in bytes of JSON.
const PAYLOAD_BYTES_MAX: usize = 256 << 10;
/// Largest attributes of a run, in bytes of JSON.
pub(crate) const ATTRIBUTES_BYTES_MAX: usize = 8 << 10;
/// Longest name of a message, in bytes. What a definition says is shorter.
const NAME_BYTES_MAX: usize = 200;
/// Longest id that somebody gives: of a message, of a run, of himself; in bytes. An index of Postgres holds no more than 2.7 KB.
pub(crate) const ID_BYTES_MAX: usize = 1 << 10;
/// Longest of what an operator asks for that reads or writes as much as there is. Chosen: a dump of a large database.
pub(crate) const LONG_MAX: Duration = Duration::from_secs(3_600);
/// Shortest time in which a run may be told to stop. Chosen: a worker hears of it, and its attempts of that.
const WITHIN_MIN: Duration = Duration::from_secs(1);
/// The longest. Chosen: a cleanup has an hour anyway; more is for what its children need.
const WITHIN_MAX: Duration = Duration::from_secs(24 * 3_600);
/// How often a waiting caller looks.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// The door. Cheap to clone.
#[derive(Clone)]
pub struct Client {
    pool: PgPool,
    hook: Arc<dyn TransitionHook>,
    answer_max: Duration,
}

/// Said of a message that no table can hold.
const NUL: &str = "a text holds a NUL character, which cannot be stored: take it out";

impl Client {
    /// A client over a pool of a migrated database. `hook` must be the workers': [`Self::terminate`] settles through it.
    #[must_use]
    pub fn new(pool: PgPool, hook: Arc<dyn TransitionHook>) -> Self {
        Self { pool, hook, answer_max: ANSWER_MAX }
    }

    /// The same door for a caller that waits for Postgres not as long as 60 s. Whatever is asked here ends then, at the latest after
    /// one more wait of the pool for a connection: with `database`, and nothing was done, or with `in_doubt`.
    #[must_use]
    pub fn waiting(self, answer_max: Duration) -> Self {
        Self { answer_max, ..self }
    }

    pub(crate) fn pool(&self) -> &PgPool {
        &self.pool
    }

    pub(crate) fn hook(&self) -> &Arc<dyn TransitionHook> {
        &self.hook
    }

    /// Asks something that changes nothing.
    pub(crate) async fn ask<T, F>(&self, question: F) -> Result<T>
    where
        F: AsyncFnOnce(&mut PgConnection) -> Result<T>,
    {
        ask(&self.pool, self.answer_max, question).await
    }

    /// Does something once.
    pub(crate) async fn once<T: Send>(&self, work: impl Work<T>) -> Result<T> {
        in_transaction_within(&self.pool, self.answer_max, work).await
    }

    /// Stores a definition, gives it the next version number of its name and moves `current` to it. Its message has 4 KiB at most.
    ///
    /// # Errors
    /// `too_large`.
    /// # Transaction
    /// One. Idempotent by content hash.
    pub async fn deploy(&self, deploy: Deploy) -> Result<Deployed> {
        short_id("the author", deploy.author.as_deref())?;
        short("the message", deploy.message.as_deref().unwrap_or_default(), pause::REASON_BYTES_MAX)?;
        let deploy = Arc::new(deploy);
        self.once(|conn| {
            let deploy = deploy.clone();
            Box::pin(async move { store::definitions::deploy(conn, &deploy).await })
        })
        .await
    }

    /// Versions of a name, newest first, at most 1000.
    pub async fn versions(&self, name: &str) -> Result<Vec<Version>> {
        self.ask(async |conn| store::definitions::versions(conn, name).await).await
    }

    /// Where a pointer (`current`) of a name stands.
    ///
    /// # Errors
    /// `definition_not_found`.
    pub async fn pointer(&self, name: &str, pointer: &str) -> Result<DefinitionHash> {
        self.ask(async |conn| store::definitions::pointer(conn, name, pointer).await).await
    }

    /// Sends a signal that a step of the run's definition takes, an approval's under the id of its step. It is kept until the
    /// run reads it, also when it comes early; only a decision on what does not wait yet counts for nothing: see
    /// [`Self::approve`], which refuses it.
    /// Returns false when its dedupe id was seen before.
    ///
    /// # Errors
    /// `run_not_found`, `run_closed`, `signal_invalid` (the names that there are, or the form's violations), `too_large`,
    /// `too_deep`; `inbox_full` if 1,000 messages wait to be read by the run, or 100 of this name to be taken by a step.
    pub async fn signal(&self, run: RunId, signal: Signal) -> Result<bool> {
        let stored = self.once(|conn| {
            let signal = signal.clone();
            let client = self.clone();
            Box::pin(async move { client.signal_in(conn, run, signal).await })
        });
        let stored = stored.await?;
        crate::committer::crash_point("send.after_commit");
        self.wake().await;
        Ok(stored)
    }

    /// [`Self::signal`] inside the caller's transaction; call [`Self::wake`] after the commit.
    pub async fn signal_in(&self, conn: &mut PgConnection, run: RunId, signal: Signal) -> Result<bool> {
        fits(&signal)?;
        // Again if the run was migrated meanwhile: what was right for its former definition may be wrong for the new one.
        loop {
            let open = match self.open(conn, run).await {
                // It is the next run's by now, or was taken before.
                Err(Error::RunClosed(_)) if self.handed_on(conn, run, signal.dedupe_id.as_deref()).await? => {
                    return Ok(false);
                }
                open => open?,
            };
            crate::committer::crash_point("send.after_open");
            let pinned = store::definitions::load(conn, open.definition).await?;
            let problems = machine::problems(&pinned.definition, &signal.name, &signal.payload, machine::Door::Signal);
            if !problems.is_empty() {
                return Err(Error::SignalInvalid(problems));
            }
            if open.inbox_n >= LOOKED_FROM {
                self.is_room(conn, run, &signal).await?;
                crate::committer::crash_point("send.after_room");
            }
            if let Some(stored) = self.send(conn, run, open.definition, &signal).await? {
                crate::committer::crash_point("send.before_commit");
                return Ok(stored);
            }
        }
    }

    /// Decides the approval that waits at the step with id `step`, in the round that waits when this is called.
    ///
    /// # Errors
    /// `approval_not_waiting` when no such approval waits now, and those of [`Self::signal`]: a comment of more than 256 KiB is
    /// `too_large`.
    pub async fn approve(
        &self,
        run: RunId,
        step: &str,
        decision: Decision,
        comment: Option<String>,
        dedupe_id: Option<String>,
        sender: Option<String>,
    ) -> Result<bool> {
        let payload = json!({ "decision": decision.as_str(), "comment": comment.unwrap_or_default() });
        let signal = Signal { name: step.to_owned(), payload, dedupe_id, sender };
        fits(&signal)?;
        let asked = Arc::new((approvals(&self.describe(run).await?, step)?, signal));
        let stored = self.once(|conn| {
            let (client, asked) = (self.clone(), asked.clone());
            Box::pin(async move {
                let (asked, signal) = &*asked;
                // Nobody commits a transition between this look and the message: what waits by now may be a later round.
                store::migrations::lock(conn, run).await?;
                crate::committer::crash_point("approve.after_lock");
                let view = described(conn, run).await?;
                crate::committer::crash_point("approve.after_look");
                let waits = !approvals(&view, &signal.name)?.is_disjoint(asked);
                let stored = if waits { client.send(conn, run, view.definition, signal).await? } else { None };
                stored.ok_or_else(|| Error::ApprovalNotWaiting(run.to_string(), signal.name.clone()))
            })
        });
        let stored = stored.await?;
        crate::committer::crash_point("approve.after_send");
        self.wake().await;
        Ok(stored)
    }

    /// Asks a run to stop: live attempts are cancelled, `finally` runs. `reason`: at most 4 KiB.
    ///
    /// # Errors
    /// `run_not_found`, `run_closed`, `too_large`; `inbox_full` if 1,000 orders wait to be read: it has been told often enough, or
    /// nobody reads what it is told.
    pub async fn cancel(&self, run: RunId, reason: &str) -> Result<()> {
        self.cancel_until(run, reason, None).await
    }

    /// [`Self::cancel`] of a run that is to have stopped after `within`, from 1 s to 24 h from now by the database's clock: `finally` has
    /// what is left of it, at most its hour, and children have half; what runs then is stopped. Of a run that stops already, or cleans up,
    /// it shortens what is left; it never gives more.
    ///
    /// # Errors
    /// `input_invalid` for a time beyond these bounds, and those of [`Self::cancel`].
    pub async fn cancel_within(&self, run: RunId, reason: &str, within: Duration) -> Result<()> {
        if !(WITHIN_MIN..=WITHIN_MAX).contains(&within) {
            let text = format!(
                "a run is cancelled within {} s to {} h: choose a time between, or terminate it, which is at once",
                WITHIN_MIN.as_secs(),
                WITHIN_MAX.as_secs() / 3_600
            );
            return Err(Error::InputInvalid(vec![text]));
        }
        let now = self.ask(async |conn| store::runs::now(conn).await).await?;
        let left = chrono::Duration::from_std(within).map_err(|e| Error::InputInvalid(vec![e.to_string()]))?;
        self.cancel_until(run, reason, Some(now + left)).await
    }

    async fn cancel_until(&self, run: RunId, reason: &str, until: Option<DateTime<Utc>>) -> Result<()> {
        let why = Why { reason: pause::checked(reason)?, ..Why::default() };
        self.order(run, Message::Cancel, store::inbox::cancel_text(&why.reason, until), &why).await?;
        crate::committer::crash_point("cancel.after_send");
        self.wake().await;
        Ok(())
    }

    /// Sends an order; call [`Self::wake`] afterwards. False if its dedupe id was seen before.
    async fn order(&self, run: RunId, kind: Message, payload: Value, why: &Why) -> Result<bool> {
        why.fits()?;
        let shared = Arc::new((payload, why.clone()));
        let stored = self.once(|conn| {
            let (client, shared) = (self.clone(), shared.clone());
            Box::pin(async move {
                let (payload, why) = &*shared;
                let message = Outgoing {
                    run,
                    kind,
                    name: "",
                    payload,
                    dedupe_id: why.dedupe_id.as_deref(),
                    sender: why.by.as_deref(),
                    definition: None,
                    unread_max: Some(store::inbox::ORDERS_MAX),
                };
                match store::inbox::send(conn, &message).await? {
                    Sent::Stored => Ok(true),
                    Sent::Duplicate => Ok(false),
                    Sent::Full => Err(full(run, "orders (cancel, pause, resume)", store::inbox::ORDERS_MAX)),
                    Sent::NoOpenRun => Err(client.refusal(conn, run).await),
                }
            })
        });
        stored.await
    }

    /// Ends a run at once, without `finally`. Its attempts are closed as cancelled and settled. `reason`: at most 4 KiB.
    ///
    /// # Errors
    /// `run_not_found`, `run_closed`, `too_large`; `lease_lost` if it moved meanwhile: call again.
    pub async fn terminate(&self, run: RunId, reason: &str) -> Result<()> {
        let reason = pause::checked(reason)?;
        self.ask(async |conn| self.open(conn, run).await).await?;
        crate::worker::terminate(self, run, &reason).await
    }

    /// Wakes the open runs whose attributes match; those that wait as blocked try again. Runs inside the caller's
    /// transaction, for example the one that grants credits. Returns how many; call [`Self::wake`] after the commit.
    pub async fn unblock_in(&self, conn: &mut PgConnection, attributes: &Value) -> Result<u64> {
        store::inbox::unblock(conn, attributes).await
    }

    /// Takes the oldest transitions of a topic out of the outbox, at most `limit`, inside the caller's transaction: rolled back, they are
    /// there again. Returns the runs that have moved. Others who ask at the same time get others.
    pub async fn moved_in(&self, conn: &mut PgConnection, topic: &str, limit: u32) -> Result<BTreeSet<RunId>> {
        store::outbox::take(conn, topic, limit).await
    }

    /// Wakes the oldest `limit` runs whose attributes match and that are parked for one of `reasons`, the words of a hook's
    /// refusals: when somebody gives back a little of what many wait for. Returns how many.
    ///
    /// # Transaction
    /// One; locks the runs.
    pub async fn unblock_waiting(&self, attributes: &Value, reasons: &[&str], limit: u32) -> Result<u64> {
        let reasons: Vec<String> = reasons.iter().map(|reason| (*reason).to_owned()).collect();
        let shared = Arc::new((attributes.clone(), reasons));
        let woken = self.once(|conn| {
            let shared = shared.clone();
            Box::pin(async move {
                let woken = store::inbox::unblock_waiting(conn, &shared.0, &shared.1, limit).await?;
                crate::committer::crash_point("unblock.before_commit");
                Ok(woken)
            })
        });
        let woken = woken.await?;
        crate::committer::crash_point("unblock.after_commit");
        if woken > 0 {
            self.wake().await;
        }
        Ok(woken)
    }

    /// Tells workers of all processes to look for due runs now. Best effort: they look by themselves soon.
    pub async fn wake(&self) {
        store::wake(&self.pool).await;
    }

    /// A run, folded from its history.
    ///
    /// # Errors
    /// `run_not_found`.
    pub async fn describe(&self, run: RunId) -> Result<RunView> {
        self.ask(async |conn| described(conn, run).await).await
    }

    /// Transitions with `seq > after`, in order, at most `limit` (1000).
    ///
    /// # Errors
    /// `run_not_found`, `run_archived`: an empty page is the end of a run that is there.
    pub async fn history(&self, run: RunId, after: u64, limit: u32) -> Result<Vec<HistoryRow>> {
        self.ask(async |conn| {
            let page = store::history::page(conn, run, after, limit).await?;
            if page.is_empty() {
                store::runs::standing(conn, run).await?;
            }
            Ok(page)
        })
        .await
    }

    /// Runs that match, newest first.
    ///
    /// # Errors
    /// `filter_invalid` if finding them takes more than 10 s.
    pub async fn list(&self, filter: Filter) -> Result<Vec<RunSummary>> {
        answered(self.answer_max, store::runs::list(&self.pool, &filter)).await
    }

    /// How many runs match, whatever `after` and `limit` are.
    ///
    /// # Errors
    /// `filter_invalid` if counting them takes more than 10 s.
    pub async fn count(&self, filter: &Filter) -> Result<u64> {
        answered(self.answer_max, store::runs::count(&self.pool, filter)).await
    }

    /// Waits until the run has more than `seq` transitions, or `timeout` is over. Returns its newest seq.
    ///
    /// # Errors
    /// `run_not_found`.
    pub async fn wait_change(&self, run: RunId, seq: u64, timeout: Duration) -> Result<u64> {
        let until = tokio::time::Instant::now() + timeout;
        loop {
            let newest = self.ask(async |conn| store::runs::newest(conn, run).await).await?;
            let now = tokio::time::Instant::now();
            if newest > seq || now >= until {
                return Ok(newest);
            }
            tokio::time::sleep(LOOK_EVERY.min(until - now)).await;
        }
    }

    /// The open run under a business key.
    pub async fn open_run(&self, workflow_id: &str) -> Result<Option<RunId>> {
        self.ask(async |conn| store::starts::holder(conn, workflow_id).await).await
    }

    /// What to say of a run whose rows are not all there: it may have been retired between two statements.
    pub(crate) async fn unless_gone(&self, run: RunId, found: Error) -> Error {
        let asked = async |conn: &mut PgConnection| Ok(store::retention::unless_gone(conn, run, found).await);
        self.ask(asked).await.unwrap_or_else(|error| error)
    }

    /// What a run that is open is.
    async fn open(&self, conn: &mut PgConnection, run: RunId) -> Result<Standing> {
        let standing = store::runs::standing(conn, run).await?;
        match standing {
            _ if standing.status.is_closed() => Err(closed(run, &standing.chain)),
            _ if standing.imported => Err(Error::RunImported(run.to_string())),
            _ => Ok(standing),
        }
    }

    /// Whether a run that has continued as new was sent a message under this id.
    async fn handed_on(&self, conn: &mut PgConnection, run: RunId, dedupe_id: Option<&str>) -> Result<bool> {
        match dedupe_id {
            Some(id) if store::runs::standing(conn, run).await?.chain.continued_as.is_some() => {
                store::inbox::knows(conn, run, id).await
            }
            _ => Ok(false),
        }
    }

    /// Whether a run that was sent many messages will keep another one of this name. Locks the run's row until the end of the transaction:
    /// nothing is read or taken between this look and the message.
    ///
    /// # Errors
    /// `inbox_full`.
    async fn is_room(&self, conn: &mut PgConnection, run: RunId, signal: &Signal) -> Result<()> {
        store::migrations::lock(conn, run).await?;
        crate::committer::crash_point("send.after_lock");
        if let Some(id) = &signal.dedupe_id
            && store::inbox::knows(conn, run, id).await?
        {
            return Ok(());
        }
        let loaded = match store::runs::load(conn, run).await {
            Err(error @ Error::Sql(_)) => return Err(error),
            // This process cannot read it (it is broken, of a newer release, under another key): that is no matter of the sender's.
            Err(_) => return Ok(()),
            Ok(loaded) => loaded,
        };
        let kept = loaded.state.mailbox.iter().filter(|message| message.name == signal.name).count();
        let unread = store::inbox::unread_of(conn, run, loaded.inbox_seen, &signal.name, KEPT_MAX).await?;
        if i64::try_from(kept).unwrap_or(KEPT_MAX) + unread < KEPT_MAX {
            return Ok(());
        }
        Err(full(run, "messages of this name", KEPT_MAX))
    }

    /// `None`: the run does not have that definition any more.
    async fn send(
        &self,
        conn: &mut PgConnection,
        run: RunId,
        definition: DefinitionHash,
        signal: &Signal,
    ) -> Result<Option<bool>> {
        if crate::archive::check::has_nul(&signal.payload) || signal.name.contains('\0') {
            return Err(Error::SignalInvalid(vec![NUL.into()]));
        }
        let message = Outgoing {
            run,
            kind: Message::Signal,
            name: &signal.name,
            payload: &signal.payload,
            dedupe_id: signal.dedupe_id.as_deref(),
            sender: signal.sender.as_deref(),
            definition: Some(definition),
            unread_max: Some(store::inbox::UNREAD_MAX),
        };
        match store::inbox::send(conn, &message).await? {
            Sent::Stored => Ok(Some(true)),
            Sent::Duplicate => Ok(Some(false)),
            Sent::Full => Err(full(run, MESSAGES, store::inbox::UNREAD_MAX)),
            Sent::NoOpenRun if self.handed_on(conn, run, signal.dedupe_id.as_deref()).await? => Ok(Some(false)),
            Sent::NoOpenRun => self.open(conn, run).await.map(|_| None),
        }
    }

    /// Why a run takes no message.
    async fn refusal(&self, conn: &mut PgConnection, run: RunId) -> Error {
        match self.open(conn, run).await {
            Ok(_) => Error::RunClosed(run.to_string()),
            Err(error) => error,
        }
    }
}

/// The paths at which approvals of this step wait.
fn approvals(view: &RunView, step: &str) -> Result<BTreeSet<String>> {
    if view.status.is_closed() {
        return Err(closed(view.run_id, &view.chain));
    }
    let of_step = |w: &Waiting| match w {
        Waiting::Approval { path, step: s, .. } if s == step => Some(path.clone()),
        _ => None,
    };
    let paths: BTreeSet<String> = view.waiting.iter().filter_map(of_step).collect();
    if paths.is_empty() {
        return Err(Error::ApprovalNotWaiting(view.run_id.to_string(), step.to_owned()));
    }
    Ok(paths)
}

/// A run, folded from its history.
async fn described(conn: &mut PgConnection, run: RunId) -> Result<RunView> {
    let loaded = store::runs::load(conn, run).await?;
    let pinned = store::definitions::load(conn, loaded.definition).await?;
    let open = !loaded.status.is_closed();
    let held = match open {
        true => match store::groups::held(conn, run).await? {
            None if loaded.owner.is_none() => store::workers::wanted(conn, run, &loaded.queue).await?,
            held => held,
        },
        false => None,
    };
    let mut live = machine::live_attempts(&loaded.state);
    if !live.is_empty() {
        let progress = store::checkpoints::progress_of(conn, run).await?;
        for attempt in &mut live {
            let newest =
                progress.iter().find(|(path, n, _)| *path == attempt.path && u32::try_from(*n) == Ok(attempt.attempt));
            if let Some((_, _, value)) = newest {
                attempt.progress = value.clone();
            }
        }
    }
    Ok(RunView {
        held,
        run_id: run,
        workflow: loaded.workflow,
        definition: loaded.definition,
        workflow_id: loaded.workflow_id,
        status: loaded.status,
        seq: u64::try_from(loaded.seq).unwrap_or(0),
        attributes: loaded.attributes,
        inputs: loaded.inputs,
        started_at: loaded.started_at,
        closed_at: loaded.closed_at,
        output: loaded.output,
        failure: loaded.failure.and_then(|f| serde_json::from_value(f).ok()),
        waiting: machine::waiting(&pinned.definition, &loaded.state),
        live,
        nodes: machine::nodes(&pinned.definition, &loaded.state),
        forked_from: loaded.forked_from,
        chain: loaded.chain,
        imported_at: loaded.imported_at,
        unread: u64::try_from(loaded.inbox_n - loaded.inbox_seen).unwrap_or(0),
    })
}

/// Names the run that goes on in its place, if one does.
pub(crate) fn closed(run: RunId, chain: &Chain) -> Error {
    Error::RunClosed(match chain.continued_as {
        Some(next) => format!("{run} (run {next} goes on in its place)"),
        None => run.to_string(),
    })
}

/// Messages of one name that a run keeps until a step takes them.
const KEPT_MAX: i64 = machine::MAILBOX_MAX as i64;
/// Messages of any name from which on a sender looks whether there is room. Half: those who send at the same time do not see each other.
const LOOKED_FROM: i64 = KEPT_MAX / 2;
/// What signals and updates are together, as [`Error::InboxFull`] says it.
const MESSAGES: &str = "messages (signals and updates)";

fn full(run: RunId, what: &'static str, limit: i64) -> Error {
    Error::InboxFull { run: run.to_string(), what, limit }
}

/// # Errors
/// `too_large`.
pub(crate) fn short(what: &'static str, text: &str, limit: usize) -> Result<()> {
    if text.len() > limit { Err(Error::TooLarge { what, actual: text.len(), limit }) } else { Ok(()) }
}

/// The same of an id that may be given.
pub(crate) fn short_id(what: &'static str, id: Option<&str>) -> Result<()> {
    id.map_or(Ok(()), |id| short(what, id, ID_BYTES_MAX))
}

/// # Errors
/// `too_large`, `too_deep`: whatever becomes of it, it is stored as it is.
fn fits(message: &Signal) -> Result<()> {
    short("the message's name", &message.name, NAME_BYTES_MAX)?;
    short_id("the message's id", message.dedupe_id.as_deref())?;
    short_id("the sender", message.sender.as_deref())?;
    let size = json_len(&message.payload);
    if size > PAYLOAD_BYTES_MAX {
        return Err(Error::TooLarge { what: "the payload", actual: size, limit: PAYLOAD_BYTES_MAX });
    }
    shallow("the payload", &message.payload)
}

/// # Errors
/// `too_deep`: once stored it could not be read again.
pub(crate) fn shallow(what: &'static str, value: &Value) -> Result<()> {
    if is_too_deep(value) { Err(Error::TooDeep { what, limit: DEPTH_MAX }) } else { Ok(()) }
}

pub(crate) fn json_len(value: &Value) -> usize {
    serde_json::to_string(value).map_or(usize::MAX, |t| t.len())
}
