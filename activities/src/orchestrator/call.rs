//! The coordinator: one call of an activity becomes as many requests as it takes, each of them announced before it is
//! sent and closed with what became of it.

mod answer;
mod blame;
mod build;
mod choice;
mod cut;
mod failure;
mod keys;
mod pack;
mod part;
mod record;
mod request;
mod spoiled;
mod wait;

pub use wait::Pace;

use super::{
    Question, Reply, budget, model_label,
    own::{Lane, Owners},
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
use answer::{Judged, UNUSABLE_CANDIDATES, UNUSABLE_PER_CANDIDATE, Unusable, append_repair, unreadable};
use blame::Blame;
use cut::Cuts;
use failure::{
    BUDGET_PER_MINUTE, is_beyond_means, is_out, is_passing, is_waited_for, left_alone, named, outward, uncounted,
    until_the_operator_acts, verdict_over,
};
use keys::Refused;
use loopwright_engine::{Failure, FailureKind, activity::Context, ids::AttemptId};
use pack::{PACKINGS_MAX, Windows, answer_max, believable, narrower, output_limit};
use part::Parts;
use record::Interrupted;
use spoiled::{Spoiled, is_spoiled};
use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};
use wait::{alive, jittered, milliseconds, sleep};

/// Requests to one candidate within a call: the second cures most passing faults, a third is a storm.
pub const TRIES_PER_CANDIDATE: u32 = 2;

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
    windows: Windows,
    blame: Blame,
    /// Requests that failed calls have made, by attempt and key: an activity that asks again under the same key in the
    /// same attempt must not meter a new request under an old name.
    counts: Mutex<VecDeque<((AttemptId, String), u32)>>,
}

/// A candidate, and whose keys serve it.
#[derive(Clone)]
struct Choice {
    candidate: Candidate,
    /// The user's; `None`: the platform's.
    own: Option<Arc<Lane>>,
}

/// Who sees a question: a provider, or one of the servers that users bring.
type Server = (String, Option<String>);

impl Choice {
    fn server(&self) -> Server {
        let address = self.own.as_ref().and_then(|lane| lane.address());
        (self.candidate.provider.clone(), address.map(str::to_owned))
    }
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
    /// What has to be repaired, or could not be, in order.
    unusable: Vec<Unusable>,
    /// What there is of an answer that is given in several calls.
    parts: Parts,
    /// Answers that were cut at their limit.
    cuts: Cuts,
    /// The request that is made has all the room that its candidate has.
    full: bool,
    /// A request failed that its provider reports as used, and did not spoil: its user may pay, and waiting for somebody else would have
    /// him buy it once more.
    billed: bool,
    /// Who may have served the question in this attempt, and the answer was lost.
    lost: Vec<Server>,
    /// Answers that were lost, broke off or ended without a reason.
    spoiled: Spoiled,
    /// Who will not do it with any of its models.
    closed: Vec<Server>,
    /// The candidate that is being asked has failed in a way that waiting does not cure.
    counts: bool,
}

impl Progress {
    fn unusable_of<'a>(&'a self, candidate: &'a Candidate) -> impl Iterator<Item = &'a Unusable> {
        self.unusable.iter().filter(move |answer| answer.is_from(candidate))
    }

    /// Whether so many others have answered unusably that this candidate is not asked as well.
    fn is_enough(&self, candidate: &Candidate) -> bool {
        let mut names: Vec<_> = self.unusable.iter().map(|answer| (&answer.provider, &answer.model)).collect();
        names.sort_unstable();
        names.dedup();
        names.len() >= UNUSABLE_CANDIDATES && !names.contains(&(&candidate.provider, &candidate.model))
    }
}

/// The parts of one call that its candidates share.
struct Task<'a> {
    ctx: &'a Context,
    key: &'a str,
    /// Checkpoint of the answer.
    saved: String,
    question: Question,
    shape: Option<Shape>,
}

impl Orchestrator {
    /// One model call with fallback over the candidates of its role.
    ///
    /// # Shape
    /// `key` names the call inside its step and is stable over attempts: an answer recorded under it is returned and
    /// nothing is bought. Request `k` of attempt `a` is metered as `<key>.a<a>.<k>`; the answer is the checkpoint
    /// `call:<key>`; an answer without the required shape is the checkpoint `call:<key>~unusable.<a>.<n>`, the beginning of one that is
    /// given in several calls `call:<key>~part.<a>.<n>`, one that was cut at its limit `call:<key>~cut.<n>`, that one was spoiled
    /// `call:<key>~spoiled.<n>`. A candidate whose window is too small, or that says so, is asked with a smaller
    /// packing of the same question before another one is. While it lasts the call gives signs of life for its attempt.
    /// # Errors
    /// The codes that `README.md` lists under "Providers and orchestrator"; a refusal of the hook or the engine as it is.
    /// # Transaction
    /// One for each opened and each closed reading; the last closes the reading and saves the answer together.
    pub async fn call(&self, ctx: &Context, key: &str, question: impl Into<Question> + Send) -> Result<Reply, Failure> {
        alive(ctx, self.answer(ctx, key, question.into().in_order())).await
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
        let mut progress = Progress { requests: self.requests_so_far(ctx, key), ..Progress::default() };
        // Only a former attempt can have left some that this one does not know.
        if ctx.info().attempt > 1 {
            progress.parts = Parts::recorded(ctx, key).await?;
            progress.unusable = Unusable::recorded(ctx, key).await?;
            progress.cuts = Cuts::recorded(ctx, key).await?;
            progress.spoiled = Spoiled::recorded(ctx, key, &self.0.board, self.0.pace.backoff).await?;
            // A repair that was lost comes first; before it the rest of an answer.
            choices.sort_by_key(|choice| progress.unusable_of(&choice.candidate).count() != 1);
        }
        if let Some(part) = progress.parts.newest() {
            choices.sort_by_key(|choice| !part.is_from(&choice.candidate));
        }
        let task = Task { ctx, key, saved, question, shape };
        let outcome = self.ask_all(&task, &choices, &mut progress).await;
        if outcome.is_err() {
            self.count(ctx, key, progress.requests);
        }
        outcome
    }

    async fn ask_all(&self, task: &Task<'_>, choices: &[Choice], progress: &mut Progress) -> Result<Reply, Failure> {
        let mut failures = Vec::new();
        // Whether somebody is waited for; the first key of the platform's that is out of service, and whether all are.
        let (mut waits, mut ours, mut only_keys) = (false, None, true);
        // Who has failed, and whether in a way that waiting does not cure; who is to be left alone since a former attempt.
        let mut whose = Vec::new();
        let rests: Vec<_> = choices.iter().map(|choice| progress.spoiled.rest_of(choice)).collect();
        for (choice, rest) in choices.iter().zip(rests) {
            let (candidate, server) = (&choice.candidate, choice.server());
            // Who may have billed the question is not asked again within the attempt.
            if progress.lost.contains(&server) || progress.closed.contains(&server) || progress.is_enough(candidate) {
                continue;
            }
            progress.counts = false;
            if progress.cuts.are_enough() {
                only_keys = false;
                whose.push((choice, false));
                failures.push(progress.cuts.failure());
                break;
            }
            // Who was asked before may have taken as long.
            let verdict = match rest.and_then(|_| progress.spoiled.rest_of(choice)) {
                Some(rest) => Verdict::Next(left_alone(candidate, rest)),
                None => self.ask(task, choice, progress).await,
            };
            match verdict {
                Verdict::Answered(reply) => return Ok(reply),
                Verdict::Stop(failure) => return Err(failure),
                Verdict::Next(failure) => {
                    tracing::info!(provider = %candidate.provider, model = %candidate.model, code = %failure.code, "candidate failed");
                    waits |= is_waited_for(&failure) && !progress.counts;
                    only_keys &= is_out(&failure);
                    if ours.is_none() && choice.own.is_none() {
                        ours = Some(failures.len());
                    }
                    whose.push((choice, progress.counts));
                    failures.push(named(failure, candidate));
                }
            }
        }
        let rests: Vec<_> = whose.iter().map(|(choice, _)| progress.spoiled.rest_of(choice)).collect();
        let rests: Vec<_> = rests.into_iter().map(|rest| rest.map(|rest| milliseconds(rest) + 1)).collect();
        let (soonest, latest) = (rests.iter().flatten().min().copied(), rests.iter().max().copied().flatten());
        for ((failure, (_, counts)), rest) in failures.iter_mut().zip(whose).zip(rests) {
            // Whatever else is said of who has spoiled an answer, a breaker's word too: not before he may be asked. And who is not cured by
            // waiting is not asked alone, again and again, while another is waited for.
            let least = if counts { rest.max(soonest) } else { rest };
            if is_waited_for(failure) {
                failure.retry_after_ms = failure.retry_after_ms.max(least);
            }
        }
        if let (true, Some(last)) = (failures.is_empty(), progress.unusable.last()) {
            return Err(last.twice());
        }
        if let Some(failure) = ours.filter(|_| only_keys).and_then(|at| failures.get_mut(at)) {
            until_the_operator_acts(failure);
        }
        let mut verdict = verdict_over(failures);
        let counts = !waits || progress.billed || progress.spoiled.counts();
        // The attempts that count are not used up before all who rest can be asked as well.
        if verdict.kind == FailureKind::Retryable && (counts || !is_waited_for(&verdict)) {
            verdict.retry_after_ms = verdict.retry_after_ms.max(latest);
        }
        // Of those who were cut the newest knows that it was the last.
        if verdict.code == "model.truncated" && progress.cuts.are_enough() {
            verdict = Failure { detail: verdict.detail, ..progress.cuts.failure() };
        }
        Err(if counts { verdict } else { uncounted(verdict) })
    }

    async fn ask(&self, task: &Task<'_>, choice: &Choice, progress: &mut Progress) -> Verdict {
        let candidate = &choice.candidate;
        let Some(pool) = self.pool(choice) else {
            return Verdict::Next(self.no_candidate(task.question.request.role));
        };
        let mut question = task.question.clone();
        let mut repairing = false;
        let before: Vec<&Unusable> = progress.unusable_of(candidate).collect();
        match before.as_slice() {
            [] => {}
            [first] => {
                repairing = true;
                append_repair(&mut question.request, &first.text, &first.errors);
            }
            [.., last] => return Verdict::Next(last.twice()),
        }
        let mut limit = output_limit(candidate, question.request.max_output_tokens);
        // A smaller one, where that is more than may be spent or leaves no room for the prompt.
        let mut modest = None;
        if progress.cuts.is_long() {
            modest = Some(limit.saturating_mul(2));
            limit = u32::MAX;
        }
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
            let window = self.window(choice).min(found);
            let limit_max = answer_max(candidate, window);
            limit = limit.min(limit_max);
            let mut fitted = budget::fit(&question, window, limit);
            if fitted.is_none()
                && let Some(less) = modest.take().filter(|less| *less < limit)
            {
                limit = less;
                fitted = budget::fit(&question, window, limit);
            }
            let Some(fitted) = fitted else {
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
            progress.full = limit >= limit_max;
            let asked = Arc::clone(&admitted.running.slot);
            let outcome = self.request(task, &admitted.running, choice, &fitted, limit, repairing, progress).await;
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
                        self.learn_window(choice, found);
                    }
                    return Verdict::Answered(reply);
                }
                Ok(Judged::Unusable(answer)) => {
                    let so_far = 1 + progress.unusable_of(candidate).count();
                    let failure = (so_far >= UNUSABLE_PER_CANDIDATE).then(|| answer.twice());
                    if failure.is_none() {
                        repairing = true;
                        append_repair(&mut question.request, &answer.text, &answer.errors);
                        tries_left = tries_left.max(1);
                    }
                    progress.unusable.push(answer);
                    match failure {
                        Some(failure) => return Verdict::Next(failure),
                        None => continue,
                    }
                }
                // Nothing was sent: room for the longest answer was more than may be spent.
                Err(Interrupted::Unannounced(failure)) if is_beyond_means(&failure) => {
                    let Some(less) = modest.take().filter(|less| *less < limit) else { return Verdict::Stop(failure) };
                    limit = less;
                    continue;
                }
                Err(Interrupted::Unannounced(failure) | Interrupted::Engine(failure)) => return Verdict::Stop(failure),
                Err(Interrupted::Unpriced(failure)) => return Verdict::Next(failure),
                Err(Interrupted::Provider(error)) => *error,
            };
            progress.billed |= error.usage.is_some() && !is_spoiled(&error);
            progress.counts |= error.counts;
            let wait = cooled.or_else(|| error.retry_after()).unwrap_or_else(|| jittered(self.0.pace.backoff));
            if is_passing(&error.failure) {
                // Whoever waits, this call or its run, is told how long. Of several keys another may be free earlier: the next
                // attempt finds out, and asks nobody for it.
                let told = if several { error.retry_after().unwrap_or(self.0.pace.backoff) } else { wait };
                error.failure.retry_after_ms = error.failure.retry_after_ms.max(Some(milliseconds(told).max(1)));
            }
            if error.state == CallState::Unknown && error.advice != Advice::Stop {
                let model = model_label(&candidate.model, choice.own.is_some());
                let labels = [("provider", candidate.provider.clone()), ("model", model.to_owned())];
                metrics::counter!("loopwright_model_lost_answers_total", &labels).increment(1);
                progress.lost.push(choice.server());
                return Verdict::Next(error.failure);
            }
            let key_is_out = cooled.is_some()
                || is_out(&error.failure)
                || matches!(error.advice, Advice::OtherKey | Advice::DisableKey);
            let bought_enough = is_spoiled(&error) && !progress.spoiled.is_first();
            if key_is_out
                && !bought_enough
                && changes_left > 0
                && pool.is_free(&self.0.board, &candidate.model, Instant::now())
            {
                changes_left -= 1;
                tries_left += 1;
                continue;
            }
            match error.advice {
                Advice::Stop => return Verdict::Stop(error.failure),
                Advice::OtherProvider => {
                    progress.closed.push(choice.server());
                    return Verdict::Next(error.failure);
                }
                // The keys that could take over have been tried: what is left is another candidate.
                Advice::OtherKey | Advice::DisableKey => {
                    return Verdict::Next(self.unless_another_key_may(pool, candidate, &asked, error.failure));
                }
                Advice::OtherModel if error.failure.code == "model.context_overflow" && packings_left > 0 => {
                    let said = believable(error.context_tokens);
                    if let Some(said) = said {
                        self.learn_window(choice, said);
                    }
                    let first = packings_left == PACKINGS_MAX;
                    let Some(smaller) = narrower(&question, &fitted, limit, said, first) else {
                        return Verdict::Next(error.failure);
                    };
                    found = smaller;
                    packings_left -= 1;
                    // It is another prompt and no second try.
                    tries_left += 1;
                }
                Advice::OtherModel => return Verdict::Next(error.failure),
                Advice::SameModel if tries_left == 0 || bought_enough => return Verdict::Next(error.failure),
                Advice::SameModel if error.failure.code == "model.truncated" && error.stream_completed => {
                    // It reached its limit: the same limit would be reached again, and so might one that is a little larger. What
                    // is not written is not paid for.
                    if limit >= limit_max {
                        return Verdict::Next(error.failure);
                    }
                    modest = Some(limit.saturating_mul(2).min(limit_max));
                    limit = limit_max;
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
