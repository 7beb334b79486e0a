//! Answers that were cut at their limit. Each is paid for and brings nothing, so what is known of them is recorded: no attempt begins
//! again with a limit that was too small, and whoever has filled all the room there is twice is not asked a third time.

use super::answer::unreadable;
use crate::orchestrator::route::Candidate;
use loopwright_engine::{Failure, activity::Context};

/// Answers of a call, over all its candidates and attempts, that may be cut with all the room that their model has. Chosen: one may
/// have rambled; two say that the question asks for more than fits.
const FULL_MAX: usize = 2;
/// Answers of a call that are recorded as cut. Chosen: a limit that was too small and all the room, of each of as many as may be asked.
const RECORDED_MAX: usize = 2 * crate::orchestrator::route::CANDIDATES_MAX;

/// An answer that was cut.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub(super) struct Cut {
    pub(super) provider: String,
    pub(super) model: String,
    /// In tokens.
    pub(super) limit: u32,
    /// It had all the room of its model and window.
    pub(super) full: bool,
}

/// What is known of the answers to a question that were cut, in order.
#[derive(Default)]
pub(super) struct Cuts(Vec<Cut>);

impl Cuts {
    /// What former attempts have left.
    pub(super) async fn recorded(ctx: &Context, key: &str) -> Result<Self, Failure> {
        let mut cuts = Self::default();
        while let Some(next) = cuts.next_key(key)
            && let Some(saved) = ctx.checkpoint(&next).await?
        {
            cuts.0.push(serde_json::from_value(saved).map_err(|error| unreadable(key, &error))?);
        }
        Ok(cuts)
    }

    /// Checkpoint of the next one; `None` when enough are recorded.
    pub(super) fn next_key(&self, key: &str) -> Option<String> {
        (self.0.len() < RECORDED_MAX).then(|| format!("call:{key}~cut.{}", self.0.len() + 1))
    }

    pub(super) fn push(&mut self, cut: Cut) {
        self.0.push(cut);
    }

    /// The answer is known to be long: whoever is asked gets all the room at once.
    pub(super) fn is_long(&self) -> bool {
        !self.0.is_empty()
    }

    /// Whether nobody is to be asked any more.
    pub(super) fn are_enough(&self) -> bool {
        self.0.iter().filter(|cut| cut.full).count() >= FULL_MAX
    }

    /// What the call says when nobody is asked any more.
    pub(super) fn failure(&self) -> Failure {
        let most = self.0.iter().map(|cut| cut.limit).max().unwrap_or_default();
        let text = format!(
            "the answer was cut twice with all the room there is, {most} tokens: ask for less at once, or name a model with a larger limit"
        );
        Failure::permanent("model.truncated", text)
    }
}

impl Cut {
    pub(super) fn of(candidate: &Candidate, limit: u32, full: bool) -> Self {
        Self { provider: candidate.provider.clone(), model: candidate.model.clone(), limit, full }
    }
}
