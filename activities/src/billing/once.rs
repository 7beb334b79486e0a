//! The ordinary case of a call, as one statement for its announcement and one for its end.
//!
//! The arithmetic is done here, with the prices that were read last; the statement (`migrations/0029_at_once.sql`) sees under the user's
//! lock whether they are still in force and everything else is as it should be, and otherwise does nothing: then [`super::hook`] decides
//! in a transaction, and says which prices it read.

use super::{
    call,
    price::{Rows, Tiers},
};
use crate::usage::{CallClosed, CallOpened};
use loopwright_engine::hook::AtOnce;
use sqlx::{Arguments, Encode, Postgres, Type, postgres::PgArguments};
use std::{
    collections::HashMap,
    hash::Hash,
    sync::{Arc, Mutex, PoisonError},
};
use uuid::Uuid;

/// Models whose prices are remembered: far more than a routing names.
const MODELS_MAX: usize = 1_024;
/// Calls under way that are remembered: many times what a worker makes at once. Of attempts that end without a word some stay.
const CALLS_MAX: usize = 4_096;

/// Who a call belongs to, and its name.
#[derive(Clone, Copy)]
pub(super) struct Whose<'a> {
    pub attempt: Uuid,
    pub key: &'a str,
    pub user: Uuid,
    pub project: Option<Uuid>,
}

/// Which rows count, provider, model.
type Model = (Rows, String, String);

/// What this process knows of prices. May be old, and may be forgotten.
#[derive(Default)]
pub(super) struct Once {
    /// By provider and model.
    prices: Mutex<HashMap<Model, Arc<Tiers>>>,
    /// What calls under way were announced with: by attempt and key, prices and the row that was named, if one was.
    under_way: Mutex<HashMap<(Uuid, String), Announced>>,
}

#[derive(Clone)]
struct Announced {
    tiers: Arc<Tiers>,
    priced: bool,
    own_key: bool,
}

impl Once {
    /// The prices for a call, if what is known of them are the rows with these ids.
    pub fn known(&self, opened: &CallOpened, ids: &[i64]) -> Option<Arc<Tiers>> {
        self.prices(opened).filter(|tiers| tiers.ids() == ids)
    }

    fn prices(&self, opened: &CallOpened) -> Option<Arc<Tiers>> {
        let prices = self.prices.lock().unwrap_or_else(PoisonError::into_inner);
        prices.get(&model(opened)).cloned()
    }

    /// Remembers the prices in force, for calls to come and for this one's end.
    pub fn learn(&self, whose: Whose<'_>, opened: &CallOpened, tiers: Arc<Tiers>) {
        put(&self.prices, MODELS_MAX, model(opened), Arc::clone(&tiers));
        let priced = tiers.bound(opened.input_tokens_max, opened.output_tokens_max).is_some();
        let of = Announced { tiers, priced, own_key: opened.own_key_id.is_some() };
        put(&self.under_way, CALLS_MAX, (whose.attempt, whose.key.to_owned()), of);
    }

    /// The announcement of a call whose prices are known and within its ceilings.
    pub fn announced(&self, whose: Whose<'_>, opened: &CallOpened) -> Option<AtOnce> {
        let tiers = self.prices(opened)?;
        let bound = tiers.bound(opened.input_tokens_max, opened.output_tokens_max);
        let worst = match (opened.own_key_id, &bound) {
            // What his own key costs is between him and his provider.
            (Some(_), _) => 0,
            (None, Some((price, _))) if price.exceeds(opened.input_umtok_max, opened.output_umtok_max) => return None,
            (None, Some((_, worst))) => worst.0,
            (None, None) => return None,
        };
        let (priced, own_key) = (bound.is_some(), opened.own_key_id.is_some());
        let of = Announced { tiers: Arc::clone(&tiers), priced, own_key };
        put(&self.under_way, CALLS_MAX, (whose.attempt, whose.key.to_owned()), of);
        let mut arguments = Bound::default();
        arguments
            .add(whose.attempt)?
            .add(whose.key)?
            .add(whose.user)?
            .add(whose.project)?
            .add(&opened.provider)?
            .add(&opened.model)?
            .add(Rows::of(opened).or_any(&opened.model))?
            .add(tiers.ids())?
            .add(bound.map(|(price, _)| price.id))?
            .add(worst)?
            .add(opened.own_key_id)?
            .add(&opened.key_fingerprint)?
            .add(&opened.purpose)?
            .add(&opened.request_sha256)?;
        let sql = "call_announced($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14)";
        Some(AtOnce { sql, arguments: arguments.0 })
    }

    /// The end of a call that this process has announced.
    pub fn ended(&self, whose: Whose<'_>, closed: &CallClosed) -> Option<AtOnce> {
        let call = (whose.attempt, whose.key.to_owned());
        let of = self.under_way.lock().unwrap_or_else(PoisonError::into_inner).remove(&call)?;
        let prompt = closed.usage.as_ref().map_or(0, |usage| usage.tokens_prompt);
        // A model that was announced with a price and has none for what it was sent is not ordinary.
        let price = if of.priced { Some(of.tiers.price(prompt)?) } else { None };
        let end = call::End::of(closed, price, true, of.own_key);
        if end.doubt.is_some() {
            return None;
        }
        let mut arguments = Bound::default();
        arguments
            .add(whose.attempt)?
            .add(whose.key)?
            .add(whose.user)?
            .add(of.tiers.ids())?
            .add(end.state)?
            .add(&end.model_served)?
            .add(&closed.provider_request_id)?
            .add(end.http_status)?
            .add(&closed.error_class)?
            .add(&closed.finish_reason)?
            .add(closed.stream_completed)?
            .add(end.reported)?
            .add(end.prompt)?
            .add(end.cached)?
            .add(end.cache_write)?
            .add(end.output)?
            .add(end.reasoning)?
            .add(end.source)?
            .add(price.map(|price| price.id))?
            .add(end.cost)?
            .add(end.provider_cost)?
            .add(end.raw)?;
        let sql = "call_ended($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19, $20, $21, $22)";
        Some(AtOnce { sql, arguments: arguments.0 })
    }
}

fn model(opened: &CallOpened) -> Model {
    (Rows::of(opened), opened.provider.clone(), opened.model.clone())
}

/// Remembers one more, or begins anew: what is forgotten is read again.
fn put<K: Eq + Hash, V>(known: &Mutex<HashMap<K, V>>, max: usize, key: K, value: V) {
    let mut known = known.lock().unwrap_or_else(PoisonError::into_inner);
    if known.len() >= max && !known.contains_key(&key) {
        known.clear();
    }
    known.insert(key, value);
}

#[derive(Default)]
struct Bound(PgArguments);

impl Bound {
    /// `None`: it cannot be written, and whoever is asked next says so.
    fn add<'q, T: Encode<'q, Postgres> + Type<Postgres> + 'q>(&mut self, value: T) -> Option<&mut Self> {
        self.0.add(value).ok()?;
        Some(self)
    }
}
