//! What the books, the breaker and the metrics get of a request.

use super::super::{
    Request, model_label,
    route::Candidate,
    service::{Running, Slot},
};
use crate::{
    provider::{Completion, ProviderError, RequestIdSlot, estimate::request_tokens_max, hex},
    usage::{CallClosed, CallOpened, CallState},
};
use loopwright_engine::{Failure, FailureKind};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::time::{Duration, Instant};

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

pub(super) fn opened(slot: &Slot, candidate: &Candidate, request: &Request, limit: u32) -> CallOpened {
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

/// Updates the breaker, which opens for `open_for`, and the metrics.
pub(super) fn observe(
    running: &Running,
    candidate: &Candidate,
    result: &Result<Completion, ProviderError>,
    elapsed: Duration,
    open_for: Duration,
) {
    let breaker = &running.slot.breaker;
    let outcome = match result {
        Ok(_) => {
            running.found_out();
            breaker.well();
            "ok".to_owned()
        }
        Err(error) => {
            match error.failure.kind {
                FailureKind::Cancelled => {}
                _ if error.unwell => breaker.unwell_for(Instant::now(), running.found_out(), open_for),
                _ => {
                    running.found_out();
                    breaker.well();
                }
            }
            error.failure.code.clone()
        }
    };
    let model = model_label(&candidate.model, running.slot.own_id().is_some());
    let labels = [("provider", candidate.provider.clone()), ("model", model.to_owned()), ("outcome", outcome)];
    metrics::counter!("loopwright_model_requests_total", &labels).increment(1);
    metrics::histogram!("loopwright_model_request_seconds", &labels).record(elapsed.as_secs_f64());
}

pub(super) fn to_value<T: serde::Serialize>(value: &T) -> Result<Value, Failure> {
    serde_json::to_value(value)
        .map_err(|error| Failure::permanent("model.record_unreadable", format!("a record cannot be written: {error}")))
}
