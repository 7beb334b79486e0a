//! Which keys may be used now, as all workers see it.
//!
//! What an answer says of a key is written to its row at once and read by everybody within a second. Without a database
//! (tests, the rehearsal) the same is known to this process alone.

use chrono::{DateTime, Utc};
use loopwright_engine::Failure;
use sqlx::PgPool;
use std::{
    collections::HashMap,
    fmt,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};
use uuid::Uuid;

/// How old what is known of the rows may be. Chosen: a key that another worker saw refused is asked by this one for at most
/// a second more; one small statement a second.
pub const STANDING_AGE_MAX: Duration = Duration::from_secs(1);
/// Most rows that are read: keys out of service, of which an installation has a handful.
const ROWS_MAX: i64 = 1_000;
/// Digits of a fingerprint that are shown: enough to tell keys apart by, too few to look one up in a list of hashes.
const FINGERPRINT_SHOWN: usize = 8;
/// Most models that keys may not use, or rest for, that are remembered; beyond it they are simply asked again.
const FORBIDDEN_MAX: usize = 4_096;

/// Longest rest of a key for a model where no wait is named: the time in which a budget per minute comes back.
pub const RESTS_MAX: Duration = Duration::from_secs(60);
/// How long after a rest another refusal is one more of the same row, in seconds, unless an answer came meanwhile.
const ROW_ENDS_AFTER_S: u64 = 120;
/// Refusals in a row that are counted: by then every rest is [`RESTS_MAX`].
const REFUSALS_MAX: u32 = 16;

/// How long a key is not asked for a model that it may not use. Chosen: soon enough after somebody has allowed it; a
/// refusal costs nothing.
pub const FORBIDDEN_FOR: Duration = Duration::from_secs(10 * 60);
/// Reason of a [`Standing::Cooling`] that waiting does not end.
pub const FORBIDDEN: &str = "model.unavailable";

/// Which row of `api_keys`.
///
/// # Shape
/// Logs are given an id, or the first eight digits of a fingerprint ([`std::fmt::Debug`]).
#[derive(Clone, PartialEq, Eq, Hash)]
pub enum KeyRef {
    /// A key of the platform, from the environment or sealed, by its fingerprint in hex.
    Platform { provider: String, fingerprint: String },
    /// A user's own.
    Own(Uuid),
}

/// Whether a key may be used.
#[derive(Clone, Debug, PartialEq)]
pub enum Standing {
    Active,
    /// Not before `until`, for `model` or for every one. `reason` is a failure code. Rests for one model are not a key's
    /// standing but beside it ([`Board::rest`]); a row that names one is of a release before.
    Cooling {
        model: Option<String>,
        until: Instant,
        reason: String,
    },
    /// Not until somebody acts.
    Disabled {
        reason: String,
    },
}

/// The standing of every key that is not simply active.
#[derive(Debug, Default)]
pub struct Board {
    pool: Option<PgPool>,
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    standings: HashMap<KeyRef, Standing>,
    /// What a provider said when it refused a key, in words for its owner.
    said: HashMap<KeyRef, Failure>,
    /// Models that a key may not use, and until when. Rows of their own: two forbidden models must not make it the key's.
    forbidden: HashMap<(KeyRef, String), Forbidden>,
    /// Models that a key rests for, also those that have just ended.
    rests: HashMap<(KeyRef, String), Rest>,
    read_at: Option<Instant>,
    /// When this process noted the standing of a key itself: rows that were asked for before say nothing of it.
    noted: HashMap<KeyRef, Instant>,
}

/// A model that a key may not use.
#[derive(Debug)]
struct Forbidden {
    until: Instant,
    /// What the provider said, if this process heard it.
    said: Option<Failure>,
    /// It has a row, so that others know it too.
    shared: bool,
}

/// A rest for one model.
#[derive(Clone, Debug)]
struct Rest {
    until: Instant,
    /// A failure code.
    reason: String,
    /// In a row.
    refusals: u32,
    /// When this process noted it itself.
    noted_at: Option<Instant>,
    /// It has a row, so that others know it too.
    shared: bool,
}

/// How long a key is left alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// So long.
    Named(Duration),
    /// So long at the first refusal, and twice as long at each that follows without an answer in between, up to [`RESTS_MAX`].
    Doubling(Duration),
}

impl Wait {
    /// At the `n`-th refusal in a row, from 1.
    fn at(self, n: u32) -> Duration {
        match self {
            Self::Named(wait) => wait,
            Self::Doubling(first) => {
                first.saturating_mul(1 << n.clamp(1, REFUSALS_MAX).saturating_sub(1)).min(RESTS_MAX.max(first))
            }
        }
    }
}

/// Key, provider, fingerprint, whether it is a user's, model, rest of the wait in ms, reason, refusals in a row: 0 for a model that
/// is forbidden.
type ModelRow = (Uuid, String, String, bool, String, f64, String, i32);

/// Provider, fingerprint, status, reason, model, rest of the wait in ms.
type Row = (String, String, String, Option<String>, Option<String>, Option<f64>);

impl Board {
    /// A board that all processes over this database share.
    #[must_use]
    pub fn shared(pool: PgPool) -> Self {
        Self { pool: Some(pool), known: Mutex::default() }
    }

    /// Reads the platform's keys, and which models keys may not use, if what is known is older than [`STANDING_AGE_MAX`]. A
    /// database that does not answer changes nothing: what was known still counts.
    pub async fn refresh(&self) {
        let Some(pool) = &self.pool else { return };
        {
            let mut known = self.lock();
            if known.read_at.is_some_and(|at| at.elapsed() < STANDING_AGE_MAX) {
                return;
            }
            // Whoever comes while this is read goes on with what is known.
            known.read_at = Some(Instant::now());
        }
        let asked_at = Instant::now();
        let rows: Result<Vec<Row>, _> = sqlx::query_as(
            "select provider, encode(fingerprint, 'hex'), status, disabled_reason, cooling_model,
                    (extract(epoch from cooldown_until - engine_now()) * 1000)::float8
             from api_keys where user_id is null and status <> 'active' limit $1",
        )
        .bind(ROWS_MAX)
        .fetch_all(pool)
        .await;
        let models: Result<Vec<ModelRow>, _> = sqlx::query_as(
            "select k.id, k.provider, encode(k.fingerprint, 'hex'), k.user_id is not null, m.model,
                    (extract(epoch from m.until - engine_now()) * 1000)::float8, m.reason, m.refusals
             from (select api_key_id, model, forbidden_until as until, reason, 0 as refusals from api_key_models
                   where forbidden_until > engine_now()
                   union all
                   select api_key_id, model, rests_until, reason, refusals from api_key_rests
                   where rests_until > engine_now() - make_interval(secs => $2)) m
             join api_keys k on k.id = m.api_key_id limit $1",
        )
        .bind(ROWS_MAX)
        .bind(ROW_ENDS_AFTER_S as f64)
        .fetch_all(pool)
        .await;
        let (rows, models) = match (rows, models) {
            (Ok(rows), Ok(models)) => (rows, models),
            (Err(error), _) | (_, Err(error)) => {
                return tracing::warn!(%error, "the standing of keys could not be read");
            }
        };
        self.take_rows(rows, models, asked_at);
    }

    /// Takes over what rows said that were asked for at `asked_at`. What this process has noted since then is newer and stays.
    fn take_rows(&self, rows: Vec<Row>, models: Vec<ModelRow>, asked_at: Instant) {
        let mut known = self.lock();
        let mut heard = std::mem::take(&mut known.forbidden);
        let mut rests = HashMap::new();
        for (id, provider, fingerprint, own, model, wait_ms, reason, refusals) in models {
            let key = if own { KeyRef::Own(id) } else { KeyRef::Platform { provider, fingerprint } };
            let at = (key, model);
            let now = Instant::now();
            // One that has ended counts refusals only.
            let until = if wait_ms > 0.0 { now + milliseconds(wait_ms) } else { now };
            match u32::try_from(refusals) {
                Ok(refusals) if refusals > 0 => {
                    rests.insert(at, Rest { until, reason, refusals, noted_at: None, shared: true });
                }
                _ => {
                    let said = heard.remove(&at).and_then(|known| known.said);
                    known.forbidden.insert(at, Forbidden { until, said, shared: true });
                }
            }
        }
        // What could not be written is known all the same; what has no row any more was lifted.
        known.forbidden.extend(heard.into_iter().filter(|(_, known)| !known.shared));
        let newer = |rest: &Rest| !rest.shared || rest.noted_at.is_some_and(|at| at >= asked_at);
        rests.extend(std::mem::take(&mut known.rests).into_iter().filter(|(_, rest)| newer(rest)));
        known.rests = rests;
        let Known { standings, noted, .. } = &mut *known;
        noted.retain(|_, at| *at >= asked_at);
        standings.retain(|key, _| matches!(key, KeyRef::Own(_)) || noted.contains_key(key));
        for (provider, fingerprint, status, reason, model, wait_ms) in rows {
            let standing = standing(&status, reason, model, wait_ms);
            let key = KeyRef::Platform { provider, fingerprint };
            if !noted.contains_key(&key) {
                standings.insert(key, standing);
            }
        }
    }

    /// Now, by the clock that all workers share: the database's. A rest until an instant that a provider names is a wait that is written
    /// for everybody, so a worker whose own clock is an hour off must not make it. This machine's, where there is no database or no
    /// answer: then nobody else is told either.
    pub async fn now(&self) -> DateTime<Utc> {
        let Some(pool) = &self.pool else { return Utc::now() };
        match sqlx::query_scalar("select engine_now()").fetch_one(pool).await {
            Ok(now) => now,
            Err(error) => {
                tracing::warn!(%error, "the time of the database is not known; this machine's is taken");
                Utc::now()
            }
        }
    }

    /// Notes what was read of a user's key.
    pub fn learn(&self, key: KeyRef, standing: Standing) {
        let mut known = self.lock();
        match standing {
            Standing::Active => {
                known.said.remove(&key);
                known.standings.remove(&key)
            }
            other => known.standings.insert(key, other),
        };
    }

    /// Whether `key` may be used for `model` now.
    #[must_use]
    pub fn standing(&self, key: &KeyRef, model: &str, now: Instant) -> Standing {
        let known = self.lock();
        let standing = match known.standings.get(key) {
            Some(Standing::Cooling { model: only, until, .. })
                if *until <= now || only.as_deref().is_some_and(|only| only != model) =>
            {
                Standing::Active
            }
            Some(standing) => standing.clone(),
            None => Standing::Active,
        };
        if standing != Standing::Active || (known.forbidden.is_empty() && known.rests.is_empty()) {
            return standing;
        }
        let at = (key.clone(), model.to_owned());
        let cooling = |until: Instant, reason: &str| Standing::Cooling {
            model: Some(model.to_owned()),
            until,
            reason: reason.to_owned(),
        };
        match (known.forbidden.get(&at), known.rests.get(&at)) {
            (Some(Forbidden { until, .. }), _) if *until > now => cooling(*until, FORBIDDEN),
            (_, Some(Rest { until, reason, .. })) if *until > now => cooling(*until, reason),
            _ => standing,
        }
    }

    /// Leaves a key alone for a model that it may not use, for [`FORBIDDEN_FOR`].
    ///
    /// # Transaction
    /// One statement: a row for key and model, and what is over goes. Without a row of the key only this process knows.
    pub async fn forbid(&self, key: &KeyRef, model: &str, why: &Failure) {
        {
            let now = Instant::now();
            let mut known = self.lock();
            if known.forbidden.len() >= FORBIDDEN_MAX {
                known.forbidden.retain(|_, known| known.until > now);
                if known.forbidden.len() >= FORBIDDEN_MAX {
                    known.forbidden.clear();
                }
            }
            let said = Some(why.clone());
            let at = (key.clone(), model.to_owned());
            known.forbidden.insert(at, Forbidden { until: now + FORBIDDEN_FOR, said, shared: false });
        }
        let Some(pool) = &self.pool else { return };
        let (own, provider, fingerprint) = key.columns();
        let written = sqlx::query(
            "with over as (delete from api_key_models where forbidden_until < engine_now() - interval '1 day' and model <> $4)
             insert into api_key_models (api_key_id, model, forbidden_until, reason)
             select id, $4, engine_now() + $5 * interval '1 ms', $6 from api_keys
             where id = $1 or ($1 is null and user_id is null and provider = $2 and fingerprint = decode($3, 'hex'))
             on conflict (api_key_id, model) do update set forbidden_until = excluded.forbidden_until, reason = excluded.reason",
        )
        .bind(own)
        .bind(provider)
        .bind(fingerprint)
        .bind(model)
        .bind(FORBIDDEN_FOR.as_millis() as f64)
        .bind(&why.code)
        .execute(pool)
        .await;
        match written {
            Ok(written) => {
                if let Some(known) = self.lock().forbidden.get_mut(&(key.clone(), model.to_owned())) {
                    known.shared = written.rows_affected() > 0;
                }
            }
            Err(error) => tracing::warn!(%error, "others are not told that a key may not use a model"),
        }
    }

    /// What the provider said when it refused `key` this model, if this process heard it.
    #[must_use]
    pub fn said_of_model(&self, key: &KeyRef, model: &str) -> Option<Failure> {
        self.lock().forbidden.get(&(key.clone(), model.to_owned())).and_then(|known| known.said.clone())
    }

    /// What the provider said when it refused `key`, if this process heard it.
    #[must_use]
    pub fn said(&self, key: &KeyRef) -> Option<Failure> {
        self.lock().said.get(key).cloned()
    }

    /// Leaves a key alone for one model; it serves the others. A longer rest that is known stays. A refusal while it rests is of a
    /// request from before, and not one more in the row. Returns how long it is left alone now.
    ///
    /// # Transaction
    /// One statement: a row for key and model, and what is long over goes. Without a row of the key only this process knows.
    pub async fn rest(&self, key: &KeyRef, model: &str, wait: Wait, why: &Failure) -> Duration {
        metrics::counter!("loopwright_api_key_events_total", "event" => "cooled", "reason" => why.code.clone())
            .increment(1);
        let at = (key.clone(), model.to_owned());
        let now = Instant::now();
        let mut rest = {
            let known = self.lock();
            let before = known.rests.get(&at);
            let refusals = match before {
                Some(before) if before.until > now => before.refusals,
                Some(before) if now.duration_since(before.until).as_secs() < ROW_ENDS_AFTER_S => {
                    (before.refusals + 1).min(REFUSALS_MAX)
                }
                _ => 1,
            };
            let until = (now + wait.at(refusals)).max(before.map_or(now, |before| before.until));
            Rest { until, reason: why.code.clone(), refusals, noted_at: None, shared: false }
        };
        if let Some(pool) = &self.pool {
            let (own, provider, fingerprint) = key.columns();
            let (first, most, doubles) = match wait {
                Wait::Named(wait) => (wait, wait, false),
                Wait::Doubling(first) => (first, RESTS_MAX.max(first), true),
            };
            let ms = |wait: Duration| i64::try_from(wait.as_millis()).unwrap_or(i64::MAX) as f64;
            let written: Result<Option<(f64, i32)>, _> = sqlx::query_as(
                "with over as (delete from api_key_rests where rests_until < engine_now() - interval '1 day' and model <> $4)
                 insert into api_key_rests as r (api_key_id, model, rests_until, reason, refusals)
                 select id, $4, engine_now() + $6 * interval '1 ms', $5, 1 from api_keys
                 where id = $1 or ($1 is null and user_id is null and provider = $2 and fingerprint = decode($3, 'hex'))
                 on conflict (api_key_id, model) do update set reason = excluded.reason,
                   refusals = case when r.rests_until > engine_now() then r.refusals
                                   when r.rests_until > engine_now() - make_interval(secs => $9) then least(r.refusals + 1, $10)
                                   else 1 end,
                   rests_until = greatest(r.rests_until, engine_now() + interval '1 ms' * case
                                   when not $8 or r.rests_until <= engine_now() - make_interval(secs => $9) then $6
                                   else least($7, $6 * 2 ^ case when r.rests_until > engine_now() then r.refusals - 1
                                                                else least(r.refusals + 1, $10) - 1 end) end)
                 returning (extract(epoch from rests_until - engine_now()) * 1000)::float8, refusals",
            )
            .bind(own)
            .bind(provider)
            .bind(fingerprint)
            .bind(model)
            .bind(&why.code)
            .bind(ms(first))
            .bind(ms(most))
            .bind(doubles)
            .bind(ROW_ENDS_AFTER_S as f64)
            .bind(i32::try_from(REFUSALS_MAX).unwrap_or(i32::MAX))
            .fetch_optional(pool)
            .await;
            match written {
                Ok(Some((left_ms, refusals))) => {
                    rest.until = Instant::now() + milliseconds(left_ms);
                    rest.refusals = u32::try_from(refusals).unwrap_or(1);
                    rest.shared = true;
                }
                Ok(None) => {}
                Err(error) => tracing::warn!(%error, "others are not told that a key rests for a model"),
            }
        }
        let until = rest.until;
        // From now on: rows that were asked for before say nothing of it.
        rest.noted_at = Some(Instant::now());
        let mut known = self.lock();
        if known.rests.len() >= FORBIDDEN_MAX && !known.rests.contains_key(&at) {
            known.rests.retain(|_, rest| rest.until > now);
            if known.rests.len() >= FORBIDDEN_MAX {
                known.rests.clear();
            }
        }
        known.rests.insert(at, rest);
        until.saturating_duration_since(Instant::now())
    }

    /// A key has answered for a model: what it was refused before is over, and the next refusal is the first of a row. Costs
    /// nothing where there was none.
    ///
    /// # Transaction
    /// One delete of the row of a rest that has ended.
    pub async fn served(&self, key: &KeyRef, model: &str) {
        let now = Instant::now();
        let at = (key.clone(), model.to_owned());
        {
            let mut known = self.lock();
            // One that is in force is of a later request than the answer's.
            if known.rests.get(&at).is_none_or(|rest| rest.until > now) {
                return;
            }
            known.rests.remove(&at);
        }
        let Some(pool) = &self.pool else { return };
        let (own, provider, fingerprint) = key.columns();
        let deleted = sqlx::query(
            "delete from api_key_rests r using api_keys k where r.api_key_id = k.id and r.model = $4 and r.rests_until <= engine_now()
               and (k.id = $1 or ($1 is null and k.user_id is null and k.provider = $2 and k.fingerprint = decode($3, 'hex')))",
        )
        .bind(own)
        .bind(provider)
        .bind(fingerprint)
        .bind(model)
        .execute(pool)
        .await;
        if let Err(error) = deleted {
            tracing::warn!(%error, "others are not told that a key serves a model again");
        }
    }

    /// Leaves a key alone for `wait`, whatever the model. A longer wait that is known stays. Returns how long it is left alone now.
    ///
    /// # Transaction
    /// One update of the key's row, of no other. A key that is disabled or revoked stays so.
    pub async fn cool(&self, key: &KeyRef, wait: Duration, why: &Failure) -> Duration {
        let mut until = Instant::now() + wait;
        if let Some(pool) = &self.pool {
            let (own, provider, fingerprint) = key.columns();
            let left: Result<Option<f64>, _> = sqlx::query_scalar(
                "update api_keys set status = 'cooling', disabled_reason = $4, cooling_model = null,
                   cooldown_until = greatest(case when status = 'cooling' and cooling_model is null then cooldown_until end,
                                             engine_now() + $5 * interval '1 ms')
                 where status in ('active', 'cooling')
                   and (id = $1 or ($1 is null and user_id is null and provider = $2 and fingerprint = decode($3, 'hex')))
                 returning (extract(epoch from cooldown_until - engine_now()) * 1000)::float8",
            )
            .bind(own)
            .bind(provider)
            .bind(fingerprint)
            .bind(&why.code)
            .bind(i64::try_from(wait.as_millis()).unwrap_or(i64::MAX) as f64)
            .fetch_optional(pool)
            .await;
            match left {
                Ok(Some(ms)) => until = Instant::now() + milliseconds(ms),
                Ok(None) => {}
                Err(error) => tracing::warn!(%error, "others are not told that a key cools"),
            }
        }
        metrics::counter!("loopwright_api_key_events_total", "event" => "cooled", "reason" => why.code.clone())
            .increment(1);
        let mut known = self.lock();
        match known.standings.get(key) {
            Some(Standing::Disabled { .. }) => return until.saturating_duration_since(Instant::now()),
            // Without a row nobody else has kept the longer one.
            Some(Standing::Cooling { model: None, until: longer, .. }) => until = until.max(*longer),
            _ => {}
        }
        known.noted.insert(key.clone(), Instant::now());
        known.standings.insert(key.clone(), Standing::Cooling { model: None, until, reason: why.code.clone() });
        known.said.insert(key.clone(), why.clone());
        until.saturating_duration_since(Instant::now())
    }

    /// Takes a key out of service until somebody acts, and tells the operator.
    ///
    /// # Transaction
    /// One update of the key's row. A revoked key stays so.
    pub async fn disable(&self, key: &KeyRef, why: &Failure) {
        metrics::counter!("loopwright_api_key_events_total", "event" => "disabled", "reason" => why.code.clone())
            .increment(1);
        {
            let mut known = self.lock();
            known.noted.insert(key.clone(), Instant::now());
            known.standings.insert(key.clone(), Standing::Disabled { reason: why.code.clone() });
            known.said.insert(key.clone(), why.clone());
        }
        let mut row: Option<(Uuid, String)> = None;
        if let Some(pool) = &self.pool {
            let (own, provider, fingerprint) = key.columns();
            let written = sqlx::query_as(
                "update api_keys set status = 'disabled', disabled_reason = $4, cooldown_until = null, cooling_model = null
                 where status in ('active', 'cooling')
                   and (id = $1 or ($1 is null and user_id is null and provider = $2 and fingerprint = decode($3, 'hex')))
                 returning id, last4",
            )
            .bind(own)
            .bind(provider)
            .bind(fingerprint)
            .bind(&why.code)
            .fetch_optional(pool)
            .await;
            match written {
                Ok(found) => row = found,
                Err(error) => tracing::warn!(%error, "others are not told that a key is out of service"),
            }
        }
        // By what `loopwright api-keys list` calls it, where it has a row.
        let (id, ends_in) = row.unzip();
        tracing::error!(
            ?key,
            id = id.map(tracing::field::display),
            ends_in = ends_in.as_deref(),
            code = %why.code,
            "a key is out of service: replace it, or `loopwright api-keys enable`"
        );
    }

    /// Writes the rows of the platform's keys, so that they are listed before their first call.
    ///
    /// # Errors
    /// The database's.
    pub async fn register(&self, keys: &[(String, String, String)]) -> Result<(), sqlx::Error> {
        let Some(pool) = &self.pool else { return Ok(()) };
        for (provider, fingerprint, last4) in keys {
            sqlx::query(
                "insert into api_keys (provider, source, label, last4, fingerprint) values ($1, 'environment', 'platform', $2, decode($3, 'hex'))
                 on conflict (provider, fingerprint, coalesce(user_id, '00000000-0000-0000-0000-000000000000')) do nothing",
            )
            .bind(provider)
            .bind(last4)
            .bind(fingerprint)
            .execute(pool)
            .await?;
        }
        Ok(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for KeyRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Own(id) => write!(f, "own key {id}"),
            Self::Platform { provider, fingerprint } => {
                let begins = fingerprint.get(..FINGERPRINT_SHOWN).unwrap_or_default();
                write!(f, "{provider} key {begins}…")
            }
        }
    }
}

impl KeyRef {
    fn columns(&self) -> (Option<Uuid>, &str, &str) {
        match self {
            Self::Own(id) => (Some(*id), "", ""),
            Self::Platform { provider, fingerprint } => (None, provider, fingerprint),
        }
    }
}

/// The standing that a row states.
pub(super) fn standing(status: &str, reason: Option<String>, model: Option<String>, wait_ms: Option<f64>) -> Standing {
    let reason = reason.unwrap_or_else(|| "operator".to_owned());
    match status {
        "active" => Standing::Active,
        "cooling" => match wait_ms {
            Some(ms) if ms > 0.0 => Standing::Cooling { model, until: Instant::now() + milliseconds(ms), reason },
            _ => Standing::Active,
        },
        _ => Standing::Disabled { reason },
    }
}

fn milliseconds(ms: f64) -> Duration {
    Duration::try_from_secs_f64(ms / 1e3).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn models_that_a_key_may_not_use_are_left_out_one_by_one() {
        let board = Board::default();
        let key = KeyRef::Own(Uuid::nil());
        let now = Instant::now();
        for model in ["a", "b"] {
            board.forbid(&key, model, &Failure::permanent(FORBIDDEN, model)).await;
        }
        for model in ["a", "b"] {
            assert!(matches!(board.standing(&key, model, now), Standing::Cooling { .. }), "{model}");
            assert_eq!(board.said_of_model(&key, model).unwrap().message, model);
        }
        assert_eq!(board.standing(&key, "c", now), Standing::Active);
        assert_eq!(board.standing(&key, "a", now + FORBIDDEN_FOR + Duration::from_secs(60)), Standing::Active);
    }

    #[tokio::test]
    async fn rows_that_were_asked_for_before_a_rest_was_noted_do_not_end_it() {
        let board = Board::default();
        let key = |n: u32| KeyRef::Platform { provider: "gemini".into(), fingerprint: n.to_string() };
        let rests = |n| board.standing(&key(n), "m", Instant::now()) != Standing::Active;
        let why = Failure::retryable("transient.rate_limited", "x");
        let row = |n: u32| ("gemini".into(), n.to_string(), "disabled".to_owned(), None, None, None);
        let asked_at = Instant::now();
        board.cool(&key(1), Duration::from_secs(60), &why).await;
        board.disable(&key(2), &why).await;
        // The rows are older: of them both keys were active, and a third one was not.
        board.take_rows(vec![row(3)], vec![], asked_at);
        assert!(rests(1) && rests(2) && rests(3));
        // A row of before does not stand above what was noted either.
        board.take_rows(vec![("gemini".into(), "1".into(), "disabled".into(), None, None, None)], vec![], asked_at);
        assert!(matches!(board.standing(&key(1), "m", Instant::now()), Standing::Cooling { .. }));
        // Rows that were asked for later know everything.
        board.take_rows(vec![row(2)], vec![], Instant::now() + Duration::from_millis(1));
        assert!(!rests(1) && rests(2) && !rests(3));
    }

    #[tokio::test]
    async fn a_key_rests_for_each_model_by_itself_and_cools_for_all() {
        let board = Board::default();
        let key = KeyRef::Own(Uuid::nil());
        let why = Failure::retryable("transient.rate_limited", "x");
        let now = Instant::now();
        let rests = |model: &str, at: Instant| matches!(board.standing(&key, model, at), Standing::Cooling { .. });
        board.rest(&key, "a", Wait::Named(Duration::from_secs(60)), &why).await;
        board.rest(&key, "b", Wait::Named(Duration::from_secs(10)), &why).await;
        assert!(rests("a", now) && rests("b", now) && !rests("c", now), "two busy models leave it the third");
        // A shorter wait that is named later ends none.
        board.rest(&key, "a", Wait::Named(Duration::from_secs(1)), &why).await;
        let later = now + Duration::from_secs(30);
        assert!(rests("a", later) && !rests("b", later));
        assert!(!rests("a", now + Duration::from_secs(62)));
        board.cool(&key, Duration::from_secs(60), &why).await;
        board.cool(&key, Duration::from_secs(1), &why).await;
        for model in ["a", "b", "c"] {
            assert!(rests(model, later), "{model}");
        }
        board.disable(&key, &Failure::permanent("provider.key_invalid", "no")).await;
        board.cool(&key, Duration::from_secs(1), &why).await;
        assert!(matches!(board.standing(&key, "c", now), Standing::Disabled { .. }), "cooling does not heal");
        assert_eq!(board.said(&key).unwrap().message, "no");
        board.learn(key.clone(), Standing::Active);
        assert_eq!((board.standing(&key, "c", now), board.said(&key)), (Standing::Active, None));
    }

    #[tokio::test]
    async fn refusals_in_a_row_double_the_rest_and_an_answer_ends_the_row() {
        let board = Board::default();
        let key = KeyRef::Own(Uuid::nil());
        let why = Failure::retryable("transient.rate_limited", "x");
        let first = Wait::Doubling(Duration::from_nanos(1));
        let refusals = || board.lock().rests.get(&(key.clone(), "m".to_owned())).map(|rest| rest.refusals);
        for n in 1..=3 {
            board.rest(&key, "m", first, &why).await;
            assert_eq!(refusals(), Some(n));
        }
        board.served(&key, "m").await;
        assert_eq!(refusals(), None);
        // Many that were under way together are one refusal.
        for _ in 0..5 {
            board.rest(&key, "m", Wait::Doubling(Duration::from_secs(30)), &why).await;
        }
        assert_eq!(refusals(), Some(1));
        board.served(&key, "m").await;
        assert_eq!(refusals(), Some(1), "the answer to an earlier question does not end a rest");
        let second = Duration::from_secs(1);
        let waits = [1, 2, 3, 6, 7, 99].map(|n| Wait::Doubling(second).at(n).as_secs());
        assert_eq!(waits, [1, 2, 4, 32, 60, 60]);
        assert_eq!(Wait::Named(3 * second).at(9), 3 * second);
    }
}
