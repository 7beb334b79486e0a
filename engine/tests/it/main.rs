//! The engine on a real Postgres: every test has a database of its own.

mod bench;
mod client;
mod faults;
mod filter;
mod passing;
mod runs;
mod schedules;
