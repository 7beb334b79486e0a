//! Who calls: a bearer token against a local registry of keys.
//!
//! The token's header is read for one thing only, which registered key to try; the algorithm, the issuer and the
//! audience come from the registry. Keys are configured, or published by the issuer at the one address that is configured
//! (`jwks`). Does not know users: see [`crate::store::users`].

use super::{
    error::{Code, Error},
    jwks::{Found, Jwks, Pace},
};
use crate::config::{self, KeyMaterial};
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation};
use secrecy::ExposeSecret;
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, sync::Arc, time::SystemTime};

/// Scope that a token needs in order to start or steer anything.
pub const SCOPE_RUN: &str = "loop:run";
/// Longest token that is looked at, in bytes. Source: what common proxies let through in one header.
const TOKEN_BYTES_MAX: usize = 8 * 1024;
/// Longest key id and subject, in bytes. Chosen, not measured.
pub(super) const NAME_BYTES_MAX: usize = 255;
/// Most characters of a name that a log line holds. Chosen, not measured.
const NAME_LOGGED_MAX: usize = 64;
/// Seconds until another try makes sense while the issuer's keys are away: as often as they are fetched.
const KEYS_AWAY_RETRY_S: u64 = 60;

/// The keys that tokens may be signed with.
pub struct Registry {
    keys: BTreeMap<String, Arc<Entry>>,
    /// Of the same issuer; a key that is configured goes before one of the same id there.
    published: Option<Jwks>,
    issuer: String,
    lifetime_s_max: u64,
}

/// A key and what holds for its tokens.
pub(super) struct Entry {
    algorithm: Algorithm,
    key: DecodingKey,
    /// One per key: a validation cannot mix families of algorithms.
    validation: Validation,
}

impl Entry {
    pub(super) fn new(auth: &config::Auth, algorithm: Algorithm, key: DecodingKey) -> Self {
        let mut validation = Validation::new(algorithm);
        validation.leeway = auth.leeway_s;
        validation.validate_nbf = true;
        validation.set_issuer(&[&auth.issuer]);
        validation.set_audience(&[&auth.audience]);
        validation.set_required_spec_claims(&["exp", "iss", "aud", "sub"]);
        Self { algorithm, key, validation }
    }
}

/// Why a token does not count.
enum Refused {
    /// For the log; the caller is not told.
    Token(String),
    /// The issuer's keys were never read: nobody can say.
    KeysAway,
}

impl From<String> for Refused {
    fn from(reason: String) -> Self {
        Self::Token(reason)
    }
}

impl From<&str> for Refused {
    fn from(reason: &str) -> Self {
        Self::Token(reason.to_owned())
    }
}

/// A token that stood the test.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verified {
    pub issuer: String,
    pub subject: String,
    pub scopes: Vec<String>,
}

impl Verified {
    #[must_use]
    pub fn may(&self, scope: &str) -> bool {
        self.scopes.iter().any(|s| s == scope)
    }
}

/// What is read of a token. A claim that appears twice is refused by the parser.
#[derive(Deserialize)]
struct Claims {
    iss: String,
    sub: String,
    exp: f64,
    iat: f64,
    /// Space separated. Source: RFC 8693 section 4.2.
    #[serde(default)]
    scope: Option<String>,
    /// The same as an array, as some issuers write it.
    #[serde(default)]
    scp: Option<Scp>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Scp {
    One(String),
    Many(Vec<String>),
}

/// Claims of a token that we mint.
#[derive(Serialize)]
struct Minted<'a> {
    iss: &'a str,
    aud: &'a str,
    sub: &'a str,
    scope: &'a str,
    iat: u64,
    nbf: u64,
    exp: u64,
    jti: String,
}

impl Registry {
    /// # Errors
    /// A key that cannot be read, by its key id.
    pub fn new(auth: &config::Auth) -> Result<Self, config::Error> {
        super::jwt::install_crypto();
        let mut keys = BTreeMap::new();
        for key in &auth.keys {
            let bad = |e: jsonwebtoken::errors::Error| config::Error::value(format!("auth key `{}`", key.kid), e);
            let (algorithm, decoding) = match &key.material {
                KeyMaterial::Hs256(secret) => {
                    (Algorithm::HS256, DecodingKey::from_secret(secret.expose_secret().as_bytes()))
                }
                KeyMaterial::Rs256(pem) => (Algorithm::RS256, DecodingKey::from_rsa_pem(pem.as_bytes()).map_err(bad)?),
                KeyMaterial::Es256(pem) => (Algorithm::ES256, DecodingKey::from_ec_pem(pem.as_bytes()).map_err(bad)?),
                KeyMaterial::EdDsa(pem) => (Algorithm::EdDSA, DecodingKey::from_ed_pem(pem.as_bytes()).map_err(bad)?),
            };
            keys.insert(key.kid.clone(), Arc::new(Entry::new(auth, algorithm, decoding)));
        }
        let published = auth.jwks_url.as_ref().map(|url| Jwks::new(url, auth)).transpose()?;
        Ok(Self { keys, published, issuer: auth.issuer.clone(), lifetime_s_max: auth.lifetime_s_max })
    }

    /// The same, with the issuer's keys read more often, for tests of shorter minutes.
    #[must_use]
    pub fn with_pace(self, pace: Pace) -> Self {
        Self { published: self.published.map(|jwks| jwks.with_pace(pace)), ..self }
    }

    /// The issuer whose subjects may be ids of our own users.
    #[must_use]
    pub fn issuer(&self) -> &str {
        &self.issuer
    }

    /// Checks the `Authorization` header.
    ///
    /// # Errors
    /// `token_missing`, `token_invalid`. The caller is not told which rule it broke; the log is, without the token.
    /// `unavailable` while the issuer's keys could never be read: a good token must not be thrown away for that.
    pub async fn verify(&self, authorization: Option<&str>) -> Result<Verified, Error> {
        let missing = || Error::new(Code::TokenMissing, "Send a token as `Authorization: Bearer …`.");
        let header = authorization.ok_or_else(missing)?;
        let (scheme, token) = header.split_once(' ').ok_or_else(missing)?;
        if !scheme.eq_ignore_ascii_case("bearer") {
            return Err(missing());
        }
        let mut named = Named::default();
        self.check(token.trim(), &mut named).await.map_err(|refused| match refused {
            Refused::Token(reason) => {
                let Named { kid, iss, sub } = &named;
                tracing::info!(kid, iss, sub, reason, "a token was refused");
                metrics::counter!("http_tokens_refused_total").increment(1);
                Error::new(Code::TokenInvalid, "The token is expired, not yet valid, or not one of ours.")
            }
            Refused::KeysAway => {
                Error::new(Code::Unavailable, "The keys of tokens cannot be read now.").retry_after(KEYS_AWAY_RETRY_S)
            }
        })
    }

    /// `named` is what may be logged of a token that is refused, as far as it came.
    async fn check(&self, token: &str, named: &mut Named) -> Result<Verified, Refused> {
        if token.len() > TOKEN_BYTES_MAX {
            return Err(format!("{} bytes", token.len()).into());
        }
        let header = jsonwebtoken::decode_header(token).map_err(|e| format!("header: {e}"))?;
        named.kid = header.kid.as_deref().map(shortened);
        if header.crit.is_some() {
            return Err("critical extensions".into());
        }
        let entry = match header.kid.as_deref() {
            Some(kid) if kid.len() > NAME_BYTES_MAX => return Err("key id too long".into()),
            Some(kid) => self.entry(kid).await?,
            // Without a key id there must be no choice; a published set may have one at any moment.
            None if self.keys.len() == 1 && self.published.is_none() => {
                Arc::clone(self.keys.values().next().ok_or("no key")?)
            }
            None => return Err("no key id".into()),
        };
        if header.alg != entry.algorithm {
            return Err(format!("algorithm {:?} instead of {:?}", header.alg, entry.algorithm).into());
        }
        let claims = match jsonwebtoken::decode::<Claims>(token, &entry.key, &entry.validation) {
            Ok(token) => token.claims,
            Err(error) => {
                named.by_signature(token, &entry);
                return Err(error.to_string().into());
            }
        };
        (named.iss, named.sub) = (Some(shortened(&claims.iss)), Some(shortened(&claims.sub)));
        if claims.sub.is_empty() || claims.sub.len() > NAME_BYTES_MAX {
            return Err("subject empty or too long".into());
        }
        let now = now_s();
        #[expect(clippy::cast_precision_loss, reason = "seconds of this millennium are exact")]
        let (now, life) = (now as f64, self.lifetime_s_max as f64);
        #[expect(clippy::cast_precision_loss, reason = "at most 30")]
        let leeway = entry.validation.leeway as f64;
        if !claims.iat.is_finite() || claims.iat > now + leeway {
            return Err("issued in the future".into());
        }
        // From its issue and not from now: one that was made for a year is none for its last minutes.
        if !claims.exp.is_finite() || claims.exp - claims.iat > life {
            return Err("lives too long".into());
        }
        let mut scopes: Vec<String> =
            claims.scope.unwrap_or_default().split_ascii_whitespace().map(str::to_owned).collect();
        match claims.scp {
            Some(Scp::One(text)) => scopes.extend(text.split_ascii_whitespace().map(str::to_owned)),
            Some(Scp::Many(list)) => scopes.extend(list),
            None => {}
        }
        Ok(Verified { issuer: claims.iss, subject: claims.sub, scopes })
    }

    async fn entry(&self, kid: &str) -> Result<Arc<Entry>, Refused> {
        if let Some(entry) = self.keys.get(kid) {
            return Ok(Arc::clone(entry));
        }
        match &self.published {
            Some(published) => match published.find(kid).await {
                Found::Entry(entry) => Ok(entry),
                Found::Away => Err(Refused::KeysAway),
                Found::Unknown => Err("unknown key id".into()),
            },
            None => Err("unknown key id".into()),
        }
    }
}

/// What is logged of a token beside the reason of its refusal: the key that its header names, and, once a signature of that key
/// held, whom it speaks of. Before that anybody could write any name there.
#[derive(Default)]
struct Named {
    kid: Option<String>,
    iss: Option<String>,
    sub: Option<String>,
}

impl Named {
    /// Notes whom a token speaks of that is signed well and refused for something else: the signature is checked, and nothing but it.
    fn by_signature(&mut self, token: &str, entry: &Entry) {
        #[derive(Deserialize)]
        struct Who {
            iss: Option<String>,
            sub: Option<String>,
        }
        let mut signature = Validation::new(entry.algorithm);
        signature.required_spec_claims.clear();
        (signature.validate_exp, signature.validate_nbf, signature.validate_aud) = (false, false, false);
        if let Ok(held) = jsonwebtoken::decode::<Who>(token, &entry.key, &signature) {
            (self.iss, self.sub) =
                (held.claims.iss.as_deref().map(shortened), held.claims.sub.as_deref().map(shortened));
        }
    }
}

/// A name as a log line holds it.
fn shortened(name: &str) -> String {
    name.chars().take(NAME_LOGGED_MAX).collect()
}

/// Mints a development token with the first symmetric key.
///
/// # Errors
/// When no symmetric key is configured.
pub fn mint(auth: &config::Auth, subject: &str, scope: &str, ttl_s: u64) -> anyhow::Result<String> {
    super::jwt::install_crypto();
    let (kid, secret) = auth
        .keys
        .iter()
        .find_map(|key| match &key.material {
            KeyMaterial::Hs256(secret) => Some((&key.kid, secret)),
            _ => None,
        })
        .ok_or_else(|| {
            anyhow::anyhow!("no symmetric key is configured; set LOOPWRIGHT_JWT_SECRET (openssl rand -hex 32)")
        })?;
    let now = now_s();
    let claims = Minted {
        iss: &auth.issuer,
        aud: &auth.audience,
        sub: subject,
        scope,
        iat: now,
        nbf: now,
        exp: now + ttl_s,
        jti: uuid::Uuid::new_v4().to_string(),
    };
    let header = Header { kid: Some(kid.clone()), ..Header::new(Algorithm::HS256) };
    Ok(jsonwebtoken::encode(&header, &claims, &EncodingKey::from_secret(secret.expose_secret().as_bytes()))?)
}

fn now_s() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
}
