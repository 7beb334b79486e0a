//! How much a candidate is asked with: its window, as it is known by now, and the limit of its answer.

use super::{
    super::{Question, Request, budget, route::Candidate},
    Orchestrator,
};
use crate::provider::estimate::{request_bytes, request_tokens_max};
use std::sync::PoisonError;

/// Smaller packings of its question that a candidate is asked after it said that the prompt does not fit: the last is less than
/// a fifth of the first.
pub const PACKINGS_MAX: u32 = 3;

impl Orchestrator {
    pub(super) fn window(&self, candidate: &Candidate) -> u64 {
        let windows = self.0.windows.lock().unwrap_or_else(PoisonError::into_inner);
        let learned = windows.get(&(candidate.provider.clone(), candidate.model.clone())).copied();
        learned.map_or(candidate.context_tokens, |learned| learned.min(candidate.context_tokens))
    }

    /// For this model and the life of the process: what a server said of its window, or what it accepted after it had refused more.
    pub(super) fn learn_window(&self, candidate: &Candidate, window: u64) {
        let window = window.max(1).min(self.window(candidate));
        let mut windows = self.0.windows.lock().unwrap_or_else(PoisonError::into_inner);
        windows.insert((candidate.provider.clone(), candidate.model.clone()), window);
    }
}

/// The window to pack a refused question for: what the server `said`, or so much that the prompt loses a quarter, after the first
/// time half, where it did not say or counts more tokens than we do. `None` when nothing smaller can be asked.
pub(super) fn narrower(question: &Question, refused: &Request, limit: u32, said: Option<u64>, first: bool) -> Option<u64> {
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
