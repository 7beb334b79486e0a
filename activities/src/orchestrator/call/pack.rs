//! How much a candidate is asked with: its window, as it is known by now, and the limit of its answer.

use super::{
    super::{Question, Request, budget, route::Candidate},
    Choice, Orchestrator,
};
use crate::provider::estimate::{request_bytes, request_tokens_max};
use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};
use uuid::Uuid;

/// Smaller packings of its question that a candidate is asked after it said that the prompt does not fit: the last is less than
/// a fifth of the first.
pub(super) const PACKINGS_MAX: u32 = 3;
/// Smallest window that is believed, in tokens. Chosen: no model in use has less, and no prompt of ours fits into less.
const WINDOW_MIN: u64 = 1_024;
/// How long a learned window counts. Chosen: a server that was started again with a larger one is found out by one refused prompt an
/// hour, which costs nothing.
const WINDOW_COUNTS_FOR: Duration = Duration::from_secs(60 * 60);
/// Most windows that are remembered: many times the models of an installation. Users name models as they like.
const WINDOWS_MAX: usize = 4_096;

/// Whose model a window is: of a user's keys by the first of them, else the platform's; provider and model.
type Whose = (Option<Uuid>, String, String);

/// Windows that servers named or turned out to have: smaller than we were told. What a user's server says of itself counts for him
/// alone.
#[derive(Default)]
pub(super) struct Windows(Mutex<HashMap<Whose, (u64, Instant)>>);

impl Windows {
    fn get(&self, whose: &Whose, now: Instant) -> Option<u64> {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.get(whose).filter(|(_, since)| now.duration_since(*since) < WINDOW_COUNTS_FOR).map(|(tokens, _)| *tokens)
    }

    fn learn(&self, whose: Whose, tokens: u64, now: Instant) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= WINDOWS_MAX && !known.contains_key(&whose) {
            known.retain(|_, (_, since)| now.duration_since(*since) < WINDOW_COUNTS_FOR);
            if known.len() >= WINDOWS_MAX {
                known.clear();
            }
        }
        known.insert(whose, (tokens, now));
    }
}

impl Orchestrator {
    pub(super) fn window(&self, choice: &Choice) -> u64 {
        let told = choice.candidate.context_tokens;
        self.0.windows.get(&whose(choice), Instant::now()).map_or(told, |learned| learned.min(told))
    }

    /// What a server said of its window, or what it accepted after it had refused more.
    pub(super) fn learn_window(&self, choice: &Choice, window: u64) {
        if window >= WINDOW_MIN {
            self.0.windows.learn(whose(choice), window.min(self.window(choice)), Instant::now());
        }
    }
}

fn whose(choice: &Choice) -> Whose {
    let Choice { candidate, own } = choice;
    (own.as_ref().and_then(|lane| lane.first_key()), candidate.provider.clone(), candidate.model.clone())
}

/// A window that a server has named, if it can be one.
pub(super) fn believable(said: Option<u64>) -> Option<u64> {
    said.filter(|tokens| *tokens >= WINDOW_MIN)
}

/// Most tokens of an answer in this window: in a small one the answer gets at most half.
pub(super) fn answer_max(candidate: &Candidate, window: u64) -> u32 {
    candidate.max_output_tokens.min(u32::try_from(window / 2).unwrap_or(u32::MAX)).max(1)
}

/// The window to pack a refused question for: what the server `said`, or so much that the prompt loses a quarter, after the first
/// time half, where it did not say or counts more tokens than we do. `None` when nothing smaller can be asked.
pub(super) fn narrower(
    question: &Question,
    refused: &Request,
    limit: u32,
    said: Option<u64>,
    first: bool,
) -> Option<u64> {
    let (prompt, limit) = (request_tokens_max(refused), u64::from(limit));
    let prompt = if first { prompt.saturating_mul(3) / 4 } else { prompt / 2 };
    // An answer that may be longer than the prompt gives way with it: many servers count both.
    let guess = budget::window_for(prompt, limit).min(prompt.saturating_mul(2)).max(1);
    let smaller = |window: &u64| {
        // In a small window the answer gets at most half.
        let limit = u32::try_from(limit.min(window / 2)).unwrap_or(u32::MAX).max(1);
        budget::fit(question, *window, limit).is_some_and(|shorter| request_bytes(&shorter) < request_bytes(refused))
    };
    said.into_iter().chain([said.map_or(guess, |said| said.min(guess))]).find(smaller)
}

pub(super) fn output_limit(candidate: &Candidate, asked: u32) -> u32 {
    asked.saturating_add(candidate.thinking_tokens).min(candidate.max_output_tokens).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_learned_window_counts_for_whom_it_was_learned_until_its_time_and_their_number_is_bounded() {
        let windows = Windows::default();
        let now = Instant::now();
        let own = |n: u128| (Some(Uuid::from_u128(n)), "openai_compatible".to_owned(), "m".to_owned());
        let platform = (None, "openai_compatible".to_owned(), "m".to_owned());
        windows.learn(own(1), 4_096, now);
        assert_eq!(
            (windows.get(&own(1), now), windows.get(&own(2), now), windows.get(&platform, now)),
            (Some(4_096), None, None)
        );
        assert_eq!(windows.get(&own(1), now + WINDOW_COUNTS_FOR), None);
        let later = now + WINDOW_COUNTS_FOR;
        for n in 0..2 * WINDOWS_MAX as u128 {
            windows.learn(own(n), 8_192, later);
            assert_eq!(windows.get(&own(n), later), Some(8_192));
        }
        assert!(windows.0.lock().unwrap().len() <= WINDOWS_MAX);
    }
}
