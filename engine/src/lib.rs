#![doc = include_str!("../README.md")]

pub mod admission;
pub mod archive;
pub mod definition;
pub mod error;
pub mod event;
pub mod failure;
pub mod filter;
pub mod ids;
pub mod labels;
pub mod machine;
pub mod schedule;
pub mod signature;
pub mod view;

#[cfg(feature = "runtime")]
pub mod activity;
#[cfg(feature = "bench")]
pub mod bench;
#[cfg(feature = "runtime")]
pub mod client;
#[cfg(feature = "runtime")]
mod clock;
#[cfg(feature = "runtime")]
mod committer;
#[cfg(feature = "embedded")]
pub mod embedded;
#[cfg(feature = "runtime")]
pub mod hook;
#[cfg(feature = "runtime")]
pub mod migrate;
#[cfg(feature = "runtime")]
pub mod payload;
#[cfg(feature = "runtime")]
mod request;
#[cfg(feature = "runtime")]
pub mod retention;
#[cfg(feature = "test-util")]
pub mod sim;
#[cfg(feature = "runtime")]
mod store;
#[cfg(feature = "runtime")]
mod tcp;
#[cfg(feature = "test-util")]
pub mod testing;
#[cfg(feature = "runtime")]
pub mod transaction;
#[cfg(feature = "runtime")]
pub mod worker;

pub use error::{Error, Result};
pub use failure::{Failure, FailureKind};
#[cfg(feature = "runtime")]
pub use migrate::{MIGRATIONS, Migration};
