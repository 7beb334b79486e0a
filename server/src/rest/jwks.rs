//! The public keys that an issuer publishes (RFC 7517), read from one address that the operator set.
//!
//! ```text
//! find(kid) ─ known, young ─▶ entry
//!           ─ known, old ──▶ one caller fetches, the others take what is known ─▶ entry, or gone
//!           ─ unknown ─────▶ fetched, at most once a minute ─▶ entry, or none
//! ```
//!
//! A fetch is a task of its own, which its requests only wait for: callers who hang up end nothing that counts for all.
//!
//! A token names a key and nothing else: no address in it is ever followed. What a fetch brings replaces what was known as a
//! whole; a fetch that fails changes nothing. Symmetric keys are refused: whoever reads the set could sign with them.

use super::auth::Entry;
use crate::config;
use jsonwebtoken::{Algorithm, DecodingKey};
use reqwest::{Client, StatusCode, redirect::Policy};
use serde::Deserialize;
use serde_json::Value;
use std::{
    collections::BTreeMap,
    sync::{Arc, PoisonError, RwLock},
    time::{Duration, Instant},
};
use tokio::sync::{Mutex, OwnedMutexGuard};
use url::Url;

/// How old the set may be before it is read again. Source: the rules of tokens say 5 to 15 minutes.
const TTL: Duration = Duration::from_secs(10 * 60);
/// Least time between two fetches, whatever tokens name and whether they succeed: unknown key ids are free to invent.
const AGAIN: Duration = Duration::from_secs(60);
/// Longest fetch: somebody waits for it.
const FETCH_TIMEOUT: Duration = Duration::from_secs(5);
/// Largest set, in bytes after decompression: a key with its certificate chain is below 8 kB, issuers publish a handful.
const SET_BYTES_MAX: usize = 128 * 1024;
/// Most keys of a set.
const KEYS_MAX: usize = 64;

/// A set of keys at an address, and when to read it.
pub(super) struct Jwks {
    set: Arc<Set>,
    /// When it was fetched last, whatever came of it; held while it is.
    fetched: Arc<Mutex<Option<Instant>>>,
    pace: Pace,
}

/// The set itself: where it is, and what is known of it.
struct Set {
    url: Url,
    client: Client,
    auth: config::Auth,
    known: RwLock<Arc<Known>>,
}

/// How often a set is read; [`Default`] is what production uses, tests make it short.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pace {
    /// Age at which it is read again.
    pub ttl: Duration,
    /// Least time between two fetches.
    pub again: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self { ttl: TTL, again: AGAIN }
    }
}

#[derive(Default)]
struct Known {
    keys: BTreeMap<String, Arc<Entry>>,
    /// `None`: never.
    read_at: Option<Instant>,
}

/// Whether a key id is one of the set's.
pub(super) enum Found {
    Entry(Arc<Entry>),
    Unknown,
    /// The set was never read.
    Away,
}

impl Jwks {
    /// A set that is read when the first token needs it.
    ///
    /// # Errors
    /// This machine has no certificates to trust.
    pub fn new(url: &Url, auth: &config::Auth) -> Result<Self, config::Error> {
        let mut builder = Client::builder()
            .connect_timeout(FETCH_TIMEOUT)
            .timeout(FETCH_TIMEOUT)
            .redirect(Policy::none())
            .no_proxy()
            .referer(false)
            .user_agent(concat!("loopwright/", env!("CARGO_PKG_VERSION")));
        if url.scheme() == "http" {
            // This machine itself; certificates are not needed and may not be there.
            builder = builder.tls_certs_only(Vec::<reqwest::Certificate>::new());
        }
        let client = builder.build().map_err(|_| {
            config::Error::value("auth.jwks_url", "no TLS certificates on this machine: install ca-certificates")
        })?;
        let set = Set { url: url.clone(), client, auth: auth.clone(), known: RwLock::default() };
        Ok(Self { set: Arc::new(set), fetched: Arc::default(), pace: Pace::default() })
    }

    /// The same, read more often.
    #[must_use]
    pub fn with_pace(self, pace: Pace) -> Self {
        Self { pace, ..self }
    }

    /// Looks a key id up; fetches if that may help.
    pub async fn find(&self, kid: &str) -> Found {
        let known = self.set.known();
        let young = known.read_at.is_some_and(|at| at.elapsed() < self.pace.ttl);
        match known.keys.get(kid) {
            Some(entry) if young => return Found::Entry(Arc::clone(entry)),
            // Who does not fetch himself is not kept waiting.
            Some(entry) => match Arc::clone(&self.fetched).try_lock_owned() {
                Ok(last) => self.fetch(last).await,
                Err(_) => return Found::Entry(Arc::clone(entry)),
            },
            None => {
                let last = Arc::clone(&self.fetched).lock_owned().await;
                // Somebody may have fetched it while this waited.
                if !self.set.known().keys.contains_key(kid) {
                    self.fetch(last).await;
                }
            }
        }
        let known = self.set.known();
        match known.keys.get(kid) {
            Some(entry) => Found::Entry(Arc::clone(entry)),
            None if known.read_at.is_none() => Found::Away,
            None => Found::Unknown,
        }
    }

    /// Reads the set unless that was done a moment ago, and waits for it. Whoever asked may hang up: it is read to its end all the
    /// same, because nobody else may for the next minute.
    async fn fetch(&self, mut last: OwnedMutexGuard<Option<Instant>>) {
        if last.is_some_and(|at| at.elapsed() < self.pace.again) {
            return;
        }
        *last = Some(Instant::now());
        let set = Arc::clone(&self.set);
        let fetching = tokio::spawn(async move {
            set.renew().await;
            // Held until here: whoever waits for it finds what has come.
            drop(last);
        });
        if let Err(error) = fetching.await {
            tracing::error!(%error, "the fetch of the keys of tokens ended early");
        }
    }
}

impl Set {
    fn known(&self) -> Arc<Known> {
        Arc::clone(&self.known.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Replaces what is known by what is published. A failure is told in the log and changes nothing.
    async fn renew(&self) {
        match self.read().await.and_then(|text| self.keys(&text)) {
            Ok(keys) => {
                let known = Known { keys, read_at: Some(Instant::now()) };
                *self.known.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(known);
            }
            Err(why) => {
                metrics::counter!("http_jwks_failures_total").increment(1);
                tracing::warn!(
                    why,
                    host = self.url.host_str(),
                    "the keys of tokens could not be read; those known stay valid"
                );
            }
        }
    }

    async fn read(&self) -> Result<Vec<u8>, String> {
        let plain = |error: reqwest::Error| error.without_url().to_string();
        let mut response = self.client.get(self.url.clone()).send().await.map_err(plain)?;
        if response.status() != StatusCode::OK {
            // A redirect too: keys come from the address that was set, or from nowhere.
            return Err(format!("status {}", response.status().as_u16()));
        }
        let mut body = Vec::new();
        while let Some(bytes) = response.chunk().await.map_err(plain)? {
            if body.len() + bytes.len() > SET_BYTES_MAX {
                return Err(format!("more than {SET_BYTES_MAX} bytes"));
            }
            body.extend_from_slice(&bytes);
        }
        Ok(body)
    }

    fn keys(&self, text: &[u8]) -> Result<BTreeMap<String, Arc<Entry>>, String> {
        #[derive(Deserialize)]
        struct Published {
            keys: Vec<Value>,
        }
        let set: Published = serde_json::from_slice(text).map_err(|_| "it is no set of keys".to_owned())?;
        if set.keys.len() > KEYS_MAX {
            return Err(format!("{} keys; at most {KEYS_MAX}", set.keys.len()));
        }
        let mut keys = BTreeMap::new();
        for value in set.keys {
            match public_key(value) {
                Ok((kid, algorithm, key)) => {
                    let entry = Arc::new(Entry::new(&self.auth, algorithm, key));
                    // Two keys of one name: which of them signs is nobody's guess.
                    if keys.insert(kid.clone(), entry).is_some() {
                        return Err(format!("key id {:?} is there twice", kid.get(..64).unwrap_or(&kid)));
                    }
                }
                Err(why) => tracing::info!(why, "a key of the set is not used"),
            }
        }
        if keys.is_empty() { Err("none of its keys can be used".to_owned()) } else { Ok(keys) }
    }
}

/// A key of a set with its id and its one algorithm, or why it is not used.
fn public_key(value: Value) -> Result<(String, Algorithm, DecodingKey), &'static str> {
    #[derive(Deserialize)]
    struct Jwk {
        kty: String,
        kid: Option<String>,
        #[serde(rename = "use")]
        usage: Option<String>,
        alg: Option<String>,
        crv: Option<String>,
        #[serde(default)]
        n: String,
        #[serde(default)]
        e: String,
        #[serde(default)]
        x: String,
        #[serde(default)]
        y: String,
    }
    let jwk: Jwk = serde_json::from_value(value).map_err(|_| "it cannot be read")?;
    let kid =
        jwk.kid.filter(|kid| !kid.is_empty() && kid.len() <= super::auth::NAME_BYTES_MAX).ok_or("it has no id")?;
    if jwk.usage.is_some_and(|usage| usage != "sig") {
        return Err("it is not for signatures");
    }
    let bad = |_| "its numbers cannot be read";
    let (algorithm, key) = match (jwk.kty.as_str(), jwk.crv.as_deref(), jwk.alg.as_deref()) {
        ("oct", ..) => return Err("it is a shared secret, and published"),
        ("RSA", _, None | Some("RS256")) => {
            (Algorithm::RS256, DecodingKey::from_rsa_components(&jwk.n, &jwk.e).map_err(bad)?)
        }
        ("EC", Some("P-256"), None | Some("ES256")) => {
            (Algorithm::ES256, DecodingKey::from_ec_components(&jwk.x, &jwk.y).map_err(bad)?)
        }
        ("OKP", Some("Ed25519"), None | Some("EdDSA" | "Ed25519")) => {
            (Algorithm::EdDSA, DecodingKey::from_ed_components(&jwk.x).map_err(bad)?)
        }
        _ => return Err("its algorithm is none of RS256, ES256, EdDSA"),
    };
    Ok((kid, algorithm, key))
}
