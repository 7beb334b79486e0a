//! The keys that a user has brought: opened once, with a client each, and asked before anybody else's.
//!
//! Who has brought keys is not served by the platform's, at his credits, unless one of his keys says so
//! (`platform_fallback`): a bill that nobody expects is worse than a run that says what is missing.

use super::{
    Role,
    route::{Candidate, own_candidate},
    service::{Pool, Slot},
};
use crate::{
    keys::{Error, Keys, SealedKey},
    provider::Settings,
};
use chrono::{DateTime, Utc};
use loopwright_engine::Failure;
use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};
use uuid::Uuid;

/// How old what is known of a user's keys may be: a key that was deleted is used for at most that long.
const AGE_MAX: Duration = Duration::from_secs(1);
/// Most users, and keys, that are remembered: each key holds a client. What is forgotten is read again.
const REMEMBERED_MAX: usize = 1_024;

/// When a step whose user's key this worker cannot open asks again, in milliseconds: an operator has to act. Chosen.
const SEALED_WAIT_MS: u64 = 60_000;

/// A user's keys by provider.
pub(super) struct Own {
    pub pools: BTreeMap<String, Pool>,
    /// Models that the keys name, asked first for every role.
    pub models: Vec<Candidate>,
    /// Whether the platform's keys may serve what these cannot.
    pub platform_fallback: bool,
}

/// When it was read, and what was found.
type Known = (Instant, Option<Arc<Own>>);
/// Since when the key is as it is, and its client.
type Client = (Option<DateTime<Utc>>, Arc<Slot>);

/// The users whose keys this process knows.
pub(super) struct Owners {
    keys: Keys,
    /// For versions and time limits.
    settings: Settings,
    users: Mutex<HashMap<Uuid, Known>>,
    slots: Mutex<HashMap<Uuid, Client>>,
}

impl Owners {
    pub fn new(keys: Keys, settings: Settings) -> Self {
        Self { keys, settings, users: Mutex::default(), slots: Mutex::default() }
    }

    /// What a user has brought; `None` for nothing.
    ///
    /// # Errors
    /// `transient.store`; `provider.key_sealed` if a key does not open here.
    pub async fn of(&self, user: Uuid) -> Result<Option<Arc<Own>>, Failure> {
        {
            let users = self.users.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some((read_at, own)) = users.get(&user)
                && read_at.elapsed() < AGE_MAX
            {
                return Ok(own.clone());
            }
        }
        let rows = self.keys.own(user).await.map_err(|error| failure(&error))?;
        let own = if rows.is_empty() { None } else { Some(Arc::new(self.opened(&rows)?)) };
        let mut users = self.users.lock().unwrap_or_else(PoisonError::into_inner);
        if users.len() >= REMEMBERED_MAX {
            users.clear();
        }
        users.insert(user, (Instant::now(), own.clone()));
        Ok(own)
    }

    fn opened(&self, rows: &[SealedKey]) -> Result<Own, Failure> {
        let mut by_provider: BTreeMap<String, Vec<Arc<Slot>>> = BTreeMap::new();
        let mut models: Vec<Candidate> = Vec::new();
        for row in rows {
            self.keys.board().learn(row.key_ref(), row.standing.clone());
            by_provider.entry(row.provider.clone()).or_default().push(self.slot(row)?);
            if let Some(model) = &row.model {
                let candidate = own_candidate(&row.provider, model);
                if !models.contains(&candidate) {
                    models.push(candidate);
                }
            }
        }
        Ok(Own {
            pools: by_provider.into_iter().map(|(provider, slots)| (provider, Pool::new(slots))).collect(),
            models,
            platform_fallback: rows.iter().any(|row| row.platform_fallback),
        })
    }

    /// The client of a key, made once for each time that it is sealed.
    fn slot(&self, row: &SealedKey) -> Result<Arc<Slot>, Failure> {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((sealed_at, slot)) = slots.get(&row.id)
            && *sealed_at == row.sealed_at
        {
            return Ok(Arc::clone(slot));
        }
        let content = self.keys.open(row).map_err(|error| failure(&error))?;
        let client =
            self.settings.own_client(&row.provider, content.base_url.as_deref(), &content.key, self.keys.trust());
        let client = client.map_err(|why| {
            Failure::permanent(
                "provider.address_refused",
                format!("your key for {} cannot be used: {why}", row.provider),
            )
        })?;
        let slot = Arc::new(Slot::own(client, row.id));
        if slots.len() >= REMEMBERED_MAX {
            slots.clear();
        }
        slots.insert(row.id, (row.sealed_at, Arc::clone(&slot)));
        Ok(slot)
    }
}

impl Own {
    /// The candidates for a role with these keys, `listed` being what everybody's routing says.
    pub fn candidates(&self, listed: &[Candidate]) -> Vec<Candidate> {
        let mut list = self.models.clone();
        for candidate in listed.iter().filter(|candidate| self.pools.contains_key(&candidate.provider)) {
            match list.iter_mut().find(|c| (&c.provider, &c.model) == (&candidate.provider, &candidate.model)) {
                // The routing knows the limits of the model.
                Some(known) => *known = candidate.clone(),
                None => list.push(candidate.clone()),
            }
        }
        list
    }

    /// None of the keys has a model for a role.
    pub fn none_for(&self, role: Role) -> Failure {
        let names: Vec<&str> = self.pools.keys().map(String::as_str).collect();
        let message = format!(
            "your keys ({}) have no model for the role {}: add another one, or let the platform's serve what yours cannot",
            names.join(", "),
            role.name()
        );
        Failure::permanent("model.no_own_key", message)
    }
}

fn failure(error: &Error) -> Failure {
    match error {
        Error::Sql(error) => {
            tracing::warn!(%error, "the keys of a user could not be read");
            Failure::retryable("transient.store", "the keys of the user could not be read")
        }
        // Another worker may have the key encryption key; nobody can open what was changed.
        Error::Unavailable | Error::KekMissing { .. } => {
            tracing::error!(%error, "a key of a user does not open");
            Failure::retryable(
                "provider.key_sealed",
                "your key cannot be opened on this worker: its operator has to set LOOPWRIGHT_KEY_ENCRYPTION_KEYS",
            )
            .with_retry_after_ms(SEALED_WAIT_MS)
            .without_counting()
        }
        other => {
            tracing::error!(error = %other, "a key of a user does not open");
            Failure::permanent("provider.key_sealed", "your key does not open: delete it and add it again")
        }
    }
}
