//! Which models may serve a role: data from `workflow-defs/models.yaml`, overrides by settings and by the definition.

use super::Role;
use crate::provider::{Settings, StructuredOutput, openai_compatible::OfferedModel, settings::role_setting};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;

/// Most candidates of a role: two tries each, it bounds the requests of one call.
pub const CANDIDATES_MAX: usize = 8;
/// Largest routing file, in bytes: many times what eight models in three roles need.
const FILE_BYTES_MAX: usize = 256 * 1024;
/// Context window assumed for a model that only a setting names, in tokens. Chosen: the smallest of today's large models.
const CONTEXT_TOKENS_DEFAULT: u64 = 128_000;
/// Output limit assumed for a model that only a setting names, in tokens. Chosen: what local servers grant.
const OUTPUT_TOKENS_DEFAULT: u32 = 8_192;
/// Context window assumed for a user's own server, in tokens; one that is smaller says so, and is believed.
const OWN_CONTEXT_TOKENS: u64 = 32_768;
/// Context window assumed for an OpenAI-compatible server of which nothing is known, in tokens.
const LOCAL_CONTEXT_TOKENS_DEFAULT: u64 = 16_384;

/// The file that the product ships.
const SHIPPED: &str = include_str!("../../../workflow-defs/models.yaml");

/// A model that may serve a role, with its limits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Candidate {
    /// Name of its provider.
    pub provider: String,
    /// As the provider spells it.
    pub model: String,
    /// Window for prompt and answer together. 0, as the one below: what the price list says, else a careful guess.
    #[serde(default)]
    pub context_tokens: u64,
    /// Most that one answer may hold, thinking included.
    #[serde(default)]
    pub max_output_tokens: u32,
    #[serde(default)]
    pub structured_output: StructuredOutput,
    /// Whether it can call tools.
    #[serde(default = "yes")]
    pub tools: bool,
    /// How much it may think, in the provider's words.
    #[serde(default)]
    pub thinking: Option<String>,
    /// Room added to each output limit for thinking.
    #[serde(default)]
    pub thinking_tokens: u32,
    /// Requests that one key of the platform may make of it in any 60 seconds, over all workers.
    #[serde(default)]
    pub requests_per_minute: Option<u32>,
    /// Prompt tokens likewise.
    #[serde(default)]
    pub tokens_per_minute: Option<u64>,
    /// What it is asked for (`plan`, `implement`, …, as in `Request::purpose`); empty: everything.
    #[serde(default)]
    pub tasks: Vec<String>,
    /// Dearest price of input at which it is used, in micro-USD per million tokens as in `model_pricing`.
    #[serde(default)]
    pub input_umtok_max: Option<u64>,
    /// The same of output, thinking included.
    #[serde(default)]
    pub output_umtok_max: Option<u64>,
}

/// Limits of models by provider and name, from the price list: window and longest answer, in tokens.
pub type ListedLimits = BTreeMap<(String, String), (u64, u32)>;

fn yes() -> bool {
    true
}

/// A routing file that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RoutingError {
    #[error("the routing file exceeds {FILE_BYTES_MAX} bytes")]
    TooLarge,
    /// The parser's text, with line and column.
    #[error("the routing file is not valid: {0}")]
    Invalid(String),
    #[error("role {0}: more than {CANDIDATES_MAX} candidates")]
    TooMany(String),
    #[error("role {role}, candidate {model}: {problem}")]
    Candidate { role: String, model: String, problem: &'static str },
}

/// Candidates by role, in order of preference.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Routing {
    pub roles: BTreeMap<Role, Vec<Candidate>>,
}

impl Routing {
    /// Reads and checks a routing file.
    ///
    /// # Errors
    /// It is too large, not valid, or names impossible limits.
    pub fn from_yaml(text: &str) -> Result<Self, RoutingError> {
        if text.len() > FILE_BYTES_MAX {
            return Err(RoutingError::TooLarge);
        }
        let options = serde_yaml::options! {
            strict_booleans: true,
            budget: serde_yaml::budget! { max_depth: 16, max_nodes: 5_000, max_documents: 1 },
        };
        let routing: Self =
            serde_yaml::from_str_with_options(text, options).map_err(|e| RoutingError::Invalid(e.to_string()))?;
        for (role, candidates) in &routing.roles {
            if candidates.len() > CANDIDATES_MAX {
                return Err(RoutingError::TooMany(role.name().to_owned()));
            }
            for candidate in candidates {
                let problem = if candidate.model.is_empty() {
                    "it has no model"
                } else if !["gemini", "openrouter", "openai_compatible", "rehearsed"]
                    .contains(&candidate.provider.as_str())
                {
                    "its provider is unknown"
                } else if (candidate.max_output_tokens == 0) != (candidate.context_tokens == 0) {
                    "one limit is 0 or missing: give both, or leave both to the price list"
                } else if candidate.has_limits() && u64::from(candidate.max_output_tokens) >= candidate.context_tokens {
                    "its window has no room for a prompt besides the longest answer"
                } else if candidate.requests_per_minute == Some(0) || candidate.tokens_per_minute == Some(0) {
                    "a budget per minute is 0: leave it out, or leave the candidate out"
                } else if candidate.input_umtok_max == Some(0) || candidate.output_umtok_max == Some(0) {
                    "its price ceiling is 0: leave it out, or leave the candidate out"
                } else {
                    continue;
                };
                return Err(RoutingError::Candidate {
                    role: role.name().to_owned(),
                    model: format!("{}/{}", candidate.provider, candidate.model),
                    problem,
                });
            }
        }
        Ok(routing)
    }

    /// The routing that the product ships.
    #[must_use]
    pub fn shipped() -> Self {
        Self::from_yaml(SHIPPED).expect("a test reads the shipped file")
    }

    /// Every role served by the rehearsed model of its name.
    #[must_use]
    pub fn rehearsed() -> Self {
        let candidate = |role: Role| Candidate {
            provider: "rehearsed".to_owned(),
            model: format!("rehearsed/{}", role.name()),
            context_tokens: 1_000_000,
            max_output_tokens: 65_536,
            structured_output: StructuredOutput::JsonSchema,
            tools: true,
            thinking: None,
            thinking_tokens: 0,
            requests_per_minute: None,
            tokens_per_minute: None,
            tasks: vec![],
            input_umtok_max: None,
            output_umtok_max: None,
        };
        Self { roles: Role::ALL.into_iter().map(|role| (role, vec![candidate(role)])).collect() }
    }

    /// This routing with the models that settings name put first, and with what an OpenAI-compatible server offers
    /// put last where no line names it.
    #[must_use]
    pub fn with_settings(mut self, settings: &Settings, offered: Option<&OfferedModel>) -> Self {
        for role in Role::ALL {
            let candidates = self.roles.entry(role).or_default();
            if settings.openai_compatible.is_some() {
                let local = |model: &str, context_tokens: u64| {
                    let context_tokens = settings.openai_context_tokens.unwrap_or(context_tokens);
                    named("openai_compatible", model, Some(context_tokens))
                };
                let known = candidates.iter().any(|c| c.provider == "openai_compatible");
                match (&settings.openai_model, offered) {
                    (Some(model), _) => put_first(candidates, local(model, LOCAL_CONTEXT_TOKENS_DEFAULT)),
                    (None, Some(offered)) if !known => candidates.push(local(&offered.id, offered.context_tokens)),
                    _ => {}
                }
            }
            if let Some(reference) = settings.role_models.get(&role) {
                let candidate = self::reference(reference, settings.openai_context_tokens);
                put_first(candidates, candidate);
            }
            candidates.truncate(CANDIDATES_MAX);
        }
        self
    }

    /// This routing with the limits of the price list where neither its file nor a server has named any.
    #[must_use]
    pub fn with_listed_limits(mut self, listed: &ListedLimits) -> Self {
        for candidate in self.roles.values_mut().flatten().filter(|candidate| !candidate.has_limits()) {
            let known = listed.get(&(candidate.provider.clone(), candidate.model.clone()));
            if let Some((context_tokens, max_output_tokens)) = known.filter(|(context, _)| *context > 1) {
                candidate.limit_to(*context_tokens, *max_output_tokens);
            }
        }
        self
    }

    /// This routing with a careful guess where nobody knows the limits of a model.
    #[must_use]
    pub fn with_all_limits(mut self) -> Self {
        for candidate in self.roles.values_mut().flatten().filter(|candidate| !candidate.has_limits()) {
            candidate.limit_to(CONTEXT_TOKENS_DEFAULT, OUTPUT_TOKENS_DEFAULT);
        }
        self
    }

    /// The candidates of a role that a definition names for itself under `models`, a list of `<provider>/<model>`.
    /// Limits come from this routing where it knows the model. `None` when the definition says nothing.
    #[must_use]
    pub fn overridden(&self, role: Role, extras: &Value) -> Option<Vec<Candidate>> {
        let names = match extras.get("models")?.get(role.name())? {
            Value::Array(list) => list.iter().filter_map(Value::as_str).collect(),
            Value::String(one) => vec![one.as_str()],
            _ => return None,
        };
        let known = |name: &str| {
            let all = self.roles.get(&role).into_iter().chain(self.roles.values()).flatten();
            all.into_iter().find(|c| format!("{}/{}", c.provider, c.model) == name || c.model == name).cloned()
        };
        let list: Vec<Candidate> = names
            .iter()
            .take(CANDIDATES_MAX)
            .map(|name| known(name).unwrap_or_else(|| reference(name, None)).limited())
            .collect();
        (!list.is_empty()).then_some(list)
    }

    /// Keeps the candidates whose provider is configured.
    #[must_use]
    pub fn only(mut self, providers: &[&str]) -> Self {
        for candidates in self.roles.values_mut() {
            candidates.retain(|candidate| providers.contains(&candidate.provider.as_str()));
        }
        self
    }

    /// The candidates of a role, best first.
    #[must_use]
    pub fn candidates(&self, role: Role) -> &[Candidate] {
        self.roles.get(&role).map(Vec::as_slice).unwrap_or_default()
    }
}

impl Candidate {
    fn has_limits(&self) -> bool {
        self.context_tokens > 0
    }

    /// Half of a small window stays free for the prompt.
    fn limit_to(&mut self, context_tokens: u64, max_output_tokens: u32) {
        let half = u32::try_from((context_tokens / 2).max(1)).unwrap_or(u32::MAX);
        self.context_tokens = context_tokens.max(2);
        self.max_output_tokens = max_output_tokens.clamp(1, half);
    }

    /// With a careful guess where nobody knows its limits.
    fn limited(mut self) -> Self {
        if !self.has_limits() {
            self.limit_to(CONTEXT_TOKENS_DEFAULT, OUTPUT_TOKENS_DEFAULT);
        }
        self
    }
}

impl Role {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Architect, Self::Implementer, Self::Utility];

    /// As it is spelled in files and messages.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Architect => "architect",
            Self::Implementer => "implementer",
            Self::Utility => "utility",
        }
    }

    /// The setting that names a model for this role.
    #[must_use]
    pub fn setting(self) -> &'static str {
        role_setting(self)
    }
}

/// A candidate from `<provider>/<model>`; without a known provider in front, a model of the OpenAI-compatible server.
fn reference(text: &str, local_context_tokens: Option<u64>) -> Candidate {
    match text.split_once('/') {
        Some((provider @ ("gemini" | "openrouter" | "rehearsed"), model)) => named(provider, model, None),
        Some(("openai_compatible" | "openai", model)) => {
            named("openai_compatible", model, Some(local_context_tokens.unwrap_or(LOCAL_CONTEXT_TOKENS_DEFAULT)))
        }
        _ => named("openai_compatible", text, Some(local_context_tokens.unwrap_or(LOCAL_CONTEXT_TOKENS_DEFAULT))),
    }
}

/// A candidate of which only the name is known, and perhaps its window.
fn named(provider: &str, model: &str, context_tokens: Option<u64>) -> Candidate {
    let mut candidate = Candidate {
        provider: provider.to_owned(),
        model: model.to_owned(),
        context_tokens: 0,
        max_output_tokens: 0,
        structured_output: StructuredOutput::JsonSchema,
        tools: true,
        thinking: None,
        thinking_tokens: 0,
        requests_per_minute: None,
        tokens_per_minute: None,
        tasks: vec![],
        input_umtok_max: None,
        output_umtok_max: None,
    };
    if let Some(context_tokens) = context_tokens {
        candidate.limit_to(context_tokens, OUTPUT_TOKENS_DEFAULT);
    }
    candidate
}

/// A candidate that a user's own key names.
pub(super) fn own_candidate(provider: &str, model: &str) -> Candidate {
    let local = provider == "openai_compatible";
    named(provider, model, Some(if local { OWN_CONTEXT_TOKENS } else { CONTEXT_TOKENS_DEFAULT }))
}

/// Puts a candidate first; limits that the list knows for it are kept.
fn put_first(candidates: &mut Vec<Candidate>, candidate: Candidate) {
    let known = candidates.iter().position(|c| c.provider == candidate.provider && c.model == candidate.model);
    let candidate = known.map(|at| candidates.remove(at)).unwrap_or(candidate);
    candidates.insert(0, candidate);
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn settings(pairs: &[(&str, &str)]) -> Settings {
        Settings::from_lookup(&|name| pairs.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned())).unwrap()
    }
    fn names(routing: &Routing, role: Role) -> Vec<String> {
        routing.candidates(role).iter().map(|c| format!("{}/{}", c.provider, c.model)).collect()
    }

    #[test]
    fn the_shipped_file_serves_every_role_with_each_key() {
        let shipped = Routing::shipped();
        for role in Role::ALL {
            for provider in ["gemini", "openrouter"] {
                assert!(!shipped.clone().only(&[provider]).candidates(role).is_empty(), "{role:?} {provider}");
            }
        }
    }

    #[test]
    fn a_bad_file_is_refused_with_a_reason() {
        for (text, expected) in [
            ("roles: { boss: [] }", "not valid"),
            ("roles: { architect: [{ provider: gemini }] }", "not valid"),
            ("roles: { architect: [{ provider: gemini, model: m, input_umtok_max: dear }] }", "not valid"),
            ("roles: { architect: [{ provider: x, model: m, context_tokens: 9, max_output_tokens: 1 }] }", "provider"),
            (
                "roles: { architect: [{ provider: gemini, model: m, context_tokens: 9, max_output_tokens: 9 }] }",
                "window",
            ),
            (
                "roles: { architect: [{ provider: gemini, model: m, context_tokens: 9, max_output_tokens: 0 }] }",
                "limit",
            ),
            (
                "roles: { architect: [{ provider: gemini, model: m, context_tokens: 9, max_output_tokens: 1, requests_per_minute: 0 }] }",
                "per minute",
            ),
            ("roles: { architect: [{ provider: gemini, model: m, context_tokens: 9 }] }", "limit"),
            ("roles: { architect: [{ provider: gemini, model: m, input_umtok_max: 0 }] }", "ceiling"),
        ] {
            let error = Routing::from_yaml(text).unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    #[test]
    fn settings_put_models_first_and_a_local_server_last() {
        let local = settings(&[("OPENAI_BASE_URL", "http://127.0.0.1:1"), ("GEMINI_API_KEY", "k")]);
        let offered = OfferedModel { id: "tiny.gguf".into(), context_tokens: 4096 };
        let routing = Routing::shipped().with_settings(&local, Some(&offered)).only(&local.names());
        let last = routing.candidates(Role::Architect).last().unwrap();
        assert_eq!((last.model.as_str(), last.context_tokens, last.max_output_tokens), ("tiny.gguf", 4096, 2048));
        assert_eq!(names(&routing, Role::Architect)[0], "gemini/gemini-3.1-pro-preview");

        let chosen = settings(&[
            ("OPENAI_BASE_URL", "http://127.0.0.1:1"),
            ("GEMINI_API_KEY", "k"),
            ("OPENAI_MODEL", "mine"),
            ("LOOPWRIGHT_MODEL_UTILITY", "gemini/gemini-3.8-flash"),
            ("LOOPWRIGHT_MODEL_ARCHITECT", "org/model:tag"),
        ]);
        let routing = Routing::shipped().with_settings(&chosen, Some(&offered)).only(&chosen.names());
        assert_eq!(names(&routing, Role::Implementer)[0], "openai_compatible/mine");
        assert_eq!(names(&routing, Role::Architect)[0], "openai_compatible/org/model:tag");
        assert_eq!(names(&routing, Role::Utility)[0], "gemini/gemini-3.8-flash");
        assert_eq!(routing.candidates(Role::Utility)[0].context_tokens, 1_048_576, "limits of the file are kept");
    }

    #[test]
    fn limits_that_nobody_gives_come_from_the_price_list_and_else_are_guessed() {
        let file = "roles: { architect: [{ provider: gemini, model: listed }, { provider: gemini, model: unlisted },
            { provider: gemini, model: given, context_tokens: 900, max_output_tokens: 90 }, { provider: gemini, model: odd }] }";
        let chosen = settings(&[("GEMINI_API_KEY", "k"), ("LOOPWRIGHT_MODEL_ARCHITECT", "gemini/named")]);
        let all =
            [("listed", (1_000_000, 60_000)), ("named", (500_000, 50_000)), ("given", (1, 1)), ("odd", (100, 100))];
        let listed = all.into_iter().map(|(model, limits)| (("gemini".to_owned(), model.to_owned()), limits)).collect();
        let routing = Routing::from_yaml(file).unwrap().with_settings(&chosen, None).with_listed_limits(&listed);
        let routing = routing.with_settings(&chosen, None).with_all_limits();
        let limits: Vec<_> = routing
            .candidates(Role::Architect)
            .iter()
            .map(|c| (c.model.as_str(), c.context_tokens, c.max_output_tokens))
            .collect();
        assert_eq!(
            limits,
            [
                ("named", 500_000, 50_000),
                ("listed", 1_000_000, 60_000),
                ("unlisted", CONTEXT_TOKENS_DEFAULT, OUTPUT_TOKENS_DEFAULT),
                ("given", 900, 90),
                ("odd", 100, 50),
            ]
        );
    }

    #[test]
    fn a_definition_may_name_its_own_models() {
        let routing = Routing::shipped();
        let extras = json!({"models": {"implementer": ["openrouter/google/gemini-3.8-flash", "gemini/new"]}});
        let list = routing.overridden(Role::Implementer, &extras).unwrap();
        assert_eq!((list[0].provider.as_str(), list[0].context_tokens), ("openrouter", 1_048_576));
        assert_eq!((list[1].model.as_str(), list[1].context_tokens), ("new", CONTEXT_TOKENS_DEFAULT));
        assert_eq!(routing.overridden(Role::Architect, &extras), None);
        assert_eq!(routing.overridden(Role::Architect, &Value::Null), None);
    }
}
