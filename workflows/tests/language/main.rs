//! The language, construct by construct: YAML is compiled, deployed and run by a real worker on a real Postgres.

mod attempts;
mod bench;
mod blocks;
mod people;
mod runs;
mod shipped;
mod terms;
