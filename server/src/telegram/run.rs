//! Supervision: one process at a time, back-off after errors, an orderly stop.

use super::{
    Error, Parts, act,
    api::{self, Fault},
    intent::COMMANDS,
    notify, poll, send, stars,
};
use crate::store::telegram::lease::Lease;
use anyhow::Context;
use serde_json::json;
use std::{sync::Arc, time::Duration};
use teloxide::Bot;
use tokio::{
    sync::{Notify, watch},
    time::Instant,
};

/// A session that lived this long counts as recovered.
const RECOVERED: Duration = Duration::from_secs(60);

/// What the loops of one session share.
#[derive(Clone)]
pub(super) struct Session {
    pub parts: Parts,
    pub bot: Bot,
    /// Something is in the inbox.
    pub arrived: Arc<Notify>,
    /// Something is in the outbox.
    pub queued: Arc<Notify>,
    pub stop: watch::Receiver<bool>,
}

impl Session {
    /// Waits for `told`, for the time to look again, or for the stop. True at the stop.
    pub async fn idle(&self, told: &Notify) -> bool {
        let mut stop = self.stop.clone();
        tokio::select! {
            _ = stop.wait_for(|stop| *stop) => true,
            () = told.notified() => false,
            () = tokio::time::sleep(self.parts.pace.look) => false,
        }
    }

    pub fn stopped(&self) -> bool {
        is_stopped(&self.stop)
    }
}

/// Whether to stop. Nobody left to say so means stop as well.
fn is_stopped(stop: &watch::Receiver<bool>) -> bool {
    *stop.borrow() || stop.has_changed().is_err()
}

/// Waits; true if the stop came first.
pub(super) async fn pause(length: Duration, stop: &mut watch::Receiver<bool>) -> bool {
    tokio::select! {
        _ = stop.wait_for(|stop| *stop) => true,
        () = tokio::time::sleep(length) => false,
    }
}

/// Runs the bot until `stop` turns true. Without a token it returns at once.
///
/// Errors are logged and tried again with back-off: a database or a Telegram that is away stops nothing for good. Of
/// several processes one works and the others wait for it to end.
///
/// # Errors
/// The HTTP client cannot be built.
pub async fn run(parts: Parts, mut stop: watch::Receiver<bool>) -> anyhow::Result<()> {
    let Some(bot) = api::bot(&parts.settings).context("the HTTP client of the bot")? else { return Ok(()) };
    let mut failures = 0;
    while !is_stopped(&stop) {
        let started = Instant::now();
        let Err(error) = lead(&parts, &bot, &mut stop).await else { continue };
        failures = if started.elapsed() > RECOVERED { 1 } else { failures + 1 };
        let again = parts.pace.after(failures);
        tracing::warn!(%error, again_ms = again.as_millis(), "the bot was interrupted");
        pause(again, &mut stop).await;
    }
    Ok(())
}

/// Waits for the lease, then works under it.
async fn lead(parts: &Parts, bot: &Bot, stop: &mut watch::Receiver<bool>) -> Result<(), Error> {
    let mut told = false;
    let lease = loop {
        if let Some(lease) = parts.store.bot_lease().await? {
            break lease;
        }
        if !told {
            tracing::info!("another process runs the bot; this one waits");
            told = true;
        }
        if pause(parts.pace.pause, stop).await {
            return Ok(());
        }
    };
    let (lease, ended) = work(parts, bot, lease, stop).await;
    lease.release().await;
    ended
}

async fn work(
    parts: &Parts,
    bot: &Bot,
    mut lease: Lease,
    stop: &mut watch::Receiver<bool>,
) -> (Lease, Result<(), Error>) {
    match greet(parts, bot, stop).await {
        Ok(true) => {}
        Ok(false) => return (lease, Ok(())),
        Err(error) => return (lease, Err(error)),
    }
    let session = Session {
        parts: parts.clone(),
        bot: bot.clone(),
        arrived: Arc::default(),
        queued: Arc::default(),
        stop: stop.clone(),
    };
    let ended = tokio::try_join!(
        poll::run(&session, &mut lease),
        act::run(&session),
        notify::run(&session),
        send::run(&session),
        stars::run(&session),
        upkeep(&session),
    );
    (lease, ended.map(drop))
}

/// Asks who the bot is until Telegram says so, and names its commands. False at the stop.
async fn greet(parts: &Parts, bot: &Bot, stop: &mut watch::Receiver<bool>) -> Result<bool, Error> {
    let mut tries = 0;
    loop {
        let asked = tokio::select! {
            _ = stop.wait_for(|stop| *stop) => return Ok(false),
            asked = api::call(bot, "GetMe", json!({})) => asked,
        };
        tries += 1;
        let length = match asked {
            Ok(me) => {
                tracing::info!(bot = me["username"].as_str().unwrap_or_default(), "the bot is here");
                break;
            }
            Err(Fault::Token) => return Err(Error::Token),
            Err(Fault::Quiet(length)) => length,
            Err(fault) => {
                tracing::warn!(?fault, "Telegram does not answer");
                parts.pace.after(tries)
            }
        };
        if pause(length, stop).await {
            return Ok(false);
        }
    }
    let commands: Vec<_> = COMMANDS.iter().map(|(name, text)| json!({"command": name, "description": text})).collect();
    if let Err(fault) = api::call(bot, "SetMyCommands", json!({ "commands": commands })).await {
        // Only a menu.
        tracing::debug!(?fault, "the menu of commands was not set");
    }
    Ok(true)
}

/// Removes what is old, now and then.
async fn upkeep(session: &Session) -> Result<(), Error> {
    const EVERY: Duration = Duration::from_secs(3600);
    /// Telegram repeats updates for a day; a week is for people who look.
    const UPDATES_DAYS: i32 = 7;
    /// Buttons of a plan must outlive the two weeks that it waits.
    const MESSAGES_DAYS: i32 = 60;
    let mut stop = session.stop.clone();
    loop {
        let store = &session.parts.store;
        store.forget_updates(UPDATES_DAYS).await?;
        store.forget_messages(MESSAGES_DAYS).await?;
        store.expire_orders().await?;
        store.expire_credits().await?;
        if pause(EVERY, &mut stop).await {
            return Ok(());
        }
    }
}
