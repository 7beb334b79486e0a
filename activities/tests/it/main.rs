// The helpers of tests may unwrap as tests do; clippy's own exception covers test functions only.
#![allow(clippy::unwrap_used)]

mod billing;
mod billing_worker;
mod fake_provider;
mod fork;
mod loop_steps;
mod orchestrator;
mod provider;
mod quotes;
mod sandbox;
mod under_fire;
mod workspace;
