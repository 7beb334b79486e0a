//! Ends a run at once: takes it over, closes its attempts, settles them.

use crate::{
    Error, Result,
    event::{Event, Outcome, format_of},
    hook::{AttemptEnd, AttemptRef, HookError, TransitionHook},
    ids::RunId,
    machine::{self, Command, Input, Moment},
    payload::{self, Slot},
    store::{
        self,
        transitions::{self, Effects, Item, Undone, Verdict, child_result},
    },
    transaction::in_transaction,
};
use sqlx::PgConnection;
use std::{cell::Cell, collections::BTreeMap, sync::Arc};

/// Closes a run at an operator's wish: takes it over, closes its attempts, settles them, ends it.
pub(crate) async fn terminate(
    pool: &sqlx::PgPool,
    hook: Arc<dyn TransitionHook>,
    run: RunId,
    reason: &str,
) -> Result<()> {
    let mut conn = pool.acquire().await?;
    // By itself: whoever owns the run is fenced off, also if we die before it is ended.
    let item = Arc::new(closing(&mut conn, run, Input::Terminated { reason: reason.to_owned() }).await?);
    drop(conn);
    crate::committer::crash_point("terminate.before_commit");
    let ended = in_transaction(pool, |conn| {
        let (item, hook) = (item.clone(), hook.clone());
        Box::pin(async move { end(conn, hook.as_ref(), &item).await })
    })
    .await;
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
    let item = closing(&mut *conn, run, input).await?;
    end(conn, hook, &item).await
}

/// Writes the last transition of a run and what it does to others.
async fn end(conn: &mut PgConnection, hook: &dyn TransitionHook, item: &Item) -> Result<()> {
    let items = [item];
    transitions::lock(conn, None, &items).await?;
    let verdicts = transitions::send(&mut *conn, Some(item.run_id.shard()), &items).await?;
    match verdicts[..] {
        [Verdict::Accepted { .. }] => {}
        // An earlier sending had succeeded and its answer was lost.
        [Verdict::Stale { epoch, seq }] if epoch == item.epoch && seq == item.seq + 1 => return Ok(()),
        _ => return Err(Error::LeaseLost),
    }
    match transitions::apply_effects(conn, &items, &verdicts, hook).await {
        // Nothing starts, so nothing is refused.
        Ok(_) => Ok(()),
        Err(Undone::Left(error)) => Err(error),
        Err(Undone::Hook(HookError::Sql(error))) => Err(Error::Sql(error)),
        Err(Undone::Hook(HookError::Invariant(text))) => Err(Error::Invariant(text)),
    }
}

/// Takes the run from whoever owns it; its last transition, ready to be committed.
async fn closing(conn: &mut PgConnection, run: RunId, input: Input) -> Result<Item> {
    // Whoever owns it is fenced off from here on.
    let taken = store::runs::seize(&mut *conn, run).await?;
    crate::committer::crash_point("terminate.after_seize");
    let loaded = store::runs::load(&mut *conn, run).await?;
    if !taken {
        return Err(crate::client::closed(run, &loaded.chain));
    }
    let pinned = store::definitions::load(&mut *conn, loaded.definition).await?;
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
            Command::CancelChild { run_id } => effects.cancelled_children.push(*run_id),
            Command::TerminateChild { run_id } => effects.terminated_children.push(*run_id),
            Command::StartAttempt { .. } | Command::CancelAttempt { .. } | Command::StartChild { .. } => {}
        }
    }
    let seq = loaded.seq + 1;
    let mut large = Vec::new();
    let events = payload::pack(run, Slot::Events { seq }, &decision.events, &mut large)?;
    let failure = state.failure.as_ref().map(|f| payload::pack(run, Slot::Failure, f, &mut large)).transpose()?;
    let cursor = payload::pack_known(conn, run, Slot::Cursor { seq }, &state, &large).await?;
    store::blobs::put(conn, &large).await?;
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
