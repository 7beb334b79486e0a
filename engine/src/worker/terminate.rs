//! Ends a run at once: takes it over, closes its attempts, settles them.

use crate::{
    Error, Result,
    client::Client,
    event::{Event, Outcome, format_of},
    hook::{AttemptEnd, AttemptRef, HookError, TransitionHook},
    ids::RunId,
    machine::{self, Command, Input, Moment},
    payload::{self, Slot},
    store::{
        self,
        definitions::Pinned,
        runs::Loaded,
        transitions::{self, Effects, Item, Undone, Verdict, child_result},
    },
    view::RunStatus,
};
use sqlx::PgConnection;
use std::{cell::Cell, collections::BTreeMap, sync::Arc};

/// A message may wake the run between its taking and its end, and a worker claim it: then it is taken once more.
const TRIES: usize = 5;

/// How a run ends at once.
struct Ending {
    item: Item,
    /// Its history does not say which attempts were under way.
    unreadable: bool,
}

/// Closes a run at an operator's wish: takes it over, closes its attempts, settles them, ends it. A run that is broken, or whose
/// definition is, ends as well: its open children are cancelled, and the hook gives up what it has open for it.
pub(crate) async fn terminate(client: &Client, run: RunId, reason: &str) -> Result<()> {
    let mut tries = 1;
    loop {
        match once(client, run, reason).await {
            Err(Error::LeaseLost) if tries < TRIES => tries += 1,
            ended => return ended,
        }
    }
}

async fn once(client: &Client, run: RunId, reason: &str) -> Result<()> {
    // By itself: whoever owns the run is fenced off, also if we die before it is ended.
    let input = Input::Terminated { reason: reason.to_owned() };
    let ending = Arc::new(client.ask(async |conn| closing(conn, run, input).await).await?);
    crate::committer::crash_point("terminate.before_commit");
    let ended = client.once(|conn| {
        let (ending, hook) = (ending.clone(), client.hook().clone());
        Box::pin(async move { end(conn, hook.as_ref(), &ending).await })
    });
    let ended = ended.await;
    crate::committer::crash_point("terminate.after_commit");
    ended
}

/// [`terminate`] inside the caller's transaction.
pub(crate) async fn terminate_in(
    conn: &mut PgConnection,
    hook: &dyn TransitionHook,
    run: RunId,
    reason: &str,
) -> Result<()> {
    close_in(conn, hook, run, Input::Terminated { reason: reason.to_owned() }).await
}

/// The same by another input that closes a run whatever it does.
pub(crate) async fn close_in(
    conn: &mut PgConnection,
    hook: &dyn TransitionHook,
    run: RunId,
    input: Input,
) -> Result<()> {
    let ending = closing(&mut *conn, run, input).await?;
    crate::committer::crash_point("terminate.before_end");
    end(conn, hook, &ending).await
}

/// Writes the last transition of a run and what it does to others.
async fn end(conn: &mut PgConnection, hook: &dyn TransitionHook, ending: &Ending) -> Result<()> {
    let item = &ending.item;
    let items = [item];
    transitions::lock(conn, None, &items).await?;
    crate::committer::crash_point("terminate.after_lock");
    let verdicts = transitions::send(&mut *conn, Some(item.run_id.shard()), &items).await?;
    crate::committer::crash_point("terminate.after_write");
    match verdicts[..] {
        [Verdict::Accepted { .. }] => {}
        // An earlier sending had succeeded and its answer was lost.
        [Verdict::Stale { epoch, seq }] if epoch == item.epoch && seq == item.seq + 1 => return Ok(()),
        _ => return Err(Error::LeaseLost),
    }
    // Nothing starts, so nothing is refused.
    transitions::apply_effects(conn, &items, &verdicts, hook).await.map_err(undone)?;
    crate::committer::crash_point("terminate.after_effects");
    if ending.unreadable {
        hook.abandon(conn, item.run_id).await.map_err(|error| undone(error.into()))?;
    }
    Ok(())
}

fn undone(why: Undone) -> Error {
    match why {
        Undone::Left(error) => error,
        Undone::Hook(HookError::Sql(error)) => Error::Sql(error),
        Undone::Hook(HookError::Invariant(text)) => Error::Invariant(text),
    }
}

/// Whether the run itself is at fault, or its definition, and no other program or moment would read it.
fn is_broken(error: &Error) -> bool {
    matches!(error, Error::Invariant(_) | Error::PayloadCorrupt(_) | Error::DefinitionInvalid(_))
}

/// A run with the definition that it is pinned to: what its last transition is decided by.
async fn read(conn: &mut PgConnection, run: RunId) -> Result<(Loaded, Pinned)> {
    let loaded = store::runs::load(&mut *conn, run).await?;
    let pinned = store::definitions::load(&mut *conn, loaded.definition).await?;
    Ok((loaded, pinned))
}

/// Takes the run from whoever owns it; its last transition, ready to be committed. Nothing happens if somebody else could read it
/// and this program cannot.
async fn closing(conn: &mut PgConnection, run: RunId, input: Input) -> Result<Ending> {
    // Who lacks its key or is too old for it or for its definition must not take it from those who work on it.
    if let Err(error) = read(&mut *conn, run).await
        && !is_broken(&error)
    {
        return Err(error);
    }
    // Whoever owns it is fenced off from here on.
    let taken = store::runs::seize(&mut *conn, run).await?;
    crate::committer::crash_point("terminate.after_seize");
    let Some(epoch) = taken else {
        return Err(crate::client::closed(run, &store::runs::standing(conn, run).await?.chain));
    };
    let reason = match &input {
        Input::Terminated { reason } => reason.clone(),
        _ => "its time was over".to_owned(),
    };
    let ending = match last(conn, run, input).await {
        Ok(item) => Ending { item, unreadable: false },
        Err(error) if is_broken(&error) => {
            tracing::error!(run_id = %run, %error, "run cannot be read; it is ended as it stands");
            Ending { item: last_of_unreadable(conn, run, &reason).await?, unreadable: true }
        }
        Err(error) => return Err(error),
    };
    // A message may have woken it in between, and a worker claimed it: what that one commits must not be taken for our own.
    if ending.item.epoch == epoch { Ok(ending) } else { Err(Error::LeaseLost) }
}

/// The last transition of a run that cannot be read: its end, and nothing about what was under way. Its open children are cancelled,
/// whatever their calls would have said.
async fn last_of_unreadable(conn: &mut PgConnection, run: RunId, reason: &str) -> Result<Item> {
    let there = store::runs::unreadable(&mut *conn, run).await?;
    let (seq, status) = (there.seq + 1, RunStatus::Terminated);
    let failure = crate::Failure::permanent("cancelled", reason.to_owned());
    let known = there.chain.first.unwrap_or(run);
    let parent = there.parent.map(|parent| (parent, child_result(known, status.as_str(), None, Some(failure.clone()))));
    let closed =
        [Event::RunClosed { status, output: None, failure: Some(failure.clone()), at: store::runs::now(conn).await? }];
    let mut large = Vec::new();
    let events = payload::pack(run, Slot::Events { seq }, &closed, &mut large)?;
    let failure = payload::pack(run, Slot::Failure, &failure, &mut large)?;
    store::blobs::put(conn, &large).await?;
    Ok(Item {
        run_id: run,
        epoch: there.epoch,
        seq: there.seq,
        status: status.as_str(),
        parked: false,
        due: None,
        waiting: None,
        inbox_seen: there.inbox_seen,
        queue: there.queue,
        topic: there.topic,
        cursor: None,
        format: payload::format(&events, format_of(&closed)),
        events,
        output: None,
        failure: Some(failure),
        effects: Effects {
            cancelled_children: there.children.into_iter().map(|child| (child, None)).collect(),
            parent,
            ..Effects::default()
        },
    })
}

/// The last transition of a run, as its state says.
async fn last(conn: &mut PgConnection, run: RunId, input: Input) -> Result<Item> {
    let (loaded, pinned) = read(&mut *conn, run).await?;
    let now = store::runs::now(conn).await?;
    let mut state = loaded.state;
    let (catalog, calls) = (crate::signature::Catalog::default(), BTreeMap::new());
    let moment = Moment {
        now,
        draw: 0,
        permits: Cell::new(0),
        refused: &machine::Refusals::default(),
        catalog: &catalog,
        calls: &calls,
        current: None,
        depth: u32::try_from(loaded.depth).unwrap_or(u32::MAX),
        bounds_calls: true,
        workflow: &pinned.definition.name,
    };
    let decision =
        machine::decide(&pinned.definition, &mut state, input, &moment).map_err(|e| Error::Invariant(e.to_string()))?;
    let attributes = Arc::new(loaded.attributes.clone());
    let budget = Arc::new(pinned.definition.budget.clone());
    let mut effects = Effects::default();
    // A parent knows the first run of a chain.
    let known = loaded.chain.first.unwrap_or(run);
    for event in &decision.events {
        match event {
            // Without a registry every activity may be a metered one; the hook ignores those it never saw.
            Event::AttemptEnded { path, attempt, attempt_id, activity, at, .. } => effects.ended.push(AttemptEnd {
                attempt: AttemptRef {
                    run_id: run,
                    attempt_id: *attempt_id,
                    activity: activity.clone(),
                    path: path.clone(),
                    attempt: *attempt,
                    attributes: attributes.clone(),
                    budget: budget.clone(),
                    deadline: *at,
                },
                outcome: Outcome::Cancelled,
                failure: None,
                again: false,
            }),
            Event::RunClosed { status, output, failure, .. } => {
                effects.parent = loaded.parent.as_ref().map(|(parent, _)| {
                    (*parent, child_result(known, status.as_str(), output.clone(), failure.clone()))
                });
            }
            _ => {}
        }
    }
    for command in &decision.commands {
        match command {
            Command::CancelChild { run_id, until } => effects.cancelled_children.push((*run_id, *until)),
            Command::TerminateChild { run_id } => effects.terminated_children.push(*run_id),
            Command::StartAttempt { .. }
            | Command::CancelAttempt { .. }
            | Command::StartChild { .. }
            | Command::EndChild { .. } => {}
        }
    }
    let seq = loaded.seq + 1;
    let mut large = Vec::new();
    let events = payload::pack(run, Slot::Events { seq }, &decision.events, &mut large)?;
    let failure = state.failure.as_ref().map(|f| payload::pack(run, Slot::Failure, f, &mut large)).transpose()?;
    let cursor = payload::pack_known(conn, run, Slot::Cursor { seq }, &state, &large).await?;
    store::blobs::put(conn, &large).await?;
    crate::committer::crash_point("terminate.after_blobs");
    Ok(Item {
        run_id: run,
        epoch: loaded.epoch,
        seq: loaded.seq,
        status: state.status.as_str(),
        parked: false,
        due: None,
        waiting: None,
        inbox_seen: loaded.inbox_seen,
        queue: loaded.queue,
        topic: loaded.topic,
        cursor: Some(cursor),
        format: payload::format(&events, format_of(&decision.events)),
        events,
        output: None,
        failure,
        effects,
    })
}
