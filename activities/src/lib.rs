#![doc = include_str!("../README.md")]

pub mod agent;
mod ask;
pub mod billing;
pub mod check;
pub mod commit;
pub mod contract;
pub mod decimal;
pub mod deliver;
pub mod edit;
pub mod fact;
pub mod gather;
pub mod git;
pub mod implement;
pub mod index;
pub mod keys;
mod landing;
pub mod limit;
mod nul;
pub mod orchestrator;
pub mod plan;
pub mod provider;
pub mod readme;
pub mod reconcile;
pub mod record;
pub mod sandbox;
#[cfg(feature = "test-util")]
pub mod testing;
pub mod todo;
pub mod toolbox;
pub mod tools;
pub mod usage;
pub mod verify;
pub mod workspace;

use loopwright_engine::{
    Migration,
    activity::Registry,
    signature::{Catalog, Signature},
};
use std::sync::Arc;
use toolbox::Toolbox;

/// Every migration of the product, in order.
pub const MIGRATIONS: &[Migration] = &[
    loopwright_engine::MIGRATIONS[0],
    Migration { version: 2, name: "money", sql: include_str!("../../migrations/0002_money.sql") },
    Migration { version: 3, name: "workspace", sql: include_str!("../../migrations/0003_workspace.sql") },
    Migration { version: 4, name: "telegram", sql: include_str!("../../migrations/0004_telegram.sql") },
    Migration { version: 5, name: "rest", sql: include_str!("../../migrations/0005_rest.sql") },
    Migration { version: 6, name: "loop", sql: include_str!("../../migrations/0006_loop.sql") },
    loopwright_engine::migrate::FLOW,
    loopwright_engine::migrate::SCHEDULES,
    loopwright_engine::migrate::QUEUES,
    loopwright_engine::migrate::UPDATES,
    loopwright_engine::migrate::ROOM,
    loopwright_engine::migrate::CONTINUE,
    loopwright_engine::migrate::PAYLOAD,
    loopwright_engine::migrate::RETENTION,
    loopwright_engine::migrate::MIGRATE,
    loopwright_engine::migrate::TIMED,
    loopwright_engine::migrate::LABELS,
    loopwright_engine::migrate::START,
    Migration { version: 20, name: "keys", sql: include_str!("../../migrations/0020_keys.sql") },
    Migration { version: 21, name: "ledger", sql: include_str!("../../migrations/0021_ledger.sql") },
    Migration { version: 22, name: "quotes", sql: include_str!("../../migrations/0022_quotes.sql") },
    Migration { version: 23, name: "key_models", sql: include_str!("../../migrations/0023_key_models.sql") },
    Migration { version: 24, name: "books", sql: include_str!("../../migrations/0024_books.sql") },
    Migration { version: 25, name: "own_price", sql: include_str!("../../migrations/0025_own_price.sql") },
    loopwright_engine::migrate::HELD,
    Migration { version: 27, name: "parked", sql: include_str!("../../migrations/0027_parked.sql") },
    Migration { version: 28, name: "key_rests", sql: include_str!("../../migrations/0028_key_rests.sql") },
    Migration { version: 29, name: "at_once", sql: include_str!("../../migrations/0029_at_once.sql") },
    loopwright_engine::migrate::CLOCK,
    Migration { version: 32, name: "kin", sql: include_str!("../../migrations/0032_kin.sql") },
    Migration { version: 33, name: "chats", sql: include_str!("../../migrations/0033_chats.sql") },
    Migration { version: 34, name: "indexes", sql: include_str!("../../migrations/0034_indexes.sql") },
];

/// Contracts of all activities.
fn signatures() -> Vec<Signature> {
    let of_the_loop = [
        agent::signature(),
        check::signature(),
        commit::signature(),
        deliver::signature(),
        gather::signature(),
        implement::signature(),
        limit::signature(),
        plan::signature(),
        readme::signature(),
        verify::signature(),
    ];
    of_the_loop.into_iter().chain(reconcile::signatures()).collect()
}

/// What definitions may name, as pure data.
#[must_use]
pub fn catalog() -> Catalog {
    Catalog::new(signatures())
}

/// The activities themselves, for a worker.
#[must_use]
pub fn registry(toolbox: Arc<Toolbox>) -> Registry {
    Registry::new()
        .with(agent::Agent::new(toolbox.clone()))
        .with(check::RunChecks::new(toolbox.clone()))
        .with(commit::Commit::new(toolbox.clone()))
        .with(deliver::Deliver::new(toolbox.clone()))
        .with(gather::Gather::new(toolbox.clone()))
        .with(implement::Implement::new(toolbox.clone()))
        .with(limit::SetLimit::new(toolbox.clone()))
        .with(plan::MakePlan::new(toolbox.clone()))
        .with(readme::Readme::new(toolbox.clone()))
        .with(verify::Verify::new(toolbox))
}

/// A named place at which tests let the process die; all are in `testing::CRASH_POINTS`.
pub(crate) fn crash_point(name: &'static str) {
    #[cfg(feature = "test-util")]
    loopwright_engine::testing::crash_point(name);
    #[cfg(not(feature = "test-util"))]
    let _ = name;
}
