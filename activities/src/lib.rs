#![doc = include_str!("../README.md")]

pub mod agent;
pub mod billing;
pub mod check;
pub mod commit;
pub mod contract;
pub mod deliver;
pub mod edit;
pub mod gather;
pub mod git;
pub mod implement;
pub mod index;
pub mod orchestrator;
pub mod plan;
pub mod provider;
pub mod readme;
pub mod sandbox;
pub mod toolbox;
pub mod tools;
pub mod usage;
pub mod verify;
pub mod workspace;

use loopwright_engine::Migration;

/// Every migration of the product, in order.
pub const MIGRATIONS: &[Migration] = &[
    loopwright_engine::MIGRATIONS[0],
    Migration { version: 2, name: "money", sql: include_str!("../../migrations/0002_money.sql") },
    Migration { version: 3, name: "workspace", sql: include_str!("../../migrations/0003_workspace.sql") },
    Migration { version: 4, name: "telegram", sql: include_str!("../../migrations/0004_telegram.sql") },
];
