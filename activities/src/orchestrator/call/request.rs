//! One request, from its announcement to its closed reading.

use super::{
    super::{
        Request,
        route::Candidate,
        service::{Running, Slot},
    },
    Choice, Orchestrator, Progress, Task,
    answer::{Judged, Unusable, judge},
    blame::is_plain,
    cut::Cut,
    failure::to_its_owner,
    part::{Closing, Part},
    record::{Interrupted, closed_badly, closed_well, observe, opened, to_value},
    spoiled::is_spoiled,
};
use crate::{
    provider::{Call, Completion, ProviderError, RequestIdSlot, estimate::seems_cut},
    usage::{CallClosed, CallNoted, CallState},
};
use loopwright_engine::{Failure, activity::Context, ids::AttemptId};
use serde_json::Value;
use std::{
    future::Future,
    sync::PoisonError,
    time::{Duration, Instant},
};

/// Why the ledger's hook refuses a call of a model without a price.
const PRICE_MISSING: &str = "price_missing";
/// Why it refuses a call of a model that has become dearer than its line in the routing allows.
const PRICE_ABOVE_CEILING: &str = "price_above_ceiling";
/// Most calls that failed whose request counts are remembered: many times what a worker runs at once.
const COUNTS_MAX: usize = 4_096;

impl Orchestrator {
    /// One request, from its announcement to its closed reading.
    #[allow(clippy::too_many_arguments)]
    pub(super) async fn request(
        &self,
        task: &Task<'_>,
        running: &Running,
        choice: &Choice,
        request: &Request,
        limit: u32,
        repairing: bool,
        progress: &mut Progress,
    ) -> Result<Judged, Interrupted> {
        let (ctx, candidate) = (task.ctx, &choice.candidate);
        let meter_key = format!("{}.a{}.{}", task.key, ctx.info().attempt, progress.requests);
        progress.requests += 1;
        let mut opened = opened(&running.slot, candidate, request, limit);
        let request_sha256 = opened.request_sha256.clone();
        let before = progress.parts.of(&request_sha256).cloned();
        if let Some(part) = &before {
            part.announce(&mut opened);
        }
        let price_max = (opened.input_umtok_max, opened.output_umtok_max);
        let opened = to_value(&opened).map_err(Interrupted::Unannounced)?;
        match ctx.meter_open(&meter_key, &opened).await {
            Ok(()) => {}
            // Nobody may use a model that has no price, and others of the role may have one.
            Err(failure) if failure.code == PRICE_MISSING => {
                tracing::error!(provider = %candidate.provider, model = %candidate.model, "a model has no price of its own and is not used; `loopwright pricing import` or `sync`");
                return Err(Interrupted::Unpriced(Failure::permanent("model.unpriced", failure.message)));
            }
            Err(failure) if failure.code == PRICE_ABOVE_CEILING => {
                tracing::warn!(provider = %candidate.provider, model = %candidate.model, "a model is dearer than the routing allows and is not used");
                return Err(Interrupted::Unpriced(Failure::permanent("model.too_dear", failure.message)));
            }
            Err(failure) => return Err(Interrupted::Unannounced(failure)),
        }
        let started = Instant::now();
        let request_id = RequestIdSlot::default();
        // A repair is another question: a script may answer it differently.
        let key = if repairing { format!("{}~repair", task.key) } else { task.key.to_owned() };
        let completing = running.slot.provider.complete(Call {
            request,
            model: &candidate.model,
            path: &ctx.info().path,
            key: &key,
            max_output_tokens: limit,
            price_max,
            structured_output: candidate.structured_output,
            thinking: candidate.thinking.as_deref(),
            continuation: before.as_ref().map(Part::continuation),
            cancellation: ctx.cancellation(),
            request_id: &request_id,
        });
        let result = noting(ctx, &meter_key, &request_id, noted_after(&candidate.provider), completing).await;
        let mut result = result;
        self.judge_server(task, &running.slot, candidate, &mut result);
        observe(running, candidate, &result, started.elapsed(), self.0.pace.wait_max);
        if result.is_ok() {
            self.0.board.served(&running.slot.key, &candidate.model).await;
        }
        let result = result
            .map_err(|error| if running.slot.own_id().is_some() { to_its_owner(error, candidate) } else { error });
        match result {
            Ok(completion) => {
                if let Some(expected) = seems_cut(request, &completion.usage) {
                    let told = completion.usage.tokens_prompt;
                    tracing::warn!(provider = %candidate.provider, model = %candidate.model, told, expected, "a server counts far fewer tokens than it was sent, and may have cut the prompt: start it with a larger window, or say its window here (OPENAI_CONTEXT_TOKENS, `context_tokens`)");
                }
                if let Some(token) = &completion.continuation_token {
                    let (before, completion, request_id) = (before.as_ref(), &completion, &request_id);
                    let closing = Closing { meter_key: &meter_key, request_sha256, before, completion, request_id };
                    return self.keep_part(task, candidate, &mut progress.parts, token, closing).await;
                }
                let mut judged = judge(task, candidate, &completion, running.slot.own_id().is_some());
                if let (Judged::Reply(reply), Some(part)) = (&mut judged, &before) {
                    part.count_in(reply);
                }
                let mut closed = closed_well(&completion, &request_id);
                let (saved, value) = match &judged {
                    Judged::Reply(reply) => (task.saved.clone(), to_value(reply)?),
                    Judged::Unusable(answer) => {
                        tracing::warn!(provider = %candidate.provider, model = %candidate.model, errors = ?answer.errors, "unusable answer");
                        closed.error_class = Some("model.output_invalid".to_owned());
                        (Unusable::key(ctx, task.key, progress.unusable.len() + 1), to_value(answer)?)
                    }
                    // Made by `keep_part` alone, which has closed it.
                    Judged::Part => return Ok(judged),
                };
                self.close(ctx, &meter_key, &closed, Some((&saved, &value))).await?;
                Ok(judged)
            }
            Err(mut error) => {
                let closed = closed_badly(&error, &request_id);
                let checkpoint = if is_spoiled(&error) {
                    progress.spoiled.note(task.key, choice, &self.0.board, self.0.pace.backoff).await?
                } else {
                    cut(task.key, candidate, limit, &error, progress)?
                };
                let checkpoint = checkpoint.as_ref().map(|(key, value)| (key.as_str(), value));
                self.close(ctx, &meter_key, &closed, checkpoint).await?;
                if before.is_some() {
                    progress.parts.give_up_if_refused(&mut error);
                }
                Err(Interrupted::Provider(Box::new(error)))
            }
        }
    }

    /// Holds a failure of the server against what it answered to others: the question's own is counted, and is not its health.
    fn judge_server(
        &self,
        task: &Task<'_>,
        slot: &Slot,
        candidate: &Candidate,
        result: &mut Result<Completion, ProviderError>,
    ) {
        let step = task.ctx.info().idempotency_key.clone();
        let asked = (step, task.key.to_owned(), candidate.model.clone());
        match result {
            Ok(_) => self.0.blame.answered(&asked, &slot.key),
            Err(error) if error.unwell && error.state == CallState::Failed && is_plain(error.http_status) => {
                if self.0.blame.failed(asked, &slot.key) {
                    (error.unwell, error.counts) = (false, true);
                }
            }
            Err(_) => {}
        }
    }

    /// Stores a reading. The engine insists while its store is away: an answer that has been paid for is not lost.
    pub(super) async fn close(
        &self,
        ctx: &Context,
        key: &str,
        closed: &CallClosed,
        checkpoint: Option<(&str, &Value)>,
    ) -> Result<(), Interrupted> {
        ctx.meter_close(key, &to_value(closed)?, checkpoint).await.map_err(Interrupted::Engine)
    }

    pub(super) fn requests_so_far(&self, ctx: &Context, key: &str) -> u32 {
        let counts = self.0.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let mine =
            |((attempt, name), _): &&((AttemptId, String), u32)| *attempt == ctx.info().attempt_id && name == key;
        counts.iter().rev().find(mine).map_or(0, |(_, requests)| *requests)
    }

    pub(super) fn count(&self, ctx: &Context, key: &str, requests: u32) {
        let mut counts = self.0.counts.lock().unwrap_or_else(PoisonError::into_inner);
        if counts.len() >= COUNTS_MAX {
            counts.pop_front();
        }
        counts.push_back(((ctx.info().attempt_id, key.to_owned()), requests));
    }
}

/// What later attempts have to know of an answer that was cut at its limit, and its checkpoint.
fn cut(
    key: &str,
    candidate: &Candidate,
    limit: u32,
    error: &ProviderError,
    progress: &mut Progress,
) -> Result<Option<(String, Value)>, Failure> {
    if error.failure.code != "model.truncated" || !error.stream_completed {
        return Ok(None);
    }
    let Some(saved) = progress.cuts.next_key(key) else { return Ok(None) };
    let cut = Cut::of(candidate, limit, progress.full);
    let value = to_value(&cut)?;
    progress.cuts.push(cut);
    Ok(Some((saved, value)))
}

/// How long a call goes on after the provider has named it before that is noted. Chosen: what is answered whole by then has no need of it
/// (with the note such a call took three commits instead of two, and its end waited for the note's: every eighth call more than 3 ms,
/// measured), and long answers take many times that.
const NOTED_AFTER: Duration = Duration::from_millis(250);

/// [`NOTED_AFTER`], and nothing where the provider can be asked what became of a call: of a process that dies then the name is all that
/// is left.
fn noted_after(provider: &str) -> Duration {
    if provider == "openrouter" { Duration::ZERO } else { NOTED_AFTER }
}

/// The outcome of a call, and beside it, `after` the provider has named the call, a note of that name: whoever looks into the books after
/// the death of this process can ask the provider by it. An answer that is there before needs no note, and does not wait for one: its
/// reading holds the name too.
async fn noting(
    ctx: &Context,
    key: &str,
    request_id: &RequestIdSlot,
    after: Duration,
    completing: impl Future<Output = Result<Completion, ProviderError>>,
) -> Result<Completion, ProviderError> {
    let note = async {
        let noted = CallNoted { provider_request_id: request_id.known().await };
        tokio::time::sleep(after).await;
        let Ok(noted) = serde_json::to_value(noted) else { return };
        if let Err(failure) = ctx.meter_note(key, &noted).await {
            tracing::warn!(key, %failure, "the provider's name for a call under way is not recorded");
        }
    };
    tokio::pin!(completing);
    tokio::select! {
        biased;
        result = &mut completing => return result,
        () = note => {}
    }
    completing.await
}
