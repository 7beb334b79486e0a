//! The coordinator: one call of an activity becomes as many requests as it takes, each of them announced before it is
//! sent and closed with what became of it.

mod answer;
mod build;
mod choice;
mod failure;
mod keys;
mod pack;
mod part;
mod request;
mod wait;

pub use wait::Pace;

use super::{
    Question, Reply, budget,
    own::{Own, Owners},
    platform::Sealed,
    route::{Candidate, Routing},
    service::Pool,
    structured::Shape,
};
use crate::{
    keys::{Board, Rates},
    provider::{Advice, estimate::request_tokens_max},
    usage::CallState,
};
use answer::{Judged, Unusable, append_repair, unreadable};
use failure::{BUDGET_PER_MINUTE, is_out, is_passing, named, outward, uncounted, verdict_over};
use keys::Refused;
use loopwright_engine::{Failure, activity::Context, ids::AttemptId};
use pack::{PACKINGS_MAX, narrower, output_limit};
use part::Parts;
use request::Interrupted;
use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};
use wait::{jittered, milliseconds, sleep};

/// Requests to one candidate within a call: the second cures most passing faults, a third is a storm.
pub const TRIES_PER_CANDIDATE: u32 = 2;
/// Attempts of a step of which a lost answer does not count: what may have been billed is bought again at the platform's cost, so
/// that an outage of minutes ends no run. Later ones count, so a question is lost at most so often and as often as the step's
/// policy says. Chosen: with delays that double, two minutes before it counts.
const LOST_UNCOUNTED: u32 = 5;

/// Chooses a model for a role and makes sure that no finished call is bought twice. Cheap to clone.
#[derive(Clone)]
pub struct Orchestrator(Arc<Inner>);

struct Inner {
    routing: Routing,
    pools: BTreeMap<&'static str, Pool>,
    pace: Pace,
    board: Arc<Board>,
    /// Without a database nobody shares a budget.
    rates: Option<Rates>,
    owners: Option<Owners>,
    /// The platform's keys beside those of the environment.
    sealed: Option<Sealed>,
    /// Windows that servers named or turned out to have, by provider and model: smaller than we were told.
    windows: Mutex<BTreeMap<(String, String), u64>>,
    /// Requests that failed calls have made, by attempt and key: an activity that asks again under the same key in the
    /// same attempt must not meter a new request under an old name.
    counts: Mutex<VecDeque<((AttemptId, String), u32)>>,
}

/// A candidate, and whose keys serve it.
#[derive(Clone)]
struct Choice {
    candidate: Candidate,
    own: bool,
}

/// What became of one candidate.
enum Verdict {
    Answered(Reply),
    Next(Failure),
    Stop(Failure),
}

/// What is counted over all candidates of one call.
#[derive(Default)]
struct Progress {
    requests: u32,
    /// What has to be repaired, or could not be.
    unusable: Option<Unusable>,
    /// What there is of an answer that is given in several calls.
    parts: Parts,
    /// A request failed and is billed all the same: to wait for somebody else and ask again would buy it once more.
    billed: bool,
    /// Providers that may have served the question, and the answer was lost.
    lost: Vec<String>,
}

/// The parts of one call that its candidates share.
struct Task<'a> {
    ctx: &'a Context,
    key: &'a str,
    /// Checkpoint of the answer.
    saved: String,
    question: Question,
    shape: Option<Shape>,
    own: Option<Arc<Own>>,
}

impl Orchestrator {
    /// One model call with fallback over the candidates of its role.
    ///
    /// # Shape
    /// `key` names the call inside its step and is stable over attempts: an answer recorded under it is returned and
    /// nothing is bought. Request `k` of attempt `a` is metered as `<key>.a<a>.<k>`; the answer is the checkpoint
    /// `call:<key>`; an answer without the required shape is the checkpoint `call:<key>~unusable.<a>.<n>`, the beginning of one that is
    /// given in several calls `call:<key>~part.<a>.<n>`. A candidate whose window is too small, or that says so, is asked with a smaller
    /// packing of the same question before another one is.
    /// # Errors
    /// The codes that `README.md` lists under "Providers and orchestrator"; a refusal of the hook or the engine as it is.
    /// # Transaction
    /// One for each opened and each closed reading; the last closes the reading and saves the answer together.
    pub async fn call(&self, ctx: &Context, key: &str, question: impl Into<Question> + Send) -> Result<Reply, Failure> {
        self.answer(ctx, key, question.into().in_order()).await
    }

    async fn answer(&self, ctx: &Context, key: &str, question: Question) -> Result<Reply, Failure> {
        let request = &question.request;
        let saved = format!("call:{key}");
        if let Some(recorded) = ctx.checkpoint(&saved).await? {
            return serde_json::from_value(recorded).map_err(|error| unreadable(key, &error));
        }
        let shape = request.output_schema.as_ref().map(Shape::new).transpose()?;
        let own = self.own(ctx.info()).await?;
        self.refresh_keys().await;
        let mut choices = self.usable(ctx, request, own.as_deref());
        if choices.is_empty() {
            return Err(own.map_or_else(|| self.no_candidate(request.role), |own| own.none_for(request.role)));
        }
        let (mut unusable, mut parts) = (None, Parts::default());
        // Only a former attempt can have left one that this one does not know.
        if ctx.info().attempt > 1 {
            parts = Parts::recorded(ctx, key).await?;
            unusable = Unusable::recorded(ctx, key, 1).await?;
            if let (Some(_), Some(second)) = (&unusable, Unusable::recorded(ctx, key, 2).await?) {
                return Err(second.twice());
            }
        }
        if let Some(first) = &unusable {
            choices.sort_by_key(|choice| !first.is_from(&choice.candidate));
        }
        if let Some(part) = parts.newest() {
            choices.sort_by_key(|choice| !part.is_from(&choice.candidate));
        }
        let task = Task { ctx, key, saved, question, shape, own };
        let requests = self.requests_so_far(ctx, key);
        let mut progress = Progress { requests, unusable, parts, ..Progress::default() };
        let outcome = self.ask_all(&task, &choices, &mut progress).await;
        if outcome.is_err() {
            self.count(ctx, key, progress.requests);
        }
        outcome
    }

    async fn ask_all(&self, task: &Task<'_>, choices: &[Choice], progress: &mut Progress) -> Result<Reply, Failure> {
        let mut failures = Vec::new();
        for choice in choices {
            let candidate = &choice.candidate;
            // Who may have billed the question is not asked again within the attempt.
            if progress.lost.contains(&candidate.provider) {
                continue;
            }
            match self.ask(task, choice, progress).await {
                Verdict::Answered(reply) => return Ok(reply),
                Verdict::Stop(failure) => return Err(failure),
                Verdict::Next(failure) => {
                    tracing::info!(provider = %candidate.provider, model = %candidate.model, code = %failure.code, "candidate failed");
                    failures.push(named(failure, candidate));
                }
            }
        }
        let lost_too_often = !progress.lost.is_empty() && task.ctx.info().attempt > LOST_UNCOUNTED;
        let verdict = verdict_over(failures);
        Err(if progress.billed || lost_too_often { verdict } else { uncounted(verdict) })
    }

    async fn ask(&self, task: &Task<'_>, choice: &Choice, progress: &mut Progress) -> Verdict {
        let candidate = &choice.candidate;
        let Some(pool) = self.pool(task, choice) else {
            return Verdict::Next(self.no_candidate(task.question.request.role));
        };
        let mut question = task.question.clone();
        let mut repairing = false;
        if let Some(first) = progress.unusable.as_ref().filter(|first| first.is_from(candidate)) {
            repairing = true;
            append_repair(&mut question.request, &first.text, &first.errors);
        }
        let mut limit = output_limit(candidate, question.request.max_output_tokens);
        let mut tries_left = TRIES_PER_CANDIDATE;
        // Every key may refuse once; a change of keys is no second try.
        let mut changes_left = pool.len().saturating_sub(1);
        let several = changes_left > 0;
        let mut packings_left = PACKINGS_MAX;
        // What this call has found out about the window.
        let mut found = u64::MAX;
        let mut waited = Duration::ZERO;
        let mut kept = None;
        loop {
            tries_left = tries_left.saturating_sub(1);
            let window = self.window(candidate).min(found);
            // In a small window the answer gets at most half.
            limit = limit.min(u32::try_from(window / 2).unwrap_or(u32::MAX)).max(1);
            let Some(fitted) = budget::fit(&question, window, limit) else {
                let message = format!("the prompt does not fit into the {window} tokens of {}", candidate.model);
                return Verdict::Next(Failure::permanent("model.context_overflow", message));
            };
            if let Err(failure) = task.ctx.check_cancelled() {
                return Verdict::Stop(failure);
            }
            let mut again = self.admit_again(kept.take(), candidate, request_tokens_max(&fitted)).await;
            let admitted = loop {
                if let Some(admitted) = again.take() {
                    break admitted;
                }
                match self.admit(pool, choice, request_tokens_max(&fitted)).await {
                    Ok(admitted) => break admitted,
                    Err(Refused::No(failure)) => return Verdict::Next(failure),
                    Err(Refused::Later(failure, wait)) => {
                        // Budgets come back in small parts; what a provider or a breaker asks for is waited for outside.
                        waited += wait;
                        if failure.code != BUDGET_PER_MINUTE || waited > self.0.pace.wait_max {
                            return Verdict::Next(outward(failure));
                        }
                        if let Err(failure) = sleep(task, wait).await {
                            return Verdict::Stop(failure);
                        }
                    }
                }
            };
            let outcome = self.request(task, &admitted.running, candidate, &fitted, limit, repairing, progress).await;
            self.settle_grants(&admitted.grants, &outcome).await;
            let mut cooled = None;
            if let Err(Interrupted::Provider(error)) = &outcome {
                cooled = self.remember(&admitted.running.slot, candidate, error).await;
            }
            kept = matches!(outcome, Ok(Judged::Part)).then_some(admitted.running);
            let mut error = match outcome {
                // Its rest is no second try.
                Ok(Judged::Part) => {
                    tries_left += 1;
                    continue;
                }
                Ok(Judged::Reply(reply)) => {
                    if found < u64::MAX {
                        self.learn_window(candidate, found);
                    }
                    return Verdict::Answered(reply);
                }
                Ok(Judged::Unusable(answer)) => {
                    if progress.unusable.is_some() {
                        return Verdict::Stop(answer.twice());
                    }
                    repairing = true;
                    append_repair(&mut question.request, &answer.text, &answer.errors);
                    progress.unusable = Some(answer);
                    tries_left = tries_left.max(1);
                    continue;
                }
                Err(Interrupted::Unannounced(failure) | Interrupted::Engine(failure)) => return Verdict::Stop(failure),
                Err(Interrupted::Unpriced(failure)) => return Verdict::Next(failure),
                Err(Interrupted::Provider(error)) => *error,
            };
            progress.billed |= error.usage.is_some();
            let wait = cooled.or_else(|| error.retry_after()).unwrap_or_else(|| jittered(self.0.pace.backoff));
            if is_passing(&error.failure) {
                // Whoever waits, this call or its run, is told how long. Of several keys another may be free earlier: the next
                // attempt finds out, and asks nobody for it.
                let told = if several { error.retry_after().unwrap_or(self.0.pace.backoff) } else { wait };
                error.failure.retry_after_ms = error.failure.retry_after_ms.max(Some(milliseconds(told).max(1)));
            }
            if error.state == CallState::Unknown && error.advice != Advice::Stop {
                let labels = [("provider", candidate.provider.clone()), ("model", candidate.model.clone())];
                metrics::counter!("loopwright_model_lost_answers_total", &labels).increment(1);
                progress.lost.push(candidate.provider.clone());
                return Verdict::Next(error.failure);
            }
            let key_is_out = cooled.is_some()
                || is_out(&error.failure)
                || matches!(error.advice, Advice::OtherKey | Advice::DisableKey);
            if key_is_out && changes_left > 0 && pool.is_free(&self.0.board, &candidate.model, Instant::now()) {
                changes_left -= 1;
                tries_left += 1;
                continue;
            }
            match error.advice {
                Advice::Stop => return Verdict::Stop(error.failure),
                // The keys that could take over have been tried: what is left is another candidate.
                Advice::OtherProvider | Advice::OtherKey | Advice::DisableKey => return Verdict::Next(error.failure),
                Advice::OtherModel if error.failure.code == "model.context_overflow" && packings_left > 0 => {
                    if let Some(said) = error.context_tokens {
                        self.learn_window(candidate, said);
                    }
                    let first = packings_left == PACKINGS_MAX;
                    let Some(smaller) = narrower(&question, &fitted, limit, error.context_tokens, first) else {
                        return Verdict::Next(error.failure);
                    };
                    found = smaller;
                    packings_left -= 1;
                    // It is another prompt and no second try.
                    tries_left += 1;
                }
                Advice::OtherModel => return Verdict::Next(error.failure),
                Advice::SameModel if tries_left == 0 => return Verdict::Next(error.failure),
                Advice::SameModel if error.failure.code == "model.truncated" && error.stream_completed => {
                    // It reached its limit: the same limit would be reached again.
                    if limit >= candidate.max_output_tokens {
                        return Verdict::Next(error.failure);
                    }
                    limit = limit.saturating_mul(2).min(candidate.max_output_tokens);
                }
                Advice::SameModel => {
                    if wait > self.0.pace.wait_max {
                        return Verdict::Next(error.failure);
                    }
                    if let Err(failure) = sleep(task, wait).await {
                        return Verdict::Stop(failure);
                    }
                }
            }
        }
    }
}
