//! The engine on a real Postgres: every test has a database of its own.

mod archive;
mod bench;
mod chain;
mod citus;
mod client;
mod close;
mod crash;
mod exhausted;
mod faults;
mod filter;
mod fork;
mod golden;
mod groups;
mod labels;
mod migrate;
mod passing;
mod pause;
mod payload;
mod query;
mod queues;
mod retention;
mod runs;
mod schedules;
mod skew;
mod together;
mod update;
