//! The rows of `api_keys` as users and operators see them, and the opened keys of a user as the orchestrator needs them.

use super::{
    Board, Error, KeyRef, Place, Rates, Ring, Standing, VERSION, WINDOW, board,
    envelope::{self, Content, Envelope},
};
use crate::provider::{
    KeyIdentity,
    address::{Lookup, SystemLookup, Trust, parse_base_url, resolves_public},
};
use chrono::{DateTime, Utc};
use loopwright_engine::transaction;
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};
use sqlx::{FromRow, PgPool, Row, postgres::PgRow};
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
/// Rows that one step of a rotation looks at.
const REWRAP_ROWS: i64 = 100;
/// What a list shows at most: a page of a terminal is less.
const LIST_MAX: i64 = 1_000;

/// Whether a key is in use, as its row states it; a cooling one whose time is over is `active`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    Active,
    Cooling,
    Disabled,
    Revoked,
}

/// A key as it is shown: nothing of it but its last four characters.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct KeyView {
    pub id: Uuid,
    /// `None`: the platform's.
    pub user_id: Option<Uuid>,
    pub provider: String,
    /// `environment` or `sealed`.
    pub source: String,
    pub label: String,
    pub last4: String,
    /// As [`Status`].
    pub status: String,
    /// Why it cools or is out of service: a failure code, or `operator`.
    pub reason: Option<String>,
    pub cooldown_until: Option<DateTime<Utc>>,
    pub base_url: Option<String>,
    pub model: Option<String>,
    pub platform_fallback: bool,
    /// Which key of the ring wraps it.
    #[serde(skip)]
    pub kek_id: Option<String>,
    pub created_at: DateTime<Utc>,
}

macro_rules! view {
    () => {
        " id, user_id, provider, source, label, last4,
    case when status = 'cooling' and cooldown_until <= engine_now() then 'active' else status end as status,
    case when status = 'cooling' and cooldown_until <= engine_now() then null else disabled_reason end as reason,
    case when cooldown_until > engine_now() then cooldown_until end as cooldown_until,
    base_url, model, platform_fallback, nullif(kek_id, '') as kek_id, created_at "
    };
}

/// A key that a user hands over.
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

/// An opened key of a user.
#[derive(Clone, Debug)]
pub struct OwnKey {
    pub id: Uuid,
    pub provider: String,
    pub model: Option<String>,
    pub platform_fallback: bool,
    pub sealed_at: Option<DateTime<Utc>>,
    pub standing: Standing,
    user: Uuid,
    base_url: Option<String>,
    envelope: Envelope,
}

/// What one step of a rotation did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Rewrapped {
    pub rows: u64,
    /// Rows that do not open under this ring, or changed meanwhile; they stay as they are.
    pub left: u64,
    /// Where the next step begins; `None` when there is none.
    pub after: Option<Uuid>,
}

/// The door to the keys. Cheap to clone.
#[derive(Clone)]
pub struct Keys {
    pool: PgPool,
    ring: Option<Arc<Ring>>,
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
        let place = Place { id, provider: &new.provider, user: Some(user), version: VERSION };
        let content = Content { key: new.key.clone(), base_url: base_url.clone() };
        let sealed = envelope::seal(ring, place, &content)?;
        let view = sqlx::query_as(concat!(
            "insert into api_keys (id, provider, user_id, source, label, base_url, model, platform_fallback, ciphertext, nonce,
                                   wrapped_dek, kek_id, envelope_version, last4, fingerprint, sealed_at)
             values ($1, $2, $3, 'sealed', $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, decode($14, 'hex'), engine_now())
             on conflict (id) do update set label = excluded.label, base_url = excluded.base_url, model = excluded.model,
               platform_fallback = excluded.platform_fallback, ciphertext = excluded.ciphertext, nonce = excluded.nonce,
               wrapped_dek = excluded.wrapped_dek, kek_id = excluded.kek_id, envelope_version = excluded.envelope_version,
               sealed_at = excluded.sealed_at, rotated_at = engine_now(),
               status = case when api_keys.status in ('disabled', 'revoked') and api_keys.disabled_reason = 'operator'
                             then 'disabled' else 'active' end,
               disabled_reason = case when api_keys.status in ('disabled', 'revoked') and api_keys.disabled_reason = 'operator'
                                      then 'operator' end,
               cooldown_until = null, cooling_model = null
             returning",
            view!()
        ))
        .bind(id)
        .bind(&new.provider)
        .bind(user)
        .bind(&new.label)
        .bind(&base_url)
        .bind(&new.model)
        .bind(new.platform_fallback)
        .bind(&sealed.ciphertext)
        .bind(&sealed.nonce)
        .bind(&sealed.wrapped_dek)
        .bind(&sealed.kek_id)
        .bind(sealed.version)
        .bind(&identity.last4)
        .bind(&identity.fingerprint)
        .fetch_one(&mut *tx)
        .await?;
        tx.commit().await?;
        Ok(view)
    }

    /// Checks a new key; returns its base URL as it is kept.
    async fn checked(&self, new: &NewKey) -> Result<Option<String>, Error> {
        let invalid = |text: &str| Err(Error::Invalid(text.to_owned()));
        let own_server = match new.provider.as_str() {
            "gemini" | "openrouter" => false,
            "openai_compatible" => true,
            _ => return invalid("the provider is gemini, openrouter or openai_compatible"),
        };
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
        match (&new.base_url, own_server) {
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

    /// One step of a rotation: wraps rows that another key of the ring wraps by the first, or with `anew` seals every
    /// row under a new key of its own. Go on with `after` until there is none; a step that was not finished is simply done
    /// again, and finds what is left by `kek_id`.
    ///
    /// # Errors
    /// `keys_unavailable`. A row that does not open is counted and left.
    /// # Transaction
    /// One statement a row, guarded by the bytes that were read: a key that was put anew meanwhile wins.
    pub async fn rewrap(&self, after: Option<Uuid>, anew: bool) -> Result<Rewrapped, Error> {
        let ring = self.ring.as_ref().ok_or(Error::Unavailable)?;
        let (first, _) = ring.first().ok_or(Error::Unavailable)?;
        let rows: Vec<SealedRow> = sqlx::query_as(
            "select id, provider, user_id, base_url, ciphertext, nonce, wrapped_dek, kek_id, envelope_version from api_keys
             where source = 'sealed' and status <> 'revoked' and ($1::uuid is null or id > $1) and ($2 or kek_id <> $3) order by id limit $4",
        )
        .bind(after)
        .bind(anew)
        .bind(first)
        .bind(REWRAP_ROWS)
        .fetch_all(&self.pool)
        .await?;
        let mut done = Rewrapped::default();
        if rows.len() as i64 == REWRAP_ROWS {
            done.after = rows.last().map(|row| row.id);
        }
        for row in rows {
            let (place, old) = (row.place(), row.envelope());
            let new = if anew {
                envelope::open(ring, place, &old).and_then(|content| envelope::seal(ring, place, &content))
            } else {
                envelope::rewrap(ring, place, &old)
            };
            let new = match new {
                Ok(new) => new,
                Err(error) => {
                    tracing::error!(key = %row.id, %error, "a key is not wrapped anew");
                    done.left += 1;
                    continue;
                }
            };
            let written = sqlx::query(
                "update api_keys set ciphertext = $3, nonce = $4, wrapped_dek = $5, kek_id = $6, rotated_at = engine_now()
                 where id = $1 and wrapped_dek = $2",
            )
            .bind(row.id)
            .bind(&row.wrapped_dek)
            .bind(&new.ciphertext)
            .bind(&new.nonce)
            .bind(&new.wrapped_dek)
            .bind(&new.kek_id)
            .execute(&self.pool)
            .await?;
            match written.rows_affected() {
                0 => done.left += 1,
                _ => done.rows += 1,
            }
        }
        Ok(done)
    }

    /// Sealed keys by the key of the ring that wraps them. One that counts none may leave the ring.
    ///
    /// # Errors
    /// The database's.
    pub async fn wrapped_by(&self) -> Result<Vec<(String, i64)>, Error> {
        Ok(sqlx::query_as(
            "select kek_id, count(*) from api_keys where source = 'sealed' and status <> 'revoked' group by 1 order by 1",
        )
        .fetch_all(&self.pool)
        .await?)
    }

    /// The keys that a user keeps here, disabled ones too: who has brought keys is not served by the platform's unasked.
    ///
    /// # Errors
    /// The database's.
    pub async fn own(&self, user: Uuid) -> Result<Vec<OwnKey>, Error> {
        let rows: Vec<OwnRow> = sqlx::query_as(
            "select id, provider, user_id, base_url, ciphertext, nonce, wrapped_dek, kek_id, envelope_version, model, platform_fallback,
                    sealed_at, status, disabled_reason, cooling_model,
                    (extract(epoch from cooldown_until - engine_now()) * 1000)::float8 as wait_ms
             from api_keys where user_id = $1 and source = 'sealed' and status <> 'revoked' order by created_at, id limit $2",
        )
        .bind(user)
        .bind(KEYS_PER_USER_MAX as i64)
        .fetch_all(&self.pool)
        .await?;
        let own = |row: OwnRow| OwnKey {
            id: row.sealed.id,
            model: row.model,
            platform_fallback: row.platform_fallback,
            sealed_at: row.sealed_at,
            standing: board::standing(&row.status, row.disabled_reason, row.cooling_model, row.wait_ms),
            user,
            envelope: row.sealed.envelope(),
            provider: row.sealed.provider,
            base_url: row.sealed.base_url,
        };
        Ok(rows.into_iter().map(own).collect())
    }

    /// Opens a key, for the client that sends it.
    ///
    /// # Errors
    /// `keys_unavailable`, `key_encryption_key_missing`, `key_corrupt`: also if its row names another address than the
    /// one that was sealed with it.
    pub fn open(&self, own: &OwnKey) -> Result<Content, Error> {
        let ring = self.ring.as_ref().ok_or(Error::Unavailable)?;
        let place = Place { id: own.id, provider: &own.provider, user: Some(own.user), version: own.envelope.version };
        let content = envelope::open(ring, place, &own.envelope)?;
        if content.base_url != own.base_url {
            return Err(Error::Corrupt { id: own.id });
        }
        Ok(content)
    }
}

impl OwnKey {
    #[must_use]
    pub fn key_ref(&self) -> KeyRef {
        KeyRef::Own(self.id)
    }
}

struct SealedRow {
    id: Uuid,
    provider: String,
    user_id: Option<Uuid>,
    base_url: Option<String>,
    ciphertext: Vec<u8>,
    nonce: Vec<u8>,
    wrapped_dek: Vec<u8>,
    kek_id: String,
    envelope_version: i16,
}

impl SealedRow {
    fn place(&self) -> Place<'_> {
        Place { id: self.id, provider: &self.provider, user: self.user_id, version: self.envelope_version }
    }
    fn envelope(&self) -> Envelope {
        Envelope {
            ciphertext: self.ciphertext.clone(),
            nonce: self.nonce.clone(),
            wrapped_dek: self.wrapped_dek.clone(),
            kek_id: self.kek_id.clone(),
            version: self.envelope_version,
        }
    }
}

struct OwnRow {
    sealed: SealedRow,
    model: Option<String>,
    platform_fallback: bool,
    sealed_at: Option<DateTime<Utc>>,
    status: String,
    disabled_reason: Option<String>,
    cooling_model: Option<String>,
    wait_ms: Option<f64>,
}

impl FromRow<'_, PgRow> for KeyView {
    fn from_row(row: &PgRow) -> Result<Self, sqlx::Error> {
        Ok(Self {
            id: row.try_get("id")?,
            user_id: row.try_get("user_id")?,
            provider: row.try_get("provider")?,
            source: row.try_get("source")?,
            label: row.try_get("label")?,
            last4: row.try_get("last4")?,
            status: row.try_get("status")?,
            reason: row.try_get("reason")?,
            cooldown_until: row.try_get("cooldown_until")?,
            base_url: row.try_get("base_url")?,
            model: row.try_get("model")?,
            platform_fallback: row.try_get("platform_fallback")?,
            kek_id: row.try_get("kek_id")?,
            created_at: row.try_get("created_at")?,
        })
    }
}

impl FromRow<'_, PgRow> for SealedRow {
    fn from_row(row: &PgRow) -> Result<Self, sqlx::Error> {
        Ok(Self {
            id: row.try_get("id")?,
            provider: row.try_get("provider")?,
            user_id: row.try_get("user_id")?,
            base_url: row.try_get("base_url")?,
            ciphertext: row.try_get("ciphertext")?,
            nonce: row.try_get("nonce")?,
            wrapped_dek: row.try_get("wrapped_dek")?,
            kek_id: row.try_get("kek_id")?,
            envelope_version: row.try_get("envelope_version")?,
        })
    }
}

impl FromRow<'_, PgRow> for OwnRow {
    fn from_row(row: &PgRow) -> Result<Self, sqlx::Error> {
        Ok(Self {
            sealed: SealedRow::from_row(row)?,
            model: row.try_get("model")?,
            platform_fallback: row.try_get("platform_fallback")?,
            sealed_at: row.try_get("sealed_at")?,
            status: row.try_get("status")?,
            disabled_reason: row.try_get("disabled_reason")?,
            cooling_model: row.try_get("cooling_model")?,
            wait_ms: row.try_get("wait_ms")?,
        })
    }
}
