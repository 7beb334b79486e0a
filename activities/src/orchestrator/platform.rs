//! The platform's sealed keys: opened once, with a client each, and asked beside those of the environment.
//!
//! Every worker reads them again every few seconds, so a key that is added, put anew or revoked needs no restart. A worker
//! that cannot open one says so once and goes on with the others.

use super::service::{Pool, Slot};
use crate::{
    keys::{Keys, SealedKey},
    provider::{KeyIdentity, Settings},
};
use chrono::{DateTime, Utc};
use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};
use uuid::Uuid;

/// How old what is known of the sealed keys may be: a new one is used after that. One that is taken out of service is not
/// used sooner: its standing is read every second.
pub(super) const AGE_MAX: Duration = Duration::from_secs(5);

/// A key, and since when it is as it is.
type Version = (Uuid, Option<DateTime<Utc>>);

/// The platform's keys of every provider, the sealed ones as of the last look.
pub(super) struct Sealed {
    keys: Keys,
    settings: Settings,
    /// Of the environment.
    fixed: BTreeMap<&'static str, Vec<Arc<Slot>>>,
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    read_at: Option<Instant>,
    clients: HashMap<Version, Arc<Slot>>,
    /// Of which it was said that they do not open here.
    told: HashSet<Version>,
}

impl Sealed {
    /// Beside the keys that are in `pools` now.
    pub fn new(keys: Keys, settings: Settings, pools: &BTreeMap<&'static str, Pool>) -> Self {
        let fixed = pools.iter().map(|(name, pool)| (*name, pool.slots())).collect();
        Self { keys, settings, fixed, known: Mutex::default() }
    }

    /// Reads the keys if what is known is older than [`AGE_MAX`], and gives them to `pools`. A database that does not answer
    /// changes nothing.
    ///
    /// # Transaction
    /// Reads only.
    pub async fn refresh(&self, pools: &BTreeMap<&'static str, Pool>) {
        {
            let mut known = self.lock();
            if known.read_at.is_some_and(|at| at.elapsed() < AGE_MAX) {
                return;
            }
            // Whoever comes while this is read goes on with what is known.
            known.read_at = Some(Instant::now());
        }
        match self.keys.platform().await {
            Ok(rows) => self.learn(&rows, pools),
            Err(error) => {
                tracing::warn!(%error, "the platform's sealed keys could not be read; those known stay in use")
            }
        }
    }

    fn learn(&self, rows: &[SealedKey], pools: &BTreeMap<&'static str, Pool>) {
        let mut known = self.lock();
        let mut clients = HashMap::new();
        let mut slots: BTreeMap<&str, Vec<Arc<Slot>>> = BTreeMap::new();
        for row in rows {
            let version = (row.id, row.sealed_at);
            let slot = match known.clients.remove(&version).map_or_else(|| self.open(row), Ok) {
                Ok(slot) => slot,
                Err(why) => {
                    if known.told.insert(version) {
                        tracing::error!(key = %row.id, provider = row.provider, ends_in = row.last4, why,
                            "a key of the platform cannot be used by this worker, which goes on with the others");
                    }
                    continue;
                }
            };
            slots.entry(&row.provider).or_default().push(Arc::clone(&slot));
            clients.insert(version, slot);
        }
        known.told.retain(|(id, _)| rows.iter().any(|row| row.id == *id));
        known.clients = clients;
        for (name, pool) in pools {
            let mut all = self.fixed.get(name).cloned().unwrap_or_default();
            let sealed = slots.remove(name).unwrap_or_default();
            if !sealed.is_empty() {
                // Asked without a key, a server that has one would refuse.
                let keyless = KeyIdentity::of(name, None);
                all.retain(|slot| slot.provider.key() != keyless);
            }
            for slot in sealed {
                // The same key may stand in the environment too.
                if all.iter().all(|other| other.key != slot.key) {
                    all.push(slot);
                }
            }
            pool.replace(all);
        }
    }

    fn open(&self, row: &SealedKey) -> Result<Arc<Slot>, String> {
        let content = self.keys.open(row).map_err(|error| error.to_string())?;
        let client = self.settings.platform_client(&row.provider, content.base_url.as_deref(), &content.key)?;
        Ok(Arc::new(Slot::platform(client)))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
