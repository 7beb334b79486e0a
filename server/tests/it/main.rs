//! Integration tests of the server: a real socket, a real Postgres, the real binary where the process matters.

mod auth;
mod cli;
mod limits;
mod projects;
mod support;
