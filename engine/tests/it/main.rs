//! The engine on a real Postgres: every test has a database of its own.

mod archive;
mod bench;
mod client;
mod crash;
mod faults;
mod filter;
mod fork;
mod passing;
mod pause;
mod runs;
mod schedules;
mod skew;
