//! The coordinator: one call of an activity becomes as many requests as it takes, each of them announced before it is
//! sent and closed with what became of it.

use super::{
    Message, Reply, Request, Role, ToolCall,
    breaker::{Breaker, Permit},
    budget,
    route::{Candidate, Routing},
    structured::Shape,
};
use crate::{
    provider::{
        Advice, Call, Completion, Provider, ProviderError, RequestIdSlot, Settings, estimate::request_tokens_max, hex,
        settings::SettingsError,
    },
    usage::{CallClosed, CallOpened, CallState, PlannedCall},
};
use loopwright_engine::{Failure, FailureKind, activity::Context, ids::AttemptId};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

/// Requests to one candidate within a call: the second cures most passing faults, a third is a storm.
pub const TRIES_PER_CANDIDATE: u32 = 2;
/// Tries to store a reading whose call has been paid for.
const CLOSE_TRIES_MAX: u32 = 3;
/// Why the ledger's hook refuses a call of a model without a price.
const PRICE_MISSING: &str = "price_missing";
/// Most calls that failed whose request counts are remembered: many times what a worker runs at once.
const COUNTS_MAX: usize = 4_096;

/// How long the orchestrator waits; [`Default`] is what production uses, tests make it short.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pace {
    /// Wait before the second try where the provider names none, with jitter of half of it either way.
    pub backoff: Duration,
    /// Longest wait inside a call; beyond it the attempt ends with `retry_after_ms` and frees its worker.
    pub wait_max: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self { backoff: Duration::from_secs(1), wait_max: Duration::from_secs(30) }
    }
}

/// Chooses a model for a role and makes sure that no finished call is bought twice. Cheap to clone.
#[derive(Clone)]
pub struct Orchestrator(Arc<Inner>);

struct Inner {
    routing: Routing,
    services: BTreeMap<&'static str, Service>,
    pace: Pace,
    /// Windows that servers named when they refused a prompt, by provider and model: smaller than we were told.
    windows: Mutex<BTreeMap<(String, String), u64>>,
    /// Requests that failed calls have made, by attempt and key: an activity that asks again under the same key in the
    /// same attempt must not meter a new request under an old name.
    counts: Mutex<VecDeque<((AttemptId, String), u32)>>,
}

struct Service {
    provider: Arc<dyn Provider>,
    breaker: Breaker,
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
}

/// A finished answer that did not have the required shape. It has been paid for, so it is recorded like a usable one: an
/// attempt that carries on for a lost one begins where that one was.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
struct Unusable {
    provider: String,
    model: String,
    text: String,
    errors: Vec<String>,
}

impl Unusable {
    /// Checkpoint of the `n`-th unusable answer, 1 or 2, of the attempts that count as one for the retry policy.
    fn key(ctx: &Context, key: &str, n: u32) -> String {
        format!("call:{key}~unusable.{}.{n}", ctx.info().counted)
    }

    fn is_from(&self, candidate: &Candidate) -> bool {
        (self.provider.as_str(), self.model.as_str()) == (candidate.provider.as_str(), candidate.model.as_str())
    }

    async fn recorded(ctx: &Context, key: &str, n: u32) -> Result<Option<Self>, Failure> {
        let found = ctx.checkpoint(&Self::key(ctx, key, n)).await?;
        found.map(serde_json::from_value).transpose().map_err(|error| unreadable(key, &error))
    }

    /// How the call ends when the repair was unusable too.
    fn twice(self) -> Failure {
        let text = format!("{} answered twice without the required shape", self.model);
        Failure::retryable("model.output_invalid", text).with_detail(json!({ "errors": self.errors }))
    }
}

/// Asking again would pay twice, so an unreadable record is an error and not a miss.
fn unreadable(key: &str, error: &serde_json::Error) -> Failure {
    let text = format!("the recorded answer {key} cannot be read: {error}");
    Failure::permanent("model.record_unreadable", text)
}

/// The parts of one call that its candidates share.
struct Task<'a> {
    ctx: &'a Context,
    key: &'a str,
    /// Checkpoint of the answer.
    saved: String,
    request: Request,
    shape: Option<Shape>,
}

impl Orchestrator {
    /// An orchestrator over the candidates of `routing` whose provider is among `providers`.
    #[must_use]
    pub fn new(routing: Routing, providers: Vec<Arc<dyn Provider>>) -> Self {
        Self::with_pace(routing, providers, Pace::default())
    }

    /// As [`Orchestrator::new`], with other waits.
    #[must_use]
    pub fn with_pace(routing: Routing, providers: Vec<Arc<dyn Provider>>, pace: Pace) -> Self {
        let services: BTreeMap<&'static str, Service> = providers
            .into_iter()
            .map(|provider| (provider.name(), Service { provider, breaker: Breaker::default() }))
            .collect();
        let names: Vec<&str> = services.keys().copied().collect();
        let inner = Inner {
            routing: routing.only(&names),
            services,
            pace,
            windows: Mutex::default(),
            counts: Mutex::default(),
        };
        Self(Arc::new(inner))
    }

    /// An orchestrator for what is configured. An OpenAI-compatible server of which no model is known is asked for
    /// its list.
    ///
    /// # Errors
    /// A key that cannot be sent; a server without a known model where no other provider is configured.
    pub async fn configured(routing: Routing, settings: &Settings) -> Result<Self, SettingsError> {
        let unnamed = settings.openai_model.is_none()
            && !Role::ALL.iter().all(|role| {
                settings.role_models.contains_key(role)
                    || routing.candidates(*role).iter().any(|c| c.provider == "openai_compatible")
            });
        let mut offered = None;
        if let (true, Some(client)) = (unnamed, settings.openai_client()?) {
            match client.models().await {
                Ok(models) => offered = models.into_iter().next(),
                Err(error) => tracing::warn!(code = %error.failure.code, "the list of models could not be read"),
            }
            if offered.is_none() && settings.gemini.is_none() && settings.openrouter.is_none() {
                return Err(SettingsError {
                    setting: "OPENAI_BASE_URL".to_owned(),
                    problem: "the server lists no model: start it, or name one in OPENAI_MODEL".to_owned(),
                });
            }
        }
        Ok(Self::new(routing.with_settings(settings, offered.as_ref()), settings.providers()?))
    }

    /// One model call with fallback over the candidates of its role.
    ///
    /// # Shape
    /// `key` names the call inside its step and is stable over attempts: an answer recorded under it is returned and
    /// nothing is bought. Request `k` of attempt `a` is metered as `<key>.a<a>.<k>`; the answer is the checkpoint
    /// `call:<key>`; an answer without the required shape is the checkpoint `call:<key>~unusable.<a>.<n>`.
    /// # Errors
    /// The codes that `README.md` lists under "Providers and orchestrator"; a refusal of the hook or the engine as it is.
    /// # Transaction
    /// One for each opened and each closed reading; the last closes the reading and saves the answer together.
    pub async fn call(&self, ctx: &Context, key: &str, request: Request) -> Result<Reply, Failure> {
        let saved = format!("call:{key}");
        if let Some(recorded) = ctx.checkpoint(&saved).await? {
            return serde_json::from_value(recorded).map_err(|error| unreadable(key, &error));
        }
        let shape = request.output_schema.as_ref().map(Shape::new).transpose()?;
        let mut candidates = self.usable(ctx, &request);
        if candidates.is_empty() {
            return Err(self.no_candidate(request.role));
        }
        let mut unusable = None;
        // Only a former attempt can have left one that this one does not know.
        if shape.is_some() && ctx.info().attempt > 1 {
            unusable = Unusable::recorded(ctx, key, 1).await?;
            if let (Some(_), Some(second)) = (&unusable, Unusable::recorded(ctx, key, 2).await?) {
                return Err(second.twice());
            }
        }
        if let Some(first) = &unusable {
            candidates.sort_by_key(|c| !first.is_from(c));
        }
        let task = Task { ctx, key, saved, request, shape };
        let mut progress = Progress { requests: self.requests_so_far(ctx, key), unusable };
        let outcome = self.ask_all(&task, &candidates, &mut progress).await;
        if outcome.is_err() {
            self.count(ctx, key, progress.requests);
        }
        outcome
    }

    async fn ask_all(
        &self,
        task: &Task<'_>,
        candidates: &[Candidate],
        progress: &mut Progress,
    ) -> Result<Reply, Failure> {
        let mut failures = Vec::new();
        for candidate in candidates {
            match self.ask(task, candidate, progress).await {
                Verdict::Answered(reply) => return Ok(reply),
                Verdict::Stop(failure) => return Err(failure),
                Verdict::Next(failure) => {
                    tracing::info!(provider = %candidate.provider, model = %candidate.model, code = %failure.code, "candidate failed");
                    failures.push(named(failure, candidate));
                }
            }
        }
        Err(verdict_over(failures))
    }

    /// Candidates of a role as (provider, model), for `Activity::reserve`.
    #[must_use]
    pub fn candidates(&self, role: Role) -> Vec<(String, String)> {
        let list = self.0.routing.candidates(role).iter();
        list.map(|candidate| (candidate.provider.clone(), candidate.model.clone())).collect()
    }

    /// `count` calls with a role as `Activity::reserve` states them, room for thinking included.
    #[must_use]
    pub fn planned(&self, role: Role, count: u32, input_tokens: u64, output_tokens: u32) -> PlannedCall {
        let list = self.0.routing.candidates(role).iter();
        let output = list.map(|candidate| output_limit(candidate, output_tokens)).max().unwrap_or(output_tokens);
        PlannedCall { candidates: self.candidates(role), count, input_tokens, output_tokens: u64::from(output) }
    }

    /// Whether answers come from a script and from nowhere else.
    #[must_use]
    pub fn is_rehearsed(&self) -> bool {
        !self.0.services.is_empty() && self.0.services.keys().all(|name| *name == "rehearsed")
    }

    fn usable(&self, ctx: &Context, request: &Request) -> Vec<Candidate> {
        let routing = &self.0.routing;
        let overridden = (!self.is_rehearsed()).then(|| routing.overridden(request.role, &ctx.info().extras)).flatten();
        let mut list = overridden.unwrap_or_else(|| routing.candidates(request.role).to_vec());
        list.retain(|candidate| {
            self.0.services.contains_key(candidate.provider.as_str()) && (candidate.tools || request.tools.is_empty())
        });
        list
    }

    fn no_candidate(&self, role: Role) -> Failure {
        let message = if self.0.services.is_empty() {
            "no model provider is configured: set GEMINI_API_KEY, OPENROUTER_API_KEY or OPENAI_BASE_URL".to_owned()
        } else {
            format!("no configured provider has a model for the role {}: set {}", role.name(), role.setting())
        };
        Failure::permanent("model.unavailable", message)
    }

    async fn ask(&self, task: &Task<'_>, candidate: &Candidate, progress: &mut Progress) -> Verdict {
        let Some(service) = self.0.services.get(candidate.provider.as_str()) else {
            return Verdict::Next(self.no_candidate(task.request.role));
        };
        let mut request = task.request.clone();
        let mut repairing = false;
        if let Some(first) = progress.unusable.as_ref().filter(|first| first.is_from(candidate)) {
            repairing = true;
            append_repair(&mut request, &first.text, &first.errors);
        }
        let mut limit = output_limit(candidate, request.max_output_tokens);
        let mut tries_left = TRIES_PER_CANDIDATE;
        loop {
            tries_left -= 1;
            let window = self.window(candidate);
            // In a small window the answer gets at most half.
            limit = limit.min(u32::try_from(window / 2).unwrap_or(u32::MAX)).max(1);
            let Some(fitted) = budget::fit(&request, window, limit) else {
                let message = format!("the prompt does not fit into the {window} tokens of {}", candidate.model);
                return Verdict::Next(Failure::permanent("model.context_overflow", message));
            };
            if let Err(failure) = task.ctx.check_cancelled() {
                return Verdict::Stop(failure);
            }
            match service.breaker.permit(Instant::now()) {
                Permit::Allowed => {}
                Permit::AccountRefused(failure) => return Verdict::Next(failure),
                Permit::Refused(wait) => {
                    let message = format!("{} is out of service after repeated failures", candidate.provider);
                    let failure = Failure::retryable("model.unavailable", message);
                    return Verdict::Next(failure.with_retry_after_ms(milliseconds(wait)));
                }
            }
            let probe = service.breaker.guard();
            let outcome = self.request(task, service, candidate, &fitted, limit, repairing, progress).await;
            drop(probe);
            let error = match outcome {
                Ok(Judged::Reply(reply)) => return Verdict::Answered(reply),
                Ok(Judged::Unusable(answer)) => {
                    if progress.unusable.is_some() {
                        return Verdict::Stop(answer.twice());
                    }
                    repairing = true;
                    append_repair(&mut request, &answer.text, &answer.errors);
                    progress.unusable = Some(answer);
                    tries_left = tries_left.max(1);
                    continue;
                }
                Err(Interrupted::Engine(failure)) => return Verdict::Stop(failure),
                Err(Interrupted::Unpriced(message)) => {
                    tracing::error!(provider = %candidate.provider, model = %candidate.model, "a model has no price and is not used; `loopwright pricing import` or `sync`");
                    return Verdict::Next(Failure::permanent("model.unpriced", message));
                }
                Err(Interrupted::Provider(error)) => *error,
            };
            match error.advice {
                Advice::Stop => return Verdict::Stop(error.failure),
                Advice::OtherProvider => return Verdict::Next(error.failure),
                Advice::OtherModel if error.failure.code == "model.context_overflow" && tries_left > 0 => {
                    self.learn_window(candidate, &fitted, limit, error.context_tokens);
                    // Only a shorter request is worth a second try.
                    if budget::fit(&request, self.window(candidate), limit).is_none_or(|shorter| shorter == fitted) {
                        return Verdict::Next(error.failure);
                    }
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
                    let wait = error.retry_after().unwrap_or_else(|| jittered(self.0.pace.backoff));
                    if wait > self.0.pace.wait_max {
                        return Verdict::Next(error.failure);
                    }
                    tokio::select! {
                        biased;
                        () = task.ctx.cancellation().cancelled() => return Verdict::Stop(Failure::cancelled()),
                        () = tokio::time::sleep(wait) => {}
                    }
                }
            }
        }
    }

    /// One request, from its announcement to its closed reading.
    #[allow(clippy::too_many_arguments)]
    async fn request(
        &self,
        task: &Task<'_>,
        service: &Service,
        candidate: &Candidate,
        request: &Request,
        limit: u32,
        repairing: bool,
        progress: &mut Progress,
    ) -> Result<Judged, Interrupted> {
        let ctx = task.ctx;
        let meter_key = format!("{}.a{}.{}", task.key, ctx.info().attempt, progress.requests);
        progress.requests += 1;
        let opened = opened(service.provider.as_ref(), candidate, request, limit);
        match ctx.meter_open(&meter_key, &to_value(&opened)?).await {
            // Nobody may use a model that has no price, and others of the role may have one.
            Err(failure) if failure.code == PRICE_MISSING => return Err(Interrupted::Unpriced(failure.message)),
            opened => opened?,
        }
        let started = Instant::now();
        let request_id = RequestIdSlot::default();
        // A repair is another question: a script may answer it differently.
        let key = if repairing { format!("{}~repair", task.key) } else { task.key.to_owned() };
        let result = service
            .provider
            .complete(Call {
                request,
                model: &candidate.model,
                path: &ctx.info().path,
                key: &key,
                max_output_tokens: limit,
                structured_output: candidate.structured_output,
                thinking: candidate.thinking.as_deref(),
                cancellation: ctx.cancellation(),
                request_id: &request_id,
            })
            .await;
        observe(service, candidate, &result, started.elapsed());
        match result {
            Ok(completion) => {
                let judged = judge(task, candidate, &completion);
                let mut closed = closed_well(&completion, &request_id);
                let (saved, value) = match &judged {
                    Judged::Reply(reply) => (task.saved.clone(), to_value(reply)?),
                    Judged::Unusable(answer) => {
                        tracing::warn!(provider = %candidate.provider, model = %candidate.model, errors = ?answer.errors, "unusable answer");
                        closed.error_class = Some("model.output_invalid".to_owned());
                        let n = if progress.unusable.is_none() { 1 } else { 2 };
                        (Unusable::key(ctx, task.key, n), to_value(answer)?)
                    }
                };
                self.close(ctx, &meter_key, &closed, Some((&saved, &value))).await?;
                Ok(judged)
            }
            Err(error) => {
                self.close(ctx, &meter_key, &closed_badly(&error, &request_id), None).await?;
                Err(Interrupted::Provider(Box::new(error)))
            }
        }
    }

    /// Stores a reading; a store that is away for a moment must not lose an answer that has been paid for.
    async fn close(
        &self,
        ctx: &Context,
        key: &str,
        closed: &CallClosed,
        checkpoint: Option<(&str, &Value)>,
    ) -> Result<(), Interrupted> {
        let reading = to_value(closed)?;
        let mut tries = 1;
        loop {
            match ctx.meter_close(key, &reading, checkpoint).await {
                Ok(()) => return Ok(()),
                Err(failure) if failure.kind == FailureKind::Retryable && tries < CLOSE_TRIES_MAX => {
                    tries += 1;
                    tokio::time::sleep(jittered(self.0.pace.backoff)).await;
                }
                Err(failure) => return Err(Interrupted::Engine(failure)),
            }
        }
    }

    fn requests_so_far(&self, ctx: &Context, key: &str) -> u32 {
        let counts = self.0.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let mine =
            |((attempt, name), _): &&((AttemptId, String), u32)| *attempt == ctx.info().attempt_id && name == key;
        counts.iter().rev().find(mine).map_or(0, |(_, requests)| *requests)
    }

    fn count(&self, ctx: &Context, key: &str, requests: u32) {
        let mut counts = self.0.counts.lock().unwrap_or_else(PoisonError::into_inner);
        if counts.len() >= COUNTS_MAX {
            counts.pop_front();
        }
        counts.push_back(((ctx.info().attempt_id, key.to_owned()), requests));
    }

    fn window(&self, candidate: &Candidate) -> u64 {
        let windows = self.0.windows.lock().unwrap_or_else(PoisonError::into_inner);
        let learned = windows.get(&(candidate.provider.clone(), candidate.model.clone())).copied();
        learned.map_or(candidate.context_tokens, |learned| learned.min(candidate.context_tokens))
    }

    /// Believes a server that said how small its window is; one that did not say gets three quarters of what it refused,
    /// for this model and the life of the process, but never less than the answer needs.
    fn learn_window(&self, candidate: &Candidate, refused: &Request, limit: u32, said: Option<u64>) {
        let guess = (request_tokens_max(refused).saturating_add(u64::from(limit)) / 4).saturating_mul(3);
        let window = said.unwrap_or(guess).max(1).min(self.window(candidate));
        let mut windows = self.0.windows.lock().unwrap_or_else(PoisonError::into_inner);
        windows.insert((candidate.provider.clone(), candidate.model.clone()), window);
    }
}

/// An answer, held against what was asked for.
enum Judged {
    Reply(Reply),
    Unusable(Unusable),
}

/// Why a request brought nothing.
enum Interrupted {
    /// The engine or its hook said no.
    Engine(Failure),
    /// The model has no price.
    Unpriced(String),
    Provider(Box<ProviderError>),
}

impl From<Failure> for Interrupted {
    fn from(failure: Failure) -> Self {
        Self::Engine(failure)
    }
}

fn output_limit(candidate: &Candidate, asked: u32) -> u32 {
    asked.saturating_add(candidate.thinking_tokens).min(candidate.max_output_tokens).max(1)
}

fn opened(provider: &dyn Provider, candidate: &Candidate, request: &Request, limit: u32) -> CallOpened {
    let key = provider.key();
    let sent = json!({ "provider": candidate.provider, "model": candidate.model, "limit": limit, "request": request });
    CallOpened {
        provider: candidate.provider.clone(),
        model: candidate.model.clone(),
        purpose: request.purpose.clone(),
        request_sha256: hex(&Sha256::digest(sent.to_string().as_bytes())),
        key_fingerprint: key.fingerprint,
        key_last4: key.last4,
        input_tokens_max: request_tokens_max(request),
        output_tokens_max: u64::from(limit),
    }
}

fn closed_well(completion: &Completion, request_id: &RequestIdSlot) -> CallClosed {
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

fn closed_badly(error: &ProviderError, request_id: &RequestIdSlot) -> CallClosed {
    CallClosed {
        state: error.state,
        model_served: error.model_served.clone(),
        provider_request_id: request_id.get(),
        http_status: error.http_status,
        error_class: Some(error.failure.code.clone()),
        finish_reason: error.finish_reason.clone(),
        stream_completed: error.stream_completed,
        usage: error.usage.clone(),
    }
}

fn judge(task: &Task<'_>, candidate: &Candidate, completion: &Completion) -> Judged {
    let json = match &task.shape {
        // A model that calls tools first will answer later.
        Some(shape) if completion.tool_calls.is_empty() => match shape.read(&completion.text) {
            Ok(json) => Some(json),
            Err(errors) => {
                return Judged::Unusable(Unusable {
                    provider: candidate.provider.clone(),
                    model: candidate.model.clone(),
                    text: recordable(&completion.text).chars().take(REPAIR_CHARS_MAX).collect(),
                    errors: errors.iter().map(|error| recordable(error)).collect(),
                });
            }
        },
        _ => None,
    };
    let tool_calls = completion.tool_calls.iter().cloned();
    Judged::Reply(Reply {
        text: recordable(&completion.text),
        json: json.map(without_nul),
        tool_calls: tool_calls.map(|call| ToolCall { arguments: without_nul(call.arguments), ..call }).collect(),
        parts: without_nul(completion.parts.clone()),
        provider: candidate.provider.clone(),
        model: completion.model_served.clone(),
        tokens_prompt: completion.usage.tokens_prompt,
        tokens_output: completion.usage.tokens_output,
    })
}

/// A text as Postgres takes it: an answer with a NUL would be paid for and could not be recorded, again and again.
fn recordable(text: &str) -> String {
    text.replace('\0', "\u{2400}")
}

fn without_nul(value: Value) -> Value {
    match value {
        Value::String(text) => Value::String(recordable(&text)),
        Value::Array(items) => items.into_iter().map(without_nul).collect(),
        Value::Object(fields) => {
            fields.into_iter().map(|(name, value)| (recordable(&name), without_nul(value))).collect()
        }
        other => other,
    }
}

/// Most of an unusable answer that is kept and shown to the model again, in characters.
const REPAIR_CHARS_MAX: usize = 8_000;

fn append_repair(request: &mut Request, text: &str, errors: &[String]) {
    if !text.trim().is_empty() {
        request.messages.push(Message::Model {
            text: text.to_owned(),
            tool_calls: vec![],
            parts: Value::Null,
            provider: String::new(),
        });
    }
    let text = format!(
        "This answer cannot be used:\n- {}\nAnswer again, completely, with exactly one JSON value that satisfies the \
         required schema, and nothing else.",
        errors.join("\n- ")
    );
    request.messages.push(Message::User { text });
}

/// Updates the breaker and the metrics.
fn observe(service: &Service, candidate: &Candidate, result: &Result<Completion, ProviderError>, elapsed: Duration) {
    let now = Instant::now();
    let outcome = match result {
        Ok(_) => {
            service.breaker.well();
            "ok".to_owned()
        }
        Err(error) => {
            match (error.failure.kind, error.failure.code.as_str()) {
                (FailureKind::Cancelled, _) => {}
                (_, "provider.key_invalid" | "provider.no_balance") => {
                    service.breaker.account_refused(now, error.failure.clone());
                }
                _ if error.unwell => service.breaker.unwell(now),
                _ => service.breaker.well(),
            }
            error.failure.code.clone()
        }
    };
    let labels = [("provider", candidate.provider.clone()), ("model", candidate.model.clone()), ("outcome", outcome)];
    metrics::counter!("loopwright_model_requests_total", &labels).increment(1);
    metrics::histogram!("loopwright_model_request_seconds", &labels).record(elapsed.as_secs_f64());
}

/// The failure with the names of its provider and model in its detail.
fn named(mut failure: Failure, candidate: &Candidate) -> Failure {
    if !failure.detail.is_object() {
        failure.detail = json!({});
    }
    failure.detail["provider"] = json!(candidate.provider);
    failure.detail["model"] = json!(candidate.model);
    failure
}

/// One failure for several candidates: while one of them may still answer later, that is what counts, and the
/// soonest; otherwise the best candidate's reason. The others are in the detail.
fn verdict_over(failures: Vec<Failure>) -> Failure {
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

fn to_value<T: serde::Serialize>(value: &T) -> Result<Value, Failure> {
    serde_json::to_value(value)
        .map_err(|error| Failure::permanent("model.record_unreadable", format!("a record cannot be written: {error}")))
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Half to one and a half of `duration`, so that workers that failed together do not come back together.
fn jittered(duration: Duration) -> Duration {
    let [byte, ..] = *uuid::Uuid::new_v4().as_bytes();
    duration / 2 + duration.mul_f64(f64::from(byte) / 255.0)
}
