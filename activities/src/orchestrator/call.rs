//! The coordinator: one call of an activity becomes as many requests as it takes, each of them announced before it is
//! sent and closed with what became of it.

mod answer;
mod failure;
mod keys;

use super::{
    Question, Reply, Request, Role,
    breaker::OPEN_FOR,
    budget,
    own::{Own, Owners},
    platform::Sealed,
    route::{Candidate, Routing},
    service::{Pool, Running, Slot},
    structured::Shape,
};
use crate::{
    keys::{Board, Keys, Rates},
    provider::{
        Advice, Call, Completion, Provider, ProviderError, RequestIdSlot, Settings,
        estimate::{request_bytes, request_tokens_max},
        hex,
        settings::{PROVIDERS, SettingsError},
    },
    usage::{CallClosed, CallNoted, CallOpened, CallState, PlannedCall},
};
use answer::{Judged, Unusable, append_repair, judge, unreadable};
use failure::{BUDGET_PER_MINUTE, is_out, is_passing, named, outward, to_its_owner, uncounted, verdict_over};
use keys::Refused;
use loopwright_engine::{
    Failure, FailureKind,
    activity::{AttemptInfo, Context},
    ids::AttemptId,
};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::{
    collections::{BTreeMap, VecDeque},
    future::Future,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

/// Requests to one candidate within a call: the second cures most passing faults, a third is a storm.
pub const TRIES_PER_CANDIDATE: u32 = 2;
/// Smaller packings of its question that a candidate is asked after it said that the prompt does not fit: the last is less than
/// a fifth of the first.
pub const PACKINGS_MAX: u32 = 3;
/// Why the ledger's hook refuses a call of a model without a price.
const PRICE_MISSING: &str = "price_missing";
/// Why it refuses a call of a model that has become dearer than its line in the routing allows.
const PRICE_ABOVE_CEILING: &str = "price_above_ceiling";
/// Attempts of a step of which a lost answer does not count: what may have been billed is bought again at the platform's cost, so
/// that an outage of minutes ends no run. Later ones count, so a question is lost at most so often and as often as the step's
/// policy says. Chosen: with delays that double, two minutes before it counts.
const LOST_UNCOUNTED: u32 = 5;
/// Most calls that failed whose request counts are remembered: many times what a worker runs at once.
const COUNTS_MAX: usize = 4_096;

/// How long the orchestrator waits; [`Default`] is what production uses, tests make it short.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pace {
    /// Wait before the second try where the provider names none, with jitter of half of it either way.
    pub backoff: Duration,
    /// Longest wait inside a call; beyond it the attempt ends with `retry_after_ms` and frees its worker. A provider that keeps
    /// failing is left alone for as long.
    pub wait_max: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self { backoff: Duration::from_secs(1), wait_max: OPEN_FOR }
    }
}

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
    /// An orchestrator over the candidates of `routing` whose provider is among `providers`.
    #[must_use]
    pub fn new(routing: Routing, providers: Vec<Arc<dyn Provider>>) -> Self {
        Self::with_pace(routing, providers, Pace::default())
    }

    /// As [`Orchestrator::new`], with other waits.
    #[must_use]
    pub fn with_pace(routing: Routing, providers: Vec<Arc<dyn Provider>>, pace: Pace) -> Self {
        Self::build(routing, providers, pace, None)
    }

    /// As [`Orchestrator::with_pace`], with keys that all workers share: their standing, their budgets per minute, and those
    /// of users, whose clients are made with `settings`.
    #[must_use]
    pub fn with_keys(
        routing: Routing,
        providers: Vec<Arc<dyn Provider>>,
        pace: Pace,
        keys: &Keys,
        settings: Settings,
    ) -> Self {
        Self::build(routing, providers, pace, Some((keys, settings)))
    }

    fn build(routing: Routing, providers: Vec<Arc<dyn Provider>>, pace: Pace, keys: Option<(&Keys, Settings)>) -> Self {
        let mut slots: BTreeMap<&'static str, Vec<Arc<Slot>>> = BTreeMap::new();
        for provider in providers {
            slots.entry(provider.name()).or_default().push(Arc::new(Slot::platform(provider)));
        }
        if keys.is_some() {
            // The platform may keep sealed keys for any of them, also later.
            for name in PROVIDERS {
                slots.entry(name).or_default();
            }
        }
        let pools: BTreeMap<&'static str, Pool> =
            slots.into_iter().map(|(name, slots)| (name, Pool::new(slots))).collect();
        let names: Vec<&str> = pools.keys().copied().collect();
        let sealed = keys.as_ref().map(|(keys, settings)| Sealed::new((*keys).clone(), settings.clone(), &pools));
        let routing = routing.with_all_limits();
        let inner = Inner {
            // A user's keys may serve providers that are not configured.
            routing: if keys.is_some() { routing } else { routing.only(&names) },
            pools,
            pace,
            board: keys.as_ref().map(|(keys, _)| keys.board()).unwrap_or_default(),
            rates: keys.as_ref().map(|(keys, _)| keys.rates()),
            sealed,
            owners: keys.map(|(keys, settings)| Owners::new(keys.clone(), settings)),
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
    /// # Transaction
    /// With `keys`, the rows of the platform's keys are written where they are missing.
    pub async fn configured(routing: Routing, settings: &Settings, keys: Option<&Keys>) -> Result<Self, SettingsError> {
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
        let (routing, providers) = (routing.with_settings(settings, offered.as_ref()), settings.providers()?);
        let Some(keys) = keys else { return Ok(Self::new(routing, providers)) };
        let identities = providers.iter().map(|provider| (provider.name().to_owned(), provider.key()));
        let rows: Vec<_> = identities.map(|(name, key)| (name, key.fingerprint, key.last4)).collect();
        if let Err(error) = keys.board().register(&rows).await {
            tracing::warn!(%error, "keys are not listed before their first call");
        }
        let orchestrator = Self::with_keys(routing, providers, Pace::default(), keys, settings.clone());
        orchestrator.refresh_keys().await;
        Ok(orchestrator)
    }

    /// One model call with fallback over the candidates of its role.
    ///
    /// # Shape
    /// `key` names the call inside its step and is stable over attempts: an answer recorded under it is returned and
    /// nothing is bought. Request `k` of attempt `a` is metered as `<key>.a<a>.<k>`; the answer is the checkpoint
    /// `call:<key>`; an answer without the required shape is the checkpoint `call:<key>~unusable.<a>.<n>`. A candidate whose window
    /// is too small, or that says so, is asked with a smaller packing of the same question before another one is.
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
        let mut unusable = None;
        // Only a former attempt can have left one that this one does not know.
        if ctx.info().attempt > 1 {
            unusable = Unusable::recorded(ctx, key, 1).await?;
            if let (Some(_), Some(second)) = (&unusable, Unusable::recorded(ctx, key, 2).await?) {
                return Err(second.twice());
            }
        }
        if let Some(first) = &unusable {
            choices.sort_by_key(|choice| !first.is_from(&choice.candidate));
        }
        let task = Task { ctx, key, saved, question, shape, own };
        let mut progress = Progress { requests: self.requests_so_far(ctx, key), unusable, ..Progress::default() };
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

    /// Candidates of a role as (provider, model), for `Activity::reserve`.
    #[must_use]
    pub fn candidates(&self, role: Role) -> Vec<(String, String)> {
        self.configured_for(role).map(|candidate| (candidate.provider.clone(), candidate.model.clone())).collect()
    }

    /// `count` calls with a role as `Activity::reserve` states them, room for thinking included.
    #[must_use]
    pub fn planned(&self, role: Role, count: u32, input_tokens: u64, output_tokens: u32) -> PlannedCall {
        let output = self
            .configured_for(role)
            .map(|candidate| output_limit(candidate, output_tokens))
            .max()
            .unwrap_or(output_tokens);
        PlannedCall { candidates: self.candidates(role), count, input_tokens, output_tokens: u64::from(output) }
    }

    /// Whether answers come from a script and from nowhere else.
    #[must_use]
    pub fn is_rehearsed(&self) -> bool {
        let mut served = self.0.pools.iter().filter(|(_, pool)| !pool.is_empty()).map(|(name, _)| *name).peekable();
        served.peek().is_some() && served.all(|name| name == "rehearsed")
    }

    /// Whether the platform has a key, or a server that needs none, for any provider now.
    #[must_use]
    pub fn is_served(&self) -> bool {
        self.0.pools.values().any(|pool| !pool.is_empty())
    }

    fn serves(&self, provider: &str) -> bool {
        self.0.pools.get(provider).is_some_and(|pool| !pool.is_empty())
    }

    /// Keeps the platform's sealed keys known while no call does: estimates name who is served. Never ends.
    pub async fn keep_keys(&self) -> std::convert::Infallible {
        loop {
            self.refresh_keys().await;
            tokio::time::sleep(super::platform::AGE_MAX).await;
        }
    }

    /// Reads the platform's sealed keys, if what is known of them is old. What cannot be read or opened is told in the log;
    /// the others go on.
    pub async fn refresh_keys(&self) {
        if let Some(sealed) = &self.0.sealed {
            sealed.refresh(&self.0.pools).await;
        }
    }

    /// The candidates of a role that the platform's keys serve.
    fn configured_for(&self, role: Role) -> impl Iterator<Item = &Candidate> {
        let list = self.0.routing.candidates(role).iter();
        list.filter(|candidate| self.serves(&candidate.provider))
    }

    /// What the run's user has brought.
    async fn own(&self, info: &AttemptInfo) -> Result<Option<Arc<Own>>, Failure> {
        let user = info.attributes.get("user_id").and_then(Value::as_str).and_then(|id| uuid::Uuid::parse_str(id).ok());
        match (&self.0.owners, user) {
            (Some(owners), Some(user)) if !self.is_rehearsed() => owners.of(user).await,
            _ => Ok(None),
        }
    }

    fn usable(&self, ctx: &Context, request: &Request, own: Option<&Own>) -> Vec<Choice> {
        let routing = &self.0.routing;
        let overridden = (!self.is_rehearsed()).then(|| routing.overridden(request.role, &ctx.info().extras)).flatten();
        let listed = overridden.unwrap_or_else(|| routing.candidates(request.role).to_vec());
        let mut list: Vec<Choice> = Vec::new();
        if let Some(own) = own {
            list.extend(own.candidates(&listed).into_iter().map(|candidate| Choice { candidate, own: true }));
        }
        if own.is_none_or(|own| own.platform_fallback) {
            let served = listed.into_iter().filter(|c| self.serves(&c.provider));
            list.extend(served.map(|candidate| Choice { candidate, own: false }));
        }
        list.retain(|Choice { candidate, .. }| {
            (candidate.tools || request.tools.is_empty())
                && (candidate.tasks.is_empty() || candidate.tasks.contains(&request.purpose))
        });
        list
    }

    fn no_candidate(&self, role: Role) -> Failure {
        let message = if !self.is_served() {
            "no model provider is configured: set GEMINI_API_KEY, OPENROUTER_API_KEY or OPENAI_BASE_URL".to_owned()
        } else {
            format!("no configured provider has a model for the role {}: set {}", role.name(), role.setting())
        };
        Failure::permanent("model.unavailable", message)
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
            let admitted = loop {
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
            drop(admitted);
            let mut error = match outcome {
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

    /// One request, from its announcement to its closed reading.
    #[allow(clippy::too_many_arguments)]
    async fn request(
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
        let opened = opened(&running.slot, candidate, request, limit);
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
            cancellation: ctx.cancellation(),
            request_id: &request_id,
        });
        let result = noting(ctx, &meter_key, &request_id, completing).await;
        observe(running, candidate, &result, started.elapsed(), self.0.pace.wait_max);
        let result = result
            .map_err(|error| if running.slot.own_id().is_some() { to_its_owner(error, candidate) } else { error });
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

    /// Stores a reading. The engine insists while its store is away: an answer that has been paid for is not lost.
    async fn close(
        &self,
        ctx: &Context,
        key: &str,
        closed: &CallClosed,
        checkpoint: Option<(&str, &Value)>,
    ) -> Result<(), Interrupted> {
        ctx.meter_close(key, &to_value(closed)?, checkpoint).await.map_err(Interrupted::Engine)
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

    /// For this model and the life of the process: what a server said of its window, or what it accepted after it had refused more.
    fn learn_window(&self, candidate: &Candidate, window: u64) {
        let window = window.max(1).min(self.window(candidate));
        let mut windows = self.0.windows.lock().unwrap_or_else(PoisonError::into_inner);
        windows.insert((candidate.provider.clone(), candidate.model.clone()), window);
    }
}

/// The window to pack a refused question for: what the server `said`, or so much that the prompt loses a quarter, after the first
/// time half, where it did not say or counts more tokens than we do. `None` when nothing smaller can be asked.
fn narrower(question: &Question, refused: &Request, limit: u32, said: Option<u64>, first: bool) -> Option<u64> {
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
enum Interrupted {
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

fn output_limit(candidate: &Candidate, asked: u32) -> u32 {
    asked.saturating_add(candidate.thinking_tokens).min(candidate.max_output_tokens).max(1)
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
        usage: error.usage.as_deref().cloned(),
    }
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
    let labels = [("provider", candidate.provider.clone()), ("model", candidate.model.clone()), ("outcome", outcome)];
    metrics::counter!("loopwright_model_requests_total", &labels).increment(1);
    metrics::histogram!("loopwright_model_request_seconds", &labels).record(elapsed.as_secs_f64());
}

/// Waits inside a call; the run may end it.
async fn sleep(task: &Task<'_>, wait: Duration) -> Result<(), Failure> {
    tokio::select! {
        biased;
        () = task.ctx.cancellation().cancelled() => Err(Failure::cancelled()),
        () = tokio::time::sleep(wait) => Ok(()),
    }
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
