//! One request, from its announcement to its closed reading.

use super::{
    super::{
        Request,
        route::Candidate,
        service::{Running, Slot},
    },
    Orchestrator, Progress, Task,
    answer::{Judged, Unusable, judge},
    blame::is_plain,
    failure::to_its_owner,
    part::{Closing, Part},
};
use crate::{
    provider::{Call, Completion, ProviderError, RequestIdSlot, estimate::request_tokens_max, hex},
    usage::{CallClosed, CallNoted, CallOpened, CallState},
};
use loopwright_engine::{Failure, FailureKind, activity::Context, ids::AttemptId};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
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
        candidate: &Candidate,
        request: &Request,
        limit: u32,
        repairing: bool,
        progress: &mut Progress,
    ) -> Result<Judged, Interrupted> {
        let ctx = task.ctx;
        let meter_key = format!("{}.a{}.{}", task.key, ctx.info().attempt, progress.requests);
        progress.requests += 1;
        let mut opened = opened(&running.slot, candidate, request, limit);
        let request_sha256 = opened.request_sha256.clone();
        let before = progress.parts.of(&request_sha256).cloned();
        if let Some(part) = &before {
            part.announce(&mut opened);
        }
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
            structured_output: candidate.structured_output,
            thinking: candidate.thinking.as_deref(),
            continuation: before.as_ref().map(Part::continuation),
            cancellation: ctx.cancellation(),
            request_id: &request_id,
        });
        let result = noting(ctx, &meter_key, &request_id, completing).await;
        let mut result = result;
        self.judge_server(task, &running.slot, candidate, &mut result);
        observe(running, candidate, &result, started.elapsed(), self.0.pace.wait_max);
        let result = result
            .map_err(|error| if running.slot.own_id().is_some() { to_its_owner(error, candidate) } else { error });
        match result {
            Ok(completion) => {
                if let Some(token) = &completion.continuation_token {
                    let (before, completion, request_id) = (before.as_ref(), &completion, &request_id);
                    let closing = Closing { meter_key: &meter_key, request_sha256, before, completion, request_id };
                    return self.keep_part(task, candidate, &mut progress.parts, token, closing).await;
                }
                let mut judged = judge(task, candidate, &completion);
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
                self.close(ctx, &meter_key, &closed_badly(&error, &request_id), None).await?;
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
        match result {
            Ok(_) => self.0.blame.answered(&slot.key, &candidate.model, Instant::now()),
            Err(error) if error.unwell && error.state == CallState::Failed && is_plain(error.http_status) => {
                let step = task.ctx.info().idempotency_key.clone();
                let asked = (step, task.key.to_owned(), candidate.model.clone());
                if self.0.blame.failed(asked, &slot.key, Instant::now()) {
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

/// The outcome of a call, and beside it, as soon as the provider has named the call, a note of that name: whoever looks into the
/// books after the death of this process can ask the provider by it. An answer that is there at once is not kept waiting for the
/// note: its reading holds the name too.
async fn noting(
    ctx: &Context,
    key: &str,
    request_id: &RequestIdSlot,
    completing: impl Future<Output = Result<Completion, ProviderError>>,
) -> Result<Completion, ProviderError> {
    let note = async {
        let noted = CallNoted { provider_request_id: request_id.known().await };
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

/// Why a request brought nothing.
pub(super) enum Interrupted {
    /// The engine or its hook said no before anything was sent.
    Unannounced(Failure),
    /// The engine said no to what came of it.
    Engine(Failure),
    /// The model has no price, or one above its ceiling.
    Unpriced(Failure),
    Provider(Box<ProviderError>),
}

impl From<Failure> for Interrupted {
    fn from(failure: Failure) -> Self {
        Self::Engine(failure)
    }
}

fn opened(slot: &Slot, candidate: &Candidate, request: &Request, limit: u32) -> CallOpened {
    let key = slot.provider.key();
    let sent = json!({ "provider": candidate.provider, "model": candidate.model, "limit": limit, "request": request });
    // What a user's own key costs is between him and his provider.
    let ceiling = |max: Option<u64>| max.filter(|_| slot.own_id().is_none());
    CallOpened {
        provider: candidate.provider.clone(),
        model: candidate.model.clone(),
        purpose: request.purpose.clone(),
        request_sha256: hex(&Sha256::digest(sent.to_string().as_bytes())),
        key_fingerprint: key.fingerprint,
        key_last4: key.last4,
        own_key_id: slot.own_id(),
        local: slot.provider.is_local(),
        input_tokens_max: request_tokens_max(request),
        output_tokens_max: u64::from(limit),
        input_umtok_max: ceiling(candidate.input_umtok_max),
        output_umtok_max: ceiling(candidate.output_umtok_max),
    }
}

pub(super) fn closed_well(completion: &Completion, request_id: &RequestIdSlot) -> CallClosed {
    CallClosed {
        state: CallState::Succeeded,
        model_served: Some(completion.model_served.clone()),
        provider_request_id: completion.provider_request_id.clone().or_else(|| request_id.get()),
        http_status: completion.http_status,
        error_class: None,
        finish_reason: Some(completion.finish_reason.clone()),
        stream_completed: true,
        usage: Some(completion.usage.clone()),
    }
}

pub(super) fn closed_badly(error: &ProviderError, request_id: &RequestIdSlot) -> CallClosed {
    CallClosed {
        state: error.state,
        model_served: error.model_served.clone(),
        provider_request_id: request_id.get(),
        http_status: error.http_status,
        error_class: Some(error.failure.code.clone()),
        finish_reason: error.finish_reason.clone(),
        stream_completed: error.stream_completed,
        usage: error.usage.as_deref().cloned(),
    }
}

/// A model as metrics name it. What users call the models of their own keys makes no series.
pub(super) fn model_label(candidate: &Candidate, own: bool) -> String {
    if own { "own".to_owned() } else { candidate.model.clone() }
}

/// Updates the breaker, which opens for `open_for`, and the metrics.
fn observe(
    running: &Running,
    candidate: &Candidate,
    result: &Result<Completion, ProviderError>,
    elapsed: Duration,
    open_for: Duration,
) {
    let breaker = &running.slot.breaker;
    let outcome = match result {
        Ok(_) => {
            breaker.well();
            "ok".to_owned()
        }
        Err(error) => {
            match error.failure.kind {
                FailureKind::Cancelled => {}
                _ if error.unwell => breaker.unwell_for(Instant::now(), running.probe, open_for),
                _ => breaker.well(),
            }
            error.failure.code.clone()
        }
    };
    let model = model_label(candidate, running.slot.own_id().is_some());
    let labels = [("provider", candidate.provider.clone()), ("model", model), ("outcome", outcome)];
    metrics::counter!("loopwright_model_requests_total", &labels).increment(1);
    metrics::histogram!("loopwright_model_request_seconds", &labels).record(elapsed.as_secs_f64());
}

pub(super) fn to_value<T: serde::Serialize>(value: &T) -> Result<Value, Failure> {
    serde_json::to_value(value)
        .map_err(|error| Failure::permanent("model.record_unreadable", format!("a record cannot be written: {error}")))
}
