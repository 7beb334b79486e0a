//! Who can be asked: the candidates of a role, and whose keys serve them.

use super::{
    super::{Request, Role, own::Own, platform, route::Candidate},
    Choice, Orchestrator,
    pack::output_limit,
};
use crate::usage::PlannedCall;
use loopwright_engine::{
    Failure,
    activity::{AttemptInfo, Context},
};
use serde_json::Value;
use std::sync::Arc;

impl Orchestrator {
    /// Candidates of a role as (provider, model), for `Activity::reserve`.
    #[must_use]
    pub fn candidates(&self, role: Role) -> Vec<(String, String)> {
        self.configured_for(role).map(|candidate| (candidate.provider.clone(), candidate.model.clone())).collect()
    }

    /// `count` calls with a role for a purpose as `Activity::reserve` states them, room for thinking included: of those who would be
    /// asked, which are the models that the definition names in its `extras`, and else the routing's.
    #[must_use]
    pub fn planned(
        &self,
        (role, purpose): (Role, &str),
        extras: &Value,
        count: u32,
        input_tokens: u64,
        output_tokens: u32,
    ) -> PlannedCall {
        let mut list = self.listed(role, extras);
        list.retain(|candidate| self.serves(&candidate.provider) && is_for(candidate, purpose));
        let output = list.iter().map(|candidate| output_limit(candidate, output_tokens)).max().unwrap_or(output_tokens);
        PlannedCall {
            ceilings: list.iter().map(|candidate| (candidate.input_umtok_max, candidate.output_umtok_max)).collect(),
            candidates: list.into_iter().map(|candidate| (candidate.provider, candidate.model)).collect(),
            count,
            input_tokens,
            output_tokens: u64::from(output),
        }
    }

    /// The candidates of a role for runs of a definition with these extras.
    fn listed(&self, role: Role, extras: &Value) -> Vec<Candidate> {
        let routing = &self.0.routing;
        let overridden = (!self.is_rehearsed()).then(|| routing.overridden(role, extras)).flatten();
        overridden.unwrap_or_else(|| routing.candidates(role).to_vec())
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
            tokio::time::sleep(platform::AGE_MAX).await;
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
    pub(super) async fn own(&self, info: &AttemptInfo) -> Result<Option<Arc<Own>>, Failure> {
        let user = info.attributes.get("user_id").and_then(Value::as_str).and_then(|id| uuid::Uuid::parse_str(id).ok());
        match (&self.0.owners, user) {
            (Some(owners), Some(user)) if !self.is_rehearsed() => owners.of(user).await,
            _ => Ok(None),
        }
    }

    pub(super) fn usable(&self, ctx: &Context, request: &Request, own: Option<&Own>) -> Vec<Choice> {
        let listed = self.listed(request.role, &ctx.info().extras);
        let mut list: Vec<Choice> = Vec::new();
        if let Some(own) = own {
            let mine = own.candidates(&listed).into_iter();
            list.extend(mine.map(|(candidate, lane)| Choice { candidate, own: Some(lane) }));
        }
        if own.is_none_or(|own| own.platform_fallback) {
            let served = listed.into_iter().filter(|c| self.serves(&c.provider));
            list.extend(served.map(|candidate| Choice { candidate, own: None }));
        }
        list.retain(|Choice { candidate, .. }| {
            (candidate.tools || request.tools.is_empty()) && is_for(candidate, &request.purpose)
        });
        list
    }

    pub(super) fn no_candidate(&self, role: Role) -> Failure {
        let message = if !self.is_served() {
            "no model provider is configured: set GEMINI_API_KEY, OPENROUTER_API_KEY or OPENAI_BASE_URL".to_owned()
        } else {
            format!("no configured provider has a model for the role {}: set {}", role.name(), role.setting())
        };
        Failure::permanent("model.unavailable", message)
    }
}

/// Whether a candidate is asked for this purpose.
fn is_for(candidate: &Candidate, purpose: &str) -> bool {
    candidate.tasks.is_empty() || candidate.tasks.iter().any(|task| task == purpose)
}
