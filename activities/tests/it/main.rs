// The helpers of tests may unwrap as tests do; clippy's own exception covers test functions only.
#![allow(clippy::unwrap_used)]

mod answers;
mod bench;
mod billed;
mod billing;
mod billing_audit;
mod billing_books;
mod billing_bugs;
mod billing_doubts;
mod billing_once;
mod billing_parked;
mod billing_purchase;
mod billing_random;
mod billing_rules;
mod billing_worker;
mod calls;
mod citus;
mod continuation;
mod fake_provider;
mod fork;
mod keys;
mod loop_steps;
mod orchestrator;
mod outage;
mod prompts;
mod provider;
mod quotes;
mod report;
mod roles;
mod sandbox;
mod under_fire;
mod workspace;
