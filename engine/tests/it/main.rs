//! The engine on a real Postgres: every test has a database of its own.

mod archive;
mod bench;
mod client;
mod close;
mod faults;
mod filter;
mod fork;
mod passing;
mod pause;
mod query;
mod runs;
mod schedules;
mod update;
