//! Integration tests of the server: a real socket, a real Postgres, the real binary where the process matters.

#![allow(clippy::unwrap_used, reason = "a test that panics has failed, and says where")]

mod auth;
mod begin;
mod chaos;
mod cli;
mod drain;
mod e2e;
mod fake_telegram;
mod hosts;
mod house;
mod keys;
mod limits;
mod loop_run;
mod metrics;
mod migrate;
mod money;
mod processes;
mod projects;
mod runs;
mod schedule;
mod shipped;
mod support;
mod telegram;
mod terms;
