//! The door to `api_keys`: what users and operators do with keys, and the opened ones as the orchestrator needs them.

use super::{
    Board, Error, KeyView, Place, Rates, Ring, SealedKey, Standing, WINDOW,
    envelope::{self, Content},
    rows::{OwnRow, found_out_anew, sealed, view, write},
};
use crate::provider::{
    KeyIdentity,
    account::MoreKeys,
    address::{Lookup, SystemLookup, Trust, parse_base_url, resolves_public},
    settings::{KEYS_MAX, PROVIDERS},
};
use futures_util::future::BoxFuture;
use loopwright_engine::transaction;
use secrecy::{ExposeSecret, SecretString};
use sqlx::PgPool;
use std::sync::Arc;
use uuid::Uuid;

/// Most keys that a user keeps. Chosen: a few for each provider.
pub const KEYS_PER_USER_MAX: usize = 8;
/// Most rows of a user, revoked ones included: they stay for the usage that points at them, so somebody who adds and
/// deletes keys without end would fill the table. Chosen: a new key each month for eight years.
pub const KEY_ROWS_PER_USER_MAX: usize = 100;
/// Longest key, in bytes: twice what the longest of today's providers hand out, tokens included.
const KEY_BYTES_MAX: usize = 4_096;
/// Longest label, model or base URL, in bytes.
const TEXT_BYTES_MAX: usize = 300;
/// Sealed keys of the platform that are read: [`KEYS_MAX`] of each provider are fewer.
const PLATFORM_ROWS_MAX: i64 = 100;
/// What a list shows at most: a page of a terminal is less.
const LIST_MAX: i64 = 1_000;

/// A key that somebody hands over.
#[derive(Clone, Debug)]
pub struct NewKey {
    /// `gemini`, `openrouter` or `openai_compatible`.
    pub provider: String,
    pub key: SecretString,
    pub label: String,
    /// Only for `openai_compatible`, and needed there.
    pub base_url: Option<String>,
    /// Asked first for every role; needed for `openai_compatible`, whose models nobody else knows.
    pub model: Option<String>,
    /// Whether the platform's keys, at the user's credits, may serve what this one cannot.
    pub platform_fallback: bool,
}

/// The door to the keys. Cheap to clone.
#[derive(Clone)]
pub struct Keys {
    pub(super) pool: PgPool,
    pub(super) ring: Option<Arc<Ring>>,
    trust: Trust,
    lookup: Arc<dyn Lookup>,
    board: Arc<Board>,
    rates: Rates,
}

impl Keys {
    /// Over a pool of a migrated database. Without a ring no key of a user is stored or used. `loopback` lets users name
    /// servers on the machine itself, without TLS: for tests, and for installations of one person.
    #[must_use]
    pub fn new(pool: PgPool, ring: Option<Ring>, loopback: bool) -> Self {
        let trust = if loopback { Trust::UserOrLoopback } else { Trust::User };
        let (board, rates) = (Arc::new(Board::shared(pool.clone())), Rates::new(pool.clone(), WINDOW));
        Self { pool, ring: ring.map(Arc::new), trust, lookup: Arc::new(SystemLookup), board, rates }
    }

    /// The same with another resolver of names.
    #[must_use]
    pub fn with_lookup(self, lookup: Arc<dyn Lookup>) -> Self {
        Self { lookup, ..self }
    }

    /// The same with other budgets, for tests of shorter minutes.
    #[must_use]
    pub fn with_rates(self, rates: Rates) -> Self {
        Self { rates, ..self }
    }

    #[must_use]
    pub fn board(&self) -> Arc<Board> {
        Arc::clone(&self.board)
    }
    #[must_use]
    pub fn rates(&self) -> Rates {
        self.rates.clone()
    }
    /// Where users' keys may be sent.
    #[must_use]
    pub fn trust(&self) -> Trust {
        self.trust
    }
    /// Whether keys of users can be kept.
    #[must_use]
    pub fn is_available(&self) -> bool {
        self.ring.is_some()
    }

    /// Stores a user's key, or seals it anew with new terms if it is known. That puts it back into service, unless an
    /// operator took it out.
    ///
    /// # Errors
    /// `keys_unavailable`, `key_invalid`, `address_refused`, `keys_too_many`.
    /// # Transaction
    /// One; locks the user's row against a second key at the same time. Idempotent by (user, provider, key).
    pub async fn put(&self, user: Uuid, new: &NewKey) -> Result<KeyView, Error> {
        let ring = self.ring.as_ref().ok_or(Error::Unavailable)?;
        let base_url = self.checked(new).await?;
        let identity = KeyIdentity::of(&new.provider, Some(&new.key));
        let mut tx = transaction::begin(&self.pool).await?;
        sqlx::query("select from users where id = $1 for no key update").bind(user).execute(&mut *tx).await?;
        let known: Option<Uuid> = sqlx::query_scalar(
            "select id from api_keys where provider = $1 and fingerprint = decode($2, 'hex') and user_id = $3",
        )
        .bind(&new.provider)
        .bind(&identity.fingerprint)
        .bind(user)
        .fetch_optional(&mut *tx)
        .await?;
        let (others, rows): (i64, i64) = sqlx::query_as(
            "select count(*) filter (where status <> 'revoked'), count(*) from api_keys where user_id = $1 and id is distinct from $2",
        )
        .bind(user)
        .bind(known)
        .fetch_one(&mut *tx)
        .await?;
        if others >= KEYS_PER_USER_MAX as i64 || (known.is_none() && rows >= KEY_ROWS_PER_USER_MAX as i64) {
            return Err(Error::TooMany);
        }
        let id = known.unwrap_or_else(Uuid::now_v7);
        let view = write(&mut tx, ring, id, Some(user), new, base_url).await?;
        tx.commit().await?;
        Ok(view)
    }

    /// Stores a key of the platform, or seals it anew if it is known, also from an environment. `address`: where it may be
    /// sent, in full. All workers use it within seconds, beside those of their environments.
    ///
    /// # Errors
    /// `keys_unavailable`, `key_invalid`: also for the seventeenth of a provider.
    /// # Transaction
    /// One; one platform key at a time. Idempotent by (provider, key).
    pub async fn put_platform(&self, new: &NewKey, address: &str) -> Result<KeyView, Error> {
        let ring = self.ring.as_ref().ok_or(Error::Unavailable)?;
        checked_text(new)?;
        if new.model.is_some() || new.platform_fallback {
            return Err(Error::Invalid("which models the platform's keys serve is a matter of the routing".into()));
        }
        let identity = KeyIdentity::of(&new.provider, Some(&new.key));
        let mut tx = transaction::begin(&self.pool).await?;
        sqlx::query("select pg_advisory_xact_lock(hashtextextended('api_keys platform', 0))").execute(&mut *tx).await?;
        let known: Option<Uuid> = sqlx::query_scalar(
            "select id from api_keys where provider = $1 and fingerprint = decode($2, 'hex') and user_id is null",
        )
        .bind(&new.provider)
        .bind(&identity.fingerprint)
        .fetch_optional(&mut *tx)
        .await?;
        let others: i64 = sqlx::query_scalar(
            "select count(*) from api_keys where user_id is null and source = 'sealed' and status <> 'revoked' and provider = $1
               and id is distinct from $2",
        )
        .bind(&new.provider)
        .bind(known)
        .fetch_one(&mut *tx)
        .await?;
        if others >= KEYS_MAX as i64 {
            return Err(Error::Invalid(format!(
                "the platform keeps at most {KEYS_MAX} keys of a provider: revoke one"
            )));
        }
        let id = known.unwrap_or_else(Uuid::now_v7);
        let view = write(&mut tx, ring, id, None, new, Some(address.to_owned())).await?;
        tx.commit().await?;
        Ok(view)
    }

    /// Checks a new key; returns its base URL as it is kept.
    async fn checked(&self, new: &NewKey) -> Result<Option<String>, Error> {
        let invalid = |text: &str| Err(Error::Invalid(text.to_owned()));
        checked_text(new)?;
        match (&new.base_url, new.provider == "openai_compatible") {
            (None, false) => Ok(None),
            (Some(_), false) => invalid("only openai_compatible has a base URL of its own"),
            (None, true) => invalid("openai_compatible needs the base URL of its server"),
            (Some(_), true) if new.model.is_none() => invalid("openai_compatible needs the name of a model"),
            (Some(text), true) => {
                let url = parse_base_url(text, self.trust)?;
                // For a good message now. What counts is the address at the moment of each connection.
                resolves_public(&url, self.trust, self.lookup.as_ref()).await?;
                Ok(Some(url.to_string()))
            }
        }
    }

    /// The keys of a user, or of everybody and the platform.
    ///
    /// # Shape
    /// Newest first; without revoked ones for a user.
    /// # Errors
    /// The database's.
    pub async fn list(&self, user: Option<Uuid>) -> Result<Vec<KeyView>, Error> {
        let rows = sqlx::query_as(concat!(
            "select",
            view!(),
            "from api_keys where $1::uuid is null or (user_id = $1 and status <> 'revoked')
             order by user_id nulls first, created_at desc, id limit $2"
        ));
        Ok(rows.bind(user).bind(LIST_MAX).fetch_all(&self.pool).await?)
    }

    /// One key; of this user, if one is named.
    ///
    /// # Errors
    /// `key_not_found`, also for somebody else's.
    pub async fn show(&self, user: Option<Uuid>, id: Uuid) -> Result<KeyView, Error> {
        let row = sqlx::query_as(concat!(
            "select",
            view!(),
            "from api_keys where id = $1 and ($2::uuid is null or (user_id = $2 and status <> 'revoked'))"
        ));
        row.bind(id).bind(user).fetch_optional(&self.pool).await?.ok_or(Error::NotFound)
    }

    /// Puts a key back into service, or takes it out, at an operator's word.
    ///
    /// # Errors
    /// `key_not_found`, also for a revoked one: nothing is left of it.
    pub async fn set_enabled(&self, id: Uuid, enabled: bool) -> Result<KeyView, Error> {
        found_out_anew(&self.pool, id).await?;
        let row = sqlx::query_as(concat!(
            "update api_keys set status = case when $2 then 'active' else 'disabled' end,
               disabled_reason = case when not $2 then 'operator' end, cooldown_until = null, cooling_model = null
             where id = $1 and status <> 'revoked' returning",
            view!()
        ));
        row.bind(id).bind(enabled).fetch_optional(&self.pool).await?.ok_or(Error::NotFound)
    }

    /// Takes a key away for good; of this user, if one is named. Its row stays for the usage that points at it, the sealed
    /// key is destroyed. A key from the environment is refused from then on. That an operator took it out of service
    /// stays known, so that adding it again does not undo it.
    ///
    /// # Errors
    /// `key_not_found`.
    pub async fn revoke(&self, user: Option<Uuid>, id: Uuid) -> Result<(), Error> {
        let done = sqlx::query(
            "update api_keys set status = 'revoked', cooling_model = null, cooldown_until = null,
               disabled_reason = case when status = 'disabled' and disabled_reason = 'operator' then 'operator' else 'revoked' end,
               ciphertext = case when source = 'sealed' then ''::bytea end, nonce = case when source = 'sealed' then ''::bytea end,
               wrapped_dek = case when source = 'sealed' then ''::bytea end, kek_id = case when source = 'sealed' then '' end
             where id = $1 and status <> 'revoked' and ($2::uuid is null or user_id = $2)",
        )
        .bind(id)
        .bind(user)
        .execute(&self.pool)
        .await?;
        if done.rows_affected() == 0 { Err(Error::NotFound) } else { Ok(()) }
    }

    /// The keys that a user keeps here, disabled ones too: who has brought keys is not served by the platform's unasked.
    ///
    /// # Errors
    /// The database's.
    pub async fn own(&self, user: Uuid) -> Result<Vec<SealedKey>, Error> {
        let rows = sqlx::query_as(concat!(sealed!(), "user_id = $1 order by created_at, id limit $2"));
        let rows: Vec<OwnRow> = rows.bind(user).bind(KEYS_PER_USER_MAX as i64).fetch_all(&self.pool).await?;
        Ok(rows.into_iter().map(SealedKey::from).collect())
    }

    /// The platform's sealed keys, disabled ones too.
    ///
    /// # Errors
    /// The database's.
    pub async fn platform(&self) -> Result<Vec<SealedKey>, Error> {
        let rows = sqlx::query_as(concat!(sealed!(), "user_id is null order by created_at, id limit $1"));
        let rows: Vec<OwnRow> = rows.bind(PLATFORM_ROWS_MAX).fetch_all(&self.pool).await?;
        Ok(rows.into_iter().map(SealedKey::from).collect())
    }

    /// One sealed key, whosever it is; `None` if it is none, or revoked.
    ///
    /// # Errors
    /// The database's.
    pub async fn sealed(&self, id: Uuid) -> Result<Option<SealedKey>, Error> {
        let row: Option<OwnRow> =
            sqlx::query_as(concat!(sealed!(), "id = $1")).bind(id).fetch_optional(&self.pool).await?;
        Ok(row.map(SealedKey::from))
    }

    /// Opens a key, for the client that sends it.
    ///
    /// # Errors
    /// `keys_unavailable`, `key_encryption_key_missing`, `key_corrupt`: also if its row names another address than the
    /// one that was sealed with it.
    pub fn open(&self, own: &SealedKey) -> Result<Content, Error> {
        let ring = self.ring.as_ref().ok_or(Error::Unavailable)?;
        let place = Place { id: own.id, provider: &own.provider, user: own.user, version: own.envelope.version };
        let content = envelope::open(ring, place, &own.envelope)?;
        if content.base_url != own.base_url {
            return Err(Error::Corrupt { id: own.id });
        }
        Ok(content)
    }
}

/// What can be said of a new key without asking anybody.
fn checked_text(new: &NewKey) -> Result<(), Error> {
    let invalid = |text: &str| Err(Error::Invalid(text.to_owned()));
    if !PROVIDERS.contains(&new.provider.as_str()) {
        return invalid("the provider is gemini, openrouter or openai_compatible");
    }
    let key = new.key.expose_secret();
    if key.is_empty() || key.len() > KEY_BYTES_MAX || !key.bytes().all(|byte| byte.is_ascii_graphic()) {
        return invalid("a key is 1 to 4096 visible ASCII characters without blanks");
    }
    let texts = [Some(&new.label), new.model.as_ref(), new.base_url.as_ref()];
    if texts.into_iter().flatten().any(|text| text.len() > TEXT_BYTES_MAX || text.chars().any(char::is_control)) {
        return invalid("label, model and base URL are at most 300 bytes of one line");
    }
    if new.model.as_ref().is_some_and(|model| model.trim().is_empty()) {
        return invalid("the model has no name");
    }
    Ok(())
}

impl MoreKeys for Keys {
    fn at<'a>(&'a self, provider: &'a str, address: &'a str) -> BoxFuture<'a, Vec<SecretString>> {
        Box::pin(async move {
            let rows = match self.platform().await {
                Ok(rows) => rows,
                Err(error) => {
                    tracing::warn!(%error, "the platform's sealed keys could not be read");
                    return Vec::new();
                }
            };
            let in_service = rows
                .iter()
                .filter(|row| row.provider == provider && !matches!(row.standing, Standing::Disabled { .. }));
            // One that does not open is told of by whoever works with it.
            in_service
                .filter_map(|row| self.open(row).ok())
                .filter(|content| content.base_url.as_deref() == Some(address))
                .map(|content| content.key)
                .collect()
        })
    }
}
