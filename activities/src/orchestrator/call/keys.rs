//! Which key serves a candidate now, what a call takes of its budgets per minute, and what an error says of it to everybody.

use super::{
    super::{
        route::Candidate,
        service::{Blocked, Pool, Running, Slot, UNAVAILABLE},
    },
    Choice, Interrupted, Orchestrator,
    answer::Judged,
    failure::{BUDGET_PER_MINUTE, is_passing},
    jittered, milliseconds,
};
use crate::{
    keys::{FORBIDDEN, Grant, KeyRef, Taken, Wait},
    provider::{Advice, ProviderError},
    usage::CallState,
};
use chrono::{DateTime, NaiveTime, TimeZone, Utc};
use loopwright_engine::Failure;
use std::{
    sync::Arc,
    time::{Duration, Instant},
};

/// How long a key rests at least whose quota of the day is used up, and how long where nobody knows when that day ends. Chosen: it
/// costs one refused request in ten minutes.
const DAY_QUOTA_COOLS_FOR: Duration = Duration::from_secs(10 * 60);
/// How long a key rests whose account is empty: soon enough after somebody has topped it up.
const NO_BALANCE_COOLS_FOR: Duration = Duration::from_secs(60 * 60);
/// Longest rest of a key that is believed, whatever a provider says: a week, as for every other wait.
const KEY_RESTS_MAX: Duration = Duration::from_secs(7 * 24 * 3600);
/// Longest rest that an overloaded server is given. Chosen: pages that stand in for a server name any time.
const OVERLOAD_RESTS_MAX: Duration = Duration::from_secs(10 * 60);

/// Why a candidate is not asked now.
pub(super) enum Refused {
    /// It may be after this long.
    Later(Failure, Duration),
    No(Failure),
}

/// A key, and what a call takes of its budgets.
pub(super) struct Admitted {
    pub(super) running: Running,
    pub(super) grants: Vec<Grant>,
}

impl Orchestrator {
    pub(super) fn pool<'a>(&'a self, choice: &'a Choice) -> Option<&'a Pool> {
        match &choice.own {
            Some(lane) => Some(&lane.pool),
            None => self.0.pools.get(choice.candidate.provider.as_str()),
        }
    }

    /// Takes a key that is in service and the call's part of its budgets per minute. Whatever is taken and not used goes back.
    pub(super) async fn admit(&self, pool: &Pool, choice: &Choice, tokens: u64) -> Result<Admitted, Refused> {
        let candidate = &choice.candidate;
        self.0.board.refresh().await;
        let mut skip = Vec::new();
        let mut soonest: Option<Duration> = None;
        loop {
            let running = match pool.take(&self.0.board, &candidate.model, Instant::now(), &skip) {
                Ok(running) => running,
                Err(blocked) => return Err(refused(candidate, blocked, soonest)),
            };
            match self.spend(&running.slot, candidate, tokens).await {
                Ok(grants) => return Ok(Admitted { running, grants }),
                Err(wait) => {
                    soonest = Some(soonest.map_or(wait, |known| known.min(wait)));
                    skip.push(Arc::clone(&running.slot));
                }
            }
        }
    }

    /// What is said of a candidate whose key `asked` has failed in a way that no wait cures: that, unless another key only rests. Else
    /// it would depend on who is asked first whether a run waits or ends.
    pub(super) fn unless_another_key_may(
        &self,
        pool: &Pool,
        candidate: &Candidate,
        asked: &Arc<Slot>,
        failure: Failure,
    ) -> Failure {
        if is_passing(&failure) {
            return failure;
        }
        match pool.take(&self.0.board, &candidate.model, Instant::now(), std::slice::from_ref(asked)) {
            // It has rested long enough by now, or may be tried again.
            Ok(_) => {
                let message = format!("a key for {} was refused; another one is asked next", candidate.provider);
                Failure::retryable(UNAVAILABLE, message).with_retry_after_ms(1)
            }
            Err(blocked) => match refused(candidate, blocked, None) {
                Refused::Later(later, _) => later,
                Refused::No(_) => failure,
            },
        }
    }

    /// A call's part of the budgets per minute of a key of the platform; or how long to wait.
    pub(super) async fn spend(&self, slot: &Slot, candidate: &Candidate, tokens: u64) -> Result<Vec<Grant>, Duration> {
        let (Some(rates), KeyRef::Platform { fingerprint, .. }) = (&self.0.rates, &slot.key) else {
            return Ok(Vec::new());
        };
        let scope = |what: &str| format!("{what} {} {} {fingerprint}", candidate.provider, candidate.model);
        let budgets = [
            ("requests", candidate.requests_per_minute.map(u64::from), 1),
            ("tokens", candidate.tokens_per_minute, tokens),
        ];
        let mut grants = Vec::new();
        for (what, budget, need) in budgets {
            let Some(budget) = budget else { continue };
            match rates.take(&scope(what), budget, need).await {
                Ok(Taken::Granted(grant)) => grants.push(grant),
                Ok(Taken::Wait(wait)) => {
                    for grant in &grants {
                        rates.give_back(grant, 0).await;
                    }
                    return Err(wait);
                }
                // A budget that cannot be asked for must not stop work: the provider still says when it is too much.
                Err(error) => tracing::warn!(%error, "a budget per minute could not be asked for"),
            }
        }
        Ok(grants)
    }

    /// Tells everybody what an error says of its key: how long it is left alone, if it is too much for it; that it is out of
    /// service, if it was refused; that it may not use a model.
    pub(super) async fn remember(&self, slot: &Slot, candidate: &Candidate, error: &ProviderError) -> Option<Duration> {
        let board = &self.0.board;
        let failure = &error.failure;
        match failure.code.as_str() {
            _ if error.advice == Advice::DisableKey => {
                board.disable(&slot.key, failure).await;
                None
            }
            "transient.rate_limited" => {
                let now = board.now().await;
                let rests = error.key_rests_until.and_then(|until| (until - now).to_std().ok());
                let asked = error.retry_after().max(rests).map(|wait| wait.min(KEY_RESTS_MAX));
                // 402 and 403: the budget of running requests, or of a span of time, which is the key's. A limit of requests is
                // the model's.
                if matches!(error.http_status, Some(402 | 403)) {
                    let wait = match error.advice {
                        Advice::OtherKey => asked.unwrap_or(DAY_QUOTA_COOLS_FOR),
                        _ => asked.unwrap_or_else(|| jittered(self.0.pace.backoff)),
                    };
                    return Some(board.cool(&slot.key, wait, failure).await);
                }
                let wait = match (error.advice, asked) {
                    // A quota of the day: the wait that some name beside it is the one of the minute.
                    (Advice::OtherModel | Advice::OtherKey, _) => {
                        let known = rests.or_else(|| day_ends_in(&candidate.provider, now));
                        Wait::Named(asked.max(known).unwrap_or_default().clamp(DAY_QUOTA_COOLS_FOR, KEY_RESTS_MAX))
                    }
                    (_, Some(asked)) => Wait::Named(asked),
                    (_, None) => Wait::Doubling(jittered(self.0.pace.backoff)),
                };
                Some(board.rest(&slot.key, &candidate.model, wait, failure).await)
            }
            // Unwell, and it says until when: nobody asks before. Its other keys lead to the same server.
            "transient.http" => {
                if let Some(asked) = error.retry_after() {
                    let wait = Wait::Named(asked.min(OVERLOAD_RESTS_MAX));
                    board.rest(&slot.key, &candidate.model, wait, failure).await;
                }
                None
            }
            // Not about the key for good: one refusal of one model must not take the key from the others.
            _ if error.advice == Advice::OtherKey
                && matches!(error.http_status, Some(403 | 429))
                && failure.code != "provider.no_balance" =>
            {
                board.forbid(&slot.key, &candidate.model, failure).await;
                None
            }
            // Gemini's prepaid balance does not come back by itself; other accounts fill again.
            "provider.no_balance" if candidate.provider == "gemini" => {
                board.disable(&slot.key, failure).await;
                None
            }
            "provider.no_balance" => {
                board.cool(&slot.key, NO_BALANCE_COOLS_FOR, failure).await;
                None
            }
            _ => None,
        }
    }

    /// Gives back what was not spent: of a usable answer what its prompt was estimated too high; everything if nothing was
    /// sent; the tokens, but not the request, if the server said no. What may have been served stays spent as estimated, and
    /// so does an answer without the required shape.
    pub(super) async fn settle_grants(&self, grants: &[Grant], outcome: &Result<Judged, Interrupted>) {
        let Some(rates) = &self.0.rates else { return };
        let (requests, tokens) = match outcome {
            Ok(Judged::Reply(reply)) => (None, Some(reply.tokens_prompt)),
            Err(Interrupted::Unannounced(_) | Interrupted::Unpriced(_)) => (Some(0), Some(0)),
            Err(Interrupted::Provider(error)) => match unspent(error) {
                Unspent::Nothing => return,
                Unspent::Tokens => (None, Some(0)),
                Unspent::Everything => (Some(0), Some(0)),
            },
            // The reading could not be closed: the request was sent.
            Ok(Judged::Unusable(_) | Judged::Part) | Err(Interrupted::Engine(_)) => return,
        };
        for grant in grants {
            let spent = if grant.scope.starts_with("tokens ") { tokens } else { requests };
            if let Some(spent) = spent {
                rates.give_back(grant, spent).await;
            }
        }
    }
}

/// How long the day lasts by which a provider counts its quotas; `None` where nobody knows.
fn day_ends_in(provider: &str, now: DateTime<Utc>) -> Option<Duration> {
    match provider {
        // Midnight Pacific time.
        "gemini" => until_midnight(now, chrono_tz::America::Los_Angeles),
        "openrouter" => until_midnight(now, Utc),
        _ => None,
    }
}

fn until_midnight<Z: TimeZone>(now: DateTime<Utc>, zone: Z) -> Option<Duration> {
    let tomorrow = now.with_timezone(&zone).date_naive().succ_opt()?.and_time(NaiveTime::MIN);
    (zone.from_local_datetime(&tomorrow).earliest()?.with_timezone(&Utc) - now).to_std().ok()
}

/// What a failed request took of the budgets per minute only on paper.
enum Unspent {
    Nothing,
    Tokens,
    Everything,
}

/// What of a failed request can be given back.
fn unspent(error: &ProviderError) -> Unspent {
    match (error.state, error.usage.as_deref(), error.http_status) {
        // A status of success is an answer that was served and could not be used.
        (CallState::Failed, None, Some(status)) if status >= 300 => Unspent::Tokens,
        // The connection was not made: only then is there neither a status nor a doubt.
        (CallState::Failed, None, None) if error.failure.code == "transient.network" => Unspent::Everything,
        _ => Unspent::Nothing,
    }
}

/// Why no key of a candidate can be used, and whether waiting helps. `budget`: the soonest wait for a budget per minute.
fn refused(candidate: &Candidate, blocked: Blocked, budget: Option<Duration>) -> Refused {
    let provider = &candidate.provider;
    let (code, wait) = match (blocked, budget) {
        (Blocked::Wait { code, wait }, Some(soonest)) if wait < soonest => (code, wait),
        (_, Some(soonest)) => (BUDGET_PER_MINUTE, soonest),
        (Blocked::Wait { code, wait }, None) => (code, wait),
        (Blocked::Out { said: Some(failure), .. }, None) => return Refused::No(failure),
        // Another worker has heard it.
        (Blocked::Out { said: None, reason }, None) if reason == FORBIDDEN => {
            let message = format!(
                "no key for {provider} may use {}: allow it there, or use another model; each is asked again within ten minutes",
                candidate.model
            );
            return Refused::No(Failure::permanent(FORBIDDEN, message));
        }
        (Blocked::Out { said: None, reason }, None) => {
            let code = if reason.starts_with("provider.") { reason } else { "provider.key_disabled".to_owned() };
            let message = format!(
                "no key for {provider} is in service: replace it, or see `loopwright api-keys list` and enable it again"
            );
            return Refused::No(Failure::permanent(code, message));
        }
    };
    let message = match code {
        BUDGET_PER_MINUTE => format!("the budget per minute of {provider} {} is used up", candidate.model),
        UNAVAILABLE => format!("{provider} is out of service after repeated failures and is asked again soon"),
        _ => format!("{provider}: every key has to wait"),
    };
    Refused::Later(Failure::retryable(code, message).with_retry_after_ms(milliseconds(wait).max(1)), wait)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_day_ends_where_its_provider_counts_it() {
        let hours = |provider: &str, now: &str| {
            day_ends_in(provider, now.parse().unwrap()).map(|wait| wait.as_secs_f64() / 3_600.0)
        };
        // Winter, summer, and the day that is an hour longer.
        assert_eq!(hours("gemini", "2026-12-01T07:00:00Z"), Some(1.0));
        assert_eq!(hours("gemini", "2026-07-01T07:00:00Z"), Some(24.0));
        assert_eq!(hours("gemini", "2026-11-01T07:00:00Z"), Some(25.0));
        assert_eq!(hours("openrouter", "2026-12-01T21:30:00Z"), Some(2.5));
        assert_eq!(hours("openai_compatible", "2026-12-01T21:30:00Z"), None);
    }
}
