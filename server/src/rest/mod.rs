//! HTTP: warp's filters inside tower's layers inside our own accept loop.
//!
//! ```text
//! serve (sockets, limits) ─▶ layers (id, span, panics, headers, gzip) ─▶ routes ─▶ handler ─▶ engine's client, store
//!                                                                          │
//!                                         recover: 404, 405 ◀──────────────┘ (only what routing itself refuses)
//! ```
//!
//! Handlers return a reply or an [`Error`], which is a reply too; neither becomes a rejection. No route reads SQL: see
//! [`crate::store`]. Start reading at [`routes`].

pub mod auth;
mod begin;
mod call;
mod credits;
pub mod error;
mod events;
mod export;
mod health;
mod jwks;
mod jwt;
mod keys;
pub mod limit;
mod loop_run;
mod migrate;
mod projects;
mod quotes;
mod routes;
mod runs;
mod schedules;
pub mod serve;
mod updates;

pub use crate::store::projects::workflow_id;
pub use call::Peer;
pub use error::{Code, Error};
pub use jwks::Pace as JwksPace;
pub use jwt::install_crypto;
pub(crate) use projects::{IDEA_MAX, WORKFLOW};
pub use routes::{ROUTES, routes};

use crate::{config, store::Store};
use futures_util::future::BoxFuture;
use loopwright_activities::keys::Keys;
use loopwright_engine::{Failure, client::Client};
use metrics_exporter_prometheus::PrometheusHandle;
use std::sync::Arc;
use tokio::sync::{Semaphore, watch};
use uuid::Uuid;

/// Where the zip of a project's repository comes from.
pub trait Archives: Send + Sync + 'static {
    /// The newest state of the project as a zip file.
    fn zip(&self, project: Uuid) -> BoxFuture<'_, Result<Vec<u8>, Failure>>;
}

/// What the routes work with. Cheap to clone.
#[derive(Clone)]
pub struct State(Arc<Inner>);

/// The parts of a [`State`].
pub struct Inner {
    pub store: Store,
    pub client: Client,
    pub keys: Keys,
    pub registry: auth::Registry,
    pub limit: limit::RateLimit,
    pub archives: Arc<dyn Archives>,
    pub metrics: PrometheusHandle,
    pub body_bytes_max: usize,
    /// One permit per event stream, per export, and per update whose answer is waited for.
    pub streams: Arc<Semaphore>,
    /// True once the server is to stop: streams end, waits answer.
    pub stop: watch::Receiver<bool>,
}

impl State {
    /// # Errors
    /// A signing key that cannot be read.
    pub fn new(
        config: &config::Config,
        store: Store,
        client: Client,
        archives: Arc<dyn Archives>,
        metrics: PrometheusHandle,
        stop: watch::Receiver<bool>,
    ) -> Result<Self, config::Error> {
        Ok(Self(Arc::new(Inner {
            keys: store.keys(&config.keys),
            store,
            client,
            registry: auth::Registry::new(&config.auth)?,
            limit: limit::RateLimit::new(config.http.requests_per_minute),
            archives,
            metrics,
            body_bytes_max: config.http.body_bytes_max,
            streams: Arc::new(Semaphore::new(config.http.streams_max)),
            stop,
        })))
    }
}

impl std::ops::Deref for State {
    type Target = Inner;
    fn deref(&self) -> &Inner {
        &self.0
    }
}
