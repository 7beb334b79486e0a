//! What a call that brought nothing says: of one candidate, and over all of them.

use super::wait::milliseconds;
use crate::{orchestrator::route::Candidate, provider::ProviderError};
use loopwright_engine::{Failure, FailureKind};
use serde_json::{Value, json};
use std::time::Duration;

/// Mark of a wait for a budget of ours, inside this file only.
pub(super) const BUDGET_PER_MINUTE: &str = "budget per minute";

/// What only its owner can cure is said to him, not in the words of the operator's settings.
pub(super) fn to_its_owner(mut error: ProviderError, candidate: &Candidate) -> ProviderError {
    let what = match error.failure.code.as_str() {
        "provider.key_invalid" => "refused your key: replace it",
        "provider.no_balance" => "says that the account of your key is empty: top it up, or replace the key",
        _ => return error,
    };
    error.failure.message = format!("{} {what}", candidate.provider);
    error
}

/// When a step asks again that has found every key of the platform out of service, in milliseconds. Chosen: a person has to act, and
/// asking costs nothing but the look at what is known of the keys.
const OPERATOR_WAIT_MS: u64 = 5 * 60 * 1_000;

/// What is said of a candidate that is not asked, because it has spoiled an answer to this question not long ago.
pub(super) fn left_alone(candidate: &Candidate, rest: Duration) -> Failure {
    let text = format!(
        "{} has spoiled its last answer to this question: it is asked again in {} s",
        candidate.provider,
        rest.as_secs_f64().ceil()
    );
    Failure::retryable("transient.unavailable", text).with_retry_after_ms(milliseconds(rest) + 1)
}

/// Whether a failure says that its key is out of service.
pub(super) fn is_out(failure: &Failure) -> bool {
    matches!(failure.code.as_str(), "provider.key_invalid" | "provider.no_balance" | "provider.key_disabled")
}

/// What a run is told when every key is out of service and this one is the platform's: its user can do nothing about that, so it waits
/// for who can.
pub(super) fn until_the_operator_acts(failure: &mut Failure) {
    failure.kind = FailureKind::Retryable;
    failure.retry_after_ms = Some(OPERATOR_WAIT_MS);
    failure.uncounted = true;
}

/// Whether a failure is waited for however long it takes.
pub(super) fn is_waited_for(failure: &Failure) -> bool {
    is_passing(failure) && failure.retry_after_ms.is_some()
}

/// Whether the engine or its hook refused a call that somebody would have to pay for.
pub(super) fn is_beyond_means(failure: &Failure) -> bool {
    failure.kind == FailureKind::Blocked || failure.code.starts_with("budget.")
}

/// Whether a failure is about the provider's state now and not about the question.
pub(super) fn is_passing(failure: &Failure) -> bool {
    failure.kind == FailureKind::Retryable && failure.code.starts_with("transient.")
}

/// The verdict over a call that nobody could be asked for, or that nobody has answered, and that cost no credits: the run waits
/// until somebody can, and its retry policy does not count that.
pub(super) fn uncounted(failure: Failure) -> Failure {
    if is_waited_for(&failure) { failure.without_counting() } else { failure }
}

/// A budget per minute of ours is told like a limit of the provider's.
pub(super) fn outward(mut failure: Failure) -> Failure {
    if failure.code == BUDGET_PER_MINUTE {
        failure.code = "transient.rate_limited".to_owned();
    }
    failure
}

/// The failure with the names of its provider and model in its detail.
pub(super) fn named(mut failure: Failure, candidate: &Candidate) -> Failure {
    if !failure.detail.is_object() {
        failure.detail = json!({});
    }
    failure.detail["provider"] = json!(candidate.provider);
    failure.detail["model"] = json!(candidate.model);
    failure
}

/// One failure for several candidates: while one of them may still answer later, that is what counts, and the
/// soonest; otherwise the best candidate's reason. The others are in the detail.
pub(super) fn verdict_over(failures: Vec<Failure>) -> Failure {
    let soonest = failures
        .iter()
        .enumerate()
        .filter(|(_, failure)| failure.kind == FailureKind::Retryable)
        .min_by_key(|(_, failure)| failure.retry_after_ms.unwrap_or(0))
        .map(|(at, _)| at);
    let at = soonest.unwrap_or(0);
    let others: Vec<Value> = failures
        .iter()
        .enumerate()
        .filter(|(other, _)| *other != at)
        .map(|(_, f)| json!({ "provider": f.detail["provider"], "model": f.detail["model"], "code": f.code, "message": f.message }))
        .collect();
    let Some(mut failure) = failures.into_iter().nth(at) else {
        return Failure::permanent("model.unavailable", "no model is left to ask");
    };
    if !others.is_empty() {
        failure.detail["others"] = Value::Array(others);
    }
    failure
}
