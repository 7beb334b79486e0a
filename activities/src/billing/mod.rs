//! Credits: prices, holds, the ledger, and the hook that makes them part of the engine's transactions.
//!
//! Arrows point one way: `money → price → ledger → hold → hook`; `limit` and `caps` bound a hold; `call` holds the rows of
//! calls, `once` writes them in one statement where nothing is to be decided; `returned` and `policy` serve the hook, `purchase` stands on the ledger, `pricelist` on prices; `audit`, `report` and
//! `books` only read or mark. Nothing here knows a provider; what a call consumed arrives as [`crate::usage`].

pub mod audit;
pub mod books;
mod call;
mod caps;
pub mod forecast;
pub mod hold;
pub mod hook;
pub mod ledger;
pub mod limit;
pub mod money;
mod once;
pub mod policy;
pub mod price;
pub mod pricelist;
pub mod purchase;
pub mod report;
mod returned;

pub use hook::{BillingSettings, LedgerHook};
pub use money::{MicroCredits, PicoUsd, Rate};
