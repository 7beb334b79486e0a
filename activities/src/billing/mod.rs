//! Credits: prices, holds, the ledger, and the hook that makes them part of the engine's transactions.
//!
//! Arrows point one way: `money → price → ledger → hold → hook`; `limit` and `caps` bound a hold; `call` holds the rows of
//! calls, `once` writes them in one statement where nothing is to be decided, `spent` adds up what caps are compared with, over families of runs that `kin` keeps; `parked`,
//! `returned` and `policy` serve the hook, `purchase` stands on the ledger, `pricelist` on prices; `doubt` keeps costs that nobody
//! believes; `audit`, `report` and `books` only read or mark. Nothing here knows a provider; what a call consumed arrives as
//! [`crate::usage`].

pub mod audit;
pub mod books;
mod call;
pub mod caps;
pub mod doubt;
pub mod forecast;
pub mod hold;
pub mod hook;
mod kin;
pub mod ledger;
pub mod limit;
pub mod money;
mod once;
mod parked;
pub mod policy;
pub mod price;
pub mod pricelist;
pub mod purchase;
pub mod report;
mod returned;
mod spent;

pub use hook::{BillingSettings, LedgerHook};
pub use money::{MicroCredits, PicoUsd, Rate};
