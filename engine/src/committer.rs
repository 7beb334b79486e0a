//! Natural group commit. Runs hand their transitions over; whatever is queued when the previous commit has returned goes
//! out as one batch. No timer: an idle committer costs one commit, a busy one divides a commit among hundreds.
//!
//! ```text
//! drivers ──Item──▶ queue ──drain──▶ batch ──▶ one statement ───────────────▶ verdicts ──▶ drivers
//!                     └── items with effects ──▶ transaction: statement · effects · hook ──▶ ┘
//! ```
//!
//! Where runs are [spread](crate::store::spread) over nodes, there are more lanes, each for some shards, and a batch is divided by shard:
//! one statement or transaction each, in turn. What is queued meanwhile for those shards is the next batch.

use crate::{
    Error,
    hook::{HookError, TransitionHook},
    store::{
        Fault, fault, retry_pause,
        spread::Spread,
        transitions::{self, Item, Undone, Verdict},
    },
    transaction::{Session, answered},
};
use sqlx::PgPool;
use std::{future::Future, io, pin::Pin, sync::Arc, time::Duration};
use tokio::sync::{mpsc, oneshot};

/// Most transitions of one batch. Chosen: beyond it throughput grows little and a refusal gets dearer.
const BATCH_ITEMS_MAX: usize = 256;
/// Most bytes of one batch.
const BATCH_BYTES_MAX: usize = 1 << 20;
/// Lanes of each kind where runs are spread: as many commits may be under way. Chosen: each is a session of Postgres, and each of
/// its batches holds what is queued for sixteen shards.
const LANES: i16 = 8;
/// The part of the wait for an answer that a batch of one shard has, since the other shards of its lane wait as well. Chosen: more
/// than the 15 s after which Postgres ends whoever holds a lock and says nothing.
const SHARD_PART: u32 = 3;
/// Transitions that wait; a full queue slows the runs down instead of filling memory.
const QUEUE_MAX: usize = 4096;

/// Why one transition could not be committed although its fence holds.
#[derive(Debug)]
pub(crate) enum Broken {
    /// Postgres cannot be reached; nothing was written, or it is unknown whether it was.
    Unreachable(Error),
    /// This transition is at fault: an invariant or a constraint.
    Poison(String),
    /// Another worker can commit it, or this one later: it lacks a payload key or rights, or is of another release than the schema.
    /// Nothing was written.
    Left(Error),
}

type Answer = std::result::Result<Verdict, Broken>;
struct Queued(Arc<Item>, oneshot::Sender<Answer>);

/// Hands transitions to the committer. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Committer {
    plain: Arc<[mpsc::Sender<Queued>]>,
    effects: Arc<[mpsc::Sender<Queued>]>,
}

impl Committer {
    /// Starts the lanes. They end when every handle is dropped. A batch without an answer in `answer_max` is sent again on another
    /// session, which is harmless.
    pub(crate) fn start(pool: &PgPool, spread: Spread, hook: &Arc<dyn TransitionHook>, answer_max: Duration) -> Self {
        let lanes = || {
            let one = |_| {
                let (lane_queue, queue) = mpsc::channel(QUEUE_MAX);
                let session = Session::like(pool).waiting(answer_max);
                tokio::spawn(lane(session, spread, hook.clone(), queue));
                lane_queue
            };
            (0..if spread == Spread::Together { 1 } else { LANES }).map(one).collect()
        };
        Self { plain: lanes(), effects: lanes() }
    }

    /// Commits one transition. Shared, because whoever waits for the answer may send it again.
    pub(crate) async fn commit(&self, item: Arc<Item>) -> Answer {
        let lanes = if item.effects.is_empty() { &self.plain } else { &self.effects };
        let lane = &lanes[usize::from(item.run_id.shard().unsigned_abs()) % lanes.len()];
        let (answer, verdict) = oneshot::channel();
        let gone = || Broken::Unreachable(Error::Sql(sqlx::Error::WorkerCrashed));
        lane.send(Queued(item, answer)).await.map_err(|_| gone())?;
        crash_point("commit.after_queued");
        verdict.await.map_err(|_| gone())?
    }
}

async fn lane(mut session: Session, spread: Spread, hook: Arc<dyn TransitionHook>, mut queue: mpsc::Receiver<Queued>) {
    while let Some(first) = queue.recv().await {
        crash_point("commit.after_received");
        let mut bytes = first.0.bytes();
        let mut batch = vec![first];
        while batch.len() < BATCH_ITEMS_MAX && bytes < BATCH_BYTES_MAX {
            let Ok(next) = queue.try_recv() else { break };
            bytes += next.0.bytes();
            batch.push(next);
        }
        // Runs are locked in the order of their shards and ids, by everybody: two batches of two workers may mean the same runs. A
        // batch that tells nobody locks them by its update, which goes along the arrays.
        batch.sort_unstable_by_key(|queued| (queued.0.run_id.shard(), queued.0.run_id));
        for (shard, batch) in spread.divide(batch, |queued| queued.0.run_id.shard()) {
            metrics::histogram!("loopwright_commit_batch_items")
                .record(f64::from(u32::try_from(batch.len()).unwrap_or(0)));
            let (items, answers): (Vec<Arc<Item>>, Vec<_>) =
                batch.into_iter().map(|Queued(item, answer)| (item, answer)).unzip();
            let verdicts = if session.is_quiet(shard) {
                // Its drivers send again; the other shards of this lane do not wait for it.
                let quiet = || Broken::Unreachable(Error::Sql(io::Error::from(io::ErrorKind::TimedOut).into()));
                items.iter().map(|_| Err(quiet())).collect()
            } else {
                commit_batch(&mut session, shard, hook.as_ref(), items, false).await
            };
            crash_point("commit.before_answers");
            for (answer, verdict) in answers.into_iter().zip(verdicts) {
                // A driver that went away does not need its verdict: whoever loads the run next sees it.
                drop(answer.send(verdict));
            }
        }
    }
}

/// Commits a batch, however many sendings that takes: transient errors are sent again, refused and poisonous items are
/// set apart by halving. `anew`: the session is a new one already, for what an old one could not do.
fn commit_batch<'a>(
    session: &'a mut Session,
    shard: Option<i16>,
    hook: &'a dyn TransitionHook,
    items: Vec<Arc<Item>>,
    mut anew: bool,
) -> Pin<Box<dyn Future<Output = Vec<Answer>> + Send + 'a>> {
    Box::pin(async move {
        let mut tries = 0;
        let answer_max = session.answer_max() / if shard.is_some() { SHARD_PART } else { 1 };
        let error = loop {
            let sent = match session.conn().await {
                Ok(_) => answered(answer_max, send(session, shard, hook, &items)).await.map_err(Refusal::of),
                // Whatever it is called: nothing was sent.
                Err(error) => Err(Refusal::Passing(error)),
            };
            match sent {
                Ok(Sent::Done(verdicts)) => return verdicts.into_iter().map(Ok).collect(),
                Ok(Sent::Refused(refused)) => {
                    crash_point("commit.before_rest");
                    return without_refused(session, shard, hook, items, refused).await;
                }
                Err(Refusal::Passing(error)) => {
                    session.leaves(shard, &error);
                    let Some(pause) = retry_pause(tries).filter(|_| !session.is_quiet(shard)) else {
                        // One error for many who wait: of each, what may pass and why.
                        let away = || Broken::Unreachable(Error::Sql(io::Error::other(error.to_string()).into()));
                        return items.iter().map(|_| Err(away())).collect();
                    };
                    tries += 1;
                    tokio::time::sleep(pause).await;
                }
                // The session may have plans of before a migration, or be another one than it was.
                Err(Refusal::Setup(_)) if !anew => {
                    session.leave();
                    anew = true;
                }
                Err(error) => break error,
            }
        };
        if items.len() == 1 {
            return vec![Err(match error {
                Refusal::Passing(error) => Broken::Unreachable(Error::Sql(error)),
                Refusal::Setup(error) => Broken::Left(Error::Sql(error)),
                Refusal::Left(error) => Broken::Left(error),
                Refusal::Poison(text) => Broken::Poison(text),
            })];
        }
        let mut left = items;
        let right = left.split_off(left.len() / 2);
        let mut answers = commit_batch(session, shard, hook, left, anew).await;
        crash_point("commit.between_halves");
        answers.extend(commit_batch(session, shard, hook, right, anew).await);
        answers
    })
}

/// Why a batch was not committed, by what is to be done.
enum Refusal {
    Passing(sqlx::Error),
    Setup(sqlx::Error),
    Left(Error),
    Poison(String),
}

impl Refusal {
    fn of(undone: Undone) -> Self {
        match undone {
            Undone::Left(error) => Self::Left(error),
            Undone::Hook(HookError::Sql(error)) => match fault(&error) {
                Fault::Passing => Self::Passing(error),
                Fault::Setup => Self::Setup(error),
                Fault::Sent => Self::Poison(error.to_string()),
            },
            Undone::Hook(error) => Self::Poison(error.to_string()),
        }
    }
}

enum Sent {
    Done(Vec<Verdict>),
    /// (position, reason, message); everything was rolled back.
    Refused(Vec<(usize, String, String)>),
}

async fn without_refused(
    session: &mut Session,
    shard: Option<i16>,
    hook: &dyn TransitionHook,
    items: Vec<Arc<Item>>,
    refused: Vec<(usize, String, String)>,
) -> Vec<Answer> {
    let mut answers: Vec<Option<Answer>> = items.iter().map(|_| None).collect();
    for (ord, reason, message) in refused {
        if let Some(slot) = answers.get_mut(ord) {
            *slot = Some(Ok(Verdict::Refused { reason, message }));
        }
    }
    let rest: Vec<Arc<Item>> =
        items.into_iter().zip(&answers).filter(|(_, answer)| answer.is_none()).map(|(item, _)| item).collect();
    let mut others =
        if rest.is_empty() { Vec::new() } else { commit_batch(session, shard, hook, rest, false).await }.into_iter();
    answers
        .into_iter()
        .map(|slot| {
            slot.or_else(|| others.next())
                .unwrap_or_else(|| Err(Broken::Poison("a transition without an answer".into())))
        })
        .collect()
}

async fn send(
    session: &mut Session,
    shard: Option<i16>,
    hook: &dyn TransitionHook,
    items: &[Arc<Item>],
) -> std::result::Result<Sent, Undone> {
    if items.iter().all(|i| i.effects.is_empty()) && !transitions::is_several(shard, items) {
        let conn = session.conn().await?;
        crash_point("commit.before_plain");
        let verdicts = transitions::send(conn, shard, items).await.map_err(Undone::of)?;
        crash_point("commit.after_plain");
        return Ok(Sent::Done(verdicts));
    }
    let mut tx = session.begin().await?;
    crash_point("commit.after_begin");
    let spread = if shard.is_none() { Spread::Together } else { Spread::ByShard };
    transitions::lock(&mut tx, Some(spread), items).await.map_err(Undone::of)?;
    crash_point("commit.after_lock");
    let verdicts = transitions::send(&mut tx, shard, items).await.map_err(Undone::of)?;
    crash_point("commit.after_transitions");
    let refused = transitions::apply_effects(&mut tx, items, &verdicts, hook).await?;
    if !refused.is_empty() {
        crash_point("commit.before_rollback");
        tx.rollback().await?;
        crash_point("commit.after_rollback");
        return Ok(Sent::Refused(refused.into_iter().map(|r| (r.ord, r.reason, r.message)).collect()));
    }
    crash_point("commit.before_commit");
    tx.commit().await?;
    crash_point("commit.after_commit");
    Ok(Sent::Done(verdicts))
}

/// A named place at which tests let the process die.
pub(crate) fn crash_point(name: &'static str) {
    #[cfg(feature = "test-util")]
    crate::testing::crash_point(name);
    #[cfg(not(feature = "test-util"))]
    let _ = name;
}
