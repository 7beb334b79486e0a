//! The rows of `api_keys`: as they are shown, as they lie sealed, and how one is written.

use super::{
    Error, KeyRef, NewKey, Place, Ring, Standing, VERSION, board,
    envelope::{self, Content, Envelope},
};
use crate::provider::KeyIdentity;
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use sqlx::{FromRow, PgConnection, PgExecutor, Row, postgres::PgRow};
use uuid::Uuid;

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
    /// Keyed hash of the key, 64 hex digits.
    #[serde(skip)]
    pub fingerprint: String,
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

/// The columns of a [`KeyView`].
macro_rules! view {
    () => {
        " id, user_id, provider, source, label, last4, encode(fingerprint, 'hex') as fingerprint,
    case when status in ('active', 'cooling') then
           case when cooldown_until > engine_now() or exists (select from api_key_rests r where r.api_key_id = api_keys.id and r.rests_until > engine_now())
                then 'cooling' else 'active' end
         else status end as status,
    case when status = 'cooling' and cooldown_until > engine_now() or status not in ('active', 'cooling') then disabled_reason
         else (select r.reason from api_key_rests r where r.api_key_id = api_keys.id and r.rests_until > engine_now()
               order by r.rests_until desc limit 1) end as reason,
    case when status in ('active', 'cooling') then
           (select max(rest.until) from (select cooldown_until as until union all
              select r.rests_until from api_key_rests r where r.api_key_id = api_keys.id) rest where rest.until > engine_now())
         end as cooldown_until,
    base_url, model, platform_fallback, nullif(kek_id, '') as kek_id, created_at "
    };
}

/// The columns of an [`OwnRow`].
macro_rules! sealed {
    () => {
        "select id, provider, user_id, base_url, ciphertext, nonce, wrapped_dek, kek_id, envelope_version, model, platform_fallback,
                sealed_at, last4, status, disabled_reason, cooling_model,
                (extract(epoch from cooldown_until - engine_now()) * 1000)::float8 as wait_ms
         from api_keys where source = 'sealed' and status <> 'revoked' and "
    };
}

pub(super) use {sealed, view};

/// A sealed key, a user's or the platform's; [`super::Keys::open`] opens it.
#[derive(Clone, Debug)]
pub struct SealedKey {
    pub id: Uuid,
    pub provider: String,
    pub last4: String,
    pub model: Option<String>,
    pub platform_fallback: bool,
    pub sealed_at: Option<DateTime<Utc>>,
    pub standing: Standing,
    /// `None`: the platform's.
    pub(super) user: Option<Uuid>,
    pub(super) base_url: Option<String>,
    pub(super) envelope: Envelope,
}

/// Seals a key into its row, which is made or becomes a sealed one. It is in service from then on, unless an operator took
/// it out.
pub(super) async fn write(
    conn: &mut PgConnection,
    ring: &Ring,
    id: Uuid,
    user: Option<Uuid>,
    new: &NewKey,
    base_url: Option<String>,
) -> Result<KeyView, Error> {
    let identity = KeyIdentity::of(&new.provider, Some(&new.key));
    let place = Place { id, provider: &new.provider, user, version: VERSION };
    let content = Content { key: new.key.clone(), base_url: base_url.clone() };
    let sealed = envelope::seal(ring, place, &content)?;
    // What it may be used for is found out anew.
    found_out_anew(&mut *conn, id).await?;
    let row = sqlx::query_as(concat!(
        "insert into api_keys (id, provider, user_id, source, label, base_url, model, platform_fallback, ciphertext, nonce,
                               wrapped_dek, kek_id, envelope_version, last4, fingerprint, sealed_at)
         values ($1, $2, $3, 'sealed', $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, decode($14, 'hex'), engine_now())
         on conflict (id) do update set source = 'sealed', label = excluded.label, base_url = excluded.base_url, model = excluded.model,
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
    ));
    let view = row
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
        .fetch_one(conn)
        .await?;
    Ok(view)
}

/// Forgets which models a key may not use, and which it rests for.
pub(super) async fn found_out_anew(conn: impl PgExecutor<'_>, id: Uuid) -> Result<(), sqlx::Error> {
    let sql = "with models as (delete from api_key_models where api_key_id = $1) delete from api_key_rests where api_key_id = $1";
    sqlx::query(sql).bind(id).execute(conn).await.map(drop)
}

impl SealedKey {
    /// Of a user's key.
    #[must_use]
    pub fn key_ref(&self) -> KeyRef {
        KeyRef::Own(self.id)
    }

    /// Whether it is the platform's.
    #[must_use]
    pub fn is_platform(&self) -> bool {
        self.user.is_none()
    }
}

impl From<OwnRow> for SealedKey {
    fn from(row: OwnRow) -> Self {
        Self {
            id: row.sealed.id,
            last4: row.last4,
            model: row.model,
            platform_fallback: row.platform_fallback,
            sealed_at: row.sealed_at,
            standing: board::standing(&row.status, row.disabled_reason, row.cooling_model, row.wait_ms),
            user: row.sealed.user_id,
            envelope: row.sealed.envelope(),
            provider: row.sealed.provider,
            base_url: row.sealed.base_url,
        }
    }
}

pub(super) struct SealedRow {
    pub(super) id: Uuid,
    pub(super) provider: String,
    pub(super) user_id: Option<Uuid>,
    pub(super) base_url: Option<String>,
    pub(super) ciphertext: Vec<u8>,
    pub(super) nonce: Vec<u8>,
    pub(super) wrapped_dek: Vec<u8>,
    pub(super) kek_id: String,
    pub(super) envelope_version: i16,
}

impl SealedRow {
    pub(super) fn place(&self) -> Place<'_> {
        Place { id: self.id, provider: &self.provider, user: self.user_id, version: self.envelope_version }
    }
    pub(super) fn envelope(&self) -> Envelope {
        Envelope {
            ciphertext: self.ciphertext.clone(),
            nonce: self.nonce.clone(),
            wrapped_dek: self.wrapped_dek.clone(),
            kek_id: self.kek_id.clone(),
            version: self.envelope_version,
        }
    }
}

pub(super) struct OwnRow {
    sealed: SealedRow,
    last4: String,
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
            fingerprint: row.try_get("fingerprint")?,
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
            last4: row.try_get("last4")?,
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
