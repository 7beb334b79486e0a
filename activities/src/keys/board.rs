//! Which keys may be used now, as all workers see it.
//!
//! What an answer says of a key is written to its row at once and read by everybody within a second. Without a database
//! (tests, the rehearsal) the same is known to this process alone.

use loopwright_engine::Failure;
use sqlx::PgPool;
use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};
use uuid::Uuid;

/// How old what is known of the rows may be. Chosen: a key that another worker saw refused is asked by this one for at most
/// a second more; one small statement a second.
pub const STANDING_AGE_MAX: Duration = Duration::from_secs(1);
/// Most rows that are read: keys out of service, of which an installation has a handful.
const ROWS_MAX: i64 = 1_000;
/// Most models that keys may not use that are remembered; beyond it they are simply asked again.
const FORBIDDEN_MAX: usize = 4_096;

/// How long a key is not asked for a model that it may not use. Chosen: soon enough after somebody has allowed it; a
/// refusal costs nothing.
pub const FORBIDDEN_FOR: Duration = Duration::from_secs(10 * 60);
/// Reason of a [`Standing::Cooling`] that waiting does not end.
pub const FORBIDDEN: &str = "model.unavailable";

/// Which row of `api_keys`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
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
    /// Not before `until`, for `model` or for every one. `reason` is a failure code.
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

/// Key, provider, fingerprint, whether it is a user's, model, rest of the wait in ms.
type ForbiddenRow = (Uuid, String, String, bool, String, f64);

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
        let forbidden: Result<Vec<ForbiddenRow>, _> = sqlx::query_as(
            "select k.id, k.provider, encode(k.fingerprint, 'hex'), k.user_id is not null, m.model,
                    (extract(epoch from m.forbidden_until - engine_now()) * 1000)::float8
             from api_key_models m join api_keys k on k.id = m.api_key_id where m.forbidden_until > engine_now() limit $1",
        )
        .bind(ROWS_MAX)
        .fetch_all(pool)
        .await;
        let (rows, forbidden) = match (rows, forbidden) {
            (Ok(rows), Ok(forbidden)) => (rows, forbidden),
            (Err(error), _) | (_, Err(error)) => {
                return tracing::warn!(%error, "the standing of keys could not be read");
            }
        };
        self.take_rows(rows, forbidden, asked_at);
    }

    /// Takes over what rows said that were asked for at `asked_at`. What this process has noted since then is newer and stays.
    fn take_rows(&self, rows: Vec<Row>, forbidden: Vec<ForbiddenRow>, asked_at: Instant) {
        let mut known = self.lock();
        let mut heard = std::mem::take(&mut known.forbidden);
        for (id, provider, fingerprint, own, model, wait_ms) in forbidden {
            let key = if own { KeyRef::Own(id) } else { KeyRef::Platform { provider, fingerprint } };
            let at = (key, model);
            let said = heard.remove(&at).and_then(|known| known.said);
            let until = Instant::now() + milliseconds(wait_ms);
            known.forbidden.insert(at, Forbidden { until, said, shared: true });
        }
        // What could not be written is known all the same; what has no row any more was lifted.
        known.forbidden.extend(heard.into_iter().filter(|(_, known)| !known.shared));
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
        if standing != Standing::Active || known.forbidden.is_empty() {
            return standing;
        }
        match known.forbidden.get(&(key.clone(), model.to_owned())) {
            Some(Forbidden { until, .. }) if *until > now => {
                Standing::Cooling { model: Some(model.to_owned()), until: *until, reason: FORBIDDEN.to_owned() }
            }
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

    /// Leaves a key alone for `wait`, for one model or for all. A longer wait that is known stays; a second model makes it
    /// every model. Returns how long it is left alone now.
    ///
    /// # Transaction
    /// One update of the key's row, of no other. A key that is disabled or revoked stays so.
    pub async fn cool(&self, key: &KeyRef, model: Option<&str>, wait: Duration, why: &Failure) -> Duration {
        let mut until = Instant::now() + wait;
        if let Some(pool) = &self.pool {
            let (own, provider, fingerprint) = key.columns();
            let left: Result<Option<f64>, _> = sqlx::query_scalar(
                "update api_keys set status = 'cooling', disabled_reason = $5,
                   cooling_model = case when status = 'cooling' and cooldown_until > engine_now() and cooling_model is distinct from $4
                                        then null else $4 end,
                   cooldown_until = greatest(case when status = 'cooling' then cooldown_until end, engine_now() + $6 * interval '1 ms')
                 where status in ('active', 'cooling')
                   and (id = $1 or ($1 is null and user_id is null and provider = $2 and fingerprint = decode($3, 'hex')))
                 returning (extract(epoch from cooldown_until - engine_now()) * 1000)::float8",
            )
            .bind(own)
            .bind(provider)
            .bind(fingerprint)
            .bind(model)
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
        let same = match known.standings.get(key) {
            Some(Standing::Cooling { model: other, until, .. }) if *until > Instant::now() => other.as_deref() == model,
            Some(Standing::Disabled { .. }) => return until.saturating_duration_since(Instant::now()),
            _ => true,
        };
        let model = model.filter(|_| same).map(str::to_owned);
        known.noted.insert(key.clone(), Instant::now());
        known.standings.insert(key.clone(), Standing::Cooling { model, until, reason: why.code.clone() });
        known.said.insert(key.clone(), why.clone());
        until.saturating_duration_since(Instant::now())
    }

    /// Takes a key out of service until somebody acts, and tells the operator.
    ///
    /// # Transaction
    /// One update of the key's row. A revoked key stays so.
    pub async fn disable(&self, key: &KeyRef, why: &Failure) {
        tracing::error!(?key, code = %why.code, "a key is out of service: replace it, or `loopwright api-keys enable`");
        metrics::counter!("loopwright_api_key_events_total", "event" => "disabled", "reason" => why.code.clone())
            .increment(1);
        {
            let mut known = self.lock();
            known.noted.insert(key.clone(), Instant::now());
            known.standings.insert(key.clone(), Standing::Disabled { reason: why.code.clone() });
            known.said.insert(key.clone(), why.clone());
        }
        let Some(pool) = &self.pool else { return };
        let (own, provider, fingerprint) = key.columns();
        let written = sqlx::query(
            "update api_keys set status = 'disabled', disabled_reason = $4, cooldown_until = null, cooling_model = null
             where status in ('active', 'cooling')
               and (id = $1 or ($1 is null and user_id is null and provider = $2 and fingerprint = decode($3, 'hex')))",
        )
        .bind(own)
        .bind(provider)
        .bind(fingerprint)
        .bind(&why.code)
        .execute(pool)
        .await;
        if let Err(error) = written {
            tracing::warn!(%error, "others are not told that a key is out of service");
        }
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
        board.cool(&key(1), None, Duration::from_secs(60), &why).await;
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
    async fn a_key_cools_for_a_model_and_for_two_of_them_altogether() {
        let board = Board::default();
        let key = KeyRef::Own(Uuid::nil());
        let why = Failure::retryable("transient.rate_limited", "x");
        let now = Instant::now();
        assert_eq!(board.standing(&key, "a", now), Standing::Active);
        board.cool(&key, Some("a"), Duration::from_secs(60), &why).await;
        assert!(matches!(board.standing(&key, "a", now), Standing::Cooling { .. }));
        assert_eq!(board.standing(&key, "b", now), Standing::Active);
        assert_eq!(board.standing(&key, "a", now + Duration::from_secs(61)), Standing::Active);
        board.cool(&key, Some("b"), Duration::from_secs(60), &why).await;
        for model in ["a", "b", "c"] {
            assert!(matches!(board.standing(&key, model, now), Standing::Cooling { .. }), "{model}");
        }
        board.disable(&key, &Failure::permanent("provider.key_invalid", "no")).await;
        board.cool(&key, None, Duration::from_secs(1), &why).await;
        assert!(matches!(board.standing(&key, "a", now), Standing::Disabled { .. }), "cooling does not heal");
        assert_eq!(board.said(&key).unwrap().message, "no");
        board.learn(key.clone(), Standing::Active);
        assert_eq!((board.standing(&key, "a", now), board.said(&key)), (Standing::Active, None));
    }
}
