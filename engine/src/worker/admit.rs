//! What workers do for runs that are held back: see who may begin. Any worker may; the lock of a group's row says who does.

use super::terminate::close_in;
use crate::{
    Result,
    client::Client,
    ids::RunId,
    machine::Input,
    store::{groups, starts},
    transaction::{answered, in_transaction},
    view::RunStatus,
};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

/// How often a worker forgets groups and rates that nobody uses. A pass takes a hundred of each.
const FORGET_EVERY: Duration = Duration::from_secs(60);
/// How often a worker looks when no run of a group has ended here. A place is empty for that long at most.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// Looks until the worker drains. What Postgres does not answer within `answer_max` is for the next look.
pub(super) async fn keep(client: Client, freed: Arc<Notify>, draining: CancellationToken, answer_max: Duration) {
    let mut forgot = Instant::now();
    loop {
        tokio::select! {
            () = draining.cancelled() => return,
            () = freed.notified() => {}
            () = tokio::time::sleep(LOOK_EVERY.mul_f64(0.75 + fastrand::f64() / 2.0)) => {}
        }
        if let Err(error) = answered(answer_max, pass(&client)).await {
            tracing::warn!(%error, "cannot look after the runs that are held back");
        }
        crate::committer::crash_point("admit.after_pass");
        if forgot.elapsed() >= FORGET_EVERY {
            forgot = Instant::now();
            if let Err(error) = answered(answer_max, groups::forget(client.pool())).await {
                tracing::warn!(%error, "cannot forget groups that nobody uses");
            }
        }
    }
}

/// One pass: cancels those who must make room, ends those who were cancelled or whose time was over while they waited, lets in who
/// may. What cannot be done now is logged, and holds up no other run and no other group.
///
/// # Errors
/// `database`, if it cannot be asked who waits. What was done stays done; the next pass does the rest.
async fn pass(client: &Client) -> Result<()> {
    let pool = client.pool();
    if !groups::anybody_waits(pool).await? {
        return Ok(());
    }
    let passes = |error: &crate::Error| tracing::warn!(%error, "runs that wait for a place are looked at again soon");
    if let Err(error) = groups::make_room(pool).await {
        passes(&error);
    }
    crate::committer::crash_point("admit.after_room");
    let none = |error: crate::Error| {
        passes(&error);
        0
    };
    let mut admitted = end_those_who_wait_in_vain(client).await.unwrap_or_else(none);
    crate::committer::crash_point("admit.after_ended");
    admitted += groups::let_in_timed(pool).await.unwrap_or_else(none);
    crate::committer::crash_point("admit.after_timed");
    for group in groups::wanted(pool).await? {
        let let_in = in_transaction(pool, |conn| {
            let group = group.clone();
            Box::pin(async move { groups::let_in(conn, &group).await })
        });
        match let_in.await {
            Ok(many) => admitted += many,
            Err(error) => passes(&error),
        }
    }
    crate::committer::crash_point("admit.before_wake");
    if admitted > 0 {
        client.wake().await;
    }
    Ok(())
}

/// Who has begun nothing ends at once: there is nothing to clean up. A fork had begun before it was held back; it is let in, reads that
/// it was cancelled or sees that its own time or its chain's is over, and runs its `finally`. For that it has no place: a cleanup that waits behind others
/// might never come. Returns how many were let in.
async fn end_those_who_wait_in_vain(client: &Client) -> Result<usize> {
    let reason = || "cancelled before there was a place for it".to_owned();
    let mut all: Vec<(RunId, Input)> = Vec::new();
    all.extend(
        groups::cancelled(client.pool()).await?.into_iter().map(|r| (r, Input::Terminated { reason: reason() })),
    );
    all.extend(groups::expired(client.pool()).await?.into_iter().map(|run| (run, Input::Expired)));
    let mut let_in = 0;
    for (run, input) in all {
        let ended = in_transaction(client.pool(), |conn| {
            let (hook, input) = (client.hook().clone(), input.clone());
            Box::pin(async move {
                starts::lock_to_end(conn, run).await?;
                crate::committer::crash_point("vain.after_lock");
                match groups::waits(conn, run).await? {
                    Some(RunStatus::Pending) => close_in(conn, hook.as_ref(), run, input).await.map(|()| false),
                    Some(_) => groups::let_go(conn, run).await,
                    // Whoever was let in since hears of it himself, and cleans up.
                    None => Ok(false),
                }
            })
        });
        crate::committer::crash_point("vain.before_end");
        match ended.await {
            Ok(begins) => let_in += usize::from(begins),
            Err(error) => tracing::warn!(run_id = %run, %error, "a run that waits in vain cannot be ended"),
        }
    }
    Ok(let_in)
}
