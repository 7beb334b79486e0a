#![doc = include_str!("../README.md")]

pub mod definition;
pub mod error;
pub mod failure;
pub mod ids;
pub mod signature;
pub mod view;

#[cfg(feature = "runtime")]
pub mod activity;
#[cfg(feature = "runtime")]
pub mod client;
#[cfg(feature = "runtime")]
pub mod hook;

pub use error::{Error, Result};
pub use failure::{Failure, FailureKind};
