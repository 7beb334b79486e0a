//! The keys that a user has brought: opened once, with a client each, and asked before anybody else's.
//!
//! A key for a provider serves every model that the routing lists for it. A key for a server of the user's own serves the model that
//! it names and no other: what one server has, another one of the same dialect does not know.
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
    collections::{BTreeSet, HashMap},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};
use uuid::Uuid;

/// The provider whose servers users name themselves.
const OPENAI_COMPATIBLE: &str = "openai_compatible";
/// How old what is known of a user's keys may be: a key that was deleted is used for at most that long.
const AGE_MAX: Duration = Duration::from_secs(1);
/// Most users, and keys, that are remembered: each key holds a client. What is forgotten is read again.
const REMEMBERED_MAX: usize = 1_024;

/// When a step whose user's key this worker cannot open asks again, in milliseconds: an operator has to act. Chosen.
const SEALED_WAIT_MS: u64 = 60_000;

/// A user's keys.
pub(super) struct Own {
    lanes: Vec<Arc<Lane>>,
    /// Models that the keys name, asked first for every role.
    named: Vec<(Candidate, Arc<Lane>)>,
    /// Whether the platform's keys may serve what these cannot.
    pub platform_fallback: bool,
}

/// Keys of a user that stand in for each other.
pub(super) struct Lane {
    provider: String,
    /// Of a server that the user has named.
    server: Option<Server>,
    pub pool: Pool,
}

/// A server of a user's, and what it is asked for.
#[derive(Clone, PartialEq)]
struct Server {
    address: String,
    model: Option<String>,
}

impl Lane {
    /// Address of the user's server; `None` for a provider's.
    pub fn address(&self) -> Option<&str> {
        self.server.as_ref().map(|server| server.address.as_str())
    }

    /// The row of its first key: the same for as long as its keys are.
    pub fn first_key(&self) -> Option<Uuid> {
        self.pool.slots().first().and_then(|slot| slot.own_id())
    }
}

/// When it was read, and what was found.
type Known = (Instant, Option<Arc<Own>>);

/// What a key is asked with.
struct Client {
    /// Since when the key is as it is.
    sealed_at: Option<DateTime<Utc>>,
    slot: Arc<Slot>,
    /// As it is sealed with the key.
    address: Option<String>,
}

/// The users whose keys this process knows.
pub(super) struct Owners {
    keys: Keys,
    /// For versions and time limits.
    settings: Settings,
    users: Mutex<HashMap<Uuid, Known>>,
    clients: Mutex<HashMap<Uuid, Client>>,
}

impl Owners {
    pub fn new(keys: Keys, settings: Settings) -> Self {
        Self { keys, settings, users: Mutex::default(), clients: Mutex::default() }
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
        let mut lanes: Vec<(String, Option<Server>, Vec<Arc<Slot>>)> = Vec::new();
        let mut named: Vec<(Candidate, usize)> = Vec::new();
        for row in rows {
            self.keys.board().learn(row.key_ref(), row.standing.clone());
            let (slot, address) = self.client(row)?;
            let server = (row.provider == OPENAI_COMPATIBLE)
                .then(|| Server { address: address.unwrap_or_default(), model: row.model.clone() });
            let at = match lanes.iter().position(|(provider, known, _)| *provider == row.provider && *known == server) {
                Some(at) => at,
                None => {
                    lanes.push((row.provider.clone(), server, Vec::new()));
                    lanes.len() - 1
                }
            };
            lanes[at].2.push(slot);
            if let Some(model) = &row.model {
                let candidate = own_candidate(&row.provider, model);
                if !named.contains(&(candidate.clone(), at)) {
                    named.push((candidate, at));
                }
            }
        }
        let lane = |(provider, server, slots)| Arc::new(Lane { provider, server, pool: Pool::new(slots) });
        let lanes: Vec<Arc<Lane>> = lanes.into_iter().map(lane).collect();
        Ok(Own {
            named: named.into_iter().map(|(candidate, at)| (candidate, Arc::clone(&lanes[at]))).collect(),
            lanes,
            platform_fallback: rows.iter().any(|row| row.platform_fallback),
        })
    }

    /// The client of a key, made once for each time that it is sealed, and the address that is sealed with it.
    fn client(&self, row: &SealedKey) -> Result<(Arc<Slot>, Option<String>), Failure> {
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = clients.get(&row.id).filter(|known| known.sealed_at == row.sealed_at) {
            return Ok((Arc::clone(&known.slot), known.address.clone()));
        }
        let content = self.keys.open(row).map_err(|error| failure(&error))?;
        let address = content.base_url.clone();
        let client = self.settings.own_client(&row.provider, address.as_deref(), &content.key, self.keys.trust());
        let client = client.map_err(|why| {
            Failure::permanent(
                "provider.address_refused",
                format!("your key for {} cannot be used: {why}", row.provider),
            )
        })?;
        let slot = Arc::new(Slot::own(client, row.id));
        if clients.len() >= REMEMBERED_MAX {
            clients.clear();
        }
        let known = Client { sealed_at: row.sealed_at, slot: Arc::clone(&slot), address: address.clone() };
        clients.insert(row.id, known);
        Ok((slot, address))
    }
}

impl Own {
    /// The candidates for a role with these keys, and who serves each, `listed` being what everybody's routing says.
    pub fn candidates(&self, listed: &[Candidate]) -> Vec<(Candidate, Arc<Lane>)> {
        let same = |a: &Candidate, b: &Candidate| (&a.provider, &a.model) == (&b.provider, &b.model);
        let mut list = self.named.clone();
        for (candidate, _) in &mut list {
            // The routing knows the limits of the model.
            if let Some(known) = listed.iter().find(|known| same(known, candidate)) {
                *candidate = known.clone();
            }
        }
        for candidate in listed {
            let lane = self.lanes.iter().find(|lane| lane.provider == candidate.provider && lane.server.is_none());
            if let Some(lane) = lane
                && !list.iter().any(|(known, _)| same(known, candidate))
            {
                list.push((candidate.clone(), Arc::clone(lane)));
            }
        }
        list
    }

    /// None of the keys has a model for a role.
    pub fn none_for(&self, role: Role) -> Failure {
        let names: BTreeSet<&str> = self.lanes.iter().map(|lane| lane.provider.as_str()).collect();
        let names: Vec<&str> = names.into_iter().collect();
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
