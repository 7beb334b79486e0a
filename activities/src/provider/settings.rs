//! Which providers are configured, from names and values (environment and configuration file, merged by the caller).

use super::{
    FIRST_BYTE_TIMEOUT_LOCAL, Gemini, OpenAiCompatible, OpenRouter, Provider, Timeouts,
    address::{Trust, is_local, parse_base_url},
    gemini, openrouter,
};
use crate::orchestrator::Role;
use reqwest::Url;
use secrecy::SecretString;
use std::{collections::BTreeMap, sync::Arc};

/// Where the original of the OpenAI dialect lives.
pub const OPENAI_BASE_URL: &str = "https://api.openai.com/v1";

/// The providers that keys are for.
pub const PROVIDERS: [&str; 3] = ["gemini", "openrouter", "openai_compatible"];

/// A setting that cannot be used; the text names it and never holds its value.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{setting}: {problem}")]
pub struct SettingsError {
    pub setting: String,
    pub problem: String,
}

/// Most keys of one provider. Chosen: each costs a client with its connections in every worker.
pub const KEYS_MAX: usize = 16;

/// A provider with its keys and an address.
#[derive(Clone, Debug)]
pub struct Endpoint {
    pub base: Url,
    /// Without repetitions; none for a server that wants none.
    pub keys: Vec<SecretString>,
}

/// What is configured.
///
/// # Shape
/// Gemini and OpenRouter are there when their key is; an OpenAI-compatible server when its key or its base URL is.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    pub gemini: Option<Endpoint>,
    /// `v1beta` unless set.
    pub gemini_version: String,
    pub openrouter: Option<Endpoint>,
    pub openai_compatible: Option<Endpoint>,
    /// Addresses that are set, by provider, also without a key: sealed keys are sent there.
    pub bases: BTreeMap<&'static str, Url>,
    /// `OPENAI_MODEL`: for every role, on the OpenAI-compatible server.
    pub openai_model: Option<String>,
    /// `OPENAI_CONTEXT_TOKENS`: its context window.
    pub openai_context_tokens: Option<u64>,
    /// `LOOPWRIGHT_MODEL_<ROLE>`: `<provider>/<model>`, or a model of the OpenAI-compatible server.
    pub role_models: BTreeMap<Role, String>,
    pub timeouts: Timeouts,
}

impl Settings {
    /// Reads the settings through `lookup`; an empty value counts as unset.
    ///
    /// # Errors
    /// Names the setting and what is wrong with it.
    pub fn from_lookup(lookup: &dyn Fn(&str) -> Option<String>) -> Result<Self, SettingsError> {
        let get = |name: &str| lookup(name).map(|v| v.trim().to_owned()).filter(|v| !v.is_empty());
        let base = |name: &str, default: &str| {
            let text = get(name).unwrap_or_else(|| default.to_owned());
            parse_base_url(&text, Trust::Operator).map_err(|e| problem(name, &e.to_string()))
        };
        let keys = |name: &str| -> Result<Vec<SecretString>, SettingsError> {
            let several = format!("{name}S");
            let mut list: Vec<String> = get(name).into_iter().collect();
            for key in get(&several).unwrap_or_default().split(',').map(str::trim).filter(|key| !key.is_empty()) {
                if !list.iter().any(|known| known == key) {
                    list.push(key.to_owned());
                }
            }
            if list.len() > KEYS_MAX {
                return Err(problem(&several, &format!("more than {KEYS_MAX} keys")));
            }
            Ok(list.into_iter().map(SecretString::from).collect())
        };
        let keyed = |key: &str, url: &str, default: &str| -> Result<Option<Endpoint>, SettingsError> {
            let keys = keys(key)?;
            if keys.is_empty() {
                return Ok(None);
            }
            Ok(Some(Endpoint { base: base(url, default)?, keys }))
        };
        let openai_keys = keys("OPENAI_API_KEY")?;
        let openai_compatible = if !openai_keys.is_empty() || get("OPENAI_BASE_URL").is_some() {
            Some(Endpoint { base: base("OPENAI_BASE_URL", OPENAI_BASE_URL)?, keys: openai_keys })
        } else {
            None
        };
        let openai_context_tokens = match get("OPENAI_CONTEXT_TOKENS") {
            Some(text) => {
                let number = text.parse().ok().filter(|n| *n > 0);
                Some(number.ok_or_else(|| problem("OPENAI_CONTEXT_TOKENS", "it is not a number above 0"))?)
            }
            None => None,
        };
        let mut bases = BTreeMap::new();
        for (provider, name) in PROVIDERS.into_iter().zip(["GEMINI_BASE_URL", "OPENROUTER_BASE_URL", "OPENAI_BASE_URL"])
        {
            if get(name).is_some() {
                bases.insert(provider, base(name, "")?);
            }
        }
        let roles = [Role::Architect, Role::Implementer, Role::Utility];
        Ok(Self {
            bases,
            gemini: keyed("GEMINI_API_KEY", "GEMINI_BASE_URL", gemini::BASE_URL)?,
            gemini_version: get("GEMINI_API_VERSION").unwrap_or_else(|| gemini::VERSION_DEFAULT.to_owned()),
            openrouter: keyed("OPENROUTER_API_KEY", "OPENROUTER_BASE_URL", openrouter::BASE_URL)?,
            openai_compatible,
            openai_model: get("OPENAI_MODEL"),
            openai_context_tokens,
            role_models: roles.into_iter().filter_map(|role| Some((role, get(role_setting(role))?))).collect(),
            timeouts: Timeouts::default(),
        })
    }

    /// Whether no provider at all is configured.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.gemini.is_none() && self.openrouter.is_none() && self.openai_compatible.is_none()
    }

    /// Whether the OpenAI-compatible server is on this machine or its network: only there a price for every model (`*`) counts.
    #[must_use]
    pub fn openai_is_local(&self) -> bool {
        self.openai_compatible.as_ref().is_some_and(|endpoint| is_local(&endpoint.base))
    }

    /// Names of the configured providers.
    #[must_use]
    pub fn names(&self) -> Vec<&'static str> {
        [
            ("gemini", self.gemini.is_some()),
            ("openrouter", self.openrouter.is_some()),
            ("openai_compatible", self.openai_compatible.is_some()),
        ]
        .into_iter()
        .filter_map(|(name, configured)| configured.then_some(name))
        .collect()
    }

    /// The client of the OpenAI-compatible server, if one is configured, with its first key.
    ///
    /// # Errors
    /// Its key cannot be sent.
    pub fn openai_client(&self) -> Result<Option<OpenAiCompatible>, SettingsError> {
        let Some(endpoint) = &self.openai_compatible else { return Ok(None) };
        self.openai_with(endpoint, endpoint.keys.first()).map(Some)
    }

    fn openai_with(&self, endpoint: &Endpoint, key: Option<&SecretString>) -> Result<OpenAiCompatible, SettingsError> {
        let mut timeouts = self.timeouts;
        if is_local(&endpoint.base) {
            timeouts.first_byte = timeouts.first_byte.max(FIRST_BYTE_TIMEOUT_LOCAL);
        }
        OpenAiCompatible::new(endpoint.base.clone(), key, timeouts, Trust::Operator)
            .map_err(|e| problem("OPENAI_API_KEY", &e))
    }

    /// A client for every key of every configured provider.
    ///
    /// # Errors
    /// A key cannot be sent.
    pub fn providers(&self) -> Result<Vec<Arc<dyn Provider>>, SettingsError> {
        let mut providers: Vec<Arc<dyn Provider>> = Vec::new();
        for (endpoint, key) in self.gemini.iter().flat_map(|e| e.keys.iter().map(move |key| (e, key))) {
            let client = Gemini::new(endpoint.base.clone(), &self.gemini_version, key, self.timeouts, Trust::Operator);
            providers.push(Arc::new(client.map_err(|e| problem("GEMINI_API_KEY", &e))?));
        }
        for (endpoint, key) in self.openrouter.iter().flat_map(|e| e.keys.iter().map(move |key| (e, key))) {
            let client = OpenRouter::new(endpoint.base.clone(), key, self.timeouts, Trust::Operator);
            providers.push(Arc::new(client.map_err(|e| problem("OPENROUTER_API_KEY", &e))?));
        }
        if let Some(endpoint) = &self.openai_compatible {
            if endpoint.keys.is_empty() {
                providers.push(Arc::new(self.openai_with(endpoint, None)?));
            }
            for key in &endpoint.keys {
                providers.push(Arc::new(self.openai_with(endpoint, Some(key))?));
            }
        }
        Ok(providers)
    }

    /// The keys that are configured, each with its provider.
    #[must_use]
    pub fn keys(&self) -> Vec<(&'static str, &SecretString)> {
        let endpoints = [&self.gemini, &self.openrouter, &self.openai_compatible];
        let listed = PROVIDERS.into_iter().zip(endpoints);
        listed.flat_map(|(name, endpoint)| endpoint.iter().flat_map(|e| &e.keys).map(move |key| (name, key))).collect()
    }

    /// Where the platform's keys of a provider are sent: the configured address, else the provider's own.
    ///
    /// # Errors
    /// There is no such provider, in words.
    pub fn address(&self, provider: &str) -> Result<Url, String> {
        let (endpoint, default) = match provider {
            "gemini" => (&self.gemini, gemini::BASE_URL),
            "openrouter" => (&self.openrouter, openrouter::BASE_URL),
            "openai_compatible" => (&self.openai_compatible, OPENAI_BASE_URL),
            _ => return Err("the provider is gemini, openrouter or openai_compatible".to_owned()),
        };
        let configured = self.bases.get(provider).or(endpoint.as_ref().map(|endpoint| &endpoint.base));
        match configured {
            Some(base) => Ok(base.clone()),
            None => parse_base_url(default, Trust::Operator).map_err(|e| e.to_string()),
        }
    }

    /// A client for a sealed key of the platform. It is sent to the address that it was sealed with, and only while that is
    /// the configured one: one provider is one server with its models.
    ///
    /// # Errors
    /// Another address is configured; the key cannot be sent.
    pub fn platform_client(
        &self,
        provider: &str,
        sealed_address: Option<&str>,
        key: &SecretString,
    ) -> Result<Arc<dyn Provider>, String> {
        let base = self.address(provider)?;
        if sealed_address != Some(base.as_str()) {
            return Err("it was stored for another address than the configured one: add it again".to_owned());
        }
        let version = if self.gemini_version.is_empty() { gemini::VERSION_DEFAULT } else { &self.gemini_version };
        Ok(match provider {
            "gemini" => Arc::new(Gemini::new(base, version, key, self.timeouts, Trust::Operator)?),
            "openrouter" => Arc::new(OpenRouter::new(base, key, self.timeouts, Trust::Operator)?),
            _ => {
                let endpoint = Endpoint { base, keys: Vec::new() };
                Arc::new(self.openai_with(&endpoint, Some(key)).map_err(|e| e.problem)?)
            }
        })
    }

    /// A client for a key of a user, which is sent to the provider's own address, or to the one that it was stored for.
    ///
    /// # Errors
    /// The address is not one that a user may name; the key cannot be sent.
    pub fn own_client(
        &self,
        provider: &str,
        base_url: Option<&str>,
        key: &SecretString,
        trust: Trust,
    ) -> Result<Arc<dyn Provider>, String> {
        let base = |default: &str| parse_base_url(base_url.unwrap_or(default), trust).map_err(|e| e.to_string());
        let version = if self.gemini_version.is_empty() { gemini::VERSION_DEFAULT } else { &self.gemini_version };
        Ok(match provider {
            "gemini" => Arc::new(Gemini::new(base(gemini::BASE_URL)?, version, key, self.timeouts, trust)?),
            "openrouter" => Arc::new(OpenRouter::new(base(openrouter::BASE_URL)?, key, self.timeouts, trust)?),
            _ => Arc::new(OpenAiCompatible::new(base(OPENAI_BASE_URL)?, Some(key), self.timeouts, trust)?),
        })
    }
}

/// The setting that overrides the model of a role.
#[must_use]
pub fn role_setting(role: Role) -> &'static str {
    match role {
        Role::Architect => "LOOPWRIGHT_MODEL_ARCHITECT",
        Role::Implementer => "LOOPWRIGHT_MODEL_IMPLEMENTER",
        Role::Utility => "LOOPWRIGHT_MODEL_UTILITY",
    }
}

fn problem(setting: &str, problem: &str) -> SettingsError {
    SettingsError { setting: setting.to_owned(), problem: problem.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(pairs: &[(&str, &str)]) -> Result<Settings, SettingsError> {
        Settings::from_lookup(&|name| pairs.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned()))
    }

    #[test]
    fn a_provider_is_configured_by_its_key_and_a_local_server_by_its_address() {
        assert!(settings(&[("GEMINI_API_KEY", " ")]).unwrap().is_empty());
        for (address, local) in [
            ("http://127.0.0.1:8080/v1", true),
            ("http://192.168.1.9:1234", true),
            ("http://ollama:11434", true),
            ("https://api.openai.com/v1", false),
            ("https://8.8.8.8/v1", false),
        ] {
            let settings = settings(&[("OPENAI_BASE_URL", address)]).unwrap();
            assert_eq!(settings.openai_is_local(), local, "{address}");
            assert_eq!(settings.providers().unwrap()[0].is_local(), local, "{address}");
        }
        let all = settings(&[
            ("GEMINI_API_KEY", "k"),
            ("OPENROUTER_API_KEY", "k"),
            ("OPENAI_BASE_URL", "http://127.0.0.1:8080"),
            ("LOOPWRIGHT_MODEL_UTILITY", "gemini/x"),
        ])
        .unwrap();
        assert_eq!(all.names(), ["gemini", "openrouter", "openai_compatible"]);
        assert_eq!(all.role_models[&Role::Utility], "gemini/x");
        assert_eq!(all.providers().unwrap().len(), 3);
        let several = [("GEMINI_API_KEY", "a"), ("GEMINI_API_KEYS", " b, a ,,c"), ("OPENAI_API_KEYS", "x,y")];
        assert_eq!(settings(&several).unwrap().providers().unwrap().len(), 5);
        assert_eq!(settings(&[("OPENROUTER_API_KEYS", "k")]).unwrap().names(), ["openrouter"]);
        let many = (0..=KEYS_MAX).map(|n| n.to_string()).collect::<Vec<_>>().join(",");
        let error = settings(&[("GEMINI_API_KEYS", &many)]).unwrap_err().to_string();
        assert_eq!(error, "GEMINI_API_KEYS: more than 16 keys");
        assert_eq!(settings(&[("OPENAI_API_KEY", "k")]).unwrap().names(), ["openai_compatible"]);
    }

    #[test]
    fn a_sealed_key_goes_to_the_address_that_it_was_sealed_with_or_nowhere() {
        let key = SecretString::from("k");
        let plain = settings(&[]).unwrap();
        assert_eq!(plain.address("openrouter").unwrap().as_str(), openrouter::BASE_URL);
        assert!(plain.platform_client("openrouter", Some(openrouter::BASE_URL), &key).is_ok());
        // An address without a key of the environment counts too.
        let moved = settings(&[("OPENROUTER_BASE_URL", "https://proxy.example.com/api/v1/")]).unwrap();
        assert_eq!(moved.address("openrouter").unwrap().as_str(), "https://proxy.example.com/api/v1");
        for sealed in [Some(openrouter::BASE_URL), None, Some("https://evil.example.com")] {
            let error = moved.platform_client("openrouter", sealed, &key).err().unwrap();
            assert!(error.contains("another address") && !error.contains("example.com"), "{error}");
        }
        assert!(plain.address("mistral").is_err());
        let listed = settings(&[("GEMINI_API_KEYS", "a,b"), ("OPENAI_API_KEY", "c")]).unwrap();
        let names: Vec<_> = listed.keys().into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["gemini", "gemini", "openai_compatible"]);
    }

    #[test]
    fn a_bad_setting_is_named_without_its_value() {
        let error = settings(&[("OPENAI_BASE_URL", "http://me:hunter2@host")]).unwrap_err().to_string();
        assert!(error.starts_with("OPENAI_BASE_URL: ") && !error.contains("hunter2"), "{error}");
        let error = settings(&[("GEMINI_API_KEY", "a\nb")]).unwrap().providers().err().unwrap().to_string();
        assert_eq!(error, "GEMINI_API_KEY: the key holds characters that cannot be sent");
        assert!(settings(&[("OPENAI_BASE_URL", "localhost:1"), ("OPENAI_CONTEXT_TOKENS", "0")]).is_err());
    }
}
