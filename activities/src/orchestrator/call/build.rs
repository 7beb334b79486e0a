//! An orchestrator from what is configured.

use super::{
    super::{
        Role,
        own::Owners,
        platform::Sealed,
        route::Routing,
        service::{Pool, Slot},
    },
    Inner, Orchestrator, Pace,
    blame::Blame,
    pack::Windows,
};
use crate::{
    keys::Keys,
    provider::{
        Provider, Settings,
        settings::{PROVIDERS, SettingsError},
    },
};
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

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
            windows: Windows::default(),
            blame: Blame::default(),
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
}
