//! Spoiled answers of a call: one was lost, broke off, or ended without a reason. Whoever owns the key may have paid for each and may
//! again for the next, so few are bought in a long time, and what is known of them is recorded: no attempt asks again too early, in
//! whatever process it runs.

use super::{Choice, failure::is_passing, record::to_value, wait::jittered};
use crate::{
    keys::Board,
    provider::{Advice, ProviderError},
    usage::CallState,
};
use chrono::{DateTime, Utc};
use loopwright_engine::{Failure, activity::Context};
use serde_json::Value;
use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};
use uuid::Uuid;

/// Spoiled answers of a call that do not count, on keys of the platform: what may have been billed is bought again at its cost, so that
/// a provider that spoils each of them for minutes ends no run. Later ones count, so that so many are bought and what the step's policy
/// allows. Chosen: with waits that double ([`wait_after`]), a quarter of an hour or nearly before one counts where one provider is asked,
/// and two of its models.
const UNCOUNTED: u32 = 10;
/// The same on a key that its user has brought, and for whose answers he pays. Chosen: an outage of a minute.
const UNCOUNTED_OWN: u32 = 5;
/// Spoiled answers that are recorded; of later ones the next attempt does not know, and asks whoever is free. Chosen: what a policy of many
/// attempts buys beyond those that do not count.
const RECORDED_MAX: u32 = 32;
/// Longest wait after a spoiled answer, in waits of [`super::Pace::backoff`]: ten minutes, before what chance adds.
const WAIT_MAX: u32 = 600;
/// A recorded rest that is longer than any can be comes from a clock that was wrong (where the database did not tell the time) and is not
/// believed.
const REST_MAX: u32 = WAIT_MAX / 2 * 3;

/// Whose keys were asked: a provider's with the platform's, or the first one of a user's own for a server.
type Keys = (String, Option<Uuid>);

fn keys(choice: &Choice) -> Keys {
    (choice.candidate.provider.clone(), choice.own.as_ref().and_then(|lane| lane.first_key()))
}

/// A spoiled answer as it is recorded.
#[derive(serde::Serialize, serde::Deserialize)]
struct Rest {
    keys: Keys,
    /// Nobody asks there before; by the clock that all workers share.
    until: DateTime<Utc>,
}

/// What is known of the answers to a question that were spoiled.
#[derive(Default)]
pub(super) struct Spoiled {
    /// In all attempts, as far as it matters how many.
    count: u32,
    /// In this attempt; and on a user's own key.
    here: bool,
    own: bool,
    rests: BTreeMap<Keys, Instant>,
}

impl Spoiled {
    /// What former attempts have left.
    pub(super) async fn recorded(ctx: &Context, key: &str, board: &Board, backoff: Duration) -> Result<Self, Failure> {
        let (mut spoiled, mut rests) = (Self::default(), Vec::new());
        while spoiled.count < RECORDED_MAX
            && let Some(saved) = ctx.checkpoint(&checkpoint(key, spoiled.count + 1)).await?
        {
            spoiled.count += 1;
            // A release before this one notes only that there was one.
            rests.extend(serde_json::from_value::<Rest>(saved));
        }
        if !rests.is_empty() {
            let (shared, here) = (board.now().await, Instant::now());
            for Rest { keys, until } in rests {
                let left = (until - shared).to_std().unwrap_or_default();
                spoiled.rests.insert(keys, if left <= backoff * REST_MAX { here + left } else { here });
            }
        }
        Ok(spoiled)
    }

    /// Notes an answer that was spoiled just now, for this attempt, and gives the checkpoint that tells later ones; none when enough are
    /// recorded.
    pub(super) async fn note(
        &mut self,
        key: &str,
        choice: &Choice,
        board: &Board,
        backoff: Duration,
    ) -> Result<Option<(String, Value)>, Failure> {
        self.count += 1;
        self.here = true;
        self.own |= choice.own.is_some();
        let wait = wait_after(backoff, self.count);
        if self.count > RECORDED_MAX {
            self.rests.insert(keys(choice), Instant::now() + wait);
            return Ok(None);
        }
        let rest = Rest { keys: keys(choice), until: board.now().await + wait };
        // Not before the shared clock was read: whoever waits as long as he is told finds that the rest is over.
        self.rests.insert(keys(choice), Instant::now() + wait);
        Ok(Some((checkpoint(key, self.count), to_value(&rest)?)))
    }

    /// How long whoever has spoiled an answer is left alone yet.
    pub(super) fn rest_of(&self, choice: &Choice) -> Option<Duration> {
        let left = self.rests.get(&keys(choice))?.saturating_duration_since(Instant::now());
        (!left.is_zero()).then_some(left)
    }

    /// Whether no more than the first was spoiled, which the same model may make good at once.
    pub(super) fn is_first(&self) -> bool {
        self.count <= 1
    }

    /// Whether so many were spoiled that one more counts as a failed attempt.
    pub(super) fn counts(&self) -> bool {
        self.here && self.count > if self.own { UNCOUNTED_OWN } else { UNCOUNTED }
    }
}

/// Whether its provider may have billed an answer and has spoiled it: it was lost, it broke off, or it ended without a reason. It costs
/// no credits; whoever owns the key may have paid, and may again for the next.
pub(super) fn is_spoiled(error: &ProviderError) -> bool {
    match error.state {
        CallState::Unknown => error.advice != Advice::Stop,
        _ => error.unfinished || (is_passing(&error.failure) && error.usage.is_some()),
    }
}

/// Checkpoint of the `n`-th spoiled answer of a call, from 1 to [`RECORDED_MAX`].
fn checkpoint(key: &str, n: u32) -> String {
    format!("call:{key}~spoiled.{n}")
}

/// How long whoever has spoiled the `n`-th answer of a call, from 1, is left alone behind its attempt: twice as long for each, so that
/// the first is soon made good and few are bought in a long time; and up to three eighths more, by chance.
fn wait_after(backoff: Duration, n: u32) -> Duration {
    let least = backoff * 2_u32.saturating_pow(n).min(WAIT_MAX);
    least + jittered(least / 4)
}
