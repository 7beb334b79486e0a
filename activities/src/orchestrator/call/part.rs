//! An answer that its provider gives in several calls. What there is of it is recorded before the rest is asked for, and the rest is a
//! request like any other: announced, closed and paid by itself.

use super::{
    super::{Reply, route::Candidate, service::Running},
    Orchestrator, Task,
    answer::{Judged, unreadable},
    keys::Admitted,
    record::{Interrupted, closed_badly, closed_well, to_value},
};
use crate::{
    nul,
    provider::{
        Advice, Completion, Continuation, ProviderError, RequestIdSlot,
        estimate::{BYTES_PER_TOKEN_WORST, tokens},
        hex,
    },
    usage::CallOpened,
};
use loopwright_engine::{
    Failure,
    activity::{CHECKPOINT_BYTES_MAX, Context},
    definition::inputs::is_too_deep,
};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// Parts of an answer that are continued, over all candidates of a call in the attempts that count as one. Chosen: each is as long as a
/// whole answer may be, and who is not done after nine of them will not be.
const PARTS_MAX: u32 = 8;

/// What there is of an answer.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub(super) struct Part {
    provider: String,
    model: String,
    /// Hash of the request that the answer is for: the rest is asked for with the same one, or not at all.
    request_sha256: String,
    continuation: Continuation,
    /// Of all its calls.
    tokens_prompt: u64,
    tokens_output: u64,
}

impl Part {
    /// Checkpoint of the `n`-th part, from 1, of the attempts that count as one for the retry policy.
    fn key(ctx: &Context, key: &str, n: u32) -> String {
        format!("call:{key}~part.{}.{n}", ctx.info().counted)
    }

    /// The answer with what `completion`, asked for behind `before`, has brought.
    fn of(
        candidate: &Candidate,
        request_sha256: String,
        before: Option<&Self>,
        completion: &Completion,
        token: &str,
    ) -> Self {
        let add = |before: Option<u64>, now: u64| before.unwrap_or_default().saturating_add(now);
        Self {
            provider: candidate.provider.clone(),
            model: candidate.model.clone(),
            request_sha256,
            continuation: Continuation { token: token.to_owned(), parts: nul::value(completion.parts.clone()) },
            tokens_prompt: add(before.map(|part| part.tokens_prompt), completion.usage.tokens_prompt),
            tokens_output: add(before.map(|part| part.tokens_output), completion.usage.tokens_output),
        }
    }

    pub(super) fn continuation(&self) -> &Continuation {
        &self.continuation
    }

    pub(super) fn is_from(&self, candidate: &Candidate) -> bool {
        (self.provider.as_str(), self.model.as_str()) == (candidate.provider.as_str(), candidate.model.as_str())
    }

    /// What the request for the rest is announced with. What there is of the answer may be counted as its prompt: nobody has said.
    pub(super) fn announce(&self, opened: &mut CallOpened) {
        let Continuation { token, parts } = &self.continuation;
        let more = tokens(token.len() + parts.to_string().len(), BYTES_PER_TOKEN_WORST);
        opened.input_tokens_max = opened.input_tokens_max.saturating_add(more);
        let sent = json!({ "request": opened.request_sha256, "continuation": token });
        opened.request_sha256 = hex(&Sha256::digest(sent.to_string().as_bytes()));
    }

    /// The whole answer has taken the tokens of all its calls.
    pub(super) fn count_in(&self, reply: &mut Reply) {
        reply.tokens_prompt = reply.tokens_prompt.saturating_add(self.tokens_prompt);
        reply.tokens_output = reply.tokens_output.saturating_add(self.tokens_output);
    }
}

/// The parts that a call has recorded.
#[derive(Default)]
pub(super) struct Parts {
    newest: Option<Part>,
    recorded: u32,
}

impl Parts {
    /// What former attempts have left.
    pub(super) async fn recorded(ctx: &Context, key: &str) -> Result<Self, Failure> {
        let mut parts = Self::default();
        while parts.recorded < PARTS_MAX
            && let Some(saved) = ctx.checkpoint(&Part::key(ctx, key, parts.recorded + 1)).await?
        {
            parts.newest = Some(serde_json::from_value(saved).map_err(|error| unreadable(key, &error))?);
            parts.recorded += 1;
        }
        Ok(parts)
    }

    pub(super) fn newest(&self) -> Option<&Part> {
        self.newest.as_ref()
    }

    /// What there is of the answer to this request.
    pub(super) fn of(&self, request_sha256: &str) -> Option<&Part> {
        self.newest.as_ref().filter(|part| part.request_sha256 == request_sha256)
    }

    /// A part whose provider does not take its token, or has forgotten it, is of no use: the next try begins at the beginning.
    pub(super) fn give_up_if_refused(&mut self, error: &mut ProviderError) {
        let refused = matches!(error.failure.code.as_str(), "provider.bad_request" | "model.unavailable");
        if refused && matches!(error.http_status, Some(400 | 404)) {
            self.newest = None;
            error.advice = Advice::SameModel;
        }
    }
}

/// What of a request is closed when its answer is to be continued.
pub(super) struct Closing<'a> {
    pub(super) meter_key: &'a str,
    /// Of the request without a token.
    pub(super) request_sha256: String,
    pub(super) before: Option<&'a Part>,
    pub(super) completion: &'a Completion,
    pub(super) request_id: &'a RequestIdSlot,
}

impl Orchestrator {
    /// Closes a request whose answer is to be continued, and records in the same transaction what there is of it. One that cannot be
    /// kept, or does not come to its end in [`PARTS_MAX`] parts, is cut.
    pub(super) async fn keep_part(
        &self,
        task: &Task<'_>,
        candidate: &Candidate,
        parts: &mut Parts,
        token: &str,
        closing: Closing<'_>,
    ) -> Result<Judged, Interrupted> {
        let Closing { meter_key, request_sha256, before, completion, request_id } = closing;
        let part = Part::of(candidate, request_sha256, before, completion, token);
        let value = to_value(&part)?;
        if parts.recorded < PARTS_MAX && is_keepable(&value) {
            let saved = Part::key(task.ctx, task.key, parts.recorded + 1);
            let closed = closed_well(completion, request_id);
            self.close(task.ctx, meter_key, &closed, Some((&saved, &value))).await?;
            *parts = Parts { newest: Some(part), recorded: parts.recorded + 1 };
            return Ok(Judged::Part);
        }
        let text = format!("{}: the answer is continued without an end", candidate.provider);
        let error = ProviderError {
            http_status: completion.http_status,
            model_served: Some(completion.model_served.clone()),
            stream_completed: true,
            ..ProviderError::new(Failure::retryable("model.truncated", text), Advice::OtherModel)
        }
        .with_finish_reason(Some(completion.finish_reason.clone()))
        .with_usage(Some(completion.usage.clone()));
        self.close(task.ctx, meter_key, &closed_badly(&error, request_id), None).await?;
        Err(Interrupted::Provider(Box::new(error)))
    }

    /// The key that the beginning of an answer came with, for its rest: a token may be known to nobody else. `None`: its budget is
    /// used up, and any key may try.
    pub(super) async fn admit_again(
        &self,
        kept: Option<Running>,
        candidate: &Candidate,
        tokens: u64,
    ) -> Option<Admitted> {
        let running = kept?;
        let grants = self.spend(&running.slot, candidate, tokens).await.ok()?;
        Some(Admitted { running, grants })
    }
}

fn is_keepable(part: &Value) -> bool {
    !is_too_deep(part) && part.to_string().len() <= CHECKPOINT_BYTES_MAX
}
