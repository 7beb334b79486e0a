//! Credits: prices, holds, the ledger, and the hook that makes them part of the engine's transactions.
//!
//! Arrows point one way: `money → price → ledger → hold → hook`, and `returned → hook`. Nothing here knows a provider; what a call consumed
//! arrives as [`crate::usage`].

pub mod audit;
pub mod forecast;
pub mod hold;
pub mod hook;
pub mod ledger;
pub mod limit;
pub mod money;
pub mod price;
mod returned;

pub use hook::{BillingSettings, LedgerHook};
pub use money::{MicroCredits, PicoUsd, Rate};
